"""Library calls that hold weights: `linear`, `embed` and `conv`; and random initial values."""

from __future__ import annotations

from chunkc.dsl import tree as T
from chunkc.dsl.sizes import Context, Sizes
from chunkc.ir import nodes as N
from chunkc.ir.axes import Axis, Size
from chunkc.ir.diagnostics import Span
from chunkc.ir.graph import Builder


class Weights(Sizes):
    """Checks calls that hold a weight; a subclass checks the expressions in them."""

    unit_kind = "layer"  # of the unit that is checked

    def expr(self, e: T.Expr, c: Context) -> str | None:
        """The node for an expression."""
        raise NotImplementedError

    def fetch(self, id_: str, span: Span, c: Context) -> str:
        """An outer value where it is used."""
        raise NotImplementedError

    def plain_axes(self, index: T.Index) -> list[tuple[str, T.Name]] | None:
        """The axes between a function's brackets."""
        raise NotImplementedError

    def random(self, name: str, e: T.CallExpr, c: Context) -> str | None:
        if not c.initial:
            self.report.error("bad-call", f"'{name}' stands only in a parameter's initial value", e.span)
            return None
        sizes = [s for a in e.args if (s := self.number(a.value)) is not None]
        if len(sizes) != len(e.args):
            return None
        return c.builder.add(N.Random, "", e.span, fn=name, a=sizes[0], b=sizes[-1], axes=c.target or ())

    def own_axis(self, name: str, size: Size, c: Context) -> str:
        """An axis that a call brings with it, under a name that nothing else has."""
        while name in self.axes or name in self.scope.names:
            name += "_"
        axis = Axis(name=name, kind="size", size=size, space=name)
        self.axes[name] = c.builder.axes[name] = axis
        if c.outer is not None:
            c.outer.axes[name] = axis
        return name

    def flag(self, arg: T.Arg | None) -> bool | None:
        """A written truth value; false if unsaid."""
        if arg is None:
            return False
        if isinstance(arg.value, T.Name) and arg.value.text in ("true", "false"):
            return arg.value.text == "true"
        self.report.error("bad-call", "'bias' is true or false", arg.value.span)
        return None

    def param(self, role: str, axes: tuple[str, ...], fan_in: Size | None, span: Span, c: Context,
              init: T.Arg | None = None) -> str | None:  # fmt: skip
        """A library call's parameter, named after the definition it stands in; None if its initial value is wrong."""
        b = c.outer or c.builder
        kind, graph = {"bias": "bias", "table": "table"}.get(role, "weight"), None
        if init is not None:
            inner = Builder(axes=self.axes.values())
            value = self.expr(init.value, Context(inner, target=axes, initial=True))
            if value is None:
                return None
            if not set(inner.nodes[value].axes) <= set(axes):
                self.report.error("axis-mismatch", f"this is over {listed(inner.nodes[value].axes)}, the weight is "
                                  f"over {listed(axes)}", init.value.span)  # fmt: skip
                return None
            kind, graph = "", inner.graph([("value", value)]).pruned()
        name = f"{c.weight}.{'weight' if role == 'table' else role}"
        id_ = b.add(N.Param, name.replace(".", "_"), span, name=name, axes=axes, library=kind, fan_in=fan_in,
                    init=graph)  # fmt: skip
        return self.fetch(id_, span, c) if c.outer is not None else id_

    def weighted(self, what: str, span: Span, c: Context) -> bool:
        """Whether a weight may stand here: in a definition of a layer, and one only."""
        if self.unit_kind == "op":
            self.report.error("hidden-weight", f"'{what}' holds a weight, and an op is a function that holds none",
                              span, hints=("declare a param, or make it a layer",))  # fmt: skip
            return False
        if c.weight is None:
            self.report.error("hidden-weight", f"'{what}' holds a weight and stands only in a definition", span)
            return False
        if c.weights_used:
            self.report.error("hidden-weight", f"a definition holds one weight: '{c.weight}' has one already", span,
                              related=((c.weights_used[0], "the first"),),
                              hints=("give this one a definition of its own",))  # fmt: skip
            return False
        c.weights_used.append(span)
        return True

    def linear(self, e: T.CallExpr, index: T.Index | None, x: T.Expr, named: dict[str, T.Arg],
               c: Context) -> str | None:  # fmt: skip
        arg = self.expr(x, c)
        if arg is None or not self.weighted("linear", e.span, c):
            return None
        b = c.builder
        node = b.nodes[arg]
        if index is not None:
            found = self.plain_axes(T.Index(index.span, index.base, index.entries))
            if found is None:
                return None
            if index.to is None:
                self.report.error("bad-call", "write the axes that it brings: linear[d -> e](x)", index.span)
                return None
            brought = self.plain_axes(T.Index(index.span, index.base, tuple(T.Ix(n.span, n) for n in index.to)))
            if brought is None:
                return None
            over, made = tuple(a for a, _ in found), tuple(a for a, _ in brought)
            for a, at in (*found, *brought):
                if self.axes[a].is_sequence:
                    self.report.error("bad-call", "a linear removes and brings axes of fixed size", at.span)
                    return None
            for a, at in found:
                if a not in node.axes:
                    self.report.error("no-axis", f"there is no axis '{a}' here to remove", at.span,
                                      related=((x.span, f"this is over {listed(node.axes)}"),))  # fmt: skip
                    return None
        else:
            if c.target is None:
                self.report.error("no-arrow", "the axes of this linear are unknown here", e.span,
                                  hints=("write linear[d -> e](x), or declare the definition's axes",))  # fmt: skip
                return None
            over = tuple(a for a in node.axes if not self.axes[a].is_sequence)
            made = tuple(a for a in c.target if not self.axes[a].is_sequence)
        kept = tuple(a for a in node.axes if a not in over)
        if set(kept) & set(made):
            both = sorted(set(kept) & set(made))[0]
            self.report.error("axis-mismatch", f"linear brings axis '{both}', which its argument keeps", e.span)
            return None
        return self.linear_nodes(arg, over, made, kept, named, e, c)

    def linear_nodes(self, arg: str, over: tuple[str, ...], made: tuple[str, ...], kept: tuple[str, ...],
                     named: dict[str, T.Arg], e: T.CallExpr, c: Context) -> str | None:  # fmt: skip
        b = c.builder
        fan_in = _product([self.axes[a].size for a in over])
        biased = self.flag(named.get("bias"))
        if biased is None:
            return None
        init = named.get("init")
        if "rank" in named:
            rank = self.whole(named["rank"].value, 1, "bad-size", "a rank")
            if rank is None:
                return None
            name = self.own_axis(f"{c.weight}_rank", rank, c)
            down = self.param("down", (*over, name), fan_in, e.span, c, init)
            if down is None:
                return None
            arg = b.add(N.Linear, "", e.span, arg=arg, weight=down, over=over, to=(name,), axes=(*kept, name))
            over, weight = (name,), self.param("up", (name, *made), rank, e.span, c, init)
        else:
            weight = self.param("weight", (*over, *made), fan_in, e.span, c, init)
        if weight is None:
            return None
        bias = self.param("bias", made, fan_in, e.span, c) if biased else None
        return b.add(N.Linear, "linear", e.span, arg=arg, weight=weight, bias=bias, over=over, to=made,
                     axes=(*kept, *made))  # fmt: skip

    def embed(self, e: T.CallExpr, index: T.Index | None, positional: list[T.Arg], named: dict[str, T.Arg],
              c: Context) -> str | None:  # fmt: skip
        """`embed(x, n)`: the rows of a table with n rows that integers name, over the definition's other axes."""
        if index is not None:
            self.report.error("bad-call", "'embed' names no axes: embed(x, n)", index.span)
            return None
        arg, rows = (
            self.expr(positional[0].value, c),
            self.whole(positional[1].value, 1, "bad-size", "a number of rows"),
        )
        if arg is None or rows is None or not self.weighted("embed", e.span, c):
            return None
        node = c.builder.nodes[arg]
        if node.dtype != "int":
            self.report.error(
                "type-mismatch", f"'embed' takes integers, this is {node.dtype}", positional[0].value.span
            )
            return None
        if c.target is None:
            self.report.error("no-arrow", "the axes that this table brings are unknown here", e.span,
                              hints=("declare the definition's axes: y[t, d] = embed(x, n)",))  # fmt: skip
            return None
        made = tuple(a for a in c.target if not self.axes[a].is_sequence and a not in node.axes)
        name = self.own_axis(f"{c.weight}_rows", rows, c)
        table = self.param("table", (name, *made), None, e.span, c, named.get("init"))
        if table is None:
            return None
        return c.builder.gather(table, arg, name, e.span, "embed")

    def conv(self, e: T.CallExpr, axes: list[tuple[str, T.Name]], positional: list[T.Arg],
             named: dict[str, T.Arg], c: Context) -> str | None:  # fmt: skip
        arg, width = self.expr(positional[0].value, c), self.whole(positional[1].value, 1, "bad-size", "a width")
        biased = self.flag(named.get("bias"))
        if arg is None or width is None or biased is None or not self.weighted("conv", e.span, c):
            return None
        node, axis = c.builder.nodes[arg], axes[0][0]
        if len(axes) != 1 or self.axes[axis].kind != "time" or axis not in node.axes:
            what = "the step of the recurrence" if axis == c.bound else f"over {listed(node.axes)}"
            self.report.error("no-axis", "conv works along one time axis that its argument is over", axes[0][1].span,
                              related=((positional[0].value.span, f"this is {what}"),))  # fmt: skip
            return None
        channels = tuple(a for a in node.axes if a != axis)
        name = self.own_axis(f"{c.weight}_taps", width, c)
        weight = self.param("weight", (*channels, name), width, e.span, c, named.get("init"))
        bias = self.param("bias", channels, width, e.span, c) if biased else None
        if weight is None:
            return None
        return c.builder.add(N.Conv, "conv", e.span, arg=arg, weight=weight, bias=bias, axis=axis, width=width,
                             axes=node.axes)  # fmt: skip


def _product(sizes: list[Size | None]) -> Size:
    total = Size.of(1)
    for s in sizes:
        if s is not None:
            total = s if total == Size.of(1) else Size(op="*", args=(total, s))
    return total


def listed(axes: tuple[str, ...]) -> str:
    """Axes as a message says them."""
    return ", ".join(axes) or "no axis"
