"""RegMean against least squares, and its matrices against what the layers give."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from hatcl import ConfigError, VectorError
from hatcl.vectors.merging import merge, regmean
from hatcl.vectors.merging.regmean import input_grams
from hatcl.vectors.task_vector import TaskVector


def merged(matrices, grams, **options):
    vectors = [TaskVector({"w": torch.as_tensor(m)}) for m in matrices]
    return merge(vectors, "regmean", grams=[{"w": torch.as_tensor(g).unsqueeze(0)} for g in grams], **options)["w"]


def test_by_hand():
    assert merged([[[1.0]], [[3.0]]], [[[1.0]], [[3.0]]]).tolist() == [[2.5]]  # (1 * 1 + 3 * 3) / 4
    # each task uses an input of its own: each keeps its column
    got = merged([[[1.0, 5.0]], [[7.0, 2.0]]], [[[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]])
    assert got.tolist() == [[1.0, 2.0]]
    # alpha 0: only the diagonals, column by column
    got = merged([[[1.0, 5.0]], [[3.0, 2.0]]], [[[1.0, 0.9], [0.9, 2.0]], [[3.0, -1.0], [-1.0, 1.0]]], alpha=0.0)
    assert got.tolist() == [[2.5, 4.0]]


def test_alpha_damps_the_off_diagonals_by_hand():
    """G1 + G2 = [[2, 0], [0, 2]] and W1 G1 + W2 G2 = [3, 1] + alpha [1, 1] * .. : solved on paper for alpha = 1/2."""
    g1, g2 = [[1.0, 0.8], [0.8, 1.0]], [[1.0, -0.8], [-0.8, 1.0]]
    # w1 = (1, 0): w1 g1 = (1, .4); w2 = (2, 1): w2 g2 = (2 - .4, 1 - .8) = (1.6, .2); over 2
    got = merged([[[1.0, 0.0]], [[2.0, 1.0]]], [g1, g2], alpha=0.5)
    assert torch.allclose(got, torch.tensor([[1.3, 0.3]]), rtol=0, atol=1e-7)


def test_it_is_the_least_squares_solution():
    xs = [torch.randn(20, 5, dtype=torch.float64) for _ in range(3)]
    ws = [torch.randn(4, 5, dtype=torch.float64) for _ in range(3)]
    want = torch.linalg.lstsq(torch.cat(xs), torch.cat([x @ w.T for x, w in zip(xs, ws, strict=True)])).solution.T
    got = merged(ws, [x.T @ x / 20 for x in xs], alpha=1.0)
    # two float64 solvers on a condition of about 10: measured 2e-15
    assert torch.allclose(got, want, rtol=0, atol=1e-12)


def test_where_no_input_reaches_it_is_the_mean():
    """Five inputs of which three span, alpha 1: the sum of the matrices has no inverse."""
    basis = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    xs = [torch.randn(20, 3, dtype=torch.float64) @ basis[:, :3].T for _ in range(2)]
    ws = [torch.randn(4, 5, dtype=torch.float64) for _ in range(2)]
    got = merged(ws, [x.T @ x for x in xs], alpha=1.0)
    unseen = basis[:, 3:]
    mean = (ws[0] + ws[1]) / 2
    assert torch.allclose(got @ unseen, mean @ unseen, rtol=0, atol=1e-9)
    seen = torch.linalg.lstsq(torch.cat(xs) @ basis[:, :3], torch.cat([x @ w.T for x, w in zip(xs, ws, strict=True)]))
    assert torch.allclose(got @ basis[:, :3], seen.solution.T, rtol=0, atol=1e-9)


def test_twin_rounding_errors_taken_for_inputs_are_noise(monkeypatch):
    x = torch.randn(20, 2) @ torch.randn(2, 5)
    other = torch.randn(20, 20) @ x
    ws = [torch.randn(4, 5) for _ in range(2)]
    grams = [x.T @ x, other.T @ other]  # float32: singular but for rounding

    def off_the_mean():
        """In the directions that no input has."""
        unseen = torch.linalg.svd(x).Vh[2:].T
        return float(((merged(ws, grams, alpha=1.0) - (ws[0] + ws[1]) / 2) @ unseen).abs().max())

    assert off_the_mean() < 1e-5  # measured 5e-7
    monkeypatch.setattr(regmean, "ROUNDED", 0.0)
    assert off_the_mean() > 0.1


@pytest.mark.parametrize("alpha", [0.9, 1.0])
def test_the_sizes_of_the_inputs_are_nothing(alpha):
    """From 1e-3 to 1e3, as behind some norms, and one that is always zero."""
    sizes = torch.tensor([1e-3, 1.0, 0.0, 1e3], dtype=torch.float64)
    x = torch.randn(50, 4, dtype=torch.float64) * sizes
    w = torch.randn(3, 4, dtype=torch.float64)
    got = merged([w, w + 1], [x.T @ x, 3 * x.T @ x], alpha=alpha)
    want = w + torch.where(sizes > 0, 0.75, 0.5)
    # float64 sums of numbers a million apart: measured 4e-9
    assert torch.allclose(got, want, rtol=0, atol=1e-6)


LAYERS = {
    "linear": (nn.Linear(4, 3, bias=False), (5, 4)),
    "sequence": (nn.Linear(4, 3, bias=False), (5, 7, 4)),
    "conv": (nn.Conv2d(2, 3, 3, bias=False), (2, 2, 6, 6)),
    "strided": (nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), bias=False), (2, 2, 7, 7)),
    "groups": (nn.Conv2d(4, 6, 3, groups=2, padding=1, bias=False), (2, 4, 5, 5)),
    "depthwise": (nn.Conv2d(4, 4, 2, groups=4, padding="same", bias=False), (2, 4, 5, 5)),
    "reflected": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect", bias=False), (2, 2, 5, 5)),
    "alone": (nn.Conv2d(2, 3, 3, bias=False), (2, 6, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_matrix_knows_the_mean_square_of_any_layers_outputs(name):
    """tr(W G W') over the groups is the sum over outputs of their mean square, whatever the layer."""
    layer, shape = LAYERS[name]
    x = torch.randn(shape)
    g = input_grams(layer, [x])["weight"].double()
    w = layer.weight.detach().double().reshape(len(g), -1, g.shape[-1])
    out = layer(x).detach().double()
    channel = -1 if isinstance(layer, nn.Linear) else -3
    squares = out.square().sum() / (out.numel() / out.shape[channel])
    # float32 products: measured 2e-7 relative
    assert abs(float(torch.einsum("goi,gij,goj->", w, g, w) / squares) - 1) < 2e-6


def test_more_batches_do_not_make_a_task_louder():
    layer, x = nn.Linear(4, 3), torch.randn(6, 4)
    once, twice = input_grams(layer, [x])["weight"], input_grams(layer, [x, (x, None)])["weight"]
    assert torch.allclose(once, twice, rtol=1e-6)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(6, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.table.weight
        self.unused = nn.Linear(4, 4)

    def forward(self, x):
        x = self.table(x)
        return self.head(self.body(self.attention(x, x, x, need_weights=False)[0]))


def test_what_is_averaged_is_named(caplog):
    """Tied to an embedding, used by another layer's forward, not used at all, a bias."""
    base, batch = Mixed(), torch.randint(0, 6, (3, 5))
    assert set(input_grams(base, [batch])) == {"body.weight"}
    tuned = [Mixed() for _ in range(2)]
    vectors = [TaskVector.between(base, m) for m in tuned]
    with caplog.at_level(logging.INFO):
        merged = merge(vectors, "regmean", model=base, batches=[[batch], [batch.flip(0)]])
    for name in ("table.weight", "attention.in_proj_weight", "attention.out_proj.weight", "unused.weight", "body.bias"):
        assert name in caplog.text
        assert torch.equal(merged[name], merge(vectors, "mean")[name])
    assert "body.weight" not in caplog.text
    assert not torch.equal(merged["body.weight"], merge(vectors, "mean")["body.weight"])


def test_the_model_stays_as_it_was_also_when_it_fails(base, batches):
    base.train()
    base.norm.eval()
    before = {n: t.clone() for n, t in base.state_dict().items()}
    input_grams(base, batches[0])
    with pytest.raises(RuntimeError):
        input_grams(base, [batches[0][0], torch.ones(1, 5)])
    assert all(torch.equal(before[n], t) for n, t in base.state_dict().items())
    assert base.training and not base.norm.training and base.hidden.training
    assert not any(m._forward_pre_hooks for m in base.modules())


def test_matrices_given_or_taken_are_the_same(base, vectors, batches):
    grams = [input_grams(v.apply_to(base), b) for v, b in zip(vectors, batches, strict=True)]
    assert set(grams[0]) == {"conv.weight", "groups.weight", "hidden.weight", "head.weight"}
    given, taken = merge(vectors, "regmean", grams=grams), merge(vectors, "regmean", model=base, batches=batches)
    assert all(torch.equal(given[n], taken[n]) for n in given)


def test_it_is_nearer_to_each_layers_outputs_than_the_mean():
    """Two layers, inputs in different directions: what RegMean is for."""
    base = nn.Sequential(nn.Linear(6, 4))
    tuned = [nn.Sequential(nn.Linear(6, 4)) for _ in range(2)]
    vectors = [TaskVector.between(base, m) for m in tuned]
    xs = [torch.randn(40, 6) * s for s in (torch.tensor([9, 1, 1, 1, 1, 1]), torch.tensor([1, 1, 1, 1, 1, 9]))]

    def error(vector):
        m = vector.apply_to(base)
        return sum(float((m(x) - t(x)).detach().square().sum()) for x, t in zip(xs, tuned, strict=True))

    found = merge(vectors, "regmean", model=base, batches=[[x] for x in xs], alpha=1.0)
    assert error(found) < 0.5 * error(merge(vectors, "mean"))


def test_refused(base, vectors, batches):
    two = [TaskVector({"w": torch.ones(4, 3)}), TaskVector({"w": torch.zeros(4, 3)})]
    good = {"w": torch.eye(3).unsqueeze(0)}
    with pytest.raises(ConfigError, match="regmean needs model: .*, or grams= instead"):
        merge(two, "regmean")
    with pytest.raises(ConfigError, match="alpha: got 1.5, expected a number between 0 and 1"):
        merge(two, "regmean", grams=[good, good], alpha=1.5)
    with pytest.raises(ConfigError, match="grams: got 1, expected a list of 2: one mapping per vector"):
        merge(two, "regmean", grams=[good])
    with pytest.raises(ConfigError, match="batches: got 2, expected a list of 3: one iterable of batches per vector"):
        merge(vectors, "regmean", model=base, batches=batches[:2])
    with pytest.raises(ConfigError, match="batches of task 1: there are none"):
        merge(vectors, "regmean", model=base, batches=[batches[0], [], batches[2]])
    with pytest.raises(
        VectorError, match="w: vector 1 has no matrix of its inputs, others have; was the layer not run"
    ):
        merge(two, "regmean", grams=[good, {}])
    with pytest.raises(VectorError, match=r"w: vector 1's matrix of inputs is \[3, 3\], expected \[groups, 3, 3\]"):
        merge(two, "regmean", grams=[good, {"w": torch.eye(3)}])
    with pytest.raises(VectorError, match=r"w: vector 0's matrix of inputs is \[3, 3, 3\]"):
        merge(two, "regmean", grams=[{"w": torch.eye(3).expand(3, 3, 3)}, good])
    with pytest.raises(VectorError, match="w: vector 1's matrix of inputs is not finite; are there NaN"):
        merge(two, "regmean", grams=[good, {"w": good["w"] * float("nan")}])


def test_the_module_is_found_by_its_name():
    assert regmean.__name__.endswith("merging.regmean")


def test_matrices_of_some_weights_alone(base, batches):
    every, some = (input_grams(base, batches[0], only=only) for only in (None, ["hidden.weight", "conv.weight"]))
    assert list(some) == ["conv.weight", "hidden.weight"]  # as they are run
    assert all(torch.equal(some[n], every[n]) for n in some)
