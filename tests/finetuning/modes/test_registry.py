"""Modes by name."""

from __future__ import annotations

import pytest

from hatcl.errors import ConfigError
from hatcl.finetuning import finetune_mode, list_finetune_modes, mode_of


def test_modes_by_name():
    assert list(list_finetune_modes()) == ["autoregressive", "finetune", "image", "labels", "prompt"]
    assert mode_of("prompt").loads == "AutoModelForMaskedLM" and not mode_of("image").texts
    with pytest.raises(ConfigError, match="mode: got 'promt'.*did you mean 'prompt'"):
        mode_of("promt")
    with pytest.raises(ConfigError, match="finetune_mode: 'prompt' is taken by hatcl.finetuning.modes.prompt"):
        finetune_mode("prompt", loads="AutoModel", paper="")(lambda *a: None)
