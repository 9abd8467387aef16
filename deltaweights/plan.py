"""What ``apply`` would do: what it downloads, from where, how much disk and memory it takes, and whether the
base is the right one.

The bytes are those of the very spans that apply reads (:meth:`Source.ranges`). So headers of delta and base
are read, and the delta's chunk records: 24 bytes for each mebibyte of the target. No weights are downloaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Literal

from .checkpoint import Shard
from .codec.library import prebuilt
from .delta.opening import open_base, read_manifest, require_whole
from .delta.recipes import ShardRecipe, TensorRecipe
from .delta.target_recipe import TargetRecipe
from .errors import BaseMismatchError
from .license.rules import LicenseReport, describe, text_records
from .manifest import MANIFEST_NAME, Manifest, TargetFile
from .patch import check_base, sample_chunks
from .storage import Location, Readable, Source, Span, local_path, open_source, output_path
from .storage.hub_client import cache_folder
from .storage.local import free_space
from .storage.read_ahead import WINDOW_BYTES
from .storage.source import HEAD_BYTES
from .workers import Workers

#: In bits a second: a home, an office, a data centre.
BANDWIDTHS = (100_000_000, 1_000_000_000, 10_000_000_000)

#: The process itself: 75 MiB measured (docs/benchmarks.md), and a third as much again, since processors and
#: versions of the libraries differ; and what compiling its kernels takes besides, where none are prebuilt.
_PROCESS_BYTES, _COMPILER_BYTES = 100 << 20, 170 << 20

#: What each repository that is read takes beyond its window: connections, TLS, lists of files.
_REMOTE_BYTES = 48 << 20

#: How the base was compared: see :class:`Plan`.
BaseCheck = Literal["published", "sampled", "headers"]


@dataclass(frozen=True, slots=True)
class PlannedReads:
    """The delta or the base in a :class:`Plan`.

    Attributes:
        where: the folder or file; or repository and commit, where it is on the Hub.
        repo_id: the repository on the Hub; None for a folder that does not say from which it is.
        revision: its commit.
        needed: bytes that the result is made from, once for each tensor that is made from them.
        download: bytes that come over the network: what is on disk or in the Hub cache does not; headers and
            what has to be compared first does.
    """

    where: str
    repo_id: str | None
    revision: str | None
    needed: int
    download: int


@dataclass(frozen=True, slots=True)
class Space:
    """Disk for the ``result``, or for the ``cache`` where the base is kept: bytes that are needed, and free
    (None where it is not said where the result goes)."""

    use: Literal["result", "cache"]
    folder: str | None
    needed: int
    free: int | None

    @property
    def is_enough(self) -> bool:
        """Whether it fits, as far as is known."""
        return self.free is None or self.needed <= self.free


@dataclass(frozen=True, slots=True)
class Transfer:
    """How many seconds the download alone takes at so many bits a second."""

    bandwidth: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What :func:`apply_delta` would do.

    Attributes:
        delta: where it is, what of it is needed and downloaded.
        base: likewise; None where the delta needs none.
        base_check: how the base was compared. ``published``: the Hub publishes the SHA-256 of all its shards
            that are needed, and they are the manifest's. ``sampled``: it is here, and a sample of its
            chunks is right. ``headers``: names, dtypes and shapes are right; apply is to compare a sample of
            chunks first. None where there is no base, or the wrong one.
        mismatch: why the base is not the right one, in lines; None where it is. Apply would refuse it, so
            nothing counts as needed or downloaded then.
        memory: about the most bytes of memory that the process takes.
        disk: where space is needed, and how much.
        transfers: how long the download takes at each bandwidth that was asked for.
        license: both sides' licenses; ``to_accept`` lists those that apply wants to be accepted.
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
        """Bytes that come over the network, all together."""
        return self.delta.download + (self.base.download if self.base else 0)

    def to_dict(self) -> dict[str, object]:
        """The same, ready for JSON."""
        return {**asdict(self), "license": self.license.to_dict()}


def plan_apply(
    delta: Readable,
    *,
    base: Readable | None = None,
    keep_base: bool = False,
    out: Location | None = None,
    bandwidth: Sequence[float] = BANDWIDTHS,
    threads: int | None = None,
) -> Plan:
    """Find out what :func:`apply_delta` would do with the same arguments, and write nothing.

    Of what is on the Hub, headers are read, chunk records and the manifest; no weights.

    Args:
        delta: a folder, a Hub id or an open source.
        base: a folder, a file or a Hub id; if None, the repository that the manifest names, at its commit.
        keep_base: as for :func:`apply_delta`.
        out: the folder that would be written; files of the target that stand there with the right size count
            as done (apply compares their SHA-256).
        bandwidth: bits a second for which to say how long the download takes.
        threads: as for :func:`apply_delta`.

    Raises:
        CheckpointError: the base or the delta cannot be found or read.
        DeltaError: the delta is incomplete or damaged.
    """
    if out is not None:
        output_path(out)
    with ExitStack() as stack:
        source = stack.enter_context(open_source(delta))
        manifest = read_manifest(source)
        require_whole(source, manifest)
        opened = open_base(manifest, base)
        if opened:
            stack.enter_context(opened)
        missing = _missing(manifest, out)
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
            license=describe(manifest),
        )


class _Reads:
    """What apply reads of one source, counted as it reads: what it needs, and what comes over the network.
    Headers and small files are kept in memory once read."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._needed = self._download = 0
        self._in_memory: set[str] = set()
        self._tables: set[TensorRecipe] = set()
        self._is_here = not source.is_remote

    def sum(self) -> PlannedReads:
        """All that was counted."""
        id, where = self.source.hub_id, self.source.where
        if self.source.is_remote:
            where = f"{id.repo_id}@{id.revision}"
        return PlannedReads(where, id.repo_id, id.revision, self._needed, self._download)

    def head(self, shard: Shard) -> None:
        """The header of a shard, if it was not read before."""
        if shard.path not in self._in_memory and self._is_far(shard.path):
            self._download += max(min(HEAD_BYTES, shard.file.size), shard.header.data_start)
        self._in_memory.add(shard.path)

    def spans(self, spans: Iterable[Span], *, is_check: bool = False) -> None:
        """Parts of shards whose headers have been read. ``is_check``: they are compared, and read again when
        they are needed."""
        spans = list(spans)
        self._needed += 0 if is_check else _length(spans)
        self._download += 0 if self._is_here else _length(self.source.ranges(spans))

    def tables(self, recipes: Iterable[TensorRecipe]) -> None:
        """The chunk records of tensors, but for those that were read before."""
        new = [recipe for recipe in recipes if recipe not in self._tables]
        self._tables.update(new)
        self.spans(recipe.table_span for recipe in new)

    def whole(self, path: str, *, is_check: bool = False) -> None:
        """All of a file."""
        size = self.source.sizes[path]
        self._needed += 0 if is_check else size
        if path not in self._in_memory and self._is_far(path):
            self._download += size
        if size <= HEAD_BYTES:
            self._in_memory.add(path)

    def keep(self, paths: Iterable[str]) -> int:
        """These files come into the cache, and all is read from there from now on. Returns their bytes that
        are not there yet."""
        nbytes = sum(self.source.sizes[path] for path in paths if self._is_far(path))
        self._download += nbytes
        self._is_here = True
        return nbytes

    def _is_far(self, path: str) -> bool:
        return not self._is_here and self.source.full_path(path) is None


def _length(spans: Iterable[Span]) -> int:
    return sum(span.end - span.start for span in spans)


def _missing(manifest: Manifest, out: Location | None) -> list[TargetFile]:
    """The target's files that do not stand in the folder ``out`` with their size."""
    if out is None:
        return list(manifest.target.files)
    root = local_path(out)

    def is_there(file: TargetFile) -> bool:
        path = root / file.path
        return path.is_file() and path.stat().st_size == file.size

    return [file for file in manifest.target.files if not is_there(file)]


def _check(target: TargetRecipe, workers: Workers) -> BaseCheck | None:
    """Compare the base, as far as that takes no weights from a network.

    Raises:
        BaseMismatchError: it is not the right one.
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
    """Count all that apply reads, in its order. Returns how many bytes the cache takes, to be kept there."""
    delta.whole(MANIFEST_NAME)
    for record in text_records(target.manifest):
        if target.source.published_sha256(record.path) is None:
            delta.whole(record.path, is_check=True)
        delta.whole(record.path)
    kept = 0
    if target.base and base:
        _count_base_checks(target, delta, base)
        kept = base.keep(target.base_files()) if keep else 0
    for file in missing:
        if file.stored == "tensors":
            _count_shard(target.shard(file.path), delta, base)
        else:
            side = base if file.stored == "base" else delta
            assert side
            side.whole(file.source)
    return kept


def _count_base_checks(target: TargetRecipe, delta: _Reads, base: _Reads) -> None:
    """What is read to see whether the base is the right one."""
    assert target.base
    for shard in target.base.shards.values():
        base.head(shard)
    proven = target.check_published()
    recipes = target.with_base(proven)
    for recipe in recipes:
        delta.head(recipe.delta_shard)
    delta.tables(recipes)
    target.read_tables(recipes)
    base.spans((recipe.base_span(index) for recipe, index in sample_chunks(recipes)), is_check=True)
    for file in target.manifest.target.files:
        if file.stored == "base" and file.source not in proven:
            base.whole(file.source, is_check=True)


def _count_shard(shard: ShardRecipe, delta: _Reads, base: _Reads | None) -> None:
    """What rebuilding one shard of the target takes."""
    delta.head(shard.delta_shard)
    for recipe in shard.tensors.values():
        delta.head(recipe.delta_shard)  # another one's, for duplicates of its tensors
    delta.tables(shard.tensors.values())
    shard.target.read_tables(shard.tensors.values())
    delta.spans(recipe.data_span(index) for recipe, index in shard.chunks())
    if base:
        base.spans(recipe.base_span(index) for recipe, index in shard.chunks() if recipe.needs_base(index))


def _memory(manifest: Manifest, sources: Iterable[Source], workers: Workers) -> int:
    """About the most that the process takes: itself, chunks, the parsed manifest, and what runs ahead."""
    remote = sum(source.is_remote for source in sources)
    chunks = 8 * workers.threads * max(workers.batch_bytes, manifest.chunk_bytes)
    process = _PROCESS_BYTES + (0 if prebuilt() else _COMPILER_BYTES)
    return process + chunks + 8 * len(manifest.to_json()) + remote * (WINDOW_BYTES + _REMOTE_BYTES)


def _spaces(nbytes: int, out: Location | None, kept: int) -> Iterator[Space]:
    if out is None:
        yield Space("result", None, nbytes, None)
    else:
        yield Space("result", str(local_path(out)), nbytes, free_space(local_path(out)))
    if kept:
        cache = cache_folder()
        yield Space("cache", str(cache), kept, free_space(cache))
