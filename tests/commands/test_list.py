from __future__ import annotations

from command_parts import call


def test_list_prints_plain_names(capsys):
    code, out, _ = call(capsys, "list", "hat_test_res*")
    assert code == 0 and "hat_test_resnet" in out.split()
    code, _, err = call(capsys, "list", "hat_nothing*")
    assert code == 2 and "no model matches 'hat_nothing*'" in err
