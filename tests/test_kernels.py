"""The level `tiled`: kernels as text that reads back, their rules, and their meaning in float64, program by program."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import cases
import pytest
import torch
from derived import TEXTS as DERIVED_TEXTS
from derived import Scan as Derived
from derived import close, outputs
from derived import scans as derived_scans
from test_structure import CHUNKED, KERNELS, PASSED, TEXTS, VECTOR, at, scans
from torch import Tensor

from chunkc.backends.scan import ScanForm
from chunkc.backends.token import free_side
from chunkc.backends.triton.emit import kept_scores, kernels_of, launches
from chunkc.backends.triton.kernel import Expr, If, Kernel, Let, Loop, Statement, Store
from chunkc.backends.triton.packing import fill_kernel
from chunkc.backends.triton.schedule import SUMS, complete_kernel
from chunkc.backends.triton.text import parse_expr, parse_kernels
from chunkc.backends.triton.vector import own_kernels
from chunkc.backends.triton.verify import KernelError, verify_kernel
from chunkc.backends.vector import vector_forms
from chunkc.backends.writer import Lines, Writer
from chunkc.driver import compile_source
from chunkc.interp_kernels import Launch
from chunkc.ir import nodes as N
from chunkc.ir import tiles as T
from chunkc.ir.diagnostics import SourceFile
from chunkc.passes.regions import result_names, state_axes

each_kernel = pytest.mark.parametrize("name, index, role", KERNELS, ids=[f"{n}-{i}-{r}" for n, i, r in KERNELS])


def text_of(kernel: Kernel) -> str:
    w = Writer()
    kernel.print(w)
    return w.text()


@each_kernel
def test_text_reads_back(name: str, index: int, role: str) -> None:
    _, kernel = at(name, index, role)
    assert parse_kernels(text_of(kernel)) == {kernel.name: kernel}


@pytest.mark.parametrize("name", VECTOR)
def test_text_of_elementwise_scans_reads_back(name: str) -> None:
    assert parse_kernels(text_of(VECTOR[name])) == {name: VECTOR[name]}


@each_kernel
def test_rules_hold(name: str, index: int, role: str) -> None:
    _, kernel = at(name, index, role)
    verify_kernel(kernel)


def test_what_completes_segments() -> None:
    kernel = complete_kernel()
    assert parse_kernels(text_of(kernel)) == {kernel.name: kernel}
    verify_kernel(kernel)


@pytest.mark.parametrize("name", VECTOR)
def test_rules_hold_of_elementwise_scans(name: str) -> None:
    verify_kernel(VECTOR[name])


# -- rules, each broken once -------------------------------------------------------------------------------------------


def kernel_of(role: str, name: str = "gated") -> Kernel:
    return at(name, 0, role)[1]


def mapped(kernel: Kernel, change: Callable[[Statement], Statement | None]) -> Kernel:
    """The kernel with each statement changed, or left out."""

    def walk(body: tuple[Statement, ...]) -> tuple[Statement, ...]:
        inner = (replace(s, body=walk(s.body)) if isinstance(s, Loop | If) else s for s in body)
        return tuple(x for x in (change(s) for s in inner) if x is not None)

    return replace(kernel, body=walk(kernel.body))


def refused(kernel: Kernel, what: str) -> None:
    with pytest.raises(KernelError, match=re.escape(what)):
        verify_kernel(kernel)


def without(name: str) -> Callable[[Statement], Statement | None]:
    return lambda s: None if isinstance(s, Let) and s.name == name else s


def test_rejects_names() -> None:
    kernel = kernel_of("read_j")
    refused(mapped(kernel, without("has_i")), "'has_i' is not defined")
    start = lambda s: None if isinstance(s, Let) and s.name == "out_q" and not s.add else s
    refused(mapped(kernel, start), "'out_q' is added to before it is defined")
    refused(replace(kernel, arguments=("g", *kernel.arguments)), "argument 'g' is no pointer")
    refused(replace(kernel, arguments=kernel.arguments[1:]), f"'{kernel.arguments[0]}' is not defined")
    loop = Loop("part", parse_expr("tl.cdiv(I, BI)"), "blocks of side i", (Let("inside", parse_expr("C")),))
    refused(replace(kernel, body=(loop, Let("x", parse_expr("inside")))), "'inside' is not defined")


def test_rejects_stores_and_loads_without_masks() -> None:
    kernel = kernel_of("read_j")

    def masked(mask: Expr | None) -> Kernel:
        """The kernel with another mask of its result."""
        result = lambda s: isinstance(s, Store) and s.pointer.text().startswith("out_")
        return mapped(kernel, lambda s: replace(s, mask=mask) if result(s) else s)

    refused(masked(None), "no mask bounds col_j, row")
    refused(masked(parse_expr("inside[:, None]")), "no mask bounds col_j")

    other = lambda s: replace(s, value=parse_expr("col_i < J")) if isinstance(s, Let) and s.name == "has_i" else s
    refused(mapped(kernel, other), "no mask bounds col_i")

    def unmasked(s: Statement) -> Statement:
        if isinstance(s, Let) and s.name == "k":
            return replace(s, value=replace(s.value, keywords=(("mask", "has_i[None, :]"), ("other", "0.0"))))
        return s

    refused(mapped(kernel, unmasked), "no mask bounds row")


def test_rejects_shapes() -> None:
    kernel = kernel_of("read_j")

    def put(text: str) -> Kernel:
        return mapped(kernel, lambda s: replace(s, value=parse_expr(text)) if getattr(s, "add", False) else s)

    refused(put("tl.dot(q, states[:, :, None])"), "[:, :, None] of a value")
    refused(put("tl.dot(states, states)"), "not (BI)")
    refused(put("tl.dot(row, states)"), "tl.dot of what is no matrix")
    refused(put("tl.sum(q, 2)"), "a sum over axis 2")
    refused(put("q"), "meets")
    refused(put("tl.load(col_j)"), "it is no pointer")
    refused(put("tl.load((q_ptr + row) * I)"), "an offset is added to a pointer")
    refused(put("tl.sort(q)"), "'tl.sort' is no function of kernels")


def test_rejects_loops_over_tokens() -> None:
    kernel = kernel_of("states")
    tokens = lambda s: replace(s, over="tokens") if isinstance(s, Loop) else s
    refused(mapped(kernel, tokens), "it runs over tokens")
    stop = lambda s: replace(s, stop=parse_expr("stop - start")) if isinstance(s, Loop) else s
    refused(mapped(kernel, stop), "it runs over tiles")
    with pytest.raises(ValueError, match="a loop over stop - start"):
        parse_kernels(text_of(mapped(kernel, stop)))


@pytest.mark.parametrize("line", ["while True: pass", "x: int = 1", "x, y = 1, 2", "x = [1]", "tl.store(x)", "x -= 1"])
def test_text_of_no_kernel(line: str) -> None:
    with pytest.raises((ValueError, IndexError)):
        parse_kernels(f'@triton.jit\ndef f(x_ptr):\n    """F."""\n    {line}\n')


# -- meaning -----------------------------------------------------------------------------------------------------------

LENGTHS = (21, 0, 1, 8)
SCALE = 0.375  # of results that are multiplied by a number
C = 8


@dataclass
class Batch:
    """Sequences laid end to end in tiles, as the table that kernels read."""

    lengths: tuple[int, ...]

    def table(self) -> dict[str, Tensor]:
        start, stop, first, count, token = [], [], [], [], 0
        for length in self.lengths:
            first.append(len(start))
            count.append(-(-length // C))
            start += list(range(token, token + length, C))
            stop += [token + length] * count[-1]
            token += length
        start, stop = [*start, token], [*stop, token]  # shapes allow for tiles that are not there
        offsets = [0, *itertools.accumulate(self.lengths)]
        named = {"tile_start": start, "tile_stop": stop, "first_tile": first, "tile_count": count, "offsets": offsets}
        return {f"{n}_ptr": torch.tensor(x, dtype=torch.int64) for n, x in named.items()}


class Launches:
    """Runs the launches of one direction: memory by name, in the layout of emitted code [tokens, H, D]."""

    def __init__(self, scan: Any, batch: Batch, sizes: dict[str, int], whole: bool = False, segment: int = 0) -> None:
        self.scan, self.batch, self.sizes, self.whole, self.segment = scan, batch, sizes, whole, segment
        self.table = batch.table()
        self.memory: dict[str, Any] = {}

    def empty(self, *shape: int) -> Tensor:
        return torch.full(shape, float("nan"), dtype=torch.float64)  # what nobody writes shows

    def run(self, launch: T.Kernel, block: int) -> None:
        """A launch: in bfloat16 by the kernel for tiles that decay little, and by that for the rest, if there may be
        such; in float32 by the latter alone, without the totals that tell them apart."""
        anchor, proven = self.scan.form.mild()
        mild = self.scan.kernels.get(f"{launch.role}_{anchor}")
        if mild is not None and not self.whole:
            self.run_kernel(mild, launch, block)
        if mild is None or self.whole or not proven:
            kernel = self.scan.kernels[launch.role]
            (self.walk if launch.rows == "sequences" else self.run_kernel)(kernel, launch, block)

    def walk(self, kernel: Kernel, launch: T.Kernel, block: int) -> None:
        """Over whole sequences; or over segments, and then to what these start with."""
        if not self.segment:
            self.run_kernel(kernel, launch, block)
            return
        known, segments = self.memory, max(self.batch.lengths) // self.segment + 2  # more than there are
        (h, i, j), size = (self.sizes[s] for s in "HIJ"), self.sizes
        count, tiles = len(self.batch.lengths) * segments, self.table["tile_start_ptr"].numel()
        gated = sorted(g.side for g in self.scan.form.gates)
        kept: dict[str, Any] = {f"{n}_{s}": None for n in SUMS for s in "ij"}
        for s in gated:
            rows = {"decay": count, "passed": tiles, "alive": count}
            kept |= {f"{n}_{s}": self.empty(rows[n], h, size[s.upper()]) for n in SUMS}
        reached = self.empty(count, h, i, j)
        self.memory = {**known, **kept, "last": reached}
        self.run_kernel(kernel, launch, block, segments)
        memory = {**kept, "reached": reached, "states": known["states"], "last": known["last"]}
        memory |= {"offsets": self.table["offsets_ptr"], "first_tile": self.table["first_tile_ptr"]}
        numbers = {"tokens": -1, "each": -1, "segment": self.segment, "segments": segments}
        pointers = {f"{n}_ptr": x if x is None else x.view(-1) for n, x in memory.items()}
        constants = {**size, "C": C, "BI": 4, "BJ": 4, "BACK": int(launch.role == "ends")}
        Launch(complete_kernel(), (count * h * -(-i // 4) * -(-j // 4),), {**pointers, **numbers}, constants).run()
        self.memory = known

    def run_kernel(self, kernel: Kernel, launch: T.Kernel, block: int, segments: int = 1) -> None:
        passed = {v: k for k, v in PASSED.get(launch.role, {}).items()}
        memory: dict[str, Tensor | int | None] = {f"{n}_{s}_ptr": None for n in SUMS for s in "ij"}
        memory |= {f"{passed.get(n, n)}_ptr": x if x is None else x.view(-1) for n, x in self.memory.items()}
        memory |= {"segment": self.segment if segments > 1 else sum(self.batch.lengths), "segments": segments}
        memory |= {**self.table, "tokens": -1, "each": -1, "levels": C.bit_length() - 1, "upper_levels": 2}
        memory |= dict.fromkeys(self.scan.form.numbers(), SCALE)
        memory |= {f"parts_{s}": -(-self.sizes[s.upper()] // block) for s in "ij"}
        if self.whole and launch.role != "states":
            memory |= {"totals_i_ptr": None, "totals_j_ptr": None}
        constants = {
            "AI": 32,
            "AJ": 32,
            **self.sizes,
            "C": C,
            "LEVELS": C.bit_length() - 1,
            "BI": block,
            "BJ": block,
            "LIMIT": 60.0,
            "PARTS": 0 if self.whole else 2,
            "GATE_PARTS": 2,
        }
        rows = self.table["tile_start_ptr"].numel() if launch.rows == "tiles" else len(self.batch.lengths) * segments
        blocks = [-(-self.sizes[s.upper()] // block) for s in launch.blocks]
        grid = (rows * math.prod(blocks) * self.sizes["H"],) if blocks else (rows, self.sizes["H"])
        if launch.role == "token":  # a block of the side that no sum is over, all of the others
            own = free_side(self.scan.form, [])
            constants |= {f"B{s.upper()}": 64 for s in "ij" if s != own}
            grid = (*grid, -(-self.sizes[own.upper()] // block) if own else 1)
        Launch(kernel, grid, memory, constants).run()


def drawn(scan: Any, given: Derived, tokens: int) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Operands [tokens, H, D] by name and the sizes, from the operands that the tests of derived graphs draw."""
    values = given.draw(tokens)
    node = scan.form.scan
    heads = math.prod(given.shape(node.batch, tokens))
    sizes = {"H": heads, "I": math.prod(given.shape(node.i, 1)), "J": math.prod(given.shape(node.j, 1))}
    operands = zip(scan.form.operands(), given.slots)
    return {o.name: values[s.name].detach().reshape(tokens, heads, -1) for o, s in operands}, sizes


def logs(form: ScanForm, values: dict[str, Tensor], least: float) -> dict[str, Tensor]:
    """The operands as kernels take them: gates as logarithms."""
    raw = {g.name for g in form.gates if g.raw}
    return {n: x.clamp(min=1e-300).log().clamp(min=least) if n in raw else x for n, x in values.items()}


def forward(run: Launches, values: dict[str, Tensor], initial: Tensor | None, block: int) -> None:
    form, tokens = run.scan.form, sum(run.batch.lengths)
    h, i, j = (run.sizes[s] for s in "HIJ")
    run.memory = {**logs(form, values, -1e4), "initial": initial}
    tiles, last = run.table["tile_start_ptr"].numel(), None if initial is None else torch.empty_like(initial)
    run.memory |= {"states": run.empty(tiles, h, i, j), "last": last}
    run.memory |= {"totals_i": run.empty(tiles, h, i), "totals_j": run.empty(tiles, h, j)}
    run.memory |= {name: run.empty(tiles, h, C, C) for name in kept_scores(form)}
    for q, out in zip(form.queries, form.results()):
        run.memory[out] = run.empty(tokens, h, j if q.side == "i" else i)
    for launch in launches(form)[0]:
        run.run(launch, block)


def backward(
    run: Launches, values: dict[str, Tensor], grads: dict[str, Tensor | None], block: int
) -> dict[str, Tensor]:
    form, tokens = run.scan.form, sum(run.batch.lengths)
    states, d_last = run.memory["states"], grads["d_last"]
    kept = {n: run.memory[n] for n in ("states", "totals_i", "totals_j", *kept_scores(form))}
    run.memory = {**logs(form, values, -1e4), **grads, **kept}
    run.memory |= {"ends": torch.empty_like(states), "d_initial": None if d_last is None else torch.empty_like(d_last)}
    for o in (o for o in form.operands() if o.given):
        parts = -(-run.sizes[o.side.upper()] // block)
        run.memory[f"d_{o.name}"] = run.empty(tokens, run.sizes["H"], parts if o.thin else values[o.name].shape[-1])
    first, *rest = launches(form)[1]
    own = {"initial": d_last, "last": run.memory["d_initial"], "states": run.memory["ends"]}
    kept, run.memory = (
        run.memory,
        {**{n: x for n, x in run.memory.items() if n not in (*PASSED["ends"].values(),)}, **own},
    )
    run.run(first, block)
    run.memory = kept
    for launch in (x for x in rest if x.role in run.scan.kernels):
        if any(tile.log == "small" for tile in launch.body.of_kind(T.Tile)):
            run.memory |= logs(form, values, -40 * math.log(2))
        run.run(launch, block)
    found = {n: x for n, x in run.memory.items() if n.startswith("d_") and n not in grads and x is not None}
    for g in (g for g in form.gates if g.given):
        found[f"d_{g.name}"] = found[f"d_{g.name}"].sum(-1, keepdim=True) if g.thin else found[f"d_{g.name}"]
        if g.raw:
            found[f"d_{g.name}"] = found[f"d_{g.name}"] / values[g.name].clamp(min=2.0**-40)
    return found


def wanted(given: Derived, node: N.Scan, pieces: list[tuple[dict[str, Tensor], dict[str, Tensor]]]) -> Any:
    """For each sequence the results, and by autograd the gradients, of the interpreter's loop over tokens."""
    for values, grads in pieces:
        tokens = next(iter(values.values())).shape[0]
        results = outputs(given.alone(), values, tokens)
        total = sum((x * grads[f"d_{n}"].reshape(x.shape)).sum() for n, x in results.items())
        total.backward()  # type: ignore[union-attr]
        yield results, {n: torch.zeros_like(x) if x.grad is None else x.grad for n, x in values.items()}


@pytest.mark.parametrize("name", CHUNKED)
@pytest.mark.parametrize("segment", [0, C, 2 * C])
@pytest.mark.parametrize("block, whole", [(4, True), (16, False)], ids=["as in float32", "as in bfloat16"])
def test_kernels_mean_the_scan(name: str, block: int, whole: bool, segment: int) -> None:
    """Ragged and empty sequences, tiles of 8 tokens, sides in blocks: forward and gradients in float64, by the launches
    that there are in float32 (`whole` sums) and in bfloat16, by walks over whole sequences and over segments."""
    for index, scan in enumerate(scans(name)):
        given = [s for s in derived_scans(name) if s.node.i or s.node.j][index]
        compare(scan, given, *drawn(scan, given, sum(LENGTHS)), block, whole, segment)


def scales(form: ScanForm) -> dict[str, float]:
    """What each result is multiplied by."""
    return {"last": 1.0, **{out: SCALE if name else 1.0 for out, name in zip(form.results(), form.scales)}}


@pytest.mark.parametrize("name", CHUNKED)
def test_kernels_multiply_what_is_read(name: str) -> None:
    """The same kernels where the first result, or each one, is multiplied by a number."""
    for index, scan in enumerate(scans(name)):
        given = [s for s in derived_scans(name) if s.node.i or s.node.j][index]
        names = [f"scale_{q.name}" for q in scan.form.queries]
        for scaled in {(names[0], *[""] * (len(names) - 1)), tuple(names)}:
            form = replace(scan.form, scales=scaled)
            other = replace(scan, form=form, kernels=kernels_of(form, Lines(SourceFile("", "")), scan.spans))
            compare(other, given, *drawn(other, given, sum(LENGTHS)), 16, whole=False)
            compare(other, given, *drawn(other, given, sum(LENGTHS)), 4, whole=True)


def compare(scan: Any, given: Derived, values: dict[str, Tensor], sizes: dict[str, int], block: int, whole: bool,
            segment: int = 0) -> None:  # fmt: skip
    """A scan's kernels against the loop over tokens, forward and backward."""
    torch.manual_seed(1)
    initial = torch.randn(len(LENGTHS), sizes["H"], sizes["I"], sizes["J"], dtype=torch.float64)
    run = Launches(scan, Batch(LENGTHS), sizes, whole, segment)
    forward(run, values, initial, block)
    have = {n: run.memory[n] for n in (*scan.form.results(), "last")}
    grads = {f"d_{n}": torch.randn(x.shape, dtype=torch.float64) for n, x in have.items()}
    have_grads = backward(run, values, grads, block)
    check(scan, given, values, initial, grads, have, have_grads)


@pytest.mark.parametrize("name", ["gated", "two_states"])
def test_no_state_is_one_of_zeros(name: str) -> None:
    """Without a first state, and a last one and its gradient, all else is the same to the last bit."""
    for index, scan in enumerate(scans(name)):
        given = [s for s in derived_scans(name) if s.node.i or s.node.j][index]
        values, sizes = drawn(scan, given, sum(LENGTHS))
        zeros = torch.zeros(len(LENGTHS), sizes["H"], sizes["I"], sizes["J"], dtype=torch.float64)
        found = []
        for initial in (zeros, None):
            run = Launches(scan, Batch(LENGTHS), sizes)
            forward(run, values, initial, 16)
            results = {n: run.memory[n] for n in scan.form.results()}
            grads = {f"d_{n}": torch.ones_like(x) for n, x in results.items()}
            found.append(results | backward(run, values, {**grads, "d_last": initial}, 16))
        have, without = found
        assert have.keys() - without.keys() == {"d_initial"}
        assert all(torch.equal(x, have[n]) for n, x in without.items())


@pytest.mark.parametrize("name", ["gated", "value_gate", "product_gate"])
@pytest.mark.parametrize("least, anchor", [(-1.25, "start"), (-5.0, "blocks"), (-5.5, None)])
def test_a_declared_range_proves_an_anchor(monkeypatch: pytest.MonkeyPatch, name: str, least: float,
                                           anchor: str | None) -> None:  # fmt: skip
    """64 tokens of 1.25 nats and 16 of 5 are 80; what decays by more is told tile by tile."""
    own = f"{name} of {least}"
    for texts in (TEXTS, DERIVED_TEXTS):
        monkeypatch.setitem(texts, own, cases.OPS[name].replace("[-inf, 0]", f"[{least}, 0]"))
    (scan,), (given,) = scans(own), derived_scans(own)
    assert scan.form.mild() == (anchor or "start", anchor is not None)
    assert {r.rpartition("_")[2] for r in scan.kernels} >= {anchor or "start"}
    values, sizes = drawn(scan, given, sum(LENGTHS))
    values |= {g.name: least * torch.rand(values[g.name].shape, dtype=torch.float64) for g in scan.form.gates}
    compare(scan, given, values, sizes, 16, whole=False)


def check(scan: Any, given: Derived, values: dict[str, Tensor], initial: Tensor, grads: dict[str, Tensor],
          have: dict[str, Tensor], have_grads: dict[str, Tensor]) -> None:  # fmt: skip
    names = dict(zip((o.name for o in scan.form.operands()), given.slots))
    results = dict(zip((*scan.form.results(), "last"), result_names(given.node, given.names)))
    scale = scales(scan.form)
    pieces, start = [], 0
    for k, length in enumerate(LENGTHS):
        own = slice(start, start + length)
        shape = {o: given.shape(s.axes[1:], length) for o, s in names.items()}
        part = {s.name: values[o][own].reshape(length, *shape[o]).requires_grad_() for o, s in names.items()}
        part["initial"] = initial[k].reshape(given.shape(state_axes(given.node), length)).clone().requires_grad_()
        flows = {f"d_{r}": grads[f"d_{n}"][k if n == "last" else own] * scale[n] for n, r in results.items()}
        pieces.append((part, flows))
        start += length
    found = list(wanted(given, given.node, pieces))
    for n, r in results.items():
        rows = [x[r].detach().reshape(-1, *have[n].shape[1:]) for x, _ in found]
        assert close(have[n], torch.cat(rows) * scale[n]), n
    assert have_grads.keys() == {"d_initial", *(f"d_{o.name}" for o in scan.form.operands() if o.given)}
    for o, s in ((o, s) for o, s in names.items() if f"d_{o}" in have_grads):
        rows = [g[s.name].reshape(-1, *have_grads[f"d_{o}"].shape[1:]) for _, g in found]
        assert close(have_grads[f"d_{o}"], torch.cat(rows)), o
    rows = [g["initial"].reshape(1, *initial.shape[1:]) for _, g in found]
    assert close(have_grads["d_initial"], torch.cat(rows))


@pytest.mark.parametrize("name", CHUNKED)
def test_one_token_means_the_step(name: str) -> None:
    for index, scan in enumerate(scans(name)):
        given = [s for s in derived_scans(name) if s.node.i or s.node.j][index]
        form, count = scan.form, 3
        values, sizes = drawn(scan, given, count)  # a token each of three sequences
        torch.manual_seed(1)
        state = torch.randn(count, sizes["H"], sizes["I"], sizes["J"], dtype=torch.float64)
        run = Launches(scan, Batch((1,) * count), sizes)
        run.memory = {**values, "state": state, "last": torch.empty_like(state)}
        for q, out in zip(form.queries, form.results()):
            run.memory[out] = run.empty(count, sizes["H"], sizes["J" if q.side == "i" else "I"])
        (launch,) = launches(form)[2]
        run.run(launch, 4)
        step = given.node.step
        assert step is not None
        own = {a.name: a for a in given.axes()}
        step = step.evolve(axes=tuple(own.get(a.name, a) for a in step.axes))
        names = dict(zip((*form.results(), "last"), result_names(given.node, given.names)))
        for k in range(count):
            token = {s.name: values[o.name][k].reshape(given.shape(s.axes[1:], 1))
                     for o, s in zip(form.operands(), given.slots)}  # fmt: skip
            token["state"] = state[k].reshape(given.shape(state_axes(given.node), 1))
            found = outputs(step, token, 1)
            for n, r in names.items():
                assert close(run.memory[n][k], found[r].reshape(run.memory[n][k].shape) * scales(form)[n]), n


class Walk:
    """Runs kernels of elementwise scans over ragged sequences: channels in blocks of 4, of 6; tiles in two parts."""

    def __init__(self, after: int, parts: int = 2) -> None:
        self.parts = parts
        torch.manual_seed(0)
        self.after, self.size, total = after, 6, sum(LENGTHS)
        self.ends = torch.tensor([0, *LENGTHS]).cumsum(0)
        a, b, g = torch.rand(3, total, self.size, dtype=torch.float64)
        initial, d_last = torch.randn(2, len(LENGTHS), self.size, dtype=torch.float64)
        self.given = {"a": a, "b": b, "g": g, "initial": initial, "d_last": d_last}

    def run(self, name: str, **given: Tensor) -> dict[str, Tensor]:
        return self.launch(VECTOR[name], {**self.given, **given})

    def launch(self, kernel: Kernel, given: dict[str, Tensor], **numbers: float) -> dict[str, Tensor]:
        """Memory by name after a launch; what nobody writes is NaN. `numbers`: of parameters."""
        given = {"bounds": self.ends, **given}
        names = [x.removesuffix("_ptr") for x in kernel.arguments if x != "tokens"]
        rows = given["bounds"].numel() - 1
        states = ("last", "decay", "total", "d_initial")
        shapes = {n: (rows if n.startswith(states) else sum(LENGTHS), self.size) for n in names}
        memory = {n: given[n] if n in given else torch.full(shapes[n], float("nan")).double() for n in names}
        constants = {"D": self.size, "C": C, "W": self.parts, "BD": 4, "AFTER": self.after, **numbers}
        pointers: dict[str, Any] = {f"{n}_ptr": x.view(-1) for n, x in memory.items()}
        Launch(kernel, (rows, -(-self.size // 4)), {**pointers, "tokens": 0}, constants).run()
        return memory

    def loop(self, a: Tensor, b: Tensor, initial: Tensor, tropical: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """h before and after each token, and the last ones, a token at a time."""
        before, after, last = [], [], []
        for k, start in enumerate(self.ends[:-1].tolist()):
            state = initial[k]
            for t in range(start, start + LENGTHS[k]):
                before.append(state)
                state = torch.maximum(a[t] + state, b[t]) if tropical else a[t] * state + b[t]
                after.append(state)
            last.append(state)
        return torch.stack(before), torch.stack(after), torch.stack(last)


each_form = pytest.mark.parametrize("after", [0, 1], ids=["before", "after"])


@each_form
@pytest.mark.parametrize("name", ["vector", "vector_reverse", "max_plus"])
def test_elementwise_kernels_mean_their_recurrence(name: str, after: int) -> None:
    w = Walk(after)
    found = w.run(name)
    a, b, initial = (w.given[n] for n in ("a", "b", "initial"))
    order = torch.arange(len(a))
    if name == "vector_reverse":  # each sequence turned around
        ends = w.ends.tolist()
        order = torch.cat([torch.arange(s, e).flip(0) for s, e in zip(ends, ends[1:])])
    *out, last = w.loop(a[order], b[order], initial, name == "max_plus")
    assert close(found["out"][order], out[after])
    assert close(found["last"], last)


@each_form
def test_the_gradient_of_an_elementwise_scan(after: int) -> None:
    w = Walk(after)
    leaves = [w.given[n].clone().requires_grad_() for n in ("a", "b", "initial")]
    *out, last = w.loop(*leaves)
    ((out[after] * w.given["g"]).sum() + (last * w.given["d_last"]).sum()).backward()
    found = w.run("vector_backward", h=out[after].detach())
    for name, x in zip(("d_a", "d_b", "d_initial"), leaves):
        assert x.grad is not None
        assert close(found[name], x.grad), name


@each_form
@pytest.mark.parametrize("name", ["vector_totals", "vector_totals_reverse", "max_plus_totals"])
def test_what_a_segment_does_to_the_state_before_it(name: str, after: int) -> None:
    """The last states of a walk are those of its totals."""
    w = Walk(after)
    found = w.run(name)
    start = w.given["d_last"] if name.endswith("reverse") else w.given["initial"]
    if name == "max_plus_totals":
        assert close(torch.maximum(found["decay"] + start, found["total"]), w.run("max_plus")["last"])
        return
    last = (
        w.run("vector_backward", h=w.given["b"])["d_initial"] if name.endswith("reverse") else w.run("vector")["last"]
    )
    assert close(found["decay"] * start + found["total"], last)


OWN = ["hgrn", "mingru", "vector", "two_vectors"]


@pytest.mark.parametrize("name", OWN)
def test_kernels_make_operands_of_leaves(name: str) -> None:
    """Results and the leaves' gradients, against operands that the interpreter makes and a loop over tokens."""
    unit = compile_source(SourceFile(f"{name}.spec", TEXTS[name])).units[0]
    forms = vector_forms(unit)
    assert sum(len(f.scans) for f in forms) == len(unit.graph.of_kind(N.Scan))
    for form in forms:
        given = {s.node.id: s for s in derived_scans(name)}
        walk, scans_of = Walk(int(form.after)), [given[s.id] for s in form.scans]
        shape = scans_of[0].shape((form.scans[0].axis, *form.scans[0].batch), sum(LENGTHS))
        walk.size = math.prod(shape[1:])
        torch.manual_seed(0)
        memory = {x: torch.rand(shape).double().requires_grad_() for x in form.leaves.values()}
        for role in ("initial", "d_last"):
            memory |= {x: torch.randn(len(LENGTHS), walk.size).double() for x in form.names(role)}
        for x in form.names("initial"):
            memory[x].requires_grad_()
        memory |= {x: torch.randn(sum(LENGTHS), walk.size).double() for x in form.names("g")}
        total: list[Tensor] = []
        wanted: dict[str, Tensor] = {}
        for state, scan in zip(form.states, scans_of):
            leaves = {f"leaf_{k}": memory[x] for k, x in enumerate(state.leaves)}
            values = scan.node.prologue.values  # type: ignore[union-attr]
            own = {a.name: a for a in scan.axes()}
            made = outputs(values.evolve(axes=tuple(own.get(a.name, a) for a in values.axes)), leaves, sum(LENGTHS))
            gate, add = (x.reshape(-1, walk.size) for x in made.values())
            *out, last = walk.loop(gate, add, memory[state.name("initial")])
            wanted |= {state.name("h"): out[form.after], state.name("out"): out[form.after], state.name("last"): last}
            total += [(out[form.after] * memory[state.name("g")]).sum(), (last * memory[state.name("d_last")]).sum()]
        torch.stack(total).sum().backward()  # type: ignore[no-untyped-call]
        flat = {n: x.detach().reshape(-1, walk.size) for n, x in {**memory, **wanted}.items()}
        kernels = {k.name.removeprefix(f"{form.name}_"): k for k in own_kernels(form)}
        outs = {n for role in ("out", "last") for n in form.names(role)}
        numbers = {n: float(eval(text, {"dk": 4.0})) for text, n in form.numbers.items()}
        found = walk.launch(kernels["walk"], {n: x for n, x in flat.items() if n not in outs}, **numbers)
        for n in outs:
            assert close(found[n], flat[n]), n
        found = walk.launch(kernels["backward"], flat, **numbers)
        for n in [*form.leaves.values(), *form.names("initial")]:
            grad = memory[n].grad
            assert grad is not None and close(found[f"d_{n}"], grad.reshape(-1, walk.size)), n


def test_reads_beyond_memory_are_errors() -> None:
    """A mask that lets a range run over a side's end."""
    (scan, *_) = scans("gated")
    given = derived_scans("gated")[0]
    values, sizes = drawn(scan, given, sum(LENGTHS))
    kernels = dict(scan.kernels)
    wide = lambda s: replace(s, value=parse_expr("col_i < I + 4")) if isinstance(s, Let) and s.name == "has_i" else s
    kernels["states"] = mapped(kernels["states"], wide)
    run = Launches(replace(scan, kernels=kernels), Batch(LENGTHS), sizes)
    initial = torch.zeros(len(LENGTHS), sizes["H"], sizes["I"], sizes["J"], dtype=torch.float64)
    with pytest.raises(IndexError, match="elements"):
        forward(run, values, initial, 4)


# -- tables of a packed batch ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(), (0, 0), (64, 64), (13, 0, 1, 66, 0), (200,), (1,) * 40])
@pytest.mark.parametrize("size", [8, 64])
def test_tables_of_a_packed_batch(lengths: tuple[int, ...], size: int) -> None:
    """Each tile's first token and its sequence's end, each sequence's first tile; as many tiles as there may be, of
    which those beyond the last are empty."""
    kernel, tokens = fill_kernel(), sum(lengths)
    tiles = tokens // size + min(len(lengths), tokens) + 1
    entries = {"start": tiles, "stop": tiles, "first": len(lengths) + 1}
    memory = {name: torch.full((n,), -1) for name, n in entries.items()}
    given = {"offsets": torch.tensor([0, *lengths]).cumsum(0), **memory}
    numbers = {"sequences": len(lengths), "tiles": tiles}
    arguments = {a: numbers.get(a, given.get(a.removesuffix("_ptr"))) for a in kernel.arguments}
    Launch(kernel, (len(lengths) + 1,), arguments, {"C": size, "BT": 16}, dtype=torch.int64).run()
    wanted: list[tuple[int, int]] = []
    first, begin = [], 0
    for length in lengths:
        first.append(len(wanted))
        wanted += [(begin + k, begin + length) for k in range(0, length, size)]
        begin += length
    assert memory["first"].tolist() == [*first, len(wanted)]
    wanted += [(tokens, tokens)] * (tiles - len(wanted))
    assert list(zip(memory["start"].tolist(), memory["stop"].tolist())) == wanted
    verify_kernel(kernel)
    assert parse_kernels(text_of(kernel)) == {kernel.name: kernel}
