"""Graphs as text that people read and that parses back to an equal graph.

A graph is its level, its axes, a node a line, and its outputs:

    graph semantic {
      axis t: time
      axis i: size size=<d_model / heads>
      %q: float[t, i] = input name=q @gla.spec:10-20
      %*_4: float[t, i] = map fn="*" args=(%q, %q)
      output y = %*_4
    }

A unit is `layer` or `op`, its name and its other fields, the graph last. Fields with their default value are left out.
A region is a graph inside a field; written `region`, it has the axes of the graph around it. The sign % marks ids for
the reader; to the parser an id is a string like any other."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from chunkc.ir import nodes as N
from chunkc.ir.axes import Axis, Size
from chunkc.ir.diagnostics import Span
from chunkc.ir.graph import Graph, Unit

M = TypeVar("M", bound=BaseModel)
KINDS: dict[str, type[N.Node]] = {c.model_fields["kind"].default: c for c in get_args(get_args(N.AnyNode)[0])}
ID_FIELDS = ("arg", "args", "index", "weight", "bias", "add", "initial", "outer", "result", "left",
             "right", "a", "b", "decay", "update", "totals", "value", "scan", "adjoint", "logit", "mask",
             "reads", "replaces")  # fmt: skip
CONSTANTS: dict[str, bool | None] = {"true": True, "false": False, "null": None}
RESERVED = (*CONSTANTS, "inf", "nan", "graph", "region")
INFIX = ("+", "-", "*", "/", "%", "^")

_WORD = r"[^\W\d]\w*"
_ID = r"[\w.*/+-]+"
_FILE = r"[\w./-]+"
_STRING = r'"(?:[^"\\\x00-\x1f]|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*"'
_TOKEN = re.compile(
    rf"""(?P<id>%(?:{_STRING}|{_ID})) | (?P<span>@(?:{_STRING}|{_FILE}):-?\d+--?\d+)
    | (?P<number>-?(?:inf|nan|\d{{1,4300}}(?:\.\d+)?(?:e[+-]?\d+)?)(?!\w)) | (?P<string>{_STRING}) | (?P<word>{_WORD})
    | (?P<sign>[][{{}}()<>=:,+*/%^-]) | (?P<space>\s+) | (?P<bad>.)""",
    re.VERBOSE,
)


def print_graph(graph: Graph) -> str:
    """The graph as text; `parse_graph` gives an equal graph back."""
    return _graph(graph, None, "") + "\n"


def print_unit(unit: Unit) -> str:
    """The unit as text; `parse_unit` gives an equal unit back."""
    return " ".join([unit.kind, _name(unit.name), *_fields(unit, ("kind", "name"), Graph(), "")]) + "\n"


def _quoted(text: str, bare: str) -> str:
    return text if re.fullmatch(bare, text) and text not in RESERVED else json.dumps(text)


def _name(text: str) -> str:
    return _quoted(text, _WORD)


def _id(text: str) -> str:
    return "%" + _quoted(text, _ID)


def _graph(graph: Graph, around: Graph | None, indent: str) -> str:
    inner = indent + "  "
    axes = [_axis(a) for a in graph.axes]
    # Compared as text, since equality takes 1, 1.0 and True for one another.
    same = around is not None and axes == [_axis(a) for a in around.axes]
    lines = ([] if same else axes) + [_node(n, graph, inner) for n in graph.nodes]
    lines += [f"output {_name(name)} = {_id(id_)}" for name, id_ in graph.outputs]
    word = "region" if same else "graph"
    return "\n".join([f"{word} {graph.level} {{", *(inner + line for line in lines), indent + "}"])


def _axis(axis: Axis) -> str:
    skip = ("name", "kind", *(["space"] if axis.space == axis.name else []))
    return " ".join([f"axis {_name(axis.name)}: {axis.kind}", *_fields(axis, skip, Graph(), "")])


def _node(node: N.AnyNode, graph: Graph, indent: str) -> str:
    head = f"{_id(node.id)}: {node.dtype}[{', '.join(map(_name, node.axes))}] = {node.kind}"
    fields = _fields(node, ("id", "axes", "dtype", "span", "kind"), graph, indent)
    return " ".join([head, *fields, *([_value(node.span, False, graph, "")] if node.span else [])])


def _fields(model: BaseModel, skip: tuple[str, ...], graph: Graph, indent: str) -> list[str]:
    out = []
    for field, info in type(model).model_fields.items():
        value = getattr(model, field)
        usual = not info.is_required() and value == info.default and type(value) is type(info.default)
        if field not in skip and not usual:
            is_id = field in ID_FIELDS or isinstance(model, N.Write)
            out.append(f"{field}={_value(value, is_id, graph, indent)}")
    return out


def _value(value: object, is_id: bool, graph: Graph, indent: str) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return _id(value) if is_id else _name(value)
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple):
        return f"({', '.join(_value(v, is_id, graph, indent) for v in value)})"
    if isinstance(value, Span):
        return f"@{_quoted(value.file, _FILE)}:{value.start}-{value.end}"
    if isinstance(value, Graph):
        return _graph(value, graph, indent)
    if isinstance(value, Size) and (text := _size(value)):
        return f"<{text}>"
    assert isinstance(value, BaseModel), value
    return f"{{{' '.join(_fields(value, (), graph, indent))}}}"


def _size(size: Size, inside: bool = False) -> str | None:
    """Infix text; None if a field holds what such text cannot say."""
    if size.op in ("const", "param"):
        plain = not size.args and isinstance(size.value, str) == (size.op == "param")
        return _value(size.value, False, Graph(), "") if plain else None
    args = [_size(a, size.op in INFIX) for a in size.args]
    if None in args or type(size.value) is not int or size.value:
        return None
    if size.op not in INFIX:
        return f"{size.op}({', '.join(a for a in args if a)})"
    text = f"{args[0]} {size.op} {args[1]}" if len(args) == 2 else None
    return f"({text})" if text and inside else text


def parse_graph(text: str) -> Graph:
    """The graph that such a text describes. Raises ValueError, the number of the line first, if it is malformed."""
    parser = _Parser(text)
    return parser.whole(lambda: parser.graph(None))


def parse_unit(text: str) -> Unit:
    """The unit that such a text describes. Raises ValueError as `parse_graph`."""
    parser = _Parser(text)
    return parser.whole(parser.unit)


def _unquoted(text: str) -> str:
    return str(json.loads(text)) if text.startswith('"') else text


def _number(text: str) -> int | float:
    return int(text) if text.removeprefix("-").isdigit() else float(text)


class _Parser:
    """A token at a time: `kind` and `text` are those of the next one, empty at the end."""

    def __init__(self, text: str) -> None:
        found = [(m.lastgroup or "", m.group(), m.start()) for m in _TOKEN.finditer(text)]
        self.source = text
        self.tokens = [t for t in found if t[0] != "space"] + [("", "", len(text))]
        self.at = 0
        self.kind, self.text, _ = self.tokens[0]
        self.axes: tuple[Axis, ...] = ()

    def next(self) -> str:
        """Go to the next token; the text of the one that is left."""
        left = self.tokens[self.at][1]
        self.at += 1
        self.kind, self.text, _ = self.tokens[self.at]
        return left

    def fail(self, message: str, at: int | None = None) -> NoReturn:
        position = self.tokens[self.at if at is None else at][2]
        raise ValueError(f"line {self.source.count(chr(10), 0, position) + 1}: {message}") from None

    def skip(self, text: str) -> bool:
        """Whether the next token is this sign or word, which is then read."""
        found = self.kind in ("sign", "word") and self.text == text
        if found:
            self.next()
        return found

    def expect(self, text: str) -> None:
        if not self.skip(text):
            self.fail(f"expected '{text}', not '{self.text}'" if self.kind else f"expected '{text}', not the end")

    def string(self, *kinds: str) -> str:
        """An id, a word or a quoted string, of the kinds named."""
        if self.kind not in kinds:
            self.fail(f"expected {' or '.join(kinds)}, not '{self.text}'")
        return _unquoted(self.next().removeprefix("%"))

    def name(self) -> str:
        return self.string("word", "string")

    def made(self, cls: type[M], at: int, data: dict[str, Any]) -> M:
        """The model of this data, which began at a token."""
        try:
            return cls.model_validate(data)
        except ValidationError as reason:
            first = reason.errors()[0]
            self.fail(f"{'.'.join(map(str, first['loc']))}: {first['msg']}", at)

    def whole(self, item: Callable[[], M]) -> M:
        """The one item that the text is."""
        try:
            found = item()
        except RecursionError:
            self.fail("nested too deeply")
        if self.kind:
            self.fail(f"the text goes on after the {type(found).__name__.lower()}")
        return found

    def unit(self) -> Unit:
        start, kind, name = self.at, self.string("word"), self.name()
        return self.made(Unit, start, self.fields(kind=kind, name=name))

    def graph(self, around: tuple[Axis, ...] | None) -> Graph:
        start, outer = self.at, self.axes
        region = around is not None and self.skip("region")
        if not region:
            self.expect("graph")
        level = self.string("word")
        self.expect("{")
        axes, nodes, outputs = list(around or ()) if region else [], [], []
        while not region and self.skip("axis"):
            axes.append(self.axis())
        self.axes = tuple(axes)
        while self.kind == "id":
            nodes.append(self.node())
        while self.skip("output"):
            name = self.name()
            self.expect("=")
            outputs.append((name, self.string("id")))
        self.expect("}")
        self.axes = outer
        return self.made(Graph, start, {"level": level, "nodes": nodes, "outputs": outputs, "axes": axes})

    def axis(self) -> Axis:
        start, name = self.at, self.name()
        self.expect(":")
        return self.made(Axis, start, {"space": name, **self.fields(name=name, kind=self.string("word"))})

    def node(self) -> N.Node:
        start, id_ = self.at, self.string("id")
        self.expect(":")
        dtype = self.string("word")
        self.expect("[")
        axes = self.listed("]", self.name)
        self.expect("=")
        kind = self.string("word")
        if kind not in KINDS:
            self.fail(f"there is no kind of node '{kind}'", self.at - 1)
        fields = self.fields(id=id_, dtype=dtype, axes=axes)
        if self.kind == "span":
            fields["span"] = self.value()
        return self.made(KINDS[kind], start, fields)

    def fields(self, **known: object) -> dict[str, Any]:
        """Pairs `name=value`, added to those known."""
        while self.kind == "word" and self.tokens[self.at + 1][1] == "=":
            if self.text in known:
                self.fail(f"'{self.text}' is given twice")
            name = self.next()
            self.expect("=")
            known[name] = self.value()
        return known

    def listed(self, end: str, item: Callable[[], Any]) -> tuple[Any, ...]:
        """Items with commas between them, up to the closing sign."""
        out: list[Any] = []
        while not self.skip(end):
            if out:
                self.expect(",")
            out.append(item())
        return tuple(out)

    def value(self) -> Any:
        if self.kind == "span":
            file, start, end = re.split(r":(-?\d+)-(-?\d+)$", self.next()[1:])[:3]
            return Span(_unquoted(file), int(start), int(end))
        if self.kind == "number":
            return _number(self.next())
        if self.text in ("graph", "region"):
            return self.graph(self.axes)
        if self.text in CONSTANTS:
            return CONSTANTS[self.next()]
        if self.skip("("):
            return self.listed(")", self.value)
        if self.kind != "sign" or self.text not in "{<":
            return self.string("id", "word", "string")
        out, end = (self.fields(), "}") if self.next() == "{" else (self.size(), ">")
        self.expect(end)
        return out

    def size(self) -> Size:
        start, left = self.at, self.term()
        if self.kind == "sign" and self.text in INFIX:
            return self.made(Size, start, {"op": self.next(), "args": (left, self.term())})
        return left

    def term(self) -> Size:
        start = self.at
        if self.skip("("):
            out = self.size()
            self.expect(")")
            return out
        if self.kind == "number" or self.text in CONSTANTS:
            return self.made(Size, start, {"op": "const", "value": self.value()})
        name = self.name()
        call = {"op": name, "args": self.listed(")", self.size)} if self.skip("(") else None
        return self.made(Size, start, call or {"op": "param", "value": name})
