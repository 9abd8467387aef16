"""The commands of weight streams: ``deltaweights stream …``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from enum import Enum
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import DeltaWeightsError
from ..words import counted, plain, size
from .options import Debug, Json, Quiet, Threads, Verbose
from .rendering import speed_line
from .session import working
from .signatures import SIGNER, Password, PublicKey, StreamName
from .usage import UsageError

if TYPE_CHECKING:
    from ..engines import ExportReport, ImportReport

stream = typer.Typer(
    name="stream",
    no_args_is_help=True,
    help="""Turn weight streams into the updates of slime, miles and stitch, and back.

    deltaweights stream export runs/7/stream -o updates
    deltaweights stream import updates runs/7/stream --base ./base
    """,
)


class EncodingName(str, Enum):
    """The values of ``--encoding``."""

    xor = "xor"
    overwrite = "overwrite"


class ChecksumName(str, Enum):
    """The values of ``--checksum``."""

    xxh3_128 = "xxh3-128"
    blake3 = "blake3"
    adler32 = "adler32"


@stream.command("export")
def export(
    location: Annotated[
        str, typer.Argument(metavar="STREAM", help="The stream: a folder, a URL, or hf://org/name.")
    ],
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="DIR", help="The folder for weight_v000001 and so on.")
    ],
    base: Annotated[
        str | None,
        typer.Option(
            metavar="CHECKPOINT",
            help="What the engines load, version 0; needed for tied tensors, full checkpoints, and a stream "
            "without anchor.",
        ),
    ] = None,
    encoding: Annotated[
        EncodingName, typer.Option(help="How a changed tensor is stored.")
    ] = EncodingName.xor,
    checksum: Annotated[
        ChecksumName, typer.Option(help="The checksum of each changed tensor.")
    ] = ChecksumName.xxh3_128,
    from_step: Annotated[
        int | None,
        typer.Option(min=0, metavar="STEP", help="Begin with the state of this step, as version 0."),
    ] = None,
    step: Annotated[
        int | None, typer.Option(min=0, metavar="STEP", help="End with the state of this step.")
    ] = None,
    full_every: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Make each Nth version a full checkpoint, for late engines."),
    ] = None,
    run_id: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="For stitch: write into DIR/NAME, and name the newest in DIR/latest."
        ),
    ] = None,
    public_key: PublicKey = None,
    stream_name: StreamName = None,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
    debug: Debug = False,
) -> None:
    """Write each state of STREAM as a folder that slime, miles, stitch and SGLang read.

    Run it again to go on with what was published meanwhile.

    deltaweights stream export s3://bucket/run-7 -o updates
    deltaweights stream export runs/7/stream -o updates --base ./base --full-every 100
    """
    if stream_name is not None and not public_key:
        raise UsageError("--stream-name goes with --public-key.")
    with working(as_json=as_json, quiet=quiet, verbose=verbose, debug=debug, resumes=True) as work:
        _require_torch()
        from ..engines import export_stream
        from ..engines.disk_updates.chain import require_plain

        try:
            require_plain(run_id)
        except ValueError as error:
            raise typer.BadParameter(f"{run_id!r} is no plain name.", param_hint="--run-id") from error
        with work.progress() as shown:
            done = export_stream(
                location,
                output,
                base=base,
                encoding=encoding.value,
                checksum=checksum.value,
                from_step=from_step,
                step=step,
                full_every=full_every,
                run_id=run_id,
                require_signature=public_key or None,
                stream_name=stream_name,
                threads=threads,
                progress=shown,
            )
    work.report(asdict(done), export_lines(output, done, work.seconds), with_costs=True)


@stream.command("import")
def import_(
    directory: Annotated[
        str, typer.Argument(metavar="DIR", help="The folder with weight_v000001 and so on.")
    ],
    location: Annotated[
        str,
        typer.Argument(metavar="STREAM", help="The stream to write: a folder, a URL, or hf://org/name."),
    ],
    base: Annotated[str, typer.Option(metavar="CHECKPOINT", help="What the engines began with, version 0.")],
    public: Annotated[bool, typer.Option("--public", help="Make the repository on the Hub public.")] = False,
    private_key: Annotated[
        list[str] | None,
        typer.Option(
            "--private-key",
            metavar="PEM",
            help="Sign the stream. May be given several times, while keys are changed.",
            rich_help_panel=SIGNER,
        ),
    ] = None,
    password: Password = None,
    stream_name: StreamName = None,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
    debug: Debug = False,
) -> None:
    """Publish the updates of slime, miles or stitch in DIR as a weight stream.

    Run it again to go on with what was written meanwhile.

    deltaweights stream import updates runs/7/stream --base ./base
    deltaweights stream import updates s3://bucket/run-7 --base org/base
    """
    if stream_name is not None and not private_key:
        raise UsageError("--stream-name goes with --private-key.")
    with working(as_json=as_json, quiet=quiet, verbose=verbose, debug=debug, resumes=True) as work:
        _require_torch()
        from ..engines import import_stream
        from ..signing.signers import KeySigner

        with work.progress() as shown:
            done = import_stream(
                directory,
                location,
                base,
                public=public,
                signer=[KeySigner(path, password) for path in private_key or ()] or None,
                stream_name=stream_name,
                threads=threads,
                progress=shown,
            )
    work.report(asdict(done), import_lines(location, done, work.seconds), with_costs=True)


def _require_torch() -> None:
    if find_spec("torch") is None:
        raise DeltaWeightsError(
            "Weight streams need PyTorch",
            "It is not installed.",
            "Install the extra torch: pip install 'deltaweights[torch]'.",
        )


def export_lines(place: str, done: ExportReport, seconds: float) -> Iterator[str]:
    """What ``stream export`` did, and how fast."""
    if not done.written:
        yield plain(f"{place}: version {done.first_version} is the newest state, nothing to do")
        return
    versions = _span("version", [one.version for one in done.written])
    steps = _span("step", [one.step for one in done.written])
    full = sum(one.is_full for one in done.written)
    kinds = f", {counted(full, 'full checkpoint')}" if full else ""
    whole = done.state_bytes * len(done.written)
    share = f", {done.nbytes / whole:.2%} of whole states" if whole else ""
    yield plain(f"{place}: {versions} ({steps}), {size(done.nbytes)}{share}{kinds}")
    if not done.first_version:
        first = done.written[0]
        is_reset = first.is_full and first.version == 1
        if not is_reset:
            yield f"Version 0, which the engines begin with, is step {done.first_step}."
    yield speed_line("Exported", whole, seconds)


def import_lines(place: str, done: ImportReport, seconds: float) -> Iterator[str]:
    """What ``stream import`` did, and how fast."""
    if not done.versions:
        yield plain(f"{place}: it is at version {done.version}, nothing to do")
        return
    versions = _span("version", list(done.versions))
    yield plain(
        f"{place}: {versions}, {size(done.published_bytes)} published of {size(done.read_bytes)} read"
    )
    yield speed_line("Imported", done.read_bytes, seconds)


def _span(word: str, numbers: list[int]) -> str:
    return f"{word} {numbers[0]}" if len(numbers) == 1 else f"{word}s {numbers[0]} to {numbers[-1]}"
