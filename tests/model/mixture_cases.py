"""Tiny mixtures for the tests of this room: experts in 4 bit beside plain ones, with our adapters and with peft's."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qlora.model import adapters, experts, mixture_adapters
from qlora.model.meta_model import linear_layers
from qlora.model.mixtures import experts_in
from qlora.recipe.sections import LoraSection, QuantizationSection
from qlora.step.experts import NAME
from tests.families import make_model
from tests.mixtures import VOCAB, make_config, narrow

CPU = torch.device("cpu")
LORA = LoraSection(r=4, alpha=12, experts=True)


def held(config: Any) -> tuple[Any, Any]:
    """A model whose experts are in 4 bit, and one with the same weights dequantized that computes them eagerly."""
    experts.register()
    model = make_model(config)
    plain = copy.deepcopy(model)
    own = {name: (module, leaf, getattr(module, leaf).detach()) for name, module, leaf in experts.projections(model)}
    experts.hold(model, QuantizationSection())
    experts.keep_routing_still(model)
    experts.keep_routing_still(plain)
    for name, (module, leaf, weights) in own.items():
        matrices = weights.transpose(1, 2) if module.is_transposed else weights
        slab = getattr(module, leaf)
        experts.fill(slab, lambda expert, of=matrices: lambda start, end: of[expert][start:end], CPU)
        back = slab.read(0, slab.shape[0], torch.float32)
        plain.get_parameter(name).data = back.transpose(1, 2).contiguous() if module.is_transposed else back
    for one, function in ((model, NAME), (plain, "eager")):
        for _, module in experts_in(one):
            module.config._experts_implementation = function
    return model, plain


def logits(model: Any) -> Tensor:
    for module in model.modules():
        if getattr(getattr(module, "config", None), "_experts_implementation", None) is not None:
            module.config._experts_implementation = "eager"
    with torch.no_grad():
        return model(input_ids=torch.arange(4, 40)[None], use_cache=False).logits


def with_values(model: Any, seed: int = 3) -> Any:
    """Every B drawn, in the order of the names."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapters.trainable(model).items():
        if "lora_B" in name:
            parameter.data = (0.1 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
    return model


def tuned(model: Any, lora: LoraSection = LORA) -> Any:
    return with_values(adapters.attach(model.requires_grad_(False), lora, 0, torch.float32, functions="peft").train())


def of_peft(plain: Any, ours: Any, lora: LoraSection = LORA) -> Any:
    """peft's own adapters (`target_parameters`) on a model with floating experts, with the values of `ours`."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    layers = mixture_adapters.loadable(plain, dict(linear_layers(plain)))
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        use_rslora=lora.use_rslora,
        target_modules=layers,
        target_parameters=[name for name, _, _ in experts.projections(plain)],
    )
    model = get_peft_model(plain.requires_grad_(False), config, autocast_adapter_dtype=False).train()
    with mixture_adapters.names_kept(plain):
        unread = set_peft_model_state_dict(model, file_of(ours)).unexpected_keys
    assert not unread, unread
    return model


def file_of(model: Any) -> dict[str, Tensor]:
    """What is saved of a model with adapters, by peft's names."""
    from peft import get_peft_model_state_dict

    return mixture_adapters.with_experts(model, get_peft_model_state_dict(model, save_embedding_layers=False))


def gradients_by_file(model: Any) -> dict[str, Tensor]:
    """The gradients of all adapters as the file has their values."""
    for parameter in adapters.trainable(model).values():
        parameter.data = parameter.grad
    return {name: tensor.clone() for name, tensor in file_of(model).items()}


def passed(model: Any, tokens: tuple[int, int] = (2, 24)) -> dict[str, Tensor]:
    """Logits, the gradient of the inputs, and by its name in the file that of each adapter."""
    ids_BS = torch.randint(4, VOCAB, tokens, generator=torch.Generator().manual_seed(1))
    hidden_BSD = model.get_input_embeddings()(ids_BS).detach().requires_grad_()
    logits = model(inputs_embeds=hidden_BSD, use_cache=False).logits
    trained = adapters.trainable(model)
    for parameter in trained.values():
        parameter.grad = None
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    values = {name: parameter.data for name, parameter in trained.items()}
    found = gradients_by_file(model)
    for name, parameter in trained.items():
        parameter.data = values[name]
    return {"logits": logits.detach(), "inputs": hidden_BSD.grad, **found}


def furthest(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest difference of any tensor by their 2-norms, and which one it is. Of what is next to nothing beside
    the largest (queries of a single token, whose scores are 1) only the size is compared."""
    assert found.keys() == wanted.keys()
    largest = max(float(tensor.norm()) for name, tensor in wanted.items() if ".lora_" in name or name == "x")
    off = {
        name: float((found[name] - one).norm()) / max(float(one.norm()), 1e-4 * largest) for name, one in wanted.items()
    }
    worst = max(off, key=lambda name: off[name])
    return off[worst], worst


def pair(family: str, shape: str, lora: LoraSection = LORA) -> tuple[Any, Any]:
    """A model whose experts are in 4 bit with our adapters, and plain transformers' with peft's, of the same values."""
    model, plain = held(make_config(family, narrow(family) if shape == "narrow" else None))
    ours = tuned(model, lora)
    return ours, of_peft(plain, ours, lora)


def modules_of(model: Any) -> list[Any]:
    """What a layer calls as its experts: ours, or peft's wrapper around them."""
    from peft.tuners.lora.layer import ParamWrapper

    causal_lm = model.get_base_model()
    wrapped = [one for one in causal_lm.modules() if isinstance(one, ParamWrapper)]
    inner = {id(one.base_layer) for one in wrapped}
    return [one for one in wrapped if id(one) not in inner] or [one for _, one in experts_in(causal_lm)]
