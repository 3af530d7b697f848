"""Task vectors: the change that fine-tuning made to a model, with arithmetic.

`tau = theta_ft - theta_pre` (Ilharco et al. 2023, arXiv 2212.04089), over floating-point parameters only.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from ..config import one_of
from ..errors import ConfigError, IntegrityError, VectorError
from ..files import parse_json
from ..functional import digest_of
from .bases import digests_of, joined_bases, joined_kinds, refuse_integers
from .delta import Delta, combine, delta_between, restore
from .files import read_metadata, write_tensors
from .parameters import parameters_of, refuse_as_target
from .select import Patterns, chosen_names, largest
from .tensors import (
    Kind,
    Lazy,
    TensorSource,
    kinds_of,
    named_tensors,
    pick,
    tied_names,
)
from .to_lora import LoRAReport, write_lora

VECTOR_FORMAT = "hatcl.task_vector"
AT, REST = ":at", ":rest"  # suffixes of the names under which remainders are saved


def combined(terms: Sequence[tuple[float, TaskVector]], *, check: bool = True) -> TaskVector:
    """`sum_i c_i tau_i`, the single rule for sums of vectors: `+`, `-`, `*` and `/` of vectors, `compose` and `hatcl
    merge` all use it, so that the same coefficients give the same bits.

    Products and sums are computed in float64, in the order of the terms (a product with a sum multiplies the
    coefficients), and rounded once, to float32 or the widest of the vectors' types. Terms with coefficient 0 are left
    out. If an element of the sum comes from a single vector with coefficient 1, it keeps its remainder (`Delta`), so
    that one vector with coefficient 1 reproduces its model bit for bit. Tensors that an adapter's vector lacks count as
    zeros (`joined_kinds`).

    Args:
        check: require the vectors to have the same base; without it the sum has none.

    Raises:
        VectorError: the vectors differ in names or shapes, or belong to different bases.
    """
    if check and len(terms) == 1 and terms[0][0] == 1:
        return terms[0][1]
    vectors = [v for _, v in terms]
    shapes = joined_kinds([(v.kinds, v.partial) for v in vectors])
    flat = tuple((c * k, part) for c, v in terms for k, part in v._terms or ((1.0, v),))
    parts = [(c, v.kinds) for c, v in flat if c]
    kinds = {}
    for name, kind in shapes.items():
        here = [(c, of[name].dtype) for c, of in parts if name in of]
        alone = len(here) == 1 and here[0][0] == 1
        kinds[name] = Kind(
            kind.shape,
            here[0][1] if alone else functools.reduce(torch.promote_types, (d for _, d in here), torch.float32),
        )
    base = joined_bases([v.base for v in vectors], shapes) if check else None
    out = TaskVector(Lazy(kinds, functools.partial(_sum, flat, kinds)), base, partial=all(v.partial for v in vectors))
    out._terms = flat
    return out


def _sum(terms: Sequence[tuple[float, TaskVector]], kinds: Mapping[str, Kind], name: str) -> Delta:
    here = [(c, v) for c, v in terms if c and name in v]
    if not here:
        return Delta(torch.zeros(kinds[name].shape, dtype=kinds[name].dtype))
    return combine((c, v.delta(name)) for c, v in here)


def named_as_in(tied: Mapping[str, str], vector: TaskVector) -> TaskVector:
    """A vector with names of tied tensors replaced by their first names in a model.

    Args:
        tied: `tied_names` of the model.

    Raises:
        VectorError: it has different tensors under several names of one tensor (for files: when the tensor is read).
    """
    names: dict[str, list[str]] = {}
    for name in vector:
        names.setdefault(tied.get(name, name), []).append(name)
    if all(stored == [first] for first, stored in names.items()):
        return vector
    if vector._terms:
        return combined([(c, named_as_in(tied, v)) for c, v in vector._terms])

    def read(first: str) -> Delta:
        name, *others = names[first]
        delta = vector.delta(name)
        for other in others:
            if not torch.equal(delta.value, vector.delta(other).value):
                raise VectorError(f"{name} and {other} are one tensor in the model and differ in the vector")
        return delta

    own, known = vector.kinds, vector.base
    kinds = {first: own[stored[0]] for first, stored in names.items()}
    base = None if known is None else Lazy(kinds, lambda first: known[names[first][0]])
    lazily = Lazy(kinds, read)
    return TaskVector(lazily if vector._in_files else dict(lazily), base, partial=vector.partial)


def composed(
    model: TensorSource, terms: Sequence[tuple[float, TaskVector]], *, check: bool = True
) -> Mapping[str, Tensor]:
    """All tensors of a source, `theta + tau` with `tau = sum_i c_i tau_i` where the vectors cover them (`combined`,
    `TaskVector.apply_to`): at once for tensors in memory, on demand for files.

    Raises:
        VectorError: the model lacks a tensor, has it in another shape, or quantised. IntegrityError: the base is
            another one.
    """
    every = named_tensors(model)
    kinds = kinds_of(every)
    tied = tied_names(model)
    terms = [(c, named_as_in(tied, v)) for c, v in terms]
    for _, vector in terms:
        refuse_as_target(model, vector)
        problems = [
            f"{n} is {list(k.shape)}, the model has {list(kinds[n].shape) if n in kinds else 'no such tensor'}"
            for n, k in vector.kinds.items()
            if n not in kinds or kinds[n].shape != k.shape
        ]
        if problems:
            raise VectorError(
                f"{len(problems)} tensors of the vector do not fit: {'; '.join(problems[:5])}"
                f"{' ...' if len(problems) > 5 else ''}. Apply it to the model it was taken from"
            )
    tau = combined(terms, check=False)  # the bases are compared with the model's own below

    def one(name: str) -> Tensor:
        x = every[name]
        if name not in tau:
            return x
        known = [v.base[name] for _, v in terms if name in v and v.base is not None] if check else []
        if known and set(known) != {digest_of(x)}:
            raise IntegrityError(
                f"{name} differs from this vector's base; apply it to its own base, or pass check=False"
            )
        return restore(x, tau.delta(name).to(x.device))

    return Lazy(kinds, one) if isinstance(every, Lazy) else {name: one(name) for name in every}


class TaskVector(Mapping[str, Tensor]):
    """The difference that fine-tuning made, tensor by tensor. It supports `+`, `-` and `*`; `vector[name]` is one
    tensor.

    Vectors made from files read each tensor on demand, also in sums and products, so that a composition of many
    checkpoints needs memory for only a few tensors. `in_memory()` reads everything.

    A sum refers to its vectors and their coefficients (see `combined`), and computes a tensor each time it is read;
    `in_memory()` computes it once and releases them.

    Args:
        deltas: name -> difference.
        base: name -> digest of the base's tensor, which `apply_to` compares; None = applies to anything that fits.
        partial: whether missing tensors are known to be unchanged (as for a LoRA adapter).

    Raises:
        VectorError: there is no tensor, a tensor of integers, or a number that is not finite.
    """

    def __init__(
        self,
        deltas: Mapping[str, Tensor | Delta],
        base: Mapping[str, str] | None = None,
        *,
        partial: bool = False,
    ) -> None:
        if not len(deltas):
            raise VectorError("a task vector of no tensors; are there floating-point parameters in both models?")
        self.base = base
        self.partial = partial
        self._terms: tuple[tuple[float, TaskVector], ...] = ()  # of a sum; otherwise empty
        self._deltas: Mapping[str, Any] = (
            Lazy(deltas.kinds, functools.partial(_read_delta, deltas))
            if isinstance(deltas, Lazy)
            else {name: _checked_delta(name, d) for name, d in deltas.items()}
        )

    # ---- making and loading -----------------------------------------------------------------------------------

    @classmethod
    def between(
        cls,
        pretrained: TensorSource | None,
        finetuned: Any,
        *,
        buffers: bool = False,
        only: Patterns = (),
        skip: Patterns = (),
        embeddings: str = "equal",
    ) -> TaskVector:
        """`finetuned - pretrained`, under the pretrained model's names.

        Args:
            pretrained, finetuned: modules, state dicts, safetensors files, or folders of them. `finetuned` may also be
                a peft model or the folder of a peft LoRA adapter: then the vector is the product `scaling * B A` of
                each layer, and `pretrained` is only needed for its digest and for fully trained modules.
            buffers: also the running statistics of norms.
            only, skip: patterns of names (`fnmatch`), such as `skip="*.inv_freq"` for tensors that one of the two
            lacks. Tensors that are left out count as unchanged.
            embeddings: `common`: if the vocabulary has another size, compare the rows that both have; the pretrained
                model's other rows count as unchanged.

        Raises:
            VectorError: names or shapes differ (the text lists them), there are only integers, weights are quantised,
                or an adapter's change is not a sum or affects only one of several tied layers. IntegrityError: a file
                is missing or damaged. ConfigError: patterns match nothing or leave nothing.
        """
        from .adapters import is_adapter, lora_deltas  # imported here because it knows peft
        from .pairing import EMBEDDINGS, OURS, paired

        one_of("embeddings", embeddings, EMBEDDINGS)
        if is_adapter(finetuned):
            ours = None if pretrained is None else parameters_of(pretrained, buffers, what=OURS)
            deltas = lora_deltas(finetuned, ours, pretrained, embeddings)
            if only or skip:
                chosen = chosen_names({n: [n] for n in (*deltas, *(ours or ()))}, only, skip)
                if deltas.keys().isdisjoint(chosen):
                    raise ConfigError(
                        f"only={only!r} and skip={skip!r} leave none of the adapter's {len(deltas)} tensors"
                    )
                deltas = pick(deltas, [n for n in deltas if n in chosen])
            return cls(deltas, None if ours is None else digests_of(pick(ours, list(deltas))), partial=True)
        if pretrained is None:
            raise VectorError("between: pretrained=None is for peft adapters only; pass the model that was fine-tuned")
        ours, theirs = paired(pretrained, finetuned, buffers=buffers, only=only, skip=skip, embeddings=embeddings)
        lazy = any(isinstance(side, Lazy) for side in (ours, theirs))
        made = _each(lambda _, a, b: delta_between(a, b), ours, theirs, names=ours, lazy=lazy, at_least=torch.float32)
        if not (isinstance(made, Lazy) or any(bool(d.value.any()) for d in made.values())):
            refuse_integers(pretrained, finetuned)
        return cls(made, digests_of(ours), partial=bool(only or skip))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TaskVector:
        """Open a file or folder of `save`; tensors are read on demand. Raises `IntegrityError` for a damaged file or
        one of another kind."""
        tensors = named_tensors(path)
        meta = read_metadata(path)
        if VECTOR_FORMAT not in meta:
            raise IntegrityError(
                f"{path} is not a task vector saved by hatcl; make one from a checkpoint with "
                "TaskVector.between(pretrained, checkpoint)"
            )
        kinds = kinds_of(tensors)

        def read(name: str) -> Delta:
            if name + AT in kinds:
                return Delta(tensors[name], tensors[name + AT], tensors[name + REST])
            return Delta(tensors[name])

        names = [n for n in kinds if not n.endswith((AT, REST))]
        torn = [n for n in names if (n + AT in kinds) != (n + REST in kinds)]
        try:
            about = parse_json(meta[VECTOR_FORMAT], path)
            base, partial = about["base"], bool(about["partial"])
        except (KeyError, TypeError, ValueError) as error:
            raise IntegrityError(f"{path}: its record of the base cannot be read ({error!r}); save it again") from error
        if torn or (base is not None and not set(names) <= set(base)):
            raise IntegrityError(f"{path}: {(torn or names)[0]} lacks a part; save the vector again")
        return cls(Lazy({n: kinds[n] for n in names}, read), base, partial=partial)

    # ---- a mapping of tensors ----------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> Tensor:
        return self.delta(name).value

    def __iter__(self) -> Iterator[str]:
        return iter(self._deltas)

    def __len__(self) -> int:
        return len(self._deltas)

    def __contains__(self, name: object) -> bool:  # `Mapping` would read the tensor to find out
        return name in self._deltas

    def delta(self, name: str) -> Delta:
        """A tensor with its remainders."""
        out: Delta = self._deltas[name]
        return out

    @property
    def kinds(self) -> dict[str, Kind]:
        """Shape and dtype of every tensor, without reading any."""
        if isinstance(self._deltas, Lazy):
            return self._deltas.kinds
        return {n: Kind(tuple(d.value.shape), d.value.dtype) for n, d in self._deltas.items()}

    @property
    def numel(self) -> int:
        """The number of its elements."""
        return sum(math.prod(k.shape) for k in self.kinds.values())

    def in_memory(self) -> TaskVector:
        """Read everything now. Tensors are copied: those in mapped files may be unaligned, where sums are rounded
        differently."""
        base = None if self.base is None else dict(self.base)
        lazy = self._in_files
        read = {n: Delta(*(x.clone() if lazy and x is not None else x for x in d)) for n, d in self._deltas.items()}
        return TaskVector(read, base, partial=self.partial)

    @property
    def _in_files(self) -> bool:
        """Whether any tensor is read on demand."""
        return any(v._in_files for _, v in self._terms) if self._terms else isinstance(self._deltas, Lazy)

    def __repr__(self) -> str:
        where = "files" if self._in_files else "memory"
        return f"TaskVector({len(self)} tensors, {self.numel:,} elements, in {where})"

    # ---- computing ---------------------------------------------------------------------------------------------

    def map(self, fn: Callable[..., Tensor | Delta], *others: TaskVector) -> TaskVector:
        """A vector of `fn(name, tau, *others' tau)`, tensor by tensor. Vectors in files stay there.

        Raises:
            VectorError: the vectors differ in names or shapes, or belong to different bases. (A tensor that an
                adapter's vector lacks counts as zeros.)
        """
        return self._map(lambda name, *ds: fn(name, *(d.value for d in ds)), *others)

    def _map(self, fn: Callable[..., Tensor | Delta], *others: TaskVector) -> TaskVector:
        vectors = [self, *others]
        kinds = joined_kinds([(v.kinds, v.partial) for v in vectors])
        lazy = any(v._in_files for v in vectors)
        sides: list[Mapping[str, Any]] = [_filled(v, kinds) if len(v) < len(kinds) else v._deltas for v in vectors]
        base = joined_bases([v.base for v in vectors], kinds)
        return TaskVector(_each(fn, *sides, names=kinds, lazy=lazy), base, partial=all(v.partial for v in vectors))

    def __add__(self, other: TaskVector) -> TaskVector:
        if not isinstance(other, TaskVector):
            return self if other == 0 else NotImplemented  # sum() starts with 0
        return combined([(1.0, self), (1.0, other)])

    __radd__ = __add__

    def __sub__(self, other: TaskVector) -> TaskVector:
        return combined([(1.0, self), (-1.0, other)]) if isinstance(other, TaskVector) else NotImplemented

    def __neg__(self) -> TaskVector:
        return combined([(-1.0, self)])

    def __mul__(self, scale: float) -> TaskVector:
        return combined([(_finite_scale(scale), self)]) if _is_number(scale) else NotImplemented

    __rmul__ = __mul__
    __array_ufunc__ = None  # so that NumPy's numbers use `__rmul__`

    def __truediv__(self, scale: float) -> TaskVector:
        if not _is_number(scale):
            return NotImplemented
        factor = _finite_scale(scale)
        if factor == 0:
            raise VectorError("scale: got a division by 0, expected another number")
        return combined([(1 / factor, self)])

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    def to(self, target: torch.dtype | torch.device | str) -> TaskVector:
        """Cast (bfloat16 halves the memory; the fine-tuned model then comes back rounded) or moved."""
        if isinstance(target, torch.dtype):
            if all(k.dtype == target for k in self.kinds.values()):
                return self
            cast = self.map(lambda _, a: a.to(target))
            if isinstance(cast._deltas, Lazy):
                cast._deltas.kinds = {n: Kind(k.shape, target) for n, k in cast.kinds.items()}
            return cast
        return self._map(lambda _, d: d.to(target))

    def mask(self, masks: Mapping[str, Tensor]) -> TaskVector:
        """The vector with zeros where a mask is off. Masks broadcast; tensors without one stay.

        Raises:
            VectorError: a mask belongs to no tensor, or does not broadcast.
        """
        kinds = self.kinds
        for name, m in masks.items():
            shape = list(kinds[name].shape) if name in kinds else None
            if shape is None or not _broadcasts_to(m.shape, shape):
                raise VectorError(
                    f"{name}: mask of shape {list(m.shape)}, "
                    + (
                        f"expected one that broadcasts to {shape}"
                        if shape is not None
                        else "the vector has no such tensor"
                    )
                )

        def masked(name: str, d: Delta) -> Delta:
            if name not in masks:
                return d
            return d.where(masks[name].to(d.value.device, torch.bool).expand(d.value.shape))

        return self._map(masked)

    def topk(self, keep: float, *, per_block: bool = False) -> TaskVector:
        """Keep the elements of largest magnitude: the share `keep`, exactly `int(keep * N)` of them (the first among
        ties), over all tensors or within each.

        Raises:
            VectorError: the share is outside 0 to 1.
        """
        if not 0 <= keep <= 1:
            raise VectorError(f"keep: got {keep!r}, expected a share between 0 and 1")
        kinds = self.kinds
        if per_block:

            def one(name: str, d: Delta) -> Delta:
                k = int(keep * math.prod(kinds[name].shape))
                return d.where(largest({name: d.value}, k).mask(name, d.value))

            return self._map(one)
        cut = largest(self, int(keep * self.numel))
        return self._map(lambda name, d: d.where(cut.mask(name, d.value)))

    # ---- measuring ---------------------------------------------------------------------------------------------

    def dot(self, other: TaskVector) -> float:
        """`<self, other>`, summed in float64."""
        return math.fsum(self._dots(other).values())

    def norm(self) -> float:
        """The Euclidean norm."""
        return math.sqrt(self.dot(self))

    @overload
    def cosine(self, other: TaskVector) -> float: ...
    @overload
    def cosine(self, other: TaskVector, *, per_block: bool) -> dict[str, float] | float: ...
    def cosine(self, other: TaskVector, *, per_block: bool = False) -> dict[str, float] | float:
        """The cosine between two vectors, as a whole or per tensor; 0 where one of them is zero."""
        ab, aa, bb = self._dots(other), self._dots(self), other._dots(other)
        if per_block:
            return {n: _ratio(x, aa.get(n, 0.0), bb.get(n, 0.0)) for n, x in ab.items()}
        return _ratio(math.fsum(ab.values()), math.fsum(aa.values()), math.fsum(bb.values()))

    def _dots(self, other: TaskVector) -> dict[str, float]:
        joined_kinds([(v.kinds, v.partial) for v in (self, other)])
        both = [n for n in self if n in other]
        return {n: float((self[n].double() * other[n].double()).sum()) for n in both}

    # ---- applying and saving -------------------------------------------------------------------------------------

    @overload
    def apply_to(self, model: nn.Module, scale: float = ..., *, check: bool = ...) -> nn.Module: ...
    @overload
    def apply_to(
        self, model: Mapping[str, Tensor] | str | os.PathLike[str], scale: float = ..., *, check: bool = ...
    ) -> Mapping[str, Tensor]: ...
    def apply_to(self, model: Any, scale: float = 1.0, *, check: bool = True) -> Any:
        """`theta + scale * tau`: a new model, or new tensors for a state dict or files (for files, made on demand).
        With scale 1 on its own base this is the fine-tuned model, bit for bit; with scale 0 the base.

        The order of summation, here, in `compose` and in `hatcl merge`: the terms of tau are summed in float64, in
        their order, and rounded once to float32 or the vectors' own wider type (`combined`); then theta + tau is summed
        in float64 and rounded once to theta's type. Saving a vector, or reading it into memory, in between does not
        change the bits. An element whose tau is zero keeps theta's bits, including the sign of a zero, so that `0 * v`
        and `v - v` reproduce theta.

        Args:
            check: compare the model with the vector's base.

        Raises:
            VectorError: the model lacks a tensor, has it in another shape, or quantised. IntegrityError: the base is
                another one.
        """
        new = composed(model, [(_finite_scale(scale), self)], check=check)
        if isinstance(model, nn.Module):
            out = copy.deepcopy(model)
            with torch.no_grad():
                for name, x in named_tensors(out).items():
                    x.copy_(new[name])
            return out
        return new if isinstance(new, Lazy) else {n: new[first] for n, first in tied_names(model).items()}

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        shard_bytes: int | None = None,
        recipe: str | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Path:
        """Write safetensors: one file, or a folder of shards if `path` does not end in `.safetensors`; see
        `files.write_tensors` for the options."""
        kinds = self.kinds
        about = {"base": None if self.base is None else dict(self.base), "partial": self.partial}
        meta = {VECTOR_FORMAT: json.dumps(about)}  # one entry: safetensors writes several in any order
        return write_tensors(
            Path(path),
            kinds,
            lambda name: _flat(name, self.delta(name)),
            meta,
            shard_bytes=shard_bytes,
            recipe=recipe,
            progress=progress,
        )

    def to_lora(self, rank: int, base: nn.Module, folder: str | os.PathLike[str]) -> LoRAReport:
        """Write the nearest LoRA adapter, `B A` of this rank for each weight (the leading singular values, Eckart and
        Young 1936), in peft's format: `PeftModel.from_pretrained(base, folder)` loads it.

        It covers linear layers, including GPT-2's kind, and convolutions without groups. It cannot hold biases, norms,
        embeddings and tied weights: the report lists them and counts them in the error.

        Args:
            rank: the rank of every pair; if a matrix has a lower one, the rest is zeros. base: the vector's base model.

        Raises:
            VectorError: the architecture is another one, or LoRA can hold no part of the vector. IntegrityError: the
                base is another one, or the disk is full. ConfigError: the rank is below 1.
        """
        vector = named_as_in(tied_names(base), self)
        return write_lora(vector, vector.base, rank, base, Path(folder))


def _flat(name: str, d: Delta) -> dict[str, Tensor]:
    out = {name: d.value}
    if d.at is not None and d.rest is not None:
        out |= {name + AT: d.at, name + REST: d.rest}
    return out


def _checked_delta(name: str, delta: Any) -> Delta:
    d = delta if isinstance(delta, Delta) else Delta(delta)
    if not d.value.dtype.is_floating_point:
        raise VectorError(f"{name}: got {d.value.dtype}, expected floating point; a task vector holds no integers")
    if d.value.dtype.itemsize < 2:
        raise VectorError(
            f"{name}: got {d.value.dtype}, whose numbers have no meaning without a scale; dequantise it to 16 bits "
            "or more"
        )
    # the sum in float64 is finite if all are (one pass; for float64 itself it may overflow, then each is checked)
    if not bool(d.value.sum(dtype=torch.float64).isfinite()) and not bool(torch.isfinite(d.value).all()):
        bad = int((~torch.isfinite(d.value)).sum())
        raise VectorError(
            f"{name}: {bad} of {d.value.numel()} elements are NaN or infinite; is a checkpoint damaged, or a "
            "coefficient too large?"
        )
    return d


def _read_delta(deltas: Mapping[str, Tensor | Delta], name: str) -> Delta:
    return _checked_delta(name, deltas[name])


def _each(
    fn: Callable[..., Any],
    *sides: Mapping[str, Any],
    names: Iterable[str],
    lazy: bool,
    at_least: torch.dtype | None = None,
) -> Mapping[str, Any]:
    """`fn(name, *tensors)` for every name, at once or, if lazy, on demand.

    Args:
        at_least: a dtype that results are promoted to, in addition to the sides' own.
    """
    if lazy:
        of = [_kinds(s) for s in sides]
        kinds = {
            n: Kind(
                of[0][n].shape,
                functools.reduce(torch.promote_types, [o[n].dtype for o in of], at_least or of[0][n].dtype),
            )
            for n in names
        }
        return Lazy(kinds, lambda name: fn(name, *(s[name] for s in sides)))
    return {name: fn(name, *(s[name] for s in sides)) for name in names}


def _kinds(side: Mapping[str, Any]) -> dict[str, Kind]:
    if isinstance(side, Lazy):
        return side.kinds
    values = {n: d.value if isinstance(d, Delta) else d for n, d in side.items()}
    return {n: Kind(tuple(t.shape), t.dtype) for n, t in values.items()}


def _filled(v: TaskVector, kinds: Mapping[str, Kind]) -> Lazy[Delta]:
    """A partial vector extended by the tensors that it lacks."""
    return Lazy(kinds, lambda n: v.delta(n) if n in v else Delta(torch.zeros(kinds[n].shape, dtype=kinds[n].dtype)))


def _is_number(x: Any) -> bool:
    return not isinstance(x, bool) and (isinstance(x, Real) or (isinstance(x, Tensor) and x.numel() == 1))


def _finite_scale(scale: Any) -> float:
    value = float(scale.detach() if isinstance(scale, Tensor) else scale)
    if not math.isfinite(value):
        raise VectorError(f"scale: got {value}, expected a finite number")
    return value


def _broadcasts_to(shape: Sequence[int], target: Sequence[int]) -> bool:
    try:
        return list(torch.broadcast_shapes(tuple(shape), tuple(target))) == list(target)
    except RuntimeError:
        return False


def _ratio(ab: float, aa: float, bb: float) -> float:
    return ab / math.sqrt(aa * bb) if aa and bb else 0.0
