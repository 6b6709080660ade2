"""What is exported is what was trained: merged, written, opened again and measured by the export itself."""

from __future__ import annotations

from qlora import api
from qlora.events import Recorder
from qlora.prove import trained
from qlora.prove.proof import Figure, Outcome, Place, Proof

MAX_KL = 0.01  # nats a token: bf16 rounds merged weights to 8 bits, which moves a random model's logits by some 1 %


def run(place: Place) -> Outcome:
    recorder = Recorder()
    report = api.merge_and_export(
        trained.straight(place), to="hf", merge_base="nf4", out=place.folder / "merged", sink=recorder
    )
    entries = [entry for event in recorder.of("fidelity") for entry in event.as_dict()["entries"]]
    kls = [float(entry["kl"]) for entry in entries if entry.get("kl") is not None]
    size = report.products[0].bytes
    measured: dict[str, Figure] = {"kl": max(kls, default=None), "bytes": size, "candidates": len(entries)}
    if not kls:
        return Outcome(False, "written, and nothing was measured", measured)
    return Outcome(max(kls) <= MAX_KL, f"{size / 2**20:.1f} MiB, at most {max(kls):.2g} nats a token away", measured)


PROOF = Proof(
    name="export",
    promise="the merged model says what the trained one said",
    tolerance=f"{MAX_KL} nats a token of mean KL",
    source="export/verify; bf16 has 8 bits of mantissa",
    run=run,
)
