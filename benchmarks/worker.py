"""The process of one task: `python worker.py REQUEST RESULT`, two JSON files.

What is known is written as it is found, so that a task that dies later has what it reached."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from candidates import Candidate, Peer, candidate, lift
from check import checked, error_of
from ops import OPS, Shape
from rows import SIMPLE, Case
from torch import Tensor
from tuning import choose_quickly, chosen, compile_share

from chunkc.bench.timing import DTYPES, Call, median_ms, peak_mib, rates, seconds
from chunkc.bench.worker import said

NICE = 15  # compiling gives way to what is checked and timed at the same time
Say = Callable[[str, Any], None]
Request = Mapping[str, Any]


def read_case(data: Mapping[str, Any]) -> Case:
    return Case(**{**data, "shape": Shape(**data["shape"])})


def cases_of(request: Request) -> list[Case]:
    return [read_case(data) for data in request["cases"]]


def made(request: Request, name: str = "") -> Candidate:
    return candidate(name or request["candidate"], cases_of(request)[0].op, Path(request["packages"]))


@contextmanager
def turn(request: Request) -> Iterator[None]:
    """The GPU alone. The process dies if it takes longer than it may; it keeps the GPU until it ends."""
    if "lock" not in request:
        yield
        return
    lock = open(request["lock"], "w")  # noqa: SIM115
    fcntl.flock(lock, fcntl.LOCK_EX)
    signal.alarm(request["alarm_seconds"])
    yield


# -- tasks -------------------------------------------------------------------------------------------------------------


def task_rates(request: Request, say: Say) -> None:
    """What a copy and a product reach; both are what all limits stand on."""
    if request["quick"]:
        bandwidth, rate = 1e10, 1e11
    else:
        bandwidth, rate = rates(request["device"], request["dtype"])
    say("bandwidth", bandwidth)
    say("rate", rate)
    say("name", torch.cuda.get_device_name() if request["device"] == "cuda" else "CPU")


def task_fill(request: Request, say: Say) -> None:
    """Compile this process's share of the kernels that peers choose among."""
    compile_share(request["share"], request["shares"])
    if request["shares"] > 1:
        os.nice(NICE)
    for name, case in zip(request["peers"], cases_of(request)):
        peer = candidate(name, case.op, Path())
        peer.prepare()
        if name == SIMPLE:
            lift()
        call = peer.call(case, OPS[case.op].draw(case.shape, case.gate, request["device"], DTYPES[request["dtype"]]))
        try:
            say(f"{name} {case.key()}", seconds(partial(_once, call), request["device"])[0])
        except Exception as reason:  # what is not compiled here is compiled where it is timed, or fails there
            say(f"{name} {case.key()}", said(reason))


def _once(call: Call) -> None:
    outs = call.forward()
    torch.autograd.grad(outs, call.leaves, [torch.ones_like(o) for o in outs])


def task_check(request: Request, say: Say) -> None:
    """An emitted op on few tokens, for each gate, and packed."""
    ours = made(request)
    ours.prepare()
    for case in cases_of(request):
        try:
            found = checked(ours, case, Path(request["scratch"]), request["device"], DTYPES[request["dtype"]])
        except Exception as reason:  # whatever a kernel raises is its row's text
            found = {"reason": said(reason), "right": False}
        say(case.key(), found)


def task_cold(request: Request, say: Say) -> None:
    """From the import of an emitted package to its first outputs, and on to its first gradients, nothing compiled."""
    (case,) = cases_of(request)
    ours, device = made(request), request["device"]
    x = OPS[case.op].draw(case.shape, case.gate, device, DTYPES[request["dtype"]])
    imported, _ = seconds(ours.prepare, device)
    call = ours.call(case, x)
    with torch.no_grad():
        forward, _ = seconds(call.forward, device)
    say("first_forward_s", imported + forward)
    say("first_both_s", imported + forward + seconds(partial(_once, call), device)[0])


def task_time(request: Request, say: Say) -> None:
    """The times of a candidate on the cases of one shape; a peer is tuned at the first of them."""
    runs = made(request)
    runs.prepare()
    choose_quickly()
    device, dtype = request["device"], DTYPES[request["dtype"]]
    torch.zeros(1, device=device)  # the GPU is set up while another process has it
    with turn(request):
        for index, case in enumerate(cases_of(request)):
            try:
                say(case.key(), {"reason": "did not end"})
                say(case.key(), measured(runs, case, request, index == 0))
            except Exception as reason:  # whatever a candidate raises is its row's text
                say(case.key(), {"reason": said(reason)})
        say("chosen", chosen())
        for case in map(read_case, request["errors"]):
            try:
                say(f"error {case.key()}", error_of(runs, case, Path(request["scratch"]), device, dtype))
            except Exception as reason:
                say(f"error {case.key()}", said(reason))


TASKS = {"rates": task_rates, "fill": task_fill, "check": task_check, "cold": task_cold, "time": task_time}


# -- times -------------------------------------------------------------------------------------------------------------


def measured(runs: Candidate, case: Case, request: Request, first: bool) -> dict[str, Any]:
    """Medians, forward and with backward; for the first case of a shape also as a CUDA graph."""
    device, dtype, step = request["device"], DTYPES[request["dtype"]], case.mode == "step"
    call = runs.call(case, OPS[case.op].draw(case.shape, case.gate, device, dtype, not step))
    found: dict[str, Any] = {}

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return call.forward()

    grads = [torch.randn_like(o) for o in forward()]

    def both() -> object:
        return torch.autograd.grad(call.forward(), call.leaves, grads)

    if isinstance(runs, Peer) and runs.name == SIMPLE and case.op == "scalar_gate" and first:
        found["stock"] = runs.stock(both)
    time = partial(_quick if request["quick"] else median_ms, device=device)
    found["forward_ms"] = time(forward)
    if not step:
        both()
        if device == "cuda":
            found["peak_mib"] = peak_mib(both)
        found["both_ms"] = time(both)
    if device == "cuda" and (first or step):
        found |= _replayed({"graph_forward_ms": forward} | ({} if step else {"graph_both_ms": both}))
    if device == "cuda" and case.key() in request["counted"]:
        found["launches"] = launches(forward)
    return found


def _quick(run: Callable[[], object], device: str) -> float:
    return seconds(run, device)[0] * 1e3


def _replayed(runs: Mapping[str, Callable[[], object]]) -> dict[str, Any]:
    """The times of calls that are captured once and replayed: what is left when the CPU does not hold the GPU up."""
    found: dict[str, Any] = {}
    for name, run in runs.items():
        try:
            found[name] = median_ms(captured(run).replay, "cuda")
        except Exception as reason:  # a call that waits for the GPU cannot be captured; its other times stand
            found[f"{name}_reason"] = said(reason)
    return found


def captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def launches(run: Callable[[], object]) -> int:
    """Kernels that one call starts."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    return sum(1 for e in profiler.events() or () if e.device_type.name == "CUDA")


def perform(request: Request, write: Callable[[Mapping[str, Any]], None]) -> None:
    found: dict[str, Any] = {}

    def say(key: str, value: Any) -> None:
        found[key] = value
        write(found)

    try:
        TASKS[request["task"]](request, say)
    except Exception as reason:  # a task that fails is rows that say so
        say("reason", said(reason))


def main(request_file: str, result_file: str) -> None:
    def write(found: Mapping[str, Any]) -> None:
        Path(result_file).write_text(json.dumps(found))

    perform(json.loads(Path(request_file).read_text()), write)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
