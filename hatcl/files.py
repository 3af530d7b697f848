"""Write files and folders all or nothing, even if others write to the same place at the same time.

Each write goes to its own hidden folder next to its target, `.NAME.MACHINE-PROCESS-RANDOM.new`, is synced to disk and
then renamed: a reader finds either the old content or the new, complete, and the last of several writers wins. The next
write of the same name removes the leftovers of a killed process.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import pickle
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from .errors import ConfigError, IntegrityError

TEMPORARY = re.compile(r"\.(?P<of>.+)\.(?P<machine>[0-9a-f]{8})-(?P<process>\d{1,9})-[0-9a-f]{8}\.new")
LONGEST = 24 * 3600  # seconds: older leftovers of other machines on a shared drive are removed
_writing: set[str] = set()  # the temporary names in use in this process


def write_files(contents: Mapping[Path, bytes | Callable[[Path], object]], *, then: str = "") -> None:
    """Replace files once all new contents are on disk: an error leaves all files as they were.

    Each file changes in one step, several files in their order: a kill in between leaves the first new and the last
    old.

    Args:
        contents: bytes, or a function that writes them to the path that it receives. then: see `writing`.

    Raises:
        IntegrityError: the disk is full or not writable.
    """
    with contextlib.ExitStack() as stack:
        news: dict[Path, Path] = {}
        for path, content in contents.items():
            with writing(path, then):
                if path.is_dir():  # checked before any file is replaced
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
                path.parent.mkdir(parents=True, exist_ok=True)
                news[path] = stack.enter_context(_temporary(path, 0o700)) / path.name
                _fill(news[path], content)
                _sync(news[path])
        for path, new in news.items():
            with writing(path, then):
                os.replace(new, path)
        for folder in dict.fromkeys(path.parent for path in contents):
            with writing(folder, then):
                _sync(folder)


def _fill(new: Path, content: bytes | Callable[[Path], object]) -> None:
    with open(new, "xb") as f:  # "x" follows no link
        mode = _mode(f)
        if isinstance(content, bytes):
            f.write(content)
    if not isinstance(content, bytes):
        content(new)
        os.chmod(new, mode)  # safetensors writes a new file there that only its owner may read


def _mode(f: Any) -> int:
    return stat.S_IMODE(os.fstat(f.fileno()).st_mode)


def _as_new_files(folder: Path) -> None:
    """Give every file in a folder the mode of a new file: safetensors writes files that only their owner may read."""
    probe = folder / f"{secrets.token_hex(8)}.mode"
    with open(probe, "xb") as f:
        mode = _mode(f)
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            os.chmod(path, mode)


@contextlib.contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder to fill; when the block ends normally, it replaces `target`, whatever that holds.

    Two folders cannot trade places in one step, so the old one is moved aside first. After a kill between the two
    moves there is no `target`; `complete` then returns the old one, which is kept until the new one is in place.

    Raises:
        IntegrityError: the disk is full or not writable. Errors of the block itself are passed on.
    """
    target = Path(os.path.abspath(target))
    with contextlib.ExitStack() as stack:
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            new = stack.enter_context(_temporary(target))
        yield new
        with writing(target):
            _as_new_files(new)
            for path in [*sorted(new.rglob("*")), new]:
                _sync(path)
            old = beside(target, "old")
            with alone(target.parent):
                if target.exists():
                    shutil.rmtree(old, ignore_errors=True)
                    os.rename(target, old)
                os.rename(new, target)
                _sync(target.parent)
                shutil.rmtree(old, ignore_errors=True)


def complete(target: Path) -> Path:
    """The path of a folder's newest complete content, even if its replacement was interrupted."""
    old = beside(target, "old")
    return old if old.exists() and not target.exists() else target


def beside(path: Path, word: str) -> Path:
    """The hidden name that a folder gets while it is replaced (`old`)."""
    path = Path(os.path.abspath(path))  # so that "." and ".." have a name too
    return path.with_name(f".{path.name}.{word}")


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait until no other process or thread is in such a block for the same folder. A kill ends the block."""
    if os.name != "posix":
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network drives cannot lock folders
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        with contextlib.suppress(OSError):  # closing does not release it if a forked process has the handle too
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


@contextlib.contextmanager
def held_by_one(lock: Path) -> Iterator[None]:
    """Allow only one process and thread at a time in such a block for the same file. A kill ends the block.

    Raises:
        ConfigError: another process or thread is in the block.
    """
    if os.name != "posix":
        yield
        return
    import fcntl

    handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{lock.parent}: another process is working in this folder; wait until it ends, stop it, or name "
                "another folder"
            ) from None
        except OSError:  # some network drives cannot lock
            pass
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _temporary(target: Path, mode: int = 0o777) -> Iterator[Path]:
    """A new folder next to the target, removed after the block unless it was renamed. Making a folder follows no links,
    and nobody can guess its name in advance."""
    target = Path(os.path.abspath(target))
    drop_left_overs(target.parent, target.name)
    new = target.with_name(f".{target.name}.{_machine()}-{os.getpid()}-{secrets.token_hex(4)}.new")
    _writing.add(new.name)
    try:
        new.mkdir(mode)
        yield new
    finally:
        _writing.discard(new.name)
        if new.parent.is_dir():
            shutil.rmtree(new, ignore_errors=True)


def drop_left_overs(folder: Path, of: str | None = None) -> None:
    """Remove the leftovers of killed writers in a folder, for one name or for all. Writes in progress stay."""
    for path in folder.glob(".*.new"):
        name = TEMPORARY.fullmatch(path.name)
        if name and of in (None, name["of"]) and _is_left_over(path, name):
            shutil.rmtree(path, ignore_errors=True)


def _is_left_over(path: Path, name: re.Match[str]) -> bool:
    with contextlib.suppress(OSError):  # another process removed it
        if time.time() - path.lstat().st_mtime > LONGEST:
            return True
    if name["machine"] != _machine() or os.name != "posix":  # outside POSIX, `os.kill` may end the process
        return False
    if int(name["process"]) == os.getpid():
        return path.name not in _writing
    try:
        os.kill(int(name["process"]), 0)  # signal 0 only asks whether the process exists
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # another user's process
        return False
    return False


@functools.cache
def _machine() -> str:
    """The scope in which this process's number is unique: the same for all processes that see each other."""
    space = ""
    with contextlib.suppress(OSError):  # Linux: containers number their processes themselves
        space = os.readlink("/proc/self/ns/pid")
    return hashlib.sha256(f"{socket.gethostname()} {space}".encode()).hexdigest()[:8]


@contextlib.contextmanager
def writing(path: Path, then: str = "") -> Iterator[None]:
    """Raise `IntegrityError` if the block cannot write.

    Args:
        path: the target, named in the error. then: the end of the error's text.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        other = isinstance(error, (FileExistsError, NotADirectoryError, IsADirectoryError))
        remedy = "something else has that name; choose another place." if other else f"is the disk full? {then}"
        raise IntegrityError(f"{path}: could not be written ({error}); {remedy}".rstrip()) from error


def read_torch(path: Path) -> Any:
    """Tensors and plain values that `torch.save` wrote, on the CPU.

    Raises:
        IntegrityError: the file is missing, truncated or of another kind.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise IntegrityError(
            f"{path} cannot be read as tensors and plain values ({first_line}); expected a file written by hatcl. "
            "Copy the run folder again, or start a new run"
        ) from error


def keys_of_json(path: Path) -> Collection[str]:
    """The keys of a JSON file; none if it does not exist or cannot be read."""
    try:
        return read_json(path).keys() if path.is_file() else ()
    except IntegrityError:
        return ()


def refuse_run(folder: Path) -> None:
    """Raise `ConfigError` if writing here would replace the config.json of a run of hatcl."""
    if {"command", "options"} <= set(keys_of_json(folder / "config.json")):
        raise ConfigError(f"{folder} holds a run of hatcl, whose config.json would be replaced; name another folder")


def read_json(path: Path, kind: type = dict) -> Any:
    """The content of a JSON file from any source.

    Args:
        kind: the expected type; `object` for any.

    Raises:
        IntegrityError: the file is missing, no JSON, nested too deeply, or of another kind.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read ({error}); is the path right and the folder complete?") from error
    return parse_json(text, path, kind)


def parse_json(text: str | bytes, where: object, kind: type = dict) -> Any:
    """Parse a JSON text, with the checks of `read_json`.

    Args:
        where: the file that holds it, named in the error.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise IntegrityError(
            f"{where} cannot be read as JSON ({why}); it is truncated, damaged or edited. Copy it again from its "
            "source, or write it again"
        ) from error
    if not isinstance(content, kind):
        raise IntegrityError(
            f"{where} holds a JSON {type(content).__name__}, expected {kind.__name__}; it was edited, or belongs to "
            "something else. Copy it again from its source, or write it again"
        )
    return content


def sha256_of(path: Path) -> str:
    """The digest of a file's content.

    Raises:
        IntegrityError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as f:
            while chunk := f.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read ({error}); is the path right?") from error
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Flush a file or folder to disk, so that a later rename does not become visible before the content."""
    folder = path.is_dir()
    if folder and os.name != "posix":  # only POSIX lets a folder be opened
        return
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        if not folder or error.errno not in (errno.EINVAL, errno.EBADF):  # some network drives cannot sync a folder
            raise
    finally:
        os.close(handle)
