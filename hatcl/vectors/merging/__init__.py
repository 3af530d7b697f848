"""Merging task vectors without training, one file per method. Every file of this folder is read and `merge` finds
methods by name, so a new file needs no entry elsewhere."""

from importlib import import_module
from pkgutil import iter_modules

from .arithmetic import search_scale
from .emr import emr_parts
from .fisher import diagonal_fisher
from .opcm import Continual, opcm_step
from .registry import list_merges, merge, merge_method
from .regmean import input_grams

for _file in sorted(m.name for m in iter_modules(__path__)):
    import_module(f"{__name__}.{_file}")

__all__ = [
    "Continual", "diagonal_fisher", "emr_parts", "input_grams", "list_merges", "merge", "merge_method", "opcm_step",
    "search_scale",
]  # fmt: skip
