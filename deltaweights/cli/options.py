"""Arguments and options that several commands share."""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import Enum
from typing import Annotated

import typer

#: The panels that a command's options stand in, beside its own ones.
MATCHING, RECORDS, REPORTING = "What is compared", "What the delta says of both", "What is shown"

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
DeltaOut = Annotated[str, typer.Option("--output", "-o", metavar="DELTA", help="The folder to write.")]
Json = Annotated[
    bool,
    typer.Option("--json", help="One JSON object on stdout, errors too.", rich_help_panel=REPORTING),
]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", help="No progress, no summary; warnings and errors only.", rich_help_panel=REPORTING
    ),
]
Verbose = Annotated[
    int,
    typer.Option(
        "--verbose",
        "-v",
        count=True,
        metavar="",
        show_default=False,
        help="Log what is done, with the time; -vv logs more.",
        rich_help_panel=REPORTING,
    ),
]
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
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Work on the machines of a Ray cluster, a task for each shard or job: `auto` for the one that "
        "runs, `local` to start one here, or an address. --threads is then for each task, 1 by default.",
    ),
]
Debug = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=REPORTING)
]


class EffortLevel(str, Enum):
    """The values of ``--effort``."""

    fast = "fast"
    default = "default"
    max = "max"


EffortOption = Annotated[
    EffortLevel,
    typer.Option(
        "--effort",
        help="How long to fit what merged adapters added, where a glance finds such. More makes the delta "
        "smaller; reading it takes no longer.",
        rich_help_panel=MATCHING,
    ),
]


class BomFormat(str, Enum):
    """The formats of ``bom``."""

    cyclonedx = "cyclonedx"
    spdx = "spdx"


def rename_rules(texts: Iterable[str]) -> list[tuple[str, str]]:
    """Rename rules, as in ``REGEX=REPLACEMENT``."""
    rules = []
    for text in texts:
        pattern, equals, replacement = text.rpartition("=")  # lookaheads have one too
        if not equals:
            raise typer.BadParameter(f"{text!r} has no '='.", param_hint="--rename")
        rules.append((pattern, replacement))
    return rules


def bits(text: str) -> float:
    """Bits a second, as in ``100M``."""
    return _scaled(text, "--bandwidth", "bits, such as 100M")


def number_of_bytes(text: str) -> int:
    """Bytes, as in ``200G``."""
    return int(_scaled(text, "--cache-size", "bytes, such as 200G"))


def _scaled(text: str, option: str, what: str) -> float:
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,12})?)([kKMGT]?)", text, re.ASCII)
    number = float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ") if match else 0
    if not number:
        raise typer.BadParameter(f"{text!r} is not a number of {what}.", param_hint=option)
    return number
