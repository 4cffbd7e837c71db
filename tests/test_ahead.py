"""Kernels compiled ahead: what a build puts into a package, when it is used, and what is said when it is not.

No GPU is needed: Triton compiles for any, and what is called before a launch runs on tensors without values."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
import triton
from emitted import emit
from shipped import SPECS, TEXTS
from test_language import CHUNKED

import chunkc
from chunkc import building, cli
from chunkc.ahead import calls, targets
from chunkc.ahead.run import Made, Usage, request_unit, values_of
from chunkc.ahead.targets import TARGETS, Ahead
from chunkc.artifact import EmissionError, differing, fingerprint, load_package, publish, read_manifest, sha256, verify
from chunkc.backends.triton.ahead import jitted
from chunkc.building import build_source
from chunkc.driver import compile_source
from chunkc.ir.diagnostics import CompileError, SourceFile

OP = cases.PLAIN
SEES = """op sees(heads: int, dk: int, dv: int) {
  axes { t: time, s = t, h = heads, i = dk, j = dv }
  input q[t, h, i], k0[t, h, i], v0[t, h, j]
  k = k0[t = s]
  v = v0[t = s]
  attention o[t, h, j] over s {
    logit = dot[i](q, k)
    value = v
    mask = s <= t
  }
  output o
}
"""
MEAN = """op mean(heads: int) {
  axes { t: time, h = heads }
  input x[t, h], f[t, h] in [0, 1]
  recurrence over t {
    state s[h]
    s = f * s + x
  }
  output s
}
"""
SIZES = {"heads": 2, "dk": 16, "dv": 16}
SET = [part for name, value in SIZES.items() for part in ("--set", f"{name}={value}")]
AHEAD = Ahead("sm_90")
TARGET = ["--target", "sm_90", "--aot"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ahead")
    (folder / "gated.spec").write_text(OP + SEES)
    return folder


@pytest.fixture(scope="module")
def package(home: Path) -> Path:
    """The op with its kernels compiled for a Hopper GPU."""
    assert cli.run(["build", str(home / "gated.spec"), "-o", str(home / "layers"), *TARGET, *SET]) == 0
    return home / "layers" / "gated"


def test_what_a_package_holds(package: Path) -> None:
    manifest = read_manifest(package)
    assert manifest is not None
    assert manifest.ahead == {"target": "sm_90", "dtype": "bf16", "triton": triton.__version__}
    held = {f"_compiled/{p.name}" for p in (package / "_compiled").iterdir()}
    assert held == {name for name in manifest.files if "/" in name}
    assert all(sha256((package / name).read_bytes()) == hashed for name, hashed in manifest.files.items())
    assert json.loads((package / "_compiled" / "index.json").read_text())["target"] == ["cuda", 90, 32]
    launched = {f.__name__ for f in jitted(vars(load_kernels(package))) if "tl.store" in f.src}
    assert names(package) == launched, "forward, backward and for one token"
    paths = [str(package.parent), "/tmp/", os.path.dirname(sys.executable)]
    for name in held:
        assert not [path for path in paths if path.encode() in (package / name).read_bytes()], name


def names(package: Path) -> set[str]:
    """The kernels that were compiled."""
    index = json.loads((package / "_compiled" / "index.json").read_text())
    return {key.rpartition("-")[0] for key in index["kernels"]}


def load_kernels(package: Path) -> Any:
    load_package(package)
    name = next(n for n, m in sys.modules.items() if getattr(m, "__file__", None) == str(package / "__init__.py"))
    return __import__(f"{name}._kernels", fromlist=["x"])


def test_the_same_build_is_the_same_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        spec = tmp_path / place / "mean.spec"
        spec.write_text(MEAN)
        assert cli.run(["build", str(spec), "-o", str(tmp_path / place), *TARGET, "--set", "heads=40"]) == 0
    said = capsys.readouterr()
    assert said.out == "".join(f"{tmp_path / place / 'mean'}\n" for place in ("a", "b"))
    assert re.search(r"\d kernels compiled for sm_90, bf16 inputs\n  s_walk", said.err) and "registers" in said.err
    first = {str(p.relative_to(tmp_path / "a" / "mean")): p.read_bytes() for p in (tmp_path / "a").rglob("*.*")
             if p.is_file() and p.suffix != ".spec"}  # fmt: skip
    assert len(first) > 10 and differing(first, tmp_path / "b" / "mean") == []


def test_what_is_up_to_date_is_not_compiled(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "compile_ahead", None)
    spec = package.parent.parent / "gated.spec"
    arguments = ["build", str(spec), "-o", str(package.parent), *TARGET, *SET]
    assert cli.run(arguments) == 0
    assert cli.run([*arguments, "--check"]) == 0
    assert chunkc.build(spec, package.parent, SIZES, target="sm_90") == package


def test_what_is_asked_for_shapes_the_fingerprint() -> None:
    source = SourceFile("gated.spec", OP)
    records = [None, *(Ahead(t, d).record() for t in ("sm_80", "sm_90") for d in ("bf16", "fp32"))]
    records.append({**AHEAD.record(), "triton": "3.0.0"})
    assert len({fingerprint(source, SIZES, record) for record in records}) == len(records)
    assert fingerprint(source, SIZES) == fingerprint(source, SIZES, None)


def test_a_file_more_or_less_is_seen(package: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(package, tmp_path / "gated")
    manifest = read_manifest(copy)
    assert manifest is not None
    files = {name: (copy / name).read_bytes() for name in [*manifest.files, "manifest.json"]}
    assert not publish(files, copy)
    (copy / "_compiled" / "mine.txt").write_text("mine")
    assert differing(files, copy) == ["_compiled/mine.txt"]
    with pytest.raises(CompileError, match="not-a-package"):
        publish(files, copy)


def test_only_what_reads_compiled_files_may_read_files() -> None:
    text = "import hashlib\nimport json\n"
    verify({"__init__.py": "", "_ahead.py": text})
    with pytest.raises(EmissionError, match="may not use hashlib"):
        verify({"__init__.py": "", "_other.py": text})


# -- first calls -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outcomes(package: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What first calls compiled and said, with the package as built, and with what differs from it."""
    folder = tmp_path_factory.mktemp("calls")
    units = compile_source(SourceFile("gated.spec", OP + SEES)).units
    requests: dict[str, dict[str, Any]] = {}

    def case(name: str, target: str = "sm_90", version: str = "", **sizes: int) -> Path:
        copy = shutil.copytree(package, folder / f"gated_{name}", ignore=shutil.ignore_patterns("__pycache__"))
        of = TARGETS[target]
        requests[name] = {"folder": str(folder), "package": copy.name, "target": [of.backend, of.arch, of.warp_size],
                          "triton": version, "units": [request_unit(u, {**SIZES, **sizes}) for u in units]}  # fmt: skip
        return copy

    case("same")
    case("other_gpu", target="sm_80")
    case("amd", target="gfx942")
    case("other_triton", version="3.0.0")
    case("other_sizes", dk=32)
    shutil.rmtree(case("stripped") / "_compiled")
    edited = case("edited") / "_kernels.py"
    edited.write_text(edited.read_text() + "# mine\n")
    for name, of in (
        ("binary", "gated_*.cubin"),
        ("metadata", "gated_*.json"),
        ("index", "index.json"),
    ):
        found = sorted((case(name) / "_compiled").glob(of))
        for file in (f for f in found if f.name.partition("-")[0] == found[0].name.partition("-")[0]):
            file.write_bytes(file.read_bytes()[:-1] + b"?")
    (folder / "requests.json").write_text(json.dumps(list(requests.values())))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                   "TRITON_CACHE_DIR": str(folder / "cache")}  # fmt: skip
    script = Path(__file__).parent / "ahead_calls.py"
    done = subprocess.run([sys.executable, script, folder / "requests.json", folder / "result.json"],
                          env=environment, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(zip(requests, json.loads((folder / "result.json").read_text())))


def test_nothing_is_compiled_where_all_is_as_built(outcomes: dict[str, Any]) -> None:
    assert outcomes["same"] == {"compiled": [], "said": []}


@pytest.mark.parametrize("case, reason", [
    ("other_gpu", "they are for cuda 90, this GPU is cuda 80"),
    ("amd", "they are for cuda 90, this GPU is hip gfx942"),
    ("other_triton", f"they are for Triton {triton.__version__}, this is 3.0.0"),
    ("other_sizes", "with H=2, I=32, J=16, "),
    ("other_sizes", "they are for gated(heads=2, dk=16, dv=16), sees(heads=2, dk=16, dv=16) with bf16 inputs"),
    ("stripped", "_compiled/index.json cannot be read: No such file or directory"),
    ("edited", "_kernels.py is not what was built"),
    ("index", "_compiled/index.json is not what was built"),
])  # fmt: skip
def test_what_does_not_match_is_compiled_and_said_once(outcomes: dict[str, Any], case: str, reason: str,
                                                       package: Path) -> None:  # fmt: skip
    (said,) = outcomes[case]["said"]
    assert said.startswith(f"gated_{case}: kernels that were compiled ahead are not used: ")
    assert reason in said
    sized = names(package) - ({"fill_tables"} if case == "other_sizes" else set())
    assert outcomes[case]["compiled"] == sorted(sized)


@pytest.mark.parametrize("case, ending", [("binary", ".cubin"), ("metadata", ".json")])
def test_a_tampered_kernel_is_refused_and_said(outcomes: dict[str, Any], case: str, ending: str, package: Path) -> None:
    (said,) = outcomes[case]["said"]
    assert f"{ending} is not what was built: its hash is another than in manifest.json" in said
    assert outcomes[case]["compiled"] == [min(n for n in names(package) if n.startswith("gated_"))]


def test_the_interpreter_runs_python_and_says_nothing(package: Path) -> None:
    code = "import warnings; warnings.simplefilter('error'); import gated._kernels as k; print(type(k.gated_S_states))"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(package.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "InterpretedFunction" in done.stdout, done.stderr


WIDTHS = {"d_model": 32, "d_in": 32, "vocab": 16}

# -- calls -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXTS)
def test_every_shipped_spec_launches_all_its_kernels(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = SourceFile.read(SPECS / f"{name}.spec", f"{name}.spec")
    module = load_package(build_source(source, tmp_path, {}).folder)
    found, launched = jitted(vars(calls.with_kernels(module))), set()
    for kernel in found:
        kernel.run = lambda *args, _of=kernel, **more: launched.add(_of.__name__)
    monkeypatch.setattr(calls, "BATCHES", (1,))
    stores = {k.__name__ for k in found if "tl.store" in k.src}
    for unit in compile_source(source).units if stores else ():
        own = {p.name: WIDTHS.get(p.name, 2) for p in unit.params if p.default is None}
        calls.Caller(module, request_unit(unit, values_of(unit, own)), torch.bfloat16).all()
    for loaded in [n for n in sys.modules if n.partition(".")[0] == module.__name__]:  # others load it unchanged
        del sys.modules[loaded]
    shared = ("vector", "max_plus")  # of these a package has all or none
    stores = {name for name in stores if not name.startswith(shared)}
    if name == "rat":  # chunks of 16 tokens are never cut into segments
        stores = {name for name in stores if "_totals" not in name and name != "fill_tables"}
    assert launched >= stores


# -- what is said ------------------------------------------------------------------------------------------------------


def codes(text: str, settings: dict[str, Any], ahead: Ahead, out: Path) -> list[str]:
    with pytest.raises(CompileError) as caught:
        build_source(SourceFile("case.spec", text), out, settings, ahead)
    assert not list(out.glob("case*")), "nothing is written"
    return [d.code for d in caught.value.diagnostics]


def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert codes(OP, SIZES, Ahead("sm_91"), tmp_path) == ["unknown-target"]
    assert codes(OP, {"heads": 2}, AHEAD, tmp_path) == ["open-parameter"]
    halves = OP.replace("i = dk", "i = dk / 2")
    assert codes(halves, {**SIZES, "dk": 15}, AHEAD, tmp_path) == ["bad-size"]
    monkeypatch.setattr(targets, "find_spec", lambda name: None)
    assert codes(OP, SIZES, AHEAD, tmp_path) == ["no-compiler"]


def test_a_kernel_that_triton_cannot_compile(tmp_path: Path) -> None:
    """The side of a state is more than a tensor of Triton's may hold."""
    assert codes(OP, {**SIZES, "dk": 1 << 16}, AHEAD, tmp_path) == ["cannot-compile"]


def test_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "gated.spec").write_text(OP)
    assert cli.run(["build", str(tmp_path / "gated.spec"), "-o", str(tmp_path), "--aot"]) == 2
    assert "--aot needs to know the GPU" in capsys.readouterr().err


def test_a_target_alone_leaves_the_package_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "gru.spec").write_text(TEXTS["gru"])
    settings = ["--set", "d_in=16", "--set", "d_model=16"]
    assert cli.run(["build", str(tmp_path / "gru.spec"), "-o", str(tmp_path / "a"), *settings]) == 0
    capsys.readouterr()
    assert (
        cli.run(["build", str(tmp_path / "gru.spec"), "-o", str(tmp_path / "b"), "--target", "gfx942", *settings]) == 0
    )
    assert "0 kernels compiled for gfx942" in capsys.readouterr().err
    files = {p.name: p.read_bytes() for p in (tmp_path / "a" / "gru").iterdir()}
    assert differing(files, tmp_path / "b" / "gru") == []


def test_kernels_that_do_not_fit_are_warned_of() -> None:
    compiled = compile_source(SourceFile("gated.spec", OP))
    used = [Usage("gated", "a", "H=2", 4, 96, 0, 1000), Usage("gated", "b", "H=2", 4, 255, 40, 1000),
            Usage("gated", "b", "H=4", 4, 255, 96, 1000), Usage("gated", "c", "H=2", 8, 255, 8, 1 << 20)]  # fmt: skip
    made = Made({}, tuple(used))
    found = made.warnings(AHEAD, compiled)
    assert [(d.code, d.severity, d.span) for d in found] == [
        ("kernel-too-large", "warning", compiled.units[0].span)
    ] * 2
    assert found[0].message == "'b' keeps 96 bytes a thread in memory for want of registers"
    assert found[1].message.startswith("'c' wants 1048576 bytes of shared memory, and sm_90 has 232448")
    report = made.report(AHEAD)
    assert report[0] == "4 kernels compiled for sm_90, bf16 inputs" and len(report) == 5


def test_what_could_not_be_made_is_said() -> None:
    assert Made({}, (), "no C compiler was found").report(AHEAD)[-1].strip() == "no C compiler was found"


def test_whole_chunks_are_among_the_calls(tmp_path: Path) -> None:
    """Chunks that are all equally long are rows of a dense batch: no tensor says where they lie."""
    module, _, (unit,) = emit(CHUNKED.replace("RULE", "fixed(7)"), tmp_path, "chunked.spec")
    found, launched = jitted(vars(calls.with_kernels(module))), set()
    for kernel in found:
        kernel.run = lambda *args, _of=kernel, **more: launched.add((_of.__name__, args[-2] is None, more.get("C")))
    calls.Caller(module, request_unit(unit, {"width": 3}), torch.bfloat16).all()
    assert {(name, rows, 16) for name in ("z_walk", "z_backward") for rows in (True, False)} <= launched
