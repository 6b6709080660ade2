"""The importance matrix: how strongly each input channel of each linear layer is used by the user's own rows.

K- and IQ-quants weigh a weight's rounding error with the mean square of the channel that it is multiplied with. It is
collected in our own forward pass, where packed documents are isolated as in training: the model that is measured is the
one that was trained, in 4 bit and with its adapter, and nothing has to be converted before. Padding is left out.

The file is llama.cpp's (tools/imatrix, in GGUF): for each tensor NAME, `NAME.in_sum2` holds the sums of
squares of its inputs in float32 and `NAME.counts` the number of positions; tools/quantize divides the one by the other,
and takes 1 for every channel of a tensor without positions.
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
from qlora.events import Progress, Sink
from qlora.model.weight_receiving import device_of
from qlora.recipe.sections import DataSection
from qlora.step.forward import CausalParts, evaluating, hidden_states

Floats = NDArray[np.float32]
# Parameter, its name in the file, and which of the parameter's columns each column there is (None: the same).
Inputs = Iterable[tuple[str, str, Any]]

# 256 chunks of 512 tokens (llama-imatrix's own chunk), where 100 are usual advice. Measured on the quickstart's rows:
# the means of 2,040 tokens differ from those of all 10,331 by 1.6 % (median) and 17 % (99th percentile of channels).
# That falls with the square root of the tokens, to 0.2 % and 2 % here, while a tensor's channels lie 2.6 decades apart.
MAX_TOKENS = 131_072
CHUNK_TOKENS = 512
VALUES_PER_BLOCK = 1 << 23  # 32 MiB of fp32 in flight
SUMS, COUNTS = ".in_sum2", ".counts"
DATASETS, CHUNK_COUNT, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"


@dataclass(frozen=True)
class Imatrix:
    """What was measured, by parameter name of the causal model (`renamed`: by GGUF tensor name).

    sums    sums of squared inputs (in_features,), float32
    counts  positions that went into each sum
    tokens  positions of all rows used, without padding
    """

    sums: Mapping[str, Floats]
    counts: Mapping[str, int]
    tokens: int

    def importance(self) -> dict[str, Floats]:
        """What the quantizer takes (in_features,), float32: mean squares; ones where nothing was counted.

        Divided in float32, as tools/quantize/quantize.cpp does, so that the same file gives the same bytes.
        """
        return {
            name: sums / np.float32(self.counts[name]) if self.counts[name] > 0 else np.ones_like(sums)
            for name, sums in self.sums.items()
        }

    def sha256(self) -> str:
        """Of names, sums and counts: what a quantized file depends on."""
        digest = hashlib.sha256()
        for name in sorted(self.sums):
            digest.update(f"{name} {self.counts[name]} ".encode() + self.sums[name].tobytes())
        return digest.hexdigest()

    def renamed(self, inputs: Inputs) -> Imatrix:
        """The same under the names, and in the order of columns, that `inputs` gives; what is not there is left out."""
        kept = [(old, new, columns) for old, new, columns in inputs if old in self.sums]
        return Imatrix(
            {new: self.sums[old] if columns is None else self.sums[old][columns] for old, new, columns in kept},
            {new: self.counts[old] for old, new, columns in kept},
            self.tokens,
        )


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
    """Sums of squares of every linear layer's inputs, and of the head's, over all positions that are no padding.

    `model` is a causal model with or without peft around it; it is left as it was: no gradients, no hooks, the same
    training flags, no random number drawn. The head is named even where it is tied to the embeddings. Raises
    ExportError when a sum is not finite.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    causal_parts = CausalParts.of(causal)
    device = device_of(causal)
    tally = _Tally({}, {})
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
    return Imatrix(sums, tally.counts, tokens)


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


@contextmanager
def _observed(causal: Any, tally: _Tally) -> Iterator[None]:
    with ExitStack() as hooks:
        for name, module in _linear_layers(causal):
            hook = module.register_forward_pre_hook(lambda _, args, name=f"{name}.weight": tally.add(name, args[0]))
            hooks.enter_context(hook)
        yield


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
        writer.add_tensor(name + COUNTS, np.array([named.counts[name]], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
