"""Trained tokens a second and peak memory of one training step, ours and another stack's, in one run.

    python tools/bench/step.py --base recipes/quickstart/base --length 400 --vs trl --trl-python VENV/bin/python
    python tools/bench/step.py --shape 8b --length 2048 --vs trl --trl-python VENV/bin/python
    python tools/bench/step.py --shape 8b --length 2048 --vs unsloth --unsloth-python VENV/bin/python
    python tools/bench/step.py --base recipes/quickstart/base --length 400 --objective dpo --vs trl --vs trl-once \
        --trl-python VENV/bin/python

Each stack works in a process of its own, and the processes take turns (ours, theirs, ours, theirs, …), so that a
machine that grows warm or is shared weighs on both alike. Both read the same base from the same folder, train the same
rows of random tokens, every token trained, with the same adapters and optimizer. Ours is measured a second time with
several documents a row (--documents), as real packs have them: other kernels keep them apart. With `--objective dpo` a
row is a pair, of whose two answers every token is trained; our reference has been asked before the first step, TRL's is
asked within each, and as `trl-once` before them (`precompute_ref_log_probs`). The figures go into a
table and, with hardware, versions and commit, into a JSON file in tools/bench/results/.
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
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from step_measure import Settings

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
# hidden, inner, layers, heads, key-value heads, vocabulary, tied: the shapes of Llama 3.2 1B and 3B, Llama 3.1 8B, and
# a 14B of Qwen3's width.
SHAPES: dict[str, tuple[int, int, int, int, int, int, bool]] = {
    "1b": (2048, 8192, 16, 32, 8, 128256, True),
    "3b": (3072, 8192, 28, 24, 8, 128256, True),
    "8b": (4096, 14336, 32, 32, 8, 128256, False),
    "14b": (5120, 17408, 40, 40, 8, 151936, False),
}
PACKED = "qlora, packed"  # ours with several documents a row, beside ours with one
ONCE = "trl-once"  # TRL's reference asked before the steps, as ours is
MARK = "BENCH-RESULT "
FIGURES = ("trained_tokens_per_second", "peak_bytes")


def main() -> None:
    arguments = parse()
    if arguments.worker:
        print(MARK + json.dumps(work(arguments.worker, Settings(**json.loads(arguments.settings)))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        base = arguments.base or str(random_base(arguments.shape, Path(scratch)))
        settings = Settings(
            base=str(Path(base).resolve()),
            rows=arguments.rows,
            length=arguments.length,
            accumulation=arguments.accumulation,
            steps=arguments.steps,
            r=arguments.r,
            optimizer=arguments.optimizer,
            gradient_checkpointing=arguments.checkpointing == "both",
            theirs_checkpointing=arguments.checkpointing != "none",
            threads=arguments.threads,
            objective=arguments.objective,
        )
        packed = [PACKED] if arguments.documents > 1 and arguments.objective == "sft" else []
        stacks = ["qlora", *packed, *arguments.vs]
        found: dict[str, list[dict[str, Any]]] = {stack: [] for stack in stacks}
        for turn in range(arguments.repeats):
            for stack in stacks:
                print(f"turn {turn + 1} of {arguments.repeats}: {stack}", file=sys.stderr)
                pythons = {"trl": arguments.trl_python, ONCE: arguments.trl_python, "unsloth": arguments.unsloth_python}
                python = pythons.get(stack, sys.executable)
                asked = replace(settings, documents=arguments.documents) if stack == PACKED else settings
                asked = replace(settings, asks_once=True) if stack == ONCE else asked
                found[stack].append(run_worker(stack, python, asked))
        report = summary(settings, found, arguments.shape if not arguments.base else Path(base).name)
    show(report)
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / f"{arguments.name or default_name(report)}.json"
    file.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\n{file}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="folder of a base; without it, --shape with random weights")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1b")
    parser.add_argument("--rows", type=int, default=1, help="rows of a micro-batch")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--documents", type=int, default=4, help=f"of a row in the runs called {PACKED!r}; 1: none")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after one that is not")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each stack")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--optimizer", default="adamw", choices=["adamw", "adamw_8bit", "paged_adamw_8bit"])
    parser.add_argument(
        "--checkpointing",
        choices=["both", "theirs", "none"],
        default="both",
        help="who recomputes layers; 'theirs': what the defaults of both do where memory allows it",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads of each process")
    parser.add_argument("--objective", choices=["sft", "dpo"], default="sft")
    parser.add_argument(
        "--vs", choices=["trl", ONCE, "unsloth"], action="append", default=[], help="a stack beside ours"
    )
    parser.add_argument("--trl-python", default=sys.executable, help="python of an environment with trl")
    parser.add_argument("--unsloth-python", default=sys.executable, help="python of one with unsloth")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", help="name of the results file")
    parser.add_argument("--worker", choices=["qlora", PACKED, "trl", ONCE, "unsloth"], help=argparse.SUPPRESS)
    parser.add_argument("--settings", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.objective == "sft" and ONCE in asked.vs:
        parser.error("--vs trl-once: supervised rows are compared with no reference; give --objective dpo")
    if asked.objective == "dpo" and "unsloth" in asked.vs:
        parser.error("--vs unsloth: pairs are measured beside TRL alone")
    return asked


def run_worker(stack: str, python: str, settings: Settings) -> dict[str, Any]:
    """One process of a stack; its figures."""
    command = [python, __file__, "--worker", stack, "--settings", json.dumps(asdict(settings))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(settings.threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not lines:
        sys.exit(f"{stack} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    figures: dict[str, Any] = json.loads(lines[0].removeprefix(MARK))
    return figures


def work(stack: str, settings: Settings) -> dict[str, Any]:
    """In a process of its own: the figures of a stack, none of whose packages has been imported before."""
    sys.path.insert(0, str(ROOT))
    if stack in ("qlora", PACKED):
        from qlora.third_party import let_waiting_threads_sleep

        let_waiting_threads_sleep()  # before torch is imported, as our commands do
        import step_qlora

        return step_qlora.run(settings)
    if stack == "unsloth":
        import step_unsloth

        return step_unsloth.run(settings)
    import step_trl

    return step_trl.run(settings)


def random_base(shape: str, parent: Path) -> Path:
    """A folder with a Llama of that shape and random weights, written tensor by tensor."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    hidden, inner, layers, heads, kv_heads, vocabulary, tied = SHAPES[shape]
    config = AutoConfig.for_model(
        "llama",
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    names = {name: parameter.shape for name, parameter in model.named_parameters()}
    config.save_pretrained(parent)
    generator = torch.Generator().manual_seed(1)
    weight_map = {}
    for number, (name, size) in enumerate(names.items(), 1):
        file = f"model-{number:05d}-of-{len(names):05d}.safetensors"
        wide = len(size) > 1
        tensor = torch.randn(size, generator=generator).mul_(0.02) if wide else torch.ones(size)
        save_file({name: tensor.bfloat16()}, parent / file, metadata={"format": "pt"})
        weight_map[name] = file
    index = {"metadata": {}, "weight_map": weight_map}
    (parent / "model.safetensors.index.json").write_text(json.dumps(index))
    return parent


def summary(settings: Settings, found: Mapping[str, list[dict[str, Any]]], name: str) -> dict[str, Any]:
    """The report: medians of the turns, the ratio to the other stack, and on a known GPU the share of the ideal."""
    medians = {
        stack: {key: statistics.median(turn[key] for turn in turns) for key in FIGURES}
        for stack, turns in found.items()
    }
    ours = medians["qlora"]
    report: dict[str, Any] = {
        "base": name,
        "settings": {key: value for key, value in asdict(settings).items() if key != "base"},
        "hardware": {"device": found["qlora"][0]["device"], "processor": processor(), "threads": settings.threads},
        "platform": platform.platform(terse=True),
        "commit": commit(),
        "versions": {stack: turns[0]["versions"] for stack, turns in found.items()},
        "medians": medians,
        "ratio": {
            stack: {key: round(ours[key] / value, 3) for key, value in other.items()}
            for stack, other in medians.items()
            if stack not in ("qlora", PACKED)
        },
        **{
            share: statistics.median(turn.get(share, 0.0) for turn in found["qlora"]) or None
            for share in ("share_of_limit", "share_of_fp32")
        },
        "share_of_ideal": ideal_share(settings, found["qlora"][0]["device"], ours["trained_tokens_per_second"]),
        "turns": dict(found),
    }
    return report


def ideal_share(settings: Settings, device: str, tokens_per_second: float) -> float | None:
    """Of what arithmetic and dequantization allow on this card (qlora.memory.throughput); None on a CPU."""
    sys.path.insert(0, str(ROOT))
    from qlora.memory import hardware
    from qlora.memory.simulate import Simulator
    from qlora.memory.simulation import ModelSpec, Workload
    from qlora.memory.throughput import ideal_tokens_per_second
    from qlora.model.meta_model import text_config
    from qlora.model.tensors import load_json
    from qlora.recipe.sections import LoraSection, QuantizationSection

    if device == "cpu":
        return None
    gpu = hardware.this_machine().gpu
    text, _ = text_config(load_json(Path(settings.base) / "config.json"), settings.base)
    simulator = Simulator(ModelSpec(text, settings.base, LoraSection(r=settings.r), QuantizationSection()))
    workload = Workload(settings.rows, settings.length, settings.gradient_checkpointing, settings.optimizer)
    if gpu is None:
        return None
    return round(tokens_per_second / ideal_tokens_per_second(text, workload, simulator.drawn.values, gpu), 3)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def default_name(report: Mapping[str, Any]) -> str:
    device = "cpu" if report["hardware"]["device"] == "cpu" else report["hardware"]["device"].lower().replace(" ", "-")
    settings = report["settings"]
    step = "step" if settings["objective"] == "sft" else f"step-{settings['objective']}"
    return f"{step}-{device}-{report['base']}-{settings['rows']}x{settings['length']}-r{settings['r']}"


def show(report: Mapping[str, Any]) -> None:
    unit = " of each side of a pair" if report["settings"]["objective"] == "dpo" else ""
    print(f"{report['base']}: {report['settings']['rows']} × {report['settings']['length']} tokens{unit}, ", end="")
    print(f"r {report['settings']['r']}, {report['settings']['optimizer']}, on {report['hardware']['device']}")
    print(f"{'':14}{'trained tokens/s':>18}{'peak MiB':>12}")
    for stack, figures in report["medians"].items():
        print(f"{stack:14}{figures['trained_tokens_per_second']:>18,.1f}{figures['peak_bytes'] / 2**20:>12,.1f}")
    for stack, ratio in report["ratio"].items():
        told = f"{ratio['trained_tokens_per_second']:.2f}× as fast, {ratio['peak_bytes']:.2f}× the peak"
        print(f"ours against {stack}: {told}")
    if report["share_of_limit"] is not None:
        told = f"{report['share_of_limit']:.1%}, of those in float32 {report['share_of_fp32']:.1%}"
        print(f"of what the processor's matrix products allow: {told}")
    if report["share_of_ideal"] is not None:
        print(f"share of the ideal: {report['share_of_ideal']:.1%}")


if __name__ == "__main__":
    main()
