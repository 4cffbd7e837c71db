"""Broken specs: each gives exactly the errors it should, on exactly the text between « and »."""

from __future__ import annotations

import re

import pytest

from chunkc.driver import check_source, compile_source
from chunkc.ir import nodes as N
from chunkc.ir.diagnostics import CompileError, SourceFile, render_json, render_text


def body(text: str) -> str:
    """A layer around statements: x[t, e], two names for time, and a few fixed axes."""
    lines = [line.strip() for line in text.strip().splitlines()]
    head = ["layer A(n: int = 8, wide: bool = true) {", "axes { t: time, s = t, e = n, h = 4, i = 2, g = 2 groups h }",
            "input x[t, e], c[t]: int", "k[t, h, i] = linear(x)"]  # fmt: skip
    return "\n".join([*head, *lines, "}"])


def plain(head: str) -> str:
    """The shortest layer, under this head."""
    return head + " {\n  axes { t: time }\n  input x[t]\n  output x\n}"


def steps(text: str) -> str:
    """A recurrence around statements."""
    return body("recurrence over t {\nstate S[h, i]\n" + text + "\n}\noutput y = x")


SYNTAX = [
    ("a character of no token", body("output y = x «@» x"), "bad-character"),
    ("an unclosed string", body('«"»doc\noutput y = x'), "bad-character"),
    ("a NUL byte", body("output y = x«\0»"), "bad-character"),
    ("a letter outside ASCII", body("«é» = x\noutput y = x"), "bad-character"),
    ("an ampersand", body("output y = x > 0 «&» x < 1"), "bad-character"),
    ("an operator without an operand", body("output y = x + «*» x"), "syntax"),
    ("a statement that breaks off", body("output x\ny = x «+»"), "syntax"),
    ("an unclosed parenthesis", body("y = «(»x + x\noutput x"), "syntax"),
    ("a closing parenthesis too many", body("y = x + x«)»\noutput x"), "syntax"),
    ("a file that ends inside a layer", "layer A {\n  axes { t: time }\n  input x[t]«»\n", "syntax"),
    ("two statements on a line", body("y = x «z» = x\noutput y"), "syntax"),
    ("a statement outside any layer", "«x» = 1\nlayer A {\n axes { t: time }\n input x[t]\n output x\n}", "syntax"),
    ("a keyword as a name", body("«state» = x\noutput x"), "reserved-word"),
    ("a keyword as a tensor", body("«input»[t] = x\noutput x"), "reserved-word"),
    ("an operator at the end", body("y = x «+»\noutput x"), "syntax"),
    ("an unclosed bracket", body("output y = sum«[»e(x)"), "syntax"),
    ("a keyword among axes", body("axes { «over» = 3 }\noutput x"), "reserved-word"),
    ("a keyword as a value", body("output y = x * «chunk»"), "reserved-word"),
    ("a word kept for later", body("«cache» = x\noutput x"), "reserved-word"),
    ("a name with an underscore in front", body("«_y» = x\noutput x"), "bad-name"),
    ("an axis without a size", body("axes { q «}»\noutput x"), "syntax"),
    ("empty brackets", body("output y = sum[«]»(x)"), "syntax"),
    ("a call without its end", body("output y = exp«(»"), "syntax"),
    ("a number with a letter", body("output y = 2«x»"), "syntax"),
    ("a function without axes", "fn f«(»x) = x\n" + plain("layer A"), "syntax"),
    ("two errors", body("y = x * «*» x\nz = «)» x\noutput x"), "syntax syntax"),
    ("brackets 201 levels deep", body("output y = " + "(" * 199 + "«(»" + "x" + ")" * 200), "too-large"),
    ("operators 201 levels deep", body("output y = «x»" + " + x" * 201), "too-large"),
    ("a number over all floats", body("output y = x * «1e999»"), "too-large"),
]

NAMES = [
    ("a refused name that is used", body("«sum» = x * 2\noutput sum"), "name-taken"),
    ("a layer that calls itself", body("output y = «A»(x, c)"), "recursive"),
    ("an unknown name", body("output y = x + «xx»"), "unknown-name"),
    ("an unknown function", body("output y = «sigmoids»(x)"), "unknown-name"),
    ("an unknown axis", body("output y[t, «b»] = x"), "unknown-name"),
    ("an unknown output", body("output «y»"), "unknown-name"),
    ("a name used before its definition", body("y = «z»\nz = x\noutput x"), "unknown-name"),
    ("two unknown names", body("output y = «p» + «q»"), "unknown-name unknown-name"),
    ("a definition twice", body("y = x\n«y» = x\noutput y"), "name-taken"),
    ("an axis and a tensor", body("«h» = x\noutput x"), "name-taken"),
    ("a parameter and a tensor", body("«n» = x\noutput x"), "name-taken"),
    ("a function of the language", body("«exp» = x\noutput x"), "name-taken"),
    ("a constant of the language", body("«pi» = x\noutput x"), "name-taken"),
    ("an output twice", body("output y = x\noutput «y»"), "name-taken"),
    ("a layer twice", body("output x") + "\n" + plain("layer «A»"), "name-taken"),
    ("a parameter twice", plain("layer A(n: int, «n»: int)"), "name-taken"),
    ("a function as a value", body("output y = «exp» + x"), "not-a-value"),
    ("a reducer without its argument", body("output y = «sum[e]»"), "not-a-value"),
    ("an output that is an axis", body("output «h»"), "bad-output"),
    ("a file without layers", "«»# nothing\n", "empty"),
    ("a layer without output", body("y = x").replace("layer A", "layer «A»"), "no-output"),
]

AXES = [
    ("a tensor in place of an axis", body("output y = sum[«x»](x)"), "not-an-axis"),
    ("a tensor in place of a declared axis", body("output y[t, «k»] = x"), "not-an-axis"),
    ("size of a tensor", body("output y = x * size(«x»)"), "not-an-axis"),
    ("size of a number", body("output y = x * size(«3»)"), "not-an-axis"),
    ("a reducer over an axis that is not there", body("output y = sum[«h»](x)"), "no-axis"),
    ("a normaliser over an axis that is not there", body("output y = softmax[«i»](x)"), "no-axis"),
    ("an axis of another name for time", body("output y = sum[«s»](x)"), "no-axis"),
    ("a linear from an axis that is not there", body("y = linear[«h» -> i](x)\noutput y"), "no-axis"),
    ("a convolution along channels", body("y = conv[«e»](x, 4)\noutput y"), "no-axis"),
    ("an axis twice in a declaration", body("output y[t, e, «t»] = x"), "axis-twice"),
    ("an axis twice in a reducer", body("output y = sum[e, «e»](x)"), "axis-twice"),
    ("an axis twice behind an arrow", body("y = linear[e -> i, «i»](x)\noutput y"), "axis-twice"),
    ("a definition with an axis too few", body("output y[t, h] = «k»"), "axis-mismatch"),
    ("an output with an axis too few", body("y = k * 2\noutput «y[t, h]»"), "axis-mismatch"),
    ("a linear that brings what it keeps", body("y[t, h] = «linear[i -> h](k)»\noutput y"), "axis-mismatch"),
    ("no kind of axis", body("axes { q: «space» }\noutput x"), "bad-type"),
    ("groups of time", body("axes { q = 2 groups «t» }\noutput x"), "bad-type"),
    ("an input without a sequence", body("input «w[h]»\noutput x"), "bad-input"),
    ("a param over time", body("param «w[t, e]»\noutput x"), "bad-param"),
]

TYPES = [
    ("a parameter of no type", plain("layer A(n: «str»)"), "bad-type"),
    ("an input of no type", body("input w[t]: «text»\noutput x"), "bad-type"),
    ("and of numbers", body("output y = where(«x» and x > 0, 1, 0)"), "type-mismatch"),
    ("not of a number", body("output y = where(not «x», 1, 0)"), "type-mismatch"),
    ("where of a number", body("output y = where(«x», 1, 0)"), "type-mismatch"),
    ("plus of a truth value", body("output y = x + «(x > 0)»"), "type-mismatch"),
    ("minus a truth value", body("output y = -«true»"), "type-mismatch"),
    ("a sum of truth values", body("output y = sum[e](«x > 0»)"), "type-mismatch"),
    ("a count of numbers", body("output y = count[e](«x»)"), "type-mismatch"),
    ("two of them", body("y = exp(«x > 0»)\nz = log(«x < 0»)\noutput x"), "type-mismatch type-mismatch"),
    ("a default that is no int", plain("layer A(n: int = «1.5»)"), "bad-default"),
    ("a default that is infinite", plain("layer A(n: int = «inf»)"), "bad-default"),
    ("a default that is no truth value", plain("layer A(n: bool = «1»)"), "bad-default"),
    ("a default by another parameter", plain("layer A(n: int, m: int = «n»)"), "bad-default"),
    ("an input with a value", body("input w[t] = «1»\noutput x"), "bad-input"),
    ("an empty range", body("input w[t] in [«1, 0»]\noutput x"), "bad-range"),
    ("a range by a parameter", body("input w[t] in [«0, n»]\noutput x"), "bad-range"),
]

SIZES = [
    ("a size by a tensor", body("axes { q = «x» }\noutput x"), "not-a-size"),
    ("a size by the length of time", body("axes { q = «size(t)» }\noutput x"), "not-a-size"),
    ("a size by a comparison", body("axes { q = «n < 3» }\noutput x"), "not-a-size"),
    ("a size of 0", body("axes { q = «0» }\noutput x"), "bad-size"),
    ("a negative size", body("axes { q = «-4» }\noutput x"), "bad-size"),
    ("a size with a fraction", body("axes { q = «2.5» }\noutput x"), "bad-size"),
    ("a size that is no number", body("axes { q = «true» }\noutput x"), "bad-size"),
    ("an infinite size", body("axes { q = «inf» }\noutput x"), "bad-size"),
    ("a size over 2^31", body("axes { q = «2^40» }\noutput x"), "bad-size"),
    ("a remainder", body("axes { q = «7 / 2» }\noutput x"), "bad-size"),
    ("a division by 0", body("axes { q = «7 % 0» }\noutput x"), "bad-size"),
    ("a tower of powers", body("output y = x * «9^9^9»"), "bad-size"),
    ("a root of a negative number", body("axes { q = «(-8)^0.5» }\noutput x"), "bad-size"),
    ("groups that do not divide", body("axes { q = «3» groups h }\noutput x"), "bad-size"),
    ("a rank of 0", body("y[t, h] = linear(x, rank = «0»)\noutput y"), "bad-size"),
    ("a width of 0", body("y = conv[t](x, «0»)\noutput y"), "bad-size"),
    ("an exponent by a token", body("output y = 2^«x»"), "not-a-size"),
    ("a function of no size", body("axes { q = «sigmoid(3)» }\noutput x"), "not-a-size"),
    ("a size of two arguments", body("axes { q = «log(3, 4)» }\noutput x"), "bad-call"),
]

WEIGHTS = [
    ("a linear without axes", body("y = «linear(x)»\noutput y"), "no-arrow"),
    ("two weights in a definition", body("y[t, e] = linear(x) + «linear(x)»\noutput y"), "hidden-weight"),
    ("a weight in an initial value", body("param w[e] = «linear(1)»\noutput x"), "hidden-weight"),
    ("a weight in a function", "fn f[a](x) = «linear[a -> a](x)»\n" + body("output y = f[e](x)"), "hidden-weight"),
    ("a bracket without an arrow", body("y[t, h] = «linear[e]»(x)\noutput y"), "bad-call"),
    ("a linear over time", body("y = linear[«t» -> h](x)\noutput y"), "bad-call"),
    ("a linear that brings time", body("y = linear[e -> «s»](x)\noutput y"), "bad-call"),
    ("a bias that is no truth value", body("y[t, h] = linear(x, bias = «3»)\noutput y"), "bad-call"),
    ("a bias by a parameter", body("y[t, h] = linear(x, bias = «wide»)\noutput y"), "bad-call"),
    ("a table of what is no integer", body("y[t, h] = embed(«x», 5)\noutput y"), "type-mismatch"),
    ("a table without axes", body("y = «embed(c, 5)»\noutput y"), "no-arrow"),
    ("a table of no rows", body("y[t, h] = embed(c, «0»)\noutput y"), "bad-size"),
    (
        "an initial weight over another axis",
        body("param w[i] = 1\ny[t, h] = linear(x, init = «e * i»)\noutput y"),
        "axis-mismatch",
    ),
    ("a parameter that linear has not", body("y[t, h] = linear(x, «scale = 2»)\noutput y"), "bad-call"),
    ("a parameter given twice", body("y[t, h] = linear(x, bias = true, «bias = false»)\noutput y"), "bad-call"),
    ("random numbers in a definition", body("output y = x + «uniform(0, 1)»"), "bad-call"),
    ("a param by an unknown name", body("param w[e] = exp(«ww»)\noutput y = x * w"), "unknown-name"),
    ("a param by a tensor over time", body("param w[e] = «x»\noutput y = x * w"), "bad-param"),
]

READS = [
    ("a read without a position", body("output y = x[«t»]"), "bad-read"),
    ("a read along an axis that is not there", body("output y = x[«h = 1»]"), "no-axis"),
    ("a read at a negative position", body("output y = k[h = «-1»]"), "bad-read"),
    ("a read between two positions", body("output y = k[h = «0.5»]"), "bad-read"),
    ("a read between two tokens", body("output y = x[t = t - «0.5»]"), "bad-read"),
    ("a read at a parameter of no name", body("output y = x[t = t - «w»]"), "unknown-name"),
    ("a read between positions", body("output y = x[t = «x»]"), "type-mismatch"),
    ("a read of a fixed axis between positions", body("output y = k[h = «x»]"), "type-mismatch"),
    ("a read without order", body("axes { q: unordered }\ninput z[q, e]\noutput y = z[«q = 1»]"), "bad-read"),
    ("a coordinate without order", body("axes { q: unordered }\ninput z[q, e]\noutput y = z * «q»"), "bad-read"),
    ("a reducer at a position", body("output y = sum[«e = 1»](x)"), "bad-read"),
    (
        "a read of a param at another step",
        body("param u[i]\nrecurrence over t {\nstate z[h, i]\nz = k * u[«t = t - 1»]\n}\noutput x"),
        "no-axis",
    ),
]

RECURRENCES = [
    ("no state", body("«recurrence over t» {\no = x\n}\noutput y = x"), "no-state"),
    ("a state over time", steps("state «z[t]»\nS = S"), "bad-state"),
    ("axes in an assignment", steps("«S»[h, i] = S"), "bad-state"),
    ("an initial value over time", steps("state z[e] = «x»\nz = z\nS = S"), "axis-mismatch"),
    ("an update with an axis too many", steps("S = «S + x * k»"), "axis-mismatch"),
    ("a state twice", steps("state «S»[h]\nS = S"), "name-taken"),
    ("a recurrence inside", steps("«recurrence over t» {\nstate z\n}\nS = S"), "bad-body"),
    ("an output inside", steps("S = S\n«output S»"), "bad-body"),
    ("a sum over the step", steps("S = S + sum[«t»](k)"), "no-axis"),
    ("two weights of a state", steps("S = linear[h, i -> h, i](S)\nS = «linear[h, i -> h, i](S)»"), "hidden-weight"),
    ("a state of integers", steps("state z: «int»\nS = S"), "bad-type"),
    ("a complex update of a real state", steps("S = «complex(S, S)»"), "type-mismatch"),
    ("a state with a range", steps("state z in [«0, 1»]\nS = S"), "bad-range"),
    (
        "a recurrence without order",
        body("axes { q: unordered }\nrecurrence over «q» {\nstate z\nz = z + 1\n}\noutput y = x"),
        "not-an-axis",
    ),
    (
        "a recurrence in unknown chunks",
        body("recurrence over t within «w» {\nstate z\nz = z + 1\n}\noutput y = x"),
        "unknown-name",
    ),
    (
        "a recurrence within an axis",
        body("recurrence over t within «h» {\nstate z\nz = z + 1\n}\noutput y = x"),
        "not-an-axis",
    ),
    ("a state over its own step", body("recurrence over e {\nstate «z[e]»\nz = z + 1\n}\noutput y = x"), "bad-state"),
    ("a state outside", body("state «z[h]»\noutput y = x"), "not-yet"),
    (
        "errors inside, before and behind",
        body("p = «p1»\nrecurrence over t {\nstate z\nz = z + «p2»\n}\nq = «p3» + z\noutput y = x"),
        "unknown-name unknown-name unknown-name",
    ),
    (
        "an error before does not hide one behind",
        body("p = «p1»\nrecurrence over t {\nstate z\nz = z + 1\n}\noutput y = sum[«e»](z)"),
        "unknown-name no-axis",
    ),
]

FUNCTIONS = [
    ("an argument too few", body("output y = «exp()»"), "bad-call"),
    ("an argument too many", body("output y = «exp(x, x)»"), "bad-call"),
    ("a maximum of one", body("output y = «max(x)»"), "bad-call"),
    ("a reducer without axes", body("output y = «sum(x)»"), "bad-call"),
    ("axes on a function without", body("output y = «exp[e]»(x)"), "bad-call"),
    ("an arrow on a reducer", body("output y = «sum[e -> h]»(x)"), "bad-call"),
    ("calling a tensor", body("output y = «x»(3)"), "not-a-function"),
    ("calling an expression", body("output y = «(x + x)»(3)"), "not-a-function"),
    ("calling a constant", body("output y = «pi»(3)"), "not-a-function"),
    ("an own function with an argument too many", "fn f[a](x) = x\n" + body("output y = «f[e](x, x)»"), "bad-call"),
    ("an own function with an argument too few", "fn f[a](x) = x\n" + body("output y = «f[e]()»"), "bad-call"),
    ("an own function without axes", "fn f[a](x) = x\n" + body("output y = «f(x)»"), "bad-call"),
    ("an unknown argument", "fn f[a](x) = x\n" + body("output y = f[e](«z = x»)"), "bad-call"),
    ("a function that calls itself", "fn f[a](x) = «f[a](x)»\n" + body("output y = f[e](x)"), "recursive"),
    ("a function without output", "fn «f»[a](x) {\n y = x\n}\n" + body("output y = f[e](x)"), "bad-fn"),
    ("an input in a function", "fn f[a](x) {\n «input z»\n output y = x\n}\n" + body("output y = f[e](x)"), "bad-fn"),
    ("two outputs in a function", "fn f[a](x) {\n «output y = x, z = x»\n}\n" + body("output y = f[e](x)"), "bad-fn"),
    ("a mistake in a function", "fn f[a](x) = x + «z»\n" + body("output y = f[e](x)"), "unknown-name"),
]

CHUNKS = [
    ("no rule", body("chunk w of t = «x»\noutput y = x"), "bad-chunk"),
    ("an unknown rule", body("chunk w of t = «fix(8)»\noutput y = x"), "bad-chunk"),
    ("a rule for later", body("chunk w of t = «windows(8, 4)»\noutput y = x"), "not-yet"),
    ("chunks of a fixed axis", body("chunk w of «e» = fixed(8)\noutput y = x"), "not-an-axis"),
    ("chunks of no length", body("chunk w of t = fixed(«0»)\noutput y = x"), "bad-size"),
    ("chunks of two lengths", body("chunk w of t = «fixed(8, 8)»\noutput y = x"), "bad-call"),
    ("runs of channels", body("chunk w of t = runs(«x»)\noutput y = x"), "axis-mismatch"),
    ("a rule outside", body("output y = «fixed»(8) * x"), "not-a-function"),
    ("a reducer by unknown chunks", body("output y = mean[t in «w»](x)"), "unknown-name"),
    ("a reducer by no chunks", body("output y = mean[t in «h»](x)"), "not-an-axis"),
    ("the chunk of a tensor", body("chunk w of t = fixed(8)\noutput y[t] = w(«x»)"), "type-mismatch"),
    ("the first of an axis", body("output y = x * first(«h»)"), "not-an-axis"),
    ("the groups of a channel", body("output y = «h»(i)"), "not-a-function"),
    ("a condition that is a number", body("output y = sum[e if «e»](x)"), "type-mismatch"),
    ("a norm with a condition", body("output y = «rms_norm[e if e < 2](x)»"), "bad-call"),
    (
        "a whole chunk read from its start",
        "causal " + body("chunk w of t = fixed(8)\nm = mean[t in w](x)\noutput y = «m[w = w(t)]»"),
        "not-causal",
    ),
    (
        "chunks that depend on the length",
        "causal " + body("chunk w of t = parts(8)\noutput y[t] = «w(t)»"),
        "not-causal",
    ),
]

COMPOSED = [
    ("a rotation along time", body("output y = rope[«t»](x, t)"), "no-axis"),
    ("a rotation by a number", body("output y = rope[e](x, «0.5 * t»)"), "type-mismatch"),
    ("a rotation of an odd size", body("axes { q = 3 }\nparam w[q] = 1\noutput y = rope[«q»](w * x, t)"), "bad-size"),
    ("a label that is no integer", body("output y = ce[e](x, «x»)"), "type-mismatch"),
    ("a loss along time", body("output y = ce[«t»](x, c)"), "no-axis"),
    ("a complex number in a function", body("output y = re(tanh(«complex(x, x)»))"), "type-mismatch"),
    ("a complex maximum", body("output y = max[e](«complex(x, x)»)"), "type-mismatch"),
]

CAUSALITY = [
    ("a softmax over the sequence", "causal " + body("output y = «softmax[t](x)»"), "not-causal"),
    ("a sum over the sequence", "causal " + body("w = «sum[t](x)»\noutput y = x * w"), "not-causal"),
    ("the next token", "causal " + body("output y = «x[t = t + 1]» - x"), "not-causal"),
    (
        "the last state",
        "causal " + body("recurrence over t {\nstate z[e]\nz = «z + x»\n}\noutput y = x * z[t = size(t) - 1]"),
        "not-causal",
    ),
    (
        "in the second layer, behind another error",
        body("output y = «w»") + "\ncausal " + body("output y = «sum[t](x)»").replace("layer A", "layer B"),
        "unknown-name not-causal",
    ),
]

PAIR = """op pair(n: int, m: int) {
  axes { t: time, i = n, j = m }
  input x[t, i], y[t, j]
  output z = sum[j](x * y)
}
"""
CHUNKED = body(
    "chunk w of t = fixed(4)\nchunk v of t = fixed(3)\nm = mean[t in w](x)\nr = mean[t in v](x)\nz[s, e] = x\nBODY"
)


def loop(over: str, step: str, state: str = "S[e]") -> str:
    """A recurrence beside chunks w and v, their means m and r, and z over another name of time."""
    return CHUNKED.replace("BODY", f"recurrence over {over} {{\nstate {state}\nS = tanh(S + {step})\n}}\noutput y = x")


LOOPS = [
    ("other chunks in a loop over chunks", loop("w", "«mean[t in v](x)»[v = 0]"), "not-yet"),
    ("a shift in a loop over chunks", loop("w", "mean[t](«x[t = t - 1]»)"), "not-yet"),
    ("a chunk's first value in a loop over chunks", loop("w", "«x[t = first(w)]»"), "not-yet"),
    ("other chunks' values at positions", loop("w", "mean[t](«r[v = v(t)]»)"), "not-yet"),
    ("another name of time in a loop over chunks", loop("w", "mean[s](«z * S»)"), "not-yet"),
    ("chunks in a loop over a fixed axis", loop("i", "«mean[t in w](x)»", "S[w, e]"), "not-yet"),
    ("a state over a sequence in a loop over tokens", loop("t", "sum[s](«z * S»)"), "not-yet"),
    (
        "a chunk's value in a recurrence",
        "causal "
        + CHUNKED.replace("BODY", "recurrence over t {\nstate S[e]\nS = tanh(S + «m[w = w(t)]»)\n}\noutput y = S"),
        "not-causal",
    ),
    (
        "a later row within a loop over a fixed axis",
        "causal "
        + CHUNKED.replace(
            "BODY", "recurrence over i {\nstate S[t, e] = x\nS = S + «S[t = t + 1]»\n}\noutput y = S[i = 0]"
        ),
        "not-causal",
    ),
    (
        "a weight in an op",
        "op A(n: int) {\n axes { t: time, d = n }\n input x[t, d]\n y[t, d] = «linear(x)»\n output y\n}",
        "hidden-weight",
    ),
]

CALLS = [
    ("a layer without inputs", "layer «A» {\n  axes { d = 2 }\n  param w[d]\n  output w\n}", "bad-input"),
    (
        "a number for a truth value",
        "op f(b: bool = true) {\n axes { t: time }\n input x[t]\n output y = where(b, x, 0)\n}\n"
        + body("output y = f(x[e = 0], b = «1»)"),
        "type-mismatch",
    ),
    (
        "groups of a callee on what groups nothing",
        "op f() {\n axes { t: time, d = 4, z = 2 groups d }\n"
        " input x[t, d], y[t, z]\n output r = x * y\n}\n" + body("output y = «f[d = h, z = i](sum[i](k), sum[h](k))»"),
        "axis-mismatch",
    ),
    ("two axes of a callee on one", PAIR + body("y = «pair[i = e, j = e](x, x)»\noutput y"), "axis-mismatch"),
    ("a layer named as another's state", plain("layer A") + "\n" + plain("layer «AState»"), "name-taken"),
    ("a layer named as a later op's state", plain("layer «b_state»") + "\n" + plain("op b"), "name-taken"),
]

LATER = [
    (
        "rows that nothing is over",
        body("attention o[t, h, i] «over s» {\nlogit = 1\nvalue = k\n}\noutput o"),
        "no-axis",
    ),
    ("a source without a logit", body("attention o[t, h, i] «over s» {\nvalue = k[t = s]\n}\noutput o"), "no-source"),
    ("an attention without sources", body("«attention o[t, h, i]» {\n}\noutput o"), "no-source"),
    ("a source alone", body("«over s» {\nlogit = 1\n}\noutput x"), "bad-body"),
    (
        "a logit of truth values",
        body("attention o over s {\nlogit = «s < t»\nvalue = k[t = s]\n}\noutput o"),
        "type-mismatch",
    ),
    (
        "a mask of numbers",
        body("attention o over s {\nlogit = s * 1.0\nvalue = k[t = s]\nmask = «s»\n}\noutput o"),
        "type-mismatch",
    ),
    (
        "an attention over a fixed axis",
        body("attention o[t, h] over «i» {\nlogit = k\nvalue = k\n}\noutput o"),
        "not-yet",
    ),
    (
        "a function along rows",
        body("attention o[t, h, i] over s {\nlogit = «softmax[s](dot[i](k, k[t = s]))»\nvalue = k[t = s]\n}\noutput o"),
        "not-yet",
    ),
    (
        "a second logit",
        body("attention o over s {\nlogit = s * 1.0\n«logit» = 2\nvalue = k[t = s]\n}\noutput o"),
        "bad-body",
    ),
    (
        "an axis of neither",
        body("attention «o»[t, h, e] over s {\nlogit = s * 1.0\nvalue = k[t = s]\n}\noutput o"),
        "axis-mismatch",
    ),
    (
        "an attention inside a recurrence",
        body("recurrence over t {\nstate z[h]\nz = z * 0.5\n«attention o[h] over s» {\nlogit = 1\n}\n}\noutput z"),
        "not-yet",
    ),
    ("an order", body("«order» r of t by x\noutput y = x"), "not-yet"),
    ("a pick", body("«pick» p of t by x keep top(3)\noutput y = x"), "not-yet"),
    ("a use without a file", 'use «"a.spec"»\n' + body("output y = x"), "bad-use"),
    ("a membership", body("output y = where(«t in s», 1, 0)"), "not-yet"),
]


def layout(lines: str, text: str = "output y = x") -> str:
    return body(text) + f"\nparallel {{\n{lines}\n}}"


LAYOUTS = [
    ("a layout of nothing", body("output y = x") + "\n«parallel» {\n}", "bad-layout"),
    ("a layout without a shard", body("output y = x") + "\n«parallel» {\nmesh { a, b }\n}", "bad-layout"),
    ("a layout without a mesh", body("output y = x") + "\n«parallel» {\nshard t over a\n}", "bad-layout"),
    ("an axis that the mesh has not", layout("mesh { a }\nshard t over «b»"), "bad-layout"),
    ("an axis of the mesh twice", layout("mesh { a, b, «a» }\nshard t over b"), "bad-layout"),
    ("names without commas", layout("mesh { a «b» }\nshard t over b"), "bad-layout"),
    ("a mesh in a mesh", layout("mesh { «a» { b } }\nshard t over a"), "bad-layout"),
    ("a word of the language in a mesh", layout("mesh { a «over» b }\nshard t over a"), "bad-layout"),
    ("a line twice", layout("mesh { a }\nshard t over a\n«mesh» { b }"), "bad-layout"),
    ("no line of a layout", layout("mesh { a }\nshard t over a\n«fly t over a»"), "bad-layout"),
    ("a shard that breaks off", layout("mesh { a }\n«shard t over»"), "bad-layout"),
    ("a way without its name", layout("mesh { a }\nshard t over a\n«attention via»"), "bad-layout"),
    ("a layout that is unknown", layout("mesh { a }\nshard t over a layout «round»"), "bad-layout"),
    ("a layout that is not built", layout("mesh { a }\nshard t over a layout «striped»"), "not-yet"),
    ("a way that is not built", layout("mesh { a }\nshard t over a\nattention via «usp»"), "not-yet"),
    ("a way that is unknown", layout("mesh { a }\nshard t over a\nrecurrence via «air»"), "bad-layout"),
    ("several axes of a mesh", layout("mesh { a, b }\nshard t over «(a, b)» layout auto"), "not-yet"),
    ("two axes that are shared", layout("mesh { a, b }\nshard t over a\n«shard h over b»"), "not-yet"),
    ("a loss", layout("mesh { a }\nshard t over a\n«loss sum over a by n»"), "not-yet"),
    ("a fixed axis that is shared", layout("mesh { a }\nshard «h» over a"), "bad-layout"),
    ("a second name that is shared", layout("mesh { a }\nshard «s» over a"), "bad-layout"),
    ("no axis at all", layout("mesh { a }\nshard «zz» over a"), "bad-layout"),
    (
        "two layouts",
        layout("mesh { a }\nshard t over a") + "\n«parallel» {\nmesh { a }\nshard t over a\n}",
        "bad-layout",
    ),
    (
        "a layer that is called plan",
        "op «Plan» {\naxes { t: time }\ninput x[t]\noutput y = x\n}\nparallel {\nmesh { a }\nshard t over a\n}",
        "name-taken",
    ),
]

TABLE = [
    *SYNTAX, *NAMES, *AXES, *TYPES, *SIZES, *WEIGHTS, *READS, *RECURRENCES, *FUNCTIONS, *CHUNKS, *COMPOSED,
    *CAUSALITY, *LOOPS, *CALLS, *LATER, *LAYOUTS,
]  # fmt: skip


def unmarked(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without its marks, and the spans that they enclose."""
    spans, text = [], ""
    for part in re.split("([«»])", marked):
        if part == "«":
            start = len(text)
        elif part == "»":
            spans.append((start, len(text)))
        else:
            text += part
    return text, spans


@pytest.mark.parametrize(("marked", "codes"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_broken(marked: str, codes: str) -> None:
    text, spans = unmarked(marked)
    source = SourceFile("broken.spec", text)
    with pytest.raises(CompileError) as caught:
        check_source(source)
    found = caught.value.diagnostics
    shown = "\n".join(render_text(d, {source.name: source}) for d in found)
    assert [d.code for d in found] == codes.split(), shown
    assert [(d.span.start, d.span.end) for d in found] == spans, shown
    assert "-->" in shown and render_json(found, {source.name: source}).startswith("[")


def test_the_names_are_unique() -> None:
    assert len({row[0] for row in TABLE}) == len(TABLE) >= 70


RIGHT = [
    body("output y = x"),
    steps("S = S + k"),
    steps("S = S + k\nr = S\nr2 = r"),  # names for what has one
    body("y = x * 2\nz = y\nw = x * 2\noutput y, z, w"),
    body("output y = where(wide and true, x, 0)"),
    body("axes { y_rank = 3, y_taps = 5 }\ny[t, e] = linear(x, rank = 2)\noutput y"),  # no clash with what it brings
    body("recurrence over t {\nstate z[e] = 1\nz = z + x\n}\noutput y = z[e = size(e) - 1] - z[t = -1][e = 0]"),
    "fn f[a](x, value) = x + value\n" + body("output y = f[e](x, 1)"),
    'fn f[a](x) {\n"doc"\n y = x\n output y\n}\n' + body("output y = f[e](f[e](x))"),
    body('# a ( in a comment\n"and a [ in a string"\noutput y = (x\n# within\n+ x)'),
]


@pytest.mark.parametrize("text", RIGHT)
def test_right(text: str) -> None:
    source = SourceFile("right.spec", text)
    assert check_source(source).module.units
    assert compile_source(source).units


def test_a_bias_is_there_if_asked_for() -> None:
    (unit,) = check_source(
        SourceFile("bias.spec", body("y[t, h] = linear(x, bias = true)\nz = conv[t](x, 4, bias = true)\noutput y, z"))
    ).module.units
    names = [n.name for n in unit.graph.nodes if isinstance(n, N.Param)]
    assert names == ["k.weight", "y.weight", "y.bias", "z.weight", "z.bias"]


def test_defaults_keep_their_types() -> None:
    (unit,) = check_source(
        SourceFile("types.spec", plain("layer A(n: int = 4.0, f: float = 2, b: bool = true)"))
    ).module.units
    assert [repr(p.default) for p in unit.params] == ["4", "2.0", "True"]
