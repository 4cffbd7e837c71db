"""The ops that are timed: their operands, how these are drawn, and each op's meaning for float64."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from chunkc.bench.peers import falling_decays, recurrence

Operands = Mapping[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """Sequences, tokens of each, heads, and the widths of keys and values; of a vector recurrence K is all."""

    B: int
    T: int
    H: int = 1
    K: int = 1
    V: int = 1

    def of(self, letters: str) -> tuple[int, ...]:
        return (self.B, *(getattr(self, letter) for letter in letters))

    def text(self, letters: str = "BTHKV") -> str:
        return " ".join(f"{letter}{getattr(self, letter)}" for letter in letters)

    def short(self) -> Shape:
        """Few tokens of the same widths: more than three tiles, and not a multiple of one. Kernels are compiled
        anew for lengths that are no multiple of 16, so that stays as it is."""
        return replace(self, B=min(self.B, 2), T=min(self.T, 208 if self.T % 16 == 0 else 201))


Draw = Callable[[tuple[int, ...], torch.Generator], Tensor]


def _normal(shape: tuple[int, ...], source: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=source, device=source.device)


def _uniform(shape: tuple[int, ...], source: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=source, device=source.device)


def _sparse(shape: tuple[int, ...], source: torch.Generator) -> Tensor:
    """A tenth of the entries close the gate, the others hardly do."""
    closed = _uniform(shape, source) < 0.1
    return torch.where(closed, -100.0, F.logsigmoid(_normal(shape, source)) / 16)


GATES: Mapping[str, Draw] = {
    "logsigmoid/16": lambda shape, source: F.logsigmoid(_normal(shape, source)) / 16,
    "logsigmoid": lambda shape, source: F.logsigmoid(_normal(shape, source)),
    "constant -5": lambda shape, source: torch.full(shape, -5.0, device=source.device),
    "U(-20, 0)": lambda shape, source: -20 * _uniform(shape, source),
    "tenth -100": _sparse,
    "zero": lambda shape, source: torch.zeros(shape, device=source.device),
    "U(-5, 0)": lambda shape, source: -5 * _uniform(shape, source),
    "sigmoid": lambda shape, source: torch.sigmoid(_normal(shape, source)),
    "": _normal,
}
OPEN = ("logsigmoid/16", "logsigmoid", "constant -5", "U(-20, 0)", "tenth -100", "zero")


@dataclass(frozen=True)
class Op:
    """A spec of this folder and the function that it gives. Operands have their axes by letter, behind the batch;
    `gated` is the one that a gate is drawn for, `gates` those it is checked on; `meaning` gives its outputs."""

    name: str
    operands: Mapping[str, str]
    meaning: Callable[[Operands], tuple[Tensor, ...]]
    gated: str = ""
    gates: tuple[str, ...] = ("",)

    @property
    def vector(self) -> bool:
        return "H" not in "".join(self.operands.values())

    def parameters(self, shape: Shape) -> dict[str, int]:
        return {"width": shape.K} if self.vector else {"heads": shape.H, "dk": shape.K, "dv": shape.V}

    def draw(
        self, shape: Shape, gate: str, device: str, dtype: torch.dtype, backward: bool = True
    ) -> dict[str, Tensor]:
        """Random operands, the same in every process for the same shape."""
        found = {}
        for name, letters in self.operands.items():
            source = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
            x = GATES[gate if name == self.gated else ""](shape.of(letters), source)
            found[name] = x.to(dtype).requires_grad_(backward)
        return found


def _matrix(x: Operands) -> tuple[Tensor, ...]:
    return (recurrence(x, x["q"].shape[-1] ** -0.5),)


def _retention(x: Operands) -> tuple[Tensor, ...]:
    return _matrix({**x, "g": falling_decays(x["q"].shape[2]).to(x["q"])})


def _mix(keep: Tensor, new: Tensor, chunk: int = 0) -> Tensor:
    """s = keep s + (1 - keep) new, one token at a time, from zero at each chunk."""
    state, out = torch.zeros_like(new[:, 0]), []
    for t in range(new.shape[1]):
        before = torch.zeros_like(state) if chunk and t % chunk == 0 else state
        state = keep[:, t] * before + (1 - keep[:, t]) * new[:, t]
        out.append(state)
    return torch.stack(out, 1)


QKV = {"q": "THK", "k": "THK", "v": "THV"}
VECTOR = ("sigmoid",)
OPS = {
    op.name: op
    for op in (
        Op("gla", {**QKV, "g": "THK"}, _matrix, "g", OPEN),
        Op("gla_bounded", {**QKV, "g": "THK"}, _matrix, "g", ("U(-5, 0)", "logsigmoid/16", "constant -5", "zero")),
        Op("scalar_gate", {**QKV, "g": "TH"}, _matrix, "g", OPEN),
        Op("retention", QKV, _retention),
        Op("linear_attention", QKV, _matrix),
        Op("hgrn", {"f": "TK", "u": "TK"}, lambda x: (_mix(x["f"], x["u"]),), "f", VECTOR),
        Op("mingru", {"z": "TK", "u": "TK"}, lambda x: (_mix(1 - x["z"], x["u"]),), "z", VECTOR),
        Op("rat", {"z": "TK", "k": "TK", "v": "TK"}, lambda x: (_mix(x["z"], x["k"], 16), _mix(x["z"], x["v"], 16)),
           "z", VECTOR),
    )
}  # fmt: skip
