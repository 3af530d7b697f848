"""Joint training: all tasks at once."""

from __future__ import annotations

from typing import Any

from .registry import Method, continual_method


@continual_method("joint", paper="the upper bound that needs all data at once")
class Joint(Method):
    """One stage over all tasks. Each batch has one task; the batches of all tasks are shuffled together, so that each
    task gets the same number of steps as alone. There is no accuracy after each task: FWT and BWT are not defined."""

    def stages(self, count: int) -> list[list[int]]:
        return [list(range(count))]

    def state(self) -> dict[str, Any]:
        return {}
