"""The evaluation loss that a run delivered with its adapter: what qlora.json says of it, and older runs' events."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from qlora import files, foreign_json
from qlora.errors import ExportError
from qlora.model.adapter_folder import PROVENANCE_FILE

KEY = "evaluation"  # in qlora.json
_MOST = 2**53
_Count = Annotated[int, Field(ge=1, le=_MOST)]


class DeliveredLoss(foreign_json.ForeignModel):
    """What a run measured of the adapter that it delivers. Losses are means over trained tokens, in nats.

    loss           over all evaluation rows, as the run's `eval` event and the card say it
    sample_loss    over every `every`-th micro-batch of `packs_at_once` packs: what an export measures again
    sample_rows    rows of the sample, with `sample_tokens` trained tokens
    packing        whether rows shared packs
    content        sha256 of the sample's tokens and weights; None where an older version kept none
    """

    step: Annotated[int, Field(ge=0, le=_MOST)]
    loss: float
    sample_loss: float
    sample_rows: _Count
    sample_tokens: _Count
    every: _Count
    packs_at_once: _Count
    packing: bool
    content: Annotated[str, Field(max_length=64)] | None = None


def read(adapter_dir: Path) -> tuple[DeliveredLoss | None, bool]:
    """What an adapter's qlora.json says of its loss; and whether an older version wrote it, which recorded none.

    Raises ExportError for what no version wrote.
    """
    try:
        file = files.inside(adapter_dir, PROVENANCE_FILE)
        if not file.is_file():
            return None, False  # made elsewhere
        content = foreign_json.load_object(file)
        if content.get(KEY) is None:
            return None, KEY not in content
        return foreign_json.checked(DeliveredLoss, content[KEY], f"{file}: {KEY}"), False
    except (foreign_json.ForeignFileError, files.UnsafePathError) as error:
        raise ExportError(str(error), "let the run deliver its adapter again, or get a clean copy of it") from error


def of_older_run(events: Sequence[Any], step: int, rows: Sequence[int], packing: bool) -> DeliveredLoss | None:
    """What the events of a run say of the adapter of `step`; None where they do not say it, or say two things.

    `rows` are the trained tokens of each evaluation row.
    """
    losses = {
        event["loss"]
        for event in events
        if isinstance(event, Mapping)
        and isinstance(event.get("loss"), float)
        and (event.get("event"), event.get("step"), event.get("rows")) == ("eval", step, len(rows))
    }
    (loss,) = losses if len(losses) == 1 else (None,)
    if loss is None or not math.isfinite(loss) or not sum(rows):
        return None
    return DeliveredLoss(
        step=step,
        loss=loss,
        sample_loss=loss,
        sample_rows=len(rows),
        sample_tokens=sum(rows),
        every=1,
        packs_at_once=1,
        packing=packing,
    )
