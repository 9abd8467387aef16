"""Opens the base and target of a diff without what is no part of them, matches them, and warns of what is odd
about the two."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from .checkpoint import Checkpoint
from .checkpoint.oddities import (
    is_excluded,
    is_pointer,
    oddities_of_base,
    oddities_of_target,
    oddities_of_unrelated,
    tell,
)
from .license import cards
from .lineage.documents import names_of
from .lineage.doubts import doubts_by_cards, doubts_by_weights
from .manifest import FileRecord
from .match.names import Match, RenameRule, match_tensors
from .metrics import timed_stage
from .storage import Readable, is_clutter, open_source


@dataclass(frozen=True, slots=True)
class CheckpointFacts:
    """A manifest's facts about base or target: Hub id and commit, license, and its files if they are known in
    advance."""

    repo_id: str | None
    revision: str | None
    license: cards.LicenseTexts
    files: tuple[FileRecord, ...] = ()


def open_base(base: Readable) -> Checkpoint:
    """Open the base. Git LFS pointers are left out: each stands for a file that is not there.

    Raises:
        CheckpointError: it cannot be found or read.
    """
    source = open_source(base)
    source.leave_out(is_clutter)
    others = (path for path in source.sizes if not path.endswith(".safetensors"))
    pointers = {path for path in others if is_pointer(source, path)}
    source.leave_out(pointers.__contains__)
    checkpoint = Checkpoint(source, may_lack=True)
    tell(oddities_of_base(checkpoint, sorted(pointers)))
    return checkpoint


def open_target(target: Readable, exclude: Sequence[str]) -> Checkpoint:
    """Open the target, without what ``exclude`` names and what is no part of any model.

    Args:
        exclude: patterns, as for :func:`deltaweights.make_delta`.

    Raises:
        CheckpointError: it cannot be found or read.
    """
    source = open_source(target)
    for pattern in exclude:
        if not any(is_excluded(path, pattern) for path in source.sizes):
            tell([f"No file of the target is excluded by {pattern!r}."])
    tell(
        f"The target's {path} is left out: such a file holds secrets, mostly."
        for path in source.sizes
        if _is_env(path) and not any(is_excluded(path, pattern) for pattern in exclude)
    )
    source.leave_out(lambda path: any(is_excluded(path, pattern) for pattern in exclude))
    source.leave_out(lambda path: is_clutter(path) or _is_env(path))
    checkpoint = Checkpoint(source)
    tell(oddities_of_target(checkpoint))
    return checkpoint


def _is_env(path: str) -> bool:
    return path.rpartition("/")[2] == ".env"


def facts_of(
    checkpoint: Checkpoint,
    side: Literal["base", "target"],
    repo_id: str | None = None,
    revision: str | None = None,
    license: str | None = None,
) -> CheckpointFacts:
    """The facts about one side, from its source and its model card.

    Args:
        checkpoint: the side.
        side: which one, for warnings.
        repo_id, revision, license: what the user gives instead; None: what is found.
    """
    found = checkpoint.source.hub_id
    # The commit that was read counts, unless the user gives the repository a different name.
    known = found.revision if repo_id in (None, found.repo_id) else None
    texts = cards.read_license(checkpoint, side, license)
    return CheckpointFacts(repo_id or found.repo_id, revision or known, texts)


@timed_stage("match")
def match_inputs(
    old: Checkpoint,
    new: Checkpoint,
    base: CheckpointFacts,
    target: CheckpointFacts,
    rename: Sequence[RenameRule],
) -> list[Match]:
    """Match the tensors as :func:`match_tensors` does, and warn if the two look swapped or unrelated."""
    doubts = list(_doubts_by_cards(old, new, base, target))
    tell(doubts)
    matches = match_tensors(old, new, rename)
    if matches and not any(match.base for match in matches):
        tell(oddities_of_unrelated(new))
    elif not doubts:
        tell(doubts_by_weights(old, new, matches))
    return matches


def _doubts_by_cards(
    old: Checkpoint, new: Checkpoint, base: CheckpointFacts, target: CheckpointFacts
) -> Iterator[str]:
    return doubts_by_cards(
        base.license.base_models,
        names_of(old, base.repo_id),
        target.license.base_models,
        names_of(new, target.repo_id),
    )
