from __future__ import annotations

import io
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from hatcl.errors import ConfigError, SkillError
from hatcl.report import skills as module
from hatcl.report.skills import LayerPlace, draw_overlap, draw_skills, places_of
from hatcl.skills.scores import SKILL_GRAINS, Skill, SkillScores, localize

BERT = "base_model.model.bert.encoder.layer.{}.attention.self.{}"
T5 = "base_model.model.{}.block.{}.layer.{}.{}"


def opened(png: bytes) -> np.ndarray:
    """Pixels; nothing runs over the edge, and something is drawn."""
    image = Image.open(io.BytesIO(png))
    image.load()
    assert image.format == "PNG" and min(image.size) > 200 and image.size[0] <= 120 * module.WIDEST
    pixels = np.asarray(image.convert("RGB")).astype(int)
    assert (pixels[:2] > 250).all() and (pixels[-2:] > 250).all()
    assert (pixels[:, :2] > 250).all() and (pixels[:, -2:] > 250).all()
    assert 0.005 < (pixels.min(-1) < 200).mean() < 0.9
    return pixels


def dark(pixels: np.ndarray) -> int:
    """Pixels in the map's deepest blue; the scale beside it is left out."""
    pixels = pixels[:, : int(0.85 * pixels.shape[1])]
    return int(((pixels[..., 2] - pixels[..., 0] > 70) & (pixels[..., 0] < 30)).sum())


def pairs(*paths: str, rank: int = 2) -> dict[str, tuple[int, int]]:
    both = {"lora_A": (rank, 4), "lora_B": (4, rank)}
    return {f"{path}.{factor}.weight": shape for path in paths for factor, shape in both.items()}


def scored(shapes, grain="lora_pair", seed=0) -> SkillScores:
    size = len(shapes) if grain != "lora_pair" else sum(s[0] for n, s in shapes.items() if "lora_A" in n)
    return SkillScores(grain, shapes, torch.rand(size, generator=torch.Generator().manual_seed(seed)))


def bert(layers: int, rank: int = 2):
    return pairs(*(BERT.format(i, part) for i in range(layers) for part in ("query", "value")), rank=rank)


# ---- where a group is ------------------------------------------------------------------------------------------------


def test_places_in_a_transformer():
    for grain in SKILL_GRAINS:
        places = places_of(scored(bert(2), grain).labels)
        assert list(dict.fromkeys(places)) == [
            LayerPlace("0", "attention.self.query"), LayerPlace("0", "attention.self.value"),
            LayerPlace("1", "attention.self.query"), LayerPlace("1", "attention.self.value"),
        ]  # fmt: skip


def test_places_in_t5_share_their_rows():
    paths = [T5.format(s, i, *part) for s in ("encoder", "decoder") for i in range(3) for part in
             ([(0, "SelfAttention.q"), (1, "DenseReluDense.wi")] if s == "encoder" else
              [(0, "SelfAttention.q"), (1, "EncDecAttention.q"), (2, "DenseReluDense.wi")])]  # fmt: skip
    places = places_of(scored(pairs(*paths, rank=1)).labels)
    assert {p.layer for p in places} == {f"{s}.block.{i}" for s in ("encoder", "decoder") for i in range(3)}
    assert list(dict.fromkeys(p.kind for p in places)) == ["SelfAttention.q", "DenseReluDense.wi", "EncDecAttention.q"]
    # where leaving the numbered part out would mix two modules up, it stays
    places = places_of([T5.format("encoder", i, j, "q[0]") for i in range(3) for j in range(2)])
    assert [(p.layer, p.kind) for p in places][:2] == [("0", "layer.0.q"), ("0", "layer.1.q")]


def test_places_in_stages_and_outside_of_layers():
    depths = enumerate((2, 2, 6, 2))
    labels = [
        f"layers.{s}.blocks.{b}.attn.{p}.weight" for s, deep in depths for b in range(deep) for p in ("qkv", "proj")
    ]
    places = places_of(["patch_embed.proj.weight", *labels, "head.weight", "cls_token"])
    assert places[0] == ("patch_embed", "proj") and places[1] == ("layers.0.blocks.0", "attn.qkv")
    assert places[-2:] == [("head", "head"), ("cls_token", "cls_token")]
    assert places_of(["fc[0]", "fc[1]"]) == [("fc", "fc")] * 2
    for name in ("test_vit", "test_resnet", "test_convnext"):
        names = [n for n, _ in timm.create_model(name, num_classes=3).named_parameters()]
        places = places_of(names)
        modules = {n.rpartition(".")[0] or n for n in names}
        assert len(set(places)) == len(modules) and len({p.layer for p in places}) > 4


def test_cells_by_hand():
    places = [LayerPlace("0", "q"), LayerPlace("0", "q"), LayerPlace("0", "v"), LayerPlace("1", "v")]
    grid = module._grid(np.array([0.0, 0.5, 0.25, 1.0]), places, ["0", "1"], ["q", "v"])
    assert np.array_equal(grid, [[0.25, np.nan], [0.25, 1.0]], equal_nan=True)


def test_heights_by_hand():
    scores = SkillScores("block", {f"p{i}": (1,) for i in range(5)}, torch.tensor([8.0, 0.0, 2.0, 2.0, 4.0]))
    assert module.heights_of(scores, "score").tolist() == [1.0, 0.0, 0.25, 0.25, 0.5]
    assert module.heights_of(scores, "rank").tolist() == [
        1.0,
        0.0,
        0.375,
        0.375,
        0.75,
    ]  # two share ranks 1 and 2 of 0..4


# ---- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "tasks", "grain"),
    [(1, 1, "lora_pair"), (6, 3, "matrix"), (6, 5, "lora_pair"), (24, 4, "block"), (90, 4, "lora_pair")],
)
def test_skills_of_any_size(layers, tasks, grain):
    pytest.importorskip("matplotlib")
    shapes = bert(layers)
    opened(draw_skills({f"a task of long name {i}": scored(shapes, grain, i) for i in range(tasks)}))


def test_skills_in_full_fine_tuning():
    pytest.importorskip("matplotlib")
    for name, of in zip(("test_vit", "test_resnet"), module.OF, strict=True):
        shapes = {n: tuple(p.shape) for n, p in timm.create_model(name, num_classes=3).named_parameters()}
        opened(draw_skills({"one": scored(shapes, "block")}, of))


def test_what_is_important_is_dark():
    pytest.importorskip("matplotlib")
    shapes = bert(6, rank=1)
    drawn = []
    for highest in (0, 3):
        values = torch.zeros(12)
        values[:highest] = 1.0
        drawn.append(dark(opened(draw_skills({"a": SkillScores("lora_pair", shapes, values)}, "score"))))
    assert drawn[0] == 0 and drawn[1] > 1000
    # the rank of equal scores is the middle one
    assert dark(opened(draw_skills({"a": SkillScores("lora_pair", shapes, torch.ones(12))}))) == 0


def test_overlaps():
    pytest.importorskip("matplotlib")
    for count in (1, 4, 25):
        opened(draw_overlap({f"task {i}": localize(scored(bert(6), seed=i)) for i in range(count)}))
    on = torch.zeros(5, dtype=torch.bool)
    shapes = {f"p{i}": (1,) for i in range(5)}
    opened(draw_overlap({"none": Skill("block", shapes, on), "all": Skill("block", shapes, ~on)}))


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_tasks_that_do_not_fit_are_named():
    one, other = scored(bert(2)), scored(bert(2, rank=3))
    with pytest.raises(SkillError, match=r"lora_A.weight is \[2, 4\] in the scores of sst, \[3, 4\] in those of news"):
        draw_skills({"sst": one, "news": other})
    with pytest.raises(SkillError, match=r"is \[2, 4\] in the skills of sst, \[3, 4\] in those of news"):
        draw_overlap({"sst": localize(one), "news": localize(other)})
    for draw in (draw_skills, draw_overlap):
        with pytest.raises(ConfigError, match="got none, expected those of at least one task"):
            draw({})
    with pytest.raises(ConfigError, match="of: got 'ranks', expected one of rank, score; did you mean 'rank'"):
        draw_skills({"sst": one}, "ranks")


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    for name in [n for n in sys.modules if n.startswith("matplotlib")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    scores = scored(bert(2))
    for draw in (lambda: draw_skills({"a": scores}), lambda: draw_overlap({"a": localize(scores)})):
        with pytest.raises(ConfigError, match=r"pip install 'hatcl\[plots\]'"):
            draw()


def test_a_module_that_stands_alone_has_no_empty_row_and_column(monkeypatch):
    pytest.importorskip("matplotlib")
    labels = [f"encoder.{k}.{kind}.weight" for k in range(3) for kind in ("a.query", "b.value")] + [
        "pooler.dense.weight"
    ]
    scores = SkillScores("block", dict.fromkeys(labels, (1,)), torch.arange(7.0))
    figures = []
    monkeypatch.setattr(module, "png", lambda figure: figures.append(figure) or b"")
    draw_skills({name: scores for name in "abcd"})
    panels = [a for a in figures[0].axes if a.get_title(loc="left")]
    assert len(panels) == 4 and all(a.axison for a in figures[0].axes)  # two rows of two: no hole
    assert panels[0].get_title(loc="left") == "a   (pooler dense 1.00)"
    assert [t.get_text() for t in panels[0].get_yticklabels()] == ["a.query", "b.value"]
    assert all(not image.get_array().mask.any() for a in panels for image in a.images)
