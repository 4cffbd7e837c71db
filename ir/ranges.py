"""Ranges: for each node an interval that holds its values, whatever the inputs.

Beside plain interval arithmetic there is one relational fact: x - max(..., x, ...) is not positive."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

from chunkc.ir import nodes as N
from chunkc.ir.axes import Size

Interval = tuple[float, float]
REALS: Interval = (-math.inf, math.inf)


def _mul(a: float, b: float) -> float:
    return 0.0 if a == 0 or b == 0 else a * b


def _products(a: Interval, b: Interval) -> Interval:
    values = [_mul(x, y) for x in a for y in b]
    return min(values), max(values)


def _exp(x: float) -> float:
    return math.inf if x > 700 else math.exp(x)


def _monotone(fn: str, x: float) -> float:
    if fn == "exp":
        return _exp(x)
    if fn == "log":
        return -math.inf if x <= 0 else math.log(x)
    if fn == "tanh":
        return math.tanh(x)
    if fn == "sigmoid":
        return 1 / (1 + _exp(-x))
    if fn == "relu":
        return max(x, 0.0)
    if fn == "softplus":
        return x if x > 30 else math.log1p(_exp(x))
    if fn == "logsigmoid":
        return -_monotone("softplus", -x)
    if fn == "floor":
        return math.floor(x) if math.isfinite(x) else x
    if fn == "inv_softplus":
        return -math.inf if x <= 0 else (x if x > 30 else math.log(math.expm1(x)))
    raise KeyError(fn)


MONOTONE = ("exp", "log", "tanh", "sigmoid", "relu", "softplus", "logsigmoid", "floor", "inv_softplus")


class Ranges:
    """Intervals of the nodes of a graph, found on demand."""

    def __init__(self, nodes: Mapping[str, N.AnyNode], outer: Ranges | None = None) -> None:
        self.nodes = nodes
        self.outer = outer
        self._known: dict[str, Interval] = {}

    @staticmethod
    def of_size(size: Size) -> Interval:
        """A constant's interval; an int parameter is at least 1, others are unknown."""
        if size.op == "const":
            value = float(size.value)
            return (value, value)
        if size.op == "param":
            return REALS
        a = [Ranges.of_size(arg) for arg in size.args]
        if size.op == "neg":
            return (-a[0][1], -a[0][0])
        if all(low == high for low, high in a):
            try:
                value = float(size.evaluate({}))
                return (value, value)
            except (ArithmeticError, ValueError, KeyError):
                return REALS
        return REALS

    def __getitem__(self, id_: str) -> Interval:
        stack = [id_]
        while stack:  # by an explicit stack: chains of nodes may be deep
            top = stack[-1]
            pending = [a for a in self.nodes[top].operands() if a not in self._known and a in self.nodes]
            if pending and top not in self._known:
                stack.extend(pending)
                continue
            stack.pop()
            if top not in self._known:
                low, high = self._find(self.nodes[top])
                self._known[top] = (-math.inf if math.isnan(low) else low, math.inf if math.isnan(high) else high)
        return self._known[id_]

    def _find(self, node: N.AnyNode) -> Interval:
        if isinstance(node, N.Const):
            return self.of_size(node.size)
        if isinstance(node, N.Input | N.Param):
            low = -math.inf if node.low is None else node.low
            return (low, math.inf if node.high is None else node.high)
        if isinstance(node, N.Capture) and self.outer is not None and node.outer in self.outer.nodes:
            return self.outer[node.outer]
        if isinstance(node, N.Coord | N.Length | N.Bounds):
            return (0.0, math.inf)
        if isinstance(node, N.Expand | N.Rename):
            return self._known[node.arg]
        if isinstance(node, N.Shift | N.Slice | N.Gather):
            low, high = self._known[node.arg]
            return (min(low, 0.0), max(high, 0.0))
        if isinstance(node, N.Reduce):
            return self._reduce(node)
        if isinstance(node, N.Normalize):
            return (0.0, 1.0) if node.fn == "softmax" else REALS
        if isinstance(node, N.Map):
            return self._map(node)
        return REALS

    def _reduce(self, node: N.Reduce) -> Interval:
        if node.dtype == "complex":
            return REALS
        low, high = self._known[node.arg]
        if node.fn == "sum":
            return (0.0 if low >= 0 else -math.inf, 0.0 if high <= 0 else math.inf)
        return (min(low, 0.0), max(high, 0.0))  # of nothing it is 0

    def _map(self, node: N.Map) -> Interval:
        if node.dtype == "complex" or any(self.nodes[i].dtype == "complex" for i in node.args):
            return (0.0, math.inf) if node.fn == "abs" else REALS
        fn, a = node.fn, [self._known[i] for i in node.args]
        if fn in ("stop", "as"):
            return a[0]
        if fn in MONOTONE:
            if fn == "exp" and self._not_positive(node.args[0]):
                return (_exp(a[0][0]), min(_exp(a[0][1]), 1.0))
            return (_monotone(fn, a[0][0]), _monotone(fn, a[0][1]))
        if fn in ("+", "-"):
            sign = 1 if fn == "+" else -1
            other = (a[1][0], a[1][1]) if sign > 0 else (-a[1][1], -a[1][0])
            low, high = a[0][0] + other[0], a[0][1] + other[1]
            corner_low, corner_high = self._corners(node.id)
            return (max(low, corner_low), min(high, corner_high))
        if fn == "neg":
            return (-a[0][1], -a[0][0])
        if fn == "*":
            if node.args[0] == node.args[1]:
                square = [_mul(x, x) for x in a[0]]
                return (0.0 if a[0][0] <= 0 <= a[0][1] else min(square), max(square))
            return _products(a[0], a[1])
        if fn == "/" and (a[1][0] > 0 or a[1][1] < 0):
            return _products(a[0], (1 / a[1][1] if a[1][1] else math.inf, 1 / a[1][0] if a[1][0] else math.inf))
        if fn in ("sin", "cos"):
            return (-1.0, 1.0)
        if fn == "%" and a[1][0] > 0:
            return (0.0, a[1][1])
        if fn == "abs":
            low, high = a[0]
            return (0.0 if low <= 0 <= high else min(abs(low), abs(high)), max(abs(low), abs(high)))
        if fn == "max":
            return (max(x[0] for x in a), max(x[1] for x in a))
        if fn == "min":
            return (min(x[0] for x in a), min(x[1] for x in a))
        if fn == "where":
            return (min(a[1][0], a[2][0]), max(a[1][1], a[2][1]))
        if fn == "silu":
            return (-0.2785, max(a[0][1], 0.0))
        if fn == "gelu":
            return (-0.17, max(a[0][1], 0.0))
        if fn == "pow":
            return self._pow(a[0], a[1])
        return REALS

    @staticmethod
    def _pow(base: Interval, power: Interval) -> Interval:
        if power[0] != power[1] or base[0] < 0:
            even = power[0] == power[1] and power[0] == int(power[0]) and int(power[0]) % 2 == 0 and power[0] > 0
            return (0.0, math.inf) if even else REALS
        try:
            ends = sorted(x ** power[0] if x else (0.0 if power[0] > 0 else math.inf) for x in base)
        except OverflowError:
            return (0.0, math.inf)
        return (ends[0], ends[1])

    # -- complex numbers ---------------------------------------------------------------------------------------------

    def real_part(self, id_: str) -> Interval:
        """An interval that holds the real part."""
        node = self.nodes[id_]
        if isinstance(node, N.Capture) and self.outer is not None and node.outer in self.outer.nodes:
            return self.outer.real_part(node.outer)
        if node.dtype != "complex":
            return self[id_]
        if isinstance(node, N.Expand | N.Rename):
            return self.real_part(node.arg)
        if not isinstance(node, N.Map):
            return REALS
        if node.fn in ("complex", "as", "stop"):
            return self.real_part(node.args[0])
        if node.fn == "neg":
            low, high = self.real_part(node.args[0])
            return (-high, -low)
        if node.fn in ("+", "-"):
            a, b = (self.real_part(x) for x in node.args)
            return (a[0] + b[0], a[1] + b[1]) if node.fn == "+" else (a[0] - b[1], a[1] - b[0])
        reals = [x for x in node.args if self.nodes[x].dtype != "complex"]
        if node.fn == "*" and reals:
            other = next(x for x in node.args if x != reals[0])
            return _products(self[reals[0]], self.real_part(other))
        return REALS

    def modulus(self, id_: str) -> float:
        """A bound that no value's modulus exceeds."""
        node = self.nodes[id_]
        if isinstance(node, N.Capture) and self.outer is not None and node.outer in self.outer.nodes:
            return self.outer.modulus(node.outer)
        if node.dtype != "complex":
            return max(abs(x) for x in self[id_])
        if isinstance(node, N.Expand | N.Rename):
            return self.modulus(node.arg)
        if not isinstance(node, N.Map):
            return math.inf
        if node.fn == "exp":
            return _exp(self.real_part(node.args[0])[1])
        if node.fn in ("as", "stop", "neg"):
            return self.modulus(node.args[0])
        if node.fn == "*":
            return _mul(self.modulus(node.args[0]), self.modulus(node.args[1]))
        if node.fn == "complex":
            return math.hypot(self.modulus(node.args[0]), self.modulus(node.args[1]))
        return math.inf

    # -- sums of products that share factors -------------------------------------------------------------------------

    def _expand(self, id_: str, depth: int = 0) -> dict[tuple[str, ...], float]:
        """The value as a polynomial in other nodes, through sums and products; {(id,): 1} where it grows too large."""
        node = self.nodes[id_]
        if isinstance(node, N.Const) and node.size.op == "const":
            return {(): float(node.size.value)}
        if isinstance(node, N.Map) and depth < 12:
            if node.fn in ("as", "stop", "neg"):
                inner = self._expand(node.args[0], depth + 1)
                return {m: -c for m, c in inner.items()} if node.fn == "neg" else inner
            if node.fn in ("+", "-", "*"):
                a, b = (self._expand(x, depth + 1) for x in node.args)
                if node.fn != "*":
                    sign = 1 if node.fn == "+" else -1
                    return {m: a.get(m, 0.0) + sign * b.get(m, 0.0) for m in {**a, **b}}
                if len(a) * len(b) <= 16:
                    out: dict[tuple[str, ...], float] = {}
                    for (m, c), (n, d) in itertools.product(a.items(), b.items()):
                        key = tuple(sorted(m + n))
                        out[key] = out.get(key, 0.0) + c * d
                    return out
        return {(id_,): 1.0}

    def _corners(self, id_: str) -> Interval:
        """Exact bounds of a polynomial that is linear in each of at most six bounded factors: they lie at corners."""
        poly = self._expand(id_)
        factors = sorted({f for m in poly for f in m})
        linear = all(len(set(m)) == len(m) for m in poly) and 0 < len(factors) <= 6
        bounds = [self[f] for f in factors] if linear else []
        if not linear or any(math.isinf(x) for b in bounds for x in b):
            return REALS
        values = []
        for corner in itertools.product(*bounds):
            at = dict(zip(factors, corner))
            values.append(sum(c * math.prod(at[f] for f in m) for m, c in poly.items()))
        slack = 1e-12  # the sums above are rounded
        return tuple(round(x) if abs(x - round(x)) < slack else x for x in (min(values), max(values)))  # type: ignore[return-value]

    # -- x - max(..., x, ...) ----------------------------------------------------------------------------------------

    def terms(self, id_: str, sign: int = 1) -> list[tuple[int, str]]:
        """The value as a signed sum of other nodes, through sums, differences and `stop`."""
        node = self.nodes[id_]
        if isinstance(node, N.Map):
            if node.fn in ("+", "-"):
                right = sign if node.fn == "+" else -sign
                return self.terms(node.args[0], sign) + self.terms(node.args[1], right)
            if node.fn == "neg":
                return self.terms(node.args[0], -sign)
            if node.fn in ("stop", "as"):
                return self.terms(node.args[0], sign)
        return [(sign, id_)]

    def _not_positive(self, id_: str) -> bool:
        """Whether a sum is at most 0: some -max(...) covers terms of it, and the rest is at most 0."""
        terms = self.terms(id_)
        for index, (sign, name) in enumerate(terms):
            node = self.nodes[name]
            if sign > 0 or not (isinstance(node, N.Map) and node.fn == "max"):
                continue
            for arg in node.args:
                rest = terms[:index] + terms[index + 1 :]
                covered = self.terms(arg)
                if all(t in rest for t in covered):
                    for t in covered:
                        rest.remove(t)
                    if all((self[n][1] if s > 0 else -self[n][0]) <= 0 for s, n in rest):
                        return True
        return False
