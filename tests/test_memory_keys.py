"""What of [memory] does not go together is said of the key that a person wrote."""

from __future__ import annotations

import pytest

from qlora.memory_keys import PlaceKeys, checks

WRONG: dict[str, tuple[PlaceKeys, bool | int | str]] = {
    "train.gradient_checkpointing": (PlaceKeys(shard_weights=True), False),
    "memory.shard_weights": (PlaceKeys(shard_weights=True, stream_weights=True), "auto"),
    "memory.offload_activations": (PlaceKeys(offload_activations=True), False),
}


@pytest.mark.parametrize("key", WRONG)
def test_what_does_not_go_together(key: str) -> None:
    (found,) = [one for one in checks(*WRONG[key]) if one[0]]
    assert found[1] == key and key.partition(".")[2] in found[2] + found[3]


@pytest.mark.parametrize("recompute", ["auto", True])
def test_layers_that_are_shared_are_recomputed(recompute: bool | str) -> None:
    assert not any(one[0] for one in checks(PlaceKeys(shard_weights=True), recompute))
    assert any(one[0] for one in checks(PlaceKeys(shard_weights=True), 4)), "the others would be kept"
