"""The header of one .safetensors file: eight bytes of length, then JSON, then the tensors' bytes.

The format: https://github.com/huggingface/safetensors#format. Everything in a header is untrusted until
:func:`parse_header` returns.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..dtypes import DTYPE_BITS
from ..errors import HeaderError

#: The largest header that the safetensors library reads, in bytes.
MAX_HEADER_BYTES = 100_000_000

#: More dimensions than any framework has (PyTorch and NumPy stop at 64); bounds the arithmetic.
MAX_RANK = 64


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as its header describes it. ``start`` and ``end`` are byte offsets into the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def numel(self) -> int:
        """Number of elements (1 for a 0-d tensor)."""
        return 0 if 0 in self.shape else math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header. ``raw`` is its exact bytes, the eight length bytes included; ``tensors``
    are in the order of their bytes in the file."""

    raw: bytes
    tensors: tuple[TensorInfo, ...]
    metadata: dict[str, str]

    @property
    def data_start(self) -> int:
        return len(self.raw)

    @property
    def file_size(self) -> int:
        return len(self.raw) + (self.tensors[-1].end if self.tensors else 0)


def header_length(prefix: bytes, file_size: int, where: str) -> int:
    """Read the header's whole length in bytes from the file's first eight bytes.

    Raises:
        HeaderError: the file is too short for it, or the length is beyond the format's limit.
    """
    if len(prefix) < 8:
        raise HeaderError(f"{where} is not a safetensors file", "It is shorter than 8 bytes.")
    length = 8 + int.from_bytes(prefix, "little")
    if length > min(file_size, 8 + MAX_HEADER_BYTES):
        if prefix == b"version ":
            raise HeaderError(
                f"{where} is a Git LFS pointer, not the weights",
                "The repository was cloned without its large files.",
                "Run `git lfs pull` in it, or download it with `hf download`.",
            )
        raise HeaderError(
            f"{where} is not a whole safetensors file",
            f"Its first bytes announce a header of {length - 8} bytes; "
            f"the file has {file_size} and the format allows {MAX_HEADER_BYTES}.",
            "Download or save the file again.",
        )
    return length


def parse_header(raw: bytes, file_size: int, where: str) -> Header:
    """Check a header and return it.

    Args:
        raw: the length bytes and the JSON, exactly as in the file.
        file_size: the whole file's size in bytes, which the tensors must fill exactly.
        where: the file's name for error messages.

    Raises:
        HeaderError: the safetensors library would refuse it (bad JSON, offsets that overlap, leave a gap or
            leave the file, sizes that contradict dtype and shape), or a name occurs twice, which that library
            accepts silently.
    """

    def bad(why: str) -> HeaderError:
        return HeaderError(f"{where} has a broken safetensors header", why, "Get the file again.")

    try:
        text = raw[8:].decode("utf-8")
        fields = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constants)
    except RecursionError:
        raise bad("Its JSON is nested too deeply.") from None
    except ValueError as error:  # bad UTF-8, bad JSON, a duplicate key
        raise bad(f"It is not valid JSON: {error}.") from None
    if not isinstance(fields, dict):
        raise bad("Its JSON is not an object.")
    metadata = fields.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(map(_is_text, [*metadata, *metadata.values()])):
        raise bad("Its __metadata__ is not a map from strings to strings.")
    tensors = []
    for name, field in fields.items():
        try:
            tensors.append(_tensor(name, field))
        except ValueError as error:
            raise bad(f"Tensor {name!r}: {error}.") from None
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    end = 0
    for tensor in tensors:
        if tensor.start != end:
            raise bad(f"Tensor {tensor.name!r} starts at byte {tensor.start}, not at {end}.")
        end = tensor.end
    if len(raw) + end != file_size:
        raise bad(f"Its tensors fill {len(raw) + end} bytes, but the file has {file_size}.")
    return Header(raw, tuple(tensors), metadata)


def build_header(tensors: Sequence[TensorInfo], metadata: dict[str, str], length: int = 0) -> bytes:
    """The raw header for ``tensors``, padded with spaces to ``length`` bytes (or to a multiple of 8)."""
    fields: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    for t in tensors:
        fields[t.name] = {"dtype": t.dtype, "shape": t.shape, "data_offsets": [t.start, t.end]}
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    padded = max(length - 8, -(-len(text) // 8) * 8)
    return padded.to_bytes(8, "little") + text.ljust(padded)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {twice!r} occurs twice")
    return fields


def _no_constants(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")  # Python's parser takes NaN and Infinity


def _is_text(value: Any) -> bool:
    """Whether a JSON value is a string of whole characters."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def _tensor(name: str, field: Any) -> TensorInfo:
    if not isinstance(field, dict):
        raise ValueError("its entry is not an object")
    dtype: Any
    shape: Any
    offsets: Any
    dtype, shape, offsets = (field.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str):
        raise ValueError("its dtype is not a string")
    (name + dtype).encode()  # a lone surrogate raises ValueError
    if not _is_sizes(shape):
        raise ValueError("its shape is not a list of sizes")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError("its data_offsets are not a pair of rising byte offsets")
    tensor = TensorInfo(name, dtype, tuple(shape), *offsets)
    if len(shape) > MAX_RANK:
        raise ValueError(f"it has {len(shape)} dimensions, more than {MAX_RANK}")
    bits = DTYPE_BITS.get(dtype)
    if bits is not None and tensor.numel * bits != tensor.nbytes * 8:
        raise ValueError(f"{dtype} of shape {list(shape)} does not fill its {tensor.nbytes} bytes exactly")
    return tensor


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**64 for n in value)
