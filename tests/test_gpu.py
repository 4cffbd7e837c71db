"""The numerics of `test_numerics` with the Triton kernels on a GPU. Run by `make test-gpu`."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import attentions
import cases
import constructs
import pytest
import test_pytorch as inside
import torch
from emitted import Case, differs_when_cut, emit, errors
from shipped import SPECS
from test_attention import VALUES
from test_language import built as construct
from test_language import settings
from test_numerics import (
    ALL,
    EDGES,
    PACKED,
    SETTINGS,
    SHIPPED,
    STATELESS,
    allowed,
    at_edges,
    built,
    gates,
    without_a_state,
)

import chunkc
from chunkc import cli
from chunkc.ahead.targets import TARGETS
from chunkc.ir import nodes as N
from chunkc.ir.tuning import Tuning

__all__ = ["built"]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(found: dict[str, float], most: float = 1.0) -> None:
    assert max(found.values()) <= most, {k: round(v, 2) for k, v in found.items() if v > most}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_packed_and_resumed(built, name, dtype):  # type: ignore[no-untyped-def]
    module, unit = built(name)
    case = Case(SETTINGS, PACKED, packed=True, dtype=dtype, resume=True, values=gates(unit, cases.mixed), device="cuda")
    check(errors(module, unit, case), allowed(name, dtype))


MATRIX = [n for n in cases.OPS if n not in ("vector", "two_vectors", "max_plus", "delta")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MATRIX)
def test_walks_over_segments(monkeypatch, built, name, dtype):  # type: ignore[no-untyped-def]
    module, unit = built(name)
    monkeypatch.setattr(importlib.import_module(f"{module.__name__}._kernels"), "CUT", 64)
    for lengths, packed in ((PACKED, True), ([200, 200], False)):
        case = Case(SETTINGS, lengths, packed=packed, dtype=dtype, resume=True, values=gates(unit, cases.mixed),
                    device="cuda")  # fmt: skip
        check(errors(module, unit, case), allowed(name, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name, segment", [*((n, 2048) for n in cases.OPS), *((n, 128) for n in MATRIX)])
def test_a_sequence_cut_short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, segment: int,
                              dtype: torch.dtype) -> None:  # fmt: skip
    """What a schedule's prefix_invariant demands, and `explain` says of every kernel."""
    text = cases.OPS[name].replace("  axes {", "  schedule { prefix_invariant = true }\n  axes {", 1)
    module, (unit,), (normal,) = emit(text, tmp_path, f"{name}.spec")
    kernels = importlib.import_module(f"{module.__name__}._kernels")
    monkeypatch.setattr(kernels, "CUT", segment, raising=False)  # elementwise scans have none
    settings = {**SETTINGS, "heads": 3, "dk": 96, "dv": 128}
    case = Case(settings, [300, 300], dtype=dtype, values=gates(unit, cases.mixed), device="cuda")
    # Sums that normal form has outside of recurrences are PyTorch's: few have an order of their own.
    lengths = (64, 65, 130, 299) if normal.graph.of_kind(N.Reduce) else (2, 64, 65, 130, 299)
    assert not differs_when_cut(module, unit, case, lengths)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", list(cases.OPS))
def test_gates_at_large_sizes(built, name, dtype):  # type: ignore[no-untyped-def]
    module, unit = built(name)
    settings = {**SETTINGS, "heads": 3, "dk": 96, "dv": 128}
    for make in (cases.mild, cases.strong, cases.mixed):
        case = Case(settings, [300], dtype=dtype, values=gates(unit, make), device="cuda")
        check(errors(module, unit, case))


@pytest.mark.parametrize("length", [1, 17, 64])
@pytest.mark.parametrize("name", ALL)
def test_dense(built, name, length):  # type: ignore[no-untyped-def]
    module, unit = built(name)
    resume = name in cases.OPS  # in a layer, a norm removes the scale that a state of its own divides by
    case = Case(SETTINGS, [length, length], resume=resume, values=gates(unit, cases.mild), device="cuda")
    found = errors(module, unit, case)
    if length == 1 and unit.kind == "layer":  # as in test_numerics: the query's size is normed away
        found = {k: v for k, v in found.items() if not k.startswith("grad")}
    check(found, allowed(name, torch.float32))


@pytest.mark.parametrize("name", ["gated", "product_gate", "raw_key", "vector"])
def test_two_runs_are_bitwise_equal(built, name):  # type: ignore[no-untyped-def]
    module, unit = built(name)
    torch.manual_seed(0)
    own = {"heads": 4, "dk": 64, **({"dv": 64} if any(p.name == "dv" for p in unit.params) else {})}
    widths = {"i": 64, "j": 64}
    inputs = {}
    for n in unit.graph.nodes:
        if n.kind == "input":
            shape = [2, 500, 4, *(widths[a] for a in n.axes[2:])]
            make = gates(unit, cases.mixed).get(n.name, torch.randn)
            inputs[n.name] = make(shape).to("cuda", torch.bfloat16).requires_grad_()
    op = getattr(module, unit.name)
    runs = []
    for _ in range(2):
        out = op(**inputs, **own)[0]
        runs.append([out, *torch.autograd.grad(out.float().square().sum(), list(inputs.values()))])
    for a, b in zip(*runs):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name, make", EDGES)
def test_gates_at_the_ends_of_their_range(built, name, make):  # type: ignore[no-untyped-def]
    check(at_edges(built, name, make, "cuda"))


@pytest.mark.parametrize("name", STATELESS)
def test_without_a_state(built, name):  # type: ignore[no-untyped-def]
    check(without_a_state(built, name, "cuda"))


@pytest.mark.parametrize("lengths, packed", [([33, 33], False), ([0, 17, 1, 40], True)])
@pytest.mark.parametrize("name", [n for n in constructs.SPECS if n != "fns"])
def test_constructs(name, lengths, packed):  # type: ignore[no-untyped-def]
    module, unit = construct(name)
    case = Case(settings(name, unit), lengths, packed=packed, values=constructs.VALUES, device="cuda")
    check(errors(module, unit, case), 3.0)


@pytest.mark.parametrize("name", SHIPPED)
def test_one_token(built, name):  # type: ignore[no-untyped-def]
    """step() from the state that the whole left gives what the whole would have given."""
    module, unit = built(name)
    own = {k: v for k, v in SETTINGS.items() if any(p.name == k for p in unit.params)}
    torch.manual_seed(0)
    layer = getattr(module, unit.name)(**own, device="cuda")
    x = torch.randn(3, 70, own.get("d_in", own["d_model"]), device="cuda")
    with torch.no_grad():
        whole = layer(x)
        _, state = layer(x[:, :69], state=layer.init_state(3))
        last, _ = layer.step(x[:, 69], state)
    torch.testing.assert_close(last, whole[:, 69], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", attentions.OPS)
def test_attention(tmp_path, name, dtype):  # type: ignore[no-untyped-def]
    module, (unit,), _ = emit(attentions.OPS[name], tmp_path, "attends.spec")
    sizes = {"heads": 4, "dk": 24, "dv": 40}
    for lengths, packed in (([1], False), ([300, 300], False), ([3, 0, 1, 270], True)):
        check(errors(module, unit, Case(sizes, lengths, packed=packed, dtype=dtype, values=VALUES, device="cuda")))


INSIDE = ("gated_linear_attention", "mamba2", "hgrn", "hybrid")


def on_gpu(name):  # type: ignore[no-untyped-def]
    made = inside.layer(name).cuda()
    return made, torch.randn(2, 300, 32, device="cuda", requires_grad=True)


@pytest.mark.parametrize("name", INSIDE)
def test_autocast(name):  # type: ignore[no-untyped-def]
    made, x = on_gpu(name)
    whole = made(x)
    with torch.autocast("cuda", torch.bfloat16):
        y = made(x)
    y.float().square().sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()
    assert (y - whole).norm() < 0.05 * whole.norm()


@pytest.mark.parametrize("name", INSIDE)
def test_compile_has_no_break(name):  # type: ignore[no-untyped-def]
    torch._dynamo.reset()
    made, x = on_gpu(name)
    y, wanted = torch.compile(made, fullgraph=True, backend="aot_eager")(x), made(x)
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-5)
    for a, b in zip(*(torch.autograd.grad(z.square().sum(), [x, *made.parameters()]) for z in (y, wanted))):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", INSIDE)
def test_cuda_graphs(name):  # type: ignore[no-untyped-def]
    """A step of training is captured and played again on other data."""
    made, x = on_gpu(name)
    x.requires_grad_(False)

    def step():  # type: ignore[no-untyped-def]
        made.zero_grad(set_to_none=False)
        loss = made(x).square().sum()
        loss.backward()
        return loss

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # kernels are compiled, and gradients made, before the capture
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    x.copy_(torch.randn_like(x))
    graph.replay()
    found = [loss.clone(), *(p.grad.clone() for p in made.parameters())]
    wanted = [step().detach(), *(p.grad for p in made.parameters())]
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["gated_linear_attention", "hgrn", "mamba2"])
def test_steps_in_cuda_graphs(name):  # type: ignore[no-untyped-def]
    """A token is captured with the state in place, and played again: the state goes on."""
    made, x = on_gpu(name)
    tokens, state = x.detach()[:, :8].contiguous(), made.init_state(len(x))
    token = tokens[:, 0].clone()
    with torch.no_grad():
        wanted, _ = made(tokens, made.init_state(len(x)))
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            made.step(token, made.init_state(len(x)), in_place=True)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, _ = made.step(token, state, in_place=True)
        found = []
        for t in range(8):
            token.copy_(tokens[:, t])
            graph.replay()
            found.append(y.clone())
    assert state.position.tolist() == [8] * len(x)
    torch.testing.assert_close(torch.stack(found, 1), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["gated_linear_attention", "causal_attention"])
def test_bench(name, tmp_path):  # type: ignore[no-untyped-def]
    """Processes and all, at small sizes: chunkc's rows, and PyTorch's attention, are right and timed."""
    found = tmp_path / "found.json"
    spec = str(SPECS / f"{name}.spec")
    assert cli.run(["bench", spec, "--device", "cuda", "--shape", "B=2,T=256,K=64", "--json", str(found)]) == 0
    rows = [row for part in json.loads(found.read_text())["parts"] for row in part["rows"]]
    own = [row for row in rows if row["candidate"] in ("chunkc", "sdpa")]
    assert len(own) == 3
    for row in own:
        assert row["reason"] is None and row["error"] < 0.05
        assert row["forward_ms"] > 0 and row["both_ms"] > 0 and row["peak_mib"] > 0


def test_tune(tmp_path, capsys):  # type: ignore[no-untyped-def]
    """Processes and all, at small sizes: what is written is right, and what is built has it."""
    path = tmp_path / "gated_linear_attention.spec"
    path.write_text((SPECS / path.name).read_text())
    assert cli.run(["tune", str(path), "--shape", "B=2,T=256,K=64"]) == 0
    assert "dropped" not in capsys.readouterr().out
    tuning = Tuning.model_validate_json(path.with_suffix(".tuning.json").read_text())
    assert {"S_states_narrow", "S_read_j_start", "S_read_j", "S_ends_narrow", "S_grad_i", "S_grad_j"} < set(
        tuning.kernels
    )
    module = importlib.import_module(f"{chunkc.load(path).__name__}._kernels")
    assert tuning.schedules().items() <= module.SCHEDULES.items()


@pytest.mark.parametrize("name", [*INSIDE, "rat"])
def test_packed_batches_compile(name):  # type: ignore[no-untyped-def]
    """Kernels take the tiles that shapes allow for; sequences without tokens and one of a token are among them."""
    torch._dynamo.reset()
    made, (x, offsets) = inside.layer(name).cuda(), inside.packing((13, 0, 1, 286, 0))
    x, offsets, weights = x.cuda(), offsets.cuda(), list(made.parameters())
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    for a, b in zip(*(inside.results(f, x, offsets, weights) for f in (compiled, made))):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["gated_linear_attention", "causal_attention"])
def test_first_calls_compile_nothing_that_was_compiled_ahead(tmp_path, name):  # type: ignore[no-untyped-def]
    settings = {"d_model": 256, "heads": 4}
    major, minor = torch.cuda.get_device_capability()
    if (target := f"sm_{major}{minor}") not in TARGETS:
        pytest.skip(f"nothing is compiled ahead for {target}")
    package = chunkc.build(SPECS / f"{name}.spec", tmp_path / "ahead", settings, target=target)
    plain = chunkc.build(SPECS / f"{name}.spec", tmp_path / "plain", settings)
    ahead, usual = first_call(package, settings, "--no-compiler"), first_call(plain, settings)
    assert ahead["said"] == usual["said"] == []
    assert ahead["values"] == usual["values"]
    assert ahead["all_s"] < usual["all_s"]


def first_call(package, settings, *options):  # type: ignore[no-untyped-def]
    """In a process of its own, whose cache is empty."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(package.parent / "cache"),
                   "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # fmt: skip
    command = [sys.executable, Path(__file__).parent / "first_call.py", package.parent, package.name]
    done = subprocess.run([*command, json.dumps(settings), *options], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
