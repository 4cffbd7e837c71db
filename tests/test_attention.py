"""Emitted attentions against the interpreter and against dense readings written by hand."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import attentions
import pytest
import torch
from emitted import Case, draw, emit, errors
from shipped import ATTENTIONS, SPECS
from torch import Tensor

import chunkc
from chunkc.driver import check_path, check_source, compile_source
from chunkc.interp import Interpreter, Run
from chunkc.ir import nodes as N
from chunkc.ir.diagnostics import CompileError, SourceFile
from chunkc.ir.graph import Unit
from chunkc.picture import masks

SIZES = {"heads": 4, "dk": 6, "dv": 5}
AHEAD = {"full", "around", "prefix", "set", "no_row_seen"}
Values = dict[str, Callable[[Any], Tensor]]
VALUES: Values = {
    "doc": lambda shape: torch.randint(0, 3, shape).sort(-1)[0],
    "x": lambda shape: torch.randint(0, 8, shape),
    "pre": lambda shape: torch.rand(shape) < 0.3,
    "f": lambda shape: torch.rand(shape) < 0.7,
}
each_op = pytest.mark.parametrize("name", attentions.OPS)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("attentions")

    @cache
    def get(name: str, tile: int) -> tuple[ModuleType, Unit]:
        module, (unit,), _ = emit(attentions.OPS[name], folder, "attends.spec")
        inner = sys.modules[f"{module.__name__}._attend"]
        inner.QUERIES = inner.ROWS = tile  # type: ignore[attr-defined]
        return module, unit

    return get


@each_op
@pytest.mark.parametrize("tile", [8, 256])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_against_the_interpreter(built: Any, name: str, tile: int, dtype: torch.dtype) -> None:
    module, unit = built(name, tile)
    for lengths, packed in (([1], False), ([41, 41], False), ([3, 0, 1, 50], True)):
        found = errors(module, unit, Case(SIZES, lengths, packed=packed, dtype=dtype, values=VALUES))
        assert max(found.values()) <= 1, (lengths, {k: v for k, v in found.items() if v > 1})


def test_a_mask_that_is_no_comparison_leaves_tiles_out(built: Any) -> None:
    """Of tiles on and below the diagonal those alone are scored in which some pair is seen."""
    module, unit = built("diagonals", 8)
    inputs, _ = draw(unit, Case(SIZES, [64]))
    torch_part = sys.modules[f"{module.__name__}._torch"]
    scores, calls = torch_part.y_scores, []
    torch_part.y_scores = lambda *given: calls.append(0) or scores(*given)
    module.attends(**{n: x[None] for n, x in inputs.items()}, **SIZES)
    torch_part.y_scores = scores
    seen = sum(any((t - s) // 8 % 4 == 0 for t in range(8 * a, 8 * a + 8) for s in range(8 * b, 8 * b + 8) if s <= t)
               for a in range(8) for b in range(8))  # fmt: skip
    assert len(calls) == seen < 36


@each_op
def test_what_is_causal(built: Any, name: str) -> None:
    assert bool(built(name, 8)[1].looks_ahead) == (name in AHEAD)


def dense(q: Tensor, k: Tensor, v: Tensor, logit: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """Softmax attention of one sequence [T, h, ...], all at once."""
    scores = torch.einsum("thi,shi->hts", q, k) * q.shape[-1] ** -0.5 if logit is None else logit
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = torch.softmax(scores, -1).nan_to_num(0.0)
    return torch.einsum("hts,shj->thj", weights, v)


CAUSAL = torch.ones(50, 50, dtype=torch.bool).tril()
T = 40
AT, ROW = torch.arange(T)[:, None], torch.arange(T)[None]
HEADS = torch.arange(4.0, dtype=torch.float64)[:, None, None]
READINGS: dict[str, Callable[..., Tensor]] = {
    "causal": lambda q, k, v: dense(q, k, v, mask=ROW <= AT),
    "full": dense,
    "window": lambda q, k, v: dense(q, k, v, mask=(ROW <= AT) & ((AT - ROW < 9) | (ROW < 2))),
    "around": lambda q, k, v: dense(q, k, v, mask=(AT - ROW).abs() < 5),
    "documents": lambda q, k, v, doc: dense(q, k, v, mask=(ROW <= AT) & (doc[:, None] == doc[None])),
    "prefix": lambda q, k, v, pre: dense(q, k, v, mask=(ROW <= AT) | pre[None]),
    "nothing": lambda q, k, v: torch.zeros(T, 4, 5, dtype=torch.float64),
    "alibi": lambda q, k, v: dense(
        q, k, v, torch.einsum("thi,shi->hts", q, k) - (AT - ROW) * torch.exp(-HEADS), ROW <= AT),
    "softcap": lambda q, k, v: dense(q, k, v, 5 * torch.tanh(torch.einsum("thi,shi->hts", q, k) / 5), ROW <= AT),
    "l2": lambda q, k, v: dense(q, k, v, -torch.cdist(q.transpose(0, 1), k.transpose(0, 1)).square(), ROW <= AT),
    "shared": lambda q, k, v: dense(
        q, k[:, None].expand(-1, 4, -1), v[:, None].expand(-1, 4, -1), mask=ROW <= AT),
    "grouped": lambda q, k, v: dense(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), mask=ROW <= AT),
}  # fmt: skip


@pytest.mark.parametrize("name", READINGS)
def test_against_a_dense_reading(built: Any, name: str) -> None:
    module, unit = built(name, 8)
    inputs, _ = draw(unit, Case(SIZES, [T], dtype=torch.float64, values=VALUES))
    inputs = {n: x.requires_grad_(x.is_floating_point()) for n, x in inputs.items()}
    wanted = READINGS[name](**inputs)
    found = module.attends(**{n: x[None] for n, x in inputs.items()}, **SIZES)
    found = (found if isinstance(found, Tensor) else found[0])[0]
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    if name != "nothing":
        grad = torch.randn_like(wanted)
        leaves = [x for x in inputs.values() if x.requires_grad]
        for a, b in zip(torch.autograd.grad(found, leaves, grad), torch.autograd.grad(wanted, leaves, grad)):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_cross_attention(tmp_path: Path) -> None:
    module, _, _ = emit(attentions.CROSS, tmp_path, "attends.spec")
    q, k, v = torch.randn(2, 7, 4, 6), torch.randn(2, 30, 4, 6), torch.randn(2, 30, 4, 5)
    y = module.attends(q, k, v)
    for n in range(2):
        torch.testing.assert_close(y[n], dense(q[n], k[n], v[n]), rtol=1e-5, atol=1e-6)
    packed = module.attends(q.reshape(1, 14, 4, 6), k.reshape(1, 60, 4, 6), v.reshape(1, 60, 4, 5),
                            cu_seqlens=torch.tensor([0, 7, 14]), cu_seqlens_e=torch.tensor([0, 30, 60]))  # fmt: skip
    torch.testing.assert_close(packed.view_as(y), y, rtol=1e-6, atol=1e-6)


RESUMED = [n for n in attentions.OPS if n not in AHEAD | {"chunks", "summary", "runs"}]


@pytest.mark.parametrize("name", RESUMED)
def test_in_parts(built: Any, name: str) -> None:
    """Three calls are one, in gradients too."""
    module, unit = built(name, 8)
    inputs, weights = draw(unit, Case(SIZES, [41, 41], dtype=torch.float64, values=VALUES))
    inputs = {n: x.view(2, 41, *x.shape[1:]).requires_grad_(x.is_floating_point()) for n, x in inputs.items()}
    whole = module.attends(**inputs, **weights, **SIZES)[0]
    state, parts = None, []
    for low, high in ((0, 17), (17, 18), (18, 41)):
        cut = {n: x[:, low:high] for n, x in inputs.items()}
        y, state = module.attends(**cut, **weights, **SIZES, initial_state=state, output_final_state=True)
        parts.append(y)
    again, grad = torch.cat(parts, 1), torch.randn_like(whole)
    torch.testing.assert_close(again, whole, rtol=1e-10, atol=1e-12)
    leaves = [x for x in inputs.values() if x.requires_grad]
    for a, b in zip(*(torch.autograd.grad(y, leaves, grad, allow_unused=True) for y in (whole, again))):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_rows_that_are_only_counted_are_not_kept(tmp_path: Path) -> None:
    """A layer whose attention reads places alone does not go on from a state, which would not know of those before."""
    text = """layer Counts(d: int) {
  axes { t: time, s = t, i = d }
  input x[t, i]
  recurrence over t {
    state h[i]
    h = 0.5 * h + x
    o = h
  }
  attention y[t] over s { logit = s * 0.1
 value = s * 2
 mask = s <= t }
  output z[t, i] = y + o
}
"""
    module, _, _ = emit(text, tmp_path, "counts.spec")
    assert not hasattr(module.Counts, "step") and not hasattr(module.Counts, "init_state")


def test_packed_calls_go_on_from_different_lengths(built: Any) -> None:
    module, _ = built("window", 8)
    torch.manual_seed(0)
    before, after = [5, 0, 1, 34], [3, 4, 2, 3]
    first = [[torch.randn(1, n, 4, d, dtype=torch.float64) for d in (6, 6, 5)] for n in before]
    second = [[torch.randn(1, n, 4, d, dtype=torch.float64) for d in (6, 6, 5)] for n in after]

    def packed(parts: list[list[Tensor]]) -> tuple[list[Tensor], Tensor]:
        offsets = torch.tensor([0, *(p[0].shape[1] for p in parts)]).cumsum(0)
        return [torch.cat(xs, 1) for xs in zip(*parts)], offsets

    x, offsets = packed(first)
    _, state = module.attends(*x, **SIZES, cu_seqlens=offsets, output_final_state=True)
    x, offsets = packed(second)
    y, _ = module.attends(*x, **SIZES, cu_seqlens=offsets, initial_state=state)
    for n, (a, b) in enumerate(zip(first, second)):
        whole = module.attends(*(torch.cat(ab, 1) for ab in zip(a, b)), **SIZES)[0]
        torch.testing.assert_close(y[0, offsets[n] : offsets[n + 1]], whole[0, before[n] :])


@pytest.mark.parametrize("name", [n for n in attentions.OPS if n not in ("emitted_names", "log_distance")])
def test_gradients_are_those_of_the_scores(name: str) -> None:
    """A source's graph of gradients is the derivative of its graph of scores."""
    unit = compile_source(SourceFile("attends.spec", attentions.OPS[name])).units[0]
    (node,) = unit.graph.of_kind(N.Attend)
    for source in node.sources:
        assert source.scores is not None and source.gradients is not None
        run = Run(SIZES, {}, {"t": 7, "n": 7})
        shape = Interpreter(unit.graph, run)
        shape.chunks = {"c": []}
        size = {a.name: 7 if a.is_sequence else shape.size(a.name) for a in unit.graph.axes}
        torch.manual_seed(0)
        inputs: dict[str, Tensor] = {}
        for n in source.gradients.of_kind(N.Input):
            x = torch.randn([size[a] for a in n.axes], dtype=torch.float64)
            inputs[n.name] = {"float": x, "int": x.abs().long(), "bool": x > 0}[n.dtype]
        lengths = {a.space: 7 for a in unit.graph.axes if a.is_sequence}
        leaves = {n: x.requires_grad_() for n, x in inputs.items() if x.is_floating_point() and n[:2] != "d_"}
        if not leaves:
            assert not source.gradients.outputs
            continue
        forward = Interpreter(source.scores, Run(SIZES, inputs, lengths))
        total = torch.zeros((), dtype=torch.float64)
        for what in ("logit", "value"):
            found = dict(source.scores.outputs).get(what)
            if found is not None:
                given = source.gradients[f"d_{what}"]
                y = forward.value(found)
                total = total + (forward.aligned(found, given.axes) * inputs[f"d_{what}"]).sum() + 0 * y.sum()
        wanted = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        backward = Interpreter(source.gradients, Run(SIZES, inputs, lengths))
        have = {name: backward.value(id_) for name, id_ in source.gradients.outputs}
        for n, w in zip(leaves, wanted):
            if w is not None and f"d_{n}" in have:
                torch.testing.assert_close(have[f"d_{n}"], w, rtol=1e-9, atol=1e-10)
            else:
                assert w is None or float(w.abs().sum()) == 0, n


LONG = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from window import window
torch.set_num_threads(2)
q, k, v = (torch.randn(1, 16384, 4, 64, requires_grad=True) for _ in range(3))
y, _ = window(q, k, v, window=int(sys.argv[2]))
y.sum().backward()
import resource
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
WINDOW = """causal op window(heads: int, dk: int, dv: int, window: int) {
  axes { t: time, s = t, h = heads, i = dk, j = dv }
  input q[t, h, i], k[s, h, i], v[s, h, j]
  attention y[t, h, j] over s {
    logit = dot[i](q, k) * size(i)^-0.5
    value = v
    mask = s <= t and t - s < window
  }
  output y
}
"""


def test_long_sequences_need_little_memory(tmp_path: Path) -> None:
    """Causal attention of 16384 tokens, forward and backward, in less than 1 GiB beside what importing torch takes."""
    (tmp_path / "window.spec").write_text(WINDOW)
    chunkc.build(tmp_path / "window.spec", tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", LONG, str(tmp_path), "16384"], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) * 1024 < 2**30


def test_tiles_that_no_query_sees_are_left_out(tmp_path: Path) -> None:
    """The work of a window grows with the tokens, not with their square."""
    module, _, _ = emit(WINDOW, tmp_path, "window.spec")
    inner = sys.modules[f"{module.__name__}._attend"]
    counted: list[int] = []
    tiles = inner.Attention.tiles  # type: ignore[attr-defined]

    def counting(*args: Any) -> Any:
        for tile in tiles(*args):
            counted.append(1)
            yield tile

    inner.Attention.tiles = counting  # type: ignore[attr-defined]
    counts = []
    for length in (8192, 16384):
        counted.clear()
        x = torch.randn(1, length, 1, 4)
        module.window(x, x, x, window=100)
        counts.append(len(counted))
    assert counts[1] <= 2.1 * counts[0] and counts[0] < 2 * 8192 / 256


def test_a_row_alone_has_weight_1_and_no_gradient(built: Any) -> None:
    module, _ = built("causal", 8)
    q, k, v = (torch.randn(1, 1, 4, d, requires_grad=True) for d in (6, 6, 5))
    y = module.attends(q, k, v, **SIZES)[0]
    assert torch.equal(y, v)
    d_q, d_k, _ = torch.autograd.grad(y.square().sum(), (q, k, v))
    assert not d_q.any() and not d_k.any()


PROVEN = ["s <= t", "s < t + 1", "s < t + 0.5", "t - s >= 0", "0 >= s - t", "s == t", "not t < s", "s <= t - h",
          "s + h <= t", "s <= t - x", "s <= t - sigmoid(a)", "s <= t - max(w, 0)", "s <= min(t, 7)", "max(s, 3) <= t",
          "s < first(c(t))", "c(s) < c(t)", "c(s) <= c(t) - 1", "s <= t and (a > 0 or s > 3)",
          "s < t and w < 3 or s == t", "not (s > t or a > 0)"]  # fmt: skip
UNPROVEN = ["s <= h", "s + t <= t + h", "s <= t + t - h", "s <= t + w", "s <= t - w", "c(s) <= c(t)", "s <= last(c(t))",
            "s < t + 1.5", "s <= t + tanh(a)", "s <= max(t, 7)", "s != t", "s <= t or w < 3", "s <= t + 3",
            "not (s > t and s > 3)", "s % 5 <= t", "h * s <= t", "true"]  # fmt: skip


@pytest.mark.parametrize("mask", [*PROVEN, *UNPROVEN])
def test_what_a_mask_proves(mask: str) -> None:
    """What is taken for causal never sees a later row, whatever the parameter."""
    before = "input a[t], x[t] in [0, 1]\n  chunk c of t = fixed(5)"
    text = attentions.masked(mask, before).replace("dv: int)", "dv: int, w: int = 1)")
    unit = check_source(SourceFile("attends.spec", text)).module.units[0]
    assert (not unit.looks_ahead) == (mask in PROVEN)
    if mask in PROVEN:
        for w in (-4, 0, 2):
            for picture in masks(unit, 17, {**SIZES, "w": w}):
                assert not picture.seen.triu(1).any(), (mask, w)


def test_a_chunk_that_goes_on_is_not_over() -> None:
    """Whether a chunk is the last so far depends on later tokens being there."""
    for mask, causal in (("c < c(t)", True), ("last(c) < t", True), ("last(c) <= t", False), ("first(c) <= t", False)):
        text = attentions.OPS["chunks"].replace("c < c(t)", mask)
        assert (not check_source(SourceFile("attends.spec", text)).module.units[0].looks_ahead) == causal, mask


def test_large_logits_keep_their_digits(built: Any) -> None:
    module, _ = built("row_logit", 256)
    logits = torch.randint(9000, 9004, (1, 50, 4)).float() + torch.arange(4).view(1, 1, 4)
    seen, v = torch.ones(1, 50, dtype=torch.bool), torch.randn(1, 50, 4, 5)
    q = torch.zeros(1, 50, 4, 6)
    given = [logits.requires_grad_(), v.requires_grad_()]
    y = module.attends(q, q, v, logits, seen, **SIZES)[0]
    exact = [x.detach().double().requires_grad_() for x in given]
    wanted = dense(
        q[0].double(), q[0].double(), exact[1][0], exact[0][0].T[:, None].expand(4, 50, 50), seen[0] & CAUSAL
    )
    grad = torch.randn_like(y)
    for a, b in zip(torch.autograd.grad(y, given, grad), torch.autograd.grad(wanted, exact, grad[0].double())):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_the_reason_names_the_mask() -> None:
    text = attentions.OPS["around"].replace("op attends", "causal op attends")
    with pytest.raises(CompileError) as caught:
        check_source(SourceFile("attends.spec", text))
    assert "its mask does not say s <= t" in str(caught.value.diagnostics[0])


LAYERS: dict[str, dict[str, Any]] = {
    "causal_attention": {"kv": 2}, "sliding_window": {"window": 9, "sink": 3}, "alibi": {}, "softcap": {"cap": 5.0},
    "document_attention": {}, "prefix_lm": {}, "longformer": {"window": 6, "dilation": 3, "dilated": 2},
    "bigbird": {"block": 8},
    "cross_attention": {}, "set_transformer": {"seeds": 3}, "rat": {"shared": 2, "length": 4}, "hybrid": {"window": 9},
    "language_model": {"vocab": 11, "window": 9}, "parallel_hybrid": {"window": 9},
}  # fmt: skip
STACKS = ("hybrid", "language_model", "parallel_hybrid")  # in half precision, roundings of many layers add up
TOKENS: Values = {**VALUES, "prefix": VALUES["pre"], "far": VALUES["pre"]}


def shipped(name: str) -> tuple[ModuleType, Unit, dict[str, Any], Values]:
    """A shipped spec: its module, its last unit, small sizes, and values for its inputs."""
    path = SPECS / f"{name}.spec"
    values = {**TOKENS, **({"x": lambda shape: torch.randint(0, 11, shape)} if name == "language_model" else {})}
    if name != "language_model":
        values.pop("x")
    unit = check_path(path).module.units[-1]
    return chunkc.load(path), unit, {"d_model": 32, "heads": 4, **LAYERS[name]}, values


def test_each_spec_that_attends_is_tested() -> None:
    assert sorted(LAYERS) == ATTENTIONS


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_layers(name: str, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and name in STACKS:
        return
    module, unit, sizes, values = shipped(name)
    for lengths, packed in (([41, 41], False), ([3, 0, 1, 50], True)):
        if name != "cross_attention" or not packed:
            found = errors(module, unit, Case(sizes, lengths, packed=packed, dtype=dtype, values=values))
            assert max(found.values()) <= (4 if dtype == torch.bfloat16 else 1), (lengths, found)


@pytest.mark.parametrize("name", LAYERS)
def test_a_token_at_a_time(name: str) -> None:
    """A layer that is causal has a step, which gives what the whole gives; one that is not has none."""
    module, unit, sizes, values = shipped(name)
    torch.manual_seed(0)
    layer = getattr(module, unit.name)(**sizes, dtype=torch.float64)
    assert hasattr(layer, "step") == (not unit.looks_ahead)
    if unit.looks_ahead:
        return
    inputs, _ = draw(unit, Case(sizes, [23, 23], dtype=torch.float64, values=values))
    inputs = {n: x.view(2, 23, *x.shape[1:]) for n, x in inputs.items()}
    whole, state, rows = layer(**inputs), layer.init_state(2, torch.float64), []
    for t in range(23):
        y, state = layer.step(*(x[:, t] for x in inputs.values()), state)
        rows.append(y)
    torch.testing.assert_close(torch.stack(rows, 1), whole, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", LAYERS)
def test_what_is_called_causal_is(name: str) -> None:
    """Later tokens change nothing before them."""
    module, unit, sizes, values = shipped(name)
    if unit.looks_ahead:
        return
    layer = getattr(module, unit.name)(**sizes, dtype=torch.float64)
    inputs, _ = draw(unit, Case(sizes, [40], dtype=torch.float64, values=values))
    other, _ = draw(unit, Case(sizes, [40], dtype=torch.float64, values=values, seed=1))
    for cut in (1, 13, 32):
        mixed = {n: torch.cat([x[:cut], other[n][cut:]])[None] for n, x in inputs.items()}
        whole = layer(**{n: x[None] for n, x in inputs.items()})
        assert torch.equal(layer(**mixed)[:, :cut], whole[:, :cut])
