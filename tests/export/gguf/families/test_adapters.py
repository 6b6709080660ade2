"""An adapter on each family, as a file of its own and merged: llama.cpp computes what PEFT's model computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qlora.events import Recorder
from qlora.model import adapters, load
from qlora.model.resolve import resolve
from qlora.recipe.sections import LoraSection, QuantizationSection
from tests.export import llama
from tests.export.cases import export, trained
from tests.export.gguf import written
from tests.export.gguf.families.cases import EXACT, SEEN, Case, divergence, make_base, marked, rows
from tests.export.gguf.families.dense_cases import CASES

PLAIN = QuantizationSection(type="none")
FAST = ("granite",)  # its rows of q and k change places
FIRST = {case.model_type: case for case in reversed(CASES)}


@pytest.mark.parametrize("case", marked([*FIRST.values()], FIRST, FAST))
def test_an_adapter_alone_and_merged_is_the_adapter_in_peft(tmp_path: Path, case: Case) -> None:
    base = make_base(case, tmp_path / "base")
    trained(base, tmp_path / "adapter", LoraSection(r=4, alpha=16), PLAIN)
    opened = resolve(str(base), "main", Recorder())
    model = load.load_base(opened, PLAIN, "eager", torch.device("cpu"), Recorder())
    model = adapters.open_saved(model, tmp_path / "adapter").float()
    reference = torch.cat([written.logprobs(model, row) for row in rows()])
    asked = tuple((row, range(len(row))) for row in rows())
    export(tmp_path / "adapter", "adapter-gguf", "gguf", quants=("f32",), out=tmp_path / "made", verify=False)
    file = written.write_base(base, tmp_path / "out")["f32"]
    with_adapter = llama.logprobs_with_adapter(file, next((tmp_path / "made").rglob("*LoRA.gguf")), asked)
    assert divergence(reference, with_adapter) <= EXACT
    assert divergence(reference, llama.logprobs(file, asked)) > SEEN
    assert divergence(reference, llama.logprobs(next((tmp_path / "made").rglob("*F32.gguf")), asked)) <= EXACT
