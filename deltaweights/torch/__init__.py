"""For people who train: deltas in and out of a model's memory. Needs the extra ``deltaweights[torch]``."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .publisher import DeltaPublisher, PublishReport
    from .subscriber import DeltaSubscriber, SyncReport

__all__ = [
    "DeltaPublisher",
    "DeltaSubscriber",
    "PublishReport",
    "SyncReport",
]

#: Imported on first use.
_LAZY = {
    "DeltaPublisher": "publisher",
    "DeltaSubscriber": "subscriber",
    "PublishReport": "publisher",
    "SyncReport": "subscriber",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
