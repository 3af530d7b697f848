"""Every error that hatcl raises on purpose. All derive from `HATError`; each message names the module path, the value
received, the value expected, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HATError(Exception):
    """Base class of hatcl's errors."""


class ConfigError(HATError, ValueError):
    """An option does not exist, or a value is outside its range."""


class ConversionError(HATError, RuntimeError):
    """A model cannot be converted; the model is as it was."""


class TaskError(HATError, ValueError):
    """A task does not exist, is not sealed yet, or is sealed already."""


class CapacityError(HATError, RuntimeError):
    """No free units are left for another task."""


class GuardError(HATError, RuntimeError):
    """An optimizer cannot be guarded, or belongs to another model."""


class IsolationError(HATError, RuntimeError):
    """A sealed task's outputs depend on something that does not belong to it."""


class IntegrityError(HATError, RuntimeError):
    """Something that was sealed or stored has changed: a frozen parameter, a file or a checkpoint."""


class NonFiniteLossError(HATError, RuntimeError):
    """A task was about to be sealed with weights or gates that are not finite."""


class VectorError(HATError, ValueError):
    """Task vectors, checkpoints or coefficients do not fit each other."""


class SkillError(HATError, ValueError):
    """Adapters, scores or skills do not fit each other or the model."""


class GraftError(HATError, ValueError):
    """Grafts, masks or models do not fit each other."""


def nearest(name: object, choices: Iterable[str]) -> str:
    """The choice that is nearest to an unknown name, for an error to suggest."""
    return difflib.get_close_matches(str(name), list(choices), n=1, cutoff=0.0)[0]
