"""An adapter folder in PEFT's layout, opened and checked: which tensors it holds, and what is done with each.

Names are those that peft 0.21 writes (`get_peft_model_state_dict`), and all that `weight_names` makes the same of. A
layer's weight may come along whole: trained (`modules_to_save`), or because the vocabulary was resized. As
`base_layer.weight`, it is what a low-rank adapter beside it sits on.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora import files, foreign_json
from qlora.errors import ExportError
from qlora.foreign_json import ForeignFileError
from qlora.model import adapter_config
from qlora.model.adapter_config import AdapterConfig, ProvenanceFile, first_matches, shown
from qlora.model.adapter_notes import trained_on
from qlora.model.adapter_tensors import ADAPTER_FILE as ADAPTER_FILE
from qlora.model.adapter_tensors import read_tensors
from qlora.model.expert_layout import ExpertAdapter, take_experts
from qlora.model.identity import BaseIdentity
from qlora.model.tensors import TensorEntry, read_tensor
from qlora.model.weight_names import PREFIX, text_module
from qlora.recipe.sections import QuantizationSection
from qlora.redaction import redact

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import Tensor

ADAPTER_CONFIG = "adapter_config.json"
NO_LAYERS = "dummy-target-modules"  # peft's own word for an adapter on none (utils/constants.py)
PROVENANCE_FILE = "qlora.json"

VALUES_PER_BLOCK = 1 << 22  # 16 MiB of fp32

# adapter_config.json keys that change the arithmetic in ways that a plain merge cannot express.
UNMERGEABLE = {
    "layer_replication": "replicated layers",
    "megatron_config": "Megatron layers",
    "alora_invocation_tokens": "adapters that switch on in mid-text (aLoRA)",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal adapters",
    "arrow_config": "routed adapters (Arrow)",
    "kasa_config": "KaSA",
    "monteclora_config": "sampled adapters (MonteCLoRA)",
    "lora_bias": "biases in the adapter",
}
# Starts that take their matrices out of the base's weight: what was trained sits on another base than the published
# one, unless it was converted when it was saved (peft then writes init_lora_weights true).
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")


@dataclass(frozen=True)
class LoraModule:
    """The trained matrices of one module: A (r, in), B (out, r), DoRA's magnitude or None.

    `embedding`: the weight is kept as (in, out), one row a token: A is (r, tokens), B (hidden, r), the magnitude
    (hidden,). Else the weight is (out, in) and the magnitude (out,).
    """

    a: TensorEntry
    b: TensorEntry
    magnitude: TensorEntry | None
    alpha: float
    root: bool
    embedding: bool

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / sqrt(r) under rsLoRA (`root`)."""
        rank = self.a.shape[0]
        return self.alpha / rank**0.5 if self.root else self.alpha / rank

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight that it belongs to."""
        inner, outer = self.a.shape[1], self.b.shape[0]
        return (inner, outer) if self.embedding else (outer, inner)


@dataclass(frozen=True)
class TokenRows:
    """Single rows of an embedding that were trained: values (n, hidden) for the token ids."""

    values: TensorEntry
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Adapter:
    """An adapter folder, checked, nothing read yet but its header. Keys are parameter names of the causal model.

    lora     low-rank matrices
    whole    weights that take the place of the base's: trained whole, or saved after a change of the vocabulary
    under    weights that adapters sit on, saved along; where the base ties its head to the embeddings, the head has
             them too
    rows     single trained token rows
    tensors  all of them as an adapter on the causal model stores them, by names without `weight_names.PREFIX`
    idle     modules of other parts of a multimodal model whose low-rank matrices never moved
    experts  low-rank matrices of all experts of a projection
    """

    folder: Path
    config: AdapterConfig
    lora: Mapping[str, LoraModule]
    whole: Mapping[str, TensorEntry]
    under: Mapping[str, TensorEntry]
    rows: Mapping[str, TokenRows]
    tensors: Mapping[str, TensorEntry]
    idle: tuple[str, ...] = ()
    experts: Mapping[str, ExpertAdapter] = field(default_factory=dict)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Every parameter that the adapter changes, sorted."""
        return tuple(sorted({*self.lora, *self.experts, *self.whole, *self.rows}))


def keep_private(folder: Path, base: str) -> None:
    """Where the name of the base looks like a token or password: programs find the base by it, nobody else reads it."""
    if redact(base) != base:
        for name in (PROVENANCE_FILE, ADAPTER_CONFIG):
            (folder / name).chmod(0o600)


def read_adapter(folder: Path) -> Adapter:
    """Open an adapter folder in PEFT's layout, and look at every value once.

    Raises ExportError for what is none, cannot be merged, or holds a number that is not finite.
    """
    adapter = _open(folder)
    for name, entry in _entries(adapter):
        _refuse_not_finite(name, entry)
    return adapter


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter in memory, on the CPU, named as peft takes them for an adapter on the causal model.

    Raises ExportError as `read_adapter` does, without a look at the values.
    """
    return {PREFIX + name: read_tensor(entry) for name, entry in _open(folder).tensors.items()}


def experts_in(folder: Path) -> Mapping[str, ExpertAdapter]:
    """The adapters on experts in a folder, by parameter. Raises ExportError as `stored_tensors` does."""
    return _open(folder).experts


def peft_config(folder: Path) -> LoraConfig:
    """The adapter's configuration as peft is to take it: modules, ranks and alphas by the names of its own tensors.

    peft matches a configuration's patterns with an engine that a stranger's pattern can keep busy for years. Raises
    ExportError as `read_adapter` does, without a look at the values.
    """
    from peft import LoraConfig

    adapter = _open(folder)
    config, file = adapter.config, folder / ADAPTER_CONFIG
    modules = {name.removesuffix(".weight"): lora.a.shape[0] for name, lora in adapter.lora.items()}
    alphas = {name.removesuffix(".weight"): lora.alpha for name, lora in adapter.lora.items()}
    if not modules and not adapter.experts and not isinstance(config.target_modules, list):
        raise ExportError(f"{file}: target_modules fits no tensor of the adapter", "save the adapter again")
    usual = Counter(modules.values()).most_common(1)[0][0] if modules else config.r
    return LoraConfig(
        r=usual,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]
        rank_pattern=_by_value(modules, usual, f"{file}: rank_pattern"),
        alpha_pattern=_by_value(alphas, config.lora_alpha, f"{file}: alpha_pattern"),
        target_modules=list(modules) or (NO_LAYERS if adapter.experts else config.target_modules),
        modules_to_save=[text_module(name) for name in config.modules_to_save or ()] or None,
        trainable_token_indices=_in_the_text(config.trainable_token_indices),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        ensure_weight_tying=config.ensure_weight_tying,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )


def _in_the_text(indices: Any) -> Any:
    """Trained token rows by the causal model's modules."""
    return {text_module(name): ids for name, ids in indices.items()} if isinstance(indices, dict) else indices


def _by_value(values: Mapping[str, float], usual: float, where: str) -> dict[str, float]:
    """peft's table from a pattern to a value, one pattern for all modules that share a value other than the usual."""
    groups: dict[float, list[str]] = {}
    for module, value in values.items():
        if value != usual:
            groups.setdefault(value, []).append(re.escape(module))
    if len(groups) > adapter_config.MAX_DISTINCT:
        what = f"{where}: the modules have {len(groups):,} different values"
        raise ExportError(what, f"at most {adapter_config.MAX_DISTINCT} can be opened")
    return {"|".join(names): value for value, names in groups.items()}


def _open(folder: Path) -> Adapter:
    for name, hint in (
        (ADAPTER_CONFIG, "name a run's folder or a PEFT adapter folder"),
        (ADAPTER_FILE, "adapters are read as safetensors only: save it as such"),
    ):
        if not (folder / name).is_file():
            raise ExportError(f"{folder}: no {name}", hint)
    config_file = folder / ADAPTER_CONFIG
    content = adapter_config.read_file(folder, ADAPTER_CONFIG)
    for key, what in UNMERGEABLE.items():
        if content.get(key):
            raise ExportError(f"{config_file}: {what} ({key}) cannot be merged", "use this adapter through peft")
    if content.get("peft_type") != "LORA" or content.get("bias", "none") != "none":
        kind = f"{shown(str(content.get('peft_type')))} with bias {str(content.get('bias', 'none'))[:60]!r}"
        raise ExportError(f"{config_file}: {kind} cannot be merged", "LORA adapters without bias can")
    config = adapter_config.checked(AdapterConfig, content, config_file)
    if str(config.init_lora_weights).lower().startswith(BASE_CHANGING_INITS):
        start = shown(str(config.init_lora_weights))
        hint = "save it again with path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        raise ExportError(f"{config_file}: started with {start}, which alters the base's weights", hint)
    return _sort_tensors(folder, config)


def _sort_tensors(folder: Path, config: AdapterConfig) -> Adapter:
    file, found = folder / ADAPTER_FILE, read_tensors(folder)
    experts = take_experts(found.roles, config, found.stored, file)
    modules = {**found.roles["a"], **found.roles["embedding_a"]}
    ranks = {module: entry.shape[0] for module, entry in modules.items() if entry.shape}
    alphas = alphas_of(ranks, config, file, found.stored)
    lora = {f"{module}.weight": _module(module, found.roles, (alphas, config.use_rslora), file) for module in modules}
    if config.use_dora and any(module.magnitude is None for module in lora.values()):
        raise ExportError(f"{file}: use_dora is set but magnitudes are missing", "save the adapter again")
    rows = {f"{module}.weight": _rows(module, entry, config, file) for module, entry in found.roles["rows"].items()}
    return Adapter(folder, config, lora, found.whole, found.under, rows, found.all, found.idle, experts)


def _module(
    module: str, roles: Mapping[str, Mapping[str, TensorEntry]], scaling: tuple[Mapping[str, float], bool], file: Path
) -> LoraModule:
    embedding = module in roles["embedding_a"]
    first, second = ("embedding_a", "embedding_b") if embedding else ("a", "b")
    a, b = roles[first][module], roles[second].get(module)
    if b is None or len(a.shape) != 2 or len(b.shape) != 2 or b.shape[1] != a.shape[0]:
        raise ExportError(f"{file}: {shown(module)} has no matching lora_B", "save the adapter again")
    magnitude = roles["magnitude"].get(module)
    if magnitude is not None and magnitude.numel != b.shape[0]:
        what = f"{file}: {shown(module)} has {magnitude.numel} magnitudes for {b.shape[0]} rows"
        raise ExportError(what, "save it again")
    return LoraModule(a, b, magnitude, scaling[0][module], scaling[1], embedding)


def _rows(module: str, values: TensorEntry, config: AdapterConfig, file: Path) -> TokenRows:
    indices = config.trainable_token_indices
    if isinstance(indices, dict):
        named = [ids for key, ids in _in_the_text(indices).items() if f".{module}".endswith(f".{key}")]
        # A tied head is written along with the embeddings' ids, and not named by itself.
        indices = named[0] if named else next(iter(indices.values()), None)
    ids = tuple(indices or ())
    if len(values.shape) != 2 or not ids or len(ids) != values.shape[0]:
        count = values.shape[0] if values.shape else 0
        what = f"{file}: {shown(module)} has {count} trained token rows, adapter_config.json names {len(ids)}"
        raise ExportError(what, "save the adapter again")
    return TokenRows(values, ids)


def alphas_of(
    ranks: Mapping[str, int], config: AdapterConfig, file: Path, stored: Mapping[str, str]
) -> dict[str, float]:
    """Each module's alpha: its own where a pattern names it, else the adapter's.

    `ranks` are those of the stored matrices, `stored` the modules' names in the file: patterns mean those. Raises
    ExportError where the configuration says another rank.
    """
    where, names = file.with_name(ADAPTER_CONFIG), [stored.get(module, module) for module in ranks]
    own_ranks = first_matches(config.rank_pattern, names, f"{where}: rank_pattern")
    own_alphas = first_matches(config.alpha_pattern, names, f"{where}: alpha_pattern")
    alphas = {}
    for name, (module, rank) in zip(names, ranks.items(), strict=True):
        if (own_rank := own_ranks.get(name, config.r)) != rank:
            what = f"{file}: {shown(module)} has rank {rank}, adapter_config.json says {own_rank}"
            raise ExportError(what, "save the adapter again")
        alphas[module] = own_alphas.get(name, config.lora_alpha)
    return alphas


def _entries(adapter: Adapter) -> Iterable[tuple[str, TensorEntry]]:
    """Every tensor that is read, by the name of the parameter that it changes."""
    for name, lora in adapter.lora.items():
        yield from ((name, entry) for entry in (lora.a, lora.b, lora.magnitude) if entry is not None)
    yield from ((name, entry) for name, expert in adapter.experts.items() for entry in (expert.a, expert.b))
    yield from ((name, entry) for kind in (adapter.whole, adapter.under) for name, entry in kind.items())
    yield from ((name, rows.values) for name, rows in adapter.rows.items())


def _refuse_not_finite(name: str, entry: TensorEntry) -> None:
    import torch

    rows = entry.shape[0] if entry.shape else 1
    step = max(1, VALUES_PER_BLOCK // max(1, entry.numel // max(1, rows)))
    spans = [(start, min(rows, start + step)) for start in range(0, rows, step)] if entry.shape else [None]
    if not all(bool(torch.isfinite(read_tensor(entry, span)).all()) for span in spans):
        what = f"{entry.file}: the adapter of {shown(name)} holds numbers that are not finite"
        raise ExportError(what, "train it again: a checkpoint from before the numbers overflowed may be left")


@dataclass(frozen=True)
class Provenance:
    """What an adapter was trained against.

    `fingerprint` is None where the adapter is not ours, `identity` where an older version made it too. `foreign`: it
    has no note of ours, and `why` is what says that the base was in 4 bit.
    """

    base: str
    revision: str
    fingerprint: str | None
    quantization: QuantizationSection
    identity: BaseIdentity | None = None
    foreign: bool = False
    why: str | None = None


def provenance(folder: Path, config: AdapterConfig) -> Provenance:
    """From our own file in the adapter's folder, or what PEFT's config and papers say of an adapter made elsewhere.

    Raises ExportError where that file does not say it.
    """
    if (stored := _own_note(folder)) is not None:
        return Provenance(stored.base, stored.revision, stored.fingerprint, stored.section(), stored.identity)
    name = config.base_model_name_or_path
    held = trained_on(folder, name)
    return Provenance(name, config.revision, None, held.quantization, foreign=True, why=held.why)


def functions_of(folder: Path) -> str | None:
    """Who computed an adapter's layers (`lora_functions`) while it was trained and measured, as our own file in its
    folder says it; None where nothing does. Raises ExportError as `provenance` does."""
    stored = _own_note(folder)
    return stored.functions if stored is not None else None


def dtype_of(folder: Path) -> str | None:
    """In which 16 bits an adapter was trained and measured, in the same way; None where nothing says so."""
    stored = _own_note(folder)
    return stored.dtype if stored is not None else None


def _own_note(folder: Path) -> ProvenanceFile | None:
    """None in a folder that was made elsewhere."""
    if not (folder / PROVENANCE_FILE).is_file():
        return None
    content = adapter_config.read_file(folder, PROVENANCE_FILE)
    return adapter_config.checked(ProvenanceFile, content, folder / PROVENANCE_FILE)


def delivered_step(run_dir: Path) -> int | None:
    """The step of the adapter that lies in a run's folder, as its provenance says; None where there is none."""
    try:
        step = foreign_json.load_object(files.inside(run_dir / "adapter", PROVENANCE_FILE)).get("step")
    except (ForeignFileError, files.UnsafePathError):
        return None
    return step if type(step) is int else None
