"""What the tests of several processes run in each of them. `python tests/distributed_parts.py RANK FOLDER NAME...` runs
these functions one after another and writes what came of each into the folder."""

from __future__ import annotations

import contextlib
import copy
import faulthandler
import os
import shutil
import sys
import tempfile
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as tf
from torch.nn.parallel import DistributedDataParallel as DDP

sys.path.insert(0, str(Path(__file__).parent))
import parts  # noqa: E402

import hatcl  # noqa: E402
from hatcl.hat.distributed import Replicas  # noqa: E402
from hatcl.hat.gates import gates_of, groups_of  # noqa: E402
from hatcl.shards import is_shard  # noqa: E402

WORLD = 2
SCENARIOS = {}


def scenario(function):
    SCENARIOS[function.__name__] = function
    return function


def converted(name="resnet", rank=0, **options):
    """The embeddings of every process are drawn anew, as they are where nobody sets a seed."""
    torch.manual_seed(10 + rank)
    return hatcl.convert(parts.plain(name), 3, parts.images(name, 2), config={"init": "normal", **options})


def everywhere(x):
    """A tensor of every process."""
    out = [torch.empty_like(x) for _ in range(WORLD)]
    distributed.all_gather(out, x.contiguous())
    return out


def different(model):
    """What differs between processes: names of parameters, buffers and digests."""
    names = []
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        x = x.detach()
        a, b = everywhere(x.view(torch.uint8) if x.dtype == torch.bool else x)
        if not torch.equal(a, b):
            names.append(name)
    return names


def batch(rank, name, task, step, count=8):
    x, y = parts.problem(parts.shape_of(name), task, 64)
    at = (torch.arange(count) * WORLD + rank + 16 * step) % 64
    return x[at], y[at]


def learn(given, called, task, optimizer, rank, name="resnet", steps=5, accumulate=1, clip=None, inside=None):
    """Learn a task as people do: `given` to hatcl.learn, `called` in the forward."""
    with hatcl.learn(given, task, optimizer, steps) as learning:
        called = called() if callable(called) and not isinstance(called, nn.Module) else called
        for step in range(steps):
            optimizer.zero_grad()
            for part in range(accumulate):
                x, y = batch(rank, name, task, step * accumulate + part)
                last = part == accumulate - 1
                with contextlib.nullcontext() if last else called.no_sync():
                    loss = tf.cross_entropy(called(x), y) + learning.penalty()
                    (loss / accumulate).backward()
            if inside is not None:
                inside(step)
            if clip is not None:
                nn.utils.clip_grad_norm_(given.parameters(), clip)
            optimizer.step()


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.05)


def adam(model):
    return torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1)


def three_tasks(model, rank, name, learn_task):
    """Learn three tasks; sealed outputs stay bit for bit and replicas are equal after each."""
    model.train()
    x = parts.images(name, 4, seed=9)
    kept = {}
    for task in range(3):
        learn_task(task)
        assert different(model) == []
        tables = everywhere(gates_of(model)[0].digest_table)
        assert torch.equal(*tables)
        for t, was in kept.items():
            assert torch.equal(parts.logits(model, t, x), was), f"task {t} moved"
        kept[task] = parts.logits(model, task, x)
        assert torch.equal(*everywhere(kept[task]))
    assert hatcl.tasks(model) == [0, 1, 2]
    assert hatcl.certify(model, x).exact


@scenario
def ddp_once(rank):
    """One wrapper and one optimizer for all tasks, the wrapper given; no_sync, clipping."""
    model = converted(rank=rank)
    ddp = DDP(model)
    optimizer = sgd(ddp)
    grown = []

    def inside(step):
        grads = [p.grad for p in gates_of(model)[0].embeddings if p.grad is not None]
        assert len(grads) == 1, "only the task that is learned"
        assert torch.equal(*everywhere(grads[0]))
        grown.append(float(grads[0].abs().sum()))

    three_tasks(
        model, rank, "resnet",
        lambda t: learn(ddp, ddp, t, optimizer, rank, accumulate=2, clip=1.0, inside=inside),
    )  # fmt: skip
    assert grown[0] > 0
    folder = Path(sys.argv[2]) / "replicas"
    hatcl.save_pretrained(ddp, folder)
    distributed.barrier()
    again, x = hatcl.from_pretrained(folder, base=parts.plain("resnet")), parts.images("resnet", 4)
    assert torch.equal(parts.logits(again, 2, x), parts.logits(model, 2, x))


@scenario
def ddp_start_from(rank):
    """Every process has examples of its own; the task to start from is the one that the first one finds."""
    model = converted("mlp", rank)
    ddp = DDP(model)
    for t in range(2):
        learn(ddp, ddp, t, adam(model), rank, "mlp")
    found = []
    original = hatcl.hat.learn.source_for
    hatcl.hat.learn.source_for = lambda *given: found.append(original(*given)) or rank  # 0 in the first, 1 in the other
    x, y = batch(rank, "mlp", 2, 0, 16)
    with hatcl.learn(ddp, 2, adam(model), 1, start_from="best", examples=(x, y)) as learning:
        (tf.cross_entropy(ddp(x), y) + learning.penalty()).backward()
        for o in learning.guard.optimizers:
            o.step()
    assert found[0] in (0, 1) and hatcl.describe(model).lineage == {2: [0]}
    assert different(model) == []
    hatcl.hat.learn.source_for = original


@scenario
def ddp_inner_given(rank):
    """The inner model is given, the wrapper made before each block, new optimizers."""
    model = converted("vit", rank)
    three_tasks(model, rank, "vit", lambda t: learn(model, DDP(model), t, adam(model), rank, "vit"))


@scenario
def ddp_inside(rank):
    """The wrapper is made inside each block."""
    model = converted(rank=rank)
    optimizer = adam(model)
    three_tasks(model, rank, "resnet", lambda t: learn(model, lambda: DDP(model), t, optimizer, rank))


@scenario
def ddp_is_one_process_with_all_batches(rank):
    """Twelve steps, the last of them settled: what DDP learns is what one process learns from all batches."""
    model = converted("vit", rank)
    ddp = DDP(model)
    with hatcl.learn(ddp, 0, torch.optim.SGD(model.parameters(), 0.1), 12) as learning:
        alone = None
        for step in range(12):
            x, y = batch(rank, "vit", 0, step)
            loss = tf.cross_entropy(ddp(x), y) + learning.penalty()
            if alone is None:  # the first forward gave every process the same embeddings
                alone = copy.deepcopy(model)
                other = torch.optim.SGD(alone.parameters(), 0.1)
            learning.guard.optimizers[0].zero_grad()
            loss.backward()
            learning.guard.optimizers[0].step()
        assert learning.settled
    gates_of(alone)[0].task = None
    with hatcl.learn(alone, 0, other, 12) as learning:
        for step in range(12):
            pairs = [batch(r, "vit", 0, step) for r in range(WORLD)]
            x, y = (torch.cat(part) for part in zip(*pairs, strict=True))
            other.zero_grad()
            (tf.cross_entropy(alone(x), y) + learning.penalty()).backward()
            other.step()
    for (name, a), b in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5), f"{name}: {(a - b).abs().max()}"
    assert torch.equal(gates_of(model)[0].masks, gates_of(alone)[0].masks)


@scenario
def ddp_twin_without_averaging(rank):
    """Without averaging of the task's own gradients the replicas drift apart, which is refused."""
    model = converted("vit", rank)
    before = Replicas._after_gradient
    Replicas._after_gradient = lambda self, p: None
    try:
        learn(DDP(model), DDP(model), 0, adam(model), rank, "vit")
        raise AssertionError("sealed what differs")
    except hatcl.IntegrityError as error:
        assert "learned different weights: pos_embed" in str(error), error
    finally:
        Replicas._after_gradient = before
    assert hatcl.tasks(model) == [] and gates_of(model)[0].learning is None


@scenario
def ddp_twin_without_statistics(rank):
    """Without agreeing on running statistics the digests differ."""
    model = converted(rank=rank)
    before = Replicas.agree
    Replicas.agree = lambda self: None
    try:
        learn(DDP(model), DDP(model), 0, adam(model), rank)
    finally:
        Replicas.agree = before
    assert not torch.equal(*everywhere(gates_of(model)[0].digest_table))
    try:
        learn(DDP(model), DDP(model), 1, adam(model), rank)
        raise AssertionError("learned on with different sealed tasks")
    except hatcl.IntegrityError as error:
        assert "different sealed tasks" in str(error)


@scenario
def ddp_one_fails(rank):
    """What goes wrong in one process at the end of a block is an error in both, and nothing is sealed."""
    model = converted("vit", rank)
    learn(DDP(model), DDP(model), 0, adam(model), rank, "vit")
    optimizer, ddp = adam(model), DDP(model)
    try:
        with hatcl.learn(ddp, 1, optimizer, 3) as learning:
            for step in range(3):
                x, y = batch(rank, "vit", 1, step)
                optimizer.zero_grad()
                (tf.cross_entropy(ddp(x), y) + learning.penalty()).backward()
                optimizer.step()
            if rank == 1:
                next(p for n, p in model.named_parameters() if n == "blocks.0.mlp.fc1.weight").data[:] = torch.nan
        raise AssertionError("sealed")
    except hatcl.HATError as error:
        assert ("another process failed" if rank == 0 else "no longer finite") in str(error), error
    assert hatcl.tasks(model) == [0]


@scenario
def ddp_refusals(rank):
    """What cannot work is refused with the remedy, in both processes."""
    model = converted("vit", rank)

    def refused(words, do):
        try:
            do()
        except hatcl.HATError as error:
            assert words in str(error), error
        else:
            raise AssertionError(f"not refused: {words}")

    x, _ = batch(rank, "vit", 0, 0)
    refused("no task active", lambda: DDP(model)(x))
    outer = nn.Sequential(nn.Identity(), model)
    refused("find_unused_parameters=True", lambda: learn(DDP(outer), DDP(outer), 0, adam(model), rank, "vit"))
    assert gates_of(model)[0].learning is None
    ddp = DDP(outer, find_unused_parameters=True)
    for t in range(2):
        learn(ddp, ddp, t, adam(model), rank, "vit")
    assert different(model) == []
    if rank == 1:
        hatcl.forget_task(model, 1)
    refused("different sealed tasks", lambda: learn(DDP(model), DDP(model), 2, adam(model), rank, "vit"))


def halves(model, odd=0):
    return {name: torch.arange(stop - start) % 2 == odd for name, _, start, stop in groups_of(model)}


def given_gates(model, called, rank):
    learn(called, called, 1, adam(model), rank, "vit")
    found = hatcl.masks_of(model, 1)
    assert all(torch.equal(found[name], on) for name, on in halves(model).items())


@scenario
def ddp_given(rank):
    """Gates that are given are held in all processes; where they are not the same everywhere it is said."""
    model = converted("vit", rank)
    hatcl.hold_gates(model, 1, halves(model))
    given_gates(model, DDP(model), rank)
    assert different(model) == []
    hatcl.hold_gates(model, 2, {name: on | (rank == 1) for name, on in halves(model, 1).items()})
    try:
        learn(DDP(model), DDP(model), 2, adam(model), rank, "vit")
        raise AssertionError("learned with different gates")
    except hatcl.IntegrityError as error:
        assert "or give tasks different gates; load the same saved model in each of them" in str(error)


@scenario
def fsdp_given(rank):
    model = converted("vit")
    hatcl.hold_gates(model, 1, halves(model))
    fully_shard(model)
    given_gates(model, model, rank)
    assert hatcl.certify(hatcl.gathered(model), parts.images("vit", 2)).exact
    try:
        hatcl.hold_gates(model, 2, halves(model))
        raise AssertionError("shards were written to")
    except hatcl.HATError as error:
        assert "hold_gates: the parameters of" in str(error)


@scenario
def ddp_options(rank):
    """static_graph, find_unused_parameters, gradient_as_bucket_view, both kinds of checkpointing, tasks added later."""
    for options in ({"static_graph": True}, {"find_unused_parameters": True}, {"gradient_as_bucket_view": True}):
        model = converted("vit", rank)
        ddp = DDP(model, **options)
        for t in range(2):
            if options.get("static_graph"):
                ddp = DDP(model, **options)
            learn(ddp, ddp, t, adam(model), rank, "vit")
        assert different(model) == [], options
    model = converted("vit", rank)
    model.set_grad_checkpointing()
    ddp = DDP(model)
    hatcl.add_tasks(model, 1)
    optimizer = adam(model)
    for t in (0, 3):
        learn(ddp, ddp, t, optimizer, rank, "vit")
    assert different(model) == []


@scenario
def ddp_compiled(rank):
    model = converted("vit", rank)
    ddp = torch.compile(DDP(model), backend="eager")
    three_tasks(model, rank, "vit", lambda t: learn(ddp, ddp, t, adam(model), rank, "vit"))


@scenario
def ddp_of_compiled(rank):
    model = converted("vit", rank)
    ddp = DDP(torch.compile(model, backend="eager"))
    three_tasks(model, rank, "vit", lambda t: learn(model, ddp, t, adam(model), rank, "vit"))


# ---- fully_shard ---------------------------------------------------------------------------------------------------


def sharded(name, rank, root_only=False, **options):
    model = converted(name, rank)
    if not root_only:
        for block in model.blocks if name == "vit" else (model.layer1, model.layer2):
            fully_shard(block)
    return fully_shard(model, **options)


def three_sharded_tasks(model, rank, name, make, **options):
    model.train()
    x = parts.images(name, 4, seed=9)
    optimizer, kept = make(model), {}
    for task in range(3):
        learn(model, model, task, optimizer, rank, name, steps=10, clip=1.0, **options)
        for buffer in model.buffers():
            assert torch.equal(*everywhere(buffer.view(torch.uint8) if buffer.dtype == torch.bool else buffer))
        for t, was in kept.items():
            assert torch.equal(parts.logits(model, t, x), was), f"task {t} moved"
        kept[task] = parts.logits(model, task, x)
        assert torch.equal(*everywhere(kept[task]))
    assert all(is_shard(p) for p in optimizer.param_groups[0]["params"])
    certificate = hatcl.certify(model, x)
    assert certificate.exact and all(certificate.overwritten.values()), certificate
    plain = hatcl.gathered(model)
    assert not any(is_shard(p) for p in plain.parameters())
    assert all(torch.equal(parts.logits(plain, t, x), kept[t]) for t in kept)
    return kept


@scenario
def fsdp_transformer(rank):
    model = sharded("vit", rank)
    kept = three_sharded_tasks(model, rank, "vit", adam)
    folder = Path(sys.argv[2]) / "model"
    hatcl.save_pretrained(model, folder)
    distributed.barrier()
    again = hatcl.from_pretrained(folder, base=parts.plain("vit"))
    x = parts.images("vit", 4, seed=9)
    assert all(torch.equal(parts.logits(again, t, x), kept[t]) for t in kept)
    hatcl.forget_task(again, 1)
    assert torch.equal(parts.logits(again, 0, x), kept[0])


@scenario
def fsdp_conv(rank):
    """Running statistics, root and blocks."""
    three_sharded_tasks(sharded("resnet", rank), rank, "resnet", sgd)


@scenario
def fsdp_root_only(rank):
    """Sharded again after each forward, so that the penalty gathers the embeddings by itself."""
    three_sharded_tasks(sharded("vit", rank, True, reshard_after_forward=True), rank, "vit", adam)


@scenario
def fsdp_is_one_process_with_all_batches(rank):
    model = converted("vit")
    alone = copy.deepcopy(model)
    fully_shard(model, reshard_after_forward=True)
    for net, ranks in ((model, [rank]), (alone, range(WORLD))):
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        with hatcl.learn(net, 0, optimizer, 12) as learning:
            for step in range(12):
                pairs = [batch(r, "vit", 0, step) for r in ranks]
                x, y = (torch.cat(part) for part in zip(*pairs, strict=True))
                optimizer.zero_grad()
                (tf.cross_entropy(net(x), y) + learning.penalty()).backward()
                optimizer.step()
    plain = hatcl.gathered(model)
    for (name, a), b in zip(plain.named_parameters(), alone.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5), f"{name}: {(a - b).abs().max()}"
    assert torch.equal(gates_of(model)[0].masks, gates_of(alone)[0].masks)


@scenario
def fsdp_mixed_precision(rank):
    """In bfloat16 a sealed task stays too; what a float32 copy would prove is another model's certificate."""
    model = converted("vit", rank)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in (*model.blocks, model):
        fully_shard(block, mp_policy=policy)
    optimizer, x = adam(model), parts.images("vit", 4)
    learn(model, model, 0, optimizer, rank, "vit")
    before = parts.logits(model, 0, x)
    learn(model, model, 1, optimizer, rank, "vit")
    assert before.dtype == torch.bfloat16 and torch.equal(parts.logits(model, 0, x), before)
    try:
        hatcl.certify(model, x)
        raise AssertionError("not refused")
    except hatcl.HATError as error:
        assert "hatcl.gathered(model)" in str(error)
    assert hatcl.certify(hatcl.gathered(model), x).exact


@scenario
def fsdp_twin_without_guard(rank):
    """Where frozen elements are not put back, a sealed task moves; at the end of the block nothing is sealed."""
    model = sharded("vit", rank)
    x = parts.images("vit", 4, seed=9)
    learn(model, model, 0, adam(model), rank, "vit")
    before = parts.logits(model, 0, x)
    model.reshard()
    optimizer = adam(model)
    try:
        with hatcl.learn(model, 1, optimizer, 3) as learning:
            for h in learning.guard._hooks:
                h.remove()
            learning.guard.kept, learning.guard._modules, learning.guard._known = [], [], {}
            for step in range(3):
                a, b = batch(rank, "vit", 1, step)
                optimizer.zero_grad()
                (tf.cross_entropy(model(a), b) + learning.penalty()).backward()
                optimizer.step()
        raise AssertionError("sealed")
    except hatcl.IntegrityError as error:
        assert "task 0 was sealed" in str(error), error
    assert not torch.equal(parts.logits(model, 0, x), before)
    assert hatcl.tasks(model) == [0]


@scenario
def fsdp_refusals(rank):
    """What cannot work on shards is refused with the remedy, before anything has changed."""

    def refused(words, do):
        try:
            do()
        except hatcl.HATError as error:
            assert words in str(error), error
        else:
            raise AssertionError(f"not refused: {words}")

    model = converted("vit", rank)
    for block in model.blocks:
        fully_shard(block)
    refused("call fully_shard on the converted model itself", lambda: learn(model, model, 0, adam(model), rank, "vit"))
    assert gates_of(model)[0].learning is None
    model = sharded("vit", rank)
    learn(model, model, 0, adam(model), rank, "vit")
    refused("do it before fully_shard", lambda: hatcl.forget_task(model, 0))
    refused("do it before fully_shard", lambda: hatcl.add_tasks(model, 1))
    refused("do it before fully_shard", lambda: hatcl.learn(model, 1, adam(model), 3, start_from=0).__enter__())
    parts.logits(model, 0, parts.images("vit", 2))
    refused("model.reshard()", lambda: learn(model, model, 1, adam(model), rank, "vit"))
    plain = fully_shard(parts.plain("vit"))
    refused("convert the model first", lambda: hatcl.convert(plain, 2, parts.images("vit", 2)))
    model.reshard()
    optimizer = adam(model)
    try:
        with hatcl.learn(model, 1, optimizer, 3) as learning:
            a, b = batch(rank, "vit", 1, 0)
            loss = tf.cross_entropy(model(a), b) + learning.penalty()
            (loss * (torch.nan if rank == 1 else 1.0)).backward()
            optimizer.step()
        raise AssertionError("sealed")
    except hatcl.NonFiniteLossError:  # in both
        pass
    assert hatcl.tasks(model) == [0]


@scenario
def fsdp_skills(rank):
    """A scorer of shards finds what one of the whole model finds; ILoRA refuses by name."""
    import peft
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    small = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"], init_lora_weights=False)
    model = peft.get_peft_model(BertForSequenceClassification(small), lora).eval()
    alone = copy.deepcopy(model)
    fully_shard(model)
    ids = torch.arange(24).view(4, 6)
    found = []
    for net in (model, alone):
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1)
        scorer = hatcl.SkillScorer(net)
        with scorer.watch(optimizer):
            for _ in range(3):
                optimizer.zero_grad()
                net(input_ids=ids, labels=torch.arange(4) % 2).loss.backward()
                optimizer.step()
        found.append(scorer)
    assert torch.allclose(found[0].scores().values, found[1].scores().values, rtol=1e-3)
    other = hatcl.SkillScorer(model)
    other.load_state_dict(found[0].state_dict())
    assert torch.equal(other.scores().values, found[0].scores().values)
    try:
        hatcl.ILoRA(model, {"use_ilora": True})
        raise AssertionError("not refused")
    except hatcl.HATError as error:
        assert "DistributedDataParallel" in str(error)


def as_torchrun_does(rank):
    started = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD, "MASTER_PORT": 0}
    os.environ.update({name: str(value) for name, value in started.items()}, MASTER_ADDR="localhost")


@scenario
def trainer_two_tasks(rank):
    """transformers' Trainer in two processes: the tasks that both have sealed are the same, in the checkpoint too."""
    from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

    from hatcl.integrations.trainer import HATTrainer

    started = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD, "MASTER_PORT": 0}
    os.environ.update(
        {name: str(value) for name, value in started.items()}, MASTER_ADDR="localhost"
    )  # as torchrun does
    small = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    torch.manual_seed(rank)
    plain, ids = BertForSequenceClassification(small), torch.arange(32 * 6).view(32, 6) % 40
    for p in plain.parameters():
        distributed.broadcast(p.detach(), 0)
    model = hatcl.convert(plain, 2, {"input_ids": ids[:2]})
    data = [{"input_ids": x, "labels": int(x[0]) % 2} for x in ids]
    place = [tempfile.mkdtemp()]
    distributed.broadcast_object_list(place, 0)
    said = {}
    for task in range(2):
        args = TrainingArguments(
            f"{place[0]}/{task}", per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=6,
            save_steps=3, learning_rate=1e-2, use_cpu=True, ddp_backend="gloo", report_to=[], disable_tqdm=True,
            logging_strategy="no",
        )  # fmt: skip
        HATTrainer(model=model, args=args, task=task, train_dataset=data).train()
        assert hatcl.tasks(model) == list(range(task + 1)) and different(model) == []
        for t in range(task + 1):
            with torch.no_grad(), hatcl.task(model.eval(), t):
                now = model(input_ids=ids).logits
            assert torch.equal(now, said.setdefault(t, now))
    distributed.barrier()
    saved = hatcl.from_pretrained(f"{place[0]}/1/checkpoint-6")
    with torch.no_grad(), hatcl.task(saved, 1):
        assert torch.equal(saved(input_ids=ids).logits, said[1])
    distributed.barrier()
    if rank == 0:
        shutil.rmtree(place[0])


@scenario
def lightning_two_tasks(rank):
    """Lightning in two processes: the tasks that both have sealed are the same; its default strategy is refused."""
    from lightning.pytorch import LightningModule, Trainer
    from torch.utils.data import DataLoader, TensorDataset

    from hatcl.integrations.lightning import LearnTask

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.model = converted("mlp", rank)

        def training_step(self, batch, _):
            return tf.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 1e-2, weight_decay=0.1)

    def fit(task, strategy="ddp_find_unused_parameters_true"):
        x, y = parts.problem(parts.shape_of("mlp"), task, 64)
        Trainer(
            max_epochs=2, accelerator="cpu", devices=WORLD, strategy=strategy, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=[LearnTask(task)],
        ).fit(module, DataLoader(TensorDataset(x, y), 8))  # fmt: skip

    as_torchrun_does(rank)
    module, said = Module(), {}
    for task in range(2):
        fit(task)
        assert hatcl.tasks(module.model) == list(range(task + 1)) and different(module.model) == []
        for t in range(task + 1):
            with torch.no_grad(), hatcl.task(module.model.eval(), t):
                now = module.model(parts.images("mlp"))
            assert torch.equal(now, said.setdefault(t, now))
    try:
        fit(2, "ddp")
        raise AssertionError("not refused")
    except hatcl.HATError as error:
        assert "find_unused_parameters=True" in str(error)
    assert hatcl.tasks(module.model) == [0, 1]


@scenario
def accelerate_two_tasks(rank):
    """accelerate in two processes, with accumulation: the tasks that both have sealed are the same."""
    from accelerate import Accelerator
    from torch.utils.data import DataLoader, TensorDataset

    as_torchrun_does(rank)
    accelerator, said = Accelerator(cpu=True, gradient_accumulation_steps=2), {}
    model = converted("mlp", rank)
    wrapped, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1))
    for task in range(2):
        loader = accelerator.prepare(DataLoader(TensorDataset(*parts.problem(parts.shape_of("mlp"), task, 64)), 8))
        with hatcl.learn(wrapped, task, optimizer, len(loader)) as learning:
            model.train()
            for x, y in (*loader, *loader):
                with accelerator.accumulate(wrapped):
                    accelerator.backward(tf.cross_entropy(wrapped(x), y) + learning.penalty())
                    optimizer.step()
                    optimizer.zero_grad()
            assert learning.step == len(loader)
        assert hatcl.tasks(model) == list(range(task + 1)) and different(model) == []
        for t in range(task + 1):
            with torch.no_grad(), hatcl.task(model.eval(), t):
                now = model(parts.images("mlp"))
            assert torch.equal(now, said.setdefault(t, now))


def main(rank, folder, names):
    faulthandler.dump_traceback_later(float(os.environ.get("HATCL_TEST_TIMEOUT", "100")), exit=True)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=timedelta(seconds=30)
    )
    for name in names:
        outcome = "ok"
        try:
            SCENARIOS[name](rank)
        except BaseException:
            outcome = traceback.format_exc()
        new = folder / f"{name}.{rank}.new"
        new.write_text(outcome)
        new.rename(folder / f"{name}.{rank}")
        if outcome != "ok":  # the processes are no longer at the same place
            os._exit(1)
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
