"""Asking a model, opened whatever its form: a run, an adapter, a merged folder, a GGUF file."""
