"""Low-rank updates: found in base and target, stored as two matrices of integers, added to the base.

Merging an adapter adds the product of two narrow matrices to a weight and rounds. :func:`find_low_rank` finds
such products; :class:`LowRank` says from one what a chunk of the base becomes, to the last bit the same on
every machine. The ordinary methods code what is left.
"""

from .prediction import LowRank
from .search import EFFORTS, Effort, find_low_rank

__all__ = ["EFFORTS", "Effort", "LowRank", "find_low_rank"]
