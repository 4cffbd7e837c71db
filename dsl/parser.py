"""Text to syntax tree: lexing, newline rules, the LALR parse, and recovery at the next statement.

A statement with a syntax error is blanked and the rest parsed again, so that one run reports every independent
error of the stage."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NoReturn

from lark import Token, Tree, UnexpectedCharacters, UnexpectedInput, UnexpectedToken, v_args
from lark.visitors import Transformer_NonRecursive

from chunkc.dsl import tree as T
from chunkc.dsl.tables import grammar
from chunkc.ir.diagnostics import MAX_BYTES, CompileError, Diagnostic, Report, SourceFile, Span, error

MAX_DEPTH = 200
MAX_TOKENS = 100_000
MAX_ERRORS = 20
MAX_REPARSED = 1 << 18  # characters that recovery may read again, so that large broken files stay quick
RESERVED = frozenset(("cache", "decode", "train", "objective", "data", "model", "extern"))
STARTERS = frozenset(("USE", "CAUSAL", "LAYER", "OP", "FN", "PARALLEL", "AXES", "INPUT", "OUTPUT", "STATE", "PARAM",
                      "RECURRENCE", "CHUNK", "ATTENTION", "ORDER", "PICK", "SCHEDULE"))  # fmt: skip
PAIRS = {"LPAR": "RPAR", "LSQB": "RSQB", "LBRACE": "RBRACE"}
CLAUSES = frozenset(("BY", "IF", "KEEP", "REFINE", "ALWAYS", "ALLOW"))
OPERATORS = frozenset(("PLUS", "MINUS", "STAR", "SLASH", "PERCENT", "CARET", "COMPARE", "OR", "AND", "IN", "ARROW"))
ENGLISH = {
    "NAME": "a name", "NUMBER": "a number", "STRING": "a string", "_NL": "a new line", "$END": "the end of the file",
    "COMPARE": "a comparison", "ARROW": "'->'", "EQUAL": "'='", "PLUS": "'+'", "MINUS": "'-'", "STAR": "'*'",
    "SLASH": "'/'", "PERCENT": "'%'", "CARET": "'^'", "COMMA": "','", "COLON": "':'", "LPAR": "'('", "RPAR": "')'",
    "LSQB": "'['", "RSQB": "']'", "LBRACE": "'{'", "RBRACE": "'}'",
}  # fmt: skip


def english(terminal: str) -> str:
    """A terminal's name as a reader of diagnostics knows it; keywords stand for themselves."""
    return ENGLISH.get(terminal, f"'{terminal.lower()}'")


def tokens(source: SourceFile) -> list[Token]:
    """The tokens of the text, newlines dropped where a statement goes on.

    Raises:
        CompileError: at a character that starts no token, or beyond the limits on nesting, tokens and numbers.
    """
    return list(_join_lines(grammar().lex(source.text), source))


def _join_lines(stream: Iterator[Token], source: SourceFile) -> Iterator[Token]:
    """Drop newlines inside ( ) and [ ], after a comma, `=` or an operator, and before an operator or clause word."""
    opened: list[str] = []
    last: Token | None = None
    newline: Token | None = None
    for count, token in enumerate(stream):
        if count >= MAX_TOKENS:
            raise CompileError([error("too-large", f"the file has over {MAX_TOKENS} tokens", _span(source, token))])
        if token.type == "_NL":
            newline = newline or token
            continue
        if token.type == "NUMBER" and (len(token) > 400 or math.isinf(float(token))):
            raise CompileError([error("too-large", "this number is too large", _span(source, token))])
        if newline is not None:
            inside = bool(opened) and opened[-1] != "LBRACE"
            after = last is not None and last.type in OPERATORS | {"COMMA", "EQUAL", "NOT"}
            before = token.type in (OPERATORS - {"MINUS"}) | CLAUSES
            closing = token.type == "RBRACE"  # what went before is a statement that broke off
            if closing or not (inside or after or before):
                yield newline
            newline = None
        if token.type in ("LPAR", "LSQB", "LBRACE"):
            opened.append(token.type)
            if len(opened) > MAX_DEPTH:
                raise CompileError([error("too-large", "nesting is deeper than 200 levels", _span(source, token))])
        elif token.type in ("RPAR", "RSQB", "RBRACE") and opened:
            opened.pop()
        yield token
        last = token
    if newline is not None:
        yield newline


def _span(source: SourceFile, token: Token) -> Span:
    start = token.start_pos if token.start_pos is not None else len(source.text)
    end = token.end_pos if token.end_pos is not None else start
    return Span(source.name, start, end)


def parse(source: SourceFile) -> T.File:
    """The syntax tree.

    Raises:
        CompileError: with every independent syntax error.
    """
    file, found, _ = parse_partial(source)
    if found:
        raise CompileError(found)
    return file


def parse_partial(source: SourceFile) -> tuple[T.File, list[Diagnostic], str]:
    """The tree of what could be parsed, the syntax errors, and the text of the statements left out."""
    if len(source.text.encode("utf-8", "replace")) > MAX_BYTES:
        raise CompileError([error("too-large", f"'{source.name}' is over 1 MiB", Span(source.name, 0, 0))])
    report = Report()
    text, masked = source.text, _masked(source.text)
    dropped: list[str] = []
    tries = min(MAX_ERRORS, 1 + MAX_REPARSED // max(len(text), 1))
    for _ in range(tries):
        current = SourceFile(source.name, text)
        try:
            return _parse_once(current), report.found, "\n".join(dropped)
        except CompileError as failure:
            for diagnostic in failure.diagnostics:
                report.add(diagnostic)
            at = failure.diagnostics[0].span.start
            if failure.diagnostics[0].code == "too-large" or not text[at:].strip():
                break  # nothing can be judged behind it
            start, end = _statement_around(masked, at)
            if not text[start:end].strip():
                break
            dropped.append(text[start:end])
            text = text[:start] + "".join(c if c == "\n" else " " for c in text[start:end]) + text[end:]
    return T.File(Span(source.name, 0, 0), ()), report.found, source.text


def _masked(text: str) -> str:
    """The text with strings and comments blanked: what is left are the brackets that count."""
    return re.sub(r'"[^"\n]*"|#[^\n]*', lambda m: " " * len(m[0]), text)


def _statement_around(text: str, at: int) -> tuple[int, int]:
    """The line of the offset, on to the line at which the brackets it opens are closed."""
    at = min(at, max(len(text) - 1, 0))
    start = text.rfind("\n", 0, at) + 1
    opened: list[str] = []
    for mark in re.compile(r"[][(){}\n]").finditer(text, start):
        if mark[0] in "([{":
            opened.append(mark[0])
        elif mark[0] == "\n":
            if not opened:
                return start, mark.start()
        elif opened and opened.pop() + mark[0] not in ("()", "[]", "{}"):
            break
    end = text.find("\n", at)  # never closed, or the last line: only this line
    return start, len(text) if end < 0 else end


def _parse_once(source: SourceFile) -> T.File:
    stream: list[Token] = []
    try:
        stream = tokens(source)
        interactive = grammar().parse_interactive("")
        for token in stream:
            interactive.feed_token(token)
        last = stream[-1] if stream else Token("_NL", "", start_pos=0, end_pos=0)
        end = Token.new_borrow_pos("$END", "", last)
        raw = interactive.feed_token(end)
    except UnexpectedInput as failure:
        _explain(failure, source, stream)
    _bound_depth(raw, source)
    builder = _Builder(source)
    result = builder.transform(raw)
    assert isinstance(result, T.File)
    if builder.bad_names:
        raise CompileError(builder.bad_names)
    return result


def _bound_depth(raw: Any, source: SourceFile) -> None:
    """Refuse expressions nested deeper than the limit, by operators too: what reads the tree is recursive."""
    stack: list[tuple[Any, int]] = [(raw, 0)]
    while stack:
        part, depth = stack.pop()
        if isinstance(part, Tree):
            if part.data == "block":
                depth = 0
            elif part.data in ("binary", "unary", "index", "call"):
                depth += 1
            if depth > MAX_DEPTH:
                first: Any = part
                while isinstance(first, Tree):
                    first = next(child for child in first.children if child is not None)
                raise CompileError([error("too-large", f"this expression has over {MAX_DEPTH} levels",
                                          _span(source, first), hints=("give parts of it names",))])  # fmt: skip
            stack.extend((child, depth) for child in part.children)


def _explain(failure: UnexpectedInput, source: SourceFile, stream: list[Token]) -> NoReturn:
    if isinstance(failure, UnexpectedCharacters):
        at = failure.pos_in_stream or 0
        char = source.text[at]
        span = Span(source.name, at, at + 1)
        hint = {
            '"': "close the string on the same line", "@": "sum[i](a * b) contracts axis i",
            "&": "write 'and'", "|": "write 'or'", "!": "write 'not'", "'": 'strings stand between "',
        }.get(char)  # fmt: skip
        raise CompileError(
            [error("bad-character", f"{char!r} starts no token", span, hints=(hint,) if hint else ())]
        ) from None
    assert isinstance(failure, UnexpectedToken)
    token = failure.token
    span = _span(source, token)
    accepted = sorted(failure.accepts or failure.expected)
    at = len(source.text) if token.type == "$END" else span.start
    before = [t for t in stream if t.type != "_NL" and _span(source, t).end <= at]
    starts = not source.text[source.text.rfind("\n", 0, at) + 1 : at].strip()
    if (opener := _unclosed(before, stream)) is not None:
        raise CompileError([error("syntax", f"this '{opener}' is never closed", _span(source, opener),
                                  related=((span, "it is still open here"),))]) from None  # fmt: skip
    kind = "_NL" if starts and token.type in STARTERS and "NAME" in accepted else token.type
    if kind in ("$END", "_NL"):  # more was expected: behind what stands there, or its last character
        end = _span(source, before[-1]).end if before else 0
        span = Span(source.name, end if kind == "$END" else max(end - 1, 0), end)
    if kind in ("EQUAL", "LSQB") and before and before[-1].type not in ENGLISH:
        raise CompileError([error("reserved-word", f"'{before[-1]}' is a keyword", _span(source, before[-1]),
                                  hints=("choose another name",))]) from None  # fmt: skip
    names = [english(a) for a in accepted if a in ENGLISH or len(accepted) < 8]
    hints: tuple[str, ...] = ()
    keyword = kind not in ENGLISH and token.isidentifier()
    if keyword and "NAME" in accepted:
        hints = (f"'{token}' is a keyword: choose another name",)
    elif names:
        hints = (f"expected {' or '.join([', '.join(names[:-1])] * (len(names) > 1) + names[-1:])}",)
    what = english(kind) if kind in ("$END", "_NL") else f"'{token[:64]}'"
    code = "reserved-word" if keyword and "NAME" in accepted else "syntax"
    raise CompileError([error(code, f"{what} cannot stand here", span, hints=hints)]) from None


def _unclosed(before: list[Token], stream: list[Token]) -> Token | None:
    """The round or square bracket that is open behind these tokens, if nothing in the whole text closes it."""
    opened: list[Token] = []
    for token in before:
        if token.type in PAIRS:
            opened.append(token)
        elif token.type in PAIRS.values() and opened:
            opened.pop()
    if not opened or opened[-1].type == "LBRACE":
        return None
    inner: list[str] = []
    for token in stream:
        if (token.start_pos or 0) < (opened[-1].start_pos or 0):
            continue
        if token.type in PAIRS:
            inner.append(PAIRS[token.type])
        elif token.type in PAIRS.values():
            if inner.pop() != token.type:
                break
            if not inner:
                return None
    return opened[-1]


class _Names(tuple[T.Name, ...]):
    """Names between brackets, with the span of the brackets."""

    span: Span


@v_args(inline=True)
class _Builder(Transformer_NonRecursive[Token, Any]):
    """Parse tree to syntax tree. Spans run from the first to the last token below a rule."""

    def __init__(self, source: SourceFile) -> None:
        super().__init__()
        self.source = source
        self.bad_names: list[Diagnostic] = []

    def _cover(self, parts: Any) -> Span:
        spans = [s for p in parts for s in self._spans(p)]
        if not spans:
            return Span(self.source.name, 0, 0)
        return spans[0].to(spans[-1])

    def _spans(self, part: Any) -> list[Span]:
        if isinstance(part, Token):
            return [_span(self.source, part)]
        if isinstance(part, T.Syntax | _Names):
            return [part.span]
        if isinstance(part, tuple | list):
            return [s for p in part for s in self._spans(p)]
        return []

    def _name(self, token: Token) -> T.Name:
        span = _span(self.source, token)
        if token in RESERVED:
            self.bad_names.append(error("reserved-word", f"'{token}' is a word kept for later use", span))
        if token.startswith("_"):
            self.bad_names.append(error("bad-name", f"'{token[:64]}': a name does not start with '_'", span))
        return T.Name(span, str(token))

    # items
    def start(self, *items: Any) -> T.File:
        return T.File(Span(self.source.name, 0, len(self.source.text)), tuple(i for i in items if i is not None))

    def use(self, word: Token, path: Token) -> T.Use:
        return T.Use(self._cover((word, path)), str(path)[1:-1])

    def causal(self, word: Token | None = None) -> Token | None:
        return word

    def unit(self, causal: Any, kind: Token, name: Token, params: Any, body: Any) -> T.UnitDecl:
        span = self._cover((causal, kind, name))
        return T.UnitDecl(span, str(kind), causal is not None, self._name(name), params, body[1])  # type: ignore[arg-type]

    def fn(self, word: Token, name: Token, axes: Any, params: Any, *rest: Any) -> T.FnDecl:
        if isinstance(rest[0], Token):  # = expr
            value = rest[1]
            out = T.Bind(value.span, T.Name(value.span, ""), None, None, None, value)
            body: Any = (T.Declare(value.span, "output", (out,)),)
        else:
            body = rest[0][1]
        return T.FnDecl(self._cover((word, name)), self._name(name), axes, params, body)

    def params(self, *parts: Any) -> tuple[T.Parameter, ...]:
        return tuple(p for p in parts if isinstance(p, T.Parameter))

    formals = params

    def formal(self, name: Token, *rest: Any) -> T.Parameter:
        colon, type_, equal, default = rest
        del colon, equal
        return T.Parameter(self._cover((name, *rest)), self._name(name), self._name(type_) if type_ else None, default)

    def block(self, *parts: Any) -> tuple[Span, tuple[Any, ...]]:
        return self._cover(parts), tuple(p for p in parts if p is not None and not isinstance(p, Token))

    def setting_block(self, *parts: Any) -> tuple[T.Setting, ...]:
        return tuple(p for p in parts if isinstance(p, T.Setting))

    def setting(self, *parts: Any) -> T.Setting:
        inner = next((p for p in parts if isinstance(p, tuple)), None)
        words = tuple(T.Name(_span(self.source, p), str(p)) for p in parts if isinstance(p, Token))
        return T.Setting(self._cover(words), words, inner)

    def parallel(self, word: Token, settings: Any) -> T.Parallel:
        return T.Parallel(_span(self.source, word), settings)

    def later(self, word: Token, name: Token, *rest: Any) -> T.Later:
        return T.Later(_span(self.source, word), str(word), (self._name(name),))

    # statements
    def doc(self, text: Token) -> T.Doc:
        return T.Doc(_span(self.source, text), str(text)[1:-1])

    def axes(self, word: Token, *parts: Any) -> T.Axes:
        return T.Axes(self._cover((word, parts)), tuple(p for p in parts if isinstance(p, T.AxisDecl)))

    def axis_kind(self, name: Token, colon: Token, kind: Token) -> T.AxisDecl:
        return T.AxisDecl(self._cover((name, kind)), self._name(name), self._name(kind), None, None)

    def axis_size(self, name: Token, equal: Token, size: Any, word: Token | None, of: Token | None) -> T.AxisDecl:
        groups = self._name(of) if of else None
        return T.AxisDecl(self._cover((name, size, of)), self._name(name), None, size, groups)

    def declare(self, what: Token, *parts: Any) -> T.Declare:
        binds = tuple(p for p in parts if isinstance(p, T.Bind))
        return T.Declare(self._cover((what, parts)), str(what), binds)  # type: ignore[arg-type]

    def bind(self, name: Token, axes: Any, *rest: Any) -> T.Bind:
        colon, type_, in_, lsqb, low, comma, high, rsqb, equal, value = rest
        range_ = (low, high) if low is not None else None
        return T.Bind(
            self._cover((name, axes, rest)), self._name(name), axes, self._name(type_) if type_ else None, range_, value
        )

    def define(self, name: Token, axes: Any, equal: Token, value: Any) -> T.Define:
        return T.Define(self._cover((name, value)), self._name(name), axes, value)

    def recurrence(self, word: Token, over: Token, axis: Token, within: Any, chunk: Any, body: Any) -> T.Recurrence:
        inside = self._name(chunk) if chunk else None
        return T.Recurrence(self._cover((word, over, axis, chunk)), self._name(axis), inside, body[1])

    def attention(self, word: Token, name: Token, axes: Any, over: Any, axis: Any, body: Any) -> T.Attention:
        span = self._cover((word, name, axes, over, axis))
        inner = body[1] if axis is None else (T.Source(self._cover((over, axis)), self._name(axis), body[1]),)
        return T.Attention(span, self._name(name), axes, inner)

    def rows(self, word: Token, *rest: Any) -> T.Source:
        axis = rest[0] if len(rest) > 1 else None
        return T.Source(self._cover((word, axis)), self._name(axis) if axis else None, rest[-1][1])

    def chunk(self, word: Token, name: Token, of: Token, axis: Token, equal: Token, rule: Any) -> T.Chunk:
        return T.Chunk(self._cover((word, rule)), self._name(name), self._name(axis), rule)

    def schedule(self, word: Token, *parts: Any) -> T.Schedule:
        return T.Schedule(_span(self.source, word), tuple(p for p in parts if isinstance(p, T.Pin)))

    def pin(self, name: Token, equal: Token, value: Any) -> T.Pin:
        return T.Pin(self._cover((name, value)), self._name(name), value)

    def names(self, *parts: Token) -> _Names:
        names = _Names(self._name(p) for p in parts if p.type == "NAME")
        names.span = self._cover(parts)
        return names

    # expressions
    def binary(self, left: Any, op: Token, right: Any) -> T.Binary:
        return T.Binary(self._cover((left, right)), str(op), left, right)

    def unary(self, op: Token, arg: Any) -> T.Unary:
        return T.Unary(self._cover((op, arg)), str(op), arg)

    def number(self, token: Token) -> T.NumberLit:
        return T.NumberLit(_span(self.source, token), str(token))

    def name(self, token: Token) -> T.Name:
        return self._name(token)

    def paren(self, left: Token, inner: Any, right: Token) -> Any:
        return replace(inner, span=self._cover((left, right)))

    def arrow(self, arrow: Token, *names: Any) -> tuple[T.Name, ...]:
        return tuple(self._name(n) for n in names if n is not None and n.type == "NAME")

    def index(self, base: Any, *parts: Any) -> T.Index:
        to = next((p for p in parts if isinstance(p, tuple)), None)
        return T.Index(self._cover((base, parts)), base, tuple(p for p in parts if isinstance(p, T.Ix)), to)

    def ix_axis(self, name: Token, in_: Any, within: Any, if_: Any, cond: Any) -> T.Ix:
        inside = self._name(within) if within else None
        return T.Ix(self._cover((name, within, cond)), self._name(name), inside, cond, None)

    def ix_at(self, name: Token, equal: Token, at: Any) -> T.Ix:
        return T.Ix(self._cover((name, at)), self._name(name), None, None, at)

    def call(self, fn: Any, *parts: Any) -> T.CallExpr:
        return T.CallExpr(self._cover((fn, parts)), fn, tuple(p for p in parts if isinstance(p, T.Arg)))

    def arg_value(self, value: Any) -> T.Arg:
        return T.Arg(value.span, None, value)

    def arg_named(self, name: Token, equal: Token, value: Any) -> T.Arg:
        return T.Arg(self._cover((name, value)), self._name(name), value)
