"""The tuning file beside a spec: `gla.tuning.json` beside `gla.spec`."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import ValidationError

from chunkc.ir.diagnostics import CompileError, SourceFile, Span, error
from chunkc.ir.tuning import Tuning

SPEC, BEHIND = ".spec", ".tuning.json"


def tuning_path(spec: Path | None) -> Path | None:
    """Where the tuning file of a spec lies, or would lie; text that is no `.spec` file has none."""
    return spec.with_suffix(BEHIND) if spec is not None and spec.suffix == SPEC else None


def read_tuning(source: SourceFile) -> Tuning | None:
    """What was found by tuning a file.

    Raises:
        CompileError: `cannot-read`, `too-large`, or `bad-tuning` if what lies beside it is no tuning file.
    """
    path = tuning_path(source.path)
    if path is None or not os.path.lexists(path):
        return None
    try:
        return Tuning.model_validate_json(SourceFile.read(path).text)
    except ValidationError as reason:
        first = reason.errors()[0]
        place = ".".join(map(str, first["loc"]))
        why = f"{place}: {first['msg']}" if place else first["msg"]
        hint = "chunkc tune writes it anew; without it kernels have the schedules of chunkc"
        raise CompileError([error("bad-tuning", f"'{path}' is no tuning file", Span(str(path), 0, 0), notes=(why,),
                                  hints=(hint,))]) from None  # fmt: skip
