"""How other stacks train the same model, for comparison in the estimator alone.

`qlora` is our own step. `plain` is what transformers' Trainer with peft's `prepare_model_for_kbit_training` does:
norms, embeddings, head and adapters in float32 under bf16 autocast, and the whole logits in float32 at once.
`torchtune` keeps adapters and AdamW's moments in bf16, without master copies, and computes its loss in pieces. The
recipe gives the rest (double quantization, target modules, eager attention), so that published measurements can be
predicted.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from qlora.batch import Batch
from qlora.layer_partners import ON_DEVICE, Inputs
from qlora.objective_keys import ObjectiveKeys
from qlora.step.forward import CausalParts, batch_loss, forward_backward, hidden_states
from qlora.step.layerwise import set_gradient_checkpointing
from qlora.step.loss import Objective
from qlora.step.objectives import objective_of


@dataclass(frozen=True)
class Baseline:
    """What differs: dtypes of what is not in 4 bit, master copies, the loss.

    `keeps_logits`: the program's own variable holds the model's output, logits among it, until the backward pass ends.
    """

    name: str
    dtype: torch.dtype = torch.bfloat16  # of embeddings, norms and head, where the layers are quantized
    adapter_dtype: torch.dtype = torch.bfloat16
    masters: bool = True
    chunked_loss: bool = True
    keeps_logits: bool = False
    autocast: bool = False

    def settle(self, model: Any, quantized: bool) -> list[int]:
        """Everything that is not in 4 bit in `dtype`; a base in 16 bit stays as it is (peft prepares quantized ones).

        Returns the bytes of what was there before: the allocator keeps their blocks.
        """
        model.tie_weights()
        before = []
        cast: dict[nn.Parameter, nn.Parameter] = {}  # a head that is tied is cast once, with its embeddings
        for module in model.modules() if quantized else ():
            for name, parameter in module._parameters.items():
                if parameter is not None and type(module).__name__ != "Linear4bit" and parameter.dtype != self.dtype:
                    if parameter not in cast:
                        before.append(parameter.nbytes)
                        cast[parameter] = nn.Parameter(parameter.detach().to(self.dtype), requires_grad=False)
                    module._parameters[name] = cast[parameter]
        model.tie_weights()
        return before

    def computing(self) -> AbstractContextManager[Any]:
        return _Autocast() if self.autocast else nullcontext()

    def set_checkpointing(self, causal_lm: Any, layers: bool | int, inputs: Inputs = ON_DEVICE) -> None:
        """As the step does it. A mode is off inside `backward`, so that layers recomputed there enter it again."""
        set_gradient_checkpointing(causal_lm, layers, keep_random_state=False, inputs=inputs)
        if self.name != "qlora" and causal_lm.supports_gradient_checkpointing:
            again = lambda: (nullcontext(), self.computing())  # noqa: E731
            recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False, context_fn=again)
            causal_lm._set_gradient_checkpointing(enable=layers is not False, gradient_checkpointing_func=recompute)

    def forward_backward(self, parts: CausalParts, batch: Batch, neftune_alpha: float) -> None:
        if self.chunked_loss:
            forward_backward(parts, batch, _objective_of(batch), 1.0, neftune_alpha)
        else:
            loss, logits = self._whole_loss(parts, batch, neftune_alpha)
            held = logits if self.keeps_logits else None
            del logits
            loss.backward()  # type: ignore[no-untyped-call]
            del held

    def evaluate(self, parts: CausalParts, batch: Batch) -> None:
        if self.chunked_loss:
            batch_loss(parts, batch, _objective_of(batch))
        else:
            self._whole_loss(parts, batch, 0.0)

    def loss_of(self, logits_TV: Tensor, targets_T: Tensor) -> Tensor:
        """transformers/loss/loss_utils.py, ForCausalLMLoss: all logits, once more in float32, through cross_entropy."""
        return nn.functional.cross_entropy(logits_TV.float(), targets_T, reduction="sum")

    def _whole_loss(self, parts: CausalParts, batch: Batch, neftune_alpha: float) -> tuple[Tensor, Tensor]:
        logits_BSV = self.logits(parts, hidden_states(parts, batch, neftune_alpha))
        return self.loss_of(logits_BSV.flatten(0, 1), batch.targets_BS.flatten()), logits_BSV

    def logits(self, parts: CausalParts, hidden_BSD: Tensor) -> Tensor:
        """What the model's own forward gives."""
        logits_BSV: Tensor = parts.head(hidden_BSD)
        return logits_BSV if parts.transform is None else parts.transform(logits_BSV)


BASELINES: dict[str, Baseline] = {
    "qlora": Baseline("qlora"),
    "plain": Baseline(
        "plain",
        dtype=torch.float32,
        adapter_dtype=torch.float32,
        masters=False,
        chunked_loss=False,
        keeps_logits=True,
        autocast=True,
    ),
    "torchtune": Baseline("torchtune", masters=False),
}


def _objective_of(batch: Batch) -> Objective:
    """Whichever compares answers does: they differ in what they do with a number an answer."""
    if batch.drawn_KT is not None:  # with what each way may read
        return objective_of(ObjectiveKeys(objective="grpo", num_iterations=2))
    return objective_of(ObjectiveKeys(objective="sft" if batch.signs_R is None else "dpo"))


class _Autocast(TorchFunctionMode):
    """torch.autocast to bf16 for meta tensors, which the real one leaves alone: products are computed in bf16."""

    PRODUCTS = (nn.functional.linear, torch.matmul, torch.bmm, nn.functional.scaled_dot_product_attention)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.PRODUCTS:
            args = map(_in_bf16, args)
            kwargs = {key: _in_bf16(value) for key, value in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))


def _in_bf16(value: Any) -> Any:
    return value.to(torch.bfloat16) if isinstance(value, Tensor) and value.dtype == torch.float32 else value
