"""An adapter on each family, as a file of its own and merged: llama.cpp computes what PEFT's model computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qlora.errors import ExportError
from qlora.events import Recorder
from qlora.export.gguf import lora
from qlora.model import adapters, load
from qlora.model.resolve import resolve
from qlora.recipe.sections import LoraSection, QuantizationSection
from tests.export import llama
from tests.export.cases import export, trained
from tests.export.gguf import written
from tests.export.gguf.families.cases import EXACT, SEEN, Case, divergence, make_base, marked, rows
from tests.export.gguf.families.dense_cases import CASES as DENSE
from tests.export.gguf.families.gemma_cases import CASES as GEMMA
from tests.export.gguf.families.mixture_cases import CASES as MIXTURES
from tests.export.gguf.families.recurrent_cases import CASES as RECURRENT

PLAIN = QuantizationSection(type="none")
# Rows of q and k change places; columns move, and so do the rows of a weight that is several parts.
FAST = ("granite", "qwen3_5_text")
# Fused gate and up; windows and one norm; own names of layers; norms stored less 1; all that is no plain trunk.
SLOW = ("glm4", "cohere2", "phi", "nemotron", *(case.model_type for case in (*GEMMA, *RECURRENT)))
OF_MANY = ("glm4", "cohere2", "gemma3n_text", "falcon_h1", "deepseek_v3", "gpt_oss")  # what CI runs beside FAST
FIRST = {case.model_type: case for case in reversed((*DENSE, *GEMMA, *RECURRENT))}
OF_MIXTURES = {case.model_type: case for case in reversed(MIXTURES)}
LATENT = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite")
# llama.cpp multiplies by these without a look for adapters: alone they would be passed over (KL 1.5e-3 here).
NOT_ALONE = {"gemma3n_text": "altup_(?:router|proj)", "gemma4_text": "per_layer_model_proj"}
# Its reference keeps the multipliers of the mixer's rows, a buffer, as bf16 trained with them.
ROUNDED = {"falcon_h1": 1e-5}


@pytest.mark.parametrize("case", marked([*FIRST.values()], (*FAST, *SLOW), FAST, OF_MANY))
def test_an_adapter_alone_and_merged_is_the_adapter_in_peft(tmp_path: Path, case: Case) -> None:
    is_the_adapter(tmp_path, case, LoraSection(r=4, alpha=16))


@pytest.mark.parametrize("case", marked([*OF_MIXTURES.values()], OF_MIXTURES, ("qwen3_moe",), OF_MANY))
def test_an_adapter_beside_experts_alone_and_merged(tmp_path: Path, case: Case) -> None:
    """Of attention on latents, what llama.cpp looks for an adapter of: what leaves it, and shared experts."""
    named = ("o_proj", "shared_experts.up_proj") if case.model_type in LATENT else "all-linear"
    is_the_adapter(tmp_path, case, LoraSection(r=4, alpha=16, target_modules=named))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"])
def test_what_llama_cpp_passes_over_is_refused(tmp_path: Path, name: str) -> None:
    """A file of it would load and change nothing: with the refusal taken out, the base answers."""
    base = make_base(OF_MIXTURES["glm4_moe_lite"], tmp_path / "base")
    trained(base, tmp_path / "adapter", LoraSection(r=4, alpha=16, target_modules=(name,)), PLAIN)
    with pytest.raises(ExportError, match="without a look for an adapter"):
        export(tmp_path / "adapter", "adapter-gguf", out=tmp_path / "alone", verify=False)
    if name == "kv_b_proj":  # no matrix of its own in the file
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora, "check_layout", lambda adapter, layout: None)
        export(tmp_path / "adapter", "adapter-gguf", out=tmp_path / "alone", verify=False)
    file = written.write_base(base, tmp_path / "out")["f32"]
    asked = tuple((row, range(len(row))) for row in rows())
    with_adapter = llama.logprobs_with_adapter(file, next((tmp_path / "alone").rglob("*LoRA.gguf")), asked)
    assert torch.equal(with_adapter, llama.logprobs(file, asked))


def is_the_adapter(tmp_path: Path, case: Case, section: LoraSection) -> None:
    base = make_base(case, tmp_path / "base")
    trained(base, tmp_path / "adapter", section, PLAIN)
    opened = resolve(str(base), "main", Recorder())
    model = load.load_base(opened, PLAIN, "eager", torch.device("cpu"), Recorder())
    model = adapters.open_saved(model, tmp_path / "adapter").float()
    case.adjust(model)
    reference = torch.cat([written.logprobs(model, row) for row in rows()])
    asked = tuple((row, range(len(row))) for row in rows())
    exact = ROUNDED.get(case.model_type, EXACT)
    export(tmp_path / "adapter", "gguf", quants=("f32",), out=tmp_path / "made", verify=False)
    file = written.write_base(base, tmp_path / "out")["f32"]
    assert divergence(reference, llama.logprobs(file, asked)) > SEEN
    assert divergence(reference, llama.logprobs(next((tmp_path / "made").rglob("*F32.gguf")), asked)) <= exact
    if (weight := NOT_ALONE.get(case.model_type)) and not case.mixture:
        with pytest.raises(ExportError, match=f"{weight}.weight without a look for an adapter"):
            export(tmp_path / "adapter", "adapter-gguf", out=tmp_path / "alone", verify=False)
        return
    export(tmp_path / "adapter", "adapter-gguf", out=tmp_path / "alone", verify=False)
    with_adapter = llama.logprobs_with_adapter(file, next((tmp_path / "alone").rglob("*LoRA.gguf")), asked)
    assert divergence(reference, with_adapter) <= exact


@pytest.mark.slow
@pytest.mark.parametrize("case", marked([*RECURRENT[:1], *RECURRENT[4:5]], FIRST, ()))
def test_a_file_of_a_weight_in_several_parts_is_reopened_and_compared(tmp_path: Path, case: Case) -> None:
    """Verified as every export is: each weight in its place, its delta once, by parts and by moved rows and columns."""
    base = make_base(case, tmp_path / "base")
    trained(base, tmp_path / "adapter", LoraSection(r=4, alpha=16))
    report = export(tmp_path / "adapter", "gguf", quants=("q8_0",), out=tmp_path / "made", merge_base="nf4")
    assert report.checks and all(holds for _, _, holds, _ in report.checks)
