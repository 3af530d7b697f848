"""Named tensors from modules, state dicts and files; what is wrong with a file is said by name."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from vector_parts import same, save

from hatcl.errors import IntegrityError, VectorError
from hatcl.vectors import tensors
from hatcl.vectors.parameters import parameters_of
from hatcl.vectors.tensors import Lazy, check_fit, files_of, kinds_of, named_tensors, pick, tied_names

PARAMETERS = ["embed.weight", "norm.weight", "norm.bias", "fc.weight", "fc.bias"]


def sharded(folder, model, size=2):
    """As transformers writes shards, `size` tensors in each."""
    state = {n: t.clone() for n, t in model.state_dict().items() if n != "head.weight"}
    names = list(state)
    groups = [names[i : i + size] for i in range(0, len(names), size)]
    where = {}
    for i, group in enumerate(groups, start=1):
        file = f"model-{i:05d}-of-{len(groups):05d}.safetensors"
        save_file({n: state[n] for n in group}, folder / file)
        where |= dict.fromkeys(group, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def refused(error, source, *texts):
    with pytest.raises(error) as caught:
        named_tensors(source)
    for text in texts:
        assert text in str(caught.value), str(caught.value)


# --- what there is ---


def test_parameters_are_floats_and_tied_tensors_come_once(pair, tmp_path):
    base, _ = pair
    for source in (base, base.state_dict(), save(base, tmp_path / "model.safetensors"), tmp_path):
        got = parameters_of(source)
        extra = [] if source is base else ["rate"]  # only a module tells its buffers from its parameters
        assert sorted(got) == sorted(PARAMETERS + extra)
        assert all(torch.equal(got[n], base.state_dict()[n]) for n in got)


def test_buffers_come_by_option_and_only_those_that_are_saved(pair):
    base, _ = pair
    every = {*PARAMETERS, "norm.running_mean", "norm.running_var", "rate"}
    assert set(parameters_of(base, buffers=True)) == every == set(parameters_of(base.state_dict(), buffers=True))


def test_every_source_has_the_same_tensors(pair, tmp_path):
    base, _ = pair
    (tmp_path / "shards").mkdir()
    state = {n: t for n, t in base.state_dict().items() if n != "head.weight"}
    for source in (save(base, tmp_path / "a.safetensors"), sharded(tmp_path / "shards", base), base.state_dict()):
        got = named_tensors(source)
        assert same(dict(sorted(got.items())), dict(sorted(state.items())))
        assert kinds_of(got) == {n: (tuple(t.shape), t.dtype) for n, t in got.items()}


def test_tied_names(pair, tmp_path):
    base, _ = pair
    for source in (base, base.state_dict()):
        tied = tied_names(source)
        assert tied["head.weight"] == tied["embed.weight"] == "embed.weight" and tied["fc.bias"] == "fc.bias"
    assert tied_names(save(base, tmp_path / "a.safetensors")) == {}
    empty = {"a": torch.zeros(0), "b": torch.zeros(0)}
    assert list(named_tensors(empty)) == ["a", "b"]  # without elements there is no memory to share
    x = torch.arange(6.0)
    assert list(named_tensors({"a": x, "b": x[:3], "c": x.view(2, 3)})) == [
        "a",
        "b",
        "c",
    ]  # views are tensors of their own


def test_nothing_is_read_before_it_is_asked_for(pair, tmp_path, reads):
    base, _ = pair
    got = parameters_of(sharded(tmp_path, base))
    some = pick(got, ["fc.bias"])
    assert kinds_of(some)["fc.bias"].shape == (4,) and list(some) == ["fc.bias"] and len(got) == 6
    assert reads == []
    _ = some["fc.bias"], got["fc.weight"]
    assert reads == ["fc.bias", "fc.weight"]
    with pytest.raises(KeyError):
        some["fc.weight"]  # it is there, but was not picked


def test_dtypes_are_known_before_reading(tmp_path):
    every = {str(d): torch.zeros(2, 3).to(d) for d in tensors.STORED_DTYPES.values()}
    save_file(every, tmp_path / "a.safetensors")
    assert {n: k.dtype for n, k in kinds_of(named_tensors(tmp_path)).items()} == {n: t.dtype for n, t in every.items()}


def test_a_lazy_mapping_is_taken_as_it_is():
    lazy = Lazy({"a": tensors.Kind((1,), torch.float32)}, lambda name: torch.ones(1))
    assert named_tensors(lazy) is lazy and dict(lazy) == {"a": torch.ones(1)}


def test_check_fit_names_what_differs():
    ours = {"a": torch.zeros(2), "b": torch.zeros(3), "same": torch.zeros(1)}
    theirs = {"b": torch.zeros(4), "c": torch.zeros(1), "same": torch.zeros(1)}
    with pytest.raises(VectorError) as caught:
        check_fit(ours, theirs, ("one", "two"), "Do something")
    text = str(caught.value)
    assert (
        text
        == "one and two differ in 3 tensors: a only in one; c only in two; b is [3] in one, [4] in two. Do something"
    )
    with pytest.raises(VectorError, match=r"differ in 9 tensors.* \.\.\."):
        check_fit({str(i): torch.zeros(1) for i in range(9)}, {}, ("one", "two"))
    check_fit(ours, dict(reversed(ours.items())), ("one", "two"))


# --- what is wrong ---


def test_no_source():
    refused(VectorError, 3, "got int, expected a module, a state dict, or the path of safetensors files")
    refused(
        VectorError, {"state_dict": {}, "epoch": 3}, "state_dict: got dict, expected a tensor; pass model.state_dict()"
    )


def test_eight_bits_are_refused(tmp_path):
    with pytest.raises(VectorError, match=r"w is float8_e4m3fn \[2\], expected float16 or wider; dequantise it first"):
        parameters_of({"w": torch.zeros(2).to(torch.float8_e4m3fn)})


def test_missing_and_empty(tmp_path):
    refused(IntegrityError, tmp_path / "none.safetensors", "none.safetensors: no such file; expected safetensors")
    refused(IntegrityError, tmp_path, "holds 0 safetensors files and no model.safetensors.index.json", "pass one file")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    refused(IntegrityError, tmp_path, "empty.safetensors cannot be read as safetensors", "truncated, damaged")


def test_truncated_file(pair, tmp_path):
    file = save(pair[0], tmp_path / "a.safetensors")
    whole = file.read_bytes()
    for size in (4, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        refused(IntegrityError, file, "a.safetensors cannot be read as safetensors", "truncated, damaged")


def test_several_files_without_an_index(pair, tmp_path):
    for name in "ab":
        save(pair[0], tmp_path / f"{name}.safetensors")
    refused(
        IntegrityError, tmp_path, "holds 2 safetensors files and no model.safetensors.index.json; pass one file's path"
    )


@pytest.mark.parametrize("left", [1, 2, 3])
def test_shards_without_their_index(pair, tmp_path, left):
    sharded(tmp_path, pair[0])
    (tmp_path / "model.safetensors.index.json").unlink()
    for file in sorted(tmp_path.glob("*.safetensors"))[left:]:
        file.unlink()
    # also a single shard, which a folder with a single file would pass for the whole
    refused(IntegrityError, tmp_path, f"holds {left} safetensors files and no model.safetensors.index.json")


def test_shard_missing_truncated_or_of_another_write(pair, tmp_path):
    sharded(tmp_path, pair[0])
    second = sorted(tmp_path.glob("*.safetensors"))[1]
    whole = second.read_bytes()
    second.write_bytes(whole[:-3])
    refused(IntegrityError, tmp_path, f"{second.name} cannot be read as safetensors")
    save_file({"other": torch.zeros(1)}, second)
    refused(
        IntegrityError,
        tmp_path,
        f"{second.name} lacks norm.weight; its shards come from different writes, write them again",
    )
    second.unlink()
    refused(IntegrityError, tmp_path, f"{second.name}: no such file")


def test_an_index_by_another_name(pair, tmp_path):
    sharded(tmp_path, pair[0])
    (tmp_path / "model.safetensors.index.json").rename(tmp_path / "diffusion.safetensors.index.json")
    assert len(named_tensors(tmp_path)) == 9 and len(files_of(tmp_path)) == 5
