"""`timm.create_model("hat_...")`: every name and tag that timm lists, its options passed on or refused."""

from __future__ import annotations

import fnmatch
import shutil
import subprocess
import sys
from pathlib import Path

import parts
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import _registry

import hatcl
from hatcl.hat.gates import gates_of
from hatcl.hat.saving.pretrained import WEIGHTS
from hatcl.integrations import timm_names
from hatcl.sources import build_source

SMALL = [n for n in timm.list_models("test_*")]
ROOT = Path(__file__).parents[2]


def size(name):
    return (3, 64, 64) if name != "test_vit_relpos" else (3, 160, 160)


def options(name):
    base = timm.create_model(name, num_classes=parts.CLASSES)
    fixed = hasattr(base, "patch_embed") or "maxvit" in name or "coatnet" in name
    return {"num_classes": parts.CLASSES, **({"img_size": 64} if fixed and "relpos" not in name else {})}


@pytest.mark.parametrize("name", SMALL)
def test_every_small_model_converts_and_isolates(name):
    kwargs = options(name)
    torch.manual_seed(0)
    base = timm.create_model(name, **kwargs).eval()
    torch.manual_seed(0)
    model = timm.create_model(f"hat_{name}", num_tasks=2, **kwargs)
    x = torch.randn(2, *size(name))
    assert isinstance(model, type(base))
    with torch.no_grad():
        assert torch.equal(parts.logits(model, None, x), base(x))
    parts.pretend(model)
    assert hatcl.certify(model, x, strict=True).exact
    assert not torch.equal(parts.logits(model, 0, x), parts.logits(model, 1, x))


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_every_small_model_learns_exactly(name):
    kwargs = options(name)
    model = timm.create_model(f"hat_{name}", num_tasks=2, **kwargs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    x = torch.randn(2, *size(name))
    losses = parts.train(model, 0, optimizer, parts.problem(size(name), 0, 8), 6)
    want = parts.logits(model, 0, x)
    losses += parts.train(model, 1, optimizer, parts.problem(size(name), 1, 8), 6)
    assert torch.equal(parts.logits(model, 0, x), want)
    assert min(losses[4:6]) < max(losses[:2])
    assert hatcl.certify(model, x, strict=True).exact


# ---- names ----------------------------------------------------------------------------------------


def test_every_name_and_tag_that_timm_lists_has_its_hat_name():
    names = timm.list_models()
    assert hatcl.list_models() == [f"hat_{n}" for n in names]
    assert all(timm.is_model(f"hat_{n}") for n in names)
    for tagged in timm.list_pretrained():
        assert timm.is_model(f"hat_{tagged.split('.')[0]}")


def test_timms_own_listings_stay_as_they_were():
    assert not [n for n in timm.list_models("*hat_*") if n.startswith("hat_")]
    assert not timm.is_model("hat_nothing") and not timm.is_model("hat_hat_resnet18")
    hatcl.install()
    assert type(_registry._model_entrypoints).__mro__[1] is dict  # installed once


@pytest.mark.parametrize("pattern", ["hat_*resnet*", "hat_test_*", "*vit*", "hat_resnet18", "resnet18", "nothing"])
def test_patterns(pattern):
    every = [f"hat_{n}" for n in timm.list_models()]
    assert hatcl.list_models(pattern) == [n for n in every if fnmatch.fnmatch(n, pattern)]


def test_unknown_names_are_timms_own_error():
    with pytest.raises(RuntimeError, match=r"Unknown model \(hat_resnet_of_nobody\)"):
        timm.create_model("hat_resnet_of_nobody", num_tasks=2)


def test_a_model_registered_later_has_its_hat_name_too():
    @timm.models.register_model
    def later_resnet(pretrained=False, **kwargs):
        return timm.create_model(
            "test_resnet", **{k: v for k, v in kwargs.items() if not k.startswith(("pretr", "cache"))}
        )

    try:
        assert timm.is_model("hat_later_resnet")
        assert gates_of(timm.create_model("hat_later_resnet", num_tasks=2, num_classes=3))[0].num_tasks == 2
    finally:
        _registry._model_entrypoints.pop("later_resnet")
        _registry._module_to_models[_registry._model_to_module.pop("later_resnet")].discard("later_resnet")


def test_the_names_cost_nothing_at_import():
    code = "import hatcl, timm\nprint(sum(n.startswith('hat_') for n in timm.models._registry._model_entrypoints))"
    env = {"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


@pytest.mark.parametrize("name, elements", [("resnet18s", 11_173_962), ("resnet34s", 21_282_122)])
def test_resnets_for_small_images(name, elements):
    model = timm.create_model(f"hat_{name}", num_classes=10, verify=False).eval()
    plain = timm.create_model(name, num_classes=10)
    assert sum(p.numel() for p in plain.parameters()) == elements
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert plain.eval().forward_features(x).shape == (1, 512, 4, 4) and model(x).shape == (1, 10)
    assert isinstance(build_source(gates_of(model)[0].source), timm_names.SmallImageResNet)
    assert timm.create_model(name, in_chans=1).conv1.weight.shape == (64, 1, 3, 3)
    with pytest.raises(hatcl.ConfigError, match="stem_type: got 'deep'; the stem of resnet18s and resnet34s is one"):
        timm.create_model(name, stem_type="deep")


def test_every_task_has_its_own_layer_scale():
    """A later task changes it where a sealed one uses the channel, and the sealed one stays."""
    small = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": parts.CLASSES}
    model = timm.create_model("hat_test_vit", num_tasks=2, init_values=0.5, **small)
    assert isinstance(model.blocks[0].ls1, timm_names.TaskIndexedLayerScale)
    x = parts.images("vit")
    for t in range(2):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        parts.train(model, t, optimizer, parts.problem(parts.shape_of("vit"), t), 4)
        if t == 0:
            want = parts.logits(model, 0, x)
    first, second = (own.gamma for own in model.blocks[0].ls1.hat_tasks)
    both = gates_of(model)[0].masks[:2].all(0)
    assert bool(both.any()) and bool((first != second).any()) and bool((first != 0.5).any())
    assert torch.equal(parts.logits(model, 0, x), want) and hatcl.certify(model, x, strict=True).exact


# ---- options --------------------------------------------------------------------------------------


def make(**kwargs):
    return timm.create_model("hat_test_resnet", **kwargs)


def test_tasks_and_classes():
    x = parts.images("resnet")
    assert gates_of(make())[0].num_tasks == 1
    assert gates_of(make(num_tasks=4))[0].num_tasks == 4
    assert gates_of(make(hat_config={"num_tasks": 3, "init": "dense"}))[0].config.init == "dense"
    assert gates_of(make(hat_config=hatcl.HATConfig(num_tasks=3), num_tasks=2))[0].num_tasks == 2
    model = parts.pretend(make(num_classes=[3, 5]))
    assert [parts.logits(model, t, x).shape[1] for t in (0, 1, None)] == [3, 5, 5]
    assert parts.logits(make(num_classes=0, num_tasks=2), None, x).shape == (8, 96)


def test_timms_options_are_passed_on():
    assert make(in_chans=1, num_tasks=2).conv1[0].in_channels == 1
    assert make(num_tasks=2, drop_rate=0.3, global_pool="max").drop_rate == 0.3
    vit = timm.create_model("hat_test_vit", img_size=(32, 48), num_tasks=2, norm_layer=torch.nn.RMSNorm)
    assert isinstance(vit.norm, hatcl.TaskIndexedRMSNorm)
    assert vit(torch.randn(1, 3, 32, 48)).shape == (1, 1000)


@pytest.fixture
def weights(tmp_path):
    base = timm.create_model("test_resnet", num_classes=parts.CLASSES).eval()
    base.fc.weight.data.mul_(2)  # as in a head that has learned
    torch.save(base.state_dict(), tmp_path / "w.pth")
    save_file(base.state_dict(), tmp_path / "w.safetensors")
    return base, tmp_path


@pytest.mark.parametrize("how", ["checkpoint_path pth", "checkpoint_path safetensors", "pretrained_cfg", "overlay"])
def test_pretrained_weights_are_those_that_every_task_starts_from(weights, how):
    base, folder = weights
    kwargs = {"num_tasks": 2, "num_classes": parts.CLASSES}
    if how.startswith("checkpoint_path"):
        kwargs["checkpoint_path"] = str(folder / f"w.{how.split()[1]}")
    elif how == "overlay":
        kwargs |= {"pretrained": True, "pretrained_cfg_overlay": {"file": str(folder / "w.pth"), "num_classes": 4}}
    else:
        file = {"file": str(folder / "w.pth"), "num_classes": 4, "input_size": (3, 160, 160)}
        kwargs |= {"pretrained": True, "pretrained_cfg": {**file, "first_conv": "conv1.0", "classifier": "fc"}}
    model, x = make(**kwargs), parts.images("resnet")
    assert torch.equal(parts.logits(model, None, x), base(x))
    for t in range(2):
        assert torch.equal(model.fc.hat_tasks[t].weight, base.fc.weight)
        assert torch.equal(model.conv1[1].hat_tasks[t].running_var, base.conv1[1].running_var)
    with torch.no_grad():  # all units on is the pretrained network
        gates_of(model)[0].embeddings[0].fill_(1)
    gates_of(model)[0].seal(0)
    assert torch.allclose(parts.logits(model, 0, x), base(x), atol=1e-5)  # gates of one: measured 0


def test_plain_weights_do_not_go_over_sealed_tasks(weights):
    base, _ = weights
    model = parts.pretend(make(num_tasks=2, num_classes=parts.CLASSES))
    with pytest.raises(RuntimeError, match="Missing key.*hat_tasks"):
        model.load_state_dict(base.state_dict())


def test_a_hat_state_dict_with_holes_is_not_taken_for_a_plain_one():
    model = make(num_tasks=2, num_classes=parts.CLASSES)
    state = {n: v for n, v in model.state_dict().items() if "conv1.1.hat_tasks.1" not in n}
    with pytest.raises(RuntimeError, match="Missing key.*conv1.1.hat_tasks.1.weight"):
        model.load_state_dict(state)


@pytest.mark.parametrize(
    "kwargs, text",
    [
        (
            {"features_only": True},
            "hat_test_resnet: features_only=True is not for hat_ names; convert timm.create_model",
        ),
        (
            {"mask_inputs": True},
            "hat_test_resnet: mask_inputs=True is not for hat_ names; call hatcl.convert(timm.create_model('test_res",
        ),
        (
            {"scriptable": True},
            "hat_test_resnet: scriptable=True cannot work, tasks are chosen at run time; use torch.comp",
        ),
        ({"hat_config": {"penalti": 1}}, "HATConfig has no option 'penalti'; did you mean 'penalty'"),
        ({"num_classes": [3, 4], "num_tasks": 3}, "num_classes: got 2 numbers for 3 tasks; pass one per task"),
        ({"num_tasks": 0}, "num_tasks: got 0, expected an integer of at least 1"),
    ],
)
def test_options_that_cannot_be(kwargs, text):
    with pytest.raises(hatcl.ConfigError) as caught:
        make(**kwargs)
    assert text in str(caught.value)


def test_options_that_timm_does_not_know_are_timms_own_error():
    with pytest.raises(TypeError, match="nothing_like_it"):
        make(nothing_like_it=3)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_the_type_is_passed_on(dtype):
    model = make(num_tasks=2, dtype=dtype) if "dtype" in timm.create_model.__doc__ else make(num_tasks=2).to(dtype)
    assert next(model.parameters()).dtype == dtype


def on_meta(name, **options):
    with torch.device("meta"):
        return timm.create_model(name, num_tasks=2, **options)


def test_a_model_on_the_meta_device_is_mapped_as_on_a_real_one():
    real, meta = timm.create_model("hat_test_vit", num_tasks=2), on_meta("hat_test_vit")
    assert all(p.is_meta for n, p in meta.named_parameters() if "hat_gates" not in n)
    assert meta.hat_gates.unit_map.to_json() == real.hat_gates.unit_map.to_json()
    assert str(hatcl.describe(meta)) == str(hatcl.describe(real))


@pytest.mark.slow
@pytest.mark.parametrize("name", timm.list_models())
def test_every_name_can_be_created(name):
    assert hatcl.describe(on_meta(f"hat_{name}")).units > 0


# ---- a saved model's source is not trusted --------------------------------------------------------


def source(name="test_resnet", **options):
    return {"kind": "timm", "name": name, "options": options}


@pytest.fixture
def traps(monkeypatch, tmp_path):
    """Whatever timm opens or asks a network for; and a folder and weights that are there to be opened."""
    touched = []

    def trap(owner, name):
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: touched.append(name) or pytest.fail(name))

    for owner, names in (
        (timm.models._factory, ("load_model_config_from_hf", "load_model_config_from_path", "load_checkpoint")),
        (timm.models._builder, ("load_pretrained",)),
    ):
        for name in names:
            if hasattr(owner, name):
                trap(owner, name)
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "w.pth")
    return tmp_path, touched


NAMES = [
    "hf_hub:timm/test_resnet.r160_in1k", "hf-hub:timm/test_resnet.r160_in1k", "local-dir:{folder}", "{folder}",
    "timm/test_resnet", "test_resnet:x", "no_such_model", "..", "", 3, None, ["test_resnet"],
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_a_name_that_is_none_of_timms_is_refused(traps, name):
    folder, touched = traps
    name = name.format(folder=folder) if isinstance(name, str) else name
    with pytest.raises(hatcl.IntegrityError) as caught:
        build_source(source(name))
    assert str(caught.value) == (
        f"the plain model is to be timm's {name!r}, expected one of timm.list_models(): a saved model names no folder "
        "and no address to get a model from. Pass base= an instance of the plain module"
    )
    assert not touched


@pytest.mark.parametrize("name", NAMES[:3])
def test_twin_timm_looks_for_any_name(traps, monkeypatch, name):
    folder, touched = traps
    monkeypatch.setattr(timm_names, "check_name", lambda name: name)
    with pytest.raises(pytest.fail.Exception):
        build_source(source(name.format(folder=folder)))
    assert touched


READ = [
    {"pretrained": True}, {"checkpoint_path": "{folder}/w.pth"}, {"pretrained_cfg": {"file": "{folder}/w.pth"}},
    {"pretrained": True, "pretrained_cfg_overlay": {"file": "{folder}/w.pth"}}, {"cache_dir": "{folder}/cache"},
    {"pretrained": True, "pretrained_cfg": "r160_in1k"}, {"pretrained_strict": False},
]  # fmt: skip


def filled(x, folder):
    if isinstance(x, dict):
        return {k: filled(v, folder) for k, v in x.items()}
    return x.format(folder=folder) if isinstance(x, str) else x


@pytest.mark.parametrize("options", READ, ids=repr)
def test_options_that_open_something_are_dropped(traps, options):
    folder, touched = traps
    model = build_source(source(num_classes=3, **filled(options, folder)))
    assert model.num_classes == 3 and not touched and not (folder / "cache").exists()


@pytest.mark.parametrize("options", READ[:2], ids=repr)
def test_twin_all_options_reach_timm(traps, monkeypatch, options):
    folder, touched = traps
    monkeypatch.setattr(timm_names, "without_files", lambda options: dict(options))
    with pytest.raises((pytest.fail.Exception, TypeError)):
        build_source(source(**filled(options, folder)))


def test_what_weights_a_model_had_first_is_not_saved(weights, tmp_path):
    """They are opened once, and need not be there when the model is loaded."""
    base, folder = weights
    model = parts.pretend(make(num_tasks=2, num_classes=parts.CLASSES, checkpoint_path=str(folder / "w.pth")))
    assert gates_of(model)[0].source == source(num_classes=parts.CLASSES)
    (folder / "w.pth").unlink()
    again, x = hatcl.from_pretrained(hatcl.save_pretrained(model, tmp_path / "m")), parts.images("resnet")
    assert torch.equal(parts.logits(again, 0, x), parts.logits(model, 0, x))


def test_a_saved_model_with_a_forged_source_is_refused(tmp_path, traps):
    model = parts.pretend(make(num_tasks=2, num_classes=parts.CLASSES))
    gates_of(model)[0].source = source("hf-hub:somebody/model")
    folder = hatcl.save_pretrained(model, tmp_path / "m")
    with pytest.raises(hatcl.IntegrityError, match="the plain model is to be timm's 'hf-hub:somebody/model', expected"):
        hatcl.from_pretrained(folder)
    base = timm.create_model("test_resnet", num_classes=parts.CLASSES)
    assert hatcl.tasks(hatcl.from_pretrained(folder, base=base)) == [0, 1]


# --- places: folders and hubs ---


@pytest.fixture
def place(tmp_path):
    """A plain model in timm's own form, in a folder whose name has dots."""
    torch.manual_seed(3)
    base = timm.create_model("test_resnet", num_classes=parts.CLASSES).eval()
    timm.models.save_for_hf(base, str(tmp_path / "a.b" / "c.d"), safe_serialization=True)
    return base, tmp_path / "a.b" / "c.d"


def test_a_folder_of_timms_is_converted(place, tmp_path):
    base, folder = place
    model = timm.create_model(f"hat_local-dir:{folder}", pretrained=True, num_tasks=2)
    x = parts.images("resnet")
    assert torch.equal(parts.logits(model, None, x), base(x)) and gates_of(model)[0].num_tasks == 2
    parts.pretend(model)
    shutil.rmtree(folder)  # a saved model needs it no more
    again = hatcl.from_pretrained(hatcl.save_pretrained(model, tmp_path / "m"))
    assert torch.equal(parts.logits(again, 1, x), parts.logits(model, 1, x))


@pytest.mark.parametrize("form", ["hat_local-dir:{}", "local-dir:{}"])
def test_a_folder_of_hatcls_is_loaded_by_either_name(tmp_path, form):
    model = parts.pretend(make(num_tasks=2, num_classes=parts.CLASSES))
    folder = hatcl.save_pretrained(model, tmp_path / "a.b")
    x = parts.images("resnet")
    for options in ({}, {"pretrained": True}):
        again = timm.create_model(form.format(folder), **options)
        assert torch.equal(parts.logits(again, 1, x), parts.logits(model, 1, x))
    for option in ({"num_tasks": 3}, {"num_classes": 7}, {"hat_config": {"penalty_weight": 1}}, {"drop_rate": 0.1}):
        with pytest.raises(
            hatcl.ConfigError, match=f"{next(iter(option))}: the model in .*a.b was saved with its tasks"
        ):
            timm.create_model(form.format(folder), **option)


@pytest.mark.parametrize("form", ["hat_hf-hub:some/model@v1", "hat_hf_hub:some/model@v1", "hf-hub:some/model@v1"])
def test_names_on_a_hub(tmp_path, monkeypatch, form):
    import huggingface_hub

    model = parts.pretend(make(num_tasks=2, num_classes=parts.CLASSES))
    folder = hatcl.save_pretrained(model, tmp_path / "hub")
    asked = []

    def download(repo_id, filename, **options):
        asked.append((repo_id, filename, options.get("revision")))
        return str(folder / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(timm.models._hub, "hf_hub_download", download)
    monkeypatch.chdir(tmp_path)
    again, x = timm.create_model(form), parts.images("resnet")
    assert torch.equal(parts.logits(again, 1, x), parts.logits(model, 1, x))
    assert {(repo, revision) for repo, _, revision in asked} == {("some/model", "v1")}


def test_a_model_of_timms_hub_is_converted(place, monkeypatch):
    import huggingface_hub

    base, folder = place
    asked = []

    def download(repo_id, filename, *args, **options):
        asked.append(repo_id)
        if not (folder / filename).exists():
            raise huggingface_hub.errors.EntryNotFoundError(filename)
        return str(folder / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(timm.models._hub, "hf_hub_download", download)
    model, x = timm.create_model("hat_hf-hub:some/model.x", pretrained=True, num_tasks=1), parts.images("resnet")
    assert torch.equal(parts.logits(model, None, x), base(x)) and set(asked) == {"some/model.x"}


def test_timms_own_errors_about_places_stay(tmp_path):
    with pytest.raises(FileNotFoundError, match="Config file not found"):
        timm.create_model(f"hat_local-dir:{tmp_path}")
    with pytest.raises((ValueError, RuntimeError), match="hat_no-place|Unknown model"):
        timm.create_model("hat_no-place:x")


def test_what_timm_saves_of_a_converted_model_is_not_loaded_as_a_plain_one(tmp_path):
    model = parts.pretend(make(num_tasks=2, num_classes=parts.CLASSES))
    timm.models.save_for_hf(model, str(tmp_path / "m"), safe_serialization=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'num_tasks'"):
        timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True)
    del model._model_args  # as of a model that hatcl.convert made
    timm.models.save_for_hf(model, str(tmp_path / "m"), safe_serialization=True)
    with pytest.raises(RuntimeError, match="Unexpected key.*hat_gates"):
        timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True)
    with pytest.raises(RuntimeError, match="Unexpected key.*hat_gates"):
        timm.create_model("test_resnet", checkpoint_path=str(hatcl.save_pretrained(model, tmp_path / "n") / WEIGHTS))


def test_what_hatcl_saved_is_a_checkpoint_for_a_model_created_alike(tmp_path):
    model = parts.pretend(make(num_tasks=2, num_classes=parts.CLASSES))
    file = hatcl.save_pretrained(model, tmp_path / "m") / WEIGHTS
    again, x = make(num_tasks=2, num_classes=parts.CLASSES, checkpoint_path=str(file)), parts.images("resnet")
    assert torch.equal(parts.logits(again, 1, x), parts.logits(model, 1, x)) and hatcl.tasks(again) == [0, 1]
    with pytest.raises(RuntimeError, match="room for 2 tasks, this one has room for 1; call hatcl.add_tasks"):
        make(num_tasks=1, num_classes=parts.CLASSES, checkpoint_path=str(file))
