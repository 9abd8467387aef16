"""Probability tables: tokens, and the family of distributions shipped with the format.

A table gives each token a frequency out of `2**precision`. Tables that pay for themselves travel in
the payload as coarse weights; all others come from one family of discrete Laplace distributions,
indexed by scale in half octaves, so that naming a whole set of tables costs three bytes. The family
is computed in integers: every platform gets the same table.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from math import isqrt

import numpy as np
from numpy.typing import NDArray

TOKENS = 256  # tokens a table has room for
PRECISION = 11  # bits of a probability, at most; encoders write one less where that costs next to nothing
DIRECT_BITS = 4  # values below 2**DIRECT_BITS are their own tokens
BYTE_BITS = 8  # the same in runs of bytes: every byte is its own token
SCALES = 48  # members of the family
ZERO_SCALE = 10  # the member whose mean |distance| is one
_FRACTION = 64  # bits after the point in the integers below
_WEIGHT_BITS = 20


def token_of(value: int, direct_bits: int = DIRECT_BITS) -> int:
    """The token of a value: itself when small, else its octave and its two bits after the top."""
    if value < 1 << direct_bits:
        return value
    octave = value.bit_length() - 1
    return (1 << direct_bits) + ((octave - direct_bits) << 2) + ((value >> (octave - 2)) & 3)


def raw_bits_of(token: int, direct_bits: int = DIRECT_BITS) -> int:
    """How many low bits of the value follow a token as they are."""
    direct = 1 << direct_bits
    return 0 if token < direct else ((token - direct) >> 2) + direct_bits - 2


def lead_of(token: int, direct_bits: int = DIRECT_BITS) -> int:
    """The value of a token, without its raw bits."""
    return token if token < 1 << direct_bits else 4 | (token & 3)


def _exp_negative(x: int) -> int:
    """exp(-x), x and the result fixed-point with `_FRACTION` bits."""
    if x >> _FRACTION >= 45:
        return 0
    halvings = max(0, x.bit_length() - _FRACTION)
    one = 1 << (2 * _FRACTION)
    small = (x << _FRACTION) >> halvings
    term, total, k = one, one, 1
    while term := (term * small >> (2 * _FRACTION)) // k:
        total += term
        k += 1
    for _ in range(halvings):
        total = total * total >> (2 * _FRACTION)
    return (one << _FRACTION) // total


@cache
def laplace_family() -> NDArray[np.uint32]:
    """The weights of all members, shape (SCALES, TOKENS), about 2**20 in each row.

    Member j is the distribution of a Laplace variable with mean absolute value
    b = 2**((j - ZERO_SCALE) / 2), rounded to the nearest integer and zigzagged into tokens.
    """
    family = np.zeros((SCALES, TOKENS), np.uint32)
    for member in range(SCALES):
        half = isqrt(1 << (2 * _FRACTION + ZERO_SCALE - 2 - member))  # 1 / (2 b)
        tail = cache(partial(_tail, half=half))
        above = 1 << _FRACTION
        for token in range(token_of(1 << 25)):
            from_here, above = above, _zigzag_tail(lead_of(token + 1) << raw_bits_of(token + 1), tail)
            family[member, token] = (from_here - above) >> (_FRACTION - _WEIGHT_BITS)
    family.setflags(write=False)
    return family


def _zigzag_tail(value: int, tail: Callable[[int], int]) -> int:
    """The probability that the zigzagged variable is at least `value`, fixed-point.

    2d - 1 stands for -d and 2d for +d: from 2d - 1 on both tails are whole, from 2d on the
    negative one lacks its first value.
    """
    distance = (value + 1) >> 1
    if value & 1:
        return tail(distance)
    return (tail(distance) + tail(distance + 1)) >> 1


def _tail(distance: int, half: int) -> int:
    """P(|rounded variable| >= distance) = exp(-(2 distance - 1) / (2 b)), fixed-point."""
    return _exp_negative((2 * distance - 1) * half)
