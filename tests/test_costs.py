"""The model of what schedules cost: counts by hand, counts of the derived kernels, what follows from them."""

from __future__ import annotations

import math
from dataclasses import replace

import cases
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkc.costs import (
    LAUNCH,
    MACHINES,
    Estimate,
    Launch,
    Scan,
    cheapest,
    estimates,
    least_bytes,
    least_operations,
    least_seconds,
    limit,
)
from chunkc.driver import compile_source
from chunkc.facts import facts
from chunkc.ir.diagnostics import SourceFile

H200 = MACHINES["h200"]
WIDE = Scan(8, 4096, 4, 128, 256, gate_i="each")  # gated linear attention, keys 128 and values 256
THIN = replace(WIDE, gate_i="head")
SQUARE = Scan(8, 4096, 16, 128, 128, gate_i="each")


def of(s: Scan, schedule: str, backward: bool = False, machine: str = "h200") -> Estimate:
    return next(e for e in estimates(s, MACHINES[machine], backward) if e.schedule == schedule)


# -- counts by hand ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("s, forward, backward", [
    (WIDE, 128 * 6 + 256 * 4, 3072),  # q, k, g of 128, v, o of 256, two bytes each; twice, without o, with gradients
    (THIN, 1536 + 2, 2560 + 4),
    (replace(WIDE, gate_i="none"), 1536, 2560),
    (replace(THIN, constant=True), 1536, 2560),
    (replace(WIDE, width=4), 2 * 1792, 2 * 3072),
    (replace(WIDE, reads=2), 1792 + 2 * (128 + 256), 3072 + 2 * (2 * 128 + 256)),
    (replace(WIDE, gate_j="each"), 1792 + 512, 3072 + 1024),
])  # fmt: skip
def test_least_bytes(s: Scan, forward: int, backward: int) -> None:
    assert least_bytes(s) == s.rows * forward
    assert least_bytes(s, backward=True) == s.rows * backward


def test_least_operations() -> None:
    assert least_operations(WIDE) == WIDE.rows * 4 * 128 * 256  # into the state, and out of it
    assert least_operations(WIDE, backward=True) == 2 * least_operations(WIDE)


def test_limits_on_an_h200() -> None:
    """235 and 403 MB at 4.27 TB/s."""
    assert limit(WIDE, H200) == pytest.approx(0.055e-3, rel=0.01)
    assert limit(WIDE, H200, backward=True) == pytest.approx(0.094e-3, rel=0.01)
    assert least_seconds(1e12, 1.0, 2e12, 1e15) == 0.5 and least_seconds(1.0, 1e15, 2e12, 4e15) == 0.25


@pytest.mark.parametrize("decay, apart, levels", [
    (0.0, 64, 1), (1.26, 64, 1), (1.28, 32, 2), (5.3, 16, 3), (5.4, 8, 4), (80.0, 2, 6), (81.0, 1, 6), (math.inf, 1, 6),
])  # fmt: skip
def test_levels_follow_from_the_bound(decay: float, apart: int, levels: int) -> None:
    s = replace(WIDE, decay=decay)
    assert (s.apart, s.levels, s.score_products, s.value_products) == (apart, levels, levels, 1)
    assert (apart - 1) * decay <= 80 or apart == 1
    other = replace(s, gate_i="head", gate_j="each")
    assert (other.score_products, other.value_products) == (1, levels)
    assert replace(THIN, decay=decay).levels == 1  # scores are multiplied, not factored


def per_row(e: Estimate, s: Scan) -> tuple[float, float, float]:
    return e.total("bytes") / s.rows, e.total("operations") / s.rows, e.total("exps") / s.rows


def test_passes_by_hand() -> None:
    mild = replace(WIDE, decay=1.0)
    # k, g, v and the state at every 64th token; q, k, g, v, that state again, o
    moved = (256 + 256 + 512) + 1024 + (3 * 256 + 512) + 1024 + 512
    # scores 2 64 128, by values 2 64 256, q S and k v 2 128 256 each
    done = 2 * 64 * 128 + 2 * 64 * 256 + 2 * (2 * 128 * 256)
    assert (moved, done) == (4864, 180224)
    # to the edge in the walk, for each of four blocks of values; as query and key, from the edge
    assert per_row(of(mild, "passes"), mild) == (moved, done, 4 * 128 + 2 * 128 + 128)
    # five more products of scores, four more exponentials a key
    assert per_row(of(WIDE, "passes"), WIDE) == (moved, done + 5 * 2 * 64 * 128, 4 * 128 + 6 * 128 + 128)
    # q, g, do and the gradient of the state; all operands, do, both states, four gradients
    moved = (256 + 256 + 512) + 1024 + (3 * 256 + 2 * 512) + 2 * 1024 + (3 * 256 + 512)
    done = 3 * 2 * 64 * 128 + 2 * 2 * 64 * 256 + 4 * (2 * 128 * 256)
    assert (moved, done) == (7168, 376832)
    assert per_row(of(mild, "passes", True), mild)[:2] == (moved, done)
    assert per_row(of(WIDE, "passes", True), WIDE)[:2] == (moved, done + 3 * 5 * 2 * 64 * 128)


def test_fused_by_hand() -> None:
    """Four slices of 64 values fill 128 of 132 multiprocessors; scores and exponentials are those of four."""
    mild = replace(WIDE, decay=1.0)
    found = of(mild, "fused")
    (launch,) = found.launches
    assert (launch.programs, launch.steps, launch.block) == (128, 64, 128 * 64)
    assert launch.bytes == least_bytes(mild) and launch.again == mild.rows * 3 * (3 * 256)
    assert launch.operations == mild.rows * (4 * 2 * 64 * 128 + 2 * 64 * 256 + 4 * 128 * 256)
    assert launch.exps == mild.rows * 4 * 4 * 128  # as query, as key, from and to the edge
    back = of(replace(mild, j=64), "fused", True)  # one slice: no parts to add
    one = replace(mild, j=64)
    states = 2 * 128 * 64 // 64 * 2  # one written and read a tile
    assert [x.name for x in back.launches] == ["fused"]
    assert back.launches[0].bytes == one.rows * ((512 + 128) + states + (768 + 256) + (768 + 128))
    assert [x.name for x in of(mild, "fused", True).launches] == ["fused", "sums"]


def test_split_by_hand() -> None:
    long = Scan(1, 131072, 4, 128, 128, gate_i="each")
    found = of(long, "split")
    walk, completed, tiles = found.launches
    n = found.segments
    assert n == long.segments == 32 and [x.name for x in found.launches] == ["states", "completed", "tiles"]
    assert walk.programs == completed.programs == 4 * 4 * n and walk.steps == completed.steps == 2048 // n
    kept = 4 * n * 128 * 128 * 4
    assert walk.bytes == long.rows * (768 + 512) + kept
    assert completed.bytes == kept + long.rows * 2 * 512 * (n - 1) // n and completed.again == kept * (n - 1) / 2
    assert tiles == of(long, "passes").launches[-1]
    assert replace(long, tokens=4096).segments == replace(long, batch=16).segments == 1
    assert replace(long, batch=8).segments == 32 and replace(long, batch=8, gate_i="head").segments == 1
    assert "one" in of(replace(long, tokens=4096), "split").why_not


# -- the derived kernels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, s", [
    ("gated", Scan(1, 64, 1, 24, 40, gate_i="each")), ("value_gate", Scan(1, 64, 1, 24, 40, gate_j="each")),
    ("scalar_gate", Scan(1, 64, 1, 24, 40, gate_i="head")), ("no_gate", Scan(1, 64, 1, 24, 40)),
    ("product_gate", Scan(1, 64, 1, 24, 40, gate_i="each", gate_j="each")),
])  # fmt: skip
def test_the_model_moves_what_the_derived_kernels_move(name: str, s: Scan) -> None:
    """Elements of a tile, by the graphs that launches are printed from."""
    (found,) = facts(compile_source(SourceFile(f"{name}.spec", cases.OPS[name])))[0]["recurrences"]
    sizes = {"h": 1, "i": 24, "j": 40}
    moved = {k["name"]: sum(t["count"] * math.prod(sizes[a] for a in t["axes"]) for t in k["elements"])
             for k in found["kernels"]}  # fmt: skip
    walk, tiles = of(s, "passes").launches
    ends, _ = of(s, "passes", True).launches
    assert [x.bytes / 2 for x in (walk, tiles, ends)] == [moved[k] for k in ("states", "read_j", "ends")]


# -- time --------------------------------------------------------------------------------------------------------------


def test_what_a_launch_takes() -> None:
    one = Launch("x", 4.272e9, 0, 0, 132)
    assert one.times(H200, 2)["bytes"] == pytest.approx(1e-3)
    assert one.seconds(H200, 2) == pytest.approx(1e-3 + LAUNCH)
    assert replace(one, programs=133).seconds(H200, 2) == pytest.approx(2e-3 * 132 / 133 + LAUNCH)  # a second wave
    assert replace(one, programs=33).seconds(H200, 2) == pytest.approx(4e-3 + LAUNCH)  # a quarter of the machine
    assert replace(one, again=2 * 4.272e9).times(H200, 2)["cache"] == pytest.approx(1.5e-3)
    done = replace(one, bytes=0, operations=7.9152e11)
    assert done.times(H200, 2)["operations"] == pytest.approx(1e-3)
    assert done.times(H200, 4)["operations"] > 10e-3  # float32 products are not on tensor cores
    assert replace(one, exps=132 * 16 * 1.75e6).times(H200, 2)["exps"] == pytest.approx(1e-3)
    walk = replace(one, bytes=0, steps=1000, links=4, block=8192)  # two of these fit a multiprocessor
    assert walk.times(H200, 2)["steps"] == pytest.approx(1e-3)
    assert replace(walk, programs=264).times(H200, 2)["steps"] == pytest.approx(1e-3)
    assert replace(walk, programs=265).times(H200, 2)["steps"] == pytest.approx(2e-3)


@pytest.mark.parametrize("s, backward, wanted, bound", [
    (THIN, False, "fused", "steps"),  # as many slices as fill the machine, nothing moved twice
    (WIDE, True, "passes", "bytes"),  # parts of gradients are more than states
    (Scan(2, 16384, 16, 128, 128, gate_i="each"), False, "passes", "bytes"),  # too few slices: exponentials
    (Scan(1, 131072, 4, 128, 128, gate_i="each"), False, "split", "bytes"),  # sixteen programs for a long walk
    (Scan(1, 131072, 4, 128, 128, gate_i="head"), True, "split", "bytes"),
])  # fmt: skip
def test_which_is_cheapest(s: Scan, backward: bool, wanted: str, bound: str) -> None:
    found = cheapest(estimates(s, H200, backward))
    assert (found.schedule, found.bound) == (wanted, bound)


def test_what_cannot_be() -> None:
    large = of(replace(WIDE, i=1024), "fused")
    assert large.why_not and not large.launches and large.seconds == math.inf
    assert not of(replace(WIDE, i=1024), "fused", machine="mi300x").why_not  # twice the registers
    assert of(replace(WIDE, tokens=4096), "split").why_not and not of(replace(WIDE, tokens=4097), "split").why_not


scans = st.builds(
    Scan, batch=st.integers(1, 16), tokens=st.integers(1, 1 << 17), heads=st.integers(1, 64), i=st.integers(1, 512),
    j=st.integers(1, 512), width=st.sampled_from([2, 4]), gate_i=st.sampled_from(["none", "head", "each"]),
    gate_j=st.sampled_from(["none", "each"]), constant=st.booleans(), decay=st.floats(0, 100) | st.just(math.inf),
    writes=st.integers(1, 3), reads=st.integers(1, 3),
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(scans, st.sampled_from(sorted(MACHINES)), st.booleans())
def test_no_schedule_beats_the_limit(s: Scan, machine: str, backward: bool) -> None:
    found = estimates(s, MACHINES[machine], backward)
    assert [e.schedule for e in found] == ["fused", "passes", "split"]
    assert all(e.seconds >= limit(s, MACHINES[machine], backward) for e in found)
    assert all((e.seconds == math.inf) == bool(e.why_not) == (not e.launches) for e in found)
    assert cheapest(found).seconds == min(e.seconds for e in found) < math.inf
    # the same work with more sequences takes no less, and on a machine that is better in all, no more
    more = estimates(replace(s, batch=2 * s.batch), MACHINES[machine], backward)
    assert all(b.seconds >= 0.999 * a.seconds for a, b in zip(found, more))
    if machine == "h100":
        assert all(b.seconds <= a.seconds for a, b in zip(found, estimates(s, H200, backward)))


def test_the_machines() -> None:
    assert {m.target for m in MACHINES.values()} == {"sm_80", "sm_90", "gfx942"}
    # measured: a copy on an H200 and on an H100, a large product
    assert H200.bandwidth == pytest.approx(4.27e12, rel=0.01)
    assert MACHINES["h100"].bandwidth == pytest.approx(3.0e12, rel=0.02)
    assert H200.rate(2) == pytest.approx(790e12, rel=0.01)


@pytest.mark.parametrize("launch, decay, measured", [
    ("states", 1.0, 0.20), ("tiles", 1.0, 0.33), ("", 1.0, 0.53), ("", math.inf, 0.87),
])  # fmt: skip
def test_against_kernels_written_by_hand(launch: str, decay: float, measured: float) -> None:
    """Milliseconds on an H200: the model is of kernels without a stall, so below, and not by much more than half."""
    found = of(replace(SQUARE, decay=decay), "passes")
    times = [x.seconds(H200, 2) for x in found.launches if launch in ("", x.name)]
    assert 0.4 * measured < sum(times) * 1e3 < measured
