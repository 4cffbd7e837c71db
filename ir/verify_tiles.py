"""What holds of a graph over tiles: its kinds, the axes of each value, and what it never forms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from chunkc.ir import nodes as N
from chunkc.ir import tiles as T
from chunkc.ir.graph import Graph

if TYPE_CHECKING:
    from chunkc.ir.verify import Region

Found = Iterator[tuple[str, str]]
KINDS = (N.Input, N.Const, N.Map, N.Reduce, N.Rename, N.Out, T.Tile, T.Untile, T.Span, T.Contract, T.Strict, T.Prefix,
         T.Carry, T.Half, T.Halving)  # fmt: skip


def kinds_over_tiles(r: Region) -> Found:
    """Only the kinds that have a meaning over tiles."""
    for node in r.graph.nodes:
        if not isinstance(node, KINDS):
            yield node.id, f"a {node.kind} does not stand in a graph over tiles"


def tile_axes(r: Region) -> Found:
    """A sequence axis becomes a tile and a place in it, and the other way round."""
    for node in r.graph.of_kind(T.Tile, T.Untile):
        have = set(r.axes(node.arg))
        old, new = ((node.axis,), node.to) if isinstance(node, T.Tile) else (node.over, (node.axis,))
        if not set(old) <= have:
            yield node.id, f"its operand '{node.arg}' is not over {', '.join(old)}"
        elif set(node.axes) != have - set(old) | set(new):
            yield node.id, f"it is over {', '.join(node.axes)}, and '{node.arg}' over {', '.join(r.axes(node.arg))}"


def sums_and_products(r: Region) -> Found:
    """Spans and masks keep their operand's axes, but for a whole one's; a product sums axes that both factors have."""
    for node in r.graph.nodes:
        if isinstance(node, T.Span):
            gone = {node.axis} if node.fn == "whole" else set()
            if node.axis not in r.axes(node.arg) or set(node.axes) != set(r.axes(node.arg)) - gone:
                yield node.id, f"it sums along '{node.axis}' a value over {', '.join(r.axes(node.arg))}"
        elif isinstance(node, T.Strict):
            if not {node.row, node.column} <= set(node.axes) or node.axes != r.axes(node.arg):
                yield node.id, f"it masks '{node.row}' and '{node.column}' of a value over {', '.join(node.axes)}"
        elif isinstance(node, T.Contract):
            left, right = set(r.axes(node.left)), set(r.axes(node.right))
            if not set(node.over) <= left & right or set(node.axes) != (left | right) - set(node.over):
                yield node.id, f"it sums {', '.join(node.over)} of '{node.left}' and '{node.right}'"


def carried_over_tiles(r: Region) -> Found:
    """A carried state has no place in a tile, and starts from a value over its own axes."""
    for node in r.graph.of_kind(T.Carry):
        update = r.axes(node.update)
        state = set(update) - {node.axis}
        if node.axis not in update or not {*node.i, *node.j} <= state:
            yield node.id, f"its update '{node.update}' is over {', '.join(update)}"
        if set(r.axes(node.initial)) != state:
            yield node.id, f"it starts from a value over {', '.join(r.axes(node.initial))}"
        if node.decay is not None and not set(r.axes(node.decay)) <= set(update):
            yield node.id, f"its decay '{node.decay}' is over {', '.join(r.axes(node.decay))}"
    for node in r.graph.of_kind(T.Prefix):
        if r.axes(node.a) != r.axes(node.b) or node.axis not in r.axes(node.a):
            yield node.id, f"it composes maps over {', '.join(r.axes(node.a))} and {', '.join(r.axes(node.b))}"


def _halved(axes: tuple[str, ...], halving: T.Halving, half: str) -> tuple[str, ...]:
    block, earlier, later = halving.to
    pair = (block, earlier if half == "earlier" else later)
    return tuple(x for a in axes for x in (pair if a == halving.axis else (a,)))


def halves_of_blocks(r: Region) -> Found:
    """In a halving's body a half has its block and its place; a part fits the half that it is added to."""
    if r.halving is not None and r.outer is not None:
        for node in r.graph.of_kind(T.Half):
            wanted = _halved(r.outer[node.outer].axes, r.halving, node.half)
            if node.axes != wanted:
                yield node.id, f"it is over {', '.join(node.axes)}, not {', '.join(wanted)}"
    for node in r.graph.of_kind(T.Halving):
        for part in node.parts:
            if part.value not in node.body.by_id or not 0 <= part.total < len(node.totals):
                yield node.id, f"there is no value '{part.value}' or no total {part.total}"
            elif set(node.body[part.value].axes) != set(_halved(r.axes(node.totals[part.total]), node, part.half)):
                axes = ", ".join(node.body[part.value].axes)
                yield node.id, f"part '{part.value}' of total {part.total} is over {axes}"


def exponents_not_positive(r: Region) -> Found:
    """An exponential is of a log-gate, or of a sum of log-gates over a span: at most 0."""
    for node in r.graph.of_kind(N.Map):
        if node.fn != "exp":
            continue
        graph: Graph | None = r.graph
        value = r.graph[node.args[0]]
        if isinstance(value, T.Span):
            value = r.graph[value.arg]
        if isinstance(value, T.Half):
            graph = r.outer
            value = graph[value.outer] if graph is not None else value
        if not (isinstance(value, T.Tile) and value.log):
            yield node.id, f"its exponent '{node.args[0]}' is no sum of log-gates"


def no_pairs_of_tokens(r: Region) -> Found:
    """Nothing is over two sequence axes: pairs of tokens meet inside a tile only."""
    for node in r.graph.nodes:
        long = [a for a in node.axes if r.graph.axis[a].is_sequence]
        if len(long) > 1:
            yield node.id, f"it is over {' and '.join(long)}"


def no_trajectories(r: Region) -> Found:
    """A state with two sides stands at tiles' edges only, never at each token."""
    top = r.outer if r.halving is not None and r.outer is not None else r.graph
    sides = [(c.i, c.j) for c in top.of_kind(T.Carry) if c.i and c.j]
    edges = {c.axis for c in top.of_kind(T.Carry)}
    places = {a.name for a in r.graph.axes if a.kind == "size" and a.size is None}
    places |= {t.to[1] for t in top.of_kind(T.Tile)} | {t.axis for t in top.of_kind(T.Tile)}
    for node in r.graph.nodes:
        if any({*i, *j} <= set(node.axes) for i, j in sides) and set(node.axes) & (places - edges):
            yield node.id, f"it keeps a state for each token: {', '.join(node.axes)}"


TILES = (kinds_over_tiles, tile_axes, sums_and_products, carried_over_tiles, halves_of_blocks, exponents_not_positive,
         no_pairs_of_tokens, no_trajectories)  # fmt: skip


def kinds_around_kernels(r: Region) -> Found:
    """Only kernels, their buffers, and elementwise work between them."""
    for node in r.graph.nodes:
        if not isinstance(node, N.Input | N.Const | N.Map | T.Kernel | T.Buffer):
            yield node.id, f"a {node.kind} does not stand between kernels"


def kernels_read(r: Region) -> Found:
    """A kernel reads what its body takes; a program has a block of each side once."""
    for node in r.graph.of_kind(T.Kernel):
        inputs = node.body.of_kind(N.Input)
        if len(inputs) != len(node.reads):
            yield node.id, f"it reads {len(node.reads)} values, and its body takes {len(inputs)}"
            continue
        for n, arg in zip(inputs, node.reads):
            if n.axes != r.axes(arg):
                yield node.id, f"'{arg}' is over {', '.join(r.axes(arg))}, and '{n.id}' over {', '.join(n.axes)}"
        if len(set(node.blocks)) < len(node.blocks):
            yield node.id, "it has two blocks of one side"


def one_writer(r: Region) -> Found:
    """Each result of a kernel goes to one buffer. One that replaces another has its axes, and is written by the last
    kernel that reads it."""
    buffers = r.graph.of_kind(T.Buffer)
    for node in r.graph.of_kind(T.Kernel):
        for index in range(len(node.body.outputs)):
            count = sum(b.arg == node.id and b.index == index for b in buffers)
            if count != 1:
                yield node.id, f"its result {index} goes to {count} buffers"
    place = {n.id: k for k, n in enumerate(r.graph.nodes)}
    for buffer in buffers:
        if buffer.replaces is None:
            continue
        old = r.graph[buffer.replaces]
        readers = [n.id for n in r.graph.nodes if buffer.replaces in n.operands() and not isinstance(n, T.Buffer)]
        if not isinstance(old, T.Buffer) or old.life != "temporary" or old.axes != buffer.axes:
            yield buffer.id, f"it cannot replace '{buffer.replaces}'"
        elif not readers or max(readers, key=place.__getitem__) != buffer.arg:
            yield buffer.id, f"'{buffer.replaces}', which it replaces, is still read"


KERNELS = (kinds_around_kernels, kernels_read, one_writer)
