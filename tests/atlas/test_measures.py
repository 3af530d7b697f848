"""Shares of the fine-tuned accuracy, and the sweep over scales."""

from __future__ import annotations

import atlas_parts as parts
import pytest
import torch

from hatcl import ConfigError
from hatcl.atlas import normalised, sweep


def test_normalised_accuracy():
    assert normalised(0.45, 0.9) == 0.5
    with pytest.raises(ConfigError, match="finetuned: got 0.0"):
        normalised(0.5, 0.0)


def test_sweep_sets_one_vector_at_a_time_and_puts_the_coefficients_back():
    _, _, composer = parts.tiny()
    with torch.no_grad():
        composer.coefficients.fill_(0.25)
    seen = []

    def measure():
        seen.append(composer.coefficients.detach().clone())
        return float(composer.coefficients.sum())

    out = sweep(composer, [0.0, 2.0], measure)
    assert out.tolist() == [[0, 8], [0, 8]]  # 4 blocks at 2
    assert seen[1].tolist() == [[2] * 4, [0] * 4] and bool((composer.coefficients == 0.25).all())
