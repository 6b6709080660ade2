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
from qlora.step.forward import CausalParts, batch_loss, forward_backward, hidden_states, set_gradient_checkpointing
from qlora.step.loss import SupervisedObjective


@dataclass(frozen=True)
class Baseline:
    """What differs: dtypes of what is not in 4 bit, master copies, the loss."""

    name: str
    dtype: torch.dtype = torch.bfloat16  # of embeddings, norms and head
    adapter_dtype: torch.dtype = torch.bfloat16
    masters: bool = True
    chunked_loss: bool = True
    autocast: bool = False

    def settle(self, model: Any) -> None:
        """Everything that is not in 4 bit in `dtype`."""
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and type(module).__name__ != "Linear4bit" and parameter.dtype != self.dtype:
                    module._parameters[name] = nn.Parameter(parameter.detach().to(self.dtype), requires_grad=False)
        model.tie_weights()

    def computing(self) -> AbstractContextManager[Any]:
        return _Autocast() if self.autocast else nullcontext()

    def set_checkpointing(self, causal_lm: Any, enabled: bool) -> None:
        """As the step does it. A mode is off inside `backward`, so that layers recomputed there enter it again."""
        set_gradient_checkpointing(causal_lm, enabled, keep_random_state=False)
        if self.autocast:
            again = lambda: (nullcontext(), _Autocast())  # noqa: E731
            recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False, context_fn=again)
            causal_lm._set_gradient_checkpointing(enable=enabled, gradient_checkpointing_func=recompute)

    def forward_backward(self, parts: CausalParts, batch: Batch, neftune_alpha: float) -> None:
        if self.chunked_loss:
            forward_backward(parts, batch, SupervisedObjective(), 1.0, neftune_alpha)
        else:
            _whole_loss(parts, batch, neftune_alpha).backward()  # type: ignore[no-untyped-call]

    def evaluate(self, parts: CausalParts, batch: Batch) -> None:
        batch_loss(parts, batch, SupervisedObjective()) if self.chunked_loss else _whole_loss(parts, batch, 0.0)


BASELINES: dict[str, Baseline] = {
    "qlora": Baseline("qlora"),
    "plain": Baseline(
        "plain", dtype=torch.float32, adapter_dtype=torch.float32, masters=False, chunked_loss=False, autocast=True
    ),
    "torchtune": Baseline("torchtune", masters=False),
}


def _whole_loss(parts: CausalParts, batch: Batch, neftune_alpha: float) -> Tensor:
    """transformers/loss/loss_utils.py, ForCausalLMLoss: all logits, once more in float32, through cross_entropy."""
    logits_BSV = parts.head(hidden_states(parts, batch, neftune_alpha))
    if parts.transform is not None:
        logits_BSV = parts.transform(logits_BSV)
    return nn.functional.cross_entropy(logits_BSV.float().flatten(0, 1), batch.targets_BS.flatten(), reduction="sum")


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
