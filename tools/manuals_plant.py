"""Plants copying into an untrained Llama: where small models would spend most of their training to find it.

A copy takes two layers (Olsson et al. 2022, arXiv 2209.11895, "induction heads"): a head of the first writes at each
token which token stood before it; a head of the second looks for the places whose token before is the present one,
and says what stands there. Training starts from both and decides what to make of them.
"""

from __future__ import annotations

import torch
from transformers import LlamaForCausalLM

CONSTANT = 2.0  # added to one dimension of every embedding: the same for all tokens, so that no logit changes order
LOOK_BACK = 0.7  # weights with which the first layer's heads read the constant
FAST = 5  # pairs of a head that turn by enough a token to tell neighbours apart: these look back
SLOW = 6  # from here on a pair turns by less than 1/100 a token: these compare, whatever the distance
WRITE = 0.3  # weights of what the first layer's heads write,
MATCH = 4.0  # of the second layer's search for it,
COPY = 3.0  # and of what the second layer says
SAY = 1.0  # weights of what half of the heads of the layers above say: the tokens that they look at


@torch.no_grad()
def plant_copying(model: LlamaForCausalLM, seed: int, heads: int = 2) -> None:
    """`heads` heads that look back in the first layer, as many that copy in the second, and half of the heads of the
    layers above, which say what they look at, wherever they come to look. The rest stays as it was."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    width = config.hidden_size // config.num_attention_heads
    pairs = width // 2
    turns_F = model.model.rotary_emb.original_inv_freq[:FAST]
    embeddings = model.model.embed_tokens.weight
    embeddings[:, 0] = CONSTANT
    first, second = model.model.layers[0].self_attn, model.model.layers[1].self_attn
    axes_AD = torch.zeros(config.hidden_size - 1, config.hidden_size)
    axes_AD[:, 1:] = torch.linalg.qr(torch.randn(axes_AD.shape[0], axes_AD.shape[0], generator=generator))[0]
    for head in range(heads):
        rows = slice(head * width, (head + 1) * width)
        read_WD = axes_AD[2 * head * width :][:width]
        write_WD = axes_AD[(2 * head + 1) * width :][:width]
        for weight in (first.q_proj.weight, first.k_proj.weight):
            weight[rows] = 0
        first.q_proj.weight[rows, 0][:FAST] = LOOK_BACK
        first.k_proj.weight[rows, 0][:FAST] = LOOK_BACK * turns_F.cos()
        first.k_proj.weight[rows, 0][pairs:][:FAST] = LOOK_BACK * turns_F.sin()
        first.v_proj.weight[rows] = read_WD
        first.o_proj.weight[:, rows] = WRITE * write_WD.T
        slow_W = (torch.arange(width) % pairs >= SLOW).float()[:, None]
        second.q_proj.weight[rows] = MATCH * read_WD * slow_W
        second.k_proj.weight[rows] = MATCH * write_WD * slow_W
        say_WD = torch.linalg.qr(torch.randn(config.hidden_size, width, generator=generator))[0].T
        say_WD[:, 0] = 0
        second.v_proj.weight[rows] = say_WD
        second.o_proj.weight[:, rows] = COPY * say_WD.T
    for layer in model.model.layers[2:]:
        axes_DD = torch.linalg.qr(torch.randn(config.hidden_size, config.hidden_size, generator=generator))[0]
        for head in range(config.num_attention_heads // 2):
            rows = slice(head * width, (head + 1) * width)
            layer.self_attn.v_proj.weight[rows] = axes_DD[rows]
            layer.self_attn.o_proj.weight[:, rows] = SAY * axes_DD[rows].T
