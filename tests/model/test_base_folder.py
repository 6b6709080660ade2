"""A folder becomes a checked base, or an error in two lines that says why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora.errors import ModelError
from qlora.events import Notice, Recorder
from qlora.model import base_folder
from qlora.model.resolve import resolve
from tests.families import make_base
from tests.model.conftest import at, change_config, load, refused


def test_a_folder(folder: Path) -> None:
    base = at(folder)
    assert (base.path, base.name, base.commit, base.stored_4bit) == (folder, str(folder), None, False)
    assert base.tensors["model.norm.weight"].shape == (64,) and base.config["model_type"] == "llama"


def test_the_fingerprint_tells_bases_apart(folder: Path, tmp_path: Path) -> None:
    same = make_base("llama", tmp_path / "copy")
    sharded = make_base("llama", tmp_path / "sharded", shards=2)
    wider = make_base("llama", tmp_path / "wider", vocab=385)
    first = at(folder).fingerprint
    assert at(same).fingerprint == first
    assert len({first, at(sharded).fingerprint, at(wider).fingerprint}) == 3
    assert at(change_config(same, rms_norm_eps=1e-4)).fingerprint != first


def test_folders_that_hold_no_base(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refused(str(tmp_path / "empty")).what
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    assert "is an adapter" in refused(str(tmp_path / "empty")).what
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pickle only (pytorch_model.bin)" in refused(str(folder)).what
    (folder / "config.json").write_text("{'model_type': 'llama'}")
    assert "not valid JSON" in refused(str(folder)).what


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"model_type": "llama9"}, "'llama9' is not known to the installed transformers"),
        ({"model_type": "phixtral", "auto_map": {"AutoModel": "evil.Model"}}, "auto_map) is never run"),
        ({"model_type": None}, "is not known"),
        ({"trust_remote_code": True}, "'trust_remote_code'"),
        ({"text_config": {"deep": [{"_target_": "os.system"}]}}, "'_target_'"),
        ({"_attn_implementation_internal": "evil/kernel"}, "'_attn_implementation_internal'"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "already quantized (gptq)"),
        ({"quantization_config": {"quant_method": "awq"}}, "already quantized (awq)"),
        ({"quantization_config": {"quant_method": "fp8"}}, "already quantized (fp8)"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "already quantized (mxfp4)"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "already quantized (compressed-tensors)"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "bitsandbytes 8-bit"),
        ({"text_config": {"model_type": "llama", "quantization_config": {"quant_method": "hqq"}}}, "(hqq)"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "encoder-decoder"),
        ({"architectures": ["LlamaModel"]}, "LlamaModel is not a causal"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "is not a causal"),
        ({"model_type": "vit", "architectures": None}, "vit is not a causal"),
    ],
)
def test_configurations_that_are_refused(folder: Path, fields: dict[str, Any], what: str) -> None:
    assert what in refused(str(change_config(folder, **fields))).what


def test_code_in_the_folder_is_left_alone(folder: Path) -> None:
    """Phi-3 and others bring an auto_map though transformers knows them: its own model is used, and said."""
    (folder / "evil.py").write_text("raise SystemExit('code of the folder was run')")
    change_config(folder, auto_map={"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"})
    sink = Recorder()
    base = resolve(str(folder), "main", sink)
    assert any(isinstance(event, Notice) and "never run" in event.message for event in sink.events)
    assert type(load(base)).__module__.startswith("transformers.")


@pytest.mark.parametrize(
    ("name", "tensor", "what"),
    [
        ("model.layers.0.mlp.down_proj.weight", torch.zeros(64, 128, dtype=torch.float8_e4m3fn), "F8_E4M3"),
        ("model.layers.0.mlp.down_proj.qweight", torch.zeros(8, 128, dtype=torch.int32), "already quantized"),
        ("model.layers.0.mlp.down_proj.weight", torch.zeros(64, 128, dtype=torch.int8), "stored in I8"),
        ("model.layers.0.mlp.down_proj.weight", torch.zeros(64, 128, dtype=torch.uint8), "stored in U8"),
    ],
)
def test_weights_that_are_refused(folder: Path, name: str, tensor: torch.Tensor, what: str) -> None:
    tensors = load_file(folder / "model.safetensors") | {name: tensor}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert what in refused(str(folder)).what


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("Qwen/Qwen3-8B-FP8", "(Qwen3-8B)"),
        ("/models/Llama-3-8B-GPTQ-Int4", "(Llama-3-8B)"),
        ("RedHatAI/gemma-3-4b-it-quantized.w4a16", "(gemma-3-4b-it)"),
        ("nvidia/Llama-3.1-8B-Instruct-FP8-KV", "(Llama-3.1-8B-Instruct)"),
        ("mistralai/Ministral-3-8B-Instruct-2512", "Ministral-3-8B-Instruct-2512-BF16"),
    ],
)
def test_a_quantized_copy_names_the_16_bit_one(name: str, told: str) -> None:
    for method in ("fp8", "compressed-tensors", "modelopt", "gptq", "awq", "fbgemm_fp8", "mxfp4"):
        config = {"model_type": "llama", "quantization_config": {"quant_method": method}}
        with pytest.raises(ModelError) as refusal:
            base_folder.check_config(config, name)
        assert f"({method})" in refusal.value.what and told in refusal.value.hint
