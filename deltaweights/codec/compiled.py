"""The compiled kernels, loaded when the first chunk needs them; Numba is imported nowhere before.

Kernels are compiled once for a processor and then kept on disk. Where the disk holds none yet, this
says so, through `logging`, before the wait begins.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from numba import njit
from numpy.typing import NDArray

__all__ = ["alone", "coder", "delta", "frozen", "runs", "subset"]


def _prepare_cache() -> None:
    """Drop kernels cached from other sources, and tell the user of the wait that compiling is.

    Numba looks only at the file a kernel stands in, not at those whose code it takes in: without
    this, a changed `simd` would leave old vector loops in place.
    """
    cache = Path(str(njit(cache=True)(frozen).stats.cache_path))
    sources = sorted(Path(__file__).parent.glob("*.py"))
    digest = sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    stamp = cache / "deltaweights-kernels.sha256"
    try:
        fresh = stamp.read_text() == digest
    except OSError:
        fresh = False
    if fresh:
        return
    logging.getLogger("deltaweights").warning(
        "compiling the codec for this processor, which takes some seconds, once"
    )
    with suppress(OSError):  # a cache that cannot be written is one that Numba does not use
        for name in ("alone", "delta", "runs", "subset"):
            for index in cache.glob(f"{name}.*.nbi"):
                index.unlink(missing_ok=True)
        cache.mkdir(parents=True, exist_ok=True)
        stamp.write_text(digest)


def frozen(array: NDArray[Any]) -> NDArray[Any]:
    """A read-only view: kernels are compiled for read-only inputs, whatever comes in."""
    view = array.view()
    view.setflags(write=False)
    return view


_prepare_cache()

from . import alone, coder, delta, runs, subset  # noqa: E402  (compiles: the announcement comes first)
