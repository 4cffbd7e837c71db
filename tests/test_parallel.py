"""Parallel layouts: so many ranks over gloo are one process, in float64, and a rank that is lost ends the others."""

from __future__ import annotations

import itertools
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from ranks import Case, Pool, case_on_ranks, package, plan_of, run
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import chunkc
from chunkc.driver import compile_source
from chunkc.ir.diagnostics import CompileError, SourceFile

ROOT = Path(__file__).resolve().parent.parent
BLOCK = """
parallel {
  mesh { data, ring }
  shard t over ring layout LAYOUT
}
"""
LAYOUTS = ("contiguous", "zigzag")
Built = dict[tuple[str, str], str]
WHOLE = ("whole", "ahead")  # these cannot go on from a state
DOCUMENTS = (0, 1, 1, 20, 21, 22, 50, 64)  # of one token, of none, and over several ranks

OPS = {
    "gates": """
op gates(heads: int, dk: int, dv: int) {
  axes { t: time, h = heads, i = dk, j = dv }
  input q[t, h, i], w[t, h, j], rest_i[t, h, i], v[t, h, j], a[t, h, i] in [0, 1], f[t, h, j] in [-inf, 0]
  plan = q * 2
  recurrence over t {
    state S[h, i, j], Z[h, i, j] = 0.5
    S = a * exp(f) * S + rest_i * v
    Z = Z + rest_i * v
    o = sum[i](plan * S)
    p = sum[j](w * S) + 0.1 * sum[j](w * Z)
  }
  output o, p
}""",
    "vectors": """
op vectors(n: int) {
  axes { t: time, e = n }
  input x[t, e], a[t, e] in [0, 1], b[t, e]
  recurrence over t {
    state u[e], m[e] = -inf, w[e]: complex, r[e] = -1
    u = a * u + x
    m = max(m + b, x)
    w = exp(complex(-exp(b), x)) * w + x
    c = stop(max(b + r, x))
    r = c
  }
  output y = u + m + re(w) * x + exp(m[t = t - 1]) + exp(-r * r)
}""",
    "back": """
op back(n: int) {
  axes { t: time, e = n }
  input x[t, e], d[t]: int
  near = x[t = t - 1] * 2 + x[t = t - 5]
  same = where(d[t = t - 2] == d, 1.0, 0.5)
  far = x[t = t + 1] + near[t = t + 6] * where(d[t = t + 1] == d, 1.0, 0.5)
  output y = near * same + x * (near[t = t - 3] + t), far
}""",
    "masks": """
op masks(heads: int, kv: int, dk: int) {
  axes { t: time, s = t, u = t, h = heads, g = kv groups h, i = dk, o = 4 }
  chunk r of t = fixed(5)
  input q[t, h, i], k[t, g, i], v[t, g, i], doc[t]: int
  param b[h], c[o]
  attention y[t, h, i] {
    over s {
      logit = dot[i](q, k[t = s]) * size(i)^-0.5 + c[o = min(t - s, 3)]
      value = v[t = s]
      mask = s <= t and (doc[t = s] == doc or s < 3)
    }
    over u {
      logit = dot[i](q, v[t = u])
      value = k[t = u] + q
      mask = u < t and t - u < 6
    }
    over u {
      logit = -0.1 * abs(t - u) + b
      mask = t - u > 3 or r(u) == r(t) and u >= first(r(t)) + 1
    }
    row { logit = b }
  }
  output y
}""",
    "two": """
op one(n: int) {
  axes { t: time, e = n }
  input x[t, e]
  recurrence over t {
    state s[e]
    s = 0.5 * s + x
  }
  output s
}
op two(n: int) {
  axes { t: time, e = n, p = 3 }
  input x[t, e]
  param s0[e]
  u = one(x)
  recurrence over t {
    state s[e] = s0
    s = sigmoid(x) * s + u
  }
  near = x + s[t = -1] + s[t = t - 1]
  recurrence over p {
    state z[t, e]
    z = tanh(z + s + 0.1 * p)
  }
  output y = z + x[t = t - 1], near
}
op other(n: int) {
  axes { e: time, d = n }
  input y[e, d]
  output z = cumulated[e](y)
}
fn cumulated[a](y) = y / (1 + sum[a](abs(y)))""",
    "whole": """
op whole(heads: int, dk: int) {
  axes { t: time, s = t, e: time, h = heads, i = dk }
  input q[t, h, i], k[t, h, i], w[e, h, i], v[e, h, i]
  recurrence over e {
    state z[h, i]
    z = 0.5 * z + v
    z2 = z + v
  }
  attention y[t, h, i] {
    over e {
      logit = dot[i](q, w)
      value = z2
    }
    over s {
      logit = dot[i](q, k[t = s])
      value = k[t = s]
      mask = t >= s
    }
  }
  output y
}""",
    "ahead": """
op ahead(heads: int, dk: int) {
  axes { t: time, s = t, h = heads, i = dk }
  input q[t, h, i], k[t, h, i]
  attention y[t, h, i] over s {
    logit = dot[i](q, k[t = s]) * 0.3
    value = k[t = s]
    mask = abs(t - s) < 9
  }
  output y
}""",
}
HEADS = {"heads": 2, "dk": 4}
CASES = {
    "gated_linear_attention": Case("", "GatedLinearAttention", {"d_model": 16, "heads": 2}, {"x": (16,)}),
    "mamba2": Case("", "Mamba2", {"d_model": 8, "head": 4, "states": 6, "kv": 2}, {"x": (8,)}),
    "causal_attention": Case("", "CausalAttention", {"d_model": 16, "heads": 4, "kv": 2}, {"x": (16,)}),
    "hybrid": Case("", "Hybrid", {"d_model": 16, "heads": 2, "window": 9}, {"x": (16,)}),
    "rwkv6": Case("", "RWKV6", {"d_model": 16, "heads": 2}, {"x": (16,)}),
    "gates": Case("", "gates", HEADS | {"dv": 3}, {"q": (2, 4), "w": (2, 3), "rest_i": (2, 4), "v": (2, 3), "a": (2, 4),
                  "f": (2, 3)}, ranges={"a": (0.0, 1.0), "f": (-math.inf, 0.0)}),
    "vectors": Case("", "vectors", {"n": 4}, {"x": (4,), "a": (4,), "b": (4,)}, ranges={"a": (0.0, 1.0)}),
    "back": Case("", "back", {"n": 3}, {"x": (3,), "d": 5}),
    "masks": Case("", "masks", {"heads": 4, "kv": 2, "dk": 3}, {"q": (4, 3), "k": (2, 3), "v": (2, 3), "doc": 4},
                  params={"b": (4,), "c": (4,)}),
    "two": Case("", "two", {"n": 3}, {"x": (3,)}, params={"s0": (3,)}),
    "whole": Case("", "whole", HEADS, {"q": (2, 4), "k": (2, 4), "w": (2, 4), "v": (2, 4)}, whole=("w", "v")),
    "ahead": Case("", "ahead", HEADS, {"q": (2, 4), "k": (2, 4)}),
}  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Packages of all cases in both layouts."""
    folder = tmp_path_factory.mktemp("parallel")
    for path in (ROOT / "specs").glob("*.spec"):
        (folder / path.name).write_text(path.read_text())
    made = {}
    for layout in LAYOUTS:
        for name in CASES:
            text = OPS.get(name) or (ROOT / "specs" / f"{name}.spec").read_text()
            path = folder / f"{name}_{layout}.spec"
            path.write_text(text + BLOCK.replace("LAYOUT", layout))
            made[name, layout] = str(chunkc.build(path, folder / "out"))
    return made


@pytest.fixture(scope="module")
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    made = Pool(request.param)
    yield made
    made.close()


def close(name: str, wanted: torch.Tensor, found: torch.Tensor) -> None:
    assert wanted.shape == found.shape, name
    if not wanted.is_floating_point() and not wanted.is_complex():
        assert torch.equal(wanted, found), name
        return
    both = torch.isfinite(wanted.abs())
    assert torch.equal(wanted[~both], found[~both]), name
    scale = wanted[both].abs().max().clamp(min=1e-3) if both.any() else 1.0
    assert not both.any() or float((wanted[both] - found[both]).abs().max() / scale) < 1e-12, name


def compare(case: Case, pool: Pool) -> None:
    wanted = run(case)
    for rank, found in enumerate(pool(case_on_ranks, case)):
        assert wanted.keys() == found.keys()
        for name in wanted:
            close(f"rank {rank}: {name}", wanted[name], found[name])


KINDS = {
    "dense": {},
    "resumed": {"resumed": True},
    "packed": {"batch": 1, "tokens": 64, "cu_seqlens": DOCUMENTS},
    "packed resumed": {"batch": 1, "tokens": 64, "cu_seqlens": DOCUMENTS, "resumed": True},
    "short": {"batch": 3, "tokens": 16},
}


REQUIRED = ("gated_linear_attention", "mamba2", "causal_attention", "hybrid")
FIT = {"contiguous": ("dense", "packed resumed"), "zigzag": ("resumed", "packed", "short")}
BATCHES = [(4, name, layout, kind) for name in CASES for layout in LAYOUTS for kind in KINDS
           if name in REQUIRED or kind in FIT[layout]]  # fmt: skip
BATCHES += [(world, name, layout, kind) for world in (2, 8) for name in REQUIRED
            for layout, kind in (("contiguous", "dense"), ("zigzag", "packed resumed"))]  # fmt: skip


@pytest.mark.parametrize(("pool", "name", "layout", "kind"), BATCHES, indirect=["pool"])
def test_ranks_are_one_process(pool: Pool, built: Built, name: str, layout: str, kind: str) -> None:
    case = replace(CASES[name], folder=built[name, layout], **KINDS[kind])
    if name in WHOLE:
        case = replace(case, resumed=False)
    compare(case, pool)


def case_on_mesh(rank: int, world: int, case: Case) -> dict[str, torch.Tensor]:
    return run(case, plan_of(case.folder, world, data=2))


@pytest.mark.parametrize("pool", [4], indirect=True)
def test_two_rings_of_a_mesh(pool: Pool, built: Built) -> None:
    case = replace(CASES["hybrid"], folder=built["hybrid", "zigzag"], resumed=True)
    wanted = run(case)
    for found in pool(case_on_mesh, case):
        for name in wanted:
            close(name, wanted[name], found[name])


def in_ddp(rank: int, world: int, folder: str) -> list[float]:
    """How far gradients of a layer in DDP over the ring are from those in one process."""
    made, plan = package(folder), plan_of(folder, world)
    x = torch.randn(2, 32, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    layers = []
    for _ in range(2):
        torch.manual_seed(0)
        layers.append(made.Hybrid(d_model=16, heads=2, window=9, dtype=torch.float64))
    layers[0](x).square().mean().backward()
    wrapped = DistributedDataParallel(layers[1])
    y = wrapped(plan.shard(x), plan=plan)
    (world * plan.mean(y.square().sum(), y.numel())).backward()
    pairs = zip(layers[0].parameters(), layers[1].parameters())
    return [float((a.grad - b.grad).norm() / a.grad.norm()) for a, b in pairs]


@pytest.mark.parametrize("pool", [4], indirect=True)
def test_ddp_over_the_ring(pool: Pool, built: Built) -> None:
    for found in pool(in_ddp, built["hybrid", "zigzag"]):
        assert max(found) < 1e-12


def wrong(rank: int, world: int, folder: str) -> list[str]:
    """What wrong meshes and batches are told."""
    made, plan = package(folder), plan_of(folder, world)
    layer = made.Hybrid(d_model=16, heads=2)
    x = torch.zeros(1, 8, 16)
    calls = [
        lambda: made.Plan(init_device_mesh("cpu", (world,), mesh_dim_names=("rung",))),
        lambda: made.Plan(init_device_mesh("cpu", (world,), mesh_dim_names=("data",))),
        lambda: made.Plan(init_device_mesh("cpu", (world,))),
        lambda: plan.shard(torch.zeros(2, 12, 16)),
        lambda: plan.shard(torch.zeros(4)),
        lambda: layer(x[:, :7], plan=plan),
        lambda: layer(x, cu_seqlens=torch.tensor([0, 8]), plan=plan),
    ]
    told = []
    for call in calls:
        try:
            call()
            told.append("")
        except ValueError as error:
            told.append(str(error))
    return told


@pytest.mark.parametrize("pool", [4], indirect=True)
def test_wrong_meshes_and_batches(pool: Pool, built: Built) -> None:
    wanted = ("an axis 'rung'", "no axis 'ring'", "no axis 'ring'", "multiple of 8, not [2, 12, 16]", "multiple of 8",
              "2 pieces of equal size, not 7 tokens", "they end at 8, and 4 ranks have 8 tokens each")  # fmt: skip
    for told in pool(wrong, built["hybrid", "zigzag"]):
        for part, message in zip(wanted, told, strict=True):
            assert part in message, (part, message)


def test_without_a_plan_nothing_changes(tmp_path: Path, built: Built) -> None:
    """A layer of a file with a layout is bit for bit that of the file without one."""
    x = torch.randn(2, 40, 16, dtype=torch.float64)
    outs = []
    for folder in (str(chunkc.build(ROOT / "specs" / "hybrid.spec", tmp_path)), built["hybrid", "zigzag"]):
        torch.manual_seed(0)
        layer = package(folder).Hybrid(d_model=16, heads=2, window=9, dtype=torch.float64)
        y, state = layer(x, layer.init_state(2, dtype=torch.float64))
        outs.append([y, *layer.step(x[:, 0], state)[:1], state.a_S, *torch.autograd.grad(y.sum(), layer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


# -- ranks that are lost -----------------------------------------------------------------------------------------------

TIMEOUT = 2.0
WORLD = 4
OPERATION = re.compile(r"(scan_|ring_|last )\w+ \(\w+\.spec:\d+\), (for|back)ward|unshard|reduce_gradients")
LOST = [("killed", 2, "file"), ("killed", 0, "tcp"), ("stopped", 1, "file"), ("stopped", 0, "tcp"), ("stuck", 3, "tcp")]


def ready(rank: int, world: int, case: Case) -> None:
    run(case, plan_of(case.folder, world, TIMEOUT))


def steps(rank: int, world: int, case: Case, stuck: int) -> None:
    """Forward and backward for ever; a rank that is stuck sleeps after some steps."""
    plan = plan_of(case.folder, world, TIMEOUT)
    for step in itertools.count():
        if rank == stuck and step == 3:
            time.sleep(3 * TIMEOUT)
        run(case, plan)


SIGNALS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}


@pytest.mark.parametrize(("event", "lost", "store"), LOST)
def test_a_lost_rank_ends_the_others(built: Built, event: str, lost: int, store: str) -> None:
    """Within the time-out and five seconds all others raise an error that names the rank and the operation."""
    case = replace(CASES["hybrid"], folder=built["hybrid", "zigzag"])
    pool = Pool(WORLD, store=store)
    try:
        pool(ready, case)
        pool.start(steps, case, lost if event == "stuck" else -1)
        time.sleep(random.Random(f"{event}{lost}{store}").uniform(0.2, 1.2))
        if event != "stuck":
            os.kill(pool.processes[lost].pid or 0, SIGNALS[event])
        begin = time.monotonic()
        for rank in (r for r in range(WORLD) if r != lost):
            good, message = pool.result(rank, TIMEOUT + 5 - (time.monotonic() - begin))
            first = message.splitlines()[0]
            assert not good and re.search(rf"rank {lost}\b[^;:]* (does not answer|did not come)", first), message
            assert OPERATION.search(first), first
    finally:
        pool.close()


def test_torchrun(tmp_path: Path) -> None:
    """The example gives what one process does; when a worker is killed the job ends, and who it was is said."""
    folder = chunkc.build(ROOT / "specs" / "parallel_hybrid.spec", tmp_path)
    script = [str(ROOT / "examples" / "train_parallel.py"), str(folder), "--steps", "100000", "--timeout", "4"]
    job = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *script],
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    try:
        assert job.stdout is not None
        losses = [float(job.stdout.readline().split()[-1]) for _ in range(3)]
        workers = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        os.kill(int(workers[1]), signal.SIGKILL)
        _, said = job.communicate(timeout=4 + 5)
    finally:
        job.kill()
    assert job.returncode != 0 and "rank 1 does not answer" in said
    assert losses == pytest.approx(trained(package(str(folder)), 3), abs=2e-4)


def trained(made: ModuleType, steps: int) -> list[float]:
    """The example's losses in one process."""
    torch.manual_seed(0)
    layer = made.ParallelHybrid(d_model=32, heads=2, window=64)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        x = torch.randn(2, 512, 32)
        loss = (layer(x) - x.roll(2, 1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# -- what is refused ---------------------------------------------------------------------------------------------------

REFUSED = {
    "output y = x - mean[t](x) * 2 + 1": "this is a reduction along it",
    "output y = softmax[t](x)": "this is a normaliser along it",
    "output y = x * size(t)": "this is its length",
    "output y = x[t = floor(t / 2)]": "this reads computed positions",
    "chunk c of t = fixed(4)\nm = mean[t in c](x)\noutput y = m[c = c(t) - 1]": "'c' are chunks of it",
    "chunk c of t = parts(4)\noutput y = x + c(t)": "'c' are chunks of it",
    "recurrence over t {\nstate z[e]\nz = tanh(z + x)\n}\noutput z": "its steps are taken one by one",
    "recurrence over t {\nstate z[e]\nz = z / 2 + x\n}\noutput y = z[t = size(t) - 1]": "a value for each sequence",
    "recurrence over p {\nstate z[t, e]\nz = z + x + z[t = t - 1]\n}\noutput z": "reads other positions",
    "attention o[e] over s {\nlogit = sum[e](x[t = s])\nvalue = x[t = s]\n}\noutput o": "queries that are not along it",
}


@pytest.mark.parametrize("body", REFUSED)
def test_what_cannot_be_shared_is_refused_once(body: str) -> None:
    text = f"op a(n: int) {{\naxes {{ t: time, s = t, e = n, p = 3 }}\ninput x[t, e]\n{body}\n}}\n"
    with pytest.raises(CompileError) as caught:
        compile_source(SourceFile("a.spec", text + BLOCK.replace("LAYOUT", "auto")))
    (found,) = caught.value.diagnostics
    assert found.code == "not-sharded" and REFUSED[body] in found.message
