"""Seven families in GGUF: which architecture llama.cpp runs them as, its keys, and what happens to each tensor.

Names come from the gguf package's own table. Two things are done to weights (both silent when forgotten: the file loads
and answers nonsense): Llama and Mistral keep the two halves of each rotated head apart while llama.cpp wants them
interleaved, so rows of q and k are permuted; Gemma's norms are stored less 1. What llama.cpp's graph of an architecture
cannot compute is refused; where it computes something else only beyond a length, a notice says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import gguf
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from qlora.errors import ExportError
from qlora.export.gguf import rope
from qlora.export.gguf.rope import Key

Change = Literal["none", "interleave", "plus one"]


@dataclass(frozen=True)
class Family:
    """How llama.cpp runs a transformers model type."""

    arch: gguf.MODEL_ARCH
    activation: str  # the only one that its graph has
    interleaves: bool = False  # q and k rows
    norms_plus_one: bool = False
    takes_rope_factors: bool = False
    window_period: int | None = None  # one layer of so many is not a sliding one; None: its graph has no windows
    special_scale_layers: int | None = None  # with so many layers it scales attention by hidden / heads, else head_dim
    must_tie: bool = False  # its graph has no head of its own
    biases: tuple[str, ...] = ()  # layers whose biases its graph adds


QKV = ("q_proj", "k_proj", "v_proj")
OTHERS = ("o_proj", "gate_proj", "up_proj", "down_proj")
GELU = "gelu_pytorch_tanh"
FAMILIES: Mapping[str, Family] = {
    "llama": Family(gguf.MODEL_ARCH.LLAMA, "silu", interleaves=True, takes_rope_factors=True, biases=(*QKV, *OTHERS)),
    "mistral": Family(gguf.MODEL_ARCH.LLAMA, "silu", interleaves=True, takes_rope_factors=True),
    "qwen2": Family(gguf.MODEL_ARCH.QWEN2, "silu", biases=QKV),
    "qwen3": Family(gguf.MODEL_ARCH.QWEN3, "silu"),
    "phi3": Family(gguf.MODEL_ARCH.PHI3, "silu", takes_rope_factors=True),
    "gemma2": Family(
        gguf.MODEL_ARCH.GEMMA2, GELU, norms_plus_one=True, window_period=2, special_scale_layers=46, must_tie=True
    ),
    "gemma3_text": Family(gguf.MODEL_ARCH.GEMMA3, GELU, norms_plus_one=True, window_period=6, special_scale_layers=62),
}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file and the parameter of the causal model that fills it. `unit`: rows that change together."""

    name: str
    parameter: str
    shape: tuple[int, ...]
    change: Change
    unit: int

    def to_gguf(self, rows: Tensor) -> Tensor:
        """Whole units of rows as llama.cpp wants them."""
        if self.change == "plus one":
            return rows + 1
        return rows if self.change == "none" else _halves(rows, self.unit, (2, self.unit // 2))

    def inverse(self, rows: Tensor) -> Tensor:
        """Whole units of rows back in the order and scale of transformers."""
        if self.change == "plus one":
            return rows - 1
        return rows if self.change == "none" else _halves(rows, self.unit, (self.unit // 2, 2))


def _halves(rows: Tensor, head_dim: int, split: tuple[int, int]) -> Tensor:
    """Within each head, rows counted as `split` are counted the other way round."""
    heads = rows.shape[0] // head_dim
    return rows.reshape(heads, *split, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


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

    @property
    def names(self) -> dict[str, str]:
        """Parameter of the causal model to name in the file."""
        return {tensor.parameter: tensor.name for tensor in self.tensors}


def lay_out(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> Layout:
    """The layout of a causal model (weights may be on `meta`, buffers are read) whose stored parameters are `shapes`.

    Raises ExportError for a family, a setting or a parameter that llama.cpp cannot express.
    """
    config = model.config.get_text_config()
    family = FAMILIES.get(config.model_type)
    if family is None:
        known = ", ".join(sorted({name.removesuffix("_text") for name in FAMILIES}))
        raise ExportError(
            f"{config.model_type!r} models cannot be written as GGUF here (these can: {known})", "export with to='hf'"
        )
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    dims = int(head_dim * float(_flat_rope(config).get("partial_rotary_factor", 1.0)))
    _check(config, family, (head_dim, dims), "lm_head.weight" not in shapes)
    rotary = rope.describe(config, dims, rope.reference_ropes(model), family.takes_rope_factors)
    arch = gguf.MODEL_ARCH_NAMES[family.arch]
    keys = [*_shape_keys(config, head_dim, dims), *rotary.keys, *_attention_keys(config, family)]
    if arch == "llama":
        keys.append(("vocab_size", shapes["model.embed_tokens.weight"][0]))
    return Layout(
        arch=arch,
        keys=tuple((f"{arch}.{key}", value) for key, value in keys),
        tensors=_tensors(config, family, head_dim, shapes),
        constants=rotary.tensors,
        notices=_notices(config, family, rotary.tensors),
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
    )


def _shape_keys(config: Any, head_dim: int, rotated: int) -> list[Key]:
    return [
        ("block_count", config.num_hidden_layers),
        ("context_length", config.max_position_embeddings),
        ("embedding_length", config.hidden_size),
        ("feed_forward_length", config.intermediate_size),
        ("attention.head_count", config.num_attention_heads),
        ("attention.head_count_kv", config.num_key_value_heads),
        ("attention.key_length", head_dim),
        ("attention.value_length", head_dim),
        ("attention.layer_norm_rms_epsilon", float(config.rms_norm_eps)),
        ("rope.dimension_count", rotated),
    ]


def _attention_keys(config: Any, family: Family) -> list[Key]:
    """Softcaps and sliding windows, where the architecture has them."""
    keys: list[Key] = []
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name, None):
            keys.append((name, float(getattr(config, name))))
    sliding = _sliding_layers(config)
    if family.window_period is None or not any(sliding):
        # Phi-3's graph warns of a window it does not have: 0 says that there is none (llama.cpp, phi3.cpp).
        return [*keys, ("attention.sliding_window", 0)] if family.arch == gguf.MODEL_ARCH.PHI3 else keys
    keys.append(("attention.sliding_window", int(config.sliding_window)))
    usual = [layer % family.window_period < family.window_period - 1 for layer in range(config.num_hidden_layers)]
    if sliding != usual:
        keys.append(("attention.sliding_window_pattern", sliding))
    return keys


def _tensors(
    config: Any, family: Family, head_dim: int, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[GgufTensor, ...]:
    table = gguf.get_tensor_name_map(family.arch, config.num_hidden_layers)
    tensors = []
    for parameter, shape in shapes.items():
        name = table.get_name(parameter, try_suffixes=(".weight", ".bias"))
        owner, _, leaf = parameter.rpartition(".")
        layer = owner.rpartition(".")[2]
        if name is None or (leaf == "bias" and layer not in family.biases):
            raise ExportError(f"llama.cpp has no place for the tensor {parameter}", "export with to='hf'")
        change: Change = "none"
        unit = 1
        if family.interleaves and layer in ("q_proj", "k_proj"):
            change, unit = "interleave", head_dim
        elif family.norms_plus_one and parameter.endswith("norm.weight"):
            change = "plus one"
        tensors.append(GgufTensor(name, parameter, tuple(shape), change, unit))
    return tuple(tensors)


def _check(config: Any, family: Family, dims: tuple[int, int], tied: bool) -> None:
    """Raises ExportError for settings that the architecture's graph in llama.cpp ignores.

    `dims` are a head's, and how many of them turn with the position.
    """
    head_dim, rotated = dims
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if activation != family.activation:
        raise rope.refused(f"the activation {activation!r} in {config.model_type} (it computes {family.activation})")
    if family.must_tie and not tied:
        raise rope.refused(f"a {config.model_type} model whose head is not its embedding")
    if family.arch == gguf.MODEL_ARCH.QWEN2 and head_dim * config.num_attention_heads != config.hidden_size:
        raise rope.refused(f"heads of {head_dim} dims in a qwen2 model that is {config.hidden_size} wide")
    if family.arch == gguf.MODEL_ARCH.LLAMA and rotated != head_dim:
        raise rope.refused(f"{rotated} rotated dims of {head_dim} in {config.model_type}")
    if family.special_scale_layers is not None:
        special = config.num_hidden_layers == family.special_scale_layers
        scale = config.hidden_size // config.num_attention_heads if special else head_dim
        if config.query_pre_attn_scalar != scale:
            raise rope.refused(f"query_pre_attn_scalar = {config.query_pre_attn_scalar} (its graph scales by {scale})")
    if config.model_type == "gemma3_text" and getattr(config, "use_bidirectional_attention", None):
        raise rope.refused("attention in both directions")


def _notices(config: Any, family: Family, constants: Mapping[str, Any]) -> tuple[str, ...]:
    notices = []
    if family.window_period is None and any(_sliding_layers(config)):
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


def _sliding_layers(config: Any) -> list[bool]:
    """Which layers see only a window. Mistral and Phi-3 have one window for all of them and no `layer_types`."""
    if kinds := getattr(config, "layer_types", None):
        return [kind == "sliding_attention" for kind in kinds]
    return [bool(getattr(config, "sliding_window", None))] * int(config.num_hidden_layers)


def _flat_rope(config: Any) -> Mapping[str, Any]:
    return config.rope_parameters.get("full_attention", config.rope_parameters)  # type: ignore[no-any-return]
