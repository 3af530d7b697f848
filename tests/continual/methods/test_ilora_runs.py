"""I-LoRA from run to run: each of its twelve options by its name on the command line, as its authors' code is called
once per task."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from command_parts import call  # noqa: E402
from continual_parts import bert, causal_lm, texts, tokenizer, write_texts  # noqa: E402

from hatcl.continual import make_method  # noqa: E402
from hatcl.continual.methods.ilora import InterpolatedLoRA  # noqa: E402
from hatcl.continual.tasks import ContinualTask  # noqa: E402
from hatcl.errors import SkillError  # noqa: E402
from hatcl.skills import ILoRAConfig  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
QUICK = ["--batch-size", "8", "--lr", "0.02", "--rank", "2", "--device", "cpu", "--max-output", "4", "--test", "4"]
MOVES = ["--set", "ema_alpha=0.8", "--set", "ilora_buffer_size=6", "--set", "samples=4"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ilora")
    for name, model in {"gpt2": causal_lm(), "bert": bert()}.items():
        model.save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    write_texts(folder / "a.json", texts(0, count=16))
    write_texts(folder / "b.json", texts(1, ("red", "green"), count=16))
    with pytest.MonkeyPatch.context() as m:
        m.chdir(folder)
        for model in ("gpt2", "bert"):
            learn(None, f"first_{model}", "a", model=model)
    return folder


@pytest.fixture
def here(made, monkeypatch):
    monkeypatch.chdir(made)
    return made


def learn(capsys, output, task, *more, model="gpt2", moves=MOVES):
    """One task by I-LoRA, as the command does it; the words of an error."""
    args = ["train", "--model", model, "--method", "ilora", "--task", f"{task}={task}.json", "--output", output]
    if capsys is not None:
        return call(capsys, *args, *QUICK, *moves, *more)
    with pytest.raises(SystemExit) as done:
        from hatcl import commands

        commands.main([str(a) for a in [*args, *QUICK, *moves, *more]])
    assert done.value.code == 0
    return None


def previous(model="gpt2"):
    return ["--set", f"previous_task_model=first_{model}", "--set", "prev_task_id=a"]


def stored(folder):
    return {n: t for n, t in load_file(folder / "adapter_model.safetensors").items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(t, b[n]) for n, t in a.items())


def test_the_twelve_names_are_options_of_the_method():
    ours = {f.name for f in dataclasses.fields(InterpolatedLoRA.Options)}
    assert {f.name for f in dataclasses.fields(ILoRAConfig)} < ours
    options = InterpolatedLoRA.Options(ema_alpha=0.5, prev_task_id="a")
    assert (
        type(options.config) is ILoRAConfig
        and options.config.to_dict() == ILoRAConfig(ema_alpha=0.5, prev_task_id="a").to_dict()
    )


def test_a_run_goes_on_from_the_run_before(here, capsys, monkeypatch):
    """The adapters begin where the other run ended, and its examples are learned again."""
    began, replayed = {}, []
    begin, sample = InterpolatedLoRA.begin, InterpolatedLoRA.loss

    def watched(self, model, stage):
        began.update({n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n})
        begin(self, model, stage)

    def loss(self, model, batch):
        replayed.append([self.tasks[i].train[k] for i, k in self.two.memory.examples])
        return sample(self, model, batch)

    monkeypatch.setattr(InterpolatedLoRA, "begin", watched)
    monkeypatch.setattr(InterpolatedLoRA, "loss", loss)
    code, _, err = learn(capsys, "second", "b", *previous(), "--set", "current_task_id=next")
    assert code == 0, err
    for kind, inside in (("default", ""), ("stable", "stable")):
        before = stored(here / "first_gpt2" / "tasks" / "0_a" / "adapter" / inside)
        assert before and all(torch.equal(began[n.replace(".weight", f".{kind}.weight")], t) for n, t in before.items())
    known = json.loads((here / "a.json").read_text())["train"]
    assert len(replayed[0]) == 6 and all(list(pair) in known for pair in replayed[0])
    about = json.loads((here / "second" / "tasks" / "0_b" / "ilora.json").read_text())
    assert about["config"]["current_task_id"] == "next" and about["config"]["prev_task_id"] == "a"
    memory = torch.load(here / "second" / "tasks" / "0_b" / "memory.pt", weights_only=True)
    assert {name for name, _ in memory["examples"]} <= {"a", "b"} and memory["seen"] == 32
    code, _, err = learn(capsys, "third", "a", "--set", "previous_task_model=second", "--set", "prev_task_id=next")
    assert code == 0, err
    code, _, err = learn(capsys, "never", "a", "--set", "previous_task_model=second", "--set", "prev_task_id=a")
    assert code == 2 and "no task 'a' of I-LoRA in second (no ilora.json); there are next" in err


def test_off_is_plain_training(here, capsys):
    off = ["--set", "use_ilora=false"]
    code, _, err = learn(capsys, "off", "a", *off, moves=[])
    assert code == 0, err
    task = here / "off" / "tasks" / "0_a"
    assert not (task / "ilora.json").exists() and not (task / "adapter" / "stable").exists()
    args = ["train", "--model", "gpt2", "--method", "sequential", "--task", "a=a.json", "--output", "sequential"]
    assert call(capsys, *args, *QUICK)[0] == 0
    assert same(stored(task / "adapter"), stored(here / "sequential" / "tasks" / "0_a" / "adapter"))
    code, _, err = learn(capsys, "never", "a", *off)
    assert code == 2 and "ema_alpha: got 0.8, which has no effect with use_ilora=False" in err


def test_the_stable_adapter_where_it_is_wanted_or_not_at_all(here, capsys):
    code, _, err = learn(capsys, "elsewhere", "a", "--set", "ema_adapter_path=kept/there")
    assert code == 0, err
    task = here / "elsewhere" / "tasks" / "0_a"
    assert same(stored(task / "kept" / "there"), stored(task / "adapter" / "stable"))
    assert json.loads((task / "ilora.json").read_text())["stable"]["path"] == "kept/there"
    code, _, err = learn(capsys, "without", "a", "--set", "save_ema_adapter=false")
    assert code == 0, err
    task = here / "without" / "tasks" / "0_a"
    assert not (task / "adapter" / "stable").exists() and not (task / "ilora.json").exists()
    code, _, err = learn(capsys, "never", "b", "--set", "previous_task_model=without", "--set", "prev_task_id=a")
    assert code == 2 and "no task 'a' of I-LoRA in without" in err


def test_a_run_that_was_killed_knows_the_run_before_again(here, capsys, monkeypatch):
    args = ["b", *previous()]
    assert learn(capsys, "whole", *args)[0] == 0
    end = InterpolatedLoRA.end

    def stopped(self, model, stage):
        raise SkillError("stopped here")

    monkeypatch.setattr(InterpolatedLoRA, "end", stopped)
    code, _, err = learn(capsys, "killed", *args)
    assert code == 2 and "stopped here" in err
    monkeypatch.setattr(InterpolatedLoRA, "end", end)
    assert call(capsys, "train", "--resume", "--output", "killed")[0] == 0
    for inside in ("adapter", "adapter/stable"):
        assert same(stored(here / "whole/tasks/0_b" / inside), stored(here / "killed/tasks/0_b" / inside))


def test_labels_that_another_run_knows_are_refused(here, capsys):
    """A label's word is the task's own: another task's would be learned as something else."""
    code, _, err = learn(capsys, "never", "b", *previous("bert"), model="bert")
    assert code == 2 and not (here / "never").exists()
    assert (
        "its memory holds examples of the task 'a', whose labels this run does not know; give the task as well" in err
    )
    code, _, err = learn(capsys, "known", "a", *previous("bert"), model="bert")
    assert code == 0, err


def test_one_name_for_several_tasks(here, capsys):
    code, _, err = learn(capsys, "never", "a", "--task", "b=b.json", "--set", "current_task_id=x")
    assert code == 2 and "current_task_id: got 'x' for 2 tasks, which have their own names; leave it out" in err


def test_examples_that_no_file_can_hold():
    task = ContinualTask("odd", [object()], list, lambda m, b: None, lambda m: 0.0)
    with pytest.raises(SkillError, match=r"the memory's examples \(object\) cannot be saved"):
        make_method("ilora").start(None, [task], 0)
