"""The rules: found by themselves, one per operation, replaced by a later one."""

from __future__ import annotations

import ast
from pathlib import Path

import parts
import pytest
import torch
from map_parts import Between, units

import hatcl
from hatcl.hat.convert import map_of
from hatcl.map import rules
from hatcl.map.rules import TRACE_RULES, Rule, rule
from hatcl.map.rules.views import move

FOLDER = Path(rules.__file__).parent


def decorated():
    """File, function, and the operations that its decorator names."""
    for path in sorted(FOLDER.glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            for mark in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
                if isinstance(mark, ast.Call) and getattr(mark.func, "id", "") == "rule":
                    yield path.name, node, [a.value for a in mark.args if isinstance(a, ast.Constant)]


def test_every_rule_of_the_package_is_there_and_says_what_it_does():
    found = list(decorated())
    assert len({name for name, _, _ in found}) >= 6
    for name, node, operations in found:
        assert ast.get_docstring(node), f"{name}: {node.name}"
        for operation in operations:
            assert TRACE_RULES[operation].apply.__name__ == node.name, f"{name}: {operation} has another rule"


def test_operations_that_no_rule_names_go_by_torchs_tags():
    assert "sinh" not in TRACE_RULES and torch.Tag.pointwise in torch.ops.aten.sinh.default.tags
    found = map_of(Between(torch.sinh).eval(), torch.randn(4, 5))
    assert units(found, "second.weight", False) == units(found, "first.weight", True) and not found.notes


SWAPPED = torch.library.custom_op(
    "hatcl_tests::swap_halves", lambda x: x.roll(6, -1), mutates_args=(), schema="(Tensor x) -> Tensor"
)


def swap(x):
    return SWAPPED(x)


def test_an_operation_of_ones_own_shares_units_once_it_has_a_rule(monkeypatch):
    """By its name without its library; what moves values moves labels."""
    source, x = Between(swap).eval(), torch.randn(4, 5)
    before = map_of(source, x)
    assert (
        before.notes == {"": "hatcl_tests::swap_halves is not known to the trace: it forgets which units it carries"}
        and units(before, "second.weight", False) is None
    )
    monkeypatch.setitem(TRACE_RULES, "swap_halves", Rule(move, reads=False))
    found = map_of(source, x)
    first = units(found, "first.weight", True)
    assert units(found, "second.weight", False) == first[6:] + first[:6] and not found.notes
    model = parts.pretend(hatcl.convert(source, 2, x))
    assert [parts.leaks(model, x, t) for t in range(2)] == [None, None]


def test_a_later_rule_takes_the_place_of_an_earlier_one(monkeypatch):
    monkeypatch.setitem(TRACE_RULES, "relu", TRACE_RULES[torch.Tag.pointwise])  # put back afterwards
    seen = []

    @rule("relu")
    def mine(call, coupling):
        seen.append(call.name)
        return rules.unknown(call, coupling)

    assert TRACE_RULES["relu"] == Rule(mine)
    found = map_of(Between(torch.relu_).eval(), torch.randn(4, 5))
    assert seen == ["relu"] * 2 and "aten::relu_ is not known" in found.notes[""]  # also the one that is in place


@pytest.mark.parametrize("wrong", [(), ("aten::mm",), ("mm", test_a_later_rule_takes_the_place_of_an_earlier_one)])
def test_a_rule_names_its_operations(wrong):
    """`@rule` without brackets takes the function for a name."""
    known = dict(TRACE_RULES)
    with pytest.raises(
        hatcl.ConfigError, match=r"^rule: got (nothing|'aten::mm'|<function .*>); name operations without"
    ):
        rule(*wrong)
    assert known == TRACE_RULES
