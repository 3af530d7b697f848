"""The options of I-LoRA, and the names of its folders and files."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import flag, known_options, number, whole, without_effect
from ..errors import ConfigError

ADAPTER_FOLDER, STABLE_FOLDER, MEMORY_FILE, ABOUT_FILE = "adapter", "ema_adapter", "memory.pt", "ilora.json"


@dataclass(frozen=True)
class ILoRAConfig:
    """The options of I-LoRA.

    Args:
        use_ilora: False = I-LoRA does nothing: no second adapter, no loss, no file; no other option may be given.
        ema_alpha: alpha of `stable = alpha * stable + (1 - alpha) * plastic`, 0 to 1. 1 = the stable adapter never
        moves.
        consistency_weight: weight of the consistency term in the loss; 0 = no term, and no cost.
        ilora_buffer_size: the number of examples that the memory keeps of all tasks.
        selective_update: move the stable adapter only after steps that leave the plastic one better on a batch of the
        memory.
        min_update_threshold: for `selective_update`, the least amount by which its loss there must be lower.
        hidden_state_layers: the hidden states to compare, as transformers counts them: 0 = embeddings, -1 =
            the last layer; in models with encoder and decoder, of both.
        save_ema_adapter: write the stable adapter when saving.
        ema_adapter_path: its folder; a relative one is inside the task's folder. None = `ema_adapter` in it.
        previous_task_model: the folder of the previous task; the adapters and the memory continue from there.
        current_task_id: the name of the task, and of its folder inside the one it is saved in.
        prev_task_id: the name of the previous task, and of its folder inside `previous_task_model`. Without
            `previous_task_model`, the stable adapter continues as it is in the model, or is read from
            `ema_adapter_path`.

    Raises:
        ConfigError: a value is outside its range, or has no effect with the others.
    """

    use_ilora: bool = True
    ema_alpha: float = 0.999
    consistency_weight: float = 1.0
    ilora_buffer_size: int = 500
    selective_update: bool = False
    min_update_threshold: float = 0.1
    hidden_state_layers: tuple[int, ...] = (-1,)
    save_ema_adapter: bool = True
    ema_adapter_path: str | None = None
    previous_task_model: str | None = None
    current_task_id: str | None = None
    prev_task_id: str | None = None

    def __post_init__(self) -> None:
        for name in ("use_ilora", "selective_update", "save_ema_adapter"):
            flag(name, getattr(self, name))
        number("ema_alpha", self.ema_alpha, 0, 1)
        number("consistency_weight", self.consistency_weight, 0)
        number("min_update_threshold", self.min_update_threshold)
        whole("ilora_buffer_size", self.ilora_buffer_size)
        layers = self.hidden_state_layers
        if isinstance(layers, (str, bytes)) or not isinstance(layers, Sequence) or not layers:
            raise ConfigError(f"hidden_state_layers: got {layers!r}, expected a list of layers, such as [-1]")
        if any(isinstance(i, bool) or not isinstance(i, int) for i in layers):
            raise ConfigError(f"hidden_state_layers: got {list(layers)!r}, expected integers")
        object.__setattr__(self, "hidden_state_layers", tuple(layers))
        for name in ("ema_adapter_path", "previous_task_model"):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, (str, os.PathLike)):
                raise ConfigError(f"{name}: got {value!r}, expected a folder")
            object.__setattr__(self, name, os.fspath(value))
        inside = Path(self.ema_adapter_path or STABLE_FOLDER).parts
        if not inside or inside[0] in (ADAPTER_FOLDER, MEMORY_FILE, ABOUT_FILE):
            raise ConfigError(f"ema_adapter_path: got {self.ema_adapter_path!r}, which is used for something else")
        for name in ("current_task_id", "prev_task_id"):
            value = getattr(self, name)
            if value is None:
                continue
            if not str(value) or str(value) in (".", "..") or set(str(value)) & {"/", "\\", "\0"}:
                raise ConfigError(f"{name}: got {value!r}, expected a valid name of a folder")
            object.__setattr__(self, name, str(value))
        self._check_effects()

    def _check_effects(self) -> None:
        if not self.use_ilora:
            others = [f.name for f in dataclasses.fields(self) if f.name != "use_ilora"]
            without_effect(self, others, "use_ilora=False", "set use_ilora to True")
        if not self.selective_update:
            without_effect(self, ["min_update_threshold"], "selective_update=False", "pass selective_update=True")
        if not self.consistency_weight:
            without_effect(self, ["hidden_state_layers"], "consistency_weight=0", "give the term a weight")
        if not self.save_ema_adapter and self.previous_task_model is None and self.prev_task_id is None:
            without_effect(self, ["ema_adapter_path"], "save_ema_adapter=False", "save the adapter")

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> ILoRAConfig:
        """A config from JSON-like options. Raises `ConfigError` for an unknown key, with the nearest one."""
        known_options(cls, options)
        return cls(**options)

    def to_dict(self) -> dict[str, Any]:
        """The options as JSON-able values; `from_dict` reads them back."""
        return {**dataclasses.asdict(self), "hidden_state_layers": list(self.hidden_state_layers)}
