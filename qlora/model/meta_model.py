"""What a base will look like in memory, before a byte of its weights is read.

The model is built with its parameters on `meta` and its buffers real (transformers computes `inv_freq`, `embed_scale`
and their like in the constructor; on `meta` they would be lost). Beside it stands, for each parameter, the name of the
tensor in the checkpoint that fills it, by transformers' own table of renamings. The text part of a multimodal
checkpoint is taken by itself, as the causal model of its `text_config`.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from qlora import numerics
from qlora.collections_off import without_collections
from qlora.errors import ModelError, foreign_failures
from qlora.model import attention as our_attention
from qlora.model import experts, key_sharing, mxfp4_config
from qlora.model.alternatives import text_model_like
from qlora.model.base_folder import BaseFolder
from qlora.model.config_filter import open_config, with_layers
from qlora.model.expert_pieces import Piece, another_shape, check_piece, form_of, in_order, piece_of
from qlora.model.linear_use import use_of
from qlora.model.mixtures import experts_in, routers_in
from qlora.model.nf4 import is_stored_4bit
from qlora.model.sink_attention import has_sinks
from qlora.model.tensors import TensorEntry, read_tensor
from qlora.model.weight_names import text_name
from qlora.step.experts import NAME as EXPERTS

# nn.Linear and subclasses of it that compute the same, so that a 4-bit layer may take their place; and that one.
PLAIN_LINEARS = ("Linear", "FalconLinear", "Linear4bit")
# Models whose layers look attention up by class, not by registered function: they know "sdpa" and no other name.
OWN_ATTENTION = ("falcon",)
# Models whose own code multiplies fp32 states by bf16 ones, which torch refuses (modeling_xlstm.py, chunkwise kernel).
ONLY_FLOAT32 = ("xlstm",)

# Real, unlike the weights: tables of positions, masks. The largest known to us (XGLM's positions) has 58 MB.
MAX_BUFFER_BYTES = 400 << 20
MAX_WEIGHTS = 10**13  # the largest open model known to us has 10^12
# What no model can have none of, as transformers calls it whatever config.json does.
COUNTS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


@dataclass(frozen=True)
class MetaModel:
    """`model` without weights; `sources` from parameter (or stored buffer) to checkpoint name; `skipped` are not used.

    `attention` is what the model was built with; `skipped` leaves out companions of 4-bit weights. `experts` are the
    pieces of the projections of experts, by parameter, which are not among the `sources`.
    """

    model: Any
    sources: Mapping[str, str]
    skipped: tuple[str, ...]
    attention: str
    experts: Mapping[str, tuple[Piece, ...]] = field(default_factory=dict)


@without_collections()
def build(base: BaseFolder, attention: str = "auto") -> MetaModel:
    """`base` without weights, with `attention` "auto", "sdpa" or "eager".

    Raises ModelError when transformers cannot build the model, when a parameter has no tensor of its shape, or when the
    weights are of a kind that 4-bit layers cannot hold.
    """
    text, multimodal = text_config(base.config, base.name, has_head(base))
    chosen = choose_attention(text, attention, base.name)
    model = build_unmatched(text, chosen, base.name)
    _untie_if_stored_apart(base, text, model)
    check_layers(model, base.name)
    sources, skipped, pieces = _match(base, model, multimodal)
    return MetaModel(model, sources, skipped, chosen, pieces)


def has_head(base: BaseFolder) -> bool:
    """Whether its weights hold an output layer apart from the embeddings."""
    return "lm_head.weight" in _text_names(base.tensors, multimodal=True)


def taken_tensors(base: BaseFolder, meta_model: MetaModel) -> dict[str, TensorEntry]:
    """The tensors of the checkpoint that the model takes, statistics of 4-bit weights among them: what `load` reads."""
    taken = {*meta_model.sources.values(), *(one.tensor for pieces in meta_model.experts.values() for one in pieces)}
    return {
        name: entry
        for name, entry in base.tensors.items()
        if name in taken or (_is_companion(name, base) and f"{name.partition('.weight.')[0]}.weight" in taken)
    }


def text_config(stored: Mapping[str, Any], name: str, head_stored: bool | None = None) -> tuple[Any, bool]:
    """transformers' configuration of the causal (text) model of a config.json, and whether that is a part of a larger
    one. `head_stored` says whether the weights hold a head of their own; None is not known.

    Raises ModelError when transformers cannot read it.
    """
    with _refusing(name):
        config = open_config(stored)
        text = config.get_text_config(decoder=True)
        if not isinstance(text, dict) and text is not config:
            _take_from_outside(stored, config, text, head_stored)
    if isinstance(text, dict):  # under a name that this kind of model gives no meaning
        what = f"{name}: config.json: text_config is there, but a {config.model_type} has no text part"
        raise ModelError(what, "get a clean copy of the model")
    _check_shape(text, name)
    _check_extent(text, name)
    return text, text is not config


def _take_from_outside(stored: Mapping[str, Any], config: Any, text: Any, head_stored: bool | None) -> None:
    """What a larger model's config.json says beside its text part about it: sizes, and whether the head is tied.

    Its class ties by default, also where the text part's does not (Mistral 3, whose weights have a head of 1.25 GiB
    apart): as long as the weights are not known, only what the file says counts.
    """
    inner = stored.get("text_config")
    said = inner if isinstance(inner, Mapping) else {}
    for key in ("vocab_size", "head_dim"):
        if type(value := stored.get(key)) is int and key not in said:
            setattr(text, key, value)
    outside = config.tie_word_embeddings if head_stored is not None else stored.get("tie_word_embeddings")
    if outside and not head_stored:
        text.tie_word_embeddings = True


def _check_shape(text: Any, name: str) -> None:
    """Raises ModelError for counts that are none. An id of padding that no token has is taken for no padding."""
    # Not by their names: Gemma 4's layers differ in heads, and it raises over a question for the number of one.
    stored = getattr(text, "attribute_map", {})
    known = {key: value for key in COUNTS if type(value := vars(text).get(stored.get(key, key))) is int}
    for key, value in known.items():
        if value < 1:
            what = f"{name}: config.json: {stored.get(key, key)} is {value}, a model has at least 1"
            raise ModelError(what, "get a clean copy of the model")
    heads, shared = known.get("num_attention_heads", 1), known.get("num_key_value_heads", 1)
    if heads % shared:
        what = f"{name}: config.json: num_key_value_heads is {shared}, which does not divide {heads} attention heads"
        raise ModelError(what, "get a clean copy of the model")
    width = vars(text).get("head_dim")
    if hasattr(text, "rope_parameters") and type(width) is int and width % 2:
        what = f"{name}: config.json: head_dim is {width}, but positions turn its values in pairs"
        raise ModelError(what, "get a clean copy of the model")
    padding, tokens = getattr(text, "pad_token_id", None), known.get("vocab_size", 0)
    if padding is not None and not -tokens <= padding < tokens:
        text.pad_token_id = None


def _check_extent(text: Any, name: str) -> None:
    """Raises ModelError where weights or buffers would be beyond all bounds: by the first layers, all of it on meta."""
    layers = int(text.num_hidden_layers)
    with foreign_failures() as failure:
        one, two = (_extent(with_layers(text, count)) for count in (1, 2))
    if failure.error:  # a hybrid's first layers may be no model: then all of them, which takes longer
        with _refusing(name):
            one = two = _extent(text)
    weights, table_bytes = (first + (second - first) * (layers - 1) for first, second in zip(one, two, strict=True))
    for count, most, what in (
        (weights, MAX_WEIGHTS, "weights"),
        (table_bytes, MAX_BUFFER_BYTES, "bytes of tables (positions, masks)"),
    ):
        if count > most:
            what = f"{name}: config.json: its sizes make {count:,} {what}, {most:,} are the most"
            raise ModelError(what, "get a clean copy of the model, or use another model")


def _extent(text: Any) -> tuple[int, int]:
    """Weights and bytes of buffers of a model, which is made on meta altogether."""
    with torch.device("meta"):
        model = _from_config(copy.deepcopy(text), None, include_buffers=True)
    empty = [(key, list(parameter.shape)) for key, parameter in model.named_parameters() if not parameter.numel()]
    if empty:
        raise ModelError(f"config.json: its sizes make {empty[0][0]} {empty[0][1]}", "get a clean copy of the model")
    weights = sum(parameter.numel() for parameter in model.parameters())
    return weights, sum(buffer.nbytes for buffer in model.buffers())


def build_unmatched(text: Any, attention: str, name: str) -> Any:
    """The causal model of a configuration: parameters on `meta`, buffers real. `attention` by `choose_attention`."""
    with _refusing(name):
        model = _from_config(text, attention, include_buffers=False)
    _compute_buffers(model)
    key_sharing.settle(model)
    if of_experts := [module for _, module in experts_in(model)]:
        experts.register()
        experts.keep_routing_still(model)
        for module in of_experts:
            module.config._experts_implementation = EXPERTS
    return model


def _from_config(text: Any, attention: str | None, include_buffers: bool) -> Any:
    """transformers' model of a configuration, its parameters on `meta`, and its buffers if they are included."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=include_buffers):
        return AutoModelForCausalLM.from_config(
            text, dtype=torch.bfloat16, attn_implementation=attention, trust_remote_code=False
        )


@contextmanager
def _refusing(name: str) -> Iterator[None]:
    """Whatever transformers raises over a configuration, as a ModelError."""
    with foreign_failures() as failure:
        yield
    if failure.error:
        unknown = isinstance(failure.error, KeyError)  # a table of transformers' own: of activations, kinds of rotation
        reason = f"there is no {failure.reason} in it" if unknown else failure.reason
        what = f"{name}: config.json: transformers cannot build this model ({reason})"
        raise ModelError(what, "check config.json, or use another copy or another model") from failure.error


def head_of(model: Any) -> Any:
    """The output layer, which is never quantized nor adapted by "all-linear"."""
    return model.get_output_embeddings()


def linear_layers(model: Any) -> Iterator[tuple[str, nn.Linear]]:
    """Every linear layer but the head, by name: what is kept in 4 bit, and what "all-linear" means.

    Layers whose weight the model reads by itself are left out (see `linear_use`), and what chooses experts.
    """
    head, routers = head_of(model), routers_in(model)
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and type(module).__name__ in PLAIN_LINEARS
        and name not in routers
    }
    kept = use_of(model, found).kept
    yield from ((name, module) for name, module in found.items() if name not in kept)


def choose_attention(text: Any, wanted: str, name: str, target: str | None = None) -> str:
    """The attention function's name; eager where sdpa cannot compute what the model needs.

    `target` is the device that a model on `meta` stands for (see `attention.register`). A run that began with eager
    goes on so.
    """
    from transformers import AutoModelForCausalLM

    ours, run = our_attention.register(target, has_sinks(text)), numerics.of_run()
    model_class = AutoModelForCausalLM._model_mapping[type(text)]
    lack = None
    if getattr(text, "attn_logit_softcapping", None) is not None:
        lack = "it caps attention scores, which sdpa does not"
    elif not getattr(model_class, "_supports_sdpa", False) and not has_sinks(text):
        lack = "transformers has no sdpa for it"
    if wanted == "sdpa" and lack:
        raise ModelError(f'model.attention = "sdpa" is not possible for {name}: {lack}', 'use "auto" or "eager"')
    if wanted == "eager" or lack or (wanted == "auto" and run is not None and run.attention == "eager"):
        return "eager"
    return "sdpa" if text.model_type in OWN_ATTENTION else ours


def _compute_buffers(model: Any) -> None:
    """Buffers once more, as transformers computes them after loading: constructors saw bf16 as the default dtype, in
    which sines of large positions are noise (GPT-J). Parameters are on `meta`, so that initializing them does nothing.
    """
    for module in model.modules():
        module._is_hf_initialized = False
    with torch.random.fork_rng(devices=[]):
        model.initialize_weights()


def _text_names(names: Mapping[str, TensorEntry], multimodal: bool) -> dict[str, str]:
    """Name in the text model to name in the checkpoint, before transformers' own renamings."""
    return {text_name(name) if multimodal else name: name for name in names}


def _match(
    base: BaseFolder, model: Any, multimodal: bool
) -> tuple[dict[str, str], tuple[str, ...], dict[str, tuple[Piece, ...]]]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    mapping = get_model_conversion_mapping(model)
    converters = [step for step in mapping if isinstance(step, WeightConverter)]
    renamings = [step for step in mapping if not isinstance(step, WeightConverter)]
    wanted = model.state_dict()

    def renamed(name: str) -> tuple[str, str | None]:
        return rename_source_key(name, renamings, converters, model.base_model_prefix, wanted)  # type: ignore[no-any-return]

    stacked = {name: module for name, module, _ in experts.projections(model)}
    pieces: dict[str, list[Piece]] = defaultdict(list)
    sources: dict[str, str] = {}
    skipped = []
    for plain, name in _text_names(base.tensors, multimodal).items():
        if _is_companion(name, base):
            continue
        form, stem = form_of(plain)
        target, converted = renamed(stem)
        if form and target not in stacked:
            form, (target, converted) = "", renamed(plain)
        piece: Piece | None = Piece(name, None, form=form)
        if converted is not None and not form:
            piece = piece_of(name, plain, converted, converters)
        if target in stacked and piece is not None:
            if piece.expert is not None and stacked[target].is_transposed:
                raise _another_layout(base, name)
            pieces[target].append(piece)
            check_piece(base.name, base.tensors[piece.tensor], piece, target, stacked[target])
            continue
        if converted is not None and target in wanted:
            raise _another_layout(base, name)
        if target not in wanted:
            skipped.append(name)
            continue
        if target in sources:
            raise ModelError(f"{base.name}: {name} and {sources[target]} are the same parameter", "get a clean copy")
        stored, shape = base.tensors[name].shape, tuple(wanted[target].shape)
        if stored != shape and not is_stored_4bit(base, name):
            raise another_shape(base.name, name, stored, target, shape)
        sources[target] = name
    tied = model.all_tied_weights_keys
    skipped += [sources.pop(target) for target in sources.keys() & tied]
    there = {*sources, *tied, *pieces}
    missing = [name for name, _ in model.named_parameters(remove_duplicate=False) if name not in there]
    if missing:
        what = f"{base.name}: {len(missing)} of its tensors are missing, the first is {missing[0]}"
        raise ModelError(what, "download the model again; a base without its head cannot be trained here")
    in_mxfp4 = {name for name in pieces if mxfp4_config.holds(model.config, name.rpartition(".")[0])}
    ordered = {
        name: in_order(base.name, name, wanted[name].shape[0], found, name in in_mxfp4)
        for name, found in pieces.items()
    }
    return sources, tuple(sorted(skipped)), ordered


def _another_layout(base: BaseFolder, name: str) -> ModelError:
    what = f"{base.name}: {name} is stored in another layout than the model computes with"
    return ModelError(what, "this model is not supported yet; use another one")


def _is_companion(name: str, base: BaseFolder) -> bool:
    """Whether a tensor is part of a stored 4-bit weight: `X.weight.absmax` and its like."""
    owner, _, rest = name.partition(".weight.")
    return bool(rest) and is_stored_4bit(base, f"{owner}.weight")


def _untie_if_stored_apart(base: BaseFolder, text: Any, model: Any) -> None:
    """A checkpoint may hold head and embeddings apart though its configuration ties them: the weights decide."""
    names = _text_names(base.tensors, multimodal=True)
    head, embeddings = names.get("lm_head.weight"), names.get("model.embed_tokens.weight")
    if "lm_head.weight" not in model.all_tied_weights_keys or head is None or embeddings is None:
        return
    one, other = base.tensors[head], base.tensors[embeddings]
    rows = one.shape[0]
    blocks = ((at, min(rows, at + 4096)) for at in range(0, rows, 4096))
    if (one.dtype, one.shape) != (other.dtype, other.shape) or not all(
        torch.equal(read_tensor(one, block), read_tensor(other, block)) for block in blocks
    ):
        text.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def check_layers(model: Any, name: str) -> None:
    """Refuses models whose weights lie where 4-bit layers and adapters do not reach."""
    from transformers.pytorch_utils import Conv1D

    another = f"use another model, such as {text_model_like(model.config.model_type, name)}"
    if head_of(model) is None:
        raise ModelError(f"{name}: {type(model).__name__} has no output layer", another)
    if any(isinstance(module, Conv1D) for module in model.modules()):
        what = f"{name}: {type(model).__name__} keeps its layers transposed (Conv1D), which 4-bit layers do not"
        raise ModelError(what, another)
    held = {key for key, _, _ in experts.projections(model)}
    stacked = [key for key, one in model.named_parameters() if one.ndim == 3 and key not in held]
    if lost := next((key for key in stacked if "expert" in key or "moe" in key), None):
        what = (
            f"{name}: {lost} holds experts that are computed by code of {type(model).__name__}'s own, in 16 bit alone"
        )
        raise ModelError(what, another)
    if next(linear_layers(model), None) is None:
        raise ModelError(f"{name}: {type(model).__name__} has no linear layers to adapt", another)
    if model.config.model_type in ONLY_FLOAT32:
        what = f"{name}: {type(model).__name__} is computed by transformers in float32 only, which training here is not"
        raise ModelError(what, another)
    if why := use_of(model, {}).trunk:
        raise ModelError(f"{name}: {type(model).__name__} cannot be trained here: {why}", another)
