"""Ops with an attention, one for each thing that a logit, a value, a mask or a source may be."""

from __future__ import annotations

HEAD = """op attends(heads: int, dk: int, dv: int) {
  axes { t: time, s = t, h = heads, i = dk, j = dv, m = 3, o = 8 }
  input q[t, h, i], k[s, h, i], v[s, h, j]
"""
DOT = "logit = dot[i](q, k) * size(i)^-0.5\n value = v\n"


def op(source: str, before: str = "", axes: str = "[t, h, j]", head: str = HEAD) -> str:
    return f"{head}  {before}\n  attention y{axes} {source}\n  output y\n}}\n"


def masked(mask: str, before: str = "", **more: str) -> str:
    return op(f"over s {{\n {DOT} mask = {mask}\n}}", before, **more)


def scored(logit: str, before: str = "") -> str:
    return op(f"over s {{\n logit = {logit}\n value = v\n mask = s <= t\n}}", before)


def sunk(mask: str, value: str, before: str) -> str:
    """Rows that all have one value, beside a row without."""
    rows = DOT.replace("value = v", f"value = {value}")
    return op(f"{{\n over s {{\n {rows} mask = {mask}\n }}\n row {{ logit = 0 }}\n}}", before)


OPS = {
    "causal": masked("s <= t"),
    "full": op(f"over s {{\n {DOT}}}"),
    "window": masked("s <= t and (t - s < 9 or s < 2)"),
    "around": masked("t - s < 5 and s - t < 5"),
    "not": masked("not (s > t) and not (t - s >= 6)", axes="[h, j, t]"),
    "documents": masked("s <= t and doc[t = s] == doc", "input doc[t]: int"),
    "runs": masked("s <= t and c(s) == c(t)", "input doc[t]: int\n  chunk c of t = runs(doc)"),
    "prefix": masked("s <= t or pre[t = s]", "input pre[t]: bool"),
    "dilated": masked("s <= t and (t - s) % (h + 1) == 0"),
    "stripes": masked("s <= t and floor(t / 8) % 3 == floor(s / 8) % 3 and (t * s) % 5 != 1"),
    "diagonals": masked("s <= t and floor((t - s) / 8) % 4 == 0"),
    "nothing": masked("s < t and t - s < 0"),
    "alibi": scored("dot[i](q, k) - (t - s) * exp(-h)"),
    "softcap": scored("5 * tanh(dot[i](q, k) / 5)"),
    "head_bias": scored("dot[i](q, k) * size(i)^-0.5 + b * (t - s) / 8", "param b[h] = 0"),
    "offset_bias": scored("dot[i](q, k) + b[o = min(t - s, 7)]", "param b[h, o] = normal(1)"),
    "table_bias": scored("dot[i](q, k) + b[o = x][m = x[t = s] % 3]", "input x[t]: int\n  param b[o, m] = normal(1)"),
    "l1": scored("0 - sum[i](abs(q - k))"),
    "l2": scored("0 - sum[i]((q - k)^2)"),
    "additive": scored("sum[i](w * tanh(q + k))", "param w[h, i] = normal(1)"),
    "functions": scored(
        "gelu(a * b) + silu(a * b) + softplus(a - b) + log(1 + a^2 * b^2) + max(a, b) / (1 + abs(b)) + relu(a - b)"
        " + where(a > b, a * b, sigmoid(a + b)) + logsigmoid(a - b) + exp(min(a * b, 1))",
        "input a[t, h], b[s, h]",
    ),
    "row_logit": op("over s {\n logit = b\n value = v\n mask = s <= t and f\n}", "input b[s, h], f[s]: bool"),
    "whole_numbers": op("{\n over s {\n logit = h * s - t\n value = v\n mask = s <= t\n }\n"
                        " row {\n logit = h - 2\n value = t\n }\n}"),
    "numbers": op("{\n over s {\n logit = 0.25\n value = v\n mask = true and s <= t\n }\n"
                  " row {\n logit = 0\n value = 2\n }\n}"),
    "no_row_seen": op("over s {\n logit = -inf\n value = v\n mask = t >= 0\n}"),
    "of_params": sunk("s <= t", "w", "param w[h, j] = normal(1)"),
    "of_queries": sunk("s < t", "e", "input e[t, h, j]"),
    "log_distance": op("over s {\n logit = dot[i](q, k) - b * log(t - s) + b / (t - s)\n value = v\n mask = s < t\n}",
                       "param b[h] = normal(1)"),
    "emitted_names": op("over s {\n logit = dot[i](q, d_logit) + at * s / 9\n value = d_value\n mask = s <= t\n}",
                        "input at[t, h]",
                        head=HEAD.replace("k[s", "d_logit[s").replace("v[s", "d_value[s")),
    "off_by_one": op(f"{{\n over s {{\n {DOT} mask = s <= t\n }}\n row {{ logit = 0 }}\n}}"),
    "sink": op(f"{{\n over s {{\n {DOT} mask = s < t\n }}\n row {{ logit = b }}\n}}", "param b[h] = 0"),
    "places_alone": op("{\n over s {\n logit = sum[i](q) * s / 40\n mask = s < t - 3\n }\n"
                       f" over s {{\n {DOT} mask = s <= t\n }}\n}}"),
    "own_row": op(f"{{\n over s {{\n {DOT} mask = s < t\n }}\n row {{\n logit = sum[i](q)\n value = u\n }}\n}}",
                  "input u[t, h, j]"),
    "chunks": op(
        f"{{\n over s {{\n {DOT} mask = s <= t\n }}\n over c {{\n logit = dot[i](q, mean[t in c](k[s = t]))\n"
        " value = mean[t in c](v[s = t])\n mask = c < c(t)\n }\n}", "chunk c of t = fixed(5)"),
    "relative": op("over s {\n logit = dot[i](q, k)\n value = v + r[o = min(t - s, 7)]\n mask = s <= t\n}",
                   "param r[h, o, j] = normal(1)"),
    "summary": op(f"over s {{\n {DOT.replace('(q, k)', '(mean[t in c](q), k)')} mask = c(s) == c\n}}",
                  "chunk c of s = fixed(7)", "[c, h, j]"),
    "grouped": masked(
        "s <= t", head=HEAD.replace("h = heads", "h = heads, hk = 2 groups h").replace("[s, h,", "[s, hk,")
    ),
    "shared": masked("s <= t", head=HEAD.replace("[s, h,", "[s,")),
    "set": "op attends(heads: int, dk: int, dv: int) {\n axes { n: unordered, h = heads, i = dk, j = dv, m = 3 }\n"
           " input k[n, h, i], v[n, h, j]\n param q[m, h, i] = normal(1)\n"
           f" attention y[m, h, j] over n {{\n {DOT}}}\n output y\n}}\n",
}  # fmt: skip
CROSS = """op attends(heads: int, dk: int, dv: int) {
  axes { t: time, e: time, h = heads, i = dk, j = dv }
  input q[t, h, i], k[e, h, i], v[e, h, j]
  attention y[t, h, j] over e {
    logit = dot[i](q, k) * size(i)^-0.5
    value = v
  }
  output y
}
"""
