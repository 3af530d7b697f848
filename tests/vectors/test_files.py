"""Writing shards: what was interrupted, by an error or a kill, never looks complete, and goes on where it stopped."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from hatcl.errors import IntegrityError
from hatcl.vectors import files
from hatcl.vectors.files import UNFINISHED, read_metadata, write_tensors
from hatcl.vectors.tensors import kinds_of, named_tensors

TENSORS = {f"t{i}": torch.full((25,), float(i)) for i in range(8)}  # 100 bytes each


def write(path, tensors=TENSORS, shard_bytes=200, made=None, **options):
    """Two tensors to a shard; `made` collects what was asked for."""

    def make(name):
        if made is not None:
            made.append(name)
        return {name: tensors[name]}

    return write_tensors(path, kinds_of(tensors), make, shard_bytes=shard_bytes, **options)


def holds(path, tensors=TENSORS):
    got = named_tensors(path)
    return list(got) == list(tensors) and all(torch.equal(got[n], tensors[n]) for n in tensors)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def unreadable(folder):
    with pytest.raises(IntegrityError, match="holds . safetensors files and no model.safetensors.index.json"):
        named_tensors(folder)
    return True


# --- what is written ---


def test_a_folder_of_shards_as_transformers_writes_them(tmp_path):
    settled = []
    assert write(tmp_path / "new" / "out", progress=settled.append) == tmp_path / "new" / "out"
    out = tmp_path / "new" / "out"
    shards = [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
    assert names(out) == [*shards, "model.safetensors.index.json"]  # nothing else is left
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 800}
    assert index["weight_map"] == {f"t{i}": shards[i // 2] for i in range(8)}
    assert holds(out) and settled == [100] * 8
    assert list(load_file(out / shards[1])) == ["t2", "t3"]


def test_few_bytes_are_one_file(tmp_path):
    write(tmp_path, shard_bytes=None)
    assert names(tmp_path) == ["model.safetensors"] and holds(tmp_path)
    assert write(tmp_path / "a" / "b.safetensors") == tmp_path / "a" / "b.safetensors"
    assert names(tmp_path / "a") == ["b.safetensors"] and holds(tmp_path / "a" / "b.safetensors")


def test_a_tensor_above_the_limit_has_a_shard_of_its_own(tmp_path):
    tensors = {"a": torch.zeros(2), "large": torch.zeros(100), "b": torch.zeros(2), "c": torch.zeros(2)}
    write(tmp_path, tensors)
    where = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert [n[:11] for n in where.values()] == ["model-00001", "model-00002", "model-00003", "model-00003"]


def test_metadata(tmp_path):
    write(tmp_path / "shards", metadata={"what": "x"})
    write(tmp_path / "one", metadata={"what": "x"}, shard_bytes=None)
    for path in ("shards", "one", "one/model.safetensors"):
        assert read_metadata(tmp_path / path) == {"what": "x"}
    assert read_metadata(write(tmp_path / "plain.safetensors")) == {"format": "pt"}
    with pytest.raises(IntegrityError, match="no such file"):
        read_metadata(tmp_path / "none")


def test_several_tensors_for_one_name_and_tensors_that_share_memory(tmp_path):
    x = torch.arange(12.0)
    views = {"a": x, "b": x[:6], "c": x.view(3, 4).T, "d": torch.zeros(()).expand(3, 2)}
    write(tmp_path, views, shard_bytes=None)
    assert holds(tmp_path, views)
    write_tensors(tmp_path / "two", kinds_of({"a": x}), lambda n: {n: x, n + ":more": x[:1]}, shard_bytes=10)
    assert list(named_tensors(tmp_path / "two")) == ["a", "a:more"]


def test_a_shard_at_a_time_is_in_memory(tmp_path, monkeypatch):
    most = []
    monkeypatch.setattr(files, "save_file", lambda t, *a, **k: most.append(len(t)) or files_save(t, *a, **k))
    write(tmp_path)
    assert most == [2] * 4


files_save = files.save_file


def test_another_write_replaces_all_of_the_last(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    two = {n: t + 1 for n, t in list(TENSORS.items())[:3]}
    write(tmp_path)
    write(tmp_path, two)
    assert holds(tmp_path, two) and len(names(tmp_path)) == 2 + 2
    write(tmp_path, two, shard_bytes=None)
    assert names(tmp_path) == ["config.json", "model.safetensors"] and holds(tmp_path, two)
    write(tmp_path)
    assert holds(tmp_path) and len(names(tmp_path)) == 4 + 2


def test_a_folder_may_be_written_from_its_own_tensors(tmp_path):
    write(tmp_path)
    old = named_tensors(tmp_path)
    write_tensors(tmp_path, kinds_of(old), lambda n: {n: old[n] * 2}, shard_bytes=300)
    assert holds(tmp_path, {n: t * 2 for n, t in TENSORS.items()})


# --- what is interrupted ---


def failing(monkeypatch, after, error):
    """The save fails after so many files."""
    left = [after]

    def save(tensors, path, metadata=None):
        left[0] -= 1
        if left[0] < 0:
            Path(path).write_bytes(b"half")
            raise error
        files_save(tensors, path, metadata=metadata)

    monkeypatch.setattr(files, "save_file", save)


@pytest.mark.parametrize("after", range(4))
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error")], ids=repr)
def test_a_full_disk_leaves_nothing_that_looks_complete_and_the_same_write_goes_on(tmp_path, monkeypatch, after, error):
    with monkeypatch.context() as patch:
        failing(patch, after, error)
        with pytest.raises(IntegrityError, match=r"could not be written .*is the disk full\? Finished files stay: run"):
            write(tmp_path, recipe="r")
    assert unreadable(tmp_path) and names(tmp_path) == [UNFINISHED]
    assert len(names(tmp_path / UNFINISHED)) == after + 1 and not any("new" in n for n in names(tmp_path / UNFINISHED))
    made, settled = [], []
    write(tmp_path, made=made, recipe="r", progress=settled.append)
    assert made == list(TENSORS)[2 * after :] and sum(settled) == 800
    assert holds(tmp_path) and UNFINISHED not in names(tmp_path)


@pytest.mark.parametrize("then", [{"recipe": "other"}, {"recipe": None}, {"recipe": "r", "shard_bytes": 300}])
def test_another_write_starts_anew(tmp_path, monkeypatch, then):
    with monkeypatch.context() as patch:
        failing(patch, 2, OSError(28, "No space left on device"))
        with pytest.raises(IntegrityError):
            write(tmp_path, recipe="r")
    made = []
    write(tmp_path, {n: -t for n, t in TENSORS.items()}, made=made, **then)
    assert made == list(TENSORS) and holds(tmp_path, {n: -t for n, t in TENSORS.items()})


def test_what_was_there_stays_until_the_new_is_complete(tmp_path, monkeypatch):
    write(tmp_path)
    write(tmp_path / "one.safetensors")
    failing(monkeypatch, 3, OSError(28, "No space left on device"))
    for path in (tmp_path, tmp_path / "one.safetensors"):
        with pytest.raises(IntegrityError):
            write(path, {n: -t for n, t in TENSORS.items()})
        monkeypatch.undo()
        failing(monkeypatch, 0, OSError(28, "No space left on device"))
    monkeypatch.undo()
    (tmp_path / "one.safetensors").rename(tmp_path / "one")
    assert holds(tmp_path)
    (tmp_path / "one").rename(tmp_path / "one.safetensors")
    assert holds(tmp_path / "one.safetensors")


def stopping(patch, allowed):
    """Interrupted at the step on the file system that comes after so many."""
    steps = [0]

    def counted(real):
        def step(*args, **options):
            steps[0] += 1
            if steps[0] > allowed:
                raise KeyboardInterrupt
            return real(*args, **options)

        return step

    for owner, name in ((os, "replace"), (Path, "unlink"), (files.shutil, "rmtree")):
        patch.setattr(owner, name, counted(getattr(owner, name)))


@pytest.mark.parametrize("old", ["none", "shards", "other shards", "one file"])
@pytest.mark.parametrize("new", ["shards", "one file"])
def test_no_step_of_the_exchange_leaves_something_that_reads_as_complete_and_is_not(tmp_path, monkeypatch, old, new):
    """The exchange is stopped before each of its steps on the file system: what is there reads as the old, as the new,
    or not at all."""
    sizes = {"shards": 200, "other shards": 300, "one file": None}
    replaced = {n: -t for n, t in TENSORS.items()}
    reached = 0
    for stop in range(30):
        folder = tmp_path / str(stop)
        if old != "none":
            write(folder, replaced, shard_bytes=sizes[old])
        with monkeypatch.context() as patch:
            stopping(patch, stop)
            try:
                write(folder, shard_bytes=sizes[new], recipe="r")
                done = True
            except KeyboardInterrupt:
                done = False
        try:
            assert holds(folder) or (old != "none" and holds(folder, replaced))
        except IntegrityError:
            reached += 1
        if done:
            break
        write(folder, shard_bytes=sizes[new], recipe="r")
        assert holds(folder) and UNFINISHED not in names(folder)
    assert done and stop > 5
    assert reached or (old, new) == ("one file", "one file")  # the states between were met


def test_twin_shards_in_place_read_as_complete(tmp_path, monkeypatch):
    """Without the hidden folder and the check of names, the first of four shards passes for a whole model."""
    write(tmp_path / "out")
    whole = tmp_path / "out" / "model-00001-of-00004.safetensors"
    alone = tmp_path / "alone"
    alone.mkdir()
    whole.rename(alone / whole.name)
    assert unreadable(alone)
    monkeypatch.setattr("hatcl.vectors.tensors.IS_SHARD", re.compile("(?!)"))
    assert list(named_tensors(alone)) == ["t0", "t1"]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "x", tmp_path / "file" / "x.safetensors"):
        with pytest.raises(IntegrityError, match="file.* could not be written"):
            write(path)


# --- for real, in a process of its own ---

REAL = {f"t{i}": torch.full((25 if i != 6 else 25_000,), float(i)) for i in range(8)}


def process(folder, kill_after=-1, limit=None):
    """Write `REAL` in a forked process, which a signal kills before a shard, or whose files may not grow beyond a
    limit. The exit code, the shards it made, and the error."""

    def run(say):
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        real = files._write_file

        def counted(file, *args):
            if say.count == kill_after:
                os.kill(os.getpid(), signal.SIGKILL)
            say.count += 1
            real(file, *args)
            say(file.name)

        files._write_file = counted
        try:
            write(folder, REAL, recipe="r")
        except IntegrityError as error:
            say(f"IntegrityError {error}")

    reader, writer = os.pipe()
    child = os.fork()
    if not child:

        def say(line):
            os.write(writer, f"{line}\n".encode())

        say.count = 0
        try:
            run(say)
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as said:
        lines = said.read().splitlines()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), lines


def test_a_killed_write_never_reads_as_complete_and_goes_on(tmp_path):
    code, made = process(tmp_path, kill_after=2)
    assert code == -signal.SIGKILL and len(made) == 2
    assert unreadable(tmp_path) and len(list((tmp_path / UNFINISHED).glob("*.safetensors"))) == 2
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / UNFINISHED).glob("*.safetensors")}
    assert process(tmp_path) == (0, [f"model-0000{i}-of-00005.safetensors" for i in (3, 4, 5)])
    assert holds(tmp_path, REAL) and UNFINISHED not in names(tmp_path)
    assert {n: (tmp_path / n).stat().st_mtime_ns for n in times} == times  # not written again


def test_a_file_size_limit_in_the_middle(tmp_path):
    code, said = process(tmp_path, limit=50_000)  # the fourth shard needs 100,000 bytes
    assert code == 0 and len(said) == 4 and "model-00004-of-00005.safetensors: could not be written" in said[-1]
    assert "is the disk full? Finished files stay: run the same again" in said[-1]
    assert unreadable(tmp_path) and len(list((tmp_path / UNFINISHED).glob("*.safetensors"))) == 3
    assert not list((tmp_path / UNFINISHED).glob("*.new"))
    assert process(tmp_path) == (0, [f"model-0000{i}-of-00005.safetensors" for i in (4, 5)])
    assert holds(tmp_path, REAL)


def test_processes_that_write_one_folder_at_once_all_succeed(tmp_path):
    contents = {n: {name: t + i for name, t in TENSORS.items()} for i, n in enumerate("abc")}
    children = []
    for tensors in contents.values():
        child = os.fork()
        if not child:
            code = 1
            try:
                for _ in range(15):
                    write(tmp_path / "out", tensors)
                    write(tmp_path / "one.safetensors", tensors)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    for path in (tmp_path / "out", tmp_path / "one.safetensors"):
        assert sum(holds(path, tensors) for tensors in contents.values()) == 1  # one write's, not of two
    assert names(tmp_path) == ["one.safetensors", "out"] and len(names(tmp_path / "out")) == 5


def test_twin_writes_of_one_folder_that_do_not_wait(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(files, "alone", lambda folder: contextlib.nullcontext())
    with pytest.raises((AssertionError, IntegrityError)):
        test_processes_that_write_one_folder_at_once_all_succeed(tmp_path)


# --- an index that somebody else wrote ---


def leading(folder, where):
    """A folder of shards whose index says that t0 lies elsewhere."""
    write(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["t0"] = where
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("where", ["../x.safetensors", "{folder}/x.safetensors", "a/../../x.safetensors", "..", "", 3])
def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path, where):
    write(tmp_path / "x.safetensors")
    where = where.format(folder=tmp_path) if isinstance(where, str) else where
    leading(tmp_path / "out", where)
    for read in (named_tensors, read_metadata):
        with pytest.raises(IntegrityError, match=(
            f"model.safetensors.index.json: t0 is assigned to {re.escape(repr(where))}, expected a file in the same "
            r"folder. Was it edited\? Write it again"
        )):  # fmt: skip
            read(tmp_path / "out")


def test_twin_a_path_that_is_only_joined_reads_outside(tmp_path):
    """What an index may say is all that keeps a reader inside."""
    write(tmp_path / "x.safetensors")
    outside = tmp_path / "out" / "../x.safetensors"
    (tmp_path / "out").mkdir()
    assert holds(outside)


def test_shards_that_are_links_are_read(tmp_path):
    """As a hub's cache has them."""
    write(tmp_path / "blobs")
    (tmp_path / "out").mkdir()
    for name in names(tmp_path / "blobs"):
        (tmp_path / "out" / name).symlink_to(tmp_path / "blobs" / name)
    assert holds(tmp_path / "out")


@pytest.mark.parametrize("text, error", [
    ("[" * 50_000, "index.json cannot be read as JSON .it is nested too deeply"),
    ("[]", "index.json holds a JSON list, expected dict"), ("{", "index.json cannot be read as JSON"),
    ("", "index.json cannot be read as JSON"), ('{"weight_map": 3}', "index.json is not an index of safetensors"),
    ("{}", r"index.json is not an index of safetensors shards \(it has no weight_map\); write it again"),
    ('{"weight_map": []}', "index.json is not an index of safetensors shards"),
])  # fmt: skip
def test_an_index_that_is_none(tmp_path, text, error):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(IntegrityError, match=error):
        named_tensors(tmp_path)
