"""Locations: a folder, a file, a repository on the Hub, a URL of a store, or an open source."""

from __future__ import annotations

import os
import re
from typing import TypeAlias

from ..errors import CheckpointError, HubReadError
from .destination import Destination
from .hub import open_hub
from .hub_errors import why_absent
from .local import LocalSource, local_path, store_url, url_scheme
from .output import OutputFolder
from .source import Source
from .store import StoreFolder, StoreSource

#: The argument of every verb: a folder, one .safetensors file, a Hub id ``[hf://]org/name[@revision]``, or a
#: URL of a folder or file in a store or on a web server, such as ``s3://bucket/folder`` or
#: ``hf://buckets/org/bucket/folder``. Without ``hf://``, a
#: file or folder of that name takes precedence.
Location: TypeAlias = "str | os.PathLike[str]"

#: An argument that is only read may also be an open source, such as tensors in memory. A checkpoint opened
#: from it closes it.
Readable: TypeAlias = "Location | Source"

_HUB_ID = re.compile(
    r"(?P<repo>([A-Za-z0-9_][\w.-]*/)?[A-Za-z0-9_][\w.-]*)(@(?P<revision>\w[\w./-]*))?", re.ASCII
)


def open_source(location: Readable) -> Source:
    """Open the files at ``location``: a folder, one file, a repository on the Hub, a place in a store, or an
    open source.

    Raises:
        CheckpointError: there is nothing at ``location``, or it cannot be read.
    """
    if not isinstance(location, (str, os.PathLike)):
        return location
    text = os.fspath(location)
    if url := store_url(location):
        return StoreSource(url)
    if hub_id := _hub_id(text):
        return open_hub(*hub_id) if text.startswith("hf://") else _open_named(text, *hub_id)
    if not os.path.exists(local_path(location)):
        raise CheckpointError(
            f"There is no file or folder {text}",
            "Nor is that the name of a repository on the Hub, which looks like org/name.",
            "Check the path or the name.",
        )
    return LocalSource(location)


def open_output(location: Location) -> Destination:
    """The folder or the place in a store at ``location``, to be written in a ``with`` block.

    Raises:
        OutputError: nothing can be written there.
        CheckpointError: the URL is none that fsspec knows, or its package is missing.
    """
    url = store_url(location)
    return StoreFolder(url) if url else OutputFolder(location)


def _open_named(location: str, repo_id: str, revision: str | None) -> Source:
    """:func:`open_hub` for what could have been a path, too; an error says that it is neither."""
    try:
        return open_hub(repo_id, revision)
    except HubReadError as error:
        if not (absence := why_absent(error)):
            raise
        raise HubReadError(
            f"There is no file or folder {location}, and {absence}",
            error.why,
            error.fix,
            retryable=error.retryable,
        ) from error.__cause__


def _hub_id(location: str) -> tuple[str, str | None] | None:
    """Repository and revision, if ``location`` is a Hub id and not a path."""
    is_uri = location.startswith("hf://")
    match = _HUB_ID.fullmatch(location.removeprefix("hf://"))
    if is_uri and not match:
        raise CheckpointError(
            f"{location!r} is not a Hub id", "", "Write it like hf://org/name or hf://org/name@revision."
        )
    if not is_uri and url_scheme(location):
        local_path(location)  # says what to write instead
    is_path = not is_uri and (not match or "/" not in match["repo"] or local_path(location).exists())
    return None if is_path or not match else (match["repo"], match["revision"])
