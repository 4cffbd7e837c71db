"""The verb: options as typed to a file beside the spec, and what is printed of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from chunkc.artifact import SettingError, read_setting
from chunkc.bench.run import Options, Talk
from chunkc.bench.sizes import BenchError, read_shape
from chunkc.driver import Compiled
from chunkc.ir.tuning import Schedule
from chunkc.tune.run import Found, tune
from chunkc.tuning import tuning_path


def run_verb(compiled: Compiled, file: Path, asked: Mapping[str, Any], talk: Talk) -> Path:
    """Tune, print a table, and write the file that builds of this spec take schedules from; its path."""
    path = tuning_path(file)
    if path is None:
        raise click.UsageError(f"what is found is written beside a .spec file, which '{file}' is not")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise click.UsageError(f"'{path}' cannot be written")
    try:
        options = Options(unit=asked["unit"], settings=dict(map(read_setting, asked["settings"])),
                          shape=read_shape(asked["shape"]), limit_seconds=asked["limit_seconds"])  # fmt: skip
        found = tune(compiled, file, options, asked["jobs"], talk)
    except (BenchError, SettingError) as reason:
        raise click.UsageError(str(reason)) from None
    for line in table(found):
        click.echo(line)
    new = path.with_name(f".{path.name}.{os.getpid()}")  # a build at the same time sees the old file, or the new one
    new.write_text(found.tuning.text(), encoding="utf-8")
    os.replace(new, path)
    return path


def table(found: Found) -> list[str]:
    """A line for each kernel, and for what was dropped; the whole times last."""
    rows = found.tuning.kernels
    width = max(len(name) for name in rows)
    out = [f"{found.tuning.device}, {', '.join(f'{k}={v}' for k, v in found.tuning.shape.items())}, bf16"]
    for name, row in rows.items():
        line = f"  {name:{width}}  {shown(row.default)} {row.default_ms:7.3f} ms"
        out.append(f"{line}  ->  {shown(row.schedule)} {row.ms:7.3f} ms" if row.schedule != row.default else line)
    out += [f"  dropped: {d.kernel} {shown(d.schedule).strip()}: {d.reason}" for d in found.dropped]
    for way, before, after in zip(("forward", "with backward"), found.before, found.after):
        out.append(f"  {way:{width}}  {before:.3f} ms untuned, {after:.3f} ms tuned")
    return out


def shown(schedule: Schedule) -> str:
    """As `64 x 128, 4 warps, 3 stages`."""
    i, j, warps, stages = schedule
    return f"{f'{i} x {j}':>9}, {warps} warps, {stages} stages"
