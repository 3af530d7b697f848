"""M1 for norms: the gated model computes what the physically cut one does. M3: a soft gate acts once."""

from __future__ import annotations

import layer_zoo as zoo
import parts
import pytest
import torch
from torch import nn
from torch.nn import functional as tf

import hatcl
from hatcl import functional
from hatcl.hat import convert as converting
from hatcl.hat.binding import ParameterPlan
from hatcl.hat.gates import gates_of
from hatcl.hat.layers import norm as norms

# In float64 the largest difference seen on any entry is 2.1e-12 (a layer norm of nearly constant inputs, eps 1e-6).
TOLERANCE = 1e-10
CHAINS = [
    name
    for name, (build, _) in zoo.ZOO.items()
    if isinstance(made := build(), nn.Sequential)
    and not any(list(step.children()) for step in made)
    and "grouped" not in name
    and name not in ("act_GLU", "layer_norm_over_images")
]
STANDARDISED = [name for name in CHAINS if "StdConv" in name]


def pair(name, share=0.6):
    """Source and model with sealed random gates, in float64."""
    x, _ = zoo.data(name)
    source = zoo.make(name)
    model = parts.pretend(hatcl.convert(source, 3, x).double(), share=share)
    return source.double(), model, x.double()


def gap(source, model, x, training=False):
    """The largest difference to the cut network, over tasks."""
    gaps = []
    for t in range(3):
        small = parts.cut(source, model, t).train(training)
        model.train(training)
        with torch.no_grad(), hatcl.task(model, t):
            gaps.append(float((model(x) - small(x)).abs().max()))
    return max(gaps)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", CHAINS)
def test_it_computes_what_the_physically_cut_network_computes(name, training):
    if training and (name in zoo.CANNOT_TRAIN_HERE or name == "act_RReLU"):
        pytest.skip("random, or needs an accelerator, while training")
    source, model, x = pair(name)
    sizes = {t: sum(p.numel() for p in parts.cut(source, model, t).parameters()) for t in range(3)}
    assert max(sizes.values()) < sum(p.numel() for p in source.parameters())
    assert gap(source, model, x, training) < TOLERANCE


@pytest.mark.parametrize("name", STANDARDISED)
def test_twin_a_weight_standardised_over_all_its_inputs_is_not_the_cut_networks(name, monkeypatch):
    converted = pair(name)
    monkeypatch.setattr(ParameterPlan, "over_units_on", lambda self, value, task: value)
    assert gap(*converted) > 1e-3


def test_float32_is_as_close_as_float32_gets():
    """The measured error of the same comparison in float32, so that a change of formula shows: 4.8e-7 at most."""
    worst = 0.0
    for name in ("mlp_layer_norm", "mlp_rms_norm", "group_norm", "batch_norm2d"):
        x, _ = zoo.data(name)
        source = zoo.make(name)
        worst = max(worst, gap(source, parts.pretend(hatcl.convert(source, 3, x), share=0.6), x))
    assert worst < 5e-6


OVER_UNITS = [
    "mlp_layer_norm", "mlp_rms_norm", "mlp_timm_rms_norm", "mlp_dirty_layer_norm", "group_norm", "timm_layer_norm_2d",
    "timm_rms_norm_2d",
]  # fmt: skip


@pytest.mark.parametrize("name", OVER_UNITS)
def test_twin_statistics_over_all_units_are_not_the_cut_networks(name, monkeypatch):
    source, model, x = pair(name)
    for cls in (norms._OverUnits, norms.TaskIndexedGroupNorm):
        monkeypatch.setattr(cls, "forward", _plain_forward(cls))
        monkeypatch.setattr(cls, "_hat_fold_of", lambda self, name, units, task: units.gate_of(task))
        monkeypatch.setattr(cls, "hat_fold_gate", lambda self, name, gate: gate)
    assert gap(source, model, x) > 1e-3


def _plain_forward(cls):
    """The forward of the torch class behind a norm, as if it knew nothing of units."""

    def forward(self, x):
        for base in type(self).__mro__:
            if base.__module__.startswith(("torch.nn", "timm.")) and "forward" in base.__dict__:
                return base.forward(self, x)
        raise AssertionError

    return forward


@pytest.mark.parametrize("on", ["none", "one", "all"])
@pytest.mark.parametrize("name", OVER_UNITS)
def test_the_ends_no_unit_one_unit_all_units(name, on):
    """No unit on: finite, the head's bias. All on: the plain model's numbers."""
    x, _ = zoo.data(name)
    source = zoo.make(name).double()
    model = hatcl.convert(source, 1, x.double()).double()
    g = gates_of(model)[0]
    with torch.no_grad():
        g.embeddings[0].fill_(1.0 if on == "all" else -1.0)
        if on == "one":
            for _, start, _ in g.layers:
                g.embeddings[0][start] = 1.0
    g.seal(0)
    out = parts.logits(model, 0, x.double())
    if on == "none":
        assert torch.equal(out, model[len(source) - 1].hat_tasks[0].bias.expand_as(out))
    elif on == "all":
        with torch.no_grad():
            assert float((out - source.eval()(x.double())).abs().max()) < TOLERANCE
    else:
        with torch.no_grad():
            small = parts.cut(source, model, 0).eval()(x.double())
        assert float((out - small).abs().max()) < TOLERANCE


# ---- M3: soft gates -------------------------------------------------------------------------------


def learning(model, scale=2.0):
    """Inside: task 0 is learned, at this scale; yields the gates `[U]` as they act."""
    g = gates_of(model)[0]
    g.task = g.learning = 0
    g.scale.fill_(scale)
    return torch.sigmoid(scale * g.embeddings[0]).detach()


def soft(step, norm):
    """A layer, a norm behind it and a head: the source and the model that learns, in float64, the gates a, inputs."""
    torch.manual_seed(2)
    layer = step()
    width = layer.weight.shape[0]
    behind = norm(width)
    with torch.no_grad():
        for p in behind.parameters():
            p.add_(0.3 * torch.randn(p.shape))
    image = layer.weight.dim() == 4
    tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten()] if image else []
    x = torch.randn(6, 3, 8, 8) if image else torch.randn(6, 10)
    source = nn.Sequential(layer, behind, *tail, nn.Linear(width, 4))
    model = hatcl.convert(source, 1, x).double()
    source = source.double()
    a = learning(model)
    return source, model, a, x.double()


def linear():
    return nn.Linear(10, 12)


def conv():
    return nn.Conv2d(3, 12, 3)


@pytest.mark.parametrize("step", [linear, conv])
def test_without_a_norm_the_gate_multiplies_what_the_layer_puts_out(step):
    source, model, a, x = soft(step, lambda n: nn.Identity())
    shape = (1, -1) if step is linear else (1, -1, 1, 1)
    assert torch.allclose(model[0](x), a.view(shape) * source[0](x), atol=1e-14, rtol=0)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_a_batch_norm_directly_behind_takes_the_gate(affine, training):
    """A batch norm would cancel a gate in front of it: what comes out of it is multiplied instead, once."""
    source, model, a, x = soft(conv, lambda n: nn.BatchNorm2d(n, affine=affine))
    source.train(training), model.train(training)
    want = source[0](x)
    assert torch.equal(model[0](x), want)
    want = a.view(1, -1, 1, 1) * source[1](want)
    assert torch.allclose(model[1](model[0](x)), want, atol=1e-13, rtol=0)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_a_norm_over_units_carries_the_gate_of_its_input_on(kind, affine):
    """x is `a * v`: the mean is over `sum a`, and v's gate is not applied a second time."""
    made = {"layer": nn.LayerNorm, "rms": lambda n, elementwise_affine: nn.RMSNorm(n, 1e-5, elementwise_affine)}[kind]
    source, model, a, x = soft(linear, lambda n: made(n, elementwise_affine=affine))
    h = a * source[0](x)
    centred = h - a * h.sum(-1, keepdim=True) / a.sum() if kind == "layer" else h
    on = a >= functional.SMALLEST_GATE
    want = on * centred * a.mean().sqrt() / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    if affine:
        want = want * source[1].weight
        if kind == "layer":
            want = want + a * source[1].bias
    assert torch.allclose(model[1](model[0](x)), want, atol=1e-12, rtol=0)


def test_twin_a_gate_in_front_of_a_batch_norm_would_cancel():
    source, _, a, x = soft(conv, lambda n: nn.BatchNorm2d(n, eps=1e-30))
    source.train()
    h = source[0](x)
    once = source[1](h)
    assert torch.allclose(source[1](a.view(1, -1, 1, 1) * h), once, atol=1e-12)
    assert not torch.allclose(a.view(1, -1, 1, 1) * once, once, atol=1e-2)


@pytest.mark.parametrize("name, tolerance", [("act_ReLU", 0), ("batch_norm2d", 0), ("mlp_layer_norm", 5e-4)])
def test_at_the_last_scale_soft_is_hard(name, tolerance):
    """sigmoid(+-400) is 1 or 0 in float32. A norm over units scales its eps once gates are hard: measured 1e-4."""
    x, _ = zoo.data(name)
    model = hatcl.convert(zoo.make(name), 1, x, config={"init": "sparse", "init_density": 0.5, "init_value": 100.0})
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    model.eval()
    with hatcl.learn(model, 0, optimizer, steps=1) as learning_:
        assert learning_.scale == 400
        with torch.no_grad():
            hard = model(x)
            with learning_.soft():
                warm = model(x)
        assert float((hard - warm).abs().max()) <= tolerance
    assert torch.equal(parts.logits(model, 0, x), hard)


# ---- by hand -----------------------------------------------------------------------------------------


def test_batch_norm_statistics_are_each_tasks_own():
    layer = hatcl.HATConv2d(3, 6, 3, num_tasks=2)
    norm = hatcl.TaskIndexedBatchNorm2d(6, units=layer)
    head = hatcl.TaskIndexedLinear(6, 4, num_tasks=2, reads=layer)
    model = nn.Sequential(layer, norm, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    data = [parts.problem((3, 8, 8), t) for t in range(2)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    want = {}
    for t in range(2):
        parts.train(model, t, optimizer, data[t], 8)
        want[t] = parts.logits(model, t, data[0][0])
        assert all(torch.equal(parts.logits(model, e, data[0][0]), want[e]) for e in want)
    means = [norm.hat_tasks[t].running_mean for t in range(2)]
    assert not torch.equal(*means) and torch.equal(norm._buffers["running_mean"], torch.zeros(6))
    assert [int(norm.hat_tasks[t].num_batches_tracked) for t in range(2)] == [8, 8]
    assert isinstance(norm, nn.BatchNorm2d)
    assert hatcl.certify(model, data[0][0]).exact


@pytest.mark.parametrize(
    "make, shape",
    [
        (lambda units: hatcl.TaskIndexedLayerNorm(6, units=units), (5, 6)),
        (lambda units: hatcl.TaskIndexedRMSNorm(6, units=units), (5, 6)),
        (lambda units: hatcl.TaskIndexedGroupNorm(2, 6, units=units), (5, 6)),
        (lambda units: hatcl.TaskIndexedBatchNorm1d(6, units=units), (5, 6)),
    ],
    ids=["layer", "rms", "group", "batch"],
)
def test_norms_by_hand_are_the_plain_norms_where_everything_is_on(make, shape):
    layer = hatcl.HATLinear(3, 6, num_tasks=1, config=hatcl.HATConfig(init="dense"))
    norm = make(layer)
    model = nn.Sequential(layer, norm).eval()
    x = torch.randn(5, 3)
    plain = model(x)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    with hatcl.learn(model, 0, optimizer, steps=1):
        optimizer.step()
    # float32, one norm: measured 2.4e-7
    assert torch.allclose(parts.logits(model, 0, x), plain, atol=2e-6, rtol=0)
    assert tf.mse_loss(plain, norm(layer(x))) < 1e-10


# ---- norms of classes that nobody registered, found by what they do ----------------------------------


class LikeLlama(nn.Module):
    """eps under another name, statistics in float32 whatever comes in."""

    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = eps

    def forward(self, x):
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(x.dtype)


class LikeGemma(nn.Module):
    """1 + weight."""

    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


class ByHand(nn.Module):
    """A layer norm written out, along any dimension; no bias, no weight at will."""

    def __init__(self, width, dim=-1, weight=True, bias=True, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width)) if weight else None
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.dim, self.eps = dim, eps

    def forward(self, x):
        mean = x.mean(self.dim, keepdim=True)
        x = (x - mean) / torch.sqrt((x - mean).pow(2).mean(self.dim, keepdim=True) + self.eps)
        for p, apply in ((self.weight, torch.mul), (self.bias, torch.add)):
            if p is not None:
                x = apply(x, norms.along(p, x, self.dim))
        return x


FLAT, TOKENS, IMAGES = (6, 10), (3, 5, 10), (3, 3, 6, 6)
FOUND = {
    "llama": (LikeLlama, FLAT, "rms"),
    "llama tokens": (LikeLlama, TOKENS, "rms"),
    "gemma": (LikeGemma, FLAT, "rms"),
    "layer": (ByHand, FLAT, "centred"),
    "layer tokens": (ByHand, TOKENS, "centred"),
    "layer no bias": (lambda n: ByHand(n, bias=False), FLAT, "centred"),
    "layer no affine": (lambda n: ByHand(n, weight=False, bias=False), FLAT, "centred"),
    "channels first": (lambda n: ByHand(n, dim=1), IMAGES, "centred"),
    "channels first no bias": (lambda n: ByHand(n, dim=1, bias=False), IMAGES, "centred"),
}
# LikeLlama computes its statistics in float32, so it agrees to float32's precision only: measured 3.9e-7 on outputs of
# around 4. The others, in float64: measured 1.4e-15.
FOUND_TOLERANCE = {"llama": 3e-6, "llama tokens": 3e-6}


def found(name):
    """Two layers with such a norm behind each and a head, its affine parameters away from where they start: source,
    model with sealed random gates, inputs, all in float64."""
    make, shape, _ = FOUND[name]
    torch.manual_seed(3)
    image = len(shape) == 4
    layer = (lambda i, o: nn.Conv2d(i, o, 3, padding=1)) if image else nn.Linear
    source = nn.Sequential(
        layer(shape[1 if image else -1], 16), make(16), nn.ReLU(), layer(16, 16), make(16),
        *([zoo.Pool()] if image else []), nn.Linear(16, 4),
    )  # fmt: skip
    with torch.no_grad():
        for p in source.parameters():
            p.add_(0.3 * torch.randn(p.shape))
    x = torch.randn(shape)
    model = parts.pretend(hatcl.convert(source, 3, x).double(), share=0.6)
    return source.double(), model, x.double()


@pytest.mark.parametrize("name", FOUND)
def test_a_norm_of_an_unknown_class_computes_what_the_cut_one_does(name):
    source, model, x = found(name)
    unit_map = gates_of(model)[0].unit_map
    assert {path: n.kind for path, n in unit_map.norms.items()} == {"1": FOUND[name][2], "4": FOUND[name][2]}
    assert unit_map.notes == {} and unit_map.known == 1
    assert gap(source, model, x) < FOUND_TOLERANCE.get(name, TOLERANCE)
    assert [parts.leaks(model, x, t) for t in range(3)] == [None] * 3
    affine = {f"{i}.{n}" for i in (1, 4) for n, _ in source[i].named_parameters()}
    assert affine == {n for n, e in unit_map.entries.items() if e.why == "norm"}  # each task's own


@pytest.mark.parametrize("name", FOUND)
def test_twin_a_norm_that_is_not_found_normalises_over_all_units(name, monkeypatch):
    monkeypatch.setattr(converting, "kind_of_norm", lambda *args: "")
    source, model, x = found(name)
    assert gates_of(model)[0].unit_map.norms == {}
    assert any("over differing units" in note for note in gates_of(model)[0].unit_map.notes.values())
    assert gap(source, model, x) > 1e-2
    assert [parts.leaks(model, x, t) for t in range(3)] == [None] * 3  # other numbers than the cut network's, no leak


@pytest.mark.parametrize("name", FOUND)
def test_a_found_norm_is_the_plain_one_without_a_task(name):
    source, model, x = found(name)
    with torch.no_grad():
        assert torch.equal(parts.logits(model, None, x), source.eval()(x))


def test_a_found_norm_behind_what_leaves_off_units_dirty_reads_zeros():
    torch.manual_seed(3)
    source = nn.Sequential(nn.Linear(10, 16), nn.Sigmoid(), LikeGemma(16), nn.Linear(16, 4))
    x = torch.randn(6, 10)
    model = parts.pretend(hatcl.convert(source, 3, x).double(), share=0.6)
    assert gap(source.double(), model, x.double()) < TOLERANCE
    assert [parts.leaks(model, x.double(), t) for t in range(3)] == [None] * 3
    model[2]._hat.dirty = False
    assert gap(source, model, x.double()) > 1e-2


def test_a_found_norm_carries_the_soft_gate_of_its_input_on():
    """As `test_a_norm_over_units_carries_the_gate_of_its_input_on`, for f(c x) / c with c = sqrt(U / sum a)."""
    source, model, a, x = soft(linear, LikeGemma)
    h = a * source[0](x)
    share = a.mean()
    want = h * torch.rsqrt((h.square() / share).mean(-1, keepdim=True) + 1e-6) * (1 + source[1].weight)
    assert torch.allclose(model[1](model[0](x)), want, atol=1e-12, rtol=0)


class Do(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    ("norm", "ndim", "dim", "kind"),
    [
        (LikeLlama(12), 2, 1, "rms"),
        (LikeLlama(12), 3, 2, "rms"),
        (LikeGemma(12), 2, 1, "rms"),
        (nn.RMSNorm(12), 2, 1, "rms"),
        (ByHand(12, bias=False), 2, 1, "centred"),
        (ByHand(12, dim=1, bias=False), 4, 1, "centred"),
        (Do(lambda x: x - x.mean(-1, keepdim=True)), 2, 1, "centred"),
        pytest.param(ByHand(12), 2, 1, "centred"),
        pytest.param(ByHand(12, dim=1), 4, 1, "centred"),
        pytest.param(nn.LayerNorm(12), 3, 2, "centred"),
    ],
)
def test_the_kind_of_a_norm_is_tried(norm, ndim, dim, kind):
    assert norms.kind_of_norm(norm, ndim, dim, 12) == kind
    before = parts.snapshot(norm)
    assert norms.kind_of_norm(norm.train(), ndim, dim, 12) == kind
    assert norm.training and parts.same(before, norm.state_dict())


NO_NORMS = {
    "softmax": nn.Softmax(-1),
    "linear": nn.Linear(12, 12),
    "gelu": nn.GELU(),
    "batch norm": nn.BatchNorm1d(12),
    "group norm": nn.GroupNorm(3, 12),
    "gate by a mean": Do(lambda x: x * x.mean(-1, keepdim=True).sigmoid()),
    "l2": Do(lambda x: tf.normalize(x, dim=-1)),
    "largest": Do(lambda x: x / x.abs().amax(-1, keepdim=True)),
    "an error": Do(lambda x: 1 / 0),
    "nothing": Do(lambda x: x[..., :0]),
    "identity": nn.Identity(),
    "relu": nn.ReLU(),
}


@pytest.mark.parametrize("name", NO_NORMS)
def test_what_is_no_norm_has_no_kind(name):
    assert norms.kind_of_norm(NO_NORMS[name], 2, 1, 12) == ""


def test_along_another_dimension_or_over_two_units_it_is_no_norm():
    assert norms.kind_of_norm(LikeGemma(12), 3, 2, 12) == "rms"
    assert norms.kind_of_norm(LikeGemma(12), 3, 1, 12) == ""
    assert norms.kind_of_norm(LikeGemma(2), 2, 1, 2) == ""  # too few to tell
    with torch.device("meta"):
        assert norms.kind_of_norm(LikeGemma(12), 2, 1, 12) == ""


# ---- units along two dimensions ----------------------------------------------------------------------


class Crossed(nn.Module):
    """Tokens and channels are units, made in either order; a layer norm over the channels."""

    def __init__(self, tokens_first):
        super().__init__()
        self.tokens_first = tokens_first
        self.tokens, self.channels, self.norm = nn.Linear(5, 12), nn.Linear(8, 10), nn.LayerNorm(10)
        self.mix, self.head = nn.Linear(12, 1), nn.Linear(10, 3)

    def forward(self, x):  # [B, 8, 5]
        if self.tokens_first:
            x = self.channels(self.tokens(x).transpose(1, 2))
        else:
            x = self.tokens(self.channels(x.transpose(1, 2)).transpose(1, 2)).transpose(1, 2)
        return self.head(self.mix(self.norm(x).transpose(1, 2)).flatten(1))


def crossed_cut(model, x, task):
    """The same with tokens and channels cut down to what the task has on."""
    tokens, channels = (parts.ends(model, f"{name}.weight", task)[0] for name in ("tokens", "channels"))
    raw = dict(model.named_parameters())

    def linear(x, name, on):
        return tf.linear(x, raw[f"{name}.weight"][on], raw[f"{name}.bias"][on])

    if model.tokens_first:
        x = linear(linear(x, "tokens", tokens).transpose(1, 2), "channels", channels)
    else:
        x = linear(linear(x.transpose(1, 2), "channels", channels).transpose(1, 2), "tokens", tokens).transpose(1, 2)
    norm, mix, head = (m.hat_tasks[task] for m in (model.norm, model.mix, model.head))
    x = tf.layer_norm(x, x.shape[-1:], norm.weight[channels], norm.bias[channels])
    return tf.linear(
        tf.linear(x.transpose(1, 2), mix.weight[:, tokens], mix.bias).flatten(1), head.weight[:, channels], head.bias
    )


@pytest.mark.parametrize("tokens_first", [True, False], ids=["tokens first", "channels first"])
def test_a_norm_is_over_its_own_dimension_where_another_has_units_too(tokens_first):
    torch.manual_seed(0)
    x = torch.randn(4, 8, 5)
    model = parts.pretend(hatcl.convert(Crossed(tokens_first), 3, x, verify=False).double())
    for t in range(3):
        with torch.no_grad():
            want = crossed_cut(model, x.double(), t)
        assert float((parts.logits(model, t, x.double()) - want).abs().max()) < TOLERANCE
