"""The kinds of node of a graph, at every level; those over tiles are in `ir/tiles.py`.

A node is a value over named axes. Its operands are named by id and stand before it; `span` is the piece of the
spec that it comes from. Elementwise nodes broadcast by axis name. Inside a recurrence's body the time axis is bound
and appears in no node's axes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from chunkc.ir import tiles as T
from chunkc.ir.axes import AxisName, DType, Frozen, Size
from chunkc.ir.diagnostics import Span
from chunkc.ir.node import Node as Node
from chunkc.ir.node import Unary

if TYPE_CHECKING:
    from chunkc.ir.graph import Graph


class Input(Node):
    """A tensor that belongs to a sequence; `low` and `high` are its declared range."""

    kind: Literal["input"] = "input"
    name: str
    low: float | None = None
    high: float | None = None


class Param(Node):
    """A learned tensor, shared by all sequences, under its dotted name; `init` computes its first value; `low` and
    `high` are its declared range.

    `library` names the parameter's role in a `linear`, `conv` or `embed` call, whose usual initial values it takes."""

    kind: Literal["param"] = "param"
    name: str
    init: Graph | None = None
    library: Literal["", "weight", "bias", "table"] = ""
    fan_in: Size | None = None
    low: float | None = None
    high: float | None = None


class Const(Node):
    """A number known when the layer is constructed."""

    kind: Literal["const"] = "const"
    size: Size


class Random(Node):
    """Random numbers, in initial values only: uniform over [a, b] or normal with standard deviation a."""

    kind: Literal["random"] = "random"
    fn: Literal["uniform", "normal"]
    a: Size
    b: Size


class Length(Node):
    """The length of a sequence axis: a number a sequence."""

    kind: Literal["length"] = "length"
    axis: AxisName


class Coord(Node):
    """The coordinate along an axis. In a recurrence's body, that of the current step."""

    kind: Literal["coord"] = "coord"
    axis: AxisName


class Segment(Node):
    """The chunks of a sequence: spans of `fixed` n positions, `parts` equal up to rounding, or `runs`, where a chunk
    begins wherever `begins` holds. It has no value of its own: nodes name the chunks' axis, whose parent is cut."""

    kind: Literal["segment"] = "segment"
    chunk: AxisName
    rule: Literal["fixed", "parts", "runs"]
    n: Size | None = None
    begins: str | None = None

    def operands(self) -> tuple[str, ...]:
        return () if self.begins is None else (self.begins,)

    def renamed(self, names: dict[str, str]) -> Node:
        return self if self.begins is None else self.evolve(begins=names.get(self.begins, self.begins))


class Bounds(Node):
    """Where chunks lie: the chunk `of` each position, or over the chunks their `index`, `first` and `last` position and
    `length`. Integers."""

    kind: Literal["bounds"] = "bounds"
    fn: Literal["of", "index", "first", "last", "length"]
    chunk: AxisName


class Map(Node):
    """One elementwise function; operands align by axis name."""

    kind: Literal["map"] = "map"
    fn: str
    args: tuple[str, ...]

    def operands(self) -> tuple[str, ...]:
        return self.args

    def renamed(self, names: dict[str, str]) -> Node:
        return self.evolve(args=tuple(names.get(a, a) for a in self.args))


class Reduce(Unary):
    """A reducer over named axes: sum, mean, max, min, any; of nothing it is 0.

    With `chunk`, which divides one of them into chunks or groups, it works chunk by chunk; that axis stands first."""

    kind: Literal["reduce"] = "reduce"
    fn: Literal["sum", "mean", "max", "min", "any"]
    over: tuple[AxisName, ...]
    chunk: AxisName | None = None


class Normalize(Unary):
    """A normaliser along named axes, within each chunk of `chunk` if there is one; it keeps them."""

    kind: Literal["normalize"] = "normalize"
    fn: Literal["softmax", "rms_norm", "layer_norm", "l2_norm"]
    over: tuple[AxisName, ...]
    chunk: AxisName | None = None


class Expand(Unary):
    """A tensor over groups `source` read over the members `target`: equal runs, in order."""

    kind: Literal["expand"] = "expand"
    source: AxisName
    target: AxisName


class Rename(Unary):
    """The same values under a second name of an axis."""

    kind: Literal["rename"] = "rename"
    source: AxisName
    target: AxisName


class Shift(Unary):
    """`x[t = t - by]` along a sequence axis: row t - by, and 0 before the sequence starts (or after it ends)."""

    kind: Literal["shift"] = "shift"
    axis: AxisName
    by: Size


class Slice(Unary):
    """`x[a = at]` at one static position of an axis of fixed size; outside it, 0."""

    kind: Literal["slice"] = "slice"
    axis: AxisName
    at: Size


class Indexed(Node):
    """What a gather and its gradient share: an operand, and integers that name positions along an axis."""

    arg: str
    index: str
    axis: AxisName

    def operands(self) -> tuple[str, ...]:
        return (self.arg, self.index)

    def renamed(self, names: dict[str, str]) -> Node:
        return self.evolve(arg=names.get(self.arg, self.arg), index=names.get(self.index, self.index))


class Gather(Indexed):
    """`x[a = index]` at integer positions; outside the axis, 0. The index's axes replace a, and meet x's by name."""

    kind: Literal["gather"] = "gather"


class Scatter(Indexed):
    """The sum of what `index` sends to each position of a fixed axis, over all axes that the result lacks: the gradient
    of a gather."""

    kind: Literal["scatter"] = "scatter"


class Linear(Node):
    """Sum over `over` of arg times weight[over, to], plus bias[to] if there is one."""

    kind: Literal["linear"] = "linear"
    arg: str
    weight: str
    bias: str | None = None
    over: tuple[AxisName, ...]
    to: tuple[AxisName, ...]

    def operands(self) -> tuple[str, ...]:
        return (self.arg, self.weight) + ((self.bias,) if self.bias else ())

    def renamed(self, names: dict[str, str]) -> Node:
        bias = names.get(self.bias, self.bias) if self.bias else None
        return self.evolve(arg=names.get(self.arg, self.arg), weight=names.get(self.weight, self.weight), bias=bias)


class Conv(Node):
    """Causal depthwise convolution along a sequence: sum over m < width of weight[m] x[t - width + 1 + m]."""

    kind: Literal["conv"] = "conv"
    arg: str
    weight: str
    bias: str | None = None
    axis: AxisName
    width: Size

    def operands(self) -> tuple[str, ...]:
        return (self.arg, self.weight) + ((self.bias,) if self.bias else ())

    def renamed(self, names: dict[str, str]) -> Node:
        bias = names.get(self.bias, self.bias) if self.bias else None
        return self.evolve(arg=names.get(self.arg, self.arg), weight=names.get(self.weight, self.weight), bias=bias)


class Capture(Node):
    """In a body: an outer value, read at the current step where it runs over the bound axis."""

    kind: Literal["capture"] = "capture"
    outer: str


class State(Node):
    """In a body: a state as it is when the step starts."""

    kind: Literal["state"] = "state"
    name: str


class Carried(Frozen):
    """A state of a recurrence: its name, axes and type, the outer value that it starts from, and the body's result."""

    name: str
    axes: tuple[AxisName, ...]
    dtype: DType = "float"
    initial: str | None = None
    result: str
    span: Span | None = None


class Recur(Node):
    """A recurrence over an ordered axis; `Out` nodes read its results.

    `body.outputs` are the values of one step; a result becomes a tensor over the axis. With `within`, states start
    anew in each of those chunks. Over chunks, a step is a chunk: the sequence that is cut stands for its positions, a
    result over it is put together from the chunks', and a chunk that may go on applies the states but does not update
    them. At the semantic level this is any recurrence; at the normal level, one that has no chunk form: it runs step by
    step, for `reason`.
    """

    kind: Literal["recur"] = "recur"
    axis: AxisName
    within: AxisName | None = None
    carried: tuple[Carried, ...]
    body: Graph
    reason: str = ""

    def operands(self) -> tuple[str, ...]:
        captured = [n.outer for n in self.body.nodes if isinstance(n, Capture)]
        return tuple(dict.fromkeys(captured + [c.initial for c in self.carried if c.initial]))

    def renamed(self, names: dict[str, str]) -> Node:
        carried = tuple(c.evolve(initial=names.get(c.initial, c.initial)) if c.initial else c for c in self.carried)
        return self.evolve(body=_recaptured(self.body, names), carried=carried)


class Gate(Frozen):
    """A factor of a transition: exp(arg) if `log`, else arg itself. `low`: the least that is proven of arg."""

    arg: str
    log: bool
    low: float = -math.inf


class Write(Frozen):
    """A term added to the state: a value over the i side times a value over the j side."""

    i: str
    j: str


class Query(Frozen):
    """A read of the state: the sum over one side of arg times the state."""

    side: Literal["i", "j"]
    arg: str


class Prologue(Frozen):
    """Elementwise work by which a scan's operands are made of `leaves`, values over the scan's axis and the state's
    axes: kernels do it where they load.

    `values` has an input a leaf, and an output an operand; `gradients` an input a leaf and one an operand's gradient,
    and an output a leaf's."""

    leaves: tuple[str, ...]
    values: Graph
    gradients: Graph

    def regions(self) -> dict[str, Graph]:
        return {"values": self.values, "gradients": self.gradients}


REGIONS = ("backward", "step", "tiles", "tiles_backward", "kernels", "kernels_backward", "kernel_step")


class Scan(Node):
    """A diagonal linear recurrence over an ordered axis (the normal form).

    With the state's axes split into `batch`, `i` and `j`:
    S_t = A_t * S_{t-1} + sum_r W_r[i] V_r[j], A_t a product of gates, none over both i and j axes.
    A step does three things in a circle, of which `start` is the first: `read`, `gate` (times A_t), `write`. A scan
    that starts with its read reads the state before the update, one that starts with its gate the state after it.
    Results, read by `Out`: each query; then `trajectory` (the state before the update, whole) if i and j are empty;
    last the final state. `algebra` max-plus: S_t = max(A_t + S_{t-1}, W_t), i and j empty.
    `reverse` runs from the last token to the first. `declared` is the spec's order of the state's axes.
    `stop`: no gradient passes from one step to the next. `within`: it starts anew in each of those chunks.

    Passes derive from it, each as a graph of its own whose inputs are the scan's `arguments` by position: `backward`,
    its gradient; `step`, one token; `tiles` and `tiles_backward`, the chunk form of the scan and of its gradient;
    `kernels`, `kernels_backward` and `kernel_step`, the launches for these. `prologue` is work around it that it does
    itself; its operands stay what that work makes of its leaves.
    """

    kind: Literal["scan"] = "scan"
    axis: AxisName
    within: AxisName | None = None
    name: str
    declared: tuple[AxisName, ...]
    batch: tuple[AxisName, ...]
    i: tuple[AxisName, ...] = ()
    j: tuple[AxisName, ...] = ()
    algebra: Literal["sum-product", "max-plus"] = "sum-product"
    gates: tuple[Gate, ...] = ()
    writes: tuple[Write, ...] = ()
    add: str | None = None
    queries: tuple[Query, ...] = ()
    start: Literal["read", "gate", "write"] = "read"
    initial: str | None = None
    reverse: bool = False
    stop: bool = False
    backward: Graph | None = None
    step: Graph | None = None
    tiles: Graph | None = None
    tiles_backward: Graph | None = None
    kernels: Graph | None = None
    kernels_backward: Graph | None = None
    kernel_step: Graph | None = None
    prologue: Prologue | None = None

    def arguments(self) -> tuple[str, ...]:
        """The ids of its operands, one a slot: gates, each write's sides, the added value, queries."""
        ids = [g.arg for g in self.gates] + [x for w in self.writes for x in (w.i, w.j)]
        return (*ids, *([self.add] if self.add else []), *(q.arg for q in self.queries))

    def regions(self) -> dict[str, Graph]:
        """The graphs derived from it, by name."""
        found = {name: getattr(self, name) for name in REGIONS}
        return {name: graph for name, graph in found.items() if graph is not None}

    def operands(self) -> tuple[str, ...]:
        ids = [g.arg for g in self.gates] + [x for w in self.writes for x in (w.i, w.j)]
        ids += [q.arg for q in self.queries] + [x for x in (self.add, self.initial) if x]
        ids += self.prologue.leaves if self.prologue is not None else ()
        return tuple(dict.fromkeys(ids))

    def renamed(self, names: dict[str, str]) -> Node:
        def new(x: str | None) -> str | None:
            return names.get(x, x) if x else None

        return self.evolve(
            gates=tuple(g.evolve(arg=new(g.arg)) for g in self.gates),
            writes=tuple(w.evolve(i=new(w.i), j=new(w.j)) for w in self.writes),
            queries=tuple(q.evolve(arg=new(q.arg)) for q in self.queries),
            add=new(self.add),
            initial=new(self.initial),
            prologue=self.prologue
            and self.prologue.evolve(leaves=tuple(names.get(x, x) for x in self.prologue.leaves)),
        )

    def result_axes(self, index: int) -> tuple[str, ...]:
        """The axes of result `index`: the queries in order, then trajectory or nothing, then the final state."""
        if index < len(self.queries):
            return (self.axis, *self.batch, *(self.j if self.queries[index].side == "i" else self.i))
        if not (self.i or self.j) and index == len(self.queries):
            return (self.axis, *self.batch)
        return (*self.batch, *self.i, *self.j)


class Source(Frozen):
    """Rows that an attention reads: those of `axis`, or one row without. `logit`, `value` (without: 0) and `mask`
    (without: every row is seen) are values of the attention's body.

    Passes derive from it, each a graph whose inputs are the body's captures: `scores`, its parts as a function of a
    tile of queries and a tile of rows; `gradients`, those of the captures from the logit's and the value's."""

    axis: AxisName | None = None
    logit: str
    value: str | None = None
    mask: str | None = None
    scores: Graph | None = None
    gradients: Graph | None = None

    def regions(self) -> dict[str, Graph]:
        """The graphs that passes have derived so far, by name."""
        return {n: g for n, g in (("scores", self.scores), ("gradients", self.gradients)) if g is not None}


class Attend(Node):
    """The mean of the values of all sources' rows, weighted by one softmax of their logits where the masks hold; 0
    where none does.

    `query` is the sequence that its own axes hold, if any. Only what depends on a query and on a row at once is in the
    body, beside captures of what does not, coordinates and numbers; so nothing outside is over two sequences.
    """

    kind: Literal["attend"] = "attend"
    query: AxisName | None = None
    sources: tuple[Source, ...]
    body: Graph

    def operands(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(n.outer for n in self.body.nodes if isinstance(n, Capture)))

    def logit_axes(self) -> tuple[str, ...]:
        """The axes of the weights beside queries and rows: those of the attention that a logit or a mask has."""
        ids = [id_ for s in self.sources for id_ in (s.logit, s.mask) if id_ is not None]
        have = {a for id_ in ids for a in self.body[id_].axes}
        return tuple(a for a in self.axes if a in have and a != self.query)

    def renamed(self, names: dict[str, str]) -> Node:
        return self.evolve(body=_recaptured(self.body, names))


def _recaptured(body: Graph, names: dict[str, str]) -> Graph:
    """A body whose captures read other ids."""
    nodes = [n.evolve(outer=names.get(n.outer, n.outer)) if isinstance(n, Capture) else n for n in body.nodes]
    return body.evolve(nodes=tuple(nodes))


class GateGradient(Node):
    """The gradient of gate number `gate` of a scan, from the scan and its adjoint: the reversed scan of gradients.

    With S and L the states of the scan and its adjoint as they meet the gate, A the transition: the sum of A S L over
    the axes that the gate lacks. For a gate that is no logarithm, A is without it. It reads both trajectories."""

    kind: Literal["gate_gradient"] = "gate_gradient"
    scan: str
    adjoint: str
    gate: int

    def operands(self) -> tuple[str, ...]:
        return (self.scan, self.adjoint)

    def renamed(self, names: dict[str, str]) -> Node:
        return self.evolve(scan=names.get(self.scan, self.scan), adjoint=names.get(self.adjoint, self.adjoint))


class Out(Unary):
    """Result `index` of a node with several."""

    kind: Literal["out"] = "out"
    index: int


AnyNode = Annotated[
    Input
    | Param
    | Const
    | Random
    | Length
    | Coord
    | Segment
    | Bounds
    | Map
    | Reduce
    | Normalize
    | Expand
    | Rename
    | Shift
    | Slice
    | Gather
    | Scatter
    | Linear
    | Conv
    | Capture
    | State
    | Recur
    | Scan
    | Attend
    | GateGradient
    | Out
    | T.Tile
    | T.Untile
    | T.Span
    | T.Contract
    | T.Strict
    | T.Prefix
    | T.Carry
    | T.Half
    | T.Halving
    | T.Kernel
    | T.Buffer,
    Field(discriminator="kind"),
]
