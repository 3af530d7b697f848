"""Composition of files: the same bytes as in memory, in little memory, and it goes on after a kill."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from vector_parts import MOST, Tied, moved, same, save

import hatcl
from hatcl.errors import ConfigError, IntegrityError, VectorError
from hatcl.functional import digest_of
from hatcl.vectors import bases, files, task_vector
from hatcl.vectors.files import UNFINISHED, write_tensors
from hatcl.vectors.merging.registry import list_merges, merge, merge_info
from hatcl.vectors.select import left_by
from hatcl.vectors.stream import compose_files
from hatcl.vectors.task_vector import TaskVector, composed
from hatcl.vectors.tensors import kinds_of, named_tensors


@pytest.fixture
def folder(tmp_path):
    """base.safetensors and three fine-tunes: a small step, a large one, and another model altogether, in shards."""
    torch.manual_seed(0)
    base = Tied()
    torch.manual_seed(1)
    save(base, tmp_path / "base.safetensors")
    save(moved(base, seed=1), tmp_path / "0.safetensors")
    save(moved(base, seed=2, size=100.0), tmp_path / "1.safetensors")
    other = named_tensors(Tied().state_dict())
    write_tensors(tmp_path / "2", kinds_of(other), lambda n: {n: other[n]}, shard_bytes=100)
    return tmp_path


def paths(folder):
    return folder / "base.safetensors", [folder / "0.safetensors", folder / "1.safetensors", folder / "2"]


def in_memory(path):
    return {n: t.clone() for n, t in named_tensors(path).items()}


def content(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- exact ---


@pytest.mark.parametrize("shard_bytes", [1, 120, 10**9])
def test_the_same_as_in_memory(folder, shard_bytes):
    base, parts = paths(folder)
    c = [0.3, -1.7, 0.25]
    out = compose_files(base, list(zip(parts, c, strict=True)), folder / "out", shard_bytes=shard_bytes)
    start = in_memory(base)
    vectors = [TaskVector.between(start, in_memory(p)) for p in parts]
    want = composed(start, list(zip(c, vectors, strict=True)))
    assert same(named_tensors(out), want) and out == folder / "out"
    # and as a formula: the vectors in float64, rounded once, then the base's sum with it
    tau = sum(k * v["fc.weight"].double() for k, v in zip(c, vectors, strict=True)).float()
    assert torch.equal(named_tensors(out)["fc.weight"], (start["fc.weight"].double() + tau).float())
    # and as arithmetic
    a, b, d = vectors
    assert same(named_tensors(out), (0.3 * a - 1.7 * b + 0.25 * d).apply_to(start))
    assert torch.equal(named_tensors(out)["norm.running_mean"], start["norm.running_mean"])
    assert torch.equal(named_tensors(out)["norm.num_batches_tracked"], start["norm.num_batches_tracked"])


@pytest.mark.parametrize("part", range(3))
def test_one_is_the_fine_tuned_checkpoint_and_zero_the_base(folder, part):
    base, parts = paths(folder)
    for c, want in ((1, parts[part]), (0, base)):
        got = compose_files(base, [(parts[part], c)], folder / f"out{c}", buffers=True)
        assert same(named_tensors(got), {**named_tensors(want)})
    one_hot = compose_files(base, [(p, float(i == part)) for i, p in enumerate(parts)], folder / "hot", buffers=True)
    assert same(named_tensors(one_hot), named_tensors(parts[part]))


def test_twin_without_remainders_it_is_not(folder, monkeypatch):
    base, parts = paths(folder)
    plain = task_vector.delta_between
    monkeypatch.setattr(task_vector, "delta_between", lambda a, b: task_vector.Delta(plain(a, b).value))
    assert not same(named_tensors(compose_files(base, [(parts[2], 1)], folder / "out")), named_tensors(parts[2]))


def test_saved_vectors_and_checkpoints_give_the_same(folder):
    base, parts = paths(folder)
    saved = [TaskVector.between(base, p).save(folder / f"v{i}") for i, p in enumerate(parts)]
    mixed = [(saved[0], 0.5), (parts[1], 1), (saved[2], -2)]
    a = compose_files(base, list(zip(parts, [0.5, 1, -2], strict=True)), folder / "a")
    b = compose_files(base, mixed, folder / "b")
    assert content(a) == content(b)


def test_adapters(folder, tmp_path):
    peft = pytest.importorskip("peft")
    base, parts = paths(folder)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    adapted = peft.get_peft_model(moved(model, size=0), peft.LoraConfig(r=2, target_modules=["0"]))
    nn.init.normal_(adapted.base_model.model[0].lora_B["default"].weight)
    adapted.save_pretrained(folder / "adapter")
    save_file(model.state_dict(), folder / "model.safetensors")
    got = compose_files(folder / "model.safetensors", [(folder / "adapter", 0.5)], folder / "out")
    want = TaskVector.between(model, adapted).apply_to(model, 0.5).state_dict()
    assert same(named_tensors(got), want) and not torch.equal(want["0.weight"], model[0].weight)


def test_a_vector_instead_of_a_checkpoint(folder):
    base, parts = paths(folder)
    out = compose_files(base, [(parts[2], 1)], folder / "one", vector=True, shard_bytes=200)
    v = TaskVector.load(out)
    assert v.base == {n: digest_of(t) for n, t in named_tensors(base).items() if n in v}
    got = v.apply_to(base)
    assert all(torch.equal(got[n], named_tensors(parts[2])[n]) for n in v)  # with its remainders
    both = TaskVector.load(compose_files(base, [(parts[0], 0.5), (parts[2], 2)], folder / "two", vector=True))
    a, b = (TaskVector.between(base, p) for p in (parts[0], parts[2]))
    assert same(both, a.map(lambda _, x, y: (0.5 * x.double() + 2 * y.double()).float(), b))
    again = compose_files(base, [(folder / "two", 1)], folder / "again")
    assert same(both.apply_to(base), named_tensors(again))


@pytest.mark.parametrize("method", [m for m in list_merges() if not merge_info(m).needs])
def test_merging_methods(folder, method):
    """Every method that needs no data."""
    base, parts = paths(folder)
    parts = parts[: MOST.get(method, 2)]
    options = {"agree": 1} if method == "consensus" else {}  # by default two tasks need the same element
    out = compose_files(base, [(p, 1) for p in parts], folder / "out", method=method, options=options)
    start = in_memory(base)
    merged = merge([TaskVector.between(start, in_memory(p)) for p in parts], method=method, **options)
    assert same(named_tensors(out), merged.apply_to(start)) and not same(named_tensors(out), start)


def test_a_methods_options_and_coefficients(folder):
    base, parts = paths(folder)
    out = compose_files(base, [(parts[0], 0.5), (parts[1], 2)], folder / "a", method="ties", options={"density": 0.5})
    a, b = (TaskVector.between(in_memory(base), in_memory(p)) for p in parts[:2])
    assert same(named_tensors(out), merge([a * 0.5, b * 2], method="ties", density=0.5).apply_to(in_memory(base)))


# --- what it reads, and how often ---


def test_the_base_is_never_hashed_for_checkpoints_and_once_for_vectors(folder, monkeypatch):
    base, parts = paths(folder)
    saved = [(TaskVector.between(base, p).save(folder / f"v{i}"), 0.5) for i, p in enumerate(parts)]
    hashed = []
    for module in (bases, task_vector):
        monkeypatch.setattr(module, "digest_of", lambda x: hashed.append(1) or digest_of(x))
    compose_files(base, [(p, 0.5) for p in parts], folder / "a")
    assert hashed == []
    compose_files(base, saved, folder / "b")
    assert len(hashed) == 6  # its floating-point tensors but for statistics


def test_a_tensor_at_a_time_is_read(folder, reads):
    base, parts = paths(folder)
    order = []
    compose_files(
        base, [(p, 0.5) for p in parts], folder / "out", shard_bytes=1, progress=lambda *_: order.append(len(reads))
    )
    kinds = kinds_of(named_tensors(base))
    per_tensor = [b - a for a, b in zip([0, *order], order, strict=False)]
    # the base once for itself and once for each part, the parts once; integers and statistics only from the base
    composed_ = [n for n, k in kinds.items() if k.dtype.is_floating_point and "running" not in n]
    assert sorted(per_tensor) == sorted([7 if n in composed_ else 1 for n in kinds])


def test_progress_counts_to_the_end(folder):
    base, parts = paths(folder)
    told = []
    compose_files(
        base, [(parts[0], 1)], folder / "out", shard_bytes=100, progress=lambda done, total: told.append((done, total))
    )
    total = sum(files.nbytes(k) for k in kinds_of(named_tensors(base)).values())
    assert told[-1] == (total, total) and [d for d, _ in told] == sorted(d for d, _ in told)


# --- interrupted ---


def test_it_goes_on_after_a_kill_and_gives_the_same_bytes(folder, monkeypatch):
    base, parts = paths(folder)
    args = (base, [(p, 0.5) for p in parts], folder / "out")
    want = content(compose_files(*args[:2], folder / "want", shard_bytes=100))
    child = os.fork()
    if not child:
        real, count = files._write_file, [0]

        def counted(*a):
            if count[0] == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            count[0] += 1
            real(*a)

        files._write_file = counted
        compose_files(*args, shard_bytes=100)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    with pytest.raises(IntegrityError, match="holds 0 safetensors files and no model.safetensors.index.json"):
        named_tensors(folder / "out")
    written = []
    real = files._write_file
    monkeypatch.setattr(files, "_write_file", lambda file, *a: written.append(file.name) or real(file, *a))
    compose_files(*args, shard_bytes=100)
    assert len(written) == len(want) - 1 - 2 and content(folder / "out") == want
    assert not (folder / "out" / UNFINISHED).exists()


@pytest.mark.parametrize("change", ["coefficient", "file", "shards", "vector", "buffers", "method"])
def test_another_composition_does_not_go_on(folder, monkeypatch, change):
    base, parts = paths(folder)
    real, left = files._write_file, [2]

    def failing(*args):
        left[0] -= 1
        if left[0] < 0:
            raise IntegrityError("full")
        real(*args)

    monkeypatch.setattr(files, "_write_file", failing)
    with pytest.raises(IntegrityError, match="full"):
        compose_files(base, [(parts[0], 0.5)], folder / "out", shard_bytes=100)
    monkeypatch.setattr(files, "_write_file", real)
    if change == "file":
        save(moved(Tied(), seed=8), parts[0])
    options = {"shards": {"shard_bytes": 150}, "vector": {"vector": True}, "buffers": {"buffers": True}}
    options = {"shard_bytes": 100, **options.get(change, {})}
    if change == "method":
        options["method"] = "mean"
    args = (base, [(parts[0], 0.7 if change == "coefficient" else 0.5)])
    got, want = (content(compose_files(*args, folder / out, **options)) for out in ("out", "want"))
    assert got == want


# --- refused, with nothing written ---


def refused(error, call, folder, *texts):
    before = content(folder)
    with pytest.raises(error) as caught:
        call()
    for text in texts:
        assert text in str(caught.value), str(caught.value)
    assert content(folder) == before


def test_bad_input(folder):
    base, parts = paths(folder)
    out = folder / "out"

    def compose(*args, **options):
        return lambda: compose_files(*args, **options)

    refused(ConfigError, compose(base, [], out), folder, "no parts; pass at least one checkpoint")
    refused(
        ConfigError, compose(base, [(parts[0], float("nan"))], out), folder, "0.safetensors: got nan, expected a finite"
    )
    refused(
        ConfigError, compose(base, [(parts[0], 1)], out, options={"k": 1}), folder, "options: got k without a method"
    )
    refused(
        ConfigError,
        compose(base, [(parts[0], 1)], out, shard_bytes=0),
        folder,
        "shard_bytes: got 0, expected a positive",
    )
    refused(
        ConfigError, compose(base, [(parts[0], 1)], out, method="tise"), folder, "got 'tise'", "did you mean 'ties'?"
    )
    text = "density_: no option of ties"
    refused(ConfigError, compose(base, [(parts[0], 1)], out, method="ties", options={"density_": 1}), folder, text)
    refused(IntegrityError, compose(base, [(folder / "no", 1)], out), folder, "no: no such file; expected safetensors")
    (folder / "x.safetensors").write_bytes(b"x")
    refused(
        IntegrityError, compose(base, [(folder / "x.safetensors", 1)], out), folder, "cannot be read as safetensors"
    )
    save_file({**load_file(base), "more": torch.zeros(1)}, folder / "x.safetensors")
    refused(VectorError, compose(base, [(folder / "x.safetensors", 1)], out), folder, "more only in the fine-tuned one")
    vector = TaskVector({"other": torch.ones(1)}).save(folder / "v.safetensors")
    refused(VectorError, compose(base, [(vector, 1)], out), folder, "other is [1], the model has no such tensor")


@pytest.mark.parametrize("left", ["adapter_config.json", "pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
@pytest.mark.parametrize("vector", [False, True])
def test_another_models_weights_are_not_left_beside_the_result(folder, left, vector):
    base, parts = paths(folder)
    out = folder / "out"
    out.mkdir()
    (out / left).write_bytes(b"x")
    with pytest.raises(ConfigError, match=f"out: .*out holds {left} of another model, which would be read together"):
        compose_files(base, [(parts[0], 1)], out, vector=vector)
    assert [f.name for f in out.iterdir()] == [left]
    (out / left).unlink()
    (out / "notes.txt").write_text("mine")
    for _ in range(2):  # a merge may be repeated
        compose_files(base, [(parts[0], 1)], out, vector=vector)


def test_twin_an_adapter_left_there_is_read_in_place_of_the_result(folder, monkeypatch):
    base, parts = paths(folder)
    out = folder / "out"
    out.mkdir()
    (out / "adapter_config.json").write_text("{}")
    monkeypatch.setattr(files, "refuse_left_overs", lambda *what: None)
    compose_files(base, [(parts[0], 1)], out)
    with pytest.raises(VectorError, match="the adapter is None, expected LORA"):
        TaskVector.between(base, out)


def test_patterns_that_one_of_a_mix_lacks(folder, tmp_path, caplog):
    """An adapter has only some of the tensors that a full part has."""
    peft = pytest.importorskip("peft")
    base, parts = paths(folder)
    net = Tied()
    net.load_state_dict(load_file(base), strict=False)
    adapter = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["fc"], init_lora_weights=False))
    adapter.save_pretrained(tmp_path / "lora")
    saved = TaskVector.between(base, parts[1]).save(tmp_path / "v.safetensors")
    mix = [(tmp_path / "lora", 0.5), (parts[0], 1.0), (saved, 0.25)]
    plain = {n: named_tensors(compose_files(base, mix, folder / "all"))[n] for n in named_tensors(base)}
    for only, skip in ((["fc.*", "norm.*"], ()), ((), ["norm.*"]), ("norm.*", "norm.bias")):
        out = named_tensors(compose_files(base, mix, folder / "out", only=only, skip=skip))
        chosen = set(left_by(out, only, skip))
        start = named_tensors(base)
        assert chosen and all(torch.equal(out[n], plain[n] if n in chosen else start[n]) for n in out)
        lacks = only == "norm.*"
        assert (f"{tmp_path / 'lora'}: only='norm.*'" in caplog.text) == lacks
    # a method sees it as a part that changes nothing
    merged = named_tensors(compose_files(base, mix[:2], folder / "m", method="mean", only="norm.*"))
    want = named_tensors(compose_files(base, [(parts[0], 0.5)], folder / "n", only="norm.*"))
    assert all(torch.equal(merged[n], want[n]) for n in want)
    with pytest.raises(ConfigError, match="only='norm.*' and skip=.* leave none of the tensors that the parts change"):
        compose_files(base, mix[:1], folder / "no", only="norm.*")
    assert not (folder / "no").exists()


@pytest.mark.parametrize("vector", [False, True])
def test_a_vector_of_another_base(folder, vector):
    base, parts = paths(folder)
    saved = TaskVector.between(parts[0], parts[1]).save(folder / "v.safetensors")
    with pytest.raises(hatcl.HATError, match="differs from this vector's base|were taken from different bases"):
        compose_files(base, [(saved, 1)], folder / "out", vector=vector)
    with pytest.raises(IntegrityError, match="no model.safetensors.index.json"):
        named_tensors(folder / "out") if (folder / "out").exists() else named_tensors(folder / "2" / "..")
    assert named_tensors(compose_files(base, [(saved, 1)], folder / "out", vector=vector, check=False))


def test_nan_in_a_part(folder):
    base, parts = paths(folder)
    save_file({**load_file(parts[0]), "fc.bias": torch.full((4,), float("nan"))}, parts[0])
    with pytest.raises(VectorError, match="fc.bias: 4 of 4 elements are NaN or infinite; is a checkpoint damaged"):
        compose_files(base, [(parts[0], 1)], folder / "out")
    with pytest.raises(IntegrityError, match="no model.safetensors.index.json"):
        named_tensors(folder / "out")


def test_nothing_that_is_read_is_replaced(folder):
    base, parts = paths(folder)
    for out in (base, parts[2], folder, sorted(parts[2].glob("*.safetensors"))[1]):
        refused(
            ConfigError, lambda out=out: compose_files(base, [(parts[2], 1)], out), folder,
            f"out: {out} would replace", "which is read; name another folder",
        )  # fmt: skip
