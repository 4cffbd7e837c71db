"""What back ends need to know of a matrix scan: its operands by name and side, in the order of its call."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from chunkc.backends.writer import identifier, is_name
from chunkc.ir import nodes as N
from chunkc.ir.graph import Unit
from chunkc.ir.updates import absorbed, scaled_reads, update_of

Side = Literal["i", "j"]
Anchor = Literal["start", "blocks", "levels"]  # where kernels take a pair's decay apart: see `backends/triton/side.py`
TILE = 64
LIMIT = 80.0  # nats that tokens may decay by if they are anchored at the first one: exp of it is far inside float32


def other(side: Side) -> Side:
    return "j" if side == "i" else "i"


# Names that emitted scans and kernels use for themselves: an operand of such a name gets a number behind it.
_EMITTED = """
seq initial states ends last half decay update operands ctx score d_score part gate_low gate_up result state new
H I J D C LEVELS BI BJ BD DOT PRECISION PARTS BLOCK TILE LOG_SMALL tl triton torch Any Tensor Sequences row rows
col_i col_j has has_i has_j cell token inside start stop first count tile tiles block blocks_j head sequence
step level upper lower pair inner outward flow crossing edges earlier later others left right types base before
upto onward rounded is_mild exp chosen schedule offsets tokens each kept parts program blocks_i base sums since
after halves levels log_gate masked_sum d_initial d_last low_i low_j up_i up_j from_start_i from_start_j
cdiv power_of_two places to_end_i to_end_j to_edge_i to_edge_j decay_i decay_j reads_i reads_j written_i written_j
walk first_tile turn begin end own skipped place total_i total_j totals_i totals_j decayed_i decayed_j segment segments
launch programs warps walked_tiles segment_of completed IDLE FULL CUT SAFE SCHEDULES
reached alive alive_i alive_j passed_i passed_j tiles_i tiles_j enough back walks wanted
blocks column edges edge_states flow_of_reads flowing from_start gaps inverse near near_read next parts_i parts_j passed
sums_i sums_i_read sums_j sums_j_read tile_start tile_stop to_end whole written same
"""
EMITTED = frozenset(_EMITTED.split())
# Names that may have the number of a query or a write behind them.
NUMBERED = re.compile(r"(scores?|own|rows|read|reader|reading|writer|written|pairs|left|right)(_?\d+)?")


@dataclass(frozen=True)
class Operand:
    """A tensor of the scan's call: the node it is, its name in emitted text, and the side that it is over.

    `thin`: a gate without an axis of its side, one number a head. `raw`: a gate that is no logarithm. `given`: whether
    an input or a parameter is in it; else nobody wants its gradient."""

    node: str
    name: str
    side: Side
    thin: bool = False
    raw: bool = False
    given: bool = True


@dataclass(frozen=True)
class Pair:
    """A write, or a query with its result: the factor on each side."""

    i: str
    j: str

    def on(self, side: Side) -> str:
        return self.i if side == "i" else self.j


@dataclass(frozen=True)
class ScanForm:
    """A scan as the back ends emit it. `gates` has at most one operand a side; `scales` has for each query the name of
    the number that its result is multiplied by, if there is one."""

    scan: N.Scan
    gates: tuple[Operand, ...]
    writes: tuple[tuple[Operand, Operand], ...]
    queries: tuple[Operand, ...]
    name: str
    scales: tuple[str, ...]
    fixed: bool = False  # whether later tokens may change nothing of earlier results, not even their last bits

    def operands(self) -> Iterator[Operand]:
        yield from self.gates
        for i, j in self.writes:
            yield i
            yield j
        yield from self.queries

    @property
    def when(self) -> str:
        """When reads are, as to the update."""
        return "before" if self.scan.start == "read" else "after"

    def wide(self) -> tuple[Operand, ...]:
        """The gates that are no single number a head."""
        return tuple(g for g in self.gates if not g.thin)

    def strongest(self) -> float:
        """How many nats a token may decay by in one of its numbers, by what is proven of the gates."""
        lows = [n.low for g, n in zip(self.gates, self.scan.gates) if not g.thin and n.log]
        return max((-low for low in lows), default=0.0) if len(lows) == len(self.wide()) else math.inf

    def mild(self) -> tuple[Anchor | None, bool]:
        """The anchor of tiles that decay little, and whether all tiles are proven to; with products in bfloat16.

        None if no pair needs an anchor, or if the spec demands that tokens change nothing of what comes before them:
        which anchor a tile takes depends on all of it."""
        most = self.strongest()
        if not self.wide():
            return None, False
        if most * TILE <= LIMIT:
            return "start", True
        if most * (TILE // 4) <= LIMIT:
            return "blocks", True
        return (None if self.fixed else "start"), False

    def gate(self, side: Side) -> Operand | None:
        return next((g for g in self.gates if g.side == side), None)

    def results(self) -> list[str]:
        """The queries' results by name."""
        return [f"out_{q.name}" for q in self.queries]

    def numbers(self) -> list[str]:
        """The names of the numbers that a call takes."""
        return [s for s in self.scales if s]

    def typed_numbers(self) -> str:
        """These numbers as the last parameters of a function."""
        return "".join(f", {n}: float" for n in self.numbers())

    def query_pairs(self, prefix: str = "d_out_") -> list[Pair]:
        """Each query with the gradient of its result, which lies on the other side."""
        return [
            Pair(q.name, f"{prefix}{q.name}") if q.side == "i" else Pair(f"{prefix}{q.name}", q.name)
            for q in self.queries
        ]

    def write_pairs(self) -> list[Pair]:
        return [Pair(i.name, j.name) for i, j in self.writes]


def derived_names(name: str) -> set[str]:
    """An operand's name and those made of it: its gradient, what a query reads and that one's gradient, a raw gate, a
    gate of a tile that a walk comes to next, what a query's result is multiplied by."""
    return {name, f"d_{name}", f"out_{name}", f"d_out_{name}", f"{name}_value", f"{name}_ahead",
            f"scale_{name}"}  # fmt: skip


def scan_form(unit: Unit, scan: N.Scan, prefix: str = "") -> ScanForm:
    """Name a scan's operands: spec names where there are, else their role.

    `prefix` tells the scans of several units in one module apart."""
    taken, scaled = set(EMITTED), scaled_reads(unit, scan)
    axes_of = {n.id: n.axes for n in unit.graph.nodes}

    def name(id_: str, role: str) -> str:
        named = is_name(id_) and not id_.startswith(("scan", "expand", "map")) and not NUMBERED.fullmatch(id_)
        base = identifier(id_) if named else role
        out, n = base, 1
        while taken & derived_names(out):
            n += 1
            out = f"{base}{n}"
        taken.update(derived_names(out))
        return out

    gates: list[Operand] = []
    for g in scan.gates:
        axes = set(axes_of[g.arg])
        side: Side = "j" if axes & set(scan.j) else "i"
        if side == "j" and any(x.side == "j" for x in gates):
            raise AssertionError("two gates on one side")
        thin = not axes & set(scan.i if side == "i" else scan.j)
        sources = [n for id_ in unit.graph.reachable([g.arg]) if isinstance(n := unit.graph[id_], N.Input | N.Param)]
        own = name(g.arg, "gate" if g.log else "decay_gate")
        gates.append(Operand(g.arg, own, side, thin, not g.log, bool(sources)))
    writes = tuple((Operand(w.i, name(w.i, "key"), "i"), Operand(w.j, name(w.j, "value"), "j")) for w in scan.writes)
    queries = tuple(Operand(q.arg, name(q.arg, "query"), q.side) for q in scan.queries)
    scales = tuple(f"scale_{q.name}" if m in scaled else "" for m, q in enumerate(queries))
    whole = identifier(prefix + scan.name)
    return ScanForm(scan, tuple(gates), writes, queries, whole, scales, unit.schedule.prefix_invariant)


def as_stored(unit: Unit) -> frozenset[str]:
    """The inputs and products that only scans load: they reach these in the type in which they are stored.

    Kernels compute in float32 of whatever is loaded; a copy in float32 would take longer to write and read than they
    take. A plan of ranks reads operands itself."""
    if unit.parallel is not None:
        return frozenset()
    graph = unit.graph
    users, results = graph.users(), {id_ for _, id_ in graph.outputs}
    scans = graph.of_kind(N.Scan)
    made = {id_ for s in scans for id_ in (*(n.id for n in absorbed(graph, s)), *update_of(graph, s))}

    def by_scans(node: N.AnyNode) -> bool:
        readers = [u for u in users[node.id] if u.id not in made]
        return bool(readers) and all(isinstance(u, N.Scan) and node.id in loaded(u) for u in readers)

    nodes = (n for n in graph.nodes if isinstance(n, N.Input | N.Linear) and n.dtype == "float")
    return frozenset(n.id for n in nodes if n.id not in results and by_scans(n))


def loaded(scan: N.Scan) -> tuple[str, ...]:
    """What a scan's kernels load: leaves, if they make the operands; operands, of a scan with products; else nothing
    as it is stored."""
    if scan.prologue is not None:
        return scan.prologue.leaves
    return scan.arguments() if scan.i or scan.j else ()
