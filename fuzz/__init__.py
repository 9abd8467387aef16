"""Hostile bytes for everything that is parsed: ``python -m fuzz [TARGET ...] [--seconds N]``."""
