"""The tasks of a diff: a shard of the target, encoded in another process; a shard of the base, hashed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from ..checkpoint import Checkpoint, HeldExtents
from ..codec import Effort
from ..entries import TensorEntry
from ..executors import kept, workers_of
from ..manifest import FileRecord, TargetFile
from ..match.names import Match
from ..match.references import MatchReference
from ..storage import PinnedSource, SharedOutput, join_output
from ..workers import Meter, Workers
from .chain import links
from .digests import PassingDigest
from .encoder import ShardEncoder
from .pinned import PinnedTarget
from .rebuilt import RebuiltSource
from .writer import DeltaWriter


@dataclass(frozen=True, slots=True)
class _Pair:
    """Base and target, open in a worker."""

    old: Checkpoint
    new: Checkpoint
    held: HeldExtents = field(default_factory=HeldExtents)

    def cancel(self) -> None:
        for source in (self.old.source, self.new.source):
            source.cancel()


@dataclass(frozen=True, slots=True)
class PinnedPair:
    """Base and target of a diff, for other processes. A target that is rebuilt brings its base along."""

    base: PinnedSource | None
    target: PinnedSource | PinnedTarget

    @classmethod
    def of(cls, old: Checkpoint, new: Checkpoint) -> PinnedPair:
        """Pin both; raises like :meth:`PinnedSource.of`."""
        if isinstance(new.source, RebuiltSource):
            return cls(None, PinnedTarget.of(new.source.target))
        return cls(PinnedSource.of(old.source), PinnedSource.of(new.source))

    @contextmanager
    def open(self) -> Iterator[_Pair]:
        """Open both, the same versions."""
        with ExitStack() as opened:
            if isinstance(self.target, PinnedTarget):
                target = opened.enter_context(self.target.open())
                old = links(target)[0].base
                assert old is not None  # a target is compacted against its base
                yield _Pair(old, Checkpoint(RebuiltSource(target)))
            else:
                assert self.base is not None
                old = opened.enter_context(Checkpoint(self.base.open(), may_lack=True))
                new = opened.enter_context(Checkpoint(self.target.open()))
                yield _Pair(old, new)


@dataclass(frozen=True, slots=True)
class DiffSetting:
    """What all tasks of a diff have in common. ``inputs`` is as for :class:`DeltaWriter`."""

    pair: PinnedPair
    output: SharedOutput
    inputs: str
    chunk_bytes: int
    effort: Effort
    threads: int


@dataclass(frozen=True, slots=True)
class ShardJob:
    """A shard of the target, to be written as the delta shard ``name``; and the base's shard that is hashed
    along with it, if any."""

    path: str
    name: str
    matches: tuple[MatchReference, ...]
    passing: str | None

    @classmethod
    def of(cls, path: str, name: str, matches: list[Match], passing: str | None) -> ShardJob:
        """The job of a shard with these matches."""
        return cls(path, name, tuple(map(MatchReference.of, matches)), passing)


@dataclass(frozen=True, slots=True)
class DigestJob:
    """A file of the base, to be hashed."""

    path: str


@dataclass(frozen=True, slots=True)
class JobDone:
    """What came of a job.

    Attributes:
        digests: SHA-256 of files of the base.
        file, target, entries: of a shard's job: the delta shard, the target's, and its tensors.
        is_kept: whether the delta shard was there from an earlier run.
    """

    digests: dict[str, str]
    file: FileRecord | None = None
    target: TargetFile | None = None
    entries: tuple[TensorEntry, ...] = ()
    is_kept: bool = False


def do_job(setting: DiffSetting, job: ShardJob | DigestJob) -> JobDone:
    """The task: works on one job."""
    with (
        kept(setting.pair, setting.pair.open) as pair,
        join_output(setting.output) as folder,
        workers_of(setting.threads, pair.cancel) as workers,
    ):
        writer = DeltaWriter(folder, pair.new.source, setting.inputs, workers, Meter(None, "", 0))
        if isinstance(job, DigestJob):
            return JobDone({job.path: writer.digest(pair.old.source, job.path)})
        return _encode(setting, job, pair, writer, workers)


def _encode(
    setting: DiffSetting, job: ShardJob, pair: _Pair, writer: DeltaWriter, workers: Workers
) -> JobDone:
    old, new = pair.old, pair.new
    passing = {job.passing: PassingDigest(old.shards[job.passing])} if job.passing else {}
    encoder = ShardEncoder(old, new, writer, setting.chunk_bytes, setting.effort, Meter(None, "", 0), passing)
    matches = [match.find(old, new, pair.held) for match in job.matches]
    target, entries = encoder.write_shard(workers, job.path, matches, job.name)
    digests = {path: one.finish(old.source, workers) for path, one in passing.items()}
    for path, digest in digests.items():
        writer.require_base(old.source, path, digest)
    (file,) = writer.files
    return JobDone(digests, file, target, tuple(entries), writer.kept_any)
