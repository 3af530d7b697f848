"""The options of I-LoRA: ranges, and what has no effect. That each has its own effect test_ilora.py shows."""

from __future__ import annotations

import dataclasses

import pytest
from torch import nn

from hatcl.errors import ConfigError
from hatcl.skills import ILoRA, ILoRAConfig


def test_options_are_json_and_come_back():
    config = ILoRAConfig(use_ilora=True, ema_alpha=0.9, hidden_state_layers=[0, -1], current_task_id=3)
    assert config.hidden_state_layers == (0, -1) and config.current_task_id == "3"
    assert ILoRAConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "options, text",
    [
        ({"ema_alpha": 1.1}, "ema_alpha: got 1.1, expected a number between 0 and 1"),
        ({"ema_alpha": float("nan")}, "ema_alpha: got nan"),
        ({"consistency_weight": -1}, "consistency_weight: got -1, expected a number of at least 0"),
        ({"ilora_buffer_size": 0}, "ilora_buffer_size: got 0, expected an integer of at least 1"),
        ({"min_update_threshold": float("inf")}, "min_update_threshold: got inf, expected a finite number"),
        ({"hidden_state_layers": []}, r"hidden_state_layers: got \[\], expected a list of layers, such as \[-1\]"),
        ({"hidden_state_layers": -1}, "hidden_state_layers: got -1, expected a list of layers"),
        ({"hidden_state_layers": [0.5]}, r"hidden_state_layers: got \[0.5\], expected integers"),
        ({"use_ilora": 1}, "use_ilora: got 1, expected True or False"),
        ({"ema_alpha": "0.9"}, "ema_alpha: got '0.9', expected a number between 0 and 1"),
        ({"ema_alpha": None}, "ema_alpha: got None, expected a number between 0 and 1"),
        ({"ema_adapter_path": 3}, "ema_adapter_path: got 3, expected a folder"),
        ({"current_task_id": "a/b"}, "current_task_id: got 'a/b', expected a valid name of a folder"),
        ({"prev_task_id": ".."}, "prev_task_id: got '..', expected a valid name"),
        ({"ema_adapter_path": "adapter/x"}, "ema_adapter_path: got 'adapter/x', which is used for something else"),
        ({"ema_adapter_path": "."}, "ema_adapter_path: got '.', which is used for something else"),
        ({"ema_alhpa": 0.5}, "ILoRAConfig has no option 'ema_alhpa'; did you mean 'ema_alpha'"),
    ],
)  # fmt: skip
def test_options_outside_their_range(options, text):
    with pytest.raises(ConfigError, match=text):
        ILoRAConfig.from_dict(options)


CHANGED = {
    "ema_alpha": 0.9, "consistency_weight": 2.0, "ilora_buffer_size": 9, "selective_update": True,
    "min_update_threshold": 0.2, "hidden_state_layers": [0], "save_ema_adapter": False, "ema_adapter_path": "stable",
    "previous_task_model": "runs", "current_task_id": "b", "prev_task_id": "a",
}  # fmt: skip


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(ILoRAConfig) if f.name != "use_ilora"])
def test_an_option_of_what_is_off_is_refused(name):
    with pytest.raises(ConfigError) as caught:
        ILoRA(nn.Linear(1, 1), {"use_ilora": False, name: CHANGED[name]})
    value = (0,) if name == "hidden_state_layers" else CHANGED[name]
    assert f"{name}: got {value!r}, which has no effect with use_ilora=False; set use_ilora to True" in str(
        caught.value
    )


@pytest.mark.parametrize(
    "options, text",
    [
        ({"min_update_threshold": 0.2}, "min_update_threshold: got 0.2, which has no effect with selective_update=F"),
        (
            {"hidden_state_layers": [0], "consistency_weight": 0.0},
            r"hidden_state_layers: got \(0,\), which has no effect with consistency_weight=0; give the term a weight",
        ),
        (
            {"ema_adapter_path": "x", "save_ema_adapter": False},
            "ema_adapter_path: got 'x', which has no effect with save_ema_adapter=False; save the adapter",
        ),
    ],
)
def test_an_option_without_effect_is_refused(options, text):
    with pytest.raises(ConfigError, match=text):
        ILoRAConfig(use_ilora=True, **options)
