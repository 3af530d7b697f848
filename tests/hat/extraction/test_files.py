"""An extracted task on disk, and as a program."""

from __future__ import annotations

import builtins
import json

import pytest
import torch
from parts import converted, images, mlp, pretend, vit
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import hatcl
from hatcl.hat.digests import record
from hatcl.hat.extraction import files as extract_files
from hatcl.hat.gates import gates_of

ONNX = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed; run: pip install -e '.[onnx]'")


@pytest.fixture(scope="module")
def small():
    model = converted("mlp")
    pretend(model)
    return hatcl.extract_task(model, 0, images("mlp", 2))


@pytest.fixture(scope="module")
def network():
    model = hatcl.convert(mlp(norm=nn.LayerNorm), 2, images("mlp", 2))
    pretend(model)
    return hatcl.extract_task(model, 0, images("mlp", 2))


def test_it_loads_bit_for_bit(small, tmp_path):
    folder = small.save(tmp_path)
    base = mlp()
    before = {n: x.clone() for n, x in base.state_dict().items()}
    made = hatcl.load_extracted(folder, base=base)
    x = images("mlp")
    with torch.no_grad():
        assert torch.equal(made(x), small.model(x))
    assert not made.training and repr(made) == repr(small.model.eval())
    assert all(torch.equal(x, before[n]) for n, x in base.state_dict().items())
    assert json.loads((folder / "extracted.json").read_text())["report"]["kept"] == small.report.kept


def test_what_was_fine_tuned_is_what_is_saved(network, tmp_path):
    made = hatcl.load_extracted(network.save(tmp_path / "a"), base=mlp(norm=nn.LayerNorm))
    network.model.load_state_dict(made.state_dict())
    with torch.no_grad():
        network.model[1].weight.mul_(2.0)
    network.model[3].requires_grad_(False)
    network.model[1].bias.requires_grad_(False)
    again = hatcl.load_extracted(network.save(tmp_path / "b"), base=mlp(norm=nn.LayerNorm))
    x = images("mlp")
    with torch.no_grad():
        assert torch.equal(again(x), network.model(x)) and not torch.equal(again(x), made(x))
    assert [n for n, p in again.named_parameters() if not p.requires_grad] == ["1.bias"]


@pytest.mark.parametrize("form", ["pt2", "onnx"])
def test_programs_take_any_batch(form, tmp_path):
    model = hatcl.convert(vit(), 1, images("vit", 2))
    pretend(model)
    found = hatcl.extract_task(model, 0, images("vit", 2))
    path = found.save(tmp_path, form)
    for count in (2, 5):
        x = images("vit", count, seed=3)
        with torch.no_grad():
            want = found.model(x)
        if form == "pt2":
            got = torch.export.load(path).module()(x)
        else:
            session = ONNX.InferenceSession(path)
            got = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)  # measured: 4e-7 of the largest


def test_models_of_timm_and_transformers_load_by_their_names(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, head_dim=8,
    )  # fmt: skip
    x = {"input_ids": torch.randint(60, (2, 7))}
    model = hatcl.convert(transformers.LlamaForCausalLM(config).eval(), 1, x)
    pretend(model)
    found = hatcl.extract_task(model, 0, x)
    made = hatcl.load_extracted(found.save(tmp_path))
    with torch.no_grad(), hatcl.task(model, 0):
        want = model(**x).logits
        assert torch.equal(made(**x).logits, found.model(**x).logits)
        assert float((made(**x).logits - want).abs().max() / want.abs().max()) < 1e-5
    assert type(made) is transformers.LlamaForCausalLM and found.report.kept < found.report.total


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_transformers_loads_what_its_class_can_make(kind, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "llama":
        config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, intermediate_size=48, head_dim=8)
    else:
        config = transformers.BertConfig(**sizes, intermediate_size=48)
    cls = transformers.LlamaForCausalLM if kind == "llama" else transformers.BertForMaskedLM
    x = {"input_ids": torch.randint(60, (2, 7))}
    model = hatcl.convert(cls(config).eval(), 1, x)
    pretend(model)
    gates = gates_of(model)[0]
    gates.masks[0] = False
    for _, start, stop in gates.layers:  # every second unit: equal widths in all layers, heads of one width
        gates.masks[0, start:stop:2] = True
    record(model, 0)
    found = hatcl.extract_task(model, 0, x)
    folder = found.save(tmp_path)
    assert json.loads((folder / "config.json").read_text())["hidden_size"] == 16
    made = cls.from_pretrained(folder).eval()
    known = transformers.AutoModel.from_pretrained(folder)
    assert type(known) is {"llama": transformers.LlamaModel, "bert": transformers.BertModel}[kind]
    with torch.no_grad(), hatcl.task(model, 0):
        want, got = model(**x).logits, made(**x).logits
        assert float((got - want).abs().max() / want.abs().max()) < 1e-5
        assert torch.equal(hatcl.load_extracted(folder)(**x).logits, got)


def test_what_its_class_cannot_make_has_no_config(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    x = {"input_ids": torch.randint(60, (2, 7))}
    model = hatcl.convert(transformers.BertModel(config).eval(), 1, x)
    pretend(model, share=0.4, seed=1)
    found = hatcl.extract_task(model, 0, x)
    assert found.model.config.hidden_size != found.model.embeddings.word_embeddings.embedding_dim
    assert not (found.save(tmp_path) / "config.json").exists()


def test_formats_that_do_not_exist_or_are_not_installed(small, tmp_path, monkeypatch):
    with pytest.raises(hatcl.ConfigError, match="format: got 'gguf', expected one of safetensors, pt2, onnx"):
        small.save(tmp_path, "gguf")
    right = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "onnxscript":
            raise ImportError("No module named 'onnxscript'", name="onnxscript")
        return right(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        hatcl.ConfigError, match=r"needs onnxscript, which is not installed; pip install 'hatcl\[onnx\]"
    ):
        small.save(tmp_path, "onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["pt2", "onnx"])
def test_what_no_program_can_be_made_of(form, tmp_path):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            x = self.first(x).relu()
            return self.second(x if float(x.sum()) > 0 else x + 1)

    x = torch.randn(2, 6)
    model = hatcl.convert(Branching(), 1, x, verify=False)
    pretend(model)
    found = hatcl.extract_task(model, 0, x)
    with pytest.raises(hatcl.ConversionError, match=f"Branching: no {form} program can be made of it on float32"):
        found.save(tmp_path, form)
    assert not list(tmp_path.iterdir())


def test_files_of_something_else(small, tmp_path):
    with pytest.raises(hatcl.IntegrityError, match="no such file; expected a folder written by Extracted.save"):
        hatcl.load_extracted(tmp_path)
    path = small.save(tmp_path) / "model.safetensors"
    with pytest.raises(hatcl.IntegrityError, match="its model class is your own; pass base="):
        hatcl.load_extracted(tmp_path)
    with pytest.raises(hatcl.IntegrityError, match="such tensors.*base= another one"):
        hatcl.load_extracted(tmp_path, base=nn.Sequential(*mlp(), nn.Linear(4, 4)))
    with pytest.raises(hatcl.IntegrityError, match="it does not make a model"):
        hatcl.load_extracted(tmp_path, base=nn.Linear(2, 2))
    with safe_open(path, "pt") as f:
        tensors, meta = {n: f.get_tensor(n) for n in f.keys()}, f.metadata()  # noqa: SIM118
    save_file(tensors, path, {"hatcl_extracted": "{}"})
    with pytest.raises(hatcl.IntegrityError, match="its header lacks fixed, shaping, source, tied"):
        hatcl.load_extracted(tmp_path, base=mlp())
    with pytest.raises(hatcl.IntegrityError, match="says nothing of hatcl; .* hatcl.load_extracted reads it"):
        hatcl.from_pretrained(tmp_path)
    save_file(tensors, path, {"hatcl": "{}"})
    with pytest.raises(hatcl.IntegrityError, match="says nothing of an extracted task.*hatcl.from_pretrained reads it"):
        hatcl.load_extracted(tmp_path, base=mlp())
    save_file(tensors, path, {})
    with pytest.raises(hatcl.IntegrityError, match="says nothing of an extracted task; .* as it wrote it$"):
        hatcl.load_extracted(tmp_path, base=mlp())
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(hatcl.IntegrityError, match="not readable as safetensors"):
        hatcl.load_extracted(tmp_path, base=mlp())
    assert meta["format"] == "pt" and extract_files.HEADER in meta


def test_tied_parameters_stay_tied(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, x):
            return self.out(self.embed(x))

    x = torch.randint(20, (2, 5))
    model = hatcl.convert(Tied(), 1, x)
    pretend(model)
    found = hatcl.extract_task(model, 0, x)
    made = hatcl.load_extracted(found.save(tmp_path), base=Tied())
    for m in (found.model, made):
        assert m.out.weight is m.embed.weight and m.embed.embedding_dim == m.out.in_features < 8
