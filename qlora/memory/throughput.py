"""Tokens a second that a step is predicted to train on a card, by its operations as counted on meta.

Each operation takes the longest of three: its bytes through the card's memory, its arithmetic, or a launch. What is
copied over PCIe runs beside a layer's computation and counts where it takes longer. The constants stand in one table,
`RATES`, with where they come from; none of them was fitted to runs of this trainer. A prediction ranks settings by what
they cost, and promises nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qlora.memory import links
from qlora.memory.hardware import Gpu
from qlora.memory.operations import Layers, Operation, Operations, Work
from qlora.memory.recomputing import share
from qlora.memory.simulation import ValueCounts, Workload


@dataclass(frozen=True)
class Rates:
    """Shares of what a card's data sheet says that its operations reach, and what starting one takes.

    memory      of its bandwidth: a copy inside the card's memory of large tensors reaches 0.80 to 0.92 of GDDR6X's
    arithmetic  of its dense bf16 products with float32 sums: cuBLAS on large ones, at boost clocks
    hot         the same of data centre's cards from Hopper on: 0.75 of the data sheet, where the power limit lowers the
                clock under load, and of that as much as of the others'
    attention   of its products: flash attention forth and back (Dao 2023, figure 4: 0.5 to 0.6 on Ampere and Ada)
    grouped     of its products with few rows each, which do not fill a card: 0.6 of the data sheet, an assumption
                between attention's and large products'
    launch      seconds between two kernels of one stream, however short they are
    host        seconds that Python and the dispatcher take to start one: the card waits where that is longer
    """

    memory: float = 0.85
    arithmetic: float = 0.88
    hot: float = 0.75 * 0.88
    attention: float = 0.55
    grouped: float = 0.6
    launch: float = 2.5e-6
    host: float = 7e-6


# With these a step of torchtune's kind comes out at what it published for an RTX 4090 (2 x 2,048 tokens of
# Llama-3.1-8B, compiled: 2,413 tokens/s); tests/memory/test_throughput.py states how far ours is from it.
RATES = Rates()
HOT_CAPABILITIES = (90, 94, 95, 100, 103)
# Rows of a tile of a product: an expert's last one is half empty on average.
TILE_ROWS = 64


@dataclass(frozen=True)
class Copies:
    """Bytes that a micro-batch moves over PCIe or reads from a disk, over all layers, each way by itself.

    to_card_up    weights of streamed layers in the forward pass      to_card_down  the same in the backward pass, and
                  (of shared layers, the other cards' parts)                        hidden states that come back
    to_host_up    hidden states that are offloaded
    looked_up     rows of an embedding on the host, which are gathered there first and hidden by nothing
    of_head       a head's blocks, once for the loss and once for its gradient
    from_disk     of each pass, what of the layers' weights the host's memory does not keep
    """

    to_card_up: int = 0
    to_card_down: int = 0
    to_host_up: int = 0
    looked_up: int = 0
    of_head: int = 0
    from_disk: int = 0


@dataclass(frozen=True)
class Speed:
    """Of one micro-batch, in seconds: of the layers' forward pass, their backward pass, embedding with head and loss,
    and the update's share. `waits`: of these, for copies; `host_bound`: Python is slower than the card."""

    up: float
    down: float
    outside: float
    update: float
    waits: float
    host_bound: bool
    tokens: int

    @property
    def seconds(self) -> float:
        return self.up + self.down + self.outside + self.update

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)


def predict(work: Work, gpu: Gpu, tokens: int, passes: float = 1.0, copies: Copies | None = None) -> Speed:
    """Of a micro-batch of `tokens`, of which an update follows `passes`; `copies` run beside it."""
    copies = copies or Copies()
    whole = sum(group.count for group in work.layers)
    link, disk = links.copied_bytes_per_second(gpu), copies.from_disk / links.DISK_BYTES_PER_SECOND
    copied_up = max(copies.to_card_up / link, copies.to_host_up / link, disk) / whole
    copied_down = max(copies.to_card_down / link, disk) / whole
    up, waits_up = _layers(work.layers, gpu, copied_up, back=False)
    down, waits_down = _layers(work.layers, gpu, copied_down, back=True)
    alone = copies.looked_up / link + copies.looked_up / links.GATHERED_BYTES_PER_SECOND
    computed, of_head = _seconds(work.outside, gpu), 2 * copies.of_head / link
    outside, alone = max(computed, of_head) + alone, max(0.0, of_head - computed) + alone
    launches, moved = work.update
    update = max(launches * RATES.launch, moved / _bandwidth(gpu)) / passes
    of_loops = sum(times * (_launches(operation, gpu) - 1) for operation, times in work.micro_batch)
    started = (work.launches + of_loops + launches / passes) * RATES.host
    device = up + down + outside + update
    idle = max(0.0, started - device)
    return Speed(up, down, outside + idle, update, waits_up + waits_down + alone, started > device, tokens)


def _layers(layers: tuple[Layers, ...], gpu: Gpu, copied: float, back: bool) -> tuple[float, float]:
    """Seconds of all layers where `copied` seconds of copies run beside each, and of them those it waits."""
    total = waits = 0.0
    for group in layers:
        computed = _seconds(group.down if back else group.up, gpu)
        total += group.count * max(computed, copied)
        waits += group.count * max(0.0, copied - computed)
    return total, waits


def _seconds(operations: Operations, gpu: Gpu) -> float:
    return sum(count * _operation_seconds(operation, gpu) for operation, count in operations)


def _operation_seconds(operation: Operation, gpu: Gpu) -> float:
    peak = gpu.teraflops * 1e12
    share = RATES.hot if gpu.capability in HOT_CAPABILITIES else RATES.arithmetic
    if operation.experts:
        share = min(share, RATES.grouped) * operation.rows / (operation.rows + operation.experts * TILE_ROWS / 2)
    rate = peak * (RATES.attention if operation.attends else share)
    launches = _launches(operation, gpu) * RATES.launch
    return max(operation.nbytes / _bandwidth(gpu), operation.arithmetic / rate, launches)


def _launches(operation: Operation, gpu: Gpu) -> int:
    """Kernels that a card starts for it."""
    return operation.experts if operation.loops and gpu.capability not in HOT_CAPABILITIES else 1


def _bandwidth(gpu: Gpu) -> float:
    return gpu.gigabytes_per_second * 1e9 * RATES.memory


def as_dict(speed: Speed) -> dict[str, Any]:
    """What `qlora-estimate --json` says of it."""
    parts = {"layers_forward": speed.up, "layers_backward": speed.down, "head_and_loss": speed.outside}
    parts |= {"update": speed.update, "of_it_waiting_for_copies": speed.waits}
    seconds = {name: round(value, 6) for name, value in parts.items()}
    return {
        "tokens_per_second": round(speed.tokens_per_second, 1),
        "seconds": seconds,
        "host_bound": speed.host_bound,
        "tokens": speed.tokens,
    }


def most_tokens_per_second(work: Work | None, gpu: Gpu | None, tokens: int) -> float:
    """Of a micro-batch whose operations are `work`, were there nothing but their arithmetic, all at the data sheet's
    rate: no prediction is above it. 0 without a card."""
    return 0.0 if work is None or gpu is None else tokens * gpu.teraflops * 1e12 / max(1.0, work.arithmetic)


def ideal_tokens_per_second(text: Any, workload: Workload, values: ValueCounts, gpu: Gpu) -> float:
    """What the arithmetic and the dequantization allow at best.

    Operations a token: two for each weight in the forward pass and two for the gradient of its input (none for the
    frozen weight itself), two more where layers are recomputed; the head always is (chunked loss). Attention 2·s·q
    forward and 2.5 times that backward, causal. Adapters have gradients of their weights as well. A micro-batch reads
    each 4-bit weight and writes it in bf16 once a pass: 0.516 + 2 bytes.
    """
    again = share(workload, int(text.num_hidden_layers))
    passes = 2 + again
    hidden = int(text.hidden_size)
    # Gemma 4 has heads of two sizes, and its configuration raises over a question for one of them.
    width = int(text.num_attention_heads) * int(vars(text).get("head_dim") or hidden // text.num_attention_heads)
    attention = (7 + 2 * again) * int(text.num_hidden_layers) * workload.length * width
    operations = (
        2 * passes * values.linear + 6 * int(text.vocab_size) * hidden + attention + 2 * (passes + 1) * values.adapter
    )
    tokens = workload.rows * workload.length
    seconds = tokens * operations / (gpu.teraflops * 1e12)
    seconds += passes * values.linear * (0.516 + 2) / (gpu.gigabytes_per_second * 1e9)
    return tokens / seconds
