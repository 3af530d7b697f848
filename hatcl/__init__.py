"""hatcl: models that learn task after task. What an earlier task learned stays, bit for bit."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Certificate": "certify", "ConversionError": "errors", "Description": "describe", "ForgetReport": "forget",
    "HATConfig": "config", "HATError": "errors", "IntegrityError": "errors", "IsolationError": "errors",
    "Learning": "training.learn", "UnitMap": "map.units", "add_tasks": "training.learn", "certify": "certify",
    "convert": "convert", "describe": "describe", "forget_task": "forget", "from_pretrained": "pretrained",
    "learn": "training.learn", "list_models": "integrations.timm_names", "register": "registry",
    "save_pretrained": "pretrained", "set_task": "gates", "task": "gates", "task_parameters": "training.learn",
    "tasks": "gates",
}  # fmt: skip
_LAYERS = (
    "HATConv1d", "HATConv2d", "HATConv3d", "HATConvTranspose1d", "HATConvTranspose2d", "HATConvTranspose3d",
    "HATEmbedding", "HATLinear", "TaskIndexedBatchNorm1d", "TaskIndexedBatchNorm2d", "TaskIndexedBatchNorm3d",
    "TaskIndexedGroupNorm", "TaskIndexedInstanceNorm1d", "TaskIndexedInstanceNorm2d", "TaskIndexedInstanceNorm3d",
    "TaskIndexedLayerNorm", "TaskIndexedLinear", "TaskIndexedParameter", "TaskIndexedRMSNorm",
)  # fmt: skip
_HOME |= dict.fromkeys(_LAYERS, "layers")
__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from .certify import Certificate, certify
    from .config import HATConfig
    from .convert import convert
    from .describe import Description, describe
    from .errors import ConversionError, HATError, IntegrityError, IsolationError
    from .forget import ForgetReport, forget_task
    from .gates import set_task, task, tasks
    from .integrations.timm_names import list_models
    from .layers import *  # noqa: F403
    from .map.units import UnitMap
    from .pretrained import from_pretrained, save_pretrained
    from .registry import register
    from .training.learn import Learning, add_tasks, learn, task_parameters


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hatcl' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value  # also over a submodule of the same name (hatcl.certify is the function)
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
