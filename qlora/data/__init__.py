"""Data: rows of files become conversations, tokens with a mask, packs, and an order."""
