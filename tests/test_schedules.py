"""The `schedule` block: what it may say, what is refused, where it is kept, and that what it promises is so."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from emitted import Case, differs_when_cut, emit
from test_numerics import SETTINGS, gates

from chunkc.artifact import fingerprint, pack
from chunkc.backends.package import emit_files
from chunkc.driver import check_source, compile_source
from chunkc.ir.diagnostics import CompileError, Diagnostic, SourceFile
from chunkc.ir.graph import Schedule, Unit
from chunkc.ir.text import parse_unit, print_unit

OP = """op f(n: int) {
  axes { t: time, e = n }
  input x[t, e], a[t, e] in [0, 1]
  SCHEDULE
  recurrence over t {
    state h[e]
    h = a * h + x
  }
  output h
}
"""
CUT = (2, 3, 63, 64, 65, 127, 130, 199)


def source(schedule: str, text: str = OP) -> SourceFile:
    return SourceFile("case.spec", text.replace("SCHEDULE", schedule))


def unit(schedule: str, text: str = OP) -> Unit:
    return check_source(source(schedule, text)).module.units[-1]


def refused(text: SourceFile) -> Diagnostic:
    with pytest.raises(CompileError) as caught:
        check_source(text)
    (only,) = caught.value.diagnostics
    return only


# -- what it says ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule, wanted", [
    ("", False),
    ("schedule {}", False),
    ("schedule { prefix_invariant = false }", False),
    ("schedule { prefix_invariant = true }", True),
    ("schedule {\n    prefix_invariant =\n      true\n  }", True),
])  # fmt: skip
def test_what_is_demanded(schedule: str, wanted: bool) -> None:
    assert unit(schedule).schedule.demands() == {"prefix_invariant": wanted}


@pytest.mark.parametrize("schedule, code, marked, hint", [
    ("schedule { prefix_invarient = true }", "unknown-setting", "prefix_invarient", "did you mean 'prefix_invariant'?"),
    ("schedule { tile = 64 }", "unknown-setting", "tile", "the settings are prefix_invariant"),
    ("schedule { prefix_invariant = 1 }", "bad-setting", "1", "write 'prefix_invariant = true'"),
    ("schedule { prefix_invariant = n }", "bad-setting", "n", "write 'prefix_invariant = true'"),
    ("schedule { prefix_invariant = 1 < 2 }", "bad-setting", "1 < 2", "write 'prefix_invariant = true'"),
    ("schedule { prefix_invariant = true, prefix_invariant = true }", "setting-twice", "prefix_invariant = true",
     "take one of the two out"),
    ("schedule { prefix_invariant = true }\n  schedule { tile = 64 }", "schedule-twice", "schedule",
     "put the settings in one block"),
])  # fmt: skip
def test_what_is_refused(schedule: str, code: str, marked: str, hint: str) -> None:
    text = source(schedule)
    found = refused(text)
    assert (found.code, text.text[found.span.start : found.span.end], found.hints) == (code, marked, (hint,))


def test_each_mistake_is_reported_once() -> None:
    with pytest.raises(CompileError) as caught:
        check_source(source("schedule { a = 1, prefix_invariant = 2, prefix_invariant = true, b = true }"))
    assert [d.code for d in caught.value.diagnostics] == [
        "unknown-setting", "bad-setting", "setting-twice", "unknown-setting"
    ]  # fmt: skip


@pytest.mark.parametrize("text", [
    OP.replace("state h[e]", "state h[e]\n    schedule { prefix_invariant = true }"),
    "fn g[a](x) {\n  schedule { prefix_invariant = true }\n  output y = sum[a](x)\n}\n"
    "op f(n: int) {\n  axes { t: time, e = n }\n  input x[t, e]\n  output y = g[e](x)\n}\n",
])  # fmt: skip
def test_it_stands_in_a_layer_or_op(text: str) -> None:
    assert refused(source("", text)).code in ("bad-body", "bad-fn")


def test_it_stands_nowhere_else() -> None:
    assert refused(source("", "schedule { prefix_invariant = true }\n" + OP)).code == "syntax"


def test_the_word_names_nothing() -> None:
    assert refused(source("", OP.replace("output h", "output schedule = h"))).code == "reserved-word"


def test_what_looks_ahead_cannot_keep_it() -> None:
    text = OP.replace("output h", "later = x[t = t + 1]\n  output h, later")
    demanding = source("schedule { prefix_invariant = true }", text)
    found = refused(demanding)
    assert found.code == "not-causal" and "demands prefix_invariant" in found.message
    ((where, _),) = found.related
    assert demanding.text[where.start : where.end] == "schedule"
    assert unit("schedule { prefix_invariant = false }", text).looks_ahead == ("later",)
    # a causal unit says so once
    assert refused(source("schedule { prefix_invariant = true }", f"causal {text}")).code == "not-causal"


def test_ranks_cannot_keep_it() -> None:
    layout = "parallel { mesh { ring }\n  shard t over ring }\n"
    found = refused(source("schedule { prefix_invariant = true }", OP + layout))
    assert found.code == "bad-layout" and "prefix_invariant" in found.message
    assert unit("schedule { prefix_invariant = false }", OP + layout).parallel is not None


# -- calls -------------------------------------------------------------------------------------------------------------

CALLER = """op g(n: int) {
  axes { t: time, e = n }
  input x[t, e], a[t, e] in [0, 1]
  MINE
  y = f(x, a)
  z = f(y, a)
  output z
}
"""


@pytest.mark.parametrize("callee, caller, aside", [
    ("true", "", ("f",)), ("true", "schedule { prefix_invariant = false }", ("f",)),
    ("true", "schedule { prefix_invariant = true }", ()), ("false", "schedule { prefix_invariant = true }", ()),
    ("false", "", ()),
])  # fmt: skip
def test_the_caller_governs(callee: str, caller: str, aside: tuple[str, ...]) -> None:
    text = OP + CALLER.replace("MINE", caller)
    both = check_source(source(f"schedule {{ prefix_invariant = {callee} }}", text)).module.units
    assert both[0].schedule.prefix_invariant == (callee == "true")  # its own, where it is called from Python
    assert both[1].schedule.prefix_invariant == ("true" in caller)
    assert both[1].schedule.set_aside == aside


def test_the_caller_governs_what_it_uses(tmp_path: Path) -> None:
    (tmp_path / "f.spec").write_text(OP.replace("SCHEDULE", "schedule { prefix_invariant = true }"))
    (tmp_path / "g.spec").write_text('use "f.spec"\n' + CALLER.replace("MINE", ""))
    (found,) = check_source(SourceFile.read(tmp_path / "g.spec", "g.spec")).module.units
    assert found.schedule.set_aside == ("f",) and not found.schedule.prefix_invariant


# -- where it is kept --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["", "schedule { prefix_invariant = true }"])
def test_a_unit_reads_back(schedule: str) -> None:
    text = OP + CALLER.replace("MINE", '"A doc: of \\"two\\" words."'.replace('\\"', "'"))
    for compiled in (check_source(source(schedule, text)).module.units, compile_source(source(schedule, text)).units):
        for found in compiled:
            assert parse_unit(print_unit(found)) == found
            assert repr(parse_unit(print_unit(found))) == repr(found)
    printed = print_unit(unit(schedule))
    assert ("schedule={prefix_invariant=true" in printed) == bool(schedule)


@pytest.mark.parametrize("text, what", [
    ("op f span=@a.spec:1-2", "graph"),
    ("fn f span=@a.spec:1-2 graph=graph normal {\n}", "kind"),
    ("op f span=@a.spec:1-2 schedule={tile=64} graph=graph normal {\n}", "tile"),
    ("op f span=@a.spec:1-2 graph=graph normal {\n}\nop g", "goes on after the unit"),
])  # fmt: skip
def test_malformed_units(text: str, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        parse_unit(text)


def test_it_is_in_the_manifest_and_in_the_cache_s_keys() -> None:
    written = {}
    for value in ("true", "false"):
        text = source(f"schedule {{ prefix_invariant = {value} }}")
        manifest = json.loads(pack(compile_source(text), emit_files, {})["manifest.json"])
        assert manifest["schedules"] == {"f": {"prefix_invariant": value == "true"}}
        assert manifest["fingerprint"] == fingerprint(text, {})
        written[value] = manifest["fingerprint"]
    assert written["true"] != written["false"]


def test_the_default_demands_nothing() -> None:
    assert not any(Schedule().demands().values())


# -- what is promised --------------------------------------------------------------------------------------------------


def kept(tmp_path: Path, name: str, dtype: torch.dtype, lengths: tuple[int, ...]) -> list[Any]:
    """Where a sequence cut short gives something else for the tokens that are left."""
    module, (only,), _ = emit(cases.OPS[name], tmp_path, f"{name}.spec")
    values = gates(only, cases.mixed)
    case = Case({**SETTINGS, "dk": 8, "dv": 16}, [200, 200], dtype=dtype, values=values)
    return differs_when_cut(module, only, case, lengths)


@pytest.mark.parametrize("name", [*cases.OPS])
def test_pytorch_keeps_the_tokens_before(tmp_path: Path, name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert not kept(tmp_path, name, dtype, CUT)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", [*cases.OPS])
def test_kernels_keep_the_tokens_before(tmp_path: Path, name: str) -> None:
    assert os.environ.get("TRITON_INTERPRET") == "1"
    assert not kept(tmp_path, name, torch.float32, (2, 64, 65, 130))


def test_what_is_cut_can_differ(tmp_path: Path) -> None:
    """The comparison itself: a sum over the whole sequence changes when it is cut."""
    text = "op f(n: int) {\n  axes { t: time, e = n }\n  input x[t, e]\n  output y[t, e] = x + sum[t](x)\n}\n"
    module, (only,), _ = emit(text, tmp_path)
    assert differs_when_cut(module, only, Case({"n": 3}, [20]), (19, 20)) == [(19, "y")]
