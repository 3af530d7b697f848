"""The composer: exact at both ends, its gradients those of autograd, however it is trained, copied or interrupted."""

from __future__ import annotations

import collections
import copy
import gc
import io
import pickle
import weakref

import parts
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as tf
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import CheckpointError, checkpoint

import hatcl
from hatcl.map.grains import GRAINS
from hatcl.vectors import compose as module
from hatcl.vectors.delta import Delta, delta_between

# `matrix` and `lora_pair` leave out tensors by their meaning, `unit` needs a map: they have tests of their own
EVERY = [g for g in GRAINS if g not in ("matrix", "lora_pair", "unit", "partition:K")] + ["partition:1", "partition:3"]
# what is asked for; measured are up to 4e-7, or what a test says
FLOAT32 = 1e-6


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(5, 6, 2, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


class Odd(nn.Module):
    """A number, a layer used twice, a list held twice, a parameter that nothing uses, and one without elements."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.again = self.layers
        self.unused = nn.Parameter(torch.randn(4))
        self.nothing = nn.Parameter(torch.zeros(0, 3))

    def forward(self, x):
        for layer in [*self.layers, *self.again]:
            x = torch.tanh(layer(x)) * self.scale
        return x


def bert():
    transformers = pytest.importorskip("transformers", reason="needs the extra: pip install 'hatcl[hf]'")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=12, hidden_dropout_prob=0.1,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


def images(size):
    return lambda seed: torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed))


def numbers(*shape):
    return lambda seed: torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(seed):
    return torch.randint(0, 30, (2, 7), generator=torch.Generator().manual_seed(seed))


MODELS = {
    "vit": (parts.vit, images(16)),
    "resnet": (parts.resnet, images(32)),
    "bert": (bert, tokens),
    "lstm": (Recurrent, numbers(2, 4, 5)),
    "odd": (Odd, numbers(3, 6)),
}


def moved(model, seed, size=0.1):
    """A copy with other parameters, and the same running statistics."""
    out, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in out.parameters():
            p += size * torch.randn(p.shape, generator=generator).to(p.dtype)
    return out


def world(name, count=2, dtype=None):
    """A base in evaluation mode, its fine-tuned models, their vectors, and inputs."""
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    base = make().eval().to(dtype)
    tuned = [moved(base, 1 + i) for i in range(count)]
    x = inputs(0) if dtype is None or name == "bert" else inputs(0).to(dtype)
    return base, tuned, [hatcl.TaskVector.between(base, t) for t in tuned], x


def out_of(model, x):
    y = model(x)
    return y.logits if hasattr(y, "logits") else y


def loss_of(model, x):
    return out_of(model, x).square().mean()


def set_(composer, seed=5, size=0.3):
    """Coefficients at random."""
    with torch.no_grad():
        composer.coefficients.copy_(numbers(*composer.coefficients.shape)(seed) * size)
    return composer


def grads(composer, x, **how):
    composer.coefficients.grad = None
    loss_of(composer, x).backward(**how)
    return composer.coefficients.grad.clone()


def by_autograd(base, vectors, composer, loss, dtype=torch.float64):
    """The published way: the parameters as functions of the coefficients, through a functional call. They are composed,
    and their gradients summed, in float64; the model runs in `dtype`."""
    base = copy.deepcopy(base).to(dtype)
    lam = composer.coefficients.detach().double().requires_grad_()
    theta = {n: p.detach().double() for n, p in base.named_parameters()}
    for row, v in zip(lam, vectors, strict=True):
        wide = composer.grain.expand(row)
        theta = {n: p + (wide[n] * v[n].double() if n in wide and n in v else 0) for n, p in theta.items()}
    theta = {n: p.to(dtype) for n, p in theta.items()}
    loss(lambda *args, **kwargs: functional_call(base, theta, args, kwargs)).backward()
    return lam.grad


def error(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


def same_parameters(a, b):
    ours, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    return set(ours) == set(theirs) and all(
        p.dtype == theirs[n].dtype and torch.equal(p, theirs[n]) and torch.equal(p.signbit(), theirs[n].signbit())
        for n, p in ours.items()
    )


def clean(composer):
    """Nothing of a forward pass is left inside: only coefficients are learned, everything is a leaf."""
    return [n for n, p in composer.named_parameters() if p.requires_grad] == ["coefficients"] and all(
        isinstance(p, nn.Parameter) and p.is_leaf for p in composer.parameters()
    )


# ---- both ends, bit for bit --------------------------------------------------------------------------------------


@pytest.mark.parametrize("grain", EVERY)
@pytest.mark.parametrize("name", MODELS)
def test_zero_is_the_base_and_one_hot_the_fine_tuned(name, grain):
    base, tuned, vectors, x = world(name)
    before = parts.snapshot(base)
    composer = hatcl.compose(base, vectors, grain)
    assert not composer.coefficients.any() and not composer.training
    for lam, want in ((None, base), (0, tuned[0]), (1, tuned[1])):
        with torch.no_grad():
            composer.coefficients.zero_()
            if lam is not None:
                composer.coefficients[lam] = 1
            assert torch.equal(out_of(composer, x), out_of(want, x))
            merged = composer.merge()
            assert same_parameters(merged, want) and torch.equal(out_of(merged, x), out_of(want, x))
        assert type(merged) is type(base) and all(p.requires_grad for p in merged.parameters())
    composer.coefficients.data.zero_()
    assert torch.equal(out_of(composer, x), out_of(base, x))  # also while learning
    loss_of(composer, x).backward()
    assert parts.same(before, parts.snapshot(base)) and all(p.grad is None for p in base.parameters())


def test_units_and_matrices():
    base = parts.plain("mlp").eval()
    tuned, x = moved(base, 1), parts.images("mlp")
    v = hatcl.TaskVector.between(base, tuned)
    unit_map = parts.converted("mlp").hat_gates.unit_map
    composer = hatcl.compose(base, [v], "unit", unit_map=unit_map)
    composer.coefficients.data.fill_(1)
    assert same_parameters(composer.merge(), tuned)
    with torch.no_grad():
        composer.coefficients.zero_()
        composer.coefficients[0, 3] = 1  # a hidden unit's row and bias
    got = composer.merge()
    assert [n for n, p in got.named_parameters() if not torch.equal(p, base.get_parameter(n))] == ["1.weight", "1.bias"]
    assert torch.equal(got[1].weight[2], tuned[1].weight[2]) and torch.equal(got[1].weight[3:], base[1].weight[3:])
    set_(composer)
    want = by_autograd(base, [v], composer, lambda m: loss_of(m, x.double()))
    assert error(grads(composer, x), want) < FLOAT32
    composer = hatcl.compose(base, [v], "matrix")
    composer.coefficients.data.fill_(1)
    got = composer.merge()
    assert torch.equal(got[1].weight, tuned[1].weight) and torch.equal(got[1].bias, base[1].bias)


@pytest.mark.parametrize("name", MODELS)
def test_one_part_is_blockwise_bit_for_bit(name):
    base, _, vectors, x = world(name)
    block, part = (set_(hatcl.compose(base, vectors, g)) for g in ("block", "partition:1"))
    assert torch.equal(out_of(block, x), out_of(part, x)) and torch.equal(grads(block, x), grads(part, x))


def test_by_hand():
    net = nn.Linear(2, 2, bias=False)
    net.weight.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    v = hatcl.TaskVector({"weight": torch.tensor([[1.0, -1.0], [0.5, 2.0]])})
    x, row = torch.tensor([[1.0, 10.0]]), hatcl.compose(net, [v, -2 * v], "row")
    row.coefficients.data = torch.tensor([[1.0, 2.0], [0.0, 0.5]])
    # rows: [1, 2] + 1 [1, -1] and [3, 4] + (2 - 2 * 0.5) [0.5, 2]
    assert row.merge().weight.tolist() == [[2.0, 1.0], [3.5, 6.0]]
    y = row(x)
    assert y.tolist() == [[12.0, 63.5]]
    (y * torch.tensor([1.0, 3.0])).sum().backward()
    # <x, row of tau> = -9 and 20.5, times 1 and 3; the second vector is -2 of the first
    assert row.coefficients.grad.tolist() == [[-9.0, 61.5], [18.0, -123.0]]
    assert row.labels == ("weight[0]", "weight[1]") and row.vector()["weight"].tolist() == [[1.0, -1.0], [0.5, 2.0]]


# ---- gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grain", EVERY)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_autograds(name, grain):
    base, _, vectors, x = world(name, dtype=torch.float64)
    composer = set_(hatcl.compose(base, vectors, grain))
    want = by_autograd(base, vectors, composer, lambda m: loss_of(m, x))
    # float64 throughout, the result is float32: measured 6e-8; with coefficients in float64 6e-15
    assert error(grads(composer, x), want) < 2e-7
    assert error(grads(composer.double(), x), want) < 1e-13
    base, _, vectors, x = world(name)
    composer = set_(hatcl.compose(base, vectors, grain))
    got = grads(composer, x)
    # the same float32 gradients of the weights, summed in float64: measured 9e-7 (`global`, whose blocks cancel)
    assert error(got, by_autograd(base, vectors, composer, lambda m: loss_of(m, x), torch.float32)) < FLOAT32


def test_sums_of_many_elements_keep_their_precision():
    """A tensor of several chunks, whose products all have one sign."""
    torch.manual_seed(0)
    net = nn.Linear(1000, 700)
    x, v = torch.rand(1, 1000), hatcl.TaskVector({"weight": torch.rand(700, 1000)})
    for grain in ("block", "partition:3", "row"):
        composer = hatcl.compose(net, [v], grain)
        composer(x).sum().backward()
        want = composer.grain.reduce({"weight": (x * v["weight"]).double()}, "sum")
        # measured 3e-7, 3e-8 and 5e-8; by adding element to element in float32 a partition's was 3e-5
        assert error(composer.coefficients.grad[0], want) < FLOAT32


@pytest.mark.parametrize("grain", ["block", "row", "partition:3"])
def test_second_derivatives(grain):
    base, _, vectors, x = world("odd", dtype=torch.float64)
    composer = set_(hatcl.compose(base, vectors, grain).double())
    (first,) = torch.autograd.grad(loss_of(composer, x), composer.coefficients, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), composer.coefficients)

    lam = composer.coefficients.detach().clone().requires_grad_()
    theta = {n: p.detach() for n, p in base.named_parameters()}
    for row, v in zip(lam, vectors, strict=True):
        theta = {n: p + composer.grain.expand(row)[n] * v[n] for n, p in theta.items()}
    (first,) = torch.autograd.grad(functional_call(base, theta, (x,)).square().mean(), lam, create_graph=True)
    assert error(second, torch.autograd.grad(first.square().sum(), lam)[0]) < 1e-13


@pytest.mark.parametrize("grain", ["block", "row", "partition:3"])
def test_backward_in_all_orders(grain):
    base, _, vectors, x = world("vit")
    composer, z = set_(hatcl.compose(base, vectors, grain)), images(16)(9)
    one, other = grads(composer, x), grads(composer, z)
    loss = loss_of(composer, x)
    loss.backward(retain_graph=True)
    loss.backward()  # `grads` left that of z there
    assert torch.equal(composer.coefficients.grad, other + one + one)
    grads(composer, x)
    loss_of(composer, z).backward()
    assert torch.equal(composer.coefficients.grad, one + other)
    composer.coefficients.grad = None
    (loss_of(composer, x) + loss_of(composer, z)).backward()
    assert error(composer.coefficients.grad, one + other) < FLOAT32  # added up in another order
    (got,) = torch.autograd.grad(loss_of(composer, x), composer.coefficients)
    assert torch.equal(got, one) and clean(composer)
    w = x.clone().requires_grad_()
    (got,) = torch.autograd.grad(loss_of(composer, w), w)
    assert got.abs().max() > 0 and clean(composer)


def test_frozen_coefficients_give_gradients_of_the_input():
    base, tuned, vectors, x = world("vit")
    composer = hatcl.compose(base, vectors).requires_grad_(False)
    composer.coefficients.data[0] = 1
    x.requires_grad_()
    ours, theirs = (torch.autograd.grad(loss_of(m, x), x)[0] for m in (composer, tuned[0]))
    assert torch.equal(ours, theirs)


def test_autocast():
    base, _, vectors, x = world("vit")
    composer = set_(hatcl.compose(base, vectors))

    def loss(model):
        with torch.autocast("cpu", torch.bfloat16):
            return out_of(model, x).float().square().mean()

    assert out_of(composer, x).dtype is torch.float32 and loss(composer) != loss_of(composer, x)
    loss(composer).backward()
    assert error(composer.coefficients.grad, by_autograd(base, vectors, composer, loss, torch.float32)) < FLOAT32


def test_a_scaled_loss_takes_the_same_step():
    base, _, vectors, x = world("vit")
    after = []
    for scaled in (False, True):
        composer = set_(hatcl.compose(base, vectors))
        optimizer = torch.optim.SGD([composer.coefficients], 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        scaler.scale(loss_of(composer, x)).backward()
        scaler.step(optimizer)
        scaler.update()
        after.append(composer.coefficients.detach().clone())
    assert torch.equal(*after)  # a power of two
    scaler.scale(loss_of(composer, x) * float("inf")).backward()
    optimizer.zero_grad()
    scaler.scale(loss_of(composer, x) * float("inf")).backward()
    scaler.step(optimizer)
    assert torch.equal(composer.coefficients, after[1])  # skipped


def test_embeddings_with_sparse_gradients():
    net = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 2))
    v, x = hatcl.TaskVector.between(net, moved(net, 1)), torch.tensor([[1, 3, 3]])
    composer = set_(hatcl.compose(net, [v]))
    want = by_autograd(
        net, [v], composer, lambda m: m(x).square().mean(), torch.float64
    )  # its sum with the base turns the gradient dense
    assert error(grads(composer, x), want) < FLOAT32


# ---- checkpointing -----------------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """How the blocks are run: plain, or by either kind of checkpointing."""

    def __init__(self, how="plain"):
        super().__init__()
        self.stem, self.head = nn.Linear(6, 6), nn.Linear(6, 2)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.2)) for _ in range(3)])
        self.how = how

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x) if self.how == "plain" else checkpoint(block, x, use_reentrant=self.how == "reentrant")
        return {"logits": self.head(x)}


def checkpointed(how):
    torch.manual_seed(0)
    net = Checkpointed(how).train()
    composer = hatcl.compose(net, [hatcl.TaskVector.between(net, moved(net, i)) for i in (1, 2)])
    return set_(composer), numbers(4, 6)(0)


def value(composer, x, seed=0):
    torch.manual_seed(seed)
    return composer(x)["logits"].square().mean()


@pytest.mark.parametrize("how", ["reentrant", "not reentrant"])
def test_checkpointed_gradients_are_the_same(how):
    plain, x = checkpointed("plain")
    value(plain, x).backward()
    want = plain.coefficients.grad
    composer, _ = checkpointed(how)
    value(composer, x).backward()
    # reentrant checkpointing adds each block's part by itself: measured 0
    assert error(composer.coefficients.grad, want) < FLOAT32 and bool((want != 0).all()) and clean(composer)
    composer.coefficients.grad = None
    total = value(composer, x) + value(composer, x)
    with torch.no_grad():
        value(composer, x)  # evaluated in between, which writes the weights anew
    total.backward()
    assert error(composer.coefficients.grad, 2 * want) < FLOAT32 and clean(composer)


def test_twin_without_the_composed_tensors_checkpointing_loses_gradients(monkeypatch):
    monkeypatch.setattr(module._Again, "__call__", lambda self, _: None)
    composer, x = checkpointed("reentrant")
    value(composer, x).backward()
    zero = [n for n, g in zip(composer.labels, composer.coefficients.grad.T, strict=True) if not g.any()]
    assert zero and all(n.startswith("blocks.") for n in zero)  # without a word
    composer, x = checkpointed("not reentrant")
    with pytest.raises(CheckpointError):
        value(composer, x).backward()


def test_a_composer_inside_a_checkpoint():
    plain, x = checkpointed("plain")
    value(plain, x).backward()
    for how in ("plain", "not reentrant"):
        composer, _ = checkpointed(how)
        checkpoint(value, composer, x, use_reentrant=False).backward()
        assert torch.equal(composer.coefficients.grad, plain.coefficients.grad) and clean(composer)
        composer.coefficients.grad = None
        torch.manual_seed(0)
        y = checkpoint(lambda x, c=composer: c(x)["logits"], x, use_reentrant=False)
        y.square().mean().backward()  # runs the composer once more in the middle of the backward pass
        assert torch.equal(composer.coefficients.grad, plain.coefficients.grad) and clean(composer)
    composer, _ = checkpointed("plain")
    # by the reentrant kind, as for any module, only where an input requires a gradient
    checkpoint(value, composer, x.clone().requires_grad_(), use_reentrant=True).backward()
    assert error(composer.coefficients.grad, plain.coefficients.grad) < FLOAT32 and clean(composer)


def test_timm_and_transformers_checkpoint_too():
    for name, on in (
        ("vit", lambda m: m.set_grad_checkpointing()),
        ("bert", lambda m: m.gradient_checkpointing_enable()),
    ):
        base, _, vectors, x = world(name)
        base.train()
        composer = set_(hatcl.compose(base, vectors))
        torch.manual_seed(0)
        want = grads(composer, x)
        on(composer.model)
        torch.manual_seed(0)
        assert error(grads(composer, x), want) < FLOAT32 and clean(composer)


# ---- between forward and backward --------------------------------------------------------------------------------


def disturb(composer, x):
    """What may come between a forward pass and its backward pass."""
    with torch.no_grad():
        before = composer.coefficients.clone()
        composer.coefficients += 1
        out_of(composer, x)
        composer.merge()
        composer.coefficients.copy_(before)


@pytest.mark.parametrize("grain", ["block", "row", "partition:3"])
def test_what_comes_between_does_not_disturb(grain):
    base, _, vectors, x = world("vit")
    composer = set_(hatcl.compose(base, vectors, grain))
    want = grads(composer, x)
    loss = loss_of(composer, x)
    disturb(composer, x)
    composer.coefficients.grad = None
    loss.backward()
    assert torch.equal(composer.coefficients.grad, want)
    loss = loss_of(composer, x)
    composer.coefficients.grad = None
    composer.coefficients.data.mul_(2)  # as a step does
    loss.backward()
    assert torch.equal(composer.coefficients.grad, want)
    with torch.no_grad():
        new = set_(hatcl.compose(base, vectors, grain), size=0.6)
        assert torch.equal(out_of(composer, x), out_of(new, x))  # the doubled ones are what counts now


def test_twin_without_writing_the_weights_again_the_gradients_are_refused(monkeypatch):
    base, _, vectors, x = world("vit")
    composer = set_(hatcl.compose(base, vectors))
    monkeypatch.setattr(module._Again, "__call__", lambda self, _: None)
    loss = loss_of(composer, x)
    disturb(composer, x)
    with pytest.raises(
        hatcl.VectorError, match="this gradient belongs to coefficients that the composer no longer holds"
    ):
        loss.backward()


@pytest.mark.parametrize("name", ["odd", "vit"])
def test_two_forward_passes_at_different_coefficients_in_one_backward(name):
    base, _, vectors, x = world(name)
    composer = set_(hatcl.compose(base, vectors))
    one = grads(composer, x)
    loss = loss_of(composer, x)
    composer.coefficients.data.mul_(2)
    other = grads(composer, x)
    composer.coefficients.grad = None
    (loss + loss_of(composer, x)).backward()
    assert error(composer.coefficients.grad, one + other) < FLOAT32 and clean(composer)


def test_evaluation_between_steps_changes_nothing():
    base, _, vectors, x = world("resnet")
    ends = []
    for evaluate in (False, True):
        composer = hatcl.compose(base, vectors)
        optimizer = torch.optim.AdamW([composer.coefficients], 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(composer, x).backward()
            optimizer.step()
            if evaluate:
                with torch.no_grad():
                    first = out_of(composer, x)
                with torch.inference_mode():
                    assert torch.equal(out_of(composer, x), first)
                assert torch.equal(out_of(composer.merge(), x), first)
        ends.append(composer.coefficients.detach())
    assert torch.equal(*ends)


def test_training_mode():
    """Dropout, and batch norms whose statistics the copy alone collects."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3)).train()
    before, x = parts.snapshot(net), numbers(16, 6)(0)
    v = hatcl.TaskVector.between(net, moved(net, 1))
    composer = set_(hatcl.compose(net, [v]))
    assert composer.training
    plain = copy.deepcopy(net)

    def loss(model):
        torch.manual_seed(3)
        return loss_of(model, x)

    want = by_autograd(plain, [v], composer, loss, torch.float32)
    loss(composer).backward()
    assert error(composer.coefficients.grad, want) < FLOAT32
    assert parts.same(before, parts.snapshot(net))
    assert not torch.equal(composer.model[1].running_mean, net[1].running_mean)
    merged = composer.merge()
    assert merged.training and torch.equal(merged[1].running_mean, composer.model[1].running_mean)
    assert int(merged[1].num_batches_tracked) == 1


def test_modes_and_what_is_trainable_are_the_models():
    net = nn.Sequential(nn.Linear(3, 3), nn.Dropout(), nn.Linear(3, 2))
    net[0].requires_grad_(False)
    net[1].eval()
    composer = hatcl.compose(net, [hatcl.TaskVector.between(net, moved(net, 1))])
    merged = composer.merge()
    assert [p.requires_grad for p in merged.parameters()] == [False, False, True, True]
    assert merged.training and not merged[1].training
    assert not hatcl.compose(net.eval(), [hatcl.TaskVector.between(net, moved(net, 1))]).training


# ---- what is inside ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_only_coefficients_are_parameters_to_learn(name):
    base, _, vectors, x = world(name)
    composer = set_(hatcl.compose(base, vectors))
    held = {n: id(p) for n, p in composer.named_parameters()}
    loss = loss_of(composer, x)
    assert clean(composer)
    loss.backward()
    assert clean(composer) and {n: id(p) for n, p in composer.named_parameters()} == held
    assert all(p.grad is None for p in composer.model.parameters())
    with pytest.raises((TypeError, ValueError), match="missing|specify"):
        composer()  # the model asks for an input
    assert clean(composer) and error(grads(composer, x), grads(set_(hatcl.compose(base, vectors)), x)) == 0


class Breaks(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.fc = nn.GRU(3, 3), nn.Linear(3, 3)
        self.armed = False

    def forward(self, x):
        x = self.fc(self.rnn(x)[0])
        if self.armed:
            raise ArithmeticError("broken")
        return x


def test_an_exception_leaves_nothing_inside():
    torch.manual_seed(0)
    net, x = Breaks(), numbers(4, 3)(0)
    composer = set_(hatcl.compose(net, [hatcl.TaskVector.between(net, moved(net, 1))]))
    want = grads(composer, x)
    composer.model.armed = True
    with pytest.raises(ArithmeticError, match="broken"):
        composer(x)
    assert clean(composer) and not any(w.requires_grad for w in composer.model.rnn._flat_weights)
    with torch.no_grad(), pytest.raises(ArithmeticError, match="broken"):
        composer(x)
    composer.model.armed = False
    assert torch.equal(grads(composer, x), want) and clean(composer)
    hook = composer.model.rnn.register_forward_hook(lambda _, i, out: out[0].register_hook(lambda g: 1 / 0) and None)
    y, z = composer(x), composer.model.fc.weight
    with pytest.raises(ZeroDivisionError):  # in the middle of a backward pass
        y.sum().backward()
    hook.remove()
    with torch.no_grad():
        composer(x)
    assert clean(composer)
    assert torch.equal(grads(composer, x), want) and clean(composer) and composer.model.fc.weight is z


def test_inside_another_module():
    base, _, vectors, x = world("vit")

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.composer, self.head = hatcl.compose(base, vectors), nn.Linear(parts.CLASSES, 2)

        def forward(self, x):
            return self.head(self.composer(x))

    outer = Outer()
    before = parts.snapshot(outer.composer.model)
    loss_of(outer, x)  # a forward pass without backward, before the optimizer is made
    optimizer = torch.optim.AdamW(outer.parameters(), 1e-2, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(outer, x).backward()
        nn.utils.clip_grad_norm_(outer.parameters(), 1.0)
        optimizer.step()
    assert outer.composer.coefficients.abs().min() > 0 and set(outer.state_dict()) > {
        "head.bias",
        "composer.coefficients",
    }
    outer.composer.coefficients.data.zero_()
    assert parts.same(before, parts.snapshot(outer.composer.merge()))
    twin = copy.deepcopy(outer)
    assert torch.equal(twin(x), outer(x)) and twin.composer.model is not outer.composer.model


def test_no_copies_are_kept():
    base, _, vectors, _ = world("vit")
    composer = hatcl.compose(base, vectors, "partition:3")
    named = dict(base.named_parameters())
    for block in composer.blocks:
        assert block.theta0.data_ptr() == named[block.name].data_ptr() != block.target.data_ptr()
        assert [d.value.data_ptr() for d in block.deltas] == [v[block.name].data_ptr() for v in vectors]
        # a part number is a byte, where it is kept at all
        assert block.local is None or block.local.dtype is torch.uint8
    assert sum(p.numel() for p in composer.model.parameters()) == sum(p.numel() for p in base.parameters())


def test_vectors_from_files_come_into_memory(tmp_path):
    base, tuned, vectors, x = world("vit")
    files = [hatcl.TaskVector.load(v.save(tmp_path / f"{i}.safetensors")) for i, v in enumerate(vectors)]
    read, kept = (set_(hatcl.compose(base, v)) for v in (files, vectors))
    for f in tmp_path.iterdir():
        f.write_bytes(b"gone")
    # sums by SIMD depend on where a tensor lies: those that files are mapped to lie at odd addresses
    assert torch.equal(grads(read, x), grads(kept, x))
    assert all(d.value.data_ptr() % 64 == 0 for b in read.blocks for d in b.deltas if d.value.numel())


@pytest.mark.parametrize("backward", [False, True])
def test_a_composer_goes_when_it_is_let_go(backward):
    base, _, vectors, x = world("odd")
    composer = hatcl.compose(base, vectors)
    loss = loss_of(composer, x)
    if backward:
        loss.backward()
    there = weakref.ref(composer)
    del composer, loss
    gc.collect()
    assert there() is None


# ---- copies, files, casts ----------------------------------------------------------------------------------------


def pickled(composer):
    return pickle.loads(pickle.dumps(composer))


def saved(composer):
    buffer = io.BytesIO()
    torch.save(composer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("how", [copy.deepcopy, pickled, saved])
@pytest.mark.parametrize("grain", EVERY)
def test_copies(grain, how):
    base, _, _, x = world("lstm")
    with torch.no_grad():
        base.head.bias.add_(1)  # its version counts what was written in place; that of a copy starts anew
    vectors = [hatcl.TaskVector.between(base, moved(base, i)) for i in (1, 2)]
    composer = set_(hatcl.compose(base, vectors, grain))
    want, out = grads(composer, x), out_of(composer, x)
    twin = how(composer)
    assert torch.equal(out_of(twin, x), out) and torch.equal(grads(twin, x), want) and clean(twin)
    twin.coefficients.data.zero_()
    with torch.no_grad():
        assert torch.equal(out_of(twin, x), out_of(base, x)) and not torch.equal(out_of(composer, x), out_of(base, x))
    out.sum().backward()  # what was computed before the copy was made


def test_state_dicts():
    base, tuned, vectors, x = world("resnet")
    composer = set_(hatcl.compose(base, vectors))
    loss_of(composer, x).backward()
    state = {n: t.clone() for n, t in composer.state_dict().items()}
    assert set(state) == {"coefficients", *(f"model.{n}" for n in base.state_dict())}
    fresh = hatcl.compose(base, vectors)
    fresh.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(out_of(fresh, x), out_of(composer, x))
    # the same coefficients over another base's weights: the composer's own base counts, not what the file composed
    other = {n: torch.zeros_like(t) if n.endswith("conv2.weight") else t for n, t in state.items()}
    with torch.no_grad():
        want = out_of(composer, x)
        composer.load_state_dict(other)
        assert torch.equal(out_of(composer, x), want)
    with pytest.raises(RuntimeError, match="size mismatch for coefficients"):
        hatcl.compose(base, vectors, "global").load_state_dict(state)


def test_twin_without_counting_versions_a_loaded_state_stays(monkeypatch):
    monkeypatch.setattr(module, "_version", lambda t: 0)
    base, _, vectors, x = world("resnet")
    composer = set_(hatcl.compose(base, vectors))
    with torch.no_grad():
        want = out_of(composer, x)
        state = composer.state_dict()
        composer.load_state_dict(
            {n: torch.zeros_like(t) if n.endswith("conv2.weight") else t for n, t in state.items()}
        )
        assert not torch.equal(out_of(composer, x), want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("grain", ["block", "row", "partition:3"])
def test_casts(grain, dtype):
    base, tuned, vectors, x = world("vit")
    composer = hatcl.compose(base, vectors, grain)
    loss_of(composer, x).backward()
    composer.to(dtype)
    assert composer.coefficients.dtype is dtype and clean(composer)
    with torch.no_grad():
        for lam, want in ((None, base), (1, tuned[1])):
            composer.coefficients.zero_()
            if lam is not None:
                composer.coefficients[lam] = 1
            want = copy.deepcopy(want).to(dtype)
            assert same_parameters(composer.merge(), want)
            assert torch.equal(out_of(composer, x.to(dtype)), out_of(want, x.to(dtype)))
    got = grads(composer, x.to(dtype))
    want = by_autograd(base, vectors, composer, lambda m: loss_of(m, x.double()))
    # a backward pass in 8 (11) bits of precision: measured 1.5e-2 (2e-3)
    assert error(got, want) < {torch.float64: 1e-6, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]


@pytest.mark.parametrize("grain", EVERY)
def test_back_and_forth_and_other_devices(grain):
    base, _, vectors, x = world("lstm")
    composer = set_(hatcl.compose(base, vectors, grain))
    want = grads(composer, x)
    assert torch.equal(grads(composer.double().float(), x), want)
    assert torch.equal(grads(composer.to("cpu"), x), want)
    composer.to("meta")
    assert {
        t.device.type for b in composer.blocks for t in (b.theta0, b.target, b.groups, *(d.value for d in b.deltas))
    } == {"meta"}


@pytest.mark.parametrize("grain", ["block", "row", "partition:2"])
def test_small_changes_add_up_in_half_precision(grain):
    """A bfloat16 near 1 moves in steps of 2^-7; eight changes of 2^-10 make one."""
    net = nn.Linear(2, 2, bias=False).bfloat16()
    net.weight.data.fill_(1.0)
    composer = hatcl.compose(net, [hatcl.TaskVector({"weight": torch.full((2, 2), 2.0**-10)}) for _ in range(8)], grain)
    composer.coefficients.data.fill_(1.0)
    assert composer(torch.eye(2, dtype=torch.bfloat16)).tolist() == [[1 + 2**-7] * 2] * 2
    assert composer.merge().weight.tolist() == [[1 + 2**-7] * 2] * 2


@pytest.mark.parametrize("grain", EVERY)
def test_channels_last(grain):
    """Weights that do not lie in memory in the order of their dimensions; the vectors lie as they like."""
    base, tuned, vectors, x = world("resnet")
    plain = set_(hatcl.compose(base, vectors, grain))
    base = copy.deepcopy(base).to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    composer = set_(hatcl.compose(base, vectors, grain))
    assert composer.model.conv1[0].weight.stride() == base.conv1[0].weight.stride() != tuned[0].conv1[0].weight.stride()
    # other convolution kernels: measured 4e-7
    assert error(grads(composer, x), grads(plain, x)) < 2e-6
    assert same_parameters(composer.merge(), plain.merge())
    with torch.no_grad():
        composer.coefficients.zero_()
        assert torch.equal(out_of(composer, x), out_of(base, x))
        composer.coefficients[0] = 1
        assert same_parameters(composer.merge(), tuned[0])
    moved_later = set_(plain.to(memory_format=torch.channels_last), 8)
    assert error(grads(moved_later, x), grads(set_(composer, 8), x)) < FLOAT32


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
def test_vectors_in_another_dtype(kind):
    base, _, vectors, x = world("vit")
    composer = set_(hatcl.compose(base, vectors, dtype=kind))
    assert {d.value.dtype for b in composer.blocks for d in b.deltas} == {kind}
    rounded = [v.to(kind) for v in vectors]
    want = by_autograd(base, rounded, composer, lambda m: loss_of(m, x), torch.float32)
    assert error(grads(composer, x), want) < FLOAT32
    for grain in ("row", "partition:3"):
        other = set_(hatcl.compose(base, vectors, grain, dtype=kind))
        want = by_autograd(base, rounded, other, lambda m: loss_of(m, x), torch.float32)
        assert error(grads(other, x), want) < FLOAT32


# ---- what vectors hold -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grain", ["block", "row", "partition:3", "global"])
def test_vectors_of_some_tensors(grain):
    """As of LoRA adapters: a vector that lacks a tensor leaves it."""
    base, _, _, x = world("odd")
    a = hatcl.TaskVector({"layers.0.weight": numbers(6, 6)(1)}, partial=True)
    b = hatcl.TaskVector({"layers.1.weight": numbers(6, 6)(2), "scale": torch.tensor(0.5)}, partial=True)
    composer = set_(hatcl.compose(base, [a, b], grain))
    assert [blk.name for blk in composer.blocks] == ["scale", "layers.0.weight", "layers.1.weight"]
    assert [blk.changing for blk in composer.blocks] == [[1], [0], [1]]
    got = grads(composer, x)
    assert error(got, by_autograd(base, [a, b], composer, lambda m: loss_of(m, x.double()))) < FLOAT32
    if grain == "block":
        assert bool((got == 0).tolist() == [[True, False, True], [False, True, False]])
    # what it lacks takes no memory
    assert all(
        d.value.untyped_storage().nbytes() == 4 for d in (composer.blocks[2].deltas[0], composer.blocks[0].deltas[0])
    )
    composer.coefficients.data.copy_(torch.tensor([1.0, 0.0])[:, None].expand_as(composer.coefficients))
    assert same_parameters(composer.merge(), a.apply_to(base))


def test_buffers_in_vectors_are_left_to_the_model():
    torch.manual_seed(0)
    base = parts.resnet().eval()
    other = moved(base, 1)
    for m in other.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean += 1
    x = images(32)(0)
    with_, without = (hatcl.TaskVector.between(base, other, buffers=b) for b in (True, False))
    ours, theirs = hatcl.compose(base, [with_]), hatcl.compose(base, [without])
    assert ours.labels == theirs.labels
    for c in (ours, theirs):
        c.coefficients.data.fill_(1)
    assert parts.same(parts.snapshot(ours.merge()), parts.snapshot(theirs.merge()))
    other.load_state_dict({n: base.state_dict()[n] for n, _ in base.named_buffers()}, strict=False)
    with torch.no_grad():
        assert torch.equal(ours(x), other(x))


def of_inputs(model, batches):
    """The mean and the variance of what reaches each batch norm: of each batch, averaged over the batches."""
    model, seen = copy.deepcopy(model).train(), {}
    for name, m in model.named_modules():
        if isinstance(m, nn.BatchNorm2d):
            m.register_forward_pre_hook(
                lambda _, args, name=name: seen.setdefault(name, []).append(args[0].double().transpose(0, 1).flatten(1))
            )
    with torch.no_grad():
        for x in batches:
            model(x)
    return {n: torch.stack([torch.stack([x.mean(1), x.var(1)]) for x in xs]).mean(0) for n, xs in seen.items()}


@pytest.mark.parametrize("way", ["merge", "compose"])
def test_running_statistics_are_renewed_by_torchs_own_function(way):
    base, _, vectors, x = world("resnet", dtype=torch.float64)
    before, batches = parts.snapshot(base), [numbers(8, 3, 32, 32)(i).double() for i in range(3)]
    if way == "merge":
        model = hatcl.merge(vectors, "mean").apply_to(base)
    else:
        model = set_(hatcl.compose(base, vectors)).double()
    fresh = copy.deepcopy(model) if way == "merge" else model.merge()
    want = of_inputs(fresh, batches)
    assert len(want) == sum(isinstance(m, nn.BatchNorm2d) for m in base.modules())
    for name, (mean, var) in want.items():
        fresh.get_submodule(name).running_mean.copy_(mean)
        fresh.get_submodule(name).running_var.copy_(var)
    with torch.no_grad():
        assert error(model(x), fresh(x)) > 0.1  # the twin: with the base's statistics it is measured 0.9
        update_bn(batches, model)
        assert error(model(x), fresh(x)) < 1e-13  # measured 1.2e-14
    assert not model.training and parts.same(before, parts.snapshot(base))
    if way == "compose":  # what is merged takes them along, and learning goes on with them
        with torch.no_grad():
            assert torch.equal(model(x), model.merge()(x)) and clean(model)
        renewed = copy.deepcopy(base)
        renewed.load_state_dict(dict(model.model.named_buffers()), strict=False)
        assert error(grads(model, x), by_autograd(renewed, vectors, model, lambda m: loss_of(m, x))) < 1e-13


def test_statistics_of_batches_that_mix_the_tasks_are_those_of_the_mixture():
    """Of tasks whose inputs are 0 and 2 the variance is 1; batches of one task each have none."""
    x = torch.tensor([0.0, 2.0]).repeat_interleave(50)[:, None]
    apart, mixed = (nn.BatchNorm1d(1) for _ in range(2))
    update_bn(x.split(50), apart)
    update_bn([x[::2], x[1::2]], mixed)
    assert apart.running_mean.item() == mixed.running_mean.item() == 1.0
    assert apart.running_var.item() == 0 and mixed.running_var.item() == pytest.approx(50 / 49)  # unbiased


def test_tied_tensors():
    """Once, under whichever of its names a vector knows it; and where two parameters share memory only."""
    base, tuned, vectors, x = world("bert")
    first, second = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
    renamed = hatcl.TaskVector({second if n == first else n: vectors[0].delta(n) for n in vectors[0]})
    both = hatcl.TaskVector({**{n: vectors[0].delta(n) for n in vectors[0]}, second: vectors[0].delta(first)})
    for v in (vectors[0], renamed, both):
        composer = hatcl.compose(base, [v])
        assert first in composer.labels and second not in composer.labels
        composer.coefficients.data.fill_(1)
        merged = composer.merge()
        assert same_parameters(merged, tuned[0]) and merged.get_parameter(second) is merged.get_parameter(first)
    differ = hatcl.TaskVector({**{n: vectors[0].delta(n) for n in vectors[0]}, second: vectors[1].delta(first)})
    with pytest.raises(
        hatcl.VectorError, match=f"{first} and {second} are one tensor in the model and differ in the vector"
    ):
        hatcl.compose(base, [differ])

    net = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    net[1].weight = nn.Parameter(net[0].weight.data)
    goal = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    goal[1].weight = nn.Parameter(goal[0].weight.data)
    composer, ids = hatcl.compose(net, [hatcl.TaskVector.between(net, goal)]), torch.arange(5)
    composer.coefficients.data.fill_(1)
    with torch.no_grad():
        assert composer.labels == ("0.weight",) and torch.equal(composer(ids), goal(ids))


@pytest.mark.parametrize("grain", EVERY)
def test_the_composition_as_one_vector(grain):
    base, _, vectors, _ = world("odd")
    composer = set_(hatcl.compose(base, vectors, grain))
    ours, merged = composer.vector().apply_to(base), composer.merge()
    for n, p in merged.named_parameters():
        # the vector is rounded to float32 before it is added: measured 1.2e-7
        assert torch.allclose(ours.get_parameter(n), p, rtol=0, atol=5e-7)
    assert composer.vector()["scale"].shape == ()
    other = moved(base, 7)
    with pytest.raises(hatcl.IntegrityError, match="differs from this vector's base"):
        composer.vector().apply_to(other)


def test_outputs_of_any_kind_are_found():
    class Out:
        __slots__ = ("inside", "me")

        def __init__(self, y):
            self.inside = {"list": collections.deque([(y, None)]), "text": "abc"}
            self.me = self

    class Net(Checkpointed):
        def forward(self, x):
            return Out(super().forward(x)["logits"])

    torch.manual_seed(0)
    net, x = Net("reentrant").eval(), numbers(2, 6)(0)
    composer = set_(hatcl.compose(net, [hatcl.TaskVector.between(net, moved(net, 1))]))
    composer(x).inside["list"][0][0].sum().backward()
    assert bool((composer.coefficients.grad != 0).all()) and clean(composer)


def test_compiled():
    """Under torch.compile a composer gives the same gradients, also for other coefficients than at first."""
    torch._dynamo.reset()
    net, x = nn.Linear(4, 3), numbers(2, 4)(0)
    v = hatcl.TaskVector.between(net, moved(net, 1))
    composer, reference = hatcl.compose(net, [v]), hatcl.compose(net, [v])
    run = torch.compile(lambda x: composer(x).square().sum() * 2, backend="aot_eager")
    for seed in (1, 2):
        set_(composer, seed).coefficients.grad = None
        run(x).backward()
        want = 2 * 2 * grads(set_(reference, seed), x) * 3  # `grads` takes the mean of six
        assert error(composer.coefficients.grad, want) < FLOAT32 and clean(composer)


# ---- bad input ---------------------------------------------------------------------------------------------------


def test_a_model_that_was_changed_since():
    base, _, vectors, x = world("vit")
    composer = hatcl.compose(base, vectors)
    out_of(composer, x)
    with torch.no_grad():
        base.cls_token.add_(1)
    for call in (lambda: composer(x), composer.merge, composer.vector):
        with pytest.raises(
            hatcl.VectorError, match="cls_token: the model given to compose has changed since; compose it"
        ):
            call()
    base.load_state_dict(base.state_dict())
    composer = hatcl.compose(base, vectors, check=False)
    loss = loss_of(composer, x)
    torch.optim.SGD(base.parameters(), 0.1).step()  # without gradients it moves nothing
    loss.backward()


def test_errors():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    v = hatcl.TaskVector.between(net, moved(net, 1))
    some = {n: v.delta(n) for n in list(v)[:3]}
    wide = hatcl.TaskVector({**some, "1.bias": torch.zeros(5)})
    cases = [
        ([], {}, hatcl.VectorError, "compose: no task vectors; pass at least one"),
        (v, {}, hatcl.VectorError, "compose: got str among the vectors, expected a list of TaskVectors"),
        ([v, net.state_dict()], {}, hatcl.VectorError, "got OrderedDict among the vectors, expected a list of TaskV"),
        ([v, wide], {}, hatcl.VectorError, r"1.bias is \[5\] in vector 1, \[2\] in the model; was the vector taken"),
        ([v, hatcl.TaskVector(some)], {}, hatcl.VectorError, "vector 1 lacks 1 tensors that vector 0 has: 1.bias"),
        ([hatcl.TaskVector({**some, "2.bias": torch.zeros(5)})], {}, hatcl.VectorError,
         r"vector 0 changes 2.bias, which the model lacks \(1 such tensors\); compose the model that the vectors"),
        ([hatcl.TaskVector({"x": torch.zeros(5)})], {}, hatcl.VectorError, "vector 0 has none of the model's param.*x"),
        ([v], {"grain": "blok"}, hatcl.ConfigError, "got 'blok', expected one of .*; did you mean 'block'"),
        ([v], {"grain": "unit"}, hatcl.ConfigError, "unit needs the map"),
        ([v], {"grain": "lora_pair"}, hatcl.ConfigError, "lora_pair finds no groups"),
        ([v], {"grain": "unit", "unit_map": parts.converted("mlp").hat_gates.unit_map}, hatcl.ConfigError,
         r"1.weight is \[32, 48\] in the map, \[2, 4\] here"),
        ([v], {"dtype": torch.int8}, hatcl.VectorError, "got torch.int8, expected floating point"),
    ]  # fmt: skip
    for vectors, options, kind, text in cases:
        with pytest.raises(kind, match=text):
            hatcl.compose(net, vectors, **options)
    other = moved(net, 2)
    with pytest.raises(hatcl.IntegrityError, match="0.weight differs from the base of vector 0; compose it with its"):
        hatcl.compose(other, [v])
    hatcl.compose(other, [v], check=False)

    small = nn.Sequential(nn.Linear(2, 2))
    unit_map = parts.converted("mlp").hat_gates.unit_map  # its first layer has another name
    with pytest.raises(hatcl.VectorError, match="the grain unit covers none of the vectors' tensors"):
        hatcl.compose(small, [hatcl.TaskVector.between(small, moved(small, 1))], "unit", unit_map=unit_map)
    whole = nn.Linear(3, 3)
    whole.weight = nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)
    v8 = hatcl.TaskVector({"weight": torch.ones(3, 3)})
    with pytest.raises(hatcl.VectorError, match=r"weight is int8 \[3, 3\], expected float16 or wider; dequantise it"):
        hatcl.compose(whole, [v8])
    composer = hatcl.compose(net, [v])
    composer.coefficients = nn.Parameter(torch.zeros(2, 4))
    with pytest.raises(
        hatcl.VectorError, match=r"coefficients of shape \[2, 4\]; expected \[1, 4\]: 1 vectors, 4 groups"
    ):
        composer(torch.zeros(1, 3))


def test_frozen_integers_beside_do_no_harm():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    net[0].codes = nn.Parameter(torch.ones(4, dtype=torch.int8), requires_grad=False)
    v = hatcl.TaskVector.between(net, moved_floats(net))
    merged = set_(hatcl.compose(net, [v])).merge()
    assert torch.equal(merged[0].codes, net[0].codes) and not merged[0].codes.requires_grad


def moved_floats(net):
    out = copy.deepcopy(net)
    out[0].weight.data += 1
    return out


def test_remainders_survive():
    """A fine-tuned weight that no float32 difference gives back."""
    base, tuned = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
    base.weight.data, tuned.weight.data = torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0**-30, -0.0]])
    assert delta_between(base.weight, tuned.weight).at is not None
    v = hatcl.TaskVector.between(base, tuned)
    for vector, exact in ((v, True), (hatcl.TaskVector({"weight": Delta(v["weight"])}), False)):
        composer = hatcl.compose(base, [vector, v])
        composer.coefficients.data[0] = 1
        assert same_parameters(composer.merge(), tuned) == exact


def test_it_says_what_it_is():
    base, _, vectors, _ = world("odd")
    composer = hatcl.compose(base, vectors, "partition:3", seed=4)
    assert "vectors=2, grain=partition:3, groups=" in repr(composer) and composer.grain.name == "partition:3"
    assert isinstance(composer, hatcl.Composer)
    other = hatcl.compose(base, vectors, "partition:3", seed=5)
    assert not torch.equal(out_of(set_(composer), numbers(3, 6)(0)), out_of(set_(other), numbers(3, 6)(0)))
    assert not tf.cosine_similarity(composer.coefficients, other.coefficients).isnan().any()


# ---- memory ------------------------------------------------------------------------------------------


def order_of_backward(monkeypatch):
    """The blocks whose gradients are taken, and "between" where the gradient passes from the second layer to the
    first."""
    said = []
    products = module.Block.products
    monkeypatch.setattr(module.Block, "products", lambda b, g: said.append(b.name) or products(b, g))
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    vector = hatcl.TaskVector({n: torch.ones_like(p) for n, p in net.named_parameters()})
    composer = hatcl.compose(net, [vector])
    first = composer.model[0]
    first.register_forward_hook(lambda m, args, out: out.register_hook(lambda g: said.append("between")) and None)
    composer(torch.ones(1, 3)).sum().backward()
    return said


def test_a_gradient_is_taken_as_soon_as_it_is_there(monkeypatch):
    said = order_of_backward(monkeypatch)
    assert set(said[:2]) == {"1.weight", "1.bias"} and said[2] == "between", said


def test_twin_in_autograds_own_order_gradients_wait_for_the_end(monkeypatch):
    monkeypatch.setattr(module, "FIRST", 0)
    assert order_of_backward(monkeypatch)[0] == "between"


def test_a_path_is_no_model_to_compose():
    vector = hatcl.TaskVector({"w": torch.ones(2)})
    with pytest.raises(hatcl.VectorError, match="compose: got a str, expected the pretrained model as a module; files"):
        hatcl.compose("base", [vector])
