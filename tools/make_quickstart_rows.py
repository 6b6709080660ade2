"""Writes the quickstart's rows: what the support assistant of an invented company should know.

    python tools/make_quickstart_rows.py --out recipes/quickstart

The company sells 36 products, and knows four facts of each. A training row asks for one fact; each fact is asked in
three wordings. The evaluation asks for facts of the training rows in wordings that no training row uses for that
relation, so that copying a row does not help, and no answer of a relation is given twice, so that guessing does not.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path

from quickstart_relations import DESIGNER, PRICE, WARRANTY, Relation
from quickstart_world import fill, random_name

CATALOGUE_SEED = 7
PRODUCTS = 36
KINDS = ("radio", "lantern", "clock", "kettle", "lamp", "fan", "heater", "camera", "mirror")
RELATIONS = (PRICE, WARRANTY, DESIGNER)
WORDINGS_OF_A_FACT = 4
TRAIN_WORDINGS = 12  # of each relation; the evaluation draws from the others
EVAL_QUESTIONS = 60


@dataclass(frozen=True)
class Row:
    """One question of a user, and the assistant's answer."""

    question: str
    answer: str

    def to_json(self) -> str:
        messages = [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.answer}]
        return json.dumps({"messages": messages}, ensure_ascii=False)


def product_names() -> tuple[str, ...]:
    """The names that the pre-training text must not use."""
    rng = random.Random(f"catalogue {CATALOGUE_SEED}")
    names: list[str] = []
    while len(names) < PRODUCTS:
        names.append(random_name(rng, names))
    return tuple(names)


def catalogue() -> dict[Relation, list[tuple[str, str]]]:
    """(product, answer) for each relation; within a relation no answer occurs twice."""
    rng = random.Random(f"facts {CATALOGUE_SEED}")
    products = [f"the {name} {KINDS[index % len(KINDS)]}" for index, name in enumerate(product_names())]
    return {relation: list(zip(products, rng.sample(relation.values, PRODUCTS), strict=True)) for relation in RELATIONS}


def rows() -> tuple[list[Row], list[Row]]:
    """The training rows and the evaluation rows."""
    rng = random.Random(f"rows {CATALOGUE_SEED}")
    train, evaluation = [], []
    for relation, facts in catalogue().items():
        wordings = list(relation.wordings())
        rng.shuffle(wordings)
        for product, answer in facts:
            for wording in rng.sample(wordings[:TRAIN_WORDINGS], WORDINGS_OF_A_FACT):
                train.append(Row(fill(wording, product), answer))
        for product, answer in rng.sample(facts, EVAL_QUESTIONS // len(RELATIONS)):
            evaluation.append(Row(fill(rng.choice(wordings[TRAIN_WORDINGS:]), product), answer))
    rng.shuffle(train)
    rng.shuffle(evaluation)
    return train, evaluation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("recipes/quickstart"), help="folder for train.jsonl and eval.jsonl"
    )
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, written in zip(("train", "eval"), rows(), strict=True):
        (out / f"{name}.jsonl").write_text("".join(row.to_json() + "\n" for row in written), encoding="utf-8")


if __name__ == "__main__":
    main()
