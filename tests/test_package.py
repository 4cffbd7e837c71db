"""The emitted package as a Python module: names, several units, determinism, pickling, errors before any kernel."""

from __future__ import annotations

import copy
import os
import pickle
from pathlib import Path

import cases
import pytest
import torch
from emitted import Case, emit, errors
from shipped import TEXTS

from chunkc.backends.package import emit_files
from chunkc.driver import compile_source
from chunkc.ir.diagnostics import SourceFile

SPECS = Path(__file__).resolve().parent.parent / "specs"
SIZES = {"heads": 2, "dk": 8, "dv": 8}

CLASH = """op clash(heads: int, F: int, torch: int) {
  axes { t: time, h = heads, device = F, seq = torch }
  input C[t, h, device], H[t, h, device], rows[t, h, seq], check[t, h, device] in [-inf, 0], lambda[t, h, seq]
  recurrence over t {
    state S[h, device, seq], I[h, device]
    S = exp(check) * S + H * rows
    I = exp(check) * I + H
    tile = sum[device](C * S) + lambda
    x = sum[device](C * I)
  }
  output tile, x
}
"""


@pytest.mark.parametrize("path", ["torch", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_names_of_the_emitted_module_may_be_used(tmp_path: Path, path: str) -> None:
    assert (os.environ.get("TRITON_INTERPRET", "0") == "1") == (path == "triton")
    module, _, _ = emit(CLASH, tmp_path, "clash.spec")
    torch.manual_seed(0)
    c, h, g = torch.randn(3, 1, 40, 2, 8).unbind()
    rows, extra = torch.randn(2, 1, 40, 2, 4).unbind()
    tile, x, _ = module.clash(C=c, H=h, rows=rows, check_=-g.abs(), lambda_=extra)
    state, weights = torch.zeros(2, 8, 4), torch.zeros(2, 8)
    for t in range(40):
        decay = torch.exp(-g[0, t].abs())
        state = decay[..., None] * state + h[0, t][..., None] * rows[0, t][:, None]
        weights = decay * weights + h[0, t]
    torch.testing.assert_close(tile[0, 39], (c[0, 39][..., None] * state).sum(1) + extra[0, 39], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x[0, 39], (c[0, 39] * weights).sum(-1), rtol=1e-4, atol=1e-4)


def test_units_of_one_file_keep_their_own_scans(tmp_path: Path) -> None:
    module, units, _ = emit(cases.OPS["gated"] + cases.OPS["value_gate"], tmp_path, "two.spec")
    for unit in units:
        found = errors(module, unit, Case({**SIZES, "scale": 0.5}, [70], values={"g": cases.mild, "f": cases.mild}))
        assert max(found.values()) <= 1, found


@pytest.mark.parametrize("path", sorted(SPECS.glob("*.spec")), ids=lambda p: p.stem)
def test_building_twice_gives_the_same_bytes(path: Path) -> None:
    source = SourceFile.read(path, path.name)
    first, second = (emit_files(source, compile_source(source).units, {}) for _ in range(2))
    assert first == second
    assert not any("chunkc." in text.replace("Made by chunkc", "") for text in first.values())


def test_layers_copy_and_pickle(tmp_path: Path) -> None:
    module, _, _ = emit((SPECS / "gated_linear_attention.spec").read_text(), tmp_path, "layer.spec")
    layer = module.GatedLinearAttention(d_model=32, heads=2)
    x = torch.randn(1, 20, 32)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))


def test_wrong_calls_raise_one_clear_error(tmp_path: Path) -> None:
    module, _, _ = emit(cases.OPS["gated"], tmp_path, "gated.spec")
    good = {n: torch.randn(2, 10, 2, 8) for n in ("q", "k", "v")} | {"g": -torch.rand(2, 10, 2, 8)}
    module.gated(**good)
    for change, wanted in (
        ({"k": torch.randn(2, 10, 2, 9)}, "'k' has shape"),
        ({"v": torch.randn(2, 11, 2, 8)}, "'v' has shape"),
        ({"q": torch.randn(2, 10, 2, 8).long()}, "floating"),
        ({"q": [1.0]}, "not a tensor"),
        ({"cu_seqlens": torch.tensor([0, 10])}, "one row"),
        ({"initial_state": torch.randn(2, 2, 8, 7)}, "initial state"),
        ({"heads": 3}, "has shape"),
        ({"g": torch.rand(2, 10, 2, 8), "check": True}, "declared range"),
        ({"k": torch.full((2, 10, 2, 8), float("nan")), "check": True}, "not finite"),
    ):
        with pytest.raises((ValueError, TypeError), match=wanted):
            module.gated(**{**good, **change})


def test_a_second_derivative_is_refused(tmp_path: Path) -> None:
    """Elementwise scans say so, instead of giving one that lacks terms."""
    module, _, _ = emit(cases.OPS["vector"], tmp_path)
    z, u = torch.rand(1, 5, 2, 3, requires_grad=True), torch.randn(1, 5, 2, 3, requires_grad=True)
    out, _ = module.vector(z, u)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(out.square().sum(), z, create_graph=True)


@pytest.mark.parametrize("name, product", [("gated_linear_attention", "q"), ("hgrn", "u")])
def test_what_scans_alone_read_is_as_it_is_stored(name: str, product: str) -> None:
    """No copy in float32 of a product that kernels load, also where they make an operand of it."""
    source = SourceFile(f"{name}.spec", TEXTS[name])
    text = emit_files(source, compile_source(source).units, {})["__init__.py"]
    (line,) = (x for x in text.splitlines() if f"linear(x, self.{product}.weight" in x)
    assert ", given)" in line
