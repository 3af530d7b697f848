"""Two checkpoints side by side: prefixes, copies, vocabularies, and what patterns leave out."""

from __future__ import annotations

import itertools

import pytest
import torch
from safetensors.torch import save_file

import hatcl
from hatcl.errors import ConfigError, VectorError
from hatcl.vectors.pairing import paired, with_rows_of
from hatcl.vectors.task_vector import TaskVector
from hatcl.vectors.tensors import Lazy

BASE = {"h.0.w": torch.ones(2, 3), "h.1.w": torch.ones(2, 3), "wte": torch.arange(8.0).view(4, 2)}
MOVED = {n: t + 1 for n, t in BASE.items()}


def under(prefix, state):
    return {prefix + n: t for n, t in state.items()}


@pytest.fixture(params=["memory", "files"])
def stored(request, tmp_path):
    """State dicts as they are, or in files."""
    count = itertools.count()

    def store(state):
        if request.param == "memory":
            return state
        path = tmp_path / f"{next(count)}.safetensors"
        save_file({n: t.clone() for n, t in state.items()}, path)
        return path

    return store


@pytest.mark.parametrize("prefixes", [("", "transformer."), ("transformer.", ""), ("base.model.", "")])
def test_prefixes_that_differ(stored, prefixes):
    ours, theirs = (under(p, s) for p, s in zip(prefixes, (BASE, MOVED), strict=True))
    v = TaskVector.between(stored(ours), stored(theirs))
    assert set(v) == set(ours) and all(bool((t == 1).all()) for t in v.values())
    got = v.apply_to(ours)
    assert all(torch.equal(got[prefixes[0] + n], MOVED[n]) for n in BASE)
    with_head = {**theirs, "lm_head.weight": torch.zeros(9, 2)}
    with pytest.raises(VectorError, match="differ in 1 tensors: lm_head.weight only in the fine-tuned one"):
        TaskVector.between(stored(ours), stored(with_head))
    assert set(TaskVector.between(stored(ours), stored(with_head), skip="lm_head.*")) == set(ours)


def test_names_of_another_model_are_not_taken_for_a_prefix():
    other = {"a.w": torch.ones(2, 3), "b.w": torch.zeros(5)}
    with pytest.raises(VectorError, match="a.w only in the fine-tuned one"):
        TaskVector.between({"h.w": torch.ones(7), "g.w": torch.ones(4)}, other)


def test_what_only_one_checkpoint_has(stored):
    ours, theirs = (
        stored({**BASE, "h.0.attn.masked_bias": torch.tensor(-1e4)}),
        stored({**MOVED, "inv_freq": torch.ones(2)}),
    )
    with pytest.raises(
        VectorError, match="differ in 2 tensors: h.0.attn.masked_bias only in the pretrained model; inv_fr"
    ):
        TaskVector.between(ours, theirs)
    v = TaskVector.between(ours, theirs, skip=["*.masked_bias", "inv_freq"])
    assert set(v) == set(BASE) and v.partial
    assert set(TaskVector.between(ours, theirs, only="h.?.w")) == {"h.0.w", "h.1.w"}
    with pytest.raises(ConfigError, match="skip: '.*inv_frq' matches none of 5 tensors; did you mean 'inv_freq'"):
        TaskVector.between(ours, theirs, skip="*inv_frq")
    with pytest.raises(ConfigError, match="leave none of 5 tensors"):
        TaskVector.between(ours, theirs, skip="*")


def test_experts_that_one_side_holds_in_one_tensor():
    """As transformers 5: in one tensor in memory, one by one in files."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=16, num_local_experts=3, max_position_embeddings=8,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    one_by_one = {
        f"model.layers.0.block_sparse_moe.experts.{i}.w{j}.weight": torch.ones(2, 2) for i in (0, 1) for j in (1, 2)
    }
    for two in ((model, one_by_one), (one_by_one, model)):
        with pytest.raises(VectorError, match="one by one, the other in one tensor .* pass both as folders, or both"):
            TaskVector.between(*two)
    assert len(TaskVector.between(model, model, skip="*.experts.*")) < len(TaskVector.between(model, model))


def test_a_head_that_was_written_out_is_the_table_that_it_copies(stored):
    head = lambda s: {**s, "head": s["wte"].clone()}  # noqa: E731
    v = TaskVector.between(stored(BASE), stored(head(MOVED)))
    assert set(v) == set(BASE)
    both = TaskVector.between(stored(head(BASE)), stored(MOVED))  # the base's file has two: both are to move
    assert torch.equal(both["head"], both["wte"]) and set(both) == {*BASE, "head"}
    untied = {**MOVED, "head": MOVED["wte"] + 1}
    with pytest.raises(VectorError, match="head only in the fine-tuned one"):
        TaskVector.between(stored(BASE), stored(untied))


def test_a_vocabulary_that_grew(stored):
    theirs = {**MOVED, "wte": torch.arange(12.0).view(6, 2) + 1}
    with pytest.raises(VectorError) as caught:
        TaskVector.between(stored(BASE), stored(theirs))
    assert (
        "wte is [4, 2] in the pretrained model, [6, 2] in the fine-tuned one: the vocabulary has 4 entries in"
        in str(caught.value)
    )
    assert "model.resize_token_embeddings(6)), or compare the rows that both have by embeddings='common'" in str(
        caught.value
    )
    v = TaskVector.between(stored(BASE), stored(theirs), embeddings="common")
    assert torch.equal(v.apply_to(BASE)["wte"], theirs["wte"][:4])
    shrunk = TaskVector.between(stored(theirs), stored(BASE), embeddings="common")
    assert torch.equal(shrunk.apply_to(theirs)["wte"], torch.cat([BASE["wte"], theirs["wte"][4:]]))
    with pytest.raises(ConfigError, match="embeddings: got 'comon', expected one of .*did you mean 'common'"):
        TaskVector.between(stored(BASE), stored(theirs), embeddings="comon")
    wider = {**MOVED, "wte": torch.zeros(6, 3)}
    with pytest.raises(
        VectorError, match=r"wte is \[4, 2\] in the pretrained model, \[6, 3\] in the fine-tuned one. Do"
    ):
        TaskVector.between(stored(BASE), stored(wider), embeddings="common")


def test_files_stay_unread(tmp_path):
    for name, state in (("a", BASE), ("b", under("t.", MOVED))):
        save_file(state, tmp_path / f"{name}.safetensors")
    ours, theirs = paired(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert isinstance(ours, Lazy) and isinstance(theirs, Lazy)


def test_grafts_pair_in_the_same_way():
    ours, theirs = BASE, under("t.", MOVED)
    assert hatcl.select_graft(ours, theirs, 0.5).size == 10


def test_rows():
    base, table = torch.zeros(3, 2), torch.ones(5, 2)
    assert torch.equal(with_rows_of(base, table), torch.ones(3, 2))
    assert with_rows_of(table, base)[:, 0].tolist() == [0, 0, 0, 1, 1]


def test_complex_numbers_that_changed_are_named(tmp_path):
    ours = {"w": torch.zeros(2), "filter": torch.ones(2, 2, dtype=torch.complex64)}
    theirs = {"w": torch.ones(2), "filter": ours["filter"] * 1j}
    for a, b in ((ours, theirs), tuple(_on_disk(tmp_path / n, s) for n, s in (("a", ours), ("b", theirs)))):
        with pytest.raises(VectorError, match="filter is complex64 and differs.*view_as_real.*skip='filter'"):
            TaskVector.between(a, b)
        assert list(TaskVector.between(a, b, skip="filter")) == ["w"]
        assert list(TaskVector.between(a, a)) == ["w"]  # equal ones are left out


def _on_disk(path, tensors):
    save_file(tensors, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")
