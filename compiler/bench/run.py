"""The run of a benchmark: what is compared, each candidate in a process of its own, and the report as plain data."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from chunkc import __version__
from chunkc.artifact import SettingError
from chunkc.bench.costs import cost
from chunkc.bench.match import OTHER, Match, Matcher
from chunkc.bench.parts import Part, parts_of
from chunkc.bench.peers import PEERS
from chunkc.bench.roles import roles_of
from chunkc.bench.sizes import BenchError, Sizes, resolve
from chunkc.driver import Compiled
from chunkc.ir.axes import Number
from chunkc.ir.graph import Unit

SCHEMA = 1
WORKER = ("-m", "chunkc.bench.worker")
SEED = 0
WIDTH = {"bf16": 2, "fp32": 4}
TIMES = ("forward_ms", "both_ms", "first_s", "peak_mib", "error")
Talk = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What is asked for; `against` is auto, none, or names of peers."""

    unit: str | None = None
    settings: Mapping[str, Number] | None = None
    shape: Mapping[str, int] | None = None
    dtype: str | None = None
    device: str | None = None
    against: str = "auto"
    limit_seconds: float = 600.0


def bench(compiled: Compiled, path: Path, options: Options, talk: Talk) -> dict[str, Any]:
    """The report: a table's rows for each part, as JSON has them.

    Raises:
        BenchError: if something cannot be timed as asked.
    """
    device = _device(options.device)
    wanted = _wanted(options.against)
    unit = unit_of(compiled, options.unit)
    parts = parts_of(compiled, unit)
    sizes, base = asked(unit, parts, path, options, device)
    dtype = base["dtype"]
    talk("measuring what a copy and a matrix product reach")
    rates = attempt({**base, "candidate": "rates"}, options.limit_seconds)
    if "rate" not in rates:
        raise BenchError(f"this machine cannot be measured: {rates.get('reason')}")
    found = []
    for index, part in enumerate(parts):
        own = {**base, "part": index}
        found.append(_part(part, sizes, own, wanted, rates, options.limit_seconds, talk))
    return {
        "schema": SCHEMA, "spec": path.name, "unit": unit.name, "device": device_name(device), "dtype": dtype,
        "seed": SEED, "settings": dict(sizes.settings), "shape": sizes.named(unit), "versions": versions(),
        "copy_bytes_per_s": rates["bandwidth"], "product_operations_per_s": rates["rate"], "parts": found,
    }  # fmt: skip


def asked(unit: Unit, parts: Sequence[Part], path: Path, options: Options, device: str) -> tuple[Sizes, dict[str, Any]]:
    """The sizes of what is timed, and what each process is told of it.

    Raises:
        BenchError: if there are no such sizes.
    """
    dtype = options.dtype or ("bf16" if device == "cuda" else "fp32")
    roles = next((r for p in parts if (r := roles_of(p.unit.graph)) is not None), None)
    try:
        sizes = resolve(unit, roles, options.settings or {}, options.shape or {}, device)
    except SettingError as reason:
        raise BenchError(str(reason)) from None
    return sizes, {"file": str(path.resolve()), "unit": unit.name, "settings": dict(sizes.settings), "dtype": dtype,
                   "lengths": dict(sizes.lengths), "batch": sizes.batch, "device": device, "seed": SEED}  # fmt: skip


def _device(asked: str | None) -> str:
    there = torch.cuda.is_available()
    if asked == "cuda" and not there:
        raise BenchError("there is no GPU here that torch can use; --device cpu times on the CPU")
    return asked or ("cuda" if there else "cpu")


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def _wanted(against: str) -> set[str] | None:
    """The names of the peers that are asked for; None for those that apply."""
    if against in ("auto", "none"):
        return None if against == "auto" else set()
    names = {name.strip() for name in against.split(",")}
    known = list(dict.fromkeys(p.name for p in PEERS))
    for name in sorted(names - set(known)):
        raise BenchError(f"there is no peer '{name}': there are {', '.join(known)}; or auto, or none")
    return names


def unit_of(compiled: Compiled, name: str | None) -> Unit:
    """The unit of this name, or the file's last one."""
    units = compiled.checked.module.units
    found = [u for u in units if name in (None, u.name)]
    if not found:
        raise BenchError(f"the file has no '{name}': it has {', '.join(u.name for u in units) or 'no layer and no op'}")
    return found[-1]


def versions() -> dict[str, str | None]:
    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    found = {name: version(name) for name in ("torch", "triton", "fla-core")}
    return {"chunkc": __version__, "python": platform.python_version(), **found}


# -- rows --------------------------------------------------------------------------------------------------------------


def _part(part: Part, sizes: Sizes, base: Mapping[str, Any], wanted: set[str] | None, rates: Mapping[str, float],
          limit: float, talk: Talk) -> dict[str, Any]:  # fmt: skip
    """One part's rows: chunkc's own, then the peers'."""
    least = cost(part, sizes, WIDTH[base["dtype"]])
    limits = least.limits_ms(rates["bandwidth"], rates["rate"])
    talk(f"timing {part.title}")
    rows = [_row("chunkc", "", attempt({**base, "candidate": "chunkc"}, limit), limits)]
    matches = [] if wanted == set() or part.unit.kind == "layer" else _matches(part, sizes, wanted, base["device"])
    for m in matches:
        if find_spec(m.peer.module.partition(".")[0]) is None:
            rows.append(_row(m.peer.name, m.compared, {"reason": "not installed"}, limits))
            continue
        talk(f"timing {m.peer.name}")
        rows.append(_row(m.peer.name, m.compared, attempt({**base, **_request(m)}, limit), limits))
    absent = sorted((wanted or set()) - {m.peer.name for m in matches}) if part.unit.kind == "op" else []
    rows += [_row(name, "", {"reason": "takes other operands than this has"}, limits) for name in absent]
    limited = {"limit_forward_ms": limits[0], "limit_both_ms": limits[1]}
    return {"part": part.title, **asdict(least), **limited, "rows": rows}


def _matches(part: Part, sizes: Sizes, wanted: set[str] | None, device: str) -> list[Match]:
    """The peers that apply, or those of them that are asked for; a CPU has one implementation of attention."""
    matcher = Matcher(part, sizes, SEED)
    if wanted is not None:
        return [m for m in matcher.matches(tuple(sorted(wanted))) if m.peer.name in wanted]
    return [m for m in matcher.matches() if device == "cuda" or not m.peer.name.startswith("sdpa.")]


def _request(m: Match) -> dict[str, Any]:
    index = next(k for k, p in enumerate(PEERS) if p.make is m.peer.make and p.name == m.peer.name)
    return {"candidate": m.peer.name, "peer": index, "scale": m.scale, "masked": m.compared != OTHER,
            "operands": [asdict(o) for o in m.operands]}  # fmt: skip


def _row(name: str, compared: str, found: Mapping[str, Any], limits: tuple[float, float]) -> dict[str, Any]:
    """Times, and the fraction of the limit that what does the part's own work reaches."""
    row = {"candidate": name, "compared": compared, **{key: found.get(key) for key in TIMES},
           "reason": found.get("reason")}  # fmt: skip
    for key, limit in (("forward", limits[0]), ("both", limits[1])):
        taken = found.get(f"{key}_ms")
        row[f"{key}_of_limit"] = limit / taken if taken and compared != OTHER else None
    return row


# -- processes ---------------------------------------------------------------------------------------------------------


def attempt(request: Mapping[str, Any], limit_seconds: float, worker: Sequence[str] = WORKER,
            environment: Mapping[str, str] | None = None) -> dict[str, Any]:  # fmt: skip
    """Run one candidate in a process of its own, `worker` with two files; what it found, and the reason if it did not
    come to its end."""
    with tempfile.TemporaryDirectory() as folder:
        asked, found = Path(folder, "request.json"), Path(folder, "result.json")
        asked.write_text(json.dumps(request))
        command = [sys.executable, *worker, str(asked), str(found)]
        passive = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}  # waiting threads must not take others' cores
        with subprocess.Popen(command, env={**passive, **(environment or {})}, stdout=subprocess.DEVNULL,
                              stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True
                              ) as child:  # fmt: skip
            try:
                _, err = child.communicate(timeout=limit_seconds)
                why = _ending(child.returncode, err)
            except subprocess.TimeoutExpired:
                why = f"stopped after {limit_seconds:g} s"
            finally:
                _end(child)
        result: dict[str, Any] = json.loads(found.read_text()) if found.exists() else {}
    return result | ({"reason": why} if why else {})


def _ending(code: int, err: str) -> str:
    """Why a process ended early; empty if it did not."""
    if code == 0:
        return ""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    lines = [line.strip() for line in err.splitlines() if line.strip()]
    return f"exit code {code}{f': {lines[-1][:200]}' if lines else ''}"


def _end(child: subprocess.Popen[str]) -> None:
    """End a candidate, and what it started, if it still runs."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
