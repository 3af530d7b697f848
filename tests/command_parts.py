"""What the tests of commands share: a call, tasks of images, and a command line for each command."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hatcl import commands

FAST = ["--epochs", "2", "--batch-size", "16", "--device", "cpu"]


def call(capsys, *args: object) -> tuple[int, str, str]:
    """Exit code, output and errors of one command, line breaks of the terminal taken out of the errors."""
    capsys.readouterr()
    try:
        commands.main(list(map(str, args)))
        code = 0
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 0
    out, err = capsys.readouterr()
    return code, out, " ".join(err.split())


def write_tasks(folder: Path, count: int = 3) -> list[Path]:
    """Small grey images whose bright corner tells the class."""
    paths = []
    for t in range(count):
        rng = np.random.default_rng(t)
        y = np.arange(48) % 2
        x = rng.integers(0, 120, (48, 16, 16), dtype=np.uint8)
        x[y == 1, :8, 8 * (t % 2) : 8 * (t % 2) + 8] += 120
        paths.append(folder / f"t{t}.npz")
        np.savez(paths[-1], x_train=x, y_train=y, x_test=x[:16], y_test=y[:16])
    return paths


def given(paths: list[Path]) -> list[str]:
    """Files as --task takes them."""
    return [text for path in paths for text in ("--task", str(path))]
