"""The case that named this project, rehearsed: a fine-tune of Qwen2.5-72B, with a Hub on loopback.

The Hub, in a process of its own, serves a base with Qwen2.5-72B's 963 tensors (145 GB) in 37 shards, and a
target of the same shapes in 41 and in another order. Their bytes are made when they are asked for (qwen.py):
nothing of that size is ever on disk. Then these run, as a user would type them:

  diff           deltaweights diff BASE TARGET -o delta     base and target both on the Hub
  verify --base  deltaweights verify delta --base BASE      rebuilds in memory, writes nothing

With --rank, the target is the base with an adapter merged, and both are folders: diff reads tensors several
times to find one, which it does not do over a network.

Figures: memory at most 768 MiB; disk at most the delta and 8 GiB (at smaller scales that part of it); at most
1.05 times as many bytes fetched as are needed, and for diff 1.5 times, since what it reads of the base out
of order is read once more for the base's SHA-256; every file's SHA-256 is the one that the Hub publishes.

    python benchmarks/rehearsal.py --scale 1/64
    python benchmarks/rehearsal.py --scale 1/64 --rank 16          an adapter was merged into the target
    nohup python benchmarks/rehearsal.py --scale 1 --folder /somewhere > log 2>&1 &

In /somewhere/rehearsal-1-of-1 there are then results.json, written as results come, and digests.json, which
saves the next run a pass over all bytes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from math import gcd, isqrt
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pairs
import qwen
from children import MIB, Command, deltaweights, finish, print_table, run_measured

ROOT = Path(__file__).parent.parent
REPOS: dict[qwen.Side, str] = {"base": "rehearsal/Qwen2.5-72B", "target": "rehearsal/Kimi-Dev-72B"}

_SEED = 0
_MEMORY = 768 * MIB
_DISK = 8 * pairs.GIB
_FETCHED = {"diff": 1.5, "verify --base": 1.05}
#: Of the target's bytes; to know beforehand whether the disk has room.
_DELTA_SHARE = 0.22

_DIFF, _VERIFY = "diff", "verify --base"
#: The folder of base and target, where adapters are merged: over a network, diff does not look for them.
_INPUTS = "inputs"


# The Hub -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Served:
    """What the Hub's process has done: bytes of files sent, requests of the kind that the Hub counts (not its
    CDN), seconds of CPU time."""

    nbytes: int
    requests: int
    cpu: float


class Hub:
    """A Hub on loopback with base and target, in another process; a context manager.

    Attributes:
        environment: for processes whose Hub it is.
        sizes: bytes of each side's shards.
        digests: the SHA-256 of each of the target's shards, in hex.
    """

    def __init__(self, shrink: int, rank: int, folder: Path) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, end = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(end, shrink, rank, folder), daemon=True)
        self._process.start()
        end.close()
        self.environment: dict[str, str]
        self.sizes: dict[qwen.Side, int]
        self.digests: dict[str, str]
        self.environment, self.sizes, self.digests = self._receive()

    def __enter__(self) -> Hub:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self._pipe.close()
        self._process.join()
        if self._process.exitcode and kind is None:
            raise SystemExit("something went wrong in the Hub's process")

    def served(self) -> Served:
        """Since it started."""
        self._pipe.send("?")
        served: Served = self._receive()
        return served

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            raise SystemExit("the Hub's process has ended") from None


def _serve(pipe: Connection, shrink: int, rank: int, folder: Path) -> None:
    """The Hub's process. It ends when the other end of the pipe does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then goes
    sys.path.append(str(ROOT))
    from tests.hub_server import HubServer

    sides = _make_sides(shrink, rank, folder)
    if rank:
        _write_sides(sides, shrink, folder / _INPUTS)
    with HubServer() as hub, suppress(EOFError):
        for side, shards in sides.items():
            hub.add_repo(REPOS[side], {**shards, **qwen.other_files(side, shards, shrink)})
        sizes = {side: sum(shard.size for shard in shards.values()) for side, shards in sides.items()}
        digests = {name: shard.sha256 for name, shard in sides["target"].items()}
        pipe.send((hub.client_env(folder / "hf-home"), sizes, digests))
        while pipe.recv():
            counted = [request for request in hub.requests() if request.kind != "content"]
            usage = resource.getrusage(resource.RUSAGE_SELF)
            pipe.send(Served(hub.bytes_sent(), len(counted), usage.ru_utime + usage.ru_stime))
    assert not hub.errors, hub.errors
    assert not hub.escapes, hub.escapes


def _make_sides(shrink: int, rank: int, folder: Path) -> dict[qwen.Side, dict[str, qwen.Shard]]:
    pool = qwen.Pool.draw(_SEED)
    sides = {side: qwen.make_shards(side, pool, shrink, rank) for side in REPOS}
    total = sum(shard.size for shards in sides.values() for shard in shards.values())
    say(f"base and target have {total / 1e9:.2f} GB; SHA-256 of their files")
    done, shown = 0, time.monotonic()
    for nbytes in qwen.add_digests(sides, folder / "digests.json"):
        done += nbytes
        if time.monotonic() - shown > 10:
            shown = time.monotonic()
            say(f"SHA-256: {done / total:.0%}")
    return sides


def _write_sides(sides: dict[qwen.Side, dict[str, qwen.Shard]], shrink: int, folder: Path) -> None:
    """Base and target as folders."""
    for side, shards in sides.items():
        (folder / side).mkdir(parents=True, exist_ok=True)
        for name, data in qwen.other_files(side, shards, shrink).items():
            (folder / side / name).write_bytes(data)
        for name, shard in shards.items():
            with open(folder / side / name, "wb") as file:
                for start in range(0, shard.size, MIB):
                    file.write(shard.read(start, min(MIB, shard.size - start)))


# The commands ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """What one command took, and what the Hub did for it meanwhile. Seconds and bytes."""

    wall: float
    cpu: float
    memory: int
    disk: int
    fetched: int
    needed: int
    requests: int
    hub_cpu: float


@dataclass
class Results:
    """All that is printed in the end."""

    scale: str
    cores: int
    steps: dict[str, Step] = field(default_factory=dict)
    rank: int = 0
    target_bytes: int = 0
    delta_bytes: int = 0
    wrong: list[str] = field(default_factory=list)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1))

    @staticmethod
    def load(path: Path) -> Results:
        fields = json.loads(path.read_text())
        fields["steps"] = {name: Step(**step) for name, step in fields["steps"].items()}
        return Results(**fields)


def rehearse(scale: Fraction, folder: Path, *, rank: int = 0, resume: bool) -> Results:
    """Both commands; ``results.json`` has what is known so far.

    Args:
        rank: of the adapter that was merged; 0 where all weights were trained.
        resume: where an earlier run in the same folder has come through `diff`, go on with its delta.
    """
    shrink, delta, saved = shrink_of(scale), folder / "delta", folder / "results.json"
    results = Results(str(scale), len(os.sched_getaffinity(0)), rank=rank)
    if resume and saved.exists() and (delta / "deltaweights.json").exists():
        results = Results.load(saved)
    results.save(saved)
    with Hub(shrink, rank, folder) as hub:
        os.environ.clear()
        os.environ.update(hub.environment, TMPDIR=str(folder / "tmp"))
        (folder / "tmp").mkdir(exist_ok=True)
        results.target_bytes = hub.sizes["target"]
        base, target = (str(folder / _INPUTS / side) if rank else repo for side, repo in REPOS.items())
        if _DIFF not in results.steps:
            shutil.rmtree(delta, ignore_errors=True)
            command = deltaweights("diff", base, target, "-o", delta)
            results.steps[_DIFF] = _run(_DIFF, command, hub, folder, sum(hub.sizes.values()))
            results.delta_bytes = sum(path.stat().st_size for path in delta.rglob("*") if path.is_file())
            results.save(saved)
        command = deltaweights("verify", delta, "--base", base, "--json")
        results.steps[_VERIFY] = _run(_VERIFY, command, hub, folder, hub.sizes["base"])
        results.wrong = _check_digests(delta, json.loads(_output(folder)), hub)
        results.save(saved)
    return results


def _run(name: str, command: Command, hub: Hub, folder: Path, needed: int) -> Step:
    """Run a command and measure it; what it prints is shown when it has ended."""
    say(f"{name} begins")
    before, inputs = hub.served(), bytes_below(folder / _INPUTS)
    with watch_disk(folder) as disk, open(folder / "tmp" / "output", "wb") as output:
        try:
            usage = run_measured(command, output)
        finally:
            print(_output(folder), flush=True)
    after = hub.served()
    return Step(
        usage.wall,
        usage.cpu,
        usage.peak,
        disk.peak - inputs,
        after.nbytes - before.nbytes,
        needed,
        after.requests - before.requests,
        after.cpu - before.cpu,
    )


def _output(folder: Path) -> str:
    return (folder / "tmp" / "output").read_text()


def _check_digests(delta: Path, report: dict[str, Any], hub: Hub) -> list[str]:
    """What `verify`, which has found nothing wrong, cannot know: whether the SHA-256s of what it rebuilt are
    those that the Hub's process worked out from the bytes themselves."""
    manifest = json.loads((delta / "deltaweights.json").read_text())
    recorded = {file["path"]: file["sha256"] for file in manifest["target"]["files"]}
    wrong = [f"{name} has another SHA-256" for name, sha in hub.digests.items() if recorded.get(name) != sha]
    if report["target_repo"] is None and not (delta.parent / _INPUTS).exists():
        wrong.append("verify did not compare what the target's repository publishes")
    return wrong


class _Disk:
    peak = 0


@contextmanager
def watch_disk(folder: Path) -> Iterator[_Disk]:
    """Within the block, look four times a second how many bytes the files below ``folder`` take."""
    disk, ended = _Disk(), threading.Event()

    def watch() -> None:
        is_last = False
        while not is_last:
            is_last = ended.wait(0.25)
            disk.peak = max(disk.peak, bytes_below(folder))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield disk
    finally:
        ended.set()
        thread.join()


def bytes_below(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # renamed or deleted just now
                total += 512 * os.lstat(os.path.join(root, name)).st_blocks
    return total


# What is said ------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """A line of progress, with the time."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def rows_of(results: Results) -> list[list[str]]:
    steps = list(results.steps.values())
    disk = results.delta_bytes + _disk_limit(results)
    return [
        [f"Qwen2.5-72B at scale {results.scale}, {results.cores} cores", *results.steps, "limit"],
        ["wall time, s", *(f"{step.wall:.1f}" for step in steps), ""],
        ["CPU time, s", *(f"{step.cpu:.1f}" for step in steps), ""],
        ["CPU time of the Hub's process, s", *(f"{step.hub_cpu:.1f}" for step in steps), ""],
        ["GB of target per second", *(f"{results.target_bytes / step.wall / 1e9:.2f}" for step in steps), ""],
        ["GB fetched", *(f"{step.fetched / 1e9:.2f}" for step in steps), ""],
        ["fetched / needed", *(f"{step.fetched / step.needed:.3f}" for step in steps), _limits()],
        ["requests to the Hub", *(f"{step.requests}" for step in steps), ""],
        ["peak memory, MiB", *(f"{step.memory / MIB:.0f}" for step in steps), f"{_MEMORY // MIB}"],
        ["peak disk, GiB", *(f"{step.disk / pairs.GIB:.2f}" for step in steps), f"{disk / pairs.GIB:.2f}"],
    ]


def _limits() -> str:
    return " and ".join(map(str, _FETCHED.values()))


def find_missed(results: Results) -> list[str]:
    """The figures that do not hold, in words."""
    missed = list(results.wrong)
    for name, step in results.steps.items():
        if step.memory > _MEMORY:
            missed.append(f"{name} takes more than {_MEMORY // MIB} MiB")
        if step.disk > results.delta_bytes + _disk_limit(results):
            missed.append(f"{name} takes more disk than the delta and {_disk_limit(results) // MIB} MiB")
        if step.fetched > _FETCHED[name] * step.needed:
            missed.append(f"{name} fetches more than {_FETCHED[name]} times what it needs")
    return missed


def _disk_limit(results: Results) -> int:
    """Beyond the delta, in bytes."""
    return int(_DISK * Fraction(results.scale))


def shrink_of(scale: Fraction) -> int:
    """By what the widths are to be divided."""
    shrink = isqrt(scale.denominator)
    if scale != Fraction(1, shrink**2) or gcd(qwen.HIDDEN, qwen.FFN, qwen.KV, qwen.VOCAB) % shrink:
        raise ValueError("the scale is 1, 1/4, 1/16, 1/64, … 1/16384")
    return shrink


@contextmanager
def work_folder(chosen: Path | None, scale: Fraction, rank: int = 0) -> Iterator[Path]:
    """A folder with room for the delta: in the chosen one, to stay; or else a new one, deleted in the end."""
    nbytes = int((_DELTA_SHARE + (2 if rank else 0)) * qwen.NBYTES * scale)
    if chosen is None:
        with pairs.work_folder(None, nbytes) as folder:
            yield folder
        return
    folder = chosen / f"rehearsal-1-of-{scale.denominator}{f'-rank-{rank}' if rank else ''}"
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free + bytes_below(folder)
    if free < nbytes:
        raise SystemExit(f"{chosen} has {free / 1e9:.1f} GB free, {nbytes / 1e9:.1f} are needed")
    yield folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--scale", type=Fraction, default=Fraction(1, 64), help="1, 1/4, 1/16, …; default 1/64"
    )
    parser.add_argument("--rank", type=int, default=0, help="merge an adapter of this rank, at most 16")
    parser.add_argument(
        "--folder", type=Path, help="for delta, digests, results; /dev/shm or disk, and deleted"
    )
    parser.add_argument("--keep", action="store_true", help="keep the delta")
    parser.add_argument("--resume", action="store_true", help="go on with an earlier run's delta")
    options = parser.parse_args()
    if not 0 <= options.rank <= 16:
        parser.error("--rank is 0 to 16")
    if (options.keep or options.resume) and not options.folder:
        parser.error("--keep and --resume need --folder")
    try:
        shrink_of(options.scale)
    except ValueError as error:
        parser.error(str(error))
    with work_folder(options.folder, options.scale, options.rank) as folder:
        results = rehearse(options.scale, folder.resolve(), rank=options.rank, resume=options.resume)
        for name in ("hf-home", "tmp", _INPUTS, *(() if options.keep else ("delta",))):
            shutil.rmtree(folder / name, ignore_errors=True)
    print_table(rows_of(results))
    target, delta = results.target_bytes, results.delta_bytes
    print(
        f"The delta takes {delta / 1e9:.2f} GB, {delta / target:.1%} of the target's {target / 1e9:.2f} GB."
    )
    finish(find_missed(results))


if __name__ == "__main__":
    main()
