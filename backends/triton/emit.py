"""The text of `_kernels.py`: kernels, their launches and the autograd functions around them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from chunkc.backends.attend import Form, Tile
from chunkc.backends.body import Body
from chunkc.backends.scan import LIMIT, Operand, ScanForm, Side, scan_form
from chunkc.backends.token import token_form
from chunkc.backends.triton.attend import Kernels, attention_kernels
from chunkc.backends.triton.gates import GateKernel, GatePlan
from chunkc.backends.triton.kernel import Kernel
from chunkc.backends.triton.launch import emit_attention
from chunkc.backends.triton.own import SideKernel
from chunkc.backends.triton.packing import emit_tables
from chunkc.backends.triton.pairs import NoKernel
from chunkc.backends.triton.schedule import SUMS, WALKS, complete_kernel, pass_kernel
from chunkc.backends.triton.side import SidePlan
from chunkc.backends.triton.tables import emit_schedules
from chunkc.backends.triton.token import call_kernel, emit_call, emit_step, step_kernel
from chunkc.backends.triton.verify import verify_kernel
from chunkc.backends.triton.walks import emit_vector
from chunkc.backends.vector import vector_forms
from chunkc.backends.writer import Lines, Writer, identifier
from chunkc.ir import nodes as N
from chunkc.ir import tiles as T
from chunkc.ir.diagnostics import SourceFile
from chunkc.ir.graph import Unit
from chunkc.ir.nodes import Input
from chunkc.ir.tuning import Schedule


def launches(form: ScanForm) -> tuple[list[T.Kernel], list[T.Kernel], list[T.Kernel]]:
    """The launches of a scan, in order: forward, backward, one token."""
    graphs = (form.scan.kernels, form.scan.kernels_backward, form.scan.kernel_step)
    forward, backward, step = (g.of_kind(T.Kernel) if g is not None else [] for g in graphs)
    assert forward and backward and step, "the scan has no kernels"
    return forward, backward, step


def kernels_of(form: ScanForm, lines: Lines, spans: dict[str, str]) -> dict[str, Kernel]:
    """The kernels of a scan by role: states, read_i, read_j, ends, grad_i, grad_j, edges and gate of a side, token.

    Kernels over a side of a tile that anchor its pairs are there twice, for tiles that decay little with the anchor
    behind the role's name. A gate's gradient is faster by levels than in blocks, which have more to hold."""
    forward, backward, _ = launches(form)
    anchor, proven = form.mild()
    choose = anchor is not None and not proven
    out = {}
    for launch in (*forward, *backward):
        if launch.rows == "sequences":
            reverse = launch in backward
            out[launch.role] = pass_kernel(form, lines, spans, reverse, totals=choose and not reverse)
        elif launch.role.startswith(("edges", "gate")):
            if (gate := form.gate(launch.blocks[0])) is not None and gate.given:
                out[launch.role] = _gate_kernel(form, launch, spans)
        else:
            plan = replace(_plan(form, launch), only=choose)
            if shares_scores(form, plan.side):
                plan = replace(plan, scores="kept") if plan.forward else replace(plan, scores="given", only=False)
            name = f"{form.name}_{launch.role}"
            out[launch.role] = SideKernel(form, plan, name, spans).build()
            if plan.scores == "given":  # pairs need no anchor
                continue
            if anchor == "start" or anchor == "blocks" and not plan.gate:
                plan, role = replace(plan, anchor=anchor), f"{launch.role}_{anchor}"
                out[role] = SideKernel(form, plan, f"{form.name}_{role}", spans).build()
    out["token"] = step_kernel(form, lines)
    for kernel in out.values():
        verify_kernel(kernel)
    return out


def _gate_kernel(form: ScanForm, launch: T.Kernel, spans: dict[str, str]) -> Kernel:
    """The gradient of a gate: from the tile's edges, from pairs added to what another kernel kept of those, or both."""
    (side,), name = launch.blocks, f"{form.name}_{launch.role}"
    edges = launch.role.startswith("edges")
    kept = any(r.endswith("_edges") for r in launch.reads)
    return GateKernel(form, GatePlan(side, edges=edges or not kept, pairs=not edges), name, spans).build()


def _plan(form: ScanForm, launch: T.Kernel) -> SidePlan:
    """What a kernel over one side of a tile computes, from what it writes."""
    (side,) = launch.blocks
    written = {name for name, _ in launch.body.outputs}
    graph = form.scan.kernels
    assert graph is not None
    names = dict(zip((n.id for n in graph.of_kind(Input)), form.operands()))
    own = {o.name: f"d_{id_}" in written for id_, o in names.items()}
    results = [name for name, _ in graph.outputs]
    if launch.role.startswith("read"):
        return SidePlan(side, tuple(m for m in range(len(form.queries)) if results[m] in written), (), forward=True)
    reads = tuple(m for m, q in enumerate(form.queries) if own[q.name])
    gate = any(own[g.name] and g.given for g in form.gates)
    return SidePlan(side, reads, tuple(range(len(form.writes))), gate=gate)


def shares_scores(form: ScanForm, side: Side) -> bool:
    """Whether the kernel of reads over a side keeps its scores for the one of gradients: what gates took long to decay
    is smaller than what it is made of. All queries must have their results there, and no gate its gradient or a number
    for each of the side's."""
    gate = form.gate(side)
    return bool(form.gates) and gate is None and all(q.side != side for q in form.queries)


def kept_scores(form: ScanForm) -> list[str]:
    """The scores that are kept from forward to backward, by name."""
    shared = any(shares_scores(form, side) for side in ("i", "j"))
    return [f"scores_{m}{r}" for m in range(len(form.queries)) for r in range(len(form.writes)) if shared]


def spans_of(unit: Unit, lines: Lines) -> dict[str, str]:
    return {n.id: lines.code(n.span) for n in unit.graph.nodes if n.span is not None}


def prefix_of(unit: Unit, units: tuple[Unit, ...]) -> str:
    """What stands before a scan's name where a module holds several units."""
    return f"{unit.name}_" if len(units) > 1 else ""


def print_kernels(unit: Unit, source: SourceFile) -> str:
    """The text of the level `tiled`: the kernels of each matrix scan and of each attention of a unit."""
    lines, w = Lines(source), Writer()
    for scan in unit.graph.of_kind(N.Scan):
        if scan.i or scan.j:
            form = scan_form(unit, scan)
            for kernel in kernels_of(form, lines, spans_of(unit, lines)).values():
                kernel.print(w)
                w()
    for node in unit.graph.of_kind(N.Attend):
        found = attention_of(unit, node, identifier(node.id), lines)
        for made in () if isinstance(found, NoKernel) else found.all():
            made.kernel.print(w)
            w()
    return w.text()


def attention_of(unit: Unit, node: N.Attend, name: str, lines: Lines) -> Kernels | NoKernel:
    """An attention's kernels, or why it has none."""
    try:
        kernels = attention_kernels(Form(Body(unit, lines, Writer(), ""), node), name, lines)
    except NoKernel as reason:
        return reason
    for made in kernels.all():
        verify_kernel(made.kernel)
    return kernels


def scans_of(units: tuple[Unit, ...], lines: Lines) -> list[tuple[ScanForm, dict[str, Kernel]]]:
    """The scans of matrices, and their kernels by role."""
    found = [(u, scan_form(u, s, prefix_of(u, units))) for u in units for s in u.graph.of_kind(N.Scan) if s.i or s.j]
    return [(form, kernels_of(form, lines, spans_of(unit, lines))) for unit, form in found]


def emit_kernels(units: tuple[Unit, ...], lines: Lines, tiles: Mapping[str, Mapping[str, list[Tile]]],
                 schedules: Mapping[str, Schedule]) -> str:  # fmt: skip
    """`_kernels.py` of a package; `tiles` are the functions of each unit's attentions, `schedules` those that differ
    from what kernels have untuned."""
    w = Writer()
    attends = [(u, n) for u in units for n in u.graph.of_kind(N.Attend)]
    scans = [(u, s) for u in units for s in u.graph.of_kind(N.Scan)]
    elementwise = any(not (s.i or s.j) for _, s in scans)
    w("from __future__ import annotations")
    w()
    if attends or any(token_form(u, "") is not None for u in units):
        w("import math")
    if attends:
        w("from functools import partial")
    if elementwise:
        w("from collections.abc import Sequence")
        w("from typing import Any, NamedTuple")
    else:
        w("from typing import Any")
    w()
    w("import torch")
    w("import triton")
    w("import triton.language as tl")
    w("from torch import Tensor")
    w()
    w("from . import _runtime")
    if elementwise:
        w("from . import _elementwise, _torch")
    if attends:
        w("from ._attend import Attention, Kernels, attend")
    head = len(w.lines)
    w()
    w("LEVELS = TILE.bit_length() - 1  # halvings of a tile down to single tokens")
    w("BLOCK = 64  # columns that a program takes at least; Triton 3.6 miscompiles narrower products for Hopper")
    w()
    w()
    _settings(w)
    made = scans_of(units, lines)
    if scans:
        emit_tables(w, matrices=bool(made))
    if elementwise:
        emit_vector([f for u in units for f in vector_forms(u, prefix_of(u, units))], lines, w)
    if made or elementwise:
        _helpers([form for form, _ in made], w)
    if made:
        emit_schedules(made, schedules, w)
        _segments(w)
    for form, kernels in made:
        _scan(form, kernels, lines, w)
    for unit in units:
        if (token := token_form(unit, prefix_of(unit, units))) is not None:
            kernel = call_kernel(token, lines)
            verify_kernel(kernel)
            w()
            w()
            kernel.print(w)
            w()
            w()
            emit_call(token, kernel, lines, w)
    if attends:
        _attention_settings(w)
    for unit, node in attends:
        _attention(unit, node, prefix_of(unit, units), tiles[unit.name][node.id], lines, w)
    exact = "exact, " if any("exact(" in line for line in w.lines) else ""  # sizes that a kernel divides
    w.lines.insert(
        head, f"from ._runtime import LOG_SMALL, TILE, Sequences, as_given, {exact}log_gate, once, tracked, uncast"
    )
    return w.text()


def _attention_settings(w: Writer) -> None:
    w()
    w()
    with w.indented("def block(size: int) -> int:"):
        w('"""Columns of a matrix that is over all of an axis."""')
        w("return max(BLOCK, power_of_two(size))")
    w()
    w()
    with w.indented("def tile(size: dict[str, Any], types: dict[str, Any]) -> tuple[int, int, int]:"):
        w('"""Queries and rows of a tile, and the warps of a program, so that its matrices stay on chip."""')
        w('widest = max(n for name, n in size.items() if name.startswith("BLOCK_"))')
        with w.indented('if types["DOT"] == tl.bfloat16:'):
            w("return (64, 64, 4) if widest <= 128 else (32, 64, 8)")
        w("return (32, 32, 4) if widest <= 128 else (16, 32, 8)")
    w()
    w()
    with w.indented("def factor(x: Tensor, types: dict[str, Any]) -> Tensor:"):
        w('"""An operand of products in the type that they take."""')
        w('return x.to(torch.bfloat16) if types["DOT"] == tl.bfloat16 else x')


def _attention(unit: Unit, node: N.Attend, prefix: str, tiles: list[Tile], lines: Lines, w: Writer) -> None:
    name = f"{prefix}{identifier(node.id)}"
    found = attention_of(unit, node, name, lines)
    if isinstance(found, NoKernel):
        w()
        w()
        w(f"attend_{name} = attend  # no kernels, as {found} ({lines.place(node.span)})")
    else:
        emit_attention(found, tiles, name, lines, w)


def _settings(w: Writer) -> None:
    with w.indented("def cdiv(n: int, block: int) -> int:"):
        w('"""How many blocks n are; as `triton.cdiv`, which takes ten times as long on the host."""')
        w("return -(-n // block)")
    w()
    w()
    with w.indented("def power_of_two(n: int) -> int:"):
        w('"""The least one that is not below n."""')
        w("return 1 << (n - 1).bit_length()")
    w()
    w()
    with w.indented("def types_of(given: torch.dtype) -> dict[str, Any]:"):
        w('"""For products: operand type, precision, the parts of bfloat16 that sums are taken in (0: whole), and the')
        w('nats that a block of tokens may decay by if it is anchored at its start."""')
        with w.indented("if given == torch.float32 or _runtime.interpreted():"):
            w(f'return {{"DOT": tl.float32, "PRECISION": "ieee", "PARTS": 0, "LIMIT": {LIMIT}}}')
        with w.indented("if given == torch.float16:  # the range of float16 is too small for states and scores"):
            w('precision = "ieee" if torch.version.hip else "tf32"')
            w(f'return {{"DOT": tl.float32, "PRECISION": precision, "PARTS": 3, "LIMIT": {LIMIT}}}')
        w(f'return {{"DOT": tl.bfloat16, "PRECISION": "ieee", "PARTS": 2, "LIMIT": {LIMIT}}}')
    w()
    w()
    w("@triton.jit")
    with w.indented("def masked_sum(mask, x, PARTS: tl.constexpr):"):
        w('"""For each row, the sum of the rows of x that its mask names; in parts, to 8, 16 or 24 bits of each."""')
        with w.indented("if PARTS == 0:"):
            w('total = tl.dot(mask.to(tl.float32), x, input_precision="ieee")')
        with w.indented("else:"):
            w("ones = tl.where(mask, 1.0, 0.0).to(tl.bfloat16)")
            w("high = x.to(tl.bfloat16)")
            w("total = tl.dot(ones, high)")
            with w.indented("if PARTS > 1:"):
                w("rest = x - high.to(tl.float32)")
                w("low = rest.to(tl.bfloat16)")
                w("total = tl.dot(ones, low, total)")
                with w.indented("if PARTS > 2:"):
                    w("total = tl.dot(ones, (rest - low.to(tl.float32)).to(tl.bfloat16), total)")
        w("return total")
    w()
    w()
    w("@triton.jit")
    with w.indented("def exp(x):"):
        w('"""A decay. What tl.exp does to keep results below 1e-38 is left out."""')
        w(f"return tl.exp2(x * {math.log2(math.e)})")


# Functions beside the kernels by name: arguments, docstring, a condition on what is constant, and what is found if it
# holds and else. The first four say where tiles lie: as tables of a packed batch do; rows of a dense one have the same
# number of tiles each.
HELPERS: dict[str, tuple[str, str, str, list[str], list[str]]] = {
    "tile_start": ("table_ptr, tile, tokens, each, C: tl.constexpr", "The first token of a tile.",
                   "table_ptr is None:", ["found = tile // each * tokens + tile % each * C"],
                   ["found = tl.load(table_ptr + tile)"]),
    "tile_stop": ("table_ptr, tile, tokens, each", "The end of a tile's sequence.",
                  "table_ptr is None:", ["found = (tile // each + 1) * tokens"], ["found = tl.load(table_ptr + tile)"]),
    "sequence_start": ("offsets_ptr, sequence, tokens", "The first token of a sequence.",
                       "offsets_ptr is None:", ["found = sequence * tokens"],
                       ["found = tl.load(offsets_ptr + sequence)"]),
    "sequence_tile": ("table_ptr, sequence, each", "The first tile of a sequence.",
                      "table_ptr is None:", ["found = sequence * each"], ["found = tl.load(table_ptr + sequence)"]),
    "rounded": ("x, DOT: tl.constexpr, PRECISION: tl.constexpr",
                "A factor of a product in the digits that the product takes of it.",
                'PRECISION == "tf32":  # 10 of float32\'s 23, to the nearest',
                ["bits = x.to(tl.int32, bitcast=True)",
                 "found = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)"],
                ["found = x.to(DOT)"]),
    "is_mild": ("totals_ptr, cell, D: tl.constexpr, A: tl.constexpr, LIMIT: tl.constexpr",
                "Whether a tile decays by less than LIMIT nats in each of D numbers; without totals none is known to.",
                "totals_ptr is None:", ["found = cell < 0"],
                ["col = tl.arange(0, A)",
                 "found = tl.min(tl.load(totals_ptr + cell * D + col, mask=col < D, other=0.0), 0) > -LIMIT"]),
}  # fmt: skip


def _helpers(forms: list[ScanForm], w: Writer) -> None:
    """The functions that the kernels of these scans of matrices call, and those of elementwise ones."""
    unused = {"rounded"} if not any(form.wide() for form in forms) else set()
    unused |= {"is_mild"} if not any(_totals(form) for form in forms) else set()
    unused |= set(HELPERS) - {"sequence_start"} if not forms else set()
    for name in HELPERS:
        if name in unused:
            continue
        arguments, doc, condition, then, otherwise = HELPERS[name]
        w()
        w()
        w("@triton.jit")
        with w.indented(f"def {name}({arguments}):"):
            w(f'"""{doc}"""')
            for head, lines in ((f"if {condition}", then), ("else:", otherwise)):
                with w.indented(head):
                    for line in lines:
                        w(line)
            w("return found")


def _segments(w: Writer) -> None:
    """What the walks of all matrix scans share where sequences are cut."""
    kernel = complete_kernel()
    verify_kernel(kernel)
    w()
    w()
    kernel.print(w)
    w.paste(WALKS)


def _scan(form: ScanForm, kernels: dict[str, Kernel], lines: Lines, w: Writer) -> None:
    for kernel in kernels.values():
        w()
        w()
        kernel.print(w)
    names = [o.name for o in form.operands()]
    typed = ", ".join(f"{n}: Tensor" for n in names)
    outs, scores = form.results(), kept_scores(form)
    options = ", wanted: bool" * bool(scores) + form.typed_numbers()
    w()
    w()
    with w.indented(f"class {form.name}_Scan(torch.autograd.Function):"):
        w(f'"""The recurrence of {form.scan.name} ({lines.place(form.scan.span)})."""')
        w()
        w("@staticmethod")
        with w.indented(
            f"def forward(ctx: Any, seq: Sequences, {typed}, initial: Tensor | None{options}) -> tuple[Tensor, ...]:"
        ):
            w("operands = (" + "".join(f"{n}.contiguous(), " for n in names).rstrip() + ")")
            w(f"{''.join(n + ', ' for n in names).rstrip()} = operands")
            _prepare(form, w)
            key = form.writes[0][0].name
            w("initial = None if initial is None else initial.contiguous()")
            w('kept = torch.bfloat16 if types["DOT"] == tl.bfloat16 else torch.float32')
            w(f"states = {key}.new_empty((tiles, H, I, J), dtype=kept)")
            totals = _totals(form)
            for name, side in totals.items():
                w(f"{name} = {key}.new_empty((tiles, H, {side.upper()}), dtype=torch.float32)")
            forward, backward, (token,) = launches(form)
            _walk(form, kernels, forward[0], w, "last", "initial", "states")
            for q, out in zip(form.queries, outs):
                like = form.writes[0][q.side == "i"].name  # of the side that the result is over
                w(f"{out} = torch.empty_like({like})")
            for name in scores:
                w(f"{name} = {key}.new_empty((tiles, H, TILE, TILE), dtype=kept) if wanted else None")
            for launch in forward[1:]:
                _launch(form, kernels, launch, w)
            w("ctx.seq = seq")
            if form.numbers():
                w(f"ctx.numbers = ({''.join(n + ', ' for n in form.numbers()).rstrip()})")
            w(f"ctx.save_for_backward({', '.join(['*operands', 'states', *totals, *scores])})")
            w(f"return ({', '.join(outs)},) if last is None else ({', '.join([*outs, 'last'])})")
        w()
        w("@staticmethod")
        w("@as_given")
        grads = [f"d_{o}" for o in outs]
        typed_grads = ", ".join([*(f"{g}: Tensor" for g in grads), "d_last: Tensor | None = None"])
        with w.indented(f"def backward(ctx: Any, {typed_grads}) -> tuple[Tensor | None, ...]:"):
            w("once()")
            _backward(form, kernels, backward, w)
    w()
    w()
    emit_step(form, kernels[token.role], lines, w)
    _entry(form, names, typed, w)


def _entry(form: ScanForm, names: list[str], typed: str, w: Writer) -> None:
    """The function that layers call: one token is a kernel of its own, which takes operands as they are stored."""
    numbers = form.typed_numbers()
    operands = ", ".join([*names, "initial"])
    given = ", ".join(["seq", operands, *form.numbers()])
    wanted = [f"tracked({operands})"] if kept_scores(form) else []
    w()
    w()
    w("@as_given")
    with w.indented(
        f"def {form.name}_scan(seq: Sequences, {typed}, initial: Tensor | None{numbers}) -> tuple[Any, ...]:"
    ):
        w(f'"""Operands [B, T, H, D], the state [N, H, I, J] before the first token; gives each read {form.when} '
          f'the update{", times its scale" * bool(numbers)}, and the last state. Without a state it starts at zero '
          'and gives none."""')  # fmt: skip
        with w.indented(f"if seq.one_token and initial is not None and not tracked({operands}):"):
            w(f"return {form.name}_step({given})")
        w(f"places(seq)  # kept from here on: torch.compile keeps nothing that is made inside `{form.name}_Scan`")
        taken = ", ".join(["seq", operands, *wanted, *form.numbers()])
        w(f"result: tuple[Any, ...] = {form.name}_Scan.apply({taken})")
        w("return (*result, None) if initial is None else result")


def _prepare(form: ScanForm, w: Writer) -> None:
    """Sizes, tiles, and the logarithms of gates that are none."""
    i, j = form.writes[0]
    w("offsets, start, stop, first, tokens, each, tiles = places(seq)")
    w("types = types_of(seq.given)")
    w(f"H, I, J = {i.name}.shape[2], {i.name}.shape[3], {j.name}.shape[3]")
    for g in form.gates:
        if g.raw:
            w(f"{g.name} = log_gate({g.name}.float())")
    if form.gates:
        w(f"parts = gate_parts(types, {', '.join(g.name for g in form.gates)})")


def _totals(form: ScanForm) -> dict[str, str]:
    """What tells mild tiles from others: the gates' sums over a tile, by name, with their sides."""
    anchor, proven = form.mild()
    return {} if anchor is None or proven else {f"totals_{g.side}": g.side for g in form.wide()}


def _walk(form: ScanForm, kernels: dict[str, Kernel], launch: T.Kernel, w: Writer, last: str, initial: str,
          states: str) -> None:  # fmt: skip
    """A walk over tiles: its launch as a function, and `walked_tiles`, which calls it. With a gate for each number a
    step takes long, and little is left of a state: sequences are cut before programs leave a GPU idle."""
    kept = [f"{name}_{g.side}" for g in form.gates for name in SUMS]
    sides = "".join(g.side for g in form.gates)
    enough = "FULL" if form.wide() else "IDLE"
    w()
    w("def launch(")
    w("    segment: int, segments: int, initial: Tensor | None, states: Tensor, last: Tensor | None"
      + "".join(f", {name}: Tensor | None = None" for name in kept))  # fmt: skip
    with w.indented(") -> None:"):
        _call(kernels[launch.role], launch, w, {})
    w()
    w(f'{last} = walked_tiles(seq, launch, "{sides}", {enough}, {initial}, {states}, {launch.role == "ends"})')


def _launch(form: ScanForm, kernels: dict[str, Kernel], launch: T.Kernel, w: Writer) -> None:
    """A launch over tiles, blocks of a side and heads. Where tiles may be mild, or are proven to be, a second kernel
    has those in bfloat16; the first one then has the rest."""
    kernel = kernels[launch.role]
    anchor, proven = form.mild()
    mild = kernels.get(f"{launch.role}_{anchor}")
    if mild is None:
        with w.indented("if tiles:"):
            _call(kernel, launch, w, {})
        return
    with w.indented('if tiles and types["DOT"] == tl.bfloat16:'):
        _call(mild, launch, w, {})
        if not proven:
            _call(kernel, launch, w, {})
    with w.indented("elif tiles:"):
        _call(kernel, launch, w, dict.fromkeys(_totals(form), "None"))


def _call(kernel: Kernel, launch: T.Kernel, w: Writer, rename: dict[str, str]) -> None:
    """One kernel's call; `rename`: what the function around it calls some arguments."""
    parts = {f"parts_{s}": f'cdiv({s.upper()}, chosen["B{s.upper()}"])' for s in "ij"}
    count = " * ".join(parts[f"parts_{s}"] for s in launch.blocks)
    named = {"tile_start": "start", "tile_stop": "stop", "first_tile": "first", "levels": "LEVELS", "upper_levels": "2"}
    arguments = [a.removesuffix("_ptr") for a in kernel.arguments]
    arguments = [{**named, **parts, **rename}.get(a, a) for a in arguments]
    given = {"C": "TILE", "AI": "power_of_two(I)", "AJ": "power_of_two(J)", "GATE_PARTS": "parts"}
    given |= {c: c for c in ("H", "I", "J", "LEVELS")}
    given |= {c: f'types["{c}"]' for c in ("DOT", "PRECISION", "PARTS", "LIMIT")}
    walked = launch.rows == "sequences"
    rows, walks = ("seq.count * segments", ", seq.count * H * segments") if walked else ("tiles", "")
    w(f'chosen = schedule("{kernel.name}", I, J, types{walks})')
    w(f"{kernel.name}[({rows} * H * {count},)](")
    w(f"    {', '.join(arguments)},")
    w(f"    {', '.join(f'{c}={given[c]}' for c in kernel.constants if c in given)}, **chosen,")
    w(")")


def _backward(form: ScanForm, kernels: dict[str, Kernel], backward: list[T.Kernel], w: Writer) -> None:
    names, grads = [o.name for o in form.operands()], [f"d_{o}" for o in form.results()]
    w("seq = ctx.seq")
    if form.numbers():
        w(f"{''.join(n + ', ' for n in form.numbers()).rstrip()} = ctx.numbers")
    scores = kept_scores(form)
    w(f"{', '.join([*names, 'states', *_totals(form), *scores])} = ctx.saved_tensors")
    w(f"{''.join(g + ', ' for g in grads).rstrip()} = {''.join(g + '.contiguous(), ' for g in grads).rstrip()}")
    for g in form.gates:
        if g.raw:
            w(f"{g.name}_value = {g.name}")
    _prepare(form, w)
    w("d_last = None if d_last is None else d_last.contiguous()")
    w("ends = torch.empty_like(states)")
    _walk(form, kernels, backward[0], w, "d_initial", "d_last", "ends")
    wanted = [o for o in form.operands() if o.given]
    for o in wanted:
        w(f"d_{o.name} = {_gradient_buffer(form, o)}")
    raised: set[str] = set()
    for launch in (x for x in backward[1:] if x.role in kernels):
        raised = _raise_gates(form, raised_by(form, launch), raised, w)
        _launch(form, kernels, launch, w)
    for g in (g for g in form.gates if g.given):
        if g.thin:
            w(f"d_{g.name} = d_{g.name}.sum(-1, keepdim=True)")
        if g.raw:
            w(f"d_{g.name} = d_{g.name} / {g.name}_value.float().clamp(min=2.0**-40)")
        if g.thin or g.raw:
            w(f"d_{g.name} = d_{g.name}.to({g.name}{'_value' if g.raw else ''}.dtype)")
    gradients = [f"d_{o.name}" if o.given else "None" for o in form.operands()]
    rest = ["None"] * (bool(scores) + len(form.numbers()))
    w(f"return None, {', '.join([*gradients, 'd_initial', *rest])}")


def raised_by(form: ScanForm, launch: T.Kernel) -> set[str]:
    """The gates that a kernel wants raised, by name: those that are divided out of their gradient."""
    graph = form.scan.kernels_backward
    assert graph is not None
    names = dict(zip((n.name for n in graph.of_kind(N.Input)), (o.name for o in form.operands())))
    small = {tile.arg for tile in launch.body.of_kind(T.Tile) if tile.log == "small"}
    return {names[launch.body[arg].name] for arg in small}  # type: ignore[union-attr]


def _raise_gates(form: ScanForm, wanted: set[str], raised: set[str], w: Writer) -> set[str]:
    """Give each gate that is no logarithm the least value that the next kernel wants; those that are raised now."""
    for g in form.gates:
        if g.name in wanted - raised:
            w(f"# {g.name} is divided out of its gradient, so that exact zeros have one")
            w(f"{g.name} = log_gate({g.name}_value.float(), LOG_SMALL)")
        elif g.name in raised - wanted:
            w(f"{g.name} = log_gate({g.name}_value.float())")
    return wanted


def _gradient_buffer(form: ScanForm, o: Operand) -> str:
    if not o.thin:
        return f"torch.empty_like({o.name})"
    role = f"{'edges' if o.raw else 'grad'}_{o.side}"
    block = f'schedule("{form.name}_{role}", I, J, types)["B{o.side.upper()}"]'
    size = f"cdiv({o.side.upper()}, {block})"
    return f"{o.name}.new_empty((*{o.name}.shape[:3], {size}), dtype=torch.float32)"
