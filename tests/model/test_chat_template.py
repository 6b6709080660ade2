"""The chat template that [model] asks for is what rows, the run's copy, the adapter and every export have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from transformers import AutoTokenizer

from qlora import api, chatml
from qlora.errors import QloraError, RecipeError, TokenizerError
from qlora.events import Recorder
from qlora.model.chat_template import chosen, read_template, templates_of, with_chatml
from qlora.model.tokenizer import open_tokenizer
from qlora.model.tokenizer_files import TokenizerFiles, read_files
from qlora.recipe.reading import load_recipe
from qlora.recipe.sections import ModelSection
from tests.families import make_base, make_tokenizer
from tests.runs import run_dir, train, write_recipe

# Reads a switch, as Qwen 3's does: without thoughts, an empty block of them stands before the answer.
THINKING = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)
MINE = "{%- for m in messages %}{{ '[' + m.role + '] ' + m.content + '<|im_end|>' }}{%- endfor %}"
MINE += "{%- if add_generation_prompt %}{{ '[assistant] ' }}{%- endif %}"
QUESTION = [{"role": "user", "content": "Who?"}]
SHORT = ("train.max_steps=1", "train.batch_size=2", "eval.samples=1", "data.max_length=128")


def said(sink: Recorder, topic: str = "template") -> list[str]:
    return [event.as_dict()["message"] for event in sink.of("notice") if event.as_dict()["topic"] == topic]


def with_tokenizer(folder: Path, template: Any = None, **special: Any) -> Path:
    """A base whose tokenizer has this template, or none."""
    base = make_base("llama", folder)
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        (base / name).unlink(missing_ok=True)
    tokenizer = make_tokenizer(template=template)
    for name, value in special.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(base)
    return base


def rendered(folder: Path, **kwargs: Any) -> str:
    """One question as a user of the folder renders it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return str(tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True, **kwargs))


def gguf_template(file: Path) -> str:
    field = gguf.GGUFReader(file).get_field("tokenizer.chat_template")
    assert field is not None
    return str(field.contents())


def test_chat_rows_on_a_base_without_a_template_are_refused_with_the_line_that_mends_it(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, with_tokenizer(tmp_path / "base"))
    with pytest.raises(TokenizerError, match="no chat template, and the rows are conversations") as caught:
        api.check(load_recipe(recipe))
    assert 'add chat_template = "chatml" under [model]' in caught.value.hint
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"Line {n}."}) + "\n" for n in range(12)))
    api.check(load_recipe(recipe))  # rows of plain text need none
    train(recipe, *SHORT)
    assert not (run_dir(recipe) / "adapter" / "chat_template.jinja").exists()


def test_chatml_goes_into_the_run_the_adapter_and_every_export(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, with_tokenizer(tmp_path / "base"))
    sink = train(recipe, *SHORT, 'model.chat_template="chatml"', 'export.formats=["hf", "gguf:f16"]')
    assert said(sink) == ["ChatML is the chat template, its turns end with <|im_end|>"]
    run = run_dir(recipe)
    prompt = "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    for folder in (run / "tokenizer", run / "adapter", run / "export" / "hf"):
        assert rendered(folder) == prompt
    (file,) = (run / "export").rglob("*.gguf")
    assert gguf_template(file) == chatml.template("<|im_end|>")
    assert "<|im_start|>" in (file.parent / "Modelfile").read_text()
    assert load_recipe(run / "recipe.toml").model.chat_template == "chatml"


def test_what_the_template_is_told_is_served_without_telling_it(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, with_tokenizer(tmp_path / "base", THINKING))
    told = "model.template_kwargs={enable_thinking = false}"
    sink = train(recipe, *SHORT, told, 'export.formats=["hf", "gguf:f16"]')
    assert said(sink)[0].startswith("enable_thinking = false: written at the head of the chat template")
    run = run_dir(recipe)
    prompt = rendered(tmp_path / "base", enable_thinking=False)
    assert prompt != rendered(tmp_path / "base")
    for folder in (run / "tokenizer", run / "adapter", run / "export" / "hf"):
        assert rendered(folder) == prompt
    (file,) = (run / "export").rglob("*.gguf")
    assert gguf_template(file) == (run / "adapter" / "chat_template.jinja").read_text()
    assert load_recipe(run / "recipe.toml").model.template_kwargs == {"enable_thinking": False}
    with pytest.raises(QloraError, match=r"these keys differ: model\.template_kwargs"):
        train(recipe, *SHORT, "model.template_kwargs={enable_thinking = true}", mode="resume")


def test_a_file_is_kept_in_the_run_which_goes_on_with_it(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, with_tokenizer(tmp_path / "base", THINKING))
    (tmp_path / "mine.jinja").write_text(MINE)
    settings = (*SHORT[1:], "train.max_steps=3", 'model.chat_template="mine.jinja"')
    begun = said(train(recipe, *settings, stop_after=1))
    assert "is the chat template of this run, in the place of the base's" in begun[0]
    run = run_dir(recipe)
    assert load_recipe(run / "recipe.toml").model.chat_template == str(tmp_path / "mine.jinja")
    (tmp_path / "mine.jinja").write_text(MINE.replace("[", "("))
    edited = said(train(recipe, *settings, mode="resume", stop_after=2), "tokenizer")
    assert "the chat template" in edited[0] and "has changed since" in edited[0]
    (tmp_path / "mine.jinja").unlink()
    assert "mine.jinja: no chat template" in said(train(recipe, *settings, mode="resume"), "tokenizer")[0]
    assert rendered(run / "adapter") == "[user] Who?<|im_end|>[assistant] "


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "No such file or directory"),
        (b"", "it is empty"),
        (b" \n", "it is empty"),
        (b"\xff\xfe", "not UTF-8 text"),
        (b"x" * 1_000_001, "more than 1,000,000 characters"),
        (b"x" * 4_000_001, "too many for a file of its kind"),
        (b"a\0b", "holds a NUL character"),
    ],
)
def test_a_file_that_is_no_template_is_refused_by_name(tmp_path: Path, content: bytes | None, why: str) -> None:
    if content is not None:
        (tmp_path / "mine.jinja").write_bytes(content)
    with pytest.raises(TokenizerError, match=rf"mine\.jinja: no chat template \(.*{why}") as caught:
        read_template(str(tmp_path / "mine.jinja"))
    assert '"chatml" or a file' in caught.value.hint


def test_chatml_ends_a_turn_with_a_token_that_generation_stops_at(tmp_path: Path) -> None:
    base = with_tokenizer(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).write_text((base / name).read_text().replace("<|im_", "<|other_"))
    sink = Recorder()
    found = with_chatml(read_files(base), "base", sink)
    assert templates_of(found) == [chatml.template("<|other_end|>")]
    with found.placed() as folder:
        tokens = len(open_tokenizer(folder, "base").encode("<|im_start|>"))
    assert tokens > 4
    cost = f"<|im_start|> is no token of this base: it takes {tokens} tokens a turn"
    assert said(sink) == [f"ChatML is the chat template, its turns end with <|other_end|>; {cost}"]


def test_an_end_of_turn_without_an_embedding_is_none(tmp_path: Path) -> None:
    base = with_tokenizer(tmp_path / "base", eos_token="<|endoftext|>")
    content = read_files(base).content
    assert templates_of(with_chatml(TokenizerFiles(content), "base", Recorder())) == [chatml.template("<|im_end|>")]
    small = TokenizerFiles({**content, "config.json": b'{"text_config": {"vocab_size": 2}}'})
    assert templates_of(with_chatml(small, "base", Recorder())) == [chatml.template("<|endoftext|>")]
    config = json.loads(content["tokenizer_config.json"])
    endless = {**content, "tokenizer_config.json": json.dumps({**config, "eos_token": None}).encode()}
    with pytest.raises(TokenizerError, match="has no token that ends an answer"):
        with_chatml(TokenizerFiles({**endless, "config.json": b'{"vocab_size": 2}'}), "base", Recorder())


@pytest.mark.parametrize(
    ("kwargs", "what"),
    [
        ({"enable_thinkin": False}, "enable_thinkin: the chat template does not read it"),
        ({"messages": 1}, "messages: a template is given it anyway"),
        ({"none": 1}, "none: a template is given it anyway"),
    ],
)
def test_arguments_that_nothing_reads_are_refused(tmp_path: Path, kwargs: dict[str, Any], what: str) -> None:
    found = read_files(with_tokenizer(tmp_path / "base", THINKING))
    with pytest.raises(RecipeError, match=what):
        chosen(found, ModelSection(base="b", template_kwargs=kwargs), "base", Recorder())
    without = read_files(with_tokenizer(tmp_path / "other"))
    with pytest.raises(RecipeError, match="the base has no chat template"):
        chosen(without, ModelSection(base="b", template_kwargs={"x": 1}), "base", Recorder())


def test_every_place_of_a_template_is_told(tmp_path: Path) -> None:
    """Text in both files, named ones in a list or in a folder; values of every kind; a template that begins anew."""
    base = with_tokenizer(tmp_path / "base", THINKING)
    kwargs = {"enable_thinking": False, "level": 'a "b" %} \\ ü\n', "n": 2, "share": 0.5}
    section = ModelSection(base="b", template_kwargs=kwargs)  # type: ignore[arg-type]
    text = "\n{{ level }}|{{ n }}|{{ share }}|{{ enable_thinking }}"
    config = json.loads((base / "tokenizer_config.json").read_text())
    named = [{"name": "default", "template": text}, {"name": "tool_use", "template": "T" + text}]
    for stored in (text, named):
        (base / "chat_template.jinja").unlink(missing_ok=True)
        (base / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": stored}))
        with chosen(read_files(base), section, "base", Recorder()).placed() as folder:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            assert tokenizer.apply_chat_template(QUESTION, tokenize=False) == '\na "b" %} \\ ü\n|2|0.5|False'
            tools: Any = [{"type": "function", "function": {"name": "f"}}] if stored is named else None
            out = tokenizer.apply_chat_template(QUESTION, tokenize=False, tools=tools)
            assert out.startswith("T\n" if tools else "\n")
    (base / "chat_template.jinja").write_text(text)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text(text)
    found = templates_of(chosen(read_files(base), section, "base", Recorder()))
    assert len(found) == 2
    assert all(told.startswith("{%- set enable_thinking = false %}") for told in found)


def test_a_template_that_stands_for_a_processor_only_is_the_bases_own(tmp_path: Path) -> None:
    base = with_tokenizer(tmp_path / "base")
    (base / "chat_template.json").write_text(json.dumps({"chat_template": MINE}))
    with chosen(read_files(base), ModelSection(base="b"), "base", Recorder()).placed() as folder:
        assert rendered(folder) == "[user] Who?<|im_end|>[assistant] "


def test_a_choice_takes_the_place_of_every_other_template(tmp_path: Path) -> None:
    named = {"default": "a", "tool_use": "b"}
    base = with_tokenizer(tmp_path / "base", named)
    (base / "additional_chat_templates").mkdir(exist_ok=True)
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("c")
    found = chosen(read_files(base), ModelSection(base="b", chat_template="chatml"), "base", Recorder())
    with found.placed() as folder:
        assert AutoTokenizer.from_pretrained(folder).chat_template == chatml.template("<|im_end|>")
    assert chosen(read_files(base), ModelSection(base="b"), "base", Recorder()) == read_files(base), "byte for byte"
