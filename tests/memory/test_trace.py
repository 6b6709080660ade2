"""The count of live bytes: rounded as an allocator rounds, kept by category, and its peak by phase."""

from __future__ import annotations

import pytest
import torch

from qlora.batch import Batch
from qlora.memory.trace import LiveBytes, Sums, most_multiprocessors
from qlora.model import document_attention
from qlora.model.document_mask import DocumentMask


@pytest.fixture
def counted() -> LiveBytes:
    mode = LiveBytes("cpu")
    mode.begin("first")
    return mode


def test_a_tensor_counts_from_its_making_to_its_end(counted: LiveBytes) -> None:
    with counted:
        one = torch.empty(100)  # 400 bytes are handed out as 512
        view = one[10:]
        two = torch.empty(200, dtype=torch.bfloat16)
        assert counted.live["activations"] == 1024
        del one
        assert counted.live["activations"] == 1024, "its view holds it"
        del view
        assert counted.live["activations"] == 512
        del two
    assert sum(counted.live.values()) == 0 and counted.peaks["first"].total == 1024


def test_what_is_live_counts_in_the_next_phase(counted: LiveBytes) -> None:
    with counted:
        kept = torch.empty(128)
        torch.empty(1280)
        counted.begin("second")
        torch.empty(256)
    assert counted.peaks["first"].total == 512 + 5120 and counted.peaks["second"].total == 512 + 1024
    assert kept.nbytes == 512


def test_regions_labels_and_adopted_tensors_have_their_category(counted: LiveBytes) -> None:
    counted.gradient_shapes.add((4, 32))
    counted.vocabulary = 96
    base = torch.empty(1000)
    counted.adopt(base, "weights")
    counted.adopt(base.view(10, 100), "adapters")  # the same storage is there already
    with counted:
        with counted.region("optimizer"):
            moments = torch.zeros(4, 32)
        found = torch.zeros(4, 32), torch.zeros(2, 96), torch.zeros(96)
    expected = {"weights": 4096, "optimizer": 512, "gradients": 512, "logits": 1024, "activations": 512}
    assert {name: count for name, count in counted.live.items() if count} == expected
    assert len(found) == 3 and moments.shape == (4, 32)


@pytest.mark.parametrize("packed", [True, False])
def test_a_model_that_asks_whether_a_row_is_one_document_is_answered(packed: bool) -> None:
    mode = LiveBytes("cuda", packed)
    mode.begin("forward")
    with mode:
        assert bool((torch.zeros(1, 8, device="meta") == 0).all()) is not packed


def test_scratch_of_a_gpus_kernels_is_in_the_peak_alone() -> None:
    peaks = {}
    for target in ("cuda", "cpu"):
        mode = LiveBytes(target)
        mode.begin("backward")
        query = torch.empty(1, 2, 64, 32, dtype=torch.bfloat16, device="meta", requires_grad=True)
        with mode, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION):
            grad = torch.empty_like(query)
            arguments = (grad, query, query, query, None, grad, torch.empty(1, 2, 64, device="meta"))
            seed = torch.empty((), dtype=torch.int64, device="meta")
            torch.ops.aten._scaled_dot_product_efficient_attention_backward(
                *arguments, seed, seed, 0.0, [True, True, True, False]
            )
        peaks[target] = mode.peaks["backward"].parts["workspace"]
        assert mode.live["workspace"] == 0
    # delta in float32, and dQ's accumulator: 64 positions padded to 128, 32 columns to 64.
    assert peaks == {"cuda": 2 * 64 * 4 + 2 * 128 * 64 * 4, "cpu": 0}


def test_the_softmaxs_backward_has_a_temporary_of_its_own_on_a_gpu() -> None:
    """SoftMax.cu multiplies gradient and output before it sums: a third tensor of that size beside its result."""
    peaks = {}
    for target in ("cuda", "cpu"):
        mode = LiveBytes(target)
        mode.begin("backward")
        with mode:
            scores = torch.empty(4, 64, 64, device="meta")
            torch.ops.aten._softmax_backward_data(scores, scores, -1, torch.float32)
        peaks[target] = mode.peaks["backward"].parts["workspace"]
    assert peaks == {"cuda": 4 * 64 * 64 * 4, "cpu": 0}


def varlen_backward(lengths: list[int], sums: Sums, heads: int = 32, shared: int = 8) -> int:
    """Bytes beyond its results that the backward pass of attention over documents takes on a GPU."""
    assert document_attention.has_varlen()  # what registers it
    mode, width, tokens = LiveBytes("cuda"), 128, sum(lengths)
    mode.sums = sums
    mode.begin("backward")
    states = [torch.empty(tokens, count, width, dtype=torch.bfloat16, device="meta") for count in (heads, heads)]
    keys = [torch.empty(tokens, shared, width, dtype=torch.bfloat16, device="meta") for _ in range(2)]
    lse = torch.empty(heads, tokens, device="meta")
    starts = torch.empty(len(lengths) + 1, dtype=torch.int32, device="meta")
    seed = torch.empty(2, dtype=torch.uint64, device="meta")
    with mode:
        torch.ops.torch_attn._varlen_attn_backward.default(
            states[0], states[1], *keys, states[0], lse, starts, starts, max(lengths), max(lengths), True, seed
        )
    return mode.peaks["backward"].parts["workspace"]


def test_scratch_of_attention_over_documents_grows_with_them() -> None:
    """mha_varlen_bwd: float32 sums of dQ, 128 rows more for each document; keys' gradients for every query head."""
    tokens, heads, width = 2048, 32, 128
    shared = 2 * tokens * heads * width * 2
    for count in (1, 64):
        rows = tokens + 128 * count
        found = varlen_backward([tokens // count] * count, Sums())
        assert found == heads * rows * 4 + rows * heads * width * 4 + shared
    assert varlen_backward([tokens], Sums(), shared=32) == found_alone(tokens, heads, width)


def found_alone(tokens: int, heads: int, width: int) -> int:
    return heads * (tokens + 128) * 4 + (tokens + 128) * heads * width * 4


def test_sums_in_one_order_have_a_copy_for_each_multiprocessor_of_a_head() -> None:
    """nsplits: 128 multiprocessors on 32 heads of one document are 4 to a head; on 64 documents they are 1."""
    alone, in_order = (varlen_backward([2048], Sums(1, count)) for count in (0, 128))
    assert in_order - alone == 3 * (2048 + 128) * 32 * 128 * 4
    # What is simulated has many short documents; the next micro-batch may be one long one.
    assert (
        varlen_backward([32] * 64, Sums(1, 128))
        >= varlen_backward([32] * 64, Sums())
        == varlen_backward([32] * 64, Sums(64, 128))
    )
    counts = [most_multiprocessors(size) for size in (6, 8, 12, 16, 24, 80)]
    assert counts == [48, 48, 80, 84, 188, 188]


@pytest.mark.parametrize("lengths", [(2100, *[66] * 30), (1,) * 300, (512, 512), (4096,), (129, 3000, 128)])
def test_scratch_and_sums_of_the_efficient_kernel_over_documents_are_never_above_the_simulated(
    lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulated documents are of equal length; real ones of the same number and tokens may be of any."""
    heads, width, tokens = 4, 128, sum(lengths)
    simulated = efficient_on_meta(lengths, heads, width)
    laid_out = [count * -(-longest // 128) * 128 for count, longest in real_calls(lengths)]
    assert max(laid_out) * heads * (width + 1) * 4 <= simulated
    assert simulated <= (2 * (tokens + 128) + 128 * len(lengths)) * heads * (width + 1) * 4
    if len(lengths) == 31:
        assert max(laid_out) * 10 < 31 * 2176, "documents times the longest"


def real_calls(lengths: tuple[int, ...]) -> list[tuple[int, int]]:
    """Documents and the longest of each call of the kernel, for a micro-batch of such documents."""
    mask = document_mask(lengths, "cpu")
    classes = document_attention._length_classes(mask)
    return [(len(one.members), one.longest) for one in classes] or [(len(lengths), max(lengths))]


def document_mask(lengths: tuple[int, ...], device: str) -> DocumentMask:
    ids = torch.empty(1, sum(lengths), dtype=torch.int64, device=device)
    starts = torch.empty(len(lengths) + 1, dtype=torch.int32, device=device)
    return DocumentMask(Batch(ids, ids, ids, ids, ids, ids, starts, lengths))


def efficient_on_meta(lengths: tuple[int, ...], heads: int, width: int) -> int:
    """Bytes of scratch that are counted for a backward pass."""
    mode = LiveBytes("cuda")
    mode.begin("backward")
    shape = (1, heads, sum(lengths), width)
    query, key, value = (torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True) for _ in range(3))
    with mode:
        output = document_attention.efficient(query, key, value, document_mask(lengths, "meta"), None, None)
        mode.begin("backward")
        torch.autograd.grad(output.sum(), (query, key, value))
    return mode.peaks["backward"].parts["workspace"]
