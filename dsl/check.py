"""Checking of units: a syntax tree becomes units with semantic graphs, or every diagnostic of the file.

Statements are checked in order; a name is defined before it is used."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from chunkc.dsl import prelude
from chunkc.dsl import tree as T
from chunkc.dsl.attention import Attentions
from chunkc.dsl.causality import looks_ahead
from chunkc.dsl.layouts import lay_out
from chunkc.dsl.schedules import check_schedule, read_schedule
from chunkc.dsl.scope import (
    AxisName,
    Broken,
    FunctionName,
    Scope,
    Setting,
    StateName,
    Stop,
    Symbol,
    UnitName,
    Value,
    Work,
)
from chunkc.dsl.sizes import Context
from chunkc.ir import nodes as N
from chunkc.ir.axes import Axis, Size
from chunkc.ir.diagnostics import Diagnostic, Report, Span
from chunkc.ir.graph import Builder, Module, Parameter, Unit


@dataclass(frozen=True)
class Exports:
    """What a file gives to those that use it: its layers, ops and functions."""

    names: Mapping[str, Symbol]


def check(file: T.File, name: str, dropped: str = "", uses: Mapping[str, Exports] | None = None
          ) -> tuple[Module, list[Diagnostic], Exports]:  # fmt: skip
    """The units of a file, all diagnostics, and what other files may use of it. `dropped` is text that did not parse:
    what it defines is unknown. `uses` are the files that it uses, by path.

    The module holds the units without errors."""
    report = Report()
    units: list[Unit] = []
    silenced = frozenset(re.findall(r"[A-Za-z]\w*", dropped))
    known: dict[str, Symbol] = {}
    try:
        _check_items(file, silenced, report, units, known, uses or {})
        units = lay_out(file, units, report)
    except Stop:
        pass  # reported, or enough was
    except RecursionError:  # limits on nesting are meant to keep it from happening
        report.error("too-large", "this file is nested too deeply", Span(name, 0, 0))
    own = {i.name.text for i in file.items if isinstance(i, T.UnitDecl | T.FnDecl)}
    if not own and not report.errors and not dropped:
        report.error("empty", "the file defines no layer, op or function", Span(name, 0, 0))
    return Module(file=name, units=tuple(units)), report.found, Exports({n: s for n, s in known.items() if n in own})


def _check_items(file: T.File, silenced: frozenset[str], report: Report, units: list[Unit], known: dict[str, Symbol],
                 uses: Mapping[str, Exports]) -> None:  # fmt: skip
    """Fill `units`, and `known` with what can be called: of used files, the functions, and the units as they come."""
    work = Work(report)
    later = {i.name.text for i in file.items if isinstance(i, T.UnitDecl)}
    states = {i.name.text + ("State" if i.kind == "layer" else "_state"): i.name
              for i in file.items if isinstance(i, T.UnitDecl)}  # fmt: skip
    for item in file.items:
        given: dict[str, Symbol] = {}
        if isinstance(item, T.Use) and item.path in uses:
            given = dict(uses[item.path].names)
        elif isinstance(item, T.FnDecl):
            work.spend(item.span)
            given = {item.name.text: FunctionName(item, item.name.span, known)}
        for name, symbol in given.items():
            if name in prelude.NAMES:
                report.error("name-taken", f"'{name}' is a function of the language", symbol.span)
            elif name in known and known[name] != symbol:
                report.error("name-taken", f"'{name}' is defined twice", item.span,
                             related=((known[name].span, "first here"),))  # fmt: skip
            else:
                known[name] = symbol
    for item in file.items:
        work.spend(item.span)
        if isinstance(item, T.UnitDecl):
            name = item.name.text
            later.discard(name)
            if name in known:
                report.error("name-taken", f"'{name}' is defined twice", item.name.span,
                             related=((known[name].span, "first here"),))  # fmt: skip
                continue
            if name in states:
                report.error("name-taken", f"'{name}' is what the state of '{states[name].text}' is called in Python",
                             item.name.span, related=((states[name].span, "its layer or op"),),
                             hints=("choose another name",))  # fmt: skip
                continue
            before = len(report.errors)
            unit = _UnitChecker(item, report, work, silenced, dict(known), frozenset(later)).run()
            good = unit is not None and len(report.errors) == before
            known[name] = UnitName(unit, item.name.span) if unit is not None and good else Broken(item.name.span)
            if unit is not None and good:
                units.append(unit)


class _UnitChecker(Attentions):
    def __init__(self, unit: T.UnitDecl, report: Report, work: Work, silenced: frozenset[str],
                 known: Mapping[str, Symbol], later: frozenset[str]) -> None:  # fmt: skip
        super().__init__(report, work, Scope(report, prelude.NAMES, silenced, known, later, unit.name))
        self.unit = unit
        self.x.unit_kind = unit.kind
        self.doc: list[str] = []
        self.params: list[Parameter] = []
        self.inputs: list[str] = []
        self.outputs: list[tuple[str, str]] = []
        self.output_spans: dict[str, Span] = {}
        self.schedules: list[T.Schedule] = []

    def run(self) -> Unit | None:
        before = len(self.report.errors)
        for p in self.unit.params:
            self.parameter(p)
        for statement in self.unit.body:
            self.statement(statement)
        if not any(isinstance(s, T.Declare) and s.what == "output" for s in self.unit.body):
            self.report.error("no-output", f"'{self.unit.name.text}' has no output", self.unit.name.span,
                              hints=("write 'output y'",))  # fmt: skip
        if not any(isinstance(s, T.Declare) and s.what == "input" for s in self.unit.body):
            self.report.error("bad-input", f"'{self.unit.name.text}' has no input", self.unit.name.span,
                              hints=("write 'input x[t]'",))  # fmt: skip
        schedule = read_schedule(self.schedules, self.x.called, self.report)
        if len(self.report.errors) > before:
            return None
        graph = self.builder.graph(self.outputs).pruned()
        unit = Unit(kind=self.unit.kind, name=self.unit.name.text, causal=self.unit.causal, doc=" ".join(self.doc),
                    params=tuple(self.params), inputs=tuple(self.inputs), graph=graph, schedule=schedule,
                    span=self.unit.name.span)  # fmt: skip
        self.check_sequences(unit)
        ahead = looks_ahead(unit)
        self.check_causal(unit, ahead)
        check_schedule(unit, ahead, self.report)
        return unit.evolve(looks_ahead=tuple(ahead))

    def check_sequences(self, unit: Unit) -> None:
        """No value is over two sequences: what the back ends lay out."""
        for node in unit.graph.nodes:
            axes = [a for a in node.axes if self.axes[a].is_sequence]
            if len(axes) > 1:
                self.x.later(f"a value over two sequence axes, {axes[0]} and {axes[1]},", node.span or unit.span)
                return

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
            self.chunk(s)
        elif isinstance(s, T.Attention):
            self.attention(s)
        elif isinstance(s, T.Schedule):
            self.schedules.append(s)
        elif isinstance(s, T.Source):
            self.report.error("bad-body", "a source stands in an attention", s.span)
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

    def chunk(self, s: T.Chunk) -> None:
        """`chunk c of t = RULE`: the axis of the chunks, and the node that says where they lie."""
        time = self.x.axis(s.of)
        if time is not None and time.kind != "time":
            self.report.error("not-an-axis", f"'{time.name}' is no time axis: only a sequence with an order is cut",
                              s.of.span)  # fmt: skip
            time = None
        rule = self.chunk_rule(s.rule, time) if time is not None else None
        if time is None or rule is None:
            self.scope.names.setdefault(s.name.text, Broken(s.span))
            return
        axis = Axis(name=s.name.text, kind="chunk", space=s.name.text, parent=time.name)
        if self.scope.declare(s.name, AxisName(axis, s.name.span)):
            self.axes[axis.name] = axis
            self.builder.add(N.Segment, "segment", s.span, chunk=axis.name, **rule)

    def chunk_rule(self, e: T.Expr, time: Axis) -> dict[str, Any] | None:
        """The fields of a segment: fixed(n), parts(n) or runs(x)."""
        named = isinstance(e, T.CallExpr) and isinstance(e.fn, T.Name)
        rule = e.fn.text if isinstance(e, T.CallExpr) and isinstance(e.fn, T.Name) else ""
        if isinstance(e, T.Name) and e.text in prelude.LATER or rule in prelude.LATER:
            self.x.later(f"chunks by '{rule or e.text}'", e.span)  # type: ignore[union-attr]
            return None
        if not isinstance(e, T.CallExpr) or not named or rule not in prelude.RULES:
            self.report.error("bad-chunk", "chunks are fixed(n), parts(n) or runs(x)", e.span)
            return None
        if len(e.args) != 1 or e.args[0].name is not None:
            self.report.error("bad-call", f"'{rule}' takes one argument", e.span)
            return None
        arg = e.args[0].value
        if rule != "runs":
            n = self.x.whole(arg, 1, "bad-size", "a length of chunks" if rule == "fixed" else "a number of chunks")
            return None if n is None else {"rule": rule, "n": n}
        x = self.x.expr(arg, Context(self.builder, rename=self.renames((time.name,), T.Name(arg.span, time.name))))
        if x is None:
            return None
        b = self.builder
        if b.nodes[x].axes != (time.name,):
            self.report.error("axis-mismatch", f"runs are of a value over {time.name} alone, this is over "
                              f"{', '.join(b.nodes[x].axes) or 'no axis'}", arg.span)  # fmt: skip
            return None
        dtype = b.nodes[x].dtype
        number = b.map("where", x, b.const(1), b.const(0)) if dtype == "bool" else x
        before = b.add(N.Shift, "", arg.span, arg=number, axis=time.name, by=Size.of(1), axes=(time.name,),
                       dtype=b.nodes[number].dtype)  # fmt: skip
        return {"rule": rule, "begins": b.map("!=", number, before, span=arg.span)}

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

    def declare_param(self, bind: T.Bind) -> None:
        if bind.type is not None and bind.type.text != "float":
            self.report.error("bad-type", f"a param is float, not '{bind.type.text}'", bind.type.span,
                              hints=("make a complex one of two: complex(a, b)",))  # fmt: skip
        low, high = self.range_of(bind)
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
        id_ = self.builder.add(N.Param, bind.name.text, bind.span, name=bind.name.text, axes=axes, init=init,
                               low=low, high=high)  # fmt: skip
        self.scope.declare(bind.name, Value(id_, bind.name.span))

    def declare_output(self, bind: T.Bind) -> None:
        name = bind.name.text
        if bind.type is not None or bind.range is not None:
            self.report.error("bad-output", "an output has the type and the range of its value", bind.span)
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
