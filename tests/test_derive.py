"""Graphs that passes derive from scans, run by the interpreter against the scan a token at a time and autograd."""

from __future__ import annotations

import pytest
import torch
from derived import ALL, IDS, TEXTS, TOKENS, Scan, close, outputs, scans
from torch import Tensor

from chunkc.driver import check_source
from chunkc.ir import nodes as N
from chunkc.ir import tiles as T
from chunkc.ir.diagnostics import SourceFile
from chunkc.ir.graph import Graph
from chunkc.ir.updates import absorbed
from chunkc.passes.chunk import Chunk
from chunkc.passes.fuse import derive
from chunkc.pipeline import run, upto

each_scan = pytest.mark.parametrize("name, index", ALL, ids=IDS)


def over_axes(graph: Graph, scan: Scan) -> Graph:
    """A derived graph with the small sizes of the test."""
    own = {a.name: a for a in scan.axes()}
    nodes = tuple(n.evolve(body=over_axes(n.body, scan)) if isinstance(n, T.Kernel) else n for n in graph.nodes)
    return graph.evolve(nodes=nodes, axes=tuple(own.get(a.name, a) for a in graph.axes))


def reference(scan: Scan, tokens: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Operands, the results' gradients, and the operands' gradients by autograd through the loop over tokens."""
    values = scan.draw(tokens)
    results = outputs(scan.alone(), values, tokens)
    grads = {f"d_{n}": torch.randn(x.shape).double() for n, x in results.items()}
    total = torch.stack([(x * grads[f"d_{n}"]).sum() for n, x in results.items()]).sum()
    total.backward()  # type: ignore[no-untyped-call]
    wanted = {f"d_{n}": torch.zeros_like(x) if x.grad is None else x.grad for n, x in values.items()}
    return {n: x.detach() for n, x in values.items()}, grads, wanted


@each_scan
@pytest.mark.parametrize("tokens", [TOKENS, 1, 0])
def test_gradients_are_those_of_autograd(name: str, index: int, tokens: int) -> None:
    scan = scans(name)[index]
    assert scan.node.backward is not None
    values, grads, wanted = reference(scan, tokens)
    found = outputs(over_axes(scan.node.backward, scan), {**values, **grads}, tokens)
    assert list(found) == list(wanted)
    wrong = [n for n in wanted if not close(found[n], wanted[n])]
    assert not wrong, wrong


def test_a_gradient_reads_what_the_derivation_says() -> None:
    """The adjoint is the reversed scan; its writes are queries and their results' gradients."""
    (scan,) = scans("both_sides")
    backward = scan.node.backward
    assert backward is not None
    forward, adjoint = backward.of_kind(N.Scan)
    assert adjoint.reverse and adjoint.initial == "d_last" and not forward.reverse
    pairs = {(w.i, w.j) for w in adjoint.writes}
    first, second = (q.arg for q in scan.node.queries)
    names = dict(zip((s.arg for s in scan.slots), scan.names))
    assert pairs == {(f"d_out_{names[first]}", names[first]), (names[second], f"d_out_{names[second]}")}
    assert {q.arg for q in forward.queries} == {f"d_out_{names[first]}", f"d_out_{names[second]}"}
    assert backward.of_kind(N.GateGradient)


@each_scan
@pytest.mark.parametrize("tile, tokens", [(8, TOKENS), (4, 8), (64, 1), (4, 0)])
def test_the_chunk_form_is_the_scan(name: str, index: int, tile: int, tokens: int) -> None:
    """Forward and backward over tiles, in float64, against the loop over tokens and autograd."""
    scan = scans(name)[index]
    derived = Chunk(tile=tile).derive(scan.graph, scan.node)
    values, grads, wanted = reference(scan, tokens)
    found = outputs(over_axes(derived["tiles"], scan), values, tokens)
    results = outputs(scan.alone(), values, tokens)
    wrong = [n for n in results if not close(found[n], results[n])]
    assert not wrong, wrong
    given = {**values, **grads, "states": found["states"]}
    found = outputs(over_axes(derived["tiles_backward"], scan), given, tokens)
    assert list(found) == list(wanted)
    wrong = [n for n in wanted if not close(found[n], wanted[n])]
    assert not wrong, wrong


@each_scan
def test_steps_are_the_scan(name: str, index: int) -> None:
    """Token by token from the initial state, the results and the last state are those of the scan."""
    scan = scans(name)[index]
    assert scan.node.step is not None
    values = {n: x.detach() for n, x in scan.draw(TOKENS).items()}
    wanted = outputs(scan.alone(), values, TOKENS)
    state, step = values["initial"], over_axes(scan.node.step, scan)
    rows: dict[str, list[Tensor]] = {n: [] for n in wanted if n != "last"}
    for t in range(TOKENS):
        token = {s.name: values[s.name][t] for s in scan.slots}
        found = outputs(step, {**token, "state": state}, 1)
        state = found["last"]
        for n, row in rows.items():
            row.append(found[n])
    assert close(state, wanted["last"])
    wrong = [n for n, row in rows.items() if not close(torch.stack(row), wanted[n])]
    assert not wrong, wrong


@each_scan
def test_kernels_are_the_scan(name: str, index: int) -> None:
    """Kernel by kernel, each from what it reads alone: forward, backward and one token."""
    scan = scans(name)[index]
    if not (scan.node.i or scan.node.j):
        assert scan.node.kernels is None
        return
    derived = Chunk(tile=8).derive(scan.graph, scan.node)
    fused = derive(scan.graph, scan.node.evolve(**derived))
    values, grads, wanted = reference(scan, TOKENS)
    found = outputs(over_axes(fused["kernels"], scan), values, TOKENS)
    results = outputs(scan.alone(), values, TOKENS)
    assert not [n for n in results if not close(found[n], results[n])]
    given = {**values, **grads, "states": found["states"]}
    found = outputs(over_axes(fused["kernels_backward"], scan), given, TOKENS)
    wrong = [n for n in wanted if not close(found[n], wanted[n])]
    assert list(found) == list(wanted) and not wrong, wrong
    token = {s.name: values[s.name][0] for s in scan.slots} | {"state": values["initial"]}
    found = outputs(over_axes(fused["kernel_step"], scan), token, 1)
    assert scan.node.step is not None
    once = outputs(over_axes(scan.node.step, scan), token, 1)
    assert list(found) == list(once) and not [n for n in once if not close(found[n], once[n])]


MADE = [(name, index) for name, index in ALL if scans(name)[index].node.prologue is not None]


@pytest.mark.parametrize("name, index", MADE, ids=[f"{n}-{i}" for n, i in MADE])
def test_operands_are_what_a_prologue_makes(name: str, index: int) -> None:
    """Of random leaves: its values are the operands that the graph around makes of them, its gradients autograd's."""
    scan = scans(name)[index]
    graph, node = scan.graph, scan.node
    prologue = node.prologue
    assert prologue is not None
    axes = [node.axis, *node.batch]
    torch.manual_seed(0)
    leaves = [torch.rand(scan.shape(tuple(axes), TOKENS)).double().requires_grad_() for _ in prologue.leaves]
    given = {f"leaf_{k}": x for k, x in enumerate(leaves)}
    made = outputs(over_axes(prologue.values, scan), given, TOKENS)
    made_by = absorbed(graph, node)
    inputs = [N.Input(id=x, name=f"leaf_{k}", axes=tuple(axes)) for k, x in enumerate(prologue.leaves)]
    ends = tuple(zip(scan.names, node.arguments()))
    whole = over_axes(Graph(level="normal", nodes=(*inputs, *made_by), outputs=ends, axes=graph.axes), scan)
    wanted = outputs(whole, given, TOKENS)
    assert list(made) == list(wanted) and all(close(made[n].detach(), wanted[n].detach()) for n in made)
    grads = {n: torch.randn(scan.shape(tuple(axes), TOKENS)).double() for n in wanted}
    total = torch.stack([(x * grads[n]).sum() for n, x in wanted.items()]).sum()
    total.backward()  # type: ignore[no-untyped-call]
    found = outputs(over_axes(prologue.gradients, scan), {**{n: x.detach() for n, x in given.items()},
                    **{f"d_{n}": g for n, g in grads.items()}}, TOKENS)  # fmt: skip
    for k, x in enumerate(leaves):
        assert x.grad is not None and close(found[f"d_leaf_{k}"], x.grad)


def test_what_a_prologue_takes_in() -> None:
    """All that only operands need; what a result needs too, or has other axes, is a leaf."""
    made = {name: scans(name)[0].node.prologue for name in ("hgrn", "mingru", "vector", "two_vectors")}
    assert {n: len(p.leaves) for n, p in made.items() if p is not None} == {
        "hgrn": 2, "mingru": 2, "vector": 2, "two_vectors": 2,
    }  # fmt: skip
    kinds = [n.fn for n in scans("two_vectors")[0].node.prologue.values.of_kind(N.Map)]  # type: ignore[union-attr]
    assert sorted(kinds) == ["*", "*", "-", "exp", "tanh"]
    assert all(s.node.prologue is None for n in TEXTS for s in scans(n) if s.node.i or s.node.j)


@pytest.mark.parametrize("gate", ["exp(g)", "gamma", "1 - exp(-(5 + h) * log(2))"])
def test_a_read_of_the_update_stays_one(gate: str) -> None:
    """Whichever way a gate is written, a sum of terms too: nothing is added to the read outside the scan."""
    text = f"""causal op decayed(heads: int, dk: int, dv: int) {{
      axes {{ t: time, h = heads, i = dk, j = dv }}
      input q[t, h, i], k[t, h, i], v[t, h, j], g[t, h] in [-inf, 0], gamma[t, h] in [0, 1]
      recurrence over t {{
        state S[h, i, j]
        S = ({gate}) * S + k * v
        o = sum[i](q * S)
      }}
      output o
    }}"""
    unit = check_source(SourceFile("decayed.spec", text)).module.units[0]
    graph = run(unit.graph, upto("normalize"))
    (scan,) = graph.of_kind(N.Scan)
    assert scan.start == "gate"
    assert isinstance(graph[dict(graph.outputs)["o"]], N.Out)
