"""What lies beside the weights: the model card, export.json, and for Ollama the Modelfile."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qlora import __version__, disk
from qlora.errors import UserError
from qlora.events import Notice, Sink
from qlora.export import ollama
from qlora.export.artifacts import Artifact, Source
from qlora.export.gguf.metadata import licence_of
from qlora.export.merge.merge import Merge
from qlora.export.ollama import OllamaModel
from qlora.export.verify.fidelity import Fidelity
from qlora.export.verify.reference import TrainedReference
from qlora.model.base_folder import BaseFolder
from qlora.model.tensors import load_json

EXPORT_FILE = "export.json"
MODEL_FILE = "Modelfile"


def fidelity_markdown(table: Sequence[Fidelity], texts: str) -> str:
    """The table of fidelity as Markdown, empty when nothing was measured."""
    if not table:
        return ""
    lines = [
        "## How near it is to the trained model",
        "",
        f"Measured at {table[0].positions:,} tokens of {table[0].rows:,} {texts}.",
        "",
        "| | mean KL, nats a token | perplexity | same most likely token | bytes | measured by |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for line in table:
        size = f"{line.bytes:,}" if line.bytes else ""
        kl = "0" if line.kl == 0 else f"{line.kl:.1e}"
        lines.append(f"| {line.name} | {kl} | {line.perplexity:.4f} | {line.top1:.1%} | {size} | {line.measured_by} |")
    return "\n".join(lines) + "\n"


def shown_name(base: BaseFolder) -> str:
    """A base's name as a published file may tell it: the hub's, or a folder's without the folders above."""
    return base.name if base.commit is not None else Path(base.name).name


def gguf_card(source: Source, product: Artifact, file: str, merge: Merge | None, fidelity: str) -> str:
    """The card of a folder with a GGUF file."""
    base = shown_name(source.base)
    held = {"nf4": "its weights as 4-bit training saw them (dequantized)", "full": "its original weights"}
    made = (
        f"{base}, {held[merge.merge_base]}, with {len(source.adapter.parameters)} trained weights merged in"
        if merge is not None
        else f"the LoRA adapter alone, to be put on {base}"
    )
    license_line = f"license: {said}\n" if (said := licence_of(source.base.path).get("")) else ""
    run = (
        f"llama-cli -m {file}"
        if merge is not None
        else f"llama-cli -m THE-BASE.gguf --lora {file}   # the base as GGUF, of any quantization"
    )
    return f"""---
base_model: {base}
{license_line}library_name: gguf
tags: [qlora, gguf]
---

# {Path(base).name} · {source.name}{f" · {product.quant.upper()}" if product.quant else ""}

Made from {made}.

```bash
{run}
ollama create {ollama.model_name(source.name)} -f {MODEL_FILE} && ollama run {ollama.model_name(source.name)}
```

{fidelity}"""


def export_json(
    source: Source, product: Artifact, merge: Merge | None, more: Mapping[str, Any], table: Sequence[Fidelity]
) -> str:
    """What was exported from what, and how near it is: for programs."""
    content = {
        "version": __version__,
        "format": product.key,
        "base": shown_name(source.base),
        "revision": source.origin.revision,
        "base_fingerprint": source.base.fingerprint,
        "merge_base": merge.merge_base if merge is not None else None,
        "merged": len(source.adapter.parameters) if merge is not None else 0,
        "quantization": source.origin.quantization.model_dump(mode="json"),
        **more,
        "fidelity": [asdict(line) for line in table],
    }
    return json.dumps(content, indent=1) + "\n"


def add_stop_token(folder: Path, end_ids: Sequence[int], sink: Sink) -> None:
    """Let a folder of safetensors stop where training taught it to: at the first of `end_ids`, the turn's own end.

    transformers stops at generation_config.json's ids alone (config.json's where there is no such file). A base whose
    own do not name the trained end would never stop; it is added to them.
    """
    file = folder / "generation_config.json"
    said = load_json(file) if file.is_file() else {}
    eos = said.get("eos_token_id", load_json(folder / "config.json").get("eos_token_id"))
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not end_ids or end_ids[0] in ids:
        return
    said["eos_token_id"] = [end_ids[0], *ids]
    disk.write_atomic(file, json.dumps(said, indent=2) + "\n")
    message = (
        f"the trained answers end with token {end_ids[0]}, which the base does not stop at: added to its end tokens"
    )
    sink.emit(Notice("export", message))


def modelfile(study: TrainedReference, weights: str, adapter: str | None, add_bos: bool) -> str:
    """The Modelfile of `weights` (a GGUF's name, or for an adapter the name of its base)."""
    source, voice = study.source, study.chat
    config = source.base.config.get("text_config") or source.base.config
    template = voice.template
    return ollama.modelfile(
        OllamaModel(
            name=source.name,
            weights=weights,
            end_tokens=template.end_tokens if template is not None else (),
            template=ollama.go_template(template, voice.tokenizer.bos_token, add_bos) if template is not None else None,
            adapter=adapter,
            system=_shared_system(source),
            generation=_generation(source.base.path),
            max_length=source.rows.section.max_length if source.rows is not None else None,
            max_positions=config.get("max_position_embeddings"),
            license=licence_of(source.base.path).get(""),
        ),
        MODEL_FILE,
    )


def _shared_system(source: Source) -> str | None:
    if source.rows is None:
        return None
    splits = (source.rows.data.train, source.rows.data.eval)
    prompts = (split.prompt(row) for split in splits for row in range(len(split.lengths)))
    return ollama.shared_system(prompt.messages for prompt in prompts if prompt is not None)


def _generation(folder: Path) -> dict[str, Any]:
    file = folder / "generation_config.json"
    if not file.is_file():
        return {}
    try:
        return load_json(file)
    except UserError:
        return {}
