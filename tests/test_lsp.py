"""The language server: what it says of a text, and that it answers an editor."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import cases
import pytest
from lsprotocol import types
from pygls.lsp.client import LanguageClient
from test_cli import environment

from chunkc.lsp import completions, diagnostics, hover, source_of

GOOD = cases.PLAIN.replace("op gated", "op f")
BAD = "op f {\n  axes { t: time }\n  input x[t]  # ü🙂\n  output y = x + z\n}\n"
URI = "file:///nowhere/f.spec"


def test_diagnostics() -> None:
    assert diagnostics(source_of(URI, GOOD)) == []
    (only,) = diagnostics(source_of(URI, BAD))
    assert (only.code, only.range.start.line, only.range.start.character) == ("unknown-name", 3, 17)
    assert only.severity == types.DiagnosticSeverity.Error
    wide = BAD.replace("input x[t]  # ü🙂", '"🙂" input')
    assert all(d.range.end.character >= d.range.start.character for d in diagnostics(source_of(URI, wide)))


@pytest.mark.parametrize("line, column, wanted", [
    (2, 8, "input `q[t, h, i]`: float"),
    (2, 44, "input `g[t, h, i]`: float, in [-inf, 0]"),
    (4, 10, "state `S[h, i, j]`: chunk form, by i, gate log-gate at most 0"),
    (5, 9, "`exp`: e to the x"),
    (1, 18, "axis `h` of size heads"),
    (1, 9, "axis `t`: time"),
    (6, 4, "`o[t, h, j]`: float"),
    (7, 0, ""),
])  # fmt: skip
def test_hover(line: int, column: int, wanted: str) -> None:
    assert hover(source_of(URI, GOOD), line, column) == wanted


def test_hover_in_a_broken_text_says_nothing() -> None:
    assert hover(source_of(URI, BAD), 2, 8) == ""


SCHEDULED = GOOD.replace("  recurrence", "  # schedule {\n  schedule {\n    prefix_invariant = true\n  }\n  recurrence")


def test_completion() -> None:
    at = SCHEDULED.split("\n").index("    prefix_invariant = true")

    def words(text: str, line: int, column: int) -> list[str]:
        return [word for word, _ in completions(source_of(URI, text), line, column)]

    assert words(SCHEDULED, at, 4) == ["prefix_invariant"]
    assert words(SCHEDULED, at, len("    prefix_inv")) == ["prefix_invariant"]
    assert words(SCHEDULED, at, len("    prefix_invariant = tr")) == ["true", "false"]
    assert words(SCHEDULED, at + 1, 2) == []  # it is set already
    assert words(SCHEDULED, at + 2, 0) == words(SCHEDULED, at - 1, 0)  # outside, and behind the comment
    assert {"recurrence", "schedule", "softmax", "logsigmoid"} <= set(words(SCHEDULED, at + 2, 0))
    hovered = hover(source_of(URI, SCHEDULED), at, 6)
    assert hovered.startswith("`prefix_invariant`: cutting a sequence short")


def test_an_editor_is_served(tmp_path: Path) -> None:
    """Over stdin and stdout: a text with an error, the text mended, a hover, formatting."""
    uri, seen = (tmp_path / "f.spec").as_uri(), []

    async def session() -> None:
        client = LanguageClient("test", "1")
        arrived = asyncio.Event()

        @client.feature(types.TEXT_DOCUMENT_PUBLISH_DIAGNOSTICS)
        def published(params: types.PublishDiagnosticsParams) -> None:
            seen.append([d.code for d in params.diagnostics])
            arrived.set()

        await client.start_io(sys.executable, "-m", "chunkc", "lsp", env=environment())
        await client.initialize_async(types.InitializeParams(capabilities=types.ClientCapabilities()))
        document = types.TextDocumentItem(uri, "chunkc", 1, BAD)
        client.text_document_did_open(types.DidOpenTextDocumentParams(document))
        await arrived.wait()
        arrived.clear()
        version = types.VersionedTextDocumentIdentifier(uri=uri, version=2)
        whole = types.TextDocumentContentChangeWholeDocument(text=GOOD.replace("  output", "output"))
        client.text_document_did_change(types.DidChangeTextDocumentParams(version, [whole]))
        await arrived.wait()
        identifier = types.TextDocumentIdentifier(uri)
        answer = await client.text_document_hover_async(types.HoverParams(identifier, types.Position(4, 10)))
        assert answer is not None and "chunk form" in answer.contents.value  # type: ignore[union-attr]
        place = types.CompletionParams(identifier, types.Position(5, 4))
        offered = await client.text_document_completion_async(place)
        assert isinstance(offered, list) and "sigmoid" in [item.label for item in offered]
        options = types.FormattingOptions(tab_size=2, insert_spaces=True)
        edits = await client.text_document_formatting_async(types.DocumentFormattingParams(identifier, options))
        assert edits is not None and edits[0].new_text == GOOD
        await client.shutdown_async(None)
        client.exit(None)
        await client.stop()

    asyncio.run(asyncio.wait_for(session(), 60))
    assert seen[:2] == [["unknown-name"], []]
