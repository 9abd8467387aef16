"""The header of one .safetensors file: eight bytes of length, then JSON, then the tensors' bytes.

The format: https://github.com/huggingface/safetensors#format. Everything in a header is untrusted until
:func:`parse_header` returns.
"""

from __future__ import annotations

import json
import math
from codecs import getincrementaldecoder
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from ..dtypes import DTYPE_BITS
from ..errors import HeaderError

#: The largest header that the safetensors library reads, in bytes.
MAX_HEADER_BYTES = 100_000_000

#: More dimensions than any framework has (PyTorch and NumPy stop at 64); bounds the arithmetic.
MAX_RANK = 64

_METADATA = "__metadata__"
_NOT_TEXT = "is not a map from strings to strings"
_LEAST_ENTRY = 40  # bytes of a header that a tensor takes up at least

#: How many keys the entries may have together: so many for each tensor, and these for the metadata.
_FIELDS_EACH, _FIELDS_MORE = 8, 100_000

_BLOCK = 1 << 20


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


def parse_header(raw: bytes, file_size: int, where: str, most: int | None = None) -> Header:
    """Check a header and return it.

    Args:
        raw: the length bytes and the JSON, exactly as in the file.
        file_size: the whole file's size in bytes, which the tensors must fill exactly.
        where: the file's name for error messages.
        most: how many tensors it may have, if that is known.

    Raises:
        HeaderError: the safetensors library would refuse it (bad JSON, offsets that overlap, leave a gap or
            leave the file, sizes that contradict dtype and shape), or a name occurs twice, which that library
            accepts silently.
    """

    def bad(why: str) -> HeaderError:
        return HeaderError(f"{where} has a broken safetensors header", why, "Get the file again.")

    # Checked as it is read: each value stays text until its type is known, so that a header costs little more
    # memory than its own bytes, whatever they say.
    text, keys = memoryview(raw)[8:], _Keys(len(raw), most)
    try:
        _check_utf8(text)
        fields = msgspec.json.decode(text, type=_Fields, dec_hook=keys)
    except RecursionError:
        raise bad("Its JSON is nested too deeply.") from None
    except msgspec.ValidationError:
        raise bad(keys.why()) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise bad(f"It is not valid JSON: {error}.") from None
    metadata, tensors = {}, []
    try:
        for name, field in fields.items():
            if name == _METADATA:
                metadata = {str(key): _text(value, str(key)) for key, value in (field or {}).items()}
            else:
                tensors.append(_tensor(str(name), field))
    except (ValueError, msgspec.MsgspecError) as error:
        what = "Its __metadata__" if name == _METADATA else f"Tensor {str(name)!r}:"
        raise bad(f"{what} {error}.") from None
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


def _check_utf8(text: memoryview) -> None:
    """Raise :class:`UnicodeDecodeError` where it is not UTF-8: msgspec does not look into what it skips."""
    decode = getincrementaldecoder("utf-8")().decode
    for start in range(0, len(text), _BLOCK):
        decode(bytes(text[start : start + _BLOCK]))
    decode(b"", True)


class _Name(str):
    """A key of the header: a tensor's name, or ``__metadata__``."""

    __slots__ = ()


class _Field(str):
    """A key of what stands under a name."""

    __slots__ = ()


_Fields = dict[_Name, dict[_Field, msgspec.Raw] | None]


class _Keys:
    """Sees every key of a header of ``nbytes`` bytes as msgspec reads it, which resolves silently what occurs
    twice. Refuses that, and more tensors than ``most`` or than the header has room for."""

    def __init__(self, nbytes: int, most: int | None) -> None:
        room = nbytes // _LEAST_ENTRY
        self._most = 1 + (room if most is None else min(most, room))  # one for the metadata
        self._names: set[str] = set()
        self._fields: set[str] = set()  # of the last name
        self._name: str | None = None
        self._count = 0  # of all fields
        self._refused: str | None = None

    def __call__(self, kind: type, key: str) -> Any:
        if kind is _Name:
            seen = self._names
            self._name, self._fields = key, set()
        else:
            seen = self._fields
            self._count += 1
        if key in seen:
            self._refused = f"It is not valid JSON: the name {key!r} occurs twice."
        elif len(self._names) > self._most or self._count > _FIELDS_MORE + _FIELDS_EACH * len(self._names):
            self._refused = "It has more names than its tensors need."
        if self._refused:
            raise ValueError(self._refused)
        seen.add(key)
        return kind(key)

    def why(self) -> str:
        """Why msgspec found the header to be of the wrong type."""
        if self._refused or self._name is None:
            return self._refused or "Its JSON is not an object."
        if self._name == _METADATA:
            return f"Its __metadata__ {_NOT_TEXT}."
        return f"Tensor {self._name!r}: its entry is not an object."


def _text(value: msgspec.Raw, what: str) -> str:
    """A value of the metadata."""
    try:
        return msgspec.json.decode(value, type=str)
    except msgspec.ValidationError:
        raise ValueError(_NOT_TEXT) from None


def _value(value: msgspec.Raw | None) -> Any:
    """A value of a tensor's entry. It has few parts, so it costs no more than its text."""
    if value is None:
        return None
    count = bytes(value).count(b",") + 1
    if count > MAX_RANK:
        raise ValueError(f"it has {count} dimensions, more than {MAX_RANK}")
    return msgspec.json.decode(value)


def _tensor(name: str, field: Mapping[_Field, msgspec.Raw] | None) -> TensorInfo:
    if field is None:
        raise ValueError("its entry is not an object")
    dtype, shape, offsets = (_value(field.get(_Field(key))) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str):
        raise ValueError("its dtype is not a string")
    if not _is_sizes(shape):
        raise ValueError("its shape is not a list of sizes")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError("its data_offsets are not a pair of rising byte offsets")
    tensor = TensorInfo(name, dtype, tuple(shape), *offsets)
    bits = DTYPE_BITS.get(dtype)
    if bits is not None and tensor.numel * bits != tensor.nbytes * 8:
        raise ValueError(f"{dtype} of shape {list(shape)} does not fill its {tensor.nbytes} bytes exactly")
    return tensor


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**64 for n in value)
