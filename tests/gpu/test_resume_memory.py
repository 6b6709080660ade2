"""On a GPU: a resumed run needs no more memory than the fresh one, its paged state is paged, and its bits are the same.

bitsandbytes' own `load_state_dict` moves paged state to the GPU for good (issues #782 and #1381): a run that fitted
would not fit after a resume.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qlora.step.optimizer import AdapterOptimizer
from tests.runs import EVERYTHING, hashes, train, values, write_recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

PAGED_VALUES = 1 << 20


def optimizer(name: str) -> AdapterOptimizer:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(PAGED_VALUES // 1024, 1024, device="cuda", dtype=torch.bfloat16))
    return AdapterOptimizer({"l.lora_A.default.weight": weight}, name, 0.0)


def one_step(made: AdapterOptimizer) -> None:
    for key, master in made.masters.items():
        made.add_gradient(key, torch.ones_like(master))
    made.gradient_norm()
    made.step(1e-4)


@pytest.mark.parametrize("name", ["paged_adamw_8bit", "paged_adamw_32bit"])
def test_paged_state_is_put_back_as_paged(name: str) -> None:
    first, second = optimizer(name), optimizer(name)
    one_step(first)
    tensors, counters = first.state()
    second.load_state(tensors, counters)
    for made in (first, second):
        assert made.moments.memory is not None, made.moments.not_paged
        assert made.moments.buffer.data_ptr() == made.moments.memory.tensor.data_ptr()
    again, counters_again = second.state()
    assert counters_again == counters and all(torch.equal(tensors[key], again[key]) for key in tensors)
    one_step(first)
    one_step(second)
    assert all(
        torch.equal(one, other)
        for one, other in zip(first.state()[0].values(), second.state()[0].values(), strict=True)
    )


def test_a_resumed_run_needs_no_more_memory(tmp_path: Path, llama: Path) -> None:
    recipe = write_recipe(tmp_path, llama)
    settings = (*EVERYTHING, "train.optimizer=paged_adamw_8bit", "lora.r=512", "train.max_steps=8")

    def peak(**mode: object) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        train(recipe, *settings, **mode)  # type: ignore[arg-type]
        return torch.cuda.max_memory_allocated()

    fresh = peak(stop_after=4)
    resumed = peak(mode="resume")
    assert resumed <= fresh * 1.01, (fresh, resumed)


def test_resumed_on_a_gpu_is_the_same(tmp_path: Path, llama: Path) -> None:
    one, two = write_recipe(tmp_path / "one", llama), write_recipe(tmp_path / "two", llama)
    settings = (*EVERYTHING, "train.max_steps=8")
    train(one, *settings)
    train(two, *settings, stop_after=3)
    again = train(two, *settings, mode="resume")
    assert values(again, "step", "step") == [4, 5, 6, 7, 8]
    assert hashes(two, 8) == hashes(one, 8)
