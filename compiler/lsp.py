"""A language server: diagnostics as one types, what a name is on hover, completion, formatting.

Needs the extra `lsp`. Started by editors as `chunkc lsp`; it speaks on stdin and stdout."""

from __future__ import annotations

import re
from pathlib import Path

from lsprotocol import types
from pygls.lsp.server import LanguageServer
from pygls.uris import to_fs_path

from chunkc import __version__
from chunkc.driver import compile_source
from chunkc.dsl import prelude
from chunkc.dsl.format import FormatError, format_source
from chunkc.dsl.schedules import SETTINGS, TRUTHS
from chunkc.dsl.tables import grammar
from chunkc.facts import facts
from chunkc.ir import nodes as N
from chunkc.ir.diagnostics import CompileError, Diagnostic, SourceFile, Span
from chunkc.ir.graph import Unit
from chunkc.ir.ranges import REALS, Ranges

SEVERITY = {"error": types.DiagnosticSeverity.Error, "warning": types.DiagnosticSeverity.Warning}


def source_of(uri: str, text: str) -> SourceFile:
    """The text of an editor, which may use files beside its own."""
    path = to_fs_path(uri)
    return SourceFile(Path(path).name if path else uri, text, Path(path) if path else None)


def range_of(source: SourceFile, span: Span) -> types.Range:
    """A span in the editor's terms: lines from 0, columns in UTF-16 units."""

    def at(offset: int) -> types.Position:
        line, column = source.position(offset)
        before = source.line(line)[: column - 1]
        return types.Position(line - 1, len(before.encode("utf-16-le", "surrogatepass")) // 2)

    return types.Range(at(span.start), at(span.end))


def found(source: SourceFile) -> list[Diagnostic]:
    """What is wrong or worth a warning, in this file."""
    try:
        compiled = compile_source(source)
        return [d for d in compiled.checked.warnings if d.span.file == source.name]
    except CompileError as failure:
        return [d for d in failure.diagnostics if d.span.file == source.name]


def diagnostics(source: SourceFile) -> list[types.Diagnostic]:
    """All diagnostics, with notes and hints in the message."""
    out = []
    for d in found(source):
        lines = [d.message, *d.notes, *(f"hint: {h}" for h in d.hints)]
        out.append(types.Diagnostic(range_of(source, d.span), "\n".join(lines), severity=SEVERITY[d.severity],
                                    code=d.code, source="chunkc"))  # fmt: skip
    return out


def hover(source: SourceFile, line: int, column: int) -> str:
    """What the word at a place is, as Markdown: a function, a tensor, an axis, a state; empty where it is not known."""
    text = source.line(line + 1)
    word = next((m[0] for m in re.finditer(r"[A-Za-z]\w*", text) if m.start() <= column <= m.end()), "")
    if word in prelude.FUNCTIONS:
        return f"`{word}`: {prelude.FUNCTIONS[word].doc}"
    offset = _offset(source, line, column)
    if word in SETTINGS and _schedule_before(source, offset) is not None:
        return f"`{word}`: {SETTINGS[word]}"
    try:
        compiled = compile_source(source)
    except CompileError:
        return ""
    before = [u for u in compiled.checked.module.units if u.span.start <= offset]
    if not word or not before:
        return ""
    unit = before[-1]
    about = next(f for f in facts(compiled) if f["unit"] == unit.name)
    return _axis(unit, word) or _state(about, word) or _tensor(unit, word)


def _offset(source: SourceFile, line: int, column: int) -> int:
    return sum(len(x) + 1 for x in source.text.split("\n")[:line]) + column


def _schedule_before(source: SourceFile, offset: int) -> str | None:
    """What stands before a place in the schedule around it; None where there is none."""
    text = re.sub(r'"[^"\n]*"|#[^\n]*', " ", source.text[:offset])
    found = re.search(r"\bschedule\s*\{([^{}]*)$", text)
    return None if found is None else found[1]


def completions(source: SourceFile, line: int, column: int) -> list[tuple[str, str]]:
    """Words that may stand at a place, each with what it is: in a schedule its settings and their values, elsewhere the
    keywords and functions of the language. What is there of the word already is the editor's to match."""
    inside = _schedule_before(source, _offset(source, line, column))
    if inside is None:
        words = sorted(t.pattern.value for t in grammar().terminals if t.pattern.value.isalpha())
        return [*((w, "keyword") for w in words), *((f.name, f.doc) for f in prelude.FUNCTIONS.values())]
    if re.search(r"=\s*\w*$", inside):
        return [(value, "") for value in TRUTHS]
    return [(name, doc) for name, doc in SETTINGS.items() if not re.search(rf"\b{name}\s*=", inside)]


def _axis(unit: Unit, word: str) -> str:
    axis = unit.graph.axis.get(word)
    if axis is None:
        return ""
    if axis.size is not None:
        return f"axis `{word}` of size {axis.size.text()}" + (f", groups of {axis.parent}" if axis.parent else "")
    return f"axis `{word}`: {axis.kind}" + (f", a second name of {axis.space}" if axis.space != word else "")


def _state(about: dict[str, object], word: str) -> str:
    for r in about["recurrences"]:  # type: ignore[attr-defined]
        if word in r["states"]:
            axes = next(s["axes"] for s in r["state"] if s["name"] == word)
            how = f"sequential: {r['reason']}" if r["form"] == "sequential" else (
                f"chunk form, {r['transition']['structure']}, gate {r['numerics']['gate']}")  # fmt: skip
            return f"state `{word}[{', '.join(axes)}]`: {how}"
    return ""


def _tensor(unit: Unit, word: str) -> str:
    graph = unit.graph
    node = next((n for n in graph.nodes if word in (n.id, getattr(n, "name", ""))), None)
    if node is None or isinstance(node, N.Recur):
        return ""
    low, high = Ranges(graph.by_id)[node.id] if node.dtype != "bool" else REALS
    within = f", in [{low:g}, {high:g}]" if (low, high) != REALS else ""
    what = {"input": "input ", "param": "param ", "attend": "attention "}.get(node.kind, "")
    ahead = ", looks ahead" if word in unit.looks_ahead else ""
    return f"{what}`{word}[{', '.join(node.axes)}]`: {node.dtype}{within}{ahead}"


def make_server() -> LanguageServer:
    """The server, with what it answers to."""
    server = LanguageServer("chunkc", __version__)

    def publish(uri: str) -> None:
        text = server.workspace.get_text_document(uri).source
        report = types.PublishDiagnosticsParams(uri, diagnostics(source_of(uri, text)))
        server.text_document_publish_diagnostics(report)

    @server.feature(types.TEXT_DOCUMENT_DID_OPEN)
    def opened(params: types.DidOpenTextDocumentParams) -> None:
        publish(params.text_document.uri)

    @server.feature(types.TEXT_DOCUMENT_DID_CHANGE)
    def changed(params: types.DidChangeTextDocumentParams) -> None:
        publish(params.text_document.uri)

    @server.feature(types.TEXT_DOCUMENT_HOVER)
    def hovered(params: types.HoverParams) -> types.Hover | None:
        uri, at = params.text_document.uri, params.position
        text = hover(source_of(uri, server.workspace.get_text_document(uri).source), at.line, at.character)
        return types.Hover(types.MarkupContent(types.MarkupKind.Markdown, text)) if text else None

    @server.feature(types.TEXT_DOCUMENT_COMPLETION)
    def completed(params: types.CompletionParams) -> list[types.CompletionItem]:
        uri, at = params.text_document.uri, params.position
        source = source_of(uri, server.workspace.get_text_document(uri).source)
        found = completions(source, at.line, at.character)
        return [types.CompletionItem(word, detail=what or None) for word, what in found]

    @server.feature(types.TEXT_DOCUMENT_FORMATTING)
    def formatted(params: types.DocumentFormattingParams) -> list[types.TextEdit] | None:
        document = server.workspace.get_text_document(params.text_document.uri)
        try:
            new = format_source(source_of(document.uri, document.source))
        except (CompileError, FormatError):
            return None
        whole = types.Range(types.Position(0, 0), types.Position(len(document.lines) + 1, 0))
        return [types.TextEdit(whole, new)]

    return server
