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
    "inv_softplus": lambda x: x + torch.log(-torch.expm1(-x)), "floor": lambda x: torch.floor(x).long(),
    "not": torch.logical_not, "stop": torch.Tensor.detach, "sin": torch.sin, "cos": torch.cos, "re": torch.real,
    "im": torch.imag, "erf": torch.erf,
}  # fmt: skip
STEP = ("read", "gate", "write")  # what a scan does in a step, in a circle
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "+": torch.add, "-": torch.sub, "*": torch.mul, "/": torch.true_divide, "%": torch.remainder, "pow": torch.pow,
    "<": torch.lt, "<=": torch.le, ">": torch.gt, ">=": torch.ge, "==": torch.eq, "!=": torch.ne,
    "and": torch.logical_and, "or": torch.logical_or, "max": torch.maximum, "min": torch.minimum,
    "complex": lambda a, b: a + 1j * b,
}  # fmt: skip


@dataclass
class Run:
    """What a run is given: parameters, tensors by name, the lengths of sequence axes and the position of their first
    token, initial states by name."""

    settings: Mapping[str, Number] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    lengths: Mapping[str, int] = field(default_factory=dict)
    initial: Mapping[str, Tensor] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    positions: Mapping[str, int] = field(default_factory=dict)


def interpret(unit: Unit, run: Run) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The unit's outputs and its recurrences' final states, by name."""
    machine = Interpreter(unit.graph, run)
    outputs = {name: machine.value(id_) for name, id_ in unit.graph.outputs}
    for node in unit.graph.of_kind(N.Recur, N.Scan):
        machine.value(node.id)
    return outputs, machine.finals


@dataclass(frozen=True)
class Chunk:
    """A chunk: tokens `start` to `stop` of those given, whether it began before them, and whether it may go on."""

    start: int
    stop: int
    continues: bool = False
    open: bool = False


class Interpreter:
    """Values of a graph's nodes, found on demand; `chunks` are those of the graph around a body."""

    def __init__(self, graph: Graph, run: Run, chunks: Mapping[str, list[Chunk]] | None = None) -> None:
        self.graph = graph
        self.run = run
        self.chunks: dict[str, list[Chunk]] = dict(chunks or {})
        self.values: dict[str, Tensor] = {}
        self.results: dict[str, list[Tensor]] = {}
        self.finals: dict[str, Tensor] = {}
        self.watched = {id_ for n in graph.of_kind(N.GateGradient) for id_ in n.operands()}
        self.trajectories: dict[str, Tensor] = {}

    def size(self, axis: str) -> int:
        a = self.graph.axis[axis]
        if a.kind == "chunk":
            return len(self.chunks[a.space])
        return int(a.size.evaluate(self.run.settings)) if a.size is not None else self.run.lengths[a.space]

    def first(self, axis: str) -> int:
        """The position of the first token that is given."""
        return self.run.positions.get(self.graph.axis[axis].space, 0)

    def inner(self, body: Graph, tensors: Mapping[str, Tensor] | None = None) -> Interpreter:
        """A machine for a region, with its inputs by name if it has any."""
        return type(self)(body, self.run if tensors is None else replace(self.run, tensors=tensors), self.chunks)

    def value(self, id_: str) -> Tensor:
        needed = self.graph.reachable([id_, *(n.id for n in self.graph.of_kind(N.Segment))])
        for node in self.graph.nodes:
            if node.id not in self.values and node.id in needed:
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

    def dtype(self, kind: str) -> torch.dtype:
        """The type of a value of this kind."""
        kinds = {"complex": self.run.dtype.to_complex(), "int": torch.int64, "bool": torch.bool}
        return kinds.get(kind, self.run.dtype)

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
            return torch.arange(self.size(node.axis)) + self.first(node.axis)
        if isinstance(node, N.Segment):
            self.chunks[node.chunk] = self.segment(node)
            return torch.zeros(())
        if isinstance(node, N.Bounds):
            return self.bounds(node)
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
        if isinstance(node, N.Scatter):
            return self.scatter(node)
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
        if isinstance(node, N.Attend):
            return self.attend(node)
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
        if node.dtype in ("float", "complex"):
            args = [a if a.is_complex() else a.to(self.run.dtype) for a in args]
        if node.fn in UNARY:
            return UNARY[node.fn](args[0])
        out = args[0]
        for a in args[1:]:
            out = BINARY[node.fn](out, a)
        return out

    def segment(self, node: N.Segment) -> list[Chunk]:
        """The chunks of a sequence whose first token may stand within one."""
        parent = self.graph.axis[node.chunk].parent
        assert parent is not None
        length, position = self.size(parent), self.first(parent)
        n = 0 if node.n is None else int(node.n.evaluate(self.run.settings))
        if node.rule == "parts":
            edges = [k * length // n for k in range(n + 1)]
            return [Chunk(a, b) for a, b in zip(edges, edges[1:])]
        if node.rule == "fixed":
            positions = {
                **self.run.positions,
                node.chunk: position // n,
            }  # chunks are counted from the sequence's start
            self.run = replace(self.run, positions=positions)
            starts = [k for k in range(length) if (position + k) % n == 0]
        else:
            assert node.begins is not None
            begins = self.values[node.begins]
            starts = [k for k in range(length) if bool(begins[k]) or k + position == 0]
        continues = length > 0 and 0 not in starts
        edges = [*([0] if continues else []), *starts, length]
        last = node.rule == "runs" or (n > 0 and (position + length) % n != 0)
        return [
            Chunk(a, b, continues and a == 0, last and b == length) for a, b in zip(edges, edges[1:])
        ]  # fmt: skip

    def bounds(self, node: N.Bounds) -> Tensor:
        chunks = self.chunks[node.chunk]
        parent = self.graph.axis[node.chunk].parent
        assert parent is not None
        if node.fn == "of":
            index = [m for m, chunk in enumerate(chunks) for _ in range(chunk.start, chunk.stop)]
        elif node.fn == "index":
            index = list(range(len(chunks)))
        elif node.fn == "length":
            return torch.tensor([chunk.stop - chunk.start for chunk in chunks], dtype=torch.int64)
        else:
            edges = [c.start if node.fn == "first" else c.stop - 1 for c in chunks]
            return torch.tensor(edges, dtype=torch.int64) + self.first(parent)
        return torch.tensor(index, dtype=torch.int64) + self.first(node.chunk)

    def pieces(self, x: Tensor, axes: tuple[str, ...], chunk: str) -> list[Tensor]:
        """A value cut along the axis that the chunks or groups divide."""
        axis, dim = self.graph.axis[chunk], self.cut(axes, chunk)
        if axis.kind == "chunk":
            return [x.narrow(dim, c.start, c.stop - c.start) for c in self.chunks[axis.space]]
        return list(x.chunk(self.size(chunk), dim))

    def cut(self, axes: tuple[str, ...], chunk: str) -> int:
        """The dimension of the axis that the chunks or groups divide."""
        parent = self.graph.axis[chunk].parent
        assert parent is not None
        return next(k for k, a in enumerate(axes) if self.graph.axis[a].space == self.graph.axis[parent].space)

    def along(self, node: N.Reduce | N.Normalize) -> Tensor:
        x, axes = self.values[node.arg], self.graph[node.arg].axes
        dims = [axes.index(a) for a in node.over]
        if node.chunk is not None:
            parts = self.pieces(x, axes, node.chunk)
            if isinstance(node, N.Reduce):
                done = [self.reduce(node.fn, p, dims) for p in parts]
                shape = [0, *(n for k, n in enumerate(x.shape) if k not in dims)]
                return torch.stack(done) if done else x.new_zeros(shape)
            cut = self.cut(axes, node.chunk)
            return torch.cat([self.normalize(node.fn, p, dims) for p in parts], cut) if parts else x
        return self.reduce(node.fn, x, dims) if isinstance(node, N.Reduce) else self.normalize(node.fn, x, dims)

    def reduce(self, fn: str, x: Tensor, dims: list[int]) -> Tensor:
        if fn == "sum":
            return x.sum(dims)
        count = math.prod(x.shape[d] for d in dims)
        if fn == "mean":
            return (x if x.is_complex() else x.to(self.run.dtype)).sum(dims) / max(count, 1)
        if count == 0:
            return x.sum(dims).to(x.dtype)
        if fn == "any":
            return x.any(dims[0]) if len(dims) == 1 else x.amax(dims)
        return x.amax(dims) if fn == "max" else x.amin(dims)

    def normalize(self, fn: str, x: Tensor, dims: list[int]) -> Tensor:
        if x.numel() == 0:
            return x.to(self.run.dtype)
        if fn == "softmax":
            most = x.amax(dims, keepdim=True)
            e = torch.exp(x - torch.where(torch.isinf(most), 0.0, most))
            total = e.sum(dims, keepdim=True)
            return e / torch.where(total == 0, 1.0, total)
        if fn == "rms_norm":
            return x / torch.sqrt((x * x).mean(dims, keepdim=True) + 1e-5)
        if fn == "l2_norm":
            return x / torch.sqrt((x * x).sum(dims, keepdim=True) + 1e-6)
        centred = x - x.mean(dims, keepdim=True)
        return centred / torch.sqrt((centred * centred).mean(dims, keepdim=True) + 1e-5)

    def moved(self, node: N.Shift | N.Slice | N.Gather) -> Tensor:
        if isinstance(node, N.Gather):
            return self.gather(node)
        x = self.values[node.arg]
        dim = self.graph[node.arg].axes.index(node.axis)
        n = x.shape[dim]
        if isinstance(node, N.Shift):
            index = torch.arange(n) - int(node.by.evaluate(self.run.settings))
        else:
            index = torch.tensor(int(node.at.evaluate(self.run.settings)))
        inside = (index >= 0) & (index < n)
        picked = x.movedim(dim, 0)[index.clamp(0, max(n - 1, 0))]
        shape = list(inside.shape) + [1] * (picked.dim() - inside.dim())
        picked = torch.where(inside.reshape(shape), picked, torch.zeros((), dtype=x.dtype))
        return picked.movedim(0, dim) if isinstance(node, N.Shift) else picked

    def gather(self, node: N.Gather) -> Tensor:
        """One position of the axis for each element of the result."""
        arg = self.graph[node.arg].axes
        x = self.values[node.arg].movedim(arg.index(node.axis), 0)
        n = x.shape[0]
        own = tuple(a for a in arg if a != node.axis)
        sizes = [self.size(a) for a in node.axes]
        x = x.permute(0, *(1 + own.index(a) for a in node.axes if a in own))
        for position, a in enumerate(node.axes):
            if a not in own:
                x = x.unsqueeze(1 + position)
        index = self.aligned(node.index, node.axes).expand(sizes) - self.first(node.axis)
        if n == 0:
            return torch.zeros(sizes, dtype=x.dtype)
        picked = x.expand(n, *sizes).gather(0, index.clamp(0, n - 1)[None])[0]
        return torch.where((index >= 0) & (index < n), picked, torch.zeros((), dtype=x.dtype))

    def scatter(self, node: N.Scatter) -> Tensor:
        """Each element of the operand, added at the position that its index names."""
        have = self.graph[node.arg].axes
        x, index = self.values[node.arg], self.aligned(node.index, have).expand(self.values[node.arg].shape)
        out = torch.stack([torch.where(index == n, x, 0.0).sum([k for k, a in enumerate(have) if a not in node.axes])
                           for n in range(self.size(node.axis))])  # fmt: skip
        kept = (node.axis, *(a for a in have if a in node.axes))
        return out.permute([kept.index(a) for a in node.axes])

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

    # -- attention ---------------------------------------------------------------------------------------------------

    def attend(self, node: N.Attend) -> Tensor:
        """All queries against all rows at once."""
        body = self.inner(node.body)
        for n in node.body.of_kind(N.Capture):
            body.values[n.id] = self.values[n.outer]

        def seen(id_: str | None, axis: str | None, idle: Number) -> Tensor:
            """A value of the body over the attention's axes, ones where it lacks one, and its rows."""
            if id_ is None:
                return torch.tensor(idle)
            body.value(id_)
            x = body.aligned(id_, node.axes if axis is None else (*node.axes, axis))
            return x if axis is not None else x[..., None]

        parts = []
        for s in node.sources:
            logit, value, mask = (
                seen(*x) for x in ((s.logit, s.axis, 0), (s.value, s.axis, 0), (s.mask, s.axis, True))
            )
            parts.append((torch.where(mask, logit.to(self.run.dtype), -math.inf), value.to(self.run.dtype)))
        found = [x.detach().amax(-1) for x, _ in parts if x.shape[-1]]
        most = found[0] if found else torch.tensor(0.0)
        for other in found[1:]:
            most = torch.maximum(most, other)
        most = torch.where(torch.isinf(most), 0.0, most)[..., None]
        total = sum((torch.exp(x - most).sum(-1) for x, _ in parts), torch.tensor(0.0, dtype=self.run.dtype))
        read = sum(((torch.exp(x - most) * v).sum(-1) for x, v in parts), torch.tensor(0.0, dtype=self.run.dtype))
        return (read / torch.where(total == 0, 1.0, total)).expand([self.size(a) for a in node.axes])

    # -- recurrences -------------------------------------------------------------------------------------------------

    def start(self, name: str, axes: tuple[str, ...], initial: str | None, dtype: str) -> Tensor:
        """A state before the first step: the one given to the run, else the spec's."""
        shape = [self.size(a) for a in axes]
        if name in self.run.initial:
            return self.run.initial[name]
        of = self.dtype(dtype)
        if initial is None:
            return torch.zeros(shape, dtype=of)
        return self.aligned(initial, axes).to(of).expand(shape)

    def anew(self, node: N.Recur | N.Scan, step: int) -> bool:
        """Whether a recurrence within chunks starts from its initial values at this step."""
        return node.within is not None and any(c.start == step and not c.continues for c in self.chunks[node.within])

    def recur(self, node: N.Recur) -> list[Tensor]:
        states = {c.name: self.start(c.name, c.axes, c.initial, c.dtype) for c in node.carried}
        fresh = {c.name: self.start("", c.axes, c.initial, c.dtype) for c in node.carried}
        rows: list[list[Tensor]] = [[] for _ in node.body.outputs]
        for step in range(self.size(node.axis)):
            if self.anew(node, step):
                states = dict(fresh)
            body = self.body_at(node, step, states)
            for row, (_, id_) in zip(rows, node.body.outputs):
                row.append(body.value(id_))
            axis = self.graph.axis[node.axis]
            if axis.kind != "chunk" or not self.chunks[axis.space][step].open:
                states = {c.name: body.value(c.result) for c in node.carried}
        self.finals.update(states)
        out = []
        for row, (_, id_) in zip(rows, node.body.outputs):
            axes, of = node.body[id_].axes, self.dtype(node.body[id_].dtype)
            inner, shape = self.positions_of(node), [self.size(a) for a in axes]
            if inner in axes:
                out.append(torch.cat(row, axes.index(inner)) if row else torch.zeros(shape, dtype=of))
            else:
                out.append(torch.stack(row) if row else torch.zeros([0, *shape], dtype=of))
        return out + [states[c.name] for c in node.carried]

    def positions_of(self, node: N.Recur) -> str:
        """The sequence whose positions a step over chunks covers; empty for other recurrences."""
        axis = self.graph.axis[node.axis]
        return (axis.parent or "") if axis.kind == "chunk" else ""

    def body_at(self, node: N.Recur, step: int, states: Mapping[str, Tensor]) -> Interpreter:
        """A body with its captures and states of one step."""
        inner = self.positions_of(node)
        run, low, count = self.run, 0, 0
        if inner:
            chunk = self.chunks[self.graph.axis[node.axis].space][step]
            low, count = chunk.start, chunk.stop - chunk.start
            space = self.graph.axis[inner].space
            run = replace(run, lengths={**run.lengths, space: count},
                          positions={**run.positions, space: self.first(inner) + low})  # fmt: skip
        body = Interpreter(node.body, run, self.chunks)
        for n in node.body.nodes:
            if isinstance(n, N.State):
                body.values[n.id] = states[n.name]
            elif isinstance(n, N.Capture):
                have = self.graph[n.outer].axes
                x = self.values[n.outer]
                x = x.narrow(have.index(inner), low, count) if inner in have else x
                body.values[n.id] = x.select(have.index(node.axis), step) if node.axis in have else x
            elif isinstance(n, N.Coord) and n.axis == node.axis:
                body.values[n.id] = torch.tensor(step + self.first(node.axis))
        return body

    def scan(self, node: N.Scan) -> list[Tensor]:
        """S_t = A_t S_{t-1} + writes, a token at a time: reads, gates and writes in the circle that `start` opens."""
        axes = (*node.batch, *node.i, *node.j)
        state, fresh = (self.start(name, axes, node.initial, node.dtype) for name in (node.name, ""))
        steps = self.size(node.axis)

        def at(id_: str, t: int) -> Tensor:
            have = self.graph[id_].axes
            x = self.values[id_]
            x = x if x.is_complex() else x.to(self.run.dtype)
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
            state = fresh if self.anew(node, t) else state
            shape, new, first = state.shape, state, STEP.index(node.start)
            for part in (*STEP[first:], *STEP[:first]):
                if part == "read":
                    for row, q in zip(rows, node.queries):
                        removed = node.i if q.side == "i" else node.j
                        row.append((at(q.arg, t) * new).sum([axes.index(a) for a in removed]))
                    if count > len(node.queries):
                        rows[-1].append(new)
                elif part == "gate":
                    if node.id in self.watched:
                        states.append(new)
                    for g in node.gates:
                        a = at(g.arg, t)
                        new = new + a if node.algebra == "max-plus" else new * (torch.exp(a) if g.log else a)
                else:
                    for w in node.writes:
                        new = new + at(w.i, t) * at(w.j, t)
                    if node.add is not None:
                        a = at(node.add, t)
                        new = torch.maximum(new, a) if node.algebra == "max-plus" else new + a
                    new = new.expand(shape)
            state = new
            if node.stop:
                state = state.detach()
        if not node.reverse:
            self.finals[node.name] = state
        if node.id in self.watched:
            ordered = states[::-1] if node.reverse else states
            self.trajectories[node.id] = torch.stack(ordered) if states else state.new_zeros((0, *state.shape))
        out = []
        for index, row in enumerate(rows):
            sizes = [self.size(a) for a in node.result_axes(index)]
            ordered = row[::-1] if node.reverse else row
            out.append(torch.stack(ordered).reshape(sizes) if row else torch.zeros(sizes, dtype=state.dtype))
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
