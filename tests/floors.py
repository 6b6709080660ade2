"""The house as tests hold it and `tools/house.py` draws it: each module's floor, and its place on its room's line."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "qlora"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")

# The house: a module may import what stands on a lower floor, and of its own room what stands before it on its line.
FLOORS = {
    "cli": 8,
    "api": 7,
    "training": 6,
    "export": 5,
    "memory": 5,
    "model": 4,
    "data": 4,
    "run_folder": 4,
    "hub": 3,
    "report": 3,
    "run_record": 3,
    "recorded": 3,
    "step": 2,
    "recipe": 2,
    "events": 2,
    "disk": 2,
    "stop": 2,
    "out_of_memory": 1,
    "errors": 1,
    "guarded": 1,
    "files": 1,
    "foreign_json": 1,
    "manifest": 1,
    "foreign_toml": 1,
    "batch": 1,
    "chatml": 1,
    "child_process": 1,
    "lock": 1,
    "redaction": 1,
    "shown": 1,
    "third_party": 1,
    "version": 1,
    "windows_paths": 1,
    "device": 1,
    "": 9,  # qlora/__init__.py: the public face, above all; nothing in the house imports it
}
HEAVY = {"torch", "transformers", "peft", "datasets", "bitsandbytes", "accelerate", "pyarrow"}
LINES = {
    # Of the ground floor, which others may stand on.
    "": [
        *("out_of_memory", "shown", "redaction", "errors", "guarded"),
        *("files", "foreign_json", "foreign_toml", "manifest", "lock"),
    ],
    "cli": ["surroundings", "common", "keys", "verify_resume", "export", "estimate", "train"],
    "training": [
        *("phases", "schedule", "checkpoint", "memory_plan", "recovery", "evaluate", "selfcheck", "health"),
        *("step_batches", "best_adapter", "setup", "loop"),
    ],
    "export": [
        *("child", "merge", "hashed_file", "targets", "staging", "llama_cpp", "imatrix", "gguf", "version4", "hf"),
        *("artifacts", "adapter_base", "base_check", "verify", "ollama", "cards", "pipeline"),
    ],
    "export.merge": ["parts", "merge"],
    "export.llama_cpp": ["library", "runtime_child", "runtime"],
    "export.verify": [
        *("foresight", "candidates", "fidelity", "choice", "evaluation", "plain_open"),
        "weights_child",
        "weights",
        "reference",
        "checks",
    ],
    "export.gguf": [
        *(
            "probes",
            "pretokenizer",
            "spm",
            "special",
            "rope",
            "metadata",
            "vocab",
            "family",
            "families",
            "architectures",
        ),
        *("encode", "quant_mixes", "plan", "write", "lora"),
    ],
    "export.gguf.families": ["llama_like", "windowed", "layer_norm", "gemma", "recurrent"],
    "memory": [
        "allocator",
        "trace",
        "baselines",
        "simulate",
        "hardware",
        "overheads",
        "calibration",
        "estimate",
        "plan",
    ],
    "model": [
        *(
            "split_patterns",
            "tokenizer_check",
            "tokenizer",
            "config_bounds",
            "config_filter",
            "mixtures",
            "tensors",
            "identity",
        ),
        *("base_folder", "weight_names", "tokenizer_files", "chat_template", "adapter_config", "adapter_tensors"),
        *("adapter_notes", "adapter_folder", "adapter_seal", "delivered_loss", "base_watch", "resolve", "nf4"),
        *("cpu_matmul", "attention", "linear_use", "meta_model", "head_scaling", "packing_table", "tracing"),
        *("family_facts", "row_packing", "load", "adapters", "generate"),
    ],
    "data": [
        *("splits", "saved_sets", "source_files", "row_json", "unread", "role_words", "column_words", "marks", "calls"),
        *(
            "parts",
            "turns",
            "formats",
            "limits",
            "render_worker",
            "render",
            "parquet_worker",
            "arrow_worker",
            "parquet",
        ),
        *(
            "text_pieces",
            "readers",
            "sources",
            "conversations",
            "hub_rows",
            "call_shapes",
            "template_facts",
            "template",
            "spans",
            "dropped",
            "offsets",
            "chat",
            "packing",
            "token_cache",
            "row_cache",
            "prepare",
            "token_ids",
            "loader",
        ),
    ],
    "step": ["loss", "forward", "layerwise", "optimizer"],
    "recipe": ["sections", "problems", "reading", "pins"],
    "report": ["files", "figures", "memory", "console"],
}
