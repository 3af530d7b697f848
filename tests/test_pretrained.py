"""Saving and loading: bit for bit, in another process too, and nothing that was damaged is loaded."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import layer_zoo as zoo
import parts
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import hatcl
from hatcl.gates import gates_of

ROOT = Path(__file__).parents[1]
RESNET = {"num_classes": parts.CLASSES, "channels": (8, 12, 12, 16), "stem_width": 8}


def outputs(model, x):
    return {t: parts.logits(model, t, x) for t in hatcl.tasks(model)}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[t], b[t]) for t in a)


@pytest.mark.parametrize("name", [*parts.MODELS, *zoo.ZOO])
def test_there_and_back(name, tmp_path):
    if name.startswith("transformers_"):
        pytest.importorskip("transformers", reason="needs the extra: pip install 'hatcl[hf]'")
    if name in parts.MODELS:
        base, x = parts.plain(name), parts.images(name)
    else:
        base, x = zoo.make(name), zoo.data(name)[0]
    model = parts.pretend(hatcl.convert(base, 3, x, config={"penalty_weight": 0.5, "locked": [0, 2]}), tasks=[0, 2])
    want, state = outputs(model, x), parts.snapshot(model)
    folder = hatcl.save_pretrained(model, tmp_path / "model")
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"] and os.listdir(tmp_path) == ["model"]
    assert parts.same(state, parts.snapshot(model))
    other = zoo.make(name, seed=9) if name in zoo.ZOO else parts.plain(name, seed=9)
    before = parts.snapshot(other)
    again = hatcl.from_pretrained(folder, base=other)
    assert parts.same(before, other.state_dict())
    assert not again.training and hatcl.tasks(again) == [0, 2]
    assert equal(outputs(again, x), want)
    assert gates_of(again)[0].config == gates_of(model)[0].config
    assert torch.equal(parts.logits(again, None, x), parts.logits(model, None, x))


def saved(tmp_path, model=None):
    model = model or parts.pretend(parts.converted("mlp"))
    return hatcl.save_pretrained(model, tmp_path / "saved"), model


def test_a_timm_model_is_made_again_in_another_process(tmp_path):
    model = parts.pretend(timm.create_model("hat_test_resnet", num_tasks=2, **RESNET))
    x = parts.images("resnet")
    hatcl.save_pretrained(model, tmp_path / "model")
    code = (
        "import sys, hashlib; sys.path.insert(0, 'tests')\n"
        "import parts, hatcl\n"
        f"model = hatcl.from_pretrained({str(tmp_path / 'model')!r})\n"
        "x = parts.images('resnet')\n"
        "for t in hatcl.tasks(model):\n"
        "    print(hashlib.sha256(parts.logits(model, t, x).numpy().tobytes()).hexdigest())\n"
        "print(hatcl.certify(model, x).exact)\n"
    )
    env = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": "", "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env)
    here = [hashlib.sha256(parts.logits(model, t, x).numpy().tobytes()).hexdigest() for t in (0, 1)]
    assert done.stdout.split() == [*here, "True"], done.stderr


@pytest.mark.parametrize("name", parts.MODELS)
def test_learning_goes_on_after_loading_with_the_same_bits(name, tmp_path):
    model, x = parts.converted(name), parts.images(name)
    parts.train(model, 0, torch.optim.SGD(model.parameters(), 0.1), parts.problem(parts.shape_of(name), 0), 4)
    again = hatcl.from_pretrained(hatcl.save_pretrained(model, tmp_path / "m"), base=parts.plain(name)).train()
    for m in (model, again):
        optimizer = torch.optim.AdamW(m.parameters(), lr=1e-2, weight_decay=0.05)
        parts.train(m, 1, optimizer, parts.problem(parts.shape_of(name), 1), 4)
    assert equal(outputs(model, x), outputs(again, x))
    assert parts.same(parts.snapshot(model), parts.snapshot(again))


def test_widths_added_tasks_and_other_types_survive(tmp_path):
    x = parts.images("mlp")
    model = hatcl.convert(parts.plain("mlp"), 3, x, num_classes=[2, 5, 3])
    hatcl.add_tasks(model, 1)
    model.to(torch.bfloat16)
    parts.pretend(model)
    want = outputs(model, x.bfloat16())
    assert [w.shape[1] for w in want.values()] == [2, 5, 3, 4]
    again = hatcl.from_pretrained(hatcl.save_pretrained(model, tmp_path / "m"), base=parts.plain("mlp"))
    assert equal(outputs(again, x.bfloat16()), want)
    assert next(again.parameters()).dtype == torch.bfloat16
    assert gates_of(again)[0].scale.dtype == torch.float32


def test_tied_weights_are_written_once_and_stay_tied(tmp_path):
    x, _ = zoo.data("tied")
    model = parts.pretend(hatcl.convert(zoo.make("tied"), 2, x))
    folder = hatcl.save_pretrained(model, tmp_path / "m")
    tied = json.loads((folder / "config.json").read_text())["tied"]
    assert tied == {"out.weight": "embedding.weight"}
    assert "out.weight" not in load_file(folder / "model.safetensors")
    again = hatcl.from_pretrained(folder, base=zoo.make("tied", seed=5))
    assert again.out._parameters["weight"] is again.embedding._parameters["weight"]
    assert equal(outputs(again, x), outputs(model, x))


def test_a_save_replaces_the_last_one_and_a_failed_save_does_not(tmp_path, monkeypatch):
    folder, model = saved(tmp_path)
    x = parts.images("mlp")
    want = outputs(model, x)
    other = parts.pretend(parts.converted("mlp"), seed=5)
    with monkeypatch.context() as patch:
        patch.setattr("hatcl.pretrained.save_file", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            hatcl.save_pretrained(other, folder)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: os.read(-1, 1))
        with pytest.raises(hatcl.errors.IntegrityError, match=r"model.safetensors: could not be written .*disk full\?"):
            hatcl.save_pretrained(other, folder)
    assert os.listdir(tmp_path) == ["saved"] and sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    assert equal(outputs(hatcl.from_pretrained(folder, base=parts.plain("mlp")), x), want)
    hatcl.save_pretrained(other, folder)
    assert equal(outputs(hatcl.from_pretrained(folder, base=parts.plain("mlp")), x), outputs(other, x))


def test_a_model_that_changed_is_not_saved(tmp_path):
    model = parts.pretend(parts.converted("mlp"))
    with torch.no_grad():
        model[1]._parameters["weight"] += 1
    with pytest.raises(hatcl.IntegrityError, match="task 0 was sealed, but .* changed since: 1.weight"):
        saved(tmp_path, model)
    assert os.listdir(tmp_path) == []


def test_layers_by_hand_are_told_to_save_their_state(tmp_path):
    model = nn.Sequential(hatcl.HATLinear(3, 4, num_tasks=2))
    with pytest.raises(ValueError, match=r"put together by hand, not converted; save model.state_dict\(\) instead"):
        saved(tmp_path, model)
    parts.pretend(model)
    again = nn.Sequential(hatcl.HATLinear(3, 4, num_tasks=2))
    again.load_state_dict(model.state_dict())
    x = torch.randn(2, 3)
    assert equal(outputs(again, x), outputs(model, x)) and hatcl.certify(again, x).exact


# ---- what must not be loaded ----------------------------------------------------------------------


def load(folder):
    return hatcl.from_pretrained(folder, base=parts.plain("mlp"))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file(tmp_path, name):
    folder, _ = saved(tmp_path)
    (folder / name).unlink()
    with pytest.raises(hatcl.IntegrityError, match=f"{name}: no such file; expected a folder written by"):
        load(folder)


def test_a_pickle_in_place_of_safetensors(tmp_path):
    folder, model = saved(tmp_path)
    for new in (True, False):
        torch.save(model.state_dict(), folder / "model.safetensors", _use_new_zipfile_serialization=new)
        with pytest.raises(
            hatcl.IntegrityError, match="a pickle .*expected a safetensors file; hatcl does not load pickle"
        ):
            load(folder)


def test_a_truncated_file_of_any_length(tmp_path):
    folder, _ = saved(tmp_path)
    for name in ("config.json", "model.safetensors"):
        whole = (folder / name).read_bytes()
        rng = random.Random(0)
        for size in sorted({0, 1, 2, 8, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(30))}):
            (folder / name).write_bytes(whole[:size])
            with pytest.raises(hatcl.IntegrityError, match=f"{name}: .*(truncated|lacks)"):
                load(folder)
        (folder / name).write_bytes(whole)
    assert load(folder)


def test_bits_that_flipped_are_noticed_or_harmless(tmp_path):
    """One random bit at a time: refused, or every sealed task's outputs are what they were."""
    folder, model = saved(tmp_path)
    x = parts.images("mlp")
    want, whole = outputs(model, x), (folder / "model.safetensors").read_bytes()
    rng, refused = random.Random(1), 0
    for i in range(150):
        at = rng.randrange(len(whole)) if i % 3 else rng.randrange(2500)  # a third of them in the header
        flipped = bytearray(whole)
        flipped[at] ^= 1 << rng.randrange(8)
        (folder / "model.safetensors").write_bytes(bytes(flipped))
        try:
            again = load(folder)
        except hatcl.HATError:
            refused += 1
            continue
        assert equal(outputs(again, x), want), f"bit in byte {at}"
    assert refused > 50


def nodes(x, path=()):
    yield path
    for key, value in x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else ():
        yield from nodes(value, (*path, key))


def test_an_edited_config_is_refused_or_harmless(tmp_path):
    """Any node of the JSON taken out or replaced."""
    folder, model = saved(tmp_path)
    x = parts.images("mlp")
    want, whole = outputs(model, x), json.loads((folder / "config.json").read_text())
    rng, refused = random.Random(2), 0
    places = [p for p in nodes(whole) if p]
    for path in rng.sample(places, min(len(places), 150)):
        for change in ("delete", None, -3, "what", [], {}):
            edited = copy.deepcopy(whole)
            inner = edited
            for key in path[:-1]:
                inner = inner[key]
            if change == "delete":
                del inner[path[-1]]
            else:
                inner[path[-1]] = change
            (folder / "config.json").write_text(json.dumps(edited))
            try:
                again = load(folder)
            except hatcl.HATError:
                refused += 1
                continue
            assert equal(outputs(again, x), want), (path, change)
    assert refused > 100


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda t: t.pop("1.weight"), "1 tensors do not fit: missing 1.weight. Was the folder written for another"),
        (lambda t: t.update(extra=torch.zeros(2)), "1 tensors do not fit: unexpected extra"),
        (lambda t: t.update({"1.bias": torch.zeros(5)}), r"1.bias is \[5\], expected \[32\]"),
        (lambda t: t.update({"7.hat_tasks.0.weight": torch.zeros(4, 31)}), r"is \[4, 31\], expected \[4, 32\]"),
        (lambda t: t.pop("hat_gates.masks"), "missing hat_gates.masks"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, change, text):
    folder, _ = saved(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(hatcl.IntegrityError, match=text):
        load(folder)


def test_files_of_two_saves_do_not_mix(tmp_path):
    folder, _ = saved(tmp_path)
    x = parts.images("mlp")
    other = parts.pretend(hatcl.convert(parts.mlp(act=nn.Sigmoid), 3, x))
    apart = hatcl.save_pretrained(other, tmp_path / "other")
    os.replace(apart / "config.json", folder / "config.json")
    with pytest.raises(hatcl.IntegrityError, match="was written with another config.json than the one beside it"):
        load(folder)


def test_options_may_be_edited(tmp_path):
    folder, model = saved(tmp_path)
    meta = json.loads((folder / "config.json").read_text())
    meta["config"]["penalty_weight"] = 0.1
    (folder / "config.json").write_text(json.dumps(meta))
    assert gates_of(load(folder))[0].config.penalty_weight == 0.1
    meta["config"]["penalty_wait"] = 0.1
    (folder / "config.json").write_text(json.dumps(meta))
    with pytest.raises(hatcl.ConfigError, match="no option 'penalty_wait'; did you mean 'penalty_weight'"):
        load(folder)


def test_a_tampered_tensor_is_named(tmp_path):
    folder, _ = saved(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["4.weight"] = tensors["4.weight"] + 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(hatcl.IntegrityError, match="task 0 was sealed, but 1 of what it uses changed since: 4.weight"):
        load(folder)


def test_a_class_of_ones_own_needs_its_base(tmp_path):
    folder, _ = saved(tmp_path)
    with pytest.raises(hatcl.IntegrityError, match="its model class is your own; pass base= an instance of the plain"):
        hatcl.from_pretrained(folder)
    with pytest.raises(hatcl.HATError):
        hatcl.from_pretrained(folder, base=parts.plain("vit"))


def test_a_newer_format_is_refused(tmp_path):
    folder, _ = saved(tmp_path)
    meta = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**meta, "format": 99}))
    with pytest.raises(hatcl.IntegrityError, match="format 99, this hatcl reads up to 1; install a newer hatcl"):
        load(folder)


def test_load_state_dict_says_what_does_not_fit():
    model = parts.converted("mlp")
    state = model.state_dict()
    state.pop("1.weight")
    with pytest.raises(RuntimeError, match="Missing key.*1.weight"):
        model.load_state_dict(state)
