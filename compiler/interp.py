"""The reference interpreter: runs a graph of any level on one sequence, one node and one token at a time.

It is the oracle of the tests: slow and obvious, in whatever dtype it is given. Values are tensors whose dimensions
follow the node's axes; there is no batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from chunkc import interp_tiles as over_tiles
from chunkc.ir import nodes as N
from chunkc.ir import tiles as T
from chunkc.ir.axes import Number
from chunkc.ir.graph import Graph, Unit

UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": torch.exp, "log": torch.log, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "silu": F.silu,
    "gelu": F.gelu, "relu": torch.relu, "softplus": lambda x: torch.logaddexp(x, torch.zeros_like(x)),
    "logsigmoid": lambda x: -torch.logaddexp(-x, torch.zeros_like(x)), "abs": torch.abs, "neg": torch.neg,
    "inv_softplus": lambda x: x + torch.log(-torch.expm1(-x)), "floor": torch.floor, "not": torch.logical_not,
    "stop": torch.Tensor.detach,
}  # fmt: skip
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "+": torch.add, "-": torch.sub, "*": torch.mul, "/": torch.true_divide, "%": torch.remainder, "pow": torch.pow,
    "<": torch.lt, "<=": torch.le, ">": torch.gt, ">=": torch.ge, "==": torch.eq, "!=": torch.ne,
    "and": torch.logical_and, "or": torch.logical_or, "max": torch.maximum, "min": torch.minimum,
}  # fmt: skip


@dataclass
class Run:
    """What a run is given: parameters, tensors by name, the lengths of sequence axes, initial states by name."""

    settings: Mapping[str, Number] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    lengths: Mapping[str, int] = field(default_factory=dict)
    initial: Mapping[str, Tensor] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64


def interpret(unit: Unit, run: Run) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The unit's outputs and its recurrences' final states, by name."""
    machine = Interpreter(unit.graph, run)
    outputs = {name: machine.value(id_) for name, id_ in unit.graph.outputs}
    for node in unit.graph.of_kind(N.Recur, N.Scan):
        machine.value(node.id)
    return outputs, machine.finals


class Interpreter:
    """Values of a graph's nodes, found on demand; `captured` are the values of the graph around a body."""

    def __init__(self, graph: Graph, run: Run) -> None:
        self.graph = graph
        self.run = run
        self.values: dict[str, Tensor] = {}
        self.results: dict[str, list[Tensor]] = {}
        self.finals: dict[str, Tensor] = {}
        self.watched = {id_ for n in graph.of_kind(N.GateGradient) for id_ in n.operands()}
        self.trajectories: dict[str, Tensor] = {}

    def size(self, axis: str) -> int:
        a = self.graph.axis[axis]
        return int(a.size.evaluate(self.run.settings)) if a.size is not None else self.run.lengths[a.space]

    def inner(self, body: Graph, tensors: Mapping[str, Tensor] | None = None) -> Interpreter:
        """A machine for a region, with its inputs by name if it has any."""
        return Interpreter(body, self.run if tensors is None else replace(self.run, tensors=tensors))

    def value(self, id_: str) -> Tensor:
        for node in self.graph.nodes:
            if node.id not in self.values and node.id in self.graph.reachable([id_]):
                self.values[node.id] = self.evaluate(node)
        return self.values[id_]

    def aligned(self, id_: str, axes: tuple[str, ...]) -> Tensor:
        """A value as a view over these axes, ones where it lacks one."""
        have = self.graph[id_].axes
        x = self.values[id_].permute([have.index(a) for a in axes if a in have])
        for position, a in enumerate(axes):
            if a not in have:
                x = x.unsqueeze(position)
        return x

    def real(self, value: Number) -> Tensor:
        return torch.tensor(value, dtype=self.run.dtype if isinstance(value, float) else None)

    def evaluate(self, node: N.AnyNode) -> Tensor:
        v = self.values
        if isinstance(node, N.Input | N.Param):
            return self.run.tensors[node.name]
        if isinstance(node, N.Const):
            return self.real(node.size.evaluate(self.run.settings))
        if isinstance(node, N.Random):
            return self.random(node)
        if isinstance(node, N.Coord):
            return torch.arange(self.size(node.axis))
        if isinstance(node, N.Length):
            return torch.tensor(self.size(node.axis))
        if isinstance(node, N.Map):
            return self.map(node)
        if isinstance(node, N.Reduce | N.Normalize):
            return self.along(node)
        if isinstance(node, N.Expand):
            have = self.graph[node.arg].axes
            dim, count = have.index(node.source), self.size(node.target) // self.size(node.source)
            return v[node.arg].repeat_interleave(count, dim)
        if isinstance(node, N.Rename):
            return v[node.arg]
        if isinstance(node, N.Shift | N.Slice | N.Gather):
            return self.moved(node)
        if isinstance(node, N.Linear):
            return self.linear(node)
        if isinstance(node, N.Conv):
            return self.conv(node)
        if isinstance(node, N.Recur):
            self.results[node.id] = self.recur(node)
            return torch.zeros(())
        if isinstance(node, N.Scan):
            self.results[node.id] = self.scan(node)
            return torch.zeros(())
        if isinstance(node, N.GateGradient):
            return self.gate_gradient(node)
        if isinstance(node, over_tiles.SEVERAL):
            self.results[node.id] = over_tiles.results_of(self, node)
            return torch.zeros(())
        if isinstance(node, over_tiles.KINDS):
            return over_tiles.value_of(self, node)
        assert isinstance(node, N.Out | T.Buffer), node
        return self.results[node.arg][node.index]

    def random(self, node: N.Random) -> Tensor:
        shape = [self.size(a) for a in node.axes]
        a, b = (float(s.evaluate(self.run.settings)) for s in (node.a, node.b))
        if node.fn == "uniform":
            return torch.empty(shape, dtype=self.run.dtype).uniform_(a, b)
        return torch.randn(shape, dtype=self.run.dtype) * a

    def map(self, node: N.Map) -> Tensor:
        args = [self.aligned(a, node.axes) for a in node.args]
        if node.fn == "as":
            return args[0].expand([self.size(a) for a in node.axes])
        if node.fn == "where":
            args[1:] = [a.to(self.run.dtype) if node.dtype == "float" else a for a in args[1:]]
            return torch.where(args[0], args[1], args[2])
        if node.dtype == "float":
            args = [a.to(self.run.dtype) for a in args]
        if node.fn in UNARY:
            return UNARY[node.fn](args[0])
        out = args[0]
        for a in args[1:]:
            out = BINARY[node.fn](out, a)
        return out

    def along(self, node: N.Reduce | N.Normalize) -> Tensor:
        x = self.values[node.arg]
        dims = [self.graph[node.arg].axes.index(a) for a in node.over]
        if isinstance(node, N.Reduce):
            if node.fn == "sum":
                return x.sum(dims)
            if node.fn == "mean":
                count = math.prod(x.shape[d] for d in dims)
                return x.to(self.run.dtype).sum(dims) / max(count, 1)
            if node.fn == "any":
                return x.any(dims[0]) if len(dims) == 1 else x.amax(dims)
            return x.amax(dims) if node.fn == "max" else x.amin(dims)
        if node.fn == "softmax":
            e = torch.exp(x - x.amax(dims, keepdim=True))
            return e / e.sum(dims, keepdim=True)
        if node.fn == "rms_norm":
            return x / torch.sqrt((x * x).mean(dims, keepdim=True) + 1e-5)
        if node.fn == "l2_norm":
            return x / torch.sqrt((x * x).sum(dims, keepdim=True) + 1e-6)
        centred = x - x.mean(dims, keepdim=True)
        return centred / torch.sqrt((centred * centred).mean(dims, keepdim=True) + 1e-5)

    def moved(self, node: N.Shift | N.Slice | N.Gather) -> Tensor:
        x = self.values[node.arg]
        dim = self.graph[node.arg].axes.index(node.axis)
        n = x.shape[dim]
        if isinstance(node, N.Shift):
            index = torch.arange(n) - int(node.by.evaluate(self.run.settings))
        elif isinstance(node, N.Slice):
            index = torch.tensor(int(node.at.evaluate(self.run.settings)))
        else:
            index = self.values[node.index]
        inside = (index >= 0) & (index < n)
        picked = x.movedim(dim, 0)[index.clamp(0, max(n - 1, 0))]
        shape = list(inside.shape) + [1] * (picked.dim() - inside.dim())
        picked = torch.where(inside.reshape(shape), picked, torch.zeros((), dtype=x.dtype))
        if isinstance(node, N.Shift):
            return picked.movedim(0, dim)
        return picked

    def linear(self, node: N.Linear) -> Tensor:
        axes = self.graph[node.arg].axes
        kept = [a for a in axes if a not in node.over]
        x = self.values[node.arg].to(self.run.dtype)
        x = x.permute([axes.index(a) for a in (*kept, *node.over)])
        y: Tensor = torch.tensordot(x, self.values[node.weight], len(node.over))
        return y if node.bias is None else y + self.values[node.bias]

    def conv(self, node: N.Conv) -> Tensor:
        axes = self.graph[node.arg].axes
        x = self.values[node.arg].movedim(axes.index(node.axis), 0)
        w = self.values[node.weight]
        width = w.shape[-1]
        out = torch.zeros_like(x)
        for m in range(width):
            back = width - 1 - m
            shifted = torch.cat([torch.zeros_like(x[:back]), x[: max(x.shape[0] - back, 0)]])[: x.shape[0]]
            out = out + w[..., m] * shifted
        if node.bias is not None:
            out = out + self.values[node.bias]
        return out.movedim(0, axes.index(node.axis))

    # -- recurrences -------------------------------------------------------------------------------------------------

    def start(self, name: str, axes: tuple[str, ...], initial: str | None) -> Tensor:
        """A state before the first step: the one given to the run, else the spec's."""
        shape = [self.size(a) for a in axes]
        if name in self.run.initial:
            return self.run.initial[name]
        if initial is None:
            return torch.zeros(shape, dtype=self.run.dtype)
        return self.aligned(initial, axes).to(self.run.dtype).expand(shape)

    def recur(self, node: N.Recur) -> list[Tensor]:
        states = {c.name: self.start(c.name, c.axes, c.initial) for c in node.carried}
        rows: list[list[Tensor]] = [[] for _ in node.body.outputs]
        steps = self.size(node.axis)
        for t in range(steps):
            body = self.inner(node.body)
            for n in node.body.nodes:
                if isinstance(n, N.State):
                    body.values[n.id] = states[n.name]
                elif isinstance(n, N.Capture):
                    have = self.graph[n.outer].axes
                    x = self.values[n.outer]
                    body.values[n.id] = x.select(have.index(node.axis), t) if node.axis in have else x
                elif isinstance(n, N.Coord) and n.axis == node.axis:
                    body.values[n.id] = torch.tensor(t)
            for row, (_, id_) in zip(rows, node.body.outputs):
                row.append(body.value(id_))
            states = {c.name: body.value(c.result) for c in node.carried}
        self.finals.update(states)
        out = []
        for row, (_, id_) in zip(rows, node.body.outputs):
            shape = [self.size(a) for a in node.body[id_].axes]
            out.append(torch.stack(row) if row else torch.zeros([0, *shape], dtype=self.run.dtype))
        return out + [states[c.name] for c in node.carried]

    def scan(self, node: N.Scan) -> list[Tensor]:
        """S_t = A_t S_{t-1} + writes, a token at a time; queries read S_{t-1}."""
        axes = (*node.batch, *node.i, *node.j)
        state = self.start(node.name, axes, node.initial)
        steps = self.size(node.axis)

        def at(id_: str, t: int) -> Tensor:
            have = self.graph[id_].axes
            x = self.values[id_].to(self.run.dtype)
            if node.axis in have:
                x = x.select(have.index(node.axis), t)
                have = tuple(a for a in have if a != node.axis)
            x = x.permute([have.index(a) for a in axes if a in have])
            for position, a in enumerate(axes):
                if a not in have:
                    x = x.unsqueeze(position)
            return x

        order = range(steps - 1, -1, -1) if node.reverse else range(steps)
        count = len(node.queries) + (0 if node.i or node.j else 1)
        rows: list[list[Tensor]] = [[] for _ in range(count)]
        states: list[Tensor] = []
        for t in order:
            if node.id in self.watched:
                states.append(state)
            for row, q in zip(rows, node.queries):
                removed = node.i if q.side == "i" else node.j
                row.append((at(q.arg, t) * state).sum([axes.index(a) for a in removed]))
            if count > len(node.queries):
                rows[-1].append(state)
            new = state
            for g in node.gates:
                a = at(g.arg, t)
                new = new + a if node.algebra == "max-plus" else new * (torch.exp(a) if g.log else a)
            for w in node.writes:
                new = new + at(w.i, t) * at(w.j, t)
            if node.add is not None:
                a = at(node.add, t)
                new = torch.maximum(new, a) if node.algebra == "max-plus" else new + a
            state = new.expand(state.shape)
            if node.stop:
                state = state.detach()
        if not node.reverse:
            self.finals[node.name] = state
        if node.id in self.watched:
            ordered = states[::-1] if node.reverse else states
            self.trajectories[node.id] = torch.stack(ordered) if states else state.new_zeros((0, *state.shape))
        out = []
        for index, row in enumerate(rows):
            shape = [self.size(a) for a in node.result_axes(index)]
            ordered = row[::-1] if node.reverse else row
            out.append(torch.stack(ordered).reshape(shape) if row else torch.zeros(shape, dtype=self.run.dtype))
        return [*out, state]

    def gate_gradient(self, node: N.GateGradient) -> Tensor:
        """The product of transition, state and adjoint, summed over the axes that the gate lacks."""
        scan = self.graph[node.scan]
        assert isinstance(scan, N.Scan)
        axes = (scan.axis, *scan.batch, *scan.i, *scan.j)
        total = self.trajectories[node.scan] * self.trajectories[node.adjoint]
        for index, g in enumerate(scan.gates):
            a = self.aligned(g.arg, axes)
            if g.log or index != node.gate:
                total = total * (torch.exp(a) if g.log else a)
        lacking = [axes.index(a) for a in axes if a not in node.axes]
        return total.sum(lacking) if lacking else total
