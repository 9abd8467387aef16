"""Where a checkpoint's elements lie in fused, split, cast and transposed parameters."""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

from deltaweights.engines import CheckpointTensor, located, places, write_changes
from deltaweights.errors import CheckpointError
from deltaweights.torch import Change

ROWS, COLUMNS, RANKS = 8, 6, 2
SHAPES = {
    "q.weight": (ROWS, COLUMNS),
    "k.weight": (4, COLUMNS),
    "v.weight": (4, COLUMNS),
    "gate.weight": (ROWS, COLUMNS),
    "up.weight": (ROWS, COLUMNS),
    "down.weight": (COLUMNS, ROWS),
    "embed.weight": (10, COLUMNS),
    "norm.weight": (COLUMNS,),
    "scale": (),
}


class Sharded(nn.Module):
    """One rank's part of a model, as engines lay it out: fused rows, split rows and columns, tied weights."""

    def __init__(self, rank: int, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.rank = rank

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)

        self.qkv = zeros((ROWS + 8) // RANKS, COLUMNS)
        self.gate_up = zeros(2 * ROWS // RANKS, COLUMNS)
        self.down = zeros(COLUMNS, ROWS // RANKS)
        self.embed = zeros(6, COLUMNS)  # padded by a row
        self.head = self.embed
        self.norm = zeros(COLUMNS)
        self.scale = zeros()

    def _rows(self, loaded: Tensor) -> Tensor:
        return loaded.chunk(RANKS, 0)[self.rank]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        half = ROWS // RANKS
        places: dict[str, Callable[[Tensor], object]] = {
            "q.weight": lambda w: self.qkv.data[:half].copy_(self._rows(w)),
            "k.weight": lambda w: self.qkv.data.narrow(0, half, 2).copy_(self._rows(w)),
            "v.weight": lambda w: self.qkv.data[half + 2 :].copy_(self._rows(w)),
            "gate.weight": lambda w: self.gate_up.data[:half].copy_(self._rows(w)),
            "up.weight": lambda w: self.gate_up.data.__setitem__(slice(half, None), self._rows(w)),
            "down.weight": lambda w: self.down.data.copy_(w.narrow(1, self.rank * half, half)),
            "embed.weight": lambda w: self.embed.data[:5].copy_(self._rows(w)),
            "norm.weight": self.norm.data.copy_,
            "scale": self.scale.data.copy_,
        }
        for name, loaded in weights:
            places[name](loaded)
        return set(SHAPES)


def described(dtype: torch.dtype = torch.bfloat16) -> dict[str, CheckpointTensor]:
    return {name: CheckpointTensor(dtype, shape) for name, shape in SHAPES.items()}


def checkpoint(seed: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=random).to(dtype) for name, shape in SHAPES.items()}


def state_bits(model: nn.Module) -> dict[str, bytes]:
    return {
        name: p.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for name, p in model.named_parameters()
    }


def bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def change(name: str, tensor: Tensor, indices: Tensor | None = None) -> Change:
    values = tensor.reshape(-1)
    return Change(
        name, tensor.dtype, tuple(tensor.shape), indices, values if indices is None else values[indices]
    )


def changes(old: dict[str, Tensor], new: dict[str, Tensor]) -> Iterable[Change]:
    for name, tensor in new.items():
        indices = (bits(old[name]) != bits(tensor)).nonzero().reshape(-1)
        yield change(name, tensor, indices)


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_a_sparse_change_is_written_where_the_loader_writes_it(rank: int, dtype: torch.dtype) -> None:
    """With NaNs of odd bits and a negative zero among the values."""
    old, new = checkpoint(0, dtype), checkpoint(0, dtype)
    random = torch.Generator().manual_seed(1)
    for tensor in new.values():
        flat = bits(tensor)
        chosen = torch.rand(flat.shape, generator=random) < 0.3
        flat[chosen] ^= 5
    odd = {1: (-1, -128), 2: (0x7F81, -(2**15)), 4: (0x7F800001, -(2**31))}[dtype.itemsize]
    for name in ("q.weight", "up.weight", "down.weight"):
        for k, value in enumerate(odd):
            bits(new[name]).view({1: torch.int8, 2: torch.int16, 4: torch.int32}[dtype.itemsize])[k::9] = (
                value
            )
    model, expected = Sharded(rank, dtype), Sharded(rank, dtype)
    model.load_weights(old.items())
    expected.load_weights(new.items())
    assert state_bits(model) != state_bits(expected)

    found = places(model, described(dtype))
    assert not found.dense
    assert found.differing(old) == []
    write_changes(found, changes(old, new))
    assert state_bits(model) == state_bits(expected)
    assert found.differing(new) == []


def test_finding_places_writes_nothing_and_values_may_be_written_later() -> None:
    old, new = checkpoint(0), checkpoint(1)
    model, expected = Sharded(1), Sharded(1)
    model.load_weights(old.items())
    expected.load_weights(new.items())
    before = state_bits(model)
    found = places(model, {name: tensor.to("meta") for name, tensor in old.items()})
    writes = located(found, [change(name, tensor) for name, tensor in new.items()])
    assert state_bits(model) == before
    assert writes.nbytes == sum(tensor.nbytes for tensor in model.parameters()) - COLUMNS * 2
    for tensor in new.values():
        tensor.zero_()  # the memory of the values may be used again by then
    writes.write()
    assert state_bits(model) == state_bits(expected)


def test_a_rank_takes_its_own_part_only() -> None:
    found = places(Sharded(0), described())
    (place,) = found.found["q.weight"]
    first, last = torch.tensor([0]), torch.tensor([ROWS * COLUMNS - 1])
    assert place.locate(first)[1].tolist() == [0]
    assert place.locate(last)[1].tolist() == []
    (place,) = found.found["down.weight"]  # columns 0 to 3 of 8
    chosen, at = place.locate(torch.arange(COLUMNS * ROWS))
    assert chosen.tolist() == [row * ROWS + column for row in range(COLUMNS) for column in range(4)]
    assert at.tolist() == list(range(COLUMNS * 4))


class Odd(nn.Module):
    """A model of one parameter and a loader of its own."""

    def __init__(self, load: Callable[[Tensor, Tensor], object], *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape or (4, 6)), requires_grad=False)
        self._load = load

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, loaded in weights:
            if name == "weight":
                self._load(self.weight.data, loaded)


@pytest.mark.parametrize(
    ("load", "shape"),
    [
        (lambda p, w: p.copy_(w.t()), (6, 4)),
        (lambda p, w: p.copy_(w.reshape(2, 2, 6).transpose(0, 1)), (2, 2, 6)),
        (lambda p, w: p.copy_(w[::2]), (2, 6)),
        (lambda p, w: p.copy_(w[:, 1::2]), (4, 3)),
        (lambda p, w: p[1:, ::2].copy_(w), (5, 12)),
        (lambda p, w: p.view(-1).copy_(w.flatten()), (4, 6)),
        (lambda p, w: [p[k].copy_(row) for k, row in enumerate(w.unbind(0))], (4, 6)),
        (lambda p, w: [part.copy_(w) for part in (p[:4], p[4:])], (8, 6)),
    ],
    ids=["transposed", "permuted", "rows", "columns", "steps", "flat", "row by row", "twice"],
)
def test_views_have_places(load: Callable[[Tensor, Tensor], object], shape: tuple[int, ...]) -> None:
    old, new = torch.arange(24.0).reshape(4, 6), torch.arange(24.0).reshape(4, 6)
    new.view(-1)[[0, 3, 7, 11, 12, 18, 23]] *= -1
    model, expected = Odd(load, *shape), Odd(load, *shape)
    model.load_weights([("weight", old)])
    expected.load_weights([("weight", new)])
    found = places(model, {"weight": old})
    assert not found.dense
    assert found.differing({"weight": old}) == []
    write_changes(found, changes({"weight": old}, {"weight": new}))
    assert state_bits(model) == state_bits(expected)


def _assigns(module_data: Tensor, loaded: Tensor) -> None:
    module_data.data = loaded


@pytest.mark.parametrize(
    ("load", "dtype", "why"),
    [
        (lambda p, w: p.copy_(w), torch.bfloat16, "bfloat16, and torch.float32"),
        (lambda p, w: p.copy_(w.to(torch.float32)), torch.bfloat16, "computed"),
        (lambda p, w: p.copy_(w * 2), torch.float32, "computed"),
        (lambda p, w: p.copy_(torch.cat([w[2:], w[:2]])), torch.float32, "computed"),
        (lambda p, w: p.copy_(w[:1]), torch.float32, "repeated"),
        (lambda p, w: p.add_(w), torch.float32, "another tensor's place"),
        (lambda p, w: p.fill_(w.sum().item()), torch.float32, "loader says"),
        (lambda p, w: p.__setitem__(torch.arange(4), w), torch.float32, "element by element"),
        (_assigns, torch.float32, "another tensor's place"),
    ],
    ids=["cast", "cast before", "computed", "joined", "repeated", "added", "filled", "indexed", "assigned"],
)
def test_what_is_computed_has_no_place_and_is_told(
    load: Callable[[Tensor, Tensor], object],
    dtype: torch.dtype,
    why: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Odd(load)
    before = state_bits(model)
    with caplog.at_level(logging.WARNING):
        found = places(
            model, {"weight": CheckpointTensor(dtype, (4, 6)), "other": CheckpointTensor(dtype, (2,))}
        )
    assert state_bits(model) == before
    assert set(found.dense) == {"weight"}
    assert why in found.dense["weight"]
    assert "1 of 2 tensors have no place in the model, such as weight" in caplog.text
    ones, second = torch.ones(4, 6, dtype=dtype), torch.tensor([1])
    with pytest.raises(CheckpointError, match=r"has no place in the model\n.*" + why):
        write_changes(found, [change("weight", ones, second)])
    write_changes(found, [change("other", ones, second)])  # taken by no parameter
    assert state_bits(model) == before


def test_weights_that_were_repacked_after_loading_are_noticed() -> None:
    model, loaded = Sharded(0), checkpoint(0)
    model.load_weights(loaded.items())
    found = places(model, described())
    model.qkv.data = model.qkv.data.flip(0).contiguous()
    assert found.differing(loaded) == []  # the places are still those of the old memory
    found = places(model, described())
    assert found.differing(loaded) == ["q.weight", "k.weight", "v.weight"]


def test_float32_bits_are_compared_not_values() -> None:
    model = Odd(lambda p, w: p.copy_(w))
    nan = struct.unpack("<f", struct.pack("<I", 0x7FC00001))[0]
    loaded = torch.full((4, 6), nan)
    loaded[0, 0] = -0.0
    model.load_weights([("weight", loaded)])
    found = places(model, {"weight": loaded})
    assert found.differing({"weight": loaded}) == []
    assert found.differing({"weight": loaded.abs()}) == ["weight"]
