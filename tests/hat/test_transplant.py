"""Fork: a new task starts from what a sealed one knows (DESIGN M13)."""

from __future__ import annotations

import copy

import parts
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

import hatcl
from hatcl.hat import transplant as transplanting
from hatcl.hat.digests import record
from hatcl.hat.features import features_under
from hatcl.hat.gates import gates_of
from hatcl.hat.held import held, own_buffers
from hatcl.hat.transplant import Fork, fork, transplant
from hatcl.map.units import UnitMap

WORDS = {"input_ids": torch.arange(14).view(2, 7)}
SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "pad_token_id": 0}


def bert():
    return BertForSequenceClassification(BertConfig(num_attention_heads=2, **SMALL)).eval()


def llama():
    return LlamaForSequenceClassification(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **SMALL)).eval()


def lora():
    from peft import LoraConfig, get_peft_model

    return get_peft_model(bert(), LoraConfig(r=8, target_modules=["query", "value"], task_type="SEQ_CLS"))


def grouped():
    return nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 24, 3, groups=3), nn.BatchNorm2d(24), nn.ReLU(),
        nn.Conv2d(24, 24, 3, groups=24), nn.ChannelShuffle(3), nn.Conv2d(24, 12, 1, groups=3), nn.GroupNorm(2, 12),
        nn.ReLU(), nn.Flatten(), nn.Linear(12 * 16, 4),
    )  # fmt: skip


MADE = {
    "bert": (bert, WORDS),
    "llama": (llama, WORDS),
    "lora": (lora, WORDS),
    "grouped": (grouped, torch.randn(3, 3, 10, 10, generator=torch.Generator().manual_seed(0))),
    **{name: (make, parts.images(name)) for name, (make, _) in parts.MODELS.items()},
}


@pytest.fixture(scope="module")
def built():
    found = {}

    def get(name, sealed=(0, 1)):
        if name not in found:
            torch.manual_seed(0)
            make, x = MADE[name]
            found[name] = hatcl.convert(make(), 4, x).eval()
        return parts.pretend(copy.deepcopy(found[name]), sealed, share=0.4), MADE[name][1]

    return get


def begin(model, task, plan, locked):
    """What `hatcl.learn` does before the first step, and what sealing makes of it when no step is taken."""
    count = transplant(model, task, plan, locked)
    for g, mask in zip(gates_of(model), plan.masks, strict=True):
        with torch.no_grad():
            g.embeddings[task].copy_(torch.where(mask, 1.0, -1.0))
        g.seal(task)
    record(model, task)
    return count


def moved(model, plan, x):
    """The source's features, each where the new task has it."""
    g = gates_of(model)[0]
    (entry,) = [e for e in g.unit_map.entries.values() if e.head and len(e.shape) > 1]
    features, stage = features_under(model, [x], plan.source), g.stages[plan.source]
    for f, of_then in zip(entry.factors, g.map_at(stage).entries[entry.name].factors, strict=True):
        if not f.owner:
            numbers, then = torch.as_tensor(f.units), g.number_from(stage)[torch.as_tensor(of_then.units)]
            out = features.new_zeros(len(features), len(numbers))
            for u in (numbers.unique() - 1).tolist():
                if bool(plan.masks[0][u]):  # the n-th column of a unit takes the n-th of the one it stands for
                    out[:, numbers == u + 1] = features[:, then == int(plan.phi[0][u]) + 1]
            return out
    return features


@pytest.mark.parametrize("name", MADE)
def test_a_forked_task_starts_with_its_sources_features(built, name):
    model, x = built(name)
    plan = fork(model, 2, 1, [0, 1])
    replaced = plan.masks[0] & (plan.phi[0] != torch.arange(len(plan.phi[0])))
    assert bool(replaced.any())
    want = moved(model, plan, x)
    assert begin(model, 2, plan, [0, 1]) > 0
    got = features_under(model, [x], 2)
    # sums run over the same numbers in another order: at most 1e-6 of the largest was seen over these models
    assert torch.allclose(got, want, atol=5e-6 * float(want.abs().max()), rtol=0)
    assert float(want.abs().max()) > 0


@pytest.mark.parametrize("name", ["resnet", "bert", "grouped"])
def test_twin_units_of_another_place_do_not(built, name, monkeypatch):
    """Heads and groups taken for one: the features differ. (Of a network without them they do not.)"""
    model, x = built(name)
    g = gates_of(model)[0]
    monkeypatch.setattr(g.unit_map, "places", g.unit_map.places * 0)
    plan = fork(model, 2, 1, [0, 1])
    want = moved(model, plan, x)
    begin(model, 2, plan, [0, 1])
    same = torch.allclose(features_under(model, [x], 2), want, atol=5e-6 * float(want.abs().max()), rtol=0)
    assert same == (name == "resnet")


@pytest.mark.parametrize("name", MADE)
def test_sealed_tasks_stay_bit_equal_and_the_result_is_exact(built, name):
    model, x = built(name)
    before = [parts.outputs_of(model, x, t) for t in range(2)]
    begin(model, 2, fork(model, 2, 1, [0, 1]), [0, 1])
    for t in range(2):
        assert all(torch.equal(a, b) for a, b in zip(before[t], parts.outputs_of(model, x, t), strict=True))
    assert hatcl.certify(model, x, strict=True).exact


def full(model, tasks, share=0.7):
    """Tasks that leave hardly a unit free, so that hosts have elements that are held."""
    return parts.pretend(model, tasks, share=share)


def test_where_no_unit_is_free_hosts_are_units_of_others_and_nothing_held_is_written(built):
    model, x = built("resnet", ())
    full(model, [0, 1, 2])
    before = [parts.outputs_of(model, x, t) for t in range(3)]
    plan = fork(model, 3, 2, [0, 1, 2])
    assert begin(model, 3, plan, [0, 1, 2]) > 0
    for t in range(3):
        assert all(torch.equal(a, b) for a, b in zip(before[t], parts.outputs_of(model, x, t), strict=True))
    assert hatcl.certify(model, x, strict=True).exact


def test_twin_without_the_check_of_what_is_held_sealed_tasks_move(built, monkeypatch):
    model, x = built("resnet", ())
    full(model, [0, 1, 2])
    before = [parts.outputs_of(model, x, t) for t in range(3)]
    plan = fork(model, 3, 2, [0, 1, 2])
    theirs = plan.masks[0] & ~gates_of(model)[0].masks[2]
    hosts = (gates_of(model)[0].masks[0] & ~gates_of(model)[0].masks[2]).nonzero().flatten()
    phi = plan.phi[0].clone()
    phi[hosts] = gates_of(model)[0].masks[2].nonzero().flatten()[: len(hosts)]
    monkeypatch.setattr(transplanting, "live_for", lambda h, tasks: None)
    transplant(model, 3, Fork(2, (gates_of(model)[0].masks[0] | theirs,), (phi,)), [0, 1, 2])
    after = parts.outputs_of(model, x, 0)
    assert not all(torch.equal(a, b) for a, b in zip(before[0], after, strict=True))


def test_an_unlocked_task_is_not_held(built):
    """`HATConfig(locked=)`: tasks that are left out may change."""
    model, _ = built("mlp", ())
    full(model, [0, 1, 2])
    plan = fork(model, 3, 2, [])
    count = transplant(copy.deepcopy(model), 3, plan, [0, 1, 2])
    assert transplant(model, 3, plan, []) >= count


def test_a_share_of_the_sources_units_is_replaced_by_free_ones(built):
    model, _ = built("resnet", (0,))
    g = gates_of(model)[0]
    plan = fork(model, 1, 0, [0])
    new = plan.masks[0] & ~g.masks[0]
    gone = g.masks[0] & ~plan.masks[0]
    assert int(new.sum()) == int(gone.sum()) > 0 and not bool((new & g.used()).any())
    for name, start, stop in g.layers:
        free = int((~g.used()[start:stop]).sum())
        assert int(new[start:stop].sum()) == min(-(-free // 3), int(g.masks[0, start:stop].sum())), name
    assert set(plan.phi[0][new].tolist()) == set(gone.nonzero().flatten().tolist())


def test_the_choice_draws_nothing_from_the_global_generator(built):
    model, _ = built("mlp")
    state = torch.random.get_rng_state()
    first = fork(model, 2, 1, [0, 1])
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(5)
    assert torch.equal(first.masks[0], fork(model, 2, 1, [0, 1]).masks[0])


def test_a_mask_that_is_given_decides_and_what_has_no_source_starts_as_it_is(built):
    model, _ = built("mlp", (0,))
    g = gates_of(model)[0]
    given = torch.ones_like(g.masks[0])
    plan = fork(model, 1, 0, [0], [given])
    assert bool(plan.masks[0].all()) and bool((plan.phi[0][~g.masks[0]] == -1).all())
    before = parts.snapshot(model)
    assert transplant(model, 1, plan, [0]) == 0
    shared = [h.name for h in held(model) if h.task is None]
    assert all(torch.equal(before[n], dict(model.named_parameters())[n]) for n in shared)


def test_a_unit_without_a_source_keeps_its_own_norm(built):
    model, _ = built("resnet", (0,))
    g = gates_of(model)[0]
    norm = model.layer1[0].bn1
    before = {n: x.detach().clone() for n, x in norm.hat_tasks[1].state_dict().items()}
    transplant(model, 1, fork(model, 1, 0, [0], [torch.ones_like(g.masks[0])]), [0])
    here = g.masks[0][torch.as_tensor(norm._hat.params["weight"].axes[0].units.numbers) - 1]
    for name in ("weight", "bias", "running_mean", "running_var"):
        mine, theirs = (getattr(norm.hat_tasks[t], name) for t in (1, 0))
        assert torch.equal(mine[~here], before[name][~here]) and torch.equal(mine[here], theirs[here]), name
        assert not torch.equal(theirs, before[name]), name


def test_norms_go_through_phi_and_the_head_stays(built):
    model, _ = built("resnet", (0,))
    head = {n: p.clone() for n, p in model.named_parameters() if n.startswith("fc.hat_tasks.1.")}
    plan = fork(model, 1, 0, [0])
    transplant(model, 1, plan, [0])
    assert head and all(torch.equal(p, dict(model.named_parameters())[n]) for n, p in head.items())
    norm = model.layer1[0].bn1
    numbers = torch.as_tensor(norm._hat.params["weight"].axes[0].units.numbers) - 1
    for name in ("weight", "bias", "running_mean", "running_var"):
        mine, theirs = (getattr(norm.hat_tasks[t], name) for t in (1, 0))
        for i, u in enumerate(numbers.tolist()):
            j = int((numbers == plan.phi[0][u]).nonzero()[0]) if bool(plan.masks[0][u]) else None
            assert j is None or mine[i] == theirs[j]
    assert all(torch.isfinite(b).all() for _, b in own_buffers(model, 1) if b.is_floating_point())


def test_moments_of_what_was_written_are_zero_and_others_stay(built):
    model, x = built("mlp", ())
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    parts.train(model, 0, optimizer, parts.problem(parts.shape_of("mlp")))
    state = {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    transplant(model, 1, fork(model, 1, 0, [0]), [0], [optimizer])
    seen = False
    for name, p in model.named_parameters():
        changed = before[name] != p
        for key in ("exp_avg", "exp_avg_sq"):
            if bool(changed.any()) and p in optimizer.state and ".hat_tasks." not in name:
                assert bool((optimizer.state[p][key][changed] == 0).all())
                same = optimizer.state[p][key] == state[p][key]
                assert bool(same.any())
                seen |= bool((state[p][key][changed] != 0).any())
    assert seen, "no moment was there to be zeroed"


def test_weights_that_an_optimizer_stores_become_the_new_ones(built):
    class Keeping(torch.optim.SGD):
        """Keeps a copy of the weights, as schedule-free methods do, and writes it into them."""

        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        self.state[p]["z"] = p.detach().clone()

    model, _ = built("mlp", ())
    optimizer = Keeping(model.parameters(), 1e-2)
    parts.train(model, 0, optimizer, parts.problem(parts.shape_of("mlp")))
    weight = model[4]._parameters["weight"]
    before = weight.detach().clone()
    transplant(model, 1, fork(model, 1, 0, [0]), [0], [optimizer])
    changed = before != weight
    assert bool(changed.any()) and torch.equal(optimizer.state[weight]["z"][changed], weight[changed])


def test_a_map_of_before_is_refused(built):
    model, _ = built("mlp")
    g = gates_of(model)[0]
    data = {k: v for k, v in g.unit_map.to_json().items() if k != "places"}
    g.unit_map = UnitMap.from_json(data)
    with pytest.raises(hatcl.HATError, match=r"saved before hatcl knew .* convert the plain model again"):
        fork(model, 2, 1, [0, 1])


class ByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = hatcl.HATLinear(6, 12, num_tasks=3)
        self.norm = hatcl.TaskIndexedBatchNorm1d(12, units=self.stem)
        self.up = hatcl.HATLinear(12, 20, num_tasks=3, reads=self.stem)
        self.down = hatcl.HATLinear(20, 12, units=self.stem, reads=self.up)
        self.head = hatcl.TaskIndexedLinear(12, 2, reads=self.stem)

    def forward(self, x):
        x = self.stem(x)
        return self.head(torch.relu(x + self.down(torch.relu(self.up(torch.relu(self.norm(x)))))))


def test_layers_by_hand():
    torch.manual_seed(0)
    model, x = parts.pretend(ByHand().eval(), (0, 1), share=0.5), torch.randn(5, 6)
    plan = fork(model, 2, 1, [0, 1])
    want = features_under(model, [x], 1)
    begin(model, 2, plan, [0, 1])
    got = features_under(model, [x], 2)
    on = plan.masks[0]
    # as above
    assert torch.allclose(got[:, on], want[:, plan.phi[0][on]], atol=5e-6) and bool(on.any())
    assert hatcl.certify(model, x, strict=True).exact


@pytest.mark.parametrize("name", ["grouped", "llama"])
def test_a_forked_task_starts_from_one_of_before_a_growth(built, name):
    model, x = built(name)
    hatcl.grow(model, 2.0 if name == "llama" else 1.5, example_inputs=x)
    plan = fork(model, 2, 1, [0, 1])
    want = moved(model, plan, x)
    assert begin(model, 2, plan, [0, 1]) > 0
    got = features_under(model, [x], 2)
    assert torch.allclose(got, want, atol=5e-6 * float(want.abs().max()), rtol=0)  # as without a growth
    assert hatcl.certify(model, x, strict=True).exact


def test_twin_without_the_sources_norms_in_the_size_of_now_it_does_not(built, monkeypatch):
    model, x = built("grouped")
    hatcl.grow(model, 1.5, example_inputs=x)
    monkeypatch.setattr(transplanting, "_of_its_own", lambda *_: ())
    plan = fork(model, 2, 1, [0, 1])
    want = moved(model, plan, x)
    begin(model, 2, plan, [0, 1])
    assert not torch.allclose(features_under(model, [x], 2), want, atol=1e-3)
