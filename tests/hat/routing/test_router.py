"""Which task an input belongs to: exact for any subset of tasks, and void where a task is another one."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings

import parts
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import hatcl
import hatcl.hat.routing.router as router_module
from hatcl.errors import ConfigError, IntegrityError
from hatcl.hat.features import features_and_outputs, middle_block
from hatcl.hat.gates import gates_of
from hatcl.hat.routing.known import KnownTask
from hatcl.hat.routing.ridge import lifted
from hatcl.hat.routing.router import ROUTER_ENTRY
from hatcl.vectors.files import read_metadata

SHAPE = parts.shape_of("mlp")
OPTIONS = {"width": 24}


def task_data(task, count=40):
    return parts.problem(SHAPE, task, count)


def filled(model, order=(0, 1, 2), **options):
    router = hatcl.TaskRouter(model, {**OPTIONS, **options})
    for t in order:
        router.add_task(t, *task_data(t))
    return router


@pytest.fixture(scope="module")
def sealed():
    return parts.pretend(parts.converted("mlp"))


@pytest.fixture
def model(sealed):
    return copy.deepcopy(sealed)


X = torch.cat([task_data(t, 12)[0] for t in range(3)])
RIGHT = torch.arange(3).repeat_interleave(12)


def asked(router, among=None, x=X):
    return router.probabilities({t: router.seen(router.model, x, t)[0] for t in router.chosen(among)}, among)


def by_definition(router, x):
    """R and P as the issue writes them, a loop per index; from the sums alone."""
    order, tau = router.tasks, router.options.temperature
    said = {}
    for s in order:
        later = order[order.index(s) :]
        phi = torch.cat([(router.seen(router.model, x, s)[0].double() @ router._known[s].p.double()).relu(),
                         torch.ones(len(x), 1).double()], 1)  # fmt: skip
        z = tau * phi @ router._solved(later)
        at = 0
        for b in later:
            size = len(router._known[b].labels)
            said[s, b] = z[:, at : at + size].logsumexp(1) - z.logsumexp(1)
            at += size
    evidence = torch.zeros(len(x), len(order)).double()
    for i, t in enumerate(order):
        for j, a in enumerate(order):
            spaces = order[: min(i, j) + 1]
            r = torch.stack([said[s, t] - said[s, a] for s in spaces]).mean(0)
            evidence[:, i] += r / len(order)
    return evidence.softmax(1)


def test_the_formulas(model):
    router = filled(model)
    p = asked(router)
    assert torch.allclose(p, by_definition(router, X), atol=1e-12)  # measured 1e-15
    assert float((p.argmax(1) == RIGHT).double().mean()) > 0.9


def test_at_first_sight(model):
    """P by the space of the first of the chosen tasks alone: softmax over t of l_a(t|x)."""
    router = filled(model, (2, 0, 1))
    for among, first in ((None, 2), ([0, 1], 0)):
        chosen, h = router.chosen(among), router.seen(model, X, first)[0]
        z = router.options.temperature * lifted(h, router._known[first].p) @ router._solved(chosen)
        parts = z.split([4] * len(chosen), 1)
        want = torch.stack([part.exp().sum(1) for part in parts], 1) / z.exp().sum(1, keepdim=True)
        assert torch.allclose(router.at_first_sight(h, among), want, atol=1e-12)  # measured 2e-16
    right = torch.tensor(router.tasks)[router.at_first_sight(router.seen(model, X, 2)[0]).argmax(1)] == RIGHT
    assert float(right.double().mean()) > 0.8


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_among_the_first_tasks_is_the_router_of_then_bit_for_bit(model, order):
    """The answers to `among=range(k)` are those that the router gave after task k."""
    router, then = hatcl.TaskRouter(model, OPTIONS), []
    for t in order:
        router.add_task(t, *task_data(t))
        then.append(asked(router))
    for k in range(1, 4):
        assert torch.equal(asked(router, order[:k]), then[k - 1])
        assert torch.equal(asked(router, order[:k][::-1]), then[k - 1])  # a set, whatever its order
    twin = copy.deepcopy(router)  # the sums of all tasks are in every space where they are not kept per task
    twin._weights.clear()
    first = twin._known[order[0]].sums
    first[order[0]] = dataclasses.replace(first[order[0]], gram=sum(twin._known[b].sums[order[0]].gram for b in order))
    assert not torch.equal(asked(twin, order[:1] + order[1:2]), then[1])


def test_a_task_taken_out_was_never_there_bit_for_bit(model):
    for gone in range(3):
        router, without = filled(model), filled(model, [t for t in range(3) if t != gone])
        before = asked(router)
        router.remove_task(gone)
        assert torch.equal(asked(router), asked(without)) and asked(router).shape != before.shape
        assert _bits(router) == _bits(without)
    twin = filled(model)
    del twin._known[1]  # and its space stays with the tasks that came later
    assert _bits(twin) != _bits(filled(model, [0, 2]))


def _bits(router):
    return {(t, n): x.numpy().tobytes() for t, known in router._known.items() for n, x in known.tensors().items()}


def test_the_order_is_that_of_adding(model):
    a, b = filled(model, (0, 1)), filled(model, (1, 0))
    assert set(a._known[1].sums) == {0, 1} and set(b._known[1].sums) == {1}
    assert "task 0: 40 examples of 4 classes; its space tells apart [0, 1]" in str(a)
    assert "task 0: 40 examples of 4 classes; its space tells apart [0]" in str(b)


def test_batches_and_order_of_examples_do_not_count(model):
    (x, y), whole = task_data(0), filled(model, [0])
    for size in (1, 7):
        router = hatcl.TaskRouter(model, OPTIONS)
        router.add_task(0, [(x[i : i + size], y[i : i + size].tolist()) for i in reversed(range(0, len(x), size))])
        for name, sums in whole._known[0].tensors().items():
            other = router._known[0].tensors()[name]
            # measured 4e-8: float32 features of other batches; 4e-16 in float64
            assert float((sums - other).abs().max() / sums.abs().max()) < 1e-6
    exact = copy.deepcopy(model).double()
    hatcl.certify(exact, x[:2].double())  # takes its digests anew
    want = hatcl.TaskRouter(exact, OPTIONS)
    want.add_task(0, x.double(), y)
    router = hatcl.TaskRouter(exact, OPTIONS)
    router.add_task(0, x.double().flip(0), y.flip(0), batch_size=3)
    a, b = (r._known[0].sums[0].gram for r in (want, router))
    assert float((a - b).abs().max() / a.abs().max()) < 1e-13


def test_a_task_that_was_forgotten_is_named(model):
    router = filled(model)
    hatcl.forget_task(model, 1)
    with pytest.raises(hatcl.TaskError, match=r"task 1 is in the router and not sealed .* router.remove_task\(1\)"):
        router.check(model, [0, 1])
    router.check(model, [0, 2])
    router.remove_task(1)
    assert torch.equal(asked(router), asked(filled(model, [0, 2])))


def test_a_task_that_was_learned_again_is_named_until_it_is_added_anew(model):
    router = filled(model)
    hatcl.forget_task(model, 1)
    parts.train(model, 1, torch.optim.SGD(model.parameters(), lr=0.1), task_data(1), steps=2)
    with pytest.raises(hatcl.TaskError, match=r"task 1 is not what it was .* router.add_task\(1, ...\) computes them"):
        router.check(model, [1])
    with pytest.raises(hatcl.TaskError, match="not what it was"):
        hatcl.predict(model, X, router=router)
    router.add_task(1, *task_data(1))
    router.check(model, router.tasks)
    assert router.tasks == [0, 2, 1]
    assert _bits(router) == _bits(filled(model, (0, 2, 1)))
    assert "task 1: 40 examples of 4 classes; its space tells apart [1]" in str(router)


def test_a_task_that_was_reopened_and_sealed_as_it_was_stays(model, monkeypatch):
    """Its embeddings are others, and no sealed task computes with embeddings."""
    hatcl.forget_task(model, 1)
    parts.train(model, 1, torch.optim.SGD(model.parameters(), lr=0.1), task_data(1), steps=2)
    router = filled(model)
    want = asked(router)
    hatcl.reopen_task(model, 1)
    with pytest.raises(hatcl.TaskError, match="task 1 is in the router and not sealed"):
        router.check(model, [1])
    hatcl.seal(model, 1)
    router.check(model, router.tasks)
    assert torch.equal(asked(router), want)
    monkeypatch.setattr("hatcl.hat.routing.router.changed_digest", lambda was, now: None if was == now else "any")
    router._checked.clear()
    with pytest.raises(hatcl.TaskError, match="not what it was"):  # the twin: embeddings count
        router.check(model, [1])


def test_the_digest_is_what_notices_it(model):
    """Without it the gates alone would be compared, and they may be the same."""
    router = filled(model)
    masks = model.hat_gates.masks.clone()
    for name, digest in list(model.hat_gates.digests[1].items()):
        if "hat_tasks" in name:
            model.hat_gates.digests[1][name] = digest[:-1] + ("0" if digest[-1] != "0" else "1")
    model.hat_gates.epoch += 1
    assert torch.equal(masks, model.hat_gates.masks)
    with pytest.raises(hatcl.TaskError, match="not what it was"):
        router.check(model, [1])
    router._known[1].digests = dict(model.hat_gates.digests[1])  # the twin: not compared
    router.check(model, [1])


def test_another_model_is_refused_and_a_copy_is_not(model, tmp_path):
    router = filled(model)
    other = parts.pretend(parts.converted("mlp"), seed=5)
    with pytest.raises(hatcl.TaskError, match="or this is another model"):
        hatcl.predict(other, X, router=router)
    loaded = parts.converted("mlp")
    loaded.load_state_dict(model.state_dict())
    want = hatcl.predict(model, X, router=router)
    for twin in (copy.deepcopy(model), loaded):
        got = hatcl.predict(twin, X, router=router)
        assert torch.equal(got.task_probability, want.task_probability)
    assert torch.equal(hatcl.predict(model, X, router=copy.deepcopy(router)).probability, want.probability)


def test_the_file(model, tmp_path):
    for options in ({}, {"rank": 3}):
        router = filled(model, (2, 0), **options)
        path = router.save(tmp_path / "router.safetensors")
        again = hatcl.TaskRouter.load(path, model)
        assert again.tasks == [2, 0] and again.options == router.options and _bits(again) == _bits(router)
        assert torch.equal(asked(again), asked(router))
        again.add_task(1, *task_data(1))  # it goes on
        router.add_task(1, *task_data(1))
        assert _bits(again) == _bits(router)


def test_files_that_are_not_what_was_saved(model, tmp_path):
    router = filled(model, (0, 1))
    path = router.save(tmp_path / "router.safetensors")
    tensors, text = load_file(path), read_metadata(path)[ROUTER_ENTRY]
    save_file({**tensors, "0.p": tensors["0.p"] + 1}, tmp_path / "a.safetensors", {ROUTER_ENTRY: text})
    save_file(tensors, tmp_path / "b.safetensors", {ROUTER_ENTRY: text.replace('"labels": [0, 1', '"labels": [1, 0')})
    save_file(tensors, tmp_path / "c.safetensors")
    for name, said in (("a", "is not what was saved"), ("b", "is not what was saved"), ("c", "is no router")):
        with pytest.raises(IntegrityError, match=said):
            hatcl.TaskRouter.load(tmp_path / f"{name}.safetensors", model)
    with pytest.raises(IntegrityError):
        hatcl.TaskRouter.load(tmp_path / "none.safetensors", model)
    with pytest.raises(ConfigError, match="expected a file that ends in .safetensors"):
        router.save(tmp_path / "router.pt")


def test_features_of_ones_own(model, tmp_path):
    def flat(m, x):
        return m[:5](x)

    router = hatcl.TaskRouter(model, OPTIONS, flat)
    router.add_task(0, *task_data(0))
    path = router.save(tmp_path / "router.safetensors")
    with pytest.raises(ConfigError, match="was made with features='a function', got None; give the same function"):
        hatcl.TaskRouter.load(path, model)
    assert _bits(hatcl.TaskRouter.load(path, model, flat)) == _bits(router)
    by_path = hatcl.TaskRouter(model, OPTIONS, "7")
    by_path.add_task(0, *task_data(0))
    assert _bits(by_path) == _bits(filled(model, [0]))
    assert hatcl.TaskRouter.load(by_path.save(tmp_path / "b.safetensors"), model).features == "7"


def test_inputs_prepared_for_each_task(model, tmp_path):
    """Tasks that were learned with a scale of their own find an input that nobody has scaled."""

    def prepare(t, x):
        return x * (1.0 + t)

    router, plain = hatcl.TaskRouter(model, OPTIONS, prepare=prepare), filled(model)
    for t in range(3):
        router.add_task(t, *task_data(t))
    assert torch.equal(router.seen(model, X, 2)[0], plain.seen(model, 3 * X, 2)[0])
    path = router.save(tmp_path / "router.safetensors")
    with pytest.raises(ConfigError, match="was made with prepare='a function', got None; give the same function"):
        hatcl.TaskRouter.load(path, model)
    with pytest.raises(ConfigError, match="was made with prepare=None, got <function"):
        hatcl.TaskRouter.load(plain.save(tmp_path / "b.safetensors"), model, prepare=prepare)
    again = hatcl.TaskRouter.load(path, model, prepare=prepare)
    assert torch.equal(asked(again), asked(router)) and not torch.equal(asked(router), asked(plain))


def test_logits_of_ones_own(model, tmp_path):
    """A model whose output are no logits; a task with one class is found, and has nothing else to tell."""

    def logits(task, inputs, out):
        return out[:, :1] if task == 1 else out.flip(1)

    router, plain = hatcl.TaskRouter(model, OPTIONS, logits=logits), filled(model)
    for t in range(3):
        x, y = task_data(t)
        router.add_task(t, x, y * 0 if t == 1 else y)
    assert router._known[1].labels == [0] and router._known[0].labels == [0, 1, 2, 3]
    p, q = (hatcl.predict(model, X, router=r) for r in (router, plain))
    assert float((p.task == RIGHT).double().mean()) > 0.8 and set(p.label[p.task == 1].tolist()) == {0}
    same = (p.task == q.task) & (p.task != 1)
    assert same.any() and torch.equal(p.label[same], 3 - q.label[same])
    path = router.save(tmp_path / "router.safetensors")
    with pytest.raises(ConfigError, match="was made with logits='a function', got None; give the same function"):
        hatcl.TaskRouter.load(path, model)
    assert torch.equal(asked(hatcl.TaskRouter.load(path, model, logits=logits)), asked(router))


def test_a_file_of_before_there_were_logits_is_read(model, tmp_path):
    router = filled(model, (0, 1))
    path = router.save(tmp_path / "router.safetensors")
    tensors, about = load_file(path), json.loads(read_metadata(path)[ROUTER_ENTRY])
    del about["logits"], about["digest"]
    about["digest"] = router_module._digest_of_all(tensors, about)
    save_file(tensors, path, {ROUTER_ENTRY: json.dumps(about)})
    assert torch.equal(asked(hatcl.TaskRouter.load(path, model)), asked(router))


def test_no_example_is_kept(model):
    """What it keeps does not grow with the examples."""
    few, many = hatcl.TaskRouter(model, OPTIONS), hatcl.TaskRouter(model, OPTIONS)
    few.add_task(0, *task_data(0, 8))
    many.add_task(0, *task_data(0, 80))
    assert few.bytes == many.bytes and {f.name for f in dataclasses.fields(KnownTask)} == {
        "labels", "counts", "p", "sums", "dtype", "digests"
    }  # fmt: skip


def test_the_low_memory_form_is_smaller_and_close(model):
    whole, low = filled(model, width=64), filled(model, width=64, rank=8)
    assert low.bytes < whole.bytes / 2
    assert float((asked(whole).argmax(1) == asked(low).argmax(1)).double().mean()) > 0.8
    for among in ([0], [0, 1]):
        assert torch.equal(asked(low, among), asked(filled(model, among, width=64, rank=8)))


def test_classes_without_examples_take_no_part(model):
    x, y = task_data(0)
    router = hatcl.TaskRouter(model, OPTIONS)
    router.add_task(0, x[y != 2], y[y != 2])
    known = router._known[0]
    assert known.labels == [0, 1, 3] and known.counts == [10, 10, 10] and known.sums[0].classes.shape[1] == 3


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda x, y: (x, y * 0 + 1), hatcl.TaskError, "task 0: got 40 examples of 1 classes, expected some of at"),
        (lambda x, y: (x[:0], y[:0]), hatcl.TaskError, "task 0: got 0 examples of 0 classes"),
        (lambda x, y: (x, y + 1), ConfigError, "task 0: got labels from 1 to 4, and its head has classes 0 to 3"),
        (lambda x, y: (x, y - 1), ConfigError, "task 0: got labels from -1 to 2"),
        (lambda x, y: (x, y.float()), ConfigError, r"task 0: labels: got torch.float32 of shape \[40\], expected one"),
        (lambda x, y: (x, y[:9]), ConfigError, "task 0: got inputs with 40 rows and 9 labels"),
        (lambda x, y: (x[:, :, :2], y), ConfigError, "task 0: the model does not take these inputs .*give them as"),
        (lambda x, y: (x / 0, y), ConfigError, "task 0: its features of these inputs are not finite"),
        (lambda x, y: (x, None), ConfigError, "task 0: got inputs without labels"),
        (lambda x, y: ([(x, None)], None), ConfigError, "task 0: labels: got none"),
        (lambda x, y: ([], None), ConfigError, "task 0: there are none; pass a list or a DataLoader"),
    ],
)
def test_examples_that_do_not_fit_change_nothing(model, change, error, text):
    router = filled(model, [1])
    before = _bits(router)
    with pytest.raises(error, match=text):
        router.add_task(0, *change(*task_data(0)))
    assert _bits(router) == before and router.tasks == [1]


def test_nothing_is_added_beside_a_task_that_is_void(model):
    """Its space would take in features that its other sums are not of."""
    router = filled(model, [0, 1])
    hatcl.forget_task(model, 1)
    before = _bits(router)
    with pytest.raises(hatcl.TaskError, match="task 1 is in the router and not sealed"):
        router.add_task(2, *task_data(2))
    assert _bits(router) == before
    router.remove_task(1)
    router.add_task(2, *task_data(2))
    assert _bits(router) == _bits(filled(model, [0, 2]))


def test_tasks_that_do_not_fit(model):
    router = hatcl.TaskRouter(model, OPTIONS)
    with pytest.raises(hatcl.TaskError, match="the router has no tasks yet"):
        router.chosen(None)
    router.add_task(0, *task_data(0))
    with pytest.raises(hatcl.TaskError, match=r"task 0 is in the router already, with 40 .* remove_task\(0\)"):
        router.add_task(0, *task_data(0))
    with pytest.raises(hatcl.TaskError, match=r"task 2 is not in the router, which has \[0\]"):
        router.chosen([2])
    with pytest.raises(hatcl.TaskError, match="expected different tasks"):
        router.chosen([0, 0])
    with pytest.raises(hatcl.TaskError, match="expected different tasks"):
        router.chosen([])
    fresh = parts.converted("mlp")
    with pytest.raises(hatcl.TaskError, match="task 1 is not sealed"):
        hatcl.TaskRouter(fresh).add_task(1, *task_data(1))
    with pytest.raises(hatcl.TaskError, match="has no gates"):
        hatcl.TaskRouter(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"width": 0}, "width: got 0"),
        ({"temperature": 0}, "temperature: got 0"),
        ({"threshold": 1.5}, "threshold: got 1.5"),
        ({"rank": 30}, "rank: got 30, expected at most width, 24"),
        ({"widht": 3}, "did you mean 'width'"),
    ],
)
def test_options_that_do_not_fit(model, options, text):
    with pytest.raises(ConfigError, match=text):
        hatcl.TaskRouter(model, {**OPTIONS, **options})


def test_calibration(model):
    router = filled(model)
    noisy = X + 2.0 * torch.randn(X.shape, generator=torch.Generator().manual_seed(0))

    def likely():
        p = router.probabilities({t: router.seen(model, noisy, t)[0] for t in router.tasks})
        return float(p.gather(1, RIGHT.unsqueeze(1)).log().mean())

    before = likely()
    options = router.calibrate(model, [(noisy[:20], RIGHT[:20]), (noisy[20:], RIGHT[20:])], keep=0.8)
    assert router.options == options and likely() > before
    rejected = hatcl.predict(model, noisy, router=router).rejected
    assert 0.1 < float(rejected.double().mean()) < 0.25
    with pytest.raises(hatcl.TaskError, match="task 7 is not in the router"):
        router.calibrate(model, [(noisy, RIGHT + 7)])
    with pytest.raises(ConfigError, match="keep: got 0"):
        router.calibrate(model, [(noisy, RIGHT)], keep=0)
    assert router.options == options


def test_bfloat16_and_a_model_that_was_cast(model):
    half = copy.deepcopy(model).bfloat16()
    router = hatcl.TaskRouter(half, OPTIONS)
    for t in range(3):
        x, y = task_data(t)
        router.add_task(t, x.bfloat16(), y)
    assert router._known[0].sums[0].gram.dtype == torch.float64
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        p = hatcl.predict(half, X.bfloat16(), router=router)
    assert float((p.task == RIGHT).double().mean()) > 0.8
    with pytest.warns(UserWarning, match="its features are torch.bfloat16 now and were torch.float32 when it was"):
        hatcl.predict(half, X.bfloat16(), router=filled(model))


DRAWN = torch.Generator().manual_seed(0)
TEXTS = torch.stack([torch.randint(3 + 20 * t, 18 + 20 * t, (24, 8), generator=DRAWN) for t in range(2)])
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}


def bert():
    transformers = pytest.importorskip("transformers")
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, vocab_size=60, num_labels=2))


def of_texts(plain, **options):
    """Two tasks whose texts have words of their own, by a model that has not learned anything, and their router."""
    batches = [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in TEXTS]
    gated = parts.pretend(hatcl.convert(plain, 2, batches[0]))
    router = hatcl.TaskRouter(gated, {"width": 64}, **options)
    for t, batch in enumerate(batches):
        router.add_task(t, [{**batch, "labels": torch.arange(24) % 2}])
    return router, batches


@pytest.mark.parametrize("kind", ["SEQ_CLS", None, "plain"])  # with LoRA the head is each task's own, or that of all
def test_texts(kind):
    peft = pytest.importorskip("peft")
    plain = bert()
    if kind != "plain":
        plain = peft.get_peft_model(plain, peft.LoraConfig(r=4, target_modules=["query", "value"], task_type=kind))
    router, batches = of_texts(plain)
    for top in (None, 1):
        right = [hatcl.predict(router.model, x, router=router, top=top).task == t for t, x in enumerate(batches)]
        # chance 1/2; the space of one task that has not learned anything, without half of its units, tells less
        assert float(torch.cat(right).double().mean()) > (0.75 if top is None else 0.6)
    if kind == "SEQ_CLS":
        _a_middle_block_reads_no_padding(router.model, batches[0])


def _a_middle_block_reads_no_padding(model, batch):
    """A text's features do not depend on how long the others of its batch are."""
    path = middle_block(model)
    assert path.endswith("encoder.layer.1")
    longer = {name: torch.nn.functional.pad(x, (0, 5)) for name, x in batch.items()}
    with hatcl.task(model.eval(), 0), torch.no_grad():
        h, wider = (features_and_outputs(model, x, path)[0] for x in (batch, longer))
        blind = features_and_outputs(model, {**longer, "attention_mask": longer["attention_mask"] | True}, path)[0]
    assert torch.allclose(h, wider, atol=1e-5) and not torch.allclose(h, blind, atol=1e-2)  # measured 2e-7


def test_a_model_without_blocks_has_none_in_the_middle(model):
    with pytest.raises(hatcl.HATError, match="has no stack of blocks"):
        middle_block(model)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(model):
    router = filled(model)
    want = hatcl.predict(model, X, router=router)
    model.cuda()
    got = hatcl.predict(model, X, router=router)
    assert got.task.is_cuda and torch.equal(got.task.cpu(), want.task)
    assert torch.allclose(got.task_probability.cpu(), want.task_probability, atol=1e-4)


def test_a_growth_changes_nothing(model, tmp_path):
    router = filled(model)
    want, path = asked(router), router.save(tmp_path / "router.safetensors")
    for _ in range(2):
        hatcl.grow(model, 1.5, example_inputs=X[:2])
        assert torch.equal(hatcl.predict(model, X, router=router).task_probability, want.float())
    assert torch.equal(asked(hatcl.TaskRouter.load(path, model)), want)
    again = copy.deepcopy(model)
    with torch.no_grad():
        gates_of(again)[0].masks[0, 0] ^= True
    gates_of(again)[0].digests.clear()
    with pytest.raises(hatcl.TaskError, match="is not what it was when it was added"):
        hatcl.predict(again, X, router=router)
