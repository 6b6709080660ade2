"""Merging an adapter into its base, tensor by tensor, and writing the result."""
