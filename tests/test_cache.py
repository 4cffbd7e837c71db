"""Emitted packages on disk: replaced in one step, trusted only when whole, imported from where they lie."""

from __future__ import annotations

import inspect
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from chunkc import __version__, artifact, cache
from chunkc.artifact import MANIFEST, EmissionError, Manifest, SettingError, differing, load_package, publish
from chunkc.ir.diagnostics import CompileError, SourceFile, Span
from chunkc.ir.graph import Graph, Parameter, Unit

KEY = "0123456789abcdef" * 4


def package(word: str = "one", key: str = KEY) -> dict[str, str]:
    """A package of two modules that say a word."""
    files = {"__init__.py": f'from ._word import word\n\nTEXT = "{word}"\n',
             "_word.py": f'def word() -> str:\n    return "{word}"\n'}  # fmt: skip
    hashes = {name: artifact.sha256(text) for name, text in files.items()}
    manifest = Manifest(compiler=__version__, spec="toy.spec", spec_sha256=KEY, files=hashes, fingerprint=key)
    return {**files, MANIFEST: manifest.text()}


def environment() -> dict[str, str]:
    """This process's, for children that import what it can."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def holds(folder: Path, files: dict[str, str]) -> bool:
    return not differing(files, folder)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CHUNKC_CACHE_DIR", str(tmp_path / "store"))
    return tmp_path / "store"


def never() -> dict[str, str]:
    raise AssertionError("a whole entry was built again")


# -- publish -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_publish_replaces_whole_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(artifact, "_exchange", lambda a, b: False)
    folder = tmp_path / "layers" / "toy"
    assert publish(package("one"), folder)
    (folder / "__pycache__").mkdir()
    before = folder.stat().st_ino
    assert not publish(package("one"), folder)
    assert folder.stat().st_ino == before, "what is up to date is not touched"
    assert publish(package("two"), folder)
    assert holds(folder, package("two"))
    assert os.listdir(folder.parent) == ["toy"], "nothing is left beside the package"


def test_publish_fills_an_empty_folder_and_follows_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "toy").symlink_to("real")
    publish(package("one"), tmp_path / "toy")
    publish(package("two"), tmp_path / "toy")
    assert (tmp_path / "toy").is_symlink()
    assert holds(tmp_path / "real", package("two"))


@pytest.mark.parametrize("what", ["foreign", "file", "torn manifest", "user's file"])
def test_publish_leaves_what_is_not_its_own(tmp_path: Path, what: str) -> None:
    folder = tmp_path / "toy"
    if what == "file":
        folder.write_text("mine")
    else:
        if what == "foreign":
            folder.mkdir()
        else:
            publish(package(), folder)
        if what == "torn manifest":
            (folder / MANIFEST).write_text('{"generator": "chu')
        else:
            (folder / "notes.txt").write_text("mine")
    before = sorted((p.name, p.read_bytes()) for p in tmp_path.rglob("*") if p.is_file())
    with pytest.raises(CompileError) as failure:
        publish(package("two"), folder)
    assert [d.code for d in failure.value.diagnostics] == ["not-a-package"]
    assert sorted((p.name, p.read_bytes()) for p in tmp_path.rglob("*") if p.is_file()) == before


@pytest.mark.parametrize("at", range(1, 7))
def test_failing_publish_leaves_the_old_package_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    folder = tmp_path / "toy"
    publish(package("one"), folder)
    calls = 0
    real = os.fsync

    def fsync(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    if at <= 5:  # three files, the new folder, its parent
        with pytest.raises(KeyboardInterrupt):
            publish(package("two"), folder)
    else:
        publish(package("two"), folder)
    assert holds(folder, package("one" if at <= 4 else "two"))
    assert os.listdir(tmp_path) == ["toy"]


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize("at", ["fsync", "rename"])
def test_killed_publish_leaves_a_whole_package(tmp_path: Path, at: str, exchange: bool) -> None:
    """A process that is killed between any two steps; the next build works, and sweeps when the rest is old."""
    folder = tmp_path / "toy"
    publish(package("one"), folder)
    script = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from chunkc import artifact\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from test_cache import package\n"
        f"real, calls = os.{at}, []\n"
        "def stop(*args):\n"
        "    calls.append(args)\n"
        "    if len(calls) == int(sys.argv[3]):\n"
        "        print('here', flush=True)\n"
        "        time.sleep(60)\n"
        "    return real(*args)\n"
        f"os.{at} = stop\n"
        f"{'' if exchange else 'artifact._exchange = lambda a, b: False'}\n"
        "artifact.publish(package('two'), Path(sys.argv[2]))\n"
        "print('done', flush=True)\n"
    )
    for step in (2, 3):  # of renames, the first is the try, the second and third move the old and the new
        args = [sys.executable, "-c", script, str(Path(__file__).parent), str(folder), str(step)]
        with subprocess.Popen(args, env=environment(), stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            said = child.stdout.readline().strip()
            child.send_signal(signal.SIGKILL)
        assert said in ("here", "done")
        publish(package("three"), folder)
        assert holds(folder, package("three"))
        publish(package("one"), folder)
    for left in tmp_path.glob(".toy.*"):
        os.utime(left, (0, 0))
    publish(package("two"), folder)
    assert os.listdir(tmp_path) == ["toy"]


def test_a_package_moved_aside_by_a_killed_run_comes_back(tmp_path: Path) -> None:
    publish(package("one"), tmp_path / "toy")
    os.rename(tmp_path / "toy", tmp_path / ".toy.old-0a1b")
    assert not publish(package("one"), tmp_path / "toy")
    assert holds(tmp_path / "toy", package("one"))


def test_publish_while_someone_reads(tmp_path: Path) -> None:
    """A reader finds a whole package at every moment."""
    folder = tmp_path / "toy"
    publish(package("one"), folder)
    if not artifact._exchange(folder, _copy(folder)):
        pytest.skip("this system cannot swap two names")
    stop = threading.Event()
    missed: list[str] = []

    def read() -> None:
        while not stop.is_set():
            if not (folder / MANIFEST).is_file():
                missed.append("manifest")

    reader = threading.Thread(target=read)
    reader.start()
    for k in range(30):
        publish(package(f"word{k}"), folder)
    stop.set()
    reader.join()
    assert not missed


def _copy(folder: Path) -> Path:
    other = folder.with_name("other")
    publish(package("one"), other)
    return other


# -- the store ---------------------------------------------------------------------------------------------------------


def test_fetch_builds_once(store: Path) -> None:
    folder = cache.fetch(KEY, "toy", package)
    assert folder.is_relative_to(store)
    assert holds(folder, package())
    assert cache.fetch(KEY, "toy", never) == folder
    other = cache.fetch("f" * 64, "toy", lambda: package("two", "f" * 64))
    assert other != folder
    assert holds(folder, package())


def test_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHUNKC_CACHE_DIR", str(tmp_path))
    assert cache.place() == tmp_path
    monkeypatch.delenv("CHUNKC_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.place() == tmp_path / "chunkc"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.place() == tmp_path / "home" / ".cache" / "chunkc"


@pytest.mark.parametrize(
    "tear",
    [
        lambda f: (f / "_word.py").write_text("def word("),
        lambda f: (f / "_word.py").unlink(),
        lambda f: (f / MANIFEST).write_text((f / MANIFEST).read_text()[:100]),
        lambda f: (f / MANIFEST).write_text(""),
        lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe\x00"),
        lambda f: (f / MANIFEST).write_text("[" * 100_000),
        lambda f: (f / MANIFEST).unlink(),
        lambda f: (f / MANIFEST).write_text(package(key="f" * 64)[MANIFEST]),
        lambda f: ((f / "_word.py").unlink(), (f / "_word.py").mkdir()),
    ],
    ids=["torn file", "missing file", "torn manifest", "empty manifest", "binary manifest", "deep manifest",
         "no manifest", "another's manifest", "folder for a file"],
)  # fmt: skip
def test_what_is_not_whole_is_built_again(store: Path, tear: object) -> None:
    folder = cache.fetch(KEY, "toy", package)
    tear(folder)  # type: ignore[operator]
    assert not cache.is_valid(folder, KEY)
    assert cache.fetch(KEY, "toy", package) == folder
    assert holds(folder, package())


def test_a_file_where_the_entry_belongs(store: Path) -> None:
    entry = cache.entry(KEY, "toy")
    entry.parent.mkdir(parents=True)
    entry.write_text("in the way")
    assert holds(cache.fetch(KEY, "toy", package), package())


def test_store_that_cannot_be_written(store: Path) -> None:
    store.write_text("no folder")
    folder = cache.fetch(KEY, "toy", package)
    assert not folder.is_relative_to(store)
    assert load_package(folder).word() == "one"


def test_processes_that_build_the_same_at_once(store: Path) -> None:
    """Each finds whole entries only, though all write the same one and one entry is torn again and again."""
    script = (
        "import sys, time\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from chunkc import cache\n"
        "from test_cache import KEY, package\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "built = 0\n"
        "def make():\n"
        "    global built\n"
        "    built += 1\n"
        "    time.sleep(0.02)\n"
        "    return package()\n"
        "for k in range(40):\n"
        "    folder = cache.fetch(KEY, 'toy', make)\n"
        "    assert folder.is_relative_to(sys.argv[2]), folder\n"
        "    if k % 4 == int(sys.argv[3]):\n"
        "        (folder / '_word.py').write_text('torn')\n"
        "print(built)\n"
    )
    args = [sys.executable, "-c", script, str(Path(__file__).parent), str(store)]
    children = [
        subprocess.Popen([*args, str(k)], env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True)
        for k in range(3)
    ]  # fmt: skip
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    for child in children:
        out, err = child.communicate(timeout=120)
        assert child.returncode == 0, err
        assert int(out) >= 1 or child is not children[0]
    assert holds(cache.fetch(KEY, "toy", package), package())


def test_clean_removes_entries_and_nothing_else(store: Path) -> None:
    folder = cache.fetch(KEY, "toy", package)
    left = folder.with_name(f".{folder.name}.new-00ff")
    left.mkdir()
    (left / "half.py").write_text("x")
    keep = [store / "mine.txt", store / "packages" / "0.1.0" / "mine" / "file", store / "packages" / "notes"]
    for path in keep:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    used = cache.usage()
    assert (used.folder, used.entries) == (store, 1)
    assert used.size == sum(len(t.encode()) for t in package().values()) + 1
    assert cache.clean() == 1
    assert not folder.exists() and not left.exists()
    assert all(path.is_file() for path in keep)
    assert cache.usage().entries == 0
    assert cache.clean() == 0


# -- importing ---------------------------------------------------------------------------------------------------------


def test_load_package_imports_in_place(tmp_path: Path) -> None:
    publish(package("one"), tmp_path / "toy")
    path = list(sys.path)
    module = load_package(tmp_path / "toy")
    assert sys.path == path
    assert module.word() == "one"
    assert inspect.getsource(module.word) == package("one")["_word.py"]
    assert sys.modules[module.word.__module__].__package__ == module.__name__
    assert load_package(tmp_path / "toy") is module
    publish(package("two"), tmp_path / "toy")
    other = load_package(tmp_path / "toy")
    assert (other.word(), module.word()) == ("two", "one")


def test_a_package_edited_by_hand_is_another_module(tmp_path: Path) -> None:
    publish(package("one"), tmp_path / "toy")
    module = load_package(tmp_path / "toy")
    (tmp_path / "toy" / "_word.py").write_text("def word() -> str:\n    return 'edited'\n")
    assert load_package(tmp_path / "toy").word() == "edited"
    assert module.word() == "one"


def test_failing_import_leaves_no_module(tmp_path: Path) -> None:
    publish({**package(), "_word.py": "raise KeyError('broken')\n"}, tmp_path / "toy")
    known = set(sys.modules)
    with pytest.raises(KeyError, match="broken"):
        load_package(tmp_path / "toy")
    assert not [m for m in set(sys.modules) - known if "toy" in m]


def test_only_packages_of_this_version_are_loaded(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="not-a-package"):
        load_package(tmp_path)
    publish(package(), tmp_path / "toy")
    manifest = tmp_path / "toy" / MANIFEST
    manifest.write_text(manifest.read_text().replace('"contract": 1', '"contract": 99'))
    with pytest.raises(CompileError) as failure:
        load_package(tmp_path / "toy")
    assert "chunkc" in failure.value.diagnostics[0].notes[0]


# -- what a fingerprint covers, and what a package may hold ------------------------------------------------------------

SPEC = "op f(n: int) {\n  axes { t: time, i = n }\n  input x[t, i]\n  output y[t, i] = 2 * x\n}\n"


def test_fingerprint_covers_what_shapes_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(text: str = SPEC, name: str = "f.spec", **settings: int | float | bool) -> str:
        return artifact.fingerprint(SourceFile(name, text), settings)

    base = of()
    assert of() == base
    assert of(SPEC.replace("2 * x", "2*x   # twice")) == base, "layout within a line is not meaning"
    different = {base, of("\n" + SPEC), of(SPEC.replace("2", "3")), of(name="g.spec"), of(n=1), of(n=1.0), of(n=True),
                 of(n=2), of("op f {\x00"), of("op g {\x00")}  # fmt: skip
    assert len(different) == 10
    monkeypatch.setattr(artifact, "compiler_sha256", lambda: "another")
    assert of() != base
    monkeypatch.undo()
    monkeypatch.setattr(artifact, "__version__", "9")
    assert of() != base


def test_compiler_hash_sees_every_package() -> None:
    artifact.compiler_sha256.cache_clear()
    hashed: list[str] = []
    real = Path.read_bytes

    def read(path: Path) -> bytes:
        hashed.append(path.name)
        return real(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_bytes", read)
        artifact.compiler_sha256()
    assert {"artifact.py", "check.py", "grammar.lark", "normalize.py", "diagnostics.py", "writer.py"} <= set(hashed)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("import math\nfrom collections.abc import Mapping\nimport torch.nn\nfrom . import _b\nfrom ._b import x", ""),
        ("import os\nos.environ.get('X')", ""),
        ("import numpy", "numpy"),
        ("import chunkc.ir", "chunkc.ir"),
        ("from chunkc import load", "chunkc"),
        ("from ._missing import x", "._missing"),
        ("from .. import _b", ".._b"),
        ("import os\nos.system('ls')", "os.system"),
        ("from os import system", "os.system"),
        ("def f():\n    import subprocess", "subprocess"),
        ("eval('1')", "eval()"),
        ("def f(", "no Python"),
    ],
)
def test_verify(text: str, why: str) -> None:
    files = {"__init__.py": text, "_b.py": ""}
    if not why:
        artifact.verify(files)
    else:
        with pytest.raises(EmissionError) as failure:
            artifact.verify(files)
        assert why in str(failure.value)


@pytest.mark.parametrize("name", ["../x.py", "a b.py", "x.txt", "/x.py", "1.py"])
def test_verify_names(name: str) -> None:
    with pytest.raises(EmissionError):
        artifact.verify({"__init__.py": "", name: ""})


def test_verify_wants_an_init() -> None:
    with pytest.raises(EmissionError):
        artifact.verify({"_b.py": ""})


@pytest.mark.parametrize(
    ("file", "name"),
    [("gla.spec", "gla"), ("a-b.c.spec", "a_b_c"), ("2d.spec", "_2d"), ("class.spec", "class_"), (".spec", "_spec"),
     ("dir/x.spec", "x"), ("größe.spec", "gr__e")],
)  # fmt: skip
def test_package_name(file: str, name: str) -> None:
    assert artifact.package_name(file) == name
    assert name.isidentifier()


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [("a=1", 1), (" a = -2 ", -2), ("a=0.5", 0.5), ("a=1e3", 1000.0), ("a=true", True), ("a=false", False)],
)
def test_read_setting(text: str, value: object) -> None:
    name, read = artifact.read_setting(text)
    assert name == "a"
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize("text", ["a", "=1", "a=", "a=x", "a=inf", "a=nan", "a b=1", "a=1=2", "a=" + "9" * 5000])
def test_bad_settings(text: str) -> None:
    with pytest.raises(SettingError):
        artifact.read_setting(text)


def test_settings_fit_the_parameters() -> None:
    params = tuple(Parameter(name=n, type=n) for n in ("int", "float", "bool"))
    unit = Unit(kind="op", name="f", params=params, graph=Graph(), span=Span("f.spec", 0, 0))
    fitted = artifact.fit_settings([unit], {"int": 2, "float": 3, "bool": True})
    assert [(k, type(v)) for k, v in fitted.items()] == [("bool", bool), ("float", float), ("int", int)]
    for wrong in ({"int": 1.5}, {"int": True}, {"bool": 1}, {"float": False}, {"flaot": 1.0}, {"nosuch": 1}):
        with pytest.raises(SettingError) as failure:
            artifact.fit_settings([unit], wrong)
        if "flaot" in wrong:
            assert "did you mean 'float'" in str(failure.value)


def test_publish_is_quick_to_sweep_only_what_is_old(tmp_path: Path) -> None:
    young, old = tmp_path / ".toy.new-aa", tmp_path / ".toy.new-bb"
    for folder in (young, old):
        folder.mkdir()
    then = time.time() - 2 * artifact.STALE_SECONDS
    os.utime(old, (then, then))
    publish(package(), tmp_path / "toy")
    assert young.is_dir() and not old.exists()
