"""A folder with a base in it, and what is refused of one, before any weight is read.

`config.json` and the headers of the weights show all of it: pickles, weights that another tool has quantized (but for
experts in MXFP4, which are held so), experts in code of their own, models that are not causal, and configurations that
try to choose code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from qlora import files
from qlora.collections_off import without_collections
from qlora.disk import sha256_text
from qlora.errors import ModelError
from qlora.events import Notice, Sink
from qlora.model import mxfp4_config
from qlora.model.alternatives import text_model_like
from qlora.model.config_bounds import check_config_values, check_generation_values, check_layers_exist
from qlora.model.mixtures import refuse_mixture
from qlora.model.tensors import (
    FLOAT_DTYPES,
    PICKLE_MAGICS,
    TensorEntry,
    find_tensors,
    load_json,
)

# Everything a base needs and nothing that could run.
SMALL_FILES = ("*.json", "tokenizer.model", "*.txt", "*.jinja", "tekken.json", "*.tiktoken")
COPIED_FILES = ("LICENSE*", "NOTICE*")  # into what is made of a base
_TEMPLATES_FOLDER = "additional_chat_templates"  # the one folder in a base that transformers looks into
MAX_TOKENIZER_BYTES = 32_000_000  # of its configuration: 1.2 MB is the largest known to us

# Keys by which a configuration has chosen code (CVE-2026-4372, CVE-2026-5241, CVE-2025-23304; Hydra's, Lightning's and
# jsonpickle's ways to name a class, and Python's own).
FORBIDDEN_KEYS = (
    *("trust_remote_code", "_attn_implementation_internal", "_experts_implementation_internal"),
    *("_target_", "_partial_", "_class_path", "class_path", "_instantiator", "_convert_", "custom_pipelines"),
    *("py/object", "py/reduce", "py/function", "py/type", "__class__", "__reduce__", "__setstate__", "__import__"),
)
# How attention is computed may be named in a configuration (and is ignored), but not as a repository of kernels.
IMPLEMENTATION_KEYS = ("attn_implementation", "_attn_implementation", "experts_implementation")
# The largest tokenizer known to us (Gemma 3) has 33 MB, the largest merges.txt 2 MB.
MAX_SMALL_BYTES = 256_000_000
CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_OF_LINKS = "if the links are yours, put the files themselves there (cp -RL); if not, get the model from its publisher"
_FROM_ITS_PUBLISHER = "do not use this copy; get the model from its original publisher"
# What quantized copies add to their original's name: Qwen3-8B-FP8, Llama-3-8B-GPTQ-Int4, gemma-3-4b-quantized.w4a16
_QUANTIZED_NAME = re.compile(
    r"([-_.](bnb|gptq|awq|fp8|nvfp4|mxfp4|int[348]|[348]-?bits?|w\d+a\d+|aqlm|hqq|quanto|eetq|higgs|modelopt"
    r"|fp4|fbgemm|marlin|exl[23]|autoround|auto-?round|dynamic|kv|block|g\d+|\d+g|quantized|quant|sym|mlx|torchao))+$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class BaseFolder:
    """A base whose files have been checked.

    name         as the recipe gives it
    commit       the hub's commit, None for a folder
    config       config.json
    tensors      every tensor of the checkpoint by its name there
    fingerprint  sha256 of config, tensor names, dtypes, shapes and file sizes: all that older runs know of their base,
                 and two fine-tunes of one model share it (see `identity`)
    cache        whether it may be kept in 4 bit in the cache (memory.cache)
    """

    path: Path
    name: str
    commit: str | None
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]
    fingerprint: str
    cache: Literal["auto"] | bool = "auto"

    @property
    def stored_4bit(self) -> bool:
        """Whether bitsandbytes' 4-bit weights are stored in it."""
        return any(".quant_state.bitsandbytes__" in name for name in self.tensors)


def check_folder(folder: Path, name: str, commit: str | None, sink: Sink) -> BaseFolder:
    """The base in `folder`. Raises ModelError for whatever keeps it from being one to train on."""
    check_entries(folder)
    config_file = folder / "config.json"
    if not config_file.is_file():
        adapter = (folder / "adapter_config.json").is_file()
        what = f"{name}: is an adapter, not a base" if adapter else f"{name}: there is no config.json in it"
        raise ModelError(what, "name the folder or hub model that holds the whole base")
    config = load_config(config_file)
    check_config(config, name)
    check_tokenizer_config(folder)
    tensors = find_tensors(folder)
    check_layers_exist(config, len(tensors), name)
    _check_tensors(tensors, name)
    check_model_type(config, name)
    if "auto_map" in config:
        sink.emit(Notice("model", f"{name} carries its own code; it is never run, transformers' own model is used"))
    sizes = sorted({(entry.file.name, entry.opened.stat().st_size) for entry in tensors.values()})
    fingerprint = sha256_text(
        json.dumps(config, sort_keys=True),
        json.dumps([(key, entry.dtype, entry.shape) for key, entry in tensors.items()]),
        json.dumps(sizes),
    )
    return BaseFolder(folder, name, commit, config, tensors, fingerprint)


def load_config(file: Path) -> dict[str, Any]:
    """`config.json` as it stands. Raises ModelError when it is none, or too long for one."""
    return load_json(file)


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Raises ModelError when a model with this configuration cannot be trained here, with the reason."""
    check_config_values(config, f"{where}: config.json")
    check_code(config, where)
    _check_quantization(config, where)


def check_code(config: Mapping[str, Any], where: str) -> None:
    """Raises ModelError where a configuration tries to choose code."""
    for key, value in _walk(config):
        names_code = key in IMPLEMENTATION_KEYS and "/" in str(value)
        if key in FORBIDDEN_KEYS or names_code:
            what = f"{where}: the configuration holds {key!r}, which chooses code to run"
            raise ModelError(what, _FROM_ITS_PUBLISHER)


@without_collections()  # it imports transformers' models
def check_model_type(config: Mapping[str, Any], where: str) -> None:
    """Raises ModelError when transformers knows no causal model of this kind. The slowest check, so the last."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type = config.get("model_type")
    like = text_model_like(model_type, where)
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING_NAMES:
        own_code = "; the code in its folder (auto_map) is never run" if "auto_map" in config else ""
        what = f"{where}: model_type {model_type!r} is not known to the installed transformers{own_code}"
        raise ModelError(what, f"use a newer transformers, or a model that it supports by itself, such as {like}")
    text = text_section(config)
    if config.get("is_encoder_decoder") or text.get("is_encoder_decoder"):
        what = f"{where}: {model_type} is an encoder-decoder, not a causal language model"
        raise ModelError(what, f"use a decoder-only model, such as {like}")
    named = config.get("architectures") or ()
    kinds = [str(kind) for kind in named] if isinstance(named, list | tuple) else [str(named)]
    causal = not kinds or any(kind.endswith(CAUSAL_ENDINGS) for kind in kinds)
    if not causal or str(text.get("model_type", model_type)) not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        what = f"{where}: {kinds[0][:100] if kinds else model_type} is not a causal language model"
        raise ModelError(what, f"use a model that predicts the next token (…ForCausalLM), such as {like}")
    refuse_mixture(config, where)


def _check_quantization(config: Mapping[str, Any], where: str) -> None:
    stored = config.get("quantization_config") or text_section(config).get("quantization_config")
    if not stored:
        return
    details = stored if isinstance(stored, dict) else {"quant_method": stored}
    method = str(details.get("quant_method", "bitsandbytes"))
    if mxfp4_config.is_known(config):
        mxfp4_config.refuse(config, where)
        return
    if method == "bitsandbytes":
        if details.get("load_in_4bit"):
            return
        method = "bitsandbytes 8-bit"
    raise ModelError(f"{where}: its weights are already quantized ({method[:60]})", original_of(where))


def original_of(name: str) -> str:
    """The hint for a base whose weights another tool has quantized: which 16-bit copy to take."""
    last = name.rstrip("/").rpartition("/")[2]
    original = _QUANTIZED_NAME.sub("", last)
    if original and original != last:
        return f"name the original with 16-bit weights ({original[:60]}): it is quantized while it is loaded"
    return (
        f"name a copy with 16-bit weights (published as {last[:60]}-BF16, or written by transformers with "
        "dequantize=True): it is quantized while it is loaded"
    )


def check_entries(folder: Path) -> None:
    """Raises ModelError for an entry of a stranger's folder that is not what its name promises.

    A pipe or device under a file's name would block whoever opens it, and a link out of the folder would carry a
    file of this machine into the adapter that is made of it. Weights are bounded by their own headers.
    """
    nested = folder / _TEMPLATES_FOLDER
    for path in (*sorted(folder.iterdir()), *(sorted(nested.iterdir()) if nested.is_dir() else ())):
        ours = any(fnmatch(path.name, pattern) for pattern in (*SMALL_FILES, *COPIED_FILES, "*.safetensors"))
        if not ours and not files.is_link(path):
            continue  # nothing here opens it
        try:
            files.inside(folder, path.relative_to(folder).as_posix())
        except files.UnsafePathError as error:
            raise ModelError(f"{folder}: {error}", _OF_LINKS) from error
        if path.is_file() and path.suffix != ".safetensors" and path.stat().st_size > MAX_SMALL_BYTES:
            what = f"{path}: {path.stat().st_size:,} bytes are too many for a file of its kind"
            raise ModelError(what, _FROM_ITS_PUBLISHER)


def check_tokenizer_config(folder: Path) -> None:
    """Raises ModelError where a tokenizer's configuration tries to choose code. Code of its own is never run."""
    for name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        file = folder / name
        if file.is_file():
            values = load_json(file, MAX_TOKENIZER_BYTES)
            check_code(values, name)
            if name == "generation_config.json":
                check_generation_values(values, str(file))
    file = folder / "tokenizer.json"
    if file.is_file():
        with files.open_to_read(files.inside(folder, file.name)) as stream:
            if stream.read(2) in PICKLE_MAGICS:
                what = f"{file}: is a pickle under another name, and pickles are never opened"
                raise ModelError(what, _FROM_ITS_PUBLISHER)


def _check_tensors(tensors: Mapping[str, TensorEntry], where: str) -> None:
    for name, entry in tensors.items():
        if entry.dtype.startswith("F8") or entry.dtype in ("F4", "F6_E2M3", "F6_E3M2"):
            raise ModelError(f"{where}: {name} is stored in {entry.dtype}", original_of(where))
        if name.endswith((".qweight", ".weight_packed", ".g_idx", ".qzeros", ".SCB")):
            raise ModelError(f"{where}: its weights are already quantized ({name})", original_of(where))
        in_4bit = any(f"{name}.quant_state.bitsandbytes__{kind}" in tensors for kind in ("nf4", "fp4"))
        if name.endswith(".weight") and entry.dtype not in FLOAT_DTYPES and not in_4bit:
            raise ModelError(f"{where}: {name} is stored in {entry.dtype}", original_of(where))


def text_section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config.json that is the (text) model's own."""
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
