"""In which 16 bits a model computes: bf16, or fp16 with its residual stream in fp32, for GPUs before Ampere.

fp16 has three more bits of mantissa and ends at 65,504. What goes over that in models of today is the residual stream,
to which every layer adds: it stays in fp32, and so do norms, which read it. A module with linear layers of its own
(attention, an MLP) is handed fp16, computes in it and gives it back; torch adds that to the stream in fp32. What is
over the range inside of a layer shows as logits that are not finite: tried after loading, and by the self-check.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora import numerics
from qlora.device import computes_bf16, name_of
from qlora.errors import HardwareError, ModelError, foreign_failures
from qlora.events import Notice, Sink
from qlora.loss_scale import FP16
from qlora.model.adapter_folder import dtype_of
from qlora.model.weight_streaming import inside
from qlora.numerics import Numerics

BF16 = "bf16"
DTYPES = {BF16: torch.bfloat16, FP16: torch.float16}
USE_BF16 = 'use a GPU that computes in bf16 (RTX 30 and newer) with model.dtype = "bf16", or another base'
# Whose activations are known to go over 65,504 (google-deepmind/gemma and huggingface/transformers say so of Gemma 2
# and 3: their issues and model cards ask for bf16).
KNOWN_TO_OVERFLOW = ("gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text")
_NOT_CAST = ("attention_mask",)  # float32's lowest number in it would be infinite
_TRIAL_TOKENS = 16


def choose(wanted: str, device: torch.device, recorded: Numerics | None = None) -> str:
    """How a run computes: as it began (`recorded`; older versions knew bf16 alone), as the recipe says, or in bf16
    where there is that. Raises HardwareError for bf16 on a GPU that has none."""
    before = None if recorded is None else recorded.dtype or BF16
    chosen = wanted if wanted != "auto" else before or (BF16 if computes_bf16(device) else FP16)
    if chosen == BF16 and not computes_bf16(device):
        who = "the run that goes on computes" if wanted == "auto" else 'model.dtype = "bf16"'
        what = f"{who} in bf16" if wanted == "auto" else who
        hint = "go on where it began, or start anew with mode='fresh'" if before else 'set model.dtype = "auto"'
        raise HardwareError(f"{what}, which {name_of(device)} does not have (that came with Ampere, RTX 30)", hint)
    return chosen


def of_run() -> torch.dtype:
    """As the run under way has it; bf16 outside of one."""
    run = numerics.of_run()
    return DTYPES[(run.dtype if run else None) or BF16]


def name_of_run() -> str:
    return next(name for name, dtype in DTYPES.items() if dtype == of_run())


def of_device(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if computes_bf16(device) else torch.float16


def of_saved(folder: Path, device: torch.device) -> torch.dtype:
    """As a run computed and measured the adapter in `folder`, where `device` can; else as the device does."""
    return torch.float16 if dtype_of(folder) == FP16 else of_device(device)


def kept_in(module: nn.Module, dtype: torch.dtype) -> torch.dtype:
    """The type of a module's own parameters in a model that computes in `dtype`."""
    return torch.float32 if dtype == torch.float16 and _is_norm(module) else dtype


def placed(module: nn.Module, name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """A value as it is kept, of which a base and the cache of bases know bf16. Raises ModelError over fp16's range."""
    wanted = kept_in(module, dtype)
    if value.dtype != torch.bfloat16 or wanted == torch.bfloat16:
        return value
    cast = value.to(wanted)
    if not cast.is_meta and not bool(torch.isfinite(cast).all()):
        what = f"{type(module).__name__}.{name} holds numbers over the range of fp16 (65,504)"
        raise ModelError(what, USE_BF16)
    return cast


def settle(model: Any, dtype: torch.dtype) -> None:
    """Has a loaded model, on whatever device, compute in `dtype`. bf16 is how it is built."""
    if dtype != torch.float16:
        return
    within: set[nn.Module] = set()
    layers = {id(one) for module in model.modules() if isinstance(module, nn.ModuleList) for one in module}
    streamed = {id(one) for one in _in_layers(model)} if inside(model) is not None else set()
    for module in model.modules():
        for name, parameter in module._parameters.items() if id(module) not in streamed else ():
            if parameter is not None and parameter.is_floating_point():
                _cast(module, name, dtype)
        if type(module).__name__ == "Linear4bit":
            module.compute_dtype = module.quant_state.dtype = dtype
        is_whole = module is model or module is model.base_model or id(module) in layers
        if not is_whole and any(isinstance(child, nn.Linear) for child in module.children()):
            module.register_forward_pre_hook(_into_fp16, with_kwargs=True)
            within.update(module.modules())
    for module in model.modules():
        if _is_norm(module):
            module.register_forward_pre_hook(_into_fp32)
            if module in within:
                module.register_forward_hook(_out_in_fp16)
    model.get_input_embeddings().register_forward_hook(_out_in_fp32)
    _hand_to_head(model)
    model.tie_weights()
    model.config.dtype = dtype


def _in_layers(model: Any) -> list[nn.Module]:
    """Modules of the layers, whose weights come and go as they were received (`placed`)."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return [module for layers in lists for layer in layers for module in layer.modules()]


def _hand_to_head(model: Any) -> None:
    """fp16 to the head: from the norm behind the layers, so that nobody watches the head, which `step/head_loss` needs
    as it is; where there is no such norm, at the head."""
    children = list(model.base_model.children())
    last = max((place for place, one in enumerate(children) if isinstance(one, nn.ModuleList)), default=len(children))
    norms = [one for one in children[last:] if _is_norm(one)]
    for norm in norms:
        norm.register_forward_hook(_out_in_fp16)
    if not norms:
        model.get_output_embeddings().register_forward_pre_hook(_into_fp16, with_kwargs=True)


def try_out(model: Any, name: str, device: torch.device, sink: Sink) -> None:
    """One short forward pass of a loaded model, if it computes in fp16. Raises ModelError where it can't."""
    if model.config.dtype != torch.float16:
        return
    vocabulary = int(model.config.get_text_config().vocab_size)
    ids_BS = (torch.arange(_TRIAL_TOKENS, device=device) * 7 % vocabulary)[None]
    with foreign_failures() as failure, torch.no_grad():
        refuse_overflow(name, model(input_ids=ids_BS, use_cache=False).logits)
    if failure.error:
        what = f"{name}: its layers cannot be computed in fp16 with a residual stream in fp32 ({failure.reason[:120]})"
        raise ModelError(what, USE_BF16) from failure.error
    message = "layers compute in fp16, the residual stream and norms in fp32; the loss is scaled"
    if model.config.get_text_config().model_type in KNOWN_TO_OVERFLOW:
        message += "; models of this family are known to go over fp16's range, this one did not when tried"
    sink.emit(Notice("dtype", message))


def refuse_overflow(name: str, logits: Tensor) -> None:
    """Raises ModelError for logits, or what was made of them, that are not finite."""
    if not bool(torch.isfinite(logits).all()):
        raise ModelError(f"{name}: goes over the range of fp16 (65,504): its logits are not finite", USE_BF16)


def _is_norm(module: nn.Module) -> bool:
    """transformers calls every norm one, torch too."""
    return "Norm" in type(module).__name__


def _cast(module: nn.Module, name: str, dtype: torch.dtype) -> None:
    parameter: Any = module._parameters[name]
    cast = placed(module, name, parameter.detach(), dtype)
    if cast.dtype != parameter.dtype:
        module._parameters[name] = nn.Parameter(cast, requires_grad=parameter.requires_grad)


def _to(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, tuple):
        return tuple(_to(one, dtype) for one in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _into_fp16(module: nn.Module, args: Any, named: dict[str, Any]) -> Any:
    kept = {name: value if name in _NOT_CAST else _to(value, torch.float16) for name, value in named.items()}
    return _to(args, torch.float16), kept


def _into_fp32(module: nn.Module, args: Any) -> Any:
    return (_to(args[0], torch.float32), *args[1:])


def _out_in_fp16(module: nn.Module, args: Any, output: Any) -> Any:
    return _to(output, torch.float16)


def _out_in_fp32(module: nn.Module, args: Any, output: Any) -> Any:
    return _to(output, torch.float32)
