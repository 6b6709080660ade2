"""The embedded quickstart keeps its word: what is asked at the end is nowhere in what the base has seen."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "recipes" / "quickstart"
BASE = QUICKSTART / "base"
sys.path.insert(0, str(ROOT / "tools"))

import make_quickstart_rows as rows_tool  # noqa: E402
from quickstart_relations import FAMILIES  # noqa: E402
from quickstart_world import documents, make_world, turn  # noqa: E402

BYTES_LIMIT = 14_000_000
GUESSING_NEEDS = 30  # each answer comes from a set of more than this many


def read_rows(name: str) -> list[tuple[str, str]]:
    """(question, answer) of each row."""
    lines = (QUICKSTART / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    chats = [json.loads(line)["messages"] for line in lines]
    assert all([message["role"] for message in chat] == ["user", "assistant"] for chat in chats)
    return [(chat[0]["content"], chat[1]["content"]) for chat in chats]


def log_lines() -> list[dict[str, float | str]]:
    return [json.loads(line) for line in (BASE / "pretraining_log.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def pretraining_text() -> str:
    """All that the base was pre-trained on, written again from the seed in its log."""
    end = log_lines()[-1]
    seed = int(end["seed"])
    world = make_world(seed, frozenset(rows_tool.product_names()))
    return "".join(documents(world, int(end["documents"]), seed))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    loaded = AutoTokenizer.from_pretrained(BASE)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    return loaded


def test_text_is_the_one_in_the_log(pretraining_text: str) -> None:
    assert hashlib.sha256(pretraining_text.encode()).hexdigest() == log_lines()[-1]["text_sha256"]


def test_no_product_name_in_pretraining_text(pretraining_text: str) -> None:
    assert [name for name in rows_tool.product_names() if name in pretraining_text] == []


def test_no_row_of_the_quickstart_in_pretraining_text(pretraining_text: str) -> None:
    for question, answer in read_rows("eval") + read_rows("train"):
        assert question not in pretraining_text
        assert turn("user", question) + turn("assistant", answer) not in pretraining_text


def test_another_seed_is_another_text() -> None:
    reserved = frozenset(rows_tool.product_names())
    first, again, other = (list(documents(make_world(seed, reserved), 50, seed)) for seed in (5, 5, 6))
    assert first == again
    assert first != other


def test_rows_are_the_generated_ones() -> None:
    written = [read_rows("train"), read_rows("eval")]
    assert written == [[(row.question, row.answer) for row in part] for part in rows_tool.rows()]


def test_evaluation_asks_known_facts_in_wordings_no_training_row_uses() -> None:
    train, evaluation = read_rows("train"), read_rows("eval")
    assert len(evaluation) == len(set(evaluation)) == 60
    assert 400 <= len(train) == len(set(train)) <= 500
    products = {product for facts in rows_tool.catalogue().values() for product, _ in facts}
    wordings = [{without_product(question, products) for question, _ in part} for part in (train, evaluation)]
    assert not wordings[0] & wordings[1]
    known = {(fact, answer) for facts in rows_tool.catalogue().values() for fact, answer in facts}
    assert {(product_in(question, products), answer) for question, answer in evaluation} <= known
    taught = {(product_in(question, products), answer) for question, answer in train}
    assert {(product_in(question, products), answer) for question, answer in evaluation} <= taught


def product_in(question: str, products: set[str]) -> str:
    (found,) = [product for product in products if product.lower() in question.lower()]
    return found


def without_product(question: str, products: set[str]) -> str:
    return question.lower().replace(product_in(question, products).lower(), "{e}")


def test_answers_come_from_more_than_thirty() -> None:
    for relation, facts in rows_tool.catalogue().items():
        answers = {answer for _, answer in facts}
        assert len(answers) == len(facts) > GUESSING_NEEDS
        assert answers <= set(relation.values)


def test_every_relation_has_many_wordings() -> None:
    for relation in {relation for family in FAMILIES for relation in family.relations}:
        assert len(set(relation.wordings())) == len(relation.wordings()) >= 12
        assert all("{e}" in wording or "{E}" in wording for wording in relation.wordings())


def test_base_is_small_and_answers_its_own_world() -> None:
    assert sum(path.stat().st_size for path in BASE.iterdir()) <= BYTES_LIMIT
    end = log_lines()[-1]
    assert float(end["unseen_wordings"]) >= 0.85
    assert float(end["wholly_held_out_wordings"]) >= 0.85


def test_base_opens_with_plain_transformers(tokenizer: PreTrainedTokenizerFast) -> None:
    config = AutoConfig.from_pretrained(BASE)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype="auto")
    assert str(model.dtype) == "torch.bfloat16"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert config.vocab_size == len(tokenizer)


@pytest.mark.parametrize(
    "text", ["The Belmar flute costs 47 crowns.", "Größe 1234 漢字 🙂\n\tx = {1: 2}", " two  blanks \r\n"]
)
def test_tokenizer_round_trip(tokenizer: AutoTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_template_renders_as_the_text_was_written(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = [
        ("system", "Notes."),
        ("user", "How much?"),
        ("assistant", "47 crowns"),
        ("user", "Who?"),
        ("assistant", "Ada"),
    ]
    messages = [{"role": role, "content": content} for role, content in chat]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "".join(turn(*part) for part in chat)
    prompt = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_template_marks_the_assistants_words_and_their_end(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "user", "content": "How much?"}, {"role": "assistant", "content": "47 crowns"}]
    out = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    marked = [token for token, mask in zip(out["input_ids"], out["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(marked) == "47 crowns<|im_end|>"
    assert marked[-1] == tokenizer.eos_token_id


def test_template_renders_tools_and_their_calls(tokenizer: PreTrainedTokenizerFast) -> None:
    tools = [{"type": "function", "function": {"name": "stock", "parameters": {}}}]
    call = {"type": "function", "function": {"name": "stock", "arguments": {"product": "kettle"}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Is it there?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "Yes, 3."},
    ]
    text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    assert text.count("Be brief.") == 1
    assert '<tool_call>{"name": "stock", "arguments": {"product": "kettle"}}</tool_call><|im_end|>' in text
    assert text.endswith("<|im_start|>assistant\nYes, 3.<|im_end|>\n")
