"""What other libraries' tuning costs: their kernels compiled by many processes at once, and chosen among quickly.

fla tries some 300 kernels at the first call of a shape, minutes in one process. Here each of many processes compiles
its share into one cache and launches nothing; the processes that time then choose among all, from the cache."""

from __future__ import annotations

from typing import Any

from triton import testing
from triton.compiler.errors import CompileTimeAssertionFailure
from triton.runtime.autotuner import Autotuner
from triton.runtime.errors import OutOfResources, PTXASError
from triton.runtime.jit import JITFunction

WARM_MS, TRIED_MS = 3, 15  # for each kernel that is tried
NEVER = [float("inf")] * 3
TUNED: dict[str, Autotuner] = {}


def compile_share(share: int, shares: int) -> None:
    """From now on kernels are compiled and not launched, and of those to choose among only this process's share.

    All shares run the same calls, and so count alike."""
    compiled = JITFunction.run
    tried = Autotuner.run
    count = 0

    def run(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **more: Any) -> Any:
        return compiled(self, *args, grid=grid, warmup=True, **more)

    def choose(self: Autotuner, *args: Any, **more: Any) -> Any:
        self.cache.clear()  # what is chosen for one shape is compiled for the next, too
        self.cache_results = False  # nothing is timed here: no process may take its choice from this one
        return tried(self, *args, **more)

    def bench(self: Autotuner, *args: Any, config: Any, **more: Any) -> list[float]:
        nonlocal count
        count += 1
        if count % shares != share:
            return NEVER
        try:
            self.fn.run(*args, **{**more, **config.all_kwargs()})
        except (OutOfResources, CompileTimeAssertionFailure, PTXASError):  # Triton leaves these out, too
            return NEVER
        return [0.0] * 3

    setattr(JITFunction, "run", run)  # noqa: B010
    setattr(Autotuner, "run", choose)  # noqa: B010
    setattr(Autotuner, "_bench", bench)  # noqa: B010


def choose_quickly() -> None:
    """Try each kernel for a shorter time than Triton does; the fastest of hundreds stays the same, or nearly so."""
    tried = Autotuner._bench

    def briefly(call: Any, quantiles: Any) -> Any:
        return testing.do_bench(call, warmup=WARM_MS, rep=TRIED_MS, quantiles=quantiles)

    def bench(self: Autotuner, *args: Any, config: Any, **more: Any) -> Any:
        TUNED[self.base_fn.__name__] = self
        return tried(self, *args, config=config, **more)

    setattr(Autotuner, "do_bench", property(lambda self: briefly))  # noqa: B010
    setattr(Autotuner, "_bench", bench)  # noqa: B010


def chosen() -> dict[str, str]:
    """What was chosen in this process: each kernel's time when it was tried, and how it is compiled."""
    return {name: f"{t.configs_timings[t.best_config][0]:.4f} ms, {t.best_config}" for name, t in TUNED.items()
            if t.best_config in t.configs_timings}  # fmt: skip
