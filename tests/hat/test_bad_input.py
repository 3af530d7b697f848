"""Bad input: an error that names the place, what came, what was expected and what to do; nothing learned changes."""

from __future__ import annotations

import copy
import pickle

import parts
import pytest
import torch
from torch import nn
from torch.nn import functional as tf

import hatcl
from hatcl.hat.digests import task_digests
from hatcl.hat.gates import gates_of
from hatcl.hat.held import held


def nothing_changes(model, run, error, *texts):
    """`run` raises, every text is in the message, and the model is as it was, tasks and all."""
    x = parts.images("mlp")
    before, done = parts.snapshot(model), hatcl.tasks(model)
    want = {t: parts.logits(model, t, x) for t in done}
    digests = {t: task_digests(model, t) for t in done}
    active = gates_of(model)[0].task
    with pytest.raises(error) as caught:
        run()
    for text in texts:
        assert text in str(caught.value), str(caught.value)
    assert isinstance(caught.value, hatcl.HATError)
    assert parts.same(before, parts.snapshot(model)) and hatcl.tasks(model) == done
    assert {t: task_digests(model, t) for t in done} == digests
    assert all(torch.equal(parts.logits(model, t, x), want[t]) for t in done)
    assert gates_of(model)[0].task == active and gates_of(model)[0].learning is None
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.fixture
def model():
    return parts.pretend(parts.converted("mlp"), tasks=[0], share=0.5)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def learn(model, task, optimizer=None, steps=2, **options):
    with hatcl.learn(model, task, optimizer or sgd(model), steps, **options):
        pass


# ---- tasks ----------------------------------------------------------------------------------------

VERBS = {
    "set_task": hatcl.set_task,
    "task": lambda model, t: hatcl.task(model, t).__enter__(),
    "learn": learn,
    "forget_task": hatcl.forget_task,
    "task_parameters": hatcl.task_parameters,
}


@pytest.mark.parametrize("index", [3, -1, 99])
@pytest.mark.parametrize("verb", VERBS)
def test_a_task_that_does_not_exist(model, verb, index):
    nothing_changes(
        model, lambda: VERBS[verb](model, index), hatcl.TaskError,
        f"task: got {index}, the model has tasks 0 to 2", "hatcl.add_tasks(model, n) makes room for more",
    )  # fmt: skip


@pytest.mark.parametrize("index", [True, 0.0, "0", [0], torch.tensor(0)])
@pytest.mark.parametrize("verb", VERBS)
def test_a_task_that_is_no_integer(model, verb, index):
    nothing_changes(
        model, lambda: VERBS[verb](model, index), hatcl.TaskError,
        f"task: got {index!r}, expected an integer from 0 to 2",
    )  # fmt: skip


@pytest.mark.parametrize("verb", ["set_task", "task", "forget_task"])
def test_a_task_that_is_not_sealed(model, verb):
    nothing_changes(
        model, lambda: VERBS[verb](model, 1), hatcl.TaskError,
        "task 1 is not sealed, so it has no hard gates yet; sealed are [0]", "Learn it with hatcl.learn",
    )  # fmt: skip


def test_a_sealed_task_learned_again(model):
    nothing_changes(
        model, lambda: learn(model, 0), hatcl.TaskError,
        "task 0 is sealed and cannot be learned again", "hatcl.forget_task(model, 0) frees it, or learn another",
    )  # fmt: skip


@pytest.mark.parametrize("options", [{"steps": 0}, {"epochs": 0}, {"start": 3}, {"start": -1}])
def test_numbers_of_steps_that_cannot_be(model, options):
    nothing_changes(
        model, lambda: learn(model, 1, **options), hatcl.TaskError,
        "steps: got steps=", "expected steps and epochs of at least 1, start from 0 to steps",
    )  # fmt: skip


def test_a_model_without_gates():
    for verb in (
        *VERBS.values(),
        lambda m, t: hatcl.tasks(m),
        lambda m, t: hatcl.describe(m),
        lambda m, t: hatcl.add_tasks(m, 1),
    ):
        plain = parts.plain("mlp")
        with pytest.raises(
            hatcl.TaskError, match="Sequential has no gates: convert it first .*or build it from HAT layers"
        ):
            verb(plain, 0)


def test_no_room_is_added(model):
    nothing_changes(model, lambda: hatcl.add_tasks(model, 0), hatcl.TaskError, "count: got 0, expected at least 1")


# ---- units ----------------------------------------------------------------------------------------


def test_no_units_left():
    model = parts.converted("mlp", init="dense")
    parts.pretend(model, tasks=[0], share=1.1)
    nothing_changes(
        model, lambda: learn(model, 1), hatcl.CapacityError,
        "task 1: no room left, sealed tasks hold every element of 1, 4 that it could learn",
        "forget a task (hatcl.forget_task), grow the network (hatcl.grow), raise HATConfig.penalty_weight",
    )  # fmt: skip
    hatcl.forget_task(model, 0)
    learn(model, 1)
    assert hatcl.tasks(model) == [1]


# ---- conversion -----------------------------------------------------------------------------------


def test_example_inputs_that_do_not_fit_the_model():
    source = parts.plain("resnet")
    before = parts.snapshot(source)
    for inputs, text in (
        (
            torch.randn(2, 4, 32, 32),
            "ResNet: its forward failed on example_inputs = float32[2, 4, 32, 32]: RuntimeError",
        ),
        ({"y": torch.randn(2)}, "ResNet: its forward failed on example_inputs = {y: float32[2]}: TypeError"),
        ((torch.randn(2), 3), "ResNet: its forward failed on example_inputs = (float32[2], int): TypeError"),
        (None, "example_inputs: got None; pass an input of the model's forward: a tensor, a tuple or a dict"),
    ):
        with pytest.raises(hatcl.ConversionError) as caught:
            hatcl.convert(source, 2, inputs)
        assert text in str(caught.value)
    assert parts.same(before, source.state_dict())


def test_inputs_of_a_certificate_that_the_forward_does_not_take(model):
    x = parts.images("mlp")
    nothing_changes(
        model, lambda: hatcl.certify(model, (x, torch.zeros(len(x)))), hatcl.HATError,
        "certify: HATSequential: its forward failed on inputs = (float32[",
        "TypeError: ", "pass what hatcl.convert gets as example_inputs: a tensor, a tuple (positional) or a dict",
    )  # fmt: skip


class _Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x):
        return x * self.weight


@pytest.mark.parametrize("given, text", [
    ("resnet18", r"got the text 'resnet18', .*timm.create_model\('hat_resnet18', num_tasks=...\) converts"),
    (_Plain, r"got the class _Plain, expected an instance of it; pass _Plain\(...\)"),
    (len, "got builtin_function_or_method, expected a torch.nn.Module"),
    (torch.compile(nn.Linear(3, 2), backend="eager"), "Linear: it is compiled by torch.compile;"),
    (nn.DataParallel(nn.Linear(3, 2)), r"it is a DataParallel, .* convert that one \(its attribute module\), and put"),
])  # fmt: skip
def test_what_is_no_module_to_convert(given, text):
    with pytest.raises(hatcl.ConversionError, match=text):
        hatcl.convert(given, 2, torch.randn(2, 3))


def test_a_model_that_is_converted_already(model):
    nothing_changes(
        model, lambda: hatcl.convert(model, 2, parts.images("mlp")), hatcl.ConversionError,
        "Sequential is a HAT model already; hatcl.add_tasks(model, n) makes room for more",
    )  # fmt: skip


def test_an_attribute_in_the_way():
    source = parts.plain("resnet")
    source.hat_gates = 3
    with pytest.raises(
        hatcl.ConversionError, match="ResNet has an attribute 'hat_gates', where its gates would go; rename"
    ):
        hatcl.convert(source, 2, parts.images("resnet"))


def test_a_model_that_cannot_be_copied():
    source = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 2))
    source(torch.randn(2, 3))
    with pytest.raises(hatcl.ConversionError, match="cannot be copied .*use torch.nn.utils.parametrizations"):
        hatcl.convert(source, 2, torch.randn(2, 3))


def test_a_layer_that_the_registry_does_not_know_is_not_an_error_but_said():
    """It is converted by what the trace sees (see tests/test_convert.py); what it cannot follow is noted."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = nn.Parameter(torch.randn(3, 3))

        def forward(self, x):
            return x[:, :3] @ torch.linalg.matrix_exp(self.p)

    model = hatcl.convert(nn.Sequential(nn.Linear(4, 6), Odd(), nn.Linear(3, 2)), 2, torch.randn(5, 4))
    found = hatcl.describe(model)
    assert "matrix_exp is not known to the trace: it forgets which units it carries" in found.notes["1"]
    assert found.copies["1.p"] == "no unit owns it"


def test_a_batch_norm_that_nobody_converted():
    layer = hatcl.HATLinear(48, 8, num_tasks=2)
    model = nn.Sequential(nn.Flatten(), layer, nn.BatchNorm1d(8), hatcl.TaskIndexedLinear(8, 4, reads=layer))
    nothing_changes(
        model, lambda: learn(model, 0), hatcl.HATError,
        "2: BatchNorm1d has running statistics that all tasks would share", "use its TaskIndexed kin, or hatcl.convert",
    )  # fmt: skip


# ---- optimizers -----------------------------------------------------------------------------------


def test_an_optimizer_over_another_models_parameters(model):
    source = parts.plain("mlp")
    nothing_changes(
        model, lambda: learn(model, 1, sgd(source)), hatcl.GuardError,
        "optimizer: SGD holds none of this model's parameters; build it over model.parameters() of the converted model",
    )  # fmt: skip
    other = copy.deepcopy(model)
    nothing_changes(
        model, lambda: learn(model, 1, sgd(other)), hatcl.GuardError, "holds none of this model's parameters"
    )


@pytest.mark.parametrize("optimizer", ["adam", 3, nn.Linear(2, 2), torch.optim.SGD])
def test_what_is_no_optimizer(model, optimizer):
    nothing_changes(
        model, lambda: learn(model, 1, optimizer), hatcl.GuardError,
        f"optimizer: got {type(optimizer).__name__}, which has no step() and param_groups to guard",
        "pass a torch.optim.Optimizer (or a list of them) that you call step() on yourself",
    )  # fmt: skip


def test_an_optimizer_that_was_built_before_there_was_room(model):
    optimizer = sgd(model)
    hatcl.add_tasks(model, 1)
    nothing_changes(
        model, lambda: learn(model, 3, optimizer), hatcl.GuardError,
        "optimizer: no optimizer holds task 3's gate embeddings",
        "optimizer.add_param_group({'params': hatcl.task_parameters(model, 3)})",
    )  # fmt: skip


def test_two_models_that_share_a_parameter():
    first, second = parts.converted("mlp"), parts.converted("mlp")
    second[4]._parameters["weight"] = first[4]._parameters["weight"]
    both = nn.ModuleList([first, second])
    with pytest.raises(hatcl.HATError) as caught:
        learn(both, 0, sgd(both))
    text = "1.4.weight and 0.4.weight are one parameter but belong to two converted models; convert the model that"
    assert text in str(caught.value)
    assert all(g.learning is None and not g.sealed.any() for g in gates_of(both))


def test_a_parameter_that_another_model_has_sealed():
    """Two models, each by itself: learning with the one would change what the other has sealed."""
    first, second = parts.pretend(parts.converted("mlp"), tasks=[0]), parts.converted("mlp")
    second[4]._parameters["weight"] = first[4]._parameters["weight"]
    nothing_changes(
        first, lambda: learn(second, 0), hatcl.HATError,
        "4.weight is also a parameter of another HAT model, whose sealed tasks would change", "copy the parameter",
    )  # fmt: skip
    assert hatcl.tasks(second) == []
    alone = parts.converted("mlp")
    alone[4]._parameters["weight"] = parts.pretend(parts.converted("mlp"), tasks=[0])[4]._parameters["weight"]
    learn(alone, 0)  # the other model is gone


# ---- the middle of a task -------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["nan", "inf", "huge"])
def test_a_loss_that_is_not_finite(model, how):
    x = parts.images("mlp")
    want, digest = parts.logits(model, 0, x), task_digests(model, 0)
    images, y = parts.problem(parts.shape_of("mlp"), 1)
    factor = {"nan": float("nan"), "inf": float("inf"), "huge": 3e38}[how]
    with pytest.raises(hatcl.NonFiniteLossError) as caught:
        optimizer = sgd(model)
        with hatcl.learn(model, 1, optimizer, steps=4) as learning:
            for step in range(4):
                loss = tf.cross_entropy(model(images), y) * (factor if step == 2 else 1) + learning.penalty()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    assert "task 1: its gate embeddings or their gradients are no longer finite, so the loss was NaN" in str(
        caught.value
    )
    assert "lower the learning rate, clip gradients, or look at the batch" in str(caught.value)
    assert torch.equal(parts.logits(model, 0, x), want) and task_digests(model, 0) == digest
    assert hatcl.tasks(model) == [0] and hatcl.certify(model, x).exact


# ---- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda s: s.pop("4.weight"), 'Missing key(s) in state_dict: "4.weight"'),
        (lambda s: s.update(what=torch.zeros(1)), 'Unexpected key(s) in state_dict: "what"'),
        (lambda s: s.update({"4.weight": torch.zeros(3, 3)}), "size mismatch for 4.weight"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_torchs_own_error(model, change, text):
    """And what was loaded in part is noticed at the next use."""
    state = parts.snapshot(parts.pretend(parts.converted("mlp"), tasks=[0, 1], seed=3))
    change(state)
    with pytest.raises(RuntimeError) as caught:
        model.load_state_dict(state)
    assert text in str(caught.value)


def test_a_state_dict_that_was_tampered_with_is_noticed_before_learning(model):
    state = parts.snapshot(model)
    live = next(h for h in held(model) if h.name == "1.weight").live(0)
    state["1.weight"][live] *= 1.5
    model.load_state_dict(state)
    for run in (
        lambda: learn(model, 1),
        lambda: hatcl.certify(model, parts.images("mlp")),
        lambda: hatcl.forget_task(model, 0),
    ):
        nothing_changes(
            model, run, hatcl.IntegrityError, "task 0 was sealed, but 1 of what it uses changed since: 1.weight",
            "Something outside hatcl.learn wrote to the model; load the last saved model, or forget the task",
        )  # fmt: skip


def test_a_pickle_of_the_whole_model_is_torchs_business(model, tmp_path):
    """Pickling works (tests/hat/layers/test_gated.py); loading one is never done by hatcl itself."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(pickle.dumps(model))
    with pytest.raises(hatcl.IntegrityError, match="a pickle .*hatcl does not load pickles"):
        hatcl.from_pretrained(tmp_path / "model")


def test_every_error_is_a_hat_error_and_what_python_calls_it():
    import hatcl.errors as errors

    kinds = [e for e in vars(errors).values() if isinstance(e, type) and e.__module__ == errors.__name__]
    assert all(issubclass(e, hatcl.HATError) for e in kinds) and len(kinds) > 8
    assert issubclass(hatcl.TaskError, ValueError) and issubclass(hatcl.ConfigError, ValueError)
    assert all(getattr(hatcl, e.__name__) is e for e in kinds)
