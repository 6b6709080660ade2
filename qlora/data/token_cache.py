"""Tokenized rows on the disk: one Arrow file, memory-mapped, so that millions of rows take no RAM.

`RowWriter` appends batches while rows are tokenized; `open_rows` maps the finished file through `datasets`.
A `PreparedSplit` is a choice of its rows: what the trainer, the evaluation and the self-check read.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from qlora.data.chat import TokenRow
from qlora.data.formats import Conversation, Message
from qlora.data.rewarded import RewardedRow
from qlora.errors import DataError, foreign_failures

if TYPE_CHECKING:
    import numpy

T = TypeVar("T")
_DIGEST_BYTES = 16
_ENCODER = json.JSONEncoder(ensure_ascii=False)


class Prompt(NamedTuple):
    """What an answer is generated from, and the answer that the row gives; `columns` of a row of grpo: all it has."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    expected: str
    columns: dict[str, Any] | None = None


class MadeRow(NamedTuple):
    """A row as it is stored. `ids`, `weights`: of 32 bits for each token; `prompt`: its `Prompt` as JSON, or ""."""

    ids: array[int]
    weights: array[float]
    prompt: str

    @classmethod
    def of(cls, row: TokenRow, conversation: Conversation) -> MadeRow:
        return cls(array("i", row.input_ids), array("f", row.loss_weights), _prompt_json(conversation))


class FlatRows(NamedTuple):
    """Rows of a split one behind the other: row `first + r` is `ids[starts[r]:starts[r + 1]]`, and so its weights."""

    first: int
    ids: Any  # int32 numpy array of all tokens
    weights: Any  # float32, as a target; 0 is not trained
    starts: Any  # int64, one more than there are rows


class RowLabels(NamedTuple):
    """Of A trained tokens: the likeliest tokens, int32 (A, K), -1 where there are fewer, and their log-probabilities,
    float16 (A, K), -inf there."""

    ids: numpy.ndarray
    logprobs: numpy.ndarray


class Preference(NamedTuple):
    """Of a split whose rows are answers to be compared (`judged_splits.py`).

    paired      rows 2i and 2i + 1 are the better and the worse answer to one question
    together    both may share a row of tensors
    reference   log-probability of each row's answer by the model as it was; None: not known, or not needed
    others      a split of as many rows: the questions with answers of other questions, for KTO
    """

    paired: bool
    together: bool = True
    reference: Sequence[float] | None = None
    others: PreparedSplit | None = None


LabelsOf = Callable[[int], RowLabels | None]  # of a row of a split; None for one that is trained on its tokens


@dataclass(frozen=True)
class PreparedSplit:
    """Rows to train on or to evaluate on.

    rows      random access to TokenRow; read from the disk, so look at `lengths` and `trained` where these are enough
    lengths   tokens of each row
    trained   trained tokens of each row
    wheres    `file:line` of each row
    sources   index of the row's source in [[data.train]] or [[data.eval]]
    prompts   JSON of each row's Prompt, "" for a row without a last answer in words
    labels    the labels of each row that are probabilities; None: every row is trained on its tokens
    preference  of answers to be compared; None: rows are learnt from by themselves
    """

    rows: Sequence[TokenRow]
    lengths: Sequence[int]
    trained: Sequence[int]
    wheres: Sequence[str]
    sources: Sequence[int]
    prompts: Sequence[str] = ()
    labels: LabelsOf | None = None
    preference: Preference | None = None

    def prompt(self, index: int) -> Prompt | None:
        """The row's last answer and what comes before it; None where there is none in words."""
        text = self.prompts[index] if self.prompts else ""
        try:
            return Prompt(**json.loads(text)) if text else None
        except (ValueError, TypeError, RecursionError) as error:  # too many to be looked at when the file is opened
            what = f"{self.wheres[index]}: its prompt in the cache of tokenized rows cannot be read"
            raise DataError(what, "remove that cache (QLORA_CACHE, or qlora in your cache folder)") from error

    def flat(self, rows: int) -> Iterator[FlatRows]:
        """All rows in their order, `rows` at a time: for what looks at every token."""
        assert isinstance(self.rows, _Chosen)  # rows of a file
        for start in range(0, len(self.rows), rows):
            yield self.rows.flat(start, min(start + rows, len(self.rows)))

    def first_above(self, highest: int) -> tuple[str, int] | None:
        """`file:line` of the first row that has a token above `highest`, and the token."""
        if isinstance(self.rows, _Chosen) and self.rows.highest("input_ids") <= highest:
            return None
        for where, row in zip(self.wheres, self.rows, strict=True):
            if (token := max(row.input_ids)) > highest:
                return where, token
        return None


def _schema() -> Any:
    import pyarrow

    number = pyarrow.int32()
    return pyarrow.schema(
        {
            "input_ids": pyarrow.list_(number),
            "loss_weights": pyarrow.list_(pyarrow.float32()),
            "length": number,
            "trained": number,
            "source": number,
            "where": pyarrow.string(),
            "prompt": pyarrow.large_string(),
            "digest": pyarrow.binary(_DIGEST_BYTES),
        }
    )


class RowWriter:
    """Writes rows into an Arrow stream, a batch at a time. A context manager: the file is whole when it closes."""

    def __init__(self, path: Path) -> None:
        self._schema = _schema()
        self._path = path
        self._content = hashlib.sha256()

    def __enter__(self) -> RowWriter:
        import pyarrow

        self._stream = pyarrow.ipc.new_stream(str(self._path), self._schema)
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def write(self, batch: Sequence[tuple[MadeRow, str, int]]) -> None:
        """Append (row, its `file:line`, index of its source)."""
        import numpy
        import pyarrow

        rows = [row for row, _, _ in batch]
        ids, weights = (numpy.concatenate([row[part] for row in rows]) for part in (0, 1))
        wide, lengths = ids.astype(numpy.int64), [len(row.ids) for row in rows]
        ends = numpy.cumsum([0, *lengths], dtype=numpy.int32)
        digests = []
        for start, end in pairwise(ends):
            tokens = wide[start:end].tobytes()
            self._content.update(len(tokens).to_bytes(8, "little") + tokens)
            self._content.update(weights[start:end].tobytes())
            digests.append(hashlib.sha256(tokens).digest()[:_DIGEST_BYTES])
        columns = {
            "input_ids": pyarrow.ListArray.from_arrays(ends, ids),
            "loss_weights": pyarrow.ListArray.from_arrays(ends, weights),
            "length": lengths,
            "trained": numpy.add.reduceat(weights != 0, ends[:-1], dtype=numpy.int32),
            "source": [source for _, _, source in batch],
            "where": [where for _, where, _ in batch],
            "prompt": [row.prompt for row in rows],
            "digest": digests,
        }
        self._stream.write_batch(pyarrow.record_batch(columns, schema=self._schema))

    def content_sha256(self) -> str:
        """Of all tokens and weights written so far, in their order."""
        return self._content.hexdigest()


@dataclass(frozen=True)
class StoredRows:
    """An opened file of rows. Rows with equal tokens have equal `digests`; `tokens_sha256` is the RowWriter's."""

    dataset: Any
    digests: list[bytes]
    tokens_sha256: str

    def content_sha256(self, held_out: str) -> str:
        """Of all tokens and weights, the source of each row, and what `held_out` says of the split."""
        sources = json.dumps(self.dataset.data.table.column("source").to_pylist())
        return hashlib.sha256(f"{self.tokens_sha256} {sources} {held_out}".encode("utf-8", "surrogatepass")).hexdigest()

    def hold_out(self, fraction: float, seed: int) -> tuple[list[int], list[int]]:
        """Indices (held out, kept). Rows of equal tokens stay together, and those of one conversation, in the order of
        a hash of seed and tokens."""
        import numpy

        digests, conversations = self.digests, self._conversations()
        wanted = min(len(digests) - 1, max(1, round(fraction * len(digests)))) if fraction else 0
        if wanted < 1:
            return [], [*range(len(digests))]
        firsts, several = _together(digests, conversations)
        start = seed.to_bytes(8, "little")
        drawn = b"".join(hashlib.sha256(start + digests[first]).digest() for first in firsts)
        held_out: list[int] = []
        for at in numpy.frombuffer(drawn, dtype="S32").argsort(kind="stable").tolist():
            rows = several.get(firsts[at]) or (firsts[at],)
            if len(held_out) + len(rows) <= wanted:
                held_out += rows
                if len(held_out) == wanted:
                    break
        if not held_out:  # every row has more copies than are wanted
            smallest = min((several[first] for first in firsts), key=len)
            of_one = [row for row in smallest if conversations[row] == conversations[smallest[0]]]
            held_out = smallest if len(firsts) > 1 else of_one if len(of_one) < len(smallest) else []
        kept = numpy.ones(len(digests), dtype=bool)
        kept[held_out] = False
        return sorted(held_out), kept.nonzero()[0].tolist()

    def _conversations(self) -> Sequence[int]:
        """A number for each row, which the rows of one conversation share: they stand together, at one place."""
        import numpy
        from pyarrow import compute

        table = self.dataset.data.table
        if len(self.digests) < 2:
            return range(len(self.digests))
        same = [
            compute.equal(column.slice(1), column.slice(0, len(column) - 1)).to_numpy(zero_copy_only=False)
            for column in (table["where"].combine_chunks(), table["source"].combine_chunks())
        ]
        others = numpy.cumsum(~(same[0] & same[1]), dtype=numpy.int64)
        return array("q", numpy.concatenate(([0], others)).tobytes())

    def split(self, chosen: Sequence[int] | None = None) -> PreparedSplit:
        """All rows, or the chosen ones in the order given."""
        indices = range(len(self.digests)) if chosen is None else chosen
        columns = self.dataset.data.table

        def numbers(name: str) -> array[int]:
            values = columns.column(name).to_numpy()
            return array("q", (values if chosen is None else values[chosen]).astype("int64").tobytes())

        return PreparedSplit(
            rows=_Chosen(self.dataset, ["input_ids", "loss_weights"], indices, TokenRow),
            lengths=numbers("length"),
            trained=numbers("trained"),
            wheres=_Chosen(self.dataset, ["where"], indices, str),
            sources=numbers("source"),
            prompts=_Chosen(self.dataset, ["prompt"], indices, str),
        )


def _together(digests: Sequence[bytes], conversations: Sequence[int]) -> tuple[list[int], dict[int, list[int]]]:
    """Rows that no split may part are a group: the first row of each, in order; and all rows of those with several.

    Of a million rows nearly all stand alone, and a list for each would take more memory than all else.
    """
    import numpy

    shared = numpy.zeros(len(digests), dtype=bool)
    for keys in (numpy.frombuffer(b"".join(digests), dtype=f"S{_DIGEST_BYTES}"), numpy.asarray(conversations)):
        _, number, count = numpy.unique(keys, return_inverse=True, return_counts=True)
        shared |= count[number] > 1
    groups: list[list[int]] = []
    at: dict[bytes | int, int] = {}  # the group of a digest, and of a conversation
    for row in shared.nonzero()[0].tolist():
        of_row = digests[row], conversations[row]
        found = sorted({at[key] for key in of_row if key in at})
        group = found[0] if found else len(groups)
        if not found:
            groups.append([])
        for other in found[1:]:  # this row joins two groups
            groups[group] += groups[other]
            for member in groups[other]:
                at[digests[member]] = at[conversations[member]] = group
            groups[other] = []
        groups[group].append(row)
        at.update(dict.fromkeys(of_row, group))
    several = {rows[0]: rows for rows in map(sorted, groups) if rows}
    for rows in several.values():
        shared[rows[0]] = False
    return (~shared).nonzero()[0].tolist(), several


def open_rows(path: Path, tokens_sha256: str, highest_id: int | None = None) -> StoredRows:
    """Map a file that a RowWriter wrote, whose `content_sha256` was `tokens_sha256`.

    Raises ValueError when it is none, or has a token above `highest_id`: a file is only what somebody left there.
    """
    import datasets

    with foreign_failures() as failure:
        # Opened as it lies, with nothing to download, convert or copy: there is no bar to draw.
        dataset = datasets.Dataset.from_file(str(path))
        _check_table(dataset.data.table, highest_id)
    if failure.error:
        raise ValueError(f"{path.name}: {failure.reason}") from failure.error
    return StoredRows(dataset, dataset.data.table.column("digest").to_pylist(), tokens_sha256)


def _check_table(table: Any, highest_id: int | None) -> None:
    """Raises ValueError, or what pyarrow raises, unless the columns are a RowWriter's and fit to each other."""
    from pyarrow import compute

    if not table.schema.equals(_schema()):
        raise ValueError("its columns are not those of rows of tokens")
    table.validate(full=True)
    if any(column.null_count for column in table.columns) or not table.num_rows:
        raise ValueError("it has no rows, or rows without a value")
    lengths = table["length"]
    for name in ("input_ids", "loss_weights"):
        if compute.list_flatten(table[name]).null_count or compute.list_value_length(table[name]) != lengths:
            raise ValueError(f"{name} do not have the length that stands beside them")
    if compute.min(lengths).as_py() < 1 or compute.min(table["source"]).as_py() < 0:
        raise ValueError("a row without a token or a source")
    ids = compute.min_max(compute.list_flatten(table["input_ids"])).as_py()
    if ids["min"] < 0 or (highest_id is not None and ids["max"] > highest_id):
        raise ValueError(f"token {max(ids['max'], ids['min'])} is none of the tokenizer's")


class _Chosen(Sequence[T]):
    """The chosen rows of some columns, each made by `make` of its values when it is asked for."""

    def __init__(self, dataset: Any, columns: list[str], indices: Sequence[int], make: Callable[..., T]) -> None:
        self._rows = dataset.select_columns(columns)
        self._indices = indices
        self._make = make

    def __len__(self) -> int:
        return len(self._indices)

    def flat(self, start: int, stop: int) -> FlatRows:
        """Rows `start` to `stop` (of TokenRow) as they lie in the file, without a Python number a token."""
        import numpy
        from pyarrow import compute

        wanted = numpy.asarray(self._indices[start:stop], dtype=numpy.int64)
        first = int(wanted.min())
        few = self._rows.data.table.slice(first, int(wanted.max()) - first + 1).take(wanted - first)
        ids, weights = (compute.list_flatten(few.column(name)).to_numpy() for name in ("input_ids", "loss_weights"))
        lengths = compute.list_value_length(few.column("input_ids")).to_numpy()
        return FlatRows(start, ids, weights, numpy.concatenate([[0], numpy.cumsum(lengths, dtype=numpy.int64)]))

    def highest(self, column: str) -> int:
        """The highest number in a column of lists, over all rows of the file; -1 where there is none."""
        from pyarrow import compute

        chunks = self._rows.data.table.column(column).chunks
        return max((compute.max(chunk.flatten()).as_py() for chunk in chunks if len(chunk)), default=-1)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        return self._make(*self._rows[self._indices[index]].values())


def _prompt_json(conversation: Conversation) -> str:
    """The last assistant message and what comes before it, when it is trained and made of words alone."""
    messages = conversation.messages
    last = next((at for at in reversed(range(len(messages))) if messages[at]["role"] == "assistant"), 0)
    if not last or "tool_calls" in messages[last] or not messages[last].get("train", True):
        return ""
    prompt = Prompt(list(messages[:last]), list(conversation.tools or ()) or None, messages[last]["content"])
    values = prompt._asdict()
    if isinstance(conversation, RewardedRow):
        return _ENCODER.encode({**values, "columns": dict(conversation.columns)})
    del values["columns"]  # which caches of other rows never had
    return _ENCODER.encode(values)
