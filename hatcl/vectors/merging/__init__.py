"""Merging task vectors without training: one file per method. `merge` finds them by name."""

from . import (
    adamerging,
    arithmetic,
    breadcrumbs,
    dare,
    della,
    fisher,
    karcher,
    magmax,
    mean,
    model_stock,
    multislerp,
    nuslerp,
    passthrough,
    regmean,
    sce,
    slerp,
    ties,
    tsv,
    wudi,
)
from .arithmetic import search_scale
from .fisher import diagonal_fisher
from .registry import list_merges, merge, merge_method
from .regmean import input_grams

__all__ = [
    "adamerging", "arithmetic", "breadcrumbs", "dare", "della", "diagonal_fisher", "fisher", "input_grams", "karcher",
    "list_merges", "magmax", "mean", "merge", "merge_method", "model_stock", "multislerp", "nuslerp", "passthrough",
    "regmean", "sce", "search_scale", "slerp", "ties", "tsv", "wudi",
]  # fmt: skip
