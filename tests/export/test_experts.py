"""Adapters on experts are merged as peft merges them, into the base's own tensors and names, each exactly once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora.errors import ExportError
from qlora.events import Recorder
from qlora.export.merge import experts as merged_experts
from qlora.export.merge.experts import parts_of_experts
from qlora.export.verify import candidates
from qlora.model import experts
from qlora.model.adapter_folder import read_adapter
from qlora.model.meta_model import build
from qlora.model.resolve import resolve
from qlora.recipe.sections import LoraSection, QuantizationSection
from tests.export.cases import NF4, exported, kl, logits, merge_of, of_peft, opened, trained
from tests.mixtures import make_base, narrow
from tests.sampling import sampled

PLAIN = QuantizationSection(type="none")
LORA = LoraSection(r=4, alpha=16, experts=True)
ON_NF4: dict[str, Any] = {"merge_base": "nf4", "quantization": NF4, "dtype": torch.bfloat16}
# A tensor an expert (gate, up and down; w1, w3 and w2), all of them in one (as they are, and transposed).
FEW = ("qwen3_moe", "gpt_oss", "granitemoe")
MORE = ("mixtral", "gemma4_text", "glm4_moe_lite", "qwen3_5_moe_text", "nemotron_h", "lfm2_moe", "jamba")
FORMS = sampled((*FEW, *MORE), *FEW)


def base_of(family: str, folder: Path, shape: str = "wide") -> Path:
    return make_base(family, folder, shards=2, overrides=narrow(family) if shape == "narrow" else None)


def merged(base: Path, adapter: Path, **how: Any) -> dict[str, Tensor]:
    """By the parameters of the causal model; in fp32 on the original weights, unless `how` says otherwise."""
    merge = merge_of(base, adapter, **how)
    found = resolve(str(base), "main", Recorder())
    weights = candidates.with_experts(candidates.of_merge(merge.tensors()), build(found), found)
    return {name: make() for name, make in weights.items()}


@pytest.mark.parametrize("shape", ["wide", "narrow"])
@pytest.mark.parametrize("family", FORMS)
def test_merged_is_what_peft_merges(family: str, shape: str, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = base_of(family, tmp_path / "base", shape)
    trained(base, tmp_path / "adapter", LORA, PLAIN)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(plain, str(tmp_path / "adapter"), autocast_adapter_dtype=False)
    wanted = model.merge_and_unload().state_dict()
    before = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    ours = merged(base, tmp_path / "adapter")
    stacked = {name for name, _, _ in experts.projections(plain)}
    assert len(stacked) >= 2
    for name in stacked:
        assert not torch.equal(wanted[name], before[name]), name
    for name, value in wanted.items():
        if name in ours:
            assert float((ours[name].float() - value).abs().max()) <= 1e-6 * float(value.abs().max()), name
    assert ours.keys() >= stacked


@pytest.mark.parametrize("family", FORMS)
def test_merged_on_nf4_is_the_trained_model_in_published_names(family: str, tmp_path: Path) -> None:
    base = base_of(family, tmp_path / "base")
    model = trained(base, tmp_path / "adapter", LORA)
    done = exported(tmp_path / "adapter", out=tmp_path / "out")
    assert done.merge_base == "nf4"
    untuned = kl(logits(model), logits(opened(base)))
    assert untuned > 0.01, "the adapter changes too little to be seen"
    assert kl(logits(model), logits(opened(tmp_path / "out"))) < min(
        0.01, untuned / 5
    )  # bf16 of recurrent layers: 0.004
    before, after = (
        {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for folder in (base, tmp_path / "out")
    )
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in before.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in after.items()
    }


def test_nf4_and_its_delta_are_added_in_fp32_and_rounded_once(tmp_path: Path) -> None:
    base = base_of("qwen3_moe", tmp_path / "base", "narrow")
    model = trained(base, tmp_path / "adapter", LORA)
    found = merged(base, tmp_path / "adapter", **ON_NF4)
    from qlora.model import expert_lora

    adapters = dict(expert_lora.adapted(model.get_base_model()))
    for name, module, leaf in experts.projections(model.get_base_model()):
        lora = adapters[name]
        low, high = lora.lora_A.detach().float(), lora.lora_B.detach().float()
        delta = torch.einsum("ero,eri->eoi", high, low) * lora.scale
        slab = getattr(module, leaf)
        wanted = slab.read(0, slab.shape[0], torch.bfloat16).float() + delta
        assert float((found[name].float() - wanted).abs().max()) <= 2**-8 * float(wanted.abs().max())
        assert (found[name] == wanted.bfloat16()).float().mean() > 0.99  # but for sums in another order


def planned(base: Path, adapter: Path) -> Any:
    found = resolve(str(base), "main", Recorder())
    return found, build(found), read_adapter(adapter)


def test_every_expert_has_its_places_and_none_is_left_out(tmp_path: Path) -> None:
    base = base_of("qwen3_moe", tmp_path / "base")
    trained(base, tmp_path / "adapter", LORA, PLAIN)
    folder, meta_model, adapter = planned(base, tmp_path / "adapter")
    parts = parts_of_experts(folder, meta_model, adapter, None)
    assert len(parts) == 2 * 8 * 3 and {part.parameter for part in parts.values()} == set(adapter.experts)
    for pieces_of in (lambda pieces: pieces[:-1], lambda pieces: (*pieces, pieces[0]), lambda pieces: pieces[1:]):
        broken = {name: pieces_of(pieces) for name, pieces in meta_model.experts.items()}
        with pytest.raises(ExportError, match="would not be used exactly once"):
            parts_of_experts(folder, replace(meta_model, experts=broken), adapter, None)
    with pytest.raises(ExportError, match="is not in the base"):
        parts_of_experts(folder, replace(meta_model, experts={}), adapter, None)


def test_what_changes_nothing_is_an_error_and_what_was_never_hit_is_not(tmp_path: Path) -> None:
    base = base_of("qwen3_moe", tmp_path / "base")
    trained(base, tmp_path / "adapter", LORA, PLAIN)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if ".experts." in name and ".lora_B." in name:
            tensor[:, 3::8] = 0  # expert 3 of all
    save_file(tensors, file)
    exported(tmp_path / "adapter", out=tmp_path / "out")
    before, after = (
        {name: tensor for one in folder.glob("*.safetensors") for name, tensor in load_file(one).items()}
        for folder in (base, tmp_path / "out")
    )
    of_experts = [name for name in before if ".experts." in name]
    still = {name for name in of_experts if torch.equal(before[name], after[name])}
    assert still == {name for name in of_experts if ".experts.3." in name} and len(still) == 6
    merge = merge_of(base, tmp_path / "adapter")
    source = next(one for one in merge.plan.merged.values() if one.expert is not None)
    dead = replace(source.expert, adapter=replace(source.expert.adapter, alpha=1e-300))
    with pytest.raises(ExportError, match="changes nothing of it"):
        list(merged_experts.merged_blocks(dead, 1, torch.device("cpu"), merged_experts.Reading()))


def test_blocks_are_small_and_rows_of_coded_experts_are_their_slab_s(tmp_path: Path, monkeypatch: Any) -> None:
    """Rows that begin in the middle of a block of 64 values, gate's and up's, in blocks of a few rows."""
    base = base_of("qwen3_moe", tmp_path / "base", "narrow")
    trained(base, tmp_path / "adapter", LORA)
    wanted = merged(base, tmp_path / "adapter", **ON_NF4)
    monkeypatch.setattr(merged_experts, "VALUES_PER_BLOCK", 5 * 64)
    tensors = merge_of(base, tmp_path / "adapter", **ON_NF4).tensors()
    blocks = [block.shape for tensor in tensors if ".experts." in tensor.name for block in tensor.blocks(1)]
    assert max(shape.numel() for shape in blocks) <= 5 * 64
    found = merged(base, tmp_path / "adapter", **ON_NF4)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("targets", [["experts.gate_up_proj", "experts.down_proj"], ["1.mlp.experts.down_proj"]])
def test_another_trainer_s_adapter_is_merged_as_peft_merges_it(targets: list[str], tmp_path: Path) -> None:
    """One wrapper alone, whose name does not say which projection it is on, and ranks of their own."""
    base = base_of("qwen3_moe", tmp_path / "base", "narrow")
    keys = {"target_modules": ["q_proj"], "rank_pattern": {"experts.gate_up_proj": 6}, "use_rslora": True}
    model = of_peft(base, tmp_path / "adapter", target_parameters=targets, **keys)
    ours, wanted = merged(base, tmp_path / "adapter"), model.merge_and_unload().state_dict()
    for name, value in wanted.items():
        assert float((ours[name].float() - value).abs().max()) <= 1e-6 * float(value.abs().max()), name


def test_what_has_no_place_in_it_is_refused_by_name(tmp_path: Path) -> None:
    """Adapters on experts are not combined, and stand in no adapter file."""
    from qlora import api
    from qlora.export import combine
    from qlora.export.combination import Combination
    from qlora.export.gguf import lora

    base = base_of("qwen3_moe", tmp_path / "base")
    trained(base, tmp_path / "adapter", LORA, PLAIN)
    adapter = read_adapter(tmp_path / "adapter")
    members = [combine.Member(name, adapter, 0.5) for name in ("one", "other")]
    for refused in (lambda: combine.check(members, Combination((0.5, 0.5))), lambda: lora.check(adapter)):
        with pytest.raises(ExportError, match="adapters on experts") as refusal:
            refused()
        assert refusal.value.hint
    with pytest.raises(ExportError):
        api.merge_and_export(tmp_path / "adapter", to="adapter-gguf", out=tmp_path / "out")
