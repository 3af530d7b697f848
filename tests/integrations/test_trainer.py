"""transformers' Trainer inside `hatcl.learn`: two tasks, and a task that is resumed in a fresh process's model."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.utils.data import Dataset

import hatcl
from hatcl.functional import same_bits

transformers = pytest.importorskip("transformers")
BATCH = {
    "input_ids": torch.randint(50, (8, 6), generator=torch.Generator().manual_seed(0)),
    "attention_mask": torch.ones(8, 6, dtype=torch.long),
}


class Words(Dataset):
    """Six words; the first one tells the label."""

    def __init__(self, task):
        self.task = task

    def __len__(self):
        return 48

    def __getitem__(self, i):
        x = torch.randint(50, (6,), generator=torch.Generator().manual_seed(i + 100 * self.task))
        return {"input_ids": x, "attention_mask": torch.ones_like(x), "labels": int(x[0]) % 3}


class Trainer(transformers.Trainer):
    learning: hatcl.Learning

    def compute_loss(self, model, inputs, return_outputs=False, **options):
        out = model(**inputs)
        loss = out.loss + self.learning.penalty() / self.args.gradient_accumulation_steps
        return (loss, out) if return_outputs else loss


def bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=50, num_labels=3, **sizes)
    return hatcl.convert(transformers.BertForSequenceClassification(config), 2, BATCH)


def train(model, task, folder, *, start=0, accumulate=1, **options):
    steps = 24 // accumulate
    args = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=8, num_train_epochs=4, save_strategy="steps", save_steps=6,
        report_to=[], learning_rate=1e-2, use_cpu=True, logging_strategy="no", disable_tqdm=True,
        gradient_accumulation_steps=accumulate,
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=Words(task))
    with hatcl.learn(model, task, trainer.create_optimizer(), steps, start=start) as trainer.learning:
        trainer.train(**options)
        assert trainer.learning.step == steps and trainer.learning.settled


def said(model, task):
    model.eval()
    with hatcl.task(model, task), torch.no_grad():
        return model(**BATCH).logits.clone()


def test_two_tasks_and_a_resumed_one(tmp_path):
    model = bert()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="task ")
        train(model, 0, tmp_path / "first")
        want = said(model, 0)
        train(model, 1, tmp_path / "second")
        assert same_bits(said(model, 0), want) and hatcl.certify(model, BATCH).exact
        resumed = bert()  # nothing is sealed in it: the state that the Trainer loads brings task 0 along
        train(
            resumed, 1, tmp_path / "second", start=12, resume_from_checkpoint=str(tmp_path / "second" / "checkpoint-12")
        )
    assert hatcl.tasks(resumed) == [0, 1] and hatcl.certify(resumed, BATCH).exact
    assert all(same_bits(said(resumed, t), said(model, t)) for t in (0, 1))


def test_accumulation(tmp_path):
    model = bert()
    train(model, 0, tmp_path / "first", accumulate=2)
    want = said(model, 0)
    train(model, 1, tmp_path / "second", accumulate=2)
    assert same_bits(said(model, 0), want) and hatcl.certify(model, BATCH).exact
