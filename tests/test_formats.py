"""Files that released versions wrote are read, and mean what they meant (docs/stability.md).

The files of 0.1.0 may change until it is released: where a format changes before that, delete the folder and run
`python tests/format_parts.py`. Afterwards a folder stays as it is.
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from format_parts import FOLDER, answers_of, inputs, network, sequence_tasks

import hatcl
from hatcl.continual import learn_sequence

VERSIONS = sorted(path for path in FOLDER.iterdir() if path.is_dir())
# another machine may add float32 numbers in another order (docs/exactness.md has measured differences)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
every_version = pytest.mark.parametrize("folder", VERSIONS, ids=lambda path: path.name)


def answers(folder):
    return json.loads((folder / "answers.json").read_text())


def test_this_version_keeps_its_files():
    assert hatcl.__version__ in [path.name for path in VERSIONS], "run: python tests/format_parts.py"
    size = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    assert size < 200_000 * len(VERSIONS)


@pytest.fixture(scope="module", params=VERSIONS, ids=lambda path: path.name)
def loaded(request):
    return request.param, hatcl.from_pretrained(request.param / "model", base=network()).eval()


def test_a_model(loaded):
    folder, model = loaded
    found, expected = answers_of(model), answers(folder)["model"]
    assert [str(t) for t in found] == list(expected)
    for t, out in found.items():
        torch.testing.assert_close(out, torch.tensor(expected[str(t)]), **CLOSE)
    assert hatcl.certify(model, inputs()).exact


def test_a_router(loaded):
    folder, model = loaded
    router = hatcl.TaskRouter.load(folder / "router.safetensors", model)
    assert hatcl.predict(model, inputs(), router=router).task.tolist() == answers(folder)["router"]


@every_version
def test_an_extracted_task(folder):
    task = hatcl.load_extracted(folder / "extracted", base=network()).eval()
    torch.testing.assert_close(task(inputs()), torch.tensor(answers(folder)["model"]["1"]), **CLOSE)


@every_version
def test_a_vector_and_a_graft(folder):
    net = network()
    tuned = hatcl.TaskVector.load(folder / "vector.safetensors").apply_to(net)
    grafted = hatcl.Graft.load(folder / "graft.safetensors")
    on = grafted.apply_to(net)
    assert grafted.size == int(0.25 * sum(p.numel() for p in net.parameters()))
    for name, p in net.named_parameters():
        assert torch.equal(tuned.get_parameter(name), p * 1.25)
        assert torch.equal(on.get_parameter(name), torch.where(grafted.masks()[name], p * 1.25, p))


@every_version
def test_a_run(folder, tmp_path):
    shutil.copytree(folder / "run", tmp_path / "run")
    tasks = sequence_tasks(may_learn=False)
    run = learn_sequence(network(), tasks, "sequential", {"epochs": 1, "batch_size": 5}, folder=tmp_path / "run")
    assert run.matrix.tolist() == answers(folder)["run"]


def test_a_run_that_is_not_finished_would_be_learned(tmp_path):
    """The twin of `test_a_run`: its tasks do notice learning."""
    with pytest.raises(AssertionError, match="learned again"):
        learn_sequence(network(), sequence_tasks(may_learn=False), "sequential", {"epochs": 1}, folder=tmp_path / "new")
