"""Checking of expressions: a syntax expression becomes nodes of the graph under construction, or diagnostics.

Every method returns a node's id, or None where it reported an error; None is passed on in silence, so that one
mistake gives one diagnostic."""

from __future__ import annotations

from dataclasses import replace

from chunkc.dsl import prelude
from chunkc.dsl import tree as T
from chunkc.dsl.scope import (
    AxisName,
    BodyValue,
    Broken,
    FunctionName,
    Scope,
    Setting,
    StateName,
    Stop,
    UnitName,
    Value,
    Work,
)
from chunkc.dsl.sizes import CONSTANTS, MAX_PARTS, Context, parts
from chunkc.dsl.units import UnitCalls
from chunkc.ir import nodes as N
from chunkc.ir.axes import Axis, Size
from chunkc.ir.diagnostics import Report, Span

ARITHMETIC = {"+": "+", "-": "-", "*": "*", "/": "/", "%": "%", "^": "pow"}
BOOLEAN = {"and": "and", "or": "or"}
COMPLEX = ("+", "-", "*", "/", "neg", "exp", "re", "im", "abs", "where", "stop", "==", "!=", "pow")
MAX_INLINED = 500  # calls of functions in a unit
MAX_INLINE_DEPTH = 16


class Expressions(UnitCalls):
    """Checks expressions in a scope. `axes` are the unit's axes by name; `within` are the functions being inlined."""

    def __init__(self, scope: Scope, report: Report, axes: dict[str, Axis], work: Work,
                 within: tuple[str, ...] = ()) -> None:  # fmt: skip
        super().__init__(scope, report, axes, work)
        self.within = within
        self.inlined = 0

    # -- expressions -------------------------------------------------------------------------------------------------

    def expr(self, e: T.Expr, c: Context) -> str | None:
        """The node for an expression."""
        self.work.spend(e.span)
        if isinstance(e, T.NumberLit):
            return c.builder.const(e.value, e.span)
        if isinstance(e, T.Name):
            return self.name(e, c)
        if isinstance(e, T.Unary):
            arg = self.expr(e.arg, c)
            if arg is not None and e.op == "-" and (known := self.known(arg, c)) is not None:
                return self.constant(Size(op="neg", args=(known,)), e.span, c, c.builder.nodes[arg].dtype == "int")
            return self.map("neg" if e.op == "-" else "not", [(arg, e.arg)], c, e.span)
        if isinstance(e, T.Binary):
            return self.binary(e, c)
        if isinstance(e, T.Index):
            return self.read(e, c)
        return self.call(e, c)

    def name(self, e: T.Name, c: Context) -> str | None:
        if e.text in CONSTANTS:
            value = CONSTANTS[e.text]
            if isinstance(value, bool):
                return c.builder.add(N.Const, "", e.span, size=Size.of(value), dtype="bool")
            return c.builder.const(value, e.span)
        refused = isinstance(self.scope.names.get(e.text), Broken)
        if not refused and (e.text in prelude.FUNCTIONS or e.text in (*prelude.LATER, *prelude.RULES)):
            self.report.error("not-a-value", f"'{e.text}' is a function: call it", e.span)
            return None
        symbol = self.scope.find(e)
        if symbol is None:
            return None
        if isinstance(symbol, Setting):
            if symbol.type == "bool":
                return c.builder.add(N.Const, "", e.span, size=symbol.size, dtype="bool")
            return c.builder.const(symbol.size, e.span, symbol.type == "int")
        if isinstance(symbol, AxisName):
            name = c.rename.get(symbol.axis.name, symbol.axis.name)
            if symbol.axis.kind == "unordered":
                self.report.error("bad-read", f"'{e.text}' has no order: its coordinate cannot be used", e.span)
                return None
            if symbol.axis.kind == "chunk" and name != c.bound:
                outer = c.outer or c.builder
                at = outer.add(N.Bounds, "", e.span, fn="index", chunk=name, axes=(name,), dtype="int")
                return self.fetch(at, e.span, c)
            axes = () if name == c.bound else (name,)
            return c.builder.add(N.Coord, "", e.span, axis=name, axes=axes, dtype="int")
        if isinstance(symbol, FunctionName | UnitName):
            self.report.error("not-a-value", f"'{e.text}' is a function: call it", e.span)
            return None
        if isinstance(symbol, BodyValue):
            return symbol.id
        if isinstance(symbol, StateName):
            if c.outer is not None and symbol.current:
                return symbol.current
            symbol = Value(symbol.outer, symbol.span)
        assert isinstance(symbol, Value)
        if c.initial:
            self.report.error("bad-param", "an initial value is made of numbers, coordinates and random numbers",
                              e.span, related=((symbol.span, f"'{e.text}' is a tensor"),))  # fmt: skip
            return None
        return self.fetch(symbol.id, e.span, c)

    def fetch(self, id_: str, span: Span, c: Context) -> str:
        """An outer value where it is used: captured by a body, or under the definition's axis names."""
        node = (c.outer or c.builder).nodes[id_]
        if c.outer is not None:
            axes = tuple(a for a in node.axes if a != c.bound)
            return c.builder.add(N.Capture, id_, span, outer=id_, axes=axes, dtype=node.dtype)
        for old, new in c.rename.items():
            if old in node.axes and new not in node.axes:
                id_ = self.renamed(id_, old, new, span, c)
                node = c.builder.nodes[id_]
        return id_

    def binary(self, e: T.Binary, c: Context) -> str | None:
        if e.op == "in":
            self.later("'in' with a list", e.span)
            return None
        left, right = self.expr(e.left, c), self.expr(e.right, c)
        fn = ARITHMETIC.get(e.op) or BOOLEAN.get(e.op) or e.op
        if left is not None and right is not None:
            a, b = self.known(left, c), self.known(right, c)
            if a is not None and b is not None and e.op == "/" and a.op == b.op == "const" and b.value:
                return self.constant(Size.of(a.evaluate({}) / b.evaluate({})), e.span, c, False)
            if a is not None and b is not None and e.op in "+-*^" and parts(a) + parts(b) < MAX_PARTS:
                whole = all(c.builder.nodes[x].dtype == "int" for x in (left, right)) and e.op != "^"
                return self.constant(Size(op=e.op, args=(a, b)), e.span, c, whole)  # type: ignore[arg-type]
            if fn == "pow" and b is None:
                self.report.error("not-a-size", "an exponent is a number known at construction", e.right.span,
                                  hints=("write exp(b * log(a))",))  # fmt: skip
                return None
        return self.map(fn, [(left, e.left), (right, e.right)], c, e.span)

    @staticmethod
    def known(id_: str, c: Context) -> Size | None:
        """The number that a node stands for, if it stands for one known at construction."""
        node = c.builder.nodes[id_]
        return node.size if isinstance(node, N.Const) and node.dtype != "bool" else None

    def constant(self, size: Size, span: Span, c: Context, whole: bool) -> str | None:
        return c.builder.const(size, span, whole) if self.defined(size, span) else None

    def map(self, fn: str, args: list[tuple[str | None, T.Expr]], c: Context, span: Span) -> str | None:
        """An elementwise node over checked operands."""
        ids = [a for a, _ in args]
        if any(a is None for a in ids):
            return None
        present = [a for a in ids if a is not None]
        logical = fn in BOOLEAN or fn == "not"
        for index, (id_, (_, e)) in enumerate(zip(present, args)):
            dtype = c.builder.nodes[id_].dtype
            if fn == "where" and index == 0 and dtype != "bool":
                self.report.error("type-mismatch", f"'where' chooses by a truth value, this is {dtype}", e.span,
                                  hints=("compare it with something",))  # fmt: skip
                return None
            if logical and dtype != "bool":
                self.report.error("type-mismatch", f"'{fn}' takes truth values, this is {dtype}", e.span,
                                  hints=("compare it with something",))  # fmt: skip
                return None
            if not logical and dtype == "bool" and fn not in ("where", "==", "!="):
                self.report.error("type-mismatch", "this is a truth value, not a number", e.span,
                                  hints=("write where(x, 1, 0)",))  # fmt: skip
                return None
        if not self.complex_allowed(fn, present, args, c):
            return None
        present = self.align(present, [e for _, e in args], c)
        return c.builder.map(fn, *present, span=span)

    def complex_allowed(self, fn: str, ids: list[str], args: list[tuple[str | None, T.Expr]], c: Context) -> bool:
        """Whether a function takes the complex numbers among its operands."""
        for id_, (_, e) in zip(ids, args):
            if c.builder.nodes[id_].dtype == "complex" and fn not in COMPLEX:
                self.report.error("type-mismatch", f"'{fn}' takes real numbers, this is complex", e.span,
                                  hints=("take re(x), im(x) or abs(x)",))  # fmt: skip
                return False
        return True

    # -- calls -------------------------------------------------------------------------------------------------------

    def call(self, e: T.CallExpr, c: Context) -> str | None:
        base, index = (e.fn.base, e.fn) if isinstance(e.fn, T.Index) else (e.fn, None)
        if not isinstance(base, T.Name):
            self.report.error("not-a-function", "only a name can be called", e.fn.span)
            return None
        name = base.text
        if name in prelude.LATER:
            self.later(f"'{name}'", base.span)
            return None
        if name in prelude.RULES:
            self.report.error("not-a-function", f"'{name}' stands behind 'chunk c of t =' alone", base.span)
            return None
        symbol = self.scope.known(name)
        if isinstance(symbol, FunctionName):
            return self.inline(symbol, e, index, c)
        if isinstance(symbol, UnitName):
            return self.call_unit(symbol.unit, e, index, c)
        if isinstance(symbol, AxisName):
            return self.coordinate_of(symbol.axis, e, index, c)
        spec = prelude.ELEMENTWISE.get(name) if index is None else None
        spec = spec or prelude.FUNCTIONS.get(name)
        if spec is None:
            if name in prelude.CONSTANTS or self.scope.find(base) is not None:
                self.report.error("not-a-function", f"'{name}' is no function", base.span)
            return None
        split = self.arguments(spec, e)
        if split is None:
            return None
        positional, named = split
        if index is not None and name not in prelude.ALONG:
            self.report.error("bad-call", f"'{name}' names no axes: {name}(x)", index.span)
            return None
        if index is not None and index.to is not None and name != "linear":
            self.report.error("bad-call", f"'{name}' brings no axes: an arrow stands in linear[d -> e](x)", index.span)
            return None
        if name in ("linear", "embed") or index is None:
            return self.plain_call(name, e, index, positional, named, c)
        return self.call_along(name, e, index, positional, named, c)

    def arguments(self, spec: prelude.Function, e: T.CallExpr) -> tuple[list[T.Arg], dict[str, T.Arg]] | None:
        """A call's positional arguments and those with names, as the function takes them."""
        positional = [a for a in e.args if a.name is None]
        if not spec.least <= len(positional) <= spec.most:
            most = f"{spec.least} to {spec.most}"
            wanted = f"{spec.most if spec.least == spec.most else most} argument{'s' * (spec.most > 1)}"
            self.report.error("bad-call", f"'{spec.name}' takes {wanted}, not {len(positional)}", e.span)
            return None
        named: dict[str, T.Arg] = {}
        for arg in e.args:
            if arg.name is not None and (arg.name.text not in spec.keywords or arg.name.text in named):
                self.report.error("bad-call", f"'{spec.name}' has no parameter '{arg.name.text}' left", arg.span)
                return None
            if arg.name is not None:
                named[arg.name.text] = arg
        return positional, named

    def plain_call(self, name: str, e: T.CallExpr, index: T.Index | None, positional: list[T.Arg],
                   named: dict[str, T.Arg], c: Context) -> str | None:  # fmt: skip
        """A call of a function that names no axes, or of a library function that brings some."""
        if name == "size":
            symbol = self.scope.known(e.args[0].value.text) if isinstance(e.args[0].value, T.Name) else None
            if isinstance(symbol, AxisName) and symbol.axis.is_sequence:
                length = (c.outer or c.builder).add(N.Length, "", e.span, axis=symbol.axis.name, axes=(), dtype="int")
                return self.fetch(length, e.span, c)
            at = self.number(e)
            return None if at is None else c.builder.const(at, e.span, True)
        if name == "linear":
            return self.linear(e, index, positional[0].value, named, c)
        if name == "embed":
            return self.embed(e, index, positional, named, c)
        if name in ("first", "last", "len"):
            return self.span_edge(name, e, c)
        if name in prelude.INITIAL:
            return self.random(name, e, c)
        if name not in prelude.ELEMENTWISE:
            self.report.error("bad-call", f"'{name}' names its axes: {name}[i](x)", e.span)
            return None
        args = [(self.expr(a.value, c), a.value) for a in positional]
        if name == "bce":
            return self.bce(args, named, e.span, c)
        return self.map(name, args, c, e.span)

    def call_along(self, name: str, e: T.CallExpr, index: T.Index, positional: list[T.Arg],
                   named: dict[str, T.Arg], c: Context) -> str | None:  # fmt: skip
        """A call of a function along the axes between its brackets."""
        if name in ("conv", "rope", "ce"):
            plain = self.plain_axes(index)
            if plain is None:
                return None
            if name == "conv":
                return self.conv(e, plain, positional, named, c)
            ids = [self.expr(a.value, c) for a in positional]
            if ids[0] is None or ids[1] is None:
                return None
            compose = self.rope if name == "rope" else self.ce
            return compose(ids[0], ids[1], positional, plain, e.span, c)
        axes = self.along(index)
        if axes is None:
            return None
        args = [self.expr(a.value, c) for a in positional]
        if any(a is None for a in args):
            return None
        return self.over_axes(name, [a for a in args if a], [a.value for a in positional], axes, e.span, c)

    def inline(self, fn: FunctionName, e: T.CallExpr, index: T.Index | None, c: Context) -> str | None:
        """A call of an `fn`: its body over the caller's axes and arguments."""
        decl = fn.decl
        self.inlined += 1
        if self.inlined > MAX_INLINED:
            self.report.error("too-large", f"over {MAX_INLINED} calls of functions", e.span)
            raise Stop
        if decl.name.text in self.within:
            self.report.error("recursive", f"'{decl.name.text}' calls itself", e.span,
                              related=((decl.name.span, "the function"),))  # fmt: skip
            return None
        if len(self.within) >= MAX_INLINE_DEPTH:
            self.report.error("too-large", f"functions call each other over {MAX_INLINE_DEPTH} levels deep", e.span)
            return None
        axes = self.plain_axes(index) if index is not None else []
        if axes is None:
            return None
        arrow = index is not None and index.to is not None
        if arrow or len(axes) != len(decl.axes) or len(e.args) > len(decl.params):
            works, takes = _count(len(decl.axes), "axis", "axes"), _count(len(decl.params), "argument", "arguments")
            self.report.error("bad-call", f"'{decl.name.text}' works on {works} and takes {takes}", e.span,
                              related=((decl.span, "the function"),))  # fmt: skip
            return None
        inner = Scope(self.report, self.scope.reserved, self.scope.silenced, fn.known)
        for own, (name, at) in zip(decl.axes, axes):
            inner.declare(own, AxisName(self.axes[name], at.span))
        for param, value in self.bind_arguments(decl, e, c):
            if value is None:
                return None
            inner.declare(param, BodyValue(value, param.span))
        within = (*self.within, decl.name.text)
        return self.run_fn(decl, Expressions(inner, self.report, self.axes, self.work, within), c)

    def bind_arguments(self, decl: T.FnDecl, e: T.CallExpr, c: Context) -> list[tuple[T.Name, str | None]]:
        given: dict[str, str | None] = {}
        names = [p.name.text for p in decl.params]
        for position, arg in enumerate(e.args):
            key = arg.name.text if arg.name else names[position]
            if key not in names or key in given:
                self.report.error("bad-call", f"'{decl.name.text}' has no parameter '{key}' left", arg.span)
                return [(decl.name, None)]
            given[key] = self.expr(arg.value, c)
        out: list[tuple[T.Name, str | None]] = []
        for p in decl.params:
            if p.name.text in given:
                out.append((p.name, given[p.name.text]))
            elif p.default is not None:
                out.append((p.name, self.expr(p.default, c)))
            else:
                self.report.error("bad-call", f"'{decl.name.text}' needs '{p.name.text}'", e.span)
                out.append((p.name, None))
        return out

    def run_fn(self, decl: T.FnDecl, inner: Expressions, c: Context) -> str | None:
        inner.inlined = self.inlined
        result: str | None = None
        for statement in decl.body:
            pairs: list[tuple[T.Name, T.Expr]] = []
            output = isinstance(statement, T.Declare) and statement.what == "output"
            if isinstance(statement, T.Define):
                pairs = [(statement.name, statement.value)]
            elif isinstance(statement, T.Declare) and output:
                pairs = [(b.name, b.value or b.name) for b in statement.binds]
            elif isinstance(statement, T.Axes):
                if not all(inner.inner_axis(a, decl.name.text, c) for a in statement.axes):
                    return None
                continue
            if not (pairs or isinstance(statement, T.Doc)) or (output and (len(pairs) > 1 or result is not None)):
                self.report.error("bad-fn", "a function holds definitions and one output", statement.span)
                return None
            for name, value in pairs:
                id_ = inner.expr(value, replace(c, weight=None, target=None))
                if id_ is None:
                    return None
                if value is not name and name.text:
                    inner.scope.declare(name, BodyValue(id_, name.span))
                result = id_ if output else result
        self.inlined = inner.inlined
        if result is None:
            self.report.error("bad-fn", f"'{decl.name.text}' has no output", decl.name.span)
        return result

    def inner_axis(self, a: T.AxisDecl, function: str, c: Context) -> bool:
        """An axis that a function declares: `b = a` or `b = SIZE`, a new one at each call."""
        self.work.spend(a.span)
        like = self.scope.known(a.size.text) if isinstance(a.size, T.Name) else None
        if a.kind is not None or a.groups is not None or a.size is None:
            self.report.error("bad-fn", "a function declares axes as second names or by size: b = a", a.span)
            return False
        if isinstance(like, AxisName):
            name = f"{function}_{a.name.text}"
            while name in self.axes:
                name += "_"
            axis = like.axis.evolve(name=name)
            self.axes[name] = axis
            for builder in (c.builder, c.outer):
                if builder is not None:
                    builder.axes[name] = axis
        else:
            size = self.whole(a.size, 1, "bad-size", "a size")
            if size is None:
                return False
            axis = self.axes[self.own_axis(f"{function}_{a.name.text}", size, c)]
        return self.scope.declare(a.name, AxisName(axis, a.name.span))


def _count(n: int, one: str, many: str) -> str:
    return f"{n} {one if n == 1 else many}"
