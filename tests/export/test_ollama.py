"""Modelfiles: goldens of the families, Go templates run beside the Jinja ones, values as Ollama's parser reads them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qlora.data.template import ChatTemplate
from qlora.events import Recorder
from qlora.export.ollama import (
    GoTemplate,
    OllamaModel,
    go_template,
    model_name,
    modelfile,
    shared_system,
)
from tests.data.toys import FAMILIES, assistant, system, template_of, toy_tokenizer, user
from tests.export.ollama_readers import commands, go

GOLDEN = Path(__file__).parent.parent / "golden" / "modelfiles"

# Templates in the manner of models that the golden templates do not cover: (family's tokenizer, source).
ROUND = "{% for m in messages %}"
MORE: dict[str, tuple[str, str]] = {
    "Mistral v1, published 2023": (
        "mistral",
        "{{ bos_token }}" + ROUND + "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else m.content + eos_token + ' ' }}{% endfor %}",
    ),
    "Mistral v1": (
        "mistral",
        "{{ bos_token }}{% set s = messages[0].content if messages[0].role == 'system' else '' %}"
        + ROUND
        + "{% if m.role == 'user' %}{{ ' [INST] ' + (s + '\\n\\n' if s and loop.index0 == 1 else '') + m.content }}"
        "{{ ' [/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
    ),
    "Mistral v3-tekken": (
        "mistral",
        "{{ bos_token }}{% set s = messages[0].content if messages[0].role == 'system' else '' %}"
        + ROUND
        + "{% if m.role == 'user' %}{{ '[INST]' + (s + '\\n\\n' if s and loop.last else '') + m.content }}"
        "{{ '[/INST]' }}{% elif m.role == 'assistant' %}{{ m.content + eos_token }}{% endif %}{% endfor %}",
    ),
    "Mistral v7-tekken": (
        "mistral",
        "{{ bos_token }}"
        "{% if messages[0].role != 'system' %}{{ '[SYSTEM_PROMPT]You help.[/SYSTEM_PROMPT]' }}{% endif %}"
        + ROUND
        + "{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}{% elif m.role == 'system' %}"
        "{{ '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}{% else %}{{ m.content + eos_token }}{% endif %}"
        "{% endfor %}",
    ),
    "Gemma 3": (
        "gemma",
        "{{ bos_token }}{% set s = messages[0].content if messages[0].role == 'system' else '' %}"
        + ROUND
        + "{% if m.role != 'system' %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else 'user') + '\\n' }}"
        "{{ s + '\\n\\n' if s and loop.index0 == 1 else '' }}{{ (m.content | trim) + '<end_of_turn>\\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
    ),
    "ChatML with a system prompt of its own": (
        "qwen2",
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nA {{ brace }} helps.<|im_end|>\\n' }}{% endif %}"
        + ROUND
        + "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    ),
    "ChatML that begins to think": (
        "qwen3",
        ROUND + "{{ '<|im_start|>' + m.role + '\\n' + m.content.split('</think>')[-1].lstrip() + '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}",
    ),
    "Phi-4-mini": (
        "phi3",
        ROUND + "{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
    ),
}
UNKNOWN: dict[str, tuple[str, str]] = {
    "other marks": (
        "qwen2",
        ROUND + "{{ '### ' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### assistant\\n' }}{% endif %}",
    ),
    "turns are numbered": (
        "qwen2",
        ROUND + "{{ '<|im_start|>' + m.role + '\\n' + (loop.index | string if loop.index > 4 else '') + m.content }}"
        "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    ),
    "the system prompt is dropped": (
        "qwen2",
        ROUND + "{% if m.role != 'system' %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    ),
    "the last turn is left out": (
        "qwen2",
        "{% for m in messages[-2:] %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    ),
}


def chat_of(name: str) -> tuple[ChatTemplate, str | None]:
    """The chat template, with the BOS token of its tokenizer."""
    family, source = {**MORE, **UNKNOWN}.get(name) or (name, template_of(name, marks=False))
    tokenizer = toy_tokenizer(FAMILIES[family], source)
    return ChatTemplate(tokenizer, Recorder()), tokenizer.bos_token


def template_named(name: str, adds_bos: bool = True) -> GoTemplate:
    chat, bos = chat_of(name)
    found = go_template(chat, bos, adds_bos)
    assert found is not None, f"{name} is not recognised"
    return found


# --- templates --------------------------------------------------------------------------------------------------------

TALKS = (
    [user("What is it?")],
    [user("How many {{ .Content }}?"), assistant("Three."), user("Where?\n\nNow?")],
    [user("a"), assistant("b"), user("c"), assistant("d"), user("e"), assistant("f"), user("g")],
    [system("You help."), user("Who?")],
    [system("You help.\n\nA lot."), user("Who?"), assistant("The model."), user("What?")],
    [system("S"), user("a"), assistant("b"), user("c"), assistant("d"), user("e")],
)


@pytest.mark.parametrize("name", [*FAMILIES, *MORE])
def test_go_writes_what_jinja_writes(name: str) -> None:
    chat, bos = chat_of(name)
    found = template_named(name)
    takes_system = name not in ("gemma", "Mistral v1, published 2023")
    assert found.takes_system == takes_system
    for talk in TALKS:
        if talk[0]["role"] == "user" or takes_system:
            wanted = chat.render(talk, None, add_generation_prompt=True)
            assert go(found.text, talk) == wanted.removeprefix(bos or "")


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_template_of_no_family_is_left_out(name: str) -> None:
    chat, bos = chat_of(name)
    assert go_template(chat, bos, adds_bos=False) is None
    text = modelfile(OllamaModel("m", "m.gguf", chat.end_tokens, None))
    assert "# No TEMPLATE:" in text and not any(key == "TEMPLATE" for key, _ in commands(text))


@pytest.mark.parametrize("name", ["llama3", "mistral", "gemma"])
def test_bos_is_written_by_the_template_or_by_llama_cpp_and_never_by_both(name: str) -> None:
    chat, bos = chat_of(name)
    assert bos and chat.render([user("a")], None).startswith(bos)
    assert bos not in template_named(name, adds_bos=True).text
    assert template_named(name, adds_bos=False).text.startswith(bos)


def test_what_go_cannot_do_is_said() -> None:
    thinking = template_named("ChatML that begins to think")
    assert thinking.drops_reasoning and not template_named("qwen2").drops_reasoning
    assert "drops the reasoning" in modelfile(OllamaModel("m", "m.gguf", ["x"], thinking))
    assert "takes no system prompt" in modelfile(OllamaModel("m", "m.gguf", ["x"], template_named("gemma")))


def test_a_template_that_trims_gets_a_trimmed_system_prompt() -> None:
    for name, wanted in (("llama3", "You help."), ("qwen2", "  You help.\n")):
        text = modelfile(OllamaModel("m", "m.gguf", ["x"], template_named(name), system="  You help.\n"))
        assert ("SYSTEM", wanted) in commands(text)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_golden(name: str) -> None:
    chat, _ = chat_of(name)
    model = OllamaModel(
        name=f"My {name} model",
        weights=f"{name}-q4_k_m.gguf",
        end_tokens=chat.end_tokens,
        template=template_named(name),
        system='You help.\nSay "yes" or "no".' if name != "gemma" else None,
        generation={"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05},
        max_length=8192,
        max_positions=131072,
        license="apache-2.0",
    )
    golden = GOLDEN / f"{name}.Modelfile"
    assert modelfile(model) == golden.read_text(encoding="utf-8")


def test_an_adapter_on_a_base() -> None:
    text = modelfile(OllamaModel("m", "llama3.2:3b", ["x"], None, adapter="lora.gguf"))
    assert commands(text)[:2] == [("FROM", "llama3.2:3b"), ("ADAPTER", "./lora.gguf")]
    assert commands(modelfile(OllamaModel("m", "base.gguf", ["x"], None, adapter="lora.gguf")))[0][1] == "./base.gguf"


def test_the_head_says_how_to_create_and_run() -> None:
    text = modelfile(OllamaModel("Größe/My Model..v2\n", "m.gguf", ["x"], None), "Modelfile.q8_0")
    assert text.splitlines()[1:3] == [
        "#   ollama create gr-e-my-model.v2 -f Modelfile.q8_0",
        "#   ollama run gr-e-my-model.v2",
    ]


@pytest.mark.parametrize("text", ["", "...", "日本", "a" * 500, "-x_", "A B/C:D"])
def test_names_are_ones_that_ollama_takes(text: str) -> None:
    assert re.fullmatch(r"[a-z0-9](?:\.?[a-z0-9_-])*", model_name(text)) and len(model_name(text)) <= 80


def test_file_names_that_break_a_line_are_refused() -> None:
    assert commands(modelfile(OllamaModel("m", "a b.gguf", ["x"], None)))[0] == ("FROM", "./a b.gguf")
    with pytest.raises(ValueError, match="cannot stand"):
        modelfile(OllamaModel("m", "a\nSYSTEM evil.gguf", ["x"], None))


@pytest.mark.parametrize("token", ["<|im_end|>", "\n\n", 'say "stop"', '""', '"', '"""', 'a"\nb', "###\n", "</s>"])
def test_stops_are_read_as_they_are(token: str) -> None:
    text = modelfile(OllamaModel("m", "m.gguf", ["<eos>", token, "<eos>"], None))
    assert [value for key, value in commands(text) if key == "stop"] == ["<eos>", token]


@example('Begin with """\nand go on.')
@example('""" \n')
@given(st.text(st.sampled_from('ab"# \n\r\t\u200d\u00a0{%é🌧')))
def test_a_system_prompt_is_read_as_it_is_or_left_out(prompt: str) -> None:
    text = modelfile(OllamaModel("m", "m.gguf", ["x"], None, system=prompt))
    found = [value for key, value in commands(text) if key == "SYSTEM"]
    assert found == [prompt] or (not found and "# No SYSTEM" in text)
    if prompt.replace('"', "").replace("\u200d", "").replace("\u00a0", "") == prompt:
        assert found, "left out without need"
    assert [value for key, value in commands(text) if key == "stop"] == ["x"]


def test_three_quotes_inside_a_line_stay_and_at_its_end_are_told_of() -> None:
    inside = 'Write """docs""" first.\nThen code. """'
    assert ("SYSTEM", inside) in commands(modelfile(OllamaModel("m", "m.gguf", ["x"], None, system=inside)))
    at_end = 'Begin with """ \nand go on.'
    assert "# No SYSTEM" in modelfile(OllamaModel("m", "m.gguf", ["x"], None, system=at_end))


def parameters(**keys: Any) -> dict[str, str]:
    return dict(commands(modelfile(OllamaModel("m", "m.gguf", [], None, **keys)))[1:])


def test_sampling() -> None:
    assert parameters() == {"repeat_penalty": "1"}
    greedy = parameters(generation={"do_sample": False, "temperature": 0.6, "top_p": 0.9})
    assert greedy == {"temperature": "0", "top_p": "0.9", "repeat_penalty": "1"}
    drawn = parameters(generation={"do_sample": True, "temperature": 1e-5, "top_k": 50.0, "min_p": 0.05, "top_p": None})
    assert drawn == {"temperature": "1e-05", "top_k": "50", "min_p": "0.05", "repeat_penalty": "1"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", float("nan")),
        ("temperature", -1),
        ("temperature", "0.7"),
        ("top_p", 1.5),
        ("top_p", True),
        ("top_k", 2.5),
        ("top_k", float("inf")),
        ("min_p", [0.1]),
        ("repetition_penalty", 0),
        ("temperature", "1\nSYSTEM evil"),
        ("temperature", 10**400),
    ],
)
def test_a_strangers_sampling_is_checked(key: str, value: object) -> None:
    text = modelfile(OllamaModel("m", "m.gguf", [], None, generation={key: value}))
    assert f"# generation_config.json: {key} = " in text
    assert {name for name, _ in commands(text)} <= {"FROM", "repeat_penalty"}


@pytest.mark.parametrize(
    ("max_length", "max_positions", "wanted"),
    [
        (512, 131072, "4096"),
        (16384, 131072, "16384"),
        (2048, 2048, "2048"),
        (None, 131072, None),
        (None, 512, "512"),
        (512, None, "4096"),
        (None, None, None),
    ],
)
def test_context(max_length: int | None, max_positions: int | None, wanted: str | None) -> None:
    assert parameters(max_length=max_length, max_positions=max_positions).get("num_ctx") == wanted


# --- the shared system prompt -----------------------------------------------------------------------------------------


def test_shared_system() -> None:
    one, two = system("Be kind."), system("Be short.")
    assert shared_system([[one, user("a")], [one, user("b"), assistant("c"), user("d")]]) == "Be kind."
    assert shared_system([[one, user("a")], [two, user("b")]]) is None
    assert shared_system([[one, user("a")], [user("b")]]) is None
    assert shared_system([[user("b")], [one, user("a")]]) is None
    assert shared_system([[one, user("a"), two]]) is None
    assert shared_system([[system(" \n"), user("a")]]) is None
    assert shared_system([]) is None


def test_shared_system_stops_at_the_first_difference() -> None:
    def rows() -> Any:
        yield [system("x"), user("a")]
        yield [user("a")]
        raise AssertionError("read on")

    assert shared_system(rows()) is None
