"""Calls of layers and ops: the callee's graph becomes part of the caller's.

Its axes bind by name, its parameters become the caller's sizes, its weights and states bear the name of the definition
that the call stands in."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from chunkc.dsl import tree as T
from chunkc.dsl.compose import Composed
from chunkc.dsl.scope import AxisName, Scope, Work
from chunkc.dsl.sizes import Context
from chunkc.dsl.weights import listed
from chunkc.ir import nodes as N
from chunkc.ir.axes import Axis, Size, SizeError
from chunkc.ir.diagnostics import Report, Span
from chunkc.ir.graph import Unit
from chunkc.ir.ranges import Ranges
from chunkc.ir.rewrite import Rebinding


@dataclass
class Call:
    """One call that is being checked: what the callee's axes and parameters are in the caller."""

    unit: Unit
    span: Span
    prefix: str
    axes: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, Size] = field(default_factory=dict)


class UnitCalls(Composed):
    """Checks calls of layers and ops; a subclass checks the expressions in them. `called` are those that were."""

    def __init__(self, scope: Scope, report: Report, axes: dict[str, Axis], work: Work) -> None:
        super().__init__(scope, report, axes, work)
        self.called: list[Unit] = []

    def call_unit(self, unit: Unit, e: T.CallExpr, index: T.Index | None, c: Context) -> str | None:
        if c.outer is not None or c.initial:
            self.report.error("bad-call", f"'{unit.name}' is called outside recurrences and initial values", e.span)
            return None
        if c.weight is None:
            self.report.error("hidden-weight", f"'{unit.name}' is called only in a definition", e.span)
            return None
        if len(unit.graph.outputs) != 1:
            self.report.error("bad-call", f"'{unit.name}' has {len(unit.graph.outputs)} outputs: only one can be "
                              "called for", e.span, related=((unit.span, "declared here"),))  # fmt: skip
            return None
        self.work.spend(e.span, len(unit.graph.nodes))
        self.called.append(unit)
        call = Call(unit, e.span, c.weight)
        arguments = self.unit_arguments(call, e, c)
        if arguments is None or not self.bind_named_axes(call, index) or not self.bind_axes(call, arguments, c):
            return None
        hidden = [n for n in unit.graph.of_kind(N.Param) if n.id not in arguments]
        if hidden and not self.weighted(unit.name, e.span, c):
            return None
        if not self.bind_sizes(call, e) or not self.bring_axes(call):
            return None
        return self.copied(call, arguments, c)

    # -- arguments ---------------------------------------------------------------------------------------------------

    def unit_arguments(self, call: Call, e: T.CallExpr, c: Context) -> dict[str, tuple[str, T.Expr]] | None:
        """The caller's values by the callee's nodes: inputs in order, then an op's params; parameters by keyword."""
        unit = call.unit
        wanted = [n.id for name in unit.inputs for n in unit.graph.of_kind(N.Input) if n.name == name]
        if unit.kind == "op":
            wanted += [n.id for n in unit.graph.of_kind(N.Param)]
        given = [a for a in e.args if a.name is None]
        if len(given) != len(wanted):
            self.report.error("bad-call", f"'{unit.name}' takes {len(wanted)} inputs, not {len(given)}", e.span,
                              related=((unit.span, "declared here"),))  # fmt: skip
            return None
        for a in e.args:
            if a.name is not None and not self.unit_parameter(call, a):
                return None
        out: dict[str, tuple[str, T.Expr]] = {}
        for id_, a in zip(wanted, given):
            value = self.expr(a.value, c)
            if value is None:
                return None
            out[id_] = (value, a.value)
        return out

    def unit_parameter(self, call: Call, arg: T.Arg) -> bool:
        assert arg.name is not None
        param = next((p for p in call.unit.params if p.name == arg.name.text), None)
        if param is None or param.name in call.sizes:
            self.report.error("bad-call", f"'{call.unit.name}' has no parameter '{arg.name.text}' left", arg.span,
                              related=((call.unit.span, "declared here"),))  # fmt: skip
            return False
        if param.type == "int":
            size = self.whole(arg.value, -(2**31), "bad-size", f"'{param.name}'")
        else:
            size = self.number(arg.value)
        if size is None:
            return False
        if self.truth(size) != (param.type == "bool"):
            self.report.error("type-mismatch", f"'{param.name}' of '{call.unit.name}' is {param.type}, this is not",
                              arg.value.span, related=((call.unit.span, "declared here"),))  # fmt: skip
            return False
        call.sizes[param.name] = size
        return True

    def truth(self, size: Size) -> bool:
        """Whether a number is a truth value."""
        setting = self.scope.names.get(str(size.value)) if size.op == "param" else None
        return isinstance(size.value, bool) if setting is None else getattr(setting, "type", "") == "bool"

    # -- axes and sizes ----------------------------------------------------------------------------------------------

    def bind_named_axes(self, call: Call, index: T.Index | None) -> bool:
        """`Mixer[e = t](x)`: the callee's e is the caller's t."""
        for ix in index.entries if index is not None else ():
            symbol = self.scope.names.get(ix.at.text) if isinstance(ix.at, T.Name) else None
            if ix.at is None or ix.within is not None or (index is not None and index.to is not None):
                self.report.error("bad-call", "a call binds axes: Mixer[e = t](x)", ix.span)
                return False
            if not isinstance(symbol, AxisName):
                self.report.error("not-an-axis", "a callee's axis is bound to an axis", ix.at.span)
                return False
            if ix.name.text not in call.unit.graph.axis:
                self.report.error("not-an-axis", f"'{call.unit.name}' has no axis '{ix.name.text}'", ix.name.span,
                                  related=((call.unit.span, "declared here"),))  # fmt: skip
                return False
            call.axes[ix.name.text] = symbol.axis.name
        return True

    def bind_axes(self, call: Call, arguments: dict[str, tuple[str, T.Expr]], c: Context) -> bool:
        """The callee's axes that its inputs have, by name; the arguments have these and no others."""
        graph = call.unit.graph
        for id_, (value, e) in arguments.items():
            have = c.builder.nodes[value].axes
            for a in graph[id_].axes:
                bound = call.axes.setdefault(a, a)
                if bound not in have and (bound not in self.axes or not self.fits(graph.axis[a], self.axes[bound])):
                    self.report.error("axis-mismatch", f"'{call.unit.name}' reads this over {listed(graph[id_].axes)}: "
                                      f"it has no axis '{bound}'", e.span,
                                      related=((graph[id_].span or call.unit.span, "the input"),),
                                      hints=(f"bind one: {call.unit.name}[{a} = ...](...)",))  # fmt: skip
                    return False
            extra = [a for a in have if a not in {call.axes[x] for x in graph[id_].axes}]
            if extra:
                self.report.error("axis-mismatch", f"this is over {listed(have)}: '{call.unit.name}' has no axis "
                                  f"'{extra[0]}' for it", e.span,
                                  related=((graph[id_].span or call.unit.span, "the input"),))  # fmt: skip
                return False
        for a, bound in call.axes.items():
            if not self.fits(graph.axis[a], self.axes[bound]):
                self.report.error("axis-mismatch", f"'{bound}' is {self.axes[bound].kind}, and '{a}' of "
                                  f"'{call.unit.name}' is {graph.axis[a].kind}", call.span)  # fmt: skip
                return False
            parent = graph.axis[a].parent
            if parent is not None and self.axes[bound].parent != call.axes.get(parent):
                self.report.error("axis-mismatch", f"'{a}' of '{call.unit.name}' divides its '{parent}', and '{bound}' "
                                  f"does not divide '{call.axes.get(parent, parent)}'", call.span,
                                  related=((call.unit.span, "declared here"),))  # fmt: skip
                return False
            first = next(b for b, other in call.axes.items() if other == bound)
            apart = graph.axis[a].is_sequence and graph.axis[a].space != graph.axis[first].space
            if first != a and not apart:  # a tensor over both would have the same axis twice
                self.report.error("axis-mismatch", f"'{first}' and '{a}' of '{call.unit.name}' are both bound to "
                                  f"'{bound}'", call.span, related=((call.unit.span, "declared here"),),
                                  hints=(f"declare a second axis, 'axes {{ {bound}2 = {bound} }}', and bind it to "
                                         f"'{a}'",))  # fmt: skip
                return False
        return True

    @staticmethod
    def fits(inner: Axis, outer: Axis) -> bool:
        return inner.kind == outer.kind

    def bind_sizes(self, call: Call, e: T.CallExpr) -> bool:
        """The callee's parameters: given, the size of an axis that is bound, or their default."""
        for a, bound in call.axes.items():
            size, here = call.unit.graph.axis[a].size, self.axes[bound].size
            if size is not None and here is not None and size.op == "param":
                call.sizes.setdefault(str(size.value), here)
        for p in call.unit.params:
            if p.name not in call.sizes and p.default is None:
                self.report.error("bad-call", f"'{call.unit.name}' needs '{p.name}'", e.span,
                                  related=((call.unit.span, "declared here"),))  # fmt: skip
                return False
            if p.name not in call.sizes:
                call.sizes[p.name] = Size(op="const", value=p.default)  # type: ignore[arg-type]
        for a, bound in call.axes.items():
            size, here = call.unit.graph.axis[a].size, self.axes[bound].size
            if size is None or here is None:
                continue
            wanted = size.substituted(call.sizes)
            if not _same(wanted, here):
                self.report.error("bad-size", f"'{a}' of '{call.unit.name}' has size {wanted.text()}, and '{bound}' "
                                  f"has {here.text()}", e.span,
                                  hints=("give the callee's parameters, so that the sizes are the same",))  # fmt: skip
                return False
        return True

    def bring_axes(self, call: Call) -> bool:
        """Axes of the caller for those of the callee that no argument has."""
        graph = call.unit.graph
        for axis in graph.axes:
            if axis.name in call.axes:
                continue
            if axis.kind in ("time", "unordered") and axis.space not in call.axes:
                self.report.error("bad-call", f"'{call.unit.name}' works on axis '{axis.name}', which no argument has",
                                  call.span)  # fmt: skip
                return False
            name = f"{call.prefix}_{axis.name}"
            while name in self.axes or name in self.scope.names:
                name += "_"
            call.axes[axis.name] = name
            space = call.axes[axis.space] if axis.space != axis.name else name
            if axis.space != axis.name and axis.space in call.axes and call.axes[axis.space] in self.axes:
                space = self.axes[call.axes[axis.space]].space
            size = None if axis.size is None else axis.size.substituted(call.sizes)
            if size is not None and not self.defined(size, call.span):
                return False
            parent = None if axis.parent is None else call.axes[axis.parent]
            self.axes[name] = Axis(name=name, kind=axis.kind, size=size, space=space, parent=parent)
        return True

    # -- the copy ----------------------------------------------------------------------------------------------------

    def copied(self, call: Call, arguments: dict[str, tuple[str, T.Expr]], c: Context) -> str | None:
        """The callee's nodes in the caller's graph; the node of its output."""
        graph, b = call.unit.graph, c.builder
        names: dict[str, str] = {}
        for id_, (value, e) in arguments.items():
            brought = self.brought_input(call, graph[id_], value, e, c)
            if brought is None:
                return None
            names[id_] = brought
        rebinding = Rebinding(call.axes, call.sizes, call.prefix, tuple(self.axes.values()))
        for node in graph.nodes:
            if node.id in names:
                continue
            names[node.id] = b.like(rebinding.node(node.renamed(names)), f"{call.prefix}_{node.id}")
        return names[graph.outputs[0][1]]

    def brought_input(self, call: Call, node: N.AnyNode, value: str, e: T.Expr, c: Context) -> str | None:
        """An argument over the input's axes, of its type and within its declared range."""
        b = c.builder
        have = b.nodes[value]
        if have.dtype != node.dtype and not (have.dtype == "int" and node.dtype == "float"):
            self.report.error("type-mismatch", f"'{call.unit.name}' reads this as {node.dtype}, it is {have.dtype}",
                              e.span)  # fmt: skip
            return None
        least, most = (getattr(node, f, None) for f in ("low", "high"))
        low, high = -math.inf, math.inf
        if least is not None or most is not None:  # finding a range walks all that the argument is made of
            self.work.spend(e.span, len(b.nodes) // 8)
            low, high = Ranges(b.nodes)[value]
        if least is not None and low < least or most is not None and high > most:
            self.report.error("bad-range", f"'{call.unit.name}' declares this input in [{least:g}, {most:g}], which is "
                              "not proven here", e.span, related=((node.span or call.unit.span, "the input"),),
                              hints=("clamp it, or declare the range of what it is made of",))  # fmt: skip
            return None
        axes = tuple(call.axes[a] for a in node.axes)
        if have.axes == axes:
            return value
        return b.add(N.Map, "", e.span, fn="as", args=(value,), axes=axes, dtype=have.dtype)


def _same(a: Size, b: Size) -> bool:
    if a == b:
        return True
    try:
        return not a.params() and not b.params() and a.evaluate({}) == b.evaluate({})
    except SizeError:
        return False
