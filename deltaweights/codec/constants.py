"""Numbers that the kernels and those who call them agree on."""

from __future__ import annotations

# Runs of tokens (runs.py).
GUARD = 3 * 64 + 64  # words that a vector step may look at beyond the end of a stream
WORDS_SPARE = 8  # words that an encoder may write in front of the first
STATE_FLOOR = 1 << 16  # a lane's state lies in [2**16, 2**32) between values
BLOCK = 4096  # values worked at a time, so that all they need stays in the first-level cache
BAD = -1  # what the readers return for a run that no encoder wrote
WAYS, APART = 4, 48  # sets of counters of tokens, and the room between them
# settings of a run: int64[4]. DIRECT: no token has raw bits but for the TAIL that all have.
LANES, BITS, DIRECT, TAIL = 0, 1, 2, 3

# what an encoder found besides: int64[2]
TWEAK, FIRST = 0, 1

# Deltas (delta.py).
HEAD = 8  # bytes before a delta's list of scales
FINE, BAD_SCALES, BAD_HEAD, BAD_REST = 0, 1, 2, 3  # what came of decoding one
# layout of a delta: int64[4]
LOG_SEGMENT, STEP, LOWEST, TABLES = 0, 1, 2, 3
UNIT = 64  # the shortest segment
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
