"""`chunkc bench`: what is compared with what, the report, and candidates that are wrong, die or do not end."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import attentions
import constructs
import pytest
import torch

from chunkc import cli
from chunkc.bench import run as running
from chunkc.bench.costs import cost
from chunkc.bench.match import OTHER, READY, SAME, Matcher
from chunkc.bench.parts import Part, parts_of
from chunkc.bench.peers import PEERS
from chunkc.bench.roles import roles_of
from chunkc.bench.run import attempt
from chunkc.bench.sizes import BenchError, Sizes, read_shape, resolve
from chunkc.bench.worker import Emitted, compared
from chunkc.driver import compile_source
from chunkc.ir.diagnostics import SourceFile

ROOT = Path(__file__).resolve().parent.parent
AXES = "axes { t: time, h = heads, i = dk, j = dv }"
GLA = f"""causal op gla(heads: int, dk: int, dv: int) {{
  {AXES}
  input q[t, h, i], k[t, h, i], v[t, h, j], g[t, h, i] in [-inf, 0]
  recurrence over t {{
    state S[h, i, j]
    S = exp(g) * S + k * v
    o = sum[i](q * S) * size(i)^-0.5
  }}
  output o
}}
"""
RAW = GLA.replace("g[t, h, i] in [-inf, 0]", "g[t, h, i] in [0, 1]").replace("exp(g)", "g")
SCALAR = GLA.replace("g[t, h, i]", "g[t, h]")
VALUE_SIDE = GLA.replace("g[t, h, i]", "g[t, h, j]")
DELTA = f"""causal op delta(heads: int, dk: int, dv: int) {{
  {AXES}
  input q[t, h, i], k0[t, h, i], v[t, h, j], b[t, h] in [0, 1], g[t, h] in [-inf, 0]
  k = l2_norm[i](k0)
  recurrence over t {{
    state S[h, i, j]
    D = exp(g) * S
    S = D + b * k * (v - sum[i](k * D))
    o = sum[i](q * S)
  }}
  output o
}}
"""
WINDOW = """causal op window(heads: int, dk: int) {
  axes { t: time, s = t, h = heads, i = dk }
  input q[t, h, i], k[s, h, i], v[s, h, i]
  attention o[t, h, i] over s {
    logit = 0.3 * dot[i](q, k)
    value = v
    mask = s <= t and (t - s < 100 or s < 2)
  }
  output o
}
"""
FLA = {
    "gla": "import torch\n"
    "def chunk_gla(q, k, v, g, scale):\n"
    "    S, out = 0, []\n"
    "    for t in range(q.shape[1]):\n"
    "        S = torch.exp(g[:, t])[..., None] * S + k[:, t, :, :, None] * v[:, t, :, None]\n"
    "        out.append((q[:, t, :, :, None] * S).sum(2) * scale)\n"
    "    return torch.stack(out, 1), None\n",
    "linear_attn": "def chunk_linear_attn(q, k, v, scale, normalize):\n    return v * scale, None\n",
    "retention": "import os\ndef chunk_retention(q, k, v, scale):\n    os.abort()\n",
    "simple_gla": "import time\ntime.sleep(600)\n",
    "kda": "raise RuntimeError('no such GPU')\n",
}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own, and processes that can import what this one can."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    Path("gla.spec").write_text(GLA)
    return tmp_path


@pytest.fixture
def fla(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library of that name with one right function; others are wrong, die, do not end, or cannot be imported."""
    for name, text in FLA.items():
        folder = place / "library" / "fla" / "ops" / name
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(text)
    monkeypatch.syspath_prepend(str(place / "library"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))


@pytest.fixture
def canned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates that do not run: a copy moves 1 TB/s, and each takes a millisecond."""

    def answer(request: Mapping[str, Any], limit: float) -> dict[str, Any]:
        if request["candidate"] == "rates":
            return {"bandwidth": 1e12, "rate": 1e15}
        return {"forward_ms": 1.0, "both_ms": 2.0, "first_s": 0.1, "error": 1e-7}

    monkeypatch.setattr(running, "attempt", answer)


def parts(text: str) -> list[Part]:
    compiled = compile_source(SourceFile("case.spec", text))
    return parts_of(compiled, compiled.checked.module.units[-1])


def sized(part: Part, shape: str) -> Sizes:
    return resolve(part.unit, roles_of(part.unit.graph), {}, read_shape(shape), "cpu")


def compare(part: Part, shape: str = "T=12,H=2,K=8,V=4") -> dict[str, tuple[str, float]]:
    return {m.peer.name: (m.compared, m.scale) for m in Matcher(part, sized(part, shape), 0).matches()}


# -- what is compared --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "peer", "how", "scale"),
    [
        (GLA, "fla.chunk_gla", SAME, 8**-0.5),
        (RAW, "fla.chunk_gla", READY, 8**-0.5),
        (SCALAR, "fla.chunk_simple_gla", SAME, 8**-0.5),
        (GLA.replace("exp(g) * ", ""), "fla.chunk_linear_attn", SAME, 8**-0.5),
        (GLA.replace("exp(g)", "0.9"), "fla.chunk_simple_gla", SAME, 8**-0.5),
        (GLA.replace("+ k * v", "+ 2 * k * v"), "fla.chunk_gla", SAME, 2 * 8**-0.5),
        (VALUE_SIDE, "fla.chunk_gla", OTHER, 8**-0.5),
        (GLA.replace("sum[i](q * S)", "tanh(sum[i](q * S))"), "fla.chunk_gla", OTHER, 8**-0.5),
        (DELTA, "fla.chunk_gated_delta_rule", READY, 1.0),
    ],
)
def test_peers_of_recurrences(text: str, peer: str, how: str, scale: float) -> None:
    (part,) = parts(text)
    found = compare(part)
    assert found[peer] == (how, pytest.approx(scale))
    assert {name for name in found if name.startswith("fla")} == {peer}
    assert found["sdpa"][0] == OTHER


@pytest.mark.parametrize(
    ("name", "peer", "how"),
    [
        ("gated_linear_attention", "fla.chunk_gla", SAME),
        ("retention", "fla.chunk_retention", SAME),
        ("rwkv6", "fla.chunk_rwkv6", SAME),
        ("mamba2", "fla.chunk_simple_gla", OTHER),
        ("causal_attention", "sdpa", SAME),
        ("cross_attention", "sdpa", SAME),
        ("alibi", "sdpa", OTHER),
        ("document_attention", "sdpa", OTHER),
    ],
)
def test_peers_of_shipped_layers(name: str, peer: str, how: str) -> None:
    whole, *cores = parts((ROOT / "specs" / f"{name}.spec").read_text())
    assert whole.unit.kind == "layer" and [c.unit.kind for c in cores] == ["op"]
    shape = "T=12,h=2,K=8" if "attention" in name else "T=12"
    assert compare(cores[0], shape)[peer][0] == how


def test_what_has_no_core_and_no_peer() -> None:
    """What is complex or over chunks is no input of an op, and no operand of a peer."""
    assert [p.unit.kind for p in parts(constructs.SPECS["s4"])] == ["layer"]
    assert compare(parts(attentions.OPS["summary"])[0], "T=12") == {}


def test_a_window_is_not_taken_for_all_rows() -> None:
    """Short sequences do not show the difference; the mask at the length that is timed does."""
    (part,) = parts(WINDOW)
    assert compare(part, "T=90")["sdpa"][0] == SAME
    found = compare(part, "T=200")
    assert found["flex"] == (SAME, 0.3) and found["sdpa"][0] == OTHER


@pytest.mark.parametrize(
    ("name", "shape"), [("gru", "d=8,e=8"), ("linear_attention", "h=2,K=8"), ("sliding_window", "h=2,K=8")]
)
def test_cores_are_what_the_interpreter_says(name: str, shape: str, place: Path) -> None:
    """The check that goes before timing, of a layer and of what is cut out of it, in both types."""
    path = ROOT / "specs" / f"{name}.spec"
    whole, *cores = parts(path.read_text())
    sizes = sized(cores[0], f"T=20,{shape}").short(20)
    for index in range(1 + len(cores)):
        for dtype in ("bf16", "fp32"):
            request = {"file": str(path), "unit": whole.unit.name, "part": index, "seed": 0, "device": "cpu"}
            candidate = Emitted({**request, "dtype": dtype}, place / f"{dtype}{index}")
            candidate.prepare()
            error, allowed = compared(candidate, sizes, 0, candidate.dtype, True)
            assert error <= min(allowed, 0.05), (index, dtype, error, allowed)


# -- sizes and limits --------------------------------------------------------------------------------------------------


def test_sizes_follow_from_axes() -> None:
    whole, core = parts((ROOT / "specs" / "gated_linear_attention.spec").read_text())
    roles = roles_of(core.unit.graph)
    found = resolve(whole.unit, roles, {}, read_shape("B=3,T=7,H=2,K=8"), "cpu")
    assert found.named(whole.unit) == {"B": 3, "t": 7, "d": 32, "h": 2, "i": 8, "j": 16, "g_rank": 16}
    assert resolve(whole.unit, roles, {"low": 4}, read_shape("d=96"), "cuda").settings == {
        "d_model": 96, "heads": 4, "low": 4}  # fmt: skip
    for shape, why in (("H=2,K=8,V=9", "not 9"), ("z=1", "no axis 'z'"), ("T=1.5", "'T=1.5'"), ("d=9", "has no size")):
        with pytest.raises(BenchError, match=why):
            resolve(whole.unit, roles, {}, read_shape(shape), "cpu")


def test_the_limit() -> None:
    """Bytes as counted by hand: an element of q, k, v, g and o for each token and head, and their gradients."""
    (part,) = parts(GLA)
    least = cost(part, sized(part, "B=8,T=4096,H=4,K=128,V=256"), 2)
    tokens = 8 * 4096 * 4
    assert least.bytes_forward == tokens * 2 * (3 * 128 + 2 * 256)
    assert least.bytes_both == tokens * 2 * ((3 * 128 + 2 * 256) + (2 * (3 * 128 + 256) + 256))
    assert least.limits_ms(4.3e12, 1e18)[1] == pytest.approx(0.148, abs=1e-3)
    (window,) = parts(WINDOW)
    full = cost(window, sized(window, "B=1,T=100,H=1,K=16"), 2)
    narrow = cost(window, sized(window, "B=1,T=2000,H=1,K=16"), 2)
    assert full.operations_forward == pytest.approx(100 * 101 / 2 * (4 * 16 + 3), rel=0.1)
    assert narrow.operations_forward < 0.1 * 2000 * 2000 * (4 * 16 + 3)


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fla")
def test_a_report(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    """Processes and all: chunkc's own row, a peer that is right, one that is wrong, and one that dies."""
    peers = "fla.chunk_gla,fla.chunk_linear_attn,fla.chunk_retention"
    code = cli.run(["bench", "gla.spec", "--shape", "B=2,T=10,H=2,K=8,V=4", "--device", "cpu", "--against", peers,
                    "--json", "r.json", "--png", "r.png"])  # fmt: skip
    out, err = capsys.readouterr()
    assert code == 0, err
    report = json.loads(Path("r.json").read_text())
    rows = {row["candidate"]: row for row in report["parts"][0]["rows"]}
    for name in ("chunkc", "fla.chunk_gla"):
        assert rows[name]["reason"] is None and rows[name]["error"] < 1e-5
        assert 0 < rows[name]["forward_ms"] < rows[name]["both_ms"] * 2
        assert 0 < rows[name]["forward_of_limit"] < 1
    assert rows["fla.chunk_gla"]["compared"] == SAME
    assert "wrong: " in rows["fla.chunk_linear_attn"]["reason"] and rows["fla.chunk_linear_attn"]["both_ms"] is None
    assert rows["fla.chunk_retention"]["reason"] == "killed by SIGABRT"
    assert report["shape"] == {"B": 2, "t": 10, "h": 2, "i": 8, "j": 4}
    assert set(report) == {"schema", "spec", "unit", "device", "dtype", "seed", "settings", "shape", "versions",
                           "copy_bytes_per_s", "product_operations_per_s", "parts"}  # fmt: skip
    assert "op gla" in out and "limit" in out and "killed by SIGABRT" in out
    assert Path("r.png").read_bytes().startswith(b"\x89PNG")


def request_for(name: str) -> dict[str, Any]:
    """What a process is asked for, of a peer on the op above."""
    (part,) = parts(GLA)
    sizes = sized(part, "B=1,T=10,H=2,K=8,V=4")
    match = next(m for m in Matcher(part, sizes, 0).matches((name,)) if m.peer.name == name)
    return {"file": str(Path("gla.spec").resolve()), "unit": "gla", "part": 0, "settings": dict(sizes.settings),
            "lengths": dict(sizes.lengths), "batch": 1, "dtype": "fp32", "device": "cpu", "seed": 0, "candidate": name,
            "peer": PEERS.index(match.peer), "scale": 1.0, "masked": False,
            "operands": [asdict(o) for o in match.operands]}  # fmt: skip


@pytest.mark.usefixtures("fla")
@pytest.mark.parametrize(
    ("name", "seconds", "reason"),
    [("fla.chunk_simple_gla", 1.0, "stopped after 1 s"), ("fla.chunk_kda", 60.0, "RuntimeError: no such GPU")],
)
def test_candidates_that_fail_are_rows(name: str, seconds: float, reason: str) -> None:
    request = request_for("fla.chunk_gla") | {"peer": [p.name for p in PEERS].index(name), "candidate": name}
    assert attempt(request, seconds)["reason"] == reason


@pytest.mark.usefixtures("canned")
def test_peers_that_are_absent(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", "gla.spec", "--shape", "T=8,H=1,K=4,V=4", "--against", "fla.chunk_gla,fla.chunk_kda"]) == 0
    out, _ = capsys.readouterr()
    assert [" ".join(line.split()) for line in out.splitlines()[-3:]] == [
        "chunkc 1.000 6.4e-05 % 2.000 8.96e-05 % 0.1 1.0e-07",
        "fla.chunk_gla same function not installed",
        "fla.chunk_kda same shapes, other function not installed",
    ]


@pytest.mark.usefixtures("canned")
@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--shape", "x=3"], "no axis 'x': it has t, h, i, j"),
        (["--shape", "T"], "'T' is not an axis and its size"),
        (["--set", "dk=8", "--shape", "i=16"], "it is 8, not 16"),
        (["--set", "depth=1"], "no parameter 'depth'"),
        (["--unit", "other"], "no 'other': it has gla"),
        (["--against", "flash"], "no peer 'flash': there are fla.chunk_linear_attn"),
    ],
)
def test_what_cannot_be_asked_for(capsys: pytest.CaptureFixture[str], args: list[str], says: str) -> None:
    assert cli.run(["bench", "gla.spec", *args]) == 2
    assert says in capsys.readouterr().err


def test_files_and_devices_that_are_not_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.run(["bench", "nosuch.spec"]) == 1
    assert "error[cannot-read]" in capsys.readouterr().err
    assert cli.run(["bench", "-"]) == 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.run(["bench", "gla.spec", "--device", "cuda"]) == 2
    assert "no GPU here that torch can use; --device cpu" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.run(["bench", "gla.spec", "--png", "x.png"]) == 2
    assert "install chunkc[plot]" in capsys.readouterr().err
