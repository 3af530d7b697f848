"""Models on a hub, with a stand-in for its client: hubs cannot be reached from the tests."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path

import huggingface_hub
import parts
import pytest
import timm
import torch
from huggingface_hub import errors

import hatcl

transformers = pytest.importorskip("transformers")  # which looks at the client when it is imported
RESNET = {"num_classes": parts.CLASSES, "channels": (8, 12, 12, 16), "stem_width": 8}


class Hub:
    """Folders by the names of repositories, and what it was asked for. Its signatures are those of huggingface_hub."""

    def __init__(self, root: Path) -> None:
        self.root, self.asked, self.made = root, [], []

    def download(self, *args, **options):
        call = inspect.signature(_DOWNLOAD).bind(*args, **options).arguments
        self.asked.append(call)
        repo = self.root / call["repo_id"]
        if not repo.exists() or call.get("token") == "wrong":
            raise errors.LocalEntryNotFoundError("Cannot find the requested files\nin the cache.")
        if not (repo / call["filename"]).exists():
            raise errors.LocalEntryNotFoundError("no such file")
        return str(repo / call["filename"])

    def client(self, token=None):
        hub = self

        class Client:
            def create_repo(self, *args, **options):
                call = inspect.signature(_CREATE).bind(None, *args, **options).arguments
                hub.made.append({"token": token, **call})
                return huggingface_hub.RepoUrl(f"https://huggingface.co/{call['repo_id']}")

            def upload_folder(self, *args, **options):
                call = inspect.signature(_UPLOAD).bind(None, *args, **options).arguments
                hub.made.append(call)
                shutil.copytree(call["folder_path"], hub.root / call["repo_id"], dirs_exist_ok=True)
                return f"https://huggingface.co/{call['repo_id']}/commit/1"

        return Client()


_DOWNLOAD, _CREATE, _UPLOAD = (
    huggingface_hub.hf_hub_download, huggingface_hub.HfApi.create_repo, huggingface_hub.HfApi.upload_folder,
)  # fmt: skip


@pytest.fixture
def hub(tmp_path, monkeypatch):
    made = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", made.download)
    monkeypatch.setattr(huggingface_hub, "HfApi", made.client)
    monkeypatch.chdir(tmp_path)
    return made


def model_of_timm():
    return parts.pretend(timm.create_model("hat_test_resnet", num_tasks=2, verify=False, **RESNET))


def test_there_and_back(hub):
    model, x = model_of_timm(), parts.images("resnet")
    where = hatcl.push_to_hub(model, "some/model", private=True, token="t", branch="b", commit_message="first")
    assert where == "https://huggingface.co/some/model/commit/1"
    created, uploaded = hub.made
    assert (created["repo_id"], created["token"], created["private"]) == ("some/model", "t", True)
    assert (uploaded["revision"], uploaded["commit_message"], uploaded["repo_type"]) == ("b", "first", "model")
    assert not Path(uploaded["folder_path"]).exists()
    again = hatcl.from_pretrained("some/model", revision="b", token="t", cache_dir="c", local_files_only=True)
    assert torch.equal(parts.logits(again, 1, x), parts.logits(model, 1, x))
    first = hub.asked[0]
    assert (first["filename"], first["revision"], first["token"]) == ("model.safetensors", "b", "t")
    assert first["cache_dir"] == "c" and first["local_files_only"] is True
    assert {call["filename"] for call in hub.asked} == {"model.safetensors", "config.json", "README.md"}


def test_what_cannot_be_saved_is_not_pushed(hub):
    model = model_of_timm()
    with torch.no_grad():
        model.get_submodule("fc").hat_tasks[0]._parameters["bias"].add_(1)
    with pytest.raises(hatcl.IntegrityError):
        hatcl.push_to_hub(model, "some/model")
    with pytest.raises(hatcl.ConfigError, match="card: got task 7, the model has tasks 0 to 1"):
        hatcl.push_to_hub(model_of_timm(), "some/model", card={"names": {7: "x"}})
    assert not hub.made


@pytest.mark.parametrize("name", ["some/model", "model"])
def test_neither_a_folder_nor_a_model(hub, name):
    with pytest.raises(hatcl.IntegrityError, match=(
        f"{name}: there is no such folder here, and no model.safetensors of a model of this name could be had from the "
        r"hub \(LocalEntryNotFoundError: Cannot find the requested files\); is the name right\?"
    )):  # fmt: skip
        hatcl.from_pretrained(name)


@pytest.mark.parametrize("place", ["./some/model", "/no/such/place", "a/b/c", "../m", Path("some/model"), "", "a b"])
def test_what_is_no_name_is_not_looked_for(hub, place):
    with pytest.raises(hatcl.IntegrityError, match="model.safetensors: no such file"):
        hatcl.from_pretrained(place)
    assert not hub.asked


def test_a_folder_comes_first(hub):
    hatcl.save_pretrained(model_of_timm(), "some/model")
    hatcl.from_pretrained("some/model")
    assert not hub.asked
    with pytest.raises(hatcl.ConfigError, match="revision: has no effect on some/model, which is a folder"):
        hatcl.from_pretrained("some/model", revision="x")


def test_a_checksum_is_asked_of_what_the_hub_gives(hub):
    hatcl.save_pretrained(model_of_timm(), hub.root / "some/model")
    with pytest.raises(hatcl.IntegrityError, match="its SHA-256 is"):
        hatcl.from_pretrained("some/model", sha256="0" * 64)
    (hub.root / "some/model/README.md").unlink()  # not every model has one
    (hub.root / "some/model/config.json").unlink()
    assert hatcl.tasks(hatcl.from_pretrained("some/model")) == [0, 1]


def test_a_model_of_transformers_pushes_itself(hub):
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    words = {"input_ids": torch.randint(50, (2, 6))}
    model = hatcl.convert(transformers.BertModel(config), 1, words, verify=False)
    assert model.push_to_hub("some/bert", private=False).endswith("some/bert/commit/1")
    assert type(hatcl.from_pretrained("some/bert")).__name__ == "BertModel"
