"""Makes the quickstart's tiny base from a seed: text, tokenizer, pre-training, evaluation, folder.

    python tools/make_quickstart_base.py --out recipes/quickstart/base

A Llama of five million weights, trained on two CPU cores in about half an hour, so that the quickstart needs no
download and no GPU. Two decisions that a reader would question:

- Documents are not packed: a batch holds documents of about the same length, padded at the end. Fine-tuning isolates
  documents from each other, so pre-training must not teach the model to look across them.
- In chats only the assistant's words are trained. Questions name entities at random, which nothing can predict.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from make_quickstart_rows import product_names
from quickstart_card import CARD, CHAT_TEMPLATE
from quickstart_world import World, documents, make_world, questions, turn
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PAD, START, END = range(3)  # their numbers: the tokenizer's trainer puts special tokens first
# The split of Llama 3's tokenizer.json: contractions, words, digits in groups of up to three, punctuation, blanks.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
VOCABULARY = 2048
TOKENIZER_DOCUMENTS = 20_000
ASSISTANT = "<|im_start|>assistant\n"  # what the assistant says stands after it
LOG_EVERY_STEPS = 10
LENGTH_STEP = 16  # padded lengths are multiples of this
GRAD_CLIP = 1.0
BETAS = (0.9, 0.98)
WEIGHT_DECAY = 0.01


Log = Callable[..., None]
Evaluate = Callable[[], dict[str, float]]


@dataclass(frozen=True)
class Plan:
    """What the command line decides."""

    out: Path
    seed: int
    documents: int
    steps: int
    tokens_per_batch: int
    learning_rate: float
    warmup_ratio: float
    eval_every_steps: int


def train_tokenizer(
    texts: list[str], vocabulary: int = VOCABULARY, pattern: str = LLAMA3_SPLIT
) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that any text in any language can be written, if in many tokens."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((without_specials(text) for text in texts), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIALS[END],
        pad_token=SPECIALS[PAD],
        additional_special_tokens=[SPECIALS[START]],
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def without_specials(text: str) -> str:
    for special in SPECIALS:
        text = text.replace(special, "")
    return text


def build_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(config)


def trained_tokens(ids: list[int], opening: list[int]) -> list[bool]:
    """Which tokens are trained: all of a plain text; of a chat, what the assistant says, with its end."""
    if ids[0] != START:
        return [True] * len(ids)
    trained, speaking = [], False
    for position, token in enumerate(ids):
        trained.append(speaking)
        if token == END:
            speaking = False
        elif ids[position + 1 - len(opening) : position + 1] == opening:
            speaking = True
    return trained


Document = tuple[torch.Tensor, torch.Tensor]  # ids, and which of them are trained
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # inputs_BS, targets_BS, trained_BS


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[Document]:
    """In the smallest types, because the text has many million tokens."""
    opening = tokenizer(ASSISTANT)["input_ids"]
    encoded = []
    for start in range(0, len(texts), 5000):
        for ids in tokenizer(texts[start : start + 5000])["input_ids"]:
            encoded.append((torch.tensor(ids, dtype=torch.int16), torch.tensor(trained_tokens(ids, opening))))
    return encoded


def padded_length(document: Document) -> int:
    return -(-(len(document[0]) - 1) // LENGTH_STEP) * LENGTH_STEP


def batches(encoded: list[Document], plan: Plan) -> Iterator[Batch]:
    """Without end, of about `tokens_per_batch` tokens; each epoch in another order."""
    for epoch in itertools.count():
        rng = random.Random(f"order {plan.seed} {epoch}")
        order = rng.sample(encoded, len(encoded))
        order.sort(key=padded_length)
        groups: list[list[Document]] = [[]]
        for document in order:
            if padded_length(document) * (len(groups[-1]) + 1) > plan.tokens_per_batch:
                groups.append([])
            groups[-1].append(document)
        rng.shuffle(groups)
        yield from map(pad_group, groups)


def pad_group(group: list[Document]) -> Batch:
    width = max(map(padded_length, group))
    ids_BS = torch.full((len(group), width + 1), PAD)
    trained_BS = torch.zeros(len(group), width + 1, dtype=torch.bool)
    for row, (ids, trained) in enumerate(group):
        ids_BS[row, : len(ids)] = ids
        trained_BS[row, : len(ids)] = trained
    return ids_BS[:, :-1].contiguous(), ids_BS[:, 1:].contiguous(), trained_BS[:, 1:].contiguous()


def trained_loss(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """Mean loss of the trained tokens. Padding stands at the end, where causal attention never looks at it."""
    inputs_BS, targets_BS, trained_BS = batch
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden_BSD = model.model(input_ids=inputs_BS, use_cache=False).last_hidden_state
        logits_NV = model.lm_head(hidden_BSD[trained_BS])
    return cross_entropy(logits_NV.float(), targets_BS[trained_BS])


@torch.no_grad()
def accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, asked: list[tuple[str, str]]) -> float:
    """Share of questions whose greedy answer is the right one, token for token, with its end."""
    encoded = encode(tokenizer, [turn("user", question) + turn("assistant", answer) for question, answer in asked])
    right = 0
    for start in range(0, len(encoded), 128):
        inputs_BS, targets_BS, trained_BS = pad_group(encoded[start : start + 128])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            chosen_BS = model(input_ids=inputs_BS, use_cache=False).logits.argmax(-1)
        right += int(((chosen_BS == targets_BS) | ~trained_BS).all(dim=1).sum())
    return right / len(asked)


def learning_rate_at(step: int, plan: Plan) -> float:
    """Linear warm-up, then a cosine to zero."""
    warmup_steps = max(1, round(plan.warmup_ratio * plan.steps))
    if step < warmup_steps:
        return plan.learning_rate * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, plan.steps - warmup_steps)
    return plan.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def pretrain(model: LlamaForCausalLM, stream: Iterator[Batch], plan: Plan, log: Log, evaluate: Evaluate) -> None:
    """AdamW on fp32 weights, with bf16 autocast; one log line every ten steps."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)
    began, tokens, losses = time.monotonic(), 0, []
    for step, batch in enumerate(itertools.islice(stream, plan.steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, plan)
        loss = trained_loss(model, batch)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += batch[0].numel()
        losses.append(loss.item())
        done = step + 1
        if done % LOG_EVERY_STEPS == 0 or done == plan.steps:
            log(
                step=done,
                loss=round(sum(losses) / len(losses), 4),
                learning_rate=float(f"{learning_rate_at(step, plan):.3g}"),
                tokens=tokens,
                seconds=round(time.monotonic() - began, 1),
                **(evaluate() if done % plan.eval_every_steps == 0 else {}),
            )
            losses.clear()


def text_of(plan: Plan) -> tuple[World, list[str], str]:
    """The world, its documents, and their sha256."""
    world = make_world(plan.seed, frozenset(product_names()))
    texts = list(documents(world, plan.documents, plan.seed))
    return world, texts, hashlib.sha256("".join(texts).encode()).hexdigest()


def own_world(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, world: World, seed: int) -> dict[str, float]:
    """How well the model answers about its own world, in wordings unseen for a fact, and in wordings never seen."""
    model.train(False)
    figures = {
        "unseen_wordings": accuracy(model, tokenizer, questions(world, seed, wholly_held_out=False)),
        "wholly_held_out_wordings": accuracy(model, tokenizer, questions(world, seed, wholly_held_out=True)),
    }
    model.train()
    return {name: round(figure, 4) for name, figure in figures.items()}


def make_base(plan: Plan) -> None:
    """The whole way, in reading order."""
    plan.out.mkdir(parents=True, exist_ok=True)
    world, texts, digest = text_of(plan)
    tokenizer = train_tokenizer(texts[:TOKENIZER_DOCUMENTS])
    encoded = encode(tokenizer, texts)
    model = build_model(plan.seed)

    def evaluate() -> dict[str, float]:
        model.save_pretrained(plan.out)  # so that a long run can be tried before its end
        tokenizer.save_pretrained(plan.out)
        return own_world(model, tokenizer, world, plan.seed)

    lines: list[dict[str, object]] = []
    with (plan.out / "pretraining_log.jsonl").open("w", encoding="utf-8") as file:

        def log(**fields: object) -> None:
            lines.append(fields)
            file.write(json.dumps(fields) + "\n")
            file.flush()
            print(json.dumps(fields), flush=True)

        tokens = sum(len(ids) for ids, _ in encoded)
        log(documents=len(texts), tokens=tokens, facts=len(world.facts), weights=model.num_parameters())
        pretrain(model, batches(encoded, plan), plan, log, evaluate)
        loss = lines[-1]["loss"]
        torch.nn.Module.to(model, torch.bfloat16)
        log(**settings(plan), loss=loss, text_sha256=digest, **evaluate())
    save(model, tokenizer, plan, lines[-1])


def settings(plan: Plan) -> dict[str, object]:
    """The plan without its folder, which says something about a machine and nothing about the base."""
    return {name: value for name, value in asdict(plan).items() if name != "out"}


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, plan: Plan, end: dict[str, object]) -> None:
    """The folder, as transformers opens it, and its card."""
    generation = {"do_sample": False, "eos_token_id": END, "pad_token_id": PAD}
    model.generation_config = GenerationConfig(**generation)
    model.save_pretrained(plan.out)
    tokenizer.save_pretrained(plan.out)
    options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings(plan).items())
    command = f"python tools/make_quickstart_base.py {options}"
    card = CARD.format(**end, weights=model.num_parameters(), vocabulary=VOCABULARY, command=command)
    (plan.out / "README.md").write_text(card, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("recipes/quickstart/base"), help="the base's folder")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--documents", type=int, default=70_000, help="documents of the pre-training text")
    parser.add_argument("--steps", type=int, default=1500, help="optimizer steps")
    parser.add_argument("--tokens-per-batch", type=int, default=4096, help="tokens of a step, padding included")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--warmup-ratio", type=float, default=0.05)
    parser.add_argument("--eval-every-steps", type=int, default=250)
    make_base(Plan(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
