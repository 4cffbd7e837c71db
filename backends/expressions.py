"""Values of a unit's graph as PyTorch expressions."""

from __future__ import annotations

from chunkc.backends.layout import EACH, INNER, LETTERS, NOWHERE, Layout, held
from chunkc.backends.writer import identifier
from chunkc.ir import nodes as N
from chunkc.ir.graph import Graph

CALLS = {
    "exp": "torch.exp({})", "log": "torch.log({})", "tanh": "torch.tanh({})", "sigmoid": "torch.sigmoid({})",
    "silu": "F.silu({})", "gelu": "F.gelu({})", "relu": "torch.relu({})", "softplus": "F.softplus({})",
    "logsigmoid": "F.logsigmoid({})", "inv_softplus": "inv_softplus({})", "abs": "torch.abs({})",
    "floor": "torch.floor({}).long()", "stop": "({}).detach()", "sin": "torch.sin({})", "cos": "torch.cos({})",
    "re": "torch.real({})", "im": "torch.imag({})", "erf": "torch.erf({})",
}  # fmt: skip
INFIX = {"+": 4, "-": 4, "*": 5, "/": 5, "%": 5, "<": 3, "<=": 3, ">": 3, ">=": 3, "==": 3, "!=": 3, "and": 2, "or": 1}


class Expressions(Layout):
    """Emits expressions. What crosses from call to call is read through `history` and `position`."""

    def history(self, node: N.AnyNode) -> str:
        """The variable with the tokens before the first, for a shift or convolution; None without."""
        raise NotImplementedError

    def start(self, axis: str) -> str:
        """The position of the first token of each sequence of an axis."""
        return "start" if self.seq(self.graph.axis[axis].space) == self.main else "None"

    def known(self) -> dict[object, str]:
        return {a.size: a.name for a in reversed(self.graph.axes) if a.size is not None and a.size.args}

    def expression(self, graph: Graph, node: N.AnyNode) -> tuple[str, int]:
        if isinstance(node, N.Const):
            text = node.size.text(0, self.known())  # type: ignore[arg-type]
            return (text, 9) if text.replace(".", "").replace("_", "").isalnum() else (f"({text})", 9)
        if isinstance(node, N.Coord):
            return self.coordinate(node), 9
        if isinstance(node, N.Bounds):
            return f"{self.chunks(node.chunk)}.{node.fn}()", 9
        if isinstance(node, N.Random):
            empty = f"torch.empty({self.shape(node.axes)}, dtype=ct, device=device)"
            a, b = node.a.text(), node.b.text()
            return (f"{empty}.uniform_({a}, {b})" if node.fn == "uniform" else f"{empty}.normal_(0.0, {a})"), 9
        if isinstance(node, N.Length):
            return f"{self.seq(self.graph.axis[node.axis].space)}.offsets.diff()", 9
        if isinstance(node, N.Map):
            return self.map(graph, node)
        if isinstance(node, N.Reduce):
            return self.reduce(graph, node), 9
        if isinstance(node, N.Normalize):
            return self.normalize(graph, node), 9
        if isinstance(node, N.Rename):
            return self.text(graph, node.arg)
        if isinstance(node, N.Linear):
            return self.linear(graph, node), 9
        return self.moved(graph, node), 9

    def number(self, graph: Graph, id_: str) -> bool:
        """Whether a value is written as a plain number: a constant, or one that a loop's body has from outside."""
        node = graph[id_]
        return isinstance(self.graph[node.outer] if isinstance(node, N.Capture) else node, N.Const)

    def coordinate(self, node: N.Coord) -> str:
        axis = self.graph.axis[node.axis]
        if self.loop is not None and node.axis == self.loop.axis:
            return "position" if axis.is_sequence else "torch.full((), step, device=device)"
        if self.loop is not None and axis.space == self.loop.inner:
            return self.loop.place
        if axis.is_sequence:
            return f"{self.seq(axis.space)}.positions({self.start(node.axis)})"
        return f"torch.arange({node.axis}, device=device)"

    def dim(self, graph: Graph, id_: str, axis: str) -> int:
        """The dimension of an axis, from the end: sequences are in front, wherever they stand among the axes."""
        own = self.own(graph[id_].axes)
        return own.index(axis) - len(own)

    def moved(self, graph: Graph, node: N.AnyNode) -> str:
        """Values at other positions."""
        if isinstance(node, N.Expand):
            dim = self.dim(graph, node.arg, node.source)
            return f"{self.hold(graph, node.arg)}.repeat_interleave({node.target} // {node.source}, {dim})"
        if isinstance(node, N.Shift):
            seq = self.seq(self.graph.axis[node.axis].space)
            return f"{seq}.shift({self.text(graph, node.arg)[0]}, {node.by.text()}, {self.history(node)})"
        if isinstance(node, N.Slice):
            dim = self.dim(graph, node.arg, node.axis)
            return f"row_of({self.text(graph, node.arg)[0]}, {dim}, {node.at.text()})"
        if isinstance(node, N.Conv):
            w, b = self.hold(graph, node.weight), self.hold(graph, node.bias) if node.bias else "None"
            seq = self.seq(self.graph.axis[node.axis].space)
            return f"{seq}.conv({self.text(graph, node.arg)[0]}, {w}, {b}, {self.history(node)})"
        if isinstance(node, N.Gather):
            return self.gather(graph, node)
        if isinstance(node, N.Scatter):
            return self.scatter(graph, node)
        raise NotImplementedError(node.kind)

    # -- elementwise -------------------------------------------------------------------------------------------------

    def map(self, graph: Graph, node: N.Map) -> tuple[str, int]:
        home = self.home(graph, node.id)
        if node.fn == "as":
            text, rank = self.aligned(graph, node.args[0], node.axes, home)
            if self.number(graph, node.args[0]):
                text, rank = f"torch.full((), {text}, dtype={self.dtype(node)}, device=device)", 9
            return f"{held(text, rank, 9)}.expand{self.shape(node.axes, home)}", 9
        args = [self.aligned(graph, a, node.axes, home) for a in node.args]
        numbers = all(self.number(graph, a) for a in node.args)
        if numbers and (node.fn in INFIX or node.fn in ("neg", "not")):
            args[0] = self.tensor(graph, node.args[0], args[0][0], graph[node.args[0]]), 9  # what is around wants one
        if node.fn in INFIX:
            return self.infix(graph, node, args)
        if node.fn == "neg":
            return f"-{held(*args[0], 6)}", 6
        if node.fn == "not":
            return f"~{held(*args[0], 9)}", 8
        if node.fn == "pow":
            base = args[0] if node.dtype == "int" else self.real(graph, node.args[0], args[0])
            return f"{held(*base, 8)} ** {held(*args[1], 8)}", 7
        if node.fn == "complex":
            real, imaginary = (self.real(graph, i, t) for i, t in zip(node.args, args))
            return f"({held(*real, 4)} + 1j * {held(*imaginary, 6)})", 9
        if node.fn in ("min", "max"):
            return self.extreme(graph, node, args)
        if node.fn == "where":
            if self.number(graph, node.args[0]):
                args[0] = f"torch.full((), bool({args[0][0]}), device=device)", 9
            values = [self.tensor(graph, i, t[0], node) for i, t in zip(node.args[1:], args[1:])]
            return f"torch.where({args[0][0]}, {values[0]}, {values[1]})", 9
        if self.number(graph, node.args[0]):
            inner = f"torch.full((), float({args[0][0]}), dtype=ct, device=device)"
            return CALLS[node.fn].format(inner), 9
        value = args[0][0]
        if graph[node.args[0]].dtype == "int" and node.fn not in ("floor", "abs", "stop"):
            value = f"{held(*args[0], 9)}.to(ct)"
        return CALLS[node.fn].format(value), 9

    def infix(self, graph: Graph, node: N.Map, args: list[tuple[str, int]]) -> tuple[str, int]:
        rank = INFIX[node.fn]
        if node.fn in ("and", "or"):
            sign = "&" if node.fn == "and" else "|"
            return f"({held(*args[0], 9)} {sign} {held(*args[1], 9)})", 9
        tensors = [k for k, a in enumerate(node.args) if not self.number(graph, a)]
        if node.dtype == "float" and tensors and all(graph[node.args[k]].dtype == "int" for k in tensors):
            args[tensors[0]] = f"{held(*args[tensors[0]], 9)}.to(ct)", 9  # beside a number they would become float32
        right = rank + (node.fn not in "+*&|")
        return f"{held(*args[0], rank)} {node.fn} {held(*args[1], right)}", rank

    def dtype(self, node: N.AnyNode) -> str:
        """The torch type of a value, as text."""
        return {"float": "ct", "int": "torch.int64", "bool": "torch.bool", "complex": "complex_type(ct)"}[node.dtype]

    def tensor(self, graph: Graph, id_: str, text: str, like: N.AnyNode) -> str:
        """An operand as a tensor of the type of the value that it becomes part of."""
        if self.number(graph, id_):
            return f"torch.full((), {text}, dtype={self.dtype(like)}, device=device)"
        return text if graph[id_].dtype == like.dtype else f"({text}).to({self.dtype(like)})"

    def real(self, graph: Graph, id_: str, text: tuple[str, int]) -> tuple[str, int]:
        """An operand in the computing type: beside a number of Python, an integer would become float32."""
        if self.number(graph, id_):
            return f"torch.full((), {text[0]}, dtype=ct, device=device)", 9
        return text if graph[id_].dtype != "int" else (f"{held(*text, 9)}.to(ct)", 9)

    def extreme(self, graph: Graph, node: N.Map, args: list[tuple[str, int]]) -> tuple[str, int]:
        """min and max of two or more; a constant clamps."""
        consts = [t for i, t in zip(node.args, args) if self.number(graph, i)]
        tensors = [
            t if node.dtype == "int" else self.real(graph, i, t)
            for i, t in zip(node.args, args)
            if not self.number(graph, i)
        ]
        if not tensors:
            number = f"{node.fn}({', '.join(t for t, _ in consts)})"
            return f"torch.full((), {number}, dtype={self.dtype(node)}, device=device)", 9
        text, rank = tensors[0]
        for other, _ in tensors[1:]:
            text, rank = f"torch.{node.fn}imum({text}, {other})", 9
        for value, _ in consts:
            text, rank = f"{held(text, rank, 9)}.clamp({'max' if node.fn == 'min' else 'min'}={value})", 9
        return text, rank

    # -- along axes --------------------------------------------------------------------------------------------------

    def reduce(self, graph: Graph, node: N.Reduce) -> str:
        product = self.product(graph, node)
        if product:
            return self.contraction(graph, node, product)
        if node.chunk is not None and self.graph.axis[node.chunk].kind == "size":
            return self.by_groups(graph, node)
        text = self.reduced(graph, node)
        along = [a for a in node.over if self.is_sequence(a)]
        if not along:
            return text
        space = self.graph.axis[along[0]].space
        if self.loop is not None and space == self.loop.inner:
            return f'over_valid({text}, "{node.fn}", {self.loop.valid})'
        return f'{self.seq(space)}.reduce({text}, "{node.fn}")'

    def reduced(self, graph: Graph, node: N.Reduce) -> str:
        """The operand of a reduction with its fixed axes already reduced."""
        dims = [self.dim(graph, node.arg, a) for a in node.over if not self.is_sequence(a)]
        text = self.summand(graph, node)
        return f"{text}.{reducer(node.fn, dims)}" if dims else text

    def summand(self, graph: Graph, node: N.Reduce) -> str:
        """The operand of a reduction, of a type that it works on."""
        text = self.hold(graph, node.arg)
        return f"{text}.to(ct)" if node.fn == "mean" and graph[node.arg].dtype == "int" else text

    def by_groups(self, graph: Graph, node: N.Reduce) -> str:
        """A reduction over each of the equal runs that the groups of an axis are."""
        assert node.chunk is not None
        axes = self.own(graph[node.arg].axes)
        parent = self.graph.axis[node.chunk].parent
        dims = [axes.index(a) - len(axes) for a in node.over]
        cut = axes.index(parent or "") - len(axes)
        moved = [d - 1 if d < cut else d for d in dims]  # the runs take the place of the axis, the groups stand before
        lead = len(self.lead(self.home(graph, node.arg)))
        inner = f"{self.summand(graph, node)}.unflatten({cut}, ({node.chunk}, -1)).{reducer(node.fn, moved)}"
        rest = [a for a in axes if a not in node.over or a == parent]
        return f"{inner}.movedim({lead + rest.index(parent or '')}, {lead})"

    def product(self, graph: Graph, node: N.Reduce) -> list[str]:
        """The factors of a sum of products whose product is larger than each of them; empty for other reductions."""
        if (
            node.fn != "sum"
            or node.chunk is not None
            or any(self.is_sequence(a) and not self.is_inner(a) for a in node.over)
        ):
            return []
        users = self.users_in(graph)
        factors, pending = [], [node.arg]
        while pending:
            id_ = pending.pop(0)
            inner = graph[id_]
            if isinstance(inner, N.Map) and inner.fn == "*" and len(users[id_]) == 1 and id_ not in self.names:
                pending = [*inner.args, *pending]
            elif self.number(graph, id_):
                return []
            else:
                factors.append(id_)
        wide = len(graph[node.arg].axes)
        spread = all(len(graph[f].axes) < wide for f in factors)
        return factors if len(factors) == 2 and spread and graph[node.arg].dtype == "float" else []

    def is_inner(self, axis: str) -> bool:
        """Whether an axis is the sequence that the chunks of the loop around cut."""
        return self.loop is not None and self.graph.axis[axis].space == self.loop.inner

    def users_in(self, graph: Graph) -> dict[str, list[N.AnyNode]]:
        raise NotImplementedError

    def contraction(self, graph: Graph, node: N.Reduce, factors: list[str]) -> str:
        """A sum of products without the product: `torch.einsum`."""
        home = self.home(graph, node.arg)
        axes = self.own(graph[node.arg].axes)
        letter = dict(zip(axes, LETTERS[3:]))
        lead = {NOWHERE: "", EACH: "a", INNER: "ab"}.get(home, "ab")
        within = any(self.is_inner(a) for a in node.over)
        terms, texts = [], []
        for f in factors:
            at = self.home(graph, f)
            text, _ = self.text(graph, f)
            if at == EACH and home not in (EACH, INNER):
                text, at = f"{self.seq(home)}.spread({text})", home
            first = "" if at == NOWHERE else "a" if at == EACH else lead
            terms.append(first + "".join(letter[a] for a in self.own(graph[f].axes)))
            text = text if graph[f].dtype == "float" else f"({text}).to(ct)"
            texts.append(f"masked({text}, {self.loop.valid})" if within and at == INNER and self.loop else text)
        rest = "".join(letter[a] for a in axes if a not in node.over)
        kept = lead[:1] if within else lead
        return f'torch.einsum("{", ".join(terms)} -> {kept}{rest}", {", ".join(texts)})'

    def normalize(self, graph: Graph, node: N.Normalize) -> str:
        text = self.text(graph, node.arg)[0]
        dims = [self.dim(graph, node.arg, a) for a in node.over if not self.is_sequence(a)]
        listed = f"({''.join(f'{d}, ' for d in dims).rstrip()})" if len(dims) == 1 else f"({', '.join(map(str, dims))})"
        along = [a for a in node.over if self.is_sequence(a)]
        if not along:
            return f"{node.fn}({text}, {listed})"
        space = self.graph.axis[along[0]].space
        if self.loop is not None and space == self.loop.inner:
            return f'along_valid({text}, "{node.fn}", {listed}, {self.loop.valid})'
        seq = f"{self.chunks(node.chunk)}.inner" if node.chunk is not None else self.seq(space)
        return f'{seq}.normalize({text}, "{node.fn}", {listed})'

    def linear(self, graph: Graph, node: N.Linear) -> str:
        kept = [a for a in graph[node.arg].axes if a not in node.over]
        text, _ = self.aligned(graph, node.arg, (*kept, *node.over), self.home(graph, node.arg))
        bias = self.hold(graph, node.bias) if node.bias else "None"
        dtype = "given" if graph is self.graph and node.id in self.as_stored else "ct"
        return f"linear({text}, {self.hold(graph, node.weight)}, {bias}, {len(node.over)}, {dtype})"

    # -- reads at computed positions ---------------------------------------------------------------------------------

    def gather(self, graph: Graph, node: N.Gather) -> str:
        axis = self.graph.axis[node.axis]
        index = graph[node.index]
        if axis.kind == "chunk" and isinstance(index, N.Bounds) and index.fn == "of":
            return (
                f"{self.chunks(node.axis)}.inner.spread({self.chunks(node.axis)}.flat({self.text(graph, node.arg)[0]}))"
            )
        arg_axes, index_axes = self.own(graph[node.arg].axes), self.own(index.axes)
        shared = [a for a in index_axes if a in arg_axes and a != node.axis]
        new = [a for a in index_axes if a not in shared]
        rest = [a for a in arg_axes if a not in shared and a != node.axis]
        if axis.is_sequence:
            text = self.gather_along(graph, node, shared, new, rest)
        else:
            text = self.gather_fixed(graph, node, shared, new, rest)
        have, wanted = [*shared, *new, *rest], list(self.own(node.axes))
        if have == wanted:
            return text
        lead = len(self.lead(self.home(graph, node.id)))
        order = ", ".join([*map(str, range(lead)), *(str(lead + have.index(a)) for a in wanted)])
        return f"{text}.permute({order})"

    def scatter(self, graph: Graph, node: N.Scatter) -> str:
        kept = [a for a in graph[node.arg].axes if a in node.axes]
        gone = [a for a in graph[node.arg].axes if a not in node.axes]
        home = self.home(graph, node.id)
        x, index = (self.aligned(graph, a, (*kept, *gone), home)[0] for a in (node.arg, node.index))
        text = f"scatter({x}, {index}, {node.axis}, {len(self.lead(home)) + len(kept)})"
        have = [*kept, node.axis]
        if have == list(node.axes):
            return text
        lead = len(self.lead(home))
        return f"{text}.permute({', '.join(map(str, [*range(lead), *(lead + have.index(a) for a in node.axes)]))})"

    def ordered(self, graph: Graph, id_: str, axes: list[str]) -> tuple[str, int]:
        """A value with just these of its axes, in this order; a number as a tensor."""
        if self.number(graph, id_):
            return f"torch.full((), {self.text(graph, id_)[0]}, device=device)", 9
        return self.aligned(graph, id_, tuple(axes), self.home(graph, id_))

    def gather_fixed(self, graph: Graph, node: N.Gather, shared: list[str], new: list[str], rest: list[str]) -> str:
        home = self.home(graph, node.id)
        x, x_rank = self.ordered(graph, node.arg, [*shared, *rest, node.axis])
        index, i_rank = self.ordered(graph, node.index, [*shared, *new])
        at_x, at_i = self.home(graph, node.arg), self.home(graph, node.index)
        lead = len(self.lead(home))
        table = ".to(ct)" if isinstance(graph[node.arg], N.Param) else ""
        if at_x == NOWHERE and not shared:
            return f"take({x}, {index}, 0){table}"
        for side, at in (("x", at_x), ("i", at_i)):
            text, rank = (x, x_rank) if side == "x" else (index, i_rank)
            if at == EACH and home not in (EACH, NOWHERE):
                text = f"{held(text, rank, 9)}[:, None]" if home == INNER else f"{self.seq(home)}.spread({text})"
            else:
                text = self.leading(text, rank, at, home)
            x, index = (text, index) if side == "x" else (x, text)
        return f"take({x}, {index}, {lead + len(shared)}){table}"

    def gather_along(self, graph: Graph, node: N.Gather, shared: list[str], new: list[str], rest: list[str]) -> str:
        """A read of a sequence, or of chunks, at positions that values of any home name."""
        x, _ = self.ordered(graph, node.arg, [*shared, *rest])
        index, rank = self.ordered(graph, node.index, [*shared, *new])
        at = self.home(graph, node.index)
        axis = self.graph.axis[node.axis]
        seq = self.seq(axis.space)
        if at == NOWHERE:
            index = f"{held(index, rank, 9)}.expand({self.main}.count, *{held(index, rank, 9)}.shape)"
        owner = f"torch.arange({self.main}.count, device=device)" if at in (NOWHERE, EACH) else f"{self.seq(at)}.owner"
        first = f"{self.chunks(node.axis)}.edges.start" if axis.kind == "chunk" else self.start(node.axis)
        return f"{seq}.at({x}, {index}, {owner}, {first}, {len(shared)}, {2 if at not in (NOWHERE, EACH) else 1})"


def reducer(fn: str, dims: list[int]) -> str:
    """The method of a tensor that reduces these dimensions."""
    listed = str(dims[0]) if len(dims) == 1 else f"({', '.join(map(str, dims))})"
    method = {"max": "amax", "min": "amin"}.get(fn, fn)
    return f"{method}({listed})"


def state_name(name: str) -> str:
    return f"state_{identifier(name)}"


def next_name(name: str) -> str:
    return f"next_{identifier(name)}"
