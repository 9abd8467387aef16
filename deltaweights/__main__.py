"""``python -m deltaweights``, and the console script."""

from __future__ import annotations

import os
import signal


def main() -> None:
    """Run the command line. Ctrl-C while it is imported ends the process without a word."""
    try:
        before = signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    except ValueError:  # not in the main thread, which no signal reaches
        before = None
    from .cli import main as run

    if before is not None:
        signal.signal(signal.SIGINT, before)
    run()


if __name__ == "__main__":
    main()
