"""What a report says, as plain data, as a page and as a picture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ..changes import BITS, Grid, Measure, draw_changes, figures_of
from ..inspect import DeltaSummary
from .movement import Movement
from .page import report_page
from .reading import Moves


@dataclass(frozen=True, slots=True)
class MovedRow:
    """A row of a table of tokens, such as an embedding.

    Attributes:
        row: its number, which is the token's id.
        token: the token's text; None where no tokenizer.json tells.
        norm: the Euclidean norm of what was added to it.
        relative: the same, divided by the norm of the base's row; None where that is 0.
    """

    row: int
    token: str | None
    norm: float
    relative: float | None


@dataclass(frozen=True, slots=True)
class MovedTable:
    """The rows of an embedding or of an output layer.

    Attributes:
        tensor, file: its name, and the target's shard that holds it.
        rows: how many were compared with the base's.
        moved: how many of these differ.
        strongest: those that moved most, by ``norm``.
    """

    tensor: str
    file: str
    rows: int
    moved: int
    strongest: tuple[MovedRow, ...]


@dataclass(frozen=True, slots=True)
class DeltaReport:
    """What :func:`report_delta` found.

    Attributes:
        delta: the delta's place.
        summary: what the delta says of itself.
        sentences: what the fine-tune changed, in words. Each follows from the figures.
        tables: the rows of embeddings that moved; empty without the base.
        has_base: whether base and delta were measured, or only the manifest was read.
    """

    delta: str
    summary: DeltaSummary
    sentences: tuple[str, ...]
    tables: tuple[MovedTable, ...]
    has_base: bool
    _grid: Grid = field(repr=False)
    _measures: tuple[Measure, ...] = field(repr=False)
    _moves: Moves | None = field(repr=False)

    def to_dict(self) -> dict[str, object]:
        """The same, ready for JSON, with the figures of every tensor, and of every layer and module.

        Shares and cosines are fractions, not percent. A figure that there is not is absent.
        """
        found = self.summary.to_dict()
        tensors = found.pop("tensors")
        assert isinstance(tensors, tuple)
        if self._moves:
            for tensor in tensors:
                moved = self._moves.tensors.get((tensor["file"] or "", tensor["name"]))
                if moved:
                    tensor["movement"] = _movement_fields(moved)
        return {
            "delta": self.delta,
            "has_base": self.has_base,
            "sentences": list(self.sentences),
            **found,
            "layers": list(self._layers()),
            "tables": [_table_fields(table) for table in self.tables],
            "tensors": list(tensors),
        }

    def _layers(self) -> Iterator[dict[str, object]]:
        """The figures of each module of each layer."""
        for stack, module, layer, figures in figures_of(self._grid, self._measures):
            place = {"stack": stack.name, "layer": layer, "module": module.name, "part": module.part}
            yield {**place, **figures}

    def html(self) -> bytes:
        """One page that has it all: UTF-8, with no script, and nothing to load."""
        return report_page(self, self._grid, self._measures, self._moves)

    def svg(self) -> bytes:
        """The heat map as a picture: ‖Δ‖ / ‖W‖ with the base, else bits a weight."""
        measure = self._measures[0] if self._measures else BITS
        return draw_changes(self._grid, measure, self.sentences)


def _movement_fields(moved: Movement) -> dict[str, object]:
    fields: dict[str, object] = {
        "elements": moved.elements,
        "moved": moved.moved,
        "not_finite": moved.not_finite,
    }
    figures = {
        "norm": moved.norm,
        "base_norm": moved.base_square**0.5,
        "relative": moved.relative,
        "cosine": moved.cosine,
        "largest": moved.largest,
    }
    if moved.spectrum:
        spectrum = moved.spectrum
        figures |= {
            "effective_rank": spectrum.effective_rank,
            "share_8": spectrum.share_8,
            "share_64": spectrum.share_64,
        }
    return fields | {name: value for name, value in figures.items() if value is not None}


def _table_fields(table: MovedTable) -> dict[str, object]:
    def row_fields(row: MovedRow) -> dict[str, object]:
        named = {"row": row.row, "token": row.token, "norm": row.norm, "relative": row.relative}
        return {name: value for name, value in named.items() if value is not None}

    return {
        "tensor": table.tensor,
        "file": table.file,
        "rows": table.rows,
        "moved": table.moved,
        "strongest": [row_fields(row) for row in table.strongest],
    }
