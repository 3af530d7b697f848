"""`describe` counts what is there."""

from __future__ import annotations

import json

import parts

import hatcl
from hatcl.hat.gates import gates_of


def test_describe_counts_what_is_there():
    for name in parts.MODELS:
        model = parts.pretend(parts.converted(name), tasks=[0, 2])
        found = hatcl.describe(model)
        g = gates_of(model)[0]
        assert found.units == g.num_units == sum(layer["units"] for layer in found.layers)
        assert found.use == {t: int(g.masks[t].sum()) for t in (0, 2)}
        assert sum(found.elements.values()) == sum(p.numel() for p in parts.plain(name).parameters())
        for t in (0, 2):
            assert sum(layer["used"][t] for layer in found.layers) == found.use[t]
        assert json.loads(json.dumps(found.to_dict()))["units"] == found.units
        text = str(found)
        assert "task 0" in text and "task 2" in text and "owner and reader known" in text
        assert all(layer["name"] in text for layer in found.layers)
