"""The files that a spec uses: found, read, and put in the order in which they are checked.

A path is relative to the file that names it and stays below that file's folder, symbolic links included."""

from __future__ import annotations

import posixpath
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from lark import Token, UnexpectedInput

from chunkc.dsl.parser import tokens
from chunkc.dsl.scope import MAX_FOUND
from chunkc.ir.diagnostics import MAX_BYTES, CompileError, Diagnostic, SourceFile, Span, error

MAX_FILES = 64


class _Stop(Exception):
    """Nothing more is looked for: too much is used, or more is wrong than anyone reads."""


@dataclass
class _Search:
    """What was found so far: files by where they really lie, so that one file by two paths is one."""

    left: int  # bytes that files may still have
    found: dict[Path, SourceFile] = field(default_factory=dict)
    seen: set[Path] = field(default_factory=set)
    wrong: list[Diagnostic] = field(default_factory=list)

    def report(self, *found: Diagnostic) -> None:
        self.wrong += found
        if len(self.wrong) >= MAX_FOUND:
            raise _Stop


def home(user: SourceFile, path: str) -> Path:
    """Where the file really lies that another one uses."""
    assert user.path is not None
    return (user.path.parent / path).resolve()


def gather(source: SourceFile) -> SourceFile:
    """The source with all files that it uses, those first that others need.

    Raises:
        CompileError: `bad-use` for a path that may not be read, `cannot-read` for a file that cannot, `recursive` for
            files that use each other, `too-large` for too many.
    """
    if source.used:
        return source
    search = _Search(MAX_BYTES - len(source.text.encode("utf-8", "replace")))
    with suppress(_Stop):
        _visit(source, () if source.path is None else (source.path.resolve(),), search)
    if search.wrong:
        raise CompileError(search.wrong)
    return replace(source, used=tuple(search.found.values()))


def _visit(source: SourceFile, stack: tuple[Path, ...], search: _Search) -> None:
    for path, span in _uses(source):
        try:
            target = _target(source, path, span)
            if target in stack:
                raise CompileError([error("recursive", f"'{path}' uses this file again", span)])
            if target in search.seen:
                continue
            search.seen.add(target)
            if len(search.seen) > MAX_FILES:
                search.wrong.append(error("too-large", f"over {MAX_FILES} files are used", span))
                raise _Stop
            inner = _read(target, posixpath.normpath(posixpath.join(posixpath.dirname(source.name), path)), span)
            search.left -= len(inner.text.encode("utf-8"))
            if search.left < 0:
                search.wrong.append(
                    error("too-large", "this file and those that it uses are over 1 MiB together", span)
                )
                raise _Stop
        except CompileError as failure:
            search.report(*failure.diagnostics)
            continue
        _visit(inner, (*stack, target), search)
        search.found[target] = inner


def _uses(source: SourceFile) -> list[tuple[str, Span]]:
    """The paths that a file names, in order; none where its text is broken, which parsing reports."""
    out: list[tuple[str, Span]] = []
    last: Token | None = None
    try:
        for token in tokens(source):
            if last is not None and last.type == "USE" and token.type == "STRING":
                start, end = token.start_pos or 0, token.end_pos or 0
                out.append((str(token)[1:-1], Span(source.name, start, end)))
            last = token
    except (CompileError, UnexpectedInput):
        return []
    return out


def _target(user: SourceFile, path: str, span: Span) -> Path:
    if user.path is None:
        raise CompileError([error("bad-use", "text that comes from no file uses no other file", span)])
    pure = PurePosixPath(path)
    plain = path.isprintable() and "\\" not in path and ":" not in path
    if not plain or pure.is_absolute() or ".." in pure.parts or pure.suffix != ".spec":
        raise CompileError([error("bad-use", f"'{path}' is no path of a spec below this file's folder", span,
                                  hints=("write a relative path that ends in .spec, without '..'",))])  # fmt: skip
    try:
        target = home(user, path)
        inside = target.is_relative_to(user.path.parent.resolve())
    except (OSError, RuntimeError):
        inside = False
    if not inside:
        raise CompileError([error("bad-use", f"'{path}' leads out of this file's folder", span,
                                  hints=("copy the file here",))])  # fmt: skip
    return target


def _read(target: Path, name: str, span: Span) -> SourceFile:
    try:
        return SourceFile.read(target, name)
    except CompileError as failure:
        raise CompileError([replace(d, span=span) for d in failure.diagnostics]) from None
