"""Graphs over tiles: their text, the rules that hold, and each rule broken once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import cases
import pytest
from derived import ALL, IDS, TEXTS, scans
from emitted import Case, emit, errors
from shipped import SPECS

from chunkc import cli
from chunkc.ir import nodes as N
from chunkc.ir import tiles as T
from chunkc.ir.graph import Graph, Level
from chunkc.ir.text import parse_graph, print_graph
from chunkc.ir.verify import VerifyError, verify


def change(graph: Graph, id_: str, **fields: object) -> Graph:
    return graph.evolve(nodes=tuple(n.evolve(**fields) if n.id == id_ else n for n in graph.nodes))


def insert(graph: Graph, *nodes: N.AnyNode) -> Graph:
    return graph.evolve(nodes=(*graph.nodes, *nodes))


def rejected(graph: Graph, where: str, what: str, level: Level = "chunked") -> None:
    """The graph breaks a rule of its level: some message has these words and blames this node."""
    with pytest.raises(VerifyError) as caught:
        verify(graph, level)
    assert any(m.node == where and what in m.text for m in caught.value.messages), caught.value


@pytest.fixture(scope="module")
def tiles() -> Graph:
    graph = scans("gated")[0].node.tiles
    assert graph is not None
    verify(graph, "chunked")
    return graph


@pytest.mark.parametrize("name, index", ALL, ids=IDS)
def test_text_reads_back(name: str, index: int) -> None:
    for graph in scans(name)[index].node.regions().values():
        text = print_graph(graph)
        assert parse_graph(text) == graph
        assert print_graph(parse_graph(text)) == text


def test_what_a_chunk_form_is_made_of(tiles: Graph) -> None:
    """One walk over tiles; pairs of tokens only in a halving's blocks; no product is over a token and both sides."""
    assert len(tiles.of_kind(T.Carry)) == len(tiles.of_kind(T.Halving)) == 1
    (halving,) = tiles.of_kind(T.Halving)
    scores = [n for n in halving.body.of_kind(T.Contract) if {"earlier", "later"} <= set(n.axes)]
    assert len(scores) == 1
    assert not any({"place", "column"} <= set(n.axes) for n in tiles.nodes)


def test_without_gates_a_masked_product_does() -> None:
    graph = scans("no_gate")[0].node.tiles
    assert graph is not None
    assert not graph.of_kind(T.Halving) and len(graph.of_kind(T.Strict)) == 1
    assert not [n for n in graph.of_kind(N.Map) if n.fn == "exp"]


def test_gates_that_are_no_logarithms_are_raised_for_their_gradient_alone() -> None:
    (scan,) = scans("raw_key")
    assert scan.node.tiles is not None and scan.node.tiles_backward is not None
    assert {n.log for n in scan.node.tiles.of_kind(T.Tile)} == {"", "zero"}
    assert {n.log for n in scan.node.tiles_backward.of_kind(T.Tile)} == {"", "zero", "small"}
    assert len(scan.node.tiles_backward.of_kind(T.Halving)) == 2


def test_rejects_kinds_of_other_levels(tiles: Graph) -> None:
    rejected(
        insert(tiles, N.Coord(id="new", axis="t", axes=("t",), dtype="int")), "new", "does not stand in a graph over"
    )


def test_rejects_tiles(tiles: Graph) -> None:
    rejected(change(tiles, "k_tiles", axis="i"), "k_tiles", "it is over tile, h, place, i")
    rejected(change(tiles, "k_tiles", arg="initial", axis="t"), "k_tiles", "is not over t")
    (untile,) = tiles.of_kind(T.Untile)
    rejected(change(tiles, untile.id, over=("tile", "j")), untile.id, "it is over t, h, j")


def test_rejects_sums_and_products(tiles: Graph) -> None:
    span = tiles.of_kind(T.Span)[0]
    rejected(change(tiles, span.id, axis="j"), span.id, "it sums along 'j'")
    rejected(change(tiles, span.id, fn="whole"), span.id, "it sums along 'place'")
    rejected(change(tiles, "update", over=("i",)), "update", "it sums i of")
    rejected(insert(tiles, T.Strict(id="new", arg="update", row="i", column="place", axes=("tile", "h", "i", "j"))),
             "new", "it masks")  # fmt: skip


def test_rejects_carries(tiles: Graph) -> None:
    (carry,) = tiles.of_kind(T.Carry)
    rejected(change(tiles, carry.id, initial="update"), carry.id, "it starts from a value over tile")
    rejected(change(tiles, carry.id, decay="k_tiles"), carry.id, "its decay")
    rejected(change(tiles, carry.id, axis="place"), carry.id, "its update")


def test_rejects_prefixes() -> None:
    graph = scans("vector")[0].node.tiles
    assert graph is not None
    (prefix,) = graph.of_kind(T.Prefix)
    rejected(change(graph, prefix.id, axis="t"), prefix.id, "it composes maps over")
    rejected(change(graph, prefix.id, b="states"), prefix.id, "does not stand before it")


def test_rejects_halves(tiles: Graph) -> None:
    (halving,) = tiles.of_kind(T.Halving)
    (half, *_) = halving.body.of_kind(T.Half)
    wrong = change(halving.body, half.id, half="earlier")
    rejected(change(tiles, halving.id, body=wrong), f"{halving.id}/{half.id}", "it is over")
    (part,) = halving.parts
    rejected(change(tiles, halving.id, parts=(part.evolve(value="none"),)), halving.id, "there is no value 'none'")
    rejected(change(tiles, halving.id, parts=(part.evolve(total=3),)), halving.id, "no total 3")
    rejected(change(tiles, halving.id, parts=(part.evolve(half="earlier"),)), halving.id, "of total 0 is over")
    rejected(insert(tiles, half), half.id, "only in a halving's body")


def test_rejects_exponents_that_may_be_positive(tiles: Graph) -> None:
    """Of what is no log-gate; of a product of log-gates with something; of a gate that is no logarithm."""
    rejected(change(tiles, "log_g", log=""), "to_end_i", "is no sum of log-gates")
    axes = tiles["k_tiles"].axes
    rejected(insert(tiles, N.Map(id="new", fn="exp", args=("k_tiles",), axes=axes)), "new", "is no sum of log-gates")
    minus = N.Map(id="minus", fn="-", args=("log_g", "log_g"), axes=axes)
    anchored = N.Map(id="new", fn="exp", args=("minus",), axes=axes)
    rejected(insert(tiles, minus, anchored), "new", "is no sum of log-gates")


def test_rejects_pairs_of_tokens_and_trajectories(tiles: Graph) -> None:
    both = T.Contract(id="new", left="k", right="q_tiles", over=("h", "i"), axes=("t", "tile", "place"))
    rejected(insert(tiles, both), "new", "it is over t and tile")
    each: Any = T.Contract(id="new", left="k_tiles", right="v_tiles", over=(), axes=("tile", "h", "place", "i", "j"))
    rejected(insert(tiles, each), "new", "keeps a state for each token")
    (halving,) = tiles.of_kind(T.Halving)
    each = each.evolve(left="k_low", right="v_low", axes=("tile", "h", "block", "earlier", "i", "j"))
    inner = change(tiles, halving.id, body=insert(halving.body, each))
    rejected(inner, f"{halving.id}/new", "keeps a state for each token")


def test_every_text_has_been_cut_into_tiles() -> None:
    found = [s.node for name in TEXTS for s in scans(name)]
    assert found
    for s in found:
        assert set(s.regions()) == set(N.REGIONS if s.i or s.j else N.REGIONS[:4])


# -- kernels -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kernels() -> Graph:
    """Of a gate that is no logarithm: its gradient has kernels of its own."""
    graph = scans("raw_key")[0].node.kernels_backward
    assert graph is not None
    verify(graph, "fused")
    return graph


def refused(graph: Graph, where: str, what: str) -> None:
    rejected(graph, where, what, "fused")


def test_what_stays_between_kernels() -> None:
    """Only states at tiles' edges are kept between kernels, and half of a gate's gradient."""
    for name in TEXTS:
        for scan in scans(name):
            if scan.node.kernels is None or scan.node.kernels_backward is None:
                continue
            forward, backward = scan.node.kernels, scan.node.kernels_backward
            assert [b.id for b in forward.of_kind(T.Buffer) if b.life != "result"] == ["states"]
            kept = [b for b in backward.of_kind(T.Buffer) if b.life != "result"]
            assert kept[0].id == "ends" and all(b.id.endswith("_edges") for b in kept[1:])
            assert len(kept) == 1 + (len(scan.node.gates) == 1 and not scan.node.gates[0].log)
            assert [k.role for k in forward.of_kind(T.Kernel)][0] == "states"
            assert 3 <= len(backward.of_kind(T.Kernel)) <= 6


def test_a_kernel_computes_no_more_than_it_writes(kernels: Graph) -> None:
    roles = {k.role: k.body for k in kernels.of_kind(T.Kernel)}
    assert set(roles) == {"ends", "grad_j", "grad_i", "edges_i", "gate_i"}
    assert not roles["ends"].of_kind(T.Halving) and not roles["edges_i"].of_kind(T.Halving)
    assert {n.name for n in roles["gate_i"].of_kind(N.Input)} == {"a", "k", "v", "q", "d_out_q", "d_a_edges"}
    (halving,) = roles["grad_j"].of_kind(T.Halving)
    assert len(halving.totals) == len(halving.parts) == 1


def test_a_log_gates_gradient_comes_with_its_sides() -> None:
    graph = scans("gated")[0].node.kernels_backward
    assert graph is not None
    assert [k.role for k in graph.of_kind(T.Kernel)] == ["ends", "grad_j", "grad_i"]
    (own,) = (k for k in graph.of_kind(T.Kernel) if k.role == "grad_i")
    assert [name for name, _ in own.body.outputs] == ["d_k", "d_q", "d_g"]


def test_rejects_kernels(kernels: Graph) -> None:
    (first, *_) = kernels.of_kind(T.Kernel)
    refused(change(kernels, first.id, reads=first.reads[1:]), first.id, "and its body takes")
    refused(change(kernels, first.id, reads=("v", *first.reads[1:])), first.id, "'v' is over t, h, j")
    refused(change(kernels, first.id, blocks=("i", "i")), first.id, "two blocks of one side")
    refused(
        insert(kernels, N.Reduce(id="new", fn="sum", arg="k", over=("i",), axes=("t", "h"))), "new", "between kernels"
    )
    inner = change(first.body, first.body.of_kind(T.Carry)[0].id, axis="place")
    refused(change(kernels, first.id, body=inner), f"{first.id}/{first.body.of_kind(T.Carry)[0].id}", "its update")


def test_rejects_buffers(kernels: Graph) -> None:
    first = kernels.of_kind(T.Buffer)[0]
    refused(insert(kernels, first.evolve(id="new")), first.arg, "goes to 2 buffers")
    without = kernels.evolve(outputs=(), nodes=tuple(n for n in kernels.nodes if n.id != "d_v"))
    refused(without, "grad_j_kernel", "goes to 0 buffers")
    gate = next(b for b in kernels.of_kind(T.Buffer) if b.replaces)
    refused(change(kernels, gate.id, replaces="d_v"), gate.id, "it cannot replace 'd_v'")
    late = N.Map(id="new", fn="exp", args=(gate.replaces or "",), axes=gate.axes)
    refused(insert(kernels, late), gate.id, "is still read")
    refused(change(kernels, gate.id, index=1), gate.id, "there is no result 1")


def test_graph_of_lower_levels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Down to the kernels, whose text is the one that a package has."""
    spec = SPECS / "retention.spec"
    found = {}
    for level in ("normal", "chunked", "fused", "tiled"):
        assert cli.run(["graph", str(spec), "--level", level]) == 0
        found[level] = capsys.readouterr().out
    assert "scan" in found["normal"] and "= carry" not in found["normal"]
    assert "backward=" in found["chunked"] and "= carry" in found["chunked"] and "= kernel" not in found["chunked"]
    assert "= kernel" in found["fused"] and "= buffer" in found["fused"]
    assert cli.run(["build", str(spec), "-o", str(tmp_path)]) == 0
    comments = re.compile("  # .*")  # they name the file as it was given
    emitted = comments.sub("", (tmp_path / "retention" / "_kernels.py").read_text())
    kernels = [k for k in re.split(r"@triton.jit.*\n", comments.sub("", found["tiled"])) if k]
    assert len(kernels) == 6 and all(k.strip() in emitted for k in kernels)


NAMES = """op names(dk: int, dv: int) {
  axes { t: time, place = dk, block = dv, tile = 2, later = 3 }
  input part[t, tile, place], score[t, tile, place], d_score[t, tile, block, later], half[t, tile, place] in [-inf, 0]
  input d_score_low[t, tile, place], update[t, tile, block, later]
  recurrence over t {
    state S[tile, place, block, later]
    S = exp(half) * S + score * d_score + d_score_low * update
    o = sum[place](part * S)
  }
  output o
}
"""


def test_names_of_tiles_and_emitted_code_may_be_used(tmp_path: Path) -> None:
    """Axes and operands under names that chunk forms and their text have for themselves; two axes on one side."""
    module, units, compiled = emit(NAMES, tmp_path, "names.spec")
    (scan,) = compiled[0].graph.of_kind(N.Scan)
    assert scan.tiles is not None and {"tile_", "place_", "block_", "later_"} <= set(scan.tiles.axis)
    case = Case({"dk": 4, "dv": 6}, [70, 3], packed=True, resume=True, values={"half": cases.mixed})
    found = errors(module, units[0], case)
    assert max(found.values()) <= 1, found
