"""The functions that every spec may use: how many arguments they take and what they are."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Function:
    """A prelude function: `least` to `most` positional arguments, those with names, its meaning in one line."""

    name: str
    least: int
    most: int
    doc: str
    keywords: tuple[str, ...] = ()


def _table(*rows: tuple[str, int, int, str] | tuple[str, int, int, str, tuple[str, ...]]) -> dict[str, Function]:
    return {row[0]: Function(*row) for row in rows}


ELEMENTWISE = _table(
    ("exp", 1, 1, "e to the x"),
    ("log", 1, 1, "natural logarithm"),
    ("tanh", 1, 1, "hyperbolic tangent"),
    ("sigmoid", 1, 1, "1 / (1 + exp(-x))"),
    ("silu", 1, 1, "x sigmoid(x)"),
    ("gelu", 1, 1, "x times the normal distribution function of x, exact"),
    ("relu", 1, 1, "max(x, 0)"),
    ("softplus", 1, 1, "log(1 + exp(x))"),
    ("logsigmoid", 1, 1, "log(sigmoid(x))"),
    ("inv_softplus", 1, 1, "the x whose softplus this is"),
    ("abs", 1, 1, "absolute value"),
    ("floor", 1, 1, "the largest integer that is not greater"),
    ("min", 2, 16, "the smallest argument"),
    ("max", 2, 16, "the largest argument"),
    ("where", 3, 3, "the second argument where the first holds, else the third"),
    ("stop", 1, 1, "x, with no gradient"),
    ("complex", 2, 2, "the complex number with this real and imaginary part"),
    ("re", 1, 1, "real part"),
    ("im", 1, 1, "imaginary part"),
    (
        "bce",
        2,
        2,
        "binary cross-entropy of a probability p and a label y in [0, 1]; `gamma = n` makes it focal",
        ("gamma",),
    ),
)

REDUCERS = _table(
    ("sum", 1, 1, "sum"),
    ("mean", 1, 1, "mean; of nothing 0"),
    ("max", 1, 1, "largest element"),
    ("min", 1, 1, "smallest element"),
    ("any", 1, 1, "whether one holds"),
    ("count", 1, 1, "how many hold"),
    ("norm", 1, 1, "root of the sum of squares"),
    ("dot", 2, 2, "sum of the products"),
)

NORMALISERS = _table(
    ("softmax", 1, 1, "exp(x) over its sum"),
    ("rms_norm", 1, 1, "x over the root of its mean square + 1e-5"),
    ("layer_norm", 1, 1, "x less its mean, over the root of its variance + 1e-5"),
    ("l2_norm", 1, 1, "x over the root of its sum of squares + 1e-6"),
)

POSITIONED = _table(
    ("rope", 2, 2, "rotary embedding at an integer position: base 10000, half-split pairs"),
    ("ce", 2, 2, "cross-entropy of logits along the axis and an integer label"),
)

WEIGHTED = _table(
    ("linear", 1, 1, "one learned matrix", ("rank", "bias", "init")),
    ("embed", 2, 2, "a row of a learned table for each integer; the second argument is the number of rows", ("init",)),
    ("conv", 2, 2, "causal depthwise convolution along a sequence", ("bias", "init")),
)

INITIAL = _table(
    ("uniform", 2, 2, "random, uniform between the arguments; in initial values"),
    ("normal", 1, 1, "random, normal with this standard deviation; in initial values"),
)

SIZES = _table(
    ("size", 1, 1, "the length of an axis"),
    ("first", 1, 1, "a chunk's first position"),
    ("last", 1, 1, "a chunk's last position"),
    ("len", 1, 1, "how many positions a chunk has"),
)

CONSTANTS = ("pi", "inf", "true", "false")

# Rules of `chunk`: they stand behind its `=` and nowhere else.
RULES = ("fixed", "parts", "runs")

# Functions of the language that this version reports as `not-yet`.
LATER = ("rank", "grad", "cut", "windows", "powers")

ALONG = {**REDUCERS, **NORMALISERS, **POSITIONED, **WEIGHTED}
FUNCTIONS = {**ELEMENTWISE, **ALONG, **INITIAL, **SIZES}
NAMES = frozenset((*FUNCTIONS, *CONSTANTS, *RULES, *LATER))
