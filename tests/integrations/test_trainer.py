"""transformers' Trainer: `HATTrainer`, `HATCallback` in one of one's own, and `hatcl.learn` around any."""

from __future__ import annotations

import copy
import functools
import json
import tempfile
import warnings

import pytest
import torch
from torch.utils.data import Dataset

import hatcl
from hatcl.functional import same_bits

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from hatcl.integrations.trainer import HATCallback, HATTrainer  # noqa: E402

BATCH = {
    "input_ids": torch.randint(50, (8, 6), generator=torch.Generator().manual_seed(0)),
    "attention_mask": torch.ones(8, 6, dtype=torch.long),
}
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
KINDS = ("bert", "llama")
STEPS = 12


class Words(Dataset):
    """Six words; the first one tells the label. For a language model the label is the text."""

    def __init__(self, task, of_text=False):
        self.task, self.of_text = task, of_text

    def __len__(self):
        return 48

    def __getitem__(self, i):
        x = torch.randint(50, (6,), generator=torch.Generator().manual_seed(i + 100 * self.task))
        return {"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x if self.of_text else int(x[0]) % 3}


@functools.cache
def made(kind, **options):
    torch.manual_seed(0)
    if kind == "bert":
        plain = transformers.BertForSequenceClassification(
            transformers.BertConfig(vocab_size=50, num_labels=3, **SIZES)
        )
    else:
        plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, num_key_value_heads=1, **SIZES))
    return hatcl.convert(plain, 3, BATCH, **options)


def converted(kind="bert", **options):
    return copy.deepcopy(made(kind, **options))


@functools.cache
def learned(kind):
    """A model with task 0, and what it says."""
    model = converted(kind)
    with tempfile.TemporaryDirectory() as folder:
        trainer_of(model, 0, folder, kind, save_strategy="no").train()
    return model, said(model, 0)


def with_task_0(kind="bert"):
    model, want = learned(kind)
    return copy.deepcopy(model), want


def arguments(folder, **options):
    given = {
        "per_device_train_batch_size": 8, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3,
        "report_to": [], "learning_rate": 1e-2, "use_cpu": True, "logging_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    return transformers.TrainingArguments(str(folder), **given | options)


def trainer_of(model, task, folder, kind="bert", callbacks=None, **options):
    data = {"train_dataset": Words(task, kind == "llama"), "eval_dataset": Words(task + 50, kind == "llama")}
    return HATTrainer(model=model, args=arguments(folder, **options), task=task, callbacks=callbacks, **data)


def said(model, task):
    model.eval()
    with hatcl.task(model, task), torch.no_grad():
        return model(**BATCH).logits.clone()


@pytest.fixture(autouse=True)
def sealed_at_full_scale():
    """A task that is sealed after another number of steps than was expected is warned of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="task ")
        yield


# --- HATTrainer ---


@pytest.mark.parametrize("kind", KINDS)
def test_two_tasks_and_one_that_is_resumed_in_a_fresh_model(tmp_path, kind):
    model, want = with_task_0(kind)
    trainer_of(model, 1, tmp_path / "second", kind).train()
    assert hatcl.tasks(model) == [0, 1] and same_bits(said(model, 0), want) and hatcl.certify(model, BATCH).exact
    resumed = converted(kind)  # nothing is sealed in it: the checkpoint brings task 0 along
    trainer_of(resumed, 1, tmp_path / "second", kind).train(
        resume_from_checkpoint=str(tmp_path / "second/checkpoint-9")
    )
    assert hatcl.tasks(resumed) == [0, 1]
    assert all(same_bits(said(resumed, t), said(model, t)) for t in (0, 1))


def test_the_last_checkpoint_holds_the_sealed_task(tmp_path):
    model = converted()
    trainer_of(model, 0, tmp_path).train()
    saved = hatcl.from_pretrained(tmp_path / "checkpoint-12")
    assert hatcl.tasks(saved) == [0] and same_bits(said(saved, 0), said(model, 0))
    assert hatcl.tasks(hatcl.from_pretrained(tmp_path / "checkpoint-9")) == []
    with pytest.raises(
        ValueError, match="load this folder with hatcl.from_pretrained"
    ):  # and not as a plain network with other numbers
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-12")


@pytest.mark.parametrize("saved", [STEPS, 6])  # finished, and in the middle
def test_another_tasks_checkpoint_is_refused(tmp_path, saved):
    trainer_of(converted(), 0, tmp_path, save_steps=6).train()
    model = copy.deepcopy(learned("bert")[0])
    before = {n: t.clone() for n, t in model.state_dict().items()}
    words = "task: got 1, but the checkpoint to resume from belongs to task 0; give each task an output_dir of its own"
    with pytest.raises(hatcl.TaskError, match=words):
        trainer_of(model, 1, tmp_path).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{saved}"))
    assert hatcl.tasks(model) == [0]
    assert all(same_bits(t, before[n]) for n, t in model.state_dict().items())
    callback, trainer = with_callback(converted(), 0, tmp_path / "own")
    with callback:
        trainer.train()
    callback, trainer = with_callback(converted(), 1, tmp_path / "own")
    with callback, pytest.raises(hatcl.TaskError, match=words):
        trainer.train(resume_from_checkpoint=str(tmp_path / "own" / f"checkpoint-{saved}"))


def test_a_finished_run_that_is_resumed_stays_as_it_is(tmp_path):
    model = converted()
    trainer_of(model, 0, tmp_path).train()
    again = converted()
    trainer_of(again, 0, tmp_path).train(resume_from_checkpoint=True)
    assert hatcl.tasks(again) == [0] and same_bits(said(again, 0), said(model, 0))


def test_a_sealed_task_is_not_learned_again(tmp_path):
    model, want = with_task_0()
    with pytest.raises(hatcl.TaskError, match="task 0 is sealed and cannot be learned again"):
        trainer_of(model, 0, tmp_path).train()
    assert same_bits(said(model, 0), want)


class Gradients(transformers.TrainerCallback):
    """The gradient of the task's embedding right before the first step, without the part of the loss."""

    def __init__(self, task):
        self.task, self.seen = task, None

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.seen is None:
            self.seen = kwargs["model"].hat_gates.embeddings[self.task].grad.clone()


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_the_penalty_counts_once_per_step(tmp_path, monkeypatch, accumulate):
    """With the task's own loss taken out, the embeddings' gradient is the penalty's, whatever the accumulation."""
    model, seen = converted(), Gradients(0)
    of_nothing = lambda self, model, inputs, *_, **__: 0.0 * model(**inputs).loss  # noqa: E731
    monkeypatch.setattr(transformers.Trainer, "compute_loss", of_nothing)
    options = {"gradient_accumulation_steps": accumulate, "per_device_train_batch_size": 8 // accumulate}
    trainer_of(model, 0, tmp_path, callbacks=[seen], save_strategy="no", max_grad_norm=0, **options).train()
    fresh = converted()
    with (
        pytest.raises(ZeroDivisionError),
        hatcl.learn(fresh, 0, torch.optim.SGD(fresh.parameters(), lr=0.1), STEPS) as learning,
    ):
        learning.penalty().backward()
        torch.testing.assert_close(seen.seen, fresh.hat_gates.embeddings[0].grad)
        assert seen.seen.abs().sum() > 0
        raise ZeroDivisionError


@pytest.mark.parametrize(
    "options",
    [{"gradient_accumulation_steps": 2}, {"bf16": True}, {"gradient_checkpointing": True}, {"max_steps": 5},
     {"optim": "sgd", "weight_decay": 0.1}, {"max_grad_norm": 0.1}],
    ids=lambda o: next(iter(o)),
)  # fmt: skip
def test_what_a_trainer_offers(tmp_path, options):
    model, want = with_task_0()
    trainer_of(model, 1, tmp_path, save_strategy="no", **options).train()
    assert hatcl.tasks(model) == [0, 1] and same_bits(said(model, 0), want) and hatcl.certify(model, BATCH).exact


def test_the_best_checkpoint_is_loaded_and_sealed(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True}
    model, first = with_task_0()
    trainer = trainer_of(model, 1, tmp_path / "second", metric_for_best_model="loss", **options)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert hatcl.tasks(model) == [0, 1] and same_bits(said(model, 0), first) and hatcl.certify(model, BATCH).exact
    measured = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert trainer.evaluate()["eval_loss"] == measured[trainer.state.best_global_step] == min(measured.values())
    assert best is not None


def test_a_best_checkpoint_that_is_not_the_last_is_sealed_as_it_was_measured(tmp_path, monkeypatch):
    """Losses that grow make the first checkpoint the best one; its task was not sealed."""
    trainer = trainer_of(
        converted(),
        0,
        tmp_path,
        eval_strategy="steps",
        eval_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="up",
    )
    ups = iter([4.0, 3.0, 2.0, 1.0])
    plain = trainer.evaluate
    monkeypatch.setattr(trainer, "evaluate", lambda **_: {**plain(), "eval_up": next(ups)})
    trainer.args.greater_is_better = True
    trainer.train()
    assert trainer.state.best_global_step == 3 and hatcl.tasks(trainer.model) == [0]
    measured = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    assert plain()["eval_loss"] == measured[0] != measured[-1] and hatcl.certify(trainer.model, BATCH).exact


class Stop(transformers.TrainerCallback):
    def on_evaluate(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 6


def test_training_that_is_stopped_early_seals_before_it_saves(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 3, "callbacks": [Stop()]}
    trainer = trainer_of(converted(), 0, tmp_path, **options)
    with pytest.warns(UserWarning, match="task 0 is sealed after 6 of 12 steps"):
        trainer.train()
    saved = hatcl.from_pretrained(tmp_path / "checkpoint-6")
    assert hatcl.tasks(saved) == [0] and same_bits(said(saved, 0), said(trainer.model, 0))


class Fails(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt


def test_an_error_seals_nothing_and_the_run_is_resumed(tmp_path):
    model, want = with_task_0()
    with pytest.raises(KeyboardInterrupt):
        trainer_of(model, 1, tmp_path / "second", callbacks=[Fails()]).train()
    assert hatcl.tasks(model) == [0] and model.hat_gates.learning is None and same_bits(said(model, 0), want)
    trainer_of(model, 1, tmp_path / "second").train(resume_from_checkpoint=True)
    whole, _ = with_task_0()
    trainer_of(whole, 1, tmp_path / "whole").train()
    assert all(same_bits(said(model, t), said(whole, t)) for t in (0, 1))


def test_evaluation_is_of_the_trainers_own_task(tmp_path):
    model, _ = with_task_0()
    first = trainer_of(model, 0, tmp_path, save_strategy="no")
    want = first.evaluate()["eval_loss"], first.predict(Words(50)).predictions
    trainer_of(model, 1, tmp_path, save_strategy="no").train()
    assert first.evaluate()["eval_loss"] == want[0]
    assert (first.predict(Words(50)).predictions == want[1]).all()
    with pytest.raises(hatcl.TaskError, match="task 2 is not sealed"):
        trainer_of(model, 2, tmp_path).evaluate()


def test_penalty_and_scale_are_logged(tmp_path):
    trainer = trainer_of(converted(), 0, tmp_path, logging_strategy="steps", logging_steps=4, save_strategy="no")
    trainer.train()
    lines = [e for e in trainer.state.log_history if "loss" in e and "penalty" in e]
    assert [e["step"] for e in lines] == [4, 8] and all(e["penalty"] > 0 for e in lines)
    assert lines[0]["scale"] < lines[1]["scale"]


class Pictures(Words):
    """Noise, of which one pixel tells the label."""

    def __getitem__(self, i):
        x = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(i))
        return {"pixel_values": x, "labels": int(x[0, 0, 0] > 0)}


def test_behind_a_mask_of_its_inputs_a_model_is_read_as_without_it(tmp_path):
    """A Trainer asks the forward for the names of inputs and labels, and for how the loss is scaled."""
    size = {**SIZES, "image_size": 8, "patch_size": 4}
    plain = transformers.ViTForImageClassification(transformers.ViTConfig(**size))
    read = []
    for mask in (True, False):
        model = hatcl.convert(plain, 1, {"pixel_values": torch.randn(2, 3, 8, 8)}, mask_inputs=mask, verify=False)
        trainer = HATTrainer(
            model=model, args=arguments(tmp_path / str(mask), max_steps=2), task=0,
            train_dataset=Pictures(0), eval_dataset=Pictures(0),
        )  # fmt: skip
        trainer.train()
        assert "eval_loss" in trainer.evaluate() and hatcl.tasks(model) == [0]
        columns = {*trainer._signature_columns}
        read.append((columns, trainer.label_names, trainer.can_return_loss, trainer.model_accepts_loss_kwargs))
        if mask:
            with pytest.raises(hatcl.ConfigError, match="mask_inputs: this Trainer asks a model's forward .* HATTrain"):
                transformers.Trainer(model, arguments(tmp_path), callbacks=[HATCallback(0)])
    assert read[0] == read[1]


def test_what_is_refused(tmp_path):
    model = converted()
    with pytest.raises(hatcl.TaskError, match="the model has tasks 0 to 2"):
        HATTrainer(model=model, args=arguments(tmp_path), task=3)
    for option, value, name in (("deepspeed", "zero.json", "DeepSpeed"), ("fsdp", "full_shard", "FSDP")):
        args = arguments(tmp_path)
        setattr(args, option, value)
        words = f"{name}: this Trainer would shard the model.*DistributedDataParallel"
        with pytest.raises(hatcl.ConfigError, match=words):
            HATCallback(0).on_train_begin(args, None, None)


def test_a_checkpoint_of_another_conversion_is_refused(tmp_path):
    trainer_of(converted(), 0, tmp_path).train()
    other = converted(config=hatcl.HATConfig(num_tasks=3, max_scale=50))
    with pytest.raises(hatcl.IntegrityError, match=r"converted otherwise than this one \(config: max_scale differ\)"):
        trainer_of(other, 0, tmp_path).train(resume_from_checkpoint=True)


def test_hat_over_lora(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    plain = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=50, num_labels=3, **SIZES))
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])
    model = hatcl.convert(peft.get_peft_model(plain, lora), 2, BATCH)
    trainer_of(model, 0, tmp_path / "first").train()
    want = said(model, 0)
    trainer_of(model, 1, tmp_path / "second").train()
    assert same_bits(said(model, 0), want) and hatcl.tasks(model) == [0, 1]


# --- HATCallback in a Trainer of one's own ---


def with_callback(model, task, folder, **options):
    callback = HATCallback(task=task)
    args = arguments(folder, **options)
    data = {"train_dataset": Words(task), "eval_dataset": Words(task + 50)}
    trainer = transformers.Trainer(model, args, **data, callbacks=[callback])
    return callback, trainer


def test_the_callback_learns_and_resumes(tmp_path):
    model, _ = with_task_0()
    callback, trainer = with_callback(model, 1, tmp_path / "second")
    with callback:
        trainer.train()
    resumed = converted()
    callback, trainer = with_callback(resumed, 1, tmp_path / "second")
    with callback:
        trainer.train(resume_from_checkpoint=str(tmp_path / "second" / "checkpoint-6"))
    assert hatcl.certify(resumed, BATCH).exact
    assert all(same_bits(said(resumed, t), said(model, t)) for t in (0, 1))


@pytest.mark.parametrize("options", [{"gradient_accumulation_steps": 2}, {"bf16": True}], ids=lambda o: next(iter(o)))
def test_the_callback_in_what_a_trainer_offers(tmp_path, options):
    model, want = with_task_0()
    callback, trainer = with_callback(model, 1, tmp_path, save_strategy="no", **options)
    with callback:
        trainer.train()
    assert hatcl.tasks(model) == [0, 1] and same_bits(said(model, 0), want) and hatcl.certify(model, BATCH).exact


def test_the_callback_seals_the_best_checkpoint(tmp_path):
    model, want = with_task_0()
    options = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True}
    callback, trainer = with_callback(model, 1, tmp_path, **options)
    ups = iter([3.0, 4.0, 2.0, 1.0])
    plain = trainer.evaluate
    trainer.evaluate = lambda **_: {**plain(), "eval_loss": -next(ups)}
    with callback:
        trainer.train()
    assert trainer.state.best_global_step == 6 and hatcl.tasks(model) == [0, 1] and same_bits(said(model, 0), want)
    assert hatcl.certify(model, BATCH).exact


def test_the_callback_after_an_error(tmp_path):
    model = converted()
    callback, trainer = with_callback(model, 0, tmp_path, save_strategy="no")
    trainer.add_callback(Fails())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()  # without `with callback`: the task stays open
    trainer.remove_callback(Fails)
    trainer.train()  # it begins once more
    assert hatcl.tasks(model) == [0]


# --- hatcl.learn around a Trainer ---


class Trainer(transformers.Trainer):
    learning: hatcl.Learning

    def compute_loss(self, model, inputs, return_outputs=False, **options):
        out = model(**inputs)
        loss = out.loss + self.learning.penalty() / self.args.gradient_accumulation_steps
        return (loss, out) if return_outputs else loss


def test_a_state_that_is_loaded_inside_the_block_is_held(tmp_path):
    def train(model, task, folder, start=0, **options):
        trainer = Trainer(model, arguments(folder), train_dataset=Words(task))
        with hatcl.learn(model, task, trainer.create_optimizer(), STEPS, start=start) as trainer.learning:
            trainer.train(**options)
            assert trainer.learning.step == STEPS and trainer.learning.settled

    model, _ = with_task_0()
    train(model, 1, tmp_path / "second")
    resumed = converted()
    train(resumed, 1, tmp_path / "second", 6, resume_from_checkpoint=str(tmp_path / "second" / "checkpoint-6"))
    assert hatcl.tasks(resumed) == [0, 1] and hatcl.certify(resumed, BATCH).exact
    assert all(same_bits(said(resumed, t), said(model, t)) for t in (0, 1))
    assert json.loads((tmp_path / "second" / "checkpoint-6" / "config.json").read_text())["model_type"] == "bert"
