"""Which elementwise work around a scan is done inside its kernels, where operands are loaded.

A map that only a scan's operands need, of values laid out as the state is, need not be written to memory: the scan
takes the *leaves* that it is made of, makes its operands of them, and gives the leaves' gradients."""

from __future__ import annotations

from dataclasses import dataclass

from chunkc.ir import nodes as N
from chunkc.ir.graph import ELEMENTWISE, Builder, Graph
from chunkc.ir.updates import between, update_of
from chunkc.passes.calculus import gradients
from chunkc.passes.regions import slots, state_axes


@dataclass(frozen=True)
class Absorb:
    """Gives each elementwise scan of real numbers the `prologue` that its operands are made by; of one that has nothing
    around it, the leaves are the operands."""

    name: str = "absorb"

    def run(self, graph: Graph) -> Graph:
        plain = [n for n in graph.of_kind(N.Scan) if not (n.i or n.j) and n.algebra == "sum-product"]
        scans = {n.id: n for n in plain if n.dtype == "float"}
        makers = _makers(graph, scans)
        for scan in scans.values():
            made = {id_ for id_, owners in makers.items() if scan.id in owners}
            used = {*scan.arguments(), *(a for id_ in made for a in graph[id_].operands())} - made
            leaves = tuple(n.id for n in graph.nodes if n.id in used and not isinstance(n, N.Const))
            if leaves:
                whole = scan.evolve(prologue=_prologue(graph, scan, leaves))
                graph = graph.evolve(nodes=tuple(whole if n.id == scan.id else n for n in graph.nodes))
        return graph


def _makers(graph: Graph, scans: dict[str, N.Scan]) -> dict[str, set[str]]:
    """The maps that only operands of scans need, with these scans; each of several makes such a value anew."""
    users, kept = graph.users(), {id_ for _, id_ in graph.outputs}
    owners = {id_: {id_} for id_ in scans}
    owners |= {id_: {scan.id} for scan in scans.values() for id_ in update_of(graph, scan)}
    found: dict[str, set[str]] = {}
    for node in reversed(graph.nodes):  # users stand behind what they use
        own = [owners.get(u.id) for u in users[node.id]]
        if node.id in owners or node.id in kept or not own or None in own:
            continue
        if all(_elementwise(graph, scans[s], node) for each in own for s in each or ()):
            found[node.id] = owners[node.id] = {s for each in own for s in each or ()}
    return found


def _elementwise(graph: Graph, scan: N.Scan, node: N.AnyNode) -> bool:
    """Whether a value is a map of values laid out as the scan's state is, and of numbers."""
    whole = {scan.axis, *state_axes(scan)}
    if not isinstance(node, N.Map) or node.fn not in ELEMENTWISE:
        return False
    args = [graph[a] for a in node.args if not isinstance(graph[a], N.Const)]
    return bool(args) and all(x.dtype == "float" and set(x.axes) == whole for x in (node, *args))


def _prologue(graph: Graph, scan: N.Scan, leaves: tuple[str, ...]) -> N.Prologue:
    """The operands as functions of the leaves, and the leaves' gradients as functions of the operands'."""
    names, made, whole = {}, between(graph, scan, leaves), (scan.axis, *state_axes(scan))
    forward, backward = Builder("normal", graph.axes), Builder("normal", graph.axes)
    for b in (forward, backward):
        for k, leaf in enumerate(leaves):
            names[leaf] = b.add(N.Input, f"leaf_{k}", graph[leaf].span, name=f"leaf_{k}", axes=whole)
    given = [s.name for s in slots(graph, scan)]
    flows: dict[str, str] = {}
    for name, arg in zip(given, scan.arguments()):
        flow = backward.add(N.Input, f"d_{name}", name=f"d_{name}", axes=whole)
        flows[arg] = backward.map("+", flows[arg], flow) if arg in flows else flow
    for node in made:
        for b in (forward, backward):
            names[node.id] = b.like(node.renamed(names), node.id)
    for node in reversed(made):
        if isinstance(node, N.Map) and node.id in flows:
            copy = backward.nodes[names[node.id]]
            for arg, found in zip(node.args, gradients(backward, copy, flows[node.id])):
                if found is not None and not isinstance(graph[arg], N.Const):
                    flows[arg] = backward.map("+", flows[arg], found) if arg in flows else found
    outputs = [(f"d_leaf_{k}", flows[leaf]) for k, leaf in enumerate(leaves)]
    values = forward.graph(zip(given, [names[arg] for arg in scan.arguments()]))
    return N.Prologue(leaves=leaves, values=values, gradients=backward.graph(outputs))
