"""Wrong usage, told like every other error."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from .streams import report, show_error

#: Wrong usage. Typer's own copy of click has it, or click, depending on its version.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class Commands(TyperGroup):
    """The commands. A wrong option, a missing argument and the like become three lines on stderr, with
    ``--json`` also an object on stdout, and exit code 2."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command that ``args`` name, and exit."""
        given = list(sys.argv[1:] if args is None else args)
        try:
            code = super().main(
                given, prog_name, complete_var, False, windows_expand_args=windows_expand_args, **extra
            )
        except UsageError as error:
            _show(error, as_json=any(word.partition("=")[0] == "--json" for word in given))
            code = 2
        except typer.Abort:
            code = 130
        sys.exit(code)


def _show(error: Any, *, as_json: bool) -> None:
    """Say what is wrong, how it is right, and where there is more."""
    what = error.format_message().strip().rstrip(".")
    if not what:  # without any argument, the help was shown
        return
    context = error.ctx
    usage = " ".join(re.sub("[{}]", "", context.get_usage() if context else "").split())
    path = context.command_path if context else "deltaweights"
    told = {"what": what, "why": usage, "fix": f"`{path} --help` shows all options, with examples."}
    show_error("\n".join(filter(None, told.values())))
    report({"error": told}, (), as_json=as_json)
