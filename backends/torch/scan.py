"""Matrix scans as chunk-parallel PyTorch: the chunk form of `docs/derivation.md`, forward and backward.

All tensors of a tile are [n, H, C, D]: n tiles, H heads, C tokens, D the i or the j side. A pair of a write at token j
and a read at a later token t is decayed by the gates strictly between them. Within a tile such pairs are taken block
by block, anchored at the block's middle, so that no exponent is positive.
"""

from __future__ import annotations

from chunkc.backends.scan import Pair, ScanForm, Side, other
from chunkc.backends.writer import Lines, Writer

SIDES: tuple[Side, Side] = ("i", "j")


def emit_scan(form: ScanForm, lines: Lines, w: Writer) -> None:
    """The autograd function, the one-token step and the entry point `<name>_scan`."""
    names = [o.name for o in form.operands()]
    outs = form.results()
    scan = form.scan
    with w.indented(f"class {form.name}_Scan(torch.autograd.Function):"):
        w(f'"""The recurrence of {scan.name} ({lines.place(scan.span)}), tile by tile."""')
        w()
        w("@staticmethod")
        taken = f"ctx: Any, seq: Sequences, {_typed(names)}, initial: Tensor"
        with w.indented(f"def forward({taken}) -> tuple[Tensor, ...]:"):
            w(f"operands = ({', '.join(names)})")
            _forward(form, w)
            w("ctx.seq = seq")
            w("ctx.save_for_backward(*operands, states)")
            w(f"return {', '.join([f'seq.untile({o})' for o in outs] + ['last'])}")
        w()
        w("@staticmethod")
        grads = [f"d_{o}" for o in outs]
        with w.indented(f"def backward(ctx: Any, {_typed([*grads, 'd_last'])}) -> tuple[Tensor | None, ...]:"):
            w("seq = ctx.seq")
            w(f"{', '.join(names)}, states = ctx.saved_tensors")
            _backward(form, w)
    w()
    w()
    _step(form, w)
    w()
    w()
    with w.indented(f"def {form.name}_scan(seq: Sequences, {_typed(names)}, initial: Tensor) -> tuple[Tensor, ...]:"):
        w(f'"""{_signature(form)}"""')
        with w.indented("if seq.one_token:"):
            w(f"return {form.name}_step({', '.join(names)}, initial)")
        w(f"result: tuple[Tensor, ...] = {form.name}_Scan.apply(seq, {', '.join(names)}, initial)")
        w("return result")


def _typed(names: list[str]) -> str:
    return ", ".join(f"{n}: Tensor" for n in names)


def _signature(form: ScanForm) -> str:
    i, j = ",".join(form.scan.i), ",".join(form.scan.j)
    return (f"Operands [B, T, H, D], D the size of ({i}) or ({j}); initial [N, H, ({i}), ({j})]. "
            "Gives each read before the update, and the last state.")  # fmt: skip


def _load(form: ScanForm, w: Writer, extra: list[str]) -> None:
    """Cut operands into tiles; a gate that is no logarithm becomes one before tiles are padded with 0."""
    for g in form.gates:
        if g.raw:
            w(f"log_{g.name} = seq.tile(log_gate({g.name}))")
        else:
            w(f"log_{g.name} = seq.tile({g.name})")
    names = [o.name for o in form.operands() if o not in form.gates] + extra
    w(f"{', '.join(names)} = {', '.join(f'seq.tile({n})' for n in names)}")


def _factors(form: ScanForm, w: Writer, log: str = "log_") -> None:
    """Decay from the tile's start to each token, from each token to its end, and over the whole tile."""
    for s in SIDES:
        g = form.gate(s)
        if g is not None:
            w(f"from_start_{s}, to_end_{s} = before({log}{g.name}).exp(), after({log}{g.name}).exp()")
    w(f"decay = {_decay(form, log)}")


def _decay(form: ScanForm, log: str) -> str:
    parts = []
    for s, tail in zip(SIDES, ("[..., :, None]", "[..., None, :]")):
        g = form.gate(s)
        if g is not None:
            parts.append(f"{log}{g.name}.sum(-2).exp(){tail}")
    return " * ".join(parts) or "None"


def _times(x: str, factor: str, form: ScanForm, side: Side) -> str:
    return f"({x} * {factor}_{side})" if form.gate(side) is not None else x


def _plain(text: str) -> str:
    """Without parentheses around the whole."""
    depth = 0
    for k, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0 and k < len(text) - 1:
            return text
    return text[1:-1] if text.startswith("(") else text


def _outer(pairs: list[Pair], factor: str, form: ScanForm) -> str:
    """The sum over pairs and tokens of i side times j side: what a tile adds to a state."""
    return " + ".join(f"{_times(p.i, factor, form, 'i')}.mT @ {_times(p.j, factor, form, 'j')}" for p in pairs)


def _forward(form: ScanForm, w: Writer) -> None:
    _load(form, w, [])
    _factors(form, w)
    w("# what each tile adds to the state, and the state at each tile's start")
    w(f"update = {_outer(form.write_pairs(), 'to_end', form)}")
    w("states, last = seq.carry(decay, update, initial)")
    for q, out in zip(form.queries, form.results()):
        state = "states" if q.side == "i" else "states.mT"
        read = f"{_times(q.name, 'from_start', form, q.side)} @ {state}"
        w(f"{out} = {_times(f'({read})', 'from_start', form, other(q.side))}")
    if not form.gates:
        w("# writes inside the tile, before the read")
        for q, out in zip(form.queries, form.results()):
            for p in form.write_pairs():
                w(f"{out} += ({q.name} @ {p.on(q.side)}.mT).tril(-1) @ {p.on(other(q.side))}")
        return
    w("# writes inside the tile, before the read: by blocks, from the earlier half to the later")
    with w.indented("for half in levels():"):
        _halves(form, w, [])
        for q, out in zip(form.queries, form.results()):
            w(f"_, {out}_up = halves({out}, half)")
            for p in form.write_pairs():
                w(f"score = {_up(q.name, form, q.side)} @ {_low(p.on(q.side), form, q.side)}.mT")
                part = f"(score @ {_low(p.on(other(q.side)), form, other(q.side))})"
                w(f"{out}_up += {_plain(_times(part, 'up', form, other(q.side)))}")


def _up(x: str, form: ScanForm, side: Side) -> str:
    return _times(f"{x}_up", "up", form, side)


def _low(x: str, form: ScanForm, side: Side) -> str:
    return _times(f"{x}_low", "low", form, side)


def _halves(form: ScanForm, w: Writer, extra: list[str], log: str = "log_") -> None:
    for s in SIDES:
        g = form.gate(s)
        if g is not None:
            w(f"gate_low, gate_up = halves({log}{g.name}, half)")
            w(f"low_{s}, up_{s} = after(gate_low).exp(), before(gate_up).exp()")
    for name in [o.name for o in form.operands() if o not in form.gates] + extra:
        w(f"{name}_low, {name}_up = halves({name}, half)")


def _backward(form: ScanForm, w: Writer) -> None:
    grads = [f"d_{o}" for o in form.results()]
    _load(form, w, grads)
    _factors(form, w)
    w("# the same recurrence, reversed: the gradient of the state at each tile's end")
    w(f"update = {_outer(form.query_pairs(), 'from_start', form)}")
    w("ends, d_initial = seq.carry(decay, update, d_last, reverse=True)")
    raw = any(g.raw for g in form.gates)
    _gradients(form, w, operands=True, gates=not raw)
    if raw:
        w("# gates that are no logarithms: their own value is divided out, so that exact zeros have gradients")
        for g in form.gates:
            source = f"log_gate({g.name}, LOG_SMALL)" if g.raw else g.name
            w(f"log_{g.name} = seq.tile({source})")
        _factors(form, w)
        _gradients(form, w, operands=False, gates=True)
    results = []
    for o in form.operands():
        d = f"seq.untile(d_{o.name})"
        if o in form.gates and o.raw:
            d += f" / {o.name}.clamp(min=2.0**-40)"
        results.append(d)
    w(f"return None, {', '.join(results)}, d_initial")


def _gradients(form: ScanForm, w: Writer, operands: bool, gates: bool) -> None:
    """Gradients from the states at both ends of a tile, then from pairs of tokens inside it."""
    gated = [s for s in SIDES if gates and form.gate(s) is not None]
    for s in gated:
        w(f"reads_{s}, written_{s} = 0.0, 0.0")
    for q, pair in zip(form.queries, form.query_pairs()):
        o = other(q.side)
        state = "states.mT" if q.side == "i" else "states"
        back = f"({_times(pair.on(o), 'from_start', form, o)} @ {state})"
        if operands or q.side in gated:
            name = f"d_{q.name}" if operands else "part"
            w(f"{name} = {_plain(_times(back, 'from_start', form, q.side))}")
            if q.side in gated:
                w(f"reads_{q.side} = reads_{q.side} + {_total(f'{q.name} * {name}', form, q.side)}")
        if o in gated:
            state = "states" if q.side == "i" else "states.mT"
            read = f"({_times(q.name, 'from_start', form, q.side)} @ {state})"
            product = f"{pair.on(o)} * {_times(read, 'from_start', form, o)}"
            w(f"reads_{o} = reads_{o} + {_total(product, form, o)}")
    for i, j in form.writes:
        for mine, its in ((i, j), (j, i)):
            state = "ends.mT" if mine.side == "i" else "ends"
            if operands or mine.side in gated:
                name = f"d_{mine.name}" if operands else "part"
                back = f"({_times(its.name, 'to_end', form, its.side)} @ {state})"
                w(f"{name} = {_plain(_times(back, 'to_end', form, mine.side))}")
                if mine.side in gated:
                    product = _total(f"{mine.name} * {name}", form, mine.side)
                    w(f"written_{mine.side} = written_{mine.side} + {product}")
    for s in gated:
        g = form.gate(s)
        assert g is not None
        whole = f"(decay * states * ends).sum({-1 if s == 'i' else -2})[:, :, None]"
        whole = f"{whole}.sum(-1, keepdim=True)" if g.thin else whole
        w(f"d_{g.name} = after(reads_{s}) + before(written_{s}) + {whole}")
    if not form.gates:
        _ungated_pairs(form, w)
        return
    with w.indented("for half in levels():"):
        _pair_gradients(form, w, operands, gated)


def _total(product: str, form: ScanForm, side: Side) -> str:
    """The product over its side, or its sum where the gate is one number a head."""
    gate = form.gate(side)
    return f"({product}).sum(-1, keepdim=True)" if gate is not None and gate.thin else product


def _ungated_pairs(form: ScanForm, w: Writer) -> None:
    for q, pair in zip(form.queries, form.query_pairs()):
        o = other(q.side)
        for p in form.write_pairs():
            w(f"score = ({q.name} @ {p.on(q.side)}.mT).tril(-1)")
            w(f"d_{p.on(o)} += score.mT @ {pair.on(o)}")
            w(f"d_score = ({pair.on(o)} @ {p.on(o)}.mT).tril(-1)")
            w(f"d_{q.name} += d_score @ {p.on(q.side)}")
            w(f"d_{p.on(q.side)} += d_score.mT @ {q.name}")


def _pair_gradients(form: ScanForm, w: Writer, operands: bool, gated: list[Side]) -> None:
    grads = [f"d_{o}" for o in form.results()]
    _halves(form, w, grads)
    for s in gated:
        gate = form.gate(s)
        assert gate is not None
        w(f"d_gate_low_{s}, d_gate_up_{s} = halves(d_{gate.name}, half)")
    for q, pair in zip(form.queries, form.query_pairs()):
        o = other(q.side)
        for p in form.write_pairs():
            c, a = _up(q.name, form, q.side), _low(p.on(q.side), form, q.side)
            dr, b = _up(pair.on(o), form, o), _low(p.on(o), form, o)
            w(f"score = {c} @ {a}.mT")
            w(f"d_score = {dr} @ {b}.mT")
            terms: list[tuple[str, str, str, Side, bool]] = [
                (q.name, f"(d_score @ {a})", "up", q.side, True),
                (p.on(q.side), f"(d_score.mT @ {c})", "low", q.side, True),
                (p.on(o), f"(score.mT @ {dr})", "low", o, True),
                (pair.on(o), f"(score @ {b})", "up", o, False),
            ]
            for name, product, part, side, is_operand in terms:
                if not (operands and is_operand) and side not in gated:
                    continue
                w(f"part = {_plain(_times(product, part, form, side))}")
                if operands and is_operand:
                    w(f"halves(d_{name}, half)[{int(part == 'up')}].add_(part)")
                if side in gated:
                    spread = "after" if part == "up" else "before"
                    total = _total(f"{name}_{part} * part", form, side)
                    w(f"d_gate_{part}_{side} += {spread}({total})")


def _step(form: ScanForm, w: Writer) -> None:
    names = [o.name for o in form.operands()]
    with w.indented(f"def {form.name}_step({_typed(names)}, state: Tensor) -> tuple[Tensor, ...]:"):
        w('"""One token: the reads before the update, and the state after it."""')
        w(f"{', '.join(names)} = {', '.join(f'{n}[:, 0]' for n in names)}")
        for q, out in zip(form.queries, form.results()):
            tail, dim = ("[..., :, None]", -2) if q.side == "i" else ("[..., None, :]", -1)
            w(f"{out} = ({q.name}{tail} * state).sum({dim})[:, None]")
        for g in form.gates:
            tail = "[..., :, None]" if g.side == "i" else "[..., None, :]"
            w(f"state = state * {g.name}{'' if g.raw else '.exp()'}{tail}")
        for p in form.write_pairs():
            w(f"state = state + {p.i}[..., :, None] * {p.j}[..., None, :]")
        w(f"return {', '.join([*form.results(), 'state'])}")
