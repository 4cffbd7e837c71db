"""The chunk form: a scan and its gradient as graphs over tiles of tokens (`docs/derivation.md`).

A graph at the normal level goes in, with scans, adjoints and gate gradients; a graph at the level `chunked` comes
out. What a query reads has two parts: of the state at its tile's edge, and of the writes inside the tile. For the
latter each pair of tokens is taken in the block whose middle lies between them, so that either token's factor is an
exponential of a sum of log-gates from itself to the middle. A reversed scan is the same with earlier and later
exchanged.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from chunkc.ir import nodes as N
from chunkc.ir import tiles as T
from chunkc.ir.axes import Axis, Size
from chunkc.ir.graph import Builder, Graph
from chunkc.passes.regions import (
    SIDES,
    Side,
    inputs,
    other,
    renumbered,
    result_names,
    side_axes,
    state_axes,
    with_regions,
)

Half = Literal["earlier", "later"]
TILE = 64  # tokens
SMALL = 2.0**-40  # the least gate that a gradient is divided by


@dataclass(frozen=True)
class Chunk:
    """Gives each scan its `tiles`, which also puts out the states at the tiles' edges, and its `tiles_backward`, which
    takes those in place of `initial`."""

    tile: int = TILE
    name: str = "chunk"

    def run(self, graph: Graph) -> Graph:
        return with_regions(graph, self.derive)

    def derive(self, graph: Graph, scan: N.Scan) -> dict[str, Graph]:
        assert scan.backward is not None, "gradients are derived before scans are cut into tiles"
        return {
            "tiles": Tiler(forward(graph, scan), self.tile).graph(saved=False),
            "tiles_backward": Tiler(scan.backward, self.tile).graph(saved=True),
        }


def forward(graph: Graph, scan: N.Scan) -> Graph:
    """The scan by itself: its operands and `initial` as inputs, its results as outputs."""
    b = Builder("normal", graph.axes)
    operands = inputs(b, graph, scan)
    initial = b.add(N.Input, "initial", name="initial", axes=state_axes(scan))
    alone = renumbered(scan, operands, initial).evolve(id=b.fresh(f"scan_{scan.name}"))
    b.nodes[alone.id] = alone
    names = result_names(scan, operands)
    outs = [b.add(N.Out, name, scan.span, arg=alone.id, index=n, axes=scan.result_axes(n))
            for n, name in enumerate(names)]  # fmt: skip
    return b.graph(zip(names, outs))


@dataclass(frozen=True)
class Names:
    """The axes of tiles: a tile, a place in it and a second name of that, a block, the places in its two halves."""

    tile: str
    place: str
    column: str
    block: str
    earlier: str
    later: str

    def half(self, half: Half) -> str:
        return self.earlier if half == "earlier" else self.later


def tile_axes(graph: Graph, time: str, size: int) -> tuple[Names, tuple[Axis, ...]]:
    """Axes under names that the graph does not have."""

    def fresh(name: str) -> str:
        while name in graph.axis:
            name += "_"
        return name

    names = Names(*(fresh(n) for n in ("tile", "place", "column", "block", "earlier", "later")))
    place = Axis(name=names.place, kind="size", size=Size.of(size), space=names.place)
    return names, (
        Axis(name=names.tile, kind="chunk", space=names.tile, parent=time),
        place,
        place.evolve(name=names.column),
        *(Axis(name=n, kind="size", space=n) for n in (names.block, names.earlier, names.later)),
    )


@dataclass
class Pairs:
    """A halving under construction: its body, and the parts that go to each total."""

    body: Builder
    totals: list[str] = field(default_factory=list)
    parts: list[T.Part] = field(default_factory=list)

    def add(self, total: str, half: Half, value: str) -> None:
        if total not in self.totals:
            self.totals.append(total)
        part = T.Part(total=self.totals.index(total), half=half, value=value)
        if part not in self.parts:
            self.parts.append(part)


@dataclass(frozen=True)
class Read:
    """What a query reads: of the state at the edge, and in each block of the writes in the other half."""

    edge: str
    half: Half
    parts: tuple[str, ...]


def since(scan: N.Scan) -> Literal["before", "upto"]:
    """The gates between an earlier state and a token's read of it: its own gate too, if that comes before the read.

    In a reversed scan this is so for writes, which meet the token's own gate if they come before it."""
    return "before" if scan.start == "read" else "upto"


class Tiler:
    """Builds the graph over tiles of a graph at the normal level."""

    def __init__(self, source: Graph, size: int) -> None:
        self.source = source
        scan = source.of_kind(N.Scan)[0]
        self.time, self.batch = scan.axis, scan.batch
        self.state = state_axes(scan)
        self.names, axes = tile_axes(source, scan.axis, size)
        self.b = Builder("chunked", (*source.axes, *axes))
        self.pairs = Pairs(Builder("chunked", self.b.axes.values()))
        self.done: dict[str, str] = {}
        self.edges: dict[str, str] = {}
        self.pending: dict[str, int] = {}
        self.raised = ""  # the gate that is raised to `SMALL` while its gradient is taken

    def graph(self, saved: bool) -> Graph:
        """`saved`: the states at tiles' edges are an input; else they are an output."""
        for node in self.source.of_kind(N.Input):
            if saved and node.id == "initial":
                self.saved_states()
            else:
                self.done[node.id] = self.b.add(N.Input, node.id, node.span, name=node.name, axes=node.axes)
        for scan in self.source.of_kind(N.Scan):
            self.tile_operands(scan)
        for node in self.source.nodes:
            if isinstance(node, N.Scan):
                if node.i or node.j:
                    self.carry(node)
                else:
                    self.vector(node)
            elif isinstance(node, N.Out) and node.id not in self.done:
                self.read_out(node)
            elif isinstance(node, N.Map | N.Const):
                self.done[node.id] = self.b.like(node.renamed(self.done))
        self.gates(self.source.of_kind(N.GateGradient))
        outputs = [(name, self.finished(id_)) for name, id_ in self.source.outputs]
        if not saved:
            outputs += [("states", self.edges[scan.id]) for scan in self.source.of_kind(N.Scan)]
        return self.b.graph(outputs).pruned()

    def finished(self, id_: str) -> str:
        """A result back in the order of tokens, if it is over tiles."""
        value = self.done[id_]
        axes = self.b.nodes[value].axes
        if self.names.place not in axes:
            return value
        rest = tuple(a for a in axes if a not in (self.names.tile, self.names.place))
        return self.b.add(T.Untile, self.b.nodes[value].id + "_tokens", arg=value, axis=self.time,
                          over=(self.names.tile, self.names.place), axes=(self.time, *rest))  # fmt: skip

    def tile_operands(self, scan: N.Scan) -> None:
        """Cut a scan's operands into tiles, before anything is made of them."""
        if scan.i or scan.j:
            for side in SIDES:
                self.gate(scan, side)
            for arg in scan.arguments()[len(scan.gates) :]:
                self.tile(arg)

    # -- pieces --------------------------------------------------------------------------------------------------------

    def tile(self, id_: str, log: Literal["", "given", "zero", "small"] = "", pad: float = 0.0) -> str:
        node = self.b.nodes[self.done[id_]]
        rest = tuple(a for a in node.axes if a != self.time and a not in self.batch)
        axes = (self.names.tile, *self.batch, self.names.place, *rest)
        hint = f"log_{node.id}" if log else f"{node.id}_tiles"
        return self.b.add(T.Tile, hint, node.span, arg=node.id, axis=self.time, to=(self.names.tile, self.names.place),
                          log=log, pad=pad, axes=axes)  # fmt: skip

    def gate(self, scan: N.Scan, side: Side) -> str | None:
        """The log-gate of a side, over tiles."""
        for g in scan.gates:
            over_j = bool(set(self.source[g.arg].axes) & set(scan.j))
            if over_j == (side == "j"):
                return self.tile(g.arg, "given" if g.log else "small" if g.arg == self.raised else "zero")
        return None

    def span(self, b: Builder, arg: str, fn: str, axis: str, hint: str = "") -> str:
        axes = b.nodes[arg].axes
        axes = tuple(a for a in axes if a != axis) if fn == "whole" else axes
        return b.add(T.Span, hint, arg=arg, fn=fn, axis=axis, axes=axes)

    def decay(self, scan: N.Scan) -> str | None:
        """The decay of the state over a whole tile."""
        gates = [g for g in (self.gate(scan, side) for side in SIDES) if g is not None]
        sums = [self.span(self.b, g, "whole", self.names.place) for g in gates]
        if len(sums) < 2:
            return self.b.map("exp", sums[0], hint="decay") if sums else None
        return self.b.map("*", *(self.b.map("exp", x, hint="exp") for x in sums), hint="decay")

    def near(self, scan: N.Scan, side: Side, to_end: bool) -> str | None:
        """The decay between a token and an edge of its tile."""
        gate = self.gate(scan, side)
        if gate is None:
            return None
        sums = self.span(self.b, gate, "after" if to_end else since(scan), self.names.place)
        return self.b.map("exp", sums, hint=f"{'to_end' if to_end else 'from_start'}_{side}")

    def at_edge(self, scan: N.Scan, arg: str, side: Side, to_end: bool) -> str:
        """An operand, decayed to an edge of its tile."""
        x, factor = self.tile(arg), self.near(scan, side, to_end)
        hint = f"{arg}_{'to_end' if to_end else 'from_start'}"
        return x if factor is None else self.b.map("*", x, factor, hint=hint)

    def contract(self, b: Builder, left: str, right: str, over: Iterable[str], hint: str = "") -> str:
        """The sum over axes, places before sides."""
        over = tuple(over)
        both = dict.fromkeys((*b.nodes[left].axes, *b.nodes[right].axes))
        places = [self.names.block, self.names.place, self.names.later, self.names.column, self.names.earlier]
        first = [self.names.tile, *self.batch, *places]
        ordered = [a for a in first if a in both] + [a for a in both if a not in first]
        axes = tuple(a for a in ordered if a not in over)
        return b.add(T.Contract, hint, left=left, right=right, over=over, axes=axes)

    # -- across tiles --------------------------------------------------------------------------------------------------

    def carry(self, scan: N.Scan) -> None:
        """The state at tiles' edges. A write decays to the edge that the state goes to."""
        if scan.id in self.edges:
            return
        update = None
        for w in scan.writes:
            left = self.at_edge(scan, w.i, "i", to_end=not scan.reverse)
            right = self.at_edge(scan, w.j, "j", to_end=not scan.reverse)
            term = self.contract(self.b, left, right, [self.names.place], "update")
            update = term if update is None else self.b.map("+", update, term, hint="update")
        assert update is not None
        self.carried(scan, self.decay(scan), update)

    def carried(self, scan: N.Scan, decay: str | None, update: str) -> None:
        assert scan.initial is not None
        node = self.b.add(T.Carry, "carry", scan.span, axis=self.names.tile, i=scan.i, j=scan.j, decay=decay,
                          update=update, initial=self.done[scan.initial], algebra=scan.algebra,
                          reverse=scan.reverse)  # fmt: skip
        axes = (self.names.tile, *self.state)
        edges = "ends" if scan.reverse else "states"
        self.edges[scan.id] = self.b.add(N.Out, edges, scan.span, arg=node, index=0, axes=axes)
        last = "d_initial" if scan.reverse else "last"
        self.done[f"{scan.id}/last"] = self.b.add(N.Out, last, scan.span, arg=node, index=1, axes=self.state)

    def saved_states(self) -> None:
        """The forward scan's states at tiles' edges, as an input."""
        states = self.b.add(N.Input, "states", name="states", axes=(self.names.tile, *self.state))
        self.edges = {s.id: states for s in self.source.of_kind(N.Scan) if not s.reverse}

    def read_out(self, node: N.Out) -> None:
        """A result of a scan: a query's read, or the last state."""
        scan = self.source[node.arg]
        assert isinstance(scan, N.Scan)
        if node.index == len(scan.queries):
            self.done[node.id] = self.done[f"{scan.id}/last"]
            return
        query = scan.queries[node.index]
        read = self.read(scan, query.side, query.arg, node.id)
        read = read if scan.start == "read" else self.with_own(scan, query, read)
        self.done[node.id] = read.edge
        if scan.gates:
            self.add_parts(node.id, read.edge, [(read.half, part) for part in read.parts])
            return
        for part in read.parts:
            self.done[node.id] = self.b.map("+", self.done[node.id], part, hint=node.id)

    def add_parts(self, id_: str, total: str, parts: list[tuple[Half, str]]) -> None:
        """A node of the source is this total with these parts: a result of the halving that is yet to be closed."""
        for half, part in parts:
            self.pairs.add(total, half, part)
        self.pending[id_] = self.pairs.totals.index(total)

    def read(self, scan: N.Scan, side: Side, arg: str, hint: str = "") -> Read:
        """The sum over one side of the operand times the state."""
        o = other(side)
        left = self.at_edge(scan, arg, side, to_end=scan.reverse)
        factor = self.near(scan, o, to_end=scan.reverse)
        edge = self.contract(self.b, left, self.edges[scan.id], side_axes(scan, side), "" if factor else hint)
        edge = edge if factor is None else self.b.map("*", edge, factor, hint=hint)
        half: Half = "earlier" if scan.reverse else "later"
        inside = self.inside if scan.gates else self.ungated
        return Read(edge, half, tuple(inside(scan, side, arg, w) for w in scan.writes))

    def with_own(self, scan: N.Scan, query: N.Query, read: Read) -> Read:
        """A read with the token's own writes: these pass no gate."""
        edge = read.edge
        for w in scan.writes:
            near, far = (w.i, w.j) if query.side == "i" else (w.j, w.i)
            product = self.b.map("*", self.tile(query.arg), self.tile(near))
            over = side_axes(scan, query.side)
            axes = tuple(a for a in self.b.nodes[product].axes if a not in over)
            own = self.b.add(N.Reduce, "own", fn="sum", arg=product, over=over, axes=axes) if over else product
            edge = self.b.map("+", edge, self.b.map("*", own, self.tile(far)), hint=edge)
        return Read(edge, read.half, read.parts)

    # -- inside a tile -------------------------------------------------------------------------------------------------

    def ungated(self, scan: N.Scan, side: Side, arg: str, write: N.Write) -> str:
        """What the operand reads of a write inside the tile, without a gate between them: a masked product."""
        near, far = (write.i, write.j) if side == "i" else (write.j, write.i)
        later, earlier = (near, arg) if scan.reverse else (arg, near)
        column = self.as_column(self.tile(earlier))
        score = self.contract(self.b, self.tile(later), column, side_axes(scan, side))
        below = self.b.add(T.Strict, "score", arg=score, row=self.names.place, column=self.names.column,
                           axes=self.b.nodes[score].axes)  # fmt: skip
        if not scan.reverse:
            return self.contract(self.b, below, self.as_column(self.tile(far)), [self.names.column])
        part = self.contract(self.b, below, self.tile(far), [self.names.place])
        return self.rename(part, self.names.column, self.names.place)

    def as_column(self, id_: str) -> str:
        return self.rename(id_, self.names.place, self.names.column)

    def rename(self, id_: str, source: str, target: str) -> str:
        axes = tuple(target if a == source else a for a in self.b.nodes[id_].axes)
        return self.b.add(N.Rename, arg=id_, source=source, target=target, axes=axes)

    def half(self, outer: str, half: Half, hint: str = "") -> str:
        """A half of each block of a value, in the halving's body."""
        to = {self.names.place: (self.names.block, self.names.half(half))}
        axes = tuple(x for a in self.b.nodes[outer].axes for x in to.get(a, (a,)))
        return self.pairs.body.add(T.Half, hint, self.b.nodes[outer].span, outer=outer, half=half, axes=axes)

    def to_middle(self, scan: N.Scan, side: Side, half: Half) -> str | None:
        """The decay between a token and the middle of its block."""
        gate = self.gate(scan, side)
        if gate is None:
            return None
        fn = "after" if half == "earlier" else since(scan)
        sums = self.span(self.pairs.body, self.half(gate, half), fn, self.names.half(half))
        return self.pairs.body.map("exp", sums, hint=f"{'low' if half == 'earlier' else 'up'}_{side}")

    def in_half(self, arg: str, half: Half) -> str:
        return self.half(self.tile(arg), half, f"{arg}_{'low' if half == 'earlier' else 'up'}")

    def at_middle(self, scan: N.Scan, arg: str, side: Side, half: Half) -> str:
        """An operand, decayed to the middle of its block."""
        x, factor = self.in_half(arg, half), self.to_middle(scan, side, half)
        return x if factor is None else self.pairs.body.map("*", x, factor, hint=f"{arg}_to_middle")

    def inside(self, scan: N.Scan, side: Side, arg: str, write: N.Write) -> str:
        """What the operand reads, in each block, of a write in the other half."""
        o, body = other(side), self.pairs.body
        near, far = (write.i, write.j) if side == "i" else (write.j, write.i)
        half: Half = "earlier" if scan.reverse else "later"
        far_half: Half = "later" if scan.reverse else "earlier"
        later, earlier = (near, arg) if scan.reverse else (arg, near)
        hint = "d_score" if later.startswith("d_") else "score"
        score = self.contract(body, self.at_middle(scan, later, side, "later"),
                              self.at_middle(scan, earlier, side, "earlier"), side_axes(scan, side), hint)  # fmt: skip
        value = self.at_middle(scan, far, o, far_half)
        part = self.contract(body, score, value, [self.names.half(far_half)], "part")
        factor = self.to_middle(scan, o, half)
        return part if factor is None else body.map("*", part, factor, hint="part")

    def close(self) -> None:
        """Add the halving with all parts so far."""
        if not self.pairs.totals:
            return
        pairs, names = self.pairs, self.names
        node = self.b.add(T.Halving, "halving", axis=names.place, to=(names.block, names.earlier, names.later),
                          totals=tuple(pairs.totals), parts=tuple(pairs.parts), body=pairs.body.graph(()))  # fmt: skip
        for id_, index in self.pending.items():
            axes = self.b.nodes[pairs.totals[index]].axes
            self.done[id_] = self.b.add(N.Out, id_, arg=node, index=index, axes=axes)
        self.pairs, self.pending = Pairs(Builder("chunked", self.b.axes.values())), {}

    # -- gates ---------------------------------------------------------------------------------------------------------

    def gates(self, nodes: list[N.GateGradient]) -> None:
        """The gates' gradients. That of a gate which is no logarithm is taken with this gate, and no other, raised to
        `SMALL`: so much is divided out again."""
        found = [(node, scan) for node in nodes if isinstance(scan := self.source[node.scan], N.Scan)]
        for node, scan in found:
            if not (scan.i or scan.j):
                self.vector_gate_gradient(node, scan)
            elif scan.gates[node.gate].log:
                self.gate_gradient(node, scan)
        self.close()
        for node, scan in found:
            gate = scan.gates[node.gate]
            if (scan.i or scan.j) and not gate.log:
                self.raised = gate.arg
                self.gate_gradient(node, scan)
                self.close()
                self.divided(node, gate)

    def gate_gradient(self, node: N.GateGradient, scan: N.Scan) -> None:
        """The sum of the contributions that pass each gate: reads after it of the tile's first state, writes before it
        that reach the last one, the first state's own way to the last, and pairs that straddle it."""
        adjoint = self.source[node.adjoint]
        assert isinstance(adjoint, N.Scan)
        side: Side = "j" if set(node.axes) & set(scan.j) else "i"
        total = None
        straddling: list[tuple[Half, str]] = []
        behind = "after" if scan.start == "read" else "onward"  # which gates a read's state has met
        walks = (scan, behind, adjoint.writes, f"reads_{side}"), (adjoint, "before", scan.writes, f"written_{side}")
        for where, fn, pairs, hint in walks:
            flows = None
            for pair in pairs:
                mine, its = (pair.i, pair.j) if side == "i" else (pair.j, pair.i)
                read = self.read(where, other(side), its)
                flow = self.summed(self.b, self.b.map("*", self.tile(mine), read.edge, hint=hint), node.axes, hint)
                flows = flow if flows is None else self.b.map("+", flows, flow, hint=hint)
                straddling += [(read.half, self.flow(mine, read.half, part, fn, node.axes)) for part in read.parts]
            if flows is not None:
                sums = self.span(self.b, flows, fn, self.names.place)
                total = sums if total is None else self.b.map("+", total, sums)
        decay = self.decay(scan)
        assert total is not None and decay is not None
        whole = self.b.map("*", self.b.map("*", decay, self.edges[scan.id]), self.edges[adjoint.id], hint="through")
        total = self.b.map("+", total, self.summed(self.b, whole, node.axes), hint=node.id)
        self.add_parts(node.id, total, straddling)

    def summed(self, b: Builder, id_: str, gate: tuple[str, ...], hint: str = "") -> str:
        """The sum over the state's axes that a gate lacks."""
        over = tuple(a for a in b.nodes[id_].axes if a in self.state and a not in gate)
        axes = tuple(a for a in b.nodes[id_].axes if a not in over)
        return b.add(N.Reduce, hint, fn="sum", arg=id_, over=over, axes=axes) if over else id_

    def flow(self, mine: str, half: Half, part: str, fn: str, gate: tuple[str, ...]) -> str:
        """A part times its operand, added to the gates between the token and the middle of its block."""
        body = self.pairs.body
        product = self.summed(body, body.map("*", self.in_half(mine, half), part), gate)
        return self.span(body, product, fn, self.names.half(half))

    def divided(self, node: N.GateGradient, gate: N.Gate) -> None:
        """The gradient of a gate that is no logarithm: its own value is divided out, so that exact zeros have one."""
        tokens = self.finished(node.id)
        raised = self.b.map("max", self.done[gate.arg], self.b.const(SMALL))
        self.done[node.id] = self.b.map("/", tokens, raised, hint=node.id)

    # -- scans without sides -------------------------------------------------------------------------------------------

    def transition(self, scan: N.Scan, without: int | None = None) -> str | None:
        """The product (max-plus: the sum) of the gates, over tiles; places beyond the end leave the state alone."""
        out = None
        tropical = scan.algebra == "max-plus"
        for index, g in enumerate(scan.gates):
            if index == without:
                continue
            log = g.log and not tropical
            a = self.tile(g.arg, "given" if log else "", 0.0 if log or tropical else 1.0)
            a = self.b.map("exp", a) if log else a
            out = a if out is None else self.b.map("+" if tropical else "*", out, a)
        return out

    def vector(self, scan: N.Scan) -> None:
        """Maps of the state, composed along a tile; then the state at each tile's edge; then what enters each token."""
        tropical = scan.algebra == "max-plus"
        one, zero = (0.0, float("-inf")) if tropical else (1.0, 0.0)
        a = self.transition(scan) or self.tile(self.constant(one), pad=one)
        add = self.tile(self.constant(zero) if scan.add is None else scan.add, pad=zero)
        laid = self.b.nodes[a].axes
        node = self.b.add(T.Prefix, "prefix", scan.span, a=a, b=add, axis=self.names.place, algebra=scan.algebra,
                          reverse=scan.reverse)  # fmt: skip
        short = tuple(x for x in laid if x != self.names.place)
        outs = [self.b.add(N.Out, hint, arg=node, index=n, axes=laid if n < 2 else short)
                for n, hint in enumerate(("a_before", "b_before", "a_whole", "b_whole"))]  # fmt: skip
        if scan.id not in self.edges:
            self.carried(scan, outs[2], outs[3])
        kept = self.b.map("+" if tropical else "*", outs[0], self.edges[scan.id])
        trajectory = self.b.map("max" if tropical else "+", kept, outs[1])
        self.done[f"{scan.id}/trajectory"] = trajectory
        for out in self.source.of_kind(N.Out):
            if out.arg == scan.id:
                where = "trajectory" if out.index == 0 else "last"
                self.done[out.id] = self.done[f"{scan.id}/{where}"]
        self.to_tokens(scan)

    def constant(self, value: float) -> str:
        """A number for each token."""
        number = self.b.const(value)
        id_ = self.b.add(N.Map, "as", fn="as", args=(number,), axes=(self.time, *self.batch))
        return self.done.setdefault(id_, id_)

    def to_tokens(self, scan: N.Scan) -> None:
        """The trajectory back in the order of tokens, where maps between scans read it."""
        read = {a for n in self.source.of_kind(N.Map) for a in n.args}
        for out in self.source.of_kind(N.Out):
            if out.arg == scan.id and out.id in read:
                self.done[out.id] = self.finished(out.id)

    def vector_gate_gradient(self, node: N.GateGradient, scan: N.Scan) -> None:
        gate = scan.gates[node.gate]
        product = self.b.map("*", self.done[f"{node.scan}/trajectory"], self.done[f"{node.adjoint}/trajectory"])
        rest = self.transition(scan, None if gate.log else node.gate)
        product = product if rest is None else self.b.map("*", product, rest)
        self.done[node.id] = self.summed(self.b, product, node.axes)
