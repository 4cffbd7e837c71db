"""Ranks as processes of this machine, for tests of parallel layouts: a pool of them, and what they run."""

from __future__ import annotations

import importlib.util
import multiprocessing as mp
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

Job = Callable[..., Any]
WAIT = 60.0


@dataclass(frozen=True)
class Case:
    """A unit of a package at `folder`, its sizes, and a batch: `inputs` are trailing shapes, a number of integers, or
    True for truth values; `whole` inputs are over a sequence e that all ranks have."""

    folder: str
    unit: str
    sizes: dict[str, Any]
    inputs: dict[str, tuple[int, ...] | int]
    params: dict[str, tuple[int, ...]] = field(default_factory=dict)
    whole: tuple[str, ...] = ()
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    batch: int = 2
    tokens: int = 32
    cu_seqlens: tuple[int, ...] | None = None
    resumed: bool = False


def package(folder: str) -> ModuleType:
    path = Path(folder)
    name = f"made_{path.parent.name}_{path.name}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path / "__init__.py", submodule_search_locations=[folder])
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def tensors(case: Case, tokens: int, seed: int) -> dict[str, Tensor]:
    """The whole batch; 7 tokens of a sequence that all ranks have."""
    made, gen = {}, torch.Generator().manual_seed(seed)
    for name, shape in case.inputs.items():
        length = 7 * (1 if case.cu_seqlens is None else len(case.cu_seqlens) - 1) if name in case.whole else tokens
        if isinstance(shape, int):
            drawn = torch.randint(max(shape, 2), (case.batch, length), generator=gen)
            made[name] = drawn.bool() if shape is True else drawn.sort(1).values
            continue
        x = torch.randn((case.batch, length, *shape), generator=gen, dtype=torch.float64)
        low, high = case.ranges.get(name, (0.0, 0.0))
        if low < high:
            x = (high + (max(low, -3.0) - high) * torch.sigmoid(x)).where(x > -1.5, low)  # the lower end, too
        made[name] = x.requires_grad_()
    for name, shape in case.params.items():
        made[name] = torch.randn(shape, generator=gen, dtype=torch.float64).requires_grad_()
    return made


def run(case: Case, plan: Any = None) -> dict[str, Tensor]:
    """Outputs, last states, and the gradients of inputs, weights and initial states, of the whole batch."""
    made, unit = tensors(case, case.tokens, 1), getattr(package(case.folder), case.unit)
    shard = (
        (lambda n, x: x)
        if plan is None
        else lambda n, x: plan.shard(x) if n in case.inputs and n not in case.whole else x
    )
    keywords: dict[str, Any] = {"plan": plan} if plan is not None else {}
    if case.cu_seqlens is not None:
        keywords["cu_seqlens"] = torch.tensor(case.cu_seqlens)
        if case.whole:
            keywords["cu_seqlens_e"] = torch.arange(len(case.cu_seqlens)) * 7
    weights: dict[str, Tensor] = {}
    if isinstance(unit, type):
        torch.manual_seed(3)
        layer = unit(**case.sizes, dtype=torch.float64)
        weights = dict(layer.named_parameters())
        call, sizes = layer, {}
    else:
        call, sizes = unit, case.sizes
    state = None
    if case.resumed:
        early = {n: x.detach() if n in case.params else x for n, x in tensors(case, 5, 2).items()}
        early |= {n: made[n].detach() for n in case.params}
        state = resume(call, case, early, sizes)
    parts = [shard(n, x) for n, x in made.items()]
    outs, last = results(call, parts, state, sizes, keywords, layer=bool(weights))
    gen = torch.Generator().manual_seed(4)
    loss = torch.zeros((), dtype=torch.float64)
    found: dict[str, Tensor] = {}
    for k, y in enumerate(outs):
        whole = y if plan is None else plan.unshard(y.detach())
        found[f"out {k}"] = whole.detach()
        w = torch.randn(whole.shape, generator=gen, dtype=torch.float64)
        loss = loss + (y * (w if plan is None else plan.shard(w))).sum()
    for k, s in enumerate(last):
        found[f"state {k}"] = s.detach()
        s = torch.view_as_real(s) if s.is_complex() else s
        w = torch.randn(s.shape, generator=gen, dtype=torch.float64)
        if s.requires_grad and (plan is None or plan.ranks.rank == plan.size - 1):
            loss = loss + (s * w).sum()  # all ranks have the states: one counts them
        elif s.requires_grad:
            loss = loss + 0 * s.sum()
    loss.backward()
    held = {**made, **weights, **{f"initial {k}": s for k, s in enumerate(state or ()) if s.requires_grad}}
    held = {n: x for n, x in held.items() if x.requires_grad}
    if plan is not None:
        plan.reduce_gradients(held.values())
    return found | {f"d {n}": torch.zeros_like(x) if x.grad is None else x.grad for n, x in held.items()}


def resume(call: Any, case: Case, early: dict[str, Tensor], sizes: dict[str, Any]) -> tuple[Tensor, ...]:
    """The state that a first call of 5 tokens a sequence leaves."""
    if case.cu_seqlens is not None:
        count = len(case.cu_seqlens) - 1
        early = {
            n: x if n in case.params else x[:1, :1].repeat(1, 5 * count, *[1] * (x.dim() - 2)) for n, x in early.items()
        }
        keywords = {"cu_seqlens": torch.arange(count + 1) * 5}
    else:
        count, keywords = case.batch, {}
    _, state = results(
        call, list(early.values()), None, sizes, keywords, layer=isinstance(call, torch.nn.Module), count=count
    )
    return tuple(s.detach().requires_grad_(s.is_floating_point() or s.is_complex()) for s in state)


def results(call: Any, parts: list[Tensor], state: tuple[Tensor, ...] | None, sizes: dict[str, Any],
            keywords: dict[str, Any], layer: bool, count: int = 0) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """Outputs and last states of a layer or an op."""
    if layer:
        if not hasattr(call, "init_state"):
            return [call(*parts, **keywords)], []
        offsets = keywords.get("cu_seqlens")
        count = count or (parts[0].shape[0] if offsets is None else offsets.numel() - 1)
        kind = type(call.init_state(1))
        begin = call.init_state(count, dtype=torch.float64) if state is None else kind(*state)
        *outs, last = call(*parts, begin, **keywords)
        return outs, [getattr(last, f) for f in last.__dataclass_fields__]
    import inspect

    if "initial_state" not in inspect.signature(call).parameters:
        out = call(*parts, **sizes, **keywords)
        return list(out) if isinstance(out, tuple) else [out], []
    given = state if state is None or len(state) > 1 else state[0]
    *outs, last = call(*parts, **sizes, **keywords, initial_state=given, output_final_state=True)
    return outs, list(last) if isinstance(last, tuple) else [last]


def case_on_ranks(rank: int, world: int, case: Case) -> dict[str, Tensor]:
    return run(case, plan_of(case.folder, world))


_plans: dict[tuple[str, int, float], Any] = {}


def plan_of(folder: str, world: int, timeout: float = 30.0, data: int = 1) -> Any:
    key = (folder, data, timeout)
    if key not in _plans:
        names = ("ring",) if data == 1 else ("data", "ring")
        shape = (world,) if data == 1 else (data, world // data)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        _plans[key] = package(folder).Plan(mesh, timeout=timedelta(seconds=timeout))
    return _plans[key]


def _serve(rank: int, world: int, where: str, timeout: float, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=world,
                            timeout=timedelta(seconds=timeout))  # fmt: skip
    while True:
        job, args = pipe.recv()
        if job is None:
            break
        try:
            pipe.send((True, job(rank, world, *args)))
        except Exception as failure:
            pipe.send((False, f"{type(failure).__name__}: {failure}\n{traceback.format_exc()}"))


class Pool:
    """So many ranks over gloo, that run jobs together."""

    def __init__(self, world: int, timeout: float = 30.0, store: str = "file") -> None:
        server = mp.get_context("forkserver")
        server.set_forkserver_preload(["torch", "torch.distributed", "torch.distributed.device_mesh", "ranks"])
        handle, self.meeting = tempfile.mkstemp()
        os.close(handle)
        where = f"file://{self.meeting}"
        if store == "tcp":
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                where = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(world):
            mine, theirs = server.Pipe()
            process = server.Process(target=_serve, args=(rank, world, where, timeout, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(mine)
            self.processes.append(process)

    def start(self, job: Job, *args: Any) -> None:
        for pipe in self.pipes:
            pipe.send((job, args))

    def result(self, rank: int, wait: float = WAIT) -> tuple[bool, Any]:
        """Whether a rank's job was done, and its result or what it raised."""
        if not self.pipes[rank].poll(wait):
            return False, "no answer"
        received: tuple[bool, Any] = self.pipes[rank].recv()
        return received

    def __call__(self, job: Job, *args: Any) -> list[Any]:
        self.start(job, *args)
        found = [self.result(rank) for rank in range(len(self.pipes))]
        for rank, (good, result) in enumerate(found):
            assert good, f"rank {rank}: {result}"
        return [result for _, result in found]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        Path(self.meeting).unlink(missing_ok=True)
