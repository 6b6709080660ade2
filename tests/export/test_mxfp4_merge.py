"""Experts in MXFP4 through a merge: their bytes as they are, or all of them in 16 bit where an adapter is on one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora.events import Recorder
from qlora.export.hf import patched_config
from qlora.export.merge.merge import Merge
from qlora.export.merge.parts import make_plan
from qlora.export.verify import candidates, weights_child
from qlora.model.adapter_folder import read_adapter
from qlora.model.meta_model import build
from qlora.model.resolve import resolve
from qlora.model.tensors import read_header
from tests.export.cases import KINDS, NF4, exported, merge_of, trained, whole
from tests.mixtures import make_base as make_plain
from tests.mxfp4 import STATED, make_base

LAYER = "model.layers.0.mlp.experts"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = make_base(tmp_path / "base")
    trained(folder, tmp_path / "adapter", KINDS["plain"])
    return folder


def own_of(base: Path) -> dict[str, torch.Tensor]:
    """Parameters as transformers itself decodes them."""
    from transformers import AutoModelForCausalLM, Mxfp4Config

    how = Mxfp4Config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=how)
    return dict(model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_codes_and_scales_are_written_as_they_are(dtype: torch.dtype, base: Path, tmp_path: Path) -> None:
    merge = merge_of(base, tmp_path / "adapter", dtype=dtype)
    stored = load_file(base / "model.safetensors")
    packed = [tensor for tensor in merge.tensors() if tensor.name.endswith(("_blocks", "_scales"))]
    assert len(packed) == 8
    for tensor in packed:
        assert tensor.dtype == torch.uint8 and torch.equal(whole(tensor), stored[tensor.name])
    assert json.loads(patched_config(merge))["quantization_config"] == STATED
    assert merge.plan.in_mxfp4


def on_an_expert(base: Path, adapter: Path, tmp_path: Path) -> Merge:
    """A merge of an adapter that has changed one projection of experts, as one that is trained whole does."""
    found, name = resolve(str(base), "main", Recorder()), f"{LAYER}.down_proj"
    changed = own_of(base)[name].detach() + 1
    save_file({name: changed.contiguous()}, tmp_path / "whole.safetensors")
    own = replace(read_adapter(adapter), whole=read_header(tmp_path / "whole.safetensors"))
    plan = make_plan(found, build(found), own, "full", NF4)
    return Merge(found, own, "full", NF4, torch.device("cpu"), plan)


def test_with_an_expert_changed_all_are_written_in_16_bit(base: Path, tmp_path: Path) -> None:
    """In the published sides (E, in, out), and config.json says nothing of MXFP4 any more."""
    merge, own = on_an_expert(base, tmp_path / "adapter", tmp_path), own_of(base)
    tensors = {tensor.name: tensor for tensor in merge.tensors()}
    names = [name for name in own if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    assert len(names) == 4 and not merge.plan.in_mxfp4
    for name in names:
        values = whole(tensors[name])
        assert tensors[name].dtype == torch.bfloat16 and tensors[name].shape == own[name].shape
        assert torch.equal(values, own[name] + (1 if name == f"{LAYER}.down_proj" else 0)), name
    assert not any(name.endswith(("_blocks", "_scales")) for name in tensors)
    assert "quantization_config" not in json.loads(patched_config(merge))
    assert f"{LAYER}.down_proj" in merge.changed and f"{LAYER}.gate_up_proj" not in merge.changed


def test_candidates_compute_with_what_is_in_mxfp4(base: Path, tmp_path: Path) -> None:
    """Of a merge and of a folder, by the parameter's name and sides; in 16 bit where the merge is."""
    own, found = own_of(base), resolve(str(base), "main", Recorder())
    meta_model = build(found)
    merged = candidates.of_merge(merge_of(base, tmp_path / "adapter", dtype=torch.bfloat16).tensors())
    for weights in (candidates.of_folder(meta_model, found), candidates.with_experts(merged, meta_model, found)):
        for name in meta_model.experts:
            assert torch.equal(weights[name](), own[name]), name
    changed = candidates.of_merge(on_an_expert(base, tmp_path / "adapter", tmp_path).tensors())
    weights = candidates.with_experts(changed, meta_model, found)
    assert torch.equal(weights[f"{LAYER}.down_proj"](), own[f"{LAYER}.down_proj"] + 1)


@pytest.mark.parametrize("name", [f"{LAYER}.down_proj_blocks", f"{LAYER}.gate_up_proj_scales"])
def test_one_byte_of_an_expert_that_is_not_the_base_s_is_seen(name: str, base: Path, tmp_path: Path) -> None:
    folder = exported(tmp_path / "adapter", out=tmp_path / "out", merge_base="full").folder
    merge = merge_of(base, tmp_path / "adapter", dtype=torch.bfloat16)

    def wrong() -> list[str]:
        file = weights_child.open_folder(folder, merge, "BF16")
        weights_child.compare_weights(merge, [file])
        return [detail for _, ok, detail in file.conclude() if not ok]

    assert wrong() == []
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[77] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})
    (found,) = wrong()
    assert name in found and "differs in 1 of" in found


def test_a_plain_copy_of_gpt_oss_is_merged_as_before(tmp_path: Path) -> None:
    base = make_plain("gpt_oss", tmp_path / "base")
    trained(base, tmp_path / "adapter", KINDS["plain"])
    merge = merge_of(base, tmp_path / "adapter", dtype=torch.bfloat16)
    assert not merge.plan.in_mxfp4 and {tensor.dtype for tensor in merge.tensors()} == {torch.bfloat16}


def test_adapters_on_experts_are_added_to_the_published_values(tmp_path: Path) -> None:
    """As peft adds them to what transformers decodes, on either base: experts have one form in both."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, Mxfp4Config

    base = make_base(tmp_path / "base")
    trained(base, tmp_path / "adapter", KINDS["plain"].model_copy(update={"experts": True}))
    how = Mxfp4Config(dequantize=True)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=how).float()
    model = PeftModel.from_pretrained(plain, str(tmp_path / "adapter"), autocast_adapter_dtype=False)
    wanted = model.merge_and_unload().state_dict()
    for merge_base in ("full", "nf4"):
        merge = merge_of(base, tmp_path / "adapter", merge_base=merge_base, quantization=NF4)
        tensors = {tensor.name: tensor for tensor in merge.tensors()}
        names = [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
        assert len(names) == 4 and set(names) <= set(merge.changed)
        for name in names:
            assert float((whole(tensors[name]) - wanted[name]).abs().max()) <= 1e-6 * float(wanted[name].abs().max())
