"""An attention's sources as PyTorch functions of one tile: their scores, their gradients, and which tiles are seen."""

from __future__ import annotations

import re
import textwrap

from chunkc.backends.attend import Bounds, Form, Seen, Tile
from chunkc.backends.body import Body
from chunkc.backends.layout import EACH, NOWHERE, held
from chunkc.backends.writer import Lines, Writer, identifier, is_name
from chunkc.ir import nodes as N
from chunkc.ir.graph import Graph, Unit


class Pairs(Body):
    """Emits a source's graph: a tile's queries and rows are dimensions like others, behind that of the sequences."""

    def __init__(self, unit: Unit, graph: Graph, form: Form, source: N.Source, lines: Lines) -> None:
        super().__init__(unit.evolve(graph=graph), lines, Writer(), "")
        self.form, self.source = form, source
        self.taken |= {"at", "at_rows", "d_logit", "d_value", "device"}
        for n in form.inputs(source):
            self.names[n.id] = self.fresh(n.name if is_name(n.name) else "x")
        self.operands = list(self.names.values())
        self.cotangents = {n.id: n.name for n in graph.of_kind(N.Input) if n.id not in self.names}
        self.names |= self.cotangents

    def is_sequence(self, axis: str) -> bool:
        return False

    def own(self, axes: tuple[str, ...]) -> tuple[str, ...]:
        return axes

    def per_sequence(self, graph: Graph, node: N.AnyNode) -> bool:
        if isinstance(node, N.Input):
            return node.id in self.cotangents or not self.form.shared(node.name)
        if isinstance(node, N.Coord | N.Bounds):
            return self.is_place(node)
        return super().per_sequence(graph, node)

    def is_place(self, node: N.AnyNode) -> bool:
        """Whether a node is the position of a query or of a row."""
        return isinstance(node, N.Bounds) or isinstance(node, N.Coord) and self.graph.axis[node.axis].is_sequence

    def lead(self, home: str) -> list[str]:
        return [] if home == NOWHERE else ["at.shape[0]"]

    def shape(self, axes: tuple[str, ...], home: str = NOWHERE) -> str:
        places = {self.form.query: "at.shape[1]", self.source.axis: "at_rows.shape[1]"}
        parts = [*self.lead(home), *(places.get(a, a) for a in axes)]
        return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"

    def inline(self, graph: Graph, node: N.AnyNode, users: list[N.AnyNode], kept: set[str]) -> bool:
        return isinstance(node, N.Coord | N.Bounds) or super().inline(graph, node, users, kept)

    def expression(self, graph: Graph, node: N.AnyNode) -> tuple[str, int]:
        if self.is_place(node):
            return "at" if node.axes == (self.form.query,) else "at_rows", 9
        return super().expression(graph, node)

    def emit(self) -> None:
        kept = {id_ for _, id_ in self.graph.outputs}
        users = self.users_in(self.graph)
        for node in self.graph.nodes:
            if not isinstance(node, N.Input) and not self.inline(self.graph, node, users[node.id], kept):
                self.assign(self.graph, node)

    def laid(self, id_: str, axes: tuple[str, ...]) -> str:
        """A result over these axes behind the sequences, a dimension of 1 where it lacks one."""
        home = self.home(self.graph, id_)
        text, rank = self.aligned(self.graph, id_, axes, home)
        if self.number(self.graph, id_):
            text, rank = f"torch.full((), {text}, dtype={self.dtype(self.graph[id_])}, device=device)", 9
        return f"wide({text}, {len(axes) + 1})" if home == NOWHERE else held(text, rank, 0)

    def scores(self) -> list[str]:
        """The texts of logit, value and mask."""
        found = dict(self.graph.outputs)
        wanted = (self.form.query or "", self.source.axis or "", *self.form.heads)
        axes = {"logit": wanted, "value": self.form.value_axes(self.source), "mask": wanted}
        return [self.laid(found[x], axes[x]) if x in found else "None" for x in axes]

    def gradients(self) -> list[str]:
        """The text of each operand's gradient."""
        found = dict(self.graph.outputs)
        out = []
        for n in self.form.inputs(self.source):
            id_ = found.get(f"d_{n.name}", "")
            if not id_:
                out.append("None")
                continue
            home = self.home(self.graph, id_)
            text, rank = self.aligned(self.graph, id_, n.axes, home)
            out.append(f"{held(text, rank, 9)}.sum(0)" if home == EACH and self.form.shared(n.name) else text)
        return out

    def squeezed(self) -> list[str]:
        """What is given over queries and rows, without the dimension that the source has not."""
        form, source = self.form, self.source
        pair = ":, " * (form.query is not None) + "0, " * (form.query is None)
        pair += ":" if source.axis is not None else "0"
        if form.query is not None and source.axis is not None:
            return []
        lines = [f"d_logit = d_logit[:, {pair}]"]
        return lines + ([f"d_value = d_value[:, {pair}]"] if form.paired(source) and source.value is not None else [])

    # -- tiles that are seen -----------------------------------------------------------------------------------------

    def seen(self) -> Seen:
        """How it is decided whether two tiles see each other."""
        return Seen(self.graph, self.leaf, lambda n: n.size.text(9, self.known()), "larger")  # type: ignore[arg-type]

    def mask(self) -> str:
        """The text of which pairs of a tile are seen."""
        wanted = (self.form.query or "", self.source.axis or "", *self.form.heads)
        return self.laid(dict(self.graph.outputs)["mask"], wanted)

    def leaf(self, node: N.AnyNode) -> Bounds | None:
        if not (isinstance(node, N.Input) or self.is_place(node)):
            return None
        text = self.names.get(node.id) or self.expression(self.graph, node)[0]
        return Bounds(f"{text}[0]", f"{text}[1]")


def attentions(unit: Unit, prefix: str, lines: Lines) -> dict[str, list[Tile]]:
    """For each attention of a unit the functions of its sources; `prefix` tells units of one module apart."""
    outer = Body(unit, lines, Writer(), "")
    out = {}
    for node in unit.graph.of_kind(N.Attend):
        form, name = Form(outer, node), f"{prefix}{identifier(node.id)}"
        numbers = [f"_{k + 1}" for k in range(len(node.sources))] if len(node.sources) > 1 else [""]
        out[node.id] = [_tile(unit, form, source, name + n, lines) for source, n in zip(node.sources, numbers)]
    return out


def _tile(unit: Unit, form: Form, source: N.Source, name: str, lines: Lines) -> Tile:
    assert source.scores is not None and source.gradients is not None, "the attention was not differentiated"
    bodies: dict[str, tuple[list[str], str]] = {}
    first = Pairs(unit, source.scores, form, source, lines)
    first.emit()
    bodies["scores"] = first.w.lines, ", ".join(first.scores())
    second = Pairs(unit, source.gradients, form, source, lines)
    second.emit()
    bodies["gradients"] = (
        [*second.squeezed(), *second.w.lines],
        f"({''.join(x + ', ' for x in second.gradients()).strip()})",
    )
    seen = "True"
    if source.mask is not None:
        mask = dict(source.scores.outputs)["mask"]
        third = Pairs(unit, source.scores.evolve(outputs=(("mask", mask),)).pruned(), form, source, lines)
        seen = third.seen().holds(mask)
        if third.seen().opaque(mask):
            third.emit()
            bodies["mask"] = third.w.lines, third.mask()
    if seen not in ("True", "False"):
        bodies["seen"] = [], seen
    everything = "\n".join(x for body, result in bodies.values() for x in [*body, result])
    words = set(re.findall(r"(?<![.\w])[A-Za-z_]\w*", everything))
    known = [*(p.name for p in unit.params), *(a.name for a in unit.graph.axes if a.kind == "size")]
    sizes = [n for n in dict.fromkeys(known) if n in words]
    w, words = Writer(), set(re.findall(r"(?<![.\w])[A-Za-z_]\w*", seen))
    compared = [k for k, o in enumerate(first.operands) if o in words]
    floats = [o for o, n in zip(first.operands, form.inputs(source)) if n.dtype == "float"]
    for kind, (body, result) in bodies.items():
        operands = first.operands if kind != "seen" else [first.operands[k] for k in compared]
        _function(w, f"{name}_{kind}", kind, sizes, operands, floats, body, result, lines.place(form.node.span))
    seen_name, mask_name = (f"{name}_{kind}" if kind in bodies else "None" for kind in ("seen", "mask"))
    return Tile(f"{name}_scores", f"{name}_gradients", seen_name, mask_name, compared, sizes, w.text())


_RESULT = {
    "scores": "tuple[Tensor, Tensor | None, Tensor | None]",
    "gradients": "tuple[Tensor | None, ...]",
    "mask": "Tensor",
    "seen": "Any",
}
_DOC = {
    "scores": "A tile's logits, values and mask",
    "gradients": "The operands' gradients, from those of a tile's logits and values",
    "mask": "Which pairs of a tile are seen",
    "seen": "Whether some query of a tile may see some row of another, from least and most values",
}


def _function(w: Writer, name: str, kind: str, sizes: list[str], operands: list[str], floats: list[str],
              body: list[str], result: str, place: str) -> None:  # fmt: skip
    of = "tuple[Any, Any]" if kind == "seen" else "Tensor"
    given = [*(f"{s}: Any" for s in sizes), *(f"{x}: {of}" for x in ("at", "at_rows", *operands))]
    given += ["d_logit: Tensor", "d_value: Any"] if kind == "gradients" else []
    w(f"def {name}(")
    for line in textwrap.wrap(", ".join(x.replace(" ", "\0") for x in given), 110):
        w(f"    {line}".replace("\0", " ") + ("" if line.endswith(",") else ","))
    with w.indented(f") -> {_RESULT[kind]}:"):
        w(f'"""{_DOC[kind]} ({place})."""')
        if kind != "seen" and any(re.search(r"\b(ct|device)\b", x) for x in [*body, result]):
            w(f"ct, device = {f'{floats[0]}.dtype' if floats else 'torch.float32'}, at.device")
        for line in body:
            w(line)
        w(f"return {result}")
    w()
    w()
