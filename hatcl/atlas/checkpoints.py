"""Checkpoints as the repositories of task vectors publish them: state dicts of `torch.save`, read without running any
code that is in them; pickled encoders are refused, with the lines that turn them into safetensors."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, IntegrityError, VectorError
from ..functional import digest_of
from ..vectors.tensors import PICKLES, Lazy, kinds_of, named_tensors

# run where the file was made: unpickling needs the classes of its repository, and runs what is in the file
CONVERSION = """\
import torch; from safetensors.torch import save_file
state = torch.load("{path}", map_location="cpu", weights_only=False).state_dict()
save_file({{n: t.clone().contiguous() for n, t in state.items()}}, "{new}")"""
LINEAR, LINEAR_BASE = "params.", "params0."  # of a linearised encoder: learned, and expanded around


def read_checkpoint(path: Path) -> Mapping[str, Tensor]:
    """The tensors of safetensors (see `named_tensors`), or of a state dict that `torch.save` wrote.

    Raises:
        ConfigError: a pickled module; the error has the lines that convert it. IntegrityError: a file that is missing,
            damaged, or holds something else.
    """
    if not is_pickle(path):
        return named_tensors(path)
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise IntegrityError(f"{path}: no such file; expected a checkpoint") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        if "TorchScript" in str(error):
            raise IntegrityError(
                f"{path}: is a TorchScript archive, expected a state dict; write torch.jit.load(path).state_dict() "
                "with safetensors.torch.save_file"
            ) from error
        if "weights_only" in str(error) or "Weights only" in str(error):
            lines = CONVERSION.format(path=path, new=path.with_suffix(".safetensors"))
            raise ConfigError(
                f"{path} is a pickled module, or holds more than tensors; reading it would run code that is in it. "
                f"If you trust it, run these lines in the repository that made it, and give the new file:\n{lines}"
            ) from error
        raise IntegrityError(
            f"{path}: cannot be read as a checkpoint ({str(error).splitlines()[0]}); copy it again"
        ) from error
    # open_clip's own training puts it under this name
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not any(isinstance(t, Tensor) for t in content.values()):
        raise IntegrityError(f"{path}: holds {type(content).__name__}, expected a state dict, names with tensors")
    return named_tensors({n: t.detach() for n, t in content.items() if isinstance(t, Tensor)})


def is_pickle(path: Path) -> bool:
    """Is it a file of torch.save, by its name?"""
    return path.suffix in PICKLES and not path.is_dir()


def under_names(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> Mapping[str, Tensor]:
    """The tensors in `names`, under the names that these have there; unread where they were."""
    old = {new: n for n, new in names.items()}
    kinds = kinds_of(tensors)
    return Lazy({new: kinds[n] for new, n in old.items()}, lambda name: tensors[old[name]])


def names_in_linearised(tensors: Mapping[str, Tensor], base: Mapping[str, Tensor], where: object) -> dict[str, str]:
    """The names of a linearised encoder's learned parameters (Ortiz-Jimenez et al. 2023: `model.params.7`), which have
    none in the file. It also holds what it was expanded around; those are the base's parameters, bit for bit, and so
    tell the names.

    Returns:
        its names -> those of the base; empty where it is no linearised encoder.

    Raises:
        VectorError: a parameter that it was expanded around is not the base's, or is more than one of them.
    """
    around = [n for n in tensors if LINEAR_BASE in n]
    if not around:
        return {}
    by_digest: dict[str, list[str]] = {}
    for name, t in base.items():
        by_digest.setdefault(_digest(t), []).append(name)
    out: dict[str, str] = {}
    for name in around:
        same = by_digest.get(_digest(tensors[name]), [])
        if len(same) > 1:
            raise VectorError(f"{where}: {name} equals {' and '.join(same[:3])} of the base; its name cannot be told")
        if same:
            out[name.replace(LINEAR_BASE, LINEAR)] = same[0]
    missing = sorted(set(base) - set(out.values()))
    if missing:
        raise VectorError(
            f"{where}: is a linearised encoder that was expanded around other weights than the base's: {missing[0]} is "
            f"not among them ({len(missing)} such tensors); give the zero-shot encoder that it was made from as BASE"
        )
    return out


def _digest(t: Tensor) -> str:
    return digest_of(t.float())
