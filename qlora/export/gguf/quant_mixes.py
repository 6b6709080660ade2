"""Which type each tensor of a GGUF file gets.

A quant such as Q4_K_M is a mixture: most weights in its default type, the few that hurt most when rounded in a finer
one. The rules here give the types that llama.cpp's quantizer gives (src/llama-quant.cpp, llama_tensor_get_type), for
the architectures that we write; f32, f16, bf16 and q8_0 come out as its converter writes them (conversion/base.py).
Files then have the sizes and the quality that users know by the name.

1. One-dimensional tensors (norms, biases, RoPE factors), names ending in `_norm.weight`, those not ending in `.weight`
   kernels of convolutions and what chooses experts stay F32: they are small, the runtime's kernels take nothing else
   for the former, and rounded scores would choose other experts.
2. The head gets the quant's `head` type: its errors go straight into the logits. A tied model has no `output.weight`,
   and `token_embd.weight` is the head.
3. All others get the first of the quant's rules that fits their role and place, else its default.
4. A row must be whole blocks: 256 values in K- and IQ-quants, 32 in the older ones. A type that does not fit gives way
   to the next finer one of blocks of 32, and that to F16. What gave way is reported.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from gguf import GGML_QUANT_SIZES, MODEL_ARCH_NAMES, GGMLQuantizationType, LlamaFileType

from qlora.errors import ExportError
from qlora.export.gguf.encode import NATIVE
from qlora.export.gguf.families import FAMILIES

F32, F16, BF16 = GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16
Q5_0, Q5_1, Q8_0 = GGMLQuantizationType.Q5_0, GGMLQuantizationType.Q5_1, GGMLQuantizationType.Q8_0
Q3_K, Q4_K = GGMLQuantizationType.Q3_K, GGMLQuantizationType.Q4_K
Q5_K, Q6_K = GGMLQuantizationType.Q5_K, GGMLQuantizationType.Q6_K
Q4_0, IQ4_XS, IQ4_NL = GGMLQuantizationType.Q4_0, GGMLQuantizationType.IQ4_XS, GGMLQuantizationType.IQ4_NL
MXFP4 = GGMLQuantizationType.MXFP4

# GGUF's names of the architectures whose rules these are: all that we write. Mistral's files say "llama". Others
# (Falcon) have exceptions of their own.
ARCHITECTURES = tuple(sorted({MODEL_ARCH_NAMES[family.arch] for family in FAMILIES.values()}))

# Small matrices that llama.cpp's kernels read as F32: kernels of convolutions, coefficients of a handful of streams.
SMALL = ("ssm_conv1d.weight", "shortconv.conv.weight", "altup_correct_coef.weight", "altup_predict_coef.weight")
ROUTER = "ffn_gate_inp.weight"
# Not so small ones that its quantizer leaves in 16 bit (llama-quant.cpp, tensor_allows_quantization).
KEPT = re.compile(r"altup|laurel|per_layer_model_proj")

# What takes the place of a type whose blocks do not fit a row (llama-quant.cpp, tensor_type_fallback).
FALLBACKS = {Q3_K: Q4_0, Q4_K: Q5_0, Q5_K: Q5_1, Q6_K: Q8_0, IQ4_XS: IQ4_NL}


@dataclass(frozen=True)
class MixHparams:
    """What the rules ask of a model: `block_count`, `attention.head_count` and `head_count_kv` of its GGUF file, of its
    first layer where they differ (0: that one carries a state)."""

    layers: int
    heads: int
    kv_heads: int
    experts: int = 0  # `expert_count`


@dataclass(frozen=True)
class Place:
    """Where a weight stands, and in which model."""

    layer: int
    model: MixHparams
    big_grouped: bool  # llama.cpp's "70B"
    has_imatrix: bool


@dataclass(frozen=True)
class Rule:
    """Weights of `role` (the middle of `blk.N.<role>.weight`, of experts without its end) get `kind` where `fits`."""

    role: str
    kind: GGMLQuantizationType
    fits: Callable[[Place], bool]


@dataclass(frozen=True)
class Quant:
    """One of the names that a user can ask for."""

    label: str
    default: GGMLQuantizationType
    head: GGMLQuantizationType
    rules: tuple[Rule, ...] = ()
    of_experts: GGMLQuantizationType | None = None  # of stacked matrices; `default` is for all others

    @property
    def file_type(self) -> int:
        """The number in `general.file_type` (enum llama_ftype in llama.h)."""
        return int(LlamaFileType["ALL_F32" if self.default == F32 else f"MOSTLY_{self.label}"])

    @property
    def needs_library(self) -> bool:
        """Whether it takes ggml to write it."""
        return self.default not in NATIVE or self.of_experts is not None


class Fallback(NamedTuple):
    """A tensor whose rows do not fit the type that it should have had."""

    name: str
    wanted: GGMLQuantizationType
    got: GGMLQuantizationType


@dataclass(frozen=True)
class TypeChoice:
    """A type for every tensor, by GGUF name, and those that are not of the type that the quant asks for."""

    types: Mapping[str, GGMLQuantizationType]
    fallbacks: tuple[Fallback, ...]

    def keeping(self, names: Collection[str]) -> TypeChoice:
        """The same but for tensors that are in MXFP4 already and stay so."""
        fallbacks = tuple(fallback for fallback in self.fallbacks if fallback.name not in names)
        return TypeChoice({**self.types, **dict.fromkeys(names, MXFP4)}, fallbacks)

    def notice(self) -> str | None:
        """The fallbacks in one line for the user; None when there are none."""
        if not self.fallbacks:
            return None
        counts = Counter((fallback.wanted, fallback.got) for fallback in self.fallbacks)
        shares = ", ".join(f"{got.name} for {wanted.name} in {count}" for (wanted, got), count in counts.items())
        tensors = len(self.types)
        return f"rows that are not whole blocks: {shares} of {tensors} tensors, so the file is larger than usual"


def everywhere(place: Place) -> bool:
    return True


def first_layers(count: int) -> Callable[[Place], bool]:
    return lambda place: place.layer < count


def first_part(divisor: int) -> Callable[[Place], bool]:
    """The first 1/divisor of all layers, rounded down."""
    return lambda place: place.layer < place.model.layers // divisor


def outer_and_every_third(place: Place) -> bool:
    """The first and last eighth of the layers, where errors did most harm, and every third between (use_more_bits)."""
    layer, layers = place.layer, place.model.layers
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def eight_experts(place: Place) -> bool:
    """Mixtral's number, and only that (llama-quant.cpp): experts are so large that finer attention costs nothing."""
    return place.model.experts == 8


def grouped_by_four(place: Place) -> bool:
    """Four query heads or more share a value head: attn_v is a small tensor, and finer bits cost little."""
    return place.model.heads >= 4 * place.model.kv_heads > 0


def first_eighth_unweighted(place: Place) -> bool:
    """Without an importance matrix, IQ4_XS is at its worst in the first `ffn_down`s."""
    return first_part(8)(place) and not place.has_imatrix


_EIGHT_Q8_0 = tuple(Rule(role, Q8_0, eight_experts) for role in ("attn_v", "attn_k"))
_EIGHT_OUTPUT = Rule("attn_output", Q5_K, eight_experts)
_SIX_BITS_OUTSIDE = tuple(Rule(role, Q6_K, outer_and_every_third) for role in ("attn_v", "ffn_down"))
# In each: values and what goes down from the feed-forward part are added to the residual stream as they are, so their
# errors stay; queries, keys, gate and up only steer and bear the default.
QUANTS: Mapping[str, Quant] = {
    "f32": Quant("F32", F32, F32),
    "f16": Quant("F16", F16, F16),
    "bf16": Quant("BF16", BF16, BF16),
    "q8_0": Quant("Q8_0", Q8_0, Q8_0),
    "mxfp4_moe": Quant("MXFP4_MOE", Q8_0, Q8_0, of_experts=MXFP4),
    "q6_k": Quant("Q6_K", Q6_K, Q6_K, _EIGHT_Q8_0),
    "q5_k_m": Quant("Q5_K_M", Q5_K, Q6_K, (*_EIGHT_Q8_0, *_SIX_BITS_OUTSIDE)),
    "q4_k_m": Quant("Q4_K_M", Q4_K, Q6_K, (*_EIGHT_Q8_0, _EIGHT_OUTPUT, *_SIX_BITS_OUTSIDE)),
    "q4_k_s": Quant(
        "Q4_K_S",
        Q4_K,
        Q6_K,
        (
            *_EIGHT_Q8_0,
            _EIGHT_OUTPUT,
            Rule("attn_v", Q5_K, first_layers(4)),
            Rule("ffn_down", Q5_K, first_part(8)),
        ),
    ),
    "q3_k_m": Quant(
        "Q3_K_M",
        Q3_K,
        Q6_K,
        (
            *_EIGHT_Q8_0,
            _EIGHT_OUTPUT,
            Rule("attn_v", Q5_K, first_layers(2)),
            Rule("attn_v", Q4_K, everywhere),
            Rule("ffn_down", Q5_K, first_part(16)),
            Rule("ffn_down", Q4_K, everywhere),
            Rule("attn_output", Q4_K, everywhere),
        ),
    ),
    "iq4_xs": Quant(
        "IQ4_XS",
        IQ4_XS,
        Q6_K,
        (
            *_EIGHT_Q8_0,
            _EIGHT_OUTPUT,
            Rule("attn_v", Q5_K, grouped_by_four),
            Rule("ffn_down", Q5_K, first_eighth_unweighted),
        ),
    ),
}

_LAYER_WEIGHT = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
# llama.cpp numbers attn_v as it meets them, layer by layer: where only some layers attend, or some have no values of
# their own, the number is not the layer's. ffn_down goes by the layer, and so do those of experts, routed or shared.


def choose_types(
    quant: str,
    arch: str,
    hparams: MixHparams,
    tensors: Sequence[tuple[str, tuple[int, ...]]],
    has_imatrix: bool = False,
) -> TypeChoice:
    """The type of each of `tensors` (GGUF name, shape as torch has it: rows, columns) in a file of `quant`.

    `quant` is a key of QUANTS. `has_imatrix`: an importance matrix is given, for whichever tensors. Raises ExportError
    for an `arch` whose rules are not known.
    """
    if arch not in ARCHITECTURES:
        raise ExportError(f"{arch}: no rules for quantizing this architecture", f"known are {', '.join(ARCHITECTURES)}")
    chosen = QUANTS[quant]
    head = "output.weight" if "output.weight" in dict(tensors) else "token_embd.weight"
    place = Place(0, hparams, is_big_grouped(arch, hparams), has_imatrix)
    values = _numbered_values([name for name, _ in tensors])
    types, fallbacks = {}, []
    for name, shape in tensors:
        wanted = chosen.head if name == head else _by_rules(name, chosen, place, values)
        if stays_f32(name, shape):
            wanted = F32
        elif chosen.of_experts and len(matrix_dims(shape)) > 2:  # and of heads (deepseek2): llama.cpp goes by the dims
            wanted = chosen.of_experts
        elif KEPT.search(name) and chosen.needs_library:
            wanted = BF16
        types[name] = fit(wanted, shape[-1])
        if types[name] != wanted:
            fallbacks.append(Fallback(name, wanted, types[name]))
    return TypeChoice(types, tuple(fallbacks))


def stays_f32(name: str, shape: tuple[int, ...]) -> bool:
    """Rule 1."""
    flat = len(matrix_dims(shape)) < 2
    return flat or not name.endswith(".weight") or name.endswith(("_norm.weight", ROUTER, *SMALL))


def matrix_dims(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape as ggml has it, which drops leading dimensions of 1: a single row counts as one-dimensional."""
    return matrix_dims(shape[1:]) if len(shape) > 1 and shape[0] == 1 else shape


def fit(wanted: GGMLQuantizationType, columns: int) -> GGMLQuantizationType:
    """Rule 4: `wanted`, or the nearest type whose blocks make up rows of `columns` values."""
    for kind in (wanted, FALLBACKS.get(wanted, wanted)):
        if columns % GGML_QUANT_SIZES[kind][0] == 0:
            return kind
    return F16


def is_big_grouped(arch: str, hparams: MixHparams) -> bool:
    """What llama.cpp calls a 70B: 80 layers with grouped heads, or any Qwen2 of 80 (src/models/)."""
    grouped = hparams.heads != hparams.kv_heads
    return hparams.layers == 80 and (arch == "qwen2" or (arch == "llama" and grouped))


def _numbered_values(names: Sequence[str]) -> dict[str, int]:
    """The number of each attn_v among them, layer by layer."""
    found = [
        (int(match[1]), name) for name in names if (match := _LAYER_WEIGHT.fullmatch(name)) and _role(match) == "attn_v"
    ]
    return {name: number for number, (_, name) in enumerate(sorted(found))}


def _role(match: re.Match[str]) -> str:
    """A projection of query, key and value in one (Phi-3) is handled as the most sensitive of the three."""
    return "attn_v" if match[2] == "attn_qkv" else match[2].removesuffix("_exps").removesuffix("_shexp")


def _by_rules(name: str, quant: Quant, place: Place, values: Mapping[str, int]) -> GGMLQuantizationType:
    """Rule 3. In a 70B, 8 query heads share a value head: attn_v is so small that 5 bits cost next to nothing."""
    match = _LAYER_WEIGHT.fullmatch(name)
    if match is None:
        return quant.default
    role, here = _role(match), replace(place, layer=int(match[1]))
    if role == "attn_v":
        here = replace(here, layer=values[name], model=replace(place.model, layers=len(values)))
    kind = next((rule.kind for rule in quant.rules if rule.role == role and rule.fits(here)), quant.default)
    return Q5_K if role == "attn_v" and here.big_grouped and kind in (Q3_K, Q4_K) else kind
