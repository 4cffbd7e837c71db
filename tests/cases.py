"""Recurrences for the numerics tests, each one op, and the values that stress them."""

from __future__ import annotations

import torch
from torch import Tensor

AXES = "axes { t: time, h = heads, i = dk, j = dv }"

# Gated linear attention as an op, for what is no matter of numerics.
PLAIN = """op gated(heads: int, dk: int, dv: int) {
  axes { t: time, h = heads, i = dk, j = dv }
  input q[t, h, i], k[t, h, i], v[t, h, j], g[t, h, i] in [-inf, 0]
  recurrence over t {
    state S[h, i, j]
    S = exp(g) * S + k * v
    o = sum[i](q * S)
  }
  output o
}
"""

OPS = {
    "gated": f"""causal op gated(heads: int, dk: int, dv: int, scale: float = 0.5) {{
  {AXES}
  input q[t, h, i], k[t, h, i], v[t, h, j], g[t, h, i] in [-inf, 0]
  recurrence over t {{
    state S[h, i, j]
    S = exp(g) * S + k * v
    o = sum[i](q * S) * scale
  }}
  output o
}}
""",
    "value_gate": f"""causal op value_gate(heads: int, dk: int, dv: int) {{
  {AXES}
  input q[t, h, i], k[t, h, i], v[t, h, j], f[t, h, j] in [-inf, 0]
  recurrence over t {{
    state S[h, i, j]
    S = exp(f) * S + k * v
    o = sum[i](q * S)
  }}
  output o
}}
""",
    "product_gate": f"""causal op product_gate(heads: int, dk: int, dv: int) {{
  {AXES}
  input q[t, h, i], k[t, h, i], v[t, h, j], g[t, h, i] in [-inf, 0], f[t, h, j] in [-inf, 0]
  recurrence over t {{
    state S[h, i, j]
    o = sum[i](q * S)
    S = exp(g + f) * S + k * v
  }}
  output o
}}
""",
    "product_after": f"""causal op product_after(heads: int, dk: int, dv: int) {{
  {AXES}
  input q[t, h, i], k[t, h, i], v[t, h, j], g[t, h, i] in [-inf, 0], f[t, h, j] in [-inf, 0]
  recurrence over t {{
    state S[h, i, j]
    S = exp(g + f) * S + k * v
    o = sum[i](q * S)
  }}
  output o
}}
""",
    "scalar_gate": f"""causal op scalar_gate(heads: int, dk: int, dv: int) {{
  {AXES}
  input q[t, h, i], k[t, h, i], v[t, h, j], g[t, h] in [-inf, 0]
  recurrence over t {{
    state S[h, i, j]
    S = exp(g) * S + k * v
    o = sum[i](q * S)
  }}
  output o
}}
""",
    "raw_key": f"""causal op raw_key(heads: int, dk: int, dv: int) {{
  {AXES}
  input q[t, h, i], k[t, h, i], v[t, h, j], a[t, h, i] in [0, 1]
  recurrence over t {{
    state S[h, i, j]
    S = a * S + k * v
    o = sum[i](q * S)
  }}
  output o
}}
""",
    "raw_product": f"""causal op raw_product(heads: int, dk: int, dv: int) {{
  {AXES}
  input q[t, h, i], k[t, h, i], v[t, h, j], a[t, h, i] in [0, 1], b[t, h, j] in [0, 1]
  recurrence over t {{
    state S[h, i, j]
    S = a * b * S + k * v
    o = sum[i](q * S)
  }}
  output o
}}
""",
    "raw_and_log": f"""causal op raw_and_log(heads: int, dk: int, dv: int) {{
  {AXES}
  input q[t, h, i], k[t, h, i], v[t, h, j], a[t, h, i] in [0, 1], f[t, h, j] in [-inf, 0]
  recurrence over t {{
    state S[h, i, j]
    S = a * exp(f) * S + k * v
    o = sum[i](q * S)
  }}
  output o
}}
""",
    "both_sides": f"""causal op both_sides(heads: int, dk: int, dv: int) {{
  {AXES}
  input q[t, h, i], w[t, h, j], k[t, h, i], v[t, h, j], k2[t, h, i], v2[t, h, j], g[t, h, i] in [-inf, 0]
  recurrence over t {{
    state S[h, i, j]
    p = sum[j](w * S)
    S = exp(g) * S + k * v + k2 * v2
    o = sum[i](q * S)
  }}
  output o, p
}}
""",
    "bonus": f"""causal op bonus(heads: int, dk: int, dv: int) {{
  {AXES}
  input q[t, h, i], k[t, h, i], v[t, h, j], w[t, h, i]
  param u[h, i] = 0
  recurrence over t {{
    state S[h, i, j]
    o = sum[i](q * (S + u * k * v))
    S = exp(-exp(w)) * S + k * v
  }}
  output o
}}
""",
    "two_states": f"""causal op two_states(heads: int, dk: int, dv: int) {{
  {AXES}
  input q[t, h, i], k[t, h, i], v[t, h, j], g[t, h, i] in [-inf, 0]
  recurrence over t {{
    state S[h, i, j], z[h, i]
    S = exp(g) * S + k * v
    z = exp(g) * z + k * k
    o = sum[i](q * S) / (1 + sum[i](q * q * z))
  }}
  output o
}}
""",
    "three_states": """causal op three_states(heads: int, dk: int, dv: int) {
  axes { t: time, h = heads, i = dk, j = dv, m = 8 }
  input q[t, h, i], k[t, h, i], v[t, h, j], s[t, h, m], g[t, h, m] in [-inf, 0]
  recurrence over t {
    state A[h, i, m], B[h, m, j], c[h, m]
    A = exp(g) * A + k * s
    p = softmax[m](sum[i](q * A) / 50)
    c = exp(g) * c + p
    B = exp(g) * B + s * v
    o = sum[m](p * B) / (1 + sum[m](p * c))
  }
  output o
}
""",
    "vector": """causal op vector(heads: int, dk: int) {
  axes { t: time, h = heads, i = dk }
  input z[t, h, i] in [0, 1], u[t, h, i]
  recurrence over t {
    state c[h, i]
    c = z * c + (1 - z) * u
  }
  output c
}
""",
    "two_vectors": """causal op two_vectors(heads: int, dk: int) {
  axes { t: time, h = heads, i = dk }
  input g[t, h, i] in [-inf, 0], k[t, h, i], v[t, h, i]
  recurrence over t {
    state a[h, i], b[h, i]
    a = exp(g) * a + (1 - exp(g)) * tanh(k) * size(i)^-0.5
    b = exp(g) * b + (1 - exp(g)) * max(v, k)
  }
  output a, b
}""",
    "max_plus": """causal op max_plus(heads: int) {
  axes { t: time, h = heads }
  input f[t, h], g[t, h]
  recurrence over t {
    state m[h] = -inf
    m = max(m + f, g)
  }
  output m
}
""",
    "delta": f"""causal op delta(heads: int, dk: int, dv: int) {{
  {AXES}
  input q[t, h, i], k0[t, h, i], v[t, h, j], b[t, h] in [0, 1]
  k = l2_norm[i](k0)
  recurrence over t {{
    state S[h, i, j]
    S = S + b * k * (v - sum[i](k * S))
    o = sum[i](q * S)
  }}
  output o
}}
""",
    "stabilised": f"""causal op stabilised(heads: int, dk: int, dv: int) {{
  {AXES}
  input q[t, h, i], k[t, h, i], v[t, h, j], x[t, h], w[t, h]
  recurrence over t {{
    state C[h, i, j], n[h, i], m[h] = -inf
    top = stop(max(logsigmoid(x) + m, w))
    C = exp(logsigmoid(x) + m - top) * C + exp(w - top) * k * v
    n = exp(logsigmoid(x) + m - top) * n + exp(w - top) * k
    m = top
    o = sum[i](q * C) / (1 + sum[i](q * n) ^ 2)
  }}
  output o
}}
""",
    "interpolated": f"""causal op interpolated(heads: int, dk: int, dv: int) {{
  {AXES}
  input q[t, h, i], v[t, h, j], a[t, h, i] in [0, 1]
  recurrence over t {{
    state S[h, i, j]
    S = (1 - a) * S + a * v
    o = sum[i](q * S)
  }}
  output o
}}
""",
    "averages": f"""causal op averages(heads: int, dk: int, dv: int) {{
  {AXES}
  input q[t, h, i], v[t, h, j], g[t, h, i] in [-inf, 0]
  recurrence over t {{
    state S[h, i, j], z[h, i, j]
    S = exp(g) * S + (1 - exp(g)) * v
    z = exp(g) * z + v
    o = sum[i](q * (S + z))
  }}
  output o
}}
""",
    "learned_gate": f"""causal op learned_gate(heads: int, dk: int, dv: int) {{
  {AXES}
  input q[t, h, i], k[t, h, i], v[t, h, j]
  param c[h] = 4, u[h, i] = 1
  recurrence over t {{
    state S[h, i, j]
    S = sigmoid(c) * S + k * v
    o = sum[i](tanh(u) * q * S)
  }}
  output o
}}
""",
    "unread": f"""causal op unread(heads: int, dk: int, dv: int) {{
  {AXES}
  input q[t, h, i], k[t, h, i], v[t, h, j], g[t, h, i] in [-inf, 0]
  recurrence over t {{
    state z[h, i], S[h, i, j], M[h, i, j], L[h, i, j]
    z = exp(g) * z + k
    S = exp(g) * S + k * v
    L = 0 * L + k * v
    o = sum[i](q * (S + M))
  }}
  output o
}}
""",
    "constant": f"""causal op constant(heads: int, dk: int, dv: int) {{
  {AXES}
  input q[t, h, i], k[t, h, i], v[t, h, j]
  recurrence over t {{
    state S[h, i, j]
    S = 0.9999 * S + k * v
    o = sum[i](q * S)
  }}
  output o
}}
""",
    "no_gate": f"""causal op no_gate(heads: int, dk: int, dv: int) {{
  {AXES}
  input q[t, h, i], k[t, h, i], v[t, h, j]
  recurrence over t {{
    state S[h, i, j]
    S = S + k * v
    o = sum[i](q * S)
  }}
  output o
}}
""",
}


def mild(shape: list[int]) -> Tensor:
    return torch.nn.functional.logsigmoid(torch.randn(shape)) / 16


def mixed(shape: list[int]) -> Tensor:
    """Log-gates from 0 to -100, a tenth of them -100 and a tenth 0."""
    g = -torch.rand(shape) * 20
    pick = torch.rand(shape)
    return torch.where(pick < 0.1, -100.0, torch.where(pick > 0.9, 0.0, g))


def strong(shape: list[int]) -> Tensor:
    return torch.full(shape, -5.0)


def with_zeros(shape: list[int]) -> Tensor:
    """Decays in [0, 1], a fifth of them exactly 0 and a fifth exactly 1."""
    a = torch.rand(shape)
    pick = torch.rand(shape)
    return torch.where(pick < 0.2, 0.0, torch.where(pick > 0.8, 1.0, a))


def vanishing(shape: list[int]) -> Tensor:
    """Decays that are 0 throughout in one head, hardly more in another, and mostly 0 in the others."""
    a = with_zeros(shape) * (torch.rand(shape) > 0.7)
    a[:, 0] = 0.0
    if shape[1] > 1:
        a[:, 1] = 1e-20
    return a


def closing(shape: list[int]) -> Tensor:
    """Log-gates, a fifth of them -inf: they forget everything before."""
    return torch.where(torch.rand(shape) < 0.2, -float("inf"), -torch.rand(shape))


LOG_GATES = ("g", "f")
RAW_GATES = ("a", "b", "z")
