"""Grafts as adapters of peft, loaded and trained by peft itself."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hatcl import GraftError, IntegrityError, select_graft
from hatcl.grafts import Graft, shira

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")
# one rounding of `pretrained + difference` at weights below 1 (6e-8 each), through two layers: measured at most 2e-7
SLACK = 2e-6


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).eval()


class Namesakes(nn.Module):
    """peft's names are ends of paths: fc is also block.fc and, among those that are stored whole, prefc."""

    def __init__(self):
        super().__init__()
        self.fc, self.prefc = nn.Linear(6, 5), nn.Linear(6, 7)
        self.block = nn.ModuleDict({"fc": nn.Linear(7, 6), "norm": nn.LayerNorm(6)})

    def forward(self, x):
        return self.fc(self.block["norm"](self.block["fc"](self.prefc(x).tanh()).tanh()))


def tuned(base, size=0.1):
    out, generator = copy.deepcopy(base), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in out.parameters():
            p += size * torch.randn(p.shape, generator=generator)
    return out


def loaded(base, folder):
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


def gap(a, b):
    x = {"input_ids": torch.arange(12).view(2, 6)} if hasattr(a, "config") else None
    with torch.no_grad():
        out = [m(**x).logits if x else m(torch.randn(4, 6, generator=torch.Generator().manual_seed(2))) for m in (a, b)]
    return float((out[0] - out[1]).abs().max())


@pytest.mark.parametrize("only", [(), ("*query.weight", "*dense.weight")])
@pytest.mark.parametrize("sparsity", [0.01, 0.2])
def test_peft_computes_what_apply_to_gives(tmp_path, only, sparsity):
    base = bert()
    graft = select_graft(base, tuned(base), sparsity=sparsity, only=only)
    report = graft.to_peft(base, tmp_path)
    model, want = loaded(base, tmp_path), graft.apply_to(base)
    assert gap(model, want) < SLACK < gap(base, want)
    assert bool(report.in_full) == (not only) and (report.elements == graft.size) == bool(only)
    assert report.error < 1e-7 and report.rank >= 1
    back = Graft.from_peft(tmp_path, base)
    assert back.indices.keys() == graft.indices.keys() and back.base == graft.base
    assert all(torch.equal(back.indices[n], at) for n, at in graft.indices.items())
    assert gap(back.apply_to(base), model) < SLACK
    if only:
        stored = load_file(tmp_path / "adapter_model.safetensors")
        assert all(n.endswith(("shira_weight", "shira_indices")) for n in stored)
        assert gap(model.merge_and_unload(), want) < SLACK


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types(tmp_path, dtype):
    base = bert().to(dtype)
    graft = select_graft(base, tuned(base), sparsity=0.1, only=("*query.weight", "*dense.weight"))
    report = graft.to_peft(base, tmp_path)
    back, merged = Graft.from_peft(tmp_path, base), loaded(base, tmp_path).merge_and_unload()
    for n, at in graft.indices.items():
        assert torch.equal(back.values[n], merged.get_parameter(n).detach().view(-1)[at.long()])
    # 16 bits come back as they were; peft keeps differences in float32, 2^-24 of changes below 0.5
    assert report.error <= (3e-8 if dtype == torch.float64 else 0)


def test_what_peft_trained_is_a_graft(tmp_path):
    base = bert()
    config = peft.ShiraConfig(r=1, target_modules=["query", "value"], modules_to_save=["classifier"], random_seed=3)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape)
    model.eval().save_pretrained(tmp_path)
    graft = Graft.from_peft(tmp_path, base)
    assert set(graft.indices) == {
        *(f"bert.encoder.layer.{i}.attention.self.{n}.weight" for i in (0, 1) for n in ("query", "value")),
        "classifier.weight", "classifier.bias",
    }  # fmt: skip
    assert graft.size == 4 * 32 + 51 and graft.numel == sum(p.numel() for p in base.parameters())
    assert gap(graft.apply_to(base), model) < SLACK < gap(base, model)
    base.save_pretrained(tmp_path / "base")
    again = Graft.from_peft(tmp_path, tmp_path / "base")
    assert all(torch.equal(again.values[n], v) for n, v in graft.values.items())


def test_layers_whose_names_end_alike(tmp_path, monkeypatch):
    torch.manual_seed(0)
    base = Namesakes().eval()
    model = tuned(base)
    masks = {n: torch.zeros(p.shape, dtype=torch.bool) for n, p in base.named_parameters()}
    masks["prefc.weight"][0, :3] = masks["block.fc.weight"][2, 1:4] = True
    graft = Graft.from_masks(masks, model, base)
    assert graft.to_peft(base, tmp_path / "a").in_full == ()
    assert gap(loaded(base, tmp_path / "a"), graft.apply_to(base)) < SLACK
    masks["block.norm.bias"][:2] = masks["fc.bias"][1] = True
    graft = Graft.from_masks(masks, model, base)
    with pytest.raises(GraftError, match="no elements that SHiRA can hold: part of the weight of a linear"):
        graft.to_peft(base, tmp_path / "b")  # each of them ends in fc
    assert not (tmp_path / "b").exists()
    monkeypatch.setattr(shira, "_with_namesakes", lambda base, modules: modules)
    graft.to_peft(base, tmp_path / "b")  # the twin: peft takes block.fc and prefc as modules that are stored whole
    with pytest.raises(Exception, match="modules_to_save cannot be applied"):
        loaded(base, tmp_path / "b")


def test_a_layer_with_more_elements_than_shira_holds_is_stored_whole(tmp_path):
    torch.manual_seed(0)
    base = Namesakes().eval()
    masks = {n: torch.zeros(p.shape, dtype=torch.bool) for n, p in base.named_parameters()}
    masks["prefc.weight"][:] = True
    masks["block.fc.weight"][0] = True
    graft = Graft.from_masks(masks, tuned(base), base)
    report = graft.to_peft(base, tmp_path)
    assert report.in_full == ("prefc",) and report.elements == 7 and report.rank == 1
    assert gap(loaded(base, tmp_path), graft.apply_to(base)) < SLACK


def of(base, name, at=(0,)):
    mask = torch.zeros(base.get_parameter(name).shape, dtype=torch.bool)
    mask.view(-1)[list(at)] = True
    return Graft.from_masks({name: mask}, tuned(base), base)


def test_what_peft_has_no_place_for(tmp_path):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))
            self.table, self.head = nn.Embedding(4, 3), nn.Linear(3, 4, bias=False)
            self.head.weight = self.table.weight
            self.attention = nn.MultiheadAttention(4, 2)

    base, out = Own(), tmp_path / "out"
    for name, text in {
        "scale": "scale belongs to the model itself rather than a layer, .*leave it out of the graft",
        "table.weight": "table.weight is shared by several layers, of which peft would change only one; untie them",
        "attention.out_proj.weight": "no elements that SHiRA can hold",
    }.items():
        with pytest.raises(GraftError, match=text):
            of(base, name).to_peft(base, out)
    with pytest.raises(GraftError, match="holds only bits and"):
        of(base, "scale").bits().to_peft(base, out)
    with pytest.raises(GraftError, match="to_peft: got OrderedDict, expected a module"):
        of(base, "scale").to_peft(base.state_dict(), out)
    with pytest.raises(IntegrityError, match="scale differs from the tensor that this graft was made for"):
        of(base, "scale").to_peft(tuned(base), out)
    assert not out.exists()


def test_adapters_that_are_no_graft_of_the_model(tmp_path):
    base = bert()
    select_graft(base, tuned(base), sparsity=0.01, only="*query.weight").to_peft(base, tmp_path)
    file, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    good, text = load_file(file), config.read_text()
    with pytest.raises(GraftError, match="changes bert.encoder.*query.weight, which the pretrained model lacks; pass"):
        Graft.from_peft(tmp_path, Namesakes())
    name = next(n for n in good if n.endswith("shira_indices"))
    save_file({**good, name: good[name] + 100}, file)
    with pytest.raises(GraftError, match=r"weight has elements outside of \[16, 16\]; pass the adapter's own"):
        Graft.from_peft(tmp_path, base)
    save_file({**good, name: good[name][:, :3].contiguous()}, file)
    with pytest.raises(IntegrityError, match="lacks indices that match its values; save the adapter again"):
        Graft.from_peft(tmp_path, base)
    save_file({**good, "base_model.model.classifier.weight": torch.zeros(2, 16)}, file)
    with pytest.raises(GraftError, match=r"classifier.weight is \[3, 16\] in the pretrained model, \[2, 16\] in the"):
        Graft.from_peft(tmp_path, base)
    save_file({**good, "base_model.model.bert.embeddings.position_ids": torch.zeros(1, 16)}, file)
    with pytest.raises(GraftError, match="position_ids, which is not a parameter; a graft holds parameters only"):
        Graft.from_peft(tmp_path, base)
    config.write_text(json.dumps({**json.loads(text), "peft_type": "LORA"}))
    with pytest.raises(GraftError, match="the adapter is LORA, expected SHIRA; for LoRA use TaskVector.between"):
        Graft.from_peft(tmp_path, base)
