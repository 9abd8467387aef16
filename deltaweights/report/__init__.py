"""Reports of what a fine-tune changed: measured, in words, as a page and as a picture."""

from .making import report_delta
from .results import DeltaReport, MovedRow, MovedTable

__all__ = ["DeltaReport", "MovedRow", "MovedTable", "report_delta"]
