"""The same micro-batch twice has the same gradient, bit for bit: what a resumed run rests on."""

from __future__ import annotations

from qlora import determinism
from qlora.events import Recorder
from qlora.model.cpu_matmul import fast_matmul
from qlora.prove.model import make, packed
from qlora.prove.proof import Outcome, Place, Proof, all_equal, distance
from qlora.prove.shapes import with_layers

LAYERS = 2  # a layer and one above it: what is summed in another order in one is seen in the other


def run(place: Place) -> Outcome:
    shape, recorder = with_layers(place.shape, LAYERS), Recorder()
    batch = packed(place.rows, place.length, shape.vocabulary)
    with make(shape, place.device) as made, fast_matmul(place.device):
        with determinism.for_run(True, recorder):
            one, other = (
                determinism.exactly(lambda: made.gradient(batch), made.optimizer.zero_gradients, place.device, recorder)
                for _ in range(2)
            )
        loose = [made.gradient(batch) for _ in range(2)]
    missing = [str(event.as_dict()["message"]) for event in recorder.of("notice")]
    holds = all_equal(one, other) and not missing
    measured = {
        "tokens": batch.tokens,
        "apart": distance(one, other),
        "apart_without_deterministic": distance(loose[0], loose[1]),
    }
    said = "; ".join(missing) or f"{batch.tokens:,} tokens, {len(one)} tensors, {measured['apart']:.2g} apart"
    return Outcome(holds, said, measured)


PROOF = Proof(
    name="exact gradient",
    promise="two backward passes over the same packed rows give the same gradient",
    tolerance="0: bit for bit",
    source="train.deterministic; torch's attention_backward.cu: exact in the strict mode alone",
    run=run,
)
