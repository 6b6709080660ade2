"""What is seen of an architecture on meta: against what tiny models of it do in fp32, and against planted changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers.models.llama import modeling_llama

from qlora.errors import ModelError
from qlora.model import family_facts, packing_table
from qlora.model.family_facts import facts_of, trainable_facts
from tests import all_families, mixtures
from tests.families import make_config
from tools.packing_table import measure, too_lenient


@pytest.fixture
def unknown_families(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if no family had been measured; what was seen before, and what is seen here, is forgotten."""
    monkeypatch.setattr(family_facts, "LEAKS", {})
    family_facts._facts.cache_clear()
    yield
    family_facts._facts.cache_clear()


SCALED = ("minicpm3", "recurrent_gemma", "granite", "cohere")
# A family, why its rows share no packs, and whether its trunk is computed layer by layer.
SEEN = [
    ("llama", "", True),
    ("gptj", "", True),
    ("olmo3", "", True),
    ("cohere2", "", True),
    ("gemma4_text", "", False),
    ("biogpt", "BioGptAttention gets no mask that keeps documents apart", True),
    ("bloom", "BloomAttention attends in code of its own", True),
    ("lfm2", "Lfm2ShortConv convolves over tokens", True),
    ("opt", "OPTAttention lets documents of one pack see each other", True),
    ("qwen3_5_text", "Qwen3_5GatedDeltaNet convolves over tokens", True),
    ("bamba", "BambaMixer convolves over tokens", False),
]


@pytest.mark.parametrize(("family", "packing", "by_layers"), SEEN)
@pytest.mark.usefixtures("unknown_families")
def test_what_is_seen_is_what_is_measured(family: str, packing: str, by_layers: bool) -> None:
    facts = facts_of(all_families.make_config(family), family)
    assert facts.packing == packing
    assert (facts.layerwise == "") is by_layers and facts.head == ""
    measured = measure(all_families.make_config(family))
    assert too_lenient(facts, measured) == []
    assert (measured.leak > packing_table.LARGEST_LEAK) is bool(packing)


MIXED = [
    ("qwen3_moe", ""),
    ("gemma4_text", ""),
    ("gpt_oss", "GptOssAttention lets documents of one pack see each other"),
    ("qwen3_5_moe_text", "Qwen3_5MoeGatedDeltaNet convolves over tokens"),
    *(pytest.param(family, "", marks=pytest.mark.slow) for family in ("mixtral", "glm4_moe_lite", "deepseek_v3")),
]


@pytest.mark.parametrize(("family", "packing"), MIXED)
@pytest.mark.usefixtures("unknown_families")
def test_mixtures_share_packs(family: str, packing: str) -> None:
    """Routing is each token's own affair; what keeps rows apart is attention, as in dense models."""
    facts = facts_of(mixtures.make_config(family), family)
    assert (facts.packing, facts.layerwise, facts.head) == (packing, "", "")
    measured = measure(mixtures.make_config(family))
    assert too_lenient(facts, measured) == []
    assert (measured.leak > packing_table.LARGEST_LEAK) is bool(packing)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["falcon_h1", "granitemoehybrid", "jamba", "mpt", "xglm", "zamba2", "recurrent_gemma"]
)
@pytest.mark.usefixtures("unknown_families")
def test_other_families_that_leak_are_seen(family: str) -> None:
    facts = facts_of(all_families.make_config(family), family)
    measured = measure(all_families.make_config(family))
    assert facts.packing and measured.leak > packing_table.LARGEST_LEAK
    assert too_lenient(facts, measured) == []


@pytest.mark.usefixtures("unknown_families")
def test_a_family_that_is_measured_as_safe_is(monkeypatch: pytest.MonkeyPatch) -> None:
    config = all_families.make_config("falcon")
    assert facts_of(config, "falcon").packing.startswith("FalconAttention")
    family_facts._facts.cache_clear()
    monkeypatch.setattr(family_facts, "LEAKS", {"falcon": 1e-6})
    assert facts_of(config, "falcon").packing == ""
    family_facts._facts.cache_clear()
    monkeypatch.setattr(family_facts, "LEAKS", {"falcon": 2e-3})
    assert facts_of(config, "falcon").packing != ""


def test_every_family_of_the_table_is_measured_in_its_bounds() -> None:
    assert packing_table.LEAKS
    for family in packing_table.LEAKS:
        assert measure(all_families.make_config(family)).leak <= packing_table.LARGEST_LEAK, family


def _without_positions(**named: Any) -> Any:
    from transformers.masking_utils import create_causal_mask

    return create_causal_mask(**{**named, "position_ids": None})


def _none(**_: Any) -> None:
    return None


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (_without_positions, "lets documents of one pack see each other"),
        (_none, "gets no mask that keeps documents apart"),
    ],
)
@pytest.mark.usefixtures("unknown_families")
def test_a_mask_that_lets_documents_meet_is_seen(
    mask: Callable[..., Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modeling_llama, "create_causal_mask", mask)
    assert facts_of(make_config("llama"), "llama").packing == f"LlamaAttention {reason}"


@pytest.mark.usefixtures("unknown_families")
def test_a_mask_by_places_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents stay apart, but where one begins to forget depends on where it lies in the pack."""
    from transformers.masking_utils import create_causal_mask

    def by_place(**named: Any) -> Any:
        mask = create_causal_mask(**named)
        places = torch.arange(mask.shape[-1]) // 5
        return mask & (places[:, None] == places[None, :])

    monkeypatch.setattr(modeling_llama, "create_causal_mask", by_place)
    assert facts_of(make_config("llama"), "llama").packing == "LlamaAttention attends by the place in the row"


@pytest.mark.usefixtures("unknown_families")
def test_a_bias_by_distance_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = modeling_llama.LlamaAttention.forward

    def biased(self: Any, hidden_states: Any, *args: Any, **named: Any) -> Any:
        return real(self, hidden_states, *args, **named, position_bias=torch.zeros(1, 1, 1, 1))

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", biased)
    assert facts_of(make_config("llama"), "llama").packing == "LlamaAttention adds a bias by distance"


@pytest.mark.parametrize("change", [lambda logits: 30 * torch.tanh(logits / 30), lambda logits: logits * 1.01])
@pytest.mark.usefixtures("unknown_families")
def test_a_head_that_does_something_unknown_is_refused(
    change: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """1.01 changes a token's loss by less than the noise of 4-bit weights."""
    real = modeling_llama.LlamaForCausalLM.forward

    def changed(self: Any, *args: Any, **named: Any) -> Any:
        output = real(self, *args, **named)
        output.logits = change(output.logits)
        return output

    monkeypatch.setattr(modeling_llama.LlamaForCausalLM, "forward", changed)
    with pytest.raises(ModelError, match="base: llama: its forward does something to its logits"):
        trainable_facts(make_config("llama"), "base")


@pytest.mark.parametrize("family", ["hyperclovax", *(pytest.param(name, marks=pytest.mark.slow) for name in SCALED)])
@pytest.mark.usefixtures("unknown_families")
def test_heads_that_scale_or_cap_are_known_exactly(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = {"logits_soft_cap": 2.0} if family == "recurrent_gemma" else {}
    assert facts_of(all_families.make_config(family, overrides), family).head == ""
    assert measure(all_families.make_config(family, overrides)).head < 1e-5
    family_facts._facts.cache_clear()
    monkeypatch.setattr("qlora.step.forward.logits_transform", lambda config: None)
    assert "forward does something" in facts_of(all_families.make_config(family, overrides), family).head
    assert measure(all_families.make_config(family, overrides)).head > 1e-2


def test_long_models_of_like_layers_are_seen_by_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    family_facts._facts.cache_clear()
    built: list[int] = []
    real = family_facts.build_unmatched

    def build(text: Any, *rest: Any) -> Any:
        built.append(text.num_hidden_layers)
        return real(text, *rest)

    monkeypatch.setattr(family_facts, "build_unmatched", build)
    facts_of(make_config("llama", overrides={"num_hidden_layers": 40}), "llama")
    kinds = ["sliding_attention"] * 3 + ["full_attention"] * 3
    facts_of(make_config("gemma3", overrides={"num_hidden_layers": 6, "layer_types": kinds}), "gemma3")
    assert built == [family_facts.FEW_LAYERS, 6]
