"""The folder `adapter/`: the adapter that a run delivers, as PEFT and a person read it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora import disk
from qlora.events import Saved, Sink
from qlora.model import adapters
from qlora.model.adapter_folder import PROVENANCE_FILE
from qlora.model.base_folder import BaseFolder
from qlora.model.tokenizer import copy_tokenizer
from qlora.recipe.reading import Recipe, recipe_toml
from qlora.training.checkpoint import RunState
from qlora.version import __version__


@dataclass(frozen=True)
class BestAdapter:
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
