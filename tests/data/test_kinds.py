"""Files are what their names say, or the error says what they are."""

from __future__ import annotations

import gzip

import numpy as np
import pytest
from data_parts import SAID, picture, write_table

from hatcl.data import places  # noqa: F401  # all readers
from hatcl.data.kinds import FILE_KINDS, file_kind, known_kinds, read_file
from hatcl.data.records import Records
from hatcl.errors import ConfigError, IntegrityError


@pytest.fixture
def of_kind(tmp_path):
    """A small file of each kind, by what it is."""
    pytest.importorskip("datasets")
    made = {}
    for kind in dict.fromkeys(FILE_KINDS.values()):
        path = tmp_path / f"some{kind.ends[0]}"
        if kind.ends[0] == ".npz":
            x, y = np.zeros((4, 8, 8), np.uint8), np.array([0, 1, 0, 1])
            np.savez(path, x_train=x, y_train=y, x_test=x, y_test=y)
        else:
            write_table(path, SAID)
        made[kind.what] = path
    return made


def test_each_kind_given_as_any_other_says_what_it_is(of_kind):
    """JSON in lines is read from .json too; a table with other columns between reads as one column."""
    assert len(of_kind) >= 6
    for what, path in of_kind.items():
        for kind in dict.fromkeys(FILE_KINDS.values()):
            other = path.with_name(f"other{kind.ends[0]}")
            other.write_bytes(path.read_bytes())
            if kind.what == what or (what, kind.what) == ("JSON lines", "JSON"):
                read_file(other)
                continue
            with pytest.raises(
                ConfigError, match=f"other{kind.ends[0]} is {what} by its content, expected {kind.what}"
            ):
                read_file(other)
            if kind.what == "JSON lines":
                other.unlink()


def test_a_csv_given_as_npz_says_so(tmp_path):
    path = tmp_path / "a.npz"
    path.write_text("path,label\na.png,cat\n")
    with pytest.raises(ConfigError, match="a.npz is a CSV table by its content, expected an .npz .*; call it a.csv"):
        read_file(path)


def test_what_no_reader_reads(tmp_path):
    for name, write, words in (
        (
            "a.png",
            lambda p: picture(p),
            "its name ends in '.png', and it is an image; hatcl reads .*.jsonl.*: JSON lines",
        ),
        ("a.npy", lambda p: np.save(p, np.zeros(3)), "and it is a single array of numpy"),
        ("a.csv.npz", lambda p: p.write_bytes(b"\x80\x04more"), "is a Python pickle by its content"),
        ("a", lambda p: p.write_bytes(b"\xfe\xff\x00"), "a: its name has no ending; hatcl reads"),
        ("b.csv", lambda p: p.write_text(""), "b.csv: the file is empty"),
        ("c.csv", lambda p: p.write_bytes(gzip.compress(b"a,b\n1,2\n")), "is compressed by gzip by its content"),
    ):
        write(tmp_path / name)
        with pytest.raises(ConfigError, match=words):
            read_file(tmp_path / name)
    with pytest.raises(ConfigError, match="none.csv is not a file; is the path right"):
        read_file(tmp_path / "none.csv")
    assert all(end in known_kinds() for end in FILE_KINDS)


def test_text_that_is_not_utf_8(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("text,label\ngut,a\nschön,b\n".encode("latin1"))
    with pytest.raises(IntegrityError, match=r"a.csv is not UTF-8 \(line 3: byte 0xf6\); save it as UTF-8"):
        read_file(path)
    path.write_bytes("text,label\nschön,b\n".encode("utf-8-sig"))  # as spreadsheets write it
    assert read_file(path).parts[""] == [{"text": "schön", "label": "b"}]


def test_a_packed_file_and_a_line_longer_than_what_is_looked_at(tmp_path):
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(b"text,label\n" + b"x" * 100_000 + b",a\n"))
    assert isinstance(read_file(path), Records)
    (tmp_path / "b.jsonl").write_text('{"text": "' + "ü" * 100_000 + '", "label": "a"}\n')
    assert len(read_file(tmp_path / "b.jsonl").parts[""]) == 1


def test_an_end_is_read_by_one_function():
    with pytest.raises(ConfigError, match="file_kind: .csv is taken by a CSV table"):
        file_kind("another table", ".csv")(print)
