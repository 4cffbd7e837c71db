"""`_plan.py`: a package's parallel layout, an operation after the other."""

from __future__ import annotations

from chunkc.backends.operations import Operation, ahead, operations
from chunkc.backends.scan import Operand, ScanForm, scan_form
from chunkc.backends.writer import Lines, Writer
from chunkc.ir import nodes as N
from chunkc.ir.graph import Parallel, Unit

WHERE = {"contiguous": "each rank has one piece of a row", "zigzag": "each rank has a piece of a row from either end"}


def emit_plan(units: list[tuple[Unit, str]], lines: Lines) -> str:
    """The module's text for these units and what stands before their names."""
    found = [(unit, prefix, op) for unit, prefix in units for op in operations(unit)]
    layout = units[0][0].parallel
    assert layout is not None
    attends = any(op.kind == "ring" for _, _, op in found)
    w = Writer()
    w("from __future__ import annotations")
    w()
    w("from datetime import timedelta")
    w()
    matrix = any(isinstance(op.node, N.Scan) and (op.node.i or op.node.j) for _, _, op in found)
    if attends or matrix:
        w("import torch")
    w("from torch import Tensor")
    w("from torch.distributed.device_mesh import DeviceMesh")
    w()
    if attends:
        w("from ._attend import Source")
    w("from ._distributed import Distributed")
    if attends:
        w("from ._ring import Queries, ring_attend")
    if any(op.kind != "ring" for _, _, op in found):
        w("from ._segments import Segments")
    w()
    w('__all__ = ["Plan"]')
    w()
    w()
    with w.indented("class Plan(Distributed):"):
        _head(layout, lines, w)
        for unit, prefix, op in found:
            w()
            _operation(unit, prefix, op, lines, w)
    return w.text()


def _head(layout: Parallel, lines: Lines, w: Writer) -> None:
    w(f'"""The layout of {lines.place(layout.span)}: over the axis {layout.over} of a mesh, {WHERE[layout.layout]}."""')
    w()
    w(f"names = ({''.join(f'{chr(34)}{n}{chr(34)}, ' for n in layout.mesh).rstrip()})")
    w(f'over = "{layout.over}"')
    w(f'layout = "{layout.layout}"')
    w()
    with w.indented("def __init__(self, mesh: DeviceMesh, timeout: timedelta = timedelta(seconds=60)) -> None:"):
        w('"""All ranks of the mesh make their plans in the same order; no wait is longer than the time-out."""')
        w("super().__init__(mesh, timeout)")


def _operation(unit: Unit, prefix: str, op: Operation, lines: Lines, w: Writer) -> None:
    name = op.method(prefix)
    what = f'"{name} ({lines.place(op.node.span)})"'
    sent = " and ".join(f"[{', '.join(s.axes)}]" for s in op.sent) or "nothing"
    if isinstance(op.node, N.Scan):
        _scan(op.node, name, scan_form(unit, op.node), what, sent, lines, w)
    elif op.kind == "halo":
        with w.indented(f"def {name}(self, seq: Segments, x: Tensor, count: int, history: Tensor | None) -> "
                        "Tensor | None:"):  # fmt: skip
            w(f'"""{lines.code(op.node.span)}')
            w()
            behind = isinstance(op.node, N.Shift) and ahead(op.node)
            w(f'A halo: the {"first" if behind else "last"} {op.tokens} tokens of each piece go to all ranks, '
              f'{sent} numbers each."""')  # fmt: skip
            w(f"return seq.halo_behind({what}, x, count)" if behind else f"return seq.halo({what}, x, count, history)")
    else:
        with w.indented(f"def {name}(self, queries: Queries, sources: tuple[Source, ...], shape: tuple[int, ...], "
                        "weighted: str, dtype: torch.dtype) -> Tensor:"):  # fmt: skip
            w(f'"""{lines.code(op.node.span)}')
            w()
            w(f'A ring: rows go from rank to rank, {sent} numbers each, and their gradients behind them."""')
            w(f"return ring_attend(self.ranks, {what}, queries, sources, shape, weighted, dtype)")


def _scan(scan: N.Scan, name: str, form: ScanForm, what: str, sent: str, lines: Lines, w: Writer) -> None:
    """From each token to the end of its piece, and the piece as a whole: how much of a state is kept, what is added."""
    matrix = bool(scan.i or scan.j)
    given = [*map(_named, form.gates), *(_named(o) for pair in form.writes for o in pair)] if matrix else ["a", "b"]
    typed = ", ".join(f"{n}: Tensor" for n in given)
    with w.indented(f"def {name}(self, seq: Segments, initial: Tensor, {typed}) -> Tensor:"):
        w(f'"""{lines.code(scan.span)}')
        w()
        w(f'A state_allgather: what each piece keeps of a state and what it adds go to all ranks, {sent} numbers."""')
        if matrix:
            _matrix(form, w)
        elif scan.algebra == "max-plus":
            w("rest, across = seq.sums(a)")
            w("update = (rest + seq.by_piece(b)).amax(1)")
        else:
            w("rest, across = seq.decay(a, log=False)")
            w("update = (rest * seq.by_piece(b)).sum(1)")
        across = [f"across_{g.side}{'[..., None]' if g.side == 'i' else '[:, :, None]'}" for g in form.gates]
        kept = "".join(f"{x}, " for x in (across if matrix else ["across"])).rstrip()
        more = ", tropical=True" if scan.algebra == "max-plus" else ""
        w(f"return seq.enter({what}, initial, ({kept}), update{more}{', stop=True' if scan.stop else ''})")


def _named(operand: Operand) -> str:
    """An operand's name, another one where the function has it itself."""
    own = operand.name in ("rest_i", "rest_j", "across_i", "across_j")
    return f"{operand.name}_given" if own else operand.name


def _matrix(form: ScanForm, w: Writer) -> None:
    for g in form.gates:
        w(f"rest_{g.side}, across_{g.side} = seq.decay({_named(g)}, log={not g.raw})")
    terms = []
    for pair in form.writes:
        texts = [f"rest_{o.side} * seq.by_piece({_named(o)})" if form.gate(o.side) else f"seq.by_piece({_named(o)})"
                 for o in pair]  # fmt: skip
        if not form.gates:
            texts[0] = f"seq.undecayed({_named(pair[0])})"
        terms.append(f'torch.einsum("pthi, pthj -> phij", {", ".join(texts)})')
    w(f"update = {' + '.join(terms)}")
