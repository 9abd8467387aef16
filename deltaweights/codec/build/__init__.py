"""How kernels become machine code: needs Numba, and is needed by nobody who has a wheel.

Numba types the kernels once, for no processor in particular (:mod:`.bitcode`); LLVM then makes code for each
target (:mod:`.targets`, :mod:`.vector_operations`, :mod:`.machine_code`), and a linker one library a platform
(:mod:`.library`), of the kernels that :mod:`.signatures` lists.
"""
