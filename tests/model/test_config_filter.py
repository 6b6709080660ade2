"""A stranger's config.json: what its model can read stays, whatever else stands in it reaches nothing."""

from __future__ import annotations

from typing import Any

from qlora.model.config_filter import NEVER_READ, open_config, reduce_config

LLAMA: dict[str, Any] = {"model_type": "llama", "hidden_size": 64, "rms_norm_eps": 1e-5}


def test_keys_that_the_model_reads_stay_old_names_too() -> None:
    known = reduce_config({**LLAMA, "rope_theta": 5e5, "pretraining_tp": 1})
    assert known.dropped == ()
    assert known.values == {**LLAMA, "rope_theta": 5e5, "pretraining_tp": 1}


def test_unknown_keys_and_our_own_choices_are_dropped_and_named() -> None:
    known = reduce_config({**LLAMA, "zz_hook": "os.system", **dict.fromkeys(NEVER_READ, "evil/kernel")})
    assert known.values == LLAMA
    assert known.dropped == tuple(sorted(("zz_hook", *NEVER_READ)))


def test_parts_are_reduced_by_themselves() -> None:
    part = {"model_type": "gemma3_text", "hidden_size": 32, "zz_hook": 1}
    known = reduce_config({"model_type": "gemma3", "text_config": part})
    assert known.values["text_config"] == {"model_type": "gemma3_text", "hidden_size": 32}
    assert known.dropped == ("text_config.zz_hook",)
    # A part without a type of its own is read by the whole's model, and gets no key that it did not have.
    bare = reduce_config({"model_type": "gemma3", "text_config": {"hidden_size": 32, "zz_hook": 1}})
    assert bare.values["text_config"] == {"hidden_size": 32} and bare.dropped == ("text_config.zz_hook",)


def test_an_unknown_model_keeps_what_all_models_have() -> None:
    known = reduce_config({"model_type": "llama9", "architectures": ["Llama9"], "zz_hook": 1})
    assert "zz_hook" not in known.values and known.values["architectures"] == ["Llama9"]


def test_the_opened_configuration_has_no_dropped_key() -> None:
    config = open_config({**LLAMA, "zz_hook": "os.system", "attn_implementation": "evil/kernel"})
    assert config.hidden_size == 64 and config.rms_norm_eps == 1e-5
    assert not hasattr(config, "zz_hook") and config._attn_implementation != "evil/kernel"


def test_outputs_are_not_the_files_to_choose() -> None:
    """Old configurations hold what a forward pass returned, and labels of a classifier: neither read nor told."""
    odd = {"return_dict": False, "output_hidden_states": True, "num_labels": 10**6, "id2label": {"0": "x"}}
    known = reduce_config({**LLAMA, **odd})
    assert known.values == LLAMA and known.dropped == ()
