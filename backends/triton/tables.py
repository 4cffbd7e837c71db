"""The schedules that kernels have unless they are tuned: blocks of the sides, warps, stages.

They were measured on an H100 at I = J = 128 in bfloat16 (`docs/performance.md`). Blocks are at least 64 wide: Triton
3.6 miscompiles some products that are 32 wide for Hopper."""

from __future__ import annotations

from chunkc.backends.scan import ScanForm

Schedule = tuple[int, int, int, int]  # columns of the sides i and j, warps, stages
SAFE: Schedule = (64, 64, 8, 1)  # with products in float32, whose tiles take twice the room; on AMD's smaller memory
NARROW: Schedule = (64, 64, 4, 3)  # of a walk over tiles
IDLE = 128  # programs that leave a GPU idle
CUT = 4096  # tokens of a segment, where sequences are cut
JOINED = 512  # numbers of a state that a program takes along segments


def default_schedule(form: ScanForm, role: str) -> Schedule:
    """A kernel's schedule on Hopper, with products in bfloat16."""
    if role in ("states", "ends"):
        pairs = form.write_pairs() if role == "states" else form.query_pairs()
        stages = 3 if len(pairs) == 1 else 2
        return (64, 128, 4, stages) if form.wide() else (128, 128, 8, stages)
    if role.startswith(("edges", "gate")):
        return SAFE
    side = role.split("_")[1]
    stages = 2 if form.wide() else 3
    own = any(g.side == side for g in form.gates)
    if role.startswith("grad") and (own or side == "i" and not form.wide()):  # a gate's gradient is held, too
        return 64, 64, 4, 3 if role.endswith("start") else stages
    return (128, 64, 4, stages) if side == "i" else (64, 128, 4, stages)
