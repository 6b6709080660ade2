"""Families whose layers see windows are llama.cpp's, by their logits."""
