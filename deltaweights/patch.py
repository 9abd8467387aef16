"""Delta and base to target, in streaming shards: the mirror image of diff.py.

Data flows delta → codec → checkpoint. A shard is rebuilt chunk by chunk under a temporary name. It gets its
own name once its SHA-256 equals the manifest's.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from .delta.chain import Deltas, links, open_recipe
from .delta.pinned import PinnedTarget
from .delta.recipes import ShardRecipe, TensorRecipe
from .delta.target_recipe import TargetRecipe, check_digest
from .errors import CheckpointError, DeltaError, ExecutorError, OutputError
from .executors import Executor, kept, workers_of
from .license.rules import landing_place, text_records
from .manifest import FileRecord, Manifest, TargetFile
from .metrics import timed_operation, timed_stage
from .signing import SignatureRequirement
from .storage import (
    Destination,
    Location,
    Readable,
    SharedOutput,
    Source,
    join_output,
    open_output,
    sha256_of,
    store_url,
)
from .words import counted
from .workers import Buffers, Lane, Meter, ProgressCallback, Workers, batches

_log = logging.getLogger(__name__)

#: Before anything is written, at least _SAMPLED_CHUNKS chunks of the base are compared with the delta, and at
#: least one of every tensor. A sampled chunk has at least 1/_ENOUGH of the full length.
_SAMPLED_CHUNKS, _ENOUGH = 128, 16

#: Over a network, where each sampled chunk is fetched once more when it is decoded: at most this share of the
#: base's chunks, but no fewer than so many.
_REMOTE_SHARE, _LEAST_CHUNKS = 1 / 50, 16

#: Where a chunk's bytes go: its offset in the shard, the bytes.
Sink = Callable[[int, memoryview], None]


@dataclass(frozen=True, slots=True)
class ApplyReport:
    """The result of :func:`apply_delta`: files rebuilt now, and intact files kept from an earlier run."""

    out: str
    rebuilt: tuple[str, ...]
    kept: tuple[str, ...]
    nbytes: int


@timed_operation("apply")
def apply_delta(
    delta: Deltas,
    out: Location,
    *,
    base: Readable | None = None,
    keep_base: bool = False,
    force: bool = False,
    require_signature: SignatureRequirement | None = None,
    threads: int | None = None,
    executor: Executor | None = None,
    progress: ProgressCallback | None = None,
) -> ApplyReport:
    """Rebuild the target in the folder ``out``, byte for byte.

    After an interruption, run it again: it resumes with the missing files.

    Args:
        delta: a folder, a Hub id, a URL or an open source (closed at the end); or several, oldest first, each
            made from the target of the one before. An open source stays at the commit found when it was
            opened, even if the branch moves.
        out: the folder to write, or the URL of a place in a store; new or empty, or an interrupted run's.
        base: a folder, a file, a Hub id or a URL; if None, the repository that the (first) manifest names, at
            its commit.
        keep_base: download the needed files of a base on the Hub into the local Hub cache and keep them
            there. If False, the base streams through memory.
        force: write even if ``out`` holds other files. They stay, unless the target has a file of the same
            name.
        require_signature: who must have signed the delta, or each of several: the path of a public key, a
            :class:`TrustedKey`, :class:`TrustedCertificates` or :class:`TrustedIdentity`, or several of
            these, of which one suffices. None: nobody.
        threads: number of threads; if None, the number of usable cores, at most 8.
        executor: rebuilds the shards elsewhere, one task each, such as a :class:`RayExecutor`. Its machines
            read delta and base, and write to ``out``.
        progress: called with a phase, bytes done and total bytes: "check signed", "check base", "download
            base", "check files there" and "apply".

    Raises:
        CheckpointError: the base or the delta cannot be found, read or downloaded.
        BaseMismatchError: the base is the wrong one. Nothing was written, or no file got its final name.
        SignatureError: the delta is not signed as required. Nothing was written.
        DeltaError: the delta is incomplete or damaged.
        OutputError: ``out`` holds other files, or its disk is too small.
        ExecutorError: the executor's machines cannot be reached, or do not see the same files.
    """
    if executor:
        refuse_keeping(keep_base)
    folder = open_output(out)
    with (
        open_recipe(delta, base, require_signature=require_signature, progress=progress) as target,
        Workers(threads) as workers,
    ):
        workers.at_stop(target.cancel)
        workers.at_stop(folder.cancel)
        check_apart(folder, target)
        origins = ", ".join(link.source.where for link in links(target))
        _log.info("rebuilding %s into %s", origins, folder.where)
        check_licenses(target)
        check_base(target, workers, keep=keep_base, progress=progress)
        with folder:
            paths = [file.path for file in target.manifest.target.files]
            folder.require_distinct([*paths, *(place for _, _, place in license_places(target))])
            folder.require_apart(paths, target.sources)
            kept = _finished(target.manifest, folder, workers, force, progress)
            missing = [file for file in target.manifest.target.files if file.path not in kept]
            nbytes = sum(file.size for file in missing)
            folder.require_space(nbytes)
            meter = Meter(progress, "apply", nbytes)
            _write_all(target, missing, folder, workers, meter, executor)
            write_licenses(target, folder)
        _log.info("rebuilt %d files, %d bytes; %d files were there", len(missing), nbytes, len(kept))
    rebuilt = tuple(file.path for file in missing)
    return ApplyReport(folder.where, rebuilt, tuple(sorted(kept)), nbytes)


def refuse_keeping(keep_base: bool) -> None:
    """Raise :class:`ExecutorError` if the base is to be kept: other machines do not see this one's cache."""
    if keep_base:
        raise ExecutorError(
            "The base cannot be kept for an executor",
            "It would be downloaded to this machine, whose cache the executor's machines do not read.",
            "Leave out keep_base=True, or download the base to a shared folder first.",
        )


def require_keepable(source: Source) -> None:
    """Raise :class:`CheckpointError` if the base lies in a store: the Hub cache has no place for it."""
    if store_url(source.location or ""):
        raise CheckpointError(
            f"{source.where} cannot be kept",
            "The local cache is for repositories on the Hub.",
            "Leave out keep_base=True, or copy the base to a folder first.",
        )


def check_apart(folder: Destination, target: TargetRecipe) -> None:
    """The target must not overwrite the files that it is made from."""
    for source in target.sources:
        if folder.is_inside(source):
            raise OutputError(
                f"The target cannot be written to {folder.where}",
                f"That folder is inside {source.root or source.where}, which the target is made from.",
                "Choose another folder.",
            )


def check_licenses(target: TargetRecipe) -> None:
    """The license texts in the delta must be the ones that were published with it."""
    for link in links(target):
        for record in text_records(link.manifest):
            if link.faults.is_damaged(record.path):
                raise _damaged(record.path)


def _damaged(path: str) -> DeltaError:
    return DeltaError(
        f"{path} in the delta is damaged", "Its SHA-256 is not the manifest's.", "Get the delta again."
    )


@timed_stage("check files there")
def _finished(
    manifest: Manifest,
    folder: Destination,
    workers: Workers,
    force: bool,
    progress: ProgressCallback | None,
) -> set[str]:
    """The target's files that are already in the folder, intact.

    Raises:
        OutputError: without ``force``, the folder holds other files, or files of the right name with
            different content.
    """
    files = {file.path: file for file in manifest.target.files}
    there = [file for file in files.values() if folder.exists(file.path)]
    meter = Meter(progress, "check files there", sum(file.size for file in there)) if there else None

    def is_whole(lane: Lane, file: TargetFile) -> bool:
        return (
            folder.is_regular(file.path)
            and folder.size(file.path) == file.size
            and (sha256_of(lane.watch(folder.blocks(file.path), meter)) == file.sha256)
        )

    whole = workers.each(is_whole, there)
    kept = {file.path for file, ok in zip(there, whole, strict=True) if ok}
    others = folder.foreign(files) + [file.path for file in there if file.path not in kept]
    if others and not force:
        more = f", nor are {len(others) - 1} more" if others[1:] else ""
        raise OutputError(
            f"{folder.where} holds other files",
            f"{others[0]!r} is not the target's{more}.",
            "Choose a new folder, or pass force=True to write there; files of other names stay as they are.",
        )
    return kept


@timed_stage("check base")
def check_base(
    target: TargetRecipe, workers: Workers, *, keep: bool = False, progress: ProgressCallback | None = None
) -> None:
    """Check quickly that the base is the right one: by the SHA-256 that the Hub publishes for its files, or
    else by the delta's checksums of a sample of chunks (:func:`sample_chunks`).

    In a chain, only the first delta's base is checked: the SHA-256 in the manifests identify the others.

    Args:
        keep: if the base is the right one, download its needed files into the local Hub cache.

    Raises:
        BaseMismatchError: a published SHA-256, a chunk, or a file taken from the base differs.
    """
    target = links(target)[0]
    if target.base is None:
        return
    source = target.base.source
    if keep:
        require_keepable(source)
    _log.info("the base is %s: %d shards", source.where, len(target.base.shards))
    proven = target.check_published()
    _log.debug(
        "of the right base by the SHA-256 that the Hub publishes: %s", ", ".join(sorted(proven)) or "none"
    )
    _check_chunks(target, target.with_base(proven), workers, progress)
    for file in target.manifest.target.files:
        if file.stored == "base" and file.source not in proven and _is_other(target, file, workers):
            raise target.faults.wrong_base(f"its file {file.source!r} differs")
    if keep:
        paths = target.base_files()
        meter = Meter(progress, "download base", sum(source.sizes[path] for path in paths))
        for nbytes in source.keep(paths):
            meter.add(nbytes)


def _is_other(target: TargetRecipe, file: TargetFile, workers: Workers) -> bool:
    return sha256_of(workers.watch(target.blocks(file))) != file.sha256


def glance_at_base(target: TargetRecipe, workers: Workers, is_wanted: Callable[[str], bool]) -> None:
    """:func:`check_base` for a process that needs some of the tensors only, and checks each chunk of those as
    it decodes them: reads a chunk of at most _SAMPLED_CHUNKS tensors.

    Args:
        is_wanted: whether the tensor of this name will be decoded.

    Raises:
        BaseMismatchError: a published SHA-256 or a chunk differs.
    """
    target = links(target)[0]
    if target.base is not None:
        recipes = [r for r in target.with_base(target.check_published()) if is_wanted(r.info.name)]
        some = random.Random(0).sample(recipes, min(_SAMPLED_CHUNKS, len(recipes)))  # noqa: S311
        _check_chunks(target, some, workers, None)


def _check_chunks(
    target: TargetRecipe, recipes: list[TensorRecipe], workers: Workers, progress: ProgressCallback | None
) -> None:
    """Compare a sample of the base's chunks, for these recipes, with the delta's checksums."""
    sample = sample_chunks(target, recipes)
    meter = Meter(progress, "check base", sum(map(_nbytes, sample)))
    differ = []
    with target.expect_base(sample):
        results = workers.map(lambda chunk: chunk[0].matches_base(chunk[1]), sample)
        for chunk, matches in zip(sample, results, strict=True):
            meter.add(_nbytes(chunk))
            if not matches:
                differ.append(chunk)
    # Try again: a chunk may arrive damaged over a network.
    if not all(recipe.matches_base(index) for recipe, index in differ):
        wrong = {recipe for recipe, _ in differ}
        for source in sorted({recipe.path for recipe in wrong}):
            if target.faults.is_damaged(source):
                raise _damaged(source)
        names = sorted({recipe.base.name for recipe in wrong if recipe.base})
        count = len({recipe.base.name for recipe, _ in sample if recipe.base})
        verb = "1 differs:" if len(names) == 1 else f"{len(names)} differ, such as"
        raise target.faults.wrong_base(f"of {counted(count, 'tensor')} sampled, {verb} {names[0]!r}")
    tensors = {recipe.info.name for recipe, _ in sample}
    _log.info("the base is the right one, by %d chunks of %d tensors", len(sample), len(tensors))


def _nbytes(chunk: tuple[TensorRecipe, int]) -> int:
    """The bytes of a chunk in the base."""
    start, end = chunk[0].base_bounds(chunk[1], chunk[1] + 1)
    return end - start


def sample_chunks(target: TargetRecipe, recipes: list[TensorRecipe]) -> list[tuple[TensorRecipe, int]]:
    """Chunks of every tensor, chosen at random, the same ones each time. If one is enough, it is the last and
    shortest, unless that is so short that many checkpoints might share it. Of a remote base whose tensors are
    small, some tensors only. Reads the chunk records of the tensors that it looks at."""
    choice = random.Random(0)  # noqa: S311
    if target.base is None or not target.base.source.is_remote:
        target.read_tables(recipes)
        per_tensor = max(1, -(-_SAMPLED_CHUNKS // max(1, len(recipes))))
        return [(recipe, index) for recipe in recipes for index in _sample_of(recipe, per_tensor, choice)]
    most = max(_LEAST_CHUNKS, int(sum(recipe.plan.shared_count for recipe in recipes) * _REMOTE_SHARE))
    per_tensor = max(1, -(-most // max(1, len(recipes))))
    left, sample = choice.sample(range(len(recipes)), len(recipes)), list[tuple[int, int]]()
    while left and len(sample) < most:
        looked_at, left = sorted(left[: most - len(sample)]), left[most - len(sample) :]
        target.read_tables(recipes[place] for place in looked_at)
        sample += ((place, i) for place in looked_at for i in _sample_of(recipes[place], per_tensor, choice))
    chosen = sorted(choice.sample(sample, min(most, len(sample))))
    return [(recipes[place], index) for place, index in chosen]


def _sample_of(recipe: TensorRecipe, most: int, choice: random.Random) -> list[int]:
    """Of the chunks that are decoded from the base."""
    plan, chunks = (
        recipe.plan,
        [index for index in range(recipe.plan.shared_count) if recipe.needs_base(index)],
    )
    last = chunks[-1] if chunks else -1
    if most == 1 and last >= 0 and plan.length(last, last + 1) >= plan.chunk_bytes // _ENOUGH:
        return [last]
    return sorted(choice.sample(chunks, min(most, len(chunks))))


@timed_stage("rebuild")
def _write_all(
    target: TargetRecipe,
    files: Iterable[TargetFile],
    folder: Destination,
    workers: Workers,
    meter: Meter,
    executor: Executor | None,
) -> None:
    """Write shards first, then small files, and an index last, since it makes the folder a checkpoint."""
    files = list(files)
    shards = [file for file in files if file.stored == "tensors"]
    others = [file for file in files if file.stored != "tensors"]
    if executor and shards:
        task = partial(_write_elsewhere, PinnedTarget.of(target), folder.share(), executor.cpus_per_task)
        for index, _ in executor.each(task, shards):
            meter.add(shards[index].size)
    else:
        workers.each(lambda lane, file: _write_shard(target, file, folder, lane, meter), shards)
    for file in sorted(others, key=lambda file: (file.path.endswith(".index.json"), file.path)):
        write_file(target, file, folder, workers, meter)


def _write_shard(
    target: TargetRecipe, file: TargetFile, folder: Destination, lane: Lane, meter: Meter
) -> None:
    with folder.create(file.path, size=file.size, sha256=file.sha256) as output:
        check_digest(file, rebuild_shard(target.shard(file.path), lane, meter, output.write_at))
        output.commit()
    _log.info("%s: rebuilt, %d bytes, SHA-256 %s", file.path, file.size, file.sha256)


def _write_elsewhere(pinned: PinnedTarget, shared: SharedOutput, threads: int, file: TargetFile) -> None:
    """The task of a shard."""
    with (
        kept(pinned, pinned.open) as target,
        join_output(shared) as folder,
        workers_of(threads, target.cancel) as workers,
    ):
        workers.at_stop(folder.cancel)
        _write_shard(target, file, folder, workers, Meter(None, "", 0))


def write_file(target: TargetRecipe, file: TargetFile, folder: Destination, lane: Lane, meter: Meter) -> None:
    """Write a file of the target that is not a shard.

    Raises:
        DeltaError: its SHA-256 is not the manifest's; it did not get its name.
    """
    with folder.create(file.path, size=file.size, sha256=file.sha256) as output:
        output.write_blocks(lane.watch(target.blocks(file), meter))
        check_digest(file, output.digest()[1])
        output.commit()
    _log.debug("%s: rebuilt, %d bytes, SHA-256 %s", file.path, file.size, file.sha256)


def write_licenses(target: TargetRecipe, folder: Destination) -> None:
    """Write license texts and notices of all deltas beside the target."""
    for source, record, place in license_places(target):
        with folder.create(place, size=record.size, sha256=record.sha256) as output:
            output.write_blocks(source.blocks(record.path))
            if output.digest() != (record.size, record.sha256):
                raise _damaged(record.path)
            output.commit()


def license_places(target: TargetRecipe) -> Iterator[tuple[Source, FileRecord, str]]:
    """Every license text and notice: its delta, its record there, and its place in the output."""
    for link in links(target):
        for record in text_records(link.manifest):
            is_whole_name = link is target or record.path.startswith("licenses/")
            path = record.path if is_whole_name else f"{record.sha256[:16]}-{record.path}"
            yield link.source, record, landing_place(path)


def rebuild_shard(recipe: ShardRecipe, lane: Lane, meter: Meter, sink: Sink | None = None) -> str:
    """Rebuild one shard, chunk by chunk.

    Args:
        sink: receives the bytes, from several threads and in no particular order; None discards them.

    Returns:
        The shard's SHA-256, in hex.
    """
    sha256 = hashlib.sha256(recipe.header.raw)
    if sink:
        sink(0, memoryview(recipe.header.raw))
    meter.add(len(recipe.header.raw))
    at_once = lane.batch_bytes
    buffers = Buffers(at_once)

    def decode(rows: list[tuple[TensorRecipe, int, int]]) -> NDArray[np.uint8]:
        origin, end = _bounds(rows[0])[0], _bounds(rows[-1])[1]  # tensors leave no gaps
        data = buffers.take(end - origin)
        for row in rows:
            start, stop = (place - origin for place in _bounds(row))
            row[0].decode(*row[1:], data[start:stop])
        if sink:
            sink(recipe.header.data_start + origin, data.data)
        return data

    for tensor in recipe.tensors.values():
        _log_tensor(tensor)
    with recipe.rows(at_once) as rows:
        for data in lane.map(decode, batches(rows, at_once, lambda row: row[0].plan.length(*row[1:]))):
            sha256.update(data.data)
            meter.add(data.size)
            buffers.give(data)
    return sha256.hexdigest()


def _log_tensor(tensor: TensorRecipe) -> None:
    base = tensor.base.name if tensor.base else None
    counts = tensor.plan.count, tensor.plan.shared_count
    _log.debug("%s: %d chunks, %d with the base tensor %s", tensor.info.name, *counts, base)


def _bounds(row: tuple[TensorRecipe, int, int]) -> tuple[int, int]:
    """First byte and end of a row of chunks, counted from the end of the shard's header."""
    recipe, first, end = row
    start, stop = recipe.plan.bounds(first, end)
    return recipe.info.start + start, recipe.info.start + stop
