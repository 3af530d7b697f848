"""`hatcl atlas` on CLIP models with random weights and real images: procedures, heads of names, published files."""

from __future__ import annotations

import json
from pathlib import Path

import clip_parts
import command_parts
import numpy as np
import open_clip
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as tf

import hatcl
from hatcl import atlas
from hatcl.commands.atlas import _learning
from hatcl.data.photos import Pictured
from hatcl.data.prompts import CLASS_NAMES, TEMPLATES
from hatcl.integrations.clip import clip_from_name

KINDS = ("open_clip", "transformers")
CIFAR, DIGITS = CLASS_NAMES["cifar10"][:3], CLASS_NAMES["mnist"][:3]
QUICK = ["--epochs", "2", "--lr", "0.05", "--batch-size", "24", "--device", "cpu", "--head", "text"]
NAMES = ["--class-names", "cifar10=cifar.txt", "--class-names", "mnist=mnist.txt"]
TWO = ["--task", "cifar10=cifar10.safetensors:cifar10.npz", "--task", "mnist=mnist.safetensors:mnist.npz"]
ONE = ["--vector", "cifar10=cifar10.safetensors", "--data", "mnist.npz", "--class-names", "task=mnist.txt"]
NEGATE = ["--target", "mnist=mnist.safetensors:mnist.npz", "--control", "cifar10.npz",
          "--class-names", "mnist=mnist.txt", "--class-names", "control=cifar.txt"]  # fmt: skip


def tuned(clip, data: Path, classes) -> dict[str, torch.Tensor]:
    """The model's state after a few steps of its image tower under a head of names, as the repositories tune it."""
    tower = atlas.encoder(clip.model)
    head = atlas.text_head(clip.model, clip.tokenize, classes)
    with np.load(data) as file:
        x, y = Pictured(clip.transform)(file["x_train"]), torch.from_numpy(file["y_train"])
    optimizer = torch.optim.AdamW(tower.parameters(), lr=1e-3)
    for _ in range(8):
        optimizer.zero_grad()
        tf.cross_entropy(head(tower(x)), y).backward()
        optimizer.step()
    return {**clip.model.state_dict(), **tower.state_dict()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """For each kind a folder with a base, two fine-tuned checkpoints, and images of CIFAR-10 and MNIST."""
    out = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        for name in ("cifar10", "mnist"):
            clip_parts.real_images(name, 3, 20, folder / f"{name}.npz")
        (folder / "cifar.txt").write_text("\n".join(CIFAR))
        (folder / "mnist.txt").write_text("\n".join(DIGITS))
        if kind == "open_clip":
            name, model = clip_parts.open_clip_folder(folder / "clip"), clip_parts.open_clip_model()
        else:
            name, model = str(folder / "clip"), clip_parts.transformers_folder(folder / "clip")
        clip = clip_from_name(name)
        state = clip_parts.moved(model, "", seed=7, by=1e-3)  # so that no two tensors are equal, as in learned ones
        clip.model.load_state_dict(state)
        clip_parts.save(state, folder / "base.safetensors")
        clip_parts.open_clip_folder(folder / "wide", layers=3)
        for data, classes in (("cifar10", CIFAR), ("mnist", DIGITS)):
            clip_parts.save(tuned(clip, folder / f"{data}.npz", classes), folder / f"{data}.safetensors")
        out[kind] = folder, name
    return out


@pytest.fixture(params=KINDS)
def here(request, made, monkeypatch):
    folder, name = made[request.param]
    monkeypatch.chdir(folder)
    monkeypatch.setattr(_learning, "draw_coefficients", lambda *what: b"png")
    return name


@pytest.fixture
def opened(made, monkeypatch):
    """The folder of the open_clip model."""
    folder, name = made["open_clip"]
    monkeypatch.chdir(folder)
    monkeypatch.setattr(_learning, "draw_coefficients", lambda *what: b"png")
    return name


def call(capsys, *args: object) -> tuple[int, str]:
    code, _, err = command_parts.call(capsys, "atlas", *args)
    return code, err


def good(capsys, *args: object) -> None:
    code, err = call(capsys, *args)
    assert code == 0, err


def report_of(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def accuracies(tower, head, data, clip) -> float:
    with np.load(data) as file:
        x, y = Pictured(clip.transform)(file["x_test"]), torch.from_numpy(file["y_test"])
    with torch.no_grad():
        return float((head(tower(x)).argmax(1) == y).double().mean())


# --- every procedure ---


def test_add_measures_zero_shot_and_writes_a_model_that_its_library_loads(here, tmp_path, capsys):
    good(capsys, "add", "base.safetensors", "--model", here, *TWO, *NAMES, *QUICK, "--merge", "--output", tmp_path)
    report = report_of(tmp_path)
    assert report["prompts"]["mnist"] == {"classes": list(DIGITS), "templates": list(TEMPLATES["mnist"])}
    assert report["prompts"]["cifar10"]["templates"] == list(TEMPLATES["cifar10"])
    clip = clip_from_name(here)
    clip.model.load_state_dict(load_file("base.safetensors"))
    for name, classes in (("cifar10", CIFAR), ("mnist", DIGITS)):
        head = atlas.text_head(clip.model, clip.tokenize, classes, TEMPLATES[name])
        rows = report["accuracy"]
        want = accuracies(atlas.encoder(clip.model), head, f"{name}.npz", clip)
        assert rows["pretrained"][name]["test"] == pytest.approx(want, abs=1e-9)
        other = clip_from_name(here)
        other.model.load_state_dict(load_file(f"{name}.safetensors"))
        want = accuracies(atlas.encoder(other.model), head, f"{name}.npz", clip)
        assert rows["fine-tuned"][name]["test"] == pytest.approx(want, abs=1e-9)
        assert report["fitted"]["add"]["score"] >= report["fitted"]["add"]["pretrained"]["score"]
    if here.startswith("open_clip"):
        whole = clip_parts.open_clip_model(seed=5)
        open_clip.load_checkpoint(whole, str(tmp_path / "merged.safetensors"))
    else:
        folder = Path(here)
        target = tmp_path / "hf"
        target.mkdir()
        (target / "config.json").write_text((folder / "config.json").read_text())
        (target / "model.safetensors").write_bytes((tmp_path / "merged.safetensors").read_bytes())
        whole = transformers.CLIPModel.from_pretrained(target).eval()
    merged = atlas.encoder(whole)
    want = accuracies(merged, head, "mnist.npz", clip)
    assert report["accuracy"]["composed"]["mnist"]["test"] == pytest.approx(want, abs=1e-9)
    text = [n for n, _ in clip.model.named_parameters() if n.startswith(("text", "transformer", "token"))]
    theirs = dict(whole.named_parameters())
    assert text and all(torch.equal(theirs[n], dict(clip.model.named_parameters())[n]) for n in text)


@pytest.mark.parametrize(
    "args",
    [
        ["negate", *NEGATE],
        ["few-shot", *ONE, "--shots", "4"],
        ["few-shot", *ONE, "--shots", "0.5", "--classifier", "tip"],
        ["few-shot", *ONE, "--shots", "4", "--classifier", "lp++"],
        ["few-shot", *ONE, "--shots", "all", "--grain", "partition:2"],
        ["adapt", *ONE, "--no-flip", "--per-class", "2"],
        ["adapt", *ONE, "--objective", "entropy"],
    ],
    ids=["negate", "few-shot", "tip", "lp++", "partition", "ufm", "entropy"],
)
def test_every_procedure_takes_both_kinds(here, tmp_path, capsys, args):
    good(capsys, args[0], "base.safetensors", "--model", here, *args[1:], *QUICK, "--output", tmp_path / "run")
    report = report_of(tmp_path / "run")
    assert report["coefficients"][0] == 1 and report["prompts"]
    assert "test" in next(iter(report["accuracy"]["pretrained"].values()))


def test_linearised_and_resumed(opened, tmp_path, capsys):
    args = ["add", "base.safetensors", "--model", opened, "--task", TWO[3], *NAMES[2:], *QUICK, "--linearised"]
    args += ["--output", tmp_path / "run"]
    good(capsys, *args)
    (tmp_path / "run" / "metrics.json").unlink()
    code, err = call(capsys, *args, "--resume", "--templates", "mnist=svhn")
    assert code == 2 and "was started with templates.mnist=nothing, now got svhn" in err
    Path("mnist.txt").write_text("zero\none\ntwo\n")
    code, err = call(capsys, *args, "--resume")
    Path("mnist.txt").write_text("\n".join(DIGITS))
    assert code == 2 and "mnist.txt has changed since the run" in err
    good(capsys, *args, "--resume")


def test_sweep_and_cosine(here, capsys):
    good(capsys, "sweep", "base.safetensors", "--model", here, *TWO, *NAMES, "--head", "text", "--count", "2")
    good(capsys, "cosine", "cifar10.safetensors", "mnist.safetensors", "--base", "base.safetensors")


def test_other_heads_and_grains_of_units(here, tmp_path, capsys):
    quick = [*QUICK[:-2], "--head", "prototypes", "--grain", "unit", "--fit", "pad"]
    good(capsys, "add", "base.safetensors", "--model", here, *TWO, *quick, "--output", tmp_path / "run")


# --- files as they are published ---


def published(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An encoder of the repositories: both towers' parameters but the text tower's layers, behind `model.`."""
    return {f"model.{n}": t.clone() for n, t in state.items() if not n.startswith("transformer.")}


def test_published_checkpoints_give_the_same_run(opened, tmp_path, capsys):
    base, mnist = load_file("base.safetensors"), load_file("mnist.safetensors")
    torch.save(published(base), tmp_path / "zeroshot.pt")
    torch.save(published(mnist), tmp_path / "finetuned.pt")
    hatcl.TaskVector.between(published(base), published(mnist)).save(tmp_path / "vector.safetensors")
    order = [n for n in published(base)]
    linear = {f"model.params0.{i}": published(base)[n] for i, n in enumerate(order)}
    linear |= {f"model.params.{i}": published(mnist)[n] for i, n in enumerate(order)}
    torch.save({**linear, "model_name": "ViT-B-32"}, tmp_path / "linear.pt")
    args = ["--model", opened, "--head", "text", "--class-names", "mnist=mnist.txt", *QUICK[:-2], "--head", "text"]
    good(capsys, "add", "base.safetensors", "--task", TWO[3], *args, "--output", tmp_path / "want")
    want = report_of(tmp_path / "want")["accuracy"]
    for i, vector in enumerate(("finetuned.pt", "vector.safetensors", "linear.pt")):
        task = f"mnist={tmp_path / vector}:mnist.npz"
        text = ["--text-from", "base.safetensors"]
        good(capsys, "add", tmp_path / "zeroshot.pt", "--task", task, *args, *text, "--output", tmp_path / f"{i}")
        assert report_of(tmp_path / f"{i}")["accuracy"] == want
        got, first = (load_file(tmp_path / n / "coefficients.safetensors") for n in (str(i), "want"))
        assert torch.equal(got["coefficients"], first["coefficients"])


def test_the_text_tower_must_be_there_and_belong_to_it(opened, tmp_path, capsys):
    base = load_file("base.safetensors")
    torch.save(published(base), tmp_path / "zeroshot.pt")
    args = ["--task", TWO[3], "--model", opened, "--class-names", "mnist=mnist.txt", *QUICK]
    code, err = call(capsys, "add", tmp_path / "zeroshot.pt", *args)
    assert code == 2 and "zeroshot.pt has no text tower (it lacks transformer." in err and "--text-from" in err
    clip_parts.save(clip_parts.open_clip_model(seed=9).state_dict(), tmp_path / "other.safetensors")
    code, err = call(capsys, "add", tmp_path / "zeroshot.pt", *args, "--text-from", tmp_path / "other.safetensors")
    assert code == 2 and "is not that of" in err and "expected the text tower that belongs to" in err
    code, err = call(capsys, "add", "base.safetensors", *args, "--text-from", "openai")
    assert code == 2 and "base.safetensors has a text tower; leave it out" in err
    half = {n: t.half() for n, t in base.items()}  # OpenAI stored theirs so
    clip_parts.save(half, tmp_path / "half.safetensors")
    good(
        capsys, "add", tmp_path / "zeroshot.pt", *args, "--text-from", tmp_path / "half.safetensors",
        "--output", tmp_path / "run",
    )  # fmt: skip


# --- images by the names of their data sets ---


def test_images_in_folders_bring_names_and_templates(opened, tmp_path, capsys):
    """Photos of different sizes, as in DTD; `dtd@ROOT` has names and templates of its own."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 4)):
        for c, name in enumerate(("banded", "dotted")):
            for i in range(count):
                path = tmp_path / "dtd" / part / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = rng.integers(0, 100, (40 + i, 48, 3), dtype=np.uint8)
                pixels[:: 2 + c] += 120
                Image.fromarray(pixels).save(path)
    args = ["--model", opened, "--vector", "cifar10=cifar10.safetensors", "--data", f"dtd@{tmp_path}", *QUICK]
    good(capsys, "few-shot", "base.safetensors", *args, "--shots", "2", "--output", tmp_path / "run")
    report = report_of(tmp_path / "run")
    assert report["prompts"]["task"] == {"classes": ["banded", "dotted"], "templates": list(TEMPLATES["dtd"])}
    assert report["images"]["task"]["test"] == 8
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["options"]["data"] == f"dtd@{tmp_path}" and f"dtd@{tmp_path}" in config["inputs"]
    (tmp_path / "run" / "metrics.json").unlink()
    (tmp_path / "dtd" / "train" / "banded" / "0.png").unlink()
    code, err = call(
        capsys, "few-shot", "base.safetensors", *args, "--shots", "2", "--output", tmp_path / "run", "--resume"
    )
    assert code == 2 and f"dtd@{tmp_path} has changed since the run" in err
    folder = ["--data", tmp_path / "dtd", "--templates", "task=dtd"]
    good(capsys, "adapt", "base.safetensors", *args[:4], *folder, *QUICK, "--output", tmp_path / "folder")
    assert report_of(tmp_path / "folder")["prompts"] == report["prompts"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--class-names", "mnist=cifar10"], "and 10 names for the 3 classes of mnist; give --class-names mnist=FILE"),
        ([], "and 10 names for the 3 classes of mnist"),
        (["--class-names", "minst=mnist.txt"], "--class-names: there is no task 'minst'; did you mean 'mnist'"),
        (["--class-names", "mnist=imagenet"], "and 1000 names for the 3 classes of mnist"),
        (["--templates", "x=svhn"], "--templates: there is no task 'x'"),
        (
            ["--class-names", "mnist=mnist.txt", "--templates", "mnist=none.txt"],
            "none.txt cannot be read as a text file",
        ),
        (["--class-names", "mnist=mnist.txt", "--size", "64"], "size: got 64; open_clip:local-dir:"),
        (
            ["--class-names", "mnist=mnist.txt", "--normalise", "data"],
            "normalise: got 'data'; a CLIP model is prep",
        ),
        (["--normalise", "data", "--fit", "crop"], "normalise: got 'data' with fit='crop'"),
        (["--head", "trained", "--templates", "mnist=svhn"], "templates: got {'mnist': 'svhn'}, which has no effect"),
        (["--model", "test_vit"], "head: got 'text' for test_vit, which has no text tower"),
        (["--model", "open_clip:local-dir:wide"], "base.safetensors differ in"),
    ],
)
def test_bad_input_gives_one_clean_message(opened, tmp_path, capsys, args, says):
    task = ["--task", TWO[3], *QUICK]
    code, err = call(capsys, "add", "base.safetensors", "--model", opened, *task, *args, "--output", tmp_path / "run")
    assert code == 2 and says in err and "Traceback" not in err, err
    assert not (tmp_path / "run").exists()


def test_timm_models_take_photos_their_own_way(tmp_path, capsys, monkeypatch):
    import timm

    for part in ("train", "test"):
        for c in range(2):
            for i in range(6):
                path = tmp_path / "pets" / part / f"class{c}" / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((40, 50 + i, 3), 100 * c + i, dtype=np.uint8)).save(path)
    torch.manual_seed(0)
    model = timm.create_model("test_vit", depth=1, img_size=64, num_classes=2)
    clip_parts.save(model.state_dict(), tmp_path / "base.safetensors")
    clip_parts.save(clip_parts.moved(model, "blocks"), tmp_path / "tuned.safetensors")
    monkeypatch.chdir(tmp_path)
    args = ["--model", "test_vit", "--model-kwargs", "depth=1", "--model-kwargs", "img_size=64", "--epochs", "1"]
    args += ["--vector", "a=tuned.safetensors", "--data", "pets", "--shots", "2", "--batch-size", "8"]
    good(capsys, "few-shot", "base.safetensors", *args, "--output", "run")
    assert report_of(Path("run"))["classes"] == {"task": 2}
    code, err = call(capsys, "few-shot", "base.safetensors", *args, "--fit", "resize", "--output", "other")
    assert code == 2 and "fit: got 'resize' for pets, whose images differ in size; give 'crop'" in err
    code, err = call(capsys, "few-shot", "base.safetensors", *args, "--size", "0", "--output", "other")
    assert code == 2 and "size: got 0, their own, with fit='crop'" in err
    code, err = call(capsys, "few-shot", "base.safetensors", *args, "--normalise", "data", "--output", "other")
    assert code == 2 and "what is read from image files is prepared the model's own way" in err
