"""The plan of a growth: how much each unit grows, and the larger plain network (the reverse of extraction)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...map.labels import Ints
from ...map.units import UnitMap
from ..extraction.cut import ALIGNMENT, Cutter, Shaping, shaped
from ..extraction.trace import Footprint
from .grown import Growth, grown_axes


class Grower(Cutter):
    """Grows one plain network. A cut says whether each unit stays; here the same argument says how many units it
    becomes.

    wanted: name of a layer on the map -> number of new units; other layers keep their size. up: round up instead of
    down if rows must stay equally long.
    """

    def __init__(
        self, plain: nn.Module, unit_map: UnitMap, seen: Footprint, wanted: Mapping[str, int], up: bool
    ) -> None:
        on = torch.zeros(unit_map.num_units + 1, dtype=torch.bool)
        on[0] = True
        super().__init__(plain, {}, unit_map, seen, on)
        self.wanted, self.up = wanted, up
        self.rows += self._norm_rows()
        self.widths: Ints = np.ones(unit_map.num_units + 1, dtype=np.int64)

    def _norm_rows(self) -> list[Ints]:
        """The groups of a norm stay equally wide."""
        found = ((n, getattr(self.modules[path], "num_groups", 1)) for path, n in self.unit_map.norms.items())
        return [n.units.reshape(groups, -1) for n, groups in found if type(groups) is int and groups > 1]

    def settled(self, held: Tensor) -> Tensor:
        """`[U + 1]`: the number of units that each becomes. It is equal for units at the same position in rows that
        must stay equally long, and 1 for units that are held and entries that are always on. Heads that cannot become
        wider are followed by whole new ones."""
        leader = self._tied()
        fixed = held.numpy().copy()
        fixed[0] = True
        firm = np.isin(leader, leader[fixed])
        fixed[self.seen.whole] = True
        while True:
            narrow = np.isin(leader, leader[fixed])
            self.widths = np.ones(len(leader), dtype=np.int64)
            of_block = leader.copy()
            for block in self._heads(narrow & ~firm):
                of_block[block], narrow[block], self.widths[block] = block[0], False, len(block)
            counts = self._shared_out(of_block, narrow)
            odd = [u for u in self.seen.aligned if counts[u].sum() % ALIGNMENT and (counts[u] > 1).any()]
            if not odd:
                return torch.from_numpy(counts)
            fixed[np.concatenate(odd)] = firm[np.concatenate(odd)] = True

    def _heads(self, narrow: Any) -> list[Ints]:
        """The units of the rows that a forward splits a tensor into, if these units cannot grow one by one. (Under
        rotary position embeddings the two halves of a head are the same units.)"""
        found: dict[int, Ints] = {}
        for rows in sorted(self.seen.rows, key=lambda r: -r.shape[1]):  # a head before a part of one
            blocks = {row.tobytes(): np.unique(row) for row in rows}
            for row in rows:
                block = blocks[row.tobytes()]
                whole = len(block) > 1 and (np.diff(block) == 1).all() and len(row) % len(block) == 0
                if whole and np.array_equal(row, np.tile(block, len(row) // len(block))) and narrow[rows].all():
                    if not any(u in found for u in block.tolist()):
                        found |= dict.fromkeys(block.tolist(), block)
        return list({id(block): block for block in found.values()}.values())

    def _tied(self) -> Ints:
        """Unit -> the smallest unit that must have the same count."""
        leader = np.arange(self.seen.units + 1)
        before = None
        while before is None or (before != leader).any():
            before = leader.copy()
            for rows in (r for r in self.rows if len(r) > 1):
                np.minimum.at(leader, leader[rows].reshape(-1), np.tile(leader[rows].min(0), len(rows)))
                leader = leader[leader]
        return leader

    def _shared_out(self, leader: Ints, fixed: Any) -> Ints:
        """Distribute the new units evenly over each layer's units."""
        counts = np.ones(len(leader), dtype=np.int64)
        times: dict[int, int] = {}
        layers = [(self.wanted.get(n.removesuffix(".weight"), 0), a, b) for n, a, b in self.unit_map.layers]
        for more, start, stop in sorted(layers, key=lambda x: x[0] == 0):  # requested layers decide for tied ones
            free = [u for u in range(start, stop) if not fixed[u]]
            of_class: dict[int, int] = {}
            for u in free:
                of_class[int(leader[u])] = of_class.get(int(leader[u]), 0) + 1
            seen = given = 0
            for first, size in of_class.items():
                seen += size
                if first not in times:
                    short = more * seen / len(free) - given
                    times[first] = max(int(np.ceil(short / size - 1e-9) if self.up else (short + 1e-9) // size), 0)
                given += times[first] * size
            for u in free:
                counts[u] = 1 + times[int(leader[u])]
        return counts

    # ---- the larger network ------------------------------------------------------------------------------------

    def growth(self, counts: Tensor) -> Growth:
        """The planned growth."""
        growth = Growth(counts[1:].numpy().copy(), self.widths[1:].copy())
        for path, module in self.modules.items():
            sizes = self._sizes(path, self._grown_parameters(path, module, growth), counts)
            if sizes:
                growth.sizes[path] = sizes
            for name, b in module._buffers.items():
                full = f"{path}.{name}" if path else name
                norm = self.unit_map.norms.get(path)
                at = self.seen.buffers.get(full)
                if norm is not None and b is not None and b.dim() == 1 and len(b) == len(norm.units):
                    at = 0, norm.units
                if at is not None and (growth.counts[at[1][at[1] != 0] - 1] > 1).any():
                    growth.buffers[full] = at
        return growth

    def resizes(self, path: str, keep: Tensor) -> dict[str, Any]:
        """New heads do not change the width of a head, and their number is inferred."""
        return super().resizes(path, torch.where(torch.from_numpy(self.widths > 1), 1, keep))

    def cut(self, keep: Tensor) -> tuple[nn.Module, Shaping]:
        """The network with these counts of units; new elements have the old ones' mean and standard deviation."""
        growth = self.growth(keep)
        made = copy.deepcopy(self.plain, {id(p): p for p in self.plain.parameters()})
        tied: dict[int, nn.Parameter] = {}
        for path, module in self.modules.items():
            target = made.get_submodule(path)
            values = self._grown_parameters(path, module, growth)
            for name, p in ((n, p) for n, p in module._parameters.items() if p is not None):
                target._parameters[name] = tied.setdefault(id(p), nn.Parameter(values[name], p.requires_grad))
            for name, b in module._buffers.items():
                if b is not None:
                    full = f"{path}.{name}" if path else name
                    target._buffers[name] = _grown_buffer(b, growth, full)
        shaping = Shaping(growth.sizes)
        return shaped(made, shaping), shaping

    def _grown_parameters(self, path: str, module: nn.Module, growth: Growth) -> dict[str, Tensor]:
        out = {}
        for name, p in ((n, p) for n, p in module._parameters.items() if p is not None):
            entry = self._entry(path, name)
            new = grown_axes(growth, entry.shape, entry.view, [(f.units, f.shape, f.owner) for f in entry.factors])
            value = p.detach()
            if new.shape != entry.shape:
                spread = float(value.std()) if value.numel() > 1 else 0.02
                fresh = torch.randn(new.shape).to(value) * spread + value.mean()
                value = new.spread.grown(value, fresh)
            out[name] = value.clone()
        return out


def _grown_buffer(b: Tensor, growth: Growth, full: str) -> Tensor:
    """A buffer in its new size; new entries equal those of the units that they follow."""
    if full not in growth.buffers:
        return b.clone()
    dim, units = growth.buffers[full]
    return b.index_select(dim, torch.from_numpy(growth.along(units).parents).to(b.device))
