"""Numbers that the kernels and those who call them agree on."""

from __future__ import annotations

import struct

# Runs of tokens (runs.py).
GUARD = 3 * 64 + 64  # words that a vector step may look at beyond the end of a stream
WORDS_SPARE = 8  # words that an encoder may write in front of the first
STATE_FLOOR = 1 << 16  # a lane's state lies in [2**16, 2**32) between values
BLOCK = 4096  # values worked at a time, so that all they need stays in the first-level cache
BAD = -1  # what the readers return for a run that no encoder wrote
WAYS, APART = 4, 48  # sets of counters of tokens, and the room between them
RING = 4  # steps that entries are looked up for while one is encoded: a power of two
# settings of a run: int64[4]. DIRECT: no token has raw bits but for the TAIL that all have.
LANES, BITS, DIRECT, TAIL = 0, 1, 2, 3

# what an encoder found besides: int64[2]
TWEAK, FIRST = 0, 1

# Differences from the base (difference.py).
HEAD = 8  # bytes before a delta's list of scales
FINE, BAD_SCALES, BAD_HEAD, BAD_REST = 0, 1, 2, 3  # what came of decoding one
# layout of a delta: int64[4]
LOG_SEGMENT, STEP, LOWEST, TABLES = 0, 1, 2, 3
UNIT = 64  # the shortest segment
WIDE_PLANES = 3  # behind a delta of elements of 32 bits
SPARE = 16  # bytes beyond the last of a plane that `split_bytes` may write and `append_bytes` read
MAX_ROWS = 256  # rows of a histogram of tokens, at most
SAMPLED = 1 << 14  # elements looked at to choose a way and its parameters,
MORE_SAMPLED = 1 << 16  # and where changes are clustered, since a small sample may miss them
MAX_SAMPLE = 2 * MORE_SAMPLED  # elements of a sample, at most
MAX_TABLES = 40  # that the encoder uses
PATCH = 512  # elements in a row of a sample; whole segments of every length

# Subsets (subset.py).
SUBSET_UNIT = 256  # elements that are active or not together
SUBSET_SPARE = 64  # elements that `choose` may write beyond the last

# Sparse chunks (sparse.py).
SPARSE_HEAD = 7  # bytes in front of the plane
SPARSE_SHARE = 16  # one element in so many may be an exception: what reading their lists takes is bounded

# Drifted chunks (drift.py).
DRIFT_HEAD = 2  # bytes in front of the list of shifts
MOST_SHIFTS_LOG = 12  # bits of a mantissa that tell shifts apart, at most

# Low-rank predictions (low_rank.py).
PREDICTED_AT_ONCE = 16  # elements of 16 bits; rows of the right factor have as many more than columns
FACTOR_BITS, WIDE_FACTOR_BITS = 16, 22  # of a factor of elements of 16 bits and of 32
MOST_RANK = 512  # so 512 products of two wide factors are below 2**53, and their sums exact in doubles
GAIN_BITS = 23  # a gain is 1 + q / 2**23, and zigzagged q has so many bits

# A chunk record: its length, and where it has what. Of the methods and the kinds of planes, those that
# are decoded many chunks at a time (rows.py).
RECORD_BYTES, METHOD, LENGTH, BEFORE, AFTER = 24, 0, 4, 8, 16
SAME, DELTA, SPARSE, DRIFT = 0, 2, 6, 8
RAW, FILL, RANS = 0, 1, 3

# XXH3-64 of more than 240 bytes, with seed 0 and the default secret (xxh3.py). Its specification:
# https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md
_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221"
    "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb"
    "170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
XXH3_SHORT = 240  # up to so many bytes are hashed in other ways
XXH3_START = (
    0xC2B2AE3D, 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x85EBCA77,
    0x27D4EB2F165667C5, 0x9E3779B1,
)  # fmt: skip
XXH3_SCRAMBLE_FACTOR, XXH3_LENGTH_FACTOR, XXH3_LAST_FACTOR = XXH3_START[7], XXH3_START[1], 0x165667919E3779F9
#: The secret's words, uint64[24]; those from its byte 121 on, for the last stripe; those from byte 11 on, to
#: merge the sums with.
XXH3_KEYS = struct.unpack("<40Q", _SECRET + _SECRET[121 : 121 + 64] + _SECRET[11 : 11 + 64])
