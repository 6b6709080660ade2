"""Which tokens of a conversation are trained, compared with chat templates that mark the answers themselves.

    python tools/masks_oracle.py --templates FOLDER [--show NAME]

FOLDER holds chat templates (*.jinja) with `{% generation %}` marks: other trainers ship such. Each template renders the
conversations below; its marks say which tokens are answers. The same template without marks goes through our own way of
finding them. Where both have the same tokens the masks are compared, and each difference is sorted into a kind that is
explained here. The exit code is 1 where one has no explanation.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from qlora.data import spans
from qlora.data.chat import ChatTokenizer, TokenRow
from qlora.data.formats import Conversation
from qlora.data.offsets import split_at, tokens_of
from qlora.data.row_json import RowError
from qlora.data.template import ChatTemplate
from qlora.errors import TokenizerError
from qlora.events import Sinks
from tests.data.toys import CHATML, WEATHER, assistant, call, encode, result, rows_of, system, talk, toy_tokenizer, user

MARK = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")
SPECIAL = re.compile(
    r"<\|[^|<>\s'\"]{1,40}\|?>|<[^|<>\s'\"]{1,40}\|>|<｜[^｜<>\s]{1,40}｜>|</?s>|<bos>|<eos>|<\w+_of_\w+>|\[/?[A-Z_]{3,20}\]"
)
# The end of a turn, by family: the first that stands in a template is its EOS.
EOS = (
    *("<|return|>", "<|eot|>", "<|im_end|>", "<|eot_id|>", "<|END_OF_TURN_TOKEN|>", "<end_of_turn>", "<turn|>"),
    *("<|end|>", "<｜end▁of▁sentence｜>", "<end_of_utterance>", "<|endoftext|>", "</s>"),
)
THINK = ("<think>", "</think>", "<tool_call>", "</tool_call>")

Marks = list[tuple[int, int]]  # characters
EXPLAINED = {
    "line break": "marks hold the line break after the end token, which no model writes: its server has stopped",
    "prompt": "marks hold text that the served prompt has already (a header, an opened block of thoughts)",
    "end of history": "marks hold an end that stands only in the history (harmony's <|end|>) for what is written",
    "second end": "marks hold an EOS after the whole conversation (Phi 3's), where the turn has ended before",
    "unmarked end": "the token that ends a call is outside of the marks; the model must write it to hand over",
    "as served": "the row is trained as it is served: after a block of thoughts that the prompt opens or shuts",
    "border": "the served prompt ends inside of a token of the whole text: that token is split there",
    "context": "a turn that is context only: which marks are its own cannot be told",
    "cut": "what follows the last answer is left out: the template would write that answer otherwise for it",
    "joined": "a line break that begins the answer is one token with the prompt's: it is left to the prompt",
    "behind the result": "words that the template writes behind the tool's result, where the model does not write them",
    "served history": "before the answer stands what its prompt has: harmony's text drops the analysis before a call",
    "own row": "an answer that the template writes otherwise later is compared where it ends a row of its own",
    "second call": "refused: DeepSeek's templates write a conversation's second call without the header that is served",
    "call": "the call is given in a shape that the template writes, or refused, where the plain one is lost",
}
WORDY = {**call("get_weather", city="Oslo"), "content": "I look it up."}


def thoughtful(message: dict[str, Any], thoughts: str) -> dict[str, Any]:
    return {**message, "reasoning_content": thoughts}


CONVERSATIONS = {
    "single": talk(user("What is it?"), assistant("It is cold.")),
    "multi-turn": talk(
        user("How many?"), assistant("Three."), user("Where?"), assistant("In Oslo."), user("Now?"), assistant("Yes.")
    ),
    "system": talk(system("You help."), user("Who?"), assistant("The model."), user("What?"), assistant("Light.")),
    "tools": talk(
        user("Weather?"),
        call("get_weather", city="Oslo"),
        result('{"degrees": 3}'),
        assistant("It is cold."),
        tools=(WEATHER,),
    ),
    "tools twice": talk(
        *(user("Weather?"), call("get_weather", city="Oslo"), result("3"), assistant("It is cold.")),
        *(user("And Paris?"), call("get_weather", 1, city="Paris"), result("23", 1), assistant("It is warm.")),
        tools=(WEATHER,),
    ),
    "thoughts": talk(user("What is it?"), thoughtful(assistant("It rains."), "Look up first.")),
    "thoughts inside": talk(user("What is it?"), assistant("<think>\nLook up first.\n</think>\n\nIt rains.")),
    "thoughts in history": talk(
        *(user("What is it?"), thoughtful(assistant("It rains."), "Look up first.")),
        *(user("Now?"), thoughtful(assistant("Yes."), "It rains now.")),
    ),
    "thoughts with a call": talk(
        *(user("Weather?"), thoughtful(call("get_weather", city="Oslo"), "Look up first."), result("3")),
        thoughtful(assistant("It is cold."), "Three."),
        tools=(WEATHER,),
    ),
    "same question twice": talk(user("What?"), assistant("Light."), user("What?"), assistant("Wind.")),
    "same answer twice": talk(user("What?"), assistant("Light."), user("Where?"), assistant("Light.")),
    "words beside a call": talk(user("Weather?"), WORDY, result("3"), assistant("It is cold."), tools=(WEATHER,)),
    "ends with a question": talk(user("What?"), assistant("Light."), user("Who?")),
    "ends with a call": talk(user("Weather?"), call("get_weather", city="Oslo"), tools=(WEATHER,)),
    "two answers in a row": talk(user("What?"), assistant("Light."), assistant("And wind.")),
    "context only": talk(user("What?"), assistant("Light.", train=False), user("Who?"), assistant("The model.")),
    "unicode": talk(user("Qué? 日本"), assistant("Ça va: 23°C 🌧 \n"), user("e\u0301?"), assistant("e\u0301")),
    "line breaks": talk(user("What?"), assistant("\n{\n}"), user("How?"), assistant("a\n\nb\n")),
    "quoted prompt": talk(user("What?"), assistant("assistant\nWhat?"), user("What?"), assistant("user\nWhat?")),
}


@dataclass(frozen=True)
class Outcome:
    """`kinds`: the explained differences; `unexplained`: what has no explanation; both empty where the masks agree."""

    kinds: frozenset[str] = frozenset()
    unexplained: str = ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--templates", type=Path, required=True)
    parser.add_argument("--show", default="", help="show each difference of the templates whose name contains this")
    arguments = parser.parse_args()
    files = sorted(arguments.templates.glob("*.jinja"))
    marked = [file for file in files if MARK.search(file.read_text(encoding="utf-8"))]
    if not marked:
        print(f"{arguments.templates}: no template with generation marks", file=sys.stderr)
        return 2
    totals: Counter[str] = Counter()
    for file in marked:
        counts = Counter[str]()
        try:
            outcomes = list(compared(file.read_text(encoding="utf-8")))
        except TokenizerError as error:
            outcomes = [("all", Outcome(unexplained=error.what))]
        for name, outcome in outcomes:
            counts[(outcome.unexplained and "unexplained") or "+".join(sorted(outcome.kinds)) or "equal"] += 1
            if outcome.unexplained or (arguments.show and arguments.show in file.name and outcome.kinds):
                print(f"{file.name}: {name}: {outcome.unexplained or ', '.join(sorted(outcome.kinds))}")
        totals += counts
        print(f"{file.stem}: " + ", ".join(f"{count} {kind}" for kind, count in counts.most_common()))
    print(f"\n{len(marked)} templates x {len(CONVERSATIONS)} conversations: {totals.total()}")
    for kind, count in totals.most_common():
        print(f"  {count:5} {kind}")
    for kind, why in EXPLAINED.items():
        print(f"  {kind}: {why}")
    return 1 if totals["unexplained"] else 0


def compared(template: str) -> Iterator[tuple[str, Outcome]]:
    """Each conversation's name, and how our mask stands to the template's own marks."""
    # A block that does nothing, so that the white space around stays as it is.
    plain = MARK.sub(lambda mark: mark[1] + ("endif" if mark[2] else "if true") + mark[3], template)
    eos = next((token for token in EOS if token in template), "</s>")
    if eos == "<|end|>" and "eos_token" in template:
        eos = "<|endoftext|>"  # Phi 3's stands once, after the conversation
    special = tuple(dict.fromkeys(("<s>", eos, *SPECIAL.findall(template))))
    family = replace(CHATML, special=special, eos=eos, bos="<s>", plain=THINK)
    ours = ChatTokenizer(toy_tokenizer(family, plain), "assistant", Sinks())
    theirs = ChatTemplate(toy_tokenizer(family, template), Sinks())
    theirs.reading = ours._chat_template.reading
    for name, conversation in CONVERSATIONS.items():
        rows = rows_of(ours, conversation)
        outcomes = [_outcome(ours, theirs, row) for row in rows]
        kinds = frozenset[str]().union(*(outcome.kinds for outcome in outcomes))
        unexplained = "; ".join(outcome.unexplained for outcome in outcomes if outcome.unexplained)
        yield name, Outcome(kinds | {"own row"} if len(rows) > 1 else kinds, unexplained)


def _outcome(ours: ChatTokenizer, theirs: ChatTemplate, conversation: Conversation) -> Outcome:
    try:
        text, marks = theirs.render_marked(conversation.messages, conversation.tools)
    except RowError:
        text, marks = "", []
    try:
        row = encode(ours, conversation)
    except RowError as error:
        return _refused(str(error.reason), text, conversation)
    if not text:
        return Outcome(unexplained="the marked template refuses it, ours is trained")
    ids, offsets = next(tokens_of(ours.tokenizer, [text]))
    answers = [number for number, m in enumerate(conversation.messages) if m["role"] == "assistant"]
    if len(marks) == len(answers):  # marks say nothing of what is context only
        marks = [mark for mark, at in zip(marks, answers, strict=True) if conversation.messages[at].get("train", True)]
    elif not all(conversation.messages[at].get("train", True) for at in answers):
        return Outcome(frozenset(["context"]))
    mask = [any(start < high and low < end for start, end in marks) for low, high in offsets]
    if ids[:1] == row.input_ids[:1] or ids[:1] != [ours.tokenizer.bos_token_id]:
        pass
    if row.input_ids[1:] == ids and row.input_ids[:1] != ids[:1]:
        ids, mask = row.input_ids, [False, *mask]
    if row.input_ids != ids:
        return _other_text(ours, conversation, row, (ids, mask, marks))
    return _differences(ours, conversation, row, mask)


def _refused(reason: str, text: str, conversation: Conversation) -> Outcome:
    if not text or "does not write tool" in reason:
        return Outcome(frozenset() if not text else frozenset(["call"]))
    if "the chat template rewrites it" in reason and sum("tool_calls" in m for m in conversation.messages) > 1:
        return Outcome(frozenset(["second call"]))
    return Outcome(unexplained=f"refused by us: {reason}")


def _other_text(
    ours: ChatTokenizer, conversation: Conversation, row: TokenRow, theirs: tuple[list[int], list[bool], Marks]
) -> Outcome:
    """Both have other tokens: the row ends earlier, is split between prompt and answer, or is as it is served."""
    ids, mask, marks = theirs
    count, decode = len(row.input_ids), ours.tokenizer.decode
    facts = ours._chat_template.facts
    if row.input_ids[: count - 1] == ids[: count - 1] and conversation.messages[-1]["role"] != "assistant":
        return Outcome(_differences(ours, conversation, row, mask[:count]).kinds | {"cut"})
    if decode(row.input_ids) == decode(ids):
        outcome = _differences(ours, conversation, row, _mask_of_split_tokens(ours, conversation, row, marks))
        return replace(outcome, kinds=outcome.kinds | {"border"})
    if facts.lead and facts.lead in decode(row.input_ids):
        return Outcome(frozenset(["as served"]))
    answers = [number for number, m in enumerate(conversation.messages) if m["role"] == "assistant"]
    prompt = ours._chat_template.render(conversation.messages[: answers[-1]], conversation.tools, True)
    own = decode(row.input_ids)
    if own.startswith(prompt) and decode(ids).endswith(own[len(prompt) :]):
        return Outcome(frozenset(["served history"]))
    return Outcome(unexplained=f"other text:\n  ours   {decode(row.input_ids)!r}\n  theirs {decode(ids)!r}")


def _mask_of_split_tokens(ours: ChatTokenizer, conversation: Conversation, row: TokenRow, marks: Marks) -> list[bool]:
    located = spans.locate(ours._chat_template, conversation, Counter())
    tokens = next(tokens_of(ours.tokenizer, [located.text]))
    borders = [turn.start for turn in located.turns if turn.template_space]
    _, offsets = split_at(ours.tokenizer, located.text, tokens, borders)
    mask = [any(start < high and low < end for start, end in marks) for low, high in offsets]
    return [False] * (len(row.input_ids) - len(mask)) + mask


def _differences(ours: ChatTokenizer, conversation: Conversation, row: TokenRow, mask: list[bool]) -> Outcome:
    """The kinds of the stretches of tokens that only one of the two masks has."""
    kinds, unexplained = set(), []
    pairs = [(bool(weight), marked) for weight, marked in zip(row.loss_weights, mask, strict=True)]
    prompts = _prompts(ours, conversation)
    at = 0
    for pair, group in groupby(pairs):
        length = len(list(group))
        if pair[0] != pair[1]:
            kind = _kind(ours, conversation, row, (at, at + length), prompts)
            text = ours.tokenizer.decode(row.input_ids[at : at + length])
            kinds.add(kind) if kind else unexplained.append(f"{'ours' if pair[0] else 'theirs'} alone: {text!r}")
        at += length
    return Outcome(frozenset(kinds), "; ".join(unexplained))


def _kind(
    ours: ChatTokenizer, conversation: Conversation, row: TokenRow, within: tuple[int, int], prompts: list[str]
) -> str:
    start, end = within
    text = ours.tokenizer.decode(row.input_ids[start:end])
    if row.loss_weights[start]:
        return "unmarked end" if text in ours._chat_template.end_tokens else ""
    if not text.strip() and row.input_ids[start - 1] in ours.end_token_ids:
        return "line break"
    follows = end < len(row.loss_weights) and row.loss_weights[end] > 0
    lead = ours._chat_template.facts.lead
    if follows and (lead.startswith(text) or any(prompt.endswith(text) for prompt in prompts)):
        return "prompt"
    if follows and not text.strip() and any(m["content"][:1].isspace() for m in conversation.messages):
        return "joined"
    words = [m["content"] for m in conversation.messages if "tool_calls" in m]
    if text in words:
        return "behind the result"
    if row.input_ids[start - 1] in ours.end_token_ids and text.strip() in ours._chat_template.end_tokens:
        return "second end"
    known = (*ours.tokenizer.all_special_tokens, *ours.tokenizer.get_added_vocab())
    return "end of history" if row.loss_weights[start - 1] and text.strip() in known else ""


def _prompts(ours: ChatTokenizer, conversation: Conversation) -> list[str]:
    """What a server sends for each answer, and the same without the block of thoughts that history has not."""
    prompts, template = [], ours._chat_template
    for number, message in enumerate(conversation.messages):
        if message["role"] == "assistant":
            try:
                prompt = template.render(conversation.messages[:number], conversation.tools, add_generation_prompt=True)
            except RowError:
                continue
            prompts += [prompt, prompt.removesuffix(template.facts.lead)]
    return prompts


if __name__ == "__main__":
    sys.exit(main())
