"""Protection by degrees (AdaHAT, FG-AdaHAT): its formulas, what it does not touch, that it is never called exact."""

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
from hatcl.hat.protection import Attribution, Eased, eased, importance_to, rates_of

STRONG = {"protection": "adahat", "protection_alpha": 0.1}
FINE = {"protection": "fg_adahat", "protection_alpha": 0.1}
KINDS = pytest.mark.parametrize("options", [STRONG, FINE], ids=["adahat", "fg_adahat"])


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


@KINDS
def test_it_is_said_to_be_not_exact_and_the_drift_is_measured(options):
    model = sealed(**options)
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
    assert str(certificate).startswith(f"NOT exact: by choice: HATConfig.protection is {options['protection']!r}")
    with pytest.raises(hatcl.IsolationError, match="by choice"):
        hatcl.certify(model, x, strict=True)


def test_exact_protection_has_no_drift():
    model = sealed()
    want = parts.logits(model, 0, parts.images("mlp"))
    learn(model, 1)
    assert hatcl.describe(model).drift == {} and hatcl.certify(model, parts.images("mlp")).exact
    assert torch.equal(parts.logits(model, 0, parts.images("mlp")), want)


@KINDS
def test_sealed_tasks_are_sealed_as_they_are_now(options, tmp_path):
    """Digests are taken anew, also where the block is left by an exception and where a model is saved inside it."""
    model = sealed(**options)
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
    with pytest.raises(hatcl.ConfigError, match="protection: got 'fg', expected one of exact, adahat, fg_adahat"):
        hatcl.HATConfig(protection="fg")
    for name in ("protection_alpha", "protection_epsilon"):
        with pytest.raises(hatcl.ConfigError, match=f"{name}: got 0, expected a number above 0"):
            hatcl.HATConfig(**{name: 0})


# ---- FG-AdaHAT ------------------------------------------------------------------------------------


def by_hand(model, task, gradients, gates):
    """A unit's importance after some steps, written down from the formula for the MLP: its layers are "1" and "4"."""
    g, steps = gates_of(model)[0], []
    for grads, a in zip(gradients, gates, strict=True):
        rows = torch.cat([grads[f"{n}.weight"].abs().sum(1) + grads[f"{n}.bias"].abs() for n in ("1", "4")])
        for _, start, stop in g.layers:
            part = rows[start:stop].clone()
            rows[start:stop] = (part - part.min()) / (part.max() - part.min())
        steps.append(rows * a)
    return torch.stack(steps).mean(0)


@pytest.mark.parametrize("several", [False, True], ids=["one optimizer", "two of them"])
def test_importance_is_the_mean_over_steps_of_scaled_gradients(several):
    """The second of two optimizers takes no step of its own: it finds the gradients that the first left."""
    model = parts.converted("mlp", 3, **FINE)
    g, gradients, gates, latest = gates_of(model)[0], [], [], {}
    for h in held(model):
        if h.task is None and not h.plain:
            h.param.register_post_accumulate_grad_hook(lambda p, n=h.name: latest.__setitem__(n, p.grad.clone()))

    class Seen(torch.optim.SGD):
        def step(self, closure=None):
            gradients.append(dict(latest)), gates.append(g.select(0, slice(None)).detach().clone())
            return super().step(closure)

    if several:
        *some, last = model.parameters()
        first, second = Seen([last], 0.1), torch.optim.SGD(some, 0.1)
        with hatcl.learn(model, 0, [first, second], steps=4):
            for _ in range(4):
                x, y = parts.problem(parts.shape_of("mlp"), 0)
                torch.nn.functional.cross_entropy(model(x), y).backward()
                first.step()
                model.zero_grad()
                second.step()
    else:
        learn(model, 0, 4, Seen(model.parameters(), 0.1))
    want = by_hand(model, 0, gradients, gates)
    assert len(gradients) == 4 and 0 < float(want.max()) <= 1
    # the running mean and the mean of the four: measured 6e-8
    assert torch.allclose(g.importance[0], want, atol=1e-6)
    assert not bool(g.importance[1:].any())


def test_a_share_is_by_the_smaller_end_of_each_task():
    model = parts.pretend(parts.converted("mlp", 3, **FINE), [0, 1])
    g = gates_of(model)[0]
    g.importance.copy_(torch.rand(g.importance.shape, generator=torch.Generator().manual_seed(0)))
    parts_ = {e.held.name: e for e in eased(model, [0, 1])}
    of = (g.importance + 0.01) * g.masks
    (a, b), (c, d) = ((start, stop) for _, start, stop in g.layers)
    want = sum(torch.minimum(of[t, c:d, None], of[t, None, a:b]) for t in (0, 1))
    assert torch.equal(parts_["4.weight"].importance, want)
    # pixels are always on, so the unit that is written decides
    assert torch.equal(parts_["1.weight"].importance, of[:2, a:b].sum(0)[:, None].expand(32, 48))
    assert torch.equal(parts_["4.bias"].importance, of[:2, c:d].sum(0))
    g.learning = 2
    r = 0.1 / ((0.1 + 1.0) * (2 + 1 + 10))  # every free unit is taken, by the third task
    torch.nn.init.constant_(g.embeddings[2], 6.0)
    assert torch.allclose(rates_of(g)[1:], torch.full((g.num_units,), r))


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_every_unit_of_a_real_network_gets_its_importance(name):
    """Grouped, shared and one-ended parameters: what a task uses counts, and nothing else."""
    model = parts.converted(name, 2, **FINE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    parts.train(model, 0, optimizer, parts.problem(parts.shape_of(name), 0), 2)
    g = gates_of(model)[0]
    assert bool((g.importance[0] >= 0).all()) and bool((g.importance[0] <= 1).all())
    for _, start, stop in g.layers:
        assert stop - start < 2 or float(g.importance[0, start:stop].max()) > 0
    for h in held(model):
        if h.task is None and not h.plain and h.plan is not None and h.plan.axes:
            assert torch.equal(importance_to(h, 0) > 0, h.live(0))


def test_the_more_a_unit_matters_the_less_it_moves():
    """And without importances all that sealed tasks use would move alike: the twin."""
    moved = []
    for much in (1.0, 0.0):
        model = sealed(**FINE)
        g = gates_of(model)[0]
        g.importance[0] = much
        old = {h.name: h.param.detach().clone() for h in held(model)}
        live = {h.name: h.live(0) for h in held(model)}
        learn(model, 1, 3)
        moved.append(
            sum(
                float((h.param.detach() - old[h.name])[live[h.name]].abs().sum())
                for h in held(model)
                if h.name in ("1.weight", "4.weight")
            )
        )
    assert 0 < 5 * moved[0] < moved[1]


@pytest.mark.parametrize("behind", ["a mask", "a frozen layer"])
def test_where_nothing_writes_a_unit_that_learns_the_other_end_decides(behind):
    """Without a gradient its importance would be the least, and with it that of every weight that reads it."""
    plain = parts.plain("mlp")
    plain[1].requires_grad_(behind == "a mask")
    model = hatcl.convert(plain, 2, parts.images("mlp", 2), mask_inputs=behind == "a mask", config=FINE, verify=False)
    learn(model, 0)
    g = gates_of(model)[0]
    name, start, stop = g.layers[0]
    assert name == ("masked_inputs" if behind == "a mask" else "1")
    on = g.masks[0, start:stop]
    assert bool((g.importance[0, start:stop][on] > 0.5).all())  # the mean of its gates
    reads = next(h for h in held(model) if h.name == ("model.1.weight" if behind == "a mask" else "4.weight"))
    _, first, last = g.layers[1]
    writer = (g.importance[0] + 0.01)[first:last, None] * g.masks[0, first:last, None]
    found = importance_to(reads, 0)
    some = (found > 0) & (writer < 0.5)
    assert bool(some.any()) and torch.equal(found[some], writer.expand_as(found)[some])


def test_importances_go_where_the_model_goes(tmp_path):
    model = sealed(**FINE)
    want = gates_of(model)[0].importance.clone()
    assert bool(want[0].any())
    hatcl.add_tasks(model, 1)
    assert torch.equal(gates_of(model)[0].importance[:3], want) and len(gates_of(model)[0].importance) == 4
    again = hatcl.from_pretrained(hatcl.save_pretrained(model, tmp_path / "saved"), base=parts.plain("mlp"))
    other = parts.converted("mlp", 4, **FINE)
    other.load_state_dict(model.state_dict())
    for m in (again, other, copy.deepcopy(model)):
        assert torch.equal(gates_of(m)[0].importance, gates_of(model)[0].importance)
    hatcl.forget_task(model, 0)
    assert not bool(gates_of(model)[0].importance.any())
    with pytest.raises(RuntimeError, match="importance"):  # a state that says nothing of them
        other.load_state_dict({k: v for k, v in other.state_dict().items() if "importance" not in k})
    assert "importance" not in dict(gates_of(sealed(**STRONG))[0].named_buffers())


def test_a_task_that_is_interrupted_goes_on_with_its_mean():
    model = parts.converted("mlp", 3, **FINE)
    g = gates_of(model)[0]
    g.importance[0] = 0.5
    Attribution(model, 0, start=3).add([torch.full((g.num_units,), 0.9)], 1)
    assert torch.allclose(g.importance[0], torch.tensor(0.6))
    Attribution(model, 0, start=0)
    assert not bool(g.importance[0].any())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_importances_are_of_float32_whatever_the_model_is_of(dtype):
    """Sums of gradients would be infinite in float16 and no step would count; a mean of bfloat16 soon stands still."""
    model = parts.converted("mlp", 3, **FINE).to(dtype)
    g, follow = gates_of(model)[0], Attribution(model, 0, start=0)
    for h in follow.parts:
        h.param.grad = torch.full_like(h.param, 2e4)
        h.param.grad[: len(h.param) // 2] *= 0.5
    g.importance[0] = 0.5
    for taken in range(2, 301):
        follow.add([torch.ones(g.num_units)], taken)
    # (0.5 + 299) / 300: measured 2e-6
    assert torch.allclose(g.importance[0], torch.tensor(299.5 / 300), atol=1e-5) and g.importance.dtype == torch.float32
    assert follow.of_step() is not None


def test_gradients_that_a_scaler_throws_away_do_not_count():
    model = parts.converted("mlp", 3, **FINE)
    follow = Attribution(model, 0, start=0)
    for h in follow.parts:
        h.param.grad = torch.full_like(h.param, float("inf"))
    follow.add(follow.of_step(), 1)
    assert follow.of_step() is None and not bool(gates_of(model)[0].importance.any())


@KINDS
def test_shards_are_refused(options, monkeypatch):
    model = sealed(**options)
    monkeypatch.setattr("hatcl.shards.sharded_modules", lambda m: [m])
    text = "learn: protection='.*': the parameters of HATSequential are shards .*; protect exactly, or do not shard it"
    with pytest.raises(hatcl.HATError, match=text):
        learn(model, 1)
    assert hatcl.tasks(model) == [0]
