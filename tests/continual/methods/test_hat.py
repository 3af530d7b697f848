"""HAT over LoRA pairs in the loop: what a task learned stays bit for bit, and the twin without the gates' guard."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

import torch  # noqa: E402
from continual_parts import adapted, bert, gated, run, text_tasks, tokenizer  # noqa: E402

import hatcl  # noqa: E402
from hatcl.errors import ConfigError, TaskError  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def moved(monkeypatch=None):
    """By how much the first task's outputs move while the others are learned."""
    model, seen = gated(), []
    tokens = dict(tokenizer()(["w1 w7 w3", "w4 w5"], padding=True, return_tensors="pt"))
    inputs = {n: tokens[n] for n in ("input_ids", "attention_mask")}
    tasks = text_tasks(bert())

    def look(at):
        if at.doing == "scoring" and at.task == tasks[0].name:
            with torch.no_grad(), hatcl.task(model, 0):
                seen.append(model(**inputs).last_hidden_state.clone())

    hatcl.continual.learn_sequence(model, tasks, "hat", {"epochs": 2, "batch_size": 8, "lr": 3e-2}, on_progress=look)
    return float((seen[0] - seen[-1]).abs().max())


def test_what_the_first_task_computes_stays():
    assert moved() == 0


def test_twin_without_the_guard_it_moves(monkeypatch):
    monkeypatch.setattr("hatcl.keeper.put_back", lambda *args: None)
    monkeypatch.setattr("hatcl.keeper.Kept.put", lambda k: None)
    monkeypatch.setattr("hatcl.keeper._zero", lambda which: lambda p: None)
    monkeypatch.setattr("hatcl.hat.digests.check_sealed", lambda *args: None)
    monkeypatch.setattr("hatcl.continual.methods.hat.HardAttention.finish", lambda *args: {})  # which would raise
    assert moved() > 0


def test_backward_transfer_is_zero_and_forward_transfer_not_known():
    _, result = run("hat")
    assert result.backward_transfer == 0
    assert np.isnan(result.forward_transfer) and np.isnan(result.matrix[0, 1])


def test_a_task_whose_batches_the_model_does_not_take_is_refused_before_anything_is_learned(tmp_path):
    tasks = text_tasks(bert(), 2)
    tasks[1] = dataclasses.replace(tasks[1], collate=lambda pairs: [text for text, _ in pairs])
    with pytest.raises(
        ConfigError, match="hat: task task 1: the model cannot be called with the result of its collate"
    ):
        run("hat", tmp_path / "run", tasks=tasks)
    assert not (tmp_path / "run").exists()


def test_a_model_without_gates_or_room_is_refused():
    with pytest.raises(TaskError, match="has no gates: convert it first"):
        run("hat", model=adapted())
    fourth = dataclasses.replace(text_tasks(bert(), 1)[0], name="fourth")
    with pytest.raises(
        TaskError, match="room for 3 tasks, of which none are sealed; 4 must be learned, starting with the fir"
    ):
        run("hat", tasks=[*text_tasks(bert()), fourth])
