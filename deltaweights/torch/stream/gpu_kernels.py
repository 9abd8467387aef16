# mypy: ignore-errors
# Triton reads annotations itself (`tl.constexpr`, dtypes to compile for), so parameters cannot have others.
"""GPU kernels in Triton: checksums of chunks, and patches.

One program, of one warp, works on one chunk, or on one block of a patch. Chunks are given by address, so that
one launch handles chunks of many tensors. The tests also run all kernels in Triton's interpreter, which needs
no GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Elements that one program of `patch` or `put` moves.
PATCH_BLOCK = tl.constexpr(1024)


@triton.jit
def _restored(bits, zigzag, width: tl.constexpr):
    """The element at distance `zigzag` from the base's `bits` (see ulp.restore): uint32, of `width` bits."""
    top: tl.constexpr = width - 1
    full: tl.constexpr = (1 << width) - 1
    magnitude: tl.constexpr = full >> 1
    zigzag &= full
    negative = bits >> top
    order = bits ^ (negative * magnitude)
    steps = (zigzag >> 1) ^ (0 - (zigzag & 1))
    steps = tl.where(negative != 0, 0 - steps, steps)
    result = (order + steps) & full
    return result ^ ((result >> top) * magnitude)


@triton.jit(do_not_specialize=["count"])
def patch(elements, places, distances, others, count, width: tl.constexpr):
    """Move `count` elements at different places, and store the old ones in `others`.

    elements    int8, int16 or int32 of `width` bits
    places      int32[count]
    distances   int32[count], zigzagged
    others      as elements, [count], written
    """
    index = tl.program_id(0) * PATCH_BLOCK + tl.arange(0, PATCH_BLOCK)
    is_one = index < count
    place = tl.load(places + index, mask=is_one, other=0)
    zigzag = tl.load(distances + index, mask=is_one, other=0).to(tl.uint32, bitcast=True)
    found = tl.load(elements + place, mask=is_one, other=0)
    full: tl.constexpr = (1 << width) - 1
    result = _restored(found.to(tl.uint32) & full, zigzag, width).to(elements.dtype.element_ty)
    tl.store(others + index, found, mask=is_one)
    tl.store(elements + place, result, mask=is_one)


@triton.jit(do_not_specialize=["count"])
def put(elements, places, others, count):
    """Set elements to those that :func:`patch` stored in `others`; the arguments are the same."""
    index = tl.program_id(0) * PATCH_BLOCK + tl.arange(0, PATCH_BLOCK)
    is_one = index < count
    place = tl.load(places + index, mask=is_one, other=0)
    tl.store(elements + place, tl.load(others + index, mask=is_one, other=0), mask=is_one)


@triton.jit
def _mixed(data, key, swapped):
    """The contributions of stripes to the accumulators, before the sum."""
    word = data ^ key
    return (word & 0xFFFFFFFF) * (word >> 32) + swapped


@triton.jit
def xxh3_accumulators(addresses, lengths, keys, start, accumulators):
    """XXH3-64 of chunks up to its eight accumulators (docs/format.md names the specification).

    addresses      int64[chunks], multiples of 8
    lengths        int64[chunks], multiples of 8, above 240
    keys           int64[24 + 8]: the default secret's words, then those beginning at its byte 121
    start          int64[8]: the initial values of the accumulators
    accumulators   int64[chunks, 8], written
    """
    chunk = tl.program_id(0)
    words = tl.load(addresses + chunk).to(tl.pointer_type(tl.uint64))
    length = tl.load(lengths + chunk)
    lane, stripe = tl.arange(0, 8), tl.arange(0, 16)
    straight = stripe[:, None] * 8 + lane[None, :]
    swapped = stripe[:, None] * 8 + (lane ^ 1)[None, :]
    key = tl.load(keys + stripe[:, None] + lane[None, :]).to(tl.uint64, bitcast=True)
    scramble = tl.load(keys + 16 + lane).to(tl.uint64, bitcast=True)
    total = tl.load(start + lane).to(tl.uint64, bitcast=True)
    blocks = (length - 1) // 1024
    block = 0
    while block < blocks:  # Triton 3.6's interpreter has no range with NumPy 2.4
        total += tl.sum(_mixed(tl.load(words + straight), key, tl.load(words + swapped)), axis=0)
        total = (total ^ (total >> 47) ^ scramble) * 0x9E3779B1
        words += 128
        block += 1
    stripes = (length - 1 - blocks * 1024) // 64
    is_one = stripe[:, None] < stripes
    some = _mixed(
        tl.load(words + straight, mask=is_one, other=0), key, tl.load(words + swapped, mask=is_one, other=0)
    )
    total += tl.sum(tl.where(is_one, some, 0), axis=0)
    words += (length - blocks * 1024) // 8 - 8
    last = tl.load(keys + 24 + lane).to(tl.uint64, bitcast=True)
    total += _mixed(tl.load(words + lane), last, tl.load(words + (lane ^ 1)))
    tl.store(accumulators + chunk * 8 + lane, total.to(tl.int64, bitcast=True))
