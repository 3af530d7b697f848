"""Grafts: what they hold, put into models and taken out again bit for bit, computed with, saved."""

from __future__ import annotations

import copy
import math

import graft_parts as parts
import pytest
import torch
from graft_parts import refused, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import hatcl
from hatcl.errors import ConfigError, GraftError, IntegrityError
from hatcl.functional import bits_of
from hatcl.grafts import Graft, inplace, overlaps, union
from hatcl.vectors.task_vector import TaskVector

KINDS = sorted(parts.MODELS)


# ---- by hand -----------------------------------------------------------------------------------------------------


def test_two_of_six_elements():
    pre = {"w": torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), "b": torch.tensor([7.0])}
    ft = {"w": torch.tensor([[1.5, 2.5, 3.5], [4.5, 5.5, 6.5]]), "b": torch.tensor([7.5])}
    on = {"w": torch.tensor([[False, True, False], [False, False, True]]), "b": torch.tensor([False])}
    g = Graft.from_masks(on, ft, pre)
    assert (g.size, g.numel, g.sparsity) == (2, 7, 2 / 7)
    assert g.indices.keys() == {"w"} and g.indices["w"].tolist() == [1, 5] and g.indices["w"].dtype == torch.int32
    assert g.values["w"].tolist() == [2.5, 6.5] and g.base.keys() == {"w"}
    assert {n: m.tolist() for n, m in g.masks().items()} == {n: m.tolist() for n, m in on.items()}
    new = g.apply_to(pre)
    assert new["w"].tolist() == [[1, 2.5, 3], [4, 5, 6.5]] and new["b"].tolist() == [7]
    assert pre["w"].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert repr(g) == "Graft(2 of 7 elements, 0.29, with values)"
    assert repr(g.bits()) == "Graft(2 of 7 elements, 0.29, bits alone)" and g.bits().fill(ft).values["w"].tolist() == [
        2.5,
        6.5,
    ]
    assert g.vector(pre)["w"].tolist() == [[0, 0.5, 0], [0, 0, 0.5]] and g.vector(pre)["b"].tolist() == [0]


def test_sets_by_hand():
    a, b = tiny([0, 1, 2], [10.0, 11.0, 12.0]), tiny([2, 3], [12.0, 13.0])
    assert (a & b).indices["w"].tolist() == [2] and (a & b).values["w"].tolist() == [12]
    assert (a | b).indices["w"].tolist() == [0, 1, 2, 3] and (a | b).values["w"].tolist() == [10, 11, 12, 13]
    assert (a - b).indices["w"].tolist() == [0, 1] and (a - b).values["w"].tolist() == [10, 11]
    assert (b - a).indices["w"].tolist() == [3] and not (a - a).indices and (a - a).size == 0
    assert a.overlap(b) == 0.5 and b.overlap(a) == 1 / 3
    assert overlaps([a, b]).tolist() == [[1, 0.5], [1 / 3, 1]]
    c = tiny([2, 5], [14.0, 15.0])
    assert union([a, c], "mean").values["w"].tolist() == [10, 11, 13, 15]
    assert union([a, c], "first").values["w"].tolist() == [10, 11, 12, 15]
    assert union([c, a], "first").values["w"].tolist() == [10, 11, 14, 15]
    assert union([a, b, c], "mean").values["w"].tolist() == [10, 11, pytest.approx(38 / 3), 13, 15]
    assert (a.bits() | c.bits()).indices["w"].tolist() == [0, 1, 2, 5] and (a.bits() | c.bits()).values is None
    assert len({id(g) for g in (a, b)}) == 2 and a != tiny([0, 1, 2], [10.0, 11.0, 12.0])  # by identity


@given(st.lists(st.sets(st.integers(0, 11)), min_size=2, max_size=4), st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_sets_are_as_those_of_their_elements(members, seed):
    numbers = torch.randn(12, generator=torch.Generator().manual_seed(seed))
    grafts = [tiny(sorted(s), shape=(3, 4)).fill({"w": numbers.view(3, 4)}) for s in members]
    a, b, x, y = *grafts[:2], *members[:2]

    def inside(g):
        at = g.indices.get("w", torch.zeros(0)).tolist()
        assert at == sorted(at) and (not at or torch.equal(g.values["w"], numbers[at]))
        return set(at)

    assert inside(a & b) == x & y and inside(a - b) == x - y
    for overlap in ("equal", "mean", "first"):
        assert inside(union(grafts, overlap)) == set().union(*members)
    if all(members):
        assert overlaps(grafts).tolist() == [[len(s & t) / len(t) for t in members] for s in members]


# ---- gamma 0 and 1 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_gamma_zero_is_the_pretrained_and_one_the_fine_tuned_bit_for_bit(kind):
    pre, ft = parts.pair(kind)
    before, goal = parts.bits(pre), parts.bits(ft)
    assert not parts.same(before, goal)
    for share, want in ((-1, before), (2, goal)):
        g = parts.graft(pre, ft, share)
        assert g.sparsity == (share > 0)
        assert parts.same(parts.bits(g.apply_to(pre)), want)
        assert parts.same(parts.bits(g.apply_to(pre.state_dict())), want)
        with g.applied(pre):
            assert parts.same(parts.bits(pre), want)
        assert parts.same(parts.bits(pre), before)
        assert parts.same(parts.bits(g.vector(pre).apply_to(pre)), want)


def test_twin_adding_the_difference_does_not_give_the_fine_tuned_model(monkeypatch):
    pre, ft = parts.pair("bert")
    g = parts.graft(pre, ft, 2)

    def added(self, name, t):
        at, values = self._part(name, t)
        start = inplace.take(t, at)
        inplace.put(t, at, start + (values - start))

    monkeypatch.setattr(Graft, "_put", added)
    assert not parts.same(parts.bits(g.apply_to(pre)), parts.bits(ft))


@pytest.mark.parametrize("kind", KINDS)
def test_each_element_is_one_models_or_the_others(kind):
    pre, ft = parts.pair(kind)
    on, g = parts.masks(pre, 0.4), parts.graft(pre, ft, 0.4)
    new = dict(g.apply_to(pre).named_parameters())
    ours, theirs = dict(pre.named_parameters()), dict(ft.named_parameters())
    for n, m in on.items():
        want = torch.where(m, parts.as_ints(theirs[n]), parts.as_ints(ours[n]))
        assert torch.equal(parts.as_ints(new[n]), want)
    assert parts.same(parts.bits(g.vector(pre).apply_to(pre)), parts.bits(g.apply_to(pre)))


# ---- in place, and out again -------------------------------------------------------------------------------------


def test_a_second_graft_is_checked_against_the_model_before_the_first():
    pre, ft = parts.pair("linear")
    a, b = parts.graft(pre, ft, 0.9, 1), parts.graft(pre, ft, 0.9, 2)
    a.apply_(pre)
    b.apply_(pre)  # the tensors have other digests now; what they were made for is below
    late = Graft.from_masks(parts.masks(pre, 0.9, 3), ft, pre)
    assert all(late.base[n] == b.base[n] for n in b.base)
    wanted = union([b, a], "first")
    assert parts.same(parts.bits(wanted.apply_to(pre)), parts.bits(pre))
    b.remove_(pre)
    a.remove_(pre)
    assert parts.same(parts.bits(wanted.apply_to(pre)), parts.bits(union([a, b]).apply_to(pre)))


def test_training_through_the_graft_sees_its_values():
    pre, ft = parts.pair("linear")
    x = torch.randn(5, 3)
    g = parts.graft(pre, ft, 2)
    with g.applied(pre):
        loss = pre(x).sum()
        assert torch.equal(loss, ft(x).sum())
        loss.backward()  # what backward keeps is not overwritten before it ran
    out = pre(x).sum()
    g.apply_(pre)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # nor silently after
        out.backward()
    g.remove_(pre)


# ---- tied, files, other sources ----------------------------------------------------------------------------------


def test_tied_parameters_once():
    pre, ft = parts.pair("tied")
    assert pre.lm_head.weight is pre.transformer.wte.weight
    g = parts.graft(pre, ft, 0.5)
    assert "lm_head.weight" not in g.shapes and "transformer.wte.weight" in g.indices
    new = g.apply_to(pre)
    assert new.lm_head.weight is new.transformer.wte.weight
    stored = g.apply_to(pre.state_dict())
    assert stored["lm_head.weight"] is stored["transformer.wte.weight"]
    assert parts.same(parts.bits(stored), parts.bits(new))
    # by the name that stands second
    on = g.masks()
    second = Graft.from_masks({"lm_head.weight": on["transformer.wte.weight"]}, ft, pre)
    assert torch.equal(second.apply_to(pre).transformer.wte.weight, new.transformer.wte.weight)
    with second.applied(pre):
        assert torch.equal(pre.lm_head.weight, new.lm_head.weight)
    both = {n: on["transformer.wte.weight"] for n in ("lm_head.weight", "transformer.wte.weight")}
    refused(
        GraftError, lambda: Graft.from_masks(both, ft),
        "lm_head.weight and transformer.wte.weight are one tensor in the fine-tuned model and two in the graft",
    )  # fmt: skip


def test_files_are_read_when_asked_for(tmp_path):
    pre, ft = parts.pair("linear")
    save_file(pre.state_dict(), tmp_path / "pre.safetensors")
    save_file(ft.state_dict(), tmp_path / "ft.safetensors")
    want = parts.graft(pre, ft)
    g = Graft.from_masks(want.masks(), tmp_path / "ft.safetensors", tmp_path / "pre.safetensors")
    assert g.base == want.base and all(torch.equal(g.values[n], want.values[n]) for n in want.values)
    new = g.apply_to(tmp_path / "pre.safetensors")
    assert parts.same(parts.bits({n: new[n] for n in new}), parts.bits(want.apply_to(pre)))
    other = g.apply_to(tmp_path / "ft.safetensors")
    refused(IntegrityError, lambda: other["0.weight"], "0.weight differs from the tensor that this graft was made for")
    assert parts.same(parts.bits(g.vector(tmp_path / "pre.safetensors").apply_to(pre)), parts.bits(g.apply_to(pre)))


def test_sums_of_vectors_are_sums_of_grafts():
    pre, ft = parts.pair("bert")
    _, other = parts.pair("bert", seed=0)
    a = parts.graft(pre, ft, 0.3, 1)
    b = parts.graft(pre, other, 0.3, 2) - a
    both = (a.vector(pre) + b.vector(pre)).apply_to(pre)
    want = (a | b).apply_to(pre)
    # a sum keeps no remainders: where a weight crossed zero its last bits are lost, measured 3.7e-9 of
    # numbers below 1, where half a float is 3e-8
    ours, theirs = both.state_dict(), want.state_dict()
    assert max(float((ours[n] - theirs[n]).abs().max()) for n in ours) < 6e-8
    assert isinstance(a.vector(pre), TaskVector) and dict(a.vector(pre).base) == dict(TaskVector.between(pre, ft).base)
    refused(IntegrityError, lambda: a.vector(ft), "differs from the tensor that this graft was made for")


def test_values_are_cast_to_a_model_in_another_precision():
    pre, ft = parts.pair("linear")
    g, half = parts.graft(pre, ft, 2), copy.deepcopy(pre).half()
    refused(IntegrityError, lambda: g.apply_to(half), "differs from the tensor that this graft was made for")
    assert parts.same(parts.bits(g.apply_to(half, check=False)), parts.bits(copy.deepcopy(ft).half()))
    before = parts.bits(half)
    with g.applied(half, check=False):
        pass
    assert parts.same(parts.bits(half), before)


# ---- saved -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("filled", [True, False])
@pytest.mark.parametrize("kind", ["bert", "float16", "turned"])
def test_saved_and_loaded(kind, filled, tmp_path):
    pre, ft = parts.pair(kind)
    g = parts.graft(pre, ft, 0.2) if filled else parts.graft(pre, ft, 0.2).bits()
    assert g.save(tmp_path / "a.safetensors") == tmp_path / "a.safetensors"
    back = Graft.load(tmp_path / "a.safetensors")
    assert back.shapes == g.shapes and back.base == g.base and back.indices.keys() == g.indices.keys()
    assert all(torch.equal(back.indices[n], g.indices[n]) for n in g.indices)
    if not filled:
        assert back.values is None
        return
    assert all(torch.equal(bits_of(back.values[n]), bits_of(g.values[n])) for n in g.values)
    assert parts.same(parts.bits(back.apply_to(pre)), parts.bits(g.apply_to(pre)))
    # two of the same content are the same file
    back.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_graft_of_nothing_is_saved_too(tmp_path):
    pre, ft = parts.pair("linear")
    parts.graft(pre, ft, -1).save(tmp_path / "a.safetensors")
    back = Graft.load(tmp_path / "a.safetensors")
    assert back.size == 0 and back.numel == 26 and parts.same(parts.bits(back.apply_to(pre)), parts.bits(pre))


def roberta_base():
    """The shapes of RoBERTa-base with its head, 124.6 M elements in 198 tensors."""
    wide = 4 * 768
    layer = dict.fromkeys(("self.query", "self.key", "self.value", "attention.output"), (768, 768))
    layer |= {"intermediate.dense": (wide, 768), "output.dense": (768, wide)}
    shapes = {"embeddings.word": (50265, 768), "embeddings.position": (514, 768), "embeddings.type": (1, 768)}
    for i in range(12):
        for name, shape in layer.items():
            shapes |= {
                f"roberta.encoder.layer.{i}.{name}.weight": shape,
                f"roberta.encoder.layer.{i}.{name}.bias": shape[:1],
            }
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= {f"roberta.encoder.layer.{i}.{name}.{w}": (768,) for w in ("weight", "bias")}
    return shapes | {"head.dense.weight": (768, 768), "head.dense.bias": (768,), "head.out": (2, 768)}


def test_a_graft_of_a_ten_thousandth_of_125_million_is_a_file_under_1_mb(tmp_path):
    shapes = roberta_base()
    total = sum(math.prod(s) for s in shapes.values())
    assert 120e6 < total < 130e6
    starts = torch.tensor([0, *torch.tensor([math.prod(s) for s in shapes.values()]).cumsum(0).tolist()])
    every = torch.randint(total, (13_000,), generator=torch.Generator().manual_seed(0)).unique()
    every = (
        every[torch.randperm(len(every), generator=torch.Generator().manual_seed(0))][: int(1e-4 * total)].sort().values
    )
    indices = {n: every[(every >= a) & (every < b)] - a for n, a, b in zip(shapes, starts, starts[1:], strict=False)}
    values = {n: torch.randn(len(at)) for n, at in indices.items()}
    base = dict.fromkeys(shapes, "float32:" + "0" * 64)
    g = Graft(shapes, indices, values, base)
    assert g.size == int(1e-4 * total) and g.numel == total
    size = g.save(tmp_path / "graft.safetensors").stat().st_size
    assert size < 1e6  # measured 141 kB: 8 bytes an element, and 42 kB of names, shapes and digests
    assert g.bits().save(tmp_path / "bits.safetensors").stat().st_size < size
    # the twin, one byte per element, would be 125 MB
    masks = sum(torch.zeros(s, dtype=torch.bool, device="meta").nbytes for s in shapes.values())
    assert masks > 100 * size
    assert Graft.load(tmp_path / "graft.safetensors").size == g.size


# ---- refused -----------------------------------------------------------------------------------------------------


def test_a_graft_for_another_model():
    pre, ft = parts.pair("linear")
    g = parts.graft(pre, ft)
    other = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    before = parts.bits(other)
    for call in (
        lambda: g.apply_to(other), lambda: g.apply_(other), lambda: g.apply_to(other.state_dict()),
        lambda: g.fill(other), lambda: g.vector(other), lambda: Graft.from_masks(g.masks(), pretrained=other),
    ):  # fmt: skip
        refused(
            GraftError,
            call,
            "3 of the 4 tensors do not fit: 0.weight is [4, 3]",
            "model has [5, 3]",
            "the same architecture?",
        )
    assert parts.same(parts.bits(other), before)
    refused(GraftError, lambda: g.apply_to(parts.bert()), "0.weight is [4, 3], the model has no such tensor")
    whole = {n: p.to(torch.int8) for n, p in pre.state_dict().items()}
    refused(GraftError, lambda: g.apply_to(whole), "0.weight is int8 in the model, expected float16 or wider")
    refused(
        GraftError, lambda: g.apply_(pre.state_dict()), "apply_: got OrderedDict, expected a module; apply_to gives new"
    )
    refused(GraftError, lambda: g.remove_(pre.state_dict()), "remove_: got OrderedDict, expected a module")


@pytest.mark.parametrize("how", ["apply_to", "apply_", "state dict"])
def test_another_base(how):
    pre, ft = parts.pair("linear")
    g, other = parts.graft(pre, ft, 0.9), parts.pair("linear", seed=1)[0]
    before = parts.bits(other)
    call = {
        "apply_to": lambda **k: g.apply_to(other, **k), "apply_": lambda **k: g.apply_(other, **k),
        "state dict": lambda **k: g.apply_to(other.state_dict(), **k),
    }[how]  # fmt: skip
    refused(
        IntegrityError, call,
        "0.weight differs from the tensor that this graft was made for; apply it to its own pretrained model",
    )  # fmt: skip
    assert parts.same(parts.bits(other), before)
    call(check=False)


def test_only_tensors_that_are_changed_are_compared():
    pre, ft = parts.pair("linear")
    g = Graft.from_masks({**parts.masks(pre, -1), "0.weight": torch.ones(4, 3, dtype=torch.bool)}, ft, pre)
    with torch.no_grad():
        pre[2].weight.mul_(3)
    assert torch.equal(g.apply_to(pre)[0].weight, ft[0].weight)


def test_bits_alone_cannot_be_applied():
    pre, ft = parts.pair("linear")
    g = parts.graft(pre, ft).bits()
    for call in (lambda: g.apply_to(pre), lambda: g.apply_(pre), lambda: g.vector(pre)):
        refused(GraftError, call, "this graft holds only bits and no values to apply; graft.fill(finetuned) takes them")


def test_grafts_that_do_not_fit_each_other():
    a, b = tiny([0, 1], [1.0, 2.0]), tiny([1, 2], [3.0, 4.0])
    for call in (lambda: a | b, lambda: union([a, b])):
        refused(
            GraftError,
            call,
            "w: 1 elements have different values in the grafts; union(grafts, overlap='mean') or 'first'",
        )
    refused(ConfigError, lambda: union([a, b], "median"), "overlap: got 'median', expected one of equal, mean, first")
    refused(GraftError, lambda: union([]), "union: got no grafts")
    refused(GraftError, lambda: a | b.bits(), "some grafts hold values, others only bits; fill these (graft.fill)")
    refused(
        GraftError, lambda: a | tiny([1], [2.0], (3, 2)), "w is [2, 3] in the first graft, [3, 2] in another; make both"
    )
    for call in (
        lambda: a & tiny([1], None, (6,)),
        lambda: a - tiny([1], None, (6,)),
        lambda: a.overlap(tiny([1], None, (6,))),
    ):
        refused(GraftError, call, "w is [2, 3] in the first graft, [6] in the other")
    more = Graft({"w": (2, 3), "b": (2,)}, {"w": torch.tensor([0])})
    refused(GraftError, lambda: a & more, "b is lacking in the first graft, [2] in the other")
    refused(GraftError, lambda: a.overlap(tiny([])), "the other graft has no element, so no share of it can be in this")
    refused(GraftError, lambda: overlaps([a, tiny([])]), "has no element")
    half = Graft(a.shapes, a.indices, {"w": torch.tensor([1.0, 2.0]).half()})
    refused(GraftError, lambda: a | half, "w is float32 in one graft, float16 in another; fill both in the same dtype")
    x, y = tiny([0], [1.0], base={"w": "one"}), tiny([1], [1.0], base={"w": "two"})
    refused(GraftError, lambda: x | y, "w: the grafts were made for different bases; all must start from one model")
    assert (x | tiny([1], [1.0])).base is None and (x | x).base == {"w": "one"}
    with pytest.raises(TypeError):
        a | 3


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: Graft({}, {}), "the graft has no tensors; which tensors took part?"),
        (lambda: Graft({"a": (2,)}, {"b": torch.tensor([0])}), "b has indices, but is not among the 1 tensors"),
        (lambda: tiny([[0]]), "w: got indices of int32 [1, 1], expected integers [k]"),
        (lambda: Graft({"w": (2,)}, {"w": torch.tensor([0.0])}), "w: got indices of float32 [1], expected int"),
        (lambda: tiny([1, 1]), "w: expected ascending indices from 0 to 5, got [1, 1] ..."),
        (lambda: tiny([2, 1]), "expected ascending indices"),
        (lambda: tiny([-1, 1]), "expected ascending indices"),
        (lambda: tiny([1, 6]), "expected ascending indices from 0 to 5"),
        (lambda: tiny([1], [1.0, 2.0]), "w: got values float32 [2], expected one number, float16 or wider, for ea"),
        (lambda: tiny([1], [1]), "w: got values int64 [1], expected one number"),
        (lambda: Graft({"w": (2,)}, {"w": torch.tensor([0])}, {}), "w: got values none, expected one number"),
        (lambda: tiny([1], None, base={}), "w: no digest of the pretrained model's tensor; pass all, or base=None"),
        (lambda: Graft.from_masks({"w": torch.ones(2)}), "w: got a mask of float32, expected bool; turn scores into"),
    ],
)  # fmt: skip
def test_what_is_no_graft(call, text):
    refused(GraftError, call, text)


def test_sizes_and_dtypes_of_indices():
    wide = Graft({"w": (2**16, 2**16)}, {"w": torch.tensor([2**32 - 1])})
    assert wide.indices["w"].dtype == torch.int64 and wide.numel == 2**32
    assert hatcl.Graft is Graft and issubclass(hatcl.GraftError, ValueError)
