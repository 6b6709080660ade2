"""Every way to compute a step that settings choose and this device has, against the plain one, on packed documents.

The plain one is eager attention, document by document, with nothing computed twice.
"""

from __future__ import annotations

from qlora.data.loader import collate
from qlora.model.attention import NAME, name_of
from qlora.model.attention_choice import choose, heads_of, tried
from qlora.model.cpu_matmul import fast_matmul
from qlora.model.document_attention import KERNELS
from qlora.prove.model import documents, make
from qlora.prove.proof import Figure, Outcome, Place, Proof, distance
from qlora.prove.shapes import config_of, with_layers

LENGTHS = (37, 64, 27)  # of a pack's documents: none but one a multiple of what kernels tile by
# A gradient in bf16 is some 1 % from the one in fp32 (8 bits of mantissa, through every layer), in any order of sums.
TOLERANCE = 0.03
KEPT = "layers kept"  # gradient_checkpointing = false; all others compute them again


def run(place: Place) -> Outcome:
    shape = with_layers(place.shape, 2)
    text, device = config_of(shape), place.device
    split = documents(2, LENGTHS, shape.vocabulary)
    together = collate(split, [(0, 1, 2), (3, 4, 5)], 0, sum(LENGTHS))
    alone = [collate(split, [(row,)], 0, max(LENGTHS)) for row in range(6)]
    lacks = {kernel: tried(kernel, heads_of(text), device) for kernel in KERNELS}
    ways = {"a mask": NAME, **{kernel: name_of(kernel) for kernel, lack in lacks.items() if not lack}, KEPT: NAME}
    measured: dict[str, Figure] = {f"{kernel} is not here": lack for kernel, lack in lacks.items() if lack}
    worst = 0.0
    with fast_matmul(device):
        with make(shape, device, "eager", recompute=False) as made:
            plain = made.gradient(*alone)
        for way, name in ways.items():
            with make(shape, device, "sdpa", recompute=way != KEPT) as made:
                made.model.get_base_model().config._attn_implementation = name
                for rows, batches in (("packed", [together]), ("one document a row", alone)):
                    apart = distance(made.gradient(*batches), plain)
                    measured[f"{way}, {rows}"] = apart
                    worst = max(worst, apart)
    measured["chosen"] = choose(text, NAME, "auto", device)[0] or "a mask"
    said = f"{', '.join(ways)}: at most {worst:.2%} from eager attention, document by document"
    return Outcome(worst <= TOLERANCE, said, measured)


PROOF = Proof(
    name="attention",
    promise="documents that share a row have the gradient that each has alone, by every way to compute attention",
    tolerance=f"{TOLERANCE:.0%} of the gradient's norm",
    source="qlora/README.md, packed documents; bf16 has 8 bits of mantissa",
    run=run,
)
