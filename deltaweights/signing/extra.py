"""The libraries of the extra ``sign``: whether they are there, and their errors as ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import DeltaWeightsError, SigningError


@contextmanager
def signing_libraries() -> Iterator[None]:
    """Libraries of the extra are imported inside the block.

    Raises:
        SigningError: one is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise SigningError(
            "Signatures need libraries that are not installed",
            f"{error}.",
            "Install the extra sign: pip install 'deltaweights[sign]'.",
        ) from error


@contextmanager
def failures_explained(what: str, fix: str, kind: type[DeltaWeightsError] = SigningError) -> Iterator[None]:
    """An error of these libraries inside the block becomes one of ``kind``."""
    try:
        with signing_libraries():
            yield
    except DeltaWeightsError:
        raise
    except Exception as error:  # of any type: they are several libraries, given untrusted input
        raise kind(what, _in_words(error), fix) from error


def _in_words(error: Exception) -> str:
    """The first line of what an error says, with its name, as a sentence."""
    said = next(iter(str(error).strip().splitlines()), "")[:500]
    told = f"{type(error).__name__}: {said}" if said else type(error).__name__
    return told if told.endswith((".", "?", "!")) else f"{told}."
