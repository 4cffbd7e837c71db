"""Emitted PyTorch, and emitted Triton in its interpreter, against a float64 loop over tokens."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import cases
import pytest
import torch
from emitted import Case, differs_when_cut, emit, errors
from shipped import RECURRENCES

from chunkc.ir.graph import Unit

SETTINGS = {
    "d_model": 32, "heads": 2, "low": 3, "d_in": 5, "expand": 2, "head": 8, "kv": 2, "states": 6, "width": 4,
    "wide": 4, "dk": 24, "dv": 40, "scale": 0.3,
}  # fmt: skip
PACKED = [70, 0, 1, 130, 64]
_built: dict[str, tuple[ModuleType, Unit]] = {}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("emitted")

    def get(name: str) -> tuple[ModuleType, Unit]:
        if name not in _built:
            text = cases.OPS[name] if name in cases.OPS else RECURRENCES[name]
            module, semantic, _ = emit(text, folder, f"{name}.spec")
            _built[name] = (module, semantic[0])
        return _built[name]

    return get


def gates(unit: Unit, make: Any) -> dict[str, Any]:
    """The stress values for a unit's gates: logarithms by `make`, raw decays with exact zeros."""
    values: dict[str, Any] = {}
    if unit.kind == "op" and unit.name != "max_plus":
        values = {name: make for name in unit.inputs if name in cases.LOG_GATES}
        values |= {name: cases.with_zeros for name in unit.inputs if name in cases.RAW_GATES}
    return values


def allowed(name: str, dtype: torch.dtype) -> float:
    """How many tolerances a case may use: one for an op.

    A whole layer in half precision also rounds at each of its library products, and the stabilised matrix memory
    divides by a read of either sign, which magnifies whatever error there is where that read is near 0."""
    if name in cases.OPS:
        return 1.0
    half = 4.0 if dtype in (torch.bfloat16, torch.float16) else 1.0
    return half * (4.0 if name == "mlstm" else 1.0)


def check(found: dict[str, float], most: float = 1.0) -> None:
    assert max(found.values()) <= most, {k: v for k, v in found.items() if v > most}


SHIPPED = sorted(RECURRENCES)
ALL = [*SHIPPED, *cases.OPS]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_packed_and_resumed(built: Any, name: str, dtype: torch.dtype) -> None:
    module, unit = built(name)
    case = Case(SETTINGS, PACKED, packed=True, dtype=dtype, resume=True, values=gates(unit, cases.mixed))
    check(errors(module, unit, case), allowed(name, dtype))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("length", [1, 17, 65])
def test_dense(built: Any, name: str, length: int) -> None:
    module, unit = built(name)
    found = errors(module, unit, Case(SETTINGS, [length, length], values=gates(unit, cases.mild)))
    if length == 1 and unit.kind == "layer":
        # one token read through a norm or a quotient does not depend on the query's size: that gradient is rounding
        found = {k: v for k, v in found.items() if not k.startswith("grad")}
    check(found, allowed(name, torch.float32))


@pytest.mark.parametrize("name", [n for n in cases.OPS if n not in ("delta",)])
@pytest.mark.parametrize("make", [cases.mixed, cases.strong, cases.mild])
def test_float16_and_gates(built: Any, name: str, make: Any) -> None:
    module, unit = built(name)
    settings = {**SETTINGS, "heads": 3, "dk": 96, "dv": 24}
    for dtype in (torch.float16, torch.float32):
        check(errors(module, unit, Case(settings, [100], dtype=dtype, values=gates(unit, make))))


@pytest.mark.parametrize("name", ["gated", "raw_product", "vector", "constant"])
def test_long(built: Any, name: str) -> None:
    module, unit = built(name)
    settings = {**SETTINGS, "heads": 3, "dk": 8, "dv": 8}
    check(errors(module, unit, Case(settings, [4097], values=gates(unit, cases.mixed))))


def test_a_gate_near_0_keeps_its_digits(built: Any) -> None:
    """1 - a with a near 1 is subtracted once: q * (1 - a) as q - q * a would lose what is left."""
    module, unit = built("interpolated")
    values = {"a": lambda shape: 1 - torch.rand(shape) * 1e-3}
    check(errors(module, unit, Case(SETTINGS, [70], resume=True, values=values)), 0.1)


@pytest.mark.parametrize("decay", [0.9, 0.99, 0.999, 0.9999])
@pytest.mark.parametrize("name", ["vector", "raw_key"])
def test_equal_decays_near_1(built: Any, name: str, decay: float) -> None:
    """A tile's product of equal decays must not err alike in each tile."""
    module, unit = built(name)
    values = {n: lambda shape: torch.full(shape, decay) for n in ("z", "f", "a") if n in unit.inputs}
    assert values
    check(errors(module, unit, Case({**SETTINGS, "dk": 8, "dv": 8}, [4097], values=values)), 0.5)


NUMBERS = """causal op numbers(dk: int, n: int = 3, c: float = 0.5, flag: bool = true) {
  axes { t: time, i = dk, j = 4 }
  input k[t, i], v[t, j]
  recurrence over t {
    state S[i, j] = i - n, z[i] = c, y[j] = j
    S = exp(-(i + n) - 1) * where(flag, 1, 0.5) * S + k * v
    z = where(not flag, 0.9, 0.5) * z + n * k
    y = exp(-c * n - 1 - 2) * y + v * n
    o = sum[i](k * S * n)
    p = sum[i](z * c)
  }
  output o, p, y, q = where(n > 2 and flag, k, 1) * exp(-(n + i)), r = k * sigmoid(n) * max(n, 2) * floor(c * 3)
}
"""


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("flag", [True, False])
def test_numbers_and_coordinates(tmp_path: Path, dtype: torch.dtype, flag: bool) -> None:
    """What is made of parameters, constants and coordinates alone stands wherever a tensor may."""
    module, units, _ = emit(NUMBERS, tmp_path)
    settings = {"dk": 5, "n": 3, "c": 0.25, "flag": flag}
    check(errors(module, units[0], Case(settings, [70, 70], dtype=dtype)))


def test_a_read_that_cancels(tmp_path: Path) -> None:
    text = cases.OPS["no_gate"].replace("sum[i](q * S)", "sum[i]((q * v - v * q) * S) + v")
    module, units, _ = emit(text, tmp_path)
    check(errors(module, units[0], Case({"heads": 2, "dk": 3, "dv": 4}, [66], resume=True)))


def test_states_are_as_declared(built: Any) -> None:
    """Their order is the spec's, also where they run in another one, and those that nothing reads are there too."""
    assert built("stabilised")[0].stabilised_state._fields == ("C", "n", "m")
    assert built("unread")[0].unread_state._fields == ("z", "S", "M", "L")


EDGES = [("raw_key", cases.vanishing), ("raw_product", cases.vanishing), ("raw_and_log", cases.vanishing),
         ("gated", cases.closing), ("value_gate", cases.closing), ("product_gate", cases.closing),
         ("scalar_gate", cases.closing)]  # fmt: skip


def at_edges(built: Any, name: str, make: Any, device: str = "cpu") -> dict[str, float]:
    """Gates at the ends of their range: the errors of a packed batch."""
    module, unit = built(name)
    own = {n: make for n in unit.inputs if n in (cases.RAW_GATES if make is cases.vanishing else cases.LOG_GATES)}
    values = {**gates(unit, cases.mixed), **own}
    settings = {**SETTINGS, "heads": 3}
    case = Case(settings, [70, 3, 0, 1], packed=True, resume=True, values=values, device=device)
    return errors(module, unit, case)


@pytest.mark.parametrize("name, make", EDGES)
def test_gates_at_the_ends_of_their_range(built: Any, name: str, make: Any) -> None:
    check(at_edges(built, name, make))


@pytest.mark.interpreter
@pytest.mark.parametrize("name, make", EDGES)
def test_interpreted_gates_at_the_ends_of_their_range(built: Any, name: str, make: Any) -> None:
    check(at_edges(built, name, make))


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ALL)
def test_interpreted_kernels(built: Any, name: str) -> None:
    assert os.environ.get("TRITON_INTERPRET") == "1"
    module, unit = built(name)
    case = Case(SETTINGS, [70, 0, 1], packed=True, resume=True, values=gates(unit, cases.mixed))
    check(errors(module, unit, case), allowed(name, torch.float32))


STATELESS = ["gated", "raw_product", "two_states", "gated_linear_attention"]


def without_a_state(built: Any, name: str, device: str = "cpu") -> dict[str, float]:
    """A packed batch that is given no state and asked for none."""
    module, unit = built(name)
    case = Case(SETTINGS, [70, 0, 1], packed=True, keeps=False, values=gates(unit, cases.mixed), device=device)
    return errors(module, unit, case)


@pytest.mark.parametrize("name", STATELESS)
def test_without_a_state(built: Any, name: str) -> None:
    check(without_a_state(built, name))


@pytest.mark.interpreter
@pytest.mark.parametrize("name", STATELESS)
def test_interpreted_without_a_state(built: Any, name: str) -> None:
    check(without_a_state(built, name))


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["vector", "max_plus", "mingru", "linear_attention"])
@pytest.mark.parametrize("lengths, packed", [([150, 0, 1, 96], True), ([150, 150], False)], ids=["packed", "dense"])
def test_interpreted_segments(
    built: Any, monkeypatch: pytest.MonkeyPatch, name: str, lengths: list[int], packed: bool
) -> None:
    """Sequences of few channels are cut into segments; here of 48 tokens, which are no whole tiles."""
    module, unit = built(name)
    monkeypatch.setattr(importlib.import_module(f"{module.__name__}._kernels"), "SEGMENT", 48)
    case = Case(SETTINGS, lengths, packed=packed, resume=True, values=gates(unit, cases.mixed))
    check(errors(module, unit, case), allowed(name, torch.float32))


class Counted:
    """How often a kernel is launched."""

    calls = 0

    def of(self, kernel: Any) -> Counted:
        self.kernel = kernel
        return self

    def __getitem__(self, grid: Any) -> Any:
        self.calls += 1
        return self.kernel[grid]


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["gated", "scalar_gate", "product_gate", "raw_product", "no_gate", "rwkv6"])
@pytest.mark.parametrize("lengths, packed", [([130, 0, 1, 64], True), ([130], False)], ids=["packed", "dense"])
def test_interpreted_walks_over_segments(
    built: Any, monkeypatch: pytest.MonkeyPatch, name: str, lengths: list[int], packed: bool
) -> None:
    """Sequences of few heads are cut into segments; here of one tile each."""
    module, unit = built(name)
    kernels, completed = importlib.import_module(f"{module.__name__}._kernels"), Counted()
    monkeypatch.setattr(kernels, "CUT", 64)
    monkeypatch.setattr(kernels, "completed", completed.of(kernels.completed))
    case = Case(SETTINGS, lengths, packed=packed, resume=True, values=gates(unit, cases.mixed))
    check(errors(module, unit, case), allowed(name, torch.float32))
    assert completed.calls >= 2  # forward and backward


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["gated", "scalar_gate"])
def test_interpreted_walks_over_segments_begin_alike(built: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A sequence of one segment, of two and of three."""
    module, unit = built(name)
    monkeypatch.setattr(importlib.import_module(f"{module.__name__}._kernels"), "CUT", 64)
    case = Case(SETTINGS, [150], values=gates(unit, cases.mixed))
    assert not differs_when_cut(module, unit, case, (20, 64, 65, 128, 140))


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["gated", "scalar_gate"])
def test_interpreted_gates_that_close_segments(built: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    module, _ = built(name)
    monkeypatch.setattr(importlib.import_module(f"{module.__name__}._kernels"), "CUT", 64)
    check(at_edges(built, name, cases.closing))


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["gated", "raw_product", "vector", "gated_linear_attention"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_interpreted_low_precision(built: Any, name: str, dtype: torch.dtype) -> None:
    assert os.environ.get("TRITON_INTERPRET") == "1"
    module, unit = built(name)
    case = Case(SETTINGS, [70], dtype=dtype, values=gates(unit, cases.mixed))
    check(errors(module, unit, case), allowed(name, dtype))


@pytest.mark.parametrize("name", SHIPPED)
def test_steps_equal_the_whole(built: Any, name: str) -> None:
    """step() a token at a time gives what forward() gives, from the same state, also off a tile's edge."""
    module, unit = built(name)
    own = {k: v for k, v in SETTINGS.items() if any(p.name == k for p in unit.params)}
    torch.manual_seed(0)
    layer = getattr(module, unit.name)(**own, dtype=torch.float64)
    width = own.get("d_in", own["d_model"])
    x = torch.randn(2, 80, width, dtype=torch.float64)
    whole = layer(x)
    first, state = layer(x[:, :67], state=layer.init_state(2, torch.float64))
    rows = [first]
    for t in range(67, 80):
        y, state = layer.step(x[:, t], state)
        rows.append(y[:, None])
    torch.testing.assert_close(torch.cat(rows, 1), whole, rtol=1e-10, atol=1e-12)
    assert state.position.tolist() == [80, 80]
