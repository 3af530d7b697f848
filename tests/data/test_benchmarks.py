"""Benchmarks by name, in the forms in which people have them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hatcl.data.benchmarks import BENCHMARKS, benchmark_files, general_ability, read_benchmark
from hatcl.data.texts import read_texts
from hatcl.errors import ConfigError, IntegrityError

DATA = Path(os.environ.get("HATCL_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))
ROWS = {"train": 3, "eval": 2, "test": 1}


def rows(task, part):
    return [(f"{task} {part} {i}", f"answer {i}") for i in range(ROWS[part])]


def written(folder, task, form):
    """The task as TRACE, O-LoRA or TaSL has it."""
    for part in ROWS:
        pairs = rows(task, part)
        name = {"eval": "dev"}.get(part, part)
        if form == "trace":
            path, content = folder / task / f"{part}.json", [{"prompt": x, "answer": y} for x, y in pairs]
        elif form == "olora":
            instances = [{"id": str(i), "input": x, "output": y} for i, (x, y) in enumerate(pairs)]
            path = folder / "TC" / task / f"{name}.json"
            content = {"Definition": ["Say it."], "Instances": instances}
        else:
            path = folder / name / f"{task}_T5.json"
            content = [{"instruction": "", "input": x, "output": y} for x, y in pairs]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))


@pytest.mark.parametrize("form", ["trace", "olora", "tasl"])
@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_order_in_every_form(name, form, tmp_path):
    benchmark = BENCHMARKS[name]
    for task in set().union(*benchmark.orders.values()):
        written(tmp_path, task, form)
    before = "Say it.\n" if form == "olora" else ""
    for number, tasks in benchmark.orders.items():
        found = read_benchmark(name, tmp_path, order=number)
        assert list(found) == list(tasks)
        for task, data in found.items():
            parts = zip((data.train, data.validation, data.test), ROWS, strict=True)
            assert all(got == [(before + x, y) for x, y in rows(task, part)] for got, part in parts)
        files = benchmark_files(name, tmp_path, order=number)
        assert {task: read_texts(path) for task, path in files.items()} == found


def test_the_orders_are_permutations_and_the_measures_of_their_tasks():
    from hatcl.continual.text_scores import TEXT_SCORES

    long = BENCHMARKS["long_sequence"]
    assert {len(set(long.order(k))) for k in (1, 2, 3)} == {15} and len(
        {frozenset(long.order(k)) for k in (1, 2, 3)}
    ) == 1
    assert {frozenset(long.order(k)) for k in (4, 5, 6)} == {frozenset({"dbpedia", "amazon", "yahoo", "agnews"})}
    assert len(BENCHMARKS["trace"].order(None)) == 8
    for benchmark in BENCHMARKS.values():
        tasks = set().union(*benchmark.orders.values())
        assert set(benchmark.measures) <= tasks and {benchmark.measure(t) for t in tasks} <= set(TEXT_SCORES)


def test_what_is_not_there(tmp_path):
    written(tmp_path, "FOMC", "trace")
    with pytest.raises(
        ConfigError,
        match=r"has no C-STANCE, MeetingBank, .*name the available tasks \(only=\['FOMC'\]; on the command",
    ):
        read_benchmark("trace", tmp_path)
    assert list(read_benchmark("trace", tmp_path, only=["FOMC"])) == ["FOMC"]
    with pytest.raises(ConfigError, match="only: got 'FOMD', expected one of C-STANCE, .*did you mean 'FOMC'"):
        read_benchmark("trace", tmp_path, only=["FOMD"])
    with pytest.raises(
        ConfigError, match="order: got 7, expected one of 1, 2, 3, 4, 5, 6, the numbers of long_sequence"
    ):
        read_benchmark("long_sequence", tmp_path, order=7)
    with pytest.raises(ConfigError, match="benchmark: got 'tracy', expected one of long_sequence, trace"):
        read_benchmark("tracy", tmp_path)
    path = tmp_path / "FOMC" / "train.json"
    for content, words in (
        ('{"a": 1}', "got a dict, expected a list of examples, or Instances"),
        (
            '[{"prompt": "x"}]',
            "has the columns prompt, which are not texts with outputs; expected text and label,.*prompt and answer",
        ),
        ("[]", "train is empty"),
    ):
        path.write_text(content)
        with pytest.raises(ConfigError, match=words):
            read_benchmark("trace", tmp_path, only=["FOMC"])
    path.write_text("{")
    with pytest.raises(IntegrityError, match="train.json"):
        read_benchmark("trace", tmp_path, only=["FOMC"])


def test_the_five_tasks_at_hand():
    folder = DATA / "text_longseq"
    if not folder.exists():
        pytest.skip("no text_longseq under HATCL_DATA")
    mine = ["amazon", "agnews", "sst-2", "qqp", "rte"]
    found = read_benchmark("long_sequence", folder, order=2, only=mine)
    assert list(found) == ["qqp", "rte", "sst-2", "agnews", "amazon"]
    assert {name: len(data.train) for name, data in found.items()} == dict.fromkeys(found, 1000)
    with pytest.raises(ConfigError, match="has no mnli, cb, wic, copa, boolqa, imdb, yelp, dbpedia, multirc, yahoo of"):
        read_benchmark("long_sequence", folder)


def test_the_general_ability_delta():
    assert general_ability({"mmlu": 0.4, "bbh": 0.3}, {"mmlu": 0.3, "bbh": 0.5}) == pytest.approx(0.05)
    for after in ({}, {"mmlu": 0.3}):
        with pytest.raises(ConfigError, match="general_ability: got scores for bbh, mmlu before and for"):
            general_ability({"mmlu": 0.4, "bbh": 0.3}, after)
    with pytest.raises(ConfigError, match="got scores for nothing before"):
        general_ability({}, {})


@pytest.mark.parametrize("form", ["trace", "olora"])
def test_one_task_by_its_train_json(form, tmp_path):
    """So that `hatcl train --task FOMC=TRACE/FOMC/train.json` finds the other parts."""
    written(tmp_path, "FOMC", form)
    path = next(tmp_path.rglob("train.json"))
    data = read_texts(path)
    before = "Say it.\n" if form == "olora" else ""
    assert data.test == [(before + x, y) for x, y in rows("FOMC", "test")] and len(data.validation) == 2
    (path.parent / "test.json").unlink()
    with pytest.raises(ConfigError, match="train.json has no test.json next to it, expected one of the same form"):
        read_texts(path)
