"""Checking of units: a syntax tree becomes units with semantic graphs, or every diagnostic of the file.

Statements are checked in order; a name is defined before it is used."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import replace

from chunkc.dsl import prelude
from chunkc.dsl import tree as T
from chunkc.dsl.express import Expressions
from chunkc.dsl.scope import (
    AxisName,
    BodyValue,
    Broken,
    FunctionName,
    Scope,
    Setting,
    StateName,
    Stop,
    Value,
    Work,
)
from chunkc.dsl.sizes import Context
from chunkc.ir import nodes as N
from chunkc.ir.axes import Axis, Size, SizeError
from chunkc.ir.diagnostics import Diagnostic, Report, Span
from chunkc.ir.graph import Builder, Module, Parameter, Unit
from chunkc.ir.ranges import Ranges


def check(file: T.File, name: str, dropped: str = "") -> tuple[Module, list[Diagnostic]]:
    """The units of a file and all diagnostics; `dropped` is text that did not parse: what it defines is unknown.

    The module holds the units without errors."""
    report = Report()
    units: list[Unit] = []
    silenced = frozenset(re.findall(r"[A-Za-z]\w*", dropped))
    try:
        _check_items(file, silenced, report, units)
    except Stop:
        pass  # reported, or enough was
    except RecursionError:  # limits on nesting are meant to keep it from happening
        report.error("too-large", "this file is nested too deeply", Span(name, 0, 0))
    if not units and not report.errors and not dropped:
        report.error("empty", "the file defines no layer and no op", Span(name, 0, 0))
    return Module(file=name, units=tuple(units)), report.found


def _check_items(file: T.File, silenced: frozenset[str], report: Report, units: list[Unit]) -> None:
    work = Work(report)
    functions = [i for i in file.items if isinstance(i, T.FnDecl)]
    named = frozenset(i.name.text for i in file.items if isinstance(i, T.UnitDecl))
    uses = any(isinstance(i, T.Use) for i in file.items)
    seen: dict[str, Span] = {}
    for item in file.items:
        work.spend(item.span)
        if isinstance(item, T.Later | T.Use):
            what = item.what if isinstance(item, T.Later) else "use"
            report.error("not-yet", f"'{what}' is not built by this version", item.span)
        elif isinstance(item, T.UnitDecl):
            if item.name.text in seen:
                report.error("name-taken", f"'{item.name.text}' is defined twice", item.name.span,
                             related=((seen[item.name.text], "first here"),))  # fmt: skip
                continue
            seen[item.name.text] = item.name.span
            before = len(report.errors)
            unit = _UnitChecker(item, functions, report, work, silenced, named, uses).run()
            if unit is not None and len(report.errors) == before:
                units.append(unit)


class _UnitChecker:
    def __init__(self, unit: T.UnitDecl, functions: list[T.FnDecl], report: Report, work: Work,
                 silenced: frozenset[str], named: frozenset[str], uses: bool) -> None:  # fmt: skip
        self.unit = unit
        self.report = report
        self.work = work
        self.scope = Scope(report, prelude.NAMES, silenced, named, uses)
        self.builder = Builder()
        self.axes: dict[str, Axis] = self.builder.axes
        self.x = Expressions(self.scope, report, self.axes, work)
        self.doc: list[str] = []
        self.params: list[Parameter] = []
        self.inputs: list[str] = []
        self.outputs: list[tuple[str, str]] = []
        self.output_spans: dict[str, Span] = {}
        self.recurrences = 0
        for fn in functions:
            work.spend(fn.span)
            self.scope.declare(fn.name, FunctionName(fn, fn.name.span))

    def run(self) -> Unit | None:
        before = len(self.report.errors)
        for p in self.unit.params:
            self.parameter(p)
        for statement in self.unit.body:
            self.statement(statement)
        if not any(isinstance(s, T.Declare) and s.what == "output" for s in self.unit.body):
            self.report.error("no-output", f"'{self.unit.name.text}' has no output", self.unit.name.span,
                              hints=("write 'output y'",))  # fmt: skip
        if len(self.report.errors) > before:
            return None
        graph = self.builder.graph(self.outputs).pruned()
        unit = Unit(kind=self.unit.kind, name=self.unit.name.text, causal=self.unit.causal, doc=" ".join(self.doc),
                    params=tuple(self.params), inputs=tuple(self.inputs), graph=graph,
                    span=self.unit.name.span)  # fmt: skip
        self.check_sequences(unit)
        ahead = looks_ahead(unit)
        self.check_causal(unit, ahead)
        return unit.evolve(looks_ahead=tuple(ahead))

    def check_sequences(self, unit: Unit) -> None:
        """One sequence a unit, and no value over two of its axes: what the back ends lay out."""
        spaces: dict[str, Span] = {}
        for node in unit.graph.nodes:
            axes = [a for a in node.axes if self.axes[a].kind in ("time", "unordered")]
            if len(axes) > 1:
                self.x.later(f"a value over two sequence axes, {axes[0]} and {axes[1]},", node.span or unit.span)
                return
            for a in axes:
                spaces.setdefault(self.axes[a].space, node.span or unit.span)
        if len(spaces) > 1:
            self.x.later("a unit over two sequences", list(spaces.values())[1])

    def check_causal(self, unit: Unit, ahead: dict[str, tuple[Span, str]]) -> None:
        if unit.causal:
            for name, (span, why) in ahead.items():
                self.report.error("not-causal", f"'{name}' looks ahead, and '{unit.name}' is declared causal", span,
                                  why, related=((self.output_spans[name], "the output"),))  # fmt: skip

    # -- declarations ------------------------------------------------------------------------------------------------

    def parameter(self, p: T.Parameter) -> None:
        kind = p.type.text if p.type else "int"
        if kind not in ("int", "float", "bool"):
            self.report.error("bad-type", f"a parameter is int, float or bool, not '{kind}'", p.type.span)  # type: ignore[union-attr]
            kind = "int"
        default: int | float | bool | None = None
        if p.default is not None:
            default = self.default(p.name.text, kind, p.default)
        size = Size(op="param", value=p.name.text)
        if self.scope.declare(p.name, Setting(size, kind, p.name.span)):
            self.params.append(Parameter(name=p.name.text, type=kind, default=default))  # type: ignore[arg-type]

    def default(self, name: str, kind: str, e: T.Expr) -> int | float | bool | None:
        """The value of a default: of the parameter's type, and without other parameters."""
        size = self.x.number(e)
        if size is None:
            return None
        if size.params():
            self.report.error("bad-default", "a default is a number, without other parameters", e.span)
            return None
        value = size.evaluate({})
        whole = math.isfinite(value) and value == math.floor(value)
        if isinstance(value, bool) != (kind == "bool") or (kind == "int" and not whole):
            self.report.error("bad-default", f"'{name}' is {kind}, this is not", e.span)
            return None
        return float(value) if kind == "float" else value if kind == "bool" else int(value)

    def statement(self, s: T.Statement) -> None:
        self.work.spend(s.span)
        if isinstance(s, T.Doc):
            self.doc.append(s.text)
        elif isinstance(s, T.Axes):
            for a in s.axes:
                self.declare_axis(a)
        elif isinstance(s, T.Declare):
            self.declare(s)
        elif isinstance(s, T.Define):
            self.define(s.name, s.axes, s.value, Context(self.builder))
        elif isinstance(s, T.Recurrence):
            self.recurrence(s)
        elif isinstance(s, T.Chunk):
            self.x.later("'chunk'", s.span)
            self.scope.names.setdefault(s.name.text, Broken(s.span))
        else:
            self.x.later(f"'{s.what}'", s.span)
            self.silence((s,))

    def declare_axis(self, a: T.AxisDecl) -> None:
        self.work.spend(a.span)
        name = a.name.text
        axis: Axis | None = None
        if a.kind is not None:
            if a.kind.text in ("time", "unordered"):
                axis = Axis(name=name, kind=a.kind.text, space=name)  # type: ignore[arg-type]
            else:
                self.report.error("bad-type", f"an axis is 'time', 'unordered' or '= size', not '{a.kind.text}'",
                                  a.kind.span)  # fmt: skip
        elif a.groups is not None:
            parent, count = self.x.axis(a.groups), self.x.whole(a.size, 1, "bad-size", "a count") if a.size else None
            if parent is not None and count is not None:
                axis = self.grouped(name, count, parent, a)
        elif isinstance(a.size, T.Name) and isinstance(self.scope.names.get(a.size.text), AxisName):
            same = self.x.axis(a.size)
            assert same is not None
            axis = same.evolve(name=name)
        elif a.size is not None:
            size = self.x.whole(a.size, 1, "bad-size", "a size")
            if size is not None:
                axis = Axis(name=name, kind="size", size=size, space=name)
        if axis is None:
            self.scope.names.setdefault(name, Broken(a.name.span))
        elif self.scope.declare(a.name, AxisName(axis, a.name.span)):
            self.axes[name] = axis

    def grouped(self, name: str, count: Size, parent: Axis, a: T.AxisDecl) -> Axis | None:
        assert a.groups is not None and a.size is not None
        if parent.size is None:
            self.report.error("bad-type", f"'{parent.name}' is a sequence: only an axis of fixed size has groups",
                              a.groups.span)  # fmt: skip
            return None
        if not count.params() and not parent.size.params() and parent.size.evaluate({}) % count.evaluate({}):
            self.report.error("bad-size", f"'{parent.name}' has size {parent.size.evaluate({})}, no multiple of "
                              f"{count.evaluate({})}", a.size.span)  # fmt: skip
            return None
        return Axis(name=name, kind="size", size=count, space=name, parent=parent.name)

    def axis_list(self, names: tuple[T.Name, ...] | None) -> tuple[str, ...] | None:
        """The declared axes, each once; None if one is unknown."""
        out: list[str] = []
        good = True
        for n in names or ():
            self.work.spend(n.span)
            axis = self.x.axis(n)
            if axis is None:
                good = False
            elif axis.name in out:
                self.report.error("axis-twice", f"axis '{axis.name}' is named twice", n.span)
                good = False
            else:
                out.append(axis.name)
        return tuple(out) if good else None

    def declare(self, s: T.Declare) -> None:
        for bind in s.binds:
            self.work.spend(bind.span, 1 + len(self.axes) // 4)  # a param's initial value takes all axes along
            if s.what == "input":
                self.declare_input(bind)
            elif s.what == "param":
                self.declare_param(bind)
            elif s.what == "output":
                self.declare_output(bind)
            else:
                self.x.later("a state across calls", bind.span)
                self.scope.names.setdefault(bind.name.text, Broken(bind.span))

    def declare_input(self, bind: T.Bind) -> None:
        axes = self.axis_list(bind.axes)
        dtype = bind.type.text if bind.type else "float"
        if dtype not in ("float", "int", "bool"):
            self.report.error("bad-type", f"an input is float, int or bool, not '{dtype}'", bind.type.span)  # type: ignore[union-attr]
            axes = None
        if bind.value is not None:
            self.report.error("bad-input", "an input has no value; a param has", bind.value.span)
        low, high = self.range_of(bind)
        if axes is None:
            self.scope.names.setdefault(bind.name.text, Broken(bind.span))
            return
        if not any(self.axes[a].kind in ("time", "unordered") for a in axes):
            self.report.error("bad-input", f"input '{bind.name.text}' belongs to no sequence", bind.span,
                              hints=("give it a time axis, or declare a param",))  # fmt: skip
            axes = ()
        id_ = self.builder.add(N.Input, bind.name.text, bind.span, name=bind.name.text, axes=axes, dtype=dtype,
                               low=low, high=high)  # fmt: skip
        if self.scope.declare(bind.name, Value(id_, bind.name.span)):
            self.inputs.append(bind.name.text)

    def range_of(self, bind: T.Bind) -> tuple[float | None, float | None]:
        if bind.range is None:
            return None, None
        sizes = [size for e in bind.range if (size := self.x.number(e)) is not None]
        if len(sizes) < 2:
            return None, None
        span = bind.range[0].span.to(bind.range[1].span)
        if any(s.params() for s in sizes):
            self.report.error("bad-range", "a range has two numbers, without parameters", span)
            return None, None
        low, high = (float(s.evaluate({})) for s in sizes)
        if low > high:
            self.report.error("bad-range", f"the range [{low:g}, {high:g}] is empty", span)
        return low, high

    def plain(self, bind: T.Bind, what: str) -> None:
        """Refuse a type or a range where none has a meaning yet."""
        if bind.type is not None and bind.type.text != "float":
            self.x.later(f"{what} of type '{bind.type.text}'", bind.type.span)
        if bind.range is not None:
            self.x.later(f"{what} with a range", bind.range[0].span.to(bind.range[1].span))

    def declare_param(self, bind: T.Bind) -> None:
        self.plain(bind, "a param")
        axes = self.axis_list(bind.axes)
        if axes is not None and any(self.axes[a].is_sequence for a in axes):
            self.report.error("bad-param", f"param '{bind.name.text}' is over a sequence", bind.span,
                              hints=("declare an input",))  # fmt: skip
            axes = None
        init = None
        if axes is not None and bind.value is not None:
            inner = Builder(axes=self.axes.values())
            id_ = self.x.expr(bind.value, Context(inner, target=axes, initial=True))
            if id_ is None:
                axes = None
            else:
                init = inner.graph([("value", id_)]).pruned()
        if axes is None:
            self.scope.names.setdefault(bind.name.text, Broken(bind.span))
            return
        id_ = self.builder.add(N.Param, bind.name.text, bind.span, name=bind.name.text, axes=axes, init=init)
        self.scope.declare(bind.name, Value(id_, bind.name.span))

    def declare_output(self, bind: T.Bind) -> None:
        name = bind.name.text
        self.plain(bind, "an output")
        if bind.value is not None:
            self.define(bind.name, bind.axes, bind.value, Context(self.builder))
        symbol = self.scope.find(bind.name)
        if symbol is None:
            return
        if not isinstance(symbol, Value | StateName):
            self.report.error("bad-output", f"'{name}' is no tensor", bind.name.span)
            return
        id_ = symbol.id if isinstance(symbol, Value) else symbol.outer
        if bind.axes is not None and bind.value is None:
            wanted = self.axis_list(bind.axes)
            if wanted is None:
                return
            id_ = self.as_axes(id_, wanted, bind.span, Context(self.builder)) or id_
        if any(o == name for o, _ in self.outputs):
            self.report.error("name-taken", f"'{name}' is an output twice", bind.name.span)
            return
        self.outputs.append((name, id_))
        self.output_spans[name] = bind.name.span

    # -- definitions -------------------------------------------------------------------------------------------------

    def define(self, name: T.Name, axes: tuple[T.Name, ...] | None, value: T.Expr, c: Context) -> str | None:
        """A definition: its node, entered in the scope."""
        target = self.axis_list(axes) if axes is not None else None
        id_: str | None = None
        before = len(c.builder.nodes)
        if axes is None or target is not None:
            c = replace(c, target=target, weight=name.text, rename=self.renames(target or (), name), weights_used=[])
            id_ = self.x.expr(value, c)
            if id_ is not None and target is not None:
                wanted = tuple(a for a in target if a != c.bound)
                id_ = self.as_axes(id_, wanted, value.span, c)
        if id_ is None:
            self.scope.names.setdefault(name.text, Broken(name.span))
            return None
        if len(c.builder.nodes) > before:  # else it is a second name of something
            id_ = _named(c.builder, id_, name.text)
        self.scope.declare(name, Value(id_, name.span) if c.outer is None else BodyValue(id_, name.span))
        return id_

    def renames(self, target: tuple[str, ...], name: T.Name) -> dict[str, str]:
        """Other names of the definition's sequences, which it reads under its own."""
        out = {}
        for a in target:
            if self.axes[a].is_sequence:
                self.work.spend(name.span, 1 + len(self.axes) // 16)
                same = [o.name for o in self.axes.values() if o.space == self.axes[a].space and o.name not in target]
                out.update(dict.fromkeys(same, a))
        return out

    def as_axes(self, id_: str, wanted: tuple[str, ...], span: Span, c: Context) -> str | None:
        """The value over just these axes, in this order: missing ones are brought by repetition."""
        b = c.builder
        for a in b.nodes[id_].axes:
            parent = self.axes[a].parent
            if a not in wanted and parent is not None and parent in wanted and self.axes[a].kind == "size":
                id_ = self.x.expand(id_, a, parent, span, c)
        have = b.nodes[id_].axes
        extra = [a for a in have if a not in wanted]
        if extra:
            self.report.error("axis-mismatch", f"this is over {', '.join(have) or 'no axis'}: "
                              f"'{extra[0]}' is not among the declared axes", span,
                              notes=(f"declared: {', '.join(wanted) or 'none'}",),
                              hints=(f"reduce over '{extra[0]}', or declare it",))  # fmt: skip
            return None
        if have == wanted:
            return id_
        return b.add(N.Map, "", span, fn="as", args=(id_,), axes=wanted, dtype=b.nodes[id_].dtype)

    # -- recurrences -------------------------------------------------------------------------------------------------

    def recurrence(self, s: T.Recurrence) -> None:
        axis = self.x.axis(s.over)
        if s.within is not None:
            self.x.later("'within'", s.within.span)
            axis = None
        if axis is not None and axis.kind != "time":
            self.x.later("a recurrence over an axis that is no time axis", s.over.span)
            axis = None
        if axis is None:
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
        if len(self.report.errors) > before or not states:
            self.silence(s.body, [*states, *(name for name, _, _ in defined)])
            return
        self.close_recurrence(s, axis, c, states, defined)

    def silence(self, body: Iterable[T.Statement], entered: Iterable[str] = ()) -> None:
        """After an error: what the statements define is known to be unknown, `entered` names too."""
        for name in entered:
            if name in self.scope.names:  # a name that was refused is not
                self.scope.names[name] = Broken(self.scope.names[name].span)
        for statement in body:
            names: list[T.Name] = []
            if isinstance(statement, T.Define | T.Chunk):
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
        elif isinstance(s, T.Later):
            self.x.later(f"'{s.what}' inside a recurrence", s.span)
            self.silence((s,))
        else:
            self.report.error("bad-body", "a recurrence holds states and definitions", s.span)
            self.silence((s,))

    def declare_state(self, bind: T.Bind, c: Context, states: dict[str, StateName]) -> None:
        self.work.spend(bind.span)
        axes = self.axis_list(bind.axes)
        self.plain(bind, "a state")
        if axes is not None and any(self.axes[a].is_sequence for a in axes):
            self.report.error("bad-state", "a state is over axes of fixed size", bind.span)
            axes = None
        initial: str | None = None
        if axes is not None and bind.value is not None:
            outer = Context(self.builder)
            initial = self.x.expr(bind.value, outer)
            initial = self.as_axes(initial, axes, bind.value.span, outer) if initial is not None else None
            if initial is None:
                axes = None
            elif any(self.axes[a].is_sequence for a in self.builder.nodes[initial].axes):
                self.report.error("bad-state", "an initial value is over no sequence", bind.value.span)
        if axes is None:
            self.scope.names.setdefault(bind.name.text, Broken(bind.span))
            return
        current = c.builder.add(N.State, bind.name.text, bind.span, name=bind.name.text, axes=axes)
        symbol = StateName(axes, bind.name.span, initial, current)
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
        id_ = self.as_axes(id_, state.axes, s.value.span, context)
        if id_ is not None:
            state.current = id_

    def close_recurrence(self, s: T.Recurrence, axis: Axis, c: Context, states: dict[str, StateName],
                         defined: list[tuple[str, str, Span]]) -> None:  # fmt: skip
        """Make the node and its results: tensors defined inside, then each state's trajectory."""
        body = c.builder
        results = [(name, id_) for name, id_, _ in defined] + [(n, st.current) for n, st in states.items()]
        carried = tuple(
            N.Carried(name=n, axes=st.axes, initial=st.initial, result=st.current, span=st.span)
            for n, st in states.items()
        )
        self.recurrences += 1
        recur = self.builder.add(N.Recur, f"recurrence_{self.recurrences}", s.span, axis=axis.name, carried=carried,
                                 body=body.graph(results))  # fmt: skip
        spans = {name: span for name, _, span in defined}
        for index, (name, id_) in enumerate(results):
            node = body.nodes[id_]
            out = self.builder.add(N.Out, name, node.span, arg=recur, index=index, axes=(axis.name, *node.axes),
                                   dtype=node.dtype)  # fmt: skip
            if name in states:
                states[name].outer = out
                states[name].current = ""
                states[name].final = self.builder.add(
                    N.Out, f"{name}_final", node.span, arg=recur, index=len(results) + list(states).index(name),
                    axes=states[name].axes)  # fmt: skip
            else:
                self.scope.names[name] = Value(out, spans[name])


def _named(builder: Builder, id_: str, name: str) -> str:
    """Give the newest node the definition's name as its id; a node that has a name keeps it."""
    node = builder.nodes[id_]
    newest = next(reversed(builder.nodes)) == id_
    if not newest or isinstance(node, N.Input | N.Param | N.Capture | N.State | N.Out) or name in builder.nodes:
        return id_
    del builder.nodes[id_]
    new = builder.fresh(name)
    builder.nodes[new] = node.evolve(id=new)
    for key in reversed(builder._known):
        if builder._known[key] == id_:  # soon found: the newest node is among the last
            builder._known[key] = new
            break
    return new


def looks_ahead(unit: Unit) -> dict[str, tuple[Span, str]]:
    """The outputs that depend on later tokens, with the span that looks ahead and why."""
    graph = unit.graph
    blame: dict[str, tuple[Span, str] | None] = {}
    time = {a.name for a in graph.axes if a.kind in ("time", "unordered")}
    for node in graph.nodes:
        found = next((blame[a] for a in node.operands() if blame.get(a)), None)
        span = node.span or unit.span
        if found is None and isinstance(node, N.Reduce | N.Normalize) and set(node.over) & time:
            found = (span, "this is over the whole sequence")
        if found is None and isinstance(node, N.Shift) and _negative(node.by):
            found = (span, "this reads a later position")
        if found is None and isinstance(node, N.Length):
            found = (span, "this depends on the sequence's length")
        if found is None and isinstance(node, N.Out):
            source = graph[node.arg]
            whole = isinstance(source, N.Recur) and node.index >= len(source.body.outputs)
            found = (span, "this is the last state") if whole else None
        blame[node.id] = found
    return {name: b for name, id_ in graph.outputs if (b := blame[id_]) is not None}


def _negative(size: Size) -> bool:
    try:
        return size.evaluate({}) < 0
    except (SizeError, KeyError):
        return Ranges.of_size(size)[0] < 0
