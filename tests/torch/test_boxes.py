"""Boxes: any run of elements, any part of a tensor, any sharding, against what NumPy says."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from deltaweights.torch import boxes
from deltaweights.torch.boxes import Box, cut, envelope, fill, read_box

shapes = st.lists(st.integers(1, 7), max_size=4).map(tuple)


def numbers(shape: Sequence[int]) -> NDArray[np.uint32]:
    return np.arange(math.prod(shape), dtype=np.uint32).reshape(shape)


@st.composite
def boxes_in(draw: st.DrawFn, shape: Sequence[int]) -> Box:
    ends = [sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))) for n in shape]
    return Box(tuple(a for a, _ in ends), tuple(b - a for a, b in ends))


@st.composite
def grids(draw: st.DrawFn, shape: Sequence[int]) -> list[Box]:
    """A sharding: every dimension cut anywhere, which makes empty shards too."""
    found = [Box((), ())]
    for n in shape:
        cuts = sorted(draw(st.lists(st.integers(0, n), max_size=2)))
        spans = list(zip([0, *cuts], [*cuts, n], strict=True))
        found = [Box((*b.offsets, first), (*b.sizes, end - first)) for b in found for first, end in spans]
    return found


@given(st.data(), shapes)
def test_cut_is_a_run_of_elements(data: st.DataObject, shape: tuple[int, ...]) -> None:
    array = numbers(shape)
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, array.size)] * 2)))
    parts = list(cut(shape, start, stop))
    found = [array[part.slices].ravel() for part in parts]
    assert np.concatenate([*found, np.empty(0, np.uint32)]).tolist() == list(range(start, stop))
    assert len(parts) <= max(1, 2 * len(shape) - 1)


@given(st.data(), shapes)
def test_envelope_is_the_first_and_last_element(data: st.DataObject, shape: tuple[int, ...]) -> None:
    box = data.draw(boxes_in(shape).filter(lambda box: box.numel > 0))
    inside = numbers(shape)[box.slices]
    assert envelope(shape, box) == (inside.min(), inside.max() + 1)


@given(st.data(), shapes)
def test_overlap_is_what_both_have(data: st.DataObject, shape: tuple[int, ...]) -> None:
    array = numbers(shape)
    one, other = data.draw(boxes_in(shape)), data.draw(boxes_in(shape))
    common = one.overlap(other)
    expected = np.intersect1d(array[one.slices], array[other.slices])
    assert (array[common.slices].ravel() if common else np.empty(0)).tolist() == expected.tolist()
    if common:
        seen = common.seen_from(one.offsets)
        assert array[one.slices][seen.slices].tolist() == array[common.slices].tolist()
        assert seen.moved_by(one.offsets) == common


@pytest.mark.parametrize(("run_bytes", "cover_bytes"), [(1, 1 << 20), (1 << 20, 1 << 20), (24, 40), (9, 8)])
def test_read_box_reads_the_box(monkeypatch: pytest.MonkeyPatch, run_bytes: int, cover_bytes: int) -> None:
    """Run by run, in covering reads, and in what lies between; never more at once than is said."""
    monkeypatch.setattr(boxes, "_RUN_BYTES", run_bytes)
    monkeypatch.setattr(boxes, "_COVER_BYTES", cover_bytes)

    @given(st.data(), shapes, st.sampled_from(["u1", "<u2", "<u4", "V16"]))
    def law(data: st.DataObject, shape: tuple[int, ...], dtype: str) -> None:
        itemsize = np.dtype(dtype).itemsize
        content = np.random.default_rng(0).bytes(math.prod(shape) * itemsize)
        array = np.frombuffer(content, dtype).reshape(shape)
        box = data.draw(boxes_in(shape))
        reads = []

        def read_into(offset: int, out: NDArray[np.uint8]) -> None:
            assert 0 <= offset <= offset + out.size <= len(content)
            reads.append(out.size)
            out[:] = np.frombuffer(content, np.uint8)[offset : offset + out.size]

        out = np.zeros(box.numel * itemsize, np.uint8)
        read_box(read_into, shape, itemsize, box, out)
        assert out.tobytes() == array[box.slices].tobytes()
        assert max(reads, default=0) <= max(cover_bytes, out.size)

    law()


@given(st.data(), shapes)
def test_fill_knows_a_whole_tensor(data: st.DataObject, shape: tuple[int, ...]) -> None:
    sharding = data.draw(st.permutations(data.draw(grids(shape))))
    assert fill(shape, sharding)
    full = [index for index, box in enumerate(sharding) if box.numel]
    index = data.draw(st.sampled_from(full))
    without = sharding[:index] + sharding[index + 1 :]
    assert not fill(shape, without)  # a gap
    assert not fill(shape, [*sharding, sharding[index]])  # twice
    if shape:
        dim = data.draw(st.integers(0, len(shape) - 1))
        offsets = list(sharding[index].offsets)
        offsets[dim] += data.draw(st.sampled_from([-1, 1]))
        assert not fill(shape, [*without, replace(sharding[index], offsets=tuple(offsets))])  # elsewhere
    assert not fill((*shape, 1), sharding)  # of another tensor


def test_fill_knows_boxes_that_no_plane_divides() -> None:
    """A pinwheel, and in it one more."""
    sails = [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1)), ((1, 1), (1, 1))]
    pinwheel = [Box(offsets, sizes) for offsets, sizes in sails]
    assert fill((3, 3), pinwheel)
    assert not fill((3, 3), [*pinwheel[:-1], Box((0, 0), (1, 1))])


@pytest.mark.parametrize("form", ["columns", "cells", "peeled", "overlapping"])
def test_fill_is_quick_for_many_boxes(form: str) -> None:
    """Pairs of them would take hours."""
    count = 30_000
    shape, many = {
        "columns": ((count + 1, count), [Box((0, k), (count + 1, 1)) for k in range(count)]),
        "cells": ((count // 100, 100), [Box((k // 100, k % 100), (1, 1)) for k in range(count)]),
        "peeled": ((count, count), _peeled(count)),
        "overlapping": ((count, count), [Box((0, 0), (count, 1)) for _ in range(count)]),
    }[form]
    start = time.monotonic()
    assert fill(shape, many) == (form in ("columns", "cells"))
    assert time.monotonic() - start < 10


def _peeled(size: int) -> list[Box]:
    """A corner after the other is cut off a square: a column and a row, so that there is no short way."""
    columns = [Box((k, k), (size - k, 1)) for k in range(size)]
    return columns + [Box((k, k + 1), (1, size - k - 1)) for k in range(size - 1)]


def test_fill_of_nothing() -> None:
    assert fill((0, 3), [Box((0, 0), (0, 3))])
    assert not fill((), [])
    assert fill((), [Box((), ())])
