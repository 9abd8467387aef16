"""The target as base and delta describe it: every tensor and file readable, nothing on disk.

:func:`open_target` gives the lazy view; ``apply`` and ``verify`` (patch.py) read it chunk by chunk.
"""

from __future__ import annotations

import base64
import math
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby

import numpy as np
import zstandard
from numpy.typing import NDArray

from .. import codec
from ..checkpoint import (
    DTYPE_BITS,
    MAX_HEADER_BYTES,
    Checkpoint,
    Header,
    Shard,
    Tensor,
    TensorInfo,
    build_header,
    open_checkpoint,
    parse_header,
    read_shard,
)
from ..errors import (
    BaseMismatchError,
    CheckpointError,
    DeltaError,
    DeltaWeightsError,
    HeaderError,
    ManifestError,
    PayloadError,
)
from ..manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest, TargetFile, TargetTensor, TensorEntry
from ..payload import ChunkPlan, check_records
from ..storage import Readable, Source, Span, cached_sha256, open_hub, open_source, origins, sha256_of


def open_target(delta: Readable, base: Readable | None = None) -> Target:
    """Open the target that ``delta`` and ``base`` make together, without writing files.

    Args:
        delta: a folder or a Hub id.
        base: likewise, or one file; if None, the repository that the manifest names, at its commit.

    Returns:
        A lazy, read-only view; use it in a ``with`` block.

    Raises:
        DeltaError: the delta is incomplete or damaged.
        CheckpointError: the base cannot be found or read.
        BaseMismatchError: its tensors' names, dtypes or shapes are not those of the delta's base.
    """
    with ExitStack() as on_error:
        source = on_error.enter_context(closing(open_source(delta)))
        manifest = read_manifest(source)
        require_whole(source, manifest)
        opened = open_base(manifest, base)
        if opened:
            on_error.enter_context(opened)
        target = Target(source, manifest, opened)
        on_error.pop_all()
        return target


def read_manifest(source: Source) -> Manifest:
    """Read and check the manifest of the delta at ``source``.

    Raises:
        ManifestError: there is none, or it is damaged.
    """
    size = source.sizes.get(MANIFEST_NAME)
    if size is None:
        raise ManifestError(
            f"{source.where} is not a delta",
            f"It has no {MANIFEST_NAME}: something else, or a diff that was interrupted.",
            "Check the path, or run the diff again.",
        )
    if size > MAX_MANIFEST_BYTES:
        raise ManifestError(
            f"{MANIFEST_NAME} is damaged",
            f"It has {size} bytes, more than any manifest.",
            "Get the delta again.",
        )
    return Manifest.from_json(source.open(MANIFEST_NAME).read(0, size))


def require_whole(source: Source, manifest: Manifest) -> None:
    """Raise :class:`DeltaError` where a file of the delta is missing or cut (a broken download)."""
    wrong = [file.path for file in manifest.files if source.sizes.get(file.path) != file.size]
    if wrong:
        raise DeltaError(
            f"{source.where} is not a whole delta",
            f"{_some(wrong)} missing or not of the size in the manifest.",
            "Get the delta again.",
        )
    other = [f.path for f in manifest.files if source.published_sha256(f.path) not in (None, f.sha256)]
    if other:
        raise DeltaError(
            f"{source.where} is not the delta that its manifest describes",
            f"{_some(other)} published with another SHA-256.",
            "Tell its publisher; an earlier revision may be whole.",
        )


def open_base(manifest: Manifest, base: Readable | None) -> Checkpoint | None:
    """The base given, or the one that the manifest names; None where the delta needs none.

    Raises:
        CheckpointError: it cannot be found or read.
    """
    needs_base = any(entry.shared_bytes for entry in manifest.tensors) or any(
        file.stored == "base" for file in manifest.target.files
    )
    if base is not None:
        return open_checkpoint(base)
    if needs_base and manifest.base.repo_id:  # never a path: a manifest must not name our folders
        return Checkpoint(open_hub(manifest.base.repo_id, manifest.base.revision))
    if needs_base:
        raise CheckpointError(
            "This delta needs its base",
            "The delta does not say where on the Hub it is.",
            "Pass it: base=PATH or base=ORG/NAME",
        )
    return None


def _some(names: list[str]) -> str:
    """The first name, and how many more there are."""
    return (
        repr(names[0])
        + (f" and {len(names) - 1} more" if names[1:] else "")
        + (" are" if names[1:] else " is")
    )


@dataclass(frozen=True, slots=True)
class TensorView:
    """One tensor of the target: ``data`` is its bytes (uint8, little-endian, row-major)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: NDArray[np.uint8]


class Target(Mapping[str, TensorView]):
    """The target, lazily: a mapping from tensor names to :class:`TensorView`, decoded on access.

    Where two shards hold a tensor of one name, the first shard's counts; :meth:`shard` gives all.
    """

    def __init__(self, source: Source, manifest: Manifest, base: Checkpoint | None) -> None:
        self.source = source
        self.manifest = manifest
        self.base = base
        self._files = {file.path: file for file in manifest.target.files if file.stored == "tensors"}
        self._entries: dict[str, dict[str, TensorEntry]] = {path: {} for path in self._files}
        self._shards: dict[str, ShardRecipe] = {}
        self._delta_shards: dict[str, _DeltaShard] = {}
        self._locks = {path: threading.Lock() for path in self._files}
        self._first: dict[str, TensorEntry] = {}
        for entry in manifest.tensors:
            if entry.file is not None:
                self._entries[entry.file][entry.name] = entry
                self._first.setdefault(entry.name, entry)
        self._bases = self._find_bases()

    def __enter__(self) -> Target:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def sources(self) -> list[Source]:
        """Where delta and base come from; for a base that is itself rebuilt, what it is rebuilt from."""
        return [self.source, *(origins(self.base.source) if self.base else [])]

    @property
    def is_remote(self) -> bool:
        """Whether any of it has to come over a network."""
        return any(source.root is None for source in self.sources)

    def cancel(self) -> None:
        """End all that reads delta or base over a network, in any thread."""
        for source in self.sources:
            source.cancel()

    def close(self) -> None:
        """Close the files of delta and base."""
        for source in self.sources:
            source.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._first)

    def __len__(self) -> int:
        return len(self._first)

    def __contains__(self, name: object) -> bool:
        return name in self._first  # the inherited one would decode the tensor

    def dtype(self, name: str) -> str:
        """The tensor's safetensors dtype code; reads nothing."""
        return self._first[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape; reads nothing."""
        return self._first[name].shape

    def __getitem__(self, name: str) -> TensorView:
        """Decode one whole tensor.

        Raises:
            KeyError: the target has no such tensor.
            BaseMismatchError, DeltaError: base or delta are not what the manifest says.
        """
        entry = self._first[name]
        assert entry.file is not None
        data = self.shard(entry.file).tensors[name].read()
        return TensorView(name, entry.dtype, entry.shape, data)

    def shard(self, path: str) -> ShardRecipe:
        """How to rebuild the target shard at ``path``; its headers are read and checked once.

        Raises:
            DeltaError: the delta shard contradicts the manifest.
        """
        if path not in self._shards:
            self._shards[path] = self._read_shard(self._files[path])
        return self._shards[path]

    def _read_shard(self, file: TargetFile) -> ShardRecipe:
        own = self._delta_shard(file.path)
        entries = self._entries[file.path]
        tensors = {}
        for info in own.header.tensors:
            entry = entries.get(info.name)
            if not entry or (entry.dtype, entry.shape) != (info.dtype, info.shape):
                raise _contradicts(file, f"They describe tensor {info.name!r} differently")
            own.payload(entry)  # a duplicate's is empty
            coded = self._coded(entry)
            assert coded.file is not None
            payload = self._delta_shard(coded.file).payload(coded)
            base = self._bases.get((coded.file, coded.name))
            tensors[info.name] = TensorRecipe(info, coded, payload, base, self)
        if len(tensors) != len(entries):
            raise _contradicts(file, f"{len(entries)} tensors are promised, {len(tensors)} are there")
        return ShardRecipe(file, own.header, tensors, own.shard, self)

    def _delta_shard(self, path: str) -> _DeltaShard:
        """The delta shard of the target shard at ``path``. It is read once, whoever wants to know: the shards
        that are rebuilt side by side may hold duplicates of each other's tensors."""
        with self._locks[path]:
            if path not in self._delta_shards:
                entries = self._entries[path].values()
                self._delta_shards[path] = _read_delta_shard(self.source, self._files[path], entries)
            return self._delta_shards[path]

    def _coded(self, entry: TensorEntry) -> TensorEntry:
        """The entry whose payload and base give this one's bytes: its own, or that of what it is like."""
        like = entry.like
        return self._entries[like.file][like.name] if isinstance(like, TargetTensor) else entry

    def _find_bases(self) -> dict[tuple[str, str], Tensor]:
        """The base tensor of every entry that has one.

        Raises:
            BaseMismatchError: the base lacks it, or it has another dtype or shape.
        """
        found, wrong = {}, []
        for entry in self.manifest.tensors:
            if not entry.base or not entry.shared_bytes or entry.file is None:
                continue
            reference = entry.base
            tensor = self.base and self.base.find(reference.name, reference.file or entry.file)
            if not tensor:
                wrong.append(f"it has no tensor {reference.name!r}")
            elif (tensor.info.dtype, tensor.info.shape) != (reference.dtype, reference.shape):
                wrong.append(
                    f"tensor {reference.name!r} is {tensor.info.dtype} {list(tensor.info.shape)}, "
                    f"not {reference.dtype} {list(reference.shape)}"
                )
            else:
                found[entry.file, entry.name] = tensor
        if wrong:
            more = f" ({len(wrong) - 1} more tensors are missing or differ)" if wrong[1:] else ""
            raise self.wrong_base(wrong[0] + more)
        return found

    def base_of(self, path: str, name: str) -> Tensor | None:
        """The base tensor against which tensor ``name`` of the shard at ``path`` is coded, if any. For a
        duplicate, the base tensor of its name; or else that of the tensor that it is like."""
        entry = self._entries[path][name]
        coded = self._coded(entry)
        own = self.base.find(name, path) if self.base and coded is not entry else None
        return own or self._bases.get((coded.file or path, coded.name))

    def base_files(self) -> list[str]:
        """The base's files that the target needs, by path."""
        shards = {tensor.shard.path for tensor in self._bases.values()}
        others = {file.source for file in self.manifest.target.files if file.stored == "base"}
        return sorted(shards | others)

    def published_base_files(self) -> set[str]:
        """Those of the base's files that are known to be right without reading them: their SHA-256 is
        published, and is the manifest's.

        Raises:
            BaseMismatchError: it is another one, there or by the name that the file has in the Hub cache.
                (Where shards have other names than those of the manifest's base, the base is sharded
                otherwise, and theirs say nothing.)
        """
        if self.base is None:
            return set()
        records = {record.path: record.sha256 for record in self.manifest.base.files}
        shards = {path for path in records if path.endswith(".safetensors")}
        is_alike = shards == set(self.base.shards)
        proven = set()
        for path in self.base_files():
            published = self.base.source.published_sha256(path)
            told = published or cached_sha256(self.base.source.full_path(path))
            if told is None or path not in records:
                continue
            if told != records[path] and (is_alike or path not in self.base.shards):
                raise self.wrong_base(f"its file {path!r} has SHA-256 {told}, not {records[path]}")
            if published == records[path]:
                proven.add(path)
        return proven

    def with_base(self, skipped: Collection[str] = ()) -> list[TensorRecipe]:
        """How to rebuild the tensors that have a base, but for bases in these of the base's files."""
        return [
            self.shard(path).tensors[name]
            for (path, name), tensor in self._bases.items()
            if tensor.shard.path not in skipped
        ]

    def read_tables(self, recipes: Iterable[TensorRecipe]) -> None:
        """Read the chunk records of several tensors, side by side where the delta is far away; those that
        were read before are not announced, so not fetched, once more."""
        recipes = [recipe for recipe in recipes if "table" not in vars(recipe)]
        with self.source.expect(recipe.table_span for recipe in recipes):
            for recipe in recipes:
                recipe.table  # noqa: B018

    @contextmanager
    def expect(self, chunks: Iterable[tuple[TensorRecipe, int]]) -> Iterator[None]:
        """Within the block, ``chunks`` will be decoded, about in this order: what they need is fetched ahead.
        Their tensors' chunk records must have been read."""
        chunks = list(chunks) if self.is_remote else []
        payloads = (recipe.payload_span(index) for recipe, index in chunks)
        with self.source.expect(payloads), self.expect_base(c for c in chunks if c[0].needs_base(c[1])):
            yield

    def expect_base(self, chunks: Iterable[tuple[TensorRecipe, int]]) -> AbstractContextManager[None]:
        """:meth:`expect` where only the base's bytes will be read."""
        if self.base is None:
            return nullcontext()
        return self.base.source.expect(recipe.base_span(index) for recipe, index in chunks)

    def wrong_base(self, why: str) -> BaseMismatchError:
        """The error to raise where the base is not the right one."""
        record = self.manifest.base
        revision = f"@{record.revision}" if record.revision else ""
        fix = (
            f"The right one is on the Hub: base={record.repo_id}{revision}"
            if record.repo_id
            else "`inspect_delta` lists the files of the right one, with their SHA-256."
        )
        where = self.base.source.where if self.base else "Nothing"
        return BaseMismatchError(
            f"{where} is not the base that this delta was made from", f"{why[0].upper()}{why[1:]}.", fix
        )

    def is_damaged(self, path: str) -> bool:
        """Whether the delta's own file at ``path`` has another SHA-256 than the manifest says."""
        record = next(record for record in self.manifest.files if record.path == path)
        found = self.source.published_sha256(path) or sha256_of(self.source.blocks(path))
        return found != record.sha256

    def base_source(self, file: TargetFile) -> Source:
        """Where a file comes from that the target has in common with its base.

        Raises:
            BaseMismatchError: the base does not have it, or not of its size.
        """
        if not self.base or file.source not in self.base.source.sizes:
            raise self.wrong_base(f"it lacks {file.source!r}, a file that the target has in common with it")
        if self.base.source.sizes[file.source] != file.size:
            raise self.wrong_base(f"its file {file.source!r} has another size")
        return self.base.source

    def blocks(self, file: TargetFile) -> Iterator[bytes]:
        """The bytes of a file that is not a shard, in blocks of at most 1 MiB.

        Raises:
            BaseMismatchError: it comes from the base, and the base does not have it.
            PayloadError: it does not decompress, or to more than the manifest says.
        """
        if file.stored == "base":
            yield from self.base_source(file).blocks(file.source)
            return
        blocks = self.source.blocks(file.source)
        if file.stored == "zstd":
            blocks = codec.decompress_blocks(blocks)
        left = file.size
        why = f"It does not hold the {file.size} bytes of {file.path}."
        try:
            for block in blocks:
                left -= len(block)
                if left < 0:
                    break
                yield block
        except PayloadError as error:
            left, why = -1, f"{error.what}."
        if left:
            raise PayloadError(f"{file.source} in the delta is damaged", why, "Get the delta again.")


def check_digest(file: TargetFile, sha256: str) -> None:
    """Raise :class:`DeltaError` where a rebuilt file is not the one that the manifest promises."""
    if sha256 != file.sha256:
        raise DeltaError(
            f"{file.path} was not rebuilt as it was published",
            f"Its SHA-256 is {sha256}, not {file.sha256}: the delta is damaged.",
            "Get the delta again.",
        )


@dataclass(frozen=True, slots=True)
class _DeltaShard:
    """A delta shard, its payloads by the tensors' names, and the header of the target shard ``file``."""

    file: TargetFile
    shard: Shard
    header: Header
    payloads: dict[str, Tensor]

    def payload(self, entry: TensorEntry) -> Tensor:
        """The payload of the entry's tensor.

        Raises:
            PayloadError: there is none, or not of the length that the manifest says.
        """
        payload = self.payloads.get(entry.name)
        if not payload or payload.info.nbytes != entry.payload_bytes:
            raise _contradicts(self.file, f"They describe tensor {entry.name!r} differently")
        return payload


#: What the metadata of delta shards call them: those with a tensor for each payload, which are no longer
#: written, and those with all payloads in a row in one tensor.
_APART, _IN_A_ROW = "deltaweights", "deltaweights-row"
_ROW = "payloads"  # that tensor


def shard_metadata(shard: Shard) -> dict[str, str]:
    """The metadata of the delta shard for a target's shard, whose own header is in there byte for byte."""
    dictionary = _dictionary(usual_header(shard.header.tensors, shard.file.size))
    # The checksum tells a reader who has another dictionary.
    compressor = zstandard.ZstdCompressor(level=19, dict_data=dictionary, write_checksum=True)
    packed = base64.b64encode(compressor.compress(shard.header.raw)).decode()
    return {"format": _IN_A_ROW, "header": packed}


def shard_header(payload_bytes: int, metadata: dict[str, str], room: int = 0) -> bytes:
    """The header of a delta shard with so many bytes of payloads, padded to ``room`` bytes."""
    return build_header([TensorInfo(_ROW, "U8", (payload_bytes,), 0, payload_bytes)], metadata, room)


def usual_header(tensors: Iterable[TensorInfo | TensorEntry], size: int) -> bytes:
    """The header that a target's shard of these tensors, of ``size`` bytes, most likely has.

    Raises:
        HeaderError: the tensors have more bytes than that.
    """
    infos, end = [], 0
    for tensor in tensors:
        start, end = end, end + math.prod(tensor.shape) * DTYPE_BITS.get(tensor.dtype, 0) // 8
        if end > size:  # before its digits fill the memory
            raise HeaderError("", "The manifest's tensors have more bytes than their file.")
        infos.append(TensorInfo(tensor.name, tensor.dtype, tensor.shape, start, end))
    return build_header(infos, {"format": "pt"})


def _dictionary(content: bytes) -> zstandard.ZstdCompressionDict:
    return zstandard.ZstdCompressionDict(content, dict_type=zstandard.DICT_TYPE_RAWCONTENT)


def _read_delta_shard(source: Source, file: TargetFile, entries: Collection[TensorEntry]) -> _DeltaShard:
    """``entries`` are those of the file's tensors, in the manifest's order."""
    try:
        shard = read_shard(source, file.source)
        kind = shard.header.metadata.get("format")
        if kind not in (_APART, _IN_A_ROW):
            raise HeaderError("", "Its metadata does not call it a deltaweights shard.")
        is_row = kind == _IN_A_ROW
        header = _target_header(shard, file, usual_header(entries, file.size) if is_row else b"")
    except HeaderError as error:
        raise DeltaError(
            f"{file.source} in the delta is damaged", error.why, "Get the delta again."
        ) from error
    infos = _in_a_row(shard, file, entries) if is_row else shard.header.tensors
    return _DeltaShard(file, shard, header, {info.name: Tensor(info, shard) for info in infos})


def _in_a_row(shard: Shard, file: TargetFile, entries: Iterable[TensorEntry]) -> list[TensorInfo]:
    """The payloads in a delta shard that has them in one tensor; the manifest has their lengths."""
    infos, end = [], 0
    for entry in entries:
        start, end = end, end + entry.payload_bytes
        infos.append(TensorInfo(entry.name, "U8", (entry.payload_bytes,), start, end))
    if shard.header.tensors != (TensorInfo(_ROW, "U8", (end,), 0, end),):
        raise _contradicts(file, f"Its payloads do not have {end} bytes together")
    return infos


def _contradicts(file: TargetFile, why: str) -> PayloadError:
    return PayloadError(
        f"{file.source} in the delta contradicts the manifest", f"{why}.", "Get the delta again."
    )


def _target_header(delta_shard: Shard, file: TargetFile, usual: bytes) -> Header:
    """The target shard's own header, out of the delta shard's metadata. It is coded against ``usual``."""
    try:
        packed = base64.b64decode(delta_shard.header.metadata.get("header", ""), validate=True)
        size = zstandard.frame_content_size(packed)
        if not 8 <= size <= min(file.size, 8 + MAX_HEADER_BYTES):
            raise ValueError(f"a header of {size} bytes")
        expander = zstandard.ZstdDecompressor(dict_data=_dictionary(usual))
        raw = expander.decompress(packed, allow_extra_data=False)
    except (ValueError, zstandard.ZstdError) as error:
        raise HeaderError("", f"Its copy of the target's header is broken: {error}.") from error
    if int.from_bytes(raw[:8], "little") != len(raw) - 8:
        raise HeaderError("", "Its copy of the target's header has another length than it says.")
    return parse_header(raw, file.size, file.path)


@dataclass(frozen=True, slots=True)
class ShardRecipe:
    """How to rebuild one shard of ``target``: its header, and its tensors in the order of their bytes.
    ``delta_shard`` holds their payloads."""

    file: TargetFile
    header: Header
    tensors: dict[str, TensorRecipe]
    delta_shard: Shard
    target: Target

    def chunks(self) -> Iterator[tuple[TensorRecipe, int]]:
        """Every chunk of the shard, in order."""
        for recipe in self.tensors.values():
            for index in range(recipe.plan.count):
                yield recipe, index

    def rows(self, nbytes: int) -> Iterator[tuple[TensorRecipe, int, int]]:
        """All chunks in order, in rows of at most ``nbytes``: the tensor, its first chunk, the end."""
        for recipe in self.tensors.values():
            for first, end in recipe.plan.rows(nbytes):
                yield recipe, first, end


class _Scratch(threading.local):
    """Buffers of each thread, used again for every chunk: memory that is given back to the system and
    asked for again costs a page fault for each 4 KiB."""

    def __init__(self) -> None:
        self._buffers: dict[str, NDArray[np.uint8]] = {}
        self._depth = 0

    def take(self, use: str, nbytes: int) -> NDArray[np.uint8]:
        """``nbytes`` bytes, valid until this thread asks for the same ``use`` again."""
        buffer = self._buffers.get(use)
        if buffer is None or buffer.size < nbytes:
            self._buffers[use] = buffer = np.empty(nbytes, np.uint8)
        return buffer[:nbytes]

    def fill(self, nbytes: int, read: Callable[[NDArray[np.uint8]], None]) -> NDArray[np.uint8]:
        """A base's bytes, which ``read`` puts into a buffer; valid until this thread reads others.

        A base that is itself rebuilt (chain.py) reads its own base meanwhile. Two buffers serve any depth:
        nobody writes to the one that he was given before all that lies below him is read.
        """
        data = self.take(f"base {self._depth % 2}", nbytes)
        self._depth += 1
        try:
            read(data)
        finally:
            self._depth -= 1
        return data


_scratch = _Scratch()


class _WrongBase(Exception):  # noqa: N818
    """Bytes of the base do not have their checksum."""


class TensorRecipe:
    """How to rebuild one tensor, chunk by chunk. ``entry``, ``payload`` and ``base`` are those of the tensor
    whose bytes are coded: for a duplicate, the one that it is like."""

    def __init__(
        self, info: TensorInfo, entry: TensorEntry, payload: Tensor, base: Tensor | None, target: Target
    ) -> None:
        self.info = info
        self.base = base
        self._payload = payload
        self._target = target
        chunk_bytes = target.manifest.chunk_bytes
        self.plan = ChunkPlan(info.nbytes, entry.shared_bytes, chunk_bytes)
        if not _is_consistent(info, entry, base):
            raise ManifestError(
                f"{MANIFEST_NAME} is damaged",
                f"Tensor {info.name!r} cannot share {entry.shared_bytes} bytes with its base tensor.",
                "Get the delta again.",
            )

    @property
    def delta_shard(self) -> Shard:
        """The delta's shard that holds the payload."""
        return self._payload.shard

    @property
    def source(self) -> str:
        """Its path."""
        return self.delta_shard.path

    @property
    def base_name(self) -> str:
        """The base tensor's name."""
        return self.base.info.name if self.base else ""

    @cached_property
    def table(self) -> tuple[NDArray[np.void], NDArray[np.int64]]:
        """The payload's chunk records (:data:`codec.RECORD`), and where each chunk's data starts in it.

        Raises:
            PayloadError: they do not add up.
        """
        length = self._table_bytes
        if length > self._payload.info.nbytes:
            raise self._damaged(f"Its payload of {self._payload.info.nbytes} bytes is too short")
        table = np.empty(length, np.uint8)
        self._payload.read_into(0, table)
        try:
            return check_records(table.tobytes(), self.plan, self._payload.info.nbytes)
        except PayloadError as error:
            raise self._damaged(error.what) from error

    @property
    def _table_bytes(self) -> int:
        return self.plan.count * codec.RECORD.itemsize

    @property
    def table_span(self) -> Span:
        """Where the chunk records lie in the delta."""
        return self._payload.span(0, min(self._table_bytes, self._payload.info.nbytes))

    def payload_span(self, index: int) -> Span:
        """Where the data of chunk ``index`` lies in the delta."""
        records, starts = self.table
        start = int(starts[index])
        return self._payload.span(start, start + int(records["length"][index]))

    def needs_base(self, index: int) -> bool:
        """Whether chunk ``index`` is decoded from the base's bytes."""
        return self.plan.has_base(index) and int(self.table[0]["method"][index]) not in codec.STANDALONE

    def base_span(self, index: int) -> Span:
        """Where the base has the bytes for chunk ``index``."""
        assert self.base is not None
        return self.base.span(*self._base_bytes(index, index + 1))

    def _base_bytes(self, first: int, end: int) -> tuple[int, int]:
        """First byte and end of what the base's tensor has for chunks ``first`` to ``end - 1``."""
        assert self.base is not None
        start, stop = self.plan.bounds(first, end)
        dtypes = self.info.dtype, self.base.info.dtype
        return codec.rescale(start, *dtypes), codec.rescale(stop, *dtypes)

    def _read_base(self, first: int, end: int) -> NDArray[np.uint8]:
        """The base's bytes for these chunks, in its own dtype; valid until this thread reads more."""
        assert self.base is not None
        start, stop = self._base_bytes(first, end)
        return _scratch.fill(stop - start, partial(self.base.read_into, start))

    def _read_payload(self, first: int, end: int) -> NDArray[np.uint8]:
        """The data of chunks ``first`` to ``end - 1``, one behind the other; valid until this thread reads
        more. Raises :class:`PayloadError` where that of a chunk is longer than the chunk."""
        records, starts = self.table
        lengths = records["length"][first:end].tolist()
        for index, length in enumerate(lengths, first):
            begin, stop = self.plan.span(index)
            if length > stop - begin:
                raise self._damaged(f"A chunk of {stop - begin} bytes is coded in {length}")
        data = _scratch.take("payload", sum(lengths))
        self._payload.read_into(int(starts[first]), data)
        return data

    def _coded(self, index: int, first: int, data: NDArray[np.uint8]) -> tuple[int, NDArray[np.uint8]]:
        """How chunk ``index`` is coded, and its data, out of that from chunk ``first`` on."""
        records, starts = self.table
        begin = int(starts[index] - starts[first])
        return int(records["method"][index]), data[begin : begin + int(records["length"][index])]

    def matches_base(self, index: int) -> bool:
        """Whether the base's bytes for chunk ``index`` are those that the delta was made from."""
        return codec.checksum(self._read_base(index, index + 1)) == int(self.table[0]["base"][index])

    def read(self) -> NDArray[np.uint8]:
        """The whole tensor's bytes; raises as :meth:`decode` does."""
        self.table  # noqa: B018  # a payload that long must exist before so much memory is taken
        data = np.empty(self.info.nbytes, np.uint8)
        with self._target.expect((self, index) for index in range(self.plan.count)):
            for first, end in self.plan.rows(self._target.manifest.chunk_bytes):
                self.decode(first, end, data[slice(*self.plan.bounds(first, end))])
        return data

    def decode(self, first: int, end: int, out: NDArray[np.uint8]) -> None:
        """Rebuild chunks ``first`` to ``end - 1``, one of :meth:`ChunkPlan.rows`, into ``out`` (uint8,
        their length).

        What does not have its checksum is read once more before that is an error: a bit that went wrong on
        the way from the Hub must not end a run of hours.

        Raises:
            BaseMismatchError: the base's bytes are not those that the delta was made from.
            PayloadError: the delta is damaged.
        """
        runs = [list(run) for _, run in groupby(range(first, end), self.needs_base)]
        # What is read for another run, or once more, may pass through the memory that `out` is: see _Scratch.
        whole, origin = out if len(runs) == 1 else np.empty_like(out), self.plan.span(first)[0]

        def part(first: int, end: int) -> NDArray[np.uint8]:
            start, stop = self.plan.bounds(first, end)
            return whole[start - origin : stop - origin]

        wrong = [k for run in runs for k in self._decode_run(run[0], run[-1] + 1, part(run[0], run[-1] + 1))]
        if wrong and whole is out:
            whole = out.copy()
        for index in wrong:
            self._decode_anew(index, part(index, index + 1))
        if whole is not out:
            out[:] = whole

    def _decode_run(self, first: int, end: int, out: NDArray[np.uint8]) -> list[int]:
        """:meth:`decode` of chunks that all need the base, or all do not. Returns which come out wrong."""
        base = self._read_base(first, end) if self.needs_base(first) else None
        data = self._read_payload(first, end)
        origin, wrong = self.plan.span(first)[0], []
        for index in self._decode_at_once(first, end, data, base, out):
            start, stop = (place - origin for place in self.plan.span(index))
            try:
                coded = self._coded(index, first, data)
                self._decode(index, coded, self._converted(index, base, origin), out[start:stop])
            except (PayloadError, _WrongBase):
                wrong.append(index)
        return wrong

    def _decode_at_once(
        self,
        first: int,
        end: int,
        data: NDArray[np.uint8],
        base: NDArray[np.uint8] | None,
        out: NDArray[np.uint8],
    ) -> list[int]:
        """Decode and check what can be in one call. Returns which chunks are left."""
        if base is None or self.base is None or self.base.info.dtype != self.info.dtype:
            return list(range(first, end))
        records, chunk_bytes = self.table[0][first:end], self.plan.chunk_bytes
        is_right = codec.decode_row(records, data, base, self.info.dtype, out, chunk_bytes)
        return [first + int(k) for k in np.flatnonzero(~is_right)]

    def _converted(self, index: int, base: NDArray[np.uint8] | None, origin: int) -> NDArray[np.uint8] | None:
        """The base's bytes for chunk ``index``, checked and in the target's dtype, of those from byte
        ``origin`` of the target's tensor on, if there are any."""
        if base is None:
            return None
        assert self.base is not None
        source, dtype = self.base.info.dtype, self.info.dtype
        start, stop = (codec.rescale(place - origin, dtype, source) for place in self.plan.span(index))
        if codec.checksum(base[start:stop]) != int(self.table[0]["base"][index]):
            raise _WrongBase
        return codec.convert(base[start:stop], source, dtype)

    def _decode_anew(self, index: int, out: NDArray[np.uint8]) -> None:
        """Read and decode a chunk that came out wrong."""
        base = self._read_base(index, index + 1) if self.needs_base(index) else None
        try:
            converted = self._converted(index, base, self.plan.span(index)[0])
        except _WrongBase:
            raise self._wrong_base(index) from None
        coded = self._coded(index, index, self._read_payload(index, index + 1))
        self._decode(index, coded, converted, out)

    def _decode(
        self,
        index: int,
        coded: tuple[int, NDArray[np.uint8]],
        base: NDArray[np.uint8] | None,
        out: NDArray[np.uint8],
    ) -> None:
        try:
            codec.decode_chunk(coded[0], coded[1].data, base, self.info.dtype, out)
        except PayloadError as error:
            raise self._damaged(error.what) from error
        if codec.checksum(out) != int(self.table[0]["target"][index]):
            raise self._damaged(f"Chunk {index} does not decode to what was encoded")

    def _wrong_base(self, index: int) -> DeltaWeightsError:
        """The error where the base's bytes and their checksum differ: the one or the other is wrong."""
        if self._target.is_damaged(self.source):
            return self._damaged("Its chunk records are not those that were written")
        start, end = self.plan.span(index)
        base = self._target.base
        if base and self.base and self.base.shard.path in self._target.published_base_files():
            return CheckpointError(
                f"{self.base.shard.path} does not arrive as it is published",
                f"Bytes {start} to {end} of its tensor {self.base_name!r} came wrong twice.",
                "Get the deltas before this one again."
                if origins(base.source) != [base.source]
                else "Something on the way changes them: try another network, or keep_base=True.",
            )
        return self._target.wrong_base(f"its tensor {self.base_name!r} differs in bytes {start} to {end}")

    def _damaged(self, why: str) -> PayloadError:
        return PayloadError(
            f"{self.source} in the delta is damaged",
            f"Tensor {self.info.name!r}: {why}.",
            "Get the delta again.",
        )


def _is_consistent(info: TensorInfo, entry: TensorEntry, base: Tensor | None) -> bool:
    """Whether the bytes that target and base are said to share exist in both."""
    shared = entry.shared_bytes
    if not shared:
        return True
    if base is None or shared > info.nbytes:
        return False
    source = base.info.dtype
    if source == info.dtype:
        return shared <= base.info.nbytes
    return (
        codec.is_convertible(source, info.dtype)
        and shared % (DTYPE_BITS[info.dtype] // 8) == 0
        and codec.rescale(shared, info.dtype, source) <= base.info.nbytes
    )
