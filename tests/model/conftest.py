"""Tiny bases, made once a session and shared by the tests of this room."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora.events import Recorder
from qlora.model.hub import BaseFolder, resolve
from qlora.model.load import load_base
from qlora.recipe import QuantizationSection
from tests.families import make_base

CPU = torch.device("cpu")
# transformers' own name for what ours computes: Gemma 2 caps its attention scores, which sdpa cannot.
PLAIN_ATTENTION = {"gemma2": "eager"}


@pytest.fixture(scope="session")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], BaseFolder]:
    """The checked folder of a family's tiny base."""
    made: dict[str, Path] = {}

    def get(family: str) -> BaseFolder:
        if family not in made:
            made[family] = make_base(family, tmp_path_factory.mktemp("bases") / family, shards=2)
        return resolve(str(made[family]), "main", Recorder())

    return get


def load(base: BaseFolder, kind: str = "nf4", attention: str = "auto") -> Any:
    return load_base(base, QuantizationSection(type=kind), attention, CPU, Recorder())


def plain(base: BaseFolder, family: str, kind: str = "none") -> Any:
    """The same base opened by transformers alone, in bf16 or by its own 4-bit loader."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = None
    if kind != "none":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model = AutoModelForCausalLM.from_pretrained(
        base.path,
        dtype=torch.bfloat16,
        attn_implementation=PLAIN_ATTENTION.get(family, "sdpa"),
        quantization_config=quantization,
        trust_remote_code=False,
    )
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def logits(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=input_ids, use_cache=False).logits
