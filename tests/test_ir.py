"""Graphs as text, as pictures, and the rules that hold at each level."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkc.driver import check_path, check_source
from chunkc.ir import nodes as N
from chunkc.ir.axes import Axis, Size
from chunkc.ir.diagnostics import SourceFile, Span
from chunkc.ir.dot import as_dot
from chunkc.ir.graph import Graph
from chunkc.ir.text import KINDS, parse_graph, print_graph
from chunkc.ir.verify import RULES, VerifyError, verify
from chunkc.pipeline import PASSES, InternalError, run

SPECS = sorted((Path(__file__).parent.parent / "specs").glob("*.spec"))

MIXED = """
layer Mixed(d_model: int, heads: int = 4) {
  axes { t: time, s = t, d = d_model, h = heads, i = 8, j = d_model / heads, hk = 2 groups h }
  input x[t, d]
  input b[t] in [0, 1]
  param w[h, i] = uniform(-1, 1)
  q[t, h, i] = linear(x)
  k[t, hk, i] = linear(x)
  v[t, h, j] = linear(x)
  c = conv[t](x, 4)
  a = x[t = t - 1]
  top = q[i = 0]
  score[t, h] = sum[i](softmax[i](w * q) * sum[s](k[t = s]))
  recurrence over t {
    state S[h, i, j] = 1
    S = S * b + k * v
    o = sum[i](q * S)
  }
  recurrence over t {
    state u[h, j], n[h, i]
    u = tanh(u) * sigmoid(top) + v * where(t > 3, 1, 0) + mean[i](n)
    n = n * exp(-softplus(q)) + q * sum[j](u)
  }
  recurrence over t {
    state e[h, i]
    e = e * b + q
  }
  output y[t, d] = linear(o * u + score * v)
  output c
  output a
  output e
}
"""


def both_levels(graph: Graph) -> list[Graph]:
    """As it is written, as the back ends get it, and the normal form alone."""
    return [graph, run(graph, PASSES[:1]), run(graph)]


@pytest.fixture(scope="module")
def semantic() -> Graph:
    return check_source(SourceFile("mixed.spec", MIXED)).module.units[0].graph


@pytest.fixture(scope="module")
def normal(semantic: Graph) -> Graph:
    """The normal form alone, without what passes derive from its scans."""
    return run(semantic, PASSES[:1])


# -- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SPECS, ids=lambda p: p.stem)
def test_shipped_specs_verify_and_print_at_both_levels(path: Path) -> None:
    for unit in check_path(path).module.units:
        for graph in both_levels(unit.graph):
            verify(graph, graph.level)
            text = print_graph(graph)
            assert parse_graph(text) == graph
            assert print_graph(parse_graph(text)) == text
            assert balanced(as_dot(graph))


def test_all_features_round_trip(semantic: Graph, normal: Graph) -> None:
    for graph in (semantic, normal):
        assert parse_graph(print_graph(graph)) == graph


def test_text_is_readable() -> None:
    axes = (Axis(name="t", kind="time", space="t"), Axis(name="i", kind="size", size=Size.of(8), space="i"))
    a = N.Input(id="a", name="a", axes=("t",), low=0.0, span=Span("gla.spec", 10, 20))
    b = N.Map(id="*_4", fn="*", args=("a", "a"), axes=("t",))
    graph = Graph(axes=axes, nodes=(a, b), outputs=(("y", "*_4"),))
    assert print_graph(graph).splitlines() == [
        "graph semantic {",
        "  axis t: time",
        "  axis i: size size=<8>",
        "  %a: float[t] = input name=a low=0.0 @gla.spec:10-20",
        '  %*_4: float[t] = map fn="*" args=(%a, %a)',
        "  output y = %*_4",
        "}",
    ]


texts = st.text(max_size=4) | st.sampled_from(["x", "*_4", "-_1", "<=", "%", "true", "region", "a b", '"', "\\"])
floats = st.floats(allow_nan=False)
spans = st.none() | st.builds(Span, texts, st.integers(0, 99), st.integers(0, 99))
leaves = st.builds(Size.of, st.integers() | floats) | st.builds(lambda p: Size(op="param", value=p), texts)


def operations(inner: st.SearchStrategy[Size]) -> st.SearchStrategy[Size]:
    one = st.builds(lambda o, a: Size(op=o, args=(a,)), st.sampled_from(["neg", "exp", "log", "floor"]), inner)
    two = st.builds(
        lambda o, a, b: Size(op=o, args=(a, b)), st.sampled_from(["+", "-", "*", "/", "%", "^", "min"]), inner, inner
    )
    return one | two


sizes = st.recursive(leaves, operations, max_leaves=6)
names = st.lists(texts, max_size=3).map(tuple)
# Fields of one name may differ in type between kinds.
FIELDS: dict[type[N.Node], dict[str, Any]] = {
    N.Input: {"name": texts, "low": st.none() | floats, "high": st.none() | floats},
    N.Param: {"name": texts, "library": st.sampled_from(["", "weight", "bias"]), "fan_in": st.none() | sizes},
    N.Const: {"size": sizes},
    N.Random: {"fn": st.just("normal"), "a": sizes, "b": sizes},
    N.Map: {"fn": texts, "args": names},
    N.Linear: {"arg": texts, "weight": texts, "bias": st.none() | texts, "over": names, "to": names},
    N.Shift: {"arg": texts, "axis": texts, "by": sizes},
    N.Scan: {
        "axis": texts, "name": texts, "declared": names, "batch": names, "i": names, "reverse": st.booleans(),
        "gates": st.lists(st.builds(N.Gate, arg=texts, log=st.booleans()), max_size=2).map(tuple),
        "writes": st.lists(st.builds(N.Write, i=texts, j=texts), max_size=2).map(tuple),
        "queries": st.lists(st.builds(N.Query, side=st.sampled_from(["i", "j"]), arg=texts), max_size=2).map(tuple),
        "algebra": st.sampled_from(["sum-product", "max-plus"]), "initial": st.none() | texts,
    },
    N.Out: {"arg": texts, "index": st.integers()},
}  # fmt: skip


def nodes() -> st.SearchStrategy[Any]:
    dtypes = st.sampled_from(["float", "int", "bool", "complex"])
    return st.one_of(
        *(st.builds(c, id=texts, axes=names, dtype=dtypes, span=spans, **own) for c, own in FIELDS.items())
    )


def graphs(inner: st.SearchStrategy[Graph] | None = None) -> st.SearchStrategy[Graph]:
    axes = st.builds(
        Axis, name=texts, kind=st.sampled_from(["time", "size"]), size=st.none() | sizes, space=texts,
        parent=st.none() | texts,
    )  # fmt: skip
    some = nodes()
    if inner is not None:
        carried = st.builds(N.Carried, name=texts, axes=names, initial=st.none() | texts, result=texts, span=spans)
        some |= st.builds(N.Recur, id=texts, axis=texts, carried=st.lists(carried, max_size=2).map(tuple), body=inner,
                          reason=texts)  # fmt: skip
        some |= st.builds(N.Param, id=texts, name=texts, init=inner)
    return st.builds(
        Graph, level=st.sampled_from(["semantic", "normal"]), nodes=st.lists(some, max_size=4).map(tuple),
        outputs=st.lists(st.tuples(texts, texts), max_size=2).map(tuple), axes=st.lists(axes, max_size=2).map(tuple),
    )  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(graphs(graphs()))
def test_any_graph_round_trips(graph: Graph) -> None:
    back = parse_graph(print_graph(graph))
    assert back == graph
    assert repr(back) == repr(graph)  # equality takes 1, 1.0 and True for one another


def test_numbers_keep_their_type() -> None:
    for value in (1, 1.0, math.inf, -math.inf, 1e300, -2, 0, 0.0, -0.0):
        graph = Graph(nodes=(N.Const(id="c", size=Size.of(value)),))
        assert repr(parse_graph(print_graph(graph))) == repr(graph)


@pytest.mark.parametrize(
    "text, line, what",
    [
        ("", 1, "expected 'graph'"),
        ("graph middle {\n}", 1, "level"),
        ("graph normal {\n  %x: float[] = nothing\n}", 2, "no kind of node 'nothing'"),
        ("graph normal {\n  %x: float[] = input\n}", 2, "name"),
        ("graph normal {\n  %x: float[] = input name=x name=y\n}", 2, "given twice"),
        ("graph normal {\n  %x: float[] = input name=x color=red\n}", 2, "color"),
        ("graph normal {\n  %x: text[] = input name=x\n}", 2, "dtype"),
        ("graph normal {\n  %x: float[t, = input name=x\n}", 2, "expected word"),
        ("graph normal {\n\n  %x: float[] = const size=<1 +>\n}", 3, "expected"),
        ("graph normal {\n\n  %x: float[] = const size=<1.2.3>\n}", 3, "expected '>', not '.'"),
        ("graph normal {\n\n  %x: float[] = const size=<what(1)>\n}", 3, "op"),
        ('graph normal {\n  %"\\q": float[] = const size=<1>\n}', 2, "not '%'"),
        ("graph normal {\n", 2, "not the end"),
        ("graph normal {\n}\n}", 3, "goes on"),
        ("graph normal {\n  $\n}", 2, "expected '}', not '$'"),
        ("graph normal {\n  %x: float[] = const size=<" + "(" * 5000, 2, "too deeply"),
    ],
)
def test_malformed_text_names_the_line(text: str, line: int, what: str) -> None:
    with pytest.raises(ValueError, match=rf"^line {line}: .*{re.escape(what)}"):
        parse_graph(text)


def test_endless_regions_are_no_crash() -> None:
    with pytest.raises(ValueError, match=r"^line \d+: nested too deeply"):
        parse_graph("graph normal {\n" + "  %x: float[] = param name=x init=graph normal {\n" * 2000)


def test_every_kind_can_be_parsed() -> None:
    assert {"input", "map", "recur", "scan", "out"} <= set(KINDS)
    assert all(cls.model_fields["kind"].default == kind for kind, cls in KINDS.items())


# -- rules -----------------------------------------------------------------------------------------------------------


def test_valid_graphs_pass(semantic: Graph, normal: Graph) -> None:
    verify(semantic, "semantic")
    verify(normal, "normal")


def change(graph: Graph, id_: str, **fields: object) -> Graph:
    """The graph with fields of one node changed; `a/b` is node b in the body of a."""
    top, _, rest = id_.partition("/")
    node: Any = graph[top]
    new = node.evolve(body=change(node.body, rest, **fields)) if rest else node.evolve(**fields)
    return graph.evolve(nodes=tuple(new if n.id == top else n for n in graph.nodes))


def rejected(graph: Graph, where: str, what: str) -> None:
    """The graph breaks a rule: some message has these words and blames this node."""
    with pytest.raises(VerifyError) as caught:
        verify(graph, graph.level)
    assert any(m.node == where and what in m.text for m in caught.value.messages), caught.value


def insert(graph: Graph, *nodes: N.AnyNode) -> Graph:
    return graph.evolve(nodes=(*graph.nodes, *nodes))


def only(graph: Graph, cls: type[Any]) -> Any:
    return graph.of_kind(cls)[0]


def test_rejects_level(semantic: Graph) -> None:
    with pytest.raises(VerifyError, match="its level is semantic, not normal"):
        verify(semantic, "normal")
    body = only(semantic, N.Recur)
    rejected(change(semantic, body.id, body=body.body.evolve(level="normal")), f"{body.id}/graph", "its level")


def test_rejects_ids(semantic: Graph) -> None:
    rejected(insert(semantic, semantic.nodes[0]), semantic.nodes[0].id, "used twice")
    rejected(insert(semantic, N.Const(id="", size=Size.of(1))), "", "empty")


def test_rejects_operands_after_their_use(semantic: Graph) -> None:
    rejected(semantic.evolve(nodes=semantic.nodes[::-1]), "y", "does not stand before")
    rejected(insert(semantic, N.Map(id="new", fn="exp", args=("nothing",))), "new", "does not stand before")
    rejected(insert(semantic, N.Map(id="new", fn="exp", args=("new",))), "new", "does not stand before")


def test_rejects_outputs(semantic: Graph) -> None:
    rejected(semantic.evolve(outputs=(("z", "nothing"),)), "nothing", "is no node")
    rejected(semantic.evolve(outputs=(("z", "y"), ("z", "c"))), "c", "defined twice")


def test_rejects_unknown_axes(semantic: Graph) -> None:
    rejected(change(semantic, "x", axes=("t", "nowhere")), "x", "'nowhere' is unknown")
    rejected(change(semantic, "x", axes=("t", "t")), "x", "stands twice")
    rejected(change(semantic, "a", axis="nowhere"), "a", "'nowhere' is unknown")
    stray = Axis(name="z", kind="size", space="z", parent="nowhere")
    rejected(semantic.evolve(axes=(*semantic.axes, stray)), "z", "'nowhere' is unknown")


def test_rejects_kinds_out_of_place(semantic: Graph) -> None:
    body = only(semantic, N.Recur)
    rejected(insert(semantic, N.State(id="new", name="S")), "new", "only in a body")
    one = Size.of(1)
    rejected(insert(semantic, N.Random(id="new", fn="normal", a=one, b=one)), "new", "only in an initial value")
    inner = insert(body.body, N.Input(id="new", name="new", axes=("d",)))
    rejected(change(semantic, body.id, body=inner), f"{body.id}/new", "in no region")
    inner = insert(body.body, N.Coord(id="new", axis="t", axes=("t",), dtype="int"))
    rejected(change(semantic, body.id, body=inner), f"{body.id}/new", "is bound here")
    weight: Any = semantic["w"]
    inner = insert(weight.init, N.Recur(id="new", axis="t", carried=(), body=Graph(axes=semantic.axes)))
    rejected(change(semantic, "w", init=inner), "w/new", "in no initial value")


def test_rejects_carried_states(semantic: Graph) -> None:
    recur = only(semantic, N.Recur)
    (state,) = recur.carried
    rejected(change(semantic, recur.id, carried=(state, state)), recur.id, "one name")
    rejected(change(semantic, recur.id, carried=(state.evolve(result="nothing"),)), recur.id, "no node of the body")
    rejected(change(semantic, recur.id, carried=(state.evolve(axes=("h", "j", "i")),)), recur.id, "becomes a value")
    rejected(change(semantic, recur.id, carried=(state.evolve(initial="x"),)), recur.id, "starts from a value")
    body = recur.body.evolve(outputs=(("o", "nothing"),))
    rejected(change(semantic, recur.id, body=body), recur.id, "no node of the body")


def test_rejects_reads_of_a_body(semantic: Graph) -> None:
    recur = only(semantic, N.Recur)
    state = only(recur.body, N.State)
    rejected(change(semantic, f"{recur.id}/{state.id}", name="T"), f"{recur.id}/{state.id}", "carries no state 'T'")
    capture = only(recur.body, N.Capture)
    rejected(change(semantic, f"{recur.id}/{capture.id}", outer="nothing"), recur.id, "does not stand before")
    rejected(change(semantic, f"{recur.id}/{capture.id}", outer="x"), f"{recur.id}/{capture.id}", "it is over")


def test_rejects_results_without_out(semantic: Graph, normal: Graph) -> None:
    for graph, cls in ((semantic, N.Recur), (normal, N.Scan)):
        source = only(graph, cls)
        rejected(insert(graph, N.Map(id="new", fn="exp", args=(source.id,))), "new", "without an out")
        rejected(graph.evolve(outputs=(("z", source.id),)), source.id, "several results")
        out = next(n for n in graph.of_kind(N.Out) if n.arg == source.id)
        rejected(change(graph, out.id, index=9), out.id, "there is no result 9")
        rejected(change(graph, out.id, index=-1), out.id, "there is no result -1")
        rejected(change(graph, out.id, axes=()), out.id, "it is over no axis")
        rejected(change(graph, out.id, arg="x"), out.id, "'x' has one result")


def test_rejects_axes_worked_along(semantic: Graph) -> None:
    rejected(change(semantic, only(semantic, N.Reduce).id, over=("d",)), only(semantic, N.Reduce).id, "along 'd'")
    softmax = only(semantic, N.Normalize).id
    rejected(change(semantic, softmax, over=("d",)), softmax, "along 'd'")
    rejected(change(semantic, "q", over=("j",)), "q", "along 'j'")
    rejected(change(semantic, "top", axis="j"), "top", "along 'j'")


def test_rejects_the_wrong_sort_of_axis(semantic: Graph) -> None:
    rejected(change(semantic, "a", axis="d"), "a", "is no sequence")
    rejected(change(semantic, only(semantic, N.Recur).id, within="d"), only(semantic, N.Recur).id, "divides no other")
    new = N.Slice(id="new", arg="x", axis="t", at=Size.of(0), axes=("d",))
    rejected(insert(semantic, new), "new", "is a sequence")
    rename, expand = only(semantic, N.Rename).id, only(semantic, N.Expand).id
    rejected(change(semantic, rename, target="d"), rename, "no second name")
    rejected(change(semantic, expand, target="j"), expand, "does not group")


def test_rejects_map_axes(semantic: Graph, normal: Graph) -> None:
    for graph in (semantic, normal):
        node = next(n for n in graph.of_kind(N.Map) if n.fn == "*")
        rejected(change(graph, node.id, axes=("t",)), node.id, "its operands are over")
    rejected(insert(semantic, N.Map(id="new", fn="as", args=("x",), axes=("t",))), "new", "keeps its axes")
    recur = only(semantic, N.Recur)
    inner = next(n for n in recur.body.nodes if isinstance(n, N.Map))
    rejected(change(semantic, f"{recur.id}/{inner.id}", axes=()), f"{recur.id}/{inner.id}", "its operands are over")


def test_rejects_weights(semantic: Graph) -> None:
    rejected(change(semantic, "k", weight="q_weight"), "k", "its weight is over d, h, i")
    rejected(change(semantic, "q", bias="q_weight"), "q", "its bias is over d, h, i, not h, i")
    rejected(change(semantic, "c", weight="q_weight"), "c", "its weight is over")


@pytest.mark.parametrize("id_, axes", [("q", ("t",)), ("a", ("d", "t")), ("top", ("t", "h", "i")), ("c", ("t",))])
def test_rejects_result_axes(semantic: Graph, id_: str, axes: tuple[str, ...]) -> None:
    wrong = change(semantic, id_, axes=axes)
    rejected(wrong, id_, f"it is over {', '.join(axes)}, not")
    with pytest.raises(VerifyError) as caught:
        verify(wrong, "semantic")
    assert caught.value.messages[0].node == id_  # the cause stands before what follows from it


def test_rejects_result_axes_of_every_kind(semantic: Graph) -> None:
    wrong: list[N.AnyNode] = [
        N.Const(id="new", size=Size.of(1), axes=("d",)),
        N.Coord(id="new", axis="t", dtype="int"),
        N.Length(id="new", axis="t", axes=("t",), dtype="int"),
        N.Reduce(id="new", fn="sum", arg="x", over=("d",), axes=("d",)),
        N.Normalize(id="new", fn="softmax", arg="x", over=("d",), axes=("t",)),
        N.Rename(id="new", arg="x", source="t", target="s", axes=("t", "d")),
        N.Expand(id="new", arg="k", source="hk", target="h", axes=("t", "hk", "i")),
        N.Gather(id="new", arg="x", index="b", axis="t", axes=("d", "t")),
    ]
    for node in wrong:
        rejected(insert(semantic, node), "new", "it is over")


def test_semantic_rejects_scans(normal: Graph) -> None:
    rejected(normal.evolve(level="semantic"), only(normal, N.Scan).id, "only at the normal level")


def test_no_tiles_above_their_level(semantic: Graph, normal: Graph) -> None:
    span = N.T.Span(id="new", arg="x", fn="before", axis="t", axes=("t", "d"))
    for graph in (semantic, normal):
        rejected(insert(graph, span), "new", f"does not stand at the level {graph.level}")


def test_normal_rejects_recurrences_without_reason(normal: Graph) -> None:
    recur = only(normal, N.Recur)
    rejected(change(normal, recur.id, reason=""), recur.id, "has a reason")


def test_normal_rejects_scan_sides(normal: Graph) -> None:
    rejected(change(normal, "scan_S", i=("i", "h")), "scan_S", "share an axis")
    rejected(change(normal, "scan_S", batch=("h", "t")), "scan_S", "share an axis")
    rejected(change(normal, "scan_S", declared=("h", "i")), "scan_S", "its state is over")


def scan_over(graph: Graph, *axes: str, **fields: object) -> Graph:
    """The graph with a parameter `wide` over these axes before the scan, which fields may speak of."""
    wide = N.Param(id="wide", name="wide", axes=axes)
    return change(graph.evolve(nodes=(wide, *graph.nodes)), "scan_S", **fields)


def test_normal_rejects_scan_operands(normal: Graph) -> None:
    broken = scan_over(normal, "d", gates=(N.Gate(arg="wide", log=False),))
    rejected(broken, "scan_S", "'wide' is over d, beyond")
    rejected(scan_over(normal, "d", initial="wide"), "scan_S", "'wide' is over d, beyond")
    rejected(scan_over(normal, "d", add="wide"), "scan_S", "'wide' is over d, beyond")


def test_normal_rejects_scan_gates(normal: Graph) -> None:
    gates = (N.Gate(arg="wide", log=True),)
    rejected(scan_over(normal, "i", "j", gates=gates), "scan_S", "over axes of both sides")
    verify(scan_over(normal, "h", "i", gates=gates), "normal")


def test_normal_rejects_scan_writes(normal: Graph) -> None:
    (write,) = only(normal, N.Scan).writes
    rejected(scan_over(normal, "j", writes=(write.evolve(i="wide"),)), "scan_S", "a write's i side")
    rejected(scan_over(normal, "i", writes=(write.evolve(j="wide"),)), "scan_S", "a write's j side")
    verify(scan_over(normal, "h", writes=(N.Write(i="wide", j="wide"),)), "normal")


def test_normal_rejects_scan_queries(normal: Graph) -> None:
    rejected(scan_over(normal, "j", queries=(N.Query(side="i", arg="wide"),)), "scan_S", "a query of side i")
    rejected(scan_over(normal, "i", queries=(N.Query(side="j", arg="wide"),)), "scan_S", "a query of side j")


def test_normal_rejects_vector_scans_with_sides(normal: Graph) -> None:
    (write,) = only(normal, N.Scan).writes
    vector = next(n for n in normal.of_kind(N.Scan) if not n.i)
    rejected(change(normal, vector.id, writes=(N.Write(i="q", j="q"),)), vector.id, "no writes and no queries")
    rejected(change(normal, vector.id, queries=(N.Query(side="i", arg="b"),)), vector.id, "no writes and no queries")
    rejected(change(normal, "scan_S", algebra="max-plus"), "scan_S", "max-plus")


@pytest.fixture(scope="module")
def derived(semantic: Graph) -> Graph:
    """The normal form with what passes derive from its scans."""
    return run(semantic)


def region(graph: Graph, scan: str, name: str, **changes: object) -> Graph:
    """The graph with the fields of a graph that was derived from a scan changed."""
    return change(graph, scan, **{name: getattr(graph[scan], name).evolve(**changes)})


def test_normal_rejects_derived_graphs(derived: Graph) -> None:
    backward = derived["scan_S"].backward  # type: ignore[union-attr]
    assert backward is not None
    inputs = [n for n in backward.nodes if isinstance(n, N.Input)]
    rejected(region(derived, "scan_S", "backward", outputs=backward.outputs[1:]), "scan_S", "gradients for")
    rejected(region(derived, "scan_S", "backward", nodes=tuple(inputs[:2]), outputs=()), "scan_S", "too few")
    gate = only(backward, N.GateGradient)
    where = f"scan_S/backward/{gate.id}"

    def with_gate(**fields: object) -> Graph:
        return change(derived, "scan_S", backward=change(backward, gate.id, **fields))

    rejected(with_gate(adjoint=gate.scan), where, "are no scan and its adjoint")
    rejected(with_gate(gate=1), where, "has no gate 1")
    rejected(with_gate(axes=("t",)), where, "and its gate over")


def test_every_rule_says_what_holds() -> None:
    assert all(rule.__doc__ for rules in RULES.values() for rule in rules)


# -- between passes --------------------------------------------------------------------------------------------------


class Careless:
    """A pass that forgets a node."""

    name = "careless"

    def run(self, graph: Graph) -> Graph:
        return graph.evolve(nodes=graph.nodes[1:])


def test_the_pipeline_verifies_its_input_and_every_pass(semantic: Graph) -> None:
    with pytest.raises(InternalError, match="before the first pass"):
        run(Careless().run(semantic))
    with pytest.raises(InternalError, match="after the pass 'careless'"):
        run(semantic, (Careless(),))


# -- pictures --------------------------------------------------------------------------------------------------------


def balanced(text: str) -> bool:
    """Whether quotes close on their line, and braces close outside quotes."""
    bare = re.sub(r'"(?:[^"\\\n]|\\.)*"', "", text)
    depth = 0
    for c in bare:
        depth += (c == "{") - (c == "}")
        if depth < 0:
            return False
    return depth == 0 and '"' not in bare and "[" not in re.sub(r"\[[^][{}]*\]", "", bare)


def test_dot_shows_recurrences_as_clusters(semantic: Graph, normal: Graph) -> None:
    for graph in (semantic, normal):
        text = as_dot(graph)
        assert balanced(text)
        assert text.count("subgraph") == len(graph.of_kind(N.Recur))
    assert '"cluster steps_u_n"' in as_dot(normal)


def test_dot_draws_only_nodes_that_it_names(semantic: Graph, normal: Graph) -> None:
    string = r'"(?:[^"\\\n]|\\.)*"'
    for graph in (semantic, normal):
        text = as_dot(graph)
        named = set(re.findall(rf"^ *({string}) \[label", text, re.MULTILINE))
        edges = re.findall(rf"^ *({string}) -> ({string})", text, re.MULTILINE)
        assert edges and {end for edge in edges for end in edge} <= named


def test_dot_escapes_labels() -> None:
    graph = Graph(nodes=(N.Const(id='a"}\\\n{', size=Size.of(1)),), outputs=(('"', 'a"}\\\n{'),))
    assert balanced(as_dot(graph, title='"{'))


@settings(max_examples=50, deadline=None)
@given(st.lists(nodes().filter(lambda n: not isinstance(n, N.Out)), max_size=4))
def test_dot_is_balanced_whatever_the_ids(some: list[N.AnyNode]) -> None:
    assert balanced(as_dot(Graph(nodes=tuple(some))))
