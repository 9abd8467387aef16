"""Tells before ``apply`` runs what it will download, how much disk and memory it will take, and whether the
base is the right one.

Bytes are counted over the same spans that apply reads (:meth:`Source.ranges`). This takes the headers of
delta and base and the delta's chunk records, 24 bytes for each mebibyte of the target. No weights are
downloaded.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Literal

from .checkpoint import Shard
from .codec.library import prebuilt
from .delta.opening import license_texts, open_base, read_manifest, require_whole
from .delta.recipes import ShardRecipe, TensorRecipe
from .delta.target_recipe import TargetRecipe
from .errors import BaseMismatchError
from .license.rules import LicenseReport, describe, text_records
from .manifest import MANIFEST_NAME, Manifest, TargetFile
from .patch import check_base, require_keepable, sample_chunks
from .signing import SignatureRequirement, require_signed
from .storage import Location, Readable, Source, Span, open_output, open_source
from .storage.hub_client import cache_folder
from .storage.local import free_space
from .storage.read_ahead import WINDOW_BYTES
from .storage.source import HEAD_BYTES
from .workers import Workers

_log = logging.getLogger(__name__)

#: In bits per second: a home, an office, a data center.
BANDWIDTHS = (100_000_000, 1_000_000_000, 10_000_000_000)

#: The process itself: 75 MiB measured (docs/benchmarks.md), plus a third, since processors and library
#: versions differ. Compiling kernels takes more, where none are prebuilt.
_PROCESS_BYTES, _COMPILER_BYTES = 100 << 20, 170 << 20

#: Memory for each repository beyond its window: connections, TLS, lists of files.
_REMOTE_BYTES = 48 << 20

#: How the base was checked: see :class:`Plan`.
BaseCheck = Literal["published", "sampled", "headers"]


@dataclass(frozen=True, slots=True)
class PlannedReads:
    """The delta or the base in a :class:`Plan`.

    Attributes:
        where: the folder or file; on the Hub, the repository and commit.
        repo_id: the repository on the Hub; None for a folder of unknown origin.
        revision: its commit.
        needed: bytes that the target is made from, counted once for each tensor that uses them.
        download: bytes that come over the network, including headers and the bytes compared in advance, but
            not files on disk or in the Hub cache.
    """

    where: str
    repo_id: str | None
    revision: str | None
    needed: int
    download: int


@dataclass(frozen=True, slots=True)
class Space:
    """Disk space for the ``result``, or for the ``cache`` that keeps the base: bytes needed and bytes free
    (None if no output folder is given)."""

    use: Literal["result", "cache"]
    folder: str | None
    needed: int
    free: int | None

    @property
    def is_enough(self) -> bool:
        """Whether it fits; True if the free space is unknown."""
        return self.free is None or self.needed <= self.free


@dataclass(frozen=True, slots=True)
class Transfer:
    """The ``seconds`` that the download alone takes at a ``bandwidth`` in bits per second."""

    bandwidth: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Plan:
    """The work that :func:`apply_delta` would do.

    Attributes:
        delta: its place, and its bytes needed and downloaded.
        base: likewise; None if the delta needs none.
        base_check: how the base was checked. ``published``: the Hub publishes the SHA-256 of all needed
            shards, and they equal the manifest's. ``sampled``: the base is local, and a sample of its chunks
            is right. ``headers``: names, dtypes and shapes are right; apply will compare a sample of chunks
            first. None if there is no base, or it is the wrong one.
        mismatch: why the base is the wrong one, in lines; None if it is the right one. Apply would refuse a
            wrong base, so nothing counts as needed or downloaded then.
        memory: approximate peak memory of the process, in bytes.
        disk: the space needed, for each place.
        transfers: the duration of the download at each bandwidth given.
        license: both sides' licenses; ``to_accept`` lists those that the user must accept before apply.
    """

    delta: PlannedReads
    base: PlannedReads | None
    base_check: BaseCheck | None
    mismatch: str | None
    memory: int
    disk: tuple[Space, ...]
    transfers: tuple[Transfer, ...]
    license: LicenseReport

    @property
    def download(self) -> int:
        """Bytes that come over the network in total."""
        return self.delta.download + (self.base.download if self.base else 0)

    def to_dict(self) -> dict[str, object]:
        """The plan as a dictionary, ready for JSON."""
        return {**asdict(self), "license": self.license.to_dict()}


def plan_apply(
    delta: Readable,
    *,
    base: Readable | None = None,
    keep_base: bool = False,
    out: Location | None = None,
    bandwidth: Sequence[float] = BANDWIDTHS,
    require_signature: SignatureRequirement | None = None,
    threads: int | None = None,
) -> Plan:
    """Plan what :func:`apply_delta` would do with the same arguments. Writes nothing.

    On the Hub, only headers, chunk records and the manifest are read, no weights.

    Args:
        delta: a folder, a Hub id, a URL or an open source.
        base: a folder, a file, a Hub id or a URL; if None, the repository that the manifest names, at its
            commit.
        keep_base: as for :func:`apply_delta`.
        out: the output folder. The target's files that it already holds, with the right size, count as done
            (apply compares their SHA-256).
        bandwidth: bits per second for which to estimate the download time.
        require_signature: who must have signed the delta, as for :func:`apply_delta`.
        threads: as for :func:`apply_delta`.

    Raises:
        CheckpointError: the base or the delta cannot be found or read.
        SignatureError: the delta is not signed as required.
        DeltaError: the delta is incomplete or damaged.
    """
    if out is not None:
        open_output(out)
    with ExitStack() as stack:
        source = stack.enter_context(open_source(delta))
        manifest = read_manifest(source)
        require_whole(source, manifest)
        if require_signature is not None:
            require_signed(source, manifest, require_signature)
        opened = open_base(manifest, base)
        if opened:
            stack.enter_context(opened)
        missing = _missing(manifest, out)
        base_at = opened.source.where if opened else "no base"
        _log.info("planning to apply %s to %s: %d files to rebuild", source.where, base_at, len(missing))
        reads = _Reads(source), _Reads(opened.source) if opened else None
        workers = stack.enter_context(Workers(threads))
        check, mismatch, kept = None, None, 0
        try:
            target = TargetRecipe(source, manifest, opened)
            workers.at_stop(target.cancel)
            check = _check(target, workers)
            kept = _count(target, missing, *reads, keep_base)
        except BaseMismatchError as error:
            mismatch = str(error)
        sides = [side.sum() for side in reads if side]
        nbytes = sum(side.download for side in sides)
        return Plan(
            delta=sides[0],
            base=sides[1] if opened else None,
            base_check=check,
            mismatch=mismatch,
            memory=_memory(manifest, [side.source for side in reads if side], workers),
            disk=tuple(_spaces(sum(file.size for file in missing), out, kept)),
            transfers=tuple(Transfer(bits, 8 * nbytes / bits) for bits in bandwidth),
            license=describe(manifest, license_texts(source, manifest)),
        )


class _Reads:
    """Counts the bytes that apply needs from one source, and those that come over the network. Headers and
    small files stay in memory once read."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._needed = self._download = 0
        self._in_memory: set[str] = set()
        self._tables: set[TensorRecipe] = set()
        self._is_here = not source.is_remote

    def sum(self) -> PlannedReads:
        """The totals so far."""
        id, where = self.source.hub_id, self.source.where
        if self.source.is_remote and id.repo_id:
            where = f"{id.repo_id}@{id.revision}"
        return PlannedReads(where, id.repo_id, id.revision, self._needed, self._download)

    def head(self, shard: Shard) -> None:
        """Count a shard's header, if it was not read before."""
        if shard.path not in self._in_memory and self._is_far(shard.path):
            self._download += max(min(HEAD_BYTES, shard.file.size), shard.header.data_start)
        self._in_memory.add(shard.path)

    def spans(self, spans: Iterable[Span], *, is_check: bool = False) -> None:
        """Count parts of shards whose headers have been read. ``is_check``: they are only compared now, and
        read again when needed."""
        spans = list(spans)
        self._needed += 0 if is_check else _length(spans)
        self._download += 0 if self._is_here else _length(self.source.ranges(spans))

    def tables(self, recipes: Iterable[TensorRecipe]) -> None:
        """Count the chunk records of tensors."""
        new = list(recipes)
        self._tables.update(new)
        self.spans(recipe.table_span for recipe in new)

    def payloads(self, recipes: Iterable[TensorRecipe]) -> None:
        """Count the payloads of tensors, without the chunk records that were read before."""
        self.spans(span for recipe in recipes for span in recipe.spans(with_table=recipe not in self._tables))

    def whole(self, path: str, *, is_check: bool = False) -> None:
        """Count a whole file."""
        size = self.source.sizes[path]
        self._needed += 0 if is_check else size
        if path not in self._in_memory and self._is_far(path):
            self._download += size
        if size <= HEAD_BYTES:
            self._in_memory.add(path)

    def keep(self, paths: Iterable[str]) -> int:
        """Count these files as downloaded into the cache, from which everything is read from now on. Returns
        the bytes that are not there yet."""
        nbytes = sum(self.source.sizes[path] for path in paths if self._is_far(path))
        self._download += nbytes
        self._is_here = True
        return nbytes

    def _is_far(self, path: str) -> bool:
        return not self._is_here and self.source.full_path(path) is None


def _length(spans: Iterable[Span]) -> int:
    return sum(span.end - span.start for span in spans)


def _missing(manifest: Manifest, out: Location | None) -> list[TargetFile]:
    """The target's files that the folder ``out`` lacks or holds with a different size."""
    if out is None:
        return list(manifest.target.files)
    there = open_output(out).sizes(file.path for file in manifest.target.files)
    return [file for file in manifest.target.files if there.get(file.path) != file.size]


def _check(target: TargetRecipe, workers: Workers) -> BaseCheck | None:
    """Check the base, as far as that takes no weights from a network.

    Raises:
        BaseMismatchError: it is the wrong one.
    """
    if target.base is None:
        return None
    if not target.base.source.is_remote:
        check_base(target, workers)
        return "sampled"
    for file in target.manifest.target.files:
        if file.stored == "base":
            target.base_source(file)
    shards = set(target.base.shards).intersection(target.base_files())
    return "published" if shards <= target.check_published() else "headers"


def _count(
    target: TargetRecipe, missing: Iterable[TargetFile], delta: _Reads, base: _Reads | None, keep: bool
) -> int:
    """Count everything that apply reads, in the same order. Returns the bytes to keep in the cache."""
    delta.whole(MANIFEST_NAME)
    for record in text_records(target.manifest):
        if target.source.published_sha256(record.path) is None:
            delta.whole(record.path, is_check=True)
        delta.whole(record.path)
    kept = 0
    if target.base and base:
        _count_base_checks(target, delta, base)
        if keep:
            require_keepable(target.base.source)
            kept = base.keep(target.base_files())
    for file in missing:
        if file.stored == "tensors":
            _count_shard(target.shard(file.path), delta, base)
        else:
            side = base if file.stored == "base" else delta
            assert side
            side.whole(file.source)
    return kept


def _count_base_checks(target: TargetRecipe, delta: _Reads, base: _Reads) -> None:
    """Count the reads that check the base."""
    assert target.base
    for shard in target.base.shards.values():
        base.head(shard)
    proven = target.check_published()
    recipes = target.with_base(proven)
    for recipe in recipes:
        delta.head(recipe.delta_shard)
    sample = sample_chunks(target, recipes)
    delta.tables(recipe for recipe in recipes if recipe.is_read)
    base.spans((span for recipe, index in sample for span in recipe.base_spans(index)), is_check=True)
    for file in target.manifest.target.files:
        if file.stored == "base" and file.source not in proven:
            base.whole(file.source, is_check=True)


def _count_shard(shard: ShardRecipe, delta: _Reads, base: _Reads | None) -> None:
    """Count the reads that rebuild one shard of the target."""
    delta.head(shard.delta_shard)
    for recipe in shard.tensors.values():
        delta.head(recipe.delta_shard)  # a different shard, for duplicates of its tensors
    delta.payloads(shard.tensors.values())
    shard.target.read_tables(shard.tensors.values())
    if base:
        needed = (recipe.base_spans(index) for recipe, index in shard.chunks() if recipe.needs_base(index))
        base.spans(span for spans in needed for span in spans)


def _memory(manifest: Manifest, sources: Iterable[Source], workers: Workers) -> int:
    """Approximate peak memory in bytes: the process itself, chunks, the parsed manifest, and read-ahead."""
    remote = sum(source.is_remote for source in sources)
    chunks = 8 * workers.threads * max(workers.batch_bytes, manifest.chunk_bytes)
    process = _PROCESS_BYTES + (0 if prebuilt() else _COMPILER_BYTES)
    return process + chunks + 8 * len(manifest.to_json()) + remote * (WINDOW_BYTES + _REMOTE_BYTES)


def _spaces(nbytes: int, out: Location | None, kept: int) -> Iterator[Space]:
    if out is None:
        yield Space("result", None, nbytes, None)
    else:
        folder = open_output(out)
        yield Space("result", folder.where, nbytes, folder.free_bytes())
    if kept:
        cache = cache_folder()
        yield Space("cache", str(cache), kept, free_space(cache))
