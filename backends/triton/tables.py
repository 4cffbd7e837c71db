"""The schedules of kernels: blocks of the sides, warps, stages. What they are untuned, what else they may be, and the
table of them that a package has.

The first were measured on an H100 at I = J = 128 in bfloat16 (`docs/performance.md`). Blocks are at least 64 wide:
Triton 3.6 miscompiles some products that are 32 wide for Hopper."""

from __future__ import annotations

from collections.abc import Mapping

from chunkc.backends.scan import ScanForm
from chunkc.backends.triton.kernel import Kernel
from chunkc.backends.writer import Writer
from chunkc.ir.tuning import Schedule

SAFE: Schedule = (64, 64, 8, 1)  # with products in float32, whose tiles take twice the room; on AMD's smaller memory
NARROW: Schedule = (64, 64, 4, 3)  # of a walk over tiles whose programs would leave a GPU idle
WALKS: tuple[Schedule, ...] = ((64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 4, 2), (64, 128, 4, 3), (128, 64, 4, 3),
                               (128, 128, 8, 2), (128, 128, 8, 3))  # fmt: skip
SIDES: tuple[Schedule, ...] = ((64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (64, 128, 4, 3), (64, 128, 8, 2))
GATES: tuple[Schedule, ...] = ((64, 64, 4, 1), (64, 64, 4, 2), (64, 64, 8, 2), (64, 128, 8, 1))
IDLE = 128  # programs that leave a GPU idle
FULL = 256  # programs that fill one better than fewer, longer ones
CUT = 4096  # tokens of a segment, where sequences are cut
MANY = 256  # sequences and heads that fill a GPU with a program each


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


def candidates(form: ScanForm, kernels: Mapping[str, Kernel]) -> dict[str, tuple[Schedule, ...]]:
    """What the schedules of a scan's kernels may be, each by its name in the table; the first is what it is untuned.

    Blocks of one side take the whole of the other, or walk over it in blocks."""
    found: dict[str, tuple[Schedule, ...]] = {}
    for role, kernel in kernels.items():
        if role == "token":
            continue
        first = default_schedule(form, role)
        if role in ("states", "ends"):
            found |= {kernel.name: (first, *WALKS), f"{kernel.name}_narrow": (NARROW, *WALKS)}
            continue
        gate, own_i = role.startswith(("edges", "gate")), role.split("_")[1] == "i"
        turned = [(j, i, warps, stages) if own_i else (i, j, warps, stages)
                  for i, j, warps, stages in (GATES if gate else SIDES)]  # fmt: skip
        found[kernel.name] = (first, *turned)
    return {name: tuple(dict.fromkeys(schedules)) for name, schedules in found.items()}


def emit_schedules(made: list[tuple[ScanForm, dict[str, Kernel]]], tuned: Mapping[str, Schedule], w: Writer) -> None:
    """A table of the kernels' schedules, and how one becomes the options of a launch."""
    table = {name: found[0] for form, kernels in made for name, found in candidates(form, kernels).items()}
    w()
    w()
    w("# Columns of the sides i and j that a program takes, warps, stages; SAFE in float32, and on AMD GPUs.")
    w(f"SAFE = {SAFE}")
    w(f"IDLE = {IDLE}  # programs that leave a GPU idle: then walks over tiles have the narrower blocks, and so more;")
    w(f"FULL = {FULL}  # programs that fill one better than fewer, longer ones")
    w(f"CUT = {CUT}  # tokens of the segment that a program walks over, where programs are too few")
    with w.indented("SCHEDULES: dict[str, tuple[int, int, int, int]] = {"):
        for name, schedule in table.items():
            tail = f"  # tuned; {schedule} before" if tuned.get(name, schedule) != schedule else ""
            w(f'"{name}": {tuned.get(name, schedule)},{tail}')
    w("}")
    w()
    w()
    with w.indented("def programs(walks: int, I: int, J: int, i: int = BLOCK, j: int = BLOCK) -> int:"):
        w('"""How many programs walks over tiles have, with blocks of i and j columns."""')
        w("return walks * cdiv(I, i) * cdiv(J, j)")
    w()
    w()
    taken = "kernel: str, I: int, J: int, types: dict[str, Any], walks: int = 0"
    with w.indented(f"def schedule({taken}) -> dict[str, int]:"):
        w('"""Blocks, warps and stages of a kernel; a block is no wider than its side needs.')
        w()
        w('`walks`: how many walks over tiles there are, for a kernel whose programs each take a part of one."""')
        w('exact = types["DOT"] == tl.float32 or torch.version.hip is not None')
        w("i, j, warps, stages = SAFE if exact else SCHEDULES[kernel]")
        w("if not exact and 0 < programs(walks, I, J, i, j) < IDLE:")
        w('    i, j, warps, stages = SCHEDULES[f"{kernel}_narrow"]')
        w("i, j = min(i, max(BLOCK, power_of_two(I))), min(j, max(BLOCK, power_of_two(J)))")
        w("if not exact:  # as many warps as a block has work for")
        w("    warps = min(warps, 4 * cdiv(i * j, 128 * BLOCK))")
        w('return {"BI": i, "BJ": j, "num_warps": warps, "num_stages": stages}')
    w()
    w()
    with w.indented("def gate_parts(types: dict[str, Any], *gates: Tensor) -> int:"):
        w('"""In how many parts gates are summed: one, if they are stored in bfloat16."""')
        w('return min(types["PARTS"], 1 if all(g.dtype == torch.bfloat16 for g in gates) else 2)')
