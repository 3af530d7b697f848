"""One small model per kind of layer. What must hold for layers is tested on all of them; a layer that is registered and
not here fails `tests/hat/layers/test_gated.py`."""

from __future__ import annotations

from functools import partial

import parts
import timm.layers
import torch
from torch import nn
from torch.nn.utils import parametrizations

ZOO = {}


def entry(name, inputs, build):
    ZOO[name] = (build, inputs)


class Pool(nn.Module):
    """Mean over positions."""

    def forward(self, x):
        return x.flatten(2).mean(-1)


def chain(d, middle, conv=None, act=nn.ReLU, width=12):
    """conv, middle, act, conv, middle, act, pool, head over d-dimensional images."""
    conv = conv or getattr(nn, f"Conv{d}d")
    return nn.Sequential(
        conv(3, width, 3, padding=1), middle(width), act(), conv(width, width, 3, padding=1), middle(width), act(),
        Pool(), nn.Linear(width, parts.CLASSES),
    )  # fmt: skip


IMAGES = {1: (3, 16), 2: (3, 8, 8), 3: (3, 4, 4, 4)}
FLAT = (3, 4, 4)
TOKENS = (6,)

for d in (1, 2, 3):
    bn, inorm = getattr(nn, f"BatchNorm{d}d"), getattr(nn, f"InstanceNorm{d}d")
    conv, transposed = getattr(nn, f"Conv{d}d"), getattr(nn, f"ConvTranspose{d}d")
    for name, middle in {
        "batch_norm": bn,
        "batch_norm_no_affine": partial(bn, affine=False),
        "batch_norm_no_statistics": partial(bn, track_running_stats=False),
        "instance_norm": inorm,
        "instance_norm_affine_tracking": partial(inorm, affine=True, track_running_stats=True),
        "no_norm": lambda c: nn.Identity(),
        "grouped": lambda c, conv=conv: conv(c, c, 3, padding=1, groups=3),
        "depthwise": lambda c, conv=conv: conv(c, c, 3, padding=1, groups=c),
        "transposed_grouped": lambda c, conv=transposed: conv(c, c, 3, padding=1, groups=3),
    }.items():
        entry(f"{name}{d}d", IMAGES[d], partial(chain, d, middle))
    entry(f"transposed{d}d", IMAGES[d], partial(chain, d, bn, transposed))
    entry(f"lazy_no_bias{d}d", IMAGES[d], partial(chain, d, bn, partial(conv, bias=False)))


class OwnInstanceNorm(nn.modules.instancenorm._InstanceNorm):
    def _get_no_batch_dim(self):
        return 3

    def _check_input_dim(self, x):
        pass


for name, middle in {
    "own_instance_norm": OwnInstanceNorm,
    "group_norm": partial(nn.GroupNorm, 3),
    "group_norm_one": partial(nn.GroupNorm, 1),
    "group_norm_each": lambda c: nn.GroupNorm(c, c),
    "group_norm_no_affine": partial(nn.GroupNorm, 3, affine=False),
    "layer_norm_over_images": lambda c: nn.LayerNorm([c, 8, 8]),
    "timm_batch_norm_act": timm.layers.BatchNormAct2d,
    "timm_layer_scale_2d": timm.layers.LayerScale2d,
    "timm_frozen_batch_norm_act": timm.layers.FrozenBatchNormAct2d,
    "timm_group_norm_act": lambda c: timm.layers.GroupNormAct(c, num_groups=3),
    "timm_group_norm_1": timm.layers.GroupNorm1,
    "timm_layer_norm_2d": timm.layers.LayerNorm2d,
    "timm_layer_norm_act_2d": timm.layers.LayerNormAct2d,
    "timm_rms_norm_2d": timm.layers.RmsNorm2d,
    "timm_evo_norm_b0": timm.layers.EvoNorm2dB0,
    "timm_filter_response_norm": timm.layers.FilterResponseNormAct2d,
    "timm_split_batch_norm": partial(timm.layers.SplitBatchNorm2d, num_splits=2),
    "timm_squeeze_excite": lambda c: nn.Sequential(nn.BatchNorm2d(c), timm.layers.SqueezeExcite(c, rd_channels=4)),
    "timm_eca": lambda c: nn.Sequential(nn.BatchNorm2d(c), timm.layers.EcaModule(c)),
    "sync_batch_norm": nn.SyncBatchNorm,
}.items():
    entry(name, IMAGES[2], partial(chain, 2, middle))
for name in ("StdConv2d", "ScaledStdConv2d"):
    entry(f"timm_{name}", IMAGES[2], partial(chain, 2, nn.BatchNorm2d, getattr(timm.layers, name)))
same = lambda i, o, k, padding: timm.layers.Conv2dSame(i, o, k)  # noqa: E731
entry("timm_conv_same", IMAGES[2], partial(chain, 2, nn.BatchNorm2d, same))

ACTIVATIONS = {
    name: getattr(nn, name)
    for name in nn.modules.activation.__all__
    if name not in ("MultiheadAttention", "Softmax2d", "GLU", "Threshold", "Softmax", "LogSoftmax", "Softmin")
}
for name, act in {
    **ACTIVATIONS,
    "PReLU_per_unit": partial(nn.PReLU, 32),
    "Threshold": partial(nn.Threshold, 0.1, 0.7),
}.items():
    entry(f"act_{name}", FLAT, partial(parts.mlp, act=act))
entry("act_GLU", FLAT, lambda: nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.GLU(), nn.Linear(16, parts.CLASSES)))

for name, norm in {
    "layer_norm": nn.LayerNorm,
    "layer_norm_no_bias": partial(nn.LayerNorm, bias=False),
    "layer_norm_no_affine": partial(nn.LayerNorm, elementwise_affine=False),
    "rms_norm": nn.RMSNorm,
    "rms_norm_eps": partial(nn.RMSNorm, eps=1e-2),
    "rms_norm_no_affine": partial(nn.RMSNorm, elementwise_affine=False),
    "batch_norm": nn.BatchNorm1d,
    "timm_layer_norm": timm.layers.LayerNorm,
    "timm_layer_scale": timm.layers.LayerScale,
    "timm_rms_norm": timm.layers.RmsNorm,
}.items():
    entry(f"mlp_{name}", FLAT, partial(parts.mlp, norm=norm))
entry("mlp_dirty_layer_norm", FLAT, lambda: nn.Sequential(
    nn.Flatten(), nn.Linear(48, 32), nn.Sigmoid(), nn.LayerNorm(32), nn.Linear(32, 32), nn.Softplus(), nn.RMSNorm(32),
    nn.Linear(32, parts.CLASSES),
))  # fmt: skip


class Tokens(nn.Module):
    """Embedding, position, something in the middle, head."""

    def __init__(self, middle, width=16, out=16, **embedding):
        super().__init__()
        self.embedding = nn.Embedding(20, width, **embedding)
        self.position = nn.Parameter(0.1 * torch.randn(1, *TOKENS, width))
        self.middle = middle
        self.head = nn.Linear(out, parts.CLASSES)

    def forward(self, index):
        x = self.middle(self.embedding(index) + self.position)
        return self.head((x[0] if isinstance(x, tuple) else x).mean(1))


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True, **options)

    def forward(self, x):
        memory = x[..., : self.attention.kdim]
        return x + self.attention(x, memory, memory)[0]


def encoder(**options):
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


for name, options in {
    "attention": {},
    "attention_no_bias": {"bias": False},
    "attention_other_memory": {"kdim": 8, "vdim": 8},
    "attention_bias_kv": {"add_bias_kv": True},
    "attention_zero": {"add_zero_attn": True},
}.items():
    entry(name, TOKENS, lambda options=options: Tokens(Attention(**options)))
for name, options in {
    "encoder": {},
    "encoder_gelu": {"activation": "gelu"},
    "encoder_pre_norm": {"norm_first": True},
}.items():
    entry(name, TOKENS, lambda options=options: Tokens(encoder(**options)))
for name, options in {
    "embedding": {},
    "embedding_padding": {"padding_idx": 0},
    "embedding_max_norm": {"max_norm": 2.0},
    "embedding_sparse": {"sparse": True},
}.items():
    entry(name, TOKENS, lambda options=options: Tokens(nn.Linear(16, 16), **options))
for cls in (nn.LSTM, nn.GRU, nn.RNN):
    entry(cls.__name__, TOKENS, lambda cls=cls: Tokens(cls(16, 12, batch_first=True), out=12))
entry("LSTM_both_ways", TOKENS, lambda: Tokens(nn.LSTM(16, 8, 2, batch_first=True, bidirectional=True)))


class Tied(nn.Module):
    """One matrix embeds and reads out."""

    def __init__(self, residual):
        super().__init__()
        self.residual = residual
        self.embedding = nn.Embedding(20, 16)
        self.norm = nn.LayerNorm(16)
        self.middle = nn.Linear(16, 16)
        self.out = nn.Linear(16, 20, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, index):
        x = self.embedding(index)
        x = x + self.middle(x) if self.residual else torch.relu(self.middle(x))
        return self.out(self.norm(x).mean(1))[:, : parts.CLASSES]


entry("tied", TOKENS, partial(Tied, False))
entry("tied_residual", TOKENS, partial(Tied, True))


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.middle = nn.EmbeddingBag(20, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, parts.CLASSES)

    def forward(self, index):
        return self.head(self.middle(self.bag(index)).relu())


class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.both = nn.Linear(48, 16), nn.Linear(48, 12), nn.Bilinear(16, 12, 10)
        self.head = nn.Linear(10, parts.CLASSES)

    def forward(self, x):
        x = x.flatten(1)
        return self.head(self.both(self.left(x).relu(), self.right(x)))


entry("embedding_bag", TOKENS, Bag)
entry("bilinear", FLAT, Bilinear)
for name in ("weight_norm", "spectral_norm", "orthogonal"):
    wrap = getattr(parametrizations, name)
    entry(name, FLAT, lambda wrap=wrap: nn.Sequential(
        nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), wrap(nn.Linear(16, 16)), nn.ReLU(), nn.Linear(16, parts.CLASSES)
    ))  # fmt: skip


class Logits(nn.Module):
    """A transformers model as a function from token numbers to logits."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, index):
        return self.model(input_ids=index).logits


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=8, num_labels=parts.CLASSES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def gpt2():
    from transformers import GPT2Config, GPT2ForSequenceClassification

    config = GPT2Config(
        vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=8, num_labels=parts.CLASSES, pad_token_id=19,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2ForSequenceClassification(config)


entry("transformers_bert", TOKENS, lambda: Logits(bert()))
entry("transformers_gpt2", TOKENS, lambda: Logits(gpt2()))

CANNOT_TRAIN_HERE = {"sync_batch_norm": "SyncBatchNorm trains on accelerators only"}
CANNOT_PICKLE = {"weight_norm", "spectral_norm", "orthogonal"}  # torch pickles no parametrized module
SKIP = {name for name in ZOO if name.startswith("transformers_")}


def make(name, seed=0):
    torch.manual_seed(seed)
    return ZOO[name][0]()


def data(name, task=0, count=12):
    """Inputs and classes of a task."""
    shape = ZOO[name][1]
    if shape == TOKENS:
        generator = torch.Generator().manual_seed(200 + task)
        y = torch.arange(count) % parts.CLASSES
        # a third of the tokens are a class's own, the rest noise; never the padding token
        index = torch.randint(8, 19, (count, *shape), generator=generator)
        index[:, : shape[0] // 3] = ((y + task) % parts.CLASSES + 1).unsqueeze(1)
        return index, y
    return parts.problem(shape, task, count)
