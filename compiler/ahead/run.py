"""Compiling ahead as a build sees it: sizes, the process that compiles, and what it made as files and as a report."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chunkc.ahead.targets import DTYPES, TARGETS, Ahead, no_compiler
from chunkc.backends.writer import public
from chunkc.driver import Compiled
from chunkc.ir import nodes as N
from chunkc.ir.axes import Number, SizeError
from chunkc.ir.diagnostics import CompileError, Diagnostic, SourceFile, error
from chunkc.ir.graph import Unit

FOLDER = "_compiled"
INDEX = f"{FOLDER}/index.json"


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel uses of the GPU: registers a thread, bytes of it that spill, bytes of shared memory."""

    unit: str
    kernel: str
    constants: str
    warps: int
    registers: int
    spilled: int
    shared: int


@dataclass(frozen=True)
class Made:
    """The files that a package gets, what its kernels use, and what could not be made but is not needed."""

    files: Mapping[str, bytes]
    used: tuple[Usage, ...]
    missing: str = ""

    def report(self, ahead: Ahead) -> list[str]:
        """Lines for people: the kernels, those that differ in alignment alone as one."""
        rows = list(dict.fromkeys(self.used))
        width = max((len(u.kernel) for u in rows), default=0)
        out = [f"{len(self.used)} kernels compiled for {ahead.target}, {ahead.dtype} inputs"]
        out += [f"  {u.kernel:{width}}  {u.warps} warps  {u.registers:3} registers  {u.spilled:4} B spilled  "
                f"{u.shared / 1024:5.1f} KiB shared  {u.constants}" for u in rows]  # fmt: skip
        return out + ([f"  {self.missing}"] if self.missing else [])

    def warnings(self, ahead: Ahead, compiled: Compiled) -> list[Diagnostic]:
        """Kernels that do not fit the target well, or at all: the worst of each name."""
        spans, limit = {u.name: u.span for u in compiled.units}, TARGETS[ahead.target].shared
        found = {}
        for u in sorted(self.used, key=lambda u: (u.shared, u.spilled)):
            spills = f"'{u.kernel}' keeps {u.spilled} bytes a thread in memory for want of registers"
            beyond = (
                f"'{u.kernel}' wants {u.shared} bytes of shared memory, and {ahead.target} has {limit}: it cannot run"
            )
            if u.spilled or u.shared > limit:
                found[u.kernel] = Diagnostic(
                    "kernel-too-large", beyond if u.shared > limit else spills, spans[u.unit], severity="warning",
                    notes=(f"compiled for {ahead.target} with {u.constants}",), hints=("smaller axes take less",),
                )  # fmt: skip
        return list(found.values())


def compile_ahead(compiled: Compiled, package: Mapping[str, str], settings: Mapping[str, Number], ahead: Ahead) -> Made:
    """Compile every kernel that calls of the package's layers and ops launch, at the sizes that parameters give.

    Raises:
        CompileError: `open-parameter` or `bad-size` if a size is missing or none; `no-compiler` or `cannot-compile` if
            Triton cannot compile for the target here, or a kernel.
    """
    source, target = compiled.checked.source, TARGETS[ahead.target]
    units = [request_unit(u, values_of(u, settings)) for u in with_values(compiled.units, settings)]
    request = {"target": [target.backend, target.arch, target.warp_size], "dtype": DTYPES[ahead.dtype], "units": units}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        (home / "package").mkdir()
        for name, text in package.items():
            (home / "package" / name).write_text(text, encoding="utf-8")
        (home / "request.json").write_text(json.dumps(request))
        found = attempt(home)
        if "failed" in found:
            raise failure(found, source, compiled.units)
        used = tuple(Usage(**u) for u in found["used"])
        files = {f"{FOLDER}/{p.name}": p.read_bytes() for p in sorted((home / "package" / FOLDER).iterdir())}
    index = {"triton": found["triton"], "target": request["target"], "made_for": made_for(units, ahead),
             "kernels": found["kernels"], "modules": found["modules"]}  # fmt: skip
    files[INDEX] = (json.dumps(index, indent=1, sort_keys=True) + "\n").encode()
    return Made(dict(sorted(files.items())), used, found["missing"])


def attempt(home: Path) -> dict[str, Any]:
    """What the process that compiles finds. It has a cache of its own, and none of the user's settings of Triton but
    where tools are: the same package is always compiled to the same.

    Raises:
        RuntimeError: if it dies: a mistake of chunkc's, or of Triton's.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_") or k.endswith("_PATH")}
    result = home / "result.json"
    environment = {
        **kept, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TRITON_CACHE_DIR": str(home / "cache"),
        "TRITON_DISABLE_LINE_INFO": "1",  # lines have the path of the folder in which this was compiled
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "chunkc.ahead.worker", str(home)], env=environment, text=True,
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # fmt: skip
    if done.returncode == 0 and result.is_file():
        found: dict[str, Any] = json.loads(result.read_text())
        return found
    lines = done.stderr.strip().splitlines() or ["it ended without a word"]
    died = f" of {signal.Signals(-done.returncode).name}" if done.returncode < 0 else ""
    raise RuntimeError(f"the process that compiles ahead died{died}: {lines[-1]}")


def failure(found: Mapping[str, Any], source: SourceFile, units: Iterable[Unit]) -> CompileError:
    if found["failed"] == "no-compiler":
        return no_compiler(source.name, found["reason"])
    unit = next(u for u in units if u.name == found["unit"])
    if found["failed"] == "bad-size":
        return CompileError([bad_size(unit, found["reason"])])
    hints = ("the package can be built without --target",)
    message = f"a kernel of '{unit.name}' could not be compiled"
    return CompileError([error("cannot-compile", message, unit.span, notes=(found["reason"],), hints=hints)])


# -- sizes -------------------------------------------------------------------------------------------------------------


def values_of(unit: Unit, settings: Mapping[str, Number]) -> dict[str, Number]:
    given = {p.name: settings.get(p.name, p.default) for p in unit.params}
    return {name: value for name, value in given.items() if value is not None}


def with_values(units: tuple[Unit, ...], settings: Mapping[str, Number]) -> tuple[Unit, ...]:
    """The units, if all parameters have values and all axes sizes."""
    found = []
    for unit in units:
        values = values_of(unit, settings)
        if missing := [p.name for p in unit.params if p.name not in values]:
            found.append(error(
                "open-parameter", f"'{unit.name}' is compiled ahead, and {listed(missing)} no value", unit.span,
                notes=("kernels are compiled for sizes",), hints=(f"give it by --set {missing[0]}=...",),
            ))  # fmt: skip
            continue
        for axis in unit.graph.axes:
            try:
                if axis.size is not None and axis.size.evaluate(values) < 1:
                    raise SizeError(f"it is {axis.size.evaluate(values)}")
            except SizeError as reason:
                found.append(bad_size(unit, f"axis '{axis.name}' has no size: {reason}"))
    if found:
        raise CompileError(found)
    return units


def bad_size(unit: Unit, why: str) -> Diagnostic:
    return error("bad-size", f"'{unit.name}' cannot be compiled ahead: {why}", unit.span,
                 hints=("--set gives parameters other values",))  # fmt: skip


def listed(names: list[str]) -> str:
    quoted = [f"'{n}'" for n in names]
    return f"{', '.join(quoted)} {'has' if len(names) == 1 else 'have'}"


def request_unit(unit: Unit, values: Mapping[str, Number]) -> dict[str, Any]:
    """A unit as the process that compiles calls it; a dimension over a sequence is the sequence's name."""

    def tensor(node: N.Input | N.Param) -> dict[str, Any]:
        axes = [unit.graph.axis[a] for a in node.axes]
        shape = [a.space if a.size is None else int(a.size.evaluate(values)) for a in axes]
        return {"shape": shape, "dtype": node.dtype}

    inputs = {n.name: n for n in unit.graph.of_kind(N.Input)}
    fixed = [int(n.n.evaluate(values)) for n in unit.graph.of_kind(N.Segment) if n.rule == "fixed" and n.n is not None]
    return {
        "chunk": math.lcm(*fixed),
        "name": unit.name, "public": public(unit.name), "kind": unit.kind,
        "settings": {public(name): value for name, value in values.items()},
        "inputs": {public(name): tensor(inputs[name]) for name in unit.inputs},
        "weights": {public(n.name): tensor(n) for n in unit.graph.of_kind(N.Param)} if unit.kind == "op" else {},
    }  # fmt: skip


def made_for(units: list[dict[str, Any]], ahead: Ahead) -> str:
    """Sizes and dtype as a warning shows them."""
    sizes = [f"{u['public']}({', '.join(f'{k}={v}' for k, v in u['settings'].items())})" for u in units]
    return f"{', '.join(sizes)} with {ahead.dtype} inputs"
