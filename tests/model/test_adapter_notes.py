"""In 4 bit is what says so: the name of a base that is stored so, or a paper beside the adapter."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora.model.adapter_notes import MAX_NOTES_BYTES, trained_on
from qlora.recipe.sections import QuantizationSection

NF4, PLAIN = QuantizationSection(), QuantizationSection(type="none")


@pytest.mark.parametrize(
    ("name", "in_4bit"),
    [
        ("unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit", True),
        ("unsloth/gemma-3-4b-it-unsloth-bnb-4bit", True),
        ("/models/mistral-7b-nf4", True),
        ("someone/llama-4bit", True),
        ("meta-llama/Llama-3.1-8B", False),
        ("meta-llama/Llama-4-Scout", False),
        ("unsloth/gemma-3-4b-it", False),
        ("TheBloke/Llama-2-7B-GPTQ-4bit", False),
        ("mlx-community/Qwen3-4B-4bit-mlx", False),
        ("/home/me/bnb-4bit/llama", False),
        ("", False),
    ],
)
def test_names_of_bases(name: str, in_4bit: bool, tmp_path: Path) -> None:
    found = trained_on(tmp_path, name)
    assert found.quantization == (NF4 if in_4bit else PLAIN)
    assert (found.why is not None) is in_4bit


@pytest.mark.parametrize(
    ("file", "text", "wanted"),
    [
        ("README.md", "- load_in_8bit: False\n- load_in_4bit: True\n- bnb_4bit_quant_type: nf4\n", NF4),
        (
            "README.md",
            "- load_in_4bit: True\n- bnb_4bit_quant_type: fp4\n- bnb_4bit_use_double_quant: False\n",
            QuantizationSection(type="fp4", double_quant=False),
        ),
        ("README.md", "```yaml\nbase_model: x/y\nadapter: qlora\nload_in_4bit: true\n```\n", NF4),
        (
            "README.md",
            "```yaml\nadapter: lora\nload_in_4bit: false\n```\nThis model answers questions of qlora.",
            PLAIN,
        ),
        ("README.md", "I did not use load_in_4bit: True would have been too coarse.", PLAIN),
        ("training_args.yaml", "finetuning_type: lora\nquantization_bit: 4\n", NF4),
        ("training_args.yaml", "quantization_bit: 8\n", PLAIN),
        ("README.md", " " * MAX_NOTES_BYTES + "\n- load_in_4bit: True\n", PLAIN),
    ],
)
def test_papers_beside_the_adapter(file: str, text: str, wanted: QuantizationSection, tmp_path: Path) -> None:
    (tmp_path / file).write_text(text)
    found = trained_on(tmp_path, "meta-llama/Llama-3.1-8B")
    assert found.quantization == wanted and (found.why is None) is (wanted.type == "none")
