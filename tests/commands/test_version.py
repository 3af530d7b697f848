"""`hatcl --version`, and `--verbose` for bug reports."""

from __future__ import annotations

import getpass
import importlib.metadata
import platform

import pytest
import torch

import hatcl
from hatcl.commands import main
from hatcl.commands._version import REPORTED, environment, version_of


def said(capsys, *line):
    with pytest.raises(SystemExit) as stopped:
        main(line)
    return stopped.value.code, capsys.readouterr()


def test_the_version_alone(capsys):
    code, told = said(capsys, "--version")
    assert (code, told.out) == (0, f"{hatcl.__version__}\n")


def test_a_bug_report_has_the_versions_the_platform_and_the_devices(capsys):
    code, told = said(capsys, "--version", "--verbose")
    lines = dict(line.split(": ", 1) for line in told.out.splitlines())
    assert code == 0 and lines == environment()
    assert lines["hatcl"] == hatcl.__version__ and lines["python"] == platform.python_version()
    assert lines["torch"] == importlib.metadata.version("torch") and lines["timm"] != "not installed"
    assert lines["devices"].startswith("cpu (") and set(REPORTED) < lines.keys()
    assert platform.node() not in told.out and getpass.getuser() not in told.out.replace("torch", "")


def test_what_is_not_installed_and_what_else_computes(monkeypatch):
    assert version_of("no-such-library-as-this") == "not installed"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"GPU {i}")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert environment()["devices"].endswith("GPU 0, GPU 1, mps")


def test_verbose_alone_is_refused(capsys):
    code, told = said(capsys, "--verbose")
    assert code == 2 and "--verbose belongs to --version: hatcl --version --verbose" in told.err
