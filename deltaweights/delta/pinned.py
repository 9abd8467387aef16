"""A target, as deltas and base, for another process that has to read the same versions of them."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

from ..errors import DeltaError
from ..signing import manifest_sha256
from ..storage import PinnedSource
from .chain import connect, links
from .opening import read_manifest
from .target_recipe import TargetRecipe


@dataclass(frozen=True, slots=True)
class PinnedTarget:
    """Deltas, oldest first, the first one's base, if it needs one, and the SHA-256 (hex) of each manifest:
    what was checked where they were pinned, such as a signature, holds for the same ones only."""

    deltas: tuple[PinnedSource, ...]
    base: PinnedSource | None
    manifests: tuple[str, ...]

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
            tuple(manifest_sha256(link.manifest) for link in chain),
        )

    def open(self) -> TargetRecipe:
        """The recipe of the same target; raises like :func:`connect` and :meth:`PinnedSource.open`, and
        :class:`DeltaError` where a manifest is another one by now."""
        with ExitStack() as on_error:
            sources = [on_error.enter_context(delta.open()) for delta in self.deltas]
            base = on_error.enter_context(self.base.open()) if self.base else None
            # That they are whole, and follow each other, was checked where they were pinned.
            manifests = [read_manifest(source) for source in sources]
            for source, manifest, sha256 in zip(sources, manifests, self.manifests, strict=True):
                if manifest_sha256(manifest) != sha256:
                    raise DeltaError(
                        f"{source.where} was changed meanwhile", "", "Run the same command again."
                    )
            target = connect(sources, manifests, base)
            on_error.pop_all()
            return target
