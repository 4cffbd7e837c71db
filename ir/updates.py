"""What of a graph a back end leaves to a scan: the update that it reads, the work by which its operands are made, and
numbers that its reads are multiplied by."""

from __future__ import annotations

from chunkc.ir import nodes as N
from chunkc.ir.graph import Graph, Unit


def update_of(graph: Graph, scan: N.Scan) -> tuple[str, ...]:
    """Of an elementwise scan whose state is read after the update alone: the product and the sum that the update is.

    Of any other scan: nothing."""
    users = graph.users()
    read = next((u for u in users[scan.id] if isinstance(u, N.Out) and u.index == 0), None)
    if scan.i or scan.j or scan.algebra != "sum-product" or scan.stop or scan.add is None or read is None:
        return ()
    outputs, product = {id_ for _, id_ in graph.outputs}, read.id

    def only_user(id_: str, fn: str, other: str) -> str:
        """The one map that reads a value, if it is this function of it and that other one; else nothing."""
        found = users[id_]
        if len(found) != 1 or id_ in outputs or not isinstance(found[0], N.Map) or found[0].fn != fn:
            return ""
        return found[0].id if sorted(found[0].args) == sorted((id_, other)) else ""

    if scan.gates:
        product = only_user(read.id, "*", scan.gates[0].arg)
    state = only_user(product, "+", scan.add) if product else ""
    return (product, state) if state else ()


def absorbed(graph: Graph, scan: N.Scan) -> list[N.AnyNode]:
    """The nodes between the leaves of a scan's prologue and its operands, in the graph's order."""
    return [] if scan.prologue is None else between(graph, scan, scan.prologue.leaves)


def between(graph: Graph, scan: N.Scan, leaves: tuple[str, ...]) -> list[N.AnyNode]:
    """The nodes between leaves and a scan's operands, in the graph's order."""
    found: set[str] = set()
    stack = [x for x in scan.arguments() if x not in leaves]
    while stack:
        id_ = stack.pop()
        if id_ not in found:
            found.add(id_)
            stack += [a for a in graph[id_].operands() if a not in leaves]
    return [n for n in graph.nodes if n.id in found]


def scaled_reads(unit: Unit, scan: N.Scan) -> dict[int, tuple[N.Map, N.Const]]:
    """Of a scan with products the reads that nothing needs but times a number: the product and the number, by the
    read's index.

    A plan of ranks puts reads together before."""
    if not (scan.i or scan.j) or unit.parallel is not None or scan.dtype != "float":
        return {}
    graph, found = unit.graph, dict[int, tuple[N.Map, N.Const]]()
    users, outputs = graph.users(), {id_ for _, id_ in graph.outputs}
    for read in users[scan.id]:
        if isinstance(read, N.Out) and read.index < len(scan.queries) and read.id not in outputs:
            node = users[read.id][0] if len(users[read.id]) == 1 else None
            if isinstance(node, N.Map) and node.fn == "*":
                number = next((n for a in node.args if isinstance(n := graph[a], N.Const)), None)
                found |= {} if number is None else {read.index: (node, number)}
    return found
