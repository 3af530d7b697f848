"""The results of the proofs as a page, and as the list that hatcl ships."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..engine.folder import read_json
from .run import Row

KNOWN = Path(__file__).with_name("known.json")
LOW = 0.9
INTRODUCTION = """\
# The zoo: which models convert, proved one by one

Written by `hatcl zoo --publish` from `benchmarks/results/zoo.json`; do not edit. For each model: it converts in
training and evaluation mode; without a task its outputs are the plain model's bit for bit; two tasks are learned with
AdamW, about half of the units of each off, after which the certificate is exact and the first task's outputs are what
they were at sealing; a deep copy, and the saved model loaded in another process, give the same outputs; each task is
cut out as a smaller module without hatcl in it, which agrees with the model within 1e-5 of the largest output. Batch of
2, random weights, the model's own input size (transformers: small configs of the real classes, with masks for padding
and once more without, fewer heads of keys than of queries where the class has groups). `name:depth=2` is a model with
two of its blocks, where the whole is too large for the machine. All names that timm lists, converted on the meta
device, are in `benchmarks/results/timm_names.json`.

*known* is the share of the parameters' elements of which both owner and reader are on the map (the image and a head's
classes count: they are always on); the rest is frozen by one end or copied per task. *trace* and *forward* are seconds
of processor time on one thread, the trace next to one plain forward. *cut out* is the share of the elements that a task
with about half of the units keeps as a model of its own, a quarter at best where both ends of a weight are units; a
star says that a part stays at full width since sizes stand in the model's code (`-`: proved before this was tried).

| from | models passed | families passed | known: median over families | lowest |
|---|---|---|---|---|"""


def known_models() -> dict[str, dict[str, Any]]:
    """The models that passed at this release of hatcl: name -> family, parameters, known share."""
    return dict(read_json(KNOWN))


def to_known(models: Mapping[str, Row]) -> dict[str, dict[str, Any]]:
    """The content of `known_models`, from rows of `prove_all`."""
    return {
        name: {"family": row["family"], "parameters": row["parameters"], "known": round(row["known"], 4)}
        for name, row in models.items()
        if row["passed"]
    }


def kinds(models: Mapping[str, Row]) -> dict[str, dict[str, Row]]:
    """The rows, grouped by the library of their models."""
    out: dict[str, dict[str, Row]] = {"timm": {}, "torchvision": {}, "transformers": {}}
    for name, row in models.items():
        kind = {"hf": "transformers", "torchvision": "torchvision"}.get(name.rpartition("/")[0], "timm")
        out[kind][name] = row
    return out


def to_page(models: Mapping[str, Row]) -> str:
    """The rows as Markdown."""
    lines = [INTRODUCTION]
    for kind, rows in kinds(models).items():
        if rows:
            lines.append(_summary(kind, rows))
    failed = {n: r for n, r in models.items() if not r["passed"]}
    lines += ["", "## What does not pass", ""]
    if failed:
        lines += ["| model | why |", "|---|---|", *(f"| {n} | {_cell(r['failure'])} |" for n, r in failed.items())]
    else:
        lines.append("Nothing that was tried.")
    low = {n: r for n, r in models.items() if r["passed"] and r["known"] < LOW}
    lines += ["", f"## Known below {LOW:.2f}", ""]
    if low:
        lines += ["| model | known | the rest | what the trace says |", "|---|---|---|---|"]
        for n, r in low.items():
            rest = ", ".join(f"{why} {share:.1%}" for why, share in r["unknown"].items())
            lines.append(f"| {n} | {r['known']:.3f} | {_cell(rest)} | {_cell('; '.join(r['notes'][:3]))} |")
    else:
        lines.append("None.")
    lines += [
        "",
        "## All",
        "",
        "| model | family | parameters | units | known | copied per task | cut out | trace | forward |",
    ]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for n, r in models.items():
        if r["passed"]:
            lines.append(
                f"| {n} | {r['family']} | {r['parameters'] / 1e6:.2f} M | {r['units']} | {r['known']:.3f} | "
                f"{r['shares']['own_copy']:.1%} | {_cut_out_cell(r)} | "
                f"{r['trace_seconds']:.2f} | {r['forward_seconds']:.2f} |"
            )
    return "\n".join(lines) + "\n"


def _summary(kind: str, rows: Mapping[str, Row]) -> str:
    families: dict[str, list[Row]] = {}
    for row in rows.values():
        families.setdefault(row["family"], []).append(row)
    passed = [f for f, members in families.items() if all(r["passed"] for r in members)]
    known = [
        statistics.mean(r["known"] for r in m if r["passed"]) for m in families.values() if any(r["passed"] for r in m)
    ]
    return (
        f"| {kind} | {sum(r['passed'] for r in rows.values())} of {len(rows)} | {len(passed)} of {len(families)} | "
        + (f"{statistics.median(known):.3f} | {min(known):.3f} |" if known else "- | - |")
    )


def _cut_out_cell(row: Row) -> str:
    return f"{row['extracted']:.2f}{'*' if row['full'] else ''}" if "extracted" in row else "-"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
