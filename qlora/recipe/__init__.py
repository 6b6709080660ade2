"""The recipe: its sections, what may be wrong with them, what a run pins, and how a file is read."""
