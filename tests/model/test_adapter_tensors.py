"""Each tensor of an adapter's file is one of what an adapter can hold, under one name, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qlora.errors import ExportError
from qlora.model.adapter_tensors import ADAPTER_FILE, read_tensors

LAYER = "model.layers.0.self_attn.q_proj"


def written(folder: Path, *names: str) -> Path:
    save_file({name: torch.ones(4, 4) for name in names}, folder / ADAPTER_FILE)
    return folder


def test_kinds_are_told_by_their_names(tmp_path: Path) -> None:
    found = read_tensors(
        written(
            tmp_path,
            f"base_model.model.{LAYER}.lora_A.default.weight",
            f"base_model.model.{LAYER}.lora_B.default.weight",
            "base_model.model.lm_head.modules_to_save.default.weight",
            "base_model.model.model.embed_tokens.lora_embedding_A",
            "base_model.model.model.embed_tokens.lora_embedding_B",
            "base_model.model.model.embed_tokens.base_layer.weight",
            "base_model.model.model.norm.weight",
        )
    )
    assert set(found.roles["a"]) == set(found.roles["b"]) == {LAYER}
    assert set(found.roles["embedding_a"]) == {"model.embed_tokens"} and set(found.under) == {
        "model.embed_tokens.weight"
    }
    assert set(found.whole) == {"lm_head.weight", "model.norm.weight"} and found.idle == ()
    assert f"{LAYER}.lora_A.weight" in found.all and "lm_head.weight" in found.all and len(found.all) == 7
    assert found.stored[LAYER] == LAYER


def test_modules_keep_the_names_that_patterns_mean(tmp_path: Path) -> None:
    name = "model.language_model.layers.0.self_attn.q_proj"
    written(tmp_path, *(f"base_model.model.{name}.lora_{letter}.weight" for letter in "AB"))
    assert read_tensors(tmp_path).stored == {LAYER: name}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((f"{LAYER}.lora_B.weight",), "has no lora_A"),
        ((f"{LAYER}.lora_magnitude_vector",), "has no lora_A"),
        ((f"{LAYER}.lora_A.weight", f"{LAYER}.lora_A.default.weight"), "is there twice"),
        ((f"{LAYER}.lora_A.weight", f"model.language_model.{LAYER.removeprefix('model.')}.lora_A.weight"), "twice"),
        (("visual.blocks.0.attn.qkv.lora_A.weight", "visual.blocks.0.attn.qkv.lora_B.weight"), "its visual"),
        (("model.audio_tower.norm.weight",), "1 modules of its audio_tower"),
    ],
)
def test_what_has_no_place_is_refused_by_name(names: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        read_tensors(written(tmp_path, *names))
