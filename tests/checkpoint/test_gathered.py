"""Gathered elements are those that NumPy's indexing gives, wherever reading begins and ends."""

from __future__ import annotations

import tracemalloc
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from deltaweights.checkpoint import Gathered, Group, HeldExtents, Piece, Tensor, open_checkpoint

from ..checkpoints import Array, write_safetensors

ITEMSIZES = {"I8": 1, "BF16": 2, "F32": 4, "F64": 8}


@pytest.fixture(scope="module")
def tensors(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[Tensor, NDArray[np.unsignedinteger]]]:
    """A tensor of each dtype, and its elements."""
    path = tmp_path_factory.mktemp("gathered") / "model.safetensors"
    data = {dtype: np.random.default_rng(size).bytes(4000 * size) for dtype, size in ITEMSIZES.items()}
    write_safetensors(path, {dtype: Array(dtype, (4000,), raw) for dtype, raw in data.items()})
    return {
        tensor.name: (tensor, np.frombuffer(data[tensor.name], f"<u{ITEMSIZES[tensor.name]}"))
        for tensor in open_checkpoint(path).tensors
    }


@st.composite
def groups(draw: st.DrawFn) -> tuple[int, list[tuple[int, int, int, int]]]:
    """Repeats, and (start, step, count, stride) of pieces that lie within 4000 elements."""
    repeats = draw(st.integers(1, 20))
    pieces = []
    for _ in range(draw(st.integers(1, 3))):
        count, stride = draw(st.integers(1, 40)), draw(st.integers(1, 30))
        step = draw(st.integers(0, 60))
        start = draw(st.integers(0, 3999 - (repeats - 1) * step - (count - 1) * stride))
        pieces.append((start, step, count, stride))
    return repeats, pieces


@given(
    dtype=st.sampled_from(sorted(ITEMSIZES)),
    drawn=st.lists(groups(), min_size=1, max_size=3),
    cuts=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_any_part_is_what_indexing_gives(
    tensors: dict[str, tuple[Tensor, NDArray[np.unsignedinteger]]],
    dtype: str,
    drawn: list[tuple[int, list[tuple[int, int, int, int]]]],
    cuts: tuple[float, float],
) -> None:
    tensor, elements = tensors[dtype]
    expected = np.concatenate(
        [
            elements[start + repeat * step + np.arange(count) * stride]
            for repeats, pieces in drawn
            for repeat in range(repeats)
            for start, step, count, stride in pieces
        ]
    )
    gathered = Gathered(
        [Group(repeats, tuple(Piece(tensor, *piece) for piece in pieces)) for repeats, pieces in drawn],
        HeldExtents(),
    )
    assert gathered.numel == expected.size
    first, last = sorted(int(cut * expected.size) for cut in cuts)
    size = ITEMSIZES[dtype]
    out = np.empty((last - first) * size, np.uint8)
    gathered.read_into(first * size, out)
    assert out.tobytes() == expected[first:last].tobytes()
    for span in gathered.spans(first * size, last * size):
        assert (
            tensor.span(0, tensor.info.nbytes).start
            <= span.start
            < span.end
            <= tensor.span(0, tensor.info.nbytes).end
        )


@pytest.mark.parametrize(
    "piece",
    [
        (0, 1, 0, 1),
        (0, 1, 1, 0),
        (-1, 1, 1, 1),
        (0, -1, 1, 1),
        (3999, 1, 1, 1),
        (0, 0, 4001, 1),
        (0, 0, 2, 4000),
    ],
)
def test_pieces_outside_their_tensor_are_refused(
    tensors: dict[str, tuple[Tensor, NDArray[np.unsignedinteger]]], piece: tuple[int, int, int, int]
) -> None:
    with pytest.raises(ValueError, match="part"):
        Gathered([Group(2, (Piece(tensors["F32"][0], *piece),))], HeldExtents())
    with pytest.raises(ValueError, match="dtype"):
        Gathered([], HeldExtents())


def test_strided_pieces_are_held_within_a_bound(
    tensors: dict[str, tuple[Tensor, NDArray[np.unsignedinteger]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltaweights.checkpoint.gathered.MAX_STRIDED_BYTES", 8000)
    held = HeldExtents()
    read: list[int] = []

    def zeros(key: int) -> NDArray[np.uint8]:
        read.append(key)
        return np.zeros(8000, np.uint8)

    for key in (1, 2, 1, 1):
        held.get(key, partial(zeros, key))
    assert read == [1, 2, 1]
    with pytest.raises(ValueError, match="span"):
        Gathered([Group(2, (Piece(tensors["F64"][0], 0, 1, 2, 1500),))], held)


def test_a_small_read_needs_few_bytes(
    tmp_path: Path, tensors: dict[str, tuple[Tensor, NDArray[np.unsignedinteger]]]
) -> None:
    gathered = Gathered(
        [Group(1, (Piece(tensors["F32"][0], 0, 0, 2000), Piece(tensors["F32"][0], 2000, 0, 2000)))],
        HeldExtents(),
    )
    assert sum(span.end - span.start for span in gathered.spans(7900, 8100)) == 200


def test_scattered_elements_are_read_at_once(
    tensors: dict[str, tuple[Tensor, NDArray[np.unsignedinteger]]],
) -> None:
    """One read for each would take hours for a large tensor."""
    tensor, elements = tensors["BF16"]
    gathered = Gathered([Group(200, (Piece(tensor, 3, 19, 1),))], HeldExtents())
    assert len(gathered.spans(0, gathered.nbytes)) == 1
    out = np.empty(200, np.uint8)
    gathered.read_into(200, out)
    assert np.array_equal(out.view("<u2"), elements[3 + 1900 : 3 + 3800 : 19])


def test_what_would_be_read_again_and_again_is_refused(tmp_path: Path) -> None:
    """Each element of a 20 MB tensor, far from the others: a read of all of it for every few bytes."""
    write_safetensors(
        tmp_path / "m.safetensors", {n: Array("I8", (20 << 20,), bytes(20 << 20)) for n in "ab"}
    )
    a, b = open_checkpoint(tmp_path / "m.safetensors").tensors
    columns = [Group(1, (Piece(one, k, 0, 20, 1 << 20),)) for k in range(9) for one in (a, b)]
    with pytest.raises(ValueError, match="span"):
        Gathered(columns, HeldExtents())
    with pytest.raises(ValueError, match="span"):
        Gathered([Group(30, (Piece(a, 0, 600_000, 1),))], HeldExtents())
    whole = Gathered([Group(1 << 20, (Piece(a, 0, 1, 20, 1 << 20),))], HeldExtents())
    assert whole.nbytes == 20 << 20


def test_many_tiny_parts_are_not_repeated(
    tensors: dict[str, tuple[Tensor, NDArray[np.unsignedinteger]]],
) -> None:
    """Unless a repetition is so short that many are read together."""
    tensor, elements = tensors["F64"]
    pieces = tuple(Piece(tensor, k % 4000, 0, 1) for k in range(9000))
    once = Gathered([Group(1, pieces)], HeldExtents())
    out = np.empty(once.nbytes, np.uint8)
    once.read_into(0, out)
    assert np.array_equal(out.view("<u8"), np.resize(elements, 9000))
    with pytest.raises(ValueError, match="too short"):
        Gathered([Group(2, pieces)], HeldExtents())
    Gathered([Group(1 << 20, pieces[:1000])], HeldExtents())


def test_the_hub_is_asked_for_little_more_than_is_used(
    tensors: dict[str, tuple[Tensor, NDArray[np.unsignedinteger]]],
) -> None:
    tensor, _ = tensors["F64"]
    gathered = Gathered([Group(2, (Piece(tensor, 0, 3900, 10),))], HeldExtents())
    assert sum(span.end - span.start for span in gathered.spans(0, gathered.nbytes)) == gathered.nbytes


def test_scattered_pieces_are_dropped_before_others_are_read() -> None:
    held, most = HeldExtents(), 0
    for key in range(4):
        tracemalloc.start()
        held.read(key, 200 << 20, lambda out: out[:1].fill(0))
        most = max(most, tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    assert most < 300 << 20
