"""Other stacks' memory, against what is published of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qlora.events import Recorder
from qlora.memory.baselines import BASELINES, Baseline
from qlora.memory.simulation import Workload
from qlora.model import adapters
from qlora.model.load import load_base
from qlora.model.resolve import resolve
from qlora.recipe.sections import LoraSection, QuantizationSection
from qlora.step.forward import CausalParts
from tests.memory.cases import GIB, ask
from tests.memory.counted import real_batch

CPU, NONE, LORA = torch.device("cpu"), QuantizationSection(type="none"), LoraSection(r=4)


def test_a_published_measurement_is_predicted(tmp_path: Path) -> None:
    """torchtune's README: Llama 3.1 8B QLoRA on a 4090, 2 × 2,048 tokens, 7.4 GiB. Within 10 %."""
    settings = (
        *("lora.r=8", 'lora.target_modules=["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]'),
        *("train.micro_batch_size=2", "data.max_length=2048", "train.optimizer=adamw", "eval.samples=0"),
    )
    estimate = ask(tmp_path, 8, *settings, gpu="RTX 4090", stack="torchtune")
    assert estimate.tensor_bytes == pytest.approx(7.4 * GIB, rel=0.10)


def test_the_plain_stack_shows_what_our_settings_save(tmp_path: Path) -> None:
    settings = ("train.micro_batch_size=2", "train.gradient_checkpointing=true")
    ours = ask(tmp_path, 8, *settings, gpu="RTX 4090")
    plain = ask(tmp_path, 8, *settings, gpu="RTX 4090", stack="plain")
    # Embeddings and head in float32 are 1.05e9 × 2 bytes more; logits of 4,096 tokens × 128,256 in float32 are
    # 1.96 GiB, and at the peak there are three of them and those in bf16 that the loop's own variable keeps.
    assert plain.components["weights"] - ours.components["weights"] == pytest.approx(1.051e9 * 2, rel=0.01)
    assert plain.components["logits"] > 3.4 * 4096 * 128_256 * 4 and ours.components["logits"] < GIB / 2
    assert plain.peak_bytes > 1.8 * ours.peak_bytes
    assert any("plain" in note for note in plain.notes)


def test_a_head_that_is_tied_is_cast_once() -> None:
    """As peft does it, which walks over parameters; drawn without weights, head and embeddings are two."""
    config = LlamaConfig(
        vocab_size=96, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    config.tie_word_embeddings = True
    with torch.device("meta"):
        drawn: Any = LlamaForCausalLM(config).bfloat16()
        drawn.lm_head.weight = torch.nn.Parameter(torch.empty(96, 16, dtype=torch.bfloat16), requires_grad=False)
    before = Baseline("plain", dtype=torch.float32).settle(drawn, quantized=True)
    assert before.count(96 * 16 * 2) == 1
    assert drawn.lm_head.weight is drawn.model.embed_tokens.weight and drawn.lm_head.weight.dtype == torch.float32


@pytest.fixture(scope="module")
def model(llama: Path) -> Any:
    return adapters.attach(load_base(resolve(str(llama), "main", Recorder()), NONE, "auto", CPU, Recorder()), LORA, 0)


def gradients(model: Any, baseline: Baseline) -> torch.Tensor:
    parts = CausalParts.of(model.get_base_model())
    model.zero_grad()
    baseline.forward_backward(parts, real_batch(Workload(2, 32), 384), 0.0)
    return torch.cat([parameter.grad.flatten().float() for parameter in adapters.trainable(model).values()])


def test_other_stacks_take_the_same_step_in_another_way(model: Any) -> None:
    """The whole logits at once or chunks of them: one gradient, so that what is compared is memory alone."""
    ours, theirs = (gradients(model, BASELINES[name]) for name in ("qlora", "plain"))
    assert float(torch.nn.functional.cosine_similarity(ours, theirs, 0)) > 0.999
    assert float(ours.norm()) == pytest.approx(float(theirs.norm()), rel=0.01)


def test_the_plain_stack_keeps_what_is_not_in_4_bit_in_float32_and_multiplies_in_bf16() -> None:
    plain = BASELINES["plain"]
    layer = torch.nn.Linear(8, 8, dtype=torch.bfloat16)
    layer.tie_weights = lambda: None
    assert plain.settle(layer, quantized=True) == [8 * 8 * 2, 8 * 2]
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.float32}
    with plain.computing():
        assert layer(torch.ones(1, 8)).dtype == torch.bfloat16
    kept = torch.nn.Linear(8, 8, dtype=torch.bfloat16)
    kept.tie_weights = lambda: None
    assert plain.settle(kept, quantized=False) == []
    assert {parameter.dtype for parameter in kept.parameters()} == {torch.bfloat16}, "a base in 16 bit stays as it is"
    with BASELINES["torchtune"].computing():
        assert layer(torch.ones(1, 8)).dtype == torch.float32
