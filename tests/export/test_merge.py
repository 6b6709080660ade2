"""The merged model is the trained one: every kind of adapter, both merge bases; what cannot be merged is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora import api
from qlora.errors import ExportError, QloraError
from qlora.events import Recorder
from qlora.export.merge import scale_of
from qlora.model import adapters, hub, load
from qlora.recipe import LoraSection, QuantizationSection
from tests.families import make_base

NF4 = QuantizationSection()
KINDS = {
    "plain": LoraSection(r=4, alpha=16),
    "rslora": LoraSection(r=9, alpha=16, use_rslora=True),
    "dora": LoraSection(r=4, alpha=16, use_dora=True),
    "some": LoraSection(r=4, alpha=16, target_modules=("q_proj", "down_proj")),
    "whole": LoraSection(r=4, alpha=16, modules_to_save=("lm_head",)),
}


def trained(base_dir: Path, folder: Path, lora: LoraSection, quantization: QuantizationSection = NF4):  # type: ignore[no-untyped-def]
    """A model with an adapter that has moved, and that adapter saved with what it was trained against."""
    base = hub.resolve(str(base_dir), "main", Recorder())
    model = load.load_base(base, quantization, "auto", torch.device("cpu"), Recorder())
    model = adapters.attach(model, lora, seed=1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in adapters.trainable(model).items():
            if "lora_A" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.02)
    folder.mkdir(parents=True, exist_ok=True)
    adapters.save(model, folder, base.name, base.commit)
    said = {"base": base.name, "revision": "main", "fingerprint": base.fingerprint}
    (folder / "qlora.json").write_text(json.dumps({**said, "quantization": quantization.model_dump()}))
    return model.eval()


def logits(model) -> torch.Tensor:  # type: ignore[no-untyped-def]
    ids = torch.arange(4, 68).view(2, 32)
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.float()


def kl(reference: torch.Tensor, other: torch.Tensor) -> float:
    p, q = torch.log_softmax(reference, -1), torch.log_softmax(other, -1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def opened(folder: Path):  # type: ignore[no-untyped-def]
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_merged_on_nf4_is_the_trained_model(tmp_path: Path, llama: Path, kind: str) -> None:
    model = trained(llama, tmp_path / "adapter", KINDS[kind])
    done = api.merge_and_export(tmp_path / "adapter", out=tmp_path / "out")
    assert done.merge_base == "nf4"
    with model.disable_adapter():
        untouched = kl(logits(model), logits(opened(llama)))
    assert kl(logits(model), logits(opened(tmp_path / "out"))) < 1e-3
    assert kl(logits(model), logits(opened(llama))) > 0.01, "the adapter changes too little to be seen"
    assert untouched > 1e-3, "NF4 changes too little to be seen"


@pytest.mark.parametrize("kind", ["plain", "dora"])
def test_merged_on_full_is_the_adapter_on_the_original_weights(tmp_path: Path, llama: Path, kind: str) -> None:
    model = trained(llama, tmp_path / "adapter", KINDS[kind], QuantizationSection(type="none"))
    done = api.merge_and_export(tmp_path / "adapter", out=tmp_path / "out")
    assert done.merge_base == "full"
    assert kl(logits(model), logits(opened(tmp_path / "out"))) < 1e-3


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "phi3"])
def test_other_families_and_tied_heads(tmp_path: Path, family: str) -> None:
    base = make_base(family, tmp_path / "base", seed=2, shards=2)
    model = trained(base, tmp_path / "adapter", KINDS["plain"])
    api.merge_and_export(tmp_path / "adapter", out=tmp_path / "out")
    assert kl(logits(model), logits(opened(tmp_path / "out"))) < 2e-3


def test_untouched_tensors_are_the_bases_bytes(tmp_path: Path, llama: Path) -> None:
    trained(llama, tmp_path / "adapter", KINDS["some"], QuantizationSection(type="none"))
    api.merge_and_export(tmp_path / "adapter", out=tmp_path / "out")
    base, merged = load_file(llama / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert base.keys() == merged.keys()
    for name, tensor in base.items():
        changed = name.endswith(("q_proj.weight", "down_proj.weight"))
        assert torch.equal(tensor, merged[name]) is not changed, name


def test_config_and_tokenizer_are_the_bases_files(tmp_path: Path, llama: Path) -> None:
    trained(llama, tmp_path / "adapter", KINDS["plain"])
    api.merge_and_export(tmp_path / "adapter", out=tmp_path / "out")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (llama / name).read_bytes(), name


def test_shards_have_an_index(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora.export import hf

    monkeypatch.setattr(hf, "SHARD_BYTES", 60_000)
    model = trained(llama, tmp_path / "adapter", KINDS["plain"])
    api.merge_and_export(tmp_path / "adapter", out=tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert kl(logits(model), logits(opened(tmp_path / "out"))) < 1e-3


def test_plain_peft_opens_the_adapter_on_plain_transformers(tmp_path: Path, llama: Path) -> None:
    from peft import PeftModel

    model = trained(llama, tmp_path / "adapter", KINDS["plain"], QuantizationSection(type="none"))
    theirs = PeftModel.from_pretrained(opened(llama), tmp_path / "adapter")
    assert kl(logits(model), logits(theirs)) < 1e-3


def test_an_adapter_made_elsewhere_merges_too(tmp_path: Path, llama: Path) -> None:
    """Only PEFT's two files, no provenance of ours."""
    model = trained(llama, tmp_path / "adapter", KINDS["plain"])
    (tmp_path / "adapter" / "qlora.json").unlink()
    done = api.merge_and_export(tmp_path / "adapter")
    assert done.folder == tmp_path / "adapter-export" / "hf"
    assert kl(logits(model), logits(opened(done.folder))) < 1e-3


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def zero_b(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({n: t * 0 if "lora_B" in n else t for n, t in tensors.items()}, folder / "adapter_model.safetensors")


def drop_b(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(n for n in tensors if "lora_B" in n)
    save_file({n: t for n, t in tensors.items() if n != name}, folder / "adapter_model.safetensors")


BROKEN = {
    "nothing to merge": zero_b,
    "no matching lora_B": drop_b,
    "no adapter_model.safetensors": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "cannot be read": lambda folder: (folder / "adapter_config.json").write_text("{"),
    "PREFIX_TUNING": lambda folder: edit(folder / "adapter_config.json", peft_type="PREFIX_TUNING"),
    "bias 'all'": lambda folder: edit(folder / "adapter_config.json", bias="all"),
    "replicated layers": lambda folder: edit(folder / "adapter_config.json", layer_replication=[[0, 1]]),
    "has rank 4": lambda folder: edit(folder / "adapter_config.json", r=8),
    "trained on another base": lambda folder: edit(folder / "qlora.json", fingerprint="0" * 64),
    "there is no folder": lambda folder: edit(folder / "qlora.json", base="/nowhere/at/all"),
}


@pytest.mark.parametrize("message", BROKEN)
def test_what_cannot_be_merged_is_refused_and_nothing_is_left(tmp_path: Path, llama: Path, message: str) -> None:
    trained(llama, tmp_path / "adapter", KINDS["plain"])
    BROKEN[message](tmp_path / "adapter")
    with pytest.raises(QloraError, match=message) as caught:
        api.merge_and_export(tmp_path / "adapter", out=tmp_path / "out")
    assert caught.value.exit_code == 2 and caught.value.hint
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_an_adapter_of_another_shape_is_refused(tmp_path: Path, llama: Path) -> None:
    trained(llama, tmp_path / "adapter", KINDS["plain"])
    other = make_base("qwen3", tmp_path / "other", vocab=300)
    edit(tmp_path / "adapter" / "qlora.json", base=str(other), fingerprint=None)
    config = json.loads((other / "config.json").read_text())
    assert config["hidden_size"] == 64
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    wider = {name: torch.cat([t, t], 1) if "lora_A" in name else t for name, t in tensors.items()}
    save_file(wider, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(ExportError, match="here and"):
        api.merge_and_export(tmp_path / "adapter", out=tmp_path / "out")


def test_folders_that_are_no_adapter(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "none", "no such folder"), (tmp_path, "neither a run")):
        with pytest.raises(ExportError, match=message):
            api.merge_and_export(path)


def test_a_folder_that_is_not_ours_is_never_replaced(tmp_path: Path, llama: Path) -> None:
    trained(llama, tmp_path / "adapter", KINDS["plain"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(ExportError, match="was not made by an export"):
        api.merge_and_export(tmp_path / "adapter", out=tmp_path / "out")
    assert (tmp_path / "out" / "thesis.tex").exists()
    shutil.rmtree(tmp_path / "out")
    api.merge_and_export(tmp_path / "adapter", out=tmp_path / "out")
    api.merge_and_export(tmp_path / "adapter", out=tmp_path / "out")


def test_a_disk_that_is_too_small_is_seen_first(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(llama, tmp_path / "adapter", KINDS["plain"])
    monkeypatch.setattr("qlora.disk.free_bytes", lambda path: 1000)
    with pytest.raises(ExportError, match=r"needs .* are free"):
        api.merge_and_export(tmp_path / "adapter", out=tmp_path / "out")


def test_scales_follow_the_patterns() -> None:
    config = {"r": 8, "lora_alpha": 16, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {r"layers\.0\..*": 2}}
    file = Path("x")
    assert scale_of("model.layers.1.self_attn.v_proj", config, 8, file) == 2.0
    assert scale_of("model.layers.1.self_attn.q_proj", config, 4, file) == 4.0
    assert scale_of("model.layers.0.self_attn.v_proj", config, 8, file) == 0.25
    assert scale_of("model.layers.1.mlp.up_proj", {**config, "use_rslora": True}, 8, file) == 16 / 8**0.5
