"""Reads after the update: where all reads of a state are such, its scan starts with its gate.

Equations are kept as reads of the state before the update and what the token's own writes add to these. For
S_t = A S_(t-1) + sum_r W_r V_r the read of Q after the update is the read of Q A before it, plus the sum of Q W_r V_r.
This finds such pairs of terms, by their polynomials, whichever way they were written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from chunkc.ir import nodes as N
from chunkc.passes.algebra import Monomial, Poly, add, mul

if TYPE_CHECKING:
    from chunkc.passes.place import Placement


@dataclass(frozen=True)
class Read:
    """A lifted node that stands for sum[over](arg * state), before the update or after it; over = (): the state."""

    state: str
    over: tuple[str, ...]
    arg: str
    after: bool = False


@dataclass
class AfterReads:
    """Finds the reads of one state after its update, in all that is wanted of a recurrence.

    `replaced`: for a lifted sum the one that reads after the update; `reads`: the new reads by lifted node."""

    place: Placement
    state: str
    reads: dict[str, Read] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)

    def found(self, roots: Iterable[str]) -> bool:
        """Whether every read of the state that these nodes need is one after the update."""
        stack, seen = list(roots), set()
        while stack:
            id_ = stack.pop()
            if id_ in seen:
                continue
            seen.add(id_)
            node = self.place.lift.nodes[id_]
            known = self.reads.get(id_) or self.place.reads.get(id_)
            if isinstance(node, N.Map) and node.fn in ("+", "-") and id_ not in self.replaced:
                new = self.rewritten(id_)
                if new is not None:
                    self.replaced[id_] = new
            if id_ in self.replaced:
                stack.append(self.replaced[id_])
            elif known is not None:
                if known.state == self.state and not known.after:
                    return False
                stack.append(known.arg)
            else:
                stack.extend(node.operands())
        return bool(self.reads)

    def rewritten(self, id_: str) -> str | None:
        """The sum with reads after the update in the place of reads before it and own writes; None if it has none."""
        algebra, poly = self.place.algebra, self.place.algebra.expand(id_)
        out = poly
        for m, c in poly.items():
            before = [f for f in m if f in self.place.reads and self.place.reads[f].state == self.state]
            if len(before) != 1:
                continue
            read = self.place.reads[before[0]]
            gate = self.gate(set(read.over))
            rest = None if gate is None else _without(m, (before[0], *gate[1]))
            query = None if gate is None else divided(algebra.expand(read.arg), gate[0])
            if rest is None or query is None or not read.over:
                continue
            scale = 1.0 if gate is None else gate[2]
            outside: Poly = {rest: c / scale}
            gone = add(mul(outside, self.own(query, set(read.over))), {m: c})
            if all(abs(out.get(n, 0.0) - d) < 1e-12 for n, d in gone.items()):
                new = self.read(read, algebra.build(query))
                out = add(add(out, gone, -1.0), mul(outside, {(new,): 1.0}))
        return algebra.build(out) if out is not poly else None

    def gate(self, over: set[str]) -> tuple[Monomial, Monomial, float] | None:
        """The state's gate as factors over what a read sums, factors beside it, and a number; None if it is a sum
        that is multiplied out."""
        form = self.place.next[self.state]
        gate = self.place.algebra.factor(form.diag[self.state]) if self.state in form.diag else {}
        if len(gate) != 1:
            return None
        ((factors, scale),) = gate.items()
        inside = tuple(f for f in factors if set(self.place.lift.nodes[f].axes) & over)
        return inside, tuple(f for f in factors if f not in inside), scale

    def own(self, query: Poly, over: set[str]) -> Poly:
        """What the token's own writes give to a query, as a sum of contractions and what multiplies each."""
        algebra, rest = self.place.algebra, self.place.next[self.state].rest
        out: Poly = {}
        for arg, outside in algebra.grouped(mul(query, algebra.expand(rest) if rest is not None else {}), over):
            node = self.place.lift.nodes[arg]
            if not over <= set(node.axes):
                return {(): float("nan")}  # it lacks an axis: no contraction that a query has
            axes = tuple(a for a in node.axes if a not in over)
            ordered = tuple(a for a in self.place.carried[self.state].axes if a in over)
            total = self.place.lift.find(N.Reduce, fn="sum", arg=arg, over=ordered, axes=axes)
            out = add(out, mul(outside, {(total or arg,): 1.0}))
        return out

    def read(self, before: Read, arg: str) -> str:
        known = Read(before.state, before.over, arg, after=True)
        for id_, other in self.reads.items():
            if other == known:
                return id_
        lift, axis = self.place.lift, self.place.node.axis
        axes = [a for a in self.place.carried[self.state].axes if a not in before.over]
        axes += [a for a in lift.nodes[arg].axes if a not in before.over and a not in axes and a != axis]
        number = len(self.place.reads) + len(self.reads)
        id_ = lift.add(
            N.State, f"{self.state}_read", lift.nodes[arg].span, name=f"{self.state} {number}", axes=(axis, *axes)
        )
        self.reads[id_] = known
        return id_


def divided(poly: Poly, factors: Monomial) -> Poly | None:
    """A polynomial without factors that each of its terms has; None if one has them not."""
    out: Poly = {}
    for m, c in poly.items():
        rest = _without(m, factors)
        if rest is None:
            return None
        out[rest] = c
    return out


def _without(m: Monomial, factors: Monomial) -> Monomial | None:
    """A product without some of its factors; None if it lacks one."""
    rest = list(m)
    for f in factors:
        if f not in rest:
            return None
        rest.remove(f)
    return tuple(rest)
