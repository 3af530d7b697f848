from __future__ import annotations

import copy
import csv
import json
import shutil
from pathlib import Path

import command_parts
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as tf

import hatcl
from hatcl import atlas
from hatcl.atlas import experiment
from hatcl.atlas.files import read_head
from hatcl.commands.atlas import _learning
from hatcl.data.images import Preparation, npz_task
from hatcl.engine.folder import RunFolder

NAME = "test_vit"
MODEL = ["--model", NAME, "--model-kwargs", "depth=1", "--size", "32", "--batch-size", "24", "--device", "cpu"]
BLOCKS = 18  # tensors of this model but its classifier
QUICK = ["--epochs", "2", "--lr", "0.05"]
A, B = "a=a.safetensors:a.npz", "b=b.safetensors:b.npz"
OTHERS = ["--vector", "a=a.safetensors", "--vector", "b=b.safetensors", "--data", "c.npz"]


def images(seed: int, classes: int, count: int, part: int) -> tuple[np.ndarray, np.ndarray]:
    """Grey images whose bright quarter tells the class; where it lies differs by task."""
    rng = np.random.default_rng([seed, part])
    y = np.arange(count) % classes
    x = rng.integers(0, 200, (count, 16, 16), dtype=np.uint8)
    for i, c in enumerate((y + seed) % 4):
        x[i, 8 * (c // 2) : 8 * (c // 2) + 8, 8 * (c % 2) : 8 * (c % 2) + 8] += 55
    return x, y


def finetuned(base: torch.nn.Module, task, classes: int) -> torch.nn.Module:
    """The encoder learned under a frozen head; the classifier, of another size, is left as it was drawn."""
    torch.manual_seed(classes)
    x, y = Preparation.of(task, size=32)(task.x_train), torch.from_numpy(task.y_train)
    head = atlas.trained_head(atlas.encoder(base), [(x, y)])
    model = copy.deepcopy(base)
    model.reset_classifier(classes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(10):
        optimizer.zero_grad()
        features = model.forward_head(model.forward_features(x), pre_logits=True)
        tf.cross_entropy(head(features), y).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base, a fine-tuned checkpoint, a saved task vector, and three data sets."""
    folder = tmp_path_factory.mktemp("atlas")
    torch.manual_seed(0)
    base = timm.create_model(NAME, depth=1, num_classes=5).eval()
    save_file(base.state_dict(), folder / "base.safetensors")
    for seed, (name, classes) in enumerate({"a": 2, "b": 3, "c": 2}.items()):
        (x, y), (x_test, y_test) = images(seed, classes, 60, 0), images(seed, classes, 24, 1)
        np.savez(folder / f"{name}.npz", x_train=x, y_train=y, x_test=x_test, y_test=y_test)
        model = finetuned(base, npz_task(folder / f"{name}.npz"), classes)
        if name == "a":
            save_file(model.state_dict(), folder / "a.safetensors")
        model.reset_classifier(5)
        hatcl.TaskVector.between(base, model).save(folder / f"{name}-vector.safetensors")
    shutil.copy(folder / "b-vector.safetensors", folder / "b.safetensors")
    return folder


@pytest.fixture
def here(made, monkeypatch):
    monkeypatch.chdir(made)
    return made


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """What was to be drawn; drawing costs more than the rest of a run here, so only one test does it."""
    asked: list[tuple] = []
    monkeypatch.setattr(_learning, "draw_coefficients", lambda *what: asked.append(what) or b"png")
    return asked


def call(capsys, *args: object) -> tuple[int, str, str]:
    """Exit code, output and errors of one command, line breaks of the terminal taken out."""
    code, out, err = command_parts.call(capsys, "atlas", *args)
    return code, " ".join(out.split()), err


def good(capsys, *args: object) -> str:
    code, out, err = call(capsys, *args)
    assert code == 0, err
    return out


def report_of(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def coefficients(folder: Path) -> torch.Tensor:
    return load_file(folder / "coefficients.safetensors")["coefficients"]


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


ADD = ("add", "base.safetensors", "--task", A, "--task", B, *MODEL, *QUICK)
NEGATE = ("negate", "base.safetensors", "--target", A, "--control", "b.npz", *MODEL, *QUICK)
FEW = ("few-shot", "base.safetensors", *OTHERS, *MODEL, *QUICK, "--shots", "4", "--steps", "2")
ADAPT = ("adapt", "base.safetensors", *OTHERS, *MODEL, *QUICK)
EVERY = {"add": ADD, "negate": NEGATE, "few-shot": FEW, "adapt": ADAPT}
FILES = {"config.json", "metrics.json", "heads.safetensors", "coefficients.safetensors", "coefficients.csv"}
FILES |= {"coefficients.png", "metrics.jsonl", "metrics.csv"}


# --- what a run leaves behind ---


def test_add_measures_what_its_files_hold(here, tmp_path, capsys):
    folder = tmp_path / "run"
    out = good(capsys, *ADD, "--merge", "--warm-start", "search", "--output", folder)
    assert left(folder) == FILES | {"merged.safetensors"}  # no checkpoint is left
    report = report_of(folder)
    rows = report["accuracy"]
    assert set(rows) == {"pretrained", "fine-tuned", "composed"} and set(rows["composed"]) == {"a", "b"}
    assert report["images"]["b"] == {"training": 48, "validation": 12, "test": 24}
    fitted = report["fitted"]["add"]
    assert fitted["pretrained"]["score"] <= fitted["start"]["score"] <= fitted["score"] and coefficients(folder).any()
    share = [rows["composed"][n]["validation"] / rows["fine-tuned"][n]["validation"] for n in "ab"]
    assert fitted["score"] == pytest.approx(sum(share) / 2, abs=1e-12)  # a sum of two floats in another order

    # the merged file, loaded by timm alone, has the accuracies that the report tells, and BASE's classifier
    model = timm.create_model(NAME, depth=1, num_classes=5)
    model.load_state_dict(load_file(folder / "merged.safetensors"))
    assert torch.equal(model.head.weight, load_file("base.safetensors")["head.weight"])
    for name in "ab":
        task = npz_task(f"{name}.npz")
        test = [(Preparation.of(task, size=32)(task.x_test), torch.from_numpy(task.y_test))]
        head = read_head(folder / "heads.safetensors", name)
        assert atlas.accuracy(atlas.encoder(model), test, head) == rows["composed"][name]["test"]
        assert f"{100 * rows['composed'][name]['test']:.1f} ({100 * rows['composed'][name]['validation']:.1f})" in out

    table = list(csv.DictReader((folder / "coefficients.csv").read_text().splitlines()))
    assert [float(row["value"]) for row in table] == coefficients(folder).flatten().tolist()
    assert table[0]["vector"] == "a" and table[-1]["vector"] == "b"
    assert {row["block"] for row in table} == {n for n, _ in model.named_parameters() if not n.startswith("head.")}


def test_the_heat_map_shows_the_coefficients(here, tmp_path, monkeypatch, capsys, drawn):
    pytest.importorskip("matplotlib")
    good(capsys, *FEW, "--grain", "row", "--output", tmp_path / "run")
    ((values, vectors, blocks),) = drawn
    assert vectors == ["a", "b"] and len(blocks) == BLOCKS
    lam = coefficients(tmp_path / "run")
    first = len(load_file("base.safetensors")[blocks[0]])  # rows of the first block
    assert values[1][0] == pytest.approx(float(lam[1, :first].mean()), abs=1e-7)  # float32, one rounding
    monkeypatch.undo()
    monkeypatch.chdir(here)
    good(capsys, *FEW, "--output", tmp_path / "drawn")
    assert (tmp_path / "drawn" / "coefficients.png").read_bytes().startswith(b"\x89PNG")

    def missing(*_):
        raise hatcl.errors.ConfigError("the picture needs matplotlib")

    monkeypatch.setattr(_learning, "draw_coefficients", missing)
    out = good(capsys, *FEW, "--output", tmp_path / "without")
    assert "no picture: the picture needs matplotlib" in out and "metrics.json" in left(tmp_path / "without")


def test_the_fine_tuned_row_is_the_fine_tuned_checkpoint(here, tmp_path, capsys):
    """Its classifier is of another size: a checkpoint's encoder is what counts."""
    good(capsys, *ADD, "--output", tmp_path / "run")
    model = timm.create_model(NAME, depth=1, num_classes=2)
    model.load_state_dict(load_file("a.safetensors"))
    task = npz_task("a.npz")
    test = [(Preparation.of(task, size=32)(task.x_test), torch.from_numpy(task.y_test))]
    head = read_head(tmp_path / "run" / "heads.safetensors", "a")
    measured = report_of(tmp_path / "run")["accuracy"]["fine-tuned"]["a"]["test"]
    assert atlas.accuracy(atlas.encoder(model), test, head) == measured


def test_negate_keeps_the_control(here, tmp_path, capsys):
    good(capsys, *NEGATE, "--keep", "0.9", "--warm-start", "search", "--output", tmp_path / "run")
    rows = report_of(tmp_path / "run")["accuracy"]
    assert rows["composed"]["a"]["validation"] <= rows["pretrained"]["a"]["validation"]
    assert rows["composed"]["control"]["validation"] >= 0.9 * rows["pretrained"]["control"]["validation"]
    assert coefficients(tmp_path / "run").shape[0] == 1


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        (["--classifier", "tip", "--head", "prototypes"], {"pretrained", "with Tip-Adapter"}),
        (["--classifier", "lp++", "--head-from", "shots"], {"pretrained", "composed", "with LP++"}),
        (["--budget", "1", "--shots", "0.5", "--validation", "0"], {"pretrained", "composed"}),
    ],
)
def test_few_shot(here, tmp_path, capsys, options, rows):
    good(capsys, *FEW, *options, "--output", tmp_path / "run")
    report = report_of(tmp_path / "run")
    assert set(report["accuracy"]) == rows
    assert ("classifier.safetensors" in left(tmp_path / "run")) == ("--classifier" in options)
    if "--budget" in options:
        assert report["vectors"] == ["mix 0"] and report["fitted"]["few-shot"]["epoch"] == 2
        assert set(report["accuracy"]["composed"]["task"]) == {"test"}


def test_adapt_uses_no_labels(here, tmp_path, capsys):
    with np.load("c.npz") as file:
        arrays = dict(file)
    good(capsys, *ADAPT, "--output", tmp_path / "run")
    arrays["y_test"] = 1 - arrays["y_test"]
    np.savez(tmp_path / "wrong.npz", **arrays)
    wrong = [tmp_path / "wrong.npz" if x == "c.npz" else x for x in ADAPT]
    good(capsys, *wrong, "--output", tmp_path / "wrong")
    assert torch.equal(coefficients(tmp_path / "run"), coefficients(tmp_path / "wrong"))
    assert coefficients(tmp_path / "run").any()
    right, wrong = (report_of(tmp_path / n)["accuracy"]["composed"]["task"]["test"] for n in ("run", "wrong"))
    assert right == pytest.approx(1 - wrong, abs=1e-12)  # two classes, all labels exchanged; one rounding
    good(capsys, *ADAPT, "--images", "training", "--objective", "entropy", "--output", tmp_path / "other")


@pytest.mark.parametrize(
    ("options", "groups"),
    [
        (["--grain", "global"], 1),
        (["--grain", "partition:2"], 2 * BLOCKS),
        (["--grain", "unit", "--vector-dtype", "bfloat16"], None),
        (["--linearised", "--normalise", "model", "--fit", "pad"], BLOCKS),
        (["--warm-start", "isotropic", "--regulariser", "0.5", "--accumulate", "2", "--amp", "bf16"], BLOCKS),
    ],
)
def test_options_reach_the_procedure(here, tmp_path, capsys, options, groups):
    good(capsys, *ADD, *options, "--output", tmp_path / "run")
    report = report_of(tmp_path / "run")
    vectors, found = report["coefficients"]
    assert vectors == 2 and (found == groups if groups else found > BLOCKS)
    rows = (tmp_path / "run" / "coefficients.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * found and len(set(rows)) == len(rows)
    assert set(report["fitted"]) == ({"isotropic", "add"} if "isotropic" in options else {"add"})
    assert not [n for n in left(tmp_path / "run") if "checkpoint" in n]


def test_a_convolutional_model_and_its_running_statistics(made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    base = timm.create_model("test_resnet", num_classes=0).eval()
    other = copy.deepcopy(base)
    with torch.no_grad():
        for t in [*other.parameters(), *(b for b in other.buffers() if b.is_floating_point())]:
            t.mul_(1.1)
    save_file(base.state_dict(), "base.safetensors")
    counters = {n: t for n, t in other.state_dict().items() if not n.endswith("num_batches_tracked")}
    save_file(counters, "other.safetensors")
    args = ["--model", "test_resnet", "--size", "0", "--device", "cpu", *QUICK, "--merge"]
    good(capsys, "add", "base.safetensors", "--task", f"a=other.safetensors:{made / 'a.npz'}", *args, "--output", "run")
    merged = load_file("run/merged.safetensors")
    assert all(torch.equal(t, merged[n]) for n, t in base.named_buffers())  # they stay the base's


def test_heads_of_a_file(here, tmp_path, capsys):
    good(capsys, *ADD, "--head", "prototypes", "--output", tmp_path / "run")
    good(capsys, *ADD, "--head", tmp_path / "run" / "heads.safetensors", "--output", tmp_path / "again")
    assert report_of(tmp_path / "again")["accuracy"] == report_of(tmp_path / "run")["accuracy"]
    heads = [load_file(tmp_path / name / "heads.safetensors") for name in ("run", "again")]
    assert heads[0].keys() == heads[1].keys() == {"a.weight", "a.scale", "b.weight", "b.scale"}
    width = heads[0]["a.weight"].shape[1]
    embeddings = torch.randn(3, width, generator=torch.Generator().manual_seed(0))  # more classes than the task has
    save_file({"weight": embeddings, "scale": torch.tensor(100.0)}, tmp_path / "texts.safetensors")
    good(capsys, *FEW, "--head", tmp_path / "texts.safetensors", "--output", tmp_path / "texts")
    kept = load_file(tmp_path / "texts" / "heads.safetensors")
    assert torch.equal(kept["task.weight"], tf.normalize(embeddings, dim=-1)) and kept["task.scale"] == 100


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({"a.weight": (3, 63)}, "the head of a is [3, 63], expected at least 2 classes of the model's 64 features"),
        ({"weight": (1, 64)}, "the head of a is [1, 64], expected at least 2 classes"),
        ({"c.weight": (2, 64)}, "holds c.weight; expected a.weight, or weight"),
        ({"weight": (2, 64, 1)}, "weight is [2, 64, 1], expected [classes, d] and [classes]"),
        ({"weight": (2, 64), "bias": (3,)}, "weight is [2, 64] and bias [3], expected [classes, d] and [classes]"),
    ],
)
def test_heads_that_do_not_fit(here, tmp_path, capsys, tensors, text):
    save_file({n: torch.ones(shape) for n, shape in tensors.items()}, tmp_path / "bad.safetensors")
    code, _, err = call(capsys, *ADD, "--head", tmp_path / "bad.safetensors", "--output", tmp_path / "run")
    assert code == 2 and err.startswith("error: ") and text in err


# --- the same command again ---


def stop_after(monkeypatch, epochs: int) -> list[float]:
    """Ctrl-C after so many epochs; returns the epochs that were told."""
    seen: list[float] = []
    real = RunFolder.tell

    def tell(self, **entry):
        real(self, **entry)
        if "step" in entry:  # of an epoch that is not over
            return
        seen.append(entry["epoch"])
        if len(seen) == epochs:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "tell", tell)
    return seen


TIP = (*FEW, "--classifier", "tip", "--head", "prototypes")


@pytest.mark.parametrize(
    "command", [*EVERY.values(), TIP, (*FEW, "--classifier", "lp++")], ids=[*EVERY, "few-shot tip", "few-shot lp++"]
)
def test_an_interrupted_run_goes_on_and_ends_with_the_same_bits(here, tmp_path, monkeypatch, capsys, command):
    args = (*command, "--epochs", "3")
    good(capsys, *args, "--output", tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        code, _, err = call(capsys, *args, "--output", tmp_path / "cut")
    assert code == 130 and f"stopped. Resume with: hatcl atlas {command[0]} --resume --output {tmp_path / 'cut'}" in err
    assert left(tmp_path / "cut") == {
        "config.json",
        "heads.safetensors",
        "checkpoint.pt",
        "metrics.jsonl",
        "metrics.csv",
    }
    with monkeypatch.context() as patch:
        seen = stop_after(patch, 99)
        good(capsys, command[0], "--resume", "--output", tmp_path / "cut")  # the options are those of the run
    assert seen == [2, 3]  # the first epoch is not done again
    whole, cut = report_of(tmp_path / "whole"), report_of(tmp_path / "cut")
    assert whole.pop("seconds") and cut.pop("seconds") and whole == cut
    for name in left(tmp_path / "whole") - {"metrics.json"}:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


def test_an_isotropic_start_is_not_learned_again(here, tmp_path, monkeypatch, capsys):
    args = (*ADD, "--warm-start", "isotropic")
    good(capsys, *args, "--output", tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 3)  # two epochs of the isotropic stage, one of the other
        assert call(capsys, *args, "--output", tmp_path / "cut")[0] == 130
    with monkeypatch.context() as patch:
        seen = stop_after(patch, 99)
        good(capsys, *args, "--resume", "--output", tmp_path / "cut")
    assert seen == [2]
    assert torch.equal(coefficients(tmp_path / "whole"), coefficients(tmp_path / "cut"))


@pytest.mark.parametrize("function", ["write_coefficients", "write_heads", "write_tensors", "draw_coefficients"])
def test_stopped_while_writing(here, tmp_path, monkeypatch, capsys, function):
    args = (*ADD, "--merge", "--output", tmp_path / "run")

    def stop(*_args, **_more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_learning if function == "draw_coefficients" else experiment, function, stop)
        assert call(capsys, *args)[0] == 130
    assert "metrics.json" not in left(tmp_path / "run")  # what is not finished does not look so
    good(capsys, *args, "--resume")
    assert left(tmp_path / "run") == FILES | {"merged.safetensors"}


def test_a_finished_run_is_reported_and_not_redone(here, tmp_path, capsys):
    folder = tmp_path / "run"
    first = good(capsys, *NEGATE, "--output", folder)
    (folder / "checkpoint.pt").write_bytes(b"left by a kill between the report and the tidying")
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = good(capsys, *NEGATE, "--resume", "--output", folder)
    assert f"{folder.name} is finished already." in again and first.split("accuracy in")[1] in again
    del before["checkpoint.pt"]
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_another_run_in_the_folder_is_refused(here, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        call(capsys, *ADD, "--output", folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for more, text in (
        (["--lr", "0.01"], "was started with lr=0.05, now got 0.01; give the same value to continue it"),
        (["--grain", "global"], "was started with grain=block, now got global"),
        (["--task", "x=b.safetensors:c.npz"], "was started with task="),
    ):
        code, _, err = call(capsys, *ADD, *more, "--resume", "--output", folder)
        assert code == 2 and text in err
    code, _, err = call(capsys, *NEGATE, "--output", folder)
    assert code == 2 and "holds a run of hatcl atlas add, not of hatcl atlas negate; name another folder" in err
    code, _, err = call(capsys, *ADD, "--output", folder)
    assert code == 2 and "already holds a run; add --resume to continue it, or name another folder" in err
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("base.safetensors", "a.safetensors", "b.safetensors", "a.npz", "b.npz"):
        shutil.copy(name, moved / name)
    monkeypatch.chdir(moved)
    code, _, err = call(capsys, *ADD, "--resume", "--output", folder)
    assert code == 2 and "was started with base=" in err  # paths are absolute
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    with monkeypatch.context() as patch:  # the same paths with other content
        stop_after(patch, 1)
        call(capsys, *ADD, "--output", "own")
    shutil.copy(here / "c.npz", "a.npz")
    code, _, err = call(capsys, *ADD, "--resume", "--output", "own")
    assert code == 2 and "a.npz has changed since the run in own was started; restore it" in err
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "config.json").write_text('{"flags": {}}')
    code, _, err = call(capsys, *ADD, "--output", tmp_path / "train")
    assert code == 2 and "does not belong to a run of hatcl; name another folder" in err


# --- looking ---


def test_cosine(here, tmp_path, capsys):
    base = hatcl.vectors.parameters.parameters_of("base.safetensors")
    names = [n for n in base if not n.startswith("head.")]
    a = torch.cat([(load_file("a.safetensors")[n] - base[n]).double().flatten() for n in names])
    b = torch.cat([load_file("b.safetensors")[n].double().flatten() for n in names])
    expected = f"{float(a @ b / a.norm() / b.norm()):.3f}"
    args = ("cosine", "b.safetensors", "first=a.safetensors", "--base", "base.safetensors", "--without", "head")
    out = good(capsys, *args)
    assert "first" in out and out.count(expected) == 2 and out.count("1.000") == 2
    good(capsys, "cosine", "b.safetensors", "c-vector.safetensors")
    if pytest.importorskip("matplotlib"):
        good(capsys, *args, "--picture", tmp_path / "cosines.png")
        assert (tmp_path / "cosines.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["a.safetensors"], "a.safetensors is not a task vector saved by hatcl; give the base it was fine-tuned from"),
        (["a.safetensors", "--base", "base.safetensors"], "head.weight is [5, 64] in the pretrained model, [2, 64]"),
        (["none.safetensors"], "none.safetensors: no such file"),
        (["b.safetensors", "b=c-vector.safetensors"], "vectors: two have the same name; write NAME=PATH"),
    ],
)
def test_cosine_refuses_with_one_clean_message(here, capsys, args, text):
    code, _, err = call(capsys, "cosine", *args)
    assert code == 2 and err.startswith("error: ") and text in err


def test_sweep_goes_through_the_pretrained_and_the_fine_tuned_model(here, tmp_path, capsys):
    good(capsys, *ADD, "--output", tmp_path / "run")
    rows = report_of(tmp_path / "run")["accuracy"]
    args = ("sweep", "base.safetensors", "--task", A, "--task", B, *MODEL, "--from", "0", "--to", "1", "--count", "2")
    picture = ["--picture", tmp_path / "sweep.png"] if pytest.importorskip("matplotlib") else []
    words = good(capsys, *args, "--part", "test", *picture).split()
    for scale, row in (("0", "pretrained"), ("1", "fine-tuned")):
        at = words.index(scale, words.index("coefficient"))
        assert words[at + 1 : at + 3] == [f"{100 * rows[row][n]['test']:.1f}" for n in "ab"]
    assert (tmp_path / "sweep.png").exists()
    code, _, err = call(capsys, *args, "--count", "0")
    assert code == 2 and "expected at least one coefficient, in ascending order" in err


# --- bad input ---


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["add", "none.safetensors"], "none.safetensors: no such file"),
        (["add", "base.safetensors", "--task", "x=none.safetensors:a.npz"], "none.safetensors: no such file"),
        (["add", "base.safetensors", "--task", "x=b.safetensors:none.npz"], "none.npz is not a file; expected an .npz"),
        (["add", "base.safetensors", "--task", "b.safetensors"], "got 'b.safetensors', expected NAME=VECTOR:DATA"),
        (["add", "base.safetensors", "--task", A], "--task: the name 'a' appears twice"),
        (["add", "base.safetensors", "--model", "test_vitt"], "--model: got 'test_vitt'; did you mean 'test_vit'?"),
        (["add", "base.safetensors", "--model", "hat_test_vit"], "--model: got 'hat_test_vit'; did you mean"),
        (["add", "base.safetensors", "--model", "test_vit.none"], "Invalid pretrained tag (none)"),
        (["add", "base.safetensors", "--output", "a.npz"], "--output: a.npz is a file, expected a folder"),
        (["add", "base.safetensors", "--model", "test_vit2"], "test_vit2 and base.safetensors differ in"),
        (["add", "base.safetensors", "--model-kwargs", "depth=2"], "Is it of another --model, or made with other"),
        (["add", "base.safetensors", "--model-kwargs", "dept=1"], "--model-kwargs: timm cannot make test_vit with"),
        (["add", "base.safetensors", "--model-kwargs", "depth"], "--model-kwargs: got 'depth', expected key=value"),
        (["add", "base.safetensors", "--task", "x=wide.safetensors:a.npz"], "wide.safetensors: the pretrained model"),
        (["add", "base.safetensors", "--task", "x=foreign.safetensors:a.npz"], "foreign.safetensors: 1 tensors do not"),
        (["add", "base.safetensors", "--task", "x=moved.safetensors:a.npz"], "differs from the base of vector 2"),
        (["add", "base.safetensors", "--size", "33"], "a.npz: test_vit does not accept images of [3, 33, 33]"),
        (["add", "base.safetensors", "--size", "0", "--task", "x=b.safetensors:odd.npz"], "odd.npz: test_vit does not"),
        (["add", "base.safetensors", "--fit", "crops"], "fit: got 'crops', expected one of crop, resize, pad; did"),
        (["add", "base.safetensors", "--head", "train"], "head: got 'train', expected one of trained, prototypes"),
        (["add", "base.safetensors", "--head", "none.safetensors"], "none.safetensors: no such file"),
        (["add", "base.safetensors", "--validation", "1"], "validation: got 1.0, expected a share of at least 0"),
        (["add", "base.safetensors", "--validation", "0"], "--validation: 0.0 of each class of a.npz is no image"),
        (["add", "base.safetensors", "--normalise", "modle"], "did you mean 'model'?"),
        (["add", "base.safetensors", "--vector-dtype", "float"], "vector_dtype: got 'float', expected one of"),
        (["add", "base.safetensors", "--batch-size", "0"], "batch_size: got 0, expected an integer of at least 1"),
        (["add", "base.safetensors", "--grain", "blok"], "grain: got 'blok'"),
        (["add", "base.safetensors", "--epochs", "0"], "epochs: got 0, expected an integer of at least 1"),
        (["add", "base.safetensors", "--warm-start", "serch"], "did you mean 'search'?"),
        (["add", "base.safetensors", "--linearised", "--merge"], "--merge: a linearised composition has no weights"),
        (["add", "base.safetensors", "--device", "cuda:99"], "--device: 'cuda:99' cannot be used here"),
        (["negate", "base.safetensors", "--keep", "2"], "keep: got 2.0, expected a share"),
        (["negate", "base.safetensors", "--target", "control=b.safetensors:b.npz"], "the name control belongs to"),
        (["few-shot", "base.safetensors", "--shots", "many"], "--shots: got 'many', expected a number per class"),
        (["few-shot", "base.safetensors", "--shots", "1000"], "has 24 examples, expected 1000 shots; ask for"),
        (["few-shot", "base.safetensors", "--budget", "3"], "--budget: got 3, expected 1 to 2, the number of vectors"),
        (
            ["few-shot", "base.safetensors", "--vector", "b.safetensors"],
            "--vector: got 'b.safetensors', expected NAME=",
        ),
        (["few-shot", "base.safetensors", "--classifier", "lp"], "did you mean 'lp++'?"),
        (["few-shot", "base.safetensors", "--head-from", "shot"], "did you mean 'shots'?"),
        (["few-shot", "base.safetensors", "--select-by", "block"], "did you mean 'blocks'?"),
        (
            ["few-shot", "base.safetensors", "--select-by", "random"],
            "--select-by: got 'random', which has no effect wi",
        ),
        (
            ["few-shot", "base.safetensors", "--head", "own.safetensors", "--head-from", "shots"],
            "--head-from: got 'sho",
        ),
        (["few-shot", "base.safetensors", "--p", "2"], "p: got 2, which has no effect with regulariser=0; give"),
        (["adapt", "base.safetensors", "--objective", "entropy", "--no-flip"], "--no-flip: has no effect with --obje"),
        (["adapt", "base.safetensors", "--objective", "tent"], "objective: got 'tent', expected one of ufm, entropy"),
        (["adapt", "base.safetensors", "--images", "tests"], "did you mean 'test'?"),
        (["adapt", "base.safetensors", "--batch-size", "2"], "batch_size: got 2, expected at least 4"),
    ],
)
def test_bad_input_gives_one_clean_message(made, tmp_path, monkeypatch, capsys, args, text):
    for file in made.iterdir():
        if file.is_file():
            (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    base = load_file("base.safetensors")
    save_file({n: torch.cat([t, t]) for n, t in base.items()}, "wide.safetensors")
    hatcl.TaskVector({"conv.weight": torch.ones(2, 2)}).save("foreign.safetensors")
    b = hatcl.TaskVector.load("b.safetensors")
    hatcl.TaskVector(dict(b._deltas), {n: "float32:other" for n in b}).save("moved.safetensors")
    x, y = np.zeros((8, 17, 16), dtype=np.uint8), np.arange(8) % 2
    np.savez("odd.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    all_args = [*EVERY[args[0]], *args[2:]]
    all_args[1] = args[1]
    if any("x=" in a for a in args):
        all_args += ["--validation", "0.3"]
    code, _, err = call(capsys, *all_args, *([] if "--output" in args else ["--output", "run"]))
    assert code == 2 and err.startswith("error: ") and text in err, err
    assert "Traceback" not in err and not (tmp_path / "run").exists()  # the corrected command may take the folder
