"""Task vectors: exact at both ends, from every kind of source, with arithmetic that keeps to its laws."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from vector_parts import Tied, moved, same, save

import hatcl
from hatcl.errors import IntegrityError, VectorError
from hatcl.functional import digest_of
from hatcl.vectors import task_vector
from hatcl.vectors.delta import Delta
from hatcl.vectors.stream import compose_files
from hatcl.vectors.task_vector import TaskVector, composed
from hatcl.vectors.tensors import Lazy, named_tensors


def vector(*values, **options):
    return TaskVector({"a": torch.tensor([float(x) for x in values])}, **options)


def sources(model, folder):
    """The same tensors from everywhere."""
    folder.mkdir()
    return {
        "module": model,
        "state dict": model.state_dict(),
        "file": save(model, folder / "one.safetensors"),
        "shards": shards(model, folder / "shards"),
    }


def shards(model, folder):
    from hatcl.vectors.files import write_tensors
    from hatcl.vectors.tensors import kinds_of, named_tensors

    every = named_tensors(model.state_dict())
    return write_tensors(folder, kinds_of(every), lambda n: {n: every[n]}, shard_bytes=60)


def outputs(model):
    with torch.no_grad():
        return model.eval()(torch.arange(5))


# --- between and apply_to ---


@pytest.mark.parametrize("start", ["module", "state dict", "file", "shards"])
@pytest.mark.parametrize("end", ["module", "state dict", "file", "shards"])
def test_between_all_kinds_of_sources_gives_the_same_vector(pair, tmp_path, start, end):
    base, finetuned = pair
    expected = TaskVector.between(base, finetuned)
    got = TaskVector.between(sources(base, tmp_path / "a")[start], sources(finetuned, tmp_path / "b")[end])
    extra = set() if "module" in (start, end) else {"rate"}  # a buffer, which only modules tell from parameters
    assert set(got) == set(expected) | extra
    assert all(torch.equal(got[n], expected[n]) for n in expected)
    assert got.base["fc.bias"] == digest_of(base.fc.bias)


@pytest.mark.parametrize("buffers", [False, True])
def test_one_is_the_fine_tuned_model_and_zero_the_base(pair, tmp_path, buffers):
    base, finetuned = pair
    before = copy.deepcopy(base.state_dict())
    v = TaskVector.between(base, finetuned, buffers=buffers)
    one, zero = v.apply_to(base), v.apply_to(base, 0)
    assert same(zero.state_dict(), before) and same(base.state_dict(), before)
    assert one is not base and one.head.weight is one.embed.weight
    differ = {n for n, t in one.state_dict().items() if not torch.equal(t, finetuned.state_dict()[n])}
    assert differ == (set() if buffers else {"norm.running_mean", "norm.running_var", "rate"})
    if buffers:
        assert torch.equal(outputs(one), outputs(finetuned))


def test_apply_to_a_state_dict_and_to_files(pair, tmp_path, reads):
    base, finetuned = pair
    v = TaskVector.between(base, finetuned, buffers=True)
    state = v.apply_to(base.state_dict())
    assert same(state, finetuned.state_dict()) and state["head.weight"] is state["embed.weight"]
    Tied().load_state_dict(state)
    for path in (save(base, tmp_path / "a.safetensors"), shards(base, tmp_path / "shards")):
        lazily = v.apply_to(path)
        assert isinstance(lazily, Lazy) and reads == []
        assert all(torch.equal(lazily[n], finetuned.state_dict()[n]) for n in lazily)
        assert len(lazily) == 9 and reads
        reads.clear()


def test_scale_is_the_way(pair):
    base, finetuned = pair
    half = TaskVector.between(base, finetuned).apply_to(base, 0.5)
    # (a + b) / 2 against a + (b - a) / 2: each rounds to float32 once or twice, so they may differ by one ulp
    want = (base.fc.weight + finetuned.fc.weight) / 2
    assert (half.fc.weight - want).abs().max() <= 2**-23 * want.abs().max()
    back = TaskVector.between(finetuned, base).apply_to(finetuned)
    assert torch.equal(back.fc.weight, base.fc.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_unrelated_models_of_real_architectures(dtype):
    make = lambda seed: (torch.manual_seed(seed), timm.create_model("test_vit", num_classes=3))[1].to(dtype)  # noqa: E731
    base, other = make(0), make(1)
    v = TaskVector.between(base, other)
    if dtype is torch.float32:
        assert any(v.delta(n).at is not None for n in v)  # the remainders are needed here
    assert same(v.apply_to(base).state_dict(), other.state_dict())
    assert same(v.apply_to(base, 0).state_dict(), base.state_dict())


def test_twin_without_remainders_one_is_not_the_fine_tuned_model():
    make = lambda seed: (torch.manual_seed(seed), timm.create_model("test_vit", num_classes=3))[1]  # noqa: E731
    base, other = make(0), make(1)
    v = TaskVector.between(base, other)
    bare = TaskVector({n: v[n] for n in v}, v.base)
    assert not same(bare.apply_to(base).state_dict(), other.state_dict())


def test_a_tied_model_and_a_file_that_names_the_other_tensor(pair, tmp_path):
    base, finetuned = pair
    state = {n: t.clone() for n, t in finetuned.state_dict().items()}
    expected = TaskVector.between(base, finetuned)
    assert list(expected) == list(dict(base.named_parameters()))
    save_file(state, tmp_path / "both.safetensors")
    save_file({n: t for n, t in state.items() if n != "embed.weight"}, tmp_path / "head.safetensors")
    for file in ("both", "head"):
        assert same(TaskVector.between(base, tmp_path / f"{file}.safetensors").in_memory(), expected)
        back = TaskVector.between(tmp_path / f"{file}.safetensors", base).in_memory()
        assert {n: t.sum() for n, t in back.items()}.keys() == set(expected)
    state["head.weight"] += 1
    save_file(state, tmp_path / "untied.safetensors")
    for source in (tmp_path / "untied.safetensors", state):
        with pytest.raises(
            VectorError, match="embed.weight and head.weight are one tensor in one of the models and differ"
        ):
            TaskVector.between(base, source).in_memory()


def test_a_vector_may_have_another_name_of_a_tied_tensor(pair, tmp_path):
    """As one that was taken from files which hold the head."""
    base, finetuned = pair
    want = TaskVector.between(base, finetuned)
    head = {"head.weight" if n == "embed.weight" else n: want.delta(n) for n in want}
    base_of = {"head.weight" if n == "embed.weight" else n: d for n, d in want.base.items()}
    by_head = TaskVector(head, base_of)
    both = TaskVector({**head, "embed.weight": want.delta("embed.weight")}, {**base_of, **want.base})
    for v in (by_head, both, TaskVector.load(by_head.save(tmp_path / "v.safetensors"))):
        for target in (base, base.state_dict()):
            got = v.apply_to(target)
            got = got if isinstance(got, dict) else got.state_dict()
            assert all(torch.equal(got[n], p) for n, p in finetuned.named_parameters())
            assert torch.equal(got["head.weight"], got["embed.weight"])
        added = composed(base, [(0.5, v), (0.5, want)])
        assert all(torch.equal(added[n], p) for n, p in (0.5 * want + 0.5 * want).apply_to(base).named_parameters())
        half = (0.5 * v).apply_to(base)
        assert torch.equal(half.embed.weight, (0.5 * want).apply_to(base).embed.weight)
    differ = TaskVector({"head.weight": torch.ones(7, 4), "embed.weight": torch.zeros(7, 4)})
    refused(
        VectorError, lambda: differ.apply_to(base),
        "head.weight and embed.weight are one tensor in the model and differ in the vector",
    )  # fmt: skip
    refused(
        IntegrityError, lambda: by_head.apply_to(moved(base, seed=9)), "embed.weight differs from this vector's base"
    )


def test_transformers_files_leave_tied_heads_out(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    base = transformers.GPT2LMHeadModel(config)
    finetuned = moved(base)
    finetuned.save_pretrained(tmp_path)
    v = TaskVector.between(base, tmp_path)
    assert "lm_head.weight" not in v and "transformer.wte.weight" in v
    merged = v.apply_to(base)
    assert same(merged.state_dict(), finetuned.state_dict()) and merged.lm_head.weight is merged.transformer.wte.weight


def test_layouts_are_kept(pair):
    base = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    finetuned = moved(base, size=1e6)
    out = TaskVector.between(base, finetuned).apply_to(base)
    assert torch.equal(out.weight, finetuned.weight) and out.weight.stride() == base.weight.stride()


# --- what does not fit ---


def refused(error, call, *texts):
    with pytest.raises(error) as caught:
        call()
    for text in texts:
        assert text in str(caught.value), str(caught.value)


def test_another_architecture_or_vocabulary(pair):
    base, finetuned = pair
    wider = {n: t for n, t in finetuned.state_dict().items() if n != "head.weight"}
    wider["embed.weight"] = torch.zeros(9, 4)
    refused(
        VectorError, lambda: TaskVector.between(base, wider),
        "embed.weight is [7, 4] in the pretrained model, [9, 4] in the fine-tuned one: the vocabulary has 7 entries in",
        "model.resize_token_embeddings(9)), or compare the rows that both have by embeddings='common'",
    )  # fmt: skip
    refused(
        VectorError,
        lambda: TaskVector.between(base, nn.Linear(2, 2)),
        "differ in 7 tensors",
        "embed.weight only in the pretrained",
        "have the same architecture and vocabulary? Leave out tensors that only one of them has with skip=",
    )
    lacks = {n: t for n, t in finetuned.state_dict().items() if n != "fc.bias"}
    refused(VectorError, lambda: TaskVector.between(base, lacks), "fc.bias only in the pretrained model")
    extra = {**finetuned.state_dict(), "new": torch.zeros(1)}
    refused(VectorError, lambda: TaskVector.between(base, extra), "new only in the fine-tuned one")


def test_no_floating_point(pair):
    ints = {"a": torch.arange(3)}
    refused(
        VectorError,
        lambda: TaskVector.between(ints, ints),
        "no floating-point parameters, only integers or none at all",
    )
    refused(
        VectorError, lambda: TaskVector.between({}, {}), "no floating-point parameters, only integers or none at all"
    )
    refused(VectorError, lambda: TaskVector({}), "a task vector of no tensors; are there floating-point parameters")
    refused(VectorError, lambda: TaskVector({"a": torch.arange(3)}), "a: got torch.int64, expected floating point")
    small = torch.ones(3).to(torch.float8_e4m3fn)
    refused(
        VectorError, lambda: TaskVector({"a": small}), "float8_e4m3fn, whose numbers have no meaning without a scale"
    )
    refused(VectorError, lambda: TaskVector.between(None, pair[0]), "pretrained=None is for peft adapters only")


def test_integers_are_no_part_and_a_difference_in_integers_only_is_refused():
    base = {"w": torch.zeros(2), "q": torch.tensor([1, 2], dtype=torch.int8), "bn.num_batches_tracked": torch.tensor(1)}
    v = TaskVector.between(base, {**base, "w": torch.ones(2), "q": base["q"] + 1})
    assert list(v) == ["w"] and torch.equal(v.apply_to(base)["q"], base["q"])
    refused(
        VectorError, lambda: TaskVector.between(base, {**base, "q": base["q"] + 1}),
        "the two models differ in integers only, such as q (torch.int8, [2])", "dequantise both first",
    )  # fmt: skip
    assert TaskVector.between(base, {**base, "bn.num_batches_tracked": torch.tensor(9)}).norm() == 0  # a counter


def test_nan_and_infinity_are_refused_by_name(tmp_path):
    for bad in (math.nan, math.inf):
        refused(
            VectorError,
            lambda bad=bad: vector(1, bad, bad),
            "a: 2 of 3 elements are NaN or infinite; is a checkpoint damaged",
        )
    save_file({"a": torch.zeros(3)}, tmp_path / "a.safetensors")
    save_file({"a": torch.tensor([0.0, math.nan, 0.0])}, tmp_path / "b.safetensors")
    lazily = TaskVector.between(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    refused(VectorError, lambda: lazily["a"], "a: 1 of 3 elements are NaN")
    refused(VectorError, lambda: lazily.save(tmp_path / "out"), "a: 1 of 3 elements are NaN")
    refused(VectorError, lambda: (vector(3e38) * 10).in_memory(), "or a coefficient too large?")
    refused(
        VectorError,
        lambda: TaskVector.between({"a": torch.tensor([3e38])}, {"a": torch.tensor([-3e38])}),
        "a: 1 of 1 elements",
    )


def test_apply_to_a_model_that_lacks_tensors(pair):
    v = TaskVector.between(*pair)
    refused(
        VectorError, lambda: v.apply_to(nn.Linear(2, 2)), "5 tensors of the vector do not fit",
        "embed.weight is [7, 4], the model has no such tensor", "Apply it to the model it was taken from",
    )  # fmt: skip
    other = {**pair[0].state_dict(), "fc.bias": torch.zeros(3)}
    refused(VectorError, lambda: v.apply_to(other), "fc.bias is [4], the model has [3]")


def test_another_base_is_refused_unless_told(pair, tmp_path):
    base, finetuned = pair
    v = TaskVector.between(base, finetuned)
    other = moved(base, seed=9)
    for target in (other, other.state_dict()):
        refused(
            IntegrityError, lambda target=target: v.apply_to(target),
            "embed.weight differs from this vector's base; apply it to its own base, or pass check=False",
        )  # fmt: skip
    file = save(other, tmp_path / "other.safetensors")
    refused(IntegrityError, lambda: dict(v.apply_to(file)), "differs from this vector's base")
    got = v.apply_to(other, check=False)
    assert torch.allclose(got.fc.weight, other.fc.weight + v["fc.weight"])
    loaded = TaskVector.load(v.save(tmp_path / "v"))
    refused(IntegrityError, lambda: loaded.apply_to(other), "differs from this vector's base")
    assert same(loaded.apply_to(base).state_dict(), v.apply_to(base).state_dict())
    refused(
        IntegrityError, lambda: v.apply_to(copy.deepcopy(base).half()), "differs from this"
    )  # a cast is another base


def test_twin_without_the_digest_another_base_is_taken(pair):
    base, finetuned = pair
    v = TaskVector.between(base, finetuned)
    TaskVector(dict(v), base=None).apply_to(moved(base, seed=9))


def test_vectors_of_different_bases_do_not_add_up(pair, tmp_path):
    base, finetuned = pair
    other = moved(base, seed=9)
    text = "embed.weight: the vectors were taken from different bases; both must start from one model"
    v, w = TaskVector.between(base, finetuned), TaskVector.between(other, finetuned)
    for call in (lambda: v + w, lambda: v - w, lambda: v.map(lambda _, a, b: a, w)):
        refused(VectorError, call, text)
    files = [save(m, tmp_path / f"{i}.safetensors") for i, m in enumerate((base, other, finetuned))]
    lazily = TaskVector.between(files[0], files[2]) + TaskVector.between(files[1], files[2])
    for call in (lazily.in_memory, lambda: dict(lazily.apply_to(files[0])), lambda: lazily.save(tmp_path / "sum")):
        refused(VectorError, call, "the vectors were taken from different bases")
    assert not (tmp_path / "sum").exists()
    refused(VectorError, lambda: v + vector(1), "vector 0 lacks 1 tensors that vector 1 has: a")
    assert (v + TaskVector(dict(w))).base == v.base  # a vector without digests has nothing to compare


# --- arithmetic ---

NUMBERS = st.floats(-1e3, 1e3, width=32)
SCALES = st.floats(-100, 100, width=32)


@st.composite
def vectors(draw, count):
    size = draw(st.integers(1, 5))
    return [
        TaskVector({n: torch.tensor(draw(st.lists(NUMBERS, min_size=size, max_size=size))) for n in ("a", "b")})
        for _ in range(count)
    ]


@given(vectors(2), SCALES)
@settings(max_examples=50, deadline=None)
def test_laws(pair, c):
    v, w = pair
    assert same(v + w, w + v)
    assert same(v - w, v + (-w)) and same((-v) * -1, v) and same(-v, -1 * v)
    assert same(v * c, c * v) and same(v * 1, v) and (v * 0).norm() == 0 and (v - v).norm() == 0
    assert same(sum([v, w]), v + w) and same(v / 1, v) and same(2 * v, v + v) and same(v / 2, v * 0.5)
    assert all(torch.equal((v + w)[n], v[n] + w[n]) for n in v)
    assert all(torch.equal((c * v)[n], v[n] * c) for n in v)
    assert v.dot(w) == w.dot(v)


@given(vectors(2))
@settings(max_examples=50, deadline=None)
def test_dot_norm_and_cosine_as_torch_in_float64(pair):
    v, w = pair
    a, b = (torch.cat([x["a"], x["b"]]).double() for x in (v, w))
    # sums of at most ten float64 in another order; measured 0 to 3e-16 of the sum of magnitudes
    assert v.dot(w) == pytest.approx(float(a @ b), rel=1e-12, abs=1e-12 * float(a.abs() @ b.abs()))
    assert v.norm() == pytest.approx(float(a.norm()), rel=1e-12)
    if v.norm() and w.norm():
        want = float(torch.nn.functional.cosine_similarity(a, b, dim=0, eps=0))
        assert v.cosine(w) == pytest.approx(want, abs=1e-12)
    else:
        assert v.cosine(w) == 0
    assert list(v.cosine(w, per_block=True)) == ["a", "b"]


def test_measures_by_hand():
    v, w = (TaskVector({"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([x])}) for x in (0.0, 12.0))
    assert (v.norm(), w.norm(), v.dot(w)) == (5, 13, 25)
    assert v.cosine(w) == 25 / 65 and v.cosine(w, per_block=True) == {"a": 1.0, "b": 0.0}
    large = vector(*[1e25] * 4)
    assert large.norm() == pytest.approx(2e25)  # squares beyond float32
    refused(VectorError, lambda: v.dot(vector(1, 2)), "vector 1 lacks 1 tensors that vector 0 has: b")


def test_scales_of_other_libraries():
    v = vector(1, 2)
    for two in (
        2,
        2.0,
        np.float32(2),
        np.float64(2),
        np.int64(2),
        torch.tensor(2.0),
        nn.Parameter(torch.tensor([2.0])),
    ):
        for got in (v * two, two * v, v / (1 / two)):
            assert got["a"].tolist() == [2.0, 4.0] and not got["a"].requires_grad
    for bad in (True, "2", torch.ones(2), None, v):
        with pytest.raises(TypeError):
            v * bad
        with pytest.raises(TypeError):
            v / bad
    with pytest.raises(TypeError):
        v + 1
    for bad in (math.nan, math.inf):
        for call in (lambda bad=bad: v * bad, lambda bad=bad: v.apply_to({"a": torch.zeros(2)}, bad)):
            refused(VectorError, call, f"scale: got {bad}, expected a finite number")
    refused(VectorError, lambda: v / 0, "scale: got a division by 0, expected another number")


def test_remainders_stay_where_the_difference_stays():
    base = {"a": torch.tensor([1.0, 1.0])}
    finetuned = {"a": torch.tensor([2.0**-30, -0.0])}
    v = TaskVector.between(base, finetuned)
    kept = [v, v * 1, v / 1, sum([v]), v.in_memory(), v.to("cpu"), v.to(torch.float32), v.topk(1.0), v.mask({})]
    kept += [v.mask({"a": torch.tensor(True)}), v.topk(1.0, per_block=True)]
    for w in kept:
        got = w.apply_to(base)["a"]
        assert torch.equal(got, finetuned["a"]) and got[1].signbit()


def test_mask():
    v = TaskVector({"a": torch.ones(2, 3), "b": torch.ones(2)})
    got = v.mask({"a": torch.tensor([[1], [0]])})
    assert got["a"].tolist() == [[1, 1, 1], [0, 0, 0]] and got["b"].tolist() == [1, 1]
    refused(VectorError, lambda: v.mask({"c": torch.ones(1)}), "c: mask of shape [1], the vector has no such tensor")
    refused(
        VectorError, lambda: v.mask({"b": torch.ones(3)}), "b: mask of shape [3], expected one that broadcasts to [2]"
    )
    refused(
        VectorError, lambda: v.mask({"b": torch.ones(2, 2)}), "b: mask of shape [2, 2], expected one that broadcasts"
    )


@given(vectors(1), st.floats(0, 1), st.booleans())
@settings(max_examples=50, deadline=None)
def test_topk_keeps_exactly_k(one, keep, per_block):
    (v,) = one
    got = v.topk(keep, per_block=per_block)
    parts = [[n] for n in v] if per_block else [list(v)]
    for names in parts:
        flat, left = (torch.cat([x[n] for n in names]) for x in (v, got))
        k = int(keep * flat.numel())
        assert torch.equal(left.abs().sort(descending=True).values[:k], flat.abs().topk(k).values)
        assert int((left != 0).sum()) <= k and torch.equal(left[left != 0], flat[left != 0])


def test_topk_by_hand():
    v = TaskVector({"a": torch.tensor([1.0, -3.0, 1.0]), "b": torch.tensor([2.0, 1.0])})
    assert {n: t.tolist() for n, t in v.topk(0.6).items()} == {"a": [1, -3, 0], "b": [2, 0]}
    assert {n: t.tolist() for n, t in v.topk(0.5, per_block=True).items()} == {"a": [0, -3, 0], "b": [2, 0]}
    assert v.topk(0).norm() == 0 and same(v.topk(1), v)
    for bad in (-0.1, 1.1, math.nan):
        refused(VectorError, lambda bad=bad: v.topk(bad), f"keep: got {bad}, expected a share between 0 and 1")


def test_cast(pair, tmp_path):
    base, finetuned = pair
    v = TaskVector.between(base, finetuned)
    half = v.to(torch.bfloat16)
    assert all(half[n].dtype == torch.bfloat16 and torch.equal(half[n], v[n].bfloat16()) for n in v)
    assert v.to(torch.float32) is v and (half + half)["fc.bias"].dtype == torch.float32
    lazily = TaskVector.between(*(save(m, tmp_path / f"{i}.safetensors") for i, m in enumerate(pair))).to(torch.float16)
    assert {k.dtype for k in lazily.kinds.values()} == {torch.float16} == {t.dtype for t in lazily.values()}


def test_map_and_what_a_vector_is():
    v = vector(1, 2)
    assert list(v) == ["a"] and len(v) == 1 and v.numel == 2 and "a" in v and v == v and v != vector(1, 2)
    assert repr(v) == "TaskVector(1 tensors, 2 elements, in memory)" and hash(v) == hash(v)
    assert v.map(lambda name, a, b: a * b if name == "a" else a, vector(3, 4))["a"].tolist() == [3, 8]
    with pytest.raises(KeyError):
        v["b"]
    assert isinstance(v.delta("a"), Delta) and hatcl.TaskVector is TaskVector


def test_partial_vectors_count_what_they_lack_as_zeros():
    v = TaskVector({"a": torch.ones(2)}, {"a": "x"}, partial=True)
    w = TaskVector({"a": torch.ones(2), "b": torch.ones(1)}, {"a": "x", "b": "y"}, partial=True)
    got = v - w
    assert {n: t.tolist() for n, t in got.items()} == {"a": [0, 0], "b": [-1]} and got.partial
    assert dict(got.base) == {"a": "x", "b": "y"} and v.dot(w) == 2 and v.cosine(w) == pytest.approx(2 / math.sqrt(6))
    other = TaskVector({"a": torch.ones(2)}, {"a": "z"}, partial=True)
    refused(VectorError, lambda: v + other, "a: the vectors were taken from different bases")
    wide = TaskVector({"a": torch.ones(3)}, partial=True)
    refused(VectorError, lambda: v + wide, "a is [2] in vector 0, [3] in vector 1")


# --- files ---


def test_read_from_files_equals_in_memory(pair, tmp_path, reads):
    base, finetuned = pair
    third = moved(base, seed=5, size=10.0)
    folders = [shards(m, tmp_path / str(i)) for i, m in enumerate((base, finetuned, third))]
    states = [m.state_dict() for m in (base, finetuned, third)]

    def result(a, b, c):
        v, w = TaskVector.between(a, b), TaskVector.between(a, c)
        u = (
            0.3 * v
            - w / 2
            + (v * 2).mask({"fc.bias": torch.tensor(0)})
            + w.to(torch.float16).map(lambda _, x: x.float())
        )
        return v, u

    (v, u), (v_, u_) = result(*folders), result(*states)
    assert repr(u) == f"TaskVector(6 tensors, {u_.numel} elements, in files)"
    assert {n: k for n, k in u.kinds.items()} == {n: (tuple(t.shape), t.dtype) for n, t in u_.items()}
    applied = v.apply_to(folders[0])
    assert reads == []  # nothing was asked for yet
    assert same(u, u_) and same(u.in_memory(), u_) and same(u.topk(0.3), u_.topk(0.3))
    assert dict(u.base) == dict(u_.base)
    for n in applied:
        assert torch.equal(applied[n], v_.apply_to(states[0])[n])
    reads.clear()
    _ = u["fc.bias"]
    assert set(reads) == {"fc.bias"}
    _ = u.in_memory().norm()
    reads.clear()
    _ = u_["fc.bias"]
    assert reads == []


def test_twin_a_vector_that_reads_at_once_is_seen(pair, tmp_path, reads):
    folders = [shards(m, tmp_path / str(i)) for i, m in enumerate(pair)]
    TaskVector.between(*folders).in_memory()
    assert len(reads) >= 12


def test_asking_for_a_name_reads_nothing(pair, tmp_path, reads):
    v = TaskVector.between(*(shards(m, tmp_path / str(i)) for i, m in enumerate(pair)))
    assert "fc.bias" in v and "no" not in v and "fc.bias" in v._deltas and list(v) and reads == []


def test_bases_in_memory_and_in_files_are_compared(pair, tmp_path):
    base, finetuned = pair
    files = [shards(m, tmp_path / str(i)) for i, m in enumerate(pair)]
    v, w = TaskVector.between(base.state_dict(), finetuned.state_dict()), TaskVector.between(*files)
    for both in (v + w, w + v):
        assert dict(both.base) == v.base and isinstance(both.base, Lazy)
        assert torch.equal(both["fc.bias"], 2 * v["fc.bias"])
    other = TaskVector.between(moved(base, seed=9).state_dict(), finetuned.state_dict())
    refused(VectorError, lambda: (other + w).in_memory(), "the vectors were taken from different bases")


@pytest.mark.parametrize("target", ["v.safetensors", "folder"])
def test_save_and_load(pair, tmp_path, target):
    base, _ = pair
    torch.manual_seed(7)
    finetuned = Tied()  # unrelated, so that there are remainders
    v = TaskVector.between(base, finetuned)
    assert any(v.delta(n).at is not None for n in v)
    settled = []
    path = v.save(tmp_path / target, shard_bytes=100, progress=settled.append)
    assert path == tmp_path / target and sum(settled) == 4 * v.numel
    loaded = TaskVector.load(path)
    assert same(loaded, v) and loaded.base == v.base and not loaded.partial and "in files" in repr(loaded)
    assert all(torch.equal(loaded.apply_to(base).state_dict()[n], finetuned.state_dict()[n]) for n in v)
    assert v.save(tmp_path / "twice.safetensors").read_bytes() == v.save(tmp_path / "thrice.safetensors").read_bytes()
    again = TaskVector.load((loaded * 1).save(tmp_path / "again.safetensors"))
    assert all(torch.equal(again.apply_to(base).state_dict()[n], finetuned.state_dict()[n]) for n in v)
    partial = TaskVector({"a": torch.ones(1)}, partial=True)
    assert TaskVector.load(partial.save(tmp_path / "partial.safetensors")).partial
    assert TaskVector.load(tmp_path / "partial.safetensors").base is None


def test_loading_something_else(pair, tmp_path):
    file = save(pair[0], tmp_path / "model.safetensors")
    refused(
        IntegrityError, lambda: TaskVector.load(file), "model.safetensors is not a task vector saved by hatcl",
        "a checkpoint with TaskVector.between(pretrained, checkpoint)",
    )  # fmt: skip
    refused(IntegrityError, lambda: TaskVector.load(tmp_path / "none.safetensors"), "no such file")
    x = torch.zeros(2)
    for tensors, about, text in (
        ({"a": x}, "{", "model.safetensors cannot be read as JSON (Expecting"),
        ({"a": x}, "{}", "its record of the base cannot be read (KeyError('base')); save it again"),
        ({"a": x}, "[]", "model.safetensors holds a JSON list, expected dict"),
        ({"a": x}, "[" * 50_000, "model.safetensors cannot be read as JSON (it is nested too deeply)"),
        ({"a": x, "a:at": x + 1}, '{"base": null, "partial": false}', "a lacks a part; save the vector again"),
        ({"a": x}, '{"base": {"b": "x"}, "partial": false}', "a lacks a part; save the vector again"),
    ):
        save_file(tensors, file, metadata={task_vector.VECTOR_FORMAT: about})
        refused(IntegrityError, lambda: TaskVector.load(file), text)
    vector(1).save(file)
    file.write_bytes(file.read_bytes()[:-1])
    refused(IntegrityError, lambda: TaskVector.load(file), "cannot be read as safetensors")


def test_a_vector_may_be_saved_over_the_files_it_is_read_from(pair, tmp_path):
    v = TaskVector.between(*pair)
    v.save(tmp_path / "v", shard_bytes=60)
    (TaskVector.load(tmp_path / "v") * 2).save(tmp_path / "v", shard_bytes=60)
    assert same(TaskVector.load(tmp_path / "v"), v * 2)


# --- several at once ---


def test_the_order_of_summation(pair):
    base, finetuned = pair
    v, w = TaskVector.between(base, finetuned), TaskVector.between(base, moved(base, seed=4))
    got = composed(base.state_dict(), [(0.3, v), (-0.7, w)])
    tau = (0.3 * v["fc.weight"].double() - 0.7 * w["fc.weight"].double()).float()
    want = (base.fc.weight.double() + tau).float()
    assert torch.equal(got["fc.weight"], want) and torch.equal(got["rate"], base.rate)
    one_hot = composed(base, [(1, v), (0, w)])
    assert all(torch.equal(one_hot[n], p) for n, p in finetuned.named_parameters())


def bits(tensors):
    """Also the signs of zeros, which `torch.equal` does not see."""
    return {n: t.contiguous().view(torch.int32).tolist() if t.dtype is torch.float32 else t for n, t in tensors.items()}


def test_no_change_leaves_every_bit(pair):
    base, finetuned = pair
    with torch.no_grad():
        base.fc.weight[0] = -0.0
    v, w = TaskVector.between(base, finetuned), TaskVector.between(base, moved(base, seed=4))
    same_again = TaskVector.between(base, finetuned)
    for nothing in (0 * v, v - v, v - same_again, 0 * v + 0 * w, (v + w) - (v + w), v * 0.3 - v * 0.3, -(v - v)):
        assert bits(nothing.apply_to(base).state_dict()) == bits(base.state_dict())
        assert bits(nothing.in_memory().apply_to(base).state_dict()) == bits(base.state_dict())
    # and what one vector alone changes is that vector's, bit for bit
    assert bits((v + w - w).apply_to(base).state_dict()) != bits(base.state_dict())
    assert bits((v + 0 * w).apply_to(base).state_dict()) == bits(v.apply_to(base).state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_arithmetic_composition_and_the_command_give_the_same_bits(tmp_path, dtype):
    torch.manual_seed(0)
    make = lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.LayerNorm(8), nn.Linear(8, 90)).to(dtype)  # noqa: E731
    base = make()
    models = [moved(base, seed=1), moved(base, seed=2, size=3.0), make()]
    vectors = [TaskVector.between(base, m) for m in models]
    c = [0.6, 0.4, -1.3]
    a, b, d = vectors
    want = (0.6 * a + 0.4 * b - 1.3 * d).apply_to(base).state_dict()
    files = [save(m, tmp_path / f"{i}.safetensors") for i, m in enumerate((base, *models))]
    lazily = [TaskVector.between(files[0], f) for f in files[1:]]
    parts = list(zip(files[1:], c, strict=True))
    summed = 0.6 * lazily[0] + 0.4 * lazily[1] - 1.3 * lazily[2]
    saved = TaskVector.load(summed.save(tmp_path / "v.safetensors"))
    for got in (
        compose_files(files[0], parts, tmp_path / "out"),
        summed.apply_to(files[0]), saved.apply_to(files[0]), summed.in_memory().apply_to(base.state_dict()),
        TaskVector.load(compose_files(files[0], parts, tmp_path / "w", vector=True)).apply_to(files[0]),
        composed(base, list(zip(c, vectors, strict=True))),
        ((0.6 * a + 0.4 * b) + (-1.3) * d).apply_to(base.state_dict()),
    ):  # fmt: skip
        got = named_tensors(got) if not isinstance(got, dict) else got
        assert all(torch.equal(got[n], want[n]) for n in want)
    composer = hatcl.compose(base, vectors)
    exact = [float(torch.tensor(x)) for x in c]  # its coefficients are float32
    composer.coefficients.data[:] = torch.tensor(c)[:, None]
    want = sum((x * v for x, v in zip(exact, vectors, strict=True))).apply_to(base)
    for got in (composer.merge(), composer.vector().apply_to(base)):
        assert all(torch.equal(got.state_dict()[n], p) for n, p in want.named_parameters())
    # one vector of several may be a sum itself
    two = hatcl.compose(base, [0.6 * a + 0.4 * b, d])
    two.coefficients.data[0] = 1
    assert all(
        torch.equal(two.merge().state_dict()[n], p) for n, p in (0.6 * a + 0.4 * b).apply_to(base).named_parameters()
    )


def test_twin_another_order_of_summation_gives_other_bits():
    torch.manual_seed(0)
    base = nn.Linear(50, 50)
    a, b, d = (TaskVector.between(base, moved(base, seed=i, size=3.0)) for i in range(3))
    want = (0.6 * a + 0.4 * b - 1.3 * d).apply_to(base).state_dict()
    rounded = [{n: v[n] * c for n in v} for c, v in ((0.6, a), (0.4, b), (-1.3, d))]  # in float32, at each step
    got = {n: base.state_dict()[n] + (rounded[0][n] + rounded[1][n] + rounded[2][n]) for n in a}
    assert any(not torch.equal(got[n], want[n]) for n in a)


def test_an_adapters_vector_and_a_full_one_add_up_everywhere(pair, tmp_path):
    base, finetuned = pair
    full = TaskVector.between(base, finetuned)
    part = TaskVector({"fc.weight": torch.ones(4, 4)}, partial=True)
    want = {n: p + 1 if n == "fc.weight" else p for n, p in finetuned.state_dict().items()}
    path, file = part.save(tmp_path / "part.safetensors"), save(base, tmp_path / "base.safetensors")
    ours = save(finetuned, tmp_path / "finetuned.safetensors")
    composer = hatcl.compose(base, [full, part])
    composer.coefficients.data[:] = 1
    for both in (full + part, part + full, full - (-part)):
        assert set(both) == set(full) and not both.partial and both.base == full.base
        got = both.apply_to(base).state_dict()
        # 1 is added before the sum is rounded, here after: one ulp
        assert all(torch.allclose(got[n], want[n], rtol=2**-22) for n in full)
        assert all(torch.equal(composer.merge().state_dict()[n], got[n]) for n in full)
        out = named_tensors(compose_files(file, [(ours, 1.0), (path, 1.0)], tmp_path / "out"))
        assert all(torch.equal(out[n], got[n]) for n in full)
    assert hatcl.merge([part, full], "mean")["fc.bias"].equal(full["fc.bias"] / 2)
    assert hatcl.merge([full, part], "ties", density=1.0)["fc.bias"].equal(full["fc.bias"])
    assert full.cosine(part) == pytest.approx(part.cosine(full)) and full.dot(part) == float(
        full["fc.weight"].double().sum()
    )
    extra = TaskVector({"other": torch.ones(2)}, partial=True)
    for call in (lambda: full + extra, lambda: hatcl.merge([extra, full], "mean"), lambda: full.dot(extra)):
        refused(
            VectorError, call, "lacks 1 tensors that vector", "a vector made with partial=True, missing tensors count"
        )


def test_sums_refer_to_their_vectors_and_can_be_copied_and_pickled(pair):
    v, w = TaskVector.between(*pair), TaskVector.between(pair[0], moved(pair[0], seed=4))
    both = 0.5 * (v + 2 * w) - v
    for again in (copy.deepcopy(both), pickle.loads(pickle.dumps(both)), both.in_memory()):
        assert same(again, both)
    assert "in memory" in repr(both) and same(0.5 * v + 1.0 * w - 1.0 * v, both)


def test_composed_hashes_a_tensor_once_for_all_vectors(pair, monkeypatch):
    v = TaskVector.between(*pair)
    hashed = []
    monkeypatch.setattr(task_vector, "digest_of", lambda x: hashed.append(1) or digest_of(x))
    composed(pair[0], [(1, v), (1, v), (1, v)])
    assert len(hashed) == len(v)


def test_load_file_reads_what_apply_wrote(pair, tmp_path):
    v = TaskVector.between(*pair)
    save_file({n: t.clone() for n, t in v.apply_to(pair[0].state_dict()).items()}, tmp_path / "a.safetensors")
    assert torch.equal(load_file(tmp_path / "a.safetensors")["fc.weight"], pair[1].fc.weight)
