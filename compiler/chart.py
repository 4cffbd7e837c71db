"""A layer as a picture: a box for each definition, recurrence and attention, with the lines that the spec gives it.

Boxes stand in rows, each below all that it reads; within a row they are ordered by where their neighbours stand."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from html import escape

from chunkc.backends.layout import generic
from chunkc.backends.writer import Lines, is_name
from chunkc.ir import nodes as N
from chunkc.ir.diagnostics import SourceFile, Span
from chunkc.ir.graph import Graph, Unit

CHAR, LINE, PAD, GAP, STEP = 6.7, 16, 10, 26, 46  # of a letter, a line, a box's edge, between boxes, between rows
WIDEST = 64  # letters of a line
COLORS = {  # fill and edge
    "input": ("#e8f1fb", "#2f6db3"), "param": ("#f2edfa", "#7a4fb5"), "definition": ("#ffffff", "#8a8f98"),
    "recurrence": ("#fff3de", "#c27a0a"), "attention": ("#e7f6ec", "#2c8a4b"), "output": ("#2b2f36", "#2b2f36"),
}  # fmt: skip


@dataclass
class Box:
    """One box: what it is, its lines (the first is its name), the boxes it reads, and where it stands."""

    kind: str
    lines: list[str]
    reads: list[str] = field(default_factory=list)
    row: int = 0
    x: float = 0.0
    y: float = 0.0

    @property
    def width(self) -> float:
        return max(len(line) for line in self.lines) * CHAR + 2 * PAD

    @property
    def height(self) -> float:
        return len(self.lines) * LINE + 2 * PAD - 4


def chart(units: Iterable[Unit], source: SourceFile) -> str:
    """The picture of a file's units at the level `semantic`, one below the other, as SVG."""
    parts, wide, tall = [], 0.0, 0.0
    for unit in units:
        boxes = _boxes(unit.graph, source)
        _place(boxes, _rows(boxes))
        parts += [f'<g transform="translate(0 {tall:.0f})">', *_drawn(f"{unit.kind} {unit.name}", boxes), "</g>"]
        wide = max(wide, *(b.x + b.width + GAP for b in boxes.values()))
        tall += max(b.y + b.height for b in boxes.values()) + GAP
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide:.0f}" height="{tall:.0f}" '
        f'viewBox="0 0 {wide:.0f} {tall:.0f}" font-family="ui-monospace, Menlo, Consolas, monospace" font-size="11">',
        f"<title>{escape(source.name)}</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
        '<path d="M0 0.8 L8 4 L0 7.2 z" fill="#8a8f98"/></marker></defs>',
        f'<rect width="{wide:.0f}" height="{tall:.0f}" fill="#fbfbfc"/>',
    ]
    return "\n".join([*head, *parts, "</svg>"]) + "\n"


def _code(source: SourceFile, span: Span | None, fallback: str) -> str:
    """The spec's line behind a node, without its comment."""
    if span is None:
        return fallback
    text = Lines(source).line(span)
    return text if len(text) <= WIDEST else text[: WIDEST - 1] + "…"


def _block(source: SourceFile, span: Span | None) -> dict[int, str]:
    """The lines of the braces behind a statement, by their numbers, without comments and closing braces."""
    if span is None:
        return {}
    home = source.of(span.file)
    line, depth, out = home.position(span.start)[0], 0, {}
    while line <= home.text.count("\n") + 1:
        text = home.line(line).split("#")[0].strip()
        if depth and text.strip("} "):
            out[line] = text if len(text) <= WIDEST else text[: WIDEST - 1] + "…"
        depth += text.count("{") - text.count("}")
        if depth <= 0:
            break
        line += 1
    return out


def _boxes(graph: Graph, source: SourceFile) -> dict[str, Box]:
    blocks = {n.id: _block(source, n.span) for n in graph.of_kind(N.Recur, N.Attend)}
    inside = {(n.span.file, k) for n in graph.of_kind(N.Recur, N.Attend) if n.span for k in blocks[n.id]}
    boxes: dict[str, Box] = {}
    last = ("", 0)  # the line of the definition before: what else it computes is in the same box
    for n in graph.nodes:
        over = f"[{', '.join(n.axes)}]" if n.axes else ""
        line = (n.span.file, source.of(n.span.file).position(n.span.start)[0]) if n.span else ("", 0)
        if isinstance(n, N.Input):
            boxes[n.id] = Box("input", [f"{n.name}{over}"])
        elif isinstance(n, N.Param) and not n.library:
            boxes[n.id] = Box("param", [f"param {n.name}{over}"])
        elif isinstance(n, N.Recur):
            title = f"recurrence over {n.axis}" + (f" within {n.within}" if n.within else "")
            boxes[n.id] = Box("recurrence", [title, *blocks[n.id].values()])
        elif isinstance(n, N.Attend):
            boxes[n.id] = Box("attention", [_code(source, n.span, n.id).rstrip("{ "), *blocks[n.id].values()])
        elif isinstance(n, N.Map | N.Reduce | N.Normalize | N.Linear | N.Conv | N.Shift | N.Gather | N.Slice):
            if n.span is None or line in inside or not is_name(n.id) or generic(n):
                continue
            if line == last and boxes:
                previous = next(reversed(boxes))
                if boxes[previous].kind == "definition":
                    del boxes[previous]
            boxes[n.id] = Box("definition", [_code(source, n.span, n.id)])
            last = line
    for name, id_ in graph.outputs:
        boxes[f"output {name}"] = Box("output", [f"output {name}"], _visible(graph, [id_], boxes))
    for id_, box in boxes.items():
        if not id_.startswith("output "):
            box.reads = _visible(graph, graph[id_].operands(), boxes)
    read = {r for b in boxes.values() for r in b.reads}
    return {i: b for i, b in boxes.items() if i in read or b.reads or b.kind == "output"}


def _visible(graph: Graph, ids: Iterable[str], boxes: dict[str, Box]) -> list[str]:
    """The nearest boxes behind values."""
    found: dict[str, None] = {}
    pending, seen = list(ids), set()
    while pending:
        id_ = pending.pop(0)
        if id_ in boxes:
            found[id_] = None
        elif id_ not in seen:
            seen.add(id_)
            pending += graph[id_].operands()
    return list(found)


def _rows(boxes: dict[str, Box]) -> list[list[str]]:
    """Each box below all that it reads; parameters and what nothing precedes stand just above their first reader."""
    for box in boxes.values():
        box.row = max((boxes[r].row + 1 for r in box.reads), default=0)
    for id_, box in boxes.items():
        readers = [b.row for b in boxes.values() if id_ in b.reads]
        if box.kind == "param" and readers:
            box.row = max(min(readers) - 1, 0)
    rows: list[list[str]] = [[] for _ in range(max((b.row for b in boxes.values()), default=0) + 1)]
    for id_, box in boxes.items():
        rows[box.row].append(id_)
    for sweep in range(8):  # by the mean place of what a box reads, then of what reads it
        places = {id_: (k + 0.5) / len(row) for row in rows for k, id_ in enumerate(row)}
        for row in rows if sweep % 2 == 0 else rows[::-1]:
            near = {i: _mean([places[o] for o in _beside(boxes, i, sweep % 2 == 0)], places[i]) for i in row}
            row.sort(key=near.__getitem__)
            places |= {id_: (k + 0.5) / len(row) for k, id_ in enumerate(row)}
    return rows


def _beside(boxes: dict[str, Box], id_: str, above: bool) -> list[str]:
    return boxes[id_].reads if above else [o for o, b in boxes.items() if id_ in b.reads]


def _mean(values: list[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def _place(boxes: dict[str, Box], rows: list[list[str]]) -> None:
    widths = [sum(boxes[i].width + GAP for i in row) - GAP for row in rows]
    y = 52.0
    for row, width in zip(rows, widths):
        x, tall = (max(widths) - width) / 2 + GAP, max(boxes[i].height for i in row)
        for id_ in row:
            boxes[id_].x, boxes[id_].y = x, y + (tall - boxes[id_].height) / 2
            x += boxes[id_].width + GAP
        y += tall + STEP


def _drawn(title: str, boxes: dict[str, Box]) -> list[str]:
    """A title, the edges, and the boxes on top of them."""
    out = [f'<text x="{GAP}" y="30" font-size="15" font-weight="bold" fill="#2b2f36">{escape(title)}</text>']
    for box in boxes.values():
        out += [_edge(boxes[read], box) for read in box.reads]
    for box in boxes.values():
        fill, edge = COLORS[box.kind]
        ink = "#ffffff" if box.kind == "output" else "#2b2f36"
        out.append(f'<rect x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" height="{box.height:.1f}" rx="6" '
                   f'fill="{fill}" stroke="{edge}" stroke-width="1.2"/>')  # fmt: skip
        for k, line in enumerate(box.lines):
            weight = ' font-weight="bold"' if k == 0 and len(box.lines) > 1 else ""
            out.append(f'<text x="{box.x + PAD:.1f}" y="{box.y + PAD + 9 + k * LINE:.1f}" fill="{ink}"{weight} '
                       f'xml:space="preserve">{escape(line)}</text>')  # fmt: skip
    return out


def _edge(above: Box, below: Box) -> str:
    """A curve from the lower edge of one box to the upper edge of another."""
    x0, y0 = above.x + above.width / 2, above.y + above.height
    x1, y1 = below.x + below.width / 2, below.y
    bend = max((y1 - y0) / 2, 14)
    return (f'<path d="M{x0:.1f} {y0:.1f} C{x0:.1f} {y0 + bend:.1f} {x1:.1f} {y1 - bend:.1f} {x1:.1f} {y1 - 2:.1f}" '
            'fill="none" stroke="#b4b8bf" stroke-width="1.2" marker-end="url(#tip)"/>')  # fmt: skip
