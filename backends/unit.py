"""A unit as users import it: the text of an nn.Module for a layer, of a function for an op."""

from __future__ import annotations

import keyword
import math
from collections.abc import Mapping, Sequence

from chunkc.backends.attend import Tile
from chunkc.backends.body import Body, param_name
from chunkc.backends.expressions import next_name, state_name
from chunkc.backends.layout import EACH, NOWHERE, sequence_names
from chunkc.backends.operations import is_sharded
from chunkc.backends.states import WHAT, StateField, fields, positioned, states, whole_reason
from chunkc.backends.token import TokenForm, token_form
from chunkc.backends.writer import RESERVED, Lines, Writer, identifier, public, quoted
from chunkc.ir import nodes as N
from chunkc.ir.axes import Number, Size
from chunkc.ir.graph import Parameter, Unit

DTYPES = {"float": "given", "int": "torch.int64", "bool": "torch.bool"}


class UnitEmitter:
    """One layer as an nn.Module, or one op as a function."""

    def __init__(self, unit: Unit, names: dict[str, str], lines: Lines, w: Writer, settings: Mapping[str, Number],
                 prefix: str, attentions: Mapping[str, list[Tile]]) -> None:  # fmt: skip
        self.unit, self.lines, self.w, self.prefix, self.attentions = unit, lines, w, prefix, attentions
        self.graph, self.given_names = unit.graph, names
        self.name = public(unit.name)
        self.params = [
            p.evolve(default=settings.get(p.name, p.default)) if p.name in settings else p for p in unit.params
        ]
        self.inputs: list[N.Input] = [n for name in unit.inputs for n in self.graph.of_kind(N.Input) if n.name == name]
        self.weights: list[N.Param] = self.graph.of_kind(N.Param)
        self.whole = whole_reason(unit)
        found = fields(self.graph)
        if self.whole:  # what only a later call would read is not kept
            found = [f for f in found if f.kind == "state"]
        self.fields = [] if self.whole and unit.kind == "layer" else found
        self.position = unit.kind == "op" and bool(self.fields) and not self.whole and positioned(self.graph)
        self.spaces = [s for s in sequence_names(self.graph) if self.graph.axis[s].kind != "chunk"]
        self.sizes = [a for a in self.graph.axes if a.kind == "size" and a.size is not None]
        self.outputs = self.graph.outputs
        self.keyword = ["plan: Plan | None = None"] if unit.parallel is not None else []
        # a cache grows, and with a plan a state is that of a segment: neither can be written over
        fixed = bool(self.fields) and not self.whole and unit.parallel is None
        self.in_place = fixed and all(f.kind != "cache" for f in self.fields)
        self.token = token_form(unit, prefix) if self.in_place else None

    def emit(self) -> None:
        if self.fields:
            self.state_class()
        if self.unit.kind == "layer":
            self.layer()
        else:
            self.op()

    # -- state -------------------------------------------------------------------------------------------------------

    def state_class(self) -> None:
        w = self.w
        doc = '"""The state of {}: what crosses from one call to the next. N sequences.'
        if self.unit.kind == "layer":
            w("@dataclass(frozen=True)")
            with w.indented(f"class {self.name}State:"):
                w(doc.format(self.name))
                w()
                self.field_docs()
                w("position: int64 [N], the tokens seen so far.")
                w('"""')
                w()
                for f in self.fields:
                    w(f"{public(f.name)}: Tensor")
                w("position: Tensor")
            w()
            w()
            w(f"_pytree.register_dataclass({self.name}State)")
            w()
            w()
        elif len(self.fields) + self.position > 1:
            with w.indented(f"class {self.name}_state(NamedTuple):"):
                w(doc.format(self.name))
                w()
                self.field_docs()
                if self.position:
                    w("position: int64 [N], the tokens seen so far.")
                w('"""')
                w()
                for f in self.fields:
                    w(f"{public(f.name)}: Tensor")
                if self.position:
                    w("position: Tensor")
            w()
            w()

    def field_docs(self) -> None:
        for f in self.fields:
            rows = "P" if f.kind == "cache" else f.rows
            dims = ", ".join(["N", *([rows] if rows else []), *f.axes])
            self.w(f"{public(f.name)}: [{dims}], {WHAT[f.kind]}.")

    def field_shape(self, f: StateField, count: str, rows: str | None = None) -> str:
        rows = rows if f.kind == "cache" and rows else f.rows
        return f"({', '.join([count, *([rows] if rows else []), *f.axes])},)"

    # -- sizes -------------------------------------------------------------------------------------------------------

    def size_lines(self) -> None:
        """Local variables for the axes' sizes, from the parameters."""
        for a in self.sizes:
            assert a.size is not None
            self.w(f'{a.name} = axis_size("{a.name}", {a.size.text()})')
        for a in self.sizes:
            if a.parent is not None:  # its groups are equal
                self.w(f"exact({a.parent}, {a.name})")

    def unpack(self) -> None:
        """Local variables for a layer's parameters and sizes."""
        for p in self.params:
            self.w(f"{p.name} = {self.kept(p.name)}")
        if self.sizes:
            self.w(f"{''.join(a.name + ', ' for a in self.sizes).rstrip()} = self._sizes")

    def doc(self) -> str:
        return quoted(self.unit.doc)

    def signature(self) -> list[str]:
        """The unit's parameters as Python ones; those without a default come first."""
        out = []
        for p in sorted(self.params, key=lambda p: p.default is not None):
            default = "" if p.default is None else f" = {p.default!r}"
            out.append(f"{self.public(p)}: {p.type}{default}")
        return out

    # -- layers ------------------------------------------------------------------------------------------------------

    def layer(self) -> None:
        w = self.w
        with w.indented(f"class {self.name}(nn.Module):"):
            w(f'"""{self.doc() or self.unit.name}')
            w()
            self.interface_doc()
            w('"""')
            w()
            parts = ["self", *self.signature(), "*", "device: torch.device | str | None = None",
                     "dtype: torch.dtype | None = None"]  # fmt: skip
            with w.indented(f"def __init__({', '.join(parts)}) -> None:"):
                self.rebind([], self.params)
                self.constructor()
            w()
            with w.indented("def reset_parameters(self) -> None:"):
                self.reset()
            w()
            self.forward()
            if self.fields:
                w()
                self.state_methods()

    def rebind(self, tensors: Sequence[N.Input | N.Param], params: Sequence[Parameter] = ()) -> None:
        """Names of the signature that the body needs for itself, under others."""
        pairs = [(identifier(n.name), public(n.name)) for n in tensors] + [(p.name, self.public(p)) for p in params]
        for own, given in sorted(pairs, key=lambda pair: -len(pair[0])):  # math__ = math_ before math_ = math
            if own != given:
                self.w(f"{own} = {given}")

    def public(self, param: Parameter) -> str:
        """What users call a parameter that bodies may have under another name."""
        return public(self.given_names[param.name])

    def interface_doc(self) -> None:
        w = self.w
        for n in self.inputs:
            w(f"{public(n.name)}: {n.dtype} [{self.dims(n.axes)}].")
        for name, id_ in self.outputs:
            w(f"Gives {name}: [{self.dims(self.graph[id_].axes)}].")
        w(f"From {self.lines.place(self.unit.span)}.")

    def dims(self, axes: tuple[str, ...]) -> str:
        timed = next((a for a in axes if self.graph.axis[a].kind != "size"), None)
        own = [a for a in axes if self.graph.axis[a].kind == "size"]
        return ", ".join([*(["B", self.length_name(timed)] if timed else ["N"]), *own])

    def length_name(self, axis: str) -> str:
        """How documents and messages call the length of a sequence: T, another sequence's with its name."""
        space = self.graph.axis[axis].space
        if self.graph.axis[axis].kind == "chunk":
            return "chunks"
        return "T" if space == self.spaces[0] else f"T_{space}"

    def constructor(self) -> None:
        w = self.w
        w("super().__init__()")
        for p in self.params:
            w(f"{self.kept(p.name)} = {p.name}")
        self.size_lines()
        w(f"self._sizes = ({''.join(a.name + ', ' for a in self.sizes).rstrip()})")
        w('factory: Any = {"device": device, "dtype": dtype}')
        groups: dict[str, list[N.Param]] = {}
        for n in self.weights:
            groups.setdefault(n.name.split(".")[0], []).append(n)
        for name, members in groups.items():
            attribute = self.attribute(name)
            if "." in members[0].name:
                inner = {self.attribute(m.name).split(".", 1)[1]: self.empty(m) for m in members}
                if all("." not in n for n in inner):
                    w(f"self.{attribute} = Weights({', '.join(f'{n}={x}' for n, x in inner.items())})")
                else:
                    made = "".join(f'"{n}": {x}, ' for n, x in inner.items()).removesuffix(", ")
                    w(f"self.{attribute} = Weights(**{{{made}}})")
            else:
                w(f"self.{attribute} = nn.Parameter({self.empty(members[0])})")
        w("self.reset_parameters()")

    def attribute(self, name: str) -> str:
        def free(part: str) -> str:
            base = part.rstrip("_")
            return part + "_" if keyword.iskeyword(base) or base in RESERVED else part

        return ".".join(free(part) for part in name.split("."))

    @staticmethod
    def kept(name: str) -> str:
        """The attribute that holds a layer's parameter: none that torch.nn.Module has, as `_modules`."""
        return f"self._given_{name}"

    def empty(self, n: N.Param) -> str:
        return f"torch.empty(({', '.join(n.axes)}{',' if len(n.axes) == 1 else ''}), **factory)"

    def reset(self) -> None:
        """Initial values: those of torch.nn.Linear and torch.nn.Embedding for library calls, else the spec's."""
        w = self.w
        w('"""Draw the initial values anew."""')
        self.unpack()
        with w.indented("with torch.no_grad():"):
            if not self.weights:
                w("pass")
            for n in self.weights:
                target = f"self.{self.attribute(n.name)}"
                if n.library == "table":
                    w(f"{target}.normal_()")
                elif n.library:
                    assert n.fan_in is not None
                    known = {a.size: a.name for a in reversed(self.sizes) if a.size is not None}
                    bound = f"({n.fan_in.text(0, known)}) ** -0.5"
                    w(f"{target}.uniform_(-{bound}, {bound})")
                elif n.init is None:
                    w(f"{target}.zero_()")
                else:
                    self.initial_value(n, target)

    def initial_value(self, n: N.Param, target: str) -> None:
        assert n.init is not None
        inner = Body(self.unit.evolve(graph=n.init), self.lines, self.w, "")
        text, _ = inner.aligned(n.init, n.init.outputs[0][1], n.axes, NOWHERE)
        self.w(f"device, ct = {target}.device, torch.float32")
        if isinstance(n.init[n.init.outputs[0][1]], N.Const):
            self.w(f"{target}.fill_({text})")
        else:
            self.w(f"{target}.copy_(({text}).expand({target}.shape))")

    def forward(self) -> None:
        w = self.w
        args = [f"{public(n.name)}: Tensor" for n in self.inputs]
        extra = [f"state: {self.name}State | None = None"] if self.fields else []
        offsets = [f"{name}: Tensor | None = None" for name in self.offsets()]
        in_place = ["in_place: bool = False"] if self.in_place else []
        extra += ["*", *offsets, *self.keyword, *in_place, "check: bool = False"]
        outs = ["Tensor"] * len(self.outputs)
        result = outs[0] if len(outs) == 1 else f"tuple[{', '.join(outs)}]"
        if self.fields:
            result += f" | tuple[{', '.join([*outs, self.name + 'State'])}]"
        with w.indented(f"def forward({', '.join(['self', *args, *extra])}) -> {result}:"):
            over = "; `in_place` writes it over the one given" if self.in_place else ""
            w(f'"""Run over whole sequences; with `state`, resume from it and give the new one too{over}."""')
            self.rebind(self.inputs)
            self.unpack()
            self.checks()
            for f in self.fields:
                w(f"state_{identifier(f.name)} = None if state is None else state.{public(f.name)}")
            w("start = None if state is None else state.position" if self.fields else "start = None")
            self.body("self.")
            names = [self.output(id_) for _, id_ in self.outputs]
            if self.fields:
                with w.indented("if state is not None:"):
                    length = "_lengths" if self.unit.parallel is not None else "seq.offsets.diff()"
                    new = ", ".join([*(self.after(f) for f in self.fields), f"state.position + {length}"])
                    made = f"{self.name}State({new})"
                    if self.in_place:
                        w(f"new = {made}")
                        made = "overwrite(state, new) if in_place else new"
                    w(f"return {', '.join(names)}, {made}")
            w(f"return {', '.join(names)}")

    def after(self, f: StateField) -> str:
        """A field after the call: rows are kept in the inputs' type, cast only where a state is returned."""
        name = next_name(f.name)
        node = self.keeper(f)
        if is_sharded(self.unit, node.query if isinstance(node, N.Attend) else getattr(node, "axis", None)):
            of = "rows_of" if f.kind == "cache" else "last_of"  # with a plan there is a value for each segment
            what = f"last {public(f.name)} ({self.lines.place(node.span)})"
            name = f'({name} if plan is None else seq.{of}("{what}", {name}, {state_name(f.name)}))'
        return name + (".to(given)" if f.kind == "cache" and f.dtype == "float" else "")

    def keeper(self, f: StateField) -> N.AnyNode:
        """The node that a field is kept for."""
        if f.kind == "state":
            named = [n for n in self.graph.nodes if isinstance(n, N.Scan) and n.name == f.name
                     or isinstance(n, N.Recur) and any(c.name == f.name for c in n.carried)]  # fmt: skip
            return named[0]
        return self.graph[(f.node or "").split("/")[0]]

    def output(self, id_: str) -> str:
        home = self.printer.home(self.graph, id_)
        text, rank = self.printer.aligned(self.graph, id_, self.graph[id_].axes, home)
        text = text if rank == 9 else f"({text})"
        dtype = self.graph[id_].dtype
        if isinstance(self.graph[id_], N.Const):  # a plain number in expressions
            return f"torch.full((), {text}, dtype={DTYPES[dtype]}, device=device)"
        return f"{text}.to(given)" if dtype == "float" else text

    def body(self, owner: str) -> None:
        """Set up, then the statements of the graph."""
        w = self.w
        first = self.like_text(owner)
        w(f"given, ct, device = {first}.dtype, compute_dtype({first}), {first}.device")
        for space, name in zip(self.spaces, self.offsets()):
            x = identifier(self.of_space(space).name)
            seq = sequence_names(self.graph)[space]
            whole = f"Sequences({x}.shape[0], {x}.shape[1], {name}, {first})"
            if is_sharded(self.unit, space):
                w("_begin = start")
                w(f"{seq} = {whole} if plan is None else plan.segments({x}, {name}, {first}, start)")
                w(f"start = start if plan is None else {seq}.start")
                w(f"_documents, _lengths = {seq}.count, {seq}.offsets.diff()")
                with w.indented("if plan is not None:"):
                    w(f"_documents, _lengths = {seq}.documents, {seq}.lengths")
            else:
                w(f"{seq} = {whole}")
        if self.whole and self.unit.kind == "layer":  # it starts anew at each call
            for f in states(self.graph):
                w(f"state_{identifier(f.name)} = None")
        if any(isinstance(n, N.Scan) and (n.i or n.j) for n in self.graph.nodes) and self.in_place:
            w(f"{sequence_names(self.graph)[self.spaces[0]]}.in_place = in_place")
        if any(isinstance(n, N.Scan | N.Attend) for n in self.graph.nodes):
            w(f"scans = _scans({first})")
        if self.token is not None:
            self.one_token(self.token, first)
        self.printer = Body(self.unit, self.lines, w, owner, self.prefix)
        for n in self.inputs:
            if n.dtype in ("float", "complex"):
                self.printer.widen(n, "ct" if n.dtype == "float" else "complex_type(ct)")
        self.printer.attentions = self.attentions
        self.printer.attribute = self.attribute if owner else param_name
        self.printer.whole = bool(self.whole)
        self.printer.emit()

    def one_token(self, token: TokenForm, first: str) -> None:
        """An op's one token in one kernel, where autograd does not follow it."""
        w, field = self.w, self.fields[0]
        given = ", ".join([*(identifier(n.name) for n in token.inputs()), state_name(field.name)])
        alone = f"{sequence_names(self.graph)[self.spaces[0]]}.one_token and use_kernels({first})"
        with w.indented(f"if {state_name(field.name)} is not None and {alone} and not tracked({given}):"):
            *results, new = [*(f"out_{k}" for k in range(len(self.outputs))), next_name(field.name)]
            numbers = "".join(f", {text}" for text in token.numbers.values())
            seq = sequence_names(self.graph)[self.spaces[0]]
            w(f"{', '.join([*results, new])} = scans.{token.form.name}_call({seq}, {given}{numbers})")
            w(f"return {', '.join(results)}, {new} if output_final_state else None")

    def offsets(self) -> list[str]:
        """The arguments that pack sequences: `cu_seqlens`, a further sequence's with its name."""
        return ["cu_seqlens", *(f"cu_seqlens_{s}" for s in self.spaces[1:])]

    def of_space(self, space: str) -> N.Input:
        """The first input over a sequence."""
        return next(n for n in self.inputs if any(self.graph.axis[a].space == space for a in n.axes))

    def first_input(self) -> N.Input:
        kinds = ("float", "complex", "int", "bool")
        return min(self.inputs, key=lambda n: kinds.index(n.dtype))

    def like_text(self, owner: str) -> str:
        """A tensor of the type in which outputs are given: the first float input, else the first weight."""
        first = self.first_input()
        name = identifier(first.name)
        if first.dtype == "float":
            return name
        if first.dtype == "complex":
            return f"{name}.real"
        if self.weights:
            weight = self.weights[0].name
            return owner + (self.attribute(weight) if owner else param_name(weight))
        return f"{name}.new_empty(0, dtype=torch.float32)"

    def checks(self) -> None:
        w = self.w
        who = self.unit.name
        with w.indented("check_tensors("):
            w(f'"{who}",')
            with w.indented("{"):
                ordered = sorted(self.inputs, key=lambda n: n.name != self.first_input().name)
                for n in ordered:
                    own = [a for a in n.axes if self.graph.axis[a].kind == "size"]
                    time = next(a for a in n.axes if self.graph.axis[a].kind != "size")
                    shape = ", ".join(['"B"', f'"{self.length_name(time)}"', *own])
                    w(f'"{n.name}": ({identifier(n.name)}, ({shape}), "{n.dtype}"),')
                if self.unit.kind == "op":
                    for p in self.weights:
                        shape = ", ".join(p.axes) + ("," if len(p.axes) == 1 else "")
                        w(f'"{p.name}": ({identifier(p.name)}, ({shape}), "float"),')
            w("},")
        w(")")
        first = identifier(self.first_input().name)
        for space, name in zip(self.spaces, self.offsets()):
            x = identifier(self.of_space(space).name)
            more = f', "{name}"' if name != "cu_seqlens" else ""
            same = ", cu_seqlens" if more else ""
            w(f'check_offsets("{who}", {name}, {x}{more}{same})')
        count = f"{first}.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1"
        self.state_checks(who, first, count)
        with w.indented("if check:"):
            for n in self.inputs:
                low, high = bound(n.low), bound(n.high)
                w(f'check_values("{who}", "{n.name}", {identifier(n.name)}, {low}, {high})')
            for p in self.weights:
                low, high = bound(p.low), bound(p.high)
                if p.low is not None or p.high is not None:
                    value = f"self.{self.attribute(p.name)}" if self.unit.kind == "layer" else identifier(p.name)
                    w(f'check_values("{who}", "{p.name}", {value}, {low}, {high})')
            for space, name in zip(self.spaces, self.offsets()):
                with w.indented(f"if {name} is not None:"):
                    ranks = " * (1 if plan is None else plan.size)" if is_sharded(self.unit, space) else ""
                    w(f'check_packing("{who}", {name}, {identifier(self.of_space(space).name)}.shape[1]{ranks})')

    def state_checks(self, who: str, first: str, count: str) -> None:
        w = self.w
        if not self.fields:
            return
        given = "state" if self.unit.kind == "layer" else "initial_state"
        if self.in_place:
            with w.indented(f"if in_place and {given} is None:"):
                w(f'raise ValueError("{who}: in_place wants {given}, whose tensors are written over")')
        with w.indented(f"if {given} is not None:"):
            if self.whole:
                w(f'raise ValueError("{who} runs over whole sequences: {self.whole}")')
                return
            w(f"count = {count}")
            total = len(self.fields) + self.position
            if self.unit.kind == "op" and total > 1:
                with w.indented(f"if len({given}) != {total}:"):
                    w(f'raise ValueError("{who}: initial_state wants {total} tensors")')
            for k, f in enumerate(self.fields):
                value = f"state.{public(f.name)}"
                if self.unit.kind == "op":
                    value = "initial_state" if total == 1 else f"initial_state[{k}]"
                kind = "" if f.dtype == "float" else f', "{f.dtype}"'
                w(f'check_state("{who}", "{f.name}", {value}, {self.field_shape(f, "count", "None")}, {first}{kind})')
            if self.position:
                w(f'check_position("{who}", initial_state[{len(self.fields)}], count, {first})')

    def state_methods(self) -> None:
        w = self.w
        with w.indented(f"def init_state(self, batch: int, dtype: torch.dtype = torch.float32) -> {self.name}State:"):
            w('"""The state before the first token of `batch` sequences."""')
            self.unpack()
            w("device = next((p.device for p in self.parameters()), None)")
            w("ct = dtype")
            inner = Body(self.unit, self.lines, w, "self.")
            inner.attribute = self.attribute
            inner.bind()
            values = []
            for f in self.fields:
                shape = self.field_shape(f, "batch")
                if f.kind != "state" or f.node is None:
                    dtype = {"float": "dtype", "complex": "complex_type(dtype)"}.get(f.dtype, inner.dtype(self.like(f)))
                    values.append(f"torch.zeros({shape}, dtype={dtype}, device=device)")
                else:
                    c = N.Carried(name=f.name, axes=f.axes, dtype=f.dtype, initial=f.node, result="")
                    values.append(inner.initial_value(c, EACH).replace("seq.count", "batch"))
            with w.indented(f"return {self.name}State("):
                for v in values:
                    w(f"{v},")
                w("torch.zeros((batch,), dtype=torch.int64, device=device),")
            w(")")
        if not self.steps():
            return
        w()
        args = [public(n.name) for n in self.inputs]
        typed = ", ".join(f"{a}: Tensor" for a in args)
        outs = ", ".join(["Tensor"] * len(self.outputs))
        given = f"state: {self.name}State{', *, in_place: bool = False' if self.in_place else ''}"
        with w.indented(f"def step(self, {typed}, {given}) -> tuple[{outs}, {self.name}State]:"):
            w('"""One token of each sequence: inputs and outputs without the T dimension."""')
            call = ", ".join(f"{a}[:, None]" for a in args)
            names = [f"out_{k}" for k in range(len(self.outputs))]
            in_place = ", in_place=in_place" if self.in_place else ""
            w(f"{', '.join(names)}, new = self.forward({call}, state=state{in_place})")
            timed = [any(self.graph.axis[a].kind != "size" for a in self.graph[i].axes) for _, i in self.outputs]
            taken = [f"{n}[:, 0]" if t else n for n, t in zip(names, timed)]
            w(f"return {', '.join(taken)}, new")

    @staticmethod
    def like(f: StateField) -> N.AnyNode:
        """A node of a field's type."""
        return N.State(id=f.name, name=f.name, axes=f.axes, dtype=f.dtype)

    def steps(self) -> bool:
        """Whether one token can be fed at a time: outputs are causal, and none is over chunks."""
        kinds = {self.graph.axis[a].kind for _, id_ in self.outputs for a in self.graph[id_].axes}
        return not self.unit.looks_ahead and "chunk" not in kinds and len(self.spaces) == 1

    # -- ops ---------------------------------------------------------------------------------------------------------

    def op(self) -> None:
        w = self.w
        tensors = [f"{public(n.name)}: Tensor" for n in self.inputs]
        tensors += [f"{public(p.name)}: Tensor" for p in self.weights]
        inferred = self.inferred()
        keywords = []
        for p in self.params:
            if p.default is None and p.name in inferred:
                keywords.append(f"{self.public(p)}: {p.type} | None = None")
            else:
                keywords.append(f"{self.public(p)}: {p.type}" + ("" if p.default is None else f" = {p.default!r}"))
        state = "Tensor" if len(self.fields) + self.position == 1 else f"{self.name}_state"
        if self.fields:
            keywords += [f"initial_state: {state} | None = None", "output_final_state: bool = False"]
        keywords += [f"{name}: Tensor | None = None" for name in self.offsets()]
        keywords += [*self.keyword, *(["in_place: bool = False"] if self.in_place else []), "check: bool = False"]
        outs = ["Tensor"] * len(self.outputs)
        final = [f"{state} | None"] if self.fields else []
        result = f"tuple[{', '.join([*outs, *final])}]" if len(outs) + len(final) > 1 else "Tensor"
        with w.indented(f"def {self.name}({', '.join([*tensors, '*', *keywords])}) -> {result}:"):
            w(f'"""{self.doc() or self.unit.name}')
            w()
            self.interface_doc()
            w("A packed batch has B = 1 and cu_seqlens [N + 1]; states are [N, ...].")
            if self.in_place:
                w("With in_place the final state is written over the initial one.")
            w('"""')
            self.rebind([*self.inputs, *self.weights], self.params)
            for name, text in inferred.items():
                with w.indented(f"if {name} is None:"):
                    w(f"{name} = {text}")
            self.size_lines()
            self.checks()
            for k, f in enumerate(self.fields):
                value = "initial_state" if len(self.fields) + self.position == 1 else f"initial_state[{k}]"
                w(f"state_{identifier(f.name)} = None if initial_state is None else {value}")
            last = len(self.fields)
            w(f"start = None if initial_state is None else initial_state[{last}]" if self.position else "start = None")
            self.body("")
            self.op_result(state)

    def op_result(self, state: str) -> None:
        w = self.w
        names = [self.output(id_) for _, id_ in self.outputs]
        if not self.fields:
            w(f"return {', '.join(names)}")
            return
        finals = [self.after(f) for f in self.fields]
        if self.position:
            start, length = (
                ("_begin", "_lengths") if self.unit.parallel is not None else ("start", "seq.offsets.diff()")
            )
            finals.append(f"{length} if {start} is None else {start} + {length}")
        made = finals[0] if len(finals) == 1 else f"{state}({', '.join(finals)})"
        asked = f"{made} if output_final_state else None"
        if self.in_place:
            with w.indented("if in_place:"):
                w(f"overwrite(initial_state, {made})")
                w(f"return {', '.join(names)}, initial_state if output_final_state else None")
        w(f"return {', '.join(names)}, {asked}")

    def inferred(self) -> dict[str, str]:
        """Parameters without a default that are an input's size: where to read them."""
        out: dict[str, str] = {}
        for p in self.params:
            for n in self.inputs:
                own = [a for a in n.axes if self.graph.axis[a].kind == "size"]
                for k, a in enumerate(own):
                    if self.graph.axis[a].size == Size(op="param", value=p.name) and p.default is None:
                        out.setdefault(p.name, f"length({identifier(n.name)}, {k + 2})")
        return out


def bound(x: float | None) -> str:
    """An end of a declared range, as text."""
    return repr(x) if x is None or math.isfinite(x) else f'float("{x}")'
