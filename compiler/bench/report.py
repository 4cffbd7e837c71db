"""A benchmark's report as a table, and as a chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HEAD = ("", "compared", "forward ms", "of limit", "with backward ms", "of limit", "first s", "peak MiB", "error")
LEFT = 2  # columns of text


def table(report: Mapping[str, Any]) -> str:
    """The report as a person reads it."""
    shape = ", ".join(f"{name} {n}" for name, n in report["shape"].items())
    versions = ", ".join(f"{name} {v or 'not installed'}" for name, v in report["versions"].items())
    out = [
        f"{report['spec']}: {report['unit']}, {report['dtype']} on {report['device']}",
        shape,
        f"{versions}",
        f"a copy moves {report['copy_bytes_per_s'] / 1e9:.3g} GB/s, a matrix product does "
        f"{report['product_operations_per_s'] / 1e12:.3g} TFLOP/s",
    ]
    for part in report["parts"]:
        out += ["", *_part(part)]
    return "\n".join(out)


def _part(part: Mapping[str, Any]) -> list[str]:
    lines = [HEAD, _limit_row(part), *(_cells(row) for row in part["rows"])]
    widths = [max(len(line[k]) for line in lines) for k in range(len(HEAD))]
    out = [part["part"], _least(part)]
    for line, row in zip(lines, [None, None, *part["rows"]]):
        cells = [c.ljust(w) if k < LEFT else c.rjust(w) for k, (c, w) in enumerate(zip(line, widths))]
        text = "  " + "  ".join(cells)
        reason = row["reason"] if row else None
        if reason and not any(line[LEFT:]):  # nothing was timed: the reason stands in its place
            text = "  " + "  ".join(cells[:LEFT]) + f"  {reason}"
        elif reason:
            text += f"  {reason}"
        out.append(text.rstrip())
    return out


def _least(part: Mapping[str, Any]) -> str:
    """What the limit is made of."""
    each = [
        f"{part[f'bytes_{key}'] / 1e6:.4g} MB and {part[f'operations_{key}'] / 1e9:.4g} GFLOP {name}"
        for key, name in (("forward", "forward"), ("both", "with backward"))
    ]
    return f"  at least {', '.join(each)}"


def _limit_row(part: Mapping[str, Any]) -> Sequence[str]:
    return ("limit", "", ms(part["limit_forward_ms"]), "", ms(part["limit_both_ms"]), "", "", "", "")


def _cells(row: Mapping[str, Any]) -> Sequence[str]:
    return (
        row["candidate"], row["compared"], ms(row["forward_ms"]), _share(row["forward_of_limit"]), ms(row["both_ms"]),
        _share(row["both_of_limit"]), number(row["first_s"], ".1f"), number(row["peak_mib"], ".0f"),
        number(row["error"], ".1e"),
    )  # fmt: skip


def ms(value: float | None) -> str:
    """A time as a cell; empty if it is not known."""
    return number(value, ".3f")


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.3g} %"


def number(value: float | None, form: str) -> str:
    """A number as a cell; empty if it is not known."""
    return "" if value is None else format(value, form)


def save_png(report: Mapping[str, Any], path: Path) -> None:
    """A pair of bars for each candidate that was timed, and lines where the limits are. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parts = report["parts"]
    rows = [[r for r in part["rows"] if r["forward_ms"] is not None] for part in parts]
    heights = [0.55 * max(len(r), 1) + 1.1 for r in rows]
    figure, places = pyplot.subplots(
        len(parts), 1, figsize=(9.5, sum(heights)), squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for part, timed, (place,) in zip(parts, rows, places):
        for k, (key, label, color) in enumerate(
            (("forward", "forward", "tab:blue"), ("both", "with backward", "tab:orange"))
        ):
            have = [(n, r[f"{key}_ms"]) for n, r in enumerate(timed) if r[f"{key}_ms"] is not None]
            place.barh([n + 0.36 * k for n, _ in have], [ms for _, ms in have], 0.34, color=color, label=label)
            place.axvline(part[f"limit_{key}_ms"], color="black", zorder=3, linestyle=":-"[k], label=f"limit, {label}")
        names = [r["candidate"] + (f"\n{r['compared']}" if r["compared"] else "") for r in timed]
        place.set_yticks([n + 0.18 for n in range(len(timed))], names, fontsize=8)
        place.invert_yaxis()
        place.set_xlabel("ms")
        place.set_title(part["part"], fontsize=10)
        place.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    shape = ", ".join(f"{name} {n}" for name, n in report["shape"].items())
    figure.suptitle(f"{report['spec']}, {report['dtype']} on {report['device']}\n{shape}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
