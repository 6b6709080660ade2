"""Plans of mixtures, by a config.json alone: what fits resident, what is streamed, and why."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora import api
from qlora.memory.question import Question
from tests.memory.mixture_shapes import PUBLISHED, folder_of
from tests.sampling import sampled

GIB = 1 << 30
SMALL = "Qwen3-30B-A3B"
OTHERS = sampled(name for name in PUBLISHED if name != SMALL)


def question(name: str, parent: Path, vram: str, *overrides: str) -> Question:
    recipe = api.recipe_or_model(str(folder_of(name, parent)), ("data.max_length=2048", *overrides))
    return api.question(recipe, vram=vram)


@pytest.mark.parametrize("name", [SMALL, *OTHERS])
def test_8_gb_stream_2048_tokens(name: str, tmp_path: Path) -> None:
    """What a run decides by itself: weights wait on the host, with the reason and what that costs."""
    plan = question(name, tmp_path, "8GB", "train.micro_batch_size=1", "train.gradient_checkpointing=true").decided()
    estimate = plan.estimate
    assert estimate.fits and estimate.limit_bytes < 8 * GIB
    assert estimate.settings["memory.stream_weights"] is True
    assert estimate.waiting_bytes > 0.85 * (PUBLISHED[name][2] - 3) * GIB
    assert "wait on the host, without that" in plan.reasons["memory.stream_weights"]
    assert estimate.tokens_per_second > 0 and estimate.speed is not None
    copied = estimate.savings["memory.stream_weights"].beside[0]
    assert copied > 0.4 and estimate.speed.up > 0.95 * copied, "a pass is no shorter than the copies beside it"


@pytest.mark.slow
@pytest.mark.parametrize("name", [SMALL, *(one for one in OTHERS if one.values != ("Gemma 4 26B-A4B",))])
def test_24_gb_hold_2048_tokens(name: str, tmp_path: Path) -> None:
    plan = question(name, tmp_path, "24GB", "train.micro_batch_size=1", "train.gradient_checkpointing=true").decided()
    assert plan.estimate.fits and plan.estimate.settings["memory.stream_weights"] is False
    assert plan.reasons["memory.stream_weights"] == "it fits without"


def test_rows_of_a_micro_batch_share_the_dequantization(tmp_path: Path) -> None:
    """What experts cost beside arithmetic is the same for any number of rows: two take less than twice one's time. By
    the kernel, which decodes as it multiplies, that is little: 7 % here."""
    asked = question(SMALL, tmp_path, "24GB", "train.gradient_checkpointing=true")
    one, two = (asked.estimate({"train.micro_batch_size": rows}) for rows in (1, 2))
    assert two.tokens_per_second > 1.05 * one.tokens_per_second
    assert one.speed is not None and not one.speed.host_bound


@pytest.mark.slow
def test_a_search_finds_plans_and_explains_one(tmp_path: Path) -> None:
    asked = question(SMALL, tmp_path, "8GB")
    plans = asked.search()
    assert plans and all(plan.estimate.fits for plan in plans)
    assert all(plan.estimate.settings["memory.stream_weights"] is True for plan in plans)
    assert any("memory.stream_weights" in plan.changes for plan in plans)
    explained = asked.explain(plans[0])
    assert len(explained.moments) > 2 * 48 and explained.changes


@pytest.mark.slow
@pytest.mark.parametrize("name", [SMALL, *OTHERS])
def test_the_page_of_models_says_what_the_estimate_does(name: str, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "recipes" / "MODELS.md").read_text(encoding="utf-8")
    (line,) = [line for line in page.splitlines() if line.startswith(f"| {name} |")]
    weights, resident, streamed = map(float, line.split("|")[2:5])
    assert weights == pytest.approx(PUBLISHED[name][2], abs=0.1)
    fixed = ("train.micro_batch_size=1", "train.gradient_checkpointing=true", "memory.offload_activations=false")
    places = {"RTX 4090": ("false", "device", resident), "RTX 3070": ("true", "host", streamed)}
    for card, (streams, embedding, said) in places.items():
        settings = (f"memory.stream_weights={streams}", f'memory.embedding="{embedding}"', "data.max_length=2048")
        asked = api.recipe_or_model(str(folder_of(name, tmp_path)), (*settings, *fixed))
        assert api.question(asked, gpu=card).estimate().needed_bytes / GIB == pytest.approx(said, abs=0.1)
