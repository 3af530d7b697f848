"""A merge of your own in one file: the element-wise median of the fine-tuned models, which one bad model cannot drag
away as it drags the mean. Once registered, `hatcl.merge` finds it by name, checks its options and names a typing slip;
models on disk are merged tensor by tensor, as by any other method."""

import torch
from torch import nn

import hatcl
from hatcl.vectors.merging.blocks import average, blockwise


@hatcl.merge_method("median", paper="your own, 2026")
def median(vectors: list[hatcl.TaskVector], *, scale: float = 1.0) -> hatcl.TaskVector:
    """`tau = scale * median_t tau_t`: of an even number the mean of the two in the middle."""

    def one(name: str, taus: list[torch.Tensor]) -> torch.Tensor:
        in_order = torch.stack(taus).sort(0).values
        return scale * average([in_order[(len(taus) - 1) // 2], in_order[len(taus) // 2]])

    return blockwise(vectors, one)


torch.manual_seed(0)
base, truth = nn.Linear(20, 5), nn.Linear(20, 5)
vectors = []
for noise in (0.01, 0.01, 0.01, 100.0):  # the last fine-tuning diverged
    tuned = {n: p.detach() + noise * torch.randn(p.shape) for n, p in truth.named_parameters()}
    vectors.append(hatcl.TaskVector.between(base, tuned))
assert "median" in hatcl.list_merges()
for method in ("mean", "median"):
    merged = hatcl.merge(vectors, method).apply_to(base)
    print(method, "is off by", float((merged.weight - truth.weight).abs().max().detach()))
try:
    hatcl.merge(vectors, "median", scal=0.5)
except hatcl.ConfigError as error:
    print(error)
