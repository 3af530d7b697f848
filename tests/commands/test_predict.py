from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from command_parts import FAST, call, given, write_tasks
from PIL import Image

import hatcl
from hatcl.commands._routing import load_router


@pytest.fixture
def routed(run, tmp_path, capsys):
    """The finished run, with a router that was made afterwards."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    code, out, err = call(capsys, "train", "--resume", "--output", folder, "--router", "--device", "cpu")
    assert code == 0, err
    assert "is finished already" in " ".join(out.split()) and "without being given the task, in %" in out
    return folder


def pictures(run, folder):
    """The first training images of each task, as files, and as they are stored."""
    arrays = [np.load(run.parent / f"t{t}.npz")["x_train"][:4] for t in range(3)]
    for t, array in enumerate(arrays):
        for i, image in enumerate(array):
            Image.fromarray(image).save(folder / f"{t}_{i}.png")
    return [folder / f"{t}_{i}.png" for t in range(3) for i in range(4)], np.concatenate(arrays)


def test_a_run_with_a_router_finds_tasks(tmp_path, capsys):
    paths = write_tasks(tmp_path, 2)
    args = ["train", *given(paths), "--output", tmp_path / "run", *FAST, "--epochs", "4", "--router"]
    code, out, err = call(capsys, *args, "--json")
    assert code == 0, err
    found = json.loads(out)["router"]
    assert sum(map(sum, found["confusion"])) == 32 and found["rejected"] == 0
    assert found["task_accuracy"] == sum(found["confusion"][t][t] for t in range(2)) / 32 > 0.5
    assert found["class_incremental"] <= found["task_accuracy"] and found["class_incremental"] <= 1
    # the same router is made of the finished run: what a sealed task computes never changes
    before = (tmp_path / "run" / "router.safetensors").read_bytes()
    for name in ("router.json", "router.safetensors"):
        (tmp_path / "run" / name).unlink()
    assert call(capsys, "train", "--resume", "--output", tmp_path / "run", "--router")[0] == 0
    assert (tmp_path / "run" / "router.safetensors").read_bytes() == before
    code, out, _ = call(capsys, "show", tmp_path / "run")
    assert code == 0 and "task found" in out and (tmp_path / "run" / "router.png").exists()


def test_predict_says_what_the_library_says(run, routed, tmp_path, capsys):
    files, stored = pictures(run, tmp_path)
    code, out, err = call(capsys, "predict", routed, *files, "--json", "--device", "cpu")
    assert code == 0, err
    answers = json.loads(out)
    model = hatcl.from_pretrained(routed / "model")
    router = load_router(routed, model)
    for answer, path, image in zip(answers, files, stored, strict=True):
        p = hatcl.predict(model, torch.from_numpy(image)[None], router=router)
        assert answer["image"] == str(path) and answer["rejected"] is False
        assert (answer["task"], answer["label"]) == (int(p.task), int(p.label))
        assert answer["probability"] == float(p.probability) and answer["name"] == f"t{answer['task']}"
    code, out, _ = call(capsys, "predict", routed, files[0], "--among", "1", "--device", "cpu")
    assert code == 0 and "0_0.png: task 1 (t1), class " in out


def test_each_task_prepares_an_image_its_own_way(run, routed, tmp_path):
    """Else the mean and spread of its own images would tell the task."""
    model = hatcl.from_pretrained(routed / "model")
    router = load_router(routed, model)
    x = torch.from_numpy(pictures(run, tmp_path)[1])
    a, b = (router.prepare(t, x) for t in (0, 1))
    assert a.shape == b.shape == (12, 3, 32, 32) and not torch.equal(a, b)
    for t in range(2):  # the task's own training images have mean 0 and spread 1, as it learned them
        own = router.prepare(t, torch.from_numpy(np.load(run.parent / f"t{t}.npz")["x_train"]))
        # measured 2e-3: the images are enlarged after they were measured
        assert abs(float(own.mean())) < 0.01 and 0.8 < float(own.std()) < 1.1


def test_forgetting_takes_the_task_out_of_the_router(run, routed, tmp_path, capsys):
    files, _ = pictures(run, tmp_path)
    before = json.loads(call(capsys, "predict", routed, *files, "--json", "--among", "0", "--among", "2")[1])
    assert call(capsys, "forget", routed, "--task", "1", "--dry-run")[0] == 0
    assert call(capsys, "forget", routed, "--task", "1")[0] == 0
    router = load_router(routed, hatcl.from_pretrained(routed / "model"))
    assert router.tasks == [0, 2] and not any("1." in n for k in router._known.values() for n in k.tensors())
    assert json.loads(call(capsys, "predict", routed, *files, "--json")[1]) == before
    code, out, _ = call(capsys, "show", routed)
    assert code == 0 and "router: not measured since a task was forgotten" in out
    assert not (routed / "router.png").exists()
    (routed / "router.json").unlink()  # made anew, of the tasks that are left
    code, out, err = call(capsys, "train", "--resume", "--output", routed, "--router")
    assert code == 0 and "task found" in out, err


def test_what_does_not_fit(run, routed, tmp_path, capsys):
    files, _ = pictures(run, tmp_path)
    cases = [
        (["predict", run, files[0]], "has no router; make one with: hatcl train --resume --router --output"),
        (["predict", routed, tmp_path / "none.png"], "none.png cannot be read as an image"),
        (["predict", routed, routed / "config.json"], "config.json cannot be read as an image"),
        (["predict", routed, files[0], "--among", "7"], "task 7 is not in the router, which has [0, 1, 2]"),
        (["train", "--router", "--method", "sequential", "--output", tmp_path / "x"], "--router finds tasks that are"),
    ]
    for args, text in cases:
        code, _, err = call(capsys, *args)
        assert code == 2 and text in err, err
    assert not (tmp_path / "x").exists()
    damaged = routed / "router.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-8])
    code, _, err = call(capsys, "predict", routed, files[0])
    assert code == 2 and "router.safetensors" in err
