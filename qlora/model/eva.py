"""EVA's start of adapters: the main directions of what layers are given on the first rows (arXiv:2410.07170)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from qlora.batch import Batch
from qlora.errors import ModelError
from qlora.step.forward import CausalParts, hidden_states

if TYPE_CHECKING:
    from peft import PeftModel

# Passes over the given batches after which the components count as never converging (20 is usual).
EVA_MAX_FORWARDS = 500


def start_from_inputs(model: PeftModel, batches: list[Batch], adapter: str) -> None:
    """EVA (arXiv:2410.07170): A becomes the main directions of each layer's inputs at trained positions."""
    from peft import initialize_lora_eva_weights

    forwards, parts = 0, CausalParts.of(model.get_base_model())

    def forward(_: Any, batch: Batch) -> None:
        nonlocal forwards
        forwards += 1
        if forwards > EVA_MAX_FORWARDS:
            what = f'lora.init = "eva" has not converged after {EVA_MAX_FORWARDS} passes over the first rows'
            raise ModelError(what, 'use more or longer rows, a smaller lora.r, or lora.init = "default"')
        hidden_states(parts, batch)  # and no head: the logits of all positions are gigabytes, and no adapter's inputs

    def trained_positions(batch: Batch, _: Any) -> Tensor:
        return (batch.loss_weights_BS > 0).nonzero()

    initialize_lora_eva_weights(
        model,
        dataloader=batches,
        forward_fn=forward,
        gather_distributed_inputs=False,  # of several processes the first starts alone, and tells the others
        prepare_model_inputs_fn=trained_positions,
        adapter_name=adapter,
        show_progress_bar=False,
    )
