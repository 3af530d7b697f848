from __future__ import annotations

import json
import re

import pytest

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from continual_parts import bert, causal_lm, files, texts, tokenizer, vocabulary, write_texts  # noqa: E402
from safetensors.torch import load_file, save  # noqa: E402

from hatcl import commands as cli  # noqa: E402
from hatcl.commands import train as _train  # noqa: E402, F401
from hatcl.commands._routing import load_router  # noqa: E402
from hatcl.continual import learn_sequence  # noqa: E402
from hatcl.data.benchmarks import BENCHMARKS  # noqa: E402
from hatcl.files import write_files  # noqa: E402
from hatcl.hat.saving.pretrained import from_pretrained  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
QUICK = ["--batch-size", "8", "--lr", "0.02", "--rank", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Tiny models of three kinds, and two tasks."""
    folder = tmp_path_factory.mktemp("tasl")
    t5 = transformers.T5Config(
        vocab_size=vocabulary(), d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    for name, model in {
        "bert": bert(),
        "t5": transformers.T5ForConditionalGeneration(t5),
        "gpt2": causal_lm(),
    }.items():
        model.save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    write_texts(folder / "a.json", texts(0, count=16))
    write_texts(folder / "b.json", texts(1, ("red", "green"), count=16))
    return folder


@pytest.fixture
def here(made, monkeypatch):
    monkeypatch.chdir(made)
    monkeypatch.setattr(cli.out, "width", 200)
    return made


def hatcl(*args):
    """The exit code."""
    with pytest.raises(SystemExit) as done:
        cli.main([str(a) for a in args])
    return done.value.code


def run(out, *more, model="bert", tasks=("a=a.json", "b=b.json")):
    return hatcl("train", "--model", model, *[p for t in tasks for p in ("--task", t)], "--output", out, *QUICK, *more)


def test_a_benchmark_in_place_of_its_tasks(here, tmp_path, capsys):
    """TRACE's tasks in order, each with its own measure; one that is given for a task stays."""
    names = BENCHMARKS["trace"].order(None)
    for i, name in enumerate(names):
        for part, rows in (("train", texts(i, count=8).train), ("test", texts(i, count=8).test)):
            path = tmp_path / "data" / name / f"{part}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps([{"prompt": x, "answer": y} for x, y in rows[:4]]))
    out, asked = tmp_path / "run", ["--benchmark", f"trace={tmp_path / 'data'}"]
    more = [
        "--form",
        "causal",
        "--max-output",
        "1",
        "--epochs",
        "1",
        "--method",
        "sequential",
        "--measure",
        "ScienceQA=bleu_1",
    ]
    assert hatcl("train", "--model", "gpt2", *asked, "--output", out, *QUICK, *more) == 0
    options = json.loads((out / "config.json").read_text())["options"]
    assert [t.partition("=")[0] for t in options["task"]] == list(names)
    assert set(options["measure"]) == {
        "ScienceQA=bleu_1", "MeetingBank=rouge_l", "Py150=similarity", "20Minuten=sari"
    }  # fmt: skip
    assert hatcl("train", "--output", out, "--resume") == 0 and "finished already" in capsys.readouterr().out
    for words, text in (
        (["--benchmark", "trace"], "--benchmark: got 'trace', expected NAME=FOLDER or NAME:ORDER=FOLDER"),
        (["--benchmark", f"trace:x={tmp_path}"], "expected NAME=FOLDER or NAME:ORDER=FOLDER"),
        (["--benchmark", f"tracee={tmp_path}"], "benchmark: got 'tracee', expected one of .*did you mean 'trace'"),
        (["--benchmark", f"long-sequence:4={tmp_path}"], "has no dbpedia, amazon, yahoo, agnews of long_sequence;"),
        ([*asked, "--task", "a=a.json"], "--task: got 'a=a.json' together with --benchmark, which has its own"),
    ):
        assert hatcl("train", "--model", "gpt2", *words, "--output", tmp_path / "no") == 2
        assert re.search(text, " ".join(capsys.readouterr().err.split())) and not (tmp_path / "no").exists()


def test_a_benchmark_in_tasls_folders_is_learned_in_its_own_parts(here, tmp_path):
    """Not in parts that are cut from the file of training, which is a list as any other."""
    names = BENCHMARKS["long_sequence"].order(4)
    for i, name in enumerate(names):
        for part, count in (("train", 7), ("dev", 2), ("test", 3)):
            path = tmp_path / "data" / part / f"{name}_T5.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = texts(i, count=count).train[:count]
            path.write_text(json.dumps([{"instruction": "", "input": x, "output": y} for x, y in rows]))
    asked = ["--benchmark", f"long-sequence:4={tmp_path / 'data'}", "--method", "sequential", "--epochs", "1"]
    assert hatcl("train", "--model", "bert", *asked, "--output", tmp_path / "run", *QUICK) == 0
    tasks = json.loads((tmp_path / "run" / "config.json").read_text())["tasks"]
    assert [(t["name"], t["examples"]) for t in tasks] == [(name, 7) for name in names]


def test_run_show_and_going_on(here, tmp_path, capsys, monkeypatch):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(whole) == 0
    said = capsys.readouterr().out
    for word in ("before learning, a: score", "stage 1, b: score", "average", "BWT", "skills.png"):
        assert word in said
    assert (whole / "tasks" / "1_b" / "adapter" / "adapter_model.safetensors").exists()
    assert (whole / "skills.png").read_bytes()[:4] == (whole / "overlap.png").read_bytes()[:4] == b"\x89PNG"

    def stops(*args, on_progress, **options):
        def tell(at):
            if at.stage == 1:
                raise KeyboardInterrupt
            on_progress(at)

        return learn_sequence(*args, on_progress=tell, **options)

    with monkeypatch.context() as m:
        m.setattr("hatcl.continual.learn_sequence", stops)
        assert run(killed) == 130
    assert f"Resume with: hatcl train --resume --output {killed}" in " ".join(capsys.readouterr().err.split())
    assert hatcl("show", str(killed)) == 0
    assert "1 of 2 tasks are learned" in capsys.readouterr().out
    assert hatcl("train", "--resume", "--output", killed) == 0
    a, b = files(whole), files(killed)
    assert a.pop("seconds.json") and b.pop("seconds.json") and b.pop("report.html")
    assert a == b
    capsys.readouterr()
    assert hatcl("show", str(whole), "--share", "0.5") == 0
    assert "tasl, in %" in capsys.readouterr().out


@pytest.mark.parametrize("model, form", [("bert", "labels"), ("t5", "seq2seq"), ("gpt2", "causal")])
def test_every_kind_of_model(here, tmp_path, capsys, model, form):
    assert run(tmp_path / "run", "--method", "joint", "--max-output", "3", model=model) == 0
    said = capsys.readouterr().out
    assert "·" in said and "skills.png" not in said  # joint scores no units and knows no order
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["method"]["name"] == "joint"
    assert stored["command"] == "train" and stored["options"]["form"] == "auto"


def test_words_and_options_of_the_method(here, tmp_path):
    more = ["--word", "a:warm=red", "--set", "grain=matrix", "--set", "consolidate={'mode': 'adaptive'}", "--plain"]
    assert run(tmp_path / "run", *more, "--train", "8", "--target", "query") == 0
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["method"]["options"]["grain"] == "matrix"
    assert stored["method"]["options"]["consolidate"]["mode"] == "adaptive"
    assert [t["examples"] for t in stored["tasks"]] == [8, 8]
    assert all(".query." in n for n in stored["tensors"])


def test_errors(here, tmp_path, capsys):
    bad = tmp_path / "bad.json"
    bad.write_text("[]")
    cases = [
        ({"tasks": ["a"]}, "/a does not exist; expected a file, a folder, NAME@FOLDER of torchvision, or hf:NAME"),
        ({"tasks": ["a=a.json", "a=b.json"]}, "two are named 'a'"),
        ({"tasks": ["a=none.json"]}, "none.json does not exist"),
        ({"tasks": [f"a={bad}"]}, "expected an object with train and test"),
        ({"model": "none"}, "transformers cannot load it"),
        ({"more": ["--method", "tasel"]}, "did you mean 'tasl'"),
        ({"more": ["--set", "grian=matrix"]}, "did you mean 'grain'"),
        ({"more": ["--form", "label"]}, "did you mean 'labels'"),
        ({"more": ["--word", "a=red"]}, "expected NAME:LABEL=WORD"),
        ({"more": ["--word", "c:warm=red"]}, "--word: got 'c'"),
        ({"more": ["--word", "a:hot=red"]}, "a has no label 'hot'; it has cold, warm"),
        ({"more": ["--word", "a:warm=red"], "model": "t5"}, "only with --form labels"),
        ({"more": ["--target", "qurey"]}, "it has the linear modules dense, key, query, value"),
        ({"more": ["--rank", "0"]}, "rank: got 0, expected an integer of at least 1"),
        ({"more": ["--flip"]}, "--flip has no effect on learning texts; leave it out"),
        ({"tasks": ["a=a.json", "b=b.npz"]}, "b.npz does not exist"),
        ({"more": ["--epochs", "0"]}, "epochs: got 0"),
        ({"more": ["--max-output", "9999"], "model": "gpt2"}, "--max-output: got 9999, but the model has"),
        ({"more": ["--method", "tasl", "--set", "beta1=abc"]}, "beta1: got 'abc', expected a number between 0 and 1"),
        ({"more": ["--method", "tasl", "--set", "memory=[0,0]"]}, "memory: got [0, 0], expected two numbers of at"),
        ({"more": ["--method", "tasl", "--set", "squared=0"]}, "squared: got 0, expected True or False"),
        ({"more": ["--method", "ilora", "--set", "hidden_state_layers=-1"]}, "hidden_state_layers: got -1, expected a"),
    ]
    for changes, message in cases:
        out = tmp_path / "run"
        given = {k: v for k, v in changes.items() if k != "more"}
        assert run(out, *changes.get("more", []), **given) == 2, message
        assert message in " ".join(capsys.readouterr().err.split()), message
        assert not out.exists(), message


def test_a_folder_that_holds_another_run(here, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(out, "--method", "sequential") == 0
    before = files(out)
    capsys.readouterr()
    for more, message in [
        (["--method", "tasl"], "was started with method=sequential, now got tasl"),
        (["--method", "sequential", "--rank", "3"], "was started with rank=2, now got 3"),
    ]:
        assert run(out, "--resume", *more) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    write_files({here / "c.json": (here / "b.json").read_bytes()})
    assert run(out, "--resume", "--method", "sequential", tasks=("a=a.json", "b=c.json")) == 2
    assert "was started with task=" in capsys.readouterr().err
    assert files(out) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    assert run(tmp_path / "other") == 2
    assert "does not belong to a run of hatcl" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "file").write_text("")
    assert run(tmp_path / "file") == 2
    assert hatcl("show", str(tmp_path / "other")) == 2
    assert "other holds no run of hatcl" in " ".join(capsys.readouterr().err.split())


def _texts_find_their_task(run, capsys, *, written):
    """`hatcl predict` answers a run's texts with labels, or writes. (The tasks have the same words.)"""
    found = json.loads((run / "router.json").read_text())
    measured = found["measured"]
    assert [sum(row) for row in measured["confusion"]] == [16, 16] and 0 <= measured["at_first_sight"] <= 1
    assert ("class_incremental" in measured) is not written
    asked = [x for t in range(2) for x, _ in texts(t, count=2).test[:2]]
    for more in [["--top", "1"]] if written else ([], ["--top", "1"]):
        assert hatcl("predict", run, *asked, "--device", "cpu", "--json", *more) == 0
        answers = json.loads(capsys.readouterr().out)
        for answer, text in zip(answers, asked, strict=True):
            assert answer["text"] == text and answer["name"] == "ab"[answer["task"]]
            assert written or answer["label"] in found["labels"][answer["task"]]
    assert hatcl("predict", run, asked[0], "--top", "0") == 2
    assert "--top: got 0" in capsys.readouterr().err


def _another_base_is_refused(base, run, capsys):
    """With a tokenizer that numbers words otherwise, or with other embeddings, the answers would be of other texts."""
    vocabulary = json.loads((base / "tokenizer.json").read_text())
    words = vocabulary["model"]["vocab"]
    some = {w: i for w, i in words.items() if i > 5}
    vocabulary["model"]["vocab"] = words | dict(zip(some, reversed(some.values()), strict=True))
    weights = load_file(base / "model.safetensors")
    weights = {name: x + 1 if "word_embeddings" in name else x for name, x in weights.items()}
    for name, content, text in (
        ("tokenizer.json", json.dumps(vocabulary).encode(), "made with a tokenizer that is no longer"),
        ("model.safetensors", save(weights, {"format": "pt"}), "made with a base model that is no longer"),
    ):
        was = (base / name).read_bytes()
        (base / name).write_bytes(content)
        try:
            assert hatcl("predict", run, "w1 w2", "--device", "cpu") == 2
            assert f"its router was {text}" in " ".join(capsys.readouterr().err.split())
        finally:
            (base / name).write_bytes(was)
    assert hatcl("predict", run, "w1 w2", "--device", "cpu") == 0
    capsys.readouterr()


@pytest.mark.parametrize("model", ["bert", "t5", "gpt2"])
def test_hat_lays_gates_over_the_pairs(here, tmp_path, capsys, model):
    assert (
        run(
            tmp_path / "run",
            "--method",
            "hat",
            "--set",
            "init=sparse",
            "--rank",
            "8",
            "--max-output",
            "4",
            "--router",
            model=model,
        )
        == 0
    )
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["backward_transfer"] == 0 and metrics["details"]["exact"] and metrics["details"]["bit_equal"]
    capsys.readouterr()
    _texts_find_their_task(tmp_path / "run", capsys, written=model != "bert")
    assert hatcl("certify", tmp_path / "run", "--device", "cpu") == 0
    assert "task 1: exact, outputs bit-equal to those at sealing" in capsys.readouterr().out
    assert hatcl("describe", tmp_path / "run") == 0
    if model == "bert":
        _another_base_is_refused(here / "bert", tmp_path / "run", capsys)
        (here / "bert").rename(here / "away")  # forgetting needs no base model
        forgot = hatcl("forget", tmp_path / "run", "--task", "0")
        (here / "away").rename(here / "bert")
        model = from_pretrained(tmp_path / "run" / "model")
        assert forgot == 0 and load_router(tmp_path / "run", model, asked=False).tasks == [1]
        assert hatcl("show", tmp_path / "run") == 0 and "forgotten since: task 0" in capsys.readouterr().out
        assert [p.name for p in (tmp_path / "run" / "tasks").iterdir()] == ["1_b"]
        assert hatcl("certify", tmp_path / "run", "--device", "cpu") == 0
    assert run(tmp_path / "other", "--method", "hat", "--set", "inlt=dense", model=model) == 2
    assert "HATConfig has no option 'inlt'; did you mean 'init'" in capsys.readouterr().err
