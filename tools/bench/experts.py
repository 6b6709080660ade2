"""Tokens a second and peak memory of a training step of a mixture, its experts multiplied by our kernel and in chunks.

    python tools/bench/experts.py
    python tools/bench/experts.py --tokens 8192 --name rtx4090-8k

The mixture has OLMoE-1B-7B's shape (config.json of allenai/OLMoE-1B-7B-0924: 16 layers of 64 experts, 8 a token) and
random weights in NF4, adapters of rank 16 on its attention, every layer recomputed. Both forms train the same model and
row in turns (kernel, chunks, kernel, …). It needs a GPU; where the kernel does not run there, chunks alone are measured
and the reason is said. The figures go into a JSON file in tools/bench/results/.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
OLMOE = {
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "vocab_size": 50304,
    "max_position_embeddings": 32768,  # it was trained with 4,096
}


def main() -> None:
    arguments = parse()
    sys.path.insert(0, str(ROOT))
    from qlora.device import current, is_card, name_of

    device = current()
    if not is_card(device):
        print("needs a GPU: on a CPU experts are multiplied in chunks in any case", file=sys.stderr)
        sys.exit(2)
    report = {
        "device": name_of(device),
        "tokens": arguments.tokens,
        "layers": arguments.layers,
        "commit": commit(),
        "system": platform.system(),
        "forms": measured(arguments.layers, arguments.tokens, arguments.steps, device),
    }
    for form, figures in report["forms"].items():
        print(form, figures if isinstance(figures, str) else json.dumps(figures))
    file = RESULTS / f"experts-{arguments.name}.json"
    file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"\n{file}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="of the one row of a step")
    parser.add_argument("--layers", type=int, default=OLMOE["num_hidden_layers"])
    parser.add_argument("--steps", type=int, default=5, help="of each form, after one that is not timed")
    parser.add_argument("--name", default="olmoe", help="of the results file")
    return parser.parse_args()


def measured(layers: int, tokens: int, steps: int, device: Any, **sizes: int) -> dict[str, Any]:
    """Figures of both forms; of one that does not run there, why. `sizes`: of the shape, in place of OLMoE's."""
    from step_qlora import micro_batch

    from qlora.device import peak_bytes, release
    from qlora.model.experts import compute_by
    from qlora.step.experts import IN_CHUNKS, IN_TRITON
    from qlora.step.kernels import trial

    runs = trial.multiplies_experts(device)
    forms = [IN_TRITON, IN_CHUNKS] if runs else [IN_CHUNKS]
    model, step = made(layers, device, sizes)
    ids = [number * 7919 % (model.config.vocab_size - 4) + 4 for number in range(tokens)]
    batch = micro_batch([ids], 1).to(device)
    seconds: dict[str, list[float]] = {form: [] for form in forms}
    losses, peaks = {}, dict.fromkeys(forms, 0)
    for _ in range(steps + 1):
        for form in forms:
            compute_by(model, form)
            release(device)
            began = time.perf_counter()
            losses[form] = step(batch)
            seconds[form].append(time.perf_counter() - began)
            peaks[form] = max(peaks[form], peak_bytes(device) or 0)
    found: dict[str, Any] = {form: figures(seconds[form], tokens, peaks[form], losses[form]) for form in forms}
    return found if runs else {**found, IN_TRITON: why_not()}


def made(layers: int, device: Any, sizes: dict[str, int]) -> tuple[Any, Any]:
    """A model of random weights with adapters, and what does one step with a micro-batch and gives its loss."""
    import torch
    from transformers import AutoConfig

    from qlora.events import Sinks
    from qlora.model import adapters, lora_functions
    from qlora.model.attention_choice import settle
    from qlora.model.made_up import load_random
    from qlora.model.meta_model import build_unmatched, choose_attention
    from qlora.recipe.sections import LoraSection, QuantizationSection
    from qlora.step.forward import CausalParts, forward_backward
    from qlora.step.kernels import trial
    from qlora.step.layerwise import set_gradient_checkpointing
    from qlora.step.loss import SupervisedObjective
    from qlora.step.optimizer import AdapterOptimizer

    text = AutoConfig.for_model("olmoe", **{**OLMOE, **sizes, "num_hidden_layers": layers})
    model = build_unmatched(text, choose_attention(text, "auto", "olmoe"), "olmoe")
    torch.manual_seed(1)
    load_random(model, QuantizationSection(), device)
    settle(model, "auto", device, Sinks())
    functions = lora_functions.choose(LoraSection(), None, trial.work(device))
    tuned = adapters.attach(model, LoraSection(r=16), 0, functions=functions).train()
    causal_lm = tuned.get_base_model()
    set_gradient_checkpointing(causal_lm, True, keep_random_state=False)
    optimizer, parts = AdapterOptimizer(adapters.trainable(tuned), "adamw_8bit", 0.0), CausalParts.of(causal_lm)
    objective = SupervisedObjective()

    def step(batch: Any) -> float:
        weight = objective.weight(batch)
        loss = forward_backward(parts, batch, objective, weight)
        optimizer.clip(optimizer.gradient_norm(), 1.0)
        optimizer.step(0.0)  # so that both forms train the same model throughout
        return float(loss) / weight  # which waits for the device

    return causal_lm, step


def figures(seconds: Sequence[float], tokens: int, peak: int, loss: float) -> dict[str, float]:
    rate = tokens / statistics.median(seconds[1:])
    return {"tokens_per_second": round(rate, 1), "peak_bytes": peak, "loss": round(loss, 4)}


def why_not() -> str:
    if find_spec("triton") is None:
        return "left out: Triton is not installed (pip install triton; on Windows triton-windows)"
    return "left out: the kernel does not compile for this card, or gives something else than it should"


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    main()
