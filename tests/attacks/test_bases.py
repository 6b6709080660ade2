"""Bases from strangers: pickles, code, paths, headers. Each is refused in two lines, and no marker is left."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from qlora.errors import ModelError, TokenizerError, UserError
from qlora.events import Recorder
from qlora.model import adapters, load
from qlora.model.resolve import resolve
from qlora.model.tokenizer import open_tokenizer
from qlora.recipe.sections import LoraSection, QuantizationSection
from tests.attacks import payloads as p
from tests.attacks.configurations import CONFIGURATIONS
from tests.attacks.payloads import Attack

MARKER = "marker"

# name: (the attack, what the first line says)
ATTACKS: dict[str, tuple[Attack, str]] = {
    # Pickles, by name
    **{
        f"pickle as {name}": (
            lambda base, marker, name=name: p.only_weights(base, name, p.exploit(marker)),  # type: ignore[misc]
            f"pickle only \\({name}\\)",
        )
        for name in ("pytorch_model.bin", "model.pt", "model.pth", "model.pkl", "model.ckpt", "weights.pickle")
    },
    # Pickles, by magic bytes, under the name of safetensors
    **{
        f"pickle {protocol} as safetensors": (
            lambda base, marker, protocol=protocol: p.only_weights(  # type: ignore[misc]
                base, "model.safetensors", p.exploit(marker, protocol)
            ),
            "is a pickle under another name",
        )
        for protocol in (2, 3, 4, 5)
    },
    "torch zip as safetensors": (
        lambda base, marker: p.only_weights(base, "model.safetensors", p.torch_zip(marker)),
        "is a pickle under another name",
    ),
    "torch tar as safetensors": (
        lambda base, marker: p.only_weights(base, "model.safetensors", p.torch_tar(marker)),
        "no safetensors file",
    ),
    "pickle 0 as safetensors": (
        lambda base, marker: p.only_weights(base, "model.safetensors", p.exploit(marker, 0)),
        "no safetensors file",
    ),
    "pickle as config.json": (
        lambda base, marker: (base / "config.json").write_bytes(p.exploit(marker)) and None,
        "config.json: is not valid JSON",
    ),
    "pickle as tokenizer.json": (
        lambda base, marker: (base / "tokenizer.json").write_bytes(p.exploit(marker)) and None,
        "is a pickle under another name",
    ),
    "pickle as a shard": (
        lambda base, marker: p.index(base, "model-2.safetensors")
        or ((base / "model-2.safetensors").write_bytes(p.exploit(marker)) and None),
        "is a pickle under another name",
    ),
    "a shard that is a .bin": (
        lambda base, marker: p.index(base, "pytorch_model.bin")
        or ((base / "pytorch_model.bin").write_bytes(p.torch_zip(marker)) and None),
        "is not a safetensors file",
    ),
    # Code that a configuration chooses
    "auto_map of a model nobody knows": (
        lambda base, marker: p.python_file(base, marker, "evil")
        or p.change(base, "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Config"}),
        r"auto_map\) is never run",
    ),
    "auto_map of a tokenizer": (
        lambda base, marker: p.python_file(base, marker, "evil")
        or (base / "tokenizer.json").unlink()
        or p.change(
            base, "tokenizer_config.json", tokenizer_class="EvilTokenizer",
            auto_map={"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]},
        ),
        "tokenizer cannot be opened",
    ),
    **{
        f"config with {key}": (
            lambda base, marker, key=key, value=value: p.python_file(base, marker, "evil")  # type: ignore[misc]
            or p.change(base, "config.json", **{key: value}),
            re.escape(f"'{key}', which chooses code"),
        )
        for key, value in {
            "trust_remote_code": True,
            "_attn_implementation_internal": "evil/kernel",
            "_experts_implementation_internal": "evil/kernel",
            "attn_implementation": "evil/kernel@main:fn",
            "_attn_implementation": "evil/kernel",
            "_target_": "os.system",
            "_class_path": "os.system",
            "_instantiator": "evil.make",
            "custom_pipelines": {"evil": {"impl": "evil.Pipeline"}},
            "py/object": "os.system",
            "py/reduce": [{"py/function": "os.system"}, "touch x"],
            "__reduce__": ["os.system"],
        }.items()
    },
    "_target_ deep inside": (
        lambda base, marker: p.change(
            base, "config.json", text_config={"a": [{"b": {"_target_": "os.system", "_args_": [p.shell(marker)]}}]}
        ),
        "'_target_', which chooses code",
    ),
    "tokenizer config with trust_remote_code": (
        lambda base, marker: p.change(base, "tokenizer_config.json", trust_remote_code=True),
        "'trust_remote_code', which chooses code",
    ),
    "generation config with custom code": (
        lambda base, marker: p.change(base, "generation_config.json", _target_="os.system"),
        "'_target_', which chooses code",
    ),
    # What an index names
    **{
        f"index names {name}": (
            lambda base, marker, name=name: p.index(base, name),  # type: ignore[misc]
            what,
        )
        for name, what in {
            "../outside.safetensors": "leaves the folder",
            "a/../../outside.safetensors": "leaves the folder",
            "/etc/passwd.safetensors": "is not a relative file name",
            "model\0.safetensors": "is not a relative file name",
            "..\\outside.safetensors": "is not a relative file name",
            "missing.safetensors": "is missing",
            "": "is not a safetensors file|not a relative",
        }.items()
    },
    "index names a link out": (
        lambda base, marker: p.index(base, "link.safetensors") or p.link_out(base, "link.safetensors"),
        "is a link out of the folder",
    ),
    "index names a pipe": (
        lambda base, marker: p.index(base, "pipe.safetensors") or os.mkfifo(base / "pipe.safetensors"),
        "is neither a file nor a folder",
    ),
    "index names a device": (
        lambda base, marker: p.index(base, "null.safetensors")
        or (base / "null.safetensors").symlink_to("/dev/zero"),
        "is a link out of the folder",
    ),
    "index names numbers": (lambda base, marker: p.index(base, 7), "something else than file names"),
    "index names lists": (lambda base, marker: p.index(base, ["a"]), "something else than file names"),
    "index with a key twice": (
        lambda base, marker: p.raw_index(base, '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'),
        "stands twice",
    ),
    "index without a map": (lambda base, marker: p.raw_index(base, '{"weight_map": []}'), "no weight_map"),
    "index nested a million deep": (lambda base, marker: p.raw_index(base, "[" * 1_000_000), "nested deeper than 64"),
    "index of 200,001 tensors": (
        lambda base, marker: p.raw_index(
            base, '{"weight_map": {' + ",".join(f'"{i}":"a.safetensors"' for i in range(200_001)) + "}}"
        ),
        "no weight_map of 1 to 200,000",
    ),
    # Headers of safetensors
    "header of 2^63 bytes": (lambda base, marker: p.header(base, {}, length=1 << 63), "is cut off or no safetensors"),
    "header of 101 MB": (
        lambda base, marker: p.header(base, b"{}", length=101_000_000), "is cut off or no safetensors",
    ),
    "header that is no JSON": (lambda base, marker: p.header(base, b"\xff" * 64), "is not valid JSON"),
    "header that is a list": (lambda base, marker: p.header(base, [1]), "holds no JSON object"),
    "header nested deep": (lambda base, marker: p.header(base, b"[" * 500_000), "nested deeper than 64"),
    "ranges that overlap": (
        lambda base, marker: p.header(base, {"a": p.tensor(), "b": p.tensor(offsets=(32, 96))}, 96),
        "overlaps another tensor",
    ),
    "ranges that are negative": (
        lambda base, marker: p.header(base, {"a": p.tensor(offsets=(-64, 0))}), "no counts",
    ),
    "ranges past the end": (
        lambda base, marker: p.header(base, {"a": p.tensor(shape=(4, 8), offsets=(0, 128))}), "is cut off",
    ),
    "a dtype that lies": (lambda base, marker: p.header(base, {"a": p.tensor(dtype="F64")}), "needs 128"),
    "a dtype that is unknown": (lambda base, marker: p.header(base, {"a": p.tensor(dtype="PICKLE")}), "unknown dtype"),
    "a shape that overflows": (
        lambda base, marker: p.header(base, {"a": p.tensor(shape=(1 << 62, 1 << 62))}), "needs|no counts",
    ),
    "a tensor twice": (
        lambda base, marker: p.header(base, b'{"a": ' + json.dumps(p.tensor()).encode() + b', "a": 1}'),
        "stands twice",
    ),
    # What stands under a file's name
    "config.json is a pipe": (
        lambda base, marker: (base / "config.json").unlink() or os.mkfifo(base / "config.json"),
        "'config.json' is neither a file nor a folder",
    ),
    "tokenizer.json is a pipe": (
        lambda base, marker: (base / "tokenizer.json").unlink() or os.mkfifo(base / "tokenizer.json"),
        "is neither a file nor a folder",
    ),
    "generation_config.json is a device": (
        lambda base, marker: (base / "generation_config.json").unlink(missing_ok=True)
        or (base / "generation_config.json").symlink_to("/dev/random"),
        "is a link out of the folder",
    ),
    "a tokenizer file that is a link to a secret": (
        lambda base, marker: p.link_out(base, "added_tokens.json"), "is a link out of the folder",
    ),
    "a card that is a link to a secret": (
        lambda base, marker: p.link_out(base, "README.md"), "is a link out of the folder",
    ),
    "any other link to a secret": (
        lambda base, marker: p.link_out(base, "notes.bin"), "is a link out of the folder",
    ),
    "a folder that is a link out": (
        lambda base, marker: (base / "additional_chat_templates").symlink_to(base.parent),
        "is a link out of the folder",
    ),
    "a template further in that is a link to a secret": (
        lambda base, marker: (base / "additional_chat_templates").mkdir()
        or p.link_out(base, "additional_chat_templates/tool_use.jinja"),
        "is a link out of the folder",
    ),
    "a configuration that is a link to a secret": (
        lambda base, marker: p.link_out(base, "config.json"), "is a link out of the folder",
    ),
    "links in a circle": (
        lambda base, marker: (base / "a.json").symlink_to("b.json") or (base / "b.json").symlink_to("a.json"),
        "leads nowhere",
    ),
    "an index of millions of lists": (
        lambda base, marker: p.index(base, "x.safetensors")
        or (base / "model.safetensors.index.json").write_text('{"weight_map": [' + "[]," * 5_000_000 + "1]}"),
        "holds more than",
    ),
    "a number that is none in the weights": (
        lambda base, marker: p.not_a_number(base), "tensor 'model.norm.weight' holds values that are not finite",
    ),
    "a licence that is a link to a secret": (
        lambda base, marker: p.link_out(base, "LICENSE"), "is a link out of the folder",
    ),
    "a config of 11 MB": (
        lambda base, marker: (base / "config.json").write_text('{"a": "' + "x" * 11_000_000 + '"}') and None,
        "11,000,0",
    ),
    "a tokenizer of a terabyte": (
        lambda base, marker: os.truncate(base / "tokenizer.json", 1 << 40), "are too many for a file of its kind",
    ),
    # Bombs among the numbers of a configuration
    "more layers than tensors": (
        lambda base, marker: p.change(base, "config.json", num_hidden_layers=1000, layer_types=None),
        "tells of 1,000 layers, but the weights are",
    ),
    **{
        f"config with {name}": (
            lambda base, marker, keys=keys: p.change(base, "config.json", **keys),  # type: ignore[misc]
            f"config.json: .*{what}|tokenizer cannot be opened .*{what.removeprefix('cannot b.*')}",
        )
        for name, (keys, what) in CONFIGURATIONS.items()
    },
    "config nested a thousand deep": (
        lambda base, marker: (base / "config.json").write_text('{"a": ' + "[" * 1000 + "]" * 1000 + "}") and None,
        "config.json: is nested deeper",
    ),
    "config with a number of 10,000 digits": (
        lambda base, marker: (base / "config.json").write_text('{"a": ' + "1" * 10_000 + "}") and None,
        "a number of 10,000 digits",
    ),
    "generation config with ids of another kind": (
        lambda base, marker: p.change(base, "generation_config.json", eos_token_id="</s>"),
        "generation_config.json: eos_token_id",
    ),
    "generation config with a million ids": (
        lambda base, marker: p.change(base, "generation_config.json", eos_token_id=[1] * 1_000_000),
        "eos_token_id has 1,000,000 entries",
    ),
}  # fmt: skip


def test_there_are_enough() -> None:
    assert len(ATTACKS) >= 40


@pytest.mark.parametrize("name", ATTACKS)
def test_refused_in_two_lines_and_nothing_ran(tmp_path: Path, llama: Path, name: str) -> None:
    base, marker = tmp_path / "base", tmp_path / MARKER
    shutil.copytree(llama, base)
    attack, what = ATTACKS[name]
    attack(base, marker)
    started = time.monotonic()
    with pytest.raises(UserError) as refused:
        use(base)
    assert isinstance(refused.value, ModelError | TokenizerError)
    assert re.search(what, refused.value.what), refused.value.what
    assert refused.value.hint and "\n" not in refused.value.what + refused.value.hint
    assert len(refused.value.what) < 500
    assert not marker.exists() and not list(tmp_path.rglob(MARKER))
    assert time.monotonic() - started < 20


def use(base: Path) -> Any:
    """All that a run does with a base before it trains."""
    import torch

    sink = Recorder()
    checked = resolve(str(base), "main", sink)
    open_tokenizer(checked.path, checked.name)
    return load.load_base(checked, QuantizationSection(), "auto", torch.device("cpu"), sink)


def test_code_beside_a_known_model_never_runs(tmp_path: Path, llama: Path) -> None:
    """auto_map on a model that transformers knows: its own model is used, the code beside it is not even opened."""
    base, marker = tmp_path / "base", tmp_path / MARKER
    shutil.copytree(llama, base)
    p.python_file(base, marker, "evil")
    references = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    p.change(base, "config.json", auto_map=references, unknown_key="x", evil_hook="os.system")
    p.change(base, "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})
    (base / "pytorch_model.bin").write_bytes(p.torch_zip(marker))  # beside safetensors: neither opened nor refused
    import torch

    sink = Recorder()
    checked = resolve(str(base), "main", sink)
    model = load.load_base(checked, QuantizationSection(), "auto", torch.device("cpu"), sink)
    open_tokenizer(checked.path, checked.name)
    assert type(model).__module__.startswith("transformers.") and not marker.exists()
    assert not hasattr(model.config, "evil_hook")
    messages = [event.as_dict()["message"] for event in sink.of("notice")]
    (dropped,) = [message for message in messages if "does not know are not read" in message]
    assert "auto_map, evil_hook, unknown_key" in dropped


def test_an_adapter_that_is_a_pickle_is_not_opened(tmp_path: Path, llama: Path) -> None:
    import torch

    marker, folder = tmp_path / MARKER, tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_model.bin").write_bytes(p.torch_zip(marker))
    model = load.load_base(
        resolve(str(llama), "main", Recorder()), QuantizationSection(), "auto", torch.device("cpu"), Recorder()
    )
    tuned = adapters.attach(model, LoraSection(), 0)
    with pytest.raises((OSError, UserError)):
        adapters.load_into(tuned, folder)
    assert not marker.exists()


def test_a_run_opens_no_socket(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, evaluate, deliver and export with every socket refused: nothing outside hub.py wants one."""
    from tests.runs import run_dir, train, write_recipe

    asked: list[Any] = []

    def refuse(*arguments: Any, **_: Any) -> Any:
        asked.append(arguments)
        raise OSError("no network in this test")

    for name in ("connect", "connect_ex", "bind", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    recipe = write_recipe(tmp_path, llama)
    settings = ("train.max_steps=2", "train.batch_size=2", "data.max_length=96", "eval.samples=1")
    train(recipe, *settings, "export.formats=['hf']")
    assert (run_dir(recipe) / "export" / "hf" / "model.safetensors").is_file()
    assert not asked


def test_odd_keys_of_real_configurations_change_nothing(tmp_path: Path, llama: Path) -> None:
    """Ids of padding that no token has, labels of a classifier, outputs as a tuple, numbers that are not finite."""
    import torch

    base = tmp_path / "base"
    shutil.copytree(llama, base)
    odd: dict[str, Any] = {
        "pad_token_id": 100_000,
        "num_labels": 21_000,
        "id2label": {str(i): "x" for i in range(1000)},
        "return_dict": False,
        "output_attentions": True,
        "time_step_limit": [0.0, float("inf")],
    }
    p.change(base, "config.json", **odd)
    models = []
    for folder in (llama, base):
        checked = resolve(str(folder), "main", Recorder())
        models.append(load.load_base(checked, QuantizationSection(), "auto", torch.device("cpu"), Recorder()))
    ids = torch.arange(96)[None]
    assert models[1].config.id2label == models[0].config.id2label and models[1].config.pad_token_id is None
    with torch.no_grad():
        assert torch.equal(*(model(ids).logits for model in models))
