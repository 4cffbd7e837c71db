"""Facts: closed forms of operations and bytes, licences at the ends of their range, causality by perturbation."""

from __future__ import annotations

import re

import cases
import pytest
import torch
from emitted import Case, draw
from shipped import RECURRENCES

from chunkc.artifact import SettingError
from chunkc.bench.sizes import BenchError
from chunkc.costs import MACHINES, GateKind, Scan, cheapest, estimates, least_bytes
from chunkc.driver import Compiled, compile_source
from chunkc.dsl.causality import looks_ahead
from chunkc.estimates import At
from chunkc.facts import bytes_moved, elements, evaluate, facts, operations, render_facts
from chunkc.interp import Run, interpret
from chunkc.ir import nodes as N
from chunkc.ir.diagnostics import CompileError, SourceFile
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
    # the state: a gate, a write and a read; the scale over h v
    assert evaluate(operations(graph), graph, sizes) == 5 * h * k * v + h * v
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


def test_which_work_kernels_do_is_said() -> None:
    found = {name: facts(compiled(name))[0]["recurrences"][0].get("operands") for name in ("vector", "gated", "delta")}
    lines = cases.OPS["vector"].splitlines()
    line = {text: f"vector.spec:{1 + next(k for k, x in enumerate(lines) if text in x)}" for text in ("input", "c = ")}
    assert found == {
        "vector": {"made_at": [line["c = "]], "loaded_from": [line["input"]]}, "gated": None, "delta": None,
    }  # fmt: skip
    scaled = [r["scaled_at"] for r in facts(compiled("gated_linear_attention"))[0]["recurrences"]]
    assert scaled == [["gated_linear_attention.spec:15"]]
    text = render_facts(facts(compiled("gated_linear_attention")))
    assert "results     multiplied by a number in its kernels (gated_linear_attention.spec:15)" in text
    text = render_facts(facts(compiled("vector")))
    assert f"operands    made in its kernels ({line['c = ']}) of what is loaded ({line['input']})" in text


@pytest.mark.parametrize("name, used, launches", [
    ("gated", "passes", (["states", "read_j"], ["ends", "grad_j", "grad_i"])),
    ("vector", "walk", ([], [])), ("max_plus", "walk", ([], [])), ("delta", "steps", ([], [])),
])  # fmt: skip
def test_the_schedule_that_is_used(name: str, used: str, launches: tuple[list[str], list[str]]) -> None:
    found = facts(compiled(name))
    (r,) = found[0]["recurrences"]
    assert (r["schedule"]["used"], r["schedule"]["forward"], r["schedule"]["backward"]) == (used, *launches)
    assert f"    schedule    {used}: " in render_facts(found)
    kept = r["prefix_invariant"]
    assert kept["holds"] and not kept["demanded"] and kept["changes_at"] == ([1, 4096] if used == "passes" else [])
    assert kept["in_kernels"] == (used in ("passes", "walk")) and kept["by_tile"] == (name == "gated")
    assert "prefix-invariant: yes, in " in render_facts(found)


COMPLEX = """op f(n: int) {
  axes { t: time, i = n, j = n }
  input k[t, i], v[t, j], a[t] in [-inf, 0], w[t]
  recurrence over t {
    state S[i, j]: complex
    S = exp(complex(a, w)) * S + k * v
    o = re(sum[i](k * S))
  }
  output o
}
"""


def test_complex_states_are_pytorch_on_tiles() -> None:
    (r,) = facts(compile_source(SourceFile("f.spec", COMPLEX)))[0]["recurrences"]
    assert r["schedule"]["used"] == "tiles" and not r["prefix_invariant"]["in_kernels"]


PARTS = """op f(n: int) {
  axes { t: time, e = n }
  input x[t, e], a[t, e] in [0, 1]
  SCHEDULE
  chunk c of t = RULE
  recurrence over t within c {
    state h[e]
    h = a * h + x
  }
  output h
}
"""


def test_chunks_that_the_length_moves() -> None:
    for rule, holds in (("parts(2)", False), ("fixed(5)", True), ("runs(x[e = 0] > 0)", True)):
        found = facts(compile_source(SourceFile("f.spec", PARTS.replace("RULE", rule).replace("SCHEDULE", ""))))
        assert found[0]["recurrences"][0]["prefix_invariant"]["holds"] == holds
        assert ("prefix-invariant: no, the sequence's length" in render_facts(found)) != holds
    with pytest.raises(CompileError, match="prefix_invariant"):
        demand = PARTS.replace("RULE", "parts(2)").replace("SCHEDULE", "schedule { prefix_invariant = true }")
        compile_source(SourceFile("f.spec", demand))


DEMAND = """op f(n: int) {
  axes { t: time, e = n }
  input x[t, e], a[t, e] in [0, 1]
  schedule { prefix_invariant = true }
  recurrence over t {
    state h[e]
    h = a * h + x
  }
  output h
}
op g(n: int) {
  axes { t: time, e = n }
  input x[t, e], a[t, e] in [0, 1]
  y = f(x, a)
  output y
}
"""


def test_what_is_demanded_is_said() -> None:
    found = facts(compile_source(SourceFile("f.spec", DEMAND)))
    assert [u["schedule"] for u in found] == [
        {"prefix_invariant": True, "set_aside": []}, {"prefix_invariant": False, "set_aside": ["f"]}
    ]  # fmt: skip
    first, second = render_facts(found).split("op g")
    assert "; demanded  (f.spec:4)" in first and "set aside" not in first
    assert "demanded" not in second and "  the schedule here governs, and that of f is set aside" in second


def at(shape: dict[str, int], machine: str = "h100", dtype: str = "bf16", **settings: float) -> At:
    return At(shape, settings, machine, dtype)


def test_estimates() -> None:
    """The model's sizes are the spec's; one marks what is used and what would be cheapest."""
    shape = {"B": 8, "T": 8192, "H": 4, "K": 128, "V": 256}
    (r,) = facts(compiled("gated"), at=at(shape, "h200"))[0]["recurrences"]
    found = r["estimates"]
    assert found["sizes"] == {"B": 8, "t": 8192, "h": 4, "i": 128, "j": 256} and found["score_levels"] == 6
    wanted = Scan(8, 8192, 4, 128, 256, gate_i="each")
    for way, backward in zip(found["passes"], (False, True)):
        assert (way["used"], way["least_bytes"]) == ("passes", least_bytes(wanted, backward))
        assert way["emitted"] == r["schedule"]["backward" if backward else "forward"]
        made = estimates(wanted, MACHINES["h200"], backward)
        assert [e["seconds"] for e in way["schedules"]] == [e.seconds for e in made]
        assert way["cheapest"] == cheapest(made).schedule
    text = render_facts([{**facts(compiled("gated"))[0], "recurrences": [r]}])
    assert "at least 0.110 ms: 469.8 MB, 34.36 GFLOP" in text
    assert re.search(r"fused .* \(cheapest\)\n +passes .* \(used, as states, read_j\)", text)
    (slow,) = facts(compiled("gated"), at=at(shape, "a100", "fp32"))[0]["recurrences"]
    assert slow["estimates"]["passes"][0]["least_bytes"] == 2 * least_bytes(wanted)
    assert slow["estimates"]["passes"][0]["limit_seconds"] > 2 * found["passes"][0]["limit_seconds"]


@pytest.mark.parametrize("name, gates", [
    ("gated", ("each", "none")), ("value_gate", ("none", "each")), ("product_gate", ("each", "each")),
    ("scalar_gate", ("head", "none")), ("no_gate", ("none", "none")), ("raw_key", ("each", "none")),
])  # fmt: skip
def test_gates_that_the_model_sees(name: str, gates: tuple[GateKind, GateKind]) -> None:
    (r,) = facts(compiled(name), at=at({"B": 2, "T": 8192, "H": 2, "K": 32, "V": 64}))[0]["recurrences"]
    wanted = estimates(Scan(2, 8192, 2, 32, 64, gate_i=gates[0], gate_j=gates[1]), MACHINES["h100"])
    assert r["estimates"]["passes"][0]["used"] == "split"
    assert [e["bytes"] for e in r["estimates"]["passes"][0]["schedules"]] == [e.total("bytes") for e in wanted]
    assert [e["exps"] for e in r["estimates"]["passes"][0]["schedules"]] == [e.total("exps") for e in wanted]


def test_a_declared_bound_takes_levels_away() -> None:
    def levels(low: str) -> tuple[float | None, int]:
        text = cases.OPS["gated"].replace("[-inf, 0]", f"[{low}, 0]")
        (r,) = facts(compile_source(SourceFile("f.spec", text)), at=at({"T": 256}))[0]["recurrences"]
        return r["estimates"]["decay"], r["estimates"]["score_levels"]

    assert [levels(low) for low in ("-1", "-5", "-inf")] == [(1.0, 1), (5.0, 3), (None, 6)]


def test_what_has_no_estimate() -> None:
    both = facts(compiled("both_sides"), at=at({"T": 256}))
    assert "one side" in both[0]["recurrences"][0]["estimates"]["why_not"]
    assert "no estimate: the model knows reads along one side" in render_facts(both)
    for name in ("vector", "delta"):
        with pytest.raises(BenchError, match="over keys and values"):
            facts(compiled(name), at=at({"T": 256}))
    with pytest.raises(BenchError, match="no axis 'K2'"):
        facts(compiled("gated"), at=at({"K2": 256}))
    with pytest.raises(SettingError, match="no parameter 'nothing'"):
        facts(compiled("gated"), at=at({}, nothing=1))


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
