"""Tiny bases, made once a session and shared by the tests of this room."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora.errors import ModelError, UserError
from qlora.events import Recorder
from qlora.model.base_folder import BaseFolder
from qlora.model.load import load_base
from qlora.model.resolve import resolve
from qlora.recipe.sections import QuantizationSection
from tests.families import make_base
from tests.hub_server import TOKEN

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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny base of this test's own, to be changed."""
    return make_base("llama", tmp_path / "base")


def at(folder: Path) -> BaseFolder:
    return resolve(str(folder), "main", Recorder())


def refused(base: str, revision: str = "main", sink: Recorder | None = None) -> UserError:
    """The error that keeps `base` from being one: two lines, and no secret in them."""
    with pytest.raises(ModelError) as error:
        resolve(base, revision, sink or Recorder())
    assert error.value.what and error.value.hint and error.value.exit_code == 2
    assert "\n" not in error.value.what + error.value.hint and TOKEN not in error.value.what + error.value.hint
    return error.value


def change_config(folder: Path, **fields: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    return folder


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


def stored_in_4bit(tmp_path: Path, base: BaseFolder, double: bool, skip: list[str] | None = None) -> Path:
    """A base as transformers writes it from bitsandbytes' 4-bit layers."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=skip,
    )
    model = AutoModelForCausalLM.from_pretrained(
        base.path, dtype=torch.bfloat16, quantization_config=config, trust_remote_code=False
    )
    model.save_pretrained(tmp_path / "stored")
    return tmp_path / "stored"
