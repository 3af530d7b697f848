"""One HTML file without a network: tables, tables of shades and line charts, readable on a phone, in light and dark."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .picture import short

MOST_LETTERS = 44  # in a row's name
MOST_POINTS = 240  # per line; more would not be visible
WIDE, HIGH = 440, 250  # of a chart, in units of its text, so that it can be read on a phone
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 40
LINE_COLOURS = 6

STYLE = """
:root{color-scheme:light dark;--back:#f6f8f9;--card:#fff;--ink:#1b2733;--muted:#56636f;--rule:#dfe5ea;
--shade:42 104 148;--under:200 84 48;--good:#22713f;--bad:#b3261e;--l0:#2f6f9c;--l1:#c2522c;--l2:#34804f;
--l3:#80509a;--l4:#8f6c14;--l5:#55626e}@media(prefers-color-scheme:dark){:root{--back:#12181e;--card:#1a222a;
--ink:#e6ebef;--muted:#a3b0bb;--rule:#323d47;--shade:52 118 168;--under:208 100 64;--good:#6fcf97;--bad:#ff8a80;
--l0:#6db3e0;--l1:#f0855c;--l2:#6cc28d;--l3:#c193dc;--l4:#d9b44a;--l5:#a9b6c1}}*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}main,header{max-width:62rem;
margin:0 auto;padding:0 1rem}header{padding-top:1.5rem}h1{font-size:1.5rem;margin:0;overflow-wrap:anywhere}
h2{font-size:1.12rem;margin:0 0 .5rem}h3{font-size:1rem;margin:1rem 0 .3rem}p{margin:.3rem 0 .7rem;max-width:44rem}
section{background:var(--card);border:1px solid var(--rule);border-radius:.6rem;padding:1rem;margin:1rem 0}
.muted{color:var(--muted)}.good{color:var(--good);font-weight:600}.bad{color:var(--bad);font-weight:600}
.tiles{display:flex;flex-wrap:wrap;gap:.6rem;margin:1rem 0}.tile{background:var(--card);
border:1px solid var(--rule);border-radius:.6rem;padding:.5rem .9rem;flex:1 1 8rem}.tile b{display:block;
font-size:1.3rem}.tile span{color:var(--muted);font-size:.85rem}.wide{overflow:auto;max-height:75vh;margin:.3rem 0}
table{border-collapse:separate;border-spacing:2px;font-variant-numeric:tabular-nums;font-size:.9rem}
th{text-align:left;font-weight:600;padding:.2rem .5rem}
thead th:not(:first-child){text-align:center}
thead th{color:var(--muted);vertical-align:bottom;position:sticky;top:0;background:var(--card)}
td{padding:.2rem .5rem;text-align:right;white-space:nowrap}td.text{text-align:left;white-space:normal;
overflow-wrap:anywhere;min-width:7rem}tbody th{white-space:nowrap}td.cell{background:rgb(var(--shade)/var(--a));
min-width:3.1rem;border-radius:.2rem;text-align:center}td.under{background:rgb(var(--under)/var(--a))}
td.hot{color:#fff}td.none{color:var(--muted);text-align:center}tr.foot td,tr.foot th{color:var(--muted);
font-weight:400}.bar{display:flex;align-items:center;gap:.5rem;font-size:.85rem;color:var(--muted);margin:.4rem 0}
.bar i{flex:0 1 12rem;height:.7rem;border-radius:.2rem;border:1px solid var(--rule);
background:linear-gradient(90deg,rgb(var(--shade)/0),rgb(var(--shade)/1))}
.bar i.signed{background:linear-gradient(90deg,rgb(var(--under)/1),rgb(var(--under)/0) 50%,
rgb(var(--shade)/0) 50%,rgb(var(--shade)/1))}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,25rem),1fr));gap:1rem}figure{margin:0}
figcaption{font-size:.9rem;color:var(--muted)}svg{width:100%;height:auto;display:block}svg text{font-size:11.5px;
fill:var(--muted)}svg .grid{stroke:var(--rule)}svg .l{fill:none;stroke-width:1.8;stroke-linejoin:round}
.l0{stroke:var(--l0);--c:var(--l0)}.l1{stroke:var(--l1);--c:var(--l1)}.l2{stroke:var(--l2);--c:var(--l2)}
.l3{stroke:var(--l3);--c:var(--l3)}.l4{stroke:var(--l4);--c:var(--l4)}.l5{stroke:var(--l5);--c:var(--l5)}
.d1{stroke-dasharray:6 3}.d2{stroke-dasharray:2 3}svg circle{fill:var(--c);stroke:none}.legend{display:flex;
flex-wrap:wrap;gap:.2rem .9rem;font-size:.85rem;margin:.2rem 0 0;padding:0;list-style:none}
.legend svg{display:inline-block;width:1.6rem;height:.6rem;margin-right:.35rem}.legend li{overflow-wrap:anywhere}
pre{overflow:auto;background:var(--back);border:1px solid var(--rule);border-radius:.4rem;padding:.7rem;
font-size:.85rem;margin:.4rem 0}details{margin:.4rem 0}summary{cursor:pointer}
:focus-visible{outline:2px solid var(--l0);outline-offset:2px}footer{color:var(--muted);font-size:.85rem;
padding:0 0 2rem}
"""


class Part(NamedTuple):
    """A part of a page: its title and its content as HTML."""

    title: str
    body: str


def escaped(text: object) -> str:
    """Text escaped for HTML."""
    return html.escape(str(text))


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph, of the class `good`, `bad` or `muted`."""
    return f'<p class="{kind}">{escaped(text)}</p>' if kind else f"<p>{escaped(text)}</p>"


def rows_table(head: Sequence[str], rows: Sequence[Sequence[object]], caption: str, texts: bool = False) -> str:
    """A table: the first entry of each row is its name, the others are numbers, or texts."""
    kind = ' class="text"' if texts else ""
    body = [
        "<tr>" + _name_of_row(row[0]) + "".join(f"<td{kind}>{escaped(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    ]
    return _in_table(head, body, caption)


def shades(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    texts: Sequence[Sequence[str]],
    caption: str,
    *,
    corner: str = "",
    ends: tuple[str, str] = ("0 %", "100 %"),
    low: float = 0.0,
    high: float = 1.0,
    foot: Sequence[Sequence[str]] = (),
) -> str:
    """A table whose cells are shaded by their values, with a colour bar; below zero in another colour.

    Args:
        values: None or NaN for missing measurements. texts: the cells' texts. corner: the head over the rows' names.
            ends: the texts at the ends of the bar. low, high: the values there. foot: rows of texts below.
    """
    body = []
    for name, row, told in zip(rows, values, texts, strict=True):
        cells = "".join(_shaded(value, text, low, high) for value, text in zip(row, told, strict=True))
        body.append(f"<tr>{_name_of_row(name)}{cells}</tr>")
    for first, *rest in foot:
        body.append(f'<tr class="foot">{_name_of_row(first)}{"".join(f"<td>{escaped(t)}</td>" for t in rest)}</tr>')
    kind = ' class="signed"' if low < 0 else ""
    bar = f'<div class="bar" aria-hidden="true">{escaped(ends[0])}<i{kind}></i>{escaped(ends[1])}</div>'
    return _in_table([corner, *columns], body, caption) + bar


def _shaded(value: float | None, text: str, low: float, high: float) -> str:
    if value is None or math.isnan(value):
        return '<td class="none">·</td>'
    under = low < 0 and value < 0
    share = value / low if under else (value - max(low, 0)) / ((high - max(low, 0)) or 1.0)
    alpha = min(max(share, 0.0), 1.0)
    kinds = ["cell", *(["under"] if under else []), *(["hot"] if alpha > 0.8 else [])]
    return f'<td class="{" ".join(kinds)}" style="--a:{alpha:.2f}">{escaped(text)}</td>'


def _name_of_row(name: object) -> str:
    shown = short(str(name), MOST_LETTERS)
    title = f' title="{escaped(name)}"' if shown != str(name) else ""
    return f'<th scope="row"{title}>{escaped(shown)}</th>'


def _in_table(head: Sequence[str], body: Sequence[str], caption: str) -> str:
    top = "".join(f'<th scope="col">{escaped(name)}</th>' for name in head)
    return (
        f'<p class="muted">{escaped(caption)}</p><div class="wide" tabindex="0" role="region" '
        f'aria-label="{escaped(caption)}"><table><thead><tr>{top}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
    )


# --- charts ---


def chart(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    title: str,
    across: str,
    *,
    log: bool = False,
    dots: bool = False,
) -> str:
    """A line chart as SVG; empty if no line has a point.

    Args:
        lines: points by name. across: the label of the horizontal axis. log: use a logarithmic axis, which leaves out
            points at 0 and below. dots: mark the points.
    """
    kept = {
        name: _thinned([p for p in points if all(map(math.isfinite, p)) and (p[0] > 0 or not log)])
        for name, points in lines.items()
    }
    kept = {name: points for name, points in kept.items() if points}
    if not kept:
        return ""
    place = (lambda x: math.log10(x)) if log else (lambda x: x)
    xs = [place(x) for points in kept.values() for x, _ in points]
    ys = [y for points in kept.values() for _, y in points]
    low, high, ticks = _scale(min(ys), max(ys))
    first, last = min(xs), max(xs)
    if first == last:
        first, last = first - 0.5, last + 0.5

    def at(x: float, y: float) -> str:
        return (
            f"{LEFT + (place(x) - first) / (last - first) * (WIDE - LEFT - RIGHT):.1f},"
            f"{TOP + (high - y) / (high - low) * (HIGH - TOP - BOTTOM):.1f}"
        )

    drawn = []
    for tick in ticks:
        y = TOP + (high - tick) / (high - low) * (HIGH - TOP - BOTTOM)
        drawn.append(f'<line class="grid" x1="{LEFT}" x2="{WIDE - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        drawn.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for x, anchor in _ticks_across(first, last, log):
        value = 10**x if log else x
        drawn.append(
            f'<text x="{at(value, low).split(",")[0]}" y="{HIGH - BOTTOM + 16}" text-anchor="{anchor}">{value:g}</text>'
        )
    drawn.append(f'<text x="{(LEFT + WIDE - RIGHT) / 2}" y="{HIGH - 6}" text-anchor="middle">{escaped(across)}</text>')
    for i, points in enumerate(kept.values()):
        drawn.append(f'<polyline class="l {_line_class(i)}" points="{" ".join(at(x, y) for x, y in points)}"/>')
        if dots or len(points) == 1:
            for x, y in points:
                cx, cy = at(x, y).split(",")
                drawn.append(f'<circle class="{_line_class(i)}" cx="{cx}" cy="{cy}" r="3"/>')
    legend = "".join(
        f'<li><svg viewBox="0 0 26 8" aria-hidden="true"><path class="l {_line_class(i)}" d="M0 4H26"/></svg>'
        f"{escaped(short(name, 40))}</li>"
        for i, name in enumerate(kept)
    )
    said = (
        f"{title} against {across}: {', '.join(f'{n} from {p[0][1]:.4g} to {p[-1][1]:.4g}' for n, p in kept.items())}"
    )
    return (
        f'<figure><figcaption>{escaped(title)}</figcaption><svg viewBox="0 0 {WIDE} {HIGH}" role="img" '
        f'aria-label="{escaped(said)}">{"".join(drawn)}</svg>'
        f"{f'<ul class=legend>{legend}</ul>' if len(kept) > 1 else ''}</figure>"
    )


def charts(parts: Sequence[str]) -> str:
    """Charts side by side if there is room."""
    found = [part for part in parts if part]
    return f'<div class="charts">{"".join(found)}</div>' if found else ""


def _line_class(i: int) -> str:
    return f"l{i % LINE_COLOURS} d{i // LINE_COLOURS % 3}"


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means of neighbours, if there are more points than can be seen."""
    if len(points) <= MOST_POINTS:
        return points
    parts = np.array_split(np.asarray(points), MOST_POINTS)
    return [(float(part[-1, 0]), float(part[:, 1].mean())) for part in parts]


def _scale(low: float, high: float) -> tuple[float, float, list[float]]:
    """Round ends around some values, and round places between them."""
    gap = (high - low) or abs(high) or 1.0
    unit = 10 ** math.floor(math.log10(gap / 4))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= gap / 4)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    return first * step, last * step, [float(f"{k * step:.6g}") for k in range(first, last + 1)]


def _ticks_across(first: float, last: float, log: bool) -> list[tuple[float, str]]:
    if log:
        whole = [float(k) for k in range(math.ceil(first - 1e-9), math.floor(last + 1e-9) + 1)]
        return [(x, "middle") for x in whole] or [(first, "start")]
    _, _, ticks = _scale(first, last)
    return [(x, "end" if x > last - 0.02 * (last - first) else "middle") for x in ticks if first <= x <= last]


# --- the page ---


def tiles(told: Sequence[tuple[str, str]]) -> str:
    """The main figures in large letters: value and name."""
    return f'<div class="tiles">{"".join(_tile(value, name) for value, name in told)}</div>'


def _tile(value: str, name: str) -> str:
    return f'<div class="tile"><b>{escaped(value)}</b><span>{escaped(name)}</span></div>'


def folded(title: str, body: str) -> str:
    """A part that opens on a click."""
    return f"<details><summary>{escaped(title)}</summary>{body}</details>"


def command_lines(lines: Sequence[str]) -> str:
    """Commands to be copied."""
    return f"<pre><code>{escaped(chr(10).join(lines))}</code></pre>"


def whole_page(title: str, lead: str, top: str, parts: Sequence[Part], foot: str) -> str:
    """The whole file. Its content policy forbids the browser to load anything from elsewhere."""
    body = "".join(f"<section><h2>{escaped(p.title)}</h2>{p.body}</section>" for p in parts if p.body)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; img-src "
        f'data:"><title>{escaped(title)}</title><style>{STYLE}</style></head><body><header><h1>{escaped(title)}</h1>'
        f"<p class=muted>{escaped(lead)}</p>{top}</header><main>{body}<footer>{escaped(foot)}</footer></main></body>"
        "</html>\n"
    )


def percents(values: Sequence[Any]) -> list[str]:
    """Shares as texts; a dot for missing measurements."""
    return ["·" if v is None or math.isnan(v) else f"{100 * v:.1f}" for v in values]
