"""A hub name or a folder becomes a checked local folder.

What `config.json` and the index already show against a base (see `base_folder.py`) is reported before any weight is
downloaded.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from qlora import files, hub, windows_paths
from qlora.errors import ModelError
from qlora.events import Sink
from qlora.model.base_folder import (
    SMALL_FILES,
    BaseFolder,
    check_config,
    check_folder,
    check_model_type,
    load_config,
)
from qlora.model.tensors import PICKLE_ENDINGS, SINGLE_FILE

CONFIG_FILE = "config.json"
WEIGHT_FILES = (SINGLE_FILE, "model-*.safetensors")


def resolve(base: str, revision: str, sink: Sink) -> BaseFolder:
    """The checked folder of `base`: an absolute path, or a hub name (`owner/name`) at `revision`.

    Raises ModelError for whatever keeps it from being a base to train on.
    """
    if (folder := _local_folder(base)) is not None:
        if not folder.is_dir():
            hint = windows_paths.how_to_write(folder) or "correct model.base, or give a hub name"
            raise ModelError(f"model.base: there is no folder {folder}", hint)
        return check_folder(folder, base, None, sink)
    snapshot = hub.look_up(hub.Repository(base, revision, "model"), (*SMALL_FILES, *WEIGHT_FILES), sink)
    return check_folder(snapshot.cached or _download(snapshot, sink), base, snapshot.commit, sink)


def resolve_config(base: str, revision: str, sink: Sink) -> dict[str, Any]:
    """The checked `config.json` of `base`: nothing else of it is needed, downloaded or opened.

    Raises ModelError for whatever keeps a model of that configuration from being trained.
    """
    return config_in(small_files(base, revision, sink, (CONFIG_FILE,)), base)


def small_files(base: str, revision: str, sink: Sink, wanted: tuple[str, ...] = SMALL_FILES) -> Path:
    """The folder with those of the base's files that match `wanted`; of the hub, nothing else is downloaded."""
    if (folder := _local_folder(base)) is not None:
        return folder
    snapshot = hub.look_up(hub.Repository(base, revision, "model"), wanted, sink)
    return snapshot.fetch(_matching(snapshot.files, wanted) or [CONFIG_FILE])


def config_in(folder: Path, base: str) -> dict[str, Any]:
    """The `config.json` of the base in a folder. Raises ModelError as `resolve_config` does."""
    if not (folder / CONFIG_FILE).is_file():
        raise ModelError(f"{base}: there is no config.json in it", "name a folder or hub model that has one")
    config = load_config(folder / CONFIG_FILE)
    check_config(config, base)
    check_model_type(config, base)
    return config


def _local_folder(base: str) -> Path | None:
    """The folder that `base` names, there or not; None for a hub name. Raises ModelError for what is neither."""
    if base.startswith("~") or Path(base).is_absolute():
        return files.user_path(base, "model.base")
    if not hub.is_name(base):
        what = f"model.base: {base!r} is neither a folder nor a hub name (owner/name)"
        raise ModelError(what, "give the folder's path, or a name as it stands on huggingface.co")
    return None


def _download(snapshot: hub.Snapshot, sink: Sink) -> Path:
    """The model's files. Small ones first: most refusals need no weights."""
    repository = snapshot.repository
    small = _matching(snapshot.files, SMALL_FILES)
    if CONFIG_FILE not in small:
        raise repository.error("there is no config.json in it", "name a repository that holds a model")
    folder = snapshot.fetch((CONFIG_FILE,))
    config = load_config(folder / CONFIG_FILE)
    check_config(config, repository.name)
    check_model_type(config, repository.name)
    weights = _matching(snapshot.files, WEIGHT_FILES)
    if not weights:
        pickles = [file for file in snapshot.files if file.endswith(PICKLE_ENDINGS)]
        why = f"has its weights as pickle only ({pickles[0]}), which can run code" if pickles else "has no safetensors"
        raise repository.error(why, "use a repository or revision with safetensors weights")
    snapshot.fetch(small)
    return snapshot.fetch([SINGLE_FILE] if SINGLE_FILE in weights else weights, sink)


def _matching(files: Iterable[str], patterns: tuple[str, ...]) -> list[str]:
    """The files of the top folder that match, sorted."""
    return sorted(file for file in files if "/" not in file and any(fnmatch(file, pattern) for pattern in patterns))
