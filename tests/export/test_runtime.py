"""llama.cpp in a child process: it computes what transformers computes, and what it dies of is an error in words."""

from __future__ import annotations

import ctypes
import ctypes.util
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from qlora.errors import ExportError
from qlora.events import Recorder
from qlora.export import child
from qlora.export.gguf import plan as planning
from qlora.export.gguf import vocab
from qlora.export.gguf.metadata import entries
from qlora.export.gguf.write import GgufFile
from qlora.export.llama_cpp import library, runtime_child
from qlora.export.llama_cpp.runtime import Request, Runtime, ask, find_runtime
from qlora.export.verify import candidates
from qlora.model import generate
from qlora.model.meta_model import build
from qlora.model.resolve import resolve
from qlora.model.tokenizer import open_tokenizer
from tests.export import llama
from tests.families import END_OF_TURN_ID, make_base

pytest.importorskip("xllamacpp", reason='no llama.cpp to ask: pip install "qlora[gguf]"')
RUNTIME = find_runtime()
assert RUNTIME is not None
ROWS = [(list(range(4 + row, 44 + row)), [0, 5, 20, 38, 39]) for row in range(6)]


def write_f32(folder: Path, target: Path, without: str = "") -> Path:
    """The model of a folder as an F32 GGUF file, without one key."""
    base = resolve(str(folder), "main", Recorder())
    meta_model = build(base)
    plan = planning.plan(base, None, planning.Tokens(), ["f32"])
    keys = (*entries(list(plan.layout.keys)), *vocab.metadata(plan.vocab))
    file = GgufFile("f32", target.name, tuple(k for k in keys if k.key != without), plan.choices["f32"].types)
    weights = candidates.of_folder(meta_model, base)
    content = [file.header(plan.layout)]
    for tensor in plan.layout.tensors:
        data = tensor.to_gguf(weights[tensor.parameter]().float()).contiguous().numpy()
        content.append(data.tobytes() + bytes(-data.nbytes % gguf.GGUF_DEFAULT_ALIGNMENT))
    target.write_bytes(b"".join(content))
    return target


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base("llama", tmp_path_factory.mktemp("runtime") / "base", dtype=torch.float32)


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    return write_f32(folder, folder.parent / "model.gguf")


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def wanted_logprobs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat(
            [torch.log_softmax(model(torch.tensor([ids])).logits[0, places].double(), -1) for ids, places in ROWS]
        )


@pytest.mark.parametrize("package", ["xllamacpp", "llama_cpp"])
def test_logprobs_and_greedy_answers_are_those_of_transformers(
    file: Path, model: Any, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the F16 cache or flash attention of llama.cpp's defaults the difference is 5e-4 and more."""
    pytest.importorskip(package, reason=f"{package} is not installed")
    places = [place for place in library._LLAMA_PLACES if place[0] == package]
    monkeypatch.setattr(library, "_LLAMA_PLACES", places)
    found = find_runtime()
    assert found is not None
    with ask(found, file, Request(rows=ROWS)) as answer:
        assert answer.logprobs_NV.shape == (30, 384) and answer.logprobs_NV.dtype == np.float32
        difference = np.abs(answer.logprobs_NV - wanted_logprobs(model).numpy()).max()
    assert difference < 5e-5
    prompts = [ROWS[0][0][:10], ROWS[1][0][:33], [5]]
    answers = llama.greedy(file, prompts, [END_OF_TURN_ID])
    assert answers == generate.greedy(model, prompts, [END_OF_TURN_ID], 32, 0)
    assert max(map(len, answers)) == 32, "no answer is long enough to say much"


def test_rows_longer_than_a_batch(file: Path, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Computed in pieces, they give what they give at once."""
    opened = runtime_child.open_llama(RUNTIME.library)
    monkeypatch.setattr(runtime_child, "_BATCH", 16)
    monkeypatch.setattr(runtime_child, "_OUTPUT_BYTES", 4 * 384 * 2)
    context = runtime_child.Context.open(runtime_child.Model.load(opened, file), 40, 1)
    found = []
    for ids, places in ROWS:
        context.restart()
        found += [runtime_child.log_softmax(row) for row in context.logits(ids, 0, frozenset(places))]
    assert np.abs(np.stack(found) - wanted_logprobs(model).numpy()).max() < 5e-5


def test_tokens_and_vocabulary(file: Path, folder: Path) -> None:
    tokenizer = open_tokenizer(folder, "base")
    texts = ("", "The quick brown  fox\n\n", "<|im_start|>user\nWhat is it?<|im_end|>", "naïve 日本 🦙")
    with ask(RUNTIME, file, Request(texts=texts)) as answer:
        assert [list(ids) for ids in answer.tokenized] == [tokenizer(text)["input_ids"] for text in texts]
        assert END_OF_TURN_ID in answer.end_ids
        assert answer.chat_template == tokenizer.chat_template
        assert answer.logprobs_NV.shape == (0, 384)


def test_an_adapter_on_top_changes_what_is_computed(file: Path, folder: Path, tmp_path: Path) -> None:
    """A B of one row: the adapter's product is added to one output of the head's input, and only where it is given."""
    writer = gguf.GGUFWriter(tmp_path / "lora.gguf", "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 2.0)
    generator = np.random.default_rng(0)
    a, b = (generator.standard_normal(shape).astype(np.float32) * 0.3 for shape in ((2, 128), (64, 2)))
    writer.add_tensor("blk.1.ffn_down.weight.lora_a", a)
    writer.add_tensor("blk.1.ffn_down.weight.lora_b", b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        merged.model.layers[1].mlp.down_proj.weight += torch.from_numpy(b @ a)
    found = llama.logprobs_with_adapter(file, tmp_path / "lora.gguf", ROWS)
    assert float((found - wanted_logprobs(merged)).abs().max()) < 1e-4


# --- what goes wrong --------------------------------------------------------------------------------------------------


def refused(file: Path, request: Request = Request(), **how: Any) -> ExportError:
    with pytest.raises(ExportError) as caught, ask(how.pop("runtime", RUNTIME), file, request, **how):
        pass
    assert caught.value.hint and "\n" not in caught.value.what
    return caught.value


def test_files_that_llama_cannot_load(file: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("this is no GGUF")
    assert "llama.cpp cannot load it" in refused(tmp_path / "text.gguf").what
    (tmp_path / "short.gguf").write_bytes(file.read_bytes()[:-5000])
    assert "llama.cpp cannot load it" in refused(tmp_path / "short.gguf").what
    no_model = write_f32(folder, tmp_path / "less.gguf", without="tokenizer.ggml.model")
    assert "llama.cpp cannot load it: " in refused(no_model).what


def test_a_file_that_aborts_the_process_does_not_abort_ours(file: Path, tmp_path: Path) -> None:
    """Two tokens of one text: llama.cpp asserts that there are none."""
    twice = tmp_path / "twice.gguf"
    content = bytearray(file.read_bytes())
    tokens = next(field for key, field in gguf.GGUFReader(file).fields.items() if key == "tokenizer.ggml.tokens")
    first, second = (tokens.parts[tokens.data[at]] for at in (4, 5))
    assert len(first) == len(second) == 1
    place = content.index(struct.pack("<Q", 1) + bytes(first) + struct.pack("<Q", 1) + bytes(second))
    content[place + 8 : place + 9] = bytes(second)
    twice.write_bytes(content)
    error = refused(twice)
    assert "(SIGABRT)" in error.what and "ASSERT" in error.what


def test_a_child_that_takes_too_long_is_ended(file: Path) -> None:
    assert "did not answer within 0 s" in refused(file, Request(rows=ROWS), limit_seconds=0.1).what


@pytest.mark.parametrize("code", [-6, None])
def test_how_the_process_ends_after_its_answer_changes_nothing(
    file: Path, monkeypatch: pytest.MonkeyPatch, code: int | None
) -> None:
    """Native libraries may crash, or hang, while their process ends."""
    run = child.run
    monkeypatch.setattr(child, "run", lambda *what: replace(run(*what), code=code))
    with ask(RUNTIME, file, Request(rows=ROWS)) as answer:
        assert answer.logprobs_NV.shape[0] == sum(len(positions) for _, positions in ROWS)


def test_a_library_of_another_kind_is_refused(file: Path) -> None:
    other = Runtime("other 1", Path(ctypes.util.find_library("m") or "libm.so.6"))
    assert "is of another version" in refused(file, runtime=other).what
