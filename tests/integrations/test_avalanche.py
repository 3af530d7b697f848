"""Avalanche: `HATPlugin` in a strategy. Each test runs with a stand-in that calls a plugin in Avalanche's order, and
with Avalanche itself where it is installed. It brings much, so it has an environment of its own:

    python -m venv avalanche && avalanche/bin/pip install -e '.[dev,data]' avalanche-lib
    HATCL_AVALANCHE=avalanche/bin/python pytest -m slow tests/integrations/test_avalanche.py
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import importlib.util
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import hatcl
from hatcl.data.images import ImageData
from hatcl.functional import same_bits

REAL = importlib.util.find_spec("avalanche") is not None
EPOCHS, SIZE, TASKS = 3, 16, 3
X = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.filterwarnings("ignore")


# --- the stand-in ---


class Plugin:
    """Avalanche's plugin: a method for each moment, all of which do nothing."""

    def __init_subclass__(cls, supports_distributed=False):
        cls.supports_distributed = supports_distributed

    def __getattr__(self, name):
        if name.startswith(("before_", "after_")):
            return lambda strategy: None
        raise AttributeError(name)


class Experience(list):
    """Batches of one task."""

    def __init__(self, batches, index, labels):
        super().__init__(batches)
        self.current_experience = index
        if labels is not None:
            self.task_labels = labels


class StandIn:
    """`train` and `eval` of Avalanche's SupervisedTemplate: which plugin method is called when, and around what."""

    def __init__(self, model, optimizer, plugins, eval_every=-1):
        self.model, self.optimizer, self.plugins, self.eval_every = model, optimizer, plugins, eval_every
        self.train_epochs, self.accuracies = EPOCHS, {}

    def tell(self, moment):
        for plugin in self.plugins:
            getattr(plugin, moment)(self)

    @property
    def mb_task_id(self):
        return self.mbatch[2]

    def train(self, experience, eval_streams=()):
        self.model.train()
        self.experience = self.dataloader = experience
        self.tell("before_training_exp")
        for _ in range(self.train_epochs):
            for batch in self.dataloader:
                self.mbatch = batch
                self.tell("before_training_iteration")
                self.optimizer.zero_grad()
                self.loss = nn.functional.cross_entropy(self.model(self.mbatch[0]), self.mbatch[1])
                self.loss.backward()
                self.tell("before_update")
                self.optimizer.step()
                self.tell("after_update")
            for stream in eval_streams if self.eval_every > 0 else ():
                self.eval(stream)
        self.tell("after_training_exp")

    @torch.no_grad()
    def eval(self, stream):
        was = self.experience, self.dataloader
        self.model.eval()
        for experience in stream:
            self.experience = experience
            self.tell("before_eval_exp")
            said = [(self.model(x).argmax(1) == y).float().mean() for x, y, _ in self.experience]
            self.accuracies[self.experience.current_experience] = float(torch.stack(said).mean())
            self.tell("after_eval_exp")
        (self.experience, self.dataloader), _ = was, self.model.train()


def optimizer_of(model):
    return torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1)


def stand_in():
    """Modules under Avalanche's names, with what hatcl takes from them."""
    taken = {
        "avalanche": [],
        "avalanche.benchmarks": ["benchmark_from_datasets", "with_classes_timeline", "with_task_labels"],
        "avalanche.benchmarks.utils": ["DataAttribute", "TaskAwareClassificationDataset", "TaskLabels"],
        "avalanche.core": ["SupervisedPlugin"],
    }
    made = {name: types.ModuleType(name) for name in taken}
    for module, names in taken.items():
        vars(made[module]).update(dict.fromkeys(names, Plugin))
    return made


class WithStandIn:
    real = False

    def __init__(self, plugin):
        self.plugin = plugin

    def stream(self, part="train", labels=True):
        out = []
        for task, data in enumerate(problems()):
            x, y = floats(getattr(data, f"x_{part}")), torch.from_numpy(getattr(data, f"y_{part}"))
            parts = zip(x.split(SIZE), y.split(SIZE), strict=True)
            batches = [(a, b, torch.full_like(b, task)) for a, b in parts]
            out.append(Experience(batches, task, [task] if labels else None))
        return out

    def strategy(self, model, *plugins, **options):
        return StandIn(model, optimizer_of(model), [*plugins], **options)

    def accuracy(self, strategy, task):
        return strategy.accuracies[task]

    def inputs(self, task):
        return floats(problems()[task].x_test)


class WithAvalanche(WithStandIn):
    real = True

    def stream(self, part="train", labels=True):
        from avalanche.benchmarks import benchmark_from_datasets

        from hatcl.integrations.avalanche import image_benchmark

        made = image_benchmark(problems())
        if labels:
            return getattr(made, f"{part}_stream")
        from avalanche.benchmarks.utils import as_classification_dataset

        rows = torch.utils.data.TensorDataset(X, torch.zeros(len(X), dtype=torch.long))
        rows.targets = [0] * len(X)
        return benchmark_from_datasets(train=[as_classification_dataset(rows)] * 2).train_stream

    def strategy(self, model, *plugins, kind="Naive", **options):
        from avalanche.evaluation.metrics import accuracy_metrics, forgetting_metrics, loss_metrics
        from avalanche.training import supervised
        from avalanche.training.plugins import EvaluationPlugin

        measures = [accuracy_metrics(experience=True, stream=True), loss_metrics(epoch=True)]
        evaluator = EvaluationPlugin(*measures, forgetting_metrics(stream=True), loggers=[])
        return getattr(supervised, kind)(
            model=model, criterion=nn.CrossEntropyLoss(), optimizer=optimizer_of(model), train_mb_size=SIZE,
            train_epochs=EPOCHS, eval_mb_size=64, plugins=[*plugins], evaluator=evaluator, **options,
        )  # fmt: skip

    def accuracy(self, strategy, task):
        found = strategy.evaluator.get_last_metrics()
        return found[f"Top1_Acc_Exp/eval_phase/test_stream/Task{task:03}/Exp{task:03}"]

    def inputs(self, task):
        return torch.stack([row[0] for row in self.stream("test")[task].dataset])


AVALANCHE = pytest.param("avalanche", marks=pytest.mark.skipif(not REAL, reason="avalanche-lib is not installed"))


@pytest.fixture(params=["stand-in", AVALANCHE])
def host(request, monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "avalanche"] if request.param == "stand-in" else ():
        monkeypatch.delitem(sys.modules, name)
    for name, module in stand_in().items() if request.param == "stand-in" else ():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "hatcl.integrations.avalanche", raising=False)
    plugin = importlib.import_module("hatcl.integrations.avalanche").HATPlugin
    yield (WithStandIn if request.param == "stand-in" else WithAvalanche)(plugin)
    sys.modules.pop("hatcl.integrations.avalanche", None)


# --- what is learned ---


@functools.cache
def problems():
    """A bright corner tells the class; another corner for each task."""
    draw, out = np.random.default_rng(0), []
    for task in range(TASKS):
        arrays = {}
        for part, count in (("train", 32), ("test", 16)):
            x, y = draw.integers(0, 120, (count, 4, 4, 3), dtype=np.uint8), draw.integers(0, 2, count)
            x[:, task, task] += (120 * y[:, None]).astype(np.uint8)
            arrays |= {f"x_{part}": x, f"y_{part}": y}
        out.append(ImageData(f"corner {task}", **arrays, num_classes=2))
    return out


def floats(images):
    return (torch.from_numpy(images).float() / 127 - 1).permute(0, 3, 1, 2).contiguous()


@functools.cache
def made():
    torch.manual_seed(0)
    return hatcl.convert(nn.Sequential(nn.Flatten(), nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, 2)), TASKS, X[:2])


def said(model, task):
    with hatcl.task(model.eval(), task), torch.no_grad():
        return model(X).clone()


def bits(model):
    return {name: x.clone() for name, x in model.state_dict().items()}


def test_each_experience_is_learned_sealed_and_kept(host):
    model, before = copy.deepcopy(made()), []
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="task ")  # sealed after another number of steps than was expected
        strategy = host.strategy(model, host.plugin())
        for task, experience in enumerate(host.stream()):
            strategy.train(experience)
            assert hatcl.tasks(model) == list(range(task + 1))
            before.append(said(model, task))
    assert all(same_bits(said(model, t), want) for t, want in enumerate(before)) and hatcl.certify(model, X).exact


def test_evaluation_is_under_each_experiences_own_task(host):
    model = copy.deepcopy(made())
    strategy = host.strategy(model, host.plugin())
    for experience in host.stream()[:2]:
        strategy.train(experience)
    strategy.eval(host.stream("test"))
    for task, data in enumerate(problems()):
        with hatcl.task(model.eval(), task if task < 2 else None), torch.no_grad():
            right = (model(host.inputs(task)).argmax(1) == torch.from_numpy(data.y_test)).float().mean()
        assert host.accuracy(strategy, task) == pytest.approx(float(right), abs=1e-6)


def test_without_the_plugins_part_in_it_evaluation_is_under_the_last_task(host):
    """The twin of the test above."""
    model, plugin = copy.deepcopy(made()), host.plugin()
    plugin.before_eval_exp = lambda *args, **kwargs: None
    strategy = host.strategy(model, plugin)
    for experience in host.stream()[:2]:
        strategy.train(experience)
    strategy.eval(host.stream("test"))
    for task, data in enumerate(problems()):
        with hatcl.task(model.eval(), 1), torch.no_grad():
            right = (model(host.inputs(task)).argmax(1) == torch.from_numpy(data.y_test)).float().mean()
        assert host.accuracy(strategy, task) == pytest.approx(float(right), abs=1e-6)
    assert host.accuracy(strategy, 0) < 1


def test_evaluation_in_the_middle_of_training_changes_nothing(host):
    ends = []
    for every in (-1, 1):
        model = copy.deepcopy(made())
        strategy = host.strategy(model, host.plugin(), eval_every=every)
        for experience in host.stream()[:2]:
            drawn = [host.stream("test")[1:]] if every > 0 else []
            torch.manual_seed(0)  # by which Avalanche shuffles, and which its evaluation draws from as well
            strategy.train(experience, drawn)
        ends.append([said(model, t) for t in (0, 1)])
        assert hatcl.certify(model, X).exact
    if not host.real:
        assert all(same_bits(a, b) for a, b in zip(*ends, strict=True))


def test_the_penalty_counts_once_per_step(host):
    model, plugin, seen = copy.deepcopy(made()), host.plugin(), {}
    embedding, update = model.hat_gates.embeddings[0], plugin.before_update

    def around(strategy, *args, **kwargs):
        before = embedding.grad.clone()
        update(strategy, *args, **kwargs)
        if not seen:
            seen["added"] = embedding.grad - before
            seen["penalty"] = torch.autograd.grad(plugin.learning.penalty(), embedding)[0]

    plugin.before_update = around
    host.strategy(model, plugin).train(host.stream()[0])
    assert seen["penalty"].abs().sum() > 0
    torch.testing.assert_close(seen["added"], seen["penalty"], rtol=1e-4, atol=1e-7)  # a difference of floats


@pytest.mark.parametrize("inside", [True, False], ids=["with the plugin", "without"])
def test_an_error_seals_nothing(host, inside):
    model, plugin = copy.deepcopy(made()), host.plugin()
    strategy = host.strategy(model, plugin)
    stream = host.stream()
    strategy.train(stream[0])
    want, step, count = said(model, 0), strategy.optimizer.step, [0]

    def failing(*args, **kwargs):
        count[0] += 1
        if count[0] == 3:
            raise ZeroDivisionError
        return step(*args, **kwargs)

    strategy.optimizer.step = failing
    with pytest.raises(ZeroDivisionError):
        with plugin if inside else contextlib.nullcontext():
            strategy.train(stream[1])
    strategy.optimizer.step = step
    assert (plugin.learning is None) == inside and hatcl.tasks(model) == [0]
    strategy.train(stream[1])
    assert hatcl.tasks(model) == [0, 1] and same_bits(said(model, 0), want)


def test_what_is_refused(host, monkeypatch):
    model = copy.deepcopy(made())
    strategy = host.strategy(model, host.plugin())
    with pytest.raises(hatcl.ConfigError, match="experience 0 has no task label, and hard attention needs to know"):
        strategy.train(host.stream(labels=False)[0])
    strategy.train_epochs = 0
    with pytest.raises(hatcl.ConfigError, match=r"task 0 has 2 batches and 0 epochs, so there is nothing to learn"):
        strategy.train(host.stream()[0])
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    with pytest.raises(hatcl.ConfigError, match="2 processes, and Avalanche gives .*DistributedDataParallel"):
        host.plugin().before_training_exp(strategy)
    monkeypatch.undo()
    assert hatcl.tasks(model) == [] and model.hat_gates.learning is None


def test_an_experience_of_a_sealed_task_is_refused(host):
    model = copy.deepcopy(made())
    strategy = host.strategy(model, host.plugin())
    strategy.train(host.stream()[0])
    before = bits(model)
    text = "experience 0 has the task label 0, and that task is sealed; each task is one.*task_incremental_benchmark"
    with pytest.raises(hatcl.TaskError, match=text):
        strategy.train(host.stream()[0])
    assert all(same_bits(x, before[name]) for name, x in model.state_dict().items())


def test_batches_of_another_task_are_refused(host):
    """Replay, which HAT has no use for, would teach the new task the old one's examples in silence."""
    model, plugin = copy.deepcopy(made()), host.plugin()
    if host.real:
        from avalanche.training.plugins import ReplayPlugin

        strategy = host.strategy(model, plugin, ReplayPlugin(mem_size=20))
    else:
        strategy = host.strategy(model, plugin)
    stream = host.stream()
    strategy.train(stream[0])
    want = said(model, 0)
    if not host.real:
        stream[1][1] = stream[0][1]
    with plugin, pytest.raises(hatcl.TaskError, match="a batch holds examples of task 0 while task 1 is learned"):
        strategy.train(stream[1])
    assert hatcl.tasks(model) == [0] and same_bits(said(model, 0), want)


# --- Avalanche alone ---


alone = pytest.mark.parametrize("host", [AVALANCHE], indirect=True)


@alone
def test_a_run_is_resumed_between_experiences(host):
    """Exact, with the optimizer's state: Avalanche clears it once, at the first experience of a strategy."""
    stream, model = host.stream(), copy.deepcopy(made())
    strategy = host.strategy(model, host.plugin())
    strategy.train(stream[0])
    kept = copy.deepcopy([model.state_dict(), strategy.optimizer.state_dict(), torch.get_rng_state()])
    strategy.train(stream[1])
    again = copy.deepcopy(made())
    resumed = host.strategy(again, host.plugin())
    again.load_state_dict(kept[0])
    resumed.make_optimizer(reset_optimizer_state=True)
    resumed.optimizer.load_state_dict(kept[1])
    torch.set_rng_state(kept[2])
    resumed.train(stream[1])
    assert hatcl.tasks(again) == [0, 1] and all(same_bits(said(again, t), said(model, t)) for t in (0, 1))


@alone
def test_the_best_epoch_of_early_stopping_is_sealed(host):
    from avalanche.training.plugins import EarlyStoppingPlugin

    model = copy.deepcopy(made())
    stop = EarlyStoppingPlugin(1, "test_stream", mode="min")  # the first epoch that is no worse than the best ends it
    strategy = host.strategy(model, host.plugin(), stop, eval_every=1)
    stream, test = host.stream(), host.stream("test")
    strategy.train(stream[0], [[test[0]]])
    want = said(model, 0)
    with pytest.warns(UserWarning, match="task 1 is sealed after"):
        strategy.train(stream[1], [[test[1]]])
    assert same_bits(said(model, 0), want) and hatcl.tasks(model) == [0, 1] and hatcl.certify(model, X).exact
    best = stop.best_state
    assert all(same_bits(x, best[name]) for name, x in model.named_parameters() if name in best)


@alone
@pytest.mark.parametrize("kind, options", [("EWC", {"ewc_lambda": 0.1}), ("LwF", {"alpha": 1.0, "temperature": 2.0})])
def test_other_strategies(host, kind, options):
    model = copy.deepcopy(made())
    strategy = host.strategy(model, host.plugin(), kind=kind, **options)
    stream = host.stream()
    strategy.train(stream[0])
    want = said(model, 0)
    strategy.train(stream[1])
    assert same_bits(said(model, 0), want) and hatcl.tasks(model) == [0, 1]


@alone
def test_its_own_metrics_see_no_forgetting(host):
    model = copy.deepcopy(made())
    strategy = host.strategy(model, host.plugin())
    for experience in host.stream():
        strategy.train(experience)
        found = strategy.eval(host.stream("test"))
    assert found["StreamForgetting/eval_phase/test_stream"] == 0
    assert np.isfinite(found["Loss_Epoch/train_phase/train_stream/Task000"])


# two processes: Avalanche shares the batches out, DistributedDataParallel averages the gradients
PROGRAM = """
import os, sys, torch
from avalanche.training import supervised
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, FOLDER)
import test_avalanche as t
import hatcl
from hatcl.integrations.avalanche import HATPlugin

rank, port = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{port}", rank=rank, world_size=2)
model, host = t.copy.deepcopy(t.made()), t.WithAvalanche(HATPlugin)
strategy = host.strategy(DistributedDataParallel(model), HATPlugin())
stream = host.stream()
torch.manual_seed(rank)
strategy.train(stream[0])
want = t.said(model, 0)
strategy.train(stream[1])
mine = torch.stack([t.said(model, 0), t.said(model, 1)])
both = [torch.empty_like(mine) for _ in range(2)]
distributed.all_gather(both, mine)
assert torch.equal(*both) and t.same_bits(mine[0], want) and hatcl.tasks(model) == [0, 1]
assert hatcl.certify(model, t.X).exact
distributed.destroy_process_group()
"""


@alone
def test_two_processes(host, tmp_path):
    program = PROGRAM.replace("FOLDER", repr(str(Path(__file__).parent)))
    commands = [[sys.executable, "-W", "ignore", "-c", program, str(rank), str(tmp_path / "met")] for rank in (0, 1)]
    running = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for c in commands]
    said = [p.communicate(timeout=120)[0] for p in running]
    assert [p.returncode for p in running] == [0, 0], "\n".join(said)


@pytest.mark.slow
def test_with_avalanche_itself():
    python = os.environ.get("HATCL_AVALANCHE")
    if python is None:
        pytest.skip("HATCL_AVALANCHE is not set: the path of a Python that has hatcl and avalanche-lib")
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs", str(Path(__file__))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0 and "avalanche-lib" not in done.stdout, done.stdout
    example = Path(__file__).parents[2] / "examples" / "avalanche_strategies.py"
    assert "exact" in subprocess.run([python, str(example)], capture_output=True, text=True, check=True).stdout
