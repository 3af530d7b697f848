"""Files and folders are replaced whole: an error leaves the old, a kill the old or the new and nothing that grows."""

from __future__ import annotations

import contextlib
import copy
import errno
import itertools
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from hatcl import files
from hatcl.errors import IntegrityError
from hatcl.files import TEMPORARY, alone, drop_left_overs, parse_json, read_json, replaced_folder, write_files

FULL = OSError(errno.ENOSPC, "No space left on device")


class Killed(BaseException):
    """Stands for kill -9: nothing of the program runs after it."""


@pytest.fixture
def disk(monkeypatch):
    """Dies at the n-th call that touches the disk, and at every one after it."""
    calls = {"count": 0, "limit": None}

    def counted(real):
        def call(*args, **options):
            calls["count"] += 1
            if calls["limit"] is not None and calls["count"] >= calls["limit"]:
                raise Killed
            return real(*args, **options)

        return call

    for owner, name in (
        (os, "rename"), (os, "replace"), (os, "fsync"), (os, "mkdir"), (os, "chmod"), (shutil, "rmtree"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    monkeypatch.setattr(files, "open", counted(open), raising=False)

    def until(limit, act):
        calls.update(count=0, limit=limit)
        try:
            act()
            return True
        except Killed:
            return False
        finally:
            calls.update(limit=None)

    return until


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def failing(error):
    """Writes half of a file, then fails."""

    def write(path):
        path.write_bytes(b"ha")
        raise error

    return write


# --- files ---


def pair(folder, text: str, last=None) -> None:
    write_files({folder / "a": text.encode(), folder / "b": last or (lambda new: new.write_text(text))})


def read(folder) -> tuple[str | None, ...]:
    return tuple((folder / n).read_text() if (folder / n).exists() else None for n in ("a", "b"))


def test_bytes_and_what_writes_itself(tmp_path):
    pair(tmp_path / "new" / "folder", "old")
    pair(tmp_path / "new" / "folder", "new")
    assert read(tmp_path / "new" / "folder") == ("new", "new") and names(tmp_path / "new" / "folder") == ["a", "b"]
    write_files({})


def test_relative_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_files({Path("a"): b"new"})
    assert (tmp_path / "a").read_text() == "new" and names(tmp_path) == ["a"]


ERRORS = [(FULL, IntegrityError), (SafetensorError("I/O error"), IntegrityError), (KeyboardInterrupt(), None)]


@pytest.mark.parametrize("error, kind", [*ERRORS, (ZeroDivisionError(), None)], ids=repr)
def test_an_error_in_the_last_file_leaves_all_as_they_were(tmp_path, error, kind):
    pair(tmp_path, "old")
    with pytest.raises(kind or type(error)) as caught:
        pair(tmp_path, "new", failing(error))
    assert read(tmp_path) == ("old", "old") and names(tmp_path) == ["a", "b"]
    if kind:
        assert str(caught.value) == f"{tmp_path / 'b'}: could not be written ({error}); is the disk full?"


def test_twin_one_file_after_another_is_half_done(tmp_path, monkeypatch):
    def one_by_one(contents):
        for path, content in contents.items():
            write_files({path: content})

    monkeypatch.setitem(globals(), "pair", lambda folder, text, last=None: one_by_one(
        {folder / "a": text.encode(), folder / "b": last or (lambda new: new.write_text(text))}
    ))  # fmt: skip
    with pytest.raises(AssertionError):
        test_an_error_in_the_last_file_leaves_all_as_they_were(tmp_path, FULL, IntegrityError)


def test_an_error_says_what_to_do_then(tmp_path):
    with pytest.raises(IntegrityError, match=r"a: could not be written \(.*No space.*\); is the disk full\? Go on$"):
        write_files({tmp_path / "a": failing(FULL)}, then="Go on")


def test_places_that_cannot_be_written(tmp_path):
    pair(tmp_path, "old")
    (tmp_path / "folder").mkdir()
    for path, text in (("b/c", "Not a directory|File exists"), ("folder", "Is a directory")):
        with pytest.raises(
            IntegrityError, match=f"{path}: could not be written .*({text}).*something else has that name"
        ):
            write_files({tmp_path / "a": b"new", tmp_path / path: b"new"})
    assert read(tmp_path) == ("old", "old") and names(tmp_path) == ["a", "b", "folder"]


def test_a_kill_at_any_call_leaves_each_file_old_or_new(tmp_path, disk):
    seen = []
    for limit in itertools.count(1):
        folder = tmp_path / str(limit)
        pair(folder, "old")
        finished = disk(limit, lambda: pair(folder, "new"))  # noqa: B023
        seen.append(read(folder))
        assert {n for n in names(folder) if not TEMPORARY.fullmatch(n)} <= {"a", "b"}
        pair(folder, "newer")  # the next process
        assert read(folder) == ("newer", "newer") and names(folder) == ["a", "b"]
        if finished:
            break
    assert list(dict.fromkeys(seen)) == [("old", "old"), ("new", "old"), ("new", "new")] and limit > 6


def test_twin_what_nobody_removes_is_left(tmp_path, disk, monkeypatch):
    monkeypatch.setattr(files, "drop_left_overs", lambda folder, of: None)
    with pytest.raises(AssertionError):
        test_a_kill_at_any_call_leaves_each_file_old_or_new(tmp_path, disk)


def test_all_is_on_disk_before_anything_is_renamed(tmp_path, monkeypatch):
    done = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: done.append(("fsync", os.readlink(f"/proc/self/fd/{f}"))) or sync(f))
    monkeypatch.setattr(os, "replace", lambda a, b: done.append(("replace", str(b))) or replace(a, b))
    pair(tmp_path, "new")
    assert [(what, Path(path).name) for what, path in done] == [
        ("fsync", "a"), ("fsync", "b"), ("replace", "a"), ("replace", "b"), ("fsync", tmp_path.name),
    ]  # fmt: skip


def test_twin_without_syncing(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_sync", lambda path: None)
    with pytest.raises(AssertionError):
        test_all_is_on_disk_before_anything_is_renamed(tmp_path, monkeypatch)


@pytest.mark.parametrize("code, of, passes", [
    (errno.EINVAL, "folder", True), (errno.EINVAL, "file", False), (errno.EIO, "folder", False),
])  # fmt: skip
def test_a_drive_that_cannot_sync_folders_will_do(tmp_path, monkeypatch, code, of, passes):
    sync = os.fsync

    def refusing(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}") == (of == "folder"):
            raise OSError(code, os.strerror(code))
        sync(handle)

    monkeypatch.setattr(os, "fsync", refusing)
    if passes:
        pair(tmp_path, "new")
        replace(tmp_path / "model", "new")
    else:
        with pytest.raises(IntegrityError, match=re.escape(os.strerror(code))):
            pair(tmp_path, "new")
        with pytest.raises(IntegrityError, match=re.escape(os.strerror(code))):
            replace(tmp_path / "model", "new")


# --- folders ---


def content(folder) -> str | None:
    path = files.complete(folder) / "text"
    return path.read_text() if path.exists() else None


def replace(folder, text: str) -> None:
    with replaced_folder(folder) as new:
        (new / "text").write_text(text)
        (new / "deeper").mkdir()
        (new / "deeper" / "more").write_text(text)


def test_a_folder_is_replaced_whole(tmp_path):
    target = tmp_path / "run" / "model"
    replace(target, "old")
    (target / "stale").touch()
    replace(target, "new")
    assert content(target) == "new" and not (target / "stale").exists()
    assert names(target.parent) == ["model"]


def test_the_folder_that_one_stands_in(tmp_path, monkeypatch):
    replace(tmp_path / "model", "old")
    monkeypatch.chdir(tmp_path / "model")
    assert content(Path(".")) == "old"
    replace(Path("."), "new")
    assert content(tmp_path / "model") == "new" and names(tmp_path) == ["model"]


@pytest.mark.parametrize("error", [ZeroDivisionError("x"), FULL, KeyboardInterrupt("x")], ids=repr)
def test_a_block_that_fails_leaves_the_old_and_its_own_error(tmp_path, error):
    replace(tmp_path / "model", "old")
    with pytest.raises(type(error)) as caught, replaced_folder(tmp_path / "model") as new:
        (new / "text").write_text("half")
        raise error
    assert caught.value is error
    assert content(tmp_path / "model") == "old" and names(tmp_path) == ["model"]


@pytest.mark.parametrize("call", ["mkdir", "fsync", "rename"])
def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, call):
    target = tmp_path / "model"
    replace(target, "old")
    make = Path.mkdir

    def failing(path, *args, **options):
        if call == "mkdir" and not str(path).endswith(".new"):  # the block's own
            return make(path, *args, **options)
        raise FULL

    with monkeypatch.context() as patch:
        patch.setattr(Path if call == "mkdir" else os, call, failing)  # Python 3.10's Path does not look into os
        with pytest.raises(IntegrityError, match=r"model: could not be written \(.*No space.*\); is the disk full\?$"):
            replace(target, "new")
    assert content(target) == "old" and names(tmp_path) == ["model"]


def test_a_kill_at_any_call_leaves_the_old_folder_or_the_new(tmp_path, disk):
    seen = set()
    for limit in itertools.count(1):
        for start in (None, "old"):
            target = tmp_path / f"{limit}{start}" / "model"
            if start:
                replace(target, start)
            finished = disk(limit, lambda: replace(target, "new"))  # noqa: B023
            seen.add((start, content(target), finished))
            assert content(target) in ({"new"} if finished else {start, "new"})
            replace(target, "newer")  # the next process
            assert content(target) == "newer"
            assert names(target.parent) == ["model"]
        if finished:
            break
    assert ("old", "old", False) in seen and ("old", "new", False) in seen and ("old", "new", True) in seen


def test_twin_a_reader_that_does_not_look_beside_finds_nothing(tmp_path, disk, monkeypatch):
    monkeypatch.setattr(files, "complete", lambda target: target)
    with pytest.raises(AssertionError):
        test_a_kill_at_any_call_leaves_the_old_folder_or_the_new(tmp_path, disk)


# --- several at once, and killed ones ---


def started(act):
    """A forked process that does something."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        act()
        code = 0
    finally:
        os._exit(code)


def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def together(acts, meanwhile):
    """Start a process for each, and do something again and again until all have ended."""
    running = {started(act) for act in acts}
    while running:
        meanwhile()
        running = {child for child in running if not os.waitpid(child, os.WNOHANG)[0]}


def writers(write, count=4, times=40):
    """Processes that write a letter each, so many times, and say so at their end."""

    def act(letter):
        for _ in range(times):
            write(letter)
        (DONE / letter).touch()

    return [lambda letter=letter: act(letter) for letter in "abcdefgh"[:count]]


DONE = Path()


@pytest.fixture
def done(tmp_path, monkeypatch):
    folder = tmp_path / "done"
    folder.mkdir()
    monkeypatch.setitem(globals(), "DONE", folder)
    return lambda: names(folder)


SIZE = 200_000


@pytest.mark.parametrize("how", ["bytes", "function"])
def test_processes_that_write_one_file_at_once_all_succeed_and_a_reader_finds_it_whole(tmp_path, done, how):
    target, reads = tmp_path / "place" / "a", []

    def write(letter):
        content = letter.encode() * SIZE
        write_files({target: content if how == "bytes" else lambda new: new.write_bytes(content)})

    def read_it():
        found = target.read_bytes()
        assert len(found) == SIZE and len(set(found)) == 1
        reads.append(found[:1])

    write("a")
    together(writers(write), read_it)
    assert done() == ["a", "b", "c", "d"] and len(reads) > 10
    assert names(target.parent) == ["a"]


@contextlib.contextmanager
def fixed_name(target, mode=0o777):
    new = target.with_name(f".{target.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(mode)
    try:
        yield new
    finally:
        shutil.rmtree(new, ignore_errors=True)


def test_twin_one_name_for_all_processes(tmp_path, done, monkeypatch, capfd):
    monkeypatch.setattr(files, "_temporary", fixed_name)
    with pytest.raises(AssertionError):
        for again in range(20):
            shutil.rmtree(DONE)
            DONE.mkdir()
            test_processes_that_write_one_file_at_once_all_succeed_and_a_reader_finds_it_whole(
                tmp_path / str(again), done, "bytes"
            )


def test_processes_that_replace_one_folder_at_once_all_succeed(tmp_path, done):
    target, reads = tmp_path / "place" / "model", []

    def read_it():
        with contextlib.suppress(FileNotFoundError):  # between the two steps, as a reader of run folders knows
            reads.append(content(target))

    together(writers(lambda letter: replace(target, letter)), read_it)
    assert done() == ["a", "b", "c", "d"] and set(reads) <= {None, "a", "b", "c", "d"}
    assert (
        names(target.parent) == ["model"] and (target / "text").read_text() == (target / "deeper" / "more").read_text()
    )


def test_twin_two_steps_that_are_not_alone(tmp_path, done, monkeypatch, capfd):
    monkeypatch.setattr(files, "alone", lambda folder: contextlib.nullcontext())
    with pytest.raises(AssertionError):
        for again in range(20):  # on a busy machine the processes may come one after another
            shutil.rmtree(DONE)
            DONE.mkdir()
            test_processes_that_replace_one_folder_at_once_all_succeed(tmp_path / str(again), done)


def test_a_process_killed_at_any_moment_leaves_a_file_whole_and_nothing_that_grows(tmp_path):
    target, rng = tmp_path / "place" / "a", random.Random(0)
    write_files({target: b"a" * SIZE})

    def forever():
        for letter in itertools.cycle([b"b", b"c"]):
            write_files({target: lambda new: new.write_bytes(letter * SIZE)})  # noqa: B023

    kills = interrupted = 0
    while kills < 40 or interrupted <= 3:  # a busy machine may not let a child write before it is killed
        kills += 1
        child = started(forever)
        time.sleep(rng.random() * 0.02 * (1 + kills // 40))
        os.kill(child, signal.SIGKILL)
        assert ended(child) == -signal.SIGKILL
        found = target.read_bytes()
        assert len(found) == SIZE and len(set(found)) == 1
        assert len(names(target.parent)) <= 2  # one of the last killed
        interrupted += len(names(target.parent)) - 1
        assert kills < 400, "no kill met a writer that was writing"
    write_files({target: b"d"})
    assert names(target.parent) == ["a"]


def test_alone_waits_and_a_killed_process_is_not_waited_for(tmp_path):
    def hold():
        with alone(tmp_path):
            (tmp_path / "held").touch()
            time.sleep(60)

    child = started(hold)
    while not (tmp_path / "held").exists():
        time.sleep(0.001)

    def wait():
        with alone(tmp_path):
            (tmp_path / "waited").touch()

    other = started(wait)
    time.sleep(0.1)
    assert not (tmp_path / "waited").exists()
    os.kill(child, signal.SIGKILL)
    assert ended(child) == -signal.SIGKILL and ended(other) == 0 and (tmp_path / "waited").exists()


# --- what others left ---


def left(folder, of="a", process=None, machine=None, age=0.0):
    """A temporary folder as a writer makes it."""
    path = folder / f".{of}.{machine or files._machine()}-{process or os.getpid()}-0123abcd.new"
    path.mkdir()
    (path / of).write_text("half")
    os.utime(path, (time.time() - age, time.time() - age))
    return path.name


def test_what_killed_writers_left_is_removed_and_what_others_write_is_not(tmp_path, monkeypatch):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    stale = [left(tmp_path, process=gone.pid), left(tmp_path, of="b", process=gone.pid)]
    stale.append(left(tmp_path, machine="0" * 8, age=2 * files.LONGEST))
    stale.append(left(tmp_path, of="mine"))  # of an earlier process with this one's number
    alive = [left(tmp_path, process=os.getppid()), left(tmp_path, machine="1" * 8)]
    alive.append(left(tmp_path, of="ours"))
    monkeypatch.setattr(files, "_writing", {alive[-1]})
    (tmp_path / ".other.new").mkdir()
    (tmp_path / ".x.12345678-1-01234567.new").symlink_to(tmp_path / ".other.new")
    write_files({tmp_path / "a": b"new"})
    assert stale[0] not in names(tmp_path) and stale[1] in names(tmp_path)  # another name's
    drop_left_overs(tmp_path)
    assert names(tmp_path) == sorted([*alive, "a", ".other.new", ".x.12345678-1-01234567.new"])


@pytest.mark.parametrize("error, is_left", [(ProcessLookupError(), True), (PermissionError(), False)], ids=repr)
def test_another_users_process_is_alive(tmp_path, monkeypatch, error, is_left):
    left(tmp_path, process=77)
    with monkeypatch.context() as patch:
        patch.setattr(os, "kill", lambda process, number: exec("raise error", {"error": error}))
        drop_left_overs(tmp_path)
    assert (names(tmp_path) == []) == is_left


def test_a_write_inside_of_a_write_of_the_same_name(tmp_path):
    write_files({tmp_path / "a": lambda new: (write_files({tmp_path / "a": b"inner"}), new.write_bytes(b"outer"))})
    assert (tmp_path / "a").read_bytes() == b"outer" and names(tmp_path) == ["a"]


# --- links and modes ---


@pytest.mark.parametrize("write", [
    lambda path: write_files({path: b"new"}),
    lambda path: write_files({path: lambda new: new.write_bytes(b"new")}),
    lambda path: replace(path, "new"),
], ids=["bytes", "function", "folder"])  # fmt: skip
def test_a_link_at_the_temporary_name_is_not_followed(tmp_path, monkeypatch, write):
    monkeypatch.setattr(files.secrets, "token_hex", lambda count: "01234567")  # as if it were known before
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "a").write_text("theirs")
    place = tmp_path / "place"
    place.mkdir()
    (place / f".a.{files._machine()}-{os.getpid()}-01234567.new").symlink_to(victim)
    with pytest.raises(IntegrityError, match=r"a: could not be written \(.*File exists"):
        write(place / "a")
    assert names(victim) == ["a"] and (victim / "a").read_text() == "theirs" and not (place / "a").exists()


def test_twin_a_folder_that_may_be_there_already(tmp_path, monkeypatch):
    real = Path.mkdir
    monkeypatch.setattr(Path, "mkdir", lambda path, *a, **k: real(path, parents=True, exist_ok=True))
    with pytest.raises(pytest.fail.Exception):
        test_a_link_at_the_temporary_name_is_not_followed(tmp_path, monkeypatch, lambda path: replace(path, "new"))


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_files_have_the_mode_that_new_files_have(tmp_path, mask):
    before = os.umask(mask)
    try:
        tensors = {"x": torch.zeros(2)}
        write_files({tmp_path / "a": b"new", tmp_path / "b": lambda new: save_file(tensors, new)})
        with replaced_folder(tmp_path / "c") as new:
            (new / "d").mkdir()
            save_file(tensors, new / "d" / "e")
            (new / "f").write_text("new")
    finally:
        os.umask(before)
    assert modes(tmp_path) == dict.fromkeys(["a", "b", "c/d/e", "c/f"], 0o666 & ~mask) | dict.fromkeys(
        ["c", "c/d"], 0o777 & ~mask
    )


def test_twin_folders_that_keep_safetensors_modes(tmp_path, monkeypatch):
    save_file({"x": torch.zeros(2)}, tmp_path / "own")
    if modes(tmp_path)["own"] != 0o600:
        pytest.skip("this safetensors gives its files the mode of new files")
    (tmp_path / "own").unlink()
    monkeypatch.setattr(files, "_as_new_files", lambda folder: None)
    with pytest.raises(AssertionError):
        test_files_have_the_mode_that_new_files_have(tmp_path, 0o022)


def modes(folder) -> dict[str, int]:
    return {path.relative_to(folder).as_posix(): stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*")}


def test_every_writer_gives_its_files_the_mode_of_new_files(tmp_path):
    """Also those through which safetensors or peft write."""
    import ilora_parts
    import parts
    from graft_parts import linear

    import hatcl
    from hatcl.continual import folder as runs
    from hatcl.engine.folder import write_json
    from hatcl.hat.extraction.cut import Shaping
    from hatcl.hat.extraction.files import write_extracted

    before = os.umask(0o022)
    try:
        plain = linear()
        moved = copy.deepcopy(plain)
        torch.nn.init.normal_(next(moved.parameters()))
        vector = hatcl.TaskVector.between(plain, moved)
        vector.save(tmp_path / "vector.safetensors")
        hatcl.select_graft(plain, moved, sparsity=0.5).save(tmp_path / "graft.safetensors")
        model = parts.pretend(parts.converted("mlp"))
        hatcl.save_pretrained(model, tmp_path / "model")
        write_extracted(tmp_path / "extracted", plain, Shaping(), None, {})
        runs.save_model(tmp_path / "run", model, {"tasks": ["a"], "matrix": [[1.0]], "details": {}})
        adapted = ilora_parts.bert()
        with replaced_folder(tmp_path / "adapter") as new:
            runs.write_adapter(adapted, new)
        hatcl.SkillScores("matrix", {"a": (1, 3)}, torch.ones(1)).save(tmp_path / "scores.safetensors")
        write_json(tmp_path / "some.json", {})
    finally:
        os.umask(before)
    found = modes(tmp_path)
    assert len(found) > 15
    assert {n: oct(m) for n, m in found.items() if m != (0o755 if (tmp_path / n).is_dir() else 0o644)} == {}


def test_twin_safetensors_own_mode(tmp_path, monkeypatch):
    write_files({tmp_path / "probe": lambda new: save_file({"x": torch.zeros(2)}, new)})
    monkeypatch.setattr(os, "chmod", lambda path, mode: None)
    write_files({tmp_path / "b": lambda new: save_file({"x": torch.zeros(2)}, new)})
    own = tmp_path / "own"
    save_file({"x": torch.zeros(2)}, own)
    assert (tmp_path / "b").stat().st_mode == own.stat().st_mode
    if stat.S_IMODE(own.stat().st_mode) == 0o600:  # safetensors from 0.8 on
        with pytest.raises(AssertionError):
            test_files_have_the_mode_that_new_files_have(tmp_path, 0o022)


# --- JSON from anybody ---


@pytest.mark.parametrize("text, kind, error", [
    (b"{", dict, r"x.json cannot be read as JSON \(Expecting property name.*\); it is truncated, damaged or edited"),
    (b"", dict, r"x.json cannot be read as JSON \(Expecting value"),
    (b'{"a": "\xff"}', dict, r"x.json cannot be read as JSON \('utf-8' codec can't decode byte 0xff"),
    (b"[" * 100_000, list, r"x.json cannot be read as JSON \(it is nested too deeply\); .* Copy it again"),
    (b'{"a":' * 100_000, dict, r"x.json cannot be read as JSON \(it is nested too deeply\)"),
    (b"1" * 10_000, int, r"x.json cannot be read as JSON \(Exceeds the limit"),
    (b"[1]", dict, "x.json holds a JSON list, expected dict; it was edited, or belongs to something else"),
    (b"null", dict, "x.json holds a JSON NoneType, expected dict"),
])  # fmt: skip
def test_json_that_is_none_or_of_another_kind(tmp_path, text, kind, error):
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(IntegrityError, match=error):
        read_json(tmp_path / "x.json", kind)
    with pytest.raises(IntegrityError, match=error.replace("x.json", "the header")):
        parse_json(text, "the header", kind)


def test_json_as_it_is(tmp_path):
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf{"a": [1, Infinity, "\xc3\xa4"]}')
    assert read_json(tmp_path / "x.json") == {"a": [1, float("inf"), "\u00e4"]}
    assert parse_json("[1]", "x", list) == [1] and parse_json("1", "x", object) == 1


def test_a_json_file_that_is_not_there(tmp_path):
    with pytest.raises(IntegrityError, match=r"none.json cannot be read \(.*No such file.*\); is the path right and"):
        read_json(tmp_path / "none.json")
    with pytest.raises(IntegrityError, match="cannot be read"):
        read_json(tmp_path)
