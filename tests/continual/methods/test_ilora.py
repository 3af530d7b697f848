"""I-LoRA in the loop: the terms of the loss, the stable adapter, what is scored."""

from __future__ import annotations

import dataclasses

import pytest
import torch

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from continual_parts import QUICK, adapted, bert, text_tasks  # noqa: E402

from hatcl.continual import Batch, learn_sequence, make_method  # noqa: E402
from hatcl.errors import SkillError  # noqa: E402
from hatcl.skills.tensors import skill_tensors  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def started(**options):
    base = bert()
    tasks, model = text_tasks(base, 2), adapted(base).eval()  # dropout would draw anew for each term
    method = make_method("ilora", {"samples": 6, **options})
    method.start(model, tasks, 0)
    for p in skill_tensors(model, "default").values():
        p.data.normal_(std=0.3)  # apart from the stable one
    return method, model, tasks


def test_the_loss_is_the_batch_the_memory_and_the_consistency():
    method, model, tasks = started(consistency_weight=2.0, replay=0.5, hidden_state_layers=[0, -1])
    batch = Batch(1, tasks[1], (0, 1, 2))
    alone = float(batch.loss(model))
    assert float(method.loss(model, batch)) == pytest.approx(alone)  # nothing to remember yet
    method.end(model, 0)
    method.begin(model, 1)
    drawn = method.two.memory.state_dict()
    total = float(method.loss(model, batch))
    method.two.memory.load_state_dict(drawn)
    memory = Batch(0, tasks[0], tuple(p for _, p in method.two.memory.sample(6)))
    method.two.memory.load_state_dict(drawn)
    apart = float(method.two.consistency([memory]))
    # the loss draws for the consistency, and the same examples for the replay
    assert apart > 1e-3
    expected = alone + 2.0 * apart + 0.5 * float(memory.loss(model))
    assert total == pytest.approx(expected, rel=1e-5)  # float32


def test_the_consistency_of_the_current_batch():
    method, model, tasks = started(on="batch", replay=0.0)
    batch = Batch(0, tasks[0], (0, 1, 2))
    expected = float(batch.loss(model)) + float(method.two.consistency([batch]))
    assert float(method.loss(model, batch)) == pytest.approx(expected)


@pytest.mark.parametrize("scored", ["stable", "plastic"])
def test_what_is_scored(scored):
    base = bert()
    tasks, model = text_tasks(base, 2), adapted(base)
    options = {"ema_alpha": 1.0, "scored": scored}
    result = learn_sequence(model, tasks, "ilora", QUICK | {"epochs": 6}, method_options=options)
    # with alpha = 1 the stable adapter stays where LoRA starts
    assert (result.rows[-1] == result.baseline) is (scored == "stable")
    assert all(float(p.detach().abs().max()) == 0 for n, p in skill_tensors(model, "stable").items() if "lora_B" in n)


def test_the_stable_adapter_follows_each_step():
    base = bert()
    tasks, model = text_tasks(base, 1), adapted(base)
    seen = []

    def tell(at):
        if at.doing == "learning":
            seen.append([p.detach().clone() for a in ("default", "stable") for p in skill_tensors(model, a).values()])

    learn_sequence(model, tasks, "ilora", QUICK, method_options={"ema_alpha": 0.75}, on_progress=tell)
    half = len(seen[0]) // 2
    assert len(seen) == 4
    for before, after in zip(seen, seen[1:], strict=False):
        for k in range(half):
            expected = 0.75 * before[half + k] + 0.25 * after[k]
            assert torch.allclose(after[half + k], expected, atol=1e-6)  # weights of size 1 in float32


def test_its_terms_are_told_of_each_step():
    base = bert()
    tasks, model = text_tasks(base, 2), adapted(base)
    told = []
    options = {"ema_alpha": 0.75, "consistency_weight": 2.0}
    learn_sequence(model, tasks, "ilora", QUICK, method_options=options, on_progress=told.append)
    steps = {t: [at.measured for at in told if at.doing == "learning" and at.stage == t] for t in (0, 1)}
    assert not any({"consistency", "replay"} & set(known) for known in steps[0])  # the memory is empty
    assert all(known["consistency"] > 0 and known["replay"] > 0 for known in steps[1]) and len(steps[1]) == 4
    assert all({"lr", "gradient_norm"} <= set(known) for every in steps.values() for known in every)


def test_hidden_states_that_nobody_knows_how_to_get():
    method, model, tasks = started(on="batch", replay=0.0)
    task = dataclasses.replace(tasks[0], hidden=None)
    with pytest.raises(SkillError, match="task task 0: its batches are tuple, .*give ContinualTask"):
        method.loss(model, Batch(0, task, (0, 1)))
