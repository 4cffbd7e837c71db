"""What back ends need to know of elementwise scans: which are walked over together, of which leaves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

from chunkc.backends.operations import is_sharded
from chunkc.backends.scan import EMITTED
from chunkc.backends.writer import Lines, Writer, identifier, is_name, unused
from chunkc.ir import nodes as N
from chunkc.ir.graph import Graph, Unit
from chunkc.ir.updates import absorbed, update_of

# Names that kernels of elementwise scans use for themselves: a leaf of such a name gets a number behind it.
_EMITTED = """
seq tokens initial last out dtype ct device state states after before part row col has start stop length cell whole
tiles edge done base place read h g gate add decay total bounds step flow down W D C BD AFTER AI AJ BQ BR LIMIT
GATE_PARTS vector_scan walks
"""


@dataclass(frozen=True)
class State:
    """A scan of a group: what stands behind its names in kernels, and by which work its operands are made of leaves,
    whose names are by position; `gate` and `add` are the work's results."""

    suffix: str
    prologue: N.Prologue
    leaves: tuple[str, ...]
    gate: str | None
    add: str | None

    def name(self, role: str) -> str:
        return f"{role}{self.suffix}"


@dataclass(frozen=True)
class VectorForm:
    """Elementwise scans that one kernel walks over, since their operands are made of the same leaves.

    `leaves`: names by the node in the unit's graph; `numbers`: what the work takes of parameters, names by text;
    `after`: whether the states are read after the update."""

    name: str
    scans: tuple[N.Scan, ...]
    states: tuple[State, ...]
    leaves: dict[str, str]
    numbers: dict[str, str]
    after: bool

    def names(self, role: str) -> list[str]:
        return [s.name(role) for s in self.states]

    def function(self, w: Writer) -> AbstractContextManager[None]:
        """The head of `NAME_scan`, which both back ends have; its statements are written inside."""
        tensors = [f"{n}: Tensor" for n in self.leaves.values()]
        tensors += [f"{n}: Tensor | None" for n in self.names("initial")]
        numbers = [f"{n}: float" for n in self.numbers.values()]
        w(f"def {self.name}_scan(")
        w(f"    seq: Sequences, {', '.join([*tensors, 'dtype: torch.dtype', *numbers])},")
        return w.indented(") -> tuple[Tensor | None, ...]:")

    def doc(self, lines: Lines) -> str:
        states, when = ", ".join(s.name for s in self.scans), "after" if self.after else "before"
        place = lines.place(self.scans[0].span)
        made = f"({place}); operands are made here. From zero, and without a last one, if none is given."
        return f"{states} {when} each token [B, T, H, D], and the last [N, H, D] {made}"

    def number(self, node: N.Const) -> str:
        """A number's text, or the name of one that depends on parameters."""
        return self.numbers.get(node.size.text(), node.size.text())


def _outputs(scan: N.Scan, prologue: N.Prologue) -> tuple[str | None, str | None]:
    """The ids of the gate and of the added value among a prologue's values."""
    made = [id_ for _, id_ in prologue.values.outputs]
    gate = made.pop(0) if scan.gates else None
    return gate, made.pop(0) if scan.add is not None else None


def _groups(graph: Graph, scans: list[N.Scan]) -> Iterator[list[N.Scan]]:
    """Scans beside each other that run over the same tokens, of leaves that they share, none needing another."""
    places = {n.id: k for k, n in enumerate(graph.nodes)}
    groups: list[list[N.Scan]] = []
    walks = {s.id: _walk(graph, s) for s in scans}
    for scan in scans:
        for group in groups:
            first = group[0]
            between = graph.nodes[places[first.id] : places[scan.id]]
            if (
                walks[first.id] == walks[scan.id]
                and set(_leaves(first)) & set(_leaves(scan))
                and not any(isinstance(n, N.Segment | N.Recur) for n in between)
                and not {s.id for s in group} & {n for leaf in _leaves(scan) for n in graph.reachable([leaf])}
            ):
                group.append(scan)
                break
        else:
            groups.append([scan])
    return iter(groups)


def _walk(graph: Graph, scan: N.Scan) -> tuple[object, ...]:
    """What scans have in common that one kernel walks over."""
    return scan.axis, scan.within, scan.batch, scan.declared, scan.stop, bool(update_of(graph, scan))


def _leaves(scan: N.Scan) -> tuple[str, ...]:
    assert scan.prologue is not None
    return scan.prologue.leaves


def vector_forms(unit: Unit, prefix: str = "") -> list[VectorForm]:
    """The elementwise scans of a unit that have kernels of their own: all of real numbers, but for those of which ranks
    share the sequence."""
    graph = unit.graph
    own = [s for s in graph.of_kind(N.Scan) if s.prologue is not None and not is_sharded(unit, s.axis)]
    taken = {identifier(prefix + s.name) for s in graph.of_kind(N.Scan) if s not in own}
    return [_form(graph, group, unused(identifier(prefix + "_".join(s.name for s in group)), taken))
            for group in _groups(graph, own)]  # fmt: skip


def _form(graph: Graph, group: list[N.Scan], name: str) -> VectorForm:
    roles = _EMITTED.split()
    taken = {
        *EMITTED,
        *roles,
        *(f"{r}_{k}" for r in (*roles, "x", "d_last", "d_initial", "h_before") for k in range(len(group))),
    }
    taken |= {"d_last", "d_initial", "h_before"}
    leaves: dict[str, str] = {}
    numbers: dict[str, str] = {}
    for id_ in dict.fromkeys(leaf for scan in group for leaf in _leaves(scan)):
        named = is_name(id_) and not id_.startswith(("scan", "expand", "map", "linear"))
        leaves[id_] = unused(identifier(id_) if named else "leaf", taken)
        taken |= {f"d_{leaves[id_]}", f"edge_{leaves[id_]}"}
    states = []
    for k, scan in enumerate(group):
        prologue = scan.prologue
        assert prologue is not None
        for node in (*prologue.values.of_kind(N.Const), *prologue.gradients.of_kind(N.Const)):
            if node.size.params() and node.size.text() not in numbers:
                numbers[node.size.text()] = unused("number", taken)
        suffix = f"_{k}" if len(group) > 1 else ""
        states.append(State(suffix, prologue, tuple(leaves[x] for x in prologue.leaves), *_outputs(scan, prologue)))
    return VectorForm(name, tuple(group), tuple(states), leaves, numbers, bool(update_of(graph, group[0])))


def inside(graph: Graph, form: VectorForm) -> set[str]:
    """The nodes of a unit's graph that the scans of a form make themselves."""
    found = {n.id for s in form.scans for n in absorbed(graph, s) if not isinstance(n, N.Const)}
    return found | {id_ for s in form.scans for id_ in update_of(graph, s)}


def _plain() -> VectorForm:
    """h = a * h + b of tensors a and b."""
    inputs = tuple(N.Input(id=n, name=n, axes=("t", "d")) for n in ("a", "b", "d_a", "d_b"))
    values = Graph(level="normal", nodes=inputs[:2], outputs=(("a", "a"), ("b", "b")), axes=())
    gradients = Graph(level="normal", nodes=inputs, outputs=(("d_a", "d_a"), ("d_b", "d_b")), axes=())
    prologue = N.Prologue(leaves=("a", "b"), values=values, gradients=gradients)
    return VectorForm("vector", (), (State("", prologue, ("a", "b"), "a", "b"),), {"a": "a", "b": "b"}, {}, False)


PLAIN = _plain()
