"""The map: what belongs to whom, the same in every process, through JSON and back."""

from __future__ import annotations

import hashlib
import itertools
import json
import subprocess
import sys
from pathlib import Path

import layer_zoo as zoo
import numpy as np
import parts
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hatcl import HATConfig
from hatcl.hat.build import build
from hatcl.hat.convert import map_of
from hatcl.map.units import Entry, Factor, UnitMap, runs, unrun

ROOT = Path(__file__).parents[2]


@given(st.lists(st.integers(0, 9), max_size=40) | st.integers(0, 50).map(lambda n: list(range(7, 7 + n))))
def test_runs_there_and_back(values):
    array = np.array(values, dtype=np.int64)
    segments = runs(array)
    assert unrun(segments).tolist() == values and unrun(segments).dtype == np.int64
    assert json.loads(json.dumps(segments)) == segments
    assert len(segments) <= max(len(values), 0)
    if len(values) > 1 and values == list(range(values[0], values[0] + len(values))):
        assert len(segments) == 1


def maps():
    for name in ("mlp", "resnet", "vit"):
        yield name, map_of(parts.plain(name).eval(), parts.images(name))
    for name in zoo.ZOO:
        yield name, map_of(zoo.make(name).eval(), zoo.data(name)[0])


@pytest.fixture(scope="module")
def all_maps():
    return dict(maps())


def same(a, b):
    return json.dumps(a.to_json()) == json.dumps(b.to_json())


def test_maps_go_through_json(all_maps):
    for name, found in all_maps.items():
        text = json.dumps(found.to_json())
        again = UnitMap.from_json(json.loads(text))
        assert json.dumps(again.to_json()) == text, name
        for entry in found.entries.values():
            other = again.entries[entry.name]
            for f, g in zip(entry.factors, other.factors, strict=True):
                assert np.array_equal(f.units, g.units) and (f.axis, f.shape, f.owner) == (g.axis, g.shape, g.owner)


def test_a_map_from_json_builds_the_same_model(all_maps):
    for name in ("mlp", "resnet", "vit"):
        outs = []
        for found in (all_maps[name], UnitMap.from_json(json.loads(json.dumps(all_maps[name].to_json())))):
            torch.manual_seed(1)
            model = parts.pretend(build(parts.plain(name), found, HATConfig(num_tasks=2)))
            outs.append([parts.logits(model, t, parts.images(name)) for t in range(2)])
        assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


def test_what_must_hold_for_every_map(all_maps):
    for name, found in all_maps.items():
        model = parts.plain(name) if name in parts.MODELS else zoo.make(name)
        assert set(found.entries) == {n for n, _ in model.named_parameters()}, name
        assert [a for _, a, _ in found.layers] == [1, *(b for _, _, b in found.layers[:-1])][: len(found.layers)], name
        assert not found.layers or found.layers[-1][2] == found.num_units + 1
        used = set()
        for e in found.entries.values():
            assert int(np.prod(e.view)) == int(np.prod(e.shape))
            for f in e.factors:
                assert f.units.min() >= 0 and f.units.max() <= found.num_units
                assert torch.zeros(f.shape).broadcast_to(e.view).shape == e.view and np.prod(f.shape) == len(f.units)
                used |= set(f.units.tolist())
            assert e.copied == bool(e.why)
        assert used - {0} == set(range(1, found.num_units + 1)), f"{name}: units that no parameter belongs to"


def test_the_same_model_gives_the_same_map_in_another_process(all_maps):
    code = (
        "import sys, json, hashlib; sys.path.insert(0, 'tests')\n"
        "import parts; from hatcl.hat.convert import map_of\n"
        "for name in ('mlp', 'resnet', 'vit'):\n"
        "    found = map_of(parts.plain(name, seed=5).eval(), parts.images(name, 3, seed=4))\n"
        "    print(hashlib.sha256(json.dumps(found.to_json()).encode()).hexdigest())\n"
    )
    here = [hashlib.sha256(json.dumps(all_maps[n].to_json()).encode()).hexdigest() for n in ("mlp", "resnet", "vit")]
    # sets and dicts of another order
    env = {"PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.stdout.split() == here, done.stderr


def test_an_mlp_is_mapped_as_one_would_by_hand():
    found = map_of(parts.plain("mlp").eval(), parts.images("mlp"))
    assert found.num_units == 64
    assert found.layers == [("1.weight", 1, 33), ("4.weight", 33, 65)]
    first, second = np.arange(1, 33), np.arange(33, 65)
    want = {
        "1.weight": [(0, True, first)],
        "1.bias": [(0, True, first)],
        "4.weight": [(0, True, second), (1, False, first)],
        "4.bias": [(0, True, second)],
        "7.weight": [(1, False, second)],
        "7.bias": [],
    }
    for name, factors in want.items():
        got = found.entries[name].factors
        assert [(f.axis, f.owner) for f in got] == [(a, o) for a, o, _ in factors], name
        assert all(np.array_equal(f.units, u) for f, (_, _, u) in zip(got, factors, strict=True))
        assert found.entries[name].copied == name.startswith("7.")
        assert found.entries[name].head == name.startswith("7.")


def test_a_residual_stream_channel_is_one_unit():
    class Stream(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(5, 8)
            self.blocks = nn.ModuleList(nn.ModuleList([nn.Linear(8, 12), nn.Linear(12, 8)]) for _ in range(3))
            self.position = nn.Parameter(torch.randn(1, 4, 8))
            self.token = nn.Parameter(torch.randn(1, 1, 8))
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            x = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x)], 1)
            x = x + torch.nn.functional.pad(self.position, (0, 0, 1, 0))
            for up, down in self.blocks:
                x = x + down(torch.relu(up(x)))
            return self.head(x[:, 0])

    found = map_of(Stream().eval(), torch.randn(2, 4, 5))
    assert found.num_units == 8 + 3 * 12
    owner = {n: next((f.units.tolist() for f in e.factors if f.owner), None) for n, e in found.entries.items()}
    stream = owner["embed.weight"]
    for name in (
        "position",
        "token",
        "embed.bias",
        *(f"blocks.{i}.1.{p}" for i in range(3) for p in ("weight", "bias")),
    ):
        assert owner[name] == stream, name
    readers = [
        next(f.units.tolist() for f in found.entries[f"blocks.{i}.0.weight"].factors if not f.owner) for i in range(3)
    ]
    assert readers == [stream] * 3


def test_a_query_channel_and_its_key_channel_are_one_unit():
    found = map_of(zoo.make("encoder").eval(), zoo.data("encoder")[0])
    qkv = next(f.units for f in found.entries["middle.layers.0.self_attn.in_proj_weight"].factors if f.owner)
    assert qkv[:16].tolist() == qkv[16:32].tolist()
    assert not set(qkv[:32].tolist()) & set(qkv[32:].tolist())


def test_grouped_convolutions_read_their_own_group():
    conv = nn.Conv2d(6, 8, 3, groups=2)
    source = nn.Sequential(nn.Conv2d(3, 6, 1), conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    found = map_of(source.eval(), torch.randn(2, 3, 5, 5))
    entry = found.entries["1.weight"]
    inputs = next(f.units for f in found.entries["0.weight"].factors if f.owner)
    outputs = next(f.units for f in entry.factors if f.owner)
    for i, o in itertools.product(range(6), range(8)):
        on = torch.zeros(found.num_units + 1, dtype=torch.bool)
        on[0] = on[inputs[i]] = on[outputs[o]] = True
        live = entry.live(on)
        in_group = i // 3 == o // 4
        assert int(live.sum()) == (9 if in_group else 0)
        assert not in_group or bool(live[o, i % 3].all())


@given(st.integers(0, 200))
def test_liveness_is_the_and_of_the_ends(seed):
    rng = np.random.default_rng(seed)
    n, m = rng.integers(1, 5, size=2)
    rows, columns = rng.integers(0, 6, size=n), rng.integers(0, 6, size=m)
    entry = Entry("w", (n, m), (n, m), (Factor(0, rows, (n, 1), True), Factor(1, columns, (1, m), False)), False)
    on = torch.from_numpy(rng.random(6) < 0.5)
    on[0] = True
    live = entry.live(on)
    for i, j in itertools.product(range(n), range(m)):
        assert bool(live[i, j]) == (bool(on[rows[i]]) and bool(on[columns[j]]))
