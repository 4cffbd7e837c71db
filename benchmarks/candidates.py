"""What is timed: the functions of emitted packages, and those of other libraries on the same operands."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol

import torch
from ops import OPS, Operands, Shape
from rows import OURS, SIMPLE, Case
from torch import Tensor

from chunkc.bench.masks import causal
from chunkc.bench.peers import PEERS, Extra, falling_decays
from chunkc.bench.timing import Call
from chunkc.bench.worker import said


class Candidate(Protocol):
    def prepare(self) -> None:
        """Import what is called."""

    def call(self, case: Case, x: Mapping[str, Tensor]) -> Call:
        """The function on these operands."""


def candidate(name: str, op: str, packages: Path) -> Candidate:
    return Ours(op, packages) if name == OURS else Peer(name)


# -- emitted -----------------------------------------------------------------------------------------------------------


@dataclass
class Ours:
    """The function that chunkc emits for an op; its package lies in `packages`."""

    op: str
    packages: Path

    def prepare(self) -> None:
        if str(self.packages) not in sys.path:
            sys.path.insert(0, str(self.packages))
        self.function: Callable[..., tuple[Tensor | None, ...]] = getattr(import_module(self.op), self.op)

    def call(self, case: Case, x: Mapping[str, Tensor]) -> Call:
        sizes = OPS[self.op].parameters(case.shape)
        if case.mode == "step":
            state = state_of(case.shape, next(iter(x.values())).device)
            return self._of(lambda: self.function(**x, **sizes, initial_state=state, output_final_state=True), ())
        if case.packed:
            row, offsets = packed(case, x)
            return self._of(lambda: self.function(**row, **sizes, cu_seqlens=offsets), list(row.values()))
        return self._of(lambda: self.function(**x, **sizes), list(x.values()))

    def _of(self, run: Callable[[], tuple[Tensor | None, ...]], leaves: list[Tensor] | tuple[()]) -> Call:
        return Call(lambda: tuple(o for o in run() if o is not None), leaves)


def packed(case: Case, x: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """The operands as one row of sequences behind each other, and where these begin."""
    row = {n: v.detach().reshape(1, -1, *v.shape[2:]).requires_grad_(v.requires_grad) for n, v in x.items()}
    device = next(iter(x.values())).device
    return row, torch.tensor([0, *case.lengths()], device=device).cumsum(0)


def state_of(shape: Shape, device: torch.device) -> Tensor:
    """A state that a step begins with, random."""
    source = torch.Generator(device).manual_seed(1)
    return torch.randn((shape.B, shape.H, shape.K, shape.V), generator=source, device=device)


# -- peers -------------------------------------------------------------------------------------------------------------


class Peer:
    """A function of another library, on the operands of an op that it has."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.known = [p for p in PEERS if p.name == name]

    def prepare(self) -> None:
        import_module(self.known[0].module)

    def call(self, case: Case, x: Mapping[str, Tensor]) -> Call:
        wanted = {"q", "k", "v"} if self.name.startswith("sdpa") else set(x)
        own = {n: v for n, v in x.items() if n in wanted}
        run = self._function(case)
        return Call(lambda: (run(own),), list(own.values()))

    def _function(self, case: Case) -> Callable[[Operands], Tensor]:
        extra = Extra(case.shape.K**-0.5, causal(case.shape.T))
        letters = OPS[case.op].operands
        if self.name == SIMPLE and case.op == "linear_attention":  # fla has it without a gate, too
            call = import_module("fla.ops.simple_gla").chunk_simple_gla
            return lambda x: _first(call(x["q"], x["k"], x["v"], scale=extra.scale))
        gate = "H" if self.name == SIMPLE and case.op == "retention" else letters.get("g")
        made = next((p for p in self.known if p.operands.get("g") == gate), self.known[0]).make(extra)
        if gate != "H":
            return made
        heads = case.shape.H
        return lambda x: made({**x, "g": falling_decays(heads).to(x["q"].device, torch.float32)})

    def stock(self, run: Callable[[], object]) -> str:
        """What the library says as it is delivered; then its refusal of a gated backward pass on this GPU and Triton is
        lifted, so that the pass can be timed and its error be shown."""
        try:
            run()
            return ""
        except RuntimeError as reason:
            return said(reason)
        finally:
            lift()


def lift() -> None:
    """Let fla run what it refuses: gated backward passes on Hopper with Triton 3.4 to 3.7.0, which get some block
    widths wrong."""
    vars(import_module("fla.ops.common.chunk_o"))["TRITON_ABOVE_3_7_1"] = True


def _first(x: tuple[Tensor, ...]) -> Tensor:
    return x[0]
