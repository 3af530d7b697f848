"""Embeddings of real models under their own parameter names, and the heads made for them."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import atlas_parts as parts
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as tf

import hatcl
from hatcl import ConfigError
from hatcl.atlas import ClassHead, accuracy, class_embeddings, encoder, prototypes, trained_head
from hatcl.atlas.heads import pooled_output

transformers = pytest.importorskip("transformers", reason="needs the extra: pip install 'hatcl[hf]'")
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
MODELS = {
    "timm vit": lambda: parts.vit(),
    "timm resnet": lambda: timm.create_model("test_resnet", num_classes=3),
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SMALL, vocab_size=30)),
    "bert classifier": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(**SMALL, vocab_size=30, num_labels=3)
    ),
    "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**SMALL, image_size=8, patch_size=4)),
    "resnet": lambda: transformers.ResNetForImageClassification(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], num_labels=3)
    ),
}


def args_of(name):
    if "bert" in name:
        mask = torch.ones(2, 5).long()
        mask[1, 3:] = 0
        return {"input_ids": torch.randint(0, 30, (2, 5)), "attention_mask": mask}
    key = "x" if "timm" in name else "pixel_values"
    return {key: torch.randn(2, 1 if name == "timm vit" else 3, *((8, 8) if "vit" in name else (32, 32)))}


@pytest.mark.parametrize("name", MODELS)
def test_an_encoder_keeps_the_names_and_can_be_composed_copied_and_pickled(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    net, args = encoder(model), args_of(name)
    assert [n for n, _ in net.named_parameters()] == [n for n, _ in model.named_parameters()]
    with torch.no_grad():
        want = net(**args)
        assert want.dim() == 2 and len(want) == 2
        other = copy.deepcopy(model)
        for p in other.parameters():
            p += 0.05
        vector = hatcl.TaskVector.between(model, other)
        composer = hatcl.compose(net, [vector])
        assert torch.equal(composer(**args), want)
        composer.coefficients.fill_(1)
        assert torch.equal(composer(**args), encoder(other)(**args))  # a copy's forward is the copy's own
        assert torch.equal(net(**args), want)
        assert torch.equal(pickle.loads(pickle.dumps(net))(**args), want)


def test_what_is_embedded():
    torch.manual_seed(0)
    with torch.no_grad():
        model, args = MODELS["timm resnet"]().eval(), args_of("timm resnet")
        want = model.forward_head(model.forward_features(args["x"]), pre_logits=True)
        assert torch.equal(encoder(model)(**args), want)
        model, args = MODELS["bert classifier"]().eval(), args_of("bert")
        out = model.bert(**args)
        assert torch.equal(encoder(model)(**args), out.pooler_output)
        assert torch.equal(encoder(model, "pooler")(**args), out.pooler_output)
        hidden = out.last_hidden_state
        want = torch.stack([hidden[0].mean(0), hidden[1, :3].mean(0)])  # the second row is three tokens long
        torch.testing.assert_close(encoder(model, "mean")(**args), want)
        assert torch.equal(encoder(model, "first")(**args), hidden[:, 0])
        assert torch.equal(encoder(model, "last")(**args), torch.stack([hidden[0, 4], hidden[1, 2]]))


def test_pooling_without_a_mask():
    hidden = torch.randn(2, 3, 4)
    out = SimpleNamespace(last_hidden_state=hidden)
    torch.testing.assert_close(pooled_output(out, "auto"), hidden.mean(1))
    assert torch.equal(pooled_output(out, "last"), hidden[:, 2])
    maps = SimpleNamespace(last_hidden_state=torch.randn(2, 3, 4, 4))
    torch.testing.assert_close(pooled_output(maps, "mean"), maps.last_hidden_state.mean((2, 3)))
    assert torch.equal(pooled_output((hidden,), "first"), hidden[:, 0])


def test_heads_by_hand():
    w = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    f = torch.tensor([[3.0, 4.0]])
    torch.testing.assert_close(class_embeddings(w, scale=10.0)(f), torch.tensor([[6.0, 8.0]]))
    torch.testing.assert_close(ClassHead(w, torch.tensor([1.0, -1.0]))(f), torch.tensor([[7.0, 11.0]]))
    assert not list(ClassHead(w).parameters()) and set(ClassHead(w).state_dict()) == {"weight"}

    class Give(nn.Module):
        def forward(self, x):
            return x

    x = torch.tensor([[2.0, 0.0], [0.0, 5.0], [-1.0, 0.0]])
    head = prototypes(Give(), [(x, torch.tensor([0, 0, 1]))], scale=1.0)
    # unit vectors (1, 0) and (0, 1) of class 0 sum to the diagonal
    torch.testing.assert_close(head(f), torch.tensor([[1.4 * 0.5**0.5, -0.6]]))


def test_heads_classify_real_digits():
    base, _ = parts.world()
    net = encoder(base)
    train, test = parts.batches(*parts.view("plain", "train")), parts.batches(*parts.view("plain", "test"))
    for make in (prototypes, trained_head):
        head = make(net, train)
        torch.testing.assert_close(make(net, train).weight, head.weight, rtol=0, atol=0)  # the same every time
        assert accuracy(net, test, head) > accuracy(base, test) + 0.1


def test_a_trained_head_is_at_the_least_loss():
    torch.manual_seed(0)
    x, y = 3 + 2 * torch.randn(40, 4), torch.arange(40) % 3

    class Give(nn.Module):
        def forward(self, x):
            return x

    head = trained_head(Give(), [(x, y)], decay=0.1)
    mean, spread = x.mean(0), x.std(0, unbiased=False)
    w = (head.weight * spread).clone().requires_grad_(True)
    b = (head.bias + head.weight @ mean).clone().requires_grad_(True)
    (tf.cross_entropy((x - mean) / spread @ w.T + b, y) + 0.05 * w.square().sum()).backward()
    assert max(w.grad.abs().max(), b.grad.abs().max()) < 1e-3  # measured 4.5e-5, where L-BFGS stops


def test_what_does_not_fit_is_named():
    with pytest.raises(ConfigError, match="Linear is not a timm, transformers or CLIP model; pass a module whose"):
        encoder(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="pool: got 'avg', expected one of auto, pooler"):
        encoder(parts.vit(), "avg")
    with pytest.raises(ConfigError, match="pool: got 'mean' for a timm model"):
        encoder(parts.vit(), "mean")
    with pytest.raises(ConfigError, match="the model has no pooler; use mean, first or last"):
        pooled_output(SimpleNamespace(last_hidden_state=torch.ones(1, 2, 3)), "pooler")
    with pytest.raises(ConfigError, match="gives SimpleNamespace without last_hidden_state"):
        pooled_output(SimpleNamespace(), "mean")
    with pytest.raises(ConfigError, match=r"embeddings: got \[2, 2\], expected \[classes, d\] without rows of zeros"):
        class_embeddings(torch.tensor([[1.0, 0], [0, 0]]))
    data = [(torch.randn(3, 4), torch.tensor([0, 0, 2]))]
    with pytest.raises(ConfigError, match="class 1 has no examples"):
        prototypes(nn.Identity(), data)
    with pytest.raises(ConfigError, match="labels: up to 2, expected below num_classes, 2"):
        trained_head(nn.Identity(), data, 2)
