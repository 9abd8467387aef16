"""Whether diff was given the wrong base, or the two in the wrong order, by a small sample of both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..checkpoint import Checkpoint
from ..match.names import Match
from .choosing import choose
from .directions import growth_of
from .documents import is_named
from .measures import measure
from .sampling import Candidate, counterparts_of, read_samples, without_pruned
from .scale import is_alike, is_unlike

#: Bytes of the target that are compared, at most; of one that is far away, this part, and no more than these,
#: since each tensor is a request to either side.
_SAMPLE_BYTES, FAR_PART, _FAR_BYTES = 1 << 20, 1 / 2000, 16 << 10

#: Tensors that are compared, at most and at least (with fewer, nothing is said), and the bytes of each, at
#: least.
_MOST_TENSORS, _LEAST_TENSORS, _TENSOR_BYTES = 64, 8, 2048

#: How likely it has to be that the base came after the target, to be told.
_LIKELY = 0.95

_SWAPPED = "Are the two swapped? The base comes first, then the fine-tune."


def doubts_by_cards(
    base_models: Sequence[str],
    base_names: frozenset[str],
    target_models: Sequence[str],
    target_names: frozenset[str],
) -> Iterator[str]:
    """What to say where the base's card names the target as *its* base, and the target's card does not say
    the like.

    Args:
        base_models, target_models: what each one's card names as its base.
        base_names, target_names: what each one may be called.
    """
    if is_named(base_models, target_names) and not is_named(target_models, base_names):
        yield f"The base's card names the target as its base. {_SWAPPED}"


def doubts_by_weights(base: Checkpoint, target: Checkpoint, matches: Sequence[Match]) -> Iterator[str]:
    """What to say of a base whose weights have nothing in common with the target's (here only of one that is
    far away: of others, the search for matches says so), or have grown beyond them."""
    is_far, sample_bytes = base.source.is_remote or target.source.is_remote, _SAMPLE_BYTES
    if is_far:
        nbytes = sum(match.target.nbytes for match in matches)
        sample_bytes = min(_FAR_BYTES, int(FAR_PART * nbytes))
    most = min(_MOST_TENSORS, sample_bytes // _TENSOR_BYTES)
    if most < _LEAST_TENSORS:
        return
    chosen = choose([match.target for match in matches], sample_bytes, most)
    candidate = Candidate(base, counterparts_of(matches))
    samples = read_samples(target, chosen, [candidate])
    found = [one for sample in samples for one in measure(without_pruned(sample), codes=False) if one]
    if found and is_far and all(map(is_unlike, found)):
        yield (
            "The base's weights have nothing in common with the target's: is this the base that it was "
            "trained from?"
        )
    if found and all(map(is_alike, found)):
        growth = growth_of([(one.growth, one.growth_error) for one in found])
        if growth and growth.odds()["before"] > _LIKELY:
            yield f"The base's weights have grown beyond the target's, as those of a fine-tune do. {_SWAPPED}"
