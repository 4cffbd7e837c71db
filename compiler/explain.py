"""The verb `explain` of a file: options as typed to what facts are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click

from chunkc.artifact import SettingError, read_setting
from chunkc.bench.sizes import BenchError, read_shape
from chunkc.driver import Compiled
from chunkc.estimates import At
from chunkc.ir.diagnostics import CompileError, error


@contextmanager
def sizes_as_usage() -> Iterator[None]:
    """Sizes that cannot be are a mistake of the command."""
    try:
        yield
    except (BenchError, SettingError) as reason:
        raise click.UsageError(str(reason)) from None


def place_asked(shape: str | None, chosen: tuple[str, ...], machine: str, dtype: str) -> At | None:
    """The sizes and the machine to estimate for; without a shape, none."""
    return None if shape is None else At(read_shape(shape), dict(map(read_setting, chosen)), machine, dtype)


def mesh_sizes(compiled: Compiled, given: tuple[str, ...]) -> dict[str, int] | None:
    """The sizes of a mesh's axes, if any were given; one that the layout does not have is an error at the layout."""
    if not given:
        return None
    layout = next((u.parallel for u in compiled.units if u.parallel is not None), None)
    if layout is None:
        raise click.UsageError("this file has no parallel layout: --mesh means nothing")
    sizes: dict[str, int] = {}
    for text in given:
        name, equal, size = text.partition("=")
        if not equal or not size.isdecimal() or not 1 <= int(size) <= 1 << 20 or name in sizes:
            raise click.BadParameter(
                f"'{text}' is not NAME=N with a number from 1, each name once", param_hint="'--mesh'"
            )
        sizes[name] = int(size)
    if strange := [n for n in sizes if n not in layout.mesh]:
        raise CompileError([error("bad-layout", f"the mesh has no axis '{strange[0]}'", layout.span,
                                  hints=(f"its axes are {', '.join(layout.mesh)}",))])  # fmt: skip
    return sizes
