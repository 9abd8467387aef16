"""For inference engines: base and delta served, weight streams taken, inside their own processes; and the
folders of updates that some of them read instead."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import _exports

if TYPE_CHECKING:
    from .disk_updates.chain import DiskUpdateReport as DiskUpdateReport
    from .disk_updates.exporting import ExportReport as ExportReport
    from .disk_updates.exporting import export_stream as export_stream
    from .disk_updates.importing import ImportReport as ImportReport
    from .disk_updates.importing import import_stream as import_stream
    from .disk_updates.writer import DiskUpdateWriter as DiskUpdateWriter
    from .placement import CheckpointTensor as CheckpointTensor
    from .placement import Placement as Placement
    from .placement import Places as Places
    from .placement import Writes as Writes
    from .placement import located as located
    from .placement import places as places
    from .placement import write_changes as write_changes
    from .pointer import ServeReport as ServeReport
    from .pointer import read_pointer as read_pointer
    from .pointer import serve_folder as serve_folder
else:
    __getattr__, __dir__, __all__ = _exports.exports(__name__)
