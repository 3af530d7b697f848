"""The folder of a run, in the same form for every command and for the functions that keep runs.

    config.json      the command, its options, digests of the files it read; `--config` reads it back
    metrics.jsonl    a line per step that the loop reports; metrics.csv the same as a table, written at the end
    checkpoint/ ...  where an interrupted run resumes; removed once it is finished
    metrics.json     the results, written last: once this file exists, the run is finished

Files and folders are written next to their target, synced to disk and renamed: a kill at any moment leaves either the
old content or the new one, complete.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, IntegrityError
from ..files import (
    beside,
    drop_left_overs,
    held_by_one,
    read_json,
    sha256_of,
    write_files,
)
from .logs import STORED, Logs, check_logs
from .records import made_with

CHECKPOINT = "checkpoint"
CONFIG = "config.json"
METRICS = "metrics.json"
STEP_LINES, STEP_TABLE = "metrics.jsonl", "metrics.csv"
LOCK = ".lock"
PICTURE = "picture.png"


@dataclasses.dataclass
class RunFolder:
    """The folder of one run: whether it is free, holds this run, and whether that run is finished.

    Args:
        command: the command that writes the run, such as `train` or `atlas add`. options: all its options, JSON-able.
        resume: whether the folder may hold a run already. free: options that may differ when a run is resumed.
        log: further writers that receive each step, see `LOGS`.

    Raises:
        ConfigError: the folder holds something else, a run with other options, or an unfinished run of another version;
            or it holds any run while `resume` is False.
    """

    path: Path
    command: str
    options: Mapping[str, Any]
    resume: bool = True
    free: Collection[str] = ()
    log: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.path = Path(self.path)
        check_logs(self.log)
        self.options = _as_json(self.options)
        stored = stored_config(self.path)
        if stored is None:
            return
        if stored["command"] != self.command:
            raise ConfigError(
                f"--output: {self.path} holds a run of hatcl {stored['command']}, not of hatcl {self.command}; name "
                "another folder"
            )
        if not self.resume:
            raise ConfigError(
                f"--output: {self.path} already holds a run; add --resume to continue it, or name another folder"
            )
        other = _other_version(stored)
        if other and not self.finished:
            raise ConfigError(
                f"{self.path} was started by {other} and is not finished; resume it with that version, or name "
                "another folder (--output)"
            )
        try:
            check_same_run(self.path, stored["options"], self.options, self.free)
        except ConfigError as error:
            if other:
                raise ConfigError(
                    f"{self.path} was made by {other} with other options ({error}); hatcl show {self.path} reads it"
                ) from error
            raise

    @property
    def begun(self) -> bool:
        """Whether the folder holds a run already."""
        return (self.path / CONFIG).exists()

    @property
    def finished(self) -> bool:
        """Whether the folder's run is finished."""
        return self.begun and (self.path / METRICS).exists()

    @property
    def metrics(self) -> dict[str, Any]:
        """The results of a finished run."""
        content: dict[str, Any] = read_json(self.path / METRICS)
        return content

    def same_inputs(self, files: Collection[str | Path]) -> dict[str, str]:
        """The digests of the files that a run reads, after comparing them with those at its start.

        Raises:
            IntegrityError: a file cannot be read, or has changed.
        """
        found = {str(Path(f).absolute()): sha256_of(Path(f)) for f in files}
        if self.begun:
            check_inputs(self.path, read_json(self.path / CONFIG).get("inputs", {}), found)
        return found

    @contextlib.contextmanager
    def claimed(self, *, light: Collection[str] = (), **facts: Any) -> Iterator[None]:
        """Claim the folder for this run; no other process can claim it while the block runs. If an error leaves nothing
        but the claim, the claim is removed, so that the corrected command can use the folder.

        Args:
            light: files that may be removed with the claim. facts: further entries of config.json, such as `inputs`.

        Raises:
            ConfigError: another process is working in the folder.
        """
        fresh = not self.begun
        self.path.mkdir(parents=True, exist_ok=True)
        with held_by_one(self.path / LOCK):
            try:
                self.note(**facts, made_with=made_with())
                yield
            except Exception:
                if fresh:
                    self._unclaim({CONFIG, STEP_LINES, STEP_TABLE, LOCK, *light})
                raise

    def _unclaim(self, light: Collection[str]) -> None:
        drop_left_overs(self.path)
        if {p.name for p in self.path.iterdir()} <= set(light):
            shutil.rmtree(self.path, ignore_errors=True)

    def note(self, **facts: Any) -> None:
        """Add facts to config.json."""
        stored = read_json(self.path / CONFIG) if self.begun else {}
        options = {**stored.get("options", {}), **self.options}
        write_json(self.path / CONFIG, {**stored, "command": self.command, "options": options, **facts})

    def tell(self, **entry: Any) -> None:
        """Append a line to metrics.jsonl. Steps that are repeated after a kill replace their lines.

        Args:
            entry: the values of a step. Those of `stage`, `task`, `epoch` and `step` that are numbers give its place in
                the run.
        """
        path = self.path / STEP_LINES
        if self._lines is None:
            kept = [line for line in read_steps(self.path) if _position(line) < _position(entry)]
            write_files({path: "".join(json.dumps(line) + "\n" for line in kept).encode()})
            self._lines = len(kept)
        self._lines += 1
        with path.open("a") as f:
            f.write(json.dumps(_json_able(entry), allow_nan=False) + "\n")
        self.mark(**entry)

    def mark(self, **values: Any) -> None:
        """Send values, such as a score that metrics.json has as well, to the writers only. A step is numbered by its
        line in metrics.jsonl."""
        if not self.log:
            return
        at = self._lines or 0
        if self._logs is None:
            self._logs = Logs(self.log, self.path, self.options, at)
            write_json(self.path / STORED, self._logs.ids)
        self._logs.add(values, at)

    def close(self) -> None:
        """Close the writers, and write the steps as a table."""
        logs, self._logs = self._logs, None
        if logs is not None:
            logs.close()
        if self._lines is not None and (self.path / STEP_LINES).exists():
            write_steps_table(self.path)

    _lines: int | None = dataclasses.field(default=None, repr=False)  # of metrics.jsonl, after the first `tell`
    _logs: Logs | None = dataclasses.field(default=None, repr=False)

    def finish(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Write metrics.json, which marks the run as finished, and remove the files that only an unfinished run
        needs."""
        write_json(self.path / METRICS, dict(metrics))
        tidy(self.path)
        return self.metrics


def stored_config(path: Path) -> dict[str, Any] | None:
    """The config.json of the run in a folder; None if the folder is free.

    Raises:
        ConfigError: the folder is a file, or holds something else.
    """
    if path.exists() and not path.is_dir():
        raise ConfigError(f"--output: {path} is a file, expected a folder")
    if not (path / CONFIG).exists():
        others = sorted(p.name for p in path.iterdir() if not p.name.startswith(".")) if path.exists() else []
        if others:
            raise ConfigError(
                f"--output: {path} holds something other than a run of hatcl ({others[0]}, and no {CONFIG}); name "
                "another folder"
            )
        return None
    stored: dict[str, Any] = read_json(path / CONFIG)
    if not isinstance(stored.get("command"), str) or not isinstance(stored.get("options"), dict):
        raise ConfigError(f"--output: the {CONFIG} in {path} does not belong to a run of hatcl; name another folder")
    return stored


def _other_version(stored: Mapping[str, Any]) -> str:
    """The version that a run was started with, if it is another one: its defaults and steps may differ, so that this
    version cannot continue the run to the same result."""
    was = stored.get("made_with", {}).get("versions", {}).get("hatcl")
    if was == made_with()["versions"].get("hatcl"):
        return ""
    return f"hatcl {was}" if was else "an earlier hatcl"


def check_same_run(
    where: object, stored: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str] = ()
) -> None:
    """Check that a run was started with these options.

    Args:
        where: the run, named in the error. free: options that may differ.

    Raises:
        ConfigError: an option differs; the text names the first one and both values.
    """
    found = _difference({k: v for k, v in _as_json(stored).items() if k not in free}, {
        k: v for k, v in _as_json(now).items() if k not in free
    })  # fmt: skip
    if found is not None:
        name, was, is_now = found
        raise ConfigError(
            f"the run in {where} was started with {name}={_short(was)}, now got {_short(is_now)}; give the same "
            "value to continue it, or name another folder (--output)"
        )


def check_inputs(where: object, stored: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raise `IntegrityError` if a file's digest differs from the one at the start of the run."""
    for file, digest in now.items():
        if stored.get(file) != digest:
            raise IntegrityError(
                f"{file} has changed since the run in {where} was started; restore it, or name another folder "
                "(--output)"
            )


def _difference(was: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first entry that differs, by its path, with both values."""
    for key in sorted({*was, *now}):
        a, b = was.get(key), now.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            inside = _difference(a, b)
            if inside is not None:
                return f"{key}.{inside[0]}", *inside[1:]
        elif a != b:
            return key, a, b
    return None


def _as_json(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content after writing it to JSON and reading it back."""
    found: dict[str, Any] = json.loads(json.dumps(_json_able(dict(content))))
    return found


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else text[:59] + "…"


def read_steps(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without a last line that a kill has cut off."""
    path = run / STEP_LINES
    found: list[dict[str, Any]] = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def write_steps_table(run: Path) -> None:
    """Write the lines of metrics.jsonl to metrics.csv: a column for each name, empty where a line lacks it."""
    lines = read_steps(run)
    text = io.StringIO()
    table = csv.DictWriter(text, list(dict.fromkeys(name for line in lines for name in line)), lineterminator="\n")
    table.writeheader()
    table.writerows(lines)
    write_files({run / STEP_TABLE: text.getvalue().encode()})


def _position(entry: Mapping[str, Any]) -> tuple[float, ...]:
    return tuple(float(entry[k]) for k in ("stage", "task", "epoch", "step") if isinstance(entry.get(k), (int, float)))


def tidy(run: Path) -> None:
    """Remove the files that a finished run does not need: its checkpoint, and leftovers of interrupted writes."""
    shutil.rmtree(run / CHECKPOINT, ignore_errors=True)
    shutil.rmtree(beside(run / CHECKPOINT, "old"), ignore_errors=True)
    for old in run.glob(".*.old"):
        if (run / old.name[1:-4]).exists():
            shutil.rmtree(old, ignore_errors=True)
    drop_left_overs(run)


def drop_steps(run: Path, stage: int) -> None:
    """Remove a stage's lines from metrics.jsonl."""
    if (run / STEP_LINES).exists():
        kept = [line for line in read_steps(run) if line.get("stage") != stage]
        write_files({run / STEP_LINES: "".join(json.dumps(line) + "\n" for line in kept).encode()})
        if (run / STEP_TABLE).exists():
            write_steps_table(run)


# --- JSON ---


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file, all or nothing. Numbers that are not finite are written as null."""
    write_files({path: (json.dumps(_json_able(content), indent=2, allow_nan=False) + "\n").encode()})


def _json_able(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _json_able(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_json_able(value) for value in content]
    return None if isinstance(content, float) and not np.isfinite(content) else content
