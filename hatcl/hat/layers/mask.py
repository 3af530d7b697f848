"""A mask over input features: which of them a task looks at."""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn

from ...config import HATConfig
from ...errors import ConfigError
from ..binding import Binding, Units
from ..gates import Gates
from .gated import HATLayer


class HATMask(HATLayer, nn.Module):
    """`y = a * x`, with a gate a for each input feature, which a task learns as the gates of units: the features that
    are on are those that it needs (HAT-CL's masker in front of a model).

        mask = hatcl.HATMask(784, num_tasks=5)
        model = nn.Sequential(nn.Flatten(), mask, hatcl.convert(net, 5, x.flatten(1)))
        mask.gates.masks[0]  # [784] bool, once task 0 is sealed

    `hatcl.save_pretrained(model, folder)` writes both, and `hatcl.from_pretrained(folder, base=...)` reads them into
    `nn.Sequential(nn.Flatten(), hatcl.HATMask(784, 5), net)`.

    It has no parameters but its embeddings. A layer made with `reads=mask` knows what it reads, so that later tasks may
    change its weights of features that no sealed task looks at; a converted model takes all of its inputs as always on.

    Shapes: x with `features` elements along `dim`; y as x. a `[features]`.

    Args:
        features: how many. num_tasks: how many tasks. dim: the dimension of x along which they are.
        config: options, as those of a model.

    Raises:
        ConfigError: the number of features is none; in a forward, x has another number of them.
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
