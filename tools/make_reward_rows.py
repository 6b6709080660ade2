"""Writes questions over the quickstart base's own world that only a reward can teach to answer: rows of grpo.

    python tools/make_reward_rows.py --out FOLDER [--shuffled]

The base knows every fact that is asked for. What it cannot know is how the house wants it said: a fact is given in one
of four manners, and which is right depends on what is asked (a price in one, a town in another). `warmup.jsonl` has
each question with all four, as often each, so that a model which has learned it knows the manners and nothing of when:
it is right a quarter of the time. `train.jsonl` and `eval.jsonl` have the right answer, which no step of grpo sees but
through exact match. Things that are asked about to evaluate are in no other file. `--shuffled` deals the right answers'
manners out anew by row, in training rows alone: the control, from which nothing can be learned.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from pathlib import Path

from make_quickstart_rows import product_names
from quickstart_world import Fact, fill, make_world

BASE_SEED = 1  # of the quickstart base's world (its README.md names the command)
SEED = 13
MANNERS = ("{v} friend", "{v} owner", "{v} judge", "{v} lawyer")  # whom it is said to, a token each
RELATIONS = 8  # those that most things have
TRAIN_ROWS, EVAL_ROWS = 256, 64
EVAL_SHARE = 0.25  # of the things


def rows() -> tuple[list[dict[str, str]], list[dict[str, str]], list[dict[str, str]]]:
    """Warm-up (prompt, completion), and questions (prompt, answer) to train on and to evaluate."""
    rng = random.Random(f"rewards {SEED}")
    world = make_world(BASE_SEED, frozenset(product_names()))
    counted = Counter(fact.relation.name for fact in world.facts)
    relations = sorted(counted, key=lambda name: (-counted[name], name))[:RELATIONS]
    rng.shuffle(relations)
    manner = {name: MANNERS[number % len(MANNERS)] for number, name in enumerate(relations)}
    things = sorted({fact.entity for fact in world.facts})
    kept = set(rng.sample(things, round(EVAL_SHARE * len(things))))

    def asked(fact: Fact) -> dict[str, str]:
        question = fill(rng.choice(fact.wordings), fact.entity)
        return {"prompt": question, "answer": manner[fact.relation.name].format(v=fact.value)}

    def drawn(count: int, evaluated: bool) -> list[Fact]:
        """As many facts of each manner, so that none is a better guess than another."""
        facts = [fact for fact in rng.sample(world.facts, len(world.facts)) if fact.relation.name in manner]
        there = [fact for fact in facts if (fact.entity in kept) == evaluated]
        of_each = [[fact for fact in there if manner[fact.relation.name] == one] for one in MANNERS]
        return [fact for group in zip(*of_each, strict=False) for fact in group][:count]

    train, evaluation = drawn(TRAIN_ROWS, False), drawn(EVAL_ROWS, True)
    warmup = [
        {"prompt": fill(rng.choice(fact.wordings), fact.entity), "completion": one.format(v=fact.value)}
        for fact in train
        for one in MANNERS
    ]
    rng.shuffle(warmup)
    return warmup, [asked(fact) for fact in train], [asked(fact) for fact in evaluation]


def shuffled(given: list[dict[str, str]]) -> list[dict[str, str]]:
    """The rows with the manners of their right answers dealt out anew."""
    manners = [row["answer"].rpartition(" ")[2] for row in given]
    random.Random(f"shuffled {SEED}").shuffle(manners)
    words = (row["answer"].rpartition(" ")[0] for row in given)
    return [{**row, "answer": f"{value} {last}"} for row, value, last in zip(given, words, manners, strict=True)]


def write(folder: Path, *files: list[dict[str, str]]) -> None:
    """warmup.jsonl, train.jsonl and eval.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, written in zip(("warmup", "train", "eval"), files, strict=True):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{folder / f'{name}.jsonl'}: {len(written)} rows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for warmup.jsonl, train.jsonl and eval.jsonl")
    parser.add_argument("--shuffled", action="store_true", help="right answers of training rows in manners by chance")
    asked = parser.parse_args()
    warmup, train, evaluation = rows()
    write(asked.out, warmup, shuffled(train) if asked.shuffled else train, evaluation)


if __name__ == "__main__":
    main()
