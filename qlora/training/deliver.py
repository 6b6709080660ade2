"""The folder `adapter/`: the adapter that a run delivers, as PEFT and a person read it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora import __version__, disk
from qlora.events import Saved, Sink
from qlora.model import adapters
from qlora.model.base_folder import BaseFolder
from qlora.model.tokenizer import copy_tokenizer
from qlora.recipe.reading import Recipe, recipe_toml
from qlora.recipe.sections import QuantizationSection
from qlora.training.checkpoint import RunState

PROVENANCE_FILE = "qlora.json"


@dataclass(frozen=True)
class Provenance:
    """What an adapter was trained against. `fingerprint` is None where the adapter is not ours."""

    base: str
    revision: str
    fingerprint: str | None
    quantization: QuantizationSection


def provenance(folder: Path, adapter_config: Mapping[str, Any]) -> Provenance:
    """From our own file in the adapter's folder, or from PEFT's config alone for an adapter made elsewhere."""
    file = folder / PROVENANCE_FILE
    if file.is_file():
        said = json.loads(file.read_text(encoding="utf-8"))
        quantization = QuantizationSection(**said["quantization"])
        return Provenance(said["base"], said["revision"], said["fingerprint"], quantization)
    base = str(adapter_config.get("base_model_name_or_path") or "")
    return Provenance(base, str(adapter_config.get("revision") or "main"), None, QuantizationSection())


def delivered_step(run_dir: Path) -> int | None:
    """The step of the adapter that lies in a run's folder, by its own word; None where there is none."""
    try:
        return int(json.loads((run_dir / "adapter" / PROVENANCE_FILE).read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True)
class Delivery:
    """What the delivered folder says about the run."""

    model: Any
    base: BaseFolder
    recipe: Recipe
    template: str | None
    train_rows: int
    eval_rows: int

    def publish(self, run_dir: Path, state: RunState, sink: Sink) -> None:
        """Write `run_dir/adapter` anew, in one rename."""

        def write(folder: Path) -> None:
            adapters.save(self.model, folder, self.base.name, self.base.commit)
            copy_tokenizer(self.base.path, folder, self.template)
            (folder / "README.md").write_text(self.card(state), encoding="utf-8")
            said = {**self.provenance(), "step": state.step}
            disk.write_atomic(folder / PROVENANCE_FILE, json.dumps(said, indent=1) + "\n")

        size = disk.publish_folder(run_dir / "adapter", write)
        sink.emit(Saved("adapter", state.step, str(run_dir / "adapter"), size))

    def provenance(self) -> dict[str, Any]:
        return {
            "version": __version__,
            "base": self.base.name,
            "revision": self.base.commit or self.recipe.model.revision,
            "fingerprint": self.base.fingerprint,
            "quantization": self.recipe.quantization.model_dump(mode="json"),
        }

    def card(self, state: RunState) -> str:
        """The model card: Markdown with the hub's metadata header."""
        revision = self.base.commit or "a local folder"
        train = "not measured" if state.train_loss is None else f"{state.train_loss:.4f}"
        measured = "not measured (no evaluation rows)" if state.eval_loss is None else f"{state.eval_loss:.4f}"
        before, after = state.exact_match_before, state.exact_match_after
        matches = (
            "" if before is None or after is None else f"| exact match | {before:.1%} before, {after:.1%} after |\n"
        )
        return f"""---
base_model: {self.base.name}
library_name: peft
tags: [lora, qlora]
---

# LoRA adapter for {Path(self.base.name).name}

Trained with QLoRA: the base frozen in {self.recipe.quantization.type.upper()}, this adapter in bf16.

| | |
| --- | --- |
| base | {self.base.name} |
| revision | {revision} |
| training rows | {self.train_rows} |
| evaluation rows | {self.eval_rows} |
| optimizer steps | {state.step} |
| trained tokens | {state.trained_tokens} |
| training loss of the last step | {train} nats a token |
| evaluation loss | {measured} nats a token |
{matches}
The recipe, with every default written out:

```toml
{recipe_toml(self.recipe).strip()}
```
"""
