"""Published tasks by name: their templates and words, and the files in which they come."""

from __future__ import annotations

import json
import pickle
import sys
from types import SimpleNamespace

import pytest

from hatcl.data.pairs import Sentences
from hatcl.data.published import PUBLISHED_TASKS, published_files, published_task, read_published
from hatcl.data.texts import TextData, k_shot, read_texts
from hatcl.errors import ConfigError, IntegrityError

every = pytest.mark.parametrize("task", PUBLISHED_TASKS.values(), ids=PUBLISHED_TASKS)
NAMES = "sst-2 sst-5 mr cr mpqa subj trec cola mnli snli qnli rte mrpc qqp sts-b agnews".split()


def label_of(task, i):
    return f"{i % 6}.0" if task.bounds else list(task.words)[i % len(task.words)]


def shown(task, i):
    """What example i is read as."""
    if task.paired:
        return Sentences(f"First {i}.", f"Second {i}")
    return f"Text {i} more" if len(task.header) == 3 else f"Text {i}"


def written(task, folder, part, count, label=True, start=0):
    """A part as it is published: a .tsv with a first line, or lines without one."""
    texts = [list(shown(task, i).parts) if task.paired else [f"Text {i}"] for i in range(start, start + count)]
    if not task.paired and len(task.header) == 3:
        texts = [[*row, "more"] for row in texts]
    back = {new: old for old, new in task.renamed.items()}
    labels = [back.get(label_of(task, i), label_of(task, i)) for i in range(start, start + count)]
    if isinstance(task.header[0], str):
        names = [*task.header[:-1], *([task.header[-1]] if label else [])]
        rows = [
            ["index", *names],
            *([str(i), *x, *([y] if label else [])] for i, (x, y) in enumerate(zip(texts, labels, strict=True))),
        ]
        (folder / f"{part}.tsv").write_text("".join("\t".join(r) + "\n" for r in rows))
        return
    rows = []
    for x, y in zip(texts, labels, strict=True):
        row = ["-"] * (1 + max(task.header))
        for place, value in zip(task.header, [*x, y], strict=True):
            row[place] = value
        rows.append(row)
    end, between = (".tsv", "\t") if task.name == "cola" else (".csv", ",")
    (folder / f"{part}{end}").write_text("".join(between.join(r) + "\n" for r in rows))


def test_every_task_of_the_papers_is_there():
    assert list(PUBLISHED_TASKS) == NAMES
    assert published_task("SST-2") is published_task("sst2") is published_task("Sst_2") is PUBLISHED_TASKS["sst-2"]
    with pytest.raises(ConfigError, match="task: got 'rta', expected one of sst-2, .*did you mean 'rte'"):
        published_task("rta")


@every
def test_a_task_as_published(task):
    assert task.template.count("{mask}") == 1 and task.template.count("{text") == 1 + task.paired
    assert len(task.header) >= 2 + task.paired and len(set(task.words.values())) == len(task.words)
    assert task.measure in ("accuracy", "f1", "mcc", "pearson")
    assert (task.measure == "pearson") == (task.bounds is not None)
    if task.hub is not None:
        assert len(task.hub.columns) == 2 + task.paired
        assert set(task.hub.labels) <= set(task.words)


@every
def test_the_folder_of_few_shots(task, tmp_path):
    for start, part in ((0, "train"), (12, "dev"), (24, "test")):
        written(task, tmp_path, part, 12, start=start)
    data = read_published(task, tmp_path)
    assert data.train == [(shown(task, i), label_of(task, i)) for i in range(12)]
    assert data.validation == [(shown(task, i), label_of(task, i)) for i in range(12, 24)]
    assert data.test == [(shown(task, i), label_of(task, i)) for i in range(24, 36)]
    assert len(published_files(tmp_path)) == 3
    if task.paired:
        assert all(x.parts == shown(task, i).parts for i, (x, _) in enumerate(data.train))


def test_a_test_part_that_is_kept_secret_is_replaced_by_the_dev_part(tmp_path):
    task = PUBLISHED_TASKS["rte"]
    written(task, tmp_path, "train", 40)
    written(task, tmp_path, "dev", 6, start=40)
    written(task, tmp_path, "test", 6, label=False, start=50)
    data = read_published(task, tmp_path)
    assert (len(data.train), len(data.validation), len(data.test)) == (40, 0, 6)
    few = k_shot(data, 4, 0, list(task.words))
    assert (len(few.train), len(few.validation), len(few.test)) == (8, 8, 6)
    (tmp_path / "dev.tsv").rename(tmp_path / "dev_matched.tsv")
    assert read_published(task, tmp_path).test == data.test


def test_rows_without_a_label_and_rows_that_lack_columns(tmp_path):
    task = PUBLISHED_TASKS["snli"]
    head = "sentence1\tsentence2\tgold_label\n"
    row = "A dog.\tA cat\tneutral\n"
    (tmp_path / "dev.tsv").write_text(head + row)
    (tmp_path / "train.tsv").write_text(head + row * 2000 + "A.\tB\t-\n" + "A dog.\n")
    assert len(read_published(task, tmp_path).train) == 2000  # nobody agreed on one; one row is broken
    (tmp_path / "train.tsv").write_text(head + row * 100 + "A dog.\n")
    with pytest.raises(ConfigError, match="train.tsv: 1 of 102 rows have fewer than 3 columns; is it a file of snli"):
        read_published(task, tmp_path)
    (tmp_path / "train.tsv").write_text("sentence1\tlabel\n")
    with pytest.raises(ConfigError, match="the columns sentence1, label; snli needs sentence1, sentence2, gold_label"):
        read_published(task, tmp_path)
    (tmp_path / "train.tsv").write_bytes(b"\xff\xfe")
    with pytest.raises(IntegrityError, match="train.tsv cannot be read"):
        read_published(task, tmp_path)


def test_separators_of_lines_inside_a_text_are_no_lines(tmp_path):
    for part in ("train", "dev"):
        (tmp_path / f"{part}.tsv").write_text("sentence\tlabel\na \x85 b \u2028 c\t1\n")
        (tmp_path / f"{part}.csv").write_text("")
    assert read_published(PUBLISHED_TASKS["sst-2"], tmp_path).train == [("a \x85 b \u2028 c", "1")]
    (tmp_path / "train.tsv").unlink()
    (tmp_path / "dev.tsv").unlink()
    for part in ("train", "dev"):
        (tmp_path / f"{part}.csv").write_text('1,"a ""fine"", long\nfilm"\n')
    assert read_published(PUBLISHED_TASKS["mr"], tmp_path).train == [('a "fine", long\nfilm', "1")]


def test_what_is_not_the_tasks(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no train part of rte \(.tsv or .csv\)"):
        read_published(PUBLISHED_TASKS["rte"], tmp_path)
    path = tmp_path / "rte.json"
    path.write_text(json.dumps({"train": [["A dog.", "entailment"]], "test": [["A dog.", "entailment"]]}))
    with pytest.raises(ConfigError, match="task rte: 'A dog.' is one sentence, but its template has two; give rows of"):
        read_published(PUBLISHED_TASKS["rte"], path)
    path.write_text(json.dumps({"train": [["A dog.", "A cat", "True"]], "test": [["A dog.", "B", "entailment"]]}))
    with pytest.raises(ConfigError, match="has the label 'True', expected one of not_entailment, entailment"):
        read_published(PUBLISHED_TASKS["rte"], path)
    path.write_text(json.dumps({"train": [["A dog.", "A cat", 5.5]], "test": [["A dog.", "B", 1]]}))
    with pytest.raises(ConfigError, match="task sts-b, score: got 5.5, expected a number between 0 and 5"):
        read_published(PUBLISHED_TASKS["sts-b"], path)


def test_few_shots_of_a_regression_are_of_both_halves(tmp_path):
    task = PUBLISHED_TASKS["sts-b"]
    rows = [(Sentences(f"a {i}", f"b {i}"), str(i / 10)) for i in range(51)]
    few = k_shot(TextData(rows, [], rows[:1]), 4, 0, list(task.words), task.half)
    assert sorted(float(y) > 2.5 for _, y in few.train) == [False] * 4 + [True] * 4
    assert task.half("2.5") == "0" and task.half("2.6") == "1"


def test_sentences_are_a_text_that_knows_both():
    pair = Sentences("a\nb", "c")
    assert pair == "a\nb\nc" and pair.parts == ("a\nb", "c")
    again = pickle.loads(pickle.dumps(pair))
    assert type(again) is Sentences and again.parts == pair.parts


def test_rows_of_three_are_sentences(tmp_path):
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps({"train": [["a", "b", "1"], ["c", "0"]], "test": [["a", "b", "1"]]}))
    data = read_texts(path)
    assert data.train == [("a\nb", "1"), ("c", "0")]
    assert data.train[0][0].parts == ("a", "b") and not isinstance(data.train[1][0], Sentences)


# --- the hub ---


def rows_on_hub(task, count, secret=False):
    out = []
    for i in range(count):
        label = label_of(task, i)
        label = task.hub.labels.index(label) if task.hub.labels else float(label) if task.bounds else int(label)
        texts = shown(task, i).parts if task.paired else [f"Text {i}"]
        out.append(dict(zip(task.hub.columns, [*texts, -1 if secret else label], strict=True)))
    return out


@pytest.mark.parametrize(
    "task", [t for t in PUBLISHED_TASKS.values() if t.hub], ids=[t.name for t in PUBLISHED_TASKS.values() if t.hub]
)
def test_the_hubs_copy(task, monkeypatch):
    asked = []

    def load_dataset(path, config):
        asked.append((path, config))
        secret = {"test": rows_on_hub(task, 3, secret=True)}
        return {"train": rows_on_hub(task, 7), "validation": rows_on_hub(task, 5), **secret}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    data = read_published(task, None)
    assert asked == [(task.hub.path, task.hub.config)]
    texts = [shown(task, i) if task.paired else f"Text {i}" for i in range(7)]
    assert data.train == [(texts[i], label_of(task, i)) for i in range(7)]
    assert len(data.test) == 5 and not data.validation


def test_no_hub(monkeypatch):
    with pytest.raises(ConfigError, match="data: cr cannot be read from a hub; give your copy of it"):
        read_published(PUBLISHED_TASKS["cr"], None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ConfigError,
        match=r"to read nyu-mll/glue from the hub needs .*pip install 'hatcl\[data\]', or give your copy of rte",
    ):
        read_published(PUBLISHED_TASKS["rte"], None)

    def load_dataset(path, config):
        raise ConnectionError("no way there\nat all")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(ConfigError, match=r"datasets cannot load nyu-mll/glue \(no way there\); give your copy of rte"):
        read_published(PUBLISHED_TASKS["rte"], None)
