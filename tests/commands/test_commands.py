"""What holds for every command: the tests go through the registry, so that a new command is tested by being there, and
one that writes runs by a line in `LINES`."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import typing

import numpy as np
import pytest
import torch
import yaml
from command_parts import call, write_tasks
from PIL import Image
from rich.text import Text
from safetensors.torch import load_file, save_file
from typer.main import get_command

from hatcl import commands
from hatcl.commands import COMMANDS
from hatcl.commands._command import META, typed
from hatcl.commands._options import SPELLED, key_values, label_texts
from hatcl.engine import folder as runs
from hatcl.errors import ConfigError
from hatcl.files import held_by_one

commands.app()  # finds them
MODEL = "--model test_vit --model-kwargs depth=1 --size 32 --batch-size 24 --device cpu --epochs 1 --lr 0.05"
A, B = "a=one.safetensors:t0.npz", "b=two.safetensors:t1.npz"
# for each command that writes runs, the quickest run
LINES = {
    "train": "train --task t0.npz --epochs 1 --batch-size 16 --device cpu --lr 0.01",
    "atlas add": f"atlas add base.safetensors --task {A} --task {B} {MODEL}",
    "atlas negate": f"atlas negate base.safetensors --target {A} --control t1.npz {MODEL}",
    "atlas few-shot": f"atlas few-shot base.safetensors --vector b=two.safetensors --data t0.npz {MODEL} --steps 2",
    "atlas adapt": f"atlas adapt base.safetensors --vector b=two.safetensors --data t0.npz {MODEL}",
    "finetune": "finetune test_resnet --mode image --data t0.npz --weights tests.safetensors --size 0 --max-steps 2 "
    "--lr 0.01 --device cpu",
    "graft": "graft tuned --by magnitude --sparsity 0.1 --device cpu --batch-size 8",
}
# for each other command, one that reports
REPORTS = {
    "atlas cosine": "atlas cosine one-vector.safetensors two-vector.safetensors",
    "atlas sweep": f"atlas sweep base.safetensors --task {A} --count 1 {MODEL.split(' --epochs')[0]}",
    "certify": "certify learned",
    "describe": "describe learned",
    "extract": "extract learned --task 0 --output cut --replace",
    "forget": "forget learned --task 0 --dry-run",
    "grow": "grow learned --add-tasks 1 --output grown --replace",
    "list": "list 'hat_test_res*'",
    "merge": "merge base.safetensors one.safetensors:0.5 --output merged",
    "methods": "methods",
    "predict": "predict learned picture.png",
    "show": "show learned",
    "zoo": "zoo",
}
RUNS = sorted(name for name, it in COMMANDS.items() if it.writes_run)
# options whose values are no choice of a few: names, patterns, paths and the like
FREE_TEXT = {
    "task", "split", "dataset", "root", "model", "data", "target", "vector", "shots", "template", "word", "weights",
    "control", "base", "run", "device", "grain", "only", "skip", "ood", "mask_path", "checkpoint_location", "words",
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory, drawn_nothing):
    """Two tasks, a base with two fine-tuned ones, a fine-tuned run and a run of images."""
    import timm

    import hatcl

    folder = tmp_path_factory.mktemp("all")
    write_tasks(folder, 2)
    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet").state_dict(), folder / "tests.safetensors")
    base = timm.create_model("test_vit", depth=1, num_classes=0)
    save_file(base.state_dict(), folder / "base.safetensors")
    for name in ("one", "two"):
        state = {n: t + 0.01 * torch.randn_like(t) for n, t in base.state_dict().items()}
        save_file(state, folder / f"{name}.safetensors")
        hatcl.TaskVector.between(base.state_dict(), state).save(folder / f"{name}-vector.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Image.fromarray(np.load("t0.npz")["x_train"][0]).save("picture.png")
        for line, output in ((LINES["finetune"], "tuned"), (LINES["train"] + " --router", "learned")):
            with pytest.raises(SystemExit) as done:
                commands.main([*shlex.split(line), "--output", output, "--json"])
            assert not done.value.code
    return folder


@pytest.fixture(scope="module")
def drawn_nothing():
    """Pictures take most of such a run's time, and others test them."""
    from hatcl.commands import _shown, graft
    from hatcl.commands.atlas import _learning

    with pytest.MonkeyPatch.context() as patch:
        for module, name in (
            (_shown, "draw_run"), (graft, "draw_reliability"), (graft, "draw_graft_curve"),
            (_learning, "draw_coefficients"),
        ):  # fmt: skip
            patch.setattr(module, name, lambda *a, **k: b"drawn")
        yield


@pytest.fixture
def here(made, monkeypatch):
    monkeypatch.chdir(made)
    return made


def files(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def click_of(name: str):
    found = get_command(commands.app())
    for word in name.split():
        found = found.commands[word]
    return found


def choices(name: str) -> list[tuple[str, str]]:
    """The options of a command whose values are words, with their defaults."""
    found = []
    for p in inspect.signature(typed(COMMANDS[name])).parameters.values():
        kind, *marks = typing.get_args(p.annotation) or (p.annotation,)
        if p.name in FREE_TEXT or str not in (kind, *typing.get_args(kind)) or typing.get_origin(kind) is list:
            continue
        told = re.search(r"\(default (\w+)\)", marks[0].help or "")
        value = told[1] if told else p.default
        if isinstance(value, str) and value.isalpha() and value != "None":
            found.append(("--" + p.name.replace("_", "-"), value))
    return found


def test_every_command_has_a_line():
    assert set(LINES) == set(RUNS) and set(REPORTS) == set(COMMANDS) - set(RUNS)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_is_complete_and_in_plain_english(name, capsys):
    found = click_of(name)
    first = found.help.split("\n")[0]
    assert first[0].isupper() and first.endswith((".", ":")), first
    for p in found.params:
        if p.name != "help":
            assert getattr(p, "help", None) and len(p.help) > 5, p.name
            assert not re.search(r"\b(goes on with it|anew|beside)\b|`", p.help), p.help
            assert Text.from_markup(p.help).plain == p.help.replace("\\[", "["), "rich reads [text] as a mark"
    code, out, _ = call(capsys, *name.split(), "--help")
    assert code == 0 and f"hatcl {name}" in " ".join(out.split())


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_one_spelling_everywhere(name):
    flags = {flag for p in click_of(name).params for flag in p.opts}
    old = {"--out", "--opt", "--sched", "--clip-grad", "--hat", "--option", "--tasks", "--sparsitylevel"}
    assert "--json" in flags and not flags & (old - {"--sparsitylevel"})
    assert ({"--output", "--resume", "--config"} <= flags) == COMMANDS[name].writes_run or name == "merge"


@pytest.mark.parametrize("name", RUNS)
def test_a_misspelt_option_leaves_no_folder_and_the_right_one_works_afterwards(here, tmp_path, capsys, name):
    line, output = shlex.split(LINES[name]), tmp_path / "run"
    for flag in ("--outptu", "--lrr", "--devic"):
        code, _, err = call(capsys, *line, "--output", output, flag, "1")
        near = {"--outptu": "--output", "--lrr": "--lr", "--devic": "--device"}[flag]
        assert code == 2 and re.search(f"No such option: {flag}.*{near}", err), err
        assert not output.exists()
    tried = 0
    for flag, value in choices(name):
        wrong = value[:-1] + value[-1] * 2
        code, _, err = call(capsys, *line, "--output", output, flag, wrong)
        assert code == 2 and err.startswith("error: "), (flag, wrong, err)
        told = repr(wrong) in err and ("did you mean" in err or "expected" in err)
        assert told or "has no effect on learning" in err, (flag, err)
        assert not output.exists(), flag
        tried += 1
    assert tried or name == "graft"
    code, _, err = call(capsys, *line, "--output", output)
    assert code == 0, err
    assert json.loads((output / "config.json").read_text())["command"] == name


@pytest.mark.parametrize("name", RUNS)
def test_a_run_resumes_is_fed_back_by_config_and_is_refused_to_others(here, tmp_path, capsys, name):
    line, output = shlex.split(LINES[name]), tmp_path / "run"
    code, out, err = call(capsys, *line, "--output", output, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report == json.loads((output / "metrics.json").read_text())
    assert {p.name for p in output.iterdir() if p.name.startswith(".")} == set()
    before = files(output)

    code, _, err = call(capsys, *line, "--output", output)
    assert code == 2 and "already holds a run; add --resume to continue it, or name another folder" in err
    code, out, err = call(capsys, *name.split(), "--resume", "--output", output, "--json")
    assert code == 0 and json.loads(out) == report, err
    other = [n for n in RUNS if n != name][0]
    code, _, err = call(capsys, *other.split(), "--resume", "--output", output)
    assert code == 2 and f"holds a run of hatcl {name}, not of hatcl {other}; name another folder" in err
    if name != "graft":
        code, _, err = call(capsys, *name.split(), "--resume", "--output", output, "--batch-size", "7")
        assert code == 2 and re.search("was started with batch_size=.*, now got 7; give the same", err)
    assert files(output) == before

    again = tmp_path / "again"
    code, out, err = call(capsys, *name.split(), "--config", output / "config.json", "--output", again, "--json")
    assert code == 0, err
    config = [json.loads((folder / "config.json").read_text()) for folder in (output, again)]
    assert config[0] == config[1]
    same, made = files(output), files(again)
    assert made.keys() == same.keys()
    for name_of, content in same.items():
        if name_of.endswith(".safetensors"):  # whose metadata come in any order
            ours, theirs = (load_file(folder / name_of) for folder in (output, again))
            assert ours.keys() == theirs.keys() and all(torch.equal(t, theirs[n]) for n, t in ours.items()), name_of
        elif name_of not in ("metrics.json", "seconds.json"):  # which have seconds
            assert content == made[name_of], name_of

    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(yaml.safe_dump({**config[0]["options"], "batch_sise": 3}))
    code, _, err = call(capsys, *name.split(), "--config", wrong, "--output", tmp_path / "other")
    assert code == 2 and f"hatcl {name} has no option 'batch_sise'; did you mean 'batch_size'?" in err
    assert not (tmp_path / "other").exists()
    code, _, err = call(capsys, *other.split(), "--config", output / "config.json", "--output", tmp_path / "other")
    assert code == 2 and f"holds options of hatcl {name}, not of hatcl {other}" in err


@pytest.mark.parametrize("name", RUNS)
def test_a_folder_where_a_process_is_at_work_is_refused(here, tmp_path, capsys, name):
    output = tmp_path / "run"
    output.mkdir()
    with held_by_one(output / runs.LOCK):
        code, _, err = call(capsys, *shlex.split(LINES[name]), "--output", output)
    assert (
        code == 2 and "another process is working in this folder; wait until it ends, stop it, or name another" in err
    )
    assert list(output.iterdir()) == []


@pytest.mark.parametrize("name", sorted(REPORTS))
def test_json_is_json(here, capsys, name):
    code, out, err = call(capsys, *shlex.split(REPORTS[name]), "--json")
    assert code == 0, err
    assert json.loads(out)
    code, out, _ = call(capsys, *shlex.split(REPORTS[name]))
    assert code == 0 and out.strip()
    with pytest.raises(ValueError):
        json.loads(out.split("\n")[0])


@pytest.mark.parametrize("name", sorted({**LINES, **REPORTS}))
def test_no_traceback_for_files_that_are_not_there(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, *shlex.split({**LINES, **REPORTS}[name]))
    if name in ("list", "methods", "zoo"):
        assert code == 0
    else:
        assert code == 2 and err.startswith("error: ") and "Traceback" not in out + err
        assert list(tmp_path.iterdir()) == []


def test_yaml_and_the_command_line_count_as_one(here, tmp_path, capsys):
    path = tmp_path / "options.yaml"
    path.write_text("task: [t0.npz]\nepochs: 2\nbatch-size: 16\nlr: 1e-2\nset: {max_scale: 200}\ndevice: cpu\n")
    code, out, err = call(capsys, "train", "--config", path, "--epochs", "1", "--output", tmp_path / "run", "--json")
    assert code == 0, err
    options = json.loads((tmp_path / "run" / "config.json").read_text())["options"]
    assert (options["epochs"], options["batch_size"], options["lr"]) == (1, 16, 0.01)
    assert options["set_"] == {"max_scale": 200}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "holds list, expected a mapping from options to values"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_a_config_that_holds_something_else(tmp_path, capsys, text, message):
    (tmp_path / "c.yaml").write_text(text)
    code, _, err = call(capsys, "train", "--config", tmp_path / "c.yaml", "--output", tmp_path / "run")
    assert code == 2 and message in err and not (tmp_path / "run").exists()
    code, _, err = call(capsys, "train", "--config", tmp_path / "none.json", "--output", tmp_path / "run")
    assert code == 2 and "none.json cannot be read" in err


def test_key_values():
    assert key_values("--set", ["a=1", "b=true", "c=x y", "d={'e': 1e-4}", "f=None"]) == {
        "a": 1, "b": True, "c": "x y", "d": {"e": 1e-4}, "f": None,
    }  # fmt: skip
    assert label_texts("--words", ["0=1", "a=b=c"]) == {"0": "1", "a": "b=c"}
    for wrong in ("x", "=1", "a-b=1"):
        with pytest.raises(ConfigError, match="--set: got .*, expected key=value"):
            key_values("--set", [wrong])
    with pytest.raises(ConfigError, match="--words: got 'a' twice, expected each once"):
        label_texts("--words", ["a=b", "a=c"])


def test_a_name_that_is_taken():
    with pytest.raises(ConfigError, match="command: 'train' is taken by train_command"):
        commands.command("train")(lambda: None)


def test_names_of_options_that_stay_out_of_config():
    assert set(META) == {"output", "resume", "config", "log", "json_"} and not set(SPELLED) & set(SPELLED.values())
