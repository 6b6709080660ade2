"""Adapters that have moved, and what is made of them: shared by the tests of exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from qlora import api
from qlora.events import Recorder
from qlora.export.artifacts import ExportOptions
from qlora.export.merge.merge import Merge
from qlora.export.merge.parts import make_plan
from qlora.model import adapters, load
from qlora.model.adapter_folder import read_adapter
from qlora.model.meta_model import build
from qlora.model.resolve import resolve
from qlora.model.weight_names import class_names
from qlora.recipe.sections import LoraSection, QuantizationSection

NF4 = QuantizationSection()
KINDS = {
    "plain": LoraSection(r=4, alpha=16),
    "rslora": LoraSection(r=9, alpha=16, use_rslora=True),
    "dora": LoraSection(r=4, alpha=16, use_dora=True),
    "some": LoraSection(r=4, alpha=16, target_modules=("q_proj", "down_proj")),
    "whole": LoraSection(r=4, alpha=16, modules_to_save=("lm_head",)),
}


def trained(base_dir: Path, folder: Path, lora: LoraSection, quantization: QuantizationSection = NF4):  # type: ignore[no-untyped-def]
    """A model with an adapter that has moved, and that adapter saved with what it was trained against."""
    base = resolve(str(base_dir), "main", Recorder())
    model = load.load_base(base, quantization, "auto", torch.device("cpu"), Recorder())
    model = adapters.attach(model, lora, seed=1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in adapters.trainable(model).items():
            if "lora_A" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.02)
    folder.mkdir(parents=True, exist_ok=True)
    adapters.save(model, folder, base.name, base.commit, class_names(base, model))
    said = {"base": base.name, "revision": "main", "fingerprint": base.fingerprint}
    (folder / "qlora.json").write_text(json.dumps({**said, "quantization": quantization.model_dump()}))
    return model.eval()


def exported(adapter: Path, **settings):  # type: ignore[no-untyped-def]
    """What the command does, without reopening it in another process."""
    return api.merge_and_export(adapter, options=api.export_options(verify=False), **settings)


def logits(model) -> torch.Tensor:  # type: ignore[no-untyped-def]
    ids = torch.arange(4, 68).view(2, 32)
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.float()


def kl(reference: torch.Tensor, other: torch.Tensor) -> float:
    p, q = torch.log_softmax(reference, -1), torch.log_softmax(other, -1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def opened(folder: Path, dtype: torch.dtype = torch.bfloat16):  # type: ignore[no-untyped-def]
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def of_peft(base: Path, folder: Path, resize: int = 0, **settings):  # type: ignore[no-untyped-def]
    """An adapter made by peft alone on a plain model in fp32, moved from its start and saved by peft itself."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if resize:
        model.resize_token_embeddings(resize)
    chosen = {"target_modules": ["q_proj", "down_proj"], **settings}
    model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **chosen}))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    model.save_pretrained(folder)
    return model.eval()


def merge_of(base: Path, adapter: Path, **settings) -> Merge:  # type: ignore[no-untyped-def]
    found, own = resolve(str(base), "main", Recorder()), read_adapter(adapter)
    values = {
        "merge_base": "full",
        "quantization": QuantizationSection(type="none"),
        "dtype": torch.float32,
        "device": torch.device("cpu"),
        **settings,
    }
    plan = make_plan(found, build(found), own, values["merge_base"], values["quantization"])
    return Merge(found, own, plan=plan, **values)


def whole(tensor, unit: int = 1) -> torch.Tensor:  # type: ignore[no-untyped-def]
    return torch.cat([block.reshape(-1) for block in tensor.blocks(unit)]).view(tensor.shape)


def edit(file: Path, **changes: object) -> None:
    """Change keys of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def export(source: Path, *to: str, **options: Any) -> Any:
    """What the command does, verification included where it is not switched off."""
    where = {key: options.pop(key) for key in ("quants", "out", "merge_base", "base_model", "sink") if key in options}
    return api.merge_and_export(source, to=to, options=ExportOptions(**options), **where)


def line(report: Any, name: str) -> Any:
    """The entry of that name in the table of fidelity."""
    return next(entry for entry in report.fidelity if entry.name == name)


def name_the_base(adapter: Path, base: Path) -> None:
    """As peft names it where it has opened the base itself."""
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": str(base)}))
