"""Delta and base to target, in streaming shards: the mirror image of diff.py.

delta → codec → checkpoint. A shard is rebuilt chunk by chunk under a temporary name, and gets its own when
its SHA-256 is the manifest's.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .checkpoint import Location, OutputFolder, local_path, sha256_of
from .errors import DeltaError, OutputError
from .manifest import Manifest, TargetFile
from .pipeline import Meter, ProgressCallback, Workers
from .target import ShardRecipe, Target, TensorRecipe, open_target

#: At least so many chunks of the base are compared with the delta before anything is written, and at least
#: one of every tensor: a second's work on a disk.
_SAMPLED_CHUNKS = 256

#: Where a chunk's bytes go: its offset in the shard, the bytes.
Sink = Callable[[int, memoryview], None]


@dataclass(frozen=True, slots=True)
class ApplyReport:
    """What :func:`apply_delta` did: files rebuilt now, files found whole from an earlier run."""

    out: str
    rebuilt: tuple[str, ...]
    kept: tuple[str, ...]
    nbytes: int


def apply_delta(
    delta: Location,
    out: Location,
    *,
    base: Location | None = None,
    force: bool = False,
    threads: int | None = None,
    progress: ProgressCallback | None = None,
) -> ApplyReport:
    """Rebuild the target in the folder ``out``, byte for byte.

    Run again after an interruption, it goes on with the files that are missing.

    Args:
        delta: a folder or a Hub id in the local cache.
        out: the folder to write; new or empty, or an interrupted run's.
        base: the base's folder or file; if None, the repository that the manifest names, from the cache.
        force: write even if ``out`` holds other files. They stay, unless the target has a file of that name.
        threads: how many; the number of usable cores if None.
        progress: called with a phase, what is done, what there is to do: "check base" (in chunks),
            "check files there" and "apply" (in bytes).

    Raises:
        BaseMismatchError: the base is not the right one. Nothing was written, or no file got its name.
        DeltaError: the delta is incomplete or damaged.
        OutputError: ``out`` holds other files, or its disk is too small.
    """
    with open_target(delta, base) as target, Workers(threads) as workers:
        root = local_path(out)
        _check_apart(root, target)
        _check_licenses(target)
        check_base(target, workers, progress)
        with OutputFolder(root) as folder:
            sources = [target.source, *([target.base.source] if target.base else [])]
            folder.require_apart((file.path for file in target.manifest.target.files), sources)
            kept = _finished(target.manifest, folder, workers, force, progress)
            missing = [file for file in target.manifest.target.files if file.path not in kept]
            nbytes = sum(file.size for file in missing)
            folder.require_space(nbytes)
            meter = Meter(progress, "apply", nbytes)
            _write_all(target, missing, folder, workers, meter)
    rebuilt = tuple(file.path for file in missing)
    return ApplyReport(str(root), rebuilt, tuple(sorted(kept)), nbytes)


def _check_apart(root: Path, target: Target) -> None:
    """The result must not overwrite what it is made from."""
    places = [target.source.where] + ([target.base.source.where] if target.base else [])
    for place in map(Path, places):
        if place.resolve() in (root.resolve(), *root.resolve().parents) and place.is_dir():
            raise OutputError(
                f"The target cannot be written to {root}",
                f"That is in {place}, which it is made from.",
                "Choose another folder.",
            )


def _check_licenses(target: Target) -> None:
    """The texts that travel with the delta must be the ones that were published with it."""
    for side in (target.manifest.base, target.manifest.target):
        for record in side.license.files:
            if target.is_damaged(record.path):
                raise _damaged(record.path)


def _damaged(path: str) -> DeltaError:
    return DeltaError(
        f"{path} in the delta is damaged", "Its SHA-256 is not the manifest's.", "Get the delta again."
    )


def _finished(
    manifest: Manifest,
    folder: OutputFolder,
    workers: Workers,
    force: bool,
    progress: ProgressCallback | None,
) -> set[str]:
    """The target's files that already stand in the folder, whole.

    Raises:
        OutputError: there are other files, or files of the right name and other content, without ``force``.
    """
    files = {file.path: file for file in manifest.target.files}
    there = [file for file in files.values() if os.path.lexists(folder.root / file.path)]
    meter = Meter(progress, "check files there", sum(file.size for file in there)) if there else None

    def is_whole(file: TargetFile) -> bool:
        return (
            folder.is_regular(file.path)
            and folder.size(file.path) == file.size
            and (sha256_of(workers.watch(folder.blocks(file.path), meter)) == file.sha256)
        )

    whole = workers.each(is_whole, there)
    kept = {file.path for file, ok in zip(there, whole, strict=True) if ok}
    others = folder.foreign(files) + [file.path for file in there if file.path not in kept]
    if others and not force:
        more = f", nor are {len(others) - 1} more" if others[1:] else ""
        raise OutputError(
            f"{folder.root} holds other files",
            f"{others[0]!r} is not the target's{more}.",
            "Choose a new folder, or pass --force to write there; files of other names stay as they are.",
        )
    return kept


def check_base(target: Target, workers: Workers, progress: ProgressCallback | None = None) -> None:
    """Compare a sample of the base's chunks, some of every tensor, with the delta's checksums.

    Raises:
        BaseMismatchError: one differs, or a file that the target takes from the base.
    """
    if target.base is None:
        return
    recipes = [
        recipe
        for file in target.manifest.target.files
        if file.stored == "tensors"
        for recipe in target.shard(file.path).tensors.values()
        if recipe.plan.shared
    ]
    sample = _sample(recipes)
    meter = Meter(progress, "check base", len(sample))
    wrong: set[TensorRecipe] = set()
    results = workers.map(lambda chunk: chunk[0].matches_base(chunk[1]), sample)
    for (recipe, _), matches in zip(sample, results, strict=True):
        meter.add(1)
        if not matches:
            wrong.add(recipe)
    if wrong:
        for source in sorted({recipe.source for recipe in recipes if recipe in wrong}):
            if target.is_damaged(source):
                raise _damaged(source)
        names = sorted({recipe.base_name for recipe in wrong})
        count = len({recipe.base_name for recipe in recipes})
        raise target.wrong_base(f"of {count} tensors sampled, {len(names)} differ, such as {names[0]!r}")
    for file in target.manifest.target.files:
        if file.stored == "base" and sha256_of(target.blocks(file)) != file.sha256:
            raise target.wrong_base(f"its file {file.source!r} differs")


def _sample(recipes: list[TensorRecipe]) -> list[tuple[TensorRecipe, int]]:
    """Chunks of every tensor, chosen at random, the same ones each time."""
    per_tensor = max(1, -(-_SAMPLED_CHUNKS // max(1, len(recipes))))
    choice = random.Random(0)  # noqa: S311
    return [
        (recipe, index)
        for recipe in recipes
        for index in sorted(
            choice.sample(range(recipe.plan.shared_count), min(per_tensor, recipe.plan.shared_count))
        )
    ]


def _write_all(
    target: Target,
    files: Iterable[TargetFile],
    folder: OutputFolder,
    workers: Workers,
    meter: Meter,
) -> None:
    """Shards first; then the small files; an index last, since with it the folder is a checkpoint."""
    files = list(files)
    shards = [file for file in files if file.stored == "tensors"]
    others = [file for file in files if file.stored != "tensors"]

    def write_shard(file: TargetFile) -> None:
        with folder.create(file.path) as output:
            check_digest(file, rebuild_shard(target.shard(file.path), workers, meter, output.write_at))
            output.commit()

    workers.each(write_shard, shards)
    for file in sorted(others, key=lambda file: (file.path.endswith(".index.json"), file.path)):
        with folder.create(file.path) as output:
            output.write_blocks(workers.watch(target.blocks(file), meter))
            check_digest(file, output.digest()[1])
            output.commit()


def rebuild_shard(recipe: ShardRecipe, workers: Workers, meter: Meter, sink: Sink | None = None) -> str:
    """Rebuild one shard, chunk by chunk.

    Args:
        sink: where the bytes go, called from several threads and in no particular order; None: nowhere.

    Returns:
        The shard's SHA-256, in hex.
    """
    sha256 = hashlib.sha256(recipe.header.raw)
    if sink:
        sink(0, memoryview(recipe.header.raw))
    meter.add(len(recipe.header.raw))
    # A stack: the buffer that was used last is the one in the cache. Untouched ones take no memory.
    buffers = [np.empty(recipe.chunk_bytes, np.uint8) for _ in range(workers.window + 1)]

    def decode(chunk: tuple[TensorRecipe, int]) -> tuple[NDArray[np.uint8], int]:
        tensor, index = chunk
        start, end = tensor.plan.span(index)
        buffer = buffers.pop()
        tensor.decode(index, buffer[: end - start])
        if sink:
            offset = recipe.header.data_start + tensor.info.start + start
            sink(offset, buffer.data[: end - start])
        return buffer, end - start

    for buffer, length in workers.map(decode, recipe.chunks()):
        sha256.update(buffer.data[:length])
        buffers.append(buffer)
        meter.add(length)
    return sha256.hexdigest()


def check_digest(file: TargetFile, sha256: str) -> None:
    """Raise :class:`DeltaError` where a rebuilt file is not the one that the manifest promises."""
    if sha256 != file.sha256:
        raise DeltaError(
            f"{file.path} was not rebuilt as it was published",
            f"Its SHA-256 is {sha256}, not {file.sha256}: the delta is damaged.",
            "Get the delta again.",
        )
