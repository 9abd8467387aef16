"""The Hub's storage buckets, as far as they are read: what they hold, lists in pages, and files by ranges.

Writes would go to Xet storage, which this Hub does not have.
"""

from __future__ import annotations

from typing import Any

from .hub_protocol import Call, Refused, Reply, route, to_json
from .hub_repos import Blob


def _bucket(call: Call) -> dict[str, Blob]:
    bucket = call.hub.buckets.get(call.parts["repo"])
    if bucket is None:
        raise Refused(404, "Bucket not found", "RepoNotFound")
    return bucket


@route("GET", "/api/buckets/{repo}")
def bucket_info(call: Call) -> Reply:
    sizes = [blob.content.size for blob in _bucket(call).values()]
    return to_json(
        {
            "id": call.parts["repo"],
            "private": False,
            "createdAt": "2026-01-01T00:00:00.000Z",
            "size": sum(sizes),
            "totalFiles": len(sizes),
        }
    )


@route("GET", "/api/buckets/{repo}/tree", "/api/buckets/{repo}/tree/{path}")
def bucket_tree(call: Call) -> Reply:
    """The files below a folder, or the file of that name; without ``recursive``, folders in it too."""
    bucket, prefix = _bucket(call), call.parts.get("path", "").strip("/")
    start = f"{prefix}/" if prefix else ""
    items: dict[str, dict[str, Any]] = {}
    for path, blob in sorted(bucket.items()):
        if path != prefix and not path.startswith(start):
            continue
        inner = path[len(start) :] if path != prefix else ""
        if "/" in inner and not call.flag("recursive"):
            folder = start + inner.partition("/")[0]
            items[folder] = {"type": "directory", "path": folder}
        else:
            items[path] = {
                "type": "file",
                "path": path,
                "size": blob.content.size,
                "xetHash": blob.content.sha256,
                "uploadedAt": "2026-01-01T00:00:00.000Z",
            }
    return call.page(list(items.values()))


@route("GET", "/buckets/{repo}/resolve/{path}", kind="content")
def bucket_file(call: Call) -> Reply:
    blob = _bucket(call).get(call.parts["path"])
    if blob is None:
        raise Refused(404, "Entry not found", "EntryNotFound")
    return Reply(200, {"ETag": f'"{blob.content.sha256}"'}, blob)
