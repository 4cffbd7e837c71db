"""The ranks of a parallel layout: what they send each other, with a time-out on every wait, and whom a failure names.

Copied into each package with a parallel layout as `_ranks.py`; it imports torch alone."""

from __future__ import annotations

import atexit
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh

PERIOD = 0.2  # seconds between two looks at the store
PATIENCE = 1.5  # seconds in which a rank that lives has answered
PARTING = 0.8  # seconds that the holder of the store stays, so that the others read the last answers

_made = itertools.count()  # plans are made in the same order on all ranks


class Watch(threading.Thread):
    """Looks for an alarm in the store that the ranks met by; answers it with what this rank does, and keeps what the
    others answer. Who gives no answer has ended or is stopped."""

    def __init__(self, store: Any, rank: int, ranks: list[int]) -> None:
        super().__init__(name="plan", daemon=True)
        self.store, self.rank, self.ranks = store, rank, ranks
        self.doing, self.count = "nothing yet", 0
        self.answers: dict[int, tuple[int, str]] = {}  # of each rank, which operation it is in, and what that is
        self.unreachable = ""  # why the store cannot be read any more
        self.wanted, self.alarmed = threading.Event(), threading.Event()  # here, and by any rank
        self.settled, self.ended = threading.Event(), threading.Event()
        self.start()
        atexit.register(self.close)

    def close(self) -> None:
        self.ended.set()
        self.wanted.set()
        self.join(3 * PERIOD)  # a store that is stopped holds it up

    def run(self) -> None:
        try:
            while not self.wanted.is_set() and not self.store.check(["alarm"]):
                self.wanted.wait(PERIOD)
            if self.ended.is_set():
                return
            self.alarmed.set()
            self.store.set("alarm", str(self.rank))
            self.store.set(f"answer/{self.rank}", f"{self.count} {self.doing}")
            self.collect(time.monotonic() + PATIENCE)
        except RuntimeError as error:  # the process that holds the store is gone; a failure says so
            self.unreachable = str(error).splitlines()[0]
        self.settled.set()

    def collect(self, until: float) -> None:
        while len(self.answers) < len(self.ranks):
            for rank in self.ranks:
                if rank not in self.answers and self.store.check([f"answer/{rank}"]):
                    count, doing = self.store.get(f"answer/{rank}").decode().split(" ", 1)
                    self.answers[rank] = int(count), doing
            if time.monotonic() > until:
                return
            time.sleep(PERIOD / 2)

    def blame(self) -> str:
        """Who is at fault, by what the ranks answer to an alarm."""
        if self.ended.is_set():
            return "the plan was closed before, so that no rank is asked"
        self.wanted.set()
        settled = self.settled.wait(3 * PERIOD + PATIENCE)
        held = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # by rank 0, unless the launcher holds it
        if self.rank == 0 and held:
            time.sleep(PARTING)
        if not self.answers and (self.unreachable or not settled):
            who = "rank 0, which holds the store," if held else "the launcher, which holds the store,"
            return f"{who} does not answer: ended, or stopped{f' ({self.unreachable})' if self.unreachable else ''}"
        silent = [r for r in self.ranks if r not in self.answers]
        if silent:
            return f"{_listed(silent)} not answer: ended, or stopped"
        first, last = min(self.answers.values())[0], max(self.answers.values())[0]
        late = [f"rank {r} did not come, it was {doing}" for r, (n, doing) in self.answers.items() if n == first < last]
        return "; ".join(late) or "all ranks answer, and are in the same operation"


def _listed(ranks: list[int]) -> str:
    return f"rank {ranks[0]} does" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} do"


class Ranks:
    """The ranks along one axis of a mesh, this rank's place among them, and their operations.

    Each operation says what it is; if it fails, or takes longer than the time-out, a RuntimeError says so, and names
    the rank that is at fault."""

    def __init__(self, mesh: DeviceMesh, axis: str, timeout: timedelta) -> None:
        self.timeout = timeout
        self.members = dist.get_process_group_ranks(mesh.get_group(axis))
        self.size, self.rank = len(self.members), mesh.get_local_rank(axis)
        self.watch: Watch | None = None
        if self.size > 1:
            found: Any = distributed_c10d._get_default_store()
            store = distributed_c10d.PrefixStore(f"plan/{next(_made)}/{self.members[0]}", found.clone())
            self.watch = Watch(store, self.members[self.rank], self.members)
            with self.operation("Plan"):
                self.group = dist.new_group(self.members, timeout=timeout, use_local_synchronization=True)

    def close(self) -> None:
        """Stop looking for alarms."""
        if self.watch is not None:
            self.watch.close()

    @contextmanager
    def operation(self, what: str) -> Iterator[None]:
        """Around all that waits for other ranks."""
        watch = self.watch
        assert watch is not None
        watch.count, watch.doing = watch.count + 1, what
        try:
            if watch.alarmed.is_set():
                raise RuntimeError("another rank failed before")
            yield
        except Exception as error:
            cause = (str(error) or type(error).__name__).splitlines()[0][:200]
            with _terminated_later() as said:
                said.append(f"{what}: {watch.blame()}. This is rank {watch.rank} of {self.members}; it saw: {cause}")
            raise RuntimeError(said[0]) from error
        watch.doing = f"past {what}"

    def gather(self, x: Tensor, what: str) -> Tensor:
        """What every rank has of a value, in their order: [ranks, ...]."""
        if self.size == 1:
            return x[None]
        if x.dtype == torch.bool:
            return self.gather(x.to(torch.uint8), what).bool()
        out = x.new_empty((self.size, *x.shape))
        with self.operation(what):
            dist.all_gather(list(out), x.contiguous(), group=self.group, async_op=True).wait(self.timeout)
        return out

    def scatter_sum(self, x: Tensor, what: str) -> Tensor:
        """The sum over ranks of what they have for this one: of [ranks, ...] this rank's [...]."""
        if self.size == 1:
            return x[0]
        out = x.new_empty(x.shape[1:])
        with self.operation(what):
            given = list(x.contiguous())
            dist.reduce_scatter(out, given, group=self.group, async_op=True).wait(self.timeout)
        return out

    def total(self, x: Tensor, what: str) -> Tensor:
        """The sum over ranks, in place."""
        if self.size > 1:
            with self.operation(what):
                dist.all_reduce(x, group=self.group, async_op=True).wait(self.timeout)
        return x

    def pass_on(self, values: list[Tensor], what: str) -> Passing:
        """Send values to the next rank of the ring, and take those of the one before."""
        return Passing(self, values, what)


@contextmanager
def _terminated_later() -> Iterator[list[str]]:
    """Let a SIGTERM wait until it is known who failed: a launcher that sees a rank end sends one to the others at once.
    Then what was said is printed before it."""
    said: list[str] = []
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield said
        return
    came = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: came.set())
    try:
        yield said
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if came.is_set():
            print(*said, file=sys.stderr, flush=True)
            signal.raise_signal(signal.SIGTERM)


class Passing:
    """Values on their way to the next rank."""

    def __init__(self, ranks: Ranks, values: list[Tensor], what: str) -> None:
        self.ranks, self.what, self.sent = ranks, what, [_bytes(v.contiguous()) for v in values]
        self.types = [v.dtype for v in values]
        self.taken = [torch.empty_like(v) for v in self.sent]
        self.works: list[Any] = []
        if ranks.size > 1 and values:
            after = ranks.members[(ranks.rank + 1) % ranks.size]
            before = ranks.members[(ranks.rank - 1) % ranks.size]
            calls = [dist.P2POp(dist.isend, v, after, ranks.group) for v in self.sent]
            calls += [dist.P2POp(dist.irecv, v, before, ranks.group) for v in self.taken]
            with ranks.operation(what):
                self.works = dist.batch_isend_irecv(calls)

    def wait(self) -> list[Tensor]:
        if self.ranks.size == 1:
            return [v.view(t) for v, t in zip(self.sent, self.types)]
        if self.works:
            with self.ranks.operation(self.what):
                for work in self.works:
                    work.wait(self.ranks.timeout)
        return [v.view(t) for v, t in zip(self.taken, self.types)]


def _bytes(x: Tensor) -> Tensor:
    """A value of a type that every group sends."""
    return x.view(torch.uint8) if x.dtype == torch.bool else x


class Gathered(torch.autograd.Function):
    """A value of every rank [ranks, ...]; its gradient is the sum of what the ranks have for each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks, what: str) -> Tensor:
        ctx.ranks, ctx.what = ranks, what
        return ranks.gather(x, f"{what}, forward")

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None, None]:
        return ctx.ranks.scatter_sum(d, f"{ctx.what}, backward"), None, None


def gathered(ranks: Ranks, x: Tensor, what: str) -> Tensor:
    """What every rank has of a value [ranks, ...], with gradients where there are any."""
    if x.is_complex():
        return torch.view_as_complex(gathered(ranks, torch.view_as_real(x), what).contiguous())
    if not x.is_floating_point():
        return ranks.gather(x, f"{what}, forward")
    out: Tensor = Gathered.apply(x, ranks, what)  # type: ignore[no-untyped-call]
    return out
