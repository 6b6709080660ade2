"""Attention through our own registered function, so that there is one place to change it.

It is transformers' sdpa with three additions. Documents packed into a row are kept apart by a mask that transformers
makes from `position_ids` (they restart at 0 with each document); sliding windows are part of the same mask. Where a
kernel is chosen that takes the documents themselves (`attention_choice`), the function is registered under that
kernel's name, and what reaches it in a training forward is a `DocumentMask`. Sinks, which sdpa has none of, are put
beside what a kernel computes (`sink_attention`). Three things must hold, and the model's caller sees to them:

* `attention_mask` is None. A 2-D mask switches the making of document masks off; a 4-D one drops sliding windows.
* `use_cache` is False. A cache switches it off as well, and a cache is the default, in training too. Gradient
  checkpointing hides that: while training it sets `use_cache=False` by itself, so that a run with it is right, and
  its evaluation, or the same run without it, is not.
* padding restarts at position 0, so that it is a document of its own, or goes on with the positions of the one before
  it, whose tokens don't look ahead.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from qlora.device import is_card
from qlora.model import compiled_attention, sink_attention
from qlora.model.compiled_attention import Scores, StandIn, attend
from qlora.model.document_attention import (
    CAPPED,
    HEAD_DIM_MULTIPLE,
    KERNELS,
    MOST_HEAD_DIM,
    by_scores,
    causal_band,
)
from qlora.model.document_mask import DocumentMask, answer_from_the_batch, by_documents

NAME = "qlora_sdpa"
# The same for models with sinks: transformers refuses them whatever has sdpa in its name (modeling_utils.py).
SINKS = "qlora_sinks"


def register(target: str | None = None, sinks: bool = False) -> str:
    """Makes the functions known to transformers (as often as one likes) and returns the name of the one with a mask.

    `target` ("cuda" or "cpu") is for meta tensors: attention then is the operation that this device would run; `sinks`:
    the name for a model that has some.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    answer_from_the_batch()
    for kernel in KERNELS:
        AttentionInterface.register(name_of(kernel), partial(by_kernel, kernel=kernel))
        AttentionMaskInterface.register(name_of(kernel), by_documents)
    name = SINKS if sinks else NAME
    name = name if target is None else f"{name}_for_{target}"
    AttentionInterface.register(name, attention if target is None else partial(attention, target=target))
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


def name_of(kernel: str) -> str:
    """The name under which attention by that kernel is registered."""
    return f"qlora_{kernel.replace(' ', '_')}"


def kernel_of(name: str) -> str | None:
    """The kernel that is registered under a name; None where the name is of attention with a mask."""
    return next((kernel for kernel in KERNELS if name == name_of(kernel)), None)


def shown(model: Any) -> str:
    """What a model attends with, for people: "sdpa", "eager", or a kernel of `document_attention`."""
    name = str(getattr(model.config, "_attn_implementation", None))
    return kernel_of(name) or ("sdpa" if name.startswith((NAME, SINKS)) else name)


def by_kernel(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, kernel: str, **settings: Any
) -> tuple[Tensor, None]:
    """As `attention`, where documents are told by a DocumentMask: by `kernel`, if it has what the layer asks for."""
    scale, softcap, sinks = (settings.get(name) for name in ("scaling", "softcap", "s_aux"))
    scores = Scores(scale, softcap, sinks)
    if isinstance(attention_mask, StandIn):
        if not _takes(kernel, query, key, value, settings) or (sinks is not None and sinks.requires_grad):
            raise ValueError(f"a layer asks for more than {kernel} attends with")
        return attend(kernel, query, key, value, attention_mask, scores), None
    if isinstance(attention_mask, DocumentMask):
        if _takes(kernel, query, key, value, settings):
            return compiled_attention.by_kernel(kernel, query, key, value, attention_mask, scores), None
        attention_mask = attention_mask.as_tensor()
    if softcap is None:
        return attention(module, query, key, value, attention_mask, **settings)
    if attention_mask is None:  # answers of a capped model, which have a cache
        attention_mask = causal_band(key.shape[2], key.shape[2], query.device)[-query.shape[2] :]
    return by_scores(query, key, value, attention_mask, scale, softcap).transpose(1, 2).contiguous(), None


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    target: str | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Attention of query (B, heads, S, D) on key and value (B, kv heads, S, D); returns (B, S, heads, D).

    `settings` are what transformers' layers pass: dropout, scaling, is_causal, position_bias and others.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if (sinks := settings.get("s_aux")) is not None:
        device_type, scale = target or query.device.type, settings.get("scaling")
        output = sink_attention.with_mask(query, key, value, attention_mask, (scale, sinks), device_type)
        return output.contiguous(), None
    on_meta = OnMeta(target) if query.is_meta and target is not None else None
    groups = getattr(module, "num_key_value_groups", 1)
    with on_meta or _kernel_order(query.device):
        if groups > 1 and attention_mask is not None and _shares_keys(query, target if on_meta else None, settings):
            # transformers repeats keys and values for each query head as soon as there is a mask: CUDA's fused kernels
            # take masks or shared keys, not both. The CPU's takes both (forward and backward 1.7 times as fast).
            dropout, scale = settings.get("dropout", 0.0), settings.get("scaling")
            output = scaled_dot_product_attention(
                query, key, value, attention_mask, dropout_p=dropout, scale=scale, enable_gqa=True
            )
            return output.transpose(1, 2).contiguous(), None
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)[0], None


def _takes(kernel: str, query: Tensor, key: Tensor, value: Tensor, settings: dict[str, Any]) -> bool:
    """Whether the kernel computes what this call asks for."""
    asks = [settings.get(name) for name in ("position_bias", "cache", "head_mask")]
    plain = not settings.get("dropout") and settings.get("is_causal") is not False and asks == [None] * len(asks)
    widths = {query.shape[-1], key.shape[-1], value.shape[-1]}
    fits = len(widths) == 1 and query.shape[-1] <= MOST_HEAD_DIM and query.shape[-1] % HEAD_DIM_MULTIPLE == 0
    if settings.get("s_aux") is not None:
        return plain and fits and kernel in sink_attention.KERNELS and settings.get("softcap") is None
    return plain and fits and (kernel in CAPPED or settings.get("softcap") is None)


def _kernel_order(device: torch.device) -> AbstractContextManager[Any]:
    """On a GPU the order in which SDPA tries its kernels: the one that the estimator assumes.

    Left alone, cuDNN comes first on Hopper and Blackwell (aten, transformers/cuda/sdp_utils.cpp), with other scratch
    and other last digits than on the card before. Of AMD's cards the same names mean AOTriton's kernels.
    """
    order = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True) if is_card(device) else nullcontext()


def _shares_keys(query: Tensor, target: str | None, settings: dict[str, Any]) -> bool:
    """Whether one kernel takes this query with a mask and shared keys, and nothing else is asked of it."""
    device_type = target or query.device.type
    plain = settings.get("position_bias") is None and settings.get("softcap") is None and settings.get("cache") is None
    return plain and device_type == "cpu" and query.shape[2] > 1 and query.dtype != torch.float16


# --- attention of meta tensors, for the estimator --------------------------------------------------------------------


class OnMeta(TorchFunctionMode):
    """While it is entered, attention of meta tensors is the operation that `target` would choose.

    By itself torch computes it on meta by matrix products, whose S × S scores no fused kernel ever holds.
    """

    def __init__(self, target: str) -> None:
        super().__init__()
        self.target = target

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention and args[0].is_meta:
            return _fused(self.target, *args, **kwargs)
        return func(*args, **kwargs)


def _fused(
    target: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` of meta tensors as aten/src/ATen/native/transformers/attention.cpp chooses it.

    A boolean mask becomes one of the query's type first. CUDA's flash kernel takes no mask: with one, it is the
    memory-efficient kernel, whose mask is padded to rows of 16. Flash kernels take values as wide as queries alone
    (DeepSeek's are not): the CPU then computes the scores, a card takes the memory-efficient kernel.
    """
    aten, as_wide = torch.ops.aten, query.shape[-1] == value.shape[-1]
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        no = torch.scalar_tensor(float("-inf"), dtype=query.dtype, device=query.device)
        attn_mask = torch.where(attn_mask, 0.0, no)
    if target == "cpu" and not as_wide:
        return scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if target == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(  # type: ignore[no-any-return]
            query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )[0]
    if attn_mask is None and as_wide:
        return aten._scaled_dot_product_flash_attention(  # type: ignore[no-any-return]
            query, key, value, dropout_p, is_causal, False, scale=scale
        )[0]
    if attn_mask is not None:
        if over := attn_mask.shape[-1] % 16:
            attn_mask = torch.nn.functional.pad(attn_mask, (0, 16 - over))[..., : attn_mask.shape[-1]]
        attn_mask = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    needs_gradient = torch.is_grad_enabled() and query.requires_grad
    return aten._scaled_dot_product_efficient_attention(  # type: ignore[no-any-return]
        query, key, value, attn_mask, needs_gradient, dropout_p, is_causal, scale=scale
    )[0]
