"""Before step 1, of a mixture: is what its experts give what plain products with their weights give, and does a layer
that is computed again choose the same experts?

Rows that are sorted wrongly, or an expert that is read in another's place, would train without an error: a loss falls
all the same. So the first module of experts that a real micro-batch goes through is computed once more for some of its
tokens, expert by expert, in float32, by products of each expert's own weights. And a router whose recomputation chose
otherwise would give gradients of another model than the one that made the loss: each choice is compared once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from qlora.errors import ModelError
from qlora.model.mixtures import experts_in
from qlora.step.experts import ADAPTER, stack_of

TOKENS = 64  # of the micro-batch, the first ones: with eight experts a token, all of Qwen3-30B's 128 by any routing
# Of the 2-norms. bf16 rounds to 2^-9, a few times on the way: 0.003 is usual; another expert's weights give 1.
TOLERANCE = 0.05
_HINT = "use another base, and report this one: nothing has been trained yet"


@contextmanager
def watched(causal_lm: Any) -> Iterator[None]:
    """Compare while a step is tried in the block. Raises ModelError where something differs."""
    chosen: dict[str, Tensor] = {}
    compared: set[str] = set()
    with ExitStack() as hooks:
        for name, module in experts_in(causal_lm):

            def look(module: Any, inputs: tuple[Any, ...], output: Tensor, name: str = name) -> None:
                if torch.compiler.is_compiling():
                    return  # one graph of equal layers, in which nothing can be looked at
                hidden_TH, index_TK, weights_TK = inputs
                if torch._C._current_graph_task_id() != -1:  # in a backward pass, which computes a layer again
                    _compare_choices(name, chosen.get(name), index_TK)
                    return
                chosen[name] = index_TK.detach().clone()
                if not compared:
                    compared.add(name)
                    _compare_outputs(name, module, (hidden_TH, index_TK, weights_TK), output)

            hooks.enter_context(module.register_forward_hook(look))
        yield


def plain(module: Any, hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """What a module of experts gives for tokens (T, H), in float32, each expert by its own weights."""
    first = "gate_up_proj" if module.has_gate else "up_proj"
    total_TH = torch.zeros(hidden_TH.shape, dtype=torch.float32, device=hidden_TH.device)
    for expert in sorted(set(index_TK.flatten().tolist())):
        token, choice = (index_TK == expert).nonzero(as_tuple=True)
        rows = _product(module, first, expert, hidden_TH[token].float())
        rows = module._apply_gate(rows) if module.has_gate else module.act_fn(rows)
        rows = _product(module, "down_proj", expert, rows)
        if module.has_post_expert_norm:
            rows = module.post_expert_norm(rows)
        total_TH.index_add_(0, token, rows.float() * weights_TK[token, choice, None].float())
    return total_TH


def _product(module: Any, name: str, expert: int, rows: Tensor) -> Tensor:
    weight = stack_of(module, name).read(expert, expert + 1, torch.float32)[0]
    found = rows @ weight.t()
    adapter = getattr(module, name + ADAPTER, None)
    if adapter is not None and adapter.is_on:
        found += adapter.scale * (rows @ adapter.lora_A[expert].float().t() @ adapter.lora_B[expert].float())
    return found + getattr(module, f"{name}_bias")[expert].float() if module.has_bias else found


@torch.no_grad()
def _compare_outputs(name: str, module: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    given = [one.detach()[:TOKENS] for one in inputs]
    wanted = plain(module, *given)
    off = float((output.detach()[:TOKENS].float() - wanted).norm() / wanted.norm().clamp(min=1e-30))
    if not off <= TOLERANCE:
        what = (
            f"{name}: its experts, computed together, differ from plain products with each one's weights by {off:.0%}"
        )
        raise ModelError(what, _HINT)


def _compare_choices(name: str, before: Tensor | None, now: Tensor) -> None:
    if before is not None and not torch.equal(before, now):
        tokens = int((before != now).any(dim=1).sum())
        what = f"{name}: {tokens:,} tokens go to other experts when the layer is computed again in the backward pass"
        raise ModelError(what, f"set train.gradient_checkpointing = false, or {_HINT}")
