"""What the options of a learned graft may be."""

from __future__ import annotations

from graft_parts import refused

from hatcl.errors import ConfigError
from hatcl.grafts.options import GraftOptions


def test_options_are_checked():
    refused(ConfigError, lambda: GraftOptions(lr=0.0), "lr: got 0.0")
    refused(ConfigError, lambda: GraftOptions(bias=0.5), "bias: got 0.5", "at least 1")
    refused(ConfigError, lambda: GraftOptions(momentum=1.0), "momentum: got 1.0")
    refused(ConfigError, lambda: GraftOptions(optimizer="adam", momentum=0.5), "no effect with optimizer='adam'")
    for name, value in (("steps", 0), ("accumulate", 0), ("seed", -1), ("steps", True), ("steps", 1.5)):
        refused(
            ConfigError, lambda n=name, v=value: GraftOptions(**{n: v}), f"{name}: got {value!r}, expected an integer"
        )
    near = {"gamma": "hard", "rule": "natural", "size": "fixed", "optimizer": "adam"}
    for name, right in near.items():
        refused(ConfigError, lambda n=name, v=right[:-1]: GraftOptions(**{n: v}), f"{name}: got", f"mean '{right}'")
