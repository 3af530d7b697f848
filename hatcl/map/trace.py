"""The trace: run the model's own forward once and see which unit every parameter element writes and reads.

Beside every tensor goes a `Shadow` (see `shadow.py`). Five rules move it on:

1. view-like operations act on the shadow as on the tensor;
2. elementwise operations couple the labels that meet along the same dimensions; a parameter takes the unit of what it
   meets;
3. contractions (linear, convolution, matmul, attention) give the output the weight's own labels, and couple each input
   index of the weight with the unit it reads; where both sides are activations, the contracted labels are coupled;
4. a reduction over differing units is noted and forgets them;
5. an operation that is not known forgets the units of its inputs, and its parameters get a copy per task.

Whether an off unit stays exactly zero through an elementwise operation is not listed but tried: the operation is run on
single numbers with zeros where an off unit would be.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.weak import WeakTensorKeyDictionary

from ..calls import call, tensors_of, values_of
from ..errors import ConversionError
from .labels import Ints, Labels
from .shadow import Axis, Shadow, Slot, apply_as_is, reshape, settle, small, varying

aten = torch.ops.aten
Use = tuple[str, Axis]  # (path of the module at work, axis)

VIEWS = {
    "permute", "transpose", "t", "expand", "slice", "select", "unsqueeze", "squeeze", "unbind", "split", "chunk",
    "split_with_sizes", "flip", "roll", "repeat", "narrow", "diagonal", "unfold", "pixel_shuffle", "pixel_unshuffle",
    "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d", "im2col",
    "index_select", "index", "gather", "repeat_interleave", "upsample_nearest1d", "upsample_nearest2d", "rot90",
    "channel_shuffle", "stack", "native_channel_shuffle", "_upsample_nearest_exact2d", "movedim", "tril", "triu",
    "split_copy", "unbind_copy", "permute_copy", "slice_copy", "alias_copy", "unsafe_split", "unsafe_chunk",
    "unsafe_split_with_sizes",
}  # fmt: skip
SAME = {"clone", "contiguous", "detach", "alias", "lift_fresh", "_to_copy", "positive", "to", "lift", "_conj"}
RESHAPES = {"view", "_unsafe_view", "reshape", "_reshape_alias", "view_copy"}
FACTORIES = {
    "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "new_zeros", "new_ones",
    "new_empty", "new_full", "new_empty_strided", "empty_strided", "arange", "size", "sym_size", "is_same_size",
}  # fmt: skip
SPATIAL = {
    "avg_pool1d": 1, "avg_pool2d": 2, "avg_pool3d": 3, "max_pool2d_with_indices": 2, "max_pool3d_with_indices": 3,
    "_adaptive_avg_pool2d": 2, "_adaptive_avg_pool3d": 3, "adaptive_max_pool2d": 2, "adaptive_max_pool3d": 3,
    "upsample_bilinear2d": 2, "_upsample_bilinear2d_aa": 2, "upsample_bicubic2d": 2, "_upsample_bicubic2d_aa": 2,
    "upsample_linear1d": 1, "upsample_trilinear3d": 3, "adaptive_avg_pool1d": 1, "adaptive_max_pool1d": 1,
    "max_pool2d": 2, "max_pool1d": 1,
}  # fmt: skip
REDUCTIONS = {
    "mean", "sum", "amax", "amin", "max", "min", "var", "std", "var_mean", "std_mean", "linalg_vector_norm", "norm",
    "logsumexp", "prod", "argmax", "argmin", "any", "all", "median",
}  # fmt: skip
LINEAR_REDUCTIONS = {"mean", "sum", "amax", "amin", "linalg_vector_norm", "norm"}
ALONG = {
    "_softmax",
    "_log_softmax",
    "cumsum",
    "cumprod",
    "sort",
    "logcumsumexp",
    "_safe_softmax",
    "softmax",
    "log_softmax",
}
BATCH_NORMS = {
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
    "_batch_norm_no_update", "_batch_norm_with_update", "batch_norm", "miopen_batch_norm",
}  # fmt: skip
ATTENTIONS = {
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable", "scaled_dot_product_attention",
}  # fmt: skip
GROUPED = {"_grouped_mm", "grouped_mm_fallback"}  # torch's, and what transformers puts in its place


def inplace_like(args: tuple) -> bool:
    """`as_strided_` that only changes the memory format."""
    return tuple(args[1]) == tuple(args[0].shape)


def _same(a: Slot, b: Slot) -> bool:
    return a.clean == b.clean and a.ids.stride() == b.ids.stride() and torch.equal(small(a.ids), small(b.ids))


@dataclass
class NormSeen:
    """What entered a norm module: the labels along each dimension that carries units, whether off units were zero,
    whether its statistics are taken across units, and along which of its dimensions those run, how many dimensions it
    has; kind: see `registry.register`."""

    ids: dict[int, Ints]
    clean: bool
    across: bool = False
    over: frozenset[int] = frozenset()
    ndim: int = 0
    kind: str = ""


@dataclass
class Trace:
    """What one run of the model told."""

    labels: Labels
    first: dict[Axis, int]
    joint: dict[str, tuple[tuple[int, ...], tuple[int, ...], int]]
    folds: set[Use]
    read_dirty: set[Use]
    outputs: Ints
    norms: dict[str, NormSeen]
    mixing: dict[str, NormSeen]
    seen: set[str]
    standardised: set[str]
    notes: dict[str, str] = field(default_factory=dict)


class Tracer(TorchDispatchMode):
    """Carries shadows through one forward pass. Use through `trace`."""

    def __init__(self, model: nn.Module, norms: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self.labels = Labels()
        self.shadows = WeakTensorKeyDictionary()
        self.versions = WeakTensorKeyDictionary()
        self.first: dict[Axis, int] = {}
        self.joint: dict[str, tuple[tuple[int, ...], tuple[int, ...], int]] = {}
        self.folds: set[Use] = set()
        self.read_dirty: set[Use] = set()
        self.norm_inputs: dict[str, NormSeen] = {}
        self.mixing: dict[str, NormSeen] = {}  # other modules without children that reduce over units: maybe norms
        self.remade: set[str] = set()  # norms that multiply by something else than their weight, such as 1 + weight
        self.entered: dict[str, Shadow] = {}
        self.seen: set[str] = set()
        self.standardised: set[str] = set()  # weights that go through a batch norm of their own before use
        self.notes: dict[str, str] = {}
        self.path: list[str] = [""]
        self.at: tuple[str, str] | None = None  # module path and operation that a rule is at work on
        # labels live on the CPU, wherever the model is made
        self.on_cpu = (
            contextlib.nullcontext if torch.get_default_device().type == "cpu" else lambda: torch.device("cpu")
        )
        self.modules = dict(model.named_modules())
        self.is_norm = norms
        for name, p in model.named_parameters():
            slots = []
            for d, n in enumerate(p.shape):
                if n > 1:
                    start = self.labels.new(n, (name, d))
                    self.first[name, d] = start
                    shape = [1] * p.dim()
                    shape[d] = n
                    ids = torch.arange(start, start + n, device="cpu").view(shape).expand(p.shape)
                    slots.append(Slot(ids, True, frozenset({(name, d)})))
            self.shadows[p] = Shadow(tuple(slots), frozenset({name}))

    # ---- bookkeeping -------------------------------------------------------------------------------------------

    def shadow(self, x: Any) -> Shadow | None:
        if not isinstance(x, Tensor):
            return None
        found = self.shadows.get(x)
        base = x._base
        if base is not None and base in self.versions and self.versions[base] != self.versions.get(x):
            whole = self.shadows[base]
            found = whole.map(
                lambda ids: self._like_storage(ids, base).as_strided(
                    x.size(), x.stride(), x.storage_offset() - base.storage_offset()
                )
            )
            self.shadows[x] = found
            self.versions[x] = self.versions[base]
        return found

    @staticmethod
    def _like_storage(ids: Tensor, base: Tensor) -> Tensor:
        return torch.empty_strided(base.size(), base.stride(), dtype=torch.long).copy_(ids)

    def write(self, x: Tensor, shadow: Shadow | None) -> None:
        """An in-place operation gave `x` this shadow; a view writes through to its base."""
        base = x._base
        if base is None or not base.numel():
            self.shadows[x] = shadow or Shadow()
        else:
            old = self.shadow(base) or Shadow()
            new = shadow or Shadow()
            slots = []
            for i in range(max(len(old.slots), len(new.slots))):
                whole = (
                    old.slots[i] if i < len(old.slots) else Slot(torch.zeros((), dtype=torch.long).expand(base.shape))
                )
                part = new.slots[i] if i < len(new.slots) else Slot(torch.zeros((), dtype=torch.long).expand(x.shape))
                ids = self._like_storage(whole.ids, base)
                ids.as_strided(x.size(), x.stride(), x.storage_offset() - base.storage_offset()).copy_(part.ids)
                slots.append(Slot(settle(ids), whole.clean and part.clean))
            self.shadows[base] = Shadow(tuple(slots), pending=old.pending | new.pending)
            self.shadows[x] = new
            self.versions[base] = self.versions.get(base, 0) + 1
            self.versions[x] = self.versions[base]

    def note(self, what: str) -> None:
        self.notes.setdefault(self.path[-1], what)

    def commit(self, shadow: Shadow | None) -> None:
        if shadow is not None:
            self.folds |= shadow.pending

    def disown(self, shadow: Shadow) -> None:
        """Parameters met in a way that no rule covers: one-sided nowhere, a copy per task instead."""
        for slot in shadow.slots:
            self.mark("dropped", slot.ids)

    def mark(self, role: str, ids: Tensor) -> None:
        self.labels.mark(role, small(ids).numpy())

    # ---- coupling ----------------------------------------------------------------------------------------------

    def couple(self, left: Tensor, right: Tensor) -> None:
        self.labels.union(*self.pairs(left, right))

    def pairs(self, left: Tensor, right: Tensor) -> tuple[Ints, Ints]:
        """Which labels meet, each pair once."""
        a, b = (x.reshape(-1).numpy() for x in torch.broadcast_tensors(small(left), small(right)))
        keys = np.sort(a * len(self.labels.parent) + b)
        keys = keys[np.diff(keys, prepend=-1) != 0]  # np.unique's hashing takes seconds where most keys differ
        return np.divmod(keys, len(self.labels.parent))

    def spread(self, act: Tensor, param: Tensor) -> int:
        """Into how few units would coupling collapse the activation's: the most labels that one parameter label
        meets."""
        a, b = self.pairs(act, param)
        b = b[(a != 0) & (b != 0)]
        return int(np.unique(b, return_counts=True)[1].max()) if b.size else 1 << 30

    def couple_along(self, ids: Tensor, dims: Sequence[int]) -> Tensor:
        """Make one unit of what differs along `dims` alone."""
        first = ids
        for d in dims:
            first = first.narrow(d, 0, 1)
        self.couple(ids, first)
        return self.canonical(first.expand(ids.shape))

    def adopt(self, ids: Tensor, slots: Sequence[Slot]) -> int | None:
        """Which of a parameter's slots runs along the activation's labels (its index), if any."""
        dims = set(varying(ids))
        options = [i for i, s in enumerate(slots) if dims & set(varying(s.ids))]
        if not options:
            return None
        return min(options, key=lambda i: self.spread(ids, slots[i].ids)) if len(options) > 1 else options[0]

    def canonical(self, ids: Tensor) -> Tensor:
        """The slot with coupled labels made equal, so that what has become constant is kept as such."""
        return settle(torch.from_numpy(self.labels.find(small(ids).numpy())).expand(ids.shape))

    def own(self, param: Tensor, ids: Tensor) -> None:
        """The parameter's labels take the units they meet; where they meet "always on" they are forced on."""
        p, a = torch.broadcast_tensors(small(param), small(ids))
        p, a = p.reshape(-1).numpy(), a.reshape(-1).numpy()
        self.couple(param, ids)
        self.labels.mark("owns", p)
        self.labels.mark("forced", p[a == 0])

    # ---- dispatch ----------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is aten.embedding_renorm_.default:
            return args[0]  # it would scale rows of the model's table in place; they belong to what they belonged to
        flat, spec = tree_flatten((args, kwargs))
        shadows = [self.shadow(x) for x in flat]
        out = func(*args, **kwargs)
        tracked = [s for s in shadows if s is not None]
        if not tracked:
            return out
        for s in tracked:
            self.seen |= s.sources
        name = func._schema.name.split("::")[1]
        inplace = name[:-1] if name.endswith("_") and not name.startswith("__") else None
        self.at = (self.path[-1], func._schema.name)
        with torch.utils._python_dispatch._disable_current_modes(), self.on_cpu():
            result = self.rule(func, inplace or name, args, kwargs, flat, spec, shadows, out)
        self.at = None
        if inplace and isinstance(args[0], Tensor):
            self.write(args[0], result[0] if isinstance(result, list) else result)
        else:
            outs = [x for x in tree_flatten(out)[0]]
            results: list[Shadow | None] = result if isinstance(result, list) else [result] * len(outs)
            for x, moved in zip(outs, results, strict=False):
                if isinstance(x, Tensor) and moved is not None and x not in self.shadows:
                    self.shadows[x] = moved if moved.of_parameters else self.distinct(moved)
        return out

    def distinct(self, shadow: Shadow) -> Shadow:
        """Without slots that say nothing: of one unit that spans the whole tensor and is not zero where it is off
        (it is always on, then), and those that say the same as another."""
        kept: list[Slot] = []
        for slot in shadow.slots:
            if not varying(slot.ids) and (not slot.clean or not bool(small(slot.ids).any())):
                self.labels.mark("whole", small(slot.ids).reshape(-1).numpy())
            elif not any(_same(slot, other) for other in kept):
                kept.append(slot)
        return shadow if len(kept) == len(shadow.slots) else replace(shadow, slots=tuple(kept))

    def rule(
        self, func: Any, name: str, args: tuple, kwargs: dict, flat: list, spec: Any, shadows: list, out: Any
    ) -> Shadow | list[Shadow | None] | None:
        if name in FACTORIES:
            return None
        if name in SAME or (name == "as_strided" and inplace_like(args)):
            return self.shadow(args[0])
        if name == "copy_" or name == "copy":
            src = self.shadow(args[1]) or Shadow()
            return src.map(lambda ids: ids.expand(args[0].shape))
        if name in RESHAPES:
            s = self.shadow(args[0])
            if s is not None and s.of_parameters:
                return s.map(lambda ids: settle(reshape(ids, out.shape)))
            return s.map(lambda ids: reshape(ids, out.shape)) if s else None
        if name == "cat":
            return self.cat(args, kwargs, out)
        if name in VIEWS:
            return self.view_like(func, name, args, kwargs, flat, spec, shadows, out)
        if name not in BATCH_NORMS and name != "index_put":
            for s in shadows:  # whatever reads a value, in whichever argument, reads it gated
                self.commit(s)
        if name in SPATIAL:
            return self.spatial(SPATIAL[name], shadows[0], out)
        if name in ("mm", "bmm", "mv", "dot", "addmm", "baddbmm", "addbmm"):
            return self.matmul(name, args, out)
        if name in GROUPED:
            return self.grouped(args, out)
        if name == "mkldnn_rnn_layer":
            return self.lstm(args, shadows, out)
        if name == "_weight_norm_interface":
            return self.weight_norm(args, out)
        if name in ("convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution"):
            return self.convolution(args, out)
        if name in ATTENTIONS:
            return self.attention(args, out)
        if name == "embedding":
            return self.embedding(args, out)
        if name in BATCH_NORMS:
            return self.batch_norm(args, out)
        if name in ("native_layer_norm", "native_group_norm", "_fused_rms_norm"):
            return self.layer_norm(name, args, out)
        if name in REDUCTIONS:
            return self.reduction(func, name, args, kwargs, shadows[0], out)
        if name in ALONG:
            return self.along(name, args, shadows[0], out)
        if name == "index_put":
            return self.index_put(args, out)
        if torch.Tag.pointwise in func.tags or name in (
            "native_dropout",
            "dropout",
            "masked_fill",
            "where",
            "relu",
            "_prelu_kernel",
            "hardswish",
            "log_sigmoid_forward",
            "rrelu_with_noise",
        ):
            return self.pointwise(func, name, flat, spec, shadows, out)
        return self.unknown(func, shadows, out)

    def unknown(self, func: Any, shadows: list, out: Any) -> list[Shadow | None]:
        for s in shadows:
            if s is not None:
                self.commit(s)
                if s.of_parameters:
                    self.disown(s)
        if any(s is not None and s.slots for s in shadows):
            self.note(f"{func._schema.name} is not known to the trace: it forgets which units it carries")
        return [Shadow() if isinstance(x, Tensor) else None for x in tree_flatten(out)[0]]

    # ---- rule 1: views -----------------------------------------------------------------------------------------

    def view_like(
        self, func: Any, name: str, args: tuple, kwargs: dict, flat: list, spec: Any, shadows: list, out: Any
    ) -> Any:
        if name == "stack":
            dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
            parts = [self.shadow(x) for x in args[0]]
            wide = [s.map(lambda ids: ids.unsqueeze(dim)) if s else None for s in parts]
            return self.join(wide, [x.unsqueeze(dim).shape for x in args[0]], dim, out)
        if any(isinstance(x, Tensor) and x.is_meta for x in flat[1:]):  # nobody knows what is picked
            return self.unknown(func, shadows, out)
        if name in ("index", "gather", "index_select") and shadows[0] is None:
            return self.unknown(func, shadows, out) if any(s and s.slots for s in shadows[1:]) else Shadow()
        _x, s = flat[0], shadows[0]
        if s is None:
            return None
        outs = tree_flatten(out)[0]
        if name == "expand":
            return s.map(lambda ids: ids.expand(out.shape))
        moved: list[list[Slot]] = [[] for _ in outs]
        padded: set[int] = set()
        if name == "constant_pad_nd":
            padded = {flat[0].dim() - 1 - i // 2 for i, n in enumerate(args[1]) if n}
        for slot in s.slots:
            ids = slot.ids
            if padded and padded.isdisjoint(varying(ids)):  # a border belongs to its channel
                for d in padded:
                    ids = ids.narrow(d, 0, 1)
                zero = (args[2] if len(args) > 2 else kwargs.get("value", 0)) == 0
                moved[0].append(replace(slot, ids=ids.expand(out.shape), clean=slot.clean and zero))
                continue
            if name == "im2col":
                ids = ids.clone(memory_format=torch.contiguous_format)
            rest = [v.cpu() if isinstance(v, Tensor) else v for v in flat[1:]]  # ids live on the CPU, indices follow
            new_args, new_kwargs = torch.utils._pytree.tree_unflatten([ids, *rest], spec)
            result = tree_flatten(apply_as_is(func, new_args, new_kwargs, [ids]))[0]
            for bag, r in zip(moved, result, strict=False):
                bag.append(replace(slot, ids=settle(r) if varying(r) else r))
        return [Shadow(tuple(bag), s.sources, s.pending) for bag in moved]

    def cat(self, args: tuple, kwargs: dict, out: Tensor) -> Shadow:
        tensors = [x for x in args[0] if not (x.dim() == 1 and x.numel() == 0)]
        dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
        return self.join([self.shadow(x) for x in tensors], [x.shape for x in tensors], dim, out)

    def join(self, parts: list[Shadow | None], shapes: list, dim: int, out: Tensor) -> Shadow:
        """Concatenate shadows; slots are matched by the dimensions they run along, `dim` itself aside."""
        acts = [s for s in parts if s is not None and not s.of_parameters]
        frames: list[list[Slot | None]] = []
        keys: list[set[int]] = []

        def place(i: int, slot: Slot, dims: set[int]) -> None:
            for frame, key in zip(frames, keys, strict=False):
                if frame[i] is None and (key & dims or key == dims):
                    frame[i] = slot
                    key |= dims
                    return
            frames.append([None] * len(parts))
            frames[-1][i] = slot
            keys.append(set(dims))

        for i, s in enumerate(parts):
            if s is not None and (not acts or not s.of_parameters):
                for slot in s.slots:
                    place(i, slot, set(varying(slot.ids)) or {dim})
        if acts:  # a parameter beside activations (a class token): its labels along their dimensions become its units
            for i, s in enumerate(parts):
                if s is None or not s.of_parameters:
                    continue
                for frame, key in zip(frames, keys, strict=False):
                    rest = (key - {dim}) or key
                    fits = [p for p in s.slots if set(varying(p.ids)) & rest]
                    if fits:
                        slot = max(fits, key=lambda p: len(varying(p.ids)))
                        frame[i] = replace(slot, clean=True, folds=None)
                        self.mark("owns", slot.ids)
                        self.fold(slot)
        slots = []
        for frame in frames:
            pieces: list[Tensor] = []
            clean = True
            folds: frozenset[Axis] | None = frozenset()
            constant = [
                d for d in range(out.dim()) if d != dim and all(f is None or d not in varying(f.ids) for f in frame)
            ]
            for f, shape in zip(frame, shapes, strict=False):
                ids = f.ids if f is not None else torch.zeros((), dtype=torch.long).expand(shape)
                for d in constant:
                    ids = ids.narrow(d, 0, 1) if ids.size(d) > 1 else ids
                pieces.append(ids)
                if f is not None:
                    clean = clean and f.clean
                    folds = folds | f.folds if f.folds is not None and folds is not None else None
            ids = torch.cat(pieces, dim)
            slots.append(Slot(settle(ids.expand(out.shape)), clean, folds))
        pending = frozenset().union(*[s.pending for s in parts if s is not None])
        sources = frozenset() if acts else frozenset().union(*[s.sources for s in parts if s is not None])
        if not acts and not sources:
            return Shadow()
        return Shadow(tuple(slots), sources, pending)

    def fold(self, slot: Slot) -> None:
        """Multiply by the gate what this parameter value is made of, along this slot."""
        self.folds |= {(self.path[-1], a) for a in self.axes_of(slot)}

    def axes_of(self, slot: Slot) -> frozenset[Axis]:
        """Of what parameters' axes the slot's values are made."""
        return slot.folds if slot.folds is not None else frozenset(self.labels.axes_of(small(slot.ids).numpy()))

    def as_activation(self, slots: Sequence[Slot], dims: set[int]) -> list[Slot]:
        """A parameter that is used as data (learned queries): its labels along `dims` are units that it writes."""
        kept = [s for s in slots if dims & set(varying(s.ids))]
        for slot in kept:
            self.mark("owns", slot.ids)
            self.mark("carried", slot.ids)
            if slot.folds is not None:
                self.fold(slot)
        return [replace(slot, clean=slot.folds is not None, folds=None) for slot in kept]

    def index_put(self, args: tuple, out: Tensor) -> Shadow:
        x, values = self.shadow(args[0]) or Shadow(), self.shadow(args[2]) or Shadow()
        where = [None if i is None else i.cpu() for i in args[1]]
        slots = []
        for i in range(max(len(x.slots), len(values.slots))):
            zero = torch.zeros((), dtype=torch.long)
            a = x.slots[i] if i < len(x.slots) else Slot(zero.expand(args[0].shape))
            b = values.slots[i] if i < len(values.slots) else Slot(zero.expand(args[2].shape))
            ids = a.ids.clone(memory_format=torch.contiguous_format).index_put(where, b.ids)
            slots.append(Slot(settle(ids), a.clean and b.clean))
        return Shadow(tuple(slots), pending=x.pending | values.pending)

    # ---- rule 2: elementwise -----------------------------------------------------------------------------------

    def pointwise(self, func: Any, name: str, flat: list, spec: Any, shadows: list, out: Any) -> Any:
        outs = [x for x in tree_flatten(out)[0] if isinstance(x, Tensor)]
        shape = outs[0].shape
        wide = [s.map(lambda ids: ids.expand(shape)) if s is not None else None for s in shadows]
        if not any(s is not None and not s.of_parameters for s in wide):
            return self.of_parameters(func, name, flat, spec, wide)
        merged: list[Tensor] = []
        holders: list[dict[int, Slot]] = []
        for i, s in enumerate(wide):
            if s is None or s.of_parameters:
                continue
            for slot in s.slots:
                dims = set(varying(slot.ids))
                match = next((k for k, m in enumerate(merged) if dims & set(varying(m)) and i not in holders[k]), None)
                if match is None:
                    merged.append(slot.ids)
                    holders.append({i: slot})
                else:
                    self.couple(merged[match], slot.ids)
                    if merged[match] is not slot.ids:
                        merged[match] = (
                            torch.where(merged[match] != 0, merged[match], slot.ids)
                            if bool((small(merged[match]) == 0).any())
                            else merged[match]
                        )
                    holders[match][i] = slot
        owners: list[dict[int, Slot]] = [{} for _ in merged]
        for i, s in enumerate(wide):
            if s is None or not s.of_parameters:
                continue
            for k, ids in enumerate(merged):
                at = self.adopt(ids, s.slots)
                if at is not None:
                    self.own(s.slots[at].ids, ids)
                    owners[k][i] = s.slots[at]
        slots = []
        for k, ids in enumerate(merged):
            zero = {
                i for i, slot in holders[k].items()
                if slot.clean and not bool(((small(slot.ids) == 0) & (small(ids) != 0)).any())
            }  # fmt: skip
            clean = self.stays_zero(func, flat, spec, wide, zero)
            if not clean and owners[k] and self.stays_zero(func, flat, spec, wide, zero | set(owners[k])):
                clean = True
                for slot in owners[k].values():
                    self.fold(slot)
            elif not clean:
                for slot in owners[k].values():  # neither zero nor foldable: a copy per task
                    self.mark("dropped", slot.ids)
            slots.append(Slot(self.canonical(ids) if len(varying(ids)) > 1 else ids, clean))
        return [Shadow(tuple(slots))] * len(tree_flatten(out)[0])

    def probe(self, func: Any, flat: list, spec: Any, zero: set[int], seed: int) -> list[Tensor] | None:
        rng = np.random.default_rng(seed)
        sign = 1 if seed < 2 else -1
        values: list[Any] = []
        for i, x in enumerate(flat):
            if isinstance(x, Tensor):
                if x.dtype == torch.bool:
                    values.append(torch.tensor([bool(seed % 2)]))
                elif x.is_floating_point() or x.is_complex():
                    values.append(torch.tensor([0.0 if i in zero else sign * rng.uniform(0.5, 2.0)], dtype=x.dtype))
                else:
                    values.append(torch.tensor([0 if i in zero else int(rng.integers(1, 4))], dtype=x.dtype))
            else:
                values.append(x)
        args, kwargs = torch.utils._pytree.tree_unflatten(values, spec)
        try:
            return [x for x in tree_flatten(func(*args, **kwargs))[0] if isinstance(x, Tensor)]
        except (RuntimeError, TypeError, IndexError, ValueError, NotImplementedError):
            return None

    def stays_zero(self, func: Any, flat: list, spec: Any, wide: list, zero: set[int]) -> bool:
        if not zero:
            return False
        for seed in range(4):  # positive numbers, then negative ones; what is true and false in turn
            outs = self.probe(func, flat, spec, zero, seed)
            if outs is None or any(bool((x != 0).any()) or not bool(torch.isfinite(x).all()) for x in outs):
                return False
        return True

    def of_parameters(self, func: Any, name: str, flat: list, spec: Any, wide: list) -> Shadow:
        """Elementwise maths on parameters alone (weight standardisation, gains): the labels go on, and so do the axes
        by which the value could be scaled."""
        sources = frozenset().union(*[s.sources for s in wide if s is not None])
        merged: list[list[tuple[int, Slot]]] = []
        for i, s in enumerate(wide):
            for slot in s.slots if s is not None else ():
                match = next(
                    (m for m in merged if set(varying(m[0][1].ids)) == set(varying(slot.ids)) and m[-1][0] != i), None
                )
                if match is None:
                    merged.append([(i, slot)])
                else:
                    self.couple(match[0][1].ids, slot.ids)
                    match.append((i, slot))
        slots = []
        for group in merged:
            with_folds = {i: slot.folds for i, slot in group if slot.folds}
            folds = None
            for i, axes in with_folds.items():
                others = frozenset().union(*[s.sources for j, s in enumerate(wide) if s is not None and j != i])
                if {p for p, _ in axes} & others:
                    continue
                if self.scales(func, flat, spec, {i}):
                    folds = axes
            if folds is None and with_folds and len(with_folds) == len([s for s in wide if s is not None]):
                if self.scales(func, flat, spec, set(with_folds)):
                    folds = frozenset().union(*with_folds.values())
            slots.append(Slot(group[0][1].ids, True, folds))
            if folds is None and self.path[-1] in self.norm_inputs:
                self.remade.add(self.path[-1])
        return Shadow(tuple(slots), sources)

    def scales(self, func: Any, flat: list, spec: Any, which: set[int]) -> bool:
        """f(2x) = 2 f(x) in these arguments, tried on positive and on negative numbers."""
        for sign in (1, -1):
            base = self._numbers(flat, sign)
            doubled = [x * 2 if i in which else x for i, x in enumerate(base)]
            try:
                a1, k1 = torch.utils._pytree.tree_unflatten(doubled, spec)
                a0, k0 = torch.utils._pytree.tree_unflatten(base, spec)
                two, one = tree_flatten(func(*a1, **k1))[0][0], tree_flatten(func(*a0, **k0))[0][0]
            except (RuntimeError, TypeError, IndexError, ValueError):
                return False
            if not torch.allclose(two, 2 * one, rtol=1e-5, atol=0):
                return False
        return True

    @staticmethod
    def _numbers(flat: list, sign: int) -> list:
        rng = np.random.default_rng(3)
        return [
            torch.tensor([sign * rng.uniform(0.5, 2.0)], dtype=x.dtype)
            if isinstance(x, Tensor) and x.is_floating_point()
            else torch.ones(1, dtype=x.dtype) if isinstance(x, Tensor) else x
            for x in flat
        ]  # fmt: skip

    def along(self, name: str, args: tuple, s: Shadow | None, out: Any) -> Any:
        """Softmax and its kin keep positions, but nothing that was zero stays zero."""
        if s is None:
            return None
        if s.of_parameters:
            return self.unknown_parameter(s, out)
        dim = args[1] if len(args) > 1 and isinstance(args[1], int) else -1
        dim %= max(tree_flatten(out)[0][0].dim(), 1)
        slots = []
        for slot in s.slots:
            ids = slot.ids
            if dim in varying(ids) and "softmax" not in name:
                self.note(f"{name} over differing units forgets them")
                continue
            if set(varying(ids)) == {dim}:
                self.note(f"{name} over units, in which off ones would take part: they are always on")
                self.mark("whole", ids)
            elif dim in varying(ids):
                ids = self.couple_along(ids, [dim])
            slots.append(replace(slot, ids=ids, clean=name == "cumsum" and slot.clean))
        return [Shadow(tuple(slots))] * len(tree_flatten(out)[0])

    def unknown_parameter(self, s: Shadow, out: Any) -> Any:
        self.disown(s)
        return [Shadow() for _ in tree_flatten(out)[0]]

    # ---- rule 3: contractions ----------------------------------------------------------------------------------

    def matmul(self, name: str, args: tuple, out: Tensor) -> Shadow:
        bias = args[0] if name in ("addmm", "baddbmm", "addbmm") else None
        a, b = args[1:3] if bias is not None else args[:2]
        sa, sb = self.shadow(a) or Shadow(), self.shadow(b) or Shadow()
        left = [replace(s, ids=s.ids.unsqueeze(-1) if a.dim() > 1 else s.ids.view(-1, 1)) for s in sa.slots]
        right = [replace(s, ids=(s.ids.unsqueeze(-3) if b.dim() > 1 else s.ids.view(1, -1, 1))) for s in sb.slots]
        # frame of both: [..., m, k, n]
        if b.dim() == 1:
            full = (*a.shape, 1) if a.dim() == 2 else (1, a.numel(), 1)
            left = [replace(s, ids=s.ids.reshape(full[:-1]).unsqueeze(-1)) for s in sa.slots]
        else:
            full = (*a.shape, b.shape[-1])
        k = len(full) - 2

        def finish(ids: Tensor) -> Tensor:
            ids = ids.expand(full).narrow(k, 0, 1).squeeze(k)
            return reshape(ids, out.shape)

        left = [replace(s, ids=s.ids.expand(full)) for s in left]
        right = [replace(s, ids=s.ids.expand(full)) for s in right]
        result = self.contract(sa, sb, left, right, k, finish, out)
        if bias is not None:
            result = self.add_bias(bias, result, out, lambda ids: ids.expand(out.shape))
        return result

    def grouped(self, args: tuple, out: Tensor) -> Any:
        """Rows `[M, K]` times the matrix `[E, K, N]` of the expert that each goes to: one matmul as far as units go."""
        x, w = args[:2]
        sx, sw = self.shadow(x) or Shadow(), self.shadow(w) or Shadow()
        if sx.of_parameters or not sw.of_parameters or x.dim() != 2 or w.dim() != 3:
            return self.unknown(aten._grouped_mm.default, [sx, sw], out)
        full = (x.shape[0], *w.shape[1:])
        left = [replace(s, ids=s.ids.unsqueeze(-1).expand(full)) for s in sx.slots]
        right = [replace(s, ids=s.ids.select(0, 0).expand(full)) for s in sw.slots if varying(s.ids) != (0,)]
        return self.contract(sx, sw, left, right, 1, lambda ids: ids.select(1, 0), out)

    def lstm(self, args: tuple, shadows: list, out: Any) -> Any:
        """All steps of a layer in one operation, on a CPU: four rows of each weight are one unit, which the second
        weight reads. With its rows zero a unit stays zero: its cell is `0.5 c + 0.5 tanh(0)`, from 0 on."""
        x, hidden, parts = args[0], args[10], [self.shadow(a) or Shadow() for a in args[1:5]]
        state = [self.shadow(a) for a in args[5:7]]
        if not all(p.of_parameters for p in parts) or any(s is not None and s.slots for s in state):
            return self.unknown(aten.mkldnn_rnn_layer.default, shadows, out)
        pending: set[Use] = set()
        units: Slot | None = None
        for p in parts:
            for slot in p.slots:
                if varying(slot.ids) == (0,):
                    rows = replace(slot, ids=torch.from_numpy(self._vector(slot.ids, 0)))
                    self.owner(rows, p, pending)
                    first = replace(rows, ids=rows.ids[:hidden])
                    self.couple(rows.ids.view(-1, hidden), first.ids)
                    if units is None:
                        units = Slot(first.ids)
                    self.couple(first.ids, units.ids)
        if units is None:
            return self.unknown(aten.mkldnn_rnn_layer.default, shadows, out)
        last = [s for s in (self.shadow(x) or Shadow()).slots if varying(s.ids) == (x.dim() - 1,)]
        inputs = [replace(s, ids=torch.from_numpy(self._vector(s.ids, x.dim() - 1))) for s in last]
        for p, what in ((parts[0], inputs), (parts[1], [units])):
            for slot in p.slots:
                if varying(slot.ids) == (1,):
                    self.read(replace(slot, ids=slot.ids.select(0, 0)), what, p)
        along = [isinstance(t, Tensor) and t.shape[-1:] == (hidden,) for t in tree_flatten(out)[0]]
        return [
            Shadow((Slot(units.ids.expand(t.shape)),), pending=frozenset(pending)) if so else None
            for t, so in zip(tree_flatten(out)[0], along, strict=True)
        ]

    def weight_norm(self, args: tuple, out: Any) -> Any:
        """`g * v / |v|` with one norm per index of `dim`: an index's elements hang together, whatever they read."""
        v, g, dim = self.shadow(args[0]) or Shadow(), self.shadow(args[1]) or Shadow(), args[2] if len(args) > 2 else 0
        kept = []
        for slot in v.slots:
            along = [s for s in g.slots if dim in varying(s.ids)]
            if varying(slot.ids) == (dim,) and along:
                self.couple(slot.ids, along[0].ids)
                self.mark("owns", along[0].ids)
                kept.append(replace(slot, folds=along[0].folds))
            else:
                self.mark("dropped", slot.ids)
        return [Shadow(tuple(kept), v.sources | g.sources), *[None] * (len(tree_flatten(out)[0]) - 1)]

    def contract(
        self, sa: Shadow, sb: Shadow, left: list[Slot], right: list[Slot], k: int, finish: Callable, out: Tensor
    ) -> Shadow:
        """Multiply and sum over dimension `k` of the common frame."""
        if sa.of_parameters and sb.of_parameters:  # learned queries: what a weight multiplies is data
            left = self.as_activation(left, {k})
            sa = Shadow(tuple(left))
        if not sa.of_parameters and not sb.of_parameters:
            for x in left:
                for y in right:
                    if k in varying(x.ids) and k in varying(y.ids):
                        self.couple(x.ids, y.ids)
                        self.mark("read", x.ids)
            return self.settle_slots([s for s in [*left, *right] if k not in varying(s.ids)], finish)
        act, par, whole = (right, left, sa) if sa.of_parameters else (left, right, sb)
        slots: list[Slot] = []
        pending: set[Use] = set()
        readable = [x for x in act if k in varying(x.ids)]
        for p in par:
            along, across = k in varying(p.ids), [d for d in varying(p.ids) if d != k]
            if along and across:
                self.mark("dropped", p.ids)
            elif along:
                self.read(p, readable, whole)
            elif across:
                slots.append(self.owner(p, whole, pending))
        slots += [replace(x, folds=None) for x in act if k not in varying(x.ids)]
        result = self.settle_slots(slots, finish)
        return replace(result, pending=frozenset(pending))

    def owner(self, p: Slot, whole: Shadow, pending: set[Use]) -> Slot:
        self.mark("owns", p.ids)
        self.mark("carried", p.ids)
        axes = self.axes_of(p)
        if p.folds is None:  # scaled away (weight standardisation): the module's output takes the gate instead
            self.note("the gate would cancel in the weight's own normalisation: it acts on the layer's output")
            axes = frozenset((*a, "output") for a in axes)
        pending |= {(self.path[-1], a) for a in axes}
        return Slot(p.ids, True)

    def read(self, p: Slot, acts: list[Slot], whole: Shadow) -> None:
        """The parameter's labels along the contracted dimension read the activation's units."""
        labels = small(p.ids).reshape(-1).numpy()
        if not acts:
            self.labels.mark("forced", labels)
            return
        for x in acts:
            self.couple(x.ids, p.ids)
            a, b = torch.broadcast_tensors(small(x.ids), small(p.ids))
            a, b = a.reshape(-1).numpy(), b.reshape(-1).numpy()
            self.labels.mark("forced", b[a == 0])
            self.labels.mark("read", b)
            if not x.clean:
                self.read_dirty |= {(self.path[-1], axis) for axis in self.labels.axes_of(b)}

    def settle_slots(self, slots: list[Slot], finish: Callable) -> Shadow:
        return Shadow(tuple(replace(s, ids=finish(s.ids)) for s in slots))

    def add_bias(self, bias: Tensor, result: Shadow, out: Tensor, place: Callable) -> Shadow:
        s = self.shadow(bias)
        if s is None:
            if bias.is_meta or bool((bias != 0).any()):
                return replace(result, slots=tuple(replace(x, clean=False) for x in result.slots))
            return result
        wide = s.map(place)
        pending = set(result.pending)
        slots = []
        for slot in result.slots:
            at = self.adopt(slot.ids, wide.slots) if s.of_parameters else None
            if s.of_parameters and at is not None:
                self.own(wide.slots[at].ids, slot.ids)
                pending |= {(self.path[-1], a) for a in self.axes_of(wide.slots[at])}
                slots.append(slot)
            else:
                slots.append(replace(slot, clean=False))
        return Shadow(tuple(slots), pending=frozenset(pending))

    def convolution(self, args: tuple, out: Tensor) -> Shadow:
        x, w, bias, stride, padding, dilation, transposed, _, groups = args[:9]
        sx, sw = self.shadow(x) or Shadow(), self.shadow(w) or Shadow()
        if not sw.of_parameters:
            for a in sx.slots:
                for b in sw.slots:
                    if 1 in varying(a.ids) and not transposed and 1 in varying(b.ids) and groups == 1:
                        self.couple(a.ids.select(2, 0).select(-1, 0)[:1], b.ids.flatten(2)[:, :, 0])
            self.note("a convolution whose weight is computed from the input forgets which units it writes")
            return Shadow()
        if sx.of_parameters:
            self.disown(sw)
            return self.unknown_parameter(sx, out)[0]
        channels, width = x.shape[1], out.shape[1]
        writes, reads = (1, 0) if transposed else (0, 1)
        pointwise = all(n == 1 for n in w.shape[2:]) and all(n == 1 for n in stride)
        inputs: list[tuple[Tensor, Slot]] = []
        passing: list[Slot] = []
        for slot in sx.slots:
            if 1 in varying(slot.ids):
                ids = slot.ids
                extra = [d for d in varying(ids) if d != 1]
                if extra:
                    ids = self.couple_along(ids, extra)
                vector = ids
                for d in reversed(range(ids.dim())):
                    if d != 1:
                        vector = vector.select(d, 0)
                inputs.append((vector, slot))
            elif pointwise:
                passing.append(slot)
            else:
                self.note("a convolution over positions that belong to different units forgets them")
        pending: set[Use] = set()
        slots: list[Slot] = []
        for p in sw.slots:
            dims = varying(p.ids)
            if dims == (writes,):
                vector = p.ids
                for d in reversed(range(p.ids.dim())):
                    if d != writes:
                        vector = vector.select(d, 0)
                if transposed and groups > 1:
                    vector = vector.repeat(groups)
                here = self.owner(replace(p, ids=vector), sw, pending)
                view = [1] * out.dim()
                view[1] = -1
                slots.append(replace(here, ids=here.ids.view(view).expand(out.shape)))
                if groups == channels and width == channels and not transposed:
                    for ids, slot in inputs:
                        self.own(vector, ids)
                        if not slot.clean:
                            self.read_dirty |= {(self.path[-1], a) for a in self.labels.axes_of(vector.numpy())}
                elif groups > 1 and w.shape[1] == 1 and not transposed:
                    self.read_groups(w, p, inputs, groups, channels)
            elif dims == (reads,):
                if groups == 1 or not inputs:
                    vector = p.ids
                    for d in reversed(range(p.ids.dim())):
                        if d != reads:
                            vector = vector.select(d, 0)
                    self.read(replace(p, ids=vector), [replace(s, ids=i) for i, s in inputs], sw)
                elif not transposed:
                    self.read_groups(w, p, inputs, groups, channels)
                else:
                    vector = p.ids
                    for d in reversed(range(p.ids.dim())):
                        if d != reads:
                            vector = vector.select(d, 0)
                    self.read(replace(p, ids=vector), [replace(s, ids=i) for i, s in inputs], sw)
            elif writes in dims or reads in dims:
                self.mark("dropped", p.ids)
        for slot in passing:
            ids = slot.ids
            slots.append(replace(slot, ids=ids.narrow(1, 0, 1).expand(out.shape), folds=None))
        result = Shadow(tuple(slots), pending=frozenset(pending))
        if bias is None:
            return result
        view = [1] * out.dim()
        view[1] = -1
        return self.add_bias(bias, result, out, lambda ids: ids.view(view).expand(out.shape))

    def read_groups(self, w: Tensor, p: Slot, inputs: list[tuple[Tensor, Slot]], groups: int, channels: int) -> None:
        """In a grouped convolution element (o, j) reads input channel `group(o) * width + j`: one joint axis for
        both."""
        axes = self.labels.axes_of(small(p.ids).numpy())
        if len(axes) != 1:
            self.mark("dropped", p.ids)
            return
        name = axes[0][0]
        width = channels // groups
        if name not in self.joint:
            start = self.labels.new(channels, (name, "joint"))
            rest = tuple(w.shape[2:])
            view = (groups, w.shape[0] // groups, width, *rest)
            self.joint[name] = (view, (groups, 1, width, *[1] * len(rest)), start)
        _, _, start = self.joint[name]
        joint = torch.arange(start, start + channels)
        self.read(Slot(joint), [replace(s, ids=i) for i, s in inputs], Shadow())
        if w.shape[1] > 1:
            self.mark("dropped", p.ids)

    def attention(self, args: tuple, out: Any) -> list[Shadow | None]:
        q, k, v = (self.shadow(x) or Shadow() for x in args[:3])
        last = args[0].dim() - 1
        heads = args[0].shape[last - 2] if last > 1 else 1

        def one_position(x: Slot) -> Tensor:
            """What holds at every position, for each head of the queries: a head of keys and values serves as many
            query heads in a row as there are more of them (grouped-query and multi-query attention)."""
            ids = self.couple_along(x.ids, [last - 1]).narrow(last - 1, 0, 1)
            if last < 2 or ids.shape[last - 2] == heads:
                return ids
            return settle(ids.repeat_interleave(heads // ids.shape[last - 2], last - 2))

        q, k, v = (Shadow(tuple(self.as_activation(s.slots, {last}))) if s.of_parameters else s for s in (q, k, v))
        for x in q.slots:
            for y in k.slots:
                if last in varying(x.ids) and last in varying(y.ids):
                    self.couple(one_position(x), one_position(y))
                    self.mark("read", x.ids)  # also where a cache gives the keys out
        first, *rest = tree_flatten(out)[0]
        slots = tuple(replace(x, ids=one_position(x).expand(first.shape)) for x in v.slots)
        return [Shadow(slots), *[None] * len(rest)]

    def embedding(self, args: tuple, out: Tensor) -> Shadow | list[Shadow | None]:
        w = self.shadow(args[0])
        if w is None:
            return Shadow()
        if not w.of_parameters:
            return self.unknown(aten.embedding.default, [w], out)
        pending: set[Use] = set()
        slots = []
        for p in w.slots:
            if varying(p.ids) == (1,):
                vector = p.ids.select(0, 0)
                here = self.owner(replace(p, ids=vector), w, pending)
                slots.append(replace(here, ids=here.ids.expand(out.shape)))
            elif varying(p.ids) == (0,):
                self.mark("forced", p.ids)
            else:
                self.mark("dropped", p.ids)
        return Shadow(tuple(slots), pending=frozenset(pending))

    # ---- norms and reductions ----------------------------------------------------------------------------------

    def batch_norm(self, args: tuple, out: Any) -> Any:
        outs = tree_flatten(out)[0]
        x = self.shadow(args[0]) or Shadow()
        w, b = self.shadow(args[1]), self.shadow(args[2])
        view = [1] * args[0].dim()
        view[1] = -1

        def place(ids: Tensor) -> Tensor:
            return ids.view(view).expand(args[0].shape)

        if x.of_parameters:  # a weight normalised by F.batch_norm: scaling it cancels, scaling its gain does not
            kept = []
            # over what it reads: with a task, over the units that are on (`ParameterPlan.standardised`)
            alone = len(x.sources) == 1 and all(slot.folds is not None for slot in x.slots)
            if alone:
                self.standardised |= x.sources
            for slot in x.slots:
                if varying(slot.ids) == (1,):
                    folds = None
                    if w is not None and b is None:
                        at = self.adopt(slot.ids, w.map(place).slots)
                        if at is not None:
                            self.couple(w.map(place).slots[at].ids, slot.ids)
                            self.mark("owns", w.slots[at].ids)
                            folds = w.slots[at].folds
                    kept.append(Slot(slot.ids, True, folds))
                elif alone:
                    kept.append(replace(slot, folds=None))
                else:
                    self.mark("dropped", slot.ids)
            sources = x.sources | (w.sources if w else frozenset()) | (b.sources if b else frozenset())
            return [Shadow(tuple(kept), sources), *[None] * (len(outs) - 1)]
        slots = []
        for slot in x.slots:
            if 1 not in varying(slot.ids):
                slots.append(replace(slot, clean=False))
                self.commit(x)
                continue
            clean = False
            for s in (w, b):
                if s is not None and s.of_parameters:
                    wide = s.map(place)
                    at = self.adopt(slot.ids, wide.slots)
                    if at is not None:
                        self.own(wide.slots[at].ids, slot.ids)
                        self.fold(wide.slots[at])
                        clean = self.path[-1] not in self.remade
            if not clean and not self.is_norm(self.modules.get(self.path[-1], nn.Identity())):
                self.commit(x)
            elif not clean and self.path[-1] not in self.remade:
                clean = True  # a norm layer without affine parameters gates its output itself
            slots.append(replace(slot, clean=clean))
        return [Shadow(tuple(slots)), *[None] * (len(outs) - 1)]

    def layer_norm(self, name: str, args: tuple, out: Any) -> Any:
        outs = tree_flatten(out)[0]
        x = self.shadow(args[0]) or Shadow()
        w, b = (
            (self.shadow(args[1]), self.shadow(args[2]))
            if name == "native_group_norm"
            else (self.shadow(args[2]), self.shadow(args[3]) if name == "native_layer_norm" else None)
        )

        def place(ids: Tensor) -> Tensor:
            if name == "native_group_norm":
                view = [1] * args[0].dim()
                view[1] = -1
                return ids.view(view).expand(args[0].shape)
            return ids.expand(args[0].shape)

        own = self.is_norm(self.modules.get(self.path[-1], nn.Identity()))
        over = (
            range(1, args[0].dim())
            if name == "native_group_norm"
            else range(args[0].dim() - len(args[1]), args[0].dim())
        )
        if x.of_parameters:
            x = Shadow(tuple(self.as_activation(x.slots, set(over))))
        slots = []
        for slot in x.slots:
            if own and self.path[-1] in self.norm_inputs and set(varying(slot.ids)) & set(over):
                self.taken_over(self.norm_inputs[self.path[-1]], slot.ids)
            if not set(varying(slot.ids)) & set(over):  # zero where a unit is off, unless a bias is added
                slots.append(replace(slot, clean=slot.clean and b is None))
                continue
            clean = own or name == "_fused_rms_norm"
            for s in (w, b):
                if s is not None and s.of_parameters:
                    wide = s.map(place)
                    at = self.adopt(slot.ids, wide.slots)
                    if at is not None:
                        self.own(wide.slots[at].ids, slot.ids)
                        self.fold(wide.slots[at])
                        clean = True
            if not own:
                self.note(f"{name} outside a known norm layer: its statistics are over all units")
            slots.append(replace(slot, clean=clean))
        return [Shadow(tuple(slots)), *[None] * (len(outs) - 1)]

    def reduction(self, func: Any, name: str, args: tuple, kwargs: dict, s: Shadow | None, out: Any) -> Any:
        outs = tree_flatten(out)[0]
        if s is None:
            return [Shadow() if isinstance(x, Tensor) else None for x in outs]
        shape = args[0].shape
        dims = next((a for a in args[1:] if isinstance(a, (list, tuple))), None)
        if dims is None:
            dims = kwargs.get("dim")
        if (
            dims is None
            and len(args) > 1
            and isinstance(args[1], int)
            and name in ("max", "min", "argmax", "argmin", "any", "all", "prod", "median")
        ):
            dims = [args[1]]
        if isinstance(dims, int):
            dims = [dims]
        dims = [d % max(len(shape), 1) for d in dims] if dims else list(range(len(shape)))
        target = next(x for x in outs if isinstance(x, Tensor)).shape
        slots = []
        for slot in s.slots:
            ids = slot.ids
            if any(d in varying(ids) for d in dims):
                ids = self.canonical(ids)
            if name == "sum" and not s.of_parameters and set(varying(ids)) - set(dims):
                ids = self.couple_along(ids, dims)  # branches are added: their channels are one unit each
            if any(d in varying(ids) for d in dims):
                here = self.path[-1]
                if s.of_parameters:
                    self.mark("dropped", slot.ids)
                elif here in self.norm_inputs:
                    self.taken_over(self.norm_inputs[here], ids)
                else:
                    self.note(f"{name} over differing units forgets them")
                    if here in self.entered:
                        self.mixing.setdefault(here, self._seen(self.entered[here]))
                        self.taken_over(self.mixing[here], ids)
                continue
            for d in dims:
                ids = ids.narrow(d, 0, 1)
            ids = reshape(ids, target)
            folds = slot.folds if name in LINEAR_REDUCTIONS else None
            slots.append(Slot(ids, slot.clean and name not in ("logsumexp", "argmax", "argmin", "all"), folds))
        return [Shadow(tuple(slots), s.sources) if isinstance(x, Tensor) else None for x in outs]

    def spatial(self, count: int, s: Shadow | None, out: Any) -> Any:
        outs = tree_flatten(out)[0]
        if s is None:
            return None
        slots = []
        for slot in s.slots:
            n = slot.ids.dim()
            if any(d >= n - count for d in varying(slot.ids)):
                self.note("pooling over positions that belong to different units forgets them")
                continue
            ids = slot.ids
            for d in range(n - count, n):
                ids = ids.narrow(d, 0, 1)
            slots.append(replace(slot, ids=ids.expand(outs[0].shape), folds=None))
        return [Shadow(tuple(slots), s.sources)] * len(outs)

    # ---- modules -----------------------------------------------------------------------------------------------

    def enter(self, path: str, args: tuple) -> None:
        self.path.append(path)
        self.at = (path, "what the module is given")
        module = self.modules[path]
        x = next((a for a in args if isinstance(a, Tensor)), None)
        s = self.shadow(x)
        if s is not None and self.is_norm(module):
            self.norm_inputs[path] = self._seen(s)
        elif s is not None and not module._modules:
            self.entered[path] = s
        self.at = None

    def _seen(self, s: Shadow) -> NormSeen:
        ids = {d: self._vector(slot.ids, d) for slot in s.slots for d in varying(slot.ids)}
        ndim = s.slots[0].ids.dim() if s.slots else 0
        return NormSeen(ids, all(slot.clean for slot in s.slots), ndim=ndim)

    def taken_over(self, seen: NormSeen, ids: Tensor) -> None:
        """A norm takes its statistics across these units."""
        units = np.unique(self.labels.find(small(ids).reshape(-1).numpy()))
        seen.across = True
        seen.over |= {d for d, at in seen.ids.items() if np.isin(self.labels.find(at), units).any()}

    @staticmethod
    def _vector(ids: Tensor, dim: int) -> Ints:
        for d in reversed(range(ids.dim())):
            if d != dim:
                ids = ids.select(d, 0)
        return ids.numpy().copy()

    def leave(self, path: str) -> None:
        self.path.pop()


@contextlib.contextmanager
def _watched(model: nn.Module, tracer: Tracer) -> Iterator[None]:
    """Module paths while the model runs; evaluation mode, no fused fast paths; everything put back afterwards."""
    handles = []
    for path, module in model.named_modules():
        handles.append(
            module.register_forward_pre_hook(
                lambda m, a, k, p=path: tracer.enter(p, (*a, *k.values())), with_kwargs=True
            )
        )
        handles.append(module.register_forward_hook(lambda m, a, o, p=path: tracer.leave(p), always_call=True))
    modes = [(m, m.training) for m in model.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for h in handles:
            h.remove()
        for m, training in modes:
            m.training = training


def trace(model: nn.Module, inputs: Any, norms: Callable[[nn.Module], bool]) -> Trace:
    """Run `model` on `inputs` once and return what was seen. `norms` says which modules are norm layers that
    gate their own output."""
    tracer = Tracer(model, norms)
    for x in tensors_of(inputs, "inputs"):
        tracer.shadows[x] = Shadow()
    try:
        with _watched(model, tracer), tracer:
            out = call(model, inputs)
    except Exception as error:
        if tracer.at is None:
            raise
        path, operation = tracer.at
        raise ConversionError(
            f"{path or type(model).__name__}: the trace cannot follow {operation} ({type(error).__name__}: {error}); "
            "please report the model"
        ) from error
    for path in sorted(tracer.remade):  # its weight does not carry the gate, so what it does is to be tried
        if tracer.norm_inputs[path].across:
            tracer.mixing[path] = tracer.norm_inputs.pop(path)
    leaves = tensors_of(out) or list(values_of(out).values())  # the latter says why there is nothing
    found = [
        small(slot.ids).reshape(-1).numpy() for x in leaves if (s := tracer.shadow(x)) is not None for slot in s.slots
    ]
    outputs = np.concatenate(found) if found else np.zeros(0, dtype=np.int64)
    return Trace(
        tracer.labels, tracer.first, tracer.joint, tracer.folds, tracer.read_dirty, outputs[outputs != 0],
        tracer.norm_inputs, tracer.mixing, tracer.seen, tracer.standardised, tracer.notes,
    )  # fmt: skip
