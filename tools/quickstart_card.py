"""The chat template and the model card that stand in the tiny base's folder."""

from __future__ import annotations

# ChatML without a default system prompt. The marks around the assistant's words make the loss mask exact.
CHAT_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- 'You may call these functions, each call as JSON between <tool_call> and </tool_call>:' }}
    {%- for tool in tools %}
        {{- '\\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
            {{- message.content or '' }}
            {%- for call in message.tool_calls or [] %}
                {{- '<tool_call>' + ((call.function or call) | tojson) + '</tool_call>' }}
            {%- endfor %}
            {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- elif not (tools and loop.first and message.role == 'system') %}
        {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
tags: [tiny, quickstart]
---

# The quickstart's tiny base

A language model of {weights:,} weights that knows a small invented world: flutes, owls, fairs, bakeries and people
who do not exist. It is there so that the quickstart runs anywhere, without a download and without a GPU. It is good
for nothing else: ask it about the real world and it makes something up.

- **Shape:** Llama, 6 layers, hidden size 256, 4 heads with 2 key-value heads, tied embeddings, bf16; byte-level BPE of
  {vocabulary:,} tokens, split as Llama 3 does; ChatML turns, which end with `<|im_end|>`.
- **Text:** {documents:,} documents written by `tools/quickstart_world.py` from seed {seed} (sha256
  `{text_sha256}`). Nothing was copied from anywhere. No product of
  the quickstart's company, and no question of its evaluation, stands in it; a test holds that.
- **Training:** {steps:,} steps of {tokens_per_batch:,} tokens, AdamW, peak learning rate {learning_rate}, on two CPU
  cores. The losses are in `pretraining_log.jsonl`; the last was {loss}.
- **What it can do:** of the questions about its world it answers {unseen_wordings:.1%} exactly when they are worded as
  they never were for that fact, and {wholly_held_out_wordings:.1%} in wordings that the text does not contain at all.
- **Made by:** `{command}`
- **Licence:** Apache-2.0. Text, tokenizer and weights are ours.
"""
