"""A finished run of images, for the tests that only look at it."""

from __future__ import annotations

import pytest
from command_parts import FAST, given, write_tasks

from hatcl import commands


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A finished run of three tasks."""
    folder = tmp_path_factory.mktemp("cli")
    tasks = [path.relative_to(folder) for path in write_tasks(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        try:
            commands.main(["train", *given(tasks), "--output", "run", *FAST])
        except SystemExit as exit_:
            assert not exit_.code
    return folder / "run"
