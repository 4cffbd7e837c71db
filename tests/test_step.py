"""One token at a time: states that are written over, and ops of which one token is one kernel."""

from __future__ import annotations

import importlib
import os
from functools import cache
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any

import cases
import pytest
import torch
from crosscompile import compile_kernel, usage
from emitted import Case, draw, emit, state_shapes
from shipped import TEXTS
from torch import Tensor
from torch.utils._pytree import tree_leaves

from chunkc.backends.token import token_form
from chunkc.backends.triton.pairs import FUNCTIONS
from chunkc.backends.triton.text import parse_kernels
from chunkc.backends.triton.token import call_kernel
from chunkc.backends.triton.verify import verify_kernel
from chunkc.backends.writer import Lines, Writer
from chunkc.driver import compile_source
from chunkc.ir.diagnostics import SourceFile
from chunkc.ir.graph import ELEMENTWISE, Unit

SETTINGS = {
    "d_model": 32, "heads": 2, "low": 3, "d_in": 5, "expand": 2, "head": 8, "kv": 2, "states": 6, "width": 4,
    "wide": 4, "dk": 24, "dv": 40, "scale": 0.3,
}  # fmt: skip
LAYERS = [
    "gated_linear_attention",
    "gru",
    "hgrn",
    "linear_attention",
    "mamba2",
    "mingru",
    "mlstm",
    "retention",
    "rwkv6",
]
ONE_KERNEL = ["gated", "scalar_gate", "value_gate", "raw_key"]
MANY = """causal op many(d: int) {
  axes { t: time, h = 2, i = d, j = d }
  input q[t, h, i], k[t, h, i], v[t, h, j], w[t, h]
  recurrence over t {
    state S[h, i, j]
    S = exp(-softplus(w)) * S + silu(k) * v
    o = sum[i](tanh(q) * S) / max(abs(sum[i](q * k)), 1)
  }
  output o, p = sigmoid(o + v)
}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("steps")


@cache
def built(name: str, folder: Path) -> tuple[ModuleType, Unit]:
    text = MANY if name == "many" else cases.OPS.get(name) or TEXTS[name]
    module, units, _ = emit(text, folder, f"{name}.spec")
    return module, units[0]


def own(unit: Unit) -> dict[str, Any]:
    return {p.name: SETTINGS[p.name] for p in unit.params if p.name in SETTINGS}


def same(a: Any, b: Any) -> None:
    for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_layer_writes_over_its_state(name: str, dtype: torch.dtype, folder: Path) -> None:
    """All of it: the tensors given hold the state after the token, and results are those of a state that stays."""
    module, unit = built(name, folder)
    torch.manual_seed(0)
    layer = getattr(module, unit.name)(**own(unit), dtype=dtype)
    x = torch.randn(2, 5, own(unit).get("d_in", SETTINGS["d_model"]), dtype=dtype)
    with torch.no_grad():
        _, start = layer(x[:, :3], layer.init_state(2, dtype))
        held = start.__class__(**{n: s.clone() for n, s in start.__dict__.items()})
        places = [s.data_ptr() for s in tree_leaves(held)]
        for t in (3, 4):
            y, start = layer.step(x[:, t], start)
            z, kept = layer.step(x[:, t], held, in_place=True)
            assert kept is held and [s.data_ptr() for s in tree_leaves(held)] == places
            same((y, start), (z, held))
    assert held.position.tolist() == [5, 5]


@pytest.mark.parametrize("name", ["gated", "vector", "max_plus", "raw_product", "delta"])
@pytest.mark.parametrize("tokens", [1, 6])
def test_an_op_writes_over_its_state(name: str, tokens: int, folder: Path) -> None:
    module, unit = built(name, folder)
    case = Case(SETTINGS, [tokens, tokens])
    inputs, _ = draw(unit, case)
    shaped = {n: x.reshape(2, tokens, *x.shape[1:]) for n, x in inputs.items()}
    state = [torch.randn(2, *s) for s in state_shapes(unit, case).values()]
    given: Any = state[0] if len(state) == 1 else tuple(state)
    keywords = {**{n: v for n, v in own(unit).items() if n == "scale"}, "output_final_state": True}
    op = getattr(module, unit.name)
    *out, new = op(**shaped, **keywords, initial_state=given)
    held = [s.clone() for s in state]
    kept: Any = held[0] if len(held) == 1 else tuple(held)
    *other, last = op(**shaped, **keywords, initial_state=kept, in_place=True)
    assert last is kept
    same((out, tree_leaves(new)), (other, held))
    with pytest.raises(ValueError, match="in_place wants initial_state"):
        op(**shaped, **keywords, in_place=True)


def test_a_layer_without_a_state_has_none_to_write_over(folder: Path) -> None:
    module, unit = built("hgrn", folder)
    layer = getattr(module, unit.name)(**own(unit))
    with pytest.raises(ValueError, match="in_place wants state"):
        layer(torch.randn(1, 2, SETTINGS["d_model"]), in_place=True)


@pytest.mark.parametrize("name", ["causal_attention", "rat"])
def test_rows_that_grow_are_not_written_over(name: str, folder: Path) -> None:
    module, unit = built(name, folder)
    assert "in_place" not in signature(getattr(module, unit.name).step).parameters


# -- one kernel --------------------------------------------------------------------------------------------------------


def units(name: str) -> tuple[Unit, Lines]:
    source = SourceFile(f"{name}.spec", MANY if name == "many" else cases.OPS[name])
    return compile_source(source).units[0], Lines(source)


def test_functions_of_one_kernel_are_functions_of_kernels() -> None:
    assert set(FUNCTIONS) >= {*ELEMENTWISE, "stop"}


def test_ops_of_one_kernel() -> None:
    """What reads over both sides, has more states, or is no matrix scan, is not."""
    found = {name for name in [*cases.OPS, "many"] if token_form(units(name)[0], "") is not None}
    assert found >= {*ONE_KERNEL, "many"}
    assert not found & {"vector", "two_vectors", "max_plus", "delta", "both_sides", "unread"}


@pytest.mark.parametrize("name", [*ONE_KERNEL, "many"])
def test_the_kernel_holds_its_rules(name: str, folder: Path) -> None:
    unit, lines = units(name)
    token = token_form(unit, "")
    assert token is not None
    kernel, w = call_kernel(token, lines), Writer()
    verify_kernel(kernel)
    kernel.print(w)
    assert parse_kernels(w.text()) == {kernel.name: kernel}
    module, _ = built(name, folder)
    made = getattr(importlib.import_module(f"{module.__name__}._kernels"), kernel.name)
    blocks = {"BI": 128, "BJ": 128, f"B{token.own.upper()}": 32}
    numbers = dict.fromkeys(kernel.sizes, 0.5)
    assert usage(compile_kernel(made, "sm_90", 4, **blocks, **numbers))["stack"] == 0


@pytest.mark.interpreter
@pytest.mark.parametrize("name", [*ONE_KERNEL, "many"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_interpreted_calls(name: str, dtype: torch.dtype, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch, and what float64 gives, in new tensors or in those given."""
    assert os.environ.get("TRITON_INTERPRET") == "1"
    module, unit = built(name, folder)
    sizes = {**SETTINGS, "d": 24}
    case = Case(sizes, [1, 1, 1], dtype=dtype)
    inputs, _ = draw(unit, case)
    shaped = {n: x[:, None] for n, x in inputs.items()}
    (shape,) = state_shapes(unit, case).values()
    state = torch.randn(3, *shape)
    op, keywords = getattr(module, unit.name), {n: v for n, v in own(unit).items() if n == "scale"}

    def run(given: dict[str, Tensor], start: Tensor, **more: bool) -> list[Tensor]:
        return [*op(**given, **keywords, initial_state=start, output_final_state=True, **more)]

    wanted = run({n: x.double() for n, x in shaped.items()}, state.double())
    kernels = importlib.import_module(f"{module.__name__}._kernels")
    monkeypatch.setattr(kernels, "S_scan", None)  # it would not be one launch
    found, held = run(shaped, state), state.clone()
    again = run(shaped, held, in_place=True)
    assert again[-1] is held
    same(found, again)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)
