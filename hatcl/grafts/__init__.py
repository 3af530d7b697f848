"""Grafts: the few elements of a fine-tuned model that hold its skill (Panigrahi et al. 2023, arXiv 2302.06600)."""

from .graft import Graft, overlaps, union
from .holding import hold
from .learned import LearnedGraft, learn_graft
from .options import PUBLISHED, GraftOptions
from .per_task import TaskGrafts, task_grafts
from .scores import GraftScores
from .selection import candidates, select_graft

__all__ = [
    "PUBLISHED", "Graft", "GraftOptions", "GraftScores", "LearnedGraft", "TaskGrafts", "candidates", "hold",
    "learn_graft", "overlaps", "select_graft", "task_grafts", "union",
]  # fmt: skip
