"""Recipes from elsewhere: other trainers' configurations as ours, every key of theirs accounted for."""
