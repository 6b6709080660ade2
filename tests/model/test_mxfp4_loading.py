"""A base in MXFP4 from its files to its stacks: the bytes as they are, in any order of files, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora.errors import ModelError
from qlora.events import Notice, Recorder
from qlora.model import experts
from qlora.model.experts import Slab
from qlora.model.load import load_base
from qlora.model.mxfp4 import Mxfp4Stack
from qlora.recipe.sections import QuantizationSection
from tests.families import split_into_shards
from tests.model.conftest import at
from tests.mxfp4 import STATED, WEIGHTS, make_base, state

CPU = torch.device("cpu")
LAYER = "model.layers.0.mlp.experts"


def opened(folder: Path, kind: str = "nf4", sink: Recorder | None = None) -> Any:
    return load_base(at(folder), QuantizationSection(type=kind), "auto", CPU, sink or Recorder())


def plain(folder: Path) -> Any:
    """As transformers opens it where it has no kernels: dequantized to bf16."""
    from transformers import AutoModelForCausalLM, Mxfp4Config

    how = Mxfp4Config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=how)
    return model.requires_grad_(False)


@pytest.mark.parametrize("shards", [1, 4])
def test_a_base_in_mxfp4_is_held_as_it_lies_in_its_files(shards: int, tmp_path: Path) -> None:
    folder = make_base(tmp_path / "base", shards=shards)
    sink = Recorder()
    model, own = opened(folder, sink=sink), plain(folder)
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    found = list(experts.projections(model))
    assert len(found) == 4
    for name, module, leaf in found:
        stack = getattr(module, leaf)
        assert isinstance(stack, Mxfp4Stack)
        assert torch.equal(stack.codes.view(tensors[f"{name}_blocks"].shape), tensors[f"{name}_blocks"])
        assert torch.equal(stack.scales.view(tensors[f"{name}_scales"].shape), tensors[f"{name}_scales"])
        weights = own.get_parameter(name).transpose(1, 2)
        assert torch.equal(stack.read(0, stack.shape[0], torch.bfloat16), weights)
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    said = [event.message for event in sink.events if isinstance(event, Notice)]
    assert any("8 experts in each of 2 layers stay in MXFP4 as published" in one and "in NF4" in one for one in said)


def test_logits_are_transformers_own_where_the_rest_is_in_16_bit(tmp_path: Path) -> None:
    """Nothing is rounded twice, rows of gate and up alternate, and the earlier value is in the low half of a byte."""
    folder = make_base(tmp_path / "base")
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        model, own = opened(folder, "none").float(), plain(folder).float()
        ours, theirs = model(input_ids=ids, use_cache=False).logits, own(input_ids=ids, use_cache=False).logits
    assert (ours - theirs).norm() / theirs.norm() < 1e-5


def test_layers_that_are_not_in_mxfp4_are_quantized_as_the_rest(tmp_path: Path) -> None:
    folder = make_base(tmp_path / "base", plain_layers=(1,))
    model, own = opened(folder), plain(folder)
    kinds = {name: type(getattr(module, leaf)) for name, module, leaf in experts.projections(model)}
    assert [kinds[name] for name in sorted(kinds)] == [Mxfp4Stack, Mxfp4Stack, Slab, Slab]
    in_16_bit = opened(folder, "none")
    name = "model.layers.1.mlp.experts.down_proj"
    assert torch.equal(in_16_bit.get_parameter(name), own.get_parameter(name))


def test_the_order_of_files_changes_neither_bytes_nor_identity(tmp_path: Path) -> None:
    folder = make_base(tmp_path / "base")
    first = opened(folder)
    tensors = load_file(folder / WEIGHTS)
    save_file(dict(reversed(tensors.items())), folder / WEIGHTS, metadata={"format": "pt"})
    split_into_shards(folder, 3)
    again = opened(folder)
    assert first.base_identity.content == again.base_identity.content
    for (name, module, leaf), (_, other, _) in zip(experts.projections(first), experts.projections(again), strict=True):
        one, two = getattr(module, leaf), getattr(other, leaf)
        assert torch.equal(one.codes, two.codes) and torch.equal(one.scales, two.scales), name


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def test_one_scale_more_is_another_base(tmp_path: Path) -> None:
    folder = make_base(tmp_path / "base")
    first = opened(folder).base_identity

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{LAYER}.down_proj_scales"][3, 5, 1] += 1

    change(folder, edit)
    assert first.difference(opened(folder).base_identity) is not None


BLOCKS, SCALES = f"{LAYER}.gate_up_proj_blocks", f"{LAYER}.gate_up_proj_scales"


@pytest.mark.parametrize(
    ("edit", "what"),
    [
        (lambda it: it.pop(SCALES), r"gate_up_proj: the scales in MXFP4 are missing \(.*gate_up_proj_scales\)"),
        (lambda it: it.pop(BLOCKS), r"gate_up_proj: the blocks in MXFP4 are missing \(.*gate_up_proj_blocks\)"),
        (lambda it: it.update({BLOCKS[6:]: it[BLOCKS].clone()}), "are both the blocks of"),
        (lambda it: it.update({SCALES[6:]: it[SCALES].clone()}), "are both the scales of"),
        (lambda it: it.update({BLOCKS[:-7]: torch.zeros(8, 64, 192).bfloat16()}), "hold the same experts"),
        (lambda it: it.update({BLOCKS: it[BLOCKS][:, :-1].clone()}), r"is \[8, 191, 2, 16\], but .*\[8, 192, 2, 16\]"),
        (lambda it: it.update({SCALES: it[SCALES][..., :1].clone()}), r"is \[8, 192, 1\], but the configuration makes"),
        (lambda it: it.update({SCALES: it[SCALES].float()}), r"is stored as F32, but the scales in MXFP4 are bytes"),
        (
            lambda it: [it.update({BLOCKS[:-7]: torch.zeros(8, 64, 192).bfloat16()}), it.pop(BLOCKS), it.pop(SCALES)],
            "config.json says that .*gate_up_proj is in MXFP4, but .*gate_up_proj is not stored so",
        ),
        (lambda it: it[SCALES].view(-1)[7:8].fill_(253), "holds a scale of 253, with which values are not finite"),
    ],
)
def test_what_is_wrong_on_the_disk_is_named_in_two_lines(edit: Any, what: str, tmp_path: Path) -> None:
    folder = make_base(tmp_path / "base")
    change(folder, edit)
    with pytest.raises(ModelError, match=what) as refusal:
        opened(folder)
    assert refusal.value.hint and "\n" not in refusal.value.what + refusal.value.hint


def test_all_but_scales_is_refused_before_a_weight_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_base(tmp_path / "base")
    change(folder, lambda it: it.pop(SCALES))
    monkeypatch.setattr("qlora.model.load.WeightReader", None)
    with pytest.raises(ModelError, match="are missing"):
        opened(folder)


def test_files_in_mxfp4_that_config_json_says_nothing_of_are_refused(tmp_path: Path) -> None:
    folder = make_base(tmp_path / "base")
    state(folder, None)
    with pytest.raises(ModelError, match=r"is in 16 bit, but .*blocks is in MXFP4"):
        opened(folder)
    state(folder, {**STATED, "modules_to_not_convert": ["model.layers.0"]})
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.experts\.down_proj is in 16 bit, but"):
        opened(folder)
