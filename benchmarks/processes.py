"""Whole processes beside those of the peers (peer_files.py), and beside the least that they must do.

All files are on a memory file system. First, pairs of bf16 checkpoints with the tensors of Qwen2-0.5B:
weights of standard deviation 0.015 to 0.05 by tensor, Laplace updates of 2e-4, then of 1e-5:

  diff, apply   python -m deltaweights, with all their checks
  the peers     python peer_files.py: reads base and target, writes the delta; and back, without checks

in turn, in several rounds (z4ai, which takes minutes, in one). Then, on 2 GiB in four shards and in one, diff
and apply beside floor.py. Before each program as much memory as it fills is written and freed. Printed are
medians; wall and CPU seconds (user + system, all threads) are the whole process's. Figures:

  size    the delta takes 0.255 of the target, and 0.043 at 1e-5
  speed   diff and apply each take less time than any peer
  floor   apply takes 1.4 times as long, diff 3 times

    python benchmarks/processes.py --json processes.json
"""

from __future__ import annotations

import argparse
import filecmp
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import apply
import pairs
from children import Command, Usage, deltaweights, finish, print_table, run_measured
from peer_files import FILE_CODERS, command

_OURS = "deltaweights"
_ONCE = {"z4ai"}
#: The most that the delta may take of the target, by the update's standard deviation.
_SHARES = {2e-4: 0.255, 1e-5: 0.043}
_APPLY, _DIFF = 1.4, 3.0
_SHARDS = (4, 1)


@dataclass
class Result:
    """What one coder took of processes of its own."""

    share: float = 0  # of the target's bytes
    encode: list[Usage] = field(default_factory=list)
    decode: list[Usage] = field(default_factory=list)


def measure(pair: pairs.Pair, rounds: int) -> dict[str, Result]:
    """Every coder on one pair, interleaved. Peers that fail or are missing are reported and left out."""
    results = {name: Result() for name in (_OURS, *FILE_CODERS)}
    for turn in range(rounds):
        for name, result in list(results.items()):
            if turn and name in _ONCE:
                continue
            try:
                run_once(name, pair, result)
            except SystemExit as failure:
                if name == _OURS:
                    raise
                print(f"{name} is left out: {failure}", flush=True)
                del results[name]
    return results


def run_once(name: str, pair: pairs.Pair, result: Result) -> None:
    """Encode and decode; adds a round to the result.

    Raises:
        SystemExit: a process failed, or what came out is not what went in.
    """
    (base,), (target,) = (list(side.glob("*.safetensors")) for side in (pair.base, pair.target))
    delta, out = pair.root / "delta", pair.root / "out"
    remove(delta, out)
    if name == _OURS:
        encode: Command = deltaweights("diff", pair.base, pair.target, "-o", delta, "-q")
        decode: Command = deltaweights("apply", delta, "--base", pair.base, "-o", out, "-q")
    else:
        encode, decode = (
            command(name, "encode", base, target, delta),
            command(name, "decode", base, delta, out),
        )
        run_measured(command(name, "prepare", base, delta))
    before = bytes_in(delta)
    result.encode.append(run_fresh(encode, pair))
    result.share = (bytes_in(delta) - before) / target.stat().st_size
    result.decode.append(run_fresh(decode, pair))
    rebuilt = out / target.name if name == _OURS else out
    if not filecmp.cmp(rebuilt, target, shallow=False):
        raise SystemExit("what came out is not what went in")
    remove(delta, out)


def run_fresh(program: Command, pair: pairs.Pair) -> Usage:
    apply.touch_memory(pair.root / "touched", bytes_in(pair.target))
    return run_measured(program)


def remove(*places: Path) -> None:
    for place in places:
        if place.is_dir():
            shutil.rmtree(place)
        place.unlink(missing_ok=True)


def bytes_in(place: Path) -> int:
    """Of a file or of all files below a folder; 0 where there is none."""
    files = place.rglob("*") if place.is_dir() else [place]
    return sum(file.stat().st_size for file in files if file.is_file())


def seconds(usages: list[Usage]) -> float:
    return median(usage.wall for usage in usages)


def show(title: str, results: dict[str, Result]) -> None:
    rows = [[title, "of the target", "diff s", "CPU s", "apply s", "CPU s"]]
    for name, result in results.items():
        times = [
            f"{value:.2f}"
            for usages in (result.encode, result.decode)
            for value in (seconds(usages), median(usage.cpu for usage in usages))
        ]
        rows.append([name, f"{result.share:.4f}", *times])
    print_table(rows)


def find_missed(update: float, results: dict[str, Result]) -> Iterator[str]:
    """The figures of one pair that do not hold, in words."""
    ours = results[_OURS]
    if ours.share > _SHARES[update]:
        yield f"update {update:g}: the delta takes {ours.share:.4f} of the target, not {_SHARES[update]}"
    for name, peer in results.items():
        if name == _OURS:
            continue
        for verb, mine, other in (("diff", ours.encode, peer.encode), ("apply", ours.decode, peer.decode)):
            if seconds(mine) >= seconds(other):
                times = f"{seconds(mine):.2f} s, {name} {seconds(other):.2f} s"
                yield f"update {update:g}: {verb} takes {times}"


def find_slow(title: str, usages: dict[str, list[Usage]]) -> Iterator[str]:
    """What is too slow beside the floor, in words."""
    for verb, most in (("apply", _APPLY), ("diff", _DIFF)):
        times = seconds(usages[verb]) / seconds(usages["floor"])
        if times > most:
            yield f"{title}: {verb} takes {times:.2f} times the floor, not {most}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--quick", action="store_true", help="smaller pairs, one round: for a look")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results there")
    parser.add_argument("--folder", type=Path, help="where the files go; /dev/shm if it has room, else disk")
    options = parser.parse_args()
    layers, nbytes, rounds = pairs.QWEN2_LAYERS, 2 * pairs.GIB, options.rounds
    if options.quick:
        layers, nbytes, rounds = 2, pairs.GIB // 4, 1
    missed: list[str] = []
    written: dict[str, object] = {}
    with pairs.work_folder(options.folder, 4 * nbytes) as folder:
        pair = pairs.Pair(folder / "pair")
        for update in _SHARES:
            pairs.make_qwen2_in_child(pair, layers=layers, update=update)
            results = measure(pair, rounds)
            title = f"{bytes_in(pair.target):,} bytes, update {update:g}"
            show(title, results)
            missed += find_missed(update, results)
            written[title] = {name: asdict(result) for name, result in results.items()}
            shutil.rmtree(pair.root)
        rows = [["", "wall s", "CPU s", "GB/s", "x floor"]]
        for shards in _SHARDS:
            pairs.make_in_child(pair, nbytes, shards=shards)
            usages = apply.measure(pair, rounds)
            title = f"{nbytes / pairs.GIB:g} GiB in {shards} shard{'s' if shards > 1 else ''}"
            rows += apply.rows_of(title, usages, bytes_in(pair.target))
            missed += find_slow(title, usages)
            written[title] = {name: [asdict(usage) for usage in found] for name, found in usages.items()}
            shutil.rmtree(pair.root)
    print_table(rows)
    if options.json:
        options.json.write_text(json.dumps({**written, "missed": missed}, indent=1) + "\n")
    finish(missed)


if __name__ == "__main__":
    main()
