"""A target into memory: base and delta are decoded into the tensors themselves, no file is written."""

from __future__ import annotations

import fnmatch
import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...delta.chain import Deltas, links, open_recipe
from ...delta.recipes import TensorRecipe
from ...delta.target_recipe import TargetRecipe, check_digest
from ...errors import CheckpointError
from ...storage import Location, OutputFolder, Readable, output_path
from ...workers import Lane, Meter, ProgressCallback, Workers, batches
from ..tensors import byte_view, dtype_of, settle, torch_shape

#: Bytes that a thread takes at once.
_BATCH_BYTES = 16 << 20


class LoadReport(NamedTuple):
    """Names that only the model has, and names that only the target has; as ``load_state_dict`` of torch."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def load_state_dict(
    delta: Deltas,
    base: Readable | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    shards: str = "*",
    sha256: bool = False,
    threads: int | None = None,
    progress: ProgressCallback | None = None,
) -> dict[str, Tensor]:
    """The target's tensors, by name, decoded from base and delta.

    Memory: the tensors, and some chunks of at most 4 MiB for each thread. Where two shards hold a tensor of
    one name, the first shard's counts.

    Args:
        delta: a folder or a Hub id; or several in the order in which they were made, each from the target of
            the one before.
        base: a folder, one file or a Hub id; if None, the repository that the (first) delta names.
        device: where the tensors go.
        dtype: what floating-point tensors are converted to; None: as they are stored.
        shards: load only from the target's shards whose path matches this pattern, such as
            ``"model*.safetensors"``.
        sha256: also compare the SHA-256 of each shard, where all of it is loaded unconverted to the CPU; that
            takes about twice as long. Without it, what is certain is this: every chunk of base and target
            that was used has the XXH3-64 checksum that the delta records. That finds any damage and any wrong
            base; it is no proof against somebody who makes up a false delta.
        threads: how many; if None, the number of usable cores, but no more than 8.
        progress: called with a phase ("load"), bytes done, bytes in all.

    Raises:
        CheckpointError: base or delta cannot be found or read, or torch lacks a dtype.
        BaseMismatchError: the base is not the right one.
        DeltaError: the delta is incomplete or damaged.
    """
    tensors: dict[str, Tensor] = {}

    def take(recipe: TensorRecipe) -> Tensor:
        name, stored = recipe.info.name, dtype_of(recipe.info.name, recipe.info.dtype)
        kept = dtype if dtype is not None and stored.is_floating_point else stored
        shape = torch_shape(name, recipe.info.dtype, recipe.info.shape)
        try:
            tensors[name] = torch.empty(shape, dtype=kept, device=device)
        # No such shape, no such memory, or no such device.
        except (RuntimeError, TypeError, OverflowError, AssertionError) as error:
            why = f"{list(shape)} of {kept}: {error}".splitlines()[0]
            raise CheckpointError(f"Tensor {name!r} cannot be loaded", f"{why}.") from error
        return tensors[name]

    with open_recipe(delta, base) as target:
        found = _tensors_by_shard(target, shards)
        links(target)[0].check_published()  # finds a wrong base on the Hub before it is fetched
        _fill(target, found, take, sha256, threads, progress)
    return {name: tensors[name] for names in found.values() for name in names}


def load_into(
    model: nn.Module,
    delta: Deltas,
    base: Readable | None = None,
    *,
    device: torch.device | str = "cpu",
    strict: bool = True,
    shards: str = "*",
    sha256: bool = False,
    threads: int | None = None,
    progress: ProgressCallback | None = None,
) -> LoadReport:
    """Load the target's tensors into ``model``, without a copy of them in between.

    The target's names, shapes and the model's are compared first. Tensors keep the model's dtype, as with
    ``Module.load_state_dict``; the bytes are the target's where both dtypes are the same. Tied weights are
    loaded once, and may be missing under all names but one. Hooks of ``load_state_dict`` are not run.

    Memory: the model, and some chunks of at most 4 MiB for each thread; a whole tensor more where the model's
    is not contiguous.

    Args:
        model: where the weights go. Parameters and persistent buffers on the meta device get memory on
            ``device``; all others are overwritten in place.
        device: for what is on the meta device.
        strict: whether missing or unexpected names are an error.
        delta, base, shards, sha256, threads, progress: as for :func:`load_state_dict`.

    Returns:
        The names that are missing and unexpected, for ``strict=False``.

    Raises:
        CheckpointError: names or shapes do not fit, or the model has buffers on the meta device that no
            checkpoint holds; the model is as before. Or base or delta cannot be found or read.
        BaseMismatchError, DeltaError: as for :func:`load_state_dict`; some of the model's weights may be new
            ones by then, so do not go on with it.
    """
    with open_recipe(delta, base) as target:
        found = _tensors_by_shard(target, shards)
        state = {
            name: tensor
            for name, tensor in model.state_dict(keep_vars=True).items()
            if isinstance(tensor, Tensor)
        }
        names = dict.fromkeys(name for shard in found.values() for name in shard)
        report = _compare(model, state, names, strict)
        _check_shapes(target, {name: state[name] for name in names if name in state})
        links(target)[0].check_published()  # finds a wrong base on the Hub before it is fetched
        chosen = _one_of_each(state, set(names))
        wanted = {path: [name for name in shard if name in chosen] for path, shard in found.items()}
        _leave_meta(model, {id(state[name]) for name in chosen}, torch.device(device))
        state = model.state_dict(keep_vars=True)
        _fill(target, wanted, lambda recipe: state[recipe.info.name].detach(), sha256, threads, progress)
    return report


def write_files(delta: Deltas, out: Location, base: Readable | None = None) -> list[str]:
    """Write the target's files that hold no weights (config, tokenizer, …) to the folder ``out``.

    Returns:
        Their paths, sorted. The shards' indexes are left out: there would be no shards to it.

    Raises:
        CheckpointError: base or delta cannot be found or read.
        DeltaError: the delta is incomplete or damaged.
        OutputError: ``out`` cannot be written to.
    """
    output_path(out)
    with open_recipe(delta, base) as target, OutputFolder(out) as folder:
        files = [
            file
            for file in target.manifest.target.files
            if file.stored != "tensors" and not file.path.endswith(".index.json")
        ]
        folder.require_distinct(file.path for file in files)
        folder.require_apart([file.path for file in files], target.sources)
        for record in files:
            with folder.create(record.path) as file:
                file.write_blocks(target.blocks(record))
                check_digest(record, file.digest()[1])
                file.commit()
    return sorted(file.path for file in files)


def _tensors_by_shard(target: TargetRecipe, shards: str) -> dict[str, list[str]]:
    """The names to load from each shard: of tensors with one name, the first shard's."""
    found: dict[str, list[str]] = {}
    seen: set[str] = set()
    for entry in target.manifest.tensors:
        if entry.file is None or entry.name in seen or not fnmatch.fnmatchcase(entry.file, shards):
            continue
        seen.add(entry.name)
        found.setdefault(entry.file, []).append(entry.name)
    return found


def _compare(
    model: nn.Module, state: Mapping[str, Tensor], names: Mapping[str, None], strict: bool
) -> LoadReport:
    """Which names fit.

    Raises:
        CheckpointError: some do not, and ``strict``.
    """
    loaded = {_memory(state[name]) for name in names if name in state}
    report = LoadReport(
        [name for name in state if name not in names and _memory(state[name]) not in loaded],
        [name for name in names if name not in state],
    )
    kind = type(model).__name__
    if strict and (report.missing_keys or report.unexpected_keys):
        raise CheckpointError(
            f"The target does not fit the model, a {kind}",
            f"It lacks {_some(report.missing_keys)}; the model lacks {_some(report.unexpected_keys)}.",
            "Pass strict=False to load what fits, or load_state_dict and rename.",
        )
    held = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    others = [name for name, buffer in model.named_buffers() if buffer.is_meta and id(buffer) not in held]
    if strict and others:
        raise CheckpointError(
            f"The model, a {kind}, has buffers on the meta device that no checkpoint holds",
            f"They are {_some(others)}.",
            "Make it under accelerate.init_empty_weights(), which leaves buffers where they are.",
        )
    return report


def _some(names: Sequence[str]) -> str:
    """The first few names."""
    shown = ", ".join(map(repr, names[:3])) or "none"
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def _memory(tensor: Tensor) -> tuple[object, ...]:
    """What two names of the same weights have in common."""
    if tensor.is_meta:
        return (id(tensor),)
    return tensor.device, tensor.data_ptr() or id(tensor), tensor.dtype, tensor.shape, tensor.stride()


def _check_shapes(target: TargetRecipe, state: Mapping[str, Tensor]) -> None:
    """Raise :class:`CheckpointError` where the model's tensor cannot hold the target's of that name."""
    entries = {entry.name: entry for entry in reversed(target.manifest.tensors) if entry.file is not None}
    for name, tensor in state.items():
        if hasattr(tensor, "full_tensor"):
            raise CheckpointError(
                "The model cannot be loaded into",
                f"{name!r} is sharded over several processes (a DTensor).",
                "Load it before it is sharded, or use distributed checkpoints.",
            )
        shape = torch_shape(name, entries[name].dtype, entries[name].shape)
        if shape != tuple(tensor.shape):
            raise CheckpointError(
                "The target does not fit the model",
                f"Tensor {name!r} is {list(shape)} in the target, {list(tensor.shape)} in the model.",
                "Make the model from the target's own config: write_files gets it.",
            )


def _one_of_each(state: Mapping[str, Tensor], names: set[str]) -> set[str]:
    """The names to load. Of several for one memory, the last: what ``load_state_dict`` leaves there."""
    last = {_memory(tensor): name for name, tensor in state.items() if name in names}
    return set(last.values())


def _leave_meta(model: nn.Module, wanted: set[int], device: torch.device) -> None:
    """Give memory to the parameters and buffers on the meta device whose id is in ``wanted``; ties hold."""
    made: dict[int, Tensor] = {}

    def real(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            memory = torch.empty_like(tensor, device=device)
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(memory, tensor.requires_grad) if is_parameter else memory
        return made[id(tensor)]

    for module in model.modules():
        for slots in (module._parameters, module._buffers):
            for key, tensor in slots.items():
                if tensor is not None and tensor.is_meta and id(tensor) in wanted:
                    slots[key] = real(tensor)  # type: ignore[assignment]


def _fill(
    target: TargetRecipe,
    names: Mapping[str, Sequence[str]],
    take: Callable[[TensorRecipe], Tensor],
    sha256: bool,
    threads: int | None,
    progress: ProgressCallback | None,
) -> None:
    """Decode the tensors ``names`` of each shard into what ``take`` gives for them."""
    recipes = (target.shard(path).tensors[name] for path in names for name in names[path])
    meter = Meter(progress, "load", sum(recipe.info.nbytes for recipe in recipes))
    with Workers(threads) as workers, torch.no_grad():
        workers.at_stop(target.cancel)

        def fill_shard(lane: Lane, path: str) -> None:
            recipe = target.shard(path)
            wanted = set(names[path])
            chosen = [tensor for name, tensor in recipe.tensors.items() if name in wanted]
            target.read_tables(chosen)  # before memory is taken: payloads that long must exist
            slots = [_Slot(tensor, take(tensor)) for tensor in chosen]
            settle(slot.tensor for slot in slots)
            is_whole = len(chosen) == len(recipe.tensors) and all(slot.direct is not None for slot in slots)
            digest = hashlib.sha256(recipe.header.raw) if sha256 and is_whole else None
            with target.expect((slot.recipe, i) for slot in slots for i in range(slot.recipe.plan.count)):
                rows = chain.from_iterable(slot.rows(lane.batch_bytes) for slot in slots)
                # To hand over each row alone takes as long as to decode it.
                some = batches(rows, _BATCH_BYTES, lambda row: row[0].recipe.plan.length(*row[1:]))
                for batch in lane.map(_decode, some):
                    for slot, first, stop in batch:
                        start, end = slot.recipe.plan.bounds(first, stop)
                        if digest and slot.direct is not None:
                            digest.update(slot.direct.data[start:end])
                        if end == slot.recipe.info.nbytes:
                            slot.finish()
                        meter.add(end - start)
            if digest:
                check_digest(recipe.file, digest.hexdigest())

        workers.each(fill_shard, [path for path in names if names[path]])


_Row = tuple["_Slot", int, int]


def _decode(rows: list[_Row]) -> list[_Row]:
    for slot, first, end in rows:
        slot.decode(first, end)
    return rows


class _Scratch(threading.local):
    """Memory for a row of chunks, kept by each thread."""

    def __init__(self) -> None:
        self._buffers: dict[bool, Tensor] = {}

    def take(self, nbytes: int, device: torch.device) -> Tensor:
        """So many bytes (uint8) to be copied to ``device``: pinned, if it copies from there by itself."""
        is_pinned = device.type == "cuda"
        if is_pinned not in self._buffers or len(self._buffers[is_pinned]) < nbytes:
            self._buffers[is_pinned] = torch.empty(nbytes, dtype=torch.uint8, pin_memory=is_pinned)
        return self._buffers[is_pinned][:nbytes]


_scratch = _Scratch()


class _Slot:
    """A tensor of the model and how to rebuild it. There are three ways, the fastest that is possible is
    taken: straight into the tensor's memory; by way of a row of chunks (another device, another dtype); by
    way of a whole tensor (one that is not contiguous, or whose elements are cut by chunks)."""

    def __init__(self, recipe: TensorRecipe, tensor: Tensor) -> None:
        self.recipe = recipe
        self.tensor = tensor
        self.dtype = dtype_of(recipe.info.name, recipe.info.dtype)
        self.direct: NDArray[np.uint8] | None = None
        self.whole: Tensor | None = None
        self.is_same = tensor.dtype == self.dtype
        self.size = 1 if self.is_same else self.dtype.itemsize  # bytes of an element of `flat`, as stored
        self.is_chunked = tensor.is_contiguous() and all(start % self.size == 0 for start, _ in recipe.plan)
        if self.is_chunked:
            self.flat = byte_view(tensor) if self.is_same else tensor.reshape(-1)
            if self.is_same and tensor.device.type == "cpu":
                self.direct = self.flat.numpy()

    def rows(self, nbytes: int) -> Iterator[_Row]:
        """All chunks in order, in rows; to be asked for when the first of them is to be decoded."""
        if not self.is_chunked:
            self.whole = torch.empty(self.tensor.shape, dtype=self.dtype)
        for first, end in self.recipe.plan.rows(nbytes):
            yield self, first, end

    def decode(self, first: int, end: int) -> None:
        """Rebuild chunks ``first`` to ``end - 1``; from any thread."""
        start, stop = self.recipe.plan.bounds(first, end)
        if self.direct is not None:
            self.recipe.decode(first, end, self.direct[start:stop])
        elif self.whole is not None:
            self.recipe.decode(first, end, byte_view(self.whole).numpy()[start:stop])
        else:
            chunk = _scratch.take(stop - start, self.tensor.device)
            self.recipe.decode(first, end, chunk.numpy())
            elements = chunk if self.is_same else chunk.view(self.dtype)
            self.flat[start // self.size : stop // self.size].copy_(elements)

    def finish(self) -> None:
        """After the last chunk."""
        if self.whole is not None:
            self.tensor.copy_(self.whole)
            self.whole = None
