"""The table: each row beside its rivals, the limit and what it must reach, as plain data, text and Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from limits import least
from ops import OPS
from rows import MEAN, MILDEST, OURS, Case, Must, Row

from chunkc.bench.report import ms, number

Found = Mapping[str, Any]
Timed = Mapping[tuple[str, str], Found]  # by candidate and the key of a case
PASSES = (("forward", "forward"), ("both", "with backward"))


def entry(
    row: Row, timed: Timed, checks: Mapping[str, Found], rates: Mapping[str, float], dtype: str
) -> dict[str, Any]:
    """A row of the table. Where there is no figure, `reason` says why."""
    ours = dict(timed.get((OURS, row.case.key()), {"reason": "not run"}))
    rivals = [{"name": name, **timed.get((name, case.key()), {"reason": "not run"})} for name, case in row.rivals]
    limits = least(row.case, dtype).limits_ms(rates["bandwidth"], rates["rate"])
    step = row.case.mode == "step"
    found: dict[str, Any] = {
        "group": row.group, "op": row.case.op, "shape": shape_text(row.case), "gate": row.case.gate,
        "mode": row.case.mode, "ours": ours, "rivals": rivals,
        "error": checks.get(check_key(row.case), {}).get("error"),
    }  # fmt: skip
    for (key, _), limit in zip(PASSES, limits):
        taken = ours.get("graph_forward_ms" if step and key == "forward" else f"{key}_ms")
        best = min((r[f"{key}_ms"] for r in rivals if r.get(f"{key}_ms")), default=None)
        found[f"limit_{key}_ms"] = limit or None
        found[f"times_{key}"] = best / taken if best and taken else None
        found[f"limit_share_{key}"] = limit / taken if taken and limit else None
    bytes_ = least(row.case, dtype).bytes_forward
    taken = ours.get("graph_forward_ms") or ours.get("forward_ms")
    found["gb_per_s"] = bytes_ / taken * 1e-6 if taken and (step or OPS[row.case.op].vector) else None
    found["musts"] = [_judged(must, found) for must in row.musts]
    return found


def check_key(case: Case) -> str:
    """The case of the check that stands for a case: the same widths, few tokens."""
    return Case(case.op, case.shape.short(), case.gate, case.mode).key()


def shape_text(case: Case) -> str:
    text = case.shape.text("BTK" if OPS[case.op].vector else "BTHKV")
    return f"{text}, {len(case.lengths())} packed" if case.packed else text


def _judged(must: Must, found: Mapping[str, Any]) -> dict[str, Any]:
    """A requirement and whether it is met; False where there is no figure."""
    if must.kind == "launches":
        have = [found["ours"].get("launches")]
        wanted: list[float | None] = [must.forward]
        met = have[0] is not None and have[0] <= must.forward
        text = f"{must.forward:g} launch"
    else:
        name = {"times": "times", "limit": "limit_share"}[must.kind]
        have = [found[f"{name}_forward"], found[f"{name}_both"]]
        wanted = [must.forward, must.both]
        met = all(w is None or h is not None and h >= w for h, w in zip(have, wanted))
        text = " / ".join(f"{w:.3g}×" if must.kind == "times" else f"{100 * w:.0f} %" for w in wanted if w is not None)
    return {"text": text, "kind": must.kind, "wanted": wanted, "have": have, "met": met}


def mean(entries: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The geometric mean of how many times as fast gated linear attention is, with backward, over its shapes."""
    chosen = [e for e in entries if e["group"] == "gla" and e["gate"] == MILDEST]
    have = [e["times_both"] for e in chosen if e["times_both"]]
    value = math.exp(sum(map(math.log, have)) / len(have)) if have else None
    return {"shapes": len(chosen), "timed": len(have), "times_both": value, "wanted": MEAN,
            "met": value is not None and len(have) == len(chosen) and value >= MEAN}  # fmt: skip


# -- text --------------------------------------------------------------------------------------------------------------

HEAD = ("group", "op", "shape", "gate", "ms", "fwd+bwd", "graph ms", "fwd+bwd", "MiB", "rival", "ms", "fwd+bwd", "MiB",
        "times", "fwd+bwd", "of limit", "fwd+bwd", "error", "rival's", "must", "met")  # fmt: skip
LEFT = (0, 1, 2, 3, 9, 19, 20)


def lines(report: Mapping[str, Any]) -> list[Sequence[str]]:
    return [HEAD, *(_cells(e, report["errors"]) for e in report["rows"])]


def _cells(e: Mapping[str, Any], errors: Sequence[Mapping[str, Any]]) -> Sequence[str]:
    ours, rival = e["ours"], fastest(e["rivals"])
    other = next((x["error"] for x in errors if rival and x["name"] == rival["name"] and x["op"] == e["op"]
                  and x["gate"] == e["gate"] and x["widths"] == widths(e["shape"])), None)  # fmt: skip
    return (
        e["group"], e["op"], e["shape"] + (", one token" if e["mode"] == "step" else ""), e["gate"],
        ms(ours.get("forward_ms")), ms(ours.get("both_ms")), ms(ours.get("graph_forward_ms")),
        ms(ours.get("graph_both_ms")), number(ours.get("peak_mib"), ".0f"), rival["name"] if rival else "",
        ms(rival.get("forward_ms")) if rival else "", ms(rival.get("both_ms")) if rival else "",
        number(rival.get("peak_mib"), ".0f") if rival else "", number(e["times_forward"], ".2f"),
        number(e["times_both"], ".2f"), _part(e["limit_share_forward"]), _part(e["limit_share_both"]),
        number(e["error"], ".1e"), number(None if isinstance(other, str) else other, ".1e"),
        ", ".join(m["text"] for m in e["musts"]),
        ", ".join("yes" if m["met"] else "no" for m in e["musts"]),
    )  # fmt: skip


def widths(shape: str) -> str:
    return " ".join(part for part in shape.split(",")[0].split() if part[0] in "HKV")


def fastest(rivals: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    timed = [r for r in rivals if r.get("both_ms") or r.get("forward_ms")]
    return min(timed, key=lambda r: r.get("both_ms") or math.inf, default=rivals[0] if rivals else None)


def text(report: Mapping[str, Any]) -> str:
    table = lines(report)
    widest = [max(len(line[k]) for line in table) for k in range(len(HEAD))]
    body = ["  ".join(c.ljust(w) if k in LEFT else c.rjust(w) for k, (c, w) in enumerate(zip(line, widest))).rstrip()
            for line in table]  # fmt: skip
    return "\n".join([*_head(report), "", *body, "", *notes(report)])


MARKS = ("<!-- table -->", "<!-- end of table -->")


def put_markdown(report: Mapping[str, Any], path: Path) -> None:
    """Write the table, into the place that a page has for it between two marks, else as a page of its own."""
    text = path.read_text(encoding="utf-8") if path.exists() else "".join(MARKS)
    before, mark, rest = text.partition(MARKS[0])
    if not mark or MARKS[1] not in rest:
        raise ValueError(f"{path} has no place for the table: no line {MARKS[0]} with {MARKS[1]} behind it")
    behind = rest.partition(MARKS[1])[2]
    path.write_text(f"{before}{MARKS[0]}\n\n{markdown(report)}\n{MARKS[1]}{behind}", encoding="utf-8")


def markdown(report: Mapping[str, Any]) -> str:
    """The same for docs/performance.md."""
    header, *body = lines(report)
    rule = ["---" if k in LEFT else "--:" for k in range(len(HEAD))]
    table = ["| " + " | ".join(line) + " |" for line in (header, rule, *body)]
    said = [f"- {n}" for n in notes(report)]
    origin = "Written by `python benchmarks/suite.py --markdown`; `benchmarks/README.md` says what the columns are."
    return "\n".join([origin, "", *_head(report), "", *table, "", *said, ""])


def _head(report: Mapping[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {v or 'not installed'}" for name, v in report["versions"].items())
    rates = report["rates"]
    return [
        f"{report['device']}, {report['dtype']}; {versions}.",
        f"A copy moves {rates['bandwidth'] * 1e-12:.3g} TB/s, "
        f"a matrix product does {rates['rate'] * 1e-12:.3g} TFLOP/s.",
    ]


def notes(report: Mapping[str, Any]) -> list[str]:
    """What does not fit into columns: the mean, what failed, what was refused, checks, bandwidths, the first call."""
    average = report["mean"]
    out = []
    if average["shapes"]:
        value, met = number(average["times_both"], ".2f") or "none", "yes" if average["met"] else "no"
        out.append(f"geometric mean with backward, {MILDEST}, {average['timed']} of {average['shapes']} shapes: "
                   f"{value}; must {average['wanted']:g}: {met}")  # fmt: skip
    for e in report["rows"]:
        label = f"{e['group']} {e['op']} {e['shape']} {e['gate']}".strip()
        for each in (dict(e["ours"], name=OURS), *e["rivals"]):
            if each.get("reason"):
                out.append(f"{label}: {each['name']}: {each['reason']}")
            if each.get("stock"):
                out.append(f"{label}: {each['name']} as delivered: {each['stock']}")
        if e["gb_per_s"]:
            launched = e["ours"].get("launches")
            out.append(f"{label}: {e['gb_per_s']:.0f} GB/s" + (f", {launched} launches" if launched else ""))
    for key, found in report["checks"].items():
        failed = [name for name in ("right", "repeats", "prefix") if found.get(name) is False]
        if failed:
            error = number(found.get("error"), ".1e") or found.get("reason")
            out.append(f"check of {key}: not {', not '.join(failed)} ({error})")
    for each in report["errors"]:
        if isinstance(each["error"], str):
            out.append(f"error of {each['name']} on {each['op']} {each['widths']} {each['gate']}: {each['error']}")
    return [*dict.fromkeys(out), *(f"{name}: {value}" for name, value in report["first"].items())]


def _part(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"
