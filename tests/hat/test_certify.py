"""The certificate: what it proves, and that it notices what it is for."""

from __future__ import annotations

import dataclasses
import random
import struct
from typing import Any

import numpy as np
import parts
import pytest
import torch
from torch import nn

import hatcl
from hatcl.hat import certify as certifying
from hatcl.hat import verify
from hatcl.hat.binding import ParameterPlan
from hatcl.hat.certify import attack, compare_outputs, largest_gap, noise
from hatcl.hat.digests import record
from hatcl.hat.gates import gates_of
from hatcl.hat.held import held


@pytest.fixture(params=parts.MODELS)
def sealed(request):
    return parts.pretend(parts.converted(request.param)), parts.images(request.param)


def test_it_is_exact_and_says_what_it_overwrote(sealed):
    model, x = sealed
    certificate = hatcl.certify(model, x)
    assert certificate.exact and certificate.max_abs_diff == {0: 0.0, 1: 0.0, 2: 0.0}
    for t, count in certificate.overwritten.items():
        shared = sum(int((~h.live(t)).sum()) for h in held(model) if h.task is None and not h.plain)
        assert count >= shared > 0
    assert str(certificate).startswith("exact: tasks 0, 1, 2 are bit-equal with everything else overwritten (at least")


def test_it_leaves_the_model_alone(sealed):
    model, x = sealed
    hatcl.set_task(model, 1)
    model.train()
    before = parts.snapshot(model)
    hatcl.certify(model, x)
    assert parts.same(before, parts.snapshot(model))
    assert model.training and gates_of(model)[0].task == 1


def test_the_attack_overwrites_what_is_not_live_and_nothing_else(sealed):
    model, _ = sealed
    before = {h.name: h.param.detach().clone() for h in held(model)}
    with attack(model, 1):
        for h in held(model):
            moved = h.param.detach() != before[h.name]
            if h.task is None and not h.plain:
                assert torch.equal(moved, ~h.live(1)), h.name
            else:
                assert bool(moved.all()) == (h.task != 1) and bool(moved.any()) == (h.task != 1), h.name
    assert all(torch.equal(h.param, before[h.name]) for h in held(model))


def test_an_error_inside_the_attack_puts_everything_back(sealed):
    model, _ = sealed
    before = parts.snapshot(model)
    with pytest.raises(ZeroDivisionError), attack(model, 0):
        raise ZeroDivisionError
    assert parts.same(before, parts.snapshot(model))


def test_twin_if_less_were_live_the_certificate_would_fail(sealed, monkeypatch):
    """A plan that says an element is not live though the task computes with it."""
    model, x = sealed
    record(model, 0)
    plain = ParameterPlan.live

    def less(self, task, device):
        mask = plain(self, task, device).clone()
        if mask.dim() > 1 and not self.copied:
            mask[..., ::2, :] = False
        return mask

    monkeypatch.setattr(ParameterPlan, "live", less)
    for t in hatcl.tasks(model):
        record(model, t)
    certificate = hatcl.certify(model, x)
    assert not certificate.exact and str(certificate).startswith("NOT exact: of tasks 0, 1, 2, these moved: {0:")
    with pytest.raises(
        hatcl.IsolationError,
        match="certify: NOT exact: .*Other tasks reach output of task 0 in evaluation; please report the model",
    ):
        hatcl.certify(model, x, strict=True)


def test_nothing_is_sealed_yet():
    with pytest.raises(hatcl.TaskError, match="no task is sealed, so there is nothing to prove; learn one"):
        hatcl.certify(parts.converted("mlp"), parts.images("mlp"))


# ---- bits ------------------------------------------------------------------------------------------------------------


def test_differences_of_what_is_not_a_number():
    nan = torch.tensor([float("nan"), 1.0])
    assert largest_gap(nan, nan.clone()) == 0.0
    assert largest_gap(nan, torch.tensor([float("nan"), 3.0])) == 2.0
    assert largest_gap(nan, torch.tensor([0.0, 1.0])) == float("inf")
    assert largest_gap(nan, torch.tensor([1.0, float("nan")])) == float("inf")
    other = torch.tensor(struct.unpack("<f", struct.pack("<I", 0x7FC00001)))
    assert 0 < largest_gap(nan[:1], other) < 1e-300  # another payload
    assert largest_gap(torch.tensor([True]), torch.tensor([False])) == float("inf")
    infinite = torch.tensor([float("inf")])
    assert largest_gap(infinite, infinite.clone()) == 0.0 and largest_gap(infinite, -infinite) == float("inf")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_the_sign_of_a_zero_is_a_difference(dtype):
    zero = torch.zeros(3, dtype=dtype)
    assert torch.equal(zero, -zero) and 0 < largest_gap(zero, -zero) < 1e-300
    assert largest_gap(zero, zero.clone()) == 0.0
    assert largest_gap(zero, zero + 0.5) == 0.5


def test_types_and_shapes_are_differences():
    one = torch.ones(2)
    for other in (one.double(), one.view(1, 2), torch.ones(3)):
        assert largest_gap(one, other) == float("inf")
    assert largest_gap(torch.tensor([1, 2]), torch.tensor([1, 3])) == float("inf")
    assert largest_gap(torch.tensor([2**53]), torch.tensor([2**53 + 1])) == float("inf")
    assert compare_outputs({"a": one, "b": one}, {"a": one}) == (float("inf"), "b (1 values instead of 2)")
    assert compare_outputs({"a": one, "b": one}, {"a": one, "b": -one}) == (2.0, "b")


# ---- outputs ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Out:
    logits: Any


def logits_of(y):
    return torch.distributions.Bernoulli(logits=y)


class Holder(nn.Module):
    """An MLP that gives its output in something."""

    def __init__(self, wrap):
        super().__init__()
        self.body, self.wrap = parts.mlp(), wrap

    def forward(self, x):
        return self.wrap(self.body(x))


@pytest.mark.parametrize("wrap", [Out, lambda y: {"a": [Out((y,))]}, logits_of, list])
def test_outputs_in_any_object_are_compared_and_their_layer_is_a_head(wrap):
    x = parts.images("mlp")
    model = hatcl.convert(Holder(wrap), 2, x)
    entry = gates_of(model)[0].unit_map.entries["body.7.weight"]
    assert entry.head and entry.copied
    parts.pretend(model)
    assert hatcl.certify(model, x, strict=True).exact
    with torch.no_grad():
        model.body[7].hat_tasks[1].weight.mul_(1.1)
    record(model, 1)
    assert hatcl.certify(model, x).exact
    gates_of(model)[0].cut = False
    plain = ParameterPlan.live
    with pytest.MonkeyPatch.context() as patch:  # and what moves them is seen
        patch.setattr(ParameterPlan, "live", lambda self, task, device: plain(self, task, device) & False)
        patch.setattr(certifying, "check_sealed", lambda model: None)
        assert not hatcl.certify(model, x).exact


@pytest.mark.parametrize(
    ("wrap", "text"),
    [
        (lambda y: float(y.sum()), "Holder: its forward returns a float, which holds no tensor"),
        (lambda y: None, "Holder: its forward returns None, which holds no tensor, so there is nothing to compare"),
        (lambda y: (z for z in y), "Holder: output is a generator, whose content hatcl cannot read to compare"),
        (lambda y: (y, nn.Identity()), r"Holder: output\[1\] is a module \(Identity\)"),
    ],
)
def test_outputs_in_which_there_is_nothing_to_compare(wrap, text):
    x = parts.images("mlp")
    with pytest.raises(hatcl.ConversionError, match=text):
        hatcl.convert(Holder(wrap), 2, x)
    model = parts.pretend(hatcl.convert(Holder(Out), 2, x))
    model.wrap = wrap
    with pytest.raises(hatcl.IsolationError, match=f"certify: {text}"):
        hatcl.certify(model, x)


# ---- how strong the attack is ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_the_attack_has_the_largest_values_that_there_are_and_ordinary_ones(dtype):
    x = torch.zeros(40, 8, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    new = noise(x, generator, extreme=True)
    assert new.dtype == dtype and new.shape == x.shape and bool(torch.isfinite(new).all())
    new = torch.view_as_real(new) if dtype.is_complex else new
    largest = torch.finfo(torch.bfloat16 if dtype.is_complex else dtype).max
    extreme = new.abs() == largest
    assert 0.3 < extreme.float().mean() < 0.36  # a third
    assert bool((new[extreme] > 0).any()) and bool((new[extreme] < 0).any())
    assert bool(extreme.any(0).all()) and bool(extreme.any(1).all())  # every row and every column
    assert bool((noise(x, generator).abs() < largest).all())


def test_what_is_extreme_is_finite_under_autocast():
    new = noise(torch.zeros(30), torch.Generator().manual_seed(0), extreme=True)
    assert bool(torch.isfinite(new.bfloat16()).all()) and float(new.abs().max()) > 3.38e38


def test_integers_and_complex_parameters_are_attacked_too():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(12, 16, dtype=torch.complex64))
            self.head = nn.Linear(16, 4)

        def forward(self, x):
            return self.head((x.to(torch.complex64) @ self.weight).abs())

    x = torch.randn(4, 12)
    model = parts.pretend(hatcl.convert(Turned(), 2, x))
    before = model._parameters["weight"].detach().clone()
    stirred = verify.stirred(model, x)
    assert bool((stirred._parameters["weight"] != before).all())
    weight = next(h for h in held(model) if h.name == "weight")
    with attack(model, 0):
        moved = weight.param.detach() != before
    assert weight.plan.copied or torch.equal(moved, ~weight.live(0))
    assert bool(moved.any())
    assert hatcl.certify(model, x, strict=True).exact
    norm = parts.pretend(parts.converted("resnet"))
    with attack(norm, 0):
        counts = [m.hat_tasks[1].num_batches_tracked for m in norm.modules() if isinstance(m, nn.BatchNorm2d)]
        assert counts and all(int(c) != 0 for c in counts)
    assert all(int(c) == 0 for c in counts)


def test_what_every_task_has_a_copy_of_is_attacked_in_the_plain_model():
    model = parts.pretend(parts.converted("resnet"))
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    before = norm._buffers["running_mean"].clone()
    with attack(model, 0):
        assert bool((norm._buffers["running_mean"] != before).all())
    assert torch.equal(norm._buffers["running_mean"], before)


# ---- modes -----------------------------------------------------------------------------------------------------------


class OnlyIn(nn.Linear):
    """Reads all of its weight in one mode."""

    when: Any = None

    def forward(self, x):
        out = super().forward(x)
        return out + self._parameters["weight"].abs().amax() if self.when() else out


@pytest.mark.parametrize(
    ("name", "when"),
    [
        ("in evaluation", lambda: True),
        ("with gradients", torch.is_grad_enabled),
        ("under bfloat16 autocast", lambda: torch.is_autocast_enabled("cpu")),
    ],
)
def test_a_leak_in_one_mode_is_found(name, when):
    x = parts.images("mlp")
    body = nn.Sequential(nn.Flatten(), OnlyIn(48, 16), nn.ReLU(), nn.Linear(16, 4))
    body[1].when = lambda: False
    model = parts.pretend(hatcl.convert(body, 2, x))
    certificate = hatcl.certify(model, x)
    assert certificate.exact and name in certificate.modes and name in str(certificate)
    model[1].when = when
    certificate = hatcl.certify(model, x)
    assert not certificate.exact
    assert f"Other tasks reach output of task 0 {name}; please report the model" in certificate.why


def test_a_mode_in_which_the_model_does_not_run_is_not_claimed():
    class Picky(nn.Linear):
        def forward(self, x):
            out = super().forward(x)
            if out.dtype != torch.float32:
                raise TypeError("float32 only")
            return out

    x = parts.images("mlp")
    model = parts.pretend(hatcl.convert(nn.Sequential(nn.Flatten(), Picky(48, 4)), 2, x))
    assert hatcl.certify(model, x).modes == ("in evaluation", "with gradients")
    half = parts.pretend(parts.converted("mlp").half())
    assert hatcl.certify(half, x.half()).modes == ("in evaluation", "with gradients")


def test_a_model_for_one_size_of_batch_is_certified_on_that():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = parts.mlp()

        def forward(self, x):
            return self.body(x.view(8, 3, 4, 4))

    x = parts.images("mlp")
    certificate = hatcl.certify(parts.pretend(hatcl.convert(Fixed(), 2, x)), x)
    assert certificate.exact and len(certificate.modes) == 3


# ---- what the model itself keeps ---------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [0, 1, 2])
def test_a_cache_that_was_written_to_is_found(task):
    model, x = parts.pretend(parts.converted("mlp")).eval(), parts.images("mlp")
    with hatcl.task(model, task), torch.no_grad():
        model(x)
        model[1].weight.data.zero_()  # torch does not count this write
    certificate = hatcl.certify(model, x)
    assert not certificate.exact and certificate.max_abs_diff[task] > 0
    assert f"computes another output for task {task} than a copy of it" in certificate.why and "(1.weight)" in str(
        certificate
    )
    assert hatcl.certify(model, x, strict=True).exact


def test_twin_on_a_copy_alone_it_is_not_found(monkeypatch):
    model, x = parts.pretend(parts.converted("mlp")).eval(), parts.images("mlp")
    with hatcl.task(model, 0), torch.no_grad():
        model(x)
        model[1].weight.data.zero_()
    monkeypatch.setattr(certifying._Proof, "live", lambda *args: None)
    assert hatcl.certify(model, x).exact


def test_a_module_that_was_replaced_is_named():
    model, x = parts.pretend(parts.converted("resnet")), parts.images("resnet")
    model.reset_classifier(2)
    with pytest.raises(hatcl.HATError, match="fc: the module that hatcl.convert bound .* no longer there"):
        hatcl.certify(model, x)
    model, x = parts.pretend(parts.converted("vit")), parts.images("vit")
    model.set_input_size((32, 32))
    with pytest.raises(
        hatcl.HATError, match=r"pos_embed: it has shape \[1, 17, 32\], hatcl.convert mapped \[1, 5, 32\]"
    ):
        hatcl.certify(model, torch.randn(2, 3, 32, 32))


# ---- randomness ------------------------------------------------------------------------------------------------------


class Random(nn.Module):
    """Draws in evaluation."""

    def __init__(self, draw):
        super().__init__()
        self.body, self.draw = parts.mlp(), draw

    def forward(self, x):
        return self.body(x) * self.draw()


@pytest.mark.parametrize("draw", [lambda: torch.rand(4), lambda: np.random.rand(), lambda: random.random()])
def test_random_numbers_are_seeded(draw):
    x = parts.images("mlp")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    model = parts.pretend(hatcl.convert(Random(lambda: 1.0), 2, x))
    torch.set_rng_state(before)
    model.draw = draw
    assert hatcl.certify(model, x, strict=True).exact
    assert torch.equal(before, torch.get_rng_state())
    assert parts.pretend(hatcl.convert(Random(draw), 2, x))


def test_what_is_random_all_the_same_is_called_so():
    x, generator = parts.images("mlp"), np.random.default_rng()
    text = r"two equal runs of its forward give different outputs \(output\), so it is random, or it keeps state where"
    with pytest.raises(hatcl.ConversionError, match=f"Random: {text}"):
        hatcl.convert(Random(generator.random), 2, x)
    model = parts.pretend(hatcl.convert(Random(lambda: 1.0), 2, x))
    model.draw = np.random.default_rng().random
    certificate = hatcl.certify(model, x)
    assert not certificate.exact and "it is random" in certificate.why
    with pytest.raises(hatcl.IsolationError, match=f"certify: NOT exact: .* {text}"):
        hatcl.certify(model, x, strict=True)
