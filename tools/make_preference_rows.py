"""Writes pairs of answers over the quickstart's world: what a shop says to whom, which no base knows beforehand.

    python tools/make_preference_rows.py --out FOLDER [--swapped] [--marked]

Every question asks what a product costs or how long it is warranted, and either answer gives the same fact, in one of
two manners that have as many tokens. Which manner is the better one is a matter of the kind of product alone (of half
of the kinds it is the one, of half the other), so that no liking of the base for either helps: it prefers the better
answer half of the time. The products that are asked about to evaluate are in no training row. `--swapped` calls the
worse answer the better one, in training rows alone: the control. `--marked` writes each answer by itself with a mark.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from make_quickstart_rows import KINDS
from quickstart_relations import PRICE, WARRANTY
from quickstart_world import fill, random_name

SEED = 11
PRODUCTS = 180
EVAL_PRODUCTS = 45
MANNERS = ("{v} here", "{v} there")


def pairs() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Those to train on and those to evaluate: question, better answer, worse answer."""
    rng, names = random.Random(f"pairs {SEED}"), list[str]()
    train: list[dict[str, str]] = []
    evaluation: list[dict[str, str]] = []
    for number in range(PRODUCTS):
        names.append(random_name(rng, names))
        kind = number % len(KINDS[:8])
        better, worse = MANNERS if kind % 2 else MANNERS[::-1]
        for relation in (PRICE, WARRANTY):
            question = fill(rng.choice(relation.wordings()), f"the {names[-1]} {KINDS[kind]}")
            value = rng.choice(relation.values)
            answers = {"chosen": better.format(v=value), "rejected": worse.format(v=value)}
            (evaluation if number >= PRODUCTS - EVAL_PRODUCTS else train).append({"prompt": question, **answers})
    rng.shuffle(train)
    return train, evaluation


def swapped(row: dict[str, str]) -> dict[str, str]:
    return {**row, "chosen": row["rejected"], "rejected": row["chosen"]}


def marked(rows: list[dict[str, str]]) -> list[dict[str, object]]:
    return [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in rows
        for side in ("chosen", "rejected")
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl and eval.jsonl")
    parser.add_argument("--swapped", action="store_true", help="training rows call the worse answer the better one")
    parser.add_argument("--marked", action="store_true", help="answers by themselves, marked good or bad, for kto")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    train, evaluation = pairs()
    train = [swapped(row) for row in train] if asked.swapped else train
    for name, rows in (("train", train), ("eval", evaluation)):
        written = marked(rows) if asked.marked else rows
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written)
        (asked.out / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{asked.out / f'{name}.jsonl'}: {len(written)} rows")


if __name__ == "__main__":
    main()
