"""The whole compile in one place: text, checked units, normal form, emitted files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from chunkc.dsl.check import Exports, check
from chunkc.dsl.parser import parse, parse_partial
from chunkc.dsl.tree import File, Use
from chunkc.dsl.uses import gather, home
from chunkc.ir.diagnostics import CompileError, Diagnostic, SourceFile
from chunkc.ir.graph import Module, Unit
from chunkc.ir.nodes import Recur
from chunkc.ir.tuning import Tuning
from chunkc.pipeline import PASSES, Pass, run, upto
from chunkc.sharding import refusals
from chunkc.tuning import read_tuning


@dataclass(frozen=True)
class Checked:
    """A file's units at the semantic level, its warnings, and its sources by name for rendering diagnostics."""

    source: SourceFile
    module: Module
    warnings: tuple[Diagnostic, ...]

    @property
    def sources(self) -> dict[str, SourceFile]:
        return {s.name: s for s in (self.source, *self.source.used)}


@dataclass(frozen=True)
class Compiled:
    """A checked file and its units at the normal level, in the same order; `tuning` is what lies beside the file."""

    checked: Checked
    units: tuple[Unit, ...]
    tuning: Tuning | None = None


def check_source(source: SourceFile) -> Checked:
    """Parse and check, the files that it uses first.

    Raises:
        CompileError: with every independent error of the first stage that fails.
    """
    file, syntax, dropped = parse_partial(source)
    if syntax:
        raise CompileError(syntax)
    source = gather(source)
    files: list[tuple[SourceFile, File]] = []
    for used in source.used:
        try:
            files.append((used, parse(used)))
        except CompileError as failure:
            syntax += failure.diagnostics
    if syntax:
        raise CompileError(syntax)
    exports: dict[Path, Exports] = {}
    found: dict[Diagnostic, None] = {}  # what is wrong in a function is found wherever it is called
    for used, tree in files:
        assert used.path is not None
        _, warnings, exports[used.path] = _check(used, tree, "", exports)
        found.update(dict.fromkeys(d for d in warnings if d.severity == "error"))
    module, own, _ = _check(source, file, dropped, exports)
    found.update(dict.fromkeys(own))
    if any(d.severity == "error" for d in found):
        raise CompileError([d for d in found if d.severity == "error"])
    return Checked(source, module, tuple(found))


def _check(source: SourceFile, file: File, dropped: str, exports: dict[Path, Exports]
           ) -> tuple[Module, list[Diagnostic], Exports]:  # fmt: skip
    """One file, with what it may take from others."""
    homes = {u.path: home(source, u.path) for u in file.items if isinstance(u, Use)}
    taken = {path: exports[place] for path, place in homes.items() if place in exports}
    return check(file, source.name, dropped, taken)


def check_path(path: Path, name: str | None = None) -> Checked:
    """`check_source` of a file; `name` is what diagnostics and emitted comments call it (its base name if unsaid)."""
    return check_source(SourceFile.read(path, name or path.name))


def judge(source: SourceFile) -> tuple[Diagnostic, ...]:
    """A right file's warnings, those that its normal form gives included.

    Raises:
        CompileError: as `check_source`.
    """
    return compile_source(source, upto("normalize")).checked.warnings


def compile_source(source: SourceFile, passes: tuple[Pass, ...] = PASSES, tuned: bool = True) -> Compiled:
    """Check, then bring every unit to normal form, and its scans to whatever the passes derive from them. `tuned`: with
    what lies beside the file.

    Raises:
        CompileError: as `check_source`, or where a unit cannot be shared as its parallel layout demands, or as
            `read_tuning`.
    """
    checked, tuning = check_source(source), read_tuning(source) if tuned else None
    units = tuple(u.evolve(graph=run(u.graph, passes)) for u in checked.module.units)
    if refused := [d for u in units for d in refusals(u)]:
        raise CompileError(refused)
    found = [w for u in units for w in warnings_of(u)]
    return Compiled(replace(checked, warnings=(*checked.warnings, *found)), units, tuning)


def warnings_of(unit: Unit) -> list[Diagnostic]:
    """What a unit's normal form is worth warning of: recurrences that lost their chunk form to an unproven gate."""
    out = []
    for node in unit.graph.of_kind(Recur):
        if "may grow" in node.reason:
            span = node.carried[0].span or unit.span
            out.append(Diagnostic(
                "gate-may-grow", node.reason, span, severity="warning",
                notes=("it runs one token at a time",),
                hints=("write the gate as exp of something not positive or as a sigmoid, or declare 'in [0, 1]'",),
            ))  # fmt: skip
    return out
