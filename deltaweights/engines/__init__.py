"""For inference engines, and the formats that they read. Needs the extra ``torch``."""

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
else:
    __getattr__, __dir__, __all__ = _exports.exports(__name__)
