"""A trace rule of your own: what an operation does to units. An operation that the trace does not know forgets which
units it carries; with a rule, what comes after it reads them, and tasks share by them."""

import torch
from torch import nn
from torch.nn import functional as F

import hatcl
from hatcl.map.coupling import Coupling
from hatcl.map.rules import Call, Moved, rule
from hatcl.map.rules.reductions import within_channels


class Turned(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        turn = torch.tensor([[[0.87, -0.5, 0], [0.5, 0.87, 0]]]).expand(len(x), -1, -1)
        return F.grid_sample(x, F.affine_grid(turn, list(x.shape), align_corners=False), align_corners=False)


torch.manual_seed(0)
x = torch.randn(16, 3, 8, 8)
net = nn.Sequential(nn.Conv2d(3, 8, 3), Turned(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 2))
before = hatcl.convert(net, num_tasks=2, example_inputs=x)


@rule("grid_sampler_2d")
def grid_sample(call: Call, coupling: Coupling) -> Moved:
    """A pixel is drawn from its own channel, and is zero where the channel is."""
    return within_channels(call, coupling, dims=2)


model = hatcl.convert(net, num_tasks=2, example_inputs=x)
with hatcl.learn(model, 0, torch.optim.SGD(model.parameters(), lr=0.1), steps=1):
    pass  # sealed as it was drawn: about half of the units are on
for found in (before.hat_gates.unit_map, model.hat_gates.unit_map):
    reads = [f.units.tolist() for f in found.entries["2.weight"].factors if not f.owner]
    print("the second convolution reads the units", reads, *found.notes.values())
print(hatcl.certify(model, x, strict=True))
