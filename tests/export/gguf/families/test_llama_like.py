"""Families of Llama's kind are llama.cpp's, by their logits."""
