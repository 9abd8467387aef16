"""Other lossless coders of arrays, for codec.py to measure deltaweights beside.

    pip install lmzip==1.3.0 z4ai==0.2.0 zipnn==0.5.4 torch pcodec==1.1.0 openzl==0.3.0 moonclip==0.3.1

Each is used in the way that was found to be the fastest, or much smaller, and with as few checks as it lets
itself be; its class says how. Those that are not installed are left out.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import numpy as np
import zstandard
from numpy.typing import NDArray

Bytes: TypeAlias = NDArray[np.uint8]

ITEMSIZES = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1}


class Peer(Protocol):
    """A coder of arrays, one thread."""

    name: str

    def encode(self, base: Bytes | None, target: Bytes, dtype: str) -> list[bytes]:
        """The target's bytes coded against the base's, or alone."""

    def decode(self, base: Bytes | None, coded: list[bytes], dtype: str, out: Bytes) -> Bytes:
        """The target's bytes: ``out``, filled, or an array of the peer's own."""


def find_peers(*, alone: bool) -> list[Peer]:
    """Those that are installed and code a target with a base, or alone."""
    with_base: list[Callable[[], Peer]] = [Planes, ZipNN, Lmzip, Z4ai, Pcodec, OpenZL]
    without: list[Callable[[], Peer]] = [Zstd, ZipNN, Lmzip, Z4ai, Pcodec, OpenZL]
    found = []
    for make in without if alone else with_base:
        try:
            found.append(make())
        except ImportError:
            continue
    return found


def _words(data: Bytes, dtype: str) -> NDArray[Any]:
    return data.view(f"u{ITEMSIZES[dtype]}")


class Planes:
    """XOR, byte planes, zstd-3: what BitX does. Pieces of 1 MiB, which stay in a core's cache."""

    name = "XOR + planes + zstd-3"
    _piece = 1 << 20

    def __init__(self) -> None:
        self._encoder, self._decoder = zstandard.ZstdCompressor(3), zstandard.ZstdDecompressor()

    def encode(self, base: Bytes | None, target: Bytes, dtype: str) -> list[bytes]:
        assert base is not None
        width, coded = ITEMSIZES[dtype], []
        for start in range(0, len(target), self._piece):
            piece = slice(start, start + self._piece)
            for plane in (base[piece] ^ target[piece]).reshape(-1, width).T:
                coded.append(self._encoder.compress(np.ascontiguousarray(plane).data))
        return coded

    def decode(self, base: Bytes | None, coded: list[bytes], dtype: str, out: Bytes) -> Bytes:
        assert base is not None
        width, planes = ITEMSIZES[dtype], iter(coded)
        for start in range(0, len(out), self._piece):
            piece = slice(start, start + self._piece)
            elements = out[piece].reshape(-1, width)
            for byte in range(width):
                elements[:, byte] = np.frombuffer(self._decoder.decompress(next(planes)), np.uint8)
            out[piece] ^= base[piece]
        return out


class Zstd:
    """zstd-1 over the target."""

    name = "zstd-1"

    def encode(self, base: Bytes | None, target: Bytes, dtype: str) -> list[bytes]:
        return [zstandard.compress(target.data, 1)]

    def decode(self, base: Bytes | None, coded: list[bytes], dtype: str, out: Bytes) -> Bytes:
        return np.frombuffer(zstandard.decompress(coded[0]), np.uint8)


class ZipNN:
    """ZipNN, of the XOR where there is a base. (It imports torch: a second or two of each process.)"""

    name = "ZipNN"

    def __init__(self) -> None:
        warnings.simplefilter("ignore")  # torch's, of its own deprecations
        import zipnn

        self._make = zipnn.ZipNN

    def _coder(self, dtype: str) -> Any:
        names = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
        if dtype not in names:
            raise ValueError(f"takes no {dtype} but as torch tensors")
        return self._make(bytearray_dtype=names[dtype], input_format="byte", threads=1)

    def encode(self, base: Bytes | None, target: Bytes, dtype: str) -> list[bytes]:
        data = target if base is None else base ^ target
        return [bytes(self._coder(dtype).compress(data.tobytes()))]

    def decode(self, base: Bytes | None, coded: list[bytes], dtype: str, out: Bytes) -> Bytes:
        found = np.frombuffer(self._coder(dtype).decompress(coded[0]), np.uint8)
        return found if base is None else np.bitwise_xor(found, base, out=out)


class Lmzip:
    """lmzip's chunk coder, as its archives call it, without their checksums; chunks of 8 MiB."""

    name = "lmzip"
    _chunk = 8 << 20
    _head = struct.Struct("<BB")

    def __init__(self) -> None:
        from lmz import codec, planner

        self._codec, self._planner = codec, planner

    def encode(self, base: Bytes | None, target: Bytes, dtype: str) -> list[bytes]:
        width = ITEMSIZES[dtype]
        kind = self._planner.KIND_BF16 if dtype == "BF16" else self._planner.KIND_BYTES
        coded = []
        for start in range(0, len(target), self._chunk):
            part = target[start : start + self._chunk].data
            if base is None:
                pieces, method, flags, _ = self._codec.encode_chunk(part, width, 1, False, kind=kind)
            else:
                before = base[start : start + self._chunk].data
                pieces, flags, _ = self._codec.encode_delta(part, before, width, 1, False, kind=kind)
                method = 0
            coded.append(self._head.pack(method, flags) + b"".join(pieces))
        return coded

    def decode(self, base: Bytes | None, coded: list[bytes], dtype: str, out: Bytes) -> Bytes:
        width = ITEMSIZES[dtype]
        for index, chunk in enumerate(coded):
            part = slice(index * self._chunk, (index + 1) * self._chunk)
            method, flags = self._head.unpack_from(chunk)
            data, size = memoryview(chunk)[self._head.size :], len(out[part])
            if base is None:
                found = self._codec.decode_chunk(data, method, width, flags, size)
            else:
                found = self._codec.decode_delta(data, width, flags, size, base[part].data)
            out[part] = np.frombuffer(found, np.uint8)
        return out


class Z4ai:
    """z4ai's delta, or its coder alone."""

    name = "z4ai"

    def __init__(self) -> None:
        import z4ai

        self._z4ai = z4ai

    def encode(self, base: Bytes | None, target: Bytes, dtype: str) -> list[bytes]:
        code = {"BF16": "bf16", "F16": "fp16", "F32": "fp32", "F8_E4M3": "fp8_e4m3"}[dtype]
        if base is None:
            return [self._z4ai.compress(target.tobytes(), dtype=code, threads=1)]
        return [self._z4ai.compress_delta(target.tobytes(), base.tobytes(), dtype=code, threads=1)]

    def decode(self, base: Bytes | None, coded: list[bytes], dtype: str, out: Bytes) -> Bytes:
        if base is None:
            return np.frombuffer(self._z4ai.decompress(coded[0]), np.uint8)
        return np.frombuffer(self._z4ai.decompress_delta(coded[0], base.tobytes()), np.uint8)


class Pcodec:
    """pcodec, of the bits' integer difference where there is a base; alone, F16 and F32 as floats."""

    name = "pcodec"

    def __init__(self) -> None:
        from pcodec import ChunkConfig, standalone

        self._config, self._coder = ChunkConfig(enable_8_bit=True), standalone

    def encode(self, base: Bytes | None, target: Bytes, dtype: str) -> list[bytes]:
        if base is not None:
            values = _words(target, dtype) - _words(base, dtype)
        else:
            values = target.view({"F16": "f2", "F32": "f4"}.get(dtype, f"u{ITEMSIZES[dtype]}"))
        return [self._coder.simple_compress(values, self._config)]

    def decode(self, base: Bytes | None, coded: list[bytes], dtype: str, out: Bytes) -> Bytes:
        values: NDArray[Any] = self._coder.simple_decompress(coded[0])
        if base is None:
            return values.view(np.uint8)
        np.add(values, _words(base, dtype), out=_words(out, dtype))
        return out


class OpenZL:
    """OpenZL's ``Entropy`` over byte planes: of the zigzagged integer difference where there is a base; alone
    with exponents apart from the other bits in BF16 and F32. The smallest of the graphs tried."""

    name = "OpenZL"

    def __init__(self) -> None:
        from openzl import ext

        self._zl = ext

    def encode(self, base: Bytes | None, target: Bytes, dtype: str) -> list[bytes]:
        compressor = self._zl.Compressor()
        compressor.set_parameter(self._zl.CParam.FormatVersion, self._zl.MAX_FORMAT_VERSION)
        compressor.select_starting_graph(self._graph(compressor, dtype, base is None))
        context = self._zl.CCtx()
        context.ref_compressor(compressor)
        values = _words(target, dtype)
        if base is not None:
            values = values - _words(base, dtype)
        return [context.compress([self._zl.Input(self._zl.Type.Numeric, values)])]

    def _graph(self, compressor: Any, dtype: str, alone: bool) -> Any:
        nodes = self._zl.nodes
        entropy = self._zl.graphs.Entropy()(compressor)
        planes = nodes.TransposeSplit()(compressor, entropy)
        if alone and dtype == "BF16":
            return nodes.BFloat16Deconstruct()(compressor, sign_frac=entropy, exponent=entropy)
        if alone and dtype == "F32":
            return nodes.Float32Deconstruct()(compressor, sign_frac=planes, exponent=entropy)
        split = nodes.ConvertNumToStructLE()(compressor, planes)
        return split if alone else nodes.Zigzag()(compressor, split)

    def decode(self, base: Bytes | None, coded: list[bytes], dtype: str, out: Bytes) -> Bytes:
        (output,) = self._zl.DCtx().decompress(coded[0])
        values = output.content.as_nparray().view(f"u{ITEMSIZES[dtype]}")
        if base is None:
            return np.array(values).view(np.uint8)
        np.add(values, _words(base, dtype), out=_words(out, dtype))
        return out
