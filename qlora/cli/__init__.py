"""The commands. Each wires sinks to a run and turns errors into two lines and an exit code."""
