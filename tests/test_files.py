"""Files and folders are replaced whole: an error leaves the old, a kill the old or the new and nothing that grows."""

from __future__ import annotations

import errno
import itertools
import os
import re
import shutil
from pathlib import Path

import pytest
from safetensors import SafetensorError

from hatcl import files
from hatcl.errors import IntegrityError
from hatcl.files import replaced_folder, write_files

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
        (os, "rename"), (os, "replace"), (os, "fsync"), (os, "mkdir"), (shutil, "rmtree"), (Path, "unlink"),
        (Path, "write_bytes"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))

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
        with pytest.raises(IntegrityError, match=f"{path}: could not be written .*({text}).*is the disk full"):
            write_files({tmp_path / "a": b"new", tmp_path / path: b"new"})
    assert read(tmp_path) == ("old", "old") and names(tmp_path) == ["a", "b", "folder"]


def test_a_kill_at_any_call_leaves_each_file_old_or_new(tmp_path, disk):
    seen = []
    for limit in itertools.count(1):
        folder = tmp_path / str(limit)
        pair(folder, "old")
        finished = disk(limit, lambda: pair(folder, "new"))  # noqa: B023
        seen.append(read(folder))
        assert set(names(folder)) <= {"a", "b", ".a.new", ".b.new"}
        pair(folder, "newer")  # the next process
        assert read(folder) == ("newer", "newer") and names(folder) == ["a", "b"]
        if finished:
            break
    assert list(dict.fromkeys(seen)) == [("old", "old"), ("new", "old"), ("new", "new")] and limit > 6


def test_twin_names_that_change_leave_more_and_more(tmp_path, disk, monkeypatch):
    count = itertools.count()
    monkeypatch.setattr(files, "beside", lambda path, word: path.with_name(f".{path.name}.{next(count)}"))
    with pytest.raises(AssertionError):
        test_a_kill_at_any_call_leaves_each_file_old_or_new(tmp_path, disk)


def test_all_is_on_disk_before_anything_is_renamed(tmp_path, monkeypatch):
    done = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: done.append(("fsync", os.readlink(f"/proc/self/fd/{f}"))) or sync(f))
    monkeypatch.setattr(os, "replace", lambda a, b: done.append(("replace", str(b))) or replace(a, b))
    pair(tmp_path, "new")
    assert [(what, Path(path).name) for what, path in done] == [
        ("fsync", ".a.new"), ("fsync", ".b.new"), ("replace", "a"), ("replace", "b"), ("fsync", tmp_path.name),
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
