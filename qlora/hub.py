"""The hub: what a repository holds at a revision, and its files in the hub's cache. The only user of the network.

A revision is resolved to a commit first, so that a run can be repeated; what is already in the cache serves when the
network does not. Files are downloaded one by one: `snapshot_download` uses threads, which Ctrl-C has to wait for until
their files are whole, and before huggingface_hub 2 it takes a folder with half of the files for all of them when the
network fails.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qlora.errors import DataError, ExportError, ModelError, UserError, foreign_failures
from qlora.events import Notice, Progress, Sink, Sinks

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?")  # of a name that is pushed to
_MAX_NAME = 96


def cache_folder() -> Path:
    """Where downloaded repositories lie."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def is_name(text: str) -> bool:
    """Whether a repository may be called that: `name` or `owner/name`."""
    return bool(_NAME.fullmatch(text)) and ".." not in text


def check_pushable(name: str) -> None:
    """Whether a repository may be made under that name: `name` or `owner/name`, as huggingface_hub has it.

    Raises ExportError.
    """
    parts = name.split("/")
    plain = len(parts) <= 2 and len(name) <= _MAX_NAME and all(map(_PART.fullmatch, parts))
    if not plain or "--" in name or ".." in name or name.endswith((".git", ".ipynb")):
        hint = "give owner/name, or a name alone: letters, digits and single - . _ inside, 96 in all"
        raise ExportError(f"{name[:120]!r} is no name of a repository", hint)


@dataclass(frozen=True)
class Repository:
    """A repository at a branch, tag or commit."""

    name: str
    revision: str
    kind: Literal["model", "dataset"]

    def error(self, what: str, hint: str) -> UserError:
        """A ModelError or a DataError about this repository."""
        return (ModelError if self.kind == "model" else DataError)(f"{self.name}: {what}", hint)


@dataclass(frozen=True)
class Snapshot:
    """A repository at a commit: its files by name, with their bytes.

    `cached` is the folder that an earlier run has left, where the hub cannot be asked: `files` are those in it.
    """

    repository: Repository
    commit: str
    files: Mapping[str, int]
    cached: Path | None = None

    def fetch(self, files: Sequence[str], sink: Sink | None = None) -> Path:
        """The snapshot's folder with `files` (at least one) in it; `sink` gets one progress in bytes over all of them.

        Raises ModelError or DataError, by the repository's kind, for what cannot be downloaded.
        """
        if self.cached is not None:
            return self.cached
        total, done, folder = sum(self.files.get(file, 0) for file in files), 0, Path()
        say = sink or Sinks()

        def on_bytes(read: int) -> None:
            say.emit(Progress("download", min(total, done + read), total, "B"))

        for file in files:
            # The first by the revision's own name, so that the cache knows it under that name when offline.
            revision = self.commit if done else self.repository.revision
            path = _download(self.repository, file, revision, on_bytes)
            folder = Path(path.removesuffix(file.replace("/", os.sep)))
            if folder.name != self.commit:
                raise self.repository.error(f"{self.repository.revision} was changed at this moment", "run again")
            done += self.files.get(file, 0)
        return folder


def look_up(repository: Repository, wanted: Sequence[str], sink: Sink) -> Snapshot:
    """The revision's commit and its files; where the hub cannot be asked, what the cache has of it.

    `wanted` are patterns of the files that the cache must have. Raises ModelError or DataError, by the repository's
    kind, when the hub refuses, or neither hub nor cache has it.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

    token = huggingface_hub.get_token() or ""
    if not token.isascii() or not token.isprintable():  # it becomes a line of the request's head
        raise repository.error(
            "the hub's token has characters that no token has", "set HF_TOKEN anew, or: hf auth login"
        )
    api = huggingface_hub.HfApi()
    ask = api.model_info if repository.kind == "model" else api.dataset_info
    try:
        info = ask(repository.name, revision=repository.revision, files_metadata=True)
    except HFValidationError:
        raise repository.error("is no name that the hub allows", "names are owner/name, as on huggingface.co") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status < 500 and status not in (408, 429):
            raise _refused(repository, error) from None
        return _cached(repository, wanted, f"the hub answers {status}", sink)
    except (OSError, HTTPError):  # no connection, or HF_HUB_OFFLINE
        return _cached(repository, wanted, "the hub cannot be reached", sink)
    files = {file.rfilename: int(file.size or 0) for file in info.siblings or ()}
    return Snapshot(repository, str(info.sha), files)


def _cached(repository: Repository, wanted: Sequence[str], why: str, sink: Sink) -> Snapshot:
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    place: dict[str, Any] = {"repo_type": repository.kind, "revision": repository.revision}
    try:
        found = huggingface_hub.snapshot_download(
            repository.name, local_files_only=True, allow_patterns=list(wanted), **place
        )
    except (LocalEntryNotFoundError, HFValidationError):
        what = f"{why}, and revision {repository.revision} is not in the cache"
        raise repository.error(what, "connect once to download it, or name a local folder") from None
    folder = Path(found)
    sink.emit(Notice("hub", f"{why}: {repository.name} is taken from the cache, commit {folder.name}"))
    files = {path.relative_to(folder).as_posix(): 0 for path in folder.rglob("*") if path.is_file()}
    return Snapshot(repository, folder.name, files, folder)


def _download(repository: Repository, file: str, revision: str, on_bytes: Callable[[int], None]) -> str:
    """The file's path in the cache; `on_bytes` is called with the bytes that have arrived so far."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    class Bar:
        """What huggingface_hub takes for a progress bar of tqdm."""

        def __init__(self, *_: Any, initial: int = 0, total: float | None = None, **__: Any) -> None:
            self.n, self.total = int(initial or 0), total

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            """Nothing is open."""

        def update(self, n: float | None = 1) -> None:
            self.n += int(n or 0)
            on_bytes(self.n)

        def close(self) -> None:
            """Nothing is open."""

    place: dict[str, Any] = {"repo_type": repository.kind, "revision": revision}
    try:
        return str(huggingface_hub.hf_hub_download(repository.name, file, tqdm_class=Bar, **place))
    except HfHubHTTPError as error:
        raise _refused(repository, error) from None
    except (OSError, HTTPError) as error:
        what = f"{file} could not be downloaded ({type(error).__name__})"
        hint = "check network and free disk, then run again: what has arrived is kept"
        raise repository.error(what, hint) from None


def _refused(repository: Repository, error: Exception) -> UserError:
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
    status = getattr(getattr(error, "response", None), "status_code", "no status")
    hint = "try again later, or check your token with: hf auth whoami"
    return repository.error(f"the hub refuses it ({status})", hint)


@dataclass(frozen=True)
class Reach:
    """Whether the hub answers who we are: its `status`, or None and the class of what failed.

    `token`: "none", "malformed" (it cannot be sent) or "sent". `is_usual`: it is huggingface.co.
    """

    is_usual: bool
    is_offline: bool = False
    token: Literal["none", "malformed", "sent"] = "none"
    status: int | None = None
    failure: str = ""
    seconds: float = 0.0


def reach(seconds: float) -> Reach:
    """Ask the hub who asks, once; each wait may take `seconds`. The answer itself, which holds names, is not read."""
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    usual = constants.ENDPOINT.rstrip("/") == "https://huggingface.co"
    if constants.HF_HUB_OFFLINE:
        return Reach(usual, is_offline=True)
    token = huggingface_hub.get_token() or ""
    if not (token.isascii() and token.isprintable()):
        return Reach(usual, token="malformed")
    sent: Literal["none", "sent"] = "sent" if token else "none"
    head, began = {"authorization": f"Bearer {token}"} if token else {}, time.monotonic()
    url = f"{constants.ENDPOINT}/api/whoami-v2"
    # Any class: what a proxy's or an endpoint's address is made of is judged by libraries below huggingface_hub.
    with (
        foreign_failures(trial=True) as failure,
        get_session().stream("GET", url, headers=head, timeout=seconds) as got,
    ):
        return Reach(usual, token=sent, status=int(got.status_code), seconds=time.monotonic() - began)
    # The error's text may quote a proxy's address with the password in it: of that one word is looked for.
    word = " (certificate)" if "certificate" in str(failure.error).lower() else ""
    return Reach(usual, token=sent, failure=f"{type(failure.error).__name__}{word}")
