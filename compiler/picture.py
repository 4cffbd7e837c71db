"""Pictures of masks: what each query of an attention sees, found by the interpreter on a short sequence."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from chunkc.interp import Interpreter, Run
from chunkc.ir import nodes as N
from chunkc.ir.axes import Number, SizeError
from chunkc.ir.graph import Graph, Unit

MOST = 10**7  # elements of an input
OPEN = 64  # the value of an integer parameter that nothing sets
BLOCKS = {(False, False): " ", (True, False): "▀", (False, True): "▄", (True, True): "█"}


@dataclass(frozen=True)
class Picture:
    """Which rows each query sees [queries, rows], of one source; `note` says what was assumed."""

    title: str
    queries: str
    rows: str
    seen: Tensor
    note: str

    def text(self) -> str:
        """Two queries a line, rows from left to right, in a frame."""
        seen = self.seen.tolist()
        seen += [[False] * self.seen.shape[1]] * (len(seen) % 2)
        lines = ["".join(BLOCKS[pair] for pair in zip(a, b)) for a, b in zip(seen[::2], seen[1::2])]
        edge = "─" * self.seen.shape[1]
        share = 100 * float(self.seen.float().mean()) if self.seen.numel() else 0.0
        head = f"{self.title}: query {self.queries} down, row {self.rows} across, {share:.0f} % seen"
        return "\n".join(
            [head, *([self.note] if self.note else []), f"┌{edge}┐", *(f"│{x}│" for x in lines), f"└{edge}┘"]
        )


def masks(unit: Unit, length: int, settings: Mapping[str, Number]) -> list[Picture]:
    """A picture for each source of each attention, on sequences of this length.

    Integers stand for documents: four runs. Truth values hold in the first quarter. Other inputs are random."""
    graph = unit.graph
    known = {p.name: p.default if p.default is not None else OPEN for p in unit.params} | dict(settings)
    lengths = {a.space: length for a in graph.axes if a.kind in ("time", "unordered")}
    machine = Interpreter(graph, Run(known, {}, lengths, dtype=torch.float32))
    torch.manual_seed(0)
    needed = graph.reachable([*_compared(graph), *(n.id for n in graph.of_kind(N.Segment))])
    tensors = {n.name: _drawn(machine, graph, n) for n in graph.of_kind(N.Input, N.Param) if n.id in needed}
    machine = Interpreter(graph, Run(known, tensors, lengths, dtype=torch.float32))
    for n in graph.of_kind(N.Segment):
        if n.n is not None and n.n.evaluate(known) < 1:
            raise SizeError(f"chunks of {n.n.evaluate(known)} positions")
        machine.value(n.id)
    return [_picture(machine, node, s) for node in graph.of_kind(N.Attend) for s in node.sources if s.axis is not None]


def _compared(graph: Graph) -> Iterator[str]:
    """What masks capture."""
    for node in graph.of_kind(N.Attend):
        inside = node.body.reachable(s.mask for s in node.sources if s.mask is not None)
        yield from (n.outer for n in node.body.of_kind(N.Capture) if n.id in inside)


def _drawn(machine: Interpreter, graph: Graph, node: N.Input | N.Param) -> Tensor:
    shape = [machine.size(a) for a in node.axes]
    if math.prod(shape) > MOST:
        raise SizeError(f"'{node.name}' has {math.prod(shape)} elements, too many to draw")
    along = next((k for k, a in enumerate(node.axes) if graph.axis[a].is_sequence), None)
    if node.dtype == "float" or along is None:
        return torch.randn(shape) * 0.1
    place = torch.arange(shape[along]).view([-1 if k == along else 1 for k in range(len(shape))]).expand(shape)
    return place * 4 // max(shape[along], 1) if node.dtype == "int" else place * 4 < shape[along]


def _picture(machine: Interpreter, node: N.Attend, source: N.Source) -> Picture:
    assert source.axis is not None
    if node.query is None or source.mask is None:
        rows = machine.size(source.axis)
        queries = machine.size(node.query) if node.query is not None else 1
        seen = torch.ones(queries, rows, dtype=torch.bool)
        return Picture(f"{node.id} over {source.axis}", node.query or "one", source.axis, seen, "")
    body = machine.inner(node.body)
    for n in node.body.of_kind(N.Capture):
        if n.id in node.body.reachable([source.mask]):
            machine.value(n.outer)
            body.values[n.id] = machine.values[n.outer]
    body.value(source.mask)
    axes = (node.query, source.axis, *(a for a in node.body[source.mask].axes if a not in (node.query, source.axis)))
    seen = body.aligned(source.mask, axes).expand(*(body.size(a) for a in axes[:2]), *[-1] * len(axes[2:]))
    for _ in axes[2:]:
        seen = seen[..., 0]
    note = f"the first of {', '.join(axes[2:])}" if axes[2:] else ""
    return Picture(f"{node.id} over {source.axis}", node.query, source.axis, seen, note)


def save_png(pictures: list[Picture], path: Path) -> None:
    """All pictures side by side. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, places = pyplot.subplots(1, len(pictures), figsize=(4.2 * len(pictures), 4.4), squeeze=False)
    for picture, place in zip(pictures, places[0]):
        place.imshow(picture.seen.numpy(), cmap="Blues", vmin=0, vmax=1.4, interpolation="nearest", aspect="auto")
        place.set_title(picture.title + (f"\n{picture.note}" if picture.note else ""), fontsize=10)
        place.set_xlabel(f"row {picture.rows}")
        place.set_ylabel(f"query {picture.queries}")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
