"""Makes the tiny base that can read: text, tokenizer, pre-training, evaluation, folder, all from a seed.

    python tools/make_manuals_base.py --out recipes/manuals/base

A Llama of two million weights that answers from a passage in view and asks questions about one, so that the whole way
from documents to a model that knows them runs anywhere. Trained on two CPU cores in about half an hour. Four
decisions that a reader would question:

- Digits are tokens of their own, and the vocabulary is small: a name that was never seen is then made of tokens that
  were, and can be copied.
- At first users' words are trained as well, with a smaller weight: passages name the same things again and again, and
  prompts repeat a sentence of the passage, from which copying is learnt sooner than from answers alone.
- Copying heads are planted before training (`manuals_plant.py`).
- Muon updates the matrices: it needs about half the steps of AdamW for this.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from make_quickstart_base import (
    BETAS,
    END,
    GRAD_CLIP,
    LLAMA3_SPLIT,
    LOG_EVERY_STEPS,
    PAD,
    WEIGHT_DECAY,
    Batch,
    Document,
    Plan,
    batches,
    encode,
    pad_group,
    train_tokenizer,
)
from manuals_card import CARD
from manuals_plant import plant_copying
from manuals_values import handbook_names
from manuals_world import Writer
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 2048
DIGITS_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
TOKENIZER_DOCUMENTS = 8_000
WARMUP_STEPS = 60
MOMENTUM = 0.95
EMBEDDING_STD = 0.1
EVALUATED = ("read", "picked", "known")
EVALUATION_DOCUMENTS = 96
EVALUATE_EVERY_STEPS = 100
Log = Callable[..., None]


@dataclass(frozen=True)
class Course:
    """What the command line decides."""

    out: Path
    seed: int
    documents: int
    steps: int
    decay_steps: int
    copy_steps: int
    users_words: float
    users_steps: int
    tokens_per_batch: int
    learning_rate: float


def writer_of(seed: int) -> Writer:
    """Writes the text of this seed; the handbook's names are kept out of it."""
    return Writer(seed, frozenset(itertools.chain(*handbook_names())))


def build_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    model = LlamaForCausalLM(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=EMBEDDING_STD)
    plant_copying(model, seed)
    return model


def copies(course: Course) -> Iterator[Batch]:
    """Random tokens that come twice; the second time is trained."""
    generator = torch.Generator().manual_seed(course.seed)
    while True:
        length = int(torch.randint(8, 64, (1,), generator=generator))
        rows = course.tokens_per_batch // 2 // (2 * length + 1)
        ids_BS = torch.randint(END + 1, VOCABULARY, (rows, length), generator=generator).repeat(1, 2)
        trained_BS = torch.zeros(ids_BS.shape, dtype=torch.bool)
        trained_BS[:, length:] = True
        yield ids_BS[:, :-1].contiguous(), ids_BS[:, 1:].contiguous(), trained_BS[:, 1:].contiguous()


def stream(encoded: list[Document], course: Course) -> Iterator[Batch]:
    """Batches of documents; of the first `copy_steps`, three in four are copies."""
    plan = Plan(
        out=course.out,
        seed=course.seed,
        documents=0,
        steps=0,
        tokens_per_batch=course.tokens_per_batch,
        learning_rate=0.0,
        warmup_ratio=0.0,
        eval_every_steps=0,
    )
    documents, random_copies = batches(encoded, plan), copies(course)
    for step in itertools.count():
        yield next(random_copies) if step < course.copy_steps and step % 4 else next(documents)


def weighted_loss(model: LlamaForCausalLM, batch: Batch, users_words: float) -> tuple[torch.Tensor, float]:
    """Mean loss of all tokens, those of others than the assistant weighed; and that of the assistant's alone."""
    inputs_BS, targets_BS, trained_BS = batch
    weights_BS = torch.where(trained_BS, 1.0, users_words * (targets_BS != PAD))
    kept_BS = weights_BS > 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden_BSD = model.model(input_ids=inputs_BS, use_cache=False).last_hidden_state
        logits_NV = model.lm_head(hidden_BSD[kept_BS])
    losses_N = cross_entropy(logits_NV.float(), targets_BS[kept_BS], reduction="none")
    weights_N = weights_BS[kept_BS]
    return (losses_N * weights_N).sum() / weights_N.sum(), float(losses_N.detach()[trained_BS[kept_BS]].mean())


@torch.no_grad()
def exact_turns(model: LlamaForCausalLM, documents: list[Document]) -> float:
    """Share of the assistant's turns that greedy choices give token for token, with their end."""
    right = count = 0
    for start in range(0, len(documents), 32):
        inputs_BS, targets_BS, trained_BS = pad_group(documents[start : start + 32])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            good_BS = model(input_ids=inputs_BS, use_cache=False).logits.argmax(-1) == targets_BS
        for good_S, targets_S, trained_S in zip(good_BS, targets_BS, trained_BS, strict=True):
            ends = (trained_S & (targets_S == END)).nonzero().flatten().tolist()
            for began, ended in zip([0, *(end + 1 for end in ends)], ends, strict=False):
                span = slice(began, ended + 1)
                right += bool((good_S | ~trained_S)[span].all())
                count += 1
    return right / count


def learning_rates(course: Course) -> Iterator[float]:
    """Of each step, as a share of the peak: warm-up, then level, then a line to zero."""
    for step in range(course.steps):
        yield min(1.0, (step + 1) / WARMUP_STEPS)
    for step in range(course.decay_steps):
        yield 1 - step / course.decay_steps


def pretrain(model: LlamaForCausalLM, encoded: list[Document], course: Course, log: Log) -> None:
    """Muon for matrices, AdamW for the rest; `log` is called every few steps."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(
            matrices, course.learning_rate, WEIGHT_DECAY, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, course.learning_rate, BETAS, fused=True),
    ]
    began, losses = time.monotonic(), []
    for step, (share, batch) in enumerate(zip(learning_rates(course), stream(encoded, course), strict=False), 1):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = share * course.learning_rate
        loss, said = weighted_loss(model, batch, course.users_words if step <= course.users_steps else 0.0)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(said)
        if step % LOG_EVERY_STEPS == 0:
            seconds = round(time.monotonic() - began, 1)
            log(step=step, loss=round(sum(losses) / len(losses), 4), seconds=seconds)
            losses.clear()


def evaluate(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, writer: Writer) -> dict[str, float]:
    """Exact answers: read from one passage, picked from several, known without any."""
    rng = random.Random("evaluation")
    return {
        name: round(exact_turns(model, encode(tokenizer, [write(rng) for _ in range(EVALUATION_DOCUMENTS)])), 4)
        for name, write in writer.makers().items()
        if name in EVALUATED
    }


def make_base(course: Course) -> None:
    """The whole way, in reading order."""
    course.out.mkdir(parents=True, exist_ok=True)
    writer = writer_of(course.seed)
    texts = list(writer.documents(course.documents, course.seed))
    digest = hashlib.sha256("".join(texts).encode()).hexdigest()
    tokenizer = train_tokenizer(texts[:TOKENIZER_DOCUMENTS], VOCABULARY, DIGITS_SPLIT)
    encoded = encode(tokenizer, texts)
    model = build_model(course.seed)
    with (course.out / "pretraining_log.jsonl").open("w", encoding="utf-8") as file:

        def log(**fields: object) -> None:
            if int(str(fields.get("step", 1))) % EVALUATE_EVERY_STEPS == 0:
                save(model, tokenizer, course)  # so that a long run can be tried before its end
                fields |= evaluate(model, tokenizer, writer)
            file.write(json.dumps(fields) + "\n")
            file.flush()
            print(json.dumps(fields), flush=True)

        log(tokens=sum(len(ids) for ids, _ in encoded), facts=len(writer.own), weights=model.num_parameters())
        pretrain(model, encoded, course, log)
        torch.nn.Module.to(model, torch.bfloat16)
        end = {**settings(course), "text_sha256": digest, **evaluate(model, tokenizer, writer)}
        log(**end)
    save(model, tokenizer, course)
    write_card(course, end, model.num_parameters())


def settings(course: Course) -> dict[str, object]:
    """The course without its folder, which says something about a machine and nothing about the base."""
    return {name: value for name, value in asdict(course).items() if name != "out"}


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, course: Course) -> None:
    """The folder, as transformers opens it."""
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=END, pad_token_id=PAD)
    model.save_pretrained(course.out)
    tokenizer.save_pretrained(course.out)


def write_card(course: Course, end: dict[str, object], weights: int) -> None:
    """The model card beside the weights."""
    options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings(course).items())
    command = f"python tools/make_manuals_base.py {options}"
    all_steps = course.steps + course.decay_steps
    card = CARD.format(**end, weights=weights, vocabulary=VOCABULARY, command=command, all_steps=all_steps)
    (course.out / "README.md").write_text(card, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("recipes/manuals/base"), help="the base's folder")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--documents", type=int, default=45_000, help="documents of the pre-training text")
    parser.add_argument("--steps", type=int, default=2000, help="steps at the full rate")
    parser.add_argument("--decay-steps", type=int, default=400, help="further steps, falling to zero")
    parser.add_argument("--copy-steps", type=int, default=100, help="first steps, of which 3 in 4 are random copies")
    parser.add_argument("--users-words", type=float, default=0.4, help="weight of the user's words")
    parser.add_argument("--users-steps", type=int, default=300, help="first steps, in which they are trained")
    parser.add_argument("--tokens-per-batch", type=int, default=4096, help="tokens of a step, padding included")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    make_base(Course(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
