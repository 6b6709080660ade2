"""What process 0 tells the others of what memory decides."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qlora.model.weight_receiving import Place
from qlora.recipe.reading import recipe_of_base
from qlora.training.memory_plan import MemorySettings
from qlora.training.words import of_settings, word_of
from tests.card import Card, rehearsal


def test_a_place_is_told_with_who_shares_it() -> None:
    settings = MemorySettings(2, True, place=Place(host_embedding=True, shards=3))
    told = json.loads(json.dumps(of_settings(settings)))
    assert Place(**told.pop("place")) == settings.place
    assert told.pop("answers_at_once") == settings.answers_at_once
    assert told == {"micro_batch_size": 2, "gradient_checkpointing": True, "offload_activations": False}


def test_the_limit_is_told_of_a_processor_and_each_card_asks_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The RAM of a machine is shared by its processes; what a card has free each asks its own card."""
    recipe = recipe_of_base("owner/name")
    machine = SimpleNamespace(limit_bytes=5 << 30)
    planner: Any = SimpleNamespace(estimator=SimpleNamespace(machine=machine))
    job: Any = SimpleNamespace(
        recipe=recipe,
        device=torch.device("cpu"),
        exam=None,
        tokenizer=SimpleNamespace(content={"tokenizer.json": b"{}"}),
        base=SimpleNamespace(commit=None, fingerprint="b"),
        data=SimpleNamespace(fingerprint="r"),
    )
    settings = MemorySettings(1, True, planner=planner)
    assert word_of(job, recipe.data, settings, [])["limit"] == 5 << 30
    with rehearsal(monkeypatch, Card()):
        word = word_of(job, recipe.data, settings, [])
    assert word["limit"] is None and word["rows"] == "r" and json.loads(json.dumps(word)) == word
