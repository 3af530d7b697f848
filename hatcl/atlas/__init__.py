"""aTLAS: knowledge composition by learned anisotropic scaling of task vectors (Zhang et al. 2024, arXiv 2407.02880)."""

from ..data.shots import sample_shots
from ..engine.measures import accuracy, accuracy_per_class
from .adaptation import adapt, random_crops
from .addition import add
from .caches import LPPlusPlus, TipAdapter, lp_plus_plus, tip_adapter
from .entropy import minimise_entropy
from .fewshot import few_shot
from .fitting import Fitted, fit, spread
from .heads import ClassHead, class_embeddings, encoder, prototypes, text_head, trained_head
from .linear import Linearised, linearised
from .measures import normalised, sweep
from .negation import negate
from .options import AtlasOptions
from .prediction import Predicted, learn_predictor
from .regularisers import cosines, penalty
from .searching import refine, search
from .selection import Selection, select_blocks
from .tasks import AtlasTask

__all__ = [
    "AtlasOptions", "AtlasTask", "ClassHead", "Fitted", "LPPlusPlus", "Linearised", "Predicted", "Selection",
    "TipAdapter", "accuracy", "accuracy_per_class", "adapt", "add", "class_embeddings", "cosines", "encoder",
    "few_shot", "fit", "learn_predictor", "linearised", "lp_plus_plus", "minimise_entropy", "negate", "normalised",
    "penalty", "prototypes", "random_crops", "refine", "sample_shots", "search", "select_blocks", "spread", "sweep",
    "text_head", "tip_adapter", "trained_head",
]  # fmt: skip
