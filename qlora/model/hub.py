"""A hub name or a folder becomes a checked local folder. The only user of the network.

What `config.json` and the index already tell against a base (see `base_folder.py`) is said before any weight is
downloaded. A hub revision is resolved to a commit first, so that a run can be repeated; what is already in the hub's
cache serves when the network does not.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from qlora.errors import DataError, ModelError, UserError
from qlora.events import Notice, Progress, Sink
from qlora.model.base_folder import (
    SMALL_FILES,
    BaseFolder,
    check_config,
    check_folder,
    check_model_type,
    load_config,
    refuse_experts,
)
from qlora.model.tensors import PICKLE_ENDINGS, SINGLE_FILE, load_json

WEIGHT_FILES = (SINGLE_FILE, "model-*.safetensors")
ROW_FILES = (".parquet", ".jsonl", ".ndjson", ".json", ".csv", ".tsv")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
_HUB_ROWS = re.compile(r"hub:(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[^:@]+))?(?::(?P<split>[\w.-]+))?")


def resolve(base: str, revision: str, sink: Sink) -> BaseFolder:
    """The checked folder of `base`: an absolute path, or a hub name (`owner/name`) at `revision`.

    Raises ModelError for whatever keeps it from being a base to train on.
    """
    place = Path(base).expanduser()
    if place.is_absolute():
        if not place.is_dir():
            raise ModelError(f"model.base: there is no folder {place}", "correct model.base, or give a hub name")
        return check_folder(place, base, None, sink)
    if not _HUB_NAME.fullmatch(base) or ".." in base:
        what = f"model.base: {base!r} is neither a folder nor a hub name (owner/name)"
        raise ModelError(what, "give the folder's path, or a name as it stands on huggingface.co")
    folder, commit = _download(_Repository(base, revision, "model", (*SMALL_FILES, *WEIGHT_FILES)), sink)
    return check_folder(folder, base, commit, sink)


def resolve_config(base: str, revision: str, sink: Sink) -> dict[str, Any]:
    """The checked `config.json` of `base`: nothing else of it is needed, downloaded or opened.

    Raises ModelError for whatever keeps a model of that configuration from being trained.
    """
    place = Path(base).expanduser()
    if place.is_absolute():
        folder = place
    elif _HUB_NAME.fullmatch(base) and ".." not in base:
        repository = _Repository(base, revision, "model", ("config.json",))
        found = _look_up(repository)
        if isinstance(found, str):
            folder, _ = _cached(repository, found, sink)
        else:
            folder = _first_file(repository, found[0], _fetcher(repository, found[0]), "config.json")
    else:
        what = f"model.base: {base!r} is neither a folder nor a hub name (owner/name)"
        raise ModelError(what, "give the folder's path, or a name as it stands on huggingface.co")
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(f"{base}: there is no config.json in it", "name a folder or hub model that has one")
    config = load_config(file)
    check_config(config, base)
    check_model_type(config, base)
    return config


@dataclass(frozen=True)
class _Repository:
    """A repository of the hub; `kind` is "model" or "dataset", `wanted` the patterns of the files to take."""

    name: str
    revision: str
    kind: str
    wanted: tuple[str, ...]

    def error(self, what: str, hint: str) -> UserError:
        known = ModelError if self.kind == "model" else DataError
        return known(f"{self.name}: {what}", hint)


def _download(repository: _Repository, sink: Sink) -> tuple[Path, str]:
    """A model's snapshot folder and commit. Small files first: most refusals need no weights."""
    found = _look_up(repository)
    if isinstance(found, str):
        return _cached(repository, found, sink)
    commit, files = found
    fetch = _fetcher(repository, commit)
    small = _matching(files, SMALL_FILES)
    if "config.json" not in small:
        raise repository.error("there is no config.json in it", "name a repository that holds a model")
    folder = _first_file(repository, commit, fetch, "config.json")
    config = load_json(folder / "config.json")
    check_config(config, repository.name)
    check_model_type(config, repository.name)
    weights = _matching(files, WEIGHT_FILES)
    if not weights:
        pickles = [file for file in files if file.endswith(PICKLE_ENDINGS)]
        why = f"has its weights as pickle only ({pickles[0]}), which can run code" if pickles else "has no safetensors"
        raise repository.error(why, "use a repository or revision with safetensors weights")
    if SINGLE_FILE in weights:
        weights = {SINGLE_FILE: weights[SINGLE_FILE]}
    for file in small:
        fetch(file)
    refuse_experts(repository.name, folder)
    _fetch_all(fetch, weights, sink)
    return folder, commit


@dataclass(frozen=True)
class HubRows:
    """Downloaded rows: where they lie (a glob), and what they are called with the revision as a commit."""

    pattern: str
    pinned: str


def download_rows(source: str, sink: Sink) -> HubRows:
    """The rows of a data set, `hub:NAME[@revision][:split]`, as a glob over its downloaded files.

    A split (train unless named) is the data files in one folder whose names begin with it. Raises DataError.
    """
    match = _HUB_ROWS.fullmatch(source)
    if match is None:
        what = f"{source}: is not of the form hub:NAME[@revision][:split]"
        raise DataError(what, "for example hub:tatsu-lab/alpaca, or hub:owner/name@main:train")
    split = match["split"] or "train"
    wanted = tuple(f"{place}{split}*{ending}" for place in ("", "*/") for ending in ROW_FILES)
    repository = _Repository(match["name"], match["revision"] or "main", "dataset", wanted)
    found = _look_up(repository)
    if isinstance(found, str):
        folder, commit = _cached(repository, found, sink)
        names = {path.relative_to(folder).as_posix(): 0 for path in folder.rglob("*") if path.is_file()}
        chosen = _one_set(repository, split, names)
    else:
        commit, files = found
        fetch = _fetcher(repository, commit)
        chosen = _one_set(repository, split, files)
        folder = _first_file(repository, commit, fetch, chosen[0])
        _fetch_all(fetch, {name: files[name] for name in chosen}, sink)
    place, ending = Path(chosen[0]).parent, Path(chosen[0]).suffix
    pattern = f"{glob.escape(str(folder / place))}/{split}*{ending}"
    return HubRows(pattern, f"hub:{repository.name}@{commit}:{split}")


def _one_set(repository: _Repository, split: str, files: Mapping[str, int]) -> list[str]:
    """The files of a split: all of one folder and one kind, or else it is not clear which are meant."""
    chosen = sorted(name for name in files if any(fnmatch(name, pattern) for pattern in repository.wanted))
    if not chosen:
        what = f"no file of the split {split!r} as {', '.join(ROW_FILES)}"
        raise repository.error(what, "name another split, or download the rows and give their path")
    kinds = sorted({(str(Path(name).parent), Path(name).suffix) for name in chosen})
    if len(kinds) > 1:
        what = f"the split {split!r} stands in several places ({', '.join(place + '/*' + end for place, end in kinds)})"
        raise repository.error(what, "download the rows and give their path")
    return chosen


def _look_up(repository: _Repository) -> tuple[str, dict[str, int]] | str:
    """The revision's commit and its files with their bytes; or, when the hub cannot be asked, why not."""
    import huggingface_hub as hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

    ask = hub.HfApi().model_info if repository.kind == "model" else hub.HfApi().dataset_info
    try:
        info = ask(repository.name, revision=repository.revision, files_metadata=True)
    except HFValidationError:
        raise repository.error("is no name that the hub allows", "names are owner/name, as on huggingface.co") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status < 500 and status not in (408, 429):
            raise _refused(repository, error) from None
        return f"the hub answers {status}"
    except (OSError, HTTPError):  # no connection, or HF_HUB_OFFLINE
        return "the hub cannot be reached"
    return str(info.sha), {file.rfilename: int(file.size or 0) for file in info.siblings or ()}


def _first_file(repository: _Repository, commit: str, fetch: Callable[..., str], file: str) -> Path:
    """The snapshot's folder. By the revision's own name, so that the cache knows it under that name when offline."""
    path = fetch(file, revision=repository.revision)
    folder = Path(path.removesuffix(file.replace("/", os.sep)))
    if folder.name != commit:
        raise repository.error(f"{repository.revision} was changed at this moment", "run again")
    return folder


def _fetch_all(fetch: Callable[..., str], files: Mapping[str, int], sink: Sink) -> None:
    """Fetches files of known sizes with one progress over all."""
    total, done = sum(files.values()), 0
    for file, file_bytes in files.items():
        fetch(file, lambda read, base=done: sink.emit(Progress("download", min(total, base + read), total, "B")))
        done += file_bytes


def _fetcher(repository: _Repository, commit: str) -> Callable[..., str]:
    import huggingface_hub as hub
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    def fetch(file: str, on_bytes: Callable[[int], None] = lambda _: None, revision: str = commit) -> str:
        try:
            return str(
                hub.hf_hub_download(
                    repository.name, file, repo_type=repository.kind, revision=revision, tqdm_class=_bar(on_bytes)
                )
            )
        except HfHubHTTPError as error:
            raise _refused(repository, error) from None
        except (OSError, HTTPError) as error:
            what = f"{file} could not be downloaded ({type(error).__name__})"
            hint = "check network and free disk, then run again: what has arrived is kept"
            raise repository.error(what, hint) from None

    return fetch


def _bar(on_bytes: Callable[[int], None]) -> type:
    """A progress bar class that draws nothing and tells how many bytes of a file have arrived."""
    from huggingface_hub.utils.tqdm import silent_tqdm

    class Bar(silent_tqdm):  # type: ignore[misc, unused-ignore]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.n = int(kwargs.get("initial") or 0)
            self.total = kwargs.get("total")

        def update(self, n: float | None = 1) -> None:
            self.n += int(n or 0)
            on_bytes(self.n)

        def close(self) -> None:
            """Nothing was drawn."""

    return Bar


def _cached(repository: _Repository, why: str, sink: Sink) -> tuple[Path, str]:
    """The snapshot that an earlier run left in the hub's cache."""
    import huggingface_hub as hub
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        found = hub.snapshot_download(
            repository.name,
            repo_type=repository.kind,
            revision=repository.revision,
            local_files_only=True,
            allow_patterns=list(repository.wanted),
        )
    except (LocalEntryNotFoundError, HFValidationError):
        what = f"{why}, and revision {repository.revision} is not in the cache"
        raise repository.error(what, "connect once to download it, or name a local folder") from None
    folder = Path(found)
    sink.emit(Notice("hub", f"{why}: {repository.name} is taken from the cache, commit {folder.name}"))
    return folder, folder.name


def _refused(repository: _Repository, error: Exception) -> UserError:
    """The hub's refusal in our words: its own messages may carry addresses and headers."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        place = "" if repository.kind == "model" else "datasets/"
        hint = f"accept it on https://huggingface.co/{place}{repository.name}, then run: hf auth login"
        return repository.error("its publisher asks you to accept a licence first", hint)
    if isinstance(error, RevisionNotFoundError):
        return repository.error(f"there is no revision {repository.revision!r}", "correct the revision (main is usual)")
    if isinstance(error, RepositoryNotFoundError):
        hint = f"check the spelling; for a private {repository.kind} run: hf auth login"
        return repository.error(f"the hub has no such {repository.kind}, or it is private", hint)
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", "no status")
    hint = "try again later, or check your token with: hf auth whoami"
    return repository.error(f"the hub refuses it ({status})", hint)


def _matching(files: Mapping[str, int], patterns: tuple[str, ...]) -> dict[str, int]:
    """The files of the top folder that match, sorted."""
    return {file: files[file] for file in sorted(files) if "/" not in file and any(fnmatch(file, p) for p in patterns)}
