"""Reports of what a fine-tune changed: measured, in words, as a page and as a picture."""

from .making import report_delta
from .results import DeltaReport, MovedRow, MovedTable
from .side_by_side import ComparisonReport, PairReport, report_side_by_side

__all__ = [
    "ComparisonReport",
    "DeltaReport",
    "MovedRow",
    "MovedTable",
    "PairReport",
    "report_delta",
    "report_side_by_side",
]
