"""Recurrences: their states, their bodies, and the nodes they become."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from chunkc.dsl import tree as T
from chunkc.dsl.definitions import Definitions
from chunkc.dsl.scope import Broken, StateName, Value
from chunkc.dsl.sizes import Context
from chunkc.ir import nodes as N
from chunkc.ir.axes import Axis
from chunkc.ir.diagnostics import Span
from chunkc.ir.graph import Builder


class Recurrences(Definitions):
    """Checks the recurrences of a unit."""

    recurrences = 0

    def recurrence(self, s: T.Recurrence) -> None:
        axis = self.x.axis(s.over)
        within = None if s.within is None else self.within(s.within, axis)
        if axis is not None and axis.kind == "unordered":
            self.report.error("not-an-axis", f"'{axis.name}' has no order: no recurrence runs over it", s.over.span)
            axis = None
        if axis is None or (s.within is not None and within is None):
            self.silence(s.body)
            return
        before = len(self.report.errors)
        body = Builder(axes=self.axes.values())
        c = Context(body, outer=self.builder, bound=axis.name)
        states: dict[str, StateName] = {}
        defined: list[tuple[str, str, Span]] = []
        for statement in s.body:
            self.body_statement(statement, c, states, defined)
        if not any(isinstance(part, T.Declare) and part.what == "state" for part in s.body):
            self.report.error("no-state", "this recurrence has no state", s.span)
        if len(self.report.errors) == before:
            self.check_built(body, axis)
        if len(self.report.errors) > before or not states:
            self.silence(s.body, [*states, *(name for name, _, _ in defined)])
            return
        self.close_recurrence(s, axis, within, c, states, defined)

    def check_built(self, body: Builder, axis: Axis) -> None:
        """What loops do not compute: other chunks, other positions of the sequence that a chunk is of, and values of
        the states over a sequence in a loop over tokens."""
        parent = self.axes[axis.parent] if axis.kind == "chunk" and axis.parent else None
        moving: set[str] = set()  # what depends on the states
        for node in body.nodes.values():
            if isinstance(node, N.State) or moving & set(node.operands()):
                moving.add(node.id)
            why = self.not_built(node, axis, parent, node.id in moving)
            if why and node.span is not None:
                self.x.later(f"inside a recurrence over {axis.name}, {why}", node.span)
                return

    def not_built(self, node: N.AnyNode, axis: Axis, parent: Axis | None, moves: bool) -> str:
        sequences = [self.axes[a] for a in node.axes if self.axes[a].is_sequence]
        if axis.kind == "time":
            return "a value of its states over a sequence" if moves and sequences else ""
        chunk = node.chunk if isinstance(node, N.Reduce | N.Normalize) else None
        if chunk is not None and self.axes[chunk].kind == "chunk":
            return "a function chunk by chunk"
        if parent is None or isinstance(node, N.Capture):
            return ""
        read = self.axes[node.axis] if isinstance(node, N.Shift | N.Gather | N.Conv) else None
        if read is not None and (read.space == parent.space or read.is_sequence and parent in sequences):
            return "a read at other positions of the sequence"
        over = [self.axes[a] for a in node.over] if isinstance(node, N.Reduce | N.Normalize) else []
        if any(a.space == parent.space and a != parent for a in (*sequences, *over)):
            return f"a value over another name of {parent.name}"
        return ""

    def within(self, name: T.Name, axis: Axis | None) -> str | None:
        """The chunks that a recurrence stays within."""
        chunk = self.x.axis(name)
        if chunk is None or axis is None:
            return None
        parent = self.axes[chunk.parent] if chunk.kind == "chunk" and chunk.parent else None
        if parent is None or parent.space != axis.space:
            self.report.error("not-an-axis", f"'{chunk.name}' does not cut '{axis.name}' into chunks", name.span,
                              hints=(f"declare 'chunk {chunk.name} of {axis.name} = ...'",))  # fmt: skip
            return None
        return chunk.name

    def silence(self, body: Iterable[T.Statement], entered: Iterable[str] = ()) -> None:
        """After an error: what the statements define is known to be unknown, `entered` names too."""
        for name in entered:
            if name in self.scope.names:  # a name that was refused is not
                self.scope.names[name] = Broken(self.scope.names[name].span)
        for statement in body:
            names: list[T.Name] = []
            if isinstance(statement, T.Define | T.Chunk | T.Attention):
                names = [statement.name]
            elif isinstance(statement, T.Declare):
                names = [b.name for b in statement.binds]
            elif isinstance(statement, T.Axes):
                names = [a.name for a in statement.axes]
            elif isinstance(statement, T.Later):
                names = list(statement.defines)
            elif isinstance(statement, T.Recurrence):
                self.silence(statement.body)
            for n in names:
                self.scope.names.setdefault(n.text, Broken(n.span))

    def body_statement(self, s: T.Statement, c: Context, states: dict[str, StateName],
                       defined: list[tuple[str, str, Span]]) -> None:  # fmt: skip
        self.work.spend(s.span)
        if isinstance(s, T.Declare) and s.what == "state":
            for bind in s.binds:
                self.declare_state(bind, c, states)
        elif isinstance(s, T.Define) and s.name.text in states:
            self.assign(s, states[s.name.text], c)
        elif isinstance(s, T.Define):
            id_ = self.define(s.name, s.axes, s.value, c)
            if id_ is not None:
                defined.append((s.name.text, id_, s.name.span))
        elif isinstance(s, T.Later | T.Attention):
            self.x.later(f"'{s.what if isinstance(s, T.Later) else 'attention'}' inside a recurrence", s.span)
            self.silence((s,))
        else:
            self.report.error("bad-body", "a recurrence holds states and definitions", s.span)
            self.silence((s,))

    def declare_state(self, bind: T.Bind, c: Context, states: dict[str, StateName]) -> None:
        self.work.spend(bind.span)
        axes = self.axis_list(bind.axes)
        dtype = self.real_or_complex(bind, "a state")
        assert c.bound is not None
        if axes is not None and c.bound in axes:
            self.report.error(
                "bad-state", f"a state is over no axis of its recurrence: '{c.bound}' is its step", bind.span
            )
            axes = None
        elif axes is not None and self.axes[c.bound].is_sequence and any(self.axes[a].is_sequence for a in axes):
            self.report.error("bad-state", "a state is over axes of fixed size", bind.span)
            axes = None
        initial: str | None = None
        if axes is not None and bind.value is not None:
            outer = Context(self.builder)
            initial = self.x.expr(bind.value, outer)
            initial = self.as_axes(initial, axes, bind.value.span, outer) if initial is not None else None
            if initial is None:
                axes = None
            elif self.builder.nodes[initial].dtype == "complex" != dtype:
                self.report.error("bad-state", "the initial value is complex, the state is not", bind.value.span,
                                  hints=(f"declare 'state {bind.name.text}: complex'",))  # fmt: skip
            elif self.axes[c.bound].is_sequence and any(
                self.axes[a].is_sequence for a in self.builder.nodes[initial].axes
            ):
                self.report.error("bad-state", "an initial value is over no sequence", bind.value.span)
        if axes is None:
            self.scope.names.setdefault(bind.name.text, Broken(bind.span))
            return
        current = c.builder.add(N.State, bind.name.text, bind.span, name=bind.name.text, axes=axes, dtype=dtype)
        symbol = StateName(axes, bind.name.span, initial, current, dtype)
        if self.scope.declare(bind.name, symbol):
            states[bind.name.text] = symbol

    def assign(self, s: T.Define, state: StateName, c: Context) -> None:
        if s.axes is not None:
            self.report.error("bad-state", "a state's axes stand in its declaration", s.name.span)
            return
        context = replace(c, target=state.axes, weight=s.name.text, weights_used=state.weights_used)
        id_ = self.x.expr(s.value, context)
        if id_ is None:
            return
        have = set(c.builder.nodes[id_].axes)
        if not have <= set(state.axes):
            extra = sorted(have - set(state.axes))
            self.report.error("axis-mismatch", f"this is over {', '.join(sorted(have))}, and '{s.name.text}' has no "
                              f"axis '{extra[0]}'", s.value.span,
                              related=((state.span, f"'{s.name.text}' is over {', '.join(state.axes) or 'no axis'}"),),
                              hints=(f"reduce over '{extra[0]}', or give the state that axis",))  # fmt: skip
            return
        if c.builder.nodes[id_].dtype == "complex" != state.dtype:
            self.report.error("type-mismatch", f"this is complex, and '{s.name.text}' is not", s.value.span,
                              related=((state.span, "its declaration"),),
                              hints=(f"declare 'state {s.name.text}: complex'",))  # fmt: skip
            return
        id_ = self.as_axes(id_, state.axes, s.value.span, context)
        if id_ is not None:
            state.current = id_

    def close_recurrence(self, s: T.Recurrence, axis: Axis, within: str | None, c: Context,
                         states: dict[str, StateName], defined: list[tuple[str, str, Span]]) -> None:  # fmt: skip
        """Make the node and its results: tensors defined inside, then each state's trajectory."""
        body = c.builder
        results = [(name, id_) for name, id_, _ in defined] + [(n, st.current) for n, st in states.items()]
        carried = tuple(
            N.Carried(name=n, axes=st.axes, dtype=st.dtype, initial=st.initial, result=st.current, span=st.span)
            for n, st in states.items()
        )
        self.recurrences += 1
        recur = self.builder.add(N.Recur, f"recurrence_{self.recurrences}", s.span, axis=axis.name, within=within,
                                 carried=carried, body=body.graph(results))  # fmt: skip
        spans = {name: span for name, _, span in defined}
        for index, (name, id_) in enumerate(results):
            node = body.nodes[id_]
            put_together = axis.kind == "chunk" and axis.parent in node.axes
            axes = node.axes if put_together else (axis.name, *node.axes)
            out = self.builder.add(N.Out, name, node.span, arg=recur, index=index, axes=axes, dtype=node.dtype)
            if name in states:
                states[name].outer = out
                states[name].current = ""
                states[name].final = self.builder.add(
                    N.Out, f"{name}_final", node.span, arg=recur, index=len(results) + list(states).index(name),
                    axes=states[name].axes, dtype=states[name].dtype)  # fmt: skip
            else:
                self.scope.names[name] = Value(out, spans[name])
