"""The adapter alone as GGUF: on a base file it is the adapter in peft; what it cannot hold is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qlora.errors import ExportError
from qlora.events import Recorder
from qlora.export.llama_cpp import runtime
from qlora.model import adapters, load
from qlora.model.resolve import resolve
from qlora.recipe.sections import LoraSection, QuantizationSection
from tests.export import llama as llama_cpp
from tests.export.cases import KINDS, export, trained
from tests.export.gguf import written
from tests.families import make_base

PLAIN = QuantizationSection(type="none")


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "plain"), ("llama", "rslora"), ("qwen2", "some"), ("phi3", "plain")]
)
def test_an_adapter_file_on_a_base_file_is_the_adapter_in_peft(tmp_path: Path, family: str, kind: str) -> None:
    """Base as F32, adapter in fp32: within 1e-4 of peft in fp32; without the adapter it is another model."""
    lora = LoraSection(r=4, alpha=16, target_modules=("qkv_proj", "down_proj")) if family == "phi3" else KINDS[kind]
    base = make_base(family, tmp_path / "base", overrides={"sliding_window": None} if family == "phi3" else None)
    trained(base, tmp_path / "adapter", lora, PLAIN)
    export(tmp_path / "adapter", "adapter-gguf", out=tmp_path / "lora")
    opened = resolve(str(base), "main", Recorder())
    model = load.load_base(opened, PLAIN, "eager", torch.device("cpu"), Recorder())
    reference = written.logprobs(adapters.open_saved(model, tmp_path / "adapter").float(), range(5, 45))
    file = written.write_base(base, tmp_path / "out")["f32"]
    rows = ((range(5, 45), range(40)),)
    found = llama_cpp.logprobs_with_adapter(file, tmp_path / "lora" / "adapter-LoRA.gguf", rows)
    assert float((found - reference).abs().max()) <= 1e-4
    bare = written.ask(file, runtime.Request(rows=rows))
    assert float((bare - reference).abs().max()) > 1e-2


def test_a_weight_that_llama_cpp_looks_for_no_adapter_of_is_named() -> None:
    """Gemma 4 and 3n multiply by some weights directly, and Gemma 3n's streams are three weights in one tensor."""
    from types import SimpleNamespace

    from qlora.export.gguf import lora
    from qlora.export.gguf.architectures import lay_out
    from tests.export.gguf.cases import shapes_of
    from tests.export.gguf.families.cases import tiny
    from tests.export.gguf.families.gemma_cases import CASES

    adapter: Any = SimpleNamespace(folder="adapter", lora={})
    for case, parameter in (
        (CASES[1], "model.altup_projections.0.weight"),
        (CASES[2], "model.per_layer_model_projection.weight"),
    ):
        model = tiny(case)
        layout = lay_out(model, shapes_of(model))
        adapter.lora = {"model.layers.0.self_attn.q_proj.weight": None}
        lora.check_layout(adapter, layout)
        adapter.lora = {parameter: None}
        with pytest.raises(ExportError, match="without a look for an adapter"):
            lora.check_layout(adapter, layout)


@pytest.mark.parametrize(("kind", "message"), [("dora", "DoRA's magnitudes"), ("whole", "trained whole")])
def test_what_an_adapter_file_cannot_hold_is_refused(tmp_path: Path, llama: Path, kind: str, message: str) -> None:
    trained(llama, tmp_path / "adapter", KINDS[kind])
    with pytest.raises(ExportError, match=message) as caught:
        export(tmp_path / "adapter", "adapter-gguf", out=tmp_path / "out")
    assert "to='gguf'" in caught.value.hint and not (tmp_path / "out").exists()
