"""Derivatives of elementwise functions, as nodes: what a gradient with respect to a result is for each operand."""

from __future__ import annotations

import math
from collections.abc import Callable

from chunkc.ir import nodes as N
from chunkc.ir.graph import Builder

Rule = Callable[[Builder, str, str, str], str]  # builder, the gradient, the operand, the result -> its gradient


def _times(f: Callable[[Builder, str, str], str]) -> Rule:
    """The gradient times a derivative, made of the operand and the result."""
    return lambda b, g, x, y: b.map("*", g, f(b, x, y))


def _less(b: Builder, x: float, y: str) -> str:
    return b.map("-", b.const(x), y)


def _silu(b: Builder, x: str, y: str) -> str:
    s = b.map("sigmoid", x)
    return b.map("+", s, b.map("*", y, _less(b, 1.0, s)))


def _gelu(b: Builder, x: str, y: str) -> str:
    below = b.map("*", b.map("+", b.map("erf", b.map("*", x, b.const(math.sqrt(0.5)))), b.const(1.0)), b.const(0.5))
    density = b.map("exp", b.map("*", b.map("*", x, x), b.const(-0.5)))
    return b.map("+", below, b.map("*", x, b.map("*", density, b.const(1 / math.sqrt(2 * math.pi)))))


def _abs(b: Builder, g: str, x: str, y: str) -> str:
    zero = b.const(0.0)
    down = b.map("where", b.map("<", x, zero), b.map("neg", g), zero)
    return b.map("where", b.map(">", x, zero), g, down)


ONE: dict[str, Rule] = {
    "neg": lambda b, g, x, y: b.map("neg", g),
    "as": lambda b, g, x, y: g,
    "exp": _times(lambda b, x, y: y),
    "log": lambda b, g, x, y: b.map("/", g, x),
    "tanh": _times(lambda b, x, y: _less(b, 1.0, b.map("*", y, y))),
    "sigmoid": _times(lambda b, x, y: b.map("*", y, _less(b, 1.0, y))),
    "silu": _times(_silu),
    "gelu": _times(_gelu),
    "relu": lambda b, g, x, y: b.map("where", b.map(">", x, b.const(0.0)), g, b.const(0.0)),
    "softplus": _times(lambda b, x, y: b.map("sigmoid", x)),
    "logsigmoid": _times(lambda b, x, y: b.map("sigmoid", b.map("neg", x))),
    "inv_softplus": lambda b, g, x, y: b.map("/", g, _less(b, 1.0, b.map("exp", b.map("neg", x)))),
    "erf": _times(lambda b, x, y: b.map("*", b.map("exp", b.map("neg", b.map("*", x, x))),
                                        b.const(2 / math.sqrt(math.pi)))),
    "sin": _times(lambda b, x, y: b.map("cos", x)),
    "cos": _times(lambda b, x, y: b.map("neg", b.map("sin", x))),
    "abs": _abs,
}  # fmt: skip
FLAT = ("<", "<=", ">", ">=", "==", "!=", "and", "or", "not", "floor", "stop")  # no gradient passes


def gradients(b: Builder, node: N.Map, g: str) -> list[str | None]:
    """The gradients of a map's operands, given that of its result; None where none passes.

    Raises NotImplementedError for a function of complex numbers."""
    args = node.args
    if node.fn in FLAT:
        return [None for _ in args]
    if node.fn in ONE:
        return [ONE[node.fn](b, g, args[0], node.id)]
    if node.fn == "+":
        return [g for _ in args]
    if node.fn == "-":
        return [g, b.map("neg", g)]
    if node.fn == "*":
        return [_product(b, [g, *args[:k], *args[k + 1 :]]) for k in range(len(args))]
    if node.fn == "/":
        down = b.map("/", g, args[1])
        return [down, b.map("neg", b.map("*", down, node.id))]
    if node.fn == "%":
        return [g, b.map("neg", b.map("*", g, b.map("floor", b.map("/", *args))))]
    if node.fn == "pow":
        less = b.map("-", args[1], b.const(1.0))
        return [b.map("*", g, b.map("*", args[1], b.map("pow", args[0], less))), None]
    if node.fn == "where":
        zero = b.const(0.0)
        return [None, b.map("where", args[0], g, zero), b.map("where", args[0], zero, g)]
    if node.fn in ("min", "max"):
        return _extreme(b, node, g)
    raise NotImplementedError(node.fn)


def _product(b: Builder, factors: list[str]) -> str:
    out = factors[0]
    for f in factors[1:]:
        out = b.map("*", out, f)
    return out


def _extreme(b: Builder, node: N.Map, g: str) -> list[str | None]:
    """To the operand that is the result, in equal parts where several are."""
    here = [b.map("where", b.map("==", a, node.id), b.const(1.0), b.const(0.0)) for a in node.args]
    count = here[0]
    for h in here[1:]:
        count = b.map("+", count, h)
    share = b.map("/", g, count)
    return [b.map("*", h, share) for h in here]
