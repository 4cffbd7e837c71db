"""The functions around an attention's kernels: what they take, their launches, the gradients from what they store."""

from __future__ import annotations

from chunkc.backends.attend import Form, Tile
from chunkc.backends.triton.attend import Gradient, Kernels, Made
from chunkc.backends.writer import Lines, Writer
from chunkc.ir import nodes as N

SIGNATURE = "self: Attention, operands: tuple[tuple[Tensor, ...], ...]"


def emit_attention(kernels: Kernels, tiles: list[Tile], name: str, lines: Lines, w: Writer) -> None:
    """The kernels, and `attend_NAME`, which runs them."""
    for made in kernels.all():
        w()
        w()
        made.kernel.print(w)
    place = lines.place(kernels.form.node.span)
    _sizes(kernels, tiles, name, place, w)
    _forward(kernels, name, place, w)
    _backward(kernels, name, place, w)
    w()
    w()
    w(f"attend_{name} = partial(attend, kernels=Kernels({name}_sizes, {name}_run, {name}_run_backward))")


def _blank(w: Writer) -> None:
    w()
    w()


def _sizes(kernels: Kernels, tiles: list[Tile], name: str, place: str, w: Writer) -> None:
    """A function that gives the kernels' compile-time constants."""
    form = kernels.form
    wanted = list(dict.fromkeys(s for made in kernels.all() for s in made.kernel.sizes))
    blocks = {s: s.removeprefix("BLOCK_") for s in wanted if s.startswith("BLOCK_")}
    _blank(w)
    with w.indented(f"def {name}_sizes({SIGNATURE}) -> dict[str, int | float]:"):
        w(f'"""The constants of the kernels ({place})."""')
        found: set[str] = set(form.own)
        w(f"{''.join(a + ', ' for a in form.own).rstrip()} = self.shape")
        for k, tile in enumerate(tiles):
            if tile.sizes:
                w(f"{''.join(s + ', ' for s in tile.sizes).rstrip()} = self.sources[{k}].sizes")
                found |= set(tile.sizes)
        for k, source in enumerate(form.node.sources):
            for m, n in enumerate(form.inputs(source)):
                for axis, dim in _dims(form, source, n.name):
                    if axis in wanted and axis not in found:
                        w(f"{axis} = operands[{k}][{m}].shape[{dim}]")
                        found.add(axis)
        w("return {")
        for s in wanted:
            text = f"block({blocks[s]})" if s in blocks else kernels.numbers.get(s, s)
            w(f'    "{s}": {text},')
        w("}")


def _dims(form: Form, source: N.Source, name: str) -> list[tuple[str, int]]:
    """Where an operand's own axes are among its dimensions."""
    side = form.side(source, name)
    lead = 2 if side != "." else 0 if form.shared(name) else 1
    own = [a for a in form.capture(name).axes if a not in (form.query, source.axis)]
    return [(a, lead + k) for k, a in enumerate(own)]


def _given(kernels: Kernels, w: Writer) -> None:
    """Operands, places and constants, under the names that the kernels have for them."""
    form, known = kernels.form, set()
    for k, source in enumerate(form.node.sources):
        names = []
        for n in form.inputs(source):
            names.append("_" if n.name in known else kernels.names[n.name])
            known.add(n.name)
        if names:
            w(f"{''.join(n + ', ' for n in names).rstrip()} = (x.contiguous() for x in operands[{k}])")
    w("types = types_of(self.given)")
    for name in kernels.names.values():
        if kernels.factor(name):
            w(f"{name} = factor({name}, types)")
    w("query_begins, query_lengths, queries = self.queries.table()")
    seen = set()
    for k, source in enumerate(form.node.sources):
        if source.axis is not None and source.axis not in seen:
            seen.add(source.axis)
            row = f"row_{source.axis}"
            w(f"{row}_begins, {row}_lengths, rows_{source.axis} = self.sources[{k}].rows.table()")
    size = "".join(f'size["{a}"], ' for a in kernels.axes).rstrip()
    w(f"heads = ({size})")
    w("BQ, BR, warps = tile(size, types)")


def _launch(made: Made, side: str, count: str, w: Writer) -> None:
    kernel = made.kernel
    block = "BQ" if side == "query" else "BR"
    arguments = [a.removesuffix("_ptr") for a in kernel.arguments]
    own = [f'{s}=size["{s}"]' for s in kernel.constants if s in kernel.sizes]
    chosen = [f'{c}=types["{c}"]' for c in kernel.constants if c not in (*kernel.sizes, "BQ", "BR")]
    with w.indented(f"if count * {count}:"):
        w(f"{kernel.name}[(count * cdiv({count}, {block}), math.prod(heads))](")
        for part in (arguments, own, ["BQ=BQ", "BR=BR", *chosen, "num_warps=warps", "num_stages=1"]):
            w(f"    {', '.join(part)},")
        w(")")


def _forward(kernels: Kernels, name: str, place: str, w: Writer) -> None:
    _blank(w)
    head = f"def {name}_run({SIGNATURE}, size: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:"
    with w.indented(head):
        w(f'"""The result, and what its backward needs ({place})."""')
        _given(kernels, w)
        w("count, like = query_lengths.shape[0], torch.empty((), dtype=self.dtype, device=query_lengths.device)")
        w(f'out = like.new_empty((count, queries, *heads, size["{kernels.last}"]))')
        w("top = like.new_empty((count, queries, *heads))")
        w("logs = torch.empty_like(top)")
        _launch(kernels.forward, "query", "queries", w)
        at = kernels.form.own.index(kernels.last) - len(kernels.form.own)
        w(f"return out{'' if at == -1 else f'.movedim(-1, {at})'}, top, logs")


def _backward(kernels: Kernels, name: str, place: str, w: Writer) -> None:
    form = kernels.form
    _blank(w)
    with w.indented(f"def {name}_run_backward("):
        w(f"{SIGNATURE}, size: dict[str, Any],")
        w("out: Tensor, top: Tensor, logs: Tensor, d_out: Tensor,")
    with w.indented(") -> list[list[Tensor | None]]:"):
        w(f'"""The operands\' gradients ({place})."""')
        _given(kernels, w)
        at = form.own.index(kernels.last) - len(form.own)
        if at != -1:
            w(f"out, d_out = out.movedim({at}, -1), d_out.movedim({at}, -1)")
        w("count, delta, d_out = query_lengths.shape[0], (d_out * out).sum(-1), d_out.contiguous()")
        if kernels.factor("d_out"):
            w("d_out = factor(d_out, types)")
        launches = [(kernels.queries, "query", "queries")]
        launches += [(made, "row", f"rows_{form.node.sources[k].axis}") for k, made in kernels.rows.items()]
        for made, side, count in launches:
            for g in made.gradients:
                places = "cdiv(queries, BQ)" if g.side == "." else count
                own = [f'size["{a}"]' for a in g.axes[len(kernels.axes) :]]
                w(f"{g.pointer} = top.new_zeros(({', '.join(['count', places, '*heads', *own])}))")
            if made.gradients:
                _launch(made, side, count, w)
        gradients = [g for made, _, _ in launches for g in made.gradients]
        for k, source in enumerate(form.node.sources):
            for n in form.inputs(source):
                mine = [g for g in gradients if (g.source, g.operand) == (k, n.name)]
                texts = [_stepped(form, source, g) for g in mine]
                if texts and texts != [mine[0].pointer]:
                    w(f"{mine[0].pointer} = {' + '.join(texts)}")
        rows = []
        for k, source in enumerate(form.node.sources):
            first = {g.operand: g.pointer for g in reversed(gradients) if g.source == k}
            rows.append(f"[{', '.join(first.get(n.name, 'None') for n in form.inputs(source))}]")
        w(f"return [{', '.join(rows)}]")


def _stepped(form: Form, source: N.Source, g: Gradient) -> str:
    """A gradient's text with the axes of its operand."""
    text, lead, axes = g.pointer, 2, list(g.axes)
    if g.side == ".":
        shared = form.shared(g.operand)
        text, lead = f"{text}.sum({(0, 1) if shared else 1})", 0 if shared else 1
    for step in g.steps:
        if step.kind == "sum":
            text, axes = _summed(text, lead, axes, set(step.axes))
        elif step.kind == "groups":
            at = axes.index(step.axis)
            text = f'{text}.unflatten({lead + at}, (size["{step.to}"], -1)).sum({lead + at + 1})'
            axes[at] = step.to
        else:
            axes[axes.index(step.axis)] = step.to
    wanted = [a for a, _ in _dims(form, source, g.operand)]
    text, axes = _summed(text, lead, axes, set(axes) - set(wanted))
    if axes != wanted:
        order = [*range(lead), *(lead + axes.index(a) for a in wanted)]
        text = f"{text}.permute({', '.join(map(str, order))})"
    return text


def _summed(text: str, lead: int, axes: list[str], over: set[str]) -> tuple[str, list[str]]:
    dims = [lead + k for k, a in enumerate(axes) if a in over]
    if not dims:
        return text, axes
    return f"{text}.sum({dims[0] if len(dims) == 1 else tuple(dims)})", [a for a in axes if a not in over]
