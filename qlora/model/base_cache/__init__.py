"""Bases in 4 bit on the disk: a second start reads 4-bit bytes only."""
