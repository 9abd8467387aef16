"""Where bytes come from and go: folders, the Hub, output folders."""

from .destination import Destination, SharedOutput, UnlockedPlace, WritableFile
from .file_names import spelling
from .hub import HubSource, open_hub
from .joined import join_output
from .local import (
    LocalFile,
    LocalSource,
    blocks_at,
    free_space,
    is_clutter,
    local_path,
    output_path,
    store_url,
)
from .location import Location, Readable, open_output, open_source
from .output import WORKSPACE, OutputFolder, PartialFile
from .pinned import PinnedSource
from .source import Announce, HubId, ReadableFile, Source, Span, file_blocks, sha256_of
from .system import flush, flush_folder, is_same, is_within, lock
from .traffic import Traffic
from .traffic import total as total_traffic
from .unlocked import open_unlocked, require_place, write_document

__all__ = [
    "WORKSPACE",
    "Announce",
    "Destination",
    "HubId",
    "HubSource",
    "LocalFile",
    "LocalSource",
    "Location",
    "OutputFolder",
    "PartialFile",
    "PinnedSource",
    "Readable",
    "ReadableFile",
    "SharedOutput",
    "Source",
    "Span",
    "Traffic",
    "UnlockedPlace",
    "WritableFile",
    "blocks_at",
    "file_blocks",
    "flush",
    "flush_folder",
    "free_space",
    "is_clutter",
    "is_same",
    "is_within",
    "join_output",
    "local_path",
    "lock",
    "open_hub",
    "open_output",
    "open_source",
    "open_unlocked",
    "output_path",
    "require_place",
    "sha256_of",
    "spelling",
    "store_url",
    "total_traffic",
    "write_document",
]
