"""What `chunkc tune` found on a GPU: a schedule for each kernel of a spec, with the times it was chosen by."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Schedule = tuple[int, int, int, int]  # columns of the sides i and j, warps, stages
LEAST, MOST, WARPS, STAGES = 64, 512, 16, 8


def _launchable(s: Schedule) -> Schedule:
    """
    Raises:
        ValueError: if no kernel can be launched so.
    """
    *columns, warps, stages = s
    if not all(LEAST <= n <= MOST and n & (n - 1) == 0 for n in columns):
        raise ValueError(f"a block has {LEAST} to {MOST} columns, a power of two")
    if not (1 <= warps <= WARPS and warps & (warps - 1) == 0):
        raise ValueError(f"a program has 1 to {WARPS} warps, a power of two")
    if not 1 <= stages <= STAGES:
        raise ValueError(f"a loop has 1 to {STAGES} stages")
    return s


class Tuned(BaseModel):
    """A kernel's schedule, what it takes in ms, and the one that it had before."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    schedule: Annotated[Schedule, AfterValidator(_launchable)]
    ms: float = Field(gt=0)
    default: Annotated[Schedule, AfterValidator(_launchable)]
    default_ms: float = Field(gt=0)


class Tuning(BaseModel):
    """A tuning file. Kernels are named as in `SCHEDULES` of the emitted package."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    generator: Literal["chunkc"] = "chunkc"
    format: Literal[1] = 1
    device: str = Field(pattern=r"^[^\x00-\x1f]*$")
    dtype: Literal["bf16"] = "bf16"
    unit: str
    settings: dict[str, bool | int | float]
    shape: dict[str, int]
    versions: dict[str, str | None]
    kernels: dict[str, Tuned]

    def schedules(self) -> dict[str, Schedule]:
        return {name: tuned.schedule for name, tuned in self.kernels.items()}

    def text(self) -> str:
        """As the file has it."""
        return self.model_dump_json(indent=2) + "\n"
