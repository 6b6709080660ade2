"""What the estimator says of published shapes, against published figures and the cards that recipes are named after."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qlora import api
from qlora.errors import DoesNotFit
from qlora.memory import hardware
from qlora.memory.changes import changed
from qlora.memory.estimate import DataFacts, Estimator, workload_of
from qlora.memory.trace import CATEGORIES
from qlora.model.generate import SAMPLE_TOKENS
from qlora.recipe.reading import load_recipe, recipe_of_base
from qlora.units import gib
from tests import all_families
from tests.memory.cases import ask
from tests.memory.mixture_shapes import BASES, folder_of
from tests.memory.shapes import SHAPES, config_folder

RECIPES = Path(__file__).parent.parent.parent / "recipes"
# Recipes that name no card: the smallest one that the README promises them.
ALONE = "train.gradient_checkpointing=true"
SMALLEST_CARD = {"llama-3.2-1b": 6, "smollm2-135m": 6}


def test_the_parts_add_up_and_are_all_there(tmp_path: Path) -> None:
    estimate = ask(tmp_path, 8, gpu="RTX 4090")
    assert tuple(estimate.components) == (*CATEGORIES, "context")
    assert sum(estimate.components.values()) == estimate.peak_bytes == max(estimate.phases.values())
    assert set(estimate.phases) == {"load", "train", "selfcheck", "evaluate", "generate", "resume", "merge"}
    assert estimate.fits and estimate.peak_bytes + estimate.error_bytes < estimate.limit_bytes
    # 6.98e9 values at 0.5 byte and 0.127 bit, 1.05e9 in bf16: QLoRA section 3, Llama 3.1's shape.
    assert estimate.components["weights"] == pytest.approx(6.979e9 * (0.5 + 0.127 / 8) + 1.051e9 * 2, rel=0.005)
    # Rank 16 on all seven layers of each block: 41.9 million parameters in bf16.
    assert estimate.components["adapters"] == pytest.approx(41_943_040 * 2, rel=0.01)


def test_what_fits_only_without_its_margin_does_not_fit(tmp_path: Path) -> None:
    known = ask(tmp_path, 8, gpu="RTX 4090")
    between, both = known.peak_bytes + known.error_bytes // 2, known.peak_bytes + known.error_bytes
    assert known.error_bytes > 0
    assert not replace(known, limit_bytes=between).fits and replace(known, limit_bytes=both).fits


def test_packs_have_masks_and_rows_alone_have_none(tmp_path: Path) -> None:
    """A mask of 4,096 x 4,096 pairs is 16 MiB in a byte each and 32 in bf16; keys are repeated beside it."""
    packed, alone = (
        ask(tmp_path, 8, "data.max_length=4096", ALONE, "model.attention=sdpa", f"data.packing={on}", vram="24GiB")
        for on in ("true", "false")
    )
    assert packed.tensor_bytes - alone.tensor_bytes > 48 << 20


@pytest.mark.parametrize("packing", [True, False])
def test_packs_are_simulated_as_packs_and_rows_alone_as_single_documents(packing: bool) -> None:
    recipe = changed(recipe_of_base("some/base"), {"data.packing": packing})
    assert workload_of(recipe).packed is packing


def test_scores_of_eager_attention_are_tensors_and_so_is_what_its_backward_needs(tmp_path: Path) -> None:
    """Of 32 heads and 2,048 tokens in float32 they are 512 MiB; a softmax's backward holds more than three of them."""
    settings = ("data.max_length=2048", ALONE, "model.attention=eager")
    eager, fused = ask(tmp_path, 8, *settings, vram="24GiB"), ask(tmp_path, 8, *settings[:2], vram="24GiB")
    assert eager.tensor_bytes - fused.tensor_bytes > 3 * (512 << 20)
    assert eager.error_bytes > fused.error_bytes


def test_a_laptops_card_has_its_own_limit_and_the_same_peak(tmp_path: Path) -> None:
    desktop, laptop = (ask(tmp_path, 8, ALONE, gpu=name) for name in ("RTX 4090", "RTX 4090 Laptop"))
    assert laptop.limit_bytes < desktop.limit_bytes and laptop.tensor_bytes == desktop.tensor_bytes


SLOW_RECIPES = (  # half a minute each the first ones, which are mixtures; the others are as recipes that CI looks at
    *("glm-4.7-flash-24gb", "qwen3.6-35b-a3b-24gb", "gpt-oss-20b-16gb", "qwen3-30b-a3b-8gb"),
    *("qwen3-32b-24gb", "qwen3-14b-16gb", "mistral-7b-12gb", "llama-3.1-8b-12gb", "llama-3.2-1b"),
)


@pytest.mark.parametrize(
    "file",
    [
        pytest.param(file, id=file.stem, marks=[pytest.mark.every] if file.stem in SLOW_RECIPES else [])
        for file in sorted(RECIPES.glob("*.toml"))
    ],
)
def test_every_recipe_fits_the_card_in_its_name(file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(file)
    mixture = BASES.get(recipe.model.base)
    if recipe.model.base not in SHAPES and mixture is None:
        assert file.stem in ("quickstart", "manuals")
        return
    named = file.stem.rpartition("-")[2]
    gigabytes = int(named[:-2]) if named.endswith("gb") else SMALLEST_CARD[file.stem]
    folder = config_folder(recipe.model.base, tmp_path) if mixture is None else folder_of(mixture, tmp_path)
    local = changed(recipe, {"model.base": str(folder)})
    limit = hardware.common_cards()[f"{gigabytes} GB"]
    estimate = api.estimate_memory(local, vram=f"{limit}B")
    assert estimate.fits, f"{gib(estimate.peak_bytes)} of {gib(limit)}"


def test_more_tokens_than_any_memory_holds(tmp_path: Path) -> None:
    """They would be simulated for minutes, and overflow what a tensor may have."""
    with pytest.raises(DoesNotFit, match=r"= 65,536 with data\.max_length = 2,048: 134,217,728 tokens in one pass"):
        ask(tmp_path, 8, "train.micro_batch_size=65536", "train.batch_size=65536", vram="24GiB")


@pytest.mark.parametrize(
    ("family", "overrides", "sizes"),
    [
        ("bamba", {"num_hidden_layers": 8, "attn_layer_indices": [1]}, [8]),  # no list says which layers attend
        ("llama", {"num_hidden_layers": 8}, [3, 4]),
    ],
)
def test_layers_that_a_few_do_not_show_are_all_simulated(
    family: str, overrides: dict[str, object], sizes: list[int]
) -> None:
    text = all_families.make_config(family, overrides)
    estimator = Estimator(text, family, hardware.asked_for(None, "8GiB", "auto"))
    assert estimator.estimate(recipe_of_base("some/base")).peak_bytes > 0
    assert [simulator.sizes for simulator in estimator._simulators.values()] == [sizes]


def test_the_check_before_a_run_and_long_answers_are_counted(tmp_path: Path) -> None:
    """All logits of 256 tokens at most, however long the rows are; exact match writes as long as its rows want."""
    facts = DataFacts(longest=512, batch_size=4, prompt_tokens=64, has_eval=True, typical=64)
    base = config_folder("HuggingFaceTB/SmolLM2-135M-Instruct", tmp_path)
    recipe = recipe_of_base(str(base), ["data.max_length=512", "eval.exact_match_rows=4", "lora.r=4"])
    estimator = api.question(recipe, gpu="RTX 4090").estimator
    short, long = (estimator.estimate(recipe, replace(facts, answer_tokens=tokens)) for tokens in (32, 4096))
    logits = 256 * 49_152 * (2 + 4 + 4)  # bf16, fp32, and their log-softmax
    checks = [one.phases["selfcheck"] - one.phases["resume"] for one in (short, long)]
    assert checks[0] == checks[1] == pytest.approx(logits, rel=0.35)
    assert workload_of(recipe, facts).new_tokens == SAMPLE_TOKENS
    assert workload_of(recipe, replace(facts, answer_tokens=900)).new_tokens == 900
    assert workload_of(recipe).new_tokens == 256  # the half of a row that is no prompt
    # Keys and values of 3 heads of 64 in 30 layers, in bf16, for 4 rows.
    cache = 4 * (4096 - SAMPLE_TOKENS) * 2 * 3 * 64 * 2 * 30
    assert long.phases["generate"] - short.phases["generate"] >= cache
