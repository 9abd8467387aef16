"""The coding in NumPy, to be read beside docs/format.md; the tests hold the kernels to it.

Slow, and used by nothing but tests. It decodes runs, deltas and standalone chunks from their bytes,
and encodes the rANS stream of a run given its tables; how an encoder chooses tables and parameters
is not part of the format.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltaweights.codec.methods import ulp
from deltaweights.codec.methods.planes import get_planes
from deltaweights.codec.tables import (
    DIRECT_BITS,
    SCALES,
    TOKENS,
    ZERO_SCALE,
    laplace_family,
    lead_of,
    raw_bits_of,
    token_of,
)
from deltaweights.errors import PayloadError

Bytes = NDArray[np.uint8]
Numbers = NDArray[np.int64]
FLOOR = 1 << 16  # a lane's state between values lies in [FLOOR, 2**32)


# ---------------------------------------------------------------------------------------- tables


class Bits:
    """Reads bits, lowest first; zeros beyond the end."""

    def __init__(self, data: Bytes) -> None:
        self.bits = np.unpackbits(data, bitorder="little")
        self.at = 0

    def take(self, count: int) -> int:
        part = self.bits[self.at : self.at + count]
        self.at += count
        return sum(int(bit) << i for i, bit in enumerate(part))


def fit_frequencies(weights: Numbers, precision: int) -> Numbers:
    """Frequencies adding up to 2**precision: 1 for each present token and a share of the rest."""
    present = weights > 0
    if not present.any():
        return np.zeros_like(weights)
    spare = (1 << precision) - int(present.sum())
    frequencies = np.where(present, 1 + weights * spare // weights.sum(), 0)
    frequencies[np.argmax(weights)] += (1 << precision) - frequencies.sum()
    return np.asarray(frequencies)


def family_weights(member: int, spread: int, highest: int) -> Numbers:
    """One member of the family, averaged with those `spread` half octaves below and above."""
    family = laplace_family().astype(np.int64)
    low, middle, high = (
        family[min(max(m, 0), SCALES - 1)] for m in (member - spread, member, member + spread)
    )
    weights: Numbers = np.maximum((low + 2 * middle + high) >> 2, 1)
    weights[highest + 1 :] = 0
    return weights


def explicit_weights(bits: Bits) -> Numbers:
    """One explicit table: first and last token, then each weight's bit length and mantissa."""
    weights = np.zeros(TOKENS, np.int64)
    first, last = bits.take(8), bits.take(8)
    length = 12
    for token in range(first, last + 1):
        unary = 0
        while unary < 40 and bits.take(1):
            unary += 1
        length += unary >> 1 if unary % 2 == 0 else -((unary + 1) >> 1)
        if not 0 <= length <= 16:
            raise PayloadError("a weight is too long")
        if length:
            kept = min(length - 1, 3)
            dropped = length - 1 - kept
            weights[token] = ((1 << kept | bits.take(kept)) << dropped) + (1 << dropped >> 1)
    return weights


@dataclass
class Run:
    """A run's parts: frequencies[context, token], the lanes' first states, the words."""

    precision: int
    frequencies: Numbers
    states: Numbers
    words: Numbers


def parse_run(data: Bytes, members: Numbers) -> Run:
    """Split a run, `members` being each context's member of the family (tweak included)."""
    precision, lanes = 8 + (int(data[0]) & 7), 1 << 2 * (int(data[0]) >> 3 & 3)
    spread, highest = int(data[0]) >> 5, int(data[1])
    bits = Bits(data[2:])
    tables = []
    for member in members:
        explicit = bits.take(1)
        weights = explicit_weights(bits) if explicit else family_weights(member, spread, highest)
        tables.append(fit_frequencies(weights, precision))
    at = 2 + (bits.at + 7) // 8
    states = np.frombuffer(data[at : at + 4 * lanes].tobytes(), "<u4").astype(np.int64)
    words = np.frombuffer(data[at + 4 * lanes :].tobytes(), "<u2").astype(np.int64)
    return Run(precision, np.array(tables), states, words)


# ---------------------------------------------------------------------------------------- rANS


def decode_values(run: Run, contexts: Bytes, direct_bits: int = DIRECT_BITS, tail: int = 0) -> Numbers:
    """All values of a run; PayloadError where the words do not come out even.

    `tail` is how many raw bits all tokens have besides.

    Lane i takes the values i, i + lanes, ...: one step is one value of each lane. In a step, each
    lane's token and up to 16 - precision raw bits come first; then, for lanes whose token has more,
    up to 16 bits, twice. Whenever a lane falls below FLOOR it takes the stream's next word, lower
    lanes first.
    """
    starts = np.cumsum(run.frequencies, axis=1) - run.frequencies
    token_at = np.array([np.repeat(np.arange(TOKENS), row) for row in run.frequencies])
    raw_bits = np.array([raw_bits_of(t, direct_bits) + tail for t in range(TOKENS)])
    leads = np.array([lead_of(t, direct_bits) for t in range(TOKENS)])
    states, words, at = run.states.copy(), run.words, 0

    def refill(lanes: Numbers) -> None:
        nonlocal at
        hungry = lanes[states[lanes] < FLOOR]
        if at + len(hungry) > len(words):
            raise PayloadError("a run ends too early")
        states[hungry] = states[hungry] << 16 | words[at : at + len(hungry)]
        at += len(hungry)

    values = np.zeros(len(contexts), np.int64)
    for first in range(0, len(contexts), len(states)):
        here = contexts[first : first + len(states)]
        lanes = np.arange(len(here))
        slots = states[lanes] & ((1 << run.precision) - 1)
        tokens = token_at[here, slots]
        states[lanes] = (
            run.frequencies[here, tokens] * (states[lanes] >> run.precision) + slots - starts[here, tokens]
        )
        value, rest = leads[tokens], raw_bits[tokens]
        for most in (16 - run.precision, 16, 16):
            width = np.minimum(rest, most)
            value = value << width | states[lanes] & ((1 << width) - 1)
            states[lanes] >>= width
            refill(lanes)
            rest = rest - width
        values[first : first + len(here)] = value
    if at != len(words) or (states != FLOOR).any():
        raise PayloadError("a run does not come out even")
    return values


def encode_values(
    run: Run, contexts: Bytes, values: Numbers, direct_bits: int = DIRECT_BITS, tail: int = 0
) -> Run:
    """The states and words that decode to `values`; everything happens in the opposite order.

    Before a lane takes up something of probability 2**-k * frequency / 2**precision, it gives its
    low word to the stream if it could overflow 32 bits.
    """
    starts = np.cumsum(run.frequencies, axis=1) - run.frequencies
    lanes = len(run.states)
    states = [FLOOR] * lanes
    words: list[int] = []

    def push_raw(lane: int, bits: int, width: int) -> None:
        if states[lane] >> (32 - width):
            words.append(states[lane] & 0xFFFF)
            states[lane] >>= 16
        states[lane] = states[lane] << width | bits & ((1 << width) - 1)

    inline = 16 - run.precision
    for first in reversed(range(0, len(values), lanes)):
        here = [int(value) for value in values[first : first + lanes]]
        tokens = [token_of(value >> tail, direct_bits) for value in here]
        raws = [raw_bits_of(token, direct_bits) + tail for token in tokens]
        for lane in reversed(range(len(here))):
            if raws[lane] > inline + 16:
                push_raw(lane, here[lane], raws[lane] - inline - 16)
        for lane in reversed(range(len(here))):
            rest = raws[lane] - inline
            if rest > 0:
                push_raw(lane, here[lane] >> max(rest - 16, 0), min(rest, 16))
        for lane in reversed(range(len(here))):
            context, token = contexts[first + lane], tokens[lane]
            frequency, start = int(run.frequencies[context, token]), int(starts[context, token])
            width = min(raws[lane], inline)
            if states[lane] >> (32 - run.precision - width) >= frequency:
                words.append(states[lane] & 0xFFFF)
                states[lane] >>= 16
            raw = here[lane] >> (raws[lane] - width) & ((1 << width) - 1)
            quotient, remainder = divmod(states[lane] << width | raw, frequency)
            states[lane] = (quotient << run.precision) + remainder + start
    return Run(run.precision, run.frequencies, np.array(states), np.array(words[::-1], np.int64))


# ---------------------------------------------------------------------------------------- chunks


def _section(data: Bytes) -> tuple[Bytes, Bytes]:
    size = int.from_bytes(data[:4].tobytes(), "little")
    return data[4 : 4 + size], data[4 + size :]


def _list(data: Bytes, count: int, direct_bits: int = DIRECT_BITS, tail: int = 0) -> Numbers:
    run = parse_run(data, np.zeros(1, np.int64))
    return decode_values(run, np.zeros(count, np.uint8), direct_bits, tail)


@dataclass
class Delta:
    """A delta taken apart: the run of values and the context of each."""

    run: Run
    contexts: Bytes
    take: Numbers  # low bytes in planes, for each element
    planes: list[Bytes]


def parse_delta(data: Bytes, base: ulp.Unsigned, form: ulp.FloatFormat) -> Delta:
    """Take a delta apart as far as that goes without decoding its values."""
    log_segment, step, tables, lowest, base_scale, tweak = struct.unpack("<BBBhhb", data[:8].tobytes())
    data, count = data[8:], len(base)
    scales = np.full(count, base_scale, np.int64)
    if log_segment:
        section, data = _section(data)
        length = 1 << log_segment
        above = _list(section, -(-count // length))
        scales += np.repeat(above, length)[:count]
    worth = 2 * ulp.exponent(base, form) - scales - lowest  # of one ULP, in half octaves
    contexts = np.clip(worth >> step, 0, tables - 1).astype(np.uint8)
    worths = lowest + (np.arange(tables) << step)
    take, planes = np.zeros(tables, np.int64), list[Bytes]()
    if form.itemsize >= 4:
        take = np.clip(((-worths >> 1) - 2) >> 3, 0, 3)
        data, behind = _section(data)
        planes = get_planes(behind, 3 if form.itemsize == 4 else 7, count)
    run = parse_run(data, ZERO_SCALE - worths - 16 * take + tweak)
    return Delta(run, contexts, take[contexts], planes)


def decode_delta(data: Bytes, base: ulp.Unsigned, form: ulp.FloatFormat) -> ulp.Unsigned:
    """The target's bit patterns from a delta and the base's."""
    delta = parse_delta(data, base, form)
    values = decode_values(delta.run, delta.contexts).astype(np.uint64)
    for p in (2, 1, 0):
        longer = delta.take > p
        if longer.any():
            low = delta.planes[p].astype(np.uint64)
            values[longer] = values[longer] << np.uint64(8) | low
    if form.itemsize == 8:
        for plane in reversed(delta.planes[3:]):
            values = values << np.uint64(8) | plane.astype(np.uint64)
    return ulp.restore(base, values.astype(form.dtype))


def decode_alone(data: Bytes, count: int, form: ulp.FloatFormat) -> ulp.Unsigned:
    """The target's bit patterns from a standalone chunk."""
    section, data = _section(data)
    leading = _list(section, count, direct_bits=8)
    planes: list[Any] = get_planes(data, form.itemsize - 1, count)
    rotated = np.zeros(count, form.dtype)
    for plane in (leading, *reversed(planes)):
        rotated = (rotated << form.dtype.type(8 % (8 * form.itemsize))) | plane.astype(form.dtype)
    return ulp.unrotate(rotated)


def decode_window(data: Bytes, count: int, form: ulp.FloatFormat) -> ulp.Unsigned:
    """The target's bit patterns from a windowed chunk."""
    bias = int.from_bytes(data[:2].tobytes(), "little")
    section, data = _section(data[2:])
    words = _list(section, count, direct_bits=8, tail=5)
    outside = words == 0
    words = (words + bias) & 0xFFFF
    if outside.any():
        section, data = _section(data)
        below = _list(section, int(outside.sum()))
        words[outside] = np.where(below == 0, 0, (bias + 1 - below) & 0xFFFF)
    rotated = words.astype(form.dtype)
    for plane in reversed(get_planes(data, form.itemsize - 2, count)):
        rotated = (rotated << form.dtype.type(8)) | plane.astype(form.dtype)
    return ulp.unrotate(rotated)


def decode_drift(data: Bytes, base: ulp.Unsigned, form: ulp.FloatFormat) -> tuple[ulp.Unsigned, int, Bytes]:
    """A drifted chunk's drifted base, by which method the rest is coded against that, and the rest."""
    log, method = int(data[0]), int(data[1])
    section, rest = _section(data[2:])
    numbers = _list(section, 1 << log)
    shifts = np.cumsum((numbers >> 1) ^ -(numbers & 1))
    mantissas = base.astype(np.int64) & ((1 << form.shift) - 1)
    moved = base.astype(np.int64) + shifts[mantissas >> (form.shift - log)]
    moved = np.where(ulp.exponent(base, form) == 0, base.astype(np.int64), moved)
    return (moved & ((1 << 8 * form.itemsize) - 1)).astype(form.dtype), method, rest


# ---------------------------------------------------------------------------------------- predictions


def predict(data: bytes, base: Bytes, dtype: str) -> Bytes:
    """A whole tensor's prediction from its base's bytes; nothing is checked."""
    _, flags, columns, count = struct.unpack_from("<BBII", data)
    heads = [struct.unpack_from("<IHbBB", data, 10 + 9 * k) for k in range(count)]
    rest, elements, at, parts = (
        np.frombuffer(data, np.uint8)[10 + 9 * count :],
        base.view(UNSIGNED[dtype]),
        0,
        [],
    )
    for rows, rank, exponent, contexts, shift in heads:
        sums, gains = np.zeros((rows, columns), np.int64), np.ones((rows, 1), np.float32)
        if rank:
            shifts, rest = rest[:rank].astype(np.int64), rest[rank:]
            section, rest = _section(rest)
            run = parse_run(section, np.zeros(contexts, np.int64))
            of_each = np.tile(np.arange(rank) * contexts // rank, rows + columns)
            factors = _unzigzag(decode_values(run, of_each.astype(np.uint8))).reshape(-1, rank)
            sums = (factors[:rows] << (shifts & 15)) @ (factors[rows:] << (shifts >> 4)).T
        if shift != 255:
            section, rest = _section(rest)
            gains[:, 0] = ((1 << 23) + (_unzigzag(_list(section, rows)) << shift)) / 2**23
        before = elements[at : at + rows * columns].reshape(rows, columns)
        parts.append(_moved(before, sums, gains, exponent, dtype, rounded=bool(flags)).reshape(-1))
        at += rows * columns
    return np.concatenate(parts).view(np.uint8)


UNSIGNED = {"BF16": "<u2", "F16": "<u2", "F32": "<u4"}


def _moved(before: Any, sums: Numbers, gains: Any, exponent: int, dtype: str, *, rounded: bool) -> Any:
    """Elements to which products are added; the kinds of floats are what the document says."""
    form = ulp.FORMATS[dtype]
    with np.errstate(all="ignore"):
        if dtype == "F32":
            products = sums * 2.0**-exponent
            if rounded:
                products = products.astype(np.float32).astype(np.float64)
            moved = (gains.astype(np.float64) * before.view("<f4") + products).astype("<f4").view("<u4")
        else:
            sums = (sums + 2**31) % 2**32 - 2**31  # modulo 2**32
            products = sums.astype(np.float32) * np.float32(2.0**-exponent)
            if rounded:
                products = _widened(_narrowed(products, dtype), dtype)
            moved = _narrowed(gains * _widened(before, dtype) + products, dtype)
    kept = (sums == 0) & (gains == 1) | (ulp.exponent(before, form) == form.mask)
    return np.where(kept, before, moved)


def _widened(bits: Any, dtype: str) -> Any:
    return bits.view("<f2").astype(np.float32) if dtype == "F16" else (bits.astype("<u4") << 16).view("<f4")


def _narrowed(values: Any, dtype: str) -> Any:
    if dtype == "F16":
        return values.astype("<f2").view("<u2")
    bits = values.view("<u4").astype(np.int64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")


def _unzigzag(numbers: Numbers) -> Numbers:
    return (numbers >> 1) ^ -(numbers & 1)
