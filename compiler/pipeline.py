"""The list of passes, and how they run.

A spec's graph arrives at the level `semantic`. Below `normal` the levels are those of graphs that stand under a scan:
`chunked`, then `fused`. The last one, `tiled`, is the inside of kernels: values of `backends/triton/kernel.py`, which
the back end builds from the fused graphs, verifies (`backends/triton/verify.py`) and prints.
"""

from __future__ import annotations

from typing import Protocol

from chunkc.ir.graph import Graph
from chunkc.ir.verify import VerifyError, verify
from chunkc.passes.absorb import Absorb
from chunkc.passes.chunk import Chunk
from chunkc.passes.differentiate import Differentiate
from chunkc.passes.fuse import Fuse
from chunkc.passes.normalize import Normalize
from chunkc.passes.stream import Stream


class InternalError(Exception):
    """A graph between passes breaks the rules of its level: a bug of the compiler, whatever the spec says."""


class Pass(Protocol):
    """A step from a valid graph to a valid graph; a frozen dataclass whose fields are its options."""

    @property
    def name(self) -> str: ...

    def run(self, graph: Graph) -> Graph: ...


PASSES: tuple[Pass, ...] = (
    Normalize(),  # first: everything after it sees scans and maps, never equations
    Differentiate(),  # at this level, so that the chunk form of a gradient is derived as that of a scan is
    Stream(),  # one token: the normal form cut open, without tiles
    Chunk(),  # after gradients, both ways at once
    Fuse(),  # which parts of the chunk form are one kernel
    Absorb(),  # last: what around a scan is done in its kernels
)


def upto(name: str) -> tuple[Pass, ...]:
    """The passes up to the one of this name."""
    names = [p.name for p in PASSES]
    return PASSES[: names.index(name) + 1]


def run(graph: Graph, passes: tuple[Pass, ...] = PASSES) -> Graph:
    """Run the passes in order, on a valid graph and to a valid graph each.

    Raises:
        InternalError: the input, or what a pass made of it, is no valid graph.
    """
    _check(graph, "before the first pass")
    for p in passes:
        graph = p.run(graph)
        _check(graph, f"after the pass '{p.name}'")
    return graph


def _check(graph: Graph, where: str) -> None:
    try:
        verify(graph, graph.level)
    except VerifyError as reason:
        raise InternalError(f"internal error {where}: {reason}") from reason
