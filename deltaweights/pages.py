"""Fills in the templates of pages and pictures. Text is escaped, wherever it comes from."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Environment

_TEMPLATES = Path(__file__).with_name("templates")


@cache
def _environment() -> Environment:
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def fill_in(template: str, **values: object) -> bytes:
    """A page or picture, as UTF-8.

    Args:
        template: the name of a file in ``templates``.
        values: what its variables stand for. Halves of surrogate pairs in them become question marks.
    """
    return _environment().get_template(template).render(values).encode(errors="replace")
