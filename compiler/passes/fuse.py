"""Which kernels a scan takes, what each reads and writes, and what is kept in memory between them.

A matrix scan over tiles has one sequential part, the walk over the tiles of a sequence, and for each side of the state
all that lies over that side. The walk is a kernel: a program holds a block of the state. Each side is a kernel a
direction: a program holds what a tile has over one block of the side, and the tile's scores. That those which a gate
decays are kept from the reads to the gradients of the same side, and others formed anew, is left to the back end:
these graphs have them as parts of both kernels. A log-gate's gradient is made of what its side's kernel has anyway;
that of a gate which is no logarithm, or of one beside another, has kernels of its own. Scans without sides have a
kernel that serves them all, and are left as they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from chunkc.ir import nodes as N
from chunkc.ir import tiles as T
from chunkc.ir.graph import Builder, Graph
from chunkc.passes.regions import SIDES, Side, side_axes, with_regions

Life = Literal["result", "saved", "temporary"]
Wanted = list[tuple[str, str]]


@dataclass(frozen=True)
class Fuse:
    """Gives each matrix scan its `kernels`, `kernels_backward` and `kernel_step`."""

    name: str = "fuse"

    def run(self, graph: Graph) -> Graph:
        return with_regions(graph, derive)


def derive(graph: Graph, scan: N.Scan) -> dict[str, Graph]:
    if not (scan.i or scan.j):
        return {}
    assert scan.tiles is not None and scan.tiles_backward is not None and scan.step is not None
    return {
        "kernels": _forward(scan, scan.tiles),
        "kernels_backward": _backward(scan, scan.tiles_backward),
        "kernel_step": _step(scan.step),
    }


class Fuser:
    """Builds the graph of the kernels of a graph over tiles."""

    def __init__(self, source: Graph) -> None:
        self.source = source
        self.b = Builder("fused", source.axes)
        self.cuts: dict[str, tuple[N.AnyNode, ...]] = {}
        for node in source.of_kind(N.Input):
            self.b.add(N.Input, node.id, node.span, name=node.name, axes=node.axes)

    def kernel(self, role: str, rows: Literal["sequences", "tiles"], blocks: tuple[Side, ...], wanted: Wanted) -> str:
        """Add a kernel of these values by name; its id."""
        body = sliced(self.source, wanted, self.cuts)
        reads = tuple(n.name for n in body.of_kind(N.Input))
        return self.b.add(T.Kernel, f"{role}_kernel", role=role, rows=rows, blocks=blocks, reads=reads, body=body)

    def buffer(self, kernel: str, index: int, life: Life, state: bool = False, blocks: Literal["", "i", "j"] = "",
               replaces: str | None = None) -> str:  # fmt: skip
        name, id_ = self.b.nodes[kernel].body.outputs[index]
        axes = self.b.nodes[kernel].body[id_].axes
        return self.b.add(T.Buffer, name, arg=kernel, index=index, life=life, element="state" if state else "given",
                          blocks=blocks, replaces=replaces, axes=axes)  # fmt: skip

    def outside(self, id_: str, done: dict[str, str]) -> str:
        """A value that is computed between kernels."""
        node = self.source[id_]
        if id_ in done or isinstance(node, N.Input):
            return done.get(id_, id_)
        return self.b.like(node.renamed({a: self.outside(a, done) for a in node.operands()}))

    def cut(self, id_: str, buffer: str) -> None:
        """From here on a value is read from a buffer."""
        node = self.source[id_]
        self.cuts[id_] = (N.Input(id=id_, name=buffer, axes=node.axes),)


def sliced(graph: Graph, wanted: Iterable[tuple[str, str]], cuts: dict[str, tuple[N.AnyNode, ...]]) -> Graph:
    """The part of a graph that these values need, with the values that are cut as inputs."""
    nodes = [new for n in graph.nodes for new in cuts.get(n.id, (n,))]
    whole = graph.evolve(nodes=tuple(nodes), outputs=tuple(wanted))
    used = whole.reachable(id_ for _, id_ in whole.outputs)
    for halving in whole.of_kind(T.Halving):
        outs = [n for n in whole.of_kind(N.Out) if n.arg == halving.id and n.id in used]
        new = {halving.id: _narrowed(halving, [n.index for n in outs])}
        new |= {n.id: n.evolve(index=k) for k, n in enumerate(outs)}
        nodes = [new.get(n.id, n) for n in nodes if n.id in used]
    whole = whole.evolve(nodes=tuple(nodes))
    return whole.pruned_keeping(())


def _narrowed(halving: T.Halving, kept: list[int]) -> T.Halving:
    """The halving with some of its totals."""
    parts = [p.evolve(total=kept.index(p.total)) for p in halving.parts if p.total in kept]
    body = halving.body.pruned_keeping(p.value for p in parts)
    return halving.evolve(totals=tuple(halving.totals[k] for k in kept), parts=tuple(parts), body=body)


def _forward(scan: N.Scan, tiles: Graph) -> Graph:
    f = Fuser(tiles)
    values = dict(tiles.outputs)
    walk = f.kernel("states", "sequences", SIDES, [(n, values[n]) for n in ("states", "last")])
    states, last = f.buffer(walk, 0, "saved", state=True), f.buffer(walk, 1, "result", state=True)
    f.cut(values["states"], states)
    reads = dict(zip(list(values)[: len(scan.queries)], scan.queries))
    found = {"states": states, "last": last}
    for side in SIDES[::-1]:
        own = [name for name, q in reads.items() if q.side != side]
        if own:
            kernel = f.kernel(f"read_{side}", "tiles", (side,), [(n, values[n]) for n in own])
            found |= {name: f.buffer(kernel, index, "result") for index, name in enumerate(own)}
    return f.b.graph((name, found[name]) for name in values)


def _backward(scan: N.Scan, tiles: Graph) -> Graph:
    f = Fuser(tiles)
    values = dict(tiles.outputs)
    (carry,) = tiles.of_kind(T.Carry)
    ends = next(n.id for n in tiles.of_kind(N.Out) if n.arg == carry.id and n.index == 0)
    walk = f.kernel("ends", "sequences", SIDES, [("ends", ends), ("d_initial", values["d_initial"])])
    f.cut(ends, f.buffer(walk, 0, "temporary", state=True))
    found = {"d_initial": f.buffer(walk, 1, "result", state=True)}
    names = list(values)
    gates, rest = names[: len(scan.gates)], names[len(scan.gates) : -1]
    sides = [side for _ in scan.writes for side in SIDES] + [q.side for q in scan.queries]
    shared = [name for name, g in zip(gates, scan.gates) if g.log and len(scan.gates) == 1]
    gate_sides = {name: _gate_side(scan, tiles, name) for name in gates}
    for side in SIDES[::-1]:
        own = [name for name, s in zip(rest, sides) if s == side]
        own += [name for name in shared if gate_sides[name] == side]
        kernel = f.kernel(f"grad_{side}", "tiles", (side,), [(n, values[n]) for n in own])
        for index, name in enumerate(own):
            thin = name in shared and not set(tiles[values[name]].axes) & set(side_axes(scan, side))
            found[name] = f.buffer(kernel, index, "result", blocks=side if thin else "")
    for side in SIDES[::-1]:
        for name, gate in zip(gates, scan.gates):
            if gate_sides[name] == side and name not in shared:
                found[name] = _gate(f, scan, name, values[name], side, gate.log)
    return f.b.graph((name, found[name]) for name in values)


def _gate_side(scan: N.Scan, tiles: Graph, name: str) -> Side:
    return "j" if set(tiles[dict(tiles.outputs)[name]].axes) & set(scan.j) else "i"


def _gate(f: Fuser, scan: N.Scan, name: str, value: str, side: Side, log: bool) -> str:
    """A gate's gradient. With one gate two kernels share the work: from a tile's edges, and from pairs inside it; with
    two, one kernel a gate does both, to stay within six launches."""
    source = f.source
    tokens = value if log else source[value].operands()[0]  # what a gate that is no logarithm is divided out of
    out = source[source[tokens].operands()[0]]
    assert isinstance(out, N.Out)
    halving = source[out.arg]
    assert isinstance(halving, T.Halving)
    thin = not set(source[tokens].axes) & set(side_axes(scan, side))
    blocks: Literal["", "i", "j"] = side if thin else ""
    edges_of = None
    if len(scan.gates) == 1:
        total = source[halving.totals[out.index]]
        untile = source[tokens].evolve(id=f"{total.id}_tokens", arg=total.id)
        edges = Fuser(source.evolve(nodes=(*source.nodes, untile)))
        edges.b, edges.cuts = f.b, f.cuts
        kernel = edges.kernel(f"edges_{side}", "tiles", (side,), [(f"{name}_edges", untile.id)])
        edges_of = f.buffer(kernel, 0, "temporary", blocks=blocks)
        kept = N.Input(id=edges_of, name=edges_of, axes=untile.axes)
        f.cuts[total.id] = (kept, _tile_of(f.source, kept, total))
    kernel = f.kernel(f"gate_{side}", "tiles", (side,), [(name, tokens)])
    d_gate = f.buffer(kernel, 0, "result", blocks=blocks, replaces=edges_of)
    if log:
        return d_gate
    return f.outside(value, {tokens: d_gate})


def _tile_of(source: Graph, kept: N.Input, total: N.AnyNode) -> T.Tile:
    """A total that was kept in the order of tokens, over tiles again."""
    tile = source.of_kind(T.Tile)[0]
    return T.Tile(id=total.id, arg=kept.id, axis=tile.axis, to=tile.to, axes=total.axes)


def _step(step: Graph) -> Graph:
    f = Fuser(step)
    kernel = f.kernel("token", "sequences", (), list(step.outputs))
    last = len(step.outputs) - 1
    return f.b.graph(
        [(name, f.buffer(kernel, n, "result", state=n == last)) for n, (name, _) in enumerate(step.outputs)]
    )
