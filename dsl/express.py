"""Checking of expressions: a syntax expression becomes nodes of the graph under construction, or diagnostics.

Every method returns a node's id, or None where it reported an error; None is passed on in silence, so that one
mistake gives one diagnostic."""

from __future__ import annotations

from dataclasses import replace

from chunkc.dsl import prelude
from chunkc.dsl import tree as T
from chunkc.dsl.scope import AxisName, BodyValue, FunctionName, Scope, Setting, StateName, Stop, Symbol, Value, Work
from chunkc.dsl.sizes import CONSTANTS, MAX_PARTS, Context, parts
from chunkc.dsl.weights import Weights, listed
from chunkc.ir import nodes as N
from chunkc.ir.axes import Axis, Size
from chunkc.ir.diagnostics import Report, Span

ARITHMETIC = {"+": "+", "-": "-", "*": "*", "/": "/", "%": "%", "^": "pow"}
BOOLEAN = {"and": "and", "or": "or"}
MAX_INLINED = 500  # calls of functions in a unit
MAX_INLINE_DEPTH = 16


class Expressions(Weights):
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
                return self.constant(Size(op="neg", args=(known,)), e.span, c)
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
        if e.text in prelude.FUNCTIONS or e.text in prelude.LATER:
            self.report.error("not-a-value", f"'{e.text}' is a function: call it", e.span)
            return None
        symbol = self.scope.find(e)
        if symbol is None:
            return None
        if isinstance(symbol, Setting):
            if symbol.type == "bool":
                return c.builder.add(N.Const, "", e.span, size=symbol.size, dtype="bool")
            return c.builder.const(symbol.size, e.span)
        if isinstance(symbol, AxisName):
            name = c.rename.get(symbol.axis.name, symbol.axis.name)
            axes = () if name == c.bound else (name,)
            return c.builder.add(N.Coord, "", e.span, axis=name, axes=axes, dtype="int")
        if isinstance(symbol, FunctionName):
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

    def renamed(self, id_: str, old: str, new: str, span: Span, c: Context) -> str:
        node = c.builder.nodes[id_]
        axes = tuple(new if a == old else a for a in node.axes)
        return c.builder.add(N.Rename, "", span, arg=id_, source=old, target=new, axes=axes, dtype=node.dtype)

    def binary(self, e: T.Binary, c: Context) -> str | None:
        if e.op == "in":
            self.later("'in' with a list", e.span)
            return None
        left, right = self.expr(e.left, c), self.expr(e.right, c)
        fn = ARITHMETIC.get(e.op) or BOOLEAN.get(e.op) or e.op
        if left is not None and right is not None:
            a, b = self.known(left, c), self.known(right, c)
            if a is not None and b is not None and e.op in "+-*^" and parts(a) + parts(b) < MAX_PARTS:
                return self.constant(Size(op=e.op, args=(a, b)), e.span, c)  # type: ignore[arg-type]
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

    def constant(self, size: Size, span: Span, c: Context) -> str | None:
        return c.builder.const(size, span) if self.defined(size, span) else None

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
        present = self.align(present, [e for _, e in args], c)
        return c.builder.map(fn, *present, span=span)

    def align(self, ids: list[str], exprs: list[T.Expr], c: Context) -> list[str]:
        """Expand grouped axes that stand beside their members."""
        union = {a for i in ids for a in c.builder.nodes[i].axes}
        out = []
        for id_, e in zip(ids, exprs):
            node = c.builder.nodes[id_]
            for a in node.axes:
                parent = self.axes[a].parent if self.axes[a].kind == "size" else None
                if parent is not None and parent in union and parent not in node.axes:
                    id_ = self.expand(id_, a, parent, e.span, c)
                    node = c.builder.nodes[id_]
            out.append(id_)
        return out

    def expand(self, id_: str, source: str, target: str, span: Span, c: Context) -> str:
        node = c.builder.nodes[id_]
        axes = tuple(target if a == source else a for a in node.axes)
        return c.builder.add(N.Expand, "", span, arg=id_, source=source, target=target, axes=axes, dtype=node.dtype)

    # -- reads -------------------------------------------------------------------------------------------------------

    def read(self, e: T.Index, c: Context) -> str | None:
        """`E[a = e, ...]`."""
        if isinstance(e.base, T.Name) and (e.base.text in prelude.FUNCTIONS or e.base.text in prelude.LATER):
            self.report.error("not-a-value", f"'{e.base.text}[...]' takes an argument: {e.base.text}[...](x)", e.span)
            return None
        if isinstance(e.base, T.Name):
            symbol: Symbol | None = self.scope.names.get(e.base.text)
            if isinstance(symbol, StateName) and symbol.outer and len(e.entries) == 1 and e.to is None:
                edge = self.state_edge(symbol, e, c)
                if edge is not None:
                    return edge
        id_ = self.expr(e.base, c)
        for ix in e.entries:
            if ix.at is None or e.to is not None:
                self.report.error("bad-read", "a read names a position: x[t = t - 1]", ix.span)
                return None
            if id_ is None:
                return None
            id_ = self.read_one(id_, ix, e.span, c)
        return id_

    def state_edge(self, symbol: StateName, e: T.Index, c: Context) -> str | None:
        """A state's last or initial value; None for any other read of its trajectory."""
        at = e.entries[0].at
        trajectory = (c.outer or c.builder).nodes[symbol.outer]
        if e.entries[0].name.text != trajectory.axes[0]:
            return None  # no read along the recurrence
        if _is_minus_one(at):
            if symbol.initial is not None:
                return self.fetch(symbol.initial, e.span, c)
            zero = c.builder.const(0.0, e.span)
            return c.builder.add(N.Map, "", e.span, fn="as", args=(zero,), axes=symbol.axes)
        if (isinstance(at, T.Binary) and at.op == "-" and isinstance(at.right, T.NumberLit) and at.right.text == "1"
                and isinstance(at.left, T.CallExpr) and isinstance(at.left.fn, T.Name) and at.left.fn.text == "size"
                and [a.value for a in at.left.args] == [e.entries[0].name]):  # fmt: skip
            return self.fetch(symbol.final, e.span, c)
        return None

    def read_one(self, id_: str, ix: T.Ix, span: Span, c: Context) -> str | None:
        axis = self.axis(ix.name)
        if axis is None or ix.at is None:
            return None
        node = c.builder.nodes[id_]
        name = axis.name
        if name == c.bound:
            return self.read_outside(id_, ix, span, c)
        if name not in node.axes:
            self.report.error("no-axis", f"this has no axis '{name}' to read at", ix.span,
                              notes=(f"it is over {listed(node.axes)}",))  # fmt: skip
            return None
        if isinstance(ix.at, T.Name):
            other = self.scope.names.get(ix.at.text)
            if isinstance(other, AxisName) and other.axis.space == axis.space:
                if other.axis.name == name:
                    return id_
                if other.axis.name in node.axes:
                    self.later("a read along a diagonal", ix.span)
                    return None
                return self.renamed(id_, name, other.axis.name, span, c)
        rest = tuple(a for a in node.axes if a != name)
        if not axis.is_sequence:
            at = None if self.mentions_value(ix.at) else self.whole(ix.at, 0, "bad-read", "a position")
            if at is not None:
                return c.builder.add(N.Slice, "", span, arg=id_, axis=name, at=at, axes=rest, dtype=node.dtype)
            if not self.mentions_value(ix.at):
                return None
            self.later("a read of a fixed axis at a computed position", ix.span)
            return None
        known = len(self.report.errors)
        by = self.shift_of(ix.at, name)
        if by is not None:
            return c.builder.add(N.Shift, "", span, arg=id_, axis=name, by=by, axes=node.axes, dtype=node.dtype)
        if len(self.report.errors) == known:
            self.later("a read of a sequence at a computed position", ix.span)
        return None

    def read_outside(self, id_: str, ix: T.Ix, span: Span, c: Context) -> str | None:
        """In a body, a captured tensor read at another step: shifted outside, then captured."""
        node = c.builder.nodes[id_]
        assert c.outer is not None and c.bound is not None and ix.at is not None
        known = len(self.report.errors)
        by = self.shift_of(ix.at, c.bound)
        if by is None and len(self.report.errors) > known:
            return None
        if by is None or not isinstance(node, N.Capture):
            self.later("inside a recurrence, a read that is no shift of an outer tensor", ix.span)
            return None
        outer = c.outer.nodes[node.outer]
        if c.bound not in outer.axes:
            self.report.error("no-axis", f"this has no axis '{c.bound}' to read at", ix.span,
                              notes=(f"it is over {listed(outer.axes)}",))  # fmt: skip
            return None
        shifted = c.outer.add(N.Shift, "", span, arg=outer.id, axis=c.bound, by=by, axes=outer.axes, dtype=outer.dtype)
        return self.fetch(shifted, span, c)

    def shift_of(self, at: T.Expr, axis: str) -> Size | None:
        """n where the position is `axis - n`."""
        if isinstance(at, T.Name) and at.text == axis:
            return Size.of(0)
        if isinstance(at, T.Binary) and at.op in "+-" and isinstance(at.left, T.Name) and at.left.text == axis:
            if self.mentions_value(at.right):
                return None
            by = self.whole(at.right, -(2**31), "bad-read", "a distance")
            return Size(op="neg", args=(by,)) if by is not None and at.op == "+" else by
        return None

    def mentions_value(self, e: T.Expr) -> bool:
        """Whether an expression speaks of tensors or coordinates, and so is no size."""
        if isinstance(e, T.Name):
            return isinstance(self.scope.names.get(e.text), Value | StateName | BodyValue | AxisName)
        if isinstance(e, T.Unary):
            return self.mentions_value(e.arg)
        if isinstance(e, T.Binary):
            return self.mentions_value(e.left) or self.mentions_value(e.right)
        if isinstance(e, T.CallExpr):
            sized = isinstance(e.fn, T.Name) and e.fn.text == "size"
            return not sized and any(self.mentions_value(a.value) for a in e.args)
        return isinstance(e, T.Index)

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
        symbol = self.scope.names.get(name)
        if isinstance(symbol, FunctionName):
            return self.inline(symbol.decl, e, index, c)
        spec = prelude.ELEMENTWISE.get(name) if index is None else None
        spec = spec or prelude.FUNCTIONS.get(name)
        if spec is None:
            if symbol is None and self.scope.uses and name not in prelude.CONSTANTS:
                self.later(f"calling '{name}' of another file", base.span)
            elif name in prelude.CONSTANTS or self.scope.find(base) is not None:
                self.report.error("not-a-function", f"'{name}' is no function", base.span)
            return None
        positional = [a for a in e.args if a.name is None]
        if not spec.least <= len(positional) <= spec.most:
            most = f"{spec.least} to {spec.most}"
            wanted = f"{spec.most if spec.least == spec.most else most} argument{'s' * (spec.most > 1)}"
            self.report.error("bad-call", f"'{name}' takes {wanted}, not {len(positional)}", e.span)
            return None
        named: dict[str, T.Arg] = {}
        allowed = {"linear": ("rank", "bias"), "conv": ("bias",)}.get(name, ())
        for arg in e.args:
            if arg.name is not None and (arg.name.text not in allowed or arg.name.text in named):
                self.report.error("bad-call", f"'{name}' has no parameter '{arg.name.text}' left", arg.span)
                return None
            if arg.name is not None:
                named[arg.name.text] = arg
        if index is not None and name not in {**prelude.REDUCERS, **prelude.NORMALISERS, **prelude.WEIGHTED}:
            self.report.error("bad-call", f"'{name}' names no axes: {name}(x)", index.span)
            return None
        if index is not None and index.to is not None and name != "linear":
            self.report.error("bad-call", f"'{name}' brings no axes: an arrow stands in linear[d -> e](x)", index.span)
            return None
        if name == "size":
            at = self.number(e)
            return None if at is None else c.builder.const(at, e.span)
        if name == "linear":
            return self.linear(e, index, positional[0].value, named, c)
        if index is None:
            if name in prelude.ELEMENTWISE:
                return self.map(name, [(self.expr(a.value, c), a.value) for a in positional], c, e.span)
            if name in prelude.INITIAL:
                return self.random(name, e, c)
            self.report.error("bad-call", f"'{name}' names its axes: {name}[i](x)", e.span)
            return None
        axes = self.reducer_axes(index)
        if axes is None:
            return None
        if name == "conv":
            return self.conv(e, axes, positional, named, c)
        args = [self.expr(a.value, c) for a in positional]
        if any(a is None for a in args):
            return None
        return self.over_axes(name, [a for a in args if a], [a.value for a in positional], axes, e.span, c)

    def reducer_axes(self, index: T.Index) -> list[tuple[str, T.Name]] | None:
        out: list[tuple[str, T.Name]] = []
        for ix in index.entries:
            if ix.within is not None or ix.cond is not None:
                self.later("a reducer chunk by chunk or with a condition", ix.span)
                return None
            if ix.at is not None:
                self.report.error("bad-read", "a reducer names axes, not positions", ix.span)
                return None
            axis = self.axis(ix.name)
            if axis is None:
                return None
            if any(name == axis.name for name, _ in out):
                self.report.error("axis-twice", f"axis '{axis.name}' is named twice", ix.name.span)
                return None
            out.append((axis.name, ix.name))
        return out

    def over_axes(self, name: str, ids: list[str], exprs: list[T.Expr], axes: list[tuple[str, T.Name]],
                  span: Span, c: Context) -> str | None:  # fmt: skip
        """A reducer or normaliser over checked operands."""
        b = c.builder
        for id_, e in zip(ids, exprs):
            if (b.nodes[id_].dtype == "bool") != (name in ("any", "count")):
                takes = "truth values" if name in ("any", "count") else "numbers, not truth values"
                self.report.error("type-mismatch", f"'{name}' takes {takes}", e.span)
                return None
        ids = self.align(ids, exprs, c)
        if name == "dot":
            ids = [b.map("*", *ids, span=span)]
        arg = ids[0]
        for axis, at in axes:
            if axis not in b.nodes[arg].axes:
                groups = [a for a in b.nodes[arg].axes if self.axes[a].parent == axis and self.axes[a].kind == "size"]
                if groups:
                    arg = self.expand(arg, groups[0], axis, span, c)
                    continue
                what = "the step of the recurrence" if axis == c.bound else f"over {listed(b.nodes[arg].axes)}"
                self.report.error("no-axis", f"there is no axis '{axis}' here to work along", at.span,
                                  related=((exprs[0].span, f"this is {what}"),))  # fmt: skip
                return None
        over = tuple(a for a, _ in axes)
        rest = tuple(a for a in b.nodes[arg].axes if a not in over)
        sequence = [a for a in over if self.axes[a].is_sequence]
        if sequence and (len(over) > 1 or name in prelude.NORMALISERS or name == "any"):
            self.later(f"'{name}' along {' and '.join(over)}", span)
            return None
        if name in prelude.NORMALISERS:
            return b.add(N.Normalize, name, span, fn=name, arg=arg, over=over, axes=b.nodes[arg].axes)
        if name == "norm":
            arg = b.map("*", arg, arg, span=span)
            total = b.add(N.Reduce, "", span, fn="sum", arg=arg, over=over, axes=rest)
            return b.map("pow", total, b.const(0.5), span=span)
        if name == "count":
            arg = b.map("where", arg, b.const(1), b.const(0), span=span)
        fn = {"dot": "sum", "count": "sum"}.get(name, name)
        dtype = b.nodes[arg].dtype if fn in ("sum", "max", "min") else ("bool" if fn == "any" else "float")
        return b.add(N.Reduce, fn, span, fn=fn, arg=arg, over=over, axes=rest, dtype=dtype)

    def inline(self, decl: T.FnDecl, e: T.CallExpr, index: T.Index | None, c: Context) -> str | None:
        """A call of an `fn`: its body over the caller's axes and arguments."""
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
        axes = self.reducer_axes(index) if index is not None else []
        if axes is None:
            return None
        arrow = index is not None and index.to is not None
        if arrow or len(axes) != len(decl.axes) or len(e.args) > len(decl.params):
            works, takes = _count(len(decl.axes), "axis", "axes"), _count(len(decl.params), "argument", "arguments")
            self.report.error("bad-call", f"'{decl.name.text}' works on {works} and takes {takes}", e.span,
                              related=((decl.span, "the function"),))  # fmt: skip
            return None
        inner = Scope(self.report, self.scope.reserved, self.scope.silenced, self.scope.units, self.scope.uses)
        inner.names = {n: s for n, s in self.scope.names.items() if isinstance(s, FunctionName)}
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
            elif isinstance(statement, T.Later | T.Axes | T.Chunk):
                self.later("this statement in a function", statement.span)
                return None
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


def _is_minus_one(e: T.Expr | None) -> bool:
    return isinstance(e, T.Unary) and e.op == "-" and isinstance(e.arg, T.NumberLit) and e.arg.text == "1"


def _count(n: int, one: str, many: str) -> str:
    return f"{n} {one if n == 1 else many}"
