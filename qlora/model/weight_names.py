"""What a causal model's weights are called: by itself, in checkpoints, in adapters, in the class that its base names.

One name is used everywhere in here: the causal (text) model's own, such as `model.layers.0.self_attn.q_proj.weight`.
A multimodal base holds that model as a part of another class, which calls it `model.language_model.…`; checkpoints and
adapters of older versions of that class call it `language_model.model.…`. All of them are read. An adapter is written
as the class in the base's config.json has the names: whoever opens that class puts the adapter on it, and peft leaves
out in silence what it finds no place for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora.errors import foreign_failures
from qlora.model.config_filter import open_config

if TYPE_CHECKING:
    from qlora.model.base_folder import BaseFolder
    from qlora.model.tensors import TensorEntry

PREFIX = "base_model.model."  # peft's, before every name in an adapter

# How the text part is called in multimodal classes and their checkpoints: from transformers 4.52 on, from 4.50 on and
# before (transformers/conversion_mapping.py: llava, qwen2_audio, paddleocr_vl and their like), and in Idefics' line.
_TEXT_PARTS = (
    (re.compile(r"^(?:model\.)?(?:language_model|text_model)\.lm_head\."), "lm_head."),
    (re.compile(r"^model\.(?:language_model|text_model)\.(?:model\.)?"), "model."),
    (re.compile(r"^(?:language_model|text_model)\.(?:model\.)*"), "model."),
    # Of a model that was saved without its head, or inside of another one's `model`.
    (re.compile(r"^(?:model\.)*(?=(?:layers|embed_tokens|norm)\.)"), "model."),
)
_OMNI = "thinker."  # Qwen's omni models: before the names of the part that reads and writes text
# Parts beside the text model, by the names that transformers' multimodal classes give them.
_OTHER_PARTS = re.compile(
    r"^(?:model\.)*((?:vision|visual|image|video|audio|embed_vision|embed_audio|multi_modal|multimodal|mm_|connector|"
    r"aligner|qformer|perceiver|resampler|projector|talker|token2wav)\w*)(?:\.|$)"
)
# What wrappers of training put into names: torch.compile, FSDP, activation checkpointing.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# An adapter's own name, which other tools leave in: `lora_A.default.weight`.
_ADAPTERS_NAME = re.compile(
    r"(\.lora_[AB])\.\w+(?=\.weight$)|(\.(?:lora_embedding_[AB]|\w+_vector|\w+_delta))(?:\.\w+)+$"
)

# The embedding of tokens: in Llama's line, BLOOM's and Falcon's, GPT-2's, GPT-NeoX', Mamba's.
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|word_embeddings|wte|embed_in|embeddings)\.weight$")

_PEFTS_OWN = re.compile(r"\.(?:lora_\w+|base_layer|original_module|modules_to_save|token_adapter)\.")


def text_name(name: str) -> str:
    """A name of a checkpoint or a module as the causal model itself has it; one of another part stays as it is."""
    name = name.removeprefix(_OMNI)
    for pattern, own in _TEXT_PARTS:
        if pattern.match(name):
            return pattern.sub(own, name, count=1)
    return name


def text_module(name: str) -> str:
    """`text_name` of a module, whose name may end where a part's does."""
    return text_name(f"{name}.").removesuffix(".")


def adapter_name(stored: str) -> str:
    """A tensor's name in an adapter's file as peft writes it, without PREFIX, for an adapter on the causal model."""
    return text_name(_ADAPTERS_NAME.sub(r"\1\2", stored_name(stored)))


def stored_name(stored: str) -> str:
    """A tensor's name without what stands before the model's own: what patterns in an adapter's configuration mean."""
    while stored.startswith(PREFIX):
        stored = stored.removeprefix(PREFIX)
    return _WRAPPERS.sub("", stored)


def other_part(name: str) -> str | None:
    """The part of a multimodal model beside its text model to which `name` belongs, such as vision_tower, or None."""
    found = _OTHER_PARTS.match(name)
    return found[1] if found else None


def embedding_rows(tensors: Mapping[str, TensorEntry]) -> int | None:
    """Rows of the embedding of tokens as it is stored, by names of a checkpoint; None where none is known by its name.

    A config.json may say less (Mllama's 8 tokens beyond vocab_size), or be another model's.
    """
    rows = {
        entry.shape[0]
        for name, entry in tensors.items()
        if _EMBEDDING.search(text_name(name)) and len(entry.shape) == 2 and other_part(name) is None
    }
    return rows.pop() if len(rows) == 1 else None


@dataclass(frozen=True)
class ClassNames:
    """How the class that a multimodal base names calls its text model.

    `places` are (the causal model's module, the same one in the class), `others` the parts beside it; `opens_on` is
    the class's own name.
    """

    places: tuple[tuple[str, str], ...]
    others: tuple[str, ...]
    opens_on: str

    def of(self, name: str) -> str:
        """A module's or parameter's name in the class."""
        for own, there in self.places:
            if name == own or name.startswith(f"{own}."):
                return there + name.removeprefix(own)
        return name

    def of_tensor(self, name: str) -> str:
        """The same of a tensor in an adapter's file."""
        return PREFIX + self.of(name.removeprefix(PREFIX))

    def of_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """An adapter_config.json for the class: full names are its own, and other parts get no adapters.

        Names such as q_proj stay: they mean the same layers, and vision towers have layers of that name too.
        """
        renamed = {
            key: [self.of(name) for name in config[key]]
            for key in ("target_modules", "target_parameters", "modules_to_save")
            if isinstance(config.get(key), list)
        }
        return {**config, **renamed, "exclude_modules": rf"(?:.*\.)?(?:{'|'.join(self.others)})(?:\..*)?"}


def class_names(base: BaseFolder, model: Any, say: Callable[[str], None] = lambda _: None) -> ClassNames | None:
    """How the class in the config.json of `base` calls the weights of `model`, its causal model.

    `model` may be peft's around it. None where that is the causal model itself, or where transformers has no class
    that holds it in one place; `say` gets why, and on which class peft finds the adapter. The class is built without
    weights.
    """
    if not isinstance(base.config.get("text_config"), Mapping):
        return None
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    found: ClassNames | str | None = None
    with foreign_failures() as failure:
        found = _names_in_class(base, model)
    if isinstance(found, ClassNames):
        if found.opens_on != type(model).__name__:
            say(f"written for {found.opens_on}: on {type(model).__name__} peft finds no place for it")
        return found
    if named := failure.reason if failure.error else found:
        say(f"written for {type(model).__name__} alone, not for the class that config.json names ({named})")
    return None


def _names_in_class(base: BaseFolder, model: Any) -> ClassNames | str:
    """The names; or why there are none, "" where config.json names the causal model itself."""
    whole = _whole_model(base)
    if whole is None:
        return "transformers has none that reads images beside text"
    if type(whole) is type(model):
        return ""
    modules = dict(whole.named_modules())
    roots = [name for name, module in modules.items() if type(module) is type(model.base_model)]
    heads = [name for name, module in modules.items() if module is whole.get_output_embeddings()]
    several = "the text model stands in it in no one place"
    if len(roots) != 1 or not roots[0] or len(heads) != 1:
        return several
    own_heads = [name for name, module in model.named_modules() if module is model.get_output_embeddings()]
    places = ((model.base_model_prefix, roots[0]), (own_heads[0], heads[0]))
    above = ["", *(roots[0][:at] for at, letter in enumerate(roots[0]) if letter == ".")]
    kept = {*above, *roots, *heads}
    others = {name for name in modules if name.rpartition(".")[0] in above and name not in kept}
    names = tuple(sorted(re.escape(name.rpartition(".")[2]) for name in others))
    found = ClassNames(places, names, type(whole).__name__)
    there = {name for name, _ in whole.named_parameters(remove_duplicate=False)}
    own = [name for name, _ in model.named_parameters(remove_duplicate=False) if not _PEFTS_OWN.search(name)]
    fits = all(text_name(found.of(name)) == name for name in own)
    return found if others and fits and there.issuperset(map(found.of, own)) else several


def _whole_model(base: BaseFolder) -> Any:
    """The class that config.json names, else the one that transformers opens for it; None where there is none."""
    import torch
    import transformers
    from accelerate import init_empty_weights

    config = open_config(base.config)
    mapping = transformers.AutoModelForImageTextToText._model_mapping
    named = (base.config.get("architectures") or [""])[0]
    known = {kind.__name__: kind for kind in mapping.values()}
    of_text = {kind.__name__: kind for kind in transformers.AutoModelForCausalLM._model_mapping.values()}
    kind = known.get(named) or of_text.get(named) or mapping.get(type(config), None)
    if kind is None:
        return None
    if named not in known and named in of_text:
        config = config.get_text_config()
    with init_empty_weights(), torch.random.fork_rng(devices=[]):
        return kind(config)
