"""What holds of a graph at each level: a table of rules, checked between passes.

A rule is a small function that yields what is wrong. The rules of structure run in order and stop at the first that
finds something, so that a rule may rely on those before it; the others all run. Regions are checked after the graph
around them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from chunkc.ir import nodes as N
from chunkc.ir import tiles as T
from chunkc.ir.axes import axis_fields
from chunkc.ir.graph import Graph, Level, gather_axes, moved_axes
from chunkc.ir.verify_tiles import KERNELS, TILES

PAIRWISE = (  # kinds that stand in an attention's body
    N.Const | N.Coord | N.Bounds | N.Capture | N.Map | N.Reduce | N.Expand | N.Rename | N.Slice | N.Gather | N.Scatter
)
SEVERAL = N.Recur | N.Scan | T.Prefix | T.Carry | T.Halving | T.Kernel  # kinds with several results


@dataclass(frozen=True)
class Message:
    """What is wrong with one node (or output), by its path through the regions around it."""

    node: str
    text: str


class VerifyError(Exception):
    """A graph breaks rules of its level: the messages say which node and how."""

    def __init__(self, level: str, messages: list[Message]) -> None:
        self.messages = tuple(messages)
        super().__init__(f"no valid {level} graph: " + "; ".join(f"{m.node}: {m.text}" for m in messages))


@dataclass(frozen=True)
class Region:
    """A graph and where it stands: in a recurrence, an attention or a halving of `outer`, in a parameter, under a scan,
    or alone."""

    graph: Graph
    level: Level
    path: str = ""
    outer: Graph | None = None
    recur: N.Recur | None = None
    initial: bool = False
    scan: N.Scan | None = None
    halving: T.Halving | None = None
    attend: N.Attend | None = None

    @property
    def bound(self) -> str | None:
        """The axis whose steps a body is."""
        return self.recur.axis if self.recur else None

    def axes(self, id_: str) -> tuple[str, ...]:
        return self.graph[id_].axes

    def results(self, node: N.AnyNode) -> list[tuple[str, ...]]:
        """The axes of each result of a node with several."""
        if isinstance(node, T.Kernel):
            return [node.body[id_].axes for _, id_ in node.body.outputs]
        if isinstance(node, T.Halving):
            return [self.axes(t) for t in node.totals]
        if isinstance(node, T.Carry):
            return [self.axes(node.update), _minus(self.axes(node.update), (node.axis,))]
        if isinstance(node, T.Prefix):
            return [self.axes(node.a)] * 2 + [_minus(self.axes(node.a), (node.axis,))] * 2
        if isinstance(node, N.Scan):
            count = len(node.queries) + (1 if node.i or node.j else 2)
            return [node.result_axes(k) for k in range(count)]
        assert isinstance(node, N.Recur), node
        axis = self.graph.axis[node.axis]
        inner = axis.parent if axis.kind == "chunk" else None
        made = [node.body[id_].axes for _, id_ in node.body.outputs]
        steps = [axes if inner in axes else (node.axis, *axes) for axes in made]
        return steps + [c.axes for c in node.carried]


Found = Iterator[tuple[str, str]]
Rule = Callable[[Region], Found]


def verify(graph: Graph, level: Level) -> None:
    """Check a graph and its regions.

    Raises:
        VerifyError: a rule of the level does not hold.
    """
    messages: list[Message] = []
    pending = [Region(graph, level)]
    while pending:
        region = pending.pop(0)
        found: list[tuple[str, str]] = []
        for rule in RULES[region.level]:
            found += rule(region)
            if found and rule in STRUCTURE:
                break
        if not found:
            pending += _regions(region)
        # The first node that is wrong is the likeliest cause of what follows.
        places = {n.id: place for place, n in enumerate(region.graph.nodes)}
        found.sort(key=lambda f: places.get(f[0], -1))
        messages += [Message(region.path + id_, text) for id_, text in found]
    if messages:
        raise VerifyError(level, messages)


def _regions(region: Region) -> Iterator[Region]:
    for node in region.graph.nodes:
        path = f"{region.path}{node.id}/"
        if isinstance(node, N.Recur):
            yield Region(node.body, region.level, path, region.graph, node)
        elif isinstance(node, N.Attend):
            yield Region(node.body, region.level, path, region.graph, attend=node)
            for n, source in enumerate(node.sources):
                for name, graph in source.regions().items():
                    yield Region(graph, graph.level, f"{path}{n}/{name}/", attend=node)
        elif isinstance(node, T.Kernel):
            yield Region(node.body, node.body.level, path)
        elif isinstance(node, T.Halving):
            yield Region(node.body, node.body.level, path, region.graph, halving=node)
        elif isinstance(node, N.Param) and node.init is not None:
            # No pass touches an initial value: it stays at the level at which it was made.
            yield Region(node.init, node.init.level, path, initial=True)
        elif isinstance(node, N.Scan):  # what passes derive from a scan is each at its own level
            for name, graph in node.regions().items():
                yield Region(graph, graph.level, f"{path}{name}/", scan=node)
            for name, graph in node.prologue.regions().items() if node.prologue is not None else ():
                yield Region(graph, graph.level, f"{path}prologue/{name}/")


def _scans(region: Region) -> list[N.Scan]:
    return region.graph.of_kind(N.Scan)


def _minus(axes: tuple[str, ...], over: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(a for a in axes if a not in over)


def _shown(axes: tuple[str, ...] | set[str]) -> str:
    return ", ".join(axes if isinstance(axes, tuple) else sorted(axes)) or "no axis"


# -- every level: structure ------------------------------------------------------------------------------------------


def right_level(r: Region) -> Found:
    """The graph says that it is at the level."""
    if r.graph.level != r.level:
        yield "graph", f"its level is {r.graph.level}, not {r.level}"


def ids_unique(r: Region) -> Found:
    """No two nodes of a graph have one id, and none is empty."""
    seen: set[str] = set()
    for node in r.graph.nodes:
        if node.id in seen or not node.id:
            yield node.id, "the id is used twice" if node.id else "the id is empty"
        seen.add(node.id)


def operands_before(r: Region) -> Found:
    """Operands stand before their uses."""
    seen: set[str] = set()
    for node in r.graph.nodes:
        for arg in dict.fromkeys(node.operands()):
            if arg not in seen:
                yield node.id, f"its operand '{arg}' does not stand before it"
        seen.add(node.id)


def outputs_exist(r: Region) -> Found:
    """Outputs are nodes, under different names."""
    names: set[str] = set()
    for name, id_ in r.graph.outputs:
        if id_ not in r.graph.by_id:
            yield id_, f"output '{name}' is no node"
        if name in names:
            yield id_, f"output '{name}' is defined twice"
        names.add(name)


def axes_known(r: Region) -> Found:
    """Axes that nodes speak of are the graph's, and none stands twice in one tuple."""
    for axis in r.graph.axes:
        for other in (axis.space, axis.parent):
            if other is not None and other not in r.graph.axis:
                yield axis.name, f"axis '{other}' is unknown"
    for node in r.graph.nodes:
        groups: list[tuple[str, ...]] = []
        for field in axis_fields(type(node)):
            value = getattr(node, field)
            groups.append((value,) if isinstance(value, str) else value or ())
        if isinstance(node, N.Param | N.Capture):  # a weight from an axis to itself is over that axis twice
            groups = [tuple(dict.fromkeys(node.axes))]
        if isinstance(node, N.Recur):
            groups += [c.axes for c in node.carried]
        for group in groups:
            for a in dict.fromkeys(group):
                if a not in r.graph.axis:
                    yield node.id, f"axis '{a}' is unknown"
            if len(set(group)) < len(group):
                yield node.id, f"an axis stands twice in {_shown(group)}"


def in_place(r: Region) -> Found:
    """Kinds stand where they mean something; the axis that a body binds is in none of its values."""
    for node in r.graph.nodes:
        if isinstance(node, N.State) and r.recur is None or isinstance(node, N.Capture) and not (r.recur or r.attend):
            yield node.id, f"a {node.kind} stands only in a body"
        if r.attend is not None and not isinstance(node, PAIRWISE) and (r.outer or not isinstance(node, N.Input)):
            yield node.id, f"a {node.kind} stands in no attention"
        if isinstance(node, T.Half) and r.halving is None:
            yield node.id, "a half stands only in a halving's body"
        if isinstance(node, N.Random) and not r.initial:
            yield node.id, "random numbers stand only in an initial value"
        if isinstance(node, N.Input | N.Param) and (r.recur or r.outer or r.initial):
            yield node.id, f"a {node.kind} stands in no region"
        if isinstance(node, N.Recur | N.Scan) and r.initial:
            yield node.id, f"a {node.kind} stands in no initial value"
        if r.bound in node.axes:
            yield node.id, f"axis '{r.bound}' is bound here"


def results_through_out(r: Region) -> Found:
    """Nodes with several results are read by `out` (and `buffer`) nodes alone, each at an index that there is."""
    several = {n.id for n in r.graph.nodes if isinstance(n, SEVERAL)}
    for node in r.graph.nodes:
        if isinstance(node, N.GateGradient):
            continue
        if not isinstance(node, N.Out | T.Buffer):
            for arg in several.intersection(node.operands()):
                yield node.id, f"it reads '{arg}', which has several results, without an out"
            continue
        source = r.graph[node.arg]
        if source.id not in several:
            yield node.id, f"'{node.arg}' has one result"
            continue
        count = len(r.results(source))
        if not 0 <= node.index < count:
            yield node.id, f"there is no result {node.index}: '{node.arg}' has {count}"
    for name, id_ in r.graph.outputs:
        if id_ in several:
            yield id_, f"output '{name}' has several results"


def carried_right(r: Region) -> Found:
    """A recurrence's states have names of their own, values in the body, and initial values over their axes."""
    for node in r.graph.of_kind(N.Recur):
        names = [c.name for c in node.carried]
        if len(set(names)) < len(names):
            yield node.id, "two states have one name"
        for c in node.carried:
            if c.result not in node.body.by_id:
                yield node.id, f"state '{c.name}' becomes '{c.result}', which is no node of the body"
            elif node.body[c.result].axes != c.axes:
                yield node.id, (f"state '{c.name}' is over {_shown(c.axes)} and becomes a value over "
                                f"{_shown(node.body[c.result].axes)}")  # fmt: skip
            if c.initial is not None and not set(r.axes(c.initial)) <= set(c.axes):
                yield node.id, f"state '{c.name}' starts from a value over {_shown(r.axes(c.initial))}"
        missing = [id_ for _, id_ in node.body.outputs if id_ not in node.body.by_id]
        if missing:
            yield node.id, f"its result '{missing[0]}' is no node of the body"


def body_reads(r: Region) -> Found:
    """Captures read values that stand around the body; states are those that the recurrence carries."""
    if r.outer is None:
        return
    names = {c.name for c in r.recur.carried} if r.recur is not None else set()
    for node in r.graph.nodes:
        if isinstance(node, N.Capture) and node.outer not in r.outer.by_id:
            yield node.id, f"'{node.outer}' is no node around the body"
        if isinstance(node, N.State) and node.name not in names:
            yield node.id, f"the recurrence carries no state '{node.name}'"


def sources_right(r: Region) -> Found:
    """An attention's logits, values and masks are in its body, over its own axes and the rows'; rows are of a sequence
    that the query's axes lack; what is over both depends on both."""
    for node in r.graph.of_kind(N.Attend):
        if node.query is not None and node.query not in node.axes:
            yield node.id, f"its queries are over '{node.query}', and it is not"
        for source in node.sources:
            for id_, dtype in ((source.logit, "float"), (source.value, "float"), (source.mask, "bool")):
                if id_ is None:
                    continue
                if id_ not in node.body.by_id:
                    yield node.id, f"'{id_}' is no node of its body"
                    continue
                value = node.body[id_]
                if value.dtype != dtype and not (dtype == "float" and value.dtype == "int"):
                    yield node.id, f"'{id_}' is {value.dtype}, not {dtype}"
                if not set(value.axes) <= {*node.axes, source.axis}:
                    yield node.id, f"'{id_}' is over {_shown(value.axes)}, beyond {_shown(node.axes)} and its rows"
            if source.axis is not None and (not r.graph.axis[source.axis].is_sequence or source.axis in node.axes):
                yield node.id, f"rows over '{source.axis}', which is no sequence of their own"


# -- every level: axes -----------------------------------------------------------------------------------------------


def works_along(r: Region) -> Found:
    """The axes that a node works along are its operand's."""
    for node in r.graph.nodes:
        along: tuple[str, ...] = ()
        if isinstance(node, N.Reduce | N.Normalize | N.Linear):
            along = node.over
        elif isinstance(node, N.Expand | N.Rename):
            along = (node.source,)
        elif isinstance(node, N.Shift | N.Slice | N.Gather | N.Conv):
            along = (node.axis,)
        if isinstance(node, N.Scatter) and not set(r.axes(node.index)) <= set(r.axes(node.arg)):
            yield (
                node.id,
                f"its index is over {_shown(r.axes(node.index))}, its operand over {_shown(r.axes(node.arg))}",
            )
        for a in along:
            if a not in r.axes(node.arg):  # type: ignore[union-attr]
                yield node.id, f"it works along '{a}', and its operand is over {_shown(r.axes(node.arg))}"  # type: ignore[union-attr]


def sequences(r: Region) -> Found:
    """Shifts, convolutions, lengths and recurrences go along sequences; slices along fixed sizes."""
    for node in r.graph.nodes:
        if isinstance(node, N.Shift | N.Conv | N.Length | N.Scan) and not r.graph.axis[node.axis].is_sequence:
            yield node.id, f"axis '{node.axis}' is no sequence"
        if isinstance(node, N.Segment | N.Bounds) and r.graph.axis[node.chunk].kind != "chunk":
            yield node.id, f"axis '{node.chunk}' is cut from no sequence"
        chunk = getattr(node, "within", getattr(node, "chunk", None))
        if chunk is not None and r.graph.axis[chunk].parent is None:
            yield node.id, f"axis '{chunk}' divides no other"
        if isinstance(node, N.Slice) and r.graph.axis[node.axis].is_sequence:
            yield node.id, f"axis '{node.axis}' is a sequence"
        if isinstance(node, N.Rename) and r.graph.axis[node.source].space != r.graph.axis[node.target].space:
            yield node.id, f"'{node.target}' is no second name of '{node.source}'"
        if isinstance(node, N.Expand) and r.graph.axis[node.source].parent != node.target:
            yield node.id, f"'{node.source}' does not group '{node.target}'"


def map_axes(r: Region) -> Found:
    """A map is over the union of its operands' axes; `as` may bring more."""
    for node in r.graph.of_kind(N.Map):
        union = {a for arg in node.args for a in r.axes(arg)}
        have = set(node.axes)
        if node.fn == "as" and (len(node.args) != 1 or not union <= have):
            yield node.id, f"'as' takes one operand and keeps its axes {_shown(union)}"
        if node.fn != "as" and have != union:
            yield node.id, f"it is over {_shown(node.axes)}, and its operands are over {_shown(union)}"


def weight_axes(r: Region) -> Found:
    """Weights and biases have the axes of the product that they stand in."""
    for node in r.graph.of_kind(N.Linear, N.Conv):
        weight = r.axes(node.weight)
        if isinstance(node, N.Linear):
            good, bias = weight == (*node.over, *node.to), node.to
        else:
            bias = _minus(r.axes(node.arg), (node.axis,))
            good = weight[:-1] == bias and len(weight) == len(bias) + 1
        if not good:
            yield node.id, f"its weight is over {_shown(weight)}"
        if node.bias is not None and r.axes(node.bias) != bias:
            yield node.id, f"its bias is over {_shown(r.axes(node.bias))}, not {_shown(bias)}"


def result_axes(r: Region) -> Found:
    """A node's axes follow from its operands', in order."""
    for node in r.graph.nodes:
        wanted = _result(r, node)
        if wanted is not None and node.axes != wanted:
            yield node.id, f"it is over {_shown(node.axes)}, not {_shown(wanted)}"


def _result(r: Region, node: N.AnyNode) -> tuple[str, ...] | None:
    """The axes that a node must have; None where any do, or another rule says."""
    if isinstance(node, N.Const | N.Length | N.Segment | SEVERAL):
        return ()
    if isinstance(node, N.Bounds):
        parent = r.graph.axis[node.chunk].parent
        return (node.chunk,) if node.fn != "of" else (parent or "",)
    if isinstance(node, N.Coord):
        return _minus((node.axis,), (r.bound or "",))
    if isinstance(node, N.Reduce | N.Normalize | N.Shift | N.Conv | N.Expand | N.Rename | N.Slice | N.Linear):
        return moved_axes(node, r.axes(node.arg))
    if isinstance(node, N.Gather):
        return gather_axes(r.axes(node.arg), r.axes(node.index), node.axis)
    if isinstance(node, N.Out | T.Buffer):
        return r.results(r.graph[node.arg])[node.index]
    if isinstance(node, N.Capture) and r.outer is not None:
        return _minus(r.outer[node.outer].axes, (r.bound or "",))
    if isinstance(node, N.State) and r.recur is not None:
        return next(c.axes for c in r.recur.carried if c.name == node.name)
    return None


# -- semantic --------------------------------------------------------------------------------------------------------


def no_scan(r: Region) -> Found:
    """Scans are what normalising makes."""
    for node in _scans(r):
        yield node.id, "a scan stands only at the normal level"


def no_tiles(r: Region) -> Found:
    """Tiles and kernels stand below the normal level."""
    for node in r.graph.nodes:
        if type(node).__module__ == T.__name__:
            yield node.id, f"a {node.kind} does not stand at the level {r.level}"


# -- normal ----------------------------------------------------------------------------------------------------------


def recur_has_reason(r: Region) -> Found:
    """A recurrence that stays one says why."""
    for node in r.graph.of_kind(N.Recur):
        if not node.reason:
            yield node.id, "a recurrence that runs a token at a time has a reason"


def scan_sides(r: Region) -> Found:
    """A scan's batch axes and sides are disjoint, and together the state's axes; none is the axis that it runs over."""
    for node in _scans(r):
        axes = (node.axis, *node.batch, *node.i, *node.j)
        if len(set(axes)) < len(axes):
            yield node.id, f"the axis, batch, i and j share an axis: {_shown(axes)}"
        if set(node.declared) != {*node.batch, *node.i, *node.j}:
            yield node.id, f"its state is over {_shown(node.declared)}, not batch, i and j"


def scan_operands(r: Region) -> Found:
    """Gates and added values are over the scan's axes; an initial value has no sequence."""
    for node in _scans(r):
        state = {*node.batch, *node.i, *node.j}
        within = [(g.arg, state | {node.axis}) for g in node.gates]
        within += [(node.add, state | {node.axis})] if node.add is not None else []
        within += [(node.initial, state)] if node.initial is not None else []
        for arg, allowed in within:
            if not set(r.axes(arg)) <= allowed:
                yield node.id, f"its operand '{arg}' is over {_shown(r.axes(arg))}, beyond {_shown(allowed)}"


def scan_gates(r: Region) -> Found:
    """No gate is over axes of both sides."""
    for node in _scans(r):
        for gate in node.gates:
            axes = set(r.axes(gate.arg))
            if axes & set(node.i) and axes & set(node.j):
                yield node.id, f"the gate '{gate.arg}' is over axes of both sides: {_shown(axes)}"


def scan_writes(r: Region) -> Found:
    """A write's i side has no j axis, its j side no i axis."""
    for node in _scans(r):
        for write in node.writes:
            for side, arg, own in (("i", write.i, node.i), ("j", write.j, node.j)):
                if not set(r.axes(arg)) <= {node.axis, *node.batch, *own}:
                    yield node.id, f"a write's {side} side '{arg}' is over {_shown(r.axes(arg))}"


def scan_queries(r: Region) -> Found:
    """A query's argument is over batch axes and the side that it sums."""
    for node in _scans(r):
        for query in node.queries:
            own = node.i if query.side == "i" else node.j
            if not set(r.axes(query.arg)) <= {node.axis, *node.batch, *own}:
                yield node.id, f"a query of side {query.side}, '{query.arg}', is over {_shown(r.axes(query.arg))}"


def scan_vector(r: Region) -> Found:
    """A scan without sides is read by its trajectory; max-plus has no sides."""
    for node in _scans(r):
        vector = not (node.i or node.j)
        if vector and (node.writes or node.queries):
            yield node.id, "a scan without sides has no writes and no queries"
        if node.algebra == "max-plus" and not vector:
            yield node.id, "a max-plus scan has no sides"


def scan_regions(r: Region) -> Found:
    """Each graph derived from a scan takes its operands, and each operand has one gradient."""
    for node in _scans(r):
        count = len(node.arguments())
        for name, graph in node.regions().items():
            given = len(graph.of_kind(N.Input))
            if given <= count:
                yield node.id, f"its {name} has {given} inputs, too few for {count} operands"
        if node.backward is not None and len(node.backward.outputs) != count + 1:
            yield node.id, f"its backward has {len(node.backward.outputs)} gradients for {count} operands"


def scan_prologues(r: Region) -> Found:
    """A prologue takes its leaves and makes all operands; each leaf has one gradient. Leaves are laid out as the state
    is, token by token."""
    for node in _scans(r):
        if node.prologue is None:
            continue
        leaves, made = node.prologue.leaves, tuple(graph.outputs for graph in node.prologue.regions().values())
        inputs = [len(graph.of_kind(N.Input)) for graph in node.prologue.regions().values()]
        count = len(node.arguments())
        if inputs != [len(leaves), len(leaves) + count] or [len(m) for m in made] != [count, len(leaves)]:
            yield node.id, f"its prologue does not make {count} operands of {len(leaves)} leaves"
        for leaf in leaves:
            if not set(r.axes(leaf)) <= {node.axis, *node.batch, *node.i, *node.j}:
                yield node.id, f"a leaf of its prologue, '{leaf}', is over {_shown(r.axes(leaf))}"


def gate_gradients(r: Region) -> Found:
    """A gate's gradient is of a gate that there is, from a scan and a reversed scan over the same state."""
    for node in r.graph.of_kind(N.GateGradient):
        scan, adjoint = r.graph[node.scan], r.graph[node.adjoint]
        if not isinstance(scan, N.Scan) or not isinstance(adjoint, N.Scan) or adjoint.reverse == scan.reverse:
            yield node.id, f"'{node.scan}' and '{node.adjoint}' are no scan and its adjoint"
        elif (scan.batch, scan.i, scan.j) != (adjoint.batch, adjoint.i, adjoint.j):
            yield node.id, f"'{node.scan}' and '{node.adjoint}' have states over different axes"
        elif not 0 <= node.gate < len(scan.gates):
            yield node.id, f"'{node.scan}' has no gate {node.gate}"
        elif node.axes != r.axes(scan.gates[node.gate].arg):
            yield (
                node.id,
                f"it is over {_shown(node.axes)}, and its gate over {_shown(r.axes(scan.gates[node.gate].arg))}",
            )


STRUCTURE: tuple[Rule, ...] = (
    right_level, ids_unique, operands_before, outputs_exist, axes_known, in_place, carried_right, body_reads,
    results_through_out, sources_right,
)  # fmt: skip
COMMON: tuple[Rule, ...] = (*STRUCTURE, works_along, sequences, map_axes, weight_axes, result_axes)
RULES: dict[Level, tuple[Rule, ...]] = {
    "semantic": (*COMMON, no_scan, no_tiles),
    "normal": (
        *COMMON,
        no_tiles,
        recur_has_reason,
        scan_sides,
        scan_operands,
        scan_gates,
        scan_writes,
        scan_queries,
        scan_prologues,
        scan_vector,
        scan_regions,
        gate_gradients,
    ),  # fmt: skip
    "chunked": (*COMMON, *TILES),
    "fused": (*COMMON, *KERNELS),
}
