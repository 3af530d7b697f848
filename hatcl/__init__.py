"""hatcl: models that learn task after task. What an earlier task learned stays, bit for bit."""

from . import atlas, continual
from .config import HATConfig
from .continual import continual_method, learn_sequence, list_continual_methods
from .errors import (
    CapacityError,
    ConfigError,
    ConversionError,
    GraftError,
    GuardError,
    HATError,
    IntegrityError,
    IsolationError,
    NonFiniteLossError,
    SkillError,
    TaskError,
    VectorError,
)
from .grafts import Graft, GraftOptions, GraftScores, hold, learn_graft, select_graft
from .hat.adapter import as_adapter
from .hat.adding import AddedTasks, add_tasks, task_parameters
from .hat.certify import Certificate, certify
from .hat.convert import convert
from .hat.copies import seal
from .hat.describe import Description, describe
from .hat.extraction.extract import Extracted, ExtractReport, extract_task
from .hat.extraction.files import load_extracted
from .hat.forget import ForgetReport, forget_task
from .hat.given import hold_gates, masks_of
from .hat.growth.grow import GrowReport, grow
from .hat.layers import (
    HATConv1d,
    HATConv2d,
    HATConv3d,
    HATConvTranspose1d,
    HATConvTranspose2d,
    HATConvTranspose3d,
    HATEmbedding,
    HATLayer,
    HATLinear,
    HATMask,
    TaskIndexedBatchNorm1d,
    TaskIndexedBatchNorm2d,
    TaskIndexedBatchNorm3d,
    TaskIndexedGroupNorm,
    TaskIndexedInstanceNorm1d,
    TaskIndexedInstanceNorm2d,
    TaskIndexedInstanceNorm3d,
    TaskIndexedLayerNorm,
    TaskIndexedLinear,
    TaskIndexedParameter,
    TaskIndexedRMSNorm,
)
from .hat.learn import Learning, learn
from .hat.registry import register_layer
from .hat.reopen import ReopenReport, reopen_task
from .hat.routing.known import RouterOptions
from .hat.routing.predict import Prediction, predict
from .hat.routing.router import TaskRouter
from .hat.saving.pretrained import from_pretrained, push_to_hub, save_pretrained
from .hat.tasks import set_task, task, tasks
from .hat.together import forward
from .integrations.timm_names import install, list_models
from .map.units import UnitMap
from .shards import gathered
from .skills import (
    ConsolidateOptions,
    ILoRA,
    ILoRAConfig,
    Skill,
    SkillScorer,
    SkillScores,
    accumulate_scores,
    consolidate,
    localize,
    orthogonality,
    skill_overlap,
    skill_tensors,
)
from .vectors.compose import Composer, compose
from .vectors.conflicts import SignConflicts, sign_conflicts
from .vectors.merging import list_merges, merge, merge_method
from .vectors.task_vector import TaskVector

__version__ = "0.1.0"
__all__ = [
    "AddedTasks", "CapacityError", "Certificate", "Composer", "ConfigError", "ConsolidateOptions",
    "ConversionError", "Description", "ExtractReport", "Extracted", "ForgetReport", "Graft", "GraftError",
    "GraftOptions", "GraftScores", "GrowReport", "GuardError", "HATConfig", "HATConv1d", "HATConv2d", "HATConv3d",
    "HATConvTranspose1d", "HATConvTranspose2d", "HATConvTranspose3d", "HATEmbedding", "HATError", "HATLayer",
    "HATLinear", "HATMask", "ILoRA", "ILoRAConfig", "IntegrityError", "IsolationError", "Learning",
    "NonFiniteLossError", "Prediction", "ReopenReport", "RouterOptions", "SignConflicts", "Skill", "SkillError",
    "SkillScorer", "SkillScores", "TaskError", "TaskIndexedBatchNorm1d", "TaskIndexedBatchNorm2d",
    "TaskIndexedBatchNorm3d", "TaskIndexedGroupNorm", "TaskIndexedInstanceNorm1d", "TaskIndexedInstanceNorm2d",
    "TaskIndexedInstanceNorm3d", "TaskIndexedLayerNorm", "TaskIndexedLinear", "TaskIndexedParameter",
    "TaskIndexedRMSNorm", "TaskRouter", "TaskVector", "UnitMap", "VectorError", "accumulate_scores", "add_tasks",
    "as_adapter", "atlas", "certify", "compose", "consolidate", "continual", "continual_method", "convert",
    "describe", "extract_task", "forget_task", "forward", "from_pretrained", "gathered", "grow", "hold",
    "hold_gates", "learn", "learn_graft", "learn_sequence", "list_continual_methods", "list_merges", "list_models",
    "load_extracted", "localize", "masks_of", "merge", "merge_method", "orthogonality", "predict", "push_to_hub",
    "register_layer", "reopen_task", "save_pretrained", "seal", "select_graft", "set_task", "sign_conflicts",
    "skill_overlap", "skill_tensors", "task", "task_parameters", "tasks",
]  # fmt: skip

install()
