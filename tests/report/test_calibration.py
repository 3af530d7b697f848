from __future__ import annotations

import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from hatcl.engine.measures import calibration
from hatcl.errors import ConfigError
from hatcl.report.calibration import draw_graft_curve, draw_reliability

RED, BLUE = 0, 2


def opened(png: bytes) -> np.ndarray:
    """Pixels; nothing runs over the edge, and something is drawn."""
    image = Image.open(io.BytesIO(png))
    image.load()
    assert image.format == "PNG" and min(image.size) > 200
    pixels = np.asarray(image.convert("RGB")).astype(int)
    assert (pixels[:2] > 250).all() and (pixels[-2:] > 250).all()
    assert (pixels[:, :2] > 250).all() and (pixels[:, -2:] > 250).all()
    assert 0.005 < (pixels.min(-1) < 200).mean() < 0.9
    return pixels


def orange(pixels: np.ndarray) -> int:
    return int((pixels[..., RED] > pixels[..., BLUE] + 40).sum())


def measured(shift: float, seed: int = 0, count: int = 600):
    """Of a model that says `shift` more than it should."""
    g = torch.Generator().manual_seed(seed)
    chance = torch.rand(count, generator=g, dtype=torch.float64) * 0.5 + 0.3
    return calibration(chance + shift, torch.rand(count, generator=g) < chance)


def test_the_gap_is_what_is_drawn_in_orange():
    pytest.importorskip("matplotlib")
    small, large = (orange(opened(draw_reliability({"a": measured(shift)}))) for shift in (0.0, 0.2))
    assert large > 3 * small


@pytest.mark.parametrize("count", [1, 3, 9])
def test_any_number_of_models(count):
    pytest.importorskip("matplotlib")
    opened(draw_reliability({f"a graft of a long name {i}": measured(0.1, i) for i in range(count)}))


def test_bins_that_are_all_empty_but_one():
    pytest.importorskip("matplotlib")
    opened(draw_reliability({"sure": calibration(torch.ones(4), torch.tensor([True, True, False, True]))}))


def test_curve_with_and_without_seeds():
    pytest.importorskip("matplotlib")
    rows = [
        {"by": by, "sparsity": s, "accuracy": 0.7 + 0.02 * i + 0.01 * seed}
        for by in ("learned", "magnitude", "random")
        for i, s in enumerate((1e-4, 1e-3, 1e-2, 1e-1))
        for seed in range(3)
    ]
    several = opened(draw_graft_curve(rows, pretrained=0.6, finetuned=0.9))
    one = opened(draw_graft_curve(rows[:1], pretrained=0.6, finetuned=0.9))
    assert several.shape[0] == one.shape[0]
    other = opened(draw_graft_curve(rows[::3], pretrained=0.6, finetuned=0.9))
    assert (several != other).any()  # the band
    opened(
        draw_graft_curve([{"by": "random", "sparsity": 0.1, "F1": 0.5}], pretrained=0.5, finetuned=0.5, measure="F1")
    )


@pytest.mark.parametrize(
    ("draw", "text"),
    [
        (lambda: draw_reliability({}), "calibrations: got none"),
        (lambda: draw_graft_curve([], pretrained=0, finetuned=1), "rows: got none"),
        (
            lambda: draw_graft_curve([{"by": "random", "sparsity": 0.1}], pretrained=0, finetuned=1),
            "none of 'accuracy'",
        ),
        (
            lambda: draw_graft_curve([{"by": "a", "sparsity": 0, "accuracy": 1.0}], pretrained=0, finetuned=1),
            "sparsity 0 in .* expected by, a sparsity above 0 and accuracy",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused(draw, text):
    with pytest.raises(ConfigError, match=text):
        draw()


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    for name in [n for n in sys.modules if n.startswith("matplotlib")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    row = {"by": "a", "sparsity": 0.1, "accuracy": 1.0}
    for draw in (
        lambda: draw_reliability({"a": measured(0.0)}),
        lambda: draw_graft_curve([row], pretrained=0, finetuned=1),
    ):
        with pytest.raises(ConfigError, match=r"pip install 'hatcl\[plots\]'"):
            draw()
