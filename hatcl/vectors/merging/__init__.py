"""Merging task vectors without training: one file per method. `merge` finds them by name."""

from . import (
    adamerging,
    arithmetic,
    breadcrumbs,
    dare,
    emr,
    fisher,
    iso_c,
    iso_cts,
    knots,
    localize_and_stitch,
    magmax,
    mean,
    opcm,
    regmean,
    regmean_plusplus,
    slerp,
    tall_masks,
    ties,
    tsv,
    wudi,
)
from .arithmetic import search_scale
from .emr import emr_parts
from .fisher import diagonal_fisher
from .opcm import Continual, opcm_step
from .registry import list_merges, merge, merge_method
from .regmean import input_grams

__all__ = [
    "Continual", "adamerging", "arithmetic", "breadcrumbs", "dare", "diagonal_fisher", "emr", "emr_parts", "fisher",
    "input_grams", "iso_c", "iso_cts", "knots", "list_merges", "localize_and_stitch", "magmax", "mean", "merge",
    "merge_method", "opcm", "opcm_step", "regmean", "regmean_plusplus", "search_scale", "slerp", "tall_masks", "ties",
    "tsv", "wudi",
]  # fmt: skip
