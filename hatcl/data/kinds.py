"""Kinds of data files. One function reads each kind; it is found by the file's suffix, and the content is checked.

@file_kind("a CSV table", ".csv")
def read_csv(path: Path) -> Records: ...
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, IntegrityError

FIRST_BYTES = 1 << 16  # bytes that identify a file's content
NPZ, JSON, LINES, CSV, TSV, PARQUET = (
    "an .npz file of arrays", "JSON", "JSON lines", "a CSV table", "a TSV table", "a Parquet table",
)  # fmt: skip
SIGNATURES = {
    b"PK\x03\x04": NPZ,
    b"PK\x05\x06": NPZ,
    b"PAR1": PARQUET,
    b"\x93NUMPY": "a single array of numpy (.npy)",
    b"\x1f\x8b": "compressed by gzip",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"GIF8": "an image",
    b"BM": "an image",
    b"ARROW1": "an Arrow file",
    b"\x89HDF": "an HDF5 file",
    b"\x80": "a Python pickle",
}
TABLES = {",": CSV, "\t": TSV}
PLAIN_TEXT, ONE_LINE = "plain text", "JSON in one line"


@dataclass(frozen=True)
class FileKind:
    """One kind of file.

    Attributes:
        what: a name with its article. ends: the suffixes of such files. read: path -> content.
    """

    what: str
    ends: tuple[str, ...]
    read: Callable[[Path], Any]


FILE_KINDS: dict[str, FileKind] = {}  # by suffix


def file_kind(what: str, *ends: str) -> Callable[[Callable[[Path], Any]], Callable[[Path], Any]]:
    """Decorator for the function that reads files with these suffixes.

    Raises:
        ConfigError: a suffix is taken.
    """

    def add(read: Callable[[Path], Any]) -> Callable[[Path], Any]:
        for end in ends:
            if end in FILE_KINDS:
                raise ConfigError(f"file_kind: {end} is taken by {FILE_KINDS[end].what}")
            FILE_KINDS[end] = FileKind(what, ends, read)
        return read

    return add


def known_kinds() -> str:
    """The supported suffixes and their kinds, for errors and help."""
    kinds = dict.fromkeys(FILE_KINDS.values())
    return "; ".join(f"{', '.join(kind.ends)}: {kind.what}" for kind in kinds)


def read_file(path: str | Path) -> Any:
    """The content of a file, read by its suffix; a .json file of JSON lines is read as such.

    Raises:
        ConfigError: the file does not exist, its suffix is unknown, or its content does not match the suffix.
            IntegrityError: the file is damaged.
    """
    path = Path(path)
    kind = next((k for end, k in FILE_KINDS.items() if path.name.lower().endswith(end)), None)
    if not path.is_file():
        raise ConfigError(f"{path} is not a file; is the path right?")
    if kind is None:
        found = content_of(path)
        called = f"ends in {path.suffix!r}" if path.suffix else "has no ending"
        raise ConfigError(
            f"{path}: its name {called}{'' if found is None else f', and it is {found}'}; hatcl reads {known_kinds()}"
        )
    if kind.what == JSON and content_of(path) == LINES:  # common on the hub
        return FILE_KINDS[".jsonl"].read(path)
    check_content(path, kind.what)
    return kind.read(path)


def check_content(path: Path, what: str) -> None:
    """Check that a file's content matches its name. Kinds that hatcl does not know are left to their readers.

    Raises:
        ConfigError: the file is empty, or of another kind, which the text names.
    """
    found = content_of(path)
    either = {ONE_LINE: (JSON, LINES), PLAIN_TEXT: tuple(TABLES.values())}  # one-column tables are plain text
    known = {*SIGNATURES.values(), JSON, LINES, *TABLES.values()}  # other kinds have no known signature
    if found in (None, what) or what not in known or what in either.get(found, ()):
        return
    found = JSON if found == ONE_LINE else found
    ends = next((kind.ends for kind in FILE_KINDS.values() if kind.what == found), None)
    remedy = f"call it {path.name.split('.')[0]}{ends[0]}" if ends else f"read are {known_kinds()}"
    raise ConfigError(f"{path} is {found} by its content, expected {what}; {remedy}")


def content_of(path: Path) -> str | None:
    """The kind of a file by its first bytes; None if they do not identify it, or cannot be read.

    Raises:
        ConfigError: it is empty.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(FIRST_BYTES)
    except (OSError, EOFError, zlib.error):
        return None  # its reader reports the error
    if not head:
        raise ConfigError(f"{path}: the file is empty")
    for first, what in SIGNATURES.items():
        if head.startswith(first):
            return what
    try:
        text = head.decode("utf-8-sig") if len(head) < FIRST_BYTES else head[: head.rfind(b"\n")].decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    return _kind_of_text(text.lstrip())


def _kind_of_text(text: str) -> str:
    if text[:1] in ("{", "["):
        first, _, rest = text.partition("\n")
        if not rest.strip():
            return ONE_LINE
        try:
            json.loads(first)
        except (ValueError, RecursionError):
            return JSON
        return LINES
    header = text.partition("\n")[0]
    return next((what for between, what in TABLES.items() if between in header), PLAIN_TEXT)


def read_text(path: Path) -> str:
    """A file's text, unpacked if its name ends in .gz.

    Raises:
        IntegrityError: it cannot be read, or is not UTF-8.
    """
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise IntegrityError(f"{path} cannot be read ({error}); is the path right, and the file complete?") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise IntegrityError(
            f"{path} is not UTF-8 (line {line}: byte {raw[error.start]:#x}); save it as UTF-8, for example with "
            "iconv -f "
            "latin1 -t utf-8"
        ) from error
