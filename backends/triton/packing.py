"""Where the tiles of sequences lie: tables that one launch fills, and the host knows nothing of.

A batch has as many tiles as its shapes allow, so that no value is read; those beyond the last are empty."""

from __future__ import annotations

from chunkc.backends.triton.kernel import Builder, Expr, Kernel, call
from chunkc.backends.writer import Writer

ENTRIES = 1024  # of a table that a program takes at once

TABLES = f'''
def tables(seq: Sequences, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tiles of so many tokens: each one's first token and its sequence's end [n + 1], of an empty one at the end, too;
    each sequence's first tile [N + 1], one that is not there begins behind the last."""

    def make() -> tuple[Tensor, Tensor, Tensor]:
        tiles = seq.most_tiles(size) + 1
        start, stop, first = (
            torch.empty((n,), dtype=torch.int64, device=seq.device) for n in (tiles, tiles, seq.count + 1)
        )
        fill_tables[(seq.count + 1,)](
            seq.offsets, start, stop, first, seq.count, tiles, C=size, BT={ENTRIES}, num_warps=4,
        )
        return start, stop, first

    made: tuple[Tensor, Tensor, Tensor] = seq._once(f"tables {{size}}", make)
    return made
'''

PLACES = '''
def places(seq: Sequences) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, int, int, int]:
    """Sequences' first tokens [N + 1], `tables` of TILE tokens, tokens and tiles of a row, tiles in all. A dense batch
    has no tables."""
    if not seq.packed:
        each = cdiv(seq.tokens, TILE)
        return None, None, None, None, seq.tokens, each, seq.rows * each
    tiles = seq.most_tiles(TILE)
    return seq.offsets, *tables(seq, TILE), seq.tokens, tiles, tiles
'''


def fill_kernel() -> Kernel:
    """A program has the tiles of one sequence; the last one, with no sequence, has those that are left over."""
    b, entry = Builder(), call("tl.arange", 0, "BT")
    sequence = b.let("sequence", call("tl.program_id", 0).to("tl.int64"))
    counts = b.let("counts", call("tl.zeros", "(BT,)", "tl.int64"))
    with b.loop("part", call("tl.cdiv", sequence, "BT"), "blocks of sequences") as part:
        earlier = b.let("earlier", part * "BT" + entry)
        b.let("there", earlier < sequence)
        begin = b.let("begin", call("tl.load", Expr("offsets_ptr") + earlier, mask="there", other="0"))
        end = b.let("end", call("tl.load", Expr("offsets_ptr") + earlier + 1, mask="there", other="0"))
        b.add(counts, (end - begin + "C" - 1) // "C")
    first = b.let("first", call("tl.sum", counts, 0))
    start = b.load("start", Expr("offsets_ptr") + sequence, None)
    stop = b.load("stop", Expr("offsets_ptr") + call("tl.minimum", sequence + 1, "sequences"), None)
    b.store(Expr("first_ptr") + sequence, first, None)
    through = call("tl.minimum", first + call("tl.cdiv", stop - start, "C"), "tiles")
    last = b.let("last", call("tl.where", sequence < "sequences", through, "tiles"))
    with b.loop("part", call("tl.cdiv", last - first, "BT"), "blocks of tiles") as part:
        tile = b.let("tile", first + part * "BT" + entry)
        b.let("there", tile < last)
        at = call("tl.minimum", start + (tile - first) * "C", stop)
        b.store(Expr("start_ptr") + tile, at, Expr("there"))
        b.store(Expr("stop_ptr") + tile, stop, Expr("there"))
    arguments = ("offsets_ptr", "start_ptr", "stop_ptr", "first_ptr", "sequences", "tiles")
    ends = (("earlier", "sequence"), ("tile", "last"))
    doc = "The tiles of one sequence; of the program behind the last sequence, the empty ones behind all."
    return Kernel("fill_tables", doc, arguments, tuple(b.body), ends=ends)


def emit_tables(w: Writer, matrices: bool) -> None:
    """The kernel and its launch; `matrices`: also what kernels of matrix scans take."""
    w()
    w()
    fill_kernel().print(w)
    for text in (TABLES, PLACES) if matrices else (TABLES,):
        w.paste(text)
