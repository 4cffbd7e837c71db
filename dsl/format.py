"""The one layout of a spec: the same tokens and comments on the same lines, with even spaces.

It works on tokens, so that comments and line breaks stay, and proves each result by parsing it again."""

from __future__ import annotations

from dataclasses import dataclass, field

from lark import Token

from chunkc.dsl.parser import parse, tokens
from chunkc.dsl.tables import grammar
from chunkc.ir.diagnostics import SourceFile

INDENT = "  "
OPENERS = frozenset(("LPAR", "LSQB", "LBRACE"))
CLOSERS = frozenset(("RPAR", "RSQB", "RBRACE"))
OPERANDS = frozenset(("NAME", "NUMBER", "RPAR", "RSQB"))  # a minus behind one of these takes two operands


class FormatError(AssertionError):
    """The formatter changed what the text says: a defect of the formatter."""


@dataclass
class _Line:
    """One line of the text: its tokens, and the comment at its end."""

    tokens: list[Token] = field(default_factory=list)
    comment: str = ""


def format_source(source: SourceFile) -> str:
    """The text in the one layout; formatting it again changes nothing.

    Raises:
        CompileError: if the text does not parse.
        FormatError: if the result would say something else.
    """
    tree = parse(source)
    result = _laid_out(source)
    again = SourceFile(source.name, result)
    if parse(again) != tree or _said(again) != _said(source):
        raise FormatError(f"formatting changed what {source.name} says")
    if _laid_out(again) != result:
        raise FormatError(f"formatting {source.name} twice gives another text")
    return result


def _said(source: SourceFile) -> tuple[list[tuple[str, str]], list[str]]:
    """Tokens and comments: what a layout must keep."""
    said = [(t.type, "" if t.type == "_NL" else str(t)) for t in tokens(source)]
    first = bool(said) and said[0][0] == "_NL"  # newlines around the whole text are layout
    last = len(said) - (len(said) > first and said[-1][0] == "_NL")
    return said[first:last], [line.comment for line in _lines(source.text) if line.comment]


def _lines(text: str) -> list[_Line]:
    """The lines with their tokens. Only comments and blanks stand between tokens, so a `#` there starts a comment."""
    lines, at = [_Line()], 0
    for token in grammar().lex(text):
        assert token.start_pos is not None and token.end_pos is not None
        lines[-1].comment = text[at : token.start_pos].strip() or lines[-1].comment
        at = token.end_pos
        if token.type == "_NL":
            lines.extend(_Line() for _ in token)
        else:
            lines[-1].tokens.append(token)
    lines[-1].comment = text[at:].strip() or lines[-1].comment
    return lines


def _laid_out(source: SourceFile) -> str:
    ends = {t.start_pos for t in tokens(source) if t.type == "_NL"}  # newlines that end a statement
    out: list[str] = []
    opened: list[str] = []  # brackets open so far; for a brace, the word before it
    last: Token | None = None
    ended = True
    for line in _lines(source.text):
        level = _level(line, opened, last, ended)
        body, last = _spaced(line.tokens, opened, last)
        text = "  ".join(part for part in (body, line.comment) if part)
        if text or (out and out[-1]):
            out.append(INDENT * level + text if text else "")
        if line.tokens:
            ended = source.text.find("\n", line.tokens[-1].end_pos) in ends
    while out and not out[-1]:
        out.pop()
    return "\n".join(out) + "\n" if out else ""


def _level(line: _Line, opened: list[str], last: Token | None, ended: bool) -> int:
    """Steps of indentation: one a brace, and one where the line goes on with a statement or stands in brackets."""
    depth = sum(b not in ("LPAR", "LSQB") for b in opened)
    left = list(opened)
    for token in line.tokens:
        if token.type not in CLOSERS or not left:
            break
        depth -= left.pop() not in ("LPAR", "LSQB")
    inside = bool(left) and left[-1] in ("LPAR", "LSQB")
    closes = len(left) < len(opened)
    listed = bool(opened) and opened[-1] in ("AXES", "SCHEDULE")  # these stand below each other
    return depth + (inside or not (ended or closes or listed or last is None or last.type == "LBRACE"))


def _spaced(line: list[Token], opened: list[str], last: Token | None) -> tuple[str, Token | None]:
    """The tokens of a line with even spaces; follows the brackets. `last` is the token before, on whatever line."""
    text, unary = "", False
    for index, token in enumerate(line):
        if index and _space(last, token, unary):
            text += " "
        text += token
        unary = token.type == "MINUS" and (last is None or last.type not in OPERANDS)
        if token.type in OPENERS:
            word = last.type if last is not None else ""
            opened.append(token.type if token.type != "LBRACE" else word)
        elif token.type in CLOSERS and opened:
            opened.pop()
        last = token
    return text, last


def _space(last: Token | None, token: Token, unary: bool) -> bool:
    """Whether a space stands between two tokens of a line; `unary` if the first is a sign."""
    assert last is not None
    if last.type == "LBRACE" and token.type == "RBRACE":
        return False
    if last.type == "ARROW":
        return True  # before a bracket too: linear[m -> ](x)
    if unary or last.type in ("LPAR", "LSQB", "CARET") or token.type in ("RPAR", "RSQB", "CARET", "COMMA", "COLON"):
        return False
    return not (token.type in ("LPAR", "LSQB") and last.type in ("NAME", "NUMBER", "RPAR", "RSQB"))
