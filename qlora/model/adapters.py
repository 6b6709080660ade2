"""Low-rank adapters beside the frozen layers. The only user of peft.

They are bf16 (the optimizer keeps fp32 masters), drawn on the CPU from the recipe's seed, whatever device the model is
on and whatever the global random state, and change nothing at step 0: B is zero. Only inits that leave the base's
weights alone exist here, so that the saved adapter always belongs to the base as published. DoRA's magnitudes stay in
float32: one number an output row, whose early changes (0.1 %) are smaller than a step of bf16 (0.4 %).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qlora.batch import Batch
from qlora.device import random_state_kept
from qlora.errors import ModelError, foreign_failures
from qlora.model import dora, eva, lora_functions, mixture_adapters
from qlora.model.adapter_folder import ADAPTER_CONFIG, ADAPTER_FILE, peft_config, stored_tensors
from qlora.model.linear_use import use_of
from qlora.model.meta_model import head_of, linear_layers
from qlora.model.weight_names import ClassNames
from qlora.model.weight_receiving import device_of, for_saved, refuse_on_host
from qlora.model.weight_streaming import inside, parts_in_place
from qlora.third_party import import_bitsandbytes, old_names_in_peft

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

    from qlora.recipe.sections import LoraSection

ADAPTER = "default"


def attach(
    model: Any,
    lora: LoraSection,
    seed: int,
    dtype: torch.dtype = torch.bfloat16,
    eva_batches: Iterable[Batch] | None = None,
    functions: str | None = None,
) -> PeftModel:
    """Puts adapters on the layers that `lora` names, in `dtype`, drawn from `seed`; everything else stays frozen.

    `eva_batches` are a few training batches for init "eva", which starts A from the layers' inputs. `functions` compute
    the layers: those of the run under way, or peft's. Raises ModelError for a layer or module that cannot be trained.
    """
    import_bitsandbytes()  # peft would import it as well, and not quietly
    from peft import get_peft_model

    targets = _targets(model, lora.target_modules)
    asked = {layer for name in targets for layer in _named(name, (key for key, _ in linear_layers(model)))}
    whole = _whole_modules(model, lora.modules_to_save)
    batches = list(eva_batches or ())
    if lora.init == "eva" and not batches:
        what = 'lora.init = "eva" needs rows to start from'
        raise ModelError(what, 'add training rows, or set lora.init = "default"')
    training = model.training
    with random_state_kept(device_of(model)):  # EVA draws where its layers are
        torch.manual_seed(seed)
        try:
            norms, names = dora.norms_later(inside(model) is not None), mixture_adapters.names_kept(model)
            with old_names_in_peft(), names, norms:
                peft_model = get_peft_model(model, _config(lora, targets, whole), autocast_adapter_dtype=False)
        except ValueError as error:  # peft knows layers that must stay as they are, such as Mamba's out_proj
            what = f"lora.target_modules: {str(error).splitlines()[0].rpartition('] ')[2]}"
            raise ModelError(what, f"name the layers: {targets} without those") from error
        in_fp32 = dtype == torch.float16  # norms, which are trained as they are computed
        for name, parameter in trainable(peft_model).items():
            if "lora_magnitude_vector" not in name and not (in_fp32 and ".modules_to_save." in name):
                parameter.data = parameter.data.to(dtype)
        if lora.experts:
            mixture_adapters.attach_to_experts(model, lora, dtype)
        if lora.init == "eva":
            eva.start_from_inputs(peft_model, batches, ADAPTER)
    dora.without_identity(peft_model)
    for part in parts_in_place(peft_model):
        dora.restart_magnitudes(part, ADAPTER)
    _check_layers(peft_model)
    mixture_adapters.check_adapted(model, asked)
    lora_functions.put_in(peft_model, functions or lora_functions.of_run())
    return peft_model.train(training)


def trainable(model: Any) -> dict[str, nn.Parameter]:
    """What is trained, by name, in the order of the names: the same in every process."""
    return {name: parameter for name, parameter in sorted(model.named_parameters()) if parameter.requires_grad}


def save(model: PeftModel, folder: Path, base_name: str, commit: str | None, names: ClassNames | None = None) -> None:
    """Write the adapter into `folder` in PEFT's layout, for `PeftModel.from_pretrained` and for `load_into`.

    `base_name` and `commit` are the base's as in the recipe: whoever opens the adapter looks for it under that name.
    `names` are those of the class that a multimodal base names.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    # save_embedding_layers=True or "auto" would ask the hub for the base's configuration.
    state = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    state = mixture_adapters.with_experts(model, state)
    stored = {names.of_tensor(name) if names else name: tensor for name, tensor in state.items()}
    tensors = {name: stored[name].detach().cpu().contiguous() for name in sorted(stored)}
    save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})
    model.peft_config[ADAPTER].save_pretrained(str(folder))
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    config |= {"base_model_name_or_path": base_name, "revision": commit, "inference_mode": True}
    # peft writes its sets in an order that differs from process to process.
    config["target_modules"] = sorted(config["target_modules"])
    config["target_parameters"] = mixture_adapters.targets_of_experts(model) or None
    config = names.of_config(config) if names else config
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_into(model: PeftModel, folder: Path) -> None:
    """Gives attached adapters the weights that `save` wrote. Raises ModelError when they are not of the same shape."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    stored = stored_tensors(folder)
    wanted = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    wanted = mixture_adapters.with_experts(model, wanted)
    ours, theirs = ({(name, tensor.shape) for name, tensor in state.items()} for state in (wanted, stored))
    if differing := sorted({name for name, _ in ours ^ theirs}):
        what = f"{len(differing)} tensors do not fit the recipe's adapter, {differing[0]} first"
        raise ModelError(
            f"{folder / ADAPTER_FILE}: {what}",
            "use the recipe that made this adapter, or start afresh with mode='fresh'",
        )
    beside = mixture_adapters.load_experts(model, stored)
    with mixture_adapters.names_kept(model.get_base_model()):
        set_peft_model_state_dict(model, beside, adapter_name=ADAPTER)


def open_saved(model: Any, folder: Path) -> PeftModel:
    """The model with a saved adapter on it, ours or another trainer's, frozen, in the precision that it was saved in.

    Raises ModelError when peft cannot put it on this model, all of it.
    """
    import_bitsandbytes()
    from peft import get_peft_model, set_peft_model_state_dict

    of_experts, saved = mixture_adapters.parted(folder, stored_tensors(folder))
    for_saved(model, saved)
    _resize_like(model, saved)
    norms, names = dora.norms_later(inside(model) is not None), mixture_adapters.names_kept(model)
    with foreign_failures() as failure, old_names_in_peft(), names, norms:
        peft_model = get_peft_model(model, peft_config(folder), ADAPTER, autocast_adapter_dtype=False)
        unread = set_peft_model_state_dict(peft_model, saved, adapter_name=ADAPTER).unexpected_keys
    if failure.error or unread:
        reason = failure.reason if failure.error else f"{len(unread)} of its tensors have no place, {unread[0]} first"
        what = f"{folder}: does not fit this base ({reason})"
        raise ModelError(what, "name the base that it was trained on with `base_model`") from failure.error
    mixture_adapters.put_on_experts(model, folder, of_experts)
    # peft gives every tensor the base's dtype: DoRA's magnitudes would be rounded to bf16 (0.4 % of their size).
    for name, parameter in peft_model.named_parameters():
        stored = saved.get(name.replace(f".{ADAPTER}.weight", "").replace(f".{ADAPTER}", ""))
        if "lora_magnitude_vector" in name and stored is not None:
            parameter.data = stored.to(parameter.device)
    dora.without_identity(peft_model)
    _check_layers(peft_model)
    lora_functions.put_in(peft_model, lora_functions.of_saved(folder, device_of(peft_model)))
    return peft_model.eval()


def _resize_like(model: Any, saved: dict[str, Tensor]) -> None:
    """Give the model as many token rows as an adapter brings that was trained with tokens added to the vocabulary."""
    embeddings = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embeddings)
    rows, width = embeddings.weight.shape
    for key, tensor in saved.items():
        whole = f".{name}." in key and key.endswith(".weight") and tensor.ndim == 2 and "lora_" not in key
        if whole and tensor.shape[1] == width and tensor.shape[0] != rows:
            model.resize_token_embeddings(tensor.shape[0], mean_resizing=False)
            return


def _config(lora: LoraSection, targets: list[str], whole: list[str]) -> LoraConfig:
    from peft import EvaConfig, LoraConfig

    init: Any = {"default": True, "gaussian": "gaussian", "eva": "eva"}[lora.init]
    return LoraConfig(
        r=lora.r,
        lora_alpha=int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=targets,
        init_lora_weights=init,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        modules_to_save=whole or None,
        # rho = 1: every layer keeps rank r. Above 1, EVA moves ranks between layers and drops some.
        eva_config=EvaConfig(rho=1.0) if lora.init == "eva" else None,
        task_type="CAUSAL_LM",
        bias="none",
    )


def _targets(model: Any, wanted: str | tuple[str, ...]) -> list[str]:
    """Module names as peft takes them: the last parts of the names, where they mean the same layers."""
    layers = dict(linear_layers(model))
    suffixes = sorted({name.rpartition(".")[2] for name in layers})
    if wanted == "all-linear":
        meant = mixture_adapters.loadable(model, layers)
        last = sorted({name.rpartition(".")[2] for name in meant})
        matched = sorted(name for name, _ in model.named_modules() if name.rpartition(".")[2] in last)
        return last if matched == meant else meant
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    head = next((name for name, module in model.named_modules() if module is head_of(model)), "lm_head")
    kept = use_of(model, layers).kept
    for name in names:
        if name == head:
            what = f"lora.target_modules: {name} is the head, which is computed in pieces and takes no adapter"
            raise ModelError(what, "leave it out, or train it whole with lora.modules_to_save")
        if not _named(name, layers):
            mixture_adapters.refuse(model, name, "lora.target_modules")
            what = f"lora.target_modules: the model has no linear layer {name!r}"
            if _named(name, kept):
                what = f"lora.target_modules: the model reads or shares {name} by itself: it takes no adapter"
            raise ModelError(what, f'use "all-linear" or some of: {", ".join(suffixes)}')
    if any(_named(name, kept) for name in names) or mixture_adapters.is_mixture(model):
        return sorted({layer for name in names for layer in _named(name, layers)})
    return sorted(set(names))


def _named(name: str, layers: Iterable[str]) -> list[str]:
    """Those of `layers` that a name of lora.target_modules means: whole, or by its last parts."""
    return [layer for layer in layers if layer == name or layer.endswith(f".{name}")]


def _whole_modules(model: Any, names: tuple[str, ...]) -> list[str]:
    """Full names of the modules to be trained whole: peft would take `norm` for `input_layernorm` as well."""
    modules = dict(model.named_modules())
    tied = {key.rpartition(".")[0] for pair in model.all_tied_weights_keys.items() for key in pair}
    whole: list[str] = []
    for name in names:
        mixture_adapters.refuse(model, name, "lora.modules_to_save")
        matched = [key for key in modules if key == name or key.endswith(f".{name}")]
        if not matched:
            what = f"lora.modules_to_save: the model has no module {name!r}"
            raise ModelError(what, "name a module such as lm_head, embed_tokens or norm")
        if tied.intersection(matched):
            what = f"lora.modules_to_save: {name} shares its weight with {' and '.join(sorted(tied - {*matched}))}"
            raise ModelError(what, "leave it out: trained apart, the two would no longer be one weight when merged")
        within = [module for key in matched for module in modules[key].modules()]
        if any(type(module).__name__ == "Linear4bit" for module in within):
            what = f"lora.modules_to_save: {name} is held in 4 bit and cannot be trained whole"
            raise ModelError(what, "leave it to lora.target_modules")
        refuse_on_host(model, name, within)
        whole += matched
    return sorted(set(whole))


def _check_layers(model: Any) -> None:
    """peft attaches a plain layer to a 4-bit one in silence when it does not know that the model is in 4 bit."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.bnb import Linear4bit

    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and type(layer.get_base_layer()).__name__ == "Linear4bit":
            assert isinstance(layer, Linear4bit), f"{name}: a plain adapter on a 4-bit layer"
