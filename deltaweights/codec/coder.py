"""Runs of tokens as bytes: choosing tables, writing, reading (layout: see :mod:`.runs`)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import PayloadError
from .compiled import runs
from .constants import APART, BAD, GUARD, WAYS
from .scratch import scratch
from .store import kept
from .tables import DIRECT_BITS, PRECISION, SCALES, TOKENS, laplace_family, raw_bits_of

Bytes = NDArray[np.uint8]
Values = NDArray[np.uint32]
BYTE_BITS = 8  # direct bits of runs of bytes: every byte is its own token

_raw_bits = {
    bits: np.array([raw_bits_of(t, bits) for t in range(TOKENS)], np.float64)
    for bits in (DIRECT_BITS, BYTE_BITS)
}
_lone_member = np.zeros(1, np.int64)
_SMALL = 1 << 14  # values below which tables weigh enough to search the family
#: With probabilities of one bit less the decoder's tables fit its nearest cache: worth this much more space.
_COARSE = 1.002
_SPREADS = (0, 2, 4)
_TWEAKS = range(-4, 5)
_USUAL_SPREAD = 2
# Sizes in bytes from which a run has 4, 16, 64 lanes: a lane wastes two bytes.
_LANES_FROM = ((256, 4), (1000, 16), (6000, 64))


@cache
def _family() -> NDArray[np.uint32]:
    """The family of distributions, which takes longer to compute than to read."""
    stored = kept("family", lambda: laplace_family().tobytes())
    return np.frombuffer(stored, np.uint32).reshape(SCALES, TOKENS)


def encode_run(
    contexts: Bytes,
    values: Values,
    members: NDArray[np.int64],
    direct_bits: int = DIRECT_BITS,
    limit: float = np.inf,
    value_bits: int = 32,
    tail: int = 0,
) -> tuple[int, bytes] | None:
    """(tweak, run): the values, each under its context, with the cheapest tables found.

    contexts   uint8[n], each below len(members)
    values     uint32[n]
    members    each context's member of the family, before the tweak is added
    limit      bytes; None is returned where the run would be longer
    value_bits how many bits the values have at most
    tail       how many low bits of each value are raw; the others are bytes then
    """
    keys = scratch("keys", len(values), np.uint16)
    span = runs.log_span(direct_bits, value_bits)
    leading = values >> np.uint32(tail) if tail else values
    counters = scratch("counters", WAYS * ((len(members) << span) + APART), np.uint32)
    counts = scratch("counts", len(members) * TOKENS, np.uint32).reshape(-1, TOKENS)
    runs.count_tokens(contexts, leading, direct_bits, span, keys, counters, counts)
    totals = counts.sum(axis=0)
    highest = int(np.flatnonzero(totals).max(initial=0))
    tweak, spread = _fit_family(counts, members, len(values), highest)
    tables = _choose_tables(counts, members + tweak, spread, PRECISION, highest)
    raw_bits = float(totals @ _raw_bits[direct_bits]) + tail * len(values)
    if len(values) >= _SMALL:
        coarse = _choose_tables(counts, members + tweak, spread, PRECISION - 1, highest)
        if coarse.bits + raw_bits <= _COARSE * (tables.bits + raw_bits):
            tables = coarse
    size = (tables.bits + raw_bits) / 8
    if size > limit:
        return None
    code = sum(size >= least and len(values) >= 4 * lanes for least, lanes in _LANES_FROM)
    states, words = np.empty(64, np.uint32), scratch("words", 3 * len(values), np.uint16)
    first = runs.encode_words(
        words,
        tables.frequencies,
        keys,
        values,
        1 << 2 * code,
        direct_bits,
        tail,
        span,
        tables.precision,
        scratch("encoder table", len(members) << span, np.uint32),
        states,
    )
    head = bytes([tables.precision - 8 | code << 3 | spread << 5, highest])
    return tweak, b"".join([head, tables.to_bytes(), states[: 1 << 2 * code].data, words[first:].data])


@dataclass
class _Tables:
    """One table a context: explicit or of the family; ``bits`` is what tokens and tables take."""

    precision: int
    bits: float
    explicit: NDArray[np.bool_]
    weights: NDArray[np.uint32]
    frequencies: NDArray[np.uint32]

    def to_bytes(self) -> bytes:
        written = np.zeros(runs.write_tables(np.empty(0, np.uint8), self.explicit, self.weights), np.uint8)
        runs.write_tables(written, self.explicit, self.weights)
        return written.tobytes()


def _choose_tables(
    counts: NDArray[np.uint32], members: NDArray[np.int64], spread: int, precision: int, highest: int
) -> _Tables:
    explicit = np.empty(len(members), np.bool_)
    weights, frequencies = np.empty_like(counts), np.empty_like(counts)
    bits = runs.choose_tables(
        counts, members, _family(), spread, precision, highest, explicit, weights, frequencies
    )
    return _Tables(precision, bits, explicit, weights, frequencies)


def _fit_family(
    counts: NDArray[np.uint32],
    members: NDArray[np.int64],
    values: int,
    highest: int,
) -> tuple[int, int]:
    """The tweak and spread under which the family fits best, searched for in small runs only."""
    if values >= _SMALL or len(members) == 1:
        return 0, _USUAL_SPREAD

    def cost(pair: tuple[int, int]) -> float:
        bits: float = runs.family_cost(counts, members + pair[0], _family(), pair[1], PRECISION, highest)
        return bits

    return min(((tweak, spread) for tweak in _TWEAKS for spread in _SPREADS), key=cost)


@dataclass
class OpenRun:
    """A run whose head has been read: what `runs.decode_values` needs.

    Words and slots are the thread's scratch: only the last run opened can be decoded.
    """

    words: NDArray[np.uint16]
    slots: NDArray[np.uint32]
    settings: NDArray[np.int64]
    states: NDArray[np.uint32]
    rest: NDArray[np.int64]


def open_run(
    data: Bytes, members: NDArray[np.int64], direct_bits: int = DIRECT_BITS, tail: int = 0
) -> OpenRun:
    """Read the head of a run that takes up all of `data`; PayloadError where it cannot be one."""
    slots = scratch("slots", len(members) << PRECISION, np.uint32)
    states, settings = np.empty(64, np.uint32), np.full(4, tail, np.int64)
    frequencies = scratch("frequencies", len(members) * TOKENS, np.uint32).reshape(-1, TOKENS)
    start = runs.open_head(data, members, _family(), direct_bits, frequencies, slots, states, settings)
    if start == BAD:
        raise PayloadError("the head of a run of tokens is damaged")
    body = len(data) - start
    words = scratch("words", body // 2 + GUARD, np.uint16)
    words.view(np.uint8)[:body] = data[start:]
    words[body // 2 :] = 0
    return OpenRun(words, slots, settings, states, np.zeros(64, np.int64))


def encode_list(values: Values, direct_bits: int = DIRECT_BITS, tail: int = 0) -> bytes:
    """Numbers as a run of one context."""
    found = encode_run(np.zeros(len(values), np.uint8), values, _lone_member, direct_bits, tail=tail)
    assert found is not None  # no limit was set
    return found[1]


def decode_list(
    data: Bytes, out: NDArray[np.unsignedinteger[Any]], direct_bits: int = DIRECT_BITS, tail: int = 0
) -> None:
    """Fill out with the numbers that `encode_list` made data of; PayloadError where it did not."""
    run = open_run(data, _lone_member, direct_bits, tail)
    if not runs.decode_list(run.words, run.slots, run.settings, run.states, run.rest, out):
        raise PayloadError("a list of numbers is damaged")


def decode_lists(data: Bytes, out: NDArray[np.uint32]) -> Bytes:
    """Fill the rows of out (uint32[lists, n]) with the lists that data begins with, each behind its length as
    u32; what follows them. PayloadError where there are no such lists."""
    frequencies = scratch("frequencies", TOKENS, np.uint32).reshape(1, TOKENS)
    words = scratch("words", len(data) // 2 + GUARD, np.uint16)
    end = runs.decode_lists(data, _family(), frequencies, words, out)
    if end == BAD:
        raise PayloadError("a list of numbers is damaged")
    return data[end:]
