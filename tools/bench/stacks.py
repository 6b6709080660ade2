"""What other stacks do, switch by switch, so that published peaks of theirs can be predicted by our own simulation.

Each switch is one thing in which programs differ; `STACKS` says how the programs of the published runs set them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from qlora.batch import Batch
from qlora.layer_partners import ON_DEVICE, Inputs
from qlora.memory.baselines import Baseline
from qlora.step.forward import CausalParts


def shifted(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """transformers up to 4.48: the float32 logits without the last token are a copy, beside all of them."""
    float_TV = logits_TV.float()
    return cross_entropy(float_TV[:-1].clone(), targets_T[:-1], reduction="sum")


def shifted_as_they_are(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """A copy of the logits without the last token, in their own type."""
    return cross_entropy(logits_TV[:-1].clone(), targets_T[:-1], reduction="sum")


def shifted_then_float(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """A copy without the last token in the logits' own type, which autocast then gives to the loss in float32."""
    return cross_entropy(logits_TV[:-1].clone().float(), targets_T[:-1], reduction="sum")


def mean_of_logits(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """No loss at all, as programs take it that measure memory alone."""
    return logits_TV.mean()


LOSSES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "shifted": shifted,
    "shifted as they are": shifted_as_they_are,
    "shifted, then float": shifted_then_float,
    "mean": mean_of_logits,
}


@dataclass(frozen=True)
class Stack(Baseline):
    """A baseline with the rest of what programs differ in.

    `kernel` is "flash", "efficient" (of torch's sdpa, keys repeated for each query head), or None for what our own
    attention chooses. `half`: computes in float16, and a base that is not quantized is held in it. `loss` is one of
    `LOSSES` where it is not transformers' own; `float_logits`: the model itself gives them in float32. `keeps_inputs`:
    bitsandbytes of early 2024 keeps the input of each 4-bit layer as an attribute of its node (`ctx.tensors`), where
    recomputation cannot drop it. `holds_output`: the loop's variable has the last step's output, logits among it, until
    the next forward pass has returned another. `casts_back`: what is not in 4 bit was cast to float32, and embeddings
    and head back again, before the first step.
    """

    chunked_loss: bool = False
    kernel: str | None = None
    half: bool = False
    loss: str | None = None
    float_logits: bool = False
    keeps_inputs: bool = False
    holds_output: bool = False
    casts_back: bool = False
    reentrant: bool = False
    norms: torch.dtype | None = None

    def set_checkpointing(self, causal_lm: Any, layers: bool | int, inputs: Inputs = ON_DEVICE) -> None:
        super().set_checkpointing(causal_lm, layers, inputs)
        if self.reentrant and layers and causal_lm.supports_gradient_checkpointing:
            causal_lm.enable_input_require_grads()
            causal_lm._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=self._recompute)

    def _recompute(self, layer: Any, *inputs: Any) -> Any:
        """As `Trainer` has it by default: a pass of its own inside the backward pass, where modes are off."""

        def computed(*given: Any) -> Any:
            with self.computing():
                return layer(*given)

        return checkpoint(computed, *inputs, use_reentrant=True, preserve_rng_state=False)

    def forward_backward(self, parts: CausalParts, batch: Batch, neftune_alpha: float) -> None:
        if not self.holds_output:
            super().forward_backward(parts, batch, neftune_alpha)
            return
        loss, output = self._whole_loss(parts, batch, neftune_alpha)
        loss.backward()  # type: ignore[no-untyped-call]
        for parameter in parts.trunk.parameters():
            parameter.grad = None
        loss, output = self._whole_loss(parts, batch, neftune_alpha)
        loss.backward()  # type: ignore[no-untyped-call]
        del output

    def loss_of(self, logits_TV: Tensor, targets_T: Tensor) -> Tensor:
        return LOSSES[self.loss](logits_TV, targets_T) if self.loss else super().loss_of(logits_TV, targets_T)

    def _whole_loss(self, parts: CausalParts, batch: Batch, neftune_alpha: float) -> tuple[Tensor, Tensor]:
        if not self.keeps_inputs:
            return super()._whole_loss(parts, batch, neftune_alpha)
        kept: list[Tensor] = []
        with ExitStack() as hooks:
            for module in parts.trunk.modules():
                if type(module).__name__ == "Linear4bit":
                    hooks.enter_context(module.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0])))
            loss, logits_BSV = super()._whole_loss(parts, batch, neftune_alpha)
        loss.kept = kept  # type: ignore[attr-defined]  # as long as the graph is there
        return loss, logits_BSV

    def logits(self, parts: CausalParts, hidden_BSD: Tensor) -> Tensor:
        given = super().logits(parts, hidden_BSD)
        return given.float() if self.float_logits else given

    def settle(self, model: Any, quantized: bool) -> list[int]:
        before = super().settle(model, quantized)
        if self.casts_back and quantized:
            tables = {
                id(one.weight): one.weight for one in (model.get_input_embeddings(), model.get_output_embeddings())
            }
            before += [weight.numel() * 4 for weight in tables.values()]
        for name, module in model.named_modules() if self.norms and quantized else ():
            if "norm" in name:
                module.to(self.norms)
        if self.half and not quantized:
            model.half()
        if self.kernel is not None:
            model.set_attn_implementation("sdpa")
        return before

    @contextmanager
    def computing(self) -> Iterator[None]:
        with ExitStack() as modes:
            modes.enter_context(super().computing())
            if self.kernel is not None:
                modes.enter_context(_Kernel(self.kernel))
            if self.half:
                modes.enter_context(_HalfSoftmax())
            yield


class _Kernel(TorchFunctionMode):
    """Causal attention without a mask, by the kernel of that name."""

    def __init__(self, kernel: str) -> None:
        super().__init__()
        self.kernel = kernel

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = args[:3]
        scale = (kwargs or {}).get("scale")
        if self.kernel == "flash":
            flash = torch.ops.aten._scaled_dot_product_flash_attention
            return flash(query, key, value, 0.0, True, False, scale=scale)[0]
        needs_gradient = torch.is_grad_enabled() and query.requires_grad
        key, value = _for_each_head(key, query), _for_each_head(value, query)
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        return efficient(query, key, value, None, needs_gradient, 0.0, True, scale=scale)[0]


class _HalfSoftmax(TorchFunctionMode):
    """CUDA's softmax takes float16 in and gives float32 out at once (aten/src/ATen/native/SoftMax.cpp)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.softmax and args[0].dtype == torch.float16 and kwargs.get("dtype"):
            return torch._softmax(args[0], kwargs.get("dim", -1), True)
        return func(*args, **kwargs)


def _for_each_head(shared: Tensor, query: Tensor) -> Tensor:
    groups = query.shape[1] // shared.shape[1]
    return shared.repeat_interleave(groups, dim=1) if groups > 1 else shared
