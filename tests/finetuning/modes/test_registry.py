"""Modes by name."""

from __future__ import annotations

import pytest

from hatcl.errors import ConfigError
from hatcl.finetuning import TaskOptions, finetune_mode, list_finetune_modes, mode_of
from hatcl.finetuning.modes.registry import OF_MODES, mode_for


def test_modes_by_name():
    assert list(list_finetune_modes()) == ["autoregressive", "finetune", "image", "labels", "prompt"]
    assert mode_of("prompt").loads == "AutoModelForMaskedLM" and not mode_of("image").texts
    with pytest.raises(ConfigError, match="mode: got 'promt'.*did you mean 'prompt'"):
        mode_of("promt")
    with pytest.raises(ConfigError, match="finetune_mode: 'prompt' is taken by hatcl.finetuning.modes.prompt"):
        finetune_mode("prompt", loads="AutoModel", paper="")(lambda *a: None)


OTHER = {
    "words": {"a": "b"}, "template": "{text} {mask}", "token": "last", "head": "fitted", "scale": 3.0, "plain": True,
    "max_length": 9, "cut": "head", "file_seed": 1, "weights": "w.safetensors", "model_kwargs": {"img_size": 32},
    "size": 8, "fit": "pad", "normalise": "model",
}  # fmt: skip


@pytest.mark.parametrize("mode", list_finetune_modes())
@pytest.mark.parametrize("name", OF_MODES)
def test_an_option_of_another_mode_is_refused(mode, name):
    options = TaskOptions(mode=mode, model="m", data="d", **{name: OTHER[name]})
    if name in mode_of(mode).reads:
        assert mode_for(options) is mode_of(mode)
    else:
        with pytest.raises(ConfigError, match=f"{name}: got .*, which has no effect with mode '{mode}'; use mode '"):
            mode_for(options)
