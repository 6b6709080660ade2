"""Headers and indexes that lie are refused before any weight is read; what is read is what was written."""

from __future__ import annotations

import json
import os
import struct
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qlora.errors import ModelError
from qlora.model import tensors
from qlora.model.tensors import MAX_HEADER_BYTES, find_tensors, read_ahead, read_header, read_spans, read_tensor

F32_4 = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def write(file: Path, header: Any, data: bytes = b"\0" * 16, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return file


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool])
def test_reads_what_was_written(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "matrix": (torch.randn(37, 5) * 9).to(dtype),
        "scalar": torch.tensor(3).to(dtype),
        "empty": torch.zeros(0, 4).to(dtype),
        "cube": (torch.randn(3, 4, 5) * 9).to(dtype),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    entries = find_tensors(tmp_path)
    assert entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(read_tensor(entries[name]), tensor)
        assert entries[name].numel == tensor.numel()
    assert torch.equal(read_tensor(entries["matrix"], (10, 37)), tensors["matrix"][10:])
    assert torch.equal(read_tensor(entries["cube"], (1, 2)), tensors["cube"][1:2])


LIES: dict[str, Any] = {
    "overlap": {"a": F32_4, "b": {**F32_4, "data_offsets": [0, 16]}},
    "hole": {"a": {**F32_4, "shape": [1], "data_offsets": [12, 16]}},
    "too few bytes for the shape": {"a": {**F32_4, "shape": [3, 2]}},
    "beyond the end": {"a": {**F32_4, "shape": [4, 2], "data_offsets": [0, 32]}},
    "negative": {"a": {**F32_4, "data_offsets": [-16, 0]}},
    "backwards": {"a": {**F32_4, "data_offsets": [16, 0]}},
    "negative shape": {"a": {**F32_4, "shape": [-2, -2]}},
    "shape of floats": {"a": {**F32_4, "shape": [2.0, 2.0]}},
    "shape of truths": {"a": {**F32_4, "shape": [True, 4]}},
    "huge shape": {"a": {**F32_4, "shape": [1 << 62, 1 << 62]}},
    "unknown dtype": {"a": {**F32_4, "dtype": "F31"}},
    "dtype that lies": {"a": {**F32_4, "dtype": "F64"}},
    "no dtype": {"a": {"shape": [4], "data_offsets": [0, 16]}},
    "not an object": {"a": 3},
    "a list": [1, 2],
    "not JSON": b"{'a': 1}",
    "not UTF-8": b'{"\xff": 1}',
    "doubled key": b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "a": 1}',
    "deep": b"[" * 100_000,
    "bomb": b'{"a": [' + b"[]," * 3_000_000 + b"1]}",
    "data that no tensor owns": {},
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_header_is_refused(tmp_path: Path, lie: str) -> None:
    file = write(tmp_path / "model.safetensors", LIES[lie])
    started = time.perf_counter()
    with pytest.raises(ModelError) as error:
        read_header(file)
    assert time.perf_counter() - started < 0.5
    assert str(file) in error.value.what and error.value.hint


@pytest.mark.parametrize("length", [0, 1, 17, MAX_HEADER_BYTES + 1, 1 << 63, (1 << 64) - 1])
def test_a_header_of_impossible_length_is_refused_at_once(tmp_path: Path, length: int) -> None:
    file = write(tmp_path / "model.safetensors", b"{}", b"", length)
    with pytest.raises(ModelError, match="no safetensors file"):
        read_header(file)


@pytest.mark.parametrize(
    ("head", "what"),
    [(b"PK\x03\x04" + b"\0" * 90, "pickle"), (b"\x80\x04" + b"\0" * 90, "pickle"), (b"version https://git", "LFS")],
)
def test_other_files_under_the_name_are_recognised(tmp_path: Path, head: bytes, what: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(head)
    with pytest.raises(ModelError, match=what):
        find_tensors(tmp_path)


def test_a_file_cut_off_or_with_a_tail_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cut off"):
        read_header(write(tmp_path / "short", {"a": F32_4}, b"\0" * 8))
    with pytest.raises(ModelError, match="no tensor owns"):
        read_header(write(tmp_path / "long", {"a": F32_4}, b"\0" * 24))


def sharded(folder: Path, weight_map: Any) -> Path:
    write(folder / "model-00001-of-00002.safetensors", {"a": F32_4})
    write(folder / "model-00002-of-00002.safetensors", {"b": F32_4})
    text = weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def test_shards_are_read_through_the_index(tmp_path: Path) -> None:
    assert list(find_tensors(sharded(tmp_path, {"b": TWO, "a": ONE}))) == ["a", "b"]


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/../../x.safetensors", "x\0.safetensors", "", "..", "a\\..\\b"]
)
def test_an_index_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"")
    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(ModelError):
        find_tensors(sharded(folder, {"a": ONE, "b": name}))


def test_links_pipes_and_other_kinds_of_file_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    outside = write(tmp_path / "outside.safetensors", {"b": F32_4})
    (folder / "link.safetensors").symlink_to(outside)
    with pytest.raises(ModelError, match="link out of the folder"):
        find_tensors(sharded(folder, {"a": ONE, "b": "link.safetensors"}))
    os.mkfifo(folder / "pipe.safetensors")
    with pytest.raises(ModelError, match="neither a file nor a folder"):
        find_tensors(sharded(folder, {"a": ONE, "b": "pipe.safetensors"}))
    with pytest.raises(ModelError, match="not a safetensors file"):
        find_tensors(sharded(folder, {"a": ONE, "b": "weights.bin"}))


def test_a_hub_snapshot_is_read_through_its_blobs(tmp_path: Path) -> None:
    """Its names are links into the blobs of the same repository; what is opened is the blob, what is named the link."""
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "c0ffee", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    write(blobs / "5eed", {"a": F32_4})
    (snapshot / "model.safetensors").symlink_to("../../blobs/5eed")
    entry = find_tensors(snapshot)["a"]
    assert (entry.file, entry.opened) == (snapshot / "model.safetensors", (blobs / "5eed").resolve())
    assert read_tensor(entry).tolist() == [[0.0] * 2] * 2 and read_spans(entry, [(4, 8)]) == [b"\0" * 8]
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(write(tmp_path / "elsewhere", {"a": F32_4}))
    with pytest.raises(ModelError, match="link out of the folder"):
        find_tensors(snapshot)


def test_a_file_that_became_a_link_meanwhile_is_not_read(tmp_path: Path) -> None:
    entry = read_header(write(tmp_path / "model.safetensors", {"a": F32_4}))["a"]
    (tmp_path / "model.safetensors").rename(tmp_path / "other")
    with pytest.raises(ModelError, match="cannot be read any more"):
        read_tensor(entry)
    (tmp_path / "model.safetensors").symlink_to("other")
    with pytest.raises(ModelError, match="is a link"):
        read_tensor(entry)


def test_an_index_and_its_shards_must_agree(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is missing"):
        find_tensors(sharded(tmp_path, {"a": ONE, "b": "model-00003-of-00002.safetensors"}))
    with pytest.raises(ModelError, match="tensor c is not in it"):
        find_tensors(sharded(tmp_path, {"a": ONE, "b": TWO, "c": TWO}))
    sharded(tmp_path, {"a": ONE, "b": TWO})
    write(tmp_path / TWO, {"a": F32_4})
    with pytest.raises(ModelError, match="stands in another shard"):
        find_tensors(tmp_path)


@pytest.mark.parametrize(
    "index", ['{"weight_map": {}}', '{"weight_map": [1]}', '{"weight_map": {"a": 3}}', "{}", "[]", "not json",
              f'{{"weight_map": {{"a": "{ONE}", "a": "{TWO}"}}}}']
)  # fmt: skip
def test_an_index_of_another_form_is_refused(tmp_path: Path, index: str) -> None:
    with pytest.raises(ModelError):
        find_tensors(sharded(tmp_path, index))


@pytest.mark.parametrize(
    ("file", "what"),
    [("pytorch_model.bin", "pickle only"), ("model.gguf", "GGUF"), ("README.md", "no model.safetensors")],
)
def test_a_folder_without_safetensors_says_what_it_has(tmp_path: Path, file: str, what: str) -> None:
    (tmp_path / file).write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match=what):
        find_tensors(tmp_path)


def test_rows_read_ahead_are_the_rows_and_the_thread_ends_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(10, 3)
    save_file({"w": weight}, tmp_path / "model.safetensors")
    entry = find_tensors(tmp_path)["w"]
    spans = [(0, 4), (4, 8), (8, 10)]
    for ahead in (0, 1 << 20):  # none, and all
        monkeypatch.setattr(tensors, "AHEAD_BYTES", ahead)
        for taken in (spans, spans[1:2], []):
            assert [rows.tolist() for rows in read_ahead(entry, taken)] == [weight[a:b].tolist() for a, b in taken]
    with closing(read_ahead(entry, spans)) as half:
        next(half)
    with pytest.raises(ModelError, match="ends before its tensors do"):
        os.truncate(tmp_path / "model.safetensors", entry.offset + 50)
        list(read_ahead(entry, spans))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read")]


def test_no_more_is_read_ahead_than_was_promised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"w": torch.zeros(40, 4)}, tmp_path / "model.safetensors")
    entry, read, done = find_tensors(tmp_path)["w"], tensors._fill, list[int]()
    monkeypatch.setattr(tensors, "AHEAD_BYTES", 3 * 16)
    monkeypatch.setattr(tensors, "_fill", lambda *given: (read(*given), done.append(1)))
    with closing(read_ahead(entry, [(row, row + 1) for row in range(40)])) as rows:
        next(rows)
        time.sleep(0.2)
        assert len(done) == 4, "the one that is used and three of 16 bytes"
