"""What I-LoRA saves: in peft's own format, byte for byte, all or nothing, and refused where it does not fit."""

from __future__ import annotations

import json
import shutil
from collections import UserDict

import pytest
import torch
from ilora_parts import batch_of, bert, disturb, plain_bert, same, state, texts
from safetensors.torch import load_file, save_file

from hatcl.errors import IntegrityError, SkillError
from hatcl.skills import ilora_files
from hatcl.skills.ilora import ILoRA
from hatcl.skills.switch import adapter_tensors

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

WEIGHTS = "adapter_model.safetensors"


def made(model=None, adapter=None, collate=None, **config):
    return ILoRA(bert() if model is None else model, {"use_ilora": True, **config}, adapter=adapter, collate=collate)


def learned(**config):
    """A task whose two adapters differ from each other and from a new model's."""
    ilora = made(**config)
    disturb(ilora.model, "default", seed=1)
    disturb(ilora.model, "stable", seed=2)
    ilora.remember(texts())
    ilora.steps, ilora.moves = 5, 4
    return ilora


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_next_tasks_stable_adapter_is_this_ones_byte_for_byte(tmp_path):
    first = learned(current_task_id="a").save(tmp_path)
    second = made(previous_task_model=tmp_path, prev_task_id="a", current_task_id="b", ema_alpha=1.0)
    second.step()
    at = second.save(tmp_path)
    assert (at / "ema_adapter" / WEIGHTS).read_bytes() == (first / "ema_adapter" / WEIGHTS).read_bytes()
    assert (at / "adapter" / WEIGHTS).read_bytes() == (first / "adapter" / WEIGHTS).read_bytes()
    assert (at / "memory.pt").stat().st_size > 0 and second.memory.seen == 6


def test_a_load_that_forgets_the_stable_adapter_is_found_out(tmp_path, monkeypatch):
    put = ilora_files._copy_in
    monkeypatch.setattr(ilora_files, "_copy_in", lambda m, name, t: put(m, name, t) if name == "default" else None)
    with pytest.raises(AssertionError):
        test_the_next_tasks_stable_adapter_is_this_ones_byte_for_byte(tmp_path)


@pytest.mark.parametrize(
    "lora",
    [{}, {"use_dora": True}, {"target_modules": ["word_embeddings", "query"]}, {"init_lora_weights": "pissa"}],
)
def test_peft_itself_reads_both_adapters(tmp_path, lora):
    ilora = made(bert(**lora))
    disturb(ilora.model, "stable")
    at = ilora.save(tmp_path / "task")
    batch = batch_of(texts())
    plastic = ilora.model.eval()(**batch).logits
    with ilora.stable_active():
        stable = ilora.model(**batch).logits
    for name, expected in (("adapter", plastic), ("ema_adapter", stable)):
        again = peft.PeftModel.from_pretrained(plain_bert(), at / name).eval()
        assert torch.equal(again(**batch).logits, expected)
    assert not torch.equal(plastic, stable)


def test_saving_again_gives_the_same_files_and_leaves_nothing_else(tmp_path):
    ilora = learned()
    once = content(ilora.save(tmp_path / "task"))
    assert content(ilora.save(tmp_path / "task")) == once
    assert [p.name for p in tmp_path.iterdir()] == ["task"] and ilora.model.peft_config[
        "default"
    ].inference_mode is False


@pytest.mark.parametrize("place", ["inside", "outside"])
def test_a_save_that_fails_leaves_the_old_content(tmp_path, monkeypatch, place):
    path = "ema_adapter" if place == "inside" else tmp_path / "out" / "slow"
    ilora = learned(ema_adapter_path=path)
    ilora.save(tmp_path / "runs" / "task")
    before = content(tmp_path)
    disturb(ilora.model, "stable")
    real, calls = ilora_files.save_file, []

    def full(*args, **kwargs):
        calls.append(args)
        if place == "outside" or len(calls) == 2:  # the stable adapter
            raise OSError("the disk is full")
        real(*args, **kwargs)

    monkeypatch.setattr(ilora_files, "save_file", full)
    with pytest.raises(OSError, match="the disk is full"):
        ilora.save(tmp_path / "runs" / "task")
    assert content(tmp_path) == before


def test_a_replacement_that_was_killed_between_its_moves_is_read(tmp_path):
    first = learned()
    at = first.save(tmp_path / "task")
    at.rename(tmp_path / ".task.old")
    second = made(previous_task_model=tmp_path / "task")
    assert same(dict(adapter_tensors(second.model, "stable")), dict(adapter_tensors(first.model, "stable")))


def test_the_only_task_in_a_folder_is_found(tmp_path):
    learned(current_task_id="a").save(tmp_path)
    shutil.copytree(tmp_path / "a", tmp_path / ".a.0123abcd-77-0123abcd.new")  # what a killed process left is no task
    assert made(previous_task_model=tmp_path).steps == 5
    ilora = made()
    ilora.load(tmp_path, "a")
    assert ilora.steps == 5 and ilora.moves == 4
    learned(current_task_id="b").save(tmp_path)
    with pytest.raises(SkillError, match="no task of I-LoRA in .*; there are a, b: name one with prev_task_id"):
        made(previous_task_model=tmp_path)


def test_going_on_within_the_first_task_it_stays_the_first(tmp_path):
    ilora = made(current_task_id="a")
    ilora.save(tmp_path)
    again = made(current_task_id="a")
    again.load(tmp_path)
    assert float(again.loss()) == 0
    with pytest.raises(SkillError, match="the memory is empty, although a task came before"):
        made(current_task_id="b", previous_task_model=tmp_path).loss()


def test_the_memory_keeps_mappings_of_other_kinds_as_dicts(tmp_path):
    ilora = made()
    ilora.remember([UserDict(texts(1)[0])])
    again = made(previous_task_model=ilora.save(tmp_path / "a"))
    assert type(again.memory.examples[0]) is dict


# --- refused, and then nothing is changed ---


def refused(kind, text, ilora, call):
    before, memory = state(ilora.model), ilora.memory.examples
    with pytest.raises(kind, match=text):
        call()
    assert same(state(ilora.model), before) and ilora.memory.examples == memory and ilora.steps == 0


def test_another_base_model(tmp_path):
    at = learned().save(tmp_path / "a")
    ilora = made(bert(seed=1))
    refused(
        SkillError, r"the task was learned on another base model \(digest \w{12}, now got \w{12}\)", ilora,
        lambda: ilora.load(at),
    )  # fmt: skip


def test_a_digest_that_sees_only_names_is_found_out(tmp_path, monkeypatch):
    monkeypatch.setattr(ilora_files, "base_digest", lambda model: str([n for n, _ in model.named_parameters()]))
    with pytest.raises(pytest.fail.Exception):
        test_another_base_model(tmp_path)


@pytest.mark.parametrize(
    "lora, text",
    [
        ({"r": 3}, "the adapter has r=2, this model's 'default' has 3; make the model's adapter with the options"),
        ({"lora_alpha": 8}, "the adapter has lora_alpha=4, this model's 'default' has 8"),
        ({"use_rslora": True}, "the adapter has use_rslora=False, this model's 'default' has True"),
        (
            {"target_modules": ["query"]},
            r"value.lora_A.weight is \[2, 16\] in the file, lacking in this model's 'default'",
        ),
        ({"target_modules": ["key", "query", "value"]}, r"key.lora_A.weight is lacking in the file, \[2, 16\] in this"),
    ],
)
def test_an_adapter_of_other_options(tmp_path, lora, text):
    at = learned().save(tmp_path / "a")
    ilora = made(bert(**lora))
    refused(SkillError, text, ilora, lambda: ilora.load(at))


def test_a_missing_previous_adapter(tmp_path):
    for folder, text in (
        ("none", r"no task of I-LoRA in .*none \(no ilora.json\); give the folder of ILoRA.save\(\)"),
        ("a", r"ema_adapter holds no adapter \(adapter_config.json and adapter_model.safetensors\); give the folder"),
    ):
        shutil.rmtree(learned().save(tmp_path / "a") / "ema_adapter")
        ilora = made()
        refused(SkillError, text, ilora, lambda: ilora.load(tmp_path / folder))  # noqa: B023
        model = bert()
        with pytest.raises(SkillError, match=text):
            made(model, previous_task_model=tmp_path / folder)
        assert list(model.peft_config) == ["default"] and same(state(model), state(bert()))
    with pytest.raises(SkillError, match="no task 'x' of I-LoRA in"):
        made(previous_task_model=tmp_path, prev_task_id="x")
    with pytest.raises(SkillError, match="nowhere holds no adapter"):
        made(prev_task_id="x", ema_adapter_path=tmp_path / "nowhere")


def test_a_stable_adapter_that_a_later_task_wrote_over(tmp_path):
    learned(current_task_id="a", ema_adapter_path=tmp_path / "slow").save(tmp_path / "runs")
    second = made(
        previous_task_model=tmp_path / "runs", prev_task_id="a", current_task_id="b", ema_adapter_path=tmp_path / "slow"
    )
    disturb(second.model, "stable")
    second.save(tmp_path / "runs")
    ilora = made()
    refused(
        IntegrityError, "slow: this is not the stable adapter that the task 'a' was saved with; it was overwritten or",
        ilora, lambda: ilora.load(tmp_path / "runs", "a"),
    )  # fmt: skip
    ilora.load(tmp_path / "runs", "b")


def test_a_stable_adapter_outside_that_was_moved_is_found_by_the_option(tmp_path):
    first = learned(ema_adapter_path=tmp_path / "slow")
    at = first.save(tmp_path / "a")
    (tmp_path / "slow").rename(tmp_path / "moved")
    second = made(previous_task_model=at, ema_adapter_path=tmp_path / "moved")
    assert same(dict(adapter_tensors(second.model, "stable")), dict(adapter_tensors(first.model, "stable")))


def test_damaged_files(tmp_path):
    def damage(name, write):
        at = learned().save(tmp_path / "a")
        write(at / name)
        return at

    cases = [
        ("ilora.json", lambda p: p.write_text("{"), "ilora.json cannot be read as JSON"),
        ("ilora.json", lambda p: p.write_text("{}"), "ilora.json does not have the format hatcl.ilora.2"),
        ("memory.pt", lambda p: p.write_bytes(b"x"), "memory.pt cannot be read as tensors and plain values"),
        ("memory.pt", lambda p: p.unlink(), "memory.pt cannot be read as tensors and plain values"),
        (f"adapter/{WEIGHTS}", lambda p: p.write_bytes(b"x"), "cannot be read as safetensors"),
        ("adapter/adapter_config.json", lambda p: p.write_text("{"), "adapter_config.json cannot be read as JSON"),
    ]
    for name, write, text in cases:
        at, ilora = damage(name, write), made()
        refused(IntegrityError, text, ilora, lambda at=at, ilora=ilora: ilora.load(at))


def test_a_changed_number_in_the_stable_adapter(tmp_path):
    at = learned(current_task_id="a").save(tmp_path)
    path = at / "ema_adapter" / WEIGHTS
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] += 1e-3
    save_file(tensors, path, metadata={"format": "pt"})
    ilora = made()
    refused(IntegrityError, "this is not the stable adapter that the task 'a'", ilora, lambda: ilora.load(at))


def test_a_memory_of_another_size(tmp_path):
    at = learned(ilora_buffer_size=4).save(tmp_path / "a")
    ilora = made(ilora_buffer_size=5)
    refused(SkillError, "the state belongs to a memory of 4 examples, this one has 5", ilora, lambda: ilora.load(at))


def test_what_cannot_be_saved(tmp_path):
    ilora = made()
    ilora.remember([object()])
    with pytest.raises(
        SkillError, match=r"the memory's examples \(object\) cannot be saved, so nothing was saved; remember"
    ):
        ilora.save(tmp_path / "a")
    ilora = made()
    adapter_tensors(ilora.model, "stable")["base_model.model.classifier.modules_to_save.bias"].data[0] = float("nan")
    with pytest.raises(
        SkillError, match="classifier.modules_to_save.bias of the adapter 'stable' is not finite; nothing was"
    ):
        ilora.save(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_else_in_it_is_not_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(
        SkillError, match="holds thesis.txt, expected a folder only for the task; name another, or give curr"
    ):
        made().save(tmp_path)
    with pytest.raises(SkillError, match="holds thesis.txt"):
        made(ema_adapter_path=tmp_path).save(tmp_path / "a")
    with pytest.raises(SkillError, match="thesis.txt is a file, expected a folder only for the"):
        made().save(tmp_path / "thesis.txt")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    made(current_task_id="a").save(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_the_record_is_plain_json(tmp_path):
    about = json.loads((learned(current_task_id="a").save(tmp_path) / "ilora.json").read_text())
    assert about["config"]["current_task_id"] == "a" and about["stable"]["path"] == "ema_adapter"
    assert (about["steps"], about["moves"]) == (5, 4)
