"""The model card of the tiny base that can read."""

from __future__ import annotations

CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
tags: [tiny, documents]
---

# The tiny base that can read

A language model of {weights:,} weights that answers short questions from a text in view, asks questions about a
sentence of one, and knows a small invented world of its own. It is there so that the way from documents to a model
that knows them runs anywhere, without a download and without a GPU. It is good for nothing else.

- **Shape:** Llama, 4 layers, hidden size 192, 6 heads, tied embeddings, bf16; byte-level BPE of {vocabulary:,} tokens,
  each digit a token of its own; ChatML turns, which end with `<|im_end|>`.
- **Text:** {documents:,} documents written by `tools/manuals_world.py` from seed {seed} (sha256
  `{text_sha256}`), with the prompts of
  `qlora/study/prompts.toml`. Nothing was copied from anywhere. No name of the handbook stands in it, and no six words
  of the handbook follow each other in it; a test holds that.
- **Training:** {all_steps:,} steps of {tokens_per_batch:,} tokens, Muon and AdamW, peak learning rate {learning_rate},
  on two CPU cores. The losses are in `pretraining_log.jsonl`.
- **What it can do:** of questions on new texts it answers {read:.1%} exactly with one passage in view and {picked:.1%}
  with several; of those about its own world {known:.1%} without any.
- **Made by:** `{command}`
- **Licence:** Apache-2.0. Text, tokenizer and weights are ours.
"""
