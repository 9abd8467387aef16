"""Runs of tokens, compiled: the tables, then the rANS stream of many lanes.

A *run* codes `n` values (uint32), each under one of a few contexts (uint8) that both sides know.
Layout, little-endian:

    u8        precision - 8 | lane code << 3 | spread << 5
    u8        highest token that tables of the family provide for
    bits      one table a context: 0 = of the family, 1 = explicit (`put_table`), in whole bytes
    u32 * lanes   the lanes' states
    u16 ...   the words, in the order in which the decoder needs them, to the end of the run

Value `i` belongs to lane `i % lanes`. All functions here are kernels; :mod:`..methods.entropy` calls them and
tests/codec/reference.py says the same in NumPy. Their signatures are spelled out so that each is compiled
once, whatever constants it is called with.
"""

from __future__ import annotations

import numpy as np
from numba import types

from ..constants import (  # fmt: skip
    APART,
    BAD,
    BITS,
    BLOCK,
    DIRECT,
    FIRST,
    GUARD,
    LANES,
    RING,
    STATE_FLOOR,
    TAIL,
    TWEAK,
    WAYS,
)
from ..kernel_arrays import Bytes, Elements, Longs, Numbers, RunSpace, Words
from ..tables import DIRECT_BITS, PRECISION, SCALES, TOKENS
from . import simd
from .arithmetic import log2
from .kernel import Integer, array, kernel, room

_TOTAL, _SMALL_TOTAL = 1 << 14, 1 << 6  # what explicit weights add up to, about; the second for small runs
_MANTISSA = 3  # explicit tables: bits kept after a weight's highest bit
#: With probabilities of one bit less the decoder's tables fit its nearest cache: worth this much more space.
_COARSE = 1.002
_SMALL = 1 << 14  # values below which tables weigh enough to search the family
_SPREADS, _MOST_TWEAK, _USUAL_SPREAD = (0, 2, 4), 4, 2  # what a small run may do with the family
_LANES_FROM = ((256, 4), (1000, 16), (6000, 64))  # sizes in bytes from which a run has so many lanes

_i = types.int64
_flag = types.boolean
_real = types.float64
_bytes, _longs = array(types.uint8), array(types.int64)
_numbers, _words, _tables = array(types.uint32), array(types.uint16), array(types.uint32, 2)
_space = types.NamedTuple(
    (_numbers, _words, _numbers, _tables, _bytes, _numbers, _words, _bytes, _longs), RunSpace
)
_a_table, _no_bytes = room(types.uint32, TOKENS), room(types.uint8, 0)
_one_long, _settings, _rest = room(types.int64, 1), room(types.int64, 4), room(types.int64, 64)
_slots, _states = room(types.uint32, 1 << PRECISION), room(types.uint32, 64)
_ring = room(types.uint32, RING * 64)
_block_of_bytes, _block_of_numbers = room(types.uint8, BLOCK), room(types.uint32, BLOCK)


@kernel(inline="always")
def token_of(value: Integer, direct_bits: int) -> int:
    """The token of a value (see tables.token_of)."""
    if value < (1 << direct_bits):
        return np.int64(value)  # type: ignore[return-value]
    octave = floor_log2(value)
    return (
        (1 << direct_bits)  # type: ignore[return-value]
        + ((octave - direct_bits) << 2)
        + np.int64((value >> np.uint32(octave - 2)) & np.uint32(3))
    )


@kernel(inline="always")
def floor_log2(value: Integer) -> int:
    """The place of the highest set bit of a positive uint32."""
    return np.int64(simd.bit_length(np.uint32(value))) - 1  # type: ignore[return-value]


@kernel(inline="always")
def raw_bits_of(token: int, direct_bits: int) -> int:
    """How many low bits of the value follow a token (see tables.raw_bits_of)."""
    direct = 1 << direct_bits
    return 0 if token < direct else ((token - direct) >> 2) + direct_bits - 2


@kernel(inline="always")
def _lead_of(token: int, direct_bits: int) -> int:
    """The value of a token, without its raw bits (see tables.lead_of)."""
    return token if token < 1 << direct_bits else 4 | (token & 3)


# ---------------------------------------------------------------------------------------- tables


@kernel(types.void(_numbers, _i, _numbers))
def fit_frequencies(weights: Numbers, precision: int, frequencies: Numbers) -> None:
    """Frequencies adding up to 2**precision: each present token gets 1 and its share of the rest.

    `weights` and `frequencies` are uint32[TOKENS]; what rounding leaves goes to the first of the
    heaviest. All weights zero make all frequencies zero.
    """
    total, present, heaviest = np.int64(0), np.int64(0), 0
    for t in range(TOKENS):
        weight = np.int64(weights[t])
        total += weight
        if weight > 0:
            present += 1
        if weights[t] > weights[heaviest]:
            heaviest = t
    left = np.int64(1) << precision
    spare = left - present
    for t in range(TOKENS):
        weight = np.int64(weights[t])
        frequency = np.int64(0)
        if weight > 0:
            frequency = 1 + weight * spare // total
        frequencies[t] = frequency
        left -= frequency
    if total > 0:
        frequencies[heaviest] += left


@kernel(types.void(_tables, _i, _i, _i, _numbers))
def family_weights(family: Numbers, member: int, spread: int, highest: int, weights: Numbers) -> None:
    """The weights of one member of the family, tokens up to `highest` all present.

    A `spread` of k half octaves averages the members k below, 0 (twice) and k above: heavier tails.
    """
    low = family[min(max(member - spread, 0), SCALES - 1)]
    middle = family[min(max(member, 0), SCALES - 1)]
    high = family[min(max(member + spread, 0), SCALES - 1)]
    for t in range(TOKENS):
        if t <= highest:
            weights[t] = max((low[t] + 2 * middle[t] + high[t]) >> 2, 1)
        else:
            weights[t] = 0


@kernel(_i(_i, _i))
def coarse_weight(kind: int, mantissa: int) -> int:
    """The weight that an explicit table means by a bit length and up to three mantissa bits."""
    if kind == 0:
        return 0
    kept = min(kind - 1, _MANTISSA)
    dropped = kind - 1 - kept
    return ((1 << kept | mantissa) << dropped) + ((1 << dropped) >> 1)


@kernel(types.void(_numbers, _i, _i, _numbers))
def coarsen(counts: Numbers, total: Integer, aim: int, weights: Numbers) -> None:
    """Counts to the weights an explicit table can say, `aim` in all, about; every positive count stays so."""
    for t in range(TOKENS):
        count = np.int64(counts[t])
        if count == 0:
            weights[t] = 0
            continue
        weight: int = max(count * aim // total, 1)  # type: ignore[assignment]
        kind = floor_log2(weight) + 1
        dropped = kind - 1 - min(kind - 1, _MANTISSA)
        weights[t] = (
            coarse_weight(kind, (weight >> dropped) & ((1 << _MANTISSA) - 1)) if (dropped) else weight
        )


@kernel(_i(_bytes, _i, _i, _i))
def _put(data: Bytes, bit: int, value: Integer, count: int) -> int:
    """Append `count` bits of `value`, lowest first, at position `bit`; the bytes start as zero."""
    for i in range(count):
        if (value >> i) & 1:
            data[bit >> 3] |= np.uint8(1 << (bit & 7))
        bit += 1
    return bit


@kernel(_i(_bytes, _i, _i, _i))
def _get(data: Bytes, bit: int, end: int, count: int) -> int:
    """`count` bits from position `bit`; bits beyond byte `end` read as zero."""
    value = 0
    for i in range(count):
        if (bit >> 3) < end:
            value |= np.int64((data[bit >> 3] >> np.uint8(bit & 7)) & 1) << i  # type: ignore[assignment]
        bit += 1
    return value


@kernel(types.UniTuple(_i, 2)(_numbers))
def table_span(weights: Numbers) -> tuple[int, int]:
    """(first, last) token present; (0, -1) for an empty table."""
    first, last = 0, TOKENS - 1
    while first < TOKENS and weights[first] == 0:
        first += 1
    while last >= first and weights[last] == 0:
        last -= 1
    return (first, last) if first < TOKENS else (0, -1)


@kernel(_i(_bytes, _i, _numbers))
def put_table(data: Bytes, bit: int, weights: Numbers) -> int:
    """Write one explicit table: first token, last token (8 bits each), then each weight.

    A weight is its bit length, as the difference to the one before (zigzag, unary; 12 before the
    first), then up to three mantissa bits. With `data` empty nothing is written, only measured.
    """
    first, last = table_span(weights)
    write = len(data) > 0
    if write:
        _put(data, bit, first, 8)
        _put(data, bit + 8, last, 8)
    bit += 16
    before = 12
    for t in range(first, last + 1):
        weight = np.int64(weights[t])
        kind = floor_log2(weight) + 1 if weight > 0 else 0
        step = kind - before
        unary = 2 * step if step >= 0 else -2 * step - 1
        kept = min(max(kind - 1, 0), _MANTISSA)
        if write:
            _put(data, bit, (1 << unary) - 1, unary + 1)
            _put(data, bit + unary + 1, weight >> max(kind - 1 - kept, 0), kept)
        bit += unary + 1 + kept
        before = kind
    return bit


@kernel(_i(_bytes, _i, _i, _numbers))
def get_table(data: Bytes, bit: int, end: int, weights: Numbers) -> int:
    """Read what `put_table` wrote into weights (uint32[TOKENS]); the next bit, or BAD."""
    weights[:] = 0
    first, last = _get(data, bit, end, 8), _get(data, bit + 8, end, 8)
    bit += 16
    before = 12
    for t in range(first, last + 1):
        unary = 0
        while unary < 40 and _get(data, bit, end, 1) == 1:
            unary += 1
            bit += 1
        bit += 1
        kind = before + ((unary >> 1) if unary & 1 == 0 else -((unary + 1) >> 1))
        if kind < 0 or kind > 16 or bit > end << 3:
            return BAD
        kept = min(max(kind - 1, 0), _MANTISSA)
        weights[t] = coarse_weight(kind, _get(data, bit, end, kept))
        bit += kept
        before = kind
    return bit if bit <= end << 3 else BAD


@kernel(_real(_numbers, _numbers, _i))
def table_cost(counts: Numbers, frequencies: Numbers, precision: int) -> float:
    """Bits that `counts` tokens take under `frequencies`; infinite where one has none."""
    bits = 0.0
    for t in range(TOKENS):
        if counts[t] > 0:
            if frequencies[t] == 0:
                return np.inf
            bits += counts[t] * (precision - log2(np.float64(frequencies[t])))
    return bits


@kernel(types.UniTuple(_i, 2)(_tables, _longs, _tables, _i))
def fit_family(counts: Numbers, members: Longs, family: Numbers, highest: int) -> tuple[int, int]:
    """(tweak, spread) under which all tokens take the fewest bits, all tables being the family's."""
    best, best_tweak, best_spread = np.inf, 0, 0
    weights, frequencies = _a_table(), _a_table()
    for tweak in range(-_MOST_TWEAK, _MOST_TWEAK + 1):
        for spread in _SPREADS:
            bits = 0.0
            for c in range(len(members)):
                family_weights(family, members[c] + tweak, spread, highest, weights)
                fit_frequencies(weights, PRECISION, frequencies)
                bits += table_cost(counts[c], frequencies, PRECISION)
            if bits < best:
                best, best_tweak, best_spread = bits, tweak, spread
    return best_tweak, best_spread


@kernel(_real(_tables, _longs, _i, _tables, _i, _i, _i, _flag, _bytes, _tables, _tables))
def choose_tables(
    counts: Numbers,
    members: Longs,
    tweak: int,
    family: Numbers,
    spread: int,
    precision: int,
    highest: int,
    small: bool,
    explicit: Bytes,
    weights: Numbers,
    frequencies: Numbers,
) -> float:
    """For each context the cheaper of an explicit table and the family's; the cost in bits.

    counts       uint32[contexts, TOKENS]
    members      int64[contexts], each context's member of the family, to which the tweak is added
    small        whether weights are to be tried that say less and take fewer bits
    explicit     uint8[contexts], weights and frequencies uint32[contexts, TOKENS]: written
    """
    own_weights, own, nothing, total_bits = _a_table(), _a_table(), _no_bytes(), 0.0
    for c in range(len(members)):
        family_weights(family, members[c] + tweak, spread, highest, weights[c])
        fit_frequencies(weights[c], precision, frequencies[c])
        bits = table_cost(counts[c], frequencies[c], precision)
        total = np.int64(0)
        for t in range(TOKENS):
            total += counts[c, t]
        explicit[c] = 0
        for less in range((2 if small else 1) if total > 0 else 0):
            coarsen(counts[c], total, _SMALL_TOTAL if less else _TOTAL, own_weights)
            fit_frequencies(own_weights, precision, own)
            own_bits = table_cost(counts[c], own, precision) + put_table(nothing, 0, own_weights)
            if own_bits < bits:
                explicit[c], bits = 1, own_bits
                for t in range(TOKENS):
                    weights[c, t], frequencies[c, t] = own_weights[t], own[t]
        total_bits += bits + 1
    return total_bits


@kernel(_i(_bytes, _bytes, _tables))
def write_tables(out: Bytes, explicit: Bytes, weights: Numbers) -> int:
    """One table a context into out (zeros before); how many bytes."""
    bit = 0
    for c in range(len(explicit)):
        bit = _put(out, bit, explicit[c], 1)
        if explicit[c]:
            bit = put_table(out, bit, weights[c])
    return (bit + 7) >> 3


@kernel(_i(_bytes, _longs, _tables, _i, _i, _i, _tables))
def read_tables(
    data: Bytes,
    members: Longs,
    family: Numbers,
    spread: int,
    precision: int,
    highest: int,
    frequencies: Numbers,
) -> int:
    """The tables that data begins with into frequencies; how many bytes they took, or BAD."""
    weights, bit, end = _a_table(), 0, len(data)
    for c in range(len(members)):
        if _get(data, bit, end, 1) == 1:
            bit = get_table(data, bit + 1, end, weights)
            if bit == BAD:
                return BAD
        else:
            family_weights(family, members[c], spread, highest, weights)
            bit += 1
        fit_frequencies(weights, precision, frequencies[c])
        total = np.int64(0)
        for t in range(TOKENS):
            total += frequencies[c, t]
        if total != 1 << precision:
            return BAD
    return (bit + 7) >> 3 if bit <= end << 3 else BAD


@kernel(_i(_tables, _i, _numbers))
def fill_slots(frequencies: Numbers, direct_bits: int, slots: Numbers) -> int:
    """Fill slots (uint32, tables << precision): what a lane's low bits and its context stand for.

    A slot is raw bit count << 27 | leading part << 23 | frequency << 11 | slot - start; where no
    token carries raw bits, the token takes the place of the first two. Returns the highest token.
    """
    highest, at = 0, 0
    for c in range(len(frequencies)):
        for t in range(highest, TOKENS):
            if frequencies[c, t] > 0:
                highest = t
    direct = highest < 1 << direct_bits
    for c in range(len(frequencies)):
        for t in range(highest + 1):
            frequency: int = np.int64(frequencies[c, t])  # type: ignore[assignment]
            if frequency > 0:
                value = t if direct else raw_bits_of(t, direct_bits) << 4 | _lead_of(t, direct_bits)
                entry = np.uint32(value << 23 | frequency << 11)
                row = slots[at : at + frequency]
                for i in range(len(row)):
                    row[i] = entry + np.uint32(i)
                at += frequency
    return highest


# ---------------------------------------------------------------------------------------- counting


@kernel(_i(_i, _i))
def log_span(direct_bits: int, value_bits: int) -> int:
    """log2 of how many tokens values of so many bits may have: the length of a row of keys."""
    if direct_bits == 8:
        return 8
    return 6 if value_bits <= 16 else 7


@kernel(types.void(_bytes, _numbers, _i, _i, _words, _numbers, _tables))
def count_tokens(
    contexts: Bytes,
    values: Numbers,
    direct_bits: int,
    span: int,
    keys: Words,
    counts: Numbers,
    total: Numbers,
) -> None:
    """How often each token comes in each context into total.

    keys     uint16, written: context << span | token of each value
    counts   uint32[WAYS * ((tables << span) + APART)], scratch
    total    uint32[tables, TOKENS]
    """
    # The room between the counters of one key keeps them from looking alike to a processor, which
    # compares the last 12 bits of addresses to find out whether a load must wait for a store.
    width = (len(total) << span) + APART
    counts[: WAYS * width] = 0
    done = simd.count_vectors(values, contexts, keys, counts, width, direct_bits, span)
    for i in range(done, len(keys)):
        keys[i] = np.int64(contexts[i]) << span | token_of(values[i], direct_bits)
        counts[keys[i]] += np.uint32(1)
    total[:] = 0
    for way in range(WAYS):
        row = counts[way * width : (way + 1) * width]
        for c in range(len(total)):
            for t in range(1 << span):
                total[c, t] += row[c << span | t]


# ---------------------------------------------------------------------------------------- writing


@kernel(_i(_words, _i, _numbers, _words, _numbers, _numbers, _i, _i, _i))
def _encode_scalar(
    words: Words,
    at: int,
    table: Numbers,
    keys: Words,
    values: Numbers,
    states: Numbers,
    first: int,
    count: int,
    precision: int,
) -> int:
    """One step of `count` lanes, values from `first`, in front of `at`; the new `at`.

    The mirror image of `_decode_scalar`: raw bits of the second pull, of the first, then tokens.
    """
    inline = 16 - precision
    for pull in (2, 1):
        for lane in range(count - 1, -1, -1):
            value = np.int64(values[first + lane])
            raw: int = (np.int64(table[keys[first + lane]]) >> 11) & 31  # type: ignore[assignment]
            rest = max(raw - inline, 0)
            width = min(rest, 16) if pull == 1 else max(rest - 16, 0)
            if width == 0:
                continue
            state = np.int64(states[lane])
            if state >> (32 - width):
                at -= 1
                words[at] = state & 0xFFFF
                state >>= 16
            part = value >> (rest - width) if pull == 1 else value
            states[lane] = (state << width) | (part & ((1 << width) - 1))
    for lane in range(count - 1, -1, -1):
        value, entry = np.int64(values[first + lane]), np.int64(table[keys[first + lane]])
        frequency, raw, start = entry >> 16, (entry >> 11) & 31, entry & 2047  # type: ignore[assignment]
        width = min(raw, inline)
        state = np.int64(states[lane])
        if state >> (32 - precision - width) >= frequency:
            at -= 1
            words[at] = state & 0xFFFF
            state >>= 16
        state = (state << width) | ((value >> (raw - width)) & ((1 << width) - 1))
        states[lane] = ((state // frequency) << precision) + state % frequency + start
    return at


@kernel(types.void(_tables, _i, _i, _i, _numbers))
def fill_encoder_table(frequencies: Numbers, direct_bits: int, tail: int, span: int, table: Numbers) -> None:
    """uint32, 1 << span entries a context: frequency << 16 | raw bit count << 11 | start, by key (see
    `count_tokens`)."""
    for c in range(len(frequencies)):
        start = 0
        for t in range(1 << span):
            frequency: int = np.int64(frequencies[c, t])  # type: ignore[assignment]
            table[c << span | t] = frequency << 16 | (raw_bits_of(t, direct_bits) + tail) << 11 | start
            start += frequency


@kernel(_i(_words, _tables, _words, _numbers, _i, _i, _i, _i, _i, _numbers, _numbers))
def encode_words(
    words: Words,
    frequencies: Numbers,
    keys: Words,
    values: Numbers,
    lanes: int,
    direct_bits: int,
    tail: int,
    span: int,
    precision: int,
    table: Numbers,
    states: Numbers,
) -> int:
    """Code the values into the end of `words` (3 a value, and WORDS_SPARE); where the words begin.

    frequencies  uint32[tables, TOKENS], each table adding up to 1 << precision
    keys         uint16, one a value (see `count_tokens`), of the values without their tails
    tail         how many low bits of each value are raw, whatever its token; none has more raw bits then
    table        uint32, tables << span, scratch
    states       uint32[64], the lanes' final states: what the decoder begins with
    """
    at, count = len(words), len(values)
    fill_encoder_table(frequencies, direct_bits, tail, span, table)
    states[:lanes] = STATE_FLOOR
    steps = count // lanes
    at = _encode_scalar(
        words, at, table, keys, values, states, steps * lanes, count - steps * lanes, precision
    )
    if lanes >= 16 and steps:
        entries = _ring()
        if lanes == 64:
            return simd.encode_64(words, table, keys, entries, values, states, at, steps, precision)
        return simd.encode_16(words, table, keys, entries, values, states, at, steps, precision)
    for step in range(steps - 1, -1, -1):
        at = _encode_scalar(words, at, table, keys, values, states, step * lanes, lanes, precision)
    return at


@kernel(_i(_bytes, _numbers, _longs, _tables, _i, _i, _i, _real, _space, _i))
def encode_run(
    contexts: Bytes,
    values: Numbers,
    members: Longs,
    family: Numbers,
    direct_bits: int,
    value_bits: int,
    tail: int,
    limit: float,
    space: RunSpace,
    at: int,
) -> int:
    """Code a run with the cheapest tables found; where its head ends, or BAD where it would be too long.

    contexts     uint8[n], each below len(members)
    values       uint32[n], each below 2**value_bits
    members      int64[contexts], each context's member of the family, before the tweak is added
    tail         how many low bits of each value are raw; the others are bytes then
    limit        bytes
    space        a kernel_arrays.RunSpace. Of the run, the words go to the end of `words`, all else to
                 `head` from `at` on
    """
    count, wide, span = len(values), len(members), log_span(direct_bits, value_bits)
    counts, keys, upper = space.tables[:wide], space.keys[:count], values
    if tail:
        upper = space.leading[:count]
        for i in range(count):
            upper[i] = values[i] >> np.uint32(tail)
    count_tokens(contexts, upper, direct_bits, span, keys, space.counters, counts)
    highest, raw = highest_and_raw_bits(counts, direct_bits)
    tweak, spread, small = 0, _USUAL_SPREAD, count < _SMALL and wide > 1
    if small:
        tweak, spread = fit_family(counts, members, family, highest)
    raw += np.float64(tail * count)
    choice, bits = cheapest_tables(
        members, tweak, family, spread, highest, raw, count >= _SMALL, small, space.tables, space.explicit
    )
    if bits > 8 * limit:
        return BAD
    precision, tables = PRECISION - choice, space.tables[(1 + 2 * choice) * wide :]
    code, states = lane_code(bits / 8, count), _states()
    lanes = 1 << 2 * code
    space.found[TWEAK] = tweak
    space.found[FIRST] = encode_words(
        space.words, tables[wide : 2 * wide], keys, values, lanes, direct_bits, tail, span, precision,
        space.encoder, states,
    )  # fmt: skip
    head = space.head
    head[at:] = 0
    head[at], head[at + 1] = precision - 8 | code << 3 | spread << 5, highest
    at += 2 + write_tables(head[at + 2 :], space.explicit[choice * wide : (choice + 1) * wide], tables[:wide])
    for lane in range(lanes):
        at = put_number(head, at, np.int64(states[lane]), 4)
    return at


@kernel(types.Tuple((_i, _real))(_longs, _i, _tables, _i, _i, _real, _flag, _flag, _tables, _bytes))
def cheapest_tables(
    members: Longs,
    tweak: int,
    family: Numbers,
    spread: int,
    highest: int,
    raw: float,
    coarse: bool,
    small: bool,
    tables: Numbers,
    explicit: Bytes,
) -> tuple[int, float]:
    """(0, or 1 where probabilities of one bit less than PRECISION are taken; bits of the run)

    raw          bits of the run that no table has a part in
    coarse       whether fewer bits may be taken at all
    small        as for :func:`choose_tables`
    tables       uint32[5 * contexts, TOKENS]: the counts, read; weights and frequencies of choice 0, and of 1
    explicit     uint8[2 * contexts], written
    """
    wide, choice, bits = len(members), 0, 0.0
    for less in range(2 if coarse else 1):
        of_this, room = explicit[less * wide : (less + 1) * wide], tables[(1 + 2 * less) * wide :]
        found = raw + choose_tables(
            tables[:wide], members, tweak, family, spread, PRECISION - less, highest, small,
            of_this, room[:wide], room[wide : 2 * wide],
        )  # fmt: skip
        if less == 0 or found <= _COARSE * bits:
            choice, bits = less, found
    return choice, bits


@kernel(types.Tuple((_i, _real))(_tables, _i))
def highest_and_raw_bits(counts: Numbers, direct_bits: int) -> tuple[int, float]:
    """The highest token that comes, and how many raw bits follow all tokens."""
    highest, bits = 0, np.int64(0)
    for c in range(len(counts)):
        for t in range(TOKENS):
            if counts[c, t]:
                highest = max(highest, t)
                bits += np.int64(counts[c, t]) * raw_bits_of(t, direct_bits)
    return highest, np.float64(bits)


@kernel(_i(_real, _i))
def lane_code(size: float, count: int) -> int:
    """Half the logarithm of how many lanes a run of that many bytes gets: each wastes two."""
    code = 0
    for least, lanes in _LANES_FROM:
        code += size >= least and count >= 4 * lanes
    return code


@kernel(_i(_bytes, _i, _i, _i))
def put_number(out: Bytes, at: int, value: Integer, size: int) -> int:
    """Write the low `size` bytes of an integer; where they end."""
    for place in range(size):
        out[at + place] = (value >> 8 * place) & 255
    return at + size


@kernel(_i(_bytes, _i, _words))
def put_words(out: Bytes, at: int, words: Words) -> int:
    """Write words; where they end."""
    for i in range(len(words)):
        at = put_number(out, at, np.int64(words[i]), 2)
    return at


# ---------------------------------------------------------------------------------------- reading


@kernel(inline="always")
def get_number(data: Bytes, at: int, size: int) -> int:
    """The integer of `size` bytes at data[at]: unsigned, below 64 bits."""
    value = np.int64(0)
    for place in range(size):
        value |= np.int64(data[at + place]) << 8 * place
    return value  # type: ignore[return-value]


@kernel(inline="always")
def _refill(words: Words, at: int, end: int, state: Integer) -> tuple[int, int]:
    """A lane below the floor takes one word; beyond the end it takes the floor: (state, at)."""
    if state >= STATE_FLOOR:
        return state, at  # type: ignore[return-value]
    return ((state << 16) | np.int64(words[at]) if at < end else np.int64(STATE_FLOOR)), at + 1  # type: ignore[return-value]


@kernel(_i(_words, _i, _i, _numbers, _bytes, _numbers, _numbers, _longs, _i, _i, _i, _flag, _i))
def _decode_scalar(
    words: Words,
    at: int,
    end: int,
    slots: Numbers,
    contexts: Bytes,
    values: Numbers,
    states: Numbers,
    rest: Longs,
    first: int,
    count: int,
    precision: int,
    direct: bool,
    tail: int,
) -> int:
    """One step of `count` lanes, values from `first`; the new `at`, beyond `end` when exhausted.

    `rest` is scratch, int64[64]: the raw bits each lane still waits for.
    """
    inline = 16 - precision
    more = False
    for lane in range(count):
        state = np.int64(states[lane])
        slot = state & ((1 << precision) - 1)
        entry = np.int64(slots[(np.int64(contexts[first + lane]) << precision) | slot])
        state = ((entry >> 11) & 4095) * (state >> precision) + (entry & 2047)
        raw, lead = (tail, entry >> 23) if direct else (entry >> 27, (entry >> 23) & 15)
        width = min(raw, inline)
        values[first + lane] = (lead << width) | (state & ((1 << width) - 1))
        states[lane], at = _refill(words, at, end, state >> width)
        rest[lane] = raw - width
        more |= raw > width  # type: ignore[assignment]
    for _ in range(2 if more else 0):
        for lane in range(count):
            width = min(rest[lane], 16)
            if width > 0:
                state = np.int64(states[lane])
                part = state & ((1 << width) - 1)
                values[first + lane] = (np.int64(values[first + lane]) << width) | part
                states[lane], at = _refill(words, at, end, state >> width)
                rest[lane] -= width
    return at


@kernel(_i(_bytes, _longs, _tables, _i, _tables, _numbers, _numbers, _longs))
def open_head(
    data: Bytes,
    members: Longs,
    family: Numbers,
    direct_bits: int,
    frequencies: Numbers,
    slots: Numbers,
    states: Numbers,
    settings: Longs,
) -> int:
    """Read the head of a run that takes up all of `data`; where its words begin, or BAD.

    frequencies  uint32[len(members), TOKENS], scratch
    slots      uint32, len(members) << PRECISION
    states     uint32[64], settings int64[4]: written, except for settings[TAIL]
    """
    if len(data) < 2:
        return BAD
    precision, lanes, spread = 8 + (data[0] & 7), 1 << 2 * (data[0] >> 3 & 3), data[0] >> 5
    if precision > PRECISION:
        return BAD
    size = read_tables(data[2:], members, family, spread, precision, data[1], frequencies)
    at = 2 + size
    if size == BAD or at + 4 * lanes > len(data) or (len(data) - at) & 1:
        return BAD
    highest = fill_slots(frequencies, direct_bits, slots)
    # Beyond 32 bits a value would carry more raw bits than a lane can be shifted by.
    if highest > token_of(np.uint32(0xFFFFFFFF), direct_bits):
        return BAD
    for lane in range(lanes):
        state = get_number(data, at + 4 * lane, 4)
        if state < STATE_FLOOR:
            return BAD
        states[lane] = state
    settings[LANES], settings[BITS], settings[DIRECT] = lanes, precision, highest < 1 << direct_bits
    return at + 4 * lanes  # type: ignore[no-any-return]


@kernel(_i(_words, _i, _numbers, _bytes, _numbers, _longs, _numbers, _longs))
def decode_values(
    words: Words,
    at: int,
    slots: Numbers,
    contexts: Bytes,
    values: Numbers,
    settings: Longs,
    states: Numbers,
    rest: Longs,
) -> int:
    """Decode len(contexts) values, whole steps unless they are the run's last; the word cursor.

    settings     int64[4], see constants.py; a tail wants a run of bytes
    words        uint16, with GUARD words behind the stream
    A cursor beyond `len(words) - GUARD` says that the stream was too short.
    """
    lanes, precision, direct, tail = settings[LANES], settings[BITS], settings[DIRECT] != 0, settings[TAIL]
    count, end = len(contexts), len(words) - GUARD
    steps = count // lanes
    if lanes == 64 and tail:
        at = simd.decode_64_tail(words, slots, contexts, values, states, at, end, steps, precision, tail)
    elif lanes == 64 and direct:
        at = simd.decode_64_direct(words, slots, contexts, values, states, at, end, steps, precision, tail)
    elif lanes == 64:
        at = simd.decode_64(words, slots, contexts, values, states, at, end, steps, precision, tail)
    elif lanes == 16 and direct and not tail:
        at = simd.decode_16_direct(words, slots, contexts, values, states, at, end, steps, precision, tail)
    elif lanes == 16 and not tail:
        at = simd.decode_16(words, slots, contexts, values, states, at, end, steps, precision, tail)
    else:
        for step in range(steps):
            at = _decode_scalar(
                words, at, end, slots, contexts, values, states, rest, step * lanes, lanes,
                precision, direct, tail,
            )  # fmt: skip
    if at > end:
        return at
    return _decode_scalar(
        words, at, end, slots, contexts, values, states, rest, steps * lanes,
        count - steps * lanes, precision, direct, tail,
    )  # fmt: skip


@kernel(_flag(_words, _i, _i, _numbers))
def ended_well(words: Words, at: int, lanes: int, states: Numbers) -> bool:
    """Whether a run used up exactly its words and left every lane as the encoder began it."""
    if at != len(words) - GUARD:
        return False
    for lane in range(lanes):  # noqa: SIM110  (Numba has no generators)
        if states[lane] != STATE_FLOOR:
            return False
    return True


@kernel(_i(_bytes, _longs, _tables, _i, _tables, _numbers, _numbers, _longs, _words))
def open_run(
    data: Bytes,
    members: Longs,
    family: Numbers,
    direct_bits: int,
    frequencies: Numbers,
    slots: Numbers,
    states: Numbers,
    settings: Longs,
    words: Words,
) -> int:
    """Read all of a run but its values; how many of `words` are written, or BAD where it cannot be one.

    words        uint16, scratch; the others as in :func:`open_head`. A run of more than len(words) - GUARD
                 words is none
    """
    start = open_head(data, members, family, direct_bits, frequencies, slots, states, settings)
    if start == BAD:
        return BAD
    body = data[start:]
    count = len(body) >> 1
    if count + GUARD > len(words):
        return BAD
    for i in range(count):
        words[i] = np.int64(body[2 * i]) | np.int64(body[2 * i + 1]) << 8
    words[count : count + GUARD] = 0
    return count + GUARD


@kernel()
def decode_list(
    data: Bytes,
    family: Numbers,
    direct_bits: int,
    tail: int,
    frequencies: Numbers,
    words: Words,
    out: Elements,
) -> bool:
    """Fill out (unsigned[n]) from a run of one context that takes up all of `data`; False where it is none.

    frequencies  uint32[1, TOKENS], scratch
    words        uint16[len(data) // 2 + GUARD], scratch
    """
    members, slots, states = _one_long(), _slots(), _states()
    settings, rest = _settings(), _rest()
    members[0], settings[TAIL] = 0, tail
    rest[:] = 0
    count = open_run(data, members, family, direct_bits, frequencies, slots, states, settings, words)
    if count == BAD:
        return False
    words = words[:count]
    contexts, values, cursor = _block_of_bytes(), _block_of_numbers(), 0
    contexts[:] = 0
    for first in range(0, len(out), BLOCK):
        part = out[first : first + BLOCK]
        here = contexts[: len(part)]
        cursor = decode_values(words, cursor, slots, here, values, settings, states, rest)
        if cursor > len(words) - GUARD:
            return False
        for i in range(len(part)):
            part[i] = values[i]
    return ended_well(words, cursor, settings[LANES], states)


@kernel(_flag(_bytes, _tables, _i, _i, _tables, _words, _numbers))
def decode_numbers(
    data: Bytes,
    family: Numbers,
    direct_bits: int,
    tail: int,
    frequencies: Numbers,
    words: Words,
    out: Numbers,
) -> bool:
    """:func:`decode_list` into uint32[n]: compiled once for whoever calls it."""
    return decode_list(data, family, direct_bits, tail, frequencies, words, out)


@kernel()
def read_list(data: Bytes, at: int, family: Numbers, frequencies: Numbers, words: Words, out: Numbers) -> int:
    """Fill out (uint32[n]) from a run of one context at data[at], behind its length as u32; where it ends, or
    BAD where there is none. The others as in :func:`decode_list`."""
    if at + 4 > len(data):
        return BAD
    end = at + 4 + get_number(data, at, 4)
    if end > len(data):
        return BAD
    is_one = decode_numbers(data[at + 4 : end], family, DIRECT_BITS, 0, frequencies, words, out)
    return end if is_one else BAD


@kernel(_i(_bytes, _tables, _tables, _words, _tables))
def decode_lists(data: Bytes, family: Numbers, frequencies: Numbers, words: Words, out: Numbers) -> int:
    """Fill the rows of out (uint32[lists, n]) from runs of one context in a row, each behind its length as
    u32; where they end, or BAD where there are no such runs. The others as in :func:`decode_list`."""
    at = 0
    for k in range(len(out)):
        at = read_list(data, at, family, frequencies, words, out[k])
        if at == BAD:
            return BAD
    return at
