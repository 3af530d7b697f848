"""O-LoRA in the loop."""

from __future__ import annotations

import pytest
import torch

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from continual_parts import (  # noqa: E402
    QUICK,
    adapted,
    bert,
    same,
    text_tasks,
)

from hatcl.continual import learn_sequence  # noqa: E402
from hatcl.errors import SkillError  # noqa: E402
from hatcl.skills.tensors import skill_tensors  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def test_olora_keeps_earlier_adapters_and_holds_the_new_one_apart():
    tasks = text_tasks(bert(), 2)
    across = {}
    for weight in (0.0, 0.5):
        model = adapted()
        seen = []

        def tell(at, model=model, seen=seen):
            if at.stage == 1 and at.doing == "learning" and at.step in (1, at.steps):
                seen.append({n: t.detach().clone() for n, t in skill_tensors(model, "olora_0").items()})

        learn_sequence(
            model, tasks, "olora", {**QUICK, "epochs": 6}, method_options={"orthogonality": weight}, on_progress=tell
        )
        assert same(seen[0], seen[1])  # frozen
        ours, theirs = skill_tensors(model, "default"), skill_tensors(model, "olora_0")
        across[weight] = sum(float((theirs[n] @ ours[n].t()).detach().abs().sum()) for n in ours if "lora_A" in n)
    assert across[0.5] < 0.5 * across[0.0]


PATTERNS = {"rank_pattern": {"query": 2}, "alpha_pattern": {"value": 3}}


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True, **PATTERNS}, PATTERNS], ids=["plain", "rslora", "patterns"]
)
def test_the_adapter_of_a_task_is_the_model_that_was_scored(options, tmp_path):
    tasks, model = text_tasks(bert(), 3), adapted(lora_alpha=6, **options)
    learned = {**QUICK, "epochs": 3, "evaluate": "all"}
    result = learn_sequence(model, tasks, "olora", learned, folder=tmp_path / "run")
    inputs = tasks[0].collate(list(tasks[0].train[:6]))[0]
    for k, folder in enumerate(sorted((tmp_path / "run" / "tasks").iterdir())):
        alone = peft.PeftModel.from_pretrained(bert(), str(folder / "adapter")).eval()
        assert [t.score(alone) for t in tasks] == result.rows[k]
        assert {p.name for p in (folder / "adapter").iterdir() if p.is_dir()} == (
            {f"olora_{i}" for i in range(k + 1)} if k else set()
        )
    with torch.no_grad():
        found, expected = (m(**inputs).last_hidden_state for m in (alone, model.eval()))
    # one product of three times the rank sums in another order than three: measured 4.8e-7 of states of size 3
    assert torch.allclose(found, expected, atol=2e-6, rtol=0)
    first = peft.PeftModel.from_pretrained(bert(), str(folder / "adapter" / "olora_2")).eval()
    with torch.no_grad():  # the last task's alone is another model
        assert not torch.allclose(first(**inputs).last_hidden_state, expected, atol=1e-2)


@pytest.mark.parametrize(
    "option",
    [
        {"use_dora": True},
        {"bias": "lora_only"},
        {"target_modules": ["query"], "modules_to_save": ["value"]},
        {"trainable_token_indices": {"word_embeddings": [1]}},
    ],
    ids=lambda option: list(option)[-1],
)
def test_olora_refuses_what_is_trained_beside_the_pairs_before_it_learns(option):
    model = adapted(**option)
    with pytest.raises(SkillError, match="olora: .* is trained in addition to A and B .* without modules_to_save"):
        learn_sequence(model, text_tasks(bert(), 2), "olora", QUICK)
    assert list(model.peft_config) == ["default"]
