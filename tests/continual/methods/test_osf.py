"""OSF in the loop: peft's layers for a task, the model's own weights between tasks."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

import timm  # noqa: E402
from continual_parts import QUICK, adapted, bert, plain, same, state, text_tasks, vector_task  # noqa: E402
from torch import nn  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from hatcl.commands import main  # noqa: E402
from hatcl.continual import learn_sequence  # noqa: E402
from hatcl.continual.methods import osf  # noqa: E402
from hatcl.data.images import digits_tasks  # noqa: E402
from hatcl.errors import ConfigError, SkillError  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
SHARE = 0.5


def learned(monkeypatch=None):
    """A model before and after one task."""
    if monkeypatch is not None:
        monkeypatch.setattr(osf, "keep_orthogonal", lambda model: None)
    model, tasks = bert(), text_tasks(bert(), 1)
    before = state(model)
    learn_sequence(model, tasks, "osf", {**QUICK, "epochs": 4}, method_options={"preserved": SHARE})
    return before, state(model)


def moved(before, after):
    """How far the high part of each split weight has moved, and the weight itself, as shares of its size."""
    out = []
    for name, now in after.items():
        if now.dim() == 2 and "encoder" in name:
            u, _, v = torch.linalg.svd(before[name], full_matrices=False)
            k = round(SHARE * min(now.shape))
            change = (now - before[name]) / before[name].norm()
            out.append((float((u[:, :k].t() @ change).norm() + (change @ v[:k].t()).norm()), float(change.norm())))
    return out


def test_what_matters_most_stays():
    """`U_high^T W` and `W V_high^T` are what they were, up to the rounding of float32: 3e-7 of a weight's norm was
    measured, where the weight has moved by a tenth of it and more."""
    found = moved(*learned())
    assert len(found) == 6
    assert all(high < 3e-6 < 0.05 < whole for high, whole in found)


def test_twin_projected_gradients_alone_do_not_hold_it_under_adam(monkeypatch):
    assert all(high > 1e-3 for high, _ in moved(*learned(monkeypatch)))


def test_the_model_is_an_ordinary_one_again_and_only_linear_weights_have_moved():
    before, after = learned()
    assert before.keys() == after.keys()
    changed = {n for n in after if not torch.equal(before[n], after[n])}
    assert changed and all(n.endswith("weight") and after[n].dim() == 2 and "embeddings" not in n for n in changed)


def test_the_share_grows_from_the_first_task_to_the_last():
    model, ranks = bert(), []
    method = osf.OSF({"preserved": 0.25, "preserved_last": 0.75})
    begin = method.begin

    def watched(model, stage):
        begin(model, stage)
        ranks.append(
            {m.osf_svd_params["osf"]["S_low"].numel() for m in model.modules() if hasattr(m, "osf_svd_params")}
        )

    method.begin = watched
    learn_sequence(model, text_tasks(bert()), method, {**QUICK, "epochs": 1})
    assert ranks == [{12}, {8}, {4}]


def test_an_image_models_head_is_learned_in_full_and_the_rest_is_frozen():
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=4, img_size=32, patch_size=16)
    tasks = [vector_task("a", 0)]
    before = state(model)
    x = torch.randn(24, 3, 32, 32)

    def loss(model, batch):
        return nn.functional.cross_entropy(model(x[: len(batch[1])]), batch[1])

    task = dataclasses.replace(tasks[0], loss=loss, score=lambda m: 0.0)
    learn_sequence(model, [task], "osf", {**QUICK, "epochs": 1})
    changed = {n for n, t in state(model).items() if not torch.equal(t, before[n])}
    assert {"head.weight", "head.bias", "blocks.0.attn.qkv.weight"} <= changed
    assert not any("norm" in n or "embed" in n for n in changed)


def test_a_layer_that_shares_the_embeddings_is_left_alone():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=20, tie_word_embeddings=True, **sizes))
    method = osf.OSF()
    method.start(model, [], 0)
    assert len(method.names) == 7 and "lm_head" not in method.names and not model.lm_head.weight.requires_grad


@pytest.mark.parametrize(
    "model, text",
    [
        (adapted, "osf learns the model's own weights, but the model has a LoRA adapter"),
        (
            lambda: peft.get_peft_model(bert(), peft.OSFConfig(target_modules=["query"])),
            "osf learns the model's own weights, but the model has peft's own OSF layers",
        ),
        (lambda: nn.Conv1d(1, 2, 3), "osf: Conv1d has no nn.Linear other than its head"),
    ],
)
def test_what_is_refused(model, text):
    model = model()
    before = state(model)
    with pytest.raises(SkillError, match=text):
        learn_sequence(model, text_tasks(bert(), 1), "osf", QUICK)
    assert same(before, state(model))
    with pytest.raises(ConfigError, match="preserved: got 1, expected a share between 0 and 1, without these"):
        osf.OSF({"preserved": 1})


class ReadsWeights(nn.Module):
    """Multiplies with the weight of a layer itself, as BEiT does; `spare` is not used at all."""

    def __init__(self):
        super().__init__()
        self.first, self.qkv, self.spare = nn.Linear(6, 6), nn.Linear(6, 3), nn.Linear(6, 6)

    def forward(self, x):
        return nn.functional.linear(self.first(x), self.qkv.weight)


def test_a_model_that_reads_a_layers_weight_itself_is_refused(monkeypatch):
    model = ReadsWeights()
    before, required = state(model), [p.requires_grad for p in model.parameters()]
    text = "osf: ReadsWeights reads the weights of qkv .1 such layers. without calling the layer, .* use another method"
    with pytest.raises(SkillError, match=text):
        learn_sequence(model, [vector_task("a", 0)], "osf", QUICK)
    assert same(before, state(model)) and [p.requires_grad for p in model.parameters()] == required
    assert all(p.grad is None for p in model.parameters())
    monkeypatch.setattr(osf.OSF, "_check_calls", lambda *_: None)  # twin: it would have learned all but that
    learn_sequence(model, [vector_task("a", 0)], "osf", QUICK)
    far = {n: float((t - before[n]).abs().max()) for n, t in state(model).items() if "weight" in n}
    assert far["qkv.weight"] < 1e-6 < 1e-3 < far["first.weight"]  # but for the rounding of its parts


def interrupted():
    """A network whose second step raised, and what its modules were called before."""
    model, steps = plain(), []
    names = [name for name, _ in model.named_modules()]

    def tell(at):
        steps.append(at.doing)
        if steps.count("learning") == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn_sequence(model, [vector_task("a", 0)], "osf", QUICK, on_progress=tell)
    return model, names


def test_an_error_leaves_an_ordinary_model():
    model, names = interrupted()
    assert [name for name, _ in model.named_modules()] == names and not hasattr(model, "peft_config")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"0.weight", "3.weight"}
    assert any(not torch.equal(t, before) for t, before in zip(model.parameters(), plain().parameters(), strict=True))
    learn_sequence(model, [vector_task("a", 0)], "osf", QUICK)  # and it can be learned again


def test_twin_an_error_would_leave_the_split_layers(monkeypatch):
    monkeypatch.setattr(osf.OSF, "leave", lambda self, model: None)
    model, names = interrupted()
    assert [name for name, _ in model.named_modules()] != names
    with pytest.raises(SkillError, match="has peft's own OSF layers"):
        learn_sequence(model, [vector_task("a", 0)], "osf", QUICK)


@pytest.mark.parametrize("fresh", [True, False])
def test_a_network_of_ones_own(fresh):
    model = plain()
    before = state(model)
    learn_sequence(model, [vector_task("a", 0), vector_task("b", 1)], "osf", {**QUICK, "fresh_optimizer": fresh})
    assert type(model[0]) is nn.Linear and not hasattr(model, "peft_config")
    moved_ones = {n for n, t in state(model).items() if not torch.equal(t, before[n])}
    assert moved_ones == {"0.weight", "3.weight", "1.running_mean", "1.running_var", "1.num_batches_tracked"}


def test_the_command_learns_images(tmp_path):
    pytest.importorskip("sklearn")
    line = ["train", "--method", "osf", "--model", "test_vit", "--model-kwargs", "img_size=32", "--epochs", "1"]
    with pytest.raises(SystemExit) as ended:
        main([*line, "--output", str(tmp_path / "run")])
    assert ended.value.code in (0, None)
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert found["method"] == "osf" and len(found["matrix"]) == len(digits_tasks())
