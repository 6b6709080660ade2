"""Which base it is: known by the bytes of its weights, not by its name, its path or its shapes.

Two fine-tunes of one model share configuration, names, shapes and sizes. What tells them apart is the content hash:
blake3 over name, dtype, shape and blake3 of the bytes of every tensor that the model takes (the text model's, with the
statistics of stored 4-bit weights; no vision tower, no second copy of a tied head), in the order of names. Shards and
their order change nothing; another dtype is another base. It is taken of the bytes as they lie in the files, while
loading reads them. At the door a sample of each tensor is enough to refuse most other bases before anything is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from qlora.events import Progress, Sink
from qlora.foreign_json import ForeignModel
from qlora.model.tensors import TensorEntry, as_bytes, read_spans, read_tensor, refuse_not_finite, total_bytes

if TYPE_CHECKING:
    import torch

# Keys of config.json that change when a model is saved again, and nothing that is computed with.
_NOT_COMPUTED = ("transformers_version", "_name_or_path", "_commit_hash", "torch_dtype", "dtype", "use_cache")
# Of a tensor over SAMPLE_BYTES * SAMPLES bytes, this many pieces are read: its beginning, middle and end, the others
# where its name says. 300 tensors of an 8B model make 1.2 MB.
SAMPLES, SAMPLE_BYTES = 16, 256
BLOCK_BYTES = 1 << 24  # read at a time where a base is read for its identity alone


class BaseIdentity(ForeignModel):
    """What a base is known by, as checkpoints, `qlora.json` and `export.json` keep it. Hashes are hex.

    config   of config.json, without keys that no computation depends on
    shapes   of the names and shapes of the tensors that the model takes
    dtypes   in which they are stored: "BF16", or "BF16 and F32"
    sampled  of their names, dtypes, shapes and some of their bytes
    content  of all of their bytes; None while the weights have not been read
    """

    config: str
    shapes: str
    dtypes: str
    sampled: str
    content: str | None = None

    def difference(self, other: BaseIdentity) -> str | None:
        """What makes `other` another base than this one, in words; None where nothing that both know differs."""
        if self.config != other.config:
            return "its config.json differs"
        if None not in (self.content, other.content) and self.content == other.content:
            return None
        if self.shapes != other.shapes:
            return "its tensors have other names or shapes"
        if self.dtypes != other.dtypes:
            kept = f"the same names and shapes in {other.dtypes} instead of {self.dtypes}"
            return f"{kept}: a converted copy is another base"
        if self.sampled == other.sampled and None in (self.content, other.content):
            return None
        return "its weights differ: this is another fine-tune of the same shape"


# Said where an older version's run or adapter is gone on with.
NOT_COMPARED = (
    "was made by an older version, which kept no hash of the base's content: only its configuration and the names, "
    "shapes and sizes of its weights could be compared"
)


def another_base(
    recorded: BaseIdentity | None, now: BaseIdentity | None, recorded_fingerprint: str, fingerprint: str
) -> str | None:
    """What makes a base another one than was recorded, in words, or None. Older versions kept a fingerprint alone."""
    if recorded is not None and now is not None:
        return recorded.difference(now)
    same = recorded_fingerprint == fingerprint
    return None if same else "its config.json, or names, shapes or file sizes of its weights, differ"


@dataclass(frozen=True)
class Fingerprints:
    """What a checkpoint belongs to: resuming with another base or other rows is refused. Content decides.

    `base` and `data` are all that older versions kept: of files' shapes and sizes, and of what made the rows' tokens.
    """

    base: str
    data: str
    base_identity: BaseIdentity | None = None
    data_content: str | None = None
    older_data: str | None = None  # what older code called the same tokens; not kept

    def as_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        kept = {key: value for key, value in vars(self).items() if key != "older_data"}
        return {**kept, "base_identity": self.base_identity and self.base_identity.model_dump()}

    def other_base(self, now: Fingerprints) -> str | None:
        """What makes the base of `now` another one, in words, or None."""
        return another_base(self.base_identity, now.base_identity, self.base, now.base)

    def other_data(self, now: Fingerprints) -> str | None:
        """What makes the rows of `now` others, in words, or None."""
        same = self.data in (now.data, now.older_data)
        if None not in (self.data_content, now.data_content):
            same = self.data_content == now.data_content
        return None if same else "its rows have changed, or this version makes other tokens of them (CHANGES.md)"


def at_the_door(config: Mapping[str, Any], taken: Mapping[str, TensorEntry]) -> BaseIdentity:
    """The identity as far as a second can tell: `taken` are the tensors that the model takes, by name."""
    names = sorted(taken)
    shapes = json.dumps([[name, list(taken[name].shape)] for name in names])
    dtypes = sorted({taken[name].dtype for name in names})
    sampled = blake3()
    for name in names:
        sampled.update(_described(name, taken[name]))
        for piece in _sample(name, taken[name]):
            sampled.update(piece)
    return BaseIdentity(
        config=blake3(json.dumps(_computed(config), sort_keys=True).encode()).hexdigest(),
        shapes=blake3(shapes.encode()).hexdigest(),
        dtypes=" and ".join(dtypes),
        sampled=sampled.hexdigest(),
    )


class WeightReader:
    """Reads a base's tensors, each from front to back and once; meanwhile they are hashed, and their values checked.

    What was read last is given to a thread beside when the next is read: then a core has time, as reading is work for
    one. Whoever gets a tensor leaves it as it is; rows are valid until the next rows are read (fresh memory for each
    block of 16 MiB cost as much as its hash).
    """

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]) -> None:
        self.config, self.tensors = config, tensors
        self._digests: dict[str, Any] = {}
        self._bytes: dict[str, int] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="blake3")
        self._last: tuple[str, torch.Tensor] | None = None
        self._memory: list[torch.Tensor] = []
        self._seen: Future[None] | None = None

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """A tensor, or its next rows. Raises ModelError where a value of what was read before is not finite."""
        self._look_at_last()
        tensor = read_tensor(self.tensors[name], rows, None if rows is None else self._next_memory(name, rows))
        self._last = name, tensor
        return tensor

    def _next_memory(self, name: str, rows: tuple[int, int]) -> torch.Tensor:
        """The older one of two blocks of memory, large enough for these rows: its hash is done."""
        import torch

        entry = self.tensors[name]
        needed = (rows[1] - rows[0]) * (entry.nbytes // max(1, entry.shape[0]))
        older = self._memory.pop(0) if len(self._memory) == 2 else None
        if older is None or older.numel() < needed:
            older = torch.empty(needed, dtype=torch.uint8)
        self._memory.append(older)
        return older

    def identity(self) -> BaseIdentity:
        """Of the tensors that were read: the whole of each. Raises ModelError where a value is not finite."""
        digests = self.digests()
        return _with_content(self.config, {name: self.tensors[name] for name in digests}, digests)

    def digests(self) -> dict[str, bytes]:
        """blake3 of the bytes of each tensor that was read. Raises ModelError where a value is not finite."""
        self._look_at_last()
        if self._seen is not None:
            self._seen.result()
        whole = all(self._bytes[name] == self.tensors[name].nbytes for name in self._digests)
        assert whole, "a tensor was read in part"
        return {name: digest.digest() for name, digest in self._digests.items()}

    def _look_at_last(self) -> None:
        if self._seen is not None:
            self._seen.result()
        if self._last is not None:
            self._seen, self._last = self._thread.submit(self._look_at, *self._last), None

    def _look_at(self, name: str, tensor: torch.Tensor) -> None:
        self._digests.setdefault(name, blake3()).update(as_bytes(tensor))
        self._bytes[name] = self._bytes.get(name, 0) + tensor.nbytes
        refuse_not_finite(name, self.tensors[name], tensor)


def read_through(
    config: Mapping[str, Any], taken: Mapping[str, TensorEntry], sink: Sink, digests: Mapping[str, bytes] | None = None
) -> BaseIdentity:
    """The whole identity of a base that is not loaded: its tensors `taken` are read once, in the order of the files.

    `digests` are blake3 of the bytes of those that have been read already. Raises ModelError where a value is not
    finite.
    """
    left = {name: entry for name, entry in taken.items() if name not in (digests or {})}
    reader, done, total = WeightReader(config, left), 0, total_bytes(left.values())
    for name, entry in sorted(left.items(), key=lambda item: (str(item[1].file), item[1].offset)):
        rows = entry.shape[0] if entry.shape else 1
        step = max(1, BLOCK_BYTES * rows // max(1, entry.nbytes))
        spans = [(start, min(rows, start + step)) for start in range(0, rows, step)] if step < rows else [None]
        for span in spans:
            reader.read(name, span)
        done += entry.nbytes
        sink.emit(Progress("check base", done, total, "B"))
    return _with_content(config, taken, {**(digests or {}), **reader.digests()})


def _with_content(
    config: Mapping[str, Any], taken: Mapping[str, TensorEntry], digests: Mapping[str, bytes]
) -> BaseIdentity:
    content = blake3()
    for name in sorted(taken):
        content.update(_described(name, taken[name]) + digests[name])
    return at_the_door(config, taken).model_copy(update={"content": content.hexdigest()})


def _described(name: str, entry: TensorEntry) -> bytes:
    return json.dumps([name, entry.dtype, list(entry.shape)]).encode() + b"\n"


def _sample(name: str, entry: TensorEntry) -> Iterable[bytes]:
    if entry.nbytes <= SAMPLES * SAMPLE_BYTES:
        return read_spans(entry, [(0, entry.nbytes)])
    last = entry.nbytes - SAMPLE_BYTES
    drawn = blake3(name.encode()).digest(length=8 * (SAMPLES - 3))
    places = [int.from_bytes(drawn[at : at + 8], "little") % last for at in range(0, len(drawn), 8)]
    return read_spans(entry, [(place, SAMPLE_BYTES) for place in sorted({0, last // 2, last, *places})])


def _computed(value: Any) -> Any:
    """A configuration without the keys that no computation depends on, its inner ones too."""
    if isinstance(value, Mapping):
        return {key: _computed(inner) for key, inner in value.items() if key not in _NOT_COMPUTED}
    return value
