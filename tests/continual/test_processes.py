"""Several processes learn a sequence as one: `torchrun --nproc-per-node 2 -m hatcl train ...`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_parts import given, write_tasks
from continual_parts import vector_task
from torch import nn

from hatcl.continual import Batch, learn_sequence, sequence
from hatcl.errors import ConfigError

# what `hatcl train` does, and then a file of each process with what it has sealed
SCRIPT = """
import json, os, sys, types
from pathlib import Path
from hatcl import commands, continual
from hatcl.continual import sequence
from hatcl.hat.gates import gates_of

inner, here = continual.learn_sequence, Path(sys.argv[1])

def spy(model, *args, **options):
    result = inner(model, *args, **options)
    known = {"digests": gates_of(model)[0].digests, "result": result.to_dict(), "tells": "on_progress" in options}
    (here / f"{os.environ['RANK']}.json").write_text(json.dumps(known))
    return result

continual.learn_sequence = spy
if sys.argv[2] == "alone":
    unwrapped = types.SimpleNamespace(DistributedDataParallel=lambda model, devices: model)
    sequence.nn = types.SimpleNamespace(parallel=unwrapped)
commands.main(sys.argv[3:])
"""


def start(folder: Path, how: str, *args: str) -> subprocess.CompletedProcess:
    (folder / "script.py").write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(folder / "script.py"), str(folder), how, *args]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.parametrize("how", ["together", "alone"], ids=["as it is", "twin: each for itself"])
def test_two_processes_seal_the_same(tmp_path, how):
    output = tmp_path / "run"
    args = ["train", *given(write_tasks(tmp_path, 2)), "--epochs", "2", "--batch-size", "15", "--device", "cpu"]
    done = start(tmp_path, how, *args, "--output", str(output), "--json")
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert (first["digests"] == second["digests"]) is (how == "together")
    if how == "together":
        assert first["tells"] and not second["tells"]
        outputs = [[known["outputs_sha256_end"] for known in each["result"]["facts"]] for each in (first, second)]
        assert outputs[0] == outputs[1] and len(outputs[0]) == 2
        assert all(each["result"]["details"]["exact"] for each in (first, second))
        assert all(each["result"]["details"]["bit_equal"] for each in (first, second))
        assert json.loads(done.stdout) == json.loads((output / "metrics.json").read_text()) == first["result"]
        steps = [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]
        assert steps == [*range(1, 9)] * 2  # 48 images in four batches, and no line twice
        assert not [path.name for path in output.iterdir() if path.name.startswith(".")]


def test_shares_are_the_batch_and_weigh_as_it_does(monkeypatch):
    task = vector_task("a", 0, count=11)
    whole = Batch(0, task, tuple(range(5, 16)))
    for count in (2, 3, 4):
        shares = []
        for rank in range(count):
            monkeypatch.setattr(sequence, "place", lambda rank=rank, count=count: (rank, count))
            shares.append(sequence._Stage._share(None, whole))
        assert sorted(p for share in shares for p in share.positions) == list(whole.positions)
        assert sum(share.weight for share in shares) == pytest.approx(count)
        values = [sum(share.positions) / len(share.positions) * share.weight for share in shares]
        assert sum(values) / count == pytest.approx(sum(whole.positions) / len(whole.positions))
        assert [len(share.positions) / share.weight for share in shares] == pytest.approx([11 / count] * count)


def test_what_several_processes_cannot_do(monkeypatch):
    monkeypatch.setattr(sequence, "place", lambda: (0, 4))
    model = nn.Linear(6, 2)
    with pytest.raises(ConfigError, match="joint: cannot be learned by 4 processes together; start one process, or"):
        learn_sequence(model, [vector_task("a", 0)], "joint")
    monkeypatch.setattr("hatcl.continual.methods.joint.Joint.together", True)
    with pytest.raises(ConfigError, match="batch_size: got 3; task a then has a batch of 3, too few for 4"):
        learn_sequence(model, [vector_task("a", 0)], "joint", {"batch_size": 3})
