from __future__ import annotations

from command_parts import call


def test_methods(capsys):
    code, said, _ = call(capsys, "methods")
    assert code == 0
    for word in (
        "tasl",
        "2408.05200",
        "olora",
        "buffer_size = 500",
        "ema_alpha = 0.999",
        "'mode': 'cases'",
        "max_scale",
    ):
        assert word in said
