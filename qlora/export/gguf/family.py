"""What a family of models declares, so that its GGUF file computes what transformers computes.

A family is one `Family` in a table of `families/`: the architecture that llama.cpp runs it as, what is done to its
weights, its keys beside the usual ones, and what its configuration may hold. Names come from the gguf package's table.
Everything that the type's configuration declares must be accounted for: it is read, it shows in the names of the
weights, it changes nothing, or it has the one value that the graph computes; any other key with a value that is not
the usual one is refused by name, before a row is trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qlora.export.gguf.rope import Key, ReferenceRope, Rope, refused
from qlora.model.expert_pieces import Piece

QKV = ("q_proj", "k_proj", "v_proj")
OTHERS = ("o_proj", "gate_proj", "up_proj", "down_proj")
GELU = "gelu_pytorch_tanh"
LAYER_NORM_KEY = "attention.layer_norm_epsilon"


Shape = tuple[int, ...]


@dataclass(frozen=True)
class Change:
    """What happens to the rows of a weight, there and back. Both get whole units of rows, and how many are a unit.

    `columns`: which column of the parameter each column of the file is (`GgufTensor` moves them, these functions not).
    `linear`: adding weights and changing them may come in either order, as an adapter's product needs it.
    """

    name: str
    to_gguf: Callable[[Tensor, int], Tensor]
    inverse: Callable[[Tensor, int], Tensor]
    by_head: bool = False  # a unit is a head's rows; else one row
    whole: bool = False  # a unit is all rows
    shape: Callable[[Shape], Shape] = lambda shape: shape  # the file's from the parameter's, with as many rows
    linear: bool = True
    columns: Tensor | None = None

    def unit(self, rows: int, head_dim: int) -> int:
        return rows if self.whole else head_dim if self.by_head else 1


def _halves(rows: Tensor, split: tuple[int, int]) -> Tensor:
    """Within each head, rows counted as `split` are counted the other way round."""
    heads = rows.shape[0] // (split[0] * split[1])
    return rows.reshape(heads, *split, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


NOTHING = Change("none", lambda rows, unit: rows, lambda rows, unit: rows)
PLUS_ONE = Change("plus one", lambda rows, unit: rows + 1, lambda rows, unit: rows - 1, linear=False)
# Llama keeps the two halves of a rotated head apart (x_i turns with x_{i + d/2}); llama.cpp's graphs of the kind
# LLAMA_ROPE_TYPE_NORM turn neighbours.
INTERLEAVE = Change(
    "interleave",
    lambda rows, unit: _halves(rows, (2, unit // 2)),
    lambda rows, unit: _halves(rows, (unit // 2, 2)),
    by_head=True,
)


@dataclass(frozen=True)
class Place:
    """Where some rows of a parameter stand: rows `first` up to `last` (None: all) in the file's tensor `name`, of shape
    `stored` where others stand in it too, from its row `at` on. `change`: what is done to them (None: what the family
    says), `unit` rows at a time (0: as the change says)."""

    name: str
    first: int = 0
    last: int | None = None
    at: int = 0
    stored: Shape | None = None
    change: Change | None = None
    unit: int = 0


@dataclass(frozen=True)
class ExpertTensor:
    """A tensor of the checkpoint that holds experts: `piece` of the parameter `projection` of `count` experts, which
    is (E, in, out) where `transposed`, and has gate and up in turns where not `concatenated`."""

    projection: str
    piece: Piece
    count: int
    transposed: bool = False
    concatenated: bool = True


@dataclass(frozen=True)
class GgufTensor:
    """Rows of a tensor of the file (in all but a few families the whole tensor) and the parameter of the causal model
    that fills them. `shape` is that of these rows, `unit`: rows that change together. `adapts`: llama.cpp looks for an
    adapter when it computes with them. `projection`: of experts, the parameter that the tensor is a piece of."""

    name: str
    parameter: str
    shape: tuple[int, ...]
    change: Change
    unit: int
    place: Place | None = None  # None: a whole parameter is a whole tensor
    adapts: bool = True
    rows: int | None = None  # of the parameter (None: as many as `shape` has)
    projection: str = ""
    packed: str = ""  # of experts that stay in MXFP4: whether the parameter is their "blocks" or their "scales"

    @property
    def stored(self) -> Shape:
        """The shape of the file's whole tensor."""
        return (self.place and self.place.stored) or self.shape

    @property
    def at(self) -> int:
        """The row of the file's tensor (taken as a matrix) that these begin at."""
        return self.place.at if self.place else 0

    @property
    def taken(self) -> tuple[int, int]:
        """The rows of the parameter that stand here: from, up to."""
        first = self.place.first if self.place else 0
        return first, first + self._count

    @property
    def _count(self) -> int:
        return self.rows if self.rows is not None else self.shape[0] if self.shape else 1

    def matrix_rows(self, count: int) -> int:
        """How many rows of the file's tensor, taken as a matrix, so many rows of the parameter are (whole units)."""
        return count * math.prod(self.shape[:-1]) // self._count if len(self.shape) > 1 else count

    def to_gguf(self, rows: Tensor) -> Tensor:
        """Whole units of rows as llama.cpp wants them."""
        changed = self.change.to_gguf(rows, self.unit)
        return changed if self.change.columns is None else changed[:, self.change.columns]

    def inverse(self, rows: Tensor) -> Tensor:
        """Whole units of rows back in the order and scale of transformers; zeros where another tensor holds a share of
        the same rows, so that all of them together are the parameter's."""
        if self.change.columns is not None:
            rows = rows[:, torch.argsort(self.change.columns)]
        return self.change.inverse(rows, self.unit)


def of_all_layers(config: Any, key: str) -> Any:
    """A value of a configuration; where layers have one each (Gemma 4's heads) what it says for all others."""
    return vars(config)[key] if key in vars(config) else getattr(config, key, None)


@dataclass(frozen=True)
class Facts:
    """A causal model that is to become a file: its text configuration, what it stores, and a head's dims."""

    config: Any
    shapes: Mapping[str, tuple[int, ...]]
    head_dim: int
    rotated: int  # dims of a head that turn with the position
    tied: bool  # no head of its own is stored
    experts: Mapping[str, ExpertTensor] = field(default_factory=dict)  # by name among `shapes`

    def value(self, key: str) -> Any:
        """A value of the configuration, None where it has none."""
        return of_all_layers(self.config, key)

    @property
    def layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def sliding(self) -> list[bool]:
        """Which layers see only a window. Mistral and Phi-3 have one window for all of them and no `layer_types`."""
        if kinds := self.value("layer_types"):
            return [kind == "sliding_attention" for kind in kinds]
        return [bool(self.value("sliding_window"))] * self.layers


@dataclass(frozen=True)
class Windows:
    """Sliding windows of an architecture: the last of each `period` layers is none. `listed`: its graph also reads
    other patterns, given layer by layer."""

    period: int
    listed: bool = True


# The end of a parameter's name, or of that without "weight" or "bias" ("norm.weight", "q_proj", "A_log"), to what is
# done; the first match.
Changes = Mapping[str, Change]


Places = Callable[[str, Facts], Sequence[Place]]  # of a parameter; none: gguf's table has its name


def no_places(parameter: str, facts: Facts) -> Sequence[Place]:
    return ()


def no_constants(facts: Facts) -> Mapping[str, NDArray[np.float32]]:
    return {}


def no_keys(facts: Facts) -> Sequence[Key]:
    return ()


def no_other(facts: Facts) -> Family | None:
    return None


def no_notices(facts: Facts) -> Sequence[str]:
    return ()


def no_check(facts: Facts) -> None:
    return None


def no_changes(facts: Facts) -> Changes:
    return {}


def interleaved(facts: Facts) -> Changes:
    return {"q_proj": INTERLEAVE, "k_proj": INTERLEAVE}


def norms_plus_one(facts: Facts) -> Changes:
    return {"norm.weight": PLUS_ONE}


def vocabulary(facts: Facts) -> Sequence[Key]:
    return [("vocab_size", facts.shapes["model.embed_tokens.weight"][0])]


def whole_width(facts: Facts) -> None:
    """For graphs that take a head's dims for the width over the heads."""
    heads, width = facts.config.num_attention_heads, facts.config.hidden_size
    if facts.head_dim * heads != width:
        name = facts.config.model_type
        raise refused(f"heads of {facts.head_dim} dims in a {name} model that is {width} wide")


@dataclass(frozen=True)
class Family:
    """How llama.cpp runs a transformers model type."""

    arch: gguf.MODEL_ARCH
    activation: str  # the only one that its graph has
    changes: Callable[[Facts], Changes] = no_changes
    takes_rope_factors: tuple[str, ...] = ()  # kinds of scaled positions that its graph takes as tensors
    partial_rope: bool = False  # its graph turns `rope.dimension_count` dims, not all of a head's
    windows: Windows | None = None  # None: its graph has no windows
    head: Literal["any", "tied", "own"] = "any"  # the head that its graph computes with
    biases: tuple[str, ...] = ()  # layers whose biases its graph adds
    unadapted: tuple[str, ...] = ()  # ends of parameters' names that its graph never applies an adapter to
    epsilon: tuple[str, str] = ("rms_norm_eps", "attention.layer_norm_rms_epsilon")  # transformers' name and GGUF's
    renamed: Mapping[str, str] = field(default_factory=dict)  # parts of parameters' names that gguf's table calls so
    places: Places = no_places  # of parameters that are no tensor of their own in the file
    fused: bool = False  # gate and up of its experts are one tensor
    rope: Callable[[Facts, Mapping[str, ReferenceRope]], Rope] | None = None  # None: `rope.describe` says it
    instead: Callable[[Facts], Family | None] = no_other  # another declaration for some configurations of the type
    constants: Callable[[Facts], Mapping[str, NDArray[np.float32]]] = no_constants  # tensors beside the model's
    keys: Callable[[Facts], Sequence[Key]] = no_keys  # beside the usual ones; wins over them, None takes one out
    notices: Callable[[Facts], Sequence[str]] = no_notices  # what its graph is known to compute a little otherwise
    check: Callable[[Facts], None] = no_check  # raises `refused` for what its graph computes otherwise
    reads: frozenset[str] = frozenset()  # keys of the configuration that `keys` and `check` take, beside USUAL
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # other keys, and what they may be


# What every layout reads; what shows in the names of the weights (a bias, a norm); and what no answer depends on.
USUAL = frozenset(
    (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
        *("num_key_value_heads", "max_position_embeddings", "hidden_act", "hidden_activation", "rope_parameters"),
        *("tie_word_embeddings", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
        "original_max_position_embeddings",
    )
)
IN_WEIGHTS = frozenset(
    ("attention_bias", "attention_out_bias", "mlp_bias", "use_bias", "use_qkv_bias", "qk_layernorm", "use_qk_norm")
)
NEUTRAL = frozenset(
    (
        *("initializer_range", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "pretraining_tp"),
        *("attention_dropout", "resid_pdrop", "embd_pdrop", "residual_dropout", "embedding_dropout", "hidden_dropout"),
    )
)


def declared(config: Any) -> dict[str, Any]:
    """The keys that a configuration's own class declares, and the value that each has where nobody says another."""
    from transformers import PreTrainedConfig

    inherited = {entry.name for entry in fields(PreTrainedConfig)}
    return {
        entry.name: None if entry.default is MISSING else entry.default
        for entry in fields(type(config))
        if entry.name not in inherited
    }


def unaccounted(family: Family, config: Any) -> dict[str, Any]:
    """Declared keys that the family says nothing of, with their usual values."""
    known = USUAL | IN_WEIGHTS | NEUTRAL | family.reads | family.fixed.keys() | {family.epsilon[0]}
    return {key: value for key, value in declared(config).items() if key not in known}


def check_config(family: Family, facts: Facts) -> None:
    """Raises ExportError for a key of the configuration whose value the architecture's graph does not compute."""
    name = facts.config.model_type
    for key, allowed in family.fixed.items():
        if (value := facts.value(key)) not in allowed:
            raise refused(f"{key} = {value!r} of {name} (its graph computes {' or '.join(map(repr, allowed))})")
    for key, usual in unaccounted(family, facts.config).items():
        if (value := facts.value(key)) != usual:
            raise refused(f"{key} = {value!r} of {name}")
