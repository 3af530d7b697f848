"""CLIP models of open_clip and transformers: towers, heads of names, names of checkpoints. Random weights."""

from __future__ import annotations

import json
import logging

import clip_parts
import numpy as np
import open_clip
import pytest
import torch
import transformers
from PIL import Image
from torch.nn import functional as tf

import hatcl
from hatcl.atlas import encoder, text_head
from hatcl.errors import ConfigError, VectorError
from hatcl.integrations.clip import (
    ImageTower,
    clip_from_name,
    imagenet_prompts,
    is_clip_name,
    kind_of_clip,
    text_embeddings,
    texts_from,
    tower_names,
)

CLASSES, TEMPLATES = ("cat", "dog", "bird"), ("a photo of a {}.", "a small {}.")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The two kinds, with the name that each is asked for by."""
    folder = tmp_path_factory.mktemp("clip")
    model = clip_parts.transformers_folder(folder / "hf")
    return {
        "open_clip": (clip_parts.open_clip_folder(folder / "open"), clip_parts.open_clip_model()),
        "transformers": (str(folder / "hf"), model),
    }


@pytest.mark.parametrize("kind", ["open_clip", "transformers"])
def test_the_tower_gives_the_models_own_embeddings_under_its_own_names(both, kind):
    _, model = both[kind]
    x = torch.rand(3, 3, 32, 32)
    want = model.encode_image(x) if kind == "open_clip" else model.get_image_features(pixel_values=x).pooler_output
    tower = encoder(model)
    assert kind_of_clip(model) == kind and torch.equal(tower(x), want)
    theirs = dict(model.named_parameters())
    assert all(torch.equal(p, theirs[n]) and p is not theirs[n] for n, p in tower.named_parameters())
    assert not any(n.startswith(("text", "transformer", "token")) for n, _ in tower.named_parameters())
    with pytest.raises(ConfigError, match="pool: got 'mean' for a CLIP model"):
        encoder(model, "mean")


@pytest.mark.parametrize("kind", ["open_clip", "transformers"])
@pytest.mark.parametrize("grain", ["block", "qkv", "row", "partition:3"])
def test_vectors_of_towers_compose_exactly(both, kind, grain):
    tower = encoder(both[kind][1])
    vectors = [hatcl.TaskVector.between(tower.state_dict(), clip_parts.moved(tower, "", seed=s)) for s in range(2)]
    composer = hatcl.compose(tower, vectors, grain)
    with torch.no_grad():
        composer.coefficients[1] = 1
    x = torch.rand(2, 3, 32, 32)
    want = encoder(both[kind][1])
    want.load_state_dict(clip_parts.moved(tower, "", seed=1))
    assert torch.equal(composer(x), want(x))
    line = hatcl.atlas.linearised(hatcl.compose(tower, vectors, grain))
    torch.nn.functional.mse_loss(line(x), want(x)).backward()
    assert bool(line.coefficients.grad.any())


@pytest.mark.parametrize("kind", ["open_clip", "transformers"])
def test_heads_of_names_are_those_of_the_published_way(both, kind):
    name, model = both[kind]
    clip = clip_from_name(name)
    clip.model.load_state_dict(model.state_dict())
    embeddings, scale = text_embeddings(clip.model, clip.tokenize, CLASSES, TEMPLATES)
    rows = []
    for c in CLASSES:
        texts = [t.format(c) for t in TEMPLATES]
        if kind == "open_clip":
            found = model.encode_text(open_clip.get_tokenizer("ViT-B-32")(texts))
        else:
            tokenizer = transformers.AutoTokenizer.from_pretrained(name)
            found = model.get_text_features(**tokenizer(texts, padding=True, return_tensors="pt")).pooler_output
        found = found / found.norm(dim=-1, keepdim=True)
        rows.append(found.mean(0) / found.mean(0).norm())
    # measured 1.2e-7: other order of products
    torch.testing.assert_close(embeddings, torch.stack(rows), rtol=0, atol=1e-6)
    assert scale == pytest.approx(float(model.logit_scale.detach().exp()), rel=1e-6)
    assert len({tuple(row) for row in embeddings.tolist()}) == 3  # the names are told apart
    x = torch.rand(4, 3, 32, 32)
    features = encoder(model)(x)
    logits = text_head(clip.model, clip.tokenize, CLASSES, TEMPLATES)(features)
    want = scale * tf.normalize(features, dim=-1) @ embeddings.T
    torch.testing.assert_close(logits, want, rtol=0, atol=1e-5)  # of logits up to 14; measured 9e-7


@pytest.mark.parametrize("kind", ["open_clip", "transformers"])
@pytest.mark.parametrize("shape", [(32, 32, 3), (50, 40, 3), (28, 28)])
def test_images_are_prepared_as_the_model_was_trained_to_see_them(both, kind, shape):
    clip = clip_from_name(both[kind][0])
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)).convert("RGB")
    want = open_clip.image_transform(32, is_train=False, mean=None, std=None)(image)
    # transformers resizes tensors, open_clip PIL images: measured .031 at most (two of 256 grey values are .03)
    torch.testing.assert_close(clip.transform(image), want, rtol=0, atol=0 if kind == "open_clip" else 0.04)
    assert clip.cfg["input_size"] == (3, 32, 32)


def test_a_folders_own_preparation_counts(both, tmp_path):
    name, model = both["transformers"]
    model.save_pretrained(tmp_path)
    transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=[0, 0, 0], image_std=[1, 1, 1]
    ).save_pretrained(tmp_path)
    image = Image.new("RGB", (32, 32), (255, 255, 255))
    assert bool((clip_from_name(str(tmp_path)).transform(image) == 1).all())
    assert not bool((clip_from_name(name).transform(image) == 1).all())


def test_names_that_mean_a_clip_model(both, tmp_path):
    assert is_clip_name("open_clip:ViT-B-32") and is_clip_name(both["transformers"][0])
    assert not is_clip_name("vit_base_patch32_224") and not is_clip_name(str(tmp_path))


def test_what_openai_trained_needs_quickgelu_and_it_is_said(both, caplog, monkeypatch):
    small, create = both["open_clip"][0].removeprefix("open_clip:"), open_clip.create_model
    monkeypatch.setattr(open_clip, "create_model", lambda name, *rest, **options: create(small, *rest, **options))
    handlers = list(logging.getLogger().handlers)
    for name in ("RN50", "RN50-quickgelu"):
        with caplog.at_level(logging.WARNING, "hatcl"):
            clip_from_name(f"open_clip:{name}")
    said = [r.getMessage() for r in caplog.records if r.name.startswith("hatcl")]
    assert len(said) == 1 and "for these give open_clip:RN50-quickgelu" in said[0]
    assert logging.getLogger().handlers == handlers


@pytest.mark.parametrize(
    ("names", "kind", "want"),
    [
        (["model.visual.proj", "model.logit_scale", "other"], "open_clip", ["visual.proj", "logit_scale", "other"]),
        (["visual.conv1.weight", "text_projection"], "open_clip", ["visual.conv1.weight", "text_projection"]),
        (["module.visual.proj"], "open_clip", ["visual.proj"]),
        (["image_encoder.model.visual.proj", "classification_head.weight"], "open_clip", ["visual.proj", None]),
        (["clip.vision_model.a", "clip.visual_projection.weight"], "transformers", ["vision_model.a", None]),
    ],
)
def test_wrappers_are_taken_off_names(names, kind, want):
    found = tower_names(names, kind, "it")
    want = [n if w is None and not n.startswith("clip.") else w for n, w in zip(names, want, strict=True)]
    assert [found[n] for n in names] == [w or n.removeprefix("clip.") for n, w in zip(names, want, strict=True)]


@pytest.mark.parametrize(
    ("names", "kind", "says"),
    [
        (["a.visual.proj", "b.visual.proj"], "open_clip", "it: holds 2 image towers as open_clip calls them"),
        (["blocks.0.weight"], "open_clip", "it: holds 0 image towers as open_clip calls them .*it holds blocks.0"),
        (["vision_model.a"], "open_clip", "It belongs to transformers: give --model of transformers"),
        (["visual.proj"], "transformers", "It belongs to open_clip: give --model of open_clip"),
    ],
)
def test_other_checkpoints_are_refused(names, kind, says):
    with pytest.raises(VectorError, match=says):
        tower_names(names, kind, "it")


def test_imagenets_prompts_are_clips():
    names, templates = imagenet_prompts()
    assert len(names) == 1000 and names[0] == "tench" and len(templates) == 80
    assert "a bad photo of a {}." in templates and all(t.count("{}") == 1 for t in templates)


def test_bad_names_are_refused_with_the_nearest(both, tmp_path, monkeypatch):
    for name, options, says in (
        ("open_clip:ViT-B-23", {}, "open_clip has no 'ViT-B-23'; did you mean 'open_clip:ViT-B-32"),
        ("open_clip:local-dir:/none", {}, "open_clip cannot make local-dir:/none"),
        (both["open_clip"][0], {"sizes": 3}, "with {'sizes': 3}"),
        (both["transformers"][0], {"vision_config": 3}, "whose config.json says it all; leave them out"),
    ):
        with pytest.raises(ConfigError, match=says):
            clip_from_name(name, options)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ConfigError, match="has the kind 'bert', expected 'clip'"):
        clip_from_name(str(tmp_path))
    with pytest.raises(ConfigError, match="--text-from: openai is no file, and .* has no tags"):
        texts_from(both["transformers"][0], "openai")
    with pytest.raises(ConfigError, match="and the pretrained weights 'openia'"):
        texts_from("open_clip:ViT-B-32", "openia")
    for make in (ImageTower, lambda model: text_head(model, list, ["cat"])):
        with pytest.raises(ConfigError, match="Linear is no CLIP model of open_clip or transformers"):
            make(torch.nn.Linear(2, 2))
    monkeypatch.setitem(__import__("sys").modules, "open_clip", None)
    with pytest.raises(ConfigError, match=r"imagenet: the names come with open_clip; run: pip install"):
        monkeypatch.setitem(__import__("sys").modules, "open_clip.zero_shot_metadata", None)
        imagenet_prompts()
    with pytest.raises(ConfigError, match=r"open_clip is not installed; run: pip install 'hatcl\[clip\]'"):
        clip_from_name("open_clip:ViT-B-32")
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"transformers is not installed; run: pip install 'hatcl\[hf\]'"):
        clip_from_name(both["transformers"][0])
