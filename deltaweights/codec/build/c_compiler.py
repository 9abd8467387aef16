"""The C compiler of this machine, for its linker.

packaging/kernels_backend.py runs this file too, before anything that the package needs is installed: it
imports the standard library only.
"""

from __future__ import annotations

import shutil


def c_compiler() -> str | None:
    """The path of a C compiler; None where none is found."""
    return next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
