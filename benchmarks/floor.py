"""The least that any ``apply`` must do, for apply.py to measure against.

Reads every file of the base and of the delta, writes as many bytes as the target has into new files, and
hashes each of them with SHA-256: the same bytes in, out and hashed as ``deltaweights apply``, but without
decoding (the bytes written are the base's) and without any check. All cores work: the shards in parallel,
and in each shard one thread reads and writes while another hashes. Memory is a few buffers of 1 MiB,
used again and again.

    python benchmarks/floor.py BASE DELTA OUT
"""

from __future__ import annotations

import argparse
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

_BUFFER = 1 << 20
_BUFFERS = 4


def copy_shard(base: Path, delta: Path, out: Path) -> str:
    """Read ``base`` and ``delta``, write ``out``; returns the SHA-256 of what was written."""
    spare: SimpleQueue[bytearray] = SimpleQueue()
    written: SimpleQueue[memoryview | None] = SimpleQueue()
    for _ in range(_BUFFERS):
        spare.put(bytearray(_BUFFER))
    with ThreadPoolExecutor(1) as hasher:
        digest = hasher.submit(hash_blocks, written, spare)
        try:
            read_and_write(base, delta, out, spare, written)
        finally:
            written.put(None)
    return digest.result()


def hash_blocks(written: SimpleQueue[memoryview | None], spare: SimpleQueue[bytearray]) -> str:
    sha256 = hashlib.sha256()
    while block := written.get():
        sha256.update(block)
        assert isinstance(block.obj, bytearray)
        spare.put(block.obj)
    return sha256.hexdigest()


def read_and_write(
    base: Path,
    delta: Path,
    out: Path,
    spare: SimpleQueue[bytearray],
    written: SimpleQueue[memoryview | None],
) -> None:
    payload = bytearray(_BUFFER)
    files = [os.open(base, os.O_RDONLY), os.open(delta, os.O_RDONLY)]
    files.append(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
    source, coded, sink = files
    size, coded_size = os.fstat(source).st_size, os.fstat(coded).st_size
    read = 0
    for offset in range(0, size, _BUFFER):
        buffer = spare.get()
        block = memoryview(buffer)[: os.preadv(source, [buffer], offset)]
        while read < coded_size * (offset + len(block)) // size:  # the delta at the same pace
            read += os.preadv(coded, [payload], read)
        done = os.pwrite(sink, block, offset)
        assert done == len(block)
        written.put(block)
    for file in files:
        os.close(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name in ("base", "delta", "out"):
        parser.add_argument(name, type=Path)
    options = parser.parse_args()
    options.out.mkdir()
    shards = sorted(options.base.glob("*.safetensors"))
    deltas = sorted(options.delta.glob("*.safetensors"))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as lanes:
        copies = [
            lanes.submit(copy_shard, shard, delta, options.out / shard.name)
            for shard, delta in zip(shards, deltas, strict=True)
        ]
        for shard, copy in zip(shards, copies, strict=True):
            print(copy.result(), shard.name)


if __name__ == "__main__":
    main()
