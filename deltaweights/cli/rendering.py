"""Reports as lines of text. Nothing here prints.

Every name that comes from a file is made harmless (:func:`plain`): none may control the terminal.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from ..words import counted, plain, scaled, size
from .layout import Screen, table

if TYPE_CHECKING:
    from ..engines.pointer import ServeReport
    from ..estimate import DeltaEstimate, EstimatedTensors
    from ..inspect import DeltaSummary, StoredFile, TensorSummary
    from ..license.rules import LicenseReport, SideLicense
    from ..manifest import BaseRecord, TargetRecord
    from ..patch import ApplyReport
    from ..plan import Plan, PlannedReads, Space
    from ..push import PushReport
    from ..verify import VerifyReport


#: So many bytes of files that are stored whole are worth a line.
_MUCH = 1_000_000


def rate(bits: float) -> str:
    """Bits a second, as in ``100 Mbit/s``."""
    return scaled(bits, ("bit/s", "kbit/s", "Mbit/s", "Gbit/s", "Tbit/s"))


def byte_rate(nbytes: float) -> str:
    """Bytes a second, as in ``1.4 GB/s``."""
    return scaled(nbytes, ("bytes/s", "KB/s", "MB/s", "GB/s", "TB/s"))


def duration(seconds: float) -> str:
    """Seconds to come, as in ``6 s``, ``5 min`` or ``7 h 20 min``."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 1 else "less than 1 s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def elapsed(seconds: float) -> str:
    """Seconds that it took, as in ``3.2 s``, or as :func:`duration` says it."""
    return f"{max(seconds, 0.001):.2g} s" if seconds < 9.95 else duration(seconds)


def display_name(side: BaseRecord | TargetRecord | SideLicense, fallback: str) -> str:
    """A base or target for people: its Hub id, or ``fallback``, and the start of its commit."""
    name = side.repo_id or fallback
    return f"{name}@{side.revision[:12]}" if side.revision else name


# What a verb did -----------------------------------------------------------------------------------------


def written_lines(place: object, summary: DeltaSummary) -> Iterator[str]:
    """A delta that was just written to ``place``."""
    counts = ", ".join(f"{count} {status}" for status, count in summary.counts.items())
    yield plain(f"{_shown(place)}: {_size_line(summary)}; tensors: {counts or 'none'}")
    if summary.target.left_out:
        yield plain(f"Left out: {', '.join(summary.target.left_out)}")
    yield from _whole_lines(summary)
    yield from _adapter_lines(summary)
    yield from _conflict_lines(summary.license.conflicts)


def _shown(place: object) -> str:
    """An output's name, without what may be secret in a URL."""
    from ..storage.store.errors import redacted

    return redacted(str(place)) if "://" in str(place) else str(place)


def speed_line(did: str, nbytes: int, seconds: float) -> str:
    """The last line of what a verb did: how much, how long it took, and how fast that was."""
    return f"{did} {speed(nbytes, seconds)}"


def speed(nbytes: int, seconds: float) -> str:
    """Bytes in a time, as in ``8.4 MB in 3.2 s, 2.6 MB/s``."""
    rate = f", {byte_rate(nbytes / seconds)}" if nbytes and seconds > 0 else ""
    return f"{size(nbytes)} in {elapsed(seconds)}{rate}"


def _whole_lines(summary: DeltaSummary) -> Iterator[str]:
    """What the delta holds of other files than weights, where that is much."""
    stored = summary.stored_whole
    if (total := sum(file.stored_bytes for file in stored)) < _MUCH:
        return
    kinds: dict[str, list[StoredFile]] = {}
    for file in stored:
        kinds.setdefault(file.kind, []).append(file)
    shown = (
        f"{kind} {size(sum(file.stored_bytes for file in files))} ({files[0].path}"
        + (f" and {len(files) - 1} more)" if files[1:] else ")")
        for kind, files in kinds.items()
    )
    yield plain(f"Stored whole: {size(total)} in {counted(len(stored), 'file')}: {', '.join(shown)}")


def push_lines(report: PushReport, seconds: float) -> Iterator[str]:
    """What ``push`` did, and how fast."""
    yield from _conflict_lines(report.conflicts)
    removed = f", {len(report.removed)} removed" if report.removed else ""
    who = "private" if report.private else "public"
    done = counted(len(report.uploaded), "file") if report.uploaded else "all was there"
    sent = speed(report.nbytes, seconds)
    yield plain(f"{report.url}: commit {report.commit[:12]}, {who}, {done}{removed}; {sent}")


def apply_lines(place: object, report: ApplyReport, seconds: float) -> Iterator[str]:
    """What ``apply`` did, and how fast."""
    kept = f", {_were(len(report.kept))} already there" if report.kept else ""
    done = f"{counted(len(report.rebuilt), 'file')} rebuilt and checked{kept}"
    yield plain(f"{_shown(place)}: {done}; {speed(report.nbytes, seconds)}")


def serve_lines(place: object, report: ServeReport) -> Iterator[str]:
    """What ``serve-folder`` wrote, and from where the weights will come."""
    yield plain(f"{place}: {counted(len(report.files), 'file')} written and checked, {size(report.nbytes)}")
    yield plain(f"weights come from {', '.join(report.deltas)} and {report.base or 'the base it names'}")


def _were(count: int) -> str:
    return f"{count} was" if count == 1 else f"{count} were"


def verify_lines(report: VerifyReport, nbytes: int, seconds: float, *, quiet: bool) -> Iterator[str]:
    """Every problem that ``verify`` found, and, unless ``quiet``, its verdict, and how fast it was found."""
    for problem in report.problems:
        yield plain(f"{problem.place}: {problem.path}: {problem.kind}: {problem.detail}")
    if quiet:
        return
    verdict = counted(len(report.problems), "problem") if report.problems else "all as published"
    if report.published:
        verdict += f" ({report.published} of them by the SHA-256 that the Hub publishes, not read)"
    if report.target_repo:
        verdict += f"; compared with {plain(report.target_repo)} too"
    yield from (plain(f"Signed by {one}") for one in dict.fromkeys(report.signed_by))
    rebuilt = ", who had rebuilt the target" if report.attested_rebuilt else ""
    yield from (plain(f"Attested by {one}{rebuilt}") for one in dict.fromkeys(report.attested_by))
    yield f"{counted(report.checked, 'file')} checked: {verdict}; {speed(nbytes, seconds)}"


def _conflict_lines(conflicts: Sequence[str]) -> Iterator[str]:
    return (plain(f"License: {conflict}") for conflict in conflicts)


# inspect -------------------------------------------------------------------------------------------------


def summary_lines(
    summary: DeltaSummary, screen: Screen, *, every_tensor: bool, every_file: bool = False
) -> Iterator[str]:
    """All that ``inspect`` shows: facts, then a table of tensors, the largest payloads by module or every
    tensor; and one of files, if it was asked for, or where much is stored whole."""
    yield from (f"{name:14}  {fact}" for name, fact in _facts(summary))
    yield ""
    if every_tensor:
        headings: tuple[str, ...] = ("tensor", "dtype", "shape", "status", "changed", "payload")
        rows = [_tensor_row(tensor) for tensor in summary.tensors]
    else:
        yield "largest payloads"
        headings = ("tensor", "", "dtype", "shape", "changed", "payload")
        groups = sorted(_by_module(summary.tensors), key=lambda group: -_payload_of(group))
        rows = [_group_row(group) for group in groups[:10] if _payload_of(group)]
    right, names = ("", "changed", "payload"), ("tensor", "status", "shape", "dtype")
    yield from table(headings, rows, screen, right=right, names=names, whole=every_tensor)
    if every_file or sum(file.stored_bytes for file in summary.stored_whole) >= _MUCH:
        yield ""
        yield from _file_lines(summary, screen, every_file=every_file)


def _by_module(tensors: Iterable[TensorSummary]) -> list[list[TensorSummary]]:
    """The tensors in groups that differ in nothing but numbers in their names: layers, experts."""
    groups: dict[tuple[object, ...], list[TensorSummary]] = {}
    for tensor in tensors:
        key = folded(tensor.name), tensor.dtype, tensor.shape, tensor.status
        groups.setdefault(key, []).append(tensor)
    return list(groups.values())


def folded(name: str) -> str:
    """A tensor's name with ``*`` for every part that is a number."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def _payload_of(tensors: Iterable[TensorSummary]) -> int:
    return sum(tensor.payload_bytes for tensor in tensors)


def _group_row(group: Sequence[TensorSummary]) -> tuple[str, ...]:
    """Tensors of one kind as a row: what part of their elements changed, and their status, unless that is
    ``changed``."""
    first, *more = group
    fractions = [tensor.changed_fraction for tensor in group if tensor.changed_fraction is not None]
    changed = f"{sum(fractions) / len(fractions):.1%}" if fractions else ""
    return (
        plain(folded(first.name) if more else first.name),
        f"x{len(group)}" if more else "",
        plain(first.dtype),
        _shape(first),
        changed if first.status == "changed" else f"{first.status} {changed}".strip(),
        size(_payload_of(group)),
    )


def _file_lines(summary: DeltaSummary, screen: Screen, *, every_file: bool) -> Iterator[str]:
    stored = {file.path: file for file in summary.stored_whole}
    every = {file.path: file for file in summary.target.files}
    yield "files" if every_file else "largest files that are stored whole"
    rows = [
        (
            plain(path),
            every[path].stored,
            size(every[path].size),
            size(stored[path].stored_bytes) if path in stored else "",
        )
        for path in (every if every_file else [*stored][:10])
    ]
    headings = ("file", "stored", "size", "in the delta")
    yield from table(headings, rows, screen, right=headings[2:], names=("file",), whole=every_file)


def _facts(summary: DeltaSummary) -> Iterator[tuple[str, str]]:
    for side, record in (("base", summary.base), ("target", summary.target)):
        yield side, f"{plain(display_name(record, '(a local folder)'))}, {counted(len(record.files), 'file')}"
    for side, license in (("base", summary.license.base), ("target", summary.license.target)):
        yield f"{side} license", _license_line(license)
    yield "delta", _size_line(summary)
    yield "tensors", ", ".join(f"{count} {status}" for status, count in summary.counts.items())
    if adapter := summary.adapter:
        parts = f"{size(adapter.factor_bytes)} of factors, {size(adapter.residual_bytes)} besides"
        yield "merged adapter", plain(f"{adapter}, in {counted(adapter.tensors, 'tensor')}: {parts}")


def _adapter_lines(summary: DeltaSummary) -> Iterator[str]:
    """What somebody who merged an adapter may want to know."""
    if adapter := summary.adapter:
        yield plain(
            f"Looks like a merged adapter: {adapter}. The adapter itself would take about "
            f"{size(adapter.adapter_bytes)}; if you have it, you may want to publish that."
        )


def _status_of(tensor: TensorSummary) -> str:
    if tensor.like:
        return f"{tensor.status} of {plain(tensor.like.name)}"
    rank = tensor.prediction.rank if tensor.prediction else None
    kind = f"rank {rank}" if rank else tensor.prediction.method if tensor.prediction else ""
    of = f" of {plain(tensor.base.name)}" if tensor.base and tensor.status == "rearranged" else ""
    return ", ".join(filter(None, (f"{tensor.status}{of}", kind)))


def _tensor_row(tensor: TensorSummary) -> tuple[str, ...]:
    changed = tensor.changed_fraction
    return (
        plain(tensor.name),
        plain(tensor.dtype),
        _shape(tensor),
        _status_of(tensor),
        "" if changed is None else f"{changed:.1%}",
        size(tensor.payload_bytes),
    )


def _shape(tensor: TensorSummary) -> str:
    return " x ".join(map(str, tensor.shape)) or "scalar"


def _size_line(summary: DeltaSummary) -> str:
    delta, target = size(summary.size.delta_bytes), size(summary.size.target_bytes)
    return f"{delta}, {summary.size.ratio:.2%} of the target's {target}"


# report --------------------------------------------------------------------------------------------------


def report_lines(sentences: Iterable[str], written: Mapping[str, int]) -> Iterator[str]:
    """What a fine-tune changed, in words; and the files that were written, with their bytes."""
    yield from (plain(f"- {text}") for text in sentences)
    yield from (plain(f"{place}: {size(nbytes)} written") for place, nbytes in written.items())


# diff --dry-run ------------------------------------------------------------------------------------------

#: Most kinds of tensors in the table of an estimate.
_MAX_KINDS = 20


def estimate_lines(found: DeltaEstimate, seconds: float, screen: Screen) -> Iterator[str]:
    """A table of the kinds of tensors that take most, the counts, and the estimate itself."""
    headings = ("tensor", "", "compared with", "changed", "size", "estimate")
    rows = [_estimate_row(one) for one in found.tensors[:_MAX_KINDS]]
    yield from table(
        headings, rows, screen, right=("", *headings[3:]), names=("tensor", "compared with", "changed")
    )
    if more := found.tensors[_MAX_KINDS:]:
        nbytes = sum(one.delta_bytes for one in more)
        yield f" and {counted(sum(one.count for one in more), 'more tensor')}: {size(nbytes)}"
    yield f"tensors: {', '.join(f'{count} {status}' for status, count in found.counts.items()) or 'none'}"
    yield f"other files, manifest and headers: {size(found.other_bytes)}"
    spread = "" if found.low == found.high else f" ({size(found.low)} to {size(found.high)})"
    yield (
        f"estimate: {size(found.delta_bytes)}{spread}, {found.ratio:.2%} of the target's "
        f"{size(found.target_bytes)}; {size(found.sampled_bytes)} coded in {elapsed(seconds)}"
    )


def _estimate_row(one: EstimatedTensors) -> tuple[str, ...]:
    changed = "" if one.changed_fraction is None else f"{one.changed_fraction:.1%}"
    others = ", ".join(one.compared_with)
    return (
        plain(one.name),
        f"x{one.count}" if one.count > 1 else "",
        plain(others) if others and others != folded(one.name) else "",
        changed if one.status == "changed" else f"{one.status} {changed}".strip(),
        size(one.nbytes),
        size(one.delta_bytes),
    )


# plan ----------------------------------------------------------------------------------------------------


def plan_lines(plan: Plan) -> Iterator[str]:
    """One fact in each line, however long."""
    is_right = plan.mismatch is None
    facts = {"delta": _side_line(plan.delta) if is_right else plan.delta.where}
    if plan.base:
        facts["base"] = _side_line(plan.base) if is_right else plan.base.where
        facts["base check"] = {
            "published": "the SHA-256 that the Hub publishes are those of the right base",
            "sampled": "a sample of its chunks is right",
            "headers": "names, dtypes and shapes are right; a sample of chunks will be compared first",
            None: "it is the wrong one",
        }[plan.base_check]
    if is_right:
        times = (f"{duration(one.seconds)} at {rate(one.bandwidth)}" for one in plan.transfers)
        facts["download"] = f"{size(plan.download)}: {', '.join(times)}" if plan.download else "nothing"
        facts |= {f"disk, {space.use}": _space_line(space) for space in plan.disk}
        facts["memory"] = f"about {size(plan.memory)}"
    facts["license"] = plan.license.expression or "not stated"
    facts["to accept"] = " ".join(f"--accept-license {id}" for id in plan.license.to_accept) or "nothing"
    return (f"{name:14}{plain(fact)}" for name, fact in facts.items())


def _space_line(space: Space) -> str:
    line = size(space.needed) + (f" in {space.folder}" if space.folder else "")
    free = "" if space.free is None else f", {size(space.free)} are free"
    return line + free + ("" if space.is_enough else ": TOO LITTLE")


def _side_line(side: PlannedReads) -> str:
    here = f"{size(side.download)} to download" if side.download else "nothing to download"
    return f"{side.where}, {size(side.needed)} needed, {here}"


# Licenses ------------------------------------------------------------------------------------------------


def license_panel(report: LicenseReport) -> Iterator[str]:
    """The base, its license, and what base and target ask, unless that is an open license."""
    name = display_name(report.base, "a local folder")
    yield plain(f"Base: {name}, license: {_license_line(report.base)}")
    if report.expression:
        yield plain(f"Together with the target's: {report.expression}")
    for side, license in (("base", report.base), ("target", report.target)):
        if not all(one.open for one in license.licenses):
            yield f"The {side}'s license asks (listed, not legal advice):"
            yield from (plain(f"- {text}") for text in license.obligations)


def license_lines(report: LicenseReport) -> Iterator[str]:
    """All that ``license`` shows."""
    sides = (("base", report.base), ("target", report.target))
    for side, license in sides:
        name = display_name(license, "a local folder")
        yield f"{side}: {plain(name)}, license: {_license_line(license)}"
        for one in license.licenses:
            source = ", ".join(filter(None, (one.source, one.dated)))
            yield plain(f"  {one.id}: {one.name}{f' ({source})' if source else ''}")
    yield f"together: {plain(report.expression or 'not stated')}"
    yield f"to accept: {plain(' '.join(report.to_accept)) or 'nothing'}"
    for side, license in sides:
        yield from _list(f"What the {side}'s license asks (listed, not legal advice)", license.obligations)
    yield from _list("What does not fit together", report.conflicts)
    texts = report.texts or ()
    yield from _list("Texts", [f"{text.path}, {text.size} bytes, {text.sha256}" for text in texts])
    for text in texts:
        if text.text is not None:
            yield from ("", f"--- {plain(text.path)}")
            yield from map(plain, text.text.expandtabs().splitlines())


def _list(heading: str, items: Sequence[str]) -> Iterator[str]:
    if items:
        yield from ("", heading)
        yield from (plain(f"- {item}") for item in items)


def _license_line(license: SideLicense) -> str:
    known = [license.name or license.id or license.expression or "not stated", license.link]
    return plain(", ".join(filter(None, known)))
