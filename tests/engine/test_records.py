from __future__ import annotations

import subprocess

import pytest

from hatcl.engine import records
from hatcl.engine.records import made_with


def git(folder, *words):
    config = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    subprocess.run(["git", *config, *words], cwd=folder, check=True, capture_output=True)


def test_outside_of_a_repository_the_versions_alone(tmp_path):
    made = made_with(tmp_path)
    assert set(made) == {"versions"}
    assert {"python", "hatcl", "torch", "timm"} <= set(made["versions"]) and all(made["versions"].values())


def test_the_commit_and_whether_files_differ_from_it(tmp_path):
    git(tmp_path, "init", "-q")
    assert "commit" not in made_with(tmp_path)  # there is none yet
    records._commit_of.cache_clear()
    (tmp_path / "a.py").write_text("1\n")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "-q", "-m", "first")
    made = made_with(tmp_path)
    assert len(made["commit"]) == 40 and made["changed"] is False
    records._commit_of.cache_clear()
    (tmp_path / "a.py").write_text("2\n")
    assert made_with(tmp_path)["changed"] is True


@pytest.mark.parametrize("error", [FileNotFoundError("git"), subprocess.TimeoutExpired("git", 10)])
def test_without_git(tmp_path, monkeypatch, error):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(subprocess, "run", fail)
    assert set(made_with(tmp_path)) == {"versions"}
