"""Importance, smoothing and scores against numbers worked out by hand; timings; what optimizers, scalers and
accumulation do to gradients; twins in which a protection is taken out."""

from __future__ import annotations

import io
import itertools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from hatcl.errors import ConfigError, SkillError
from hatcl.skills import scorer as module
from hatcl.skills.scorer import IMPORTANCE, SkillScorer
from hatcl.skills.scores import SKILL_GRAINS, SkillScores, localize

peft = pytest.importorskip("peft")

A, B = "base_model.model.fc.lora_A.weight", "base_model.model.fc.lora_B.weight"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.conv, self.fc = nn.Embedding(9, 6), nn.Conv1d(6, 6, 3, padding=1), nn.Linear(6, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(self.words(ids).transpose(1, 2)).mean(2))


def adapted(rank=2, targets=("words", "conv", "fc")) -> nn.Module:
    torch.manual_seed(0)
    model = peft.get_peft_model(Net(), peft.LoraConfig(r=rank, target_modules=list(targets)))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.3)
    return model


def one(weight: float, gradient: float) -> nn.Module:
    """A model of a single number."""
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(weight)
    model.weight.grad = torch.full((1, 1), gradient)
    return model


def set_to(model: nn.Module, weight: float, gradient: float) -> None:
    model.weight.data.fill_(weight)
    model.weight.grad = torch.full((1, 1), gradient)


def loss_of(model: nn.Module, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 9, (4, 5), generator=generator)
    return nn.functional.cross_entropy(model(ids), torch.randint(0, 3, (4,), generator=generator))


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def kept(scorer: SkillScorer) -> list[torch.Tensor]:
    state = scorer.state_dict()
    return [*state["I"].values(), *state["U"].values()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def given_elements(scorer: SkillScorer, values: dict[str, torch.Tensor]) -> None:
    """Make these the scores of the elements."""
    state = scorer.state_dict()
    state["I"], state["U"] = values, {n: torch.ones_like(t) for n, t in values.items()}
    state["steps"] = 1
    scorer.load_state_dict(state)


# ---- formulas, by hand -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("importance", "first", "second"),
    [
        # w = 2; g = 3, then -1: w g = 6, -2. (I, U, I U) after each step with both betas 1/2
        ("first", (3.0, 1.5, 4.5), (2.5, 1.0, 2.5)),  # s = 6, 2
        ("second", (18.0, 9.0, 162.0), (11.0, 8.0, 88.0)),  # s = 36, 4
        ("mixed", (6.0, 3.0, 18.0), (5.0, 2.0, 10.0)),  # s = |6 - 18| = 12, |-2 - 2| = 4
    ],
)
def test_two_steps_by_hand(importance, first, second):
    model = one(2.0, 3.0)
    scorer = SkillScorer(model, "block", importance=importance, beta1=0.5, beta2=0.5)
    for gradient, expected in ((3.0, first), (-1.0, second)):
        set_to(model, 2.0, gradient)
        scorer.update()
        state = scorer.state_dict()
        assert (float(state["I"]["weight"]), float(state["U"]["weight"])) == expected[:2]
        assert float(scorer.element_scores()["weight"]) == expected[2] == float(scorer.scores().values)
    assert scorer.steps == 2


def test_the_defaults_are_the_papers():
    model = one(2.0, 3.0)
    scorer = SkillScorer(model, "block", importance="first")
    scorer.update()
    set_to(model, 2.0, -1.0)
    scorer.update()
    # I = .15 * 6 = .9, then .85 * .9 + .15 * 2 = 1.065; U = .15 * 5.1 = .765, then .85 * .765 + .15 * .935 = .7905
    state = scorer.state_dict()
    assert float(state["I"]["weight"]) == pytest.approx(1.065, rel=1e-6)  # float32: 1.2e-7
    assert float(state["U"]["weight"]) == pytest.approx(0.7905, rel=1e-6)
    fresh = SkillScorer(model, "block")
    assert (fresh.importance, fresh.beta1, fresh.beta2) == ("mixed", 0.85, 0.85)


def test_the_two_betas_have_their_own_part():
    for beta1, beta2, expected in ((0.5, 0.75, (3.0, 0.75)), (0.75, 0.5, (1.5, 2.25))):
        scorer = SkillScorer(one(2.0, 3.0), "block", importance="first", beta1=beta1, beta2=beta2)
        scorer.update()
        state = scorer.state_dict()
        assert (float(state["I"]["weight"]), float(state["U"]["weight"])) == expected


def test_a_pair_scores_the_product_of_means():
    elements = {
        A: torch.tensor([[1.0, 2, 3, 0, 0, 6], [4, 5, 9, 0, 0, 18]]),
        B: torch.tensor([[1.0, 10], [3, 30], [2, 5]]),
    }
    by_grain = {}
    for grain in SKILL_GRAINS:
        scorer = SkillScorer(adapted(targets=["fc"]), grain)
        given_elements(scorer, elements)
        by_grain[grain] = scorer.scores()
    pairs = by_grain["lora_pair"]
    assert pairs.labels == ("base_model.model.fc[0]", "base_model.model.fc[1]")
    assert pairs.values.tolist() == [2.0 * 2.0, 6.0 * 15.0]
    for r in range(2):  # which is the mean of the d x d matrix of TaSL's code
        outer = torch.outer(elements[B][:, r], elements[A][r])
        assert float(pairs.values[r]) == float(outer.mean())
    assert by_grain["matrix"].values.tolist() == [48 / 12, 51 / 6] == by_grain["block"].values.tolist()
    assert by_grain["matrix"].labels == (A, B)


# ---- laws ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("importance", IMPORTANCE)
@pytest.mark.parametrize("grain", SKILL_GRAINS)
def test_groups_of_every_kind_of_layer(grain, importance):
    """Linear layers, convolutions and embeddings, against a loop over ranks."""
    model = adapted(rank=3)
    scorer = SkillScorer(model, grain, importance=importance)
    for seed in range(3):
        model.zero_grad()
        loss_of(model, seed).backward()
        scorer.update()
    scores, elements = scorer.scores(), scorer.element_scores()
    assert len(scores.values) == len(scores.labels) == (9 if grain == "lora_pair" else 6)
    assert bool((scores.values > 0).all())
    for label, value in zip(scores.labels, scores.values.tolist(), strict=True):
        if grain != "lora_pair":
            expected = elements[label].mean()
        else:
            path, r = label[:-1].rsplit("[", 1)
            a, b = (t for n, t in elements.items() if n.startswith(f"{path}.lora_"))
            expected = a[int(r)].mean() * b[:, int(r)].mean()
        assert value == pytest.approx(float(expected), rel=1e-14)  # float64: the order of additions


def test_pairs_move_with_their_ranks():
    values = {}
    for order in ([0, 1, 2], [2, 0, 1]):
        model = adapted(rank=3, targets=["fc"])
        scorer = SkillScorer(model)
        loss_of(model, 0).backward()
        for name, p in model.named_parameters():
            if p.requires_grad:
                dim = 0 if "lora_A" in name else 1
                p.data, p.grad = (
                    p.data.index_select(dim, torch.tensor(order)),
                    p.grad.index_select(dim, torch.tensor(order)),
                )
        scorer.update()
        values[tuple(order)] = scorer.scores().values
    assert torch.equal(values[0, 1, 2][[2, 0, 1]], values[2, 0, 1])


@settings(max_examples=25, deadline=None)
@given(exponent=st.integers(-20, 20), gradient=st.floats(-4, 4, width=16), weight=st.floats(-4, 4, width=16))
def test_first_order_scales_with_the_gradient(exponent, gradient, weight):
    assume(gradient and weight)

    def score(factor: float) -> float:
        model = one(weight, gradient * factor)
        scorer = SkillScorer(model, "block", importance="first")
        scorer.update()
        scorer.update()
        return float(scorer.scores().values)

    assert score(2.0**exponent) == score(1.0) * 4.0**exponent


def test_pairs_with_tiny_gradients_keep_their_order():
    """A pair's score is a product of four small numbers: in float32 it is zero where training has converged."""
    found = []
    for factor in (1.0, 2.0**-50):
        model = adapted(rank=4)
        scorer = SkillScorer(model, importance="first")
        for seed in range(2):
            model.zero_grad()
            (loss_of(model, seed) * factor).backward()
            scorer.update()
        found.append(scorer.scores())
    assert torch.equal(localize(found[0]).on, localize(found[1]).on)
    assert bool((found[1].values > 0).all()) and not bool(found[1].values.float().any())  # the twin


# ---- timings and optimizers ------------------------------------------------------------------------------------------


def test_before_has_the_old_weights_and_after_the_new():
    for timing, expected in (("before", 6.0), ("after", 1.5)):  # |2 * 3|, and |(2 - 0.5 * 3) * 3|
        model = one(2.0, 3.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        scorer = SkillScorer(model, "block", importance="first", beta1=0.5)
        with scorer.watch(optimizer, timing):
            optimizer.step()
        assert 2 * float(scorer.state_dict()["I"]["weight"]) == expected
        optimizer.step()
        assert scorer.steps == 1  # not watched any more


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=0.1, foreach=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1),
    "rprop": lambda p: torch.optim.Rprop(p),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1),
}


@pytest.mark.parametrize(("name", "timing"), list(itertools.product(OPTIMIZERS, ("before", "after"))))
def test_a_watched_optimizer_is_the_loop_by_hand(name, timing):
    states = []
    for watched in (True, False):
        model = adapted()
        optimizer = OPTIMIZERS[name](trainable(model))
        scorer = SkillScorer(model)
        handle = scorer.watch(optimizer, timing) if watched else None
        for seed in range(3):
            optimizer.zero_grad()
            loss_of(model, seed).backward()
            if not watched and timing == "before":
                scorer.update()
            optimizer.step()
            if not watched and timing == "after":
                scorer.update()
        if handle is not None:
            handle.remove()
        assert scorer.steps == 3
        states.append(kept(scorer))
    assert same(*states)


def test_scoring_changes_nothing():
    models = []
    for watched in (True, False):
        model = adapted()
        optimizer = torch.optim.AdamW(trainable(model), lr=0.1)
        if watched:
            SkillScorer(model).watch(optimizer)
            SkillScorer(model).watch(optimizer, "after")
        for seed in range(3):
            optimizer.zero_grad()
            loss_of(model, seed).backward()
            optimizer.step()
        models.append(trainable(model))
    assert same(*models)


def test_clipped_gradients_are_what_is_seen():
    model = one(2.0, 3.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scorer = SkillScorer(model, "block", importance="first", beta1=0.5)
    scorer.watch(optimizer)
    nn.utils.clip_grad_value_(model.parameters(), 0.25)
    optimizer.step()
    assert 2 * float(scorer.state_dict()["I"]["weight"]) == 0.5  # |2 * .25|


def test_accumulated_gradients_are_one_step():
    model = adapted()
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    scorer, by_hand = SkillScorer(model), SkillScorer(model)
    scorer.watch(optimizer)
    for seed in range(4):
        (loss_of(model, seed) / 2).backward()
        if seed % 2:
            by_hand.update()
            optimizer.step()
            optimizer.zero_grad()
    assert scorer.steps == 2 and same(kept(scorer), kept(by_hand))


SCALED = {
    "plain": ({}, False),
    "foreach": ({"foreach": True}, False),
    "fused": ({"fused": True}, False),  # its gradients are scaled when it starts and unscaled when it ends
    "fused and clipped": ({"fused": True}, True),
}


def learned_with_scaler(case: str, scale: float | None, timing: str, naive: bool = False) -> SkillScorer:
    """Three steps, the second one overflowing, under a GradScaler (of no scale for None)."""
    options, clip = SCALED[case]
    model = adapted()
    optimizer = torch.optim.AdamW(trainable(model), lr=0.01, **options)
    scorer = SkillScorer(model, importance="first")
    if naive:
        optimizer.register_step_pre_hook(lambda *_: scorer.update())
    else:
        scorer.watch(optimizer, timing)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, growth_interval=1000, backoff_factor=0.5)
    scaler = scaler if scale else torch.amp.GradScaler("cpu", enabled=False)
    for seed in range(3):
        if seed == 1 and not scale:
            continue
        optimizer.zero_grad()
        scaler.scale(loss_of(model, seed)).backward()
        if seed == 1:
            next(p for p in trainable(model) if p.grad is not None).grad.fill_(float("inf"))
        if clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(trainable(model), 0.125)
        scaler.step(optimizer)
        scaler.update()
    return scorer


@pytest.mark.parametrize(("case", "timing"), list(itertools.product(SCALED, ("before", "after"))))
def test_under_a_gradient_scaler(case, timing):
    """Skipped steps do not count, gradients are unscaled: bit for bit, as the scale is a power of two."""
    scaled, plain = learned_with_scaler(case, 1024.0, timing), learned_with_scaler(case, None, timing)
    assert scaled.steps == plain.steps == 2 and same(kept(scaled), kept(plain))


def test_twin_a_hook_without_care_sees_scaled_gradients_and_skipped_steps():
    scorer = learned_with_scaler("fused", 1024.0, "before", naive=True)
    assert scorer.steps == 3 and not all(bool(t.isfinite().all()) for t in kept(scorer))


def test_accelerates_wrapper():
    accelerate = pytest.importorskip("accelerate")
    model = adapted()
    inner = torch.optim.SGD(trainable(model), lr=0.1)
    optimizer = accelerate.Accelerator(cpu=True).prepare(inner)
    scorer, direct = SkillScorer(model), SkillScorer(model)
    direct.watch(inner)
    with scorer.watch(optimizer):
        loss_of(model, 0).backward()
        optimizer.step()
    optimizer.step()
    assert scorer.steps == 1 and direct.steps == 2
    assert optimizer is not inner


# ---- gradients that are not there, not finite, not float32 -----------------------------------------------------------


def test_a_tensor_without_gradient_scores_zero_at_that_step():
    model = nn.ModuleDict({"a": nn.Linear(1, 1, bias=False), "b": nn.Linear(1, 1, bias=False)})
    scorer = SkillScorer(model, "block", importance="first", beta1=0.5, beta2=0.5)
    for part in ("a", "b"):
        set_to(model[part], 2.0, 3.0)
    scorer.update()
    model["b"].weight.grad = None
    scorer.update()
    state = scorer.state_dict()
    assert (float(state["I"]["a.weight"]), float(state["U"]["a.weight"])) == (4.5, 1.5)
    assert (float(state["I"]["b.weight"]), float(state["U"]["b.weight"])) == (1.5, 1.5)  # .75 + .5 * |0 - 1.5|


def test_sparse_gradients():
    model = nn.Embedding(4, 2, sparse=True)
    scorer = SkillScorer(model, "block", importance="first", beta1=0.5)
    model(torch.tensor([1, 1])).sum().backward()
    scorer.update()
    expected = torch.zeros(4, 2)
    expected[1] = (2 * model.weight[1]).abs() / 2
    assert torch.equal(scorer.state_dict()["I"]["weight"], expected.detach())


def test_no_gradient_at_all_is_refused():
    model = adapted()
    scorer = SkillScorer(model)
    with pytest.raises(SkillError, match=r"none of the 6 tensors has a gradient .*words.*before zero_grad\(\)"):
        scorer.update()
    assert scorer.steps == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_are_named(bad, monkeypatch):
    model = adapted()
    scorer = SkillScorer(model)
    loss_of(model, 0).backward()
    model.base_model.model.fc.lora_A["default"].weight.grad[1, 0] = bad
    scorer.update()
    with pytest.raises(SkillError, match=r"the score of base_model.model.fc\[1\] is nan.*1 of 6 are not.*score again"):
        scorer.scores()
    with monkeypatch.context() as twin:  # without the check NaN would be taken for the most important
        twin.setattr(torch.Tensor, "isfinite", lambda t: torch.ones_like(t, dtype=torch.bool))
        assert localize(scorer.scores()).on.tolist().index(True) == 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_scored_in_float32(dtype):
    model = one(2.0**-14, 2.0**-14).to(dtype)
    model.weight.grad = model.weight.grad.to(dtype)
    scorer = SkillScorer(model, "block", importance="first", beta1=0.5, beta2=0.5)
    scorer.update()
    state = scorer.state_dict()
    assert state["I"]["weight"].dtype == torch.float32 and float(state["I"]["weight"]) == 2.0**-29
    if dtype == torch.float16:  # the twin: a product in half precision vanishes
        assert float(model.weight.detach() * model.weight.grad) == 0.0


# ---- resuming and memory ---------------------------------------------------------------------------------------------


def steps_of(model, optimizer, scorer, seeds, timing="before"):
    with scorer.watch(optimizer, timing):
        for seed in seeds:
            optimizer.zero_grad()
            loss_of(model, seed).backward()
            optimizer.step()


@pytest.mark.parametrize("grain", SKILL_GRAINS)
@pytest.mark.parametrize("forget", [None, "U"])
def test_a_resumed_scorer_is_the_same_bit_for_bit(grain, forget):
    whole = adapted()
    optimizer = torch.optim.SGD(trainable(whole), lr=0.1)
    scorer = SkillScorer(whole, grain)
    steps_of(whole, optimizer, scorer, [0, 1, 2])
    file = io.BytesIO()
    torch.save([scorer.state_dict(), whole.state_dict()], file)
    steps_of(whole, optimizer, scorer, [3, 4])

    file.seek(0)
    state, weights = torch.load(file, weights_only=True)
    again = adapted()
    again.load_state_dict(weights)
    resumed = SkillScorer(again, grain)
    if forget is not None:  # the twin: a state without the uncertainties
        state[forget] = {n: torch.zeros_like(t) for n, t in state[forget].items()}
    resumed.load_state_dict(state)
    steps_of(again, torch.optim.SGD(trainable(again), lr=0.1), resumed, [3, 4])
    assert resumed.steps == scorer.steps == 5
    equal = same(kept(scorer), kept(resumed)) and torch.equal(scorer.scores().values, resumed.scores().values)
    assert equal == (forget is None)


def test_a_state_is_a_copy():
    model = one(2.0, 3.0)
    scorer = SkillScorer(model, "block")
    scorer.update()
    state = scorer.state_dict()
    before = float(state["I"]["weight"])
    scorer.update()
    assert float(state["I"]["weight"]) == before and state["steps"] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_two_floats_per_element_and_nothing_more(dtype):
    model = adapted().to(dtype)
    scorer = SkillScorer(model)
    elements = sum(p.numel() for p in trainable(model))
    tensors = [t for held in vars(scorer).values() if isinstance(held, dict) for t in held.values()]
    tensors = [t for t in tensors if isinstance(t, torch.Tensor) and not isinstance(t, nn.Parameter)]
    assert scorer.floats() == 2.0
    assert sum(t.untyped_storage().nbytes() for t in tensors) == 2 * 4 * elements
    for p in trainable(model):
        p.grad = torch.ones_like(p)
    scorer.update()
    assert scorer.floats() == 2.0


def test_large_models_are_scored_in_portions(monkeypatch):
    states, sizes = [], []
    multiply = torch._foreach_mul
    for most in (1 << 22, 20):
        monkeypatch.setattr(module, "AT_ONCE", most)
        model = adapted()
        loss_of(model, 0).backward()
        scorer = SkillScorer(model)
        with monkeypatch.context() as watched:
            watched.setattr(torch, "_foreach_mul", lambda a, b: sizes.append([t.numel() for t in a]) or multiply(a, b))
            scorer.update()
        states.append(kept(scorer))
    everything, *portions = sizes
    assert len(portions) > 1 and list(itertools.chain(*portions)) == everything
    assert all(sum(portion) <= 20 or len(portion) == 1 for portion in portions)
    assert same(*states)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_follows_the_model_to_another_device():
    model = adapted()
    scorer = SkillScorer(model)
    model.cuda()
    for p in trainable(model):
        p.grad = torch.ones_like(p)
    scorer.update()
    assert {t.device.type for t in kept(scorer)} == {"cuda"}
    assert scorer.scores().values.device.type == "cpu"


# ---- adapters and bad input ------------------------------------------------------------------------------------------


def test_one_of_two_adapters():
    model = adapted()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["fc"]))
    scorer, other = SkillScorer(model), SkillScorer(model, adapter="other")
    loss_of(model, 0).backward()
    scorer.update()
    with pytest.raises(SkillError, match="none of the 2 tensors has a gradient"):
        other.update()
    assert isinstance(scorer.scores(), SkillScores) and list(other.state_dict()["I"]) == [A, B]


def test_full_fine_tuning():
    model = Net()
    loss_of(model, 0).backward()
    for grain, names in (
        ("matrix", ["words.weight", "conv.weight", "fc.weight"]),
        ("block", dict(model.named_parameters())),
    ):
        scorer = SkillScorer(model, grain)
        scorer.update()
        assert list(scorer.scores().labels) == list(names)
    with pytest.raises(
        ConfigError, match="Net has no LoRA adapter; score fully trained parameters with grain='matrix'"
    ):
        SkillScorer(model)


def changed(state, **changes):
    return {**state, **changes}


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda m: SkillScorer(m, "unit"), ConfigError, "grain: got 'unit', expected one of lora_pair, matrix, block"),
        (lambda m: SkillScorer(m, importance="mix"), ConfigError, "importance: got 'mix'.*did you mean 'mixed'"),
        (lambda m: SkillScorer(m, beta1=1.0), ConfigError, "beta1: got 1.0, expected a number between 0 and 1"),
        (lambda m: SkillScorer(m, beta2=0.0), ConfigError, "beta2: got 0.0"),
        (lambda m: SkillScorer(m, adapter="defualt"), SkillError, "adapter 'defualt' matches no LoRA tensor"),
        (lambda m: SkillScorer(m).scores(), SkillError, r"no step was scored yet; call update\(\)"),
        (lambda m: SkillScorer(m).element_scores(), SkillError, "no step was scored yet"),
        (
            lambda m: SkillScorer(m).watch(torch.optim.SGD(trainable(m), lr=0.1), "afterwards"),
            ConfigError,
            "timing: got 'afterwards', expected one of before, after; did you mean 'after'",
        ),
        (
            lambda m: SkillScorer(m).watch(torch.optim.SGD(adapted().parameters(), lr=0.1)),
            SkillError,
            r"SGD holds none of the 6 tensors that are scored \(first .*words.*\); build it over this model's",
        ),
    ],
)
def test_bad_input(call, error, text):
    with pytest.raises(error, match=text):
        call(adapted())


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda s: {k: v for k, v in s.items() if k != "U"}, "the state lacks 'U'"),
        (lambda s: changed(s, beta1=0.5), "the state has beta1=0.5, this scorer 0.85; make it with"),
        (lambda s: changed(s, grain="matrix"), "the state has grain='matrix', this scorer 'lora_pair'"),
        (lambda s: changed(s, U={**s["U"], "x": torch.ones(2)}), r"x is \[2\] in the state, lacking in this model"),
        (lambda s: changed(s, U={n: t for n, t in s["U"].items() if n != A}), rf"{A} is lacking in the state, "),
        (lambda s: changed(s, I={**s["I"], A: torch.ones(3, 6)}), rf"{A} is \[3, 6\] in the state, \[2, 6\] in this"),
    ],
)  # fmt: skip
def test_states_that_do_not_fit_leave_the_scorer_as_it_was(spoil, text):
    model = adapted()
    loss_of(model, 0).backward()
    scorer, other = SkillScorer(model), SkillScorer(model)
    scorer.update()
    other.update()
    other.update()
    before = kept(scorer)
    with pytest.raises(SkillError, match=text):
        scorer.load_state_dict(spoil(other.state_dict()))
    assert scorer.steps == 1 and same(before, kept(scorer))


def test_scores_that_are_all_zero_are_no_skill():
    model = adapted(rank=4)
    scorer = SkillScorer(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    scorer.update()
    with pytest.raises(
        SkillError, match="scores are 0 after 1 steps: .* Are all labels masked .-100., or was only the"
    ):
        scorer.scores()
