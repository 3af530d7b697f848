"""The parts of `hatcl graft`; the command as a whole is tested in tests/commands/test_graft.py."""

from __future__ import annotations

import json

import pytest

from hatcl.errors import ConfigError
from hatcl.finetuning.grafts import Wanted, measured, some, with_gain


def test_what_a_graft_is_called():
    assert Wanted("learned", 1e-4).name == "learned_0.0001"
    assert Wanted("magnitude", 0.1, "partition:3").rule == "magnitude partition:3"
    assert Wanted("random", 0.1, "partition:3", True).name == "random-partition-3-per-layer_0.1"


def test_a_row_is_measured_once_for_each_way_of_measuring(tmp_path):
    asked = []

    def measure():
        asked.append(len(asked))
        return {"accuracy": 0.5 + len(asked)}

    path = tmp_path / "measured.json"
    rows = [measured(path, {"test": n}, measure) for n in (1, 1, 2)]
    assert rows == [{"accuracy": 1.5}, {"accuracy": 1.5}, {"accuracy": 2.5}]
    assert json.loads(path.read_text())["settings"] == {"test": 2}


def test_the_share_of_the_gain_that_is_kept():
    models = {"pretrained": {"score": 0.5, "ood": {"x": 0.4}}, "finetuned": {"score": 0.9, "ood": {"x": 0.4}}}
    row = with_gain({"score": 0.7, "ood": {"x": 0.4}}, models)
    assert row["gain_kept"] == pytest.approx(0.5, abs=1e-12)


def test_at_most_so_many_always_the_same():
    data = [(str(i), "0") for i in range(20)]
    assert some(data, None) is data and some(data, 20) is data
    assert some(data, 5) == some(data, 5) and len(set(some(data, 5))) == 5


def test_a_run_without_test_examples():
    from types import SimpleNamespace

    from hatcl.finetuning.grafts import Scene

    with pytest.raises(
        ConfigError, match="the run has no test examples; fine-tune on a data file that has test examples"
    ):
        Scene(SimpleNamespace(task=SimpleNamespace(test=[])), [], None, 15)
