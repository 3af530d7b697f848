"""Soft gates are computed once a step, and are those that each layer would compute for itself."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as tf
from torch.utils._python_dispatch import TorchDispatchMode

import hatcl
from hatcl import functional
from hatcl.hat import binding
from hatcl.hat import gates as gates_file
from hatcl.hat.gates import gates_of


class Seen(TorchDispatchMode):
    """How often each operation ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))

    def count(self, name):
        return self.names.count(f"aten::{name}")


class Net(nn.Module):
    """Convolutions, a norm over units, heads whose units come in parts, and a residual stream."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.norm(self.bn(self.stem(x)).flatten(2).transpose(1, 2))
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.head((x + self.proj(tf.scaled_dot_product_attention(q, k, v))).mean(1))


pytestmark = pytest.mark.filterwarnings("ignore:task [01] (is sealed after|uses every unit)")
X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(4) % 3


@pytest.fixture(scope="module")
def made():
    torch.manual_seed(0)
    return hatcl.convert(Net(), num_tasks=3, example_inputs=X)


def learning(model, task=0, steps=4):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return optimizer, hatcl.learn(model, task, optimizer, steps=steps)


def spread(model, task=0):
    """Embeddings of every size, so that gates are of every size, exact zeros among them."""
    with torch.no_grad():
        e = gates_of(model)[0].embeddings[task]
        e.copy_(torch.linspace(-2, 2, e.numel())[torch.randperm(e.numel(), generator=torch.Generator().manual_seed(1))])
        gates_of(model)[0].scale.fill_(3.0)


def loss_of(model, block):
    return tf.cross_entropy(model(X), Y) + block.penalty()


@pytest.mark.parametrize("reuse", ["all", "none"])
def test_they_are_computed_once_and_are_what_each_layer_would_compute(made, reuse, monkeypatch):
    model = copy.deepcopy(made).train()
    gates = gates_of(model)[0]
    gates.config = gates.config.replace(reuse=reuse)
    gates.masks[1, ::3], gates.sealed[1] = True, True
    gates._changed([1])

    def run():
        model.zero_grad()
        other = copy.deepcopy(model)
        optimizer, block = learning(other)
        with block as learned:
            spread(other)
            with Seen() as seen:
                loss = loss_of(other, learned)
                loss.backward()
            grads = {n: p.grad.clone() for n, p in other.named_parameters() if p.grad is not None}
            optimizer.step()
        return seen, loss.detach(), grads

    once, loss, grads = run()
    monkeypatch.setattr(gates_file, "soft_key", lambda *args: None)
    each, expected, wanted = run()
    assert once.count("sigmoid") == 4 < each.count("sigmoid")  # the gate, and three in its derivative
    assert torch.equal(loss, expected) and grads.keys() == wanted.keys()
    for name, want in wanted.items():  # sums in another order: 4e-7 was seen
        torch.testing.assert_close(grads[name], want, rtol=1e-5, atol=2e-6)


def test_several_forwards_and_backwards_of_one_step_share_them(made):
    model = copy.deepcopy(made).eval()  # a batch norm's batch would be another one
    optimizer, block = learning(model)
    with block:
        spread(model)
        e = gates_of(model)[0].embeddings[0]
        tf.cross_entropy(model(X), Y).backward()
        once = e.grad.clone()
        model.zero_grad()
        first, second = tf.cross_entropy(model(X), Y), tf.cross_entropy(model(X), Y)
        first.backward()
        second.backward()
        torch.testing.assert_close(e.grad, 2 * once)
        tf.cross_entropy(model(X), Y).backward()  # and after the others were freed
        optimizer.step()


def part_twice(made, reuse):
    """A part of the model, twice in a step, as with timm's `forward_features`, which no hook of the model sees."""
    model = copy.deepcopy(made).train()
    gates = gates_of(model)[0]
    gates.config = gates.config.replace(reuse=reuse)
    gates.masks[1, ::3], gates.sealed[1] = True, True
    gates._changed([1])
    optimizer, block = learning(model)
    with block:
        for _ in range(2):
            model.norm(model.bn(model.stem(X)).flatten(2).transpose(1, 2)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("reuse", ["all", "none"])
def test_a_part_of_the_model_is_gone_through_twice_in_a_step(made, reuse):
    part_twice(made, reuse)


def test_twin_gates_of_norms_in_a_graph_that_is_freed_cannot_be_gone_through_twice(made, monkeypatch):
    monkeypatch.setattr(binding, "kept_norm_gates", functional.norm_gates)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        part_twice(made, "all")


def test_the_penalty_is_that_of_the_formula(made):
    model = copy.deepcopy(made).train()
    gates = gates_of(model)[0]
    gates.masks[1, ::3], gates.sealed[1] = True, True
    gates._changed([1])
    _, block = learning(model)
    with block as learned:
        spread(model)
        got, a = learned.penalty(), gates.soft_gates(0).all
        want = gates.config.penalty_weight * functional.sparsity_penalty(a, gates.used())
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)  # sums in another order


def test_a_backward_after_the_step_is_refused(made):
    model = copy.deepcopy(made).train()
    optimizer, block = learning(model)
    with block as learned:
        late = loss_of(model, learned)
        loss_of(model, learned).backward()
        optimizer.step()
        with pytest.raises((hatcl.GuardError, RuntimeError)):
            late.backward()
        gate = gates_of(model)[0].select(0, slice(0, 4)).sum()
        optimizer.step()
        with pytest.raises(hatcl.GuardError, match="call backward before the step"):
            gate.backward()


def test_a_write_that_torch_does_not_count_is_seen_by_the_next_forward(made):
    model = copy.deepcopy(made).train()
    _, block = learning(model)
    with block:
        e = gates_of(model)[0].embeddings[0]
        before = model(X)
        e.data.fill_(-6.0)
        after = model(X)
        assert not torch.equal(before, after)
        gates = gates_of(model)[0]
        was = gates.select(0, slice(None))
        e.data = torch.full_like(e, 6.0)  # other memory: at once
        assert (gates.select(0, slice(None)) > was).all()


def test_nothing_is_kept_where_it_could_be_another_ones(made):
    model = copy.deepcopy(made).train()
    _, block = learning(model)
    with block:
        gates = gates_of(model)[0]
        model(X)
        assert gates._soft_now is not None
        assert gates_of(copy.deepcopy(model))[0]._soft_now is None
        with torch.no_grad():
            assert not gates.select(0, slice(None)).requires_grad
        assert gates.select(0, slice(None)).requires_grad
        assert gates.select(0, torch.tensor([2, 2, 5])).shape == (3,)

        def of(e):
            return (
                torch.func.functional_call(gates, {"embeddings.0": e}, (X,)).sum() + gates.select(0, slice(1, 3)).sum()
            )

        torch.func.grad(of)(gates.embeddings[0].detach())
        assert gates.soft_gates(0) is not None


def test_a_penalty_and_a_forward_meet_in_one_gate(made):
    model = copy.deepcopy(made).train()
    _, block = learning(model)
    with block as learned, Seen() as seen:
        model(X)
        learned.penalty()
    assert seen.count("sigmoid") == 1
