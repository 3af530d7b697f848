"""hatcl's recipes against mergekit itself: the largest difference per method and per feature of a recipe.

    pip install mergekit && python benchmarks/mergekit.py

The recipes and tiny checkpoints come from tests/recipe_parts.py: four fine-tunings of a four-layer network like
Llama's, and for a few recipes one like GPT-2 with a tied head. Methods that draw masks at random are compared with the
same masks: mergekit's `torch.bernoulli` is replaced by hatcl's counter-based draws for the same probabilities. A sample
of each of mergekit's results is recorded for tests on machines without mergekit.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parents[1] / "tests")]
sys.path.remove(str(Path(__file__).parent))  # or this file would be what `import mergekit` finds
import recipe_parts  # noqa: E402

from hatcl.vectors.mergekit import follow_recipe  # noqa: E402
from hatcl.vectors.merging.dare import kept  # noqa: E402
from hatcl.vectors.tensors import named_tensors  # noqa: E402

RESULT = Path(__file__).parent / "results" / "mergekit.json"
# other networks -> how they are made, and the cases that are also run on them
OTHERS = {
    "tied head": ({"kind": "gpt2"}, ("linear", "ties", "slices, passthrough", "tokenizer_source: base")),
    "small steps": (
        {"size": 1e-4},
        ("sce", "model_stock", "model_stock, filter_wise", "multislerp, with a base", "nearswap, t below all changes"),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="cases whose name starts so")
    parser.add_argument("--save", action="store_true", help=f"write {RESULT.name}")
    options = parser.parse_args()
    result: dict[str, Any] = {
        "mergekit": importlib.metadata.version("mergekit"),
        "torch": torch.__version__,
        "cases": {},
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cases = recipe_parts.cases()
        for network, (made, chosen) in {"": ({}, tuple(cases)), **OTHERS}.items():
            recipe_parts.write_models(folder / network, **made)
            os.chdir(folder / network)
            for case in (c for c in chosen if c.startswith(options.only or "")):
                label = f"{case} ({network})" if network else case
                found = result["cases"][label] = compare(cases[case], Path(f"case_{len(result['cases'])}"))
                print(f"{label:50s} {found['difference']:.1e} of {found['change']:.1e}", flush=True)
    if options.save:
        lines = [f"{json.dumps(name)}: {json.dumps(found)}" for name, found in result.pop("cases").items()]
        whole = json.dumps(result)[:-1] + ', "cases": {\n' + ",\n".join(lines) + "\n}}\n"
        RESULT.write_text(whole)


def compare(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    theirs, ours = folder / "mergekit", folder / "hatcl"
    run_mergekit(content, theirs)
    follow_recipe(content, ours)
    a, b = (dict(named_tensors(f)) for f in (theirs, ours))
    assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())
    assert all(a[n].shape == b[n].shape and a[n].dtype == b[n].dtype for n in a)
    config = [recipe_parts.config_of(f) for f in (theirs, ours)]
    sizes = [{k: c.get(k) for k in ("num_hidden_layers", "n_layer", "vocab_size", "dtype")} for c in config]
    assert sizes[0] == sizes[1], sizes
    off = max(float((a[n].double() - b[n].double()).abs().max()) for n in a)
    moved = named_tensors("base")
    same = [n for n in a if n in moved and moved[n].shape == a[n].shape]
    change = max((float((a[n].double() - moved[n].double()).abs().max()) for n in same), default=0.0)
    return {"difference": off, "change": change, "sample": recipe_parts.sampled(a)}


def run_mergekit(content: dict[str, Any], out: Path) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import MergeOptions, run_merge

    LoaderCache().loaders.clear()
    with hatcls_masks():
        run_merge(
            MergeConfiguration.model_validate(yaml.safe_load(yaml.safe_dump(content))),
            str(out),
            MergeOptions(quiet=True, write_model_card=False),
        )


@contextmanager
def hatcls_masks() -> Iterator[None]:
    """mergekit draws hatcl's masks: in each merge of one tensor the i-th draw is that of the i-th model."""
    from mergekit.merge_methods.generalized_task_arithmetic import GeneralizedTaskArithmeticMerge as Family

    whole, real = Family.merge_group, torch.bernoulli
    at: dict[str, Any] = {}

    def merge_group(self: Any, group: Any, /, **parameters: Any) -> Tensor:
        at.update(name=group.metadata.name, vector=0)
        return whole(self, group, **parameters)

    def bernoulli(p: Tensor) -> Tensor:
        drawn = kept(p.shape, 1 - p.double(), 0, at["vector"], at["name"])
        at["vector"] += 1
        return drawn.to(p.dtype)

    Family.merge_group, torch.bernoulli = merge_group, bernoulli
    try:
        yield
    finally:
        Family.merge_group, torch.bernoulli = whole, real


if __name__ == "__main__":
    main()
