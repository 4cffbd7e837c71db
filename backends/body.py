"""A unit's graph as PyTorch statements: everything but the inside of scans."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from chunkc.backends.attend import Form, Tile, call
from chunkc.backends.expressions import next_name, state_name
from chunkc.backends.layout import EACH, generic
from chunkc.backends.loops import Loops
from chunkc.backends.operations import operations
from chunkc.backends.scan import ScanForm, scan_form
from chunkc.backends.states import declared_axes, fields
from chunkc.backends.vector import VectorForm, inside, vector_forms
from chunkc.backends.writer import Lines, Writer, identifier, is_name
from chunkc.ir import nodes as N
from chunkc.ir.axes import DType
from chunkc.ir.graph import Graph, Unit
from chunkc.ir.updates import scaled_reads, update_of


class Body(Loops):
    """Emits one unit. `owner` stands before a parameter's attribute, `prefix` before the names of its scans."""

    def __init__(self, unit: Unit, lines: Lines, w: Writer, owner: str, prefix: str = "") -> None:
        super().__init__(unit, lines, w)
        self.owner, self.prefix = owner, prefix
        if unit.parallel is not None:
            self.taken.add("plan")
        self.operations = {op.node.id: op for op in operations(unit)}
        self.halos: dict[str, str] = {}
        self.scans = {n.id: scan_form(unit, n, prefix) for n in matrix_scans(self.graph)}
        self.scaled = {n.id: scaled_reads(unit, n) for n in matrix_scans(self.graph)}
        self.users = {id(self.graph): self.graph.users()}
        self.attribute: Callable[[str], str] = param_name
        self.states = [f for f in fields(self.graph) if f.kind == "state"]
        self.started: set[str] = set()
        self.optional = optional_states(unit)
        self.fields = {f.node: f for f in fields(self.graph) if f.kind != "state" and f.node}
        self.attentions: Mapping[str, list[Tile]] = {}
        self.wide: dict[str, str] = {}  # inputs that are also kept as they are stored
        self.whole = False  # whether calls start anew: then nothing is kept for the next one
        self.updates = {n.id: found for n in self.graph.of_kind(N.Scan) if (found := update_of(self.graph, n))}
        forms = vector_forms(unit, prefix)
        self.vectors = {scan.id: form for form in forms for scan in form.scans}
        self.inside = {id_ for update in self.updates.values() for id_ in update}
        self.inside |= {id_ for form in forms for id_ in inside(self.graph, form)}
        self.inside |= {product.id for found in self.scaled.values() for product, _ in found.values()}
        self.emitted: set[str] = set()

    def text(self, graph: Graph, id_: str) -> tuple[str, int]:
        """A value's variable, or its expression where it is used once."""
        if id_ in self.names:
            return self.names[id_], 9
        return self.expression(graph, graph[id_])

    def users_in(self, graph: Graph) -> dict[str, list[N.AnyNode]]:
        return self.users[id(graph)]

    def enter_users(self, graph: Graph) -> None:
        self.users[id(graph)] = graph.users()

    def history(self, node: N.AnyNode) -> str:
        if node.id in self.halos:
            return self.halos[node.id]
        return state_name(self.fields[node.id].name) if node.id in self.fields and not self.whole else "None"

    def running(self, node: N.AnyNode, region: str = "") -> tuple[str, str]:
        field = self.fields[f"{region}/{node.id}" if region else node.id]
        if self.whole:
            return "None", "_"
        return state_name(field.name), next_name(field.name)

    def start_running(self, node: N.AnyNode, region: str = "") -> None:
        """What the chunk that may go on holds before this call: nothing at first."""
        if self.whole:
            return
        field = self.fields[f"{region}/{node.id}" if region else node.id]
        given, dtype = state_name(field.name), self.dtype(self.graph_like(field))
        self.w(f"if {given} is None:")
        self.w(f"    {given} = torch.zeros({self.shape(field.axes, EACH)}, dtype={dtype}, device=device)")

    # -- statements --------------------------------------------------------------------------------------------------

    def inline(self, graph: Graph, node: N.AnyNode, users: list[N.AnyNode], kept: set[str]) -> bool:
        """Whether a value stands inside its one user's expression instead of in a variable."""
        if isinstance(node, N.Const | N.Rename):
            return True
        if isinstance(node, N.Bounds) and all(isinstance(u, N.Gather) for u in users) and node.id not in kept:
            return True
        if (
            node.id in kept
            or node.id in self.fields
            or node.id in self.operations
            or is_name(node.id)
            and not generic(node)
        ):
            return False
        if isinstance(node, N.Reduce) and self.over_sequence(node):
            return False
        if len(users) != 1 or isinstance(users[0], N.Recur | N.Scan | N.Segment | N.Attend):
            return False
        if isinstance(node, N.Map) and self.folded(graph, node.id, users[0]):
            return True
        return len(self.text(graph, node.id)[0]) < 60

    def over_sequence(self, node: N.Reduce) -> bool:
        return any(self.is_sequence(a) for a in node.over)

    def folded(self, graph: Graph, id_: str, user: N.AnyNode) -> bool:
        """Whether a product is never made, since the sum over it contracts its factors."""
        while isinstance(user, N.Map) and user.fn == "*" and len(self.users_in(graph)[user.id]) == 1:
            id_, user = user.id, self.users_in(graph)[user.id][0]
        return isinstance(user, N.Reduce) and user.arg == id_ and bool(self.product(graph, user))

    def emit(self) -> None:
        """Statements for the whole graph, in order."""
        kept = {id_ for _, id_ in self.graph.outputs}
        self.bind()
        for param in self.graph.of_kind(N.Param):
            if not self.products_only(param):
                name = self.fresh(param.name.replace(".", "_")) if self.owner else self.names[param.id]
                self.w(f"{name} = {self.names[param.id]}.to(ct)")
                self.names[param.id] = name
        for node in self.graph.nodes:
            self.emit_node(node, kept)

    def emit_node(self, node: N.AnyNode, kept: set[str]) -> None:
        """A node's statements, unless they are there."""
        if isinstance(node, N.Input | N.Param) or node.id in self.inside or node.id in self.emitted:
            return
        self.emitted.add(node.id)
        if isinstance(node, N.Scan) and node.id in self.vectors:
            form = self.vectors[node.id]
            self.emitted |= {s.id for s in form.scans}
            for id_ in (x for s in form.scans for x in s.operands()):
                self.need(id_, kept)
            for scan in form.scans:
                self.start_state(scan.name)
            self.own_scan(form)
        elif isinstance(node, N.Scan):
            self.start_state(node.name)
            self.scan(node)
        elif isinstance(node, N.Recur):
            for c in node.carried if self.is_sequence(node.axis) else ():
                self.start_state(c.name)
            self.recur(node)
        elif isinstance(node, N.Segment):
            self.segment(node)
        elif isinstance(node, N.Attend):
            self.attention(node)
        elif not isinstance(node, N.Out) and not self.inline(
            self.graph, node, self.users_in(self.graph)[node.id], kept
        ):
            self.assign(self.graph, node)

    def need(self, id_: str, kept: set[str]) -> None:
        """Statements for a node and all that it is made of, as far as they are not there."""
        if id_ not in self.emitted:
            for a in self.graph[id_].operands():
                self.need(a, kept)
            self.emit_node(self.graph[id_], kept)
            self.emitted.add(id_)

    def stored(self, node: N.Input) -> list[N.Scan]:
        """The scans that read an input as it is stored: kernels load any type."""
        users = self.users_in(self.graph)[node.id]
        return [u for u in users if isinstance(u, N.Scan) and u.id not in self.operations and u.dtype == node.dtype]

    def widen(self, node: N.Input, dtype: str) -> None:
        """An input in the type of elementwise work, for those who read it so."""
        name, scans = identifier(node.name), self.stored(node)
        self.taken.update(identifier(n.name) for n in self.graph.of_kind(N.Input))
        others = [u for u in self.users_in(self.graph)[node.id] if u.id not in self.inside and u not in scans]
        outputs = [id_ for _, id_ in self.graph.outputs]
        if scans and not others and node.id not in outputs:
            return
        wide = self.fresh(f"wide_{name}") if scans else name
        self.w(f"{wide} = {name}.to({dtype})")
        self.wide[node.id] = wide

    def products_only(self, param: N.Param) -> bool:
        """Whether a parameter is the weight of products or a table alone: these are read in its own type."""
        users = self.users_in(self.graph)[param.id]
        return all(isinstance(u, N.Linear) or isinstance(u, N.Gather) and u.arg == param.id for u in users)

    def start_state(self, name: str) -> None:
        """The state that a recurrence starts from: the one given, else the spec's."""
        if name in self.started:
            return
        self.started.add(name)
        state = next(f for f in self.states if f.name == name)
        given = state_name(name)
        c = N.Carried(name=name, axes=state.axes, dtype=state.dtype, initial=state.node, result="")
        fresh, wide = self.fresh_state(c), f"{given}.to({self.dtype(self.graph_like(c))})"
        if name in self.optional:
            self.w(f"if {given} is not None:")
            self.w(f"    {given} = {wide}")
            if self.unit.kind == "op":
                self.w("elif output_final_state:  # a scan that is given no state gives none")
                self.w(f"    {given} = {fresh}")
            return
        if self.unit.parallel is not None:
            fresh = fresh.replace(f"{self.main}.count", "_documents")
        self.w(f"{given} = {fresh} if {given} is None else {wide}")

    def bind(self) -> None:
        """Inputs and parameters under their names."""
        for node in self.graph.of_kind(N.Input):
            self.names[node.id] = self.wide.get(node.id, identifier(node.name))
            self.taken.add(identifier(node.name))
        for node in self.graph.of_kind(N.Param):
            self.names[node.id] = f"{self.owner}{self.attribute(node.name)}"

    def halo(self, graph: Graph, node: N.Shift | N.Conv) -> None:
        """The tokens before each sequence, or with a plan before each segment of one, or behind it."""
        given, op = self.history(node), self.operations[node.id]
        call = f"plan.{op.method(self.prefix)}({self.main}, {self.text(graph, node.arg)[0]}, {op.tokens}, {given})"
        self.halos[node.id] = self.fresh(f"{op.name}_halo")
        self.w(f"{self.halos[node.id]} = {given} if plan is None else {call}")

    def assign(self, graph: Graph, node: N.AnyNode) -> None:
        if isinstance(node, N.Shift | N.Conv) and node.id in self.operations:
            self.halo(graph, node)
        text, _ = self.expression(graph, node)
        name = self.fresh(node.id if not generic(node) else "x")
        place = self.lines.place(node.span)
        comment = f"  # {place}" if place else ""
        field = self.fields.get(node.id)
        if field is not None and isinstance(node, N.Reduce):
            so_far, kept = self.running(node)
            self.start_running(node)
            call = f'{self.chunks(node.chunk or "")}.reduce({self.reduced(graph, node)}, "{node.fn}", {so_far})'
            self.w(f"{name}, {kept} = {call}{comment}")
        else:
            self.w(f"{name} = {text}{comment}")
        self.names[node.id] = name
        if field is not None and isinstance(node, N.Shift | N.Conv) and not self.whole:
            axis = self.graph.axis[node.axis]
            last = f"{self.chunks(node.axis)}.keep_last" if axis.kind == "chunk" else f"{self.seq(axis.space)}.last"
            arg = self.text(graph, node.arg)[0]
            self.w(f"{next_name(field.name)} = {last}({arg}, {field.rows}, {self.history(node)})")

    def segment(self, node: N.Segment) -> None:
        """The chunks of a sequence, and the sequence that they are themselves."""
        parent = self.graph.axis[node.chunk].parent
        seq = self.seq(self.graph.axis[parent or ""].space)
        name, start = f"chunks_{node.chunk}", self.start(parent or "")
        n = node.n.text() if node.n is not None else ""
        if node.begins is not None:
            made = f"Chunks.runs({seq}, {self.text(self.graph, node.begins)[0]}, {start})"
        else:
            made = f"Chunks.{node.rule}({seq}, {n}{f', {start}' if node.rule == 'fixed' else ''})"
        self.w(f"{name} = {made}  # {self.lines.place(node.span)}")
        self.w(f"{self.seq(node.chunk)} = {name}.own")

    def attention(self, node: N.Attend) -> None:
        form = Form(self, node)
        cached = {
            name: (state_name(field.name), next_name(field.name))
            for name, field in ((n, self.fields.get(f"{node.id}/{n}")) for n in form.captured())
            if field is not None and not self.whole
        }
        start = self.start(node.query) if node.query is not None else "None"
        name = f"attend_{self.prefix}{identifier(node.id)}"
        ring = self.operations[node.id].method(self.prefix) if node.id in self.operations else ""
        call(self, form, self.attentions[node.id], cached, start, name, ring)

    def outs(self, node: N.AnyNode) -> dict[int, N.Out]:
        return {u.index: u for u in self.users_in(self.graph)[node.id] if isinstance(u, N.Out)}

    # -- scans -------------------------------------------------------------------------------------------------------

    def scan(self, node: N.Scan) -> None:
        """A call of the scan's entry point, operands laid out as [B, T, H, D]."""
        axes = (*node.batch, *node.i, *node.j)
        initial = self.state_in(node, axes)
        self.w(f"# {node.name}: {self.lines.code(node.span)}")
        if node.id in self.scans:
            self.matrix_scan(node, self.scans[node.id], initial)
        else:
            self.vector_scan(node, axes, initial)

    def along(self, node: N.Scan) -> tuple[str, str]:
        """The sequences that a scan runs over, and their home."""
        home = self.graph.axis[node.axis].space
        return (f"{self.chunks(node.within)}.spans" if node.within else self.seq(home)), home

    def over_spans(self, node: N.Scan, text: str) -> str:
        """An operand [B, T, H, D] as the sequences that a scan runs over have it."""
        return f"{self.chunks(node.within)}.laid({text})" if node.within else text

    def own_scan(self, form: VectorForm) -> None:
        """A call of the entry point of scans that have kernels of their own."""
        seq, home = self.along(form.scans[0])
        axes = form.scans[0].batch
        for scan in form.scans:
            self.w(f"# {scan.name}: {self.lines.code(scan.span)}")
        whole = self.seq(home)
        full = f"({', '.join([f'{whole}.rows', f'{whole}.tokens', *axes])})"
        size = f"1, math.prod(({''.join(a + ', ' for a in axes)}))"
        readers = [next(s for s in form.scans if s.prologue and x in s.prologue.leaves) for x in form.leaves]
        leaves = [self.over_spans(s, f"lay({self.operand(x, s, axes, home, '')}, {full}, 0)")
                  for x, s in zip(form.leaves, readers)]  # fmt: skip
        starts = [f"{self.state_in(s, axes)}.reshape({seq}.count, {size})" for s in form.scans]
        if all(s.name in self.optional for s in form.scans):
            starts = [f"None if {state_name(s.name)} is None else {x}" for s, x in zip(form.scans, starts)]
        reads = [self.read_of(s) for s in form.scans]
        states = [identifier(s.name) for s in form.scans]
        befores = [self.fresh(s if form.after else f"{s}_before") for s in states]
        lasts = [self.fresh(f"{s}_last") for s in states]
        types = {self.read_type(s, read) for s, read in zip(form.scans, reads)}
        self.w(f"{', '.join([*befores, *lasts])} = scans.{form.name}_scan(")
        for line in [seq, *leaves, *starts, "given" if types == {"given"} else "ct", *form.numbers]:
            self.w(f"    {line},")
        self.w(f")  # {self.lines.place(form.scans[0].span)}")
        for scan, read, before, last, start in zip(form.scans, reads, befores, lasts, starts):
            self.vector_out(scan, axes, read, before, last, start)

    def read_of(self, node: N.Scan) -> str:
        """The value that an elementwise scan gives for each token; empty if nothing reads one."""
        outs = self.outs(node)
        return self.updates[node.id][1] if node.id in self.updates else outs[0].id if 0 in outs else ""

    def vector_out(self, node: N.Scan, axes: tuple[str, ...], read: str, before: str, last: str, start: str) -> None:
        """What follows the call of an elementwise scan: its results as the graph has them, and the state after it."""
        seq, home = self.along(node)
        if node.stop:
            self.w(f"{before}, {last} = stopped({seq}, {before}, {last}, {start})")
        if read:
            whole = self.seq(home)
            self.w(f"{before} = {before}.reshape({', '.join([f'{whole}.rows', f'{whole}.tokens', *axes])})")
            self.names[read] = before
        absent = f"None if {state_name(node.name)} is None else " if node.name in self.optional else ""
        final = f"{last}.reshape({', '.join([f'{seq}.count', *axes])})"
        self.scan_out(node, final, axes, self.outs(node).get(1), absent)

    def vector_scan(self, node: N.Scan, axes: tuple[str, ...], initial: str) -> None:
        seq, home = self.along(node)
        state = identifier(node.name)
        whole = self.seq(home)
        full = f"({whole}.rows, {whole}.tokens, {', '.join(axes)})" if axes else f"({whole}.rows, {whole}.tokens)"
        gate = self.operand(node.gates[0].arg if node.gates else None, node, axes, home, "1.0")
        add = self.operand(node.add, node, axes, home, "0.0")
        kind = "max_plus_scan" if node.algebra == "max-plus" else "vector_scan"
        read = self.read_of(node)
        before, last = self.fresh(state if node.id in self.updates else f"{state}_before"), self.fresh(f"{state}_last")
        size = f"1, math.prod(({''.join(a + ', ' for a in axes)}))"
        call = [self.over_spans(node, f"lay({x}, {full}, 0)") for x in (gate, add)]
        if node.id in self.operations:
            start = self.enter(node, initial, size, call, ["gate", "add"])
        else:
            start = f"{initial}.reshape({seq}.count, {size})"  # of no sequence, too
        module = "_torch" if node.dtype == "complex" else "scans"
        after = f", {node.id in self.updates}, {self.read_type(node, read)}" if kind == "vector_scan" else ""
        place = f"  # {self.lines.place(self.graph[read].span)}" if node.id in self.updates else ""
        self.w(f"{before}, {last} = {module}.{kind}(")
        self.w(f"    {seq}, {call[0]},")
        self.w(f"    {call[1]}, {start}{after}){place}")
        self.vector_out(node, axes, read, before, last, start)

    def read_type(self, node: N.Scan, read: str) -> str:
        """The type in which a scan gives its states: that of results if they are nothing else."""
        if node.dtype == "complex":
            return "complex_type(ct)"
        return "given" if read and not self.users_in(self.graph)[read] and not node.stop else "ct"

    def enter(self, node: N.Scan, initial: str, size: str, call: list[str], names: list[str]) -> str:
        """The variable with the state that each sequence starts from, or with a plan each segment of one. What the
        plan reads of the scan's operands becomes variables."""
        for k, name in enumerate(names):
            laid = self.fresh(f"{name}_laid")
            self.w(f"{laid} = {call[k]}")
            call[k] = laid
        name = self.fresh(f"{identifier(node.name)}_enter")
        given = f"{initial}.reshape((_documents, {size}))"
        method, read = self.operations[node.id].method(self.prefix), ", ".join(call[: len(names)])
        self.w(f"{name} = {given} if plan is None else plan.{method}({self.main}, {given}, {read})")
        return name

    def operand(self, id_: str | None, node: N.Scan, axes: tuple[str, ...], home: str, idle: str) -> str:
        """A scan's operand as a tensor of the state's type."""
        dtype = "complex_type(ct)" if node.dtype == "complex" else "ct"
        if id_ is None:
            return f"torch.full((), {idle}, dtype={dtype}, device=device)"
        kept, given = self.names, self.graph[id_]
        if isinstance(given, N.Input) and node in self.stored(given):
            self.names = {**kept, id_: identifier(given.name)}
        text, _ = self.aligned(self.graph, id_, (node.axis, *axes), home)
        self.names = kept
        if isinstance(self.graph[id_], N.Const):
            return f"torch.full((), {text}, dtype={dtype}, device=device)"
        wanted: DType = node.dtype if node.dtype == "complex" else "float"
        return text if self.graph[id_].dtype == wanted else f"({text}).to({dtype})"

    def matrix_scan(self, node: N.Scan, form: ScanForm, initial: str) -> None:
        seq, home = self.along(node)
        outs, heads, whole = self.outs(node), len(node.batch), self.seq(home)
        call: list[str] = []
        for o in form.operands():
            side = node.i if o.side == "i" else node.j
            text = self.operand(o.node, node, (*node.batch, *side), home, "")
            dims = [*node.batch, *(["1"] * len(side) if o.thin else side)]
            laid = f"lay({text}, ({whole}.rows, {whole}.tokens, {', '.join(dims)}), {heads})"
            call.append(self.over_spans(node, laid))
        size = ", ".join(f"math.prod(({''.join(a + ', ' for a in side)}))" for side in (node.batch, node.i, node.j))
        single = all(len(axes) == 1 for axes in (node.batch, node.i, node.j))  # laid out as the scan has it
        start = initial if single else f"{initial}.reshape(({seq}.count, {size}))"
        if node.name in self.optional and start != state_name(node.name):
            start = f"None if {state_name(node.name)} is None else {start}"
        elif node.id in self.operations:
            read = [o.name for o in (*form.gates, *(o for pair in form.writes for o in pair))]
            start = self.enter(node, initial, size, call, read)
        results = [self.fresh(f"read_{q.name}") for q in form.queries]
        last = self.fresh(f"{form.name}_last")
        self.w(f"{', '.join([*results, last])} = scans.{form.name}_scan(")
        scaled = self.scaled[node.id]
        numbers = [self.text(self.graph, scaled[m][1].id)[0] for m in sorted(scaled)]
        for line in [seq, *call, start, *numbers]:
            self.w(f"    {line},")
        self.w(")")
        for index, (q, name) in enumerate(zip(form.queries, results)):
            if index in outs:
                kept = node.j if q.side == "i" else node.i
                if not single or node.within:
                    full = ", ".join([f"{whole}.rows", f"{whole}.tokens", *node.batch, *kept])
                    self.w(f"{name} = {name}.reshape({full})")
                self.names[scaled[index][0].id if index in scaled else outs[index].id] = name
        axes = (*node.batch, *node.i, *node.j)
        final = last if single else f"{last}.reshape({', '.join([f'{seq}.count', *axes])})"
        optional = node.name in self.optional and not (single and node.declared == axes)
        absent = f"None if {last} is None else " if optional else ""
        self.scan_out(node, final, axes, outs.get(len(form.queries)), absent)

    def state_in(self, node: N.Scan, axes: tuple[str, ...]) -> str:
        """The state that a scan starts from, in this order of axes; within chunks, one for each."""
        text = state_name(node.name)
        if node.within is not None:
            c = N.Carried(name=node.name, axes=node.declared, dtype=node.dtype, initial=node.initial, result="")
            text = f"{self.chunks(node.within)}.enter({text}, {self.fresh_state(c)})"
        if node.declared != axes:
            text += f".permute(0, {', '.join(str(1 + node.declared.index(a)) for a in axes)})"
        return text

    def scan_out(self, node: N.Scan, text: str, axes: tuple[str, ...], out: N.Out | None, absent: str = "") -> None:
        """The state after a call, in the declared order of axes; `absent` says what it is if the scan gives none."""
        if node.declared != axes:
            text += f".permute(0, {', '.join(str(1 + axes.index(a)) for a in node.declared)})"
        if node.within is not None:
            text = f"{self.chunks(node.within)}.leave({text}, {state_name(node.name)})"
        self.finish(node.name, absent + text, out)

    def state_out(self, name: str, text: str, axes: tuple[str, ...], out: N.Out | None) -> None:
        assert axes == declared_axes(self.graph, name)
        self.finish(name, text, out)

    def finish(self, name: str, text: str, out: N.Out | None) -> None:
        self.w(f"{next_name(name)} = {text}")
        if out is not None:
            self.names[out.id] = next_name(name)


def optional_states(unit: Unit) -> frozenset[str]:
    """The scans that start at zero, and whose last state is for the caller alone: where no state is given and none is
    asked for, neither is made. Of matrices those that run over whole sequences."""
    users, outputs = unit.graph.users(), {id_ for _, id_ in unit.graph.outputs}

    def alone(scan: N.Scan) -> bool:
        last = [u for u in users[scan.id] if isinstance(u, N.Out) and u.index == (len(scan.queries) or 1)]
        return scan.initial is None and not any(users[u.id] or u.id in outputs for u in last)

    matrices = [s for s in matrix_scans(unit.graph) if s.within is None]
    vectors = [s for form in vector_forms(unit) if all(alone(s) and not s.stop for s in form.scans) for s in form.scans]
    return frozenset(s.name for s in (*matrices, *vectors) if unit.parallel is None and alone(s))


def matrix_scans(graph: Graph) -> list[N.Scan]:
    return [n for n in graph.nodes if isinstance(n, N.Scan) and (n.i or n.j)]


def param_name(name: str) -> str:
    """What an op's body calls a parameter."""
    return ".".join(identifier(part) for part in name.split("."))
