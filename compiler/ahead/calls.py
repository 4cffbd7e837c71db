"""The calls that make a package launch all its kernels, on tensors that have shapes and no values.

Whole sequences, packed and resumed, with gradients and without, and one token at a time."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from chunkc.backends.triton.tables import CUT, MANY

# Tokens of a unit's first sequence, and by how much others are longer: what is launched depends on the length, and on
# how many sequences there are.
FIRST, MIDDLE, STEP = 24, 200, 32
LONG = 2 * CUT
BATCHES = (2, 1, MANY)
SEQUENCES = 3  # in a packed batch


def with_kernels(module: ModuleType) -> ModuleType:
    """The kernels of an imported package, which takes them for tensors without values too."""
    kernels = importlib.import_module(f"{module.__name__}._kernels")
    decides = sys.modules[f"{module.__name__}._runtime"].use_kernels
    for name, part in sys.modules.items():
        if name.partition(".")[0] == module.__name__:
            for known in [n for n, value in vars(part).items() if value is decides]:
                setattr(part, known, lambda x: True)
    return kernels


class Caller:
    """Calls a layer or op of an imported package as it was asked for."""

    def __init__(self, module: Any, unit: Mapping[str, Any], dtype: torch.dtype) -> None:
        self.unit, self.dtype, self.is_layer = unit, dtype, unit["kind"] == "layer"
        made = getattr(module, unit["public"])
        takes = inspect.signature(made).parameters
        own = {name: value for name, value in unit["settings"].items() if name in takes}
        if self.is_layer:
            self.run = made(**own, device="meta", dtype=dtype)
            self.keywords: dict[str, Any] = {}
            self.resumes = hasattr(self.run, "init_state")
            takes = inspect.signature(self.run.forward).parameters
        else:
            self.run, self.resumes = made, "initial_state" in takes
            self.keywords = {**own, **{n: self.tensor(t, {}) for n, t in unit["weights"].items()}}
        self.offsets = [name for name in takes if name.startswith("cu_seqlens")]
        shapes = [t["shape"] for t in unit["inputs"].values()]
        self.spaces = list(dict.fromkeys(n for shape in shapes for n in shape if isinstance(n, str)))

    def tensor(self, of: Mapping[str, Any], lengths: Mapping[str, int], *before: int) -> Tensor:
        kind = {"float": self.dtype, "int": torch.int64, "bool": torch.bool}[of["dtype"]]
        shape = [lengths[n] if isinstance(n, str) else n for n in of["shape"]]
        x = torch.empty((*before, *shape), dtype=kind, device="meta")
        return x.requires_grad_(torch.is_grad_enabled() and x.is_floating_point())

    def call(
        self, lengths: Mapping[str, int], batch: int, state: Any = None, packed: bool = False, keeps: bool = True
    ) -> Any:
        """One call, and its gradient where gradients are enabled; the state after it, if there is one and it `keeps`
        one."""
        keeps = keeps and self.resumes
        inputs = {n: self.tensor(t, lengths, batch) for n, t in self.unit["inputs"].items()}
        more = {name: torch.empty(SEQUENCES + 1, dtype=torch.int64, device="meta") for name in self.offsets if packed}
        if self.is_layer:
            if keeps and state is None:
                state = self.run.init_state(SEQUENCES if packed else batch)
            result = self.run(*inputs.values(), *([state] if keeps else []), **more)
        else:
            keep = {"initial_state": state, "output_final_state": True} if keeps else {}
            result = self.run(**inputs, **self.keywords, **more, **keep)
        outs = result if isinstance(result, tuple) else (result,)
        if torch.is_grad_enabled():
            wanted = [x for x in torch.utils._pytree.tree_leaves(outs) if isinstance(x, Tensor) and x.requires_grad]
            if wanted:
                torch.autograd.backward(wanted, [torch.empty_like(x) for x in wanted])
        return detached(outs[-1]) if keeps else None

    def all(self) -> None:
        """Every kind of call."""
        short, lengths = ({space: first + k * STEP for k, space in enumerate(self.spaces)} for first in (FIRST, MIDDLE))
        chunks = dict.fromkeys(self.spaces, 2 * self.unit["chunk"])  # whole ones are rows of a batch
        with torch.no_grad():
            for batch in BATCHES:
                one = dict.fromkeys(self.spaces, 1)
                self.both(one, one, batch)
                self.both(lengths, one, batch)
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                for batch in BATCHES:
                    for own in (short, lengths, chunks):
                        self.both(own, own, batch)
                for keeps in (True, False):
                    self.call(dict.fromkeys(self.spaces, LONG), 1, keeps=keeps)
                    for own in (short, lengths, dict.fromkeys(self.spaces, LONG)) if self.offsets else ():
                        self.call(own, 1, packed=True, keeps=keeps)

    def both(self, lengths: Mapping[str, int], more: Mapping[str, int], batch: int) -> None:
        """A call by itself, one that keeps a state, and one that goes on from it."""
        self.call(lengths, batch, keeps=False)
        state = self.call(lengths, batch)
        if self.resumes:
            self.call(more, batch, state)


def detached(state: Any) -> Any:
    return torch.utils._pytree.tree_map_only(Tensor, lambda x: x.detach(), state)
