"""Parallel layouts: how a file's units share their sequences over the ranks of a mesh.

A `parallel` block holds for each layer and op of its file whose first input is over the axis that it shards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from chunkc.dsl import tree as T
from chunkc.ir import nodes as N
from chunkc.ir.diagnostics import Report, Span
from chunkc.ir.graph import Parallel, Unit

Layout = Literal["contiguous", "zigzag"]
LAYOUTS = ("contiguous", "zigzag", "auto")
WAYS = {"attention": "ring", "recurrence": "state_allgather"}
WORDS = ("over", "by", "attention", "recurrence")  # of the language, which name nothing
NOT_BUILT = ("striped", "ulysses", "token_ring", "usp", "kv_allgather", "state_ring", "state_scan")


@dataclass
class _Shard:
    axis: T.Name
    over: T.Name
    layout: str


class _Block:
    """The lines of one `parallel` block."""

    def __init__(self, block: T.Parallel, report: Report) -> None:
        self.block, self.report = block, report
        self.mesh: dict[str, Span] = {}
        self.shard: _Shard | None = None
        self.seen: dict[str, Span] = {}

    def read(self) -> _Shard | None:
        """What is sharded, or None after an error."""
        before = len(self.report.errors)
        for line in self.block.settings:
            self.line(line)
        if len(self.report.errors) > before:
            return None
        if not self.mesh or self.shard is None:
            lacks = "mesh" if not self.mesh else "shard"
            self.wrong(
                f"the block has no line '{lacks}'", self.block.span, "write 'mesh { ring }' and 'shard t over ring'"
            )
            return None
        over = self.shard.over
        if over.text not in self.mesh:
            first = next(iter(self.mesh.values()))
            self.report.error("bad-layout", f"the mesh has no axis '{over.text}'", over.span,
                              related=((first, "the mesh's axes"),),
                              hints=(f"use one of {', '.join(self.mesh)}, or add it to the mesh",))  # fmt: skip
            return None
        return self.shard

    def wrong(self, what: str, span: Span, hint: str) -> None:
        self.report.error("bad-layout", what, span, hints=(hint,))

    def later(self, what: str, span: Span, hint: str) -> None:
        self.report.error("not-yet", f"'{what}' is not built by this version", span, hints=(hint,))

    def line(self, line: T.Setting) -> None:
        words = [w.text for w in line.words]
        kind = words[0]
        if kind != "shard" and kind in self.seen:
            self.report.error("bad-layout", f"'{kind}' is said twice", line.span,
                              related=((self.seen[kind], "first here"),))  # fmt: skip
            return
        self.seen[kind] = line.span
        if kind == "mesh" and len(words) == 1 and line.inner is not None:
            self.read_mesh(line.inner)
        elif line.inner is None and kind == "shard" and "over" in words:
            self.read_shard(line)
        elif line.inner is None and kind in WAYS and len(words) == 3 and words[1] == "via":
            self.read_way(kind, line.words[2])
        elif kind == "loss":
            self.later("loss", line.span, "take Plan.mean of the ranks' sums")
        else:
            self.wrong("this is no line of a parallel layout", line.span,
                       "lines are 'mesh { ring }', 'shard t over ring layout auto', 'attention via ring' and "
                       "'recurrence via state_allgather'")  # fmt: skip

    def read_mesh(self, lines: tuple[T.Setting, ...]) -> None:
        for line in lines:
            for k, word in enumerate(line.words):
                name = word.text.isidentifier() and word.text not in WORDS and word.text not in self.mesh
                if line.inner is not None or (word.text != "," if k % 2 else not name):
                    self.wrong("these are not names of axes, each once", word.span, "write 'mesh { data, ring }'")
                    return
                if name:
                    self.mesh[word.text] = word.span

    def read_shard(self, line: T.Setting) -> None:
        """`shard AXIS over NAME [layout LAYOUT]`."""
        axis, rest = line.words[1], line.words[3:]
        if self.shard is not None:
            self.later("shard", line.span, "one axis is sharded, over one axis of the mesh")
        elif rest and rest[0].text == "(":
            last = next((w for w in rest if w.text == ")"), rest[0])
            self.later("over several axes", rest[0].span.to(last.span), "shard over one axis of the mesh")
        elif len(line.words) not in (4, 6) or line.words[2].text != "over" or rest[1:2] and rest[1].text != "layout":
            self.wrong("this is no line of a parallel layout", line.span, "write 'shard t over ring layout auto'")
        else:
            layout = rest[2] if len(rest) == 3 else None
            if layout is not None and layout.text not in LAYOUTS:
                self.unknown(layout, LAYOUTS)
            self.shard = _Shard(axis, rest[0], layout.text if layout is not None else "auto")

    def read_way(self, kind: str, word: T.Name) -> None:
        if word.text not in (WAYS[kind], "auto"):
            self.unknown(word, (WAYS[kind], "auto"))

    def unknown(self, word: T.Name, known: tuple[str, ...]) -> None:
        hint = f"write one of {', '.join(known)}"
        if word.text in NOT_BUILT:
            self.later(word.text, word.span, hint)
        else:
            self.wrong(f"'{word.text}' is unknown here", word.span, hint)


def lay_out(file: T.File, units: list[Unit], report: Report) -> list[Unit]:
    """The units, with how their sequences are shared."""
    blocks = [i for i in file.items if isinstance(i, T.Parallel)]
    if len(blocks) > 1:
        report.error("bad-layout", "a file has one parallel layout", blocks[1].span,
                     related=((blocks[0].span, "first here"),))  # fmt: skip
        return units
    if not blocks:
        return units
    before = len(report.errors)
    block = _Block(blocks[0], report)
    shard = block.read()
    if shard is None:
        return units
    sharded = [u for u in units if main_axis(u) == shard.axis.text]
    if not sharded:
        if not before:
            _no_axis(shard.axis, units, report)
        return units
    for unit in sharded:
        _check_names(unit, blocks[0].span, report)
        _check_schedule(unit, blocks[0].span, report)
    auto: Layout = "zigzag" if any(_attends_causally(u) for u in sharded) else "contiguous"
    layout: Layout = "contiguous" if shard.layout == "contiguous" else "zigzag" if shard.layout == "zigzag" else auto
    found = Parallel(mesh=tuple(block.mesh), axis=shard.axis.text, over=shard.over.text, layout=layout,
                     span=blocks[0].span)  # fmt: skip
    return [u.evolve(parallel=found) if u in sharded else u for u in units]


def main_axis(unit: Unit) -> str:
    """The sequence of a unit's first input, if it is in time."""
    axis = unit.graph.axis
    first = next(a for n in unit.graph.of_kind(N.Input) for a in n.axes if axis[a].is_sequence)
    return axis[first].space if axis[axis[first].space].kind == "time" else ""


def _attends_causally(unit: Unit) -> bool:
    """Whether a unit's queries read earlier rows of their own sequence, and no later ones."""
    axis = unit.graph.axis
    pairs = [(n.query, s.axis) for n in unit.graph.of_kind(N.Attend) for s in n.sources]
    own = any(q and s and axis[q].space == axis[s].space for q, s in pairs)
    return own and not unit.looks_ahead


def _no_axis(name: T.Name, units: list[Unit], report: Report) -> None:
    for unit in units:
        axis = unit.graph.axis.get(name.text)
        if axis is not None:
            what = {"unordered": "has no order", "size": "has a fixed size", "chunk": "is made of chunks"}.get(
                axis.kind, "is not that of the first input"
            )
            report.error("bad-layout", f"'{name.text}' cannot be sharded: it {what}", name.span,
                         related=((unit.span, "a layer or op with this axis"),),
                         hints=("shard the time axis of the first input",))  # fmt: skip
            return
    report.error("bad-layout", f"no layer or op of the file has a sequence '{name.text}'", name.span,
                 hints=("a layout holds for the layers and ops of its own file",))  # fmt: skip


def _check_schedule(unit: Unit, block: Span, report: Report) -> None:
    """Where a rank's piece begins depends on the length of the whole, and with it where tiles do."""
    if unit.schedule.prefix_invariant:
        report.error("bad-layout", f"'{unit.name}' demands prefix_invariant: ranks' pieces cannot keep it", block,
                     "a sequence that is cut short is divided at other tokens",
                     related=((unit.schedule.span or unit.span, "the schedule"),),
                     hints=("take the setting out, or leave this layer or op to a file without a layout",))  # fmt: skip


def _check_names(unit: Unit, block: Span, report: Report) -> None:
    """The names that a layout gives the emitted text."""
    graph = unit.graph
    taken = [n.name.split(".")[0] for n in graph.of_kind(N.Input, N.Param)] + [p.name for p in unit.params]
    taken += [a.name for a in graph.axes]
    if unit.name == "Plan" or "plan" in taken:
        name = "Plan" if unit.name == "Plan" else "plan"
        report.error("name-taken", f"'{name}' is what a parallel layout is called in Python", unit.span,
                     related=((block, "the layout"),), hints=("choose another name",))  # fmt: skip
