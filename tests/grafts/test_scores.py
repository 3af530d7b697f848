"""Scores of elements, and the graft of the highest of them."""

from __future__ import annotations

import math

import pytest
import torch
from graft_parts import refused
from hypothesis import given, settings
from hypothesis import strategies as st

from hatcl.errors import GraftError, IntegrityError
from hatcl.grafts import Graft, GraftScores, files
from hatcl.grafts.scores import highest


def scores(**values):
    return GraftScores({n: torch.tensor(v) for n, v in values.items()})


def test_the_highest_by_hand():
    s = scores(a=[[0.5, -3.0], [2.0, -0.25]], b=[1.0, -2.0])
    picked = {
        1 / 6: {"a": [2]}, 2 / 6: {"a": [2], "b": [0]}, 3 / 6: {"a": [0, 2], "b": [0]},
        4 / 6: {"a": [0, 2, 3], "b": [0]}, 5 / 6: {"a": [0, 2, 3], "b": [0, 1]},
    }  # fmt: skip
    for share, want in picked.items():
        g = s.graft(share)
        assert {n: at.tolist() for n, at in g.indices.items()} == want
        assert g.values is None and g.shapes == {"a": (2, 2), "b": (2,)} and g.size == round(6 * share)
    assert {n: at.tolist() for n, at in s.graft().indices.items()} == {"a": [0, 2], "b": [0]}  # above 0
    assert {n: at.tolist() for n, at in s.graft(threshold=-1).indices.items()} == {"a": [0, 2, 3], "b": [0]}
    assert {n: at.tolist() for n, at in s.graft(threshold=1).indices.items()} == {"a": [2]}  # strictly


NUMBERS = st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=8)


@given(st.lists(NUMBERS, min_size=1, max_size=4), st.integers(0, 40))
@settings(deadline=None, max_examples=150)
def test_exactly_k_and_none_outside_is_higher(lists, k):
    tensors = {f"t{i}": torch.tensor(x, dtype=torch.float32) for i, x in enumerate(lists)}
    every = torch.cat(list(tensors.values()))
    masks = highest(tensors, k)
    on = torch.cat([masks[n] for n in tensors])
    assert int(on.sum()) == min(k, len(every))
    if 0 < k < len(every):
        assert every[on].min() >= every[~on].max()
        # of equal ones the first, tensors in the order of their names
        last = every[on].min()
        ties = on[every == last]
        assert ties.tolist() == sorted(ties.tolist(), reverse=True)


def test_numbers_at_the_ends_of_float32():
    top, tiny = torch.finfo(torch.float32).max, 1e-45
    order = [top, 1.0, tiny, 0.0, -tiny, -1.0, -top]
    x = {"w": torch.tensor(order)}
    for k in range(1, 7):
        assert highest(x, k)["w"].tolist() == [i < k for i in range(7)]
    zeros = {"w": torch.tensor([-0.0, 0.0, 5.0, -0.0])}  # zeros of both signs are equal: the first
    assert highest(zeros, 2)["w"].tolist() == [True, False, True, False]


def test_twin_by_magnitude_the_lowest_would_be_taken():
    from hatcl.vectors.select import largest

    s = {"w": torch.tensor([1.0, -9.0, 2.0])}
    assert highest(s, 1)["w"].tolist() == [False, False, True]
    assert largest(s, 1).mask("w", s["w"]).tolist() == [False, True, False]


def test_saved_and_loaded(tmp_path):
    s = GraftScores({"a": torch.randn(3, 4), "b": torch.randn(2).double()}, {"a": "x", "b": "y"})
    assert s.values["b"].dtype == torch.float32
    s.save(tmp_path / "s.safetensors")
    back = GraftScores.load(tmp_path / "s.safetensors")
    assert back.base == s.base and all(torch.equal(back.values[n], s.values[n]) for n in s.values)
    assert back.graft(0.5).base.keys() == back.graft(0.5).indices.keys()


def test_files_of_another_kind_and_damaged_ones(tmp_path):
    s = scores(a=[1.0, -1.0], b=[2.0])
    file = s.graft(0.5).save(tmp_path / "bits.safetensors")
    refused(
        GraftError, lambda: GraftScores.load(file),
        "bits.safetensors holds bits, expected scores; call Graft.load instead of GraftScores.load",
    )  # fmt: skip
    assert Graft.load(file).size == 1
    file = s.save(tmp_path / "s.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 64]))
    refused(IntegrityError, lambda: GraftScores.load(file), "its content has changed since it was saved")
    file.write_bytes(whole[: len(whole) // 2])
    refused(IntegrityError, lambda: GraftScores.load(file), "cannot be read as safetensors")
    files.write(file, files.SCORES, {"a": torch.tensor([math.nan])}, {"base": None})
    refused(IntegrityError, lambda: GraftScores.load(file), "its parts do not fit each other (a: 1 of 1 scores are NaN")
    files.write(file, files.SCORES, {"a": torch.tensor([1.0])}, {})
    refused(IntegrityError, lambda: GraftScores.load(file), "its parts do not fit each other ('base')")
    refused(GraftError, lambda: s.save(tmp_path / "s.npz"), "got .npz, expected a file that ends in .safetensors")


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: GraftScores({}), "scores of no tensors; which tensors take part?"),
        (
            lambda: scores(a=[1, 2]),
            "a: got int64, expected floating-point scores; Graft.from_masks makes a graft from bits",
        ),
        (lambda: scores(a=[1.0, math.inf]), "a: 1 of 2 scores are NaN or infinite, expected finite numbers"),
        (lambda: scores(a=[1.0, 2.0]).graft(0.5, 0.0), "got sparsity and threshold; pass one of them"),
        (lambda: scores(a=[1.0, 2.0]).graft(0.4), "sparsity: 0.4 of 2 elements selects none; use at least 1/2"),
        (lambda: scores(a=[1.0, 2.0]).graft(1.0), "sparsity: 1.0 of 2 elements selects all"),
        (
            lambda: scores(a=[1.0, 2.0]).graft(),
            "threshold: 0.0 selects all of 2 elements, whose scores go from 1 to 2;",
        ),
        (
            lambda: scores(a=[1.0, 2.0]).graft(threshold=2),
            "threshold: 2 selects none of 2 elements, whose scores go fr",
        ),
        (lambda: scores(a=[1.0]).graft(threshold=math.nan), "threshold: nan selects none of 1 elements"),
    ],
)
def test_what_is_no_graft(call, text):
    refused(GraftError, call, text)
