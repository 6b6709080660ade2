"""The keys `general.*` of a GGUF file (who made it, of what, under which licence), and its header as bytes.

Every key has one owner: `tokenizer.*` comes from `vocab`, the architecture's own from `architectures`, `general.*` from
here. llama.cpp changes how it splits text when `general.name` holds "phi-3", so that a name taken as it comes could
break a model in silence.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

from qlora import files, shown
from qlora.export.gguf.rope import Key
from qlora.model.base_folder import BaseFolder
from qlora.redaction import redact
from qlora.version import __version__

ALIGNMENT: int = gguf.GGUF_DEFAULT_ALIGNMENT
MAX_CARD_BYTES = 1 << 20
MAX_LICENCE = 500  # characters of a line that names it, or a link to it
_LICENSE = re.compile(r"^license(?P<part>|_name|_link):\s*[\"']?(?P<value>[^\"']+?)[\"']?\s*$")
_SWITCH = re.compile(r"phi-?3", re.IGNORECASE)


class Entry(NamedTuple):
    """One key of a GGUF file: the arguments of GGUFWriter.add_key_value, in its order."""

    key: str
    value: Any
    type: gguf.GGUFValueType
    sub_type: gguf.GGUFValueType | None = None


@dataclass(frozen=True)
class About:
    """What a reader of the file should know, without paths. `base`: a hub name, or the last part of a folder's path;
    `revision`: the hub's commit, "" for a folder; `run`: the run's or adapter's name; `datasets`: names."""

    base: str
    revision: str
    license: Mapping[str, str]  # "", "_name", "_link" to their values in the base's model card
    run: str
    datasets: tuple[str, ...]

    @classmethod
    def of(cls, base: BaseFolder, run: str, datasets: Sequence[str]) -> About:
        return cls(
            shown_name(base), base.commit or "", licence_of(base.path), published(run), tuple(map(published, datasets))
        )


def shown_name(base: BaseFolder) -> str:
    """A base's name as a published file may have it: the hub's, or a folder's without the folders above."""
    return published(base.name if base.commit is not None else Path(base.name).name)


def published(name: str) -> str:
    """A name as any published file may have it: a folder of the user's may be called like a token, or like anything."""
    return shown.one_line(redact(name))


def read_card(folder: Path) -> tuple[str, str]:
    """Header (YAML) and Markdown of a folder's README.md; empty where there is none that is a card: a link out of the
    folder, or more than MAX_CARD_BYTES."""
    try:
        text = files.read_bytes(files.inside(folder, "README.md"), MAX_CARD_BYTES).decode("utf-8", "replace")
    except (OSError, files.UnsafePathError):
        return "", ""
    return split_card(text)


def split_card(text: str) -> tuple[str, str]:
    """Header (YAML) and Markdown of a card's text."""
    if not text.startswith("---"):
        return "", text
    header, _, markdown = text[3:].partition("\n---")
    return header, markdown


def licence_of(folder: Path) -> dict[str, str]:
    """The licence in the header of a folder's card, as the hub's model cards have it; empty when there is none."""
    lines = (line for line in read_card(folder)[0].splitlines() if len(line) < MAX_LICENCE)
    found = ((match["part"], match["value"]) for line in lines if (match := _LICENSE.match(line)))
    return {part: value for part, value in found if value.isprintable()}


def general_keys(about: About, kind: str, strips_after_specials: bool = False) -> list[Key]:
    """`general.*` of a file of `kind` "model" or "adapter".

    `strips_after_specials`: the tokenizer swallows blanks after special tokens, as Phi-3's does. llama.cpp has no key
    for that and goes by the name.
    """
    base_title = Path(about.base).name
    title = f"{base_title} {about.run}".strip()
    if strips_after_specials:
        title = title if _SWITCH.search(title) else f"{title} (Phi-3 tokenizer)"
    else:
        title = _SWITCH.sub(lambda match: f"{match[0][:3]} 3", title)
    keys: list[Key] = [
        ("general.type", kind),
        ("general.name", title),
        ("general.finetune", about.run),
        ("general.quantized_by", f"qlora {__version__}"),
        ("general.description", f"{base_title} with a LoRA adapter, trained by QLoRA"),
    ]
    keys += [(f"general.license{part.replace('_', '.')}", value) for part, value in about.license.items()]
    keys += [("general.base_model.count", 1), ("general.base_model.0.name", base_title)]
    if "/" in about.base:  # a name of the hub
        keys.append(("general.base_model.0.organization", about.base.split("/")[0]))
        keys.append(("general.base_model.0.repo_url", f"https://huggingface.co/{about.base}"))
    if about.revision:
        keys.append(("general.base_model.0.version", about.revision))
    if about.datasets:
        keys.append(("general.dataset.count", len(about.datasets)))
        keys += [(f"general.dataset.{i}.name", name) for i, name in enumerate(about.datasets)]
    return keys


def entries(keys: Sequence[Key]) -> list[Entry]:
    """Keys with the type that llama.cpp reads: counts are unsigned, token types are not. Empty texts are left out."""
    return [_entry(key, value) for key, value in keys if value != ""]


def _entry(key: str, value: Any) -> Entry:
    kinds = gguf.GGUFValueType
    if isinstance(value, list):
        inner = kinds.INT32 if key == "tokenizer.ggml.token_type" else _entry("", value[0]).type
        return Entry(key, value, kinds.ARRAY, inner)
    if isinstance(value, bool):
        return Entry(key, value, kinds.BOOL)
    if isinstance(value, int):
        return Entry(key, value, kinds.UINT32)
    return Entry(key, value, kinds.FLOAT32 if isinstance(value, float) else kinds.STRING)


def header(
    arch: str, keys: Sequence[Entry], tensors: Sequence[tuple[str, tuple[int, ...], gguf.GGMLQuantizationType]]
) -> bytes:
    """Everything before the weights, padded: magic, keys, and name, shape, type and place of each tensor.

    The bytes depend on the arguments alone, so that an interrupted file can be continued.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "header"
        writer = gguf.GGUFWriter(path, arch)
        for entry in keys:
            writer.add_key_value(*entry)
        for name, shape, kind in tensors:
            # The writer takes a quantized tensor's shape in bytes.
            in_bytes = gguf.quant_shape_to_byte_shape(shape, kind)
            writer.add_tensor_info(name, in_bytes, np.dtype(np.uint8), math.prod(in_bytes), kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        return padded(path.read_bytes())


def padded(content: bytes) -> bytes:
    """Bytes of a file up to where the next tensor may begin."""
    return content + bytes(-len(content) % ALIGNMENT)
