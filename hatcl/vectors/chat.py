"""Chat templates: those in folders of transformers, and the one that a recipe of mergekit requests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from ..errors import ConfigError
from ..files import read_json
from .recipe import MergekitRecipe

TEMPLATE_FILE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"
SHORTEST = 20  # the least number of characters of a template (mergekit's limit)


def chat_template_of(folder: Path) -> str | None:
    """A tokenizer's template; of several its `default`. Raises `IntegrityError` for a damaged config."""
    if (folder / TEMPLATE_FILE).is_file():
        return (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
    found = read_json(folder / TOKENIZER_CONFIG).get("chat_template") if (folder / TOKENIZER_CONFIG).is_file() else None
    if isinstance(found, list):  # as transformers stored several
        found = next((t.get("template") for t in found if isinstance(t, dict) and t.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def joint_template(recipe: MergekitRecipe, folders: Mapping[str, Path]) -> str | None:
    """The template that a recipe requests: its own text, or with `auto` the most frequent one of its models (the first
    among equals). None if it requests none, or no model has one.

    Args:
        folders: model -> its folder.

    Raises:
        ConfigError: the text is not a template, such as one of mergekit's names, or the result has no tokenizer.
    """
    asked = recipe.chat_template
    if not asked:
        return None
    joint = recipe.tokenizer_source is not None  # its existence was checked
    if not joint and not any((folders[recipe.donor] / name).is_file() for name in (TOKENIZER_CONFIG, "tokenizer.json")):
        raise ConfigError(f"chat_template: {recipe.donor}, whose tokenizer the result gets, has none; leave it out")
    if asked == "auto":
        held = [t.strip() for folder in folders.values() if (t := chat_template_of(folder))]
        return Counter(held).most_common(1)[0][0] if held else None
    if len(asked) < SHORTEST or "{" not in asked:
        raise ConfigError(
            f"chat_template: got {asked!r}, expected auto or the text of a Jinja template; instead of one of "
            "mergekit's names, write the template's text here"
        )
    return asked
