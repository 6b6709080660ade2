"""Which model types version 4 of transformers knows, and reads rotary positions of under its own keys.

Source: 4.57.6, the last of that version: types of MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, and of texts in multimodal models,
whose configuration file names `rope_theta`. A type that came later never met those keys: its configuration takes them
for other things or refuses them (Gemma 4, LFM3), and no version that knows the type looks for them.
"""

from __future__ import annotations

READS_ROPE_THETA = frozenset(
    (
        *("apertus", "arcee", "aria_text", "bamba", "bitnet", "blt", "cohere", "cohere2", "dbrx", "deepseek_v2"),
        *("deepseek_v3", "diffllama", "doge", "dots1", "emu3", "ernie4_5", "ernie4_5_moe", "exaone4", "falcon"),
        *("falcon_h1", "flex_olmo", "fuyu", "gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text"),
        *("glm", "glm4", "glm4_moe", "glm4v_text", "got_ocr2", "gpt_neox", "gpt_neox_japanese", "gpt_oss", "granite"),
        *("granitemoe", "granitemoehybrid", "granitemoeshared", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe"),
        *("jetmoe", "kyutai_speech_to_text", "lfm2", "llama", "llama4", "llama4_text", "longcat_flash", "minimax"),
        *("ministral", "mistral", "mixtral", "mllama", "modernbert-decoder", "moshi", "nemotron", "olmo", "olmo2"),
        *("olmo3", "olmoe", "persimmon", "phi", "phi3", "phi4_multimodal", "phimoe", "qwen2", "qwen2_5_vl_text"),
        *("qwen2_moe", "qwen2_vl_text", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_vl_moe_text", "qwen3_vl_text"),
        *("recurrent_gemma", "seed_oss", "smollm3", "stablelm", "starcoder2", "vaultgemma", "zamba2"),
    )
)
