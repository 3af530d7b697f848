"""Ways to learn a sequence of tasks: one file per method. `learn_sequence` finds them by name."""

from . import graft, hat, ilora, joint, olora, replay, sequential, tasl
from .registry import Batch, Method, continual_method, list_continual_methods, make_method

__all__ = [
    "Batch", "Method", "continual_method", "graft", "hat", "ilora", "joint", "list_continual_methods", "make_method",
    "olora", "replay", "sequential", "tasl",
]  # fmt: skip
