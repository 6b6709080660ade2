"""Every name that bases and adapters have for a weight is read as one, and written as the base's class has it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlora.events import Recorder
from qlora.model import adapters, load
from qlora.model.adapter_folder import read_adapter
from qlora.model.resolve import resolve
from qlora.model.weight_names import adapter_name, class_names, embedding_rows, other_part, text_module, text_name
from qlora.recipe.sections import LoraSection, QuantizationSection
from tests.export.cases import KINDS as LORAS
from tests.export.cases import logits, trained
from tests.multimodal import KINDS, make_multimodal

PLAIN = QuantizationSection(type="none")
LAYER = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "place",
    [
        "model.layers.0.self_attn.q_proj",
        "model.language_model.layers.0.self_attn.q_proj",
        "model.language_model.model.layers.0.self_attn.q_proj",
        "language_model.model.layers.0.self_attn.q_proj",
        "language_model.layers.0.self_attn.q_proj",
        "model.text_model.layers.0.self_attn.q_proj",
        "thinker.model.layers.0.self_attn.q_proj",
        "layers.0.self_attn.q_proj",
        "model.model.layers.0.self_attn.q_proj",
        "_orig_mod.model.layers.0._checkpoint_wrapped_module.self_attn.q_proj",
    ],
)
def test_a_layer_has_one_name(place: str) -> None:
    for prefix in ("base_model.model.", "", "base_model.model.base_model.model."):
        for tail, peft in (
            ("lora_A.weight", "lora_A.weight"),
            ("lora_A.default.weight", "lora_A.weight"),
            ("lora_B.my_adapter.weight", "lora_B.weight"),
            ("lora_embedding_A.default", "lora_embedding_A"),
            ("lora_magnitude_vector", "lora_magnitude_vector"),
            ("lora_magnitude_vector.weight", "lora_magnitude_vector"),
            ("lora_magnitude_vector.default.weight", "lora_magnitude_vector"),
            ("token_adapter.trainable_tokens_delta", "token_adapter.trainable_tokens_delta"),
            ("token_adapter.trainable_tokens_delta.default", "token_adapter.trainable_tokens_delta"),
            ("base_layer.weight", "base_layer.weight"),
        ):
            assert adapter_name(f"{prefix}{place}.{tail}") == f"{LAYER}.{peft}"


def test_heads_and_other_parts_have_their_names() -> None:
    for head in ("lm_head", "language_model.lm_head", "model.language_model.lm_head"):
        assert text_name(f"{head}.weight") == "lm_head.weight"
    assert [text_module(name) for name in ("lm_head", "model.language_model.norm", "q_proj", "norm")] == [
        *("lm_head", "model.norm", "q_proj", "model.norm")
    ]
    for part in ("vision_tower", "visual", "multi_modal_projector", "audio_tower", "embed_vision", "connector"):
        assert other_part(f"model.{part}.layers.0.q_proj") == other_part(f"{part}.layers.0.q_proj") == part
    assert other_part(LAYER) is None and other_part("lm_head.weight") is None


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_on_a_multimodal_base_is_what_peft_opens(kind: str, tmp_path: Path) -> None:
    """Plain transformers and peft, with no code of ours: the logits of our model, and no key without a place."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    folder = make_multimodal(kind, tmp_path / "base")
    base = resolve(str(folder), "main", Recorder())
    for name in ("plain", "whole") if kind == "gemma3" else ("plain",):
        lora = LoraSection(r=4, alpha=16, target_modules=("q_proj",), modules_to_save=("norm",))
        model = trained(folder, tmp_path / name, LORAS["plain"] if name == "plain" else lora, PLAIN)
        plain = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            opened = PeftModel.from_pretrained(plain, str(tmp_path / name), autocast_adapter_dtype=False).eval()
        assert not [warning for warning in said if "adapter keys" in str(warning.message)]
        assert torch.equal(logits(opened), logits(model))
        with opened.disable_adapter():
            assert not torch.equal(logits(opened), logits(model))
        again = load.load_base(base, PLAIN, "auto", torch.device("cpu"), Recorder())
        assert torch.equal(logits(adapters.open_saved(again, tmp_path / name)), logits(model))
        fresh = load.load_base(base, PLAIN, "auto", torch.device("cpu"), Recorder())
        fresh = adapters.attach(fresh, LORAS["plain"] if name == "plain" else lora, seed=2)
        adapters.load_into(fresh, tmp_path / name)
        assert torch.equal(logits(fresh.eval()), logits(model))


def test_other_parts_get_no_adapters(tmp_path: Path) -> None:
    """A vision tower has layers called q_proj too."""
    folder = make_multimodal("gemma3", tmp_path / "base")
    trained(folder, tmp_path / "adapter", LORAS["plain"], PLAIN)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert "q_proj" in config["target_modules"] and "vision_tower" in config["exclude_modules"]
    names = list(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert all(name.startswith("base_model.model.model.language_model.layers.") for name in names)
    assert {name.rpartition(".lora_")[0] for name in read_adapter(tmp_path / "adapter").tensors} == {
        name.removeprefix("base_model.model.").replace("language_model.", "").rpartition(".lora_")[0] for name in names
    }


def test_a_text_model_is_its_own_class(tmp_path: Path) -> None:
    from qlora.model.meta_model import build
    from tests.families import make_base

    base = resolve(str(make_base("gemma3", tmp_path / "base")), "main", Recorder())
    assert class_names(base, build(base).model) is None


def test_a_class_that_cannot_be_built_leaves_the_causal_models_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora.model import weight_names
    from qlora.model.meta_model import build

    base = resolve(str(make_multimodal("llava", tmp_path / "base")), "main", Recorder())
    model = build(base).model
    names = class_names(base, model)
    assert names is not None and names.of(LAYER) == "model.language_model.layers.0.self_attn.q_proj"
    said: list[str] = []
    assert class_names(base, model, said.append) is not None
    assert said == ["written for LlavaForConditionalGeneration: on LlamaForCausalLM peft finds no place for it"]

    def unknown(base: object) -> None:
        raise KeyError("vision")

    for whole, reason in ((lambda base: None, "transformers has none that reads images"), (unknown, "vision")):
        monkeypatch.setattr(weight_names, "_whole_model", whole)
        said.clear()
        assert class_names(base, model, said.append) is None
        (message,) = said
        assert message.startswith("written for LlamaForCausalLM alone, not for the class that") and reason in message


def test_the_embeddings_rows_are_those_that_are_stored(tmp_path: Path) -> None:
    from tests.families import make_base

    base = resolve(str(make_base("llama", tmp_path / "base")), "main", Recorder())
    rows = base.config["vocab_size"]
    assert embedding_rows(base.tensors) == rows
    beside = {"model.embed_tokens_per_layer.weight": base.tensors["model.norm.weight"]}
    assert embedding_rows(base.tensors | beside) == rows
    multimodal = resolve(str(make_multimodal("gemma3", tmp_path / "whole")), "main", Recorder())
    assert embedding_rows(multimodal.tensors) == multimodal.config["text_config"]["vocab_size"]
    assert embedding_rows({name: entry for name, entry in base.tensors.items() if "embed" not in name}) is None


def test_an_adapter_is_written_for_the_first_of_the_architectures(tmp_path: Path) -> None:
    """Qwen 3.5 opens as either of two classes, and peft finds no key on the other: config.json names one."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = make_multimodal("qwen3_5", tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen3_5ForConditionalGeneration"]
    base = resolve(str(folder), "main", Recorder())
    said: list[str] = []
    model = trained(folder, tmp_path / "whole", LORAS["plain"], PLAIN)
    names = class_names(base, model, said.append)
    assert names is not None and names.opens_on == "Qwen3_5ForConditionalGeneration"
    assert said == ["written for Qwen3_5ForConditionalGeneration: on Qwen3_5ForCausalLM peft finds no place for it"]
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["Qwen3_5ForCausalLM"]}))
    model = trained(folder, tmp_path / "text", LORAS["plain"], PLAIN)
    said.clear()
    assert class_names(resolve(str(folder), "main", Recorder()), model, said.append) is None and not said
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        opened = PeftModel.from_pretrained(plain, str(tmp_path / "text"), autocast_adapter_dtype=False).eval()
    assert not [warning for warning in warned if "adapter keys" in str(warning.message)]
    assert torch.equal(logits(opened), logits(model))
