"""Protection by degrees (AdaHAT): its formula, what it does not touch, and that it is never taken for exact."""

from __future__ import annotations

import copy
import functools

import parts
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hatcl
from hatcl.hat import guard as guarding
from hatcl.hat.gates import Gates, gates_of
from hatcl.hat.held import held
from hatcl.hat.protection import Eased, eased, rates_of

STRONG = {"protection": "adahat", "protection_alpha": 0.1}


def learn(model, task, steps=3, optimizer=None, **options):
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    return parts.train(model, task, optimizer, parts.problem(parts.shape_of("mlp"), task), steps, **options)


@functools.cache
def _sealed(options):
    model = parts.converted("mlp", 3, **dict(options))
    torch.manual_seed(0)
    learn(model, 0)
    return model


def sealed(**options):
    return copy.deepcopy(_sealed(tuple(options.items())))


def test_an_element_takes_its_share_of_a_step():
    """r / (I + r) of what SGD would have done, r by eq. 9 with the gates and the layer of the unit that it writes."""
    model = sealed(**STRONG)
    g = gates_of(model)[0]
    shared = [h for h in held(model) if h.task is None and not h.plain]
    old = {h.name: h.param.detach().clone() for h in shared}
    live = {h.name: h.live(0) for h in shared}
    seen = {}

    def inside(step):
        a, used = g.select(1, slice(None)).detach(), g.masks[0]
        for name, start, stop in g.layers:
            free = (~used[start:stop]).float()
            seen[name] = 0.1 / (0.1 + (a[start:stop] * free).sum() / free.sum())

    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    grads = {}
    for h in shared:
        h.param.register_post_accumulate_grad_hook(lambda p, n=h.name: grads.__setitem__(n, p.grad.clone()))
    learn(model, 1, 1, optimizer, inside=inside)
    moved = 0
    for h in shared:
        r = seen[h.name.rpartition(".")[0]]
        share = torch.where(live[h.name], r / (1 + r), torch.tensor(1.0))
        # one rounding of the step and one of the sum: measured 3e-8
        assert torch.allclose(h.param.detach(), old[h.name] - 0.5 * share * grads[h.name], atol=1e-6)
        moved += int(((h.param.detach() != old[h.name]) & live[h.name]).sum())
    assert moved > 0


def test_twin_without_the_shares_everything_moves_by_its_whole_step(monkeypatch):
    """And with them far less."""
    gaps = []
    for protect in (True, False):
        model = sealed(protection="adahat")
        x = parts.images("mlp")
        want = parts.logits(model, 0, x)
        if not protect:
            monkeypatch.setattr(guarding, "after_step", lambda *_: None)
        learn(model, 1, 6)
        gaps.append(float((parts.logits(model, 0, x) - want).abs().max()))
    assert gaps[0] < 1e-3 < 0.05 < gaps[1]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.floats(1e-8, 10.0))
def test_the_more_tasks_use_an_element_the_less_it_moves(counts, alpha):
    model = _sealed(tuple(STRONG.items()))
    h = next(h for h in held(model) if h.name == "1.bias")
    importance = torch.zeros(32)
    importance[: len(counts)] = torch.tensor(counts, dtype=torch.float32)
    g = gates_of(model)[0]
    share = Eased(h, importance).share({id(g): torch.full((g.num_units + 1,), alpha)})
    assert bool(((share > 0) & (share <= 1)).all()) and bool((share[importance == 0] == 1).all())
    some = sorted((i, float(s)) for i, s in zip(importance.tolist(), share.tolist(), strict=True))
    assert all(a[1] >= b[1] for a, b in zip(some, some[1:], strict=False))


def test_the_fewer_free_units_a_task_takes_the_larger_its_rate():
    g = Gates(8, hatcl.HATConfig(num_tasks=1, protection_alpha=2.0, protection_epsilon=0.5))
    g.learning = 0
    for start, want in ((6.0, 2 / 1.5), (-6.0, 2 / 0.5)):
        torch.nn.init.constant_(g.embeddings[0], start)
        assert torch.allclose(rates_of(g)[1:], torch.full((8,), want)) and rates_of(g)[0] == 4.0


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_every_shared_parameter_has_its_shares(name):
    """Grouped, two-ended and one-ended ones: where a sealed task uses an element, and nowhere else."""
    model = parts.pretend(parts.converted(name, 3, **STRONG), [0, 1])
    g = gates_of(model)[0]
    rates = {id(g): torch.linspace(0.1, 1.0, g.num_units + 1)}
    found = eased(model, [0, 1])
    assert len(found) > 5
    for e in found:
        share = e.share(rates)
        assert share.shape == e.held.param.shape
        assert torch.equal(share < 1, e.held.live(0) | e.held.live(1)) and bool((e.importance <= 2).all())


def test_what_is_a_tasks_own_stays():
    model = sealed(**STRONG)
    own = {h.name: h.param.detach().clone() for h in held(model) if h.task == 0}
    learn(model, 1, 6)
    assert all(torch.equal(h.param, own[h.name]) for h in held(model) if h.task == 0)


def test_it_is_said_to_be_not_exact_and_the_drift_is_measured():
    model = sealed(**STRONG)
    x, _ = parts.problem(parts.shape_of("mlp"), 1)
    assert hatcl.describe(model).drift == {0: {"moved": 0.0, "same": 1.0}}
    want = parts.logits(model, 0, x)
    learn(model, 1, 6)
    got = parts.logits(model, 0, x)
    moved, same = float((got - want).abs().max()), float((got.argmax(1) == want.argmax(1)).float().mean())
    said = hatcl.describe(model)
    assert moved > 0 and said.drift[0] == pytest.approx({"moved": moved, "same": same}, rel=1e-6)
    assert f"task 0: protected by degrees, not exactly; later tasks moved its outputs by up to {moved:.3g}" in str(said)
    assert said.to_dict()["drift"][1] == {"moved": 0.0, "same": 1.0}
    certificate = hatcl.certify(model, x)
    assert not certificate.exact and set(certificate.max_abs_diff.values()) == {0.0}
    assert str(certificate).startswith("NOT exact: by choice: HATConfig.protection is 'adahat'")
    with pytest.raises(hatcl.IsolationError, match="by choice"):
        hatcl.certify(model, x, strict=True)


def test_exact_protection_has_no_drift():
    model = sealed()
    want = parts.logits(model, 0, parts.images("mlp"))
    learn(model, 1)
    assert hatcl.describe(model).drift == {} and hatcl.certify(model, parts.images("mlp")).exact
    assert torch.equal(parts.logits(model, 0, parts.images("mlp")), want)


def test_sealed_tasks_are_sealed_as_they_are_now(tmp_path):
    """Digests are taken anew, also where the block is left by an exception and where a model is saved inside it."""
    model = sealed(**STRONG)
    learn(model, 1)

    def stop(step):
        if step == 2:
            hatcl.save_pretrained(model, tmp_path / "inside")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn(model, 2, inside=stop)
    learn(model, 2)
    x = parts.images("mlp")
    assert all(d["moved"] > 0 for t, d in hatcl.describe(model).drift.items() if t < 2)
    again = hatcl.from_pretrained(hatcl.save_pretrained(model, tmp_path / "after"), base=parts.plain("mlp"))
    assert hatcl.describe(again).drift == hatcl.describe(model).drift == hatcl.describe(copy.deepcopy(model)).drift
    assert all(torch.equal(parts.logits(again, t, x), parts.logits(model, t, x)) for t in range(3))
    assert hatcl.tasks(hatcl.from_pretrained(tmp_path / "inside", base=parts.plain("mlp"))) == [0, 1]
    with torch.no_grad():
        again[1]._parameters["weight"].add_(1)
    with pytest.raises(hatcl.IntegrityError, match="task 0 was sealed"):
        learn(again, 2) if hatcl.forget_task(again, 2) else None


def test_inside_the_block_a_sealed_task_computes_with_what_is_there_now():
    model = sealed(**STRONG)
    x = parts.images("mlp")
    seen = []
    learn(model, 1, 6, inside=lambda _: seen.append(parts.logits(model, 0, x)))
    assert not torch.equal(seen[0], seen[-1])


def test_what_is_not_there_is_refused():
    with pytest.raises(hatcl.ConfigError, match="protection: got 'fg_adahat', expected one of exact, adahat"):
        hatcl.HATConfig(protection="fg_adahat")
    for name in ("protection_alpha", "protection_epsilon"):
        with pytest.raises(hatcl.ConfigError, match=f"{name}: got 0, expected a number above 0"):
            hatcl.HATConfig(**{name: 0})
