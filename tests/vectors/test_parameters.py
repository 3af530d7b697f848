"""Quantised weights are refused by name on either side; counters, indices and masks are none."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import hatcl
from hatcl.errors import GraftError, VectorError
from hatcl.vectors import task_vector
from hatcl.vectors.parameters import quantised_in, refuse_quantised
from hatcl.vectors.stream import compose_files
from hatcl.vectors.task_vector import TaskVector

FLOATS = {"norm.weight": torch.ones(4)}
INT8, INT32 = torch.zeros(4, 4, dtype=torch.int8), torch.ones(4, 4, dtype=torch.int32)
QUANTISED = {
    "int8": {"q.weight": INT8},
    "4 bits in uint8": {"q.weight": torch.zeros(8, 1, dtype=torch.uint8)},
    "float8": {"q.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn)},
    "convolution": {"q.weight": torch.zeros(4, 3, 2, 2, dtype=torch.int8)},
    "GPTQ": {"q.qweight": INT32, "q.scales": torch.ones(1, 4)},
    "bitsandbytes": {"q.weight": INT32, "q.weight.absmax": torch.ones(4)},
    "compressed": {"q.weight_packed": INT32, "q.weight_scale": torch.ones(4)},
}
NONE = {
    "counter": {"bn.num_batches_tracked": torch.tensor(3)},
    "indices": {"embeddings.position_ids": torch.arange(4).view(1, 4)},
    "scaled attention": {"attn.relative_position_index": torch.ones(4, 4).long(), "attn.logit_scale": torch.ones(2)},
    "causal mask": {"attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8)},
    "bool mask": {"mask": torch.ones(4, 4, dtype=torch.bool)},
    "bytes": {"tokens": torch.zeros(4, dtype=torch.uint8)},
}


def written(state, folder, config=None):
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", QUANTISED)
def test_sources_are_refused_on_every_way_in(tmp_path, kind):
    state = {**FLOATS, **QUANTISED[kind]}
    first = next(iter(QUANTISED[kind]))
    plain = {**FLOATS, "q.weight": torch.ones(4, 4)}
    folder, floats = written(state, tmp_path / "a"), written(plain, tmp_path / "b")
    for source in (state, folder, folder / "model.safetensors"):
        assert list(quantised_in(source)) == [first]
        for two in ((source, plain), (plain, source)):
            with pytest.raises(VectorError, match=f"quantised: {first} is .*, expected float16 or wider; dequantise"):
                TaskVector.between(*two)
        with pytest.raises(GraftError, match=f"quantised: {first}"):
            hatcl.select_graft(plain, source, 0.1)
    with pytest.raises(VectorError, match=f"the pretrained model is quantised: {first}"):
        compose_files(folder, [(floats, 1.0)], tmp_path / "out")
    with pytest.raises(VectorError, match=f"the fine-tuned one is quantised: {first}"):
        compose_files(floats, [(folder, 1.0)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_vector_is_never_added_to_quantised_weights(kind):
    target = {**FLOATS, **QUANTISED[kind]}
    v = TaskVector({"q.weight": torch.full((4, 4), 0.3)})
    with pytest.raises(VectorError, match="the model is quantised: q"):
        v.apply_to(target)
    got = TaskVector({"norm.weight": torch.ones(4)}).apply_to(target)  # what is in floating point may be changed
    assert got["norm.weight"].tolist() == [2.0] * 4


def test_integers_of_any_kind_are_no_target():
    v = TaskVector({"steps": torch.ones(3)})
    with pytest.raises(VectorError, match="the model is quantised: steps is int64, expected float16 or wider"):
        v.apply_to({"steps": torch.zeros(3, dtype=torch.long)})
    with pytest.raises(VectorError, match="1 tensors of the vector do not fit"):  # not a question of quantisation
        v.apply_to({"other": torch.zeros(3)})


def test_twin_without_the_check_nothing_is_added_and_nothing_said(monkeypatch):
    monkeypatch.setattr(task_vector, "refuse_as_target", lambda *_: None)
    got = TaskVector({"q.weight": torch.full((4, 4), 0.3)}).apply_to({"q.weight": INT8})
    assert torch.equal(got["q.weight"], INT8)


@pytest.mark.parametrize("kind", NONE)
def test_counters_indices_and_masks_are_left_alone(tmp_path, kind):
    state = {**FLOATS, **NONE[kind]}
    assert quantised_in(state) == {}
    moved = {n: t + 1 if t.dtype.is_floating_point else t for n, t in state.items()}
    v = TaskVector.between(state, moved)
    assert torch.equal(v.apply_to(state)["norm.weight"], moved["norm.weight"])
    assert TaskVector.between(written(state, tmp_path / "a"), written(moved, tmp_path / "b")).norm() > 0


def test_a_configuration_that_says_so(tmp_path):
    said = {"quantization_config": {"quant_method": "awq"}}
    for i, config in enumerate((said, {"text_config": said})):
        folder = written(FLOATS, tmp_path / str(i), config)
        for source in (folder, folder / "model.safetensors"):
            with pytest.raises(VectorError, match=r"its configuration has quantization_config \(awq\); dequantise it"):
                TaskVector.between(source, FLOATS)
    refuse_quantised(written(FLOATS, tmp_path / "plain", {"quantization_config": None}))
    (tmp_path / "plain" / "config.json").write_text("no JSON")  # of something else: the tensors are what counts
    refuse_quantised(tmp_path / "plain")


def test_what_patterns_leave_out_need_not_be_dequantised():
    ours, theirs = {**FLOATS, "q.weight": INT8}, {"norm.weight": FLOATS["norm.weight"] + 1, "q.weight": INT8}
    v = TaskVector.between(ours, theirs, skip="q.*")
    assert list(v) == ["norm.weight"] and v.partial
    with pytest.raises(VectorError, match="q.weight is int8"):
        TaskVector.between(ours, theirs, only="*.weight")


class Wrapped(torch.Tensor):
    """A tensor that carries its own scale and has no memory of its own, as those of torchao and quanto."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=torch.bfloat16)

    def __init__(self, held):
        self.held = held

    def dequantize(self):
        return self.held

    def detach(self):
        return self

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError


def test_tensors_that_carry_their_own_scale():
    one, two = Wrapped(torch.ones(4, 4)), Wrapped(torch.zeros(4, 4))
    assert one.data_ptr() == two.data_ptr()  # yet they are two, and none hides behind the other
    assert quantised_in({"w": one, "u": two}) == {"w": "a Wrapped", "u": "a Wrapped"}
    for name in ("w", "u"):
        with pytest.raises(VectorError, match=f"{name} is a Wrapped, expected float16 or wider"):
            TaskVector({name: torch.ones(4, 4)}).apply_to({"w": one, "u": two})


def quantised_by_torchao():
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    net = nn.Sequential(nn.Linear(64, 64))
    quantization.quantize_(net, quantization.Int8WeightOnlyConfig())
    return net


def quantised_by_bitsandbytes():
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    net = nn.Sequential(bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=False))
    net.load_state_dict(nn.Sequential(nn.Linear(64, 64)).state_dict())
    return net.to("cpu")


@pytest.mark.parametrize("make", [quantised_by_torchao, quantised_by_bitsandbytes])
def test_models_that_libraries_quantised(make):
    net, plain = make(), nn.Sequential(nn.Linear(64, 64))
    for call in (
        lambda: TaskVector.between(net, plain), lambda: TaskVector.between(plain, net),
        lambda: TaskVector({"0.weight": torch.ones(64, 64)}).apply_to(net),
    ):  # fmt: skip
        with pytest.raises(VectorError, match="quantised: 0.weight is"):
            call()


def test_models_in_8_bits_are_no_target_of_compositions_and_grafts():
    net = nn.Sequential(nn.Linear(4, 4))
    moved = copy.deepcopy(net)
    nn.init.zeros_(moved[0].weight)
    v, graft = TaskVector.between(net, moved), hatcl.select_graft(net, moved, 0.5)
    small = copy.deepcopy(net)
    small[0].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    for call in (lambda: v.apply_to(small), lambda: hatcl.compose(small, [v])):
        with pytest.raises(VectorError, match="0.weight is int8"):
            call()
    with pytest.raises(GraftError, match="0.weight is int8"):
        graft.apply_to(small)
