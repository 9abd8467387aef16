"""Object stores, through fsspec: read from and written to."""

from .folder import StoreFolder
from .source import StoreSource

__all__ = ["StoreFolder", "StoreSource"]
