"""The keys of [memory] that say where of a model is what, and what of them does not go together."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qlora.recipe_values import Section

Check = tuple[bool, str, str, str]  # whether it is wrong, the key, what and what to do


class PlaceKeys(Section):
    """Where weights and what waits for the backward pass are."""

    stream_weights: bool | Literal["auto"] = Field(
        "auto", description="Keep the frozen layers in the host's memory and copy each to the GPU as it is computed"
    )
    shard_weights: bool | Literal["auto"] = Field(
        "auto",
        description="With several processes: each keeps its part of every frozen layer and gathers a layer as it is "
        "computed; auto: where a card has no room for all",
    )
    offload_activations: bool | Literal["auto"] = Field(
        "auto",
        description="Inputs of recomputed layers wait in the host's memory (0.25 GiB per 1,000 tokens of an 8B model); "
        "no number changes",
    )
    embedding: Literal["auto", "device", "host"] = Field(
        "auto", description="Where embeddings are looked up; with streamed weights, the head is there too"
    )


def checks(memory: PlaceKeys, recompute: bool | int | str) -> tuple[Check, ...]:
    """What no single key shows; `recompute` is train.gradient_checkpointing."""
    return (
        (
            memory.offload_activations is True and recompute is False,
            "memory.offload_activations",
            "memory.offload_activations = true, but train.gradient_checkpointing = false recomputes no layer",
            'inputs of recomputed layers alone can wait on the host: gradient_checkpointing = "auto" recomputes some',
        ),
        (
            memory.stream_weights is True and str(recompute) not in ("True", "auto"),
            "train.gradient_checkpointing",
            "memory.stream_weights recomputes every layer: its weights are gone before the backward pass",
            'set train.gradient_checkpointing = "auto" or true, or memory.stream_weights = false',
        ),
        (
            memory.shard_weights is True and str(recompute) not in ("True", "auto"),
            "train.gradient_checkpointing",
            "memory.shard_weights recomputes every layer: its weights are gone before the backward pass",
            'set train.gradient_checkpointing = "auto" or true, or memory.shard_weights = false',
        ),
        (
            memory.shard_weights is True and memory.stream_weights is True,
            "memory.shard_weights",
            "memory.shard_weights and memory.stream_weights say where the same layers are",
            "take one of the two lines out: shared layers are on the cards, streamed ones in the host's memory",
        ),
    )
