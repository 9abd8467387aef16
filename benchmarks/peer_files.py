"""The peers as programs that code one safetensors file against another of the same layout, on all cores.

For processes.py to measure: BF16 only, no checks.

    python benchmarks/peer_files.py NAME prepare BASE DELTA
    python benchmarks/peer_files.py NAME encode BASE TARGET DELTA
    python benchmarks/peer_files.py NAME decode BASE DELTA OUT
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from children import Command
from peers import Bytes, Lmzip, OpenZL, Pcodec, Peer, Planes, ZipNN

_CORES = len(os.sched_getaffinity(0))
_PIECE = 8 << 20  # bytes of a file that one thread codes at a time
_LENGTH = struct.Struct("<I")


class FileCoder(ABC):
    """A coder of safetensors files, on all cores."""

    def prepare(self, base: Path, delta: Path) -> None:  # noqa: B027 (most have nothing to prepare)
        """What is done before ``encode`` and not counted."""

    @abstractmethod
    def encode(self, base: Path, target: Path, delta: Path) -> None:
        """Write the delta, a file or a folder."""

    @abstractmethod
    def decode(self, base: Path, delta: Path, out: Path) -> None:
        """Write what was ``target`` to ``out``."""


class Pieces(FileCoder):
    """The target's header as it is, then pieces of 8 MiB, each coded by a thread."""

    def __init__(self, make: Callable[[], Peer]) -> None:
        make()  # is it installed?
        self._make = make

    def encode(self, base: Path, target: Path, delta: Path) -> None:
        old, new = _map(base), _map(target)
        header = _header(new)

        def encode_piece(start: int) -> bytes:
            piece = slice(start, start + _PIECE)
            return _pack(self._make().encode(old[piece], new[piece], "BF16"))

        with ThreadPoolExecutor(_CORES) as threads, delta.open("wb") as file:
            file.write(_pack([header]))
            for coded in threads.map(encode_piece, range(len(header), len(new), _PIECE)):
                file.write(_pack([coded]))

    def decode(self, base: Path, delta: Path, out: Path) -> None:
        old = _map(base)
        head, *pieces = _unpack(_map(delta).data)
        with ThreadPoolExecutor(_CORES) as threads, out.open("wb", buffering=0) as file:
            file.write(head)

            def decode_piece(start: int, coded: bytes) -> None:
                piece = old[start : start + _PIECE]
                room = np.empty(len(piece), np.uint8)
                found = self._make().decode(piece, _unpack(coded), "BF16", room)
                os.pwrite(file.fileno(), found.data, start)

            for _ in threads.map(decode_piece, range(len(head), len(old), _PIECE), pieces):
                pass


class Z4aiFiles(FileCoder):
    """z4ai's coder of checkpoints."""

    def __init__(self) -> None:
        from z4ai import model_delta

        self._delta = model_delta

    def encode(self, base: Path, target: Path, delta: Path) -> None:
        self._delta.compress_file(str(target), str(base), str(delta), threads=_CORES)

    def decode(self, base: Path, delta: Path, out: Path) -> None:
        self._delta.decompress_file(str(delta), str(base), str(out))


class Moonclip(FileCoder):
    """moonclip, zstd-1. It takes bases from a store of its own only, where ``prepare`` puts this one,
    uncompressed. The delta is what the store grows by."""

    def __init__(self) -> None:
        os.environ["MOONCLIP_THREADS"] = str(_CORES)
        from moonclip import MoonclipManager

        self._manager = MoonclipManager

    def _open(self, store: Path, level: int = 1) -> Any:
        options = {"compression_level": level, "async_save": False, "keep_base_in_memory": False}
        return self._manager(str(store), **options)

    def prepare(self, base: Path, delta: Path) -> None:
        self._open(delta, level=0).save_tensors(0, _tensors(_map(base)))

    def encode(self, base: Path, target: Path, delta: Path) -> None:
        new = _map(target)
        self._open(delta).save_tensors(1, _tensors(new))
        (delta / "header").write_bytes(_header(new))

    def decode(self, base: Path, delta: Path, out: Path) -> None:
        _, tensors = self._open(delta).load_latest()
        header = (delta / "header").read_bytes()
        with out.open("wb", buffering=0) as file:
            file.write(header)
            for name, entry in _entries(header):
                os.pwrite(file.fileno(), tensors[name], len(header) + entry["data_offsets"][0])


FILE_CODERS: dict[str, Callable[[], FileCoder]] = {
    Planes.name: lambda: Pieces(Planes),
    ZipNN.name: lambda: Pieces(ZipNN),
    Lmzip.name: lambda: Pieces(Lmzip),
    Pcodec.name: lambda: Pieces(Pcodec),
    OpenZL.name: lambda: Pieces(OpenZL),
    "moonclip": Moonclip,
    "z4ai": Z4aiFiles,
}


def _pack(pieces: list[bytes]) -> bytes:
    """Pieces behind their lengths; :func:`_unpack` gives them back."""
    return b"".join(part for piece in pieces for part in (_LENGTH.pack(len(piece)), piece))


def _unpack(packed: bytes | memoryview) -> list[bytes]:
    view, start, pieces = memoryview(packed), 0, []
    while start < len(view):
        (length,) = _LENGTH.unpack_from(view, start)
        start += _LENGTH.size + length
        pieces.append(bytes(view[start - length : start]))
    return pieces


def _map(file: Path) -> Bytes:
    return np.memmap(file, np.uint8, "r")


def _header(file: Bytes) -> bytes:
    """The length and the header of a safetensors file."""
    return file[: 8 + int.from_bytes(file[:8].tobytes(), "little")].tobytes()


def _entries(header: bytes) -> list[tuple[str, dict[str, Any]]]:
    """The header's tensors: name, and dtype, shape and offsets."""
    return [(name, entry) for name, entry in json.loads(header[8:]).items() if name != "__metadata__"]


def _tensors(file: Bytes) -> dict[str, tuple[list[int], str, bytes]]:
    """The BF16 tensors of a file, as moonclip takes them."""
    header = _header(file)
    data, found = file[len(header) :], {}
    for name, entry in _entries(header):
        found[name] = (entry["shape"], "bf16", data[slice(*entry["data_offsets"])].tobytes())
    return found


def command(name: str, verb: str, *files: Path) -> Command:
    """The command line that prepares, encodes or decodes with a file coder."""
    return [sys.executable, __file__, name, verb, *files]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("name", choices=FILE_CODERS)
    parser.add_argument("verb", choices=("prepare", "encode", "decode"))
    parser.add_argument("files", type=Path, nargs="+")
    options = parser.parse_args()
    try:
        coder = FILE_CODERS[options.name]()
    except ImportError as error:
        parser.exit(1, f"{options.name} is not installed: {error}\n")
    getattr(coder, options.verb)(*options.files)


if __name__ == "__main__":
    main()
