"""A base, rows and a recipe in the temporary folder, for proofs that go through the commands and their files."""

from __future__ import annotations

import json
from pathlib import Path

from qlora import api
from qlora.events import Recorder
from qlora.prove.proof import Place
from qlora.prove.shapes import SHAPES, config_of
from qlora.recipe.reading import Recipe, load_recipe

STEPS = 4
SPECIAL = ("<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")
ROWS_OF_A_PACK = 3


def recipe_file(place: Place, name: str) -> Path:
    """The recipe `name`.toml of a run in `place.folder`; base and rows are made with the first one.

    Real lengths where there is a GPU: its kernels sum in more than one order only from several blocks of keys on.
    """
    base = place.folder / "base"
    if not base.exists():
        _base(base)
        packs = STEPS * place.rows
        _rows(place.folder / "rows.jsonl", packs * ROWS_OF_A_PACK, max(100, place.length // ROWS_OF_A_PACK))
    file = place.folder / f"{name}.toml"
    file.write_text(
        f"""[model]
base = "base"
chat_template = "chatml"
[[data.train]]
path = "rows.jsonl"
[data]
max_length = {place.length}
eval_fraction = 0.1
[train]
max_steps = {STEPS}
batch_size = {place.rows}
micro_batch_size = {place.rows}
learning_rate = 1e-3
neftune_alpha = 5.0
[lora]
r = 8
dropout = 0.05
[checkpoint]
every_steps = 1
keep = {STEPS}
[eval]
every_steps = 100
samples = 0
[output]
dir = "runs"
""",
        encoding="utf-8",
    )
    return file


def recipe_of(file: Path) -> Recipe:
    """The recipe with its run beside it, wherever this process stands."""
    return load_recipe(file, [f"output.dir={json.dumps(str(file.parent / 'runs'))}"])


def run_dir(place: Place, name: str) -> Path:
    return place.folder / "runs" / name


def straight(place: Place) -> Path:
    """The folder of a run that was never stopped; trained with the first proof that asks."""
    folder = run_dir(place, "straight")
    if not (folder / "adapter").exists():
        api.train(recipe_of(recipe_file(place, "straight")), name="straight", mode="fresh", sink=Recorder())
    return folder


def _base(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    config = config_of(SHAPES["mini"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=torch.float32)
    model.to(torch.bfloat16).save_pretrained(folder)
    _tokenizer(folder)


def _tokenizer(folder: Path) -> None:
    """Bytes are tokens: no text is needed to train it, and every text can be written in it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    core.add_special_tokens(list(SPECIAL))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    pad, end, _, turn = SPECIAL
    made = PreTrainedTokenizerFast(tokenizer_object=core, pad_token=pad, bos_token=end, eos_token=turn)
    made.save_pretrained(folder)


def _rows(file: Path, count: int, tokens: int) -> None:
    """Rows of at most `tokens` tokens: with this tokenizer a byte is one, and the template takes some forty."""
    lines = []
    for number in range(count):
        answer = "".join(chr(97 + (number * 37 + place * place) % 23) for place in range(tokens - 60 - number % 20))
        turns = [{"role": "user", "content": f"Count {number}."}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": turns}))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
