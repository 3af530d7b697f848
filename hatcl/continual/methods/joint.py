"""Joint training: all tasks at once."""

from __future__ import annotations

from typing import Any

from .registry import Method, continual_method


@continual_method("joint", paper="the upper bound that needs all data at once")
class Joint(Method):
    """One stage over all tasks. Each batch holds examples of one task; the batches of all tasks are shuffled together,
    so that each task gets as many steps as when learned alone. There is no accuracy after each task, so FWT and BWT are
    undefined."""

    def stages(self, count: int) -> list[list[int]]:
        return [list(range(count))]

    def state(self) -> dict[str, Any]:
        return {}
