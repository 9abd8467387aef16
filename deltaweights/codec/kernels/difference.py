"""A chunk of floats against its base, compiled: distances, contexts and what to choose.

`2 * exponent - scale` is the worth of one ULP against the neighbourhood's mean update, in half
octaves; a context is that number less the lowest, in steps of one or two half octaves, clamped.
:mod:`..methods.floats` calls these kernels; tests/codec/reference.py says the same in NumPy. Those that see
the elements of a chunk are compiled for each width. What is too large for the stack is the caller's.
"""

from __future__ import annotations

import numpy as np
from numba import types

from ..constants import (
    BAD,
    BAD_HEAD,
    BAD_REST,
    BAD_SCALES,
    BITS,
    BLOCK,
    DIRECT,
    FINE,
    FIRST,
    GUARD,
    HEAD,
    LANES,
    LOG_SEGMENT,
    LOWEST,
    MAX_ROWS,
    MAX_SAMPLE,
    MAX_TABLES,
    MORE_SAMPLED,
    PATCH,
    SAMPLED,
    STEP,
    TABLES,
    TAIL,
    TWEAK,
    UNIT,
)
from ..kernel_arrays import (
    Bytes,
    ChunkSpace,
    Elements,
    Floats,
    Longs,
    Moves,
    Numbers,
    OpenDelta,
    RunSpace,
    Words,
)
from ..tables import DIRECT_BITS, TOKENS, ZERO_SCALE
from . import runs, simd
from .arithmetic import log2, sum_of
from .kernel import Integer, array, kernel, room

_OFFSET = 100  # histogram row of a ULP that is worth the mean update
# What one more table costs, about: small chunks take theirs from the family, large ones write them down, and
# the decoder's cache has to hold them.
_FAMILY_BITS, _TABLE_BITS, _SMALL = 70.0, 300.0, 1 << 14
_STILL = 8  # how many half octaves below all others a segment is put that did not move
_LENGTHS = (0, 7, 9)  # logarithms of the segment lengths tried; 0 is one scale for all
_PLACE = 64  # elements in a row of which something is counted, in places that are evenly spread
_FEW = 4  # steps between a chunk's shifts that are compared with, at most; `drift` spells four out
_SEEN = 16  # such places that decoding looks at
_MANY_LONG = 0.012  # of a chunk's values: from there on every other step of 64 meets one
_bytes, _numbers, _longs = array(types.uint8), array(types.uint32), array(types.int64)
_block_of_bytes, _block_of_moves = room(types.uint8, BLOCK), room(types.float32, BLOCK)
_block_of_values, _block_of_long_values = room(types.uint32, BLOCK), room(types.uint64, BLOCK)
_a_table, _row_costs = room(types.uint32, TOKENS), room(types.float64, MAX_ROWS)
_seven_cursors, _three_limits = room(types.int64, 7), room(types.int64, 3)
_sample_scales = room(types.int64, MAX_SAMPLE // UNIT + 1)
_shares = room(types.float64, 64)
_layout, _members = room(types.int64, 5), room(types.int64, 64)
_few_numbers = room(types.uint32, _FEW)
_states, _settings, _rest = room(types.uint32, 64), room(types.int64, 4), room(types.int64, 64)

# -------------------------------------------------------------------------------- transforms


@kernel(inline="always")
def distance(base: Integer, target: Integer, top: int) -> int:
    """The zigzagged distance from an element to another (see ulp.distance); `top` is the sign's place."""
    magnitude = (1 << top) - 1
    sign = (base >> top) & 1
    steps = (target ^ (-((target >> top) & 1) & magnitude)) - (base ^ (-sign & magnitude))
    steps = (steps ^ -sign) + sign
    return ((steps << 1) ^ -((steps >> top) & 1)) & ((magnitude << 1) | 1)  # type: ignore[return-value]


@kernel(inline="always")
def restored(bits: Integer, zigzag: Integer, top: int) -> int:
    """The element that lies `zigzag` from `bits` (see ulp.restore); `top` is its sign's place."""
    magnitude = (1 << top) - 1
    value, sign = np.int64(zigzag), (bits >> top) & 1
    steps = (((value >> 1) & magnitude) ^ -(value & 1) ^ -sign) + sign
    ordered = (bits ^ (-sign & magnitude)) + steps
    return (ordered ^ (-((ordered >> top) & 1) & magnitude)) & ((magnitude << 1) | 1)  # type: ignore[return-value]


@kernel()
def distances(base: Elements, target: Elements, values: Elements) -> None:
    """The zigzagged ULP distance of each element into values (see ulp.distance)."""
    done = simd.distance_vectors(len(values), base, target, values)
    top = 8 * base.itemsize - 1
    for i in range(done, len(values)):
        values[i] = distance(np.int64(base[i]), np.int64(target[i]), top)


@kernel()
def restore(base: Elements, values: Elements, out: Elements) -> None:
    """The inverse of `distances`: the target's elements into out."""
    done = simd.restore_vectors(len(out), base, values, out)
    top = 8 * base.itemsize - 1
    for i in range(done, len(out)):
        out[i] = restored(np.int64(base[i]), np.int64(values[i]), top)


@kernel()
def rebias_of(mask: int) -> int:
    """What to take off an exponent to see it as one of eight bits (F64; others have no more)."""
    return 1023 - 127 if mask > 255 else 0


@kernel()
def unit_moves(base: Elements, values: Numbers, shift: int, mask: int, sums: Floats) -> None:
    """Sum of |distance| * 2**exponent over each `UNIT` elements (the last may be short)."""
    buffer = _block_of_moves()
    rebias = rebias_of(mask)
    count = len(values)
    for first in range(0, count, BLOCK):
        last = min(first + BLOCK, count)
        part = base[first:last]
        done = simd.move_vectors(last - first, part, values[first:last], buffer, shift, mask)
        for i in range(done, last - first):
            exponent: int = max(((np.int64(part[i]) >> shift) & mask) - rebias, 0)  # type: ignore[assignment]
            steps = np.float32((np.int64(values[first + i]) + 1) >> 1)
            buffer[i] = steps * np.float32(2.0 ** (min(exponent, 190) - 127))
        for unit in range(first, last, UNIT):
            sums[unit // UNIT] = sum_of(buffer[unit - first : min(unit + UNIT, last) - first])


@kernel()
def drift(base: Numbers, shifts: Numbers, shift: int, mask: int, out: Numbers) -> None:
    """The elements moved by the shift of their mantissa; those with an exponent of 0 stay.

    shifts   uint32[2**k], k at most `shift`: which one is told by the mantissa's top k bits
    """
    last, exponents = np.uint32(len(shifts) - 1), np.uint32(mask << shift)
    place = np.uint32(shift - runs.floor_log2(len(shifts)))
    starts, steps = _few_numbers(), _few_numbers()
    if not _find_steps(shifts, starts, steps):
        for i in range(len(base)):
            moved = shifts[(base[i] >> place) & last]
            out[i] = base[i] + (moved if base[i] & exponents else np.uint32(0))
        return
    none, first, before, after = np.uint32(0), shifts[0], base[: len(out)], out[: len(base)]
    a, b, c, d = starts[0], starts[1], starts[2], starts[3]
    at_a, at_b, at_c, at_d = steps[0], steps[1], steps[2], steps[3]
    for i in range(len(before)):
        stretch = np.uint32(before[i] >> place) & last
        moved = first + (at_a if stretch >= a else none) + (at_b if stretch >= b else none)
        moved += (at_c if stretch >= c else none) + (at_d if stretch >= d else none)
        after[i] = np.uint32(before[i] + (np.uint32(moved) if before[i] & exponents else none))


@kernel()
def _find_steps(shifts: Numbers, starts: Numbers, steps: Numbers) -> bool:
    """Where shifts differ from those before, and by how much; False where that is more often than there is
    room. (Decay makes few steps: to compare with each takes two thirds of the time that looking up takes.)

    starts, steps   uint32[_FEW], written; beyond the last, starts that no stretch has
    """
    found = 0
    starts[:], steps[:] = np.uint32(0xFFFFFFFF), np.uint32(0)
    for s in range(1, len(shifts)):
        if shifts[s] != shifts[s - 1]:
            if found == len(starts):
                return False
            starts[found], steps[found] = s, shifts[s] - shifts[s - 1]
            found += 1
    return True


# -------------------------------------------------------------------------------- parameters


@kernel()
def scales_from(sums: Floats, count: int, log_segment: int, mask: int, scales: Longs) -> int:
    """The scale of each segment: 2 * log2(mean |distance| * 2**exponent), rounded.

    Segments that did not move get a scale far below the lowest of the others, so that their
    contexts are clamped to the surest. Returns the lowest scale. With `log_segment` 0 there is one.
    """
    units = (1 << log_segment) // UNIT if log_segment else len(sums)
    lowest = np.int64(1 << 20)
    for s in range(len(scales)):
        total = np.float64(0)
        for u in range(s * units, min((s + 1) * units, len(sums))):
            total += sums[u]
        size = min((s + 1) * units * UNIT, count) - s * units * UNIT
        if total > 0.0:
            scale = np.int64(np.floor(2.0 * log2(total / size) + 0.5)) + 2 * (127 + rebias_of(mask))
            lowest = min(lowest, scale)
        else:
            scale = np.int64(-(1 << 20))
        scales[s] = scale
    if lowest == 1 << 20:
        lowest = 0  # type: ignore[assignment]
    base_scale = np.int64(1 << 20)
    for s in range(len(scales)):
        scales[s] = max(scales[s], lowest - _STILL)
        if log_segment == 0:
            scales[s] &= ~1  # keeps all contexts even, to be two half octaves wide
        base_scale = min(base_scale, scales[s])
    return base_scale  # type: ignore[return-value]


@kernel()
def contexts_of(
    base: Elements,
    first: int,
    shift: int,
    mask: int,
    scales: Longs,
    log_segment: int,
    lowest: int,
    step: int,
    last: int,
    contexts: Bytes,
) -> None:
    """Contexts of a block of elements, the first of which is number `first` of the chunk.

    clamp((2 * exponent - scale - lowest) >> step, 0, last), scale being that of the element's segment.
    """
    log_segment = log_segment if log_segment else 62  # all in segment 0
    done = simd.context_vectors(
        len(contexts), base, contexts, shift, mask, scales, log_segment, first, lowest, step, last
    )
    for i in range(done, len(contexts)):
        offset = scales[(first + i) >> log_segment] + lowest
        exponent = (np.int64(base[i]) >> shift) & mask
        contexts[i] = min(max((2 * exponent - offset) >> step, 0), last)


@kernel()
def low_bytes(lowest: int, step: int, context: Integer) -> int:
    """How many low bytes of a wide element's distance go to planes in a context.

    The rest keeps a mean of 4 to 1024, which tokens resolve well.
    """
    octaves = -(lowest + (context << step)) >> 1
    return min(max((octaves - 2) >> 3, 0), 3)  # type: ignore[return-value]


@kernel()
def sample_rows(
    base: Elements,
    values: Numbers,
    shift: int,
    mask: int,
    scales: Longs,
    log_segment: int,
    wide: bool,
    space: ChunkSpace,
) -> tuple[int, int]:
    """Histogram of (row, token) into a ChunkSpace's tables, rows being contexts that nothing clamps: (first
    row, rows)."""
    part, contexts = space.run.leading[: len(values)], space.contexts[: len(values)]
    contexts_of(base, 0, shift, mask, scales, log_segment, -_OFFSET, 0, 255, contexts)
    if wide:
        for i in range(len(values)):
            part[i] = np.int64(values[i]) >> 8 * low_bytes(-_OFFSET, 0, np.int64(contexts[i]))
    else:
        part = values
    low, high = np.int64(255), np.int64(0)
    for i in range(len(contexts)):
        low, high = min(low, np.int64(contexts[i])), max(high, np.int64(contexts[i]))
    for i in range(len(contexts)):
        contexts[i] -= low
    keys, counters = space.run.keys[: len(values)], space.run.counters
    runs.count_tokens(contexts, part, DIRECT_BITS, 7, keys, counters, space.run.tables[: high - low + 1])
    return low - _OFFSET, high - low + 1  # type: ignore[return-value]


@kernel()
def entropy(row: Numbers) -> float:
    """Bits of the tokens counted in a row under their own frequencies, as a sample shows it.

    A sample's entropy falls short of the source's by half a nat for each token it has met but one.
    """
    total, bits, met = 0.0, 0.0, 0
    for t in range(len(row)):
        if row[t] > 0:
            count = np.float64(row[t])
            total += count
            bits -= count * log2(count)
            met += 1
    return bits + total * log2(total) + 0.72 * (met - 1) if met > 0 else 0.0


@kernel()
def raw_bits(rows: Numbers, first: int) -> float:
    """The bits of wide distances that no table sees: those after tokens, and the low bytes in planes."""
    bits = np.int64(0)
    for r in range(len(rows)):
        low = 8 * low_bytes(first, 0, r)
        for t in range(TOKENS):
            bits += np.int64(rows[r, t]) * (low + runs.raw_bits_of(t, DIRECT_BITS))
    return np.float64(bits)


@kernel()
def trim_rows(
    rows: Numbers, step: int, scale_up: float, table_bits: float, first: int, wide: bool
) -> tuple[int, int, float]:
    """The span of rows worth a table each: rows beyond are clamped to the nearest.

    Merges the outermost rows inwards as long as that costs less than `table_bits`, `scale_up` being
    how many elements each counted one stands for. Tables are `step` rows apart; row 0 is context
    `first`. Where elements are `wide`, those merged into a row of more low bytes pay for these.
    Destroys `rows`. Returns (lowest row, tables, bits in all).
    """
    low, high = 0, (len(rows) - 1) // step * step
    costs, merged, bits = _row_costs(), _a_table(), 0.0
    for r in range(0, high + 1, step):
        costs[r] = entropy(rows[r])
        bits += costs[r]
    while low < high:
        best, from_row, to_row = np.inf, 0, 0
        for a, b in ((high, high - step), (low, low + step)):
            for t in range(TOKENS):
                merged[t] = rows[a, t] + rows[b, t]
            extra = entropy(merged) - costs[a] - costs[b]
            if wide:
                more = max(low_bytes(first, 0, b) - low_bytes(first, 0, a), 0)
                extra += 8 * more * rows[a].sum()
            if extra < best:
                best, from_row, to_row = extra, a, b
        if best * scale_up > table_bits and high - low < MAX_TABLES * step:
            break
        for t in range(TOKENS):
            rows[to_row, t] += rows[from_row, t]
        costs[to_row] += costs[from_row] + best
        bits += best
        if from_row == high:
            high -= step
        else:
            low += step
    return low, (high - low) // step + 1, bits


@kernel()
def segments_of(count: int, log_segment: int) -> int:
    """How many scales `count` elements have."""
    return 1 if log_segment == 0 else (count + (1 << log_segment) - 1) >> log_segment


@kernel()
def list_bits(scales: Longs, base_scale: int, scale_up: float) -> float:
    """About what the list of scales costs: its entropy, its table and its states."""
    counts = _a_table()
    counts[:] = 0
    for s in range(len(scales)):
        counts[min(scales[s] - base_scale, TOKENS - 1)] += 1
    distinct = 0
    for t in range(TOKENS):
        distinct += counts[t] > 0
    return entropy(counts) * scale_up + 100.0 + 6.0 * distinct


@kernel()
def is_clustered(base: Elements, target: Elements) -> bool:
    """Whether far more changed in some places than in most, as where training met few rows."""
    if len(base) < 2 * SAMPLED:
        return False
    most, changed, seen = 0, 0, 0
    stride = len(base) // SAMPLED * _PLACE
    for first in range(0, len(base) - _PLACE + 1, stride):
        here, before, after = 0, base[first : first + _PLACE], target[first : first + _PLACE]
        for i in range(len(before)):
            here += before[i] != after[i]
        most, changed, seen = max(most, here), changed + here, seen + 1
    return most > 2 * changed / seen + 12


@kernel()
def take_sample(elements: Elements, size: int, sample: Elements) -> int:
    """About `size` elements, `PATCH` in a row, evenly spread, into sample; all of a short array. How many."""
    patch, stride = PATCH, len(elements) // size * PATCH
    if len(elements) < 2 * size:
        patch = stride = len(elements)
    at = 0
    for first in range(0, len(elements) - patch + 1, stride):
        row, there = elements[first : first + patch], sample[at : at + patch]
        for i in range(len(row)):
            there[i] = row[i]
        at += patch
    return at


@kernel()
def choose_contexts(
    base: Elements,
    target: Elements,
    shift: int,
    mask: int,
    wide: bool,
    scale_up: float,
    space: ChunkSpace,
    layout: Longs,
) -> float:
    """The cheapest segment length and span of contexts for a sample of a chunk.

    base, target   the sample: patches of `PATCH` elements, so that segments are whole
    scale_up       how many elements each of the sample stands for
    space          a ChunkSpace
    layout         int64[5], written: what an OpenDelta calls so, and the scale of the sample
    Returns the bits in all.
    """
    count, sizes, planes = len(base), _seven_cursors(), space.planes
    values, total = space.values[:count], space.run.tables
    for first in range(0, count, BLOCK):
        stop = min(first + BLOCK, count)
        block_distances(base[first:stop], target[first:stop], first, values[first:stop], planes, sizes)
    sums = space.sums[: (count + UNIT - 1) // UNIT]
    unit_moves(base, values, shift, mask, sums)
    best, all_scales = np.inf, _sample_scales()
    table_bits = _FAMILY_BITS if count * scale_up < _SMALL else _TABLE_BITS
    for log_segment in _LENGTHS:
        if log_segment and count * scale_up < 4 << log_segment:
            continue
        scales = all_scales[: segments_of(count, log_segment)]
        base_scale = scales_from(sums, count, log_segment, mask, scales)
        first, rows = sample_rows(base, values, shift, mask, scales, log_segment, wide, space)
        step = 0 if log_segment else 1
        raw = raw_bits(total[:rows], first) if wide else 0.0
        low, tables, bits = trim_rows(total[:rows], 1 << step, scale_up, table_bits, first, wide)
        bits = (bits + raw) * scale_up + table_bits * tables
        if log_segment:
            bits += list_bits(scales, base_scale, scale_up)
        else:
            layout[4] = base_scale
        if bits < best:
            best = bits
            layout[LOG_SEGMENT], layout[STEP] = log_segment, step
            layout[LOWEST], layout[TABLES] = first + low, tables
    return best


@kernel(types.void(_numbers, _numbers, types.int64, types.int64, array(types.int32, 2), _longs))
def collect_moves(
    base: Numbers, target: Numbers, stride: int, shift: int, moves: Moves, counts: Longs
) -> None:
    """What every `stride`-th element moved by, bits less bits, by the top bits of its mantissa.

    moves    int32[2**k, most]: rows are filled from the left and keep the first that come
    counts   int64[2**k], zeros; how much of each row is filled
    """
    last, place = np.uint32(len(counts) - 1), np.uint32(shift - runs.floor_log2(len(counts)))
    for i in range(0, len(base), stride):
        row = (base[i] >> place) & last
        if counts[row] < moves.shape[1]:
            moves[row, counts[row]] = np.int32(target[i] - base[i])
            counts[row] += 1


@kernel(types.float64(array(types.int32, 2), _longs, _numbers))
def fit_shifts(moves: Moves, counts: Longs, shifts: Numbers) -> float:
    """For each stretch of mantissas the move around which an eighth of its elements lie closest.

    moves    int32[2**k, most], ascending in each row as far as `counts` says it is filled
    shifts   uint32[2**k], written; stretches of few elements get that of the one before
    Returns the sum over stretches of log2(1 + |shift|) less log2(1 + the width of that eighth).
    """
    bits, shift = 0.0, np.int64(0)
    for s in range(len(shifts)):
        eighth = counts[s] >> 3
        if eighth:
            width = np.int64(1) << 32
            for i in range(counts[s] - eighth):
                across = np.int64(moves[s, i + eighth]) - np.int64(moves[s, i])
                if across < width:
                    width, shift = across, np.int64(moves[s, i + (eighth >> 1)])
            bits += log2(1.0 + abs(shift)) - log2(1.0 + width)
        shifts[s] = shift & 0xFFFFFFFF
    return bits


# -------------------------------------------------------------------------------- encoding


@kernel()
def encode(
    base: Elements, target: Elements, shift: int, mask: int, wide: bool, family: Numbers, space: ChunkSpace
) -> int:
    """Code a chunk except for its planes; where the head ends, or BAD where the code would be longer than the
    target.

    base, target   uint8, uint16, uint32 or uint64[n]
    shift, mask    where the exponent is: (bits >> shift) & mask
    wide           whether elements have 32 bits or more
    space          a ChunkSpace: the head, the words behind it and the planes are left there
    """
    layout, whole, run = _layout(), base.itemsize * len(base), space.run
    if choose_layout(base, target, shift, mask, wide, space, layout) > 8 * whole:
        return BAD
    values, contexts = space.values, space.contexts
    scales = space.scales[: segments_of(len(base), layout[LOG_SEGMENT])]
    scales[:] = layout[4]
    base_scale = measure(base, target, shift, mask, layout, scales, space)
    if wide:
        split_bytes(values, contexts, layout, space.planes, space.sizes)
    at = HEAD
    if layout[LOG_SEGMENT]:
        above = space.above[: len(scales)]
        for s in range(len(scales)):
            above[s] = scales[s] - base_scale
        at = encode_list(above, space.one_context[: len(scales)], family, run, HEAD + 4)
        runs.put_number(run.head, HEAD, at - HEAD - 4, 4)
    own, start = _members()[: layout[TABLES]], at + 4 if wide else at
    members(layout, wide, 0, own)
    bits = min(8 * base.itemsize, 32)
    at = runs.encode_run(contexts, values, own, family, DIRECT_BITS, bits, 0, np.float64(whole), run, start)
    if at == BAD:
        return BAD
    if wide:
        runs.put_number(run.head, start - 4, at - start + 2 * (len(run.words) - run.found[FIRST]), 4)
    put_head(run.head, layout, base_scale, run.found[TWEAK])
    return at


@kernel()
def choose_layout(
    base: Elements, target: Elements, shift: int, mask: int, wide: bool, space: ChunkSpace, layout: Longs
) -> float:
    """:func:`choose_contexts` by a sample of a chunk."""
    size = MORE_SAMPLED if is_clustered(base, target) else SAMPLED
    count = take_sample(base, size, space.some)
    take_sample(target, size, space.there)
    some, there = space.some[:count], space.there[:count]
    return choose_contexts(some, there, shift, mask, wide, len(base) / count, space, layout)


@kernel()
def put_head(head: Bytes, layout: Longs, base_scale: int, tweak: int) -> None:
    """The first HEAD bytes of a delta."""
    head[0], head[1], head[2] = layout[LOG_SEGMENT], layout[STEP], layout[TABLES]
    runs.put_number(head, 3, layout[LOWEST], 2)
    runs.put_number(head, 5, base_scale, 2)
    runs.put_number(head, 7, tweak, 1)


@kernel()
def encode_list(values: Numbers, one_context: Bytes, family: Numbers, space: RunSpace, at: int) -> int:
    """Write a run of one context into a RunSpace's head, its words too; where it ends."""
    own = _members()[:1]
    own[0] = 0
    at = runs.encode_run(one_context, values, own, family, DIRECT_BITS, 32, 0, np.inf, space, at)
    return runs.put_words(space.head, at, space.words[space.found[FIRST] :])


@kernel(types.void(_longs, types.boolean, types.int64, _longs))
def members(layout: Longs, wide: bool, tweak: int, found: Longs) -> None:
    """Each context's member of the family: its mean distance is 2**(-context / 2) ULPs.

    found   int64[layout[TABLES]], written
    """
    for c in range(layout[TABLES]):
        place = layout[LOWEST] + (c << layout[STEP])
        found[c] = ZERO_SCALE - place + tweak
        if wide:
            found[c] -= 16 * low_bytes(layout[LOWEST], layout[STEP], c)


@kernel(types.void(_longs, _longs))
def plane_limits(layout: Longs, limits: Longs) -> None:
    """For each of planes 0..2 how many contexts, from the lowest on, put a byte into it."""
    limits[:] = 0
    for c in range(layout[TABLES]):
        for p in range(low_bytes(layout[LOWEST], layout[STEP], c)):
            limits[p] += 1


@kernel(types.void(_numbers, _bytes, _longs, array(types.uint8, 2), _longs))
def split_bytes(values: Numbers, contexts: Bytes, layout: Longs, planes: Bytes, sizes: Longs) -> None:
    """Move the low bytes of wide distances to planes 0..2; sizes: how many there are.

    planes: uint8[.., count + SPARE]
    """
    limits = _three_limits()
    plane_limits(layout, limits)
    for p in range(3):
        limit = limits[p]
        at = simd.pop_bytes(values, contexts, limit, planes[p], 0)
        for i in range(len(values) & ~15, len(values)):
            if contexts[i] < limit:
                planes[p, at] = values[i] & np.uint32(255)
                values[i] >>= np.uint32(8)
                at += 1
        sizes[p] = at


@kernel(types.boolean(_numbers, _bytes, _longs, _bytes, _longs, _longs))
def append_bytes(
    values: Numbers, contexts: Bytes, limits: Longs, planes: Bytes, cursors: Longs, starts: Longs
) -> bool:
    """Put the low bytes back behind the values of a block; False where the planes lack them."""
    for p in range(2, -1, -1):
        limit = np.uint8(limits[p])
        if limit == 0:
            continue
        if cursors[p] + len(contexts) > starts[p + 1]:  # not enough for all, perhaps for those that need one
            need = 0
            for i in range(len(contexts)):
                need += contexts[i] < limit
            if cursors[p] + need > starts[p + 1]:
                return False
        part = values[: len(contexts)]
        at = simd.push_bytes(part, contexts, limits[p], planes, cursors[p])
        for i in range(len(part) & ~15, len(part)):
            if contexts[i] < limit:
                part[i] = part[i] << np.uint32(8) | np.uint32(planes[at])
                at += 1
        cursors[p] = at
    return True


@kernel()
def measure(
    base: Elements, target: Elements, shift: int, mask: int, layout: Longs, scales: Longs, space: ChunkSpace
) -> int:
    """Distances of a whole chunk as uint32, their contexts, and the scales of its segments; the lowest scale.

    scales   int64, one a segment; read where there is but one, else written
    space    a ChunkSpace, of which values, contexts, rows 3..6 of the planes (the low halves of 64-bit
             distances) and their sizes are written
    """
    log_segment, step = layout[LOG_SEGMENT], layout[STEP]
    lowest, last = layout[LOWEST], layout[TABLES] - 1
    count, contexts = len(space.values), space.contexts
    sums = space.sums[: (count + UNIT - 1) // UNIT]
    for first in range(0, count, BLOCK):
        stop = min(first + BLOCK, count)
        part, found = base[first:stop], space.values[first:stop]
        block_distances(part, target[first:stop], first, found, space.planes, space.sizes)
        if log_segment:
            unit_moves(part, found, shift, mask, sums[first // UNIT :])
        else:
            block = contexts[first:stop]
            contexts_of(part, first, shift, mask, scales, 0, lowest, step, last, block)
    if log_segment == 0:
        return scales[0]  # type: ignore[no-any-return]
    base_scale = scales_from(sums, count, log_segment, mask, scales)
    contexts_of(base, 0, shift, mask, scales, log_segment, lowest, step, last, contexts)
    return base_scale


@kernel()
def block_distances(
    base: Elements, target: Elements, first: int, values: Numbers, planes: Bytes, sizes: Longs
) -> None:
    """Distances of a block as uint32; the low halves of 64-bit ones go to planes 3..6, from `first` on."""
    if base.itemsize < 8:
        distances(base, target, values)
        return
    wide = _block_of_long_values()[: len(values)]
    distances(base, target, wide)
    for i in range(len(values)):
        values[i] = np.uint32(wide[i] >> np.uint64(32))
        for p in range(4):
            planes[3 + p, first + i] = np.uint8((wide[i] >> np.uint64(8 * p)) & np.uint64(255))
    sizes[3:7] = first + len(values)


# -------------------------------------------------------------------------------- decoding


@kernel()
def decode(base: Elements, out: Elements, opened: OpenDelta) -> int:
    """Fill out from a kernel_arrays.OpenDelta; FINE, or what of it does not fit.

    base, out   uint8, uint16, uint32 or uint64[n]
    """
    states, settings, rest = _states(), _settings(), _rest()
    count = open_chunk(len(out), opened, states, settings)
    if count < 0:
        return -count
    rest[:] = 0
    scales = opened.scales[: segments_of(len(out), opened.layout[LOG_SEGMENT])]
    is_whole = decode_elements(base, scales, opened, opened.words[:count], settings, states, rest, out)
    return FINE if is_whole else BAD_REST


@kernel()
def open_chunk(count: int, opened: OpenDelta, states: Numbers, settings: Longs) -> int:
    """Read all of a delta but its values: fills the scales, slots and words of a kernel_arrays.OpenDelta.

    count     elements
    states    uint32[64], settings int64[4]: written, see :func:`.runs.open_head`

    Returns how many words there are, GUARD included; where something does not fit, what, made negative.
    """
    layout, family, frequencies, words = opened.layout, opened.family, opened.frequencies, opened.words
    scales = opened.scales[: segments_of(count, layout[LOG_SEGMENT])]
    scales[:] = opened.base_scale
    if layout[LOG_SEGMENT]:
        above = opened.above[: len(scales)]
        if not runs.decode_numbers(opened.listed, family, DIRECT_BITS, 0, frequencies[:1], words, above):
            return -BAD_SCALES
        for s in range(len(scales)):
            scales[s] += above[s] & 0xFFFF
    own = _members()[: layout[TABLES]]
    members(layout, opened.wide, opened.tweak, own)
    settings[TAIL] = 0
    filled = runs.open_run(
        opened.data, own, family, DIRECT_BITS, frequencies, opened.slots, states, settings, words
    )
    return -BAD_HEAD if filled == BAD else filled


@kernel()
def decode_elements(
    base: Elements,
    scales: Longs,
    opened: OpenDelta,
    words: Words,
    settings: Longs,
    states: Numbers,
    rest: Longs,
    out: Elements,
) -> bool:
    """Fill out from an open run; False where the run or the planes do not fit.

    scales           int64, one a segment
    words ... rest   as :func:`.runs.open_run` left them; the others as in :func:`decode`
    """
    shift, mask, layout, slots = opened.shift, opened.mask, opened.layout, opened.slots
    planes, starts = opened.planes, opened.starts
    log_segment, step = layout[LOG_SEGMENT], layout[STEP]
    lowest, last = layout[LOWEST], layout[TABLES] - 1
    contexts, values = _block_of_bytes(), _block_of_values()
    cursors, limits = _seven_cursors(), _three_limits()
    plane_limits(layout, limits)
    for p in range(7):
        cursors[p] = starts[p]
    cursor, done = 0, 0
    if base.itemsize <= 2 and settings[LANES] == 64:  # what is left goes the slower way below
        done = len(out) & ~63
        cursor = decode_narrow(base, scales, opened, words, settings, states, out)
    for first in range(done, len(out), BLOCK):
        stop = min(first + BLOCK, len(out))
        block, part = contexts[: stop - first], out[first:stop]
        contexts_of(base[first:stop], first, shift, mask, scales, log_segment, lowest, step, last, block)
        cursor = runs.decode_values(words, cursor, slots, block, values, settings, states, rest)
        if cursor > len(words) - GUARD:
            return False
        if base.itemsize >= 4 and not append_bytes(values, block, limits, planes, cursors, starts):
            return False
        if base.itemsize < 8:
            restore(base[first:stop], values, part)
        elif not _restore_long(base[first:stop], values, planes, cursors, starts, part):
            return False
    for p in range(7):
        if cursors[p] != starts[p + 1]:
            return False
    return runs.ended_well(words, cursor, settings[LANES], states)


@kernel()
def decode_narrow(
    base: Elements,
    scales: Longs,
    opened: OpenDelta,
    words: Words,
    settings: Longs,
    states: Numbers,
    out: Elements,
) -> int:
    """Fill the whole steps of out (elements of 8 or 16 bits) from a run of 64 lanes; the word cursor."""
    layout, slots, shift, mask = opened.layout, opened.slots, opened.shift, opened.mask
    log_segment, step, lowest, last = layout[LOG_SEGMENT], layout[STEP], layout[LOWEST], layout[TABLES] - 1
    end, steps, precision = len(words) - GUARD, len(out) >> 6, settings[BITS]
    log_segment = log_segment if log_segment else 62  # all in segment 0
    if settings[DIRECT]:
        return simd.decode_floats_direct(
            words, slots, base, out, states, 0, end, steps, precision, shift, mask, scales, log_segment,
            0, lowest, step, last, opened.ahead,
        )  # fmt: skip
    if share_of_long_values(base, scales, opened, precision) > _MANY_LONG:
        return simd.decode_floats_raw(
            words, slots, base, out, states, 0, end, steps, precision, shift, mask, scales, log_segment,
            0, lowest, step, last, opened.ahead,
        )  # fmt: skip
    return simd.decode_floats(
        words, slots, base, out, states, 0, end, steps, precision, shift, mask, scales, log_segment,
        0, lowest, step, last, opened.ahead,
    )  # fmt: skip


@kernel()
def share_of_long_values(base: Elements, scales: Longs, opened: OpenDelta, precision: int) -> float:
    """About what part of a chunk's values has more raw bits than are inline, by the contexts of a sample."""
    layout, shares, total, seen = opened.layout, _shares(), 0.0, 0
    contexts = _block_of_bytes()[:_PLACE]
    longest = (1 << DIRECT_BITS) + 4 * (19 - precision - DIRECT_BITS)  # the first such token
    for c in range(layout[TABLES]):
        found = np.uint32(0)
        for t in range(longest, TOKENS):
            found += opened.frequencies[c, t]
        shares[c] = found / (1 << precision)
    for first in range(0, len(base) - _PLACE + 1, max(len(base) // _SEEN, _PLACE)):
        contexts_of(
            base[first : first + _PLACE], first, opened.shift, opened.mask, scales, layout[LOG_SEGMENT],
            layout[LOWEST], layout[STEP], layout[TABLES] - 1, contexts,
        )  # fmt: skip
        for i in range(_PLACE):
            total += shares[contexts[i]]
        seen += _PLACE
    return total / max(seen, 1)


@kernel()
def _restore_long(
    base: Elements, values: Numbers, planes: Bytes, cursors: Longs, starts: Longs, out: Elements
) -> bool:
    """Restore a block of 64-bit elements, the low halves of whose distances fill planes 3..6."""
    for p in range(3, 7):
        if cursors[p] + len(out) > starts[p + 1]:
            return False
    full = _block_of_long_values()[: len(out)]
    for i in range(len(out)):
        value = np.uint64(values[i])
        for p in range(6, 2, -1):
            value = value << np.uint64(8) | np.uint64(planes[cursors[p] + i])
        full[i] = value
    for p in range(3, 7):
        cursors[p] += len(out)
    restore(base, full, out)
    return True
