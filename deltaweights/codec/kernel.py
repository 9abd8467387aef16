# mypy: ignore-errors
# Numba types what is in here.
"""Kernels with a spelled-out signature, compiled or loaded when they are first needed.

Numba's own way with a signature is to compile, or load from its cache, at once: importing a module of
kernels would load all of them, also those that are only ever part of another one, at ten milliseconds
each. Without a signature it compiles a kernel anew for every constant it is called with.
"""

from __future__ import annotations

import threading

from numba import njit

_preparing = threading.RLock()  # one kernel's preparation may need another's


def kernel(signature, **options):
    """A decorator: the function compiled for `signature` and nothing else, the GIL released, cached."""

    def decorate(function):
        found = njit(nogil=True, cache=True, **options)(function)
        template = found.get_call_template

        def prepare():
            with _preparing:
                if not found.overloads:
                    found.compile(signature)
                    found.disable_compile()

        def template_when_called_from_a_kernel(args, kws):
            prepare()
            return template(args, kws)

        def when_called_from_python(*args, **kws):
            prepare()
            return found  # called in the place of what Numba would have compiled for these arguments

        found.get_call_template = template_when_called_from_a_kernel
        found._compile_for_args = when_called_from_python
        return found

    return decorate
