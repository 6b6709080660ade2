"""A hub name or a folder becomes a checked local folder. The only user of the network.

What is refused is refused here, from `config.json` and the headers of the weights, before any weight is read (and, for
a hub name, before any is downloaded): pickles, weights that another tool has quantized, fused experts, models that are
not causal, and configurations that try to choose code. A hub revision is resolved to a commit first, so that a run can
be repeated; what is already in the hub's cache serves when the network does not.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from qlora.disk import inside, sha256_text
from qlora.errors import DataError, ModelError, UserError
from qlora.events import Notice, Progress, Sink
from qlora.model.tensors import (
    FLOAT_DTYPES,
    INDEX_FILE,
    PICKLE_ENDINGS,
    PICKLE_MAGICS,
    SINGLE_FILE,
    TensorEntry,
    find_tensors,
    load_json,
    read_index,
)

__all__ = ["BaseFolder", "TensorEntry", "download_rows", "resolve"]

# Everything a base needs and nothing that could run.
SMALL_FILES = ("*.json", "tokenizer.model", "*.txt", "*.jinja", "tekken.json", "*.tiktoken")
COPIED_FILES = ("LICENSE*", "NOTICE*")  # into what is made of a base
WEIGHT_FILES = (SINGLE_FILE, "model-*.safetensors")
ROW_FILES = (".parquet", ".jsonl", ".ndjson", ".json", ".csv", ".tsv")
MAX_CONFIG_BYTES = 10_000_000

# Keys by which a configuration has chosen code (CVE-2026-4372, CVE-2026-5241, CVE-2025-23304; Hydra's, Lightning's and
# jsonpickle's ways to name a class, and Python's own).
FORBIDDEN_KEYS = (
    *("trust_remote_code", "_attn_implementation_internal", "_experts_implementation_internal"),
    *("_target_", "_partial_", "_class_path", "class_path", "_instantiator", "_convert_", "custom_pipelines"),
    *("py/object", "py/reduce", "py/function", "py/type", "__class__", "__reduce__", "__setstate__", "__import__"),
)
# How attention is computed may be named in a configuration (and is ignored), but not as a repository of kernels.
IMPLEMENTATION_KEYS = ("attn_implementation", "_attn_implementation", "experts_implementation")
LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
# The largest tokenizer known to us (Gemma 3) has 33 MB, the largest merges.txt 2 MB.
MAX_SMALL_BYTES = 256_000_000
CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
_HUB_ROWS = re.compile(r"hub:(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[^:@]+))?(?::(?P<split>[\w.-]+))?")
_EXPERTS = re.compile(r"(^|\.)(experts|block_sparse_moe)\.")
_FROM_ITS_PUBLISHER = "do not use this copy; get the model from its original publisher"
_NAME_THE_ORIGINAL = "name the original model, with 16-bit weights: it is quantized while it is loaded"


@dataclass(frozen=True)
class BaseFolder:
    """A base whose files have been checked.

    name         as the recipe says it
    commit       the hub's commit, None for a folder
    config       config.json
    tensors      every tensor of the checkpoint by its name there
    fingerprint  sha256 of config, tensor names, dtypes, shapes and file sizes: cheap, and other weights rarely share it
    """

    path: Path
    name: str
    commit: str | None
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]
    fingerprint: str

    @property
    def stored_4bit(self) -> bool:
        """Whether bitsandbytes' 4-bit weights are stored in it."""
        return any(".quant_state.bitsandbytes__" in name for name in self.tensors)


def resolve(base: str, revision: str, sink: Sink) -> BaseFolder:
    """The checked folder of `base`: an absolute path, or a hub name (`owner/name`) at `revision`.

    Raises ModelError for whatever keeps it from being a base to train on.
    """
    place = Path(base).expanduser()
    if place.is_absolute():
        if not place.is_dir():
            raise ModelError(f"model.base: there is no folder {place}", "correct model.base, or give a hub name")
        return _check_folder(place, base, None, sink)
    if not _HUB_NAME.fullmatch(base) or ".." in base:
        what = f"model.base: {base!r} is neither a folder nor a hub name (owner/name)"
        raise ModelError(what, "give the folder's path, or a name as it stands on huggingface.co")
    folder, commit = _download(_Repository(base, revision, "model", (*SMALL_FILES, *WEIGHT_FILES)), sink)
    return _check_folder(folder, base, commit, sink)


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
    if file.stat().st_size > MAX_CONFIG_BYTES:
        raise ModelError(f"{file}: {file.stat().st_size:,} bytes", "get a clean copy of the model")
    config = load_json(file)
    check_config(config, base)
    check_model_type(config, base)
    return config


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Raises ModelError when a model with this configuration cannot be trained here, and says why."""
    for key, value in _walk(config):
        names_code = key in IMPLEMENTATION_KEYS and "/" in str(value)
        if key in FORBIDDEN_KEYS or names_code:
            what = f"{where}: the configuration holds {key!r}, which chooses code to run"
            raise ModelError(what, _FROM_ITS_PUBLISHER)
    _check_quantization(config, where)


def check_model_type(config: Mapping[str, Any], where: str) -> None:
    """Raises ModelError when transformers knows no causal model of this kind. The slowest check, so the last."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING_NAMES:
        own_code = "; the code in its folder (auto_map) is never run" if "auto_map" in config else ""
        what = f"{where}: model_type {model_type!r} is not known to the installed transformers{own_code}"
        raise ModelError(what, "use a model that transformers supports by itself, or a newer transformers")
    text = _text_section(config)
    if config.get("is_encoder_decoder") or text.get("is_encoder_decoder"):
        what = f"{where}: {model_type} is an encoder-decoder, not a causal language model"
        raise ModelError(what, "use a decoder-only model, such as Llama, Qwen, Gemma or Mistral")
    named = config.get("architectures") or ()
    kinds = [str(kind) for kind in named] if isinstance(named, list | tuple) else [str(named)]
    causal = not kinds or any(kind.endswith(CAUSAL_ENDINGS) for kind in kinds)
    if not causal or str(text.get("model_type", model_type)) not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        what = f"{where}: {kinds[0] if kinds else model_type} is not a causal language model"
        raise ModelError(what, "use a model that predicts the next token (…ForCausalLM)")


def _check_quantization(config: Mapping[str, Any], where: str) -> None:
    stored = config.get("quantization_config") or _text_section(config).get("quantization_config")
    if not stored:
        return
    method = str(stored.get("quant_method", "bitsandbytes")) if isinstance(stored, dict) else str(stored)
    if method == "bitsandbytes" and isinstance(stored, dict) and stored.get("load_in_4bit"):
        return
    if method == "bitsandbytes":
        method = "bitsandbytes 8-bit"
    raise ModelError(f"{where}: its weights are already quantized ({method})", _NAME_THE_ORIGINAL)


def _check_folder(folder: Path, name: str, commit: str | None, sink: Sink) -> BaseFolder:
    config_file = folder / "config.json"
    if not config_file.is_file():
        adapter = (folder / "adapter_config.json").is_file()
        what = f"{name}: is an adapter, not a base" if adapter else f"{name}: there is no config.json in it"
        raise ModelError(what, "name the folder or hub model that holds the whole base")
    check_entries(folder)
    if config_file.stat().st_size > MAX_CONFIG_BYTES:
        raise ModelError(f"{config_file}: {config_file.stat().st_size:,} bytes", "get a clean copy of the model")
    config = load_json(config_file)
    check_config(config, name)
    check_tokenizer_config(folder)
    tensors = find_tensors(folder)
    _check_sizes(config, len(tensors), name)
    _check_tensors(tensors, name)
    check_model_type(config, name)
    if "auto_map" in config:
        sink.emit(Notice("model", f"{name} carries its own code; it is never run, transformers' own model is used"))
    sizes = sorted({(entry.file.name, entry.file.stat().st_size) for entry in tensors.values()})
    fingerprint = sha256_text(
        json.dumps(config, sort_keys=True),
        json.dumps([(key, entry.dtype, entry.shape) for key, entry in tensors.items()]),
        json.dumps(sizes),
    )
    return BaseFolder(folder, name, commit, config, tensors, fingerprint)


def _check_sizes(config: Mapping[str, Any], tensor_count: int, where: str) -> None:
    """Raises ModelError for layers without tensors: a billion of them would be built one by one, for days."""
    for key in LAYER_COUNTS:
        layers = _text_section(config).get(key)
        if isinstance(layers, int) and layers > tensor_count:
            what = f"{where}: config.json tells of {layers:,} layers, but the weights are {tensor_count:,} tensors"
            raise ModelError(what, "config.json and weights are of different models; get a clean copy")


def check_entries(folder: Path) -> None:
    """Raises ModelError for an entry of a stranger's folder that is not what its name says.

    A pipe or device under a file's name would block whoever opens it, and a link out of the folder would carry a
    file of this machine into the adapter that is made of it. Weights are bounded by their own headers.
    """
    for path in sorted(folder.iterdir()):
        known = any(fnmatch(path.name, pattern) for pattern in (*SMALL_FILES, *COPIED_FILES, "*.safetensors"))
        if not known:
            continue  # nothing here opens it
        try:
            inside(folder, path.name)
        except ValueError as error:
            raise ModelError(f"{folder}: {error}", _FROM_ITS_PUBLISHER) from error
        if path.is_file() and path.suffix != ".safetensors" and path.stat().st_size > MAX_SMALL_BYTES:
            what = f"{path}: {path.stat().st_size:,} bytes are too many for a file of its kind"
            raise ModelError(what, _FROM_ITS_PUBLISHER)


def check_tokenizer_config(folder: Path) -> None:
    """Raises ModelError where a tokenizer's configuration tries to choose code. Code of its own is never run."""
    for name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        file = folder / name
        if file.is_file():
            check_config({**load_json(file), "quantization_config": None}, name)
    if (folder / "tokenizer.json").is_file() and _magic(folder / "tokenizer.json") in PICKLE_MAGICS:
        what = f"{folder / 'tokenizer.json'}: is a pickle under another name, and pickles are never opened"
        raise ModelError(what, _FROM_ITS_PUBLISHER)


def _magic(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(2)


def _check_tensors(tensors: Mapping[str, TensorEntry], where: str) -> None:
    if experts := [entry for key, entry in tensors.items() if _EXPERTS.search(key)]:
        values = sum(entry.numel for entry in experts)
        raise _experts_error(where, f"{values * 2 / 2**30:.2f} GiB in 16 bit")
    for name, entry in tensors.items():
        if entry.dtype.startswith("F8") or entry.dtype in ("F4", "F6_E2M3", "F6_E3M2"):
            raise ModelError(f"{where}: {name} is stored in {entry.dtype}", _NAME_THE_ORIGINAL)
        if name.endswith((".qweight", ".weight_packed", ".g_idx", ".qzeros", ".SCB")):
            raise ModelError(f"{where}: its weights are already quantized ({name})", _NAME_THE_ORIGINAL)
        in_4bit = any(f"{name}.quant_state.bitsandbytes__{kind}" in tensors for kind in ("nf4", "fp4"))
        if name.endswith(".weight") and entry.dtype not in FLOAT_DTYPES and not in_4bit:
            raise ModelError(f"{where}: {name} is stored in {entry.dtype}", _NAME_THE_ORIGINAL)


def _experts_error(where: str, size: str) -> ModelError:
    what = f"{where}: a mixture of experts; its fused experts ({size}) cannot be held in 4 bit yet"
    return ModelError(what, "use a dense model of the size you need")


def _text_section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key of a JSON value at any depth. Not recursive: depth is the file's choice."""
    waiting = [value]
    while waiting:
        current = waiting.pop()
        if isinstance(current, dict):
            yield from current.items()
            waiting.extend(current.values())
        elif isinstance(current, list):
            waiting.extend(current)


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
    _refuse_experts(repository.name, folder)
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
            pass

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


def _refuse_experts(name: str, folder: Path) -> None:
    """Refuses fused experts by the index alone, before the weights are downloaded."""
    index = folder / INDEX_FILE
    if index.is_file() and any(_EXPERTS.search(key) for key in read_index(index)):
        metadata = load_json(index).get("metadata")
        total = metadata.get("total_size") if isinstance(metadata, dict) else None
        size = f"{total / 2**30:.1f} GiB with the rest of the model" if isinstance(total, int) else "of unknown size"
        raise _experts_error(name, size)


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
