"""The command: what it prints where, its exit codes, and that it leaves nothing half-written."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from xml.etree import ElementTree

import pytest

import chunkc
from chunkc import artifact, building, cli, driver
from chunkc.artifact import SettingError
from chunkc.costs import MACHINES
from chunkc.ir.diagnostics import CompileError, Diagnostic, SourceFile, Span, render_github
from chunkc.ir.text import parse_unit, print_unit

ROOT = Path(__file__).resolve().parent.parent
GOOD = "op f(n: int, scale: float = 2) {\n  axes { t: time, i = n }\n  input x[t, i]\n  output y[t, i] = scale * x\n}\n"
BAD = "op f {\n  axes { t: time }\n  input x[t]\n  output y[t] = x + z\n  output u[t] = x + w\n}\n"
HEAVY = ("torch", "triton", "networkx", "numpy", "sympy")


def environment(**more: str) -> dict[str, str]:
    """This process's, for children that import what it can."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **more}


def chunkc_process(*args: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "chunkc", *args], env=environment(**more), capture_output=True, text=True, timeout=120
    )


def stub(monkeypatch: pytest.MonkeyPatch, name: str, **members: object) -> None:
    """Stand in for a module that the command imports late."""
    module = ModuleType(name)
    module.__dict__.update(members)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own, with a good and a bad spec; no setting of the user's is seen."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CHUNKC_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("NO_COLOR", "CHUNKC_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)
    Path("good.spec").write_text(GOOD)
    Path("bad.spec").write_text(BAD)
    return tmp_path


def emit_by(monkeypatch: pytest.MonkeyPatch, emit: Callable[..., object]) -> None:
    """Stand in for the back ends, of `build` and of `load`."""
    monkeypatch.setattr(building, "emit_files", emit)
    stub(monkeypatch, "chunkc.backends.package", emit_files=emit)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """A back end that writes down what it was given."""

    def emit_files(source: SourceFile, units: object, settings: object, schedules: object) -> dict[str, str]:
        return {"__init__.py": f"GIVEN = {source.name!r}, {len(units)}, {settings!r}\n"}

    emit_by(monkeypatch, emit_files)


@pytest.fixture
def formatter(monkeypatch: pytest.MonkeyPatch) -> None:
    """A formatter that wants exactly one newline at the end, and a spec that parses."""

    def format_source(source: SourceFile) -> str:
        driver.check_source(source)
        return source.text.rstrip("\n") + "\n"

    stub(monkeypatch, "chunkc.dsl.format", format_source=format_source)


@pytest.fixture
def facts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Facts that are the units' names."""

    def derive(compiled: driver.Compiled, mesh: object, at: object) -> list[dict[str, str]]:
        assert mesh is None and at is None
        return [{"unit": u.name} for u in compiled.units]

    stub(monkeypatch, "chunkc.facts", facts=derive, render_facts=lambda found: f"{found[0]['unit']} is causal\n")


def type_in(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))


# -- check -------------------------------------------------------------------------------------------------------------


def test_check_clean(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["check", "good.spec"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "1 file checked: nothing found\n"


def test_check_shows_every_error_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["check", "bad.spec", "good.spec"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "--> bad.spec:4:21" in err and "--> bad.spec:5:21" in err
    assert err.endswith("2 files checked: 2 errors\n")


def test_check_json_and_github_go_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["check", "--format", "json", "bad.spec"]) == 1
    out, err = capsys.readouterr()
    records = json.loads(out)
    assert [r["span"]["line"] for r in records] == [4, 5]
    assert err == ""
    assert cli.run(["check", "--format", "json", "good.spec"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert cli.run(["check", "--format", "github", "bad.spec"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("::error file=bad.spec,line=4,endLine=4,title=unknown-name,col=21,endColumn=22::")


def test_github_escapes() -> None:
    source = SourceFile("a,b:c.spec", "one\ntwo")
    d = Diagnostic("code", "100%\r\n::error::", Span(source.name, 0, 5), severity="warning")
    assert render_github(d, {source.name: source}) == (
        "::warning file=a%2Cb%3Ac.spec,line=1,endLine=2,title=code::100%25%0D%0A::error::"
    )


def test_check_reads_folders_and_stdin(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sub/deep/other.spec", "sub/.hidden/bad.spec"):
        Path(name).parent.mkdir(parents=True)
        Path(name).write_text(GOOD if "other" in name else BAD)
    assert cli.run(["check", "sub"]) == 0
    assert "1 file checked" in capsys.readouterr().err
    assert cli.run(["check", ".", "good.spec"]) == 1
    assert "3 files checked: 2 errors" in capsys.readouterr().err
    type_in(monkeypatch, BAD.encode())
    assert cli.run(["check", "-"]) == 1
    assert "--> <stdin>:4:21" in capsys.readouterr().err
    Path("empty").mkdir()
    assert cli.run(["check", "empty"]) == 2


@pytest.mark.parametrize(
    ("data", "code"), [(b"\xff", "cannot-read"), (b" " * (1 << 20) + b"x", "too-large"), (b"", "empty")]
)
def test_hostile_stdin(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, data: bytes, code: str
) -> None:
    type_in(monkeypatch, data)
    assert cli.run(["check", "-"]) == 1
    assert f"error[{code}]" in capsys.readouterr().err


def test_missing_files_are_diagnostics(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["check", "nosuch.spec", "bad.spec"]) == 1
    err = capsys.readouterr().err
    assert "error[cannot-read]" in err and "bad.spec:4" in err


def test_color(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def colored(*args: str) -> bool:
        cli.run(["check", *args, "bad.spec"])
        return "\033[" in capsys.readouterr().err

    assert not colored()
    assert colored("--color")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert colored()
    assert not colored("--no-color")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not colored()
    assert colored("--color")


def test_progress_only_for_someone_who_watches(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.run(["check", "good.spec", "bad.spec"]) == 1
    assert "checking" not in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert cli.run(["check", "--no-color", "good.spec", "bad.spec"]) == 1
    assert "checking" in capsys.readouterr().err
    assert cli.run(["check", "--no-color", "good.spec"]) == 0
    assert "checking" not in capsys.readouterr().err


# -- build -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("backend")
def test_build(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["build", "good.spec", "-o", "out", "--set", "n=4", "--set", "scale=1"]) == 0
    assert capsys.readouterr() == ("out/good\n", "")
    assert sorted(os.listdir("out/good")) == ["__init__.py", "manifest.json"]
    manifest = artifact.read_manifest(Path("out/good"))
    assert manifest is not None
    assert (manifest.spec, manifest.settings) == ("good.spec", {"n": 4, "scale": 1.0})
    assert manifest.compiler == chunkc.__version__
    assert artifact.load_package(Path("out/good")).GIVEN == ("good.spec", 1, {"n": 4, "scale": 1.0})


@pytest.mark.usefixtures("backend")
def test_building_elsewhere_gives_the_same_bytes(place: Path) -> None:
    assert cli.run(["build", str(place / "good.spec"), "-o", "one"]) == 0
    assert cli.run(["build", "good.spec", "-o", str(place / "two")]) == 0
    for name in os.listdir("one/good"):
        assert Path("one/good", name).read_bytes() == Path("two/good", name).read_bytes()
        assert str(place) not in Path("one/good", name).read_text()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", ['a"""b', "new\nimport os", "x\udcff", "größe", "a b'"])
def test_file_names_stay_out_of_emitted_text(name: str) -> None:
    Path(f"{name}.spec").write_text(GOOD)
    assert cli.run(["build", f"{name}.spec", "-o", "out"]) == 0
    (folder,) = Path("out").iterdir()
    assert folder.name.isidentifier()
    given = artifact.load_package(folder).GIVEN[0]
    assert given.isascii() and not set(given) & set("\"'\n \\")
    assert chunkc.load(f"{name}.spec").GIVEN[0] == given
    Path(f"{name}.spec").write_text(BAD)
    assert cli.run(["build", f"{name}.spec", "-o", "out"]) == 1


@pytest.mark.usefixtures("backend")
def test_build_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["build", "good.spec", "-o", "out", "--check"]) == 1
    assert "out/good is out of date: __init__.py, manifest.json" in capsys.readouterr().err
    assert not Path("out").exists()
    assert cli.run(["build", "good.spec", "-o", "out"]) == 0
    assert cli.run(["build", "good.spec", "-o", "out", "--check"]) == 0
    assert cli.run(["build", "good.spec", "-o", "out", "--check", "--set", "n=1"]) == 1
    Path("out/good/more.py").write_text("")
    capsys.readouterr()
    assert cli.run(["build", "good.spec", "-o", "out", "--check"]) == 1
    assert "more.py" in capsys.readouterr().err


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["bad.spec", "-o", "out"], 1, "--> sub/bad.spec:4:21"),
        (["good.spec", "-o", "out", "--set", "m=1"], 2, "no parameter 'm'"),
        (["good.spec", "-o", "out", "--set", "n"], 2, "not name=value"),
        (["good.spec", "-o", "out", "--set", "n=x"], 2, "no number"),
        (["good.spec", "-o", "out", "--set", "n=0.5"], 2, "of type int"),
        (["good.spec"], 2, "--out"),
        (["-", "-o", "out"], 2, "stdin"),
        (["nosuch.spec", "-o", "out"], 1, "cannot-read"),
        (["good.spec", "-o", "mine"], 1, "not-a-package"),
        (["good.spec", "-o", "file"], 2, "file"),
    ],
)
def test_build_refuses(capsys: pytest.CaptureFixture[str], args: list[str], code: int, said: str) -> None:
    Path("sub").mkdir()
    Path("sub/bad.spec").write_text(BAD)
    Path("mine/good").mkdir(parents=True)
    Path("mine/good/work.py").write_text("x = 1")
    Path("file").write_text("")
    args[0] = args[0].replace("bad.spec", "sub/bad.spec")
    assert cli.run(["build", *args]) == code
    out, err = capsys.readouterr()
    assert said in err
    assert out == ""
    assert not Path("out").exists()
    assert os.listdir("mine/good") == ["work.py"]


@pytest.mark.usefixtures("backend")
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_folder_that_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    Path("shut").mkdir(mode=0o500)
    assert cli.run(["build", "good.spec", "-o", "shut"]) == 1
    assert "Permission denied" in capsys.readouterr().err


def test_place_that_is_a_file(capsys: pytest.CaptureFixture[str], backend: None) -> None:
    Path("file").write_text("")
    assert cli.run(["build", "good.spec", "-o", "file/sub"]) == 1
    assert "file" in capsys.readouterr().err


# -- explain, fmt, graph, doctor ---------------------------------------------------------------------------------------


@pytest.fixture
def pages(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = place / "pages"
    folder.mkdir()
    (folder / "axis-mismatch.md").write_text("# axis-mismatch\n\nAn axis too many.\n")
    monkeypatch.setattr("importlib.resources.files", lambda package: folder)


@pytest.mark.usefixtures("pages")
def test_explain_a_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["explain", "axis-mismatch"]) == 0
    assert capsys.readouterr().out == "# axis-mismatch\n\nAn axis too many.\n"
    assert cli.run(["explain", "axis-mismatch", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["code"] == "axis-mismatch"
    assert cli.run(["explain", "axis-mismatc"]) == 2
    assert "did you mean 'axis-mismatch'" in capsys.readouterr().err


@pytest.mark.usefixtures("facts", "pages")
def test_explain_reads_no_page_by_its_path(capsys: pytest.CaptureFixture[str]) -> None:
    for hostile in ("..", "../pages/axis-mismatch", "/etc/passwd", "a\x00b"):
        assert cli.run(["explain", hostile]) == 1
        assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("facts")
def test_explain_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["explain", "good.spec"]) == 0
    assert capsys.readouterr() == ("f is causal\n", "")
    assert cli.run(["explain", "good.spec", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"unit": "f"}]
    assert cli.run(["explain", "bad.spec"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "bad.spec:4:21" in err


def test_explain_a_mesh(capsys: pytest.CaptureFixture[str]) -> None:
    """What ranks send; an axis that the layout has not is an error at the layout, other mistakes are the command's."""
    Path("shared.spec").write_text(GOOD.replace("scale * x", "x[t = t - 2]") + "parallel {\n  mesh { data, ring }\n"
                                   "  shard t over ring layout zigzag\n}\n")  # fmt: skip
    assert cli.run(["explain", "shared.spec", "--mesh", "ring=4", "--mesh", "data=2"]) == 0
    out = capsys.readouterr().out
    assert "4 ranks along ring share t, zigzag" in out and "a rank sends 24 i bytes a row of the batch" in out
    assert cli.run(["explain", "shared.spec", "--json", "--mesh", "ring=4"]) == 0
    (unit,) = json.loads(capsys.readouterr().out)
    assert unit["parallel"]["operations"][0]["sends"] == [{"count": 24, "axes": ["i"]}]
    assert cli.run(["explain", "shared.spec", "--mesh", "rung=4"]) == 1
    assert "error[bad-layout]: the mesh has no axis 'rung'" in capsys.readouterr().err
    for wrong in ("ring", "ring=x", "ring=0"):
        assert cli.run(["explain", "shared.spec", "--mesh", wrong]) == 2
    assert cli.run(["explain", "good.spec", "--mesh", "ring=4"]) == 2


STATE = """op f(h: int, k: int, v: int) {
  axes { t: time, n = h, i = k, j = v }
  input q[t, n, i], w[t, n, i], x[t, n, j], g[t, n, i] in [-1, 0]
  recurrence over t {
    state S[n, i, j]
    S = exp(g) * S + w * x
    o = sum[i](q * S)
  }
  output o
}
"""


def test_explain_at_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    Path("state.spec").write_text(STATE)
    shape = ["explain", "state.spec", "--shape"]
    assert cli.run([*shape, "B=1,T=131072,H=4,K=128,V=128", "--machine", "a100"]) == 0
    out = capsys.readouterr().out
    assert "on a100, bf16, B 1, t 131072, n 4, i 128, j 128, by the model of docs/costs.md:" in out
    assert re.search(r"split .* segments walk .* \(cheapest; used, as states, read_j\)", out)
    assert cli.run([*shape, "T=512", "--set", "h=2", "--dtype", "fp32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)[0]["recurrences"][0]["estimates"]
    assert (found["machine"], found["dtype"], found["sizes"]["n"], found["score_levels"]) == ("h100", "fp32", 2, 1)
    for wrong in (
        ["T"],
        ["Z=4"],
        ["T=0"],
        ["T=4", "--machine", "tpu"],
        ["T=4", "--set", "z=1"],
        ["n=3", "--set", "h=2"],
    ):
        assert cli.run([*shape, *wrong]) == 2
    assert cli.run(["explain", "good.spec", "--shape", "T=4"]) == 2
    assert "nothing to estimate" in capsys.readouterr().err


def test_the_machines_are_those_of_the_model() -> None:
    option = next(p for p in cli.explain.params if p.name == "machine")
    assert list(option.type.choices) == list(MACHINES)  # type: ignore[attr-defined]


@pytest.mark.usefixtures("formatter")
def test_fmt(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    Path("long.spec").write_text(GOOD + "\n\n")
    Path("long.spec").chmod(0o640)
    Path("link.spec").symlink_to("long.spec")
    assert cli.run(["fmt", "--check", "long.spec", "good.spec"]) == 1
    assert capsys.readouterr() == ("", "would format long.spec\n")
    assert cli.run(["fmt", "--diff", "long.spec"]) == 1
    assert capsys.readouterr().out.splitlines()[-2:] == ["-", "-"]
    assert Path("long.spec").read_text() == GOOD + "\n\n"
    assert cli.run(["fmt", "link.spec", "good.spec"]) == 0
    assert capsys.readouterr() == ("", "formatted link.spec\n")
    assert Path("long.spec").read_text() == GOOD
    assert Path("link.spec").is_symlink() and Path("long.spec").stat().st_mode & 0o777 == 0o640
    assert cli.run(["fmt", "--check", "long.spec"]) == 0
    type_in(monkeypatch, (GOOD + "\n").encode())
    assert cli.run(["fmt", "-"]) == 0
    assert capsys.readouterr() == (GOOD, "")


@pytest.mark.usefixtures("formatter")
def test_fmt_goes_on_after_a_broken_file(capsys: pytest.CaptureFixture[str]) -> None:
    Path("long.spec").write_text(GOOD + "\n\n")
    assert cli.run(["fmt", "bad.spec", "long.spec"]) == 1
    assert Path("long.spec").read_text() == GOOD
    assert Path("bad.spec").read_text() == BAD
    assert "bad.spec:4" in capsys.readouterr().err


@pytest.mark.usefixtures("formatter")
def test_failing_rewrite_leaves_the_file(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("long.spec").write_text(GOOD + "\n\n")

    def interrupt(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    before = sorted(os.listdir("."))
    assert cli.run(["fmt", "long.spec"]) == 130
    assert Path("long.spec").read_text() == GOOD + "\n\n"
    assert sorted(os.listdir(".")) == before


def test_graph(capsys: pytest.CaptureFixture[str]) -> None:
    Path("two.spec").write_text(GOOD + GOOD.replace("op f", "op g"))
    for level in ("semantic", "normal"):
        assert cli.run(["graph", "good.spec", "--level", level]) == 0
        out = capsys.readouterr().out
        assert out.startswith("op f ") and f"graph=graph {level} {{" in out
        assert print_unit(parse_unit(out)) == out
        assert cli.run(["graph", "two.spec", "--level", level, "--format", "dot"]) == 0
        assert capsys.readouterr().out.count("digraph") == 2
    assert cli.run(["graph", "two.spec"]) == 0
    assert "\nop g " in capsys.readouterr().out
    assert cli.run(["graph", "bad.spec"]) == 1
    assert cli.run(["graph", "good.spec", "--level", "plan"]) == 2
    assert cli.run(["graph", "good.spec", "--level", "tiled", "--format", "dot"]) == 2


@pytest.mark.usefixtures("backend")
def test_doctor(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert chunkc.load("good.spec").GIVEN[0] == "good.spec"
    assert cli.run(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"chunkc    {chunkc.__version__}\n" in out
    assert f"{place / 'cache'} (1 package, " in out
    assert "gpu " in out and "torch " in out
    assert cli.run(["doctor", "--clean"]) == 0
    assert "removed   1 package\n" in capsys.readouterr().out
    assert cli.run(["doctor"]) == 0
    assert "(0 packages, 0 KiB)" in capsys.readouterr().out


# -- exit codes and interruptions --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args", [["nosuch"], ["check"], ["check", "--format", "xml", "good.spec"], ["graph"], ["fmt"], ["doctor", "x"]]
)
def test_usage_errors(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(args) == 2
    assert "Usage:" in capsys.readouterr().err


@pytest.mark.parametrize("args", [["--help"], ["-h"], ["--version"], ["check", "--help"]])
def test_help(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(args) == 0
    assert "chunkc" in capsys.readouterr().out


def test_internal_errors_are_owned(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: SourceFile) -> None:
        raise KeyError("i")

    monkeypatch.setattr(driver, "check_source", fail)
    assert cli.run(["check", "good.spec"]) == 3
    err = capsys.readouterr().err
    assert err.startswith("this is a bug in chunkc: KeyError: 'i'\n")
    assert chunkc.__version__ in err and artifact.sha256(GOOD) in err
    assert "Traceback" not in err
    assert cli.run(["check", "good.spec", "--traceback"]) == 3
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("CHUNKC_TRACEBACK", "1")
    assert cli.run(["check", "good.spec"]) == 3
    assert "Traceback" in capsys.readouterr().err


def test_a_back_end_that_emits_nonsense_is_a_bug(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    emit_by(monkeypatch, lambda *_: {"__init__.py": "def"})
    assert cli.run(["build", "good.spec", "-o", "out"]) == 3
    assert "this is a bug in chunkc" in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.parametrize("when", [1, 2, 3])
def test_sigint_leaves_the_old_package(place: Path, when: int) -> None:
    """A real signal, while files are being written."""
    script = (
        "import os, sys, time, types\n"
        "from chunkc import cli\n"
        "package = types.ModuleType('chunkc.backends.package')\n"
        "package.emit_files = lambda source, units, settings, schedules: {'__init__.py': f'N = {settings!r}\\n'}\n"
        "package.tunable = None\n"
        "sys.modules['chunkc.backends.package'] = package\n"
        "real, calls = os.fsync, []\n"
        "def stop(handle):\n"
        "    calls.append(handle)\n"
        "    if len(calls) == int(sys.argv[1]):\n"
        "        print('here', flush=True)\n"
        "        time.sleep(60)\n"
        "    real(handle)\n"
        "os.fsync = stop\n"
        "sys.exit(cli.run(sys.argv[2:]))\n"
    )

    def start(stop_at: int, setting: str) -> subprocess.Popen[str]:
        args = [sys.executable, "-c", script, str(stop_at), "build", "good.spec", "-o", "out", "--set", setting]
        return subprocess.Popen(args, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    with start(99, "n=1") as child:
        assert child.wait(60) == 0
    before = {p.name: p.read_bytes() for p in Path("out/good").iterdir()}
    with start(when, "n=2") as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "here\n"
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "interrupted" in err and "Traceback" not in err
    assert {p.name: p.read_bytes() for p in Path("out/good").iterdir()} == before
    assert os.listdir("out") == ["good"]


def test_stdout_that_is_closed() -> None:
    args = [sys.executable, "-m", "chunkc", "graph", str(ROOT / "specs" / "rwkv6.spec")]
    with subprocess.Popen(args, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stderr is not None
        child.stdout.close()
        assert b"Traceback" not in child.stderr.read()
    assert child.returncode == 1


# -- what is imported --------------------------------------------------------------------------------------------------


def imported(code: str) -> set[str]:
    """The heavy modules that are loaded after some code has run."""
    code += f"\nimport sys\nprint('loaded', *[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=120, check=True
    )
    return set(done.stdout.splitlines()[-1].split()[1:])


def ran(*args: str) -> str:
    return f"from chunkc.cli import run\nassert run({list(args)!r}) == 0"


def test_check_imports_nothing_heavy() -> None:
    assert imported(ran("check", str(ROOT / "specs"))) == set()


@pytest.mark.skipif(find_spec("chunkc.dsl.format") is None, reason="there is no formatter")
def test_fmt_imports_nothing_heavy() -> None:
    assert imported(ran("fmt", "good.spec")) == set()


@pytest.mark.skipif(find_spec("chunkc.facts") is None, reason="there are no facts")
def test_explain_imports_nothing_heavy() -> None:
    assert imported(ran("explain", "good.spec")) == set()


def test_importing_chunkc_imports_nothing_of_it() -> None:
    code = (
        "import sys, chunkc\n"
        "assert [m for m in sys.modules if m.startswith('chunkc')] == ['chunkc']\n"
        "assert 'pydantic' not in sys.modules and 'click' not in sys.modules\n"
        "assert set(chunkc.__all__) <= set(dir(chunkc))\n"
        "assert all(getattr(chunkc, name) for name in chunkc.__all__)\n"
    )
    assert imported(code) == set()


# -- the functions -----------------------------------------------------------------------------------------------------


def test_version_is_the_project_s() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == chunkc.__version__
    assert chunkc_process("--version").stdout == f"chunkc {chunkc.__version__}\n"


def test_unknown_attributes() -> None:
    with pytest.raises(AttributeError):
        _ = chunkc.nosuch


def test_api_check() -> None:
    assert chunkc.check("good.spec") == ()
    assert [d.code for d in chunkc.check("bad.spec")] == ["unknown-name", "unknown-name"]
    assert [d.code for d in chunkc.check("nosuch.spec")] == ["cannot-read"]
    assert all(isinstance(d, chunkc.Diagnostic) for d in chunkc.check("bad.spec"))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("make", [lambda p, **k: chunkc.build(p, "out", **k), chunkc.load], ids=["build", "load"])
def test_api_build_and_load(make: Callable[..., Path | ModuleType]) -> None:
    with pytest.raises(chunkc.CompileError) as failure:
        make("bad.spec")
    assert len(failure.value.diagnostics) == 2
    with pytest.raises(SettingError):
        make("good.spec", settings={"m": 1})
    made = make("good.spec", settings={"n": 4})
    module = artifact.load_package(made) if isinstance(made, Path) else made
    assert module.GIVEN == ("good.spec", 1, {"n": 4})


def test_load_compiles_once(monkeypatch: pytest.MonkeyPatch, backend: None) -> None:
    first = chunkc.load("good.spec")

    def again(*_: object) -> None:
        raise AssertionError("compiled again")

    emit_by(monkeypatch, again)
    assert chunkc.load("good.spec") is first
    Path("good.spec").write_text(GOOD.replace("scale * x", "scale*x  # the same"))
    assert chunkc.load("good.spec") is first
    Path("good.spec").write_text(GOOD.replace("scale * x", "scale + x"))
    with pytest.raises(AssertionError, match="compiled again"):
        chunkc.load("good.spec")


def test_load_reports_every_error_of_a_text_that_does_not_lex() -> None:
    Path("bad.spec").write_text(BAD.replace("x + z", "x ? z").replace("x + w", "x $ w"))
    with pytest.raises(CompileError) as failure:
        chunkc.load("bad.spec")
    assert len(failure.value.diagnostics) == 2


def test_masks_are_drawn() -> None:
    """As the page says, character by character."""
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    block = page.split("$ chunkc explain --mask ")[1].split("```")[0]
    line, wanted = block.split("\n", 1)
    args = [str(ROOT / a) if a.endswith(".spec") else a for a in line.split()]
    done = chunkc_process("explain", "--mask", *args, PYTHONIOENCODING="utf-8")
    assert done.returncode == 0 and done.stdout == wanted


@pytest.mark.parametrize("name", ["rat", "longformer", "document_attention", "set_transformer", "language_model"])
def test_every_mask_can_be_drawn(name: str, place: Path) -> None:
    spec = str(ROOT / "specs" / f"{name}.spec")
    done = chunkc_process("explain", "--png", "mask.png", "--length", "20", "--set", "d_model=32", spec)
    assert done.returncode == 0, done.stderr
    assert (place / "mask.png").read_bytes().startswith(b"\x89PNG")


def test_no_mask_to_draw() -> None:
    done = chunkc_process("explain", "--mask", "good.spec")
    assert done.returncode == 2 and "nothing in this file attends" in done.stderr
    wrong = chunkc_process("explain", "--mask", "--set", "block=0", str(ROOT / "specs" / "bigbird.spec"))
    assert wrong.returncode == 2 and "chunks of 0 positions" in wrong.stderr, wrong.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    done = chunkc_process("completion", shell)
    assert done.returncode == 0 and "_CHUNKC_COMPLETE" in done.stdout


@pytest.mark.parametrize("path", sorted((ROOT / "specs").glob("*.spec")), ids=lambda p: p.stem)
def test_a_picture_has_each_line_of_a_spec_once(path: Path) -> None:
    """The picture is XML, and shows inputs, outputs, and the lines of recurrences and attentions."""
    done = chunkc_process("graph", "--format", "svg", str(path))
    assert done.returncode == 0, done.stderr
    texts = [t.text or "" for t in ElementTree.fromstring(done.stdout).iter("{http://www.w3.org/2000/svg}text")]
    assert any(t.startswith("output ") for t in texts)
    for line in path.read_text().splitlines():
        line = line.split("#")[0].strip()
        if re.match(r"(logit|value|mask|state) ", line) and len(line) <= 64:
            assert line in texts


def test_a_picture_of_what_the_user_wrote_is_no_markup(place: Path) -> None:
    Path("less.spec").write_text(
        "op f {\n  axes { t: time }\n  input x[t]\n  output y = where(x < 1 and x > 0, x, 2)\n}\n"
    )
    done = chunkc_process("graph", "--format", "svg", "less.spec")
    assert "where(x &lt; 1 and x &gt; 0, x, 2)" in done.stdout
    ElementTree.fromstring(done.stdout)
