"""For people who train: deltas in and out of a model's memory. Needs the extra ``torch``."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .dcp.storage import DeltaStorageReader, DeltaStorageWriter
    from .models.callback import DeltaCallback
    from .models.checkpoints import DeltaCheckpointer, list_checkpoints
    from .models.load import LoadReport, load_into, load_state_dict, write_files
    from .models.save import save_delta
    from .stream.publisher import DeltaPublisher, PublishReport
    from .stream.subscriber import DeltaSubscriber, SyncReport

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
    "DeltaCallback": "models.callback",
    "DeltaCheckpointer": "models.checkpoints",
    "DeltaPublisher": "stream.publisher",
    "DeltaStorageReader": "dcp.storage",
    "DeltaStorageWriter": "dcp.storage",
    "DeltaSubscriber": "stream.subscriber",
    "LoadReport": "models.load",
    "PublishReport": "stream.publisher",
    "SyncReport": "stream.subscriber",
    "list_checkpoints": "models.checkpoints",
    "load_into": "models.load",
    "load_state_dict": "models.load",
    "save_delta": "models.save",
    "write_files": "models.load",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
