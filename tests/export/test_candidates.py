"""A model computed layer by layer gives what the loaded one gives, for every family and from every kind of weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qlora.batch import Batch
from qlora.errors import ExportError
from qlora.events import Recorder
from qlora.export.verify import candidates
from qlora.export.verify.candidates import Weights
from qlora.export.verify.fidelity import live_logprobs
from qlora.model.meta_model import build
from qlora.model.resolve import resolve
from tests import all_families
from tests.export.cases import KINDS, NF4, merge_of, trained
from tests.export.hf_folder import write_hf
from tests.families import FAMILIES, make_base

CPU = torch.device("cpu")


def packed_batch(seed: int, vocabulary: int = 384) -> Batch:
    """Two rows of two documents of 25 and 15 tokens; two of three positions are trained."""
    generator = torch.Generator().manual_seed(seed)
    ids_BS = torch.randint(4, vocabulary - 4, (2, 40), generator=generator)
    positions_BS = torch.cat([torch.arange(25), torch.arange(15)]).expand(2, 40).contiguous()
    documents_BS = torch.cat([torch.zeros(25), torch.ones(15)]).long().expand(2, 40).contiguous()
    weights_BS = torch.ones(2, 40)
    weights_BS[:, [24, 39]] = 0
    weights_BS[:, ::3] = 0
    trained_T = weights_BS.flatten().nonzero().squeeze(1)
    return Batch(ids_BS, positions_BS, documents_BS, ids_BS.roll(-1, 1), weights_BS, trained_T)


BATCHES = (packed_batch(1), packed_batch(2))


def gathered(chunks: Iterable[Tensor]) -> Tensor:
    return torch.cat(list(chunks))


def loaded(folder: Path, dtype: torch.dtype, attention: str) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    return gathered(live_logprobs(model, BATCHES, CPU))


@pytest.mark.parametrize("family", [*FAMILIES, "gpt_neox", "opt"])
def test_every_family_is_computed_as_the_loaded_model(family: str, tmp_path: Path) -> None:
    folder = make_base(family, tmp_path / "base", dtype=torch.float32)
    base = resolve(str(folder), "main", Recorder())
    meta_model = build(base)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0)):
        weights = candidates.of_folder(meta_model, base)
        found = gathered(candidates.vocabulary_logprobs(meta_model.model, weights, BATCHES, CPU, dtype))
        wanted = loaded(folder, dtype, meta_model.attention)
        assert found.dtype == torch.float32 and found.shape == (104, 384)
        torch.testing.assert_close(found, wanted, atol=tolerance, rtol=0)
        assert all(parameter.is_meta for parameter in meta_model.model.parameters()), "a weight was kept"


def test_the_order_is_that_of_the_trained_positions(llama: Path) -> None:
    """Position by position: the targets' log-probabilities are those that the loss takes."""
    from qlora.model import load
    from qlora.recipe.sections import QuantizationSection
    from qlora.step.forward import CausalParts, batch_logprobs

    base = resolve(str(llama), "main", Recorder())
    model = load.load_base(base, QuantizationSection(type="none"), "auto", CPU, Recorder())
    meta_model = build(base)
    weights = candidates.of_folder(meta_model, base)
    found = gathered(candidates.vocabulary_logprobs(meta_model.model, weights, BATCHES, CPU))
    with torch.no_grad():
        wanted = torch.cat([batch_logprobs(CausalParts.of(model), batch) for batch in BATCHES])
    targets = torch.cat([batch.targets_BS.flatten()[batch.trained_T] for batch in BATCHES])
    torch.testing.assert_close(found.gather(1, targets[:, None])[:, 0], wanted, atol=1e-5, rtol=0)


class Counting(dict):  # type: ignore[type-arg]
    """Weights that count how often each is made."""

    def __init__(self, weights: Weights) -> None:
        super().__init__({name: self._counted(name, make) for name, make in weights.items()})
        self.made: Counter[str] = Counter()

    def _counted(self, name, make):  # type: ignore[no-untyped-def]
        def counted() -> Tensor:
            self.made[name] += 1
            return make()

        return counted


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_each_weight_is_made_once_whatever_the_micro_batches(family: str, tmp_path: Path) -> None:
    base = resolve(str(make_base(family, tmp_path / "base")), "main", Recorder())
    meta_model = build(base)
    weights = Counting(candidates.of_folder(meta_model, base))
    list(candidates.vocabulary_logprobs(meta_model.model, weights, [*BATCHES] * 3, CPU))
    assert weights.made.keys() == meta_model.sources.keys()
    assert all(count == 1 for name, count in weights.made.items() if ".layers." in name)
    assert all(count <= 2 for count in weights.made.values())


@pytest.mark.parametrize("kind", KINDS)
def test_merged_on_the_fly_is_the_merged_folder(llama: Path, tmp_path: Path, kind: str) -> None:

    trained(llama, tmp_path / "adapter", KINDS[kind])
    base = resolve(str(llama), "main", Recorder())
    merge = merge_of(llama, tmp_path / "adapter", merge_base="nf4", quantization=NF4, dtype=torch.bfloat16)
    flying = candidates.of_merge(merge.tensors())
    found = gathered(candidates.vocabulary_logprobs(build(base).model, flying, BATCHES, CPU))
    write_hf(merge, tmp_path / "hf", Recorder())
    assert torch.equal(found, loaded(tmp_path / "hf", torch.bfloat16, build(base).attention))


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2"])
def test_a_gguf_file_dequantized_is_the_same_model(family: str, tmp_path: Path) -> None:
    """Permuted heads and norms + 1 are undone."""
    import gguf

    from qlora.export.gguf.architectures import lay_out
    from qlora.export.gguf.write import GgufFile

    base = resolve(str(make_base(family, tmp_path / "base", dtype=torch.float32)), "main", Recorder())
    meta_model = build(base)
    own = candidates.of_folder(meta_model, base)
    weights = meta_model.model.state_dict()
    layout = lay_out(meta_model.model, {name: tuple(weights[name].shape) for name in meta_model.sources})
    types = dict.fromkeys(layout.stored, gguf.GGMLQuantizationType.F32)
    content = [GgufFile("f32", "model.gguf", (), types).header(layout)]
    for data in (*layout.constants.values(), *(t.to_gguf(own[t.parameter]().float()).numpy() for t in layout.tensors)):
        content.append(data.tobytes() + bytes(-data.nbytes % 32))
    (tmp_path / "model.gguf").write_bytes(b"".join(content))
    found = candidates.of_gguf(tmp_path / "model.gguf", layout.tensors)
    assert (
        torch.equal(
            gathered(candidates.vocabulary_logprobs(meta_model.model, found, BATCHES, CPU, torch.float32)),
            gathered(candidates.vocabulary_logprobs(meta_model.model, own, BATCHES, CPU, torch.float32)),
        )
        or family == "gemma2"
    )
    for name, make in own.items():
        torch.testing.assert_close(found[name](), make().float(), atol=2e-7, rtol=0)


def test_a_missing_or_misshapen_weight_is_an_error_that_names_it(llama: Path) -> None:
    base = resolve(str(llama), "main", Recorder())
    meta_model = build(base)
    weights = dict(candidates.of_folder(meta_model, base))
    name = "model.layers.1.mlp.up_proj.weight"
    for broken, message in (
        ({key: make for key, make in weights.items() if key != name}, "the exported model has no such weight"),
        ({**weights, name: lambda: torch.zeros(3, 3)}, r"is \[3, 3\] in the exported model, not \[128, 64\]"),
    ):
        with pytest.raises(ExportError, match=f"{name}: {message}"):
            list(candidates.vocabulary_logprobs(meta_model.model, broken, BATCHES, CPU))
        assert all(parameter.is_meta for parameter in meta_model.model.parameters())


def test_a_resized_vocabulary_is_computed(llama: Path) -> None:
    base = resolve(str(llama), "main", Recorder())
    meta_model = build(base)
    weights = dict(candidates.of_folder(meta_model, base))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        whole = weights[name]()
        weights[name] = lambda whole=whole: torch.cat([whole, whole[:8]])
    found = gathered(candidates.vocabulary_logprobs(meta_model.model, weights, BATCHES, CPU))
    assert found.shape == (104, 392)


# Layers that take more than what the layer before gives: keys of a layer before, a state beside the hidden states.
@pytest.mark.parametrize("family", ["bamba", "gemma4_text", "rwkv"])
def test_a_trunk_that_is_more_than_its_layers_is_computed_whole(family: str, tmp_path: Path) -> None:
    folder = all_families.make_base(family, tmp_path / "base")
    base = resolve(str(folder), "main", Recorder())
    meta_model = build(base)
    weights = candidates.of_folder(meta_model, base)
    found = gathered(candidates.vocabulary_logprobs(meta_model.model, weights, BATCHES, CPU))
    assert torch.equal(found, loaded(folder, torch.bfloat16, meta_model.attention))
    assert all(parameter.is_meta for parameter in meta_model.model.parameters()), "a weight was kept"


def test_layers_that_are_in_no_list_are_computed_whole(llama: Path) -> None:
    base = resolve(str(llama), "main", Recorder())
    meta_model = build(base)
    weights = candidates.of_folder(meta_model, base)
    by_layers = gathered(candidates.vocabulary_logprobs(meta_model.model, weights, BATCHES, CPU))
    meta_model.model.config.num_hidden_layers = 7
    whole = gathered(candidates.vocabulary_logprobs(meta_model.model, weights, BATCHES, CPU))
    assert torch.equal(whole, by_layers)


def test_a_whole_model_that_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = resolve(str(all_families.make_base("bamba", tmp_path / "base")), "main", Recorder())
    meta_model = build(base)
    monkeypatch.setattr(candidates, "free_bytes", lambda device: 1 << 10)
    with pytest.raises(ExportError, match="measured whole it takes 0") as refused:
        list(candidates.vocabulary_logprobs(meta_model.model, {}, BATCHES, CPU))
    assert "verify=False" in refused.value.hint
