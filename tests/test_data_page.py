"""Every command line of docs/data.md runs, on small files of the kinds that it names."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from command_parts import call
from data_parts import SAID, class_folders, picture, write_table

PAGE = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
LINES = [line for block in re.findall(r"^```bash\n(.*?)^```", PAGE, flags=re.M | re.S) for line in block.splitlines()]
QUICK = ["--max-steps", "2", "--device", "cpu", "--batch-size", "4", "--output", "run"]
TEMPLATE = "{% for m in messages %}{{ 'ask ' if m.role == 'user' else 'warm ' }}{{ m.content }} {% endfor %}"


def labelled(folder: Path, labels: list, **columns: list) -> list[dict]:
    for i in range(len(labels)):
        picture(folder / "pics" / f"{i}.png", i % 2 == 0, seed=i)
    more = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)] or [{}] * 99
    return [
        {"path": f"pics/{i}.png", "label": label, "split": part, **extra}
        for part in ("train", "test")
        for i, (label, extra) in enumerate(zip(labels, more, strict=False))
    ]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """All that the page names."""
    pytest.importorskip("peft")
    datasets = pytest.importorskip("datasets")
    from continual_parts import bert, causal_lm, tokenizer

    folder = tmp_path_factory.mktemp("page")
    x, y = np.random.default_rng(0).integers(0, 256, (8, 16, 16), dtype=np.uint8), np.arange(8) % 2
    np.savez(folder / "birds.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    class_folders(folder / "pets", ["cat", "dog"], 4, ("train", "val", "test"))
    class_folders(folder / "folders", ["cat", "crow", "dog", "robin"], 4)
    write_table(folder / "cars.csv", labelled(folder, ["old", "new"] * 4))
    write_table(folder / "all.csv", labelled(folder, ["a", "b"] * 4, task=["one"] * 4 + ["two"] * 4))
    write_table(folder / "several.csv", labelled(folder, ["red|round", "round", "red", "red"]))
    write_table(folder / "ages.csv", labelled(folder, [3, 1, 4, 1]))
    write_table(folder / "attributes.csv", labelled(folder, ["-"] * 4, wings=[0, 1, 1, 0], legs=[1, 1, 0, 0]))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    content = [{"bytes": (folder / "pics" / f"{i % 8}.png").read_bytes(), "path": None} for i in range(12)]
    rows = datasets.Dataset.from_dict({"image": content, "label": [0, 1] * 6}, features=features)
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(folder / "saved")
    write_table(folder / "films.csv", SAID)
    write_table(folder / "pairs.tsv", [{"sentence1": "w1", "sentence2": "w2", "label": r["label"]} for r in SAID])
    for part in ("train", "test"):
        write_table(folder / "films" / f"{part}.jsonl", [{"body": r["text"], "mood": r["label"]} for r in SAID])
    write_table(folder / "mine.parquet", [{"body": r["text"], "mood": r["label"]} for r in SAID])
    write_table(folder / "instructions.json", [{"instruction": "ask", "input": "", "output": "red"}] * 10)
    said = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "red"}]
    write_table(folder / "chats.jsonl", [{"messages": said}] * 10)
    words = tokenizer()
    for name, model in (("MODEL", bert()), ("WRITER", causal_lm())):
        model.save_pretrained(folder / name)
        words.save_pretrained(folder / name)
    (folder / "WRITER" / "chat_template.jinja").write_text(TEMPLATE)
    for name, content in re.findall(r"^```yaml\n# (\S+)\n(.*?)^```", PAGE, flags=re.M | re.S):
        (folder / name).write_text(content)
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("line", LINES)
def test_a_line_of_the_page_runs(files, tmp_path, monkeypatch, capsys, line):
    program, *args = shlex.split(line)
    assert program == "hatcl"
    monkeypatch.chdir(files)
    code, _, err = call(capsys, *args, *QUICK[:-1], tmp_path / "run")
    assert code == 0, err
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["tasks"] and all(len(task["digest"]) == 64 for task in stored["tasks"])
    if "--config" in args:
        assert [task["name"] for task in stored["tasks"]] == ["cats and dogs", "birds", "pets"]
        assert json.loads(stored["options"]["task"][0])["classes"] == ["dog", "cat"]


def test_the_page_has_lines():
    assert len(LINES) >= 10 and all(line.startswith("hatcl ") for line in LINES)
