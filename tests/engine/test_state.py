"""Generators, modes, and the file that a loop goes on from."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from hatcl.engine.state import Modes, Standing, generators_of, random_state, set_random_state, undone_on_error
from hatcl.errors import IntegrityError

CPU = torch.device("cpu")


def test_random_generators_go_on_where_they_were():
    own = torch.Generator().manual_seed(5)

    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(())), float(torch.rand((), generator=own))

    draw()
    state = random_state(CPU, [own])
    first = draw()
    assert not set(draw()) & set(first)
    set_random_state(state, CPU, [own])
    assert draw() == first


def test_generators_of_loaders_are_found():
    own = torch.Generator()
    sampler = torch.utils.data.RandomSampler(range(4), generator=own)
    loader = torch.utils.data.DataLoader(range(4), sampler=sampler)
    assert generators_of(loader) == [own]
    assert generators_of([1, 2]) == []
    both = type("Both", (), {"loaders": [loader, loader]})()
    assert generators_of(both) == [own]


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), nn.Linear(2, 2)


def test_modules_that_were_put_into_evaluation_stay_there():
    net = Part()
    net.body.eval()
    modes = Modes(net)
    modes.train()
    assert net.training and net.head.training and not any(m.training for m in net.body.modules())
    net.eval()
    net.late = nn.Linear(2, 2).eval()
    modes.put_back()
    assert net.training and net.head.training and net.late.training
    assert not any(m.training for m in net.body.modules())


def test_a_model_in_evaluation_mode_is_trained_as_a_whole():
    net = Part().eval()
    net.head.train()
    modes = Modes(net)
    modes.train()
    assert all(m.training for m in net.modules())
    modes.put_back()
    assert net.head.training and sum(m.training for m in net.modules()) == 1


def test_the_model_inside_an_adapter_decides():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["0"])
    loaded = peft.get_peft_model(Part().eval(), config)  # as from_pretrained gives it; peft's own modules train
    modes = Modes(loaded)
    modes.train()
    assert all(m.training for m in loaded.modules())
    net = Part()
    net.body[1].eval()
    adapted = peft.get_peft_model(net, config)
    modes = Modes(adapted)
    modes.train()
    assert not net.body[1].training and net.head.training


def test_an_error_undoes_what_was_written():
    t = torch.zeros(3)
    with pytest.raises(KeyboardInterrupt), undone_on_error({"t": t}) as before:
        t.fill_(1.0)
        assert not before["t"].any()
        raise KeyboardInterrupt
    assert not t.any()
    with undone_on_error({"t": t}):
        t.fill_(1.0)
    assert t.all()


@pytest.mark.parametrize("folder", [True, False])
def test_a_standing_comes_back(tmp_path, folder):
    kept = Standing(tmp_path / "at", (lambda: {"what": 1}) if folder else None, seconds=0)
    assert kept.read("a") is None and kept.due()
    kept.write("a", {"step": 3, "x": torch.ones(2)})
    found = kept.read("a")
    assert found["step"] == 3 and torch.equal(found["x"], torch.ones(2))
    assert (tmp_path / "at" / "config.json").exists() == folder
    assert not Standing(tmp_path / "at", seconds=60).due()
    with pytest.raises(IntegrityError, match="not a checkpoint of b; give another path, or remove it to start"):
        kept.read("b")
    kept.file.write_bytes(kept.file.read_bytes()[:200])
    with pytest.raises(IntegrityError, match="cannot be read as tensors and plain values"):
        kept.read("a")
