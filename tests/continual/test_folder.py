"""What a run's folder holds, and what it refuses."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest
import torch

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from continual_parts import (  # noqa: E402
    METHODS,
    adapted,
    bert,
    files,
    run,
    text_tasks,
    tokenizer,
)
from safetensors.torch import load_file  # noqa: E402

import hatcl  # noqa: E402
from hatcl.continual import folder as kept  # noqa: E402
from hatcl.engine import folder as runs  # noqa: E402
from hatcl.errors import ConfigError, IntegrityError, SkillError  # noqa: E402
from hatcl.skills.scores import SkillScores  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def _states(model, task=None):
    """What a model computes, of a HAT model for a task."""
    tokens = dict(tokenizer()(["w1 w7 w3", "w4 w5"], padding=True, return_tensors="pt"))
    with hatcl.task(model, task) if task is not None else contextlib.nullcontext():
        return model.eval()(tokens["input_ids"], tokens["attention_mask"]).last_hidden_state


@pytest.mark.parametrize("method", METHODS)
def test_each_task_leaves_what_it_learned_in_pefts_format(method, tmp_path):
    tasks = text_tasks(bert())
    model, result = run(method, tmp_path / "run", tasks=tasks)
    folders = sorted((tmp_path / "run" / "tasks").iterdir())
    assert [f.name for f in folders] == (["2_task_2"] if method == "joint" else ["0_task_0", "1_task_1", "2_task_2"])
    for folder in folders:
        about = json.loads((folder / "config.json").read_text())
        assert about["method"]["name"] == method and about["task"] == f"task {folder.name[0]}"
    last = folders[-1]
    if method == "ilora":  # scored is the stable one
        loaded = peft.PeftModel.from_pretrained(bert(), last / "adapter" / "stable")
    elif method == "osf":  # which adds no adapter: the weights that it changed
        loaded = bert()
        assert not loaded.load_state_dict(load_file(last / "adapter" / "weights.safetensors"), strict=False)[1]
    else:  # with olora the sum of all
        loaded = peft.PeftModel.from_pretrained(bert(), last / "adapter")
    loaded.eval()
    with torch.no_grad():
        if method in ("graft", "hat"):  # each task's own
            for t, folder in enumerate(folders):
                own = peft.PeftModel.from_pretrained(bert(), folder / "adapter").eval()
                assert tasks[t].score(own) == result.matrix[-1][t]
                assert method == "graft" or torch.equal(_states(own), _states(model, t))
        else:
            assert [t.score(loaded) for t in tasks] == list(result.matrix[-1])
    assert not list((tmp_path / "run").rglob(".*"))  # nothing half done


def test_tasl_leaves_its_scores(tmp_path):
    run("tasl", tmp_path / "run")
    for i in range(3):
        folder = tmp_path / "run" / "tasks" / f"{i}_task_{i}"
        now, all_ = (SkillScores.load(folder / f"{n}.safetensors") for n in ("scores", "cumulative"))
        assert (folder / "scores.csv").read_text().startswith("label,score\n")
        assert len(now.values) == 5 * 4  # targets, rank
        assert float(all_.values.min()) == 0 and float(all_.values.max()) == 1
    assert not np.allclose(now.normalised().values, all_.values)


def test_an_adapter_that_transformers_added(tmp_path):
    model = bert()
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["query"]))
    run("tasl", tmp_path / "run", model=model)
    loaded = peft.PeftModel.from_pretrained(bert(), tmp_path / "run" / "tasks" / "2_task_2" / "adapter")
    assert torch.equal(_states(loaded), _states(model))
    with pytest.raises(SkillError, match="transformers' own add_adapter"):
        run("ilora", model=model)


def test_a_run_does_not_go_on_with_something_else(tmp_path):
    folder = tmp_path / "run"
    run("tasl", folder)
    before = files(folder)
    cases = [
        (SkillError, "another base model", {"model": adapted(bert(seed=3))}),
        (SkillError, r"lora_A.weight was \[4, 16\] and is now \[2, 16\]", {"model": adapted(r=2)}),
        (SkillError, "started with other LoRA options", {"model": adapted(target_modules=["query"])}),
        (ConfigError, "options.weight_decay=0.0, now got 0.02", {"weight_decay": 0.02}),
        (ConfigError, "seed=0, now got 1", {"seed": 1}),
        (ConfigError, "was started with tasks=", {"tasks": text_tasks(bert(), 2)}),
        (ConfigError, "method", {"method": "sequential"}),
    ]
    for kind, message, changes in cases:
        with pytest.raises(kind, match=message):
            run(**{"method": "tasl", "folder": folder, **changes})
    assert files(folder) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        run("tasl", tmp_path / "file")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="does not belong to a run of hatcl"):
        run("tasl", tmp_path / "other")
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"something other than a run of hatcl \(checkpoint, and no config.json"):
        run("tasl", folder)


def test_a_state_of_other_tensors(tmp_path):
    kept.write_state(adapted(), tmp_path / "a.safetensors")
    with pytest.raises(SkillError, match=r"is \[4, 16\], the model's \[2, 16\]"):
        kept.read_state(adapted(r=2), tmp_path / "a.safetensors")


def test_what_a_forgotten_task_leaves_in_a_run(tmp_path):
    known = {"loss": 0.1, "outputs_sha256": "f"}
    layers = [{"name": "l", "used": {"0": 1, "1": 2, "2": 3}}]
    runs.write_json(
        tmp_path / "metrics.json",
        {
            "tasks": list("abc"),
            "facts": [dict(known) for _ in "abc"],
            "losses": [[2.0, 1.0]] * 3,
            "matrix": [[0.9, None, None], [0.9, 0.8, None], [0.7, 0.8, 0.6]],
            "details": {"layers": layers, "max_abs_diff": {"0": 0.0, "1": 0.0, "2": 0.0}},
            "average_accuracy": 0.7, "forgetting": 0.1, "backward_transfer": -0.1,
        },
    )  # fmt: skip
    for i, name in enumerate("abc"):
        about = {"scores": dict(zip("abc", (0.1, 0.2, 0.3), strict=True))}
        runs.write_json(tmp_path / "tasks" / f"{i}_{name}" / "config.json", about)
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"stage": {t}, "step": 1}}\n' for t in range(3)))
    kept.drop_task(tmp_path, 1)
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["facts"] == [known, {}, known] and found["losses"][1] == [None, None] and found["forgotten"] == [1]
    assert found["matrix"] == [[0.9, None, None], [None] * 3, [0.7, None, 0.6]]
    details = found["details"]
    assert details["layers"][0]["used"] == {"0": 1, "2": 3} and set(details["max_abs_diff"]) == {"0", "2"}
    assert found["average_accuracy"] == pytest.approx(0.65, abs=1e-12)
    assert found["forgetting"] == pytest.approx(0.2, abs=1e-12)
    assert [line["stage"] for line in runs.read_steps(tmp_path)] == [0, 2]
    assert sorted(p.name for p in (tmp_path / "tasks").iterdir()) == ["0_a", "2_c"]
    about = json.loads((tmp_path / "tasks" / "2_c" / "config.json").read_text())
    assert about["scores"] == {"a": 0.1, "b": None, "c": 0.3}
    kept.drop_task(tmp_path, 0)
    kept.drop_task(tmp_path, 2)
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["matrix"] == [[None] * 3] * 3 and found["average_accuracy"] is None and found["forgotten"] == [0, 1, 2]
    (tmp_path / "metrics.json").write_text('{"tasks": ["a"]}')
    with pytest.raises(IntegrityError, match="metrics.json lacks a part that is needed"):
        kept.drop_task(tmp_path, 0)


def test_the_newest_model_of_a_run_is_found(tmp_path):
    with pytest.raises(IntegrityError, match="holds no model with gates; expected the folder of a run"):
        kept.find_model(tmp_path)
    plain = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    model = hatcl.convert(plain, 2, torch.randn(2, 3))
    hatcl.save_pretrained(model, tmp_path / "plain")
    assert kept.find_model(tmp_path / "plain") == tmp_path / "plain"
    kept.write_model(model, tmp_path / "checkpoint")
    assert kept.find_model(tmp_path) == tmp_path / "checkpoint" / "model"
    kept.save_model(tmp_path, model, {"tasks": ["a"], "matrix": [[0.5]], "details": {}})
    assert kept.find_model(tmp_path) == tmp_path / "model"
    (tmp_path / "model").rename(tmp_path / ".model.old")  # killed between the two moves
    runs.tidy(tmp_path)
    assert kept.find_model(tmp_path) == tmp_path / ".model.old" and not (tmp_path / "checkpoint").exists()
    other = hatcl.convert(plain, 2, torch.randn(2, 3))
    kept.save_model(tmp_path, model, {"tasks": ["a"], "matrix": [[0.5]], "details": {}})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "plain"]
    kept.read_model(other, tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(other.parameters(), model.parameters(), strict=True))
