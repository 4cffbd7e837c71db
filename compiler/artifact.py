"""Emitted packages: what their manifest says, how they are written, replaced and imported."""

from __future__ import annotations

import ast
import contextlib
import ctypes
import difflib
import hashlib
import importlib
import importlib.util
import json
import keyword
import math
import os
import re
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Literal

from lark.exceptions import LarkError
from pydantic import BaseModel, ConfigDict

from chunkc import __version__
from chunkc.driver import Compiled
from chunkc.dsl.parser import tokens
from chunkc.ir.axes import Number
from chunkc.ir.diagnostics import CompileError, SourceFile, Span, error
from chunkc.ir.graph import Unit
from chunkc.ir.tuning import Schedule, Tuning

FORMAT = 1  # of the manifest
CONTRACT = 1  # between an emitted package and the code that imports it
MANIFEST = "manifest.json"
STALE_SECONDS = 600.0  # writing takes milliseconds, so a temporary folder of this age has lost its process
MODULES = frozenset(
    ("__future__", "atexit", "collections", "contextlib", "dataclasses", "datetime", "enum", "functools", "itertools",
     "math", "numbers", "operator", "os", "signal", "sys", "threading", "time", "torch", "triton", "types", "typing",
     "warnings", "weakref")
)  # fmt: skip
OF_FILE = {"_ahead.py": frozenset(("hashlib", "json", "pathlib", "sysconfig", "warnings"))}  # it reads what it verifies
OF_OS = frozenset(("environ", "getenv"))
FORBIDDEN_CALLS = frozenset(("eval", "exec", "compile", "__import__", "open"))
Units = tuple[Unit, ...]
Emitter = Callable[[SourceFile, Units, Mapping[str, Number], Mapping[str, Schedule]], Mapping[str, str]]
Files = Mapping[str, str | bytes]  # of a package, by the path within it
Compiler = Callable[[Mapping[str, str], Mapping[str, Number]], Mapping[str, bytes]]


class SettingError(ValueError):
    """A setting that names no parameter of the spec, or does not fit it."""


class EmissionError(RuntimeError):
    """Emitted text that no package may hold: a mistake of a back end, never of a spec."""


class Manifest(BaseModel):
    """What a package was made from, and the hash of each of its files."""

    model_config = ConfigDict(frozen=True)

    generator: Literal["chunkc"] = "chunkc"
    format: int = FORMAT
    contract: int = CONTRACT
    compiler: str
    spec: str
    spec_sha256: str
    settings: dict[str, bool | int | float] = {}
    ahead: dict[str, str] | None = None  # what its kernels were compiled for and by, if they were
    schedules: dict[str, dict[str, bool]] = {}  # what each layer or op demands, the settings by name
    files: dict[str, str]
    fingerprint: str

    def text(self) -> str:
        """The same manifest is always the same text."""
        return json.dumps(self.model_dump(mode="json", exclude_none=True), indent=2, sort_keys=True) + "\n"


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder; None if there is none that can be understood."""
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return None


def sha256(data: str | bytes) -> str:
    return hashlib.sha256(as_bytes(data)).hexdigest()


# -- what goes in ------------------------------------------------------------------------------------------------------


def package_name(file: str) -> str:
    """The Python name of a spec file's package."""
    name = re.sub(r"\W", "_", Path(file).stem, flags=re.ASCII) or "_"
    name = f"_{name}" if name[0].isdigit() else name
    return f"{name}_" if keyword.iskeyword(name) else name


def spec_name(path: str | Path) -> str:
    """What emitted text calls a spec file: its base name, without what could end a comment or a string."""
    return re.sub(r"[^\w.+-]", "_", Path(path).name, flags=re.ASCII)


@lru_cache(maxsize=1)
def compiler_sha256() -> str:
    """A hash of the compiler's own source: another compiler never answers from what this one stored."""
    found: dict[Path, str] = {}
    for package in ("chunkc", "chunkc.dsl", "chunkc.ir", "chunkc.backends"):
        spec = importlib.util.find_spec(package)
        for top in (spec.submodule_search_locations or ()) if spec else ():
            for folder, _, names in os.walk(top, followlinks=True):
                for name in names:
                    if name.endswith((".py", ".lark")):
                        path = Path(folder, name).resolve()
                        found[path] = f"{name} {sha256(path.read_bytes())}"
    return sha256("\n".join(sorted(found.values())))


def fingerprint(source: SourceFile, settings: Mapping[str, Number], ahead: Mapping[str, str] | None = None,
                tuning: Tuning | None = None) -> str:  # fmt: skip
    """A hash of all that shapes the package; `ahead` is what its kernels are compiled for and by.

    Of the spec and the files that it uses, the tokens and their lines count: emitted comments name lines, and nothing
    else of the layout."""
    spelled = []
    for file in (source, *source.used):
        try:
            spelled += [[t.type, "" if t.type == "_NL" else str(t), t.line] for t in tokens(file)]
        except (CompileError, LarkError):
            spelled.append([file.text])  # never stored: compiling it fails, and says all that is wrong
    chosen = sorted((name, type(value).__name__, repr(value)) for name, value in settings.items())
    parts: list[object] = [source.name, spelled, chosen, __version__, compiler_sha256(), FORMAT, CONTRACT]
    if ahead is not None:
        parts.append(sorted(ahead.items()))
    if tuning is not None:
        parts.append(sorted(tuning.schedules().items()))
    return sha256(json.dumps(parts))


def read_setting(text: str) -> tuple[str, Number]:
    """`name=value` as a name and a value: true, false, an integer or a decimal number.

    Raises:
        SettingError: if it is not written so.
    """
    name, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not name.isidentifier():
        raise SettingError(f"'{text}' is not name=value")
    if value in ("true", "false"):
        return name, value == "true"
    for read in (int, float):
        with contextlib.suppress(ValueError):
            number = read(value)
            if math.isfinite(number):
                return name, number
    raise SettingError(f"'{value}' is no number, true or false (setting '{name}')")


def fit_settings(units: Iterable[Unit], settings: Mapping[str, Number]) -> dict[str, Number]:
    """The settings as the parameters' types, in order of their names.

    Raises:
        SettingError: if one names no parameter of any unit, or does not fit the type of one.
    """
    params = [(p.name, p.type) for unit in units for p in unit.params]
    known = sorted({name for name, _ in params})
    out: dict[str, Number] = {}
    for name, value in sorted(settings.items()):
        types = {kind for other, kind in params if other == name}
        if not types:
            near = difflib.get_close_matches(name, known, 1)
            also = f"did you mean '{near[0]}'?" if near else f"it has {', '.join(known) or 'none'}"
            raise SettingError(f"the spec has no parameter '{name}': {also}")
        for kind in sorted(types):
            if isinstance(value, bool) != (kind == "bool") or (kind == "int" and not isinstance(value, int)):
                raise SettingError(f"'{name}' is of type {kind}, and {str(value).lower()} is not")
        out[name] = float(value) if types == {"float"} else value
    return out


# -- what comes out ----------------------------------------------------------------------------------------------------


def pack(compiled: Compiled, emit: Emitter, settings: Mapping[str, Number], ahead: Mapping[str, str] | None = None,
         compile_kernels: Compiler | None = None) -> dict[str, str | bytes]:  # fmt: skip
    """All files of the package by name, the manifest last; the same input is always the same text.

    `emit` makes the Python files from the source, the units, the settings and tuned schedules, `compile_kernels` what
    is compiled ahead from these files and the settings; `ahead` says for what and by what.

    Raises:
        SettingError: if a setting does not fit the spec.
        EmissionError: if an emitted file is no Python or imports what a package may not.
    """
    source = compiled.checked.source
    chosen = fit_settings(compiled.units, settings)
    emitted = emit(source, compiled.units, chosen, {} if compiled.tuning is None else compiled.tuning.schedules())
    texts = {name: emitted[name] for name in sorted(emitted)}
    verify(texts)
    files: dict[str, str | bytes] = {**texts, **(compile_kernels(texts, chosen) if compile_kernels else {})}
    manifest = Manifest(
        compiler=__version__, spec=source.name, spec_sha256=sha256(source.text), settings=chosen,
        schedules={unit.name: unit.schedule.demands() for unit in compiled.units},
        ahead=None if ahead is None else dict(ahead),
        files={name: sha256(data) for name, data in files.items()},
        fingerprint=fingerprint(source, settings, ahead, compiled.tuning),
    )  # fmt: skip
    return {**files, MANIFEST: manifest.text()}


def verify(files: Mapping[str, str]) -> None:
    """Check that the files are one self-contained package: Python that imports torch, triton and itself only.

    Raises:
        EmissionError: at the first file that is not.
    """
    if "__init__.py" not in files:
        raise EmissionError("the package has no __init__.py")
    for name, text in files.items():
        if not re.fullmatch(r"[A-Za-z_]\w*\.py", name, flags=re.ASCII):
            raise EmissionError(f"'{name}' is no name for a module")
        try:
            tree = ast.parse(text, name)
        except (SyntaxError, ValueError) as reason:
            raise EmissionError(f"{name} is no Python: {reason}") from reason
        for node in ast.walk(tree):
            bad = _forbidden(node, files, MODULES | OF_FILE.get(name, frozenset()))
            if bad:
                raise EmissionError(f"{name}:{getattr(node, 'lineno', 0)}: an emitted package may not use {bad}")


def _forbidden(node: ast.AST, files: Mapping[str, str], modules: frozenset[str]) -> str:
    """What a node uses that an emitted package may not, beside these modules; empty if nothing."""
    if isinstance(node, ast.Import):
        return next((a.name for a in node.names if a.name.partition(".")[0] not in modules), "")
    if isinstance(node, ast.ImportFrom) and node.module == "os":
        return next((f"os.{a.name}" for a in node.names if a.name not in OF_OS), "")
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
        return "" if node.attr in OF_OS else f"os.{node.attr}"
    if isinstance(node, ast.ImportFrom) and not node.level:
        return "" if (node.module or "").partition(".")[0] in modules else str(node.module)
    if isinstance(node, ast.ImportFrom):
        wanted = [node.module] if node.module else [a.name for a in node.names]
        missing = next((m for m in wanted if node.level > 1 or f"{m}.py" not in files), None)
        return f"{'.' * node.level}{missing}" if missing else ""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
        return f"{node.func.id}()"
    return ""


# -- folders -----------------------------------------------------------------------------------------------------------


def differing(files: Files, folder: Path) -> list[str]:
    """The names of the files that the folder has not, or has with other content, or has too many."""
    out = []
    for name, content in files.items():
        try:
            same = (folder / name).read_bytes() == as_bytes(content)
        except OSError:
            same = False
        if not same:
            out.append(name)
    return out + [name for name in _strangers(folder, files) if name.endswith(".py") or "/" in name]


def as_bytes(content: str | bytes) -> bytes:
    return content.encode() if isinstance(content, str) else content


def _strangers(folder: Path, known: Iterable[str]) -> list[str]:
    """What a folder holds beside the known files and what Python writes itself."""
    names = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    inner = {name.partition("/")[0] for name in known if "/" in name}  # folders of the package's own
    names |= {f"{name}/{p.name}" for name in inner & names for p in (folder / name).iterdir()}
    return sorted(names - {*known, *inner, MANIFEST, "__pycache__"})


def publish(files: Files, folder: Path) -> bool:
    """Write a package in one step; False if the folder held just these files already.

    An interrupted run leaves the old package whole, or the new one.

    Raises:
        CompileError: `not-a-package` if the folder holds anything that this compiler did not write.
    """
    folder = Path(os.path.realpath(folder))
    _recover(folder)
    if folder.exists() and not folder.is_dir():
        raise _not_a_package(folder, "this is no folder")
    if folder.is_dir() and any(folder.iterdir()):
        old = read_manifest(folder)
        if old is None:
            raise _not_a_package(folder, f"the folder is not empty and has no {MANIFEST} that chunkc wrote")
        more = _strangers(folder, old.files)
        if more:
            raise _not_a_package(folder, f"the folder also holds {', '.join(more[:4])}, which chunkc did not write")
        if not differing(files, folder):
            return False
    replace_folder(files, folder)
    return True


def _not_a_package(folder: Path, why: str) -> CompileError:
    hints = ("choose another folder, or move away what is in this one",)
    message = f"'{folder.name}' is not an emitted package"
    return CompileError([error("not-a-package", message, Span(str(folder), 0, 0), notes=(why,), hints=hints)])


def replace_folder(files: Files, folder: Path) -> None:
    """Put the files where the folder is, whatever it holds, by renaming a folder written beside it."""
    parent = folder.parent
    parent.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    new = parent / f".{folder.name}.new-{secrets.token_hex(6)}"
    try:
        new.mkdir()
        inner = sorted({(new / name).parent for name in files} - {new})
        for made in inner:
            made.mkdir()
        for name, content in files.items():  # the manifest is last in the order: without it a folder is no package
            _write(new / name, as_bytes(content))
        for written in (*inner, new):
            _sync(written)
        _swap(new, folder)
        _sync(parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Make the names in a folder durable, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _swap(new: Path, folder: Path) -> None:
    """Give `new` the name `folder`; what had the name is then at `new`, or gone."""
    for _ in range(8):  # another process may put its package there between two of these steps
        try:
            os.rename(new, folder)  # replaces an empty folder and nothing else
            return
        except OSError:
            if not folder.is_dir():
                raise
        if _exchange(new, folder):
            return
        aside = folder.parent / f".{folder.name}.old-{secrets.token_hex(6)}"
        try:
            os.rename(folder, aside)
        except FileNotFoundError:
            continue
        try:
            os.rename(new, folder)
        except OSError:
            if not folder.exists():
                os.rename(aside, folder)
            continue
        except BaseException:
            os.rename(aside, folder)
            raise
        shutil.rmtree(aside, ignore_errors=True)
        return
    raise OSError(f"cannot replace '{folder}': it changes all the time")


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step; False where the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    return bool(rename(here, os.fsencode(a.absolute()), here, os.fsencode(b.absolute()), exchange) == 0)


def _recover(folder: Path) -> None:
    """Put back a package that a killed run had moved aside and not yet replaced."""
    if not folder.exists():
        for aside in sorted(folder.parent.glob(f".{folder.name}.old-*"))[:1]:
            with contextlib.suppress(OSError):
                os.rename(aside, folder)


def _sweep(folder: Path) -> None:
    """Remove what killed runs left beside the folder."""
    for kind in ("new", "old"):
        for left in folder.parent.glob(f".{folder.name}.{kind}-*"):
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > STALE_SECONDS:
                    shutil.rmtree(left, ignore_errors=True)


# -- importing ---------------------------------------------------------------------------------------------------------

_importing = threading.RLock()


def load_package(folder: Path) -> ModuleType:
    """Import an emitted package from where it lies; the same text is imported once a process.

    Raises:
        CompileError: `not-a-package` if the folder is none, or one for another version of chunkc.
    """
    folder = Path(os.path.realpath(folder))
    manifest = read_manifest(folder)
    if manifest is None:
        raise _not_a_package(folder, f"it has no {MANIFEST} that chunkc wrote")
    if (manifest.format, manifest.contract) != (FORMAT, CONTRACT):
        raise _not_a_package(folder, f"chunkc {manifest.compiler} wrote it, and this is chunkc {__version__}")
    # Named by what the files hold now, not by the fingerprint: a package that was edited by hand is another module.
    held = [f"{name} {sha256((folder / name).read_bytes())}" for name in sorted(manifest.files)]
    digest = sha256("\n".join([manifest.fingerprint, *held]))[:16]
    name = f"chunkc_package_{package_name(manifest.spec)}_{digest}"
    with _importing:
        return sys.modules.get(name) or _import(name, folder)


def _import(name: str, folder: Path) -> ModuleType:
    importlib.invalidate_caches()
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # relative imports inside look the package up by its name
    try:
        spec.loader.exec_module(module)
    except BaseException:
        for loaded in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
            del sys.modules[loaded]
        raise
    return module
