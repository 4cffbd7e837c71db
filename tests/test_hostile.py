"""No text, however broken or hostile, gives anything but units or diagnostics, and none takes long."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from emitted import Case, call, draw, emit, reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_specs import Writer

from chunkc.driver import check_source
from chunkc.dsl.format import format_source
from chunkc.dsl.tables import grammar
from chunkc.ir.diagnostics import MAX_BYTES, CompileError, Diagnostic, SourceFile, render_json, render_text

SPECS = [
    p.read_text(encoding="utf-8") for p in sorted((Path(__file__).resolve().parent.parent / "specs").glob("*.spec"))
]
SECONDS = 10.0  # that one text may take
OPERATORS = ["+", "-", "*", "/", "%", "^", "<", "==", "and", "or", "in"]

OPEN = {"n": 4, "f": 0.5, "steps": 3}
VALUES = {"idx": lambda shape: torch.randint(-1, 6, shape), "m": lambda shape: torch.rand(shape) < 0.5,
          "lo": lambda shape: -torch.rand(shape), "un": torch.rand}  # fmt: skip

WORDS = sorted({t.pattern.value for t in grammar().terminals if t.pattern.type == "str"})
PIECES = [*WORDS, "x", "t", "S", "h", "_", "0", "1", "4", "0.5", "1e9", "1e400", "9" * 400, "time", "linear", "sum",
          "exp", "min", "where", "conv", "size", "uniform", "inf", "true", "softmax", "rope", '"doc"', "# note\n", "\n",
          "\n\n", "\t", "\r", "<=", "==", "->", "@", "\0", "é", "\u2028", "\ud800"]  # fmt: skip


def given_up_to(count: int) -> settings:
    """The same examples in every run, so many of them."""
    return settings(
        max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )


def survives(text: str, seconds: float = SECONDS) -> tuple[Diagnostic, ...]:
    """What checking the text finds: all of it inside the text, and fit to be shown."""
    source = SourceFile("hostile.spec", text)
    start = time.perf_counter()
    try:
        found = check_source(source).warnings
    except CompileError as failure:
        found = failure.diagnostics
        assert found
    assert time.perf_counter() - start < seconds
    sources = {source.name: source}
    for d in found:
        for span in (d.span, *(s for s, _ in d.related)):
            assert span.file == source.name and 0 <= span.start <= span.end <= len(text), d
        assert d.code in render_text(d, sources) and d.code in render_text(d, sources, color=True)
        assert len(d.message) < 1000 and d.message.isprintable(), d
    assert len(json.loads(render_json(found, sources))) == len(found)
    return found


def formats(text: str) -> None:
    """Whatever parses can be laid out, the same the second time; the formatter proves the rest itself."""
    try:
        result = format_source(SourceFile("hostile.spec", text))
    except CompileError:
        return
    assert format_source(SourceFile("hostile.spec", result)) == result


def layer(body: str, before: str = "") -> str:
    """A layer around statements."""
    head = "layer A(n: int = 8) {\naxes { t: time, s = t, e = n, i = 4 }\ninput x[t, e]\n"
    return f"{before}{head}{body}\n}}\n"


# -- random texts ----------------------------------------------------------------------------------------------------


@given_up_to(100)
@given(st.text(max_size=200))
def test_any_text(text: str) -> None:
    survives(text)
    formats(text)


@given_up_to(100)
@given(st.lists(st.sampled_from(PIECES), max_size=60), st.sampled_from(["", " "]))
def test_token_soup(pieces: list[str], between: str) -> None:
    text = between.join(pieces)
    survives(text)
    survives(layer(text))
    formats(text)


def expressions() -> st.SearchStrategy[str]:
    """Expressions that parse, of names that often exist."""
    leaves = st.sampled_from(["x", "S", "e", "t", "n", "w", "q", "0", "2", "1e308", "inf", "true", "pi", "exp"])
    ix = st.sampled_from(
        ["t", "s", "e", "i", "t, e", "t = t - 1", "t = t + n", "e = 1", "i = x", "e -> i", "e if e < 2", "q"]
    )
    calls = st.sampled_from(["exp", "log", "min", "where", "linear", "f", "size", "S", "uniform", "stop", "rope"])
    along = st.sampled_from(["sum", "softmax", "conv", "count", "linear", "f", "norm", "dot", "exp", "x"])

    def more(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        return st.one_of(
            st.builds("({} {} {})".format, inner, st.sampled_from(OPERATORS), inner),
            st.builds("{} {}".format, st.sampled_from(["-", "not"]), inner).map("({})".format),
            st.builds("{}({})".format, calls, st.lists(inner, max_size=3).map(", ".join)),
            st.builds("{}[{}]({})".format, along, ix, st.lists(inner, max_size=2).map(", ".join)),
            st.builds("{}[{}]".format, inner, ix),
            st.builds("linear({}, rank = {}, bias = {})".format, inner, inner, leaves),
        )

    return st.recursive(leaves, more, max_leaves=8)


def statements() -> st.SearchStrategy[str]:
    """Statements that parse."""
    e = expressions()
    names = st.sampled_from(["y", "z", "S", "q", "w", "x", "e"])
    axes = st.sampled_from(["", "[t, e]", "[t]", "[e]", "[s, i]", "[t, i, e]", "[z]", "[e, e]"])
    bind = st.builds("{}{}{} = {}".format, names, axes, st.sampled_from(["", ": int", " in [0, 1]", " in [2, 1]"]), e)
    simple = st.one_of(
        st.builds("{}{} = {}".format, names, axes, e),
        st.builds("{} {}".format, st.sampled_from(["param", "input", "output", "state"]), bind),
        st.builds("axes {{ {} = {} }}".format, names, e),
        st.builds("output {}".format, names),
    )
    loops = st.lists(simple, max_size=4).map("\n".join)
    return st.one_of(simple, st.builds("recurrence over {} {{\nstate S{}\n{}\n}}".format, st.just("t"), axes, loops))


@given_up_to(90)
@given(st.lists(statements(), min_size=1, max_size=5), expressions())
def test_specs_that_parse(parts: list[str], inner: str) -> None:
    text = layer("\n".join(parts) + "\noutput y", f"fn f[a](x, q = 2) = {inner}\n")
    found = survives(text)
    assert not [d for d in found if d.code == "syntax"]
    formats(text)


@given_up_to(100)
@given(st.sampled_from(SPECS), st.data())
def test_any_edit_of_a_spec(spec: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(spec)))
    end = data.draw(st.integers(start, min(start + 40, len(spec))))
    survives(spec[:start] + data.draw(st.text(max_size=5)) + spec[end:])


@pytest.mark.parametrize("seed", range(9))
def test_mutated_tokens(seed: int) -> None:
    """Tokens of the shipped specs dropped, doubled, swapped or replaced by another of the same text."""
    rng = random.Random(seed)
    spec = SPECS[seed % len(SPECS)]
    for _ in range(18):
        parts = re.findall(r"\w+|\s+|#.*|[^\w\s]", spec)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(parts))
            other = rng.choice([rng.choice(parts), rng.choice(PIECES), "", parts[at] * 2])
            parts[at] = other
        text = "".join(parts)
        survives(text)
        formats(text)


@pytest.mark.parametrize("index", range(len(SPECS)))
def test_lost_lines_and_ends(index: int) -> None:
    lines = SPECS[index].split("\n")
    for at in range(len(lines)):
        survives("\n".join(lines[:at] + lines[at + 1 :]))
        survives("\n".join(lines[:at]))


def test_what_checks_builds_and_runs(tmp_path: Path) -> None:
    """Specs of every construct: no error but diagnostics, and what the emitted code gives is what is meant."""
    built = 0
    for seed in range(100):
        text = Writer(seed).spec()
        if any(d.severity == "error" for d in survives(text)):
            continue
        module, units, _ = emit(text, tmp_path)
        unit, built = units[-1], built + 1
        for case in (Case(OPEN, [5], dtype=torch.float64, values=VALUES),
                     Case(OPEN, [0, 4, 1], packed=True, dtype=torch.float64, values=VALUES)):  # fmt: skip
            inputs, weights = draw(unit, case)
            wanted, states = reference(unit, case, inputs, weights, {})
            if unit.kind == "layer" and not hasattr(module.A, "init_state"):
                states = {}  # it runs over whole sequences
            with torch.no_grad():
                got, last = call(module, unit, case, inputs, weights, {})
            for name, x in [*wanted.items(), *states.items()]:
                y = got[name] if name in got else last[name]
                y = y.expand(x.shape) if y.shape == x.shape[1:] else y
                torch.testing.assert_close(y, x.to(y.dtype), rtol=1e-8, atol=1e-8, msg=f"{name} of\n{text}")
    assert built > 90


# -- texts made to hurt ----------------------------------------------------------------------------------------------


def chain(first: str, step: str, count: int) -> str:
    """Definitions that each use the one before."""
    return "\n".join([f"a0 = {first}", *(f"a{k + 1} = " + step.replace("A", f"a{k}") for k in range(count))])


def doubling(count: int) -> str:
    return (
        "".join(f"fn f{k}[a](x) = f{k + 1}[a](x) + f{k + 1}[a](x)\n" for k in range(count)) + f"fn f{count}[a](x) = x\n"
    )


def filled(piece: Callable[[int], str], around: Callable[[str], str] = str) -> str:
    """1 MiB of pieces."""
    parts, size, k = [], len(around("")), 0
    while size + len(part := piece(k)) <= MAX_BYTES:
        parts.append(part)
        size += len(part)
        k += 1
    return around("".join(parts))


HURTFUL = {
    "nothing": "",
    "many calls of a layer": layer(chain("A0(x)", "A0(A)", 2500) + "\noutput y = a2500",
                                   layer("w[t, e] = linear(x)\noutput w").replace("A(", "A0(")),
    "calls that double": "".join(layer(f"a = A{k}(x)\noutput y = a + A{k}(a)").replace("A(n", f"A{k + 1}(n")
                                 if k >= 0 else layer("output y = exp(x)").replace("A(n", "A0(n")
                                 for k in range(-1, 30)),
    "NUL bytes": "\0" * 1000,
    "a NUL byte in a name": layer("y\0 = x\noutput y"),
    "a byte order mark": "\ufeff" + SPECS[0],
    "a lone surrogate": layer("output y = x # \ud800\nz = \udfff"),
    "other line ends": SPECS[0].replace("\n", "\u2028"),
    "carriage returns alone": SPECS[0].replace("\n", "\r"),
    "a tower of powers": layer("output y = x * 9^9^9^9"),
    "a tower as a size": layer("axes { q = 9^9^9 }\noutput y = x"),
    "a tower of a parameter": layer("axes { q = n^n^n^n^n }\noutput y = x * size(q)"),
    "a size of 10^400": layer("axes { q = 1" + "0" * 400 + " }\noutput y = x"),
    "a power 10^400": layer("axes { q = 10^400 }\noutput y = x * 10^400"),
    "a number of 100000 digits": layer("output y = x * " + "9" * 100_000),
    "a number of 5000 zeros": layer("output y = x[e = " + "0" * 5000 + "]"),
    "an exponent of 5000 digits": layer("output y = x * 1e" + "9" * 5000),
    "no number": layer("output y = x * (inf - inf) + uniform(0, 1 % 0)"),
    "a shift by infinity": layer("output y = x[t = t - inf] + x[t = t - 2^1000] + x[e = inf]"),
    "squares of squares": layer(chain("2", "A * A", 100) + "\noutput y = x * a100"),
    "squares of a parameter": layer(chain("n", "A * A", 100) + "\noutput y = x * a100"),
    "a long sum by definitions": layer(chain("n", "A + 1", 2000) + "\noutput y = x * a2000"),
    "a long sum of tensors": layer(chain("x", "A + x", 1500) + "\noutput y = a1500"),
    "axes by axes": layer("axes { b0 = n\n" + "".join(f"b{k + 1} = size(b{k}) * size(b{k})\n" for k in range(60))
                          + "}"),
    "parentheses": layer("output y = " + "(" * 5000 + "x" + ")" * 5000),
    "brackets": "[" * 100_000,
    "braces": "layer A {" * 10_000,
    "closing brackets": "}" * 50_000,
    "calls in calls": layer("output y = " + "exp(" * 195 + "x" + ")" * 195),
    "reads in reads": layer("output y = " + "x[e = " * 195 + "1" + "]" * 195),
    "signs": layer("output y = " + "-" * 199 + "x"),
    "too many signs": layer("output y = " + "-" * 5000 + "x"),
    "negations": layer("output y = where(" + "not " * 5000 + "x, 1, 0)"),
    "terms": layer("output y = x" + " + x" * 195),
    "too many terms": layer("output y = x" + " + x" * 20_000),
    "powers to the right": layer("output y = x" + "^2" * 150),
    "doubling functions": layer("output y = f0[t](x)", doubling(15)),
    "functions in functions": layer(
        "output y = f0[e](x)",
        "".join(f"fn f{k}[a](x) = {'exp(' * 150}f{k + 1}[a](x){')' * 150}\n" for k in range(12)) + "fn f12[a](x) = x\n",
    ),
    "functions in a ring": layer("output y = f[e](x)", "fn f[a](x) = g[a](x)\nfn g[a](x) = f[a](x)\n"),
    "an axis that takes a hidden name": layer("axes { y_rank = 2, z_taps = 3 }\ny[t, e] = linear(x, rank = 4)\n"
                                              "z = conv[t](x, 4)\noutput z, y"),
    "many names": filled(lambda k: f"n{k} = x\n", layer),
    "many unknown names": filled(lambda k: f"n{k} = z{k}\n", layer),
    "many axes": layer("axes { " + ", ".join(f"q{k} = t" for k in range(9000)) + " }\n"
                       + "\n".join(f"r{k}[q{k}] = x" for k in range(3000))),
    "many params": layer("axes { " + ", ".join(f"q{k} = 2" for k in range(500)) + " }\n"
                         + "\n".join(f"param r{k}[q1] = 1" for k in range(3000))),
    "many axes of a tensor": layer("r[" + "e, " * 40_000 + "e] = x"),
    "many recurrences": layer("recurrence over t {\nstate S\n}\n" * 3000 + "output y = x"),
    "many layers and functions": "fn f[a](x) = x\n" * 3000 + "layer A { output x }\n" * 3000,
    "many mistakes": filled(lambda k: "+\n"),
    "many mistakes in lines": filled(lambda k: f"y{k} = = x # {'x' * 500}\n", layer),
    "one line": filled(lambda k: "+ "),
    "one name": "a" * MAX_BYTES,
    "one string": '"' + "a" * (MAX_BYTES - 1),
    "one comment": "#" * MAX_BYTES,
    "blanks": " " * MAX_BYTES,
    "newlines": "\n" * MAX_BYTES,
    "comments": "#\n" * (MAX_BYTES // 2),
    "docs": filled(lambda k: '"d"\n', layer),
    "a byte too much": " " * (MAX_BYTES + 1),
    "two bytes a letter": "é" * (MAX_BYTES // 2 + 1),
}  # fmt: skip


@pytest.mark.parametrize("name", HURTFUL)
def test_made_to_hurt(name: str) -> None:
    survives(HURTFUL[name])


@pytest.mark.parametrize("spec", [s for s in SPECS if not s.startswith("use ")])
def test_other_line_ends_change_nothing(spec: str) -> None:
    text = spec.replace("\n", "\r\n")
    assert not survives(text)
    assert format_source(SourceFile("crlf.spec", text)) == spec


def test_an_error_behind_a_carriage_return() -> None:
    (found,) = survives(layer("y = x + missing\noutput x").replace("\n", "\r\n"))
    assert found.code == "unknown-name" and found.span.end - found.span.start == len("missing")
