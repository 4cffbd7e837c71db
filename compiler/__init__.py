"""chunkc: a compiler from named-axis equations to PyTorch and Triton.

Importing this package imports nothing else of it: a name is fetched when it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import ModuleType

    from chunkc.ir.diagnostics import CompileError, Diagnostic

__version__ = "0.1.0"
__all__ = ["CompileError", "Diagnostic", "__version__", "build", "check", "load"]

_LAZY = {"CompileError": "chunkc.ir.diagnostics", "Diagnostic": "chunkc.ir.diagnostics"}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def check(path: str | Path) -> tuple[Diagnostic, ...]:
    """What is wrong with a spec file: its errors, or its warnings, or nothing."""
    from pathlib import Path

    from chunkc.driver import judge
    from chunkc.ir.diagnostics import CompileError, SourceFile

    try:
        return judge(SourceFile.read(Path(path), Path(path).name))
    except CompileError as failure:
        return failure.diagnostics


def build(path: str | Path, out_dir: str | Path, settings: Mapping[str, int | float | bool] | None = None, *,
          target: str | None = None, dtype: str = "bf16") -> Path:  # fmt: skip
    """Compile a spec file into the package `out_dir/<name of the file>`; the package's folder.

    `settings` fixes parameters by name. With `target`, as `sm_90`, the package holds its kernels compiled for that GPU
    and inputs of this dtype.

    Raises:
        CompileError: if the spec is wrong, or the folder holds something that is no emitted package.
        SettingError: (a ValueError) if a setting names no parameter or does not fit it.
    """
    from pathlib import Path

    from chunkc.ahead.targets import Ahead
    from chunkc.artifact import spec_name
    from chunkc.building import build_source
    from chunkc.ir.diagnostics import SourceFile

    source = SourceFile.read(Path(path), spec_name(path))
    ahead = None if target is None else Ahead(target, dtype)
    return build_source(source, Path(out_dir), settings or {}, ahead).folder


def load(path: str | Path, settings: Mapping[str, int | float | bool] | None = None) -> ModuleType:
    """Compile a spec file and import the result; what was compiled before comes from the cache.

    Raises:
        CompileError: if the spec is wrong.
        SettingError: (a ValueError) if a setting names no parameter or does not fit it.
    """
    from pathlib import Path

    from chunkc.artifact import fingerprint, load_package, pack, package_name, spec_name
    from chunkc.cache import fetch
    from chunkc.dsl.uses import gather
    from chunkc.ir.diagnostics import SourceFile
    from chunkc.tuning import read_tuning

    source = gather(SourceFile.read(Path(path), spec_name(path)))
    chosen = settings or {}

    def make() -> dict[str, str | bytes]:
        from chunkc.backends.package import emit_files
        from chunkc.driver import compile_source

        return pack(compile_source(source), emit_files, chosen)

    return load_package(fetch(fingerprint(source, chosen, tuning=read_tuning(source)), package_name(source.name), make))
