"""The command line: the only room that prints, prompts or exits."""

from .commands import app, main

__all__ = ["app", "main"]
