"""The linearised form: the model itself at theta0, a straight line from there, with autograd's gradients."""

from __future__ import annotations

import copy

import atlas_parts as parts
import pytest
import torch
from torch import nn
from torch.nn import functional as tf

import hatcl
from hatcl import ConfigError
from hatcl.atlas import linearised
from hatcl.atlas.linear import plain_attention
from hatcl.calls import tensor_of


def bert(attention="sdpa"):
    torch.manual_seed(0)
    transformers = pytest.importorskip("transformers", reason="needs the extra: pip install 'hatcl[hf]'")
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=30,
        max_position_embeddings=12, num_labels=3, attn_implementation=attention,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).eval()


def moved(model, scale=0.1):
    torch.manual_seed(1)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p += scale * p.std() * torch.randn_like(p) if p.numel() > 1 else 0.1
    return other


def case(name):
    """A model, two vectors, and the arguments of a batch."""
    if name == "bert":
        model, args = bert(), {"input_ids": torch.randint(0, 30, (4, 7)), "attention_mask": torch.ones(4, 7).long()}
        args["attention_mask"][1, 4:] = 0
    else:
        model, args = parts.vit().eval(), {"x": torch.randn(4, 1, 8, 8)}
    return model, [hatcl.TaskVector.between(model, moved(model, s)) for s in (0.1, 0.2)], args


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_at_zero_it_is_the_model_bit_for_bit(name):
    model, vectors, args = case(name)
    with plain_attention(), torch.no_grad():
        want = tensor_of(model(**args))
    assert torch.equal(linearised(hatcl.compose(model, vectors))(**args), want)


@pytest.mark.parametrize("name", ["vit", "bert"])
@pytest.mark.parametrize("grain", ["block", "row", "partition:3"])
def test_its_gradient_at_zero_is_the_composers(name, grain):
    """There both are first-order: the same Jacobian, by forward mode here and by plain backward there."""
    model, vectors, args = case(name)
    grads = []
    for form in (lambda c: c, linearised):
        composer = hatcl.compose(model, vectors, grain)
        tf.cross_entropy(tensor_of(form(composer)(**args)), torch.tensor([0, 1, 2, 0])).backward()
        grads.append(composer.coefficients.grad)
    # measured: up to 3e-7 of the largest (float32, two orders of summation)
    assert (grads[0] - grads[1]).abs().max() <= 3e-6 * grads[0].abs().max()


def test_it_is_a_straight_line_and_its_slope_is_the_jacobian():
    model, vectors, args = case("vit")
    model = model.double()
    vectors = [hatcl.TaskVector.between(model, moved(model, s)) for s in (0.1, 0.2)]
    args = {"x": args["x"].double()}
    composer = hatcl.compose(model, vectors)
    line = linearised(composer)
    at0 = line(**args).detach()
    lam = torch.randn_like(composer.coefficients)
    changes = []
    for scale in (1.0, 2.0, 1e-5):
        composer.coefficients.data = scale * lam
        changes.append(line(**args).detach() - at0)
    assert (changes[1] - 2 * changes[0]).abs().max() <= 1e-12 * changes[1].abs().max()  # measured 1e-16
    with torch.no_grad():
        bend = composer(**args) - at0 - changes[2]
    # what is left of the model itself is of second order: 1e-5 times a curvature, relative to the change; measured 4e-6
    assert bend.abs().max() <= 1e-4 * changes[2].abs().max()


def test_its_gradient_away_from_zero_is_autograds_over_explicit_copies():
    base, vectors, composer = parts.tiny()
    x, y = parts.tiny_batches(1)[0]
    torch.manual_seed(2)
    composer.coefficients.data.normal_()
    tf.cross_entropy(linearised(composer)(x), y).backward()
    lam = composer.coefficients.detach().clone().requires_grad_(True)
    names = [b.name for b in composer.blocks]
    theta0 = {n: p.detach() for n, p in base.named_parameters()}
    tangents = {n: sum(lam[i, j] * v[n] for i, v in enumerate(vectors)) for j, n in enumerate(names)}
    out, change = torch.func.jvp(lambda p: torch.func.functional_call(base, p, (x,)), (theta0,), (tangents,))
    tf.cross_entropy(out + change, y).backward()
    # measured: 1.5e-8
    torch.testing.assert_close(composer.coefficients.grad, lam.grad, rtol=1e-6, atol=1e-6)


def test_it_learns_in_place_of_a_composer_after_a_step_of_the_composer_itself():
    _, _, composer = parts.tiny()
    x, y = parts.tiny_batches(1)[0]
    composer(x)  # leaves the tensors of its graph inside the model until backward
    fitted = hatcl.atlas.few_shot(linearised(composer), [(x, y)], [(x, y)], options={"epochs": 2})
    assert torch.equal(fitted.coefficients, composer.coefficients) and len(fitted.history) == 2


def test_transformers_own_fused_attention_is_refused():
    model = bert("eager")
    vector = hatcl.TaskVector.between(model, moved(model))
    composer = hatcl.compose(model, [vector])
    composer.model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ConfigError, match="attention is flash_attention_2, which has no forward-mode derivative"):
        linearised(composer)


class Fused(parts.Tiny):
    def forward(self, x):
        q = torch.tanh(self.a(x))[:, None, None]
        return self.b(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)[0][:, 0, 0])


class NotDerived(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class Custom(parts.Tiny):
    def forward(self, x):
        return self.b(NotDerived.apply(self.a(x)))


@pytest.mark.parametrize("kind", [Fused, Custom])
def test_an_operation_without_forward_mode_is_named(kind):
    torch.manual_seed(0)
    model = kind()
    composer = hatcl.compose(model, [hatcl.TaskVector.between(model, moved(model))])
    with pytest.raises(ConfigError, match="an operation of the model has no forward-mode derivative"):
        linearised(composer)(torch.randn(2, 3))


def test_other_errors_pass_as_they_are():
    _, _, composer = parts.tiny()
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        linearised(composer)(torch.randn(2, 5))


def test_twin_without_the_switch_attention_has_no_derivative(monkeypatch):
    import contextlib

    model, vectors, args = case("vit")
    monkeypatch.setattr("hatcl.atlas.linear.plain_attention", contextlib.nullcontext)
    with pytest.raises(ConfigError, match="no forward-mode derivative"):
        linearised(hatcl.compose(model, vectors))(**args)


def test_torchs_fused_transformer_layer_is_switched_off_and_on_again():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    vector = hatcl.TaskVector.between(model, moved(model))
    composer = hatcl.compose(model, [vector])
    before = torch.backends.mha.get_fastpath_enabled()
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        assert (linearised(composer)(x) - model(x)).abs().max() < 1e-5  # measured 2e-7
    assert torch.backends.mha.get_fastpath_enabled() == before


def test_a_parameter_that_is_a_number():
    class Scaled(parts.Tiny):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, x):
            return self.scale * super().forward(x)

    torch.manual_seed(0)
    model = Scaled()
    composer = hatcl.compose(model, [hatcl.TaskVector.between(model, moved(model))])
    composer.coefficients.data.fill_(0.5)
    x = torch.randn(2, 3)
    assert linearised(composer)(x).shape == (2, 2)
    assert composer.vector()["scale"].shape == ()
