"""What torch.save wrote is read as tensors, and nothing in it is run."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from torch import nn
from vector_parts import Tied, moved, same, save

from hatcl.errors import IntegrityError
from hatcl.vectors.pickles import read_pickle
from hatcl.vectors.stream import compose_files
from hatcl.vectors.task_vector import TaskVector
from hatcl.vectors.tensors import named_tensors


def sharded(folder, model):
    folder.mkdir()
    state = model.state_dict()
    names = list(state)
    where = {}
    for i, part in enumerate((names[:4], names[4:])):
        file = f"pytorch_model-{i + 1:05d}-of-00002.bin"
        torch.save({n: state[n] for n in part}, folder / file)
        where |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def sources(model, folder):
    folder.mkdir()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    torch.save(model.state_dict(), folder / "old.pt", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, folder / "nested.ckpt")
    return [
        folder,
        folder / "pytorch_model.bin",
        folder / "old.pt",
        folder / "nested.ckpt",
        sharded(folder / "s", model),
    ]


def test_every_kind_of_file_gives_the_vector_of_the_model(pair, tmp_path):
    base, finetuned = pair
    want = TaskVector.between(base, finetuned)
    for start in (base, save(base, tmp_path / "base.safetensors")):
        for source in sources(finetuned, tmp_path / f"{type(start).__name__}"):
            got = TaskVector.between(start, source)
            assert same({n: got[n] for n in want}, want), source
            assert "head.weight" not in got  # tied


def test_a_merge_of_pickles_is_that_of_safetensors(pair, tmp_path):
    base, finetuned = pair
    folders = [sources(m, tmp_path / n)[0] for m, n in ((base, "a"), (finetuned, "b"))]
    files = [save(m, tmp_path / f"{n}.safetensors") for m, n in ((base, "a"), (finetuned, "b"))]
    outs = [
        compose_files(start, [(end, 0.4)], tmp_path / f"out{i}")
        for i, (start, end) in enumerate((folders, files, (folders[0], files[1])))
    ]
    assert all(same(named_tensors(o), named_tensors(outs[0])) for o in outs)


class Runs:
    def __reduce__(self):
        return print, ("run",)


def test_what_is_no_checkpoint_is_refused_and_not_run(tmp_path, capsys):
    file = tmp_path / "pytorch_model.bin"
    for content, text in (
        (Runs(), "is a pickled module, or holds more"), (nn.Linear(2, 2), "is a pickled module, or holds more"),
        ({"a": 1}, "holds dict, expected a state dict"), ([torch.ones(1)], "holds list, expected a state dict"),
    ):  # fmt: skip
        torch.save(content, file)
        for source in (file, tmp_path):
            with pytest.raises(IntegrityError, match=text) as caught:
                named_tensors(source)
            assert "save_file({n: t.clone()" in str(caught.value)
    file.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(IntegrityError, match="cannot be read as a checkpoint|holds dict|pickled module"):
        read_pickle(file)
    file.write_bytes(b"x")
    with pytest.raises(IntegrityError, match="cannot be read as a checkpoint|is a pickled module"):
        read_pickle(file)
    with pytest.raises(IntegrityError, match="no such file"):
        read_pickle(tmp_path / "none.bin")
    assert capsys.readouterr().out == ""


def test_the_advice_works_on_a_tied_model(tmp_path):
    """Unlike save_file(torch.load(...)), which refuses tensors that share memory."""
    from safetensors.torch import save_file

    model = Tied()
    with pytest.raises(RuntimeError, match="share memory"):
        save_file(model.state_dict(), tmp_path / "a.safetensors")
    save_file({n: t.clone() for n, t in model.state_dict().items()}, tmp_path / "a.safetensors")
    v = TaskVector.between(tmp_path / "a.safetensors", moved(model))
    assert set(v) >= {"embed.weight"}


def test_which_file_of_a_folder(pair, tmp_path):
    base, finetuned = pair
    save(base, tmp_path / "model.safetensors")
    save(finetuned, tmp_path / "adapter_model.safetensors")
    torch.save(finetuned.state_dict(), tmp_path / "pytorch_model.bin")
    assert torch.equal(named_tensors(tmp_path)["fc.bias"], base.fc.bias)
    run = tmp_path / "run"  # of hatcl finetune
    run.mkdir()
    save(base, run / "pretrained.safetensors")
    save(finetuned, run / "finetuned.safetensors")
    assert same(TaskVector.between(run / "pretrained.safetensors", run), TaskVector.between(base.state_dict(), run))
    assert torch.equal(named_tensors(run)["fc.bias"], finetuned.fc.bias)
    other = tmp_path / "other"
    other.mkdir()
    torch.save(base.state_dict(), other / "mine.pt")
    with pytest.raises(IntegrityError, match="holds no safetensors files; pass the path of the one to read, .*mine.pt"):
        named_tensors(other)
