"""Ways to learn a sequence of tasks: one file per method. `learn_sequence` finds them by name, and every file of this
folder is read, so a method in a file of its own needs no entry elsewhere."""

from importlib import import_module
from pkgutil import iter_modules

from .registry import Batch, Method, continual_method, list_continual_methods, make_method

for _file in sorted(m.name for m in iter_modules(__path__)):
    import_module(f"{__name__}.{_file}")

__all__ = ["Batch", "Method", "continual_method", "list_continual_methods", "make_method"]
