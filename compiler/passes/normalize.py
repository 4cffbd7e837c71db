"""Recurrences to their normal form: a diagonal linear scan with reads, and maps around it.

A body's values are kept as *forms*: a diagonal coefficient for each state as it was when the step started, and a
state-free rest. A sum over a state's axes makes a *read*; a state inside any other function makes a read of its whole
trajectory. Reads are of the state before the update; where all of a state are after it, `reads.py` finds that. States
that depend on each other condense to components, and each component is a scan, or, where it has
no chunk form, a recurrence that runs a token at a time, with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from chunkc.ir import nodes as N
from chunkc.ir.diagnostics import Span
from chunkc.ir.graph import Builder, Graph, gather_axes, moved_axes
from chunkc.ir.ranges import Ranges
from chunkc.passes.algebra import Algebra
from chunkc.passes.place import Placement
from chunkc.passes.reads import Read


@dataclass(frozen=True)
class Normalize:
    """Semantic to normal: every recurrence becomes scans and maps, or a sequential recurrence with a reason."""

    name: str = "normalize"

    def run(self, graph: Graph) -> Graph:
        out = Builder("normal", graph.axes)
        names: dict[str, str] = {}
        finals: list[str] = []
        kept: list[str] = []  # loops over chunks, whose last states are results, too
        for node in graph.nodes:
            reason = _steps(graph, node) if isinstance(node, N.Recur) else ""
            if isinstance(node, N.Recur) and not reason:
                used = [n for n in graph.nodes if isinstance(n, N.Out) and n.arg == node.id]
                moved = node.renamed(names)
                assert isinstance(moved, N.Recur)
                recurrence = _Recurrence(moved, out)
                results = recurrence.run([n.index for n in used])
                finals += recurrence.finals.values()
                named: dict[str, str] = {}  # a value may be several results
                taken = set(names.values())
                for index, id_ in results.items():
                    for user in used:
                        if user.index == index:
                            value = _in_order(out, named.get(id_, id_), user)
                            names[user.id] = value if value in taken else _keep_name(out, value, user.id)
                            named[id_] = named[value] = names[user.id]
                            taken.add(names[user.id])
            elif not (isinstance(node, N.Out) and node.id in names):
                new = node.renamed(names)
                if isinstance(new, N.Recur):
                    new = new.evolve(body=new.body.evolve(level="normal"), reason=reason)
                    kept.append(node.id)
                if isinstance(new, N.Attend):
                    new = new.evolve(body=new.body.evolve(level="normal"))
                names[node.id] = out.like(new)
        return out.graph([(name, names[id_]) for name, id_ in graph.outputs]).pruned(
            [*finals, *(names[id_] for id_ in kept)]
        )


def _steps(graph: Graph, node: N.Recur) -> str:
    """Why a recurrence over no time axis is a loop; empty over one."""
    axis = graph.axis[node.axis]
    if axis.kind == "chunk":
        return f"a step is a whole chunk of {axis.parent}"
    return "" if axis.kind == "time" else f"{axis.name} has a fixed number of steps"


def _in_order(builder: Builder, id_: str, like: N.Out) -> str:
    """The value with its axes in the order that the recurrence's result had."""
    node = builder.nodes[id_]
    if node.axes == like.axes:
        return id_
    return builder.add(N.Map, "", like.span, fn="as", args=(id_,), axes=like.axes, dtype=node.dtype)


def _keep_name(builder: Builder, id_: str, name: str) -> str:
    """Let a computed value bear the spec's name, unless it has one."""
    node = builder.nodes[id_]
    if (
        name in builder.nodes
        or isinstance(node, N.Input | N.Param)
        or any(id_ in n.operands() for n in builder.nodes.values())
    ):
        return id_
    del builder.nodes[id_]
    builder.nodes[name] = node.evolve(id=name)
    for key, value in builder._known.items():
        if value == id_:
            builder._known[key] = name
    return name


@dataclass
class Form:
    """sum over states of diag[s] * s, plus rest (None: 0); values are ids of lifted nodes."""

    diag: dict[str, str] = field(default_factory=dict)
    rest: str | None = None


class _Recurrence:
    """One recurrence: `lift` holds the body's nodes with the time axis, reads standing as State nodes."""

    def __init__(self, node: N.Recur, out: Builder) -> None:
        self.node = node
        self.out = out
        self.lift = Builder("normal", out.axes.values())
        self.algebra = Algebra(self.lift)
        self.ranges = Ranges(self.lift.nodes, Ranges(out.nodes))
        self.reads: dict[str, Read] = {}
        self.carried = {c.name: c for c in node.carried}
        self.forms: dict[str, Form] = {}
        self.finals: dict[str, str] = {}

    def run(self, wanted: list[int]) -> dict[int, str]:
        """Add the recurrence to `out`; the new node for each wanted result."""
        for body_node in self.node.body.nodes:
            self.forms[body_node.id] = self.form(body_node)
        results = self.node.body.outputs
        values = {i: self.value(self.forms[results[i][1]], results[i][1]) for i in wanted if i < len(results)}
        next_ = {c.name: self.forms[c.result] for c in self.node.carried}
        place = Placement(self.node, self.out, self.lift, self.algebra, self.reads, next_)
        self.finals = place.run(list(values.values()))
        out = {i: place.emit(id_) for i, id_ in values.items()}
        for i in wanted:
            if i >= len(results):
                out[i] = self.finals[self.node.carried[i - len(results)].name]
        return out

    # -- forms -------------------------------------------------------------------------------------------------------

    def form(self, node: N.AnyNode) -> Form:
        if isinstance(node, N.State):
            return Form({node.name: self.lift.const(1.0)})
        if isinstance(node, N.Capture):
            outer = self.out.nodes[node.outer]
            id_ = self.lift.add(N.Capture, node.outer, node.span, outer=node.outer, axes=outer.axes, dtype=outer.dtype)
            return Form(rest=id_)
        args = [self.forms[a] for a in node.operands()]
        if isinstance(node, N.Map):
            linear = self.linear_map(node, args)
            if linear is not None:
                return linear
        if isinstance(node, N.Map) and node.fn == "exp" and args[0].rest is not None and not args[0].diag:
            return Form(rest=self.exponential(args[0].rest, node))
        if isinstance(node, N.Reduce) and node.fn == "sum" and node.chunk is None and args[0].diag:
            return self.sum(node, args[0])
        return Form(rest=self.lifted(node, [self.value(f, a) for f, a in zip(args, node.operands())]))

    def exponential(self, arg: str, node: N.Map) -> str:
        """exp(a + b) as exp(a) * exp(b) where a and b run over different axes and neither factor can exceed 1."""
        groups: dict[frozenset[str], dict[tuple[str, ...], float]] = {}
        for sign, term in self.ranges.terms(arg):
            poly = groups.setdefault(frozenset(self.lift.nodes[term].axes), {})
            poly[(term,)] = poly.get((term,), 0.0) + sign
        parts = [self.algebra.build(p) for p in groups.values()]
        if len(parts) == 1 or any(self.ranges[p][1] > 0 for p in parts):
            return self.lift.map("exp", arg, span=node.span, hint=node.id)
        out = self.lift.map("exp", parts[0], span=node.span)
        for p in parts[1:]:
            out = self.lift.map("*", out, self.lift.map("exp", p, span=node.span), span=node.span)
        return out

    def linear_map(self, node: N.Map, args: list[Form]) -> Form | None:
        """The form of a map that is linear in the states; None if it is not, or there are none in it."""
        if not any(a.diag for a in args):
            return None
        fn, span = node.fn, node.span
        if fn in ("+", "-"):
            return self.join(args[0], args[1], fn, span)
        if fn == "neg":
            return self.join(Form(), args[0], "-", span)
        if fn == "as" and set(node.axes) == {a for s in args[0].diag for a in self.carried[s].axes}:
            return args[0]
        if fn == "*" and not (args[0].diag and args[1].diag):
            a, factor = (args[0], args[1].rest) if args[0].diag else (args[1], args[0].rest)
            return self.scaled(a, factor, "*", span)
        if fn == "/" and not args[1].diag:
            return self.scaled(args[0], args[1].rest, "/", span)
        if fn == "where" and not args[0].diag and args[0].rest is not None:
            return self.choose(args[0].rest, args[1], args[2], span)
        return None

    def join(self, a: Form, b: Form, fn: str, span: Span | None) -> Form:
        def both(x: str | None, y: str | None) -> str | None:
            if y is None:
                return x
            if x is None:
                return y if fn == "+" else self.lift.map("neg", y, span=span)
            return self.lift.map(fn, x, y, span=span)

        diag = {s: both(a.diag.get(s), b.diag.get(s)) for s in [*a.diag, *(s for s in b.diag if s not in a.diag)]}
        return Form({s: x for s, x in diag.items() if x is not None}, both(a.rest, b.rest))

    def scaled(self, a: Form, factor: str | None, fn: str, span: Span | None) -> Form:
        if factor is None:  # times 0
            return Form()
        diag = {}
        for s, c in a.diag.items():
            one = fn == "*" and self.algebra.expand(c) == {(): 1.0}
            diag[s] = factor if one else self.lift.map(fn, c, factor, span=span)
        return Form(diag, self.lift.map(fn, a.rest, factor, span=span) if a.rest is not None else None)

    def choose(self, cond: str, a: Form, b: Form, span: Span | None) -> Form:
        zero = self.lift.const(0.0)

        def pick(x: str | None, y: str | None) -> str:
            return self.lift.map("where", cond, x or zero, y or zero, span=span)

        diag = {s: pick(a.diag.get(s), b.diag.get(s)) for s in dict.fromkeys([*a.diag, *b.diag])}
        return Form(diag, pick(a.rest, b.rest) if a.rest or b.rest else None)

    def sum(self, node: N.Reduce, a: Form) -> Form:
        """sum[over] of a form: reads of the states, and contractions of the rest."""
        terms: list[str] = []
        inside = set(node.over)
        for state, coefficient in a.diag.items():
            over = tuple(x for x in node.over if x in self.carried[state].axes)
            if len(over) < len(node.over):  # an axis of the coefficient alone: no read of this shape
                whole = self.lift.map("*", coefficient, self.read(state, (), None, node.span), span=node.span)
                terms.append(self.contract(whole, node))
                continue
            for query, outside in self.algebra.grouped(self.algebra.expand(coefficient), inside):
                read = self.read(state, over, query, node.span)
                terms.append(self.lift.map("*", self.algebra.build(outside), read, span=node.span)
                             if outside != {(): 1.0} else read)  # fmt: skip
        if a.rest is not None:
            for arg, outside in self.algebra.grouped(self.algebra.expand(a.rest), inside):
                part = self.contract(arg, node)
                terms.append(self.lift.map("*", part, self.algebra.build(outside), span=node.span)
                             if outside != {(): 1.0} else part)  # fmt: skip
        if not terms:  # everything cancels
            return Form()
        out = terms[0]
        for t in terms[1:]:
            out = self.lift.map("+", out, t, span=node.span)
        return Form(rest=out)

    def contract(self, arg: str, node: N.Reduce) -> str:
        """sum[over](arg); axes that arg lacks are brought by repetition first."""
        axes = self.lift.nodes[arg].axes
        if not set(node.over) <= set(axes):
            axes = (*axes, *(a for a in node.over if a not in axes))
            arg = self.lift.add(N.Map, "", node.span, fn="as", args=(arg,), axes=axes)
        rest = tuple(a for a in axes if a not in node.over)
        return self.lift.add(N.Reduce, "sum", node.span, fn="sum", arg=arg, over=node.over, axes=rest)

    def read(self, state: str, over: tuple[str, ...], arg: str | None, span: Span | None) -> str:
        """The lifted node for a read of a state before the update."""
        arg = arg or self.lift.const(1.0)
        read = Read(state, over, arg)
        for id_, known in self.reads.items():
            if known == read:
                return id_
        axes = [a for a in self.carried[state].axes if a not in over]
        axes += [a for a in self.lift.nodes[arg].axes if a not in over and a not in axes and a != self.node.axis]
        name = f"{state}_before" if not over else f"{state}_read"
        id_ = self.lift.add(N.State, name, span, name=f"{state} {len(self.reads)}", axes=(self.node.axis, *axes))
        self.reads[id_] = read
        return id_

    def value(self, form: Form, body_id: str) -> str:
        """The lifted node of a form: states in it become reads of their trajectories."""
        parts = []
        span = self.node.body[body_id].span
        for state, coefficient in form.diag.items():
            read = self.read(state, (), None, span)
            one = self.algebra.expand(coefficient) == {(): 1.0}
            parts.append(read if one else self.lift.map("*", coefficient, read, span=span))
        if form.rest is not None or not parts:
            parts.append(form.rest if form.rest is not None else self.lift.const(0.0))
        out = parts[0]
        for p in parts[1:]:
            out = self.lift.map("+", out, p, span=span)
        wanted = self.node.body[body_id].axes
        have = self.lift.nodes[out].axes
        if not set(wanted) <= set(have):  # a value that is 0 or constant over some axis
            axes = (*(a for a in have if a not in wanted), *wanted)
            out = self.lift.add(N.Map, "", span, fn="as", args=(out,), axes=axes)
        return out

    def lifted(self, node: N.AnyNode, args: list[str]) -> str:
        """The node over lifted operands, with the time axis where one of them has it."""
        moved = node.renamed(dict(zip(node.operands(), args)))
        timed = any(self.node.axis in self.lift.nodes[a].axes for a in args) or (
            isinstance(node, N.Coord) and node.axis == self.node.axis
        )
        if isinstance(moved, N.Map) and moved.fn != "as":
            return self.lift.map(moved.fn, *moved.args, span=node.span, hint=node.id)
        axes = ((self.node.axis,) if timed else ()) + tuple(a for a in node.axes if a != self.node.axis)
        if isinstance(moved, N.Gather):
            arg, index = (self.lift.nodes[a].axes for a in args)
            axes = gather_axes(arg, index, moved.axis)
        elif args and (moved_axes_ := moved_axes(node, self.lift.nodes[args[0]].axes)) is not None:
            axes = moved_axes_
        return self.lift.like(moved.evolve(axes=axes))
