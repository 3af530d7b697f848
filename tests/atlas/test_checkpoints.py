"""Checkpoints as repositories publish them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from clip_parts import CONFIG
from safetensors.torch import save_file
from torch import nn

import hatcl
from hatcl.atlas.checkpoints import names_in_linearised, under_names
from hatcl.atlas.files import read_head, read_vector
from hatcl.errors import IntegrityError, VectorError
from hatcl.vectors.pickles import CONVERSION
from hatcl.vectors.tensors import named_tensors

# what the repositories of task vectors have in `src/modeling.py`: modules of their own, saved whole
MODELING = """
import json, open_clip, torch


class ImageEncoder(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.model = open_clip.CLIP(**config)
        self.val_preprocess = open_clip.image_transform(32, is_train=False)
        del self.model.transformer


class ClassificationHead(torch.nn.Linear):
    def __init__(self, weights):
        super().__init__(weights.shape[1], weights.shape[0])
        self.normalize, self.weight = True, torch.nn.Parameter(weights)

    def forward(self, inputs):
        return super().forward(inputs / inputs.norm(dim=-1, keepdim=True))
"""
MAKE = """
import json, torch
from src.modeling import ClassificationHead, ImageEncoder

torch.manual_seed(3)
encoder = ImageEncoder(json.loads(open("config.json").read()))
torch.save(encoder, "finetuned.pt")
torch.save(encoder.state_dict(), "state.pt")
head = ClassificationHead(100 * torch.nn.functional.normalize(torch.randn(4, 16), dim=1))
torch.nn.init.zeros_(head.bias)
torch.save(head, "head_CarsVal.pt")
x = torch.randn(5, 16)
torch.save({"x": x, "logits": head(x).detach()}, "seen.pt")
"""
DOCS = (Path(__file__).parents[2] / "docs" / "atlas.md").read_text()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with classes of its own, and modules of them that were pickled there; we are in it."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "__init__.py").write_text("")
    (tmp_path / "src" / "modeling.py").write_text(MODELING)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    exec(MAKE, {})
    yield tmp_path
    for name in ("src.modeling", "src"):
        sys.modules.pop(name, None)


def test_a_pickled_module_is_refused_with_the_lines_that_convert_it(repository):
    path = repository / "finetuned.pt"
    with pytest.raises(
        IntegrityError, match="is a pickled module, or holds more than tensors; reading it would run code"
    ) as caught:
        named_tensors(path)
    lines = str(caught.value).partition("give the new file:\n")[2]
    assert len(lines.splitlines()) == 3 and str(path) in lines
    exec(lines, {})
    got, want = named_tensors(path.with_suffix(".safetensors")), named_tensors(repository / "state.pt")
    assert set(got) == set(want) and all(torch.equal(got[n], want[n]) for n in want)
    assert "model.visual.conv1.weight" in got
    with pytest.raises(IntegrityError, match="is a pickled module"):
        read_vector(path, want)
    encoders, heads = re.findall(r"^```text\n(import torch.*?)^```", DOCS, flags=re.M | re.S)
    assert encoders.strip() == CONVERSION.format(path="finetuned.pt", new="finetuned.safetensors")
    exec(heads, {})  # the lines of docs/atlas.md
    seen = torch.load(repository / "seen.pt", weights_only=True)
    # of logits up to 100; measured 1.5e-5
    torch.testing.assert_close(
        read_head(repository / "heads.safetensors", "Cars")(seen["x"]), seen["logits"], rtol=0, atol=5e-4
    )


class Harmful:
    """Runs code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protected", [True, False], ids=["", "twin_without_weights_only"])
def test_no_code_of_a_file_is_run(tmp_path, monkeypatch, protected):
    torch.save({"a": torch.ones(2), "b": Harmful(tmp_path / "harmed")}, tmp_path / "x.pt")
    if not protected:
        load = torch.load
        monkeypatch.setattr(torch, "load", lambda path, **how: load(path, **{**how, "weights_only": False}))
        named_tensors(tmp_path / "x.pt")
    else:
        with pytest.raises(IntegrityError, match="is a pickled module, or holds more than tensors"):
            named_tensors(tmp_path / "x.pt")
    assert (tmp_path / "harmed").exists() is not protected


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3, "name": "x"}])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
def test_state_dicts_are_read(tmp_path, wrap, suffix):
    state = {"a": torch.randn(2, 3), "b": torch.arange(3)}
    torch.save(wrap(state), tmp_path / f"x{suffix}")
    got = named_tensors(tmp_path / f"x{suffix}")
    assert set(got) == {"a", "b"} and all(torch.equal(got[n], state[n]) for n in state)
    save_file({"a": state["a"]}, tmp_path / "x.safetensors")
    assert torch.equal(named_tensors(tmp_path / "x.safetensors")["a"], state["a"])


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(IntegrityError, match="none.pt: no such file"):
        named_tensors(tmp_path / "none.pt")
    path = tmp_path / "x.pt"
    torch.save({"a": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(IntegrityError, match="x.pt cannot be read as a checkpoint"):
        named_tensors(path)
    torch.save([1, 2], path)
    with pytest.raises(IntegrityError, match="x.pt holds list, expected a state dict"):
        named_tensors(path)
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), path)  # as OpenAI published theirs
    with pytest.raises(IntegrityError, match="x.pt is a TorchScript archive, .* torch.jit.load"):
        named_tensors(path)


def test_names_are_changed_without_reading(tmp_path):
    save_file({"m.a": torch.ones(2), "m.b": torch.zeros(3)}, tmp_path / "x.safetensors")
    got = under_names(named_tensors(tmp_path / "x.safetensors"), {"m.a": "a"})
    assert list(got) == ["a"] and got.kinds["a"].shape == (2,) and torch.equal(got["a"], torch.ones(2))


def test_saved_vectors_and_checkpoints_come_under_the_bases_names(tmp_path):
    base = {"visual.w": torch.randn(3, 3), "visual.b": torch.randn(3)}
    tuned = {f"model.{n}": t + 0.1 for n, t in base.items()} | {"model.scale": torch.ones(1)}
    around = {f"model.{n}": t for n, t in base.items()} | {"model.scale": torch.ones(1)}
    torch.save(tuned, tmp_path / "tuned.pt")
    hatcl.TaskVector.between(around, tuned).save(tmp_path / "vector.safetensors")

    def named(tensors, where):
        return {n: n.removeprefix("model.") for n in tensors if "visual" in n}

    for file in ("tuned.pt", "vector.safetensors"):
        vector = read_vector(tmp_path / file, base, named=named)
        got = vector.apply_to(base)
        assert set(vector) == set(base) and all(torch.equal(got[n], tuned[f"model.{n}"]) for n in base)


# ---- linearised encoders -------------------------------------------------------------------------------------------


def linearised(base, order, by=0.1):
    """As `LinearizedImageEncoder.save` of tangent_task_arithmetic writes one: parameters by number."""
    out = {}
    for i, name in enumerate(order):
        out[f"model.params0.{i}"] = base[name].clone()
        out[f"model.params.{i}"] = base[name] + by * (i + 1)
    return {**out, "model_name": "ViT-B-32"}


def test_a_linearised_encoder_tells_its_names_by_what_it_was_expanded_around(tmp_path):
    base = {"visual.a": torch.randn(3), "visual.b": torch.randn(3), "visual.c": torch.randn(2, 2)}
    whole = {**base, "text": torch.randn(4)}
    torch.save(linearised(whole, ["text", "visual.c", "visual.b", "visual.a"]), tmp_path / "linear.pt")
    tensors = named_tensors(tmp_path / "linear.pt")
    names = names_in_linearised(tensors, base, "linear.pt")
    assert names == {"model.params.1": "visual.c", "model.params.2": "visual.b", "model.params.3": "visual.a"}
    vector = read_vector(tmp_path / "linear.pt", base, named=lambda t, w: names_in_linearised(t, base, w))
    got = vector.apply_to(base)
    assert torch.equal(got["visual.c"], base["visual.c"] + 0.2) and torch.equal(got["visual.a"], base["visual.a"] + 0.4)
    assert names_in_linearised(base, base, "x") == {}


def test_twin_names_by_the_order_of_the_numbers_are_wrong():
    """As the repository has them: right only while both models list their parameters alike."""
    base = {"visual.a": torch.randn(3), "visual.b": torch.randn(3)}
    tensors = linearised(base, ["visual.b", "visual.a"])
    by_order = {f"model.params.{i}": name for i, name in enumerate(base)}
    assert (
        names_in_linearised(tensors, base, "x")
        == {"model.params.0": "visual.b", "model.params.1": "visual.a"}
        != by_order
    )


def test_one_of_another_base_or_without_a_sure_name_is_refused():
    base = {"visual.a": torch.randn(3), "visual.b": torch.zeros(3)}
    with pytest.raises(VectorError, match="x is a linearised encoder.* visual.a is not among them .1 such tensors."):
        names_in_linearised(linearised({**base, "visual.a": torch.ones(3)}, base), base, "x")
    same = {**base, "visual.c": torch.zeros(3)}
    with pytest.raises(VectorError, match="params0.1 equals visual.b and visual.c of the base; its name cannot"):
        names_in_linearised(linearised(same, same), same, "x")
