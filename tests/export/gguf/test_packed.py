"""MXFP4 as published into ggml's bytes: bit for bit by gguf's decoder, computed by llama.cpp, verified by exports."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader

from qlora.errors import ExportError
from qlora.events import Recorder
from qlora.export.gguf import packed
from qlora.export.gguf.plan import Tokens, plan
from qlora.export.verify import candidates
from qlora.model import mxfp4
from qlora.model.resolve import resolve
from qlora.recipe.sections import LoraSection
from tests.export import llama
from tests.export.cases import export, trained
from tests.export.gguf import written
from tests.mxfp4 import make_base

FIELDS = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}, "hidden_size": 64, "intermediate_size": 32}


def test_every_code_and_scale_means_the_same_to_gguf() -> None:
    """All pairs of codes, all scales of finite values: gguf's decoder gives ours, and unpacked they are the same."""
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 1, 16).repeat(1, 16, 1, 1)[:, :253]
    scales = torch.arange(253, dtype=torch.uint8).view(1, 253, 1)
    stored = packed.repack(blocks, scales)
    assert stored.shape == (1, 253, 17) and torch.equal(stored[..., 0], scales[..., 0])
    theirs = gguf.quants.dequantize(stored.numpy(), GGMLQuantizationType.MXFP4)
    ours = mxfp4.decoded(blocks, scales, torch.float32).numpy()
    assert np.array_equal(theirs, ours)  # but for the sign of zero, which ggml's table of whole numbers does not have
    assert torch.equal(packed.unpack(stored, "blocks"), blocks)
    assert torch.equal(packed.unpack(stored, "scales"), scales)


def test_values_j_and_j_plus_16_share_a_byte() -> None:
    codes = torch.arange(32) % 16
    blocks = (codes[0::2] | codes[1::2] << 4).to(torch.uint8).view(1, 1, 1, 16)
    stored = packed.repack(blocks, torch.full((1, 1, 1), 99, dtype=torch.uint8))
    assert stored.flatten().tolist() == [99, *(value | value << 4 for value in range(16))]


def written_as(folder: Path, out: Path, *quants: str) -> dict[str, Path]:
    return written.write_base(folder, out, quants)


def test_experts_stay_as_published_and_are_computed(tmp_path: Path) -> None:
    """In every quant the same bytes: gate and up parted row by row, values those of transformers."""
    base = make_base(tmp_path / "base", shards=2, overrides=FIELDS)
    files = written_as(base, tmp_path / "out", "f32", "q8_0")
    readers = {quant: {one.name: one for one in GGUFReader(file).tensors} for quant, file in files.items()}
    opened = resolve(str(base), "main", Recorder())
    for layer in range(2):
        whole = {
            name: mxfp4.decoded(
                *(found[f"model.layers.{layer}.mlp.experts.{name}_{form}"] for form in mxfp4.FORMS), torch.float32
            )
            for name in ("gate_up_proj", "down_proj")
            for found in [{one.name: torch.cat([*one.blocks(1)]) for one in written.plain_tensors(opened)}]
        }
        wanted = {
            "gate": whole["gate_up_proj"][:, ::2],
            "up": whole["gate_up_proj"][:, 1::2],
            "down": whole["down_proj"],
        }
        for name, values in wanted.items():
            for stored in readers.values():
                entry = stored[f"blk.{layer}.ffn_{name}_exps.weight"]
                assert entry.tensor_type.name == "MXFP4"
                assert np.array_equal(gguf.quants.dequantize(entry.data, entry.tensor_type), values.numpy())
    planned = plan(opened, None, Tokens(), ("q4_k_m",))
    assert any("stay in MXFP4" in notice for notice in planned.notices)
    weights = candidates.of_gguf(files["f32"], plan(opened, None, Tokens(), ()).layout.tensors)
    for tensor in written.plain_tensors(opened):
        if tensor.parameter.endswith(mxfp4.FORMS):
            assert torch.equal(weights[tensor.parameter](), torch.cat([*tensor.blocks(1)])), tensor.parameter


def test_llama_cpp_computes_the_published_experts(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Mxfp4Config

    base = make_base(tmp_path / "base", overrides=FIELDS)
    file = written_as(base, tmp_path / "out", "f32")["f32"]
    how = {"quantization_config": Mxfp4Config(dequantize=True), "attn_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **how).eval().float()
    row = torch.randint(10, 380, (40,), generator=torch.Generator().manual_seed(3)).tolist()
    found = llama.logprobs(file, ((row, range(40)),))
    # ggml multiplies MXFP4 by activations of 8 bit a block: a product is exact to a hundredth, not to a rounding.
    assert float((found - written.logprobs(model, row)).abs().mean()) < 0.05


@pytest.mark.parametrize("kept", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_an_export_is_verified_byte_by_byte(kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes and scales are compared as bytes; scales of another expert are found."""
    base = make_base(tmp_path / "base", overrides=FIELDS)
    trained(base, tmp_path / "adapter", LoraSection(r=4, alpha=16))
    if not kept:
        own = packed.repack
        monkeypatch.setattr(packed, "repack", lambda blocks, scales: own(blocks, (scales + 1) % 200))
        with pytest.raises(ExportError, match=r"other weights: .*differs in"):
            export(tmp_path / "adapter", "gguf", quants=("f16",), out=tmp_path / "made", merge_base="nf4")
        return
    report = export(tmp_path / "adapter", "gguf", quants=("f16", "q8_0"), out=tmp_path / "made", merge_base="nf4")
    assert report.checks and all(holds for _, _, holds, _ in report.checks)
