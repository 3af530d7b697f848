"""Tables: their columns, parts and tasks, in every format."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from data_parts import SAID, write_table
from hypothesis import given, settings
from hypothesis import strategies as st

from hatcl.data.places import DataOptions, TaskPlace
from hatcl.data.records import ROLES, Records, cut_in_three, load_hub, part_named, read_folder, read_hub
from hatcl.data.texts import read_texts, texts_of
from hatcl.errors import ConfigError, IntegrityError

ENDS = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
every_end = pytest.mark.parametrize("end", ENDS)


@pytest.fixture(autouse=True)
def installed():
    pytest.importorskip("datasets")


@every_end
def test_every_format_gives_the_same_pairs(tmp_path, end):
    data = read_texts(write_table(tmp_path / f"a{end}", SAID))
    assert sorted(data.train + data.validation + data.test) == sorted((row["text"], row["label"]) for row in SAID)
    assert (len(data.train), len(data.validation), len(data.test)) == (16, 2, 2)
    assert data.digest() == read_texts(write_table(tmp_path / "same.csv", SAID)).digest()


@every_end
def test_a_folder_of_parts_and_a_column_of_them(tmp_path, end):
    for part, rows in (("train", SAID[:12]), ("dev", SAID[12:14]), ("test", SAID[14:])):
        write_table(tmp_path / "parts" / f"{part}{end}", rows)
    of_folder = read_texts(tmp_path / "parts")
    assert (len(of_folder.train), len(of_folder.validation), len(of_folder.test)) == (12, 2, 6)
    if end != ".json":  # of which benchmarks have forms of their own, see read_parts
        assert read_texts(tmp_path / "parts" / f"train{end}") == of_folder
    names = ["train"] * 12 + ["valid"] * 2 + ["test"] * 6
    rows = [{**row, "split": part} for row, part in zip(SAID, names, strict=True)]
    assert read_texts(write_table(tmp_path / f"a{end}", rows)) == of_folder


def test_a_table_called_train_does_not_lose_its_other_parts(tmp_path):
    path = write_table(tmp_path / "train.csv", SAID)
    with pytest.raises(ConfigError, match="is called train and has no test next to it; add one, or give its fold"):
        read_texts(path)
    assert len(read_texts(tmp_path).test) == 2
    write_table(tmp_path / "test.csv", SAID[:3])
    assert len(read_texts(path).test) == 3


def test_what_datasets_has_saved(tmp_path):
    import datasets

    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    rows = {"sentence": [f"w{i}" for i in range(10)], "label": [i % 2 for i in range(10)]}
    whole = datasets.Dataset.from_dict(rows, features=features)
    whole.save_to_disk(tmp_path / "one")
    assert set(read_texts(tmp_path / "one").labels) == {"no", "yes"}
    secret = datasets.Dataset.from_dict({**rows, "label": [-1] * 10}, features=features)
    for name, parts in {
        "three": {"train": whole, "validation": whole.select([0, 1]), "test": whole.select([2])},
        "hidden": {"train": whole, "validation": whole.select([0, 1]), "test": secret},
    }.items():
        datasets.DatasetDict(parts).save_to_disk(tmp_path / name)
    three, hidden = read_texts(tmp_path / "three"), read_texts(tmp_path / "hidden")
    assert (three.validation, three.test) == ([("w0", "no"), ("w1", "yes")], [("w2", "no")])
    assert hidden.test == [("w0", "no"), ("w1", "yes")] and hidden.validation == []  # labels that are kept secret
    some = datasets.Dataset.from_dict({**rows, "label": [0, -1] * 5}, features=features)
    datasets.DatasetDict({"train": some, "test": whole}).save_to_disk(tmp_path / "some")
    with pytest.raises(
        ConfigError, match=r"has the label -1 in train, expected 0 to 1 \(no, yes\); leave such rows out"
    ):
        read_texts(tmp_path / "some")
    datasets.DatasetDict({"unsupervised": whole}).save_to_disk(tmp_path / "none")
    with pytest.raises(ConfigError, match="has the parts unsupervised; expected train and test"):
        read_folder(tmp_path / "none")
    whole.to_parquet(str(tmp_path / "a.parquet"))  # keeps the names of the classes
    assert set(read_texts(tmp_path / "a.parquet").labels) == {"no", "yes"}


def test_shards_of_a_part_are_one(tmp_path):
    for i in range(2):
        write_table(tmp_path / "data" / f"train-0000{i}-of-00002.parquet", SAID[8 * i : 8 * i + 8])
        write_table(tmp_path / "lines" / f"train-{i}.jsonl", SAID[8 * i : 8 * i + 8])
    write_table(tmp_path / "data" / "test-00000-of-00001.parquet", SAID[16:])
    write_table(tmp_path / "lines" / "test.jsonl", SAID[16:])
    assert read_folder(tmp_path).where.parent == tmp_path / "data"  # from where paths in it lead
    assert read_texts(tmp_path) == read_texts(tmp_path / "lines") and len(read_texts(tmp_path).train) == 16


def test_by_name_from_the_hub(tmp_path, monkeypatch):
    import datasets

    given = []

    def load(name, config):
        given.append((name, config))
        return datasets.DatasetDict(
            {"train": datasets.Dataset.from_list(SAID), "test": datasets.Dataset.from_list(SAID)}
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    for text, name in (("hf:org/said", "said"), ("hf:org/said:en", "said_en"), ("x=hf:org/said", "x")):
        (found,) = TaskPlace.parsed(text).absolute().read(DataOptions()).items()
        assert found[0] == name and len(found[1].train) == 20
    assert given == [("org/said", None), ("org/said", "en"), ("org/said", None)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: (_ for _ in ()).throw(ConnectionError("no way there")))
    with pytest.raises(
        ConfigError, match=r"datasets cannot load org/said \(no way there\); give your own file or folder"
    ):
        read_hub("org/said")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(
        ConfigError, match=r"to read org/said from the hub needs datasets; run: pip install 'hatcl\[data\]"
    ):
        load_hub("org/said", None, "x")


def test_tasks_by_a_column(tmp_path):
    rows = [{**row, "task": "two" if i < 8 else "one"} for i, row in enumerate(SAID)]
    path = write_table(tmp_path / "all.csv", rows)
    found = TaskPlace.parsed(f"mine={path}").read(DataOptions())
    assert list(found) == ["mine two", "mine one"]  # in the order of the file
    assert [len(d.train) + len(d.validation) + len(d.test) for d in found.values()] == [8, 12]
    again = TaskPlace.parsed(str(path)).read(DataOptions(column={"task": "label"}))
    assert list(again) == ["all warm", "all cold"]


def test_columns_that_are_called_otherwise(tmp_path):
    path = write_table(tmp_path / "a.csv", [{"body": r["text"], "mood": r["label"], "text": "x"} for r in SAID])
    place = TaskPlace.parsed(json.dumps({"data": str(path), "column": {"text": "body", "label": "mood"}}))
    (data,) = place.read(DataOptions()).values()
    assert data.labels == ["cold", "warm"] and data.train[0][0].startswith("w")
    assert TaskPlace.parsed(place.absolute().written()) == place.absolute()
    with pytest.raises(
        ConfigError, match="column text=bodi: .* has no column 'bodi'; it has body, mood, text; did you"
    ):
        TaskPlace.parsed(str(path)).read(DataOptions(column={"text": "bodi", "label": "mood"}))
    with pytest.raises(
        ConfigError, match="has the columns body, mood, text, which are not texts with outputs; expected te"
    ):
        TaskPlace.parsed(str(path)).read(DataOptions())


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "text,text\na,b\n", "names in its first line are 'text', 'text'; expected each once, and none empty"),
        ("a.csv", "text,label\na\n", r"record 2 has 1 columns, expected the 2 of the first line \(text, label\)"),
        ("a.csv", "text,label\n", "a.csv has no rows"),
        (
            "a.csv",
            "text,label,split\na,b,trian\n",
            r"row\[0\] has 'trian' in the column 'split'; expected train, valid",
        ),
        ("a.csv", "text,label,split\na,b,test\n", "the column 'split' has no train"),
        ("a.csv", "text,label\na,b\n", "has 1 rows in one piece, too few to take some for the test; give a test part"),
        ("a.jsonl", '{"text": "a", "label": "b"}\n{"text": "a"}\n', r"row\[1\] has nothing in the column 'label'"),
        (
            "a.jsonl",
            3 * '{"text": "a", "label": {"b": 1}}\n',
            "in the column 'label' is a dict, expected a text or a num",
        ),
        ("a.jsonl", "[1]\n[2]\n", r"a.jsonl: line 1 is '\[1\]', expected an object with named values"),
        ("train.json", '{"text": 1}', "train.json holds text; expected train and test"),
    ],
)
def test_tables_that_are_none(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    if name.startswith("train"):
        write_table(tmp_path / "test.json", SAID)
    with pytest.raises(ConfigError, match=words):
        read_texts(tmp_path / name)


def test_damaged_tables(tmp_path):
    for name, content, words in (
        ("a.csv", b'text,label\n"a,b\n', "cannot be read as CSV .*is it complete and correctly quoted"),
        (
            "a.jsonl",
            b'{"text": "a", "label": "b"}\n{"text": \n',
            "line 2 cannot be read as JSON .*an object in each line",
        ),
        ("a.parquet", b"PAR1 and no more", "a.parquet cannot be read as Parquet .*is the file complete"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(IntegrityError, match=words):
            read_texts(tmp_path / name)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    with pytest.raises(IntegrityError, match="saved cannot be read by datasets"):
        read_folder(tmp_path / "saved")
    write_table(tmp_path / "two" / "train.csv", SAID)
    write_table(tmp_path / "two" / "train.jsonl", SAID)
    with pytest.raises(ConfigError, match="has train.csv and train.jsonl for train; keep one of them"):
        read_folder(tmp_path / "two")
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match="none holds no table of records; expected train and test as .csv"):
        read_folder(tmp_path / "none")


@settings(deadline=None)
@given(st.lists(st.sampled_from("abc"), max_size=80), st.integers(0, 5))
def test_a_table_is_cut_without_loss_and_of_each_class(labels, seed):
    parts = cut_in_three(labels, seed)
    assert sorted(i for ids in parts.values() for i in ids) == list(range(len(labels)))
    counts = {part: Counter(labels[i] for i in ids) for part, ids in parts.items()}
    for label, n in Counter(labels).items():
        assert counts["train"][label] >= 1 and counts["test"][label] == counts["validation"][label]
        assert counts["test"][label] == (max(1, round(0.1 * n)) if n > 2 else 0)
    assert parts == cut_in_three(labels, seed)


def test_roles_are_found_by_every_name_and_parts_too():
    for role, names in ROLES.items():
        for name in names:
            records = Records(None, {"": [{name.upper(): 1}]})
            assert records.called(role) == name.upper()
    assert [part_named(n) for n in ("Train", "dev", "val", "eval", "test", "extra")] == [
        "train", "validation", "validation", "validation", "test", None
    ]  # fmt: skip


def test_the_cut_follows_the_seed():
    records = Records(None, {"": SAID})
    assert texts_of(records, 1) == texts_of(records, 1) != texts_of(records, 2)


def test_validation_is_never_of_the_test(tmp_path):
    data = read_texts(write_table(tmp_path / "a.csv", SAID))
    own = data.on_validation(3)
    assert own.train == data.train and own.test == own.validation == data.validation
    write_table(tmp_path / "p" / "train.csv", SAID)
    write_table(tmp_path / "p" / "test.csv", [{"text": "t", "label": "warm"}])
    taken = read_texts(tmp_path / "p").on_validation(3)
    assert len(taken.test) == 2 and sorted(taken.train + taken.test) == sorted((r["text"], r["label"]) for r in SAID)
    write_table(tmp_path / "q" / "train.csv", SAID[:3])
    write_table(tmp_path / "q" / "test.csv", SAID)
    with pytest.raises(ConfigError, match="a share of 0.1 of 3 training examples is less than one"):
        read_texts(tmp_path / "q").on_validation()
