from __future__ import annotations

import builtins
import io

import numpy as np
import pytest
from PIL import Image

from hatcl.errors import ConfigError
from hatcl.report import picture
from hatcl.report.picture import draw_run, short


def run_of(count: int, layers: int = 4) -> dict:
    return {
        "tasks": [f"a task with a rather long name {t}" for t in range(count)],
        "facts": [{"units_used": 10 + t, "units": 16 * layers or 40} for t in range(count)],
        "matrix": [[0.5 + 0.5 / (1 + i + j) if j <= i else None for j in range(count)] for i in range(count)],
        "details": {
            "layers": [
                {"name": f"layer{n}", "units": 16, "used": {str(t): (3 * t + n) % 17 for t in range(count)}}
                for n in range(layers)
            ],
            "bit_equal": True,
        },
        "average_accuracy": 0.9,
        "forgetting": 0.0,
    }


@pytest.mark.parametrize(("count", "layers"), [(1, 1), (5, 20), (12, 120), (2, 0)])
def test_a_picture_of_any_run(count, layers):
    pytest.importorskip("matplotlib")
    image = Image.open(io.BytesIO(draw_run(run_of(count, layers))))
    image.load()
    assert image.format == "PNG" and min(image.size) > 400
    pixels = np.asarray(image.convert("L"))
    assert 0.005 < (pixels < 200).mean() < 0.9  # something is drawn, and not everything
    assert (pixels[:2] > 250).all() and (pixels[:, -2:] > 250).all()  # nothing runs over the edge


def test_the_tasks_have_their_own_numbers():
    pytest.importorskip("matplotlib")
    assert draw_run(run_of(3)) == draw_run(run_of(3), [0, 1, 2]) != draw_run(run_of(3), [0, 2, 3])


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def refuse(name, *rest, **options):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match=r"pip install 'hatcl\[plots\]'"):
        draw_run(run_of(2))


def test_names_are_cut_in_the_middle():
    assert short("CIFAR100 classes 0-9") == "CIFAR100…ses 0-9" and len(short("CIFAR100 classes 0-9")) == 16
    names = [f"CIFAR100 classes {k}-{k + 9}" for k in range(0, 100, 10)]
    assert len({short(name) for name in names}) == 10 and short("a" * 16) == "a" * 16
    assert short("abcdefgh", 5) == "ab…gh"


def test_panels_have_names_of_tasks_and_layers_and_a_colour_bar(monkeypatch):
    pytest.importorskip("matplotlib")
    figures = []
    monkeypatch.setattr(picture, "png", lambda figure: figures.append(figure) or b"")
    draw_run(run_of(3, 60), [0, 2, 3])
    axes = figures[0].axes
    labels = [[t.get_text() for t in a.get_yticklabels()] for a in axes]
    assert labels.count(["0  a task w… name 0", "2  a task w… name 1", "3  a task w… name 2"]) == 3
    layers = [t.get_text() for a in axes for t in a.get_xticklabels() if t.get_text().startswith("layer")]
    assert layers == [f"layer{k}" for k in range(0, 60, 2)] and len(axes) == 5  # with two colour bars


def test_names_are_drawn_letter_by_letter():
    pytest.importorskip("matplotlib")
    run = run_of(2)
    drawn = []
    for name in ("a$x_2$b", "a$\\foo$b"):  # a formula, and one that cannot be read
        run["tasks"][0] = run["details"]["layers"][0]["name"] = name
        drawn.append(draw_run(run))
    assert drawn[0] != drawn[1]


def test_twin_names_as_formulas(monkeypatch):
    text = pytest.importorskip("matplotlib.text")
    run = run_of(2)
    run["tasks"][0] = "a$\\foo$b"
    monkeypatch.setattr(text.Text, "set_parse_math", lambda self, _: setattr(self, "_parse_math", True))
    with pytest.raises(ValueError, match="Unknown symbol"):
        draw_run(run)
