"""Labels and their coupling: a union-find over every index of every parameter dimension.

A *label* stands for one index of one dimension of one parameter; label 0 stands for "always on". While the model runs,
labels that meet in the same channel are coupled. Labels that are coupled at the end are one unit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class Labels:
    """A growing union-find with vectorised `find` and `union`, and one flag array per role a label can play."""

    ROLES = ("carried", "owns", "read", "forced", "dropped", "whole")

    def __init__(self) -> None:
        self._parent: Ints = np.zeros(1, dtype=np.int64)  # longer than needed, so that growing is cheap
        self._flags = np.zeros((len(self.ROLES), 1), dtype=bool)
        self._take(1)
        self.starts: list[int] = [0]
        self.axes: list[tuple[Any, ...]] = [("", None)]

    def new(self, count: int, axis: tuple[Any, ...]) -> int:
        """`count` fresh labels for `axis` = (parameter name, dimension); returns the first."""
        first = len(self.parent)
        if first + count > len(self._parent):
            room = first + 2 * count
            self._parent = np.concatenate([self._parent, np.zeros(room, dtype=np.int64)])
            self._flags = np.concatenate([self._flags, np.zeros((len(self.ROLES), room), dtype=bool)], axis=1)
        self._take(first + count)
        self.parent[first:] = np.arange(first, first + count)
        self.starts.append(first)
        self.axes.append(axis)
        return first

    def _take(self, size: int) -> None:
        """Use the first `size` entries of the allocated arrays as the labels."""
        self.parent = self._parent[:size]
        self.flags = dict(zip(self.ROLES, self._flags[:, :size], strict=True))

    def find(self, labels: Ints) -> Ints:
        """The representative (smallest coupled label) of each label."""
        root = self.parent[labels]
        while True:
            up = self.parent[root]
            if np.array_equal(up, root):
                return root
            root = up

    def union(self, left: Ints, right: Ints) -> None:
        """Couple labels pairwise. Pairs with label 0 are skipped: nothing is coupled to "always on"."""
        both = (left != 0) & (right != 0)
        left, right = left[both], right[both]
        while left.size:
            left, right = self.find(left), self.find(right)
            apart = left != right
            left, right = left[apart], right[apart]
            low, high = np.minimum(left, right), np.maximum(left, right)
            np.minimum.at(self.parent, high, low)

    def mark(self, role: str, labels: Ints) -> None:
        """Give labels a role; "always on" never has one."""
        self.flags[role][labels] = True
        self.flags[role][0] = False

    def axes_of(self, labels: Ints) -> list[tuple[Any, ...]]:
        """The (parameter, dimension) axes to which the labels belong."""
        found = np.unique(np.searchsorted(self.starts, labels[labels != 0], side="right") - 1)
        return [self.axes[i] for i in found]

    def any_in_component(self, role: str) -> NDArray[np.bool_]:
        """For every label: does its component hold a label that plays `role`?"""
        roots = self.find(np.arange(len(self.parent)))
        hit = np.zeros(len(self.parent), dtype=bool)
        hit[roots[self.flags[role]]] = True
        return hit[roots]
