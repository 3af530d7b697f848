"""Ways to learn a sequence of tasks, one file per method. Every file of this folder is read and `learn_sequence` finds
methods by name, so a new file needs no entry elsewhere."""

from importlib import import_module
from pkgutil import iter_modules

from .registry import Batch, Method, continual_method, list_continual_methods, make_method

for _file in sorted(m.name for m in iter_modules(__path__)):
    import_module(f"{__name__}.{_file}")

__all__ = ["Batch", "Method", "continual_method", "list_continual_methods", "make_method"]
