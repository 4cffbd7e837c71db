"""The suite of speed: all of its code on a CPU, rows that fail, and what is judged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import report as reports
import tasks
from candidates import Peer
from ops import OPS, Shape
from rows import GROUPS, LARGE, OURS, SIMPLE, Case, Must, Row, rows

from chunkc.bench.run import attempt

ROOT = Path(__file__).resolve().parent.parent
FLA = {
    "gla": """import torch
def chunk_gla(q, k, v, g, scale):
    S, out = 0, []
    for t in range(q.shape[1]):
        S = torch.exp(g[:, t])[..., None] * S + k[:, t, :, :, None] * v[:, t, :, None]
        out.append((q[:, t, :, :, None] * S).sum(2) * scale)
    return torch.stack(out, 1), None
""",
    "simple_gla": """from fla.ops.common import chunk_o
from fla.ops.gla import chunk_gla
def chunk_simple_gla(q, k, v, g=None, g_gamma=None, scale=None):
    if g is not None and not chunk_o.TRITON_ABOVE_3_7_1:
        raise RuntimeError("not on this GPU")
    gate = 0 * k[..., 0] if g is None and g_gamma is None else 0 * k[..., 0] + g_gamma if g is None else g
    return chunk_gla(q, k, v, gate[..., None], scale)
""",
    "retention": "import os\ndef chunk_retention(q, k, v, scale):\n    raise MemoryError('too large')\n",
    "linear_attn": "def chunk_linear_attn(q, k, v, scale, normalize):\n    return v * scale, None\n",
    "common": "",
    "common/chunk_o": "TRITON_ABOVE_3_7_1 = False\n",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run on the CPU reports, beside a library named fla; it is a process, since tuning changes Triton."""
    folder = tmp_path_factory.mktemp("suite")
    for name, text in FLA.items():
        place = folder / "library" / "fla" / "ops" / name
        place.mkdir(parents=True)
        (place / "__init__.py").write_text(text)
    path = os.pathsep.join([str(folder / "library"), *filter(None, sys.path)])
    command = [sys.executable, str(ROOT / "benchmarks" / "suite.py"), "--check", "--out", str(folder / "out"),
               "--markdown", str(folder / "table.md")]  # fmt: skip
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads((folder / "out" / "speed.json").read_text())
    assert (folder / "out" / "speed.txt").read_text() in done.stdout
    table = [line for line in (folder / "table.md").read_text().splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(report["rows"])
    return report


def test_every_row_is_there_right_and_timed(found: Mapping[str, Any]) -> None:
    assert [row["group"] for row in found["rows"]] == [row.group for row in rows(tiny=True)]
    assert {row["group"] for row in found["rows"]} == set(GROUPS)
    for row in found["rows"]:
        assert row["error"] < 1e-5 and "reason" not in row["ours"]
        assert row["ours"]["forward_ms"] > 0 and (row["mode"] == "step" or row["ours"]["both_ms"] > 0)


def test_every_op_is_right_on_every_gate(found: Mapping[str, Any]) -> None:
    checks = found["checks"]
    assert all(check["right"] and check["error"] < 1e-5 for check in checks.values())
    assert all(check["repeats"] and check["prefix"] in (True, None) for check in checks.values())
    for op in OPS.values():
        for gate in op.gates:
            assert any(key.startswith(f"{op.name} ") and f" {gate} whole" in key for key in checks)


def test_peers_are_called_the_same_function(found: Mapping[str, Any]) -> None:
    """Errors in float32 are small where the arguments are right; the library's wrong function shows."""
    errors = {(e["name"], e["op"]): e["error"] for e in found["errors"]}
    for key in (("fla.chunk_gla", "gla"), ("fla.chunk_gla", "gla_bounded"), (SIMPLE, "retention"),
                (SIMPLE, "linear_attention"), (SIMPLE, "scalar_gate")):  # fmt: skip
        assert errors[key] < 1e-5, key
    assert errors["fla.chunk_linear_attn", "linear_attention"] > 0.1


def test_what_refuses_and_fails_is_a_row(found: Mapping[str, Any]) -> None:
    (retention, *_) = (row for row in found["rows"] if row["group"] == "retention")
    assert [r["name"] for r in retention["rivals"]] == ["fla.chunk_retention", SIMPLE]
    assert retention["rivals"][0]["reason"] == "MemoryError: too large" and retention["rivals"][1]["both_ms"] > 0
    text = reports.text(found)
    assert "fla.chunk_retention: MemoryError: too large" in text


def test_a_refusal_is_reported_and_then_lifted(monkeypatch: pytest.MonkeyPatch) -> None:
    library = ModuleType("fla.ops.common.chunk_o")
    library.TRITON_ABOVE_3_7_1 = False  # type: ignore[attr-defined]
    for name in ("fla", "fla.ops", "fla.ops.common"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, library.__name__, library)

    def backward() -> None:
        if not library.TRITON_ABOVE_3_7_1:
            raise RuntimeError("not on this GPU")

    assert Peer(SIMPLE).stock(backward) == "RuntimeError: not on this GPU"
    assert Peer(SIMPLE).stock(backward) == ""


# -- what is judged ----------------------------------------------------------------------------------------------------

CASE = Case("gla", LARGE[0], "logsigmoid/16")
RATES = {"bandwidth": 4e12, "rate": 7e14}


def judged(row: Row, ours: Mapping[str, Any], *rivals: Mapping[str, Any]) -> dict[str, Any]:
    timed = {(OURS, row.case.key()): ours} | {(n, c.key()): r for (n, c), r in zip(row.rivals, rivals)}
    return reports.entry(row, timed, {}, RATES, "bf16")


def test_ratios_are_to_the_fastest_rival() -> None:
    row = Row("gla", CASE, (("a", CASE), ("b", CASE)), (Must("times", 2.0, 3.0),))
    slow, fast = {"forward_ms": 3.0, "both_ms": 6.0}, {"forward_ms": 2.0, "both_ms": 9.0}
    good = judged(row, {"forward_ms": 1.0, "both_ms": 2.0}, slow, fast)
    assert (good["times_forward"], good["times_both"], good["musts"][0]["met"]) == (2.0, 3.0, True)
    assert not judged(row, {"forward_ms": 1.0, "both_ms": 2.1}, slow, fast)["musts"][0]["met"]
    assert not judged(row, {"reason": "wrong"}, slow, fast)["musts"][0]["met"]
    assert not judged(row, {"forward_ms": 1.0, "both_ms": 2.0}, {"reason": "refused"})["musts"][0]["met"]


def test_limits_are_bytes_that_must_move() -> None:
    """Five tensors forward; backward reads four and the output's gradient, and writes four: 14 in all."""
    one = 2 * 8 * 4096 * 16 * 128
    found = judged(Row("gla", CASE), {"forward_ms": 1.0, "both_ms": 1.0})
    assert found["limit_forward_ms"] == pytest.approx(5 * one / 4e9) and found["limit_share_both"] == pytest.approx(
        14 * one / 4e9
    )


def test_a_step_is_judged_by_its_replay_and_its_launches() -> None:
    shape = Shape(64, 1, 16, 128, 128)
    row = Row("decode", Case("gla", shape, "zero", "step"), (), (Must("limit", 0.75), Must("launches", 1)))
    least = (8 * 64 * 16 * 128 * 128 + 10 * 64 * 16 * 128) / 4e9
    good = judged(row, {"forward_ms": 1.0, "graph_forward_ms": least / 0.8, "launches": 1})
    assert good["limit_share_forward"] == pytest.approx(0.8) and [m["met"] for m in good["musts"]] == [True, True]
    bad = judged(row, {"forward_ms": least, "launches": 3})
    assert [m["met"] for m in bad["musts"]] == [False, False]


def test_the_mean_needs_every_shape() -> None:
    entries = [{"group": "gla", "gate": "logsigmoid/16", "times_both": n} for n in (2.0, 8.0)]
    assert reports.mean(entries)["times_both"] == pytest.approx(4.0) and reports.mean(entries)["met"]
    assert not reports.mean([*entries, {**entries[0], "times_both": None}])["met"]


# -- tasks -------------------------------------------------------------------------------------------------------------


def test_each_shape_of_a_candidate_has_a_process() -> None:
    """Gates share one, so that tuning is done once; a bound means nothing to a peer, which runs it in the same."""
    found = [(t["candidate"], t["cases"]) for t in tasks.timings(list(rows()))]
    for name, cases in found:
        assert len({Shape(**c["shape"]) for c in cases}) == 1
        assert len({c["op"] for c in cases}) == 1 or name == "fla.chunk_gla"
    first = next(cases for name, cases in found if name == "fla.chunk_gla")
    assert len(first) == 5


def test_peers_compile_for_the_lengths_that_are_timed() -> None:
    (share, *others) = tasks.fills(list(rows()), 3)
    assert len(others) == 2
    lengths = {c["shape"]["T"] for c in share["cases"]}
    assert lengths == {256, 265} and 3001 % 16 == 265 % 16


def test_packed_sequences_have_the_tokens_of_the_batch() -> None:
    for shape in (LARGE[0], Shape(2, 40, 2, 8, 8)):
        for mode in ("equal", "uneven"):
            lengths = Case("gla", shape, "zero", mode).lengths()
            assert sum(lengths) == shape.B * shape.T and min(lengths) >= 1
    assert Case("gla", LARGE[0], "zero", "equal").lengths() == [512] * 64


def test_a_process_that_dies_or_does_not_end_says_so(tmp_path: Path) -> None:
    for text, reason in (("import os; os.abort()", "killed by SIGABRT"), ("import time; time.sleep(60)", "stopped"),
                         ("import signal, time; signal.alarm(1); time.sleep(60)", "killed by SIGALRM")):  # fmt: skip
        (tmp_path / "worker.py").write_text(text)
        assert attempt({}, 3 if reason != "stopped" else 0.5, (str(tmp_path / "worker.py"),))["reason"].startswith(
            reason
        )
