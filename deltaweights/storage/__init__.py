"""Where bytes come from and go: folders, the Hub, output folders."""

from .file_names import spelling
from .hub import HubSource, open_hub
from .joined import join_output
from .local import LocalSource, is_clutter, local_path, output_path
from .location import Location, Readable, open_source
from .output import WORKSPACE, OutputFolder, PartialFile, SharedOutput
from .pinned import PinnedSource
from .source import HubId, ReadableFile, Source, Span, file_blocks, sha256_of
from .system import flush_folder, is_same, is_within, lock
from .traffic import Traffic
from .traffic import total as total_traffic

__all__ = [
    "WORKSPACE",
    "HubId",
    "HubSource",
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
    "file_blocks",
    "flush_folder",
    "is_clutter",
    "is_same",
    "is_within",
    "join_output",
    "local_path",
    "lock",
    "open_hub",
    "open_source",
    "output_path",
    "sha256_of",
    "spelling",
    "total_traffic",
]
