"""What gpt-oss takes as it is published, by its configuration alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qlora.events import Recorder
from qlora.memory.simulate import Simulator
from qlora.memory.simulation import ModelSpec, Workload
from qlora.model.emptied import _block_constants
from qlora.model.experts import projections
from qlora.model.load import load_base
from qlora.model.made_up import load_nothing, load_random
from qlora.model.meta_model import build_unmatched
from qlora.model.mxfp4 import Mxfp4Stack
from qlora.recipe.sections import LoraSection, QuantizationSection
from tests.mixtures import make_config
from tests.model.conftest import at
from tests.mxfp4 import STATED, make_base

GIB = 2**30


def held(model: Any) -> list[Tensor]:
    tensors = (*model.parameters(), *model.buffers(), *_block_constants(model))
    return list({id(tensor): tensor for tensor in tensors}.values())


def published(**sizes: Any) -> Any:
    """openai/gpt-oss-20b, whose other sizes are transformers' own defaults."""
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING["gpt_oss"](**{"num_hidden_layers": 24, "num_local_experts": 32, **sizes})
    config.quantization_config = STATED
    return config


def test_weights_take_what_was_counted() -> None:
    """11.94 GiB: 19.1 thousand millions of values in experts at 4.25 bit, attention in NF4, 2.2 GiB in 16 bit."""
    model = build_unmatched(published(), "eager", "gpt-oss-20b")
    model.tie_weights()
    values = sum(getattr(module, leaf).numel() for _, module, leaf in projections(model))
    load_nothing(model, QuantizationSection())
    stacks = [getattr(module, leaf) for _, module, leaf in projections(model)]
    assert {type(stack) for stack in stacks} == {Mxfp4Stack} and len(stacks) == 48
    assert 8 * sum(stack.nbytes for stack in stacks) / values == pytest.approx(4.25, abs=1e-4)
    assert sum(tensor.nbytes for tensor in held(model)) / GIB == pytest.approx(11.94, abs=0.05)


def test_in_16_bit_experts_stay_in_mxfp4(tmp_path: Any) -> None:
    """On meta as loading leaves them."""
    spec = QuantizationSection(type="none")
    model = build_unmatched(published(num_hidden_layers=1), "eager", "gpt-oss")
    load_nothing(model, spec)
    assert all(isinstance(getattr(module, leaf), Mxfp4Stack) for _, module, leaf in projections(model))
    tiny = load_base(at(make_base(tmp_path / "base")), spec, "auto", torch.device("cpu"), Recorder())
    assert all(isinstance(getattr(module, leaf), Mxfp4Stack) for _, module, leaf in projections(tiny))


def test_what_loading_leaves_is_what_was_predicted(tmp_path: Any) -> None:
    """The same tensors with and without a file, but for tables of bitsandbytes' that its layers share."""
    loaded = load_base(at(make_base(tmp_path / "base")), QuantizationSection(), "auto", torch.device("cpu"), Recorder())
    config = make_config("gpt_oss")
    config.quantization_config = STATED
    model = build_unmatched(config, "eager", "gpt-oss")
    model.tie_weights()
    load_nothing(model, QuantizationSection())
    one, other = (
        sum(getattr(module, leaf).nbytes for _, module, leaf in projections(made)) for made in (model, loaded)
    )
    assert one == other > 0
    assert 0 <= sum(one.nbytes for one in held(model)) - sum(one.nbytes for one in held(loaded)) <= 1024


def test_random_weights_have_a_spread_like_others() -> None:
    config = make_config("gpt_oss")
    config.quantization_config = STATED
    model = build_unmatched(config, "eager", "gpt-oss")
    load_random(model, QuantizationSection(), torch.device("cpu"))
    stack = model.model.layers[0].mlp.experts.down_proj
    assert float(stack.read(0, 4, torch.float32).std()) == pytest.approx(0.023, rel=0.1)


@pytest.mark.slow
def test_a_step_of_2048_tokens_fits_on_16_gb() -> None:
    spec = ModelSpec(published(), "gpt-oss-20b", LoraSection(), QuantizationSection(), target="cuda")
    simulation = Simulator(spec).run(Workload(1, 2048))
    highest = max(peak.total for peak in simulation.phases.values())
    assert 11.9 * GIB < highest < 14.5 * GIB
