"""Adapters on experts as peft's files have them (`target_parameters`), and how they stand there.

peft wraps a module of experts once for each adapted projection, in the order of the module's own parameters: the last
one is `experts.lora_A`, the one before it `experts.base_layer.lora_A`. Which projection that is, target_parameters
alone says. `lora_A` (r E, in) has the rows of an expert one below the other, expert after expert; `lora_B` (out, r E)
has its columns strided: expert e is `B[:, e::E]` (peft 0.21, tuners/lora/layer.py, ParamWrapper.get_delta_weight).
Gate and up are one projection and share one A. Here both are stacks: A (E, r, in) and B (E, r, out).

peft 0.18 and older took a parameter's axes in the other order, and wrote both matrices with in and out exchanged,
but for transposed parameters (gpt-oss): shapes tell it, or the version, where a projection is as wide as it is high.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora.errors import ExportError
from qlora.model.adapter_config import AdapterConfig, first_matches, shown
from qlora.model.tensors import TensorEntry

if TYPE_CHECKING:
    from torch import Tensor

# The projections of a module of experts in transformers' interface, in the order of its parameters.
PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")
_WRAPPED = ".base_layer"
_FIRST_RIGHT = (0, 19)  # peft's version from which in and out of a parameter stand right


@dataclass(frozen=True)
class ExpertAdapter:
    """The trained matrices of all experts of one projection: a (r E, in), b (out, r E), as the file has them.

    `swapped`: it was written by a peft that exchanged in and out of parameters that are not transposed.
    """

    a: TensorEntry
    b: TensorEntry
    rank: int
    alpha: float
    root: bool
    swapped: bool = False

    @property
    def count(self) -> int:
        """Of experts."""
        return self.a.shape[0] // self.rank

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / sqrt(r) under rsLoRA (`root`)."""
        return self.alpha / self.rank**0.5 if self.root else self.alpha / self.rank

    def misfit(self, shape: Sequence[int], transposed: bool) -> str:
        """Why it does not belong to a projection of the model's `shape` (E, out, in), `transposed` (E, in, out); ""
        where it does."""
        count, out, width = (shape[0], shape[2], shape[1]) if transposed else tuple(shape)
        here = (self.count, self.b.shape[0], self.a.shape[1])
        exchanged = "has in and out exchanged, as peft 0.18 wrote adapters on experts"
        if here != (count, out, width):
            if here == (count, width, out) and not transposed:
                return exchanged
            return f"is of {here[0]} experts of {here[1:]} here, and the base has {count} of {(out, width)}"
        return exchanged if self.swapped and not transposed and out == width else ""


def names_in_file(parameters: Iterable[str]) -> dict[str, str]:
    """Of adapted projections by their parameters' names: the module that the file has of each, without its prefix."""
    found = {}
    owners: dict[str, list[str]] = {}
    for parameter in parameters:
        owner, _, leaf = parameter.rpartition(".")
        owners.setdefault(owner, []).append(leaf)
    for owner, leaves in owners.items():
        ordered = sorted(leaves, key=PROJECTIONS.index)
        for depth, leaf in enumerate(reversed(ordered)):
            found[f"{owner}.{leaf}"] = owner + _WRAPPED * depth
    return found


def targets_of(parameters: Sequence[str], all_parameters: Iterable[str]) -> list[str]:
    """What target_parameters says for these: the ends of their names, where they mean no other, else the whole."""
    ends = sorted({".".join(name.split(".")[-2:]) for name in parameters})
    meant = {name for name in all_parameters if any(f".{name}".endswith(f".{end}") for end in ends)}
    return ends if meant == set(parameters) else sorted(parameters)


def in_file(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """lora_A (r E, in) and lora_B (out, r E) of A (E, r, in) and B (E, r, out)."""
    return A.flatten(0, 1), B.permute(2, 1, 0).flatten(1, 2)


def of_file(a: Tensor, b: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The reverse of `in_file`."""
    return a.reshape(count, -1, a.shape[1]), b.reshape(b.shape[0], -1, count).permute(2, 1, 0)


def take_experts(
    roles: Mapping[str, dict[str, TensorEntry]], config: AdapterConfig, stored: Mapping[str, str], file: Path
) -> dict[str, ExpertAdapter]:
    """Take the matrices of experts out of a file's `roles`, by the parameters that they belong to.

    `stored` are the modules' names in the file, which target_parameters and patterns mean. Raises ExportError where
    target_parameters names anything else, or not what is there.
    """
    where = file.with_name("adapter_config.json")
    targets = config.target_parameters or []
    if odd := next((name for name in targets if name.rpartition(".")[2] not in PROJECTIONS), None):
        what = f"{where}: an adapter on the bare parameter {shown(odd)} (target_parameters) cannot be merged"
        raise ExportError(what, "use this adapter through peft: of parameters, projections of experts alone are known")
    owners: dict[str, list[str]] = {}
    for module in roles["a"]:
        owner = re.sub(rf"(?:{re.escape(_WRAPPED)})+$", "", module)
        leaves = _leaves(owner, stored.get(module, module), targets)
        if leaves:
            owners[owner] = leaves
    if targets and not owners:
        raise ExportError(f"{where}: target_parameters fits no tensor of the adapter", "save the adapter again")
    names = names_in_file(f"{owner}.{leaf}" for owner, leaves in owners.items() for leaf in leaves)
    patterned = {name: f"{stored_owner(stored, module)}.{name.rpartition('.')[2]}" for name, module in names.items()}
    own = [*patterned.values()]
    ranks = first_matches(config.rank_pattern, own, f"{where}: rank_pattern") if own else {}
    alphas = first_matches(config.alpha_pattern, own, f"{where}: alpha_pattern") if own else {}
    found = {}
    for name, module in names.items():
        a, b = roles["a"].pop(module, None), roles["b"].pop(module, None)
        rank = ranks.get(patterned[name], config.r)
        if a is None or b is None or len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
            raise ExportError(f"{file}: {shown(name)} has no pair of lora_A and lora_B", "save the adapter again")
        if a.shape[0] % rank or roles["magnitude"].get(module) is not None:
            what = f"{file}: {shown(name)} has {a.shape[0]} rows of lora_A, which is no multiple of its rank {rank}"
            raise ExportError(what, "save the adapter again")
        alpha = alphas.get(patterned[name], config.lora_alpha)
        found[name] = ExpertAdapter(a, b, rank, alpha, config.use_rslora, _exchanges(config))
    if left := next((module for module in roles["a"] if module.endswith(_WRAPPED)), None):
        what = f"{file}: {shown(left)} is an adapter on a parameter that target_parameters does not name"
        raise ExportError(what, "save the adapter again")
    return found


def stored_owner(stored: Mapping[str, str], module: str) -> str:
    """The file's own name of the module of experts that an adapter's module wraps."""
    return stored.get(module, module).removesuffix(_WRAPPED)


def _leaves(owner: str, stored: str, targets: Iterable[str]) -> list[str]:
    """Which projections of a module of experts are targets, by its own name or by that in the file."""
    names = {owner, re.sub(rf"(?:{re.escape(_WRAPPED)})+$", "", stored)}
    fits = (
        (leaf, target) for leaf in PROJECTIONS for target in targets if any(_ends(f"{n}.{leaf}", target) for n in names)
    )
    return sorted({leaf for leaf, _ in fits}, key=PROJECTIONS.index)


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _exchanges(config: AdapterConfig) -> bool:
    """Whether the peft that wrote it is one that exchanged in and out; those before 0.18 wrote no version."""
    version = re.match(r"(\d{1,6})\.(\d{1,6})", config.peft_version)
    return version is None or (int(version[1]), int(version[2])) < _FIRST_RIGHT
