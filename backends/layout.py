"""How values of a graph lie in memory: which dimensions stand before their own axes, and how to bring them together.

A value's *home* says that: a sequence axis [rows, tokens, ...], a value a sequence [N, ...], or none, for what comes
from parameters alone. Inside a loop over chunks, values over the sequence that is cut lie as [N, width, ...].
"""

from __future__ import annotations

from dataclasses import dataclass

from chunkc.backends.scan import as_stored
from chunkc.backends.writer import Lines, Writer, identifier, is_name, unused
from chunkc.ir import nodes as N
from chunkc.ir.graph import Graph, Unit

LETTERS = "abcdefghijklmnopqrstuvwxyz"
EACH = "each sequence"
INNER = "positions of a chunk"
NOWHERE = ""


@dataclass(frozen=True)
class Loop:
    """The loop whose body is emitted: its axis, the sequence that its chunks cut, whether a state is a sequence's;
    and the texts of how wide chunks are, which positions are there, their coordinates, and how
    many states run side by side."""

    axis: str
    inner: str = ""
    each: bool = True
    width: str = "width"
    valid: str = "valid"
    place: str = "place"
    count: str = ""


class Layout:
    """Names, homes and views of a unit's values."""

    def __init__(self, unit: Unit, lines: Lines, w: Writer) -> None:
        self.unit, self.lines, self.w = unit, lines, w
        self.graph = unit.graph
        self.names: dict[str, str] = {}
        self.loop: Loop | None = None
        self.as_stored = as_stored(unit)
        self.each: dict[str, bool] = {}
        self._homes: dict[tuple[int, str], str] = {}
        self.sequences = sequence_names(self.graph)
        self.main = next(iter(self.sequences.values()), "seq")
        self.taken = {a.name for a in self.graph.axes} | set(self.sequences.values())
        self.taken |= {f"chunks_{a.name}" for a in self.graph.axes if a.kind == "chunk"}
        self.taken |= {p.name for p in unit.params}
        self.taken |= {"scans", "ct", "F", "torch", "self", "math", "start", "step", "position"}

    # -- homes -------------------------------------------------------------------------------------------------------

    def is_sequence(self, axis: str) -> bool:
        return self.graph.axis[axis].is_sequence

    def own(self, axes: tuple[str, ...]) -> tuple[str, ...]:
        """The axes that are dimensions of their own."""
        return tuple(a for a in axes if not self.is_sequence(a))

    def home(self, graph: Graph, id_: str) -> str:
        key = (id(graph), id_)
        if key not in self._homes:
            self._homes[key] = self._home(graph, graph[id_])
        return self._homes[key]

    def _home(self, graph: Graph, node: N.AnyNode) -> str:
        for a in node.axes:
            if self.is_sequence(a):
                space = self.graph.axis[a].space
                inside = self.loop is not None and graph is not self.graph and space == self.loop.inner
                return INNER if inside else space
        return EACH if self.per_sequence(graph, node) else NOWHERE

    def per_sequence(self, graph: Graph, node: N.AnyNode) -> bool:
        """Whether a value over no sequence differs from sequence to sequence."""
        if isinstance(node, N.Input | N.Length):
            return True
        if isinstance(node, N.State):
            return self.loop is None or self.loop.each
        if isinstance(node, N.Out):
            return self.each.get(node.arg, True)
        if isinstance(node, N.Capture):
            return self.home(self.graph, node.outer) != NOWHERE
        if isinstance(node, N.Coord):
            return self.is_sequence(node.axis)
        return any(self.home(graph, a) != NOWHERE for a in node.operands())

    def seq(self, home: str) -> str:
        """The variable that says where a home's sequences lie."""
        return self.sequences.get(home, self.main)

    def chunks(self, chunk: str) -> str:
        return f"chunks_{self.graph.axis[chunk].space}"

    # -- names and shapes --------------------------------------------------------------------------------------------

    def fresh(self, hint: str) -> str:
        return unused(identifier(hint) if is_name(hint) else "x", self.taken)

    def lead(self, home: str) -> list[str]:
        """The sizes of the dimensions before a value's own axes."""
        if home == NOWHERE:
            return []
        if home == EACH:
            return [self.loop.count if self.loop is not None and self.loop.count else f"{self.main}.count"]
        if home == INNER:
            assert self.loop is not None
            return [f"{self.main}.count", self.loop.width]
        return [f"{self.seq(home)}.rows", f"{self.seq(home)}.tokens"]

    def shape(self, axes: tuple[str, ...], home: str = NOWHERE) -> str:
        parts = [*self.lead(home), *self.own(axes)]
        return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"

    def text(self, graph: Graph, id_: str) -> tuple[str, int]:
        """The text that stands for a value, and how tightly it binds."""
        raise NotImplementedError

    def hold(self, graph: Graph, id_: str, rank: int = 9) -> str:
        return held(*self.text(graph, id_), rank)

    def aligned(self, graph: Graph, id_: str, axes: tuple[str, ...], home: str) -> tuple[str, int]:
        """A value's text as a view over `axes` at a home, and how tightly it binds."""
        text, rank = self.text(graph, id_)
        mine, wanted, at = self.own(graph[id_].axes), self.own(axes), self.home(graph, id_)
        assert at in (NOWHERE, EACH, home) or home == NOWHERE, (id_, at, home)
        if at == EACH and home not in (NOWHERE, EACH):
            text, rank = (f"{held(text, rank, 9)}[:, None]" if home == INNER else f"{self.seq(home)}.spread({text})"), 9
            at = home
        lead = len(self.lead(at))
        present = [a for a in wanted if a in mine]
        if present != list(mine):
            order = ", ".join(str(lead + mine.index(a)) for a in present)
            text, rank = f"{held(text, rank, 9)}.permute({', '.join([*map(str, range(lead)), order])})", 9
        dims = [":" if a in mine else "None" for a in wanted]
        if at == NOWHERE:  # leading dimensions broadcast by themselves
            while dims and dims[0] == "None":
                dims.pop(0)
        if "None" not in dims or (at == NOWHERE and not mine):
            return text, rank
        while dims and dims[0] == ":":
            dims.pop(0)
        return f"{held(text, rank, 9)}[..., {', '.join(dims)}]", 9

    def leading(self, text: str, rank: int, at: str, home: str) -> str:
        """A value of no home as a view with a home's leading dimensions, each 1."""
        if at != NOWHERE or home == NOWHERE:
            return text
        return f"{held(text, rank, 9)}[{', '.join(['None'] * len(self.lead(home)))}]"


def sequence_names(graph: Graph) -> dict[str, str]:
    """The variable of each sequence and of each chunk axis, by space: that of the first input is `seq`."""
    spaces = list(dict.fromkeys(
        graph.axis[a].space for n in graph.of_kind(N.Input) for a in n.axes if graph.axis[a].is_sequence))  # fmt: skip
    out = {space: "seq" if k == 0 else f"seq_{space}" for k, space in enumerate(spaces)}
    return out | {n.chunk: f"seq_{n.chunk}" for n in graph.of_kind(N.Segment)}


def held(text: str, rank: int, wanted: int) -> str:
    """The text, in brackets where it binds less tightly than wanted."""
    return text if rank >= wanted else f"({text})"


def generic(node: N.AnyNode) -> bool:
    """Whether a node's id is no name from the spec, but its kind or function with a number."""
    base = node.id.rsplit("_", 1)[0] if node.id.rsplit("_", 1)[-1].isdigit() else node.id
    return base in (node.kind, getattr(node, "fn", node.kind))
