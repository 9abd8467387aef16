"""Kernels: the codec's loops, written for Numba and LLVM, which only :mod:`..build` imports.

The machine code that a process runs comes from :mod:`..compiled`, to which a kernel is a module and a name.
"""
