"""An emitted package's files: the modules that users import, the scans, and the runtime they share."""

from __future__ import annotations

import builtins
import re
from collections.abc import Mapping
from pathlib import Path

from chunkc.backends.attend import Tile
from chunkc.backends.body import matrix_scans
from chunkc.backends.dist.emit import emit_plan
from chunkc.backends.operations import operations
from chunkc.backends.scan import scan_form
from chunkc.backends.torch.pairs import attentions
from chunkc.backends.torch.scan import emit_scan
from chunkc.backends.torch.vector import emit_vector_scan
from chunkc.backends.triton.emit import emit_kernels, prefix_of, scans_of
from chunkc.backends.triton.tables import candidates
from chunkc.backends.unit import UnitEmitter
from chunkc.backends.vector import vector_forms
from chunkc.backends.writer import MODULE_NAMES, Lines, Writer, identifier, public
from chunkc.ir import nodes as N
from chunkc.ir.axes import Number, Size
from chunkc.ir.diagnostics import SourceFile
from chunkc.ir.graph import Unit
from chunkc.ir.rewrite import Rebinding
from chunkc.ir.tuning import Schedule

Tiles = Mapping[str, Mapping[str, list[Tile]]]  # the functions of each unit's attentions
AT_RUN_TIME = Path(__file__).parent / "torch"  # modules that are copied into packages
SHARED = Path(__file__).parent / "dist"  # those of parallel layouts
KERNELS = Path(__file__).parent / "triton"
TAKE = """

from . import _ahead  # takes the kernels above from what was compiled already

_ahead.install(globals())
"""


def emit_files(source: SourceFile, units: tuple[Unit, ...], settings: Mapping[str, Number],
               schedules: Mapping[str, Schedule] | None = None, *, ahead: bool = False) -> dict[str, str]:  # fmt: skip
    """The files of the package for these units at the normal level, by name; `settings` replace defaults, `schedules`
    those of kernels. With `ahead` its kernels are taken from what is compiled ahead."""
    lines = Lines(source)
    names = [{identifier(p.name): p.name for p in u.params} for u in units]
    units = tuple(_safe_names(u) for u in units)
    settings = {identifier(name): value for name, value in settings.items()}
    tiles = {u.name: attentions(u, prefix_of(u, units), lines) for u in units}
    head = f'"""Made by chunkc from {source.name}. Edits are lost when it is built again."""\n'
    return {
        "__init__.py": head + "\n" + _modules(units, names, lines, settings, tiles),
        "_torch.py": head + "\n" + _torch(units, lines, tiles),
        "_kernels.py": head + "\n" + emit_kernels(units, lines, tiles, schedules or {}) + (TAKE if ahead else ""),
        **{f"_{name}.py": _copied(name) for name in ("checks", "elementwise", "functions", "runtime")},
        **({"_chunks.py": _copied("chunks")} if any(u.graph.of_kind(N.Segment) for u in units) else {}),
        **({"_attend.py": _copied("attend")} if any(u.graph.of_kind(N.Attend) for u in units) else {}),
        **({"_ahead.py": _copied("ahead", KERNELS)} if ahead else {}),
        **_shared(units, lines, head),
    }


def tunable(source: SourceFile, units: tuple[Unit, ...]) -> dict[str, tuple[Schedule, ...]]:
    """The schedules that each kernel may have, by its name in the package; the first is the one it has untuned."""
    out: dict[str, tuple[Schedule, ...]] = {}
    for form, kernels in scans_of(tuple(_safe_names(u) for u in units), Lines(source)):
        out |= candidates(form, kernels)
    return out


def _shared(units: tuple[Unit, ...], lines: Lines, head: str) -> dict[str, str]:
    """The files of a parallel layout, if there is one."""
    sharded = [(u, prefix_of(u, units)) for u in units if u.parallel is not None]
    if not sharded:
        return {}
    rings = any(op.kind == "ring" for u, _ in sharded for op in operations(u))
    return {
        "_plan.py": head + "\n" + emit_plan(sharded, lines),
        **{f"_{name}.py": _copied(name, SHARED) for name in ("distributed", "ranks", "segments")},
        **({"_ring.py": _copied("ring", SHARED)} if rings else {}),
    }


def _copied(name: str, folder: Path = AT_RUN_TIME) -> str:
    """A module of the run time, which imports others from beside it."""
    text = (folder / f"{name}.py").read_text(encoding="utf-8")
    return re.sub(r"from chunkc\.backends\.(torch|dist)\.", "from ._", text)


def _safe_names(unit: Unit) -> Unit:
    """The unit with axes and parameters whose names an emitted module uses itself renamed as identifiers are."""
    axes = {a.name: identifier(a.name) for a in unit.graph.axes}
    sizes = {p.name: Size(op="param", value=identifier(p.name)) for p in unit.params}
    params = tuple(p.evolve(name=identifier(p.name)) for p in unit.params)
    return unit.evolve(graph=Rebinding(axes, sizes).graph(unit.graph), params=params)


def _torch(units: tuple[Unit, ...], lines: Lines, tiles: Tiles) -> str:
    w = Writer()
    w("from __future__ import annotations")
    w()
    forms = [(u, s) for u in units for s in matrix_scans(u.graph)]
    vectors = [(u, form) for u in units for form in vector_forms(u, prefix_of(u, units))]
    functions = [t for u in units for each in tiles[u.name].values() for t in each]
    vector = Writer()
    for unit, form in vectors:
        vector()
        vector()
        emit_vector_scan(form, unit, lines, vector)
    words = set(re.findall(r"\w+", "".join(t.text for t in functions) + vector.text()))
    if forms or functions or vectors:
        w("from typing import Any")
        w()
        w("import torch")
        w("from torch import Tensor")
        if "F" in words:
            w("from torch.nn import functional as F")
        w()
    if helpers := sorted({"larger", "wide"} & words) + ["attend"] * any(tiles.values()):
        w(f"from ._attend import {', '.join(helpers)}")
    if helpers := [n for n in FUNCTIONS if n in words]:
        w(f"from ._functions import {', '.join(helpers)}")
    w("from ._elementwise import max_plus_scan, vector_scan")
    used = [n for n in RUNTIME_NAMES if n in words]
    if forms:
        used += [
            "LOG_SMALL",
            "once",
            "Sequences",
            "after",
            "before",
            "halves",
            "levels",
            "log_gate",
            "onward",
            "uncast",
            "upto",
        ]
    if used:
        w(f"from ._runtime import {', '.join(sorted(set(used)))}")
    w()
    names = [f"{scan_form(u, s, prefix_of(u, units)).name}_scan" for u, s in forms]
    names += [f"{form.name}_scan" for _, form in vectors]
    listed = sorted(["max_plus_scan", "vector_scan", *names])
    w(f"__all__ = [{', '.join(repr(n) for n in listed)}]".replace("'", '"'))
    for unit, scan in forms:
        w()
        w()
        emit_scan(scan_form(unit, scan, prefix_of(unit, units)), lines, w)
    w.lines += vector.lines
    for tile in functions:
        w()
        w()
        w.lines += tile.text.rstrip().splitlines()
    for unit in units:
        for id_ in tiles[unit.name]:
            w()
            w()
            w(f"attend_{prefix_of(unit, units)}{identifier(id_)} = attend")
    return w.text()


MODULES = ("math", "torch", "nn", "F")
CHECK_NAMES = (
    "check_offsets",
    "check_packing",
    "check_position",
    "check_state",
    "check_tensors",
    "check_values",
    "length",
)
FUNCTIONS = (
    "along_valid", "inv_softplus", "l2_norm", "layer_norm", "linear", "masked", "over_valid", "rms_norm", "row_of",
    "scatter", "softmax", "take",
)  # fmt: skip
RUNTIME_NAMES = (
    "Sequences", "Weights", "axis_size", "complex_type", "compute_dtype", "exact", "lay", "overwrite",
    "tracked", "use_kernels",
)  # fmt: skip


def _modules(units: tuple[Unit, ...], given: list[dict[str, str]], lines: Lines, settings: Mapping[str, Number],
             tiles: Tiles) -> str:  # fmt: skip
    """`__init__.py`; `given` are the spec's names for each unit's parameters."""
    body = Writer()
    _module_body(units, given, lines, settings, tiles, body)
    shown = {public(n.name) for u in units for n in u.graph.of_kind(N.Input, N.Param)} | {u.name for u in units}
    written, hidden = _unshadowed(body.text(), shown | {public(p) for names in given for p in names.values()})
    used = set(re.findall(r"\w+", written))
    w = Writer()
    w("from __future__ import annotations")
    w()
    for name, text in (("math", "import math"), ("dataclass", "from dataclasses import dataclass")):
        if name in used:
            w(text)
    w("from types import ModuleType")
    typing = [name for name in ("Any", "NamedTuple") if name in used]
    if typing:
        w(f"from typing import {', '.join(typing)}")
    w()
    w("import torch")
    w(f"from torch import Tensor{', nn' if 'nn' in used else ''}")
    for name, text in (("F", "from torch.nn import functional as F"), ("_pytree", "from torch.utils import _pytree")):
        if name in used:
            w(text)
    w()
    w(f"from . import {'_ring, ' if '_ring' in used else ''}_torch")
    w(f"from ._checks import {', '.join(n for n in CHECK_NAMES if n in used)}")
    if any(u.graph.of_kind(N.Attend) for u in units):
        w("from ._attend import Places, Source")
    if any(u.graph.of_kind(N.Segment) for u in units):
        w("from ._chunks import Chunks")
    if any(u.parallel is not None for u in units):
        w("from ._plan import Plan")
    for module, names in (("_elementwise", ("stopped",)), ("_functions", FUNCTIONS), ("_runtime", RUNTIME_NAMES)):
        if found := [name for name in names if name in used]:
            w(f"from .{module} import (")
            for name in found:
                w(f"    {name},")
            w(")")
    w()
    head = w.text()
    builtin = [name for name in hidden if hasattr(builtins, name)]
    for name, alias in hidden.items():
        head = re.sub(rf"^import {name}$", f"import {name} as {alias}", head, flags=re.M)
        head = re.sub(rf"^(from .* import .*)\b{name}\b(?! as)", rf"\1{name} as {alias}", head, flags=re.M)
        head = re.sub(rf"^    {name},$", f"    {name} as {alias},", head, flags=re.M)
    head += "".join(f"{hidden[name]} = {name}\n" for name in builtin) + "\n" * bool(builtin)
    return head + "\n" + written


def _unshadowed(text: str, names: set[str]) -> tuple[str, dict[str, str]]:
    """The module's text with other names for what names in a signature would hide, and these other names."""
    hidden: dict[str, str] = {}
    for name in sorted(names & MODULE_NAMES):
        alias = f"_the_{name}"
        follows = (
            r"\." if name in MODULES else r"[(.]" if name == "Chunks" else r"\("
        )  # a module, its class, a function
        new = re.sub(rf"(?<!def )(?<!class )(?<![.\w]){name}(?={follows})", alias, text)
        if new != text:
            text, hidden[name] = new, alias
    return text, hidden


def _module_body(units: tuple[Unit, ...], names: list[dict[str, str]], lines: Lines, settings: Mapping[str, Number],
                 tiles: Tiles, w: Writer) -> None:  # fmt: skip
    exported = sorted([*(public(u.name) for u in units), *(["Plan"] if any(u.parallel for u in units) else [])])
    w("__all__ = [" + ", ".join(f'"{n}"' for n in exported) + "]")
    w()
    w()
    with w.indented("def _scans(x: Tensor) -> ModuleType:"):
        w('"""The scans for tensors like x: Triton kernels on a GPU, PyTorch on a CPU."""')
        with w.indented("if use_kernels(x):"):
            w("from . import _kernels")
            w()
            w("return _kernels")
        w("return _torch")
    for unit, given in zip(units, names):
        w()
        w()
        prefix = prefix_of(unit, units)
        UnitEmitter(unit, given, lines, w, settings, prefix, tiles[unit.name]).emit()
