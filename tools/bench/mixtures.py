"""Mixtures of experts by count and on the CPU: what published ones take, how fast a layer loads, and ways to hold one.

    python tools/bench/mixtures.py counts                       # five mixtures, 2,048 and 8,192 tokens, by config alone
    python tools/bench/mixtures.py counts --names gpt-oss-20b --tokens 2048 --out counts.json
    python tools/bench/mixtures.py load --experts 128           # a layer of Qwen3-30B's shape: 1.2 GB of disk, Linux
    python tools/bench/mixtures.py ways                         # one small layer: whole, PEFT's wrapper, ours

`counts`: GiB that a step needs with all of it on an RTX 4090 and streamed on an RTX 3070, by the estimator, beside a
sum by hand (`tests/memory/mixture_shapes.py`); tokens/s are predicted; `host reads` are how often a layer's pass waits
for numbers of the device, in a step. `load`: a process that loads one layer: seconds, values a second, anonymous memory
beside the slab at its peak, and what all layers of the model take at that rate. `ways`: bytes at the peak of one pass
forth and back above the weights, by the counter of the estimator on real tensors, and seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

GIB = 1 << 30
RESIDENT_CARD, STREAMED_CARD = "RTX 4090", "RTX 3070"
PLACES = {
    "resident": (RESIDENT_CARD, ("memory.stream_weights=false", 'memory.embedding="device"')),
    "streamed": (STREAMED_CARD, ("memory.stream_weights=true", 'memory.embedding="host"')),
}
FIXED = ("train.micro_batch_size=1", "train.gradient_checkpointing=true", "memory.offload_activations=false")
LAYER_OF = {"hidden": 2048, "inner": 768, "layers": 48, "experts": 128}  # Qwen3-30B-A3B


# --- counts ----------------------------------------------------------------------------------------------------------


@contextmanager
def host_reads() -> Iterator[list[int]]:
    """How often a step asks a card for bounds of experts: on meta they are an even split, asked for as often. (What
    looks at a model before, outside of the counter, is none.)"""
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    from qlora.step.experts import Routing

    seen: list[int] = []
    bounds = Routing.__dict__["bounds"]
    asked = bounds.func

    def noted(routing: Any) -> Any:
        if _get_current_dispatch_mode() is not None:
            seen.append(1)
        return asked(routing)

    bounds.func = noted
    try:
        yield seen
    finally:
        bounds.func = asked


def count(name: str, tokens: int, where: str, folder: Path) -> dict[str, Any]:
    """What the estimator says of one mixture at one place, and what it has seen of host reads in a layer's step."""
    from qlora import api
    from tests.memory.mixture_shapes import BY_HAND, folder_of

    card, place = PLACES[where]
    overrides = (f"data.max_length={tokens}", *FIXED, *place)
    question = api.question(api.recipe_or_model(str(folder_of(name, folder)), overrides), gpu=card)
    with host_reads() as reads:
        estimate = question.estimate()
    by_hand = BY_HAND[name][where == "streamed"][tokens > 2048]
    return {
        "name": name,
        "tokens": tokens,
        "place": where,
        "card": card,
        "gib": round(estimate.needed_bytes / GIB, 2),
        "by_hand_gib": by_hand,
        "limit_gib": round(estimate.limit_bytes / GIB, 2),
        "fits": estimate.fits,
        "waiting_gib": round(estimate.waiting_bytes / GIB, 2),
        "tokens_per_second": round(estimate.tokens_per_second),
        "reads_of_the_host": len(reads) > 0,
    }


def counts(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    from tests.memory.mixture_shapes import PUBLISHED

    found = []
    print(f"{'mixture':<18}{'tokens':>7} {'place':<9}{'GiB':>7}{'hand':>6}{'card':>6}  fits  tokens/s  host reads")
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("QLORA_CACHE", folder)  # simulated now, whatever was asked before
        for name in arguments.names or PUBLISHED:
            for tokens in arguments.tokens:
                for where in PLACES:
                    one = count(name, tokens, where, Path(folder))
                    fits, reads = ("yes" if one[key] else "no" for key in ("fits", "reads_of_the_host"))
                    head = f"{name:<18}{tokens:>7} {where:<9}{one['gib']:>7}{one['by_hand_gib']:>6}"
                    print(f"{head}{one['limit_gib']:>6}  {fits:<5}{one['tokens_per_second']:>8,}  {reads}", flush=True)
                    found.append(one)
    return found


# --- load ------------------------------------------------------------------------------------------------------------

_LOAD = """
import sys, time, torch
sys.path.insert(0, sys.argv[2])
from qlora.events import Recorder
from qlora.model.layer_blobs import stacks_of
from qlora.model.load import load_base
from qlora.model.resolve import resolve
from qlora.recipe.sections import QuantizationSection
from tools.bench.load import Peak
base = resolve(sys.argv[1], "main", Recorder())
cpu = torch.device("cpu")
with Peak() as peak:
    began = time.perf_counter()
    model = load_base(base, QuantizationSection(), "auto", cpu, Recorder())
    seconds = time.perf_counter() - began
stacks = [stack for _, stack in stacks_of(model)]
values = sum(stack.shape[0] * stack.shape[1] * stack.shape[2] for stack in stacks)
print(seconds, values, sum(stack.nbytes for stack in stacks), peak.most - peak.before)
"""


def write_layer(folder: Path, experts: int) -> None:
    """One layer of Qwen3-30B's widths with so many experts, random and in bf16, an expert a tensor."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig

    hidden, inner = LAYER_OF["hidden"], LAYER_OF["inner"]
    sizes = {"num_experts": experts, "num_experts_per_tok": 8, "num_hidden_layers": 1, "vocab_size": 384}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = AutoConfig.for_model(
        "qwen3_moe", hidden_size=hidden, moe_intermediate_size=inner, mlp_only_layers=[], decoder_sparse_step=1,
        **sizes, **heads,
    )  # fmt: skip
    config.architectures = ["Qwen3MoeForCausalLM"]
    config.save_pretrained(folder)
    layer = "model.layers.0"
    names: dict[str, tuple[int, ...]] = {f"{one}.weight": (384, hidden) for one in ("model.embed_tokens", "lm_head")}
    names |= {"model.norm.weight": (hidden,), f"{layer}.mlp.gate.weight": (experts, hidden)}
    names |= {f"{layer}.{norm}.weight": (hidden,) for norm in ("input_layernorm", "post_attention_layernorm")}
    names |= {f"{layer}.self_attn.{one}_proj.weight": (rows, hidden) for one, rows in (("q", 64), ("k", 32), ("v", 32))}
    names |= {f"{layer}.self_attn.o_proj.weight": (hidden, 64)}
    names |= {f"{layer}.self_attn.{one}_norm.weight": (16,) for one in "qk"}
    for expert in range(experts):
        names |= {f"{layer}.mlp.experts.{expert}.{one}_proj.weight": (inner, hidden) for one in ("gate", "up")}
        names[f"{layer}.mlp.experts.{expert}.down_proj.weight"] = (hidden, inner)
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator).mul_(0.02).bfloat16() for name, shape in names.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        write_layer(Path(folder), arguments.experts)
        runs = []
        for _ in range(arguments.repeats):
            command = [sys.executable, "-c", _LOAD, folder, str(ROOT)]
            done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
            runs.append([float(value) for value in done.stdout.split()[-4:]])
    seconds = statistics.median(run[0] for run in runs)
    values, held, most = runs[0][1], runs[0][2], statistics.median(run[3] for run in runs)
    whole = LAYER_OF["layers"] * LAYER_OF["experts"] / arguments.experts * seconds
    found = {
        "experts": arguments.experts,
        "seconds": round(seconds, 2),
        "values_per_second": round(values / seconds),
        "slab_mib": round(held / 2**20, 1),
        "scratch_mib": round((most - held) / 2**20, 1),
        "whole_model_seconds": round(whole, 1),
        "load_average": os.getloadavg()[0],
    }
    print(f"{values / 1e6:,.0f} M values in {seconds:.2f} s: {values / seconds / 1e6:,.0f} M a second")
    print(f"slab {held / 2**20:.0f} MiB, beside it at the peak {(most - held) / 2**20:.0f} MiB")
    print(f"all {LAYER_OF['layers']} layers of Qwen3-30B-A3B at that rate: {whole:.0f} s")
    return [found]


# --- ways ------------------------------------------------------------------------------------------------------------


class Small:
    """One layer of experts, 16 of 1024 x 384, and 256 tokens with 4 of them each, in fp32."""

    def __init__(self) -> None:
        import torch
        from transformers import AutoConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        shape = {"hidden_size": 1024, "moe_intermediate_size": 384, "num_experts": 16, "num_experts_per_tok": 4}
        self.config = AutoConfig.for_model("qwen3_moe", **shape)
        generator = torch.Generator().manual_seed(0)
        self.hidden_TH = torch.randn(256, 1024, generator=generator)
        self.index_TK = torch.rand(256, 16, generator=generator).topk(4, dim=1).indices
        self.weights_TK = torch.rand(256, 4, generator=generator).softmax(dim=1)
        self._kind, self._generator = Qwen3MoeExperts, generator

    def experts(self, implementation: str) -> Any:
        """The module with random weights, frozen."""
        import torch

        self.config._experts_implementation = implementation
        module = self._kind(self.config)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=self._generator) * 0.02)
        return module.requires_grad_(False)

    def step(self, module: Any) -> None:
        hidden_TH = self.hidden_TH.clone().requires_grad_()
        module(hidden_TH, self.index_TK, self.weights_TK).sum().backward()


def whole(small: Small) -> Any:
    """4 bit in a parametrization (bitsandbytes' own): all experts dequantized at once, and kept by autograd."""
    from qlora.third_party import import_bitsandbytes

    import_bitsandbytes()
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    module = small.experts("grouped_mm")
    for name in ("gate_up_proj", "down_proj"):
        replace_parameter_4bit(module, name, compress_statistics=True, quant_type="nf4")
    return module


def wrapper(small: Small) -> Any:
    """PEFT's `target_parameters` of rank 16, which need weights in floating point: W + BA of all experts is made."""
    from peft import LoraConfig, inject_adapter_in_model
    from torch import nn

    root = nn.ModuleDict({"experts": small.experts("grouped_mm")})
    config = LoraConfig(r=16, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    inject_adapter_in_model(config, root)
    return root["experts"]


def ours(small: Small) -> Any:
    """Slabs, read in chunks of whole experts, of which only places are kept."""
    import torch

    from qlora.model import experts
    from qlora.model.nf4 import quantize_rows
    from qlora.recipe.sections import QuantizationSection
    from qlora.step.experts import NAME

    experts.register()
    module, section, cpu = small.experts(NAME), QuantizationSection(), torch.device("cpu")
    for name in ("gate_up_proj", "down_proj"):
        values = module._parameters.pop(name)
        slab = experts.Slab(tuple(values.shape), section)
        slab.allocate(cpu)
        for number, expert in enumerate(values):
            read = lambda start, end, expert=expert: expert[start:end].bfloat16()  # noqa: E731
            slab.put(number, quantize_rows(read, tuple(expert.shape), "nf4", True, cpu))
        module.add_module(name, slab)
    return module


WAYS: dict[str, Callable[[Small], Any]] = {"whole layer": whole, "PEFT's wrapper": wrapper, "ours": ours}


def ways(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    from qlora.memory.trace import LiveBytes

    small, found = Small(), []
    for name, make in WAYS.items():
        module = make(small)
        held = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
        small.step(module)  # what is made once is made now
        live = LiveBytes("cpu")
        with live:
            live.begin("step")
            small.step(module)
        seconds = []
        for _ in range(arguments.repeats):
            began = time.perf_counter()
            small.step(module)
            seconds.append(time.perf_counter() - began)
        one = {
            "way": name,
            "weights_mib": round(held / 2**20, 1),
            "peak_mib": round(live.peaks["step"].total / 2**20, 1),
        }
        one["seconds"] = round(statistics.median(seconds), 3)
        print(
            f"{name:<16} weights {one['weights_mib']:>6} MiB, a pass {one['peak_mib']:>6} MiB, {one['seconds']:.3f} s"
        )
        found.append(one)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    asked = commands.add_parser("counts")
    asked.add_argument("--names", nargs="*")
    asked.add_argument("--tokens", nargs="*", type=int, default=[2048, 8192])
    loaded = commands.add_parser("load")
    loaded.add_argument("--experts", type=int, default=LAYER_OF["experts"])
    tried = commands.add_parser("ways")
    for command in (asked, loaded, tried):
        command.add_argument("--out", type=Path)
        command.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    found = {"counts": counts, "load": load, "ways": ways}[arguments.command](arguments)
    if arguments.out is not None:
        about = {"machine": platform.processor() or platform.machine(), "load_average": os.getloadavg()[0]}
        arguments.out.write_text(json.dumps({"command": arguments.command, **about, "found": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
