"""Several processes that train one model. What they do is in `distributed_parts.py`: two processes run it all, one
after another, and are ended where they take too long, so that a hang is a failed test and no more."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from torch import distributed

PARTS = Path(__file__).parents[1] / "distributed_parts.py"
DDP = [
    "ddp_once", "ddp_start_from", "ddp_inner_given", "ddp_inside", "ddp_is_one_process_with_all_batches",
    "ddp_twin_without_averaging", "ddp_twin_without_statistics", "ddp_one_fails", "ddp_refusals", "ddp_given",
    "ddp_options",
]  # fmt: skip
FSDP = [
    "fsdp_transformer", "fsdp_conv", "fsdp_root_only", "fsdp_is_one_process_with_all_batches",
    "fsdp_mixed_precision", "fsdp_twin_without_guard", "fsdp_refusals", "fsdp_skills", "fsdp_given",
]  # fmt: skip
TRAINERS = {
    "transformers": "trainer_two_tasks",
    "lightning": "lightning_two_tasks",
    "accelerate": "accelerate_two_tasks",
}
SLOW = ["ddp_compiled", "ddp_of_compiled"]
SECONDS = 120

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="this torch has no gloo"
)


@functools.cache
def outcomes(*names):
    """Scenario -> what each of two processes says of it; one that was not reached is missing."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HATCL_TEST_TIMEOUT": str(SECONDS - 10)}
        running = [
            subprocess.Popen(
                [sys.executable, str(PARTS), str(rank), folder, *names],
                env=environment, stdout=subprocess.DEVNULL, stderr=open(Path(folder) / f"stderr.{rank}", "w"),
            )
            for rank in range(2)
        ]  # fmt: skip
        until = time.monotonic() + SECONDS
        try:
            while any(p.poll() is None for p in running) and time.monotonic() < until:
                if any(p.poll() for p in running):  # one has failed: the other waits for it in vain
                    until = min(until, time.monotonic() + 10)
                time.sleep(0.1)
        finally:
            for p in running:
                p.kill()
                p.wait()
        files = {p.name: p.read_text() for p in Path(folder).iterdir() if p.suffix in (".0", ".1")}
    last = "\n".join(files.get(f"stderr.{rank}", "")[-2000:] for rank in range(2))
    return {name: [files.get(f"{name}.{rank}", f"not reached; {last}") for rank in range(2)] for name in names}


@pytest.mark.parametrize("name", DDP)
def test_replicas(name):
    assert outcomes(*DDP)[name] == ["ok", "ok"], "\n".join(outcomes(*DDP)[name])


@pytest.mark.parametrize("name", FSDP)
def test_shards(name):
    assert outcomes(*FSDP)[name] == ["ok", "ok"], "\n".join(outcomes(*FSDP)[name])


@pytest.mark.parametrize("host", TRAINERS)
def test_trainers(host):
    pytest.importorskip(host)
    assert outcomes(TRAINERS[host])[TRAINERS[host]] == ["ok", "ok"], "\n".join(outcomes(TRAINERS[host])[TRAINERS[host]])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_two_processes_slow(name):
    assert outcomes(name)[name] == ["ok", "ok"], "\n".join(outcomes(name)[name])
