"""Models on a hub: download by name and upload, through huggingface_hub."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from ...errors import ConfigError, IntegrityError

NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")  # NAME, or ORGANISATION/NAME


def located(
    place: str | os.PathLike[str],
    file: str,
    others: Collection[str] = (),
    **options: str | bool | os.PathLike[str] | None,
) -> Path:
    """The folder of a model: `place` itself, or huggingface_hub's cache folder with the download of the model of this
    name. The hub is only asked if `place` is a valid name and no existing path.

    Args:
        file: the required file. others: files that are also downloaded if the hub has them.
        options: options of `huggingface_hub.hf_hub_download`: revision, token, cache_dir, local_files_only,
            force_download.

    Raises:
        IntegrityError: there is neither such a folder nor such a model, or it has no such file.
        ConfigError: options of the hub for a folder.
    """
    given: dict[str, Any] = {name: value for name, value in options.items() if value not in (None, False)}
    if not isinstance(place, str) or Path(place).exists() or not NAME.fullmatch(place):
        if given:
            raise ConfigError(
                f"{next(iter(given))}: has no effect on {place}, which is a folder; leave it out, or give the name "
                "of a model on the hub (ORGANISATION/NAME)"
            )
        return Path(place)
    from huggingface_hub import errors, hf_hub_download

    try:
        found = Path(hf_hub_download(place, file, **given))
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError, ValueError) as error:
        raise IntegrityError(
            f"{place}: there is no such folder here, and no {file} of a model of this name could be had from the hub "
            f"({type(error).__name__}: {_first_line(error)}); is the name right? A model that is not public needs a "
            "token, and without a network only what was downloaded before is found"
        ) from error
    for other in others:
        try:
            hf_hub_download(place, other, **given)
        except (errors.EntryNotFoundError, errors.HfHubHTTPError, OSError):  # an optional file
            continue
    return found.parent


def uploaded(
    write: Callable[[Path], Any], repo_id: str, token: str | None, private: bool | None, **options: Any
) -> str:
    """Upload the files that `write` writes into a folder, in one commit, and return the commit's address.

    Args:
        options: options of `huggingface_hub.HfApi.upload_folder`.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))  # first, so that an error comes before anything is created on the hub
        name = api.create_repo(repo_id=repo_id, private=private, exist_ok=True).repo_id
        return str(api.upload_folder(repo_id=name, repo_type="model", folder_path=folder, **options))


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no more is known")
