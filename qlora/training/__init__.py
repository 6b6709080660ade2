"""The run, in reading order: checkpoints, evaluation, the loop."""
