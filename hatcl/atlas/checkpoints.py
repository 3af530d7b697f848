"""The names in the checkpoints that the repositories of task vectors publish."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..errors import VectorError
from ..functional import digest_of
from ..vectors.tensors import Lazy, kinds_of

LINEAR, LINEAR_BASE = "params.", "params0."  # of a linearised encoder: learned, and expanded around


def under_names(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> Mapping[str, Tensor]:
    """The tensors in `names`, under their new names; tensors in files stay unread."""
    old = {new: n for n, new in names.items()}
    kinds = kinds_of(tensors)
    return Lazy({new: kinds[n] for new, n in old.items()}, lambda name: tensors[old[name]])


def names_in_linearised(tensors: Mapping[str, Tensor], base: Mapping[str, Tensor], where: object) -> dict[str, str]:
    """The names of a linearised encoder's learned parameters (Ortiz-Jimenez et al. 2023: `model.params.7`), which the
    file does not store. It also holds the parameters of the expansion point; these equal the base's parameters bit for
    bit, which reveals the names.

    Returns:
        Its names -> those of the base; empty if it is not a linearised encoder.

    Raises:
        VectorError: a parameter of the expansion point is not in the base, or equals more than one of the base's.
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
            raise VectorError(
                f"{where}: {name} equals {' and '.join(same[:3])} of the base; its name cannot be determined"
            )
        if same:
            out[name.replace(LINEAR_BASE, LINEAR)] = same[0]
    missing = sorted(set(base) - set(out.values()))
    if missing:
        raise VectorError(
            f"{where} is a linearised encoder that was expanded around other weights than the base's: {missing[0]} is "
            f"not among them ({len(missing)} such tensors); give the zero-shot encoder that it was made from as BASE"
        )
    return out


def _digest(t: Tensor) -> str:
    return digest_of(t.float())
