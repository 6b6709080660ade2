"""Labels come back bit for bit; a record that is torn, damaged or of another vocabulary is none."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qlora.errors import RunFolderError
from qlora.study.labels import COLUMNS, Labels, LabelStore, one_token

VOCABULARY = 300


def labels(seed: int, tokens: int = 3) -> Labels:
    drawn = np.random.default_rng(seed)
    ids = np.stack([drawn.permutation(VOCABULARY)[:COLUMNS] for _ in range(tokens)]).astype(np.int32)
    logprobs = -np.sort(drawn.random((tokens, COLUMNS))).astype(np.float16)
    ids[-1], logprobs[-1] = one_token(2)
    return Labels(ids[:, 0].copy(), ids, logprobs)


def key(number: int) -> str:
    return f"{number:032x}"


def same(one: Labels | None, other: Labels) -> bool:
    assert one is not None
    pairs: list[tuple[NDArray[Any], NDArray[Any]]] = [
        (one.token_ids, other.token_ids),
        (one.ids, other.ids),
        (one.logprobs, other.logprobs),
    ]
    return all(left.dtype == right.dtype and np.array_equal(left, right) for left, right in pairs)


def test_labels_come_back_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "labels.bin"
    store = LabelStore(path, VOCABULARY)
    store.append([(key(1), labels(1)), (key(2), labels(2, 9))])
    store.append([(key(1), labels(3))])
    for opened in (store, LabelStore(path, VOCABULARY)):
        assert same(opened.get(key(1)), labels(3)) and same(opened.get(key(2)), labels(2, 9))
        assert opened.get(key(4)) is None and len(opened) == 2


def test_a_torn_end_is_cut_at_every_length(tmp_path: Path) -> None:
    path = tmp_path / "labels.bin"
    store = LabelStore(path, VOCABULARY)
    store.append([(key(1), labels(1))])
    whole = path.read_bytes()
    store.append([(key(2), labels(2))])
    both = path.read_bytes()
    for length in [*range(len(whole), len(both), 97), len(both) - 1]:
        path.write_bytes(both[:length])
        again = LabelStore(path, VOCABULARY)
        assert key(1) in again and key(2) not in again
        again.cut_torn()
        again.append([(key(2), labels(2))])
        assert path.read_bytes() == both


def _forged(**change: int) -> bytes:
    """One record with right checksum, one number of it another."""
    made = labels(1)
    ids, own, logprobs = made.ids.copy(), made.token_ids.copy(), made.logprobs.copy()
    ids[0, 0] = change.get("id", ids[0, 0])
    own[0] = change.get("own", own[0])
    if "nan" in change:
        logprobs[0, 0] = np.nan
    if "likely" in change:
        logprobs[0, 0] = 1.0
    payload = own.tobytes() + ids.tobytes() + logprobs.tobytes()
    head = (b"QLS1", change.get("tokens", 3), change.get("columns", COLUMNS), zlib.crc32(payload), bytes(16))
    return struct.pack("<4sHHI16s", *head) + payload


@pytest.mark.parametrize(
    "change",
    [
        *({"id": VOCABULARY}, {"id": -2}, {"own": VOCABULARY}, {"own": -1}, {"nan": 1}, {"likely": 1}),
        *({"tokens": 65535}, {"tokens": 0}, {"columns": 2}),
    ],
)
def test_a_stranger_s_record_names_nothing_outside(tmp_path: Path, change: dict[str, int]) -> None:
    path = tmp_path / "labels.bin"
    path.write_bytes(_forged())
    assert len(LabelStore(path, VOCABULARY)) == 1
    path.write_bytes(_forged(**change))
    assert len(LabelStore(path, VOCABULARY)) == 0


def test_a_damaged_byte_ends_what_is_believed(tmp_path: Path) -> None:
    path = tmp_path / "labels.bin"
    LabelStore(path, VOCABULARY).append([(key(1), labels(1)), (key(2), labels(2))])
    data = bytearray(path.read_bytes())
    data[len(data) // 2 + 100] ^= 1
    path.write_bytes(data)
    opened = LabelStore(path, VOCABULARY)
    assert key(1) in opened and opened.get(key(2)) is None


def test_no_folder_stands_in_for_it(tmp_path: Path) -> None:
    (tmp_path / "labels.bin").mkdir()
    with pytest.raises(RunFolderError):
        LabelStore(tmp_path / "labels.bin", VOCABULARY)
