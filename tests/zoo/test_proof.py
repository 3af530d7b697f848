"""`prove` and `reload`: the figures they give, and that each promise taken away is named."""

from __future__ import annotations

import copy
import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import hatcl
from hatcl.errors import ConversionError
from hatcl.hat import digests, guard
from hatcl.hat.convert import map_of
from hatcl.hat.extraction import extract
from hatcl.hat.layers import HATLinear
from hatcl.vectors.files import read_metadata
from hatcl.zoo import catalog, proof

TWO = torch.randn(2, 48, generator=torch.Generator().manual_seed(0))


class Mixed(nn.Module):
    """Of every kind of element: both ends known, a mean over units, a temperature, a parameter that nothing reads."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(48, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.temperature, self.idle = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(7))

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = torch.relu(self.second(x + x.mean(-1, keepdim=True)))
        return self.head(x) * self.temperature.prod()


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(48, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
    )


def prove(folder, source=None):
    return proof.prove(source or mlp(), TWO, folder)


def fails(folder, text, source=None):
    with pytest.raises(proof.ProofFailed, match=text):
        prove(folder, source)


@pytest.fixture(scope="module")
def proved(tmp_path_factory):
    """A model of timm, proved: the figures and the folder."""
    folder, model = tmp_path_factory.mktemp("proved"), catalog.known("test_resnet")
    return proof.prove(*model.make(), folder, model.recipe), folder


def test_a_model_of_timm_passes_and_loads_by_its_name(proved):
    found, folder = proved
    source, _ = catalog.known("test_resnet").make()
    assert found.parameters == sum(p.numel() for p in source.parameters())
    assert found.units > 100 and found.known == 1 and found.unknown == {} and found.notes == []
    assert sum(found.shares.values()) == pytest.approx(1)
    assert len(found.use) == 2 and all(0.3 < use < 0.7 for use in found.use)
    assert 0.2 < found.extracted < 0.45 and found.difference < 1e-5 and found.full == 0
    assert 0 < found.forward_seconds < found.trace_seconds < found.seconds
    proof.reload(folder, lambda: 1 / 0)


def test_a_task_that_is_cut_out_wrongly_or_with_hatcl_in_it_fails(tmp_path, monkeypatch):
    right = proof.extract_task

    def dressed(model, task, inputs):
        found = right(model, task, inputs)
        found.model.extra = HATLinear(2, 2)
        return found

    monkeypatch.setattr(proof, "extract_task", dressed)
    with pytest.raises(proof.ProofFailed, match="task 0 has something of hatcl in it: .'extra'."):
        prove(tmp_path)
    values = extract.weights_of_task
    monkeypatch.setattr(proof, "extract_task", right)
    monkeypatch.setattr(extract, "weights_of_task", lambda *a: {k: 1.1 * v for k, v in values(*a).items()})
    with pytest.raises(ConversionError, match="does not agree with the model"):
        prove(tmp_path)


def test_what_is_not_known_is_counted_by_its_reason(tmp_path):
    torch.manual_seed(0)
    found = prove(tmp_path, Mixed())
    total = sum(p.numel() for p in Mixed().parameters())
    assert found.parameters == total
    # nobody knows what the temperature belongs to
    assert found.unknown["no unit owns it"] == pytest.approx(2 / total)
    assert found.unknown["not used by the forward pass"] == pytest.approx(7 / total)
    assert found.known + sum(found.unknown.values()) == pytest.approx(1)
    assert any("mean over differing units" in note for note in found.notes)
    proof.reload(tmp_path, Mixed)


def test_models_in_training_mode_and_in_evaluation_mode_pass(tmp_path):
    for training in (True, False):
        prove(tmp_path, mlp().train(training))


def test_a_deeper_dimension_and_a_single_one_can_be_classes(tmp_path):
    class Scores(nn.Linear):
        def forward(self, x):
            return super().forward(x).sum(-1)

    prove(tmp_path, nn.Sequential(nn.Linear(48, 16), nn.ReLU(), Scores(16, 4)))
    prove(tmp_path, nn.Sequential(nn.Linear(48, 48), nn.Unflatten(1, (12, 4)), nn.ReLU(), nn.Linear(4, 4)))


# ---- a promise taken away -------------------------------------------------------------------------


def converting(patch, change):
    """`convert` as it is, and then `change(source, model)`."""

    def convert(source, *args, **kwargs):
        model = hatcl.convert(source, *args, **kwargs)
        with torch.no_grad():
            change(source, model)
        return model

    patch.setattr(proof, "convert", convert)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda source, model: source[0].weight.add_(1), "convert changes the source"),
        (lambda source, model: source[1].running_mean.add_(1), "convert changes the source"),
        (lambda source, model: source.eval(), "convert changes the mode of the model"),
        (lambda source, model: model.eval(), "convert changes the mode of the model"),
        (
            lambda source, model: model[3]._parameters["weight"].mul_(1.001),
            r"without a task it is not the source, in training mode: largest differences \d",
        ),
        (
            lambda source, model: model[1]._buffers["running_mean"].add_(0.1),
            r"without a task it is not the source, in evaluation mode: largest differences \d",
        ),
        (
            lambda source, model: model.register_forward_hook(lambda m, args, out: (out, out)),
            "in training mode: 2 tensors instead of 1",
        ),
    ],
    ids=["weights", "statistics", "mode", "own mode", "outputs", "outputs in evaluation", "two outputs"],
)
def test_a_conversion_that_changes_anything_fails(tmp_path, monkeypatch, change, text):
    converting(monkeypatch, change)
    fails(tmp_path, text)


def test_a_map_that_depends_on_the_mode_fails(tmp_path, monkeypatch):
    def by_mode(model, inputs):
        found = map_of(model, inputs)
        if not model.training:
            found.entries.pop("0.weight")
        return found

    monkeypatch.setattr(proof, "map_of", by_mode)
    fails(tmp_path, "the map depends on the mode of the model")


def test_units_that_depend_on_the_mode_fail(tmp_path, monkeypatch):
    def by_mode(model, inputs):
        found = map_of(model, inputs)
        if not model.training:
            found.entries["3.weight"] = dataclasses.replace(found.entries["3.weight"], factors=(), copied=True)
        return found

    monkeypatch.setattr(proof, "map_of", by_mode)
    fails(tmp_path, "the map depends on the mode of the model")


def test_a_forward_that_gives_no_tensor_fails(tmp_path):
    class Silent(nn.Linear):
        def forward(self, x):
            super().forward(x)
            return "done"

    with pytest.raises(hatcl.HATError, match="its forward returns a str, which holds no tensor"):
        prove(tmp_path, Silent(48, 4))


def test_frozen_elements_that_move_fail(tmp_path, monkeypatch):
    plain = guard.Guard.__enter__

    def enter(self):
        self.kept, self._modules = [], []
        return plain(self)

    monkeypatch.setattr(guard.Guard, "__enter__", enter)
    with pytest.raises(hatcl.IntegrityError, match="task 0 was sealed, but .* changed since"):  # `learn` sees it first
        prove(tmp_path)
    monkeypatch.setattr(digests, "check_sealed", lambda *args: None)
    fails(tmp_path, "task 0 changed while task 1 was learned")


def holed(patch):
    """Converts with a map in which the first layer's gate is missing, and without the attack that would find it."""

    def convert(source, num_tasks, inputs, config):
        holes = map_of(copy.deepcopy(source), inputs)
        holes.folds = {key: axes for key, axes in holes.folds.items() if not key[1].startswith(("0.", "1."))}
        model = hatcl.convert(source, num_tasks, inputs, config=config, unit_map=holes, verify=False)
        model.hat_gates.cut = False  # a sealed task would be cut off from what the map misses
        return model

    patch.setattr(proof, "convert", convert)


def still(patch):
    """Nothing is learned."""
    patch.setattr(torch.optim, "AdamW", lambda params, **options: torch.optim.SGD(params, 0.0))


def test_a_gate_that_is_missing_fails(tmp_path, monkeypatch):
    holed(monkeypatch)
    fails(tmp_path, "task 0 changed while task 1 was learned")


def test_a_certificate_that_is_not_exact_fails(tmp_path, monkeypatch):
    holed(monkeypatch)
    still(monkeypatch)  # so that only the attack can see it
    fails(tmp_path, "the certificate is NOT exact: of tasks 0, 1, these moved: {0: .*, 1: ")


def test_tasks_that_do_not_differ_fail(tmp_path, monkeypatch):
    still(monkeypatch)

    def same(source, model):
        model.hat_gates.embeddings[1].copy_(model.hat_gates.embeddings[0])
        first, second = model[-1].hat_tasks
        second.load_state_dict(first.state_dict())

    converting(monkeypatch, same)
    fails(tmp_path, "both tasks give the same outputs: nothing was learned")


def test_a_deep_copy_that_differs_fails(tmp_path, monkeypatch):
    def deepcopy(model):
        made = copy.deepcopy(model)
        with torch.no_grad():
            made[5].hat_tasks[1].weight.mul_(1.001)
        return made

    monkeypatch.setattr(proof, "copy", SimpleNamespace(deepcopy=deepcopy))
    fails(tmp_path, "a deep copy gives other outputs for task 1")


def test_what_conversion_raises_comes_through(tmp_path):
    with pytest.raises(hatcl.ConversionError, match="its forward failed on example_inputs"):
        proof.map_of(mlp(), torch.randn(2, 47))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        proof.prove(mlp(), torch.randn(2, 47), tmp_path)


# ---- with and without masks for padding -----------------------------------------------------------


class Masked(nn.Module):
    """Reads a mask, or another weight where there is none."""

    def __init__(self):
        super().__init__()
        self.first, self.bare, self.head = nn.Linear(48, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x, attention_mask=None):
        x = torch.relu(self.first(x))
        x = torch.relu(self.bare(x)) if attention_mask is None else x * attention_mask
        return self.head(x)


MASKED = {"x": TWO, "attention_mask": torch.tensor([[1], [0]])}


def test_inputs_with_masks_are_proved_without_them_too(tmp_path):
    torch.manual_seed(0)
    proof.prove(Masked(), MASKED, tmp_path)
    expected = torch.load(tmp_path / proof.EXPECTED, weights_only=True)
    assert [sorted(form) for form in expected["forms"]] == [["attention_mask", "x"], ["x"]]
    assert [len(sealed) for sealed in expected["sealed"]] == [2, 2]
    proof.reload(tmp_path, Masked)
    expected["sealed"][1][1][0, 0] += 0.5
    torch.save(expected, tmp_path / proof.EXPECTED)
    with pytest.raises(proof.ProofFailed, match="loaded in another process, task 1 gives other outputs"):
        proof.reload(tmp_path, Masked)


@pytest.mark.parametrize("inputs", [TWO, (TWO,), {"x": TWO}, {"attention_mask": TWO}], ids=str)
def test_what_has_no_masks_is_proved_as_it_is(inputs):
    assert proof._without_masks(inputs) == []


@pytest.mark.parametrize("certified", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_what_holds_for_one_form_alone_fails(tmp_path, monkeypatch, masked, certified):
    """Beside the gates something reads a shared weight, with a mask or without one."""

    def change(source, model):
        start = model.first._parameters["weight"].sum().item()

        def add(module, args, kwargs, out):
            if masked == ("attention_mask" in kwargs):
                return out + (module.first._parameters["weight"].sum() - start)

        model.register_forward_hook(add, with_kwargs=True)

    torch.manual_seed(0)
    converting(monkeypatch, change)
    if certified:
        still(monkeypatch)  # so that only the attack can see it
        monkeypatch.setattr(proof, "_hold", lambda so, what: only_certificate(so, what))
    text = "the certificate is NOT exact" if certified else "task 0 changed while task 1 was learned"
    with pytest.raises(proof.ProofFailed, match=text):
        proof.prove(Masked(), MASKED, tmp_path)


def only_certificate(so, what):
    if "certificate" in what and not so:
        raise proof.ProofFailed(what)


# ---- reload ---------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    prove(tmp_path)
    return tmp_path


def test_a_class_of_ones_own_is_loaded_onto_a_fresh_module(saved):
    proof.reload(saved, mlp)
    with pytest.raises(ZeroDivisionError):
        proof.reload(saved, lambda: 1 / 0)


@pytest.mark.parametrize("task", [0, 1])
def test_outputs_that_are_not_those_of_the_proof_fail(saved, task):
    expected = torch.load(saved / proof.EXPECTED, weights_only=True)
    expected["sealed"][task][0][0, 0] += 0.5
    torch.save(expected, saved / proof.EXPECTED)
    text = f"loaded in another process, task {task} gives other outputs: largest differences 0.5"
    with pytest.raises(proof.ProofFailed, match=text):
        proof.reload(saved, mlp)


def test_weights_that_were_tampered_with_fail(saved, monkeypatch):
    weights = saved / "model.safetensors"
    tensors = load_file(weights)
    tensors["3.weight"] += 1
    save_file(tensors, weights, read_metadata(weights))
    with pytest.raises(hatcl.IntegrityError, match="task 0 was sealed, but 1 of what it uses changed since: 3.weight"):
        proof.reload(saved, mlp)
    monkeypatch.setattr(digests, "check_sealed", lambda *args: None)
    with pytest.raises(proof.ProofFailed, match="loaded in another process, task 0 gives other outputs"):
        proof.reload(saved, mlp)


# ---- comparing ------------------------------------------------------------------------------------


def test_equal_is_bit_for_bit_and_nan_for_nan():
    a = torch.tensor([0.0, 1.0, math.nan, math.inf])
    assert proof._all_equal([a], [a.clone()])
    for other in (a + torch.tensor([0, 1e-7, 0, 0]), a[:3], a.nan_to_num(2.0)):
        assert not proof._all_equal([a], [other])
    assert not proof._all_equal([a], [a, a])
    assert not proof._all_equal([a], [])


@pytest.mark.parametrize("value, other", [(0.0, math.nan), (torch.finfo().max, math.inf)])
def test_what_is_not_finite_equals_no_number(value, other):
    assert not proof._all_equal([torch.tensor([value])], [torch.tensor([other])])
