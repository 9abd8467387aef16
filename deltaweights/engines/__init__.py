"""For inference engines: base and delta served, and weight streams taken, inside their own processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import _exports

if TYPE_CHECKING:
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
