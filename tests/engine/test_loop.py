"""What every loop promises, tried with every procedure that learns."""

from __future__ import annotations

import contextlib
import json
import random

import numpy as np
import pytest
import torch
from loops import LOOPS

import hatcl
from hatcl.engine import loop as engine
from hatcl.engine.loop import Loop, Work
from hatcl.engine.options import LoopOptions
from hatcl.errors import ConfigError, HATError, IntegrityError, NonFiniteLossError

pytestmark = pytest.mark.filterwarnings("ignore:task .* is sealed after")
every = pytest.mark.parametrize("name", LOOPS)


class Stop(BaseException):
    """Like KeyboardInterrupt."""


def stop_at(count, doing="learning"):
    """Stops after so many steps in all; keeps what it was told."""

    def tell(at):
        tell.told.append(at)
        if at.doing == doing and sum(x.doing == doing for x in tell.told) == count:
            raise Stop

    tell.told = []
    return tell


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def drawn():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def finished(name, folder=None, **options):
    case = LOOPS[name]()
    case.run(folder, **options)
    return case.tensors()


# --- going on ---


@pytest.fixture(scope="module")
def whole():
    """What an uninterrupted run ends with, by loop."""
    return {}


@every
@pytest.mark.parametrize("count", [1, 3, 4])
def test_a_resumed_run_ends_with_the_same_bits(name, count, tmp_path, whole):
    """Collate and model draw from Python's, NumPy's and torch's generators; steps 1 and 4 are in the middle of an
    epoch of three, 3 is at its end. Sequences and images are stopped in their second task."""
    if name not in whole:
        whole[name] = finished(name)
    first = 0 if len(LOOPS[name].files) == 1 else 6
    with pytest.raises(Stop):
        LOOPS[name]().run(tmp_path, stop_at(first + count))
    case, tell = LOOPS[name](), stop_at(0)
    random.seed(count), np.random.seed(count), torch.manual_seed(count)  # another process draws other numbers
    case.run(tmp_path, tell)
    steps = [at.step for at in tell.told if at.doing == "learning"]
    assert steps == list(range(count + 1, 7))  # goes on with the next step, and does none twice
    assert same(case.tensors(), whole[name])


def test_statistics_of_settled_gates_go_on(tmp_path):
    """The last tenth of a task is learned with hard gates, and its statistics are averaged from there on."""
    whole = finished("images", epochs=10)
    with pytest.raises(Stop):
        LOOPS["images"]().run(tmp_path, stop_at(29), epochs=10)
    assert same(finished("images", tmp_path, epochs=10), whole)


@every
@pytest.mark.parametrize("lost", ["python", "numpy", "torch", "epoch", "optimizer"])
def test_twin_without_a_part_of_what_is_kept_the_bits_differ(name, lost, tmp_path, whole, monkeypatch):
    if name not in whole:
        whole[name] = finished(name)
    first = 0 if len(LOOPS[name].files) == 1 else 6
    with pytest.raises(Stop):
        LOOPS[name]().run(tmp_path, stop_at(first + 4))
    take_up = Loop._take_up

    def less(self, saved, where):
        fresh = engine.random_state(self.device, self.work.generators)
        if lost == "optimizer":
            saved["optimizer"]["state"] = {}
        elif lost == "epoch":
            saved["epoch_began"] = {**fresh, "own": [torch.Generator().manual_seed(9).get_state()] * len(fresh["own"])}
        else:
            saved["random"][lost] = fresh[lost]
        take_up(self, saved, where)

    monkeypatch.setattr(Loop, "_take_up", less)
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    case = LOOPS[name]()
    case.run(tmp_path)
    if lost == "epoch" and name == "atlas":  # a shuffled loader draws its order at the epoch's start
        assert not same(case.tensors(), whole[name])
    elif lost != "torch" or name != "atlas":
        assert not same(case.tensors(), whole[name])


# --- what is given back ---


@every
def test_a_module_that_was_put_into_evaluation_stays_there(name):
    case = LOOPS[name]()
    case.model.train()
    case.body.eval()
    modes = [m.training for m in case.model.modules()]
    statistics = {n: b.clone() for n, b in case.body.named_buffers()}
    seen = []
    hooks = [m.register_forward_hook(lambda m, *_: seen.append(m.training)) for m in case.body.modules()]
    case.run()
    for hook in hooks:
        hook.remove()
    assert seen and not any(seen)
    assert [m.training for m in case.model.modules()] == modes
    assert all(torch.equal(b, statistics[n]) for n, b in case.body.named_buffers() if "running" in n)


@every
@pytest.mark.parametrize("fails", [False, True])
def test_modes_gradients_and_random_numbers_are_given_back(name, fails):
    case = LOOPS[name]()
    case.model.eval()
    list(case.model.modules())[-1].train()
    modes = [m.training for m in case.model.modules()]
    state = drawn()
    with pytest.raises(Stop) if fails else contextlib.nullcontext():
        case.run(None, stop_at(2) if fails else None)
    assert [m.training for m in case.model.modules()] == modes
    assert drawn() == state


@every
@pytest.mark.parametrize("how", ["loss", "gradient", "interrupt"])
def test_an_error_in_the_middle_leaves_what_was_promised(name, how, tmp_path, monkeypatch):
    """Tuning and coefficients: everything as before. Sequences and images: the tasks before it."""
    case = LOOPS[name]()
    before = case.tensors()
    first = 0 if case.undone else 6
    loss, count = Loop._check, iter(range(1, 99))

    def check(self, value, what, batch):
        if what == how and next(count) == first + 3:
            value = value * float("nan")
        loss(self, value, what, batch)

    monkeypatch.setattr(Loop, "_check", check)
    folder = None if case.undone else tmp_path
    if how == "interrupt":
        with pytest.raises(Stop):
            case.run(folder, stop_at(first + 3))
    else:
        with pytest.raises(NonFiniteLossError, match=rf"epoch 1, step 3: the {how} is nan\. .*Lower lr .*look for NaN"):
            case.run(folder)
    if case.undone:
        assert same(case.tensors(), before)
        assert all(p.grad is None for p in case.model.parameters())
    elif name == "images":
        assert hatcl.tasks(case.model) == [0] and hatcl.certify(case.model, torch.randn(2, 3, 32, 32)).exact
    else:
        assert [p.name for p in (tmp_path / "tasks").iterdir()] == ["0_t0"]
    monkeypatch.setattr(Loop, "_check", loss)
    if not case.undone:  # and it goes on
        again = LOOPS[name]()
        again.run(folder)
        assert same(again.tensors(), finished(name))


# --- damage ---


def spoilt(path):
    """Ways in which a file may be damaged."""
    content = path.read_bytes()
    yield "truncated", lambda: path.write_bytes(content[: len(content) // 2])
    yield "empty", lambda: path.write_bytes(b"")
    if path.suffix == ".json":
        yield "a list", lambda: path.write_text("[1]")
        for key in json.loads(content):
            yield (
                f"without {key}",
                lambda key=key: path.write_text(json.dumps({k: v for k, v in json.loads(content).items() if k != key})),
            )
        return
    if path.suffix != ".pt":
        return
    path.write_bytes(content)
    whole = torch.load(path, weights_only=True)
    yield "a list", lambda: torch.save([1], path)
    for key in whole:
        yield f"without {key}", lambda key=key: torch.save({k: v for k, v in whole.items() if k != key}, path)
        yield f"{key} of another kind", lambda key=key: torch.save({**whole, key: "?"}, path)


@every
def test_a_damaged_file_is_refused_with_cause_and_remedy(name, tmp_path):
    first = 0 if len(LOOPS[name].files) == 1 else 6
    with pytest.raises(Stop):
        LOOPS[name]().run(tmp_path, stop_at(first + 4))
    for file in LOOPS[name].files:
        path = tmp_path / file
        content = path.read_bytes()
        for damage, spoil in spoilt(path):
            spoil()
            try:
                LOOPS[name]().run(tmp_path, stop_at(1))
            except HATError as error:
                said = str(error)
                assert any(word in said for word in ("opy ", "remove", "new run", "another folder", "give")), said
                assert path.name in said, said
            except Stop:
                pytest.fail(f"{file}, {damage}: not refused")
            path.write_bytes(content)
    LOOPS[name]().run(tmp_path)


# --- abilities ---

ABILITIES = {
    "another optimizer": {"optimizer": "lion"},
    "a schedule of timm": {"schedule": "poly"},
    "warm-up": {"warmup": 0.5, "schedule": "linear"},
    "accumulation": {"accumulate": 2},
    "clipping": {"clip": 1e-3},
    "bf16": {"amp": "bf16"},
    "steps": {"max_steps": 2},
    "seed": {"seed": 5},
}


@every
@pytest.mark.parametrize("ability", ABILITIES)
def test_every_loop_has_every_ability(name, ability, whole):
    if name not in whole:
        whole[name] = finished(name)
    found = finished(name, **ABILITIES[ability])
    assert not same(found, whole[name]) and all(bool(t.isfinite().all()) for t in found.values())
    assert same(found, finished(name, **ABILITIES[ability]))


@every
def test_fp16_learns_with_a_gradient_scaler(name):
    case = LOOPS[name]()
    before = case.tensors()
    case.run(amp="fp16", epochs=4)
    assert not same(case.tensors(), before)


@pytest.mark.slow
@every
def test_compiled_steps(name):
    case = LOOPS[name]()
    before = case.tensors()
    case.run(compile=True)
    assert not same(case.tensors(), before)
    assert all(m._compiled_call_impl is None for m in case.model.modules())


@every
def test_progress_is_one_protocol(name):
    tell = stop_at(0)
    LOOPS[name]().run(None, tell)
    steps = [at for at in tell.told if at.doing == "learning"]
    tasks = 1 if LOOPS[name].undone else 2
    assert [at.step for at in steps] == [*range(1, 7)] * tasks
    assert {at.steps for at in steps} <= {6, None} and all(np.isfinite(at.value) for at in steps)
    assert [at.epoch for at in tell.told if at.doing == "epoch"] == [1, 2] * tasks
    assert [at.stage for at in steps] == [i for i in range(tasks) for _ in range(6)]


# --- the loop by itself ---


class Line(Work):
    """Fits y = w x on given numbers."""

    def __init__(self, numbers=(1.0, 2.0, 3.0), again=True):
        self.w = torch.nn.Parameter(torch.zeros(()))
        super().__init__("line", torch.nn.Identity(), [self.w])
        self.numbers, self.again = list(numbers), again

    def batches(self, epoch):
        return iter(self.numbers) if self.again or not epoch else iter([])

    def loss(self, batch):
        return (self.w - batch) ** 2

    def size(self, batch):
        return batch


def test_accumulated_batches_are_weighted_by_their_sizes():
    work = Line([1.0, 3.0])
    Loop(work, LoopOptions(optimizer="sgd", momentum=0.0, lr=0.5, epochs=1, accumulate=2)).run()
    assert float(work.w.detach()) == pytest.approx((1 * 1 + 3 * 3) / 4)  # one step to the weighted mean


def test_a_penalty_counts_once_per_step():
    work = Line([1.0, 1.0])
    work.penalty = lambda: 10 * work.w
    tell = stop_at(0)
    Loop(work, LoopOptions(optimizer="sgd", momentum=0.0, lr=0.1, epochs=1, accumulate=2), tell=tell).run()
    assert float(work.w) == pytest.approx(0.1 * (2 - 10)) and tell.told[0].value == pytest.approx(1.0)


def test_when_a_loop_ends():
    with pytest.raises(ConfigError, match="task line: give epochs or max_steps; nothing says when to end"):
        Loop(Line(), LoopOptions())
    loop = Loop(Line(), LoopOptions(max_steps=5))
    loop.run()
    assert (loop.step, loop.epoch, loop.finished) == (5, 2, True)
    with pytest.raises(ConfigError, match="batches: none in epoch 2; expected at least one"):
        Loop(Line(again=False), LoopOptions(epochs=2)).run()


def test_an_optimizer_is_taken_on_and_a_schedule_starts_from_its_own_rate():
    work = Line()
    options = LoopOptions(optimizer="sgd", lr=0.1, epochs=1, schedule="linear")
    first = Loop(work, options)
    first.run()
    second = Loop(work, options, optimizer=first.optimizer, scaler=first.scaler)
    second.run()
    assert second.optimizer is first.optimizer and second.schedule.rates == [0.1]


def test_a_checkpoint_of_other_parameters_is_refused(tmp_path):
    from hatcl.engine.state import Standing

    def loop(work):
        return Loop(work, LoopOptions(optimizer="sgd", epochs=2), standing=Standing(tmp_path / "at.pt", seconds=0))

    with pytest.raises(Stop):
        one = loop(Line())
        one.tell = stop_at(2)
        one.run()
    other = Line()
    other.parameters.append(torch.nn.Parameter(torch.zeros(2)))
    with pytest.raises(IntegrityError, match="at.pt lacks a part that is needed to resume.*Copy it again, or remove"):
        loop(other)
