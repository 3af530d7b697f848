"""A record of how something was made: the versions of libraries, and the commit of the repository."""

from __future__ import annotations

import functools
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..hat.saving.card import LIBRARIES


def made_with(where: Path | None = None) -> dict[str, Any]:
    """`versions` of Python and the installed libraries; in a git repository also `commit`, and `changed`: whether files
    differ from the commit.

    Args:
        where: a folder; None = the working directory, which most likely holds the code that learns.
    """
    versions = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    return {"versions": versions, **_commit_of((where or Path.cwd()).absolute())}


@functools.lru_cache(maxsize=8)
def _commit_of(where: Path) -> dict[str, Any]:
    """The commit at the first call: a process runs the code that it had read by then."""
    commit = _git(where, "rev-parse", "HEAD")
    if not commit:
        return {}
    return {"commit": commit, "changed": bool(_git(where, "status", "--porcelain", "--untracked-files=no"))}


def _git(where: Path, *words: str) -> str:
    """The output of git; empty if there is no git or no repository."""
    try:
        said = subprocess.run(["git", *words], cwd=where, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return said.stdout.strip() if said.returncode == 0 else ""
