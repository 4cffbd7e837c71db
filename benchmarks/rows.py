"""The rows of the table: what is timed at which sizes, what it is compared with, and what it must reach."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from ops import GATES, Shape

OURS = "chunkc"
SEQUENCES = 64  # of equal length in the packed row


@dataclass(frozen=True)
class Case:
    """One op on operands of one shape: whole sequences, sequences packed behind each other, or one token of each."""

    op: str
    shape: Shape
    gate: str = ""
    mode: str = "whole"  # or: equal, uneven (both packed), step

    def lengths(self) -> list[int]:
        """Of the packed sequences; they have as many tokens as the dense batch."""
        tokens = self.shape.B * self.shape.T
        if self.mode == "equal":
            each = tokens // SEQUENCES
            return [*[each] * (SEQUENCES - 1), tokens - each * (SEQUENCES - 1)]
        source = torch.Generator().manual_seed(0)
        found: list[int] = []
        while (left := tokens - sum(found)) > 0:
            found.append(min(left, int(torch.randint(1, max(70, tokens // 80), (1,), generator=source))))
        return found

    @property
    def packed(self) -> bool:
        return self.mode in ("equal", "uneven")

    def key(self) -> str:
        return f"{self.op} {self.shape.text()} {self.gate} {self.mode}"


@dataclass(frozen=True)
class Must:
    """What a row shall reach: how many times as fast as its rivals, or which part of the limit, forward and with
    backward; or so many launches at most."""

    kind: str  # times, limit or launches
    forward: float
    both: float | None = None


@dataclass(frozen=True)
class Row:
    group: str
    case: Case
    rivals: tuple[tuple[str, Case], ...] = ()  # candidates, and what they are timed on; the fastest counts
    musts: tuple[Must, ...] = ()


STRONG = ("constant -5", "U(-20, 0)")
MILD = ("logsigmoid/16", "logsigmoid")
MILDEST = MILD[0]
MEAN = 3.0  # what the geometric mean over the shapes of `gla` must be, with backward, on the mildest gates
LARGE = (Shape(8, 4096, 16, 128, 128), Shape(2, 16384, 16, 128, 128))
OTHERS = (
    Shape(8, 4096, 4, 128, 256), Shape(8, 2048, 4, 256, 512), Shape(32, 2048, 8, 64, 64), Shape(1, 131072, 4, 128, 256),
    Shape(4, 4096, 5, 96, 128), Shape(3, 3001, 7, 128, 128),
)  # fmt: skip
DENSE = tuple(Shape(32768 // t, t, 16, 128, 128) for t in (1024, 2048, 4096, 16384, 32768))
WIDE = Shape(8, 4096, 1, 2048, 1)
STEPS = tuple(Shape(b, 1, 16, 128, 128) for b in (1, 64, 256))
SIMPLE = "fla.chunk_simple_gla"
PEERS = {"scalar_gate": (SIMPLE,), "retention": ("fla.chunk_retention", SIMPLE),
         "linear_attention": ("fla.chunk_linear_attn", SIMPLE)}  # fmt: skip


def small(shape: Shape) -> Shape:
    """The same kind of shape at a size that a CPU runs at once."""
    return Shape(min(shape.B, 2), 1 if shape.T == 1 else 40 + shape.T % 16, min(shape.H, 2), min(shape.K, 8),
                 min(shape.V, 8))  # fmt: skip


def _against(case: Case, *rivals: str) -> tuple[tuple[str, Case], ...]:
    return tuple((rival, case) for rival in rivals)


def rows(tiny: bool = False) -> Iterator[Row]:
    """All rows; with `tiny` at sizes of which nothing can be learnt but that they run."""
    of = small if tiny else lambda shape: shape
    for shape in map(of, LARGE):
        for gate in (*MILD, *STRONG):
            case = Case("gla", shape, gate)
            must = Must("times", 2.5, 3.0) if gate in MILD else Must("times", 1.5, 2.0)
            yield Row("gla", case, _against(case, "fla.chunk_gla"), (must,))
        case = Case("gla_bounded", shape, "U(-5, 0)")
        yield Row("bounded", case, _against(case, "fla.chunk_gla"), (Must("times", 2.5, 3.0),))
    for shape in map(of, OTHERS):
        case = Case("gla", shape, MILDEST)
        yield Row("gla", case, _against(case, "fla.chunk_gla"), (Must("times", 2.0, 2.0),))
    for group, op, gate, ratio in (
        ("scalar", "scalar_gate", MILDEST, 1.5), ("retention", "retention", "", 1.25),
        ("linear", "linear_attention", "", 1.25),
    ):  # fmt: skip
        for shape in map(of, LARGE):
            case = Case(op, shape, gate)
            yield Row(group, case, _against(case, *PEERS[op]), (Must("times", ratio, ratio),))
    yield from _packed(of(LARGE[0]))
    for shape in DENSE:
        case = Case("gla", of(shape), MILDEST)
        least = (Must("times", 1.0, 1.0),) if shape.T >= 2048 else ()
        yield Row("attention", case, _against(case, "sdpa.cudnn"), least)
    for op in ("hgrn", "mingru", "rat"):
        yield Row("vector", Case(op, of(WIDE), "sigmoid"), (), (Must("limit", 0.7, 0.7),))
    for shape in STEPS:
        musts = (Must("limit", 0.75), Must("launches", 1)) if shape.B == 64 else ()
        yield Row("decode", Case("gla", of(shape), MILDEST, "step"), (), musts)


def _packed(shape: Shape) -> Iterator[Row]:
    """The same tokens as the dense batch, which is the rival: packing may cost a tenth."""
    dense = (OURS, Case("gla", shape, MILDEST))
    yield Row("packed", Case("gla", shape, MILDEST, "equal"), (dense,), (Must("times", 1 / 1.1, 1 / 1.1),))
    yield Row("packed", Case("gla", shape, MILDEST, "uneven"), (dense,))


GROUPS = tuple(dict.fromkeys(row.group for row in rows()))
assert all(row.case.gate in GATES for row in rows())
