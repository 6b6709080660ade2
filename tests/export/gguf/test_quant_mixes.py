"""The type of each tensor, against tables worked out by hand; test_quantize_oracle.py asks llama.cpp itself."""

from __future__ import annotations

import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from qlora.errors import ExportError
from qlora.export.gguf.quant_mixes import FALLBACKS, QUANTS, MixHparams, TypeChoice, choose_types, fit
from qlora.recipe.sections import GGUF_QUANTS

K_QUANTS = [name for name, quant in QUANTS.items() if quant.needs_library]


def layout(layers: int, width: int = 256, wide: int = 512, tied: bool = False) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Llama-like model."""
    tensors: list[tuple[str, tuple[int, ...]]] = [("token_embd.weight", (320, width)), ("output_norm.weight", (width,))]
    if not tied:
        tensors.append(("output.weight", (320, width)))
    for layer in range(layers):
        shapes = {
            "attn_norm.weight": (width,),
            "attn_q.weight": (width, width),
            "attn_k.weight": (width // 2, width),
            "attn_v.weight": (width // 2, width),
            "attn_v.bias": (width // 2,),
            "attn_output.weight": (width, width),
            "ffn_gate.weight": (wide, width),
            "ffn_up.weight": (wide, width),
            "ffn_down.weight": (width, wide),
        }
        tensors += [(f"blk.{layer}.{name}", shape) for name, shape in shapes.items()]
    return tensors


def choose(quant: str, layers: int, arch: str = "llama", heads: int = 4, has_imatrix: bool = False) -> TypeChoice:
    return choose_types(quant, arch, MixHparams(layers, heads, 2), layout(layers), has_imatrix)


def by_layer(choice: TypeChoice, role: str) -> str:
    layers = sum(name.endswith(f".{role}.weight") for name in choice.types)
    return " ".join(choice.types[f"blk.{layer}.{role}.weight"].name for layer in range(layers))


# quant, layers -> types of attn_v and of ffn_down, layer by layer.
BY_HAND = {
    ("q4_k_m", 2): ("Q4_K Q6_K", "Q4_K Q6_K"),
    ("q4_k_m", 8): ("Q6_K Q4_K Q4_K Q6_K Q4_K Q4_K Q6_K Q6_K",) * 2,
    ("q5_k_m", 8): ("Q6_K Q5_K Q5_K Q6_K Q5_K Q5_K Q6_K Q6_K",) * 2,
    ("q4_k_m", 16): ("Q6_K Q6_K Q4_K Q4_K Q6_K Q4_K Q4_K Q6_K Q4_K Q4_K Q6_K Q4_K Q4_K Q6_K Q6_K Q6_K",) * 2,
    ("q4_k_s", 8): ("Q5_K Q5_K Q5_K Q5_K Q4_K Q4_K Q4_K Q4_K", "Q5_K Q4_K Q4_K Q4_K Q4_K Q4_K Q4_K Q4_K"),
    ("q3_k_m", 3): ("Q5_K Q5_K Q4_K", "Q4_K Q4_K Q4_K"),
    ("q3_k_m", 16): (" ".join(["Q5_K"] * 2 + ["Q4_K"] * 14), " ".join(["Q5_K"] + ["Q4_K"] * 15)),
    ("q6_k", 3): ("Q6_K Q6_K Q6_K", "Q6_K Q6_K Q6_K"),
    ("iq4_xs", 8): (" ".join(["IQ4_XS"] * 8), " ".join(["Q5_K"] + ["IQ4_XS"] * 7)),
    ("q8_0", 2): ("Q8_0 Q8_0", "Q8_0 Q8_0"),
    ("f16", 2): ("F16 F16", "F16 F16"),
    ("bf16", 2): ("BF16 BF16", "BF16 BF16"),
    ("f32", 2): ("F32 F32", "F32 F32"),
}


@pytest.mark.parametrize(("quant", "layers"), BY_HAND)
def test_values_and_down_projections(quant: str, layers: int) -> None:
    choice = choose(quant, layers)
    assert (by_layer(choice, "attn_v"), by_layer(choice, "ffn_down")) == BY_HAND[quant, layers]
    assert not choice.fallbacks


@pytest.mark.parametrize("quant", QUANTS)
def test_all_other_weights_have_the_default(quant: str) -> None:
    choice = choose(quant, 3)
    output = "Q4_K" if quant == "q3_k_m" else QUANTS[quant].default.name
    assert {by_layer(choice, role) for role in ("attn_q", "attn_k", "ffn_gate", "ffn_up")} == {
        " ".join([QUANTS[quant].default.name] * 3)
    }
    assert by_layer(choice, "attn_output") == " ".join([output] * 3)


@pytest.mark.parametrize("quant", QUANTS)
def test_vectors_and_norms_stay_f32(quant: str) -> None:
    extra = [
        ("rope_freqs.weight", (32,)),
        ("blk.0.attn_q_norm.weight", (4, 256)),
        ("blk.0.post_ffw_norm.weight", (256,)),
    ]
    choice = choose_types(quant, "gemma3", MixHparams(1, 4, 2), [*layout(1), *extra])
    kept = {name for name, kind in choice.types.items() if kind == GGMLQuantizationType.F32}
    vectors = {name for name, shape in (*layout(1), *extra) if len(shape) == 1} | {"blk.0.attn_q_norm.weight"}
    assert kept == (set(choice.types) if quant == "f32" else vectors)


@pytest.mark.parametrize("quant", K_QUANTS)
def test_the_head_is_six_bits_also_when_it_is_the_embedding(quant: str) -> None:
    apart = choose_types(quant, "llama", MixHparams(2, 4, 2), layout(2)).types
    tied = choose_types(quant, "llama", MixHparams(2, 4, 2), layout(2, tied=True)).types
    head = "Q8_0" if quant == "mxfp4_moe" else "Q6_K"
    assert apart["output.weight"].name == head
    assert apart["token_embd.weight"] == QUANTS[quant].default
    assert tied["token_embd.weight"].name == head


def test_order_in_the_file_does_not_matter() -> None:
    forward = choose_types("q4_k_m", "llama", MixHparams(16, 4, 2), layout(16)).types
    backward = choose_types("q4_k_m", "llama", MixHparams(16, 4, 2), layout(16)[::-1]).types
    assert forward == backward


def test_iq4_xs_and_what_softens_it() -> None:
    assert by_layer(choose("iq4_xs", 2, heads=8), "attn_v") == "Q5_K Q5_K"
    assert by_layer(choose("iq4_xs", 2, heads=6), "attn_v") == "IQ4_XS IQ4_XS"
    assert "Q5_K" not in by_layer(choose("iq4_xs", 16, has_imatrix=True), "ffn_down")


def test_values_of_a_70b_have_five_bits() -> None:
    grouped, alone = MixHparams(80, 64, 8), MixHparams(80, 64, 64)
    for arch, hparams, fewest in (
        ("llama", grouped, "Q5_K"),
        ("llama", alone, "Q4_K"),
        ("qwen2", alone, "Q5_K"),
        ("qwen3", grouped, "Q4_K"),
    ):
        choice = choose_types("q4_k_m", arch, hparams, layout(80))
        assert set(by_layer(choice, "attn_v").split()) == {fewest, "Q6_K"}, (arch, hparams)
        assert set(by_layer(choice, "ffn_down").split()) == {"Q4_K", "Q6_K"}


def test_a_fused_projection_is_handled_as_values() -> None:
    tensors = [("token_embd.weight", (320, 256)), ("output.weight", (320, 256))]
    tensors += [(f"blk.{layer}.attn_qkv.weight", (512, 256)) for layer in range(8)]
    choice = choose_types("q4_k_m", "phi3", MixHparams(8, 4, 4), tensors)
    assert by_layer(choice, "attn_qkv") == BY_HAND["q4_k_m", 8][0]


def test_rows_that_are_not_whole_blocks_fall_back_and_are_told() -> None:
    choice = choose_types("q4_k_m", "llama", MixHparams(2, 4, 2), layout(2, width=320))
    types = choice.types
    assert types["blk.0.attn_q.weight"].name == "Q5_0"  # for Q4_K
    assert types["blk.1.attn_v.weight"].name == "Q8_0"  # for Q6_K
    assert types["blk.0.ffn_down.weight"].name == "Q4_K"  # 512 values a row
    assert types["output.weight"].name == "Q8_0"
    assert ("blk.0.attn_q.weight", GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q5_0) in choice.fallbacks
    assert len(choice.fallbacks) == 2 * 6 + 2
    notice = choice.notice()
    assert notice is not None
    assert "Q5_0 for Q4_K in 12" in notice
    assert "Q8_0 for Q6_K in 2" in notice


@pytest.mark.parametrize("quant", [name for name in QUANTS if name not in ("f32", "f16", "bf16")])
def test_rows_of_no_blocks_at_all_become_f16(quant: str) -> None:
    choice = choose_types(
        quant, "llama", MixHparams(1, 4, 2), [("token_embd.weight", (8, 72)), ("output.weight", (8, 72))]
    )
    assert {kind.name for kind in choice.types.values()} == {"F16"}
    assert len(choice.fallbacks) == 2


def test_no_fallbacks_no_notice() -> None:
    assert choose("q4_k_m", 2).notice() is None


@pytest.mark.parametrize("kind", FALLBACKS)
def test_a_fallback_has_blocks_of_32(kind: GGMLQuantizationType) -> None:
    assert GGML_QUANT_SIZES[FALLBACKS[kind]][0] == 32
    assert (fit(kind, 512), fit(kind, 320), fit(kind, 40)) == (kind, FALLBACKS[kind], GGMLQuantizationType.F16)


def test_every_k_quant_has_a_fallback_for_all_its_types() -> None:
    for quant in QUANTS.values():
        for kind in (quant.default, quant.head, *(rule.kind for rule in quant.rules)):
            assert GGML_QUANT_SIZES[kind][0] <= 32 or kind in FALLBACKS


def test_an_unknown_architecture_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ExportError, match="falcon: no rules") as caught:
        choose_types("q4_k_m", "falcon", MixHparams(1, 1, 1), [])
    assert "qwen3" in caught.value.hint


def test_file_types_are_llama_cpps_numbers() -> None:
    """include/llama.h, enum llama_ftype."""
    assert {name: quant.file_type for name, quant in QUANTS.items()} == {
        "f32": 0, "f16": 1, "q8_0": 7, "q3_k_m": 12, "q4_k_s": 14, "q4_k_m": 15, "q5_k_m": 17,
        "q6_k": 18, "iq4_xs": 30, "bf16": 32, "mxfp4_moe": 38,
    }  # fmt: skip
    assert {quant.label.lower() for quant in QUANTS.values()} == set(QUANTS)


def test_the_recipe_knows_the_same_names() -> None:
    assert tuple(QUANTS) == GGUF_QUANTS


def test_values_are_numbered_where_only_some_layers_attend() -> None:
    """The last 8 layers of 16 attend: llama.cpp counts values, and down projections by layer."""
    tensors = [(name, shape) for name, shape in layout(16) if "attn_v" not in name or int(name.split(".")[1]) >= 8]
    types = choose_types("q4_k_m", "granitehybrid", MixHparams(16, 4, 0), tensors).types
    values = [types[f"blk.{layer}.attn_v.weight"].name for layer in range(8, 16)]
    assert " ".join(values) == BY_HAND["q4_k_m", 8][0]
    assert " ".join(types[f"blk.{layer}.ffn_down.weight"].name for layer in range(16)) == BY_HAND["q4_k_m", 16][1]
    # In a model whose first layer has no heads for keys, nothing counts as grouped.
    assert by_layer(choose("iq4_xs", 4, heads=8), "attn_v") == " ".join(["Q5_K"] * 4)
    grouped = choose_types("iq4_xs", "granitehybrid", MixHparams(16, 8, 0), tensors).types
    assert grouped["blk.8.attn_v.weight"].name == "IQ4_XS"


@pytest.mark.parametrize("quant", QUANTS)
def test_small_matrices_stay_as_kernels_read_them(quant: str) -> None:
    """Kernels of convolutions and coefficients in F32; what llama.cpp's quantizer leaves alone in 16 bit."""
    small = ("blk.0.ssm_conv1d.weight", "blk.0.shortconv.conv.weight", "blk.0.altup_predict_coef.weight")
    kept = ("altup_proj.weight", "blk.0.laurel_l.weight", "per_layer_model_proj.weight")
    tensors = [*layout(1), *((name, (512, 512)) for name in (*small, *kept))]
    types = choose_types(quant, "gemma3n", MixHparams(1, 4, 2), tensors).types
    assert {types[name].name for name in small} == {"F32"}
    assert {types[name].name for name in kept} == {QUANTS[quant].default.name if quant in NATIVE else "BF16"}


NATIVE = ("f32", "f16", "bf16", "q8_0")


def mixture(layers: int, experts: int, inner: int = 512) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a mixture with shared experts, and with keys by head."""
    dense = [(name, shape) for name, shape in layout(layers) if "ffn" not in name]
    for layer in range(layers):
        shapes = {
            "ffn_gate_inp.weight": (experts, 256),
            "ffn_gate_exps.weight": (experts, inner, 256),
            "ffn_up_exps.weight": (experts, inner, 256),
            "ffn_down_exps.weight": (experts, 256, inner),
            "ffn_down_exps.bias": (experts, 256),
            "ffn_gate_inp_shexp.weight": (256,),
            "ffn_down_shexp.weight": (256, inner),
            "attn_k_b.weight": (4, 256, 256),
        }
        dense += [(f"blk.{layer}.{name}", shape) for name, shape in shapes.items()]
    return dense


def choose_mixture(quant: str, experts: int, inner: int = 512) -> TypeChoice:
    return choose_types(quant, "qwen3moe", MixHparams(8, 4, 2, experts), mixture(8, experts, inner))


@pytest.mark.parametrize("quant", QUANTS)
def test_what_chooses_experts_is_never_rounded(quant: str) -> None:
    types = choose_mixture(quant, 16).types
    for name in ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "ffn_down_exps.bias"):
        assert {types[f"blk.{layer}.{name}"].name for layer in range(8)} == {"F32"}


def test_experts_and_shared_ones_are_feed_forward_parts_of_their_layer() -> None:
    choice = choose_mixture("q4_k_m", 16)
    for role in ("ffn_down_exps", "ffn_down_shexp", "attn_v"):
        assert by_layer(choice, role) == BY_HAND["q4_k_m", 8][0]
    for role in ("ffn_gate_exps", "ffn_up_exps", "attn_k", "attn_output", "attn_k_b"):
        assert by_layer(choice, role) == " ".join(["Q4_K"] * 8)


@pytest.mark.parametrize("quant", [name for name in K_QUANTS if name != "mxfp4_moe"])
def test_eight_experts_and_only_eight_have_finer_attention(quant: str) -> None:
    """llama-quant.cpp: values and keys in Q8_0, what leaves attention in Q5_K for all but the two finest."""
    eight, nine = choose_mixture(quant, 8), choose_mixture(quant, 9)
    assert by_layer(eight, "attn_v") == by_layer(eight, "attn_k") == " ".join(["Q8_0"] * 8)
    fine = quant in ("q6_k", "q5_k_m")
    output = QUANTS[quant].default.name if fine else "Q5_K"
    assert by_layer(eight, "attn_output") == " ".join([output] * 8)
    assert by_layer(nine, "attn_k") == " ".join([QUANTS[quant].default.name] * 8)
    assert by_layer(nine, "attn_v") == by_layer(choose(quant, 8), "attn_v")
    assert by_layer(nine, "attn_output") == by_layer(choose(quant, 8), "attn_output")


def test_mxfp4_is_for_what_is_stacked() -> None:
    types = choose_mixture("mxfp4_moe", 16).types
    stacked = {name for name, kind in types.items() if kind.name == "MXFP4"}
    assert stacked == {name for name, shape in mixture(8, 16) if len(shape) == 3}
    rest = {kind.name for name, kind in types.items() if name not in stacked and not name.endswith("_norm.weight")}
    assert rest == {"Q8_0", "F32"}


def test_experts_whose_width_is_no_whole_block_fall_back() -> None:
    """Gemma 4's 704 and gpt-oss' 2,880: rows of what leaves the feed-forward part are no multiple of 256."""
    choice = choose_mixture("q4_k_m", 16, 704)
    assert {fallback.got.name for fallback in choice.fallbacks} == {"Q5_0", "Q8_0"}
    assert {name.split(".")[2] for name, _, _ in choice.fallbacks} == {"ffn_down_exps", "ffn_down_shexp"}
