"""Specs drawn at random from the constructs of the language. Most of them check, and what checks must build and run."""

from __future__ import annotations

from random import Random

HEAD = """fn mixed[a](x, y, q = 2) {
  u = softmax[a](x)
  output z = u * y + sum[a](x) * q
}
layer Inner(n: int = 4) {
  axes { t: time, d = n, k = 2 * n }
  input x[t, d]
  u[t, k] = linear(x)
  recurrence over t {
    state S[k]
    S = 0.5 * S + u
  }
  output y[t, d] = linear(S)
}
"""
DECLARED = """{kind} A(n: int = 4, f: float = 0.5, steps: int = 3) {{
  "Made at random."
  axes {{ t: time, d = n, e = d, g = 2 groups d, p = steps }}
  input x[t, d], idx[t]: int, m[t]: bool, lo[t, d] in [-inf, 0], un[t, d] in [0, 1]
  param w[d] = 0.5
  chunk c of t = {rule}
  chunk r of t = {other}
  mc = {fn}[t in c](x)
  ms[c, d] = {spans}
"""
GATES = ("exp(lo)", "sigmoid(x)", "un", "0.9", "1", "x", "exp(-abs(x))", "un * exp(lo)", "where(m, 0, un)")
Axes = tuple[str, ...]


class Writer:
    """Writes one spec; `pool` holds the tensors that expressions may use, with their axes."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.pool: list[tuple[str, Axes]] = [("x", ("t", "d")), ("idx", ("t",)), ("w", ("d",))]
        self.inside = False  # whether a recurrence over t is written

    def one(self, *choices: str) -> str:
        return self.random.choice(choices)

    def known(self, axes: Axes) -> list[str]:
        return [name for name, own in self.pool if set(own) <= set(axes)]

    def leaf(self, axes: Axes) -> str:
        t, d = "t" if "t" in axes else "3", "d" if "d" in axes else "0.1"
        return self.one(*self.known(axes), self.one("1", "0.5", "2", "-1", "size(d)", "f", t, d))

    def expression(self, axes: Axes, depth: int) -> str:
        """An expression over some of these axes."""
        if depth <= 0:
            return self.leaf(axes)

        def inner(more: Axes = ()) -> str:
            return self.expression((*axes, *more), depth - 1)

        forms = [
            lambda: f"({inner()} {self.one('+', '-', '*')} {inner()})",
            lambda: f"{self.one('exp', 'tanh', 'sigmoid', 'silu', 'relu', 'softplus', 'abs', 'stop')}(0.1 * {inner()})",
            lambda: f"{self.one('min', 'max')}({inner()}, {inner()})",
            lambda: f"where({self.condition(axes, depth - 1)}, {inner()}, {inner()})",
            lambda: f"bce(sigmoid({inner()}), sigmoid({inner()}){self.one('', ', gamma = 2')})",
            lambda: f"re(complex({inner()}, {inner()}) * complex({inner()}, 1))",
            lambda: f"abs(exp(complex(-abs({inner()}), {inner()})))",
        ]
        if "d" in axes:
            forms += [
                lambda: f"{self.one('softmax', 'rms_norm', 'layer_norm', 'l2_norm')}[d]({inner()} + w)",
                lambda: f"softmax[d if {self.condition(axes, depth - 1)}]({inner()} + w)",
                lambda: f"({inner()} + w)[d = {self.one('(d + 2) % size(d)', 'size(d) - 1 - d', 'd + 1')}]",
                lambda: f"sum[d in g]({inner()} + w)[g = g(d)]",
                lambda: f"rope[d]({inner()} + w, {self.one('d', 't', 'idx') if 't' in axes else 'd'})",
                lambda: f"mixed[d]({inner()} + w, {inner()})",
            ]
        else:
            forms += [
                lambda: f"{self.one('sum', 'mean', 'max', 'min', 'norm')}[d]({inner(('d',))} + w)",
                lambda: (
                    f"{self.one('sum', 'mean', 'max', 'min', 'norm')}[d if {self.condition((*axes, 'd'), depth - 1)}]"
                    f"({inner(('d',))} + w)"
                ),
                lambda: f"dot[d]({inner(('d',))} + w, {inner(('d',))} + w)",
            ]
        if {"t", "d"} <= set(axes):
            forms += [
                lambda: (
                    f"x[t = {self.one('idx', 'min(t, idx)', 't - d', 'first(c(t))', 'last(c(t))', 't + 1', 't - 2')}]"
                ),
                lambda: f"{self.one('mc', 'ms')}[c = {self.one('c(t)', 'c(t) - 1', 'c(t) + 1', 'idx')}]",
                lambda: f"({inner()} + w)[d = idx]",
            ]
        elif "t" in axes:
            forms.append(lambda: f"ce[d]({inner(('d',))} + w, idx)")
        if {"t", "d"} <= set(axes) and not self.inside:
            forms.append(lambda: f"{self.one('softmax', 'rms_norm')}[t{self.one('', ' in c', ' in r')}]({inner()} + x)")
        if axes == ("d",) and not self.inside:
            forms.append(lambda: f"{self.one('sum', 'mean', 'max')}[t]({inner(('t',))} + x)")
        return self.random.choice(forms)()

    def condition(self, axes: Axes, depth: int) -> str:
        plain = f"{self.expression(axes, depth - 1)} {self.one('<', '<=', '!=')} {self.expression(axes, depth - 1)}"
        return self.one(plain, f"not {plain}", f"({plain} or {'m' if 't' in axes else 'true'})")

    # -- recurrences -------------------------------------------------------------------------------------------------

    def recurrence(self, k: int) -> list[str]:
        """A recurrence with state S{k} and result o{k}."""
        s, o, within = f"S{k}", f"o{k}", self.one("", "", " within c", " within r")
        gate, start = self.one(*GATES), self.one("", " = 1", " = w")
        self.inside = True
        write, inner = self.expression(("t", "d"), 2), self.one("x * un", f"tanh(x) * {s}")
        kinds = {
            "linear": (f"over t{within}", f"{s}[d]{start}", f"{s} = {gate} * {s} + {write}", f"{o} = {s}"),
            "read first": (f"over t{within}", f"{s}[d]{start}", f"{o} = {s} + x", f"{s} = {gate} * {s} + c(t) * w"),
            "largest": (f"over t{within}", f"{s}[d] = -inf", f"{s} = max({s} + lo, {write})", f"{o} = {s}"),
            "any": (f"over t{within}", f"{s}[d]{start}", f"{s} = tanh({write} + {s})", f"{o} = {s} * {s}"),
            "complex": (f"over t{within}", f"{s}[d]: complex{start}",
                        f"{s} = exp(complex(lo, x)) * {s} + complex(x, 1)",
                        f"{o} = {self.one('re', 'im', 'abs')}({s})"),
            "chunks": (f"over {self.one('c', 'r')}", f"{s}[d]{start}", f"{o} = {s} * x",
                       f"{s} = 0.5 * {s} + {self.one('sum', 'mean', 'max')}[t]({inner})"),
            "steps": ("over p", f"{s}[t, d] = {self.one('x', 'w', '1')}", f"{s} = tanh({s} + p * w)"),
            "matrix": (f"over t{within}", f"{s}[d, e]",
                       f"{s} = {self.one('exp(lo)', '0.9', 'un[d = e]', 'exp(lo) * un[d = e]')} * {s} + x * un[d = e]"
                       + self.one("", f" - 0.1 * x * sum[d](x * {s})"), f"{o} = sum[{self.one('d', 'e')}]({s} * lo)"),
        }  # fmt: skip
        self.inside = False
        kind = self.one(*kinds)
        head, state, *steps = kinds[kind]
        lines = [f"  recurrence {head} {{", f"    state {state}", *(f"    {step}" for step in steps), "  }"]
        if kind == "steps":
            lines.append(f"  {o} = {s}[p = {self.one('size(p) - 1', '0', 'steps - 2')}]")
        if kind != "matrix":
            self.pool.append((o, ("t", "d")))
        else:
            lines.append(f"  q{k}[t] = mean[d](x) + 0 * sum[d](w)")
        return lines

    def spec(self) -> str:
        kind = self.one("layer", "op")
        rules = (
            "fixed(3)",
            "fixed(1)",
            "fixed(n)",
            "parts(3)",
            "parts(1)",
            "runs(idx)",
            "runs(m)",
            "runs(floor(t / 2))",
        )
        lines = [DECLARED.format(kind=kind, rule=self.one(*rules), other=self.one(*rules),
                                 fn=self.one("mean", "sum", "max", "min", "norm"),
                                 spans=self.one("x[t = first(c)]", "x[t = last(c)]", "len(c)", "mc * c"))]  # fmt: skip
        for k in range(self.random.randint(1, 3)):
            axes = self.random.choice([("t", "d"), ("t", "d"), ("t",), ("d",)])
            lines.append(f"  a{k}[{', '.join(axes)}] = {self.expression(axes, self.random.randint(1, 3))}")
            self.pool.append((f"a{k}", axes))
        if kind == "layer":
            held = self.one("linear(x)", "linear[d -> d](x, bias = true)", "conv[t](x, 3)", "linear(x, rank = 2)",
                            "embed(idx, 5)", "Inner(x)", "Inner[d = d](w * x, n = n)")  # fmt: skip
            lines.append(f"  held[t, d] = {held}")
            self.pool.append(("held", ("t", "d")))
        for k in range(self.random.randint(0, 3)):
            lines += self.recurrence(k)
        for k in range(self.random.randint(1, 2)):
            axes = self.random.choice([("t", "d"), ("t", "d"), ("t",), ("d",)])
            lines.append(f"  output y{k}[{', '.join(axes)}] = {self.expression(axes, self.random.randint(0, 3))}")
        timed = self.one(*(name for name, axes in self.pool if axes == ("t", "d")))
        lines.append(f"  output z[d] = {timed}[t = {self.one('size(t) - 1', '-1', '0')}], same = {timed}, spans = ms")
        return HEAD + "\n".join(lines) + "\n}\n"
