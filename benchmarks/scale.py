"""What large jobs cost: a checkpoint of 1 TB on 16 nodes, and 10,000 fine-tunes of one base.

    python benchmarks/scale.py [--mib 256]

Small jobs run for real, against a store with latency and a bandwidth that all of its connections share (in
memory, as a file system of fsspec). They say how many requests and bytes a job takes, and how long a byte
takes to code. The rest is calculated from that and from what is assumed of nodes and models; it is printed
apart. The calculation is first held against the small jobs. Figure: off by at most a third there.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any, NamedTuple

import fsspec  # type: ignore[import-untyped]
import pairs
from children import MIB, finish, print_table
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem  # type: ignore[import-untyped]
from fsspec.spec import AbstractBufferedFile  # type: ignore[import-untyped]

from deltaweights import apply_delta, make_delta
from deltaweights.workers import usable_cores

#: How far off the calculation may be for the small jobs.
_MOST_OFF = 1 / 3

#: The store that small jobs run against: seconds to the first byte, bytes a second.
_LATENCY, _BANDWIDTH = 0.02, 100e6

#: Ranges that one job fetches at once, from each of two sources.
_CONNECTIONS = 8


class SlowStore(MemoryFileSystem):  # type: ignore[misc]
    """fsspec's file system in memory: requests take a while, and all share one line."""

    protocol = "slow"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    async_impl = True  # which says that many threads may use it at once

    latency, bandwidth = 0.0, float("inf")
    requests = fetched = sent = 0
    _lock = threading.Lock()
    _free_at = 0.0

    @classmethod
    def passed(cls, *, fetched: int = 0, sent: int = 0) -> None:
        """One request, with so many bytes."""
        with cls._lock:
            cls.requests += 1
            cls.fetched += fetched
            cls.sent += sent
            begin = max(time.monotonic() + cls.latency, cls._free_at)
            cls._free_at = end = begin + (fetched + sent) / cls.bandwidth
        time.sleep(max(0.0, end - time.monotonic()))

    def find(self, path: str, *args: Any, **more: Any) -> Any:
        self.passed()
        return super().find(path, *args, **more)

    def info(self, path: str, **more: Any) -> Any:
        self.passed()
        return super().info(path, **more)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **more: Any) -> None:
        self.passed(sent=len(value))
        path = self._strip_protocol(path)
        self.store[path] = MemoryFile(self, path, value)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("slow://").strip("/") if path.strip("/") else ""

    def _open(self, path: str, mode: str = "rb", block_size: Any = None, **more: Any) -> Any:
        there = self.store.get(path)
        if there is None and "r" in mode:
            raise FileNotFoundError(path)
        size = there.getbuffer().nbytes if there and "r" in mode else None
        more = {name: value for name, value in more.items() if name in ("autocommit", "cache_type")}
        return _SlowFile(self, path, mode.replace("x", "w"), block_size or "default", size=size, **more)


class _SlowFile(AbstractBufferedFile):  # type: ignore[misc]
    """A file, of which each range and each part is a request."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        data = bytes(self.fs.store[self.path].getbuffer()[start:end])
        SlowStore.passed(fetched=len(data))
        return data

    def _initiate_upload(self) -> None:
        self._parts: list[bytes] = []

    def _upload_chunk(self, final: bool = False) -> bool:
        self._parts.append(self.buffer.getvalue())
        SlowStore.passed(sent=len(self._parts[-1]))
        if final and self.autocommit:
            self.commit()
        return True

    def commit(self) -> None:
        SlowStore.passed()
        self.fs.store[self.path] = MemoryFile(self.fs, self.path, b"".join(self._parts))

    def discard(self) -> None:
        self._parts = []


@dataclass(frozen=True)
class Cost:
    """What one job took, or a byte of a target takes."""

    seconds: float
    requests: float
    fetched: float
    sent: float


def run(action: Callable[[], object], *, latency: float, bandwidth: float) -> Cost:
    """Run a job against the store."""
    SlowStore.latency, SlowStore.bandwidth = latency, bandwidth
    SlowStore.requests = SlowStore.fetched = SlowStore.sent = 0
    began = time.monotonic()
    action()
    seconds = time.monotonic() - began
    return Cost(seconds, SlowStore.requests, SlowStore.fetched, SlowStore.sent)


def expected(quick: Cost, *, latency: float, bandwidth: float) -> float:
    """Seconds of a job against a slow store, from those against a quick one: coding goes on while bytes are
    under way."""
    line = (quick.fetched + quick.sent) / bandwidth
    waits = quick.requests * latency / _CONNECTIONS
    return max(quick.seconds, line + waits)


def jobs(size: str) -> dict[str, Callable[[str], object]]:
    """Small jobs, by their verb; each writes to a place whose name it is given."""
    base, target, delta = (f"slow://{name}-{size}" for name in ("base", "target", "delta"))
    return {
        "diff": lambda out: make_delta(base, target, f"{delta}-{out}"),
        "apply": lambda out: apply_delta(f"{delta}-quick", f"slow://out-{size}-{out}", base=base),
    }


def measure(sizes: dict[str, int]) -> tuple[dict[str, Cost], list[str]]:
    """Run small jobs of two sizes, quick and slow. Returns what a further byte costs, and where the
    calculation is wrong."""
    costs, missed = {}, []
    rows = [["measured", "quick", "slow", "calculated", "requests", "fetched", "sent"]]
    for verb in ("diff", "apply"):
        found = {}
        for size, nbytes in sizes.items():
            job = jobs(size)[verb]
            found[size] = quick = run(partial(job, "quick"), latency=0, bandwidth=float("inf"))
            slow = run(partial(job, "slow"), latency=_LATENCY, bandwidth=_BANDWIDTH)
            told = expected(quick, latency=_LATENCY, bandwidth=_BANDWIDTH)
            if abs(told / slow.seconds - 1) > _MOST_OFF:
                missed.append(f"{verb} took {slow.seconds:.1f} s and was to take {told:.1f} s")
            seconds = [f"{value:.2f} s" for value in (quick.seconds, slow.seconds, told)]
            sent = [f"{amount / 1e6:.0f} MB" for amount in (slow.fetched, slow.sent)]
            rows.append([f"{verb}, {nbytes / MIB:.0f} MiB", *seconds, str(slow.requests), *sent])
        costs[verb] = further(*(Counted(found[size], sizes[size]) for size in sizes))
    print(f"Small jobs on {usable_cores()} cores; slow: {_LATENCY * 1000:.0f} ms to the first byte, ", end="")
    print(f"{_BANDWIDTH / 1e6:.0f} MB/s for all connections.\n")
    print_table(rows)
    return costs, missed


class Counted(NamedTuple):
    """What a job of so many bytes took."""

    cost: Cost
    nbytes: int


def further(small: Counted, large: Counted) -> Cost:
    """What the bytes cost that the large job has more, as if they were all of a byte."""
    more = large.nbytes - small.nbytes
    pairs_of = zip(astuple(small.cost), astuple(large.cost), strict=True)
    return Cost(*((after - before) / more for before, after in pairs_of))


@dataclass(frozen=True)
class Node:
    """What is assumed of a machine and its line to the store: bytes a second, seconds to the first byte."""

    bandwidth: float = 25e9 / 8
    latency: float = 0.03
    times_as_fast: float = 2.0


def job_seconds(cost: Cost, nbytes: float, node: Node, *, fetched: float) -> float:
    """Seconds for a target of so many bytes on a node, of which so many are fetched for each."""
    line = (fetched + cost.sent) / node.bandwidth
    waits = cost.requests * node.latency / _CONNECTIONS
    return max(cost.seconds / node.times_as_fast, line + waits) * nbytes


def one_large(costs: dict[str, Cost], node: Node) -> None:
    """A checkpoint of 1 TB, a task a shard, on 16 nodes."""
    nbytes, nodes, shards = 1e12, 16, 208
    rows = [["calculated: 1 TB, 208 shards", "16 nodes", "1 node", "requests", "fetched", "sent"]]
    for name, cost in costs.items():
        alone = job_seconds(cost, nbytes, node, fetched=cost.fetched)
        busiest = -(-shards // nodes) / shards
        times = [f"{seconds / 60:.1f} min" for seconds in (alone * busiest, alone)]
        amounts = [f"{amount * nbytes / 1e12:.2f} TB" for amount in (cost.fetched, cost.sent)]
        rows.append([name, *times, f"{cost.requests * nbytes:,.0f}", *amounts])
    print_table(rows)


def many_small(costs: dict[str, Cost], node: Node) -> None:
    """10,000 fine-tunes of one base, on 16 nodes, with and without copies of the base on each."""
    count, nbytes, nodes = 10_000, 15e9, 16
    rows = [["calculated: 10,000 of 15 GB", "16 nodes", "node-hours", "requests", "fetched", "sent"]]
    for name, cost in costs.items():
        for is_cached in (False, True):
            fetched = cost.fetched - is_cached  # diff and apply both read all of the base
            hours = job_seconds(cost, nbytes, node, fetched=fetched) * count / 3600
            requests = cost.requests * (fetched + cost.sent) / (cost.fetched + cost.sent)
            total = fetched * nbytes * count + is_cached * nbytes * nodes
            rows.append(
                [
                    f"{name}, {'with' if is_cached else 'without'} --cache",
                    f"{hours / nodes:.1f} h",
                    f"{hours:.0f}",
                    f"{requests * nbytes * count:,.0f}",
                    f"{total / 1e12:,.0f} TB",
                    f"{cost.sent * nbytes * count / 1e12:,.0f} TB",
                ]
            )
    print_table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--mib", type=int, default=384, help="size of the larger of the small jobs")
    options = parser.parse_args()
    fsspec.register_implementation("slow", SlowStore)
    sizes = {}
    for size, mib in (("small", options.mib // 3), ("large", options.mib)):
        with pairs.work_folder(None, 2 * mib * MIB) as work:
            pair = pairs.Pair(work)
            pairs.make_in_child(pair, mib * MIB, shards=2, hidden=4096)
            for side in (pair.base, pair.target):
                for path in side.iterdir():
                    SlowStore().pipe_file(f"/{side.name}-{size}/{path.name}", path.read_bytes())
            sizes[size] = sum(path.stat().st_size for path in pair.target.iterdir())
    costs, missed = measure(sizes)
    node = Node()
    print(
        f"Assumed: nodes with {node.bandwidth * 8 / 1e9:.0f} Gbit/s and {node.latency * 1000:.0f} ms to ",
        end="",
    )
    print(
        f"the store, that code {node.times_as_fast:.0f} times as fast as this machine; updates, and so ",
        end="",
    )
    print("deltas, like the measured ones.\n")
    one_large(costs, node)
    many_small(costs, node)
    finish(missed)


if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    main()
