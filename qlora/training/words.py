"""What process 0 tells the others of a run: all that they need to load it, and what decides about memory."""

from __future__ import annotations

from base64 import b64encode
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from qlora import device as hardware
from qlora import numerics
from qlora.recipe.sections import DataSection
from qlora.training.memory_plan import MemorySettings

if TYPE_CHECKING:
    from qlora.training.setup import Job

Word = dict[str, Any]


def word_of(job: Job, data: DataSection, settings: MemorySettings) -> Word:
    """All that another process needs to load the same run, its rows and its base read by itself."""
    recipe, plan, planner = job.recipe, settings.plan, settings.planner
    idle = set() if recipe.data.documents else {"study", "exam"}  # as in a run's recipe.toml
    chosen = recipe if plan is None else recipe.model_copy(update={"memory": plan.recipe.memory})
    limit = planner.estimator.machine.limit_bytes if planner and not hardware.is_card(job.device) else None
    numbers = numerics.of_run()
    return {
        "do": "begin",
        "recipe": chosen.model_dump(mode="json", exclude_none=True, exclude=idle),
        "tokenizer": {name: b64encode(data).decode() for name, data in job.tokenizer.content.items()},
        "numerics": None if numbers is None else numbers.model_dump(mode="json"),
        "commit": job.base.commit,
        "base": job.base.fingerprint,
        "rows": job.data.fingerprint,
        "packing": data.packing,
        "limit": limit,
        "settings": of_settings(settings),
    }


def of_settings(settings: MemorySettings) -> Word:
    """What decides about memory and may change under way."""
    return {
        "micro_batch_size": settings.micro_batch_size,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "offload_activations": settings.offload_activations,
        "place": asdict(settings.place),
    }
