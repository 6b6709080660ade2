"""Several adapters of one base become one adapter, in PEFT's layout: then it is exported and verified like any other.

linear keeps the sum of the deltas exactly, in a rank that is the sum of theirs. The other methods are peft's own
functions (`peft.utils.merge_utils`) on the A's and on the B's apart, each multiplied by the root of weight times scale,
as `LoraModel.add_weighted_adapter` has them: another number of values than on whole deltas, and the rank stays. What
DARE draws follows from the seed and the module's name, whatever the order and the machine.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora.device import random_state_kept
from qlora.disk import MANIFEST
from qlora.errors import ExportError
from qlora.events import Notice, Sink
from qlora.export.combination import Combination
from qlora.manifest import sha256_file
from qlora.model.adapter_config import MAX_DISTINCT, shown
from qlora.model.adapter_folder import ADAPTER_CONFIG, ADAPTER_FILE, Adapter, LoraModule
from qlora.model.tensors import read_tensor
from qlora.model.weight_names import PREFIX, ClassNames
from qlora.version import __version__


@dataclass(frozen=True)
class Member:
    """One of the adapters: what it is called where it is published, and its folder opened."""

    name: str
    adapter: Adapter
    weight: float
    step: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """As cards, qlora.json and export.json keep it."""
        sha256 = sha256_file(self.adapter.folder / ADAPTER_FILE)
        return {"adapter": self.name, "weight": self.weight, "step": self.step, "sha256": sha256}


def check(members: Sequence[Member], combination: Combination) -> None:
    """Raises ExportError for adapters that have more than low-rank matrices, or ranks that the method cannot take."""
    for member in members:
        folder, adapter = member.adapter.folder, member.adapter
        held = {**adapter.whole, **adapter.under, **adapter.rows}
        if held:
            what = f"{folder}: has trained {shown(next(iter(held)))} whole, and only low-rank matrices add up"
            raise ExportError(what, "combine adapters without modules_to_save and without new tokens")
        if experts := sorted(adapter.experts):
            what = f"{folder}: has adapters on experts ({shown(experts[0])}), which are not combined"
            raise ExportError(what, "combine adapters on layers alone, or export this one by itself")
        if dora := next((name for name, lora in adapter.lora.items() if lora.magnitude is not None), None):
            what = f"{folder}: is DoRA ({shown(dora)}), whose magnitudes do not add up"
            raise ExportError(what, "combine plain LoRA adapters")
    for name, parts in _by_module(members).items():
        shapes = {lora.shape for _, lora in parts}
        if len(shapes) > 1 or len({lora.embedding for _, lora in parts}) > 1:
            sizes = " and ".join(map(str, sorted(shapes)))
            what = f"{shown(name)} is {sizes} in these adapters: they are of other bases"
            raise ExportError(what, "combine adapters of one base")
        ranks = {lora.a.shape[0] for _, lora in parts}
        if len(ranks) > 1 and combination.method != "linear":
            what = f"{combination.method} needs one rank, and {shown(name)} has {' and '.join(map(str, sorted(ranks)))}"
            raise ExportError(what, "combine them by linear, which takes any ranks")


def write(
    members: Sequence[Member],
    combination: Combination,
    folder: Path,
    about: Mapping[str, Any],
    names: ClassNames | None = None,
) -> None:
    """Write the combined adapter into `folder`, which is empty. `about` says its "base" and the "revision" of that;
    `names` are those of the class that a multimodal base names.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, parts in sorted(_by_module(members).items()):
        a, b = _combined(name, parts, combination)
        module = name.removesuffix(".weight")
        ends = ("lora_embedding_A", "lora_embedding_B") if parts[0][1].embedding else ("lora_A.weight", "lora_B.weight")
        for end, tensor in zip(ends, (a, b), strict=True):
            stored = f"{PREFIX}{module}.{end}"
            tensors[names.of_tensor(stored) if names else stored] = tensor.contiguous()
        ranks[names.of(module) if names else module] = a.shape[0]
    save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {module: rank for module, rank in ranks.items() if rank != usual}
    if len(set(others.values())) >= MAX_DISTINCT:
        raise ExportError(f"the combined adapter has {len(set(others.values()))} ranks", "combine fewer adapters")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": usual,
        "lora_alpha": usual,  # the scale is in the matrices
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "bias": "none",
        "inference_mode": True,
        "base_model_name_or_path": about["base"],
        "revision": about["revision"],
    }
    config = names.of_config(config) if names else config
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def copy_adapter(source: Path, target: Path) -> None:
    """What is used of an adapter's folder, tokenizer included, into another; what nobody else may read stays so."""
    for file in sorted(source.iterdir()):
        if file.is_file() and file.name not in ("README.md", MANIFEST):
            shutil.copy(file, target / file.name)


def described(members: Sequence[Member], combination: Combination) -> dict[str, Any]:
    """What was combined and how, for programs."""
    how: dict[str, Any] = {"version": __version__, "method": combination.method}
    if combination.method != "linear":
        how["density"] = combination.kept
    if combination.method.startswith("dare"):
        how["seed"] = combination.seed
    return {**how, "adapters": [member.as_dict() for member in members]}


def in_words(combined: Mapping[str, Any]) -> str:
    """`described`, as one line."""
    parts = " + ".join(f"{each['weight']:g} × {each['adapter']}" for each in combined["adapters"])
    facts = [f"{key} {combined[key]:g}" for key in ("density", "seed") if key in combined]
    return f"{parts}, by {', '.join([combined['method'], *facts])}"


def say(members: Sequence[Member], combination: Combination, sink: Sink) -> None:
    """A notice of what is combined; one more where some layers are not in all of the adapters."""
    sink.emit(Notice("combine", in_words(described(members, combination)), len(members)))
    some = sum(len(parts) < len(members) for parts in _by_module(members).values())
    if some:
        message = "layers are not in all of the adapters: there, those that have them are combined"
        sink.emit(Notice("combine", message, some))


def _by_module(members: Sequence[Member]) -> dict[str, list[tuple[Member, LoraModule]]]:
    found: dict[str, list[tuple[Member, LoraModule]]] = {}
    for member in members:
        for name, lora in member.adapter.lora.items():
            found.setdefault(name, []).append((member, lora))
    return found


def _combined(name: str, parts: Sequence[tuple[Member, LoraModule]], combination: Combination) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) of one module, fp32, with a scale of 1."""
    factors = [member.weight * lora.scale for member, lora in parts]
    a = [read_tensor(lora.a).to(torch.float32) for _, lora in parts]
    b = [read_tensor(lora.b).to(torch.float32) for _, lora in parts]
    if combination.method == "linear":
        scaled = [matrix * factor for matrix, factor in zip(b, factors, strict=True)]
        return torch.cat(a, dim=0), torch.cat(scaled, dim=1)
    from peft.utils import merge_utils

    method = getattr(merge_utils, combination.method)
    roots = torch.tensor([math.sqrt(abs(factor)) for factor in factors])
    signs = torch.tensor([math.copysign(1.0, factor) for factor in factors])
    digest = hashlib.sha256(f"{combination.seed}/{name}".encode()).digest()
    with random_state_kept(torch.device("cpu")), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a density of 1, which was asked for
        # The host's generator alone, which is put back; torch.manual_seed would seed every device's, and none of those.
        torch.default_generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return method(a, roots * signs, combination.kept), method(b, roots, combination.kept)
