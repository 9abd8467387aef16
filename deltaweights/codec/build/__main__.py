"""`python -m deltaweights.codec.build`: builds the kernels' library into the package.

It takes about two minutes of processor time, and half a minute more for each level. Without arguments it is
for the best level that this processor can run.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ..library import Library, is_current, library_path
from ..processor import platform as host_platform
from .library import build, compiler, levels_of_host
from .targets import platforms, targets_of


def main() -> int:
    """Build what the command line says; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m deltaweights.codec.build", description=__doc__)
    parser.add_argument("--platform", default=host_platform(), choices=platforms(), help="default: this one")
    parser.add_argument(
        "--levels", default="best", help="names of levels, `all`, `lowest` or `best` (default), with commas"
    )
    parser.add_argument("--if-needed", action="store_true", help="only where there is none of these sources")
    parser.add_argument("--show", action="store_true", help="print the library's path in the end")
    parser.add_argument(
        "--runnable", action="store_true", help="build nothing; print the levels that run here"
    )
    options = parser.parse_args()
    if options.platform not in platforms():
        parser.error("no library can be built for this machine; kernels are compiled when first used")
    out = library_path(options.platform)
    if options.runnable:
        print(*Library(out).levels)
        return 0
    known = list(targets_of(options.platform))
    best = levels_of_host()[-1:] if options.platform == host_platform() else known[-1:]
    named = {"all": known, "lowest": known[:1], "best": best}
    levels = [level for name in options.levels.split(",") for level in named.get(name, [name])]
    if not levels:
        parser.error(f"this processor is older than any that kernels are built for: {', '.join(known)}")
    if unknown := set(levels) - set(known):
        parser.error(f"{options.platform} has no level {', '.join(sorted(unknown))}, but {', '.join(known)}")
    if not options.if_needed or not is_current(out, levels, compiler()):
        _build(options.platform, levels, out)
    if options.show:
        print(out)
    return 0


def _build(platform: str, levels: Sequence[str], out: Path) -> None:
    print(f"building kernels for {', '.join(levels)}: some minutes of processor time", file=sys.stderr)
    began = time.perf_counter()
    build(platform, levels, out)
    print(f"{out.name}: {out.stat().st_size:,} bytes, {time.perf_counter() - began:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
