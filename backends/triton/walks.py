"""The text around the kernels of elementwise scans: their helpers, launches and autograd functions."""

from __future__ import annotations

from chunkc.backends.triton.vector import vector_kernels
from chunkc.backends.writer import Writer

HELPERS = '''
CHANNELS = 64  # of a program that walks along a sequence: a warp
WALKED, SHORT = 32, 16  # tokens of a tile, and of one of short sequences
SEGMENT = 1024  # tokens of a segment
FEW = 96  # programs that leave a GPU idle: then each walks along a segment


@triton.jit
def join(a, b, later_a, later_b):
    """Two steps h = a * h + b in one."""
    return a * later_a, later_a * b + later_b


@triton.jit
def join_max(a, b, later_a, later_b):
    """Two steps h = max(a + h, b) in one."""
    return a + later_a, tl.maximum(later_a + b, later_b)


@triton.jit
def walk(a, b, state, row):
    """h = a * h + b after each row."""
    b = tl.where((row == 0)[:, None], a * state[None, :] + b, b)
    _, after = tl.associative_scan((a, b), 0, join)
    return after


@triton.jit
def walk_max(a, b, state, row):
    """h = max(a + h, b) after each row."""
    b = tl.where((row == 0)[:, None], tl.maximum(a + state[None, :], b), b)
    _, after = tl.associative_scan((a, b), 0, join_max)
    return after


@triton.jit
def times(x, y):
    return x * y


@triton.jit
def product(x):
    """The product of all rows."""
    return tl.reduce(x, 0, times)
'''

LAUNCHES = '''
def tile_of(seq: Sequences) -> int:
    """Tokens of a tile. A walk is token by token in either, with the same bits."""
    return SHORT if seq.most <= 4 * SHORT else WALKED


def entered(
    seq: Sequences, a: Tensor, b: Tensor, initial: Tensor, walk: Any, totals: Any, after: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tokens between which programs walk, the states that they start with, and the last ones if they are known.

    Whether a sequence is cut depends on the number of channels, not on that of tokens: a longer one begins alike."""
    size = a.shape[2] * a.shape[3]
    blocks = triton.cdiv(size, CHANNELS)
    if seq.count * blocks >= FEW or seq.most <= SEGMENT:
        return seq.offsets, initial, None
    bounds, cut = seq.segments(SEGMENT)
    decay = torch.empty((bounds.numel() - 1, size), dtype=torch.float32, device=a.device)
    total, states, last = torch.empty_like(decay), torch.empty_like(decay), torch.empty_like(initial)
    if seq.count:
        totals[(decay.shape[0], blocks)](
            a, b, decay, total, bounds, D=size, C=WALKED, BD=CHANNELS, AFTER=int(after), num_warps=1,
        )
        walk[(seq.count, blocks)](
            decay, total, initial, states, last, cut, D=size, C=WALKED, BD=CHANNELS, AFTER=0, num_warps=1,
        )
    return bounds, states, last


def walked(
    seq: Sequences, a: Tensor, b: Tensor, initial: Tensor, out: Tensor, walk: Any, totals: Any, after: bool
) -> tuple[Tensor, Tensor]:
    """Fill `out`; the states that programs start with, and the last states."""
    bounds, states, last = entered(seq, a, b, initial, walk, totals, after)
    size, ends = a.shape[2] * a.shape[3], torch.empty_like(states)
    if seq.count:
        walk[(bounds.numel() - 1, triton.cdiv(size, CHANNELS))](
            a, b, states, out, ends, bounds, D=size, C=tile_of(seq), BD=CHANNELS, AFTER=int(after), num_warps=1,
        )
    return states, ends if last is None else last


class Vector(torch.autograd.Function):
    """h = a * h + b for each channel: h before each token, or after it [B, T, H, D], and the last h [N, H, D]."""

    @staticmethod
    def forward(
        ctx: Any, seq: Sequences, a: Tensor, b: Tensor, initial: Tensor, after: bool, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        a, b, initial = a.contiguous(), b.contiguous(), initial.contiguous()
        out = torch.empty_like(b, dtype=dtype)
        states, last = walked(seq, a, b, initial, out, vector, vector_totals, after)
        ctx.seq, ctx.after, ctx.added = seq, after, b.dtype
        ctx.save_for_backward(a, out, states)
        return out, last

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_last: Tensor) -> tuple[Tensor | None, ...]:
        once()
        (a, out, states), seq = ctx.saved_tensors, ctx.seq
        d_out, d_last = d_out.contiguous(), d_last.contiguous()
        bounds, ends, d_initial = entered(
            seq, a, d_out, d_last, vector_reverse, vector_totals_reverse, ctx.after
        )
        d_a, d_b, d_states = torch.empty_like(a), torch.empty_like(a, dtype=ctx.added), torch.empty_like(ends)
        size = a.shape[2] * a.shape[3]
        if seq.count:
            vector_backward[(bounds.numel() - 1, triton.cdiv(size, CHANNELS))](
                a, d_out, out, states, ends, d_a, d_b, d_states, bounds,
                D=size, C=tile_of(seq), BD=CHANNELS, AFTER=int(ctx.after), num_warps=1,
            )
        return None, d_a, d_b, d_states if d_initial is None else d_initial, None, None


def vector_scan(
    seq: Sequences, a: Tensor, b: Tensor, initial: Tensor, after: bool = False, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """h = a * h + b: h before each token, or after it, and the last one. Operands are read as they are stored, and
    the result is given in `dtype`, else in the wider type of theirs."""
    if seq.one_token:
        return _elementwise.vector_scan(seq, a, b, initial, after, dtype)
    result: tuple[Tensor, Tensor] = Vector.apply(
        seq, a, b, initial, after, torch.promote_types(a.dtype, b.dtype) if dtype is None else dtype
    )
    return result


def launched(
    seq: Sequences, a: Tensor, b: Tensor, initial: Tensor, reverse: bool, tropical: bool
) -> tuple[Tensor, Tensor]:
    """For `max_plus_scan` of `_elementwise`: the scan, and the sum from the end (`reverse`) that its gradient is."""
    a, b, initial, out = a.contiguous(), b.contiguous(), initial.contiguous(), torch.empty_like(b)
    walk, totals = (max_plus, max_plus_totals) if tropical else (vector_reverse, vector_totals_reverse)
    _, last = walked(seq, a, b, initial, out, walk, totals, False)
    return out, last


def max_plus_scan(seq: Sequences, a: Tensor, b: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
    return _elementwise.max_plus_scan(seq, a, b, initial, launched)
'''


def emit_vector(w: Writer) -> None:
    """What all elementwise scans of a package share."""
    _text(HELPERS, w)
    for kernel in vector_kernels():
        w()
        w()
        kernel.print(w)
    _text(LAUNCHES, w)


def _text(text: str, w: Writer) -> None:
    w()
    w()
    for line in text.strip().splitlines():
        w(line)
