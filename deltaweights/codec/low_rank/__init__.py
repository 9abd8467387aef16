"""Low-rank updates: found in base and target, stored as two matrices of integers, added to the base.

Merging an adapter adds the product of two narrow matrices to a weight and rounds. :mod:`.search` finds such
products, and is imported only by what makes deltas; :class:`LowRank` says from one what a chunk of the base
becomes, to the last bit the same on every machine. The ordinary methods code what is left.
"""

from .efforts import EFFORTS, Effort
from .prediction import LowRank

__all__ = ["EFFORTS", "Effort", "LowRank"]
