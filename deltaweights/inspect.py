"""What a delta says of itself: its summary, and its licenses."""

from __future__ import annotations

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import msgspec

from .adapters import MergedAdapter, merged_adapter
from .changes.grid import shared_elements
from .delta.opening import license_texts, read_manifest
from .entries import STATUSES, Status, TensorEntry
from .errors import DeltaError
from .license import rules
from .license.rules import LicenseReport, LicenseText
from .manifest import BaseRecord, FileRecord, Manifest, TargetRecord, Tool
from .storage import Readable, Source, open_source

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DeltaSize:
    """How big a delta is: bytes of its target, its own bytes (without the model card), and their ratio."""

    target_bytes: int
    delta_bytes: int
    ratio: float


@dataclass(frozen=True, slots=True)
class TensorSummary(TensorEntry):
    """A tensor's entry in the manifest, and what part of its elements changed: of those that have a base,
    0 to 1; None where none has."""

    changed_fraction: float | None = None


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of the target that the delta holds whole, compressed or not: its path, what kind of file its
    name says it is, and how many bytes it has in the delta."""

    path: str
    kind: str
    stored_bytes: int


#: Kinds of files that training leaves beside a model, by their names.
_KINDS = (
    (re.compile(r".*(optim|scheduler|zero_pp|global_step|scaler)"), "training state"),
    (re.compile(r".*(rng_state|training_args|trainer_state)"), "training state"),
    (
        re.compile(r".*\.(bin|pt|pth|ckpt|h5|msgpack|pkl|pickle|onnx|gguf|npz|npy|tflite|ot)$"),
        "other weights",
    ),
    (re.compile(r".*(tokenizer|vocab|merges|spiece|sentencepiece|\.model$|\.tiktoken$)"), "tokenizer"),
    (re.compile(r".*(tfevents|\.log$|wandb|runs/|logs/)"), "logs"),
    (re.compile(r".*\.(png|jpe?g|gif|mp4|wav|pdf|ipynb)$"), "media and notebooks"),
)


@dataclass(frozen=True, slots=True)
class DeltaSummary:
    """What :func:`inspect_delta` tells.

    Attributes:
        base, target: Hub ids and commits, where they are known, and files.
        license: both sides' licenses, and what follows for the delta.
        size: of target and delta, in bytes.
        counts: how many tensors have each status; those that none has are absent.
        tensors: every tensor of the target, and those that only the base has.
        adapter: the adapter that was merged, if what changed looks like one.
        stored_whole: the target's files that the delta holds whole, the largest first.
        format_version: of the delta's format.
        tool: the program that wrote the delta.
    """

    base: BaseRecord
    target: TargetRecord
    license: LicenseReport
    size: DeltaSize
    counts: dict[Status, int]
    tensors: tuple[TensorSummary, ...]
    adapter: MergedAdapter | None
    stored_whole: tuple[StoredFile, ...]
    format_version: int
    tool: Tool

    def to_dict(self) -> dict[str, object]:
        """The same, ready for JSON: licenses stand in ``license`` only, ``like`` and ``prediction`` where
        there is one."""
        found = msgspec.to_builtins(self)
        del found["stored_whole"]  # which the files of the target tell
        for side in ("base", "target"):
            del found[side]["license"]
        for tensor in found["tensors"]:
            for field in ("like", "prediction"):
                if tensor[field] is None:
                    del tensor[field]
            if "prediction" in tensor:
                tensor["residual_bytes"] = tensor["payload_bytes"] - tensor["prediction"]["nbytes"]
        return {**found, "license": self.license.to_dict()}


def inspect_delta(delta: Readable) -> DeltaSummary:
    """Summarize a delta from its manifest and its license texts.

    Args:
        delta: a folder or a Hub id.

    Raises:
        CheckpointError: there is nothing at ``delta``, or it cannot be read.
        ManifestError: there is no manifest, or it is damaged.
    """
    with open_source(delta) as source:
        manifest = read_manifest(source)
        return summarize(manifest, license_texts(source, manifest))


def load_manifest(delta: Readable) -> Manifest:
    """The manifest of the delta at ``delta``; raises as :func:`inspect_delta` does."""
    with open_source(delta) as source:
        _log.info("reading the manifest of %s", source.where)
        return read_manifest(source)


def license_of(delta: Readable, *, texts: bool = False) -> LicenseReport:
    """The licenses of base and target, what they ask, and what does not fit together.

    Args:
        delta: a folder or a Hub id.
        texts: also read the license texts and notices; each of ``texts`` then has its ``text``.

    Raises:
        CheckpointError: there is nothing at ``delta``, or it cannot be read.
        ManifestError: there is no manifest, or it is damaged.
        DeltaError: a text is not the one in the manifest.
    """
    with open_source(delta) as source:
        _log.info("reading the licenses of %s", source.where)
        manifest = read_manifest(source)
        found = (
            LicenseText(record.path, record.size, record.sha256, _text(source, record) if texts else None)
            for record in rules.text_records(manifest)
        )
        facts = rules.describe(manifest, license_texts(source, manifest))
        return replace(facts, texts=tuple(found))


def _text(source: Source, record: FileRecord) -> str:
    content = b"".join(source.blocks(record.path))
    if hashlib.sha256(content).hexdigest() != record.sha256:
        raise DeltaError(
            f"{record.path} in the delta is damaged",
            "Its SHA-256 is not the manifest's.",
            "Get the delta again.",
        )
    return content.decode("utf-8", "replace")


def summarize(manifest: Manifest, texts: Mapping[str, bytes] | None = None) -> DeltaSummary:
    """:func:`inspect_delta` for a manifest in memory, and the license texts by path."""
    counts = Counter(entry.status for entry in manifest.tensors)
    target_bytes, delta_bytes = manifest.target_bytes, manifest.delta_bytes
    return DeltaSummary(
        base=manifest.base,
        target=manifest.target,
        license=rules.describe(manifest, texts),
        size=DeltaSize(target_bytes, delta_bytes, delta_bytes / max(1, target_bytes)),
        counts={status: counts[status] for status in STATUSES if counts[status]},
        tensors=tuple(map(_summary_of, manifest.tensors)),
        adapter=merged_adapter(manifest.tensors),
        stored_whole=_stored_whole(manifest),
        format_version=manifest.format_version,
        tool=manifest.tool,
    )


def _stored_whole(manifest: Manifest) -> tuple[StoredFile, ...]:
    sizes = {file.path: file.size for file in manifest.files}
    found = (
        StoredFile(file.path, _kind(file.path), sizes[file.source])
        for file in manifest.target.files
        if file.stored in ("verbatim", "zstd")
    )
    return tuple(sorted(found, key=lambda file: (-file.stored_bytes, file.path)))


def _kind(path: str) -> str:
    return next((kind for pattern, kind in _KINDS if pattern.match(path.lower())), "other files")


def _summary_of(entry: TensorEntry) -> TensorSummary:
    elements = shared_elements(entry)
    own = {field.name: getattr(entry, field.name) for field in fields(entry)}
    return TensorSummary(**own, changed_fraction=entry.changed / elements if elements else None)
