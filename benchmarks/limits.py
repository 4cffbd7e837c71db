"""What a case must do at least, from the spec: bytes and operations, as `chunkc bench` counts them."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from ops import OPS
from rows import Case

from chunkc.bench.costs import Cost, cost
from chunkc.bench.parts import Part, parts_of
from chunkc.bench.sizes import resolve
from chunkc.bench.timing import DTYPES
from chunkc.driver import compile_source
from chunkc.ir.diagnostics import SourceFile

HERE = Path(__file__).resolve().parent
STATE_WIDTH = 4  # bytes; states are float32


def spec_of(op: str) -> Path:
    return HERE / f"{op}.spec"


@lru_cache
def _part(op: str) -> Part:
    compiled = compile_source(SourceFile.read(spec_of(op), f"{op}.spec"))
    return parts_of(compiled, compiled.checked.module.units[-1])[0]


@lru_cache
def least(case: Case, dtype: str) -> Cost:
    """A step also reads the state and writes it."""
    part, shape = _part(case.op), case.shape
    sizes = resolve(part.unit, None, OPS[case.op].parameters(shape), {"B": shape.B, "T": shape.T}, "cuda")
    found = cost(part, sizes, DTYPES[dtype].itemsize)
    if case.mode != "step":
        return found
    state = 2 * STATE_WIDTH * shape.B * shape.H * shape.K * shape.V
    return Cost(found.bytes_forward + state, 0, found.operations_forward, 0)
