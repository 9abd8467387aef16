"""Which tensors of a target are equal to another one of it, so that one payload serves them all.

Most checkpoints have none, so what tells tensors apart at little cost comes first: dtype and shape; a few
bytes of each; some more of those that are left. Only what agrees in all of that is read whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from functools import partial

from .. import codec
from ..checkpoint import Checkpoint, Tensor
from ..payload import ChunkPlan
from ..storage import Span
from ..workers import Workers
from .names import Match

#: About what a reference takes in the manifest. What costs no more is coded.
_REFERENCE_BYTES = 128

_GLANCE_BYTES = 512
_SAMPLE_BYTES = 4096
_SAMPLES = 16
_BLOCK_BYTES = 1 << 20

#: Groups of tensors that may be equal, in the order of the target.
_Groups = list[list[Match]]

#: First bytes and ends of parts of a tensor of so many bytes.
_Parts = Callable[[int], Sequence[tuple[int, int]]]


def find_duplicates(
    target: Checkpoint,
    matches: Sequence[Match],
    chunk_bytes: int,
    workers: Workers,
    glance: Callable[[Tensor], Hashable] | None = None,
) -> list[Match]:
    """The matches, those that are to be coded as another tensor of the target with :attr:`Match.like`.

    Of equal tensors, those that are their base tensor's bytes stay as they are, since nothing is coded then.
    All others refer to one: the one that is cheapest to code.

    Args:
        target: the checkpoint that the matches are about.
        glance: what tells most tensors apart, equal for equal ones; some of their bytes if None.
    """
    large = [match for match in matches if match.target.info.nbytes > _REFERENCE_BYTES]
    groups = _split([large], _kind)
    if glance:
        groups = _split(groups, lambda match: glance(match.target))
    for parts in (_first, _spread, _whole):
        if groups:
            with target.source.expect(_spans(groups, parts)):
                groups = _split(groups, partial(_digest, parts), workers if parts is _whole else None)
    likes: dict[Tensor, Match] = {}
    for group in groups:
        costs = list(workers.map(partial(_cost, chunk_bytes), group))
        kept = min(zip(costs, map(_is_renamed, group), group, strict=True), key=lambda one: one[:2])[2]
        for match, cost in zip(group, costs, strict=True):
            if match is not kept and cost > _REFERENCE_BYTES:
                likes[match.target] = replace(match, shared_bytes=0, like=kept.target)
    return [likes.get(match.target, match) for match in matches]


def _is_renamed(match: Match) -> bool:
    return match.base is None or match.base.name != match.target.name


def _split(groups: _Groups, key: Callable[[Match], Hashable], workers: Workers | None = None) -> _Groups:
    """The groups, cut up by what ``key`` gives for their members; who is left alone is left out."""
    found: _Groups = []
    for group in groups:
        by_key: dict[Hashable, list[Match]] = {}
        # A few bytes are read sooner than handed to another thread.
        for match, value in zip(group, (workers.map if workers else map)(key, group), strict=True):
            by_key.setdefault(value, []).append(match)
        found += (alike for alike in by_key.values() if len(alike) > 1)
    return found


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


def _spans(groups: _Groups, parts: _Parts) -> Iterable[Span]:
    return (
        match.target.span(*part)
        for group in groups
        for match in group
        for part in parts(match.target.info.nbytes)
    )


def _digest(parts: _Parts, match: Match) -> bytes:
    """The SHA-256 of these parts: equal for equal bytes only, whoever made them."""
    sha256 = hashlib.sha256()
    for part in parts(match.target.info.nbytes):
        sha256.update(match.read(*part).data)
    return sha256.digest()


def _cost(chunk_bytes: int, match: Match) -> int:
    """About how long the tensor's payload would be; 0 where all its bytes are the base's."""
    info = match.target.info
    plan = ChunkPlan(info.nbytes, match.shared_bytes, chunk_bytes)
    for index in range(plan.count):
        target, base = match.read(*plan.span(index)), None
        if plan.has_base(index):
            assert match.base is not None
            base = codec.convert(match.read_base(*plan.span(index)), match.base.info.dtype, info.dtype)
        _, data = codec.encode_chunk(base, target, info.dtype)
        if data:
            return (len(data) + codec.RECORD.itemsize) * (plan.count - index)
    return 0
