"""A mask over input features: each task chooses the features that it uses."""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn

from ...config import HATConfig
from ...errors import ConfigError
from ..binding import Binding, Units
from ..gates import Gates
from .gated import HATLayer


class HATMask(HATLayer, nn.Module):
    """`y = a * x`, with a gate a for each input feature. A task learns these gates like those of units: it keeps on the
    features that it needs (HAT-CL's masker in front of a model).

        mask = hatcl.HATMask(784, num_tasks=5)
        model = nn.Sequential(nn.Flatten(), mask, hatcl.convert(net, 5, x.flatten(1)))
        mask.gates.masks[0]  # [784] bool, once task 0 is sealed

    Its only parameters are the embeddings. A layer made with `reads=mask` reads these features, so later tasks may
    change its weights for features that no sealed task uses. A converted model treats all inputs as always on.

    Shapes: x with `features` elements along `dim`; y as x. a `[features]`.

    Args:
        features: number of features. num_tasks: number of tasks. dim: the dimension of x that holds the features.
        config: options, as for a model.

    Raises:
        ConfigError: `features` is not an integer of at least 1; in a forward, x has a different number of features.
    """

    def __init__(self, features: int, num_tasks: int = 1, *, dim: int = -1, config: HATConfig | None = None) -> None:
        nn.Module.__init__(self)
        if isinstance(features, bool) or not isinstance(features, int) or features < 1:
            raise ConfigError(f"features: got {features!r}, expected an integer of at least 1; flatten images first")
        self.features, self.dim = features, dim
        self.gates = Gates(features, (config or HATConfig()).replace(num_tasks=num_tasks))
        units = Units(self.gates, np.arange(1, features + 1))
        self._hat_attach(Binding(self.gates, output=(dim, units)), num_tasks)

    def forward(self, x: Tensor) -> Tensor:
        if not -x.dim() <= self.dim < x.dim() or x.shape[self.dim] != self.features:
            raise ConfigError(
                f"HATMask: got an input of shape {list(x.shape)}, expected {self.features} features along dimension "
                f"{self.dim}; flatten it, or pass dim="
            )
        return self._hat_gate_output(x)

    def extra_repr(self) -> str:
        return f"{self.features}, dim={self.dim}"
