"""The page and the list that ships, from rows as `prove_all` gives them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hatcl.zoo import catalog, page

ROOT = Path(__file__).parents[2]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "zoo.json", ROOT / "docs" / "zoo.md"


def passed(family, known=1.0, **figures):
    row = {
        "family": family, "passed": True, "parameters": 1_500_000, "units": 321, "known": known, "unknown": {},
        "notes": [], "use": [0.5, 0.5], "extracted": 0.312, "difference": 1e-7, "full": 1,
        "forward_seconds": 0.25, "trace_seconds": 1.5, "seconds": 9.0,
        "shares": {"shared_both": 0.75, "shared_one": 0.0, "own_copy": 0.25, "always_on": 0.0},
    }  # fmt: skip
    return {**row, **figures}


def failed(family, failure):
    return {"family": family, "passed": False, "failure": failure}


ROWS = {
    "alpha_a": passed("alpha"),
    "alpha_b": passed("alpha", 0.98765),
    "beta": passed("beta", 0.5, unknown={"one end is not known": 0.4, "no | unit": 0.1}, notes=list("abcd")),
    "gamma_a": failed("gamma", "ConversionError: a | b\nsecond line"),
    "gamma_b": passed("gamma", 0.9),
    "hf/bert": passed("hf/bert"),
    "torchvision/alexnet": failed("torchvision/alexnet", "timeout: took more than 600 s"),
    "torchvision/vgg11": passed("torchvision/vgg", 0.95),
}


def table(text, heading):
    """The rows of the table under a heading, as lists of cells."""
    part = text.split(f"## {heading}\n", 1)[1].split("\n## ")[0]
    rows = [line for line in part.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in row.strip("|").replace("\\|", "¦").split("|")] for row in rows]


def test_the_summary_counts_models_and_families():
    lines = page.to_page(ROWS).splitlines()
    timm = next(line for line in lines if line.startswith("| timm |"))
    # families: alpha mean 0.993825, beta 0.5, gamma 0.9 of the one that passed
    assert timm == "| timm | 4 of 5 | 2 of 3 | 0.900 | 0.500 |"
    assert "| torchvision | 1 of 2 | 1 of 2 | 0.950 | 0.950 |" in lines
    assert "| transformers | 1 of 1 | 1 of 1 | 1.000 | 1.000 |" in lines


def test_what_fails_is_told_with_its_reason():
    text = page.to_page(ROWS)
    assert table(text, "What does not pass") == [
        ["gamma_a", "ConversionError: a ¦ b second line"],
        ["torchvision/alexnet", "timeout: took more than 600 s"],
    ]
    assert text.count("gamma_a") == text.count("torchvision/alexnet |") == 1  # nowhere else


def test_what_is_known_of_less_than_nine_tenths_is_told_with_the_rest():
    assert table(page.to_page(ROWS), "Known below 0.90") == [
        ["beta", "0.500", "one end is not known 40.0%, no ¦ unit 10.0%", "a; b; c"]
    ]
    assert table(page.to_page({"beta": passed("beta", 0.8999)}), "Known below 0.90")[0][:2] == ["beta", "0.900"]


def test_every_model_that_passed_has_a_line():
    rows = table(page.to_page(ROWS), "All")
    assert [row[0] for row in rows] == ["alpha_a", "alpha_b", "beta", "gamma_b", "hf/bert", "torchvision/vgg11"]
    assert rows[1] == ["alpha_b", "alpha", "1.50 M", "321", "0.988", "25.0%", "0.31*", "1.50", "0.25"]


def test_where_nothing_fails_it_says_so():
    text = page.to_page({"alpha_a": passed("alpha")})
    assert "## What does not pass\n\nNothing that was tried.\n\n## Known below 0.90\n\nNone.\n" in text
    assert "torchvision |" not in text and text.endswith("|\n")
    assert text.startswith("# The zoo")


def test_a_kind_of_which_nothing_passed_has_a_page_too():
    text = page.to_page({"gamma_a": failed("gamma", "broken")})
    assert "| timm | 0 of 1 | 0 of 1 |" in text


def test_the_list_holds_what_passed():
    known = page.to_known(ROWS)
    assert list(known) == ["alpha_a", "alpha_b", "beta", "gamma_b", "hf/bert", "torchvision/vgg11"]
    assert known["alpha_b"] == {"family": "alpha", "parameters": 1_500_000, "known": 0.9877}
    assert json.loads(json.dumps(known)) == known


@pytest.mark.skipif(
    not RESULTS.exists(), reason="there is no benchmarks/results/zoo.json yet; hatcl zoo --all makes it"
)
def test_the_page_and_the_list_are_those_of_the_results():
    models = json.loads(RESULTS.read_text())["models"]
    assert PAGE.read_text() == page.to_page(models), "run hatcl zoo --publish"
    known = page.known_models()
    assert known and known == page.to_known(models), "run hatcl zoo --publish"
    assert all(row["family"] == catalog.known(name).family for name, row in models.items())


def test_twin_other_results_give_another_page_and_list():
    other = {**ROWS, "beta": passed("beta", 0.6)}
    assert page.to_page(other) != page.to_page(ROWS) and page.to_known(other) != page.to_known(ROWS)
