"""Published peaks of training runs beside what our simulation predicts for the same settings.

    python tools/bench/peaks.py            # simulates every row (four minutes), keeps that, prints the table
    python tools/bench/peaks.py --kept     # the table from what was simulated before
    python tools/bench/peaks.py --blind    # the same of the rows that nothing was set by; with --kept too

`results/peaks.json` holds the published rows (address, settings, what was measured) and the sources' roles: margins
were set by those called "fitting", and looked at beside those called "held out" (README.md says how far);
`peaks-blind.json` was written down, settings and all, before a row of it was simulated, and says which of it turned
out not to be peaks of stated settings. A row is there only if each of its settings that matters is stated and can be
expressed; measured is `allocated` (torch's live tensors), `reserved` (what torch took from the driver) or `process`
(that and the context).
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
from stacks import Stack

from qlora.memory import margins, overheads
from qlora.memory.baselines import Baseline
from qlora.memory.calibration import Correction
from qlora.memory.hardware import Gpu
from qlora.memory.simulate import Simulator
from qlora.memory.simulation import ModelSpec, Workload
from qlora.recipe.sections import LoraSection, QuantizationSection

FILE = Path(__file__).resolve().parent / "results/peaks.json"
BLIND = FILE.with_name("peaks-blind.json")
TARGETS: Mapping[str, tuple[str, ...]] = {
    "qv": ("q_proj", "v_proj"),
    "qkvo": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "all": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
# Compute capability and memory of the cards that rows name: what workspaces and the context depend on.
CARDS = {
    "T4": (75, 16),
    "A100": (80, 40),
    "A100 80GB": (80, 80),
    "RTX 4080": (89, 16),
    "RTX 4090": (89, 24),
    "H100": (90, 80),
    "RTX 5060 Laptop": (120, 8),
    "RTX 5060 Ti": (120, 16),
    "RTX PRO 6000": (120, 96),
}
F32, BF16 = torch.float32, torch.bfloat16
_TRAINER: Mapping[str, Any] = {"dtype": BF16, "adapter_dtype": F32, "loss": "shifted", "reentrant": True}
# trl's SFTTrainer over a base in 4 bit: peft casts all of it to float32, and trl embeddings and head back, not the
# norms (trl/trainer/utils.py, peft_module_casting_to_bf16)
_TRL: Mapping[str, Any] = {**_TRAINER, "autocast": True, "casts_back": True, "norms": F32}
STACKS: Mapping[str, Mapping[str, Any]] = {
    # a loop of one's own over peft: prepare_model_for_kbit_training, float16, no autocast, the output kept
    "peft loop": {"dtype": F32, "adapter_dtype": F32, "keeps_logits": True, "half": True},
    # transformers' Trainer (4.48): adapters in float32, the base as it was loaded; autocast where bf16 is asked for
    "trainer, 16 bit": _TRAINER,
    "trainer, 4 bit": {**_TRAINER, "autocast": True},
    # and with 4.45, whose models give float32 logits
    "trainer 4.45, 16 bit": {**_TRAINER, "float_logits": True},
    "trainer 4.45, 4 bit": {**_TRAINER, "float_logits": True, "autocast": True},
    # and through trl's SFTTrainer, with 4.45 and before, and with 4.48
    "trl 0.9, 4 bit": {**_TRL, "float_logits": True},
    "trl 0.13, 4 bit": _TRL,
    # with 4.32 and peft 0.5, asked for bf16; Qwen's own model leaves its logits as they are. peft 0.6 gave adapters the
    # base's type
    "trainer 4.32, 16 bit": {**_TRAINER, "loss": "shifted, then float", "autocast": True},
    # the same in float32: transformers 5 takes the loss of logits as they are; recomputation by peft's default and not
    "peft loop, float32": {
        "dtype": F32,
        "adapter_dtype": F32,
        "keeps_logits": True,
        "holds_output": True,
        "reentrant": True,
    },
    "peft loop, float32, not reentrant": {"dtype": F32, "adapter_dtype": F32, "keeps_logits": True},
    # over a base in bf16, whose logits the loss takes to float32; and under autocast over a quantized one
    "peft loop, bf16": {"dtype": BF16, "adapter_dtype": F32, "keeps_logits": True, "holds_output": True},
    "peft loop, autocast": {"dtype": F32, "adapter_dtype": F32, "keeps_logits": True, "autocast": True},
    # a loop of one's own over peft: a bf16 base, adapters in float32, the loss of bf16 logits
    "bf16 loop": {"dtype": BF16, "adapter_dtype": F32, "loss": "shifted as they are"},
    # and over a quantized base that peft prepared: all that is not in 4 bit in float32
    "bf16 loop, kbit": {"dtype": F32, "adapter_dtype": F32, "loss": "shifted as they are"},
    # a loop that measures memory: all in bf16, float32 logits that it keeps, their mean for a loss
    "mean of logits": {
        "dtype": BF16,
        "adapter_dtype": BF16,
        "keeps_logits": True,
        "float_logits": True,
        "loss": "mean",
        "keeps_inputs": True,
    },
}


@dataclass(frozen=True)
class Simulated:
    """What the simulation says of a row, in bytes: all that predictions and margins are made of."""

    tensors: int
    weights: int
    cast: int
    beyond: int


@dataclass(frozen=True)
class Compared:
    """One row: bytes measured, predicted, and the margin, of the widest thing that was measured."""

    source: str
    what: str
    measured: int
    predicted: int
    error: int

    @property
    def off(self) -> float:
        return self.predicted / self.measured - 1

    @property
    def over(self) -> float:
        """How much too much is asked for, with the margin; below 0 a run would not fit that was said to."""
        return (self.predicted + self.error) / self.measured - 1


def simulate(row: Mapping[str, Any], shapes: Mapping[str, Any], known: dict[str, Simulator]) -> Simulated:
    """`known` keeps simulators, which differ by model and not by workload."""
    settings = row["settings"]
    made_of = ("quantization", "double_quant", "r", "dropout", "targets", "attention")
    key = json.dumps([row["model"], row["stack"], *(settings.get(name) for name in made_of)])
    if key not in known:
        known[key] = Simulator(_spec(row, shapes))
    simulator = known[key]
    workload = Workload(
        settings["rows"],
        settings["length"],
        settings["recompute"],
        optimizer=settings.get("optimizer", "adamw"),
        packed=False,
        accumulates=settings.get("accumulates", False),
        evaluates=False,
    )
    done = simulator.run(workload)
    worst = done.worst
    return Simulated(
        worst.total + worst.slack, worst.parts["weights"], simulator.drawn.cast_bytes, done.reserved.beyond
    )


def _spec(row: Mapping[str, Any], shapes: Mapping[str, Any]) -> ModelSpec:
    from transformers import AutoConfig

    settings = row["settings"]
    shape = dict(shapes[row["model"]])
    text = AutoConfig.for_model(shape.pop("family"), max_position_embeddings=32768, **shape)
    kernel = settings["attention"] if settings["attention"] != "eager" else None
    stack: Baseline = Stack(row["stack"], masters=False, kernel=kernel, **STACKS[row["stack"]])
    lora = LoraSection(
        r=settings["r"], dropout=settings.get("dropout", 0.0), target_modules=TARGETS[settings["targets"]]
    )
    quantization = QuantizationSection(type=settings["quantization"], double_quant=settings["double_quant"])
    attention = "eager" if kernel is None else "auto"
    return ModelSpec(text, row["model"], lora, quantization, attention, "cuda", stack)


def compare(row: Mapping[str, Any], simulated: Simulated) -> Compared:
    """As `qlora-estimate` puts it together, of the widest thing that the row measured."""
    settings, measured = row["settings"], row["measured"]
    capability, gigabytes = CARDS[settings["card"]]
    gpu = Gpu(settings["card"], gigabytes, gigabytes << 30, 0.0, 0.0, capability)
    predicted = simulated.tensors + sum(overheads.workspace_terms(capability).values())
    gap = margins.Gaps(simulated.weights, simulated.cast)
    error = margins.of_tensors(simulated.tensors, Correction())
    what = next(name for name in ("process", "reserved", "allocated") if name in measured)
    if what != "allocated":
        predicted += simulated.beyond
        error += margins.of_gaps(simulated.tensors, gap)
    if what == "process":
        context, of_context = overheads.context_bytes(gpu)
        predicted, error = predicted + context, error + of_context
    return Compared(row["source"], what, measured[what], predicted, error)


def table(content: Mapping[str, Any]) -> list[str]:
    """A line a row, and for each source and role what the issue of an estimate is: median and worst."""
    lines = [f"{'model':24}{'settings':46}{'what':10}{'measured':>9}{'said':>8}{'margin':>8}{'off':>8}{'over':>8}"]
    found: dict[str, list[Compared]] = {}
    left_out = content.get("left out", {})
    for row in content["rows"]:
        one, source = compare(row, Simulated(**row["simulated"])), row["source"]
        role = content["roles"][source]
        for group in (source, role, "all") if source not in left_out else (f"{source}, left out",):
            found.setdefault(group, []).append(one)
        settings = row["settings"]
        words = f"{row['stack']}, {settings['quantization']}, {settings['rows']} x {settings['length']}"
        sizes = "".join(f"{count / 2**30:>8.2f}" for count in (one.measured, one.predicted, one.error))
        words = f"{words}, {settings['attention']}"
        lines.append(f"{row['model'][:23]:24}{words[:45]:46}{one.what:10} {sizes}{one.off:>8.1%}{one.over:>8.1%}")
    lines += [summary(group, of_group) for group, of_group in found.items()]
    return lines + [f"{source} is left out: {reason}" for source, reason in left_out.items()]


def summary(name: str, rows: Sequence[Compared]) -> str:
    off = statistics.median(abs(one.off) for one in rows)
    over = [one.over for one in rows]
    return (
        f"{name}: {len(rows)} rows; off {off:.1%} in the median; with the margin over by {statistics.median(over):.1%}"
        f" in the median, {max(over):.1%} at most; under in {sum(one < 0 for one in over)}"
    )


def main() -> None:
    file = BLIND if "--blind" in sys.argv[1:] else FILE
    content = json.loads(file.read_text())
    if "--kept" not in sys.argv[1:]:
        known: dict[str, Simulator] = {}
        for row in content["rows"]:
            row["simulated"] = vars(simulate(row, content["shapes"], known))
        rows = ",\n".join(json.dumps(row) for row in content["rows"])
        head = {key: value for key, value in content.items() if key != "rows"}
        file.write_text(json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n{rows}\n]}}\n')
    print("\n".join(table(content)))


if __name__ == "__main__":
    main()
