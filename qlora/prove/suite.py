"""All proofs in order, each in the same temporary folder, and what one process must set before the first."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from qlora import determinism
from qlora import device as hardware
from qlora.errors import DoesNotFit, HardwareError, QloraError, foreign_failures
from qlora.guarded import Guarded
from qlora.model import compiled
from qlora.prove import (
    context,
    copies,
    exactness,
    export,
    four_bit,
    generator,
    limit,
    optimizers,
    paths,
    peak,
    release,
    resume,
    speed,
    spill,
)
from qlora.prove.proof import Outcome, Place, Proof
from qlora.prove.shapes import SHAPES, largest
from qlora.units import GIB

# What is cheap first; what fills the card last, so that nothing else finds it full.
PROOFS: tuple[Proof, ...] = (
    context.PROOF,  # before others have loaded their kernels
    *(generator.PROOF, four_bit.PROOF, optimizers.PROOF, copies.PROOF, paths.PROOF, exactness.PROOF, release.PROOF),
    *(resume.PROOF, export.PROOF, peak.PROOF, speed.PROOF, limit.PROOF, spill.PROOF),
)
ROWS, LENGTH = 4, 2048  # of the micro-batches on a GPU: several blocks of keys, as real packs have
ROWS_ON_CPU, LENGTH_ON_CPU = 2, 256


@dataclass(frozen=True)
class Result:
    """A proof with what it found, and how long it took."""

    proof: Proof
    outcome: Outcome
    seconds: float


@contextmanager
def place_for(device: str | None, model: str | None) -> Iterator[Place]:
    """Where proofs run. Raises HardwareError for a device that is not there; the folder is removed whatever happens.

    Nothing is written anywhere else: caches are in the folder too.
    """
    import torch

    found = torch.device("cpu") if device == "cpu" else hardware.current()  # a card has an index, which limits ask for
    if device not in (None, "cpu", "cuda") or (device == "cuda" and not hardware.is_card(found)):
        here = hardware.name_of(found)
        raise HardwareError(f"{device}: no such device here", f"leave it out to take what there is: {here}")
    on_card = hardware.is_card(found)
    shape = SHAPES[model] if model else largest(hardware.free_bytes(found)) if on_card else SHAPES["small"]
    free = hardware.free_bytes(found)
    if model and shape.needs_bytes > free:
        what = f"a random {model} model needs about {shape.needs_bytes / GIB:.1f} GiB, {free / GIB:.1f} are free"
        raise DoesNotFit(what, "leave `model` out to take the largest that fits, or end other programs")
    rows, length = (ROWS, LENGTH) if on_card else (ROWS_ON_CPU, LENGTH_ON_CPU)
    with TemporaryDirectory(prefix="qlora-prove-") as folder, _cache_in(Path(folder) / "cache"):
        determinism.fix_workspace()
        yield Place(found, shape, Path(folder), rows, length)


def run_all(
    place: Place, proofs: Sequence[Proof] = PROOFS, begin: Callable[[Proof], None] = lambda _: None
) -> list[Result]:
    """Every proof's outcome; `begin` is told before each. A proof that ends by an error is broken, the others go on."""
    results = []
    for proof in proofs:
        begin(proof)
        began = time.monotonic()
        outcome = tried(proof, place)
        results.append(Result(proof, outcome, time.monotonic() - began))
        hardware.release(place.device)
    return results


def tried(proof: Proof, place: Place) -> Outcome:
    """What the proof found; whatever a driver, a kernel or an allocator raises in it is the finding."""
    try:
        with Guarded(f"trying {proof.name}", "end other programs on this device"), foreign_failures() as failure:
            return proof.run(place)
    except QloraError as error:
        return Outcome(False, f"{error.what} ({error.hint})")
    return Outcome(False, f"{type(failure.error).__name__}: {failure.reason}")


@contextmanager
def _cache_in(folder: Path) -> Iterator[None]:
    # torch makes a folder for its compiler beside ours, in the system's for temporary files, where none is named.
    places = {"QLORA_CACHE": str(folder), "TORCHINDUCTOR_CACHE_DIR": str(folder / compiled.FOLDER)}
    before = {name: os.environ.get(name) for name in places}
    os.environ.update(places)
    try:
        yield
    finally:
        for name, place in before.items():
            if place is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = place
