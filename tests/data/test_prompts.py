"""Names of classes and templates."""

from __future__ import annotations

import pytest

from hatcl.data.prompts import CLASS_NAMES, PLAIN, TEMPLATES, read_class_names, read_templates
from hatcl.errors import ConfigError, IntegrityError

COUNTS = {"cars": 8, "cifar10": 18, "cifar100": 18, "dtd": 8, "eurosat": 3, "gtsrb": 3, "mnist": 1, "resisc45": 18,
          "sun397": 2, "svhn": 1}  # fmt: skip


def test_there_are_as_many_as_published():
    assert {name: len(t) for name, t in TEMPLATES.items()} == COUNTS
    assert {n: len(c) for n, c in CLASS_NAMES.items()} == {
        "cifar10": 10,
        "eurosat": 10,
        "gtsrb": 43,
        "mnist": 10,
        "svhn": 10,
    }


@pytest.mark.parametrize("name", [*TEMPLATES, None])
def test_every_template_has_one_place_and_all_differ(name):
    texts = PLAIN if name is None else TEMPLATES[name]
    assert all(t.count("{}") == 1 and t == t.strip() and "  " not in t.replace("{}", "x") for t in texts)
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_every_name_is_there_once(name):
    assert len(set(CLASS_NAMES[name])) == len(CLASS_NAMES[name]) and read_class_names(name) == CLASS_NAMES[name]


def test_some_by_their_words():
    """Spot checks of what is put together from parts."""
    assert "a low contrast photo of the {}." in TEMPLATES["cifar10"] and "a photo of a big {}." in TEMPLATES["cifar100"]
    assert "aerial view of the {}." in TEMPLATES["resisc45"] and "a photo of the {} object." in TEMPLATES["dtd"]
    assert TEMPLATES["gtsrb"][0] == 'a zoomed in photo of a "{}" traffic sign.'
    assert CLASS_NAMES["gtsrb"][5] == "red and white circle 80 kph speed limit"
    assert CLASS_NAMES["gtsrb"][8] == "red and white circle 120 kph speed limit"
    assert CLASS_NAMES["gtsrb"][25].startswith("red and white triangle with person digging")
    assert CLASS_NAMES["gtsrb"][33] == "blue circle with white right turn arrow mandatory"
    assert read_templates("svhn") == ('a photo of the number: "{}".',)


def test_from_the_users_files(tmp_path):
    names, templates = tmp_path / "names.txt", tmp_path / "templates.txt"
    names.write_text("a cat\n dog \n")
    templates.write_text("a {} here\n")
    assert read_class_names(str(names)) == ("a cat", "dog")
    assert read_templates(str(templates)) == ("a {} here",)
    for text, read, says in (
        ("a\nb\na\n", read_class_names, "names.txt: the name 'a' twice; expected one name per line"),
        ("a\n\nb\n", read_class_names, "names.txt: an empty line; expected one name per line"),
        ("\n", read_class_names, "names.txt is empty; expected one entry per line"),
        ("a photo", read_templates, r"got the template 'a photo', expected {} once"),
    ):
        names.write_text(text)
        with pytest.raises(ConfigError, match=says):
            read(str(names))
    with pytest.raises(IntegrityError, match="none.txt cannot be read as a text file.* or one of cars, cifar10"):
        read_templates(str(tmp_path / "none.txt"))
