"""What a fine-tune changed, as a manifest tells it: by layers and modules, in words, in a picture."""

from .grid import Grid, Module, Stack, Tally, grid_of, is_same, tally
from .measures import BITS, Measure, few_digits, figures_of, manifest_measures, most_of, step_of
from .picture import PICTURE_NAME, delta_picture, draw_changes
from .sentences import (
    adapter_sentences,
    describe_changes,
    say_where,
    structure_sentences,
    untouched_sentences,
)

__all__ = [
    "BITS",
    "PICTURE_NAME",
    "Grid",
    "Measure",
    "Module",
    "Stack",
    "Tally",
    "adapter_sentences",
    "delta_picture",
    "describe_changes",
    "draw_changes",
    "few_digits",
    "figures_of",
    "grid_of",
    "is_same",
    "manifest_measures",
    "most_of",
    "say_where",
    "step_of",
    "structure_sentences",
    "tally",
    "untouched_sentences",
]
