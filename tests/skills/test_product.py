"""The best factors of a sum of products: by hand, against a dense SVD, against peft's own products."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hatcl.errors import SkillError
from hatcl.skills import product
from hatcl.skills.product import best_factors, factor_pairs

F64 = torch.float64


def drawn(seed: int, out: int, inner: int, ranks: tuple[int, ...], dtype: torch.dtype = F64):
    """Pairs of these ranks with weights, and their sum made densely."""
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for r in ranks:
        a, b = (torch.randn(s, generator=generator, dtype=F64).to(dtype) for s in ((r, inner), (out, r)))
        pairs.append((a, b, torch.rand(r, generator=generator, dtype=F64)))
    return pairs, sum(b.to(F64) @ torch.diag(w) @ a.to(F64) for a, b, w in pairs)


def truncated(dense: Tensor, rank: int) -> Tensor:
    u, s, vt = torch.linalg.svd(dense, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vt[:rank]


def refused(call, *texts: str) -> None:
    with pytest.raises(SkillError) as caught:
        call()
    for text in texts:
        assert text in str(caught.value), str(caught.value)


# --- by hand ---


def test_two_products_of_rank_one_by_hand():
    """0.7 e1 e1^T + 0.3 e2 e2^T: the best of rank one is 0.7 e1 e1^T, sqrt(0.7) on each side."""
    pairs = [(torch.tensor([[1.0, 0]]), torch.tensor([[1.0], [0]]), 0.7)]
    pairs += [(torch.tensor([[0, 1.0]]), torch.tensor([[0], [1.0]]), 0.3)]
    a, b = best_factors(pairs, 1)
    assert a[0].tolist() == pytest.approx([0.8366600265, 0]) and b[:, 0].tolist() == pytest.approx([0.8366600265, 0])
    a, b = best_factors(pairs, 2)
    assert (b @ a).flatten().tolist() == pytest.approx([0.7, 0, 0, 0.3])


def test_the_sign_is_that_of_the_rows_largest_element():
    a, b = best_factors([(torch.tensor([[3.0, -4.0]]), torch.tensor([[5.0]]), 1.0)], 1)
    assert a[0].tolist() == pytest.approx([-3.0, 4.0]) and b.item() == pytest.approx(-5.0)  # |A| = |B| = 5


def test_a_pair_keeps_its_place_and_sign_with_like():
    a = torch.tensor([[0, 2.0, 0], [0, 0, -3.0]])
    b = torch.tensor([[0, 3.0], [-2.0, 0]])
    alone, _ = best_factors([(a, b, 1.0)], 2)
    assert alone.flatten().tolist() == pytest.approx([0, 0, 3.0, 0, 2.0, 0])  # falling, largest positive
    got = best_factors([(a, b, 1.0)], 2, like=(a, b))
    assert [x.flatten().tolist() for x in got] == [pytest.approx(a.flatten()), pytest.approx(b.flatten())]


# --- the best, whatever is chosen ---


@pytest.mark.parametrize("rank", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("turned", [False, True])
def test_as_a_dense_svd(rank, turned):
    pairs, dense = drawn(rank, 7, 9, (2, 4))
    like = (torch.randn(rank, 9, dtype=F64), torch.randn(7, rank, dtype=F64)) if turned else None
    a, b = best_factors(pairs, rank, like)
    # float64 against float64, of numbers up to 6: measured 5e-15, and 1.8e-14 of the norm
    assert float((b @ a - truncated(dense, rank)).abs().max()) < 1e-13
    lost = torch.linalg.svdvals(dense)[rank:].norm()
    assert float((b @ a - dense).norm()) == pytest.approx(float(lost), abs=1e-13)
    if rank <= 6:  # what is beyond the sum's own rank has nothing to balance
        assert torch.allclose(a @ a.T, b.T @ b, atol=1e-13)


def test_other_factors_of_that_rank_are_worse():
    """The twin: the means of the factors, and the best factors a little aside."""
    pairs, dense = drawn(0, 6, 5, (2, 2))
    a, b = best_factors(pairs, 2)
    best = float((b @ a - dense).norm())
    (a1, b1, w1), (a2, b2, w2) = pairs
    mean = (b1 * w1 + b2 * w2) @ (w1[:, None] * a1 + w2[:, None] * a2)
    assert float((mean - dense).norm()) > 1.2 * best
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        aside = b + 0.01 * torch.randn(b.shape, generator=generator, dtype=F64)
        assert float((aside @ a - dense).norm()) > best


def test_no_turn_is_nearer_to_like():
    pairs, _ = drawn(3, 6, 5, (3, 3))
    like = pairs[0][:2]

    def away(a: Tensor, b: Tensor) -> float:
        return float((a - like[0]).square().sum() + (b - like[1]).square().sum())

    a, b = best_factors(pairs, 3, like)
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        turn = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=F64))[0]
        assert away(turn @ a, b @ turn.T) > away(a, b)
    assert away(*best_factors(pairs, 3)) > 1.2 * away(a, b)  # the twin: not turned


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 6), st.lists(st.integers(1, 3), min_size=1, max_size=3),
    st.integers(1, 4), st.booleans(),
)  # fmt: skip
def test_the_order_of_the_pairs_does_not_matter(seed, out, inner, ranks, rank, turned):
    pairs, dense = drawn(seed, out, inner, tuple(ranks))
    one, other = best_factors(pairs, rank), best_factors(pairs[::-1], rank)
    s = torch.linalg.svdvals(dense)
    # the best of a rank is one matrix only where the next singular value is smaller; its error grows as they meet
    gap = float(s[rank - 1] - s[rank]) if rank < len(s) else 1.0
    if gap > 1e-3:
        # measured at most 9e-14 over 4,000 draws
        assert torch.allclose(one[1] @ one[0], other[1] @ other[0], atol=1e-11)
    assert torch.allclose((one[1] @ one[0] - dense).norm(), (other[1] @ other[0] - dense).norm(), atol=1e-11)


# --- the ends ---


def test_a_direction_without_a_share_can_still_learn():
    """As LoRA starts: B zero, A not. The twin, both sides with the root of a singular value of zero, is stuck."""
    a, b = best_factors([(torch.randn(3, 5), torch.zeros(4, 3), 1.0)], 3)
    assert not b.any() and torch.allclose(a @ a.T, torch.eye(3), atol=1e-6)
    a, b = a.requires_grad_(), b.requires_grad_()
    (b @ a - torch.ones(4, 5)).square().sum().backward()
    assert b.grad.norm() > 1
    stuck_a, stuck_b = torch.zeros(3, 5, requires_grad=True), torch.zeros(4, 3, requires_grad=True)
    (stuck_b @ stuck_a - torch.ones(4, 5)).square().sum().backward()
    assert not stuck_a.grad.any() and not stuck_b.grad.any()


def test_a_rank_above_the_sides_is_filled_with_zeros():
    pairs, dense = drawn(1, 2, 9, (4,))
    a, b = best_factors(pairs, 4)
    assert a.shape == (4, 9) and b.shape == (2, 4) and torch.allclose(b @ a, dense)


def test_the_dtype_is_that_of_the_first_pair():
    pairs, dense = drawn(2, 6, 5, (2, 2), torch.bfloat16)
    a, b = best_factors(pairs, 2)
    assert a.dtype == b.dtype == torch.bfloat16
    want = truncated(dense, 2)
    # bfloat16 keeps 8 bits, two factors: measured 2.6e-3 of the largest element
    assert float((b.double() @ a.double() - want).abs().max()) < 1e-2 * float(want.abs().max())


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation gives."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return out


def test_the_product_itself_is_never_made():
    pairs, _ = drawn(0, 3000, 2, (2,))
    wide = [(torch.randn(2, 3000, dtype=F64), b, w) for _, b, w in pairs] * 2
    with Largest() as seen:
        best_factors(wide, 2, like=wide[0][:2])
    assert seen.numel == 3000 * 4  # two factors of rank two, stacked
    with Largest() as seen:  # the twin sees one that is made
        truncated(wide[0][1][:300] @ wide[0][0][:, :300], 2)
    assert seen.numel == 300 * 300


# --- peft ---


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.fc = nn.Embedding(11, 6), nn.Linear(6, 5)
        self.conv, self.one, self.series = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1), nn.Conv1d(2, 5, 3)


@pytest.fixture
def adapted():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(Net(), peft.LoraConfig(r=2, lora_alpha=3, target_modules=list(Net()._modules)))
    model.add_adapter("second", model.peft_config["default"])
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p)
    return model


@pytest.mark.parametrize("layer", ["words", "fc", "conv", "one", "series"])
def test_what_peft_multiplies(adapted, layer):
    """0.7 and 0.3 of what peft adds to a layer of each kind; its scaling, 3 / 2, stands on both sides."""
    layer = getattr(adapted.base_model.model, layer)
    held = [layer.lora_embedding_A, layer.lora_embedding_B] if len(layer.lora_embedding_A) else None
    first, second = (
        [x[name] if held else x[name].weight for x in held or (layer.lora_A, layer.lora_B)]
        for name in ("default", "second")
    )
    deltas = [layer.get_delta_weight(name).detach() for name in ("default", "second")]
    want = 0.7 * deltas[0] + 0.3 * deltas[1]
    turned = held is not None
    want = truncated((want.T if turned else want.flatten(1)).double(), 2)
    with torch.no_grad():
        for p, new in zip(first, best_factors([(*first, 0.7), (*second, 0.3)], 2), strict=True):
            p.copy_(new)
    got = layer.get_delta_weight("default").detach()
    got = (got.T if turned else got.flatten(1)).double()
    # float32 against float64, of numbers up to 6: measured 7.7e-7
    assert float((got - want).abs().max()) < 5e-6


# --- names ---


def test_factor_pairs_are_found_by_segment():
    names = ["q.lora_A.weight", "q.lora_B.weight", "q.lora_B.bias", "w.lora_embedding_B", "w.lora_embedding_A"]
    assert factor_pairs([*names, "my_lora_A.weight", "fc.bias"]) == [
        ("q.lora_A.weight", "q.lora_B.weight"), ("w.lora_embedding_A", "w.lora_embedding_B"),
    ]  # fmt: skip
    assert factor_pairs(["fc.weight", "fc.bias"]) == []


@pytest.mark.parametrize(
    "name, other", [("q.lora_A.weight", "q.lora_B.weight"), ("q.lora_B.weight", "q.lora_A.weight")]
)
def test_a_factor_without_its_partner(name, other):
    refused(lambda: factor_pairs([name]), f"{name} has no partner {other}; give the complete adapter, both A and B")


def test_what_does_not_fit_is_refused_with_shapes():
    a, b = torch.ones(2, 4), torch.ones(3, 2)
    refused(lambda: best_factors([], 1), "got 0 pairs and rank 1, expected at least one pair")
    refused(lambda: best_factors([(a, b, 1.0)], 0), "got 1 pairs and rank 0", "a rank of at least 1")
    refused(
        lambda: best_factors([(a, b, 1.0), (torch.ones(2, 5), b, 1.0)], 1),
        "pair 1 is A [2, 5], B [3, 2]; the first is A [2, 4], B [3, 2]: they must agree in all but the rank",
    )  # fmt: skip
    refused(
        lambda: best_factors([(a, torch.ones(3, 1), 1.0)], 1),
        "pair 0: A [2, 4] has rank 2, B [3, 1] has rank 1; the LoRA of a grouped convolution", "average='factors'",
    )  # fmt: skip
    refused(
        lambda: best_factors([(a, torch.ones(3, 2, 3), 1.0)], 1),
        "pair 0: got A [2, 4], B [3, 2, 3], expected A [rank, in, ...], B [out, rank]",
    )  # fmt: skip
    refused(
        lambda: best_factors([(a, b, torch.ones(3))], 1),
        "pair 0: got weights [3], expected one number or [2], one per row of A",
    )  # fmt: skip
    refused(lambda: best_factors([(a, b, 1.0)], 1, (a, b)), "like: got A [2, 4], B [3, 2], expected rank 1")


def test_without_orthonormal_sides_it_is_not_the_best(monkeypatch):
    """The twin of the comparison with a dense SVD: the small matrix then has other singular values than the sum."""
    pairs, dense = drawn(4, 7, 9, (2, 4))
    monkeypatch.setattr(product.torch.linalg, "qr", lambda x: (x, torch.eye(x.shape[1], dtype=x.dtype)))
    a, b = best_factors(pairs, 3)
    assert float((b @ a - dense).norm()) > 1.2 * float((truncated(dense, 3) - dense).norm())
