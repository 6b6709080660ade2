"""Sinks: drawing and storing are pure functions of events."""
