"""Which tensor each weight of a merged model is made of; an adapter that does not belong to its base is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora.errors import ExportError
from qlora.events import Recorder
from qlora.export.merge.parts import Plan, is_multimodal, make_plan
from qlora.model.adapter_folder import read_adapter
from qlora.model.meta_model import build, linear_layers
from qlora.model.resolve import resolve
from tests.export.cases import KINDS, NF4, edit, exported, of_peft, trained
from tests.families import make_base


def test_an_adapter_of_another_shape_is_refused(tmp_path: Path, llama: Path) -> None:
    trained(llama, tmp_path / "adapter", KINDS["plain"])
    other = make_base("qwen3", tmp_path / "other", vocab=300)
    edit(tmp_path / "adapter" / "qlora.json", base=str(other), fingerprint=None)
    config = json.loads((other / "config.json").read_text())
    assert config["hidden_size"] == 64
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    wider = {name: torch.cat([t, t], 1) if "lora_A" in name else t for name, t in tensors.items()}
    save_file(wider, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(ExportError, match="here and"):
        exported(tmp_path / "adapter", out=tmp_path / "out")


def planned(base_dir: Path, adapter: Path, merge_base: str = "nf4") -> Plan:
    base = resolve(str(base_dir), "main", Recorder())
    return make_plan(base, build(base), read_adapter(adapter), merge_base, NF4)  # type: ignore[arg-type]


def test_linear_layers_are_put_into_4_bit_as_training_did_and_nothing_else(tmp_path: Path, llama: Path) -> None:
    trained(llama, tmp_path / "adapter", KINDS["some"])
    base = resolve(str(llama), "main", Recorder())
    assert not is_multimodal(base)
    linear = {f"{name}.weight" for name, _ in linear_layers(build(base).model)}
    for merge_base, coded in (("nf4", linear), ("full", set())):
        plan = planned(llama, tmp_path / "adapter", merge_base)
        assert {name for name, source in plan.merged.items() if source.storage == "coded"} == coded
        assert list(plan.merged) == list(plan.base) and set(plan.merged) == set(base.tensors)
        adapted = {name for name, source in plan.merged.items() if source.lora is not None}
        assert len(adapted) == 4 and all(name.split(".")[-2] in ("q_proj", "down_proj") for name in adapted)
        assert all(source.lora is None for source in plan.base.values())


@pytest.mark.parametrize(
    ("settings", "own_head", "parted"),
    [
        ({"target_modules": ["q_proj"]}, False, False),
        ({"target_modules": ["q_proj", "lm_head"]}, True, True),
        ({"modules_to_save": ["lm_head"]}, True, True),
        ({"trainable_token_indices": [3, 5]}, False, False),
    ],
    ids=["neither", "head", "head whole", "token rows"],
)
@pytest.mark.filterwarnings("ignore")
def test_a_tied_head_is_parted_where_it_alone_is_trained(
    tmp_path: Path, settings: dict[str, Any], own_head: bool, parted: bool
) -> None:
    base = make_base("llama", tmp_path / "base", tie=True)
    of_peft(base, tmp_path / "adapter", **settings)
    plan = planned(base, tmp_path / "adapter", "full")
    assert (plan.own_head, plan.parted) == (own_head, parted)
    assert plan.embeddings == "model.embed_tokens.weight" and "lm_head.weight" not in plan.base
    assert ("lm_head.weight" in plan.merged) is own_head
    if own_head:
        assert plan.merged["lm_head.weight"].tensor == "model.embed_tokens.weight"
