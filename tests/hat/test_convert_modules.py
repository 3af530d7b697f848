"""What a forward may do with its modules, and which modules are refused: each is converted, learns two tasks in
training mode, is certified, saved and loaded, or refused by name with the remedy."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as tf
from torch.nn.utils import parametrizations, prune

import hatcl

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self, middle):
        super().__init__()
        self.first, self.middle, self.head = nn.Linear(8, 16), middle, nn.Linear(16, 4)

    def forward(self, x):
        return self.head(torch.relu(self.middle(torch.relu(self.first(x)))))


class Do(nn.Module):
    """Any function of its modules or parameters and the input."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.function(self, x)


def lin():
    return nn.Linear(16, 16)


def energy(m):
    return lambda h: m.f(h).tanh().sum()


def along_the_gradient(m, x):
    with torch.enable_grad():
        h = x if x.requires_grad else x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(energy(m)(h), h, create_graph=True)
    return x - 0.1 * slope


def called_with(m, x, factor):
    return torch.func.functional_call(m.f, {n: factor * p for n, p in m.f.named_parameters()}, (x,))


def complex_weight(*shape):
    return nn.Parameter(0.3 * torch.randn(*shape, dtype=torch.complex64))


def quantised_while_learning():
    made = nn.Sequential(torch.ao.quantization.QuantStub(), lin(), torch.ao.quantization.DeQuantStub())
    made.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    made = torch.ao.quantization.prepare_qat(made.train())
    made(torch.randn(4, 16))
    return made


def observed():
    made = quantised_while_learning()
    made.apply(torch.ao.quantization.disable_observer)
    return made


WORKS = {
    "vmap of grad": lambda: Do(lambda m, x: x - 0.1 * torch.func.vmap(torch.func.grad(energy(m)))(x), f=lin()),
    "grad": lambda: Do(lambda m, x: x - 0.1 * torch.func.grad(energy(m))(x), f=lin()),
    "vmap": lambda: Do(lambda m, x: torch.func.vmap(m.f)(x), f=lin()),
    "jvp": lambda: Do(lambda m, x: torch.func.jvp(m.f, (x,), (torch.ones_like(x),))[1], f=lin()),
    "autograd.grad": lambda: Do(along_the_gradient, f=lin()),
    "functional_call": lambda: Do(lambda m, x: called_with(m, x, 1.0), f=lin()),
    "functional_call with others": lambda: Do(lambda m, x: called_with(m, x, 0.5), f=lin()),
    "checkpoint": lambda: Do(lambda m, x: torch.utils.checkpoint.checkpoint(m.f, x, use_reentrant=False), f=lin()),
    "reentrant checkpoint": lambda: Do(
        lambda m, x: torch.utils.checkpoint.checkpoint(m.f, x, use_reentrant=True), f=lin()
    ),
    "parts of a complex parameter": lambda: Do(
        lambda m, x: torch.view_as_real(m.w)[:, 0] * x + torch.view_as_real(m.w)[:, 1], w=complex_weight(16)
    ),
    "a filter of frequencies": lambda: Do(
        lambda m, x: torch.fft.irfft(torch.fft.rfft(x) * m.w, n=16), w=complex_weight(9)
    ),
    "a complex matrix": lambda: Do(lambda m, x: (x.to(m.w.dtype) @ m.w).real, w=complex_weight(16, 16)),
    "spectral norm": lambda: parametrizations.spectral_norm(lin()),
    "weight norm": lambda: parametrizations.weight_norm(lin()),
    "quantised while learning": observed,
}  # fmt: skip


@pytest.mark.parametrize("name", WORKS)
@pytest.mark.filterwarnings("ignore")  # torch's, of quantisation and parametrizations
def test_it_converts_learns_stays_exact_and_loads(name, tmp_path):
    torch.manual_seed(0)
    source = Net(WORKS[name]())
    model = hatcl.convert(source, 2, X)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    want = []
    for t in range(2):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        with hatcl.learn(model, t, optimizer, 3) as learning:
            model.train()
            for _ in range(3):
                optimizer.zero_grad()
                (tf.cross_entropy(model(X), torch.arange(4)) + learning.penalty()).backward()
                optimizer.step()
        # what is in the middle is learned as well, as a shared parameter or as the task's own copy
        assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n.startswith("middle"))
        model.eval()
        with hatcl.task(model, t), torch.no_grad():
            want.append(model(X))
    assert hatcl.certify(model, X, strict=True).exact
    hatcl.save_pretrained(model, tmp_path)
    again = hatcl.from_pretrained(tmp_path, base=Net(WORKS[name]())).eval()
    for t in range(2):
        for made in (model, again):
            with hatcl.task(made, t), torch.no_grad():
                assert torch.equal(made(X), want[t])


def test_a_head_that_is_called_with_other_values_is_so_under_a_task():
    """With every unit on, a task computes what the plain model does, the half of its head's weights included."""
    torch.manual_seed(0)
    source = Net(lin())
    source.head = Do(lambda m, x: called_with(m, x, 0.5), f=nn.Linear(16, 4))
    model = hatcl.convert(source, 1, X).eval()
    with torch.no_grad():
        model.hat_gates.embeddings[0].fill_(1)
    model.hat_gates.seal(0)
    with hatcl.task(model, 0), torch.no_grad():
        torch.testing.assert_close(model(X), source.eval()(X))


# ---- refused --------------------------------------------------------------------------------------


def refuses(middle, text, run=True, whole=False):
    torch.manual_seed(0)
    source = middle if whole else Net(middle)
    if run:
        source(X)
    with pytest.raises(hatcl.ConversionError, match=text):
        hatcl.convert(source, 2, X)


HOOKS = {
    "weight norm": nn.utils.weight_norm,
    "prune": lambda m, name: prune.l1_unstructured(m, name, 0.5),
}


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.GRU(16, 16, batch_first=True)

    def forward(self, x):
        return self.f(x[:, None])[0][:, 0]


@pytest.mark.parametrize("run", [False, True], ids=["new", "run"])
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("where", ["f.weight_hh_l0", "f.weight", "w"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated", "ignore:RNN module weights are not")
def test_weights_that_a_hook_makes_before_every_forward(hook, where, run):
    """Of a known layer, of a recurrent one, of a module of one's own."""
    middle = {
        "f.weight_hh_l0": Recurrent,
        "f.weight": lambda: Do(lambda m, x: m.f(x), f=lin()),
        "w": lambda: Do(lambda m, x: x @ m.w, w=nn.Parameter(torch.randn(16, 16))),
    }[where]()
    path, _, name = where.rpartition(".")
    HOOKS[hook](middle.get_submodule(path), name)
    text = rf"middle.{where}: it is not a parameter but .*parametrizations, or .* \(remove_weight_norm.*prune.remove\)"
    refuses(middle, text, run)


def test_what_a_hook_made_is_a_parameter_again():
    middle = lin()
    prune.remove(prune.l1_unstructured(middle, "weight", 0.5), "weight")
    hatcl.convert(Net(middle), 2, X)


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated
@pytest.mark.parametrize("kind", ["script", "trace", "whole"])
def test_a_scripted_module(kind):
    made = {
        "script": lambda: torch.jit.script(lin()),
        "trace": lambda: torch.jit.trace(lin(), torch.randn(2, 16)),
        "whole": lambda: torch.jit.script(Net(lin())),
    }[kind]()
    where = "RecursiveScriptModule" if kind == "whole" else "middle"
    refuses(
        made, f"{where}: it is compiled by torch.jit, .*convert the module that it was made from", whole=kind == "whole"
    )


def quantised(dynamic):
    if dynamic:
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(lin()), {nn.Linear}, dtype=torch.qint8)
    made = nn.Sequential(torch.ao.quantization.QuantStub(), lin(), torch.ao.quantization.DeQuantStub()).eval()
    made.qconfig = torch.ao.quantization.get_default_qconfig("fbgemm")
    made = torch.ao.quantization.prepare(made)
    made(torch.randn(4, 16))
    return torch.ao.quantization.convert(made)


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.filterwarnings("ignore")  # torch.ao.quantization is deprecated
def test_a_quantised_module(dynamic):
    kind = "Linear" if dynamic else "Quantize"
    refuses(quantised(dynamic), rf"middle.0: it is quantised \({kind}\), .*convert the model as it was before")


@pytest.mark.filterwarnings("ignore")
def test_a_module_that_observes_what_it_quantises():
    refuses(quantised_while_learning(), r"middle.0.activation_post_process: it observes .*disable_observer")


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
@pytest.mark.parametrize("learned", [True, False], ids=["parameter", "buffer"])
def test_a_sparse_tensor(layout, learned):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # compressed layouts are in beta
        w = torch.eye(16).to_sparse(layout=layout)
    middle = Do(lambda m, x: (m.w @ x.t()).t())
    if learned:
        middle.w = nn.Parameter(w)
    else:
        middle.register_buffer("w", w)
    name = str(layout).removeprefix("torch.")
    refuses(middle, rf"middle.w: its layout is {name}, .*make it sparse in the forward \(to_sparse\)")


def test_a_dense_parameter_that_the_forward_makes_sparse_works():
    middle = Do(lambda m, x: torch.sparse.mm(m.w.to_sparse(), x.t()).t(), w=nn.Parameter(torch.eye(16)))
    hatcl.convert(Net(middle), 2, X)


def test_sparse_gradients_of_bags():
    """Those of `nn.Embedding` are fine (tests/layers)."""
    bag = nn.EmbeddingBag(16, 16, sparse=True)
    middle = Do(lambda m, x: x + m.f(torch.arange(len(x))[:, None]), f=bag)
    refuses(middle, "middle.f: its gradients are sparse, .*set its attribute sparse to False")
    middle.f.sparse = False
    hatcl.convert(Net(middle), 2, X)


def test_a_lazy_module_that_was_never_run():
    refuses(
        nn.LazyLinear(16), "middle.weight: it has no shape yet; run the model once on the example inputs", run=False
    )


def test_parameters_that_the_forward_takes_from_a_list_are_said():
    def stacked(m, x):
        weights, _ = torch.func.stack_module_state([m.a, m.b])
        return torch.einsum("bi,koi->bo", x, weights["weight"])

    text = r"other tasks reach .* even as copies per task. .*stack_module_state.*\(module.weight\)"
    refuses(Do(stacked, a=lin(), b=lin()), text)


@pytest.mark.parametrize("where", ["attribute", "parameter"])
def test_what_cannot_be_copied_is_named(where):
    middle = Do(lambda m, x: x)
    if where == "attribute":
        middle.lock = threading.Lock()
    else:

        class Other(torch.Tensor):
            pass

        middle.lock = nn.Parameter(torch.ones(3).as_subclass(Other))
    refuses(middle, r"middle.lock: it cannot be copied \(.*\), so the model cannot be converted .*__deepcopy__")
