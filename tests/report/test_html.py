from __future__ import annotations

import math
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hatcl.report import html
from hatcl.report.html import Part, chart, escaped, rows_table, shades, whole_page

ALONE = {"meta", "line", "circle", "polyline", "path", "br", "img"}


class Balanced(HTMLParser):
    """Every element that is opened is closed, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        if tag not in ALONE:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ALONE:
            assert self.open and self.open.pop() == tag, tag


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=60), st.lists(st.floats(0, 1) | st.none() | st.just(math.nan), min_size=1, max_size=3))
def test_any_text_and_any_numbers_make_whole_html(name, values):
    table = shades([name], [name] * len(values), [values], [["x"] * len(values)], name, foot=[[name, name]])
    lines = chart({name: [(k, 1.0 if v is None else v) for k, v in enumerate(values)]}, name, name)
    page = whole_page(name, name, "", [Part(name, table + lines + rows_table([name], [[name, name]], name))], name)
    assert not Balanced(page).open
    assert "<script" not in page.lower() and "src=" not in page and "href=" not in page


def test_what_names_could_break_is_escaped():
    assert "<b>" not in rows_table(["<b>"], [["<b>", '"<b>']], '"<b>') and escaped('<"&') == "&lt;&quot;&amp;"


def test_twin_without_escaping_names_become_elements(monkeypatch):
    monkeypatch.setattr(html, "escaped", str)
    with pytest.raises(AssertionError):
        test_what_names_could_break_is_escaped()


def test_shades_follow_the_values():
    cells = shades(["a"], list("wxyz"), [[0.0, 0.5, 1.0, None]], [["0", "50", "100", ""]], "c")
    assert re.findall(r"--a:([\d.]+)", cells) == ["0.00", "0.50", "1.00"] and cells.count('class="none"') == 1
    assert cells.count("hot") == 1 and ">0 %<" in cells and "100 %" in cells
    signed = shades(["a"], list("xy"), [[-2.0, 1.0]], [["-2", "1"]], "c", low=-2.0, high=2.0, ends=("-2", "2"))
    assert re.findall(r"--a:([\d.]+)", signed) == ["1.00", "0.50"] and signed.count('"cell under') == 1
    assert 'class="signed"' in signed


def test_a_chart_is_inside_of_its_frame():
    drawn = chart({"a": [(1, -3.5), (1000, 7.25)], "b": [(10, 0.0)]}, "t", "x", log=True)
    points = [float(n) for line in re.findall(r'points="([^"]+)"', drawn) for n in re.split("[ ,]", line)]
    assert all(0 <= n <= html.WIDE for n in points) and all(0 <= n <= html.HIGH for n in points[1::2])
    assert drawn.count("<circle") == 1  # a line of one point is a dot
    assert re.findall(r">(\d+)</text>", drawn)[-4:] == ["1", "10", "100", "1000"]
    assert chart({"a": [], "b": [(1, math.nan)]}, "t", "x") == ""
    assert chart({"a": [(0, 1.0)]}, "t", "x", log=True) == ""  # an empty graft has sparsity 0


def test_long_lines_are_thinned_to_their_means():
    drawn = chart({"a": [(k, k % 2) for k in range(10_000)]}, "t", "x")
    assert len(re.findall(r'points="([^"]+)"', drawn)[0].split()) == html.MOST_POINTS
