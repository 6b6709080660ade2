"""Shapes of models that proofs make on the spot, and the largest that a machine has room for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from qlora.units import GIB


@dataclass(frozen=True)
class Shape:
    """A Llama of these sizes. `needs_bytes` is what proofs take at their peak, above the 4-bit weights too."""

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool
    needs_bytes: int


# The shapes of Llama 3.1 8B, Llama 3.2 3B and 1B (their config.json), one for CPUs, and one for whole runs. What they
# need: the estimate of 1 x 2,048 tokens at rank 16 (6.8, 3.4 and 2.2 GiB), and room for the context and for fragments.
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("8b", 4096, 14336, 32, 32, 8, 128, 128256, False, int(7.6 * GIB)),
        Shape("3b", 3072, 8192, 28, 24, 8, 128, 128256, True, int(4.4 * GIB)),
        Shape("1b", 2048, 8192, 16, 32, 8, 64, 128256, True, int(3.0 * GIB)),
        Shape("small", 512, 1536, 4, 8, 4, 64, 4096, False, GIB),
        Shape("mini", 128, 256, 2, 4, 2, 32, 512, False, GIB),
    )
}


def largest(free_bytes: int) -> Shape:
    """The largest that `free_bytes` have room for; the smallest where none has."""
    fitting = [shape for shape in SHAPES.values() if shape.needs_bytes <= free_bytes]
    return fitting[0] if fitting else SHAPES["small"]


def with_layers(shape: Shape, layers: int) -> Shape:
    return replace(shape, layers=min(layers, shape.layers))


def config_of(shape: Shape) -> Any:
    """transformers' configuration of a Llama of this shape."""
    from transformers import AutoConfig

    return AutoConfig.for_model(
        "llama",
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=8192,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
