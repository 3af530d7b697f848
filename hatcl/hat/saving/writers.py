"""A converted model's own `save_pretrained` and `push_to_hub`, and the mark for other libraries in its folder.

Models of transformers, peft and huggingface_hub have such methods. For a converted model these would write files that
the libraries load as a plain network, with other outputs and without an error.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ...errors import ConfigError, HATError

READ_BY_HATCL = "what hatcl wrote, which is a model with tasks: load this folder with hatcl.from_pretrained"
# transformers builds this quantization config before it reads a weight, whatever its options, and raises an error that
# shows the text; it only warns of unknown names
MARK = {"quantization_config": {"quant_method": "quanto", "weights": READ_BY_HATCL}}
OVERRIDDEN = ("save_pretrained", "push_to_hub")
Way = Callable[..., Any]


class Writer:
    """Replaces a method of a converted model's class by `way(model, ...)`. It does not keep the model alive."""

    def __init__(self, way: Way, model: nn.Module) -> None:
        self.way, self._model = way, weakref.ref(model)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.way(self._model(), *args, **options)

    def __deepcopy__(self, memo: dict[int, Any]) -> Writer:
        """The copy's writer writes the copied model."""
        model: Any = self._model()
        return Writer(self.way, memo.get(id(model), model))

    def __reduce__(self) -> tuple[Any, ...]:
        return Writer, (self.way, self._model())


def take_over(model: nn.Module, ways: Mapping[str, Way]) -> None:
    """Replace methods with these names on a converted model by hatcl's. On its submodules they refuse, and also for
    classes with huggingface_hub's mixin, whose own `from_pretrained` silently skips entries that it cannot read."""
    for m in model.modules():
        for name, way in ways.items():
            if callable(getattr(type(m), name, None)):
                m.__dict__[name] = Writer(_refuse_part if m is not model else _refuse_mixin if is_mixed(m) else way, m)


def is_mixed(model: nn.Module) -> bool:
    """Has its class huggingface_hub's `ModelHubMixin`? Its `from_pretrained` loads the entries that fit and silently
    skips the rest: it would load a model with tasks as a plain network with other outputs."""
    return any(c.__name__ == "ModelHubMixin" for c in type(model).__mro__)


def give_back(model: nn.Module) -> None:
    """Restore the class's own methods on every module of a model."""
    for m in model.modules():
        for name in OVERRIDDEN:
            if isinstance(m.__dict__.get(name), Writer):
                del m.__dict__[name]


@contextlib.contextmanager
def given_back(model: nn.Module) -> Iterator[None]:
    """`give_back` inside the block."""
    kept = [(m, n, m.__dict__[n]) for m in model.modules() for n in OVERRIDDEN if isinstance(m.__dict__.get(n), Writer)]
    give_back(model)
    try:
        yield
    finally:
        for m, name, writer in kept:
            m.__dict__[name] = writer


def _refuse_part(part: nn.Module, *args: Any, **options: Any) -> None:
    raise HATError(
        f"save_pretrained: this {type(part).__name__} is a part of a converted model, whose gates lie outside of it; "
        "save the whole model (hatcl.save_pretrained), or a task of it as a plain model (hatcl.extract_task)"
    )


def _refuse_mixin(model: nn.Module, *args: Any, **options: Any) -> None:
    name = type(model).__name__
    raise HATError(
        f"save_pretrained: {name}.from_pretrained, which is huggingface_hub's, cannot read a model with tasks; write "
        f"it with hatcl.save_pretrained or hatcl.push_to_hub, and load it with "
        f"hatcl.from_pretrained(..., base={name}(...))"
    )


def check_options(model: nn.Module, state_dict: Mapping[str, Tensor] | None, options: Mapping[str, Any]) -> None:
    """Check options of other libraries' `save_pretrained`: none may be silently ignored.

    Raises:
        ConfigError: an option that hatcl does not have, or a state that is not the model's own.
    """
    plain = {"safe_serialization": True, "max_shard_size": None, "variant": None, "save_peft_format": True}
    for name, value in options.items():
        if name != "max_shard_size" and (name not in plain or value != plain[name]):
            raise ConfigError(
                f"save_pretrained: got {name}={value!r}, which a converted model does not have: it is written as one "
                "safetensors file with all its tasks; leave it out"
            )
    if state_dict is not None:
        own = {t.data_ptr() for t in model.state_dict().values()}
        other = next((n for n, t in state_dict.items() if t.data_ptr() not in own), None)
        if other is not None:
            raise ConfigError(
                f"save_pretrained: got a state_dict whose {other} is not the model's own; load it into the model "
                "(load_state_dict), and save then"
            )
