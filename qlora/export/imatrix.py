"""The importance matrix: how strongly each input channel of each linear layer is used by the user's own rows.

K- and IQ-quants weigh a weight's rounding error with the mean square of the channel that it is multiplied with. It is
collected in our own forward pass, where packed documents are isolated as in training: the model that is measured is the
one that was trained, in 4 bit and with its adapter, and nothing has to be converted before. Padding is left out.

Of experts each one is measured by itself, on the positions that were sent to it.

The file is llama.cpp's (tools/imatrix, in GGUF): for each tensor NAME, `NAME.in_sum2` holds the sums of
squares of its inputs in float32 and `NAME.counts` the number of positions, of experts a row and a number each;
tools/quantize divides the one by the other, and takes 1 for every channel of a tensor, or of an expert, without
positions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qlora.batch import Batch
from qlora.data.loader import eval_packs
from qlora.data.packing import pack
from qlora.data.token_cache import PreparedSplit
from qlora.errors import ExportError
from qlora.events import Notice, Progress, Sink
from qlora.model.mixtures import experts_in
from qlora.model.weight_receiving import device_of
from qlora.recipe.sections import DataSection
from qlora.step.experts import Routing
from qlora.step.forward import CausalParts, evaluating, hidden_states

Floats = NDArray[np.float32]
Counts = int | NDArray[np.int64]  # of a layer, or of each of a layer's experts
# Parameter, its name in the file, and which of the parameter's columns each column there is (None: the same).
Inputs = Iterable[tuple[str, str, Any]]

# 256 chunks of 512 tokens (llama-imatrix's own chunk), where 100 are usual advice. Measured on the quickstart's rows:
# the means of 2,040 tokens differ from those of all 10,331 by 1.6 % (median) and 17 % (99th percentile of channels).
# That falls with the square root of the tokens, to 0.2 % and 2 % here, while a tensor's channels lie 2.6 decades apart.
MAX_TOKENS = 131_072
CHUNK_TOKENS = 512
VALUES_PER_BLOCK = 1 << 23  # 32 MiB of fp32 in flight
FIRST, SECOND = "gate_up_proj", "down_proj"  # transformers' names of a layer's experts
SUMS, COUNTS = ".in_sum2", ".counts"
DATASETS, CHUNK_COUNT, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"


@dataclass(frozen=True)
class Imatrix:
    """What was measured, by parameter name of the causal model (`renamed`: by GGUF tensor name).

    sums    sums of squared inputs (in_features,), of experts (E, in_features), float32
    counts  positions that went into each sum, of experts (E,)
    tokens  positions of all rows used, without padding
    """

    sums: Mapping[str, Floats]
    counts: Mapping[str, Counts]
    tokens: int

    def importance(self) -> dict[str, Floats]:
        """What the quantizer takes, as large as the sums, float32: mean squares; ones where nothing was counted.

        Divided in float32, as tools/quantize/quantize.cpp does, so that the same file gives the same bytes.
        """
        return {name: _mean(sums, self.counts[name]) for name, sums in self.sums.items()}

    def unseen_experts(self) -> tuple[int, int]:
        """How many experts no position was sent to, and how many there are, counted once for a layer."""
        of_experts = [counts for name, counts in self.counts.items() if _is_first(name) and not isinstance(counts, int)]
        return sum(int((counts == 0).sum()) for counts in of_experts), sum(len(counts) for counts in of_experts)

    def sha256(self) -> str:
        """Of names, sums and counts: what a quantized file depends on."""
        digest = hashlib.sha256()
        for name in sorted(self.sums):
            counts = self.counts[name]
            counted = counts if isinstance(counts, int) else counts.tolist()
            digest.update(f"{name} {counted} ".encode() + self.sums[name].tobytes())
        return digest.hexdigest()

    def renamed(self, inputs: Inputs) -> Imatrix:
        """The same under the names, and in the order of columns, that `inputs` gives; what is not there is left out."""
        kept = [(old, new, columns) for old, new, columns in inputs if old in self.sums]
        return Imatrix(
            {new: self.sums[old] if columns is None else self.sums[old][columns] for old, new, columns in kept},
            {new: self.counts[old] for old, new, columns in kept},
            self.tokens,
        )


def _mean(sums: Floats, counts: Counts) -> Floats:
    counts_1 = np.asarray(counts, dtype=np.float32)[..., None]
    means: Floats = np.where(counts_1 > 0, sums / np.maximum(counts_1, 1), np.float32(1))
    return means


def _is_first(name: str) -> bool:
    """Whether a parameter is the first of the two of a layer's experts."""
    return name.endswith(FIRST)


# --- which rows -------------------------------------------------------------------------------------------------------


def choose_packs(
    splits: Sequence[PreparedSplit], data: DataSection, max_tokens: int = MAX_TOKENS
) -> tuple[PreparedSplit, list[tuple[int, ...]]]:
    """The split to measure on, and packs of its rows, each once: at most `max_tokens` tokens, and at least one row.

    The first split with rows is taken: give the training rows first, since on the evaluation rows the files are judged
    afterwards. RunRows are taken in the order of sha256 of their number: any part of it is spread evenly over the file,
    whatever pattern its rows follow, and it is the same on every machine. Raises ExportError when there are no rows.
    """
    split = next((split for split in splits if len(split.lengths)), None)
    if split is None:
        raise ExportError("an importance matrix needs rows to measure on, and there are none", "leave out `imatrix`")
    if sum(split.lengths) <= max_tokens:
        return split, eval_packs(split, data)
    order = sorted(range(len(split.lengths)), key=lambda row: hashlib.sha256(str(row).encode()).digest())
    fitting = sum(total <= max_tokens for total in accumulate(split.lengths[row] for row in order))
    chosen = order[: max(1, fitting)]
    if not data.packing:
        return split, [(row,) for row in sorted(chosen, key=lambda row: (-split.lengths[row], row))]
    packs = pack([split.lengths[row] for row in chosen], data.max_length)
    return split, [tuple(chosen[at] for at in members) for members in packs]


# --- measuring --------------------------------------------------------------------------------------------------------


def collect(model: Any, batches: Sequence[Batch], sink: Sink) -> Imatrix:
    """Sums of squares of the inputs of every linear layer, of each expert and of the head, over all positions that are
    no padding.

    `model` is a causal model with or without peft around it; it is left as it was: no gradients, no hooks, the same
    training flags, no random number drawn. The head is named even where it is tied to the embeddings. Raises
    ExportError when a sum is not finite.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    causal_parts = CausalParts.of(causal)
    device = device_of(causal)
    tally = _Tally({}, {}, {})
    head = next(name for name, module in causal.named_modules() if module is causal_parts.head)
    total = sum(batch.tokens for batch in batches)
    done = tokens = 0
    with evaluating(causal), _observed(causal, tally):
        for batch in batches:
            tally.kept_N = real_positions(batch).to(device)
            tokens += len(tally.kept_N)
            hidden_BSD = hidden_states(causal_parts, batch.to(device))
            tally.add(f"{head}.weight", hidden_BSD)
            done += batch.tokens
            sink.emit(Progress("imatrix", done, total, "tokens"))
    sums = {name: total_I.cpu().numpy() for name, total_I in tally.sums.items()}
    for name, total_I in sums.items():
        if not np.isfinite(total_I).all():
            what = f"the importance matrix has numbers that are not finite: the inputs of {name} overflow"
            raise ExportError(what, "leave out `imatrix`; a model with such activations should be looked at")
    of_experts: dict[str, Counts] = {name: counts_E.cpu().numpy() for name, counts_E in tally.by_expert.items()}
    found = Imatrix(sums, {**tally.counts, **of_experts}, tokens)
    unseen, experts = found.unseen_experts()
    if unseen:
        message = (
            f"{unseen:,} of {experts:,} experts were sent no token of these rows: all their channels weigh the same"
        )
        sink.emit(Notice("imatrix", message))
    return found


def real_positions(batch: Batch) -> Tensor:
    """Places in the flattened N that are no padding.

    Padding is the last document of its row, the one that trains nothing and has no next token anywhere. A document of
    rows that were prepared trains something, so that it is never taken for padding.
    """
    last_BS = batch.document_ids_BS == batch.document_ids_BS.amax(dim=1, keepdim=True)
    used_BS = (batch.loss_weights_BS != 0) | (batch.targets_BS != 0)
    padded_B1 = ~(used_BS & last_BS).any(dim=1, keepdim=True)
    return (~(last_BS & padded_B1)).flatten().nonzero().squeeze(1)


@dataclass
class _Tally:
    sums: dict[str, Tensor]
    counts: dict[str, int]
    by_expert: dict[str, Tensor]
    kept_N: Tensor | None = None

    def add(self, name: str, inputs: Tensor) -> None:
        """Add the squares of a layer's inputs (B, S, I) at the kept positions, in fp32 on their own device."""
        assert self.kept_N is not None
        inputs_NI = inputs.detach().reshape(-1, inputs.shape[-1])
        if name not in self.sums:
            self.sums[name] = torch.zeros(inputs_NI.shape[1], dtype=torch.float32, device=inputs.device)
            self.counts[name] = 0
        step = max(1, VALUES_PER_BLOCK // inputs_NI.shape[1])
        for start in range(0, len(self.kept_N), step):
            block = inputs_NI.index_select(0, self.kept_N[start : start + step])
            self.sums[name] += block.float().square().sum(dim=0)
        self.counts[name] += len(self.kept_N)

    def add_experts(self, name: str, rows_RI: Tensor, experts_RK: Tensor, token_R: Tensor, experts: int) -> None:
        """Add the squares of rows (R, I), each of which went to `experts_RK`, where their tokens are kept ones.

        As a product with ones where an expert got a row: an addition by index adds up in any order on a card.
        """
        assert self.kept_N is not None
        width, device = rows_RI.shape[1], rows_RI.device
        if name not in self.sums:
            self.sums[name] = torch.zeros(experts, width, dtype=torch.float32, device=device)
            self.by_expert[name] = torch.zeros(experts, dtype=torch.int64, device=device)
        numbers_E11 = torch.arange(experts, device=device)[:, None, None]
        kept_R = torch.isin(token_R, self.kept_N)
        step = max(1, VALUES_PER_BLOCK // max(experts * experts_RK.shape[1], width))
        for start in range(0, rows_RI.shape[0], step):
            here = slice(start, start + step)
            got_ER = (experts_RK[here] == numbers_E11).any(dim=2) & kept_R[here]
            self.sums[name] += got_ER.float() @ rows_RI[here].detach().float().square()
            self.by_expert[name] += got_ER.sum(dim=1)


@contextmanager
def _observed(causal: Any, tally: _Tally) -> Iterator[None]:
    with ExitStack() as hooks:
        for name, module in experts_in(causal):
            if module.has_gate:  # llama.cpp has no others of ours
                hooks.enter_context(_observed_experts(name, module, tally))
        for name, module in _linear_layers(causal):
            hook = module.register_forward_pre_hook(lambda _, args, name=f"{name}.weight": tally.add(name, args[0]))
            hooks.enter_context(hook)
        yield


@contextmanager
def _observed_experts(name: str, module: Any, tally: _Tally) -> Iterator[None]:
    """What a layer's experts are given: hidden states at their call; what goes down where gate and up have met."""
    routings: list[Routing] = []
    gate, is_own = module._apply_gate, "_apply_gate" in vars(module)

    def given(_: Any, args: tuple[Tensor, ...]) -> None:
        hidden_TH, index_TK, count = args[0], args[1], int(module.num_experts)
        routings[:] = [Routing(index_TK, count)]
        tokens_T = torch.arange(hidden_TH.shape[0], device=hidden_TH.device)
        tally.add_experts(f"{name}.{FIRST}", hidden_TH, index_TK, tokens_T, count)

    def gated(rows_SI: Tensor) -> Tensor:
        result_SI: Tensor = gate(rows_SI)
        routing, count = routings[0], int(module.num_experts)
        token_S = routing.order_S // routing.choices
        tally.add_experts(f"{name}.{SECOND}", result_SI, routing.expert_S[:, None], token_S, count)
        return result_SI

    module._apply_gate = gated
    try:
        with module.register_forward_pre_hook(given):
            yield
    finally:
        if is_own:
            module._apply_gate = gate
        else:
            del module._apply_gate


def _linear_layers(causal: Any) -> Iterator[tuple[str, nn.Module]]:
    """Every linear layer but the head, the outermost module of each: peft's wrapper sees the input once.

    Inside a wrapper stand the layer itself (`base_layer`, or `original_module` of one that is trained whole) and the
    adapter's own matrices, which are no layers of the model.
    """
    head = causal.get_output_embeddings()
    outer = ""
    for name, module in causal.named_modules():
        if outer and name.startswith(f"{outer}."):
            continue
        inner = getattr(module, "base_layer", None) or getattr(module, "original_module", None) or module
        if isinstance(inner, nn.Linear):
            outer = name
            if module is not head:
                yield name, module


# --- llama.cpp's file -------------------------------------------------------------------------------------------------


def write(imatrix: Imatrix, path: Path, inputs: Inputs, datasets: Sequence[str]) -> None:
    """Write `path` for llama-quantize, under the GGUF names that `inputs` gives parameters (others are left out).

    `datasets` say where the rows came from; llama-quantize refuses a file that names none. Tensors are sorted by name,
    as llama-imatrix writes them.
    """
    import gguf

    if not datasets:
        raise ValueError("an importance matrix names at least one dataset")
    named = imatrix.renamed(inputs)
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.kv_data[0].clear()  # general.architecture, which every writer begins with, belongs to models
    writer.add_type("imatrix")
    writer.add_array(DATASETS, list(datasets))
    writer.add_uint32(CHUNK_COUNT, max(1, -(-imatrix.tokens // CHUNK_TOKENS)))
    writer.add_uint32(CHUNK_SIZE, CHUNK_TOKENS)
    for name in sorted(named.sums):
        writer.add_tensor(name + SUMS, named.sums[name])
        counts = np.asarray(named.counts[name], dtype=np.float32)
        writer.add_tensor(name + COUNTS, counts.reshape(1) if counts.ndim == 0 else counts[:, None])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
