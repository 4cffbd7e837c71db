"""Elementwise scans as PyTorch functions: their operands made of leaves, and then the scan over tiles."""

from __future__ import annotations

from chunkc.backends.body import Body
from chunkc.backends.vector import State, VectorForm
from chunkc.backends.writer import Lines, Writer
from chunkc.ir import nodes as N
from chunkc.ir.graph import Unit


def emit_vector_scan(form: VectorForm, unit: Unit, lines: Lines, w: Writer) -> None:
    """The function `NAME_scan`, which has the arguments of the one with kernels."""
    leaves = list(form.leaves.values())
    with form.function(w):
        w(f'"""{form.doc(lines)}"""')
        w(f"ct, device = compute_dtype({leaves[0]}), {leaves[0]}.device")
        w(f"{', '.join(leaves)} = {', '.join(f'{n}.to(ct)' for n in leaves)}")
        body = Body(unit, lines, w, "")
        body.taken |= {*leaves, "seq", "dtype", "ct", "device", *form.numbers.values()}
        for k, state in enumerate(form.states):
            gate, add = _operands(body, state, form)
            initial, after = state.name("initial"), form.after
            w(f"out_{k}, last_{k} = vector_scan(seq, {gate}, {add}, {initial}, {after}, dtype)")
        w(f"return {', '.join([f'{name}_{k}' for name in ('out', 'last') for k in range(len(form.states))])}")


def _operands(body: Body, state: State, form: VectorForm) -> tuple[str, str]:
    """Statements for the work before a scan; the texts of its gate and of what is added."""
    graph = state.prologue.values
    body.enter_users(graph)
    body.names = dict(zip((n.id for n in graph.of_kind(N.Input)), state.leaves))
    for node in graph.nodes:
        if isinstance(node, N.Const):
            body.names[node.id] = form.number(node)
        elif isinstance(node, N.Map):
            body.assign(graph, node)
    like = state.leaves[0]

    def text(id_: str | None, idle: str) -> str:
        number = idle if id_ is None else body.names[id_] if isinstance(graph[id_], N.Const) else ""
        return f"torch.full_like({like}, {number})" if number else body.names[id_ or ""]

    return text(state.gate, "1.0"), text(state.add, "0.0")
