"""Options: JSON there and back, and errors that say what to write instead."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hatcl
from hatcl.config import (
    COMPENSATIONS,
    HATCL_OPTIONS,
    HEAD_STARTS,
    INITS,
    MASKS,
    PENALTIES,
    PROTECTIONS,
    REUSE,
    SCHEDULES,
    HATConfig,
    flag,
    help_of,
    number,
    whole,
    without_effect,
)

valid = st.fixed_dictionaries(
    {},
    optional={
        "num_tasks": st.integers(1, 100),
        "init": st.sampled_from(INITS),
        "init_value": st.floats(-6, 6),
        "init_density": st.none() | st.floats(0, 1),
        "schedule": st.sampled_from(SCHEDULES),
        "above_one": st.floats(0.01, 1),
        "cycles": st.none() | st.integers(1, 10),
        "settle": st.floats(0, 0.9),
        "max_scale": st.floats(1.5, 1e4),
        "clamp": st.floats(0.5, 100),
        "compensation": st.sampled_from(COMPENSATIONS),
        "compensation_clamp": st.floats(0.5, 100),
        "embedding_lr_scale": st.floats(0.01, 10),
        "penalty_weight": st.floats(0, 10),
        "penalty": st.sampled_from(PENALTIES),
        "forgiven": st.none() | st.floats(0, 1),
        "reuse": st.sampled_from(REUSE),
        "masks": st.sampled_from([*MASKS, "array:10"]),
        "start_from": st.none() | st.sampled_from(["previous", "best"]) | st.integers(0, 9),
        "own_share": st.floats(0, 1),
        "start_hold": st.floats(0.1, 1),
        "heads": st.sampled_from(HEAD_STARTS),
        "protection": st.sampled_from(PROTECTIONS),
        "protection_alpha": st.floats(1e-9, 10),
        "protection_epsilon": st.floats(1e-9, 10),
        "locked": st.none() | st.lists(st.integers(0, 9)).map(tuple),
    },
).filter(
    lambda options: (
        options.get("reuse") != "none"
        or (options.get("masks") not in ("array:10", "all") and options.get("start_from") is None)
    )
)


def test_the_strategy_knows_every_option():
    seen = set()

    @given(valid)
    def look(options):
        seen.update(options)

    look()
    assert seen == {f.name for f in dataclasses.fields(hatcl.HATConfig)}


@given(valid)
def test_there_and_back_through_json(options):
    config = hatcl.HATConfig(**options)
    assert hatcl.HATConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(config) == hash(hatcl.HATConfig(**options))


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        hatcl.HATConfig().clamp = 3


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(hatcl.HATConfig)])
def test_a_misspelled_option_is_told_its_nearest(name):
    wrong = name[:-1] + name[-1] * 2
    with pytest.raises(hatcl.ConfigError, match=f"HATConfig has no option '{wrong}'; did you mean '{name}'"):
        hatcl.HATConfig.from_dict({wrong: 1})


@pytest.mark.parametrize(
    "options, text",
    [
        (
            {"init": "dens"},
            "init: got 'dens', expected one of normal, dense, sparse, uniform, constant; did you mean 'dense'",
        ),
        ({"schedule": "cos"}, "schedule: got 'cos', expected one of .*; did you mean 'cosine'"),
        ({"penalty": "layers"}, "penalty: got 'layers', .* did you mean 'layer'"),
        ({"reuse": "some"}, "reuse: got 'some', expected one of all, none"),
        (
            {"masks": "arrays"},
            "masks: got 'arrays', expected learned, all, given or array:q with q from 2, such as array:3",
        ),
        ({"masks": "array:q"}, "masks: got 'array:q', expected learned, all, given or array:q"),
        ({"masks": 3}, "masks: got 3, expected learned, all, given or array:q"),
        ({"masks": "array:1"}, "masks: got 'array:1', expected at least array:2"),
        (
            {"masks": "array:3", "num_tasks": 10},
            "num_tasks: got 10, masks='array:3' has room for 3 x 3 = 9 tasks; use array",
        ),
        (
            {"masks": "array:3", "reuse": "none"},
            "reuse: got 'none' with masks='array:3', whose tasks share units; take",
        ),
        ({"num_tasks": 0}, "num_tasks: got 0, expected an integer of at least 1"),
        ({"num_tasks": 2.0}, "num_tasks: got 2.0, expected an integer"),
        ({"max_scale": 1.0}, "max_scale: got 1.0, expected a number above 1"),
        ({"clamp": -1}, "clamp: got -1, expected a number above 0"),
        ({"penalty_weight": -0.1}, "penalty_weight: got -0.1, expected a number of at least 0"),
        ({"forgiven": 1.5}, "forgiven: got 1.5, expected a share between 0 and 1"),
        ({"cycles": 0}, "cycles: got 0, expected an integer of at least 1, or None"),
        ({"penalty_weight": "1"}, "penalty_weight: got '1', expected a number of at least 0"),
        ({"max_scale": float("nan")}, "max_scale: got nan"),
    ],
)
def test_values_out_of_range(options, text):
    with pytest.raises(hatcl.ConfigError, match=text):
        hatcl.HATConfig(**options)
    with pytest.raises(ValueError, match=text):  # for those who catch torch's and Python's own
        hatcl.HATConfig().replace(**options)


@pytest.mark.parametrize(
    "value, bounds, text",
    [
        ("a", {}, "x: got 'a', expected a finite number"),
        (float("nan"), {"low": 0}, "x: got nan, expected a number of at least 0"),
        (True, {"low": 0, "without": "low"}, "x: got True, expected a number above 0"),
        (1.5, {"low": 0, "high": 1}, "x: got 1.5, expected a number between 0 and 1"),
        (0, {"low": 0, "high": 1, "without": "both"}, "x: got 0, expected a number between 0 and 1, without these"),
        (
            1,
            {"low": 0, "high": 1, "without": "high", "what": "a share"},
            "got 1, expected a share of at least 0 and below",
        ),
        (0, {"low": 0, "high": 1, "without": "low"}, "x: got 0, expected a number above 0 and at most 1"),
    ],
)
def test_numbers(value, bounds, text):
    with pytest.raises(hatcl.ConfigError) as caught:
        number("x", value, **bounds)
    assert text in str(caught.value)
    assert number("x", 0.5, **bounds) == 0.5


def test_integers_and_flags():
    assert whole("x", 3) == 3 and whole("x", None, optional=True) is None
    for value in (0, 1.0, True, None):
        with pytest.raises(hatcl.ConfigError, match=f"x: got {value!r}, expected an integer of at least 1"):
            whole("x", value)
    flag("x", False)
    with pytest.raises(hatcl.ConfigError, match="x: got 0, expected True or False"):
        flag("x", 0)


def test_an_option_without_effect_is_refused_with_the_remedy():
    config = HATConfig(num_tasks=3)
    without_effect(config, ["clamp", "init"], "x", "y")
    with pytest.raises(hatcl.ConfigError, match="num_tasks: got 3, which has no effect with x; pass y, or leave"):
        without_effect(config, ["clamp", "num_tasks"], "x", "pass y")


@dataclasses.dataclass
class Described:
    """Some options: of a thing.

    Args:
        lr, decay: for the optimizer. epochs: passes (at most
            `many`): over all.
        seed: of what is random; lr: is no field here, but this is its sentence

    Raises:
        ConfigError: never.
    """

    lr: float
    decay: float
    epochs: int
    seed: int = 0
    own: int = dataclasses.field(default=0, metadata={"help": "From the field."})
    silent: int = 0


def test_what_a_docstring_says_of_each_field():
    assert help_of(Described) == {
        "lr": "For the optimizer.",
        "decay": "For the optimizer.",
        "epochs": "Passes (at most many): over all.",
        "seed": "Of what is random;",
        "own": "From the field.",
        "silent": "",
    }
    assert all(help_of(hatcl.HATConfig).values())


def test_what_the_docstring_of_a_base_says():
    @dataclasses.dataclass
    class Derived(Described):
        """More options.

        Args:
            more: of the derived class. lr: said again.
        """

        more: int = 0

    told = help_of(Derived)
    assert (told["more"], told["lr"]) == ("Of the derived class.", "Said again.")
    assert told["epochs"] == "Passes (at most many): over all."


@pytest.mark.parametrize("name", HATCL_OPTIONS)
@pytest.mark.parametrize("make", [lambda o: hatcl.HATConfig(**o), hatcl.HATConfig.from_dict], ids=["call", "mapping"])
def test_hat_cls_names_are_answered_with_ours(name, make):
    ours = HATCL_OPTIONS[name]
    meant = rf"did you mean '{ours}'\?" if ours else "hatcl needs none"
    with pytest.raises(hatcl.ConfigError, match=f"HATConfig has no option '{name}'; {meant}"):
        make({name: 1})


def test_hat_cls_names_are_mapped_to_options_that_there_are():
    known = {f.name for f in dataclasses.fields(hatcl.HATConfig)}
    assert set(HATCL_OPTIONS.values()) - {""} <= known and not set(HATCL_OPTIONS) & known
