"""Writers that receive a run's figures while it learns, in addition to metrics.jsonl: one function for each.

    tensorboard    event files in the run's folder, tensorboard/
    wandb          a run of the project `hatcl`; WANDB_PROJECT, WANDB_MODE and the others are read by wandb itself
    mlflow         a run of MLflow's active experiment; MLFLOW_TRACKING_URI and the others are read by MLflow itself

A writer is made when there is something to write, and closed when the command ends. A resumed run continues the same
run of wandb or mlflow, whose name the folder keeps in `logs.json`.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..config import one_of
from ..errors import ConfigError
from ..files import read_json

STORED = "logs.json"
PROJECT = "hatcl"


class Log(Protocol):
    """One writer of figures."""

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Write the figures of one step."""

    def close(self) -> None:
        """Close the writer after its last figure."""


class _Tensorboard:
    def __init__(self, run: Path, config: Mapping[str, Any], known: str | None, start: int) -> None:
        board = _imported("torch.utils.tensorboard", "tensorboard")
        # entries that an interrupted run wrote after its checkpoint are dropped
        self.board = board.SummaryWriter(str(run / "tensorboard"), purge_step=start)
        self.id = ""

    def add(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def close(self) -> None:
        self.board.close()


class _Wandb:
    def __init__(self, run: Path, config: Mapping[str, Any], known: str | None, start: int) -> None:
        wandb = _imported("wandb", "wandb")
        more = {} if known is None else {"id": known, "resume": "allow"}
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=run.name, dir=str(run), config=dict(config), **more
        )
        self.id = str(self.run.id)

    def add(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


class _Mlflow:
    def __init__(self, run: Path, config: Mapping[str, Any], known: str | None, start: int) -> None:
        self.mlflow = _imported("mlflow", "mlflow")
        if known is None:
            self.id = str(self.mlflow.start_run(run_name=run.name).info.run_id)
            self.mlflow.log_params({name: str(value)[:500] for name, value in config.items()})  # MLflow's limit
        else:
            self.id = str(self.mlflow.start_run(run_id=known).info.run_id)

    def add(self, values: Mapping[str, float], step: int) -> None:
        self.mlflow.log_metrics({_as_mlflow_names(name): value for name, value in values.items()}, step=step)

    def close(self) -> None:
        self.mlflow.end_run()


LOGS: dict[str, Callable[[Path, Mapping[str, Any], str | None, int], Any]] = {
    "tensorboard": _Tensorboard,
    "wandb": _Wandb,
    "mlflow": _Mlflow,
}


def check_logs(names: Sequence[str]) -> None:
    """Check that the writers exist and that their packages are installed.

    Raises:
        ConfigError: a writer is unknown, named twice, or its package is missing.
    """
    for i, name in enumerate(names):
        one_of("--log", name, list(LOGS))
        if name in names[:i]:
            raise ConfigError(f"--log: got {name} twice, expected each once")
        _imported(name, name)  # each writer has the name of its package


class Logs:
    """Several writers as one. Values that are not finite are left out, since not every writer accepts them.

    Args:
        names: keys of `LOGS`. run: the run's folder. config: its options. start: the number of the next step.
    """

    def __init__(self, names: Sequence[str], run: Path, config: Mapping[str, Any], start: int) -> None:
        stored = run / STORED
        self.ids: dict[str, str] = read_json(stored) if stored.exists() else {}
        self.every: list[Log] = []
        try:
            for name in names:
                made = LOGS[name](run, config, self.ids.get(name), start)
                self.every.append(made)
                if made.id:
                    self.ids[name] = made.id
        except BaseException:
            self.close()
            raise

    def add(self, values: Mapping[str, Any], step: int) -> None:
        """Write the figures of one step; values that are not numbers are left out."""
        told = {
            name: float(value)
            for name, value in values.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        }
        for writer in self.every:
            writer.add(told, step)

    def close(self) -> None:
        """Close all writers, even if one of them fails to close."""
        with contextlib.ExitStack() as stack:
            for writer in self.every:
                stack.callback(writer.close)
        self.every = []


def _as_mlflow_names(name: str) -> str:
    """A name that MLflow accepts: letters, digits and a few signs, without empty parts and `..`, not too long."""
    parts = re.sub(r"[^\w.\- :/]", "_", name).split("/")
    return "/".join(part if part.strip(".") else "_" for part in parts)[:250]


def _imported(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"--log: {package} is not installed; run: pip install {package}") from error
