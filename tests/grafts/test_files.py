"""The files of grafts and scores: what they hold, damage, and writes that fail."""

from __future__ import annotations

import json

import graft_parts as parts
import torch
from graft_parts import refused
from safetensors.torch import load_file, save_file

from hatcl.errors import GraftError, IntegrityError
from hatcl.grafts import Graft, GraftScores, files
from hatcl.vectors.task_vector import TaskVector


def test_files_of_another_kind(tmp_path):
    pre, ft = parts.pair("linear")
    GraftScores({n: torch.randn(p.shape) for n, p in pre.named_parameters()}).save(tmp_path / "s.safetensors")
    refused(
        GraftError, lambda: Graft.load(tmp_path / "s.safetensors"),
        "s.safetensors holds scores, expected bits; call GraftScores.load instead of Graft.load; its .graft(",
    )  # fmt: skip
    save_file({"a": torch.ones(2)}, tmp_path / "t.safetensors")
    refused(
        GraftError, lambda: Graft.load(tmp_path / "t.safetensors"), "holds a and does not state whether these are bits"
    )
    assert files.held_by(tmp_path / "s.safetensors") == "scores"
    assert files.held_by(parts.graft(pre, ft).save(tmp_path / "holds scores.safetensors")) == "bits"
    TaskVector.between(pre, ft).save(tmp_path / "v.safetensors")
    refused(
        GraftError, lambda: Graft.load(tmp_path / "v.safetensors"), "does not state whether these are bits or scores"
    )
    refused(
        GraftError, lambda: parts.graft(pre, ft).save(tmp_path / "a.pt"), "a.pt: got .pt, expected a file that ends in"
    )
    refused(GraftError, lambda: parts.graft(pre, ft).save(tmp_path / "a"), "got no suffix")
    refused(IntegrityError, lambda: Graft.load(tmp_path / "none.safetensors"), "no such file")


def test_damaged_files(tmp_path):
    pre, ft = parts.pair("bert")
    file = parts.graft(pre, ft).save(tmp_path / "a.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    refused(IntegrityError, lambda: Graft.load(file), "cannot be read as safetensors")
    file.write_bytes(whole[:-10] + bytes([whole[-10] ^ 1]) + whole[-9:])  # one bit
    refused(IntegrityError, lambda: Graft.load(file), "its content has changed since it was saved; the file is damaged")
    # written by something else
    file.write_bytes(whole)
    tensors = load_file(file)
    save_file(tensors, tmp_path / "b.safetensors", {files.ENTRY: "{"})
    refused(IntegrityError, lambda: Graft.load(tmp_path / "b.safetensors"), "b.safetensors cannot be read as JSON")
    save_file(tensors, tmp_path / "b.safetensors", {files.ENTRY: "{}"})
    refused(IntegrityError, lambda: Graft.load(tmp_path / "b.safetensors"), "its metadata cannot be read")
    save_file(tensors, tmp_path / "b.safetensors", {files.ENTRY: json.dumps({"holds": "masks", "digest": ""})})
    refused(
        GraftError,
        lambda: Graft.load(tmp_path / "b.safetensors"),
        "holds masks, expected bits; call the loader of its kind",
    )
    files.write(tmp_path / "b.safetensors", files.BITS, tensors, {"shapes": {}, "base": None, "values": True})
    refused(
        IntegrityError,
        lambda: Graft.load(tmp_path / "b.safetensors"),
        "its parts do not fit each other (the graft has no",
    )
    files.write(tmp_path / "b.safetensors", files.BITS, tensors, {"values": True})
    refused(
        IntegrityError, lambda: Graft.load(tmp_path / "b.safetensors"), "its parts do not fit each other ('shapes')"
    )


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    pre, ft = parts.pair("linear")
    file = parts.graft(pre, ft).save(tmp_path / "a.safetensors")
    whole = file.read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    refused(IntegrityError, lambda: parts.graft(pre, ft, 0.9).save(file), "could not be written", "is the disk full?")
    assert file.read_bytes() == whole and [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
