"""What must hold for every kind of layer, on every entry of `layer_zoo.py`: M1 to M5, M7, copies, state dicts."""

from __future__ import annotations

import copy
import functools
import pickle

import layer_zoo as zoo
import parts
import pytest
import torch
from torch import nn

import hatcl
from hatcl.hat.gates import gates_of
from hatcl.hat.held import held, own_buffers
from hatcl.hat.layers.gated import HATLayer
from hatcl.hat.registry import layer_for, registered


@functools.cache
def _converted(name):
    torch.manual_seed(1)
    return hatcl.convert(zoo.make(name), 3, zoo.data(name)[0])


def convert(name):
    """The same model each time: converting it takes longer than most of what is tried on it."""
    model = copy.deepcopy(_converted(name))
    torch.manual_seed(1)
    return model


@pytest.fixture(params=zoo.ZOO)
def name(request):
    if request.param.startswith("transformers_"):
        pytest.importorskip("transformers", reason="needs the extra: pip install 'hatcl[hf]'")
    return request.param


def optimizers(name, model):
    sparse = [p for n, p in model.named_parameters() if name == "embedding_sparse" and n == "embedding.weight"]
    rest = [p for p in model.parameters() if all(p is not s for s in sparse)]
    out = [torch.optim.AdamW(rest, lr=1e-2, weight_decay=0.05)]
    return out + [torch.optim.SparseAdam(sparse, lr=1e-2)] if sparse else out


class Several:
    """Optimizers that are stepped together."""

    def __init__(self, all_of_them):
        self.all = all_of_them

    def zero_grad(self):
        for o in self.all:
            o.zero_grad()

    def step(self):
        for o in self.all:
            o.step()


def test_every_registered_layer_is_in_the_zoo():
    seen = {layer_for(type(m)) for name in zoo.ZOO for m in zoo.make(name).modules()}
    ours = {base: layer for base, layer in registered().items() if not base.__module__.startswith("test")}
    missing = {base.__name__ for base, layer in ours.items() if layer not in seen}
    assert not missing, f"add a small model with these to tests/layer_zoo.py: {missing}"


def test_it_is_what_it_replaces_and_knows_its_parameters(name):
    source, model = zoo.make(name), hatcl.convert(zoo.make(name), 3, zoo.data(name)[0])
    for path, module in source.named_modules():
        made = model.get_submodule(path)
        kind = (
            type(module).__mro__[1] if name in zoo.CANNOT_PICKLE else type(module)
        )  # such a class is made per instance
        assert isinstance(made, kind)
        own = [n for n, p in module._parameters.items() if p is not None]
        assert not own or isinstance(made, HATLayer), path
        for key in own:
            assert getattr(made, key) is made._parameters[key]  # no task: the parameter itself
    assert repr(model)
    names = [n for n, _ in source.named_parameters(remove_duplicate=False)]
    assert set(names) <= {n for n, _ in model.named_parameters(remove_duplicate=False)}
    assert set(source.state_dict()) <= set(model.state_dict())


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_without_a_task_it_is_the_source_bit_for_bit(name, training):
    """M2, forward and backward, and the statistics that a training forward leaves."""
    if training and name in zoo.CANNOT_TRAIN_HERE:
        pytest.skip(zoo.CANNOT_TRAIN_HERE[name])
    source, model = zoo.make(name).train(training), convert(name).train(training)
    x, _ = zoo.data(name)
    outs, grads = [], []
    for m in (source, model):
        torch.manual_seed(3)
        outs.append(m(x))
        outs[-1].square().sum().backward()
        grads.append({n: p.grad.to_dense() for n, p in m.named_parameters() if p.grad is not None})
    assert torch.equal(*outs)
    assert parts.same(*grads)
    buffers = dict(source.named_buffers())
    assert parts.same(buffers, {n: b for n, b in model.named_buffers() if n in buffers})
    with torch.no_grad():
        torch.manual_seed(3)
        plain = source(x)
        torch.manual_seed(3)
        assert torch.equal(model(x), plain)


def test_conversion_leaves_the_source_as_it_was(name):
    source = zoo.make(name)
    x, _ = zoo.data(name)
    before, classes = parts.snapshot(source), [type(m) for m in source.modules()]
    modes = [m.training for m in source.modules()]
    hatcl.convert(source, 2, x)
    assert parts.same(before, source.state_dict())
    assert [type(m) for m in source.modules()] == classes
    assert [m.training for m in source.modules()] == modes
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in source.modules())


def test_a_task_depends_on_nothing_that_is_not_its_own(name):
    """M7 with random gates: everything else overwritten with large numbers, outputs bit-equal."""
    model = parts.pretend(convert(name))
    x, _ = zoo.data(name)
    for t in range(3):
        assert parts.leaks(model, x, t) is None
    outs = [parts.logits(model, t, x) for t in range(3)]
    assert not torch.equal(outs[0], outs[1]) and not torch.equal(outs[1], outs[2])


def test_the_certificate_sees_gates_that_are_not_there(name, monkeypatch):
    """Twin: parameters unfolded and outputs ungated, so that off units reach what follows."""
    model = parts.pretend(convert(name), share=0.5)
    x, _ = zoo.data(name)
    monkeypatch.setattr(HATLayer, "_hat_folded", lambda self, name, raw, task: raw)
    monkeypatch.setattr(HATLayer, "_hat_gate_output", lambda self, out: out)
    for module in ("gated", "norm", "linear"):
        monkeypatch.setattr(f"hatcl.hat.layers.{module}.multiply", lambda x, units, dim: x)
    if all(e.copied for e in gates_of(model)[0].unit_map.entries.values()):
        pytest.skip("every parameter is copied per task: there is nothing to gate")
    found = [hatcl.certify(model, x)]
    assert not found[0].exact
    with pytest.raises(hatcl.IsolationError, match="NOT exact"):
        hatcl.certify(model, x, strict=True)


def test_it_learns_and_earlier_tasks_stay(name):
    if name in zoo.CANNOT_TRAIN_HERE:
        pytest.skip(zoo.CANNOT_TRAIN_HERE[name])
    model = convert(name)
    several = optimizers(name, model)
    x, _ = zoo.data(name)
    want, buffers = {}, {}
    for t in range(3):
        before = {h.name: h.param.detach().clone() for h in held(model) if h.task in (None, t)}
        images, y = zoo.data(name, t)
        losses = []
        stepped = Several(several)
        with hatcl.learn(model, t, several, steps=10) as learning:
            for _ in range(10):
                loss = nn.functional.cross_entropy(model(images), y)
                stepped.zero_grad()
                (loss + learning.penalty()).backward()
                stepped.step()
                losses.append(loss.item())
        if name != "act_Softshrink":  # its outputs are all zero at this size: it learns the head's bias only
            assert min(losses[-2:]) < max(losses[:2])
        moved = [h.name for h in held(model) if h.task in (None, t) and not torch.equal(h.param, before[h.name])]
        shared = [h.name for h in held(model) if h.task is None and not h.plain]
        assert set(moved) & set(shared) or not shared
        for earlier, out in want.items():
            assert torch.equal(parts.logits(model, earlier, x), out)
            assert parts.same(dict(own_buffers(model, earlier)), buffers[earlier])
        want[t] = parts.logits(model, t, x)
        buffers[t] = {n: b.clone() for n, b in own_buffers(model, t)}
    assert hatcl.certify(model, x).exact


def test_a_sealed_task_in_training_mode_moves_nothing(name):
    if name in zoo.CANNOT_TRAIN_HERE:
        pytest.skip(zoo.CANNOT_TRAIN_HERE[name])
    model = parts.pretend(convert(name), tasks=[0])
    x, _ = zoo.data(name)
    before = parts.snapshot(model)
    with hatcl.task(model.train(), 0):
        model(x)
    assert parts.same(before, parts.snapshot(model))


def test_evaluation_is_the_same_with_and_without_gradients(name):
    model = parts.pretend(convert(name)).eval()
    x, _ = zoo.data(name)
    for t in range(3):
        with hatcl.task(model, t):
            free = model(x).detach()
        if name.startswith("encoder"):  # torch's attention without gradients is another kernel: measured 1.8e-7
            assert torch.allclose(free, parts.logits(model, t, x), atol=1e-6, rtol=0)
        else:
            assert torch.equal(free, parts.logits(model, t, x))


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "state_dict": None,
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_keep_sealed_tasks(name, how):
    if how == "pickle" and name in zoo.CANNOT_PICKLE:
        pytest.skip("torch does not pickle parametrized modules")
    model = parts.pretend(convert(name), tasks=[0, 2], share=0.4)
    x, _ = zoo.data(name)
    want = {t: parts.logits(model, t, x) for t in (0, 2)}
    if how == "state_dict":
        made = convert(name)
        with torch.no_grad():
            made.eval()(x)
        made.load_state_dict(model.state_dict())
    else:
        made = COPIES[how](model)
    assert hatcl.tasks(made) == [0, 2]
    assert all(torch.equal(parts.logits(made, t, x), want[t]) for t in want)
    assert hatcl.certify(made, x, strict=True).exact
    assert not {id(p) for p in made.parameters()} & {id(p) for p in model.parameters()}
    if name not in zoo.CANNOT_TRAIN_HERE and name != "embedding_sparse":
        with torch.no_grad():  # the copy learns on its own
            for p in made.parameters():
                assert p.requires_grad
        parts.train(made, 1, torch.optim.AdamW(made.parameters(), 1e-2), zoo.data(name, 1), 2)
        assert all(torch.equal(parts.logits(m, t, x), want[t]) for m in (made, model) for t in want)


def test_a_unit_that_is_off_is_exactly_zero_wherever_it_is_read(name):
    """What enters a layer that reads it with its weight is zero there, or that weight's column is."""
    model = parts.pretend(convert(name)).eval()
    g = gates_of(model)[0]
    x, _ = zoo.data(name)
    names = {id(p): n for n, p in model.named_parameters(remove_duplicate=True)}
    checked = []

    def look(module, args):
        weight = module._parameters["weight"]
        entry = g.unit_map.entries.get(names.get(id(weight), ""))
        if entry is None or len(args[0].shape) < 2:
            return
        on = torch.cat([torch.ones(1, dtype=torch.bool), g.masks[0]])
        linear = isinstance(module, nn.Linear)
        for f in entry.factors:
            reads = 1 if not getattr(module, "transposed", False) else 0
            if f.owner or f.axis != reads or getattr(module, "groups", 1) > 1:
                continue
            off = ~on[torch.as_tensor(f.units)]
            channels = args[0].movedim(-1 if linear else 1, 0)
            silent = bool((channels[off] == 0).all())
            column = bool((module.weight.movedim(f.axis, 0)[off] == 0).all())
            assert silent or column, (names[id(weight)], f.axis)
            checked.append(int(off.sum()))

    plain = (nn.Linear, nn.modules.conv._ConvNd)
    hooks = [
        m.register_forward_pre_hook(look) for m in model.modules() if isinstance(m, plain) and "weight" in m._parameters
    ]
    with torch.no_grad(), hatcl.task(model, 0):
        model(x)
    for h in hooks:
        h.remove()
    factors = [f for e in g.unit_map.entries.values() for f in e.factors if not f.owner]
    assert (
        not factors
        or sum(checked) > 0
        or "group" in name
        or "depthwise" in name
        or name.startswith(("LSTM", "GRU", "RNN"))
    )


def test_forgetting_any_task_leaves_the_others(name):
    model = parts.pretend(convert(name))
    x, _ = zoo.data(name)
    before = {h.name: h.param.detach().clone() for h in held(model)}
    want = {t: parts.logits(model, t, x) for t in (0, 2)}
    plan = hatcl.forget_task(model, 1, dry_run=True)
    assert all(torch.equal(h.param, before[h.name]) for h in held(model))
    report = hatcl.forget_task(model, 1)
    assert report.erased == plan.erased and report.own == plan.own
    for h in held(model):
        if h.task is None and not h.plain:
            changed = int((h.param.detach() != before[h.name]).sum())
            erased = report.erased.get(h.name, 0)
            if changed != erased:  # an initialiser that gives constants (zeros, ones) may give the same again
                fresh = h.param.detach()[h.param.detach() == before[h.name]]
                assert changed < erased and fresh.unique().numel() <= erased, h.name
    assert all(torch.equal(parts.logits(model, t, x), want[t]) for t in want)
    assert hatcl.tasks(model) == [0, 2]
    assert hatcl.certify(model, x).exact
