"""Checks of the arguments of an emitted layer or op: one clear error before any kernel.

Copied into each package as `_checks.py`; it imports torch alone. Values are read only where a call says `check=True`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def length(x: Tensor, dim: int) -> int:
    """The length of a dimension, from which an op's open size follows; 1 where there is none, for a check to report."""
    return x.shape[dim] if isinstance(x, Tensor) and x.dim() > dim else 1


def check_tensors(who: str, tensors: Mapping[str, tuple[Tensor, tuple[int | str, ...], str]]) -> None:
    """Shapes, dtypes and devices, without reading values; the first tensor sets B, T, the dtype and the device.

    A tensor comes with its wanted shape and its kind: float, int, bool or complex. A letter in the shape stands for any
    length, the same wherever it stands."""
    lead: dict[str, int] = {}
    first: tuple[str, Tensor] | None = None
    device: torch.device | None = None
    for name, (x, shape, kind) in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{who}: '{name}' is a {type(x).__name__}, not a tensor")
        if not torch.compiler.is_compiling() and torch._C._functorch.is_batchedtensor(x):
            raise RuntimeError(f"{who} does not go through torch.func.vmap: its first dimension is the batch already")
        sizes = {**lead}
        wanted = [sizes.setdefault(n, have) if isinstance(n, str) else n for n, have in zip(shape, x.shape)]
        if x.dim() != len(shape) or wanted != list(x.shape):
            told = ", ".join(str(lead.get(n, n)) if isinstance(n, str) else str(n) for n in shape)
            raise ValueError(f"{who}: '{name}' has shape {tuple(x.shape)}, wanted [{told}]")
        lead = sizes
        if kind == "float":
            if x.dtype not in FLOATS:
                raise TypeError(f"{who}: '{name}' is {x.dtype}, wanted a floating-point tensor")
            if first is not None and x.dtype != first[1].dtype and torch.float64 in (x.dtype, first[1].dtype):
                raise TypeError(f"{who}: '{name}' is {x.dtype}, but '{first[0]}' is {first[1].dtype}")
            first = first or (name, x)
        elif kind == "int" and (x.dtype.is_floating_point or x.dtype == torch.bool):
            raise TypeError(f"{who}: '{name}' is {x.dtype}, wanted integers")
        elif kind == "complex" and not x.dtype.is_complex:
            raise TypeError(f"{who}: '{name}' is {x.dtype}, wanted complex numbers")
        elif kind == "bool" and x.dtype != torch.bool:
            raise TypeError(f"{who}: '{name}' is {x.dtype}, wanted truth values")
        if device is not None and x.device != device:
            raise ValueError(f"{who}: '{name}' is on {x.device}, the others are on {device}")
        device = x.device


def check_offsets(who: str, cu_seqlens: Tensor | None, x: Tensor, name: str = "cu_seqlens",
                  first: Tensor | None = None) -> None:  # fmt: skip
    """A packed batch is one row; `cu_seqlens` are N + 1 integers. Their values are not read here.

    `first` are the offsets of the first sequence where these are another's: both are packed or none."""
    if name != "cu_seqlens" and (first is None) != (cu_seqlens is None):
        raise ValueError(f"{who}: pack all sequences or none: cu_seqlens and {name}")
    if cu_seqlens is None:
        return
    if name != "cu_seqlens" and first is not None and first.shape != cu_seqlens.shape:
        raise ValueError(f"{who}: {name} has shape {tuple(cu_seqlens.shape)}, cu_seqlens has {tuple(first.shape)}")
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ValueError(f"{who}: {name} wants a tensor of one dimension, [0, ..., T]")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{who}: {name} is {cu_seqlens.dtype}, wanted int32 or int64")
    if x.shape[0] != 1:
        raise ValueError(f"{who}: a packed batch has one row, not {x.shape[0]}")


def check_state(
    who: str, name: str, state: Tensor, shape: tuple[int | None, ...], x: Tensor, kind: str = "float"
) -> None:
    """An initial state: [N, ...] on the inputs' device, of its kind; None is any size."""
    right = isinstance(state, Tensor) and state.dim() == len(shape)
    if not right or any(n not in (None, m) for n, m in zip(shape, state.shape)):
        have = tuple(state.shape) if isinstance(state, Tensor) else type(state).__name__
        wanted = ["any" if n is None else n for n in shape]
        raise ValueError(f"{who}: initial state '{name}' is {have}, wanted {wanted}")
    if state.device != x.device:
        raise ValueError(f"{who}: initial state '{name}' is on {state.device}, the inputs are on {x.device}")
    if kind == "float" and state.dtype not in FLOATS:
        raise TypeError(f"{who}: initial state '{name}' is {state.dtype}, wanted a floating-point tensor")
    if kind != "float" and state.dtype.is_complex != (kind == "complex"):
        raise TypeError(f"{who}: initial state '{name}' is {state.dtype}, wanted {kind}")


def check_position(who: str, position: Tensor, count: int, x: Tensor) -> None:
    """The tokens that each sequence has seen: integers [N] on the inputs' device."""
    if not isinstance(position, Tensor) or tuple(position.shape) != (count,) or position.dtype != torch.int64:
        raise ValueError(f"{who}: the position in initial_state wants int64 [{count}]")
    if position.device != x.device:
        raise ValueError(f"{who}: the position in initial_state is on {position.device}, the inputs are on {x.device}")


def check_values(who: str, name: str, x: Tensor, low: float | None, high: float | None) -> None:
    """With check=True: no NaN, no infinity but where the declared range ends in one, and that range (reads values)."""
    real_or_complex = x.dtype.is_floating_point or x.dtype.is_complex
    right = torch.isfinite(x) if real_or_complex else torch.ones_like(x, dtype=torch.bool)
    for end in (low, high):
        right = right if end is None or math.isfinite(end) else right | (x == end)
    if not bool(right.all()):
        raise ValueError(f"{who}: '{name}' has values that are not finite")
    if low is not None and bool((x < low).any()) or high is not None and bool((x > high).any()):
        raise ValueError(f"{who}: '{name}' leaves its declared range [{low}, {high}]")


def check_packing(who: str, cu_seqlens: Tensor, tokens: int) -> None:
    """With check=True: offsets start at 0, do not fall and end at T (reads the values)."""
    values = cu_seqlens.tolist()
    if values[0] != 0 or values[-1] != tokens or any(a > b for a, b in zip(values, values[1:])):
        raise ValueError(f"{who}: cu_seqlens must rise from 0 to {tokens}, not {values[:8]}")
