"""Building a package in a folder: the same for the command and for Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from chunkc.ahead.run import Made, compile_ahead
from chunkc.ahead.targets import Ahead
from chunkc.artifact import differing, fingerprint, fit_settings, pack, package_name, publish
from chunkc.backends.package import emit_files, tunable
from chunkc.cache import is_valid
from chunkc.driver import Compiled, compile_source
from chunkc.ir.axes import Number
from chunkc.ir.diagnostics import Diagnostic, SourceFile, Span
from chunkc.tuning import tuning_path


@dataclass(frozen=True)
class Built:
    """The package's folder, the files in it that differ from what would be built, and what there is to say."""

    folder: Path
    stale: tuple[str, ...] = ()
    warnings: tuple[Diagnostic, ...] = ()
    report: tuple[str, ...] = ()


def build_source(source: SourceFile, out: Path, settings: Mapping[str, Number], ahead: Ahead | None = None,
                 only_check: bool = False) -> Built:  # fmt: skip
    """Write the package, or with `only_check` compare it. One that is up to date is not compiled ahead once more.

    Raises:
        CompileError: if the spec is wrong, kernels cannot be compiled, or the folder holds what is no emitted package.
        SettingError: if a setting does not fit the spec.
    """
    if ahead is not None:
        ahead.check(source)
    compiled = compile_source(source)
    warnings = (*compiled.checked.warnings, *stale(compiled))
    folder = out / package_name(source.name)
    made: list[Made] = []
    if ahead is None or not ahead.ship:
        files = pack(compiled, emit_files, settings)
        if ahead is not None and not only_check:
            texts = {name: text for name, text in files.items() if isinstance(text, str)}
            made.append(compile_ahead(compiled, texts, fit_settings(compiled.units, settings), ahead))
    else:
        record = ahead.record()
        if is_valid(folder, fingerprint(compiled.checked.source, settings, record, compiled.tuning)):
            return Built(folder, warnings=warnings)
        files = pack(compiled, partial(emit_files, ahead=True), settings, record, partial(_kept, made, compiled, ahead))
    if only_check:
        return Built(folder, tuple(differing(files, folder)), warnings)
    publish(files, folder)
    said = [d for m in made for d in m.warnings(ahead, compiled)] if ahead is not None else []
    report = [line for m in made for line in m.report(ahead)] if ahead is not None else []
    return Built(folder, (), (*warnings, *said), tuple(report))


def stale(compiled: Compiled) -> list[Diagnostic]:
    """A warning if tuning found schedules for kernels that the package does not have."""
    source, tuning = compiled.checked.source, compiled.tuning
    strange = sorted(set(tuning.kernels) - set(tunable(source, compiled.units))) if tuning is not None else []
    if not strange:
        return []
    name = str(tuning_path(source.path))
    return [Diagnostic("stale-tuning", f"'{name}' has schedules of kernels that '{source.name}' has not",
                       Span(name, 0, 0), severity="warning", notes=(f"they are {', '.join(strange)}",),
                       hints=("chunkc tune finds those of the kernels that there are",))]  # fmt: skip


def _kept(made: list[Made], compiled: Compiled, ahead: Ahead, texts: Mapping[str, str], settings: Mapping[str, Number]
          ) -> Mapping[str, bytes]:  # fmt: skip
    """The compiled files; what they came with is added to a list."""
    made.append(compile_ahead(compiled, texts, settings, ahead))
    return made[-1].files
