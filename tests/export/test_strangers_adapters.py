"""Adapters of other trainers: read under all their names, left out or refused by name where an export has no place."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora import run_folder
from qlora.errors import ExportError, QloraError
from qlora.events import Recorder
from qlora.export.merge.merge import Merge
from qlora.model import adapters, load
from qlora.model.adapter_folder import peft_config
from qlora.model.resolve import resolve
from qlora.recipe.sections import LoraSection, QuantizationSection
from tests.export.cases import KINDS, edit, exported, kl, logits, merge_of, name_the_base, of_peft, opened, trained
from tests.families import make_base
from tests.multimodal import make_multimodal

PLAIN = QuantizationSection(type="none")
FILE = "adapter_model.safetensors"
LORA = LoraSection(r=4, alpha=16, target_modules=("q_proj", "down_proj"), modules_to_save=("norm",))
TEXT = "base_model.model.model.language_model."
# How other tools name what PEFT calls TEXT…
NAMES: dict[str, Callable[[str], str]] = {
    "older transformers": lambda name: name.replace(TEXT, "base_model.model.language_model.model."),
    "oldest transformers": lambda name: name.replace(TEXT, "base_model.model.model.language_model.model."),
    "the text model's": lambda name: name.replace(TEXT, "base_model.model.model."),
    "without prefix": lambda name: name.removeprefix("base_model.model."),
    "with the adapter's name": lambda name: re.sub(r"(lora_[AB])\.weight$", r"\1.default.weight", name),
    "compiled": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
}


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_multimodal("gemma3", tmp_path_factory.mktemp("multimodal") / "gemma3")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base("llama", tmp_path_factory.mktemp("base") / "llama")


def renamed(adapter: Path, folder: Path, rename: Callable[[str], str]) -> Path:
    """A copy of an adapter as another trainer would have written it."""
    shutil.copytree(adapter, folder)
    (folder / "qlora.json").unlink(missing_ok=True)
    tensors = {rename(name): tensor for name, tensor in load_file(folder / FILE).items()}
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    return folder


def test_every_name_exports_to_the_same_bytes(gemma: Path, tmp_path: Path) -> None:
    model = trained(gemma, tmp_path / "ours", LORA, PLAIN)
    first = exported(tmp_path / "ours", out=tmp_path / "out").folder
    assert kl(logits(model), logits(opened(first))) < 1e-3
    wanted = (first / "model.safetensors").read_bytes()
    for kind, rename in NAMES.items():
        folder = renamed(tmp_path / "ours", tmp_path / kind, rename)
        assert set(load_file(folder / FILE)) != set(load_file(tmp_path / "ours" / FILE)), kind
        report = exported(folder, out=tmp_path / f"out of {kind}")
        assert (report.folder / "model.safetensors").read_bytes() == wanted, kind


def test_a_merged_multimodal_base_is_its_text_model(gemma: Path, tmp_path: Path) -> None:
    """Plain transformers opens it by the class that its config names; the notice says what is left out."""
    trained(gemma, tmp_path / "adapter", KINDS["plain"], PLAIN)
    recorder = Recorder()
    report = exported(tmp_path / "adapter", out=tmp_path / "out", sink=recorder)
    config = json.loads((report.folder / "config.json").read_text())
    assert config["architectures"] == ["Gemma3ForCausalLM"] and config["model_type"] == "gemma3_text"
    assert type(opened(report.folder)).__name__ == "Gemma3ForCausalLM"
    said = [event.as_dict()["message"] for event in recorder.of("notice")]
    assert any("Gemma3ForCausalLM" in message and "vision_tower" in message for message in said)


def vision(tensors: dict[str, torch.Tensor], moved: bool) -> dict[str, torch.Tensor]:
    """Adapters that a library put on the vision tower too."""
    place = "base_model.model.model.vision_tower.encoder.layers.0.self_attn.q_proj"
    values = torch.ones(32, 4) if moved else torch.zeros(32, 4)
    return {**tensors, f"{place}.lora_A.weight": torch.ones(4, 32), f"{place}.lora_B.weight": values}


def test_adapters_on_other_parts_are_left_out_where_they_never_moved(gemma: Path, tmp_path: Path) -> None:
    trained(gemma, tmp_path / "adapter", KINDS["plain"], PLAIN)
    alone = exported(tmp_path / "adapter", out=tmp_path / "one").folder / "model.safetensors"
    ours = load_file(tmp_path / "adapter" / FILE)
    save_file(vision(ours, moved=False), tmp_path / "adapter" / FILE)
    recorder = Recorder()
    report = exported(tmp_path / "adapter", out=tmp_path / "two", sink=recorder)
    assert (report.folder / "model.safetensors").read_bytes() == alone.read_bytes()
    said = [event.as_dict() for event in recorder.of("notice") if "never moved" in event.as_dict()["message"]]
    assert len(said) == 1 and said[0]["count"] == 1 and "vision_tower" in said[0]["message"]
    save_file(vision(ours, moved=True), tmp_path / "adapter" / FILE)
    with pytest.raises(ExportError, match=r"1 modules of its vision_tower .*and an export is the text model alone"):
        exported(tmp_path / "adapter", out=tmp_path / "three")
    save_file(
        {**ours, "base_model.model.model.multi_modal_projector.weight": torch.ones(2)}, tmp_path / "adapter" / FILE
    )
    with pytest.raises(ExportError, match="multi_modal_projector"):
        exported(tmp_path / "adapter", out=tmp_path / "three")


def test_patterns_mean_the_names_of_their_trainer(gemma: Path, tmp_path: Path) -> None:
    """An alpha that is given to `model.language_model.layers.0…` counts, whatever we call that layer."""
    trained(gemma, tmp_path / "ours", KINDS["some"], PLAIN)
    pattern = {"model.language_model.layers.0.self_attn.q_proj": 64, r"model\.language_model\.layers\.1\..*": 2}
    edit(tmp_path / "ours" / "adapter_config.json", alpha_pattern=pattern)
    by_name = {name: lora.scale for name, lora in merge_of(gemma, tmp_path / "ours").adapter.lora.items()}
    assert by_name == {
        "model.layers.0.self_attn.q_proj.weight": 16,
        "model.layers.0.mlp.down_proj.weight": 4,
        "model.layers.1.self_attn.q_proj.weight": 0.5,
        "model.layers.1.mlp.down_proj.weight": 0.5,
    }


def test_a_word_for_layers_that_no_base_here_has_changes_nothing(llama: Path, tmp_path: Path) -> None:
    """`fan_in_fan_out` is for GPT-2's transposed layers; peft takes it back on any other."""
    of_peft(llama, tmp_path / "adapter")
    before = peft_config(tmp_path / "adapter")
    edit(tmp_path / "adapter" / "adapter_config.json", fan_in_fan_out=True)
    assert peft_config(tmp_path / "adapter") == before


def merged(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    merge: Merge = merge_of(base, adapter)
    return {tensor.parameter: torch.cat(list(tensor.blocks(1))) for tensor in merge.tensors()}


@pytest.mark.parametrize(
    "settings",
    [
        {
            "target_modules": "all-linear",
            "use_rslora": True,
            "rank_pattern": {"q_proj": 8},
            "alpha_pattern": {"v_proj": 3},
        },
        {"use_dora": True, "layers_to_transform": [1]},
        {"target_modules": r"model\.layers\.\d+\.self_attn\.[qv]_proj", "exclude_modules": ["v_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"], "init_lora_weights": "gaussian"},
        {"trainable_token_indices": [5, 9, 40]},
        {"target_modules": ["q_proj"], "lora_dropout": 0.5, "loftq_config": {}, "init_lora_weights": "orthogonal"},
    ],
    ids=["rslora and patterns", "dora in one layer", "a pattern", "a whole head", "embeddings", "token rows", "others"],
)
def test_peft_s_own_kinds_are_merged_as_peft_merges_them(
    settings: dict[str, object], llama: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = of_peft(llama, tmp_path / "adapter", **settings)
    base = load.load_base(resolve(str(llama), "main", Recorder()), PLAIN, "auto", torch.device("cpu"), Recorder())
    plain = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16)
    plain = PeftModel.from_pretrained(plain, str(tmp_path / "adapter"), autocast_adapter_dtype=False).eval()
    if not settings.get("use_dora"):  # whose magnitudes peft rounds to bf16
        assert torch.equal(logits(adapters.open_saved(base, tmp_path / "adapter")), logits(plain))
    ours = merged(llama, tmp_path / "adapter")
    for name, wanted in model.merge_and_unload().state_dict().items():
        torch.testing.assert_close(ours[name], wanted, atol=2e-5, rtol=1e-5, msg=name)


BROKEN: dict[str, Callable[[Path], None]] = {
    "target_parameters fits no tensor": lambda it: edit(
        it / "adapter_config.json", target_parameters=["mlp.experts.down_proj"]
    ),
    "the bare parameter mlp.gate.weight": lambda it: edit(
        it / "adapter_config.json", target_parameters=["mlp.gate.weight"]
    ),
    "LORA adapters without bias can": lambda it: edit(it / "adapter_config.json", bias="lora_only"),
    "started with pissa_niter_4": lambda it: edit(it / "adapter_config.json", init_lora_weights="pissa_niter_4"),
    "started with loftq": lambda it: edit(it / "adapter_config.json", init_lora_weights="loftq"),
    "started with lora_ga": lambda it: edit(it / "adapter_config.json", init_lora_weights="lora_ga"),
    "'IA3'|IA3 with bias": lambda it: edit(it / "adapter_config.json", peft_type="IA3"),
    "biases in the adapter": lambda it: edit(it / "adapter_config.json", lora_bias=True),
    "aLoRA": lambda it: edit(it / "adapter_config.json", alora_invocation_tokens=[1, 2]),
    "use_dora is set but magnitudes": lambda it: edit(it / "adapter_config.json", use_dora=True),
    "no adapter_model.safetensors": lambda it: (it / FILE).rename(it / "adapter_model.bin"),
    "is not in the base .*, and 3 more": lambda it: save_file(
        {name.replace("layers", "blocks"): tensor for name, tensor in load_file(it / FILE).items()}, it / FILE
    ),
    "is there twice": lambda it: save_file(
        {**load_file(it / FILE), "model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.ones(4, 64)}, it / FILE
    ),
}


@pytest.mark.parametrize("message", BROKEN)
def test_what_no_merge_can_say_is_refused_by_name(message: str, llama: Path, tmp_path: Path) -> None:
    of_peft(llama, tmp_path / "adapter")
    name_the_base(tmp_path / "adapter", llama)
    BROKEN[message](tmp_path / "adapter")
    with pytest.raises(QloraError) as caught:
        exported(tmp_path / "adapter", out=tmp_path / "out")
    assert re.search(message, f"{caught.value.what} {caught.value.hint}")
    assert str(tmp_path / "adapter") in caught.value.what and not (tmp_path / "out").exists()


def test_folders_of_other_trainers_say_where_their_adapter_is(llama: Path, tmp_path: Path) -> None:
    for step in (90, 100, 1000):
        of_peft(llama, tmp_path / "outputs" / f"checkpoint-{step}")
    with pytest.raises(ExportError, match="holds no adapter itself, but 3 in folders") as caught:
        run_folder.adapter_of(tmp_path / "outputs")
    assert caught.value.hint.endswith(str(tmp_path / "outputs" / "checkpoint-1000"))
    with pytest.raises(ExportError, match="a whole model"):
        run_folder.adapter_of(llama)
    assert run_folder.adapter_of(tmp_path / "outputs" / "checkpoint-90")[0].name == "checkpoint-90"
