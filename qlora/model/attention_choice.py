"""Which kernel a model attends with: chosen once, by a small trial on the device that will compute.

By default a GPU takes the first of `varlen` and `efficient` (`flex` for a model that caps its scores) that passes: a
forward and a backward pass over three short documents with the model's own heads and, where it has windows, a window,
against the documents one by one on the CPU; then the whole model's hidden states against those with today's mask.
What passes none keeps the mask. A CPU takes the documents one by one, but for mixtures and models with caps or sinks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from qlora import numerics
from qlora.batch import Batch
from qlora.device import computes_bf16, is_card
from qlora.errors import ModelError, foreign_failures
from qlora.events import Notice, Sink
from qlora.forward_facts import in_forward
from qlora.model import sink_attention
from qlora.model.attention import NAME, SINKS, name_of
from qlora.model.document_attention import HEAD_DIM_MULTIPLE, KERNELS, MOST_HEAD_DIM, Kernel, has_varlen, one_by_one
from qlora.model.document_mask import DocumentMask
from qlora.model.mixtures import speaks_of_experts
from qlora.model.sink_attention import SinkKernel, by_definition, has_sinks

# Documents of the trial: of more and of less than a block of 128, and shorter than WINDOW. Together two such blocks:
# with fewer than 128 queries flex_attention takes another kernel (flex_decoding) than the one that trains.
LENGTHS = (150, 90, 16)
FEW = (24, 13, 11)  # of a whole model that a CPU computes: of 135M two passes over 256 tokens take it a second
WINDOW = 48
# Relative to the norm of what is right. bf16 has 8 bits: one product of 256 tokens is off by 0.004, a model's hidden
# states by 0.01 to 0.03; a token too many or too few in a window, or of another document, by 0.1 to 1.
KERNEL_TOLERANCE, MODEL_TOLERANCE = 0.03, 0.1


@dataclass(frozen=True)
class Heads:
    """What of a model decides whether a kernel takes it."""

    query: int
    key: int
    width: int
    windowed: bool
    softcap: float | None
    sinks: bool = False


def choose(
    config: Any, name: str, wanted: str, device: torch.device, recorded: str | None = None
) -> tuple[str | None, str]:
    """The kernel with which a model of `config` attends on `device`; or None, for the mask, and why.

    `name` is under which it attends with its mask, `wanted` is `model.attention`, and `recorded` the name under which
    a run that goes on has attended: it does so again if that passes its trial. Raises ModelError where "varlen" is
    asked for and nothing passes.
    """
    lacks: list[str] = []
    for kernel in passing(config, name, wanted, device, recorded, lacks):
        return kernel, ""
    if wanted == "varlen":
        raise _impossible("; ".join(lacks))
    return None, "; ".join(lacks)


def passing(
    config: Any, name: str, wanted: str, device: torch.device, recorded: str | None, lacks: list[str]
) -> Iterator[str]:
    """The kernels that pass their trial, the first that `choose` names first; why the others don't goes to `lacks`."""
    if wanted not in ("auto", "varlen"):
        return
    lack = lack_of(config, name)
    if not is_card(device) and wanted == "auto":
        lack = lack or _lack_on_cpu(config)
    if wanted == "auto" and recorded == name:
        lacks.append(lack or "no kernel passed its trial when this run began")
        return
    lacks += [lack] if lack else []
    # What stands in for a card is one to "auto": it tries a card's kernels, and has none.
    alone = not is_card(device) or (wanted == "varlen" and _has_no_kernels(device))
    found = () if lack else candidates(config, one_by_one=alone)
    before = [kernel for kernel in found if name_of(kernel) == recorded]
    for kernel in dict.fromkeys([*before, *found]):
        if lack := tried(kernel, heads_of(config), device):
            lacks.append(lack)
        else:
            yield kernel


def settle(model: Any, wanted: str, device: torch.device, sink: Sink) -> None:
    """Gives a loaded model, on `device`, the first kernel that passes its trial and with which the model is right.

    A run takes what was decided when it began. Raises ModelError where "varlen" is asked for and cannot be had.
    """
    _settle_sinks(model, device, sink)
    run, name = numerics.of_run(), today(model)
    lacks: list[str] = []
    recorded, taken = run.attention if run else None, False
    for kernel in passing(model.config.get_text_config(), name, wanted, device, recorded, lacks):
        lack = _differs(model, kernel, (name, name_of(kernel)), device)
        if not lack:
            model.config._attn_implementation, taken = name_of(kernel), True
            break
        lacks.append(lack)
    if wanted == "varlen" and not taken:
        raise _impossible("; ".join(lacks))
    if run is not None:
        numerics.correct(run.model_copy(update={"attention": today(model)}))
    if lacks and not taken and is_card(device):
        sink.emit(Notice("attention", f"packed documents are kept apart by a mask of S × S: {'; '.join(lacks)}"))
    if wanted == "auto" and today(model) == "eager":
        sink.emit(Notice("attention", "eager attention is used: sdpa cannot compute this model's attention"))


def _impossible(lack: str) -> ModelError:
    return ModelError(f'model.attention = "varlen" is not possible here: {lack}', 'use "auto" or "eager"')


def _has_no_kernels(device: torch.device) -> bool:
    """Whether what lies on `device` is computed by the CPU: it is one, or stands in for a card."""
    return torch.empty(0, device=device).is_cpu


def today(model: Any) -> str:
    return str(model.config._attn_implementation)


def assumed(
    config: Any, name: str, wanted: str, capability: int, windows: bool = sys.platform == "win32"
) -> str | None:
    """The kernel that a GPU of that compute capability (86 is 8.6) takes, before it is tried; None: the mask.

    `name` is under which the model attends now, `windows` whether it computes under native Windows.
    """
    if wanted not in ("auto", "varlen") or lack_of(config, name):
        return None
    found = candidates(config, one_by_one=False)
    has_flash = capability >= 80 and not windows and has_varlen()
    return next((kernel for kernel in found if kernel != "varlen" or has_flash), None)


def assumed_on_cpu(config: Any, name: str, wanted: str) -> str | None:
    """The kernel that a CPU takes, before it is tried; None: the mask."""
    if wanted not in ("auto", "varlen") or lack_of(config, name) or (wanted == "auto" and _lack_on_cpu(config)):
        return None
    return candidates(config, one_by_one=True)[0]


def lack_of(config: Any, name: str) -> str:
    """Why a model that attends under that name keeps its mask; "" where a kernel may be tried."""
    if not getattr(config, "num_attention_heads", None):
        return "it has no heads that attend"
    heads = heads_of(config)
    if not name.startswith((NAME, SINKS)) and (name != "eager" or heads.softcap is None):
        return f"transformers computes its attention by {name} alone"
    if getattr(config, "attention_chunk_size", None) is not None or getattr(config, "is_causal", True) is False:
        return "its mask is more than documents and windows"
    if getattr(config, "attention_dropout", 0.0) or getattr(config, "attention_probs_dropout_prob", 0.0):
        return "it drops attention while training"
    if heads.width > MOST_HEAD_DIM or heads.width % HEAD_DIM_MULTIPLE:
        return f"its heads are {heads.width} wide"
    return ""


def _lack_on_cpu(config: Any) -> str:
    """What the kernel of a CPU does not compute, and mixtures: two passes to try it would take the memory of many
    experts at once while the model is loaded. Masks then stay."""
    heads = heads_of(config)
    if heads.softcap is not None or heads.sinks:
        return "its scores are capped, or have sinks"
    return "it is a mixture" if speaks_of_experts(config.to_dict()) else ""


def heads_of(config: Any) -> Heads:
    known = vars(config)
    query = int(config.num_attention_heads)
    key = known.get("num_key_value_heads") or query
    width = known.get("head_dim") or int(config.hidden_size) // query
    windowed = known.get("sliding_window") is not None
    return Heads(query, int(key), int(width), windowed, known.get("attn_logit_softcapping"), has_sinks(config))


def candidates(config: Any, one_by_one: bool) -> Sequence[str]:
    """Kernels to try, the best first; `one_by_one` is for a device that has none of its own."""
    if one_by_one:
        return ("one by one",)
    return ("varlen", "efficient") if heads_of(config).softcap is None else ("flex",)


def tried(kernel: str, heads: Heads, device: torch.device) -> str:
    """Why a kernel is not taken on the device; "" where its output and gradients are right."""
    with foreign_failures(trial=True) as failure:
        worst = _worst((sink_attention.KERNELS if heads.sinks else KERNELS)[kernel], heads, device)
    if failure.error:
        return f"{kernel}: {failure.reason[:120]}"
    return "" if worst <= KERNEL_TOLERANCE else f"{kernel}: off by {worst:.2f} in a trial"


@lru_cache(64)  # which keeps no error: memory that ran out may be there again at the next run
def _worst(attend: Kernel | SinkKernel, heads: Heads, device: torch.device) -> float:
    """How far output and gradients are from what is right, at most; not a number where one of them is none."""
    batch = trial_batch(vocabulary=2)
    generator = torch.Generator().manual_seed(0)
    counts = (heads.query, heads.key, heads.key, heads.query)
    drawn = [torch.randn(1, count, sum(LENGTHS), heads.width, generator=generator) for count in counts]
    there = [one.to(device, torch.bfloat16 if computes_bf16(device) else torch.float16) for one in drawn]
    apart = []
    reference: Any = by_definition if heads.sinks else one_by_one
    more = torch.randn(heads.query, generator=generator) if heads.sinks else heads.softcap
    for window in (None, WINDOW) if heads.windowed else (None,):
        right = _pass(reference, drawn, DocumentMask(batch, window), more)
        there_too = more.to(there[0]) if isinstance(more, Tensor) else more
        found = _pass(attend, there, DocumentMask(batch.to(device), window), there_too)
        apart += [_relative(one, other) for one, other in zip(found, right, strict=True)]
    return float(torch.tensor(apart).max())  # Python's `max` passes over what is not a number


def _pass(attend: Any, drawn: Sequence[Tensor], mask: DocumentMask, more: float | Tensor | None) -> list[Tensor]:
    """Output and gradients of query, key and value, for a gradient of the output that is drawn too; `more` are sinks,
    or the cap of scores."""
    query, key, value = (one.detach().requires_grad_() for one in drawn[:3])
    with torch.enable_grad():
        output = attend(query, key, value, mask, None, more)
        gradients = torch.autograd.grad(output, (query, key, value), drawn[3].transpose(1, 2))
    return [output.detach(), *gradients]


def _relative(found: Tensor, right: Tensor) -> float:
    right = right.double().cpu()
    return float((found.double().cpu() - right).norm() / right.norm())


def trial_batch(vocabulary: int, lengths: tuple[int, ...] = LENGTHS) -> Batch:
    """One row of documents, three by default, whose last tokens are not trained."""
    ids_BS = (torch.arange(sum(lengths)) * 7 % vocabulary)[None]
    positions_BS = torch.cat([torch.arange(length) for length in lengths])[None]
    documents_BS = torch.cat([torch.full((length,), number) for number, length in enumerate(lengths)])[None]
    starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    weights_BS = torch.ones(ids_BS.shape)
    trained_T = torch.arange(ids_BS.numel())
    return Batch(ids_BS, positions_BS, documents_BS, ids_BS.roll(-1, 1), weights_BS, trained_T, starts, lengths)


def _settle_sinks(model: Any, device: torch.device, sink: Sink) -> None:
    """Has a model with sinks attend as transformers' own code does, where ours is not the same on this device."""
    if today(model) != SINKS:
        return
    if lack := _differs(model, "sinks beside a kernel", ("eager", SINKS), device):
        model.config._attn_implementation = "eager"
        sink.emit(Notice("attention", f"eager attention is used, with scores of heads * S * S: {lack}"))


def _differs(model: Any, kernel: str, names: tuple[str, str], device: torch.device) -> str:
    """Why the model's hidden states with a kernel, under the second name, are not those under the first; "" where they
    are."""
    config = model.config.get_text_config()
    # Of a mixture's few tokens one that rounding sends to another expert would be much.
    is_quick = _has_no_kernels(device) and not speaks_of_experts(config.to_dict())
    lengths: tuple[int, ...] = FEW if is_quick else LENGTHS
    # gpt-oss' own masks know nothing of documents (modeling_gpt_oss.py hands no positions on): its rows are one each.
    lengths = (sum(lengths),) if has_sinks(config) else lengths
    batch = trial_batch(int(config.vocab_size), lengths).to(device)
    named = {"position_ids": batch.position_ids_BS, "attention_mask": None, "use_cache": False}
    with foreign_failures(trial=True) as failure, torch.no_grad(), in_forward(batch):
        with attending(model, names[0]):
            right = model.base_model(input_ids=batch.input_ids_BS, **named).last_hidden_state
        with attending(model, names[1]):
            found = model.base_model(input_ids=batch.input_ids_BS, **named).last_hidden_state
        worst = _relative(found, right)
    if failure.error:
        return f"{kernel}: its layers don't hand documents on ({failure.reason[:120]})"
    return "" if worst <= MODEL_TOLERANCE else f"{kernel}: the model's hidden states differ by {worst:.2f}"


def in_another(model: Any, work: Callable[[], Tensor]) -> Tensor | None:
    """What `work` gives where the model attends by another of transformers' own implementations than now; None where
    that fails."""
    with foreign_failures(trial=True) as failure, attending(model, "sdpa" if today(model) == "eager" else "eager"):
        found = work()
    return None if failure.error else found


@contextmanager
def attending(model: Any, name: str) -> Iterator[None]:
    """Inside the block the model attends by the implementation of that name, as transformers has it."""
    before = today(model)
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = before
