"""A base is known by the bytes of its weights: not by their shards, names of files, or shapes alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora.errors import ModelError
from qlora.events import Recorder
from qlora.model import identity
from qlora.model.base_folder import BaseFolder
from qlora.model.identity import BaseIdentity, Fingerprints, WeightReader
from qlora.model.meta_model import build, taken_tensors
from qlora.model.tensors import TensorEntry, read_spans
from tests.families import make_base, split_into_shards
from tests.model.conftest import at, change_config, load, stored_in_4bit
from tests.runs import change_unsampled_value


def known(base: BaseFolder) -> BaseIdentity:
    return identity.read_through(base.config, taken_tensors(base, build(base)), Recorder())


def rewritten(folder: Path, change: Any) -> Path:
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def copied(folder: Path, name: str) -> Path:
    return shutil.copytree(folder, folder.with_name(name))


def test_shards_paths_and_keys_of_saving_change_nothing(folder: Path) -> None:
    first = known(at(folder))
    other = change_config(copied(folder, "other"), transformers_version="4.1", torch_dtype="float16", use_cache=False)
    split_into_shards(other, 3)
    assert known(at(other)) == first and first.content is not None
    assert at(other).fingerprint != at(folder).fingerprint


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda t: {**t, "model.norm.weight": t["model.norm.weight"] + 0.5}, "another fine-tune of the same shape"),
        (lambda t: {name: tensor.float() for name, tensor in t.items()}, "in F32 instead of BF16: a converted copy"),
        (lambda t: {**t, "lm_head.weight": t["lm_head.weight"].half()}, "in BF16 and F16 instead of BF16"),
    ],
)
def test_what_makes_it_another_base_is_said_at_the_door(folder: Path, change: Any, what: str) -> None:
    first, other = at(folder), at(rewritten(copied(folder, "other"), change))
    seen = identity.at_the_door(other.config, taken_tensors(other, build(other)))
    assert what in str(known(first).difference(seen)) and what in str(known(first).difference(known(other)))


def test_a_dtype_of_the_same_bytes_is_another_base(folder: Path) -> None:
    """bf16 and f16 have as many bytes: only the type in the header differs."""
    other = copied(folder, "other")
    file = other / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length].replace(b'"BF16"', b'"F16" ')
    file.write_bytes(raw[:8] + header + raw[8 + length :])
    assert known(at(other)).content != known(at(folder)).content


def test_another_configuration_and_other_shapes(folder: Path, tmp_path: Path) -> None:
    first = known(at(folder))
    assert first.difference(known(at(change_config(copied(folder, "a"), rms_norm_eps=1e-4)))) == (
        "its config.json differs"
    )
    shapes = first.model_copy(update={"shapes": "x", "content": "y"})
    assert first.difference(shapes) == "its tensors have other names or shapes"


def test_one_value_that_the_sample_misses_is_in_the_content(folder: Path) -> None:
    first = at(folder)
    other = at(change_unsampled_value(copied(folder, "other")))
    door = [identity.at_the_door(base.config, taken_tensors(base, build(base))) for base in (first, other)]
    assert door[0] == door[1] and door[0].difference(known(other)) is None
    assert "another fine-tune" in str(known(first).difference(known(other)))


def test_of_each_tensor_a_few_bytes_are_read_at_the_door(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = at(folder)
    read: list[tuple[int, int]] = []

    def watched(entry: TensorEntry, spans: list[tuple[int, int]]) -> list[bytes]:
        read.extend(spans)
        return read_spans(entry, spans)

    monkeypatch.setattr(identity, "read_spans", watched)
    first = identity.at_the_door(base.config, base.tensors)
    most = identity.SAMPLES * identity.SAMPLE_BYTES
    assert sum(count for _, count in read) <= len(base.tensors) * most
    assert {0, base.tensors["lm_head.weight"].nbytes - identity.SAMPLE_BYTES} <= {start for start, _ in read}
    assert first == identity.at_the_door(base.config, dict(sorted(base.tensors.items(), reverse=True)))


@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_loading_reads_what_a_pass_of_its_own_reads(base_of: Any, kind: str, tmp_path: Path) -> None:
    for base in (base_of("llama"), base_of("gemma3"), at(stored_in_4bit(tmp_path, base_of("llama"), True))):
        if not (base.stored_4bit and kind == "none"):
            assert load(base, kind).base_identity == known(base)


def test_a_second_copy_of_a_tied_head_is_not_taken(tmp_path: Path) -> None:
    base = make_base("qwen2", tmp_path / "base", tie=True)
    tied = known(at(base))
    twice = rewritten(copied(base, "other"), lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()})
    assert known(at(twice)) == tied


def test_blocks_make_the_hash_of_the_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = known(at(folder))
    monkeypatch.setattr(identity, "BLOCK_BYTES", 1000)
    assert known(at(folder)) == whole


def test_a_tensor_that_was_read_in_part_has_no_identity(folder: Path) -> None:
    base = at(folder)
    reader = WeightReader(base.config, base.tensors)
    reader.read("lm_head.weight", (0, 5))
    with pytest.raises(AssertionError, match="read in part"):
        reader.identity()


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_found_while_loading(folder: Path, name: str, value: float) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[name].view(-1)[17] = value
        return tensors

    base = at(rewritten(folder, spoil))
    for work in (lambda: load(base), lambda: load(base, "none"), lambda: known(base)):
        with pytest.raises(ModelError, match="not finite") as error:
            work()
        assert f"model.safetensors: tensor '{name}'" in error.value.what


def test_what_bf16_cannot_hold_is_not_finite_either(tmp_path: Path) -> None:
    folder = make_base("llama", tmp_path / "base", dtype=torch.float32)
    base = at(rewritten(folder, lambda t: {**t, "model.norm.weight": torch.full_like(t["model.norm.weight"], 3.4e38)}))
    with pytest.raises(ModelError, match=r"model\.norm\.weight"):
        load(base)


def test_4_bit_statistics_that_are_not_finite_are_found(base_of: Any, tmp_path: Path) -> None:
    folder = stored_in_4bit(tmp_path, base_of("llama"), False)
    name = "model.layers.0.mlp.up_proj.weight.absmax"

    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[name][3] = float("nan")
        return tensors

    with pytest.raises(ModelError, match="not finite") as error:
        load(at(rewritten(folder, spoil)))
    assert name in error.value.what


def test_older_fingerprints_compare_what_they_have() -> None:
    one = BaseIdentity(config="c", shapes="s", dtypes="BF16", sampled="x", content="y")
    two = one.model_copy(update={"content": "z", "sampled": "w"})
    old, new = Fingerprints("b", "d"), Fingerprints("b", "d", one, "rows")
    assert old.other_base(new) is None and "file sizes" in str(old.other_base(Fingerprints("x", "d", one)))
    assert new.other_base(Fingerprints("moved", "d", one)) is None
    assert "another fine-tune" in str(new.other_base(Fingerprints("b", "d", two)))
    assert new.other_data(Fingerprints("b", "other key", one, "rows")) is None
    assert "this version makes other tokens of them" in str(new.other_data(Fingerprints("b", "d", one, "other rows")))
    assert old.other_data(Fingerprints("b", "d", one, "rows")) is None
    assert old.other_data(Fingerprints("b", "other key", one, "rows")) is not None
    assert json.loads(json.dumps(new.as_dict()))["base_identity"]["content"] == "y"
