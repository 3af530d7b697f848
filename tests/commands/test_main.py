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
from safetensors.torch import load_file, save_file

import hatcl
from hatcl.commands import main as cli

FAST = ["--epochs", "2", "--batch-size", "16", "--device", "cpu"]


def write_tasks(folder: Path, count: int = 3) -> list[Path]:
    """Small grey images whose bright corner tells the class."""
    paths = []
    for t in range(count):
        rng = np.random.default_rng(t)
        y = np.arange(48) % 2
        x = rng.integers(0, 120, (48, 16, 16), dtype=np.uint8)
        x[y == 1, :8, 8 * (t % 2) : 8 * (t % 2) + 8] += 120
        paths.append(folder / f"t{t}.npz")
        np.savez(paths[-1], x_train=x, y_train=y, x_test=x[:16], y_test=y[:16])
    return paths


def call(capsys, *args: str) -> tuple[int, str, str]:
    """Exit code, output and errors of one command, line breaks of the terminal taken out."""
    capsys.readouterr()
    try:
        cli.main(list(map(str, args)))
        code = 0
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 0
    out, err = capsys.readouterr()
    return code, out, " ".join(err.split())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of three tasks, for the tests that only look at it."""
    folder = tmp_path_factory.mktemp("cli")
    tasks = write_tasks(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        try:
            cli.main(["train", "--tasks", ",".join(path.name for path in tasks), "--output", "run", *FAST])
        except SystemExit as exit_:
            assert not exit_.code
    return folder / "run"


# --- train ---


def test_the_run_folder_holds_everything(run):
    names = {path.name for path in run.iterdir()}
    assert {"model", "metrics.json", "config.json"} <= names <= {"model", "metrics.json", "config.json", "picture.png"}
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["bit_equal"] is True and metrics["exact"] is True and metrics["forgetting"] == 0
    assert [record["name"] for record in metrics["records"]] == ["t0", "t1", "t2"]
    config = json.loads((run / "config.json").read_text())
    assert config["input_shape"] == [3, 32, 32] and config["tasks"][0] == {"name": "t0", "classes": 2}
    assert Path(config["flags"]["tasks"].split(",")[0]).is_absolute()


def test_the_end_of_a_run_says_what_counts(run, capsys):
    code, out, _ = call(capsys, "train", "--resume", "--output", run)
    assert code == 0
    shown = " ".join(out.split())
    for words in ("is finished already", "average accuracy", "forgetting 0.00 %", "row: learned, column: tested"):
        assert words in shown
    assert "certificate: exact. The logits of all 3 sealed tasks are bit-equal to those at sealing" in shown
    assert shown.count("bit-equal") >= 4  # one per task and the certificate's


def test_train_by_default_learns_the_digits(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(capsys, "train", "--epochs", "1")
    assert code == 0 and (tmp_path / "runs" / "001" / "model").is_dir()
    metrics = json.loads((tmp_path / "runs" / "001" / "metrics.json").read_text())
    assert [record["name"] for record in metrics["records"]] == [f"digits {c}-{c + 1}" for c in range(0, 10, 2)]
    code, out, _ = call(capsys, "train", "--resume")
    assert code == 0 and "001 is finished already" in " ".join(out.split())


def test_options_reach_the_model_and_its_config(tmp_path, capsys):
    tasks = write_tasks(tmp_path, 2)
    code, _, err = call(
        capsys, "train", "--split", f"{tasks[0]}:1", "--output", tmp_path / "run", *FAST, "--model", "hat_test_resnet",
        "--model-kwargs", "drop_rate=0.1", "--hat", "max_scale=200", "--hat", "schedule=cosine", "--hat", "num_tasks=3",
        "--optimizer", "sgd", "--schedule", "cosine", "--amp", "bf16", "--flip", "--crop", "2", "--fit", "pad",
    )  # fmt: skip
    assert code == 0, err
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert len(metrics["records"]) == 1 and metrics["records"][0]["steps"] == 2 * 3
    model = hatcl.from_pretrained(tmp_path / "run" / "model")
    assert hatcl.tasks(model) == [0]


def test_a_finished_or_other_run_is_not_overwritten(run, capsys):
    code, _, err = call(capsys, "train", "--output", run, *FAST)
    assert code == 2 and "already holds a run; add --resume to go on with it, or name another folder" in err
    code, _, err = call(capsys, "train", "--output", run, "--resume", "--epochs", "3")
    assert code == 2 and "was started with --epochs 2, now came 3; leave the flag out" in err
    code, _, err = call(capsys, "train", "--output", run, "--resume", "--epochs", "2", "--device", "cpu")
    assert code == 0


# --- certify, forget, describe, list ---


def test_certify_says_each_task_is_exact(run, capsys):
    code, out, _ = call(capsys, "certify", run, "--device", "cpu")
    assert code == 0
    assert [f"task {t}: exact, logits bit-equal to those at sealing" in out for t in range(3)] == [True] * 3


def test_certify_works_without_the_data_and_on_a_plain_model(run, tmp_path, capsys):
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", str(run), str(copy)], check=True)
    config = json.loads((copy / "config.json").read_text())
    config["flags"]["tasks"] = str(tmp_path / "gone.npz")
    (copy / "config.json").write_text(json.dumps(config))
    code, out, _ = call(capsys, "certify", copy)
    assert code == 0 and "gone.npz is not a file" in " ".join(out.split()) and "task 2: exact" in out
    code, out, _ = call(capsys, "certify", copy / "model")
    assert code == 0 and "no finished run's records here" in " ".join(out.split()) and "task 2: exact" in out


def test_certify_notices_a_moved_task(run, tmp_path, capsys):
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", str(run), str(copy)], check=True)
    metrics = json.loads((copy / "metrics.json").read_text())
    metrics["records"][1]["logits_sha256"] = "0" * 64
    (copy / "metrics.json").write_text(json.dumps(metrics))
    code, out, _ = call(capsys, "certify", copy)
    assert code == 1 and "task 1: exact, logits MOVED since sealing" in out
    assert "task 0: exact, logits bit-equal" in out


def test_forget_erases_one_task_and_leaves_the_others(run, tmp_path, capsys):
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", str(run), str(copy)], check=True)
    before = {path.name: path.read_bytes() for path in (copy / "model").iterdir()}
    code, out, _ = call(capsys, "forget", copy, "--task", "1", "--dry-run")
    assert code == 0 and out.strip()
    assert {path.name: path.read_bytes() for path in (copy / "model").iterdir()} == before
    code, out, _ = call(capsys, "forget", copy, "--task", "1")
    assert code == 0 and out.strip()
    assert hatcl.tasks(hatcl.from_pretrained(copy / "model")) == [0, 2]
    assert json.loads((copy / "metrics.json").read_text())["forgotten"] == [1]
    code, out, _ = call(capsys, "certify", copy)
    assert code == 0 and "task 1" not in out
    assert "task 2: exact, logits bit-equal to those at sealing" in out
    code, _, err = call(capsys, "forget", copy, "--task", "1")
    assert code == 2 and "1" in err
    assert call(capsys, "describe", copy)[0] == 0


def test_describe_shows_units_and_shares(run, capsys):
    code, out, _ = call(capsys, "describe", run)
    description = hatcl.describe(hatcl.from_pretrained(run / "model")).to_dict()
    assert code == 0
    last = [line.split() for line in out.splitlines() if line.split()[:1] == ["all"]][0]
    assert last[1:] == [str(description["units"]), *[str(description["use"][t]) for t in range(3)]]
    assert "shared both" in out and "own copy" in out


def test_list_prints_plain_names(capsys):
    code, out, _ = call(capsys, "list", "hat_test_res*")
    assert code == 0 and "hat_test_resnet" in out.split()
    code, _, err = call(capsys, "list", "hat_nothing*")
    assert code == 2 and "no model matches 'hat_nothing*'" in err


# --- errors ---


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--tasks", "none.npz"], "none.npz is not a file; expected an .npz file with the arrays x_train"),
        (["--split", "5"], "--split: got '5', expected path.npz:5"),
        (["--split", "a.npz"], "expected path.npz:5"),
        (["--dataset", "CIFAR100"], "--dataset needs --root"),
        (["--dataset", "CIFAR100", "--root", "nowhere"], "put its files there or give --download"),
        (["--tasks", "a.npz", "--dataset", "MNIST"], "exclude each other"),
        (["--model", "hat_test_resnt"], "--model: there is no 'hat_test_resnt'; did you mean 'hat_test_resnet'?"),
        (["--model-kwargs", "drop_rate"], "--model-kwargs: got 'drop_rate', expected key=value"),
        (["--hat", "max_scal=3"], "did you mean 'max_scale'"),
        (["--hat", "schedule=cosin"], "did you mean 'cosine'"),
        (["--hat", "num_tasks=1"], "--hat num_tasks: got 1, expected at least the 3 tasks at hand"),
        (["--optimizer", "adamq"], "optimizer: got 'adamq'"),
        (["--schedule", "cosinus"], "schedule: got 'cosinus'"),
        (["--epochs", "0"], "epochs: got 0, expected an integer of at least 1"),
        (["--amp", "fp8"], "amp: got 'fp8', expected one of none, bf16, fp16"),
        (["--device", "cuda:99"], "--device: 'cuda:99' cannot be used here"),
        (["--resume"], "--resume: there is no run in runs/; name its folder with --output"),
    ],
)
def test_bad_flags_give_one_clean_message(tmp_path, monkeypatch, capsys, args, text):
    tasks = write_tasks(tmp_path)
    monkeypatch.chdir(tmp_path)
    data = [] if {"--tasks", "--split", "--dataset", "--resume"} & set(args) else ["--tasks", ",".join(map(str, tasks))]
    code, _, err = call(capsys, "train", *data, *args)
    assert code == 2 and err.startswith("error: ") and text in err
    assert "Traceback" not in err


def test_a_folder_without_a_model(tmp_path, capsys):
    for command in (["certify"], ["describe"], ["forget", "--task", "0"]):
        code, _, err = call(capsys, *command, tmp_path)
        assert code == 2 and "holds no model; expected the folder of a run" in err


def test_a_truncated_or_tampered_model_is_refused(run, tmp_path, capsys):
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", str(run), str(copy)], check=True)
    (weights,) = (copy / "model").glob("*.safetensors")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-64])
    code, _, err = call(capsys, "certify", copy)
    assert code == 2 and weights.name in err
    torch.save({"weights": 1}, weights)
    code, _, err = call(capsys, "describe", copy)
    assert code == 2 and weights.name in err


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
    """Task and step that the newest complete checkpoint stands at."""
    for name in ("checkpoint", ".checkpoint.old"):
        try:  # the run may be replacing it at this moment
            content = json.loads((output / name / "progress.json").read_text())
        except FileNotFoundError:
            continue
        return content["task"], content["step"]
    return 0, 0


def sealed_digests(output: Path) -> list[str]:
    """The logits' digests of the tasks sealed so far, as the newest complete checkpoint tells."""
    for name in ("metrics.json", "checkpoint/progress.json", ".checkpoint.old/progress.json"):
        try:
            content = json.loads((output / name).read_text())
        except FileNotFoundError:
            continue
        return [record["logits_sha256"] for record in content.get("result", content)["records"]]
    return []


def kill_and_resume(tmp_path: Path, moments: int, seed: int) -> list[tuple[int, int]]:
    """Kill a run at random moments of its work, resume it each time, and demand the very result of a run that was left
    alone. Returns where the kills found it."""
    tasks = ",".join(map(str, write_tasks(tmp_path)))
    args = ["--tasks", tasks, "--epochs", "3", "--batch-size", "8", "--device", "cpu", "--checkpoint-seconds", "0"]
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
        assert metrics["bit_equal"] is True and metrics["exact"] is True

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
    process = start(output, "--tasks", ",".join(map(str, write_tasks(tmp_path))), "--epochs", "300")
    while not (output / "config.json").exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert errors.decode().strip() == f"stopped. Go on with: hatcl train --resume --output {output}"


def test_killed_at_3_random_moments_and_resumed(tmp_path):
    kill_and_resume(tmp_path, moments=3, seed=0)


@pytest.mark.slow
def test_killed_at_20_random_moments_and_resumed(tmp_path):
    places = kill_and_resume(tmp_path, moments=20, seed=1)
    assert len(set(places)) > 5, f"the kills met the run only at (task, step) {places}"


def test_default_model_exists():
    assert timm.is_model(cli.DEFAULT_MODEL)


# --- zoo ---

PASSED = {
    "family": "resnet", "passed": True, "parameters": 469688, "units": 1672, "known": 0.98765, "unknown": {},
    "notes": [], "use": [0.5, 0.5], "forward_seconds": 0.01, "trace_seconds": 0.1, "seconds": 12.3,
    "shares": {"shared_both": 0.75, "shared_one": 0.0, "own_copy": 0.25, "always_on": 0.0},
}  # fmt: skip
FAILED = {"family": "vit", "passed": False, "failure": "ProofFailed: task 0 changed while task 1 was learned"}


@pytest.fixture
def proving(tmp_path, monkeypatch):
    """`hatcl zoo` in an empty folder without its processes: `proving.rows` are what they give, `proving.asked` for
    whom."""
    import types

    from hatcl.zoo import page, run

    state = types.SimpleNamespace(rows={}, asked=[], limits=[], known=tmp_path / "known.json", folder=tmp_path / "here")

    def prove_one(name, **limits):
        state.asked.append(name)
        state.limits.append(limits)
        return state.rows.get(name, PASSED)

    def checkout():  # the package lies in the working folder
        (state.folder / "docs").mkdir()
        state.known = state.folder / "known.json"
        monkeypatch.setattr(page, "KNOWN", state.known)

    state.checkout = checkout
    state.folder.mkdir()
    monkeypatch.chdir(state.folder)
    monkeypatch.setattr(run, "prove_one", prove_one)
    monkeypatch.setattr(page, "KNOWN", state.known)
    return state


def test_zoo_lists_what_is_known(proving, capsys):
    rows = {"resnet18": 1.0, "resnet34": 0.9449, "hf/bert": 0.99}
    known = {n: {"family": n.rstrip("0123456789"), "parameters": 3, "known": share} for n, share in rows.items()}
    proving.known.write_text(json.dumps(known))
    code, out, _ = call(capsys, "zoo")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert code == 0 and "3 models proved, 2 families" in lines
    assert "resnet 94.5 % resnet18, resnet34" in lines and "hf/bert 99.0 % hf/bert" in lines
    assert lines.index("hf/bert 99.0 % hf/bert") < lines.index("resnet 94.5 % resnet18, resnet34")
    assert proving.asked == []


def test_zoo_proves_prints_writes_and_goes_on(tmp_path, capsys):
    results = tmp_path / "zoo.json"
    code, out, err = call(capsys, "zoo", "test_resnet", "--results", results)
    assert code == 0, err
    row = json.loads(results.read_text())["models"]["test_resnet"]
    assert row["passed"] and row["known"] == 1
    shown = " ".join(out.split())
    said = f"test_resnet: exact, {row['units']:,} units, 100.0 % known, {row['seconds']:.0f} s"
    assert said in shown and f"1 of 1 passed; figures in {results}" in shown
    written = results.stat().st_mtime_ns
    code, out, _ = call(capsys, "zoo", "test_resnet", "--results", results)  # nothing is run: the same figures
    assert code == 0 and said in " ".join(out.split()) and results.stat().st_mtime_ns == written


def test_zoo_says_which_model_fails_and_why(proving, capsys):
    proving.rows = {"test_vit": FAILED}
    code, out, _ = call(
        capsys, "zoo", "test_resnet", "test_vit*", "--results", "zoo.json", "--seconds", "7", "--memory", "2"
    )
    shown = " ".join(out.split())
    assert code == 1 and "test_vit: ProofFailed: task 0 changed while task 1 was learned" in shown
    assert "test_resnet: exact, 1,672 units, 98.8 % known, 12 s" in shown
    assert "5 of 6 passed; figures in zoo.json" in shown
    assert proving.asked == ["test_resnet", "test_vit", "test_vit2", "test_vit3", "test_vit4", "test_vit_relpos"]
    assert proving.limits == [{"seconds": 7.0, "memory_gb": 2.0}] * 6
    assert json.loads(Path("zoo.json").read_text())["models"]["test_vit"] == FAILED
    assert call(capsys, "zoo", "test_vit", "--results", "zoo.json")[0] == 1  # it stays a failure
    assert len(proving.asked) == 6
    proving.rows = {}
    assert call(capsys, "zoo", "test_vit", "--results", "zoo.json", "--again")[0] == 0
    assert proving.asked[6:] == ["test_vit"]


def test_zoo_takes_patterns_families_and_sizes(proving, capsys):
    def asked(*args):
        proving.asked.clear()
        code, _, err = call(capsys, "zoo", *args, "--again")
        assert code == 0, err
        return list(proving.asked)

    assert asked("test_*", "--family", "resnet") == ["test_resnet"]
    assert asked("test_resnet", "test_res*") == ["test_resnet"]  # each once
    assert asked("hf/gpt2*") == ["hf/gpt2", "hf/gpt2_classifier"]
    assert asked("--family", "hf/bert") == ["hf/bert"]
    sizes = {n: sum(p.numel() for p in timm.create_model(n).parameters()) for n in timm.list_models("test_resnet*")}
    assert asked("test_resnet", "resnet18", "--max-params", sizes["test_resnet"]) == ["test_resnet"]
    code, _, err = call(capsys, "zoo", "test_resnet", "resnet18", "--max-params", sizes["test_resnet"] - 1)
    assert code == 2 and "--max-params 469,687 parameters: all models that match are larger" in err
    assert asked("test_resnet", "resnet18") == ["test_resnet", "resnet18"]
    assert Path("benchmarks/results/zoo.json").exists()  # where the figures go by default


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["nothing*"], "no model matches 'nothing*'; see hatcl list and try a wider pattern"),
        (["test_resnet", "nothing*"], "no model matches 'nothing*'; see hatcl list"),
        (["test_*", "--family", "resnt"], "no model matches 'test_*' in family 'resnt'; see hatcl list"),
        (["--family", "resnt"], "no model matches '*' in family 'resnt'"),
        (["--publish"], "--publish writes docs/zoo.md; run it in a checkout of hatcl"),
        (["test_resnet", "--publish"], "--publish writes docs/zoo.md; run it in a checkout of hatcl"),
    ],
)
def test_zoo_says_what_it_cannot_do(proving, capsys, args, text):
    code, _, err = call(capsys, "zoo", *args)
    assert code == 2 and err.startswith("error: ") and text in err and "Traceback" not in err
    assert not proving.known.exists() and proving.asked == (
        ["test_resnet"] if args[-1] == "--publish" and args[1:] else []
    )


def test_zoo_publishes_in_a_checkout(proving, capsys):
    proving.checkout()
    proving.rows = {"test_vit": FAILED}
    code, _, _ = call(capsys, "zoo", "test_resnet", "test_vit", "--publish")
    assert code == 1  # published all the same
    page = Path("docs/zoo.md").read_text()
    assert "| timm | 1 of 2 | 1 of 2 |" in page and "| test_vit | ProofFailed: task 0 changed" in page
    assert json.loads(proving.known.read_text()) == {
        "test_resnet": {"family": "resnet", "parameters": 469688, "known": 0.9877}
    }
    Path("docs/zoo.md").unlink()
    code, _, _ = call(capsys, "zoo", "--publish")  # from the results alone
    assert code == 0 and Path("docs/zoo.md").read_text() == page and proving.asked == ["test_resnet", "test_vit"]
    code, out, _ = call(capsys, "zoo")
    assert code == 0 and "1 models proved, 1 families" in " ".join(out.split())


def test_zoo_publish_without_results_is_one_clean_message(proving, capsys):
    proving.checkout()
    code, _, err = call(capsys, "zoo", "--publish")
    assert code == 2 and err.startswith("error: --publish: there is no benchmarks/results/zoo.json yet; prove some")
    assert not Path("docs/zoo.md").exists() and not proving.known.exists()


# --- compose ---


@pytest.fixture
def checkpoints(tmp_path):
    """base.safetensors, its fine-tunes 0 and 1, and a task vector of another base."""
    torch.manual_seed(0)
    for name in ("base", "0", "1"):
        save_file({"a": torch.randn(5, 5), "b": torch.randn(5), "n": torch.tensor(3)}, tmp_path / f"{name}.safetensors")
    vector = hatcl.TaskVector.between(tmp_path / "0.safetensors", tmp_path / "1.safetensors")
    vector.save(tmp_path / "vector.safetensors")
    return tmp_path


def test_compose_adds_checkpoints(checkpoints, monkeypatch, capsys):
    monkeypatch.chdir(checkpoints)
    code, out, _ = call(
        capsys, "compose", "base.safetensors", "0.safetensors:0.4", "1.safetensors:-1", "--out", "out",
        "--shard-size", "100B",
    )  # fmt: skip
    assert code == 0 and "out: base.safetensors and 2 parts" in out
    base, one, two = (load_file(f"{n}.safetensors") for n in ("base", "0", "1"))
    want = hatcl.vectors.task_vector.composed(
        base, [(0.4, hatcl.TaskVector.between(base, one)), (-1, hatcl.TaskVector.between(base, two))]
    )
    got = hatcl.vectors.tensors.named_tensors("out")
    assert len(list(Path("out").glob("model-*.safetensors"))) == 2
    assert {n for n in want if torch.equal(want[n], got[n])} == {"a", "b", "n"} == set(got)
    code, out, _ = call(capsys, "compose", "base.safetensors", "1.safetensors", "--out", "one.safetensors")
    assert code == 0 and "one.safetensors: base.safetensors and 1 part\n" in out
    assert all(torch.equal(t, two[n]) for n, t in load_file("one.safetensors").items())  # bit for bit


def test_compose_writes_vectors_and_merges(checkpoints, monkeypatch, capsys):
    monkeypatch.chdir(checkpoints)
    Path("0.safetensors").rename("x:0.5")  # a name that looks like a coefficient
    code, _, _ = call(capsys, "compose", "base.safetensors", "x:0.5", "--out", "v", "--vector")
    assert code == 0 and torch.equal(
        hatcl.TaskVector.load("v").apply_to("base.safetensors")["a"], load_file("x:0.5")["a"]
    )
    parts = ["x:0.5:2", "1.safetensors"]
    code, _, err = call(
        capsys, "compose", "base.safetensors", *parts, "--method", "ties", "--option", "density=0.5", "--out", "m",
    )  # fmt: skip
    assert code == 0, err
    code, _, _ = call(capsys, "compose", "base.safetensors", "vector.safetensors", "--no-check", "--out", "n")
    assert code == 0 and Path("n/model.safetensors").exists()


@pytest.mark.parametrize(
    "args, text",
    [
        (["no.safetensors"], "no.safetensors: no such file; expected safetensors"),
        (
            ["0.safetensors:half"],
            "0.safetensors:half: no such file, and 'half' is no coefficient; expected PATH or PATH:COEF",
        ),
        (["0.safetensors:nan"], "coefficient of 0.safetensors: got nan, expected a finite number"),
        (["0.safetensors", "--shard-size", "many"], "--shard-size: got 'many', expected a size such as 100MB or 2GB"),
        (["0.safetensors", "--shard-size", "1.1.1MB"], "--shard-size: got '1.1.1MB'"),
        (["0.safetensors", "--shard-size", "0MB"], "--shard-size: got '0MB'"),
        (["0.safetensors", "--option", "x"], "--option: got 'x', expected key=value"),
        (["0.safetensors", "--option", "x=1"], "options: got x without a method that takes them"),
        (["0.safetensors", "--method", "tise"], "method: got 'tise'"),
        (["vector.safetensors"], "is not what this vector was taken from; apply it to its own base"),
        (["0.safetensors", "--out", "base.safetensors"], "base.safetensors would replace"),
    ],
)
def test_compose_refuses_with_one_clean_message(checkpoints, monkeypatch, capsys, args, text):
    monkeypatch.chdir(checkpoints)
    code, _, err = call(capsys, "compose", "base.safetensors", *args, *([] if "--out" in args else ["--out", "out"]))
    assert code == 2 and err.startswith("error: ") and text in err and "Traceback" not in err
    assert not list(Path("out").glob("*.safetensors"))


def test_compose_stopped_by_ctrl_c_goes_on(checkpoints, monkeypatch, capsys):
    monkeypatch.chdir(checkpoints)
    args = ("compose", "base.safetensors", "0.safetensors:0.5", "--out", "out", "--shard-size", "1B")
    real, left = hatcl.vectors.files._write_file, [2]

    def stopping(*write):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        real(*write)

    monkeypatch.setattr(hatcl.vectors.files, "_write_file", stopping)
    code, _, err = call(capsys, *args)
    assert code == 130 and "stopped. The same command goes on from here" in err
    left[0] = 1  # one of three shards is left
    code, _, _ = call(capsys, *args)
    assert code == 0 and len(list(Path("out").glob("*.safetensors"))) == 3


def test_sizes():
    sizes = {"100MB": 100_000_000, "2 GB": 2_000_000_000, "1.5KB": 1500, "1MiB": 1 << 20, "7b": 7}
    assert {text: cli._bytes("--shard-size", text) for text in sizes} == sizes
