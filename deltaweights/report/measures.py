"""The figures that base and delta give together, for layers and modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..changes import Measure
from ..changes.measures import in_percent, one_digit
from ..entries import TensorEntry
from .movement import Movement, combined
from .reading import Moves


def movement_of(moves: Moves, entries: Sequence[TensorEntry]) -> Movement | None:
    """How far some tensors moved together; None where none of them was measured."""
    keys = ((entry.file or "", entry.name) for entry in entries)
    found = [moves.tensors[key] for key in keys if key in moves.tensors]
    if not found:
        return None
    return combined(found) if found[1:] else found[0]


def base_measures(moves: Moves) -> list[Measure]:
    """The measures that need the base, and those of a manifest that they replace."""

    def of(figure: Callable[[Movement], float | None]) -> Callable[[Sequence[TensorEntry]], float | None]:
        def value(entries: Sequence[TensorEntry]) -> float | None:
            found = movement_of(moves, entries)
            return figure(found) if found else None

        return value

    def spectral(name: str) -> Callable[[Movement], float | None]:
        return lambda found: getattr(found.spectrum, name) if found.spectrum else None

    return [
        Measure(
            "relative",
            "‖Δ‖ / ‖W‖",
            "How long what was added (Δ) is, compared with the base's weights (W), by the Frobenius norm.",
            of(lambda found: found.relative),
            in_percent,
            is_percent=True,
        ),
        Measure(
            "moved_share",
            "Moved",
            "The share of the weights that are not the base's, bit for bit.",
            of(lambda found: found.moved_share),
            in_percent,
            is_percent=True,
        ),
        Measure(
            "norm", "‖Δ‖", "The Frobenius norm of what was added.", of(lambda found: found.norm), one_digit
        ),
        Measure(
            "angle",
            "1 - cosine",
            "How far the weights turned: 1 minus the cosine of the base's weights and the fine-tune's.",
            of(lambda found: found.angle_part),
            one_digit,
        ),
        Measure(
            "largest",
            "Largest change",
            "The largest amount by which one weight moved.",
            of(lambda found: found.largest),
            one_digit,
        ),
        Measure(
            "share_8",
            "In 8 directions",
            "The share of ‖Δ‖² in the 8 strongest directions (singular vectors) of each matrix, about. "
            "Much of it there is the mark of an adapter.",
            of(spectral("share_8")),
            in_percent,
            is_percent=True,
        ),
        Measure(
            "share_64",
            "In 64 directions",
            "The same for 64 directions.",
            of(spectral("share_64")),
            in_percent,
            is_percent=True,
        ),
        Measure(
            "effective_rank",
            "Effective rank",
            "How many directions of equal strength would spread Δ as much: (Σλ)² / Σλ² over the squares λ of "
            "its singular values.",
            of(spectral("effective_rank")),
            one_digit,
        ),
    ]
