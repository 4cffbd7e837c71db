"""Matrix scans as chunk-parallel PyTorch: the scan's graphs over tiles, printed, and the functions around them."""

from __future__ import annotations

from chunkc.backends.scan import ScanForm, other
from chunkc.backends.torch.tiles import ATOM, Printer, Text
from chunkc.backends.writer import Lines, Writer
from chunkc.ir.graph import Graph
from chunkc.ir.nodes import Input


def emit_scan(form: ScanForm, lines: Lines, w: Writer) -> None:
    """The autograd function, the one-token step and the entry point `<name>_scan`."""
    names = [o.name for o in form.operands()]
    grads = [f"d_{o}" for o in form.results()]
    scan = form.scan
    assert scan.tiles is not None and scan.tiles_backward is not None, "the scan was not cut into tiles"
    with w.indented(f"class {form.name}_Scan(torch.autograd.Function):"):
        w(f'"""The recurrence of {scan.name} ({lines.place(scan.span)}), tile by tile."""')
        w()
        w("@staticmethod")
        taken = f"ctx: Any, seq: Sequences, {_typed(names)}, initial: Tensor"
        with w.indented(f"def forward({taken}) -> tuple[Tensor, ...]:"):
            w(f"operands = ({', '.join(names)})")
            p = Printer(scan.tiles, scan, _named(scan.tiles, [*names, "initial"]), lines, w)
            p.statements()
            *results, states = p.results()
            w("ctx.seq = seq")
            w(f"ctx.save_for_backward(*operands, {states})")
            w(f"return {', '.join(results)}")
        w()
        w("@staticmethod")
        w("@uncast")
        with w.indented(f"def backward(ctx: Any, {_typed([*grads, 'd_last'])}) -> tuple[Tensor | None, ...]:"):
            w("once()")
            w("seq = ctx.seq")
            w(f"{', '.join(names)}, states = ctx.saved_tensors")
            given = _named(scan.tiles_backward, [*names, "states", *grads, "d_last"])
            p = Printer(scan.tiles_backward, scan, given, lines, w)
            p.statements()
            w(f"return None, {', '.join(p.results())}")
    w()
    w()
    _step(form, lines, w)
    w()
    w()
    w("@uncast")
    taken = f"seq: Sequences, {_typed(names)}, initial: Tensor | None{form.typed_numbers()}"
    with w.indented(f"def {form.name}_scan({taken}) -> tuple[Tensor, ...]:"):
        w(f'"""{_signature(form)}"""')
        i, j = (o.name for o in form.writes[0])
        with w.indented("if initial is None:"):
            w(f"initial = {i}.new_zeros((seq.count, *{i}.shape[2:], {j}.shape[3]))")
        with w.indented("if seq.one_token:"):
            w(f"result: tuple[Tensor, ...] = {form.name}_step({', '.join(names)}, initial)")
        with w.indented("else:"):
            w(f"result = {form.name}_Scan.apply(seq, {', '.join(names)}, initial)")
        if not form.numbers():
            w("return result")
            return
        w(f"{', '.join([*form.results(), 'last'])} = result")
        reads = [f"{out} * {scale}" if scale else out for out, scale in zip(form.results(), form.scales)]
        w(f"return {', '.join([*reads, 'last'])}")


def _named(graph: Graph, names: list[str]) -> dict[str, str]:
    """Names for a graph's inputs, by position."""
    inputs = graph.of_kind(Input)
    assert len(inputs) == len(names), (inputs, names)
    return dict(zip((n.id for n in inputs), names))


def _typed(names: list[str]) -> str:
    return ", ".join(f"{n}: Tensor" for n in names)


def _signature(form: ScanForm) -> str:
    i, j = ",".join(form.scan.i), ",".join(form.scan.j)
    return (f"Operands [B, T, H, D], D the size of ({i}) or ({j}); initial [N, H, ({i}), ({j})], else zero. "
            f"Gives each read {form.when} the update{', times its scale' * bool(form.numbers())}, and the last "
            f"state.")  # fmt: skip


def _step(form: ScanForm, lines: Lines, w: Writer) -> None:
    """One token, as matrices of one row for an operand."""
    names = [o.name for o in form.operands()]
    step = form.scan.step
    assert step is not None, "the scan has no step"
    with w.indented(f"def {form.name}_step({_typed(names)}, state: Tensor) -> tuple[Tensor, ...]:"):
        w(f'"""One token: the reads {form.when} the update, and the state behind it."""')
        w(f"{', '.join(names)} = (x.transpose(1, 2) for x in ({', '.join(names)}))")
        p = Printer(step, form.scan, _named(step, [*names, "state"]), lines, w)
        for o, node in zip(form.operands(), step.of_kind(Input)):
            p.texts[node.id] = Text(o.name, ATOM, ("1", "1" if o.thin else p.symbol(o.side)))
        p.statements()
        *reads, state = p.outputs()
        rows = [x.laid(("1", p.symbol(other(q.side)))) for x, q in zip(reads, form.queries)]
        w(f"return {', '.join([*(f'{x.within(ATOM)}.transpose(1, 2)' for x in rows), state.text])}")
