from __future__ import annotations

from command_parts import call

import hatcl


def test_describe_shows_units_and_shares(run, capsys):
    code, out, _ = call(capsys, "describe", run)
    description = hatcl.describe(hatcl.from_pretrained(run / "model")).to_dict()
    assert code == 0
    last = [line.split() for line in out.splitlines() if line.split()[:1] == ["all"]][0]
    assert last[1:] == [str(description["units"]), *[str(description["use"][t]) for t in range(3)]]
    assert "shared both" in out and "own copy" in out and "shared elements are free" in out
