"""The one value that walks from `data/` through `training/` into `step/`: a micro-batch.

Shape suffixes here and in `step/`: B rows of the micro-batch, S positions of a row, N = B·S flattened, T trained
positions of the N, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Batch:
    """Rows of packed documents, already shifted: `targets_BS[b, s]` is the token that follows position s.

    input_ids_BS       int64
    position_ids_BS    int64, restarts at 0 with each document, which isolates it (qlora/README.md, packed documents)
    document_ids_BS    int64, number of the document in its row; padding is a document of its own
    targets_BS         int64, the next token of the same document (0 where there is none: its weight is 0)
    loss_weights_BS    float32, weight of the target's loss; 0.0 where it is not trained
    trained_T          int64, places in the flattened N whose weight is not 0. Made on the host with the rest, so
                       that the step asks the device nothing; only these positions ever go through the head.
    cu_seqlens         int32, where documents begin in the flattened N, and N itself (the name that attention kernels
                       give it): padding belongs to the last document of its row. None: not known
    document_lengths   the same on the host, as lengths
    label_ids_TK       int64, and label_logprobs_TK, fp32: for each trained place the likeliest tokens and what they are
                       to have, -inf where there are fewer than K (`data/label_rows.py`). None: its target alone
    host_ids_BS        input_ids_BS where they were before they were moved, for embeddings that are looked up there
    answer_T           int64, of objectives of preference: for each trained place the number of its answer among the
                       R of the micro-batch, whose signs_R are 1 (better, good) or -1, and whose log-probabilities by
                       the model as it was are reference_R, both fp32 (`data/judged_splits.py`)
    drawn_KT           fp32, of answers that the model has drawn: what is known of each trained token of them, a row
                       each (`step/group_relative.py`)
    paired             whether these are pairs: answers 2i and 2i + 1 are the better and the worse one to a question
    others             on the host: what the objective asks about beside it
    single             whether each row is one document by its positions, so that no mask has to keep documents apart
    """

    input_ids_BS: torch.Tensor
    position_ids_BS: torch.Tensor
    document_ids_BS: torch.Tensor
    targets_BS: torch.Tensor
    loss_weights_BS: torch.Tensor
    trained_T: torch.Tensor
    cu_seqlens: torch.Tensor | None = None
    document_lengths: tuple[int, ...] = ()
    single: bool = False
    label_ids_TK: torch.Tensor | None = None
    label_logprobs_TK: torch.Tensor | None = None
    host_ids_BS: torch.Tensor | None = None
    answer_T: torch.Tensor | None = None
    signs_R: torch.Tensor | None = None
    reference_R: torch.Tensor | None = None
    drawn_KT: torch.Tensor | None = None
    paired: bool = False
    others: tuple[Batch, ...] = ()

    @property
    def max_document(self) -> int:
        return max(self.document_lengths, default=0)

    @property
    def rows(self) -> int:
        return int(self.input_ids_BS.shape[0])

    @property
    def tokens(self) -> int:
        """All positions, padding included: what the forward pass computes."""
        return int(self.input_ids_BS.numel())

    def to(self, device: torch.device) -> Batch:
        moved = (getattr(self, field.name) for field in fields(self))
        placed = Batch(*(value.to(device, non_blocking=True) if hasattr(value, "to") else value for value in moved))
        return replace(placed, host_ids_BS=self.input_ids_BS)
