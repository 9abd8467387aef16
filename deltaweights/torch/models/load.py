"""Loads a target into memory: decodes base and delta straight into tensors, without writing files."""

from __future__ import annotations

import fnmatch
import hashlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from ...signing import SignatureRequirement
from ...storage import Location, OutputFolder, Readable, output_path
from ...workers import Lane, Meter, ProgressCallback, Workers, batches
from ..tensors import byte_view, dtype_of, settle, torch_shape
from ..wholeness import obstacle, require_gathered, require_own, some
from ..wrappers import plain_state
from .conversion import Fit, Fusion, fit_names

#: Bytes that a thread decodes at once.
_BATCH_BYTES = 16 << 20

_log = logging.getLogger("deltaweights")


class LoadReport(NamedTuple):
    """Names that only the model has, and names that only the target has; as ``load_state_dict`` of torch.
    The first are what was not loaded."""

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
    require_signature: SignatureRequirement | None = None,
    threads: int | None = None,
    progress: ProgressCallback | None = None,
) -> dict[str, Tensor]:
    """Return the target's tensors, by name, decoded from base and delta.

    Memory: the tensors, and some chunks of at most 4 MiB for each thread. If two shards hold a tensor of the
    same name, the first shard's counts.

    Args:
        delta: a folder or a Hub id; or several, oldest first, each made from the target of the one before; or
            a pointer folder (:func:`deltaweights.engines.serve_folder`), which names them and the base.
        base: a folder, one file or a Hub id; if None, the one that the pointer folder names, or the
            repository that the (first) delta names.
        device: the device of the tensors.
        dtype: the dtype for floating-point tensors; None keeps the stored one.
        shards: load only from the target's shards whose path matches this pattern, such as
            ``"model*.safetensors"``.
        sha256: also compare the SHA-256 of each shard that is loaded in full, unconverted, to the CPU; that
            takes about twice as long. Without it, every used chunk of base and target still has the XXH3-64
            checksum that the delta records. That finds any damage and any wrong base, but does not protect
            against a forged delta.
        require_signature: who must have signed the delta, as for :func:`deltaweights.open_target`: its files
            are compared by SHA-256 before any tensor is made. Who forges a base can only be found by the
            target's SHA-256, so that ``sha256`` is set, too.
        threads: number of threads; if None, the number of usable cores, at most 8.
        progress: called with a phase ("check signed", "load"), bytes done and total bytes.

    Raises:
        CheckpointError: base or delta cannot be found or read, or torch lacks a dtype.
        BaseMismatchError: the base is the wrong one.
        SignatureError: the delta is not signed as required; nothing was loaded.
        DeltaError: the delta is incomplete or damaged.
    """
    sha256 = sha256 or require_signature is not None
    tensors: dict[str, Tensor] = {}

    def take(recipe: TensorRecipe) -> Tensor:
        name, stored = recipe.info.name, dtype_of(recipe.info.name, recipe.info.dtype)
        kept = dtype if dtype is not None and stored.is_floating_point else stored
        shape = torch_shape(name, recipe.info.dtype, recipe.info.shape)
        try:
            tensors[name] = torch.empty(shape, dtype=kept, device=device)
        # An impossible shape, too little memory, or no such device.
        except (RuntimeError, TypeError, OverflowError, AssertionError) as error:
            why = f"{list(shape)} of {kept}: {error}".splitlines()[0]
            raise CheckpointError(f"Tensor {name!r} cannot be loaded", f"{why}.") from error
        return tensors[name]

    with open_recipe(
        delta, base, require_signature=require_signature, into_memory=True, progress=progress
    ) as target:
        found = _tensors_by_shard(target, shards)
        links(target)[0].check_published()  # finds a wrong base on the Hub before it is fetched
        _fill(target, found, take, sha256, threads, _meter(target, found, progress))
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
    require_signature: SignatureRequirement | None = None,
    threads: int | None = None,
    progress: ProgressCallback | None = None,
) -> LoadReport:
    """Load the target's tensors into ``model``, without an intermediate copy.

    The target's names, shapes and the model's are compared first. Tensors keep the model's dtype, as with
    ``Module.load_state_dict``; the bytes are the target's where both dtypes are the same. Tied weights are
    loaded once, and may be missing under all names except one. Hooks of ``load_state_dict`` are not run.

    Names are compared without what wrappers put into them (torch.compile, DDP, FSDP, activation
    checkpointing), on both sides. Where transformers holds a model under other names than it saves it, its
    own conversion applies.

    Memory: the model, and some chunks of at most 4 MiB for each thread; a whole tensor more where the model's
    is not contiguous, and, where transformers fuses tensors, those of one layer twice.

    Args:
        model: receives the weights. Parameters and persistent buffers on the meta device get memory on
            ``device``; all others are overwritten in place.
        device: for what is on the meta device.
        strict: whether missing or unexpected names are an error. If not, a warning is logged that names them.
        delta, base, shards, sha256, require_signature, threads, progress: as for :func:`load_state_dict`.

    Returns:
        The missing and unexpected names, for ``strict=False``.

    Raises:
        CheckpointError: names or shapes do not fit, the model has tensors that cannot be written to (sharded,
            quantized) or buffers on the meta device that no checkpoint holds; the model is as before. Or base
            or delta cannot be found or read.
        SignatureError: the delta is not signed as required; the model is as before.
        BaseMismatchError, DeltaError: as for :func:`load_state_dict`; some of the model's weights may be new
            ones by then, so do not go on with it.
    """
    sha256 = sha256 or require_signature is not None
    with open_recipe(
        delta, base, require_signature=require_signature, into_memory=True, progress=progress
    ) as target:
        found = _tensors_by_shard(target, shards)
        state = _state_of(model)
        fit = fit_names(model, state, [name for shard in found.values() for name in shard])
        places = _places(target, fit, state)
        report = _compare(model, state, places, strict)
        links(target)[0].check_published()  # finds a wrong base on the Hub before it is fetched
        chosen = _one_of_each(state, {place for fitting in places.values() for place in fitting})
        places = {name: [one for one in fitting if one in chosen] for name, fitting in places.items()}
        _leave_meta(model, {id(state[place]) for place in chosen}, torch.device(device))
        _Loading(target, found, fit, _state_of(model), sha256, threads).run(places, progress)
    return report


def write_files(
    delta: Deltas,
    out: Location,
    base: Readable | None = None,
    *,
    require_signature: SignatureRequirement | None = None,
) -> list[str]:
    """Write the target's files that hold no weights (config, tokenizer, …) to the folder ``out``.

    Args:
        delta, base: as for :func:`load_state_dict`.
        out: the folder.
        require_signature: who must have signed the delta, as for :func:`deltaweights.apply_delta`.

    Returns:
        Their paths, sorted, without the shards' indexes, since no shards are written.

    Raises:
        SignatureError: the delta is not signed as required; nothing was written.
        CheckpointError: base or delta cannot be found or read.
        DeltaError: the delta is incomplete or damaged.
        OutputError: ``out`` cannot be written to.
    """
    output_path(out)
    opened = open_recipe(delta, base, require_signature=require_signature)
    with opened as target, OutputFolder(out) as folder:
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


def _state_of(model: nn.Module) -> dict[str, Tensor]:
    """The model's own tensors by plain name.

    Raises:
        CheckpointError: one has no bytes that could be written to.
    """
    require_gathered(model)
    state = {k: v for k, v in plain_state(model, keep_vars=True).items() if isinstance(v, Tensor)}
    for name, tensor in state.items():
        why, _ = obstacle(tensor)
        if why and not tensor.is_meta:
            raise CheckpointError(
                "The model cannot be loaded into",
                f"{name!r} is {why}.",
                "Load it before it is sharded, quantized or wrapped so; or use distributed checkpoints.",
            )
    require_own(model, state)
    return state


def _places(target: TargetRecipe, fit: Fit, state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """For each name of the target, the model's that get something of it: none where the model has no place.

    Raises:
        CheckpointError: the model's tensor has another shape.
    """
    entries = {entry.name: entry for entry in reversed(target.manifest.tensors) if entry.file is not None}
    shapes = {
        name: torch_shape(name, entries[name].dtype, entries[name].shape)
        for name in (*fit.renamed, *(source for fusion in fit.fusions for source in fusion.sources))
    }
    places: dict[str, list[str]] = {}
    for name, place in fit.renamed.items():
        places[name] = _fitting({place: shapes[name]}, state)
    for fusion in fit.fusions:
        made = fusion.convert({name: torch.empty(shapes[name], device="meta") for name in fusion.sources})
        fitting = _fitting({place: tuple(tensor.shape) for place, tensor in made.items()}, state)
        places |= dict.fromkeys(fusion.sources, fitting)
    return places


def _fitting(shapes: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor]) -> list[str]:
    """The names that the model has, too.

    Raises:
        CheckpointError: with another shape.
    """
    for name, shape in shapes.items():
        if name in state and shape != tuple(state[name].shape):
            raise CheckpointError(
                "The target does not fit the model",
                f"Tensor {name!r} is {list(shape)} in the target, {list(state[name].shape)} in the model.",
                "Make the model from the target's own config: write_files gets it.",
            )
    return [name for name in shapes if name in state]


def _compare(
    model: nn.Module, state: Mapping[str, Tensor], places: Mapping[str, list[str]], strict: bool
) -> LoadReport:
    """Compare the names of target and model.

    Raises:
        CheckpointError: some differ, and ``strict`` is set.
    """
    filled = {place for fitting in places.values() for place in fitting}
    loaded = {_memory(state[name]) for name in filled}
    report = LoadReport(
        [name for name in state if name not in filled and _memory(state[name]) not in loaded],
        [name for name, fitting in places.items() if not fitting],
    )
    kind = type(model).__name__
    if report.missing_keys or report.unexpected_keys:
        lacks = f"It lacks {some(report.missing_keys)}; the model lacks {some(report.unexpected_keys)}."
        if strict:
            raise CheckpointError(
                f"The target does not fit the model, a {kind}",
                lacks,
                "Pass strict=False to load what fits and no more, or load_state_dict and rename.",
            )
        _log.warning(
            "Only a part of the %s is loaded: %d of %d tensors. %s",
            kind,
            len(state) - len(report.missing_keys),
            len(state),
            lacks,
        )
    held = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    others = [name for name, buffer in model.named_buffers() if buffer.is_meta and id(buffer) not in held]
    if strict and others:
        raise CheckpointError(
            f"The model, a {kind}, has buffers on the meta device that no checkpoint holds",
            f"They are {some(others)}.",
            "Make it under accelerate.init_empty_weights(), which leaves buffers where they are.",
        )
    return report


def _memory(tensor: Tensor) -> tuple[object, ...]:
    """A key that is equal for two names of the same weights."""
    if tensor.is_meta:
        return (id(tensor),)
    return tensor.device, tensor.data_ptr() or id(tensor), tensor.dtype, tensor.shape, tensor.stride()


def _one_of_each(state: Mapping[str, Tensor], names: set[str]) -> set[str]:
    """The names to load. Of several names for the same memory, the last one counts, as with
    ``load_state_dict``."""
    last = {_memory(tensor): name for name, tensor in state.items() if name in names}
    return set(last.values())


def _leave_meta(model: nn.Module, wanted: set[int], device: torch.device) -> None:
    """Give memory to the parameters and buffers on the meta device whose id is in ``wanted``, and keep
    ties."""
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


@dataclass(frozen=True)
class _Loading:
    """Decodes a target's tensors into a model's."""

    target: TargetRecipe
    found: Mapping[str, list[str]]
    fit: Fit
    state: Mapping[str, Tensor]
    sha256: bool
    threads: int | None

    def run(self, places: Mapping[str, list[str]], progress: ProgressCallback | None) -> None:
        """Fill the model's tensors at ``places`` (by the target's names)."""
        wanted = [name for name, fitting in places.items() if fitting]
        meter = _meter(self.target, self._by_shard(wanted), progress)
        direct = {name: places[name][0] for name in self.fit.renamed if places[name]}

        def take(recipe: TensorRecipe) -> Tensor:
            return self.state[direct[recipe.info.name]].detach()

        _fill(self.target, self._by_shard(direct), take, self.sha256, self.threads, meter)
        for fusion in self.fit.fusions:
            if places[fusion.sources[0]]:
                self._fuse(fusion, places[fusion.sources[0]], meter)

    def _fuse(self, fusion: Fusion, places: list[str], meter: Meter) -> None:
        tensors: dict[str, Tensor] = {}

        def take(recipe: TensorRecipe) -> Tensor:
            name, code = recipe.info.name, recipe.info.dtype
            shape = torch_shape(name, code, recipe.info.shape)
            tensors[name] = torch.empty(shape, dtype=dtype_of(name, code))
            return tensors[name]

        _fill(self.target, self._by_shard(fusion.sources), take, self.sha256, self.threads, meter)
        with torch.no_grad():
            made = fusion.convert(tensors)
            for place in places:
                self.state[place].copy_(made[place])

    def _by_shard(self, names: Iterable[str]) -> dict[str, list[str]]:
        wanted = set(names)
        chosen = {path: [name for name in shard if name in wanted] for path, shard in self.found.items()}
        return {path: names for path, names in chosen.items() if names}


def _meter(
    target: TargetRecipe, names: Mapping[str, Sequence[str]], progress: ProgressCallback | None
) -> Meter:
    recipes = (target.shard(path).tensors[name] for path in names for name in names[path])
    return Meter(progress, "load", sum(recipe.info.nbytes for recipe in recipes))


def _fill(
    target: TargetRecipe,
    names: Mapping[str, Sequence[str]],
    take: Callable[[TensorRecipe], Tensor],
    sha256: bool,
    threads: int | None,
    meter: Meter,
) -> None:
    """Decode the tensors ``names`` of each shard into what ``take`` gives for them."""
    with Workers(threads) as workers, torch.no_grad():
        workers.at_stop(target.cancel)

        def fill_shard(lane: Lane, path: str) -> None:
            recipe = target.shard(path)
            wanted = set(names[path])
            chosen = [tensor for name, tensor in recipe.tensors.items() if name in wanted]
            target.read_tables(chosen)  # proves that the payloads exist before memory is taken
            slots = [_Slot(tensor, take(tensor)) for tensor in chosen]
            settle(slot.tensor for slot in slots)
            is_whole = len(chosen) == len(recipe.tensors) and all(slot.direct is not None for slot in slots)
            digest = hashlib.sha256(recipe.header.raw) if sha256 and is_whole else None
            with target.expect((slot.recipe, i) for slot in slots for i in range(slot.recipe.plan.count)):
                rows = chain.from_iterable(slot.rows(lane.batch_bytes) for slot in slots)
                # Handing over each row alone takes as long as decoding it.
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
        """``nbytes`` bytes (uint8) for a copy to ``device``: pinned if the device can copy from it
        directly."""
        is_pinned = device.type == "cuda"
        if is_pinned not in self._buffers or len(self._buffers[is_pinned]) < nbytes:
            self._buffers[is_pinned] = torch.empty(nbytes, dtype=torch.uint8, pin_memory=is_pinned)
        return self._buffers[is_pinned][:nbytes]


_scratch = _Scratch()


class _Slot:
    """A tensor of the model and its recipe. It is rebuilt in the fastest possible way: straight into the
    tensor's memory; through a row of chunks (for a different device or dtype); or through a whole tensor (for
    one that is not contiguous, or whose elements cross chunks)."""

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
        """All chunks in order, in rows. Call it just before the first is decoded."""
        if not self.is_chunked:
            self.whole = torch.empty(self.tensor.shape, dtype=self.dtype)
        for first, end in self.recipe.plan.rows(nbytes):
            yield self, first, end

    def decode(self, first: int, end: int) -> None:
        """Rebuild chunks ``first`` to ``end - 1``, in any thread."""
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
        """Complete the tensor after the last chunk."""
        if self.whole is not None:
            self.tensor.copy_(self.whole)
            self.whole = None
