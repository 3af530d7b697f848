"""What enters the head, under a task."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import parts
import pytest
import torch
from torch import nn

import hatcl
from hatcl.errors import ConfigError
from hatcl.hat.features import features_and_outputs, features_of, features_under, head_modules
from hatcl.hat.gates import gates_of


@pytest.mark.parametrize("name", parts.MODELS)
def test_the_head_makes_the_outputs_of_the_features(name):
    model = parts.pretend(parts.converted(name)).eval()
    x = parts.images(name)
    (head,) = head_modules(model).values()
    for t in range(2):
        with hatcl.task(model, t), torch.no_grad():
            assert torch.equal(head(features_of(model, x)), model(x))


@pytest.mark.parametrize("name", parts.MODELS)
def test_features_of_two_tasks_differ_and_units_that_are_off_are_zero(name):
    model = parts.pretend(parts.converted(name)).eval()
    x = parts.images(name)
    a, b = (features_under(model, [x[:3], x[3:]], t) for t in range(2))
    assert a.shape == b.shape and len(a) == len(x) and not torch.equal(a, b)
    gates = gates_of(model)[0]
    (name,) = [e.name for e in gates.unit_map.entries.values() if e.head and len(e.shape) > 1]
    (factor,) = [f for f in gates.unit_map.entries[name].factors if not f.owner]
    off = ~gates.masks[0][torch.as_tensor(factor.units) - 1]
    assert off.any() and bool((a[:, off] == 0).all()) and not bool((b[:, off] == 0).all())


def test_features_leave_the_model_in_its_mode_and_without_hooks():
    model = parts.pretend(parts.converted("mlp")).train()
    features_under(model, [parts.images("mlp")], 0)
    assert model.training and all(not m._forward_hooks for m in head_modules(model).values())


def test_positions_are_averaged():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(6, 10), nn.Linear(10, 3)

        def forward(self, x):
            return self.head(torch.relu(self.body(x)))

    model = hatcl.convert(Tokens(), 1, torch.randn(2, 5, 6))
    x = torch.randn(4, 5, 6)
    assert features_of(model, x).shape == (4, 10)
    convolved = nn.Sequential(nn.Conv2d(3, 7, 3), nn.ReLU(), nn.Conv2d(7, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = hatcl.convert(convolved, 1, torch.randn(2, 3, 8, 8))
    assert features_of(model, torch.randn(4, 3, 8, 8)).shape == (4, 7)


def test_a_model_by_hand():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = hatcl.HATLinear(6, 10, num_tasks=2)
            self.head = hatcl.TaskIndexedLinear(10, 3, reads=self.body)

        def forward(self, x):
            return self.head(torch.relu(self.body(x)))

    assert features_of(Net(), torch.randn(4, 6)).shape == (4, 10)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(hatcl.HATError, match=r"no head was found .* Put the classifier into the model"):
        features_of(hatcl.HATLinear(6, 10, num_tasks=2), torch.randn(4, 6))


def test_several_heads_are_put_side_by_side_and_what_two_read_comes_once():
    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.one, self.two = (nn.Linear(*n) for n in ((6, 8), (6, 5), (8, 3), (5, 3)))
            self.three = nn.Linear(5, 3)

        def forward(self, x):
            a, b = self.a(x), self.b(x)
            return self.one(a) + self.two(b) + self.three(b)

    x = torch.randn(4, 6)
    assert features_of(parts.pretend(hatcl.convert(Three(), 1, x)), x).shape == (4, 13)


@pytest.mark.parametrize("kind", ["GPT2", "Bert"])
def test_of_a_text_they_are_those_of_the_token_that_answers(kind):
    transformers = pytest.importorskip("transformers")
    sizes = {
        "GPT2": {"n_embd": 32, "n_layer": 1, "n_head": 2, "bos_token_id": 1, "eos_token_id": 1},
        "Bert": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 40},
    }[kind]
    config = getattr(transformers, f"{kind}Config")(**sizes, vocab_size=50, pad_token_id=0, num_labels=3)
    plain = getattr(transformers, f"{kind}ForSequenceClassification")(config)
    ids = torch.randint(2, 50, (4, 7))
    ids[0, 4:] = 0
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    model = parts.pretend(hatcl.convert(plain, 2, batch)).eval()
    (head,) = head_modules(model).values()
    with hatcl.task(model, 1), torch.no_grad():
        features, out = features_and_outputs(model, batch)
        # measured 3e-8: another number of rows, so other kernels
        assert torch.allclose(head(features), out.logits, atol=1e-6)


class Bare(nn.Module):
    """A head that is no module, as wide as the input."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 6), nn.Parameter(torch.randn(3, 6))

    def forward(self, x):
        return nn.functional.linear(self.body(x).relu(), self.head)


def test_a_path_or_a_function_in_place_of_the_map():
    x = torch.randn(4, 6)
    model = parts.pretend(hatcl.convert(Bare(), 2, x)).eval()
    with pytest.raises(hatcl.HATError, match="no head was found .* give a function of the model"):
        features_of(model, x)
    with hatcl.task(model, 0), torch.no_grad():
        features, out = features_and_outputs(model, x, lambda m, batch: m.body(batch).relu())
        assert torch.equal(nn.functional.linear(features, model.head), out)
        assert torch.equal(features_and_outputs(model, x, "body")[0], x)
    with pytest.raises(ConfigError, match="no module of that path; did you mean 'body'"):
        features_and_outputs(model, x, "bodies")
    with pytest.raises(ConfigError, match=r"the function gives a tensor of shape \[4\], expected \[B, F\]"):
        features_and_outputs(model, x, lambda m, batch: batch[:, 0])


def test_a_compiled_model_is_watched_as_it_is():
    model, x = parts.pretend(parts.converted("mlp")).eval(), parts.images("mlp", 4)
    compiled = torch.compile(model, backend="eager")
    with hatcl.task(model, 1), torch.no_grad():
        compiled(x)
        assert torch.equal(features_of(compiled, x), features_of(model, x))


def test_threads_see_their_own():
    model = parts.pretend(parts.converted("mlp")).eval()
    batches = [parts.images("mlp", 4, seed) for seed in range(12)]
    want = [features_under(model, [x], i % 3) for i, x in enumerate(batches)]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda i: features_under(model, [batches[i]], i % 3), range(12)))
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
