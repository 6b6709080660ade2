"""A model in GGUF: which architecture llama.cpp runs it as, its keys, and what happens to each tensor.

Names come from the gguf package's own table, everything else from the declaration of the family (`families/`). What is
done to weights is silent when forgotten: the file loads and answers nonsense. What llama.cpp's graph of an architecture
cannot compute is refused; where it computes something else only beyond a length, a notice says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from qlora.errors import ExportError
from qlora.export.gguf import experts, rope
from qlora.export.gguf.families import FAMILIES
from qlora.export.gguf.family import NOTHING, Change, Facts, Family, GgufTensor, Place, check_config, of_all_layers
from qlora.export.gguf.rope import Key
from qlora.model.expert_pieces import Piece


@dataclass(frozen=True)
class Layout:
    """A model as a GGUF file of `arch`: its keys (full names), its tensors, and tensors that hold constants."""

    arch: str
    keys: tuple[Key, ...]
    tensors: tuple[GgufTensor, ...]
    constants: Mapping[str, NDArray[np.float32]]
    notices: tuple[str, ...]
    layers: int
    heads: int
    kv_heads: int
    experts: int = 0  # of a layer

    @property
    def stored(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of each tensor that parameters fill, in the file's order."""
        return {tensor.name: tensor.stored for tensor in self.tensors}

    @property
    def kept(self) -> set[str]:
        """Names of the tensors whose values stay in MXFP4 as they were published."""
        return {tensor.name for tensor in self.tensors if tensor.packed}

    @property
    def inputs(self) -> list[tuple[str, str, Any]]:
        """Parameter, name in the file, and the order of the columns there (None: the parameter's) of each matrix and
        of each stack of experts."""
        tensors = {tensor.name: tensor for tensor in self.tensors if tensor.projection or len(tensor.stored) == 2}
        return [(one.projection or one.parameter, name, one.change.columns) for name, one in tensors.items()]


def lay_out(
    model: Any, shapes: Mapping[str, tuple[int, ...]], pieces: Mapping[str, tuple[str, Piece]] = MappingProxyType({})
) -> Layout:
    """The layout of a causal model (weights may be on `meta`, buffers are read) whose stored parameters are `shapes`.

    `pieces`: those of them that are pieces of projections of experts, and of which (`merge.parts.expert_pieces`).

    Raises ExportError for a family, a setting or a parameter that llama.cpp cannot express.
    """
    config = model.config.get_text_config()
    family = FAMILIES.get(config.model_type)
    if family is None:
        what = f"{config.model_type!r} models cannot be written as GGUF here"
        raise ExportError(what, "export with to='hf'; recipes/MODELS.md lists the families that can")
    head_dim = int(of_all_layers(config, "head_dim") or config.hidden_size // config.num_attention_heads)
    dims = int(head_dim * float(_flat_rope(config).get("partial_rotary_factor") or 1.0))
    facts = Facts(config, shapes, head_dim, dims, "lm_head.weight" not in shapes, experts.expert_tensors(model, pieces))
    family = family.instead(facts) or family
    _check(family, facts)
    turns = rope.reference_ropes(model)
    rotary = family.rope(facts, turns) if family.rope else rope.describe(config, dims, turns, family.takes_rope_factors)
    arch = gguf.MODEL_ARCH_NAMES[family.arch]
    keys = {**dict([*_shape_keys(facts, family), *rotary.keys]), **dict(family.keys(facts))}
    keys = {**keys, **dict(_window_keys(facts, family))}
    return Layout(
        arch=arch,
        keys=tuple((f"{arch}.{key}", value) for key, value in keys.items() if value is not None),
        tensors=_tensors(facts, family),
        constants={**rotary.tensors, **family.constants(facts)},
        notices=_notices(facts, family, rotary.tensors),
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=_first(keys["attention.head_count_kv"]),
        experts=int(keys.get("expert_count") or 0),
    )


def _first(value: Any) -> int:
    return int(value[0] if isinstance(value, list) else value)


def _shape_keys(facts: Facts, family: Family) -> list[Key]:
    config = facts.config
    epsilon, epsilon_key = family.epsilon
    return [
        ("block_count", config.num_hidden_layers),
        ("context_length", config.max_position_embeddings),
        ("embedding_length", config.hidden_size),
        ("feed_forward_length", getattr(config, "intermediate_size", None)),
        ("attention.head_count", config.num_attention_heads),
        ("attention.head_count_kv", facts.value("num_key_value_heads")),
        ("attention.key_length", facts.head_dim),
        ("attention.value_length", facts.head_dim),
        (epsilon_key, float(getattr(config, epsilon)) if epsilon else None),
        ("rope.dimension_count", facts.rotated),
    ]


def _window_keys(facts: Facts, family: Family) -> list[Key]:
    """The sliding window, and which layers have it where that is not what the architecture takes for granted."""
    if family.windows is None or not any(facts.sliding):
        return []
    keys: list[Key] = [("attention.sliding_window", int(facts.config.sliding_window))]
    period = family.windows.period
    if facts.sliding != [layer % period < period - 1 for layer in range(facts.layers)]:
        if not family.windows.listed:
            raise rope.refused(f"these layer_types of {facts.config.model_type} (every {period}th layer has no window)")
        keys.append(("attention.sliding_window_pattern", facts.sliding))
    return keys


def _tensors(facts: Facts, family: Family) -> tuple[GgufTensor, ...]:
    table = gguf.get_tensor_name_map(family.arch, facts.layers)
    changes = family.changes(facts)
    tensors = []
    for parameter, shape in facts.shapes.items():
        change = _change(parameter, changes)
        adapts = change.linear and not parameter.removesuffix(".weight").endswith(family.unadapted)
        of_experts = facts.experts.get(parameter)
        places = family.places(parameter, facts) or (
            experts.places(of_experts, tuple(shape), family.fused) if of_experts else ()
        )
        if places:
            placed = [_placed(parameter, tuple(shape), change, place) for place in places]
            of = (of_experts.projection, of_experts.piece.form) if of_experts else ("", "")
            tensors += [replace(one, adapts=adapts, projection=of[0], packed=of[1]) for one in placed]
            continue
        named = parameter
        for part, other in family.renamed.items():
            named = named.replace(part, other)
        name = table.get_name(named, try_suffixes=(".weight", ".bias"))
        owner, _, leaf = parameter.rpartition(".")
        layer = owner.rpartition(".")[2]
        if name is None or (leaf == "bias" and layer not in family.biases):
            raise ExportError(f"llama.cpp has no place for the tensor {parameter}", "export with to='hf'")
        unit = change.unit(shape[0] if shape else 1, facts.head_dim)
        tensors.append(GgufTensor(name, parameter, change.shape(tuple(shape)), change, unit, adapts=adapts))
    order = {name: number for number, name in enumerate(dict.fromkeys(tensor.name for tensor in tensors))}
    return tuple(sorted(tensors, key=lambda tensor: (order[tensor.name], tensor.at)))


def _placed(parameter: str, shape: tuple[int, ...], change: Change, place: Place) -> GgufTensor:
    """The rows of a parameter that `place` says."""
    rows, change = (shape[0] if place.last is None else place.last) - place.first, place.change or change
    unit = place.unit or change.unit(rows, 1)
    return GgufTensor(place.name, parameter, change.shape((rows, *shape[1:])), change, unit, place, rows=rows)


def _change(parameter: str, changes: Mapping[str, Change]) -> Change:
    named = parameter.removesuffix(".weight").removesuffix(".bias")
    ends = (end for end in changes if named.endswith(end) or parameter.endswith(end))
    return changes.get(next(ends, ""), NOTHING)


def _check(family: Family, facts: Facts) -> None:
    """Raises ExportError for settings that the architecture's graph in llama.cpp ignores."""
    config = facts.config
    activation = facts.value("hidden_activation") or facts.value("hidden_act")
    if activation not in (None, family.activation):  # None: its class has no other
        raise rope.refused(f"the activation {activation!r} in {config.model_type} (it computes {family.activation})")
    if family.head == "tied" and not facts.tied:
        raise rope.refused(f"a {config.model_type} model whose head is not its embedding")
    if family.head == "own" and facts.tied:
        raise rope.refused(f"a {config.model_type} model whose head is its embedding")
    if not family.partial_rope and facts.rotated != facts.head_dim:
        raise rope.refused(f"{facts.rotated} rotated dims of {facts.head_dim} in {config.model_type}")
    check_config(family, facts)
    family.check(facts)


def _notices(facts: Facts, family: Family, constants: Mapping[str, Any]) -> tuple[str, ...]:
    notices = [*family.notices(facts)]
    config = facts.config
    if family.windows is None and any(facts.sliding):
        window = int(config.sliding_window)
        if window < config.max_position_embeddings:
            notices.append(
                f"llama.cpp ignores the sliding window of {config.model_type}: beyond {window:,} tokens its answers "
                "differ from the model's"
            )
    if "rope_factors_long.weight" in constants:
        notices.append(
            "llama.cpp chooses between short and long positions by the size of its context, transformers by the text's "
            "length: for short texts run it with a context of at most "
            f"{_flat_rope(config)['original_max_position_embeddings']:,}"
        )
    return tuple(notices)


def _flat_rope(config: Any) -> Mapping[str, Any]:
    turned = getattr(config, "rope_parameters", None) or {}
    return turned.get("full_attention", turned)  # type: ignore[no-any-return]
