"""The files that a spec uses: found, read, and put in the order in which they are checked.

A path is relative to the file that names it and stays below that file's folder, symbolic links included."""

from __future__ import annotations

import posixpath
from dataclasses import replace
from pathlib import Path, PurePosixPath

from lark import Token, UnexpectedInput

from chunkc.dsl.parser import tokens
from chunkc.ir.diagnostics import CompileError, Diagnostic, SourceFile, Span, error

MAX_FILES = 64


def used_name(user: str, path: str) -> str:
    """What diagnostics call a file that another one uses."""
    return posixpath.join(posixpath.dirname(user), path)


def gather(source: SourceFile) -> SourceFile:
    """The source with all files that it uses, those first that others need.

    Raises:
        CompileError: `bad-use` for a path that may not be read, `cannot-read` for a file that cannot, `recursive` for
            files that use each other, `too-large` for too many.
    """
    if source.used:
        return source
    found: dict[str, SourceFile] = {}
    _visit(source, (source.name,), found)
    return replace(source, used=tuple(found.values()))


def _visit(source: SourceFile, stack: tuple[str, ...], found: dict[str, SourceFile]) -> None:
    wrong: list[Diagnostic] = []
    for path, span in _uses(source):
        name = used_name(source.name, path)
        try:
            if name in stack:
                raise CompileError([error("recursive", f"'{path}' uses this file again", span)])
            if name in found:
                continue
            if len(found) >= MAX_FILES:
                raise CompileError([error("too-large", f"over {MAX_FILES} files are used", span)])
            inner = _read(source, path, name, span)
            _visit(inner, (*stack, name), found)
            found[name] = inner
        except CompileError as failure:
            wrong += failure.diagnostics
    if wrong:
        raise CompileError(wrong)


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


def _read(user: SourceFile, path: str, name: str, span: Span) -> SourceFile:
    if user.path is None:
        raise CompileError([error("bad-use", "text that comes from no file uses no other file", span)])
    pure = PurePosixPath(path)
    plain = path.isprintable() and "\\" not in path and ":" not in path
    if not plain or pure.is_absolute() or ".." in pure.parts or pure.suffix != ".spec":
        raise CompileError([error("bad-use", f"'{path}' is no path of a spec below this file's folder", span,
                                  hints=("write a relative path that ends in .spec, without '..'",))])  # fmt: skip
    folder = user.path.parent
    target = folder / Path(*pure.parts)
    try:
        inside = target.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):
        inside = False
    if not inside:
        raise CompileError([error("bad-use", f"'{path}' leads out of this file's folder", span)])
    try:
        return SourceFile.read(target, name)
    except CompileError as failure:
        raise CompileError([replace(d, span=span) for d in failure.diagnostics]) from None
