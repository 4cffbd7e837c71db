"""A graph: an ordered tuple of nodes at one level, with named outputs and the axes they speak of."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic_core.core_schema import is_instance_schema

from chunkc.ir import nodes as N
from chunkc.ir import tiles as T
from chunkc.ir.axes import Axis, Frozen, Size
from chunkc.ir.diagnostics import Span

if TYPE_CHECKING:
    import networkx
    from pydantic import GetCoreSchemaHandler
    from pydantic_core import CoreSchema

Level = Literal["semantic", "normal", "chunked", "fused"]


class Parameter(Frozen):
    """A parameter of a layer or op: given when it is constructed or called."""

    name: str
    type: Literal["int", "float", "bool"]
    default: int | float | bool | None = None


class _Made:
    """Says of a field that its values are nodes already: pydantic need not know how each kind would be made."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return is_instance_schema(N.Node)


class Graph(Frozen):
    """Nodes in an order in which operands stand before their uses; `outputs` pairs names with ids.

    A node's regions (a recurrence's body, a parameter's initial value) are graphs themselves."""

    level: Level = "semantic"
    nodes: tuple[Annotated[N.AnyNode, _Made()], ...] = ()
    outputs: tuple[tuple[str, str], ...] = ()
    axes: tuple[Axis, ...] = ()

    @cached_property
    def by_id(self) -> dict[str, N.AnyNode]:
        return {n.id: n for n in self.nodes}

    @cached_property
    def axis(self) -> dict[str, Axis]:
        return {a.name: a for a in self.axes}

    def __getitem__(self, id_: str) -> N.AnyNode:
        return self.by_id[id_]

    def users(self) -> dict[str, list[N.AnyNode]]:
        """For each id, the nodes that read it."""
        out: dict[str, list[N.AnyNode]] = {n.id: [] for n in self.nodes}
        for node in self.nodes:
            for arg in dict.fromkeys(node.operands()):
                out[arg].append(node)
        return out

    def reachable(self, roots: Iterable[str]) -> set[str]:
        """The ids that the roots depend on, themselves included."""
        seen: set[str] = set()
        stack = list(roots)
        while stack:
            id_ = stack.pop()
            if id_ not in seen:
                seen.add(id_)
                stack.extend(self.by_id[id_].operands())
        return seen

    def pruned(self, finals: Iterable[str] = ()) -> Graph:
        """Without the nodes that no output and no final state needs; inputs and parameters stay, as the interface, and
        chunks, since nodes name their axis."""
        roots = [id_ for _, id_ in self.outputs] + [n.id for n in self.nodes if isinstance(n, N.Segment)]
        keep = self.reachable([*roots, *(id_ for id_ in finals if id_ in self.by_id)])
        nodes = tuple(n for n in self.nodes if n.id in keep or isinstance(n, N.Input | N.Param))
        return self if len(nodes) == len(self.nodes) else self.evolve(nodes=nodes)

    def pruned_keeping(self, ids: Iterable[str]) -> Graph:
        """Without the nodes that neither an output nor one of the ids needs."""
        keep = self.reachable([*(id_ for _, id_ in self.outputs), *ids])
        return self.evolve(nodes=tuple(n for n in self.nodes if n.id in keep))

    def of_kind(self, *kinds: type[Any]) -> list[Any]:
        return [n for n in self.nodes if isinstance(n, kinds)]

    def as_networkx(self) -> networkx.MultiDiGraph:
        """A fresh graph for algorithms: an edge an operand slot."""
        import networkx

        g = networkx.MultiDiGraph()
        g.add_nodes_from(n.id for n in self.nodes)
        for node in self.nodes:
            g.add_edges_from((arg, node.id, {"slot": i}) for i, arg in enumerate(node.operands()))
        return g


class Parallel(Frozen):
    """How the ranks of a mesh share a unit's sequences: they cut `axis` over the mesh's axis `over`, each having one
    piece (contiguous) or one from either end (zigzag)."""

    mesh: tuple[str, ...]
    axis: str
    over: str
    layout: Literal["contiguous", "zigzag"]
    span: Span


class Schedule(Frozen):
    """What a unit demands of how it is computed. `set_aside` names the layers and ops that it calls whose own demands
    give way to these.

    `prefix_invariant`: a sequence cut short leaves what recurrences give for the tokens before bitwise as it was."""

    prefix_invariant: bool = False
    set_aside: tuple[str, ...] = ()
    span: Span | None = None

    def demands(self) -> dict[str, bool]:
        """The settings by name."""
        return {"prefix_invariant": self.prefix_invariant}


class Unit(Frozen):
    """A layer or op: its interface and its graph; `looks_ahead` names the outputs that are not causal."""

    kind: Literal["layer", "op"]
    name: str
    causal: bool = False
    doc: str = ""
    params: tuple[Parameter, ...] = ()
    inputs: tuple[str, ...] = ()
    looks_ahead: tuple[str, ...] = ()
    span: Span
    parallel: Parallel | None = None
    schedule: Schedule = Schedule()
    graph: Graph


class Module(Frozen):
    """What a spec file defines, in order; `file` is its name in diagnostics and comments."""

    file: str
    units: tuple[Unit, ...]


for _model in (N.Param, N.Recur, N.Prologue, N.Scan, N.Source, N.Attend, T.Halving, T.Kernel):
    _model.model_rebuild(_types_namespace={"Graph": Graph})
Graph.model_rebuild()


class Builder:
    """Adds nodes to a graph under construction; equal nodes are one node.

    Ids are the names the spec gives, or the kind with a number: they are what emitted code and diagnostics show."""

    def __init__(self, level: Level = "semantic", axes: Iterable[Axis] = ()) -> None:
        self.level: Level = level
        self.axes: dict[str, Axis] = {a.name: a for a in axes}
        self.nodes: dict[str, Any] = {}
        self._known: dict[Any, str] = {}
        self._counts: dict[str, int] = {}

    def fresh(self, hint: str) -> str:
        """An unused id that starts with the hint."""
        if hint not in self.nodes and hint not in self._counts:
            self._counts[hint] = 0
            return hint
        while True:
            self._counts[hint] = self._counts.get(hint, 0) + 1
            name = f"{hint}_{self._counts[hint]}"
            if name not in self.nodes:
                return name

    def add(self, cls: type[Any], hint: str = "", span: Span | None = None, **fields: Any) -> str:
        """Add a node unless an equal one stands already; the id of the node."""
        probe = cls(id="", span=None, **fields)
        key = repr(probe)
        if key in self._known and cls not in (N.Input, N.Param, N.Random):
            return self._known[key]
        id_ = self.fresh(hint or probe.kind)
        self.nodes[id_] = probe.evolve(id=id_, span=span)
        self._known[key] = id_
        return id_

    def like(self, node: N.Node, hint: str = "") -> str:
        """Add a node like this one."""
        fields = {f: getattr(node, f) for f in type(node).model_fields if f not in ("id", "span", "kind")}
        return self.add(type(node), hint or node.id, node.span, **fields)

    def find(self, cls: type[Any], **fields: Any) -> str | None:
        """The id of the node with these fields, if it stands."""
        return self._known.get(repr(cls(id="", span=None, **fields)))

    def const(self, value: int | float | Size, span: Span | None = None, whole: bool = False) -> str:
        """A number; `whole` says that one over parameters is an integer."""
        size = value if isinstance(value, Size) else Size.of(value)
        if size.op != "const" and not size.params():
            size = Size.of(size.evaluate({}))
        if size.op == "const":
            kind = "int" if isinstance(size.value, int) and not isinstance(size.value, bool) else "float"
        else:
            kind = "int" if whole else "float"
        return self.add(N.Const, span=span, size=size, dtype=kind)

    def union(self, ids: Iterable[str]) -> tuple[str, ...]:
        """The operands' axes, those of the operand with most axes first, in order."""
        ordered = sorted((self.nodes[i].axes for i in ids), key=len, reverse=True)
        axes = tuple(dict.fromkeys(a for axes in ordered for a in axes))
        return tuple(sorted(axes, key=lambda a: self.axes[a].kind == "size" if a in self.axes else True))

    def map(self, fn: str, *args: str, span: Span | None = None, hint: str = "") -> str:
        """An elementwise node; its type follows from the function and the operands."""
        dtypes = [self.nodes[a].dtype for a in args]
        if fn in ("+", "*") and len(args) == 2:  # the same operation with its operands the other way round
            axes, dtype = self.union(args[::-1]), map_dtype(fn, dtypes)
            swapped = self.find(N.Map, fn=fn, args=args[::-1], axes=axes, dtype=dtype)
            if swapped is not None:
                return swapped
        return self.add(N.Map, hint or fn, span, fn=fn, args=args, axes=self.union(args), dtype=map_dtype(fn, dtypes))

    def gather(self, arg: str, index: str, axis: str, span: Span | None = None, hint: str = "") -> str:
        """`arg[axis = index]`, of the operand's type."""
        axes = gather_axes(self.nodes[arg].axes, self.nodes[index].axes, axis)
        return self.add(N.Gather, hint, span, arg=arg, index=index, axis=axis, dtype=self.nodes[arg].dtype, axes=axes)

    def graph(self, outputs: Iterable[tuple[str, str]]) -> Graph:
        return Graph(
            level=self.level,
            nodes=tuple(self.nodes.values()),
            outputs=tuple(outputs),
            axes=tuple(self.axes.values()),
        )


def moved_axes(node: N.AnyNode, arg: tuple[str, ...]) -> tuple[str, ...] | None:
    """The axes of a node that has one tensor operand over `arg`; None for other kinds."""
    if isinstance(node, N.Reduce):
        return ((node.chunk,) if node.chunk else ()) + tuple(a for a in arg if a not in node.over)
    if isinstance(node, N.Normalize | N.Shift | N.Conv):
        return arg
    if isinstance(node, N.Expand | N.Rename):
        return tuple(node.target if a == node.source else a for a in arg)
    if isinstance(node, N.Slice):
        return tuple(a for a in arg if a != node.axis)
    if isinstance(node, N.Linear):
        return (*(a for a in arg if a not in node.over), *node.to)
    return None


def gather_axes(arg: tuple[str, ...], index: tuple[str, ...], axis: str) -> tuple[str, ...]:
    """The axes of `arg[axis = index]`: the operand's, with those that only the index has in the place of the axis."""
    rest = tuple(a for a in arg if a != axis)
    new = tuple(a for a in index if a not in rest)
    at = arg.index(axis) if axis in arg else len(arg)
    return (*rest[:at], *new, *rest[at:])


# Functions of real numbers that kernels have, and whose derivatives they have.
ELEMENTWISE = frozenset(
    ("+", "-", "*", "/", "neg", "as", "exp", "log", "tanh", "sigmoid", "silu", "gelu", "relu", "softplus", "logsigmoid",
     "abs", "sin", "cos", "erf", "min", "max")
)  # fmt: skip
COMPARISONS = ("<", "<=", ">", ">=", "==", "!=")
LOGICAL = ("and", "or", "not")


def map_dtype(fn: str, dtypes: list[str]) -> str:
    """The element type of an elementwise function's result."""
    if fn in COMPARISONS or fn in LOGICAL:
        return "bool"
    if fn in ("floor", "cast_int"):
        return "int"
    if fn == "where":
        dtypes = dtypes[1:]
    if fn in ("re", "im") or fn == "abs" and "complex" in dtypes:
        return "float"
    if fn == "complex" or "complex" in dtypes:
        return "complex"
    if fn in ("+", "-", "*", "%", "neg", "min", "max", "abs", "where", "stop") and set(dtypes) <= {"int", "bool"}:
        return "int"
    return "float"
