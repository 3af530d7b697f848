from __future__ import annotations

import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from command_parts import FAST, call, given, write_tasks

import hatcl
from hatcl.commands.train import DEFAULT_MODEL
from hatcl.continual import list_continual_methods


def test_the_run_folder_holds_everything(run):
    names = {path.name for path in run.iterdir()}
    always = {"model", "metrics.json", "metrics.jsonl", "metrics.csv", "config.json", "seconds.json", "tasks"}
    assert always <= names <= always | {"picture.png"}
    metrics = json.loads((run / "metrics.json").read_text())
    details = metrics["details"]
    assert details["bit_equal"] is True and details["exact"] is True and metrics["forgetting"] == 0
    assert metrics["tasks"] == ["t0", "t1", "t2"] and metrics["method"] == "hat"
    config = json.loads((run / "config.json").read_text())
    assert config["input_shape"] == [3, 32, 32] and config["tasks"][0]["name"] == "t0"
    assert config["command"] == "train" and config["options"]["task"][0] == f"t0={run.parent / 't0.npz'}"
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(s["stage"], s["step"]) for s in steps] == [(t, step) for t in range(3) for step in range(1, 7)]
    for known in steps:
        assert {"loss", "penalty", "scale", "units_on", "gradient_norm", "lr"} <= set(known)
        assert 0 < known["units_on"] <= 1 and known["gradient_norm"] > 0 and known["lr"] > 0
    assert len((run / "metrics.csv").read_text().splitlines()) == 1 + len(steps)


def test_each_task_has_a_record_in_the_folder_and_on_the_card(run):
    config = json.loads((run / "config.json").read_text())
    assert config["made_with"]["versions"]["torch"] == torch.__version__.partition("+")[0]
    card = (run / "model" / "README.md").read_text()
    for t in range(3):
        made = json.loads((run / "tasks" / f"{t}_t{t}" / "config.json").read_text())["record"]
        assert made["data"] == {f"t{t}": config["tasks"][t]["digest"]} and made["examples"] == {f"t{t}": 48}
        assert made["versions"] == config["made_with"]["versions"]
        assert f"| {t} | 48 | {made['data'][f't{t}'][:16]} |" in card
    assert "## Record of each task" in card


def test_the_end_of_a_run_says_what_counts(run, capsys):
    code, out, _ = call(capsys, "train", "--resume", "--output", run)
    assert code == 0
    shown = " ".join(out.split())
    for words in ("is finished already", "average score", "forgetting", "row: learned, column: tested"):
        assert words in shown
    assert "certificate: exact. The outputs of all 3 sealed tasks are bit-equal to those at sealing" in shown
    assert shown.count("bit-equal") >= 4  # one per task and the certificate's


def test_train_by_default_learns_the_digits(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(capsys, "train", "--epochs", "1")
    assert code == 0 and (tmp_path / "runs" / "001" / "model").is_dir()
    metrics = json.loads((tmp_path / "runs" / "001" / "metrics.json").read_text())
    assert metrics["tasks"] == [f"digits {c}-{c + 1}" for c in range(0, 10, 2)]
    code, out, _ = call(capsys, "train", "--resume")
    assert code == 0 and "001 is finished already" in " ".join(out.split())


def test_options_reach_the_model_and_its_config(tmp_path, capsys):
    tasks = write_tasks(tmp_path, 2)
    code, _, err = call(
        capsys, "train", "--split", f"{tasks[0]}:1", "--output", tmp_path / "run", *FAST, "--model", "hat_test_resnet",
        "--model-kwargs", "drop_rate=0.1", "--set", "max_scale=200", "--set", "schedule=cosine", "--set", "num_tasks=3",
        "--optimizer", "sgd", "--schedule", "cosine", "--amp", "bf16", "--flip", "--crop", "2", "--fit", "pad",
    )  # fmt: skip
    assert code == 0, err
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert len(metrics["facts"]) == 1 and len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2 * 3
    model = hatcl.from_pretrained(tmp_path / "run" / "model")
    assert hatcl.tasks(model) == [0]


def test_a_finished_or_other_run_is_not_overwritten(run, capsys):
    code, _, err = call(capsys, "train", "--output", run, *FAST)
    assert code == 2 and "already holds a run; add --resume to continue it, or name another folder" in err
    code, _, err = call(capsys, "train", "--output", run, "--resume", "--epochs", "3")
    assert code == 2 and "was started with epochs=2, now got 3; give the same value to continue it" in err
    code, _, err = call(capsys, "train", "--output", run, "--resume", "--epochs", "2", "--device", "cpu")
    assert code == 0


def test_more_tasks_for_a_finished_run_are_refused_with_the_remedy(run, capsys):
    tasks = json.loads((run / "config.json").read_text())["options"]["task"]
    more = [text for task in [*tasks, f"more={tasks[0].partition('=')[2] or tasks[0]}"] for text in ("--task", task)]
    before = (run / "metrics.json").read_bytes()
    code, _, err = call(capsys, "train", "--output", run, "--resume", *more, *FAST)
    assert code == 2 and f"the run in {run} is finished with 3 tasks, and now got 4; it cannot learn more here" in err
    assert f"model = hatcl.from_pretrained('{run / 'model'}') and hatcl.learn(model, 3, ...)" in err
    assert "after hatcl grow --add-tasks 1 if there is no room" in err and "--output" in err
    assert (run / "metrics.json").read_bytes() == before
    code, _, err = call(capsys, "train", "--output", run, "--resume", *more[2:], *FAST)  # other tasks, not more
    assert code == 2 and "was started with task=" in err


@pytest.mark.parametrize("problem", ["regression", "multilabel"])
def test_a_router_of_what_has_no_classes_is_refused_before_anything_is_learned(tmp_path, capsys, problem):
    (path,) = write_tasks(tmp_path, 1)
    arrays = dict(np.load(path))
    as_other = {"regression": lambda y: y + 0.5, "multilabel": lambda y: np.stack([y, 1 - y], 1)}[problem]
    np.savez(path, **{n: as_other(a) if n.startswith("y") else a for n, a in arrays.items()})
    line = ["train", *given([path]), "--problem", problem, "--router", "--output", tmp_path / "run", *FAST]
    code, _, err = call(capsys, *line)
    assert code == 2 and f"router: task 't0' is a {problem}, but a router needs tasks with one class per example" in err
    assert "learn without --router" in err and not (tmp_path / "run").exists()


# --- other methods than hat ---

PLAIN = ["--epochs", "1", "--batch-size", "16", "--device", "cpu"]
LINEAR = ["--model", "test_vit", "--model-kwargs", "img_size=32", "--model-kwargs", "depth=1"]
VIT = [*LINEAR, "--target", "qkv"]


@pytest.mark.parametrize("method", sorted(set(list_continual_methods()) - {"hat"}))
def test_every_method_learns_images(tmp_path, capsys, method):
    kind = list_continual_methods()[method]
    paths, output = write_tasks(tmp_path, 2), tmp_path / "run"
    more = VIT if kind.lora != "none" else [] if kind.adapted else LINEAR  # osf splits linear layers
    code, out, err = call(capsys, "train", *given(paths), "--method", method, "--output", output, *PLAIN, *more)
    assert code == 0, err
    assert f"{method}, in %" in out and "certificate" not in out
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["method"] == method and None not in metrics["matrix"][-1] and metrics["details"] == {}
    last = output / "tasks" / "1_t1" / "adapter"
    stored = [p.name for p in last.rglob("*.safetensors")]
    assert set(stored) == ({"adapter_model.safetensors"} if kind.lora != "none" else {"weights.safetensors"})
    config = json.loads((output / "config.json").read_text())
    assert ("rank" in config["options"]) == (kind.lora != "none")
    code, out, err = call(capsys, "train", "--resume", "--output", output)
    assert code == 0 and "is finished already" in " ".join(out.split()), err


def test_the_head_is_trained_with_the_adapter_where_the_method_can(tmp_path, capsys):
    from safetensors.torch import load_file

    heads = {}
    for method in ("tasl", "olora"):
        args = ["train", *given(write_tasks(tmp_path, 2)), "--method", method, "--output", tmp_path / method]
        assert call(capsys, *args, *PLAIN, *VIT)[0] == 0
        tensors = load_file(tmp_path / method / "tasks" / "1_t1" / "adapter" / "adapter_model.safetensors")
        heads[method] = [name for name in tensors if "lora_" not in name]
    assert heads == {"tasl": ["base_model.model.head.bias", "base_model.model.head.weight"], "olora": []}


def test_scores_of_validation_images(tmp_path, capsys):
    paths = write_tasks(tmp_path, 2)
    code, out, err = call(
        capsys, "train", *given(paths), "--score-on", "validation", "--output", tmp_path / "run", *PLAIN
    )
    assert code == 0, err
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert [task["examples"] for task in config["tasks"]] == [40, 40]  # of 48
    assert call(capsys, "certify", tmp_path / "run")[0] == 0


# --- what is plainly meant ---


@pytest.mark.parametrize("method, given_as, learned", [
    ("hat", "test_resnet", "hat_test_resnet"), ("hat", "hat_test_resnet", "hat_test_resnet"),
    ("joint", "hat_test_resnet", "test_resnet"), ("joint", "test_resnet", "test_resnet"),
])  # fmt: skip
def test_a_models_name_with_and_without_gates(tmp_path, capsys, method, given_as, learned):
    paths, output = write_tasks(tmp_path, 1), tmp_path / "run"
    args = ("train", *given(paths), "--method", method, "--model", given_as, "--output", output)
    code, _, err = call(capsys, *args, "--max-steps", "1", "--device", "cpu")
    assert code == 0, err
    assert json.loads((output / "config.json").read_text())["options"]["model"] == learned


def test_a_task_of_one_class_is_refused_before_a_folder_is_made(tmp_path, capsys):
    (path,) = write_tasks(tmp_path, 1)
    arrays = dict(np.load(path))
    np.savez(path, **{n: a * 0 if n.startswith("y") else a for n, a in arrays.items()})
    code, out, err = call(capsys, "train", *given([path]), "--output", tmp_path / "run")
    assert code == 2 and "task 't0' has one class; expected at least 2 classes; add images of another" in err
    assert not (tmp_path / "run").exists() and "run folder" not in out


def test_what_a_method_refuses_is_refused_before_the_first_line(tmp_path, capsys):
    pytest.importorskip("peft")
    args = ("train", *given(write_tasks(tmp_path, 1)), "--method", "ilora", *VIT, "--output", tmp_path / "run")
    code, out, err = call(capsys, *args, "--set", "previous_task_model=nowhere", "--device", "cpu")
    assert code == 2 and "nowhere" in err and not out.strip() and not (tmp_path / "run").exists()


# --- errors ---


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (
            ["--task", "none.npz"],
            "none.npz does not exist; expected a file, a folder, NAME@FOLDER of torchvision, or hf:NAME",
        ),
        (["--split", "5"], "--split: got '5', expected PLACE:5"),
        (["--split", "a.npz"], "expected PLACE:5"),
        (["--split", "t0.npz:2"], "'t0' has 2 classes, too few for 2 tasks of at least two classes"),
        (["--split", "t0.npz:2x"], "--split: got '2x', expected a number of tasks (5), or tasks x classes (5x2)"),
        (["--column", "labl=y"], "column: got 'labl', expected one of text,"),
        (["--problem", "regresion"], "problem: got 'regresion'"),
        (["--measured-by", "r2"], "measured_by, of a classification: got 'r2', expected one of accuracy"),
        (["--augment", "rand-m9"], "augment: got 'rand-m9', which has no effect with fit=resize; take fit=crop"),
        (["--dataset", "CIFAR100"], "--dataset needs --root"),
        (["--dataset", "CIFAR100", "--root", "nowhere"], "put its files there or give --download"),
        (["--task", "t0.npz", "--dataset", "MNIST"], "exclude each other"),
        (["--model", "hat_test_resnt"], "--model: there is no 'hat_test_resnt'; did you mean 'hat_test_resnet'?"),
        (["--model-kwargs", "drop_rate"], "--model-kwargs: got 'drop_rate', expected key=value"),
        (["--set", "max_scal=3"], "did you mean 'max_scale'"),
        (["--set", "schedule=cosin"], "did you mean 'cosine'"),
        (["--method", "joint", "--model", "vit_tiny_patch16_224"], "does not take images of [3, 32, 32]"),
        (["--method", "joint", "--rank", "3"], "--rank has no effect on learning images by joint, which adapts"),
        (["--method", "tasl", "--target", "no"], "peft cannot adapt this model"),
        (["--method", "tasel"], "--method: got 'tasel'"),
        (["--word", "a:b=c"], "--word has no effect on learning images; leave it out"),
        (["--validation", "0.01", "--score-on", "validation"], "a share of 0.01 holds out no image of 48"),
        (["--set", "num_tasks=1"], "--set num_tasks: got 1, expected at least 3, the number of tasks given"),
        (["--optimizer", "adamq"], "got 'adamq', expected a name of timm.optim.list_optimizers(); did you mean"),
        (["--schedule", "cosinus"], "schedule: got 'cosinus', expected one of constant, linear, cosine, tanh"),
        (["--epochs", "0"], "epochs: got 0, expected an integer of at least 1"),
        (["--amp", "fp8"], "amp: got 'fp8', expected one of none, bf16, fp16"),
        (["--device", "cuda:99"], "--device: 'cuda:99' cannot be used here"),
        (["--resume"], "--resume: there is no run of hatcl train in runs/; name its folder with --output"),
    ],
)
def test_bad_flags_give_one_clean_message(tmp_path, monkeypatch, capsys, args, text):
    tasks = write_tasks(tmp_path)
    monkeypatch.chdir(tmp_path)
    data = [] if {"--task", "--split", "--dataset", "--resume"} & set(args) else given(tasks)
    code, _, err = call(capsys, "train", *data, *args)
    assert code == 2 and err.startswith("error: ") and text in err
    assert "Traceback" not in err and not (tmp_path / "runs").exists()


# --- interruptions ---


def start(output: Path, *args: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "hatcl", "train", "--resume", "--output", str(output), *args]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # a background job of a shell inherits an ignored SIGINT; the command is to meet it as from a terminal
    listens = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment, preexec_fn=listens
    )


def progress(output: Path) -> tuple[int, int]:
    """Stage and step that the newest complete checkpoint stands at."""
    stages, step = 0, 0
    for name in ("checkpoint", ".checkpoint.old"):
        try:  # the run may be replacing it at this moment
            stages = json.loads((output / name / "progress.json").read_text())["stages"]
            break
        except FileNotFoundError:
            continue
    try:
        step = torch.load(output / f"learning_{stages}.pt", weights_only=True)["step"]
    except FileNotFoundError:
        pass
    return stages, step


def sealed_digests(output: Path) -> list[str]:
    """The outputs' digests of the tasks sealed so far, as the newest complete checkpoint tells."""
    for name in ("metrics.json", "checkpoint/progress.json", ".checkpoint.old/progress.json"):
        try:
            content = json.loads((output / name).read_text())
        except FileNotFoundError:
            continue
        return [known["outputs_sha256"] for known in content.get("result", content)["facts"]]
    return []


def kill_and_resume(tmp_path: Path, moments: int, seed: int) -> list[tuple[int, int]]:
    """Kill a run at random moments of its work, resume it each time, and demand the very result of a run that was left
    alone. Returns where the kills found it."""
    args = [
        *given(write_tasks(tmp_path)),
        "--epochs",
        "3",
        "--batch-size",
        "8",
        "--device",
        "cpu",
        "--checkpoint-seconds",
        "0",
    ]
    whole = start(tmp_path / "whole", *args)
    begun = time.monotonic()
    while not (tmp_path / "whole" / "checkpoint").exists() and whole.poll() is None:
        time.sleep(0.01)
    set_up = time.monotonic() - begun
    _, errors = whole.communicate()
    assert whole.returncode == 0, errors.decode()
    work = time.monotonic() - begun - set_up
    expected = sealed_digests(tmp_path / "whole")

    def check(output: Path) -> None:
        assert sealed_digests(output) == expected
        metrics = json.loads((output / "metrics.json").read_text())
        assert metrics["details"]["bit_equal"] is True and metrics["details"]["exact"] is True

    rng = random.Random(seed)
    output, places = tmp_path / "killed", []
    for kill in range(moments):
        process = start(output, *args)
        if rng.random() < 0.2:
            time.sleep(rng.uniform(0.0, set_up))
        else:  # after it has learned something, a small share of the work each time, so that the kills spread over it
            before = progress(output)
            while progress(output) == before and process.poll() is None:
                time.sleep(0.01)
            time.sleep(rng.uniform(0.0, 1.5) * work / moments)
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        assert not errors, errors.decode()
        digests = sealed_digests(output)
        assert digests == expected[: len(digests)]
        places.append(progress(output))
        if process.returncode == 0:  # it was faster; the other kills meet a new run
            check(output)
            output = tmp_path / f"killed{kill}"
    process = start(output, *args)
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()
    check(output)
    assert [path.name for path in output.iterdir() if path.name.startswith(".")] == []
    return places


def test_ctrl_c_says_how_to_go_on(tmp_path):
    output = tmp_path / "run"
    process = start(output, *given(write_tasks(tmp_path)), "--epochs", "300")
    while not (output / "config.json").exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert errors.decode().strip() == f"stopped. Resume with: hatcl train --resume --output {output}"


def test_killed_at_3_random_moments_and_resumed(tmp_path):
    kill_and_resume(tmp_path, moments=3, seed=0)


@pytest.mark.slow
def test_killed_at_20_random_moments_and_resumed(tmp_path):
    places = kill_and_resume(tmp_path, moments=20, seed=1)
    assert len(set(places)) > 5, f"the kills met the run only at (task, step) {places}"


def test_default_model_exists():
    assert timm.is_model(DEFAULT_MODEL)
