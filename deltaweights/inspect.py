"""What ``inspect`` tells of a delta, as plain data."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from contextlib import closing
from typing import Any

import msgspec

from . import codec
from .delta.opening import read_manifest
from .errors import DeltaError
from .license import rules
from .manifest import STATUSES, Manifest, TensorEntry
from .storage import Location, open_source


def inspect_delta(delta: Location) -> dict[str, Any]:
    """Summarise a delta from its manifest alone, ready for JSON.

    Returns:
        ``base`` and ``target`` (repo_id, revision, files), ``license`` (what :func:`rules.describe` tells),
        ``size`` (target_bytes, delta_bytes, ratio), ``counts`` (tensors by status), ``tensors`` (one object
        each, with ``changed_fraction`` of the elements that have a base; None where none has),
        ``format_version`` and ``tool``.

    Raises:
        ManifestError: there is no manifest, or it is damaged.
    """
    return summarise(load_manifest(delta))


def load_manifest(delta: Location) -> Manifest:
    """The manifest of the delta at ``delta``; raises as :func:`inspect_delta` does."""
    with closing(open_source(delta)) as source:
        return read_manifest(source)


def inspect_license(delta: Location, *, texts: bool = False) -> dict[str, Any]:
    """What :func:`rules.describe` tells, and ``texts``: path, size and sha256 of each license text.

    Args:
        texts: also read them; each then has its ``text``.

    Raises:
        ManifestError: there is no manifest, or it is damaged.
        DeltaError: a text is not the one in the manifest.
    """
    with closing(open_source(delta)) as source:
        manifest = read_manifest(source)
        records = []
        for record in rules.text_records(manifest):
            fields = msgspec.to_builtins(record)
            if texts:
                content = b"".join(source.blocks(record.path))
                if hashlib.sha256(content).hexdigest() != record.sha256:
                    raise DeltaError(
                        f"{record.path} in the delta is damaged",
                        "Its SHA-256 is not the manifest's.",
                        "Get the delta again.",
                    )
                fields["text"] = content.decode("utf-8", "replace")
            records.append(fields)
    return rules.describe(manifest) | {"texts": records}


def summarise(manifest: Manifest) -> dict[str, Any]:
    """:func:`inspect_delta` for a manifest in memory."""
    fields = msgspec.to_builtins(manifest)
    for side in ("base", "target"):
        del fields[side]["license"]
    counts = Counter(entry.status for entry in manifest.tensors)
    delta_bytes = manifest.delta_bytes
    return {
        "base": fields["base"],
        "target": fields["target"],
        "license": rules.describe(manifest),
        "size": {
            "target_bytes": manifest.target_bytes,
            "delta_bytes": delta_bytes,
            "ratio": delta_bytes / max(1, manifest.target_bytes),
        },
        "counts": {status: counts[status] for status in STATUSES if counts[status]},
        "tensors": [
            entry | {"changed_fraction": _changed_fraction(record)}
            for entry, record in zip(fields["tensors"], manifest.tensors, strict=True)
        ],
        "format_version": manifest.format_version,
        "tool": fields["tool"],
    }


def _changed_fraction(entry: TensorEntry) -> float | None:
    elements = entry.shared_bytes // codec.element_bytes(entry.dtype, entry.shared_bytes)
    return entry.changed / elements if elements else None


def display_name(record: dict[str, Any], fallback: str) -> str:
    """A base or target for people: its Hub id and the start of its commit."""
    name = record["repo_id"] or fallback
    return f"{name}@{record['revision'][:12]}" if record["revision"] else os.fspath(name)
