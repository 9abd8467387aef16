"""Object stores, through fsspec: read from and written to."""

from .folder import JoinedPlace, StoreFolder
from .source import StoreSource
from .unlocked import UnlockedStore

__all__ = ["JoinedPlace", "StoreFolder", "StoreSource", "UnlockedStore"]
