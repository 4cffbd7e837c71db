"""The reference interpreter of kernels: runs a launch program by program, in plain PyTorch and any floating-point type.

Memory is flat tensors by pointer name. A load or store outside of a tensor is an error unless its mask hides it, so
masks are tested too. Operand types and precisions, which a launch chooses, are left out: everything is in the type of
memory.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from chunkc.backends.triton.kernel import Expr, If, Kernel, Let, Loop, Statement, Store
from chunkc.backends.triton.text import parse_expr

INFIX: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "//": operator.floordiv, "%": operator.mod,
    ">>": operator.rshift, "<<": operator.lshift, "&": operator.and_, "|": operator.or_, "^": operator.xor,
    "/": operator.truediv, "!=": operator.ne, "<": operator.lt, "<=": operator.le, "==": operator.eq, ">": operator.gt,
    ">=": operator.ge, "is not": operator.is_not,
}  # fmt: skip


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "tl.exp": torch.exp, "tl.log": torch.log, "tl.sqrt": torch.sqrt, "tl.abs": torch.abs, "tl.floor": torch.floor,
    "tl.sigmoid": torch.sigmoid, "tl.sin": torch.sin, "tl.cos": torch.cos, "tl.erf": torch.erf, "tl.trans": torch.t,
    "exp": torch.exp, "tl.dot": torch.matmul, "product": lambda x: x.prod(0),
}  # fmt: skip


def _read(table: Pointer, index: Any) -> Any:
    return table.memory[index]


# Where tiles lie, as the functions beside the kernels say it: by tables, or by the rows of a dense batch.
PLACES: dict[str, Callable[..., Any]] = {
    "tile_start": lambda t, tile, tokens, each, size: tile // each * tokens + tile % each * size if t is None
    else _read(t, tile),
    "tile_stop": lambda t, tile, tokens, each: (tile // each + 1) * tokens if t is None else _read(t, tile),
    "sequence_start": lambda t, sequence, tokens: sequence * tokens if t is None else _read(t, sequence),
    "sequence_tile": lambda t, sequence, each: sequence * each if t is None else _read(t, sequence),
    "is_mild": lambda t, cell, size, _, limit: t is not None
    and bool(t.memory[int(cell) * size : (int(cell) + 1) * size].min() > -limit),
}  # fmt: skip


@dataclass(frozen=True)
class Pointer:
    """Offsets into a flat tensor."""

    memory: Tensor
    offset: Any = 0

    def __add__(self, by: Any) -> Pointer:
        return Pointer(self.memory, self.offset + by)

    def at(self, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The offsets, 0 where the mask hides them, and the mask.

        Raises:
            IndexError: an offset that the mask does not hide is outside of the tensor.
        """
        offset = torch.as_tensor(self.offset)
        seen = torch.ones_like(offset, dtype=torch.bool) if mask is None else mask.broadcast_to(offset.shape)
        beyond = seen & ((offset < 0) | (offset >= self.memory.numel()))
        if bool(beyond.any()):
            raise IndexError(f"offset {int(offset[beyond].flatten()[0])} of {self.memory.numel()} elements")
        return torch.where(seen, offset, torch.zeros_like(offset)), seen


@dataclass
class Launch:
    """A launch: the kernel, programs along each axis of the grid, memory by pointer name (lengths are numbers),
    constants by name."""

    kernel: Kernel
    grid: tuple[int, ...]
    memory: Mapping[str, Tensor | int | None]
    constants: Mapping[str, int | float]
    dtype: torch.dtype = torch.float64
    program: tuple[int, ...] = ()
    values: dict[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        """Run all programs, one after the other; stores go to memory."""
        for program in itertools.product(*(range(n) for n in self.grid)):
            self.program = program
            given = {name: self.memory[name] for name in self.kernel.arguments}
            self.values = {name: Pointer(x) if isinstance(x, Tensor) else x for name, x in given.items()}
            self.values |= self.constants
            self.body(self.kernel.body)

    def body(self, body: tuple[Statement, ...]) -> None:
        for s in body:
            if isinstance(s, Let):
                value = self.value(s.value)
                self.values[s.name] = self.values[s.name] + value if s.add else value
            elif isinstance(s, Loop):
                for step in range(int(self.value(s.stop))):
                    self.values[s.name] = step
                    self.body(s.body)
            elif isinstance(s, If):
                self.body(s.body if bool(self.value(s.cond)) else s.orelse)
            elif isinstance(s, Store):
                pointer: Pointer = self.value(s.pointer)
                offset, seen = pointer.at(None if s.mask is None else self.value(s.mask))
                value = torch.as_tensor(self.value(s.value), dtype=pointer.memory.dtype)
                pointer.memory[offset[seen]] = value.broadcast_to(offset.shape)[seen]

    def value(self, e: Expr) -> Any:
        if not e.args and not e.keywords:
            return self.name(e.op)
        if e.op == "tl.zeros":
            return torch.zeros(self.shape(e.args[0]), dtype=self.dtype)
        if e.op == "tl.broadcast_to":
            return self.value(e.args[0]).broadcast_to(self.shape(e.args[1]))
        if e.op == ".to":
            value = self.value(e.args[0])
            real = e.args[1].op == "tl.float32" and not torch.as_tensor(value).is_floating_point()
            return torch.as_tensor(value).to(self.dtype) if real else value
        if e.op == "tl.load":
            return self.load(e)
        args = [self.value(a) for a in e.args]
        if e.op == "index":
            return args[0][:, None] if e.keywords[0][1] == ":, None" else args[0][None, :]
        if e.op in INFIX:
            return INFIX[e.op](*args)
        return self.call(e, args)

    def name(self, op: str) -> Any:
        if op in self.values:
            return self.values[op]
        if op.startswith('float("'):
            return float(op[7:-2])
        if op in ("True", "None"):
            return True if op == "True" else None
        whole = op.removeprefix("-").isdigit()
        return int(op) if whole else float(op) if "." in op and not op.startswith("tl.") else op

    def shape(self, e: Expr) -> list[int]:
        return [int(self.name(x.strip())) for x in e.op.strip("()").split(",") if x.strip()]

    def load(self, e: Expr) -> Tensor:
        keywords = {k: self.value(parse_expr(text)) for k, text in e.keywords}
        pointer: Pointer = self.value(e.args[0])
        offset, seen = pointer.at(keywords.get("mask"))
        found = pointer.memory[offset] if pointer.memory.numel() else pointer.memory.new_zeros(offset.shape)
        return torch.where(seen, found, torch.as_tensor(keywords.get("other", 0), dtype=found.dtype))

    def call(self, e: Expr, args: list[Any]) -> Any:
        if e.op == "tl.program_id":
            return torch.tensor(self.program[args[0]])
        if e.op == "tl.arange":
            return torch.arange(args[0], args[1])
        if e.op == "tl.cdiv":
            return -(-args[0] // args[1])
        if e.op == "tl.sum":
            keep = dict(e.keywords).get("keep_dims") == "True"
            return args[0].sum(args[1], keepdim=keep)
        if e.op == "tl.cumsum":
            down = dict(e.keywords).get("reverse") == "True"
            return args[0].flip(0).cumsum(0).flip(0) if down else args[0].cumsum(0)
        if e.op in ("tl.max", "tl.min"):
            return args[0].amax(args[1]) if e.op == "tl.max" else args[0].amin(args[1])
        if e.op in ("tl.where", "tl.maximum", "tl.minimum"):
            args = [torch.tensor(a, dtype=self.dtype) if isinstance(a, float) else torch.as_tensor(a) for a in args]
            if e.op == "tl.where":
                return torch.where(args[0], args[1], args[2])
            extreme = torch.maximum if e.op == "tl.maximum" else torch.minimum
            return extreme(args[0], args[1].to(args[0].dtype))
        if e.op == "tl.max_contiguous":
            return args[0]
        if e.op in ("walk", "walk_max"):
            a, b = (in_order(x, args[3]) for x in args[:2])
            return in_order(walk(a, b, args[2], e.op == "walk_max"), len(a) // args[3])
        if e.op == "walk_back":
            a, g = (in_order(x, args[4]) for x in args[:2])
            return in_order(walk_back(a, g, args[2], bool(args[3])), len(a) // args[4])
        if e.op == "passed":
            return args[0][-1] * args[1][-1] + (0 if args[5] else args[2][-1])
        if e.op == "masked_sum":
            return args[0].to(self.dtype) @ args[1]
        if e.op in PLACES:
            return PLACES[e.op](*args)
        if e.op == "neg":
            return -args[0]
        if e.op == "rounded":
            return args[0]
        return FUNCTIONS[e.op](*(torch.as_tensor(a) for a in args))


def in_order(x: Tensor, parts: int) -> Tensor:
    """Rows that parts of a tile have in turn, part by part; and back again, for as many parts as one has rows."""
    return x.view(-1, parts, *x.shape[1:]).transpose(0, 1).reshape(x.shape)


def walk(a: Tensor, b: Tensor, state: Tensor, tropical: bool) -> Tensor:
    """h = a * h + b or h = max(a + h, b), h after each row."""
    rows = []
    for decay, added in zip(a, b):
        state = torch.maximum(decay + state, added) if tropical else decay * state + added
        rows.append(state)
    return torch.stack(rows)


def walk_back(a: Tensor, g: Tensor, state: Tensor, after: bool) -> Tensor:
    """The gradient of h after each token, from the last to the first: `state` is that of h before the token behind it;
    g are those of h after each token, or before it."""
    rows = []
    for decay, read in zip(a, g):
        rows.append(state + read if after else state)
        state = decay * rows[-1] + (0 if after else read)
    return torch.stack(rows)
