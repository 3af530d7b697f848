"""What holds for every method, and finding one by its name."""

from __future__ import annotations

import dataclasses
import json

import pytest

from hatcl.continual import list_continual_methods, make_method
from hatcl.continual.methods import Method
from hatcl.errors import ConfigError

METHODS = list_continual_methods()


def test_the_methods_that_there_are():
    assert sorted(METHODS) == ["graft", "hat", "ilora", "joint", "olora", "osf", "replay", "sequential", "tasl"]


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method(name):
    method = make_method(name)
    assert isinstance(method, Method) and method.name == name and method.paper
    assert make_method(method) is method
    stored = json.loads(json.dumps(method.to_dict()))
    assert stored["name"] == name
    assert make_method(name, stored["options"]).to_dict() == method.to_dict()
    covered = [i for stage in method.stages(4) for i in stage]
    assert covered == [0, 1, 2, 3]
    for field in dataclasses.fields(method.options):
        with pytest.raises(ConfigError, match=f"did you mean {field.name!r}"):
            make_method(name, {f"{field.name}_": 1})


@pytest.mark.parametrize("name, value", [("grain", "pair"), ("timing", "befor"), ("importance", "thrid")])
def test_tasl_says_at_once_what_is_no_option(name, value):
    with pytest.raises(ConfigError, match=f"{name}: got {value!r}, expected one of .*; did you mean"):
        make_method("tasl", {name: value})
