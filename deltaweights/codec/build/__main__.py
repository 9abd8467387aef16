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
from .library import build, levels_of_host
from .targets import platforms, targets_of


def main() -> int:
    """Build what the command line says; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m deltaweights.codec.build", description=__doc__)
    parser.add_argument("--platform", default=host_platform(), choices=platforms(), help="default: this one")
    parser.add_argument(
        "--levels", help="of processors, separated by commas; `all`; default: the best one here"
    )
    parser.add_argument("--if-needed", action="store_true", help="only where there is none of these sources")
    parser.add_argument("--show", action="store_true", help="print the library's path in the end")
    parser.add_argument(
        "--runnable", action="store_true", help="build nothing; print the levels that run here"
    )
    options = parser.parse_args()
    if options.platform is None:
        parser.error("no library can be built for this machine: name a --platform")
    out = library_path(options.platform)
    if options.runnable:
        print(*Library(out).levels)
        return 0
    known = list(targets_of(options.platform))
    levels = known if options.levels == "all" else (options.levels or "").split(",")
    if options.levels is None:
        levels = list(levels_of_host()[-1:]) if options.platform == host_platform() else known
    if unknown := set(levels) - set(known):
        parser.error(f"{options.platform} has no level {', '.join(sorted(unknown))}, but {', '.join(known)}")
    if not options.if_needed or not is_current(out, levels):
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
