"""`chunkc tune`: the search, with trials that are wrong or gain nothing; the file, and what builds take from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from test_bench import GLA

import chunkc
from chunkc import cli
from chunkc.artifact import fingerprint, pack, replace_folder
from chunkc.backends.package import emit_files, tunable
from chunkc.bench.parts import parts_of
from chunkc.bench.sizes import BenchError
from chunkc.driver import compile_source
from chunkc.ir.diagnostics import CompileError, SourceFile
from chunkc.ir.tuning import Schedule, Tuned, Tuning
from chunkc.tune.run import Found, search
from chunkc.tune.verb import table
from chunkc.tuning import read_tuning

A, B, C = (64, 128, 4, 3), (64, 64, 4, 3), (128, 128, 8, 2)
OTHER = (128, 64, 8, 2)


def tuning(**kernels: Schedule) -> Tuning:
    rows = {name: Tuned(schedule=s, ms=1.0, default=A, default_ms=2.0) for name, s in kernels.items()}
    return Tuning(device="GPU", unit="gla", settings={"heads": 2}, shape={"B": 8, "t": 4096}, versions={}, kernels=rows)


def written(folder: Path, text: str = "") -> Path:
    """A spec, and beside it a tuning file with this text."""
    (folder / "gla.spec").write_text(GLA)
    if text:
        (folder / "gla.tuning.json").write_text(text)
    return folder / "gla.spec"


def schedules_in(package: Path) -> dict[str, Schedule]:
    text = (package / "_kernels.py").read_text()
    table = text[text.index("SCHEDULES: dict") :]
    rows: dict[str, Schedule] = eval(table[table.index("{") : table.index("}") + 1])
    return rows


def shaped(path: Path) -> str:
    """The fingerprint of what a file and its tuning are built to."""
    source = SourceFile.read(path)
    return fingerprint(source, {}, tuning=read_tuning(source))


# -- the file ----------------------------------------------------------------------------------------------------------


def test_builds_take_schedules_from_the_file(tmp_path: Path) -> None:
    path = written(tmp_path)
    before = schedules_in(chunkc.build(path, tmp_path / "out"))
    written(tmp_path, tuning(S_read_j=OTHER).text())
    package = chunkc.build(path, tmp_path / "out")
    assert schedules_in(package) == {**before, "S_read_j": OTHER} != before
    assert f'"S_read_j": {OTHER},  # tuned; {before["S_read_j"]} before' in (package / "_kernels.py").read_text()
    (tmp_path / "gla.tuning.json").unlink()
    assert schedules_in(chunkc.build(path, tmp_path / "out")) == before


def test_a_build_is_out_of_date_when_its_tuning_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, tuning(S_read_j=OTHER).text())
    assert cli.run(["build", str(path), "-o", str(tmp_path)]) == 0
    assert cli.run(["build", str(path), "-o", str(tmp_path), "--check"]) == 0
    written(tmp_path, tuning(S_read_j=C).text())
    assert cli.run(["build", str(path), "-o", str(tmp_path), "--check"]) == 1
    capsys.readouterr()


def test_what_is_loaded_is_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHUNKC_CACHE_DIR", str(tmp_path / "cache"))
    path = written(tmp_path)
    untuned = shaped(path)
    loaded = [chunkc.load(path)]
    written(tmp_path, tuning(S_read_j=OTHER).text())
    assert shaped(path) != untuned
    slower = tuning(S_read_j=OTHER).text().replace('"ms": 1.0', '"ms": 1.5')
    before = shaped(path)
    assert shaped(written(tmp_path, slower)) == before
    loaded.append(chunkc.load(path))
    first, second = (schedules_in(Path(str(m.__file__)).parent)["S_read_j"] for m in loaded)
    assert first != second == OTHER


def test_the_file_reads_back() -> None:
    made = tuning(S_states=B, S_read_j=OTHER)
    assert Tuning.model_validate_json(made.text()) == made
    assert made.schedules() == {"S_states": B, "S_read_j": OTHER}


BAD = {
    "": "nothing",
    tuning(S_states=B).text().replace("64,\n", '"64",\n', 1): "no number",
    tuning(S_states=B).text().replace('"ms": 1.0', '"ms": Infinity'): "for ever",
    tuning().text().replace('"device": "GPU"', '"device": "GPU\\nerror"'): "two lines",
    "{": "no JSON",
    json.dumps({**json.loads(tuning().text()), "format": 2}): "another version",
    tuning(S_states=B).text().replace("3\n", "9\n", 1): "nine stages",
    tuning(S_states=B).text().replace("64,\n", "32,\n", 1): "narrow",
    tuning(S_states=B).text().replace("64,\n", "96,\n", 1): "no power of two",
    tuning(S_states=B).text().replace(" 4,\n", " 3,\n", 1): "three warps",
    tuning(S_states=B).text().replace('"ms": 1.0', '"ms": 0'): "no time",
}


@pytest.mark.parametrize("text", BAD, ids=BAD.values())
def test_what_is_no_tuning_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    path = written(tmp_path, text or " ")
    assert cli.run(["build", str(path), "-o", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "bad-tuning" in said and "gla.tuning.json" in said and "chunkc tune" in said
    assert not (tmp_path / "out").exists()
    with pytest.raises(CompileError):
        chunkc.load(path)


def test_a_tuning_of_other_kernels_is_said_to_be_stale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, tuning(S_read_j=OTHER, R_read_j=OTHER).text())
    assert cli.run(["build", str(path), "-o", str(tmp_path)]) == 0
    said = capsys.readouterr().err
    assert "stale-tuning" in said and "R_read_j" in said and "S_read_j" not in said
    assert cli.run(["explain", str(path)]) == 0
    found = capsys.readouterr()
    assert "stale-tuning" in found.err and "1 of 1 schedules are others" in found.out
    assert schedules_in(tmp_path / "gla")["S_read_j"] == OTHER


def test_explain_says_what_was_tuned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, tuning(S_read_j=OTHER, S_states=A).text())
    assert cli.run(["explain", str(path)]) == 0
    assert "tuned on GPU at B=8, t=4096: 1 of 2 schedules are others  (" in capsys.readouterr().out
    assert cli.run(["explain", "--json", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)[0]["tuning"]["changed"] == ["S_read_j"]


def test_candidates_begin_with_what_is_untuned(tmp_path: Path) -> None:
    path = written(tmp_path)
    known = tunable(SourceFile.read(path), compile_source(SourceFile.read(path)).units)
    assert {name: found[0] for name, found in known.items()} == schedules_in(chunkc.build(path, tmp_path / "out"))
    assert all(len(set(found)) == len(found) > 3 for found in known.values())


@pytest.mark.parametrize("kind", ["folder", "dangling", "latin"])
def test_what_cannot_be_read_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    path, file = written(tmp_path), tmp_path / "gla.tuning.json"
    if kind == "folder":
        file.mkdir()
    elif kind == "dangling":
        file.symlink_to(tmp_path / "nowhere")
    else:
        file.write_bytes(b"\xe9")
    assert cli.run(["build", str(path), "-o", str(tmp_path / "out")]) == 1
    assert "cannot-read" in capsys.readouterr().err
    assert cli.run(["fmt", "--check", str(path)]) == 0, "which has nothing to do with it"


def test_only_the_file_that_is_built_is_tuned(tmp_path: Path) -> None:
    """What lies beside a file that it uses, or beside one of another suffix, is of no account."""
    path = written(tmp_path)
    (tmp_path / "lib.spec").write_text("fn twice[a](x) = 2 * x\n")
    (tmp_path / "lib.tuning.json").write_text("[]")
    path.write_text('use "lib.spec"\n' + GLA)
    assert not chunkc.check(path)
    (tmp_path / "other.txt").write_text(GLA)
    (tmp_path / "other.tuning.json").write_text("[]")
    assert cli.run(["explain", str(tmp_path / "other.txt")]) == 0
    assert cli.run(["tune", str(tmp_path / "other.txt")]) == 2


@pytest.mark.parametrize("units, prefix", [(GLA, ""), (GLA + GLA.replace("gla", "other"), "gla_")], ids=["one", "two"])
def test_what_is_timed_is_tuned(tmp_path: Path, units: str, prefix: str) -> None:
    """The package of a part, that of one unit alone."""
    path = written(tmp_path, tuning(**{f"{prefix}S_read_j": OTHER}).text())
    path.write_text(units)
    compiled = compile_source(SourceFile.read(path))
    assert schedules_in(chunkc.build(path, tmp_path / "out"))[f"{prefix}S_read_j"] == OTHER
    (part,) = parts_of(compiled, compiled.checked.module.units[0])
    replace_folder(pack(part.compiled, emit_files, {}), tmp_path / "part")
    assert schedules_in(tmp_path / "part")["S_read_j"] == OTHER


# -- the search --------------------------------------------------------------------------------------------------------

KNOWN: dict[str, tuple[Schedule, ...]] = {"S_states": (A, B, C), "S_read_j": (A, B), "S_never": (A, B)}
MS = {("S_states", A): 1.0, ("S_states", B): 0.99, ("S_states", C): 0.8, ("S_read_j", A): 2.0, ("S_read_j", B): 1.5}


class Machine:
    """Trials whose kernels take `MS`; `wrong` are the schedules with which a check fails."""

    def __init__(self, *wrong: tuple[str, Schedule]) -> None:
        self.wrong, self.checked, self.timed = wrong, [], []  # type: ignore[var-annotated]

    def __call__(self, task: str, changed: Mapping[str, Schedule]) -> dict[str, Any]:
        full = {name: changed.get(name, found[0]) for name, found in KNOWN.items() if name != "S_never"}
        if task == "check":
            self.checked.append(dict(changed))
            bad = [row for row in full.items() if row in self.wrong]
            return {"rows": list(full), **({"reason": f"wrong: {bad[0][0]}"} if bad else {})}
        assert not any(row in self.wrong for row in full.items()), "timed though it is wrong"
        self.timed.append(dict(changed))
        times = {name: MS[name, s] for name, s in full.items()}
        return {"kernels": times, "forward_ms": sum(times.values()), "both_ms": 2 * sum(times.values())}


def found_by(machine: Machine) -> tuple[dict[str, Schedule], Any, Any, Any]:
    rows, *rest = search(machine, KNOWN, 1, lambda text: None)
    return {name: row.schedule for name, row in rows.items()}, *rest


def test_each_kernel_has_its_fastest() -> None:
    machine = Machine()
    assert found_by(machine) == (
        {"S_states": C, "S_read_j": B},
        (),
        (3.0, 6.0),
        (pytest.approx(2.3), pytest.approx(4.6)),
    )
    assert machine.timed == [{}, {"S_states": B, "S_read_j": B}, {"S_states": C}, {"S_states": C, "S_read_j": B}]
    assert machine.checked == machine.timed


def test_what_fails_is_dropped_and_the_rest_is_not() -> None:
    machine = Machine(("S_states", B), ("S_states", C))
    chosen, dropped, _, _ = found_by(machine)
    assert chosen == {"S_states": A, "S_read_j": B}
    assert [(d.kernel, d.schedule, d.reason) for d in dropped] == [
        ("S_states", B, "wrong: S_states"),
        ("S_states", C, "wrong: S_states"),
    ]


def test_what_gains_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MS, ("S_states", C), 0.985)
    monkeypatch.setitem(MS, ("S_read_j", B), 2.0)
    machine = Machine()
    assert found_by(machine)[0] == {"S_states": A, "S_read_j": A}
    assert machine.checked[-1] == {"S_states": C}, "there is nothing to check again"


def test_wrong_together_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def together(task: str, changed: Mapping[str, Schedule], machine: Machine = Machine()) -> Mapping[str, Any]:  # noqa: B008
        found = machine(task, changed)
        return {**found, "reason": "killed by SIGSEGV"} if changed == {"S_states": C, "S_read_j": B} else found

    with pytest.raises(BenchError, match="what was chosen cannot be used here: killed by SIGSEGV"):
        search(together, KNOWN, 2, lambda text: None)


def test_nothing_to_tune_and_an_untuned_package_that_fails() -> None:
    with pytest.raises(BenchError, match="nothing here has kernels"):
        search(lambda task, changed: {"rows": []}, KNOWN, 1, lambda text: None)
    with pytest.raises(BenchError, match="the untuned schedules cannot be used here: no memory"):
        search(lambda task, changed: {"reason": "no memory"}, KNOWN, 1, lambda text: None)


def test_the_table() -> None:
    rows, dropped, before, after = search(Machine(("S_states", B)), KNOWN, 1, lambda text: None)
    lines = table(Found(tuning().model_copy(update={"kernels": rows}), dropped, before, after))
    assert lines[0] == "GPU, B=8, t=4096, bf16"
    changed = "64 x 128, 4 warps, 3 stages 1.000 ms -> 128 x 128, 8 warps, 2 stages 0.800 ms"
    assert " ".join(lines[1].split()) == f"S_states {changed}"
    assert "  dropped: S_states 64 x 64, 4 warps, 3 stages: wrong: S_states" in lines
    assert " ".join(lines[-1].split()) == "with backward 6.000 ms untuned, 4.600 ms tuned"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_and_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path)
    assert cli.run(["tune", str(path)]) == 2
    assert "schedules are tuned on a GPU" in capsys.readouterr().err
    assert not (tmp_path / "gla.tuning.json").exists()
    assert cli.run(["tune", "-"]) == 2
    assert "does not read stdin" in capsys.readouterr().err
    assert cli.run(["tune", str(tmp_path / "none.spec")]) == 1
