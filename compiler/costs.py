"""What a matrix scan costs under each schedule on a machine, and the least that anything can take there.

A schedule is how the work is laid over programs. Each is a few launches; each launch moves bytes, does operations of
matrix products and takes exponentials, in so many programs, which may walk over tiles one after the other.
`docs/costs.md` derives the counts and says where the machines' figures are from. It is arithmetic, to choose by."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from chunkc.backends.triton.tables import CUT, FULL, IDLE
from chunkc.passes.chunk import TILE

Side = Literal["i", "j"]
GateKind = Literal["none", "head", "each"]
Bound = Literal["bytes", "cache", "operations", "exps", "steps"]
SIDES: tuple[Side, Side] = ("i", "j")
BACKWARD = 2  # a product has two products as its gradient

LARGEST = 80.0  # nats that an exponent may reach: exp(80) is finite in float32 and bfloat16
BLOCK = 64  # columns of a side that a program takes where the state is cut over both sides
NARROW = 16  # the narrowest block of columns that a matrix product takes
LAUNCH = 3e-6  # seconds that a launch costs whatever it does: assumed
LINK = 2.5e-7  # seconds from a product to the one that needs it, within a program: assumed
CACHE = 2.0  # how many times faster than the memory the cache serves what programs beside each other read: assumed
BANDWIDTH, RATE = 0.89, 0.80  # what a large copy and a large product reach of the figures below: measured on an H200


@dataclass(frozen=True)
class Machine:
    """Published figures of an accelerator: bytes and operations a second, in bfloat16 and in float32; exponentials a
    second; 32-bit registers of a multiprocessor."""

    name: str
    target: str
    multiprocessors: int
    published_bandwidth: float
    published_rate: float
    published_single: float
    exps: float
    registers: int = 65536

    @property
    def bandwidth(self) -> float:
        return BANDWIDTH * self.published_bandwidth

    def rate(self, width: int) -> float:
        """Operations a second of products whose operands have this many bytes."""
        return RATE * (self.published_rate if width == 2 else self.published_single)


def _exps(multiprocessors: int, clock: float) -> float:
    return multiprocessors * 16 * clock  # 16 a clock and multiprocessor, on all of these


MACHINES = {
    m.name: m
    for m in (
        Machine("a100", "sm_80", 108, 2.039e12, 312e12, 19.5e12, _exps(108, 1.41e9)),
        Machine("h100", "sm_90", 132, 3.35e12, 989.4e12, 66.9e12, _exps(132, 1.75e9)),
        Machine("h200", "sm_90", 132, 4.8e12, 989.4e12, 66.9e12, _exps(132, 1.75e9)),
        Machine("mi300x", "gfx942", 304, 5.3e12, 1307.4e12, 163.4e12, _exps(304, 2.1e9), 131072),
    )
}


@dataclass(frozen=True)
class Scan:
    """The sizes of a matrix scan: sequences, tokens of each, heads, keys i, values j, bytes of an element.

    `gate_i` and `gate_j` are the gates on either side: none, one number a head, or each key (value) its own; `constant`
    ones are not read for each token. `decay` is what a gate takes off at most, in nats a token. A state has `writes`
    outer products added, and `reads` queries over i."""

    batch: int
    tokens: int
    heads: int
    i: int
    j: int
    width: int = 2
    gate_i: GateKind = "none"
    gate_j: GateKind = "none"
    constant: bool = False
    decay: float = math.inf
    writes: int = 1
    reads: int = 1

    @property
    def rows(self) -> int:
        """Token-heads."""
        return self.batch * self.tokens * self.heads

    @property
    def states(self) -> int:
        return self.batch * self.heads

    @property
    def tiles(self) -> int:
        """Of one sequence."""
        return math.ceil(self.tokens / TILE)

    @property
    def segments(self) -> int:
        """Of one sequence, as the emitted kernels walk over it: one, unless its walks are few."""
        enough = FULL if "each" in (self.gate_i, self.gate_j) else IDLE
        few = self.states * math.ceil(self.i / BLOCK) * math.ceil(self.j / BLOCK) < enough
        return math.ceil(self.tokens / CUT) if few else 1

    def gate(self, side: Side) -> int:
        """Numbers of a side's gate that a token brings along."""
        kind, size = self._gate(side)
        return 0 if self.constant or kind == "none" else 1 if kind == "head" else size

    @property
    def gates(self) -> int:
        return self.gate("i") + self.gate("j")

    @property
    def apart(self) -> int:
        """Tokens between which one anchor serves: within so many no exponent exceeds LARGEST. A power of 2."""
        tokens = TILE
        while tokens > 1 and (tokens - 1) * self.decay > LARGEST:
            tokens //= 2
        return tokens

    @property
    def levels(self) -> int:
        """Products that scores take: a halving of the tile down to `apart` tokens each one, and these themselves one. A
        gate that is one number a head multiplies scores that are made already."""
        if "each" not in (self.gate_i, self.gate_j):
            return 1
        return int(math.log2(TILE // self.apart)) + (self.apart > 1)

    @property
    def score_products(self) -> int:
        """How often scores are taken over the i side: once a level where each key has its own gate."""
        return self.levels if self.gate_i == "each" else 1

    @property
    def value_products(self) -> int:
        """How often scores meet the values: once a level where each value has its own gate."""
        return self.levels if self.gate_j == "each" else 1

    def factors(self, side: Side) -> int:
        """Exponentials of a token with others of its tile: of each key or value one a halving, and two for the anchor
        of the last; of a number a head one for each other token."""
        kind, size = self._gate(side)
        each = int(math.log2(TILE // self.apart)) + 2 * (self.apart > 1)
        return each * size if kind == "each" else TILE if kind == "head" else 0

    def edge(self, side: Side) -> int:
        """Exponentials that carry a token to an edge of its tile."""
        kind, size = self._gate(side)
        return size if kind == "each" else 1 if kind == "head" else 0

    def _gate(self, side: Side) -> tuple[GateKind, int]:
        return (self.gate_i, self.i) if side == "i" else (self.gate_j, self.j)


@dataclass(frozen=True)
class Launch:
    """One kernel over a whole batch. `again` are bytes that programs beside each other read once more; `steps` are
    tiles that a program walks over, with `links` products in a chain at each; `block` are the numbers of a state that
    it holds."""

    name: str
    bytes: float
    operations: float
    exps: float
    programs: int
    again: float = 0.0
    steps: int = 1
    links: int = 1
    block: int = BLOCK * BLOCK

    def waves(self, machine: Machine) -> float:
        """Programs a multiprocessor."""
        return self.programs / machine.multiprocessors

    def times(self, machine: Machine, width: int) -> dict[Bound, float]:
        """The seconds that each resource takes. Where programs do not fill the machine, or its last wave, the
        multiprocessors at work have no more than their share of it."""
        busy = self.waves(machine) / math.ceil(self.waves(machine))
        resident = max(1, machine.registers // 4 // self.block)
        rounds = math.ceil(self.waves(machine) / resident)
        return {
            "bytes": self.bytes / machine.bandwidth / busy,
            "cache": (self.bytes + self.again) / (CACHE * machine.bandwidth) / busy,
            "operations": self.operations / machine.rate(width) / busy,
            "exps": self.exps / machine.exps / busy,
            "steps": rounds * self.steps * self.links * LINK,
        }

    def seconds(self, machine: Machine, width: int) -> float:
        return max(self.times(machine, width).values()) + LAUNCH


@dataclass(frozen=True)
class Estimate:
    """A schedule on a machine; without launches, `why_not` says what keeps it from being one."""

    schedule: str
    launches: tuple[Launch, ...] = ()
    seconds: float = math.inf
    bound: Bound = "bytes"
    segments: int = 1
    why_not: str = ""

    def total(self, what: Literal["bytes", "operations", "exps"]) -> float:
        return float(sum(getattr(launch, what) for launch in self.launches))


def _estimate(schedule: str, launches: list[Launch], machine: Machine, width: int, segments: int = 1) -> Estimate:
    """The launches one after the other; what takes most of the longest one is what bounds them."""
    longest = max(launches, key=lambda launch: launch.seconds(machine, width))
    times = longest.times(machine, width)
    bound = max(times, key=lambda b: times[b])
    return Estimate(schedule, tuple(launches), sum(x.seconds(machine, width) for x in launches), bound, segments)


# -- the least ---------------------------------------------------------------------------------------------------------


def least_seconds(moved: float, operations: float, bandwidth: float, rate: float) -> float:
    """The time below which nothing can be: bytes over bytes a second, operations over operations a second."""
    return max(moved / bandwidth, operations / rate)


def least_bytes(s: Scan, backward: bool = False) -> int:
    """Operands once and results once; the backward reads the operands again, with the results' gradients, and writes
    the operands' gradients."""
    operands = s.reads * s.i + s.writes * (s.i + s.j) + s.gates
    results = s.reads * s.j
    return s.rows * s.width * (2 * operands + results if backward else operands + results)


def least_operations(s: Scan, backward: bool = False) -> int:
    """Those of the recurrence, a token at a time: a product and a sum an element of the state, a write, a read."""
    return (BACKWARD if backward else 1) * s.rows * 2 * s.i * s.j * (s.writes + s.reads)


def limit(s: Scan, machine: Machine, backward: bool = False) -> float:
    """The seconds below which no schedule can be."""
    work = least_bytes(s, backward), least_operations(s, backward)
    return least_seconds(*work, machine.bandwidth, machine.rate(s.width))


# -- schedules ---------------------------------------------------------------------------------------------------------


def estimates(s: Scan, machine: Machine, backward: bool = False) -> tuple[Estimate, ...]:
    """What each schedule would take: `fused`, `passes`, `split`."""
    made = _fused_backward if backward else _fused_forward
    found = [_estimate("fused", made(s, width), machine, s.width) for width in _slices(s, machine)]
    if found:
        fused = min(found, key=lambda e: e.seconds)
    else:
        fused = Estimate("fused", why_not=f"{NARROW} columns of a state of {s.i} keys exceed a program's registers")
    passes = _estimate("passes", _passes(s, backward, 1), machine, s.width)
    segments = math.ceil(s.tokens / CUT)
    if segments > 1:
        split = _estimate("split", _passes(s, backward, segments), machine, s.width, segments)
    else:
        split = Estimate("split", why_not=f"segments have {CUT} tokens: the sequence is one")
    return fused, passes, split


def cheapest(found: tuple[Estimate, ...]) -> Estimate:
    """The first of those that take least."""
    return min(found, key=lambda e: e.seconds)


def _slices(s: Scan, machine: Machine) -> Iterator[int]:
    """Widths of j blocks with which a program can hold all keys: at most an eighth of the registers."""
    width = max(NARROW, 2 ** math.ceil(math.log2(s.j)))
    while width >= NARROW:
        if s.i * width <= machine.registers // 8:
            yield width
        width //= 2


def _local(s: Scan) -> tuple[int, int]:
    """Operations of a token within its tile: of scores, and of values."""
    pairs = s.reads * s.writes
    return 2 * TILE * s.i * pairs * s.score_products, 2 * TILE * s.j * pairs * s.value_products


def _fused_forward(s: Scan, width: int) -> list[Launch]:
    slices = math.ceil(s.j / width)
    scores, values = _local(s)
    shared = (s.reads + s.writes) * s.i + s.gate("i")
    operations = slices * scores + values + 2 * s.i * s.j * (s.reads + s.writes)
    exps = slices * (s.factors("i") + 2 * s.edge("i")) + s.factors("j") + 2 * s.edge("j")
    return [
        Launch("fused", least_bytes(s), s.rows * operations, s.rows * exps, s.states * slices,
               again=s.rows * s.width * (slices - 1) * shared, steps=s.tiles, links=3 + s.levels, block=s.i * width)
    ]  # fmt: skip


def _fused_backward(s: Scan, width: int) -> list[Launch]:
    """Two walks in one launch: onward, to leave the states at tiles' edges in memory, and back, with their gradient on
    chip. What is summed over j is left in parts, where there are several slices, and these summed in another launch."""
    slices = math.ceil(s.j / width)
    scores, values = _local(s)
    shared = (s.reads + s.writes) * s.i + s.gate("i")
    onward = s.writes * (s.i + s.j) + s.gates
    back = shared + (s.reads + s.writes) * s.j + s.gate("j")
    own = s.writes * s.j + s.gate("j")
    edges = 2 * s.i * s.j / TILE
    parts = slices * shared * 4 / s.width if slices > 1 else shared
    moved = onward + back + own + edges + parts
    operations = slices * 3 * scores + 2 * values + 2 * s.i * s.j * (2 * s.writes + 2 * s.reads + s.writes)
    exps = slices * (s.factors("i") + 3 * s.edge("i")) + s.factors("j") + 3 * s.edge("j")
    launches = [
        Launch("fused", s.rows * s.width * moved, s.rows * operations, s.rows * exps, s.states * slices,
               again=s.rows * s.width * (slices - 1) * (shared + s.writes * s.i + s.gate("i")),
               steps=2 * s.tiles, links=4 + s.levels, block=s.i * width)
    ]  # fmt: skip
    if slices > 1:
        summed = s.rows * shared * (slices * 4 + s.width)
        launches.append(Launch("sums", summed, 0, 0, s.states * s.tiles))
    return launches


def _passes(s: Scan, backward: bool, segments: int) -> list[Launch]:
    """A walk that leaves a state at each tile's edge, then a program a tile. Backward the walk is with the state's
    gradient: the states were kept. Where a sequence is cut, segments behind the first are walked from zero, and what
    is left of the state that each begins with is added to those at its tiles' edges, here to all."""
    through = (s.reads if backward else s.writes) * (s.i + s.j) + s.gates  # what the walk reads
    blocks_i, blocks_j = math.ceil(s.i / BLOCK), math.ceil(s.j / BLOCK)
    pairs = s.reads if backward else s.writes
    shared = (blocks_j - 1) * (pairs * s.i + s.gate("i")) + (blocks_i - 1) * (pairs * s.j + s.gate("j"))
    states = s.states * segments * s.i * s.j * 4  # bytes of one a segment, in float32
    programs, steps = s.states * blocks_i * blocks_j, math.ceil(s.tiles / segments)
    exps = blocks_j * s.edge("i") + blocks_i * s.edge("j")
    edges = s.i * s.j / TILE
    walk = Launch("ends" if backward else "states", s.rows * s.width * (through + edges),
                  s.rows * 2 * s.i * s.j * pairs, s.rows * exps, programs * segments,
                  again=s.rows * s.width * shared, steps=steps, links=2)  # fmt: skip
    tiles = _tiles_backward(s, edges) if backward else _tiles_forward(s, edges)
    if segments == 1:
        return [walk, tiles]
    walk = replace(walk, bytes=walk.bytes + states)
    later = 1 - 1 / segments  # of all tiles: the first segment starts with the state that it is given
    completed = Launch("completed", states + 2 * later * s.rows * s.width * edges, 0, 0, programs * segments,
                       again=states * (segments - 1) / 2, steps=steps)  # fmt: skip
    return [walk, completed, tiles]


def _tiles_forward(s: Scan, edges: float) -> Launch:
    operations = sum(_local(s)) + 2 * s.i * s.j * s.reads
    exps = sum(s.factors(side) + s.edge(side) for side in SIDES)
    return Launch("tiles", least_bytes(s) + s.rows * s.width * edges, s.rows * operations,
                  s.rows * exps, s.states * s.tiles, links=3 + s.levels)  # fmt: skip


def _tiles_backward(s: Scan, edges: float) -> Launch:
    scores, values = _local(s)
    operations = 3 * scores + 2 * values + 2 * s.i * s.j * (s.reads + 2 * s.writes)
    exps = sum(s.factors(side) + 2 * s.edge(side) for side in SIDES)
    return Launch("tiles", least_bytes(s, backward=True) + s.rows * s.width * 2 * edges, s.rows * operations,
                  s.rows * exps, s.states * s.tiles, links=4 + s.levels)  # fmt: skip
