"""The Trainer side: the same numbers as a plain loop, on an encoder, an encoder-decoder and a causal model."""

from __future__ import annotations

import contextlib
import copy
import itertools
import tempfile
import types

import pytest
import torch
from ilora_parts import batch_of, bert, disturb, gpt2, same, state, t5, texts
from torch import nn

from hatcl.errors import ConfigError, SkillError
from hatcl.skills.ilora import ILoRA
from hatcl.skills.orthogonal import orthogonality
from hatcl.skills.scorer import SkillScorer
from hatcl.skills.switch import adapter_tensors

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
if transformers:
    from hatcl.skills.trainer import ILoRATrainer, SkillCallback, SkillTrainer

MODELS = {"bert": bert, "t5": t5, "gpt2": gpt2}
LR, CLIP, STEPS = 1e-2, 0.5, 2


def data(name, count=8):
    return texts(count, classes=name == "bert", seed=2)


def arguments(folder, **options):
    return transformers.TrainingArguments(
        **{
            "output_dir": str(folder), "per_device_train_batch_size": 4, "num_train_epochs": 1, "learning_rate": LR,
            "lr_scheduler_type": "constant", "max_grad_norm": CLIP, "optim": "adamw_torch", "report_to": "none",
            "train_sampling_strategy": "sequential", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True,
            "logging_strategy": "no", **options,
        }
    )  # fmt: skip


def with_memory(name, model=None, **options):
    """I-LoRA in its second task, on a memory of the first one's examples."""
    config = {k: options.pop(k) for k in list(options) if k not in ("on", "replay")}
    model = MODELS[name]() if model is None else model
    ilora = ILoRA(model, {"use_ilora": True, "ema_alpha": 0.9, **config}, collate=batch_of, batch_size=4, **options)
    disturb(model, "stable")
    ilora.remember(texts(6, classes=name == "bert", seed=5))
    return ilora


def trainer(ilora, folder, name, **options):
    return ILoRATrainer(
        ilora.model, arguments(folder, **options), train_dataset=data(name), data_collator=batch_of, ilora=ilora
    )


def loop(ilora, name, micro=4, accumulate=1, watch=None, term=None):
    """What the Trainer does, by hand; transformers normalises a step's loss by the labels that it counts."""
    model = ilora.model
    counts = transformers.Trainer(model, arguments(tempfile.gettempdir()), data_collator=batch_of)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0.0)
    examples = data(name)
    model.train()
    with ilora.watch(optimizer), watch(optimizer) if watch else contextlib.nullcontext():
        micros = [batch_of(examples[i : i + micro]) for i in range(0, len(examples), micro)]
        for i in range(0, len(micros), accumulate):
            part = micros[i : i + accumulate]
            total = counts._get_num_items_in_batch(part, torch.device("cpu"))
            for b in part:
                loss = model(**b, num_items_in_batch=total).loss  # draws first, as in the Trainer
                (loss + (ilora.loss(b) if term is None else term()) / len(part)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
    ilora.remember(examples)


def alike(a, b):
    return same(state(a.model), state(b.model)) and (a.steps, a.moves, a.memory.seen) == (
        b.steps,
        b.moves,
        b.memory.seen,
    )


@pytest.mark.parametrize("on", ["memory", "batch"])
@pytest.mark.parametrize("name", MODELS)
def test_the_trainer_gives_the_same_numbers_as_a_plain_loop(name, on, tmp_path):
    a, b = with_memory(name, on=on), with_memory(name, on=on)
    before = state(a.model)
    trainer(a, tmp_path, name).train()
    loop(b, name)
    assert alike(a, b) and a.steps == STEPS
    moved = {n for n, t in state(a.model).items() if not torch.equal(t, before[n])}
    assert any(".stable." in n for n in moved) and any(".default." in n for n in moved)


def test_selective_updates_and_replay_in_the_trainer(tmp_path):
    options = {"selective_update": True, "min_update_threshold": 0.0, "replay": 0.5}
    a, b = with_memory("gpt2", **options), with_memory("gpt2", **options)
    trainer(a, tmp_path, "gpt2").train()
    loop(b, "gpt2")
    assert alike(a, b) and a.steps == STEPS


@pytest.mark.parametrize("name", MODELS)
def test_micro_batches_share_the_terms_weight(name, tmp_path, monkeypatch):
    a, b = with_memory(name), with_memory(name)
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer(a, tmp_path, name, **options).train()
    loop(b, name, micro=2, accumulate=2)
    assert alike(a, b) and a.steps == STEPS
    monkeypatch.setattr(ILoRATrainer, "_summed", lambda self, n: False)  # as if Trainer divided it
    c = with_memory(name)
    trainer(c, tmp_path, name, **options).train()
    assert not alike(c, b)


def test_without_the_term_or_the_average_the_numbers_differ(tmp_path, monkeypatch):
    b = with_memory("bert")
    loop(b, "bert")
    for name, value in (("loss", lambda self, batch: torch.zeros(())), ("step", lambda self: False)):
        with monkeypatch.context() as m:
            m.setattr(ILoRA, name, value)
            a = with_memory("bert")
            trainer(a, tmp_path, "bert").train()
        assert not same(state(a.model), state(b.model))


def test_without_ilora_it_is_the_trainer(tmp_path):
    a, b = bert(), bert()
    ilora = ILoRA(a, {"use_ilora": False})
    trainer(ilora, tmp_path, "bert").train()
    transformers.Trainer(b, arguments(tmp_path), train_dataset=data("bert"), data_collator=batch_of).train()
    assert same(state(a), state(b)) and not len(ilora.memory) and not list(tmp_path.glob("**/ilora*"))


def test_evaluation_is_the_tasks_loss_alone(tmp_path):
    ilora = with_memory("bert", consistency_weight=100.0)
    run = trainer(ilora, tmp_path, "bert")
    drawn = ilora.memory.state_dict()["draw"]
    got = run.evaluate(data("bert"))["eval_loss"]
    expected = transformers.Trainer(ilora.model, arguments(tmp_path), data_collator=batch_of).evaluate(data("bert"))
    assert got == expected["eval_loss"] and torch.equal(ilora.memory.state_dict()["draw"], drawn)
    with ilora.stable_active():
        assert run.evaluate(data("bert"))["eval_loss"] != got


@pytest.mark.parametrize("task_id", [None, "second"])
def test_a_resumed_run_is_the_same_run(task_id, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1}
    a, b = (with_memory("bert", current_task_id=task_id) for _ in range(2))
    trainer(a, tmp_path / "a", "bert", **options).train()
    run = trainer(b, tmp_path / "b", "bert", **options)
    run.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-1"))
    assert alike(a, b) and a.steps == STEPS
    assert [e["input_ids"].tolist() for e in a.memory.examples] == [e["input_ids"].tolist() for e in b.memory.examples]
    plain = transformers.Trainer(
        bert(), arguments(tmp_path / "c", **options), train_dataset=data("bert"), data_collator=batch_of
    )
    plain.train()
    with pytest.raises(
        SkillError, match=r"checkpoint-1: no I-LoRA state \(ilora/\); resume from a checkpoint of ILoRAT"
    ):
        trainer(with_memory("bert"), tmp_path / "d", "bert").train(
            resume_from_checkpoint=str(tmp_path / "c/checkpoint-1")
        )


STEPWISE = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 2}


def scoring(folder, **options):
    model = bert()
    scorer = SkillScorer(model)
    run = transformers.Trainer(
        model, arguments(folder, **STEPWISE, **options), train_dataset=data("bert"), data_collator=batch_of
    )
    run.add_callback(SkillCallback(scorer))
    return scorer, run


def test_a_resumed_run_has_the_scores_of_one_that_was_not_interrupted(tmp_path):
    whole, run = scoring(tmp_path)
    run.train()
    again, run = scoring(tmp_path)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.steps == whole.steps == 4
    assert torch.equal(again.scores().values, whole.scores().values)


def test_twin_without_the_state_the_scores_are_others_and_it_is_said(tmp_path, monkeypatch):
    whole, run = scoring(tmp_path)
    run.train()
    other, run = scoring(tmp_path / "other")
    with pytest.raises(
        SkillError, match="skills.pt does not exist, so the scores of the 2 earlier steps are lost; resume"
    ):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    by_hand, run = scoring(tmp_path / "other")
    by_hand.load_state_dict(torch.load(tmp_path / "checkpoint-2/skills.pt", weights_only=True))
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(by_hand.scores().values, whole.scores().values)
    monkeypatch.setattr(SkillCallback, "on_train_begin", lambda *args, **kwargs: None)
    other, run = scoring(tmp_path)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert other.steps == 2 and not torch.equal(other.scores().values, whole.scores().values)


def test_the_best_model_is_both_adapters_of_its_checkpoint(tmp_path, monkeypatch):
    ilora = with_memory("bert")
    run = ILoRATrainer(
        ilora.model, arguments(tmp_path, **STEPWISE, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        ), train_dataset=data("bert"), eval_dataset=data("bert"), data_collator=batch_of, ilora=ilora,
    )  # fmt: skip
    losses = itertools.chain([3.0, 1.0], itertools.repeat(2.0))
    monkeypatch.setattr(run, "evaluate", lambda *args, **kwargs: {"eval_loss": next(losses)})
    run.train()
    best = run.state.best_model_checkpoint
    assert best.endswith("checkpoint-2")
    other = with_memory("bert")
    other.load(f"{best}/ilora")
    for adapter in ("default", "stable"):
        ours, theirs = (adapter_tensors(x.model, adapter) for x in (ilora, other))
        assert all(torch.equal(t, theirs[n]) for n, t in ours.items())


def test_training_on_remembers_the_same_examples_once(tmp_path):
    ilora = ILoRA(bert(), {"use_ilora": True})
    run = trainer(ilora, tmp_path, "bert")
    run.train()
    run.train()
    assert ilora.memory.seen == 8


def test_a_negative_weight(tmp_path):
    with pytest.raises(ConfigError, match=r"weight: got -1.0, expected a number of at least 0"):
        SkillTrainer(bert(), arguments(tmp_path), weight=-1.0)


def test_the_memory_is_collated_by_the_trainer_if_by_nobody_else(tmp_path):
    ilora = ILoRA(bert(), {"use_ilora": True})
    run = trainer(ilora, tmp_path, "bert")
    run.train()
    assert ilora.memory.seen == 8 and sorted(ilora.memory_batch(3)) == ["attention_mask", "input_ids", "labels"]
    again = ILoRATrainer(
        ilora.model,
        arguments(tmp_path),
        train_dataset=data("bert"),
        data_collator=batch_of,
        ilora=ilora,
        remember=False,
    )
    again.train()
    assert ilora.memory.seen == 8


def test_a_skipped_step_does_not_move_the_average(tmp_path):
    ilora = with_memory("bert")
    run = trainer(ilora, tmp_path, "bert")
    follow = next(c for c in run.callback_handler.callbacks if type(c).__name__ == "_Follow")
    run.accelerator = types.SimpleNamespace(optimizer_step_was_skipped=True)
    follow.on_optimizer_step(run.args, run.state, run.control)
    run.accelerator.optimizer_step_was_skipped = False
    follow.on_optimizer_step(run.args, run.state, run.control)
    assert ilora.steps == 1


def test_another_model_and_a_stream_without_end(tmp_path):
    with pytest.raises(SkillError, match="ilora has another PeftModelForSequenceClassification than the Trainer's Pef"):
        ILoRATrainer(gpt2(), arguments(tmp_path), data_collator=batch_of, ilora=with_memory("bert"))

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from data("bert")

    ilora = with_memory("bert")
    options = {"train_dataset": Stream(), "data_collator": batch_of, "ilora": ilora}
    with pytest.raises(SkillError, match=r"the train_dataset \(Stream\) has no length and may be endless; pass"):
        ILoRATrainer(ilora.model, arguments(tmp_path, max_steps=1), **options)
    ILoRATrainer(ilora.model, arguments(tmp_path, max_steps=1), **options, remember=False).train()
    assert ilora.steps == 1 and ilora.memory.seen == 6


# --- TaSL's regulariser ---


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_regulariser_in_the_trainer(accumulate, tmp_path):
    a, b, plain = MODELS["bert"](), MODELS["bert"](), MODELS["bert"]()
    options = {"train_dataset": data("bert"), "data_collator": batch_of}
    steps = {"gradient_accumulation_steps": accumulate, "per_device_train_batch_size": 4 // accumulate}
    SkillTrainer(a, arguments(tmp_path, **steps), weight=0.5, squared=True, **options).train()
    SkillTrainer(plain, arguments(tmp_path, **steps), weight=0.0, **options).train()
    loop(
        ILoRA(b, {"use_ilora": False}), "bert", 4 // accumulate, accumulate,
        term=lambda: 0.5 * orthogonality(b, squared=True),
    )  # fmt: skip
    assert same(state(a), state(b)) and not same(state(a), state(plain))


# --- scores ---


@pytest.mark.parametrize("timing", ["before", "after"])
@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_a_plain_loop(name, timing, tmp_path):
    a, b = MODELS[name](), MODELS[name]()
    scorer, expected = SkillScorer(a), SkillScorer(b)
    transformers.Trainer(
        a, arguments(tmp_path), train_dataset=data(name), data_collator=batch_of,
        callbacks=[SkillCallback(scorer, timing)],
    ).train()  # fmt: skip
    loop(ILoRA(b, {"use_ilora": False}), name, watch=lambda optimizer: expected.watch(optimizer, timing))
    assert same(state(a), state(b)) and scorer.steps == expected.steps == STEPS
    assert torch.equal(scorer.scores().values, expected.scores().values)


def test_the_timing_makes_a_difference(tmp_path):
    found = []
    for timing in ("before", "after"):
        model = bert()
        scorer = SkillScorer(model)
        two = arguments(tmp_path, gradient_accumulation_steps=2)
        calls = [SkillCallback(scorer, timing)]
        transformers.Trainer(model, two, train_dataset=data("bert"), data_collator=batch_of, callbacks=calls).train()
        assert scorer.steps == 1  # of the optimizer, not of the micro-batches
        found.append(scorer.scores().values)
    assert not torch.equal(*found)


def test_scores_in_half_precision_leave_out_what_the_loss_scaling_skips():
    calls = []
    scorer = types.SimpleNamespace(update=lambda: calls.append(1))
    model = nn.Linear(2, 2)
    for fp16, gradient, counts in ((True, 1.0, 1), (True, float("inf"), 0), (False, float("inf"), 1)):
        model.weight.grad = torch.full((2, 2), gradient)
        args = types.SimpleNamespace(fp16=fp16, max_grad_norm=1.0)
        for timing, name in (("before", "on_pre_optimizer_step"), ("after", "on_optimizer_step")):
            calls.clear()
            callback = SkillCallback(scorer, timing)
            callback.on_train_begin(args, types.SimpleNamespace(global_step=0), None)
            for event in ("on_pre_optimizer_step", "on_optimizer_step"):
                getattr(callback, event)(args, None, None, model=model)
                assert len(calls) == (counts if event == name or timing == "before" else 0)
    with pytest.raises(ConfigError, match="max_grad_norm: got 0.0 with fp16, so gradients keep the loss scale; set"):
        SkillCallback(scorer).on_train_begin(
            types.SimpleNamespace(fp16=True, max_grad_norm=0.0), types.SimpleNamespace(global_step=0), None
        )


def test_another_timing():
    with pytest.raises(ConfigError, match="timing: got 'befor', expected one of before, after; did you mean 'before'"):
        SkillCallback(None, "befor")


def test_scores_and_ilora_together_score_the_plastic_adapter(tmp_path):
    ilora = with_memory("bert")
    scorer = SkillScorer(ilora.model)
    before = copy.deepcopy(dict(adapter_tensors(ilora.model, "stable")))
    run = trainer(ilora, tmp_path, "bert")
    run.add_callback(SkillCallback(scorer))
    run.train()
    assert scorer.steps == STEPS and float(scorer.scores().values.max()) > 0
    assert not same(dict(adapter_tensors(ilora.model, "stable")), before)
