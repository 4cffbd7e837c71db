"""What the Triton kernels are made of, and what they use of a GPU once compiled."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import cases
import pytest
from crosscompile import TARGETS, compile_kernel, overwritten, sources, usage
from emitted import emit
from shipped import RECURRENCES

from chunkc.backends.package import emit_files
from chunkc.backends.scan import EMITTED, NUMBERED, ScanForm, derived_names, scan_form
from chunkc.backends.triton.emit import kernels_of, launches, spans_of
from chunkc.backends.triton.kernel import Expr, Kernel, Let, Loop, Store, call, where
from chunkc.backends.triton.schedule import SIDES, SUMS, complete_kernel
from chunkc.backends.triton.tables import default_schedule
from chunkc.backends.triton.vector import plain_kernels
from chunkc.backends.writer import Lines, Writer
from chunkc.driver import compile_source
from chunkc.ir import nodes as N
from chunkc.ir.diagnostics import SourceFile

SHIPPED = RECURRENCES
TEXTS = {**SHIPPED, **cases.OPS}
VECTOR = {k.name: k for k in plain_kernels()}
WALKED = (("C", 64), ("W", 4), ("STAGES", 3))  # of the tiles of their walks, as `_kernels.py` has it
SHORT = (("C", 16), ("W", 1), ("STAGES", 1))


@dataclass(frozen=True)
class Scan:
    """A matrix scan of a text with its kernels by role, and the spec lines of its operands by node."""

    form: ScanForm
    kernels: dict[str, Kernel]
    spans: dict[str, str]

    def tiled(self) -> Iterator[tuple[str, Kernel]]:
        """The kernels over tiles: all but the one for a single token."""
        yield from ((role, k) for role, k in self.kernels.items() if role != "token")


@cache
def scans(name: str) -> tuple[Scan, ...]:
    source = SourceFile(f"{name}.spec", TEXTS[name])
    lines, found = Lines(source), []
    for unit in compile_source(source).units:
        spans = spans_of(unit, lines)
        for node in unit.graph.of_kind(N.Scan):
            assert isinstance(node, N.Scan)
            if node.i or node.j:
                form = scan_form(unit, node)
                found.append(Scan(form, kernels_of(form, lines, spans), spans))
    return tuple(found)


CHUNKED = [n for n in TEXTS if scans(n)]
KERNELS = [(n, i, r) for n in CHUNKED for i, s in enumerate(scans(n)) for r in s.kernels]


def at(name: str, index: int, role: str) -> tuple[Scan, Kernel]:
    scan = scans(name)[index]
    return scan, scan.kernels[role]


each_kernel = pytest.mark.parametrize("name, index, role", KERNELS, ids=[f"{n}-{i}-{r}" for n, i, r in KERNELS])


def test_the_specs_with_a_chunk_form() -> None:
    wanted = {"gated_linear_attention", "linear_attention", "mamba2", "mlstm", "retention", "rwkv6"}
    assert {n for n in CHUNKED if n in SHIPPED} == wanted
    assert set(cases.OPS) - set(CHUNKED) == {"vector", "two_vectors", "max_plus", "delta"}


# -- loops and launches ------------------------------------------------------------------------------------------------

STOPS = {
    "tiles": {"count", "alive", "tiles - whole"},
    "segments": {"turn"},
    "whole tiles": {"whole"},
    "levels": {"LEVELS", "levels", "upper_levels"},
    "blocks of side i": {"tl.cdiv(I, BI)", "parts_i"},
    "blocks of side j": {"tl.cdiv(J, BJ)", "parts_j"},
}


def base(role: str) -> str:
    """The launch's role of a kernel, which there may be several of by how they anchor pairs."""
    return role.removesuffix("_start").removesuffix("_blocks")


def check_loops(kernel: Kernel, allowed: set[str]) -> None:
    for s in kernel.statements():
        if isinstance(s, Loop):
            assert s.over in allowed, (kernel.name, s.over)
            assert s.stop.text() in STOPS[s.over], (kernel.name, s.stop.text())


@each_kernel
def test_loops(name: str, index: int, role: str) -> None:
    """Walks over tiles keep a state; no other kernel sees more than one tile, and none loops over tokens."""
    _, kernel = at(name, index, role)
    if role in ("states", "ends"):
        check_loops(kernel, {"tiles"})
    elif role == "token":
        check_loops(kernel, set())
    else:
        check_loops(kernel, {"levels", "blocks of side j" if base(role).endswith("_i") else "blocks of side i"})


@pytest.mark.parametrize("name", VECTOR)
def test_loops_of_elementwise_scans(name: str) -> None:
    check_loops(VECTOR[name], {"tiles", "whole tiles"})


def test_what_completes_segments_loops_over_earlier_ones_and_over_tiles() -> None:
    check_loops(complete_kernel(), {"segments", "tiles"})


@pytest.mark.parametrize("name", CHUNKED)
def test_launches(name: str) -> None:
    """At most 3 kernels forward and 6 backward, 3 if a gate is one logarithm or there is none; each role is known."""
    for scan in scans(name):
        roles = {base(r) for r in scan.kernels}
        forward = {r for r in roles if r == "states" or r.startswith("read_")}
        backward = {r for r in roles if r == "ends" or r.startswith(("grad_", "edges_", "gate_"))}
        assert {*forward, *backward, "token"} == roles
        assert 2 <= len(forward) <= 3 and 3 <= len(backward) <= 6
        if not any(g.raw for g in scan.form.gates) and len(scan.form.gates) < 2:
            assert len(backward) == 3
        anchored = {base(r) for r in scan.kernels if r != base(r)}
        sides = {r for r in roles if r.startswith(("read_", "grad_")) and not takes_scores(scan, r)}
        assert anchored == (sides if scan.form.wide() else set())


def takes_scores(scan: Any, role: str) -> bool:
    """Whether a kernel is given the scores that one of reads kept."""
    return role.startswith("grad_") and any(a.startswith("scores_") for a in scan.kernels[role].arguments)


@pytest.mark.parametrize("name", CHUNKED)
def test_scores_that_gates_decay_are_kept(name: str) -> None:
    """What one kernel keeps another takes, which then loads nothing of the reads' other side."""
    for scan in scans(name):
        kept = {a for r, k in scan.kernels.items() if r.startswith("read_") for a in k.arguments if "scores_" in a}
        takers = [k for r, k in scan.kernels.items() if takes_scores(scan, r)]
        assert bool(kept) == bool(takers) and all(kept <= {*k.arguments} for k in takers)
        for kernel in takers:
            assert not {f"{q.name}_ptr" for q in scan.form.queries} & {*kernel.arguments}
    if name == "gated":
        assert kept == {"scores_00_ptr"}


PLACES = {
    "tile_start",
    "tile_stop",
    "first_tile",
    "offsets",
    "tokens",
    "each",
    "segment",
    "segments",
    *(f"{name}_{side}" for name in SUMS for side in SIDES),
    "totals_i",
    "totals_j",
    "parts_i",
    "parts_j",
    "levels",
    "upper_levels",
}
PASSED = {"ends": {"initial": "d_last", "last": "d_initial", "states": "ends"}, "token": {"next": "last"}}


@each_kernel
def test_kernels_read_and_write_what_the_graph_says(name: str, index: int, role: str) -> None:
    """A kernel's pointers are the launch's operands and buffers, each used the way the graph has it; but gates that no
    input is in have no gradient."""
    scan, kernel = at(name, index, role)
    launch = next(k for group in launches(scan.form) for k in group if k.role == base(role))
    graphs = (scan.form.scan.kernels, scan.form.scan.kernels_backward, scan.form.scan.kernel_step)
    graph = next(g for g in graphs if g is not None and launch in g.nodes)
    known = dict(zip((n.id for n in graph.of_kind(N.Input)), (o.name for o in scan.form.operands())))
    given = {f"out_{k}": f"out_{n}" for k, n in known.items()} | {f"d_out_{k}": f"d_out_{n}" for k, n in known.items()}
    names = known | given | {f"d_{k}": f"d_{n}" for k, n in known.items()}
    names |= {f"d_{k}_edges": f"d_{n}" for k, n in known.items()}
    outputs = {names.get(n, n) for n, _ in launch.body.outputs}
    outputs -= {f"d_{g.name}" for g in scan.form.gates if not g.given}
    wanted = {names.get(r, r) for r in launch.reads} | outputs
    pointers = {a.removesuffix("_ptr") for a in kernel.arguments} - {*PLACES, *scan.form.numbers()}
    pointers = {p for p in pointers if not p.startswith("scores_")}
    if takes_scores(scan, role):  # kept, they stand for what they were made of on the other side
        wanted -= {q.name for q in scan.form.queries}
    assert {PASSED.get(role, {}).get(p, p) for p in pointers} == wanted
    stored = {e.op.removesuffix("_ptr") for s in kernel.statements() if isinstance(s, Store) for e in s.pointer.walk()}
    stored = {PASSED.get(role, {}).get(p, p) for p in stored}
    assert stored & wanted == outputs


# -- contractions ------------------------------------------------------------------------------------------------------

POINTWISE = {
    "exp",
    "tl.exp",
    "tl.cumsum",
    "tl.where",
    "tl.maximum",
    "tl.minimum",
    "tl.min",
    "tl.trans",
    "tl.load",
    "tl.zeros",
    "tl.arange",
    "tl.program_id",
    "tl.cdiv",
}
CONTRACTIONS = {"tl.dot", "masked_sum", "tl.sum"}


def names_in(e: Expr, values: dict[str, Expr]) -> set[str]:
    """The names that an expression reads, those behind its local names included."""
    found: set[str] = set()
    pending = [e]
    while pending:
        for x in pending.pop().walk():
            if not x.args and x.op not in found:
                found.add(x.op)
                if x.op in values:
                    pending.append(values[x.op])
    return found


def sum_kind(e: Expr, scan: Scan, values: dict[str, Expr]) -> str:
    """What a tl.sum adds up: the gate's total over a tile's tokens, a thin gate's sums, a tile's edges, what flows
    past a gate, or a token's read of its own write, which is no contraction of two tiles."""
    (arg,) = e.args[:1]
    gates = {g.name: g for g in scan.form.gates}
    thin = any(g.thin for g in gates.values())
    if arg.op in ("flowing", "before"):
        return "flow"
    if thin and re.fullmatch(r"pairs_\d+", arg.op):  # of a read or a write, what dots gave for each pair
        return "thin gate's gradient over pairs"
    if e.args[1].text() == "1" and is_own(arg, scan):
        return "own"
    if arg.op in gates and not arg.args:
        return "total"
    if thin and arg.op == "tl.where" and arg.args[2].text() == "0.0":
        inside = arg.args[1]
        if inside.op in gates and gates[inside.op].thin:
            return "thin gate over tokens"
        if inside.op == "tl.sum" and inside.args[1].text() == "1":
            return "thin gate's gradient over tokens"
    if thin and (arg.op == "passed" or arg.op == "edges" or arg.op == "exp" and arg.args[0].op == "tl.sum"):
        return "thin gate's gradient over tokens"
    if thin and e.args[1].text() == "1":
        # the gradient of a gate with one number a head is a sum over the side, an elementwise product of what
        # dots gave with an operand: its factors meet at one token and one column, no contraction of two tiles
        reads = names_in(arg, values)
        if arg.op in ("flow", "*") or "edges" in reads:
            return "thin gate's gradient over the side"
    if {"states", "ends"} <= names_in(arg, values):
        return "edges"
    return "unknown"


def is_own(arg: Expr, scan: Scan) -> bool:
    """A read times a write of the same token, loaded values both; or the diagonal of the scores."""
    if arg.op == "tl.where" and arg.args[0].text() == "row[:, None] == row[None, :]":
        return arg.args[1].op.startswith("score_")
    pairs = {(r.on(s), w.on(s)) for r in scan.form.query_pairs() for w in scan.form.write_pairs() for s in SIDES}
    loaded = arg.op == "*" and all(a.op == ".to" for a in arg.args)
    return loaded and (arg.args[0].args[0].op, arg.args[1].args[0].op) in pairs


@each_kernel
def test_contractions_are_dots(name: str, index: int, role: str) -> None:
    """Keys, values and pairs of tokens meet in dots; tl.sum is for gates, and for single tokens."""
    scan, kernel = at(name, index, role)
    called = {e.op for e in kernel.expressions() if e.op.startswith("tl.") and (e.args or e.keywords)}
    called |= {e.op for e in kernel.expressions() if e.op == "masked_sum"}
    called -= {"tl.store"}
    if role == "token":
        assert called <= POINTWISE | {"tl.sum"}
        assert not any(e.op == "tl.dot" for e in kernel.expressions())
        return
    assert called <= POINTWISE | CONTRACTIONS, called - POINTWISE - CONTRACTIONS
    values = {s.name: s.value for s in kernel.statements() if isinstance(s, Let)}
    for e in kernel.expressions():
        if e.op == "index":  # no third dimension, in which a sum could hide a product
            assert e.keywords[0][1] in (":, None", "None, :")
        if e.op == "tl.sum":
            kind = sum_kind(e, scan, values)
            assert kind != "unknown", e.text()
            if role in ("states", "ends") or role.startswith("read_"):  # gradients alone give a gate its own
                assert kind in ("total", "thin gate over tokens", "own"), (kind, e.text())


def test_the_checks_see_what_they_forbid() -> None:
    """A loop over tokens, and contractions of keys or of tokens by elementwise products and sums."""
    name = next(n for n in SHIPPED if scans(n) and scans(n)[0].form.gates and not scans(n)[0].form.gates[0].thin)
    (scan,) = scans(name)
    with pytest.raises(AssertionError):
        check_loops(Kernel("f", "", (), (Loop("t", Expr("T"), "tokens", ()),)), set(STOPS))
    i, j = (Expr(o.name) for o in scan.form.writes[0])
    (query,) = (Expr(q.name) for q in scan.form.queries)
    for product, axis in ((i * query, 0), (i * j, 0), (where(Expr("earlier"), i, 0.0), 1), (query * "states", 0)):
        assert sum_kind(call("tl.sum", product, axis), scan, {}) == "unknown"
    gate = Expr(scan.form.gates[0].name)
    assert sum_kind(call("tl.sum", gate, 0), scan, {}) == "total"


def dots(kernel: Kernel) -> list[set[str]]:
    """For each dot, the names that its two operands read directly."""
    return [{x.op for a in e.args for x in a.walk() if not x.args} for e in kernel.expressions() if e.op == "tl.dot"]


@pytest.mark.parametrize("name", CHUNKED)
def test_every_pair_has_its_dots(name: str) -> None:
    """A dot a write and tile for the states, a dot a query and tile for their gradients, and in the sides' kernels
    a dot with the states for each read, one with their gradients for each write, and scores for each pair. A gate's
    gradient has one of states with their gradients, too, unless these decay over the other side."""
    for scan in scans(name):
        form, kernels = scan.form, scan.kernels
        assert len(dots(kernels["states"])) == len(form.writes)
        assert len(dots(kernels["ends"])) == len(form.queries)
        for role, kernel in scan.tiled():
            found = dots(kernel)
            side = base(role)[-1]
            if role.startswith("read_"):
                read = [q for q in form.queries if q.side != side]
                assert sum("states" in d for d in found) == len(read)
                pairs = {f"score_{form.queries.index(q)}{r}" for q in read for r in range(len(form.writes))}
                assert pairs == {x for d in found for x in d if x.startswith("score_")}
            elif role.startswith("grad_"):
                own = [q for q in form.queries if q.side == side]
                with_gate = any(a == f"d_{g.name}_ptr" for a in kernel.arguments for g in form.gates)
                edges = [d for d in found if {"states", "ends"} <= d]
                assert len(edges) == (with_gate and not any(g.side != side for g in form.wide()))
                found = [d for d in found if d not in edges]
                assert sum("states" in d for d in found) == len(form.queries if with_gate else own)
                assert sum("ends" in d for d in found) == len(form.writes)
            elif role.startswith("edges_"):
                assert sum("states" in d for d in found) == len(form.queries)
                assert sum("ends" in d for d in found) == len(form.writes)


# -- where lines come from ---------------------------------------------------------------------------------------------


@each_kernel
def test_spec_lines(name: str, index: int, role: str) -> None:
    """What a kernel loads of the spec's tensors has the spec's line behind it."""
    scan, kernel = at(name, index, role)
    place = rf"{name}\.spec:\d+"
    operands = {o.name: o for o in scan.form.operands()}
    noted = 0
    for s in kernel.statements():
        if not isinstance(s, Let):
            continue
        if s.name in operands and s.value.op == "tl.load" and role != "token":
            line = scan.spans.get(operands[s.name].node, "")
            assert re.search(place, line), (kernel.name, s.name)
            assert s.note == line
            noted += 1
        update = s.name == "state" and s.value.op == "+" if role in ("states", "ends") else s.name == "new"
        if update:
            assert re.fullmatch(place, s.note)
            noted += 1
    assert noted


@each_kernel
def test_names_are_kept_free(name: str, index: int, role: str) -> None:
    """What a kernel calls its own values no operand is called."""
    scan, kernel = at(name, index, role)
    own = {n for o in scan.form.operands() for n in derived_names(o.name)}
    made = {s.name for s in kernel.statements() if isinstance(s, Let | Loop)}
    made |= {a.removesuffix("_ptr") for a in kernel.arguments}
    assert {n for n in made - own if not NUMBERED.fullmatch(n)} <= EMITTED


@pytest.mark.parametrize("name", cases.OPS)
def test_names_of_launches_are_kept_free(name: str) -> None:
    """What the functions that launch kernels call their own values, and their arguments, no operand is called."""
    source = SourceFile("f.spec", cases.OPS[name])
    units = compile_source(source).units
    forms = [scan_form(u, s) for u in units for s in u.graph.of_kind(N.Scan) if s.i or s.j]
    own = {n for form in forms for o in form.operands() for n in derived_names(o.name)}
    classes = {f"{form.name}_Scan" for form in forms}
    made: set[str] = set()
    for node in ast.parse(emit_files(source, units, {})["_kernels.py"]).body:
        if isinstance(node, ast.ClassDef) and node.name in classes:
            made |= {x.arg for x in ast.walk(node) if isinstance(x, ast.arg)}
            made |= {x.id for x in ast.walk(node) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)}
    assert {n for n in made - own if not NUMBERED.fullmatch(n)} <= EMITTED


def test_an_operand_with_a_name_of_a_kernel() -> None:
    text = cases.OPS["gated"]
    for name in ("near", "inverse", "score_00", "edge_states", "left", "left1"):
        source = SourceFile("f.spec", re.sub(r"\bk\b", name, text))
        (unit,) = compile_source(source).units
        (node,) = unit.graph.of_kind(N.Scan)
        called = {o.name for o in scan_form(unit, node).operands()}
        assert name not in called and not any(NUMBERED.fullmatch(n) for n in called)


@each_kernel
def test_arguments_are_used(name: str, index: int, role: str) -> None:
    """Each pointer is loaded from or stored to, each number is used."""
    _, kernel = at(name, index, role)
    assert set(kernel.arguments) <= {e.op for e in kernel.expressions()}
    assert any(isinstance(s, Store) for s in kernel.statements())


# -- compiled ----------------------------------------------------------------------------------------------------------


def plain(kernel: Kernel, names: list[str]) -> str:
    """The kernel's text without comments, with operands numbered: what decides the machine code."""
    w = Writer()
    kernel.print(w)
    text = re.sub(r'"""[^\n]*"""', "", re.sub(r"  #[^\n]*", "", w.text()))
    text = text.replace(f"def {kernel.name}(", "def kernel(")
    for k, n in enumerate(names):
        text = re.sub(rf"\b((?:d_)?(?:out_)?){n}(_ptr)?\b", rf"\1operand {k}\2", text)
    return text


@dataclass(frozen=True)
class Source:
    """A kernel to compile: its name in an emitted module, the warps of a program, further constants."""

    name: str
    warps: int
    blocks: tuple[tuple[str, int], ...] = ()
    stages: int = 1


@cache
def module(name: str, folder: Path) -> ModuleType:
    package, _, _ = emit(TEXTS[name], folder, f"{name}.spec")
    return importlib.import_module(f"{package.__name__}._kernels")


def unique(names: list[str]) -> dict[str, list[Source]]:
    """The kernels of these specs by spec, each text once (operands' names do not count)."""
    seen: set[str] = set()
    found: dict[str, list[Source]] = {}
    for name in names:
        for scan in scans(name):
            own = [o.name for o in scan.form.operands()]
            for role, kernel in scan.kernels.items():
                text = plain(kernel, own)
                if text not in seen:
                    seen.add(text)
                    i, j, warps, stages = (128, 32, 4, 1) if role == "token" else default_schedule(scan.form, role)
                    source = Source(kernel.name, warps, (("BI", i), ("BJ", j)), stages)
                    found.setdefault(name, []).append(source)
    return found


def compiled(name: str, source: Source, target: str, folder: Path) -> Any:
    kernel = sources(module(name, folder))[source.name]
    if target.startswith("gfx"):  # which has less memory on chip: see SAFE
        return compile_kernel(kernel, target, 8, **{c: n for c, n in source.blocks if c not in ("BI", "BJ")})
    return compile_kernel(kernel, target, source.warps, stages=source.stages, **dict(source.blocks))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


ORDER = ["gated_linear_attention", "mlstm"]
ALL_SHIPPED = [(n, s) for n, found in unique([*ORDER, *(n for n in SHIPPED if n not in ORDER)]).items() for s in found]
TWO = [(n, s) for n, found in unique(ORDER).items() for s in found]
TWO += [("mlstm", Source(name, 4, WALKED)) for name in VECTOR]


def test_equal_kernels_are_compiled_once() -> None:
    assert {n for n, _ in ALL_SHIPPED} >= {*ORDER, "linear_attention"}
    assert len(ALL_SHIPPED) < sum(len(s.kernels) for n in SHIPPED for s in scans(n))


# Bytes a thread that a kernel may keep in memory for want of registers. On a GPU these schedules were faster than those
# that keep none (docs/performance.md); no kernel may come to more.
SPILLS = {"read_j": 208, "read_j_start": 112, "grad_i": 656, "grad_i_start": 32}
SPILLS_THIN = {"states": 48, "grad_i": 8}  # with one number a head, or no gate


@pytest.mark.parametrize("name, source", ALL_SHIPPED, ids=[f"{n}-{s.name}" for n, s in ALL_SHIPPED])
def test_what_spills_on_hopper(name: str, source: Source, folder: Path) -> None:
    """bfloat16 at I = J = 128, with the kernel's own schedule."""
    used = usage(compiled(name, source, "sm_90", folder))
    wide = any(s.form.wide() for s in scans(name))
    most = (SPILLS if wide else SPILLS_THIN).get(source.name.partition("_")[2], 0)
    assert used["stack"] <= most, used
    assert used["shared"] <= 227 * 1024, used


GATED = [(n, s) for n, found in unique(["value_gate", "product_gate", "both_sides"]).items() for s in found]


@pytest.mark.parametrize("name, source", ALL_SHIPPED + GATED, ids=[f"{n}-{s.name}" for n, s in ALL_SHIPPED + GATED])
def test_what_products_read_is_not_overwritten(name: str, source: Source, folder: Path) -> None:
    assert not overwritten(compiled(name, source, "sm_90", folder).asm["ttgir"])


@pytest.mark.parametrize("tile", [SHORT, WALKED], ids=["short", "walked"])
@pytest.mark.parametrize("name", VECTOR)
def test_elementwise_scans_do_not_spill_on_hopper(name: str, tile: tuple[tuple[str, int], ...], folder: Path) -> None:
    source = Source(name, dict(tile)["W"], tile)
    assert usage(compiled("mlstm", source, "sm_90", folder))["stack"] == 0


@pytest.mark.parametrize("name", VECTOR)
def test_elementwise_scans_prefetch_and_walk_within_a_thread(name: str, folder: Path) -> None:
    """What is next comes by asynchronous copies, and a thread has all rows of a tile: that is where the speed is."""
    made = compiled("mlstm", Source(name, 4, WALKED), "sm_90", folder).asm["ttgir"]
    assert "ttg.async_copy_global_to_local" in made
    assert "sizePerThread = [1, 2], threadsPerWarp = [1, 32], warpsPerCTA = [4, 1]" in made
    assert "sizePerThread = [1, 1, 2], threadsPerWarp = [1, 1, 32], warpsPerCTA = [1, 4, 1]" in made


@pytest.mark.parametrize("target", [t for t in TARGETS if t != "sm_90"])
@pytest.mark.parametrize("name, source", TWO, ids=[f"{n}-{s.name}" for n, s in TWO])
def test_compiles_for_other_gpus(name: str, source: Source, target: str, folder: Path) -> None:
    binary = compiled(name, source, target, folder).asm["hsaco" if target.startswith("gfx") else "cubin"]
    assert len(binary) > 1000
