"""A command of your own, in one file. In hatcl/commands/ such a file is found by itself; elsewhere, import it first."""

from dataclasses import dataclass
from typing import Annotated

import timm
import typer
from safetensors.torch import save_file

import hatcl
from hatcl.commands import command, main, say


@dataclass(frozen=True)
class Norms:
    """Each field is an option, and --help says of it what stands here.

    Args:
        most: how many tensors, the largest first. digits: after the decimal point.
    """

    most: int = 3
    digits: int = 2


@command("norms")
def norms(vector: Annotated[str, typer.Argument(help="A saved task vector.")], *, options: Norms) -> dict[str, float]:
    """Show which tensors fine-tuning has changed most."""
    sizes = {name: float(delta.norm()) for name, delta in hatcl.TaskVector.load(vector).items()}
    largest = {name: sizes[name] for name in sorted(sizes, key=lambda name: -sizes[name])[: options.most]}
    for name, size in largest.items():
        say(f"{name}: {size:.{options.digits}f}")
    return largest  # what --json prints


for seed in (0, 1):
    save_file(timm.create_model("test_resnet").state_dict(), f"{seed}.safetensors")
hatcl.TaskVector.between("0.safetensors", "1.safetensors").save("vector.safetensors")
main(["norms", "vector.safetensors", "--most", "2"])
