"""Files and folders, all or nothing: written beside their place under a fixed name, synced to disk, then renamed. A
reader finds the old content or the new, complete, and a kill leaves at most one copy that the next write replaces."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from .errors import IntegrityError


def write_files(contents: Mapping[Path, bytes | Callable[[Path], object]], *, then: str = "") -> None:
    """Replace files, once all of them are on disk: an error leaves all as they were.

    Each file changes in one step, several files one after another, in their order: a kill between leaves the first
    new and the last old.

    Args:
        contents: bytes, or what writes them to the path that it is given. then: see `writing`.

    Raises:
        IntegrityError: the disk is full or not writable.
    """
    news = {path: beside(path, "new") for path in contents}
    try:
        for path, content in contents.items():
            with writing(path, then):
                if path.is_dir():  # or the files before it would be replaced
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
                path.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(content, bytes):
                    news[path].write_bytes(content)
                else:
                    content(news[path])
                _sync(news[path])
        for path, new in news.items():
            with writing(path, then):
                os.replace(new, path)
        for folder in dict.fromkeys(path.parent for path in contents):
            with writing(folder, then):
                _sync(folder)
    finally:
        for new in news.values():
            with contextlib.suppress(OSError):  # the error that led here says more
                new.unlink(missing_ok=True)


@contextlib.contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder to fill; when the block ends normally it takes the place of `target`, whatever that holds.

    Two folders cannot trade places in one step, so the old one is moved aside first. After a kill between the two
    moves there is no `target`; `complete` then answers with the old one, which is kept until the new one is in place.

    Raises:
        IntegrityError: the disk is full or not writable. Errors of the block itself come as they are.
    """
    target = Path(os.path.abspath(target))
    new, old = beside(target, "new"), beside(target, "old")
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
    try:
        yield new
        with writing(target):
            for path in [*sorted(new.rglob("*")), new]:
                _sync(path)
            if target.exists():
                shutil.rmtree(old, ignore_errors=True)
                os.rename(target, old)
            os.rename(new, target)
            _sync(target.parent)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def complete(target: Path) -> Path:
    """Where the newest complete content of a folder lies, also after its replacement was interrupted."""
    old = beside(target, "old")
    return old if old.exists() and not target.exists() else target


def beside(path: Path, word: str) -> Path:
    """The hidden name that a file or folder has while it is written (`new`) or on its way out (`old`)."""
    path = Path(os.path.abspath(path))  # "." and ".." have a name too
    return path.with_name(f".{path.name}.{word}")


@contextlib.contextmanager
def writing(path: Path, then: str = "") -> Iterator[None]:
    """Raises `IntegrityError` where the block cannot write.

    Args:
        path: what is written, for the error to name. then: what the error says at its end.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise IntegrityError(f"{path}: could not be written ({error}); is the disk full? {then}".rstrip()) from error


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
            f"{path} cannot be read as tensors and plain values ({first_line}); expected what hatcl wrote. Copy the "
            "run folder again, or start a new run"
        ) from error


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
    """Flush a file or folder to disk, so that a rename after it is not seen before its content."""
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
