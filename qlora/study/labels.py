"""The store of soft labels: of each answer's tokens, the likeliest tokens of the base as it read the passage.

One file, appended to: records of a header (magic, tokens T, columns K, CRC-32 of what follows, key) and then token ids
(int32 [T]), the likeliest tokens (int32 [T, K]) and their log-probabilities (float16 [T, K]), all little-endian. 384
bytes a token and a half: 56 MB for 100 pages. It is read as if a stranger had written it: a record that is cut off,
damaged or names tokens that the vocabulary has not is none, and its answer is given again.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qlora import disk, files
from qlora.errors import RunFolderError
from qlora.study.generation import TOP, Written
from qlora.study.store import append_synced

COLUMNS = TOP
MAX_BYTES = 64 << 30
MAX_TOKENS = 4096  # of an answer
_MAGIC = b"QLS1"
_HEADER = struct.Struct("<4sHHI16s")
_TOKEN_BYTES = 4 + COLUMNS * (4 + 2)


@dataclass(frozen=True)
class Labels:
    """Soft labels of one answer of T - 1 tokens and the end that follows them.

    `token_ids`: int32 [T], the last of them the token that ends an answer. `ids`: int32 [T, COLUMNS], likeliest first,
    -1 where the vocabulary has no more. `logprobs`: float16 [T, COLUMNS], nats at temperature 1, -inf there.
    """

    token_ids: NDArray[np.int32]
    ids: NDArray[np.int32]
    logprobs: NDArray[np.float16]

    def beginning(self) -> Labels:
        """Without what ends it; the end alone where there is nothing else."""
        last = max(1, len(self.token_ids) - 1)
        return Labels(self.token_ids[:last], self.ids[:last], self.logprobs[:last])


class LabelStore:
    """The labels in a file, by the key of their question; of two with one key the later counts."""

    def __init__(self, path: Path, vocabulary: int) -> None:
        """Reads and checks each record once. `vocabulary`: rows of the embedding. Raises RunFolderError."""
        self.path, self.vocabulary = path, vocabulary
        self._offsets: dict[str, int] = {}
        self.bytes = 0  # of all whole records
        try:
            if path.exists():
                with files.open_to_read(path, MAX_BYTES) as file:
                    self._scan(file)
        except (OSError, files.UnsafePathError) as error:
            raise self._unreadable(error) from error

    def __contains__(self, key: str) -> bool:
        return key in self._offsets

    def __len__(self) -> int:
        return len(self._offsets)

    def get(self, key: str) -> Labels | None:
        """The labels of a question's answer; None where there are none. Raises RunFolderError."""
        if key not in self._offsets:
            return None
        try:
            with files.open_to_read(self.path, MAX_BYTES) as file:
                file.seek(self._offsets[key])
                found = self._record(file)
        except (OSError, files.UnsafePathError) as error:
            raise self._unreadable(error) from error
        return found[1] if found and found[0] == key else None

    def holds(self, key: str, labels: Labels) -> bool:
        """Whether these very labels are there: what a killed process wrote is not written twice."""
        found = self.get(key)
        return found is not None and _packed(key, found) == _packed(key, labels)

    def cut_torn(self) -> None:
        """Cuts off what follows the last whole record, so that what is appended can be found again."""
        if self.path.exists() and self.path.stat().st_size > self.bytes:
            with disk.open_to_write(self.path, "existing") as file:
                file.truncate(self.bytes)

    def append(self, records: Sequence[tuple[str, Labels]]) -> None:
        """Writes records and has them on the disk before it returns. Keys are 32 hexadecimal digits."""
        data = b""
        for key, labels in records:
            self._offsets[key] = self.bytes + len(data)
            data += _packed(key, labels)
        if data:
            append_synced(self.path, data)
        self.bytes += len(data)

    def _unreadable(self, error: Exception) -> RunFolderError:
        return RunFolderError(f"{self.path}: cannot be read ({error})", "move the study's folder away, and study anew")

    def _scan(self, file: BufferedReader) -> None:
        while (found := self._record(file)) is not None:
            key, labels = found
            if labels is not None:
                self._offsets[key] = self.bytes
            self.bytes = file.tell()

    def _record(self, file: BufferedReader) -> tuple[str, Labels | None] | None:
        """The record that begins here. None where none does, its labels None where they are of another vocabulary."""
        head = file.read(_HEADER.size)
        if len(head) < _HEADER.size:
            return None
        magic, tokens, columns, crc, key = _HEADER.unpack(head)
        if magic != _MAGIC or columns != COLUMNS or not 0 < tokens <= MAX_TOKENS:
            return None
        payload = file.read(tokens * _TOKEN_BYTES)
        if len(payload) < tokens * _TOKEN_BYTES or zlib.crc32(payload) != crc:
            return None
        token_ids = np.frombuffer(payload, "<i4", tokens)
        ids = np.frombuffer(payload, "<i4", tokens * COLUMNS, 4 * tokens).reshape(tokens, COLUMNS)
        logprobs = np.frombuffer(payload, "<f2", tokens * COLUMNS, 4 * tokens * (1 + COLUMNS))
        labels = Labels(token_ids, ids, logprobs.reshape(tokens, COLUMNS))
        return key.hex(), labels if self._is_sound(labels) else None

    def _is_sound(self, labels: Labels) -> bool:
        own, ids, logprobs = labels.token_ids, labels.ids, labels.logprobs
        named = bool((own >= 0).all() and (own < self.vocabulary).all() and (ids < self.vocabulary).all())
        absent = ids < 0
        counted = bool((logprobs[~absent] <= 0).all() and (logprobs[absent] == -np.inf).all())  # NaN is neither
        return named and counted and bool((ids >= -1).all() and (~absent).any(axis=1).all())


def _packed(key: str, labels: Labels) -> bytes:
    parts = (labels.token_ids.astype("<i4"), labels.ids.astype("<i4"), labels.logprobs.astype("<f2"))
    payload = b"".join(part.tobytes() for part in parts)
    head = _HEADER.pack(_MAGIC, len(labels.token_ids), COLUMNS, zlib.crc32(payload), bytes.fromhex(key))
    return head + payload


def labels_of(written: Written, end_id: int) -> Labels:
    """The labels of an answer as it was written; `end_id` is the token that ends an answer in training.

    What ended it for the base counts where it is that token. Where it is another (a line's end), or the limit ended
    it, the end is certain.
    """
    tokens = len(written.token_ids)
    own = np.array([*written.token_ids, end_id], dtype=np.int32)
    ids, logprobs = written.top_ids, written.top_logprobs
    if len(ids) == tokens or ids[tokens, 0] != end_id:
        last_ids, last_logprobs = one_token(end_id)
        ids, logprobs = np.vstack((ids[:tokens], last_ids)), np.vstack((logprobs[:tokens], last_logprobs))
    return Labels(own, ids, logprobs)


def one_token(token: int) -> tuple[NDArray[np.int32], NDArray[np.float16]]:
    """A place that is one token for certain: ids and log-probabilities [COLUMNS]."""
    ids, logprobs = np.full(COLUMNS, -1, dtype=np.int32), np.full(COLUMNS, -np.inf, dtype=np.float16)
    ids[0], logprobs[0] = token, 0.0
    return ids, logprobs
