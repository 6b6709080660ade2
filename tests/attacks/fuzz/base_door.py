"""A base from a stranger: configuration, headers and index of the weights, tokenizer, template, entries."""

from __future__ import annotations

import json
from pathlib import Path

from tests.attacks.fuzz import goods, nasty
from tests.attacks.fuzz.harness import Door, Scene
from tests.attacks.fuzz.seen import Work

JSON_FILES = ("config.json", "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
# Keys that real configurations have and the tiny one has not.
MORE_KEYS = (
    *("rope_scaling", "rope_parameters", "layer_types", "text_config", "quantization_config", "auto_map", "head_dim"),
    *("sliding_window", "num_labels", "id2label", "decoder_layers", "torch_dtype", "dtype", "attn_implementation"),
    *("pad_token_id", "eos_token_id", "num_experts", "encoder", "pruned_heads", "bad_words_ids", "max_length"),
    *("_name_or_path", "model_type", "architectures", "tie_word_embeddings", "use_cache", "transformers_version"),
)
TOKENIZER_KEYS = (
    *(
        "added_tokens_decoder",
        "additional_special_tokens",
        "extra_special_tokens",
        "model_max_length",
        "tokenizer_class",
    ),
    *("chat_template", "bos_token", "eos_token", "pad_token", "unk_token", "auto_map", "add_bos_token", "legacy"),
)
TEMPLATES = (
    "",
    "{{",
    "{% for m in messages %}",
    "{{ messages[0].x.y.z }}",
    "{{ raise_exception('\x1b[2J no') }}",
    "{{ 'a' * 10**9 }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% include '/etc/passwd' %}",
    "{{ ''.__class__.__mro__ }}",
    "{{ '\ud800' }}",
    "x" * 3_000_000,
    "{{ " + "(" * 2000 + "1" + ")" * 2000 + " }}",
)


def make(scene: Scene) -> Work:
    folder, chance, drawn = scene.goods.copy_base(scene.place / "base"), scene.chance, scene.goods.drawn
    kind = chance.random()
    depth = chance.random()
    if kind < 0.55:
        nasty.json_file(folder / chance.choice(JSON_FILES), chance, drawn, scene.paths)
    elif kind < 0.65:
        name, keys = chance.choice((("config.json", MORE_KEYS), ("tokenizer_config.json", TOKENIZER_KEYS)))
        tree = json.loads((folder / name).read_text())
        tree[chance.choice(keys)] = nasty.value(chance, drawn, scene.paths)
        nasty.replace(folder / name, nasty.dumped(tree))
    elif kind < 0.75:
        nasty.safetensors_file(folder / "model.safetensors", chance, drawn)
    elif kind < 0.85:
        shard_index(folder, chance.random() < 0.5)
        nasty.json_file(folder / "model.safetensors.index.json", chance, drawn, scene.paths)
    elif kind < 0.9:
        text = chance.choice(TEMPLATES)
        nasty.replace(folder / "chat_template.jinja", text.encode("utf-8", "surrogatepass"))
    else:
        names = [*(path.name for path in sorted(folder.iterdir())), "model.safetensors.index.json", "NOTICE", "x.json"]
        nasty.entry(folder / chance.choice(names), chance.choice(nasty.ENTRIES), scene.bystander)
    return lambda: use(folder, scene, depth)


def use(folder: Path, scene: Scene, depth: float) -> None:
    """What the commands do with a base, the slow parts of it for a share of the inputs: `depth` is 0 to 1."""
    import torch

    from qlora import api
    from qlora.model import load
    from qlora.model.resolve import resolve
    from qlora.model.tokenizer import open_tokenizer
    from qlora.model.tokenizer_files import read_files
    from qlora.recipe.reading import recipe_of_base
    from qlora.recipe.sections import QuantizationSection
    from qlora.training import setup

    sink = goods.sink()
    base = resolve(str(folder), "main", sink)
    for entry in base.tensors.values():
        assert 0 <= entry.offset <= entry.offset + entry.nbytes <= entry.file.stat().st_size
    files = read_files(base.path)
    with files.placed() as placed:
        open_tokenizer(placed, base.name)
    if depth < 0.01:
        api.check(scene.goods.loaded().model_copy(update={"model": recipe_of_base(str(folder)).model}), sink=sink)
    elif depth < 0.04:
        setup.prepare_rows(scene.goods.loaded(), files, sink)
    elif depth < 0.16:
        load.load_base(base, QuantizationSection(), "auto", torch.device("cpu"), sink)
    elif depth < 0.175:
        api.estimate_memory(recipe_of_base(str(folder)), vram="12GiB", sink=sink)
    else:
        api.question(recipe_of_base(str(folder)), vram="12GiB", sink=sink)
    sink.close()


def shard_index(folder: Path, other: bool) -> None:
    """Make the base one of shards, as the hub's are."""
    from qlora.model.tensors import read_header

    shard = "model-00001-of-00001.safetensors"
    names = list(read_header(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(folder / shard)
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, shard)}
    if other:
        index["metadata"] = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


DOOR = Door("base", make)
