"""The kernels of attentions: text that reads back, their meaning in float64, and what they use on a GPU."""

from __future__ import annotations

import inspect
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import attentions
import pytest
import torch
from crosscompile import compile_attention, usage
from emitted import Case, emit, errors
from test_attention import SIZES, VALUES
from torch import Tensor

from chunkc.backends.triton.text import parse_kernels
from chunkc.backends.writer import Writer
from chunkc.interp_kernels import Launch
from chunkc.ir.graph import Unit

WITHOUT = {"of_queries", "relative"}
KERNELS = [name for name in attentions.OPS if name not in WITHOUT]
PACKED = [3, 0, 1, 14]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("attention_kernels")

    @cache
    def get(name: str) -> tuple[ModuleType, Unit, ModuleType]:
        text = attentions.CROSS if name == "cross" else attentions.OPS[name]
        module, (unit,), _ = emit(text, folder, "attends.spec")
        __import__(f"{module.__name__}._kernels")
        return module, unit, sys.modules[f"{module.__name__}._kernels"]

    return get


@pytest.mark.parametrize("name", attentions.OPS)
def test_which_have_kernels(built: Any, name: str) -> None:
    own = {n for n in vars(built(name)[2]) if n.startswith("y_")}
    assert bool(own) == (name not in WITHOUT)


@pytest.mark.parametrize("name", KERNELS)
def test_text_reads_back(built: Any, name: str) -> None:
    text = inspect.getsource(built(name)[2])
    kernels = {n: k for n, k in parse_kernels(text).items() if n.startswith("y_")}
    assert {"y_forward", "y_queries"} <= set(kernels)
    for kernel in kernels.values():
        w = Writer()
        kernel.print(w)
        assert w.text() in text


class Interpreted:
    """Stands in for a jitted kernel: launches run in the kernels' interpreter, in the type of their memory."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **constants: Any) -> None:
            flat = [x.view(-1) if isinstance(x, Tensor) else x for x in arguments]
            memory = dict(zip(self.kernel.arguments, flat, strict=True))
            own = {c: constants[c] for c in self.kernel.constants if not isinstance(constants[c], str)}
            Launch(self.kernel, grid, memory, own).run()

        return launch


@pytest.mark.parametrize("name", [*KERNELS, "cross"])
def test_kernels_mean_the_attention(built: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged, empty and one-token sequences, tiles of 4 queries and 8 rows: forward and gradients in float64."""
    module, unit, kernels = built(name)
    for own, kernel in parse_kernels(inspect.getsource(kernels)).items():
        if own.startswith("y_"):
            monkeypatch.setattr(kernels, own, Interpreted(kernel))
    types = {"DOT": "", "PRECISION": "", "PARTS": 0}
    monkeypatch.setattr(kernels, "types_of", lambda given: types)
    monkeypatch.setattr(kernels, "tile", lambda size, types: (4, 8, 1))
    monkeypatch.setattr(kernels, "BLOCK", 8)
    monkeypatch.setattr(module, "_scans", lambda x: kernels)
    for lengths, packed in (([1], False), ([11, 11], False), *([(PACKED, True)] if name != "cross" else [])):
        found = errors(module, unit, Case(SIZES, lengths, packed=packed, dtype=torch.float64, values=VALUES))
        assert max(found.values()) <= 1, (lengths, {k: v for k, v in found.items() if v > 1})


@pytest.mark.interpreter
@pytest.mark.parametrize("name", [*KERNELS, "cross"])
def test_interpreted(built: Any, name: str) -> None:
    """In Triton's own interpreter, in float32."""
    module, unit, _ = built(name)
    lengths, packed = ([70, 70], False) if name == "cross" else ([3, 0, 1, 66], True)
    found = errors(module, unit, Case(SIZES, lengths, packed=packed, values=VALUES))
    assert max(found.values()) <= 1, {k: v for k, v in found.items() if v > 1}


NAMED = """causal op inner(BLOCK_i: int) {
  axes { t: time, s = t, i = 4 }
  input q[t, i]
  attention o[t, i] over s { logit = dot[i](q, q[t = s])
 value = q[t = s]
 mask = s <= t and t - s < BLOCK_i }
  output o
}
causal op outer(dk: int) {
  axes { t: time, i = 4 }
  input q[t, i]
  output y[t, i] = inner(q, BLOCK_i = dk / 2)
}
"""


@pytest.mark.interpreter
def test_a_constant_may_be_a_quotient_of_sizes_and_have_any_name(tmp_path: Path) -> None:
    module, _, _ = emit(NAMED, tmp_path, "named.spec")
    q = torch.randn(1, 20, 4)
    assert torch.equal(module.outer(q, dk=6)[0], module.inner(q, BLOCK_i=3)[0])


def test_too_wide_a_matrix_is_left_to_pytorch(built: Any) -> None:
    _, _, kernels = built("causal")
    made = kernels.attend_y.keywords["kernels"]
    assert made.fit({"BLOCK_i": 256, "h": 1000}) and not made.fit({"BLOCK_i": 512})


@pytest.mark.parametrize("name, target", [("documents", "sm_80"), ("sink", "sm_90"), ("causal", "gfx942")])
@pytest.mark.parametrize("kernel", ["y_forward", "y_queries", "y_rows"])
def test_compiles_for_gpus(built: Any, name: str, kernel: str, target: str) -> None:
    made = compile_attention(getattr(built(name)[2], kernel), target)
    if target == "sm_90":
        assert usage(made)["shared"] <= 227 * 1024
    assert len(made.asm["hsaco" if target.startswith("gfx") else "cubin"]) > 1000


def test_where_an_attention_has_no_kernels_the_package_says_why(tmp_path: Path) -> None:
    module, _, _ = emit(attentions.OPS["relative"], tmp_path, "attends.spec")
    text = (Path(module.__file__ or "").parent / "_kernels.py").read_text()
    assert "attend_y = attend  # no kernels, as its values differ from pair to pair (attends.spec:5)" in text
