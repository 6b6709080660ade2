"""Files written in one pass: as large as was foreseen, each value where llama.cpp looks for it, pieces put together."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qlora.errors import ExportError
from qlora.events import Progress, Recorder
from qlora.export.gguf import encode
from qlora.export.gguf.plan import Tokens, plan
from qlora.export.gguf.write import GgufFile, Tools, write
from qlora.export.staging import StagedExport
from qlora.model.resolve import resolve
from tests.export.gguf.written import plain_tensors, write_base
from tests.families import make_base

QUANTS = ("f32", "f16", "q8_0")


@pytest.fixture(scope="module")
def files(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_base(llama, tmp_path_factory.mktemp("written"), QUANTS)


def test_a_file_is_as_large_as_was_foreseen(llama: Path, files: dict[str, Path], tmp_path: Path) -> None:
    """Also where tensors do not end at a multiple of the alignment: norms of 36 values are 144 bytes."""
    odd = make_base("qwen3", tmp_path / "odd", overrides={"hidden_size": 36})
    for folder, written in ((llama, files), (odd, write_base(odd, tmp_path / "out", QUANTS[:2]))):
        planned = plan(resolve(str(folder), "main", Recorder()), None, Tokens(), list(written))
        for quant, path in written.items():
            weights = GgufFile(quant, path.name, (), planned.choices[quant].types).nbytes(planned.layout)
            assert path.stat().st_size == gguf.GGUFReader(path).data_offset + weights, (folder, quant)


def test_every_value_is_the_bases(llama: Path, files: dict[str, Path]) -> None:
    stored = load_file(llama / "model.safetensors")
    layout = plan(resolve(str(llama), "main", Recorder()), None, Tokens(), ()).layout
    written = {quant: {entry.name: entry for entry in gguf.GGUFReader(path).tensors} for quant, path in files.items()}
    for tensor in layout.tensors:
        expected = tensor.to_gguf(stored[tensor.parameter].float()).numpy()
        for quant, tolerance in (("f32", 0.0), ("f16", 1e-3), ("q8_0", 1e-2)):
            entry = written[quant][tensor.name]
            found = gguf.dequantize(entry.data, entry.tensor_type).reshape(expected.shape)
            assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max(), (quant, tensor.name)


def test_a_pass_that_was_stopped_is_gone_on_with(llama: Path, tmp_path: Path) -> None:
    """Of what stands already nothing is read again, and the file is the same to the byte."""
    base = resolve(str(llama), "main", Recorder())
    planned = plan(base, None, Tokens(), ("f32",))
    file = GgufFile("f32", "model.gguf", (), planned.choices["f32"].types)
    read: list[str] = []

    def run(place: Path, until: int) -> bytes:
        tensors = plain_tensors(base)
        order = {tensor.parameter: number for number, tensor in enumerate(planned.layout.tensors)}

        def noted(tensor, blocks):  # type: ignore[no-untyped-def]
            def blocks_of(unit: int):  # type: ignore[no-untyped-def]
                if order[tensor.parameter] == until:
                    raise KeyboardInterrupt
                read.append(tensor.parameter)
                return blocks(unit)

            return blocks_of

        for tensor in tensors:
            object.__setattr__(tensor, "blocks", noted(tensor, tensor.blocks))
        sink = Recorder()
        with StagedExport.open({"f32": place}, {"work": "one"}, 1 << 20) as staged:
            write(planned.layout, tensors, [file], staged, Tools(None, {}), sink)
            staged.publish("f32")
        done = [event for event in sink.events if isinstance(event, Progress)]
        assert done[-1].done == done[-1].total
        return (place / "model.gguf").read_bytes()

    whole = run(tmp_path / "whole", -1)
    assert len(read) == len(planned.layout.tensors)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", 5)
    read.clear()
    assert run(tmp_path / "stopped", -1) == whole
    assert read == [tensor.parameter for tensor in planned.layout.tensors[5:]]


class SlowGgml:
    """In the place of ggml: a piece takes a while, and its bytes say which values they are of."""

    def __init__(self) -> None:
        self.drawn, self.at_once, self.most = random.Random(3), 0, 0
        self.counting = threading.Lock()

    def quantize(self, kind: object, rows_RC: np.ndarray, out_RB: np.ndarray, importance: object) -> bool:
        with self.counting:
            self.at_once += 1
            self.most = max(self.most, self.at_once)
        time.sleep(self.drawn.random() / 200)
        out_RB[:] = rows_RC.astype(np.float16).view(np.uint8)[:, : out_RB.shape[1]]
        with self.counting:
            self.at_once -= 1
        return bool(np.isfinite(rows_RC).all()) and float(np.abs(rows_RC).max()) < 1e3


@pytest.mark.parametrize("threads", [1, 3])
def test_blocks_that_are_encoded_side_by_side_are_written_in_order(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    base = resolve(str(llama), "main", Recorder())
    planned = plan(base, None, Tokens(), ("f16",))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(encode, "GGML_PIECE", 512)
    kinds = planned.choices["f16"].types
    ggml_kinds = {name: gguf.GGMLQuantizationType.Q5_0 if kind.name == "F16" else kind for name, kind in kinds.items()}
    file = GgufFile("a", "model.gguf", (), ggml_kinds)
    ggml, written = SlowGgml(), []
    monkeypatch.setattr(StagedExport, "append", lambda self, key, name, data: written.append(bytes(memoryview(data))))
    with StagedExport.open({"a": tmp_path / "x"}, {}, 1 << 20) as staged:
        write(planned.layout, plain_tensors(base), [file], staged, Tools(ggml, {}), Recorder())  # type: ignore[arg-type]
    expected = file.header(planned.layout)
    for tensor in planned.layout.tensors:
        rows = tensor.to_gguf(load_file(llama / "model.safetensors")[tensor.parameter].float()).contiguous()
        made = encode.encode(rows, ggml_kinds[tensor.name], SlowGgml())  # type: ignore[arg-type]
        expected += made.tobytes() + bytes(-made.nbytes % 32)
    assert b"".join(written) == expected
    assert ggml.most == threads
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("encode")]


def test_a_scale_that_overflows_ends_the_pass_and_its_threads(llama: Path, tmp_path: Path) -> None:
    base = resolve(str(llama), "main", Recorder())
    planned = plan(base, None, Tokens(), ("f16",))
    types = dict.fromkeys(planned.choices["f16"].types, gguf.GGMLQuantizationType.Q5_0)
    large = plain_tensors(base)
    object.__setattr__(large[3], "blocks", lambda unit: (torch.full(large[3].shape, 1e4) for _ in range(1)))
    with (
        pytest.raises(ExportError, match="scale overflows in Q5_0"),
        StagedExport.open({"a": tmp_path / "x"}, {}, 1 << 20) as staged,
    ):
        write(planned.layout, large, [GgufFile("a", "f", (), types)], staged, Tools(SlowGgml(), {}), Recorder())  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("encode", "write", "sha256"))]
