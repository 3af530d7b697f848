"""HAT layers. Importing this package registers them."""

from . import sequence as _sequence
from .conv import HATConv1d, HATConv2d, HATConv3d, HATConvTranspose1d, HATConvTranspose2d, HATConvTranspose3d
from .gated import HATLayer
from .linear import HATEmbedding, HATLinear, TaskIndexedLinear, TaskIndexedParameter
from .mask import HATMask
from .norm import (
    TaskIndexedBatchNorm1d,
    TaskIndexedBatchNorm2d,
    TaskIndexedBatchNorm3d,
    TaskIndexedGroupNorm,
    TaskIndexedInstanceNorm1d,
    TaskIndexedInstanceNorm2d,
    TaskIndexedInstanceNorm3d,
    TaskIndexedLayerNorm,
    TaskIndexedRMSNorm,
)

assert _sequence
__all__ = [
    "HATConv1d", "HATConv2d", "HATConv3d", "HATConvTranspose1d", "HATConvTranspose2d", "HATConvTranspose3d",
    "HATEmbedding", "HATLayer", "HATLinear", "HATMask", "TaskIndexedBatchNorm1d", "TaskIndexedBatchNorm2d",
    "TaskIndexedBatchNorm3d", "TaskIndexedGroupNorm", "TaskIndexedInstanceNorm1d", "TaskIndexedInstanceNorm2d",
    "TaskIndexedInstanceNorm3d", "TaskIndexedLayerNorm", "TaskIndexedLinear", "TaskIndexedParameter",
    "TaskIndexedRMSNorm",
]  # fmt: skip
