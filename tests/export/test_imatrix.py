"""The importance matrix: sums as counted by hand, the model untouched, llama.cpp's file, and strangers' files."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qlora.batch import Batch
from qlora.data.chat import TokenRow
from qlora.data.loader import collate
from qlora.data.token_cache import PreparedSplit
from qlora.errors import ExportError
from qlora.events import Progress, Recorder
from qlora.export import imatrix
from qlora.model import adapters, load
from qlora.model.resolve import resolve
from qlora.recipe.sections import DataSection, LoraSection, QuantizationSection
from tests.families import make_config, make_model

LENGTHS = (30, 7, 22, 9, 13, 40)
DATA = DataSection(max_length=48)
# How the linear layers of llama, gemma3 and phi3 are called, and the head.
LAYERS = {f"{name}_proj" for name in ("q", "k", "v", "o", "qkv", "gate", "up", "down", "gate_up")} | {"lm_head"}


def split_of(lengths: tuple[int, ...] = LENGTHS) -> PreparedSplit:
    generator = torch.Generator().manual_seed(3)
    rows = [
        TokenRow(torch.randint(4, 384, (n,), generator=generator).tolist(), [0.0] + [1.0] * (n - 1)) for n in lengths
    ]
    none = [0] * len(lengths)
    return PreparedSplit(rows, lengths, [n - 1 for n in lengths], [""] * len(lengths), none)


def batches_of(rows_per_batch: int = 2) -> list[Batch]:
    split, packs = imatrix.choose_packs([split_of()], DATA)
    batches = imatrix.make_batches(split, packs, 0, DATA, rows_per_batch)
    assert any(len(imatrix.real_positions(batch)) < batch.tokens for batch in batches), "nothing is padded here"
    assert any(len(members) > 1 for members in packs), "nothing is packed here"
    return batches


def adapted(base_dir: Path, lora: LoraSection, quantization: QuantizationSection) -> Any:
    base = resolve(str(base_dir), "main", Recorder())
    model = load.load_base(base, quantization, "auto", torch.device("cpu"), Recorder())
    model = adapters.attach(model, lora, seed=1)
    with torch.no_grad():
        for name, parameter in adapters.trainable(model).items():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    return model


def by_hand(model: Any, split: PreparedSplit) -> dict[str, np.ndarray]:
    """Each row alone through the model's own forward pass, without padding; every input kept and squared in fp64."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    wanted: dict[str, np.ndarray] = {}
    handles = []
    for name, module in causal.named_modules():
        if name.rpartition(".")[2] not in LAYERS:
            continue

        def note(_: Any, args: Any, name: str = f"{name}.weight") -> None:
            squares = args[0].detach().double().square().flatten(0, -2).sum(0).numpy()
            wanted[name] = wanted.get(name, 0.0) + squares

        handles.append(module.register_forward_pre_hook(note))
    causal.eval()
    with torch.no_grad():
        for row in split.rows:
            causal(input_ids=torch.tensor([row.input_ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return wanted


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
def test_sums_are_those_of_every_row_alone(family: str) -> None:
    model = make_model(make_config(family))
    found = imatrix.collect(model, batches_of(), Recorder())
    wanted = by_hand(model, split_of())
    assert found.sums.keys() == wanted.keys() and "lm_head.weight" in found.sums
    assert found.tokens == sum(LENGTHS) and set(found.counts.values()) == {sum(LENGTHS)}
    for name, sums in found.sums.items():
        assert sums.dtype == np.float32
        np.testing.assert_allclose(sums, wanted[name], rtol=2e-5, err_msg=name)


@pytest.mark.parametrize("lora", [LoraSection(r=4), LoraSection(r=4, use_dora=True, modules_to_save=("lm_head",))])
def test_an_adapter_is_measured_with_and_has_no_names_of_its_own(llama: Path, lora: LoraSection) -> None:
    model = adapted(llama, lora, QuantizationSection())
    found = imatrix.collect(model, batches_of(), Recorder())
    wanted = by_hand(model, split_of())
    assert found.sums.keys() == wanted.keys()
    assert found.sums["model.layers.0.mlp.up_proj.weight"].shape == (64,)
    for name, sums in found.sums.items():  # bf16: another order of sums in a matmul moves single values by 0.4 %
        np.testing.assert_allclose(sums, wanted[name], rtol=0.03, err_msg=name)
    with model.disable_adapter():
        without = imatrix.collect(model, batches_of(), Recorder())
    name = "model.layers.1.mlp.down_proj.weight"
    assert not np.allclose(without.sums[name], found.sums[name], rtol=0.1), "the adapter was not in the forward pass"


def test_the_model_is_left_as_it_was(llama: Path) -> None:
    model = adapted(llama, LoraSection(r=4, dropout=0.5), QuantizationSection())
    model.train()
    model.get_base_model().model.norm.eval()  # one module in another mode than the rest

    def state() -> tuple[str, list[bool], list[int], bytes]:
        digest = hashlib.sha256()
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(name.encode() + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
        modes = [module.training for module in model.modules()]
        return digest.hexdigest(), modes, hooks, torch.get_rng_state().numpy().tobytes()

    before = state()
    first = imatrix.collect(model, batches_of(), Recorder())
    assert state() == before
    assert all(parameter.grad is None for parameter in model.parameters())
    again = imatrix.collect(model, batches_of(), Recorder())
    assert all(np.array_equal(first.sums[name], again.sums[name]) for name in first.sums), "dropout was on"


def test_the_model_is_left_as_it_was_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(make_config("llama")).train()

    def fails(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(imatrix, "hidden_states", fails)
    with pytest.raises(MemoryError):
        imatrix.collect(model, batches_of(), Recorder())
    assert all(module.training and not module._forward_pre_hooks for module in model.modules())


def test_blocks_of_positions_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(make_config("llama"))
    whole = imatrix.collect(model, batches_of(), Recorder())
    monkeypatch.setattr(imatrix, "VALUES_PER_BLOCK", 300)
    parts = imatrix.collect(model, batches_of(), Recorder())
    for name, sums in whole.sums.items():
        np.testing.assert_allclose(parts.sums[name], sums, rtol=1e-5)


def test_padding_is_told_by_its_place() -> None:
    split = split_of((5, 3, 8))
    full = collate(split, [(0, 1), (2,)], pad_id=7, max_length=48)
    assert len(imatrix.real_positions(full)) == 16, "a full row has no padding"
    padded = collate(split, [(0,), (2,)], pad_id=7, max_length=48)
    assert imatrix.real_positions(padded).tolist() == [*range(5), *range(8, 16)]


def test_not_finite_is_said() -> None:
    model = make_model(make_config("llama"))
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.fill_(float("inf"))
    with pytest.raises(ExportError, match=r"model\.layers\.1\.self_attn\..* overflow"):
        imatrix.collect(model, batches_of(), Recorder())


def test_progress_reaches_its_end() -> None:
    sink = Recorder()
    batches = batches_of(1)
    imatrix.collect(make_model(make_config("llama")), batches, sink)
    drawn = [event for event in sink.events if isinstance(event, Progress)]
    assert len(drawn) == len(batches) and drawn[-1].done == drawn[-1].total == sum(batch.tokens for batch in batches)


# --- which rows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [True, False])
def test_rows_are_bounded_spread_and_the_same_every_time(packing: bool) -> None:
    data = DataSection(max_length=48, packing=packing)
    split = split_of(tuple(10 + n % 7 for n in range(400)))
    _, packs = imatrix.choose_packs([split], data, max_tokens=1000)
    rows = sorted(row for members in packs for row in members)
    tokens = sum(split.lengths[row] for row in rows)
    assert 1000 - 16 <= tokens <= 1000 and len(set(rows)) == len(rows)
    assert sum(row < 200 for row in rows) in range(len(rows) // 3, 2 * len(rows) // 3), "all from one end of the file"
    assert imatrix.choose_packs([split], data, max_tokens=1000)[1] == packs
    assert all(sum(split.lengths[row] for row in members) <= 48 for members in packs)
    assert packing == any(len(members) > 1 for members in packs)


def test_training_rows_come_first_and_one_row_is_always_taken() -> None:
    none, train, held_out = split_of(()), split_of((30, 20)), split_of((9,))
    assert imatrix.choose_packs([train, held_out], DATA)[0] is train
    assert imatrix.choose_packs([none, held_out], DATA)[0] is held_out
    assert len(imatrix.choose_packs([train], DATA, max_tokens=4)[1]) == 1
    with pytest.raises(ExportError, match="needs rows"):
        imatrix.choose_packs([none], DATA)


# --- llama.cpp's file -------------------------------------------------------------------------------------------------

NAMES = {"model.layers.0.mlp.up_proj.weight": "blk.0.ffn_up.weight", "lm_head.weight": "output.weight"}


def example() -> imatrix.Imatrix:
    sums = {name: (np.arange(8, dtype=np.float32) + number) for number, name in enumerate([*NAMES, "unnamed.weight"])}
    return imatrix.Imatrix(sums, dict.fromkeys(sums, 3), 1100)


def test_a_written_file_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.gguf"
    imatrix.write(example(), path, NAMES, ["rows.jsonl"])
    back = imatrix.read(path)
    assert sorted(back.sums) == sorted(NAMES.values()) and back.datasets == ("rows.jsonl",)
    for name, other in NAMES.items():
        assert np.array_equal(back.sums[other], example().sums[name]) and back.counts[other] == 3
    first = path.read_bytes()
    imatrix.write(example(), path, NAMES, ["rows.jsonl"])
    assert path.read_bytes() == first


def test_the_file_is_llama_cpps(tmp_path: Path) -> None:
    import gguf

    imatrix.write(example(), tmp_path / "imatrix.gguf", NAMES, ["a.jsonl", "b.jsonl"], chunk_tokens=512)
    reader = gguf.GGUFReader(tmp_path / "imatrix.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert fields == {
        "general.type": "imatrix",
        "imatrix.datasets": ["a.jsonl", "b.jsonl"],
        "imatrix.chunk_count": 3,  # 1,100 tokens in chunks of 512
        "imatrix.chunk_size": 512,
    }
    assert reader.fields["imatrix.chunk_count"].types == [gguf.GGUFValueType.UINT32]
    shapes = {tensor.name: (tensor.tensor_type.name, tensor.shape.tolist()) for tensor in reader.tensors}
    assert list(shapes.items()) == [
        ("blk.0.ffn_up.weight.in_sum2", ("F32", [8])),
        ("blk.0.ffn_up.weight.counts", ("F32", [1])),
        ("output.weight.in_sum2", ("F32", [8])),
        ("output.weight.counts", ("F32", [1])),
    ]


def test_importance_is_the_mean_square_in_float32_and_one_without_a_count() -> None:
    sums = np.array([1.0, 2.0, 0.0], dtype=np.float32)
    means = imatrix.Imatrix({"a": sums, "b": sums}, {"a": 3, "b": 0}, 3).importance()
    assert means["a"].dtype == np.float32 and means["a"].tolist() == (sums / np.float32(3)).tolist()
    assert means["b"].tolist() == [1.0, 1.0, 1.0]


def test_a_file_of_llama_imatrix_with_two_dimensions_is_read(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["wiki.txt"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    writer.add_tensor("blk.0.attn_q.weight.in_sum2", np.ones((1, 8), dtype=np.float32))
    writer.add_tensor("blk.0.attn_q.weight.counts", np.full((1, 1), 512, dtype=np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    back = imatrix.read(tmp_path / "theirs.gguf")
    assert back.importance()["blk.0.attn_q.weight"].tolist() == [1 / 512] * 8


def spoilt(make: Callable[[dict[str, Any], dict[str, np.ndarray]], None]) -> Callable[[Path], None]:
    """A writer of a file whose fields or tensors `make` has changed."""

    def write(path: Path) -> None:
        import gguf

        fields: dict[str, Any] = {"general.type": "imatrix", imatrix.DATASETS: ["x"], imatrix.CHUNK_COUNT: 1}
        fields[imatrix.CHUNK_SIZE] = 512
        tensors = {"a.weight.in_sum2": np.ones(8, np.float32), "a.weight.counts": np.ones(1, np.float32)}
        make(fields, tensors)
        writer = gguf.GGUFWriter(path, "imatrix")
        for key, value in fields.items():
            {str: writer.add_string, list: writer.add_array, int: writer.add_uint32}[type(value)](key, value)
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return write


def header(*parts: bytes, tensors: int = 0, fields: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, fields) + b"".join(parts)


HUGE = struct.pack("<Q", 1 << 60)
KEY = struct.pack("<Q", 1) + b"k"
BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "old format": (lambda path: path.write_bytes(b"\x10\0\0\0blk"), r"old \.dat format"),
    "empty": (lambda path: path.write_bytes(b""), "no GGUF file"),
    "a model": (spoilt(lambda f, t: f.update({"general.type": "model"})), "general.type is 'model'"),
    "no datasets": (spoilt(lambda f, t: f.pop(imatrix.DATASETS)), "imatrix.datasets is missing"),
    "no counts": (spoilt(lambda f, t: t.pop("a.weight.counts")), "counts is missing"),
    "nan": (spoilt(lambda f, t: t["a.weight.in_sum2"].fill(np.nan)), "no sums of squares"),
    "below zero": (spoilt(lambda f, t: t["a.weight.in_sum2"].fill(-1)), "no sums of squares"),
    "count is inf": (spoilt(lambda f, t: t["a.weight.counts"].fill(np.inf)), "no sums of squares"),
    "experts": (spoilt(lambda f, t: t.update({"a.weight.counts": np.ones(4, np.float32)})), "mixture of experts"),
    "no tensors": (spoilt(lambda f, t: t.clear()), "holds no tensors"),
    "float16": (spoilt(lambda f, t: t.update({"a.weight.in_sum2": np.ones(8, np.float16)})), "not float32"),
    "huge key": (lambda path: path.write_bytes(header(HUGE, fields=1)), "cut short"),
    "huge count of fields": (lambda path: path.write_bytes(header(fields=1 << 60)), "cut short"),
    "huge count of tensors": (lambda path: path.write_bytes(header(tensors=1 << 60)), "cut short"),
    "huge array": (
        lambda path: path.write_bytes(header(KEY, struct.pack("<II", 9, 4), HUGE, fields=1)),
        "cut short",
    ),
    "huge array of strings": (
        lambda path: path.write_bytes(header(KEY, struct.pack("<II", 9, 8), HUGE, fields=1)),
        "cut short",
    ),
    "array of arrays": (
        lambda path: path.write_bytes(header(KEY, struct.pack("<II", 9, 9), HUGE, fields=1)),
        "unknown type 9",
    ),
    "huge tensor": (
        lambda path: path.write_bytes(
            header(KEY, struct.pack("<I", 2), HUGE, HUGE, struct.pack("<IQ", 0, 0), tensors=1)
        ),
        "cut short",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_strangers_files_are_refused_in_two_lines(tmp_path: Path, case: str) -> None:
    make, what = BAD[case]
    make(tmp_path / "bad.gguf")
    with pytest.raises(ExportError, match=what) as refused:
        imatrix.read(tmp_path / "bad.gguf")
    assert str(tmp_path / "bad.gguf") in refused.value.what and refused.value.hint


def test_every_cut_of_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.gguf"
    imatrix.write(example(), path, NAMES, ["rows.jsonl"])
    whole = path.read_bytes().rstrip(b"\0")
    for length in range(len(whole) - 3):
        path.write_bytes(whole[:length])
        with pytest.raises(ExportError):
            imatrix.read(path)


def test_too_large_and_missing_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "imatrix.gguf"
    with pytest.raises(ExportError, match="cannot be read"):
        imatrix.read(path)
    imatrix.write(example(), path, NAMES, ["rows.jsonl"])
    monkeypatch.setattr(imatrix, "MAX_FILE_BYTES", 100)
    with pytest.raises(ExportError, match="too many"):
        imatrix.read(path)


def test_a_file_names_its_rows(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dataset"):
        imatrix.write(example(), tmp_path / "imatrix.gguf", NAMES, [])
