"""What a run's numbers depend on, decided as it starts; for a resumed run as recorded, where that exists here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora import device as hardware
from qlora import numerics, run_folder
from qlora.events import Notice, Sink
from qlora.numerics import Numerics
from qlora.recipe.reading import Recipe

if TYPE_CHECKING:
    import torch

    from qlora.model.base_folder import BaseFolder


def decide(recipe: Recipe, base: BaseFolder, device: torch.device, recorded: Numerics | None) -> Numerics:
    """The facts of a run of `recipe` on `base` here; `recorded` is what its checkpoint says, None for a new run.

    Where something can be chosen, what was recorded is chosen again if it exists here: those are the fields that this
    function takes from `recorded`. All else is as it is.
    """
    from qlora.model import compiled, cpu_attention, experts, lora_functions, precision
    from qlora.model.attention import name_of
    from qlora.model.attention_choice import choose
    from qlora.model.meta_model import choose_attention, text_config
    from qlora.step import head_loss
    from qlora.step.kernels import trial
    from qlora.step.loss import chunk_tokens
    from qlora.step.tiled_mlp import TILE_ROWS

    text, _ = text_config(base.config, base.name)
    wanted = recipe.model.attention
    as_before = wanted == "auto" and recorded is not None and recorded.attention == "eager"
    named = choose_attention(text, "eager" if as_before else wanted, base.name)
    before = recorded.attention if recorded else None
    if recorded is not None and before is None and not hardware.is_card(device):
        before = named  # from before this was recorded: a CPU attended with a mask
    kernel, _ = choose(text, named, wanted, device, before)
    fp32_tokens = cpu_attention.SHORT if recorded is None else recorded.fp32_tokens
    chunk = chunk_tokens(text.vocab_size, hardware.is_card(device))
    exact = recipe.train.deterministic and (recorded is None or recorded.deterministic is not False)
    return Numerics(
        **_machine(device),
        deterministic=exact,
        attention=named if kernel is None else name_of(kernel),
        head_chunk=(recorded.head_chunk if recorded else None) or chunk,
        loss_chunk=(recorded.loss_chunk or 0) if recorded else head_loss.chunk_of_run(text.vocab_size, device),
        head_block=(recorded.head_block or 0) if recorded else None,  # a new run's follows from where its head is
        functions=lora_functions.choose(recipe.lora, recorded, trial.work(device)),
        mlp_tile=TILE_ROWS if recorded is None else recorded.mlp_tile,
        fp32_tokens=None if hardware.is_card(device) else fp32_tokens,
        compiled=compiled.choose(recipe.model.compile, device, recorded),
        dtype=precision.choose(recipe.model.dtype, device, recorded),
        experts=experts.choose(base.config, device, recorded),
    )


def _machine(device: torch.device) -> dict[str, Any]:
    import torch

    from qlora.model.cpu_matmul import has_bf16_products

    if hardware.is_card(device):
        return {
            "device": hardware.name_of(device),
            "capability": ".".join(map(str, hardware.capability(device))),
            "kernels": "bitsandbytes on the GPU",
        }
    return {
        "device": device.type,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "kernels": "bf16" if has_bf16_products() else "fp32",
    }


def say_what_differs(checkpoint: Path, recorded: Numerics | None, now: Numerics, sink: Sink) -> None:
    """One notice that names each difference between what a checkpoint was made with and what is here.

    A checkpoint of a version that recorded nothing but packages is compared by them alone.
    """
    changed = [*(numerics.differences(recorded, now) if recorded else ()), *run_folder.other_versions(checkpoint)]
    if changed:
        message = f"the rest of the run is not bit for bit what it would have been: {', '.join(changed)}"
        sink.emit(Notice("resume", message, len(changed)))
