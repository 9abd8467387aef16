"""A changed tensor in an update on disk: both encodings against independent code, and hostile frames."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from deltaweights import OutputError, PayloadError
from deltaweights.engines.disk_updates import encodings
from deltaweights.engines.disk_updates.encodings import ENCODINGS, DiskEncoding, apply, encode, largest_frame

from . import independent_disk_updates as independent

OLD = bytes(range(40))
ZSTD = zstandard.ZstdCompressor(level=1)


def array(data: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.frombuffer(bytearray(data), np.uint8)


@st.composite
def _pairs(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """Bytes before and after: some change, or all."""
    old = draw(st.binary(max_size=400))
    new = bytearray(old)
    if old and draw(st.booleans()):
        for place in draw(st.lists(st.integers(0, len(old) - 1), max_size=10)):
            new[place] = draw(st.integers(0, 255))
    else:
        new[:] = draw(st.binary(min_size=len(old), max_size=len(old)))
    return old, bytes(new)


@given(_pairs(), st.sampled_from(ENCODINGS))
def test_what_one_writes_the_other_reads(pair: tuple[bytes, bytes], encoding: DiskEncoding) -> None:
    old, new = pair
    frame = encode(encoding, "w", array(old), array(new))
    assert independent.decode(encoding, frame, old) == new
    assert len(frame) <= largest_frame(encoding, len(old))
    data = array(old)
    apply(encoding, independent.encode(encoding, old, new), data)
    assert data.tobytes() == new


def _overwrite(count: int, places: list[int], values: bytes) -> bytes:
    return ZSTD.compress(struct.pack(f"<{1 + len(places)}I", count, *places) + values)


@pytest.mark.parametrize(
    ("frame", "why"),
    [
        (_overwrite(2, [1, 0], b"ab"), "do not rise"),
        (_overwrite(2, [1, 1], b"ab"), "do not rise"),
        (_overwrite(1, [40], b"a"), "leave the tensor"),
        (_overwrite(2, [1], b"a"), "states 2 changed bytes"),
        (_overwrite(1, [1], b"ab"), "states 1 changed bytes"),
        (_overwrite(0xFFFFFFFF, [1], b"a"), "states 4294967295"),
        (_overwrite(41, list(range(41)), bytes(41)), "states 209 bytes"),
        (ZSTD.compress(b"\0\0\0"), "states 3 bytes"),
    ],
)
def test_overwrites_that_do_not_fit_the_tensor_are_refused(frame: bytes, why: str) -> None:
    data = array(OLD)
    with pytest.raises(PayloadError, match=why):
        apply("overwrite", frame, data)
    assert data.tobytes() == OLD


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    ("frame", "why"),
    [
        (b"", "damaged"),
        (b"no frame at all", "damaged"),
        (ZSTD.compress(bytes(40))[:-1], "damaged"),
        (ZSTD.compress(bytes(40)) + b"x", "unused data"),
        (ZSTD.compress(bytes(40)) * 2, "unused data"),
        (
            zstandard.ZstdCompressor(write_content_size=False).compress(bytes(40)),
            "states 18446744073709551615",
        ),
        (ZSTD.compress(bytes(1 << 20)), "states 1048576 bytes"),
        (b"\x50\x2a\x4d\x18" + (40).to_bytes(4, "little") + bytes(40), "decompressed 0 bytes"),
        (b"\x50\x2a\x4d\x18" + (1 << 30).to_bytes(4, "little"), "states 1073741824 bytes"),
    ],
)
def test_frames_are_measured_before_they_take_memory(encoding: DiskEncoding, frame: bytes, why: str) -> None:
    data = array(OLD)
    with pytest.raises(PayloadError, match=why):
        apply(encoding, frame, data)
    assert data.tobytes() == OLD


def test_a_frame_that_needs_a_dictionary_is_refused() -> None:
    samples: list[bytes | bytearray | memoryview] = [bytes([k]) * 100 + bytes(range(100)) for k in range(100)]
    dictionary = zstandard.train_dictionary(1024, samples)
    frame = zstandard.ZstdCompressor(dict_data=dictionary).compress(bytes(40))
    with pytest.raises(PayloadError, match="needs a dictionary"):
        apply("xor", frame, array(OLD))


def test_positions_of_four_bytes_have_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the memory of a small machine would be needed to see it at four gibibytes."""
    monkeypatch.setattr(encodings, "_TOO_LARGE", 40)
    with pytest.raises(OutputError, match=r"Tensor 'w' is too large.*\n.*40 bytes.*\n.*xor"):
        encode("overwrite", "w", array(OLD), array(bytes(40)))
    assert encode("xor", "w", array(OLD), array(bytes(40)))
    assert encode("overwrite", "w", array(OLD[:39]), array(bytes(39)))
