"""An attention's sources as functions of a tile of queries and a tile of rows, and the gradients of these.

Inputs are the captures of the body, the sequence first; what is over queries or over rows alone is given, what is over
both is computed. A source's gradient takes those of its logit and of its value; the gradient of what is over rows alone
is a sum over queries, and the other way about: over tiles, these are added up."""

from __future__ import annotations

from collections.abc import Iterable

from chunkc.ir import nodes as N
from chunkc.ir.graph import Builder, Graph
from chunkc.passes.calculus import gradients


def derived(node: N.Attend) -> N.Attend:
    """The attention, each source with its `scores` and `gradients`."""
    return node.evolve(sources=tuple(s.evolve(scores=scores(node, s), gradients=vjp(node, s)) for s in node.sources))


def scores(node: N.Attend, source: N.Source) -> Graph:
    """Inputs by the names of the captures; outputs: logit, value, mask, those that there are."""
    b = Builder("normal", node.body.axes)
    names = _copied(b, node, source)
    found = (("logit", source.logit), ("value", source.value), ("mask", source.mask))
    return b.graph((name, names[id_]) for name, id_ in found if id_ is not None)


def vjp(node: N.Attend, source: N.Source) -> Graph:
    """Inputs: the captures, `d_logit` and `d_value`; outputs: `d_` and the name of each capture that has a gradient."""
    b = Builder("normal", node.body.axes)
    names = _copied(b, node, source)
    given: dict[str, list[str]] = {}
    pair = tuple(a for a in (node.query, source.axis) if a is not None)
    for what, part in (("d_logit", source.logit), ("d_value", source.value)):
        if part is not None:
            own = names[part]
            axes = (*pair, *node.logit_axes()) if what == "d_logit" else value_axes(b.nodes[own].axes, pair)
            given.setdefault(own, []).append(_over(b, b.add(N.Input, what, name=what, axes=axes), b.nodes[own].axes))
    outputs: list[tuple[str, str]] = []
    wild = _wild(b)
    for x in reversed(list(b.nodes.values())):
        if x.id not in given or x.dtype != "float" or isinstance(x, N.Const):
            continue
        total = _sum(b, given[x.id])
        if isinstance(x, N.Input):
            total = _over(b, total, x.axes)
            outputs.append((f"d_{x.name}", total if b.nodes[total].axes == x.axes else _as(b, total, x.axes)))
            continue
        for arg, d in _operands(b, x, total):
            if d is not None and x.id in wild:
                d = b.map("where", b.map("==", total, b.const(0.0)), b.const(0.0), d)
            if d is not None and b.nodes[arg].dtype == "float" and not isinstance(b.nodes[arg], N.Const):
                given.setdefault(arg, []).append(_over(b, d, b.nodes[arg].axes, x.axes if isinstance(x, N.Map) else ()))
    return b.graph(reversed(outputs)).pruned()


WILD = ("log", "/", "pow", "inv_softplus")


def _wild(b: Builder) -> set[str]:
    """What may be infinite, or have a derivative that is: of a pair that is not seen, it is not multiplied by 0."""
    out: set[str] = set()
    for n in b.nodes.values():
        if isinstance(n, N.Map) and (n.fn in WILD or out & set(n.args)):
            out.add(n.id)
    return out


def value_axes(axes: tuple[str, ...], pair: tuple[str, ...]) -> tuple[str, ...]:
    """A value's axes with the queries' and the rows' first."""
    return (*(a for a in pair if a in axes), *(a for a in axes if a not in pair))


def _copied(b: Builder, node: N.Attend, source: N.Source) -> dict[str, str]:
    """The part of the body that a source needs, its captures as inputs."""
    needed = node.body.reachable(id_ for id_ in (source.logit, source.value, source.mask) if id_ is not None)
    names: dict[str, str] = {}
    for n in node.body.nodes:
        if n.id not in needed:
            continue
        if isinstance(n, N.Capture):
            axes = tuple(sorted(n.axes, key=lambda a: not node.body.axis[a].is_sequence))
            names[n.id] = b.add(N.Input, n.id, n.span, name=n.id, axes=axes, dtype=n.dtype)
        else:
            names[n.id] = b.like(n.renamed(names))
    return names


def _sum(b: Builder, terms: Iterable[str]) -> str:
    first, *rest = terms
    for t in rest:
        first = b.map("+", first, t)
    return first


def _operands(b: Builder, node: N.AnyNode, d: str) -> list[tuple[str, str | None]]:
    """The gradient of each operand, over what axes it happens to have."""
    if isinstance(node, N.Map):
        return list(zip(node.args, gradients(b, node, d)))
    if isinstance(node, N.Reduce) and node.chunk is None and node.fn in ("sum", "mean"):
        if node.fn == "mean":
            d = b.map("/", d, _count(b, node.over))
        return [(node.arg, d)]
    if isinstance(node, N.Expand):  # summed group by group
        axes = b.nodes[d].axes
        rest = (node.source, *(a for a in axes if a != node.target))
        full = d if node.target in axes else _as(b, d, (*axes, node.target))
        total = b.add(N.Reduce, "sum", fn="sum", arg=full, over=(node.target,), chunk=node.source, axes=rest)
        return [(node.arg, total)]
    if isinstance(node, N.Rename):
        back = tuple(node.source if a == node.target else a for a in b.nodes[d].axes)
        return [(node.arg, b.add(N.Rename, "", arg=d, source=node.target, target=node.source, axes=back))]
    if isinstance(node, N.Gather):
        full = _over(b, d, node.axes, node.axes)
        arg = b.nodes[node.arg]
        scattered = b.add(N.Scatter, "", arg=full, index=node.index, axis=node.axis, axes=arg.axes)
        return [(node.arg, scattered)]
    raise NotImplementedError(node.kind)


def _count(b: Builder, axes: Iterable[str]) -> str:
    out = b.const(1)
    for a in axes:
        size = b.axes[a].size
        assert size is not None
        out = b.map("*", out, b.const(size, whole=True))
    return out


def _as(b: Builder, id_: str, axes: tuple[str, ...]) -> str:
    return b.add(N.Map, "", fn="as", args=(id_,), axes=axes)


def _over(b: Builder, id_: str, axes: tuple[str, ...], whole: tuple[str, ...] = ()) -> str:
    """A gradient summed to these axes, of a value over `whole`; it is the same along axes of `whole` that it lacks."""
    have = b.nodes[id_].axes
    missing = tuple(a for a in whole if a not in have and a not in axes)
    if missing:
        id_, have = _as(b, id_, (*have, *missing)), (*have, *missing)
    gone = tuple(a for a in have if a not in axes)
    if gone:
        have = tuple(a for a in have if a not in gone)
        id_ = b.add(N.Reduce, "sum", fn="sum", arg=id_, over=gone, axes=have)
    return id_
