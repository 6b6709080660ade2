"""What tells a layer's attention which tokens belong together: facts of the micro-batch, and no S × S tensor.

transformers asks a registered function for the mask of each kind of layer. Ours answers with a `DocumentMask` where the
attention that is registered beside it can work from where documents begin; it goes to the layers as a mask would, and
so to the layers that a backward pass computes anew (in another thread, where no context of the forward pass is known).
The one thing that transformers reads back from the device on the way, whether a row holds several documents, is
answered from the micro-batch too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qlora.batch import Batch
from qlora.forward_facts import of_forward


@dataclass(frozen=True, eq=False)
class DocumentMask:
    """Causal within each document of `batch`; `window`: of the tokens before a token, itself included, only so many."""

    batch: Batch
    window: int | None = None

    def as_tensor(self) -> Tensor:
        """The same as a boolean mask (B, 1, S, S), true where a query (third) sees a key (fourth)."""
        positions_BS, documents_BS = self.batch.position_ids_BS, self.batch.document_ids_BS
        queries, keys = positions_BS[:, None, :, None], positions_BS[:, None, None, :]
        seen = (keys <= queries) & (documents_BS[:, None, :, None] == documents_BS[:, None, None, :])
        return seen if self.window is None else seen & (keys > queries - self.window)


def by_documents(**asked: Any) -> DocumentMask | Tensor | None:
    """The mask that transformers asks for (as `masking_utils.sdpa_mask` takes it): by documents where it is only that.

    Outside a training forward, with a mask of the caller's own or a pattern that is neither causal nor a window, it is
    sdpa's.
    """
    from transformers.masking_utils import sdpa_mask

    batch = of_forward()
    if batch is None or not _is_plain(asked, batch):
        return sdpa_mask(**asked)  # type: ignore[no-any-return]
    return DocumentMask(batch, asked.get("local_size"))


def _is_plain(asked: dict[str, Any], batch: Batch) -> bool:
    config, local, (rows, length) = asked.get("config"), asked.get("local_size"), batch.input_ids_BS.shape
    shape = (asked["batch_size"], asked["q_length"], asked["kv_length"])
    own = asked.get("attention_mask") is not None or asked.get("use_vmap") or "allow_is_bidirectional_skip" in asked
    offset = any(not isinstance(at, int) or at for at in (asked.get("q_offset", 0), asked.get("kv_offset", 0)))
    chunks = getattr(config, "attention_chunk_size", None) is not None
    window = local in (None, getattr(config, "sliding_window", None))
    return shape == (rows, length, length) and window and not (own or offset or chunks)


def answer_from_the_batch() -> None:
    """Have transformers learn from the micro-batch which documents a row holds, where it would read it back.

    `masking_utils.find_packed_sequence_indices` is what asks; a version without it is left as it is.
    """
    from transformers import masking_utils

    asks = getattr(masking_utils, "find_packed_sequence_indices", None)
    if asks is None or getattr(asks, "from_the_batch", False):
        return

    def documents_of(position_ids: Tensor) -> Tensor | None:
        batch = of_forward(position_ids)
        if batch is None:
            return asks(position_ids)  # type: ignore[no-any-return]
        return None if batch.single else batch.document_ids_BS

    documents_of.from_the_batch = True  # type: ignore[attr-defined]
    masking_utils.find_packed_sequence_indices = documents_of
