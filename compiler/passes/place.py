"""From forms to nodes: which states make a scan, with which axes and factors, and in which order they run.

A state is a scan if it depends on no state but itself, through a diagonal coefficient in [0, 1]. With Y the axes
that its reads remove, its axes split into batch, i = Y and j, so that every gate and every write is a product of an
i side and a j side. What does not split, is coupled, fed back or may grow runs a token at a time, with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from chunkc.ir import nodes as N
from chunkc.ir.graph import Builder
from chunkc.ir.ranges import Ranges
from chunkc.passes.algebra import Algebra, Monomial, Poly, add, mul
from chunkc.passes.reads import AfterReads, Read

if TYPE_CHECKING:
    from chunkc.passes.normalize import Form


@dataclass
class Plan:
    """How a state's component runs. `reason` is set where it is sequential."""

    states: tuple[str, ...]
    reason: str = ""
    algebra: Literal["sum-product", "max-plus"] = "sum-product"
    batch: tuple[str, ...] = ()
    i: tuple[str, ...] = ()
    j: tuple[str, ...] = ()
    gates: list[N.Gate] = field(default_factory=list)
    writes: list[N.Write] = field(default_factory=list)
    add: str | None = None
    stop: bool = False
    start: Literal["read", "gate"] = "read"

    @property
    def vector(self) -> bool:
        return not (self.i or self.j)


class Placement:
    """Places one recurrence's reads and lifted nodes into the outer graph."""

    def __init__(self, node: N.Recur, out: Builder, lift: Builder, algebra: Algebra, reads: dict[str, Read],
                 next_: dict[str, Form]) -> None:  # fmt: skip
        self.node = node
        self.out = out
        self.lift = lift
        self.algebra = algebra
        self.reads = reads
        self.next = next_
        self.carried = {c.name: c for c in node.carried}
        self.ranges = Ranges(lift.nodes, Ranges(out.nodes))
        self.emitted: dict[str, str] = {}
        self.finals: dict[str, str] = {}
        self.plans: dict[str, Plan] = {}
        self.replaced: dict[str, str] = {}  # sums that are emitted with reads after the update
        self._inside: dict[str, frozenset[str]] = {}

    def run(self, wanted: list[str]) -> dict[str, str]:
        """Plan every component and place those that `wanted` needs; then all final states."""
        for component in self.components():
            plan = self.plan(component)
            for s in component:
                self.plans[s] = plan
        for s, plan in self.plans.items():
            self.read_after(s, plan, wanted)
        for id_ in wanted:
            self.emit(id_)
        for s in self.carried:
            if s not in self.finals:
                self.place(s)
        return self.finals

    def read_after(self, state: str, plan: Plan, wanted: list[str]) -> None:
        """Let a matrix scan start with its gate, if all that is read of it is so after the update."""
        if plan.reason or plan.vector:
            return
        late = AfterReads(self, state)
        late.replaced.update(self.replaced)
        args = [g.arg for p in self.plans.values() for g in p.gates]
        args += [a for p in self.plans.values() for w in p.writes for a in (w.i, w.j)]
        if late.found([*wanted, *args, *(p for s in self.carried for p in self.parts(s))]):
            plan.start = "gate"
            self.reads.update(late.reads)
            self.replaced = late.replaced

    # -- dependence --------------------------------------------------------------------------------------------------

    def reads_in(self, id_: str) -> frozenset[str]:
        """The reads that a lifted node depends on, those in the arguments of reads included."""
        if id_ not in self._inside:
            node = self.lift.nodes[id_]
            found: set[str] = set()
            if id_ in self.reads:
                found = {id_} | self.reads_in(self.reads[id_].arg)
            for a in node.operands():
                found |= self.reads_in(a)
            self._inside[id_] = frozenset(found)
        return self._inside[id_]

    def parts(self, state: str) -> list[str]:
        form = self.next[state]
        return [*form.diag.values(), *([form.rest] if form.rest is not None else [])]

    def drivers(self, state: str) -> set[str]:
        """The states that the update of one depends on, itself only through reads."""
        found = {s for s in self.next[state].diag if s != state}
        return found | {self.reads[r].state for p in self.parts(state) for r in self.reads_in(p)}

    def components(self) -> list[tuple[str, ...]]:
        """States that depend on each other, together; in declared order."""
        reach = {s: self.drivers(s) for s in self.carried}
        for s, form in self.next.items():  # a state taken over directly runs in the same loop
            for t in form.diag:
                reach[t].add(s)
        for _ in reach:
            for s in reach:
                reach[s] = reach[s].union(*(reach[t] for t in reach[s]))
        out: list[tuple[str, ...]] = []
        for s in self.carried:
            if not any(s in c for c in out):
                out.append((s, *(t for t in self.carried if t != s and t in reach[s] and s in reach[t])))
        return out

    # -- planning ----------------------------------------------------------------------------------------------------

    def plan(self, states: tuple[str, ...]) -> Plan:
        """The component's plan; sequential unless it is one state in normal form."""
        if len(states) > 1:
            direct = [(s, t) for s in states for t in self.next[s].diag if s != t]
            named = f"{direct[0][0]} takes over {direct[0][1]} directly" if direct else ""
            return Plan(states, named or f"{' and '.join(states)} drive each other")
        state = states[0]
        form = self.next[state]
        if state in self.drivers(state):
            return self.max_plus(state) or Plan(states, self.feedback(state))
        closed = self.joined(self.algebra.expand(form.diag[state]) if state in form.diag else {})
        opened = self.joined(self.opened(closed))
        gate = next((g for g in (closed, opened) if self.is_gate(g)), None)
        if gate is None:
            return Plan(states, f"the gate of {state} may grow: it is not proven to lie in [0, 1]")
        overs = {self.reads[r].over for r in self.reads if self.reads[r].state == state}
        whole = () in overs or not overs or not self.carried[state].axes
        if whole or self.carried[state].dtype == "complex":
            return self.vector(state, gate)
        writes = self.algebra.expand(form.rest) if form.rest is not None else {}
        plan = self.matrix(state, opened, self.opened(writes), overs)
        if plan is None or plan.vector:  # what stands in memory is no product to open
            plan = self.matrix(state, gate, writes, overs)
        return plan or Plan(states, f"a gate, write or read of {state} is no product of two sides")

    def is_gate(self, gate: Poly) -> bool:
        """Whether a factor is proven to lie in [0, 1]; of a complex one, the modulus."""
        id_ = self.algebra.build(gate)
        if self.lift.nodes[id_].dtype == "complex":
            return self.ranges.modulus(id_) <= 1
        low, high = self.ranges[id_]
        return low >= 0 and high <= 1

    def joined(self, poly: Poly) -> Poly:
        """The same with products of exponentials as exponentials of sums, which have the better known range."""
        out: Poly = {}
        for m, c in poly.items():
            nodes = [self.lift.nodes[f] for f in m]
            powers = [n for n in nodes if isinstance(n, N.Map) and n.fn == "exp"]
            if len(powers) > 1:
                total = powers[0].args[0]
                for p in powers[1:]:
                    total = self.lift.map("+", total, p.args[0], span=p.span)
                rest = [n.id for n in nodes if n not in powers]
                m = tuple(sorted([*rest, self.lift.map("exp", total, span=powers[0].span)]))
            out = add(out, {m: c})
        return out

    def opened(self, poly: Poly) -> Poly:
        """The same with exponentials, sigmoids and outer products that were named outside in place of their names."""
        out: Poly = {}
        for m, c in poly.items():
            term: Poly = {(): c}
            for f in m:
                term = mul(term, self.algebra.factor(self.open(f)))
            out = add(out, term)
        return out

    def open(self, id_: str) -> str:
        node: N.AnyNode = self.lift.nodes[id_]
        if isinstance(node, N.Capture):
            outer: N.AnyNode = self.out.nodes[node.outer]
            if not isinstance(outer, N.Map):
                return id_
            wide = all(set(self.out.nodes[a].axes) < set(outer.axes) for a in outer.args)
            if outer.fn not in ("exp", "sigmoid") and not (wide and outer.fn in ("+", "-", "*", "/")):
                return id_
            return self.lift.map(outer.fn, *(self.open(self.captured(a)) for a in outer.args), span=outer.span)
        if isinstance(node, N.Map) and node.fn in ("exp", "+", "-", "*", "/", "neg"):
            args = tuple(self.open(a) for a in node.args)
            return id_ if args == node.args else self.lift.map(node.fn, *args, span=node.span)
        return id_

    def captured(self, outer: str) -> str:
        """The lifted node for a value outside."""
        node = self.out.nodes[outer]
        if isinstance(node, N.Const):
            return self.lift.const(node.size)
        return self.lift.add(N.Capture, outer, node.span, outer=outer, axes=node.axes, dtype=node.dtype)

    def feedback(self, state: str) -> str:
        """Why a state that depends on its own reads is sequential."""
        form = self.next[state]
        own = {r for r in self.reads if self.reads[r].state == state}
        if any(own & self.reads_in(d) for d in form.diag.values()):
            return f"the gate of {state} depends on {state}"
        rank: set[str] = set()
        for m in self.algebra.expand(form.rest) if form.rest is not None else {}:
            inside = [f for f in m if own & self.reads_in(f)]
            if len(inside) > 1 or any(f not in own for f in inside):
                return f"{state} stands inside a function in its own update"
            rank.update(inside)
        return f"linear feedback of rank {len(rank)}"

    def max_plus(self, state: str) -> Plan | None:
        """S = max(S + a, b), behind `stop` or not."""
        form = self.next[state]
        if form.diag or form.rest is None:
            return None
        stopped, id_ = False, form.rest
        node = self.lift.nodes[id_]
        while isinstance(node, N.Map) and node.fn in ("stop", "as"):
            stopped = stopped or node.fn == "stop"
            id_ = node.args[0]
            node = self.lift.nodes[id_]
        if not (isinstance(node, N.Map) and node.fn == "max"):
            return None
        before = next((r for r, read in self.reads.items() if read.state == state and read.over == ()), None)
        gate: str | None = None
        others: list[str] = []
        for arg in node.args:
            poly = self.algebra.expand(arg)
            if before is None or before not in self.reads_in(arg):
                others.append(arg)
                continue
            rest = add(poly, {(before,): 1.0}, -1.0)
            built = self.algebra.build(rest)
            if gate is not None or before in self.reads_in(built):
                return None
            gate = built
        if gate is None or not others or any(self.reads[r].over for r in self.reads if self.reads[r].state == state):
            return None
        write = others[0]
        for o in others[1:]:
            write = self.lift.map("max", write, o)
        if stopped:
            gate, write = self.lift.map("stop", gate), self.lift.map("stop", write)
        gates = [N.Gate(arg=gate, log=False)]
        return Plan((state,), "", "max-plus", self.carried[state].axes, gates=gates, add=write, stop=stopped)

    def vector(self, state: str, gate: Poly) -> Plan:
        """A scan without sides: every axis is a batch axis."""
        gates = [] if gate == {(): 1.0} else [N.Gate(arg=self.algebra.build(gate), log=False)]
        return Plan((state,), batch=self.carried[state].axes, gates=gates, add=self.next[state].rest)

    def matrix(self, state: str, gate: Poly, writes: Poly, overs: set[tuple[str, ...]]) -> Plan | None:
        """A scan with sides, or without where nothing is left for the j side; None if something does not split."""
        axes = self.carried[state].axes
        i = self.first_side(axes, overs, writes)
        factors = [t for m in gate for f in m for t in self.exponents(f)] + [f for m in writes for f in m]
        factors += [r.arg for r in self.reads.values() if r.state == state and set(r.over) == set(i)]
        touching = [set(self.lift.nodes[f].axes) for f in factors if set(self.lift.nodes[f].axes) & set(i)]
        batch = tuple(a for a in axes if a not in i and any(a in t for t in touching))
        j = tuple(a for a in axes if a not in i and a not in batch)
        if not j:
            given = any({*axes, self.node.axis} <= set(self.lift.nodes[f].axes) and self.stored(f) for f in factors)
            return self.vector(state, gate) if given else None
        if any(set(over) not in (set(i), set(j)) for over in overs):
            return None
        for r in self.reads.values():
            other = j if set(r.over) == set(i) else i
            if r.state == state and set(self.lift.nodes[r.arg].axes) & set(other):
                return None
        plan = Plan((state,), batch=batch, i=i, j=j)
        gates = self.gates(gate, set(i), set(j))
        if gates is None or not self.split_writes(writes, plan):
            return None
        plan.gates = gates
        return plan if plan.writes else self.vector(state, gate)  # a product needs something to multiply

    def first_side(self, axes: tuple[str, ...], overs: set[tuple[str, ...]], writes: Poly) -> tuple[str, ...]:
        """The axes that reads remove; without reads, those of the first write's first factor alone."""
        if overs:
            chosen = sorted(overs, key=lambda o: [axes.index(a) for a in o])[0]
            return tuple(a for a in axes if a in chosen)
        for m in writes:
            held = [set(self.lift.nodes[f].axes) & set(axes) for f in m]
            for own in held:
                alone = own - set().union(*(h for h in held if h is not own))
                if alone and alone != set(axes):
                    return tuple(a for a in axes if a in alone)
        return axes

    def exponents(self, factor: str) -> list[str]:
        """The summands of an exponential's argument, which are factors' logarithms; else the factor."""
        node = self.lift.nodes[factor]
        if isinstance(node, N.Map) and node.fn == "exp":
            return [t for _, t in self.ranges.terms(node.args[0])]
        return [factor]

    def stored(self, id_: str) -> bool:
        """Whether a value of this shape stands in memory anyway: an input, a product, or a map of one such."""
        node = self.lift.nodes[id_]
        if isinstance(node, N.Capture | N.State | N.Linear):
            return True
        full = set(node.axes)
        return any(set(self.lift.nodes[a].axes) == full and self.stored(a) for a in node.operands())

    def gates(self, gate: Poly, i: set[str], j: set[str]) -> list[N.Gate] | None:
        """At most one gate a side, the neutral part with i unless only j has one; None if one is no product."""
        if gate == {(): 1.0}:
            return []
        scale = next(iter(gate.values()), 0.0) if len(gate) == 1 else 0.0
        if 0 < scale <= 1:
            factors: Monomial = next(iter(gate)) + ((self.algebra.number(scale),) if scale < 1 else ())
        else:
            factors = (self.one_less_sigmoid(gate) or self.algebra.build(gate),)
        sides: dict[str, list[N.Gate]] = {"i": [], "j": [], "": []}
        for f in factors:
            for part in self.gate_parts(f, i, j):
                axes = set(self.lift.nodes[part.arg].axes)
                if axes & i and axes & j:
                    return None
                sides["i" if axes & i else "j" if axes & j else ""].append(part)
        home = "j" if sides["j"] and not sides["i"] else "i"
        sides[home] += sides[""]
        return [self.merged(sides[s]) for s in ("i", "j") if sides[s]]

    def one_less_sigmoid(self, gate: Poly) -> str | None:
        """1 - sigmoid(x) as sigmoid(-x), whose logarithm is exact."""
        if len(gate) != 2 or gate.get(()) != 1.0:
            return None
        m, c = next((m, c) for m, c in gate.items() if m)
        node = self.lift.nodes[m[0]]
        if len(m) == 1 and c == -1.0 and isinstance(node, N.Map) and node.fn == "sigmoid":
            return self.lift.map("sigmoid", self.lift.map("neg", node.args[0], span=node.span), span=node.span)
        return None

    def gate_parts(self, factor: str, i: set[str], j: set[str]) -> list[N.Gate]:
        """A factor as gates: the logarithms of exp and sigmoid, sums of exponents split by side, else the factor."""
        node = self.lift.nodes[factor]
        if isinstance(node, N.Map) and node.fn == "sigmoid":
            return [N.Gate(arg=self.lift.map("logsigmoid", node.args[0], span=node.span), log=True)]
        if isinstance(node, N.Const) and self.ranges[factor][0] > 0:  # a gate near 1 has its digits in its logarithm
            return [N.Gate(arg=self.lift.const(math.log(self.ranges[factor][0]), node.span), log=True)]
        if not (isinstance(node, N.Map) and node.fn == "exp"):
            if self.ranges[factor][0] >= 2**-4:  # so far from 0 that the gradient of its logarithm serves
                return [N.Gate(arg=self.lift.map("log", factor, span=node.span), log=True)]
            return [N.Gate(arg=factor, log=False)]
        groups: dict[tuple[bool, bool], Poly] = {}
        for sign, term in self.ranges.terms(node.args[0]):
            axes = set(self.lift.nodes[term].axes)
            key = (bool(axes & i), bool(axes & j))
            groups[key] = add(groups.get(key, {}), {(term,): float(sign)})
        if len(groups) == 1:
            return [N.Gate(arg=node.args[0], log=True)]
        parts = [self.algebra.build(p) for p in groups.values()]
        if any(self.ranges[p][1] > 0 for p in parts):
            return [N.Gate(arg=factor, log=False)]
        return [N.Gate(arg=p, log=True) for p in parts]

    def merged(self, gates: list[N.Gate]) -> N.Gate:
        """One gate for a side: the sum of logarithms, or a product where one has no exact logarithm."""
        logs = all(g.log for g in gates)
        out: str | None = None
        for g in gates:
            arg = self.lift.map("exp", g.arg) if g.log and not logs else g.arg
            out = arg if out is None else self.lift.map("+" if logs else "*", out, arg)
        assert out is not None
        return N.Gate(arg=out, log=logs)

    def split_writes(self, writes: Poly, plan: Plan) -> bool:
        """Writes as few products of an i side and a j side as factoring out either side gives."""
        i, j = set(plan.i), set(plan.j)
        by_i = [(left, self.algebra.build(right)) for left, right in self.algebra.grouped(writes, i)]
        by_j = [(self.algebra.build(left), right) for right, left in self.algebra.grouped(writes, j)]
        for pairs in sorted((by_i, by_j), key=len):
            axes = [(set(self.lift.nodes[a].axes), set(self.lift.nodes[b].axes)) for a, b in pairs]
            if not any(a & j or b & i for a, b in axes):
                plan.writes += [N.Write(i=self.repeated(a, plan.i), j=b) for a, b in pairs]
                return True
        return False

    def repeated(self, id_: str, i: tuple[str, ...]) -> str:
        """The i side of a write, repeated over i where it is the same for all of it: `S = a * S + v`."""
        node = self.lift.nodes[id_]
        if set(node.axes) & set(i):
            return id_
        return self.lift.add(N.Map, "", node.span, fn="as", args=(id_,), axes=(*node.axes, *i))

    # -- placing -----------------------------------------------------------------------------------------------------

    def emit(self, id_: str) -> str:
        """The outer node for a lifted one."""
        if id_ in self.emitted:
            return self.emitted[id_]
        node = self.lift.nodes[id_]
        if id_ in self.replaced:
            self.emitted[id_] = self.emit(self.replaced[id_])
        elif isinstance(node, N.Capture):
            self.emitted[id_] = node.outer
        elif id_ in self.reads:
            self.place(self.reads[id_].state, id_)
        else:
            args = {a: self.emit(a) for a in node.operands()}
            self.emitted[id_] = _copy(self.out, node.renamed(args), node.id)
        return self.emitted[id_]

    def place(self, state: str, read: str | None = None) -> None:
        """Add a state's scan or recurrence, with all its reads that can be made at this point."""
        plan = self.plans[state]
        if plan.reason:
            self.place_sequential(plan)
        else:
            self.place_scan(plan, state, read)

    def place_scan(self, plan: Plan, state: str, read: str | None) -> None:
        after = plan.start == "gate"
        own = [r for r, x in self.reads.items() if x.state == state and x.after == after and r not in self.emitted]
        ready = [r for r in own if r == read or not any(
            self.reads[x].state == state for x in self.reads_in(self.reads[r].arg))]  # fmt: skip
        queries: list[N.Query] = []
        kept: list[str] = []
        for r in ready:
            if plan.vector:
                continue
            side: Literal["i", "j"] = "i" if set(self.reads[r].over) == set(plan.i) else "j"
            queries.append(N.Query(side=side, arg=self.emit(self.reads[r].arg)))
            kept.append(r)
        c = self.carried[state]
        scan = N.Scan(
            id="",
            axis=self.node.axis,
            within=self.node.within,
            dtype=c.dtype,
            name=state,
            declared=self.carried[state].axes,
            batch=plan.batch,
            i=plan.i,
            j=plan.j,
            algebra=plan.algebra,
            gates=tuple(N.Gate(arg=self.emit(g.arg), log=g.log) for g in plan.gates),
            writes=tuple(N.Write(i=self.emit(w.i), j=self.emit(w.j)) for w in plan.writes),
            add=self.emit(plan.add) if plan.add is not None else None,
            queries=tuple(queries),
            start=plan.start,
            initial=c.initial,
            stop=plan.stop,
            span=c.span,
        )
        id_ = _copy(self.out, scan, f"scan_{state}")
        for index, r in enumerate(kept):
            self.emitted[r] = self.result(id_, index, scan, r)
        if plan.vector:
            before = self.result(id_, 0, scan, f"{state}_before")
            for r in ready:
                self.emitted[r] = self.over_trajectory(r, before)
        if state not in self.finals:
            last = len(queries) + (1 if plan.vector else 0)
            self.finals[state] = self.result(id_, last, scan, f"{state}_final")

    def result(self, id_: str, index: int, scan: N.Scan, hint: str) -> str:
        axes = scan.result_axes(index)
        return self.out.add(N.Out, hint, scan.span, arg=id_, index=index, axes=axes, dtype=scan.dtype)

    def over_trajectory(self, read: str, before: str) -> str:
        """A read computed from the state's whole trajectory."""
        r = self.reads[read]
        if not r.over:
            return before
        span = self.lift.nodes[read].span
        product = self.out.map("*", self.emit(r.arg), before, span=span)
        axes = tuple(a for a in self.out.nodes[product].axes if a not in r.over)
        return self.out.add(N.Reduce, "sum", span, fn="sum", arg=product, over=r.over, axes=axes)

    def place_sequential(self, plan: Plan) -> None:
        """Add the component as a recurrence over tokens whose results are its reads."""
        body = Builder("normal", self.out.axes.values())
        mine = {r for r, x in self.reads.items() if x.state in plan.states}
        done: dict[str, str] = {}

        def convert(id_: str) -> str:
            if id_ in done:
                return done[id_]
            node = self.lift.nodes[id_]
            if id_ in mine:
                read = self.reads[id_]
                state = body.nodes[state_ids[read.state]]
                value = state.id
                if read.over:
                    product = body.map("*", convert(read.arg), value, span=node.span)
                    axes = tuple(a for a in body.nodes[product].axes if a not in read.over)
                    value = body.add(N.Reduce, "sum", node.span, fn="sum", arg=product, over=read.over, axes=axes)
                done[id_] = value
            elif not self.reads_in(id_) & mine and not self.widens(node):
                outer = self.emit(id_)
                axes = tuple(a for a in self.out.nodes[outer].axes if a != self.node.axis)
                done[id_] = body.add(N.Capture, outer, node.span, outer=outer, axes=axes, dtype=node.dtype)
            else:
                args = {a: convert(a) for a in node.operands()}
                moved = node.renamed(args)
                axes = tuple(a for a in node.axes if a != self.node.axis)
                done[id_] = _copy(body, moved.evolve(axes=axes), node.id)
            return done[id_]

        state_ids = {
            s: body.add(N.State, s, self.carried[s].span, name=s, axes=self.carried[s].axes) for s in plan.states
        }
        late = {r for r in mine if any(self.plans[self.reads[x].state] is not plan
                                       and set(plan.states) & self.upstream(self.reads[x].state)
                                       for x in self.reads_in(self.reads[r].arg))}  # fmt: skip
        results = {r: convert(r) for r in mine if r not in late}
        carried = []
        for s in plan.states:
            carried.append(self.carried[s].evolve(result=self.next_value(s, body, state_ids, convert)))
        names = [(r, results[r]) for r in self.reads if r in results]
        names += [(f"{s}_before", state_ids[s]) for s in plan.states if any(self.reads[r].state == s for r in late)]
        region = body.graph(names).pruned_keeping([c.result for c in carried])
        node = N.Recur(id="", axis=self.node.axis, within=self.node.within, carried=tuple(carried), body=region,
                       reason=plan.reason, span=self.node.span)  # fmt: skip
        id_ = _copy(self.out, node, f"steps_{'_'.join(plan.states)}")
        outs = {}
        for index, (name, value) in enumerate(names):
            axes = (self.node.axis, *body.nodes[value].axes)
            outs[name] = self.out.add(N.Out, name, node.span, arg=id_, index=index, axes=axes)
        for k, s in enumerate(plan.states):
            self.finals[s] = self.out.add(N.Out, f"{s}_final", node.span, arg=id_, index=len(names) + k,
                                          axes=self.carried[s].axes)  # fmt: skip
        self.emitted.update({r: outs[r] for r in results})
        for r in late:
            self.emitted[r] = self.over_trajectory(r, outs[f"{self.reads[r].state}_before"])

    def widens(self, node: N.AnyNode) -> bool:
        """Whether a map is larger than each of its operands: computed a token at a time, it is never stored whole."""
        if not isinstance(node, N.Map) or self.node.axis not in node.axes:
            return False
        return all(set(self.lift.nodes[a].axes) < set(node.axes) for a in node.args)

    def upstream(self, state: str) -> set[str]:
        """The states that a state depends on, at any distance."""
        found: set[str] = set()
        pending = [state]
        while pending:
            for t in self.drivers(pending.pop()) - found:
                found.add(t)
                pending.append(t)
        return found

    def next_value(self, state: str, body: Builder, state_ids: dict[str, str],
                   convert: Callable[[str], str]) -> str:  # fmt: skip
        """The state after the step, in a sequential body."""
        form = self.next[state]
        out: str | None = None
        for s, c in form.diag.items():
            one = self.algebra.expand(c) == {(): 1.0}
            term = state_ids[s] if one else body.map("*", convert(c), state_ids[s])
            out = term if out is None else body.map("+", out, term)
        if form.rest is not None:
            rest = convert(form.rest)
            out = rest if out is None else body.map("+", out, rest)
        out = body.const(0.0) if out is None else out
        axes = self.carried[state].axes
        if body.nodes[out].axes != axes:
            out = body.add(N.Map, "", self.carried[state].span, fn="as", args=(out,), axes=axes)
        return out


def _copy(builder: Builder, node: N.AnyNode, hint: str) -> str:
    if isinstance(node, N.Map) and node.fn != "as":
        return builder.map(node.fn, *node.args, span=node.span, hint=hint)
    return builder.like(node, hint)
