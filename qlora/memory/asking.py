"""What a study, an exam and a drawing take: prompts that begin alike, keys and values once a row, and scored answers.

As `study/generation.py` does it: the shared beginning of one row is kept beside its copies, the rest of every row is
read at once, and each token more has its keys and values laid out anew, a layer at a time. The estimate computes it on
meta; a run that draws answers does the same once, where its model is, before it begins.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora.model.generate import forward_parameters, keeps_keys_alone, name_of_cache
from qlora.model.sampled import chosen_of
from qlora.model.weight_receiving import device_of

LIKELIEST = 64  # of a token's log-probabilities that are looked at
TEMPERATURE = 0.5  # any: what is divided takes as much


class Asked(NamedTuple):
    """One batch, in tokens: `rows` prompts that share `shared` tokens, have `own` apart, and are answered with `new`.

    With `scored`, answers of `new` tokens are read in place of being written, and so many logits of a row are kept.
    `drawn`, where it is not 0: each token is drawn from all that there are (`model/sampled.py`), as GRPO does.
    """

    rows: int
    shared: int
    own: int
    new: int
    scored: int = 0
    drawn: int = 0


Asks = tuple[tuple[str, tuple[Asked, ...]], ...]  # of each phase, the batches that may be its largest
PlainAsks = Sequence[tuple[str, Sequence[tuple[int, ...]]]]  # the same in plain numbers: see `study/room.py`


def as_asked(plain: PlainAsks) -> Asks:
    return tuple((phase, tuple(Asked(*one) for one in batches)) for phase, batches in plain)


def halved(asks: Asks) -> Asks:
    """With half of the rows, as a study goes on where memory runs out."""
    return tuple((phase, tuple(map(half, batches))) for phase, batches in asks)


def half(asked: Asked) -> Asked:
    return asked._replace(rows=max(1, asked.rows // 2))


def most_rows(asks: Asks) -> int:
    return max((one.rows for _, batches in asks for one in batches), default=1)


def ask(model: Any, asked: Asked) -> None:
    """Computes one batch of any tokens; `model` is in evaluation mode, without gradients."""
    alone = name_of_cache(model) == "state"  # a recurrent state reads padding: row by row
    if alone:
        asked = asked._replace(rows=1, shared=0, own=asked.shared + asked.own)
    if asked.scored:
        _score(model, asked)
    else:
        _write(model, asked)


def _score(model: Any, asked: Asked) -> None:
    length = asked.shared + asked.own + asked.new
    output = _read(model, asked.rows, length, length, None, asked.scored)
    output.logits[0, -asked.scored :].float().log_softmax(dim=-1)


def _write(model: Any, asked: Asked) -> None:
    length, rows, name = asked.shared + asked.own, asked.rows, name_of_cache(model)
    beginning, cache, known = None, None, 0
    if asked.shared and rows > 1:
        beginning = _read(model, 1, asked.shared, asked.shared, None, 1).get(name)
        if keeps_keys_alone(beginning):
            cache, known = copy.deepcopy(beginning), asked.shared
            cache.batch_repeat_interleave(rows)
    output = _read(model, rows, length - known, length, cache, 1)
    _next(output.logits, asked)
    cache = output.get(name)
    if not keeps_keys_alone(cache):  # its own kind of memory: as long as it will be, at once
        return
    for layer in cache.layers:
        more = _more(layer, asked.new - 1)
        longer = [torch.cat((one, one[:, :, :1].expand(-1, -1, more, -1)), 2) for one in _kept(layer)]
        layer.keys, layer.values = longer
    _next(_read(model, rows, 1, length + asked.new, cache, 1).logits, asked)
    del beginning, output  # which live until here, as in the loop that writes


def _more(layer: Any, tokens: int) -> int:
    """By how many keys a layer grows with so many tokens: a window keeps what it sees of them, and counts all."""
    if not getattr(layer, "is_sliding", False):
        return tokens
    layer.cumulative_length += tokens
    return max(0, min(tokens, int(layer.sliding_window) - 1 - int(layer.keys.shape[2])))


def _kept(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.keys, layer.values


def _next(logits_BSV: Tensor, asked: Asked) -> None:
    if asked.drawn:
        numbers_B1 = torch.zeros(asked.rows, 1, dtype=torch.int64, device=logits_BSV.device)
        chosen_of(logits_BSV[:, -1], numbers_B1, TEMPERATURE)
        return
    logprobs_BV = logits_BSV[:, -1].float().log_softmax(dim=-1)
    logprobs_BV.topk(min(LIKELIEST, logprobs_BV.shape[1]), dim=-1)


def _read(model: Any, rows: int, tokens: int, seen: int, cache: Any, kept: int) -> Any:
    """`tokens` new ones of each row, `seen` with those of the cache; logits of the last `kept` where it can be said."""
    ids_BS = torch.zeros(rows, tokens, dtype=torch.int64, device=device_of(model))
    mask_BS = torch.ones(rows, seen, dtype=torch.int64, device=ids_BS.device)
    last = {"logits_to_keep": kept} if "logits_to_keep" in forward_parameters(model) else {}
    given = {} if cache is None else {name_of_cache(model): cache}
    uses = kept == 1
    positions_BS = torch.zeros_like(mask_BS)[:, -tokens:]  # as counted from the mask, of which it stays a part
    return model(input_ids=ids_BS, attention_mask=mask_BS, position_ids=positions_BS, use_cache=uses, **given, **last)
