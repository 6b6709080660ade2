"""Bounds on a stranger's config.json, before transformers makes anything of it.

A configuration is a few numbers of which lists, modules and tables become: a billion layers are built one by one, a
million labels are a dictionary, a table of positions is a buffer that really exists. Each number is bounded by what its
key counts, wherever in the configuration it stands; the names are those by which transformers' models call them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pydantic import Field

from qlora.errors import ModelError
from qlora.foreign_json import ForeignFileError, ForeignModel, checked

MAX_LAYERS = 1024  # the deepest model known to us has 126
MAX_PARTS = 1 << 14  # experts, codebooks, heads: Doge's configuration has 16,384 experts
MAX_POSITIONS = 1 << 27  # ten million are promised by some
MAX_WIDTH = 1 << 20  # of a layer: 53,248 is the widest known to us
MAX_VOCABULARY = 1 << 22  # 262,208 is the largest known to us
MAX_NUMBER = 1 << 53  # of anything else; thetas of rotations are written as whole numbers of eleven digits
MAX_ENTRIES = 100_000  # of a list: suppressed tokens, kinds of layers
MAX_TOKEN_IDS = 1024  # that end a text
# What no model can have none of, by all the names of it.
AT_LEAST_ONE = (
    *("vocab_size", "hidden_size", "n_embd", "d_model", "num_hidden_layers", "n_layer", "n_layers"),
    *("num_attention_heads", "num_key_value_heads", "n_head", "n_heads"),
)
LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers", "num_decoder_layers")
# Of classifiers; a dictionary with an entry each, which a causal model does not read.
LABELS = ("num_labels", "id2label", "label2id", "problem_type")
# What a forward pass returns is for its caller to say, and old configurations hold a default of it.
RETURNED = ("return_dict", "use_return_dict", "output_attentions", "output_hidden_states")
_HINT = "get a clean copy of the model"
_DTYPE = re.compile(r"(torch\.)?(auto|(b?float|float8_e|int|uint)\w{1,12}|half|float|double)")


class Bound(NamedTuple):
    """What keys of these names count, and how many of it there may be."""

    names: re.Pattern[str]
    most: int
    what: str


# The first that matches counts.
BOUNDS = (
    Bound(re.compile(r"vocab(ulary)?_size"), MAX_VOCABULARY, "tokens"),
    Bound(re.compile(r"token_(ids?|index)$|_(bos|eos|pad)_id$"), (1 << 31) - 1, "ids"),
    Bound(
        re.compile(r"position|context|ctx|seq(uence)?_?len|window|chunk_size|block_size|max_length|max_seq"),
        MAX_POSITIONS,
        "positions",
    ),
    Bound(re.compile(r"layers?(_\w+)?$|depths?$|blocks?$|stages?$|hidden_groups$|_modules$"), MAX_LAYERS, "layers"),
    Bound(re.compile(r"num_labels"), MAX_ENTRIES, "labels"),
    Bound(
        re.compile(r"experts|heads?$|codebooks|quantizers|code_groups|ngram|hash_functions|image_with_embedding"),
        MAX_PARTS,
        "parts",
    ),
    Bound(re.compile(r"size|dim|width|rank|channels|features|^d_|^n_embd|inner|hidden"), MAX_WIDTH, "values"),
    Bound(re.compile(r""), MAX_NUMBER, "of it"),
)


class _Config(ForeignModel):
    """Keys of a configuration that we read ourselves."""

    model_type: str | None = Field(None, max_length=100)
    architectures: list[str] | str | None = Field(None, max_length=100)
    tie_word_embeddings: bool | None = None
    is_encoder_decoder: bool | None = None
    dtype: str | None = None
    torch_dtype: str | None = None
    quantization_config: dict[str, Any] | str | None = None
    eos_token_id: int | list[int] | None = None
    bos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    layer_types: list[str] | None = None
    text_config: dict[str, Any] | None = None


class _Generation(ForeignModel):
    """Keys of generation_config.json that we read."""

    eos_token_id: int | list[int] | None = None
    bos_token_id: int | list[int] | None = None
    pad_token_id: int | list[int] | None = None


def check_config_values(config: Mapping[str, Any], where: str) -> None:
    """Raises ModelError for a number of config.json that no model has, and for keys that we read of another type."""
    parts = [config, *(part for part in (config.get("text_config"),) if isinstance(part, dict))]
    for part in parts:
        _read(_Config, part, where)
        for key in ("dtype", "torch_dtype"):
            if isinstance(name := part.get(key), str) and not _DTYPE.fullmatch(name):
                raise ModelError(f"{where}: {key} is {_cut(name)}, which is no type of weights", _HINT)
        for key in AT_LEAST_ONE:
            if isinstance(value := part.get(key), str | float | bool):  # some models have a list, one number a layer
                raise ModelError(f"{where}: {key} is {_cut(value)}, which is no whole number", _HINT)
            if isinstance(value, int) and value < 1:
                raise ModelError(f"{where}: {key} is {value}, a model has at least 1", _HINT)
    for path, key, value in _numbers(config, where):
        bound = next(bound for bound in BOUNDS if bound.names.search(key))
        if abs(value) > bound.most:
            what = f"{where}: {path} is {_cut(value)}; at most {bound.most:,} {bound.what} can be meant"
            raise ModelError(what, _HINT)


def check_generation_values(config: Mapping[str, Any], where: str) -> None:
    """Raises ModelError for ids of tokens in generation_config.json that are none."""
    _read(_Generation, config, where)


def check_layers_exist(config: Mapping[str, Any], tensor_count: int, where: str) -> None:
    """Raises ModelError for layers without tensors: they would be built one by one, for days."""
    text = config.get("text_config")
    for layers in map((text if isinstance(text, dict) else config).get, LAYER_COUNTS):
        if isinstance(layers, int) and layers > tensor_count:
            what = f"{where}: config.json tells of {layers:,} layers, but the weights are {tensor_count:,} tensors"
            raise ModelError(what, "config.json and weights are of different models; get a clean copy")


def _read(model: type[_Config] | type[_Generation], values: Mapping[str, Any], where: str) -> None:
    try:
        checked(model, dict(values), where)
    except ForeignFileError as error:
        raise ModelError(str(error), _HINT) from error
    for key in ("eos_token_id", "bos_token_id", "pad_token_id"):
        ids = values.get(key)
        if isinstance(ids, list) and len(ids) > MAX_TOKEN_IDS:
            raise ModelError(f"{where}: {key} has {len(ids):,} entries, {MAX_TOKEN_IDS:,} are the most", _HINT)


def _numbers(config: Mapping[str, Any], where: str) -> Iterator[tuple[str, str, int]]:
    """Whole numbers at any depth: their path, the key that names them, the number. Not recursive: depth is the file's.

    Raises ModelError for lists and dictionaries of too many entries.
    """
    waiting: list[tuple[str, str, Any]] = [("", "", config)]
    while waiting:
        path, key, value = waiting.pop()
        if isinstance(value, dict | list) and len(value) > MAX_ENTRIES:
            what = f"{where}: {_plain(path) or 'it'} has {len(value):,} entries, {MAX_ENTRIES:,} are the most"
            raise ModelError(what, _HINT)
        if isinstance(value, int) and not isinstance(value, bool):
            yield _plain(path), key, value
        elif isinstance(value, dict):
            waiting.extend((f"{path}.{name}" if path else name, name, inner) for name, inner in value.items())
        elif isinstance(value, list):
            waiting.extend((path, key, inner) for inner in value)


def _plain(path: str) -> str:
    """A key of a stranger's, to be shown: on one line, and not all of a long one."""
    return repr(path[:100])[1:-1]


def _cut(value: object) -> str:
    text = f"{value:,}" if isinstance(value, int) else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
