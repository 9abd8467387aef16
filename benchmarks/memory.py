"""Peak memory of diff, apply and verify, for a large target and for one ten times smaller.

Each target is one shard in which one tensor takes half of the bytes. The commands run as a user would
type them, with default settings; what is counted is the peak resident memory (ru_maxrss) of the whole
process, interpreter and libraries included. Figures: diff at most 768 MiB, apply and verify at most
512 MiB, apply no more than `plan` says, and large and small less than 64 MiB apart.

    python benchmarks/memory.py
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import pairs
from children import MIB, deltaweights, finish, print_table, run_measured

from deltaweights import plan_apply

_LIMITS = {"diff": 768 * MIB, "apply": 512 * MIB, "verify --base": 512 * MIB}
_FLAT = 64 * MIB


def measure(pair: pairs.Pair, nbytes: int) -> dict[str, int]:
    """Peak bytes of each command. The pair is made here, and everything is deleted as soon as it can be."""
    pairs.make_in_child(pair, nbytes, big=nbytes // 2)
    delta, out = pair.root / "delta", pair.root / "out"
    peaks = {"diff": run_measured(deltaweights("diff", pair.base, pair.target, "-o", delta, "-q")).peak}
    shutil.rmtree(pair.target)
    apply = deltaweights("apply", delta, "--base", pair.base, "-o", out, "-q")
    peaks["apply"] = run_measured(apply).peak
    peaks["plan"] = plan_apply(delta, base=pair.base).memory
    shutil.rmtree(out)
    peaks["verify --base"] = run_measured(deltaweights("verify", delta, "--base", pair.base, "-q")).peak
    shutil.rmtree(pair.root)
    return peaks


def find_missed(small: dict[str, int], large: dict[str, int]) -> list[str]:
    """The figures that do not hold, in words."""
    missed = []
    for verb, limit in _LIMITS.items():
        if max(small[verb], large[verb]) > limit:
            missed.append(f"{verb} takes more than {limit // MIB} MiB")
        if verb == "apply" and any(side[verb] > side["plan"] for side in (small, large)):
            missed.append("apply takes more than plan says")
        if abs(large[verb] - small[verb]) > _FLAT:
            missed.append(f"{verb} is not flat: large and small differ by more than {_FLAT // MIB} MiB")
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", type=float, default=4, metavar="GIB", help="of the large target, default 4")
    parser.add_argument("--folder", type=Path, help="where the files go; /dev/shm if it has room, else disk")
    options = parser.parse_args()
    nbytes = int(options.size * pairs.GIB)
    with pairs.work_folder(options.folder, int(2.5 * nbytes)) as folder:
        small, large = (measure(pairs.Pair(folder / "pair"), size) for size in (nbytes // 10, nbytes))
    sizes = [f"{size / pairs.GIB:.2g} GiB target" for size in (nbytes // 10, nbytes)]
    rows = [["peak memory, whole process", *sizes, "limit"]]
    for verb, limit in _LIMITS.items():
        rows.append([verb, *(f"{peak / MIB:.0f} MiB" for peak in (small[verb], large[verb], limit))])
    print_table(rows)
    finish(find_missed(small, large))


if __name__ == "__main__":
    main()
