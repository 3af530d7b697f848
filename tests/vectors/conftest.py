"""Fixtures of the tests of task vectors; their models are in `tests/vector_parts.py`."""

from __future__ import annotations

import pytest
import torch
import vector_parts

from hatcl.vectors import tensors


@pytest.fixture
def pair():
    """A model and what fine-tuning made of it."""
    torch.manual_seed(0)
    base = vector_parts.Tied()
    return base, vector_parts.moved(base)


@pytest.fixture
def reads(monkeypatch):
    """The names of the tensors that were read from files, in order."""
    names: list[str] = []
    read = tensors._read_tensor
    monkeypatch.setattr(tensors, "_read_tensor", lambda path, name: names.append(name) or read(path, name))
    return names
