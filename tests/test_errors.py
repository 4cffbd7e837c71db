"""The pages about diagnostics: one for each code, with a spec that gives it and one that mends it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from chunkc.driver import check_source, compile_source
from chunkc.dsl.format import format_source
from chunkc.ir import nodes as N
from chunkc.ir.diagnostics import MAX_BYTES, CompileError, SourceFile

ROOT = Path(__file__).resolve().parent.parent
PAGES = {p.stem: p.read_text(encoding="utf-8") for p in sorted((ROOT / "docs" / "errors").glob("*.md"))}
CODE = re.compile(r"[a-z]+(-[a-z]+)*")
# what causes these is outside the text: the file itself, or what a build is asked for
NO_TEXT = {"cannot-read", "unknown-target", "open-parameter", "no-compiler", "cannot-compile", "kernel-too-large",
           "bad-tuning", "stale-tuning"}  # fmt: skip
IN_TEXT = sorted(PAGES.keys() - NO_TEXT)
BUILD = {
    "gate-may-grow",
    "not-sharded",
    "kernel-too-large",
    "bad-tuning",
    "stale-tuning",
}  # found when a layer is brought to its normal form, or compiled


def raised(path: Path) -> Iterator[str]:
    """Codes in calls of `error`, `warning` and `whole`, and in assignments to `code`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            parts = {"error": node.args[:1], "warning": node.args[:1], "whole": node.args[2:3]}.get(name, [])
        elif isinstance(node, ast.Assign) and [getattr(t, "id", "") for t in node.targets] == ["code"]:
            parts = [node.value]
        else:
            continue
        for part in parts:
            values = [part.body, part.orelse] if isinstance(part, ast.IfExp) else [part]
            for value in values:
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    assert CODE.fullmatch(value.value), value.value
                    yield value.value


CODES = {
    code for folder in ("dsl", "ir", "compiler/ahead") for path in (ROOT / folder).glob("*.py") for code in raised(path)
}


def blocks(page: str, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", page, re.M | re.S)


def found(text: str) -> list[str]:
    """The codes that a text gives, by the build's reasons too."""
    source = SourceFile("page.spec", text)
    try:
        codes = [d.code for d in check_source(source).warnings]
        units = compile_source(source).units
    except CompileError as failure:
        return [d.code for d in failure.diagnostics]
    reasons = [n.reason for u in units for n in u.graph.of_kind(N.Recur)]
    return codes or ["gate-may-grow" for reason in reasons if "may grow" in reason]


def test_every_code_has_a_page_and_every_page_a_code() -> None:
    assert set(PAGES) == CODES | BUILD
    assert len(CODES) > 30


@pytest.mark.parametrize("code", PAGES)
def test_a_page_has_its_parts(code: str) -> None:
    kind = "sh" if code in NO_TEXT else "spec"
    title, rest = PAGES[code].split("\n", 1)
    bad, good = blocks(PAGES[code], kind)
    assert title == f"# {code}"
    assert len(rest.split("```")[0].strip()) > 40
    assert re.match(rf"# (error|warning): \[{code}\]\n", bad) and good.startswith("# ok\n")


@pytest.mark.parametrize("code", IN_TEXT)
def test_a_page_is_right(code: str) -> None:
    bad, good = blocks(PAGES[code], "spec")
    assert found(bad) == [code]
    assert found(good) == []
    assert format_source(SourceFile("page.spec", good)) == good


def test_what_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.spec").write_bytes(b"layer \xe9")
    (tmp_path / "large.spec").write_bytes(b" " * (MAX_BYTES + 1))
    codes = {"none.spec": "cannot-read", ".": "cannot-read", "latin.spec": "cannot-read", "large.spec": "too-large"}
    for name, code in codes.items():
        with pytest.raises(CompileError) as caught:
            SourceFile.read(tmp_path / name)
        assert [d.code for d in caught.value.diagnostics] == [code]
