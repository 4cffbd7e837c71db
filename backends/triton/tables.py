"""The schedules that kernels have unless they are tuned: blocks of the sides, warps, stages."""

from __future__ import annotations

from chunkc.backends.triton.kernel import Kernel

Schedule = tuple[int, int, int, int]  # columns of the sides i and j, warps, stages


def default_schedule(kernel: Kernel, exact: bool) -> Schedule:
    """A kernel's schedule on Hopper; `exact`: with products in float32, whose tiles take twice the room."""
    return (64, 64, 8, 1) if exact else (64, 64, 4, 1)
