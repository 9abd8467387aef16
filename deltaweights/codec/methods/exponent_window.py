"""Codes floats without a base whose exponents are similar, together with the top mantissa bits.

The *word* of an element is its upper 16 bits, rotated so that the sign comes last (see
kernels/standalone.py). Words are counted from a bias. Words in the window of 2**13 above it are coded by
their upper eight bits: an exponent and, if exponents have eight bits, three mantissa bits. These help because
small values are more frequent than large ones within an octave.

u16              bias
u32, run         n values of 13 bits: word - bias, or 0 for a word outside of the window
u32, list        the words outside, in order (only if there are any): 0 for a word of 0, else one more than
                 how far it lies below the bias
planes           itemsize - 2: the other bytes of the rotated elements, the lowest first
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import PayloadError
from .. import working_memory
from ..compiled import standalone
from ..tables import BYTE_BITS
from . import entropy, floats
from .planes import put_plane
from .ulp import FloatFormat

Bytes = NDArray[np.uint8]
TAIL = 5  # bits of a value that are raw
_SPAN = 1 << 8 + TAIL
_TOKENS, _SLOTS = 8, 1 << 11  # tokens of an exponent; the sum of a table's frequencies
_OUTSIDE_BITS = 15  # the approximate cost of a word outside, without the entropy of its presence
_RARE_BITS = 2.9  # the approximate cost of each slot that a table gives to a token too rare for it
_GLANCE = 1 << 15  # sampled elements, to place the window and estimate the size


def encode_window(target: Bytes, form: FloatFormat) -> bytes:
    """Encode the target by itself; elements have two bytes or more."""
    patterns = floats.elements(target, form)
    words, values = working_memory.UPPER_WORDS.take(len(patterns)), working_memory.VALUES.take(len(patterns))
    standalone.upper_words(patterns, words)
    bias = _bias(words)
    parts = [bias.to_bytes(2, "little")]
    outside = words[values == 0] if standalone.enter_window(words, bias, _SPAN, values) else words[:0]
    others = entropy.encode_list(_below(outside, bias)) if len(outside) else b""
    parts.append(floats.sized(entropy.encode_list(values, BYTE_BITS, TAIL)))
    if others:
        parts.append(floats.sized(others))
    plane = working_memory.PLANES.take(len(patterns))
    for p in range(form.itemsize - 2):
        standalone.rotated_byte(patterns, p, plane)
        parts.append(put_plane(plane))
    return b"".join(parts)


def _below(words: NDArray[np.uint32], bias: int) -> NDArray[np.uint32]:
    """Words outside the window as numbers, mostly small: words below it are near it, or zero."""
    return np.where(words == 0, np.uint32(0), (np.uint32(bias + 1) - words) & np.uint32(0xFFFF))


def _bias(words: NDArray[np.uint32]) -> int:
    """One less than the first word of the window, chosen by a sample of the words.

    The window is placed where words outside, and tokens inside that are too rare for a table, cost least.
    """
    counts = np.bincount(_glance(words) >> np.uint32(8), minlength=256).astype(np.float64)
    width, total = _SPAN >> 8, max(counts.sum(), 1.0)
    rare = _RARE_BITS * np.where(counts > 0, np.maximum(_TOKENS * total / _SLOTS - counts, 0.0), 0.0)
    counts[0] = 0.0  # zeros cost almost nothing
    inside, lost = (
        np.convolve(np.pad(values, (0, width - 1)), np.ones(width))[width - 1 :] for values in (counts, rare)
    )
    outside = counts.sum() - inside
    costs = outside * (np.log2(total / np.maximum(outside, 1)) + _OUTSIDE_BITS) + lost
    return (int(np.argmin(costs)) << 8) - 1 & 0xFFFF


def _glance(values: NDArray[Any]) -> NDArray[Any]:
    start = max((len(values) - _GLANCE) // 2, 0)
    return values[start : start + _GLANCE]


def decode_window(data: Bytes, form: FloatFormat, out: Bytes) -> None:
    """Fill out with the target; PayloadError if data does not code that many elements."""
    if form.itemsize < 2 or len(data) < 2:
        raise PayloadError("a chunk of these elements has no window")
    result = floats.elements(out, form)
    bias = int.from_bytes(data[:2].tobytes(), "little")
    section, data = floats.take_section(data[2:])
    values = working_memory.VALUES.take(len(result))
    entropy.decode_list(section, values, BYTE_BITS, TAIL)
    places = np.flatnonzero(values == 0)
    outside = np.empty(len(places), np.uint32)
    if len(places):
        section, data = floats.take_section(data)
        entropy.decode_list(section, outside)
    stacked = floats.stack_planes(data, form.itemsize - 2, len(result))
    values += np.uint32(bias)
    values[places] = np.where(outside == 0, np.uint32(0), np.uint32(bias + 1) - outside)
    values &= np.uint32(0xFFFF)
    standalone.join(values, stacked, result)
    floats.deliver(result, out)


def window_bits(target: Bytes, form: FloatFormat) -> float:
    """The approximate bits of `encode_window`, from the entropies of a sample; infinite for bytes."""
    if form.itemsize < 2:
        return np.inf
    part = _glance(floats.elements(target, form))
    words, values = np.empty(len(part), np.uint32), np.empty(len(part), np.uint32)
    standalone.upper_words(part, words)
    standalone.enter_window(words, _bias(words), _SPAN, values)
    byte = (values >> np.uint32(TAIL)).astype(np.uint8)
    bits, table_bits = standalone.byte_bits(byte, 1) + TAIL, floats.table_bits(byte)
    bits += 16 * np.count_nonzero(words[values == 0]) / max(len(part), 1)  # zeros cost almost nothing
    for p in range(form.itemsize - 2):
        standalone.rotated_byte(part, p, byte)
        bits += standalone.byte_bits(byte, 1)
    return float(bits * (len(target) // form.itemsize) + table_bits)
