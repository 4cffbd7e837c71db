"""Rewritings of a recurrence that mean the same compile to the same structure, and compute the same values."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cases
import pytest
import torch
from emitted import Case, draw, state_shapes
from shipped import RECURRENCES
from torch import Tensor

from chunkc.driver import compile_source
from chunkc.dsl import tree as T
from chunkc.dsl.parser import parse, tokens
from chunkc.interp import Run, interpret
from chunkc.ir import nodes as N
from chunkc.ir.diagnostics import SourceFile
from chunkc.ir.graph import Unit

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = RECURRENCES
TEXTS = {**SHIPPED, **cases.OPS}
SETTINGS = {
    "d_model": 8, "heads": 2, "low": 3, "d_in": 5, "expand": 2, "head": 4, "kv": 2, "states": 3, "width": 4,
    "wide": 4, "dk": 3, "dv": 4, "scale": 0.3,
}  # fmt: skip
LENGTH = 5

GLA, LINEAR, MAMBA, XLSTM, RWKV = "gated_linear_attention", "linear_attention", "mamba2", "mlstm", "rwkv6"
REORDERED, SPLIT, EXPANDED, DIFFERENCE = "reordered", "split", "expanded", "as a difference"
BEFORE, HOISTED, JOINED = "read before the update", "defined outside", "another form"

# A spec, what is done to it, and pairs of old and new text; each old text stands there once.
REWRITES: list[tuple[str, str, list[tuple[str, str]]]] = [
    (
        GLA,
        REORDERED,
        [
            ("exp(g) * S + k * v", "v * k + S * exp(g)"),
            ("sum[i](q * S) * size(i)^-0.5", "size(i)^-0.5 * sum[i](S * q)"),
        ],
    ),
    (GLA, "scaled inside", [("sum[i](q * S) * size(i)^-0.5", "sum[i](size(i)^-0.5 * q * S)")]),
    (GLA, SPLIT, [("S = exp(g) * S + k * v", "a = exp(g)\n    kv = k * v\n    S = a * S + kv")]),
    (GLA, "split between", [("S = exp(g) * S + k * v", "old = exp(g) * S\n    S = old + k * v")]),
    (GLA, "split read", [("o = sum[i](q * S) *", "qs = q * S\n    read = sum[i](qs)\n    o = read *")]),
    (GLA, "split state", [("S = exp(g) * S + k * v", "S = exp(g) * S\n    S = S + k * v")]),
    (GLA, DIFFERENCE, [("exp(g) * S + k", "S - (1 - exp(g)) * S + k")]),
    (GLA, EXPANDED, [("exp(g) * S + k", "S - S + exp(g) * S + k")]),
    (GLA, HOISTED, [("recurrence", "a = exp(g)\n  recurrence"), ("exp(g) * S", "a * S")]),
    (GLA, "outer product defined outside", [("recurrence", "kv = k * v\n  recurrence"), ("+ k * v", "+ kv")]),
    (
        GLA,
        BEFORE,
        [
            ("S = exp(g) * S + k * v\n", ""),
            (
                "o = sum[i](q * S) * size(i)^-0.5",
                "o = (sum[i](q * exp(g) * S) + v * sum[i](k * q)) * size(i)^-0.5\n    S = exp(g) * S + k * v",
            ),
        ],
    ),
    (
        "gru",
        REORDERED,
        [
            ("z * h + (1 - z) * n", "n * (1 - z) + h * z"),
            ("r * linear[e -> e](h, bias = true)", "linear[e -> e](h, bias = true) * r"),
        ],
    ),
    ("gru", EXPANDED, [("(1 - z) * n", "n - z * n")]),
    ("gru", DIFFERENCE, [("z * h + (1", "h - (1 - z) * h + (1")]),
    ("gru", JOINED, [("z * h + (1 - z) * n", "n + z * (h - n)")]),
    ("gru", SPLIT, [("h = z * h +", "kept = z * h\n    h = kept +")]),
    (
        "hgrn",
        REORDERED,
        [("f * h + (1 - f) * u", "u * (1 - f) + h * f"), ("+ (1 - sigmoid(low)) * f0", "+ f0 * (1 - sigmoid(low))")],
    ),
    ("hgrn", EXPANDED, [("(1 - f) * u", "u - f * u"), ("(1 - sigmoid(low)) * f0", "f0 - sigmoid(low) * f0")]),
    ("hgrn", DIFFERENCE, [("f * h + (1", "h - (1 - f) * h + (1")]),
    ("hgrn", JOINED, [("f * h + (1 - f) * u", "u + f * (h - u)")]),
    ("hgrn", SPLIT, [("h = f * h + (1 - f) * u", "new = 1 - f\n    given = new * u\n    h = f * h + given")]),
    (
        "hgrn",
        "defined inside",
        [
            ("  f = sigmoid(low) + (1 - sigmoid(low)) * f0\n", ""),
            ("    h = f", "    f = sigmoid(low) + (1 - sigmoid(low)) * f0\n    h = f"),
        ],
    ),
    (
        LINEAR,
        REORDERED,
        [
            ("S = S + k * v", "S = v * k + S"),
            ("z = z + k", "z = k + z"),
            ("sum[i](q * S) / sum[i](q * z)", "sum[i](S * q) / sum[i](z * q)"),
        ],
    ),
    (LINEAR, "statements swapped", [("S = S + k * v\n    z = z + k", "z = z + k\n    S = S + k * v")]),
    (LINEAR, "divided inside", [("sum[i](q * S) / sum[i](q * z)", "sum[i](q * S / sum[i](q * z))")]),
    (
        LINEAR,
        SPLIT,
        [
            (
                "o = sum[i](q * S) / sum[i](q * z)",
                "above = sum[i](q * S)\n    below = sum[i](q * z)\n    o = above / below",
            )
        ],
    ),
    (LINEAR, EXPANDED, [("S = S + k * v", "S = 2 * S - S + k * v"), ("z = z + k", "z = 3 * z + k - 2 * z")]),
    (LINEAR, DIFFERENCE, [("S = S + k * v", "S = S - (1 - 1) * S + k * v")]),
    (
        LINEAR,
        BEFORE,
        [
            ("    S = S + k * v\n    z = z + k\n", ""),
            (
                "o = sum[i](q * S) / sum[i](q * z)",
                "o = (sum[i](q * S) + sum[i](q * k) * v) / (sum[i](q * z) + sum[i](q * k))\n"
                "    S = S + k * v\n    z = z + k",
            ),
        ],
    ),
    (
        MAMBA,
        REORDERED,
        [
            ("exp(-exp(a0) * dt) * S + dt * b * u", "u * (b * dt) + S * exp(-(dt * exp(a0)))"),
            ("sum[n](c * S) + skip * u", "u * skip + sum[n](S * c)"),
        ],
    ),
    (
        MAMBA,
        SPLIT,
        [
            (
                "S = exp(-exp(a0) * dt) * S + dt * b * u",
                "decay = exp(-exp(a0) * dt)\n    db = dt * b\n    S = decay * S + db * u",
            )
        ],
    ),
    (MAMBA, DIFFERENCE, [("S = exp(-exp(a0) * dt) * S", "S = S - (1 - exp(-exp(a0) * dt)) * S")]),
    (
        MAMBA,
        HOISTED,
        [
            ("  recurrence", "  decay = exp(-exp(a0) * dt)\n  recurrence"),
            ("S = exp(-exp(a0) * dt) * S", "S = decay * S"),
        ],
    ),
    (
        MAMBA,
        BEFORE,
        [
            ("    S = exp(-exp(a0) * dt) * S + dt * b * u\n", ""),
            (
                "o = sum[n](c * S) + skip * u",
                "o = exp(-exp(a0) * dt) * sum[n](c * S) + u * dt * sum[n](c * b) + u * skip\n"
                "    S = exp(-exp(a0) * dt) * S + dt * b * u",
            ),
        ],
    ),
    ("mingru", REORDERED, [("(1 - z) * h + z * u", "u * z + h * (1 - z)")]),
    ("mingru", EXPANDED, [("(1 - z) * h + z * u", "h - z * h + z * u")]),
    ("mingru", JOINED, [("(1 - z) * h + z * u", "h + z * (u - h)")]),
    ("mingru", DIFFERENCE, [("(1 - z) * h +", "h - (1 - (1 - z)) * h +")]),
    ("mingru", SPLIT, [("h = (1 - z) * h", "kept = 1 - z\n    h = kept * h")]),
    (
        XLSTM,
        REORDERED,
        [
            ("max(f + m, g)", "max(g, m + f)"),
            ("C = exp(f + m - a) * C + exp(g - a) * k * v", "C = v * (exp(g - a) * k) + C * exp(m - a + f)"),
            ("n = exp(f + m - a) * n + exp(g - a) * k", "n = k * exp(-a + g) + n * exp(-a + m + f)"),
            ("sum[i](q * C) / max(abs(sum[i](q * n)), exp(-m))", "sum[i](C * q) / max(exp(-m), abs(sum[i](n * q)))"),
        ],
    ),
    (
        XLSTM,
        SPLIT,
        [
            (
                "C = exp(f + m - a) * C + exp(g - a) *",
                "kept = exp(f + m - a)\n    gain = exp(g - a)\n    C = kept * C + gain *",
            ),
            ("n = exp(f + m - a) * n + exp(g - a) *", "n = kept * n + gain *"),
        ],
    ),
    (
        XLSTM,
        "split maximum",
        [("a = stop(max(f + m, g))", "kept = f + m\n    larger = max(kept, g)\n    a = stop(larger)")],
    ),
    (
        XLSTM,
        DIFFERENCE,
        [
            ("C = exp(f + m - a) * C", "C = C - (1 - exp(f + m - a)) * C"),
            ("n = exp(f + m - a) * n", "n = n - (1 - exp(f + m - a)) * n"),
        ],
    ),
    (
        XLSTM,
        "product of exponentials",
        [
            ("C = exp(f + m - a) * C", "C = exp(f) * exp(m - a) * C"),
            ("n = exp(f + m - a) * n", "n = exp(m) * n * exp(f - a)"),
        ],
    ),
    ("retention", REORDERED, [("gamma * S + k * v", "v * k + S * gamma")]),
    ("retention", DIFFERENCE, [("gamma * S", "S - (1 - gamma) * S")]),
    ("retention", EXPANDED, [("gamma * S", "S - S * exp(-(5 + h) * log(2))")]),
    (
        "retention",
        "defined inside",
        [
            ("  gamma = 1 - exp(-(5 + h) * log(2))\n", ""),
            ("    S = gamma", "    gamma = 1 - exp(-(5 + h) * log(2))\n    S = gamma"),
        ],
    ),
    ("retention", SPLIT, [("S = gamma * S + k * v", "old = gamma * S\n    new = k * v\n    S = old + new")]),
    (
        "retention",
        BEFORE,
        [
            (
                "    S = gamma * S + k * v\n    o = sum[i](q * S)",
                "    o = gamma * sum[i](q * S) + sum[i](q * k) * v\n    S = gamma * S + k * v",
            )
        ],
    ),
    (RWKV, REORDERED, [("q * (S + u * k * v)", "(v * k * u + S) * q"), ("exp(w) * S + k * v", "v * k + S * exp(w)")]),
    (RWKV, EXPANDED, [("q * (S + u * k * v)", "q * S + q * u * k * v")]),
    (RWKV, "two sums", [("sum[i](q * (S + u * k * v))", "sum[i](q * S) + sum[i](q * u * k) * v")]),
    (
        RWKV,
        SPLIT,
        [
            ("o = sum[i](q * (S + u * k * v))", "kv = k * v\n    o = sum[i](q * (S + u * kv))"),
            ("exp(w) * S + k * v", "exp(w) * S + kv"),
        ],
    ),
    (RWKV, DIFFERENCE, [("exp(w) * S", "S - (1 - exp(w)) * S")]),
    (RWKV, HOISTED, [("  recurrence", "  decay = exp(w)\n  recurrence"), ("exp(w) * S", "decay * S")]),
]


def rewritten(text: str, changes: list[tuple[str, str]]) -> str:
    for old, new in changes:
        assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times"
        text = text.replace(old, new)
    return text


# -- renaming ----------------------------------------------------------------------------------------------------------


def declared(text: str) -> set[str]:
    """The names of axes, tensors and states that a text declares."""
    found: set[str] = set()

    def visit(statement: object) -> None:
        if isinstance(statement, T.Axes):
            found.update(a.name.text for a in statement.axes)
        elif isinstance(statement, T.Declare):
            found.update(b.name.text for b in statement.binds)
        elif isinstance(statement, T.Define):
            found.add(statement.name.text)
        elif isinstance(statement, T.Recurrence):
            for s in statement.body:
                visit(s)

    for item in parse(SourceFile("case.spec", text)).items:
        assert isinstance(item, T.UnitDecl)
        for s in item.body:
            visit(s)
    return found


def renamed(text: str, names: Mapping[str, str]) -> str:
    """The text with names replaced, but for the keywords of calls (`linear(x, bias = true)`)."""
    stream = tokens(SourceFile("case.spec", text))
    out, at = "", 0
    open_: list[str] = []
    for k, token in enumerate(stream):
        if token.type in ("LPAR", "LSQB", "LBRACE"):
            open_.append(token.type)
        elif token.type in ("RPAR", "RSQB", "RBRACE"):
            open_.pop()
        keyword = open_[-1:] == ["LPAR"] and k + 1 < len(stream) and stream[k + 1].type == "EQUAL"
        if token.type == "NAME" and token in names and not keyword:
            assert token.start_pos is not None and token.end_pos is not None
            out += text[at : token.start_pos] + names[token]
            at = token.end_pos
    return out + text[at:]


def fresh_names(text: str, backwards: bool) -> dict[str, str]:
    """A new name for each; backwards: their alphabetical order turns around, else they come as they do."""
    names = sorted(declared(text))
    return {n: f"w{len(names) - k if backwards else k:02d}" for k, n in enumerate(names)}


# -- comparing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Values:
    """What a unit is run on, and what came out: outputs and final states by name."""

    tensors: dict[str, Tensor]
    initial: dict[str, Tensor]
    outputs: dict[str, Tensor]
    finals: dict[str, Tensor]


@cache
def compiled(text: str) -> tuple[Unit, Unit]:
    """The semantic and the normal unit of a text."""
    both = compile_source(SourceFile("case.spec", text))
    return both.checked.module.units[0], both.units[0]


@cache
def original(name: str) -> Values:
    """Values of an unchanged text, by the interpreter on its semantic graph."""
    semantic, _ = compiled(TEXTS[name])
    case = Case(SETTINGS, [LENGTH], dtype=torch.float64)
    inputs, weights = draw(semantic, case)
    torch.manual_seed(1)
    initial = {n: torch.randn(s, dtype=torch.float64) for n, s in state_shapes(semantic, case).items()}
    tensors = {**inputs, **weights}
    return Values(tensors, initial, *run(semantic, tensors, initial))


def run(
    unit: Unit, tensors: Mapping[str, Tensor], initial: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    doubles = {n: x.double() if x.is_floating_point() else x for n, x in tensors.items()}
    return interpret(unit, Run(SETTINGS, doubles, {a.space: LENGTH for a in unit.graph.axes}, initial))


def structure(unit: Unit) -> Counter[tuple[object, ...]]:
    """What the recurrences of a unit became, without names."""
    found: Counter[tuple[object, ...]] = Counter()
    for node in unit.graph.of_kind(N.Scan, N.Recur):
        if isinstance(node, N.Recur):
            found["sequential", len(node.carried)] += 1
            continue
        gates = Counter((g.log, _sides(unit, node, g.arg)) for g in node.gates)
        queries = Counter(q.side for q in node.queries)
        found[
            "scan", node.algebra, len(node.batch), len(node.i), len(node.j), frozenset(gates.items()),
            len(node.writes), frozenset(queries.items()), node.stop,
        ] += 1  # fmt: skip
    return found


def _sides(unit: Unit, node: N.Scan, id_: str) -> str:
    axes = set(unit.graph[id_].axes)
    return "".join(side for side, own in (("i", node.i), ("j", node.j)) if axes & set(own))


def compare(name: str, text: str, names: Mapping[str, str]) -> None:
    """The rewritten text against the original: structure, outputs and final states."""
    want = original(name)
    _, unit = compiled(text)

    def new(dotted: str) -> str:
        head, *rest = dotted.split(".")
        return ".".join([names.get(head, head), *rest])

    assert structure(unit) == structure(compiled(TEXTS[name])[1])
    outputs, finals = run(
        unit, {new(n): x for n, x in want.tensors.items()}, {new(n): x for n, x in want.initial.items()}
    )
    for old, got in ((want.outputs, outputs), (want.finals, finals)):
        assert {new(n) for n in old} == set(got)
        for n, x in old.items():
            torch.testing.assert_close(got[new(n)], x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", TEXTS)
def test_the_original_computes_the_same(name: str) -> None:
    compare(name, TEXTS[name], {})


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("backwards", [False, True], ids=["in order", "backwards"])
def test_names_mean_nothing(name: str, backwards: bool) -> None:
    names = fresh_names(TEXTS[name], backwards)
    text = renamed(TEXTS[name], names)
    assert not declared(text) & set(names)
    compare(name, text, names)


@pytest.mark.parametrize("name, changes", [(n, c) for n, _, c in REWRITES], ids=[f"{n}: {t}" for n, t, _ in REWRITES])
def test_rewritings(name: str, changes: list[tuple[str, str]]) -> None:
    text = rewritten(SHIPPED[name], changes)
    compare(name, text, {})
    names = fresh_names(text, backwards=True)
    compare(name, renamed(text, names), names)


def test_every_shipped_recurrence_is_rewritten() -> None:
    assert {n for n, _, _ in REWRITES} == set(SHIPPED)


SYSTEMS = re.compile(
    r"mamba|rwkv|hgrn|m_?lstm|s_?lstm|xlstm|retention|retnet|mingru|delta_?net|gated_linear|griffin|hawk", re.I
)


def test_no_file_of_the_compiler_names_a_system() -> None:
    """But for the list of other libraries' functions that `chunkc bench` calls: which of them applies is found by
    running their definitions (`tests/test_bench.py`)."""
    found = []
    for folder in ("compiler", "backends", "ir", "dsl"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path == ROOT / "compiler" / "bench" / "peers.py":
                continue
            if path.is_file() and path.suffix in (".py", ".lark", ".md", ".txt", ".json", ".toml"):
                found += [f"{path.name}: {m[0]}" for m in SYSTEMS.finditer(path.read_text())]
    assert not found
