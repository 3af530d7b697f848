"""The effect of each operation on units, one small function per kind of operation. Every file of this folder is
imported, so a new file needs no entry elsewhere."""

from importlib import import_module
from pkgutil import iter_modules

from .registry import TRACE_RULES, Call, Moved, Rule, apply_rule, disown, rule, unknown

for _file in sorted(m.name for m in iter_modules(__path__)):
    import_module(f"{__name__}.{_file}")

__all__ = ["TRACE_RULES", "Call", "Moved", "Rule", "apply_rule", "disown", "rule", "unknown"]
