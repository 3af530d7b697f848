"""Finding a method by name, and what is refused before anything is done."""

from __future__ import annotations

import re

import pytest
import torch
from vector_parts import MOST

from hatcl import ConfigError, VectorError
from hatcl.vectors.merging import list_merges, merge, merge_method, registry
from hatcl.vectors.merging.registry import merge_info
from hatcl.vectors.task_vector import TaskVector

EVERY = [
    "adamerging", "arcee_fusion", "arithmetic", "breadcrumbs", "breadcrumbs_ties", "consensus", "dare_linear",
    "dare_ties", "della", "della_linear", "emr", "fisher", "iso_c", "iso_cts", "karcher", "knots",
    "localize_and_stitch", "magmax", "mean", "model_stock", "multislerp", "nearswap", "nuslerp", "opcm",
    "passthrough", "ram", "regmean", "regmean_plusplus", "sce", "slerp", "ties", "tsv", "wudi",
]  # fmt: skip
DATA = [(m, o) for m in EVERY for o in merge_info(m).needs]


@pytest.fixture
def two():
    return [TaskVector({"w": torch.ones(2, 2)}), TaskVector({"w": torch.eye(2)})]


@pytest.fixture
def unregister():
    before = dict(registry._MERGES)
    yield
    registry._MERGES.clear()
    registry._MERGES.update(before)


def test_all_are_listed_and_say_where_they_are_from():
    assert list_merges() == EVERY
    for name in EVERY:
        info = merge_info(name)
        assert re.search(r"(19|20)\d\d", info.paper)
        assert re.search(r"arXiv \d{4}\.\d{5}", info.paper)
        assert "Needs" in (info.function.__doc__ or "") and "paper" not in info.options


def test_an_own_method_is_one_decorator(two, unregister):
    @merge_method("first", paper="me, 2026")
    def first(vectors, *, scale=1.0):
        return vectors[0] * scale

    assert "first" in list_merges()
    assert torch.equal(merge(two, "first", scale=2.0)["w"], torch.full((2, 2), 2.0))
    merge_method("counted", paper="me")(lambda vectors: len(vectors))
    with pytest.raises(VectorError, match="merge: counted gave a int, expected a TaskVector; make one by arithmetic"):
        merge(two, "counted")
    with pytest.raises(ConfigError, match="'first' is taken by .*first"):
        merge_method("first", paper="me")(first)
    with pytest.raises(ConfigError, match="'other' needs 'model', which is not a keyword option"):
        merge_method("other", paper="me", needs={"model": "the model"})(first)
    with pytest.raises(ConfigError, match="'other' needs 'grams', which is not a keyword option"):
        merge_method("other", paper="me", instead="grams")(first)


def test_unknown_method(two):
    with pytest.raises(ConfigError, match="method: got 'tise', expected one of .*did you mean 'ties'"):
        merge(two, "tise")


@pytest.mark.parametrize("method", EVERY)
def test_unknown_option(method, two):
    with pytest.raises(ConfigError, match=f"densty: no option of {method}, which has .*"):
        merge(two, method, densty=0.1)
    with pytest.raises(
        ConfigError, match="densty: no option of ties, which has density, scale, weights, .*; did you mean 'density'"
    ):
        merge(two, "ties", densty=0.1)
    with pytest.raises(ConfigError, match="density: no option of mean, which has weights, normalise"):
        merge(two, "mean", density=0.1)


@pytest.mark.parametrize("method, option", DATA)
def test_missing_data(method, option, two):
    rest = {o: object() for o in merge_info(method).needs if o != option}
    with pytest.raises(ConfigError, match=f"{method} needs {option}: pass {option}="):
        merge(two, method, **rest)
    with pytest.raises(ConfigError, match=f"{method} needs {option}: pass {option}="):
        merge(two, method, **rest, **{option: None})


def test_no_vectors_and_what_is_none(two):
    with pytest.raises(VectorError, match="no task vectors; pass at least one"):
        merge([])
    with pytest.raises(VectorError, match=r"got one task vector, expected a list of them; pass \[v1, v2"):
        merge(two[0])
    with pytest.raises(VectorError, match="vector 1 is a dict; make one by TaskVector.between"):
        merge([two[0], {"w": torch.ones(2, 2)}])


@pytest.mark.parametrize("method", EVERY)
def test_vectors_that_do_not_belong_together(method, two):
    data = {o: [] for o in merge_info(method).needs}
    with pytest.raises(VectorError, match=r"w is \[2, 2\] in vector 0, \[3\] in vector 1"):
        merge([two[0], TaskVector({"w": torch.ones(3)})], method, **data)
    with pytest.raises(VectorError, match="vector 0 lacks 1 tensors that vector 1 has: v"):
        merge([two[0], TaskVector({"w": torch.ones(2, 2), "v": torch.ones(1)})], method, **data)
    bases = [TaskVector({"w": torch.ones(2, 2)}, {"w": digest}) for digest in "ab"]
    with pytest.raises(VectorError, match="w: the vectors were taken from different bases"):
        merge(bases, method, **data)


NUMBERS = {
    ("ties", "density"): (-0.1, 1.1, "most", None, True, float("nan")),
    ("ties", "scale"): (float("inf"), "one"),
    ("arithmetic", "scale"): (float("nan"), "one"),
    ("dare_linear", "drop"): (1.0, -0.1),
    ("dare_linear", "seed"): (-1, 0.5),
    ("dare_ties", "drop"): (1, 2),
    ("dare_ties", "density"): (1.5,),
    ("dare_ties", "seed"): (True,),
    ("slerp", "t"): (-0.5, 1.5),
    ("breadcrumbs", "density"): (-1,),
    ("breadcrumbs", "outliers"): (2,),
    ("magmax", "scale"): ("big",),
    ("nearswap", "t"): (-1, None),
    ("nearswap", "floor"): (-1e-6,),
    ("ram", "epsilon"): (-1,),
    ("ram", "rescue"): ("some",),
    ("ram", "most"): (float("nan"),),
    ("tsv", "scale"): (None,),
    ("consensus", "agree"): (0, 1.5),
    ("consensus", "threshold"): (-0.1, "low"),
    ("consensus", "scale"): ("big",),
    ("iso_c", "scale"): (None,),
    ("iso_cts", "common"): (-0.1, 1.1),
    ("iso_cts", "scale"): ("one",),
    ("knots", "density"): (2,),
    ("knots", "scale"): (float("nan"),),
    ("localize_and_stitch", "density"): (-0.1, 1.1),
    ("opcm", "alpha"): (-0.1, 1.1),
    ("wudi", "steps"): (0, 1.5),
    ("wudi", "lr"): (-1e-5,),
}


@pytest.mark.parametrize("method, option", NUMBERS)
def test_values_outside_their_range(method, option, two):
    for value in NUMBERS[method, option]:
        if (method, value) == ("arithmetic", None):
            continue
        with pytest.raises(ConfigError, match=f"{option}: got .*, expected (an integer|a (finite )?number)"):
            merge(two[: MOST.get(method)], method, **{option: value})


@pytest.mark.parametrize("method, instead", [("fisher", "fishers"), ("regmean", "grams")])
def test_data_beside_what_stands_in_for_it_is_refused(two, method, instead):
    with pytest.raises(ConfigError, match=f"batches: given together with {instead}, which replaces it"):
        merge(two, method, **{"batches": [[], []], instead: [{}, {}]})


@pytest.mark.parametrize("method", [m for m in list_merges() if "model" in merge_info(m).options])
def test_a_path_is_no_model_to_run(method, two):
    given = {"model": "base", **({"batches": [[], []]} if "batches" in merge_info(method).options else {})}
    with pytest.raises(ConfigError, match="model: got a str, expected the pretrained model as a module"):
        merge(two, method, **given)


@pytest.mark.parametrize("method", [m for m in EVERY if "convs" in merge_info(m).options])
def test_a_method_for_matrices_says_that_it_averages_filters(method, recwarn):
    """It gave the mean of a convolutional network's vectors without a word."""
    filters = [TaskVector({"w": torch.randn(4, 3, 3, 3), "head": torch.randn(2, 4)}) for _ in range(2)]
    said = f"{method} is a method for matrices, and 93 % of the elements are in filters.* pass convs=True"
    with pytest.warns(UserWarning, match=said):
        merge(filters, method)
    recwarn.clear()
    merge(filters, method, convs=False)
    merge([TaskVector({"w": torch.randn(4, 4), "patch": torch.randn(2, 1, 2, 2)}) for _ in range(2)], method)
    assert not recwarn.list
