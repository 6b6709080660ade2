"""What tests of checkpoints share: an optimizer after a step, and what a manifest says of the run."""

from __future__ import annotations

import torch

from qlora.step.optimizer import AdapterOptimizer

ABOUT = {"versions": {"qlora": "1.2.3", "torch": "2.10.0"}, "recipe_sha256": "ab" * 32}


def optimizer() -> AdapterOptimizer:
    """After one step over four small matrices; the same values each time."""
    torch.manual_seed(0)
    parameters = {
        f"base_model.model.l{i}.lora_{m}.default.weight": torch.nn.Parameter(torch.randn(4, 8).bfloat16())
        for i in (0, 1)
        for m in "AB"
    }
    made = AdapterOptimizer(parameters, "adamw", 0.0)
    for key, master in made.masters.items():
        made.add_gradient(key, torch.randn_like(master))
    made.gradient_norm()
    made.step(1e-3)
    return made
