"""Schedules: what a layer or op demands of how it is computed, whatever the compiler chooses."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

from chunkc.dsl import tree as T
from chunkc.ir.diagnostics import Report, Span
from chunkc.ir.graph import Schedule, Unit

# The settings, all of them true or false, and what each demands.
SETTINGS = {
    "prefix_invariant": "cutting a sequence short leaves what recurrences give for the tokens before bitwise as it was",
}
TRUTHS = ("true", "false")


def read_schedule(blocks: Sequence[T.Schedule], called: Iterable[Unit], report: Report) -> Schedule:
    """A unit's schedule from its blocks, of which it may have one.

    The caller's governs: what a called unit demands and its caller does not is set aside, and kept by name."""
    for block in blocks[1:]:
        report.error("schedule-twice", "a layer or op has one schedule", block.span,
                     related=((blocks[0].span, "first here"),), hints=("put the settings in one block",))  # fmt: skip
    found: dict[str, T.Pin] = {}
    values: dict[str, bool] = {}
    for pin in (p for block in blocks[:1] for p in block.pins):
        name = pin.name.text
        if name not in SETTINGS:
            _unknown(pin, report)
        elif name in found:
            report.error("setting-twice", f"'{name}' is set twice", pin.span,
                         related=((found[name].span, "first here"),), hints=("take one of the two out",))  # fmt: skip
        else:
            found[name] = pin
            values[name] = _truth(pin, report)
    schedule = Schedule().evolve(**values, span=blocks[0].span if blocks else None)
    mine = schedule.demands()
    aside = [u.name for u in called if any(demanded and not mine[n] for n, demanded in u.schedule.demands().items())]
    return schedule.evolve(set_aside=tuple(dict.fromkeys(aside)))


def _unknown(pin: T.Pin, report: Report) -> None:
    name = pin.name.text
    near = difflib.get_close_matches(name[:64], SETTINGS, 1)
    hint = f"did you mean '{near[0]}'?" if near else f"the settings are {', '.join(SETTINGS)}"
    report.error("unknown-setting", f"a schedule has no setting '{name[:64]}'", pin.name.span, hints=(hint,))


def _truth(pin: T.Pin, report: Report) -> bool:
    if isinstance(pin.value, T.Name) and pin.value.text in TRUTHS:
        return pin.value.text == "true"
    name = pin.name.text
    report.error("bad-setting", f"'{name}' is true or false, and this is neither", pin.value.span,
                 hints=(f"write '{name} = true'",))  # fmt: skip
    return False


def check_schedule(unit: Unit, ahead: Mapping[str, tuple[Span, str]], report: Report) -> None:
    """A demand that no schedule can meet: tokens that are cut off change what looks ahead."""
    if not unit.schedule.prefix_invariant or unit.causal:  # of a causal unit it was reported already
        return
    for name, (span, why) in ahead.items():
        report.error("not-causal", f"'{name}' looks ahead, and '{unit.name}' demands prefix_invariant", span, why,
                     related=((unit.schedule.span or unit.span, "the schedule"),),
                     hints=("take the setting out, or what looks ahead",))  # fmt: skip
