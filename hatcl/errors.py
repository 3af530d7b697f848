"""Every error hatcl raises on purpose. All derive from `HATError`; each message names the module path, what came,
what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HATError(Exception):
    """Base class of hatcl's errors."""


class ConfigError(HATError, ValueError):
    """An option that does not exist or a value outside its range."""


class ConversionError(HATError, RuntimeError):
    """A model that cannot be converted; the model is as it was."""


class TaskError(HATError, ValueError):
    """A task index that does not exist, is not sealed yet, or is sealed already."""


class CapacityError(HATError, RuntimeError):
    """No free units are left for another task."""


class GuardError(HATError, RuntimeError):
    """An optimizer that cannot be guarded, or that belongs to another model."""


class IsolationError(HATError, RuntimeError):
    """A sealed task's outputs depend on something that is not its own."""


class IntegrityError(HATError, RuntimeError):
    """What was sealed is not what is there: a frozen parameter, a file or a checkpoint changed."""


class NonFiniteLossError(HATError, RuntimeError):
    """A task was about to be sealed with weights or gates that are not finite."""


class VectorError(HATError, ValueError):
    """Task vectors, checkpoints or coefficients that do not fit each other."""


class SkillError(HATError, ValueError):
    """Adapters, scores or skills that do not fit each other or the model."""


class GraftError(HATError, ValueError):
    """Grafts, masks or models that do not fit each other."""


def nearest(name: object, choices: Iterable[str]) -> str:
    """Which of the choices a name that is none of them may have meant, for an error to ask."""
    return difflib.get_close_matches(str(name), list(choices), n=1, cutoff=0.0)[0]
