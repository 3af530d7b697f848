"""Skills: the units of an adapter that a task needs, scored, localised and consolidated task after task (TaSL), or kept
by a stable adapter next to the plastic one (I-LoRA). `hatcl.skills.trainer` is for transformers' Trainer."""

from .consolidation import ConsolidateOptions, consolidate, group_weights
from .hidden import Hidden, hidden_states_of
from .ilora import ILoRA
from .ilora_config import ILoRAConfig
from .orthogonal import orthogonality
from .product import best_factors
from .reservoir import Reservoir
from .scorer import SkillScorer
from .scores import Skill, SkillScores, accumulate_scores, localize, skill_overlap
from .tensors import adapters_of, skill_tensors

__all__ = [
    "ConsolidateOptions", "Hidden", "ILoRA", "ILoRAConfig", "Reservoir", "Skill", "SkillScorer", "SkillScores",
    "accumulate_scores", "adapters_of", "best_factors", "consolidate", "group_weights", "hidden_states_of", "localize",
    "orthogonality", "skill_overlap", "skill_tensors",
]  # fmt: skip
