"""Recurrences without a chunk form, as loops: over tokens, over chunks, or over an axis of fixed size."""

from __future__ import annotations

from chunkc.backends.expressions import Expressions, state_name
from chunkc.backends.layout import EACH, NOWHERE, Loop, generic, held
from chunkc.backends.states import StateField
from chunkc.backends.writer import identifier
from chunkc.ir import nodes as N
from chunkc.ir.graph import Graph


class Loops(Expressions):
    """Emits recurrences that run step by step, all sequences at once."""

    def inline(self, graph: Graph, node: N.AnyNode, users: list[N.AnyNode], kept: set[str]) -> bool:
        """Whether a value stands inside its one user's expression instead of in a variable."""
        raise NotImplementedError

    def enter_users(self, graph: Graph) -> None:
        """Take up the users of a body's nodes."""
        raise NotImplementedError

    def running(self, node: N.AnyNode, region: str = "") -> tuple[str, str]:
        """The variables of a reduction over the chunk that may go on: what it holds so far, and what is kept."""
        raise NotImplementedError

    def start_running(self, node: N.AnyNode, region: str = "") -> None:
        """Start from nothing what such a reduction holds."""
        raise NotImplementedError

    def state_out(self, name: str, text: str, axes: tuple[str, ...], out: N.Out | None) -> None:
        """Give a recurrence's last state to who reads it."""
        raise NotImplementedError

    def outs(self, node: N.AnyNode) -> dict[int, N.Out]:
        raise NotImplementedError

    def recur(self, node: N.Recur) -> None:
        kind = self.graph.axis[node.axis].kind
        self.w(f"# {'one token' if kind == 'time' else 'one step'} at a time: {node.reason}")
        if kind == "time":
            self.over_tokens(node)
        elif kind == "chunk":
            self.over_chunks(node)
        else:
            self.over_steps(node)

    # -- over tokens -------------------------------------------------------------------------------------------------

    def over_tokens(self, node: N.Recur) -> None:
        w, body, outs = self.w, node.body, self.outs(node)
        space = self.graph.axis[node.axis].space
        seq = f"{self.chunks(node.within)}.inner" if node.within else self.seq(space)
        local = self.captured(node, space, f"{seq}.padded({{}})")
        for c in node.carried:
            start = state_name(c.name)
            if node.within is not None:
                start = f"{self.chunks(node.within)}.enter({start}, {self.fresh_state(c)})"
            w(f"now_{identifier(c.name)} = {start}")
        lists = self.lists(node, outs)
        with w.indented(f"for step in range({seq}.longest()):"):
            if any(isinstance(n, N.Coord) and n.axis == node.axis for n in body.nodes):
                if node.within is not None:
                    w(f"position = {seq}.padded({self.seq(space)}.positions({self.start(node.axis)}))[:, step]")
                else:
                    first = self.start(node.axis)
                    w(
                        f"position = step if {first} is None else {first} + step"
                        if first != "None"
                        else "position = step"
                    )
                    w("position = torch.as_tensor(position, device=device)")
            self.body(node, Loop(node.axis, count=f"{seq}.count"), local, lists, f"{seq}.alive(step)", f"{seq}.packed")
        for i, name in lists.items():
            result = self.fresh(outs[i].id)
            axes = body[body.outputs[i][1]].axes
            w(f"{result} = {seq}.unpadded(torch.stack({name}, 1)) if {name} else "
              f"torch.zeros({self.shape(axes, space)}, dtype={self.dtype(outs[i])}, device=device)")  # fmt: skip
            self.names[outs[i].id] = result
        for k, c in enumerate(node.carried):
            last = f"now_{identifier(c.name)}"
            if node.within is not None:
                last = f"{self.chunks(node.within)}.leave({last}, {state_name(c.name)})"
            self.state_out(c.name, last, c.axes, outs.get(len(body.outputs) + k))

    def fresh_state(self, c: N.Carried) -> str:
        """A state's initial value, for each sequence."""
        return self.initial_value(c, EACH)

    def initial_value(self, c: N.Carried, home: str) -> str:
        """A state's initial value at a home."""
        dtype, shape = self.dtype(self.graph_like(c)), self.shape(c.axes, home)
        if c.initial is None:
            return f"torch.zeros({shape}, dtype={dtype}, device=device)"
        text, rank = self.aligned(self.graph, c.initial, c.axes, home)
        if self.number(self.graph, c.initial):
            return f"torch.full({shape}, {text}, dtype={dtype}, device=device)"
        given = self.graph[c.initial].dtype
        value = held(text, rank, 9) if given == c.dtype else f"{held(text, rank, 9)}.to({dtype})"
        return f"{value}.expand{shape}"

    @staticmethod
    def graph_like(c: N.Carried | StateField) -> N.AnyNode:
        """A node of a state's type."""
        return N.State(id=c.name, name=c.name, axes=c.axes, dtype=c.dtype)

    def captured(self, node: N.Recur, space: str, spread: str) -> dict[str, str]:
        """What the body reads from outside: rows of values over the sequence, others as they are."""
        local: dict[str, str] = {}
        rows: dict[str, str] = {}
        for n in node.body.nodes:
            if not isinstance(n, N.Capture):
                continue
            text = self.text(self.graph, n.outer)[0]
            if self.home(self.graph, n.outer) == space:
                if n.outer not in rows:
                    rows[n.outer] = self.fresh(f"{n.outer}_rows")
                    self.w(f"{rows[n.outer]} = {spread.format(text)}")
                local[n.id] = f"{rows[n.outer]}[:, step]"
            elif node.within is not None and self.home(self.graph, n.outer) == EACH:
                local[n.id] = f"{held(text, 0, 9)}[{self.seq(self.graph.axis[node.within].space)}.owner]"
            else:
                local[n.id] = text if text.isidentifier() else f"({text})"
        return local

    def lists(self, node: N.Recur, outs: dict[int, N.Out]) -> dict[int, str]:
        """A list for each result that is read."""
        names = {i: self.fresh(f"{node.body.outputs[i][0]}_steps") for i in outs if i < len(node.body.outputs)}
        for name in names.values():
            self.w(f"{name} = []")
        return names

    def body(self, node: N.Recur, loop: Loop, local: dict[str, str], lists: dict[int, str], alive: str,
             masked: str) -> None:  # fmt: skip
        """The statements of one step; states move on where `alive`, everywhere unless `masked` holds."""
        w, body = self.w, node.body
        saved, outer_loop = self.names, self.loop
        self.names, self.loop = local, loop
        self.enter_users(body)
        kept = {c.result for c in node.carried} | {id_ for _, id_ in body.outputs}
        for n in body.nodes:
            if isinstance(n, N.State):
                self.names[n.id] = f"now_{identifier(n.name)}"
            elif not isinstance(n, N.Capture) and not self.inline(body, n, self.users_in(body)[n.id], kept):
                self.body_statement(node, n)
        for i, name in lists.items():
            id_ = body.outputs[i][1]
            home = self.home(body, id_)
            home = EACH if home == NOWHERE and loop.each else home
            text, rank = self.aligned(body, id_, body[id_].axes, home)
            if self.number(body, id_):
                text, rank = f"torch.full((), {text}, dtype={self.dtype(body[id_])}, device=device)", 9
            w(f"{name}.append({held(text, rank, 9)}.expand{self.shape(body[id_].axes, home)})")
        for c in node.carried:
            home = self.state_home(c, loop)
            text, rank = self.aligned(body, c.result, c.axes, home)
            if self.number(body, c.result):
                text, rank = f"torch.full((), {text}, dtype={self.dtype(self.graph_like(c))}, device=device)", 9
            w(f"new_{identifier(c.name)} = {held(text, rank, 9)}.expand{self.shape(c.axes, home)}")
        for c in node.carried:
            state = identifier(c.name)
            where = f"torch.where({alive}.view(-1{', 1' * len(c.axes)}), new_{state}, now_{state})" if alive else ""
            choice = f"{where} if {masked} else new_{state}" if masked else where or f"new_{state}"
            w(f"now_{state} = {choice}")
        self.names, self.loop = saved, outer_loop

    def state_home(self, c: N.Carried, loop: Loop) -> str:
        spaces = [self.graph.axis[a].space for a in c.axes if self.is_sequence(a)]
        return spaces[0] if spaces else EACH if loop.each else NOWHERE

    def body_statement(self, node: N.Recur, n: N.AnyNode) -> None:
        w, body = self.w, node.body
        text, _ = self.expression(body, n)
        name = self.fresh(n.id if not generic(n) else "x")
        place = f"  # {self.lines.place(n.span)}" if n.span else ""
        inner = self.loop.inner if self.loop else ""
        if isinstance(n, N.Reduce) and inner and any(self.graph.axis[a].space == inner for a in n.over):
            so_far, kept = self.running(n, node.id)
            chunks = self.chunks(node.axis)
            if kept == "_":
                w(f"{name} = {text}{place}")
            else:
                w(f'{name} = {chunks}.resumed(step, {text}, {so_far}, "{n.fn}"){place}')
                w(f"{kept} = {chunks}.kept(step, {name}, {kept})")
            if n.fn == "mean":
                w(f"{name} = {chunks}.averaged(step, {name})")
        else:
            w(f"{name} = {text}{place}")
        self.names[n.id] = name

    # -- over chunks -------------------------------------------------------------------------------------------------

    def over_chunks(self, node: N.Recur) -> None:
        """A step is a chunk: values over the sequence that is cut are [N, width, ...], `valid` says which are there."""
        w, body, outs = self.w, node.body, self.outs(node)
        axis = self.graph.axis[node.axis]
        inner = self.graph.axis[axis.parent or ""].space
        chunks, own = self.chunks(node.axis), self.seq(axis.space)
        local = self.captured(node, inner, f"{chunks}.rows({{}})")
        local |= self.captured_chunks(node, axis.space, own)
        for n in body.nodes:
            if isinstance(n, N.Reduce) and axis.parent in n.over:
                self.start_running(n, node.id)
                so_far, kept = self.running(n, node.id)
                if kept != "_":
                    w(f"{kept} = {so_far}")
        for c in node.carried:
            w(f"now_{identifier(c.name)} = {state_name(c.name)}")
        lists = self.lists(node, outs)
        inside, places = self.fresh("inside"), ""
        loop = Loop(node.axis, inner, True, self.fresh("width"), self.fresh("valid"), self.fresh("place"))
        w(f"{inside} = {chunks}.valid()")
        w(f"{loop.width} = {inside}.shape[2]")
        if any(isinstance(n, N.Coord) and n.axis == axis.parent for n in body.nodes):
            places = self.fresh("places")
            w(f"{places} = {chunks}.rows({self.seq(inner)}.positions({self.start(axis.parent or '')}))")
        with w.indented(f"for step in range({inside}.shape[1]):"):
            w(f"{loop.valid} = {inside}[:, step]")
            if places:
                w(f"{loop.place} = {places}[:, step]")
            if any(isinstance(n, N.Coord) and n.axis == node.axis for n in body.nodes):
                w(f"position = {own}.padded({chunks}.index())[:, step]")
            self.body(node, loop, local, lists, f"{chunks}.updates(step)", "")
        for i, name in lists.items():
            result = self.fresh(outs[i].id)
            over = axis.parent in outs[i].axes
            put = f"{chunks}.unrows(torch.stack({name}, 1))" if over else f"{own}.unpadded(torch.stack({name}, 1))"
            shape = self.shape(outs[i].axes, self.home(self.graph, outs[i].id))
            w(f"{result} = {put} if {name} else torch.zeros({shape}, dtype={self.dtype(outs[i])}, device=device)")
            self.names[outs[i].id] = result
        for k, c in enumerate(node.carried):
            self.state_out(c.name, f"now_{identifier(c.name)}", c.axes, outs.get(len(body.outputs) + k))

    def captured_chunks(self, node: N.Recur, space: str, own: str) -> dict[str, str]:
        """Values over the chunks, a chunk of each sequence at a time."""
        local: dict[str, str] = {}
        for n in node.body.nodes:
            if isinstance(n, N.Capture) and self.home(self.graph, n.outer) == space:
                name = self.fresh(f"{n.outer}_rows")
                self.w(f"{name} = {own}.padded({self.text(self.graph, n.outer)[0]})")
                local[n.id] = f"{name}[:, step]"
        return local

    # -- over an axis of fixed size ----------------------------------------------------------------------------------

    def over_steps(self, node: N.Recur) -> None:
        w, body, outs = self.w, node.body, self.outs(node)
        self.each[node.id] = self.differs(node)
        loop = Loop(node.axis, each=self.each[node.id])
        local: dict[str, str] = {}
        for n in body.nodes:
            if isinstance(n, N.Capture):
                text, axes = self.text(self.graph, n.outer)[0], self.graph[n.outer].axes
                dim = self.dim(self.graph, n.outer, node.axis) if node.axis in axes else None
                local[n.id] = (text if text.isidentifier() else f"({text})") + (
                    "" if dim is None else f".select({dim}, step)")  # fmt: skip
        for c in node.carried:
            value = self.initial_value(c, self.state_home(c, loop))
            w(f"now_{identifier(c.name)} = {value}")
        lists = self.lists(node, outs)
        with w.indented(f"for step in range({node.axis}):"):
            self.body(node, loop, local, lists, "", "")
        for i, name in lists.items():
            result = self.fresh(outs[i].id)
            lead = len(self.lead(self.home(self.graph, outs[i].id)))
            w(f"{result} = torch.stack({name}, {lead})")
            self.names[outs[i].id] = result
        for k, c in enumerate(node.carried):
            if len(body.outputs) + k in outs:
                self.names[outs[len(body.outputs) + k].id] = f"now_{identifier(c.name)}"

    def differs(self, node: N.Recur) -> bool:
        """Whether the states of a recurrence over a fixed axis differ from sequence to sequence."""
        self.loop = Loop(node.axis, each=False)
        found = any(
            self.home(node.body, n.id) == EACH for n in node.body.nodes if not isinstance(n, N.State)
        )  # fmt: skip
        found = found or any(c.initial and self.home(self.graph, c.initial) == EACH for c in node.carried)
        self.loop = None
        self._homes = {k: v for k, v in self._homes.items() if k[0] != id(node.body)}
        return found
