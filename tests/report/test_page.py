"""The pages in a browser, where there is one: Debian's `chromium`, or another one of Chrome's family."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from hatcl.engine.folder import write_json
from hatcl.report.page import differing, finetune_parts, made_parts, one_page, page_of_several

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((path for name in BROWSERS if (path := shutil.which(name))), None)
MORE = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of a fine-tuning."""
    run = tmp_path_factory.mktemp("run")
    options = {"lr": 0.01, "template": "<b>{text}</b>"}
    made = {"versions": {"hatcl": "0.1.0"}, "commit": "c" * 40, "changed": True}
    write_json(
        run / "config.json",
        {"command": "finetune", "options": options, "inputs": {"/a/b.json": "d" * 64}, "made_with": made},
    )
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": k, "loss": 1 / k}) + "\n" for k in range(1, 31)))
    score = {"pretrained": {"validation": 0.5, "test": 0.5}, "finetuned": {"validation": 0.9, "test": 0.875}}
    metrics = {
        "score": score, "measure": "accuracy", "trained": {"changed": 7, "elements": 9}, "commonest": {"test": 0.5},
        "history": [{"step": 15, "loss": 0.2, "validation": 0.7}, {"step": 30, "loss": 0.1, "validation": 0.9}],
    }  # fmt: skip
    (run / "report.html").write_bytes(
        one_page(run, "a run", "", finetune_parts(run, metrics) + made_parts(run, ["hatcl graft x"]))
    )
    return run / "report.html"


def test_the_page_has_what_the_run_has(page):
    text = page.read_text()
    for words in ("87.5", "always the most common answer", "7 of 9 trained elements", "&lt;b&gt;{text}&lt;/b&gt;"):
        assert words in text
    for words in ("SHA-256 dddd", "cccc, with changes", "hatcl graft x", "loss against step: loss from 1 to 0.03333"):
        assert words in text
    assert "default-src 'none'" in text and 'lang="en"' in text and 'name="viewport"' in text


@pytest.mark.skipif(BROWSER is None, reason="no browser of Chrome's family is installed (apt-get install chromium)")
@pytest.mark.parametrize(("scheme", "wide"), [(1, 1000), (0, 1000), (1, 500)], ids=["light", "dark", "narrow"])
def test_a_browser_shows_it_without_an_error(page, tmp_path, scheme, wide):
    shot = tmp_path / "shot.png"
    more = [*MORE, f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={wide},1400", f"--screenshot={shot}"]
    more.append(f"--blink-settings=preferredColorScheme={scheme}")
    done = subprocess.run([BROWSER, *more, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not re.findall(r".*CONSOLE.*", done.stderr)
    pixels = np.asarray(Image.open(shot).convert("L")).astype(int)
    back = np.bincount(pixels.ravel()).argmax()
    assert (back > 200) == bool(scheme)  # light or dark, as asked
    assert 0.01 < (abs(pixels - back) > 60).mean() < 0.6  # something is written on it
    assert (abs(pixels[:, -3:] - pixels[0, -1]) < 8).all()  # nothing runs over the right edge


@pytest.mark.skipif(BROWSER is None, reason="no browser of Chrome's family is installed (apt-get install chromium)")
def test_twin_what_is_loaded_from_elsewhere_is_an_error(page, tmp_path):
    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text().replace("<main>", '<main><img src="https://example.org/a.png" alt="">'))
    more = [*MORE, f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={tmp_path / 'shot.png'}"]
    done = subprocess.run([BROWSER, *more, broken.as_uri()], capture_output=True, text=True, timeout=120)
    assert re.findall(r".*CONSOLE.*Content Security Policy", done.stderr)


def test_options_that_differ():
    assert differing({"a": {"lr": 1, "x": 0}, "b": {"lr": 2, "x": 0, "new": []}}) == {"lr": [1, 2], "new": [None, []]}


def test_runs_of_the_same_options_say_so():
    text = page_of_several({"a": {"score": "1"}, "b": {"loss": "2"}}, {"a": {}, "b": {}}, {"a": [], "b": []}).decode()
    assert "None: all options are the same." in text and text.count("·") == 2
