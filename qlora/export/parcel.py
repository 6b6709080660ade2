"""What a push sends: the files of published folders, each as it was verified, and one model card for all of them.

Texts that we wrote (cards, Modelfile, JSON of ours) are sent in a cleaned copy; any other file in which something of
this machine is found is refused with its name and place. One folder lies at the repository's root as it is. Of
several, models share the root, where the hub and Ollama look for them; an adapter beside a model gets a folder of its
own, since transformers would open it in the model's place.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from qlora import files, foreign_json, manifest, shown
from qlora.errors import ExportError
from qlora.events import Notice, Sink
from qlora.export.cards import EXPORT_FILE, MODEL_FILE, joined_card
from qlora.export.leaks import BLOCK_BYTES, Private, line_of
from qlora.manifest import MANIFEST, Recorded
from qlora.model.adapter_folder import ADAPTER_CONFIG, ADAPTER_FILE, PROVENANCE_FILE
from qlora.outgoing import Outgoing
from qlora.recipe.reading import looks_like_folder
from qlora.run_folder import dataset_name, name_of

CARD = "README.md"
MAX_TEXT_BYTES = 20 << 20
AGAIN = "export it again"
_OURS = (CARD, MODEL_FILE, EXPORT_FILE, PROVENANCE_FILE, ADAPTER_CONFIG)
# Lists of a base's tokens, among which anything may be: what is known is looked for in them, and nothing else.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt")
_TEXT = re.compile(r".*\.(?:json|jinja|txt|md|yaml|yml)|(?:LICENSE|NOTICE)[^/]*|Modelfile[^/]*", re.IGNORECASE)
_COMMIT = re.compile(r"[0-9a-f]{40,64}")


class _Exported(foreign_json.ForeignModel):
    """Of export.json: what it is, and what was verified of it."""

    format: str
    checks: list[dict[str, Any]] = field(default_factory=list)


class _Of(foreign_json.ForeignModel):
    adapter: str = ""
    base: str = ""
    revision: str | None = None


class _Made(foreign_json.ForeignModel):
    of: _Of = field(default_factory=_Of)


@dataclass(frozen=True)
class PublishedFolder:
    """A folder that is pushed: an export, or the adapter of a run. `entries` are its files, as they were published.

    `key` is "hf", "gguf-q8_0", …, "adapter"; `adapter` the run's or adapter's name, `base` its base's, `is_hubs`
    whether the hub has that base.
    """

    path: Path
    key: str
    adapter: str
    base: str
    is_hubs: bool
    entries: Mapping[str, Recorded]

    @classmethod
    def open(cls, path: Path) -> PublishedFolder:
        """By names and sizes; `pack` reads the files. Raises ExportError for what is no verified export, or changed."""
        found = manifest.standing(path, hashes=False)
        if found.whose == "changed":
            raise ExportError(f"{path}: was changed since it was made ({found.why})", AGAIN)
        if found.whose != "ours" or found.kind not in ("export", "adapter"):
            hint = "name an export, such as runs/support/export/hf, or export the run or adapter"
            raise ExportError(f"{path}: is no export that could be pushed", hint)
        try:
            entries = manifest.recorded(path)
            made = foreign_json.checked(_Made, manifest.read(path), str(path / MANIFEST)).of
            if found.kind == "adapter":
                return cls(path, "adapter", dataset_name(name_of(path)), *_base_of_adapter(path), entries)
            exported = foreign_json.checked(
                _Exported, foreign_json.load_object(path / EXPORT_FILE), str(path / EXPORT_FILE)
            )
        except (foreign_json.ForeignFileError, OSError) as error:
            raise ExportError(f"{path}: cannot be read as an export ({error})", AGAIN) from error
        if not exported.checks or not all(check.get("ok") is True for check in exported.checks):
            raise ExportError(f"{path}: was exported without being verified", "export it again, without verify=False")
        return cls(path, exported.format, made.adapter, made.base, made.revision is not None, entries)


class _Provenance(foreign_json.ForeignModel):
    base: str
    revision: str | None = None


def _base_of_adapter(path: Path) -> tuple[str, bool]:
    """Name of an adapter's base, and whether the hub has it: then its revision is a commit. Raises ForeignFileError."""
    if not (path / PROVENANCE_FILE).is_file() or not (path / ADAPTER_FILE).is_file():
        raise foreign_json.ForeignFileError(f"{path}: is no adapter of a run")
    found = foreign_json.checked(
        _Provenance, foreign_json.load_object(path / PROVENANCE_FILE), str(path / PROVENANCE_FILE)
    )
    is_hubs = bool(_COMMIT.fullmatch(found.revision or "")) and not looks_like_folder(found.base)
    return (found.base if is_hubs else Path(found.base).name), is_hubs


def pack(folders: Sequence[PublishedFolder], private: Private, name: str, sink: Sink) -> list[Outgoing]:
    """Every file that is sent, the manifest aside, each read whole and compared with what was published.

    `name` is the repository's. Raises ExportError for a file that has changed, or holds what must not leave.
    """
    found: dict[str, Outgoing] = {}
    cleaned: Counter[str] = Counter()
    parsed: list[tuple[PublishedFolder, str]] = []
    for folder in folders:
        for file, recorded in folder.entries.items():
            place = _place(folder, file, folders)
            if file == CARD and place == CARD:
                text = _read(folder, file, recorded).decode("utf-8", "replace")
                parsed.append((folder, _with_names(text, folder, folders)))
                continue
            item = _outgoing(folder, file, recorded, place, private, cleaned)
            if file == MODEL_FILE and isinstance(item.content, bytes):
                text = item.content.decode("utf-8", "replace")
                item = Outgoing.of_bytes(place, _with_names(text, folder, folders).encode())
            if place in found and found[place].sha256 != item.sha256:
                path = PurePosixPath(place)
                place = str(path.with_name(f"{path.stem}-{folder.key}{path.suffix}"))
                item = replace(item, name=place)
            if (hit := private.in_text(place, homes_too=False, mails_too=True)) is not None:
                raise ExportError(
                    f"{folder.path / file}: its name holds {hit.what}", "rename the run, and export it again"
                )
            found[place] = item
    if parsed:
        card = joined_card([(one.key, text) for one, text in parsed], name, _hub_base(folders))
        if "\nlicense:" not in card.partition("\n---\n")[0]:
            sink.emit(Notice("push", "no licence of the base is known here: the card names none"))
        data = _cleaned(card, private, CARD, cleaned).encode()
        _refuse_bytes(private, parsed[0][0].path / CARD, data)
        found[CARD] = Outgoing.of_bytes(CARD, data)
    if cleaned:
        names = ", ".join(sorted(cleaned))
        what = f"{names}: folders, names and addresses of yours are left out of what is sent"
        sink.emit(Notice("push", what, sum(cleaned.values())))
    return [found[place] for place in sorted(found)]


def _hub_base(folders: Sequence[PublishedFolder]) -> str | None:
    """The base as the card's metadata name it: the hub knows no other than its own."""
    names = {folder.base for folder in folders if folder.is_hubs}
    return names.pop() if len(names) == 1 else None


def _place(folder: PublishedFolder, file: str, folders: Sequence[PublishedFolder]) -> str:
    """A file's name in the repository."""
    if len(folders) == 1:
        return file
    if folder.key == "adapter":
        return f"adapter/{file}"
    shared = sum(file in other.entries for other in folders if other.key != "adapter") > 1
    if shared and file in (EXPORT_FILE, MODEL_FILE):
        path = PurePosixPath(file)
        return f"{path.stem}-{folder.key}{path.suffix}"
    return file


def _with_names(text: str, folder: PublishedFolder, folders: Sequence[PublishedFolder]) -> str:
    """A card or Modelfile with the name that the Modelfile has in the repository."""
    return text.replace(f"-f {MODEL_FILE}", f"-f {_place(folder, MODEL_FILE, folders)}")


def _outgoing(
    folder: PublishedFolder, file: str, recorded: Recorded, place: str, private: Private, cleaned: Counter[str]
) -> Outgoing:
    """One file, checked; of a text of ours the cleaned copy."""
    if file in _OURS:
        data = _of_ours(file, _read(folder, file, recorded), folder, private, cleaned)
        _refuse(private, folder.path / file, data.decode("utf-8", "replace"), True)
        _refuse_bytes(private, folder.path / file, data)
        return Outgoing.of_bytes(place, data)
    path = folder.path / file
    seen: list[tuple[int, ...]] = []
    sha256, size, hit = private.scan(_blocks(path, seen))
    _refuse_changed(path, sha256, size, recorded)
    if hit is not None:
        raise _holds(path, f"{hit.what} at byte {hit.at:,}")
    name = PurePosixPath(file).name
    if _TEXT.fullmatch(name) and name not in _VOCABULARIES and size <= MAX_TEXT_BYTES:
        # What the hub has for everybody may name a home folder that is nobody's here.
        _refuse(private, path, _read(folder, file, recorded).decode("utf-8", "replace"), not folder.is_hubs)
    return Outgoing(place, size, sha256, path, seen[0])


def _of_ours(file: str, data: bytes, folder: PublishedFolder, private: Private, cleaned: Counter[str]) -> bytes:
    if not file.endswith(".json"):
        return _cleaned(data.decode("utf-8", "replace"), private, file, cleaned).encode()
    try:
        value = foreign_json.parse_object(data, str(folder.path / file))
    except foreign_json.ForeignFileError as error:
        raise ExportError(str(error), AGAIN) from error
    if file == ADAPTER_CONFIG:  # whose other texts are names of modules
        told = str(value.get("base_model_name_or_path") or "")
        new = {**value, "base_model_name_or_path": private.clean(Path(told).name if looks_like_folder(told) else told)}
    else:
        new = private.clean_values(value)
    if new == value:
        return data
    cleaned[file] += sum(one != other for one, other in zip(_texts(value), _texts(new), strict=True))
    return (json.dumps(new, indent=2 if file == ADAPTER_CONFIG else 1, ensure_ascii=False) + "\n").encode()


def _cleaned(text: str, private: Private, file: str, cleaned: Counter[str]) -> str:
    lines = text.split("\n")
    new = [private.clean(line) for line in lines]
    if count := sum(one != other for one, other in zip(lines, new, strict=True)):
        cleaned[file] += count
    return "\n".join(new)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)
    elif isinstance(value, str):
        yield value


# --- reading ---------------------------------------------------------------------------------------------------------


def _read(folder: PublishedFolder, file: str, recorded: Recorded) -> bytes:
    path = folder.path / file
    if recorded.bytes > MAX_TEXT_BYTES:
        raise ExportError(f"{path}: is too large for a text ({recorded.bytes:,} bytes)", AGAIN)
    data = b"".join(_blocks(path))
    _refuse_changed(path, Outgoing.of_bytes(file, data).sha256, len(data), recorded)
    return data


def _blocks(path: Path, seen: list[tuple[int, ...]] | None = None) -> Iterator[bytes]:
    """A file's bytes; `seen` gets what it is known again by, as it was before the first of them."""
    try:
        with files.open_to_read(path) as file:
            if seen is not None:
                seen.append(files.state_of(file))
            while block := file.read(BLOCK_BYTES):
                yield block
    except (OSError, files.UnsafePathError) as error:
        raise ExportError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})", AGAIN) from error


def _refuse_changed(path: Path, sha256: str, size: int, recorded: Recorded) -> None:
    if (sha256, size) != tuple(recorded):
        raise ExportError(f"{path}: was changed since it was made (its sha256 differs from the manifest's)", AGAIN)


def _refuse(private: Private, path: Path, text: str, homes_too: bool) -> None:
    if (hit := private.in_text(text, homes_too)) is not None:
        raise _holds(path, f"{hit.what} in line {line_of(text, hit.at)}")


def _refuse_bytes(private: Private, path: Path, data: bytes) -> None:
    """What a text of ours holds in another spelling than the one that is taken out of it."""
    if (hit := private.scan([data])[2]) is not None:
        raise _holds(path, f"{hit.what} at byte {hit.at:,}")


def _holds(path: Path, what: str) -> ExportError:
    hint = f"take it out of the base's or adapter's {shown.one_line(path.name)}, and export again"
    return ExportError(f"{path}: holds {what}, and is not pushed", hint)
