"""The merged model is the trained one: every kind of adapter, both merge bases; what cannot be merged is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora.errors import ExportError, QloraError
from qlora.events import Recorder
from qlora.export import hf
from qlora.model.adapter_config import AdapterConfig
from qlora.model.adapter_folder import LoraModule, alphas_of
from qlora.model.tensors import TensorEntry
from qlora.recipe.sections import QuantizationSection
from tests.export.cases import KINDS, NF4, edit, exported, kl, logits, merge_of, of_peft, opened, trained, whole
from tests.export.hf_folder import write_hf
from tests.families import as_version_4_saves, make_base


@pytest.mark.parametrize("kind", KINDS)
def test_merged_on_nf4_is_the_trained_model(tmp_path: Path, llama: Path, kind: str) -> None:
    model = trained(llama, tmp_path / "adapter", KINDS[kind])
    done = exported(tmp_path / "adapter", out=tmp_path / "out")
    assert done.merge_base == "nf4"
    with model.disable_adapter():
        untouched = kl(logits(model), logits(opened(llama)))
    assert kl(logits(model), logits(opened(tmp_path / "out"))) < 1e-3
    assert kl(logits(model), logits(opened(llama))) > 0.01, "the adapter changes too little to be seen"
    assert untouched > 1e-3, "NF4 changes too little to be seen"


@pytest.mark.parametrize("kind", ["plain", "dora"])
def test_merged_on_full_is_the_adapter_on_the_original_weights(tmp_path: Path, llama: Path, kind: str) -> None:
    model = trained(llama, tmp_path / "adapter", KINDS[kind], QuantizationSection(type="none"))
    done = exported(tmp_path / "adapter", out=tmp_path / "out")
    assert done.merge_base == "full"
    assert kl(logits(model), logits(opened(tmp_path / "out"))) < 1e-3


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "phi3"])
def test_other_families_and_tied_heads(tmp_path: Path, family: str) -> None:
    base = make_base(family, tmp_path / "base", seed=2, shards=2)
    model = trained(base, tmp_path / "adapter", KINDS["plain"])
    exported(tmp_path / "adapter", out=tmp_path / "out")
    assert kl(logits(model), logits(opened(tmp_path / "out"))) < 2e-3


def test_untouched_tensors_are_the_bases_bytes(tmp_path: Path, llama: Path) -> None:
    trained(llama, tmp_path / "adapter", KINDS["some"], QuantizationSection(type="none"))
    exported(tmp_path / "adapter", out=tmp_path / "out")
    base, merged = load_file(llama / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert base.keys() == merged.keys()
    for name, tensor in base.items():
        changed = name.endswith(("q_proj.weight", "down_proj.weight"))
        assert torch.equal(tensor, merged[name]) is not changed, name


def test_config_and_tokenizer_are_the_bases_files(tmp_path: Path) -> None:
    base = as_version_4_saves(make_base("llama", tmp_path / "base"))
    trained(base, tmp_path / "adapter", KINDS["plain"])
    exported(tmp_path / "adapter", out=tmp_path / "out")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes(), name


def test_shards_have_an_index(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setattr(hf, "SHARD_BYTES", 60_000)
    model = trained(llama, tmp_path / "adapter", KINDS["plain"])
    exported(tmp_path / "adapter", out=tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert kl(logits(model), logits(opened(tmp_path / "out"))) < 1e-3


@pytest.mark.parametrize("base", ["full", "nf4"])
def test_blocks_are_multiples_of_the_unit_and_the_same_values(
    tmp_path: Path, llama: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(llama, tmp_path / "adapter", KINDS["dora"])
    merge = merge_of(llama, tmp_path / "adapter", merge_base=base, quantization=NF4)
    expected = {tensor.parameter: whole(tensor) for tensor in merge.tensors()}
    monkeypatch.setattr("qlora.export.merge.merge.VALUES_PER_BLOCK", 64 * 8)
    for tensor in merge.tensors():
        for unit in (1, 3, 16):
            # Matrix products of other sizes add up in another order: the last bit differs.
            assert torch.allclose(whole(tensor, unit), expected[tensor.parameter], atol=1e-6, rtol=0)
            blocks = list(tensor.blocks(unit))
            assert all(len(block) % unit == 0 for block in blocks[:-1]) or len(tensor.shape) < 2
            assert len(blocks) > 2 or tensor.shape[0] < 100


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads anonymous memory from /proc")
@pytest.mark.parametrize("base", ["full", "nf4"])
def test_memory_is_a_block_not_a_tensor(tmp_path: Path, base: str) -> None:
    """Tensors of 128 and 144 MiB in fp32, of which a block at a time is held, and on NF4 the codes of one (16 MiB)."""
    shape = {"hidden_size": 512, "intermediate_size": 65536, "num_hidden_layers": 1}
    make_base("llama", tmp_path / "base", vocab=73728, dtype=torch.float32, overrides=shape)
    of_peft(tmp_path / "base", tmp_path / "adapter", target_modules="all-linear")
    code = f"""
import threading, time
from pathlib import Path
from qlora.recipe.sections import QuantizationSection
from qlora.events import Recorder
from tests.export.cases import merge_of
from tests.export.hf_folder import write_hf

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))

def watch():
    while not done.is_set():
        peaks.append(anonymous())
        time.sleep(0.002)

work = Path({str(tmp_path)!r})
merge = merge_of(work / "base", work / "adapter", merge_base={base!r}, quantization=QuantizationSection())
next(merge.tensors()[3].blocks(1))  # what is imported at first use is no part of it
peaks, done = [anonymous()], threading.Event()
thread = threading.Thread(target=watch)
thread.start()
write_hf(merge, work / "out", Recorder())
done.set()
thread.join()
print((max(peaks) - peaks[0]) // 1024)
"""
    root = Path(__file__).parents[2]
    # With the threshold left to glibc, what threads have freed stays in their arenas, up to 90 MiB, by chance.
    settings = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root, env=settings)
    assert int(done.stdout.split()[-1]) < 48  # 21, and 37 on NF4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_dtype_is_written_and_opened(tmp_path: Path, llama: Path, dtype: torch.dtype) -> None:
    trained(llama, tmp_path / "adapter", KINDS["plain"])
    merge = merge_of(llama, tmp_path / "adapter", dtype=dtype)
    write_hf(merge, tmp_path / "out", Recorder())
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {dtype}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    exact = {tensor.name: whole(tensor) for tensor in replace(merge, dtype=torch.float32).tensors()}
    assert all(torch.equal(written[name], exact[name].to(dtype)) for name in written)


def test_plain_peft_opens_the_adapter_on_plain_transformers(tmp_path: Path, llama: Path) -> None:
    from peft import PeftModel

    model = trained(llama, tmp_path / "adapter", KINDS["plain"], QuantizationSection(type="none"))
    theirs = PeftModel.from_pretrained(opened(llama), tmp_path / "adapter")
    assert kl(logits(model), logits(theirs)) < 1e-3


def test_an_adapter_made_elsewhere_merges_too(tmp_path: Path, llama: Path) -> None:
    """Only PEFT's two files, no provenance of ours: trained in 16 bit, unless its owner says that it was not."""
    for quantization, asked, base in ((QuantizationSection(type="none"), "auto", "full"), (NF4, "nf4", "nf4")):
        model = trained(llama, tmp_path / "adapter", KINDS["plain"], quantization)
        (tmp_path / "adapter" / "qlora.json").unlink()
        done = exported(tmp_path / "adapter", merge_base=asked)
        assert done.folder == tmp_path / "adapter-export" / "hf" and done.merge_base == base
        assert kl(logits(model), logits(opened(done.folder))) < 1e-3


def zero_b(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({n: t * 0 if "lora_B" in n else t for n, t in tensors.items()}, folder / "adapter_model.safetensors")


def drop_b(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(n for n in tensors if "lora_B" in n)
    save_file({n: t for n, t in tensors.items() if n != name}, folder / "adapter_model.safetensors")


def drop_a(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(n for n in tensors if "lora_A" in n)
    save_file({n: t for n, t in tensors.items() if n != name}, folder / "adapter_model.safetensors")


def add(folder: Path, name: str, tensor: torch.Tensor) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({**tensors, f"base_model.model.{name}": tensor}, folder / "adapter_model.safetensors")


BROKEN = {
    "has no lora_A": drop_a,
    "started with pissa": lambda folder: edit(folder / "adapter_config.json", init_lora_weights="pissa_niter_4"),
    "biases in the adapter": lambda folder: edit(folder / "adapter_config.json", lora_bias=True),
    "is stored as U8": lambda folder: add(folder, "lm_head.base_layer.weight", torch.zeros(384, 32, dtype=torch.uint8)),
    "head.weight has 390 rows": lambda folder: add(folder, "lm_head.weight", torch.ones(390, 64)),
    r"is \(384, 60\) here and": lambda folder: add(folder, "lm_head.weight", torch.ones(384, 60)),
    "1 trained token rows, adapter_config.json names 0": lambda folder: add(
        folder, "model.embed_tokens.token_adapter.trainable_tokens_delta", torch.ones(1, 64)
    ),
    "is not in the base": lambda folder: add(folder, "model.layers.0.router.weight", torch.ones(4, 64)),
    "nothing to merge": zero_b,
    "no matching lora_B": drop_b,
    "no adapter_model.safetensors": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "is not valid JSON": lambda folder: (folder / "adapter_config.json").write_text("{"),
    "PREFIX_TUNING": lambda folder: edit(folder / "adapter_config.json", peft_type="PREFIX_TUNING"),
    "bias 'all'": lambda folder: edit(folder / "adapter_config.json", bias="all"),
    "replicated layers": lambda folder: edit(folder / "adapter_config.json", layer_replication=[[0, 1]]),
    "has rank 4": lambda folder: edit(folder / "adapter_config.json", r=8),
    "trained on another base": lambda folder: edit(folder / "qlora.json", fingerprint="0" * 64),
    "is not here": lambda folder: edit(folder / "qlora.json", base="/nowhere/at/all"),
}


@pytest.mark.parametrize("message", BROKEN)
def test_what_cannot_be_merged_is_refused_and_nothing_is_left(tmp_path: Path, llama: Path, message: str) -> None:
    trained(llama, tmp_path / "adapter", KINDS["plain"])
    BROKEN[message](tmp_path / "adapter")
    with pytest.raises(QloraError, match=message) as caught:
        exported(tmp_path / "adapter", out=tmp_path / "out")
    assert caught.value.exit_code == 2 and caught.value.hint
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_folders_that_are_no_adapter(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "none", "no such folder"), (tmp_path, "neither a run")):
        with pytest.raises(ExportError, match=message):
            exported(path)


def test_a_folder_that_is_not_ours_is_never_replaced(tmp_path: Path, llama: Path) -> None:
    trained(llama, tmp_path / "adapter", KINDS["plain"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(ExportError, match="was not made by an export"):
        exported(tmp_path / "adapter", out=tmp_path / "out")
    assert (tmp_path / "out" / "thesis.tex").exists()
    shutil.rmtree(tmp_path / "out")
    exported(tmp_path / "adapter", out=tmp_path / "out")
    exported(tmp_path / "adapter", out=tmp_path / "out")


def test_a_disk_that_is_too_small_is_seen_first(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(llama, tmp_path / "adapter", KINDS["plain"])
    monkeypatch.setattr("qlora.disk.free_bytes", lambda path: 1000)
    with pytest.raises(ExportError, match=r"needs .* are free"):
        exported(tmp_path / "adapter", out=tmp_path / "out")


def test_scales_follow_the_patterns() -> None:
    patterns = {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {r"layers\.0\..*": 2}}
    config = AdapterConfig.model_validate({"peft_type": "LORA", "r": 8, "lora_alpha": 16, **patterns})
    layer = "model.layers.{}.self_attn.{}_proj".format
    ranks = {layer(1, "v"): 8, layer(1, "q"): 4, layer(0, "v"): 8}
    alphas = alphas_of(ranks, config, Path("x"), {})
    assert list(alphas.values()) == [16, 16, 2]
    matrix = TensorEntry(Path("x"), "F32", (8, 64), 0, 2048, Path("x"))
    assert LoraModule(matrix, matrix, None, 16, False, False).scale == 2.0
    assert LoraModule(matrix, matrix, None, 16, True, False).scale == 16 / 8**0.5
