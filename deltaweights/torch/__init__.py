"""For people who train: deltas in and out of a model's memory. Needs the extra ``torch``."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .callback import DeltaCallback
    from .checkpoints import DeltaCheckpointer, list_checkpoints
    from .dcp import DeltaStorageReader, DeltaStorageWriter
    from .load import LoadReport, load_into, load_state_dict, write_files
    from .publisher import DeltaPublisher, PublishReport
    from .save import save_delta
    from .subscriber import DeltaSubscriber, SyncReport

__all__ = [
    "DeltaCallback",
    "DeltaCheckpointer",
    "DeltaPublisher",
    "DeltaStorageReader",
    "DeltaStorageWriter",
    "DeltaSubscriber",
    "LoadReport",
    "PublishReport",
    "SyncReport",
    "list_checkpoints",
    "load_into",
    "load_state_dict",
    "save_delta",
    "write_files",
]

#: Imported on first use: the callback needs transformers, the rest does not.
_LAZY = {
    "DeltaCallback": "callback",
    "DeltaCheckpointer": "checkpoints",
    "DeltaPublisher": "publisher",
    "DeltaStorageReader": "dcp",
    "DeltaStorageWriter": "dcp",
    "DeltaSubscriber": "subscriber",
    "LoadReport": "load",
    "PublishReport": "publisher",
    "SyncReport": "subscriber",
    "list_checkpoints": "checkpoints",
    "load_into": "load",
    "load_state_dict": "load",
    "save_delta": "save",
    "write_files": "load",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
