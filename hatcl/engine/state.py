"""The parts of a loop's state: random generators, the modes of modules, tensors, and the checkpoint that holds it."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import HATError, IntegrityError
from ..files import complete, read_torch, replaced_folder, write_files
from .folder import CONFIG, write_json

LOOP_FORMAT = "hatcl.loop"
STATE_FILE = "state.pt"

# --- random generators ---


def seed_all(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators."""
    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    torch.manual_seed(seed)


def random_state(device: torch.device, own: Sequence[torch.Generator] = ()) -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's global generators and of further ones, as values that `weights_only`
    loading accepts."""
    version, words, position = random.getstate()
    state = np.random.get_state(legacy=False)
    out: dict[str, Any] = {
        "python": [version, list(words), position],
        "numpy": [state["state"]["key"].tolist(), state["state"]["pos"], state["has_gauss"], state["gauss"]],
        "torch": torch.get_rng_state(),
        "own": [g.get_state() for g in own],
    }
    if device.type == "cuda":
        out["cuda"] = torch.cuda.get_rng_state(device)
    return out


def set_random_state(state: Mapping[str, Any], device: torch.device, own: Sequence[torch.Generator] = ()) -> None:
    """Restore the states that `random_state` returned."""
    version, words, position = state["python"]
    random.setstate((version, tuple(words), position))
    key, pos, has_gauss, gauss = state["numpy"]
    np.random.set_state(("MT19937", np.asarray(key, dtype=np.uint32), pos, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    for generator, kept in zip(own, state["own"], strict=True):
        generator.set_state(kept)


def generators_of(batches: Any) -> list[torch.Generator]:
    """The random generators that loaders hold, including loaders inside loaders (`batches.loaders`)."""
    found: dict[int, torch.Generator] = {}
    loaders = [batches]
    while loaders:
        loader = loaders.pop(0)
        loaders += list(getattr(loader, "loaders", []))
        inside = getattr(loader, "batch_sampler", None)
        for holder in (loader, getattr(loader, "sampler", None), inside, getattr(inside, "sampler", None)):
            generator = getattr(holder, "generator", None)
            if isinstance(generator, torch.Generator):
                found.setdefault(id(generator), generator)
    return list(found.values())


# --- modules and tensors ---


class Modes:
    """The modes of a model's modules, for a procedure that trains the model and then returns it.

    A model that arrives in evaluation mode, as from `from_pretrained`, is put into training mode as a whole. In a model
    that arrives in training mode, the modules that its owner put into evaluation mode (`net.body.eval()`) stay in it.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.root = model, model.training
        self.was = [(m, m.training) for m in model.modules()]
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # without peft's new modules
        self.frozen = [m for m, training in self.was if not training] if inner.training else []

    def train(self) -> None:
        """Put the model into training mode, except for the frozen modules."""
        self.model.train()
        for module in self.frozen:
            module.training = False

    def put_back(self) -> None:
        """Put each module back into its former mode; modules added since then get the model's own."""
        self.model.train(self.root)
        for module, training in self.was:
            module.training = training


@torch.no_grad()
def write_all(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Write values into tensors of the same names."""
    for name, t in tensors.items():
        t.copy_(values[name])


def copies_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Detached copies."""
    return {name: t.detach().clone() for name, t in tensors.items()}


@contextlib.contextmanager
def undone_on_error(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """If an exception leaves the block, restore the tensors' former values. Yields copies of these."""
    before = copies_of(tensors)
    try:
        yield before
    except BaseException:
        write_all(tensors, before)
        raise


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any], where: object) -> None:
    """Give an optimizer the moments that another one had for the same parameters. It keeps its own rates.

    Raises:
        IntegrityError: the moments do not fit.
    """
    rates = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
    with kept_whole(where):
        optimizer.load_state_dict(dict(state))
    for group, lr in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = group["initial_lr"] = lr


@contextlib.contextmanager
def kept_whole(
    where: object, needed: str = "to resume", remedy: str = "Copy it again, or remove it to start from the beginning"
) -> Iterator[None]:
    """Wraps the use of a file's content: an entry that is missing or of another kind raises `IntegrityError`.

    Args:
        needed: the purpose of the content, for the error. remedy: what to do.
    """
    try:
        yield
    except HATError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError, FileNotFoundError) as error:
        why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise IntegrityError(
            f"{where} lacks a part that is needed {needed}, or has another one in its place ({why}); it is damaged, "
            f"edited, or another version of hatcl wrote it. {remedy}"
        ) from error


# --- the checkpoint of a loop ---


class Standing:
    """The checkpoint of an unfinished loop, so that a kill costs a minute instead of the run.

    Args:
        path: a file; with `about` a folder that holds it as `state.pt`. Each write replaces it, all or nothing.
        about: returns the content of the folder's `config.json`; called at each write.
        seconds: the least time before the first write and between two. epochs: write after every epoch as well.
    """

    def __init__(
        self,
        path: Path,
        about: Callable[[], Mapping[str, Any]] | None = None,
        seconds: float = 60.0,
        *,
        epochs: bool = False,
    ) -> None:
        self.path, self.about, self.seconds, self.epochs = path, about, seconds, epochs
        self.last = time.monotonic()

    @property
    def file(self) -> Path:
        """The file of the newest state."""
        return self.path if self.about is None else complete(self.path) / STATE_FILE

    def read(self, kind: str) -> dict[str, Any] | None:
        """The state that `write` kept, or None.

        Raises:
            IntegrityError: the file is damaged, or belongs to another procedure.
        """
        if not self.file.exists():
            return None
        state = read_torch(self.file)
        if not isinstance(state, dict) or state.get("format") != LOOP_FORMAT or state.get("kind") != kind:
            raise IntegrityError(
                f"{self.file}: not a checkpoint of {kind}; give another path, or remove it to start from the beginning"
            )
        return state

    def due(self) -> bool:
        """Whether it is time for another `write`."""
        return time.monotonic() - self.last >= self.seconds

    def write(self, kind: str, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint."""
        content = {"format": LOOP_FORMAT, "kind": kind, **state}
        if self.about is None:
            write_files({self.path: lambda path: torch.save(content, path)})
        else:
            with replaced_folder(self.path) as new:
                torch.save(content, new / STATE_FILE)
                write_json(new / CONFIG, self.about())
        self.last = time.monotonic()


def length_of(batches: Iterable[Any]) -> int | None:
    """The number of batches, or None if they have no length."""
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:  # a generator, or a DataLoader over an iterable data set
        return None
