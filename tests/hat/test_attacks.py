"""`benchmarks/attacks.py` finds nothing broken in the MLP, and finds what is broken where a protection is taken out."""

from __future__ import annotations

import contextlib
import importlib
import sys
from pathlib import Path

import pytest

import hatcl
from hatcl import keeper
from hatcl.hat import active, build, digests, guard
from hatcl.hat.binding import Binding
from hatcl.hat.saving import pretrained

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def attacks():
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("attacks")
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def one(attacks):
    """One attack on the MLP, which has learned its tasks with all protections in place."""
    target = attacks.Target(*attacks.mlp())
    return lambda only: attacks.attempt(next(a for a in attacks.ATTACKS if only in a.name), "mlp", target)


def test_nothing_is_broken_in_the_mlp(attacks):
    results = attacks.run("mlp")
    assert [r for r in results if r.result == "BROKEN"] == []
    assert len(results) > 50 and {r.result for r in results} == {"exact", "refused"}
    assert all(bool(r.text) == (r.result == "refused") for r in results)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["conv", "test_vit", "llama", "own"])
def test_nothing_is_broken_elsewhere(attacks, model):
    assert [r for r in attacks.run(model) if r.result == "BROKEN"] == []


TWINS = {
    "a step that moves everything": [
        (keeper, "put_all_back", lambda kept: None),
        (keeper, "put_back", lambda *args: None),
    ],
    "p -= lr * g": [(guard.Guard, "put_back", lambda self: [])],
    "schedule-free": [(keeper.StoredWeights, "put_back", lambda self: None)],
    "a state that brings sealed tasks": [
        (guard.Guard, "relock", lambda self, locked: None),
        (guard.Guard, "put_back", lambda self: []),
    ],
    "3 of 1,000 steps": [(hatcl.hat.learn, "_warn_of", lambda *args: None)],
    "a head replaced": [
        (hatcl.hat.learn, "check_structure", lambda model: None),
        (digests, "check_sealed", lambda *args: None),
    ],
    "a write to a sealed task between": [(digests, "check_sealed", lambda *args: None)],
    "another task active in backward": [(active, "of_forward", lambda key, task, training: task)],
    "torch's AveragedModel": [(build, "refresh_copy", lambda model: None)],
    "after forgetting": [(Binding, "clear", lambda self: None)],
    "without digests": [(pretrained, "_check_digests", lambda *args: None)],
}


@pytest.mark.parametrize("only", TWINS)
def test_twin_without_its_protection_an_attack_is_broken(one, only, monkeypatch):
    for owner, name, instead in TWINS[only]:
        monkeypatch.setattr(owner, name, instead)
    assert one(only).result == "BROKEN"


def test_twin_one_task_for_all_threads(one, monkeypatch):
    now = [None]

    @contextlib.contextmanager
    def choose(keys, task):
        before, now[0] = now[0], task
        yield
        now[0] = before

    monkeypatch.setattr(active, "choose", choose)
    monkeypatch.setattr(active, "chosen_task", lambda key, default: default if now[0] is None else now[0])
    assert "BROKEN" in [one("threads serve").result for _ in range(5)]  # each time is a matter of luck


def test_the_program_says_what_is_broken(attacks, monkeypatch, capsys):
    assert attacks.main(["--model", "mlp", "--only", "LBFGS"]) == 0
    assert "1 attacks: 1 exact, 0 refused, 0 BROKEN" in capsys.readouterr().out
    monkeypatch.setattr(hatcl.hat.learn, "_warn_of", lambda *args: None)
    assert attacks.main(["--model", "mlp", "--only", "3 of 1,000"]) == 1
    assert "BROKEN: nothing was said of '3 of 1000 steps'" in capsys.readouterr().out


def test_a_model_that_the_caller_names(attacks, monkeypatch, tmp_path):
    (tmp_path / "mine_for_attacks.py").write_text(
        "import torch\n"
        "def make():\n"
        "    return torch.nn.Sequential(torch.nn.Linear(4, 12), torch.nn.ReLU(), torch.nn.Linear(12, 2)), "
        "torch.randn(8, 4)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (result,) = attacks.run("mine_for_attacks:make", "LBFGS")
    assert result.result == "exact" and result.model == "mine_for_attacks:make"
