"""Experts from every form on the disk into their slabs, in any order of files, one at a time."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora.errors import ModelError
from qlora.events import Notice, Recorder
from qlora.model import experts
from qlora.model.load import load_base
from qlora.model.nf4 import quantize_rows
from qlora.model.resolve import resolve
from qlora.recipe.sections import QuantizationSection
from tests.families import split_into_shards
from tests.mixtures import FAMILIES, make_base
from tests.model.conftest import at

CPU = torch.device("cpu")
WEIGHTS = "model.safetensors"


def opened(folder: Path, kind: str = "nf4", sink: Recorder | None = None) -> Any:
    return load_base(at(folder), QuantizationSection(type=kind), "auto", CPU, sink or Recorder())


def plain(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).requires_grad_(False)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_s_base_is_loaded_as_transformers_loads_it(family: str, tmp_path: Path) -> None:
    """Every expert is the weight that `nf4` makes of transformers' own; all other tensors are its, in their types."""
    folder = make_base(family, tmp_path / "base", shards=3)
    sink = Recorder()
    model, own = opened(folder, sink=sink), plain(folder)
    slabs = 0
    for name, module, leaf in experts.projections(model):
        slab, weights = getattr(module, leaf), own.get_parameter(name)
        matrices = weights.transpose(1, 2) if module.is_transposed else weights
        for expert, matrix in enumerate(matrices):
            alone = quantize_rows(lambda start, end, of=matrix: of[start:end], slab.shape[1:], "nf4", True, CPU)
            assert torch.equal(slab.codes[expert], alone.data.view(-1)), f"{name}: expert {expert}"
            assert torch.equal(slab.absmax[expert, : slab.blocks], alone.state.absmax)
            assert torch.equal(slab.offset[expert], alone.state.offset)
        slabs += 1
    assert slabs >= 2 and any("held in 4 bit" in one.message for one in sink.events if isinstance(one, Notice))
    for name, parameter in model.named_parameters():
        if type(parameter).__name__ != "Params4bit":
            other = own.get_parameter(name)
            assert parameter.dtype == other.dtype and torch.equal(parameter, other), name
    in_16_bit = opened(folder, "none")
    assert all(torch.equal(one, own.get_parameter(name)) for name, one in in_16_bit.named_parameters())


def slabs_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: buffer for name, buffer in model.named_buffers() if ".experts." in name}


def test_shards_in_any_order_give_the_same_base(tmp_path: Path) -> None:
    """Gate and up of one expert in two files, an expert's neighbours in any: same slabs, same hash of the content."""
    folder = make_base("qwen3_moe", tmp_path / "base")
    first = opened(folder)
    split_into_shards(folder, 5)
    index = folder / "model.safetensors.index.json"
    tensors = {name: tensor for file in folder.glob("model-*.safetensors") for name, tensor in load_file(file).items()}
    for file in (*folder.glob("model-*.safetensors"), index):
        file.unlink()
    names = sorted(tensors)
    random.Random(0).shuffle(names)
    save_file({name: tensors[name] for name in names}, folder / WEIGHTS, metadata={"format": "pt"})
    split_into_shards(folder, 3)
    again = opened(folder)
    assert first.base_identity.content == again.base_identity.content
    one, other = slabs_of(first), slabs_of(again)
    assert one and one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_fused_form_of_the_disk_gives_the_same_slabs(tmp_path: Path) -> None:
    """Qwen3.5's checkpoints have all experts in one tensor, or one tensor an expert."""
    folder = make_base("qwen3_5_moe_text", tmp_path / "base")
    apart = opened(folder)
    own, tensors = plain(folder), load_file(folder / WEIGHTS)
    fused = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    fused |= {name: own.get_parameter(name).clone() for name, _, _ in experts.projections(apart)}
    assert len(fused) < len(tensors)
    save_file(fused, folder / WEIGHTS, metadata={"format": "pt"})
    together = slabs_of(opened(folder))
    assert together and all(torch.equal(buffer, together[name]) for name, buffer in slabs_of(apart).items())


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


EXPERT = "model.layers.0.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize(
    ("edit", "what"),
    [
        (lambda it: it.pop(EXPERT), r"experts.gate_up_proj: expert 3, part 2 of 2 is missing"),
        (lambda it: it.update({EXPERT.replace(".3.", ".8."): it[EXPERT].clone()}), "is of an expert beyond the 8"),
        (
            lambda it: it.update({"model.layers.0.mlp.experts.gate_up_proj": torch.zeros(8, 64, 64).bfloat16()}),
            "hold the same expert",
        ),
        (
            lambda it: it.update({EXPERT: it[EXPERT][:16].clone()}),
            r"is \[16, 64\], but the configuration makes expert 3",
        ),
        (lambda it: it.update({EXPERT: it[EXPERT] * torch.nan}), "not finite"),
    ],
)
def test_experts_that_are_wrong_on_the_disk_are_named(edit: Any, what: str, tmp_path: Path) -> None:
    folder = make_base("qwen3_moe", tmp_path / "base")
    change(folder, edit)
    with pytest.raises(ModelError, match=what) as refusal:
        opened(folder)
    assert refusal.value.hint and "\n" not in refusal.value.what + refusal.value.hint


_LOAD = """
import sys, torch, peft
from pathlib import Path
from qlora.events import Recorder
from qlora.model.load import load_base
from qlora.model.meta_model import build
from qlora.model.resolve import resolve
from qlora.recipe.sections import QuantizationSection
from qlora.third_party import import_bitsandbytes

def kib(key):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if key in line)

import_bitsandbytes()
base = resolve(sys.argv[1], "main", Recorder())
build(base)
before = kib("VmRSS:")
model = load_base(base, QuantizationSection(), "auto", torch.device("cpu"), Recorder())
held = sum(one.nbytes for one in (*model.parameters(), *model.buffers()))
print((kib("VmHWM:") - before) * 1024 - held, held)  # not getrusage's peak, which begins with the parent's
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_layer_of_576_mib_takes_100_mib_beside_its_slab(tmp_path: Path) -> None:
    """Qwen3-30B's own shape with half of its experts, cut across shards anywhere: a slab of 149 MiB."""
    from transformers import AutoConfig

    sizes = {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 64, "num_experts_per_tok": 8}
    few = {
        "num_hidden_layers": 1,
        "vocab_size": 384,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    config = AutoConfig.for_model("qwen3_moe", **sizes, **few, mlp_only_layers=[], decoder_sparse_step=1)
    folder = tmp_path / "base"
    folder.mkdir()
    config.architectures = ["Qwen3MoeForCausalLM"]
    config.save_pretrained(folder)
    names: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (384, 2048), "lm_head.weight": (384, 2048)}
    layer = "model.layers.0"
    names |= {"model.norm.weight": (2048,), f"{layer}.mlp.gate.weight": (64, 2048)}
    names |= {f"{layer}.{norm}.weight": (2048,) for norm in ("input_layernorm", "post_attention_layernorm")}
    names |= {f"{layer}.self_attn.{name}_proj.weight": (rows, 2048) for name, rows in (("q", 64), ("k", 32), ("v", 32))}
    names |= {f"{layer}.self_attn.o_proj.weight": (2048, 64)}
    names |= {f"{layer}.self_attn.{name}_norm.weight": (16,) for name in "qk"}
    for expert in range(64):
        names |= {f"{layer}.mlp.experts.{expert}.{name}_proj.weight": (768, 2048) for name in ("gate", "up")}
        names[f"{layer}.mlp.experts.{expert}.down_proj.weight"] = (2048, 768)
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator).mul_(0.02).bfloat16() for name, shape in names.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    del tensors
    split_into_shards(folder, 3)
    done = subprocess.run([sys.executable, "-c", _LOAD, str(folder)], capture_output=True, text=True, check=True)
    scratch, held = map(int, done.stdout.split()[-2:])
    assert 149 << 20 < held < 160 << 20
    assert scratch <= 100 << 20, f"{scratch / 2**20:.0f} MiB"


def test_a_base_of_experts_is_known_by_their_bytes(tmp_path: Path) -> None:
    """One value of one expert more, and it is another base."""
    folder = make_base("qwen3_moe", tmp_path / "base")
    first = opened(folder).base_identity

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[EXPERT][7, 7] += 1

    change(folder, edit)
    assert first.difference(opened(folder).base_identity) is not None
    assert resolve(str(folder), "main", Recorder()).tensors[EXPERT].shape == (32, 64)
