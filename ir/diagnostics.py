"""Source text, spans and diagnostics: the one record in which every stage reports what is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Span:
    """A half-open range of character offsets in one file."""

    file: str
    start: int
    end: int

    def to(self, other: Span) -> Span:
        """The smallest span that covers both."""
        return Span(self.file, min(self.start, other.start), max(self.end, other.end))


@dataclass(frozen=True)
class SourceFile:
    """A file's text under the name that diagnostics show; `used` are the files that it uses, themselves or through
    others, those first that others need."""

    name: str
    text: str
    path: Path | None = None
    used: tuple[SourceFile, ...] = ()

    @staticmethod
    def read(path: Path, name: str | None = None) -> SourceFile:
        """Read UTF-8 text.

        Raises:
            CompileError: `cannot-read` if the file is missing, no file, or not UTF-8; `too-large` above 1 MiB.
        """
        shown = name or str(path)
        span = Span(shown, 0, 0)
        try:
            if not path.is_file():
                raise CompileError([error("cannot-read", f"there is no file '{shown}'", span)])
            if path.stat().st_size > MAX_BYTES:
                raise CompileError([error("too-large", f"'{shown}' is over 1 MiB", span)])
            return SourceFile(shown, path.read_bytes().decode("utf-8"), path)
        except OSError as reason:
            raise CompileError(
                [error("cannot-read", f"cannot read '{shown}': {reason.strerror or reason}", span)]
            ) from None
        except (UnicodeDecodeError, ValueError):
            raise CompileError([error("cannot-read", f"'{shown}' is not UTF-8 text", span)]) from None

    def of(self, file: str) -> SourceFile:
        """The file of this name: itself, or one that it uses."""
        return next((s for s in self.used if s.name == file), self)

    def place(self, span: Span | None) -> str:
        """File and line of a span, `name.spec:14`; empty without one."""
        return "" if span is None else f"{span.file}:{self.of(span.file).position(span.start)[0]}"

    def position(self, offset: int) -> tuple[int, int]:
        """Line and column of an offset, both counted from 1."""
        before = self.text[:offset]
        line = before.count("\n") + 1
        return line, offset - (before.rfind("\n") + 1) + 1

    def line(self, number: int) -> str:
        """The text of a line, counted from 1."""
        lines = self.text.split("\n")
        return lines[number - 1].rstrip("\r") if number <= len(lines) else ""


@dataclass(frozen=True)
class Diagnostic:
    """One finding: a stable code, the smallest wrong span, other parties, facts (notes) and what to do (hints)."""

    code: str
    message: str
    span: Span
    label: str = ""
    related: tuple[tuple[Span, str], ...] = ()
    notes: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    severity: str = "error"


def error(code: str, message: str, span: Span, label: str = "", **more: Any) -> Diagnostic:
    """A diagnostic of severity error."""
    return Diagnostic(code, message, span, label, **more)


class CompileError(Exception):
    """What a stage raises when it cannot go on: all the independent errors that it found."""

    def __init__(self, diagnostics: Iterable[Diagnostic]) -> None:
        self.diagnostics: tuple[Diagnostic, ...] = tuple(
            sorted(diagnostics, key=lambda d: (d.span.file, d.span.start, d.code))
        )
        super().__init__("; ".join(f"{d.code}: {d.message}" for d in self.diagnostics))


@dataclass
class Report:
    """Collects diagnostics during a stage; at most one error for the same span and code."""

    found: list[Diagnostic] = field(default_factory=list)

    def add(self, diagnostic: Diagnostic) -> None:
        if not any(d.span == diagnostic.span and d.code == diagnostic.code for d in self.found):
            self.found.append(diagnostic)

    def error(self, code: str, message: str, span: Span, label: str = "", **more: Any) -> None:
        self.add(error(code, message, span, label, **more))

    def warning(self, code: str, message: str, span: Span, label: str = "", **more: Any) -> None:
        self.add(Diagnostic(code, message, span, label, severity="warning", **more))

    @property
    def errors(self) -> list[Diagnostic]:
        return [d for d in self.found if d.severity == "error"]


RED, YELLOW, BLUE, BOLD, RESET = "\033[31;1m", "\033[33;1m", "\033[34;1m", "\033[1m", "\033[0m"


def _paint(text: str, style: str, color: bool) -> str:
    return f"{style}{text}{RESET}" if color and text else text


def _marked_lines(source: SourceFile, marks: list[tuple[Span, str, str]], color: bool) -> list[str]:
    """The source lines of the marks with carets under them; a gap in the lines shows as nothing."""
    rows: dict[int, list[tuple[int, int, str, str]]] = {}
    for span, label, sign in marks:
        line, column = source.position(span.start)
        text = source.line(line)
        last = min(column - 1 + max(span.end - span.start, 1), max(len(text), column))
        rows.setdefault(line, []).append((column - 1, max(last, column), label, sign))
    width = max((len(str(n)) for n in rows), default=1)
    bar = _paint("|", BLUE, color)
    out = [" " * (width + 1) + bar]
    for number in sorted(rows):
        text = source.line(number)
        shown = text[:400].replace("\t", " ")
        out.append(f"{_paint(str(number).rjust(width), BLUE, color)} {bar} {shown}".rstrip())
        for start, end, label, sign in sorted(rows[number], key=lambda r: r[3] != "^"):
            caret = _paint(sign * (end - start), RED if sign == "^" else BLUE, color)
            out.append(f"{' ' * (width + 1)}{bar} {' ' * start}{caret} {label}".rstrip())
    return out


def render_text(d: Diagnostic, sources: Mapping[str, SourceFile], color: bool = False) -> str:
    """The diagnostic as a person reads it: headline, place, marked lines, notes and hints."""
    style = RED if d.severity == "error" else YELLOW
    out = [f"{_paint(f'{d.severity}[{d.code}]', style, color)}: {_paint(d.message, BOLD, color)}"]
    source = sources.get(d.span.file)
    if source is not None and (source.text or d.span.end):
        line, column = source.position(d.span.start)
        out.append(f"  --> {d.span.file}:{line}:{column}")
        marks = [(d.span, d.label, "^")]
        marks += [(s, text, "-") for s, text in d.related if s.file == d.span.file]
        out += _marked_lines(source, marks, color)
        for span, text in d.related:
            if span.file != d.span.file and span.file in sources:
                other = sources[span.file]
                line, column = other.position(span.start)
                out.append(f"  ::: {span.file}:{line}:{column}")
                out += _marked_lines(other, [(span, text, "-")], color)
    else:
        out.append(f"  --> {d.span.file}")
    out += [f"   = note: {note}" for note in d.notes]
    out += [f"   = hint: {hint}" for hint in d.hints]
    return "\n".join(out)


def as_record(d: Diagnostic, sources: Mapping[str, SourceFile]) -> dict[str, Any]:
    """The diagnostic as plain data for `--format json`; positions counted from 1."""

    def place(span: Span) -> dict[str, Any]:
        source = sources.get(span.file, SourceFile(span.file, ""))
        (line, column), (end_line, end_column) = source.position(span.start), source.position(span.end)
        return {"file": span.file, "line": line, "column": column, "end_line": end_line, "end_column": end_column}

    return {
        "code": d.code,
        "severity": d.severity,
        "message": d.message,
        "span": place(d.span),
        "label": d.label,
        "related": [{"span": place(s), "text": text} for s, text in d.related],
        "notes": list(d.notes),
        "hints": list(d.hints),
    }


def render_json(diagnostics: Iterable[Diagnostic], sources: Mapping[str, SourceFile]) -> str:
    """All diagnostics as one JSON list."""
    return json.dumps([as_record(d, sources) for d in diagnostics], indent=2)


def render_github(d: Diagnostic, sources: Mapping[str, SourceFile]) -> str:
    """The diagnostic as an annotation that GitHub shows beside the line."""

    def escaped(text: str, more: str = "") -> str:
        for c in "%\r\n" + more:
            text = text.replace(c, f"%{ord(c):02X}")
        return text

    source = sources.get(d.span.file, SourceFile(d.span.file, ""))
    (line, column), (end_line, end_column) = source.position(d.span.start), source.position(d.span.end)
    place: dict[str, object] = {"file": d.span.file, "line": line, "endLine": end_line, "title": d.code}
    if line == end_line:  # columns are refused for a range of lines
        place |= {"col": column, "endColumn": end_column}
    fields = ",".join(f"{k}={escaped(str(v), ':,')}" for k, v in place.items())
    lines = [f"{d.message}: {d.label}" if d.label else d.message, *d.notes, *d.hints]
    return f"::{'error' if d.severity == 'error' else 'warning'} {fields}::{escaped(chr(10).join(lines))}"
