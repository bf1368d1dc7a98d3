"""How long a test waits for what has to come."""

PATIENCE_S = 900.0
"""Seconds. No test asserts a time: this ends what hangs, on a machine however busy, sooner than pytest's own limit."""
