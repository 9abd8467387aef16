"""For people who train: deltas in and out of a model's memory. Needs the extra ``torch``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import _exports

if TYPE_CHECKING:
    from .dcp.storage import DeltaStorageReader as DeltaStorageReader
    from .dcp.storage import DeltaStorageWriter as DeltaStorageWriter
    from .models.callback import DeltaCallback as DeltaCallback
    from .models.checkpoints import DeltaCheckpointer as DeltaCheckpointer
    from .models.checkpoints import list_checkpoints as list_checkpoints
    from .models.from_pretrained import from_pretrained as from_pretrained
    from .models.load import LoadReport as LoadReport
    from .models.load import load_into as load_into
    from .models.load import load_state_dict as load_state_dict
    from .models.load import write_files as write_files
    from .models.save import save_delta as save_delta
    from .stream.following.prepared import Change as Change
    from .stream.following.prepared import Prepared as Prepared
    from .stream.following.prepared import StreamState as StreamState
    from .stream.following.prepared import SyncReport as SyncReport
    from .stream.following.subscriber import DeltaSubscriber as DeltaSubscriber
    from .stream.pieces import Part as Part
    from .stream.publishing.publisher import DeltaPublisher as DeltaPublisher
    from .stream.publishing.publisher import PublishReport as PublishReport
else:
    __getattr__, __dir__, __all__ = _exports.exports(__name__)
