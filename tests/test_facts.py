"""Facts: closed forms of operations and bytes, licences at the ends of their range, causality by perturbation."""

from __future__ import annotations

import cases
import pytest
import torch
from emitted import Case, draw
from shipped import RECURRENCES

from chunkc.driver import Compiled, compile_source
from chunkc.dsl.causality import looks_ahead
from chunkc.facts import bytes_moved, elements, evaluate, facts, operations, render_facts
from chunkc.interp import Run, interpret
from chunkc.ir import nodes as N
from chunkc.ir.diagnostics import SourceFile
from chunkc.ir.ranges import Ranges

SETTINGS = {"d_model": 32, "heads": 2, "low": 3, "d_in": 5, "expand": 2, "head": 8, "kv": 2, "states": 6, "width": 4,
            "wide": 4, "dk": 24, "dv": 40, "scale": 0.3}  # fmt: skip
SHIPPED = sorted(RECURRENCES)


def compiled(name: str) -> Compiled:
    text = cases.OPS[name] if name in cases.OPS else RECURRENCES[name]
    return compile_source(SourceFile(f"{name}.spec", text))


@pytest.mark.parametrize(("h", "k", "v"), [(1, 16, 16), (4, 64, 128), (3, 24, 96)])
def test_cost_of_gated_linear_attention(h: int, k: int, v: int) -> None:
    graph = compiled("gated").units[0].graph
    sizes = {"heads": h, "dk": k, "dv": v, "scale": 1.0}
    # the state: a gate, a write and a read; exp(g), q exp(g), q k and its sum over h k; the local part, its sum
    # with the read and the scale over h v
    assert evaluate(operations(graph), graph, sizes) == 5 * h * k * v + 4 * h * k + 3 * h * v
    assert evaluate(elements(graph), graph, sizes) == 3 * h * k + 2 * h * v
    assert evaluate(bytes_moved(graph, 2), graph, sizes) == 2 * (3 * h * k + 2 * h * v)


@pytest.mark.parametrize(("d", "e"), [(8, 8), (64, 64), (96, 96)])
def test_cost_of_a_vector_recurrence(d: int, e: int) -> None:
    graph = compiled("mingru").units[0].graph
    sizes = {"d_model": d}
    # three products; sigmoid, 1 - z, z u, the output's own product and sum; the scan's gate and sum
    assert evaluate(operations(graph), graph, sizes) == 6 * d * e + 5 * e + 2 * e
    assert evaluate(elements(graph), graph, sizes) == 2 * d


def test_cost_of_kernels() -> None:
    """For a tile of 64 tokens: operands once, the states at its edges once, what is written once."""
    (found,) = facts(compiled("gated"))[0]["recurrences"]
    costs = {k["name"]: {(t["count"], *t["axes"]) for t in k["elements"]} for k in found["kernels"]}
    assert [k["name"] for k in found["kernels"] if k["pass"] == "forward"] == ["states", "read_j"]
    assert costs["states"] == {(64 * 2, "h", "i"), (64, "h", "j"), (1, "h", "i", "j")}  # g, k; v; states
    assert costs["read_j"] == {(64 * 3, "h", "i"), (64 * 2, "h", "j"), (1, "h", "i", "j")}  # g, k, q; v, o; states
    assert costs["token"] == {(3, "h", "i"), (2, "h", "j"), (2, "h", "i", "j")}
    assert "read_j h i j + 192 h i + 128 h j elements a tile" in render_facts(facts(compiled("gated")))


@pytest.mark.parametrize("name", [*SHIPPED, *cases.OPS])
def test_facts_are_printed(name: str) -> None:
    found = facts(compiled(name))
    text = render_facts(found)
    assert found[0]["unit"] in text and "state" in text
    assert all(r["line"].startswith(f"{name}.spec:") for r in found[0]["recurrences"])


def test_structures() -> None:
    structure = {n: facts(compiled(n))[0]["recurrences"][0].get("transition", {}).get("structure") for n in cases.OPS}
    assert structure["gated"] == "by i" and structure["value_gate"] == "by j"
    assert structure["product_gate"] == "a product of both sides" and structure["scalar_gate"] == "by h"
    assert structure["no_gate"] == "none" and structure["vector"] == "elementwise" and structure["delta"] is None


@pytest.mark.parametrize("name", [n for n in (*SHIPPED, *cases.OPS) if n not in ("gru", "delta")])
def test_licence_at_the_ends_of_its_range(name: str) -> None:
    """A proven bound on a gate holds on extreme inputs: huge, tiny, zero, and the ends of declared ranges."""
    unit = compiled(name).units[0]
    ranges = Ranges(unit.graph.by_id)
    scans = [n for n in unit.graph.of_kind(N.Scan) if n.algebra == "sum-product"]
    for scale in (0.0, 1.0, 60.0):
        inputs, weights = draw(compiled(name).checked.module.units[0], Case(SETTINGS, [9], dtype=torch.float64))
        for n in unit.graph.of_kind(N.Input):
            if n.dtype == "float":
                x = inputs[n.name] * scale
                inputs[n.name] = x.clamp(n.low, n.high) if n.low is not None or n.high is not None else x
        names = [(f"gate {s.id} {k}", g.arg) for s in scans for k, g in enumerate(s.gates)]
        probe = unit.evolve(graph=unit.graph.evolve(outputs=tuple(names)))
        run = Run(SETTINGS, {**inputs, **weights}, {"t": 9})
        values, _ = interpret(probe, run)
        for label, id_ in names:
            low, high = ranges[id_]
            x = values[label].to(torch.float64)
            assert bool((x >= low - 1e-12).all()) and bool((x <= high + 1e-12).all()), (label, low, high)


@pytest.mark.parametrize("name", [*SHIPPED, *cases.OPS])
def test_causality_by_perturbation(name: str) -> None:
    """Changing later tokens leaves the outputs that are called causal as they were."""
    unit = compiled(name).checked.module.units[0]
    inputs, weights = draw(unit, Case(SETTINGS, [12], dtype=torch.float64))
    changed = {n: torch.cat([x[:7], x[7:].flip(0) * 0.5]) for n, x in inputs.items()}
    first, _ = interpret(unit, Run(SETTINGS, {**inputs, **weights}, {"t": 12}))
    second, _ = interpret(unit, Run(SETTINGS, {**changed, **weights}, {"t": 12}))
    for output in first:
        assert output not in looks_ahead(unit)
        assert torch.equal(first[output][:7], second[output][:7])
