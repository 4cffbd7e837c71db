"""Each construct of the language, emitted, against the interpreter; and calls in parts against one call."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any

import constructs
import pytest
import torch
from emitted import Case, draw, emit, errors
from torch import Tensor

from chunkc.driver import check_path
from chunkc.ir.diagnostics import CompileError
from chunkc.ir.graph import Unit

RESUMED = ("within", "fns", "names", "s4")
WHOLE = {
    "reads": "it reads the sequence at computed positions",
    "overs": "a run is complete only when the next one begins",
    "chunky": "its chunks depend on the sequence's length",
}


@cache
def built(name: str) -> tuple[ModuleType, Unit]:
    module, units, _ = emit(constructs.SPECS[name], Path(tempfile.mkdtemp()), f"{name}.spec")
    return module, units[-1]


def settings(name: str, unit: Unit) -> dict[str, Any]:
    return {**{p.name: p.default for p in unit.params if p.default is not None}, **constructs.SETTINGS[name]}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", constructs.SPECS)
@pytest.mark.parametrize("lengths, packed", [([37], False), ([33, 33], False), ([1], False), ([0, 17, 1, 40], True)])
def test_constructs(name: str, lengths: list[int], packed: bool, dtype: torch.dtype) -> None:
    """Outputs, states and gradients."""
    if name == "fns" and dtype == torch.float32:
        pytest.skip("Newton's iteration on a matrix of rank 1 magnifies rounding without bound")
    module, unit = built(name)
    case = Case(settings(name, unit), lengths, packed=packed, dtype=dtype, values=constructs.VALUES)
    found = errors(module, unit, case)
    assert max(found.values()) <= 3, {k: v for k, v in found.items() if v > 1}


Call = Callable[[dict[str, Tensor], Any], tuple[list[Tensor], Any]]


def caller(name: str) -> tuple[Call, dict[str, Tensor], Any]:
    """A function of inputs and a state, inputs of two sequences of 37 tokens, and the layer if it is one."""
    module, unit = built(name)
    sizes = settings(name, unit)
    inputs, weights = draw(unit, Case(sizes, [74], dtype=torch.float64, values=constructs.VALUES))
    shaped = {n: x.reshape(2, 37, *x.shape[1:]) for n, x in inputs.items()}
    own = {p.name: sizes[p.name] for p in unit.params}
    if unit.kind == "layer":
        torch.manual_seed(0)
        layer = getattr(module, unit.name)(**own, dtype=torch.float64)

        def run_layer(given: dict[str, Tensor], state: Any) -> tuple[list[Tensor], Any]:
            *out, new = layer(*given.values(), layer.init_state(2, torch.float64) if state is None else state)
            return out, new

        return run_layer, shaped, layer

    def run_op(given: dict[str, Tensor], state: Any) -> tuple[list[Tensor], Any]:
        op = getattr(module, unit.name)
        *out, new = op(**given, **weights, **own, initial_state=state, output_final_state=True)
        return out, new

    return run_op, shaped, None


def parts(state: Any) -> Iterator[Tensor]:
    values = state if isinstance(state, tuple) else state.__dict__.values()
    yield from ([state] if isinstance(state, Tensor) else values)


@pytest.mark.parametrize("cuts", [(0, 5, 37), (0, 1, 2, 20, 20, 37), (0, 16, 32, 37)])
@pytest.mark.parametrize("name", RESUMED)
def test_calls_in_parts_are_one_call(name: str, cuts: tuple[int, ...]) -> None:
    run, inputs, _ = caller(name)
    with torch.no_grad():
        whole, last = run(inputs, None)
        state, pieces = None, []
        for a, b in zip(cuts, cuts[1:]):
            out, state = run({n: x[:, a:b] for n, x in inputs.items()}, state)
            pieces.append(out)
    for k, x in enumerate(whole):
        torch.testing.assert_close(torch.cat([p[k] for p in pieces], 1), x, rtol=1e-10, atol=1e-10)
    for a, b in zip(parts(state), parts(last)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", [n for n in RESUMED if n != "within"])
def test_steps_are_one_call(name: str) -> None:
    run, inputs, layer = caller(name)
    with torch.no_grad():
        whole, _ = run(inputs, None)
        state, steps = layer.init_state(2, torch.float64), []
        for t in range(37):
            *out, state = layer.step(*(x[:, t] for x in inputs.values()), state)
            steps.append(out)
    for k, x in enumerate(whole):
        torch.testing.assert_close(torch.stack([s[k] for s in steps], 1), x, rtol=1e-10, atol=1e-10)


def test_units_over_whole_sequences_say_so() -> None:
    module, unit = built("overs")
    inputs, _ = draw(unit, Case(settings("overs", unit), [5], values=constructs.VALUES))
    with pytest.raises(ValueError, match=WHOLE["overs"]):
        module.overs(**{n: x[None] for n, x in inputs.items()}, initial_state=(torch.zeros(1),) * 3)


TWO = """layer two(n: int) {
  axes { t: time, e: time, d = n }
  input x[t, d], y[e, d], at[t]: int
  m = mean[e](y)
  recurrence over e {
    state h[d] = 1
    h = sigmoid(y) * h + y
  }
  recurrence over t {
    state g[d]
    g = 0.5 * g + x * m
  }
  final = h[e = size(e) - 1]
  output o = g * final + y[e = at]
  output p = h[e = e - 1]
}
"""


def test_two_sequences(tmp_path: Path) -> None:
    module, _, _ = emit(TWO, tmp_path, "two.spec")
    layer = module.two(3)
    torch.manual_seed(0)
    x, y, at = torch.randn(2, 5, 3), torch.randn(2, 7, 3), torch.randint(-1, 9, (2, 5))
    o, p = layer(x, y, at)
    for b in range(2):
        h, g = torch.ones(3), torch.zeros(3)
        for k in range(7):
            torch.testing.assert_close(p[b, k], h)
            h = torch.sigmoid(y[b, k]) * h + y[b, k]
        for k in range(5):
            g = 0.5 * g + x[b, k] * y[b].mean(0)
            read = y[b, at[b, k]] if 0 <= at[b, k] < 7 else torch.zeros(3)
            torch.testing.assert_close(o[b, k], g * h + read)
    packed = layer(x.view(1, 10, 3), y.view(1, 14, 3), at.view(1, 10), cu_seqlens=torch.tensor([0, 5, 10]),
                   cu_seqlens_e=torch.tensor([0, 7, 14]), check=True)  # fmt: skip
    torch.testing.assert_close(packed[0].view(2, 5, 3), o)
    with pytest.raises(ValueError, match="all sequences or none"):
        layer(x[:1], y[:1], at[:1], cu_seqlens=torch.tensor([0, 5]))


# -- names and edges ---------------------------------------------------------------------------------------------------

NAMES = """layer A(NAME: float = 2, NAME_: float = 3, n: int = 2) {
  axes { t: time, d = n }
  input x[t, d]
  w[t, d] = linear(x)
  recurrence over t {
    state S[d]
    S = 0.5 * S + w * NAME * NAME_
  }
  output y = S
}
"""


@pytest.mark.parametrize("name", ["class", "math", "sizes", "modules", "call_impl", "Chunks", "index", "float"])
def test_names_that_python_or_torch_has(name: str, tmp_path: Path) -> None:
    """As a parameter, as an input of an op, as a weight: each by its own name, or with one underscore more."""
    taken = {"class"}
    shown = {n: n + "_" if name in taken else n for n in (name, name + "_")}
    module, _, _ = emit(NAMES.replace("NAME", name), tmp_path, "names.spec")
    layer, x = module.A(**{shown[name]: 5.0, shown[name + "_"]: 7.0}), torch.randn(1, 3, 2)
    for _ in range(2):  # the second call reads what the first one left
        y = layer(x)
        torch.testing.assert_close(y[:, 0], 35 * x[:, 0] @ layer.w.weight)
    op = NAMES.replace("layer A(NAME: float = 2, NAME_: float = 3, ", "op A(").replace("linear(x)", "x")
    op = op.replace("input x[t, d]", "input x[t, d], NAME[t], NAME_[t]").replace("NAME", name)
    module, _, _ = emit(op, tmp_path, "names.spec")
    y, _ = module.A(x, **{shown[name]: torch.full((1, 3), 5.0), shown[name + "_"]: torch.full((1, 3), 7.0)})
    torch.testing.assert_close(y[:, 0], 35 * x[:, 0])


def test_weights_named_as_what_a_module_has(tmp_path: Path) -> None:
    text = """layer A(n: int = 2) {
  axes { t: time, d = n }
  input x[t, d]
  half[t, d] = linear(x)
  half_[t, d] = linear(x)
  output y = half * half_
}
"""
    module, _, _ = emit(text, tmp_path, "weights.spec")
    layer, x = module.A(), torch.randn(1, 3, 2)
    assert sorted(layer.state_dict()) == ["half_.weight", "half__.weight"]
    torch.testing.assert_close(layer(x), x @ layer.half_.weight * (x @ layer.half__.weight))


CHUNKED = """op chunked(width: int) {
  axes { t: time, e = width }
  input g[t, e] in [0, 1], x[t, e], id[t]: int
  chunk c of t = RULE
  recurrence over t within c {
    state z[e]
    z = g * z + x
  }
  output z
}
"""


@pytest.mark.parametrize("rule", ["fixed(4)", "fixed(1)", "parts(3)", "runs(id)"])
@pytest.mark.parametrize("cuts", [None, [0, 5, 5, 12], [0, 12]], ids=["dense", "packed", "one"])
@pytest.mark.parametrize("tokens", [12, 8, 1])
def test_no_state_of_chunks_is_asked_for(rule: str, cuts: list[int] | None, tokens: int, tmp_path: Path) -> None:
    """Results are the same whether a state is asked for or not, and are those of a loop over tokens."""
    module, _, _ = emit(CHUNKED.replace("RULE", rule), tmp_path, "chunked.spec")
    torch.manual_seed(0)
    offsets = None if cuts is None else torch.tensor([min(c, tokens) for c in cuts])
    rows = 2 if cuts is None else 1
    g, x = torch.rand(2, rows, tokens, 3, dtype=torch.float64)
    ids = torch.arange(tokens).expand(rows, tokens) // 3
    calls = [module.chunked(g, x, ids, cu_seqlens=offsets, output_final_state=asked) for asked in (False, True)]
    assert calls[0][1] is None and calls[1][1] is not None
    assert torch.equal(calls[0][0], calls[1][0])
    if rule.startswith("fixed"):
        n, starts = int(rule[6:-1]), [0] if offsets is None else offsets.tolist()
        wanted, state = torch.empty_like(x), torch.zeros(rows, 3, dtype=torch.float64)
        for t in range(tokens):
            begin = max(s for s in starts if s <= t)
            state = g[:, t] * state * ((t - begin) % n > 0) + x[:, t]
            wanted[:, t] = state
        torch.testing.assert_close(calls[0][0], wanted)


def test_runs_of_no_tokens(tmp_path: Path) -> None:
    """A recurrence within chunks where there is none."""
    text = """causal op runs_(n: int) {
  axes { t: time, d = n }
  input x[t, d], id[t]: int
  chunk r of t = runs(id)
  recurrence over t within r {
    state s[d] = 1
    s = 0.9 * s + x
  }
  output s
}
"""
    module, _, _ = emit(text, tmp_path, "runs.spec")
    y, state = module.runs_(torch.zeros(2, 0, 3), torch.zeros(2, 0, dtype=torch.int64), output_final_state=True)
    assert y.shape == (2, 0, 3) and state.s.shape == (2, 3)


@pytest.mark.parametrize("step", ["S[t = t - 1]", "S[t = min(t, 3)]", "m[c = c(t) - 1]", "sum[t](S)"])
def test_steps_along_a_sequence_run_over_all_of_it(step: str, tmp_path: Path) -> None:
    """In a recurrence over a fixed axis: nothing is kept of the calls before."""
    text = f"""op A(n: int = 2) {{
  axes {{ t: time, d = n, p = 3 }}
  input x[t, d]
  chunk c of t = fixed(2)
  m = mean[t in c](x)
  recurrence over p {{
    state S[t, d] = x
    S = S + {step}
  }}
  output y = S[p = 2], z = x[t = t - 1]
}}
"""
    module, _, _ = emit(text, tmp_path)
    assert "initial_state" not in signature(module.A).parameters


def test_groups_that_do_not_divide_their_axis(tmp_path: Path) -> None:
    text = "op A(n: int) {\n axes { t: time, d = n, g = 3 groups d }\n input x[t, d]\n output y = sum[d in g](x)\n}\n"
    module, _, _ = emit(text, tmp_path)
    assert module.A(torch.zeros(1, 2, 6)).shape == (1, 2, 3)
    with pytest.raises(ValueError, match="divisible"):
        module.A(torch.zeros(1, 2, 4))


# -- other files -------------------------------------------------------------------------------------------------------

MIX = """fn gate[a](x) = sigmoid(inner[a](x))
fn inner[a](x) = x - mean[a](x)
causal layer Mixer(d_model: int, heads: int = 2, scale: float = 0.5) {
  axes { t: time, d = d_model, h = heads, i = d_model / heads, j = i }
  input x[t, d]
  q[t, h, i] = linear(x)
  k[t, h, i] = linear(x)
  v[t, h, j] = linear(x)
  recurrence over t {
    state S[h, i, j]
    S = 0.9 * S + k * v
    o = sum[i](q * S) * scale
  }
  output y[t, d] = linear(o)
}
causal op smooth() {
  axes { t: time, d = 4 }
  input x[t, d], f[t] in [0, 1]
  recurrence over t {
    state h[d]
    h = f * h + x
  }
  output h
}
"""
STACK = """use "lib/mix.spec"
causal layer Block(d_model: int) {
  axes { t: time, d = d_model, e = 2 * d_model }
  input x[t, d]
  b = Mixer(rms_norm[d](x), heads = 3)
  y1 = x + b
  up[t, e] = silu(linear(y1))
  down[t, d] = linear(up)
  output y = y1 + down * gate[d](x)
}
causal layer Stack(vocab: int, d_model: int = 6) {
  axes { s: time, d = d_model, v = vocab, d4 = 4 }
  input tok[s]: int
  x0[s, d] = embed(tok, vocab)
  x1 = Block[t = s](x0)
  x2 = Block[t = s](x1)
  sm[s, d4] = linear(x2)
  z = smooth[t = s, d = d4](sm, sigmoid(mean[d](x2)))
  output l[s, v] = linear[d -> v](x2) + mean[d4](z)
}
"""


@pytest.fixture
def stack(tmp_path: Path) -> Path:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "mix.spec").write_text(MIX)
    (tmp_path / "stack.spec").write_text(STACK)
    return tmp_path / "stack.spec"


def test_layers_of_other_files_are_called(stack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import chunkc

    monkeypatch.setenv("CHUNKC_CACHE_DIR", str(tmp_path / "cache"))
    module = chunkc.load(stack)
    for unit in check_path(stack).module.units:
        case = Case({"vocab": 7, "d_model": 6}, [0, 17, 1, 30], packed=True, dtype=torch.float64,
                    values=constructs.VALUES)  # fmt: skip
        assert max(errors(module, unit, case).values()) <= 1
    layer = module.Stack(7)
    assert {"x0.weight", "x1.b.q.weight", "x2.down.weight", "l.weight"} <= set(layer.state_dict())
    (stack.parent / "lib" / "mix.spec").write_text(MIX.replace("0.9", "0.8"))
    assert chunkc.load(stack) is not module  # what a used file says counts


@pytest.mark.parametrize(
    "path, code",
    [
        ("missing.spec", "cannot-read"),
        ("../stack.spec", "bad-use"),
        ("/etc/passwd", "bad-use"),
        ("lib/mix.txt", "bad-use"),
        ("out.spec", "bad-use"),
        ("stack.spec", "recursive"),
        ("broken.spec", "axis-mismatch"),
        ("./lib/../stack.spec", "bad-use"),
        ("self/stack.spec", "recursive"),
        ("lib/ring.spec", "recursive"),
        ("chain/0.spec", "too-large"),
        ("wide.spec", "too-large"),
        ("lost.spec", "cannot-read"),
    ],
)
def test_what_may_not_be_used(stack: Path, tmp_path_factory: pytest.TempPathFactory, path: str, code: str) -> None:
    outside = tmp_path_factory.mktemp("outside") / "x.spec"
    outside.write_text(MIX)
    (stack.parent / "out.spec").symlink_to(outside)
    (stack.parent / "broken.spec").write_text(
        "op b(n: int) { axes { t: time, d = n }\n input x[t, d]\n output y[t] = x }\n"
    )
    (stack.parent / "self").symlink_to(".")
    (stack.parent / "lib" / "ring.spec").write_text('use "././ring.spec"\n')
    (stack.parent / "chain").mkdir()
    for k in range(1000):
        (stack.parent / "chain" / f"{k}.spec").write_text(f'use "{k + 1}.spec"\nfn f{k}[a](x) = x\n')
    (stack.parent / "wide.spec").write_text("".join(f'use "chain/{k}.spec"\n' for k in range(1000)))
    (stack.parent / "lost.spec").write_text("".join(f'use "lost{k}.spec"\n' for k in range(20_000)))
    stack.write_text(f'use "{path}"\n' + STACK.split("\n", 1)[1])
    with pytest.raises(CompileError) as caught:
        check_path(stack)
    assert code in {d.code for d in caught.value.diagnostics}
    assert len([d for d in caught.value.diagnostics if d.code == code]) == (63 if path == "lost.spec" else 1)


def test_one_file_by_two_paths_is_one(stack: Path) -> None:
    (stack.parent / "again.spec").symlink_to(stack.parent / "lib" / "mix.spec")
    stack.write_text('use "./lib/mix.spec"\nuse "again.spec"\n' + STACK)
    assert len(check_path(stack).source.used) == 1


def test_mistakes_of_all_files_are_reported_together(stack: Path) -> None:
    for name in ("a", "b"):
        (stack.parent / f"{name}.spec").write_text(f"fn {name}[z](x) = missing\n")
    text = (
        'use "a.spec"\nuse "b.spec"\nop A() {\n axes { t: time, d = 2 }\n input x[t, d]\n output y = a[d](x) + b[d](x)'
    )
    stack.write_text(text + " + lost\n}\n")
    with pytest.raises(CompileError) as caught:
        check_path(stack)
    assert [d.span.file for d in caught.value.diagnostics] == ["a.spec", "b.spec", "stack.spec"]
    for name in ("a", "b"):
        (stack.parent / f"{name}.spec").write_text(f"fn {name}[z](x) = )\n")
    with pytest.raises(CompileError) as caught:
        check_path(stack)
    assert [(d.code, d.span.file) for d in caught.value.diagnostics] == [("syntax", "a.spec"), ("syntax", "b.spec")]


def test_files_are_1_mib_together(stack: Path) -> None:
    for k in range(3):
        (stack.parent / f"big{k}.spec").write_text("#" * 500_000 + f"\nfn big{k}[a](x) = x\n")
    stack.write_text("".join(f'use "big{k}.spec"\n' for k in range(3)) + STACK)
    with pytest.raises(CompileError) as caught:
        check_path(stack)
    assert [d.code for d in caught.value.diagnostics] == ["too-large"]


def test_a_number_is_an_output(tmp_path: Path) -> None:
    module, _, _ = emit("op A() {\n axes { t: time }\n input x[t]\n output a = 3, b = true, c = 1.5\n}\n", tmp_path)
    a, b, c = module.A(torch.zeros(1, 2, dtype=torch.float64))
    assert (a.item(), b.item(), c.item()) == (3, True, 1.5)
    assert (a.dtype, b.dtype, c.dtype) == (torch.int64, torch.bool, torch.float64)


@pytest.mark.parametrize(
    "call, code",
    [
        ("Mixer(x, heads = 3)", ""),
        ("Mixer(x, heads = 4)", ""),
        ("Mixer(x, width = 4)", "bad-call"),
        ("Mixer()", "bad-call"),
        ("Mixer(x, x)", "bad-call"),
        ("Mixer[t = d](x)", "axis-mismatch"),
        ("Mixer[u = t](x)", "not-an-axis"),
        ("Mixer(x, d_model = 5)", "bad-size"),
        ("Mixer(x[t = t - 1] * sum[d](x))", ""),
        ("Mixer(x) + Mixer(x)", "hidden-weight"),
        ("smooth[d = d](x, x)", "axis-mismatch"),
        ("Mixers(x)", "unknown-name"),
        ("Mixer", "not-a-value"),
    ],
)
def test_calls(stack: Path, call: str, code: str) -> None:
    stack.write_text(f"""use "lib/mix.spec"
layer A() {{
  axes {{ t: time, d = 12 }}
  input x[t, d]
  y = {call}
  output y
}}
""")
    if not code:
        check_path(stack)
        return
    with pytest.raises(CompileError) as caught:
        check_path(stack)
    assert code in {d.code for d in caught.value.diagnostics}
