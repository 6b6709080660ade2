"""What tests of estimates share: published models by their size, and the answer for one on a card."""

from __future__ import annotations

from pathlib import Path

from qlora import api
from qlora.memory.estimate import Estimate
from tests.memory.shapes import config_folder

NAMES = {8: "meta-llama/Llama-3.1-8B-Instruct", 70: "meta-llama/Llama-3.1-70B-Instruct"}
GIB = 1 << 30


def ask(parent: Path, billions: int, *overrides: str, **card: str) -> Estimate:
    """The estimate of Llama 3.1 of that size; `card` is `gpu`, `vram` or `stack`."""
    recipe = api.recipe_or_model(str(config_folder(NAMES[billions], parent)), overrides)
    return api.question(recipe, **card).estimate()
