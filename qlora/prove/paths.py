"""Every way to compute attention that a recipe can choose, against the plain one, on packed documents."""

from __future__ import annotations

from qlora.data.loader import collate
from qlora.model.cpu_matmul import fast_matmul
from qlora.prove.model import documents, make
from qlora.prove.proof import Figure, Outcome, Place, Proof, distance
from qlora.prove.shapes import with_layers

CHOICES = ("auto", "sdpa")  # of model.attention; "eager" is the plain one
LENGTHS = (37, 64, 27)  # of a pack's documents: none but one a multiple of what kernels tile by
# A gradient in bf16 is some 1 % from the one in fp32 (8 bits of mantissa, through every layer), in any order of sums.
TOLERANCE = 0.03


def run(place: Place) -> Outcome:
    shape = with_layers(place.shape, 2)
    split = documents(2, LENGTHS, shape.vocabulary)
    together = collate(split, [(0, 1, 2), (3, 4, 5)], 0, sum(LENGTHS))
    alone = [collate(split, [(row,)], 0, max(LENGTHS)) for row in range(6)]
    measured: dict[str, Figure] = {}
    with fast_matmul(place.device):
        plain = make(shape, place.device, "eager").gradient(*alone)
        for choice in CHOICES:
            made = make(shape, place.device, choice)
            measured[f"{choice}, packed"] = distance(made.gradient(together), plain)
            measured[f"{choice}, one document a row"] = distance(made.gradient(*alone), plain)
    worst = max(float(value) for value in measured.values() if isinstance(value, float))
    return Outcome(worst <= TOLERANCE, f"at most {worst:.2%} from eager attention, document by document", measured)


PROOF = Proof(
    name="attention",
    promise="documents that share a row have the gradient that each has alone, by every way to compute attention",
    tolerance=f"{TOLERANCE:.0%} of the gradient's norm",
    source="qlora/README.md, packed documents; bf16 has 8 bits of mantissa",
    run=run,
)
