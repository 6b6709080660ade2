"""Eight doors through which something comes in from outside, and inputs without end for each of them.

An input is a good thing with something changed: a function of (door, seed, index), so that a finding can be replayed
(`python tools/fuzz.py --replay adapter:17`). It is given to the code that a command runs, in a child that is watched.
"""
