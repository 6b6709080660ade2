"""A trained model as one GGUF file: names, tokenizer, types and bytes as llama.cpp expects them."""
