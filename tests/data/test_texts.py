"""Reading text tasks from files of every form."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from hatcl.continual import TextData, Turn, read_texts
from hatcl.errors import ConfigError, IntegrityError

DATA = Path(os.environ.get("HATCL_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))
PAIRS = [[f"text {i}", "ab"[i % 2]] for i in range(10)]
IDX = "\n".join(f"d|||d|||{i // 2}|||none|||trains|||slot{i % 2}" for i in range(10))


def written(folder, content, name="a.json"):
    path = folder / name
    raw = json.dumps(content).encode()
    path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    return path


def test_pairs(tmp_path):
    for name in ("a.json", "a.json.gz"):
        data = read_texts(written(tmp_path, {"train": PAIRS, "dev": PAIRS[:2], "test": PAIRS[2:4]}, name))
        assert data.train[1] == ("text 1", "b") and len(data.validation) == len(data.test) == 2
        assert data.labels == ["a", "b"] and data.turns == []


def test_dialogues(tmp_path):
    rows = [["track it", f"text {i}", "v"] for i in range(10)]
    data = read_texts(written(tmp_path, {"train": rows, "test": rows, "test_idx": IDX}))
    assert data.train[0] == ("track it\ntext 0", "v")
    assert data.turns[3] == Turn("d", "1", "trains") and len(data.turns) == 10
    assert len(data.cut(test=5).test) == 4  # the third turn would be cut in two
    assert len(data.cut(test=1).test) == 2
    assert data.cut(test=5).turns == data.turns[:4]
    mixed = TextData(data.train, [], [("a", "1"), ("b", "2"), ("c", "3")], [Turn("d", t, "s") for t in "121"])
    assert mixed.cut(test=2).test == [("a", "1"), ("c", "3")]  # a turn is whole wherever its rows are


def test_few_shots_and_one_list(tmp_path):
    shots = {"13": {"train": PAIRS[:2], "dev": PAIRS[2:4]}, "21": {"train": PAIRS[4:6], "dev": []}}
    path = written(tmp_path, {"seeds": shots, "test": PAIRS})
    assert read_texts(path).train == [("text 0", "a"), ("text 1", "b")]
    assert read_texts(path, shots_seed=21).train[0] == ("text 4", "a")
    with pytest.raises(ConfigError, match="has no seed 5, expected one of 13, 21"):
        read_texts(path, shots_seed=5)
    path = written(tmp_path, {"all": PAIRS}, "b.json")
    one, two = read_texts(path), read_texts(path, seed=1)
    assert (len(one.train), len(one.validation), len(one.test)) == (8, 1, 1)
    assert sorted(one.train + one.validation + one.test) == sorted((x, y) for x, y in PAIRS)
    assert one.train != two.train and read_texts(path).train == one.train


def test_cut_plain_and_renamed():
    row = ("What is it? Choose.\nText: good film\nAnswer:", "Good")
    data = TextData([row] * 9, [row], [row, ("one line", "Bad")])
    assert data.plain().train[0] == ("Text: good film", "Good")
    assert data.plain().test[1] == ("one line", "Bad")
    assert data.plain(drop_question=False).train[0][0] == "What is it? Choose.\nText: good film"
    assert data.renamed({"Good": "fine", "Bad": "poor"}).test[1] == ("one line", "poor")
    with pytest.raises(ConfigError, match="'Bad' has no word; words are given for Good"):
        data.renamed({"Good": "fine"})
    some = TextData([(str(i), "a") for i in range(10)], [], [("t", "a")]).cut(train=4)
    assert [x for x, _ in some.train] == ["0", "2", "6", "9"]  # drawn once for all, in their order
    with pytest.raises(ConfigError, match="train: got 0"):
        data.cut(train=0)


@pytest.mark.parametrize(
    "content, message",
    [
        ([1], "got a list, expected an object with train and test"),
        ({"train": PAIRS}, "holds train; expected train and test, or all"),
        ({"train": [], "test": PAIRS}, "train is empty"),
        ({"train": [["a"]], "test": PAIRS}, r"train\[0\] is .*, expected \[input, output\]"),
        ({"train": PAIRS, "test": PAIRS, "test_idx": "a|||b"}, "test_idx has 1 lines for 10 test rows"),
        ({"train": PAIRS, "test": PAIRS, "test_idx": ["a|||b"]}, "test_idx is a list, expected one text with a line"),
        ({"train": [["x", None]], "test": PAIRS}, r"train.0. holds 'None', expected texts and numbers"),
        ({"train": PAIRS, "test": PAIRS[:1], "test_idx": "a|||b"}, "a line of 2 parts .a...b., expected 6"),
    ],
)
def test_other_forms(tmp_path, content, message):
    with pytest.raises(ConfigError, match=message):
        read_texts(written(tmp_path, content))


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "a.json.gz").write_bytes(b"{}")
    for name in ("a.json.gz", "none.json"):
        with pytest.raises(IntegrityError, match=f"{name} cannot be read .*is the path right, and the file complete"):
            read_texts(tmp_path / name)
    whole = bytearray(gzip.compress(b"{}" * 100))
    whole[12] ^= 255
    (tmp_path / "b.json.gz").write_bytes(whole)
    with pytest.raises(IntegrityError, match="b.json.gz cannot be read .*is the path right, and the file complete"):
        read_texts(tmp_path / "b.json.gz")
    (tmp_path / "c.json").write_text("[" * 50_000)
    with pytest.raises(IntegrityError, match="c.json cannot be read as JSON .it is nested too deeply"):
        read_texts(tmp_path / "c.json")


@pytest.mark.parametrize(
    "name, sizes, labels",
    [
        ("text_longseq/sst-2", (1000, 500, 872), 2),
        ("text_longseq/agnews", (1000, 500, 1000), 4),
        ("text_fewshot16/sst-5", (80, 80, 2210), 5),
        ("text_sst2/subj", (8000, 1000, 1000), 2),
        ("text_dst/sgd_trains_1", (1761, 0, 529), None),
    ],
)
def test_the_real_files(name, sizes, labels):
    path = DATA / f"{name}.json.gz"
    if not path.exists():
        pytest.skip(f"no {name}.json.gz under HATCL_DATA")
    data = read_texts(path)
    assert (len(data.train), len(data.validation), len(data.test)) == sizes
    assert labels is None or len(data.labels) == labels
    assert len(data.turns) == (sizes[2] if "dst" in name else 0)
