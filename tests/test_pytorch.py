"""What users of PyTorch do to an emitted layer: autocast, compile, export, checkpoints, copies, many processes."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from shipped import SPECS
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import chunkc

LAYERS: dict[str, dict[str, Any]] = {
    "gated_linear_attention": {}, "mamba2": {}, "hgrn": {}, "rwkv6": {}, "mlstm": {}, "gru": {"d_in": 32},
    "causal_attention": {"heads": 4, "kv": 2}, "document_attention": {"heads": 4}, "hybrid": {"heads": 4, "window": 9},
    "rat": {"heads": 4, "shared": 2, "length": 4},
}  # fmt: skip
PACKED = [("gated_linear_attention", {}), ("causal_attention", {}), ("hybrid", {}), ("rat", {}), ("mlstm", {}),
          ("gru", {"lengths": (3, 0, 1, 7)})]  # fmt: skip
BOTH = ("gated_linear_attention", "hybrid", "hgrn")
each_layer = pytest.mark.parametrize("name", LAYERS)


@cache
def loaded(name: str) -> ModuleType:
    return chunkc.load(SPECS / f"{name}.spec")


def layer(name: str, **more: Any) -> nn.Module:
    module, sizes = loaded(name), {"d_model": 32, **LAYERS[name], **more}
    torch.manual_seed(0)
    made: nn.Module = getattr(module, module.__all__[-1])(**sizes)
    return made


def inputs(name: str, tokens: int = 70, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    x = torch.randn(2, tokens, 32, dtype=dtype)
    return (x, torch.arange(tokens).expand(2, -1) // 30) if name == "document_attention" else (x,)


@each_layer
def test_autocast(name: str) -> None:
    """Products of layers are in bfloat16, scans and softmax are not; the result is near."""
    made, given = layer(name), inputs(name)
    whole = made(*given)
    with torch.autocast("cpu", torch.bfloat16):
        y = made(*given)
    y.float().square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in made.parameters())
    assert (y - whole).norm() < 0.05 * whole.norm()
    assert not torch.equal(y, whole)


@each_layer
def test_compile_has_no_break(name: str) -> None:
    torch._dynamo.reset()
    tokens = 12 if name in ("gru",) else 70  # what runs a token at a time is unrolled
    made, given = layer(name), inputs(name, tokens)
    again = copy.deepcopy(made)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    y, wanted = compiled(*given), again(*given)
    torch.testing.assert_close(y, wanted)
    y.square().sum().backward()
    wanted.square().sum().backward()
    for a, b in zip(made.parameters(), again.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


@each_layer
def test_export(name: str) -> None:
    made, given = layer(name), inputs(name, 12 if name == "gru" else 70)
    exported = torch.export.export(made, given)
    torch.testing.assert_close(exported.module()(*given), made(*given))


# -- packed batches ----------------------------------------------------------------------------------------------------


def packing(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Tokens in one row, and where each sequence begins."""
    torch.manual_seed(2)
    return torch.randn(1, sum(lengths), 32), torch.tensor([0, *lengths]).cumsum(0)


def results(made: Callable[..., Tensor], x: Tensor, cu_seqlens: Tensor, weights: list[nn.Parameter]) -> list[Tensor]:
    """The outputs, and the gradients of tokens and weights."""
    x = x.detach().requires_grad_()
    y = made(x, cu_seqlens=cu_seqlens)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *weights])]


def test_kernels_are_traced_without_a_break() -> None:
    """A compiled call launches the kernels that a call launches, dense and packed, forward and backward."""
    script, names = Path(__file__).parent / "traced_calls.py", ("gated_linear_attention", "hgrn")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, script, *(SPECS / f"{name}.spec" for name in names)],
                          env=environment, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for name, found in zip(names, json.loads(done.stdout)):
        for batch in found:
            assert batch["compiled"] == batch["eager"] and len(batch["eager"]) > 1, name
    assert all("fill_tables" in packed["eager"] for _, packed in json.loads(done.stdout))


@pytest.mark.parametrize(("name", "more"), PACKED)
def test_packed_batches_compile(name: str, more: dict[str, tuple[int, ...]]) -> None:
    """Empty sequences and one of a token among them: as without a compiler, and as each sequence alone."""
    torch._dynamo.reset()
    lengths = more.get("lengths", (13, 0, 1, 66, 0))
    made, (x, offsets) = layer(name), packing(lengths)
    weights = list(made.parameters())
    found = results(torch.compile(made, fullgraph=True, backend="aot_eager"), x, offsets, weights)
    for a, b in zip(found, results(made, x, offsets, weights)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    alone = torch.cat([made(part) for part in x.split(lengths, 1) if part.shape[1]], 1)
    torch.testing.assert_close(found[0], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "more"), PACKED)
def test_packed_batches_are_exported(name: str, more: dict[str, tuple[int, ...]]) -> None:
    """One program for all ways to divide so many tokens into so many sequences."""
    lengths = more.get("lengths", (13, 0, 1, 66, 0))
    made, (x, offsets) = layer(name), packing(lengths)
    program = torch.export.export(made, (x,), {"cu_seqlens": offsets}).module()
    for other in (lengths, lengths[::-1], (sum(lengths), *[0] * (len(lengths) - 1))):
        offsets = packing(other)[1]
        torch.testing.assert_close(program(x, cu_seqlens=offsets), made(x, cu_seqlens=offsets), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gated_linear_attention", "hybrid", "rat"])
def test_packed_batches_that_go_on_compile(name: str) -> None:
    torch._dynamo.reset()
    made, (x, offsets) = layer(name), packing((13, 0, 1, 20))
    with torch.no_grad():
        first, state = made(x, state=made.init_state(4), cu_seqlens=offsets)  # type: ignore[operator]
        compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
        y, after = compiled(x, state=state, cu_seqlens=offsets)
        wanted, known = made(x, state=state, cu_seqlens=offsets)
        torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-5)
        last, _ = made(x, state=after, cu_seqlens=offsets)
        torch.testing.assert_close(last, made(x, state=known, cu_seqlens=offsets)[0], rtol=1e-4, atol=1e-5)
    assert not torch.equal(first, y)


# -- copies, checkpoints and types -------------------------------------------------------------------------------------


@each_layer
def test_state_dict_copies_and_pickles(name: str) -> None:
    made, given = layer(name), inputs(name)
    wanted, other = made(*given), layer(name)
    other.reset_parameters()  # type: ignore[operator]
    assert not torch.equal(other(*given), wanted)
    other.load_state_dict(made.state_dict())
    for same in (other, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(same(*given), wanted)


@each_layer
def test_activation_checkpoints(name: str) -> None:
    made, (x, *rest) = layer(name), inputs(name)
    x.requires_grad_()
    whole = torch.autograd.grad(made(x, *rest).square().sum(), [x, *made.parameters()])
    again = checkpoint(made, x, *rest, use_reentrant=False)
    parts = torch.autograd.grad(again.square().sum(), [x, *made.parameters()])
    for a, b in zip(whole, parts):
        torch.testing.assert_close(a, b)


@each_layer
def test_gradcheck(name: str) -> None:
    made, (x, *rest) = layer(name).double(), inputs(name, 5, torch.float64)
    made.requires_grad_(False)
    assert torch.autograd.gradcheck(lambda z: made(z, *rest), (x.requires_grad_(),))


@each_layer
def test_meta_tensors(name: str) -> None:
    made = layer(name).to("meta")
    given = [x.to("meta") for x in inputs(name)]
    y = made(*given)
    assert y.device.type == "meta" and y.shape == layer(name)(*inputs(name)).shape
    y.sum().backward()
    assert all(p.grad is not None for p in made.parameters())


@each_layer
def test_other_types(name: str) -> None:
    made, (x, *rest) = layer(name), inputs(name)
    wanted = made(x, *rest)
    half = made.to(torch.bfloat16)(x.bfloat16(), *rest)
    assert half.dtype == torch.bfloat16 and (half.float() - wanted).norm() < 0.1 * wanted.norm()
    double = layer(name).double()(x.double(), *rest)
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), wanted, rtol=1e-4, atol=1e-5)


def test_vmap_is_refused() -> None:
    made = layer("gated_linear_attention")
    with pytest.raises(RuntimeError, match="does not go through torch.func.vmap"):
        torch.func.vmap(made)(inputs("gated_linear_attention")[0][None])


# -- many processes ----------------------------------------------------------------------------------------------------


def _alone(rank: int, world: int, folder: str, name: str, wrap: str) -> None:
    """One process of a group: two steps of training on its share of a batch, and what one process would have."""
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    made = layer(name)
    whole = copy.deepcopy(made)
    mesh = init_device_mesh("cpu", (world,))
    trained = DistributedDataParallel(made) if wrap == "ddp" else fully_shard(made, mesh=mesh)
    x = torch.randn(4, 40, 32, generator=torch.Generator().manual_seed(2))
    steps = torch.optim.SGD(trained.parameters(), lr=0.1), torch.optim.SGD(whole.parameters(), lr=0.1)
    for _ in range(2):
        trained(x[rank::world]).square().mean().backward()
        whole(x).square().mean().backward()
        for step in steps:
            step.step()
            step.zero_grad()
    torch.testing.assert_close(trained(x), whole(x), rtol=1e-5, atol=1e-6)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may outlive the group, and abort a process that ends as usual


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", BOTH)
def test_data_parallel(tmp_path: Path, name: str, wrap: str) -> None:
    mp.spawn(_alone, args=(2, str(tmp_path), name, wrap), nprocs=2)


def test_all_at_once(tmp_path: Path) -> None:
    """Autocast, compile and checkpoints together train."""
    torch._dynamo.reset()
    made = layer("hybrid")
    compiled: Callable[..., Tensor] = torch.compile(made, fullgraph=True, backend="aot_eager")
    steps, (x,) = torch.optim.AdamW(made.parameters(), lr=1e-2), inputs("hybrid")
    losses = []
    for _ in range(5):
        with torch.autocast("cpu", torch.bfloat16):
            y = checkpoint(compiled, x, use_reentrant=False)
        loss = (y.float() - x.roll(1, 1)).square().mean()
        loss.backward()
        steps.step()
        steps.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
