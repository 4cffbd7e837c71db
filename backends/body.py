"""A unit's graph as PyTorch statements: everything but the inside of scans.

Dimensions of a value: [B, T, ...] if it runs over the sequence, [N, ...] if it belongs to one, else its axes alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from chunkc.backends.scan import ScanForm, scan_form
from chunkc.backends.writer import Lines, Writer, identifier, is_name
from chunkc.ir import nodes as N
from chunkc.ir.axes import Size
from chunkc.ir.graph import Graph, Unit

CALLS = {
    "exp": "torch.exp({})", "log": "torch.log({})", "tanh": "torch.tanh({})", "sigmoid": "torch.sigmoid({})",
    "silu": "F.silu({})", "gelu": "F.gelu({})", "relu": "torch.relu({})", "softplus": "F.softplus({})",
    "logsigmoid": "F.logsigmoid({})", "inv_softplus": "inv_softplus({})", "abs": "torch.abs({})",
    "floor": "torch.floor({})", "stop": "({}).detach()",
}  # fmt: skip
INFIX = {"+": 4, "-": 4, "*": 5, "/": 5, "%": 5, "<": 3, "<=": 3, ">": 3, ">=": 3, "==": 3, "!=": 3, "and": 2, "or": 1}


class Body:
    """Emits one unit. `param` gives the text of a parameter, `sizes` that of an axis' size is its own name."""

    def __init__(self, unit: Unit, lines: Lines, w: Writer, owner: str, prefix: str = "") -> None:
        self.unit, self.lines, self.w, self.owner = unit, lines, w, owner
        self.graph = unit.graph
        self.names: dict[str, str] = {}
        self.scans = {
            n.id: scan_form(n, {x.id: x.axes for x in self.graph.nodes}, prefix) for n in matrix_scans(self.graph)
        }
        self.users = self.graph.users()
        self.step_axis: str | None = None
        self.attribute: Callable[[str], str] = param_name
        self.results: dict[str, str] = {}
        self.histories = histories(self.graph)
        self.known = {a.size: a.name for a in reversed(self.graph.axes) if a.size is not None and a.size.args}
        self.taken = {a.name for a in self.graph.axes} | {"seq", "scans", "ct", "F", "torch", "self", "math", "start"}

    # -- names and dimensions ----------------------------------------------------------------------------------------

    def time(self) -> str | None:
        """The sequence axis, or None without one."""
        return next((a.name for a in self.graph.axes if a.kind in ("time", "unordered")), None)

    def is_time(self, axis: str) -> bool:
        return self.graph.axis[axis].kind in ("time", "unordered")

    def lead(self, graph: Graph, id_: str) -> int:
        """How many dimensions stand before a value's own axes: 2 over the sequence, 1 a sequence, 0 for parameters."""
        node = graph[id_]
        if any(self.is_time(a) for a in node.axes):
            return 2
        return 1 if self.per_sequence(graph, id_) else 0

    def per_sequence(self, graph: Graph, id_: str) -> bool:
        node = graph[id_]
        if isinstance(node, N.Input | N.Length | N.State | N.Out):
            return True
        if isinstance(node, N.Capture):
            outer = self.graph[node.outer]
            return any(self.is_time(a) for a in outer.axes) or self.per_sequence(self.graph, node.outer)
        if isinstance(node, N.Coord):
            return self.is_time(node.axis)
        return any(self.per_sequence(graph, a) for a in node.operands())

    def own(self, axes: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(a for a in axes if not self.is_time(a))

    def fresh(self, hint: str) -> str:
        base = identifier(hint) if is_name(hint) else "x"
        out, n = base, 1
        while out in self.taken:
            n += 1
            out = f"{base}_{n}"
        self.taken.add(out)
        return out

    def shape(self, axes: tuple[str, ...], lead: int = 0) -> str:
        parts = [["", "seq.count", "seq.rows, seq.tokens"][lead]] if lead else []
        return "(" + ", ".join([*parts, *self.own(axes)]) + ("," if len(axes) + lead == 1 and lead < 2 else "") + ")"

    def aligned(self, graph: Graph, id_: str, axes: tuple[str, ...], lead: int) -> tuple[str, int]:
        """A value's text as a view over `axes` after `lead` dimensions, and how tightly it binds."""
        text, rank = self.text(graph, id_)
        mine, wanted, at = self.own(graph[id_].axes), self.own(axes), self.lead(graph, id_)
        if at == 1 and lead == 2:
            text, rank, at = f"seq.spread({text})", 9, 2
        present = [a for a in wanted if a in mine]
        if present != list(mine):
            order = ", ".join(str(at + mine.index(a)) for a in present)
            text, rank = f"{_hold(text, rank, 9)}.permute({', '.join([*map(str, range(at)), order])})", 9
        dims = [":" if a in mine else "None" for a in wanted]
        if at == 0:  # leading dimensions broadcast by themselves
            while dims and dims[0] == "None":
                dims.pop(0)
        if "None" not in dims or (at == 0 and not mine):
            return text, rank
        while dims and dims[0] == ":":
            dims.pop(0)
        return f"{_hold(text, rank, 9)}[..., {', '.join(dims)}]", 9

    # -- expressions -------------------------------------------------------------------------------------------------

    def text(self, graph: Graph, id_: str) -> tuple[str, int]:
        """The text that stands for a value: its variable, or its expression where it is used once."""
        if id_ in self.names:
            return self.names[id_], 9
        return self.expression(graph, graph[id_])

    def hold(self, graph: Graph, id_: str, rank: int = 9) -> str:
        return _hold(*self.text(graph, id_), rank)

    def expression(self, graph: Graph, node: N.AnyNode) -> tuple[str, int]:
        if isinstance(node, N.Const):
            text = node.size.text(0, self.known)
            return (text, 9) if text.replace(".", "").replace("_", "").isalnum() else (f"({text})", 9)
        if isinstance(node, N.Coord):
            return self.coordinate(node)
        if isinstance(node, N.Random):
            empty = f"torch.empty({self.shape(node.axes)}, dtype=ct, device=device)"
            a, b = node.a.text(), node.b.text()
            return (f"{empty}.uniform_({a}, {b})" if node.fn == "uniform" else f"{empty}.normal_(0.0, {a})"), 9
        if isinstance(node, N.Length):
            return "seq.offsets.diff()", 9
        if isinstance(node, N.Map):
            return self.map(graph, node)
        if isinstance(node, N.Reduce | N.Normalize):
            return self.along(graph, node)
        if isinstance(node, N.Expand):
            dim = graph[node.arg].axes.index(node.source) - len(graph[node.arg].axes)
            count = f"{node.target} // {node.source}"
            return f"{self.hold(graph, node.arg)}.repeat_interleave({count}, {dim})", 9
        if isinstance(node, N.Rename):
            return self.text(graph, node.arg)
        if isinstance(node, N.Shift):
            history = self.histories.get(node.id)
            past = f"state_{identifier(history.name)}" if history else "None"
            return f"seq.shift({self.text(graph, node.arg)[0]}, {node.by.text()}, {past})", 9
        if isinstance(node, N.Slice):
            dim = graph[node.arg].axes.index(node.axis) - len(graph[node.arg].axes)
            return f"row_of({self.text(graph, node.arg)[0]}, {dim}, {node.at.text()})", 9
        if isinstance(node, N.Linear):
            return self.linear(graph, node), 9
        if isinstance(node, N.Conv):
            w, b = self.hold(graph, node.weight), self.hold(graph, node.bias) if node.bias else "None"
            past = f"state_{identifier(self.histories[node.id].name)}"
            return f"seq.conv({self.text(graph, node.arg)[0]}, {w}, {b}, {past})", 9
        raise NotImplementedError(node.kind)

    def coordinate(self, node: N.Coord) -> tuple[str, int]:
        if node.axis == self.step_axis:
            return "position", 9
        if self.is_time(node.axis):
            return "seq.positions(start)", 9
        return f"torch.arange({node.axis}, device=device)", 9

    def map(self, graph: Graph, node: N.Map) -> tuple[str, int]:
        lead = self.lead(graph, node.id)
        if node.fn == "as":
            text, rank = self.aligned(graph, node.args[0], node.axes, lead)
            if isinstance(graph[node.args[0]], N.Const):
                text, rank = f"torch.tensor({text}, dtype=ct, device=device)", 9
            return f"{_hold(text, rank, 9)}.expand{self.shape(node.axes, lead)}", 9
        args = [self.aligned(graph, a, node.axes, lead) for a in node.args]
        if (node.fn in INFIX or node.fn in ("neg", "not")) and all(isinstance(graph[a], N.Const) for a in node.args):
            of = ", dtype=ct" if graph[node.args[0]].dtype == "float" else ""
            args[0] = f"torch.tensor({args[0][0]}{of}, device=device)", 9  # what stands around wants a tensor
        if node.fn in INFIX:
            rank = INFIX[node.fn]
            sign = {"and": "&", "or": "|"}.get(node.fn, node.fn)
            if sign in "&|":
                return f"({_hold(*args[0], 9)} {sign} {_hold(*args[1], 9)})", 9
            right = rank + (node.fn not in "+*")
            return f"{_hold(*args[0], rank)} {sign} {_hold(*args[1], right)}", rank
        if node.fn == "neg":
            return f"-{_hold(*args[0], 6)}", 6
        if node.fn == "not":
            return f"~{_hold(*args[0], 9)}", 8
        if node.fn == "pow":
            return f"{_hold(*args[0], 8)} ** {_hold(*args[1], 8)}", 7
        if node.fn in ("min", "max"):
            return self.extreme(graph, node, args)
        if node.fn == "where":
            if isinstance(graph[node.args[0]], N.Const):
                args[0] = f"torch.tensor(bool({args[0][0]}), device=device)", 9
            values = [self.scalar_safe(graph, i, t[0]) for i, t in zip(node.args[1:], args[1:])]
            return f"torch.where({args[0][0]}, {values[0]}, {values[1]})", 9
        if isinstance(graph[node.args[0]], N.Const):
            inner = f"torch.tensor(float({args[0][0]}), dtype=ct, device=device)"
            return CALLS[node.fn].format(inner), 9
        value = args[0][0]
        counted = graph[node.args[0]].dtype == "int" or self.counted(graph, node.args[0])
        if counted and node.fn not in ("floor", "abs", "stop"):
            value = f"{_hold(*args[0], 9)}.to(ct)"
        return CALLS[node.fn].format(value), 9

    def counted(self, graph: Graph, id_: str) -> bool:
        """Whether a value comes from coordinates and numbers alone: its tensor may hold integers."""
        node = graph[id_]
        if isinstance(node, N.Map):
            return all(self.counted(graph, a) for a in node.args)
        return isinstance(node, N.Coord | N.Const)

    def scalar_safe(self, graph: Graph, id_: str, text: str) -> str:
        """torch.where wants a tensor of the right type where a constant stands."""
        return f"torch.tensor(float({text}), dtype=ct, device=device)" if isinstance(graph[id_], N.Const) else text

    def extreme(self, graph: Graph, node: N.Map, args: list[tuple[str, int]]) -> tuple[str, int]:
        """min and max of two or more; a constant clamps."""
        consts = [t for i, t in zip(node.args, args) if isinstance(graph[i], N.Const)]
        tensors = [t for i, t in zip(node.args, args) if not isinstance(graph[i], N.Const)]
        if not tensors:
            return f"{node.fn}({', '.join(t for t, _ in consts)})", 9
        text, rank = tensors[0]
        for other, _ in tensors[1:]:
            text, rank = f"torch.{node.fn}imum({text}, {other})", 9
        for value, _ in consts:
            text, rank = f"{_hold(text, rank, 9)}.clamp({'max' if node.fn == 'min' else 'min'}={value})", 9
        return text, rank

    def along(self, graph: Graph, node: N.Reduce | N.Normalize) -> tuple[str, int]:
        axes = graph[node.arg].axes
        if any(self.is_time(a) for a in node.over):
            return f'seq.reduce({self.text(graph, node.arg)[0]}, "{node.fn}")', 9
        dims = [axes.index(a) - len(axes) for a in node.over]
        listed = ", ".join(map(str, dims))
        if isinstance(node, N.Normalize):
            return f"{node.fn}({self.text(graph, node.arg)[0]}, ({listed},))", 9
        fn = {"max": "amax", "min": "amin"}.get(node.fn, node.fn)
        inner = self.hold(graph, node.arg)
        return f"{inner}.{fn}({listed})" if len(dims) == 1 else f"{inner}.{fn}(({listed}))", 9

    def linear(self, graph: Graph, node: N.Linear) -> str:
        kept = [a for a in graph[node.arg].axes if a not in node.over]
        text, _ = self.aligned(graph, node.arg, (*kept, *node.over), self.lead(graph, node.arg))
        bias = self.hold(graph, node.bias) if node.bias else "None"
        return f"linear({text}, {self.hold(graph, node.weight)}, {bias}, {len(node.over)}, ct)"

    # -- statements --------------------------------------------------------------------------------------------------

    def inline(self, graph: Graph, node: N.AnyNode, users: list[N.AnyNode], kept: set[str]) -> bool:
        """Whether a value stands inside its one user's expression instead of in a variable."""
        if isinstance(node, N.Const | N.Rename):
            return True
        if node.id in kept or node.id in self.histories or is_name(node.id) and not _generic(node):
            return False
        return len(users) == 1 and not isinstance(users[0], N.Recur | N.Scan) and len(self._flat(graph, node.id)) < 60

    def _flat(self, graph: Graph, id_: str) -> str:
        return self.text(graph, id_)[0]

    def emit(self) -> None:
        """Statements for the whole graph, in order."""
        kept = {id_ for _, id_ in self.graph.outputs}
        self.bind()
        for node in self.graph.of_kind(N.Param):
            if not node.library and self.users[node.id]:  # a library's weights keep their type
                name = self.fresh(node.name) if self.owner else self.names[node.id]
                self.w(f"{name} = {self.names[node.id]}.to(ct)")
                self.names[node.id] = name
        for state in states(self.graph):
            given = f"state_{identifier(state.name)}"
            value = f"torch.zeros({self.shape(state.axes, 1)}, dtype=ct, device=device)"
            if state.initial is not None:
                text, rank = self.aligned(self.graph, state.initial, state.axes, 0)
                value = f"{_hold(text, rank, 9)}.expand{self.shape(state.axes, 1)}"
                value += "" if self.graph[state.initial].dtype == "float" else ".to(ct)"
            self.w(f"{given} = {value} if {given} is None else {given}.to(ct)")
        for node in self.graph.nodes:
            if isinstance(node, N.Input | N.Param):
                continue
            if isinstance(node, N.Scan):
                self.scan(node)
            elif isinstance(node, N.Recur):
                self.recur(node)
            elif not isinstance(node, N.Out) and not self.inline(self.graph, node, self.users[node.id], kept):
                self.assign(self.graph, node)

    def bind(self) -> None:
        """Inputs and parameters under their names."""
        for node in self.graph.of_kind(N.Input):
            self.names[node.id] = identifier(node.name)
            self.taken.add(identifier(node.name))
        for node in self.graph.of_kind(N.Param):
            self.names[node.id] = f"{self.owner}{self.attribute(node.name)}"

    def assign(self, graph: Graph, node: N.AnyNode) -> None:
        text, _ = self.expression(graph, node)
        name = self.fresh(node.id if not _generic(node) else "x")
        place = self.lines.place(node.span)
        self.w(f"{name} = {text}" + (f"  # {place}" if place else ""))
        self.names[node.id] = name
        history = self.histories.get(node.id)
        if history is not None and isinstance(node, N.Shift | N.Conv):
            arg = self.text(graph, node.arg)[0]
            target = f"next_{identifier(history.name)}"
            self.w(f"{target} = seq.last({arg}, {history.rows}, state_{identifier(history.name)})")

    def outs(self, node: N.AnyNode) -> dict[int, N.Out]:
        return {u.index: u for u in self.users[node.id] if isinstance(u, N.Out)}

    def scan(self, node: N.Scan) -> None:
        """A call of the scan's entry point, operands laid out as [B, T, H, D]."""
        state = identifier(node.name)
        axes = (*node.batch, *node.i, *node.j)
        initial = self.state_in(node.name, axes)
        outs = self.outs(node)
        self.w(f"# {node.name}: {self.lines.code(node.span)}")
        if node.id in self.scans:
            self.matrix_scan(node, self.scans[node.id], initial, outs)
            return
        full = f"(seq.rows, seq.tokens, {', '.join(axes)})" if axes else "(seq.rows, seq.tokens)"
        gate = "torch.ones((), dtype=ct, device=device)"
        if node.gates:
            gate, _ = self.aligned(self.graph, node.gates[0].arg, (node.axis, *axes), 2)
        add = "torch.zeros((), dtype=ct, device=device)"
        if node.add is not None:
            add, _ = self.aligned(self.graph, node.add, (node.axis, *axes), 2)
        kind = "max_plus_scan" if node.algebra == "max-plus" else "vector_scan"
        before, last = self.fresh(f"{state}_before"), self.fresh(f"{state}_last")
        self.w(f"{before}, {last} = scans.{kind}(")
        self.w(f"    seq, lay({self.tensor(node.gates[0].arg if node.gates else None, gate)}, {full}, 0),")
        self.w(f"    lay({self.tensor(node.add, add)}, {full}, 0), {initial}.reshape(seq.count, 1, -1))")
        if node.stop:
            self.w(f"{before}, {last} = stopped(seq, {before}, {last}, {initial}.reshape(seq.count, 1, -1))")
        shape = ", ".join(["seq.rows", "seq.tokens", *axes])
        if 0 in outs:
            self.w(f"{before} = {before}.reshape({shape})")
            self.names[outs[0].id] = before
        self.state_out(node.name, f"{last}.reshape({', '.join(['seq.count', *axes])})", axes, outs.get(1))

    def tensor(self, id_: str | None, text: str) -> str:
        """An operand as a tensor of the compute dtype."""
        if id_ is not None and isinstance(self.graph[id_], N.Const):
            return f"torch.tensor(float({text}), dtype=ct, device=device)"
        return text if id_ is None or self.graph[id_].dtype == "float" else f"({text}).to(ct)"

    def matrix_scan(self, node: N.Scan, form: ScanForm, initial: str, outs: dict[int, N.Out]) -> None:
        heads = len(node.batch)
        call: list[str] = []
        for o in form.operands():
            side = node.i if o.side == "i" else node.j
            axes = (node.axis, *node.batch, *side)
            text, _ = self.aligned(self.graph, o.node, axes, 2)
            dims = [*node.batch, *(["1"] * len(side) if o.thin else side)]
            call.append(f"lay({self.tensor(o.node, text)}, (seq.rows, seq.tokens, {', '.join(dims)}), {heads})")
        shape = f"(seq.count, math.prod(({''.join(b + ', ' for b in node.batch)})), " + ", ".join(
            f"math.prod(({''.join(a + ', ' for a in side)}))" for side in (node.i, node.j)
        ) + ")"  # fmt: skip
        results = [self.fresh(f"read_{q.name}") for q in form.queries]
        last = self.fresh(f"{form.name}_last")
        self.w(f"{', '.join([*results, last])} = scans.{form.name}_scan(")
        for line in ["seq", *call, f"{initial}.reshape({shape})"]:
            self.w(f"    {line},")
        self.w(")")
        for index, (q, name) in enumerate(zip(form.queries, results)):
            if index in outs:
                kept = node.j if q.side == "i" else node.i
                self.w(f"{name} = {name}.reshape({', '.join(['seq.rows', 'seq.tokens', *node.batch, *kept])})")
                self.names[outs[index].id] = name
        axes = (*node.batch, *node.i, *node.j)
        final = f"{last}.reshape({', '.join(['seq.count', *axes])})"
        self.state_out(node.name, final, axes, outs.get(len(form.queries)))

    def state_in(self, name: str, axes: tuple[str, ...]) -> str:
        """The state that a recurrence starts from, in this order of axes."""
        declared = declared_axes(self.graph, name)
        text = f"state_{identifier(name)}"
        if declared != axes:
            text += f".permute(0, {', '.join(str(1 + declared.index(a)) for a in axes)})"
        return text

    def state_out(self, name: str, text: str, axes: tuple[str, ...], out: N.Out | None) -> None:
        declared = declared_axes(self.graph, name)
        target = f"next_{identifier(name)}"
        if declared != axes:
            text += f".permute(0, {', '.join(str(1 + axes.index(a)) for a in declared)})"
        self.w(f"{target} = {text}")
        if out is not None:
            self.names[out.id] = target

    def recur(self, node: N.Recur) -> None:
        """A loop over tokens, all sequences at once."""
        w, body = self.w, node.body
        outs = self.outs(node)
        w(f"# one token at a time: {node.reason}")
        local: dict[str, str] = {}
        for n in body.nodes:
            if isinstance(n, N.Capture) and self.lead(self.graph, n.outer) == 2:
                row = self.fresh(f"{n.outer}_rows")
                w(f"{row} = seq.padded({self.text(self.graph, n.outer)[0]})")
                local[n.id] = f"{row}[:, step]"
            elif isinstance(n, N.Capture):
                local[n.id] = self.text(self.graph, n.outer)[0]
        for c in node.carried:
            w(f"now_{identifier(c.name)} = state_{identifier(c.name)}")
        lists = {i: self.fresh(f"{body.outputs[i][0]}_steps") for i in outs if i < len(body.outputs)}
        for name in lists.values():
            w(f"{name} = []")
        saved, users = self.names, self.users
        self.names, self.users, self.step_axis = local, body.users(), node.axis
        with w.indented("for step in range(seq.tokens if not seq.packed else int(seq.offsets.diff().max())):"):
            self.loop_body(node, lists)
        self.names, self.users, self.step_axis = saved, users, None
        for i, name in lists.items():
            result = self.fresh(outs[i].id)
            axes = body[body.outputs[i][1]].axes
            w(f"{result} = seq.unpadded(torch.stack({name}, 1)) if {name} else "
              f"torch.zeros({self.shape((node.axis, *axes), 2)}, dtype=ct, device=device)")  # fmt: skip
            self.names[outs[i].id] = result
        for k, c in enumerate(node.carried):
            self.state_out(c.name, f"now_{identifier(c.name)}", c.axes, outs.get(len(body.outputs) + k))

    def loop_body(self, node: N.Recur, lists: dict[int, str]) -> None:
        w, body = self.w, node.body
        kept = {c.result for c in node.carried} | {id_ for _, id_ in body.outputs}
        if any(isinstance(n, N.Coord) and n.axis == node.axis for n in body.nodes):
            w("position = start + step")
        for n in body.nodes:
            if isinstance(n, N.State):
                self.names[n.id] = f"now_{identifier(n.name)}"
            elif not isinstance(n, N.Capture) and not self.inline(body, n, self.users[n.id], kept):
                text, _ = self.expression(body, n)
                name = self.fresh(n.id if not _generic(n) else "x")
                w(f"{name} = {text}" + (f"  # {self.lines.place(n.span)}" if n.span else ""))
                self.names[n.id] = name
        for i, name in lists.items():
            id_ = body.outputs[i][1]
            text, rank = self.aligned(body, id_, body[id_].axes, 1)
            w(f"{name}.append({_hold(text, rank, 9)}.expand{self.shape(body[id_].axes, 1)})")
        for c in node.carried:
            text, rank = self.aligned(body, c.result, c.axes, 1)
            w(f"new_{identifier(c.name)} = {_hold(text, rank, 9)}.expand{self.shape(c.axes, 1)}")
        for c in node.carried:
            state = identifier(c.name)
            alive = f"seq.alive(step).view(-1{', 1' * len(c.axes)})"
            w(f"now_{state} = torch.where({alive}, new_{state}, now_{state}) if seq.packed else new_{state}")


@dataclass(frozen=True)
class StateField:
    """A field of a unit's state: a recurrence's state, with the node it starts from, or a history of tokens."""

    name: str
    axes: tuple[str, ...]
    initial: str | None = None
    rows: str | None = None


def states(graph: Graph) -> list[StateField]:
    """The recurrences' states, in declared order."""
    found: dict[str, tuple[int, StateField]] = {}
    for n in graph.nodes:
        if isinstance(n, N.Recur):
            for c in n.carried:
                found[c.name] = (c.span.start if c.span else 0, StateField(c.name, c.axes, c.initial))
        elif isinstance(n, N.Scan) and n.name not in found:
            found[n.name] = (n.span.start if n.span else 0, StateField(n.name, n.declared, n.initial))
    return [field for _, field in sorted(found.values(), key=lambda f: f[0])]


class History:
    """The tokens before a sequence's first that a shift or convolution reads: part of the state."""

    def __init__(self, name: str, rows: str, axes: tuple[str, ...]) -> None:
        self.name, self.rows, self.axes = name, rows, axes


def histories(graph: Graph) -> dict[str, History]:
    """For each shift back and convolution its history, named after the definition."""
    out: dict[str, History] = {}
    for node in graph.nodes:
        if isinstance(node, N.Conv) or isinstance(node, N.Shift) and not _is_zero_or_less(node.by):
            rows = f"{node.width.text(1)} - 1" if isinstance(node, N.Conv) else node.by.text()
            axes = tuple(a for a in node.axes if a != node.axis)
            base = node.id if not _generic(node) else f"{node.arg}_before"
            name, n = base, 1
            while any(h.name == name for h in out.values()) or not is_name(name):
                n += 1
                name = f"{base if is_name(base) else 'shift'}_{n}"
            out[node.id] = History(name, rows, axes)
    return out


def _is_zero_or_less(size: Size) -> bool:
    return not size.params() and size.evaluate({}) <= 0


def matrix_scans(graph: Graph) -> list[N.Scan]:
    return [n for n in graph.nodes if isinstance(n, N.Scan) and (n.i or n.j)]


def declared_axes(graph: Graph, state: str) -> tuple[str, ...]:
    """A state's axes as the spec declares them; a scan has them as batch, i, j."""
    for n in graph.nodes:
        if isinstance(n, N.Recur):
            for c in n.carried:
                if c.name == state:
                    return c.axes
        if isinstance(n, N.Scan) and n.name == state:
            return n.declared
    raise KeyError(state)


def param_name(name: str) -> str:
    """A parameter's attribute: dots as in the spec's names, keywords with an underscore."""
    return ".".join(identifier(part) for part in name.split("."))


def _generic(node: N.AnyNode) -> bool:
    """Whether a node's id is no name from the spec, but its kind or function with a number."""
    base = node.id.rsplit("_", 1)[0] if node.id.rsplit("_", 1)[-1].isdigit() else node.id
    return base in (node.kind, getattr(node, "fn", node.kind))


def _hold(text: str, rank: int, wanted: int) -> str:
    return text if rank >= wanted else f"({text})"
