"""Adapters from strangers: configurations, provenance, tensors, paths. Each is refused in two lines that name the file,
the key or tensor and the value, whatever is in it, and nothing of it runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora import api, run_folder
from qlora.errors import ExportError, UserError
from qlora.events import Recorder
from qlora.export.merge.parts import make_plan
from qlora.model.adapter_folder import peft_config, provenance, read_adapter
from qlora.model.meta_model import build
from qlora.model.resolve import resolve
from tests.attacks import payloads as p
from tests.export.cases import of_peft

CONFIG, TENSORS, OURS = "adapter_config.json", "adapter_model.safetensors", "qlora.json"
DELETED = object()
BOMB = "a" * 30 + "!"
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

# Values that stand where another belongs, for every key that is read.
WRONG: dict[str, list[Any]] = {
    "peft_type": [None, DELETED, 7, [], "PREFIX_TUNING", "LORA\0"],
    "r": [None, DELETED, 0, -1, True, "8", 8.5, [8], {}, 1 << 40, (1 << 63) - 1],
    "lora_alpha": [None, DELETED, 0, -16, True, "16", [16], {"a": 1}, 1e300],
    "bias": ["all", 1, ["none"], {}],
    "use_rslora": ["yes", 1, []],
    "use_dora": ["yes", 1, {}, True],
    "ensure_weight_tying": [[]],
    "init_lora_weights": [5, [], {}, "pissa_niter_16", "loftq"],
    "target_modules": [5, {}, [1], [["q_proj"]], ["x" * 2000], ["a"] * 100_001, True],
    "exclude_modules": [5, {"a": 1}, [None]],
    "modules_to_save": [7, [8], {"a": "b"}, ["(a+)+$"], ["a|b"], ["\ud800"], [".*.*.*.*.*.*x"], ["model\n"]],
    "rank_pattern": [7, [], "q_proj", {"q_proj": "8"}, {"q_proj": 0}, {"q_proj": True}, {"": 8}, {"q_proj": 1e3},
                     {"x" * 1001: 8}, {f"m{i}": 8 for i in range(100_001)}, {"q_proj": 1 << 50}, {".*": 3}],
    "alpha_pattern": [7, ["a"], {"q_proj": "8"}, {"q_proj": 0}, {"q_proj": -1}, {"q_proj": None}, {"q_proj": [1]}],
    "trainable_token_indices": [7, "3", [1, "2"], [1.5], [-1], [True], [3, 3], {"embed_tokens": 3}, {"a": [[1]]},
                                {"(a+)+": [1]}, {"embed_tokens": [1 << 62, 1 << 62]}],
    "base_model_name_or_path": [7, ["a"], "a\0b", "a\nb", "x" * 5000, "\ud800"],
    "revision": [7, [], "a\0b", "x" * 2000],
    "target_parameters": [["a"]],
    "layer_replication": [[[0, 4]]],
    "megatron_config": [{"a": 1}],
    "alora_invocation_tokens": [[1]],
    "use_qalora": [True],
    "lora_bias": [True],
}  # fmt: skip
WRONG_OURS: dict[str, list[Any]] = {
    "base": [None, DELETED, 7, [], "", "a\0b", "x" * 5000, "\x1b]0;title\x07"],
    "revision": [None, DELETED, 7, {}, "a\nb"],
    "fingerprint": [7, ["a"], "x" * 2000],
    "quantization": [None, DELETED, "nf4", [], 7, {"type": "int3"}, {"type": 4}, {"double_quant": "yes"},
                     {"double_quant": 1}],
}  # fmt: skip
# The text of a file as it is: what no JSON library would write.
RAW: dict[str, str | bytes] = {
    "nothing": "",
    "half": '{"r": 8',
    "a list": "[1, 2]",
    "a number": "8",
    "null": "null",
    "bytes": b"\xff\xfe\x00\x01",
    "a pickle": p.exploit(Path("/nowhere")),
    "depth": "[" * 100_000,
    "depth of objects": '{"a":' * 200 + "1" + "}" * 200,
    "a doubled key": '{"r": 8, "r": 4}',
    "10,000 digits": '{"r": ' + "9" * 10_000 + "}",
    "10,000 digits of a float": '{"lora_alpha": ' + "9" * 10_000 + ".0}",
    "NaN": '{"lora_alpha": NaN}',
    "Infinity": '{"lora_alpha": -Infinity}',
    "1e999": '{"lora_alpha": 1e999}',
    "11 MB": '{"a": "' + "x" * 11_000_000 + '"}',
}
PATTERNS = {
    "look-ahead": "(?=q_proj)q_proj",
    "look-behind": "(?<=a)b",
    "a reference": r"(a)\1",
    "no end": "(a",
    "too large": r"(\w{100}){100}",
    "nested counts": r"((a{1,1000}){1,1000}){1,1000}",
    "depth": "(" * 500 + ")" * 500,
    "an unknown escape": r"\q",
}
Change = Callable[[Path], Any]


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    def apply(folder: Path) -> None:
        stored = load_file(folder / TENSORS)
        replaced = change(stored)
        kept = replaced if isinstance(replaced, dict) else stored
        save_file({k: v.contiguous() for k, v in kept.items()}, folder / TENSORS)

    return apply


def filled(value: float) -> Change:
    return tensors(lambda t: t[Q_PROJ].view(-1).__setitem__(3, value))


def raw_header(header: Any, data: bytes = b"") -> Change:
    def apply(folder: Path) -> None:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        (folder / TENSORS).write_bytes(struct.pack("<Q", len(text)) + text + data)

    return apply


def linked(name: str, target: str) -> Change:
    def apply(folder: Path) -> None:
        secret = folder.parent / "secret"
        secret.write_text('{"r": 8}')
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target.format(secret=secret, name=name))

    return apply


def piped(name: str) -> Change:
    def apply(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return apply


def pickle_alone(folder: Path) -> None:
    (folder / TENSORS).unlink()
    (folder / "adapter_model.bin").write_bytes(p.torch_zip(folder.parent / "marker"))


TOKEN_ROWS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"


def ids_beyond(folder: Path) -> None:
    tensors(lambda t: {**t, TOKEN_ROWS: torch.ones(2, 64)})(folder)
    p.change(folder, CONFIG, trainable_token_indices=[1, 10**9])


EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
# Tensors, headers and what stands under a file's name: the change, and what the first line says.
CHANGES: dict[str, tuple[Change, str]] = {
    "not a number": (filled(float("nan")), "layers.0.self_attn.q_proj.weight holds numbers that are not finite"),
    "infinity": (filled(float("inf")), "holds numbers that are not finite"),
    "minus infinity": (filled(float("-inf")), "holds numbers that are not finite"),
    "rank of another": (tensors(lambda t: t.update({Q_PROJ: t[Q_PROJ][:2]})), "no matching lora_B|has rank"),
    "no A": (tensors(lambda t: t.pop(Q_PROJ)), "q_proj has no lora_A"),
    "no B": (tensors(lambda t: t.pop(Q_PROJ.replace("_A", "_B"))), "q_proj has no matching lora_B"),
    "rank 0": (tensors(lambda t: {k: v[:0] if "_A" in k else v[:, :0] for k, v in t.items()}), "has rank 0"),
    "A of one dimension": (tensors(lambda t: t.update({Q_PROJ: t[Q_PROJ].view(-1)})), "has rank|no matching"),
    "A of no dimension": (tensors(lambda t: t.update({Q_PROJ: torch.tensor(1.0)})), "no matching lora_B"),
    "A of three": (tensors(lambda t: t.update({Q_PROJ: t[Q_PROJ][None]})), "has rank|no matching"),
    "A of another width": (tensors(lambda t: t.update({Q_PROJ: t[Q_PROJ][:, :7]})), r"\(64, 7\) here"),
    "B of another height": (
        tensors(lambda t: t.update({Q_PROJ.replace("_A", "_B"): t[Q_PROJ.replace("_A", "_B")][:7]})), r"\(7, 64\) here",
    ),
    "whole numbers": (tensors(lambda t: t.update({Q_PROJ: t[Q_PROJ].to(torch.int32)})), "is stored as I32"),
    "eight bits": (tensors(lambda t: t.update({Q_PROJ: t[Q_PROJ].to(torch.float8_e4m3fn)})), "is stored as F8_E4M3"),
    "a module that the base has not": (
        tensors(lambda t: {k.replace("q_proj", "evil_proj"): v for k, v in t.items()}), "evil_proj.weight is not in",
    ),
    "a layer that the base has not": (
        tensors(lambda t: {k.replace("layers.0.", "layers.999999999."): v for k, v in t.items()}), "is not in the base",
    ),
    "a name out of the folder": (
        tensors(lambda t: {k.replace("model.layers", "../../etc"): v for k, v in t.items()}), "is not in the base",
    ),
    "a name with escapes": (
        tensors(lambda t: {**t, "\x1b]0;title\x07": torch.ones(2)}), r"\\x1b\]0;title\\x07' is not in the base",
    ),
    "a name of a megabyte": (tensors(lambda t: {**t, "x" * 1_000_000: torch.ones(2)}), "a name of 1,000,000"),
    "a name that repeats": (tensors(lambda t: {**t, ".base_layer" * 5000: torch.ones(2)}), "a name of 55,000"),
    "two adapters in one": (
        tensors(lambda t: {**t, Q_PROJ.replace(".weight", ".second.weight"): t[Q_PROJ].clone()}), "is there twice",
    ),
    "two kinds in one": (
        tensors(lambda t: {**t, Q_PROJ.replace("lora_A.weight", "lora_embedding_A"): t[Q_PROJ].clone()}),
        "has two kinds of lora_A",
    ),
    "magnitudes without a module": (
        tensors(lambda t: {**t, "base_model.model.x.lora_magnitude_vector": torch.ones(2)}), "x has no lora_A",
    ),
    "magnitudes of another count": (
        tensors(lambda t: {**t, Q_PROJ.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(2)}),
        "has 2 magnitudes for 64 rows",
    ),
    "token rows without ids": (
        tensors(lambda t: {**t, TOKEN_ROWS: torch.ones(2, 64)}),
        "has 2 trained token rows, adapter_config.json names 0",
    ),
    "token rows of no dimension": (
        tensors(lambda t: {**t, TOKEN_ROWS: torch.tensor(1.0)}), "has 0 trained token rows",
    ),
    "embeddings of another width": (
        tensors(lambda t: {**t, "base_model.model.model.embed_tokens.weight": torch.ones(384, 7)}), r"\(384, 7\) here",
    ),
    "embeddings without rows": (
        tensors(lambda t: {**t, "base_model.model.model.embed_tokens.weight": torch.ones(0, 64)}), r"\(0, 64\) here",
    ),
    "embeddings of one dimension": (
        tensors(lambda t: {**t, "base_model.model.model.embed_tokens.weight": torch.ones(384)}), r"\(384,\) here",
    ),
    "no tensor at all": (raw_header({}), "nothing to merge"),
    "all zero": (tensors(lambda t: {k: torch.zeros_like(v) for k, v in t.items()}), "every lora_B is zero"),
    "a million tensors": (
        raw_header(b"{" + b",".join(b'"%d":{}' % i for i in range(1_600_000)) + b"}"), "is no adapter's",
    ),
    "60,000 empty tensors": (raw_header({str(i): EMPTY for i in range(60_000)}), "60,000 tensors"),
    "a header of 2^63 bytes": (lambda folder: (folder / TENSORS).write_bytes(struct.pack("<Q", 1 << 63)), "cut off"),
    "a header that is a list": (raw_header([1]), "holds no JSON object"),
    "a tensor without a shape": (raw_header({"a": {}}), "has no dtype, shape and data_offsets"),
    "a file of zeros": (lambda folder: (folder / TENSORS).write_bytes(bytes(100)), "cut off or no safetensors"),
    "a pickle as safetensors": (
        lambda folder: (folder / TENSORS).write_bytes(p.torch_zip(folder.parent / "marker")), "is a pickle",
    ),
    "a pickle alone": (pickle_alone, "no adapter_model.safetensors"),
    "token ids beyond the vocabulary": (ids_beyond, "embed_tokens.weight is"),
    **{
        f"{name} is {what}": (change(name), message)
        for name in (CONFIG, TENSORS, OURS)
        for what, change, message in (
            ("a link to a secret", lambda name: linked(name, "{secret}"), "is a link out of the folder"),
            ("a link to a device", lambda name: linked(name, "/dev/zero"), "is a link out of the folder|no adapter_"),
            ("a link to itself", lambda name: linked(name, "{name}"), "leads nowhere|no adapter_"),
            ("a pipe", piped, "is neither a file nor a folder|no adapter_"),
        )
    },
    **{
        f"{name} is a link to a secret": (linked(name, "{secret}"), "is a link out of the folder")
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md", "anything")
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    """An adapter as a run of ours leaves it."""
    folder = tmp_path_factory.mktemp("good") / "adapter"
    of_peft(llama, folder)
    ours = {"base": str(llama), "revision": "main", "quantization": {"type": "none"}, "step": 3, "newer": {"a": 1}}
    (folder / OURS).write_text(json.dumps(ours))
    return folder


@pytest.fixture(scope="module")
def base(llama: Path) -> Any:
    found = resolve(str(llama), "main", Recorder())
    return found, build(found)


@pytest.fixture
def adapter(tmp_path: Path, good: Path) -> Path:
    shutil.copytree(good, tmp_path / "adapter")
    return tmp_path / "adapter"


def use(folder: Path, base: Any) -> None:
    """All that an export does with an adapter before it reads the base's weights."""
    found, meta_model = base
    opened, _ = run_folder.adapter_of(folder)
    adapter = read_adapter(opened)
    origin = provenance(opened, adapter.config)
    peft_config(opened)
    make_plan(found, meta_model, adapter, "full", origin.quantization)


def refused(folder: Path, base: Any, *parts: str) -> str:
    """The first line of the refusal, which holds these parts."""
    with pytest.raises(UserError) as caught:
        use(folder, base)
    what, hint = caught.value.what, caught.value.hint
    assert hint and "\n" not in what + hint and len(what) < 700, what
    assert all(part in what for part in parts), what
    assert what.isprintable(), what
    assert not list(folder.parent.rglob("marker"))
    return what


def change(folder: Path, name: str, key: str, value: Any) -> None:
    content = json.loads((folder / name).read_text())
    content[key] = value
    if value is DELETED:
        del content[key]
    (folder / name).write_text(json.dumps(content))


def payloads(table: dict[str, list[Any]]) -> list[Any]:
    return [
        pytest.param(key, value, id=f"{key}-{number}")
        for key, given in table.items()
        for number, value in enumerate(given)
    ]


def test_the_adapter_itself_is_good(adapter: Path, base: Any) -> None:
    use(adapter, base)
    change(adapter, CONFIG, "a_key_of_the_future", {"x": [1]})
    change(adapter, CONFIG, "alpha_pattern", {r".*\.layers\.[01]\..*": 2})
    use(adapter, base)


@pytest.mark.parametrize(("key", "value"), payloads(WRONG))
def test_a_configuration_with_a_wrong_value(adapter: Path, base: Any, key: str, value: Any) -> None:
    change(adapter, CONFIG, key, value)
    what = refused(adapter, base)
    named = CONFIG in what and (key in what or key in ("peft_type", "bias", "init_lora_weights"))
    assert named or "magnitudes are missing" in what or "has rank" in what, what


@pytest.mark.parametrize(("key", "value"), payloads(WRONG_OURS))
def test_a_provenance_with_a_wrong_value(adapter: Path, base: Any, key: str, value: Any) -> None:
    change(adapter, OURS, key, value)
    refused(adapter, base, OURS, key)


@pytest.mark.parametrize("name", RAW)
@pytest.mark.parametrize("file", [CONFIG, OURS])
def test_a_file_that_is_no_json(adapter: Path, base: Any, file: str, name: str) -> None:
    text = RAW[name]
    (adapter / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(adapter, base, file)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_cannot_be_matched(adapter: Path, base: Any, key: str, name: str) -> None:
    change(adapter, CONFIG, key, {PATTERNS[name]: 4})
    refused(adapter, base, CONFIG, key)


@pytest.mark.parametrize("name", CHANGES)
def test_tensors_and_paths(adapter: Path, base: Any, name: str) -> None:
    apply, message = CHANGES[name]
    apply(adapter)
    what = refused(adapter, base)
    assert re.search(message, what), what


# Each of them keeps Python's engine busy for longer than anybody waits, on the names of modules.
SLOW = [r"(([\w.])+)+$!", r"(\w|\w|\.)*!", r"([\w.]*)*([\w.]*)*!", r"(.*)*(.*)*(.*)*(.*)*!"]


@pytest.mark.parametrize("pattern", SLOW)
def test_a_pattern_that_would_never_end_is_matched(adapter: Path, base: Any, pattern: str) -> None:
    for key in ("rank_pattern", "alpha_pattern"):
        change(adapter, CONFIG, key, {pattern: 4, **{f"other{i}": 3 for i in range(5_000)}})
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        change(adapter, CONFIG, key, pattern)
    use(adapter, base)
    config = peft_config(adapter)
    given = [config.target_modules, config.exclude_modules, config.layers_pattern, config.rank_pattern]
    assert pattern not in repr(given) and sorted(config.target_modules)[0] == "model.layers.0.mlp.down_proj"


def test_more_matching_than_anybody_needs(adapter: Path, base: Any) -> None:
    change(adapter, CONFIG, "rank_pattern", {f"x?{i}": 4 for i in range(101)})
    refused(adapter, base, "rank_pattern: 101 regular expressions for 4 modules")
    change(adapter, CONFIG, "rank_pattern", {"(x{1,999}){1,999}": 4})
    refused(adapter, base, "rank_pattern: 1 regular expressions for 4 modules")


@pytest.mark.slow
def test_an_export_of_such_an_adapter_ends_too(adapter: Path, tmp_path: Path) -> None:
    """The whole command, verification by peft included: peft is given names of modules, not the stranger's patterns."""
    change(adapter, CONFIG, "rank_pattern", {SLOW[0]: 3})
    change(adapter, CONFIG, "target_modules", "|".join(["model.*(q|down)_proj", *SLOW]))
    report = api.merge_and_export(adapter, to="hf", out=tmp_path / "out", merge_base="full")
    assert all(ok for _, _, ok, _ in report.checks) and report.fidelity


def test_a_refusal_of_the_whole_command(adapter: Path, tmp_path: Path) -> None:
    filled(float("nan"))(adapter)
    with pytest.raises(ExportError, match="not finite"):
        api.merge_and_export(adapter, to="hf", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
