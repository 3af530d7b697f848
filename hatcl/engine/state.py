"""Where an unfinished fine-tuning stands, in a folder, so that a kill costs a minute and not the run."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import IntegrityError
from ..files import complete, read_torch, replaced_folder
from ..functional import digest_of
from .folder import CONFIG, write_json

STATE = "state.pt"


class Standing:
    """
    Args:
        folder: replaced at every write, all or nothing: `config.json` with `about`, and `state.pt`.
        about: tells what the fine-tuning is of, JSON-able; asked when there is something to write.
        seconds: the least time between two writes, and before the first.
    """

    def __init__(self, folder: Path, about: Callable[[], Mapping[str, Any]], seconds: float = 60.0) -> None:
        self.folder, self.about, self.seconds = folder, about, seconds
        self.last = time.monotonic()
        self.start: Mapping[str, Tensor] = {}

    @functools.cached_property
    def _began(self) -> dict[str, str]:
        """Digests of the start; most runs are over before they are asked for."""
        return {name: digest_of(t) for name, t in self.start.items()}

    def read(self, start: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """What `write` kept, or None; sets torch's generators as they were then.

        Args:
            start: a copy of the tensors that are trained, as they are before the first step.

        Raises:
            IntegrityError: a damaged file, or a start with other bits.
        """
        self.start = start
        path = complete(self.folder) / STATE
        if not path.exists():
            return None
        state: dict[str, Any] = read_torch(path)
        ours, theirs = self._began, state["began"]
        wrong = next((n for n in {**ours, **theirs} if ours.get(n) != theirs.get(n)), None)
        if wrong is not None:
            raise IntegrityError(
                f"{path}: {wrong} had other values when this fine-tuning began; give the model that it began with, or "
                f"remove {self.folder} to begin anew"
            )
        torch.set_rng_state(state["random"])
        if "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"])
        return state

    def due(self) -> bool:
        """Is it time for another `write`?"""
        return time.monotonic() - self.last >= self.seconds

    def write(self, **state: Any) -> None:
        """Keep this, with the states of torch's generators."""
        state |= {"began": self._began, "random": torch.get_rng_state()}
        if torch.cuda.is_initialized():
            state["cuda"] = torch.cuda.get_rng_state()
        with replaced_folder(self.folder) as new:
            torch.save(state, new / STATE)
            write_json(new / CONFIG, self.about())
        self.last = time.monotonic()
