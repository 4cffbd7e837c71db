"""Which peers a part is compared with, and whether they compute the same: a peer's definition and the part are run on
one short sequence in float64, for every way to hand the part's operands to the peer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from chunkc.bench.draws import Operand, operands, weights
from chunkc.bench.masks import Mask, NotOfPositions, mask_of
from chunkc.bench.parts import Part
from chunkc.bench.peers import PEERS, Extra, Peer, falling_decays
from chunkc.bench.roles import Roles, factors, roles_of, timed
from chunkc.bench.sizes import Sizes
from chunkc.interp import Interpreter, Run
from chunkc.ir import nodes as N
from chunkc.ir.graph import Graph
from chunkc.ir.ranges import Ranges

SHORT = 7  # tokens that tell one function from another
CLOSE = 1e-9
SAME, READY, OTHER = "same function", "same function, its operands ready", "same shapes, other function"
DENSE = ("sdpa", "sdpa.flash", "sdpa.cudnn")
GATED = {"": "fla.chunk_linear_attn", "H": "fla.chunk_simple_gla", "TH": "fla.chunk_simple_gla", "THK": "fla.chunk_gla"}


@dataclass(frozen=True)
class Choice:
    """A value of the part as an operand of a peer; `log` takes its logarithm."""

    id: str
    log: bool = False


@dataclass(frozen=True)
class Match:
    """A peer that runs beside a part: on which operands, and what that compares."""

    peer: Peer
    compared: str
    operands: tuple[Operand, ...]
    scale: float


class Matcher:
    """A part on one short sequence, in float64."""

    def __init__(self, part: Part, sizes: Sizes, seed: int) -> None:
        self.part, self.sizes, self.unit = part, sizes, part.unit
        self.graph: Graph = part.unit.graph
        self.roles: Roles | None = roles_of(self.graph)
        self.short = sizes.short(SHORT)
        given = [*operands(self.unit, self.short, batched=False), *weights(self.unit, self.short)]
        tensors = {o.name: o.draw(seed, dtype=torch.float64) for o in given}
        self.machine = Interpreter(self.graph, Run(sizes.settings, tensors, self.short.lengths))
        self.ranges = Ranges(self.graph.by_id)

    def matches(self, asked: tuple[str, ...] = ()) -> list[Match]:
        """The peers that are the same function, and for shapes alone those asked for, or the nearest one and dense
        attention."""
        if self.roles is None or any(
            self.graph.axis[a].kind == "chunk" for _, axes in self.roles.letters for a in axes
        ):
            return []
        found = [m for m in map(self.same, PEERS) if m is not None]
        names = {m.peer.name for m in found}
        near = asked or (DENSE if found else self.near())
        nearest = [m for p in PEERS if p.name not in names and p.name in near if (m := self.shaped(p))]
        return found + list({m.peer.name: m for m in nearest}.values())

    def near(self) -> tuple[str, ...]:
        """The peers whose shapes are compared where their function is another."""
        assert self.roles is not None
        if self.roles.kind != "scan":
            return DENSE
        return (GATED.get(self.gate_letters(), "fla.chunk_gla"), *DENSE)

    # -- the same function ---------------------------------------------------------------------------------------------

    def same(self, peer: Peer) -> Match | None:
        """How the peer computes the part's only output, if it does."""
        assert self.roles is not None
        if peer.kind != self.roles.kind or len(self.graph.outputs) != 1:
            return None
        extra = self.extra(self.short)
        if extra is None or peer.name.startswith("sdpa") and self.rule() == "other":
            return None
        wanted = self.value(self.graph.outputs[0][1], "T" + "HV")
        if wanted is None or not bool(torch.isfinite(wanted).all()):
            return None
        for chosen in self.assignments(peer):
            values = {role: self.operand(c, peer.operands[role]) for role, c in chosen.items()}
            tensors = {role: x for role, x in values.items() if x is not None}
            if len(tensors) < len(chosen):
                continue
            for scale in self.scales(peer, tensors, extra, wanted):
                have = peer.definition(tensors, replace(extra, scale=scale))
                if (have - wanted).norm() <= CLOSE * wanted.norm():
                    computed = any(self.computed(c) for c in chosen.values())
                    described = tuple(self.described(r, c, peer.operands[r]) for r, c in chosen.items())
                    return Match(peer, READY if computed else SAME, described, scale)
        return None

    def computed(self, choice: Choice) -> bool:
        """Whether the part computes an operand from its inputs, so that it does more than the peer."""
        node = self.graph[choice.id]
        made = any(isinstance(self.graph[id_], N.Input) for id_ in self.graph.reachable([node.id]))
        return made and (choice.log or not isinstance(node, N.Input))

    def scales(self, peer: Peer, tensors: Mapping[str, Tensor], extra: Extra, wanted: Tensor) -> list[float]:
        """The factors that a peer may take: of an output the only one that fits, of a logit those in the spec."""
        if peer.kind == "attention":
            assert self.roles is not None
            node = self.graph[self.roles.node]
            assert isinstance(node, N.Attend)
            sizes = [n.size.evaluate(self.sizes.settings) for n in node.body.of_kind(N.Const)]
            return list(dict.fromkeys([1.0, *(float(s) for s in sizes if s > 0)]))
        have = peer.definition(tensors, replace(extra, scale=1.0))
        square = float((have * have).sum())
        return [float((have * wanted).sum()) / square] if square and math.isfinite(square) else []

    def extra(self, sizes: Sizes) -> Extra | None:
        """What an attention's peer needs beside operands; None if the mask is not one of positions."""
        mask = None
        if self.roles is not None and self.roles.kind == "attention":
            try:
                mask = mask_of(self.unit, self.roles, sizes)
            except NotOfPositions:
                return None
        return Extra(self.usual_scale(), mask)

    def mask(self) -> Mask | None:
        extra = self.extra(self.sizes)
        return None if extra is None else extra.mask

    def rule(self) -> str:
        mask = self.mask()
        return "other" if mask is None else mask.rule()

    def usual_scale(self) -> float:
        assert self.roles is not None
        return float(self.count("K") ** -0.5)

    # -- operands ------------------------------------------------------------------------------------------------------

    def assignments(self, peer: Peer) -> Iterator[dict[str, Choice]]:
        """Every way to hand the part's values to the peer's operands, its inputs first."""
        choices = [sorted(self.choices(r, letters), key=self.computed) for r, letters in peer.operands.items()]
        for chosen in itertools.product(*choices):
            if len({c.id for c in chosen}) == len(chosen):
                yield dict(zip(peer.operands, chosen))

    def choices(self, role: str, letters: str) -> list[Choice]:
        """The part's values that may be an operand."""
        assert self.roles is not None
        graph, node = self.graph, self.graph[self.roles.node]
        if role == "u":
            own = {*self.roles.axes("H"), *self.roles.axes("K")}
            return [Choice(n.id) for n in graph.of_kind(N.Param) if set(n.axes) == own]
        if isinstance(node, N.Scan):
            return self.of_scan(node, role, letters)
        if isinstance(node, N.Attend):
            captured = [n.outer for n in node.body.of_kind(N.Capture)]
            return [Choice(id_) for id_ in captured if set(graph[id_].axes) == self.named(letters)]
        inputs = [n.id for n in graph.of_kind(N.Input)]
        reads = [id_ for operand in timed(graph, node.operands()) for id_ in factors(graph, operand)]
        found = [id_ for id_ in dict.fromkeys([*inputs, *reads]) if set(graph[id_].axes) == self.named(letters)]
        raw = [Choice(id_, True) for id_ in found if role == "g" and self.ranges[id_][0] >= 0]
        return [*map(Choice, found), *raw]

    def of_scan(self, scan: N.Scan, role: str, letters: str) -> list[Choice]:
        if len(scan.writes) != 1 or len(scan.queries) != 1 or len(scan.gates) > 1:
            return []
        if role == "g":
            return [Choice(g.arg, not g.log) for g in scan.gates if letters == self.gate_letters()]
        first = {"k": scan.writes[0].i, "v": scan.writes[0].j, "q": scan.queries[0].arg}[role]
        return [Choice(id_) for id_ in dict.fromkeys(factors(self.graph, first)) if self.fits(id_, letters)]

    def gate_letters(self) -> str:
        """What a scan's gate is over: T, H and K; empty without one."""
        assert self.roles is not None
        scan = self.graph[self.roles.node]
        axes = {a for g in scan.gates for a in self.graph[g.arg].axes} if isinstance(scan, N.Scan) else set()
        if isinstance(scan, N.Scan) and not scan.gates:
            return ""
        over = {letter: bool(axes & set(self.roles.axes(letter))) for letter in "TKV"}
        return "?" if over["V"] else ("T" if over["T"] or over["K"] else "") + "H" + ("K" if over["K"] else "")

    def named(self, letters: str) -> set[str]:
        assert self.roles is not None
        return {a for letter in letters for a in self.roles.axes(letter)}

    def fits(self, id_: str, letters: str) -> bool:
        """Whether a value is over the sequence and the last letter's axes, and nothing foreign."""
        axes = set(self.graph[id_].axes)
        return axes <= self.named(letters) and self.named(letters[0] + letters[-1]) <= axes

    def value(self, id_: str, letters: str) -> Tensor | None:
        """A value of the short run as [1, ...] with a dimension for each letter; None if it has other axes."""
        assert self.roles is not None
        axes = tuple(a for letter in letters for a in self.roles.axes(letter))
        if not set(self.graph[id_].axes) <= set(axes):
            return None
        self.machine.value(id_)
        x = self.machine.aligned(id_, axes).expand([self.machine.size(a) for a in axes])
        x = x.reshape([self.count(letter, short=True) for letter in letters]).to(torch.float64)
        return x if letters == "H" or "T" not in letters and "S" not in letters else x[None]

    def operand(self, choice: Choice, letters: str) -> Tensor | None:
        x = self.value(choice.id, letters)
        return torch.log(x) if x is not None and choice.log else x

    def count(self, letter: str, short: bool = False) -> int:
        assert self.roles is not None
        sizes = self.short if short else self.sizes
        return math.prod(sizes.of(self.unit, a) for a in self.roles.axes(letter))

    def described(self, role: str, choice: Choice, letters: str) -> Operand:
        """An operand as it is drawn for timing."""
        node = self.graph[choice.id]
        low, high = self.ranges[choice.id]
        if choice.log:
            low, high = -math.inf, math.log(high) if 0 < high < math.inf else 0.0
        values = self.operand(choice, letters) if letters == "H" else None
        normed = isinstance(node, N.Normalize) and node.fn == "l2_norm"
        return replace(self.shape(role, letters), low=low, high=high, normed=normed,
                       values=None if values is None else tuple(values.tolist()))  # fmt: skip

    def shape(self, role: str, letters: str) -> Operand:
        batch = [self.sizes.batch] if "T" in letters or "S" in letters else []
        return Operand(role, (*batch, *(self.count(letter) for letter in letters)), along=1 if batch else None)

    # -- the same shapes -----------------------------------------------------------------------------------------------

    def shaped(self, peer: Peer) -> Match | None:
        """The peer on operands of the part's widths; gates are logarithms of decays, bounds of which nothing asks."""
        assert self.roles is not None
        if peer.kind == "attention" and self.roles.kind != "attention":
            peer = replace(peer, operands={"q": "THK", "k": "THK", "v": "THV"})
        if peer.kind != "attention" and self.roles.kind == "attention":
            return None
        if peer.operands.get("g", self.gate_letters()) == "H" != self.gate_letters():
            return None
        found = [self.shape(role, letters) for role, letters in peer.operands.items()]
        if any(0 in o.shape for o in found):
            return None
        gates = tuple(replace(o, high=0.0) if o.name == "g" else o for o in found)
        constant = tuple(falling_decays(self.count("H")).tolist())
        gates = tuple(replace(o, values=constant) if o.name == "g" and len(o.shape) == 1 else o for o in gates)
        return Match(peer, OTHER, gates, self.usual_scale())
