"""The model card says what is in the folder, and its own example runs."""

from __future__ import annotations

import re

import parts
import pytest
import torch
import yaml

import hatcl
from hatcl.hat.saving import card
from hatcl.hat.saving.card import CARD, OURS, CardFacts

FACTS = {
    "names": {0: "digits | 0", 1: "<b>odd</b>"}, "classes": {1: ["even", "odd", "x", "y"]},
    "matrix": [[0.9, None], [0.9, 0.5]], "certificate": "Exact on 8 images.", "notes": ["## Data\n\nToy data."],
}  # fmt: skip


def saved(tmp_path, **facts):
    model = parts.pretend(
        hatcl.convert(parts.plain("mlp"), 3, parts.images("mlp"), num_classes=[2, 4, 3]), tasks=[0, 1]
    )
    folder = hatcl.save_pretrained(model, tmp_path / "m", card=facts or None)
    return model, folder, (folder / CARD).read_text()


def section(text, title):
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_front_matter_is_what_hubs_read(tmp_path):
    _, _, text = saved(tmp_path)
    _, front, rest = text.split("---\n", 2)
    assert yaml.safe_load(front) == {"library_name": "hatcl", "tags": ["hatcl", "continual-learning"]}
    assert rest.startswith(OURS)
    from huggingface_hub import ModelCard

    assert ModelCard(text).data.library_name == "hatcl"


def test_it_says_what_the_model_is(tmp_path):
    model, _, text = saved(tmp_path)
    use, units = hatcl.describe(model).use, hatcl.describe(model).units
    for t, width in ((0, 2), (1, 4)):
        assert f"| {t} | - | {width} | {use[t]} of {units} | {100 * use[t] / units:.1f} % |" in section(text, "Tasks")
    assert "\n| 2 |" not in section(text, "Tasks")
    assert '"num_tasks": 3' in section(text, "Options") and "penalty_weight" not in section(text, "Options")
    assert f"torch {torch.__version__.split('+')[0]}" in section(text, "Versions")
    assert "## Scores" not in text and "None was taken" in section(text, "Certificate")


def test_it_says_what_it_is_told(tmp_path):
    _, _, text = saved(tmp_path, **FACTS)
    tasks = section(text, "Tasks")
    assert "| digits \\| 0 | 2 |" in tasks and "| &lt;b>odd&lt;/b> | 4: even, odd, x, y |" in tasks
    assert "| digits \\| 0 | 90.0 | - |" in section(text, "Scores") and "| 90.0 | 50.0 |" in section(text, "Scores")
    assert section(text, "Certificate").strip().startswith("Exact on 8 images.")
    assert "## Data\n\nToy data." in text


def test_its_example_runs(tmp_path, monkeypatch):
    model, folder, text = saved(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    x = parts.images("mlp")
    monkeypatch.chdir(folder)
    names = {"x": x, "Sequential": lambda: parts.plain("mlp", seed=9)}
    exec(code, names)
    assert torch.equal(names["outputs"], parts.logits(model, 0, x))
    assert torch.allclose(names["small"].model(x), names["outputs"], atol=1e-5)  # measured 2e-7: sums of fewer terms


def test_a_card_of_ones_own_is_left(tmp_path):
    model, folder, _ = saved(tmp_path)
    (folder / CARD).write_text("mine")
    hatcl.save_pretrained(model, folder)
    assert (folder / CARD).read_text() == "mine"


def test_twin_hatcls_own_card_is_replaced(tmp_path):
    model, folder, text = saved(tmp_path)
    (folder / CARD).write_text(text + "edited")
    hatcl.save_pretrained(model, folder)
    assert (folder / CARD).read_text() == text


@pytest.mark.parametrize("facts, text", [
    ({"names": {3: "x"}}, "card: got task 3, the model has tasks 0 to 2"),
    ({"names": {"0": "x"}}, "card: got task '0', the model has tasks 0 to 2"),
    ({"matrix": [[1.0, 0.5]]}, r"matrix: got rows of \[2\] scores for 1 tasks"),
    ({"name": {}}, "CardFacts has no option 'name'; did you mean 'names'"),
])  # fmt: skip
def test_facts_that_cannot_be(tmp_path, facts, text):
    with pytest.raises(hatcl.ConfigError, match=text):
        saved(tmp_path, **facts)
    assert not (tmp_path / "m").exists()


def test_facts_are_taken_as_they_are():
    facts = CardFacts(**FACTS)
    assert CardFacts.of(facts) is facts and CardFacts.of(FACTS) == facts and CardFacts.of(None) == CardFacts()


def test_it_says_whose_knowledge_a_task_carries(tmp_path, monkeypatch):
    real = card.describe

    def described(model):
        found = real(model)
        object.__setattr__(found, "lineage", {0: [], 1: [0]})
        return found

    monkeypatch.setattr(card, "describe", described)
    _, _, text = saved(tmp_path)
    assert "Task 1 carries what was transplanted from task 0." in text and "Task 0 carries" not in text
