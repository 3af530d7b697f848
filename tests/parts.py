"""What the tests are put together from: small real models and problems, and the ways to train, seal and attack them."""

from __future__ import annotations

import copy
import functools

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as tf

import hatcl
from hatcl.hat.certify import attack, named_outputs
from hatcl.hat.digests import record
from hatcl.hat.gates import gates_of
from hatcl.hat.held import held, own_buffers
from hatcl.hat.layers import HATLayer

CLASSES = 4


def mlp(width=32, norm=None, act=nn.ReLU, inputs=48):
    norm = norm or (lambda n: nn.Identity())
    return nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, width), norm(width), act(), nn.Linear(width, width), norm(width), act(),
        nn.Linear(width, CLASSES),
    )  # fmt: skip


def resnet(**options):
    options = {"num_classes": CLASSES, "channels": (8, 12, 12, 16), "stem_width": 8, **options}
    return timm.create_model("test_resnet", **options)


def vit(**options):
    small = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": CLASSES}
    return timm.create_model("test_vit", **{**small, **options})


MODELS = {"mlp": (mlp, (3, 4, 4)), "resnet": (resnet, (3, 32, 32)), "vit": (vit, (3, 16, 16))}


def shape_of(name):
    return MODELS[name][1]


def plain(name, seed=0):
    torch.manual_seed(seed)
    return MODELS[name][0]()


@functools.cache
def _converted(name, num_tasks, options):
    torch.manual_seed(1)
    return hatcl.convert(plain(name), num_tasks, images(name, 2), config=dict(options))


def converted(name, num_tasks=3, **options):
    """A HAT model of `MODELS`, the same one each time."""
    return copy.deepcopy(_converted(name, num_tasks, tuple(sorted(options.items()))))


def images(name, count=8, seed=0):
    return torch.randn(count, *shape_of(name), generator=torch.Generator().manual_seed(seed))


def problem(shape, task=0, count=16, classes=CLASSES):
    """x `[count, *shape]`, y `[count]`: a pattern per class, drawn per task, under noise."""
    generator = torch.Generator().manual_seed(100 + task)
    y = torch.arange(count) % classes
    pattern = torch.randn(classes, *shape, generator=generator)
    return pattern[y] + 0.3 * torch.randn(count, *shape, generator=generator), y


def train(
    model, task, optimizer, data, steps=6, *, autocast=False, micro=1, clip=None, weight=1.0, inside=None, **options
):
    """Learn a task the way a user would; returns the losses. inside(step) runs between forward and backward."""
    x, y = data
    losses = []
    with hatcl.learn(model, task, optimizer, steps, **options) as learning:
        for step in range(steps):
            total = 0.0
            optimizer.zero_grad()
            for part in range(micro):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = tf.cross_entropy(model(x[part::micro]).float(), y[part::micro]) / micro
                    objective = loss + weight * learning.penalty() / micro
                if inside is not None:
                    inside(step)
                objective.backward()
                total += loss.item()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            losses.append(total)
    return losses


def logits(model, task, x, autocast=False):
    """A task's outputs in evaluation mode; the model's mode and task are as before."""
    training = model.training
    model.eval()
    with torch.no_grad(), hatcl.task(model, task), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(x).clone()
    model.train(training)
    return out


def pretend(model, tasks=None, share=0.6, seed=0, own=True):
    """Seal tasks with random gates, and own copies and statistics that differ, without training."""
    generator = torch.Generator().manual_seed(seed)
    every = gates_of(model)
    for t in range(every[0].num_tasks) if tasks is None else tasks:
        with torch.no_grad():
            for g in every:
                on = torch.rand(g.num_units, generator=generator) < share
                g.embeddings[t].copy_(torch.where(on, 1.0, -1.0))
                g.seal(t)
            for h in held(model):
                if own and h.task == t and "embeddings" not in h.name and h.param.is_floating_point():
                    h.param.add_(0.1 * torch.randn(h.param.shape, generator=generator).to(h.param))
            for name, b in own_buffers(model, t):
                if own and "running" in name:
                    b.add_(0.1 * torch.rand(b.shape, generator=generator).to(b))
        record(model, t)
    return model


def outputs_of(model, inputs, task):
    """Every value that the model puts out for a task."""
    return list(named_outputs(model, inputs, task).values())


def leaks(model, inputs, task, **options):
    """The largest difference that overwriting all that is not a task's own makes to its outputs (None: bit-equal)."""
    trial = copy.deepcopy(model).eval()
    with torch.no_grad():
        want = outputs_of(trial, inputs, task)
        with attack(trial, task, **options) as count:
            got = outputs_of(trial, inputs, task)
    assert count > 0, "an attack that overwrites nothing proves nothing"
    assert all(torch.isfinite(w).all() for w in want if w.is_floating_point())
    if all(torch.equal(a, b) for a, b in zip(want, got, strict=True)):
        return None
    return max(float((a - b).abs().nan_to_num(torch.inf).max()) for a, b in zip(want, got, strict=True))


def same(before, after):
    """Two state dicts (or dicts of tensors), bit for bit."""
    return before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def snapshot(model):
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


# ---- the network physically cut down to a task's units (M1) ---------------------------------------


def ends(model, name, task):
    """Which rows and which inputs of a weight a task has on: (owner, reader) masks, None where always on."""
    on = torch.cat([torch.ones(1, dtype=torch.bool), gates_of(model)[0].masks[task]])
    found = {True: None, False: None}
    for f in gates_of(model)[0].unit_map.entries[name].factors:
        found[f.owner] = on[torch.as_tensor(f.units)]
    return found[True], found[False]


def _set(module, name, value):
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(value.clone())
    else:
        module._buffers[name] = value.clone()


class GroupsCut(nn.Module):
    """A group norm some of whose channels are gone: every group over what is left of it."""

    def __init__(self, norm, on):
        super().__init__()
        size = len(on) // norm.num_groups
        self.norm, self.on = norm, on
        self.groups = [i * size + on[i * size : (i + 1) * size].nonzero().flatten() for i in range(norm.num_groups)]

    def forward(self, x):
        wide = x.new_zeros(x.shape[0], len(self.on), *x.shape[2:])
        wide[:, self.on] = x
        out = torch.zeros_like(wide)
        for index in self.groups:
            if len(index):
                w, b = self.norm.weight, self.norm.bias
                part = tf.group_norm(
                    wide[:, index], 1, None if w is None else w[index], None if b is None else b[index], self.norm.eps
                )
                out[:, index] = part
        return out[:, self.on]


def cut(source, model, task):
    """`source`, an `nn.Sequential` without branches, physically cut down to what `task` has on: smaller weights, no
    gates. Written against the map's masks alone, with plain torch."""
    steps, live = [], None
    for i, step in enumerate(source):
        step, hat = copy.deepcopy(step), model[i]
        own = hat.hat_tasks[task] if "hat_tasks" in hat._modules else None
        values = {**dict(hat._parameters), **{n: b for n, b in step._buffers.items()}}
        if own is not None:
            values.update({**own._parameters, **own._buffers})
        if isinstance(step, (nn.Linear, nn.modules.conv._ConvNd)):
            rows, columns = 0, 1
            if getattr(step, "transposed", False):
                rows, columns = 1, 0
            w, b = values["weight"], values.get("bias")
            owner, reader = ends(model, f"{i}.weight", task)
            depthwise = getattr(step, "groups", 1) > 1
            if live is not None and not depthwise:
                w = w.movedim(columns, 0)[live].movedim(0, columns)
            if owner is not None and own is None:
                w = w.movedim(rows, 0)[owner].movedim(0, rows)
                b = None if b is None else b[owner]
                live = owner
                size = int(owner.sum())
                for attr in ("out_features", "out_channels"):
                    if hasattr(step, attr):
                        setattr(step, attr, size)
                if "gain" in values:  # of a standardised weight
                    _set(step, "gain", values["gain"][owner].detach())
                if depthwise:
                    step.groups = step.in_channels = size
            _set(step, "weight", w.detach())
            if b is not None:
                _set(step, "bias", b.detach())
        elif live is not None and isinstance(step, nn.GroupNorm) and step.num_groups > 1:
            for name, value in values.items():
                if value is not None:
                    _set(step, name, value.detach())
            step = GroupsCut(step, live)
        elif live is not None and (step._parameters or step._buffers or hasattr(step, "normalized_shape")):
            for name, value in values.items():
                if value is None or name not in {**step._parameters, **step._buffers}:
                    continue
                value = value.detach()
                _set(step, name, value[live] if value.dim() and len(value) == len(live) else value)
            if hasattr(step, "normalized_shape"):
                step.normalized_shape = (int(live.sum()), *step.normalized_shape[1:])
            if hasattr(step, "num_features"):
                step.num_features = int(live.sum())
            if isinstance(step, nn.GroupNorm):
                step.num_channels = int(live.sum())
        steps.append(step)
    return nn.Sequential(*steps)


def unchanged(source, run, error, text):
    """A conversion that fails with this error, and leaves the plain model as it was."""
    before, classes, modes = snapshot(source), [type(m) for m in source.modules()], source.training
    names = [n for n, _ in source.named_modules()]
    with pytest.raises(error, match=text):
        run()
    assert same(before, source.state_dict()) and source.training == modes
    assert [type(m) for m in source.modules()] == classes and [n for n, _ in source.named_modules()] == names
    assert not any(isinstance(m, HATLayer) for m in source.modules())


def exact_and_learning(model, data, tasks=3, lr=1e-2):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
    x = data[0][0]
    want = {}
    for t in range(tasks):
        losses = train(model, t, optimizer, data[t], 12)
        assert min(losses[-2:]) < max(losses[:2])
        want[t] = logits(model, t, x)
        for e in want:
            assert torch.equal(logits(model, e, x), want[e])
    certificate = hatcl.certify(model, x, strict=True)
    assert certificate.exact and min(certificate.overwritten.values()) > 0
    assert len({tuple(o.flatten().tolist()) for o in want.values()}) == tasks
