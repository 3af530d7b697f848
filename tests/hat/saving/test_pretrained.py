"""Saving and loading: bit for bit, in another process too, and nothing that was damaged is loaded."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import layer_zoo as zoo
import parts
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import hatcl
from hatcl.files import sha256_of
from hatcl.hat.digests import check_sealed, record, task_digests
from hatcl.hat.gates import gates_of
from hatcl.hat.saving import headers, pretrained
from hatcl.hat.saving.pretrained import read_config

ROOT = Path(__file__).parents[3]
FILES = ["README.md", "config.json", "model.safetensors"]
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
    assert sorted(os.listdir(folder)) == FILES and os.listdir(tmp_path) == ["model"]
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
    assert read_config(folder)["tied"] == {"out.weight": "embedding.weight"}
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
        patch.setattr("hatcl.hat.saving.pretrained.save_file", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            hatcl.save_pretrained(other, folder)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: os.read(-1, 1))
        with pytest.raises(hatcl.errors.IntegrityError, match=r"model.safetensors: could not be written .*disk full\?"):
            hatcl.save_pretrained(other, folder)
    assert os.listdir(tmp_path) == ["saved"] and sorted(os.listdir(folder)) == FILES
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
    with pytest.raises(hatcl.HATError, match=r"put together by hand, not converted; save model.state_dict\(\) instead"):
        saved(tmp_path, model)
    parts.pretend(model)
    again = nn.Sequential(hatcl.HATLinear(3, 4, num_tasks=2))
    again.load_state_dict(model.state_dict())
    x = torch.randn(2, 3)
    assert equal(outputs(again, x), outputs(model, x)) and hatcl.certify(again, x).exact


# ---- what must not be loaded ----------------------------------------------------------------------


def load(folder):
    return hatcl.from_pretrained(folder, base=parts.plain("mlp"))


def rewritten(folder, change=lambda tensors: None, about=lambda meta: None, sign=True):
    """Change tensors and config in a saved file, as somebody would who knows how it is written."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    with safe_open(file, "pt") as f:
        meta = json.loads(f.metadata()["hatcl"])
    change(tensors)
    old = meta.pop("fingerprint")
    about(meta)
    text = pretrained._signed(meta) if sign else json.dumps({**meta, "fingerprint": old})
    save_file(tensors, file, {"hatcl": text})


def test_a_missing_file(tmp_path):
    folder, _ = saved(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(hatcl.IntegrityError, match="model.safetensors: no such file; expected a folder written by"):
        load(folder)
    with pytest.raises(hatcl.IntegrityError, match="model.safetensors: no such file"):
        hatcl.from_pretrained(folder, sha256="0" * 64)


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
    file = folder / "model.safetensors"
    whole, rng = file.read_bytes(), random.Random(0)
    for size in sorted({0, 1, 2, 8, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(30))}):
        file.write_bytes(whole[:size])
        with pytest.raises(hatcl.IntegrityError, match="model.safetensors: .*truncated"):
            load(folder)
    file.write_bytes(whole)
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
    """Any node of the header's JSON taken out or replaced, by somebody who signs it anew: who does that to the map can
    make another model, which only a checksum kept elsewhere finds."""
    folder, model = saved(tmp_path)
    x = parts.images("mlp")
    want, whole = outputs(model, x), read_config(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
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
            save_file(tensors, file, {"hatcl": pretrained._signed(edited)})
            try:
                again = load(folder)
            except hatcl.HATError:
                refused += 1
                continue
            assert path[0] == "map" or equal(outputs(again, x), want), (path, change)
    assert refused > 100


@pytest.mark.parametrize("change", [
    lambda meta: meta["config"].update(penalty_weight=0.1),
    lambda meta: meta["map"].clear(), lambda meta: meta["map"]["entries"][2].update(standardised=-3),
    lambda meta: meta.update(source={"kind": "timm", "name": "resnet18", "options": {}}),
    lambda meta: meta.update(format=1),
])  # fmt: skip
def test_an_edited_header_is_noticed(tmp_path, change):
    folder, _ = saved(tmp_path)
    rewritten(folder, about=change, sign=False)
    with pytest.raises(
        hatcl.IntegrityError, match="model.safetensors: its config is not as .* wrote it .its fingerpri"
    ):
        load(folder)


@pytest.mark.parametrize("key", sorted(pretrained.KEYS))
def test_a_header_that_lacks_something(tmp_path, key):
    folder, _ = saved(tmp_path)
    file = folder / "model.safetensors"
    with safe_open(file, "pt") as f:
        meta = json.loads(f.metadata()["hatcl"])
    del meta[key]
    save_file(load_file(file), file, {"hatcl": json.dumps(meta)})
    with pytest.raises(
        hatcl.IntegrityError, match=f"model.safetensors: its config lacks {key}; expected what hatcl.sav"
    ):
        load(folder)


@pytest.mark.parametrize("header, text", [
    (None, "its header says nothing of hatcl; expected what hatcl.save_pretrained wrote, as it wrote it"),
    ({"hatcl": "{"}, r"cannot be read as JSON \(Expecting property name"),
    ({"hatcl": "[" * 50_000}, "cannot be read as JSON .it is nested too deeply"),
    ({"hatcl": "[]"}, "holds a JSON list, expected dict"),
])  # fmt: skip
def test_a_header_of_something_else(tmp_path, header, text):
    folder, _ = saved(tmp_path)
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", header)
    with pytest.raises(hatcl.IntegrityError, match=f"model.safetensors:? {text}"):
        load(folder)


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
    rewritten(folder, change, lambda meta: meta["dtypes"].update(extra="float32"))
    with pytest.raises(hatcl.IntegrityError, match=text):
        load(folder)


def test_a_tampered_tensor_is_named(tmp_path):
    folder, _ = saved(tmp_path)
    rewritten(folder, lambda tensors: tensors.update({"4.weight": tensors["4.weight"] + 1}))
    with pytest.raises(hatcl.IntegrityError, match="task 0 was sealed, but 1 of what it uses changed since: 4.weight"):
        load(folder)


def as_float64(tensors):
    tensors["4.weight"] = tensors["4.weight"].double() + 1


def test_another_dtype_is_refused(tmp_path):
    folder, _ = saved(tmp_path)
    rewritten(folder, as_float64)
    with pytest.raises(hatcl.IntegrityError, match=(
        r"model.safetensors: 4.weight is float64, but was saved as float32 \(1 such tensors\); the file was edited. To "
        "change a model's dtype, load it, cast it .model.half..., and save it again"
    )):  # fmt: skip
        load(folder)
    rewritten(folder, about=lambda meta: meta["dtypes"].pop("1.weight"))
    with pytest.raises(hatcl.IntegrityError, match="1.weight is float32, but was saved as not there"):
        load(folder)


def test_another_dtype_is_refused_also_where_the_config_says_so(tmp_path):
    folder, _ = saved(tmp_path)
    rewritten(folder, as_float64, lambda meta: meta["dtypes"].update({"4.weight": "float64"}))
    with pytest.raises(hatcl.IntegrityError, match=(
        r"model.safetensors: task 0 uses 4.weight, of which there is no digest in the dtype that it has \(1 such"
    )):  # fmt: skip
        load(folder)


def test_twin_without_the_dtypes_changed_weights_are_certified(tmp_path, monkeypatch):
    """What was so before: a cast model's digests are taken anew, and nobody asked whether it was cast."""
    folder, model = saved(tmp_path)
    rewritten(folder, as_float64)
    monkeypatch.setattr(pretrained, "_check_dtypes", lambda *args: None)

    def cast_or_not(model, stored, path):
        gates_of(model)[0].digests = {int(t): d for t, d in stored.items()}
        check_sealed(model)

    monkeypatch.setattr(pretrained, "_check_digests", cast_or_not)
    again, x = load(folder), parts.images("mlp")
    assert not equal(outputs(again.float(), x), outputs(model, x)) and hatcl.certify(again, x).exact


def half_task(meta):
    del meta["digests"]["1"]


def one_name(meta):
    del meta["digests"]["1"]["4.weight"]


@pytest.mark.parametrize("change, text", [
    (half_task, r"task 1 is sealed, but the digests of what it uses are not there \(1 such tasks\); the file was e"),
    (lambda meta: meta["digests"].clear(), r"task 0 is sealed, but the digests .* \(3 such tasks\)"),
    (lambda meta: meta["digests"].update({"0": {}}), "task 0 is sealed, but the digests of what it uses are not there"),
    (lambda meta: meta.update(digests=[]), "it does not make a model .AttributeError"),
    (one_name, r"task 1 uses 4.weight, of which there is no digest in the dtype that it has \(1 such names\)"),
    (lambda meta: meta["digests"]["0"].update(more="x:1"), "task 0 was sealed, but 1 of what it uses changed .*: more"),
])  # fmt: skip
def test_digests_are_required(tmp_path, change, text):
    folder, _ = saved(tmp_path)
    rewritten(folder, about=change)
    with pytest.raises(hatcl.IntegrityError, match=text):
        load(folder)


def test_twin_digests_that_are_not_required(tmp_path, monkeypatch):
    folder, model = saved(tmp_path)
    rewritten(folder, lambda tensors: tensors.update({"4.weight": tensors["4.weight"] + 1}), one_name)
    rewritten(folder, about=lambda meta: [meta["digests"][t].pop("4.weight", None) for t in "02"])
    monkeypatch.setattr(pretrained, "_check_digests", lambda model, stored, path: None)
    x = parts.images("mlp")
    assert not equal(outputs(load(folder), x), outputs(model, x))


def test_every_task_is_saved_with_digests_also_one_sealed_by_hand(tmp_path):
    model = parts.pretend(parts.converted("mlp"))
    gates_of(model)[0].digests.clear()
    folder, _ = saved(tmp_path, model)
    stored = read_config(folder)["digests"]
    assert stored == {str(t): task_digests(model, t) for t in range(3)}
    assert gates_of(load(folder))[0].digests == {int(t): d for t, d in stored.items()}


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.double(), lambda m: m.bfloat16()])
def test_a_model_that_was_cast_loads_as_it_was_saved(tmp_path, cast):
    model = cast(parts.pretend(parts.converted("mlp")))
    folder, _ = saved(tmp_path, model)
    again = load(folder)
    assert {n: t.dtype for n, t in again.state_dict().items()} == {n: t.dtype for n, t in model.state_dict().items()}
    assert hatcl.certify(again, parts.images("mlp").to(next(model.parameters()).dtype)).exact


# ---- the checksum kept elsewhere -------------------------------------------------------------------


def forged(folder):
    """All that is in the file, changed consistently: nothing inside of it can tell."""
    model = load(folder)
    with torch.no_grad():
        model[4]._parameters["weight"] += 1
    for t in hatcl.tasks(model):
        record(model, t)
    hatcl.save_pretrained(model, folder)


def test_a_checksum_finds_what_digests_cannot(tmp_path):
    folder, model = saved(tmp_path)
    checksum, x = sha256_of(folder / "model.safetensors"), parts.images("mlp")
    for given in (checksum, checksum.upper()):
        again = hatcl.from_pretrained(folder, base=parts.plain("mlp"), sha256=given)
        assert equal(outputs(again, x), outputs(model, x))
    forged(folder)
    assert not equal(outputs(load(folder), x), outputs(model, x))  # the twin: without the checksum it loads
    with pytest.raises(hatcl.IntegrityError, match=(
        f"model.safetensors: its SHA-256 is {sha256_of(folder / 'model.safetensors')}, expected {checksum}; this is "
        "not the file that the checksum was taken of, and it was not read"
    )):  # fmt: skip
        hatcl.from_pretrained(folder, base=parts.plain("mlp"), sha256=checksum)


def test_another_file_is_not_even_opened_by_safetensors(tmp_path, monkeypatch):
    folder, _ = saved(tmp_path)
    monkeypatch.setattr(headers, "safe_open", lambda *args: pytest.fail("opened"))
    with pytest.raises(hatcl.IntegrityError, match="its SHA-256 is"):
        hatcl.from_pretrained(folder, base=parts.plain("mlp"), sha256="0" * 64)


def exchanging(folder, monkeypatch, name, times):
    """Somebody puts another file there after that function, so many times."""
    real, left = getattr(pretrained, name), [times]

    def then_exchanged(*args, **options):
        found = real(*args, **options)
        if left[0]:
            left[0] -= 1
            with monkeypatch.context() as patch:
                patch.setattr(pretrained, name, real)
                forged(folder)
        return found

    monkeypatch.setattr(pretrained, name, then_exchanged)


def test_a_file_that_is_exchanged_after_its_checksum_was_taken(tmp_path, monkeypatch):
    folder, model = saved(tmp_path)
    checksum = sha256_of(folder / "model.safetensors")
    exchanging(folder, monkeypatch, "sha256_of", 1)
    with pytest.raises(hatcl.IntegrityError, match="its SHA-256 is"):
        hatcl.from_pretrained(folder, base=parts.plain("mlp"), sha256=checksum)


def test_a_file_that_is_replaced_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    folder, model = saved(tmp_path)
    x = parts.images("mlp")
    exchanging(folder, monkeypatch, "read_with_header", 2)
    again = load(folder)
    monkeypatch.undo()
    assert equal(outputs(again, x), outputs(load(folder), x)) and not equal(outputs(again, x), outputs(model, x))


@pytest.mark.parametrize("test, breaks", [
    (test_a_file_that_is_replaced_while_it_is_read_is_read_again, AssertionError),
    (test_a_file_that_is_exchanged_after_its_checksum_was_taken, pytest.fail.Exception),
])  # fmt: skip
def test_twin_a_file_that_is_read_once(tmp_path, monkeypatch, test, breaks):
    monkeypatch.setattr(pretrained, "_stamp", lambda path: (1,))
    with pytest.raises(breaks):
        test(tmp_path, monkeypatch)


def test_a_file_that_is_replaced_all_the_time(tmp_path, monkeypatch):
    folder, _ = saved(tmp_path)
    monkeypatch.setattr(pretrained, "TRIES", 3)
    exchanging(folder, monkeypatch, "read_with_header", 3)
    with pytest.raises(hatcl.IntegrityError, match=(
        "model.safetensors: was replaced 3 times while it was read; load it when the process that saves there is done"
    )):  # fmt: skip
        load(folder)


# ---- the copy to look at ---------------------------------------------------------------------------


def test_the_copy_is_what_the_header_says(tmp_path):
    folder, _ = saved(tmp_path)
    with safe_open(folder / "model.safetensors", "pt") as f:
        assert f.metadata() == {"hatcl": (folder / "config.json").read_text()}


EDITED = (
    "config.json is not as it was saved, which changes nothing: it is a copy to look at, and what counts is the "
    "header of model.safetensors. To change options, load the model, set hatcl.hat.gates.gates_of(model)[0].config, "
    "and save it again"
)


@pytest.mark.parametrize("change", [
    lambda text: text.replace('"penalty_weight": 0.75', '"penalty_weight": 0.1'), lambda text: text[:50],
    lambda text: "[" * 50_000, lambda text: "",
])  # fmt: skip
def test_an_edited_copy_changes_nothing_and_is_warned_of(tmp_path, change):
    folder, model = saved(tmp_path)
    text = (folder / "config.json").read_text()
    assert change(text) != text
    (folder / "config.json").write_text(change(text))
    with pytest.warns(UserWarning, match=re.escape(EDITED)) as told:
        again = load(folder)
    assert told[0].filename == __file__  # whoever called from_pretrained
    assert gates_of(again)[0].config == gates_of(model)[0].config
    assert equal(outputs(again, parts.images("mlp")), outputs(model, parts.images("mlp")))


def test_options_are_changed_by_saving_again(tmp_path):
    """As the warning says."""
    folder, model = saved(tmp_path)
    gates_of(model)[0].config = gates_of(model)[0].config.replace(penalty_weight=0.1)
    hatcl.save_pretrained(model, folder)
    assert gates_of(load(folder))[0].config.penalty_weight == 0.1
    rewritten(folder, about=lambda meta: meta["config"].update(penalty_wait=0.1))
    with pytest.raises(hatcl.ConfigError, match="no option 'penalty_wait'; did you mean 'penalty_weight'"):
        load(folder)


@pytest.mark.parametrize("copied", ["none", "of another save"])
def test_a_copy_that_is_not_there_or_of_another_save_is_no_edit(tmp_path, copied):
    folder, model = saved(tmp_path)
    (folder / "config.json").unlink()
    if copied == "of another save":
        other = parts.pretend(hatcl.convert(parts.mlp(act=nn.Sigmoid), 3, parts.images("mlp")))
        os.replace(hatcl.save_pretrained(other, tmp_path / "other") / "config.json", folder / "config.json")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = load(folder)
    assert equal(outputs(again, parts.images("mlp")), outputs(model, parts.images("mlp")))


# ---- one rename is one state -----------------------------------------------------------------------


def two_models():
    """With other weights, another map and other widths: halves of both make no model."""
    a = parts.pretend(parts.converted("mlp"))
    return a, parts.pretend(hatcl.convert(parts.plain("mlp"), 2, parts.images("mlp"), num_classes=[2, 5]), seed=5)


def test_a_kill_between_the_renames_leaves_the_new_model(tmp_path, monkeypatch):
    a, b = two_models()
    folder, x = hatcl.save_pretrained(a, tmp_path / "saved"), parts.images("mlp")
    real = os.replace

    def killed(old, new):
        if Path(new).name == "config.json":
            raise KeyboardInterrupt
        real(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            hatcl.save_pretrained(b, folder)
    assert equal(outputs(load(folder), x), outputs(b, x))


def test_twin_a_config_of_its_own_is_two_states(tmp_path, monkeypatch):
    real = pretrained._read_model

    def apart(path, *args, **options):
        return pretrained._as_written((path.parent / "config.json").read_text(), path), real(path, *args, **options)[1]

    monkeypatch.setattr(pretrained, "_read_model", apart)
    with pytest.raises(hatcl.HATError):
        test_a_kill_between_the_renames_leaves_the_new_model(tmp_path, monkeypatch)


def test_processes_that_save_into_one_folder_and_one_that_reads(tmp_path):
    models, x = two_models(), parts.images("mlp")
    want, folder = [outputs(m, x) for m in models], tmp_path / "saved"
    hatcl.save_pretrained(models[0], folder)
    children = [os.fork() or saving(m, folder, 30) for m in models]
    reads = 0
    while children:
        got = outputs(load(folder), x)
        assert any(equal(got, w) for w in want)
        reads += 1
        for child in list(children):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                children.remove(child)
                assert status == 0
    assert reads > 3 and sorted(os.listdir(folder)) == FILES


def saving(model, folder, times):
    """In a forked process, which ends here."""
    code = 1
    try:
        for _ in range(times):
            hatcl.save_pretrained(model, folder)
        code = 0
    finally:
        os._exit(code)


def test_a_process_killed_while_it_saves_leaves_a_model_that_loads(tmp_path):
    models, x = two_models(), parts.images("mlp")
    want, folder, rng = [outputs(m, x) for m in models], tmp_path / "saved", random.Random(0)
    hatcl.save_pretrained(models[0], folder)
    kills = interrupted = 0
    while kills < 30 or not interrupted:  # a busy machine may not let a child write before it is killed
        kills += 1
        child = os.fork() or saving(models[kills % 2], folder, 10**6)
        time.sleep(rng.random() * 0.05 * (1 + kills // 30))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        got = outputs(load(folder), x)
        assert any(equal(got, w) for w in want)
        assert len(os.listdir(folder)) <= len(FILES) + 3  # what the last killed one left
        interrupted += len(os.listdir(folder)) > len(FILES)
        assert kills < 300, "no kill met a process that was writing"
    hatcl.save_pretrained(models[0], folder)
    assert sorted(os.listdir(folder)) == FILES


def test_a_class_of_ones_own_needs_its_base(tmp_path):
    folder, _ = saved(tmp_path)
    with pytest.raises(hatcl.IntegrityError, match="its model class is your own; pass base= an instance of the plain"):
        hatcl.from_pretrained(folder)
    with pytest.raises(hatcl.HATError):
        hatcl.from_pretrained(folder, base=parts.plain("vit"))


def test_a_newer_format_is_refused(tmp_path):
    folder, _ = saved(tmp_path)
    rewritten(folder, about=lambda meta: meta.update(format=99))
    with pytest.raises(hatcl.IntegrityError, match="format 99, this hatcl reads up to 3; install a newer hatcl"):
        load(folder)


def test_load_state_dict_says_what_does_not_fit():
    model = parts.converted("mlp")
    state = model.state_dict()
    state.pop("1.weight")
    with pytest.raises(RuntimeError, match="Missing key.*1.weight"):
        model.load_state_dict(state)


def test_a_run_keeps_its_config(tmp_path):
    model = hatcl.convert(parts.plain("mlp"), 2, parts.images("mlp", 2))
    (tmp_path / "config.json").write_text('{"command": "train", "options": {}}')
    with pytest.raises(hatcl.ConfigError, match="a run of hatcl, whose config.json would be replaced; name"):
        hatcl.save_pretrained(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("base, text", [
    (nn.Sequential, r"base= got the class Sequential, expected an instance; pass Sequential\(...\)"),
    ("mlp", "base= got str, expected the plain module"),
    (lambda: parts.converted("mlp"), "base= got a HAT model, expected the plain module, as it was bef"),
    (lambda: parts.plain("resnet"), "is another model than the one that was converted"),
    (lambda: nn.Sequential(nn.Flatten(), nn.Linear(48, 9)), "is another model than the one that was converted"),
])  # fmt: skip
@pytest.mark.parametrize("reader", ["from_pretrained", "load_extracted"])
def test_a_base_that_is_not_the_plain_module(tmp_path, reader, base, text):
    model = parts.pretend(parts.converted("mlp"))
    if reader == "load_extracted":
        hatcl.extract_task(model, 0, parts.images("mlp")).save(tmp_path)
        text = text if "got" in text else "base"
    else:
        hatcl.save_pretrained(model, tmp_path)
    base = base() if callable(base) and not isinstance(base, type) else base
    with pytest.raises(hatcl.IntegrityError, match=text):
        getattr(hatcl, reader)(tmp_path, base=base)


def test_a_loaded_model_says_that_no_task_is_active(tmp_path):
    """The plain network's numbers are no task's, and nothing else would show it."""
    folder, x = hatcl.save_pretrained(parts.pretend(parts.converted("mlp")), tmp_path), parts.images("mlp")
    for read in (lambda m: copy.deepcopy(m)(x), lambda m: m(x)):
        model = load(folder)
        with pytest.warns(
            UserWarning, match=r"no task is active, .* the sealed tasks \[0, 1, 2\]: .*hatcl.task\(model, 0"
        ):
            read(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)  # it is said once
        for choose in (lambda m: hatcl.set_task(m, None), lambda m: hatcl.set_task(m, 1)):
            model = load(folder)
            choose(model)
            model(x)
        model = load(folder)
        print(hatcl.describe(model), hatcl.certify(model, x), hatcl.extract_task(model, 1, x).report)
        hatcl.forward(model, x, tasks=[0] * len(x)), hatcl.save_pretrained(model, tmp_path / "again")
        hatcl.forget_task(model, 2), hatcl.add_tasks(model, 1)
