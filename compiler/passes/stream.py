"""One token of a scan, as a graph at the normal level: the reads and the update, in the scan's order."""

from __future__ import annotations

from dataclasses import dataclass

from chunkc.ir import nodes as N
from chunkc.ir.graph import Builder, Graph
from chunkc.passes.regions import result_names, side_axes, slots, state_axes, with_regions


@dataclass(frozen=True)
class Stream:
    """Gives each scan its `step`: inputs are one token of its operands and the state; outputs are what the scan gives
    for that token, and the state after it."""

    name: str = "stream"

    def run(self, graph: Graph) -> Graph:
        return with_regions(graph, lambda g, scan: {"step": step(g, scan)})


def step(graph: Graph, scan: N.Scan) -> Graph:
    """One token of a scan."""
    b = Builder("normal", graph.axes)
    given = slots(graph, scan)
    for s in given:
        b.add(N.Input, s.name, s.span, name=s.name, axes=tuple(a for a in s.axes if a != scan.axis))
    state = b.add(N.Input, "state", name="state", axes=state_axes(scan))
    names = tuple(s.name for s in given)
    results = result_names(scan, names)
    assert not scan.reverse and scan.start != "write", "only a scan's adjoint starts with its write"

    def read(seen: str) -> list[str]:
        given = zip(scan.queries, _queries(scan, names), results)
        return [_read(b, scan, q, arg, seen, out) for q, arg, out in given] if scan.i or scan.j else [seen]

    if scan.start == "gate":
        new = _update(b, scan, names, state)
        return b.graph(zip(results, [*read(new), new]))
    reads = read(state)
    return b.graph(zip(results, [*reads, _update(b, scan, names, state)]))


def _queries(scan: N.Scan, names: tuple[str, ...]) -> tuple[str, ...]:
    return names[len(names) - len(scan.queries) :] if scan.queries else ()


def _read(b: Builder, scan: N.Scan, query: N.Query, arg: str, state: str, hint: str) -> str:
    """The sum over one side of the operand times the state."""
    product = b.map("*", arg, state)
    over = side_axes(scan, query.side)
    axes = tuple(a for a in b.nodes[product].axes if a not in over)
    return b.add(N.Reduce, hint, scan.span, fn="sum", arg=product, over=over, axes=axes) if over else product


def _update(b: Builder, scan: N.Scan, names: tuple[str, ...], state: str) -> str:
    """The state after the token: gates, then writes, then what is added."""
    tropical = scan.algebra == "max-plus"
    given = iter(names)
    new = state

    def become(fn: str, *args: str) -> None:
        nonlocal new
        new = b.map(fn, new, *args, span=scan.span, hint="new")

    for g in scan.gates:
        gate = next(given)
        become("+" if tropical else "*", b.map("exp", gate) if g.log and not tropical else gate)
    for _ in scan.writes:
        become("+", b.map("*", next(given), next(given)))
    if scan.add is not None:
        become("max" if tropical else "+", next(given))
    if scan.stop:
        become("stop")
    return new
