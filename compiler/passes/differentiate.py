"""The gradient of a scan, as a graph at the normal level: the scan reversed, and the scan itself with other queries.

For S_t = A_t . S_(t-1) + sum_r W_r . V_r with reads r_m = sum of C_m . S_(t-1), the gradient L of the state obeys the
same recurrence from the last token to the first, where a query and the gradient of what it read take a write's place.
If reads come after the update, in the reversed step the write comes first, and reads before the gate.
Gradients of writes are reads of L, gradients of queries reads of S, a gate's gradient is a product of both. Maps around
scans are differentiated by torch.autograd.
"""

from __future__ import annotations

from dataclasses import dataclass

from chunkc.ir import nodes as N
from chunkc.ir.graph import Builder, Graph
from chunkc.passes import pairs
from chunkc.passes.regions import (
    inputs,
    other,
    renumbered,
    result_names,
    state_axes,
    with_regions,
)


@dataclass(frozen=True)
class Differentiate:
    """Gives each scan its `backward`: inputs are its operands, `initial`, and the gradient of each result; outputs are
    the gradients of the operands and of `initial`. Gives each source of an attention its `scores` and `gradients`."""

    name: str = "differentiate"

    def run(self, graph: Graph) -> Graph:
        graph = with_regions(graph, lambda g, scan: {"backward": vjp(g, scan)})
        return graph.evolve(nodes=tuple(pairs.derived(n) if isinstance(n, N.Attend) else n for n in graph.nodes))


def vjp(graph: Graph, scan: N.Scan) -> Graph:
    """The vector-Jacobian product of a scan."""
    b = Builder("normal", graph.axes)
    operands = inputs(b, graph, scan)
    initial = b.add(N.Input, "initial", name="initial", axes=state_axes(scan))
    results = [f"d_{name}" for name in result_names(scan, operands)]
    for index, name in enumerate(results):
        b.add(N.Input, name, name=name, axes=scan.result_axes(index))
    forward = renumbered(scan, operands, initial)
    if scan.stop:
        found = _stopped(b, forward, results)
    elif scan.algebra == "max-plus":
        found = _max_plus(b, forward, results)
    elif scan.i or scan.j:
        found = _matrix(b, forward, results)
    else:
        found = _vector(b, forward, results)
    return b.graph([(f"d_{name}", id_) for name, id_ in zip([*operands, "initial"], found)])


def _out(b: Builder, scan: str, index: int, hint: str) -> str:
    node = b.nodes[scan]
    return b.add(N.Out, hint, node.span, arg=scan, index=index, axes=node.result_axes(index))


def _adjoint(b: Builder, scan: N.Scan, last: str, **fields: object) -> str:
    """The reversed scan of the state's gradient."""
    start = {"read": "read", "gate": "write", "write": "gate"}[scan.start]  # the circle the other way round
    reverse = scan.evolve(name=f"d_{scan.name}", initial=last, reverse=True, start=start, stop=False, **fields)
    return b.like(reverse, f"scan_d_{scan.name}")


def _matrix(b: Builder, scan: N.Scan, results: list[str]) -> list[str]:
    pairs = [(q.arg, d) if q.side == "i" else (d, q.arg) for q, d in zip(scan.queries, results)]
    again = tuple(N.Query(side=other(q.side), arg=d) for q, d in zip(scan.queries, results))
    forward = b.like(scan.evolve(queries=again), f"scan_{scan.name}")
    reads = tuple(q for w in scan.writes for q in (N.Query(side="j", arg=w.j), N.Query(side="i", arg=w.i)))
    writes = tuple(N.Write(i=i, j=j) for i, j in pairs)
    adjoint = _adjoint(b, scan, results[-1], writes=writes, queries=reads)
    d_gates = _gate_gradients(b, scan, forward, adjoint)
    d_writes = [_out(b, adjoint, n, f"d_{arg}") for n, arg in enumerate(x for w in scan.writes for x in (w.i, w.j))]
    d_queries = [_out(b, forward, n, f"d_{q.arg}") for n, q in enumerate(scan.queries)]
    return [*d_gates, *d_writes, *d_queries, _out(b, adjoint, len(reads), "d_initial")]


def _gate_gradients(b: Builder, scan: N.Scan, forward: str, adjoint: str) -> list[str]:
    return [
        b.add(N.GateGradient, f"d_{g.arg}", b.nodes[g.arg].span, scan=forward, adjoint=adjoint, gate=n,
              axes=b.nodes[g.arg].axes)
        for n, g in enumerate(scan.gates)
    ]  # fmt: skip


def _vector(b: Builder, scan: N.Scan, results: list[str]) -> list[str]:
    forward = b.like(scan, f"scan_{scan.name}")
    adjoint = _adjoint(b, scan, results[-1], add=results[0])
    d_gates = _gate_gradients(b, scan, forward, adjoint)
    d_add = [_out(b, adjoint, 0, f"d_{scan.add}")] if scan.add is not None else []
    return [*d_gates, *d_add, _out(b, adjoint, 1, "d_initial")]


def _max_plus(b: Builder, scan: N.Scan, results: list[str]) -> list[str]:
    """The gradient goes to the larger argument of the maximum, half to each where they are equal."""
    kept = _out(b, b.like(scan, f"scan_{scan.name}"), 0, "before")
    for g in scan.gates:
        kept = b.map("+", kept, g.arg)
    one = b.const(1.0)
    share = b.add(N.Map, "share", fn="as", args=(one,), axes=b.nodes[kept].axes)
    if scan.add is not None:
        equal = b.map("where", b.map("==", kept, scan.add), b.const(0.5), b.const(0.0))
        share = b.map("where", b.map(">", kept, scan.add), one, equal, hint="share")
    gates = (N.Gate(arg=share, log=False),)
    adjoint = _adjoint(b, scan, results[-1], algebra="sum-product", gates=gates, add=results[0])
    d_state = _out(b, adjoint, 0, "d_state")
    d_kept = b.map("*", d_state, share, hint="d_kept")
    d_add = [b.map("*", d_state, b.map("-", one, share), hint="d_add")] if scan.add is not None else []
    return [*(d_kept for _ in scan.gates), *d_add, _out(b, adjoint, 1, "d_initial")]


def _stopped(b: Builder, scan: N.Scan, results: list[str]) -> list[str]:
    """Only the first token's read of the initial state has a gradient: in the reversed scan every gate is 0."""
    zero = b.const(0.0)
    shut = b.add(N.Map, "shut", fn="as", args=(zero,), axes=(scan.axis, *scan.batch))
    gates = (N.Gate(arg=shut, log=False),)
    adjoint = _adjoint(b, scan, results[-1], algebra="sum-product", gates=gates, add=results[0])
    operands = [g.arg for g in scan.gates] + ([scan.add] if scan.add is not None else [])
    return [*(b.map("*", x, zero) for x in operands), _out(b, adjoint, 1, "d_initial")]
