"""An adapter folder in PEFT's layout, opened and checked: which tensors it holds, and what is done with each.

Names are those that peft 0.21 writes (`get_peft_model_state_dict`), and those with an adapter's name in them that other
tools leave (`lora_A.default.weight`). A layer's weight may come along whole: trained (`modules_to_save`), or because
the vocabulary was resized. As `base_layer.weight`, it is what a low-rank adapter beside it sits on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.errors import ExportError
from qlora.foreign_json import checked
from qlora.model.identity import BaseIdentity
from qlora.model.tensors import FLOAT_DTYPES, TensorEntry, read_header
from qlora.recipe.sections import QuantizationSection

PREFIX = "base_model.model."
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
PROVENANCE_FILE = "qlora.json"

# adapter_config.json keys that change the arithmetic in ways that a plain merge cannot express.
UNMERGEABLE = {
    "target_parameters": "adapters on bare parameters",
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

# What stands behind a module's name, in peft's files; an adapter's own name may stand where (\.\w+)? does.
_ROLES = (
    ("a", re.compile(r"\.lora_A(?:\.\w+)?\.weight$")),
    ("b", re.compile(r"\.lora_B(?:\.\w+)?\.weight$")),
    ("embedding_a", re.compile(r"\.lora_embedding_A(?:\.\w+)?$")),
    ("embedding_b", re.compile(r"\.lora_embedding_B(?:\.\w+)?$")),
    ("magnitude", re.compile(r"\.lora_magnitude_vector(?:\.\w+)?$")),
    ("rows", re.compile(r"\.token_adapter\.trainable_tokens_delta(?:\.\w+)?$")),
)
_UNDER = re.compile(r"\.(?:token_adapter\.)?(?:base_layer|original_module)(?=\.\w+$)")
_TRAINED = re.compile(r"\.modules_to_save(?:\.\w+)?(?=\.\w+$)")


@dataclass(frozen=True)
class LoraModule:
    """The trained matrices of one module: A (r, in), B (out, r), DoRA's magnitude or None.

    `embedding`: the weight is kept as (in, out), one row a token: A is (r, tokens), B (hidden, r), the magnitude
    (hidden,). Else the weight is (out, in) and the magnitude (out,).
    """

    a: TensorEntry
    b: TensorEntry
    magnitude: TensorEntry | None
    scale: float
    embedding: bool

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
    """

    folder: Path
    config: Mapping[str, Any]
    lora: Mapping[str, LoraModule]
    whole: Mapping[str, TensorEntry]
    under: Mapping[str, TensorEntry]
    rows: Mapping[str, TokenRows]

    @property
    def parameters(self) -> tuple[str, ...]:
        """Every parameter that the adapter changes, sorted."""
        return tuple(sorted({*self.lora, *self.whole, *self.rows}))


def read_adapter(folder: Path) -> Adapter:
    """Open an adapter folder in PEFT's layout. Raises ExportError for what is none or cannot be merged."""
    config_file = folder / ADAPTER_CONFIG
    if not config_file.is_file():
        raise ExportError(f"{folder}: no {ADAPTER_CONFIG}", "name a run's folder or a PEFT adapter folder")
    if not (folder / ADAPTER_FILE).is_file():
        raise ExportError(f"{folder}: no {ADAPTER_FILE}", "adapters are read as safetensors only: save it as such")
    config = _read_config(config_file)
    for key, what in UNMERGEABLE.items():
        if config.get(key):
            raise ExportError(f"{config_file}: {what} ({key}) cannot be merged", "use this adapter through peft")
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
        kind = f"{config.get('peft_type')} with bias {config.get('bias', 'none')!r}"
        raise ExportError(f"{config_file}: {kind} cannot be merged", "LORA adapters without bias can")
    if str(config.get("init_lora_weights")).lower().startswith(BASE_CHANGING_INITS):
        what = f"{config_file}: started with {config['init_lora_weights']}, which alters the base's weights"
        hint = "save it again with path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        raise ExportError(what, hint)
    return _sort_tensors(folder, config)


def _read_config(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ExportError(f"{file}: cannot be read ({error})", "save the adapter again") from error


def _sort_tensors(folder: Path, config: Mapping[str, Any]) -> Adapter:
    file = folder / ADAPTER_FILE
    roles: dict[str, dict[str, TensorEntry]] = {role: {} for role, _ in _ROLES}
    whole: dict[str, TensorEntry] = {}
    copies: dict[str, TensorEntry] = {}
    under: dict[str, TensorEntry] = {}
    for stored_name, entry in read_header(file).items():
        name = stored_name.removeprefix(PREFIX)
        if entry.dtype not in FLOAT_DTYPES:
            raise ExportError(f"{file}: {name} is stored as {entry.dtype}", "save the adapter from a 16-bit base")
        found = next(((role, match.start()) for role, pattern in _ROLES if (match := pattern.search(name))), None)
        if found:
            roles[found[0]][name[: found[1]]] = entry
        elif _UNDER.search(name):
            under[_UNDER.sub("", name)] = entry
        elif _TRAINED.search(name):
            copies[_TRAINED.sub("", name)] = entry
        else:
            whole[name] = entry
    modules = roles["a"] | roles["embedding_a"]
    for module in (*roles["b"], *roles["embedding_b"], *roles["magnitude"]):
        if module not in modules:
            raise ExportError(f"{file}: {module} has no lora_A", "save the adapter again")
    lora = {f"{module}.weight": _module(module, roles, config, file) for module in modules}
    whole = {**copies, **whole}  # where both stand in a file, peft loads the plain name
    if config.get("use_dora") and any(module.magnitude is None for module in lora.values()):
        raise ExportError(f"{file}: use_dora is set but magnitudes are missing", "save the adapter again")
    rows = {f"{module}.weight": _rows(module, entry, config, file) for module, entry in roles["rows"].items()}
    return Adapter(folder, config, lora, whole, {n: e for n, e in under.items() if n not in whole}, rows)


def _module(
    module: str, roles: Mapping[str, Mapping[str, TensorEntry]], config: Mapping[str, Any], file: Path
) -> LoraModule:
    embedding = module in roles["embedding_a"]
    first, second = ("embedding_a", "embedding_b") if embedding else ("a", "b")
    a, b = roles[first][module], roles[second].get(module)
    if b is None or len(a.shape) != 2 or len(b.shape) != 2 or b.shape[1] != a.shape[0]:
        raise ExportError(f"{file}: {module} has no matching lora_B", "save the adapter again")
    magnitude = roles["magnitude"].get(module)
    if magnitude is not None and magnitude.numel != b.shape[0]:
        raise ExportError(f"{file}: {module} has {magnitude.numel} magnitudes for {b.shape[0]} rows", "save it again")
    return LoraModule(a, b, magnitude, scale_of(module, config, a.shape[0], file), embedding)


def _rows(module: str, values: TensorEntry, config: Mapping[str, Any], file: Path) -> TokenRows:
    indices = config.get("trainable_token_indices")
    if isinstance(indices, Mapping):
        named = [ids for key, ids in indices.items() if module == key or module.endswith(f".{key}")]
        # A tied head is written along with the embeddings' ids, and not named by itself.
        indices = named[0] if named else next(iter(indices.values()), None)
    ids = tuple(indices) if isinstance(indices, list) else ()
    if len(values.shape) != 2 or len(ids) != values.shape[0] or not all(type(i) is int and i >= 0 for i in ids):
        what = f"{file}: {module} has {values.shape[0]} trained token rows, adapter_config.json names {len(ids)}"
        raise ExportError(what, "save the adapter again")
    return TokenRows(values, ids)


def scale_of(module: str, config: Mapping[str, Any], rank: int, file: Path) -> float:
    """alpha / r, or alpha / sqrt(r) under rsLoRA, with the module's own alpha and rank where patterns name it."""
    own_rank = _pattern(module, config.get("rank_pattern") or {}, config.get("r"))
    alpha = _pattern(module, config.get("alpha_pattern") or {}, config.get("lora_alpha"))
    if own_rank != rank:
        what = f"{file}: {module} has rank {rank}, adapter_config.json says {own_rank}"
        raise ExportError(what, "save the adapter again")
    return float(alpha / rank**0.5) if config.get("use_rslora") else float(alpha / rank)


def _pattern(module: str, patterns: Mapping[str, Any], default: Any) -> Any:
    """A pattern is a regular expression for the end of a module's name, as peft reads it (get_pattern_key)."""
    matching = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module))
    return next(matching, default)


@dataclass(frozen=True)
class Provenance:
    """What an adapter was trained against.

    `fingerprint` is None where the adapter is not ours, `identity` where an older version made it too.
    """

    base: str
    revision: str
    fingerprint: str | None
    quantization: QuantizationSection
    identity: BaseIdentity | None = None


def provenance(folder: Path, adapter_config: Mapping[str, Any]) -> Provenance:
    """From our own file in the adapter's folder, or from PEFT's config alone for an adapter made elsewhere."""
    file = folder / PROVENANCE_FILE
    if file.is_file():
        stored = json.loads(file.read_text(encoding="utf-8"))
        quantization = QuantizationSection(**stored["quantization"])
        known = stored.get("identity")
        identity = None if known is None else checked(BaseIdentity, known, f"{file}: identity")
        return Provenance(stored["base"], stored["revision"], stored["fingerprint"], quantization, identity)
    base = str(adapter_config.get("base_model_name_or_path") or "")
    return Provenance(base, str(adapter_config.get("revision") or "main"), None, QuantizationSection())


def delivered_step(run_dir: Path) -> int | None:
    """The step of the adapter that lies in a run's folder, as its provenance says; None where there is none."""
    try:
        return int(json.loads((run_dir / "adapter" / PROVENANCE_FILE).read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
