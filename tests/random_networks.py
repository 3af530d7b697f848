"""Random small networks from the operations that real ones are made of: a spec and the module it stands for.

A spec is a list of blocks for images `[B, C, H, W]`, then a list of blocks for tokens `[B, N, C]`, then a way to pool.
"""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

SIDE, CLASSES = 8, 3
ACTS = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}
NORMS_2D = {
    "none": lambda c: nn.Identity(),
    "batch": nn.BatchNorm2d,
    "group": lambda c: nn.GroupNorm(2, c),
    "instance": lambda c: nn.InstanceNorm2d(c, affine=True),
    "channels": lambda c: ChannelNorm(c),
}
NORMS_1D = {
    "none": lambda c: nn.Identity(),
    "layer": nn.LayerNorm,
    "rms": nn.RMSNorm,
    "own rms": lambda c: OwnRMSNorm(c),
}


class ChannelNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class OwnRMSNorm(nn.Module):
    """Of a class that nobody registered, with a weight around 0 as Gemma has it."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.eps = 1e-6

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


class Do(nn.Module):
    """Any function of modules and input."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, nn.Parameter):
                self.register_parameter(name, part)
            else:
                self.add_module(name, part)

    def forward(self, x):
        return self.function(self, x)


def free(*shape):
    return nn.Parameter(0.5 * torch.randn(*shape))


def heads(t, n):
    return t.unflatten(-1, (n, -1)).transpose(1, 2)


def own_attention(m, x):
    q, k, v = (heads(t, 2) for t in m.qkv(x).chunk(3, -1))
    return m.out(((q @ k.transpose(-1, -2) * 0.3).softmax(-1) @ v).transpose(1, 2).flatten(2))


def linear_attention(m, x):
    q, k, v = (heads(t, 2) for t in m.qkv(x).chunk(3, -1))
    q, k = F.relu(q), F.relu(k)
    out = q @ (k.transpose(-1, -2) @ v) / (q @ k.sum(-2, keepdim=True).transpose(-1, -2) + 1.0)
    return m.out(out.transpose(1, 2).flatten(2))


def grouped_attention(m, x):
    q, k, v = heads(m.q(x), 4), heads(m.k(x), 2), heads(m.v(x), 2)
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    return m.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def learned_queries(m, x):
    q = m.q(m.queries.expand(len(x), -1, -1))
    return x + m.out(F.scaled_dot_product_attention(q, m.k(x), m.v(x))).mean(1, keepdim=True)


def selective(m, x):
    u = torch.stack([m.a(x), m.b(x)], 1)
    w = m.up(F.relu(m.down(u.sum(1).mean((2, 3))))).view(len(x), 2, -1).softmax(1)
    return (u * w[..., None, None]).sum(1)


def image_block(name, c, norm, act, seed):
    n, a = NORMS_2D[norm], ACTS[act]
    conv = nn.Conv2d
    blocks = {
        "conv": lambda: nn.Sequential(conv(c, c, 3, padding=1), n(c), a()),
        "grouped": lambda: nn.Sequential(conv(c, c, 3, padding=1, groups=2), n(c), a()),
        "depthwise": lambda: nn.Sequential(conv(c, c, 3, padding=1, groups=c), n(c), a(), conv(c, c, 1)),
        "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(c, c, 3, padding=1), n(c), a()),
        "act": lambda: a(),
        "norm": lambda: n(c),
        "residual": lambda: Do(
            lambda m, x: x + m.f(x), f=nn.Sequential(conv(c, c, 3, padding=1), n(c), a(), conv(c, c, 1), n(c))
        ),
        "concat": lambda: Do(
            lambda m, x: m.mix(torch.cat([x, m.f(x)], 1)),
            f=nn.Sequential(conv(c, c, 1), n(c), a()),
            mix=conv(2 * c, c, 1),
        ),
        "split": lambda: Do(
            lambda m, x: torch.cat([m.f(x[:, : c // 2]), x[:, c // 2 :]], 1),
            f=nn.Sequential(conv(c // 2, c // 2, 3, padding=1), a()),
        ),
        "gate": lambda: Do(lambda m, x: torch.mul(*m.f(x).sigmoid().chunk(2, 1)) * x, f=conv(c, 2 * c, 1)),
        "squeeze": lambda: Do(
            lambda m, x: x * m.up(F.relu(m.down(x.mean((2, 3), keepdim=True)))).sigmoid(),
            down=conv(c, 4, 1),
            up=conv(4, c, 1),
        ),
        "shuffle": lambda: Do(lambda m, x: m.f(F.pixel_shuffle(F.pixel_unshuffle(x, 2), 2)), f=conv(c, c, 1)),
        "channel shuffle": lambda: Do(lambda m, x: F.channel_shuffle(x, 2)),
        "scale": lambda: Do(lambda m, x: x + m.scale * m.f(x), scale=free(c, 1, 1), f=conv(c, c, 1)),
        "shared": lambda: Do(lambda m, x: m.f(F.relu(m.f(x))), f=conv(c, c, 1)),
        "pool": lambda: nn.MaxPool2d(3, 1, 1),
        "average": lambda: nn.AvgPool2d(3, 1, 1),
        "spatial": lambda: Do(lambda m, x: x * m.f(x.mean(1, keepdim=True)).sigmoid(), f=conv(1, 1, 3, padding=1)),
        "selective": lambda: Do(
            selective, a=conv(c, c, 1), b=conv(c, c, 3, padding=1), down=nn.Linear(c, 4), up=nn.Linear(4, 2 * c)
        ),
    }
    return blocks[name]() if name else sorted(blocks)


def token_block(name, c, norm, act, seed):
    n, a = NORMS_1D[norm], ACTS[act]
    tokens = (SIDE // 2) ** 2
    lin = nn.Linear
    blocks = {
        "linear": lambda: nn.Sequential(n(c), lin(c, c), a()),
        "mlp": lambda: Do(lambda m, x: x + m.f(x), f=nn.Sequential(n(c), lin(c, 20), a(), lin(20, c))),
        "glu": lambda: Do(
            lambda m, x: x + m.down(F.silu(m.g(m.n(x))) * m.u(m.n(x))),
            n=n(c),
            g=lin(c, 20),
            u=lin(c, 20),
            down=lin(20, c),
        ),
        "attention": lambda: Do(lambda m, x: x + own_attention(m, m.n(x)), n=n(c), qkv=lin(c, 3 * c), out=lin(c, c)),
        "linear attention": lambda: Do(
            lambda m, x: x + linear_attention(m, m.n(x)), n=n(c), qkv=lin(c, 3 * c), out=lin(c, c)
        ),
        "grouped attention": lambda: Do(
            lambda m, x: x + grouped_attention(m, m.n(x)),
            n=n(c),
            q=lin(c, c),
            k=lin(c, c // 2),
            v=lin(c, c // 2),
            out=lin(c, c),
        ),
        "multihead": lambda: Do(
            lambda m, x: x + m.f(m.n(x), m.n(x), m.n(x), need_weights=False)[0],
            n=n(c),
            f=nn.MultiheadAttention(c, 2, batch_first=True),
        ),
        "queries": lambda: Do(
            learned_queries, queries=free(1, 3, c), q=lin(c, 8), k=lin(c, 8), v=lin(c, 8), out=lin(8, c)
        ),
        "position": lambda: Do(lambda m, x: x + m.table[:, : x.shape[1]], table=free(1, tokens + 2, c)),
        "class token": lambda: Do(lambda m, x: torch.cat([m.token.expand(len(x), -1, -1), x], 1), token=free(1, 1, c)),
        "mix tokens": lambda: Do(
            lambda m, x: x + m.f(x[:, :tokens].transpose(1, 2)).transpose(1, 2).mean(1, keepdim=True),
            f=lin(tokens, tokens),
        ),
        "layer scale": lambda: Do(lambda m, x: x + m.scale * m.f(m.n(x)), n=n(c), scale=free(c), f=lin(c, c)),
        "temperature": lambda: Do(lambda m, x: x + m.f(x) * m.t.exp(), t=free(1), f=lin(c, c)),
        "act": lambda: a(),
        "shared": lambda: Do(lambda m, x: m.f(F.gelu(m.f(x))), f=lin(c, c)),
    }
    return blocks[name]() if name else sorted(blocks)


IMAGE_BLOCKS, TOKEN_BLOCKS = image_block("", 8, "none", "relu", 0), token_block("", 8, "none", "relu", 0)


class Network(nn.Module):
    def __init__(self, spec):
        super().__init__()
        torch.manual_seed(spec["seed"])
        c = spec["width"]
        self.stem = nn.Conv2d(3, c, 3, padding=1)
        self.images = nn.Sequential(*(image_block(*block, 0) for block in spec["images"]))
        self.patch = nn.Conv2d(c, c, 2, 2)
        self.tokens = nn.Sequential(*(token_block(*block, 0) for block in spec["tokens"]))
        self.pool = spec["pool"]
        self.head = nn.Linear(c, CLASSES)

    def forward(self, x):
        x = self.images(self.stem(x))
        x = self.tokens(self.patch(x).flatten(2).transpose(1, 2))
        x = {"mean": x.mean(1), "first": x[:, 0], "max": x.amax(1)}[self.pool]
        return self.head(x)


@st.composite
def specs(draw):
    width = draw(st.sampled_from([8, 12]))

    def blocks(names, norms):
        one = st.tuples(
            st.sampled_from(names), st.just(width), st.sampled_from(sorted(norms)), st.sampled_from(sorted(ACTS))
        )
        return draw(st.lists(one, max_size=3))

    return {
        "width": width,
        "images": blocks(IMAGE_BLOCKS, NORMS_2D),
        "tokens": blocks(TOKEN_BLOCKS, NORMS_1D),
        "pool": draw(st.sampled_from(["mean", "first", "max"])),
        "seed": draw(st.integers(0, 99)),
    }
