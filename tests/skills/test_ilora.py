"""I-LoRA: each option has the effect that its name says (and without that effect its test fails), the moving average
and the consistency by hand, and what is left alone."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections import OrderedDict

import pytest
import torch
from ilora_parts import adapted, batch_of, bert, disturb, gpt2, plain_bert, same, state, t5, texts
from torch import nn

from hatcl.errors import ConfigError, IntegrityError, SkillError
from hatcl.skills import Hidden, ILoRA, ILoRAConfig, hidden_states_of
from hatcl.skills import ilora as module
from hatcl.skills.switch import adapter_tensors, using

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")


def made(model=None, **options):
    """I-LoRA over a model, with keyword arguments of both kinds."""
    names = [f.name for f in dataclasses.fields(ILoRAConfig)]
    config = {"use_ilora": True, **{k: v for k, v in options.items() if k in names}}
    return ILoRA(bert() if model is None else model, config, **{k: v for k, v in options.items() if k not in names})


def set_to(ilora, adapter, value):
    with torch.no_grad():
        for p in adapter_tensors(ilora.model, adapter).values():
            p.fill_(value)


def values(ilora):
    return {float(v) for p in adapter_tensors(ilora.model, ilora.stable).values() for v in p.unique()}


def learn(model, ilora, steps=3, watch=True):
    """A plain loop; the global generator's state afterwards."""
    torch.manual_seed(7)
    batch = batch_of(texts())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    model.train()
    with ilora.watch(optimizer):
        for _ in range(steps):
            loss = model(**batch).loss + ilora.loss(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return torch.get_rng_state()


# --- the twelve options ---


def use_ilora(folder):
    plain, off = bert(dropout=0.1), bert(dropout=0.1)
    ilora = ILoRA(off, ILoRAConfig(use_ilora=False))
    torch.manual_seed(7)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        plain.train()(**batch_of(texts())).loss.backward()
        optimizer.step()
    rng = torch.get_rng_state()
    assert torch.equal(learn(off, ilora), rng) and same(state(off), state(plain))
    ilora.remember(texts())
    ilora.load(folder / "none")
    assert ilora.save(folder) is None and not list(folder.iterdir())
    assert list(off.peft_config) == ["default"] and not len(ilora.memory) and not ilora.step() and ilora.steps == 0
    assert float(ilora.loss(batch_of(texts()))) == float(ilora.consistency(batch_of(texts()))) == 0
    with ilora.stable_active():
        assert off.active_adapter == "default"
    on = bert(dropout=0.1)
    ilora = ILoRA(on, ILoRAConfig(use_ilora=True))
    before = {n: p.clone() for n, p in adapter_tensors(on, "stable").items()}
    learn(on, ilora)
    assert list(on.peft_config) == ["default", "stable"] and ilora.moves == 3
    assert not any(torch.equal(p, before[n]) for n, p in adapter_tensors(on, "stable").items())


def ema_alpha(folder):
    for alpha, steps, expected in [(0.75, 1, 1.5), (0.75, 2, 1.875), (1.0, 3, 1.0), (0.0, 1, 3.0)]:
        ilora = made(ema_alpha=alpha)
        set_to(ilora, "stable", 1.0)
        set_to(ilora, "default", 3.0)
        assert all([ilora.step() for _ in range(steps)])
        assert values(ilora) == {expected}  # 0.75 * 1 + 0.25 * 3, ...


def consistency_weight(folder):
    ilora = made(consistency_weight=2.5, on="batch")
    disturb(ilora.model, "stable")
    batch = batch_of(texts())
    assert float(ilora.loss(batch)) == float(2.5 * ilora.consistency(batch)) > 0


def ilora_buffer_size(folder):
    ilora = made(ilora_buffer_size=3)
    ilora.remember(range(10))
    assert len(ilora.memory) == 3 and ilora.memory.seen == 10


def by_adapter(**losses):
    return lambda model, batch: torch.tensor(losses[model.active_adapter])


def selective_update(folder):
    worse, better = by_adapter(default=2.0, stable=1.0), by_adapter(default=1.0, stable=2.0)
    for loss, moves in ((worse, False), (better, True)):
        ilora = made(selective_update=True, loss=loss)
        ilora.remember(texts())
        disturb(ilora.model, "default")
        before = {n: p.clone() for n, p in adapter_tensors(ilora.model, "stable").items()}
        assert ilora.step() is moves and ilora.steps == 1 and ilora.moves == int(moves)
        after = adapter_tensors(ilora.model, "stable")
        assert all(torch.equal(p, before[n]) is not moves for n, p in after.items())


def min_update_threshold(folder):
    for threshold, moves in ((0.25, True), (0.5, True), (0.75, False), (-1.5, True)):
        ilora = made(selective_update=True, min_update_threshold=threshold, loss=by_adapter(default=1.0, stable=1.5))
        ilora.remember(texts())
        assert ilora.step() is moves
    ilora = made(selective_update=True, min_update_threshold=-0.5, loss=by_adapter(default=1.5, stable=1.0))
    ilora.remember(texts())
    assert ilora.step() is True  # half worse is allowed


def hidden_state_layers(folder):
    def of(layers):
        ilora = made(hidden_state_layers=layers)
        disturb(ilora.model, "stable")
        return float(ilora.consistency(batch_of(texts())))

    assert of([0]) == 0 < of([1]) != of([2]) == of([-1])  # the adapter is behind the embeddings
    # the mean of the layers' terms; float32 adds them in this order
    assert of([1, 2]) == float((torch.tensor(of([1])) + torch.tensor(of([2]))) / 2)


def save_ema_adapter(folder):
    at = made(save_ema_adapter=True).save(folder / "with")
    assert (at / "ema_adapter/adapter_model.safetensors").is_file()
    at = made(save_ema_adapter=False).save(folder / "without")
    assert sorted(p.name for p in at.iterdir()) == ["adapter", "ilora.json", "memory.pt"]
    with pytest.raises(SkillError, match="has no stable adapter, it was saved with save_ema_adapter=False"):
        made(previous_task_model=at)


def ema_adapter_path(folder):
    at = made(ema_adapter_path="slow/one").save(folder / "a")
    assert (at / "slow/one/adapter_model.safetensors").is_file() and not (at / "ema_adapter").exists()
    ilora = made(ema_adapter_path=folder / "elsewhere")
    disturb(ilora.model, "stable")
    at = ilora.save(folder / "b")
    assert (folder / "elsewhere/adapter_model.safetensors").is_file() and not (at / "elsewhere").exists()
    next_one = made(ema_adapter_path=folder / "elsewhere", prev_task_id="b")
    for model in (next_one.model, made(previous_task_model=at).model):
        assert same(dict(adapter_tensors(model, "stable")), dict(adapter_tensors(ilora.model, "stable")))
    assert not same(dict(adapter_tensors(made().model, "stable")), dict(adapter_tensors(ilora.model, "stable")))


def previous_task_model(folder):
    first = made(seed=3)
    disturb(first.model, "default")
    disturb(first.model, "stable", seed=4)
    first.remember(texts())
    first.step()
    second = made(previous_task_model=first.save(folder), seed=5)
    for name in ("default", "stable"):
        assert same(dict(adapter_tensors(second.model, name)), dict(adapter_tensors(first.model, name)))
    assert second.steps == second.moves == 1 and second.memory.seen == 6
    assert [e["input_ids"].tolist() for e in second.memory.sample(6)] == [
        e["input_ids"].tolist() for e in first.memory.sample(6)
    ]


def current_task_id(folder):
    assert made(current_task_id="agnews").save(folder) == folder / "agnews"
    assert made(current_task_id=7).save(folder) == folder / "7" and (folder / "7/ilora.json").is_file()
    assert made().save(folder / "none") == folder / "none"


def prev_task_id(folder):
    tasks = {}
    for seed, name in enumerate(("a", "b")):
        tasks[name] = made(current_task_id=name)
        disturb(tasks[name].model, "stable", seed=seed)
        tasks[name].save(folder)
    for name, first in tasks.items():
        for at in (folder, folder / name):
            second = made(previous_task_model=at, prev_task_id=name)
            assert same(dict(adapter_tensors(second.model, "stable")), dict(adapter_tensors(first.model, "stable")))
    with pytest.raises(SkillError, match="a holds the task 'a', expected prev_task_id 'b'"):
        made(previous_task_model=folder / "a", prev_task_id="b")
    with pytest.raises(SkillError, match="prev_task_id is 'a', but the place of its stable adapter is"):
        made(prev_task_id="a")


OPTIONS = {
    f.__name__: f
    for f in (
        use_ilora, ema_alpha, consistency_weight, ilora_buffer_size, selective_update, min_update_threshold,
        hidden_state_layers, save_ema_adapter, ema_adapter_path, previous_task_model, current_task_id, prev_task_id,
    )
}  # fmt: skip
DEFAULTS = {
    "use_ilora": True, "ema_alpha": 0.999, "consistency_weight": 1.0, "ilora_buffer_size": 500,
    "selective_update": False, "min_update_threshold": 0.1, "hidden_state_layers": [-1], "save_ema_adapter": True,
    "ema_adapter_path": None, "previous_task_model": None, "current_task_id": None, "prev_task_id": None,
}  # fmt: skip


def test_these_are_the_options_and_their_defaults():
    assert ILoRAConfig().to_dict() == DEFAULTS and list(OPTIONS) == list(DEFAULTS)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_option_has_its_effect(name, tmp_path):
    OPTIONS[name](tmp_path)


@pytest.mark.parametrize("name", OPTIONS)
def test_without_its_effect_the_test_fails(name, tmp_path, monkeypatch):
    check = ILoRAConfig.__post_init__

    def ignoring(self):
        check(self)
        object.__setattr__(self, name, getattr(ILoRAConfig, name))

    monkeypatch.setattr(ILoRAConfig, "__post_init__", ignoring)
    with pytest.raises((AssertionError, SkillError, IntegrityError, pytest.fail.Exception)):
        OPTIONS[name](tmp_path)


def test_an_ilora_that_is_always_on_is_found_out(tmp_path, monkeypatch):
    check = ILoRAConfig.__post_init__

    def on(self):
        check(self)
        object.__setattr__(self, "use_ilora", True)

    monkeypatch.setattr(ILoRAConfig, "__post_init__", on)
    with pytest.raises((AssertionError, SkillError)):
        use_ilora(tmp_path)


# --- the moving average ---


def test_one_fused_call_moves_every_tensor(monkeypatch):
    ilora = made(ema_alpha=0.5)
    calls = []
    real = torch._foreach_lerp_
    monkeypatch.setattr(torch, "_foreach_lerp_", lambda *a: (calls.append([len(x) for x in a[:2]]), real(*a))[1])
    ilora.step()
    assert calls == [[10, 10]]


def test_names_that_never_match_are_found_out(monkeypatch):
    """The published implementations look up the plastic adapter's names among the stable one's: nothing moves."""
    ilora = made(ema_alpha=0.5)
    set_to(ilora, "stable", 1.0)
    set_to(ilora, "default", 3.0)
    plastic = {n: p for n, p in ilora.model.named_parameters() if "default" in n}
    matched = [(n, p) for n, p in ilora.model.named_parameters() if "stable" in n and n in plastic]
    assert not matched
    ilora.step()
    assert values(ilora) == {2.0}


def test_the_order_of_the_coefficients():
    ilora = made(ema_alpha=0.999)
    set_to(ilora, "stable", 0.0)
    set_to(ilora, "default", 1.0)
    ilora.step()
    assert values(ilora) == {float(torch.tensor(1 - 0.999))}  # the other order gives 0.999


def test_a_plastic_adapter_in_half_precision_still_moves_the_stable_one():
    model = adapted(plain_bert().to(torch.bfloat16), {"target_modules": ["query"]})
    for p in adapter_tensors(model, "default").values():
        p.data = p.data.to(torch.bfloat16)
    ilora = made(model, ema_alpha=0.999)
    assert {p.dtype for p in adapter_tensors(model, "stable").values()} == {torch.float32}
    set_to(ilora, "stable", 1.0)
    set_to(ilora, "default", 2.0)
    ilora.step()
    assert values(ilora) == {float(torch.tensor(1.0).lerp(torch.tensor(2.0), 1 - 0.999))}
    assert (
        torch.ones(1, dtype=torch.bfloat16).lerp(torch.full((1,), 2.0).bfloat16(), 1 - 0.999) == 1
    )  # in bfloat16: not


def test_a_head_in_half_precision_is_warned_about(caplog):
    model = bert()
    model.base_model.model.classifier.to(torch.bfloat16)
    with caplog.at_level(logging.WARNING):
        made(model)
    assert (
        "part of the stable adapter is in torch.bfloat16, where rounding removes steps of 1 - ema_alpha = 0.001"
        in caplog.text
    )


def test_running_statistics_of_a_head_go_along():
    head = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))
    base = nn.Sequential(OrderedDict(fc=nn.Linear(4, 4), head=head))
    model = adapted(base, {"target_modules": ["fc"], "modules_to_save": ["head"]})
    ilora = made(model, ema_alpha=0.0)
    model.train()(torch.randn(8, 4))
    ilora.step()
    x = torch.randn(3, 4)
    plastic = model.eval()(x)
    with ilora.stable_active():
        assert torch.equal(model(x), plastic)


def test_no_optimizer_moves_the_stable_adapter():
    ilora = made(ema_alpha=1.0, consistency_weight=0.0)
    before = {n: p.clone() for n, p in adapter_tensors(ilora.model, "stable").items()}
    learn(ilora.model, ilora)  # AdamW with weight decay over all parameters
    assert same(dict(adapter_tensors(ilora.model, "stable")), before)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_moving_average_alone_leaves_learning_bit_identical(dropout):
    plain, model = bert(dropout), bert(dropout)
    off, on = ILoRA(plain, {"use_ilora": False}), made(model, consistency_weight=0.0)
    assert torch.equal(learn(plain, off), learn(model, on))
    after = state(model)
    assert on.moves == 3 and all(torch.equal(after[n], t) for n, t in state(plain).items())


def test_a_skipped_step_moves_nothing_and_a_removed_handle_neither():
    ilora = made()
    ilora.model(**batch_of(texts())).loss.backward()
    # the kind that a GradScaler calls in any case
    optimizer = torch.optim.AdamW(ilora.model.parameters(), lr=0.1, fused=True)
    optimizer.grad_scale = torch.tensor(1.0)
    handle = ilora.watch(optimizer)
    optimizer.step()
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    handle.remove()
    optimizer.step()
    assert ilora.steps == 2


# --- the consistency ---


def by_hand(ilora, batch, layers, mask=None):
    """Two forward passes of two models with one adapter each."""
    model = ilora.model
    plastic, stable = copy.deepcopy(model), copy.deepcopy(model)
    plastic.set_adapter("default")
    stable.set_adapter("stable")
    stable.eval()
    states = [m(**batch, output_hidden_states=True).hidden_states for m in (plastic, stable)]
    mask = batch["attention_mask"].bool() if mask is None else mask
    terms = [((states[0][i] - states[1][i])[mask] ** 2).mean() for i in layers]
    return float(sum(terms) / len(terms))


@pytest.mark.parametrize("make, classes", [(bert, True), (gpt2, False)])
def test_it_is_the_mean_squared_error_of_two_models(make, classes):
    ilora = made(make(), hidden_state_layers=[1, -1])
    disturb(ilora.model, "stable")
    batch = batch_of(texts(classes=classes))
    # 3.3e-8 relative at most was measured: the mean is summed in another order
    assert float(ilora.consistency(batch)) == pytest.approx(by_hand(ilora, batch, [1, -1]), rel=1e-6)


def padded(ilora, batch):
    """The consistency of a batch, and with other numbers in the padding of its hidden states."""
    rows = batch["attention_mask"] == 0

    def states(model, b):
        found = hidden_states_of(model, b)
        changed = [
            s.masked_fill(rows[..., None], 5.0 if model.active_adapter == "default" else -5.0) for s in found[0].states
        ]
        return [Hidden(changed, found[0].mask)]

    before = float(ilora.consistency(batch))
    ilora._hidden_states = states
    return before, float(ilora.consistency(batch))


def test_padding_is_left_out(monkeypatch):
    batch = batch_of(texts())
    ilora = made()
    disturb(ilora.model, "stable")
    before, after = padded(ilora, batch)
    assert before == after > 0
    monkeypatch.setattr(module, "masked_mse", lambda p, s, mask: ((p - s) ** 2).mean())  # padding counts
    ilora = made()
    disturb(ilora.model, "stable")
    before, after = padded(ilora, batch)
    assert before != after


def test_an_encoder_and_a_decoder_have_their_own_padding():
    ilora = made(t5())
    disturb(ilora.model, "stable")
    batch = batch_of(texts(classes=False))
    batch["labels"] = batch["labels"][:, :4].clone()
    batch["labels"][0, 2:] = -100
    stacks = hidden_states_of(ilora.model, batch)
    assert [s.states[0].shape[1] for s in stacks] == [7, 4]
    assert torch.equal(stacks[0].mask, batch["attention_mask"]) and torch.equal(stacks[1].mask, batch["labels"] != -100)
    terms = []
    with using(ilora.model, "stable", evaluate=True):
        stable = hidden_states_of(ilora.model, batch)
    for p, s in zip(stacks, stable, strict=True):
        terms.append(((p.states[-1] - s.states[-1])[p.mask.bool()] ** 2).mean())
    assert float(ilora.consistency(batch)) == pytest.approx(float((terms[0] + terms[1]) / 2), rel=1e-6)
    given = {**batch, "decoder_attention_mask": torch.ones_like(batch["labels"])}
    assert torch.equal(hidden_states_of(ilora.model, given)[1].mask, given["decoder_attention_mask"])


def test_the_gradient_goes_into_the_plastic_adapter_alone():
    ilora = made()
    disturb(ilora.model, "stable")
    ilora.consistency(batch_of(texts())).backward()
    with_gradient = {n for n, p in ilora.model.named_parameters() if p.grad is not None}
    assert len(with_gradient) == 8 and all(".default." in n for n in with_gradient)


def test_the_stable_adapter_computes_without_dropout_and_draws_nothing():
    ilora = made(bert(dropout=0.5).train())
    batch = batch_of(texts())
    torch.manual_seed(1)
    ilora.model(**batch)
    rng = torch.get_rng_state()  # after one forward pass of the plastic adapter
    torch.manual_seed(1)
    a = ilora.consistency(batch)
    assert torch.equal(torch.get_rng_state(), rng) and ilora.model.training
    assert float(a) > 0  # plastic = stable, but for dropout
    assert float(made(bert(dropout=0.5).eval()).consistency(batch)) == 0
    seen = []
    ilora._hidden_states = lambda m, b: (
        seen.append((m.active_adapter, m.training, torch.is_grad_enabled())),
        [torch.ones(1, 1)],
    )[1]
    ilora.consistency({})
    assert seen == [("default", True, True), ("stable", False, False)]


def test_an_exception_inside_leaves_everything_as_it_was():
    ilora = made(bert(dropout=0.1).train())
    flags = [p.requires_grad for p in ilora.model.parameters()]

    def fails(model, batch):
        if model.active_adapter == "stable":
            raise KeyError("inside")
        return hidden_states_of(model, batch)

    ilora._hidden_states = fails
    with pytest.raises(KeyError):
        ilora.consistency(batch_of(texts()))
    assert ilora.model.active_adapter == "default" and all(m.training for m in ilora.model.modules())
    assert [p.requires_grad for p in ilora.model.parameters()] == flags


def test_a_vision_transformer_of_timm():
    timm = pytest.importorskip("timm")
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=2, num_classes=3)
    model = adapted(vit, {"target_modules": ["qkv"], "modules_to_save": ["head"]})

    def layers(m, batch):
        return m.base_model.model.forward_intermediates(batch[0], output_fmt="NLC", intermediates_only=True)

    def loss(m, batch):
        return nn.functional.cross_entropy(m(batch[0]), batch[1])

    ilora = made(
        model, hidden_states=layers, loss=loss, selective_update=True, hidden_state_layers=[0, -1], batch_size=4
    )
    ilora.remember(zip(torch.randn(6, 3, 32, 32), torch.arange(6) % 3, strict=True))
    disturb(model, "stable")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with ilora.watch(optimizer):
        for _ in range(4):
            total = ilora.loss()
            assert float(total.detach()) > 0
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
    assert ilora.steps == 4
    with pytest.raises(SkillError, match="the batch is a tuple, expected a mapping"):
        made(model).consistency((torch.randn(1, 3, 32, 32), 1))


def test_a_convolutional_network():
    base = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    model = adapted(base, {"target_modules": ["0"], "modules_to_save": ["4"]}).train()

    def layers(m, x):
        return [m.base_model.model[:3](x)]

    ilora = made(model, hidden_states=layers, on="batch")
    disturb(model, "stable")
    x = torch.randn(5, 3, 4, 4)
    layers(model, x)
    once = {n: b.clone() for n, b in model.named_buffers()}
    assert float(ilora.loss(x).detach()) > 0
    # the plastic adapter's pass moves the running statistics, as learning does; the stable one's does not
    assert {n: int(b) - int(once[n]) for n, b in model.named_buffers() if "num_batches" in n} == {
        "base_model.model.1.num_batches_tracked": 1
    }


# --- the memory and the order of tasks ---


def test_the_first_task_has_no_memory_and_the_next_one_needs_it():
    ilora = made(selective_update=True, current_task_id="a", loss=by_adapter(default=2.0, stable=1.0))
    assert float(ilora.loss()) == 0 and ilora.step()
    ilora.next_task("b")
    assert (ilora.config.prev_task_id, ilora.config.current_task_id) == ("a", "b")
    for call in (ilora.loss, ilora.step):
        with pytest.raises(SkillError, match=r"the memory is empty, although a task came before \(a\); remember\(\)"):
            call()
    ilora.remember(texts())
    assert not ilora.step()
    ilora.next_task()
    assert ilora.config.prev_task_id == "b"


def test_loss_takes_the_memory_or_the_batch():
    ilora = made(batch_size=4)
    ilora.remember(texts(3))
    seen = []
    ilora._hidden_states = lambda m, b: (seen.append(len(b["labels"])), hidden_states_of(m, b))[1]
    ilora.loss(batch_of(texts(5)))
    assert seen == [3, 3]  # all there is
    assert len(ilora.memory_batch(2)["labels"]) == 2
    ilora.on = "batch"
    ilora.loss(batch_of(texts(5)))
    assert seen[2:] == [5, 5]
    with pytest.raises(ConfigError, match="batch: got none, but on='batch' compares the current batch's hidden states"):
        ilora.loss()


def test_replay_adds_the_tasks_own_loss_of_the_same_examples():
    def of(**options):
        ilora = made(**options)
        disturb(ilora.model, "stable")
        ilora.remember(texts())
        return ilora

    both = of(replay=0.5, consistency_weight=2.0)
    batch = both.memory_batch()  # drawn in the same order by the same seed
    expected = 2.0 * both.consistency(batch) + 0.5 * both.model(**batch).loss
    assert float(of(replay=0.5, consistency_weight=2.0).loss()) == float(expected)
    assert float(of(replay=0.5, consistency_weight=0.0).loss()) == float(0.5 * both.model(**batch).loss)


def test_stable_active_evaluates_the_stable_adapter():
    ilora = made()
    disturb(ilora.model, "stable")
    ilora.model.eval()
    batch = batch_of(texts())
    plastic = ilora.model(**batch).logits
    with ilora.stable_active():
        assert not torch.equal(ilora.model(**batch).logits, plastic)
    assert torch.equal(ilora.model(**batch).logits, plastic)


def test_a_second_ilora_goes_on_with_the_stable_adapter_that_is_there():
    first = made()
    disturb(first.model, "stable")
    before = {n: p.clone() for n, p in adapter_tensors(first.model, "stable").items()}
    second = made(first.model, prev_task_id="a")
    assert same(dict(adapter_tensors(second.model, "stable")), before)


# --- refused ---


def test_without_options_it_is_on():
    model = bert()
    ilora = ILoRA(model)
    assert ilora.enabled and "stable" in model.peft_config and ilora.config == ILoRAConfig(use_ilora=True)


def test_what_is_off_goes_on_to_the_next_task_too():
    ilora = ILoRA(bert(), {"use_ilora": False})
    ilora.next_task("second")
    assert ilora.config == ILoRAConfig(use_ilora=False)


@pytest.mark.parametrize(
    "options, text",
    [
        ({"on": "memroy"}, "on: got 'memroy', expected one of memory, batch; did you mean 'memory'"),
        ({"batch_size": 0}, "batch_size: got 0, expected an integer of at least 1"),
        ({"replay": -1.0}, "replay: got -1.0, expected a number of at least 0"),
        (
            {"replay": 1.0, "on": "batch"},
            "replay: got 1.0 with on='batch', expected 0; replay uses the memory's examples",
        ),
    ],
)
def test_arguments_outside_their_range(options, text):
    with pytest.raises(ConfigError, match=text):
        made(**options)


def test_models_and_adapters_that_do_not_fit():
    for options, text in (
        ({"adapter": "defalt"}, "no adapter 'defalt'; the model has default; did you mean 'default'"),
        (
            {"stable": "default"},
            "the adapter 'default' cannot be both plastic and stable; name another with stable=",
        ),
    ):
        model = bert()
        with pytest.raises(SkillError, match=text):
            made(model, **options)
        assert list(model.peft_config) == ["default"]
    with pytest.raises(SkillError, match="Linear is not a peft model"):
        made(nn.Linear(2, 2))
    model = bert()
    model.add_adapter("stable", peft.LoraConfig(r=3, target_modules=["query", "value"]))
    with pytest.raises(SkillError, match=r"lora_A.weight is \[2, 16\] in the adapter 'default', \[3, 16\] in 'stable'"):
        made(model)


def test_a_peft_model_without_lora():
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model = peft.get_peft_model(base, peft.IA3Config(target_modules=["0"], feedforward_modules=[]))
    with pytest.raises(SkillError, match="has no LoRA adapter; add one with peft.get_peft_model"):
        made(model)


def test_batches_that_do_not_fit():
    ilora = made(hidden_state_layers=[3])
    batch = batch_of(texts())
    with pytest.raises(
        SkillError, match=r"hidden_state_layers: 3 is not among the 3 hidden states .* \(0 to 2, or -3 to"
    ):
        ilora.consistency(batch)
    ilora = made()
    for given, text in (
        ({**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])}, "the batch has only padding"),
        (batch["input_ids"], "the batch is a Tensor, expected a mapping for"),
    ):
        with pytest.raises(SkillError, match=text):
            ilora.consistency(given)
    for states, text in (
        ([], "hidden_states gave 0 items, 0 of them Hidden; expected all or none"),
        ([Hidden([torch.ones(1, 1)]), torch.ones(1)], "hidden_states gave 2 items, 1 of them Hidden"),
        (
            [torch.ones(2, 3)],
            r"the mask is \[6, 7\], the hidden states are \[2, 3\]; expected a mask of their first dim",
        ),
    ):
        ilora._hidden_states = lambda m, b, states=states: states
        with pytest.raises(SkillError, match=text):
            ilora.consistency(batch)
    ilora._hidden_states = lambda m, b: [torch.ones(6, 7, 2 if m.active_adapter == "stable" else 3)]
    with pytest.raises(SkillError, match=r"hidden states of \[6, 7, 3\] \(plastic\) and \[6, 7, 2\] \(stable\) differ"):
        ilora.consistency(batch)


def test_labels_that_are_all_masked():
    ilora = made(t5())
    batch = batch_of(texts(classes=False))
    batch["labels"][:] = -100
    with pytest.raises(SkillError, match="all labels are masked"):
        ilora.consistency(batch)
    ilora = made(gpt2(), selective_update=True)
    ilora.remember([{**e, "labels": torch.full_like(e["labels"], -100)} for e in texts(classes=False)])
    with pytest.raises(
        SkillError, match=r"the loss of the adapter 'default' on 16 examples .* is nan; are all their lab"
    ):
        ilora.step()


def test_a_batch_in_place_of_examples_and_examples_that_make_no_batch():
    ilora = made()
    with pytest.raises(SkillError, match="remember: got a dict, one batch, expected single examples"):
        ilora.remember(batch_of(texts()))
    with pytest.raises(
        SkillError, match="remember: got a DataLoader, whose items are batches, expected single examples"
    ):
        ilora.remember(torch.utils.data.DataLoader([{"x": 1.0}] * 4, batch_size=2))
    assert not len(ilora.memory)
    ilora.remember({"input_ids": torch.ones(n, dtype=torch.long)} for n in (3, 4))
    with pytest.raises(SkillError, match="default_collate cannot batch the memory's examples .* pass collate="):
        ilora.memory_batch()


def test_a_model_without_hidden_states_or_loss():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x, **options):
            return self.fc(x)

    ilora = made(adapted(Plain(), {"target_modules": ["fc"]}), selective_update=True)
    with pytest.raises(
        SkillError, match="returned no hidden_states; pass hidden_states=, a function that returns a list of tensors"
    ):
        ilora.consistency({"x": torch.ones(1, 4)})
    ilora.remember([{"x": torch.ones(4)}])
    with pytest.raises(
        SkillError, match=r"model\(\*\*batch\) returned no loss, which selective_update and replay need; pass"
    ):
        ilora.step()


def test_another_adapter_is_active_or_another_optimizer():
    ilora = made()
    ilora.model.set_adapter("stable")
    with pytest.raises(
        SkillError, match="the adapter 'stable' is active, expected 'default', which learns; call set_ad"
    ):
        ilora.consistency(batch_of(texts()))
    with pytest.raises(
        SkillError, match="SGD holds none of the 10 tensors of the adapter 'default'; build it over this"
    ):
        ilora.watch(torch.optim.SGD(bert().parameters(), lr=0.1))


def test_what_is_trained_outside_the_adapter_is_refused():
    """Both adapters would share it, and a saved task would lack it."""
    model = bert()
    name, p = next((n, p) for n, p in model.named_parameters() if "LayerNorm" in n)
    p.requires_grad_(True)
    with pytest.raises(SkillError, match=f"{name} is trained outside the adapter .1 such., so both adapters would"):
        made(model)
    assert "stable" not in model.peft_config


def test_a_mixed_model_is_refused():
    model = peft.PeftMixedModel(bert().get_base_model(), peft.LoraConfig(target_modules=["query"]))
    with pytest.raises(SkillError, match="PeftMixedModel: several adapters are active at once, expected a PeftModel"):
        made(model)


def test_replay_of_masked_examples_is_said():
    ilora = made(replay=1.0, loss=lambda model, batch: torch.tensor(float("nan")))
    ilora.remember(texts(6))
    with pytest.raises(SkillError, match="on 16 examples of the memory is nan; are all their labels masked .-100."):
        ilora.loss()
