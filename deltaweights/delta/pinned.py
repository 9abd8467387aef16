"""A target, as deltas and base, for another process that has to read the same versions of them."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

from ..storage import PinnedSource
from .chain import connect, links
from .opening import read_manifest
from .target_recipe import TargetRecipe


@dataclass(frozen=True, slots=True)
class PinnedTarget:
    """Deltas, oldest first, and the first one's base, if it needs one."""

    deltas: tuple[PinnedSource, ...]
    base: PinnedSource | None

    @classmethod
    def of(cls, target: TargetRecipe) -> PinnedTarget:
        """Pin what ``target`` is made from.

        Raises:
            ExecutorError: other machines cannot open some of it.
        """
        chain = links(target)
        base = chain[0].base
        return cls(
            tuple(PinnedSource.of(link.source) for link in chain),
            PinnedSource.of(base.source) if base else None,
        )

    def open(self) -> TargetRecipe:
        """The recipe of the same target; raises like :func:`connect` and :meth:`PinnedSource.open`."""
        with ExitStack() as on_error:
            sources = [on_error.enter_context(delta.open()) for delta in self.deltas]
            base = on_error.enter_context(self.base.open()) if self.base else None
            # That they are whole, and follow each other, was checked where they were pinned.
            target = connect(sources, [read_manifest(source) for source in sources], base)
            on_error.pop_all()
            return target
