"""The command line: the only place that prints, prompts or exits.

Exit codes: 0 done, 1 it failed or differs, 2 wrong usage, 3 a license was not accepted, 130 interrupted.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._version import __version__
from ..errors import DeltaWeightsError, LicenseNotAcceptedError, OutputError

if TYPE_CHECKING:
    from ..manifest import Manifest
    from ..plan import Plan, PlannedReads, Space
    from ..storage import Source
    from ..workers import ProgressCallback

app = typer.Typer(
    name="deltaweights",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Publish a fine-tune as what it adds to its base, and get it back byte for byte.",
    epilog="BASE and TARGET: a folder, one .safetensors file, or a Hub id \\[hf://]org/name\\[@revision]. "
    "DELTA: a folder or a Hub id. What is on the Hub streams through memory, unless it is in the Hub cache.",
)

Base = Annotated[str, typer.Argument(metavar="BASE", help="The checkpoint it was fine-tuned from.")]
Delta = Annotated[str, typer.Argument(metavar="DELTA", help="The delta.")]
Deltas = Annotated[
    list[str],
    typer.Argument(
        metavar="DELTA...", help="The delta; or several, each made from the target of the one before."
    ),
]
BaseOption = Annotated[
    str | None,
    typer.Option("--base", metavar="BASE", help="Base checkpoint; overrides the one that the delta names."),
]
KeepBase = Annotated[
    bool,
    typer.Option("--keep-base", help="Download a base on the Hub into the Hub cache, and leave it there."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no summary.")]
Force = Annotated[bool, typer.Option("--force", help="Write there even if it holds other files.")]
AcceptLicense = Annotated[
    list[str] | None,
    typer.Option(
        metavar="ID",
        envvar="DELTAWEIGHTS_ACCEPT_LICENSE",
        help="Accept this license, instead of being asked. May be given several times.",
    ),
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="How many threads; all cores, at most 8, by default.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"deltaweights {__version__}")
        raise typer.Exit


@app.command()
def diff(
    base: Base,
    target: Annotated[str, typer.Argument(metavar="TARGET", help="The fine-tune.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DELTA", help="The folder to write.")],
    rename: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REGEX=REPLACEMENT",
            help="Turn target tensor names into base tensor names. May be given several times.",
        ),
    ] = None,
    base_repo: Annotated[str | None, typer.Option(help="The base's Hub id.")] = None,
    base_revision: Annotated[str | None, typer.Option(help="The base's commit on the Hub.")] = None,
    base_license: Annotated[str | None, typer.Option(help="The base's license id.")] = None,
    target_repo: Annotated[str | None, typer.Option(help="The target's Hub id.")] = None,
    target_license: Annotated[str | None, typer.Option(help="The target's license id.")] = None,
    force: Force = False,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write what TARGET adds to BASE."""
    rules = []
    for rule in rename or ():
        pattern, equals, replacement = rule.rpartition("=")  # lookaheads have one too
        if not equals:
            raise typer.BadParameter(f"{rule!r} has no '='.", param_hint="--rename")
        rules.append((pattern, replacement))
    with _errors_explained(debug, as_json, resumes=True), _progress(quiet) as progress:
        from ..diff import make_delta

        manifest = make_delta(
            base,
            target,
            output,
            rename=rules,
            base_repo=base_repo,
            base_revision=base_revision,
            base_license=base_license,
            target_repo=target_repo,
            target_license=target_license,
            force=force,
            threads=threads,
            progress=progress,
        )
    _show_written(output, manifest, as_json=as_json, quiet=quiet)


def _show_written(output: Path, manifest: Manifest, *, as_json: bool, quiet: bool) -> None:
    """What there is to know of a delta that was just written."""
    from ..inspect import summarise

    summary = summarise(manifest)
    if as_json:
        _print_json(summary)
    elif not quiet:
        size = summary["size"]
        counts = ", ".join(f"{count} {status}" for status, count in summary["counts"].items())
        typer.echo(
            f"{output}: {_bytes(size['delta_bytes'])}, {size['ratio']:.2%} of the target's "
            f"{_bytes(size['target_bytes'])}; tensors: {counts or 'none'}"
        )
        if manifest.target.left_out:
            typer.echo(_plain(f"Left out: {', '.join(manifest.target.left_out)}"))
        for conflict in summary["license"]["conflicts"]:
            typer.echo(_plain(f"License: {conflict}"))


@app.command()
def push(
    delta: Annotated[str, typer.Argument(metavar="DELTA", help="The delta, a folder.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="The repository on the Hub, org/name.")],
    public: Annotated[bool, typer.Option("--public", help="Make the repository public.")] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="The branch; the main one by default.")
    ] = None,
    message: Annotated[str | None, typer.Option(metavar="TEXT", help="The commit's message.")] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request to the main branch.")
    ] = False,
    accept_conflicts: Annotated[
        bool, typer.Option("--accept-conflicts", help="Publish though the licenses do not fit together.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Check DELTA and publish it on the Hub, in one commit. Run it again to go on after an interruption."""
    if create_pr and revision:
        raise typer.BadParameter("A pull request goes to the main branch.", param_hint="--revision")
    with _errors_explained(debug, as_json, resumes=True), _progress(quiet) as progress:
        from ..push import push_delta

        report = push_delta(
            delta,
            repo,
            private=not public,
            revision=revision,
            message=message,
            create_pr=create_pr,
            accept_conflicts=accept_conflicts,
            progress=progress,
        )
    if as_json:
        _print_json(asdict(report))
    elif not quiet:
        sent = f"{len(report.uploaded)} files, {_bytes(report.nbytes)}"
        done = sent if report.uploaded else "all was there"
        removed = f", {len(report.removed)} removed" if report.removed else ""
        who = "private" if report.private else "public"
        typer.echo(_plain(f"{report.url}: {done}{removed}, commit {report.commit[:12]}, {who}"))
        for conflict in report.conflicts:
            typer.echo(_plain(f"License: {conflict}"))


@app.command()
def apply(
    deltas: Deltas,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="The folder to write.")],
    base: BaseOption = None,
    keep_base: KeepBase = False,
    accept_license: AcceptLicense = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, as `plan` does, and do nothing.")
    ] = False,
    force: Force = False,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Rebuild the target from DELTA and its base. Run it again to go on after an interruption."""
    if dry_run:
        if len(deltas) > 1:
            raise typer.BadParameter("It takes one delta.", param_hint="--dry-run")
        plan(deltas[0], base, keep_base, output, None, threads, as_json, quiet, debug)
        return
    with _errors_explained(debug, as_json, resumes=True), ExitStack() as opened:
        from ..patch import apply_delta
        from ..storage import open_source

        # Opened once: the delta whose license was accepted is the one that is applied.
        sources = [opened.enter_context(open_source(delta)) for delta in deltas]
        _settle_license(deltas, sources, accept_license or [], quiet=quiet, may_ask=not (quiet or as_json))
        progress = opened.enter_context(_progress(quiet))
        report = apply_delta(
            sources, output, base=base, keep_base=keep_base, force=force, threads=threads, progress=progress
        )
    if as_json:
        _print_json(asdict(report))
    elif not quiet:
        kept = f", {len(report.kept)} were already there" if report.kept else ""
        typer.echo(
            f"{output}: {len(report.rebuilt)} files rebuilt and checked, {_bytes(report.nbytes)}{kept}"
        )


@app.command()
def compact(
    deltas: Deltas,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DELTA", help="The folder to write.")],
    base: BaseOption = None,
    force: Force = False,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write one delta that does what several do one after the other."""
    with _errors_explained(debug, as_json, resumes=True), _progress(quiet) as progress:
        from ..compact import compact_deltas

        manifest = compact_deltas(deltas, output, base=base, force=force, threads=threads, progress=progress)
    _show_written(output, manifest, as_json=as_json, quiet=quiet)


@app.command()
def plan(
    delta: Delta,
    base: BaseOption = None,
    keep_base: KeepBase = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="OUT", help="Count what stands there already as done."),
    ] = None,
    bandwidth: Annotated[
        list[str] | None,
        typer.Option(
            metavar="BITS",
            help="Say how long the download takes at so many bits a second, such as 100M or 2.5G. "
            "May be given several times.",
        ),
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Say what `apply` would download and need, and whether the base is right. Downloads no weights."""
    rates = [_bits(text) for text in bandwidth or ("100M", "1G", "10G")]
    with _errors_explained(debug, as_json):
        from ..plan import plan_apply

        found = plan_apply(
            delta, base=base, keep_base=keep_base, out=output, bandwidth=rates, threads=threads
        )
    if as_json:
        _print_json({"ok": found.mismatch is None, "download": found.download, **asdict(found)})
    elif not quiet:
        _show_plan(found)
    if found.mismatch is not None:
        typer.echo("\n".join(map(_plain, f"error: {found.mismatch}".splitlines())), err=True)
        raise typer.Exit(1)


@app.command()
def verify(
    deltas: Deltas,
    base: BaseOption = None,
    keep_base: KeepBase = False,
    target: Annotated[
        str | None, typer.Option(metavar="TARGET", help="Compare this checkpoint with the manifest.")
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Check DELTA's own files; with --base rebuild the target in memory; with --target check a copy."""
    with _errors_explained(debug, as_json), _progress(quiet) as progress:
        from ..verify import verify_delta

        report = verify_delta(
            deltas, base=base, keep_base=keep_base, target=target, threads=threads, progress=progress
        )
    if as_json:
        _print_json({"ok": report.ok, **asdict(report)})
    else:
        for problem in report.problems:
            typer.echo(_plain(f"{problem.place}: {problem.path}: {problem.kind}: {problem.detail}"))
        if not quiet:
            verdict = f"{len(report.problems)} problems" if report.problems else "all as published"
            if report.published:
                verdict += f" ({report.published} of them by the SHA-256 that the Hub publishes, not read)"
            if report.target_repo:
                verdict += f"; compared with {_plain(report.target_repo)} too"
            typer.echo(f"{report.checked} files checked: {verdict}")
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def inspect(
    delta: Delta,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show what DELTA says of itself: base, target, license, sizes, tensors."""
    with _errors_explained(debug, as_json):
        from ..inspect import inspect_delta

        summary = inspect_delta(delta)
    if as_json:
        _print_json(summary)
    elif not quiet:
        _show_summary(summary, every_tensor=tensors)


class BomFormat(str, Enum):
    """The formats of ``bom``."""

    cyclonedx = "cyclonedx"
    spdx = "spdx"


@app.command()
def bom(
    delta: Delta,
    format: Annotated[
        BomFormat, typer.Option("--format", help="CycloneDX 1.7 or SPDX 3.0.1, as JSON.")
    ] = BomFormat.cyclonedx,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="The file to write; stdout by default."),
    ] = None,
    created: Annotated[
        int,
        typer.Option(
            metavar="SECONDS",
            envvar="SOURCE_DATE_EPOCH",
            min=0,
            max=253402300799,  # the end of the year 9999
            help="The time that the document gives for itself, in seconds since 1970.",
        ),
    ] = 0,
    debug: Debug = False,
) -> None:
    """Write a bill of materials for DELTA: target, base, files, licenses. Needs the extra `bom`."""
    with _errors_explained(debug, as_json=False):
        from ..bom import make_bom

        time = datetime.fromtimestamp(created, timezone.utc)
        document = make_bom(delta, format.value, created=time)
        if output is None:
            typer.echo(document, nl=False)
            return
        try:
            output.write_bytes(document)
        except OSError as error:
            raise OutputError(f"Cannot write {output}", f"{error.strerror}.") from error


@app.command("license")
def show_license(
    delta: Delta,
    texts: Annotated[bool, typer.Option("--texts", help="Also show the license texts and notices.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show the licenses of base and target, what they ask, and what does not fit together."""
    with _errors_explained(debug, as_json):
        from ..inspect import inspect_license

        facts = inspect_license(delta, texts=texts)
    if as_json:
        _print_json(facts)
    else:
        _show_license_facts(facts)


def _show_summary(summary: dict[str, Any], *, every_tensor: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from ..inspect import display_name

    size = summary["size"]
    facts = Table.grid(padding=(0, 2))
    for side in ("base", "target"):
        record = summary[side]
        name = display_name(record, "(a local folder)")
        facts.add_row(side, f"{_plain(name)}, {len(record['files'])} files")
    for side in ("base", "target"):
        facts.add_row(f"{side} license", _license_line(summary["license"][side]))
    ratio = f"{size['ratio']:.2%} of the target's {_bytes(size['target_bytes'])}"
    facts.add_row("delta", f"{_bytes(size['delta_bytes'])}, {ratio}")
    facts.add_row("tensors", ", ".join(f"{n} {status}" for status, n in summary["counts"].items()))
    rows = summary["tensors"]
    if not every_tensor:
        rows = sorted(rows, key=lambda row: -row["payload_bytes"])[:10]
    table = Table(title=None if every_tensor else "largest payloads", title_justify="left", box=None)
    for heading in ("tensor", "dtype", "shape", "status", "changed", "payload"):
        table.add_column(heading, justify="right" if heading in ("changed", "payload") else "left")
    for row in rows:
        changed = row["changed_fraction"]
        table.add_row(
            _plain(row["name"]),
            _plain(row["dtype"]),
            " x ".join(map(str, row["shape"])) or "scalar",
            f"{row['status']} of {_plain(row['like']['name'])}" if "like" in row else row["status"],
            "" if changed is None else f"{changed:.1%}",
            _bytes(row["payload_bytes"]),
        )
    # In a pipe or a log, long names are worth more than 80 columns.
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 160)
    console.print(facts)
    console.print()
    console.print(table)


def _show_plan(plan: Plan) -> None:
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
        times = (f"{_duration(one.seconds)} at {_rate(one.bandwidth)}" for one in plan.transfers)
        facts["download"] = f"{_bytes(plan.download)}: {', '.join(times)}" if plan.download else "nothing"
        facts |= {f"disk, {space.use}": _space_line(space) for space in plan.disk}
        facts["memory"] = f"about {_bytes(plan.memory)}"
    facts["license"] = plan.license["expression"] or "not stated"
    facts["to accept"] = " ".join(f"--accept-license {id}" for id in plan.license["to_accept"]) or "nothing"
    for name, fact in facts.items():
        typer.echo(f"{name:14}{_plain(fact)}")


def _space_line(space: Space) -> str:
    line = _bytes(space.needed) + (f" in {space.folder}" if space.folder else "")
    free = "" if space.free is None else f", {_bytes(space.free)} are free"
    return line + free + ("" if space.is_enough else ": TOO LITTLE")


def _side_line(side: PlannedReads) -> str:
    here = f"{_bytes(side.download)} to download" if side.download else "nothing to download"
    return f"{side.where}, {_bytes(side.needed)} needed, {here}"


def _bits(text: str) -> float:
    """Bits a second, as in ``100M``."""
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,12})?)([kKMGT]?)", text, re.ASCII)
    rate = float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ") if match else 0
    if not rate:
        raise typer.BadParameter(f"{text!r} is not a number of bits, such as 100M.", param_hint="--bandwidth")
    return rate


def _rate(bits: float) -> str:
    return _scaled(bits, ("bit/s", "kbit/s", "Mbit/s", "Gbit/s", "Tbit/s"))


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 1 else "less than 1 s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def _settle_license(
    deltas: list[str], sources: list[Source], accepted: list[str], *, quiet: bool, may_ask: bool
) -> None:
    """Show bases and licenses. Where somebody has to accept one and nobody has, ask, or raise."""
    from ..delta.opening import read_manifest
    from ..license.rules import describe, not_accepted, unaccepted

    manifests = [read_manifest(source) for source in sources]
    if not quiet:
        panels = ("\n".join(_license_panel(describe(manifest))) for manifest in manifests)
        for panel in dict.fromkeys(panels):  # the licenses of a chain are mostly the same ones
            typer.echo(panel, err=True)
    asked = {delta: unaccepted(manifest, accepted) for delta, manifest in zip(deltas, manifests, strict=True)}
    missing = list({terms.spdx: terms for every in asked.values() for terms in every}.values())
    if not missing:
        return
    if not (may_ask and _confirmed(", ".join(f"{terms.name} ({terms.spdx})" for terms in missing))):
        raise not_accepted(missing, next(delta for delta in deltas if asked[delta]))


def _confirmed(names: str) -> bool:
    """Ask, if there is somebody to ask. Ctrl-C and Ctrl-D are a no."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    try:
        return typer.confirm(_plain(f"Do you accept {names}?"), err=True)
    except typer.Abort:
        return False


def _license_panel(facts: dict[str, Any]) -> list[str]:
    """The base, its license, and what base and target ask, unless that is an open license."""
    from ..inspect import display_name

    name = display_name(facts["base"], "a local folder")
    lines = [f"Base: {name}, license: {_license_line(facts['base'])}"]
    if facts["expression"]:
        lines.append(f"Together with the target's: {facts['expression']}")
    for side in ("base", "target"):
        if not all(one["open"] for one in facts[side]["licenses"]):
            lines += [f"The {side}'s license asks (listed, not legal advice):"]
            lines += [f"- {text}" for text in facts[side]["obligations"]]
    return [_plain(line) for line in lines]


def _show_license_facts(facts: dict[str, Any]) -> None:
    from ..inspect import display_name

    for side in ("base", "target"):
        license = facts[side]
        typer.echo(f"{side}: {display_name(license, 'a local folder')}, license: {_license_line(license)}")
        for one in license["licenses"]:
            source = ", ".join(filter(None, (one["source"], one["dated"])))
            typer.echo(_plain(f"  {one['id']}: {one['name']}{f' ({source})' if source else ''}"))
    typer.echo(f"together: {_plain(facts['expression'] or 'not stated')}")
    typer.echo(f"to accept: {_plain(' '.join(facts['to_accept'])) or 'nothing'}")
    for side in ("base", "target"):
        _show_list(f"What the {side}'s license asks (listed, not legal advice)", facts[side]["obligations"])
    _show_list("What does not fit together", facts["conflicts"])
    _show_list("Texts", [f"{one['path']}, {one['size']} bytes, {one['sha256']}" for one in facts["texts"]])
    for text in facts["texts"]:
        if "text" in text:
            typer.echo(f"\n--- {_plain(text['path'])}")
            typer.echo("\n".join(map(_plain, text["text"].expandtabs().splitlines())))


def _show_list(heading: str, lines: list[str]) -> None:
    if lines:
        typer.echo("\n".join(["", heading, *(_plain(f"- {line}") for line in lines)]))


def _license_line(license: dict[str, Any]) -> str:
    known = [license["name"] or license["id"] or license["expression"] or "not stated", license["link"]]
    return _plain(", ".join(filter(None, known)))


def _bytes(count: int) -> str:
    return _scaled(count, ("bytes", "KB", "MB", "GB", "TB"))


def _scaled(size: float, units: Sequence[str]) -> str:
    """Three figures, in the unit (each a thousand of the one before) that suits them."""
    *smaller, largest = units
    for unit in smaller:
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == units[0] else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} {largest}"


def _plain(text: str) -> str:
    """Names come from files that anybody may have made: none may control the terminal."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)


def _print_json(value: dict[str, Any]) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False))


@contextmanager
def _errors_explained(debug: bool, as_json: bool, *, resumes: bool = False) -> Iterator[None]:
    hint = " Run the same command again to go on." if resumes else ""
    try:
        yield
    except DeltaWeightsError as error:
        if debug:
            raise
        typer.echo("\n".join(map(_plain, f"error: {error}".splitlines())), err=True)
        if as_json:
            _print_json({"error": {"what": error.what, "why": error.why, "fix": error.fix}})
        raise typer.Exit(3 if isinstance(error, LicenseNotAcceptedError) else 1) from error
    except KeyboardInterrupt:
        typer.echo(f"Interrupted.{hint}", err=True)
        raise typer.Exit(130) from None


@contextmanager
def _progress(quiet: bool) -> Iterator[ProgressCallback | None]:
    """A bar for each phase on a terminal, a line now and then in a log."""
    if quiet:
        log = logging.getLogger("deltaweights")
        before = log.level
        log.setLevel(logging.ERROR)  # it tells when the codec has to be compiled
        try:
            yield None
        finally:
            log.setLevel(before)
    elif not sys.stderr.isatty():
        yield _LogLines()
    else:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description:14}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
            tasks: dict[str, Any] = {}

            def show(phase: str, done: int, total: int) -> None:
                if phase not in tasks:
                    tasks[phase] = bars.add_task(phase, total=total)
                bars.update(tasks[phase], completed=done)

            yield show


class _LogLines:
    """Progress as lines: the start and the end of each phase, and every ten seconds in between."""

    def __init__(self) -> None:
        self._shown = 0.0
        self._phase = ""

    def __call__(self, phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        if phase != self._phase or now - self._shown > 10 or done >= total > 0:
            self._phase, self._shown = phase, now
            typer.echo(f"{phase}: {done / max(1, total):.0%}", err=True)


def main() -> None:
    """The console script's entry point."""
    # NumPy's linear algebra is never used here; its threads would cost start-up time.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Imports make tens of thousands of objects that stay: looking through them for cycles takes a tenth of
    # start-up.
    gc.set_threshold(100_000)
    try:
        app()
    except KeyboardInterrupt:  # before or after the work itself
        sys.exit(130)
