"""The commands: each calls one verb, and reports what it found or did."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, replace
from datetime import datetime, timezone
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from .._version import __version__
from . import rendering
from .batches import batch
from .layout import screen_of
from .lineage import compare
from .machines import machines
from .options import (
    MATCHING,
    RECORDS,
    AcceptLicense,
    Base,
    BaseOption,
    BomFormat,
    Debug,
    Delta,
    DeltaOut,
    Deltas,
    EffortLevel,
    EffortOption,
    Force,
    Json,
    KeepBase,
    Quiet,
    Ray,
    Threads,
    Verbose,
    bits,
    rename_rules,
)
from .session import Work, in_flags, settle_license, working
from .signatures import (
    SIGNED,
    Identity,
    IdentityProvider,
    PublicKey,
    RequireSignature,
    RootCertificate,
    Staging,
    TrustConfig,
    attest,
    requirement_of,
    sign,
)
from .streams import leave_stderr, open_streams, show_error, stdout_failed
from .usage import Commands, UsageError
from .weight_streams import stream

if TYPE_CHECKING:
    from ..manifest import Manifest
    from ..match.names import RenameRule
    from ..signing.trust import SignatureRequirement

app = typer.Typer(
    name="deltaweights",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
    help="""Publish a fine-tune as what it adds to its base, and get it back byte for byte.

    deltaweights diff BASE TUNED -o delta            what the fine-tune adds
    deltaweights inspect delta                       how much that is, and where
    deltaweights push delta your-name/model-delta    to the Hub, privately

    deltaweights plan your-name/model-delta          what the next line will take
    deltaweights apply your-name/model-delta -o out  the fine-tune, from its base
    deltaweights verify your-name/model-delta --target out
    """,
    epilog="BASE and TARGET: a folder, one .safetensors file, or a Hub id \\[hf://]org/name\\[@revision]. "
    "DELTA: a folder or a Hub id. Each may be a URL, such as s3://bucket/folder. "
    "What is far away streams through memory, unless it is in the Hub cache."
    "\n\n`deltaweights COMMAND --help` has examples.",
)

#: The panels of the commands in the help.
_PUBLISH, _USE, _LOOK, _STREAM = "To publish", "To use", "To look into a delta", "To stream"
_MANY, _COME = "To do many", "To see where a model comes from"

app.add_typer(stream, rich_help_panel=_STREAM)
app.command("batch", rich_help_panel=_MANY)(batch)
app.command("compare", rich_help_panel=_COME)(compare)
app.command("sign", rich_help_panel=_PUBLISH)(sign)
app.command("attest", rich_help_panel=_PUBLISH)(attest)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"deltaweights {__version__}")
        raise typer.Exit


@app.command(rich_help_panel=_PUBLISH)
def diff(
    base: Base,
    target: Annotated[str, typer.Argument(metavar="TARGET", help="The fine-tune.")],
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", metavar="DELTA", help="The folder or URL to write; required, but for --dry-run."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Estimate from a sample what would be written; write nothing.")
    ] = False,
    rename: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REGEX=REPLACEMENT",
            help="Turn target tensor names into base tensor names. May be given several times.",
            rich_help_panel=MATCHING,
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Leave out files of TARGET with such a path, name or folder. May be given several times.",
            rich_help_panel=MATCHING,
        ),
    ] = None,
    base_repo: Annotated[
        str | None, typer.Option(metavar="ID", help="The base's Hub id.", rich_help_panel=RECORDS)
    ] = None,
    base_revision: Annotated[
        str | None,
        typer.Option(metavar="COMMIT", help="The base's commit on the Hub.", rich_help_panel=RECORDS),
    ] = None,
    base_license: Annotated[
        str | None, typer.Option(metavar="ID", help="The base's license id.", rich_help_panel=RECORDS)
    ] = None,
    target_repo: Annotated[
        str | None, typer.Option(metavar="ID", help="The target's Hub id.", rich_help_panel=RECORDS)
    ] = None,
    target_license: Annotated[
        str | None, typer.Option(metavar="ID", help="The target's license id.", rich_help_panel=RECORDS)
    ] = None,
    effort: EffortOption = EffortLevel.default,
    force: Force = False,
    threads: Threads = None,
    ray: Ray = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
    debug: Debug = False,
) -> None:
    """Write what TARGET adds to BASE.

    Run it again to go on after an interruption.

    deltaweights diff ./base ./tuned -o delta
    deltaweights diff org/base ./tuned -o delta --exclude 'checkpoint-*'
    deltaweights diff ./base ./tuned --dry-run
    """
    rules = rename_rules(rename or ())
    if dry_run:
        at_work = working(as_json=as_json, quiet=quiet, verbose=verbose, debug=debug)
        _estimate(at_work, base, target, rules, exclude or (), threads)
        return
    if output is None:
        raise UsageError("Missing option '--output' (or --dry-run).")
    with working(as_json=as_json, quiet=quiet, verbose=verbose, debug=debug, resumes=True) as work:
        from ..diff import make_delta

        with machines(ray, threads) as executor, work.progress() as shown:
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
                exclude=exclude or (),
                effort=effort.value,
                force=force,
                threads=threads,
                executor=executor,
                progress=shown,
            )
    _report_written(work, output, manifest, shown.done("diff"))


def _estimate(
    at_work: AbstractContextManager[Work],
    base: str,
    target: str,
    rename: Sequence[RenameRule],
    exclude: Sequence[str],
    threads: int | None,
) -> None:
    """``diff --dry-run``."""
    with at_work as work:
        from ..estimate import estimate_delta

        found = estimate_delta(base, target, rename=rename, exclude=exclude, threads=threads)
    lines = rendering.estimate_lines(found, work.seconds, screen_of(sys.stdout))
    work.report(found.to_dict(), lines, with_costs=True)


def _report_written(work: Work, output: str, manifest: Manifest, nbytes: int) -> None:
    """What there is to know of a delta that was just written, from so many bytes of a target."""
    from ..inspect import summarize

    summary = summarize(manifest)
    last = rendering.speed_line("Compared", nbytes, work.seconds)
    work.report(summary.to_dict(), [*rendering.written_lines(output, summary), last], with_costs=True)


@app.command(rich_help_panel=_PUBLISH)
def push(
    delta: Annotated[str, typer.Argument(metavar="DELTA", help="The delta, a folder or a URL of a store.")],
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
    verbose: Verbose = 0,
    debug: Debug = False,
) -> None:
    """Check DELTA and publish it on the Hub, in one commit.

    Run it again to go on after an interruption.

    deltaweights push delta your-name/model-delta
    deltaweights push delta your-name/model-delta --public --message "Epoch 3"
    """
    if create_pr and revision:
        raise typer.BadParameter("A pull request goes to the main branch.", param_hint="--revision")
    with working(as_json=as_json, quiet=quiet, verbose=verbose, debug=debug, resumes=True) as work:
        from ..push import push_delta

        with work.progress() as shown:
            done = push_delta(
                delta,
                repo,
                private=not public,
                revision=revision,
                message=message,
                create_pr=create_pr,
                accept_conflicts=accept_conflicts,
                progress=shown,
            )
    work.report(asdict(done), rendering.push_lines(done, work.seconds), with_costs=True)


@app.command(rich_help_panel=_USE)
def apply(
    deltas: Deltas,
    output: Annotated[str, typer.Option("--output", "-o", metavar="OUT", help="The folder or URL to write.")],
    base: BaseOption = None,
    keep_base: KeepBase = False,
    accept_license: AcceptLicense = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, as `plan` does, and do nothing.")
    ] = False,
    force: Force = False,
    require_signature: RequireSignature = False,
    public_key: PublicKey = None,
    root_certificate: RootCertificate = None,
    identity: Identity = None,
    identity_provider: IdentityProvider = None,
    trust_config: TrustConfig = None,
    staging: Staging = False,
    threads: Threads = None,
    ray: Ray = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
    debug: Debug = False,
) -> None:
    """Rebuild the target from DELTA and its base.

    Run it again to go on after an interruption.

    deltaweights apply org/model-delta -o model
    deltaweights apply ./delta -o model --base ./base
    deltaweights apply org/model-delta -o model --require-signature --public-key maker.pem
    """
    required = partial(
        requirement_of, public_key, root_certificate, identity, identity_provider, trust_config, staging,
        is_required=require_signature,
    )  # fmt: skip
    if dry_run:
        if len(deltas) > 1:
            raise typer.BadParameter("It takes one delta.", param_hint="--dry-run")
        at_work = working(as_json=as_json, quiet=quiet, verbose=verbose, debug=debug)
        _plan(at_work, deltas[0], base, keep_base, output, None, threads, required)
        return
    with (
        working(as_json=as_json, quiet=quiet, verbose=verbose, debug=debug, resumes=True) as work,
        ExitStack() as opened,
    ):
        from ..delta.signed import check_signers
        from ..patch import apply_delta
        from ..storage import open_source

        signed_by = required()
        # Opened once: what is accepted is what is applied, though a branch on the Hub may move meanwhile.
        sources = [opened.enter_context(open_source(delta)) for delta in deltas]
        check_signers(sources, signed_by)
        may_ask = not (quiet or as_json)
        settle_license(deltas, sources, accept_license or [], quiet=quiet, may_ask=may_ask)
        executor = opened.enter_context(machines(ray, threads))
        shown = opened.enter_context(work.progress())
        done = apply_delta(
            sources,
            output,
            base=base,
            keep_base=keep_base,
            force=force,
            require_signature=signed_by,
            threads=threads,
            executor=executor,
            progress=shown,
        )
    work.report(asdict(done), rendering.apply_lines(output, done, work.seconds), with_costs=True)


@app.command(rich_help_panel=_USE)
def serve_folder(
    deltas: Deltas,
    output: Annotated[str, typer.Option("--output", "-o", metavar="OUT", help="The folder or URL to write.")],
    base: BaseOption = None,
    keep_base: KeepBase = False,
    accept_license: AcceptLicense = None,
    force: Force = False,
    require_signature: RequireSignature = False,
    public_key: PublicKey = None,
    root_certificate: RootCertificate = None,
    identity: Identity = None,
    identity_provider: IdentityProvider = None,
    trust_config: TrustConfig = None,
    staging: Staging = False,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
    debug: Debug = False,
) -> None:
    """Write a folder from which an engine serves the target, without its weights on disk.

    It has the target's config, tokenizer and the like, and names DELTA and base.

    deltaweights serve-folder org/model-delta -o model
    vllm serve model --load-format deltaweights
    """
    with (
        working(as_json=as_json, quiet=quiet, verbose=verbose, debug=debug, resumes=True) as work,
        ExitStack() as opened,
    ):
        from ..delta.signed import check_signers
        from ..engines import pointer
        from ..storage import open_source

        signed_by = requirement_of(
            public_key, root_certificate, identity, identity_provider, trust_config, staging,
            is_required=require_signature,
        )  # fmt: skip
        # Opened once, as for `apply`.
        sources = [opened.enter_context(open_source(delta)) for delta in deltas]
        check_signers(sources, signed_by)
        may_ask = not (quiet or as_json)
        settle_license(deltas, sources, accept_license or [], quiet=quiet, may_ask=may_ask)
        shown = opened.enter_context(work.progress())
        done = pointer.serve_folder(
            sources,
            output,
            base=base,
            keep_base=keep_base,
            force=force,
            require_signature=signed_by,
            threads=threads,
            progress=shown,
        )
    work.report(asdict(done), rendering.serve_lines(output, done), with_costs=True)


@app.command(rich_help_panel=_PUBLISH)
def compact(
    deltas: Deltas,
    output: DeltaOut,
    base: BaseOption = None,
    effort: EffortOption = EffortLevel.default,
    force: Force = False,
    require_signature: RequireSignature = False,
    public_key: PublicKey = None,
    root_certificate: RootCertificate = None,
    identity: Identity = None,
    identity_provider: IdentityProvider = None,
    trust_config: TrustConfig = None,
    staging: Staging = False,
    threads: Threads = None,
    ray: Ray = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
    debug: Debug = False,
) -> None:
    """Write one delta that does what several do one after the other.

    deltaweights compact delta-1 delta-2 delta-3 -o one --base ./base
    """
    with working(as_json=as_json, quiet=quiet, verbose=verbose, debug=debug, resumes=True) as work:
        from ..compact import compact_deltas

        signed_by = requirement_of(
            public_key, root_certificate, identity, identity_provider, trust_config, staging,
            is_required=require_signature,
        )  # fmt: skip
        with machines(ray, threads) as executor, work.progress() as shown:
            manifest = compact_deltas(
                deltas,
                output,
                base=base,
                effort=effort.value,
                force=force,
                require_signature=signed_by,
                threads=threads,
                executor=executor,
                progress=shown,
            )
    _report_written(work, output, manifest, shown.done("diff"))


@app.command(rich_help_panel=_USE)
def plan(
    delta: Delta,
    base: BaseOption = None,
    keep_base: KeepBase = False,
    output: Annotated[
        str | None,
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
    require_signature: RequireSignature = False,
    public_key: PublicKey = None,
    root_certificate: RootCertificate = None,
    identity: Identity = None,
    identity_provider: IdentityProvider = None,
    trust_config: TrustConfig = None,
    staging: Staging = False,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
    debug: Debug = False,
) -> None:
    """Say what `apply` would download and need, and whether the base is right. Downloads no weights.

    deltaweights plan org/model-delta
    deltaweights plan org/model-delta --base ./base -o model --bandwidth 250M
    """
    required = partial(
        requirement_of, public_key, root_certificate, identity, identity_provider, trust_config, staging,
        is_required=require_signature,
    )  # fmt: skip
    at_work = working(as_json=as_json, quiet=quiet, verbose=verbose, debug=debug)
    _plan(at_work, delta, base, keep_base, output, bandwidth, threads, required)


def _plan(
    at_work: AbstractContextManager[Work],
    delta: str,
    base: str | None,
    keep_base: bool,
    output: str | None,
    bandwidth: list[str] | None,
    threads: int | None,
    required: Callable[[], SignatureRequirement | None],
) -> None:
    """``plan`` and ``apply --dry-run``."""
    rates = [bits(text) for text in bandwidth or ("100M", "1G", "10G")]
    with at_work as work:
        from ..plan import plan_apply

        found = plan_apply(
            delta,
            base=base,
            keep_base=keep_base,
            out=output,
            bandwidth=rates,
            require_signature=required(),
            threads=threads,
        )
    if found.mismatch is not None:
        found = replace(found, mismatch=in_flags(found.mismatch))
    fields = {"ok": found.mismatch is None, "download": found.download, **found.to_dict()}
    work.report(fields, rendering.plan_lines(found))
    if found.mismatch is not None:
        show_error(found.mismatch)
        raise typer.Exit(1)


@app.command(rich_help_panel=_LOOK)
def verify(
    deltas: Deltas,
    base: BaseOption = None,
    keep_base: KeepBase = False,
    target: Annotated[
        str | None, typer.Option(metavar="TARGET", help="Compare this checkpoint with the manifest.")
    ] = None,
    signature: Annotated[
        bool,
        typer.Option("--signature", help="Check who signed it, and what.", rich_help_panel=SIGNED),
    ] = False,
    attestation: Annotated[
        bool,
        typer.Option(
            "--attestation",
            help="Check who attested it, and make the statement again.",
            rich_help_panel=SIGNED,
        ),
    ] = False,
    public_key: PublicKey = None,
    root_certificate: RootCertificate = None,
    identity: Identity = None,
    identity_provider: IdentityProvider = None,
    trust_config: TrustConfig = None,
    staging: Staging = False,
    threads: Threads = None,
    ray: Ray = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
    debug: Debug = False,
) -> None:
    """Check DELTA's own files; with --base rebuild the target in memory; with --target check a copy.

    deltaweights verify delta
    deltaweights verify delta --base ./base --target ./model
    deltaweights verify delta --signature --public-key maker.pem
    deltaweights verify delta --attestation --base ./base --public-key maker.pem
    """
    with working(as_json=as_json, quiet=quiet, verbose=verbose, debug=debug) as work:
        from ..verify import verify_delta

        trusted = requirement_of(
            public_key, root_certificate, identity, identity_provider, trust_config, staging,
            is_required=signature or attestation,
        )  # fmt: skip
        with machines(ray, threads) as executor, work.progress() as shown:
            found = verify_delta(
                deltas,
                base=base,
                keep_base=keep_base,
                target=target,
                require_signature=trusted if signature or not attestation else None,
                require_attestation=trusted if attestation else None,
                threads=threads,
                executor=executor,
                progress=shown,
            )
    lines = rendering.verify_lines(found, shown.done(), work.seconds, quiet=quiet)
    work.report({"ok": found.ok, **asdict(found)}, lines, with_costs=True, always=True)
    if not found.ok:
        raise typer.Exit(1)


@app.command(rich_help_panel=_LOOK)
def inspect(
    delta: Delta,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    files: Annotated[bool, typer.Option("--files", help="List every file of the target.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
    debug: Debug = False,
) -> None:
    """Show what DELTA says of itself: base, target, license, sizes, tensors.

    deltaweights inspect org/model-delta
    deltaweights inspect delta --json | jq .size
    """
    with working(as_json=as_json, quiet=quiet, verbose=verbose, debug=debug) as work:
        from ..inspect import inspect_delta

        summary = inspect_delta(delta)
    screen = screen_of(sys.stdout)
    lines = rendering.summary_lines(summary, screen, every_tensor=tensors, every_file=files)
    work.report(summary.to_dict(), lines)


@app.command(rich_help_panel=_LOOK)
def report(
    deltas: Annotated[
        list[str],
        typer.Argument(metavar="DELTA...", help="The delta; or several of one base, to be compared."),
    ],
    base: Annotated[
        str | None,
        typer.Option(
            "--base", metavar="BASE", help="Compare every weight with this base; else the manifest tells."
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="The page to write, a path or URL; report.html by default, or none with --json or --svg.",
        ),
    ] = None,
    svg: Annotated[
        str | None, typer.Option("--svg", metavar="FILE", help="Write the heat map as a picture.")
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
    debug: Debug = False,
) -> None:
    """Show what a fine-tune changed: a page with a heat map of layers and modules, figures and words.

    deltaweights report org/model-delta
    deltaweights report delta --base ./base -o report.html
    deltaweights report delta --json | jq .sentences
    deltaweights report delta-1 delta-2 --base ./base
    """
    page = output or (None if as_json or svg else "report.html")
    if svg and deltas[1:]:
        raise typer.BadParameter("It takes one delta.", param_hint="--svg")
    with working(as_json=as_json, quiet=quiet, verbose=verbose, debug=debug) as work:
        from ..report import ComparisonReport, DeltaReport, report_delta, report_side_by_side
        from ..storage import require_place, write_document

        for file in filter(None, (page, svg)):
            require_place(file)
        with work.progress() as shown:
            found: DeltaReport | ComparisonReport
            if deltas[1:]:
                found = report_side_by_side(deltas, base=base, threads=threads, progress=shown)
            else:
                found = report_delta(deltas[0], base=base, threads=threads, progress=shown)
        written = {}
        if page:
            written[page] = found.html()
        if svg and isinstance(found, DeltaReport):
            written[svg] = found.svg()
        for place, document in written.items():
            write_document(place, document)
    lines = rendering.report_lines(
        found.sentences, {place: len(document) for place, document in written.items()}
    )
    work.report(found.to_dict(), lines, with_costs=True)


@app.command(rich_help_panel=_LOOK)
def bom(
    delta: Delta,
    format: Annotated[
        BomFormat, typer.Option("--format", help="CycloneDX 1.7 or SPDX 3.0.1, as JSON.")
    ] = BomFormat.cyclonedx,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="FILE", help="The file or URL to write; stdout by default."),
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
    verbose: Verbose = 0,
    debug: Debug = False,
) -> None:
    """Write a bill of materials for DELTA: target, base, files, licenses. Needs the extra `bom`.

    deltaweights bom delta -o bom.json
    deltaweights bom org/model-delta --format spdx
    """
    with working(verbose=verbose, debug=debug):
        from ..bom import bom_of
        from ..storage import write_document

        time = datetime.fromtimestamp(created, timezone.utc)
        document = bom_of(delta, format.value, created=time)
        if output is None:
            typer.echo(document, nl=False)
            return
        write_document(output, document)


@app.command("license", rich_help_panel=_LOOK)
def show_license(
    delta: Delta,
    texts: Annotated[bool, typer.Option("--texts", help="Also show the license texts and notices.")] = False,
    as_json: Json = False,
    verbose: Verbose = 0,
    debug: Debug = False,
) -> None:
    """Show the licenses of base and target, what they ask, and what does not fit together.

    deltaweights license org/model-delta
    deltaweights license delta --texts | less
    """
    with working(as_json=as_json, verbose=verbose, debug=debug) as work:
        from ..inspect import license_of

        facts = license_of(delta, texts=texts)
    work.report(facts.to_dict(), rendering.license_lines(facts))


def main() -> None:
    """The console script's entry point."""
    # NumPy's linear algebra is never used here; its threads would cost start-up time.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Imports make tens of thousands of objects that stay: looking through them for cycles takes a tenth of
    # start-up.
    gc.set_threshold(100_000)
    open_streams()
    try:
        app()
    except KeyboardInterrupt:  # before or after the work itself
        sys.exit(130)
    except OSError as error:
        if error.filename is not None:
            raise
        stdout_failed(error)
        sys.exit(1)
    finally:
        leave_stderr()
