"""Small runs for tests: rows, a recipe, a run that is stopped after a step, and what it left."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from qlora import api
from qlora.disk import sha256_file
from qlora.errors import StoppedBySignal
from qlora.events import End, Event, Recorder, Sinks
from qlora.recipe.reading import load_recipe
from qlora.stop import StopRequest

# Everything that draws random numbers or looks at the model between steps.
EVERYTHING = (
    "lora.dropout=0.1",
    "train.neftune_alpha=5.0",
    "train.batch_size=4",
    "train.micro_batch_size=2",
    "train.learning_rate=1e-3",
    "data.max_length=96",
    "data.eval_fraction=0.2",
    "eval.every_steps=3",
    "eval.samples=2",
    "eval.exact_match_rows=2",
)


def write_rows(path: Path, count: int = 30) -> Path:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is the price of lamp {i}{' and the station' * (i % 3)}?"},
                {"role": "assistant", "content": f"It costs {i * 7 % 90 + 10} euros."},
            ]
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_recipe(folder: Path, base: Path, name: str = "tiny") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "rows.jsonl")
    path = folder / f"{name}.toml"
    path.write_text(
        f'[model]\nbase = "{base}"\n[[data.train]]\npath = "rows.jsonl"\n[output]\ndir = "{folder / "runs"}"\n'
    )
    return path


class StopAfter:
    """A sink that asks the run to stop when a step is done, as a signal would."""

    def __init__(self, step: int, stop: StopRequest) -> None:
        self.step, self.stop = step, stop

    def emit(self, event: Event) -> None:
        if event.kind == "step" and event.as_dict()["step"] == self.step:
            self.stop.set()

    def close(self) -> None:
        pass


PEAK = Path("/proc/self/clear_refs")  # Linux: "5" sets this process's highest resident memory back (proc(5))


def straight_and_resumed(folder: Path, base: Path, settings: tuple[str, ...], steps: int) -> tuple[Path, Recorder, End]:
    """A run without a break, which must be the same as one stopped after 2 steps: its folder, its events, its end."""
    straight, stopped = (write_recipe(folder / name, base) for name in ("straight", "stopped"))
    if PEAK.is_file():  # what other tests took in this process is none of this run's peak
        PEAK.write_text("5")
    sink = train(straight, *settings)
    train(stopped, *settings, stop_after=2)
    train(stopped, *settings, mode="resume")
    assert hashes(straight, steps) == hashes(stopped, steps)
    (end,) = (event for event in sink.events if isinstance(event, End))
    return run_dir(straight), sink, end


def train(recipe: Path, *overrides: str, mode: api.Mode = "new", stop_after: int | None = None) -> Recorder:
    """Run a recipe, to its end or until it is stopped after a step."""
    recorder, stop = Recorder(), StopRequest()
    sinks = [recorder] if stop_after is None else [recorder, StopAfter(stop_after, stop)]
    try:
        api.train(load_recipe(recipe, overrides), name=recipe.stem, mode=mode, sink=Sinks(*sinks), stop=stop)
    except StoppedBySignal:
        assert stop_after is not None
    return recorder


def run_dir(recipe: Path) -> Path:
    return recipe.parent / "runs" / recipe.stem


def hashes(recipe: Path, step: int) -> dict[str, str]:
    """sha256 of adapter and optimizer of the checkpoint after `step`."""
    folder = run_dir(recipe) / "checkpoints" / f"step-{step:06d}"
    return {name: sha256_file(folder / name) for name in ("adapter.safetensors", "optimizer.safetensors")}


def change_unsampled_value(base: Path) -> Path:
    """Changes one value of one weight of a base in `model.safetensors`, where no sample of its bytes looks."""
    from qlora.model import identity
    from qlora.model.resolve import resolve

    found = resolve(str(base), "main", Recorder())
    entry = found.tensors["model.embed_tokens.weight"]
    before = identity.at_the_door(found.config, found.tensors)
    file = base / "model.safetensors"
    raw = bytearray(file.read_bytes())
    for place in range(entry.offset, entry.offset + entry.nbytes, 2):  # the low byte of a bf16 number: a small change
        raw[place] ^= 1
        file.write_bytes(raw)
        if identity.at_the_door(found.config, found.tensors) == before:
            return base
        raw[place] ^= 1
    raise AssertionError("every byte is in the sample")


def values(recorder: Recorder, kind: str, key: str) -> list[Any]:
    return [event.as_dict()[key] for event in recorder.of(kind)]


def arithmetic(base: Path) -> str:
    """sha256 of what this machine and its libraries make of a small training step, without any code of ours.

    Where it differs (another CPU, another torch), last digits of a run differ too, whatever the version.
    """
    import bitsandbytes as bnb
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, trust_remote_code=False)
    ids = torch.arange(96).reshape(2, 48) * 7 % 384
    model(ids, labels=ids).loss.backward()
    weight = next(parameter for parameter in model.parameters() if parameter.ndim == 2)
    packed, state = bnb.functional.quantize_4bit(weight.detach(), quant_type="nf4", compress_statistics=True)
    results = [parameter.grad for parameter in model.parameters()]
    unpacked = bnb.functional.dequantize_4bit(packed, state)
    results += [packed, unpacked, weight.detach()[:5] @ unpacked.t()]
    digest = hashlib.sha256()
    for result in results:
        digest.update(result.detach().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
