"""Finds equal tensors in a target, so that one payload serves them all.

Most checkpoints have none, so cheap comparisons come first: dtype and shape, then a few bytes of each tensor,
then some more. Only tensors that agree in all of these are read whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial

from .. import codec
from ..checkpoint import Checkpoint, Tensor
from ..payload import ChunkPlan
from ..workers import Workers
from .names import Match

#: The approximate bytes of a reference in the manifest. A tensor that costs no more is coded.
_REFERENCE_BYTES = 128

_GLANCE_BYTES = 512
_SAMPLE_BYTES = 4096
_SAMPLES = 16
_BLOCK_BYTES = 1 << 20

#: Groups of tensors that may be equal, in the order of the target.
_Groups = list[list[Match]]

#: Returns first bytes and ends of some parts of a tensor, given its length in bytes.
_Parts = Callable[[int], Sequence[tuple[int, int]]]


def find_duplicates(
    target: Checkpoint,
    matches: Sequence[Match],
    chunk_bytes: int,
    workers: Workers,
    glance: Callable[[Tensor], Hashable] | None = None,
    *,
    sampled: bool = False,
) -> list[Match]:
    """Return the matches, with :attr:`Match.like` set for duplicates of another tensor of the target.

    Tensors that equal their base tensor stay as they are, since they cost nothing. All other equal tensors
    refer to one of them, the cheapest to code.

    Args:
        target: the checkpoint of the matches.
        glance: a key that is equal for equal tensors and differs for most others; if None, some of their
            bytes.
        sampled: take tensors for equal if a sample of their bytes is, as is good enough for an estimate.
    """
    large = [match for match in matches if match.target.info.nbytes > _REFERENCE_BYTES]
    groups = _split([large], _kind)
    if glance:
        groups = _split(groups, lambda match: glance(match.target))
    for parts in (_first, _spread) if sampled else (_first, _spread, _whole):
        if groups:
            groups = _split_by_bytes(target, groups, parts, workers if parts is _whole else None)
    likes: dict[Tensor, Match] = {}
    for group in groups:
        costs = list(workers.map(partial(_cost, chunk_bytes, _SAMPLES if sampled else None), group))
        kept = min(zip(costs, map(_is_renamed, group), group, strict=True), key=lambda one: one[:2])[2]
        for match, cost in zip(group, costs, strict=True):
            if match is not kept and cost > _REFERENCE_BYTES:
                likes[match.target] = replace(match, shared_bytes=0, like=kept.target)
    return [likes.get(match.target, match) for match in matches]


def _is_renamed(match: Match) -> bool:
    return match.base is None or match.base.name != match.target.name


def _split(groups: _Groups, key: Callable[[Match], Hashable]) -> _Groups:
    """Split the groups by ``key`` of their members, and drop groups of one."""
    found: _Groups = []
    for group in groups:
        by_key: dict[Hashable, list[Match]] = {}
        for match in group:
            by_key.setdefault(key(match), []).append(match)
        found += (alike for alike in by_key.values() if len(alike) > 1)
    return found


def _split_by_bytes(target: Checkpoint, groups: _Groups, parts: _Parts, workers: Workers | None) -> _Groups:
    """Split the groups by some bytes of their members, which are read in the order of the files: over a
    network, what is close together comes at once."""
    places = {path: number for number, path in enumerate(target.shards)}
    matches = sorted(
        (match for group in groups for match in group),
        key=lambda match: (places[match.target.path], match.target.info.start),
    )
    spans = (match.target.span(*part) for match in matches for part in parts(match.target.info.nbytes))
    with target.source.expect(spans):
        # Reading a few bytes is faster than handing them to another thread.
        digests = (workers.map if workers else map)(partial(_digest, parts), matches)
        found = {match.target: digest for match, digest in zip(matches, digests, strict=True)}
    return _split(groups, lambda match: found[match.target])


def _kind(match: Match) -> Hashable:
    info = match.target.info
    return info.dtype, info.shape, info.nbytes


def _first(nbytes: int) -> Sequence[tuple[int, int]]:
    return [(0, min(nbytes, _GLANCE_BYTES))]


def _spread(nbytes: int) -> Sequence[tuple[int, int]]:
    starts = range(0, nbytes, max(_SAMPLE_BYTES, nbytes // _SAMPLES))
    return [(start, min(start + _SAMPLE_BYTES, nbytes)) for start in starts]


def _whole(nbytes: int) -> Sequence[tuple[int, int]]:
    return [(start, min(start + _BLOCK_BYTES, nbytes)) for start in range(0, nbytes, _BLOCK_BYTES)]


def _digest(parts: _Parts, match: Match) -> bytes:
    """The SHA-256 of these parts. Even hostile tensors have equal digests only for equal bytes."""
    sha256 = hashlib.sha256()
    for part in parts(match.target.info.nbytes):
        sha256.update(match.read(*part).data)
    return sha256.digest()


def _cost(chunk_bytes: int, most: int | None, match: Match) -> int:
    """The approximate length of the tensor's payload; 0 if all its bytes are the base's, or those of the
    chunks that are looked at, which are at most ``most``."""
    info = match.target.info
    plan = ChunkPlan(info.nbytes, match.shared_bytes, chunk_bytes)
    for index in range(0, plan.count, max(1, plan.count // most) if most else 1):
        target, base = match.read(*plan.span(index)), None
        if plan.has_base(index):
            start, end = plan.span(index)
            base = match.compared(match.read_base(start, end), start)
        _, data = codec.encode_chunk(base, target, info.dtype)
        if data:
            return (len(data) + codec.RECORD.itemsize) * (plan.count - index)
    return 0
