"""Overwrites tensors in place with random values and restores them bit for bit, without a copy of the large ones.

A large tensor's bits are changed reversibly: mantissas by an exclusive or with random bits, and exponents by a shift
that makes the largest elements large. Small tensors, and those of other types, are kept as copies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..functional import INTEGERS, bits_of

LARGE = 1 << 16  # elements
BLOCK = 1 << 18  # elements that are altered at once
FIELDS = {torch.float32: (23, 8), torch.float64: (52, 11), torch.bfloat16: (7, 8), torch.float16: (10, 5)}
"""Type -> number of bits of its mantissa and of its exponent."""

Where = Callable[[], Tensor] | None
"""A function that gives a mask of elements in the tensor's shape; None: all. It is called again for restoring."""


@dataclass
class _Altered:
    """A tensor that is altered block by block.

    Attributes:
        back: (number of a block, its content) -> its former content. start: the tensor's version before. written:
            number of altered blocks. end: the tensor's version before the first block was restored.
    """

    x: Tensor
    blocks: list[Tensor]
    back: Callable[[int, Tensor], Tensor]
    start: int
    written: int | None = None
    end: int | None = None

    def undo(self) -> None:
        """Restore the written blocks, last one first. The tensor's version counts the writes, so this can be
        interrupted anywhere and called again."""
        if self.written is None:
            self.written = self.x._version - self.start
        if self.end is None:
            self.end = self.x._version
        for i in reversed(range(self.written - (self.x._version - self.end))):
            self.blocks[i].copy_(self.back(i, self.blocks[i]))


class Altered:
    """Tensors that are altered until `undo` restores them, in the reverse order."""

    def __init__(self, seed: int = 0) -> None:
        self._seed, self._done = seed, list[_Altered]()
        self._random: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def undo(self, down_to: int = 0) -> None:
        """Restore all altered tensors except the first `down_to`; a KeyboardInterrupt is raised afterwards."""

        def back() -> None:
            with torch.no_grad():
                while len(self._done) > down_to:
                    self._done[-1].undo()
                    del self._done[-1]

        uninterrupted(back)

    def __len__(self) -> int:
        return len(self._done)

    def replace(self, x: Tensor, new: Tensor) -> None:
        """Overwrite a tensor with the values of another, keeping a copy."""
        old = x.detach().clone()
        self._write(x, [x.detach()], lambda i, now: new, lambda i, now: old)

    def turned_over(self, x: Tensor, zeros: Callable[[Tensor], Tensor]) -> None:
        """Multiply every element of a large tensor by a random factor from 1/2 to 2 that is not 1, by changing its
        mantissa. Zeros and subnormal numbers get values from `zeros`, a function that gives values in a tensor's
        shape."""
        mantissa, exponents, turn = FIELDS[x.dtype][0], _exponents(x), len(self._done)
        most, mask = 1 << (mantissa - 1), (1 << mantissa) - 1
        kept: dict[int, tuple[Tensor, np.ndarray]] = {}

        def change(i: int, now: Tensor) -> Tensor:
            bits = bits_of(now)
            turned = (bits ^ ((self._key(now, i, turn) | most) & mask)).view(now.dtype)
            small = (bits & exponents) == 0
            if bool(small.any()):
                was = bits[small]
                kept[i] = (was if bool(was.any()) else was.new_zeros(()), np.packbits(small.cpu().numpy()))
                turned = torch.where(small, zeros(now), turned)
            return turned

        def back(i: int, now: Tensor) -> Tensor:
            bits = bits_of(now) ^ ((self._key(now, i, turn) | most) & mask)
            if i in kept:
                was, packed = kept[i]
                small = torch.from_numpy(np.unpackbits(packed, count=now.numel()).astype(bool)).view(now.shape)
                bits[small.to(bits.device)] = was
            return bits.view(now.dtype)

        self._write(x, blocks_of(x), change, back)

    def overwrite(self, x: Tensor, where: Where, noise: Callable[[], Tensor], top: float) -> int:
        """Overwrite some elements of a tensor with random values up to `top`. A small tensor gets the values of
        `noise`. In a large one all exponents are shifted so that the largest element gets the exponent below that of
        `top`, zeros get that of `top`, and signs and mantissas are changed at random. Returns the number of elements
        overwritten."""
        on = None if where is None else where()
        number = x.numel() if on is None else int(on.count_nonzero())
        shift = self._shift(x, top) if is_large(x) else None
        if shift is None:
            self.replace(x, noise() if on is None else torch.where(on, noise(), x.detach()))
            return number
        (by, highest), turn = shift, len(self._done)
        exponents, rest, blocks = _exponents(x), ~_exponents(x), blocks_of(x)
        masks: list[Tensor] = []  # one byte per element, so they are not kept until restoring

        def some(i: int, new: Tensor, now: Tensor) -> Tensor:
            if where is None:
                return new
            if not masks:
                masks.extend(where().split(len(blocks[0])))
            return torch.where(masks[i], new, now)

        def change(i: int, now: Tensor) -> Tensor:
            bits = bits_of(now)
            turned = bits ^ (self._key(now, i, turn) & rest)
            shifted = torch.where((bits & exponents) == 0, turned | highest, turned + by)
            return some(i, shifted.view(now.dtype), now)

        def back(i: int, now: Tensor) -> Tensor:
            bits = bits_of(now)
            turned = bits ^ (self._key(now, i, turn) & rest)
            shifted = torch.where((bits & exponents) == highest, turned & rest, turned - by)
            return some(i, shifted.view(now.dtype), now)

        masks.extend(() if on is None else on.split(len(blocks[0])))
        self._write(x, blocks, change, back)
        masks.clear()
        return number

    def _write(
        self, x: Tensor, blocks: list[Tensor],
        change: Callable[[int, Tensor], Tensor], back: Callable[[int, Tensor], Tensor],
    ) -> None:  # fmt: skip
        with torch.no_grad():
            done = _Altered(x, blocks, back, x._version)
            self._done.append(done)
            for i, block in enumerate(blocks):
                block.copy_(change(i, block))
            done.written = len(blocks)

    def _shift(self, x: Tensor, top: float) -> tuple[int, int] | None:
        """The number to add to the bits of a tensor's elements, and the bits of the exponent for zeros; None if the
        smallest element would become subnormal, or an element is not finite."""
        mantissa, width = FIELDS[x.dtype]
        exponents, first, last = _exponents(x), 1 << width, 0
        for block in blocks_of(x):
            found = bits_of(block) & exponents
            last = max(last, int(found.max()) >> mantissa)
            first = min(first, int(torch.where(found == 0, exponents, found).min()) >> mantissa)
        highest = int(np.floor(np.log2(top))) + (1 << (width - 1)) - 1
        by = highest - 1 - last
        return None if last == (1 << width) - 1 or first + by < 1 else (by << mantissa, highest << mantissa)

    def _key(self, block: Tensor, i: int, turn: int) -> Tensor:
        """Random bits for a block in a turn, the same at each call: a window of bits that are drawn once."""
        dtype = INTEGERS[block.element_size()]
        drawn = self._random.get((dtype, block.device))
        if drawn is None or len(drawn) < block.numel() + BLOCK:
            info = torch.iinfo(dtype)
            generator = torch.Generator().manual_seed(self._seed)
            drawn = torch.randint(info.min, info.max, (block.numel() + 2 * BLOCK,), generator=generator, dtype=dtype)
            self._random[dtype, block.device] = drawn = drawn.to(block.device)
        start = (i * 104_729 + turn * 7_919) % BLOCK
        return drawn[start : start + block.numel()].view(block.shape)


def uninterrupted(work: Callable[[], None]) -> None:
    """Run restartable work to its end, even if interrupted; a KeyboardInterrupt is raised afterwards."""
    try:
        work()
    except KeyboardInterrupt:
        uninterrupted(work)
        raise


def is_large(x: Tensor) -> bool:
    """Is a tensor altered bit by bit, without a copy?"""
    return x.numel() >= LARGE and x.dtype in FIELDS and type(x) in (Tensor, torch.nn.Parameter) and x.dim() > 0


def blocks_of(x: Tensor) -> list[Tensor]:
    """A tensor in parts of about `BLOCK` elements."""
    return list(x.detach().split(max(1, BLOCK * x.shape[0] // x.numel()))) if x.dim() else [x.detach()]


def _exponents(like: Tensor) -> int:
    """A bit mask of the exponent of a type."""
    mantissa, width = FIELDS[like.dtype]
    return ((1 << width) - 1) << mantissa
