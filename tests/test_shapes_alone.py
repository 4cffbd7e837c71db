"""Where values cannot be read, what shapes bound takes their place: the same results, run without a compiler.

`tests/test_pytorch.py` compiles and exports layers; here every construct runs as it does then."""

from __future__ import annotations

import attentions
import cases
import constructs
import pytest
import torch
from emitted import Case, emit, errors
from test_attention import VALUES
from test_language import built as construct
from test_language import settings
from test_numerics import ALL, PACKED, SETTINGS, allowed, built, gates

__all__ = ["built"]
RAGGED = [([33, 33], False), ([0, 17, 1, 40, 0], True), ([1], True), ([5, 5, 0, 0, 1], True)]


@pytest.fixture(autouse=True)
def compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


def check(found: dict[str, float], most: float = 1.0) -> None:
    assert max(found.values()) <= most, {k: round(v, 2) for k, v in found.items() if v > most}


@pytest.mark.parametrize("lengths, packed", RAGGED)
@pytest.mark.parametrize("name", [n for n in constructs.SPECS if n != "fns"])
def test_constructs(name, lengths, packed):  # type: ignore[no-untyped-def]
    module, unit = construct(name)
    case = Case(settings(name, unit), lengths, packed, torch.float64, values=constructs.VALUES)
    check(errors(module, unit, case), 3.0)


@pytest.mark.parametrize("name", ALL)
def test_recurrences(built, name):  # type: ignore[no-untyped-def]
    module, unit = built(name)
    values = gates(unit, cases.mixed)
    case = Case(SETTINGS, [0, *PACKED, 0], packed=True, dtype=torch.float64, resume=True, values=values)
    check(errors(module, unit, case), allowed(name, torch.float64))


@pytest.mark.parametrize("name", attentions.OPS)
def test_attention(tmp_path, name):  # type: ignore[no-untyped-def]
    module, (unit,), _ = emit(attentions.OPS[name], tmp_path, "attends.spec")
    case = Case({"heads": 2, "dk": 8, "dv": 5}, [3, 0, 1, 27, 0], packed=True, values=VALUES)
    check(errors(module, unit, case))
