"""Several adapters as one: what peft makes of them to 1e-5, and refusals that name the adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora import api
from qlora.errors import ExportError
from qlora.events import Recorder
from qlora.export import combine
from qlora.export.combination import Combination
from qlora.model.adapter_folder import read_adapter
from qlora.recipe.sections import LoraSection, QuantizationSection
from tests.export.cases import KINDS, exported, line, name_the_base, of_peft, trained

PLAIN = QuantizationSection(type="none")
FILE = "adapter_model.safetensors"
Folders = dict[str, Path]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Folders:
    """Adapters made by peft: of two scales, one of another rank, one on other layers."""
    place = tmp_path_factory.mktemp("adapters")
    settings: dict[str, dict[str, Any]] = {
        "one": {},
        "other": {"use_rslora": True, "lora_alpha": 9},
        "wide": {"r": 6, "target_modules": ["q_proj", "o_proj"]},
    }
    for number, (name, some) in enumerate(settings.items()):
        of_peft(llama, place / name, **some)
        name_the_base(place / name, llama)
        generator = torch.Generator().manual_seed(number)
        tensors = load_file(place / name / FILE)
        moved = {key: value + torch.randn(value.shape, generator=generator) * 0.05 for key, value in tensors.items()}
        save_file(moved, place / name / FILE)
    return {name: place / name for name in settings}


def members(folders: Folders, names: list[str], combination: Combination) -> list[combine.Member]:
    pairs = zip(names, combination.weights, strict=True)
    return [combine.Member(name, read_adapter(folders[name]), weight) for name, weight in pairs]


def merged(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    state: dict[str, torch.Tensor] = PeftModel.from_pretrained(model, folder).merge_and_unload().state_dict()
    return state


def by_peft(base: Path, folders: Folders, names: list[str], combination: Combination) -> dict[str, torch.Tensor]:
    """The base with peft's own combination merged in."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft_model = PeftModel.from_pretrained(model, folders[names[0]], adapter_name=names[0])
    for name in names[1:]:
        peft_model.load_adapter(folders[name], adapter_name=name)
    kind = "cat" if combination.method == "linear" else combination.method
    weights = list(combination.weights)
    peft_model.add_weighted_adapter(names, weights, "all", combination_type=kind, density=combination.kept)
    peft_model.set_adapter("all")
    state: dict[str, torch.Tensor] = peft_model.merge_and_unload().state_dict()
    return state


@pytest.mark.parametrize(
    ("names", "combination"),
    [
        (["one", "other"], Combination((0.7, 0.3))),
        (["one", "wide"], Combination((0.7, -0.4))),
        (["one", "other", "wide"], Combination((0.5, 0.25, 1.5))),
        (["one", "other"], Combination((0.7, 0.3), "ties", 0.4)),
        (["one", "other"], Combination((0.7, -0.3), "ties")),
        (["one", "other"], Combination((0.7, 0.3), "magnitude_prune", 0.6)),
        (["one", "other"], Combination((0.7, 0.3), "dare_linear", 1.0)),
        (["one", "other"], Combination((0.7, 0.3), "dare_ties", 1.0)),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:The density")
def test_it_is_what_peft_makes_of_them(
    tmp_path: Path, llama: Path, theirs: Folders, names: list[str], combination: Combination
) -> None:
    parts = members(theirs, names, combination)
    combine.check(parts, combination)
    combine.write(parts, combination, tmp_path, {"base": str(llama), "revision": "main"})
    ours, peft = merged(llama, tmp_path), by_peft(llama, theirs, names, combination)
    base = merged(llama, theirs["one"])
    for name, value in peft.items():
        assert torch.allclose(ours[name], value, rtol=0, atol=1e-5), name
    assert any(not torch.equal(base[name], value) for name, value in ours.items())


def test_what_dare_drops_follows_from_the_seed(tmp_path: Path, theirs: Folders) -> None:
    files = {}
    for name, seed in (("a", 3), ("again", 3), ("b", 4)):
        combination = Combination((1.0, 1.0), "dare_linear", 0.3, seed)
        (tmp_path / name).mkdir()
        torch.manual_seed(len(name))  # which it leaves as it was, and does not read
        before = torch.random.get_rng_state()
        parts = members(theirs, ["one", "one"], combination)
        combine.write(parts, combination, tmp_path / name, {"base": "b", "revision": "main"})
        assert torch.equal(before, torch.random.get_rng_state())
        files[name] = load_file(tmp_path / name / FILE)
    assert all(torch.equal(value, files["again"][key]) for key, value in files["a"].items())
    assert any(not torch.equal(value, files["b"][key]) for key, value in files["a"].items())
    values = torch.cat([value.flatten() for value in files["a"].values()])
    assert (values == 0).float().mean().item() == pytest.approx(0.7**2, abs=0.05)  # dropped in both


def test_layers_that_one_alone_has_are_said(theirs: Folders) -> None:
    combination, sink = Combination((0.7, 0.3)), Recorder()
    combine.say(members(theirs, ["one", "wide"], combination), combination, sink)
    told = [(event.as_dict()["message"], event.as_dict()["count"]) for event in sink.of("notice")]
    assert told[0] == ("0.7 × one + 0.3 × wide, by linear", 2)
    assert told[1][0].startswith("layers are not in all of the adapters") and told[1][1] > 0


def test_what_does_not_add_up_is_refused(tmp_path: Path, llama: Path, theirs: Folders) -> None:
    folders = {**theirs}
    for name, lora in {**KINDS, "narrow": LoraSection(r=2, target_modules=("q_proj",))}.items():
        if name in ("dora", "whole", "narrow"):
            trained(llama, tmp_path / name, lora, PLAIN)
            folders[name] = tmp_path / name
    cases = [
        ("dora", "linear", "dora: is DoRA"),
        ("whole", "linear", r"whole: has trained lm_head.weight whole"),
        ("narrow", "ties", "ties needs one rank, and model.layers.0.self_attn.q_proj.weight has 2 and 4"),
    ]
    for name, method, what in cases:
        combination = Combination((0.5, 0.5), method)
        with pytest.raises(ExportError, match=what):
            combine.check(members(folders, ["one", name], combination), combination)
    narrow = members(folders, ["one", "narrow"], Combination((0.5, 0.5)))
    combine.check(narrow, Combination((0.5, 0.5)))


def test_a_combination_is_exported_with_what_it_was_made_of(tmp_path: Path, llama: Path, theirs: Folders) -> None:
    sources = [theirs["one"], theirs["other"]]
    combination = Combination((0.7, 0.3), "ties", 0.5)
    report = exported(sources, combine=combination, to=["hf", "adapter"], out=tmp_path / "out")
    assert [product.format for product in report.products] == ["hf", "adapter"]
    content = json.loads((tmp_path / "out" / "hf" / "export.json").read_text())
    said = content["combined"]
    assert (said["method"], said["density"], [each["weight"] for each in said["adapters"]]) == ("ties", 0.5, [0.7, 0.3])
    for kind in ("hf", "adapter"):
        card = (tmp_path / "out" / kind / "README.md").read_text()
        assert "0.7 × one + 0.3 × other, by ties, density 0.5" in card and str(tmp_path) not in card
    ours, peft = (
        load_file(tmp_path / "out" / "hf" / "model.safetensors"),
        by_peft(llama, theirs, ["one", "other"], combination),
    )
    for name, value in ours.items():
        assert torch.allclose(value.float(), peft[name], rtol=2**-7, atol=1e-3), name
    again = exported(tmp_path / "out" / "adapter", to="hf", out=tmp_path / "again", merge_base="full")
    assert load_file(again.folder / "model.safetensors").keys() == ours.keys()


def test_what_dare_draws_leaves_every_generator_as_it_was(
    tmp_path: Path, theirs: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.manual_seed seeds the devices too, and of one that is not begun yet it keeps the seed for later."""

    def seeds_devices(_: int) -> None:
        raise AssertionError("the generators of all devices")

    combination = Combination((0.7, 0.3), "dare_linear", 0.5, 3)
    state = torch.get_rng_state()
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        monkeypatch.setattr(torch, "manual_seed", seeds_devices)
        combine.write(
            members(theirs, ["one", "other"], combination),
            combination,
            tmp_path / place,
            {"base": "x", "revision": None},
        )
        monkeypatch.undo()
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(3)
        state = torch.get_rng_state()
    one, other = (load_file(tmp_path / place / FILE) for place in ("a", "b"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.slow
def test_it_is_verified_as_the_combined_model(tmp_path: Path, llama: Path) -> None:
    for name in ("plain", "some"):
        trained(llama, tmp_path / name, KINDS[name])
    options = api.export_options(max_kl=0.05)
    report = api.merge_and_export(
        [tmp_path / "plain", tmp_path / "some"],
        combine=Combination((0.7, 0.3)),
        to=["hf", "gguf", "adapter-gguf", "adapter"],
        quants=["f16"],
        options=options,
        out=tmp_path / "out",
    )
    assert len(report.products) == 4 and all(ok for _, _, ok, _ in report.checks)
    assert line(report, "hf").kl < 0.01 and line(report, "gguf-f16").kl < 0.01
    text = (tmp_path / "out" / "gguf-f16" / "README.md").read_text()
    assert "0.7 × plain + 0.3 × some, by linear" in text
