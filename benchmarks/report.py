"""What `report` takes: of the manifest of a 72B model, and with the base beside `verify`.

    python benchmarks/report.py
    python benchmarks/report.py --size 8 --rounds 5

The manifest has the 963 tensors of Qwen2.5-72B, all changed. The pair is bf16, of square matrices; verify and
report take turns, and the best of their rounds count. Fails where a figure does not hold.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pairs
import qwen
from children import MIB, Usage, deltaweights, finish, print_table, run_measured

from deltaweights.changes import describe_changes, grid_of, manifest_measures
from deltaweights.entries import BaseTensor, TensorEntry
from deltaweights.inspect import summarize
from deltaweights.manifest import (
    BaseRecord,
    FileRecord,
    License,
    Manifest,
    TargetFile,
    TargetRecord,
    Tool,
)
from deltaweights.report import DeltaReport
from deltaweights.report.measures import base_measures
from deltaweights.report.movement import Movement
from deltaweights.report.reading import Moves
from deltaweights.report.spectrum import Spectrum

#: The figures: seconds and bytes of a page, times the time of verify, bytes of memory.
_SECONDS, _PAGE, _RATIO, _MEMORY = 2.0, 500_000, 1.5, 512 * MIB
_SHARD = "model-00001-of-00001.safetensors"


def entries() -> Iterator[TensorEntry]:
    """The tensors of a 72B model, each changed."""
    for number, tensor in enumerate(qwen.list_tensors()):
        base = BaseTensor(tensor.name, "BF16", tensor.shape)
        payload = 24 + tensor.weights * (2 + number % 5) // 8
        moved = tensor.weights * (number % 90 + 10) // 100
        nbytes = 2 * tensor.weights
        yield TensorEntry(tensor.name, _SHARD, "BF16", tensor.shape, "changed", base, nbytes, moved, payload)


def manifest() -> Manifest:
    """The manifest of such a delta, of one shard."""
    record = FileRecord(_SHARD, qwen.NBYTES, "0" * 64)
    target = TargetFile(_SHARD, qwen.NBYTES, "1" * 64, "tensors", "delta-00001-of-00001.safetensors")
    return Manifest(
        base=BaseRecord("Qwen/Qwen2.5-72B", None, License("other", "qwen"), (record,)),
        target=TargetRecord("moonshotai/Kimi-Dev-72B", None, License("mit"), (target,)),
        tensors=tuple(entries()),
        files=(FileRecord("delta-00001-of-00001.safetensors", 27 * 10**9, "2" * 64),),
        tool=Tool("deltaweights", "benchmark"),
        chunk_bytes=1 << 20,
    )


def page_with_base(made: Manifest) -> int:
    """The bytes of the page that has all figures of a base too."""
    moves = Moves({}, {})
    for number, entry in enumerate(made.tensors):
        count = entry.shared_bytes // 2
        spectrum = Spectrum(1234.5 + number, 0.0123, 0.0456) if len(entry.shape) == 2 else None
        moves.tensors[_SHARD, entry.name] = Movement(
            count, entry.changed, count * 4e-4, count * 1e-8 * (1 + number % 7), 0.0, 1e-3, 0, spectrum
        )
    grid, told = grid_of(made.tensors), manifest_measures(made.tensors)
    sentences = tuple(describe_changes(made.tensors, grid))
    measures = (*base_measures(moves), *told)
    return len(DeltaReport("x", summarize(made), sentences, (), True, grid, measures, moves).html())


def measure_manifest(folder: Path, rounds: int) -> Iterator[str]:
    """Prints the figures of the manifest; yields what does not hold."""
    made, delta = manifest(), folder / "delta-72b"
    delta.mkdir()
    (delta / "deltaweights.json").write_bytes(made.to_json())
    page = folder / "page.html"
    runs = [run_measured(deltaweights("report", delta, "-o", page, "-q")) for _ in range(rounds)]
    seconds, with_base = min(one.wall for one in runs), page_with_base(made)
    print_table(
        [
            ("manifest of 72B", "seconds", "page, KB", "page with base, KB"),
            ("report", f"{seconds:.2f}", f"{page.stat().st_size / 1e3:.0f}", f"{with_base / 1e3:.0f}"),
        ]
    )
    if seconds > _SECONDS:
        yield f"report of a 72B manifest takes {seconds:.2f} s, more than {_SECONDS}"
    if max(page.stat().st_size, with_base) > _PAGE:
        yield f"its page has more than {_PAGE:,} bytes"


def measure_pair(folder: Path, gib: float, hidden: int, rounds: int) -> Iterator[str]:
    """Prints the figures with the base; yields what does not hold."""
    pair = pairs.Pair(folder / "pair")
    pairs.make_in_child(pair, int(gib * pairs.GIB), shards=4, hidden=hidden)
    delta = folder / "delta"
    run_measured(deltaweights("diff", pair.base, pair.target, "-o", delta, "-q"))
    commands = {
        "verify --base": deltaweights("verify", delta, "--base", pair.base, "-q"),
        "report --base": deltaweights("report", delta, "--base", pair.base, "-q", "-o", folder / "p.html"),
    }
    best: dict[str, Usage] = {}
    for _ in range(rounds):
        for name, command in commands.items():
            usage = run_measured(command)
            old = best.get(name, usage)
            best[name] = replace(
                usage,
                wall=min(usage.wall, old.wall),
                cpu=min(usage.cpu, old.cpu),
                peak=max(usage.peak, old.peak),
            )
    verify, report = best["verify --base"], best["report --base"]
    rows = [(f"{gib:g} GiB, {hidden} wide", "seconds", "CPU seconds", "memory, MiB")]
    rows += [
        (name, f"{one.wall:.2f}", f"{one.cpu:.2f}", f"{one.peak / MIB:.0f}") for name, one in best.items()
    ]
    rows.append(("ratio", f"{report.wall / verify.wall:.2f}", f"{report.cpu / verify.cpu:.2f}", ""))
    print_table(rows)
    if min(report.wall / verify.wall, report.cpu / verify.cpu) > _RATIO:
        yield f"report --base takes more than {_RATIO} times the time of verify"
    if report.peak > _MEMORY:
        yield f"report --base takes {report.peak / MIB:.0f} MiB, more than {_MEMORY / MIB:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", type=float, default=2, metavar="GIB", help="of base and target, default 2")
    parser.add_argument("--hidden", type=int, default=8192, help="width of the matrices, default 8192")
    parser.add_argument("--rounds", type=int, default=3, help="of each command, default 3")
    parser.add_argument("--folder", type=Path, help="where to work; in memory by default")
    options = parser.parse_args()
    with pairs.work_folder(options.folder, int(3 * options.size * pairs.GIB)) as folder:
        missed = [
            *measure_manifest(folder, options.rounds),
            *measure_pair(folder, options.size, options.hidden, options.rounds),
        ]
    finish(missed)


if __name__ == "__main__":
    main()
