"""The shared loop: accumulation, AMP, resuming, what is kept, and what happens on errors."""

from __future__ import annotations

import copy

import atlas_parts as parts
import pytest
import torch
from torch.nn import functional as tf
from torch.utils.data import DataLoader, TensorDataset

import hatcl
from hatcl import ConfigError, IntegrityError, NonFiniteLossError, VectorError
from hatcl.atlas import AtlasOptions, accuracy, fit, spread


def loss_of(composer):
    return lambda batch: tf.cross_entropy(composer(batch[0]), batch[1])


def once(options, batches, **more):
    """A fresh composer's coefficients after a fit."""
    _, _, composer = parts.tiny()
    fit(composer, loss_of(composer), batches, options=AtlasOptions(**{"epochs": 2, **options}), **more)
    return composer.coefficients.detach()


# ---- steps -----------------------------------------------------------------------------------------------------


def test_accumulation_equals_one_big_batch():
    """Also where the parts are of unlike size, and with the regulariser, which counts once per step."""
    x, y = (torch.cat(part) for part in zip(*parts.tiny_batches(), strict=True))
    whole = [(x, y)]
    pieces = list(zip(x.split([20, 5, 7]), y.split([20, 5, 7]), strict=True))
    options = {"regulariser": 0.5, "p": 2, "lr": 0.05}
    big, small = once(options, whole), once({**options, "accumulate": 3}, pieces)
    # measured: 7e-9 (float32 sums in another order)
    torch.testing.assert_close(big, small, rtol=0, atol=1e-6)


def test_twin_accumulation_without_the_batches_sizes_differs(monkeypatch):
    x, y = (torch.cat(part) for part in zip(*parts.tiny_batches(), strict=True))
    pieces = list(zip(x.split([20, 5, 7]), y.split([20, 5, 7]), strict=True))
    big = once({"lr": 0.05}, [(x, y)])
    monkeypatch.setattr("hatcl.atlas.fitting._examples", lambda batch: 1)
    assert (once({"lr": 0.05, "accumulate": 3}, pieces) - big).abs().max() > 1e-4


def test_what_is_left_at_the_end_of_an_epoch_makes_a_step_of_its_own():
    """Five batches by two: the third step's gradient is that of the fifth batch, not half of it."""
    batches = parts.tiny_batches(5)
    seen = []

    def watched(self, *given):
        seen.append(self.param_groups[0]["params"][0].grad.clone())
        return plain(self, *given)

    plain = torch.optim.AdamW.step
    _, _, composer = parts.tiny()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", watched)
        fit(composer, loss_of(composer), batches, options=AtlasOptions(epochs=1, accumulate=2, clip=0, lr=1e-9))
    assert len(seen) == 3
    _, _, fresh = parts.tiny()
    loss_of(fresh)(batches[4]).backward()
    # measured: 1e-9; the coefficients have moved by 2e-9 by then
    torch.testing.assert_close(seen[2], fresh.coefficients.grad, rtol=1e-5, atol=1e-6)


def test_amp_bf16_agrees():
    options = {"lr": 0.02, "epochs": 3}
    plain, low = once(options, parts.tiny_batches()), once({**options, "amp": "bf16"}, parts.tiny_batches())
    assert not torch.equal(plain, low)  # it did something
    # measured: 8e-4 where the coefficients are up to 0.24: bf16 has 8 bits
    assert (plain - low).abs().max() < 0.005 < plain.abs().max()


def test_amp_fp16_with_its_scaler_agrees():
    options = {"lr": 0.02, "epochs": 3}
    plain, low = once(options, parts.tiny_batches()), once({**options, "amp": "fp16"}, parts.tiny_batches())
    assert (plain - low).abs().max() < 0.001  # measured: 1.1e-4: fp16 has 11 bits


def test_the_learning_rate_follows_the_schedule():
    _, _, composer = parts.tiny()
    rates = []

    def watched(self, *given):
        rates.append(self.param_groups[0]["lr"])
        return plain(self, *given)

    plain = torch.optim.AdamW.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", watched)
        for schedule in ("constant", "cosine"):
            fit(
                composer, loss_of(composer), parts.tiny_batches(2),
                options=AtlasOptions(lr=1.0, epochs=2, schedule=schedule),
            )  # fmt: skip
    assert rates[:4] == [1.0] * 4
    # 0.5 (1 + cos(pi k / 4))
    assert rates[4:] == pytest.approx([1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5])


def test_a_step_by_hand():
    """AdamW's first step is `lr * sign(g)` after the decay; without a gradient nothing but the decay moves."""
    _, _, composer = parts.tiny(1)
    fit(
        composer, lambda batch: composer.coefficients[0, 0] * 7, [None],
        options=AtlasOptions(epochs=1, lr=0.5, weight_decay=0.1), warm_start=torch.tensor([2.0]),
    )  # fmt: skip
    # 2 (1 - 0.5 * 0.1) - 0.5 = 1.4 and 2 * 0.95 = 1.9
    torch.testing.assert_close(composer.coefficients.detach(), torch.tensor([[1.4, 1.9, 1.9, 1.9]]))


def test_a_partition_of_one_equals_blocks_bit_for_bit():
    out = []
    for grain in ("block", "partition:1"):
        _, _, composer = parts.tiny(grain=grain)
        fit(composer, loss_of(composer), parts.tiny_batches(), options=AtlasOptions(lr=0.1, epochs=2))
        out.append(composer.coefficients.detach())
    assert torch.equal(*out)


# ---- what is kept ----------------------------------------------------------------------------------------------


def test_the_best_of_pretrained_start_and_epochs_is_kept():
    for scores, want in (([5, 1, 1, 1], -1), ([1, 5, 1, 1], 0), ([1, 1, 5, 5], 1), ([1, 2, 3, 5], 2)):
        _, _, composer = parts.tiny()
        states, given = [], iter(scores)

        def select(states=states, given=given, composer=composer):
            states.append(composer.coefficients.detach().clone())
            return {"score": next(given)}

        fitted = fit(
            composer, loss_of(composer), parts.tiny_batches(), select=select, options=AtlasOptions(epochs=2, lr=0.1),
            warm_start=torch.tensor([0.5, 0.25]),
        )  # fmt: skip
        assert fitted.epoch == want and fitted.score == 5
        assert not states[0].any() and states[1].tolist() == [[0.5] * 4, [0.25] * 4]
        assert torch.equal(composer.coefficients, states[want + 1])
        assert torch.equal(fitted.coefficients, states[want + 1])
        assert (fitted.pretrained["score"], fitted.start["score"]) == tuple(scores[:2])
        assert [h["score"] for h in fitted.history] == scores[2:]


def test_without_a_measure_the_last_are_kept():
    _, _, composer = parts.tiny()
    fitted = fit(composer, loss_of(composer), parts.tiny_batches(), options=AtlasOptions(epochs=3))
    assert fitted.epoch == 3 and torch.equal(fitted.coefficients, composer.coefficients)
    assert [set(h) for h in fitted.history] == [{"epoch", "loss"}] * 3


def test_the_model_is_in_evaluation_mode_and_the_modes_are_put_back():
    composer = parts.composer().train()
    composer.model.blocks[0].eval()
    before = {n: m.training for n, m in composer.named_modules()}
    seen = []

    def loss(batch):
        seen.append(any(m.training for m in composer.modules()))
        return tf.cross_entropy(composer(batch[0]), batch[1])

    fit(composer, loss, [parts.view("plain", "val")], options=AtlasOptions(epochs=1))
    assert seen == [False] and {n: m.training for n, m in composer.named_modules()} == before


def test_batch_norms_keep_their_statistics():
    """The published release fails on models with batch norm."""
    import timm

    torch.manual_seed(0)
    base = timm.create_model("test_resnet", in_chans=1, num_classes=10)
    other = parts.trained(base, *parts.view("plain", "train"), 2)
    composer = hatcl.compose(base, [hatcl.TaskVector.between(base, other)])
    before = {n: b.clone() for n, b in composer.model.named_buffers()}
    hatcl.atlas.few_shot(composer, [parts.view("plain", "val")], options={"epochs": 1}, steps=2)
    assert all(torch.equal(b, before[n]) for n, b in composer.model.named_buffers())
    assert composer.coefficients.abs().max() > 0


def test_progress_is_told_each_epoch():
    _, _, composer = parts.tiny()
    told = []
    fitted = fit(
        composer, loss_of(composer), parts.tiny_batches(), options=AtlasOptions(epochs=3), on_progress=told.append
    )
    epochs = [at for at in told if at.doing == "epoch"]
    assert [at.measured for at in epochs] == fitted.history and [at.epoch for at in epochs] == [1, 2, 3]
    assert [at.value for at in epochs] == [entry["loss"] for entry in fitted.history]


# ---- resuming --------------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def shuffled(generator):
    x, y = (torch.cat(part) for part in zip(*parts.tiny_batches(), strict=True))
    own = torch.Generator().manual_seed(5) if generator else None
    return DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True, generator=own)


def noisy_fit(path, generator, stop_after=None, options=None):
    """Random order, random noise, a schedule, a measure: all that must come back."""
    _, _, composer = parts.tiny()
    extra = torch.nn.Parameter(torch.ones(2))

    def loss(batch):
        x, y = batch
        return tf.cross_entropy(composer(x + 0.1 * torch.randn_like(x)) * extra, y)

    def progress(entry):
        if entry.epoch == stop_after and entry.doing == "epoch":
            raise Stop

    chosen = AtlasOptions(**{"epochs": 5, "lr": 0.1, "schedule": "cosine", "accumulate": 3, **(options or {})})
    fitted = fit(
        composer, loss, shuffled(generator), options=chosen, checkpoint=path, on_progress=progress,
        select=lambda: {"score": float(torch.rand(())), "accuracy": accuracy(composer, parts.tiny_batches(1))},
        others={"extra": (extra, 0.01)},
    )  # fmt: skip
    return fitted, composer.coefficients.detach(), extra.detach()


@pytest.mark.parametrize("generator", [False, True], ids=["global", "own generator"])
def test_an_interrupted_fit_ends_with_the_same_bits(tmp_path, generator):
    want, *tensors = noisy_fit(None, generator)
    for stop in (1, 3, 5):
        path = tmp_path / f"{stop}.pt"
        with pytest.raises(Stop):
            noisy_fit(path, generator, stop)
        torch.manual_seed(stop)  # another process has other random numbers
        got, *resumed = noisy_fit(path, generator)
        assert all(torch.equal(a, b) for a, b in zip(tensors, resumed, strict=True))
        assert got.history == want.history and (got.epoch, got.score) == (want.epoch, want.score)
        assert torch.equal(got.coefficients, want.coefficients)
        assert torch.equal(got.others["extra"], want.others["extra"])


@pytest.mark.parametrize("lost", ["random", "optimizer", "generators"])
def test_twin_without_part_of_the_checkpoint_the_bits_differ(tmp_path, lost):
    """Each part of it is needed: put back what a fresh start has in its place."""
    path, fresh = tmp_path / "a.pt", tmp_path / "b.pt"
    _, want, _ = noisy_fit(None, True)
    with pytest.raises(Stop):
        noisy_fit(path, True, 2)
    with pytest.raises(Stop):
        noisy_fit(fresh, True, 1, {"seed": 9})
    content, other = torch.load(path, weights_only=True), torch.load(fresh, weights_only=True)
    if lost == "generators":
        content["random"]["own"] = [torch.Generator().manual_seed(9).get_state()]
    else:
        content[lost] = other[lost]
    torch.save(content, path)
    assert not torch.equal(noisy_fit(path, True)[1], want)


def test_a_finished_fit_is_not_learned_again(tmp_path):
    path = tmp_path / "a.pt"
    want, *_ = noisy_fit(path, False)
    again, *_ = noisy_fit(path, False, stop_after=1)  # would stop if an epoch ran
    assert torch.equal(want.coefficients, again.coefficients)


def test_random_numbers_outside_go_on_as_if_nothing_had_been():
    _, _, composer = parts.tiny()
    loader = shuffled(False)
    torch.manual_seed(4)
    want = torch.rand(3)
    torch.manual_seed(4)
    fit(composer, loss_of(composer), loader, options=AtlasOptions(epochs=1))
    assert torch.equal(torch.rand(3), want)


def test_the_seed_decides():
    a, b, c = (once({"seed": s, "lr": 0.1}, shuffled(False)) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    path = tmp_path / "a.pt"
    noisy_fit(path, False)
    with pytest.raises(ConfigError, match="was started with lr=0.1, now got 0.2; give the same value to continue"):
        noisy_fit(path, False, options={"lr": 0.2})
    with pytest.raises(ConfigError, match=r"was started with coefficients=\[2, 4\], now got \[3, 4\]"):
        _, _, composer = parts.tiny(3)
        options = AtlasOptions(epochs=5, lr=0.1, schedule="cosine", accumulate=3)
        fit(composer, loss_of(composer), parts.tiny_batches(), options=options, checkpoint=path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(IntegrityError, match="cannot be read"):
        noisy_fit(path, False)
    torch.save({"format": "other"}, path)
    with pytest.raises(IntegrityError, match="not a checkpoint of hatcl.atlas"):
        noisy_fit(path, False)


# ---- errors ----------------------------------------------------------------------------------------------------


def broken_after(steps, composer, how):
    count = iter(range(100))

    def loss(batch):
        value = tf.cross_entropy(composer(batch[0]), batch[1])
        if next(count) < steps:
            return value
        if how == "loss":
            return value * float("nan")
        return value + torch.sqrt(composer.coefficients[0, 0] * 0)  # 0, with an infinite derivative

    return loss


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_leaves_everything_as_it_was(how):
    _, _, composer = parts.tiny()
    composer.coefficients.data.fill_(0.125)
    composer.train()
    state = torch.get_rng_state()
    with pytest.raises(
        NonFiniteLossError,
        match=f"fit: epoch 1, step 3: the {how} is .* coefficients are as they were.*Lower lr",
    ):
        fit(composer, broken_after(2, composer, how), parts.tiny_batches())
    assert bool((composer.coefficients == 0.125).all()) and composer.training
    assert composer.coefficients.grad is None and torch.equal(torch.get_rng_state(), state)


def test_twin_the_same_steps_without_the_check_move_the_coefficients(monkeypatch):
    _, _, composer = parts.tiny()
    monkeypatch.setattr("hatcl.engine.loop.Loop._check", lambda *_: None)
    fit(composer, broken_after(2, composer, "loss"), parts.tiny_batches(), options=AtlasOptions(epochs=1))
    assert composer.coefficients.isnan().any()


def test_batches_that_are_used_up_are_refused_before_anything_is_learned():
    _, _, composer = parts.tiny()
    with pytest.raises(ConfigError, match="batches: got list_iterator"):
        fit(composer, loss_of(composer), iter(parts.tiny_batches()))
    with pytest.raises(ConfigError, match="batches: none in epoch 1"):
        fit(composer, loss_of(composer), [])


def test_a_measure_must_give_a_score():
    _, _, composer = parts.tiny()
    for said in ({"accuracy": 1.0}, {"score": float("nan")}):
        with pytest.raises(ConfigError, match="select: gave .*expected a mapping with a number called score"):
            fit(composer, loss_of(composer), parts.tiny_batches(), select=lambda said=said: said)
    with pytest.raises(ConfigError, match="select: gave -inf for every"):
        fit(
            composer, loss_of(composer), parts.tiny_batches(), select=lambda: {"score": -float("inf")},
            options=AtlasOptions(epochs=1),
        )  # fmt: skip
    assert not composer.coefficients.any()


def test_coefficients_are_spread_over_groups():
    _, _, composer = parts.tiny()
    assert spread(composer, torch.tensor([1.0, 2])).tolist() == [[1] * 4, [2] * 4]
    assert spread(composer, torch.tensor([[1.0], [2]])).tolist() == [[1] * 4, [2] * 4]
    own = torch.rand(2, 4)
    assert torch.equal(spread(composer, own), own)
    with pytest.raises(VectorError, match=r"coefficients of shape \[3\]; expected \[2, 4\] \(2 vectors, 4 groups"):
        spread(composer, torch.zeros(3))
    with pytest.raises(VectorError, match="coefficients: 1 of 2 are NaN or infinite"):
        spread(composer, torch.tensor([1.0, float("nan")]))


def test_a_composer_can_be_copied_after_a_fit():
    _, _, composer = parts.tiny()
    fit(composer, loss_of(composer), parts.tiny_batches(), options=AtlasOptions(epochs=1))
    x = torch.randn(2, 3)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(composer)(x), composer.merge()(x))
