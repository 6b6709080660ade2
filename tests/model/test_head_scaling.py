"""Keys that scale or cap logits and that nobody would read are refused by name; others are left alone."""

from __future__ import annotations

from typing import Any

import pytest

from qlora.errors import ModelError
from qlora.model import head_scaling
from qlora.model.family_facts import trainable_facts
from tests import all_families
from tests.families import make_config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("logit_cap", 20.0),
        ("final_logit_softcapping", 30.0),
        ("logits_scaling", 8),
        ("output_multiplier_scale", 0.25),
        ("lm_head_multiplier", 0.5),
        ("mup_width_multiplier", 4.0),
    ],
)
def test_a_key_that_the_class_does_not_declare_is_refused_by_name(key: str, value: float) -> None:
    with pytest.raises(ModelError, match=f"base: config.json: {key} = {value:g} scales or caps logits") as refused:
        trainable_facts(make_config("llama", overrides={key: value}), "base")
    assert refused.value.hint == head_scaling.HINT


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("logits_scaling", 1.0),
        ("final_logit_softcapping", None),
        ("attn_logit_softcapping", 50.0),
        ("router_aux_loss_coef", 0.1),
        ("num_logits_to_keep", 5),
        ("output_router_logits", True),
        ("rope_scaling_factor", 8.0),
    ],
)
def test_neutral_values_and_keys_of_other_things_are_none(key: str, value: Any) -> None:
    assert head_scaling.unread_key(make_config("qwen2", overrides={key: value})) == ""


@pytest.mark.parametrize("family", all_families.DENSE)
def test_no_family_is_refused_for_keys_of_its_own(family: str) -> None:
    assert head_scaling.unread_key(all_families.make_config(family)) == ""


def test_a_reason_names_the_keys_that_may_be_meant() -> None:
    text = head_scaling.reason(all_families.make_config("granite"))
    assert text == "granite: its forward does something to its logits that is not known here (logits_scaling = 4)"
