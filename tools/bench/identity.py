"""What knowing a base by its content costs: loading with the hash and without it, in turns, in one process.

    python tools/bench/identity.py                          # a random base of 0.5 GB, made in a temporary folder
    python tools/bench/identity.py --base /models/Qwen3-8B --repeats 5 --out results/identity.json
    python tools/bench/identity.py --parts                  # hash, check of values, and sample at the door, one by one

A pair of loads (with, without; then without, with) is one repeat. The files are in the page cache after a first one
that is not counted: a slower disk hides more of the hash. Processor seconds are of all threads: what the hash takes
where no core has time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from this_machine import commit, hardware  # noqa: E402

from qlora.third_party import let_waiting_threads_sleep  # noqa: E402

let_waiting_threads_sleep()

import torch  # noqa: E402
from blake3 import blake3  # noqa: E402

from qlora.device import current, release_memory  # noqa: E402
from qlora.events import Sinks  # noqa: E402
from qlora.model import identity, load  # noqa: E402
from qlora.model.base_folder import BaseFolder  # noqa: E402
from qlora.model.identity import BaseIdentity, WeightReader  # noqa: E402
from qlora.model.meta_model import build, taken_tensors  # noqa: E402
from qlora.model.resolve import resolve  # noqa: E402
from qlora.model.tensors import as_bytes, read_tensor, refuse_not_finite  # noqa: E402
from qlora.recipe.sections import QuantizationSection  # noqa: E402

BLOCK = 1 << 22  # values of a block, as loading reads them


class _PlainReader(WeightReader):
    """All that loading does but the hash of the content: values are checked, the sample is taken."""

    def _look_at(self, name: str, tensor: torch.Tensor) -> None:
        self._bytes[name] = self._bytes.get(name, 0) + tensor.nbytes
        refuse_not_finite(name, self.tensors[name], tensor)

    def identity(self) -> BaseIdentity:
        super().identity()  # which waits, and knows no digest
        return identity.at_the_door(self.config, {name: self.tensors[name] for name in self._bytes})


def seconds_of(base: BaseFolder, reader: type[WeightReader], quantization: str) -> tuple[float, float]:
    """Of one load, from the folder to the model on its device: by the clock, and of all threads."""
    device = current()
    before, load.WeightReader = load.WeightReader, reader  # type: ignore[misc, attr-defined]
    started, worked = time.perf_counter(), time.process_time()
    model = load.load_base(base, QuantizationSection(type=quantization), "auto", device, Sinks())  # type: ignore[arg-type]
    taken = time.perf_counter() - started, time.process_time() - worked
    load.WeightReader = before  # type: ignore[misc, attr-defined]
    del model
    release_memory(device)
    return taken


def measure(base: BaseFolder, quantization: str, repeats: int) -> dict[str, Any]:
    """Seconds of each load by the clock and of the processor, and the median over repeats of with / without."""
    seconds_of(base, WeightReader, quantization)
    found: dict[type[WeightReader], list[tuple[float, float]]] = {WeightReader: [], _PlainReader: []}
    for repeat in range(repeats):
        for reader in sorted(found, key=lambda kind: kind is _PlainReader, reverse=bool(repeat % 2)):
            found[reader].append(seconds_of(base, reader, quantization))
            clock, processor = found[reader][-1]
            print(f"{quantization} {reader.__name__:14} {clock:.3f} s, processor {processor:.3f} s", flush=True)
    results: dict[str, Any] = {}
    for at, kind in enumerate(("clock", "processor")):
        both = [[taken[at] for taken in found[reader]] for reader in (WeightReader, _PlainReader)]
        ratio = statistics.median(one / other for one, other in zip(*both, strict=True))
        results[kind] = {"with": both[0], "without": both[1], "ratio": ratio, "of_best": min(both[0]) / min(both[1])}
    return results


def parts(base: BaseFolder) -> dict[str, float]:
    """GB a second of what is done with a block, one thread each but the check, and seconds of the sample."""
    entry = max(base.tensors.values(), key=lambda one: one.nbytes)
    block = read_tensor(entry, (0, max(1, min(entry.shape[0], BLOCK * entry.shape[0] // entry.numel))))

    def speed(work: Callable[[], object]) -> float:
        work()
        started = time.perf_counter()
        for _ in range(10):
            work()
        return block.nbytes * 10 / (time.perf_counter() - started) / 1e9

    taken = taken_tensors(base, build(base))
    started = time.perf_counter()
    identity.at_the_door(base.config, taken)
    return {
        "blake3, GB/s": speed(lambda: blake3().update(as_bytes(block))),
        "finite, GB/s": speed(lambda: refuse_not_finite("", entry, block)),
        "sample, s": time.perf_counter() - started,
    }


def random_base(folder: Path, gigabytes: float) -> Path:
    """A base of Llama's shape with random weights in bf16, its tokenizer left out."""
    from transformers import AutoConfig, AutoModelForCausalLM

    layers = max(1, round(gigabytes * 1e9 / 2 / 50.3e6))  # 50.3 M parameters a layer
    config = AutoConfig.for_model(
        "llama",
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=8192,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="a base's folder; without it a random one is made")
    parser.add_argument("--gigabytes", type=float, default=0.5, help="of the random base")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quantization", nargs="+", default=["nf4", "none"])
    parser.add_argument("--parts", action="store_true", help="only the speed of the parts")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = asked.base.resolve() if asked.base else random_base(Path(place) / "base", asked.gigabytes)
        base = replace(resolve(str(folder), "main", Sinks()), cache=False)
        total = sum(entry.nbytes for entry in base.tensors.values())
        results: dict[str, Any] = {
            "bytes": total,
            "tensors": len(base.tensors),
            "hardware": hardware(),
            "commit": commit(),
            "threads": torch.get_num_threads(),
            "device": str(current()),
            "torch": torch.__version__,
            "parts": parts(base),
        }
        print(f"{total / 1e9:.2f} GB in {len(base.tensors)} tensors: {results['parts']}", flush=True)
        if not asked.parts:
            for kind in asked.quantization:
                results[kind] = measure(base, kind, asked.repeats)
                for name, found in results[kind].items():
                    print(f"{kind}, {name}: ratio {found['ratio']:.3f}, of the best {found['of_best']:.3f}", flush=True)
    if asked.out:
        asked.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
