"""Every processor writes the same payloads, and converts bases to the same bytes: see golden.json.

The format promises only that payloads decode to the same bytes, so an encoder that chooses otherwise may
change theirs. Then write the digests anew, `python -m tests.codec.test_golden`, on one kind of processor, and
hold the others to them: `make test-cpus test-arm64`.
"""

from __future__ import annotations

import hashlib
import json
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import zstandard
from numpy.typing import NDArray

from deltaweights.codec import Method, convert, decode_chunk, encode_chunk
from deltaweights.codec.low_rank import LowRank
from deltaweights.codec.low_rank.writing import code_part, joined, nothing_for
from deltaweights.codec.methods.ulp import FORMATS
from deltaweights.payload import decode, encode

from .pairs import Bytes, to_bits, values_of

GOLDEN = Path(__file__).parent / "golden.json"
COUNT = 20_011  # elements: whole vectors and some more
CHUNK_BYTES = 16_384
WIDTHS = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}  # bytes of the dtypes that bases are converted between
ZSTD_MAGIC = bytes.fromhex("28b52ffd")


class Case(NamedTuple):
    """What is encoded: as one chunk, or as a tensor of several."""

    dtype: str
    base: Bytes | None
    target: Bytes
    quick: bool = False
    in_chunks: bool = False


def raw(count: int, seed: int) -> NDArray[np.uint64]:
    """Random bits, of which all below make what they need by integers and correctly rounded operations."""
    return np.random.PCG64(seed).random_raw(count).astype("<u8")


def weights(count: int, seed: int) -> NDArray[np.float64]:
    """About normally distributed, std 0.018, with all bits of a mantissa in use."""
    coarse = raw(count, seed).view("<u2").reshape(-1, 4).sum(axis=1, dtype=np.int64) - 2 * 65535
    fine = (raw(count, seed + 1) >> np.uint64(28)).astype(np.float64)
    found: NDArray[np.float64] = coarse.astype(np.float64) * 2.0**-21 + fine * 2.0**-60
    return found


def updates(count: int, seed: int, octave: int) -> NDArray[np.float64]:
    """Up or down by at most 2**octave, and most of them by much less."""
    sides = raw(count, seed).view("<i4").reshape(-1, 2)
    found: NDArray[np.float64] = (sides[:, 0] >> (sides[:, 1] & 15)).astype(np.float64)
    return found * 2.0 ** (octave - 31)


def moved(dtype: str, octave: int, count: int = COUNT, rows: int = 0) -> tuple[Bytes, Bytes]:
    """(base, target): all weights moved; `rows` of them in a row by more than the next ones."""
    base = to_bits(weights(count, 1), dtype)
    steps = updates(count, 3, octave)
    if rows:
        steps *= 2.0 ** -(np.arange(count) // rows % 7)
    return base.view(np.uint8), to_bits(values_of(base, dtype) + steps, dtype).view(np.uint8)


def stepped(dtype: str) -> tuple[Bytes, Bytes]:
    """(base, target): all weights moved by as much, which only small ones can follow, and a few otherwise."""
    base = to_bits(weights(COUNT, 5), dtype)
    steps = np.where(raw(COUNT, 7) & np.uint64(1), 1.0, -1.0) * 2.0 ** (-13 - FORMATS[dtype].shift)
    target = to_bits(values_of(base, dtype) + steps, dtype)
    target[::2503] ^= np.array(1, target.dtype)
    return base.view(np.uint8), target.view(np.uint8)


def rare(dtype: str, one_in: int) -> tuple[Bytes, Bytes]:
    """(base, target): one weight in so many has another mantissa."""
    base = to_bits(weights(COUNT, 5), dtype)
    changed = raw(COUNT, 7) % np.uint64(one_in) == 0
    return base.view(np.uint8), (base ^ changed.astype(base.dtype)).view(np.uint8)


def decayed(steps: int, also_moved: int) -> tuple[Bytes, Bytes]:
    """(base, target) of F32 weights after some steps of weight decay; one row in so many moved besides."""
    base = weights(COUNT, 9).astype("<f4")
    target = base.copy()
    for _ in range(steps):
        target *= np.float32(1 - 2.0**-22)
    rows = np.arange(COUNT) // 128 % also_moved == 0
    target[rows] += updates(COUNT, 11, -9)[rows].astype("<f4")
    return base.view(np.uint8), target.view(np.uint8)


def integers(size: int) -> tuple[Bytes, Bytes]:
    """(base, target): words that differ by little, and some bytes that fill none."""
    base = (raw(COUNT, 13) % np.uint64(min(1 << 8 * size, 50_000))).astype(f"<u{size}")
    steps = (raw(COUNT, 15) % np.uint64(3)).astype(base.dtype)
    tail = np.arange(size // 2, dtype=np.uint8)
    return np.append(base.view(np.uint8), tail), np.append((base + steps).view(np.uint8), tail)


@cache
def cases() -> dict[str, Case]:
    """All of them, by name."""
    found: dict[str, Case] = {}
    for dtype, form in FORMATS.items():
        if dtype == "C64":
            continue  # pairs of F32
        noise = [raw(2000 * form.itemsize, seed).view(np.uint8)[: 4001 * form.itemsize] for seed in (17, 19)]
        found |= {
            f"{dtype} moved": Case(dtype, *moved(dtype, -10)),
            f"{dtype} moved far": Case(dtype, *moved(dtype, -3)),
            f"{dtype} moved a little": Case(dtype, *moved(dtype, -21)),
            f"{dtype} moved by rows": Case(dtype, *moved(dtype, -9, rows=512)),
            f"{dtype} few elements": Case(dtype, *moved(dtype, -10, count=37)),
            f"{dtype} a small step": Case(dtype, *stepped(dtype)),
            f"{dtype} rare": Case(dtype, *rare(dtype, 300)),
            f"{dtype} rare, quick": Case(dtype, *rare(dtype, 80), quick=True),
            f"{dtype} alone": Case(dtype, None, moved(dtype, -10)[1]),
            f"{dtype} noise": Case(dtype, noise[0], noise[1]),
            f"{dtype} noise alone": Case(dtype, None, noise[0]),
            f"{dtype} in chunks": Case(dtype, *moved(dtype, -12), in_chunks=True),
            f"{dtype} in chunks, alone": Case(dtype, None, moved(dtype, -12)[1], in_chunks=True),
        }
    for dtype in ("BF16", "F32"):
        found[f"{dtype} many"] = Case(dtype, *moved(dtype, -12, count=200_003))
    for also_moved in (COUNT, 40, 5):
        found[f"F32 decayed, one row in {also_moved} moved"] = Case("F32", *decayed(300, also_moved))
    found["C64 decayed"] = Case("C64", *decayed(300, 5))
    sizes = {"I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8}
    for dtype in ("I8", "BOOL", "F4", "F6_E2M3", "F8_E8M0", "ANOTHER", *sizes):
        base, target = integers(sizes.get(dtype, 1))
        found[f"{dtype} near"] = Case(dtype, base, target)
        found[f"{dtype} alone"] = Case(dtype, None, target)
    base, target = moved("BF16", -10)
    found["BF16 same"] = Case("BF16", base, base)
    found["BF16 repeated"] = Case("BF16", None, np.tile(target[:768], 20))
    return found


def payload_of(case: Case) -> tuple[str, bytes]:
    """(method, payload) of a case."""
    if case.in_chunks:
        return "", encode(case.base, case.target, case.dtype, chunk_bytes=CHUNK_BYTES)
    method, data = encode_chunk(case.base, case.target, case.dtype, quick=case.quick)
    return method.name, data


def digest_of_inputs() -> str:
    """One of all that is encoded, by name: no table's order is part of it."""
    digest = hashlib.sha256()
    for _, case in sorted(cases().items()):
        digest.update(b"" if case.base is None else case.base.data)
        digest.update(case.target.data)
    return digest.hexdigest()


def digest_of_converted(source: str, target: str) -> str:
    """One of any bits, and of weights, converted."""
    width = WIDTHS[source]
    bits = np.append(raw(COUNT, 21).view(np.uint8), to_bits(weights(COUNT, 23), source).view(np.uint8))
    assert len(bits) % width == 0
    return hashlib.sha256(convert(bits, source, target).data).hexdigest()


def summary(method: str, payload: bytes) -> list[Any]:
    """What golden.json says of a payload."""
    return [method, len(payload), hashlib.sha256(payload).hexdigest()]


def golden() -> dict[str, Any]:
    """What golden.json says."""
    found: dict[str, Any] = json.loads(GOLDEN.read_text())
    return found


def test_what_is_encoded_is_the_same_everywhere() -> None:
    """Where this fails, no digest of a payload says anything."""
    assert digest_of_inputs() == golden()["inputs"]


def test_the_cases_are_of_every_method() -> None:
    assert {method for method, _, _ in golden()["payloads"].values()} == {"", *(m.name for m in Method)}
    assert golden()["payloads"].keys() == cases().keys()


@pytest.mark.parametrize("name", cases())
def test_payloads_are_the_same_everywhere(name: str) -> None:
    case = cases()[name]
    method, payload = payload_of(case)
    if case.in_chunks:
        out = decode(case.base, payload, case.dtype, nbytes=len(case.target), chunk_bytes=CHUNK_BYTES)
    else:
        out = np.zeros_like(case.target)
        decode_chunk(Method[method], payload, case.base, case.dtype, out)
    assert np.array_equal(out, case.target)
    if list(zstandard.ZSTD_VERSION) != golden()["zstd"] and ZSTD_MAGIC in payload:
        pytest.skip("another zstd wrote the frames in it")
    assert summary(method, payload) == golden()["payloads"][name]


CONVERSIONS = [(source, target) for source in WIDTHS for target in WIDTHS if source != target]


@pytest.mark.parametrize(("source", "target"), CONVERSIONS)
def test_bases_are_converted_to_the_same_bytes_everywhere(source: str, target: str) -> None:
    """Those that are no numbers, too, of which processors keep different parts."""
    assert digest_of_converted(source, target) == golden()["conversions"][f"{source} to {target}"]


PREDICTIONS = [
    f"{dtype}{extra}" for dtype in ("BF16", "F16", "F32") for extra in ("", ", rounded", ", gains", ", noise")
]


def predicted(name: str) -> list[Any]:
    """Digests of a prediction of three parts, and of what it makes of weights, or of any bits."""
    dtype, _, extra = name.partition(", ")
    columns, parts = 83, [nothing_for(4)]
    for rows, rank, seed in ((100, 5, 31), (137, 16, 41)):
        left, right = (
            (raw(count * rank, seed + k).view("<i8").reshape(count, rank) >> (55 - np.arange(rank) // 3))
            for k, count in enumerate((rows, columns))
        )
        gains = (raw(rows, seed + 2).view("<i8") >> 50, 3) if extra == "gains" else None
        parts.append(code_part(left, right, 33, np.arange(2 * rank).reshape(2, rank) % 3, gains))
    count = (4 + 100 + 137) * columns
    size = WIDTHS[dtype]
    base = raw(count, 51).view(np.uint8)[: count * size]
    if extra != "noise":
        base = to_bits(weights(count, 53), dtype).view(np.uint8)
    data = joined(columns, parts, rounded=extra == "rounded")
    found = LowRank.parse(data, dtype, count).predict(base, 0)
    return [hashlib.sha256(part).hexdigest() for part in (data, found.tobytes())]


@pytest.mark.parametrize("name", PREDICTIONS)
def test_predictions_are_the_same_everywhere(name: str) -> None:
    assert predicted(name) == golden()["predictions"][name]


def main() -> None:
    """Write golden.json."""
    found = {
        "inputs": digest_of_inputs(),
        "zstd": zstandard.ZSTD_VERSION,
        "conversions": {f"{one} to {other}": digest_of_converted(one, other) for one, other in CONVERSIONS},
        "predictions": {name: predicted(name) for name in PREDICTIONS},
        "payloads": {name: summary(*payload_of(case)) for name, case in cases().items()},
    }
    text = json.dumps(found, indent=1)
    GOLDEN.write_text(re.sub(r"\[\s+([^]]+?)\s+\]", lambda row: f"[{' '.join(row[1].split())}]", text) + "\n")


if __name__ == "__main__":
    main()
