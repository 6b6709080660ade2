"""Before step 1 a mixture's experts are compared with plain products, and choices with those of the recomputation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qlora.errors import ModelError
from qlora.model import adapters, expert_check
from qlora.model.mixtures import experts_in
from qlora.step import experts as step_experts
from qlora.step.layerwise import set_gradient_checkpointing
from tests import runs
from tests.mixtures import FAMILIES, make_base, make_config
from tests.model.mixture_cases import LORA, held, tuned


def passed(model: Any) -> None:
    model(input_ids=torch.arange(4, 44).view(2, 20), use_cache=False).logits.sum().backward()


def recomputed(family: str, experts: bool = True) -> Any:
    model = tuned(held(make_config(family))[0], LORA.model_copy(update={"experts": experts}))
    set_gradient_checkpointing(model.get_base_model(), True, False)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_right_passes_and_is_really_compared(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Biases, clamps, norms and adapters included: in fp32 both ways agree to rounding."""
    model = recomputed(family)
    monkeypatch.setattr(expert_check, "TOLERANCE", 1e-5)
    choices: list[str] = []
    own = expert_check._compare_choices
    monkeypatch.setattr(
        expert_check, "_compare_choices", lambda name, before, now: choices.append(name) or own(name, before, now)
    )
    with expert_check.watched(model.get_base_model()):
        passed(model)
    assert sorted(choices) == sorted(name for name, _ in experts_in(model.get_base_model()))
    monkeypatch.setattr(expert_check, "TOLERANCE", -1.0)
    with pytest.raises(ModelError, match="differ from plain products"), expert_check.watched(model.get_base_model()):
        passed(model)
    assert not any(module._forward_hooks for _, module in experts_in(model.get_base_model()))


def swapped_stack(module: Any, name: str) -> Any:
    """Each expert read in the place of the next."""
    found = OF_STACK(module, name)

    class Next:
        shape = found.shape

        def read(self, first: int, last: int, dtype: torch.dtype) -> Any:
            return found.read(0, found.shape[0], dtype).roll(1, 0)[first:last]

    return Next()


OF_STACK = step_experts.stack_of


def test_another_expert_s_weights_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = recomputed("qwen3_moe", experts=False)
    monkeypatch.setattr(step_experts, "stack_of", swapped_stack)
    watched = expert_check.watched(model.get_base_model())
    with pytest.raises(ModelError, match="its experts, computed together, differ") as refusal, watched:
        passed(model)
    assert refusal.value.hint


def test_another_choice_in_the_backward_pass_is_seen() -> None:
    model = recomputed("qwen3_moe")
    router = model.get_base_model().model.layers[1].mlp.gate
    seen: list[int] = []

    def second_time(module: Any, inputs: Any, output: Any) -> Any:
        seen.append(1)
        return (*output[:-1], output[-1].roll(1, 0)) if len(seen) == 2 else output

    router.register_forward_hook(second_time)
    watched = expert_check.watched(model.get_base_model())
    with pytest.raises(ModelError, match="tokens go to other experts when the layer is computed again"), watched:
        passed(model)


def test_a_run_asks_before_its_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_check, "TOLERANCE", -1.0)
    recipe = runs.write_recipe(tmp_path, make_base("qwen3_moe", tmp_path / "base"))
    with pytest.raises(ModelError, match="differ from plain products"):
        runs.train(recipe, "train.max_steps=1", "data.max_length=96")
    assert not list((runs.run_dir(recipe) / "checkpoints").glob("step-*"))


def test_a_dense_model_is_left_alone() -> None:
    from tests.families import make_config as make_dense
    from tests.families import make_model

    model = make_model(make_dense("qwen3"))
    with expert_check.watched(model):
        assert not any(module._forward_hooks for module in model.modules())
    assert adapters.trainable(model)
