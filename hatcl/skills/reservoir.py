"""A memory of fixed size that is always a uniform sample of all examples ever offered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..config import whole
from ..errors import ConfigError, SkillError


class Reservoir:
    """Reservoir sampling (Vitter 1985, algorithm R) over a stream that may span tasks: the first `size` examples are
    kept; the i-th of the stream, i > `size`, replaces a random one with probability `size / i`. So each example offered
    so far is kept with the same probability, and task boundaries need not be known.

    It has its own two random generators, one for keeping and one for drawing: the kept examples depend only on the
    stream and the seed, and torch's global generator is not used.

    Args:
        size: the largest number of kept examples. seed: seeds both generators.

    Raises:
        ConfigError: the size is below 1.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        whole("size", size)
        self.size, self.seen = size, 0
        self._examples: list[Any] = []
        self._keep = torch.Generator().manual_seed(2 * seed)
        self._draw = torch.Generator().manual_seed(2 * seed + 1)

    def __len__(self) -> int:
        return len(self._examples)

    @property
    def examples(self) -> list[Any]:
        """The kept examples, in the order of their places."""
        return list(self._examples)

    def add(self, example: Any) -> None:
        """Offer one example of any kind (saving needs tensors and plain values)."""
        self.seen += 1
        if len(self._examples) < self.size:
            self._examples.append(example)
            return
        place = int(torch.randint(self.seen, (), generator=self._keep))
        if place < self.size:
            self._examples[place] = example

    def sample(self, n: int) -> list[Any]:
        """`n` different examples in random order, or all of them if there are fewer.

        Raises:
            SkillError: the memory is empty. ConfigError: `n` is below 1.
        """
        if n < 1:
            raise ConfigError(f"n: got {n!r}, expected at least 1")
        if not self._examples:
            raise SkillError(
                f"the memory is empty (0 of {self.size} examples); add examples of a learned task, or load the "
                "memory of the previous run"
            )
        order = torch.randperm(len(self._examples), generator=self._draw)[:n]
        return [self._examples[i] for i in order.tolist()]

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs; `torch.load(weights_only=True)` can read it if it can read the
        examples."""
        return {
            "size": self.size,
            "seen": self.seen,
            "examples": list(self._examples),
            "keep": self._keep.get_state(),
            "draw": self._draw.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of `state_dict`.

        Raises:
            SkillError: the state belongs to a memory of another size or to something else; this memory is then as it
                was.
        """
        lacking = next((key for key in ("size", "seen", "examples", "keep", "draw") if key not in state), None)
        if lacking is not None:
            raise SkillError(f"the state lacks {lacking!r}, expected the result of Reservoir.state_dict()")
        if state["size"] != self.size:
            raise SkillError(
                f"the state belongs to a memory of {state['size']} examples, this one has {self.size}; make it with "
                "that size (with another, it would no longer be a uniform sample)"
            )
        self._keep.set_state(state["keep"])
        self._draw.set_state(state["draw"])
        self.seen, self._examples = int(state["seen"]), list(state["examples"])
