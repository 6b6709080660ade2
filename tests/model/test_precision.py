"""fp16 with its residual stream in fp32: which tensors have which type, what is refused, and what is chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qlora.errors import HardwareError, ModelError
from qlora.events import Recorder
from qlora.memory.simulate import Simulator
from qlora.memory.simulation import ModelSpec, Workload
from qlora.model import adapters, lora_functions, precision
from qlora.model.load import load_base
from qlora.model.resolve import resolve
from qlora.numerics import Numerics
from qlora.recipe.sections import LoraSection, QuantizationSection
from tests.families import FAMILIES, make_base, make_config

CPU = torch.device("cpu")


def loaded(folder: Path, recorder: Recorder | None = None, kind: str = "nf4") -> Any:
    base, section = resolve(str(folder), "main", Recorder()), QuantizationSection(type=kind)  # type: ignore[arg-type]
    return load_base(base, section, "auto", CPU, recorder or Recorder(), dtype=torch.float16)


def test_the_stream_is_in_fp32_and_layers_are_in_fp16(llama: Path) -> None:
    recorder = Recorder()
    model = loaded(llama, recorder)
    seen: dict[str, set[torch.dtype]] = {}

    def watch(name: str, module: nn.Module, args: Any, named: Any, output: Any) -> None:
        tensors = [one for one in (*args, *named.values()) if isinstance(one, torch.Tensor) and one.is_floating_point()]
        seen.setdefault(name, set()).update(one.dtype for one in tensors)
        first = output[0] if isinstance(output, tuple) else output
        seen.setdefault(f"{name} gives", set()).add(first.dtype)

    for name, module in model.named_modules():
        kind = name.rpartition(".")[2]
        if kind.isdigit() or kind in ("self_attn", "mlp", "q_proj", "down_proj", "input_layernorm", "lm_head"):
            label = "layer" if kind.isdigit() else kind
            module.register_forward_hook(
                lambda module, args, named, output, label=label: watch(label, module, args, named, output),
                with_kwargs=True,
            )
    model(input_ids=torch.arange(8)[None], use_cache=False)
    half, single = {torch.float16}, {torch.float32}
    assert seen["layer"] >= single and seen["layer gives"] == single
    for name in ("q_proj", "down_proj", "lm_head", "lm_head gives", "self_attn gives", "mlp gives"):
        assert seen[name] == half, name
    assert model.model.norm.weight.dtype == torch.float32 and model.lm_head.weight.dtype == torch.float16
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.compute_dtype == layer.quant_state.dtype == torch.float16 and layer.weight.dtype == torch.uint8
    assert model.config.dtype == torch.float16
    assert "residual stream" in recorder.of("notice")[-1].as_dict()["message"]


def test_adapters_are_in_fp16_and_what_norms_train_in_fp32(llama: Path) -> None:
    lora = LoraSection(r=4, modules_to_save=("norm",))
    model = adapters.attach(loaded(llama), lora, 1, torch.float16, functions=lora_functions.OURS)
    kinds = {name.rpartition(".")[0]: one.dtype for name, one in adapters.trainable(model).items()}
    assert {dtype for name, dtype in kinds.items() if "lora_" in name} == {torch.float16}
    assert {dtype for name, dtype in kinds.items() if "modules_to_save" in name} == {torch.float32}


@pytest.mark.parametrize(
    ("family", "functions"),
    [*((family, lora_functions.IN_TRITON) for family in FAMILIES), ("llama", lora_functions.PEFT)],
)
def test_every_operation_takes_the_types_that_it_gets(family: str, functions: str) -> None:
    """On meta, where products of two types are errors as on a GPU: the CPU's widen everything. The residual stream and
    what is kept of it are twice as large."""
    runs = []
    for dtype in (torch.bfloat16, torch.float16):
        spec = ModelSpec(
            *(make_config(family), "tiny", LoraSection(), QuantizationSection()), functions=functions, dtype=dtype
        )
        runs.append(Simulator(spec).run(Workload(1, 64, samples=2, prompt_tokens=20, new_tokens=5)))
    layers, hidden = 2, 64
    assert runs[1].held - runs[0].held >= layers * 64 * hidden * 2
    assert runs[1].kept["adapters"] == runs[0].kept["adapters"]


@pytest.mark.parametrize("what", ["weights", "activations"])
def test_what_is_over_the_range_is_refused_in_two_lines(tmp_path: Path, what: str) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_base("llama", tmp_path / "base", tie=False)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "lm_head.weight" if what == "weights" else "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].float().mul(1e6 if what == "weights" else 3e5).to(tensors[name].dtype)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="over the range of fp16") as caught:
        loaded(folder)
    assert "model.dtype" in caught.value.hint
    base = resolve(str(folder), "main", Recorder())
    load_base(base, QuantizationSection(), "auto", CPU, Recorder())  # in bf16 it is no problem


def test_a_family_that_is_known_to_overflow_is_said_where_it_did_not(tmp_path: Path) -> None:
    recorder = Recorder()
    loaded(make_base("gemma3", tmp_path / "base"), recorder)
    assert "known to go over fp16's range" in recorder.of("notice")[-1].as_dict()["message"]


@pytest.mark.parametrize(
    ("wanted", "has_bf16", "recorded", "chosen"),
    [
        ("auto", True, None, "bf16"),
        ("auto", False, None, "fp16"),
        ("fp16", True, None, "fp16"),
        ("auto", True, Numerics(dtype="fp16"), "fp16"),
        ("auto", True, Numerics(), "bf16"),  # of a version that knew bf16 alone
        ("bf16", False, None, "set model.dtype"),
        ("auto", False, Numerics(), "go on where it began"),
    ],
)
def test_what_is_chosen(
    wanted: str, has_bf16: bool, recorded: Numerics | None, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "computes_bf16", lambda device: has_bf16)
    if chosen in precision.DTYPES:
        assert precision.choose(wanted, CPU, recorded) == chosen
    else:
        with pytest.raises(HardwareError, match="bf16") as caught:
            precision.choose(wanted, CPU, recorded)
        assert chosen in caught.value.hint
