"""The base model: a name or folder becomes a checked local folder, NF4 weights, adapters, answers."""
