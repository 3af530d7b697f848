"""Sequential fine-tuning: each task is learned as if there were no others."""

from __future__ import annotations

from typing import Any

from .registry import Method, continual_method


@continual_method("sequential", paper="the baseline that forgets")
class Sequential(Method):
    """One adapter, learned task after task without any protection."""

    def state(self) -> dict[str, Any]:
        return {}
