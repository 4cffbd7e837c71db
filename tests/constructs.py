"""Specs that use each construct of the language, with the sizes that tests give them, and values for integer inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SPECS = {
    "reads": """op reads(n: int, m: int) {
  axes { t: time, d = n, e = n, r = m, r2 = r }
  input x[t, d], idx[t]: int, j[t, d]: int
  param w[r, d] = normal(1)
  param A[r, r2] = normal(1)
  a = x[d = (d + 1) % size(d)]
  b = w[r = idx]
  s = x[t = idx]
  f = x[d = j]
  g = A[r2 = r]
  h = x[t = t - j]
  k = w[r = d]
  output a, b, s, f, h, k
  output z[t, r] = g
}
""",
    "conds": """op conds(n: int) {
  axes { t: time, d = n, g = 3 groups d }
  input x[t, d], y[t, d]
  a = sum[d if x > 0](y)
  b = mean[d if x > y](y)
  c0 = max[d if x > 0.5](y)
  e = softmax[d if x > 0](y)
  f = count[d](x > y)
  h = any[d if x > 1](y > 0)
  k = norm[d if y > 0](x)
  l = sum[d in g](x * y)
  m = max[d in g](x)
  p = mean[d in g](x)[g = g(d)]
  u = softmax[t](x)
  v = rms_norm[t, d](x)
  w = layer_norm[t](x)
  q = sum[t if x > 0](x)
  output a, b, c0, e, k, l, m, p, u, v, w, q
  output f1[t] = f + 0
  output h1[t] = where(h, 1, 0)
}
""",
    "losses": """layer losses(vocab: int, d_model: int) {
  axes { t: time, d = d_model, v = vocab, i = d_model / 2 }
  input tok[t]: int, y[t] in [0, 1], x[t, i]
  h[t, d] = embed(tok, vocab)
  l[t, v] = linear[d -> v](h, init = normal(0.02))
  k = rope[d](h, t)
  z = ce[v](l, tok)
  b = bce(sigmoid(mean[d](k)), y, gamma = 2)
  b2 = bce(sigmoid(mean[i](x)), y > 0.5)
  output z, b, b2, k
}
""",
    "chunky": """op chunky(n: int) {
  axes { t: time, d = n, s = t }
  input x[t, d], id[t]: int
  chunk c of t = parts(5)
  chunk r of t = runs(id)
  chunk f of t = fixed(7)
  a = mean[t in c](x)
  b = a[c = c(t)]
  m = max[t in r](x)[r = r(t)]
  u = x[t = first(f)] * len(f) + last(f)
  q = softmax[t in r](x)
  w = rms_norm[t in f, d](x)
  e = sum[c](a)
  g = x[t = first(f(t))]
  k[s, d] = x
  y = sum[s in f](k)
  output b, m, u, q, w, e, g, a, y
  output z[t] = r(t) + f(t) * 10 + first(r(t)) + len(r)[r = r(t)]
}
""",
    "overs": """causal op overs(heads: int, dk: int, dv: int) {
  axes { t: time, h = heads, i = dk, j = dv }
  input q[t, h, i], k[t, h, i], v[t, h, j], b[t, h] in [0, 1], id[t]: int
  chunk c of t = fixed(6)
  chunk r of t = runs(id)
  recurrence over c {
    state W[h, i, j]
    o = sum[i](q * W)
    W = W - 0.1 * sum[t](b * k * (sum[i](k * W) - v)) / len(c)
  }
  recurrence over r {
    state m[h, j]
    p = v - m
    m = tanh(0.5 * m + mean[t](v) + max[t](v))
  }
  recurrence over t within r {
    state n[h, j] = 1
    n = tanh(n + v)
    w = n * t
  }
  output o, p, w
}
""",
    "steps": """op steps(n: int, k: int) {
  axes { t: time, a = n, b = a, c = a, p = k, d = n }
  input x[t, d], z[t, p]
  param M0[a, b] = normal(0.1)
  recurrence over p {
    state X[a, b] = M0
    X = 1.5 * X - 0.5 * sum[c](X[b = c] * X[a = c])
  }
  M = X[p = k - 1]
  recurrence over p {
    state u[t, d] = x
    u = tanh(u + z)
  }
  y = x[d = a]
  output o[t, b] = sum[a](M * y)
  output v = u
}
""",
    "fns": """fn whiten[a, b](X, p, q, r) {
  axes { a2 = a, a3 = a }
  A = sum[b](X * X[a = a2])
  B = q * A + r * sum[a3](A[a2 = a3] * A[a = a3])
  output Y = p * X + sum[a2](B * X[a = a2])
}
fn muon[a, b](M) {
  x0 = M / (norm[a, b](M) + 1e-7)
  x1 = whiten[a, b](x0, 4.0848, -6.8946, 2.9270)
  x2 = whiten[a, b](x1, 3.9505, -6.3029, 2.6377)
  output Y = whiten[a, b](x2, 3.7418, -5.5913, 2.3037)
}
layer Lact(d_model: int, heads: int = 2, length: int = 8) {
  axes { t: time, d = d_model, h = heads, i = d_model / heads, m = 5 }
  chunk c of t = fixed(length)
  input x[t, d]
  q[t, h, i] = l2_norm[i](silu(linear(x)))
  k[t, h, i] = l2_norm[i](silu(linear(x)))
  v[t, h, m] = silu(linear(x))
  beta[t, h] = sigmoid(linear(x))
  param u0[h, m, i] = normal(0.02)
  recurrence over c {
    state W[h, m, i] = u0, M[h, m, i]
    o = sum[i](W * q)
    M = mean[t](beta) * M + sum[t](beta * k * (v - sum[i](W * k)))
    V0 = W + muon[m, i](M)
    W = V0 / norm[i](V0) * norm[i](u0)
  }
  recurrence over t {
    state n[h, m] = 0.5
    n = 0.9 * n + v
  }
  z = n[t = t - 2]
  output y[t, d] = linear(o + z)
}
""",
    "names": """layer Names(length: int = 4, range: int = 3, math: float = 0.5, number: int = 2, seq: int = 2) {
  axes { t: time, d = range, h = number, e = length }
  input x[t, d], torch[t, d], scans[t, d]
  chunk c of t = fixed(length)
  a = x * math + log(math) + torch + scans
  recurrence over t {
    state start[h, d], S[d]
    start = tanh(start + a)
    S = 0.5 * S + a
  }
  y[t, e] = linear(a)
  output y
  output z = start + S + c(t)
}
""",
    "numbers": """op numbers(n: int, k: int) {
  axes { t: time, d = n, p = k, g = 2 groups d }
  input x[t, d], idx[t]: int, m[t]: bool
  param w[d] = normal(1)
  copy = x + 1
  recurrence over t {
    state S[d], Z[d]: complex = complex(1, 0), one[d]
    S = tanh(where(m, S, 0) + max(S, -1, 0.25) + sum[d in g](S + w)[g = g(d)])
    Z = exp(complex(-0.5, x)) * Z + complex(idx, 1)
    one = 1
    o = S
    a = copy
    q = complex(2, idx) * Z
  }
  recurrence over p {
    state R[t, d] = x
    R = tanh(R + w * p)
  }
  r = R[p = k - 1]
  u = max(copy, max(1, 2)) + 2 ^ (1 / 2)
  output S, o, a, r, u
  output y0 = re(q), y1 = im(q), y2 = one, y3 = copy * o
  output first_[d] = r[t = 0], before[d] = r[t = -1]
  output i0 = min(0.1, idx) + (1 + idx * idx) ^ 0.5, i1 = abs(complex(idx, 0.3))
}
""",
    "s4": """causal layer S4D(d_model: int, states: int = 8) {
  axes { t: time, d = d_model, e = d_model, n = states / 2 }
  input u[t, d]
  param ldt[d] = uniform(log(0.001), log(0.1))
  param la[d, n] = log(0.5)
  param om[d, n] = pi * n
  param cr[d, n] = normal(0.5^0.5)
  param ci[d, n] = normal(0.5^0.5)
  param skip[d] = normal(1)
  a = complex(-exp(la), om)
  lam = exp(exp(ldt) * a)
  recurrence over t {
    state S[d, n]: complex
    S = lam * S + (lam - 1) / a * u
    o = 2 * re(sum[n](complex(cr, ci) * S)) + skip * u
  }
  p[t, e] = linear(gelu(o), bias = true)
  s[t, e] = linear(gelu(o), bias = true)
  output y[t, e] = p * sigmoid(s)
}
""",
    "within": """causal op within_chunks(heads: int, dk: int, dv: int) {
  axes { t: time, h = heads, i = dk, j = dv }
  chunk c of t = fixed(16)
  input q[t, h, i], k[t, h, i], v[t, h, j], g[t, h, i] in [-inf, 0]
  recurrence over t within c {
    state S[h, i, j]
    S = exp(g) * S + k * v
    o = sum[i](rope[i](q, t) * S)
  }
  m = mean[t in c](v)
  p = o + m[c = c(t) - 1]
  recurrence over c {
    state W[h, i, j]
    y = sum[i](q * W)
    W = 0.5 * W + sum[t](k * v)
  }
  output p, y
}
""",
}

SETTINGS: dict[str, dict[str, Any]] = {
    "reads": {"n": 4, "m": 7},
    "conds": {"n": 6},
    "losses": {"vocab": 7, "d_model": 8},
    "chunky": {"n": 3},
    "overs": {"heads": 2, "dk": 3, "dv": 4},
    "steps": {"n": 4, "k": 3},
    "fns": {"d_model": 4},
    "names": {},
    "numbers": {"n": 4, "k": 3},
    "s4": {"d_model": 4},
    "within": {"heads": 2, "dk": 4, "dv": 3},
}


def integers(low: int, high: int) -> Any:
    return lambda shape: torch.randint(low, high, shape)


def ids(shape: list[int]) -> Tensor:
    """Numbers that stay the same for a few tokens."""
    return (torch.rand(shape) < 0.3).cumsum(0)


VALUES = {"idx": integers(-2, 9), "j": integers(-1, 5), "tok": integers(0, 7), "id": ids,
          "m": lambda shape: torch.rand(shape) < 0.5}  # fmt: skip
