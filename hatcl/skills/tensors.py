"""The tensors of a skill: a peft adapter's LoRA factors or, in full fine-tuning, the trained parameters."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..errors import SkillError, nearest
from ..map.lora import factor_in, no_pairs


def adapters_of(model: nn.Module) -> list[str]:
    """Names of the LoRA adapters in a model, in the order in which peft holds them."""
    return list(dict.fromkeys(found[1] for n, _ in model.named_parameters() if (found := _split(n)) is not None))


def active_adapter(model: nn.Module) -> str | None:
    """The active adapter; None for a model without LoRA.

    Raises:
        SkillError: several are active.
    """
    if not adapters_of(model):
        return None
    active = getattr(model, "active_adapters", None)
    active = active() if callable(active) else active  # a method in transformers, a property in peft
    names: Sequence[str] = adapters_of(model) if active is None else active
    if len(names) != 1:
        raise SkillError(
            f"{len(names)} adapters are active ({', '.join(names)}), expected one; activate one with set_adapter(), "
            "or pass adapter="
        )
    return names[0]


def skill_tensors(model: nn.Module, adapter: str | None = None) -> dict[str, nn.Parameter]:
    """The factors A and B of a LoRA adapter, by peft's names without the adapter's segment, as in its file
    (`....q.lora_A.default.weight` -> `....q.lora_A.weight`), so that two adapters of one model have the same names.
    For a model without LoRA: its trainable floating-point parameters.

    Args:
        adapter: its name; default: the active one. Raises: SkillError: the adapter does not exist, nothing is
            trainable, or the factors belong to stacked experts, so that row r of A and column r of B are not a pair
            (`no_pairs`).
    """
    names = adapters_of(model)
    why = no_pairs(model)
    if why is not None:
        raise SkillError(why)
    if adapter is None:
        adapter = active_adapter(model)
    if adapter is None:
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad and p.is_floating_point()]
        out = {".".join(_segments(n)): p for n, p in trained}
        if not out:
            raise SkillError(f"{type(model).__name__} has no LoRA adapter and no parameter that requires a gradient")
        return out
    out = {}
    for name, p in model.named_parameters():
        found = _split(name)
        if found is not None and found[1] == adapter:
            out[found[0]] = p
    if not out:
        raise SkillError(
            f"adapter {adapter!r} matches no LoRA tensor of {type(model).__name__}; "
            + (f"it has {', '.join(names)}; did you mean {nearest(adapter, names)!r}?" if names else "it has none")
        )
    return out


def _split(name: str) -> tuple[str, str] | None:
    """The name without the adapter, and the adapter."""
    parts = _segments(name)
    at = factor_in(parts[:-1])
    return None if at is None else (".".join([*parts[: at + 1], *parts[at + 2 :]]), parts[at + 1])


def _segments(name: str) -> list[str]:
    """The segments of a name, without those that torch.compile adds."""
    return [part for part in name.split(".") if part != "_orig_mod"]
