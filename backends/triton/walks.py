"""The text around the kernels of elementwise scans: their helpers, launches and autograd functions."""

from __future__ import annotations

from chunkc.backends.triton.kernel import Kernel
from chunkc.backends.triton.vector import own_kernels, plain_kernels
from chunkc.backends.triton.verify import verify_kernel
from chunkc.backends.vector import VectorForm
from chunkc.backends.writer import Lines, Writer

HELPERS = '''
CHANNELS = 64  # of a program that walks along a sequence
# Tokens of a tile, warps, of which each has a part of it, and how many tiles there is room for, since the next ones
# come from memory while one is walked over. Short sequences are hardly more than one: there the room would only keep
# programs off a multiprocessor. A product and a sum are one operation where that is written, and nowhere else: where
# it is the compiler's choice, a token's bits depend on whether its tile is whole.
WALKED = {"C": 64, "W": 4, "num_warps": 4, "STAGES": 3, "enable_fp_fusion": False}
SHORT = {**WALKED, "C": 16, "W": 1, "num_warps": 1, "STAGES": 1}
ROOM = 56 * 1024  # bytes on chip that a program has for tiles to come: on any GPU, and so that others are beside it
SEGMENT = 1024  # tokens of a segment
FEW = 96  # programs that leave a GPU idle: then each walks along a segment


@triton.jit
def join(a, b, later_a, later_b):
    """Two steps h = a * h + b in one."""
    return a * later_a, tl.fma(later_a, b, later_b)


@triton.jit
def join_max(a, b, later_a, later_b):
    """Two steps h = max(a + h, b) in one."""
    return a + later_a, tl.maximum(later_a + b, later_b)


@triton.jit
def join_back(gain, flow, gate, later_gain, later_flow, later_gate):
    """Two steps h = gain * p + flow in one, where p is what gate passes on of the h before."""
    passing = later_gain * gate
    return passing * gain, tl.fma(passing, flow, later_flow), later_gate


@triton.jit
def join_front(gain, flow, gate, read, later_gain, later_flow, later_gate, later_read):
    """As `join_back`, where what is read before a step is passed on with it."""
    passed = tl.fma(gate, flow, read)
    return later_gain * gate * gain, tl.fma(later_gain, passed, later_flow), later_gate, later_read


@triton.jit
def join_front_max(gain, flow, gate, read, later_gain, later_flow, later_gate, later_read):
    """As `join_front`, for h = max(a + h, b)."""
    passed = tl.maximum(gate + flow, read)
    return later_gain + gate + gain, tl.maximum(later_gain + passed, later_flow), later_gate, later_read


@triton.jit
def parts(x, W: tl.constexpr):
    """The rows of each warp's part of a tile [C / W, W, channels]; they are where they were."""
    return tl.reshape(x, (x.shape[0] // W, W, x.shape[1]))


@triton.jit
def ends(x):
    """The last row of each part."""
    return tl.sum(tl.where((tl.arange(0, x.shape[0]) == x.shape[0] - 1)[:, None, None], x, 0.0), 0)


@triton.jit
def entering(gain, flow, state):
    """The h that each part starts from, of what parts do to it: h = gain * h + flow."""
    one = tl.zeros_like(gain) + 1.0
    through, so_far, _, _ = tl.associative_scan((one, tl.zeros_like(flow), gain, flow), 0, join_front)
    return tl.fma(through, state[None, :], so_far)[None, :, :]


@triton.jit
def entering_max(gain, flow, state):
    """The h that each part starts from, of what parts do to it: h = max(gain + h, flow)."""
    never = tl.zeros_like(flow) + float("-inf")
    through, so_far, _, _ = tl.associative_scan((tl.zeros_like(gain), never, gain, flow), 0, join_front_max)
    return tl.maximum(through + state[None, :], so_far)[None, :, :]


@triton.jit
def walk(a, b, state, W: tl.constexpr):
    """h = a * h + b after each row: the rows of each part from zero, and then from the h that it starts from."""
    gain, flow = tl.associative_scan((parts(a, W), parts(b, W)), 0, join)
    return tl.reshape(tl.fma(gain, entering(ends(gain), ends(flow), state), flow), a.shape)


@triton.jit
def walk_max(a, b, state, W: tl.constexpr):
    """h = max(a + h, b) after each row."""
    gain, flow = tl.associative_scan((parts(a, W), parts(b, W)), 0, join_max)
    return tl.reshape(tl.maximum(gain + entering_max(ends(gain), ends(flow), state), flow), a.shape)


@triton.jit
def walk_back(a, g, state, AFTER: tl.constexpr, W: tl.constexpr):
    """The gradients of h after each row, from the last token to the first; `state` is what the rows before pass on."""
    gates, reads = parts(a, W), parts(g, W)
    one = tl.zeros_like(gates) + 1.0
    if AFTER:
        gain, flow, _ = tl.associative_scan((one, reads, gates), 0, join_back)
        start = entering(ends(gates * gain), ends(gates * flow), state)
    else:
        gain, flow, _, _ = tl.associative_scan((one, tl.zeros_like(reads), gates, reads), 0, join_front)
        start = entering(ends(gates * gain), ends(tl.fma(gates, flow, reads)), state)
    return tl.reshape(tl.fma(gain, start, flow), a.shape)


@triton.jit
def passed(a, flow, g, row, C: tl.constexpr, AFTER: tl.constexpr):
    """What the last row passes on to the token before it."""
    if AFTER:
        found = a * flow
    else:
        found = tl.fma(a, flow, g)
    return tl.sum(tl.where((row == C - 1)[:, None], found, 0.0), 0)


@triton.jit
def times(x, y):
    return x * y


@triton.jit
def product(x):
    """The product of all rows."""
    return tl.reduce(x, 0, times)
'''

LAUNCHES = '''
def tile_of(seq: Sequences, *loaded: Tensor) -> dict[str, int]:
    """How a program walks, with tiles to come of what it loads as far as there is room for them. A part has as many
    rows in either way, and up to two parts results have the same bits."""
    if seq.most <= 2 * SHORT["C"]:
        return SHORT
    return staged(loaded)


def staged(loaded: Sequence[Tensor]) -> dict[str, int]:
    """`WALKED`, with no more stages than there is room for."""
    tile = sum(x.element_size() for x in loaded) * WALKED["C"] * CHANNELS
    return {**WALKED, "STAGES": min(WALKED["STAGES"], 1 + ROOM // tile)}


class Walks(NamedTuple):
    """The kernels of scans that are walked over together, the numbers that they take, and whether h is read after the
    update. Operands are made of leaves inside of them."""

    walk: Any
    totals: Any
    backward: Any
    totals_reverse: Any
    after: bool
    numbers: dict[str, float] = {}


def bounds_of(seq: Sequences, size: int) -> tuple[Tensor | None, Tensor | None]:
    """Between which tokens programs walk [n + 1], of a dense batch none; if sequences are cut, also between which
    segments these lie [N + 1].

    Whether a sequence is cut depends on the number of channels, not on that of tokens: a longer one begins alike."""
    if seq.count * cdiv(size, CHANNELS) >= FEW or seq.most <= SEGMENT:
        return seq.offsets if seq.packed else None, None
    start, _, first = tables(seq, SEGMENT)
    return start, first


def empty_as(given: Sequence[Tensor | None]) -> list[Tensor | None]:
    """A tensor for each that is given."""
    return [None if x is None else torch.empty_like(x) for x in given]


def entered(
    seq: Sequences, operands: Sequence[Tensor], starts: Sequence[Tensor | None], totals: Any, step: Any, walks: Walks
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None] | None]:
    """The tokens between which programs walk, the states that they start with, and the last ones if they are known."""
    size = operands[0].shape[2] * operands[0].shape[3]
    blocks, (bounds, cut) = cdiv(size, CHANNELS), bounds_of(seq, size)
    if bounds is None or cut is None:
        return bounds, list(starts), None
    decays = [torch.empty((bounds.numel() - 1, size), dtype=torch.float32, device=operands[0].device) for _ in starts]
    sums, states = [torch.empty_like(x) for x in decays], [torch.empty_like(x) for x in decays]
    lasts = empty_as(starts)
    if seq.count:
        totals[(bounds.numel() - 1, blocks)](
            *operands, *decays, *sums, bounds, seq.tokens,
            **walks.numbers, D=size, BD=CHANNELS, **staged(operands), AFTER=int(walks.after),
        )
        for decay, total, start, state, last in zip(decays, sums, starts, states, lasts):
            step[(seq.count, blocks)](
                decay, total, start, state, last, cut, seq.tokens, D=size, BD=CHANNELS, **staged([decay, total]),
                AFTER=0,
            )
    return bounds, states, lasts


def walkers(seq: Sequences, bounds: Tensor | None) -> int:
    """How many programs walk beside each other over one block of channels."""
    return seq.count if bounds is None else bounds.numel() - 1


def walked(
    seq: Sequences, leaves: Sequence[Tensor], starts: Sequence[Tensor | None], outs: Sequence[Tensor], step: Any,
    walks: Walks, read: Sequence[Tensor] = (),
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Fill `outs`; the states that programs start with, and the last states. `read`: what totals take behind leaves."""
    bounds, states, lasts = entered(seq, (*leaves, *read), starts, walks.totals, step, walks)
    size = leaves[0].shape[2] * leaves[0].shape[3]
    ends = empty_as(starts) if lasts is None else [None] * len(starts)
    if seq.count:
        walks.walk[(walkers(seq, bounds), cdiv(size, CHANNELS))](
            *leaves, *states, *outs, *ends, bounds, seq.tokens,
            **walks.numbers, D=size, BD=CHANNELS, **tile_of(seq, *leaves), AFTER=int(walks.after),
        )
    return states, ends if lasts is None else lasts


class Vector(torch.autograd.Function):
    """h = a * h + b for each channel: h before each token, or after it [B, T, H, D], and the last h [N, H, D], of each
    of some scans; `tensors` are the leaves [B, T, H, D] that their operands are made of, and then their initial h, or
    none: then no last ones are kept."""

    @staticmethod
    def forward(ctx: Any, seq: Sequences, walks: Walks, dtype: torch.dtype, count: int, *tensors: Tensor | None) -> Any:
        leaves = [x.contiguous() for x in tensors[: len(tensors) - count] if x is not None]
        starts = [None if x is None else x.contiguous() for x in tensors[len(tensors) - count :]]
        outs = [torch.empty_like(leaves[0], dtype=dtype) for _ in starts]
        states, lasts = walked(seq, leaves, starts, outs, vector, walks)
        ctx.seq, ctx.walks, ctx.count = seq, walks, count
        ctx.save_for_backward(*leaves, *outs, *states)
        return (*outs, *(x for x in lasts if x is not None))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        once()
        seq, walks, count, kept = ctx.seq, ctx.walks, ctx.count, ctx.saved_tensors
        leaves, outs, states = kept[: -2 * count], kept[-2 * count : -count], kept[-count:]
        d_outs, d_lasts = ([x.contiguous() for x in part] for part in (grads[:count], grads[count:]))
        bounds, ends, d_starts = entered(
            seq, (*leaves, *d_outs), d_lasts or [None] * count, walks.totals_reverse, vector_reverse, walks
        )
        d_leaves, size = [torch.empty_like(x) for x in leaves], leaves[0].shape[2] * leaves[0].shape[3]
        d_states = empty_as(ends) if d_starts is None else [None] * count
        if seq.count:
            walks.backward[(walkers(seq, bounds), cdiv(size, CHANNELS))](
                *leaves, *d_outs, *outs, *states, *ends, *d_leaves, *d_states, bounds, seq.tokens,
                **walks.numbers, D=size, BD=CHANNELS, **tile_of(seq, *leaves, *d_outs, *outs), AFTER=int(walks.after),
            )
        return (None, None, None, None, *d_leaves, *(d_states if d_starts is None else d_starts))


def together(seq: Sequences, walks: Walks, dtype: torch.dtype, leaves: Sequence[Tensor],
             starts: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """`Vector`, with a last h for each scan that has none; its bounds are known before, since torch.compile keeps
    nothing that is made inside."""
    bounds_of(seq, leaves[0].shape[2] * leaves[0].shape[3])
    found = Vector.apply(seq, walks, dtype, len(starts), *leaves, *starts)
    return (*found, *[None] * (2 * len(starts) - len(found)))


PLAIN = Walks(vector, vector_totals, vector_backward, vector_totals_reverse, False)


def vector_scan(
    seq: Sequences, a: Tensor, b: Tensor, initial: Tensor | None, after: bool = False, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor | None]:
    """h = a * h + b: h before each token, or after it, and the last one; from zero, and without a last one, if none is
    given. Operands are read as they are stored; the result is given in `dtype`, else in the wider type of theirs."""
    if seq.one_token:
        return _elementwise.vector_scan(seq, a, b, initial, after, dtype)
    dtype = torch.promote_types(a.dtype, b.dtype) if dtype is None else dtype
    result: Any = together(seq, PLAIN._replace(after=after), dtype, [a, b], [initial])
    return result[0], result[1]


def launched(
    seq: Sequences, a: Tensor, b: Tensor, initial: Tensor, reverse: bool, tropical: bool
) -> tuple[Tensor, Tensor]:
    """For `max_plus_scan` of `_elementwise`: the scan, and the sum from the end (`reverse`) that its gradient is."""
    a, b, initial, out = a.contiguous(), b.contiguous(), initial.contiguous(), torch.empty_like(b)
    step, totals = (max_plus, max_plus_totals) if tropical else (vector_reverse, vector_totals_reverse)
    walks = Walks(step, totals, None, None, False)
    last: Any
    _, (last,) = walked(seq, [a, b], [initial], [out], step, walks, [] if tropical else [b])
    return out, last


def max_plus_scan(seq: Sequences, a: Tensor, b: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
    bounds_of(seq, a.shape[2] * a.shape[3])
    return _elementwise.max_plus_scan(seq, a, b, initial, launched)
'''


def emit_vector(forms: list[VectorForm], lines: Lines, w: Writer) -> None:
    """What all elementwise scans of a package share, and the kernels of each."""
    w.paste(HELPERS)
    _kernels(plain_kernels(), w)
    w.paste(LAUNCHES)
    for form in forms:
        _kernels(own_kernels(form), w)
        _scan(form, lines, w)


def _kernels(kernels: list[Kernel], w: Writer) -> None:
    for kernel in kernels:
        verify_kernel(kernel)
        w()
        w()
        kernel.print(w)


def _scan(form: VectorForm, lines: Lines, w: Writer) -> None:
    leaves, starts, numbers = list(form.leaves.values()), form.names("initial"), list(form.numbers.values())
    given = ", ".join([*leaves, *starts, "dtype", *numbers])
    w()
    w()
    with form.function(w):
        w(f'"""{form.doc(lines)}"""')
        with w.indented("if seq.one_token:"):
            w(f"return _torch.{form.name}_scan(seq, {given})")
        kernels = ", ".join(f"{form.name}_{k}" for k in ("walk", "totals", "backward", "totals_reverse"))
        named = ", ".join(f'"{n}": {n}' for n in numbers)
        w(f"walks = Walks({kernels}, {form.after}, {{{named}}})")
        w(f"return together(seq, walks, dtype, [{', '.join(leaves)}], [{', '.join(starts)}])")
