"""Merged adapters: what they take with a low-rank prediction and without, and how long finding one takes.

    python benchmarks/lowrank.py             # simulated matrices
    python benchmarks/lowrank.py --whole     # whole diffs of them, with and without the search
    python benchmarks/lowrank.py --real      # and merges by PEFT: see merges.py
    python benchmarks/lowrank.py --json lowrank.json      # for picture.py

Sizes are bits a weight; zstd is zstd-3 of the byte planes of the XOR with the base, and lmzip is used as
peers.py says. Times are those of one thread's processor, so that neighbours trouble them little. The time of
decoding is divided by that of the same tensor without a prediction. Times of whole diffs are the process's
processor time, the shortest of three, and divided by that of a diff that does not search.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray
from peers import Lmzip, Peer, Planes

from deltaweights import make_delta
from deltaweights.codec import decode_chunk, encode_chunk
from deltaweights.codec.low_rank import Effort, LowRank
from deltaweights.codec.low_rank.search import find_low_rank

Words = NDArray[np.uint16]
Bytes = NDArray[np.uint8]
_CHUNK = 1 << 20
_SIMULATED = (
    (1024, 1024, 16, 2e-4),
    (2048, 2048, 16, 2e-4),
    (2048, 2048, 16, 2e-5),
    (4096, 4096, 16, 2e-4),
    (2048, 2048, 64, 2e-4),
    (2048, 2048, 256, 5e-4),
)
_SLOW_RANK = 256  # too slow for whole diffs, three times each
_COLUMNS = ("zstd", "lmzip", "without", "with", "factors")  # sizes, in bits a weight


class Pair(NamedTuple):
    """A matrix: its base and its target, as the bits of bf16."""

    name: str
    base: Words
    target: Words


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--real", action="store_true", help="merges by PEFT as well")
    parser.add_argument("--whole", action="store_true", help="whole diffs instead")
    parser.add_argument("--effort", default="default", choices=("fast", "default", "max"))
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write sizes there; picture.py draws them")
    options = parser.parse_args()
    if options.whole:
        print("| diff | effort | processor time | size, % of the target |\n|---|---|---|---|")
        for pairs in _all_pairs(options):
            _report_whole(pairs)
        return
    _encoded(*np.random.default_rng(0).integers(0, 256, (2, _CHUNK), np.uint8))  # loads the kernels
    print(
        f"| matrix | {' | '.join(_COLUMNS)} | rank | search ms | encode ms | decode, with / without |\n"
        f"|---{'|---' * len(_COLUMNS)}|---|---|---|---|"
    )
    sizes = {pairs[0].name: _report(pairs, options.effort) for pairs in _all_pairs(options)}
    if options.json:
        options.json.write_text(json.dumps({"matrices": sizes}, indent=1) + "\n")


def _all_pairs(options: argparse.Namespace) -> Iterator[list[Pair]]:
    yield from ([pair] for pair in _simulated(_SLOW_RANK - 1 if options.whole else _SLOW_RANK))
    if options.real:
        yield from _real(options.hidden, options.steps)


def _report_whole(pairs: list[Pair]) -> None:
    efforts: tuple[Effort | None, ...] = (None, "fast", "default")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for side in ("base", "target"):
            (folder / side).mkdir()
            _save([getattr(pair, side) for pair in pairs], folder / side / "model.safetensors")
        shortest, sizes = dict.fromkeys(efforts, np.inf), dict.fromkeys(efforts, 0)
        for number in range(3):
            for effort in efforts:
                out = folder / f"{number}-{effort}"
                shortest[effort] = min(shortest[effort], _whole(folder, out, effort))
                sizes[effort] = sum(file.stat().st_size for file in out.iterdir())
    for effort in efforts:
        share = 100 * sizes[effort] / sum(pair.target.nbytes for pair in pairs)
        ratio = shortest[effort] / shortest[None]
        print(f"| {pairs[0].name} | {effort or 'no search'} | {ratio:.2f} | {share:.2f} |", flush=True)


def _save(tensors: list[Words], path: Path) -> None:
    header, end = {}, 0
    for number, bits in enumerate(tensors):
        start, end = end, end + bits.nbytes
        header[str(number)] = {"dtype": "BF16", "shape": bits.shape, "data_offsets": [start, end]}
    data = json.dumps(header).encode()
    path.write_bytes(b"".join([len(data).to_bytes(8, "little"), data, *(bits.tobytes() for bits in tensors)]))


def _whole(folder: Path, out: Path, effort: Effort | None) -> float:
    """Make a delta; the processor time that it took."""
    search: AbstractContextManager[Any] = (
        nullcontext() if effort else patch("deltaweights.diff.with_low_rank", lambda match, _: match)
    )
    with search:
        began = time.process_time()
        make_delta(folder / "base", folder / "target", out, effort=effort or "default")
        return time.process_time() - began


def _report(pairs: list[Pair], effort: Effort) -> dict[str, float | None]:
    """Print a row; the sizes in it, None where a peer is not installed."""
    totals: Any = np.zeros(len(_COLUMNS) + 3)
    ranks = set()
    for _, base, target in pairs:
        before, after = (bits.reshape(-1).view(np.uint8) for bits in (base, target))
        plain, encoding = _timed(lambda: _encoded(before, after))  # noqa: B023
        data, search = _timed(lambda: _found(base, target, effort))  # noqa: B023
        prediction = LowRank.parse(data, "BF16", target.size) if data else None
        closer = prediction.predict(before, 0) if prediction else before
        coded = _encoded(closer, after)
        ranks.add(prediction.rank if prediction else 0)
        slower = _decoding(coded, before, after, prediction), _decoding(plain, before, after, None)
        peers = [_size_by(peer, before, after) for peer in (Planes, Lmzip)]
        sizes = *peers, _size(plain), _size(coded) + len(data or b""), len(data or b"")
        totals += np.array([*sizes, search, encoding, slower[0] / slower[1] * target.size])
    count = sum(pair.target.size for pair in pairs)
    bits = [None if np.isnan(size) else 8 * size / count for size in totals[: len(_COLUMNS)]]
    shown = [
        *("not installed" if size is None else f"{size:.3f}" for size in bits),
        ", ".join(map(str, sorted(ranks))),
        *(f"{seconds * 1e3:.0f}" for seconds in totals[-3:-1]),
        f"{totals[-1] / count:.2f}",
    ]
    print(f"| {pairs[0].name} | {' | '.join(shown)} |", flush=True)
    return dict(zip(_COLUMNS, bits, strict=True))


def _found(base: Words, target: Words, effort: Effort) -> bytes | None:
    def rows_of(part: Words) -> Callable[[int, int], Bytes]:
        return lambda start, stop: part[start:stop].reshape(-1).view(np.uint8)

    return find_low_rank(rows_of(target), rows_of(base), target.shape, "BF16", effort)


def _chunks(count: int) -> Iterator[slice]:
    return (slice(at, at + _CHUNK) for at in range(0, count, _CHUNK))


def _encoded(base: Bytes, target: Bytes) -> list[tuple[Any, bytes]]:
    return [encode_chunk(base[part], target[part], "BF16") for part in _chunks(len(base))]


def _size(coded: list[tuple[Any, bytes]]) -> int:
    return sum(len(data) for _, data in coded)


def _decoding(
    coded: list[tuple[Any, bytes]], base: Bytes, target: Bytes, prediction: LowRank | None
) -> float:
    """The shortest of three times."""

    def decode() -> None:
        for part, (method, data) in zip(_chunks(len(base)), coded, strict=True):
            before = prediction.predict(base[part], part.start // 2) if prediction else base[part]
            out = np.empty(len(before), np.uint8)
            decode_chunk(method, data, before, "BF16", out)
            assert np.array_equal(out, target[part])

    return min(_timed(decode)[1] for _ in range(3))


def _size_by(make: Callable[[], Peer], base: Bytes, target: Bytes) -> float:
    """What a peer takes; not a number if it is not installed."""
    try:
        peer = make()
    except ImportError:
        return np.nan
    coded = peer.encode(base, target, "BF16")
    assert np.array_equal(peer.decode(base, coded, "BF16", np.empty_like(target)), target)
    return sum(map(len, coded))


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    began = time.thread_time()
    found = call()
    return found, time.thread_time() - began


def _simulated(most_rank: int) -> Iterator[Pair]:
    for rows, columns, rank, std in _SIMULATED:
        if rank > most_rank:
            continue
        rng = np.random.default_rng(0)
        base = _bf16(rng.standard_normal((rows, columns), np.float32) * np.float32(0.02))
        product = rng.standard_normal((rows, rank), np.float32) @ rng.standard_normal(
            (rank, columns), np.float32
        )
        single = (base.astype(np.uint32) << 16).view(np.float32)
        target = _bf16(single + product * np.float32(std / product.std()))
        yield Pair(f"{rows} x {columns}, rank {rank}, std {std}", base, target)


def _bf16(values: Any) -> Words:
    bits = values.view(np.uint32)
    rounded: Words = ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)
    return rounded


def _real(hidden: int, steps: int) -> Iterator[list[Pair]]:
    import torch
    from merges import MERGES, base_model, merged

    base = base_model(hidden, 4)
    before = base.state_dict()
    for name, merge in MERGES.items():
        after = merged(base, merge, steps).state_dict()
        pairs = [
            Pair(f"PEFT, {name}", *(state[key].view(torch.uint16).numpy() for state in (before, after)))
            for key in before
            if key.endswith("proj.weight")
        ]
        yield [pair for pair in pairs if not np.array_equal(pair.base, pair.target)]


if __name__ == "__main__":
    main()
