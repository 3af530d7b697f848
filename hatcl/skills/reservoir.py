"""A memory of fixed size that is, at every moment, a uniform sample of all it was ever offered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..config import whole
from ..errors import ConfigError, SkillError


class Reservoir:
    """Reservoir sampling (Vitter 1985, algorithm R) over a stream that may go on across tasks: the first `size`
    examples are kept; the i-th of the stream, i > `size`, takes a random one's place with probability `size / i`. So
    each example offered so far is kept with the same probability, and nobody needs to know where one task ends.

    It has two random generators of its own, one for what is kept and one for what is drawn: what is kept depends on the
    stream and the seed alone, and torch's global generator is left alone.

    Args:
        size: how many examples are kept at most. seed: of both generators.

    Raises:
        ConfigError: a size below 1.
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
        """What is kept, in the order of its places."""
        return list(self._examples)

    def add(self, example: Any) -> None:
        """Offer one example, of any kind (to be saved: of tensors and plain values)."""
        self.seen += 1
        if len(self._examples) < self.size:
            self._examples.append(example)
            return
        place = int(torch.randint(self.seen, (), generator=self._keep))
        if place < self.size:
            self._examples[place] = example

    def sample(self, n: int) -> list[Any]:
        """`n` different examples in random order; all of them where there are fewer.

        Raises:
            SkillError: the memory is empty. ConfigError: an `n` below 1.
        """
        if n < 1:
            raise ConfigError(f"n: got {n!r}, expected at least 1")
        if not self._examples:
            raise SkillError(
                f"the memory is empty (0 of {self.size} examples); add examples of a task that was learned, or load "
                "the memory of the run before"
            )
        order = torch.randperm(len(self._examples), generator=self._draw)[:n]
        return [self._examples[i] for i in order.tolist()]

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs; `torch.load(weights_only=True)` reads it back if it reads the examples."""
        return {
            "size": self.size,
            "seen": self.seen,
            "examples": list(self._examples),
            "keep": self._keep.get_state(),
            "draw": self._draw.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken.

        Raises:
            SkillError: a memory of another size, or something else; this one is then as it was.
        """
        lacking = next((key for key in ("size", "seen", "examples", "keep", "draw") if key not in state), None)
        if lacking is not None:
            raise SkillError(f"the state lacks {lacking!r}, expected what Reservoir.state_dict() gave")
        if state["size"] != self.size:
            raise SkillError(
                f"the state is of a memory of {state['size']} examples, this one is of {self.size}; make it with that "
                "size (another one would not be a uniform sample any more)"
            )
        self._keep.set_state(state["keep"])
        self._draw.set_state(state["draw"])
        self.seen, self._examples = int(state["seen"]), list(state["examples"])
