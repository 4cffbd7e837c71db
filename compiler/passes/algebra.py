"""Polynomials over the nodes of a builder: the canonical form in which rewritings of one equation become equal."""

from __future__ import annotations

from collections.abc import Iterable

from chunkc.ir import nodes as N
from chunkc.ir.graph import Builder

Monomial = tuple[str, ...]
Poly = dict[Monomial, float]
MAX_TERMS = 64


def add(a: Poly, b: Poly, sign: float = 1.0) -> Poly:
    """a + sign * b; terms that cancel vanish."""
    out = dict(a)
    for m, c in b.items():
        out[m] = out.get(m, 0.0) + sign * c
        if out[m] == 0:
            del out[m]
    return out


def mul(a: Poly, b: Poly) -> Poly:
    out: Poly = {}
    for m, c in a.items():
        for n, d in b.items():
            out = add(out, {tuple(sorted(m + n)): c * d})
    return out


class Algebra:
    """Expands nodes of a builder into polynomials, and builds nodes from them."""

    def __init__(self, builder: Builder) -> None:
        self.b = builder
        self._known: dict[str, Poly] = {}

    def expand(self, id_: str) -> Poly:
        """The node as a sum of products of other nodes; functions other than + - * are factors."""
        if id_ not in self._known:
            self._known[id_] = self._expand(id_)
        return self._known[id_]

    def _expand(self, id_: str) -> Poly:
        node = self.b.nodes[id_]
        if isinstance(node, N.Const) and not node.size.params():
            value = float(node.size.evaluate({}))
            return {(): value} if value else {}
        if isinstance(node, N.Map):
            if node.fn in ("+", "-"):
                return add(self.expand(node.args[0]), self.expand(node.args[1]), 1.0 if node.fn == "+" else -1.0)
            if node.fn == "neg":
                return add({}, self.expand(node.args[0]), -1.0)
            if node.fn == "as":  # repetition along axes: broadcasting by name makes it idle
                return self.expand(node.args[0])
            if node.fn == "*":
                a, b = self.factor(node.args[0]), self.factor(node.args[1])
                if len(a) * len(b) <= MAX_TERMS:
                    return mul(a, b)
            if node.fn == "/":
                a = self.factor(node.args[0])
                inverse = self.b.map("/", self.b.const(1.0), node.args[1], span=node.span)
                if inverse != id_:
                    return mul(a, {(inverse,): 1.0})
        return {(id_,): 1.0}

    def factor(self, id_: str) -> Poly:
        """The node as a factor of a product: a sum is kept whole if multiplying it out could split nothing.

        That is so if one of its own factors has all its axes. `q * (1 - a)` as `q - q * a` would cost a read more, and
        cancel where a is near 1. A sum of a state's reads is multiplied out, so that linear feedback is seen."""
        poly = self.expand(id_)
        if len(poly) > 1:
            factors = {f for m in poly for f in m}
            whole = any(set(self.b.nodes[f].axes) == self.axes(factors) for f in factors)
            if whole and not any(isinstance(self.b.nodes[f], N.State) for f in factors):
                return {(self.build(poly),): 1.0}
        return poly

    def axes(self, monomial: Iterable[str]) -> set[str]:
        return {a for f in monomial for a in self.b.nodes[f].axes}

    def product(self, monomial: Monomial, scale: float = 1.0) -> str:
        """A node for scale times the product of the factors, those with fewest axes first."""
        factors = sorted(monomial, key=lambda f: (len(self.b.nodes[f].axes), f))
        if not factors:
            return self.number(scale)
        out = factors[0]
        for f in factors[1:]:
            out = self.b.map("*", out, f, span=self.b.nodes[f].span)
        if scale == -1.0:
            return self.b.map("neg", out, span=self.b.nodes[out].span)
        return out if scale == 1.0 else self.b.map("*", self.number(scale), out, span=self.b.nodes[out].span)

    def number(self, value: float) -> str:
        """A constant, an int where it is one, so that it is the spec's own node."""
        return self.b.const(int(value) if value == int(value) else value)

    def build(self, poly: Poly) -> str:
        """A node for the polynomial, in a canonical order of terms."""
        out: str | None = None
        for m in sorted(poly, key=lambda m: (poly[m] < 0, len(m), m)):
            if out is None:
                out = self.product(m, poly[m])
            elif poly[m] < 0:
                out = self.b.map("-", out, self.product(m, -poly[m]))
            else:
                out = self.b.map("+", out, self.product(m, poly[m]))
        return self.b.const(0.0) if out is None else out

    def split(self, poly: Poly, inside: set[str]) -> dict[Monomial, Poly]:
        """Group terms by their factors that have an axis of `inside`; the values are what multiplies each group."""
        out: dict[Monomial, Poly] = {}
        for m, c in poly.items():
            key = tuple(f for f in m if set(self.b.nodes[f].axes) & inside)
            rest = tuple(f for f in m if f not in key)
            out[key] = add(out.get(key, {}), {rest: c})
        return {k: p for k, p in out.items() if p}

    def grouped(self, poly: Poly, inside: set[str]) -> list[tuple[str, Poly]]:
        """Terms as few products of a node over `inside` and what multiplies it: equal multipliers are joined."""
        out: list[tuple[Poly, Poly]] = []
        for key, outside in self.split(poly, inside).items():
            for k, (known, multiplier) in enumerate(out):
                sign = 1.0 if multiplier == outside else -1.0 if multiplier == add({}, outside, -1.0) else 0.0
                if sign:
                    out[k] = (add(known, {key: 1.0}, sign), multiplier)
                    break
            else:
                out.append(({key: 1.0}, outside))
        return [(self.build(p), multiplier) for p, multiplier in out]
