"""The verb: options as typed to a report that is printed and written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from chunkc.artifact import SettingError, read_setting
from chunkc.bench.report import save_png, table
from chunkc.bench.run import Options, Talk, bench
from chunkc.bench.sizes import BenchError, read_shape
from chunkc.driver import Compiled


def run_verb(compiled: Compiled, file: Path, as_json: Path | None, png: Path | None, asked: Mapping[str, Any],
             talk: Talk) -> int:  # fmt: skip
    """Print the table, write JSON and chart; 1 if chunkc's own candidate failed."""
    if png is not None and find_spec("matplotlib") is None:
        raise click.UsageError("a picture needs matplotlib: install chunkc[plot]")
    try:
        options = Options(**{**asked, "settings": dict(map(read_setting, asked["settings"])),
                             "shape": read_shape(asked["shape"])})  # fmt: skip
        report = bench(compiled, file, options, talk)
    except (BenchError, SettingError) as reason:
        raise click.UsageError(str(reason)) from None
    click.echo(table(report))
    if as_json is not None:
        as_json.write_text(json.dumps(report, indent=2) + "\n")
    if png is not None:
        save_png(report, png)
    return int(any(row["reason"] for part in report["parts"] for row in part["rows"] if row["candidate"] == "chunkc"))
