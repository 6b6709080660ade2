"""The files of a tokenizer: read once, checked, kept in memory, and from then on what a run or an export works with.

A run takes them from its base when it begins (`RUN/tokenizer/`, with a manifest) and delivers them with its adapter,
whatever becomes of the base meanwhile. Libraries open a tokenizer in a private copy (`placed`), never in a stranger's
folder.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from qlora import disk, files, foreign_json, manifest
from qlora.errors import RunFolderError, TokenizerError
from qlora.events import Notice, Sink
from qlora.foreign_json import ForeignFileError
from qlora.manifest import Recorded
from qlora.model.base_folder import MAX_SMALL_BYTES

# Delivered as they are: transformers 5 rewrites tokenizer files so that other tools cannot read them (tokenizer.model
# is dropped, the class becomes one that 4.x refuses).
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
)
CONFIG, TOKENIZER_CONFIG, TEMPLATE = "config.json", "tokenizer_config.json", "chat_template.jinja"
# What transformers 5 reads beside them: the model's configuration (it names the tokenizer's class, and the version that
# wrote it), vocabularies of other names (VOCAB_FILES_NAMES of its tokenizers), and files for its own versions.
_READ_BESIDE = (
    *(CONFIG, "vocab.txt", "spiece.model", "*.bpe.model", "bpe.codes", "sentencepiece.model", "tekken.json"),
    *("*.tiktoken", "tokenizer.*.json"),
)
FOLDER = "tokenizer"  # in a run's folder
NAMED_TEMPLATES = "additional_chat_templates"  # a folder: one chat template for each name
_MAX_TEMPLATES = 64
# Where transformers before version 5 noted what a configuration or a tokenizer was loaded from.
_WHERE_FROM = ("_name_or_path", "name_or_path", "tokenizer_file", "special_tokens_map_file")
_CLEAN_COPY = "get a clean copy of the model"


@dataclass(frozen=True)
class TokenizerFiles:
    """What is in a tokenizer's files, by their names; the model's config.json is among them where there is one."""

    content: Mapping[str, bytes]

    @property
    def fingerprint(self) -> str:
        """sha256 over names and contents of what is delivered: what the tokens of a row depend on."""
        present = [name for name in TOKENIZER_FILES if name in self.content]
        hashed = ((name, hashlib.sha256(self.content[name]).hexdigest()) for name in present)
        return disk.sha256_text(*(part for pair in hashed for part in pair))

    @property
    def embedding_rows(self) -> int | None:
        """Rows of the model's embedding as its config.json has them; None where it leaves that to its class."""
        config = self.json_object(CONFIG)
        text = config.get("text_config")
        rows = (text if isinstance(text, dict) else config).get("vocab_size")
        return rows if type(rows) is int else None

    def json_object(self, name: str) -> dict[str, Any]:
        """A JSON file among them; {} where it is not there or no object: the library that opens it says so."""
        try:
            return foreign_json.parse_object(self.content.get(name, b"{}"), name)
        except ForeignFileError:
            return {}

    @property
    def has_template(self) -> bool:
        """Whether a chat template stands in one of the three places that transformers reads."""
        if "chat_template.jinja" in self.content or "chat_template.json" in self.content:
            return True
        return b'"chat_template"' in self.content.get(TOKENIZER_CONFIG, b"")

    @property
    def complete(self) -> bool:
        """Whether they are a tokenizer: an adapter's folder may have none, and the base's is meant then."""
        return TOKENIZER_CONFIG in self.content

    def beside(self, base: Path) -> TokenizerFiles:
        """The same, with the model's configuration out of the folder `base` where it is not among them."""
        if CONFIG in self.content:
            return self
        return TokenizerFiles({**self.content, **_read(base, (CONFIG,))})

    def write(self, folder: Path) -> None:
        """Every file into `folder`, which is ours, byte for byte."""
        for name, data in self.content.items():
            (folder / name).parent.mkdir(exist_ok=True)
            with files.open_to_write(folder / name, "replace") as file:
                files.write_all(file, data)

    def deliver(self, folder: Path) -> None:
        """What others need of them, without paths of this machine."""
        for name in TOKENIZER_FILES:
            if name in self.content:
                data = self.content[name]
                (folder / name).write_bytes(_without_paths(data) if name == TOKENIZER_CONFIG else data)

    @contextmanager
    def placed(self) -> Iterator[Path]:
        """A private folder that holds them for the time of the block."""
        with tempfile.TemporaryDirectory(prefix="qlora-tokenizer-") as name:
            self.write(Path(name))
            yield Path(name)


def read_files(folder: Path) -> TokenizerFiles:
    """The tokenizer files of a base's or an adapter's folder, each read once and never through a link out of it.

    Raises TokenizerError for what is no plain file of that folder, or over MAX_SMALL_BYTES.
    """
    try:
        there = sorted(path.name for path in folder.iterdir())
        wanted = (*TOKENIZER_FILES, *_READ_BESIDE)
        names = [name for name in there if any(fnmatch(name, pattern) for pattern in wanted)]
        if NAMED_TEMPLATES in there:
            found = sorted(path.name for path in files.inside(folder, NAMED_TEMPLATES).glob("*.jinja"))
            if len(found) > _MAX_TEMPLATES:
                place = folder / NAMED_TEMPLATES
                what = f"{place}: {len(found):,} chat templates are too many (at most {_MAX_TEMPLATES})"
                raise TokenizerError(what, _CLEAN_COPY)
            names += [f"{NAMED_TEMPLATES}/{name}" for name in found]
        return TokenizerFiles(_read(folder, names))
    except (OSError, files.UnsafePathError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise TokenizerError(f"{folder}: its tokenizer cannot be read ({why})", _CLEAN_COPY) from error


def of_run(run_dir: Path, sink: Sink) -> TokenizerFiles | None:
    """What a run took from its base when it began; None for runs of older versions, and, with a notice, where it is
    damaged.
    """
    folder = run_dir / FOLDER
    if not folder.is_dir():
        return None
    try:
        recorded, found = manifest.recorded(folder), read_files(folder)
        there = {name: Recorded(hashlib.sha256(data).hexdigest(), len(data)) for name, data in found.content.items()}
        if there == recorded:
            return found
        changed = min(name for name in there.keys() | recorded.keys() if there.get(name) != recorded.get(name))
        fault = f"{changed} is not as it was written"
    except (OSError, ValueError, TokenizerError) as error:
        fault = str(error)
    sink.emit(Notice("tokenizer", f"{folder} is damaged ({fault}): the base's own tokenizer is used"))
    return None


def take(
    run_dir: Path, base: Path, resumed: bool, sink: Sink, choose: Callable[[TokenizerFiles], TokenizerFiles]
) -> TokenizerFiles:
    """The tokenizer that a run works with, read from the base in the folder `base` and kept in the run's.

    `choose` gives the files their chat template. A resumed run goes on with what it took when it began, and says so
    where it would be another one now. Raises TokenizerError for the base's files, RunFolderError where the copy cannot
    be written, and what `choose` raises.
    """
    found = read_files(base)
    if resumed and (kept := of_run(run_dir, sink)) is not None:
        goes_on = "the run goes on with its own copy"
        try:
            if kept.fingerprint != choose(found).fingerprint:
                of_what = "chat template" if _but_for_template(kept) == _but_for_template(found) else "tokenizer"
                message = f"the {of_what} in {base} has changed since this run began; {goes_on}"
                sink.emit(Notice("tokenizer", message))
        except TokenizerError as error:
            sink.emit(Notice("tokenizer", f"{error.what}; {goes_on}"))
        return kept
    found = choose(found)
    try:
        disk.publish_folder(run_dir / FOLDER, found.write, {"kind": "tokenizer"})
    except OSError as error:
        what = f"{run_dir / FOLDER}: cannot be written ({error.strerror or error})"
        raise RunFolderError(what, "free some space there, or name another folder in output.dir") from error
    return found


def _but_for_template(found: TokenizerFiles) -> dict[str, bytes]:
    """What tokens are made by."""
    places = (TOKENIZER_CONFIG, TEMPLATE, "chat_template.json", CONFIG)
    return {name: data for name, data in found.content.items() if name not in places}


def of_export(base: Path, adapter: Path) -> TokenizerFiles:
    """The tokenizer that an adapter was trained with: its own, or the base's where it brings none."""
    own = read_files(adapter)
    return own.beside(base) if own.complete else read_files(base)


def without_paths(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without the notes on where a machine had the files, which nothing reads."""

    def is_path(value: Any) -> bool:
        """A name of the hub's is one or two words."""
        if not isinstance(value, str):
            return False
        return value.startswith(("/", "~", ".")) or value.count("/") > 1 or "\\" in value or ":" in value[:2]

    def cleaned(value: Any) -> Any:
        # A model of several parts has a configuration in its own for each.
        return without_paths(value) if isinstance(value, dict) else value

    return {key: cleaned(value) for key, value in config.items() if key not in _WHERE_FROM or not is_path(value)}


def _without_paths(text: bytes) -> bytes:
    """A tokenizer_config.json as it goes out: byte for byte where no path stands in it."""
    try:
        config = foreign_json.parse(text, "tokenizer_config.json")
    except ForeignFileError:
        return text  # the library that opened it has not read it either
    if not isinstance(config, dict) or (cleaned := without_paths(config)) == config:
        return text
    return (json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n").encode()


def _read(folder: Path, names: tuple[str, ...] | list[str]) -> dict[str, bytes]:
    places = {name: files.inside(folder, name) for name in names}
    return {name: files.read_bytes(path, MAX_SMALL_BYTES) for name, path in places.items() if path.is_file()}
