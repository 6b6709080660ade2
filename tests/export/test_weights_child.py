"""Every weight of what was written, compared with what must stand there: each break is seen and named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora.errors import ExportError
from qlora.export.gguf import write
from qlora.export.gguf.encode import encode
from qlora.export.verify.weights_child import _product, side_by_side
from tests.export.cases import KINDS
from tests.export.reopened import QUANTS, Case
from tests.families import make_base

MODULE = "model.layers.1.mlp.down_proj.weight"
PERMUTED = "blk.0.attn_q.weight"


@pytest.mark.parametrize("kind", ["rslora", "dora", "some", "whole"])
def test_every_kind_of_adapter_holds(llama: Path, tmp_path: Path, kind: str) -> None:
    other = Case(llama, tmp_path, KINDS[kind], "full")
    found = [other.require_folder(other.folder), *(other.require_file(quant, other.files[quant]) for quant in QUANTS)]
    for checks in found:
        assert {check.name for check in checks} >= {"deltas", "finite", "other weights"}
        assert all(check.ok for check in checks)


# --- safetensors, broken ----------------------------------------------------------------------------------------------


def base_weight(case: Case, name: str) -> torch.Tensor:
    tensor = next(tensor for tensor in case.merge.base_tensors() if tensor.parameter == name)
    return torch.cat(list(tensor.blocks(1)))


def unmerged(case: Case, weights: dict[str, torch.Tensor]) -> None:
    weights.update({tensor.name: base_weight(case, tensor.parameter) for tensor in case.merge.base_tensors()})


def one_delta_missing(case: Case, weights: dict[str, torch.Tensor]) -> None:
    weights[MODULE] = base_weight(case, MODULE)


def one_delta_twice(case: Case, weights: dict[str, torch.Tensor]) -> None:
    delta = weights[MODULE].float() - base_weight(case, MODULE).float()
    weights[MODULE] = (weights[MODULE].float() + delta).bfloat16()


def one_value_nan(case: Case, weights: dict[str, torch.Tensor]) -> None:
    weights[MODULE][3, 5] = float("nan")


def one_value_of_the_embedding(case: Case, weights: dict[str, torch.Tensor]) -> None:
    weights["model.embed_tokens.weight"][7, 1] *= 1.01


def transposed(case: Case, weights: dict[str, torch.Tensor]) -> None:
    weights[MODULE] = weights[MODULE].T.contiguous()


def lost(case: Case, weights: dict[str, torch.Tensor]) -> None:
    del weights["model.norm.weight"]


def widened(case: Case, weights: dict[str, torch.Tensor]) -> None:
    weights[MODULE] = weights[MODULE].float()


BROKEN_FOLDERS: dict[str, tuple[Callable[..., None], str]] = {
    "unmerged": (unmerged, r"deltas: .* holds -?0\.00 of its delta; .* and 11 more"),
    "one missing": (one_delta_missing, rf"deltas: {MODULE} holds -?0\.00 of its delta$"),
    "one twice": (one_delta_twice, rf"deltas: {MODULE} holds (1\.99|2\.0\d) of its delta$"),
    "nan": (one_value_nan, rf"finite: {MODULE}: 1 of 8,192$"),
    "untouched": (one_value_of_the_embedding, r"other weights: model.embed_tokens.weight differs in 1 of "),
    "shape": (transposed, rf"names, shapes, types: {MODULE} is BF16 \[128, 64\], not BF16 \[64, 128\]$"),
    "lost": (lost, r"names, shapes, types: model.norm.weight is missing"),
    "dtype": (widened, rf"{MODULE} is F32"),
}


@pytest.mark.parametrize("name", BROKEN_FOLDERS)
def test_a_broken_folder_is_seen_and_named(case: Case, tmp_path: Path, name: str) -> None:
    break_it, message = BROKEN_FOLDERS[name]
    folder = shutil.copytree(case.folder, tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    break_it(case, weights)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ExportError, match=message):
        case.require_folder(folder)


def test_a_folder_cut_off_is_seen(case: Case, tmp_path: Path) -> None:
    folder = shutil.copytree(case.folder, tmp_path / "broken")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(ExportError, match=r"opens: .*is cut off"):
        case.require_folder(folder)


# --- GGUF, broken -----------------------------------------------------------------------------------------------------


def edit_tensor(file: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change the stored bytes of one tensor of a GGUF file in place."""
    entry = next(entry for entry in gguf.GGUFReader(file, "r+").tensors if entry.name == name)
    entry.data[:] = change(entry.data)
    entry.data.base.flush() if hasattr(entry.data.base, "flush") else None


def broken_file(case: Case, quant: str, folder: Path) -> Path:
    return Path(shutil.copyfile(case.files[quant], folder / f"{quant}.gguf"))


def stored(case: Case, quant: str, weight: torch.Tensor) -> np.ndarray:
    """A weight as the file of this quant stores it."""
    kind = gguf.GGMLQuantizationType[{"f16": "F16", "q8_0": "Q8_0"}[quant]]
    return gguf.quants.quantize(weight.float().numpy(), kind)


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("times", [0, 2])
def test_a_delta_missing_or_twice_in_a_gguf_is_named(case: Case, tmp_path: Path, quant: str, times: int) -> None:
    file = broken_file(case, quant, tmp_path)
    base, merged = base_weight(case, MODULE).float(), load_file(case.folder / "model.safetensors")[MODULE].float()
    edit_tensor(file, "blk.1.ffn_down.weight", lambda _: stored(case, quant, base + times * (merged - base)))
    with pytest.raises(ExportError, match=rf"deltas: {MODULE} holds (-?0\.0|{times}\.0|1\.9)\d of its delta$"):
        case.require_file(quant, file)


@pytest.mark.parametrize("quant", QUANTS)
def test_a_permutation_missing_in_a_gguf_is_named(case: Case, tmp_path: Path, quant: str) -> None:
    file = broken_file(case, quant, tmp_path)
    plain = load_file(case.folder / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    edit_tensor(file, PERMUTED, lambda _: stored(case, quant, plain))
    with pytest.raises(ExportError, match=r"deltas: model\.layers\.0\.self_attn\.q_proj\.weight"):
        case.require_file(quant, file)


@pytest.mark.parametrize("quant", ["q4_k_m", "q3_k_m", "iq4_xs"])
def test_the_delta_is_seen_through_quantization(tmp_path: Path, quant: str) -> None:
    pytest.importorskip("xllamacpp", reason="K- and IQ-quants are encoded by llama.cpp")
    shape = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    wide = make_base("llama", tmp_path / "base", overrides=shape)
    right = Case(wide, tmp_path, KINDS["plain"], quants=(quant,))
    right.require_file(quant, right.files[quant])
    parameter = "model.layers.0.mlp.up_proj.weight"
    kind = right.types(quant)["blk.0.ffn_up.weight"]
    unmerged = encode(base_weight(right, parameter).float(), kind, right.plan.library, None, parameter)
    edit_tensor(right.files[quant], "blk.0.ffn_up.weight", lambda _: unmerged)
    with pytest.raises(ExportError, match=rf"deltas: {parameter} holds -?0\.0\d of its delta$"):
        right.require_file(quant, right.files[quant])


def test_a_nan_in_a_gguf_is_named(case: Case, tmp_path: Path) -> None:
    file = broken_file(case, "f16", tmp_path)

    def one_nan(data: np.ndarray) -> np.ndarray:
        changed = data.copy()
        changed[2, 2] = np.nan
        return changed

    edit_tensor(file, "blk.1.ffn_down.weight", one_nan)
    with pytest.raises(ExportError, match=f"finite: {MODULE}: 1 of 8,192"):
        case.require_file("f16", file)


@pytest.mark.parametrize("key", ["tokenizer.chat_template", "tokenizer.ggml.pre", "tokenizer.ggml.add_bos_token"])
def test_a_missing_key_is_named(case: Case, tmp_path: Path, key: str) -> None:
    assert any(entry.key == key for entry in case.keys)
    file = tmp_path / "less.gguf"
    kept = tuple(entry for entry in case.keys if entry.key != key)
    less = write.GgufFile("q", file.name, kept, case.types("f16")).header(case.plan.layout)
    whole = write.GgufFile("q", file.name, case.keys, case.types("f16")).header(case.plan.layout)
    file.write_bytes(less + case.files["f16"].read_bytes()[len(whole) :])
    with pytest.raises(ExportError, match=f"keys: {key} is missing"):
        case.require_file("f16", file)


def test_another_type_than_planned_and_a_broken_header_are_named(case: Case, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"names, shapes, types: output.weight is F16 .* and 13 more"):
        case.require_file("q8_0", case.files["f16"])
    file = broken_file(case, "f16", tmp_path)
    file.write_bytes(b"GGUF" + b"\xff" * 60)
    with pytest.raises(ExportError, match="opens: its header cannot be read"):
        case.require_file("f16", file)


# --- sums -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e15, 1e25])
def test_sums_of_products_keep_their_size_whatever_it_is(scale: float) -> None:
    """Squares of 1e-30 and 1e25 are nothing and infinity in fp32."""
    one, other = torch.randn(2, 1 << 16, generator=torch.Generator().manual_seed(4)).mul(scale).unbind()
    for first, second in ((one, one), (one, one + other)):
        exact = float((first.double() * second.double()).sum())
        assert _product(first, second) == pytest.approx(exact, rel=1e-4)
    assert _product(torch.zeros(5), one[:5]) == 0.0


def test_blocks_of_two_sizes_are_put_side_by_side() -> None:
    """Experts are merged one by one, and read several at a time: rows meet rows of the same number."""
    rows = torch.arange(14.0).view(7, 2)
    pairs = [*side_by_side(rows.split([1, 1, 2, 3]), rows.split([3, 2, 2]))]
    assert [len(one) for one, _ in pairs] == [1, 1, 2, 3]
    assert all(torch.equal(one, other) for one, other in pairs)
    (scalar,) = side_by_side([torch.tensor(1.0)], [torch.tensor(2.0)])
    assert [float(value) for value in scalar] == [1.0, 2.0]
