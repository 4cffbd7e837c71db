"""Attentions: the sources they read, and the nodes they become."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from chunkc.dsl import tree as T
from chunkc.dsl.recurrences import Recurrences
from chunkc.dsl.scope import Broken, Value
from chunkc.dsl.sizes import Context
from chunkc.dsl.weights import listed
from chunkc.ir import nodes as N
from chunkc.ir.diagnostics import Span
from chunkc.ir.graph import Builder
from chunkc.ir.verify import PAIRWISE

PARTS = {"logit": "float", "value": "float", "mask": "bool"}
Part = tuple[str, T.Define]  # a node of the unit's graph, and where it is written


class Given(NamedTuple):
    """A source as it is written: the axis of its rows (None: one row), and its logit, value and mask."""

    source: T.Source
    axis: str | None
    parts: dict[str, Part]


class Attentions(Recurrences):
    """Checks the attentions of a unit."""

    def attention(self, s: T.Attention) -> None:
        before = len(self.report.errors)
        target = self.axis_list(s.axes) if s.axes is not None else None
        given = [Given(source, axis, self.parts(source)) for source, axis in self.sources(s)]
        whole = all(len(parts) == len(source.body) for source, _, parts in given)  # else names were unknown already
        if not given and len(self.report.errors) == before:
            self.report.error("no-source", f"'{s.name.text}' reads no rows", s.span,
                              hints=("write 'over s { logit = ... }'",))  # fmt: skip
        if whole and given and not any("value" in parts for _, _, parts in given) and len(self.report.errors) == before:
            self.report.error("no-source", f"no source of '{s.name.text}' has a value", s.span,
                              hints=("write 'value = ...'",))  # fmt: skip
        query = self.query(s, given) if whole and len(self.report.errors) == before else None
        if whole and len(self.report.errors) == before:
            id_ = self.attend(s, given, query, target)
            if id_ is not None and self.scope.declare(s.name, Value(id_, s.name.span)):
                return
        self.scope.names.setdefault(s.name.text, Broken(s.name.span))

    def sources(self, s: T.Attention) -> Iterator[tuple[T.Source, str | None]]:
        """The sources, each with the axis of its rows; None for one row."""
        for part in s.body:
            self.work.spend(part.span)
            if not isinstance(part, T.Source):
                self.report.error(
                    "bad-body", "an attention holds sources: 'over s { ... }' and 'row { ... }'", part.span
                )
                continue
            if part.over is None:
                yield part, None
            elif (axis := self.x.axis(part.over)) is not None:
                if not axis.is_sequence:
                    self.x.later(f"attention over the fixed axis '{axis.name}'", part.over.span)
                else:
                    yield part, axis.name

    def parts(self, source: T.Source) -> dict[str, Part]:
        """A source's logit, value and mask: nodes of the unit's graph, and where they stand."""
        out: dict[str, Part] = {}
        for d in source.body:
            self.work.spend(d.span)
            if not isinstance(d, T.Define) or d.name.text not in PARTS:
                self.report.error("bad-body", "a source holds 'logit', 'value' and 'mask'", d.span)
                continue
            name = d.name.text
            if name in out or d.axes is not None:
                what = "is given twice" if name in out else "has no axes of its own: they follow"
                self.report.error("bad-body", f"'{name}' {what}", d.name.span)
                continue
            id_ = self.x.expr(d.value, Context(self.builder))
            if id_ is None:
                continue
            dtype = self.builder.nodes[id_].dtype
            if dtype != PARTS[name] and not (dtype == "int" and name != "mask"):
                takes = "a truth value" if name == "mask" else "a real number"
                self.report.error("type-mismatch", f"'{name}' is {takes}, this is {dtype}", d.value.span)
                continue
            out[name] = id_, d
        if "logit" not in [d.name.text for d in source.body if isinstance(d, T.Define)]:
            self.report.error("no-source", "this source has no logit", source.span, hints=("write 'logit = ...'",))
        return out

    def query(self, s: T.Attention, given: list[Given]
              ) -> str | None:  # fmt: skip
        """The sequence that the queries are of, found: that of all parts which is not their rows'."""
        found: dict[str, Span] = {}
        for source, axis, parts in given:
            over: set[str] = set()
            for name, (id_, d) in parts.items():
                axes = self.builder.nodes[id_].axes
                over |= set(axes) if name != "mask" else set()
                for a in axes:
                    if self.axes[a].is_sequence and a != axis:
                        found.setdefault(a, d.value.span)
            if axis is not None and axis not in over:
                self.report.error("no-axis", f"nothing here is over '{axis}'", source.span,
                                  hints=(f"read what the rows are at {axis}: k[t = {axis}]",))  # fmt: skip
        if len(found) > 1:
            a, b, *_ = found
            self.report.error("axis-mismatch", f"the queries of '{s.name.text}' are over {a} and over {b}", found[b],
                              related=((found[a], f"this is over {a}"),))  # fmt: skip
        return next(iter(found), None)

    def attend(self, s: T.Attention, given: list[Given],
               query: str | None, target: tuple[str, ...] | None) -> str | None:  # fmt: skip
        """The node; its axes are the logits' and the values', or those declared."""
        body = Builder(axes=self.axes.values())
        self.expand_groups([parts for _, _, parts in given], target or ())
        self.widen(given, query)
        sources: list[N.Source] = []
        axes: dict[str, None] = {query: None} if query is not None else {}
        for _, axis, parts in given:
            region = Region(self.builder, body, query, axis)
            made = {name: new for name, (id_, d) in parts.items() if (new := self.brought(region, id_, d)) is not None}
            if len(made) < len(parts):
                return None
            sources.append(N.Source(axis=axis, logit=made["logit"], value=made.get("value"), mask=made.get("mask")))
            for id_, _ in parts.values():
                axes |= dict.fromkeys(a for a in self.builder.nodes[id_].axes if a != axis)
        if target is not None and set(target) != set(axes):
            odd = next(iter(set(axes) ^ set(target)))
            self.report.error("axis-mismatch", f"'{s.name.text}' is over {listed(tuple(axes))}: '{odd}' is "
                              f"{'not declared' if odd in axes else 'declared'}", s.name.span,
                              hints=("an attention is over the axes of its queries and values",))  # fmt: skip
            return None
        return self.builder.add(N.Attend, s.name.text, s.span, query=query, sources=tuple(sources),
                                body=body.graph(()), axes=target or tuple(axes))  # fmt: skip

    def expand_groups(self, given: list[dict[str, Part]], target: tuple[str, ...]) -> None:
        """Parts over groups of an axis that another part is over are read over its members."""
        union = {a for parts in given for id_, _ in parts.values() for a in self.builder.nodes[id_].axes} | {*target}
        for parts in given:
            for name, (id_, d) in parts.items():
                for a in self.builder.nodes[id_].axes:
                    parent = self.axes[a].parent
                    if self.axes[a].kind == "size" and parent in union and parent is not None:
                        id_ = self.x.expand(id_, a, parent, d.value.span, Context(self.builder))
                        parts[name] = id_, d

    def widen(self, given: list[Given], query: str | None) -> None:
        """Integers become real numbers; values are over the rows, and over all axes that no weight has."""
        b = self.builder
        weights = {
            a for _, _, parts in given for n in ("logit", "mask") if n in parts for a in b.nodes[parts[n][0]].axes
        }
        values = dict.fromkeys(a for _, _, parts in given if "value" in parts for a in b.nodes[parts["value"][0]].axes)
        for _, axis, parts in given:
            for name in ("logit", "value"):
                if name in parts and b.nodes[parts[name][0]].dtype == "int":
                    id_, d = parts[name]
                    parts[name] = b.map("*", id_, b.const(1.0), span=d.value.span), d
            if "value" in parts:
                id_, d = parts["value"]
                have, rows = b.nodes[id_].axes, axis if axis is not None else query
                own = [a for a in values if a not in weights and not self.axes[a].is_sequence]
                missing = [a for a in (*([rows] if rows is not None else []), *own) if a not in have]
                if missing:
                    wide = (*missing, *have)
                    parts["value"] = b.add(N.Map, "", d.value.span, fn="as", args=(id_,), axes=wide), d

    def brought(self, region: Region, id_: str, d: T.Define) -> str | None:
        wrong = region.misplaced(id_)
        if wrong is not None:
            self.x.later("in an attention, this function of what is over queries and rows at once",
                         wrong.span or d.value.span)  # fmt: skip
            return None
        return region.brought(id_)


class Region:
    """What depends on a query and on a row at once, moved from the unit's graph to an attention's body."""

    def __init__(self, outer: Builder, body: Builder, query: str | None, axis: str | None) -> None:
        self.outer, self.body, self.query, self.axis = outer, body, query, axis
        self.names: dict[str, str] = {}

    def paired(self, id_: str) -> bool:
        axes = self.outer.nodes[id_].axes
        return self.query is not None and self.axis is not None and self.query in axes and self.axis in axes

    def misplaced(self, id_: str) -> N.AnyNode | None:
        """A node over queries and rows that no body holds: it works along one of them, or is of no single pair."""
        pending, seen = [id_], set()
        while pending:
            node: N.AnyNode = self.outer.nodes[pending.pop()]
            if node.id in seen:
                continue
            seen.add(node.id)
            along = {a for f in ("over", "axis") for a in _tuple(getattr(node, f, ()))}
            read = [a for a in node.operands() if self.paired(a)]
            if self.paired(node.id):
                fixed = not any(self.outer.axes[a].is_sequence for a in along)
                best = isinstance(node, N.Reduce) and (node.fn in ("max", "min") or node.chunk is not None)
                if not isinstance(node, PAIRWISE) or not fixed or best:
                    return node
                pending += node.operands()
            elif read:  # a reduction of pairs
                return node
        return None

    def plain(self, id_: str) -> bool:
        """Whether a value is made of coordinates and numbers alone."""
        node: N.AnyNode = self.outer.nodes[id_]
        if isinstance(node, N.Bounds):  # the coordinate of chunks
            return node.fn == "index" and node.chunk == self.axis
        return isinstance(node, N.Const | N.Coord) or isinstance(node, N.Map) and all(map(self.plain, node.args))

    def brought(self, id_: str) -> str:
        """The body's node for one of the unit's."""
        if id_ in self.names:
            return self.names[id_]
        node: N.AnyNode = self.outer.nodes[id_]
        if self.paired(id_) or isinstance(node, N.Expand) or self.plain(id_):
            moved = node.renamed({a: self.brought(a) for a in node.operands()})
            new = self.body.like(moved, node.id)
        else:
            new = self.body.add(N.Capture, node.id, node.span, outer=id_, axes=node.axes, dtype=node.dtype)
        self.names[id_] = new
        return new


def _tuple(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value
