"""The weights of a model while its graft is learned, with hard or soft gamma; the original ones are kept."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from . import inplace
from .selection import Pairs, change_of


class HardWeights:
    """The pretrained tensors, with fine-tuned values at the members of a mask. The original values are kept."""

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs
        self.kept: dict[str, tuple[Tensor, Tensor]] = {}
        self.shown: Mapping[str, Tensor] | None = None

    def compute_with(self, members: Mapping[str, Tensor], logits: Mapping[str, Tensor]) -> None:
        self.show(members)

    @torch.no_grad()
    def show(self, members: Mapping[str, Tensor]) -> None:
        if self.shown is members:
            return
        self.close()
        self.shown = members
        for name, at in members.items():
            before, after = self.pairs[name]
            long = at.to(before.device, torch.long)
            self.kept[name] = at, inplace.take(before, long)
            inplace.put(before, long, _taken(after, long).to(before))

    def delta(self, name: str) -> Tensor:
        d = change_of(self.pairs[name])
        if name in self.kept:
            at, was = self.kept[name]
            long = at.to(was.device, torch.long)
            inplace.put(d, long, change_of((was, _taken(self.pairs[name][1], long))).to(d))
        return d

    def close(self) -> None:
        with torch.no_grad():
            for name, (at, was) in self.kept.items():
                inplace.put(self.pairs[name][0], at.to(was.device, torch.long), was)
        self.kept, self.shown = {}, None


class SoftWeights:
    """`theta_pre + sigmoid(L) * delta`, as published. The original values are kept as a copy of all candidates."""

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs
        self.kept: dict[str, Tensor] = {}

    @torch.no_grad()
    def compute_with(self, members: Mapping[str, Tensor], logits: Mapping[str, Tensor]) -> None:
        self._keep()
        for name, was in self.kept.items():
            d = self.delta(name)
            self.pairs[name][0].copy_(torch.addcmul(was.to(d), logits[name].to(d.device).sigmoid(), d))

    @torch.no_grad()
    def show(self, members: Mapping[str, Tensor]) -> None:
        self._keep()
        for name, was in self.kept.items():
            before, after = self.pairs[name]
            before.copy_(was)
            if name in members:
                at = members[name].to(before.device, torch.long)
                inplace.put(before, at, _taken(after, at).to(before))

    def delta(self, name: str) -> Tensor:
        return change_of((self.kept[name], self.pairs[name][1]))

    def _keep(self) -> None:
        if not self.kept:
            self.kept = {n: self.pairs[n][0].clone() for n in self.pairs}

    def close(self) -> None:
        with torch.no_grad():
            for name, was in self.kept.items():
                self.pairs[name][0].copy_(was)
        self.kept = {}


def _taken(t: Tensor, at: Tensor) -> Tensor:
    return inplace.take(t, at.to(t.device))
