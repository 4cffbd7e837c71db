"""Ops of which one token is one kernel: a matrix scan with elementwise work and sums over one of its sides."""

from __future__ import annotations

from dataclasses import dataclass

from chunkc.backends.scan import ScanForm, Side, scan_form
from chunkc.ir import nodes as N
from chunkc.ir.graph import ELEMENTWISE, Graph, Unit

# Functions of numbers, by how the text of a call computes them.
NUMBERS = {"+": "({} + {})", "-": "({} - {})", "*": "({} * {})", "/": "({} / {})", "neg": "(-{})", "as": "{}"}


@dataclass(frozen=True)
class TokenForm:
    """An op as a kernel of one token: its scan; by id which side a value is over (both: "ij", none: ""), and the text
    of each number that the call computes; the side of which each program has a block, since no sum is over it."""

    form: ScanForm
    graph: Graph
    sides: dict[str, str]
    numbers: dict[str, str]
    own: Side

    def inputs(self) -> list[N.Input]:
        return self.graph.of_kind(N.Input)


def free_side(form: ScanForm, summed: list[str]) -> Side | None:
    """A side that neither a read nor these sums are over."""
    used = {*summed, *(q.side for q in form.queries)}
    sides: tuple[Side, ...] = ("j", "i")
    return next((s for s in sides if s not in used), None)


def token_form(unit: Unit, prefix: str) -> TokenForm | None:
    """An op's one token as a kernel; None if something in it is more than elementwise or a sum over a side."""
    graph = unit.graph
    scans = graph.of_kind(N.Scan)
    if unit.kind != "op" or unit.parallel is not None or len(scans) != 1 or graph.of_kind(N.Param):
        return None
    (scan,) = scans
    if not (scan.i or scan.j) or scan.within is not None or scan.declared != (*scan.batch, *scan.i, *scan.j):
        return None
    form = scan_form(unit, scan, prefix)
    laid = {scan.batch: "", (*scan.batch, *scan.i): "i", (*scan.batch, *scan.j): "j", scan.declared: "ij"}
    sides: dict[str, str] = {}
    numbers: dict[str, str] = {}
    for node in graph.nodes:
        axes = tuple(a for a in node.axes if a != scan.axis)
        if (text := _number(graph, node, numbers)) is not None:
            numbers[node.id], sides[node.id] = text, ""
        elif isinstance(node, N.Scan):
            sides[node.id] = ""
        elif axes not in laid or not _simple(node, scan):
            return None
        else:
            sides[node.id] = laid[axes]
    summed = [s for n in graph.of_kind(N.Reduce) for s in sides[n.arg] if s not in sides[n.id]]
    own = free_side(form, summed)
    if own is None or any(sides[id_] != own for _, id_ in graph.outputs):
        return None
    return TokenForm(form, graph, sides, numbers, own)


def _number(graph: Graph, node: N.AnyNode, known: dict[str, str]) -> str | None:
    if isinstance(node, N.Const):
        return f"({node.size.text()})"
    if isinstance(node, N.Map) and node.fn in NUMBERS and all(a in known for a in node.args):
        return NUMBERS[node.fn].format(*(known[a] for a in node.args))
    return None


def _simple(node: N.AnyNode, scan: N.Scan) -> bool:
    """Whether a kernel of one token has such nodes."""
    if node.dtype != "float":
        return False
    if isinstance(node, N.Input):
        return scan.axis in node.axes
    if isinstance(node, N.Reduce):
        return node.fn == "sum" and node.chunk is None and node.over in (scan.i, scan.j)
    return isinstance(node, N.Out) or isinstance(node, N.Map) and node.fn in (*ELEMENTWISE, "stop")
