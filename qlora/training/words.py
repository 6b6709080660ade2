"""What process 0 tells the others of a run: all that they need to load it, and what decides about memory."""

from __future__ import annotations

from base64 import b64encode
from dataclasses import asdict
from typing import TYPE_CHECKING

from qlora import device as hardware
from qlora import numerics
from qlora.recipe.sections import DataSection
from qlora.training import handing
from qlora.training.dividing import Word
from qlora.training.memory_plan import MemorySettings

if TYPE_CHECKING:
    from qlora.training.setup import Job


def word_of(job: Job, data: DataSection, settings: MemorySettings, told: list[Word]) -> Word:
    """All that another process needs to load the same run, its rows and its base read by itself."""
    recipe, plan, planner = job.recipe, settings.plan, settings.planner
    chosen = recipe if plan is None else recipe.model_copy(update={"memory": plan.recipe.memory})
    limit = planner.estimator.machine.limit_bytes if planner and not hardware.is_card(job.device) else None
    numbers, learnt = numerics.of_run(), handing.learnt_by(job)
    return {
        "do": "begin",
        "recipe": handing.without_documents(chosen, learnt),
        "study": handing.told(recipe, learnt),
        "tokenizer": {name: b64encode(data).decode() for name, data in job.tokenizer.content.items()},
        "numerics": None if numbers is None else numbers.model_dump(mode="json"),
        "commit": job.base.commit,
        "base": job.base.fingerprint,
        "rows": job.data.fingerprint,
        "packing": data.packing,
        "limit": limit,
        "settings": told,
    }


def of_settings(settings: MemorySettings) -> Word:
    """What decides about memory and may change under way."""
    return {
        "micro_batch_size": settings.micro_batch_size,
        "answers_at_once": settings.answers_at_once,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "offload_activations": settings.offload_activations,
        "place": asdict(settings.place),
    }
