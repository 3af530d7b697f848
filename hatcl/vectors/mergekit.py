"""Run mergekit's recipes, file to file: each method with mergekit's options, tensor by tensor.

mergekit trims, counts and normalises within each tensor where papers do so over whole vectors, divides by other sums,
and rescales otherwise. The options below give its results; `docs/merging.md` lists the differences.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import flag, number, one_of, whole
from ..errors import ConfigError, IntegrityError, VectorError, nearest
from .chat import joint_template
from .checkpoint import complete_folder, dtype_named, refuse_others, result_config, transformers_config
from .delta import delta_between, restore
from .files import SHARD_BYTES, nbytes, write_tensors
from .merging.layers import setting_at
from .merging.registry import merge, merge_info
from .parameters import refuse_quantised
from .recipe import MergekitRecipe, Settings, TensorPlan, read_recipe, tensors_to_make
from .stream import files_read
from .task_vector import TaskVector
from .tensors import Kind, kinds_of, named_tensors, stamps_of
from .vocabulary import aligned_to, joint_vocabulary

log = logging.getLogger(__name__)
FLOOR = 1e-6  # mergekit's least norms and sums; those of light fine-tunings are smaller


@dataclass(frozen=True)
class Parameter:
    """A parameter of a recipe.

    Attributes:
        name: hatcl's option; "" = it changes nothing here. default: mergekit's; None = it must be given.
        kind: `number`, `flag` or `whole`. change: from mergekit's value to the option's.
    """

    name: str
    default: Any
    kind: str = "number"
    change: Callable[[Any], Any] = staticmethod(lambda value: value)


@dataclass(frozen=True)
class MergekitMethod:
    """One of mergekit's methods in terms of hatcl's.

    Attributes:
        method: hatcl's name. base: `needed`; `used` if there is one; `none`: it is one of the inputs.
        shared, each: parameters of the merge, and of each model (but the base, unless it is one of the inputs).
        fixed: hatcl's options that mergekit has no parameter for. fewest, most: the number of models it accepts,
            without the base.
    """

    method: str
    base: str
    shared: Mapping[str, Parameter] = field(default_factory=dict)
    each: Mapping[str, Parameter] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    fewest: int = 1
    most: int | None = None


def _family(
    method: str, normalize: bool, *, rescale: bool | None = None, elect: bool = False, density: Parameter | None = None,
    **each: Parameter,
) -> MergekitMethod:  # fmt: skip
    """The common parameters of mergekit's methods that mask, weight and sum task vectors."""
    idle = Parameter("", 1.0)
    shared = {
        "normalize": Parameter("normalise", normalize, "flag"),
        "lambda": Parameter("scale", 1.0),
        "int8_mask": Parameter("", False, "flag"),
        "rescale": Parameter("", False, "flag")
        if rescale is None
        else Parameter("rescale", rescale, "flag", lambda on: "l1" if on else "none"),
    }
    own = {"weight": Parameter("weights", None), "density": density or idle, **each}
    return MergekitMethod(method, "needed", shared, own, {"undecided": "positive"} if elect else {})


RETAINED = Parameter("density", 1.0)
DROPPED = Parameter("drop", 1.0, change=lambda density: 1 - density)
OUTLIERS, EPSILON = Parameter("outliers", 0.01), Parameter("epsilon", 0.15)
MERGEKIT: dict[str, MergekitMethod] = {
    "linear": MergekitMethod(
        "mean", "none", {"normalize": Parameter("normalise", True, "flag")}, {"weight": Parameter("weights", None)}
    ),
    "task_arithmetic": _family("arithmetic", False),
    "ties": _family("ties", True, rescale=False, elect=True, density=RETAINED),
    "dare_linear": _family("dare_linear", False, rescale=True, density=DROPPED),
    "dare_ties": _family("dare_ties", False, rescale=True, elect=True, density=DROPPED),
    "breadcrumbs": _family("breadcrumbs", False, rescale=False, density=RETAINED, gamma=OUTLIERS),
    "breadcrumbs_ties": _family("breadcrumbs_ties", False, rescale=False, elect=True, density=RETAINED, gamma=OUTLIERS),
    "della": _family("della", True, rescale=True, elect=True, density=RETAINED, epsilon=EPSILON),
    "della_linear": _family("della_linear", False, rescale=True, density=RETAINED, epsilon=EPSILON),
    "slerp": MergekitMethod("slerp", "none", {"t": Parameter("t", None)}, fewest=2, most=2),
    "nuslerp": MergekitMethod(
        "nuslerp",
        "used",
        {
            "nuslerp_flatten": Parameter("flatten", True, "flag"),
            "nuslerp_row_wise": Parameter("row_wise", False, "flag"),
        },
        {"weight": Parameter("weights", None)},
        fewest=2,
        most=2,
    ),
    "multislerp": MergekitMethod(
        "multislerp",
        "used",
        {"normalize_weights": Parameter("normalise", True, "flag"), "eps": Parameter("", 1e-8)},
        {"weight": Parameter("weights", None)},
    ),
    "karcher": MergekitMethod(
        "karcher", "none", {"max_iter": Parameter("steps", 10, "whole"), "tol": Parameter("tolerance", 1e-5)}
    ),
    "model_stock": MergekitMethod(
        "model_stock", "needed", {"filter_wise": Parameter("rows", False, "flag")}, fixed={"floor": FLOOR}, fewest=2
    ),
    "sce": MergekitMethod(
        "sce",
        "needed",
        {"select_topk": Parameter("density", 1.0), "int8_mask": Parameter("", False, "flag")},
        fixed={"floor": FLOOR, "undecided": "positive"},
    ),
    "arcee_fusion": MergekitMethod("arcee_fusion", "needed", most=1),
    "nearswap": MergekitMethod("nearswap", "needed", {"t": Parameter("t", None)}, fixed={"floor": FLOOR}, most=1),
    "ram": MergekitMethod("ram", "needed", {"epsilon": Parameter("epsilon", 1e-5)}),
    "ramplus_tl": MergekitMethod(
        "ram",
        "needed",
        {"r": Parameter("rescue", 0.1), "alpha": Parameter("most", 0.2), "epsilon": Parameter("epsilon", 1e-5)},
    ),
    "passthrough": MergekitMethod("passthrough", "none", {}, {"scale": Parameter("scale", 1.0)}, most=1),
}
PARAMETERS = sorted({p for m in MERGEKIT.values() for p in [*m.shared, *m.each]})


def follow_recipe(
    content: Mapping[str, Any],
    out: str | os.PathLike[str],
    *,
    folder: str | os.PathLike[str] = "",
    text: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the result of a mergekit recipe: weights and, if the models are folders of transformers, config, tokenizer
    and a model card, so that `from_pretrained` loads it. It needs memory for one shard and a tensor of each model.

    Calling it again with the same recipe and files resumes an interrupted write.

    Args:
        content: the recipe, as its YAML says. out: a folder, or a file that ends in `.safetensors`.
        folder: the base of models' paths that do not exist relative to the working directory. text: the recipe as it
            was written, for the card. progress: called with the bytes that are finished and those in all.

    Raises:
        ConfigError: the recipe cannot be run. VectorError: the models do not fit each other.
        IntegrityError: a file is missing or damaged, or the disk is full.
    """
    recipe = read_recipe(content)
    one_of("merge_method", recipe.merge_method, list(MERGEKIT))
    _check_parameters(recipe)
    dtype, written = (dtype_named(d) for d in (recipe.dtype, recipe.out_dtype))
    places = {m: _folder_of(m, Path(folder)) for m in recipe.models}
    target = Path(out).resolve()
    for f in (f.resolve() for place in places.values() for p in place for f in files_read(p)):
        if target in (f, f.parent):
            raise ConfigError(f"out: {out} would replace {f}, which is read; name another folder")
    models = {m: _model_tensors(place) for m, place in places.items()}
    bases = {m: place[0] for m, place in places.items()}
    configs = {m: transformers_config(place) for m, place in bases.items()}
    for m, place in bases.items():
        refuse_quantised(place, m)
    config, vocabulary = result_config(recipe, configs), joint_vocabulary(recipe, bases)
    if vocabulary is not None:
        models = {m: aligned_to(vocabulary, m, tensors, models) for m, tensors in models.items()}
    template = joint_template(recipe, bases)
    refuse_others(Path(out), bases[recipe.donor], config, vocabulary=vocabulary, template=template)
    made = {one.name: one for one in tensors_to_make(recipe, {m: kinds_of(t) for m, t in models.items()})}
    settings = {name: _settings(recipe, one) for name, one in made.items()}  # before anything is read
    kinds = {name: _result_kind(one, models, dtype, written) for name, one in made.items()}
    stamps = [stamp for place in places.values() for p in place for stamp in stamps_of(files_read(p))]
    settled, total = [0], sum(nbytes(k) for k in kinds.values())

    def add(count: int) -> None:
        settled[0] += count
        if progress is not None:
            progress(settled[0], total)

    def make(name: str) -> dict[str, Tensor]:
        one = made[name]
        inputs = {m: models[m][n] for m, n in one.inputs.items()}
        return {name: _merged_tensor(recipe, one, inputs, settings[name], dtype).to(kinds[name].dtype)}

    path = write_tensors(
        Path(out),
        kinds,
        make,
        shard_bytes=shard_bytes,
        recipe=json.dumps([dict(content), stamps], default=repr),
        progress=add,
    )
    if path.is_dir():
        complete_folder(
            path, bases[recipe.donor], config, dtype=written or dtype, vocabulary=vocabulary, template=template,
            models=[str(m) for m in recipe.models], recipe=text or json.dumps(dict(content), indent=2),
        )  # fmt: skip
    return path


def _folder_of(model: str, folder: Path) -> tuple[Path, ...]:
    """The paths of a model's name: a checkpoint, and an adapter if it has the form CHECKPOINT+ADAPTER."""
    out = []
    for part in model.split("+"):
        found = next((p for p in (Path(part), folder / part) if p.exists()), None)
        if found is None:
            raise IntegrityError(
                f"{part}: no such file or folder; download models of a hub first (hf download {part} --local-dir "
                "FOLDER), and the recipe names the folder"
            )
        out.append(found)
    return tuple(out)


def _model_tensors(place: Sequence[Path]) -> Mapping[str, Tensor]:
    start, *adapters = place
    tensors: Mapping[str, Tensor] = named_tensors(start)
    for adapter in adapters:
        tensors = TaskVector.between(start, adapter).apply_to(tensors)
    return tensors


def _result_kind(
    made: TensorPlan, models: Mapping[str, Mapping[str, Tensor]], dtype: torch.dtype | None, written: torch.dtype | None
) -> Kind:
    found = [kinds_of(models[m])[n] for m, n in made.inputs.items()]
    shapes = {k.shape for k in found}
    if len(shapes) > 1:
        each = ", ".join(f"{list(k.shape)} in {m}" for m, k in zip(made.inputs, found, strict=True))
        raise VectorError(
            f"{made.name} is {each}. Vocabularies that differ are aligned with tokenizer_source: base (or union); "
            "other sizes must be the same"
        )
    kind = functools.reduce(torch.promote_types, (k.dtype for k in found))
    if not kind.is_floating_point:
        return Kind(found[0].shape, kind)
    return Kind(found[0].shape, written or dtype or kind)


def _settings(recipe: MergekitRecipe, made: TensorPlan) -> dict[str, Any]:
    """hatcl's options for one tensor."""
    method = MERGEKIT[recipe.merge_method]
    if method.base == "needed" and made.base not in made.inputs:
        raise ConfigError(
            f"base_model: {recipe.merge_method} needs one"
            + (f"; {made.base} has to be among the sources of each slice" if made.base else "")
        )
    shared_scopes: list[Settings] = [made.part.parameters, recipe.module, recipe.parameters]
    options = {
        p.name: _value(name, p, shared_scopes, made.name, made.place) for name, p in method.shared.items() if p.name
    }
    order = _merged_models(method, made)
    if not method.fewest <= len(order) <= (method.most or len(order)):
        expected = f"{method.fewest}{' or more' if method.most is None else ''}"
        raise ConfigError(f"{recipe.merge_method}: got {len(order)} models for {made.name}, expected {expected}")
    own = {s.model: s.parameters for s in made.part.sources}
    for name, p in method.each.items():
        if p.name:
            options[p.name] = [
                _value(name, p, [own.get(m, {}), *shared_scopes], made.inputs[m], made.place) for m in order
            ]
    if "flatten" in options:
        options["along"] = None if options.pop("flatten") else (0 if options["row_wise"] else -1)
        del options["row_wise"]
    if method.method == "passthrough":
        options["scale"] = options["scale"][0]
    return {**options, **method.fixed}


def _check_parameters(recipe: MergekitRecipe) -> None:
    """Raise `ConfigError` for a parameter that no method has, and warn of those that this method does not have."""
    method = MERGEKIT[recipe.merge_method]
    scopes = [recipe.parameters, recipe.module, *(p.parameters for p in recipe.slices)]
    scopes += [s.parameters for p in recipe.slices for s in p.sources]
    for key in dict.fromkeys(key for scope in scopes for key in scope):
        if key not in PARAMETERS:
            raise ConfigError(f"parameters: no method has {key!r}; did you mean {nearest(key, PARAMETERS)!r}?")
        if key not in method.shared and key not in method.each:
            log.warning("%s has no parameter %s: it has no effect, as in mergekit", recipe.merge_method, key)


def _value(name: str, parameter: Parameter, scopes: Sequence[Settings], tensor: str, place: float) -> Any:
    found = parameter.default
    for settings in reversed(scopes):
        if name in settings and (value := setting_at(name, settings[name], tensor, place)) is not None:
            found = value
    if found is None:
        raise ConfigError(f"{name}: no value for {tensor}; give it under parameters")
    if parameter.kind == "flag":
        found = bool(found) if found in (0, 1) else found
        flag(name, found)
    elif parameter.kind == "whole":
        whole(name, found)
    else:
        found = number(name, found)
    return parameter.change(found)


def _merged_models(method: MergekitMethod, made: TensorPlan) -> list[str]:
    """The models for the method, in its order: without the base if that counts as the base."""
    if method.method == "slerp" and made.base in made.inputs:
        return sorted(made.inputs, key=lambda m: m != made.base)  # from the base to the other
    return [m for m in made.inputs if method.base == "none" or m != made.base]


def _merged_tensor(
    recipe: MergekitRecipe,
    made: TensorPlan,
    inputs: Mapping[str, Tensor],
    options: Mapping[str, Any],
    dtype: torch.dtype | None,
) -> Tensor:
    tensors = list(inputs.values())
    if not all(t.dtype.is_floating_point for t in tensors):
        if any(not torch.equal(t, tensors[0]) for t in tensors):
            raise VectorError(f"{made.name} ({tensors[0].dtype}) differs between the models; integers are not merged")
        return tensors[0]
    kind = dtype or functools.reduce(torch.promote_types, (t.dtype for t in tensors))
    # a tensor without dimensions is merged as one element, as mergekit does
    read = {m: t.to(kind).reshape(t.shape or (1,)) for m, t in inputs.items()}
    method = MERGEKIT[recipe.merge_method]
    order = _merged_models(method, made)
    base = read[made.base] if method.base != "none" and made.base in read else None
    wide = torch.promote_types(kind, torch.float32)
    start = torch.zeros((), dtype=wide) if base is None else base.to(wide)
    given = {"pretrained": {made.name: start}} if "pretrained" in merge_info(method.method).needs else {}
    taken = [read[m].to(wide) - start if base is None else delta_between(start, read[m]) for m in order]
    vectors = [TaskVector({made.name: tau}) for tau in taken]
    merged = merge(vectors, method.method, **given, **options)
    out = merged[made.name].to(kind) if base is None else restore(base, merged.delta(made.name), kind)
    return out.reshape(tensors[0].shape)
