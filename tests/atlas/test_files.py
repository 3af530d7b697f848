from __future__ import annotations

import copy

import pytest
import torch
from atlas_parts import Tiny, tiny
from safetensors.torch import load_file, save_file

import hatcl
from hatcl.atlas.files import group_names, per_block, read_head, read_vector, write_coefficients, write_heads
from hatcl.atlas.heads import ClassHead
from hatcl.errors import ConfigError, IntegrityError, VectorError
from hatcl.vectors.stream import files_read


@pytest.fixture
def pair(tmp_path):
    torch.manual_seed(0)
    base = Tiny()
    other = copy.deepcopy(base)
    with torch.no_grad():
        for p in other.parameters():
            p += 1
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    hatcl.TaskVector.between(base, other).save(tmp_path / "vector.safetensors")
    return dict(base.named_parameters()), tmp_path


@pytest.mark.parametrize("file", ["other.safetensors", "vector.safetensors"])
def test_a_vector_of_a_checkpoint_and_of_a_saved_vector(pair, file):
    base, folder = pair
    vector = read_vector(folder / file, base)
    assert set(vector) == set(base) and torch.equal(
        vector["a.bias"], load_file(folder / "vector.safetensors")["a.bias"]
    )
    assert set(read_vector(folder / file, base, without=["b"])) == {"a.weight", "a.bias"}
    assert files_read(folder / file) == [folder / file]


def test_a_vector_of_an_adapter(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = Tiny()
    expected = {n: p.detach().clone() for n, p in base.named_parameters()}
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["a"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    vector = read_vector(tmp_path, expected)
    merged = dict(model.merge_and_unload().named_parameters())
    assert list(vector) == ["a.weight"] and files_read(tmp_path)[0].name == "adapter_config.json"
    torch.testing.assert_close(expected["a.weight"] + vector["a.weight"], merged["a.weight"].detach())
    with pytest.raises(ConfigError, match="give the base it was fine-tuned from"):
        read_vector(tmp_path, None)


def test_what_is_left_out_may_differ_in_size(pair):
    base, folder = pair
    tensors = load_file(folder / "other.safetensors")
    tensors["b.weight"] = torch.ones(9, 4)
    save_file(tensors, folder / "other.safetensors")
    assert len(read_vector(folder / "other.safetensors", base, without=["b"])) == 2
    with pytest.raises(VectorError, match=r"other.safetensors: .*b.weight is \[2, 4\]"):
        read_vector(folder / "other.safetensors", base)


def test_vectors_that_do_not_fit(pair):
    base, folder = pair
    hatcl.TaskVector({"a.bias": torch.ones(5), "c": torch.ones(1)}).save(folder / "wrong.safetensors")
    text = r"wrong.safetensors: 2 tensors do not fit: a.bias is \[5\], the base has \[4\]; c is \[1\], the base has no"
    with pytest.raises(VectorError, match=text):
        read_vector(folder / "wrong.safetensors", base)
    with pytest.raises(ConfigError, match="is not a task vector saved by hatcl; give the base it was fine-tuned from"):
        read_vector(folder / "other.safetensors", None)
    assert len(read_vector(folder / "vector.safetensors", None)) == 4
    with pytest.raises(IntegrityError, match="no such file"):
        read_vector(folder / "none.safetensors", base)


def test_heads_come_back_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    heads = {"a": ClassHead(torch.randn(3, 5), torch.randn(3)), "b": ClassHead(torch.randn(2, 5), scale=0.1)}
    write_heads(tmp_path / "heads.safetensors", heads)
    x = torch.randn(4, 5)
    for name, head in heads.items():
        assert torch.equal(read_head(tmp_path / "heads.safetensors", name)(x), head(x))
    with pytest.raises(ConfigError, match="expected c.weight, or weight"):
        read_head(tmp_path / "heads.safetensors", "c")


@pytest.mark.parametrize(
    ("grain", "names"),
    [
        ("block", ["a.weight", "a.bias", "b.weight", "b.bias"]),
        ("global", ["all"]),
        ("partition:2", [f"{n}[{k}]" for n in ("a.weight", "a.bias", "b.weight", "b.bias") for k in range(2)]),
    ],
)
def test_coefficients_as_files(tmp_path, grain, names):
    composer = tiny(2, grain)[2]
    composer.coefficients.data.copy_(torch.arange(2.0 * len(names)).view(2, -1) / 3)
    assert group_names(composer) == names
    write_coefficients(tmp_path, composer, ["one", "two"])
    lam = load_file(tmp_path / "coefficients.safetensors")["coefficients"]
    assert torch.equal(lam, composer.coefficients)
    lines = (tmp_path / "coefficients.csv").read_text().splitlines()
    assert lines[0] == "vector,block,value" and lines[1] == f"one,{names[0]},0.0"
    assert [float(line.split(",")[2]) for line in lines[1:]] == lam.flatten().tolist()
    before = (tmp_path / "coefficients.safetensors").read_bytes()
    for _ in range(5):  # safetensors orders several entries of metadata at random
        write_coefficients(tmp_path, composer, ["one", "two"])
        assert (tmp_path / "coefficients.safetensors").read_bytes() == before


def test_the_mean_of_each_block():
    composer = tiny(1, "partition:2")[2]
    composer.coefficients.data.copy_(torch.tensor([[1.0, 3.0, 5.0, 5.0, 0.0, 0.0, -1.0, 0.0]]))
    assert per_block(composer).tolist() == [[2.0, 5.0, 0.0, -0.5]]
