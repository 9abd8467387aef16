"""BLAS has one thread while low-rank updates are looked for, and as many as before afterwards."""

from __future__ import annotations

from deltaweights.codec.low_rank.blas import _functions, one_blas_thread


def test_threads_of_blas_are_one_inside_and_as_before_outside() -> None:
    get, put = _functions()
    before = get()
    try:
        put(2)
        many = get()  # 1 if BLAS cannot be told
        with one_blas_thread:
            assert get() == 1
            with one_blas_thread:
                assert get() == 1
            assert get() == 1
        assert get() == many
    finally:
        put(before)
