"""What a decoder layer asks of a GPU: launches and bytes, counted on meta tensors, every operation seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig

from qlora.batch import Batch
from qlora.memory.repeated import RepeatedOperations
from qlora.memory.trace import LiveBytes
from qlora.model import adapters
from qlora.model.attention import OnMeta
from qlora.model.made_up import load_nothing
from qlora.model.meta_model import build_unmatched, choose_attention
from qlora.recipe.sections import LoraSection, QuantizationSection
from qlora.step.forward import CausalParts, hidden_states
from qlora.step.layerwise import set_gradient_checkpointing

META = torch.device("meta")
# A decoder layer of Llama-3.1-8B, by its config.json.
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 256,  # which no layer sees
}
TOKENS = 2048


@dataclass(frozen=True)
class Cost:
    """Kernels started, and bytes that they read and write."""

    launches: int
    nbytes: int

    def less(self, other: Cost) -> Cost:
        return Cost(self.launches - other.launches, self.nbytes - other.nbytes)


class Counter(TorchDispatchMode):
    """Counts operations that touch data: a view starts no kernel, and an operation reads each operand once."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.nbytes = 0

    @property
    def cost(self) -> Cost:
        return Cost(self.launches, self.nbytes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        read = {_storage(one): one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        made = [one for one in tree_leaves(result) if isinstance(one, Tensor) and _storage(one) not in read]
        declared = zip(func._schema.arguments, args, strict=False)
        new = made + [one for argument, one in declared if argument.alias_info and argument.alias_info.is_write]
        if func.namespace == "prim" or "empty" in func.name() or not new or func.is_view:
            return result
        self.launches += 1
        self.nbytes += sum(map(_bytes, read.values())) + sum(map(_bytes, new))
        return result


class Asked(RepeatedOperations):
    """Every operation is done, also the ones that were done before."""

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensor: Tensor) -> int:
    """Of an expanded tensor what is there."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    values = 1
    for size, stride in sizes:
        values *= size if stride else 1
    return values * tensor.element_size()


def layer_costs(functions: str) -> tuple[Cost, Cost]:
    """A layer's forward pass and its backward pass with recomputation, as computed by `functions`, for one document."""
    forward, backward = [], []
    for layers in (2, 3):
        one, other = _costs(layers, functions)
        forward.append(one)
        backward.append(other)
    return forward[1].less(forward[0]), backward[1].less(backward[0])


def _costs(layers: int, functions: str) -> tuple[Cost, Cost]:
    text = LlamaConfig(**LLAMA_8B, num_hidden_layers=layers)  # type: ignore[arg-type]
    model = build_unmatched(text, choose_attention(text, "auto", "8b", "cuda"), "8b")
    # The counter lies below: it sees bitsandbytes' product as the steps that `LiveBytes` makes of it.
    with Counter() as counter, LiveBytes("cuda", packed=False) as live, OnMeta("cuda"):
        live.repeated = Asked()  # an answer from what was asked before is no operation that a counter sees
        live.begin("load")
        load_nothing(model, QuantizationSection())
        tuned = adapters.attach(model, LoraSection(r=16), 0, functions=functions).train()
        parts = CausalParts.of(tuned.get_base_model(), on_card=True)
        set_gradient_checkpointing(tuned.get_base_model(), layers=True, keep_random_state=False)
        ids = torch.zeros(1, TOKENS, dtype=torch.int64, device=META)
        starts = torch.zeros(2, dtype=torch.int32, device=META)
        batch = Batch(ids, ids, ids, ids, ids.float(), ids[0], starts, (TOKENS,), True)
        before = counter.cost
        hidden = hidden_states(parts, batch)
        between = counter.cost
        hidden.backward(torch.empty_like(hidden))
    return between.less(before), counter.cost.less(between)
