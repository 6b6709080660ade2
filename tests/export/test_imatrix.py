"""The importance matrix: sums as counted by hand, the model untouched, and llama.cpp's file."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from qlora.batch import Batch
from qlora.data.chat import TokenRow
from qlora.data.loader import collate
from qlora.data.token_cache import PreparedSplit
from qlora.errors import ExportError
from qlora.events import Notice, Progress, Recorder
from qlora.export import imatrix
from qlora.model import adapters, load
from qlora.model.resolve import resolve
from qlora.recipe.sections import DataSection, LoraSection, QuantizationSection
from tests import mixtures
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
    starts = range(0, len(packs), rows_per_batch)
    batches = [collate(split, packs[start : start + rows_per_batch], 0, DATA.max_length) for start in starts]
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


def test_padding_is_known_by_its_place() -> None:
    split = split_of((5, 3, 8))
    full = collate(split, [(0, 1), (2,)], pad_id=7, max_length=48)
    assert len(imatrix.real_positions(full)) == 16, "a full row has no padding"
    padded = collate(split, [(0,), (2,)], pad_id=7, max_length=48)
    assert imatrix.real_positions(padded).tolist() == [*range(5), *range(8, 16)]


def test_sums_that_are_not_finite_are_an_error() -> None:
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
INPUTS = [(parameter, name, None) for parameter, name in NAMES.items()]


def example() -> imatrix.Imatrix:
    sums = {name: (np.arange(8, dtype=np.float32) + number) for number, name in enumerate([*NAMES, "unnamed.weight"])}
    return imatrix.Imatrix(sums, dict.fromkeys(sums, 3), 1100)


def test_the_file_holds_what_was_measured_and_is_the_same_every_time(tmp_path: Path) -> None:
    import gguf

    path = tmp_path / "imatrix.gguf"
    imatrix.write(example(), path, INPUTS, ["rows.jsonl"])
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    for parameter, name in NAMES.items():
        assert stored[f"{name}.in_sum2"].tolist() == example().sums[parameter].tolist()
        assert stored[f"{name}.counts"].tolist() == [3]
    first = path.read_bytes()
    imatrix.write(example(), path, INPUTS, ["rows.jsonl"])
    assert path.read_bytes() == first


def test_the_file_is_llama_cpps(tmp_path: Path) -> None:
    import gguf

    imatrix.write(example(), tmp_path / "imatrix.gguf", INPUTS, ["a.jsonl", "b.jsonl"])
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


def test_a_file_names_its_rows(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dataset"):
        imatrix.write(example(), tmp_path / "imatrix.gguf", INPUTS, [])


# --- experts ----------------------------------------------------------------------------------------------------------


def experts_by_hand(model: Any, split: PreparedSplit) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Sums in fp64 and counts of each expert, token by token through transformers' own forward of its experts."""
    wanted: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def note(name: str, module: Any, hidden_TH: torch.Tensor, index_TK: torch.Tensor) -> None:
        count = module.num_experts
        inner = module.down_proj.shape[1 if module.is_transposed else 2]
        for leaf, width in (("gate_up_proj", hidden_TH.shape[1]), ("down_proj", inner)):
            wanted.setdefault(f"{name}.{leaf}", (np.zeros((count, width)), np.zeros(count, dtype=np.int64)))
        first, down = wanted[f"{name}.gate_up_proj"], wanted[f"{name}.down_proj"]
        for token, chosen in enumerate(index_TK.tolist()):
            for expert in chosen:
                weight, row = module.gate_up_proj[expert].detach(), hidden_TH[token][None]
                rows = row @ weight if module.is_transposed else row @ weight.T
                inner = module._apply_gate(rows + module.gate_up_proj_bias[expert] if module.has_bias else rows)
                first[0][expert] += row[0].double().square().numpy()
                down[0][expert] += inner[0].detach().double().square().numpy()
                first[1][expert] += 1
                down[1][expert] += 1

    handles = [
        module.register_forward_pre_hook(lambda module, args, name=name: note(name, module, args[0], args[1]))
        for name, module in model.named_modules()
        if name.endswith(".experts")
    ]
    with torch.no_grad():
        for row in split.rows:
            model(input_ids=torch.tensor([row.input_ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return wanted


@pytest.mark.parametrize("family", ["qwen3_moe", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_each_expert_is_measured_on_what_it_was_sent(family: str, tmp_path: Path) -> None:
    """Packed, padded and sorted by expert: the sums and counts of each row alone, expert by expert.

    gpt-oss' masks know nothing of documents: its rows are one each.
    """
    base = resolve(str(mixtures.make_base(family, tmp_path / "base")), "main", Recorder())
    plain = QuantizationSection(type="none")
    model = load.load_base(base, plain, "auto", torch.device("cpu"), Recorder()).float().eval()
    names = set(vars(model.model.layers[0].mlp.experts))
    split = split_of()
    one_each = [collate(split, [(row,), (row + 1,)], 0, DATA.max_length) for row in range(0, len(LENGTHS), 2)]
    found = imatrix.collect(model, one_each if family == "gpt_oss" else batches_of(), Recorder())
    assert set(vars(model.model.layers[0].mlp.experts)) == names  # left as it was
    wanted = experts_by_hand(model, split_of())
    assert len(wanted) == 4
    for name, (sums, counts) in wanted.items():
        assert np.array_equal(found.counts[name], counts) and counts.sum() == 2 * sum(LENGTHS), name
        assert np.allclose(found.sums[name], sums, rtol=1e-4, atol=1e-6), name


def of_experts() -> imatrix.Imatrix:
    sums = np.array([[4.0, 8.0], [0.0, 0.0], [9.0, 3.0]], dtype=np.float32)
    counts = np.array([2, 0, 3])
    name = "model.layers.0.mlp.experts"
    return imatrix.Imatrix(
        {f"{name}.gate_up_proj": sums, f"{name}.down_proj": sums},
        {f"{name}.gate_up_proj": counts, f"{name}.down_proj": counts},
        5,
    )


def test_experts_without_a_token_weigh_all_their_channels_the_same() -> None:
    found = of_experts()
    means = found.importance()["model.layers.0.mlp.experts.down_proj"]
    assert means.tolist() == [[2, 4], [1, 1], [3, 1]] and means.dtype == np.float32
    assert found.unseen_experts() == (1, 3)


def test_experts_without_a_token_are_told(tmp_path: Path) -> None:
    """Two rows of a token each reach few of eight experts."""
    base = resolve(str(mixtures.make_base("qwen3_moe", tmp_path / "base")), "main", Recorder())
    model = load.load_base(base, QuantizationSection(), "auto", torch.device("cpu"), Recorder())
    sink, split = Recorder(), split_of((2, 2))
    found = imatrix.collect(model, [collate(split, [(0,), (1,)], 0, DATA.max_length)], sink)
    unseen, experts = found.unseen_experts()
    assert 0 < unseen < experts == 16
    (notice,) = [event for event in sink.events if isinstance(event, Notice)]
    assert notice.message.startswith(f"{unseen} of 16 experts were sent no token")


def test_a_file_has_a_row_and_a_count_for_each_expert(tmp_path: Path) -> None:
    """As llama-imatrix writes stacks: in_sum2 (E, in), counts (E, 1), under the name of each tensor they are of."""
    names = [("gate_up_proj", "ffn_gate_exps"), ("gate_up_proj", "ffn_up_exps"), ("down_proj", "ffn_down_exps")]
    inputs = [(f"model.layers.0.mlp.experts.{own}", f"blk.0.{name}.weight", None) for own, name in names]
    imatrix.write(of_experts(), tmp_path / "imatrix.gguf", inputs, ["rows"])
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "imatrix.gguf").tensors}
    for _, name in names:
        assert stored[f"blk.0.{name}.weight.in_sum2"].data.tolist() == [[4, 8], [0, 0], [9, 3]]
        assert stored[f"blk.0.{name}.weight.counts"].data.tolist() == [[2], [0], [3]]
    other = of_experts()
    other.counts["model.layers.0.mlp.experts.down_proj"][1] = 1
    assert other.sha256() != of_experts().sha256()
