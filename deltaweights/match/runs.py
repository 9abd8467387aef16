"""Finds what the rows of a target tensor are in the base: from the first row on, run by run."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from .candidates import Candidates, Place, resembling
from .layouts import Block, Run, Solved, Strip, View
from .vectors import MIN_WIDTH, SAMPLE, Samples, tells

#: Most strips of a view, and most runs of a strip that are found one by one.
_MAX_STRIPS, _MAX_RUNS = 64, 2048

#: How many of the last runs tell what comes next, and the longest period, in runs.
_RECENT, _MAX_PERIOD = 6, 64

#: After so many wrong guesses in a row (as for experts in disorder), guessing ends.
_MAX_MISSES = 16

#: Elements of a row that are compared to see whether a run goes on: fewer where each is a read.
_CHECKED, _CHECKED_APART = 32, 16


def solve(view: View, step: int, candidates: Candidates, samples: Samples) -> list[Solved] | None:
    """What the rows of a view are in the base.

    Args:
        step: 2 if every second element of a row belongs together.

    Returns:
        Strips that are the whole view, and the blocks of each; None if there is no such thing. A single strip
        may lack its last rows.
    """
    strips = _strips(view, step, candidates, samples)
    solved: list[Solved] = []
    for strip, place in strips or ():
        blocks = _StripSearch(strip, place, candidates, samples).blocks()
        rows = sum(block.rows for block in blocks)
        if rows < view.rows and (len(strips or ()) > 1 or view.columns):
            return None
        solved.append((strip, blocks))
    return solved or None


def _strips(
    view: View, step: int, candidates: Candidates, samples: Samples
) -> list[tuple[Strip, Place]] | None:
    """The strips of a view, by its first row, and the place of that row."""
    strips: list[tuple[Strip, Place]] = []
    offset = 0
    while offset < (view.width if step == 1 else step):
        whole = Strip(view, offset, view.width - offset if step == 1 else view.width // step, step)
        if whole.width < MIN_WIDTH or len(strips) == _MAX_STRIPS or view.width % step:
            return None
        sample = samples.read(whole.vector(0, 0, min(SAMPLE, whole.width)))
        if not tells(sample):
            return None
        place = candidates.find(view, sample, lambda place: place.room >= MIN_WIDTH)
        if not place or (step > 1 and place.room < whole.width):
            return None
        strip = Strip(view, offset, min(whole.width, place.room), step)
        count = min(SAMPLE, strip.width)
        end = strip.vector(0, strip.width - count, count)
        if not samples.alike(end, place.run(1).vector(0, strip.width - count, count)):
            return None
        strips.append((strip, place))
        offset += strip.width if step == 1 else 1
    return strips


class _StripSearch:
    """Finds what the rows of a strip are, beginning with the place of the first."""

    def __init__(self, strip: Strip, place: Place, candidates: Candidates, samples: Samples) -> None:
        self._strip = strip
        self._place = place
        self._candidates = candidates
        self._samples = samples
        self._random = random.Random(0)  # noqa: S311
        self._recent: list[Run] = []
        self._blocks: list[Block] = []
        self._misses = 0

    def blocks(self) -> list[Block]:
        """The blocks, up to the first row that is nowhere."""
        rows, row, blocks = self._strip.view.rows, 0, self._blocks
        place: Place | None = self._place
        while place and len(blocks) < _MAX_RUNS:
            run = self._longest(row, place.run(rows - row))
            self._recent.append(run)
            blocks.append(Block(1, (run,), (0,)))
            row += run.count
            if block := self._repeated(row):
                row += block.rows
                period = len(block.runs)
                self._recent += [run.moved((block.repeats - 1) * a) for run, a in _pairs(block)]
                if all(one.repeats == 1 for one in blocks[-2 * period :]):
                    first = tuple(one.runs[0] for one in blocks[-2 * period :][:period])
                    blocks[-2 * period :] = [Block(block.repeats + 2, first, block.advances)]
                else:
                    blocks.append(block)
            place = self._next(row) if row < rows else None
        return blocks

    def _longest(self, row: int, run: Run) -> Run:
        """The run, from that row of the strip on, as far as its rows are the strip's."""
        return run.from_row(0, _extent(lambda k: self._is_alike(row + k, run, k), run.count))

    def _is_alike(self, row: int, run: Run, row_of_run: int) -> bool:
        """Whether some elements of a row are those of a row of the run."""
        strip = self._strip
        is_apart = max(strip.view.stride * strip.step, run.stride) > 1
        count = min(strip.width, _CHECKED_APART if is_apart else _CHECKED)
        first = self._random.randrange(strip.width - count + 1)
        return self._samples.alike(strip.vector(row, first, count), run.vector(row_of_run, first, count))

    def _next(self, row: int) -> Place | None:
        """Where a row is that no run reaches."""
        strip = self._strip
        sample = self._samples.read(strip.vector(row, 0, min(SAMPLE, strip.width)))
        if not tells(sample):
            return None
        if self._misses < _MAX_MISSES:
            if place := resembling(self._guessed(), self._samples, sample):
                self._misses = 0
                return place
            self._misses += 1
        return self._candidates.find(strip.view, sample, self._fits)

    def _fits(self, place: Place) -> bool:
        first = self._place
        return (
            place.room >= self._strip.width
            and place.stride == first.stride
            and place.column == first.column
            and place.tensor.dtype == first.tensor.dtype
        )

    def _guessed(self) -> list[Place]:
        """Where the next row should be, by the last runs: in the same tensors, or in those next in number."""
        recent = self._recent[-_RECENT:]
        steps = {advance for block in self._blocks[-_RECENT:] for advance in block.advances if advance}
        starts: list[tuple[Run, int]] = []
        for index in reversed(range(len(recent))):
            run = recent[index]
            before = (one for one in reversed(recent[:index]) if one.tensor is run.tensor)
            starts += [(run, 2 * run.start - one.start) for one in before][:1]
            starts.append((run, run.start + run.count * run.step))
            starts += [(run, run.start + step) for step in (*steps, *self._candidates.steps(run.tensor))]
            for other in self._candidates.successors(run.tensor):
                twin = Run(1, other, run.start, run.step, run.stride)
                starts += [(twin, run.start), (twin, self._place.column)]
        first = self._blocks[-1].runs[0]
        starts.append((first, first.start + first.step))
        starts += [(run, run.start) for run in reversed(recent)]
        places = dict.fromkeys(Place(run.tensor, start, run.stride) for run, start in starts)
        return [place for place in places if 0 <= place.start < place.tensor.info.numel and self._fits(place)]

    def _repeated(self, row: int) -> Block | None:
        """What follows if the last runs go on as they did twice."""
        for period in range(1, min(len(self._recent) // 2, _MAX_PERIOD) + 1):
            last, before = self._recent[-period:], self._recent[-2 * period : -period]
            if any(a.tensor is not b.tensor or a.count != b.count for a, b in zip(before, last, strict=True)):
                continue
            advances = tuple(b.start - a.start for a, b in zip(before, last, strict=True))
            most = self._room(row, last, advances) if min(advances) >= 0 else 0
            if most:
                moved = tuple(run.moved(advance) for run, advance in zip(last, advances, strict=True))
                if repeats := self._repeats(row, Block(most, moved, advances)):
                    return Block(repeats, moved, advances)
        return None

    def _room(self, row: int, last: list[Run], advances: tuple[int, ...]) -> int:
        """How often the runs can be repeated, at most, by the sizes of the tensors."""
        rows = self._strip.view.rows - row
        most = rows // sum(run.count for run in last)
        for run, advance in zip(last, advances, strict=True):
            left = run.tensor.info.numel - (run.start + (run.count - 1) * run.step) - 1
            left -= (self._strip.width - 1) * run.stride
            most = min(most, left // advance) if advance else most
        return max(most, 0)

    def _repeats(self, row: int, block: Block) -> int:
        """How often the runs of a block are repeated, which may be never."""

        def is_alike(repeat: int) -> bool:
            at = row + repeat * block.period
            for run, advance in _pairs(block):
                within = self._random.randrange(run.count)
                if not self._is_alike(at + within, run.moved(repeat * advance), within):
                    return False
                at += run.count
            return True

        return _extent(is_alike, block.repeats) if is_alike(0) else 0


def _pairs(block: Block) -> Iterator[tuple[Run, int]]:
    return zip(block.runs, block.advances, strict=True)


def _extent(is_alike: Callable[[int], bool], count: int) -> int:
    """How many of the numbers below ``count``, from 0 on, are alike: 0 is, and there is one end to it."""
    if count == 1 or (is_alike(count - 1) and all(map(is_alike, (count // 2, count // 3)))):
        return count
    good, bad = 0, 1
    while bad < count and is_alike(bad):
        good, bad = bad, 2 * bad
    bad = min(bad, count)
    while bad - good > 1:
        middle = (good + bad) // 2
        if is_alike(middle):
            good = middle
        else:
            bad = middle
    return good + 1
