"""The options of a HAT model: one frozen, JSON-able dataclass."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from .errors import ConfigError, nearest

INITS = ("normal", "dense", "sparse", "uniform", "constant")
SCHEDULES = ("linear", "cosine", "half_cosine", "exponential", "constant")
PENALTIES = ("global", "layer")
REUSE = ("all", "none")
COMPENSATIONS = ("exact", "hat")
PREVIOUS, BEST = "previous", "best"  # the task to start from, as an alternative to a number
HEAD_STARTS = ("auto", "plain", "drawn")
MASKS = ("learned", "all", "given")
PROTECTIONS = ("exact", "adahat", "fg_adahat")


HATCL_OPTIONS = {
    "attn_clamp": "clamp",
    "forgive_quota": "forgiven",
    "gate": "compensation",
    "grad_comp_clamp": "compensation_clamp",
    "grad_comp_factor": "embedding_lr_scale",
    "init_strat": "init",
    "locked_task_ids": "locked",
    "mask_dim": "",
    "mask_scale": "schedule",
    "max_trn_mask_scale": "max_scale",
    "min_trn_mask_scale": "",
    "ratio_greater_than_one": "above_one",
    "strat": "schedule",
}
"""HAT-CL's options -> their names here; "": hatcl has none and needs none (docs/coming_from.md)."""


Class = TypeVar("Class", bound=type)


def _answers_hatcl(cls: Class) -> Class:
    """Make a dataclass raise `ConfigError` for an unknown option, with the nearest name, which Python's own error
    lacks."""
    init = cls.__init__  # type: ignore[misc]

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **options: Any) -> None:
        known_options(cls, options, HATCL_OPTIONS)
        init(self, *args, **options)

    cls.__init__ = checked  # type: ignore[misc]
    return cls


@_answers_hatcl
@dataclasses.dataclass(frozen=True)
class HATConfig:
    """Options of hard attention to the task (Serra et al. 2018, arXiv 1801.01423; HAT-CL, arXiv 2307.09653).

    Args:
        num_tasks: the number of tasks that the model has room for; `hatcl.add_tasks` adds more.
        init: the start values of a task's embeddings. `normal`: e ~ N(0, 1) (HAT). `dense`: every unit on, e =
            |`init_value|` (HAT-CL). `sparse`: e ~ |`init_value`| N(Phi^-1(d), 1), so that a share d = `init_density` of
            the units is on (HAT-CL). `uniform`: e ~ U(0, 2 |`init_value|`) (HAT's compression experiments). `constant`:
            e = `init_value`, sign included.
        init_value: the embedding's size, for the `init` that need one.
        init_density: the share of units that start on under `sparse`; None = 1 / `num_tasks` (HAT-CL).
        schedule: how the scale s goes to `max_scale` over the steps of one cycle (see `hatcl.functional.scale_at`).
            `linear` (HAT), `half_cosine` and `exponential` rise; HAT-CL's `cosine` falls from `max_scale` to 1 first.
        above_one: share of a cycle in which the scale of `exponential` is above 1 (HAT-CL: 0.8).
        cycles: how many times the scale is annealed within one task; None = once per epoch, as in HAT (the `epochs`
            given to `hatcl.learn`).
        settle: share of a task's steps, at its end, in which the gates are already hard and the embeddings fixed, so
        that weights and statistics fit the sealed network (not in HAT; 0 turns it off).
        max_scale: s_max of HAT's eq. 3 and 4.
        clamp: embeddings are kept within +-`clamp` after every step (HAT: 6).
        compensation: how the gradient compensation is computed: `hat`, which stops where float32 rounds the gate to 1,
        as in HAT's own code, or `exact`, the closed form (see `hatcl.functional.soft_gate`).
        compensation_clamp: |s * e| is clamped to this in the gradient compensation (HAT: 50).
        embedding_lr_scale: an embedding's step is the optimizer's step times this.
        penalty_weight: weight of the sparsity penalty (HAT: 0.75).
        penalty: `global` normalises over all units (HAT's eq. 5), `layer` takes the mean of the layers' ratios
            (HAT-CL).
        forgiven: share of a layer's units that the penalty forgives; None = none, HAT-CL's quota is 1 / num_tasks.
        reuse: which units of sealed tasks a new task may use. `all`: any, their elements frozen (HAT). `none`: only
            units that no sealed task uses, so that no two tasks share anything and forgetting one erases all of it.
        own_share: share of the weights that are copied for every task, the smallest parameters first (see
            `hat/own_copies.py`): 0 = one network for all tasks, 1 = a network for each, which can start from another's.
        start_from: the sealed task that a new one starts from (see `hatcl.learn`): its number (that task itself starts
            from none), `previous`, `best`; None = no task.
        start_hold: for a task that starts from another, the share of its steps in which it keeps the gates it started
            with; after that they are learned.
        heads: how the copies of a head begin. `plain`: all with the plain model's values. `drawn`: the first task's
            with these, every other with values that the layer's initialiser draws for it (HAT). Features that tasks
            share fit the values with which earlier heads began, so a head that begins with the same ones answers for
            their classes at first. `auto`: drawn where the plain head holds nothing that was learned (see
            `hatcl.hat.heads.is_untrained`), else plain. A head that does not require gradients stays plain.
        masks: which units a task uses. `learned`: the task learns them. `all`: every unit, so that the first task
            learns all that is shared, and each task learns its copies (see `own_share`). `array:q`: one q-th of every
            layer's units, arranged so that q x q tasks share no element with a unit at both ends (see
            `hat/arrays.py`). `given`: those given by `hatcl.convert(masks=...)` or `hatcl.hold_gates`.
        locked: sealed tasks whose elements are frozen while others learn; None = all (HAT-CL's choice of locked tasks).
        protection: how elements that sealed tasks use are protected. `exact`: they are frozen, bit for bit. `adahat`: a
            later task moves them by degrees, and sealed tasks drift (AdaHAT; see `hatcl.hat.protection`). `fg_adahat`:
            it moves them less, the more they matter to sealed tasks (FG-AdaHAT).
        protection_alpha: alpha (the intensity) of `adahat` and `fg_adahat`; larger lets sealed tasks drift more.
        protection_epsilon: their epsilon.
    """

    num_tasks: int = 1
    init: str = "normal"
    init_value: float = 1.0
    init_density: float | None = None
    schedule: str = "linear"
    above_one: float = 0.8
    cycles: int | None = 1
    settle: float = 0.1
    max_scale: float = 400.0
    clamp: float = 6.0
    compensation: str = "hat"
    compensation_clamp: float = 50.0
    embedding_lr_scale: float = 1.0
    penalty_weight: float = 0.75
    penalty: str = "global"
    forgiven: float | None = None
    reuse: str = "all"
    own_share: float = 0.0
    start_from: int | str | None = None
    start_hold: float = 1.0
    heads: str = "auto"
    masks: str = "learned"
    locked: tuple[int, ...] | None = None
    protection: str = "exact"
    protection_alpha: float = 1e-6
    protection_epsilon: float = 0.1

    def __post_init__(self) -> None:
        one_of("init", self.init, INITS)
        one_of("schedule", self.schedule, SCHEDULES)
        one_of("penalty", self.penalty, PENALTIES)
        one_of("reuse", self.reuse, REUSE)
        one_of("compensation", self.compensation, COMPENSATIONS)
        one_of("protection", self.protection, PROTECTIONS)
        one_of("heads", self.heads, HEAD_STARTS)
        whole("num_tasks", self.num_tasks)
        self._check_masks()
        number("init_value", self.init_value)
        for name, low in (
            ("max_scale", 1.0),
            ("clamp", 0.0),
            ("compensation_clamp", 0.0),
            ("embedding_lr_scale", 0.0),
            ("protection_alpha", 0.0),
            ("protection_epsilon", 0.0),
        ):
            number(name, getattr(self, name), low, without="low")
        number("penalty_weight", self.penalty_weight, 0)
        for name in ("init_density", "forgiven", "settle"):
            if getattr(self, name) is not None or name == "settle":
                number(name, getattr(self, name), 0, 1, what="a share")
        number("above_one", self.above_one, 0, 1, without="low", what="a share")
        whole("cycles", self.cycles, optional=True)
        number("own_share", self.own_share, 0, 1, what="a share")
        number("start_hold", self.start_hold, 0, 1, without="low", what="a share")
        if check_start(self.start_from) is not None and self.reuse == "none":
            raise ConfigError(
                f"start_from: got {self.start_from!r} with reuse='none', where tasks share no unit; but a task that "
                "starts from another shares most of its units. Use reuse='all', or leave start_from out"
            )
        if self.locked is not None:
            object.__setattr__(self, "locked", tuple(int(t) for t in self.locked))

    @property
    def array(self) -> int | None:
        """q, for array masks."""
        found = re.fullmatch(r"array:([1-9][0-9]{0,3})", self.masks) if isinstance(self.masks, str) else None
        return int(found[1]) if found else None

    def _check_masks(self) -> None:
        q = self.array
        if q is None and self.masks not in MASKS:
            raise ConfigError(
                f"masks: got {self.masks!r}, expected {', '.join(MASKS)} or array:q with q from 2, such as array:3"
            )
        if q is None and self.masks != "all":
            return
        if self.reuse != "all":
            raise ConfigError(
                f"reuse: got {self.reuse!r} with masks={self.masks!r}, whose tasks share units; take reuse='all'"
            )
        if q is None:
            return
        if q < 2:
            raise ConfigError(f"masks: got {self.masks!r}, expected at least array:2")
        if self.num_tasks > q * q:
            enough = math.isqrt(self.num_tasks - 1) + 1
            raise ConfigError(
                f"num_tasks: got {self.num_tasks}, masks={self.masks!r} has room for {q} x {q} = {q * q} tasks; use "
                f"array:{enough}, which makes each task narrower, or fewer tasks"
            )

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> HATConfig:
        """A config from JSON-like options. Raises `ConfigError` for an unknown key, with the nearest one."""
        return cls(**options)

    def to_dict(self) -> dict[str, Any]:
        """The options as JSON-able values; `from_dict` reads them back."""
        out = dataclasses.asdict(self)
        out["locked"] = None if self.locked is None else list(self.locked)
        return out

    def replace(self, **changes: Any) -> HATConfig:
        """A copy with some options changed, checked like a new config."""
        return self.from_dict({**self.to_dict(), **changes})


C = TypeVar("C", bound="Changeable")
V = TypeVar("V")


class Changeable:
    """Base of the dataclasses of options: a procedure accepts a mapping of the options to change."""

    def changed(self: C, options: C | Mapping[str, Any] | None) -> C:
        """These options with some changed, or other options instead.

        Raises:
            ConfigError: a name is unknown; the text has the nearest one.
        """
        kind = type(self)
        if options is None:
            return self
        if isinstance(options, kind):
            return options
        if not isinstance(options, Mapping):
            raise ConfigError(f"options: got {options!r}, expected {kind.__name__} or a mapping of options to change")
        known_options(kind, options)
        return dataclasses.replace(self, **options)  # type: ignore[type-var]


def known_options(cls: type, options: Iterable[str], elsewhere: Mapping[str, str] | None = None) -> None:
    """Raise `ConfigError` for an option that the dataclass lacks, with the nearest one.

    Args:
        elsewhere: another library's names -> the names here ("": none).
    """
    known = [f.name for f in dataclasses.fields(cls)]
    for key in options:
        if key not in known:
            near = (elsewhere or {}).get(key, nearest(key, known))
            meant = f"did you mean {near!r}?" if near else "hatcl needs none (docs/coming_from.md); leave it out."
            raise ConfigError(f"{cls.__name__} has no option {key!r}; {meant} It has {', '.join(known)}.")


def without_effect(options: Any, names: Iterable[str], when: str, remedy: str) -> None:
    """Raise `ConfigError` for an option that was changed from its default but would have no effect.

    Args:
        options: a dataclass. names: the options without effect. when: the setting that removes their effect. remedy:
            the setting with which they would have one.
    """
    fields = {f.name: f for f in dataclasses.fields(options)}
    for name in names:
        value, f = getattr(options, name), fields[name]
        if value != (f.default if f.default_factory is dataclasses.MISSING else f.default_factory()):
            raise ConfigError(f"{name}: got {value!r}, which has no effect with {when}; {remedy}, or leave it out")


def one_of(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise `ConfigError` for a value that is not among the choices, with the nearest one."""
    if value not in choices:
        raise ConfigError(
            f"{name}: got {value!r}, expected one of {', '.join(choices)}; did you mean {nearest(value, choices)!r}?"
        )


def check_start(value: Any) -> int | str | None:
    """Check the task that another one starts from: a task's number, `previous`, `best`, or None for none.

    Raises:
        ConfigError: something else.
    """
    if isinstance(value, str):
        one_of("start_from", value, (PREVIOUS, BEST))
    elif value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise ConfigError(
            f"start_from: got {value!r}, expected the number of a sealed task, {PREVIOUS!r}, {BEST!r}, or None"
        )
    return value


def number(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    without: str = "",
    what: str = "a number",
) -> float:
    """The value of an option that is a finite number within [low, high].

    Args:
        without: which ends are excluded: `low`, `high` or `both`. what: the error's word for the value.

    Raises:
        ConfigError: it is not such a number.
    """
    wrong = isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value)
    above, below = without in ("low", "both"), without in ("high", "both")
    if wrong or not (low < value if above else low <= value) or not (value < high if below else value <= high):
        if low == -math.inf:
            expected = what.replace("a ", "a finite ", 1)
        elif high == math.inf:
            expected = f"{what} {'above' if above else 'of at least'} {low:g}"
        elif above == below:
            expected = f"{what} between {low:g} and {high:g}{', without these' if above else ''}"
        else:
            ends = ("above", "at most") if above else ("of at least", "below")
            expected = f"{what} {ends[0]} {low:g} and {ends[1]} {high:g}"
        raise ConfigError(f"{name}: got {value!r}, expected {expected}")
    return float(value)


def whole(name: str, value: V, low: int = 1, *, optional: bool = False) -> V:
    """The value of an option that is an integer of at least `low`, or None if it is optional.

    Raises:
        ConfigError: it is not such an integer.
    """
    fits = isinstance(value, int) and not isinstance(value, bool) and value >= low
    if not fits and not (optional and value is None):
        raise ConfigError(
            f"{name}: got {value!r}, expected an integer of at least {low}{', or None' if optional else ''}"
        )
    return value


def flag(name: str, value: Any) -> None:
    """Raise `ConfigError` for a value that is neither True nor False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name}: got {value!r}, expected True or False")


def help_of(cls: type) -> dict[str, str]:
    """The description of each field of a dataclass: `metadata["help"]`, else from its docstring or a base class's.

    In the docstring a field's text follows `name:` or `name, other:`, at the start of a line or after the end of a
    sentence, and ends at the next field or empty line.
    """
    fields = dataclasses.fields(cls)
    names = "|".join(f.name for f in fields)
    said: dict[str, str] = {}
    for paragraph in (p for kind in cls.__mro__ for p in re.split(r"\n\s*\n", kind.__doc__ or "")):
        heads = list(re.finditer(rf"(?:(?<=[.;:)]\s)|^\s*)((?:{names})(?:, (?:{names}))*): ", paragraph, flags=re.M))
        for head, after in zip(heads, [*heads, None][1:], strict=True):
            text = " ".join(paragraph[head.end() : after.start() if after else None].split()).replace("`", "")
            for name in head[1].split(", "):
                said.setdefault(name, text[:1].upper() + text[1:])
    return {f.name: f.metadata.get("help", said.get(f.name, "")) for f in fields}
