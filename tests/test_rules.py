"""Each normal kind in use has every rule of the table, and each rule agrees with the interpreter on random data."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from derived import TEXTS
from emitted import Case, draw, emit, errors

from chunkc.backends.operations import operations
from chunkc.driver import check_source, compile_source
from chunkc.interp import Run, interpret
from chunkc.ir import nodes as N
from chunkc.ir.diagnostics import CompileError, SourceFile
from chunkc.ir.graph import Unit
from chunkc.ir.text import parse_graph, print_graph
from chunkc.ir.verify import VerifyError, verify
from chunkc.pipeline import run, upto
from chunkc.rules import (
    AUTOGRAD,
    CONSTANT,
    HALO,
    HISTORY,
    LEAF,
    LOCAL,
    NONE,
    POSITION,
    REFUSED,
    RING,
    ROWS,
    SAME,
    SEEN,
    SUMMARY,
    TABLE,
    TOKENS,
    WHOLE,
)

AXES = "axes { t: time, s = t, d = d_model, e = d, h = 4, i = d_model / 4, hk = 2 groups h }"
SCAN = """k[t, h, i] = linear(x)
  recurrence over t {
    state S[h, i]
    S = sigmoid(k) * S + k
    o = sum[i](S)
  }
  m[t, h, i] = linear(x)
  recurrence over t {
    state T[h, i, e]
    T = sigmoid(m) * T + m * x[d = e]
    p = sum[i](k * T)
  }
  output o
  output p"""
CARRIED = """recurrence over t {
    state u[d]
    u = tanh(u) + x
  }
  output u"""  # in each probe that has a step, so that it has a state
# A layer for each kind; in normal form it has a node of that kind, and an output that depends on it.
PROBES: dict[type[N.Node], str] = {
    N.Input: "output y = x * x",
    N.Param: "param w[d] = uniform(-1, 1)\n  output y = w * x",
    N.Const: "output y = x * 0.5 + 3",
    N.Length: "output y = x * size(t)",
    N.Coord: "output y = x * where(t > 3, 1, t)",
    N.Segment: "chunk c of t = fixed(3)\n recurrence over t within c {\n  state z[d]\n  z = z + x\n }\n output z",
    N.Bounds: "chunk c of t = fixed(3)\n  output y = x * (first(c(t)) - t)",
    N.Map: "output y = tanh(x) * exp(x) - sigmoid(x)",
    N.Reduce: "output y = x * mean[d](x) + max[d](x)",
    N.Normalize: "output y = softmax[d](x) + rms_norm[d](x)",
    N.Expand: "q[t, h, i] = linear(x)\n  k[t, hk, i] = linear(x)\n  output y = q * k",
    N.Rename: "output y = sum[e](x[d = e] * x)",
    N.Shift: "output y = x * x[t = t - 2]",
    N.Slice: "output y = x * x[d = 1]",
    N.Gather: "output y = x * x[d = (t + 1) % 8]",
    N.Linear: "output y[t, d] = linear(x)",
    N.Conv: "output y = conv[t](x, 4)",
    N.Recur: "",
    N.Scan: SCAN,
    N.Attend: "attention y[t, d] over s {\n  logit = sum[d](x * x[t = s])\n  value = x[t = s]\n  mask = s <= t\n  }\n"
    "  output y",
    N.Out: SCAN,
}
SIZES = {"d_model": 8}
CONVENTIONS = {AUTOGRAD, CONSTANT, LEAF, WHOLE, TOKENS, SEEN, NONE, SAME, HISTORY, POSITION, ROWS}
CONVENTIONS |= {LOCAL, HALO, SUMMARY, RING, REFUSED}
LAYOUT = "parallel {\n  mesh { ring }\n  shard t over ring\n}\n"


def source(kind: type[N.Node], layout: str = "") -> SourceFile:
    carried = "" if TABLE[kind].stream is NONE or layout and kind is not N.Recur else CARRIED
    text = f"layer Probe(d_model: int) {{\n  {AXES}\n  input x[t, d]\n  {PROBES[kind]}\n  {carried}\n}}\n{layout}"
    return SourceFile("probe.spec", text)


def kinds(text: SourceFile) -> set[type[N.Node]]:
    """The kinds of a text's graphs in normal form, bodies left out."""
    units = check_source(text).module.units
    return {type(n) for u in units for n in run(u.graph, upto("normalize")).nodes}


@cache
def probe(kind: type[N.Node]) -> Unit:
    return check_source(source(kind)).module.units[0]


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("probes")
    return cache(lambda kind: emit(source(kind).text, folder, "probe.spec")[0])


def test_every_kind_in_use_has_a_row() -> None:
    used = set().union(*(kinds(SourceFile(f"{n}.spec", text)) for n, text in TEXTS.items()))
    assert used >= {N.Map, N.Scan, N.Recur}
    assert used <= set(TABLE), "a kind of the normal level has no rules"
    assert set(PROBES) == set(TABLE), "a kind has rules that no probe tests"


each_kind = pytest.mark.parametrize("kind", TABLE, ids=lambda k: k.__name__)


@each_kind
def test_no_cell_is_empty(kind: type[N.Node]) -> None:
    row = TABLE[kind]
    for rule in (row.vjp, row.chunk, row.stream, row.shard):
        assert rule.name and rule.says
        assert rule.derive is not None or rule in CONVENTIONS or kind is N.Recur


@each_kind
def test_shard(kind: type[N.Node]) -> None:
    """A layout has the operation for a node that its rule says, none for what is local, and refuses what it must."""
    rule, text = TABLE[kind].shard, source(kind, LAYOUT)
    if rule is REFUSED:
        with pytest.raises(CompileError) as found:
            compile_source(text)
        assert {d.code for d in found.value.diagnostics} == {"not-sharded"}
        return
    made: dict[type[N.Node], str] = {type(op.node): op.kind for op in operations(compile_source(text).units[0])}
    assert made.get(kind) == (None if rule is LOCAL else rule.name)


@each_kind
def test_interp(kind: type[N.Node]) -> None:
    """The normal form means what the spec does."""
    unit = probe(kind)
    normal = unit.evolve(graph=run(unit.graph, upto("normalize")))
    assert kind in {type(n) for n in normal.graph.nodes}
    needed = normal.graph.reachable(id_ for _, id_ in normal.graph.outputs)
    needed |= {n.id for n in normal.graph.of_kind(N.Segment)}  # others name chunks by their axis
    assert any(isinstance(n, kind) and n.id in needed for n in normal.graph.nodes)
    inputs, weights = draw(unit, Case(SIZES, [9], dtype=torch.float64))
    settings = Run(SIZES, {**inputs, **weights}, {"t": 9})
    wanted, states = interpret(unit, settings)
    found, ends = interpret(normal, settings)
    for want, got in ((wanted, found), (states, ends)):
        assert want.keys() == got.keys()
        for name, x in want.items():
            torch.testing.assert_close(got[name], x, rtol=1e-10, atol=1e-12)


@each_kind
def test_verify(kind: type[N.Node]) -> None:
    """The rules of the level take the node as it is, and refuse it over an axis that it is not over."""
    graph = run(probe(kind).graph, upto("normalize"))
    verify(graph, "normal")
    node = next(n for n in graph.nodes if isinstance(n, kind))
    axes = (*node.axes, "nowhere")
    broken = graph.evolve(nodes=tuple(n.evolve(axes=axes) if n.id == node.id else n for n in graph.nodes))
    with pytest.raises(VerifyError) as caught:
        verify(broken, "normal")
    assert caught.value.messages[0].node == node.id


@each_kind
def test_text(kind: type[N.Node]) -> None:
    graph = run(probe(kind).graph, upto("normalize"))
    assert parse_graph(print_graph(graph)) == graph


@each_kind
def test_vjp_and_chunk(modules: Any, kind: type[N.Node]) -> None:
    """Over more than one tile, the emitted layer and its gradients are those of the float64 interpreter; what a rule
    derives is what the pipeline has."""
    module: ModuleType = modules(kind)
    found = errors(module, probe(kind), Case(SIZES, [70, 70], dtype=torch.float64))
    assert max(found.values()) <= 1, found
    for rule in (TABLE[kind].vjp, TABLE[kind].chunk, TABLE[kind].stream):
        if rule.derive is not None:
            graph = run(probe(kind).graph)
            for node in graph.of_kind(N.Attend if kind is N.Attend else N.Scan):
                for name, derived in rule.derive(graph, node).items():
                    assert getattr(node, name) == derived


@each_kind
def test_stream(modules: Any, kind: type[N.Node]) -> None:
    """Token by token the layer gives what it gives for the whole sequence."""
    module: ModuleType = modules(kind)
    torch.manual_seed(0)
    layer = module.Probe(**SIZES, dtype=torch.float64)
    if TABLE[kind].stream is NONE:
        assert not hasattr(layer, "step")
        return
    assert not probe(kind).looks_ahead
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    *whole, _ = layer(x, state=layer.init_state(2, torch.float64))
    state, rows = layer.init_state(2, torch.float64), []
    for t in range(7):
        *row, state = layer.step(x[:, t], state)
        rows.append(row)
    for n, wanted in enumerate(whole):
        torch.testing.assert_close(torch.stack([row[n] for row in rows], 1), wanted, rtol=1e-10, atol=1e-12)


def test_what_looks_ahead_has_no_step(tmp_path: Path) -> None:
    ahead = "output u\n  output y = x * sum[s](x[t = s])"
    text = source(N.Recur).text.replace("output u", ahead)
    module, (unit,), _ = emit(text, tmp_path, "ahead.spec")
    assert unit.looks_ahead == ("y",)
    with pytest.raises(AttributeError):
        module.Probe(**SIZES).step  # noqa: B018
