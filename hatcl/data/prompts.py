"""Words for images: the names of classes and the templates of prompts, by data set.

They are those of OpenAI's CLIP (Radford et al. 2021, arXiv 2103.00020, github openai/CLIP, data/prompts.md), as the
repositories of task vectors and aTLAS use them.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import ConfigError, IntegrityError

PLAIN = ("a photo of a {}.",)
DIGITS = tuple("0123456789")

_PHOTOS = (
    "a {}photo of {} {}.",
    ("", "blurry ", "black and white ", "low contrast ", "high contrast ", "bad ", "good "),
    ("small ", "big "),
)


def _cifar() -> tuple[str, ...]:
    """Seven kinds of photos and two sizes of their objects, each with `a` and with `the`."""
    text, kinds, sizes = _PHOTOS
    return tuple(
        one
        for article in ("a", "the")
        for one in (
            *(text.format(kind, article, "{}") for kind in kinds),
            *(text.format("", article, size + "{}") for size in sizes),
        )
    )


_VIEWS = ("satellite imagery", "aerial imagery", "satellite photo", "aerial photo", "satellite view", "aerial view")

TEMPLATES: dict[str, tuple[str, ...]] = {
    "cars": (
        "a photo of a {}.", "a photo of the {}.", "a photo of my {}.", "i love my {}!",
        *(f"a photo of my {how} {{}}." for how in ("dirty", "clean", "new", "old")),
    ),
    "cifar10": _cifar(),
    "cifar100": _cifar(),
    "dtd": tuple(
        f"a photo of {a} {{}} {of}." for a in ("a", "the") for of in ("texture", "pattern", "thing", "object")
    ),
    "eurosat": tuple(f"a centered satellite photo of {a}{{}}." for a in ("", "a ", "the ")),
    "gtsrb": tuple(f'a {how} photo of a "{{}}" traffic sign.' for how in ("zoomed in", "centered", "close up")),
    "mnist": ('a photo of the number: "{}".',),
    "resisc45": tuple(f"{view} of {a}{{}}." for a in ("", "a ", "the ") for view in _VIEWS),
    "sun397": ("a photo of a {}.", "a photo of the {}."),
    "svhn": ('a photo of the number: "{}".',),
}  # fmt: skip
"""Data set -> its templates, with `{}` where the class's name goes."""

_LIMIT = "red and white circle {} kph speed limit"
_WARNING = "red and white triangle {} warning"
_MANDATORY = "blue circle with white {} mandatory"

CLASS_NAMES: dict[str, tuple[str, ...]] = {
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    # by the names of the folders, in their order
    "eurosat": (
        "annual crop land", "forest", "brushland or shrubland", "highway or road",
        "industrial buildings or commercial buildings", "pasture land", "permanent crop land",
        "residential buildings or homes or apartments", "river", "lake or sea",
    ),
    "gtsrb": (
        *(_LIMIT.format(kph) for kph in (20, 30, 50, 60, 70, 80)),
        "end / de-restriction of 80 kph speed limit",
        *(_LIMIT.format(kph) for kph in (100, 120)),
        "red and white circle red car and black car no passing",
        "red and white circle red truck and black car no passing",
        _WARNING.format("road intersection"),
        "white and yellow diamond priority road",
        "red and white upside down triangle yield right-of-way",
        "stop",
        "empty red and white circle",
        "red and white circle no truck entry",
        "red circle with white horizonal stripe no entry",
        *(
            _WARNING.format(of)
            for of in (
                "with exclamation mark", "with black left curve approaching", "with black right curve approaching",
                "with black double curve approaching", "rough / bumpy road", "car skidding / slipping",
                "with merging / narrow lanes", "with person digging / construction / road work",
                "with traffic light approaching", "with person walking", "with child and person walking",
                "with bicyle", "with snowflake / ice", "with deer",
            )
        ),
        "white circle with gray strike bar no speed limit",
        *(
            _MANDATORY.format(arrow)
            for arrow in (
                "right turn arrow", "left turn arrow", "forward arrow", "forward or right turn arrow",
                "forward or left turn arrow", "keep right arrow", "keep left arrow",
            )
        ),
        "blue circle with white arrows indicating a traffic circle",
        "white circle with gray strike bar indicating no passing for cars has ended",
        "white circle with gray strike bar indicating no passing for trucks has ended",
    ),
    "mnist": DIGITS,
    "svhn": DIGITS,
}  # fmt: skip
"""Data set -> the names of its classes, in the order of their labels; data sets with their own names are not here."""


def read_class_names(what: str) -> tuple[str, ...]:
    """The names of a data set's classes, or those of a text file, one per line in the order of the labels.

    Raises:
        ConfigError: a name appears twice, or a line is empty. IntegrityError: the file cannot be read.
    """
    if what in CLASS_NAMES:
        return CLASS_NAMES[what]
    names = _lines(what)
    twice = next((n for i, n in enumerate(names) if n in names[:i]), None)
    if twice is not None or not all(names):
        raise ConfigError(
            f"{what}: {'an empty line' if twice is None else f'the name {twice!r} twice'}; expected one name per line, "
            "in the order of the labels"
        )
    return names


def read_templates(what: str) -> tuple[str, ...]:
    """The templates of a data set, or those of a text file, one per line with `{}` where the class's name goes.

    Raises:
        ConfigError: a template has no place for the name. IntegrityError: the file cannot be read.
    """
    if what in TEMPLATES:
        return TEMPLATES[what]
    templates = _lines(what)
    for text in templates:
        if text.count("{}") != 1:
            raise ConfigError(f"{what}: got the template {text!r}, expected {{}} once, where the class's name goes")
    return templates


def _lines(what: str) -> tuple[str, ...]:
    try:
        lines = tuple(line.strip() for line in Path(what).read_text(encoding="utf-8").strip().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(sorted({*TEMPLATES, *CLASS_NAMES}))
        raise IntegrityError(
            f"{what} cannot be read as a text file ({error}); expected one entry per line, or one of {known}"
        ) from error
    if not lines:
        raise ConfigError(f"{what} is empty; expected one entry per line")
    return lines
