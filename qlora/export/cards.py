"""What is written beside the weights for a reader: model cards, export.json, and for Ollama the Modelfile.

Cards and export.json go to the hub with the weights. They name a base or a file of rows by its hub name or by the last
part of its path: the folders above it mostly hold a user's name, which a published file must not. Names are text: what
is a sign of Markdown, HTML or the shell in one is none on the page. Every text leaves by `_card`, `export_json` or
`modelfile`, without secrets and control characters.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tomli_w
from huggingface_hub import ModelCard, ModelCardData

from qlora import foreign_yaml, shown
from qlora.errors import UserError
from qlora.export import ollama
from qlora.export.artifacts import Artifact, Source
from qlora.export.combine import in_words
from qlora.export.gguf.metadata import licence_of, published, read_card, shown_name, split_card
from qlora.export.merge.merge import Merge
from qlora.export.ollama import OllamaModel
from qlora.export.verify.fidelity import Fidelity
from qlora.export.verify.reference import TrainedReference
from qlora.foreign_json import ForeignFileError
from qlora.model.base_folder import BaseFolder
from qlora.model.tensors import load_json
from qlora.recipe.reading import Recipe, looks_like_folder
from qlora.redaction import redact, redact_all
from qlora.run_folder import dataset_names, versions
from qlora.version import __version__

EXPORT_FILE = "export.json"
MODEL_FILE = "Modelfile"
MAX_FILE_NAME = 200  # bytes: most file systems take 255
_MERGED_INTO = {"nf4": "its weights as 4-bit training saw them (dequantized)", "full": "its original weights"}
# Keys of a recipe whose values are always paths.
_PATH_KEYS = ("path", "dir")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_CODE = re.compile(r"(`+[^`]+`+)")
_TAG = re.compile(r"<(?=[A-Za-z/!?])")
# A quoted absolute path of two parts or more, as TOML, JSON and Python write it; the group is its last part.
_QUOTED_PATH = re.compile(r'"(?:/|~|[A-Za-z]:\\)[^"\n]*[/\\]([^"/\\\n]+)[/\\]*"')


# --- names ------------------------------------------------------------------------------------------------------------


def _shown_recipe(value: Any, key: str = "") -> Any:
    """A recipe's content as a published card may have it: of every path the last part, hub names whole."""
    if isinstance(value, Mapping):
        return {name: _shown_recipe(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_shown_recipe(item, key) for item in value]
    is_path = isinstance(value, str) and (key in _PATH_KEYS or looks_like_folder(value))
    return Path(value).name if is_path and not value.startswith("hub:") else value


def file_name(name: str) -> str:
    """A run's or base's name as the beginning of a file's name that a Modelfile and a shell can hold."""
    plain = re.sub(r"[\\/\"'`$]", "_", published(name)).lstrip("-")
    return plain.encode()[:MAX_FILE_NAME].decode(errors="ignore") or "model"


def text_of(name: str) -> str:
    """A name as text in Markdown, in a cell of a table too: what would be a sign there is written as itself."""
    escaped = re.sub(r"([\\`*\[\]|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", name)
    return re.sub(r"[&<>]", lambda sign: {"&": "&amp;", "<": "&lt;", ">": "&gt;"}[sign[0]], escaped)


def without_tags(text: str) -> str:
    """Markdown of somebody else in which HTML is text; in code, where it is text anyway, it stays as it is."""
    lines, fence = [], ""
    for line in text.split("\n"):
        mark = _FENCE.match(line)
        if fence:
            fence = "" if mark and mark[1].startswith(fence) and not line.strip().strip(fence[0]) else fence
        elif mark:
            fence = mark[1]
        else:
            line = "".join(part if at % 2 else _TAG.sub("&lt;", part) for at, part in enumerate(_CODE.split(line)))
        lines.append(line)
    # Left open, it would swallow what we write below.
    return "\n".join([*lines, fence] if fence else lines)


def fenced(text: str, language: str) -> str:
    """A block of code, whatever stands in it."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{fence}{language}\n{text}\n{fence}"


# --- cards ------------------------------------------------------------------------------------------------------------


def adapter_card(base: BaseFolder, recipe: Recipe, facts: Mapping[str, str]) -> str:
    """The card of a run's adapter. `facts` are what was measured: lines of its table, by name."""
    name = shown_name(base)
    made = ", ".join(f"{package} {number}" for package, number in versions().items() if number != "not installed")
    trained_on = {"trained on": ", ".join(dataset_names(recipe))} if recipe.data.train or recipe.data.documents else {}
    table = {"base": name, "revision": base.commit or "a local folder", **trained_on, **facts, "made with": made}
    lines = "\n".join(f"| {key} | {text_of(value)} |" for key, value in table.items())
    content = tomli_w.dumps(_shown_recipe(recipe.model_dump(mode="json", exclude_none=True)))
    text = f"""# LoRA adapter for {text_of(Path(name).name)}

Trained with QLoRA: the base frozen in {recipe.quantization.type.upper()}, this adapter in bf16.

| | |
| --- | --- |
{lines}

The recipe, with every default written out:

{fenced(content.strip(), "toml")}
"""
    about = {**_licence(base.path), **_datasets(dataset_names(recipe))}
    return _card(text, base_model=name, library_name="peft", tags=["lora", "qlora"], **about)


def combined_card(base: BaseFolder, combined: Mapping[str, Any]) -> str:
    """The card of an adapter that several were combined to."""
    name = shown_name(base)
    lines = "\n".join(
        f"| {text_of(each['adapter'])} | {each['weight']:g} | {each['step'] or ''} | `{each['sha256'][:16]}` |"
        for each in combined["adapters"]
    )
    text = f"""# A combined LoRA adapter for {text_of(Path(name).name)}

{text_of(in_words(combined))}

| adapter | weight | step | sha256 of its weights |
| --- | --- | --- | --- |
{lines}
"""
    return _card(text, base_model=name, library_name="peft", tags=["lora", "qlora", "merge"], **_licence(base.path))


def merged_card(merge: Merge, fidelity: str, datasets: Sequence[str] = ()) -> str:
    """The card of a folder of safetensors: what was merged into what, how near it is, and the adapter's own text."""
    name = shown_name(merge.base)
    own = _own_text(merge.adapter.folder, merge.base)
    head = f"""# {text_of(Path(name).name)} with a LoRA adapter merged in

Made from {text_of(name)}, {_MERGED_INTO[merge.merge_base]}, and {len(merge.changed)} trained modules added to them."""
    text = "\n\n".join(part for part in (head, fidelity.strip(), own.strip()) if part) + "\n"
    about = {**_licence(merge.base.path), **_datasets(datasets)}
    return _card(text, base_model=name, library_name="transformers", tags=["qlora", "merged"], **about)


def gguf_card(source: Source, product: Artifact, file: str, merge: Merge | None, fidelity: str) -> str:
    """The card of a folder with the GGUF file `file`; `merge` is None for an adapter alone."""
    base, run_name, quoted = shown_name(source.base), published(source.name), shlex.quote(file)
    if merge is not None:
        trained = len(source.adapter.parameters)
        made = f"{text_of(base)}, {_MERGED_INTO[merge.merge_base]}, with {trained} trained weights merged in"
        run = f"llama-cli -m {quoted}"
    else:
        made = f"the LoRA adapter alone, to be put on {text_of(base)}"
        run = f"llama-cli -m THE-BASE.gguf --lora {quoted}   # the base as GGUF, of any quantization"
    model = ollama.model_name(run_name)
    if source.combined is not None:
        made += f"; the adapter is {text_of(in_words(source.combined))}"
    commands = f"{run}\nollama create {model} -f {MODEL_FILE} && ollama run {model}"
    title = " · ".join(filter(None, (text_of(Path(base).name), text_of(run_name), (product.quant or "").upper())))
    text = f"""# {title}

Made from {made}.

{fenced(commands, "bash")}

{fidelity}
{_own_text(source.adapter.folder, source.base).strip()}
"""
    about = {**_licence(source.base.path), **_datasets(source.datasets)}
    return _card(text, base_model=base, library_name="gguf", tags=["qlora", "gguf"], **about)


def joined_card(parts: Sequence[tuple[str, str]], name: str, base: str | None) -> str:
    """One card for the repository `name`, of the cards of what is in it, by their keys ("hf", "gguf-q8_0", …).

    `base` is the hub's name of the base, None where it has none: the metadata then leave it out.
    """
    metadata: dict[str, Any] = {"base_model": base}
    tags: list[str] = []
    bodies: list[str] = []
    for _, text in parts:
        header, body = split_card(text)
        try:
            found = foreign_yaml.parse_table(header, "README.md")
        except ForeignFileError:  # of an adapter of anybody's
            found = {}
        tags += [str(tag) for tag in found.get("tags") or []]
        wanted = ("license", "license_name", "license_link", "datasets", "library_name")
        metadata |= {key: found[key] for key in wanted if found.get(key) and key not in metadata}
        bodies.append(_new_part(body.strip(), bodies))
    keys = [key for key, _ in parts]
    if base is not None:
        metadata["base_model_relation"] = "adapter" if all(key.startswith("adapter") for key in keys) else "finetune"
    text = (
        bodies[0]
        if len(bodies) == 1
        else "\n\n".join([f"# {name.rpartition('/')[2]}", f"Holds {', '.join(keys)}.", *bodies])
    )
    return _card(f"{text}\n", **metadata, pipeline_tag="text-generation", tags=list(dict.fromkeys(tags)))


def _new_part(body: str, earlier: Sequence[str]) -> str:
    """A card's text without the end that it has in common with an earlier one: its fidelity, and the adapter's own."""
    for heading in re.finditer(r"(?m)^#{1,2} ", body):
        if any(other.endswith(body[heading.start() :]) for other in earlier):
            return body[: heading.start()].rstrip()
    return body


def _own_text(adapter: Path, base: BaseFolder) -> str:
    """The Markdown of an adapter's own card: what it was trained on and how it did."""
    _, own = read_card(adapter)
    # Cards of earlier versions, and of other trainers, may have paths of the machine where they were written.
    return without_tags(_QUOTED_PATH.sub(r'"\1"', own.replace(base.name, shown_name(base))))


def _licence(folder: Path) -> dict[str, str]:
    """The metadata of the base's licence, as its own card has them."""
    return {f"license{part}": value for part, value in licence_of(folder).items()}


def _datasets(names: Sequence[str]) -> dict[str, list[str]]:
    """The metadata of data sets: those that the hub has."""
    found = [name.partition("@")[0] for name in names if "/" in name]
    return {"datasets": found} if found else {}


def _card(text: str, **metadata: Any) -> str:
    """Markdown under the metadata that the hub reads (https://huggingface.co/docs/hub/model-cards)."""
    header = ModelCardData(**shown.plain_values(redact_all(metadata))).to_yaml()
    return str(ModelCard(f"---\n{header}\n---\n\n{shown.block(redact(text))}"))


def fidelity_markdown(table: Sequence[Fidelity], texts: str) -> str:
    """The table of fidelity as Markdown, empty when nothing was measured."""
    if not table:
        return ""
    lines = [
        "## How near it is to the trained model",
        "",
        f"Measured at {table[0].positions:,} tokens of {table[0].rows:,} {text_of(texts)}.",
        "",
        "| | mean KL, nats a token | perplexity | same most likely token | bytes | measured by |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for line in table:
        size = f"{line.bytes:,}" if line.bytes else ""
        kl = "0" if line.kl == 0 else f"{line.kl:.1e}"
        lines.append(
            f"| {text_of(line.name)} | {kl} | {line.perplexity:.4f} | {line.top1:.1%} | {size} | {line.measured_by} |"
        )
    return "\n".join(lines) + "\n"


# --- for programs -----------------------------------------------------------------------------------------------------


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
        "combined": source.combined,
        "merged": len(source.adapter.parameters) if merge is not None else 0,
        "quantization": source.origin.quantization.model_dump(mode="json"),
        **more,
        "fidelity": [asdict(line) for line in table],
    }
    return json.dumps(shown.plain_values(redact_all(content)), indent=1) + "\n"


def modelfile(study: TrainedReference, weights: str, adapter: str | None, add_bos: bool) -> str:
    """The Modelfile of `weights` (a GGUF's name, or for an adapter the name of its base)."""
    source, voice = study.source, study.chat
    config = source.base.config.get("text_config") or source.base.config
    template = voice.template
    text = ollama.modelfile(
        OllamaModel(
            name=published(source.name),
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
    return redact(text)  # a system prompt may hold one


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
