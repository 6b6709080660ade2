"""What process 0 tells the others of what memory decides."""

from __future__ import annotations

import json

from qlora.model.weight_receiving import Place
from qlora.training.memory_plan import MemorySettings
from qlora.training.words import of_settings


def test_a_place_is_told_with_who_shares_it() -> None:
    settings = MemorySettings(2, True, place=Place(host_embedding=True, shards=3))
    told = json.loads(json.dumps(of_settings(settings)))
    assert Place(**told.pop("place")) == settings.place
    assert told.pop("answers_at_once") == settings.answers_at_once
    assert told == {"micro_batch_size": 2, "gradient_checkpointing": True, "offload_activations": False}
