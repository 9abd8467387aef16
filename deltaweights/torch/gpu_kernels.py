# mypy: ignore-errors
# Triton types what is in here.
"""What runs on a GPU, in Triton: checksums of chunks, patches, and the decoding of DELTA runs.

One program, of one warp, works on one chunk, or on one block of a patch. Chunks are addressed as numbers, so
that those of many tensors go into one launch. The tests run all of it in Triton's interpreter as well, which
needs no GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Elements that one program of `patch` or `put` moves.
PATCH_BLOCK = tl.constexpr(1024)

#: Elements that `choose` looks at together.
CHOOSE_BLOCK = tl.constexpr(512)

#: States of a chunk in what `decode_runs` begins with, whatever its lanes.
STATES = tl.constexpr(64)


@triton.jit
def _restored(bits, zigzag, width: tl.constexpr):
    """The element that lies `zigzag` from the base's `bits` (see ulp.restore): uint32, of `width` bits."""
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
def patch(elements, places, distances, others, count, width: tl.constexpr, is_moved: tl.constexpr):
    """Move `count` elements at different places; what was there goes to `others`. Where it is not `is_moved`,
    what they would become goes there instead.

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
    if is_moved:
        tl.store(others + index, found, mask=is_one)
        tl.store(elements + place, result, mask=is_one)
    else:
        tl.store(others + index, result, mask=is_one)


@triton.jit(do_not_specialize=["count"])
def put(elements, places, others, count):
    """Set elements to what :func:`patch` left in `others`; the arguments are the same."""
    index = tl.program_id(0) * PATCH_BLOCK + tl.arange(0, PATCH_BLOCK)
    is_one = index < count
    place = tl.load(places + index, mask=is_one, other=0)
    tl.store(elements + place, tl.load(others + index, mask=is_one, other=0), mask=is_one)


@triton.jit
def _mixed(data, key, swapped):
    """What stripes add to the accumulators, before it is summed."""
    word = data ^ key
    return (word & 0xFFFFFFFF) * (word >> 32) + swapped


@triton.jit
def xxh3_accumulators(addresses, lengths, keys, start, accumulators):
    """XXH3-64 of chunks up to its eight accumulators (docs/format.md names the specification).

    addresses      int64[chunks], multiples of 8
    lengths        int64[chunks], multiples of 8, above 240
    keys           int64[24 + 8]: the default secret's words, then those from its byte 121 on
    start          int64[8]: what the accumulators begin with
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
    while block < blocks:  # with NumPy 2.4 the interpreter of Triton 3.6 has no range
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


#: What a row of `plans` has, by column: addresses, and numbers of a run and of what is chosen.
(
    BASE, OUT, COUNT, WORDS, STOP, SLOTS, SCALES, LOG_SEGMENT, LOWEST, STEP, LAST, PRECISION, DIRECT,
    ELEMENTS, MARKS, CUTOFF, CHOSEN,
) = map(tl.constexpr, range(17))  # fmt: skip
COLUMNS = tl.constexpr(17)


@triton.jit
def choose(plans, shift, mask, width: tl.constexpr):
    """Which elements of chunks that are coded as SPARSE their deltas are about (docs/format.md).

    plans          int64[chunks, COLUMNS]: reads BASE (elements of `width` bits), ELEMENTS, MARKS (a bit for
                   each unit of 256 elements) and CUTOFF; writes COUNT, and places to CHOSEN (int32[ELEMENTS])
    shift, mask    where an element has its exponent
    """
    plan = plans + tl.program_id(0) * COLUMNS
    element: tl.constexpr = tl.uint8 if width == 8 else tl.uint16
    base = tl.load(plan + BASE).to(tl.pointer_type(element))
    marks = tl.load(plan + MARKS).to(tl.pointer_type(tl.uint8))
    chosen = tl.load(plan + CHOSEN).to(tl.pointer_type(tl.int32))
    count, cutoff = tl.load(plan + ELEMENTS).to(tl.int32), tl.load(plan + CUTOFF).to(tl.int32)
    first, found = 0, 0
    while first < count:
        index = first + tl.arange(0, CHOOSE_BLOCK)
        is_one = index < count
        unit = index >> 8
        mark = tl.load(marks + (unit >> 3), mask=is_one, other=0).to(tl.int32)
        bits = tl.load(base + index, mask=is_one, other=0).to(tl.uint32)
        is_low = ((bits >> shift) & mask).to(tl.int32) <= cutoff
        is_chosen = (is_one & is_low & (((mark >> (unit & 7)) & 1) != 0)).to(tl.int32)
        place = tl.cumsum(is_chosen, axis=0) - 1 + found
        tl.store(chosen + place, index, mask=is_chosen != 0)
        found += tl.sum(is_chosen, axis=0)
        first += CHOOSE_BLOCK
    tl.store(plan + COUNT, found.to(tl.int64))


@triton.jit
def _refilled(state, is_one, words, cursor, stop):
    """(states, cursor): lanes below the floor take the next words, in order; beyond the end the floor."""
    needs = (state < 65536) & is_one
    before = tl.cumsum(needs.to(tl.int32), axis=0) - 1 + cursor
    word = tl.load(words + before, mask=needs & (before < stop), other=0).to(tl.uint32)
    full = tl.where(before < stop, (state << 16) | word, 65536)
    return tl.where(needs, full, state), cursor + tl.sum(needs.to(tl.int32), axis=0)


@triton.jit
def _with_raw_bits(state, value, width):
    """(states, values): the lanes' lowest bits, so many, go to their values."""
    low = (1 << width) - 1
    return state >> width, (value << width) | (state & low)


@triton.jit
def _places(chosen, index, is_one, is_chosen: tl.constexpr):
    """Where the run's elements lie in the chunk."""
    return tl.load(chosen + index, mask=is_one, other=0) if is_chosen else index


@triton.jit
def decode_runs(
    plans, first_states, ended, shift, mask, width: tl.constexpr, lanes: tl.constexpr, is_chosen: tl.constexpr
):
    """Chunks that are coded as DELTA, from their bases; or of SPARSE ones, what is chosen (docs/format.md).

    plans          int64[chunks, COLUMNS]: addresses of the base's and the target's elements (which may be the
                   same), of the words (uint16), slots (uint32) and scales (int32), and the run's settings
    first_states   int32[chunks, STATES], of which the first `lanes` count
    ended          int32[chunks], written: 1 where the run came out even, else 0
    shift, mask    where an element has its exponent; it has `width` bits, 8 or 16
    """
    chunk = tl.program_id(0)
    plan = plans + chunk * COLUMNS
    element: tl.constexpr = tl.uint8 if width == 8 else tl.uint16
    base = tl.load(plan + BASE).to(tl.pointer_type(element))
    out = tl.load(plan + OUT).to(tl.pointer_type(element))
    words = tl.load(plan + WORDS).to(tl.pointer_type(tl.uint16))
    slots = tl.load(plan + SLOTS).to(tl.pointer_type(tl.uint32))
    scales = tl.load(plan + SCALES).to(tl.pointer_type(tl.int32))
    chosen = tl.load(plan + CHOSEN).to(tl.pointer_type(tl.int32))
    count, stop = tl.load(plan + COUNT).to(tl.int32), tl.load(plan + STOP).to(tl.int32)
    log_segment, lowest = tl.load(plan + LOG_SEGMENT).to(tl.int32), tl.load(plan + LOWEST).to(tl.int32)
    step, last = tl.load(plan + STEP).to(tl.int32), tl.load(plan + LAST).to(tl.int32)
    precision, is_direct = tl.load(plan + PRECISION).to(tl.uint32), tl.load(plan + DIRECT)
    slot_mask, inline = (1 << precision) - 1, 16 - precision
    lane = tl.arange(0, lanes)
    state = tl.load(first_states + chunk * STATES + lane).to(tl.uint32, bitcast=True)
    cursor, first = 0, 0
    next_place = _places(chosen, lane, lane < count, is_chosen)
    next_bits = tl.load(base + next_place, mask=lane < count, other=0)
    while first < count:
        index = first + lane
        is_one = index < count
        place, bits = next_place, next_bits.to(tl.uint32)  # asked for a step before they are needed
        next_place = _places(chosen, index + lanes, index + lanes < count, is_chosen)
        next_bits = tl.load(base + next_place, mask=index + lanes < count, other=0)
        scale = tl.load(scales + (index >> log_segment), mask=is_one, other=0)
        exponent = ((bits >> shift) & mask).to(tl.int32)
        context = tl.minimum(tl.maximum((2 * exponent - scale - lowest) >> step, 0), last).to(tl.uint32)
        entry = tl.load(slots + ((context << precision) | (state & slot_mask)))
        moved = ((entry >> 11) & 4095) * (state >> precision) + (entry & 2047)
        raw = tl.where(is_direct != 0, 0, entry >> 27)
        value = tl.where(is_direct != 0, entry >> 23, (entry >> 23) & 15)
        here = tl.minimum(raw, inline)
        moved, value = _with_raw_bits(moved, value, here)
        state, cursor = _refilled(tl.where(is_one, moved, state), is_one, words, cursor, stop)
        rest = tl.where(is_one, raw - here, 0)
        while tl.max(rest, axis=0) > 0:  # twice at most, since no value has more than 29 raw bits
            here = tl.minimum(rest, 16)
            state, value = _with_raw_bits(state, value, here)
            state, cursor = _refilled(state, is_one, words, cursor, stop)
            rest -= here
        tl.store(out + place, _restored(bits, value, width).to(element), mask=is_one)
        first += lanes
    is_even = (tl.sum((state != 65536).to(tl.int32), axis=0) == 0) & (cursor == stop)
    tl.store(ended + chunk, is_even.to(tl.int32))
