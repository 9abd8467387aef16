"""For training scripts, with torch (extra ``deltaweights[torch]``)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .dcp import DeltaStorageReader, DeltaStorageWriter

__all__ = [
    "DeltaStorageReader",
    "DeltaStorageWriter",
]

#: Imported on first use: nobody waits for what another part of torch needs.
_LAZY = {
    "DeltaStorageReader": "dcp",
    "DeltaStorageWriter": "dcp",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
