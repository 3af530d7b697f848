"""Converted containers: their steps are those of the plain model, without the gates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..errors import ConversionError
from .gates import Gates
from .registry import Derived, derive


class _Container(Derived):
    """Length, iteration and indexing work as before the conversion. A slice is an ordinary container of the gated
    steps: the model's active task is active there too.

    Raises:
        ConversionError: on adding or removing a step, since the gates belong to the converted steps.
    """

    _modules: Any
    hat_plain: Any

    def _hat_steps(self) -> Any:
        plain = self.hat_plain()
        plain._modules = {n: m for n, m in self._modules.items() if not isinstance(m, Gates)}
        return plain

    def __len__(self) -> int:
        return sum(not isinstance(m, Gates) for m in self._modules.values())

    def __iter__(self) -> Iterator[Any]:
        return iter([m for m in self._modules.values() if not isinstance(m, Gates)])

    def __getitem__(self, index: Any) -> Any:
        return self._hat_steps()[index]

    def _hat_refused(self, *args: Any, **kwargs: Any) -> Any:
        raise ConversionError(
            f"{type(self).__name__}: no step can be added or removed once the model is converted, since its gates "
            "belong to the steps that were there; change the plain model and convert that, or make the converted model "
            "a step of another one"
        )

    __delitem__ = __iadd__ = append = clear = extend = insert = pop = update = _hat_refused


class HATSequential(_Container, nn.Sequential):
    """A converted `nn.Sequential`."""

    hat_plain = nn.Sequential


class HATModuleList(_Container, nn.ModuleList):
    """A converted subclass of `nn.ModuleList`."""

    hat_plain = nn.ModuleList


class HATModuleDict(_Container, nn.ModuleDict):
    """A converted subclass of `nn.ModuleDict`."""

    hat_plain = nn.ModuleDict

    def __iter__(self) -> Iterator[str]:
        return iter(self._hat_steps())

    def __contains__(self, key: str) -> bool:
        return key in self._hat_steps()

    def keys(self) -> Any:
        return self._hat_steps().keys()

    def items(self) -> Any:
        return self._hat_steps().items()

    def values(self) -> Any:
        return self._hat_steps().values()


def without_gates(model: nn.Module) -> None:
    """Give a converted container a class that does not count its gates as a step."""
    kinds: tuple[Any, ...] = (HATSequential, HATModuleList, HATModuleDict)
    for kind in kinds:
        if isinstance(model, kind.hat_plain) and not isinstance(model, _Container):
            model.__class__ = derive(kind, type(model), ())  # type: ignore[arg-type]
