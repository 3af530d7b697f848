"""Each model in processes of its own: whatever happens there is one model's failure, and what was found is kept."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time

import pytest
import torch

import hatcl
from hatcl.zoo import catalog, run

# What runs in another process has to be importable there, and these tests are not (--import-mode=importlib): `eval`.


def isolated(work, *args, seconds=60.0, memory_gb=16.0):
    return run.isolated(work, *args, seconds=seconds, memory_gb=memory_gb)


def inside(text, **options):
    return isolated(eval, text, **options)


@pytest.fixture(scope="module", autouse=True)
def started():
    """The process from which the others are forked, so that no test waits for its imports."""
    assert isolated(abs, -1) == (1, None)


# ---- one model --------------------------------------------------------------------------------------


def test_a_value_comes_back_from_another_process():
    here, failure = isolated(os.getpid)
    assert failure is None and here != os.getpid()
    assert isolated(divmod, 7, 2) == ((3, 1), None)
    assert isolated(print) == (None, None)


@pytest.mark.parametrize(
    ("work", "args", "text"),
    [
        (divmod, (1, 0), "ZeroDivisionError: "),
        (hatcl.list_models, (3,), "TypeError: "),
        (sys.exit, (3,), "SystemExit: 3"),
        (eval, ("lambda: 0",), "Error: .*pickle"),  # what comes back has to go through a pipe
        (os._exit, (3,), r"crash: the process ended with code 3 \(limit 16 GB\)"),
        (os._exit, (0,), r"crash: the process ended with code 0 \(limit 16 GB\)"),
        (signal.raise_signal, (signal.SIGKILL,), r"crash: the process ended with code -9 \(limit 16 GB\)"),
        (signal.raise_signal, (signal.SIGSEGV,), r"crash: the process ended with code -11 \(limit 16 GB\)"),
    ],
    ids=["exception", "from a library", "exit", "pickle", "crash", "quiet end", "killed", "segmentation fault"],
)
def test_a_failure_is_told_and_the_caller_goes_on(work, args, text):
    value, failure = isolated(work, *args)
    assert value is None and re.match(f"(?i).*{text}", failure), failure
    assert isolated(abs, -2) == (2, None)


def test_what_takes_too_long_is_ended(tmp_path):
    note = tmp_path / "process"
    begun = time.monotonic()
    text = f"[open({str(note)!r}, 'w').write(str(__import__('os').getpid())), __import__('time').sleep(60)]"
    assert inside(text, seconds=3) == (None, "timeout: took more than 3 s")
    assert time.monotonic() - begun < 30
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)
    assert inside("__import__('time').sleep(0.01)", seconds=60) == (None, None)


@pytest.mark.parametrize("work", [bytes, torch.ones], ids=["python", "torch"])
def test_too_much_memory_is_refused(work):
    pytest.importorskip("resource", reason="Windows cannot limit a process's memory")
    text = {bytes: "len(bytes(3 << 30))", torch.ones: "__import__('torch').empty(3 << 28).numel()"}[work]
    value, failure = inside(text, memory_gb=2)
    assert value is None and re.match("MemoryError: |RuntimeError: .*memory", failure), failure
    assert inside(text, memory_gb=8) == ({bytes: 3 << 30, torch.ones: 3 << 28}[work], None)  # nobody writes to it


# ---- a model of the catalog -------------------------------------------------------------------------


def test_a_model_is_proved_in_one_process_and_loaded_in_another():
    row = run.prove_one("test_resnet")
    assert row["passed"] and row["family"] == catalog.known("test_resnet").family == "resnet", row
    assert row["known"] == 1 and row["units"] > 100 and json.loads(json.dumps(row)) == row
    assert "failure" not in row


def test_a_model_that_takes_too_much_is_a_row_and_the_next_one_passes():
    row = run.prove_one("test_resnet", seconds=0.01)
    assert row == {"family": "resnet", "passed": False, "failure": "timeout: took more than 0.01 s"}
    pytest.importorskip("resource", reason="Windows cannot limit a process's memory")
    row = run.prove_one("test_resnet", memory_gb=0.01)
    assert not row["passed"] and re.search("memory|crash", row["failure"], re.IGNORECASE), row
    assert isolated(abs, -3) == (3, None)


def pretend(patch, prove, reload):
    """`isolated` with these results, and what was asked of it."""
    asked = []

    def isolated(work, *args, **limits):
        asked.append((work, *args, limits))
        return {run._prove: prove, run._reload: reload}[work]

    patch.setattr(run, "isolated", isolated)
    return asked


def test_what_fails_at_proving_or_loading_is_a_row(monkeypatch):
    limits = {"seconds": 5, "memory_gb": 3}
    asked = pretend(monkeypatch, (None, "broken"), (None, None))
    assert run.prove_one("resnet18", **limits) == {"family": "resnet", "passed": False, "failure": "broken"}
    assert [(a[0], a[1], a[3]) for a in asked] == [(run._prove, "resnet18", limits)]
    asked = pretend(monkeypatch, ({"units": 3}, None), (None, "other outputs"))
    assert run.prove_one("resnet18", **limits) == {"family": "resnet", "passed": False, "failure": "other outputs"}
    assert [(a[0], a[1], a[3]) for a in asked] == [
        (run._prove, "resnet18", limits),
        (run._reload, "resnet18", limits),
    ]
    assert asked[0][2] == asked[1][2] and not os.path.exists(asked[0][2])
    pretend(monkeypatch, ({"units": 3}, None), (None, None))
    assert run.prove_one("resnet18", **limits) == {"family": "resnet", "passed": True, "units": 3}


def test_a_name_that_does_not_exist():
    with pytest.raises(hatcl.ConfigError, match="no model is called 'resnet81'; did you mean 'resnet"):
        run.prove_one("resnet81")


# ---- many -------------------------------------------------------------------------------------------


@pytest.fixture
def proved(monkeypatch):
    """`prove_one` that only notes whom it was asked for."""
    asked = []

    def prove_one(name, **limits):
        asked.append((name, limits))
        return {"family": name, "passed": name != "bad", "round": len(asked)}

    monkeypatch.setattr(run, "prove_one", prove_one)
    return asked


def models(path):
    return json.loads(path.read_text())["models"]


def test_every_row_is_written_as_soon_as_it_is_there(tmp_path, proved):
    results = tmp_path / "zoo.json"
    going = run.prove_all(["b", "bad", "a"], results, seconds=7, memory_gb=2)
    for done in (["b"], ["b", "bad"], ["a", "b", "bad"]):
        name, row = next(going)
        assert row["family"] == name and row["passed"] == (name != "bad")
        assert list(models(results)) == done and models(results)[name] == row  # by name, whatever the order
    assert next(going, None) is None
    assert proved == [(name, {"seconds": 7, "memory_gb": 2}) for name in ("b", "bad", "a")]
    machine = json.loads(results.read_text())["machine"]
    assert set(machine) == {"processor", "threads", "torch", "timm", "python"} and all(machine.values())


def test_an_interrupted_run_goes_on(tmp_path, proved):
    results = tmp_path / "zoo.json"
    next(run.prove_all(["a", "bad", "c"], results))
    rows = dict(run.prove_all(["a", "bad", "c"], results))
    assert [name for name, _ in proved] == ["a", "bad", "c"] and list(rows) == ["a", "bad", "c"]
    assert rows["a"] == {"family": "a", "passed": True, "round": 1} and models(results) == rows
    written = results.stat().st_mtime_ns
    assert dict(run.prove_all(["bad", "a"], results)) == {"bad": rows["bad"], "a": rows["a"]}  # also what failed
    assert len(proved) == 3 and results.stat().st_mtime_ns == written


def test_again_runs_what_is_there(tmp_path, proved):
    results = tmp_path / "zoo.json"
    list(run.prove_all(["a", "b"], results))
    assert dict(run.prove_all(["a"], results, again=True))["a"]["round"] == 3
    assert [name for name, _ in proved] == ["a", "b", "a"]
    assert {name: row["round"] for name, row in models(results).items()} == {"a": 3, "b": 2}


def test_a_run_that_is_stopped_keeps_what_it_has(tmp_path, monkeypatch, proved):
    results = tmp_path / "zoo.json"
    next(run.prove_all(["a", "b"], results))

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "prove_one", stop)
    with pytest.raises(KeyboardInterrupt):
        list(run.prove_all(["a", "b"], results))
    assert list(models(results)) == ["a"] and os.listdir(tmp_path) == ["zoo.json"]
