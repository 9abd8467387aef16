"""``deltaweights batch``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..words import plain, size
from .machines import machines
from .options import AcceptLicense, Debug, Json, Quiet, Ray, Threads, Verbose, number_of_bytes
from .rendering import elapsed
from .session import working
from .streams import note

if TYPE_CHECKING:
    from ..batch import JobResult


def batch(
    jobs: Annotated[
        str, typer.Argument(metavar="JOBS", help="The jobs: a file with one JSON object a line.")
    ],
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="RESULTS",
            help="The local file to which a line is added for each job that is done; by default JOBS with "
            ".results.jsonl instead of its suffix.",
        ),
    ] = None,
    at_once: Annotated[
        int, typer.Option("--jobs", min=1, max=256, metavar="N", help="How many jobs run at once, here.")
    ] = 1,
    cache: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Keep copies of bases that are far away in this folder of each machine: jobs of one base "
            "fetch it once.",
        ),
    ] = None,
    cache_size: Annotated[
        str, typer.Option(metavar="BYTES", help="The most bytes of these copies, such as 200G.")
    ] = "500G",
    accept_license: AcceptLicense = None,
    threads: Threads = None,
    ray: Ray = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
    debug: Debug = False,
) -> None:
    """Run the jobs in JOBS: each makes, applies or verifies a delta. One that fails stops nothing.

    Run it again to go on after an interruption, and to try again what failed. Ends with 1 if a job failed.

    deltaweights batch jobs.jsonl -o results.jsonl
    deltaweights batch jobs.jsonl --jobs 4 --cache /scratch/bases
    """
    results = output or str(Path(jobs).with_suffix(".results.jsonl"))
    most = number_of_bytes(cache_size)
    if ray is not None and at_once > 1:
        raise typer.BadParameter("The cluster decides how many jobs run at once.", param_hint="--jobs")
    counts: Counter[str] = Counter()
    with (
        working(as_json=as_json, quiet=quiet, verbose=verbose, debug=debug, resumes=True) as work,
        machines(ray, threads) as executor,
    ):
        from ..batch import run_batch

        running = run_batch(
            jobs,
            results,
            at_once=at_once,
            threads=threads,
            executor=executor,
            accept_license=accept_license or (),
            cache=cache,
            cache_bytes=most,
        )
        with closing(running):
            for result in running:
                counts[result.status] += 1
                if not quiet and result.status != "skipped":
                    note("\n".join(_lines_of(result)))
    fields = {name: counts[name] for name in ("ok", "failed", "skipped")}
    lines = [plain(f"{results}: {', '.join(f'{count} {name}' for name, count in fields.items())}")]
    work.report({**fields, "results": results}, lines, with_costs=True)
    if counts["failed"]:
        raise typer.Exit(1)


def _lines_of(result: JobResult) -> Iterator[str]:
    """One job that is done."""
    name = plain(result.id or f"line {result.line}")
    facts = [result.status, name, *filter(None, [result.verb])]
    if result.delta_bytes is not None and result.target_bytes is not None:
        facts.append(f"{size(result.delta_bytes)} for {size(result.target_bytes)}")
    yield f"{', '.join(facts)}, {elapsed(result.seconds)}"
    if result.error:
        for line in filter(None, (result.error.what, result.error.why, result.error.fix)):
            yield plain(f"  {line}")
