"""The formulas of HAT (Serra et al. 2018) and HAT-CL against the papers' own forms."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hatcl import functional as F
from hatcl.config import COMPENSATIONS, SCHEDULES

scales = st.floats(1 / 400, 400.0)
embeddings = st.lists(st.floats(-6.0, 6.0), min_size=1, max_size=20)


# ---- the scale ------------------------------------------------------------------------------------


RISING = [name for name in SCHEDULES if name != "cosine"]


@given(st.integers(2, 500), st.floats(1.5, 1000.0))
def test_every_schedule_starts_and_ends_where_the_paper_says(steps, top):
    starts = {"constant": top, "cosine": top, "exponential": top**-0.25}
    for schedule in SCHEDULES:
        start, stop = (F.scale_at(b, steps, top, schedule) for b in (0, steps - 1))
        assert stop == pytest.approx(top)
        assert start == pytest.approx(starts.get(schedule, 1 / top))


@given(st.integers(2, 300), st.sampled_from(RISING))
def test_schedules_never_fall_and_stay_at_the_end(steps, schedule):
    values = [F.scale_at(b, steps, 400.0, schedule) for b in range(steps + 3)]
    assert all(a <= b for a, b in zip(values, values[1:], strict=False))
    assert values[-1] == values[steps - 1]


def hat_cl(progress, top, ratio=0.8):
    """The two schedules that hat-cl 0.1.1 has beside HAT's, in its own terms: half the top times a cosine of a full
    turn, raised by the half and never below 1; and a base whose power is 1 where the share 1 - ratio is through."""
    base = top ** (1 / ratio)
    return max(top / 2 * math.cos(progress * 2 * math.pi) + top / 2, 1), base ** (progress - 1 + ratio)


@given(st.integers(2, 300), st.floats(1.5, 1000.0), st.floats(0.05, 1.0), st.data())
def test_cosine_and_exponential_are_hat_cls(steps, top, ratio, data):
    b = data.draw(st.integers(0, steps - 1))
    cosine, exponential = hat_cl(b / (steps - 1), top, ratio)
    assert F.scale_at(b, steps, top, "cosine") == pytest.approx(cosine, rel=1e-9)
    assert F.scale_at(b, steps, top, "exponential", ratio) == pytest.approx(exponential, rel=1e-9)


def test_hat_cls_cosine_falls_and_rises_again():
    assert [F.scale_at(b, 5, 100.0, "cosine") for b in range(5)] == pytest.approx([100, 50, 1, 50, 100])


@given(st.integers(2, 300), st.data())
def test_the_linear_schedule_is_equation_3(steps, data):
    b = data.draw(st.integers(1, steps))  # the paper counts from 1
    top = 400.0
    paper = 1 / top + (top - 1 / top) * (b - 1) / (steps - 1)
    assert F.scale_at(b - 1, steps, top) == pytest.approx(paper, rel=1e-12)


def test_halfway_of_the_other_schedules():
    assert F.scale_at(50, 101, 400.0, "half_cosine") == pytest.approx((400 + 1 / 400) / 2)
    assert F.scale_at(50, 101, 400.0, "exponential", 0.5) == pytest.approx(1.0)
    assert F.scale_at(20, 101, 400.0, "exponential") == pytest.approx(1.0)  # HAT-CL: above 1 in 80 % of the steps
    assert F.scale_at(50, 101, 400.0, "constant") == 400.0


def test_one_step_is_the_last():
    assert F.scale_at(0, 1, 400.0) == 400.0


# ---- the gate and its compensated gradient --------------------------------------------------------


def two_steps(e, s, top, clamp):
    """The paper's: autograd through the sigmoid, then q' = s_max/s (cosh(clamp(s e)) + 1) / (cosh(e) + 1) q."""
    e = e.detach().requires_grad_()
    torch.sigmoid(s * e).sum().backward()
    factor = top / s * (torch.cosh(torch.clamp(s * e, -clamp, clamp)) + 1) / (torch.cosh(e) + 1)
    return (factor * e.grad).detach()


@given(embeddings, scales)
def test_the_gradient_is_the_papers_two_steps(values, s):
    """In float64, where both are finite and the two-step form is not rounded away (|s e| up to 30)."""
    e = torch.tensor(values, dtype=torch.float64)
    keep = (s * e).abs() < 30
    e = e[keep].requires_grad_()
    F.soft_gate(e, torch.tensor(s, dtype=torch.float64), 400.0).sum().backward()
    # at |s e| = 30 the sigmoid's own derivative a (1 - a) has lost 13 of float64's 16 digits on the positive side
    assert torch.allclose(e.grad, two_steps(e, s, 400.0, 50.0), rtol=1e-2, atol=0)
    near = (s * e).abs() < 10
    assert torch.allclose(e.grad[near], two_steps(e, s, 400.0, 50.0)[near], rtol=1e-9, atol=0)


@given(embeddings, scales)
def test_hats_own_gradient_is_the_two_steps_as_float32_rounds_them(values, s):
    """Over the whole range of s e. sigmoid and its complement are rounded in other places: up to 2e-3 where 1 - a has
    three digits left, and one rounding of 1 at s e = 16.6, where it becomes 0."""
    e = torch.tensor(values, dtype=torch.float32)
    e = e[((s * e).abs() - 16.6).abs() > 0.7].requires_grad_()
    F.soft_gate(e, torch.tensor(s), 400.0, compensation="hat").sum().backward()
    want = two_steps(e, s, 400.0, 50.0)
    assert bool((e.grad[s * e > 17.3] == 0).all()) and bool((want[s * e > 17.3] == 0).all())
    some = (s * e < 10) & (s * e > -50)
    assert torch.allclose(e.grad[some], want[some], rtol=2e-3, atol=0)


def test_where_the_two_compensations_differ():
    """At s = 40, e = 1: 78.6 pushes a gate that is on, or nothing does."""
    for compensation, want in (("exact", 400.0 * 0.19661193), ("hat", 0.0)):
        e = torch.ones(1, requires_grad=True)
        F.soft_gate(e, torch.tensor(40.0), 400.0, compensation=compensation).sum().backward()
        assert float(e.grad) == pytest.approx(want, rel=1e-6)


@given(embeddings, scales)
def test_beyond_the_clamp_the_gradient_fades_as_the_paper_has_it(values, s):
    """cosh(c) times the sigmoid's derivative at |s e| > c is exp(-(|s e| - c)) up to 2 exp(-c)."""
    e = torch.tensor(values, dtype=torch.float64).requires_grad_()
    F.soft_gate(e, torch.tensor(s, dtype=torch.float64), 400.0, 10.0).sum().backward()
    x = (s * e.detach()).abs()
    # sigmoid'(x) = 1 / (2 (cosh x + 1)), written so that it neither overflows nor cancels
    derivative = torch.exp(-x) / (1 + torch.exp(-x)) ** 2
    paper = 400.0 * (torch.cosh(x.clamp(max=10.0)) + 1) / (torch.cosh(e.detach()) + 1) * derivative
    assert torch.allclose(e.grad, paper, rtol=1e-4, atol=1e-300)  # 2 exp(-10) = 9e-5


@given(embeddings, scales)
def test_gates_and_gradients_are_finite_in_every_type(values, s):
    kinds = itertools.product((torch.float32, torch.bfloat16, torch.float16, torch.float64), COMPENSATIONS)
    for dtype, compensation in kinds:
        e = torch.tensor(values, dtype=dtype).requires_grad_()
        a = F.soft_gate(e, torch.tensor(s), 400.0, compensation=compensation)
        a.sum().backward()
        assert a.dtype == dtype and bool(torch.isfinite(a).all() and torch.isfinite(e.grad).all())
        assert bool(((a >= 0) & (a <= 1)).all())


@given(embeddings, scales)
def test_soft_gates_are_zero_or_of_a_size_that_is_no_denormal(values, s):
    e = torch.tensor(values)
    a = F.soft_gate(e, torch.tensor(s), 400.0)
    plain = torch.sigmoid(s * e)
    assert torch.equal(a, torch.where(plain < F.SMALLEST_GATE, torch.zeros(()), plain))
    assert bool((a[a > 0] ** 4 > torch.finfo(torch.float32).tiny).all())


def test_a_gate_that_is_cut_to_zero_still_learns():
    e = torch.tensor([-1.0]).requires_grad_()
    a = F.soft_gate(e, torch.tensor(20.0), 400.0)
    a.backward()
    assert a.item() == 0 and e.grad.item() > 1


@given(embeddings)
def test_hard_is_soft_at_infinite_scale(values):
    e = torch.tensor(values)
    limit = torch.sigmoid(1e30 * e.double()) > 0.5
    assert torch.equal(F.hard_gate(e), limit)


# ---- the penalty ----------------------------------------------------------------------------------


def naive_penalty(gates, used, bounds, forgiven):
    ratios = []
    for start, stop in bounds:
        over = sum(a for a, u in zip(gates[start:stop], used[start:stop], strict=True) if not u)
        room = sum(1 for u in used[start:stop] if not u)
        ratios.append(max(over - forgiven * (stop - start), 0.0) / max(room, 1))
    return sum(ratios) / len(ratios)


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=30), st.floats(0, 1), st.data())
def test_the_penalty_is_equation_5(units, forgiven, data):
    gates, used = [a for a, _ in units], [u for _, u in units]
    tensors = torch.tensor(gates, dtype=torch.float64), torch.tensor(used)
    whole = naive_penalty(gates, used, [(0, len(units))], forgiven)
    assert float(F.sparsity_penalty(*tensors, None, forgiven)) == pytest.approx(whole, abs=1e-12)
    cuts = sorted(set(data.draw(st.lists(st.integers(1, len(units)), max_size=4))) | {0, len(units)})
    bounds = list(zip(cuts, cuts[1:], strict=False))
    layered = naive_penalty(gates, used, bounds, forgiven)
    # a layer's quota is a float32 number of units: off by up to 30 * 6e-8
    assert float(F.sparsity_penalty(*tensors, bounds, forgiven)) == pytest.approx(layered, abs=2e-6)


def test_units_that_are_used_cost_nothing():
    gates = torch.rand(10, requires_grad=True)
    used = torch.arange(10) < 4
    F.sparsity_penalty(gates, used).backward()
    assert bool((gates.grad[used] == 0).all()) and torch.allclose(gates.grad[~used], torch.tensor(1 / 6))


# ---- the mean over units that are on ---------------------------------------------------------------


@pytest.mark.parametrize("dim, over", [(-1, (-1,)), (-1, (-2, -1)), (1, (1,)), (1, (1, 2, 3))])
@pytest.mark.parametrize("hard", [False, True])
def test_centring_takes_the_mean_of_what_is_on(dim, over, hard):
    torch.manual_seed(1)
    x = torch.randn(3, 5, 4, 5, dtype=torch.float64)
    gate = torch.rand(5, dtype=torch.float64)
    gate = (gate > 0.5).double() if hard else gate
    shape = [1] * 4
    shape[dim] = 5
    gated = x * gate.view(shape)
    got = F.centre(gated, gate, dim, over)
    others = math.prod(x.shape[d] for d in over) // 5
    want = gated - gate.view(shape) * gated.sum(over, keepdim=True) / (gate.sum() * others)
    assert torch.allclose(got, want, atol=1e-14)
    if hard:
        on = got.movedim(dim, -1)[..., gate == 1]
        assert bool((got.movedim(dim, -1)[..., gate == 0] == 0).all())
        if over == (dim,):
            assert torch.allclose(on.mean(-1), torch.zeros((), dtype=torch.float64), atol=1e-14)


@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5), (5,)])
def test_the_derivative_of_centring(shape):
    torch.manual_seed(1)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    gate = torch.rand(5, dtype=torch.float64, requires_grad=True)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):  # the second, too: a penalty of gradients
        assert check(lambda x, a: F.centre(x, a, -1, (-1,)), (x, gate))


@pytest.mark.parametrize("shape", [(3, 8), (3, 8, 5), (2, 8, 3, 2)])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_the_derivative_of_centring_groups(shape, groups):
    torch.manual_seed(1)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(8, dtype=torch.float64, requires_grad=True)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x, a: F.centre_groups(x, a, groups), (x, weight))
    with torch.no_grad():
        assert torch.equal(
            F.centre_groups(x, weight, groups),
            torch.func.vmap(lambda w: F.centre_groups(x, w, groups))(weight[None])[0],
        )


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_gates_of_a_norm_and_their_derivative(groups):
    torch.manual_seed(1)
    gate = torch.rand(8, dtype=torch.float64)
    gate[1] = 0  # and a group of none, where there are four
    gate[0] = 0
    fold, centring = F.norm_gates(gate, groups)
    for a, f, c in zip(*(x.view(groups, -1) for x in (gate, fold, centring)), strict=True):
        if a.any():
            assert torch.allclose(f, (a > 0) * a.mean().sqrt()) and torch.allclose(c, a / a.mean())
        else:
            assert not f.any() and not c.any()
    ways = [torch.randn(8, dtype=torch.float64) for _ in range(2)]
    gate.requires_grad_()
    made = F.norm_gates(gate, groups)
    (want,) = torch.autograd.grad(sum((x * way).sum() for x, way in zip(made, ways, strict=True)), gate)
    live = gate.detach().view(groups, -1).any(1).repeat_interleave(8 // groups)
    got = F.norm_gates_backward(gate.detach(), *ways, groups)
    assert torch.allclose(got[live], want[live], rtol=1e-12, atol=1e-12)


@settings(max_examples=20)
@given(st.sampled_from([torch.float16, torch.bfloat16]), st.integers(0, 100))
def test_centring_in_half_precision_is_that_of_float32_rounded(dtype, seed):
    torch.manual_seed(seed)
    x = torch.randn(4, 64).to(dtype)
    gate = (torch.rand(64) > 0.5).to(dtype)
    assert torch.equal(F.centre(x, gate, -1, (-1,)), F.centre(x.float(), gate.float(), -1, (-1,)).to(dtype))


def test_how_scores_read():
    assert [F.score_text(v) for v in (0.5, 1.0, float("nan"), None)] == ["50.0", "100.0", "·", "·"]
    assert F.score_text(-0.25, "r2") == "-0.250" and F.score_text(0.5, "micro_f1") == "50.0"
    assert F.score_unit(["", "accuracy"]) == "in %" and F.score_unit(["r2", "", "pearson"]) == "by pearson and r2"
