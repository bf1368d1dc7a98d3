"""Training from pair datasets. Imports neither ray nor stages: a machine without Ray can train."""
