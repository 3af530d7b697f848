"""Units of a layer: their gates for a task, and what is kept of them."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import hatcl
from hatcl import functional
from hatcl.functional import same_bits
from hatcl.hat.binding import Binding, Units
from hatcl.hat.gates import Gates
from hatcl.hat.layers.gated import multiply
from hatcl.hat.layers.linear import LOOKED_UP, TABLE


def gates(units=50, **options):
    return Gates(units, hatcl.HATConfig(**{"num_tasks": 3, **options}))


@given(st.lists(st.integers(0, 12), min_size=1, max_size=20))
def test_units_pick_their_gates_and_zero_is_always_on(numbers):
    g = gates(12)
    g.seal(0)
    g.task = 0
    units = Units(g, np.array(numbers))
    want = torch.tensor([1.0 if n == 0 else float(g.masks[0][n - 1]) for n in numbers])
    assert torch.equal(units.gate(), want) and torch.equal(units.hard(0), want.bool())
    assert units.share(g.task) == pytest.approx(max(float(want.mean()), 1e-4))
    g.task = None
    assert units.gate() is None


def test_what_is_kept_of_a_task_follows_every_change():
    """Nothing is remembered too long: sealing, forgetting, loading, casting, another task."""
    g = gates()
    units = Units(g, np.arange(1, 51))
    for t in (0, 1):
        g.seal(t)
    seen = []
    for t in (0, 1, 0):
        g.task = t
        seen.append(units.gate().clone())
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])
    other = gates()
    other.seal(0)
    g.load_state_dict(other.state_dict())
    assert torch.equal(units.gate(), other.masks[0].float())
    g.double()
    assert units.gate().dtype == torch.float64
    g.unseal(0)
    assert not g.hard(0).equal(other.masks[0])


# ---- what evaluation keeps of a task ---------------------------------------------------------------------------------

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(7))


class Net(nn.Module):
    """Every kind of read: shared weights, copies, running statistics, norms over units and over groups, a table."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.group = nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.GroupNorm(3, 12)
        self.conv2, self.ln, self.words = nn.Conv2d(12, 12, 3), nn.LayerNorm(12), nn.Embedding(9, 12)
        self.fc, self.head = nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x):
        x = torch.relu(self.group(self.conv2(torch.relu(self.bn(self.conv(x))))))
        x = self.ln(x.mean((2, 3)) + self.words(torch.arange(len(x)) % 9))
        return self.head(torch.sigmoid(self.fc(x)))


@pytest.fixture(scope="module")
def pickled():
    """Two sealed tasks. A copy by pickle follows no model, so that it keeps what it computes with."""
    torch.manual_seed(0)
    model = hatcl.convert(Net(), 3, IMAGES, verify=False)
    for t in (0, 1):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with hatcl.learn(model, t, optimizer, steps=2), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            e = model.hat_gates.embeddings[t]
            e.data.copy_(torch.where(torch.rand(e.shape) < 0.6, 1.0, -1.0))
            for _ in range(2):
                optimizer.zero_grad()
                model.train()(IMAGES).square().sum().backward()
                optimizer.step()
    return pickle.dumps(model.eval())


def said(model, task=0):
    with torch.no_grad(), hatcl.task(model, task):
        return model(IMAGES).clone()


def anew(model, task=0):
    """The same where nothing was kept."""
    for m in model.modules():
        if "_hat" in m.__dict__:
            m._hat.clear()
    return said(model, task)


def noise(p):
    return torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())).to(p) * 0.3


def written(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(noise(p))


def swapped(model):
    for p in model.parameters():
        p.data = p.data + noise(p)


def swapped_twice(model):
    """The second time where the first memory was."""
    for p in model.parameters():
        was, size = p.data_ptr(), p.detach() + noise(p)
        p.data = torch.empty(0)
        for _ in range(50):
            p.data = size.clone()
            if p.data_ptr() == was:
                break


def swapped_twice_elsewhere(model):
    """Where only the constants of the task are kept."""
    for m in model.modules():
        if "_hat" in m.__dict__:
            m._hat.now = (None, None, {})
    swapped_twice(model)


def loaded(model, assign=False):
    state = {n: x + noise(x) if x.is_floating_point() and "hat_gates" not in n else x
             for n, x in model.state_dict().items()}  # fmt: skip
    model.load_state_dict(state, assign=assign)


def replaced(model):
    for m in list(model.modules()):
        for name, p in list(m._parameters.items()):
            if p is not None and not isinstance(m, (Gates, nn.ParameterList)):
                setattr(m, name, nn.Parameter(p.detach() + noise(p)))


def buffers_written(model):
    for b in model.bn.hat_tasks[0]._buffers.values():
        if b.is_floating_point():
            b.add_(noise(b).abs())


def buffers_replaced(model):
    own = model.bn.hat_tasks[0]
    own.running_mean = own.running_mean + 1


def other_eps(model):
    model.ln.eps = 0.3


WRITES = {
    "in place": written, "data": swapped, "data, the same memory": swapped_twice, "other parameters": replaced,
    "buffers": buffers_written, "other buffers": buffers_replaced, "eps": other_eps,
}  # fmt: skip
CHANGES = {  # of which the gates know
    "data, the same memory, constants": swapped_twice_elsewhere,
    "load_state_dict": loaded,
    "load_state_dict assign": lambda m: loaded(m, True),
    "double": lambda m: m.double().float().half().float(),
    "forgotten": lambda m: hatcl.forget_task(m, 1),
    "grown": lambda m: hatcl.grow(m, factor=1.5),
    "a task more": lambda m: hatcl.add_tasks(m, 1),
    "another task": lambda m: said(m, 1),
    "none": lambda m: said(m, None),
    "default": lambda m: hatcl.set_task(m, 1),
    "trained": lambda m: said(m.train(), 0) is m.eval(),
}


def changed(pickled, change):
    """What a model says after a change, at once and where nothing is kept, and what it said before."""
    model = pickle.loads(pickled)
    before = [said(model) for _ in range(4)]  # the last ones by a table that is gated
    assert all(same_bits(before[0], x) for x in before)
    assert (
        "weight" in model.fc._hat.now[2] and "running_mean" in model.bn._hat.now[2] and TABLE in model.words._hat.now[2]
    )
    change(model)
    now = said(model)
    return now, anew(model), before[0]


@pytest.mark.parametrize("name", [*WRITES, *CHANGES])
def test_what_is_kept_in_evaluation_follows_every_change(pickled, name):
    now, want, before = changed(pickled, {**WRITES, **CHANGES}[name])
    assert same_bits(now, want)
    assert name not in WRITES or not same_bits(now, before)


@pytest.mark.parametrize("name", WRITES)
def test_twin_without_the_check_it_is_stale(pickled, name, monkeypatch):
    monkeypatch.setattr(Binding, "seen", lambda self, name, kept: kept[name][0] if name in kept else None)
    if name == "eps":
        once = Binding.once
        monkeypatch.setattr(Binding, "once", lambda self, key, make: once(self, key[:1], make))
    now, want, _ = changed(pickled, WRITES[name])
    assert not same_bits(now, want)


def test_memory_is_kept_as_long_as_its_address_is_asked_for(pickled):
    """Or other values might come to stand where those were that are gone."""
    model = pickle.loads(pickled)
    said(model)
    raw, hat = model.fc._parameters["weight"], model.fc._hat
    aliases = [x for hit in (hat.now[2]["weight"], hat.cache["weight"]) for x in hit if isinstance(x, Tensor)]
    assert sum(x is not raw and x.data_ptr() == raw.data_ptr() for x in aliases) == 2


def test_a_sealed_task_has_the_bits_of_gradients_and_of_threads(pickled):
    model = pickle.loads(pickled)
    want = {t: said(model, t) for t in (0, 1, None)}
    for t in want:
        with hatcl.task(model, t):
            assert same_bits(model(IMAGES).detach(), want[t])
            with torch.inference_mode():
                for _ in range(4):
                    assert same_bits(model(IMAGES).clone(), want[t])
                table = model.words._hat.now[2].get(TABLE)
                assert t is None or (table is not None and not table[0].is_inference())
    with ThreadPoolExecutor(3) as pool:
        tasks = [0, 1, None] * 12
        for t, got in zip(tasks, pool.map(lambda t: said(model, t), tasks), strict=True):
            assert same_bits(got, want[t])


def test_a_choice_that_comes_again_finds_what_was_kept(pickled):
    model = pickle.loads(pickled)
    said(model), said(model)
    kept = model.fc._hat.now[2]
    said(model)
    assert model.fc._hat.now[2] is kept
    said(model, 1)
    assert model.fc._hat.now[2] is not kept


def test_twin_without_asking_who_chose_another_tasks_values_are_given(pickled, monkeypatch):
    model = pickle.loads(pickled)
    want = said(model, 1)
    said(model)
    monkeypatch.setattr(Binding, "of_now", lambda self: self.now[2])
    assert not same_bits(said(model, 1), want)


def by_default(model):
    hatcl.set_task(model, 0)
    with torch.no_grad():
        model(IMAGES)
        hatcl.set_task(model, 1)
        return model(IMAGES).clone()


def test_a_default_that_is_set_is_followed(pickled):
    assert same_bits(by_default(pickle.loads(pickled)), said(pickle.loads(pickled), 1))


def test_twin_without_the_moment_the_default_before_counts(pickled, monkeypatch):
    monkeypatch.setattr(Gates, "__setattr__", nn.Module.__setattr__)
    assert not same_bits(by_default(pickle.loads(pickled)), said(pickle.loads(pickled), 1))


def test_nothing_is_kept_where_it_may_change(pickled):
    model = pickle.loads(pickled)
    gates = model.hat_gates
    with torch.no_grad(), hatcl.task(model, 0):
        assert model.fc._hat.of_now() is not None
        with torch.enable_grad():
            assert model.fc._hat.of_now() is None
        gates.train()
        assert model.fc._hat.of_now() is None
        gates.eval()
        gates.lock = threading.Lock()
        assert model.fc._hat.of_now() is None
    copied = copy.deepcopy(pickle.loads(pickled))
    with torch.no_grad(), hatcl.task(copied, 0):
        assert copied.fc._hat.of_now() is not None  # the model that it was copied from is gone
    beside = copy.deepcopy(model)
    with torch.no_grad(), hatcl.task(beside, 0):
        assert beside.fc._hat.of_now() is not None  # that model has learned nothing since
        assert same_bits(said(beside), said(pickle.loads(pickled)))


def read_after_averaging(pickled):
    """A copy's weight, read for itself, before and after the copy was averaged with a model that learns; and that of a
    copy of it that keeps nothing."""
    model = pickle.loads(pickled)
    copied = copy.deepcopy(model).eval()
    hatcl.set_task(copied, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with hatcl.learn(model, 2, optimizer, steps=2), torch.no_grad():
        before = copied.fc.weight.clone()
        assert same_bits(copied.fc.weight, before) and "weight" in copied.fc._hat.now[2]
        copied.hat_gates.embeddings[2].lerp_(model.hat_gates.embeddings[2], 0.5)
        after = copied.fc.weight.clone()
        return before, after, copied.hat_gates.default


@pytest.mark.filterwarnings("ignore:task 2 is sealed")
def test_a_copy_keeps_what_it_computes_with_until_it_follows_its_model(pickled):
    before, after, task = read_after_averaging(pickled)
    assert task == 2 and not same_bits(before, after)


@pytest.mark.filterwarnings("ignore:task 2 is sealed")
def test_twin_without_asking_whether_it_was_averaged_the_task_before_counts(pickled, monkeypatch):
    of_now = Binding.of_now
    monkeypatch.setattr(Binding, "of_now", lambda self: self.now[2] or of_now(self))
    before, after, task = read_after_averaging(pickled)
    assert task == 0 and same_bits(before, after)


def test_other_parameters_in_a_functional_call(pickled):
    model = pickle.loads(pickled)
    want = said(model)
    others = {n: p.detach() + noise(p) for n, p in model.named_parameters() if "hat_gates" not in n}
    with torch.no_grad(), hatcl.task(model, 0):
        got = torch.func.functional_call(model, others, IMAGES)
    twin = pickle.loads(pickled)
    twin.load_state_dict(others, strict=False)
    assert same_bits(got, said(twin)) and not same_bits(got, want) and same_bits(said(model), want)


@pytest.fixture(scope="module")
def other(pickled):
    """A model of the same plan, with other weights and other hard gates."""
    model = pickle.loads(pickled)
    written(model)
    masks = model.hat_gates.masks
    masks.copy_(masks.roll(1, 1))
    return pickle.loads(pickle.dumps(model))


def called(model, other):
    with torch.no_grad(), hatcl.task(model, 0):
        return torch.func.functional_call(model, other.state_dict(), IMAGES)


def filled(model, other):
    state = other.state_dict()
    for name, x in model.state_dict().items():
        x.copy_(state[name])
    return said(model)


@pytest.mark.parametrize("put", [called, filled])
def test_hard_gates_that_come_past_the_gates_are_seen(pickled, other, put):
    """A whole state in a functional call, or written into a model's tensors; and what was there, once it is back."""
    model, fresh = pickle.loads(pickled), pickle.loads(pickled)
    before, want = said(model), said(other)
    assert same_bits(put(model, other), want) and same_bits(put(fresh, other), want)
    assert same_bits(said(fresh), want if put is filled else before) and same_bits(said(model), said(fresh))


@pytest.mark.parametrize("put", [called, filled])
def test_twin_without_a_look_at_hard_gates_those_before_count(pickled, other, put, monkeypatch):
    model, want = pickle.loads(pickled), said(other)
    monkeypatch.setattr(Gates, "look", lambda self: self.moment)
    said(model)
    assert not same_bits(put(model, other), want)


def test_a_model_of_inference_tensors_keeps_nothing(pickled, other):
    """One that was loaded under inference mode: no write to its tensors is seen."""
    with torch.inference_mode():
        model = pickle.loads(pickled)
        assert same_bits(said(model), said(pickle.loads(pickled)))
        assert same_bits(filled(model, other), said(other)) and same_bits(said(model, 1), said(other, 1))
    assert same_bits(said(model), said(other)) and same_bits(said(model, None), said(other, None))


def slopes(model):
    """Of the output by every weight, in the direction of ones."""
    weights = {n: p.detach() for n, p in model.named_parameters() if "hat_gates" not in n}
    ones = {n: torch.ones_like(p) for n, p in weights.items()}
    return torch.func.jvp(lambda w: torch.func.functional_call(model, w, (IMAGES,)), (weights,), (ones,))[1]


def test_derivatives_by_weights_pass_what_is_kept(pickled):
    model = pickle.loads(pickled)
    before = said(model)
    with hatcl.task(model, 0):
        want = slopes(model)
        with torch.no_grad():
            assert bool((want != 0).any()) and torch.equal(slopes(model), want)
    assert same_bits(said(model), before)


def test_twin_without_asking_who_follows_there_are_none(pickled, monkeypatch):
    model = pickle.loads(pickled)
    monkeypatch.setattr(functional, "is_followed", lambda: False)
    with torch.no_grad(), hatcl.task(model, 0), pytest.raises(RuntimeError, match="storage"):
        slopes(model)


def test_an_ensemble_of_weights_is_one_vmap(pickled):
    model = pickle.loads(pickled)
    weights = [
        {n: p.detach() + i * noise(p) for n, p in model.named_parameters() if "hat_gates" not in n} for i in (0, 1)
    ]
    stacked = {n: torch.stack([w[n] for w in weights]) for n in weights[0]}
    with torch.no_grad(), hatcl.task(model, 0):
        want = [torch.func.functional_call(model, w, (IMAGES,)) for w in weights]
        got = torch.vmap(lambda w: torch.func.functional_call(model, w, (IMAGES,)))(stacked)
    assert torch.allclose(got, torch.stack(want), atol=1e-5)  # 1e-7 measured: vmap multiplies all in one kernel
    assert same_bits(said(model), want[0])


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_is_of_the_whole_computation(pickled):
    """Whatever was kept before: torch traces a second time and compares the two."""
    model = pickle.loads(pickled)
    want = said(model)
    with torch.no_grad(), hatcl.task(model, 0):
        program = torch.jit.trace(model, IMAGES)
    assert same_bits(program(IMAGES), want) and same_bits(said(model), want)


@pytest.mark.parametrize("warm", [False, True])
def test_of_fake_tensors_nothing_is_kept(pickled, warm):
    model, want = pickle.loads(pickled), said(pickle.loads(pickled))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = mode.from_tensor(IMAGES)
    if warm:
        said(model)
    with torch.no_grad(), hatcl.task(model, 0), mode:
        if warm:
            assert model(fake).shape == want.shape
        else:
            with pytest.raises(hatcl.TaskError, match=r"units a task has on .* DataDep\w+; hatcl.extract_task"):
                model(fake)
    assert same_bits(said(model), want)


def test_twin_without_asking_for_modes_fake_values_are_kept(pickled, monkeypatch):
    model = pickle.loads(pickled)
    monkeypatch.setattr(functional, "is_followed", lambda: False)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.no_grad(), hatcl.task(model, 0):
        with mode:
            model.fc(mode.from_tensor(torch.ones(1, 12)))
        assert type(model.fc.weight) is not Tensor


def by_hand():
    torch.manual_seed(0)
    first = hatcl.HATLinear(8, 16, num_tasks=2)
    model = nn.Sequential(first, nn.ReLU(), hatcl.HATLinear(16, 12, num_tasks=2, reads=first))
    for layer in (model[0], model[2]):
        layer.gates.embeddings[0].data.copy_(torch.randn(layer.gates.num_units))
        layer.gates.seal(0)
    return model.eval()


def first_loaded(model):
    """What it says after its first layer alone has got other hard gates, and what a copy of it says."""
    x, state = torch.linspace(-1, 1, 40).view(5, 8), model[0].state_dict()

    def say(model):
        with torch.no_grad(), hatcl.task(model, 0):
            return model(x)

    before = say(model)
    model[0].load_state_dict({**state, "gates.masks": ~state["gates.masks"]})
    now = say(model)
    assert not same_bits(now, before)
    return now, say(pickle.loads(pickle.dumps(model)))


def test_a_layer_by_hand_follows_the_gates_that_it_reads():
    now, want = first_loaded(by_hand())
    assert same_bits(now, want)


def test_twin_without_the_others_it_computes_with_those_before():
    model = by_hand()
    model[2]._hat.others = ()
    now, want = first_loaded(model)
    assert not same_bits(now, want)


def test_units_are_cleared_of_a_tensor_that_torch_negates_later(pickled):
    model = pickle.loads(pickled)
    later = torch.view_as_complex(torch.randn(4, 9, 2)).conj().imag
    assert later.is_neg()
    units = Units(model.hat_gates, np.arange(1, 10))
    with torch.no_grad(), hatcl.task(model, 0):
        got, want = multiply(later, units, 1), torch.where(units.on(0), later, 0.0)
    assert same_bits(got, want) and same_bits(later, later.resolve_neg()) and not bool(units.on(0).all())


def test_derivatives_pass_a_forward_without_gradients(pickled):
    """Forward-mode derivatives of the input, where everything of the task is kept."""
    model = pickle.loads(pickled)
    direction = torch.ones_like(IMAGES)
    with torch.no_grad(), hatcl.task(model, 0):
        model(IMAGES)
        _, slope = torch.func.jvp(model, (IMAGES,), (direction,))
    with hatcl.task(model, 0):
        _, want = torch.func.jvp(model, (IMAGES,), (direction,))
    assert torch.allclose(slope, want, atol=1e-5) and bool((slope != 0).any())


def test_a_cast_lets_go_of_what_was_kept(pickled):
    model = pickle.loads(pickled)
    said(model)
    model.double()
    assert all(not m._hat.cache and not m._hat.now[2] for m in model.modules() if "_hat" in m.__dict__)


def test_a_table_is_gated_when_as_many_rows_were_looked_up(pickled):
    model = pickle.loads(pickled)
    ids = torch.arange(4)
    with torch.no_grad(), hatcl.task(model, 0):
        first, second = model.words(ids), model.words(ids)
        kept = model.words._hat.now[2]
        assert kept[LOOKED_UP] == 8 and TABLE not in kept
        third, fourth = model.words(ids), model.words(input=ids)
        assert kept[LOOKED_UP] == 12 and TABLE in kept
        on = model.words._hat.output[1].on(0)
        assert bool(on.any()) and not bool(on.all()) and bool((third[:, ~on] == 0).all())
        assert all(same_bits(first, x) for x in (second, third, fourth))
        assert not bool((model.words.weight[:, ~on] == 0).all())  # who reads the table itself sees all of it
